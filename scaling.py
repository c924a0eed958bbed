"""scaling.py - predict the large run from small ones: how large a model, how much text, what loss.

THE IDEA
    The budget of a large run is spent once, so its size must be right the first time. But loss
    falls with parameters, tokens and compute along smooth curves, over many orders of magnitude. So
    train many small models, fit the curves, go along them to the budget, and say with which error.

THE MATHS (N parameters, D tokens of training, C FLOPs, loss in nats a token)
    C = 6 N D                                     2 N a token forward, twice that backward
    L(N, D) = E + A / N^alpha + B / D^beta        entropy of text; too small a model; too few tokens
    N* = G (C/6)^(beta / (alpha + beta)),  D* = C / 6N*,  G = (alpha A / beta B)^(1/(alpha + beta))
    to serve T tokens costs 2 N T more: the cheapest model of a given loss is smaller than N*
    step of a cluster = (M + (pp - 1) / v) (arithmetic + tp's messages) + what dp cannot hide

THE COSTS A study of budgets up to C costs a few C, and tells of 10 C to 100 C; fits cost little.
CONTENTS  Law, LAWS / plan / FITS / report / run, verify / Game, PLAYERS / emergence / lesson
NOT HERE  repeated data, laws of downstream scores, networks with congestion
RUN       python scaling.py               # seconds; last line: "... from the loss; the truth ..."
          python scaling.py plan --gpus 32 --hours 336 --gpu H100 --mfu 0.4 --served 1e12
          python scaling.py fit runs.csv --at 1e21 1e24     # columns N, D or C, loss
          python scaling.py verify                # a study: runs, then its prediction at 4 times
REFERENCES
    Kaplan et al. 2020 (2001.08361); Hoffmann et al. 2022 (2203.15556) L(N, D), IsoFLOP; Besiroglu
    et al. 2024 (2404.10102) its replication; DeepSeek 2024 (2401.02954); Sardana et al. 2023
    (2401.00448) serving; Korthikanti et al. 2022 (2205.05198), Llama 3 2024 (2407.21783) clusters
EXERCISE  Empty `Law.optimum` and `objective`; fill them until
          `pytest test_all.py -k "optimum or planted"` is green again.
"""
import argparse, contextlib, csv, hashlib, io, itertools, json, math, sys
from collections import namedtuple
from pathlib import Path

import numpy as np, torch

import train
from bpe import UserError, atomic_write
from data import Loader, in_order, open_tokens, prepare, validation
from kernels import DEVICES
from model import meta_model, preset

