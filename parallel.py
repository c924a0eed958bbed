"""parallel.py - one model on many devices: who holds what, who talks to whom, and the same result.

THE IDEA
    A model that outgrows a device, or a day, is cut along axes: the batch (dp), the width of its
    matrices (tp), its depth (pp), the text (cp), its experts (ep). A process, called rank, holds
    its part and sends what others need. Each cut is a pair: something is done going forward, its
    mirror image going backward (a sum for a copy). Loss and gradients are those of one process.

THE MATHS (n ranks of a group, S bytes of a tensor)
    all_reduce = reduce_scatter, then all_gather: each sends (n-1)/n S around a ring, twice
    y = x [W1 W2] = [x W1, x W2]       columns: no sum        [x1 x2] [W1; W2] = x1 W1 + x2 W2
    softmax over blocks of keys: y = sum_b e^(L_b - L) y_b, L = log sum_b e^L_b, L_b of a block

THE COSTS (bytes a parameter in float32 with AdamW: weight, gradient, state; sent a step, of W S)
    none 4 + 4 + 8, optimizer 4 + 4 + 8/n: 2 (n-1)/n S     full (4 + 4 + 8)/n: 3 m (n-1)/n S
    tp: 4 all_reduces of the stream a layer. pp: the stream over each border, and back; p stages and
    m micro-batches idle (p-1) / (m+p-1) of the time. cp: (n-1) blocks of keys and values, and back

CONTENTS  plans / schedules / tensors / context / experts / engine / checkpoints / lesson / training
          (collectives, mesh, buckets and shards of data ranks are in optim.py)
NOT HERE  interleaved schedules, compiled layers; a model larger than a host: each draws all weights
RUN       python parallel.py                            # each axis on two forked processes
          torchrun --nproc_per_node 2 parallel.py       # trains for a minute; last: bits_per_byte
          torchrun --nproc_per_node 8 parallel.py --plan dp=2,tp=4 --n_heads 8 --shard full
REFERENCES  buckets 2006.15704; ZeRO 1910.02054 (`optimizer` is stage 1, `full` 3); cp 2310.01889;
    tp 1909.08053; sequence 2205.05198; GPipe 1811.06965; 1F1B 2104.04473; ep 2006.16668
EXERCISE  Empty `one_f_one_b`; fill it until `pytest test_all.py -k schedule` is green again.
"""
import argparse, dataclasses, itertools, json, math, os, re, shutil, signal, sys, tempfile, time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
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
from model import FFN, LM, Attention, MoE, ModelConfig, save_model, save_tensors
from optim import (MAX, SENT, WHOLE, Both, Bucket, Mesh, Place, bench, clip_grad_norm, health,
                   pairs, same)
from train import Progress, TrainConfig, flag

# --- Configuration -----------------------------------------------------------

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
            refuse(getattr(self, name) in rows, name, getattr(self, name), " or ".join(rows))
def refuse(ok, name, got, wanted, do=None):
    """Unless ok, ends all ranks for a user's mistake, which all of them see; the first says it."""
    if not ok and int(os.environ.get("RANK", 0)): sys.exit(2)
    if not ok: raise UserError(f"{name}: got {got}, wanted {wanted}; {do or f'set --{name}'}")
def read_plan(text: str | None, world: int):
    """{axis: ranks}, in the order of the mesh and ep; "tp=2" of 8 processes says dp=4, too."""
    plan = dict.fromkeys(("dp", "pp", "cp", "tp", "ep"), 1)
    for part in filter(None, (text or "").split(",")):
        axis, _, n = part.partition("=")
        refuse(axis in plan and n.isdigit() and int(n), "plan", part, "dp=2,tp=2 and the like")
        plan[axis] = int(n)
    n = plan["dp"] * plan["pp"] * plan["cp"] * plan["tp"]
    if "dp=" not in (text or ""):
        plan["dp"] = max(1, world // n)
        n *= plan["dp"]
    refuse(n == world, "plan", f"{text}, a product of {n}", f"{world}, the number of processes",
           f"set --plan, or --nproc_per_node {n}")
    refuse(plan["dp"] % plan["ep"] == 0, "plan", text, f"an ep that divides dp {plan['dp']}")
    return plan
def check(model, plan, how):
    """Refuses by name what of a model, be it on the meta device, a plan cannot divide."""
    c, sequence = model.cfg, plan["tp"] if how.sequence else 1
    for name, axis, sizes, n in (
            ("n_layers", "pp", [c.n_layers], 1), ("n_heads", "tp", [c.n_heads], 1),
            ("n_kv_heads", "tp", [c.n_kv_heads or 0], 1), ("d_model", "tp", [c.d_model], 1),
            ("d_ff", "tp", [m.d_ff for m in model.modules() if isinstance(m, FFN)], 1),
            ("seq_len", "cp", [c.seq_len], 2 * sequence), ("n_experts", "ep", [c.n_experts], 1)):
        n = n * plan[axis] if plan[axis] * sequence > 1 else 1
        refuse(all(size % n == 0 for size in sizes), name, sizes, f"a multiple of {n}, for {plan}")
    for name, axis, ok, wanted in (
            ("mixers", "tp", set(c.mixers) <= set("AWN"), "A, W or N"),
            ("mixers", "cp", set(c.mixers) <= set("AN"), "A or N"),
            ("ffns", "cp", "x" not in c.ffns, "no x, as experts are balanced over whole rows"),
            ("ffns", "ep", "x" in c.ffns, "x, experts"), ("dropout", "tp", not c.dropout, "0"),
            ("dropout", "cp", not c.dropout, "0")):
        refuse(ok or plan[axis] == 1, name, getattr(c, name), f"{wanted} with {axis}")

# --- Schedules of a pipeline: ("F" or "B", micro-batch)s of each stage -------
# All forward first (GPipe) keeps m activations; one forward, one backward (1F1B) p, in equal time.

def gpipe(stage, p, m):
    return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]
