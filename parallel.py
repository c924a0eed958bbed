"""parallel.py - one model on many devices: who holds what, who talks to whom, and exactly the same.

THE IDEA
    A model outgrows a device in memory, or a day in time. Then its work is cut along axes: the
    batch (dp), the width of its matrices (tp), its depth (pp), the text (cp), its experts (ep). A
    process, called rank, holds its part and sends the rest of what others need. Each cut is a
    pair: something is done going forward, and its mirror image going backward (a sum for a copy).
    No cut changes what is computed: loss and gradients are those of one process, up to rounding.
    Cuts are applied to a finished model from outside; model.py has never heard of ranks.

THE MATHS (n ranks of a group, S bytes of a tensor)
    all_reduce = reduce_scatter, then all_gather: each sends (n-1)/n S around a ring, twice
    y = x [W1 W2] = [x W1, x W2]       columns: no sum        [x1 x2] [W1; W2] = x1 W1 + x2 W2
    softmax over blocks of keys: y = sum_b e^(L_b - L) y_b, L = log sum_b e^L_b, L_b of a block
    a pipeline of p stages and m micro-batches idles (p-1) / (m+p-1) of the time

THE COSTS (bytes a parameter in float32 with AdamW: weight, gradient, state; sent a step, of W S)
    none 4 + 4 + 8, optimizer 4 + 4 + 8/n: 2 (n-1)/n S     full (4 + 4 + 8)/n: 3 (n-1)/n S
    tp: 4 all_reduces of the stream a layer; sequence: as many bytes, but norms' memory / tp
    pp: the stream over each border, and back. cp: (n-1) blocks of keys and values, and back

CONTENTS  ParallelConfig / collectives / the mesh / schedules / data: buckets and shards / tensors /
          context / experts / the engine / checkpoints / training / the lesson
NOT HERE  zero-bubble and interleaved schedules, fp8 on the wire, async tp; a model that does not
          fit on one *host*: each rank draws all weights there first, so that they are the same
RUN       python parallel.py                               # each strategy on forked processes
          torchrun --nproc_per_node 2 parallel.py          # trains for a minute; last: bits_per_byte
          torchrun --nproc_per_node 8 --max-restarts 3 parallel.py --plan dp=2,tp=4 --shard full
REFERENCES
    Patarasuk, Yuan 2009 (ring all_reduce); Li et al. 2020 (2006.15704, buckets); Rajbhandari et al.
    2020 (1910.02054, ZeRO: `optimizer` is its stage 1, `full` 3); Zhao et al. 2023 (2304.11277,
    FSDP); Shoeybi et al. 2019 (1909.08053, tensors); Korthikanti et al. 2022 (2205.05198, sequence,
    recomputing); Huang et al. 2019 (1811.06965, GPipe); Narayanan et al. 2021 (2104.04473, 1F1B);
    Liu et al. 2023 (2310.01889, ring attention); Lepikhin et al. 2020 (2006.16668, experts)
EXERCISE  Empty `one_f_one_b`; fill it until `pytest test_all.py -k schedule` is green again.
"""
import argparse, dataclasses, json, math, os, shutil, signal, sys, time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import train
from bpe import UserError
from data import Loader, in_order, validation
from kernels import Context, RMSNorm, linear_cross_entropy, logits_of, up
from model import FFN, Attention, MoE, ModelConfig, read_tensors, save_tensors
from optim import SOAP, Muon, Shampoo
from train import Progress, TrainConfig, flag

# -----------------------------------------------------------------------------
# Configuration

SHARDS = ("none", "optimizer", "full")

@dataclass(frozen=True)
class ParallelConfig:
    """How a run is divided; its fields are flags."""
    plan: str | None = flag(None, "axis=ranks of dp, pp, cp, tp, whose product is the number of "
                            "processes, and ep, which divides dp; none: dp alone")
    shard: str = flag("none", "what data ranks divide: none, optimizer (its state) or full (all)")
    sequence: bool = flag(False, "tp ranks divide the stream between layers, too")
    pipeline: str = flag("1f1b", "order of work in a pipeline: 1f1b or gpipe")
    recompute: bool = flag(False, "keep a layer's input alone, and run it again going backward")
    ring: bool = flag(False, "the collectives of this file in place of torch's")
    timeout: float = flag(600.0, "seconds to wait for another rank before giving up")

    def __post_init__(self):
        for name, rows in (("shard", SHARDS), ("pipeline", SCHEDULES)):
            if getattr(self, name) not in rows:
                refuse(name, getattr(self, name), " or ".join(rows), f"set --{name}")

def refuse(name, got, wanted, do):
    """Ends all ranks for a user's mistake that all of them see; the first says it."""
    if int(os.environ.get("RANK", 0)): sys.exit(2)
    raise UserError(f"{name}: got {got}, wanted {wanted}; {do}")