# --- Laws --------------------------------------------------------------------
# What is known of large runs fits into five numbers. The optimum is where a FLOP more spent on size
# is worth as much as one on text: there alpha A / N^alpha = beta B / D^beta. Near it the loss is
# flat (N twice too large costs 0.5 % at 1e22), so the best size is hard to measure, and an error in
# it cheap.
class Law(namedtuple("Law", "E A alpha B beta")):
    """L(N, D) = E + A / N^alpha + B / D^beta; of numbers, or of arrays: a law of each resample."""
    a = property(lambda self: self.beta / (self.alpha + self.beta))  # N* grows as C^a
    def loss(self, N, D): return self.E + self.A * N ** -self.alpha + self.B * D ** -self.beta
    def optimum(self, C):
        """(N, D) of the least loss with 6 N D = C (2203.15556, eq. 4)."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (C / 6) ** self.a
        return N, C / (6 * N)
    def served(self, C, tokens):
        """(N, D) with the loss of the optimum at C for the least 6 N D + 2 N tokens, the FLOPs of
        training and of serving (2401.00448, eq. 2); of a fine grid of N."""
        N, D = self.optimum(C)
        n = N * np.geomspace(1e-3, 1, 100001)
        rest = (self.loss(N, D) - self.E - self.A * n ** -self.alpha) / self.B  # is to be D^-beta
        d = np.maximum(rest, 1e-30) ** (-1 / self.beta)  # where that is negative no D is enough
        return min(zip(n * (6 * d + 2 * tokens), n, d))[1:]
def size_law(N0, C0, a):
    """N* = N0 (C / C0)^a: a Law with that optimum, and no E, so that its losses are nan."""
    return Law(math.nan, a / (1 - a) * N0 * (6 / C0) ** a, 1 - a, 1.0, a)
LAWS = {
    "Kaplan 2020": size_law(1.3e9, 8.64e19, 0.73),  # table 6, C in PF-days; N without embeddings
    "20 a parameter": size_law(1, 120, 0.5),        # the rule of thumb: D = 20 N
    "Hoffmann 1": size_law(67e9, 5.76e23, 0.50),    # exponent of table 2, size of table 3
    "DeepSeek 2024": size_law(0.1715 / 6, 1, 0.5243),  # N: non-embedding FLOPs a token / 6
    "Llama 3 2024": size_law(402e9, 3.8e25, 0.47),     # section 3.2.1
    "Hoffmann 3": Law(1.6934, 406.4, 0.33917, 410.7, 0.28491),  # as in the TeX; printed .34, .28
    "Besiroglu 2024": Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)}  # the same points, fitted well
BEST = LAWS["Besiroglu 2024"]
PUBLISHED = {"GPT-3": (175e9, 300e9, 3.14e23), "Chinchilla": (70e9, 1.4e12, 5.76e23),
             "Llama 3 405B": (405e9, 15.6e12, 3.8e25)}  # runs: N, D, FLOPs as stated

# --- Napkin mathematics: what a budget buys, and what it takes ---------------
LINKS = {  # (bytes of memory, bytes/s one way from a GPU within a node of 8, beyond): datasheets
    "A100": (80e9, 300e9, 25e9), "H100": (80e9, 450e9, 50e9), "H200": (141e9, 450e9, 50e9)}
# The part of the peak that arithmetic reaches when nothing waits: chosen so that Llama 3's 43 % on
# 8,192 GPUs comes out; its 41 % on 16,384 is then a check (2407.21783, table 4).
REACHED = 0.53
# Bytes kept a token, layer and d_model: inputs of two norms, q, k, v, what attention gives, gate
# and up of a SwiGLU, in 16 bits; what is elementwise is computed again (after 2205.05198).
ACTIVATION = 2 * (2 + 4 + 2 * 8 / 3)
def cluster_plan(L, d, seq_len, sequences, gpus, gpu, tp, pp, v, micro, zero, again):
    """Estimate of one plan -> dict with bytes a GPU, seconds a step, MFU; None if it cannot be laid
    out. Layers are cut into pp stages of v pieces (interleaved 1F1B), matrices over tp GPUs of a
    node, sequences over dp replicas, `micro` at a time; zero 1 shards the optimizer's state over
    dp, 3 weights and gradients too; again: activations are computed a second time."""
    dp, uneven = divmod(gpus, tp * pp)
    layers = v * -(-L // (pp * v))  # of the fullest stage
    M, left = (0, 0) if uneven else divmod(sequences, dp * micro)
    if not M or left or layers > L or v > 1 and (pp == 1 or M % pp) or zero == 3 and pp > 1: return
    (room, inside, between), peak, stream = LINKS[gpu], DEVICES[gpu][0], 2 * micro * seq_len * d
    tokens, own = micro * seq_len, 12 * layers * d * d / tp  # of a micro-batch; weights of a GPU
    ring = lambda n, n_bytes, rate: (n - 1) / n * n_bytes / rate  # an all-gather, or reduce-scatter
    flops = 6 * tokens * (own + 2 * layers * seq_len * d / tp)  # scores and values of all pairs
    arithmetic = flops * (4 / 3 if again else 1) / (peak * REACHED)
    messages = layers * (6 if again else 4) * 2 * ring(tp, stream, inside)  # all-reduces of layers
    if pp > 1: messages += 2 * v * stream / tp / between
    data = ring(dp, 2 * own, inside if tp * dp <= 8 else between)
    if zero == 3: messages += max(0.0, 3 * data - arithmetic)  # what arithmetic does not hide
    late = max(0.0, 2 * data - 2 / 3 * arithmetic) if zero == 1 else 0.0  # behind one backward pass
    seconds = (M + (pp - 1) / v) * (arithmetic + messages) + late
    state = (4 + 12 / dp) * own if zero == 1 else (16 / dp + 4 / layers) * own  # two layers whole
    kept = min(M, pp) * layers * (2 if again else ACTIVATION) + again * ACTIVATION
    held = state + kept * tokens * d / tp
    useful = 6 * sequences * seq_len * (12 * L * d * d + 2 * L * seq_len * d) / gpus
    return dict(dp=dp, tp=tp, pp=pp, v=v, micro=micro, zero=zero, again=again, gb=held / 1e9,
                fits=held <= 0.9 * room, bubble=(pp - 1) / (v * M + pp - 1), seconds=seconds,
                waits=(M * messages + late) / seconds, mfu=useful / peak / seconds)
def show_laws(C, laws):
    print(f"{'law':16s}{'N':>10s}{'D':>10s}{'D/N':>8s}{'loss':>8s}   at {C:.4g} FLOPs")
    for name, law in laws.items():
        N, D = law.optimum(C)
        print(f"{name:16s}{N:10.3g}{D:10.3g}{D / N:8.1f}{law.loss(N, D):8.4f}")
def plan(args):
    if args.gpu not in LINKS or args.mfu > 1: raise UserError(
        f"plan: got {args.gpu} at {args.mfu} of its peak; wanted {', '.join(LINKS)} at up to 1; "
        "set --gpu and --mfu")
    rate, T = args.gpus * DEVICES[args.gpu][0] * args.mfu * 86400, args.seq_len
    C = args.flops or args.hours / 24 * rate
    print(f"{C:.3g} FLOPs: {C / rate:,.2f} days of {args.gpus} {args.gpu} at MFU {args.mfu:.0%}")
    law = parametric(read_runs(args.runs, least=6)) if args.runs else BEST
    show_laws(C, {**LAWS, "used here": law})
    (N, D), (n, d) = law.served(C, args.served), law.optimum(C)
    part = N * (3 * D + args.served) / (n * (3 * d + args.served))
    print(f"cheapest of that loss to train and to serve {args.served:.3g} tokens: N {N:.3g}, D "
          f"{D:.3g} ({D / N:.0f} N), {6 * N * D:.3g} FLOPs; both together {1 - part:.1%} less")
    L = max(1, round((N / 12 / 128 ** 2) ** (1 / 3)))  # 12 L d^2 = N, d = 128 L as GPT-3's
    d = 128 * max(1, round(math.sqrt(N / 12 / L) / 128))
    sequences = 2 ** max(0, round(math.log2(0.2920 * C ** 0.3271 / T)))  # 2401.02954, eq. 1
    every = itertools.product(some := (1, 2, 4, 8), range(1, L + 1), some, some, (1, 3), (0, 1))
    rows = (cluster_plan(L, d, T, sequences, args.gpus, args.gpu, *how) for how in every)
    plans = sorted((r for r in rows if r and r["fits"]), key=lambda r: -r["mfu"])
    print(f"shape: {L} layers of {d}; batch {sequences * T / 1e6:,.2f} M tokens, AdamW's lr "
          f"{0.3118 * C ** -0.125:.1e} (DeepSeek's laws)\nGB, embeddings left out: weights "
          f"{2 * N / 1e9:,.1f}, gradients alike, AdamW {12 * N / 1e9:,.1f}; of {T} tokens "
          f"activations {ACTIVATION * T * d * L / 1e9:,.1f}, cache {4 * T * d * L / 1e9:,.2f}\n"
          f"{len(plans)} plans fit into 90 % of memory, best first:\n   dp  tp  pp   v micro zero "
          "recompute  GB/GPU  bubble  waits  s/step    MFU   days")
    for r in plans[:8]: print(
        "{dp:5d}{tp:4d}{pp:4d}{v:4d}{micro:6d}{zero:5d}{again:10d}{gb:9.1f}{bubble:8.1%}"
        "{waits:7.1%}{seconds:8.2f}{mfu:7.1%}{days:7.1f}".format(
            **r, days=C / rate * args.mfu / r["mfu"]))

# --- Fits --------------------------------------------------------------------
# A fit takes runs and weights (B, n), how often each of B resamples drew each run (ones: the data
# itself), and gives a law whose numbers are arrays of B. Bad runs hurt fits more than few runs do:
# one size trained with a bad learning rate bends a parabola, and so the line through all of them.
class Runs(namedtuple("Runs", "N D loss")):  # arrays
    C = property(lambda self: 6 * self.N * self.D)
    def some(self, which): return Runs(*(z[which] for z in self))
    def budgets(self):
        """Runs of each budget, rising; what is within 5 % of the next is of one budget."""
        rising = self.some(np.argsort(self.C, kind="stable"))
        ends = np.flatnonzero(np.diff(np.log(rising.C)) > 0.05) + 1
        return [Runs(*part) for part in np.split(np.array(rising), ends, axis=1)]
    def best(self, least): return math.exp(least(np.log(self.N), self.loss))
COLUMNS = {"N": "n params parameters modelsize", "D": "d tokens trainingtokens",
           "C": "c flops compute computebudget trainingflop", "loss": "loss l finalloss"}
def read_runs(path, drop=0, least=4):
    """Runs of a CSV file with a line of names, or a JSON list, but for the `drop` worst."""
    wrong = lambda got, wanted, do: UserError(f"{path}: got {got}; wanted {wanted}; {do}")
    plain = lambda name: "".join(filter(str.isalnum, str(name))).lower()
    try:
        with open(path, newline="") as f:
            rows = json.load(f) if Path(path).suffix == ".json" else csv.DictReader(f)
            rows = [{plain(k): v for k, v in row.items()} for row in rows]
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise wrong(repr(e), "CSV with a line of names, or a JSON list of objects", "check it")
    if len(rows) - drop < least:
        raise wrong(f"{len(rows)} runs, {drop} to drop", f"{least} or more", "add runs")
    names = {k: next((w for w in ws.split() if w in rows[0]), None) for k, ws in COLUMNS.items()}
    del names["C" if names["D"] or not names["C"] else "D"]
    if missing := ["D or C" if key == "D" else key for key in names if not names[key]]:
        raise wrong(f"columns {', '.join(rows[0])}", "N, D or C, loss", f"add {', '.join(missing)}")
    def number(i, key):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if 0 < (x := float(rows[i][names[key]])) < math.inf: return x
        raise wrong(f"{key} {rows[i].get(names[key])!r} in run {i + 1}", "a positive finite number",
                    "finish, correct or remove that run")
    table = np.array([[number(i, key) for key in names] for i in range(len(rows))])
    N, D, loss = table[table[:, 2].argsort()[:len(rows) - drop]].T
    return Runs(N, D / 6 / N if "C" in names else D, loss)
def power_law(x, y):
    """(c, a) of y = c x^a, least squares of logarithms."""
    a, k = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(k), a
def vertex(x, y):
    """x where a parabola through the points is least, which all of them decide. Outside the x tried
    that is no minimum but a guess: nan."""
    if len(np.unique(x)) < 3: return math.nan
    a, b, _ = np.polyfit(x - np.mean(x), y, 2)
    best = np.mean(x) - b / (2 * a) if a > 0 else math.inf
    return best if min(x) <= best <= max(x) else math.nan
lowest = lambda x, y: x[np.argmin(y)]  # of many near a flat minimum the one of luckiest noise
def isoflop(runs, weights, least=vertex):
    """Approach 2 of 2203.15556: a line through the best size of each budget, log against log."""
    def line(w):
        drawn = runs.some(np.repeat(np.arange(len(w)), w)).budgets()
        points = np.array([(some.C.mean(), some.best(least)) for some in drawn])
        points = points[~np.isnan(points[:, 1])]
        return power_law(*points.T) if len(points) > 1 else (math.nan, math.nan)
    N0, a = np.array([line(w) for w in weights.astype(int)]).T
    return size_law(N0, 1.0, a)
def objective(x, logN, logD, logL, weights, delta=1e-3):
    """Approach 3 of 2203.15556, eq. 3. x (B, 5): a, alpha, b, beta, e, with A = exp(a) and so on ->
    (B,), the sum over runs of Huber_delta(LSE(a - alpha log N, b - beta log D, e) - log L).
    A sum: Hoffmann's was a mean, so small that the minimiser stopped early (2404.10102). Huber is
    square near zero and straight beyond delta, so that an outlier pulls no harder than others."""
    a, alpha, b, beta, e = x.T[..., None]  # each (B, 1), against runs (n,)
    terms = torch.stack((a - alpha * logN, b - beta * logD, e + 0 * logN))  # (3, B, n)
    told, huber = terms.logsumexp(0), torch.nn.functional.huber_loss
    return (weights * huber(told, logL.expand_as(told), reduction="none", delta=delta)).sum(-1)
def minimize(x, data, weights, steps=800):
    """The rows of x (B, 5), each moved to a least objective of its weights: L-BFGS of their sum,
    which is least where each of them is. Scaled up, as torch's takes no notice of small changes."""
    x = x.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([x], max_iter=steps, history_size=30, tolerance_grad=0,
                              tolerance_change=1e-9, line_search_fn="strong_wolfe")
    def value():
        lbfgs.zero_grad()
        (total := 1e6 * objective(x, *data, weights).sum()).backward()
        return total
    lbfgs.step(value)
    return x.detach()