def one_f_one_b(stage, p, m):
    """p=2, m=3: stage 0 does F0 F1 B0 F2 B1 B2, stage 1 F0 B0 F1 B1 F2 B2."""
    ahead = min(p - stage - 1, m)  # forwards before the first backward can arrive
    steady = [(kind, i + ahead * (kind == "F")) for i in range(m - ahead) for kind in "FB"]
    return [("F", i) for i in range(ahead)] + steady + [("B", i) for i in range(m - ahead, m)]
SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}
def simulate(schedule, p, m):
    """(part of the time that stages idle, most activations that each holds) in virtual time, of
    which a forward takes 1 and a backward 2."""
    orders = [schedule(s, p, m) for s in range(p)]
    @cache
    def end(s, kind, i):  # when it is done; what waits for itself recurses without end
        needs = [(s, *work) for work in orders[s][:orders[s].index((kind, i))][-1:]]
        if kind == "F" and s: needs.append((s - 1, "F", i))
        if kind == "B": needs.append((s + 1, "B", i) if s < p - 1 else (s, "F", i))
        return max((end(*work) for work in needs), default=0) + (1 if kind == "F" else 2)
    most = [max(itertools.accumulate(1 if kind == "F" else -1 for kind, _ in order))
            for order in orders]
    return 1 - 3 * m / max(end(s, *order[-1]) for s, order in enumerate(orders)), most

# --- Tensors: the width of every layer, divided ------------------------------
# The first matrices of a layer are cut by rows (heads, hidden units), the last by columns: a copy
# goes in, a sum comes out. Embedding and head are cut by tokens: no rank has all logits. `sequence`
# cuts the stream between layers along the text: copy becomes all_gather, the sum reduce_scatter.

def row_forward(linear, leave, x):
    y = leave(F.linear(x, linear.weight.to(x.dtype)))
    return y if linear.bias is None else y + linear.bias.to(x.dtype)  # once, behind the sum
def own_rows(g, weight, ids):  # -> (place of each among our rows, or 0; which are ours)
    local = ids - g.rank * len(weight)
    mine = (local >= 0) & (local < len(weight))
    return torch.where(mine, local, 0), mine
def token_embedding(table, g, ids):
    local, mine = own_rows(g, table.weight, ids)
    return pairs(g).sum(F.embedding(local, table.weight) * mine[..., None])
def token_cross_entropy(x, weight, targets, cap, g, vocab_size):
    """linear_cross_entropy of a head of which each rank has some rows; those beyond vocab_size fill
    up. Three numbers a token travel: the largest logit, the sum of exp, the target's logit."""
    z, add = up(logits_of(x, weight, cap)), pairs(g).sum  # (B, T, V / tp)
    ids = torch.arange(len(weight), device=z.device) + g.rank * len(weight)
    z = z.masked_fill(ids >= vocab_size, -math.inf)
    top, (local, mine) = g.all_reduce(z.detach().amax(-1), MAX), own_rows(g, weight, targets)
    total = add((z - top[..., None]).exp().sum(-1))
    own = add(torch.where(mine, z.gather(-1, local[..., None])[..., 0], 0.0))
    return torch.where(targets >= 0, total.log() + top - own, 0.0)

