"""optim.py - how weights move: a ladder of optimizers, each one idea above the last.

THE IDEA
    Training minimises a loss L(w) by small steps against its gradient. Two troubles make plain
    gradient descent slow. Gradients are noisy, because a batch is a small sample; averaging them
    over steps helps (momentum). And the loss is steep along some directions and flat along others,
    so that any one step size is too large for the first and too small for the second; dividing each
    direction by its own typical gradient helps (AdaGrad, RMSProp, Adam), or each row and column of
    a matrix by theirs (Shampoo, SOAP, Muon). Seen from above, every optimizer here is w -= lr P m,
    a preconditioner P applied to a sum or an average m of gradients, and the ladder is a search for
    a P that knows more at little cost.

THE MATHS (g gradient; m, v averages; lr step size; small letters per element, capitals matrices)
    SGD        w -= lr g
    Momentum   m = b m + g;                   w -= lr m
    AdaGrad    v = v + g^2;                   w -= lr g / (sqrt(v) + eps)
    RMSProp    v = b v + (1 - b) g^2;         w -= lr g / (sqrt(v) + eps)
    Adam       m = b1 m + (1 - b1) g, v likewise with b2 and g^2; both start at zero and are
               corrected for it: w -= lr m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps), t = 1, 2, ...
    AdamW      w -= lr wd w first: the decay does not pass through the preconditioner
    Shampoo    W -= lr L^(-1/4) M R^(-1/4), L and R averages of G G^T and G^T G
    SOAP       Adam in the eigenvectors of L and R: G' = Ql^T G Qr
    Muon       W -= lr U V^T, of M = U S V^T: Shampoo without memory

THE COSTS
    Of the elementwise ones a handful of FLOPs per parameter and step, nothing next to the
    gradient's 6 per *token*; so what counts is memory: 4 bytes in float32 for each average kept
    (SGD 0, Momentum, AdaGrad, RMSProp, Muon 4, Adam 8), besides 4 for the weight and 4 for its
    gradient. Those that see a matrix (m, n) take products, 4 to 9 (m + n) FLOPs a parameter.

CONTENTS  Optimizer and the ladder / matrices / OPTIMIZERS / collectives, mesh, buckets, shards /
          roles, groups, muP / clipping, health, noise / SCHEDULES / the lesson
NOT HERE  who sends the shards of a state to whom (parallel.py)
RUN       python optim.py    # costs, a narrow valley, muP; last line: "best lr of Adam ... at 512"
REFERENCES
    Polyak 1964 (momentum); Duchi et al. 2011 (AdaGrad); Tieleman, Hinton 2012 (RMSProp); Kingma, Ba
    2015 (1412.6980, Adam); Loshchilov, Hutter 2019 (1711.05101, AdamW; 1608.03983, cosine); Pascanu
    et al. 2013 (1211.5063, clipping); Hu et al. 2024 (2404.06395, wsd); Yang et al. 2022
    (2203.03466, muP); those of the matrices, and McCandlish et al. 2018, stand where they are used
EXERCISE  Empty `Adam.update` and `wsd`; fill them until
          `pytest test_all.py -k "optimizer or schedule"` is green again.
"""
import argparse, math
from collections import Counter, namedtuple
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels import Linear, seconds

# --- The ladder --------------------------------------------------------------
# One interface. An optimizer holds groups of parameters, each group a dict of hyperparameters, and
# a dict of state tensors per parameter. A class says what it keeps and how one tensor moves; the
# rest is shared. Hyperparameters are plain numbers, so that saving them is saving json.

class Optimizer:
    """params: tensors, or groups as dicts {"params": [...], **what differs}. `step(scale)` moves
    every parameter that has a gradient by its group's lr times `scale` (the schedule)."""
    defaults, lrs = {}, {}  # lrs: of roles, where one learning rate does not suit all
    def __init__(self, params, **hyper):
        params = list(params)
        if not isinstance(params[0], dict): params = [{"params": params}]
        for given in (hyper, *params):
            unknown = given.keys() - self.defaults.keys() - {"params", "role"}
            assert not unknown, f"{type(self).__name__} has {list(self.defaults)}, not {unknown}"
        self.groups = [{**self.defaults, **hyper, **g, "params": list(g["params"])} for g in params]
        self.state = [[{} for _ in g["params"]] for g in self.groups]
    @torch.no_grad()
    def step(self, scale=1.0):
        for group, states in zip(self.groups, self.state):  # a frozen parameter has no gradient
            live = [(p, s) for p, s in zip(group["params"], states) if p.grad is not None]
            for _, s in live: s["t"] = s.get("t", 0) + 1
            self.move(live, group, group["lr"] * scale)
    def move(self, live, h, lr):
        """Moves [(parameter, its state)]; h: the group's hyperparameters."""
        for p, s in live: self.update(p, p.grad, s, h, lr)  # what a class defines
    def zero_grad(self):
        for group in self.groups:
            for p in group["params"]: p.grad = None
    def state_tensors(self):
        """All state as {"group.index.name": tensor}: what a checkpoint must keep."""
        return {f"{i}.{j}.{k}": torch.as_tensor(x) for i, states in enumerate(self.state)
                for j, s in enumerate(states) for k, x in s.items()}
    def load_state_tensors(self, tensors):
        """The inverse; after it the next step is the one that would have come, bit for bit."""
        self.state = [[{} for _ in states] for states in self.state]
        for name, x in tensors.items():
            i, j, k = (int(part) if part.isdigit() else part for part in name.split("."))
            p = self.groups[i]["params"][j]
            assert {*x.shape} <= {*p.shape}, f"state {name}: {x.shape} for {p.shape}"
            self.state[i][j][k] = int(x) if k == "t" else x.to(p.device)