GRID = torch.tensor([*itertools.product(  # 4,500 starts: a, alpha, b, beta, e (2203.15556, D.3)
    range(0, 26, 5), (0, 0.5, 1, 1.5, 2), range(0, 26, 5), (0, 0.5, 1, 1.5, 2),
    (-1, -0.5, 0, 0.5, 1))], dtype=torch.float64)
def parametric(runs, weights=None, starts=10):
    """Approach 3: the Law of least objective; without weights its numbers are no arrays. The data
    itself starts at the best of GRID, resamples at its result. Logarithms are centred meanwhile, as
    a and alpha nearly make up for each other otherwise; the minimum is the same."""
    w = torch.ones(1, len(runs.N)) if weights is None else torch.from_numpy(weights)
    if len(runs.N) < 6: return Law(*np.full((5, len(w)), np.nan))  # five numbers fit any five runs
    data, move = torch.tensor(np.log(runs)), torch.eye(5, dtype=torch.float64)
    move[1, 0], move[3, 2] = -data[:2].mean(1)  # a - alpha mean(log N)
    data[:2] -= data[:2].mean(1, keepdim=True)
    grid = GRID @ move
    some = minimize(grid[objective(grid, *data, w[0]).argsort()[:starts]], data, w[0], 100)
    best = minimize(some[objective(some, *data, w[0]).argmin()][None], data, w[0])
    x = best if len(w) == 1 else minimize(best.repeat(len(w), 1), data, w)
    a, alpha, b, beta, e = (x @ move.inverse()).T.numpy()[:, 0 if weights is None else slice(None)]
    return Law(np.exp(e), np.exp(a), alpha, np.exp(b), beta)