def cut_tensors(model, g, sequence):
    """-> ({parameter: dim it is cut along}, {parameters of whose gradients ranks have parts})."""
    p, cuts, parts = pairs(g), {}, set()
    rows = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"
    for name, m in [*model.named_modules()]:
        word, inside = name.split(".")[-1], sequence and "experts." not in name + "."
        if word in rows: cuts.update((w, 0) for w in m.parameters())
        if word in ("o_proj", "down_proj", "v_embed", "embed_bigram"): cuts[m.weight] = 1
        if word in ("o_proj", "down_proj"):
            m.forward = partial(row_forward, m, p.scatter if inside else p.sum)
            if inside and m.bias is not None: parts.add(m.bias)
        if word in ("q_norm", "k_norm") or sequence and isinstance(m, RMSNorm):
            parts.update(m.parameters())
        if isinstance(m, (Attention, FFN)):
            m.register_forward_pre_hook(lambda _, args, go_in=p.gather if inside else p.copy: (
                go_in(args[0]), *args[1:]))
        if isinstance(m, Attention):
            m.cfg = SimpleNamespace(**{**vars(m.cfg), "n_heads": m.cfg.n_heads // g.n,
                                       "n_kv_heads": m.cfg.n_kv_heads // g.n})
        if isinstance(m, MoE) and sequence:  # a router sees all tokens, and does so on every rank
            m.register_forward_pre_hook(lambda _, args: p.whole(args[0]))
            m.register_forward_hook(lambda _, args, out: (p.mine(out[0]), out[1]))
        if word == "embed_tokens": m.forward = partial(token_embedding, m, g)
        if word == "embed_bigram":  # rows are found by a hash of their number, so columns are cut
            m.register_forward_hook(lambda _, args, y: pairs(g, -1).whole(y))
    return cuts, parts

# --- Context: a text too long for one rank -----------------------------------
# Each rank has two pieces of the text, the r-th from either end: to the causal mask an early one is
# little work and a late one much. Keys and values travel a ring; what each block of them gives is
# put together by its log-sum-exp. Autograd runs the ring backwards, and makes scores again.

def block_attention(q, kv, causal):
    """q (B, H, T, Dh), kv (2, B, Hkv, S, Dh) -> y and the log-sum-exp of its scores."""
    (k, v), q = up(kv)[:, :, :, None], up(q).unflatten(1, (kv.shape[2], -1))
    s = q @ k.mT / math.sqrt(q.shape[-1])  # (B,Hkv,G,T,Dh) @ (B,Hkv,1,Dh,S)
    if causal: s = s.masked_fill(s.new_ones(s.shape[-2:]).triu(1).bool(), -math.inf)
    lse = s.logsumexp(-1, keepdim=True)
    return ((s - lse).exp() @ v).flatten(1, 2), lse.flatten(1, 2)
def ring_attention(q, k, v, g):
    """Causal attention of each rank's queries to all ranks' keys and values."""
    half, kv = q.shape[2] // 2, torch.stack((k, v))
    block = partial(checkpoint, block_attention, use_reentrant=False)
    y, lse = block(q, kv, True)
    for i in range(1, g.n):
        kv = Both.apply(kv, g.shift, partial(g.shift, by=-1))
        if i <= g.rank: new, l = block(q, kv[:, :, :, :half], False)  # of one before: its first
        else:  # of one behind: our second piece sees both
            new, l = block(q[:, :, half:], kv, False)
            new, l = F.pad(new, (0, 0, half, 0)), F.pad(l, (0, 0, half, 0), value=-math.inf)
        both = torch.logaddexp(lse, l)
        y, lse = y * (lse - both).exp() + new * (l - both).exp(), both
    return y.to(q.dtype)
class RingContext(Context):
    """Context of this rank's part of the text, and of all tokens."""
    def __init__(self, cfg, tokens, g):
        parts = torch.arange(tokens.shape[1], device=tokens.device).chunk(2 * g.n)
        self.index, self.all, self.g = torch.cat((parts[g.rank], parts[-1 - g.rank])), tokens, g
        super().__init__(cfg, tokens[:, self.index], self.index.expand(len(tokens), -1))
    def attend(self, q, k, v, *_): return ring_attention(q, k, v, self.g)
    def before(self, cache=None): return F.pad(self.all, (1, -1), value=-1)[:, self.index]

# --- Experts: each rank has some; tokens travel to theirs and back -----------

def remote_experts(moe, g, rows, load):
    """MoE.run: rows (N, D) sorted by expert, load (E,) of each, however uneven."""
    load = load.view(g.n, -1)  # by rank, by expert there
    theirs = g.all_to_all(load, [1] * g.n, [1] * g.n)  # what each rank has for each of ours
    give, take = load.sum(1).tolist(), theirs.sum(1).tolist()
    go, back = (partial(g.all_to_all, give=a, take=b) for a, b in ((give, take), (take, give)))
    ours = torch.arange(load.shape[1], device=rows.device).repeat(g.n)
    order = ours.repeat_interleave(theirs.view(-1)).argsort(stable=True)  # by expert, not by sender
    parts = Both.apply(rows, go, back).index_select(0, order).split(theirs.sum(0).tolist())
    out = torch.cat([expert(x)[0] for expert, x in zip(moe.experts.values(), parts)])
    return Both.apply(out.index_select(0, order.argsort()), back, go)

# --- The engine: a finished model and its optimizer, divided -----------------

def own_part(modules, g):  # under their names in the whole model
    first, n = g.rank * len(modules) // g.n, len(modules) // g.n
    return nn.ModuleDict([*modules.named_children()][first:first + n])

class Engine(nn.Module):
    """`model` and `optimizer`, whole and the same on all ranks, become this rank's part."""
    def __init__(self, model, optimizer, mesh, how, device=torch.device("cpu")):
        super().__init__()
        check(model, mesh.plan, how)
        self.cfg, self.mesh, self.how, self.model, tp = model.cfg, mesh, how, model, mesh.tp
        self.pairs, flops = pairs(tp), model.flops_per_token()
        self.flops_per_token, self.device = lambda: flops, device
        self.dtype = model.compute_dtype or next(model.parameters()).dtype
        whole = model.state_dict()
        model.layers = own_part(model.layers, mesh.pp)
        if not mesh.last: model.norm, model.lm_head = nn.Identity(), None
        for name in () if mesh.first else ("embed_tokens", "embed_bigram", "embed_positions"):
            if hasattr(model, name) and not (self.cfg.tie and mesh.last and name == "embed_tokens"):
                delattr(model, name)
        for moe in (m for m in model.modules() if isinstance(m, MoE) and mesh.ep.n > 1):
            moe.experts = own_part(moe.experts, mesh.ep)
            moe.run = partial(remote_experts, moe, mesh.ep)
        cuts, parts = cut_tensors(model, tp, how.sequence) if tp.n > 1 else ({}, ())
        for name, p in model.named_parameters():
            if p in cuts: p.data = Place(name, cuts[p], tp.rank, tp.n).take(p.data)
        model.to(device)
        self.divide(optimizer, cuts, parts, whole)
    def divide(self, optimizer, cuts, parts, whole):
        """Makes `units`, the buckets of each layer and, last, of the rest, and their `pieces`."""
        mesh, shard, units = self.mesh, self.how.shard, {math.inf: {}}
        self.units, self.pieces, self.split, self.sums = [], [], [], {}
        part = lambda name, p, *ends: Place(name, cuts.get(p), mesh.tp.rank, mesh.tp.n, *ends)
        self.fixed = [(part(f"model/{name}", p), p, whole[name].shape) for name, p in [
            *self.model.named_buffers(), *self.model.named_parameters()] if not p.requires_grad]
        where = {id(p): (i, j, optimizer.state[i][j]) for i, g in enumerate(optimizer.groups)
                 for j, p in enumerate(g["params"])}  # in the whole optimizer
        for name, p in self.model.named_parameters():
            if not p.requires_grad: continue  # frozen: the same on all data ranks
            matrix = p.ndim == 2 and optimizer.groups[where[id(p)][0]]["role"] == "matrix"
            key = (isinstance(optimizer, WHOLE) and matrix, mesh.ep.n > 1 and ".experts." in name,
                   mesh.pp.n > 1 and self.cfg.tie and name == "embed_tokens.weight")
            layer = int(name.split(".")[1]) if name.startswith("layers.") else math.inf
            units.setdefault(layer, {}).setdefault(key, {})[name] = p
        old, states = optimizer, [[] for _ in optimizer.groups]
        self.optimizer = type(old)([{**g, "params": []} for g in old.groups])
        for _, unit in sorted(units.items()):
            self.units.append([])
            for (undivided, expert, ends), params in unit.items():
                group = mesh.copies if expert else mesh.data
                dtype = self.dtype if shard == "full" else next(iter(params.values())).dtype
                self.units[-1].append(bucket := Bucket(params, group, shard, undivided, dtype))
                for name, lo, hi, w, g, own in bucket.pieces():
                    (i, j, state), p = where[id(params[name])], params[name]
                    end = None if hi - lo == math.prod(p.shape) else hi
                    x = nn.Parameter(w.view(p.shape) if end is None else w, requires_grad=False)
                    x.total, x.place = g.view(x.shape), part(name, p, lo, end)
                    self.pieces.append(x)
                    for axis, ours in ("tp", p in parts), ("ends", ends):
                        if ours: self.sums.setdefault(axis, []).append(x)
                    held = [x]
                    if undivided and p in cuts:  # all of it, on every rank of tp
                        held.append(x := nn.Parameter(whole[name].to(w.device, copy=True)))
                        x.place = Place(name)
                        self.split.append(held)
                    for y in held:
                        y.matrix, y.key, y.whole = p.ndim == 2, f"{i}.{j}", whole[name].shape
                        alike = y.place.dim is None  # on the ranks of tp
                        y.saved = own and not (alike and mesh.tp.rank or ends and not mesh.first)
                        y.copies = (group.n ** bucket.each) * (1 + ends) * mesh.tp.n ** alike
                    self.optimizer.groups[i]["params"].append(x)
                    states[i].append({k: x.place.take(s).to(w.device) if torch.is_tensor(s)
                                      and s.shape == whole[name].shape else s
                                      for k, s in state.items()})
        self.optimizer.state, self.move = states, self.optimizer.step
        self.optimizer.step = self.update
    @torch.no_grad()
    def update(self, scale=1.0):
        """A step of the optimizer on the pieces, which then go to those who hold them, too."""
        self.move(scale)
        for x, master in self.split: x.copy_(x.place.take(master))
        for b in sum(self.units, []) if self.how.shard == "optimizer" else ():
            b.group.all_gather(b.rows(b.flat)[b.group.rank].clone(), b.rows(b.flat))()
    # Before each layer, and behind all, stands an identity, whose side effects move weights and
    # gradients: those of a layer are complete when a gradient comes to the one before it.
    def each(self, i, *names):
        for b in self.units[i] if 0 <= i < len(self.units) else ():
            for name in names: getattr(b, name)()
    def enter(self, i, x):
        self.each(i - 1, "free")
        self.each(i, "arrive")
        self.each(i + 1, "gather")  # while this one computes
        return same(x)
    def back(self, i, g):
        full = self.how.shard == "full"
        if (full or self.syncing) and self.units[i] is not self.units[-1]: self.reduce(i)
        if i and {*self.flying} & {*self.units[i - 1]}: self.land()
        self.each(i - 1, "arrive", *["open"] * full)
        self.each(i - 2, "gather")
        return g
    def reduce(self, i):
        self.land()
        self.each(i, "reduce")
        self.flying = [*self.units[i]]
    def land(self):
        for b in self.flying: b.land()
        self.flying = []
    def run(self, tokens, targets=None, x=None):
        """-> (the stream, or at the end nats or logits; auxiliary loss; loads by expert)."""
        mesh, model, how, p, extra, loads = self.mesh, self.model, self.how, self.pairs, 0.0, []
        ctx = RingContext(self.cfg, tokens, mesh.cp) if mesh.cp.n > 1 else Context(self.cfg, tokens)
        if mesh.cp.n > 1 and targets is not None: targets = targets[:, ctx.index]
        self.each(len(self.units) - 1, "arrive")
        if mesh.first: x = p.mine(model.embed(ctx)) if how.sequence else model.embed(ctx)
        if torch.is_grad_enabled() and not x.requires_grad: x.requires_grad_()
        at = lambda i, x: Both.apply(x, partial(self.enter, i), partial(self.back, i))
        for i, layer in enumerate(model.layers.values()):
            run = partial(checkpoint, layer, use_reentrant=False) if how.recompute else layer
            x, aux = run(at(i, x), ctx)
            extra = extra + aux.get("loss", 0.0)
            if "load" in aux: loads.append(aux["load"])
        x = at(len(model.layers), x)
        if not mesh.last: return x, extra, loads
        x, weight = model.norm(x), (model.lm_head or model.embed_tokens).weight
        if mesh.tp.n > 1: x = (p.gather if how.sequence else p.copy)(x)
        if targets is None: return logits_of(x, weight, self.cfg.softcap), extra, loads
        loss = linear_cross_entropy if mesh.tp.n == 1 else partial(
            token_cross_entropy, g=mesh.tp, vocab_size=self.cfg.vocab_size)
        return loss(x, weight, targets, self.cfg.softcap), extra, loads
    def receive(self, group, tokens, by):
        """The stream (B, T, D) from the stage before (1), or its gradient from that behind (-1)."""
        T = tokens.shape[1] // self.mesh.cp.n // (self.mesh.tp.n if self.how.sequence else 1)
        x = torch.empty(len(tokens), T, self.cfg.d_model, device=tokens.device, dtype=self.dtype)
        dist.recv(x, group.near(-by), group.pg)
        return x
    def step(self, _, batches):
        """As local_step: leaves the gradient of the mean loss over all ranks' targets."""
        mesh, m, total, loads, live, sent = self.mesh, len(batches), 0.0, [], {}, []
        torch.manual_seed(torch.initial_seed() + mesh.world.rank)  # dropout: not alike on ranks
        counted = mesh.dp.small(sum((y >= 0).sum().item() for _, y in batches)).item()
        self.flying, self.syncing = [], False
        for b in sum(self.units, []):
            b.sum.zero_()
            if b in self.units[-1]: b.arrive()
            if b in self.units[-1] or not b.full: b.open()
        order = SCHEDULES[self.how.pipeline](mesh.pp.rank, mesh.pp.n, m)
        for k, (kind, i) in enumerate(order):
            if kind == "F":
                x = None if mesh.first else self.receive(mesh.pp, batches[i][0], 1)
                y, extra, load = self.run(*batches[i], x)
                loads = [a + b for a, b in zip(loads, load)] or load
                if mesh.last: total, y = total + y.detach().sum() / counted, y.sum() / counted
                else: sent.append(mesh.pp.send(y.detach(), 1))
                live[i] = x, y, extra / (m * mesh.dp.n)
            else:
                (x, y, extra), self.syncing = live.pop(i), k == len(order) - 1
                ends = [(y, None if mesh.last else self.receive(mesh.back, batches[i][0], -1))]
                if torch.is_tensor(extra): ends.append((extra, None))
                torch.autograd.backward(*zip(*ends))
                if not mesh.first: sent.append(mesh.back.send(x.grad, -1))
        for work, _ in sent: work.wait()
        self.reduce(len(self.units) - 1)
        self.land()
        for b in sum(self.units, []) if self.how.shard == "none" else (): b.arrive()
        for x in self.pieces: x.grad = x.total
        for axis, some in sorted(self.sums.items()):  # in this order on all ranks
            flat = getattr(mesh, axis).all_reduce(torch.cat([x.grad.view(-1) for x in some]))
            for x, g in zip(some, flat.split([x.numel() for x in some])): x.grad.view(-1).copy_(g)
        for x, master in self.split: master.grad = pairs(self.mesh.tp, x.place.dim).gather(x.grad)
        for bias, load in zip(self.model.buffers(), loads):
            load = mesh.dp.small(*load.tolist())
            bias += self.cfg.balance_bias * torch.sign(load.sum() / len(load) - load).to(bias)
        return mesh.stages.small(float(total))[0].to(batches[0][0].device)
    def norms(self, *lists):
        """As those of optim.py, over all ranks: a tensor may be on `copies` of them."""
        squares = [sum(float(x.double().square().sum()) / p.copies for p, x in a) for a in lists]
        return self.mesh.world.small(*squares).sqrt().to(self.device)
    @torch.no_grad()
    def forward(self, tokens, targets=None):
        """What `evaluate` sums up: nats of a batch, cut for data ranks; or the largest logit."""
        mesh, d = self.mesh, self.mesh.dp
        if targets is not None: tokens, targets = (x.chunk(d.n)[d.rank] for x in (tokens, targets))
        y = self.run(tokens, targets, None if mesh.first else self.receive(mesh.pp, tokens, 1))[0]
        if not mesh.last: mesh.pp.send(y, 1)[0].wait()
        for b in self.units[-1]: b.free()
        if targets is not None: return mesh.stages.small(float(y.double().sum()) * mesh.last), {}
        return mesh.world.small(float(y.abs().max()) * mesh.last, op=MAX), {}

# --- Checkpoints -------------------------------------------------------------
# Checkpoints: each rank writes its pieces to a file of its own, and where in the whole they belong.
# Any plan takes its pieces of what train.py makes of them, which goes on with them alone, too.

def save_shards(run, engine, optimizer, now):
    """checkpoint-STEP/RANK.safetensors; the directory gets that name when all of it is there."""
    kept, world = [*engine.fixed], engine.mesh.world  # [(place, tensor, shape of the whole)]
    for p, state in ((p, s) for g, some in zip(optimizer.groups, optimizer.state)
                     for p, s in zip(g["params"], some) if p.saved):
        for name, x in {f"model/{p.place.name}": p, **{
                f"optimizer/{p.key}.{k}": torch.as_tensor(x) for k, x in state.items()}}.items():
            part = x.shape == p.shape  # Shampoo's l and r, and t, are not
            kept.append((p.place._replace(name=name), x, p.whole) if part else
                        (Place(name), x, x.shape))
    tensors = {str(i): x for i, (_, x, _) in enumerate(kept)}
    places = {str(i): [[*shape], *place] for i, (place, _, shape) in enumerate(kept)}
    path, part = (Path(run) / f"checkpoint-{now.step:08d}{end}" for end in ("", ".part"))
    if world.rank == 0:  # what a kill in the midst of a save has left
        for old in Path(run).glob("checkpoint-*.part"): shutil.rmtree(old)
    world.small(0.0)
    save_tensors(part / f"{world.rank:05d}.safetensors", tensors, {
        "places": json.dumps(places), "ranks": str(world.n), "progress": json.dumps(vars(now))})
    world.small(0.0)  # all have written
    if world.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        train.keep_two(run)

# --- The lesson: what each axis costs a rank, measured and by formula --------

def traffic(engine, batches):
    """Bytes that this rank of two sends in a step, by formula, of a llama in float64."""
    c, mesh, units = engine.cfg, engine.mesh, engine.units
    layers, outside = (sum(b.flat.nbytes for b in sum(some, []) if b.group.n > 1)
                       for some in (units[:-1], units[-1:]))
    stream = sum(x.numel() for x, _ in batches) * c.d_model * 8
    total = (3 * len(batches) if engine.how.shard == "full" else 2) * layers + 2 * outside
    if mesh.tp.n > 1:  # 4 sums a layer, the embedding's and the head's, three numbers of the loss
        total += (8 * c.n_layers + 4 + 6 / c.d_model) * stream
    if mesh.cp.n > 1:  # keys and values, and back their gradients
        total += 2 * c.n_layers * 2 * stream
    return (total + 2 * stream * (mesh.pp.n > 1)) / 2  # a ring of two sends half of what it adds up
def divided(how, rows, micro, **fields):
    """(whole llama, all rows, its engine of a plan, this rank's micro-batches of the rows)."""
    cfg = ModelConfig(**{**dict(vocab_size=512, seq_len=64, d_model=64), **fields})
    make = lambda: train.build(cfg, TrainConfig(optimizer="adamw"), train.Machine(
        torch.device("cpu"), torch.float64, False, 1.0, ""))
    engine = Engine(*make(), Mesh(read_plan(how.plan, dist.get_world_size()), how.ring), how)
    random, d = torch.Generator().manual_seed(0), engine.mesh.dp
    pair = torch.randint(0, cfg.vocab_size, (2, rows, cfg.seq_len), generator=random)
    return make()[0], pair, engine, [*zip(*(t.chunk(d.n)[d.rank].split(micro) for t in pair))]
def memory_and_traffic(rank):
    if rank == 0: print(
        "Of a rank of two: numbers a parameter (4 bytes each in float32), MB sent in a step, how "
        "far\nloss and gradients are from one process's. Llama, float64, AdamW\nplan          ",
        *map("{:>11s}".format, "weights gradients state activations formula sent differs".split()))
    of = lambda some: {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in some)}
    rows = [("dp=2", dict(shard=shard)) for shard in SHARDS] + [("dp=2", dict(recompute=True))]
    for text, flags in rows + [(text, {}) for text in ("tp=2", "pp=2", "cp=2", "ep=2")]:
        how, saved = ParallelConfig(plan=text, ring=True, **flags), []
        whole, pair, engine, batches = divided(how, 8, 4, ffns="sx"[text == "ep=2"])
        loss = train.local_step(whole, [*zip(*(t.split(4) for t in pair))])
        SENT.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], same):
            gaps = [engine.step(None, batches) - loss]
        engine.optimizer.step()
        params, buckets = dict(whole.named_parameters()), sum(engine.units, [])
        gaps += [p.total - p.place.take(params[p.place.name].grad) for p in engine.pieces]
        gap = engine.mesh.world.small(max(x.abs().max().item() for x in gaps), op=MAX).item()
        weights = of(t for b in buckets for t in (b.flat, b.master))
        kept = (weights, of(b.sum for b in buckets), of(engine.optimizer.state_tensors().values()),
                {at: n for at, n in of(saved).items() if at not in weights})
        formula = "-" if text == "ep=2" else f"{traffic(engine, batches) / 1e6:.4f}"
        sizes = [sum(some.values()) / 8 / sum(p.numel() for p in params.values()) for some in kept]
        if rank == 0: print(f"{text} {'recompute' * how.recompute or how.shard:9s}", *(
            f"{x:11.3f}" for x in sizes), f"{formula:>11s} {sum(SENT.values()) / 1e6:11.4f} "
            f"{gap:11.0e}", flush=True)