def same(x): return x.view_as(x)
def kept(s, name, p):
    """The state tensor `name` of parameter p; zeros before its first use."""
    if name not in s: s[name] = torch.zeros_like(p)
    return s[name]
class SGD(Optimizer):
    """The steepest way down. It converges while lr < 2 / (largest curvature), and then creeps along
    the flattest direction: the more steps, the larger the ratio of curvatures."""
    defaults = dict(lr=0.1)
    def update(self, p, g, s, h, lr):
        p.add_(g, alpha=-lr)
class Momentum(Optimizer):
    """A heavy ball: noise averages out over 1 / (1 - beta) steps, and a steady slope adds up to
    1 / (1 - beta) times itself: lr must be as much smaller than that of an average."""
    defaults = dict(lr=0.1, beta=0.9)
    def update(self, p, g, s, h, lr):
        m = kept(s, "m", p).mul_(h["beta"]).add_(g)
        p.add_(m, alpha=-lr)
class AdaGrad(Optimizer):
    """Each weight gets its own step, the smaller the larger its gradients were: rare features keep
    large steps. The sum never shrinks, so in a long run learning dies."""
    defaults = dict(lr=0.1, eps=1e-10)
    def update(self, p, g, s, h, lr):
        v = kept(s, "v", p).addcmul_(g, g)
        p.addcdiv_(g, v.sqrt().add_(h["eps"]), value=-lr)
class RMSProp(Optimizer):
    """AdaGrad that forgets: a moving average in place of the sum."""
    defaults = dict(lr=0.01, beta=0.99, eps=1e-8)
    def update(self, p, g, s, h, lr):
        v = kept(s, "v", p).mul_(h["beta"]).addcmul_(g, g, value=1 - h["beta"])
        p.addcdiv_(g, v.sqrt().add_(h["eps"]), value=-lr)
class Adam(Optimizer):
    """RMSProp with momentum, both averages corrected for starting at zero. The first step is lr
    times the gradient's sign, whatever the units of the loss; lr bounds the later ones roughly."""
    defaults = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
    def update(self, p, g, s, h, lr, turn=same, back=same):
        m, v, t = kept(s, "m", p), kept(s, "v", p), s["t"]
        m.lerp_(g, 1 - h["beta1"])                                    # m = b1 m + (1 - b1) g
        g, m = turn(g), turn(m)                                       # SOAP: into its eigenbasis
        v.mul_(h["beta2"]).addcmul_(g, g, value=1 - h["beta2"])       # v = b2 v + (1 - b2) g^2
        denom = v.sqrt().div_(math.sqrt(1 - h["beta2"] ** t)).add_(h["eps"])
        u = back(torch.div(m, denom, out=denom))                      # algorithm 1 of 1412.6980
        p.sub_(u.mul_(lr / (1 - h["beta1"] ** t)))  # not by alpha: a shard rounds as the whole does
class AdamW(Adam):
    """Adam with decoupled weight decay. Put into the gradient, decay would be divided by sqrt(v)
    and shrink quiet weights more than busy ones; outside, it pulls all alike (1711.05101; times lr,
    as torch has it)."""
    defaults = dict(Adam.defaults, lr=3e-3, weight_decay=0.1)  # lr [measured on a CPU]
    def update(self, p, g, s, h, lr, *turn):
        p.mul_(1 - lr * h["weight_decay"])
        super().update(p, g, s, h, lr, *turn)

# --- Preconditioners that see a matrix ---------------------------------------
# The gradient G of a matrix W (m, n) has mn entries; a preconditioner for all pairs of them would
# have (mn)^2. That of Shampoo is a Kronecker product of one for rows, (m, m), and one for columns,
# (n, n): it costs products of matrices, not of vectors, and few of those. Only `matrix` groups are
# treated so; tables and vectors are left to AdamW.

