"""train.py - the training loop: from a budget of minutes to a model, and the log of how it went.

THE IDEA
    Show the model text, ask for every next token, move the weights so that what came would have
    been likelier; a few thousand times. All skill goes into spending the budget well: a model
    neither too large to see enough text nor too small to use it, a step size that falls to zero
    exactly when time is up. So the budget is a flag, --minutes, the schedule is tied to it, and the
    result is one number that compares across tokenizers: bits per byte of text never seen.

THE MATHS
    loss = mean of -log p(next token), in nats          perplexity = exp(loss)
    bits_per_byte = sum of -log p / (ln 2 * bytes)    the size to which a compressor that uses the
                                                      model shrinks a byte of text
    training FLOPs a token = 6 N + 12 L S H Dh        N weights in matrices, L layers, context S,
                                                      H heads of width Dh: model.py counts them
    MFU = tokens/s * FLOPs a token / peak FLOP/s      the part of the machine that did useful work

THE COSTS
    Memory in float32: 16 bytes a parameter for weight, gradient and AdamW's two averages (Muon 12);
    and activations, which grow with micro_batch: gradients of micro-batches add up to the batch's.

CONTENTS  TrainConfig / RECIPES / setting up / one step / checkpoints / fit / LOOKS / race
NOT HERE  many devices (parallel.py passes its own step, save and load to the same `fit`)
RUN       python train.py                   # 3 minutes on a laptop; last line: bits_per_byte, steps
          python train.py --dataset owt     # OpenWebText; 90 minutes on one GPU
          python train.py --resume          # goes on with the newest run
          python train.py --race optimizer=adamw,muon --seeds 2      # compares values of any field
REFERENCES
    Micikevicius et al. 2018 (1710.03740) mixed precision; Kaplan et al. 2020 (2001.08361) 6ND;
    Chowdhery et al. 2022 (2204.02311) MFU; modded-nanogpt and nanochat, the recipe
EXERCISE  Empty `local_step`; fill it until `pytest test_all.py -k accumulation` is green again.
"""
import argparse, dataclasses, json, math, os, re, resource, shutil, signal, subprocess, sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bpe import UserError, atomic_write
from data import SOURCES, Loader, in_order, open_tokens, prepare, remove_leftovers, validation
from kernels import (KERNELS, USES, add_fields, device_name, fastest_dtype, flag,
                     keep_freed_memory, peak_flops_per_s, synchronize, usable)
from model import (LM, PRESETS, ModelConfig, fields_of, load_tensors, need_field, save_model,
                   save_tensors)
from optim import (OPTIMIZERS, SCHEDULES, Level, Place, clip_grad_norm, health, noise_scale,
                   orthogonalize, param_groups, role)
from sample import (RUNS, Sampling, TextStream, board, compare, evaluate, generate, pick_device,
                    plot, read_log, shannon)

# --- Configuration -----------------------------------------------------------
# A sequence is seq_len tokens; a step is one update of the weights from batch_size sequences, which
# go through the model micro_batch at a time. Ranks are processes that share a step.

DTYPES = {"auto": None} | {t: getattr(torch, t) for t in ("float32", "bfloat16", "float64")}