def idle_and_hidden(rank, forward=0.05, backward=0.1):
    """The work of a layer is to sleep, so that ranks do not compete for processors; the wire is
    simulated: a collective waits for those before it, then takes a time."""
    nap = lambda s: lambda x: (time.sleep(s), same(x))[1]
    def timed(text, micro, wire=0.0, n_layers=4, **how):
        *_, engine, batches = divided(ParallelConfig(plan=text, **how), 8, micro, d_model=16,
                                      n_heads=2, seq_len=16, vocab_size=64, n_layers=n_layers)
        for layer in engine.model.layers.values():
            layer.register_forward_hook(lambda _, args, out: (
                Both.apply(out[0], nap(forward), nap(backward)), out[1]))
        g = engine.mesh.data
        def slow(send, *args):
            wait, g.until = send(*args), max(g.until, time.perf_counter()) + wire
            return lambda at=g.until: (time.sleep(max(0, at - time.perf_counter())), wait())[1]
        g.until, g.reduce_scatter, g.all_gather = 0.0, *(
            partial(slow, f) for f in (g.reduce_scatter, g.all_gather))
        engine.mesh.world.small(0.0)
        start = time.perf_counter()
        engine.step(None, batches)
        return engine.mesh.world.small(time.perf_counter() - start, op=MAX).item()
    timed("pp=4", 8)  # warms up
    for name in SCHEDULES:
        idle = 1 - 8 * (forward + backward) / timed("pp=4", 1, pipeline=name)
        if rank == 0: print(f"4 stages, 8 micro-batches, {name}: idle {idle:.3f}, by formula 0.273")
    alone, together = (timed("dp=4", 2, wire, n_layers=8) for wire in (0.0, 0.03))
    # 2 messages for each of 9 buckets; those of the lowest two come when all work is done
    hidden = (alone + 18 * 0.03 - together) / (14 * 0.03)
    if rank == 0: print(f"4 data ranks: work of {alone:.3f} s and 0.540 s on a simulated wire take "
                        f"{together:.3f} s; of what can be hidden {hidden:.0%} is")