def is_matrix(p, h): return p.ndim == 2 and h.get("role", "matrix") == "matrix"
def take_factors(s, g, beta):
    """Into the averages L of G G^T (m, m) and R of G^T G (n, n) of a state."""
    for k, square in (("l", g @ g.mT), ("r", g.mT @ g)):
        s[k] = s[k].lerp_(square, 1 - beta) if k in s else square
class Shampoo(AdamW):
    """Gupta et al. 2018 (1802.09568): W -= lr L^(-1/4) M R^(-1/4), with L the average of G G^T, R
    of G^T G. AdaGrad's square root of gradients' second moments, but of whole rows and columns. The
    roots are taken anew every `every` steps. An update is made 1 an entry long, about Adam's
    longest (grafting, 2002.09018)."""
    defaults = dict(AdamW.defaults, every=10)
    def update(self, p, g, s, h, lr):
        if not is_matrix(p, h): return super().update(p, g, s, h, lr)
        take_factors(s, g, h["beta2"])
        m = kept(s, "m", p).lerp_(g, 1 - h["beta1"])
        if (s["t"] - 1) % h["every"] == 0:
            for k in ("l", "r"):
                values, Q = torch.linalg.eigh(s[k])
                s[k + "_root"] = (Q * values.clamp(min=1e-6 * values[-1] + 1e-30) ** -0.25) @ Q.mT
        u = s["l_root"] @ m @ s["r_root"]  # (m,m) @ (m,n) @ (n,n)
        u.mul_(math.sqrt(u.numel()) / (u.norm() + h["eps"]))
        p.mul_(1 - lr * h["weight_decay"]).sub_(u, alpha=lr)
class SOAP(AdamW):
    """Vyas et al. 2024 (2409.11321): Adam in the eigenbasis of Shampoo's factors, where the second
    moments are nearly diagonal, so that Adam's v describes them: G' = Ql^T G Qr. v stays fresh at
    every step, while the basis is refreshed every `every` steps by one step of power iteration,
    Q = qr(L Q). With the identity for a basis it is Adam."""
    defaults = dict(AdamW.defaults, every=10)
    def update(self, p, g, s, h, lr):
        if not is_matrix(p, h): return super().update(p, g, s, h, lr)
        take_factors(s, g, h["beta2"])
        for k in ("l", "r"):
            if k + "_basis" not in s or s["t"] == h["every"]:  # (at first gradients may be zero)
                basis = torch.linalg.eigh(s[k]).eigenvectors  # largest last; as iterated, first
                s[k + "_basis"] = basis.flip(-1).contiguous()
            elif s["t"] % h["every"] == 0:
                s[k + "_basis"] = torch.linalg.qr(s[k] @ s[k + "_basis"]).Q.contiguous()
        Ql, Qr = s["l_basis"], s["r_basis"]
        super().update(p, g, s, h, lr, lambda x: Ql.mT @ x @ Qr, lambda x: Ql @ x @ Qr.mT)