@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, but for those of its model."""
    preset: str = flag("modern", f"architecture, a row of model fields: {', '.join(PRESETS)}")
    dataset: str = flag("stdlib", f"{', '.join(SOURCES)}, or a path to a text file or folder")
    tokenizer: str = flag("bpe", "bpe, byte, char, or a path to a tokenizer.json")
    data_dir: str = flag("data", "folder for texts, tokenizers and tokens")
    mirror: str | None = flag(None, "URL of a server to download from; none: the source's own")
    minutes: float | None = flag(3.0, "budget in minutes of training steps; none: use steps")
    steps: int | None = flag(None, "budget in optimizer steps; none: use minutes")
    batch_size: int = flag(32, "sequences per optimizer step, over all ranks")
    micro_batch: int | None = flag(None, "sequences per forward pass; none: batch_size")
    optimizer: str = flag("muon", ", ".join(OPTIMIZERS))
    lr: float | None = flag(None, "peak learning rate; none: the optimizer's own")
    lr_embedding: float | None = flag(None, "that of embeddings; none: the optimizer's own, or lr")
    lr_head: float | None = flag(None, "that of the head; none: likewise")
    lr_vector: float | None = flag(None, "that of gains, biases, scalars; none: likewise")
    base_width: int | None = flag(None, "d_model at which lr was found with this flag (muP, Adam)")
    weight_decay: float = flag(0.1, "decay of matrices, for an optimizer that has it")
    schedule: str = flag("wsd", "lr over the budget: constant, cosine, wsd (warm, stable, decay)")
    warmup: float = flag(0.02, "fraction of the budget in which lr rises")
    cooldown: float = flag(0.6, "fraction of the budget in which lr falls, for wsd")
    final_lr: float = flag(0.0, "lr at the end as a fraction of its peak")
    clip: float = flag(1.0, "largest global norm of the gradient")
    evals: int = flag(3, "evaluations on the validation set, the last at the end")
    eval_tokens: int | None = flag(None, "validation tokens to evaluate on; none: all")
    save_minutes: float = flag(1.0, "minutes between checkpoints; 0: after every step")
    log_steps: int = flag(50, "steps between lines of the log")
    dtype: str = flag("auto", "of activations: float32, bfloat16, float64; auto: the fastest")
    device: str = flag("auto", "cpu, cuda or mps; auto: the best there is")
    threads: int | None = flag(None, "CPU threads; none: one a core")
    compile: bool | None = flag(None, "torch.compile the model; none: on cuda")
    kernels: str = flag("auto", "torch, triton, or auto: triton on cuda, where it is installed")
    seed: int = flag(0, "of initial weights, order of data, dropout and the sample")
    def __post_init__(self):
        need = partial(need_field, self)
        limits = {**dict.fromkeys(("warmup", "cooldown", "final_lr"), (1, "a fraction, 0 to 1")),
                  **dict.fromkeys(("weight_decay", "save_minutes", "seed"), (2 ** 62, "0 or more"))}
        for name, value in vars(self).items():
            most, wanted = limits.get(name, (2 ** 62, "a positive number"))
            if not isinstance(value, (str, bool, type(None))):
                need(0 <= value <= most and (value or name in limits), name, wanted)
        need((self.minutes is None) != (self.steps is None), "steps", "one of minutes and steps")
        for name, of in dict(optimizer=OPTIMIZERS, schedule=SCHEDULES, dtype=DTYPES,
                             kernels=USES).items():
            need(getattr(self, name) in of, name, " or ".join(of))
        need((self.device, self.dtype) != ("mps", "float64"), "dtype", "float32 on mps")
        need(self.kernels != "triton" or usable(), "kernels", "torch: no GPU, or no Triton, here")
        need(self.batch_size % (self.micro_batch or 1) == 0, "micro_batch",
             f"a divisor of batch_size {self.batch_size}")
        need(0 < self.cooldown <= 1 - self.warmup or self.schedule != "wsd", "cooldown",
             f"more than 0, and with warmup {self.warmup} at most 1")
        # No silent knobs: what the choice above does not use must hold its default.
        need(self.schedule == "wsd" or self.cooldown == 0.6, "cooldown", "its default without wsd")
        need(self.schedule != "constant" or self.final_lr == 0, "final_lr", "0 if lr is constant")
        decays = "weight_decay" in OPTIMIZERS[self.optimizer].defaults
        need(decays or self.weight_decay == 0.1, "weight_decay", f"none with {self.optimizer}")

# What a budget buys on a kind of device: flags override a preset's row, and that overrides these.
# That for a CPU was found by trials on two cores [measured], those for a GPU are [our choice] after
# modded-nanogpt and nanochat. Each holds for its minutes, and is scaled to others.
RECIPES = {
    "cpu": dict(minutes=3.0, vocab_size=2048, seq_len=128, n_layers=2, d_model=128, n_heads=2,
                batch_size=16, eval_tokens=1_000_000),  # of a large set a part: time is to train
    "cuda": dict(minutes=3.0, vocab_size=4096, seq_len=256, n_layers=6, d_model=384, n_heads=6,
                 batch_size=128),
    "cuda owt": dict(minutes=90.0, vocab_size=32000, seq_len=1024, n_layers=12, d_model=1024,
                     n_heads=8, batch_size=512, micro_batch=32, save_minutes=5.0, log_steps=10)}
def recipe(row, minutes):
    """(a row of RECIPES for another budget, the steps that lead to it as lines of text)."""
    k = minutes / row["minutes"]
    root, side = k ** 0.5, k ** (1 / 6)
    heads, layers = (max(1, round(side * row[f])) for f in ("n_heads", "n_layers"))
    width = heads * row["d_model"] // row["n_heads"]
    batch = 2 ** max(0, round(math.log2(row["batch_size"] * root ** 0.383)))
    micro = row.get("micro_batch") and min(batch, row["micro_batch"])
    return dict(row, minutes=minutes, n_layers=layers, d_model=width, n_heads=heads,
                batch_size=batch, micro_batch=micro), [
        f"1. FLOPs go with minutes: {k:.3g} times those that the recipe was tried with",
        f"2. parameters and tokens each with their root, {root:.3g} (2203.15556, approach 1)",
        f"3. depth and width each with the cube root of parameters: {layers} layers of {width}",
        f"4. the batch with tokens^0.383 (2505.13738), to a power of two: {batch} sequences",
        "5. learning rates stay: Muon's steps are scaled by shape (for AdamW set --base_width)"]

# --- Setting up a machine ----------------------------------------------------

@dataclass
class Machine:
    """Where and how a run computes, resolved from a TrainConfig and printed as a line."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    peak: float  # FLOP/s
    line: str