FITS = {"argmin": lambda *z: isoflop(*z, lowest), "isoflop": isoflop, "parametric": parametric}
def resamples(n, count, seed=0):
    """Weights (1 + count, n): the data itself, then draws of n runs with replacement."""
    return np.vstack((np.ones(n), np.random.default_rng(seed).multinomial(n, n * [1 / n], count)))
def interval(z):
    """5th and 95th of 100 parts of the resamples that have an answer: an interval of 90 %."""
    z = z[~np.isnan(z)]
    return "[{:.4g}, {:.4g}]".format(*np.percentile(z, (5, 95))) if len(z) else ""
def hidden_law(rng):
    """A law drawn around the published ones by its optimum at 1e19 FLOPs: D/N is 10 to 60 there,
    and both terms together are 0.9 to 1.4 nats."""
    E, alpha, beta = (rng.uniform(*ends) for ends in ((1.6, 1.95), (0.3, 0.38), (0.28, 0.42)))
    N = math.sqrt(1e19 / 6 / rng.choice(np.geomspace(10, 60, 100)))
    terms = rng.uniform(0.9, 1.4) / (alpha + beta)  # at the optimum alpha A/N^alpha = beta B/D^beta
    return Law(E, terms * beta * N ** alpha, alpha, terms * alpha * (1e19 / 6 / N) ** beta, beta)