# Five quintic polynomials whose composition maps (0.001, 1] to within 0.16 of 1: each the best for
# the interval that the one before leaves. Amsel et al. 2025 (2505.16932), a margin of 2 % in them.
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                 (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                 (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan et al. 2024: one polynomial, repeated
def orthogonalize(G, polynomials=POLAR_EXPRESS):
    """(..., m, n) -> U V^T of G = U S V^T, nearly: all singular values become about 1. An odd
    polynomial a X + b X X^T X + c (X X^T)^2 X acts on singular values alone, and needs products
    only: 4 s^2 l + 2 s^3 FLOPs each, s and l the shorter and longer side."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # no singular value above 1
    for a, b, c in polynomials:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X
class Muon(AdamW):
    """Jordan et al. 2024: the update is the average gradient with all singular values set to 1.
    That is Shampoo without memory, (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, and steepest descent if
    a step is measured by how much it can change a vector (2409.20325): rare directions count
    as much as common ones. An update to (out, in) is times sqrt(max(1, out/in)), so that outputs
    change alike. Matrices of equal shape go through the products together."""
    defaults = dict(AdamW.defaults, lr=0.02, momentum=0.95)
    lrs = dict(embedding=0.2, head=0.01, vector=0.01)  # of AdamW for all else [measured on a CPU]
    orthogonalize = staticmethod(orthogonalize)  # or a compiled one
    def move(self, live, h, lr):
        super().move([of for of in live if not is_matrix(of[0], h)], h, lr)
        shapes = {}
        for p, s in live:
            if is_matrix(p, h): shapes.setdefault(p.shape, []).append((p, s))
        for (m, n), some in shapes.items():
            sums = [kept(s, "m", p).lerp_(p.grad, 1 - h["momentum"]) for p, s in some]
            G = torch.stack([p.grad.lerp(x, h["momentum"]) for (p, _), x in zip(some, sums)])
            half = G.is_cuda and G.dtype == torch.float32
            U = self.orthogonalize(G.bfloat16() if half else G).to(G.dtype)  # (count, m, n)
            for (p, s), u in zip(some, U):
                p.mul_(1 - lr * h["weight_decay"]).sub_(u, alpha=lr * max(1, m / n) ** 0.5)
OPTIMIZERS = {"sgd": SGD, "momentum": Momentum, "adagrad": AdaGrad, "rmsprop": RMSProp,
              "adam": Adam, "adamw": AdamW, "shampoo": Shampoo, "soap": SOAP, "muon": Muon}

# --- Collectives, and the mesh of ranks --------------------------------------
# In a ring each rank sends to the next and receives from the one before, at once: no link idles.
# reduce_scatter lets n parts travel, each growing by what every rank adds; all_gather lets finished
# parts travel once more. Both return a function that waits. torch's are rings, too, of many links.

ALL_GATHER, REDUCE_SCATTER = (getattr(dist, f"{name}_single", None) or getattr(dist, old)
                              for name, old in (("all_gather", "all_gather_into_tensor"),
                                                ("reduce_scatter", "reduce_scatter_tensor")))
SENT = Counter()  # bytes that this process sent, by group (of torch's collectives we do not know)
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX

class Group:
    """The n ranks that differ in some axes of the mesh alone; this one is the rank-th of them."""
    own = False  # the rings of this file?
    def __init__(self, name, ranks, me, pg):
        self.name, self.ranks, self.pg = name, ranks, pg
        self.n, self.rank = len(ranks), ranks.index(me)
    def near(self, by): return self.ranks[(self.rank + by) % self.n]
    def send(self, x, by):  # -> what must be kept until it is gone
        SENT[self.name] += x.nbytes
        return dist.isend(x, self.near(by), self.pg), x
    def shift(self, x, by=1):
        """Sends x to the next on the ring -> what the one before has sent."""
        SENT[self.name] += x.nbytes
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, self.near(by), self.pg),
                                            dist.P2POp(dist.irecv, out, self.near(-by), self.pg)]):
            work.wait()
        return out
    def start(self, collective, out, x, *op):  # one of torch's
        work = collective(out.view(-1), x.view(-1), *op, self.pg, async_op=True)
        return lambda: (work.wait(), out)[1]
    def reduce_scatter(self, x, op=SUM):
        """(n, ...) -> (...): row `rank` of all members' x, added up."""
        n, r, x = self.n, self.rank, x.contiguous()
        if n > 1 and not self.own: return self.start(REDUCE_SCATTER, torch.empty_like(x[0]), x, op)
        part = x[r - 1]  # sets out here, and is complete n - 1 ranks further on
        for i in range(2, n + 1):
            part, mine = self.shift(part), x[(r - i) % n]
            part = part + mine if op == SUM else torch.maximum(part, mine)
        return lambda: part
    def all_gather(self, x, out=None):
        """(...) -> (n, ...): all members' x, in order."""
        n, r, x = self.n, self.rank, x.contiguous()
        if out is None: out = x.new_empty(n, *x.shape)
        if n > 1 and not self.own: return self.start(ALL_GATHER, out, x)
        out[r] = x
        for i in range(1, n): out[(r - i) % n] = x = self.shift(x)
        return lambda: out
    def all_reduce(self, x, op=SUM):
        """(...) -> (...), the same everywhere: the sum, or the maximum."""
        flat = F.pad(x.reshape(-1), (0, -x.numel() % self.n)).view(self.n, -1)
        whole = self.all_gather(self.reduce_scatter(flat, op)())()
        return whole.view(-1)[:x.numel()].view(x.shape)
    def all_to_all(self, x, give, take):
        """Rows of x, give[i] of them for member i, in order -> those for us, take[i] from i."""
        SENT[self.name] += x.nbytes - x.split(give)[self.rank].nbytes
        out = x.new_empty(sum(take), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), take, give, self.pg)
        return out
    def small(self, *values, op=SUM):
        """Sums (or maxima) of a few numbers, which control the work: not counted as traffic."""
        x = torch.tensor(values, dtype=torch.float64)
        if self.n > 1: dist.all_reduce(x, op, self.pg)
        return x

# Ranks stand in a box of dp x pp x cp x tp, tp innermost, as it talks most and neighbours are
# nearest. Every group is a slice of it. dp is two axes, so that ep of its ranks can share experts.

GROUPS = dict(world=(0, 1, 2, 3, 4), data=(0, 1, 3), dp=(0, 1), ep=(1,), copies=(0, 3), pp=(2,),
              back=(2,), cp=(3,), tp=(4,), stages=(0, 1, 2, 3), ends=(2,))
class Mesh:
    """A Group for each row of GROUPS; `back` is for gradients, `ends` first and last stage."""
    def __init__(self, plan, ring=False):
        self.plan, me, Group.own = plan, dist.get_rank(), ring
        dp, pp, cp, tp, ep = plan.values()
        box = torch.arange(dist.get_world_size()).view(dp // ep, ep, pp, cp, tp)
        for name, axes in GROUPS.items():
            order = [i for i in range(5) if i not in axes] + [*axes]
            size = math.prod(box.shape[i] for i in axes)
            for row in box.permute(order).reshape(-1, size).tolist():
                if name == "ends": row = row[:1] + row[1:][-1:]
                pg = dist.new_group(row) if len(row) > 1 else None  # all ranks make all groups
                if me in row: setattr(self, name, Group(name, row, me, pg))
        self.first, self.last = self.pp.rank == 0, self.pp.rank == pp - 1
def bench(rank, device="cpu"):
    """Times the collectives of all ranks by size: torch's, and then the rings."""
    g = Group("world", [*range(dist.get_world_size())], rank, None)
    runs = dict(reduce_scatter=lambda x: g.reduce_scatter(x)(), all_reduce=g.all_reduce,
                all_gather=lambda x: g.all_gather(x[0])())
    for g.own in (False, True):
        for size in (2 ** 10, 2 ** 15, 2 ** 20, 2 ** 25):
            x = torch.ones(g.n, size // 4 // g.n, device=device)
            times = ", ".join(f"{name} {1e3 * seconds(partial(run, x), x.device):.3f} ms"
                              for name, run in runs.items())
            if g.rank == 0: print(f"{'rings' if g.own else 'torch'}{size:11,d} bytes: {times}")
class Both(torch.autograd.Function):
    """x -> forward(x), whose gradient g -> backward(g): a collective and its mirror image."""
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.mirror = backward
        return forward(x)
    @staticmethod
    def backward(ctx, g): return ctx.mirror(g), None, None
def pairs(g, dim=1):
    """{name: function of a tensor}, over group g. What is the same on all ranks, but used for
    different parts, has a gradient that must be added up; and the other way round."""
    def gather(x): return torch.cat([*g.all_gather(x)()], dim)
    def scatter(x): return g.reduce_scatter(torch.stack(x.chunk(g.n, dim)))()
    def mine(x): return x.chunk(g.n, dim)[g.rank].contiguous()
    table = dict(copy=(same, g.all_reduce), sum=(g.all_reduce, same), gather=(gather, scatter),
                 scatter=(scatter, gather), mine=(mine, gather), whole=(gather, mine))
    return SimpleNamespace(**{name: lambda x, pair=pair: Both.apply(x, *pair)
                              for name, pair in table.items()})

# --- Data ranks: buckets and shards ------------------------------------------
# Gradients of data ranks are added up. Parameters of a layer share a flat buffer, a bucket, of n
# equal slices: one message for many, under way while backward goes on below. Then a rank needs to
# keep one slice alone: of the optimizer's state ("optimizer"), or of weights and gradients, too,
# gathered when a layer is due and freed behind it ("full"). Elementwise optimizers may be cut
# anywhere; for those that see a matrix (WHOLE) matrices go to slices whole, the largest first.

WHOLE = (Shampoo, SOAP, Muon)
class Place(namedtuple("Place", "name dim rank n start end", defaults=(None, 0, 1, 0, None))):
    """Which part of a parameter a tensor is: of n shards along `dim` (None: undivided) the rank-th,
    padded with zeros if they are unequal, and of that, flattened, start to end (None: all)."""
    def take(self, whole):
        """Its part of a whole tensor, a copy: flat, unless it is an undivided one."""
        part = whole
        if self.dim is not None:
            short = (0, 0) * (whole.ndim - 1 - self.dim) + (0, -whole.shape[self.dim] % self.n)
            part = F.pad(whole, short).chunk(self.n, self.dim)[self.rank]
        part = part if self.end is None else part.reshape(-1)[self.start:self.end]
        return part.clone(memory_format=torch.contiguous_format)
    def put(self, whole, part):
        """The inverse: writes its part into a whole tensor."""
        at = self.take(torch.arange(1, whole.numel() + 1).view(whole.shape)).view(-1)
        whole.view(-1)[at[at > 0] - 1] = part.reshape(-1)[at > 0]  # 0 is padding

class Bucket:
    """Parameters {name: p} of a group's ranks in a flat buffer; p.data and p.grad are views of it.
    `master` and `sum` are weights and gradients as far as this rank keeps them."""
    def __init__(self, params, group, shard, whole, dtype):
        self.params, self.group, self.at, first = params, group, {}, next(iter(params.values()))
        self.full, self.each, self.arriving = shard == "full", shard == "none", None
        sizes, ends = {name: p.numel() for name, p in params.items()}, [0] * group.n
        for name in sorted(sizes, key=sizes.get, reverse=True) if whole else sizes:
            i = ends.index(min(ends)) if whole else 0
            self.at[name], ends[i] = (i, ends[i]), ends[i] + sizes[name]
        self.size = max(ends) if whole else -(-ends[0] // group.n)
        self.at = {name: i * self.size + start for name, (i, start) in self.at.items()}
        self.flat = first.new_zeros(group.n * self.size, dtype=dtype)
        self.master = torch.zeros_like(self.flat, dtype=first.dtype) if self.full else self.flat
        for name, p in params.items():
            self.view(self.master, name).copy_(p.data)
            p.data = self.view(self.flat, name)
        if self.full: self.master = self.rows(self.master)[group.rank].clone()
        self.sum = torch.zeros_like(self.master)
        self.free()
    def rows(self, flat): return flat.view(self.group.n, -1)
    def view(self, flat, name):
        shape = self.params[name].shape
        return flat[self.at[name]:self.at[name] + math.prod(shape)].view(shape)
    def pieces(self):
        """Yields (name, start, end, weights, gradients, are they our slice) of all that we keep."""
        for i in range(self.group.n) if self.each else [self.group.rank]:
            a, base = i * self.size, i * self.size if self.full else 0
            for name, at in self.at.items():
                lo, hi = max(a, at), min(a + self.size, at + self.params[name].numel())
                if lo < hi: yield (name, lo - at, hi - at, self.master[lo - base:hi - base],
                                   self.sum[lo - base:hi - base], i == self.group.rank)
    def gather(self):
        """Sends for the weights, if they are neither here nor on their way."""
        if self.full and not self.flat.untyped_storage().nbytes():
            self.flat.untyped_storage().resize_(self.flat.nbytes)
            self.arriving = self.group.all_gather(self.master.to(self.flat), self.rows(self.flat))
    def arrive(self):
        self.gather()
        if self.arriving: self.arriving()
        self.arriving = None
    def free(self):
        if self.full: self.flat.untyped_storage().resize_(0)
    def open(self):
        """Room for gradients: `full` has it while its layer goes backward."""
        self.grad = torch.zeros_like(self.flat) if self.full else self.sum
        for name, p in self.params.items(): p.grad = self.view(self.grad, name)
    def reduce(self):
        """Sends the gradients off to be added up, each slice where it belongs."""
        self.adding = self.group.reduce_scatter(self.rows(self.grad))
        self.free()
    def land(self):
        """Takes the sum of our slice; if each rank keeps all of them, sends for the others'."""
        own, self.grad = self.adding(), None
        for p in self.params.values(): p.grad = None
        if self.full: self.sum += own
        elif self.each: self.arriving = self.group.all_gather(own, self.rows(self.sum))
        else: self.rows(self.sum)[self.group.rank] = own

# --- Roles -------------------------------------------------------------------
# Weights are not alike. A matrix turns vectors into vectors; an embedding is a table of which a
# step touches few rows (the head is its mirror); a vector (gain, bias) acts on features one by one.
# Decay is for matrices: where a norm follows, their size means nothing to the model, but a step of
# given length turns a larger matrix by a smaller angle, so size must be kept from growing.

ROLES = ("matrix", "embedding", "head", "vector")
def role(name, p):
    """Role of a model's parameter by its name and shape."""
    if "embed" in name: return "embedding"
    if "lm_head" in name: return "head"
    return "matrix" if p.ndim >= 2 and "conv" not in name else "vector"
def param_groups(model, weight_decay=None, base_width=None, **lrs):
    """Groups by role, every parameter in exactly one; `matrix=0.02` sets that role's lr, and a role
    without one has the matrices'. Weight decay goes to matrices, and to nothing else; leave it out
    for an optimizer without decay.
    muP (2203.03466, table 3), if base_width is given: a step of Adam changes every weight by lr, so
    what d_in of them add to an output grows with d_in. So the lr of matrices and head goes with
    base_width / d_in; then the best one, found at that width, stays the best at others."""
    assert lrs.keys() <= set(ROLES), f"roles are {ROLES}, not {list(lrs)}"
    groups = {}
    for name, p in model.named_parameters():
        tied = name == "embed_tokens.weight" and getattr(model, "lm_head", model) is None
        r = "head" if tied else role(name, p)  # steps of an embedding would throw its logits
        width = base_width / p.shape[1] if base_width and r in ("matrix", "head") else 1.0
        group = groups.setdefault((ROLES.index(r), width), {"role": r, "params": []})
        group["params"].append(p)
        if weight_decay is not None: group["weight_decay"] = weight_decay if r == "matrix" else 0.0
        if lr := lrs.get(r) or lrs.get("matrix"): group["lr"] = lr * width
    return [groups[key] for key in sorted(groups)]

# --- Clipping ----------------------------------------------------------------
# One bad batch can throw weights so far that training does not come back. The *global* norm is
# clipped, not each tensor's, so that the direction of the step stays what it was.

def norms(*lists):
    """The L2 norm of all tensors in each list of (parameter, tensor)s; parallel.py has its own."""
    norm = torch.linalg.vector_norm
    return [norm(torch.stack([norm(x) for _, x in some])) for some in lists]
@torch.no_grad()
def clip_grad_norm(params, max_norm, norms=norms):
    """Scales all gradients in place by max_norm / (norm + 1e-6) if their common L2 norm is larger;
    to zero if it is not finite. Returns that norm, before clipping, as a tensor: nothing here waits
    for the device, and max_norm may be a tensor, too."""
    live = [(p, p.grad) for p in params if p.grad is not None]
    norm, = norms(live)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
    for _, g in live: g.mul_(scale.to(g.dtype)).nan_to_num_(0.0, 0.0, 0.0)
    return norm

# --- What a step tells: is the run healthy, and is the batch large enough? ---

class Level:
    """The usual height of a loss and its usual deviation, averages over about 50 steps; a spike is
    a loss more than eight deviations above it [our choice]."""
    def __init__(self, n=0, mean=0.0, deviation=0.0): self.now = n, mean, deviation
    def spikes(self, loss):
        """Takes in a loss; whether it is a spike (never in the first 50 steps)."""
        (n, mean, deviation), gap, w = self.now, loss - self.now[1], 1 / min(self.now[0] + 1, 50)
        spike = n >= 50 and gap > 8 * deviation
        if spike: gap = 8 * deviation  # counts as the limit: a lasting rise becomes the level
        self.now = n + 1, mean + w * gap, deviation + w * (abs(gap) - deviation)
        return spike
@torch.no_grad()
def health(model, tokens, params, before, norms=norms):
    """What the last step did to the matrices, as a part of their norm (1e-3 is usual), and the
    largest logit: one that grows and grows announces a run that diverges (2309.14322)."""
    some = [(p, old) for p, old in zip(params, before) if getattr(p, "matrix", p.ndim == 2)]
    model.eval()  # dropout must not draw: lines of the log would change the run
    logit = model(tokens[:1])[0].abs().max().item()
    model.train()
    moved, norm = norms([(p, p - old) for p, old in some], some)
    return dict(update=(moved / norm).item(), logit=logit)
def noise_scale(small, large, b, B):
    """The gradient noise scale tr(S) / |G|^2, in sequences, from mean squared norms of gradients of
    b and of B sequences: E |g_b|^2 = |G|^2 + tr(S) / b, two equations (1812.06162, app. A.1). A
    batch of that size needs twice the fewest steps and twice the fewest sequences: with a tenth of
    it, steps are nearly as good per sequence as can be; with ten times it, nearly wasted."""
    signal = (B * large - b * small) / (B - b)
    noise = max(0.0, small - large) / (1 / b - 1 / B)
    return noise / signal if signal > 0 else math.inf  # more noise than was averaged out

# --- Schedules ---------------------------------------------------------------
# Far from the valley's floor, long steps make progress; near it, noise makes them bounce, the
# further the longer they are. So lr falls. A schedule maps the fraction x of the run that is done,
# be it of steps or of minutes, to a multiplier of lr. Warm-up is there because at first Adam's
# averages know nothing, and post-norm models have huge gradients; at x = 0 it is zero, so that the
# first step only fills the averages. All take the same fractions; a schedule uses those it needs.

def constant(x, warmup, cooldown, final):
    return 1.0 if x >= warmup else x / warmup
def cosine(x, warmup, cooldown, final):
    """0 -> 1 over the warm-up, then half a cosine down to `final` at x = 1 (1608.03983). The length
    of the run must be known from the start: a cosine cut short was never low enough."""
    if x < warmup: return x / warmup
    if x >= 1: return final
    return final + 0.5 * (1 + math.cos(math.pi * (x - warmup) / (1 - warmup))) * (1 - final)
def wsd(x, warmup, cooldown, final):
    """Warm-up, stable, decay (2404.06395): constant until 1 - cooldown, then a straight line to
    `final`. The stable part can be prolonged at will, and decayed from anywhere."""
    if x < warmup: return x / warmup
    if x <= 1 - cooldown: return 1.0
    return max(final, 1 - (1 - final) * (x - (1 - cooldown)) / cooldown)
SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}

# --- The lesson: a valley a hundred times steeper across than along ----------

def valley(turned):
    """Loss 1/2 w^T A w of w (10, 1), A with eigenvalues from 1 to 100, and a start; the
    eigenvectors are the axes, or random directions if `turned`."""
    rng = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(10, 10, generator=rng, dtype=torch.float64))
    if not turned: basis = torch.eye(10, dtype=torch.float64)
    A = basis @ torch.logspace(0, 2, 10, dtype=torch.float64).diag() @ basis.T
    start = basis @ torch.randn(10, 1, generator=rng, dtype=torch.float64)
    return lambda w: 0.5 * (w * (A @ w)).sum(), start
def steps_needed(make, loss, start, limit=1600):
    """Fewest steps until the loss is a millionth of its start, over a grid of lr and of the steps
    in which lr falls to zero (25, 50, ... up to limit) -> (steps, lr), or (None, None)."""
    for allowed in (25 * 2 ** i for i in range(int(math.log2(limit / 25)) + 1)):
        found = []
        for lr in (10.0 ** torch.arange(-3, 1.1, 0.25, dtype=torch.float64)).tolist():
            w = nn.Parameter(start.clone())
            optimizer, first = make([w], lr=lr), loss(start).item()
            for i in range(allowed + 1):
                w.grad, value = None, loss(w)
                if value < 1e-6 * first: found.append((i, lr))
                if not 1e-6 * first <= value < 1e3 * first: break
                value.backward()
                optimizer.step(1 - i / allowed)
        if found: return min(found)
    return None, None
def transfer(mup, widths=(32, 128, 512)):
    """{width: (learning rate, loss) of the best lr} of a network of three matrices, trained by Adam
    to imitate another, over powers of two. With muP (base width 32) the best lr stays."""
    rng = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(128, 16, generator=rng), torch.randn(16, 4, generator=rng) / 4
    y, best = (x @ teacher).sin(), {}
    for width in widths:
        for lr in (2.0 ** -i for i in range(2, 12)):
            torch.manual_seed(1)
            net = nn.ModuleDict({"embed": Linear(16, width), "hidden": Linear(width, width),
                                 "lm_head": Linear(width, 4, std=0.0)})
            adam = Adam(param_groups(net, base_width=32 if mup else None, matrix=lr))
            for i in range(60):
                h = net["hidden"](net["embed"](x).relu()).relu()
                loss = (net["lm_head"](h) - y).square().mean()
                adam.zero_grad(), loss.backward(), adam.step(1 - i / 60)
            best[width] = min(best.get(width, (0, math.inf)), (lr, loss.item()), key=lambda b: b[1])
    return best
def costs(make, m=512, n=128):
    """(FLOPs in products, bytes of state), both per parameter, of a step on an (m, n) matrix."""
    w = nn.Parameter(torch.randn(m, n))
    optimizer = make([w], lr=0.0)
    with FlopCounterMode(display=False) as counter:
        for _ in range(20):
            w.grad = torch.randn(m, n)
            optimizer.step()
    size = sum(x.nbytes for x in optimizer.state_tensors().values() if x.ndim)
    return counter.get_total_flops() / 20 / w.numel(), size / w.numel()
def main(args):
    print("of a (512, 128) matrix, per parameter: FLOPs in products and bytes of state; then steps "
          "to\nbring a quadratic loss of ten weights, its curvatures from 1 to 100, to a millionth")
    print(f"{'optimizer':10s}{'FLOPs':>7s}{'bytes':>7s}{'valley along axes':>22s}{'turned':>22s}")
    for name, make in OPTIMIZERS.items():
        if "weight_decay" in make.defaults: make = partial(make, weight_decay=0.0)
        flops, size = costs(make)
        print(f"{name:10s}{flops:7,.0f}{size:7.1f}", end="")
        for turned in (False, True):
            n, lr = steps_needed(make, *valley(turned))
            print(f"{'never' if n is None else n:>9} (lr {lr or 0:7.4f})", end="", flush=True)
        print()
    print("Turning the valley is nothing to sgd and momentum. A divisor per weight is a diagonal\n"
          "preconditioner: it straightens a valley that lies along the axes, a turned one hardly.\n"
          "One for rows and columns straightens both. (muon sees one column: only a direction.)\n"
          "(No decay here: it pulls to zero, which happens to be the minimum.)")
    for mup in (False, True):
        found = ", ".join(f"{lr:.4f} (loss {loss:.1e}) at {width}"
                          for width, (lr, loss) in transfer(mup).items())
        print(f"best lr of Adam by width, {'with muP' if mup else 'as it is'}: {found}")
def build_parser():
    return argparse.ArgumentParser(description="The ladder of optimizers in a narrow valley.")
if __name__ == "__main__":
    main(build_parser().parse_args())