LESSONS = {memory_and_traffic: 2, idle_and_hidden: 4, bench: 2}
def teach(rank, lesson, n, path):
    torch.set_num_threads(1)
    join(ParallelConfig(), "cpu", init_method=f"file://{path}", rank=rank, world_size=n)
    lesson(rank)

# --- Training: what torchrun starts on every rank ----------------------------

def agree(world, x):
    """The largest x of all ranks: a number, a bool, or a signal's name, which outranks None."""
    names = [None, "SIGINT", "SIGTERM"]
    if x in names: return names[agree(world, names.index(x))]
    return type(x)(world.small(float(x), op=MAX).item())
def micro_batch(cfg, plan):
    """Sequences that a data rank takes at once: all, or for a pipeline four turns for a stage."""
    rows, turns = cfg.batch_size // plan["dp"], 4 * plan["pp"] if plan["pp"] > 1 else 1
    micro = cfg.micro_batch or math.gcd(rows, max(1, rows // turns))
    for name, got, n in (("batch_size", cfg.batch_size, plan["dp"]), ("micro_batch", rows, micro)):
        refuse(got % n == 0, name, got, f"a multiple of {n}, for the plan {plan}")
    refuse(not cfg.compile, "compile", cfg.compile, "none or false on many devices")
    return micro
def prepared(args, given, lasting, store, rank, plan, how):
    """(run, resume, settings, corpus): the first rank prepares, however long; others wait."""
    if rank == 0:
        if lasting.check(["run"]) and (run := Path(lasting.get("run").decode())).exists():
            args.run, args.resume = run, True  # begun by ranks of which one has died
        run, budget = train.run_directory(args), {} if "steps" in given else {"minutes": 1.0}
        settings = train.resumed(run, given) if args.resume else train.settle({**budget, **given})
        cfg = TrainConfig(**settings["train"])  # a mistake is found before anything is written
        micro = micro_batch(cfg, plan)
        with torch.device("meta"): check(LM(ModelConfig(**settings["model"])), plan, how)
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        refuse(here <= gpus or train.pick_device(cfg.device).type != "cuda", "nproc_per_node", here,
               f"at most {gpus}, the GPUs here", "set --nproc_per_node, or --device cpu")
        lasting.set("run", str(run))
        corpus, _ = train.get_corpus(run, cfg, settings, args.resume)
        corpus.tokenizer.save(run / "tokenizer.json")
        settings["train"]["micro_batch"] = micro
        store.set("ready", json.dumps([str(run), args.resume, settings]))
    store.wait(["ready"], timedelta(days=7))
    run, resume, settings = json.loads(store.get("ready"))
    if rank: corpus, _ = train.get_corpus(None, TrainConfig(**settings["train"]), settings, True)
    return Path(run), resume, settings, corpus
def join(how, device, **where):
    """Makes this process a rank -> the type of its device."""
    kind = "cuda" if train.pick_device(device).type == "cuda" else "cpu"  # mps has no gloo
    if kind == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **where,
                            timeout=timedelta(seconds=how.timeout))
    return kind

def train_ranks(args, how, given):
    lasting, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=how.timeout)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # not 0: after a rank has died
    store = dist.PrefixStore(f"attempt {attempt}", lasting)  # that of torchrun outlives its ranks
    plan = read_plan(how.plan, world)
    run, resume, settings, corpus = prepared(args, given, lasting, store, rank, plan, how)
    cfg, tok, cpu = TrainConfig(**settings["train"]), corpus.tokenizer, torch.device("cpu")
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    device = join(how, cfg.device, store=store, rank=rank, world_size=world)
    cfg = dataclasses.replace(cfg, threads=cfg.threads or threads, compile=False, device=device)
    machine, mesh = train.set_up(cfg), Mesh(plan, how.ring)
    machine.peak *= world
    model_cfg = ModelConfig(**{**settings["model"], "vocab_size": tok.vocab_size})
    make = lambda: train.build(model_cfg, cfg, dataclasses.replace(machine, device=cpu))
    (model, optimizer), now = make(), Progress()
    n, pad = sum(model.n_params().values()), -tok.vocab_size % plan["tp"]
    for turn in (0, 1):  # the first rank moves what is damaged out of the others' way
        if resume and turn == (rank > 0): now = train.load_checkpoint(run, model, optimizer)
        mesh.world.small(0.0)
    engine = Engine(model, optimizer, mesh, how, machine.device)
    def step(_, batches):
        try: return engine.step(None, batches)
        except torch.OutOfMemoryError:  # others are in the midst of a step: no way to try again
            raise UserError(f"micro_batch: got {cfg.micro_batch}, which rank {rank} has no memory "
                            "for, wanted less; set --micro_batch, --shard or --recompute")
    loader = Loader(train.open_tokens(corpus.train), model_cfg.seq_len, cfg.batch_size, cfg.seed,
                    mesh.dp.rank, mesh.dp.n)
    tokens, n_bytes = validation(corpus, cfg.eval_tokens)
    if rank == 0:
        print(f"{run}: plan {plan}, {how}", cfg, model_cfg, f"{machine.line}; {world} ranks",
              f"{n:,} parameters" + f"; the vocabulary is padded by {pad}" * (pad > 0), sep="\n")
    check = lambda engine: train.evaluate(engine, in_order(
        tokens, model_cfg.seq_len, cfg.micro_batch * mesh.dp.n), n_bytes, machine.device)
    now, result = train.fit(
        engine, engine.optimizer, loader, cfg, machine, run, resume, check, step, save_shards,
        lambda *_: now, partial(agree, mesh.world), not rank,
        partial(clip_grad_norm, norms=engine.norms), partial(health, norms=engine.norms))
    if rank == 0:  # the model for sample.py
        model, optimizer = make()
        model.eos = tok.eot
        train.load_checkpoint(run, model, optimizer)
        save_model(model, run)
        if result:
            train.finish(run, model, tok, cfg, now, result, machine, settings["data"]["valid"])
    mesh.world.small(0.0)
    dist.destroy_process_group()