def simulate(law, rng, noise=0.01, budgets=np.geomspace(1e18, 1e20, 6), sizes=9):
    """Runs of a law from 1/8 to 8 times each budget's optimum, their loss times exp(noise z)."""
    C = np.repeat(budgets, sizes)
    N = law.optimum(C)[0] * np.tile(np.geomspace(1 / 8, 8, sizes), len(budgets))
    return Runs(N, D := C / (6 * N), law.loss(N, D) * np.exp(noise * rng.standard_normal(len(N))))
def report(runs, at=(), count=500, picture=None):
    """Prints what each fit says, with 90 % intervals, and the best sizes at the budgets `at`."""
    weights, budgets = resamples(len(runs.N), count), runs.budgets()
    print(f"{len(runs.N)} runs of {len(budgets)} budgets; {count} resamples, intervals of 90 %")
    least = np.array([(r.C.mean(), r.best(lowest), r.best(vertex), r.loss.min()) for r in budgets])
    for row in least[:20]:
        print("    {:8.3g} FLOPs: N {:.4g}; by a parabola {:.4g}; least loss {:.4f}".format(*row))
    if len(least) > 1: print("    least losses: {:.4g} C^{:.4f}, were there no E below them".format(
        *power_law(*least.T[[0, 3]])))
    laws, last = {name: fit(runs, weights) for name, fit in FITS.items()}, budgets[-1]
    law = Law(*(z[0] for z in laws["parametric"]))
    for name, z in zip(Law._fields, laws["parametric"]):
        print(f"    {name:6s}{z[0]:12.5g}   {interval(z[1:]):24s} std {z[1:].std():.3g}")
    others = parametric(runs.some(runs.C < last.C.min()))
    off, far = (r.loss / fit.loss(r.N, r.D) - 1 for r, fit in ((runs, law), (last, others)))
    print(f"    off this law by {off.std():.2%} of the loss; the largest budget off a law of the "
          f"others alone by {far.mean():+.2%}\n"
          f"{'fit':12s}exponent     FLOPs         N*   {'interval':24s}     D/N  loss")
    for (name, fit), C in itertools.product(laws.items(), at or [10 * last.C.mean()]):
        N, D = fit.optimum(C)
        losses = fit.loss(N, D)
        print(f"{name:12s}{fit.a[0]:8.3f}{C:10.3g}{N[0]:11.4g}   {interval(N[1:]):24s}"
              f"{D[0] / N[0]:8.1f}  {losses[0]:.4f} {interval(losses[1:])}")
    if not picture: return
    try: from matplotlib.figure import Figure
    except ImportError: return print("no picture: matplotlib is not installed")
    axes = (figure := Figure((11, 4))).subplots(1, 2, subplot_kw=dict(xscale="log", xlabel="N"))
    for N, D, loss in (r.some(r.N.argsort()) for r in budgets):
        axes[0].plot(N, loss, "o", N, law.loss(N, D), "k-")
        axes[1].plot(N, 100 * (loss / law.loss(N, D) - 1), "o")
    for axis, y in zip(axes, ("loss; lines: L(N, D)", "% of the loss off it")): axis.set_ylabel(y)
    print("picture:", picture, figure.savefig(picture, dpi=120) or "")

# --- Experiments: small models through train.fit, under a budget of FLOPs ----
# N is what a model does, FLOPs a token / 6 with attention and head, so that C = 6 N D holds (as
# DeepSeek's); Kaplan and Hoffmann disagree in part as they counted otherwise (2406.19146).
def train_one(entry, corpus, folder, args):
    """Trains a run, or what is left of it, and enters its loss."""
    cfg = train.TrainConfig(steps=entry["steps"], minutes=None, batch_size=entry["batch"], evals=1,
                            seed=args.seed, device=args.device, log_steps=100, lr=args.lr)
    with contextlib.redirect_stdout(io.StringIO()):  # its log is in its folder
        machine = train.set_up(cfg)
        model, optimizer = train.build(preset("llama", **entry["shape"]), cfg, machine)
        loader = Loader(open_tokens(corpus.train), args.seq_len, entry["batch"], args.seed)
        text, size = validation(corpus, 250_000)
        check = lambda m: train.evaluate(m, in_order(text, args.seq_len, 32), size, machine.device)
        now, result = train.fit(model, optimizer, loader, cfg, machine, folder, True, check)
    if not result: raise UserError("stopped; the same command goes on from here")
    entry.update(loss=result["loss"], seconds=now.seconds, epochs=entry["D"] / len(loader.tokens))