def set_up(cfg):
    device, KERNELS["use"] = pick_device(cfg.device), cfg.kernels
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    torch.set_num_threads(cfg.threads or len(ours))
    dtype = DTYPES[cfg.dtype] or fastest_dtype(device)
    kept = device.type == "cpu" and keep_freed_memory()
    if device.type == "cuda": torch.set_float32_matmul_precision("high")
    peak, source = peak_flops_per_s(device, dtype)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    return Machine(device, dtype, compiled, peak,
                   f"{device} ({device_name(device)}), {torch.get_num_threads()} threads, {dtype}, "
                   f"compile {'on' if compiled else 'off'}, malloc keeps memory: {kept}; "
                   f"peak {peak:.3g} FLOP/s ({source})")
def build(model_cfg, cfg, machine):
    """A fresh model on its device, and its optimizer. Weights are float32 (float64 on request), the
    residual stream has the dtype of the machine."""
    torch.manual_seed(cfg.seed)
    model = LM(model_cfg).to(machine.device)
    if machine.dtype == torch.float64: model = model.double()
    else: model.compute_dtype = machine.dtype
    make = OPTIMIZERS[cfg.optimizer]
    decay = cfg.weight_decay if "weight_decay" in make.defaults else None
    own = {**make.lrs, "matrix": make.defaults["lr"]}
    lrs = {role: lr or own.get(role) for role, lr in dict(
        matrix=cfg.lr, embedding=cfg.lr_embedding, head=cfg.lr_head, vector=cfg.lr_vector).items()}
    optimizer = make(param_groups(model, decay, cfg.base_width, **lrs))
    if machine.compile: optimizer.orthogonalize = torch.compile(orthogonalize)  # Muon's products
    return model, optimizer

# --- One step ----------------------------------------------------------------

def local_step(model, batches):
    """Gradients of the mean loss over all counted targets of `batches` [(tokens, targets)], which
    add up over the micro-batches -> that mean. Dividing each by the *common* count makes the result
    independent of how the batch was cut; a mean of means would weigh a padded one too much."""
    counted = sum((targets >= 0).sum() for _, targets in batches)
    total, loads = 0.0, []
    for tokens, targets in batches:
        losses, aux = model(tokens, targets)
        loss = losses.sum() / counted
        (loss + aux["loss"] / len(batches)).backward()
        total = total + loss.detach()
        loads = [a + b for a, b in zip(loads, aux["load"])] or aux["load"]
    for bias, load in zip(model.buffers(), loads):  # routers', if they have one: against the load
        bias += model.cfg.balance_bias * torch.sign(load.sum() / len(load) - load)
    return total

# --- Checkpoints -------------------------------------------------------------
# One file, or of many ranks a directory of files, holds all that the next step depends on: weights,
# optimizer state, where the data stands. It is there whole or not at all; the one before it, too.

@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0   # sum of step times: what --minutes counts
    seen: int = 0          # sequences
    evals: int = 0         # evaluations due so far
    bad: int = 0           # steps in a row without a finite loss
    loss_sum: float = 0.0  # over the steps since the last line of the log
    loss_steps: int = 0
    level: tuple = ()      # of the loss, to tell a spike
def checkpoints(run):   # newest first: a directory or a .safetensors, but no .part or .damaged
    return sorted(Path(run).glob("checkpoint-*[0-9s]"), reverse=True)
def keep_two(run):
    for old in checkpoints(run)[2:]: shutil.rmtree(old) if old.is_dir() else old.unlink()
