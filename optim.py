"""optim.py - how weights move: a ladder of optimizers, each one idea above the last.

THE IDEA
    Training minimises a loss L(w) by small steps against its gradient. Two troubles make plain
    gradient descent slow. Gradients are noisy, because a batch is a small sample; averaging them
    over steps helps (momentum). And the loss is steep along some directions and flat along others,
    so that any one step size is too large for the first and too small for the second; dividing each
    direction by its own typical gradient helps (AdaGrad, RMSProp, Adam). Seen from above, every
    optimizer here is w -= lr P m, a preconditioner P applied to a sum or an average m of gradients,
    and the ladder is a search for a P that knows more at little cost.

THE MATHS (g gradient; m, v averages; lr step size; all operations per element)
    SGD        w -= lr g
    Momentum   m = b m + g;                   w -= lr m
    AdaGrad    v = v + g^2;                   w -= lr g / (sqrt(v) + eps)
    RMSProp    v = b v + (1 - b) g^2;         w -= lr g / (sqrt(v) + eps)
    Adam       m = b1 m + (1 - b1) g, v likewise with b2 and g^2; both start at zero and are
               corrected for it: w -= lr m/(1 - b1^t) / (sqrt(v/(1 - b2^t)) + eps), t = 1, 2, ...
    AdamW      w -= lr wd w first: the decay does not pass through the preconditioner

THE COSTS
    Per parameter and step a handful of FLOPs, negligible next to the gradient's 6 per *token*; so
    what counts is memory: 4 bytes in float32 for each average kept (SGD 0, Momentum, AdaGrad and
    RMSProp 4, Adam 8), besides 4 for the weight and 4 for its gradient.

CONTENTS  Optimizer and the ladder / OPTIMIZERS / roles and groups / clipping / SCHEDULES / lesson
NOT HERE  preconditioners that see whole matrices; sharding of state over devices (parallel.py)
RUN       python optim.py    # the ladder in a narrow valley; last line: "... the minimum.)"
REFERENCES
    Polyak 1964 (momentum); Duchi et al. 2011 (AdaGrad); Tieleman, Hinton 2012 (RMSProp); Kingma, Ba
    2015 (1412.6980, Adam); Loshchilov, Hutter 2019 (1711.05101, AdamW; 1608.03983, cosine); Pascanu
    et al. 2013 (1211.5063, clipping); Hu et al. 2024 (2404.06395, warm-up, stable, decay)
EXERCISE  Empty `Adam.update` and `wsd`; fill them until
          `pytest test_all.py -k "optimizer or schedule"` is green again.
"""
import argparse, math

import torch

# -----------------------------------------------------------------------------
# The ladder
# One interface. An optimizer holds groups of parameters, each group a dict of hyperparameters, and
# a dict of state tensors per parameter. A class says what it keeps and how one tensor moves; the
# rest is shared. Hyperparameters are plain numbers, so that saving them is saving json.

class Optimizer:
    """params: tensors, or groups as dicts {"params": [...], **what differs}. `step(scale)` moves
    every parameter that has a gradient by its group's lr times `scale` (the schedule)."""
    defaults = {}

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
        for group, states in zip(self.groups, self.state):
            for p, s in zip(group["params"], states):
                if p.grad is None: continue  # frozen, or not used in this step
                s["t"] = s.get("t", 0) + 1
                self.update(p, p.grad, s, group, group["lr"] * scale)

    def zero_grad(self):
        for group in self.groups:
            for p in group["params"]: p.grad = None

    def update(self, p, g, s, h, lr):
        """Moves p in place. g: its gradient; s: its state; h: the group's hyperparameters."""
        raise NotImplementedError

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
            assert k == "t" or x.shape == p.shape, f"state {name}: {x.shape} for {p.shape}"
            self.state[i][j][k] = int(x) if k == "t" else x.to(p.device)

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

    def update(self, p, g, s, h, lr):
        m, v, t = kept(s, "m", p), kept(s, "v", p), s["t"]
        m.lerp_(g, 1 - h["beta1"])                                    # m = b1 m + (1 - b1) g
        v.mul_(h["beta2"]).addcmul_(g, g, value=1 - h["beta2"])       # v = b2 v + (1 - b2) g^2
        denom = v.sqrt().div_(math.sqrt(1 - h["beta2"] ** t)).add_(h["eps"])
        p.addcdiv_(m, denom, value=-lr / (1 - h["beta1"] ** t))       # algorithm 1 of 1412.6980

class AdamW(Adam):
    """Adam with decoupled weight decay. Put into the gradient, decay would be divided by sqrt(v)
    and shrink quiet weights more than busy ones; outside, it pulls all alike (1711.05101; times lr,
    as torch has it)."""
    defaults = dict(Adam.defaults, weight_decay=0.1)

    def update(self, p, g, s, h, lr):
        p.mul_(1 - lr * h["weight_decay"])
        super().update(p, g, s, h, lr)