def main(args):
    pick = lambda names: {k: v for k, v in vars(args).items() if k in names}
    how = ParallelConfig(**pick(ParallelConfig.__annotations__))
    given = pick(train.FIELDS)
    if "RANK" not in os.environ:
        refuse(not (given or args.run or args.resume or how != ParallelConfig()), "flags", "some, "
               "no torchrun", "torchrun, or none", "run: torchrun --nproc_per_node 2 parallel.py")
        with tempfile.TemporaryDirectory() as folder:
            for i, (lesson, n) in enumerate(LESSONS.items()):
                mp.start_processes(teach, (lesson, n, f"{folder}/{i}"), n, start_method="fork")
        return
    if args.bench: return bench(int(os.environ["RANK"]), join(how, "auto"))
    try: train_ranks(args, how, given)
    except RuntimeError as e:  # of gloo and nccl alike
        if not re.search("gloo|NCCL|onnection|imed out", str(e)): raise
        sys.exit(f"rank {os.environ['RANK']}: lost another, or waited {how.timeout:.0f} s for it "
                 f"(--timeout): {str(e).splitlines()[0][:160]}; with torchrun --max-restarts 3 all "
                 "start again from the last checkpoint")
def build_parser():
    parser = argparse.ArgumentParser(description="Trains on many devices, under torchrun; alone, "
                                     "shows on forked processes what each axis costs.")
    place = lambda s: Path(s) if os.sep in s else train.RUNS / s
    parser.add_argument("--into", "--run", dest="run", type=place, help="directory, or name under "
                        "runs/, of the run (default: a free name); torchrun has a --run of its own")
    parser.add_argument("--resume", action="store_true", help="go on with --into, or the newest "
                        "run (default: off, but when torchrun restarts)")
    parser.add_argument("--bench", action="store_true", help="time collectives (default: off)")
    for config in (ParallelConfig, TrainConfig, ModelConfig):
        train.add_fields(parser, config, train.RECIPES)
    return parser
if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted")