def save_checkpoint(run, model, optimizer, progress):
    """Writes a checkpoint, then the weights alone as a directory that sample.py reads."""
    tensors = {f"model/{name}": p for name, p in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": x for name, x in optimizer.state_tensors().items()}
    save_tensors(Path(run) / f"checkpoint-{progress.step:08d}.safetensors", tensors,
                 {"progress": json.dumps(dataclasses.asdict(progress))})
    save_model(model, run)
    keep_two(run)
def read_checkpoint(path):
    """(tensors, metadata) of a file, or of a directory, whose files say of what they are parts."""
    if path.is_file(): return load_tensors(path)
    whole, files = {}, [load_tensors(file) for file in path.iterdir()]
    if not files or len(files) != int(files[0][1]["ranks"]):
        raise UserError(f"{path}: got {len(files)} files, wanted one of each rank; restore them")
    for tensors, metadata in files:
        for key, (shape, name, *place) in json.loads(metadata["places"]).items():
            x = whole.setdefault(name, tensors[key].new_zeros(shape))
            Place(name, *place).put(x, tensors[key])
    return whole, metadata
def load_checkpoint(run, model, optimizer):
    """Restores the newest checkpoint that is whole -> Progress; none at all is a fresh start."""
    for path in checkpoints(run):
        try: tensors, metadata = read_checkpoint(path)
        except UserError:  # it has said which file and what is wrong
            print(f"{path} is left out; trying the one before it", flush=True)
            path.rename(f"{path}.damaged")  # out of the rotation
            continue
        part = lambda kind: {k[len(kind):]: v for k, v in tensors.items() if k.startswith(kind)}
        model.load_state_dict(part("model/"))
        optimizer.load_state_tensors(part("optimizer/"))
        remove_leftovers(Path(run))  # of a kill in the midst of a save
        return Progress(**json.loads(metadata["progress"]))
    if any(Path(run).glob("checkpoint-*.damaged")):
        raise UserError(f"{run}: got no checkpoint that is whole, wanted one; start a new run")
    return Progress()

# --- The loop ----------------------------------------------------------------
# There is one, for one process or many. What is different with many is passed in: step (gets all
# micro-batches of a step and leaves gradients), save, load, agree (one value for all ranks) and
# is_main (who writes).

class Stop:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second does not wait."""
    def __enter__(self):
        self.asked = None
        self.old = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self
    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        self.__exit__()
    def __exit__(self, *_):
        for number, handler in self.old.items(): signal.signal(number, handler)
class Log:
    """Prints a line and appends it as JSON to the run's log.jsonl, if is_main. A run that goes on
    first drops what came after its checkpoint: of the same step the evaluation, and nothing else.
    Losses and gradient norms wait here, on the device, until a line is due, as reading them makes
    a step wait (on a CPU, which has no queue, it is done at once)."""
    def __init__(self, run, now, is_main=True):
        self.run, self.is_main, self.waiting = run, is_main, []
        if not (run and is_main): return
        rows = [row for row in read_log(run) if (row["step"], "valid" in row) < (now.step, True)]
        with atomic_write(Path(run) / "log.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    def write(self, line, **row):
        if self.is_main: print(line, flush=True)
        if not (self.run and self.is_main): return
        try:
            with open(Path(self.run) / "log.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(f"{self.run}/log.jsonl: got {e.strerror}, wanted to append to the log; "
                            "free some space, then: python train.py --resume")
    def read(self, now):
        """Takes what waits into `now`. A step without a finite loss or gradient counted as one of
        gradient zero; the third in a row ends the run. A spike is said, and clipped as any."""
        pairs, level = torch.stack(self.waiting).tolist() if self.waiting else [], Level(*now.level)
        for step, (loss, norm) in enumerate(pairs, now.step - len(pairs) + 1):
            good = math.isfinite(loss) and math.isfinite(norm)
            now.bad = 0 if good else now.bad + 1
            if good: now.loss_sum, now.loss_steps = now.loss_sum + loss, now.loss_steps + 1
            if not good or level.spikes(loss):
                self.write(f"step {step:6d}  {'a spike' if good else 'no gradient taken'}: loss "
                           f"{loss:.4f}, gradient norm {norm:.4g}", step=step, odd=loss)
            if now.bad == 3:
                good = self.run and checkpoints(self.run)[0]
                raise SystemExit("three steps in a row without a finite loss; the last good "
                                 f"checkpoint: {good}; begin anew: smaller --lr, or other data")
        self.waiting, now.level = [], level.now
    def line(self, now, mark, x, vitals, model, loader, machine):
        """The line of the steps since `mark`; x of the run is done; vitals: of the last look."""
        tokens, flops = now.seen * loader.seq_len, model.flops_per_token()
        rate = (tokens - mark.seen * loader.seq_len) / (now.seconds - mark.seconds)
        row = dict(step=now.step, minutes=now.seconds / 60, loss=now.loss_sum / now.loss_steps,
                   tokens=tokens, flops=tokens * flops, tokens_per_s=rate,
                   mfu=rate * flops / machine.peak, **{k: float(v) for k, v in vitals.items()})
        text = ("step {step:6d} {0:4.0f} % {minutes:6.2f} min  loss {loss:7.4f}  lr {lr:.1e}  norm "
                "{norm:5.2f}  update {update:.0e}  logit {logit:3.0f} {tokens_per_s:9,.0f} tokens/s"
                "  MFU {1:4.1f} %")
        self.write(text.format(100 * min(x, 1), 100 * row["mfu"], **row), **row)

def fit(model, optimizer, loader, cfg, machine, run=None, resume=False, evaluation=None,
        step=local_step, save=save_checkpoint, load=load_checkpoint, agree=lambda x: x,
        is_main=True, clip=clip_grad_norm, watch=health):
    """Trains until the budget of cfg is spent or a signal comes -> (Progress, dict of the last
    evaluation, which is empty if a signal came). `evaluation(model)` returns the dict of
    `evaluate`; run is a directory, or None to keep nothing."""
    now = load(run, model, optimizer) if run and resume else Progress()
    loader.seek(now.seen)
    log = Log(run, now, is_main)
    schedule = lambda x: SCHEDULES[cfg.schedule](x, cfg.warmup, cfg.cooldown, cfg.final_lr)
    spent = lambda: agree(now.step / cfg.steps if cfg.steps else now.seconds / 60 / cfg.minutes)
    params = [p for group in optimizer.groups for p in group["params"]]
    if run and not now.step: save(run, model, optimizer, now)  # there is always one to resume
    forward, micro = warm_up(model, optimizer, loader, cfg, machine, step)
    model.train()
    result, saved, mark, vitals = {}, time.perf_counter(), dataclasses.replace(now), {}
    with Stop() as stop:
        while True:
            # In this order a kill at any moment loses nothing: the log's line, the checkpoint that
            # knows it was written, and only then the evaluation, which can be done again.
            x, asked = spent(), agree(stop.asked)
            due = x >= (now.evals + 1) / cfg.evals
            late = agree(time.perf_counter() - saved > 60 * cfg.save_minutes)
            lined = due or now.step % cfg.log_steps == 0 or now.step == 1
            if lined or late or asked: log.read(now)
            if lined and now.loss_steps and now.step > mark.step:
                log.line(now, mark, x, vitals, model, loader, machine)
                now.loss_sum, now.loss_steps = 0.0, 0
                mark = dataclasses.replace(now)
            if run and (asked or due or late):
                save(run, model, optimizer, now)
                saved = time.perf_counter()
            if asked: break
            if due:
                now.evals = int(x * cfg.evals + 1e-9)
                result = evaluation(forward) if evaluation else {}
                if result:
                    log.write("step {0:6d}  validation: bits_per_byte {bits_per_byte:.4f}, loss "
                              "{loss:.4f} nats a token at context {context}, {1:.2f} min".format(
                              now.step, now.seconds / 60, **result),
                              step=now.step, minutes=now.seconds / 60, valid=result)
            if x >= 1: break
            start = time.perf_counter()
            batches, scale = take(loader, micro, machine.device, cfg.seed), schedule(x)
            optimizer.zero_grad()
            loss = step(forward, batches)
            norm = clip(params, cfg.clip * torch.isfinite(loss))
            look = not vitals or (now.step + 1) % cfg.log_steps == 0  # a line of the log follows
            before = [p.detach().clone() for p in params] if look else None
            optimizer.step(scale)
            log.waiting.append(torch.stack((loss, norm.to(loss.dtype))))
            now.step, now.seen = now.step + 1, loader.seen
            if look: vitals = dict(lr=optimizer.groups[0]["lr"] * scale, norm=norm,
                                   **watch(model, batches[0][0], params, before))
            if look or machine.device.type == "cpu": log.read(now)
            now.seconds = agree(now.seconds + time.perf_counter() - start)
    kept = f", saved; go on with: python {Path(sys.argv[0]).name} --resume --run {run}"
    if asked and is_main: print(f"{asked}: stopped after step {now.step}{kept if run else ''}")
    return now, {} if asked else result

def take(loader, micro, device, seed=0):
    """The next batch as micro-batches on the device; a run that goes on has the same dropout."""
    torch.manual_seed(seed + loader.seen)
    cuda = device.type == "cuda"  # copies without waiting, from pinned memory only
    move = lambda x: (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)
    return list(zip(*(map(move, x.split(micro)) for x in next(loader))))
def warm_up(model, optimizer, loader, cfg, machine, step):
    """-> (model, micro_batch). Compiles if asked to, and on a GPU finds how many sequences fit into
    memory at once, on a step that is then taken back: this is set-up, not training. Halves
    micro_batch until it fits; the batch stays."""
    micro, seen = cfg.micro_batch or cfg.batch_size, loader.seen
    if not machine.compile and machine.device.type != "cuda": return model, micro
    forward = torch.compile(model, dynamic=False) if machine.compile else model
    buffers = [b.clone() for b in model.buffers()]  # biases of routers must not notice
    fresh = not optimizer.state_tensors()
    while True:
        try:
            step(forward, take(loader, micro, machine.device)[:2])
            if fresh: optimizer.step(0.0)  # its averages take memory, its products are compiled
            break
        except torch.OutOfMemoryError:
            if micro % 2: raise UserError(f"micro_batch: got {micro}, which does not fit into "
                                          "memory, wanted less; set --micro_batch or --d_model")
            micro //= 2
            print(f"out of memory: micro_batch {micro}", flush=True)
            optimizer.zero_grad()
        finally: loader.seek(seen)
    synchronize(machine.device)
    for b, old in zip(model.buffers(), buffers): b.copy_(old)
    if fresh: optimizer.state = [[{} for _ in states] for states in optimizer.state]
    return forward, micro

# --- Tools that look at a run ------------------------------------------------

def walk(model, optimizer, loader, cfg, machine, tok):
    """One batch through every stage from text to moved weights; waits for Enter in a terminal. Ten
    steps come first, without a word: at the start zeros are all there is to see."""
    def stage(title, *lines, tensors=()):
        print(f"\n== {title}", *lines, sep="\n   ")
        for name, t in tensors:
            if not torch.is_tensor(t): continue  # a block puts out more, too
            values = " ".join(f"{v:+.1e}" for v in t.detach().float().flatten()[:5].tolist())
            print(f"   {name:38s} {str(tuple(t.shape)):17s} {values} ...")
        if sys.stdin.isatty(): input("   [Enter] ")
    loader = Loader(loader.tokens, loader.seq_len, 2, cfg.seed)
    for i in range(11):
        if i: optimizer.step(0.3)
        optimizer.zero_grad()
        batches = take(loader, 2, machine.device)
        loss = local_step(model, batches).item()
    (tokens, targets), piece = batches[0], lambda i: repr(tok.decode([i]))
    ids = tokens[0].tolist()
    stage("1. text: the first of two sequences", *tok.decode(ids)[:240].splitlines())
    stage("2. tokens: ids, and the pieces they stand for", ids[:12], " ".join(map(piece, ids[:12])))
    stage("3. targets: the same, one place on", ids[:8], targets[0, :8].tolist())
    first = lambda pairs: {n: x for n, x in pairs if re.match(r"(?!layers\.)|layers\.0\b", n)}
    out, weights = [], first(model.named_parameters())
    for name, m in first(model.named_modules()).items():
        m.register_forward_hook(lambda m, _, y, name=name: out.append((name, y)))
    logits = model(tokens)[0]
    stage("4. forward: what the modules put out, of the layers the first",
          tensors=[*out, ("logits", logits)])
    p = logits[0, -1].softmax(-1)
    stage("5. prediction: the likeliest tokens after the last, and their probabilities",
          *(f"{p[i]:.4f}  {piece(i)}" for i in p.topk(min(5, len(p))).indices.tolist()))
    stage("6. loss: mean of -log p(target)",
          f"{loss:.4f} nats; a uniform guess has ln {len(p)} = {math.log(len(p)):.4f}")
    stage("7. backward: gradients, in the shape of what they move",
          tensors=[(name, w.grad) for name, w in weights.items()])
    norm = clip_grad_norm(model.parameters(), cfg.clip).item()
    old = {name: w.detach().clone() for name, w in weights.items()}
    optimizer.step(0.3)
    stage(f"8. update: the gradient, of norm {norm:.3f}, is clipped to {cfg.clip} if larger; then "
          f"{cfg.optimizer} moves the weights, here at 0.3 lr",
          tensors=[(f"{role(n, w):9s} {n[-28:]}", w - old[n]) for n, w in weights.items()])
    stage("9. the same batch again", f"loss {loss:.4f} -> {local_step(model, batches).item():.4f}")

def profile(model, optimizer, loader, cfg, machine, _):
    """Ten steps under torch.profiler: the ten costliest operations, and a trace for a browser."""
    forward, micro = warm_up(model, optimizer, loader, cfg, machine, local_step)
    def steps(n):
        for _ in range(n):
            optimizer.zero_grad()
            local_step(forward, take(loader, micro, machine.device))
            optimizer.step()
        synchronize(machine.device)
    steps(3)  # the first ones allocate
    with torch.profiler.profile() as prof: steps(10)
    key = "self_cuda_time_total" if machine.device.type == "cuda" else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))
    RUNS.mkdir(exist_ok=True)
    prof.export_chrome_trace(str(RUNS / "trace.json"))
    print(f"trace: {RUNS}/trace.json (open it at ui.perfetto.dev or chrome://tracing)")
def noise(model, _, loader, cfg, machine, tok, parts=64):
    """Measures the gradient noise scale on batches of 1/4 batch_size (with --resume: of a run)."""
    b, total, small = max(1, cfg.batch_size // 4), 0, 0.0
    loader = Loader(loader.tokens, loader.seq_len, b, cfg.seed)
    for _ in tqdm(range(parts), leave=False):
        model.zero_grad()
        local_step(model, take(loader, min(b, cfg.micro_batch or b), machine.device))
        g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        small, total = small + g.square().sum().item() / parts, total + g / parts
    scale = noise_scale(small, total.square().sum().item(), b, b * parts)
    of_step = 1 / (1 + scale / cfg.batch_size)
    print(f"gradient noise scale {scale:,.0f} sequences, {scale * loader.seq_len:,.0f} tokens: at "
          f"batch_size {cfg.batch_size} a step brings {of_step:.0%} of what an endless batch would,"
          f" a sequence {1 - of_step:.0%} of what it can")
LOOKS = {"walk": walk, "profile": profile, "noise": noise}  # at a model; they leave no run

# --- The command line --------------------------------------------------------
# The settings of a run are a dict: `train` and `model`, fields of the two configurations, `data`,
# hashes of the tokenizer and the texts, and the steps of its `recipe`. Its train.json keeps them.

FREE = ("device", "threads", "log_steps", "save_minutes", "data_dir", "mirror")  # may change later
FIELDS = {f.name for c in (TrainConfig, ModelConfig) for f in dataclasses.fields(c)}
def settle(given):
    """Flags over the preset's row over the recipe over the dataclasses' defaults -> settings."""
    cuda = pick_device(given.get("device", "auto")).type == "cuda"
    row = RECIPES["cpu" if not cuda else "cuda owt" if given.get("dataset") == "owt" else "cuda"]
    minutes = given.get("minutes", row["minutes"])  # if it makes no sense TrainConfig says so
    row, steps = recipe(row, minutes if minutes and 0 < minutes < math.inf else row["minutes"])
    if given.get("tokenizer", "bpe") != "bpe" and "vocab_size" in given:
        raise UserError(f"vocab_size: got {given['vocab_size']}, wanted none, as the tokenizer "
                        f"{given['tokenizer']} has its own; leave --vocab_size out")
    merged = {**row, **fields_of(given.get("preset", TrainConfig.preset), given)}
    for small, large in ("n_kv_heads", "n_heads"), ("micro_batch", "batch_size"):
        if merged.get(small) and small not in given:  # a row's, which need not divide a flag's
            merged[small] = math.gcd(merged[small], merged[large])
    if given.get("steps") and "minutes" not in given: merged["minutes"] = None
    pick = lambda config: dataclasses.asdict(config(**{
        f.name: merged[f.name] for f in dataclasses.fields(config) if f.name in merged}))
    return {"train": pick(TrainConfig), "model": pick(ModelConfig), "data": None, "recipe": steps}
def resumed(run, given):
    """The settings a run was begun with. A flag given now that differs is an error, unless it
    is in FREE."""
    try: settings = json.loads((run / "train.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{run}/train.json: got {type(e).__name__}, wanted what train.py writes")
    for name, old in {**settings["train"], **settings["model"]}.items():
        if name in FREE: settings["train"][name] = given.get(name, old)
        elif given.get(name, old) != old:
            raise UserError(f"{name}: got {given[name]!r}, wanted {old!r}, as {run} was begun; "
                            f"leave --{name} out, or begin a new run")
    return settings
def free(name):  # the first of runs/NAME-1, runs/NAME-2, ... that does not exist
    return next(p for p in (RUNS / f"{name}-{i}" for i in range(1, 10 ** 6)) if not p.exists())
def run_directory(args):
    """Where the run lives: --run, or a free name; with --resume the newest unless named."""
    if args.resume:
        files = [args.run / "train.json"] if args.run else RUNS.glob("*/train.json")
        found = sorted(filter(Path.exists, files), key=lambda p: p.stat().st_mtime)
        if found: return found[-1].parent
        raise UserError(f"resume: got {args.run or f'no run under {RUNS}/'}, wanted a run that "
                        "train.py began; leave --resume out")
    words = [getattr(args, name, getattr(TrainConfig, name)) for name in ("dataset", "preset")]
    path = args.run or free("-".join(Path(word).stem for word in words))
    if path.is_file() or path.exists() and any(path.iterdir()):
        raise UserError(f"run: got {path}, which exists; wanted a new name; set --run, or go on "
                        f"with it: --resume --run {path}")
    return path
def get_corpus(run, cfg, settings, resume):
    """(Corpus, Loader). The settings of a run (None: of none) are written before the work, so that
    one that is killed meanwhile can be resumed, and taken back if they are wrong."""
    def keep():
        if run:
            with atomic_write(run / "train.json", "w") as f: json.dump(settings, f, indent=1)
    model = settings["model"]
    if not resume: keep()
    try:
        corpus = prepare(cfg.dataset, cfg.tokenizer, model["vocab_size"], cfg.data_dir, cfg.mirror)
        loader = Loader(open_tokens(corpus.train), model["seq_len"], cfg.batch_size, cfg.seed)
    except UserError:
        if run and not resume: shutil.rmtree(run)  # which held nothing else
        raise
    data = {"tokenizer": corpus.tokenizer.hash, **{k: v["text"] for k, v in corpus.info.items()}}
    if settings["data"] not in (None, data):
        raise UserError(f"data: got another text or tokenizer of {cfg.dataset} than {run} was "
                        "begun with, wanted the same; restore it, or begin a new run")
    settings["data"] = data
    keep()
    return corpus, loader

def main(args):
    if args.board: return board()
    if args.race: return race(args)
    args.resume |= bool(args.compare)
    run, given = run_directory(args), vars(args)
    if args.compare: return compare(run, args.compare)
    look = next((LOOKS[name] for name in LOOKS if given[name]), None)
    settings = resumed(run, given) if args.resume else settle(given)
    cfg = TrainConfig(**settings["train"])
    print(f"{run}: {cfg}", *settings["recipe"], sep="\n")
    if cfg.dataset == "owt" and pick_device(cfg.device).type != "cuda":
        print("no CUDA device: a small model trains on the same data for",
              f"{cfg.minutes} minutes" if cfg.minutes else f"{cfg.steps} steps")
    corpus, loader = get_corpus(None if look else run, cfg, settings, args.resume)
    tok, text = corpus.tokenizer, corpus.info["valid"]["text"]
    machine = set_up(cfg)  # after `prepare`: a process is forked more safely before threads start
    model_cfg = ModelConfig(**{**settings["model"], "vocab_size": tok.vocab_size})
    model, optimizer = build(model_cfg, cfg, machine)
    model.eos, n = tok.eot, model.n_params()
    tokens, n_bytes = validation(corpus, cfg.eval_tokens)
    print(f"{machine.line}\n{model_cfg}\n{sum(n.values()):,} parameters {n}, "
          f"{model.flops_per_token():.3g} FLOPs to train on a token; one epoch is "
          f"{len(loader.tokens):,} tokens")
    if look:
        if args.resume: load_checkpoint(run, model, optimizer)
        return look(model, optimizer, loader, cfg, machine, tok)
    tok.save(run / "tokenizer.json")
    if not checkpoints(run):
        (run / "log.jsonl").unlink(missing_ok=True)
        ladder = shannon(loader.tokens, tokens, tok.vocab_size, n_bytes)
        note = "the budget counts steps; preparing data, compiling, saving, evaluating is outside"
        Log(run, Progress()).write(
            f"bits_per_byte of {', '.join(f'{k} {v:.3f}' for k, v in ladder.items())} models of "
            f"the same tokens, up to 20 M; sha256 of the validation text {text[:16]}\n{note}",
            step=0, ladder=ladder, text=text, note=note)
    check = lambda forward: evaluate(forward, in_order(
        tokens, model_cfg.seq_len, cfg.micro_batch or cfg.batch_size), n_bytes, machine.device)
    now, result = fit(model, optimizer, loader, cfg, machine, run, args.resume, check)
    if result: finish(run, model, tok, cfg, now, result, machine, text)

def finish(run, model, tok, cfg, now, result, machine, text):
    """What a finished run leaves: result.json for --board, a picture, a sample."""
    tokens, minutes = now.seen * model.cfg.seq_len, now.seconds / 60
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
    if machine.device.type == "cuda": most = torch.cuda.max_memory_allocated(machine.device)
    row = dict(
        result, minutes=minutes, flops=tokens * model.flops_per_token(), dataset=cfg.dataset,
        parameters=sum(model.n_params().values()), hardware=device_name(machine.device), text=text,
        memory_bytes=most, tokens_per_s=tokens / now.seconds, ms=1e3 * now.seconds / now.step)
    with atomic_write(run / "result.json", "w") as f: json.dump(row, f, indent=1)
    plot(run)
    print("sample:")
    stream = TextStream(tok, lambda text: print(text, end="", flush=True))
    how = Sampling(200, temperature=0.8, top_p=0.95, seed=cfg.seed, stop=tok.eot)
    generate(model, [[tok.eot]], how, on_token=lambda i, token: stream.put(token))
    stream.flush()
    print(f"\nmore: python sample.py --run {run} --prompt TEXT\nvalidation bits_per_byte "
          f"{result['bits_per_byte']:.4f}, loss {result['loss']:.4f} nats a token at context "
          f"{model.cfg.seq_len}, {minutes:.2f} minutes, {now.step} steps")
def race(args):
    """A run for each value of a field and each seed, all on the same budget, and a table. Each is a
    process of its own: none inherits another's memory, or a processor that it has warmed up."""
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    name, _, values = args.race.partition("=")
    if name not in FIELDS or args.run or args.resume or args.seeds < 1:
        raise UserError(f"race: got {args.race!r} and {args.seeds} seeds, wanted FIELD=VALUE,VALUE "
                        "of a field in --help, a seed or more; leave --run and --resume out")
    for value in (values := values.split(",")):  # mistakes are found before anything is trained
        settle({**given, **vars(build_parser().parse_args([f"--{name}={value}"]))})
    print(f"{name:14s}  parameters  bits_per_byte     std  tokens/s  ms/step  peak MB  runs")
    for value in values:
        rows, stem = [], f"race-{name}-{Path(value).name}"
        for seed in range(args.seeds):
            path = free(stem)
            flags = {**given, "run": path, "seed": given.get("seed", 0) + seed, name: value}
            if subprocess.run([sys.executable, __file__, *(f"--{k}={v}" for k, v in flags.items())],
                              stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"race: got no result from {path}, for what is said above")
            rows.append(json.loads((path / "result.json").read_text()))
        n, bits, rate, ms, most = np.array([[r[key] for key in (
            "parameters", "bits_per_byte", "tokens_per_s", "ms", "memory_bytes")] for r in rows]).T
        std = f"{bits.std(ddof=1):8.4f}" if len(bits) > 1 else f"{'-':>8s}"
        print(f"{value:14s}{n.mean():12,.0f}{bits.mean():15.4f}{std}{rate.mean():10,.0f}"
              f"{ms.mean():9.1f}{most.mean() / 1e6:9,.0f}  {stem}", flush=True)
def build_parser():
    parser = argparse.ArgumentParser(description="Trains a language model for a budget of minutes.")
    add, place = parser.add_argument, lambda s: Path(s) if os.sep in s else RUNS / s
    add("--run", type=place, help="its directory, or name under runs/ (default: a free name)")
    add("--resume", action="store_true", help="go on with --run, or the newest run (default: off)")
    add("--walk", action="store_true", help="one batch, stage by stage, and stop (default: off)")
    add("--profile", action="store_true", help="profile ten steps and stop (default: off)")
    add("--noise", action="store_true", help="gradient noise scale, and stop (default: off)")
    add("--compare", type=place, help="a run to hold against --run, and stop (default: none)")
    add("--board", action="store_true", help="rank the runs under runs/ and stop (default: off)")
    add("--race", help="FIELD=VALUE,VALUE: a run of each, and a table (default: none)")
    add("--seeds", type=int, default=1, help="runs of each value of --race (default: 1)")
    recipes = {name: {**row, **PRESETS[TrainConfig.preset]} for name, row in RECIPES.items()}
    for config in (TrainConfig, ModelConfig): add_fields(parser, config, recipes)
    return parser
if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted; go on with: python train.py --resume")