OPTIMIZERS = {"sgd": SGD, "momentum": Momentum, "adagrad": AdaGrad, "rmsprop": RMSProp,
              "adam": Adam, "adamw": AdamW}

# -----------------------------------------------------------------------------
# Roles
# Weights are not alike. A matrix turns vectors into vectors; an embedding is a table of which a
# step touches few rows (the head is its mirror); a vector (gain, bias) acts on features one by one.
# Decay is for matrices: where a norm follows, their size means nothing to the model, but a step of
# given length turns a larger matrix by a smaller angle, so size must be kept from growing.

ROLES = ("matrix", "embedding", "vector")

def role(name, p):
    """Role of a model's parameter by its name and shape."""
    if "embed" in name or "lm_head" in name: return "embedding"
    return "matrix" if p.ndim >= 2 and "conv" not in name else "vector"  # conv: by channel

def param_groups(model, weight_decay=None, **lrs):
    """One group per role, every parameter in exactly one; `matrix=0.02` sets that role's lr. Weight
    decay goes to matrices, and to nothing else; leave it out for an optimizer without decay."""
    assert lrs.keys() <= set(ROLES), f"roles are {ROLES}, not {list(lrs)}"
    groups = {r: {"role": r, "params": []} for r in ROLES}
    for name, p in model.named_parameters(): groups[role(name, p)]["params"].append(p)
    for r, group in groups.items():
        if weight_decay is not None: group["weight_decay"] = weight_decay if r == "matrix" else 0.0
        if r in lrs: group["lr"] = lrs[r]
    return [g for g in groups.values() if g["params"]]

# -----------------------------------------------------------------------------
# Clipping
# One bad batch can throw weights so far that training does not come back. The *global* norm is
# clipped, not each tensor's, so that the direction of the step stays what it was.

@torch.no_grad()
def clip_grad_norm(params, max_norm):
    """Scales all gradients in place by max_norm / (norm + 1e-6) if their common L2 norm is larger.
    Returns that norm (before clipping) as a tensor, without waiting for the device."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in grads: g.mul_(scale.to(g.dtype))
    return norm

# -----------------------------------------------------------------------------
# Schedules
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

# -----------------------------------------------------------------------------
# The lesson: a valley a hundred times steeper across than along

def valley(turned, d=10, curvature=100.0):
    """Loss 1/2 w^T A w with A's eigenvalues spread from 1 to `curvature`, and a start; the
    eigenvectors are the axes, or random directions if `turned`."""
    rng = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))
    if not turned: basis = torch.eye(d, dtype=torch.float64)
    curvatures = torch.logspace(0, math.log10(curvature), d, dtype=torch.float64)
    A = basis @ torch.diag(curvatures) @ basis.T
    return lambda w: 0.5 * w @ A @ w, basis @ torch.randn(d, generator=rng, dtype=torch.float64)

def steps_needed(make, loss, start, limit=1600):
    """Fewest steps until the loss is a millionth of its start, over a grid of lr and of the steps
    in which lr falls to zero (25, 50, ... up to limit) -> (steps, lr), or (None, None)."""
    allowed = 25
    while allowed <= limit:
        found = []
        for lr in (10.0 ** torch.arange(-3, 1.1, 0.25, dtype=torch.float64)).tolist():
            w = torch.nn.Parameter(start.clone())
            optimizer, first = make([w], lr=lr), loss(start).item()
            for i in range(allowed + 1):
                optimizer.zero_grad()
                value = loss(w)
                if value.item() < 1e-6 * first: found.append((i, lr))
                if found and found[-1][1] == lr or not value.item() < 1e3 * first: break
                value.backward()
                optimizer.step(1 - i / allowed)
        if found: return min(found)
        allowed *= 2
    return None, None

def main(args):
    print("steps to bring a quadratic loss of ten weights, its curvatures from 1 to 100, to a "
          "millionth")
    print(f"{'optimizer':12s}{'valley along axes':>24s}{'valley turned':>24s}")
    for name, make in OPTIMIZERS.items():
        if name == "adamw": make = lambda params, lr: AdamW(params, lr=lr, weight_decay=0.0)
        print(f"{name:12s}", end="")
        for turned in (False, True):
            n, lr = steps_needed(make, *valley(turned), args.limit)
            print(f"{'never' if n is None else n:>9} (lr {lr or 0:8.4f})", end="", flush=True)
        print()
    print("Turning the valley is nothing to sgd and momentum. A divisor per weight is a diagonal\n"
          "preconditioner: it straightens a valley that lies along the axes, a turned one hardly.\n"
          "(adamw runs without decay here: decay pulls to zero, which happens to be the minimum.)")

def build_parser():
    parser = argparse.ArgumentParser(description="The ladder of optimizers in a narrow valley.")
    parser.add_argument("--limit", type=int, default=1600,
                        help="most steps tried, at least 25 (default: 1600)")
    return parser

if __name__ == "__main__":
    main(build_parser().parse_args())