def study(args):
    """run: trains a grid of sizes for each budget, and fits it. verify: then the best this predicts
    for 4 times the largest. A run is entered into the ledger runs.json (`fit` reads it, too) with
    its FLOPs before it starts. What has a loss there is not trained again, what was interrupted
    goes on, and nothing starts that overruns --flops."""
    name = f"{Path(args.dataset).name}-{args.seq_len}-{args.seed}-{args.lr:g}"
    path = args.folder / name / "runs.json"  # of each setting, so that no fit mixes two
    try: ledger = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: got {e}, wanted what `run` writes; restore or remove it")
    corpus = prepare(args.dataset, "byte")
    def keep():
        with atomic_write(path, "w") as f: json.dump([*ledger.values()], f, indent=1)
    # Models differ in width alone: each step of depth would bend the law.
    shapes = (dict(vocab_size=corpus.tokenizer.vocab_size, seq_len=args.seq_len, n_layers=2,
                   n_heads=2, d_model=d, d_ff=3 * d) for d in range(8, 513, 4))
    models = {meta_model(preset("llama", **s)).flops_per_token() / 6: s for s in shapes}
    def do(points):  # (C, N), N is to be next to
        jobs = {}
        for C, want in points:
            N = min(models, key=lambda n: abs(math.log(n / want)))
            batch = 2 * max(2, round(8 * (C / 6 / N / 3e6) ** 0.383))  # 2505.13738
            steps, name = round(C / 6 / N / args.seq_len / batch), f"{C:.3g}-{N:.0f}"
            if steps < 10: raise UserError(f"budgets: got {C:.3g}, wanted 10 steps of N {N:,.0f} "
                                           "or more; set larger --budgets")
            jobs[name] = dict(name=name, N=N, D=(D := steps * batch * args.seq_len), batch=batch,
                              flops=6 * N * D, steps=steps, shape=models[N])
        total = sum(entry["flops"] for entry in (jobs | ledger).values())
        print(f"{len(jobs)} runs; with all that {path} has {total:.4g} FLOPs", flush=True)
        if total > args.flops: raise UserError(
            f"flops: got {total:.4g} in all, wanted {args.flops:.4g} at most; none of these was "
            "started; raise --flops, or give fewer --budgets")
        for name, entry in jobs.items():
            entry = ledger.setdefault(name, entry)
            keep()
            if "loss" not in entry: train_one(entry, corpus, path.parent / name, args)
            keep()
            print("  N {N:9,.0f}  D {D:11,d}  {flops:.2e} FLOPs {steps:6d} steps of {batch:3d}  "
                  "loss {loss:.4f} {seconds:6.1f} s {epochs:5.2f} epochs".format(**entry))
        return Runs(*np.array([[ledger[name][key] for key in Runs._fields] for name in jobs]).T)
    runs = do([(C, math.sqrt(C / 6 / args.ratio) * f) for C in args.budgets
               for f in np.geomspace(1 / 3, 3, args.sizes)])
    if args.command == "run": return report(runs, (), args.resamples, path.with_suffix(".png"))
    laws, C = parametric(runs, resamples(len(runs.N), args.resamples)), 4 * max(args.budgets)
    if not (N := laws.optimum(C)[0][0]) > 0: raise UserError(
        f"{path}: got no law with an optimum, wanted one; run more --sizes and --budgets")
    (N,), (D,), (loss,) = do([(C, N)])
    predicted = laws.loss(N, D)
    print(f"at 4 times the largest budget: loss {loss:.4f}, predicted {predicted[0]:.4f} "
          f"{interval(predicted[1:])}, off by {loss / predicted[0] - 1:+.2%}")

# --- A game: the large run follows a law hidden behind costly queries --------
class Query(namedtuple("Query", "d_model n_layers n_heads batch_size lr flops seed", defaults=[0])):
    N = property(lambda self: 12 * self.n_layers * self.d_model ** 2)
RANGES = Query((64, 1024), (2, 24), (1, 16), (32, 512), (1e-5, 1e-1), (1e13, 1e19), (0, 99))
UNIFORM = math.log(32000)  # loss of a guess

class Game:
    """Losses of language models by hyperparameters; no model is trained. A query is charged its
    FLOPs; asked again it is free, and so is one that is refused. With D = flops / 6N the loss is
    law(N, D') times penalties, each exp(its term):
      batch  D' = D / (1 + batch / B), B = 2e8 / loss^(1/.21) tokens (2001.08361, eq. 5.3)
      lr     bend log(lr / lr*)^2, lr* = lr0 (N / 1e7)^-g (batch_size / 128)^.5; above 6 lr* it
             diverges, to the loss of a uniform guess
      shape  narrow log((d / L) / aspect)^2, and heads narrower than 32 pay
      seed   noise z, with z from a hash of the query"""
    def __init__(self, seed=0, budget=2e18):
        rng = np.random.default_rng(seed)
        self.law, draw = hidden_law(rng), lambda *ends: math.exp(rng.uniform(*np.log(ends)))
        self.lr0, self.g, self.bend = draw(1e-3, 4e-3), draw(0.1, 0.3), draw(0.005, 0.015)
        self.aspect, self.narrow, self.noise = draw(32, 100), draw(0.003, 0.01), draw(0.002, 0.004)
        self.seed, self.budget, self.spent, self.asked = seed, budget, 0.0, {}
    def lr(self, q): return self.lr0 * (q.N / 1e7) ** -self.g * (q.batch_size / 128) ** 0.5
    def truth(self, q):
        """Loss without noise."""
        off, D = math.log(q.lr / self.lr(q)), q.flops / (6 * q.N)
        B = 2e8 / min(self.law.loss(q.N, D), UNIFORM) ** (1 / 0.21)
        loss = self.law.loss(q.N, D / (1 + q.batch_size * 512 / B))
        loss = (loss ** -16 + UNIFORM ** -16) ** (-1 / 16)  # hardly changed unless near a guess's
        penalty = (self.bend * off ** 2 + 0.02 * max(0.0, math.log(32 * q.n_heads / q.d_model))
                   + self.narrow * math.log(q.d_model / q.n_layers / self.aspect) ** 2)
        return UNIFORM if off > math.log(6) else min(UNIFORM, loss * math.exp(penalty))
    def query(self, q):
        """Loss of a Query."""
        left = RANGES.flops[1] if q in self.asked else self.budget - self.spent
        for name, x, (low, high) in zip(Query._fields, q, RANGES):
            if name == "flops": high = min(high, left)
            uneven = x % 1 and name != "lr" or name == "n_heads" and q.d_model % x
            if uneven or not low <= x <= high:
                raise UserError(f"{name}: got {x}, wanted {low:g} to {high:g} (whole but for lr; "
                                "n_heads a divisor of d_model); not charged")
        if q not in self.asked:
            self.spent += q.flops
            digest = hashlib.sha256(repr((self.seed, *map(float, q))).encode()).digest()
            noise = self.noise * np.random.default_rng([*digest]).standard_normal()
            self.asked[q] = self.truth(q) * math.exp(noise)
        return self.asked[q]
    def submit(self, predicted, q):
        """-> (part by which the true loss of q exceeds the best there is, error predicted)."""
        every = (Query(d, L, 1, b, 1, q.flops) for d, L, b in itertools.product(
            range(64, 1025, 64), range(2, 25), (32, 64, 128, 512)))
        best = min(self.truth(other._replace(lr=self.lr(other))) for other in every)
        return self.truth(q) / best - 1, predicted / self.truth(q) - 1