def read_plan(text: str | None, world: int):
    """{"dp", "pp", "cp", "tp", "ep": ranks}: "tp=2" of 8 processes says dp=4, too."""
    plan = dict.fromkeys(("dp", "pp", "cp", "tp", "ep"), 1)
    for part in filter(None, (text or "").split(",")):
        axis, _, n = part.partition("=")
        if axis not in plan or not n.isdigit() or int(n) < 1:
            refuse("plan", repr(part), "axis=ranks, axis one of " + ", ".join(plan), "set --plan")
        plan[axis] = int(n)
    rest = plan["pp"] * plan["cp"] * plan["tp"]
    if "dp=" not in (text or ""): plan["dp"] = max(1, world // rest)
    if plan["dp"] * rest != world:
        refuse("plan", f"{text}, {plan['dp'] * rest} ranks", f"a product of {world}, as many as "
               "there are processes", f"set --plan, or --nproc_per_node {plan['dp'] * rest}")
    if plan["dp"] % plan["ep"]: refuse("plan", text, "an ep that divides dp", "set --plan")
    return plan

# -----------------------------------------------------------------------------
# Collectives
# All are made of sending and receiving. In a ring each rank sends to the next and receives from the
# one before, all at the same time: no link carries more than another, and none idles. reduce_scatter
# lets n parts travel the ring, each growing by what every rank adds; all_gather lets the finished
# parts travel once more. torch's are the same idea, over many rings and links at once.

ALL_GATHER, REDUCE_SCATTER = (getattr(dist, new, None) or getattr(dist, old) for new, old in (
    ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")))
SENT = Counter()  # bytes that this process sent by the rings below, by group

class Pending:
    """A collective under way; wait() -> its result. `wire`, a simulated one, makes it last: bytes /
    rate seconds after all that was sent before (for the lesson; sleeping takes no processor)."""
    rate, free = None, 0.0

    def __init__(self, out, work=None, n_bytes=0):
        self.out, self.work = out, work
        if Pending.rate:
            Pending.free = max(time.perf_counter(), Pending.free) + n_bytes / Pending.rate
            self.until = Pending.free

    def wait(self):
        if self.work: self.work.wait()
        if Pending.rate: time.sleep(max(0.0, self.until - time.perf_counter()))
        return self.out

class Group:
    """The ranks that differ in some axes of the mesh alone: n of them, this one the rank-th."""
    own = False  # the rings of this file?

    def __init__(self, name, ranks, me, pg):
        self.name, self.ranks, self.pg = name, ranks, pg
        self.n, self.rank = len(ranks), ranks.index(me)

    def swap(self, x, to, out, source):
        """Sends x to one member and receives `out` from another."""
        SENT[self.name] += x.nbytes
        ops = [dist.P2POp(dist.isend, x, self.ranks[to % self.n], self.pg),
               dist.P2POp(dist.irecv, out, self.ranks[source % self.n], self.pg)]
        for work in dist.batch_isend_irecv(ops): work.wait()
        return out

    def reduce_scatter(self, x, op=dist.ReduceOp.SUM):
        """(n, ...) -> Pending (...): row `rank` of all members' x, added up."""
        n, r, x = self.n, self.rank, x.contiguous()
        cost = x.nbytes * (n - 1) // n
        if n == 1: return Pending(x[0])
        if not self.own:
            out = torch.empty_like(x[0])
            return Pending(out, REDUCE_SCATTER(out.view(-1), x.view(-1), op, self.pg,
                                                           async_op=True), cost)
        add = torch.add if op == dist.ReduceOp.SUM else torch.maximum
        part = x[r - 1]  # part r - 1 sets out here, and is complete n - 1 ranks further
        for i in range(2, n + 1):
            part = add(self.swap(part, r + 1, torch.empty_like(part), r - 1), x[(r - i) % n])
        return Pending(part, None, cost)

    def all_gather(self, x, out=None):
        """(...) -> Pending (n, ...): all members' x, in order."""
        n, r, x = self.n, self.rank, x.contiguous()
        if out is None: out = x.new_empty(n, *x.shape)
        if n == 1 or self.own: out[r] = x
        if n == 1: return Pending(out)
        if not self.own:
            return Pending(out, ALL_GATHER(
                out.view(-1), x.view(-1), self.pg, async_op=True), x.nbytes * (n - 1))
        for i in range(n - 1): self.swap(out[(r - i) % n], r + 1, out[(r - i - 1) % n], r - 1)
        return Pending(out, None, x.nbytes * (n - 1))

    def all_reduce(self, x, op=dist.ReduceOp.SUM):
        """(...) -> (...) the same everywhere: the sum, or the maximum."""
        if self.n == 1: return x
        flat = F.pad(x.reshape(-1), (0, -x.numel() % self.n)).view(self.n, -1)
        whole = self.all_gather(self.reduce_scatter(flat, op).wait()).wait()
        return whole.view(-1)[:x.numel()].view(x.shape)

    def all_to_all(self, x, give, take):
        """Rows of x, give[i] of them for member i, in order -> those for us, take[i] from i."""
        out = x.new_empty(sum(take), *x.shape[1:])
        if not self.own:
            dist.all_to_all_single(out, x.contiguous(), take, give, self.pg)
            return out
        there, here = x.contiguous().split(give), out.split(take)
        here[self.rank].copy_(there[self.rank])
        for i in range(1, self.n):
            to, source = (self.rank + i) % self.n, (self.rank - i) % self.n
            self.swap(there[to], to, here[source], source)
        return out

    def small(self, *values, op=dist.ReduceOp.SUM):
        """Sums of a few numbers: what controls the work, not counted as traffic."""
        x = torch.tensor(values, dtype=torch.float64)
        if self.n > 1: dist.all_reduce(x, op, self.pg)
        return x.tolist()

class Both(torch.autograd.Function):
    """x -> forward(x), whose gradient g -> backward(g): a collective and its mirror image."""
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.mirror = backward
        return forward(x)

    @staticmethod
    def backward(ctx, g): return ctx.mirror(g), None, None

def same(x): return x.view_as(x)

def pairs(g, dim=1):
    """{name: (forward, backward)} of group g. What is the same on all ranks going forward, but used
    for different parts, has a gradient that must be added up; and the other way round."""
    def gather(x): return torch.cat([*g.all_gather(x).wait()], dim)
    def scatter(x): return g.reduce_scatter(torch.stack(x.chunk(g.n, dim))).wait()
    def mine(x): return x.chunk(g.n, dim)[g.rank].contiguous()
    table = dict(copy=(same, g.all_reduce), sum=(g.all_reduce, same), gather=(gather, scatter),
                 scatter=(scatter, gather), mine=(mine, gather), whole=(gather, mine))
    return SimpleNamespace(**{name: lambda x, pair=pair: Both.apply(x, *pair)
                              for name, pair in table.items()})

# -----------------------------------------------------------------------------
# The mesh: ranks in a box of dp x pp x cp x tp, tp innermost, as it talks most and neighbours are
# nearest. Every group is a slice of it. dp is two axes, so that ep of its ranks can share experts.

GROUPS = dict(world=(0, 1, 2, 3, 4), data=(0, 1, 3), dp=(0, 1), ep=(1,), replicas=(0, 3), pp=(2,),
              back=(2,), cp=(3,), tp=(4,), stages=(0, 1, 2, 3), ends=(2,))

class Mesh:
    """A Group for each row of GROUPS, and for `ends`, the first and the last stage."""
    def __init__(self, plan, ring=False):
        self.plan, me, Group.own = plan, dist.get_rank(), ring
        dp, pp, cp, tp, ep = plan.values()
        box = torch.arange(dist.get_world_size()).view(dp // ep, ep, pp, cp, tp)
        for name, axes in GROUPS.items():
            rest = [i for i in range(5) if i not in axes]
            for row in box.permute(*rest, *axes).reshape(-1, math.prod(
                    box.shape[i] for i in axes)).tolist():
                if name == "ends": row = row[:1] + row[1:][-1:]
                pg = dist.new_group(row) if len(row) > 1 else None
                if me in row: setattr(self, name, Group(name, row, me, pg))
        self.first, self.last = self.pp.rank == 0, self.pp.rank == pp - 1

# -----------------------------------------------------------------------------
# Schedules of a pipeline
# A stage does forward and backward of micro-batches in an order, and waits for its neighbours. All
# forward first (GPipe) keeps m activations; one forward, one backward (1F1B) at most p, in the same
# time. A schedule is a list of ("F" or "B", micro-batch) for each stage, which needs no processes.

def gpipe(stage, p, m):
    return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]

def one_f_one_b(stage, p, m):
    """p=2, m=3: stage 0 does F0 F1 B0 F2 B1 B2, stage 1 F0 B0 F1 B1 F2 B2."""
    ahead = min(p - stage - 1, m)  # forwards before the first backward can arrive
    steady = [(kind, i + ahead * (kind == "F")) for i in range(m - ahead) for kind in "FB"]
    return [("F", i) for i in range(ahead)] + steady + [("B", i) for i in range(m - ahead, m)]

SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}

def simulate(schedule, p, m, forward=1.0, backward=2.0):
    """(fraction of the time that stages idle, most activations that each holds) in virtual time."""
    orders, done, clock = [schedule(s, p, m) for s in range(p)], {}, [0.0] * p
    left, held, most = [list(o) for o in orders], [0] * p, [0] * p
    while any(left):
        moved = False
        for s in range(p):
            kind, i = left[s][0] if left[s] else ("", 0)
            needs = {"F": ("F", i, s - 1) if s else None, "": "never",
                     "B": ("B", i, s + 1) if s < p - 1 else ("F", i, s)}[kind]
            if needs is not None and needs not in done: continue
            clock[s] = max(clock[s], done.get(needs, 0.0)) + (forward if kind == "F" else backward)
            done[kind, i, s], moved = clock[s], bool(left[s].pop(0))
            held[s] += 1 if kind == "F" else -1
            most[s] = max(most[s], held[s])
        assert moved, f"a schedule that waits for itself: {left}"
    return 1 - m * (forward + backward) / max(clock), most

# -----------------------------------------------------------------------------
# Data ranks: buckets and shards
# Data ranks hold the same weights and see other sequences; gradients are added up. Parameters of a
# layer share a flat buffer, a bucket, of n equal slices: one message in place of many small ones,
# under way while backward goes on below. What follows needs a slice per rank alone: its optimizer
# state ("optimizer"), or weights and gradients, too, which are gathered when a layer is due and
# freed behind it ("full"). Elementwise optimizers may cut anywhere; those that see a matrix
# (WHOLE) need all of it, so that matrices go to slices undivided, the largest first.

WHOLE = (Shampoo, SOAP, Muon)

@dataclass(frozen=True)
class Place:
    """Which part of a parameter a tensor is: of n shards along `dim` (None: undivided) the rank-th,
    padded with zeros if they are unequal, and of that, flattened, start to end (None: all)."""
    name: str
    dim: int | None = None
    rank: int = 0
    n: int = 1
    start: int = 0
    end: int | None = None

    def padded(self, shape):
        return [-(-s // self.n) * self.n if i == self.dim else s for i, s in enumerate(shape)]

    def shard(self, whole):
        if self.dim is None: return whole
        wide = whole.new_zeros(self.padded(whole.shape))
        wide[tuple(map(slice, whole.shape))] = whole
        return wide.chunk(self.n, self.dim)[self.rank]

    def take(self, whole):
        """Its part of a whole tensor; flat, unless it is an undivided one."""
        part = self.shard(whole).contiguous()
        return part if self.end is None else part.view(-1)[self.start:self.end]

    def put(self, wide, part):
        """The inverse, into a whole tensor that is padded."""
        shard = wide if self.dim is None else wide.chunk(self.n, self.dim)[self.rank]
        flat = shard.reshape(-1)  # a copy, if a shard is not one piece of memory
        flat[self.start:self.end] = part.reshape(-1)
        shard.copy_(flat.view_as(shard))

class Bucket:
    """The parameters {name: p} of `group`'s ranks in a flat buffer; p.data and p.grad are views."""
    def __init__(self, params, group, shard, whole, dtype):
        self.params, self.group, self.full, n = params, group, shard == "full", group.n
        self.each = shard == "none"  # does every rank hold all slices' state?
        sizes, at, ends = {k: p.numel() for k, p in params.items()}, {}, [0] * n
        if whole:
            for name in sorted(sizes, key=sizes.get, reverse=True):
                i = ends.index(min(ends))
                at[name], ends[i] = (i, ends[i]), ends[i] + sizes[name]
            self.size = max(ends)
            at = {name: i * self.size + start for name, (i, start) in at.items()}
        else:
            for name in sizes: at[name] = sum(sizes[k] for k in at)
            self.size = -(-sum(sizes.values()) // n)
        first = next(iter(params.values()))
        self.flat, self.at, self.pending = first.new_zeros(n * self.size, dtype=dtype), at, None
        master = self.flat if dtype == first.dtype else first.new_zeros(n * self.size)
        for name, p in params.items(): self.view(master, name).copy_(p.data)
        own = slice(group.rank * self.size, (group.rank + 1) * self.size)
        self.master = master[own].clone() if self.full else master
        self.sum = torch.zeros_like(self.master)  # of gradients
        for name, p in params.items(): p.data = self.view(self.flat, name)
        if self.full: self.free()
        self.slices = range(n) if self.each else [group.rank]

    def view(self, flat, name):
        p = self.params[name]
        return flat[self.at[name]:self.at[name] + p.numel()].view(p.shape)

    def pieces(self):
        """Yields (name, start, end, weights, gradients, is it our own slice) of the slices held."""
        for i in self.slices:
            a, offset = i * self.size, self.group.rank * self.size if self.full else 0
            for name, at in self.at.items():
                lo, hi = max(a, at), min(a + self.size, at + self.params[name].numel())
                if lo < hi: yield (name, lo - at, hi - at, self.master[lo - offset:hi - offset],
                                   self.sum[lo - offset:hi - offset], i == self.group.rank)

    def gather(self):
        """Sends for the weights, if they are not here or on their way."""
        if self.full and not self.flat.untyped_storage().nbytes():
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())
            out = self.flat.view(self.group.n, -1)
            self.pending = self.group.all_gather(self.master.to(self.flat.dtype), out)

    def arrive(self):
        self.gather()
        if self.pending: self.pending.wait()
        self.pending = None

    def free(self):
        if self.full: self.flat.untyped_storage().resize_(0)

    def open(self):
        """Room for gradients: all of them while a layer goes backward."""
        self.grad = torch.zeros_like(self.flat) if self.full else self.sum
        for name, p in self.params.items(): p.grad = self.view(self.grad, name)

    def reduce(self):
        """Sends the gradients off to be added up, each slice where it belongs."""
        self.adding = self.group.reduce_scatter(self.grad.view(self.group.n, -1))

    def advance(self):
        """Takes the next step on that way, and says if it was the last: `none` sends the sums on."""
        own = self.adding.wait()
        if self.each and self.grad is not None:
            self.adding = self.group.all_gather(own, self.sum.view(self.group.n, -1))
        elif self.full: self.sum += own
        elif not self.each: self.sum.view(self.group.n, -1)[self.group.rank] = own
        landed = self.grad is None or not self.each
        self.grad = None
        if landed:
            for p in self.params.values(): p.grad = None
        return landed

# -----------------------------------------------------------------------------
# Tensors: the width of every layer, divided
# The first matrix of a layer is cut by rows of its output (heads, hidden units), the last by columns
# of its input: one copy goes in and one sum comes out, whatever is between. Embedding and head are
# cut by tokens: no rank ever has all logits. With `sequence` the stream between layers is cut along
# the text, too: the copy becomes an all_gather, the sum a reduce_scatter, norms work on a part.

def row_forward(linear, leave, x):
    y = leave(F.linear(x, linear.weight.to(x.dtype)))
    return y if linear.bias is None else y + linear.bias.to(x.dtype)  # once, behind the sum

def token_forward(table, g, ids):
    """Embedding of which each rank has the rows of some tokens."""
    local = ids - g.rank * len(table.weight)
    mine = (local >= 0) & (local < len(table.weight))
    x = F.embedding(torch.where(mine, local, 0), table.weight) * mine[..., None]
    return pairs(g).sum(x)

def token_cross_entropy(x, weight, targets, cap, g, vocab_size):
    """linear_cross_entropy of a head of which each rank has some rows; those beyond vocab_size fill
    up. Three numbers a token are sent: largest logit, sum of exp, the target's logit."""
    z, first = up(logits_of(x, weight, cap)), g.rank * len(weight)  # (B, T, V / tp)
    ids = torch.arange(first, first + len(weight), device=z.device)
    z = z.masked_fill(ids >= vocab_size, -math.inf)
    top = g.all_reduce(z.detach().amax(-1), dist.ReduceOp.MAX)
    local = targets - first
    mine, add = (local >= 0) & (local < len(weight)), pairs(g).sum
    total = add((z - top[..., None]).exp().sum(-1))
    own = add(torch.where(mine, z.gather(-1, torch.where(mine, local, 0)[..., None])[..., 0], 0.0))
    return torch.where(targets >= 0, total.log() + top - own, 0.0)

def cut_tensors(model, g, sequence):
    """Divides a model over group g -> ({parameter: dim it is cut along}, {parameters whose
    gradients each rank has a part of, as it saw a part of the stream})."""
    cuts, partial_sums, p, last = {}, set(), pairs(g), pairs(g, -1)
    plain = p.copy, p.sum
    ways = (p.gather, p.scatter) if sequence else plain

    def divide(part, first, last, ways):
        part.register_forward_pre_hook(lambda m, args: (ways[0](args[0]), *args[1:]))
        last.forward = partial(row_forward, last, ways[1])
        cuts[last.weight] = 1
        for linear in filter(None, first):
            cuts.update((w, 0) for w in (linear.weight, linear.bias) if w is not None)
        if sequence and last.bias is not None: partial_sums.add(last.bias)

    for layer in model.layers.values():
        mixer, ffn = layer.self_attn, layer.mlp
        if isinstance(mixer, Attention):
            mixer.cfg = SimpleNamespace(**{**vars(mixer.cfg), "n_heads": mixer.cfg.n_heads // g.n,
                                           "n_kv_heads": mixer.cfg.n_kv_heads // g.n})
            first = mixer.q_proj, mixer.k_proj, mixer.v_proj
            if hasattr(mixer, "v_embed"): cuts[mixer.v_embed.weight] = 1
        else:
            mixer.sizes = (mixer.sizes[0] // g.n, *mixer.sizes[1:])
            first = mixer.q_proj, mixer.kv_b_proj
        divide(mixer, first, mixer.o_proj, ways)
        partial_sums.update(w for w in mixer.parameters()
                            if w not in cuts and w is not mixer.o_proj.bias)
        for m in ffn.modules():
            if isinstance(m, FFN):
                divide(m, (m.gate_proj, m.up_proj), m.down_proj, ways if m is ffn else plain)
        if isinstance(ffn, MoE) and sequence:  # a router sees all tokens, on every rank the same
            ffn.register_forward_pre_hook(lambda m, args: p.whole(args[0]))
            ffn.register_forward_hook(lambda m, args, out: (p.mine(out[0]), out[1]))
            partial_sums.difference_update(w for w in ffn.parameters())
    if sequence: partial_sums.update(w for m in model.modules() if isinstance(m, RMSNorm)
                                     for w in m.parameters())
    for table in (getattr(model, name, None) for name in ("embed_tokens", "lm_head")):
        if table is not None: cuts[table.weight] = 0
    if hasattr(model, "embed_tokens"):
        model.embed_tokens.forward = partial(token_forward, model.embed_tokens, g)
    if hasattr(model, "embed_bigram"):  # rows are looked up by their number: columns are cut
        cuts[model.embed_bigram.weight] = 1
        model.embed_bigram.register_forward_hook(lambda m, args, y: last.whole(y))
    return cuts, partial_sums

# -----------------------------------------------------------------------------
# Context: a text too long for one rank
# Each rank has two pieces of the text, the r-th from either end (zigzag): to the causal mask, an
# early piece is little work and a late one much, and every such pair is the same. Keys and values
# travel a ring; what blocks of them give is put together by their log-sum-exps.

def block_scores(q, k, causal):
    s = q @ k[:, :, None].mT / math.sqrt(q.shape[-1])  # (B,Hkv,G,T,Dh) @ (B,Hkv,1,Dh,S)
    if not causal: return s
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1),
                         -math.inf)

def ring_parts(r, j, half):
    """(queries, keys) of rank r that see rank j's, as slices, and if by the causal mask."""
    if r == j: return slice(None), slice(None), True
    return (slice(None), slice(half), False) if j < r else (slice(half, None), slice(None), False)

class RingAttention(torch.autograd.Function):
    """Causal attention of q (B, H, T, Dh) and k, v (B, Hkv, T, Dh), each rank's part of the text."""
    @staticmethod
    def forward(ctx, q, k, v, g):
        q, kv = q.unflatten(1, (k.shape[1], -1)), torch.stack((k, v))  # (B, Hkv, G, T, Dh)
        ctx.kv, ctx.g = kv, g
        y, lse = torch.zeros_like(up(q)), up(q.new_full(q.shape[:-1], -math.inf))
        for i in range(g.n):
            rows, cols, causal = ring_parts(g.rank, (g.rank - i) % g.n, q.shape[3] // 2)
            s = up(block_scores(q[..., rows, :], kv[0][:, :, cols], causal))
            new = torch.logaddexp(lse[..., rows], s.logsumexp(-1))
            y[..., rows, :] = y[..., rows, :] * (lse[..., rows] - new).exp()[..., None] + (
                s - new[..., None]).exp() @ up(kv[1][:, :, None, cols])
            lse[..., rows] = new
            if i < g.n - 1: kv = g.swap(kv, g.rank + 1, torch.empty_like(kv), g.rank - 1)
        ctx.save_for_backward(q, y, lse)
        return y.to(q.dtype).flatten(1, 2)

    @staticmethod
    def backward(ctx, dy):
        (q, y, lse), kv, g = ctx.saved_tensors, ctx.kv, ctx.g
        dy, dq, dkv = up(dy.unflatten(1, q.shape[1:3])), torch.zeros_like(y), torch.zeros_like(up(kv))
        delta = (dy * y).sum(-1, keepdim=True)
        for i in range(g.n):
            rows, cols, causal = ring_parts(g.rank, (g.rank - i) % g.n, q.shape[3] // 2)
            some, k, v = dy[..., rows, :], up(kv[0][:, :, None, cols]), up(kv[1][:, :, None, cols])
            s = up(block_scores(q[..., rows, :], kv[0][:, :, cols], causal))
            p = (s - lse[..., rows, None]).exp()  # as in FlashAttention's backward
            ds = p * (some @ v.mT - delta[..., rows, :]) / math.sqrt(q.shape[-1])
            dq[..., rows, :] += ds @ k
            dkv[0][:, :, cols] += (ds.mT @ up(q[..., rows, :])).sum(2)
            dkv[1][:, :, cols] += (p.mT @ some).sum(2)
            if i < g.n - 1: kv = g.swap(kv, g.rank + 1, torch.empty_like(kv), g.rank - 1)
            dkv = g.swap(dkv, g.rank + 1, torch.empty_like(dkv), g.rank - 1)  # ends at home
        return dq.flatten(1, 2).to(q.dtype), *dkv.to(q.dtype), None

class RingContext(Context):
    """Context of this rank's part of the text, and of all tokens."""
    def __init__(self, cfg, tokens, g):
        parts = torch.arange(tokens.shape[1], device=tokens.device).chunk(2 * g.n)
        self.index, self.all, self.g = torch.cat((parts[g.rank], parts[-1 - g.rank])), tokens, g
        own = tokens[:, self.index]
        super().__init__(cfg, own, self.index.expand_as(own))

    def attend(self, q, k, v, window=None, dropout=0.0):
        return RingAttention.apply(q, k, v, self.g)

    def before(self, cache=None): return F.pad(self.all, (1, -1), value=-1)[:, self.index]

# -----------------------------------------------------------------------------
# Experts: each rank has some, and tokens travel to theirs and back

def remote_experts(moe, g, rows, load):
    """MoE.run: rows (N, D) sorted by expert, load (E,) of each, however uneven."""
    per = len(load) // g.n
    theirs = g.all_to_all(load.view(g.n, per), [1] * g.n, [1] * g.n)  # (n, per): from each, for ours
    give, take = load.view(g.n, per).sum(1).tolist(), theirs.sum(1).tolist()
    go, back = (partial(g.all_to_all, give=a, take=b) for a, b in ((give, take), (take, give)))
    expert_of = torch.arange(per, device=rows.device).repeat(g.n).repeat_interleave(theirs.view(-1))
    order = expert_of.argsort(stable=True)  # they came by sender; side by side those of an expert
    parts = Both.apply(rows, go, back).index_select(0, order).split(theirs.sum(0).tolist())
    out = torch.cat([expert(x)[0] for expert, x in zip(moe.experts.values(), parts)])
    return Both.apply(out.index_select(0, order.argsort()), back, go)

# -----------------------------------------------------------------------------
# The engine: a finished model and its optimizer, divided; what `fit` calls in place of its own

def check(c, plan, how, d_ffs):
    """Refuses by name what a plan cannot divide."""
    tp, pp, cp, ep = (plan[axis] for axis in ("tp", "pp", "cp", "ep"))
    letters = set(c.mixers)
    rules = [
        ("n_layers", c.n_layers, c.n_layers % pp == 0, f"a multiple of pp {pp}"),
        ("n_heads", c.n_heads, c.n_heads % tp == 0, f"a multiple of tp {tp}"),
        ("n_kv_heads", c.n_kv_heads, (c.n_kv_heads or tp) % tp == 0, f"a multiple of tp {tp}"),
        ("d_model", c.d_model, not c.bigram or c.d_model % tp == 0, f"a multiple of tp {tp}"),
        ("seq_len", c.seq_len, c.seq_len % (2 * cp if cp > 1 else 1) == 0, f"pieces for cp {cp}"),
        ("seq_len", c.seq_len, not how.sequence or c.seq_len // cp % tp == 0, f"parts for tp {tp}"),
        ("mixers", c.mixers, tp == 1 or letters <= set("AWNM"), "A, W, N or M, which have heads"),
        ("mixers", c.mixers, cp == 1 or letters <= set("AN"), f"A or N with cp {cp}"),
        ("ffns", c.ffns, cp == 1 or "x" not in c.ffns, "no x with cp, which parts what balances"),
        ("d_ff", d_ffs, all(d % tp == 0 for d in d_ffs), f"multiples of tp {tp}"),
        ("n_experts", c.n_experts, c.n_experts % ep == 0, f"a multiple of ep {ep}"),
        ("ep", ep, ep == 1 or "x" in c.ffns, "1, as no layer has experts"),
        ("dropout", c.dropout, c.dropout == 0 or tp * cp == 1, "0 with tp or cp"),
        ("sequence", how.sequence, not how.sequence or tp > 1, "a plan with tp")]
    for name, got, ok, wanted in rules:
        if not ok: refuse(name, got, wanted, f"set --{name}, or another --plan")

class Engine(nn.Module):
    """`model` and `optimizer`, whole and the same on all ranks, become this rank's part."""
    def __init__(self, model, optimizer, mesh, how, device=torch.device("cpu")):
        super().__init__()
        check(model.cfg, mesh.plan, how, {m.d_ff for m in model.modules() if isinstance(m, FFN)})
        self.cfg, self.mesh, self.how, self.rate = model.cfg, mesh, how, model.flops_per_token()
        whole = {name: p.detach() for name, p in model.named_parameters()}
        self.keep_stage(model)
        for moe in (m for m in model.modules() if isinstance(m, MoE) and mesh.ep.n > 1):
            per = len(moe.experts) // mesh.ep.n
            own = range(per * mesh.ep.rank, per * (mesh.ep.rank + 1))
            moe.experts = nn.ModuleDict({str(i): moe.experts[i] for i in own})
            moe.run = partial(remote_experts, moe, mesh.ep)
        cuts, partial_sums = cut_tensors(model, mesh.tp, how.sequence) if mesh.tp.n > 1 else ({}, ())
        for name, p in model.named_parameters():
            if p in cuts: p.data = Place(name, cuts[p], mesh.tp.rank, mesh.tp.n).shard(p.data).clone()
        self.model, self.pairs = model.to(device), pairs(mesh.tp)
        self.units = self.divide(optimizer, cuts, partial_sums, whole)
        self.flying, self.syncing = [], False

    def keep_stage(self, model):
        """Layers of this stage alone; embeddings on the first, the head on the last."""
        c, mesh = model.cfg, self.mesh
        per = c.n_layers // mesh.pp.n
        own = range(per * mesh.pp.rank, per * (mesh.pp.rank + 1))
        model.layers = nn.ModuleDict({str(i): model.layers[i] for i in own})
        if not mesh.last: model.norm, model.lm_head = nn.Identity(), None
        if mesh.first: return
        for name in ("embed_tokens", "embed_bigram", "embed_positions"):
            if hasattr(model, name) and not (c.tie and mesh.last and name == "embed_tokens"):
                delattr(model, name)

    def divide(self, optimizer, cuts, partial_sums, whole):
        """Makes buckets, the pieces that the optimizer moves, and the optimizer of them -> units,
        the buckets of a layer each, the last what is outside of layers."""
        mesh, how, model = self.mesh, self.how, self.model
        at = {id(p): (i, j) for i, g in enumerate(optimizer.groups) for j, p in enumerate(g["params"])}
        units, where = {}, {}
        for name, p in model.named_parameters():
            if not p.requires_grad: continue  # frozen: the same on all ranks
            where[name] = i, _ = at[id(p)]
            matrix = optimizer.groups[i]["role"] == "matrix" and p.ndim == 2
            key = (isinstance(optimizer, WHOLE) and matrix, mesh.ep.n > 1 and ".experts." in name,
                   mesh.pp.n > 1 and self.cfg.tie and name == "embed_tokens.weight")
            words = name.split(".")
            unit = units.setdefault(int(words[1]) if words[0] == "layers" else math.inf, {})
            unit.setdefault(key, {})[name] = p
        groups = [{**g, "params": []} for g in optimizer.groups]
        states = [[] for _ in groups]
        self.pieces, self.split, self.parts, self.tied, rows = [], [], [], [], []
        dtype = model.compute_dtype if how.shard == "full" else None
        for _, unit in sorted(units.items()):
            rows.append([])
            for (is_whole, expert, ends), params in unit.items():
                group = mesh.replicas if expert else mesh.data
                first = next(iter(params.values()))
                bucket = Bucket(params, group, how.shard, is_whole, dtype or first.dtype)
                rows[-1].append(bucket)
                for name, lo, hi, w, g, own in bucket.pieces():
                    p, (i, j) = params[name], where[name]
                    dim, all_of_it = cuts.get(p), hi - lo == p.numel()
                    piece = nn.Parameter(w.view(p.shape) if all_of_it else w, requires_grad=False)
                    piece.place = Place(name, dim, mesh.tp.rank if dim is not None else 0,
                                        mesh.tp.n, lo, None if all_of_it else hi)
                    piece.total, piece.matrix = g.view(piece.shape), p.ndim == 2
                    piece.copies = ((group.n if bucket.each else 1) * (1 + ends)
                                    * (1 if dim is not None else mesh.tp.n))
                    piece.saved = (own and (dim is not None or mesh.tp.rank == 0)
                                   and (mesh.first or not ends))
                    self.pieces.append(piece)
                    if p in partial_sums: self.parts.append(piece)
                    if ends: self.tied.append(piece)
                    if is_whole and dim is not None:  # a rank of tp has all of it, and updates it
                        owner = len(self.split) % mesh.tp.n
                        self.split.append((piece, None, owner))
                        if owner != mesh.tp.rank: continue
                        part, piece = piece, nn.Parameter(whole[name].clone(), requires_grad=False)
                        piece.place, piece.matrix, piece.saved = Place(name), True, own
                        piece.copies = part.copies
                        piece.data = piece.data.to(w.device)
                        self.split[-1] = part, piece, owner
                    state = optimizer.state[i][j]
                    groups[i]["params"].append(piece)
                    states[i].append({k: piece.place.take(x).to(w.device, copy=True)
                                      if torch.is_tensor(x) and x.shape == whole[name].shape
                                      else x for k, x in state.items()})
        self.optimizer = type(optimizer)(groups)
        self.optimizer.state = states
        self.optimizer.step = partial(self.update, self.optimizer.step)
        return rows

    def update(self, step, scale=1.0):
        """A step of the optimizer on the pieces, which then go to those who hold them, too."""
        tp = self.mesh.tp
        for piece, master, _ in self.split:
            total = pairs(tp, piece.place.dim).gather(piece.grad)
            if master is not None: master.grad = total
        step(scale)
        for piece, master, owner in self.split:
            parts = [x.contiguous() for x in master.chunk(tp.n, piece.place.dim)] if master is not None else None
            dist.scatter(piece.data, parts, tp.ranks[owner], tp.pg)
        for bucket in sum(self.units, []):
            if self.how.shard == "optimizer":
                rows = bucket.flat.view(bucket.group.n, -1)
                bucket.group.all_gather(rows[bucket.group.rank].clone(), rows).wait()

    # Around each layer stand two identities whose side effects are the schedule of weights and
    # gradients: a layer's gradients are complete when that of its input is, as it comes last.

    def enter(self, i, x):
        for bucket in self.units[i]: bucket.arrive()
        for bucket in self.units[i + 1]: bucket.gather()  # (what follows the last layer is here)
        return same(x)

    def leave(self, i, x):
        for bucket in self.units[i]: bucket.free()
        return same(x)

    def enter_again(self, i, g):
        for bucket in self.units[i]:
            if bucket in self.flying: self.flying.remove(bucket) or bucket.advance()
            bucket.arrive()
            if bucket.full: bucket.open()
        for bucket in self.units[i - 1] if i else (): bucket.gather()
        return g

    def leave_again(self, i, g=None):
        """Sends the gradients of unit i off; those that are on the way take a step meanwhile."""
        if self.syncing or self.how.shard == "full":
            self.flying = [bucket for bucket in self.flying if not bucket.advance()]
            for bucket in self.units[i]:
                bucket.reduce()
                bucket.free()
            self.flying += self.units[i]
        return g

    def forward(self, tokens, targets=None, x=None):
        """-> (the stream, or on the last stage nats or logits; auxiliary loss; loads by expert)."""
        mesh, model = self.mesh, self.model
        ctx = RingContext(self.cfg, tokens, mesh.cp) if mesh.cp.n > 1 else Context(self.cfg, tokens)
        if mesh.cp.n > 1 and targets is not None: targets = targets[:, ctx.index]
        for bucket in self.units[-1]: bucket.arrive()
        if mesh.first:
            x = model.embed(ctx)
            if self.how.sequence: x = self.pairs.mine(x)
            if torch.is_grad_enabled() and not x.requires_grad: x.requires_grad_()  # it was frozen
        extra, loads = 0.0, []
        for i, layer in enumerate(model.layers.values()):
            x = Both.apply(x, partial(self.enter, i), partial(self.leave_again, i))
            run = partial(checkpoint, layer, use_reentrant=False) if self.how.recompute else layer
            x, aux = run(x, ctx)
            x = Both.apply(x, partial(self.leave, i), partial(self.enter_again, i))
            extra = extra + aux.get("loss", 0.0)
            if "load" in aux: loads.append(aux["load"])
        return self.read(x, targets) if mesh.last else x, extra, loads

    def read(self, x, targets):
        model, cap, tp = self.model, self.cfg.softcap, self.mesh.tp
        x, weight = model.norm(x), (model.lm_head or model.embed_tokens).weight
        if tp.n > 1: x = (self.pairs.gather if self.how.sequence else self.pairs.copy)(x)
        if targets is None: return logits_of(x, weight, cap)
        if tp.n == 1: return linear_cross_entropy(x, weight, targets, cap)
        return token_cross_entropy(x, weight, targets, cap, tp, self.cfg.vocab_size)

    def send(self, x, group, to):
        SENT[group.name] += x.nbytes
        return dist.isend(x, group.ranks[group.rank + to], group.pg), x

    def receive(self, tokens, group, source):
        T = tokens.shape[1] // self.mesh.cp.n // (self.mesh.tp.n if self.how.sequence else 1)
        x = torch.empty(len(tokens), T, self.cfg.d_model, device=tokens.device,
                        dtype=self.model.compute_dtype or next(self.parameters()).dtype)
        dist.recv(x, group.ranks[group.rank + source], group.pg)
        return x

    def step(self, _, batches):
        """As local_step: leaves the gradient of the mean loss over all ranks' targets."""
        mesh, m = self.mesh, len(batches)
        counted, = mesh.dp.small(sum((targets >= 0).sum().item() for _, targets in batches))
        for bucket in sum(self.units, []):
            bucket.sum.zero_()
            if bucket in self.units[-1] or not bucket.full:
                bucket.arrive()
                bucket.open()
        order = SCHEDULES[self.how.pipeline](mesh.pp.rank, mesh.pp.n, m)
        total, loads, live, sent = 0.0, [], {}, []
        for k, (kind, i) in enumerate(order):
            if kind == "F":
                x = None if mesh.first else self.receive(batches[i][0], mesh.pp, -1).requires_grad_()
                y, extra, load = self(*batches[i], x)
                loads = [a + b for a, b in zip(loads, load)] or load
                extra = extra / (m * mesh.dp.n)
                if mesh.last:
                    y = y.sum() / counted
                    total, y = total + y.item(), y + extra
                else: sent.append(self.send(y.detach(), mesh.pp, 1))
                live[i] = x, y, extra
            else:
                x, y, extra = live.pop(i)
                self.syncing = k == len(order) - 1
                ends, grads = [y], [None if mesh.last else self.receive(batches[i][0], mesh.back, 1)]
                if not mesh.last and torch.is_tensor(extra): ends, grads = [y, extra], [*grads, None]
                torch.autograd.backward(ends, grads)
                if not mesh.first: sent.append(self.send(x.grad, mesh.back, -1))
        for work, _ in sent: work.wait()
        self.finish()
        for bias, load in zip(self.model.buffers(), loads):
            load = torch.tensor(mesh.dp.small(*load.tolist()))
            bias += self.cfg.balance_bias * torch.sign(load.sum() / len(load) - load).to(bias)
        return torch.tensor(mesh.stages.small(total), dtype=torch.float64).to(batches[0][0].device)[0]

    def finish(self):
        """All that is still to be added up, and what ranks of tp or both ends have parts of."""
        self.leave_again(len(self.units) - 1)
        while self.flying: self.flying = [b for b in self.flying if not b.advance()]
        for bucket in self.units[-1]: bucket.free()
        for piece in self.pieces: piece.grad = piece.total
        for group, some in ((self.mesh.tp, self.parts), (getattr(self.mesh, "ends", None), self.tied)):
            if not some: continue
            flat = group.all_reduce(torch.cat([piece.grad.view(-1) for piece in some]))
            for piece, x in zip(some, flat.split([piece.numel() for piece in some])):
                piece.grad.copy_(x.view(piece.shape))

    @torch.no_grad()
    def clip(self, params, max_norm):
        """clip_grad_norm by the norm over all ranks, of which each counts its share of copies."""
        squares = sum((p.grad.double().square().sum() / p.copies for p in self.pieces), torch.zeros(()))
        norm = torch.tensor(self.mesh.world.small(float(squares)), dtype=torch.float64).sqrt()[0]
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
        for p in self.pieces: p.grad.mul_(scale.to(p.grad)).nan_to_num_(0.0, 0.0, 0.0)
        return norm.to(self.pieces[0].device)

    @torch.no_grad()
    def infer(self, tokens, targets=None):
        x = None if self.mesh.first else self.receive(tokens, self.mesh.pp, -1)
        y = self(tokens, targets, x)[0]
        if not self.mesh.last: self.send(y, self.mesh.pp, 1)[0].wait()
        for bucket in self.units[-1]: bucket.free()
        return y if self.mesh.last else None

    def watch(self, _, tokens, params, before):
        """As `health`: the length of the last step as a part of the weights', the largest logit."""
        def square(some): return sum(float(x.double().square().sum()) / p.copies
                                     for x, p in zip(some, params) if p.matrix)
        self.eval()
        y = self.infer(tokens[:1])
        self.train()
        moved, norm = self.mesh.world.small(
            square(p - old for p, old in zip(params, before)), square(before))
        logit, = self.mesh.world.small(float(y.abs().max()) if y is not None else 0.0,
                                       op=dist.ReduceOp.MAX)
        return dict(update=math.sqrt(moved / norm), logit=logit)

    def evaluate(self, batches, n_bytes, device):
        """As sample.evaluate, batches dealt out to data ranks; one without gets one that is void."""
        self.eval()
        dp, batches, total, count = self.mesh.dp, list(batches), 0.0, 0
        for i in range(0, len(batches), dp.n):
            x, y = batches[min(i + dp.rank, len(batches) - 1)]
            if i + dp.rank >= len(batches): y = torch.full_like(y, -1)
            nats = self.infer(x.to(device), y.to(device))
            if nats is not None: total += nats.double().sum().item()
            count += (y >= 0).sum().item()
        self.train()
        total, count = self.mesh.stages.small(total)[0], dp.small(count)[0]
        return {"loss": total / count, "bits_per_byte": total / math.log(2) / n_bytes,
                "tokens": int(count), "context": batches[0][0].shape[1]}

    def flops_per_token(self): return self.rate

# -----------------------------------------------------------------------------
# Checkpoints: each rank writes its pieces to a file of its own, and where in the whole they belong.
# Any plan reads them all and takes its own part; a checkpoint of train.py does as well.

def save_shards(run, engine, optimizer, now):
    """shards-STEP/RANK.safetensors; the directory has that name when all are there."""
    tensors, places = {}, {}
    for group, states in zip(optimizer.groups, optimizer.state):
        for p, state in zip(group["params"], states):
            for k, x in [("", p), *state.items()] if p.saved else ():
                x, key = torch.as_tensor(x), str(len(places))
                cut = p.place if x.shape == p.shape else Place(p.place.name)  # l, r, t: undivided
                tensors[key], places[key] = x, [k, *dataclasses.astuple(cut)]
    for name, b in engine.model.named_buffers():
        tensors[name], places[name] = b, ["", *dataclasses.astuple(Place(name))]
    path = Path(run) / f"shards-{now.step:08d}"
    save_tensors(Path(f"{path}.part") / f"{engine.mesh.world.rank:05d}.safetensors", tensors,
                 {"places": json.dumps(places), "world": str(engine.mesh.world.n),
                  "progress": json.dumps(dataclasses.asdict(now))})
    engine.mesh.world.small()  # all have written
    if engine.mesh.world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.rename(f"{path}.part", path)
        for old in sorted(Path(run).glob("shards-????????"))[:-2]: shutil.rmtree(old)

@torch.no_grad()
def load_whole(run, model, optimizer):
    """Fills a whole model and optimizer from the newest checkpoint of either kind -> Progress."""
    shards = sorted(Path(run).glob("shards-????????"), reverse=True)
    single = [p.stem.split("-")[1] for p in train.checkpoints(run)]
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    at = {id(p): (i, j) for i, g in enumerate(optimizer.groups) for j, p in enumerate(g["params"])}
    for path in shards:
        if single and single[0] > path.name.split("-")[1]: break
        whole = {}
        try:
            for file in path.iterdir():
                tensors = read_tensors(file)
                meta = {k: json.loads(v) for k, v in next(tensors)[1].items()}
                for key, x in tensors:
                    k, *place = meta["places"][key]
                    place, undivided = Place(*place), place[1] is None and place[-1] is None
                    shape = x.shape if undivided else place.padded(params[place.name].shape)
                    place.put(whole.setdefault((place.name, k), x.new_zeros(shape)), x)
            if len(list(path.iterdir())) != meta["world"]: raise UserError(f"{path}: files missing")
        except UserError:  # it has said which file and what is wrong
            print(f"{path} is left out; trying the one before it", flush=True)
            continue
        for (name, k), x in whole.items():
            p = params[name]
            if tuple(x.shape) > tuple(p.shape): x = x[tuple(map(slice, p.shape))]
            if not k: p.copy_(x)
            else:
                i, j = at[id(p)]
                optimizer.state[i][j][k] = int(x) if k == "t" else x.clone()
        return Progress(**meta["progress"])
    return train.load_checkpoint(run, model, optimizer)

# -----------------------------------------------------------------------------
# Training: what torchrun starts on every rank

def agree(mesh, x):
    """The largest x of all ranks: a number, a bool, or the name of a signal, which outranks None."""
    number = signal.Signals[x].value if isinstance(x, str) else float(x or 0)
    top, = mesh.world.small(number, op=dist.ReduceOp.MAX)
    if x is None or isinstance(x, str): return signal.Signals(int(top)).name if top else None
    return type(x)(top)

def prepared(args, given, store, rank):
    """(run, resume, settings, corpus): the first rank prepares, which may take long; others wait."""
    if rank == 0:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        args.resume = args.resume or again and any(train.RUNS.glob("*/train.json"))
        run = train.run_directory(args)
        settings = (train.resumed(run, given) if args.resume else train.settle(
            {"minutes": 1.0, **given} if "steps" not in given else given))
        cfg = TrainConfig(**settings["train"])
        corpus, _ = train.get_corpus(run, cfg, settings, args.resume)
        corpus.tokenizer.save(run / "tokenizer.json")
        store.set("run", json.dumps([str(run), bool(args.resume), settings]))
    store.wait(["run"], timedelta(days=7))
    run, resume, settings = json.loads(store.get("run"))
    if rank: corpus, _ = train.get_corpus(None, TrainConfig(**settings["train"]), settings, True)
    return Path(run), resume, settings, corpus

def train_ranks(args, how, given):
    """One of the processes that torchrun starts."""
    store, rank, world = next(dist.rendezvous("env://"))
    plan, local = read_plan(how.plan, world), int(os.environ.get("LOCAL_RANK", 0))
    run, resume, settings, corpus = prepared(args, given, store, rank)
    cfg, tok = TrainConfig(**settings["train"]), corpus.tokenizer
    rows = cfg.batch_size // plan["dp"]
    micro = cfg.micro_batch or max(1, rows // (4 * plan["pp"] if plan["pp"] > 1 else 1))
    for name, got, n in (("batch_size", cfg.batch_size, plan["dp"]), ("micro_batch", rows, micro)):
        if got % n: refuse(name, got, f"a multiple of {n}, for the plan {plan}", f"set --{name}")
    threads = cfg.threads or max(1, len(os.sched_getaffinity(0)) // int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)))
    cfg = dataclasses.replace(cfg, threads=threads, micro_batch=micro, compile=False)
    cuda = train.pick_device(cfg.device).type == "cuda"
    if cuda: torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timedelta(seconds=how.timeout))
    machine = train.set_up(cfg)
    machine.peak *= world
    whole = dataclasses.replace(machine, device=torch.device("cpu"))
    model_cfg = ModelConfig(**{**settings["model"], "vocab_size": tok.vocab_size})
    make = lambda: train.build(model_cfg, cfg, whole)
    model, optimizer = make()
    n = sum(model.n_params().values())
    now = load_whole(run, model, optimizer) if resume else Progress()
    mesh = Mesh(plan, how.ring)
    engine = Engine(model, optimizer, mesh, how, machine.device)
    loader = Loader(train.open_tokens(corpus.train), model_cfg.seq_len, cfg.batch_size, cfg.seed,
                    mesh.dp.rank, mesh.dp.n)
    tokens, n_bytes = validation(corpus, cfg.eval_tokens)
    if rank == 0:
        print(f"{run}: plan {plan}, {how}\n{cfg}\n{model_cfg}\n{machine.line}, of each of {world}; "
              f"{n:,} parameters, {sum(p.numel() for p in engine.parameters()):,} on this rank")
        if not resume: (run / "log.jsonl").unlink(missing_ok=True)
    check = lambda engine: engine.evaluate(in_order(tokens, model_cfg.seq_len, micro), n_bytes,
                                           machine.device)
    now, result = train.fit(
        engine, engine.optimizer, loader, cfg, machine, run, resume, check, engine.step,
        save_shards, lambda *_: now, partial(agree, mesh), rank == 0, engine.clip, engine.watch)
    if rank == 0:  # as train.py would have left it: one checkpoint, the model for sample.py
        model, optimizer = make()
        model.eos = tok.eot
        train.save_checkpoint(run, model, optimizer, load_whole(run, model, optimizer))
        if result: train.finish(run, model, tok, cfg, now, result, machine, settings["data"]["valid"])
    mesh.world.small()
    dist.destroy_process_group()

def main(args):
    given = {k: v for k, v in vars(args).items() if k in train.FIELDS}
    how = ParallelConfig(**{k: v for k, v in vars(args).items() if k in ParallelConfig.__annotations__})
    if "RANK" not in os.environ:
        if given or args.run or args.resume or how != ParallelConfig():
            refuse("ranks", "a process that torchrun did not start", "torchrun, to train",
                   "run: torchrun --nproc_per_node 2 parallel.py ...")
        return lesson()
    try: train_ranks(args, how, given)
    except torch.OutOfMemoryError:
        sys.exit("micro_batch: got one that does not fit into memory; set a smaller --micro_batch")
    except (dist.DistError, RuntimeError) as e:
        if not any(word in str(e) for word in ("gloo", "NCCL", "onnection", "imed out")): raise
        sys.exit(f"rank {os.environ['RANK']}: lost another rank, or waited {how.timeout:.0f} s for it "
                 f"(--timeout): {str(e).splitlines()[0][:200]}; torchrun --max-restarts 3 would "
                 "go on from the last checkpoint")

def build_parser():
    parser = argparse.ArgumentParser(description="Trains on many devices (under torchrun), or "
                                     "shows on forked processes how (alone).")
    place = lambda s: Path(s) if os.sep in s else train.RUNS / s
    parser.add_argument("--run", type=place, help="directory, or name under runs/, of the run "
                        "(default: a free name)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with --run, or the newest (default: off, but on a restart)")
    for config in (ParallelConfig, TrainConfig, ModelConfig):
        train.add_fields(parser, config, {"all": {}})
    return parser

if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted")