def query_of(N, aspect, batch_size, lr, flops):
    """A Query of about N parameters and d_model / n_layers = aspect, heads no narrower than 32."""
    d, L = min(itertools.product(range(64, 1025, 32), range(2, 25)), key=lambda s: abs(math.log(
        s[0] / s[1] / aspect)) + 2 * abs(math.log(12 * s[1] * s[0] ** 2 / N)))
    return Query(d, L, math.gcd(d // 32, 16), batch_size, lr, flops)
def careful(query, budget, target):
    """Knows only what `query` answers -> (predicted loss, Query). Learning rates at small sizes,
    then batch and aspect there; then IsoFLOP curves with these, of ever fewer and larger runs, each
    about the best size told by L(N, D) through those before."""
    best = []  # (N, lr)
    for N, part in (3e6, 1000), (8e6, 300), (2e7, 160):
        tries = [query_of(N, 64, 32, lr, budget // part) for lr in np.geomspace(1e-4, 2e-2, 10)]
        x, y = np.log([(q.lr, query(q)) for q in tries]).T
        near = y < y.min() + 0.06  # further off it is no parabola, or has diverged
        best.append((tries[0].N, math.exp(vertex(x[near], y[near]))))
    c, a = power_law(*zip(*best))
    def tuned(N, aspect, batch_size, flops, seed=0):
        q = query_of(N, aspect, batch_size, 1.0, flops)
        lr = c * q.N ** a * (batch_size / 32) ** 0.5  # Adam's rule
        return q._replace(lr=min(max(lr, 1e-5), 1e-1), seed=seed)
    small = lambda *how: sum(query(tuned(8e6, *how, budget // 300, seed)) for seed in (0, 1))
    batch_size = min((32, 64, 128, 256, 512), key=lambda b: small(64, b))
    aspects = np.geomspace(12, 192, 5)
    aspect = math.exp(vertex(np.log(aspects), [small(r, batch_size) for r in aspects]))
    if math.isnan(aspect): aspect = 64
    rows, law = [], LAWS["20 a parameter"]
    stages = (64, 2.5, 6), (24, 2, 3), (12, 1.6, 2), (5, 1, 1), (5, 1, 1)
    for seed, (part, reach, count) in enumerate(stages):
        C = budget // part
        for N in law.optimum(C)[0] * np.geomspace(1 / reach, reach, count):
            q = tuned(N, aspect, batch_size, C, seed)
            rows.append((q.N, C / 6 / q.N, query(q)))
        law = parametric(Runs(*np.array(rows).T))
    q = tuned(law.optimum(target)[0], aspect, batch_size, target)
    return law.loss(q.N, target / 6 / q.N), q
def naive(query, budget, target):
    """A grid at a usual learning rate, the least loss of each budget, and lines through these."""
    ask, C = lambda N, C: query_of(N, 64, 128, 1e-3, C), budget // np.array([1000, 300, 50])
    best = [min((query(q := ask(N, c)), q.N) for N in np.geomspace(1e6, 2e8, 12)) for c in C]
    (c, a), (k, b) = (power_law(C, y) for y in zip(*best))
    return c * target ** a, ask(k * target ** b, target)
PLAYERS = {"careful": careful, "naive": naive}
def game(args, budget=2e18):
    for name, play in PLAYERS.items():
        games = (Game(seed, budget) for seed in range(args.seed, args.seed + args.trials))
        scores = np.abs([g.submit(*play(g.query, budget, 5 * budget)) for g in games])
        print("{:8s} {} laws. At 5 times the budget the loss is {:.2%} above the best, {:.2%} off "
              "the predicted (medians; worst {:.2%}, {:.2%})".format(
                  name, args.trials, *np.median(scores, 0), *scores.max(0)))

# --- What small scale cannot tell: emergence ---------------------------------
# What small scale cannot tell: a score that is sharp in the loss looks like nothing until it looks
# like an ability. That is the score's doing; the loss told it all along (2304.15004)
def emergence(k=16):
    """Loss a token falls as a power of C; an answer of k tokens is right if all of them are."""
    rng, C = np.random.default_rng(0), np.geomspace(1e17, 1e23, 7)
    loss = 2 * (C / C[0]) ** -0.25
    right = rng.binomial(1000, np.exp(-k * loss)) / 1000
    for c, l, token, all_k in zip(C, loss, np.exp(-loss), right):
        print(f"{c:.0e} FLOPs: loss {l:.3f}, a token right {token:5.1%}, all {k} {all_k:5.1%}")
    score = np.polyval(np.polyfit(np.log(C[:4]), right[:4], 1), math.log(C[-1]))
    c, a = power_law(C[:4], loss[:4] * np.exp(0.01 * rng.standard_normal(4)))
    print(f"all {k} right at {C[-1]:.0e}, told by the four smallest: {score:.1%} from that score, "
          f"{np.exp(-k * c * C[-1] ** a):.1%} from the loss; the truth {np.exp(-k * loss[-1]):.1%}")
def lesson():
    print("NAPKINS")
    for name, (N, D, stated) in PUBLISHED.items():
        n, d = BEST.optimum(6 * N * D)
        print(f"{name:13s}6ND {6 * N * D:.3g} FLOPs, stated {stated:.3g}; N {N:.3g} (best "
              f"{n:.3g}), D {D:.3g} ({d:.3g}), loss {BEST.loss(N, D):.3f} ({BEST.loss(n, d):.3f})")
    show_laws(5.76e23, LAWS)
    print(f"\nFITS of runs of Besiroglu's law with noise of 1 %; N* is {BEST.optimum(1e22)[0]:.4g}")
    report(simulate(BEST, np.random.default_rng(0)), [1e22], 200)
    print("\nTHE GAME")
    game(argparse.Namespace(seed=0, trials=3))
    print("\nEMERGENCE")
    emergence()
COMMANDS = {  # name: (function, what it does, {option: (default, help)}); None: a plain argument
    "plan": (plan, "what a budget buys", {
        "flops": (0.0, "budget; 0: that of gpus and hours"), "gpus": (8, "number of GPUs"),
        "gpu": ("H100", ", ".join(LINKS)), "hours": (336.0, "hours"), "mfu": (0.4, "part of peak"),
        "served": (0.0, "tokens to serve over the model's life"), "seq_len": (4096, "context"),
        "runs": ("", "file of runs whose law to use")}),
    "fit": (lambda o: report(read_runs(o.file, o.drop), o.at, o.resamples, Path(o.file).with_suffix(
        ".png")), "fit laws to runs", {"file": (None, "CSV or JSON: N, D or C, loss"),
        "at": ([], "FLOPs to predict for; none: 10 times the largest"),
        "resamples": (500, "of the bootstrap"), "drop": (0, "runs of highest loss to leave out")}),
    **dict.fromkeys(("run", "verify"), (study, "a grid of small models; the best at 4 times that", {
        "budgets": ([1e11, 3e11, 1e12, 3e12], "FLOPs of a run"), "sizes": (5, "models a budget"),
        "ratio": (20.0, "D/N in the middle of the sizes"), "lr": (0.04, "of Muon"),
        "resamples": (500, "of the bootstrap"), "device": ("auto", "cpu, cuda or mps"),
        "flops": (1e14, "FLOPs allowed for all of the ledger"), "seq_len": (128, "context"),
        "folder": (Path(train.RUNS, "study"), "where it is kept"), "seed": (0, "of all"),
        "dataset": ("stdlib", "whose bytes, as in train.py")})),
    "game": (game, "players on hidden laws", {"trials": (20, "laws"), "seed": (0, "of the first")})}
def build_parser():
    parser = argparse.ArgumentParser(description="Scaling laws. Without a command: the lesson.")
    commands = parser.add_subparsers(dest="command")
    for name, (_, about, options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        for option, (default, text) in options.items():
            flag, many = default is not None, isinstance(default, list)
            command.add_argument(
                "--" * flag + option, default=default, help=text + f" (default: {default})" * flag,
                type=float if many else type(default) if flag else str, nargs="+" if many else None)
    return parser
def main(args):
    np.seterr(all="ignore")  # a resample may have no optimum: nan
    if not args.command: return lesson()
    print("scaling.py:", vars(args))
    for name, (default, _) in COMMANDS[args.command][2].items():
        for x in np.ravel(getattr(args, name)):
            if isinstance(x, np.number) and not (0 < x < math.inf or x == default == 0):
                raise UserError(f"{name}: got {x}, wanted a positive number; set --{name}")
    COMMANDS[args.command][0](args)
if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted; a study goes on by the same command")
