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
    Memory in float32: 16 bytes a parameter for weight, gradient and AdamW's two averages; and
    activations, which grow with micro_batch: gradients of micro-batches add up to the batch's.

CONTENTS  TrainConfig / setting up / one step / checkpoints / fit / walk, profile, board, race
NOT HERE  many devices (parallel.py passes its own step, save and load to the same `fit`)
RUN       python train.py                   # 3 minutes on a laptop; last line: bits_per_byte, steps
          python train.py --dataset owt     # OpenWebText; 90 minutes on one GPU
          python train.py --walk            # one batch through all stages, value by value
          python train.py --resume          # goes on with the newest run
          python train.py --race mixers=A,S --minutes 1 --seeds 2    # compares values of any field
REFERENCES
    Micikevicius et al. 2018 (1710.03740) mixed precision; Kaplan et al. 2020 (2001.08361) 6ND;
    Chowdhery et al. 2022 (2204.02311) MFU
EXERCISE  Empty `local_step`; fill it until `pytest test_all.py -k accumulation` is green again.
"""
import argparse, dataclasses, json, math, os, re, resource, signal, subprocess, sys, time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bpe import UserError, atomic_write
from data import SOURCES, Loader, in_order, open_tokens, prepare, remove_leftovers
from kernels import (device_name, fastest_dtype, flag, keep_freed_memory, peak_flops_per_s,
                     synchronize)
from model import (LM, PRESETS, ModelConfig, fields_of, load_state, load_tensors, need_field,
                   published, save_model, save_tensors)
from optim import OPTIMIZERS, SCHEDULES, clip_grad_norm, param_groups, role
from sample import Sampling, TextStream, evaluate, generate, pick_device, shannon

# -----------------------------------------------------------------------------
# Configuration
# A sequence is seq_len tokens; a step is one update of the weights from batch_size sequences, which
# go through the model micro_batch at a time. Ranks are processes that share a step.

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16,
          "float64": torch.float64}

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
    optimizer: str = flag("adamw", ", ".join(OPTIMIZERS))
    lr: float = flag(3e-3, "peak learning rate")
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
    seed: int = flag(0, "of initial weights, order of data, dropout and the sample")

    def __post_init__(self):
        need = partial(need_field, self)
        for name in ("minutes", "steps", "batch_size", "micro_batch", "lr", "clip", "evals",
                     "log_steps", "threads", "eval_tokens"):
            value = getattr(self, name)
            need(value is None or 0 < value < math.inf, name, "a positive number")
        need((self.minutes is None) != (self.steps is None), "steps", "one of minutes and steps")
        need(self.optimizer in OPTIMIZERS, "optimizer", " or ".join(OPTIMIZERS))
        need(self.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
        need(self.dtype in DTYPES, "dtype", " or ".join(DTYPES))
        need((self.device, self.dtype) != ("mps", "float64"), "dtype", "float32 on mps")
        need(self.batch_size % (self.micro_batch or 1) == 0, "micro_batch",
             f"a divisor of batch_size {self.batch_size}")
        for name in ("warmup", "cooldown", "final_lr"):
            need(0 <= getattr(self, name) <= 1, name, "a fraction from 0 to 1")
        need(0 < self.cooldown <= 1 - self.warmup or self.schedule != "wsd", "cooldown",
             f"more than 0, and with warmup {self.warmup} at most 1")
        for name in ("weight_decay", "save_minutes", "seed"):
            need(0 <= getattr(self, name) < 2 ** 62, name, "0 or more")
        # No silent knobs: what the choice above does not use must hold its default.
        need(self.schedule == "wsd" or self.cooldown == 0.6, "cooldown", "its default without wsd")
        need(self.schedule != "constant" or self.final_lr == 0, "final_lr", "0 if lr is constant")
        decays = "weight_decay" in OPTIMIZERS[self.optimizer].defaults
        need(decays or self.weight_decay == 0.1, "weight_decay", f"none with {self.optimizer}")

# What a budget buys on a kind of device: flags override a preset's row, and that overrides these.
# The row for a CPU was chosen by trials on two cores [measured]; those for a GPU are [our choice].
RECIPES = {
    "cpu": dict(vocab_size=1024, seq_len=128, n_layers=3, d_model=128, n_heads=2, batch_size=16,
                eval_tokens=1_000_000),  # of a large set a part: minutes are for training
    "cuda": dict(vocab_size=4096, seq_len=256, n_layers=6, d_model=384, n_heads=6, batch_size=128,
                 lr=2e-3),
    "cuda owt": dict(vocab_size=32000, seq_len=1024, n_layers=12, d_model=1024, n_heads=8, lr=1e-3,
                     batch_size=512, micro_batch=32, minutes=90.0, save_minutes=5.0, log_steps=10),
}

def reader(f):
    """A function from text to a value of a dataclass field; `none` spells None."""
    kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
    def read(text):
        if "None" in str(f.type) and text.lower() == "none": return None
        if kind is bool and text.lower() not in ("true", "false"): raise ValueError(text)
        return text.lower() == "true" if kind is bool else kind(text)
    read.__name__ = kind.__name__  # what argparse calls it in an error
    return read

def add_fields(parser, config_class, recipes):
    """One flag per field of a dataclass. What is not given stays out of the namespace, so that it
    can be told from a default. The help shows the default of each recipe."""
    group = parser.add_argument_group(config_class.__name__)
    for f in dataclasses.fields(config_class):
        parse = reader(f)
        bare = dict(nargs="?", const=True) if parse.__name__ == "bool" else {}  # --tie: --tie true
        values = {name: row.get(f.name, f.default) for name, row in recipes.items()}
        default = ", ".join(f"{value} on {name}" for name, value in values.items())
        if len(set(values.values())) == 1: default = next(iter(values.values()))
        group.add_argument(f"--{f.name}", type=parse, default=argparse.SUPPRESS, **bare,
                           help=f"{f.metadata['help']} (default: {default})",
                           metavar=parse.__name__)

# -----------------------------------------------------------------------------
# Setting up a machine

@dataclass
class Machine:
    """Where and how a run computes, resolved from a TrainConfig and printed as a line."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    peak: float  # FLOP/s
    line: str

def set_up(cfg):
    device = pick_device(cfg.device)
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
    return model, make(param_groups(model, decay), lr=cfg.lr)

# -----------------------------------------------------------------------------
# One step

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

# -----------------------------------------------------------------------------
# Checkpoints
# One file holds all that the next step depends on: weights, optimizer state, random generator, and
# where the data stands. It is written whole or not at all; the one before it is kept too.

@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0   # sum of step times: what --minutes counts
    seen: int = 0          # sequences
    evals: int = 0         # evaluations done
    bad: int = 0           # steps skipped in a row
    loss_sum: float = 0.0  # over the steps since the last line of the log
    loss_steps: int = 0

def checkpoints(run):
    """Paths, newest first."""
    return sorted(Path(run).glob("checkpoint-*.safetensors"), reverse=True)

def device_of(model): return next(model.parameters()).device.type

def generator_of(model):
    """(get, set) for the state of the random generator of the model's device."""
    backend = {"cuda": torch.cuda, "mps": torch.mps, "cpu": torch}[device_of(model)]
    return backend.get_rng_state, backend.set_rng_state

def save_checkpoint(run, model, optimizer, progress):
    """Writes a checkpoint, then the weights alone as a directory that sample.py reads."""
    tensors = {f"model/{name}": p for name, p in published(model).items()}
    tensors |= {f"optimizer/{name}": x for name, x in optimizer.state_tensors().items()}
    tensors["generator"] = generator_of(model)[0]()
    save_tensors(Path(run) / f"checkpoint-{progress.step:08d}.safetensors", tensors,
                 {"progress": json.dumps(dataclasses.asdict(progress)), "device": device_of(model)})
    save_model(model, run)
    for old in checkpoints(run)[2:]: old.unlink()

def load_checkpoint(run, model, optimizer):
    """Restores the newest checkpoint that is whole -> Progress; none at all is a fresh start."""
    damaged = []
    for path in checkpoints(run):
        try: tensors, metadata = load_tensors(path)
        except UserError:  # it has said which file and what is wrong
            print(f"{path} is left out; trying the one before it", flush=True)
            damaged.append(path)
            continue
        part = lambda kind: {k[len(kind):]: v for k, v in tensors.items() if k.startswith(kind)}
        load_state(model, part("model/").items(), path)
        optimizer.load_state_tensors(part("optimizer/"))
        if metadata["device"] == device_of(model): generator_of(model)[1](tensors["generator"])
        else: print(f"{path} is of another device: the random generator starts anew")
        for other in damaged: other.rename(other.with_suffix(".damaged"))  # out of the rotation
        remove_leftovers(Path(run))  # of a kill in the midst of a save
        return Progress(**json.loads(metadata["progress"]))
    if damaged:
        raise UserError(f"{run}: got no checkpoint that is whole, wanted one; start a new run")
    return Progress()

# -----------------------------------------------------------------------------
# The loop
# There is one, for one process or many. What is different with many is passed in: step (gets all
# micro-batches of a step and leaves gradients), save, load, agree (one value for all ranks) and
# is_main (who writes).

class Stop:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second does not wait."""
    def __enter__(self):
        self.asked, self.old = None, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try: self.old[number] = signal.signal(number, self.ask)
            except ValueError: pass  # not the main thread: whoever started us handles signals
        return self

    def ask(self, number, frame):
        self.asked = signal.Signals(number).name
        for n, handler in self.old.items(): signal.signal(n, handler)

    def __exit__(self, *_):
        for n, handler in self.old.items(): signal.signal(n, handler)

class Log:
    """Prints a line and appends it as JSON to the run's log.jsonl. A run that goes on first drops
    what came after its checkpoint: of the same step that is the evaluation, and nothing else."""
    def __init__(self, run, progress):
        self.path, rows = run and Path(run) / "log.jsonl", []
        if not run: return
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try: row = json.loads(line)
            except ValueError: continue  # cut short by a kill
            at = row["step"] - progress.step
            if at < 0 or at == 0 and "valid" not in row: rows.append(line + "\n")
        with atomic_write(self.path, "w") as f: f.writelines(rows)

    def write(self, line, **row):
        print(line, flush=True)
        if not self.path: return
        try:
            with open(self.path, "a") as f: f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(f"{self.path}: got {e.strerror}, wanted to append to the log; free "
                            "some space, then: python train.py --resume")

def fit(model, optimizer, loader, cfg, machine, run=None, resume=False, evaluation=None,
        step=local_step, save=save_checkpoint, load=load_checkpoint, agree=lambda x: x,
        is_main=True):
    """Trains until the budget of cfg is spent or a signal comes -> (Progress, dict of the last
    evaluation, which is empty if a signal came). `evaluation(model)` returns the dict of
    `evaluate`; run is a directory, or None to keep nothing."""
    now = load(run, model, optimizer) if run and resume else Progress()
    loader.seek(now.seen)
    log = Log(run if is_main else None, now)
    forward = torch.compile(model, dynamic=False) if machine.compile else model
    micro = cfg.micro_batch or cfg.batch_size
    schedule = lambda x: SCHEDULES[cfg.schedule](x, cfg.warmup, cfg.cooldown, cfg.final_lr)
    spent = lambda: agree(now.step / cfg.steps if cfg.steps else now.seconds / 60 / cfg.minutes)
    params = [p for group in optimizer.groups for p in group["params"]]
    if run and not now.step: save(run, model, optimizer, now)  # there is always one to resume
    if machine.compile: warm_up(model, forward, loader, micro, machine, step)
    model.train()
    result, saved, mark, norm, scale = {}, time.perf_counter(), dataclasses.replace(now), 0.0, 0.0
    with Stop() as stop:
        while True:
            # In this order a kill at any moment loses nothing: the log's line, the checkpoint that
            # knows it was written, and only then the evaluation, which can be done again.
            x, asked = spent(), agree(stop.asked)
            due, new = x >= (now.evals + 1) / cfg.evals, now.step > mark.step
            if new and now.loss_steps and (due or now.step % cfg.log_steps == 0 or now.step == 1):
                lr = cfg.lr * scale
                if is_main: log_step(log, now, mark, x, norm, lr, model, loader, machine)
                now.loss_sum, now.loss_steps = 0.0, 0
                mark = dataclasses.replace(now)
            late = agree(time.perf_counter() - saved > 60 * cfg.save_minutes)
            if run and (asked or due or late):
                save(run, model, optimizer, now)
                saved = time.perf_counter()
            if asked: break
            if due:
                now.evals = int(x * cfg.evals + 1e-9)
                result = evaluation(forward) if evaluation else {}
                if is_main and result: report(log, now, result)
            if x >= 1: break
            start = time.perf_counter()
            batches = take(loader, micro, machine.device)
            optimizer.zero_grad()
            loss = step(forward, batches)
            norm, scale = clip_grad_norm(params, cfg.clip), schedule(x)
            good = agree(bool(torch.isfinite(loss) & torch.isfinite(norm)))
            if good: optimizer.step(scale)
            synchronize(machine.device)
            now.step, now.seen = now.step + 1, loader.seen
            now.seconds = agree(now.seconds + time.perf_counter() - start)
            now.bad = 0 if good else now.bad + 1
            if good: now.loss_sum, now.loss_steps = now.loss_sum + loss.item(), now.loss_steps + 1
            elif is_main: log.write(f"step {now.step:6d}  skipped: loss {loss.item()}, gradient "
                                    f"norm {norm.item()}", step=now.step, skipped=True)
            if now.bad == 3: give_up(run)
    if asked and is_main:
        print(f"{asked}: stopped after step {now.step}" + (
            f", saved; go on with: python train.py --resume --run {run}" if run else ""))
    return now, {} if asked else result

def take(loader, micro, device):
    """The next batch as micro-batches on the device."""
    tokens, targets = next(loader)
    if device.type == "cuda": tokens, targets = tokens.pin_memory(), targets.pin_memory()
    move = lambda x: x.to(device, non_blocking=device.type == "cuda")  # from pinned memory only
    return [(move(a), move(b)) for a, b in zip(tokens.split(micro), targets.split(micro))]

def warm_up(model, forward, loader, micro, machine, step):
    """Compiles on a batch that is then put back: compiling is set-up, not training."""
    (get, put), seen = generator_of(model), loader.seen
    state, buffers = get(), [b.clone() for b in model.buffers()]
    step(forward, take(loader, micro, machine.device)[:1])
    synchronize(machine.device)
    put(state)  # dropout must not notice, nor the biases of routers
    for b, old in zip(model.buffers(), buffers): b.copy_(old)
    loader.seek(seen)

def give_up(run):
    raise SystemExit("three steps in a row without a finite loss; the last good checkpoint: "
                     f"{run and checkpoints(run)[0]}; begin anew: smaller --lr, or other data")

def log_step(log, now, mark, x, norm, lr, model, loader, machine):
    tokens = now.seen * loader.seq_len
    rate = (tokens - mark.seen * loader.seq_len) / (now.seconds - mark.seconds)
    row = dict(step=now.step, minutes=now.seconds / 60, loss=now.loss_sum / now.loss_steps, lr=lr,
               grad_norm=float(norm), tokens=tokens, tokens_per_s=rate,
               mfu=rate * model.flops_per_token() / machine.peak)
    log.write("step {step:6d}  {x:5.1f} %  {minutes:7.2f} min  loss {loss:7.4f}  lr {lr:.2e}  norm "
              "{grad_norm:6.2f}  {tokens_per_s:9,.0f} tokens/s  MFU {percent:4.1f} %"
              .format(x=100 * min(x, 1), percent=100 * row["mfu"], **row), **row)

def report(log, now, result):
    log.write(f"step {now.step:6d}  validation: bits_per_byte {result['bits_per_byte']:.4f}, loss "
              f"{result['loss']:.4f} nats a token at context {result['context']}, "
              f"{now.seconds / 60:.2f} min", step=now.step, minutes=now.seconds / 60, valid=result)

# -----------------------------------------------------------------------------
# Tools that look at a run

def walk(model, optimizer, corpus, cfg, machine):
    """One batch through every stage from text to moved weights; waits for Enter in a terminal. A
    few steps come first, without a word: at the start zeros are all there is to see."""
    def stage(title, lines):
        print(f"\n== {title}")
        for line in lines: print("   " + line)
        if sys.stdin.isatty(): input("   [Enter] ")

    def shown(name, t):
        values = " ".join(f"{v:+.1e}" for v in t.detach().float().flatten()[:5].tolist())
        return f"{name:38s} {str(tuple(t.shape)):17s} {values} ..."

    tok, first, outputs = corpus.tokenizer, re.compile(r"(?!layers\.)|layers\.0\b"), []
    named = {name: p for name, p in model.named_parameters() if first.match(name)}
    loader = Loader(open_tokens(corpus.train), model.cfg.seq_len, 2, cfg.seed)
    for batch in (next(loader) for _ in range(10)):
        optimizer.zero_grad()
        local_step(model, [[t.to(machine.device) for t in batch]])
        optimizer.step(0.3)
    batch = next(loader)
    ids, piece = batch[0][0].tolist(), lambda i: repr(tok.decode([i]))
    tokens, targets = (t.to(machine.device) for t in batch)
    stage("1. text: the first of two sequences", tok.decode(ids)[:240].splitlines())
    stage("2. tokens: ids, and the pieces they stand for",
          [str(ids[:12]), " ".join(map(piece, ids[:12]))])
    stage("3. targets: the same, one place on", [f"{t[0, :8].tolist()}" for t in batch])
    hooks = [m.register_forward_hook(lambda m, _, out, name=name: outputs.append((name, out)))
             for name, m in model.named_modules() if first.match(name)]
    logits = model(tokens)[0]
    for hook in hooks: hook.remove()
    stage("4. forward: what the modules put out, of the layers the first", [
        shown(name, out) for name, out in outputs + [("logits", logits)] if torch.is_tensor(out)])
    best = logits[0, -1].softmax(-1).topk(5)
    stage("5. prediction: the likeliest tokens after the last, and their probabilities", [
        f"{p:.4f}  {piece(i)}" for p, i in zip(best.values.tolist(), best.indices.tolist())])
    optimizer.zero_grad()
    loss = local_step(model, [(tokens, targets)]).item()
    stage("6. loss: mean of -log p(target)", [f"{loss:.4f} nats; a uniform guess has ln "
          f"{model.cfg.vocab_size} = {math.log(model.cfg.vocab_size):.4f}"])
    stage("7. backward: gradients, in the shape of what they move", [
        shown(name, p.grad) for name, p in named.items()])
    norm = clip_grad_norm(model.parameters(), cfg.clip).item()
    old = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step(0.3)
    stage(f"8. update: the gradient, of norm {norm:.3f}, is clipped to {cfg.clip} if larger; then "
          f"{cfg.optimizer} moves the weights, here at 0.3 lr = {0.3 * cfg.lr:.1e}", [
        shown(f"{role(name, p):9s} {name[-28:]}", p - old[name]) for name, p in named.items()])
    after = (model(tokens, targets)[0].sum() / (targets >= 0).sum()).item()
    stage("9. the same batch again", [f"loss {loss:.4f} -> {after:.4f}"])

def profile(model, optimizer, loader, cfg, machine, folder):
    """Ten steps under torch.profiler: the ten costliest operations, and a trace for a browser."""
    forward = torch.compile(model, dynamic=False) if machine.compile else model

    def step():
        optimizer.zero_grad()
        local_step(forward, take(loader, cfg.micro_batch or cfg.batch_size, machine.device))
        optimizer.step()

    for _ in range(3): step()  # the first ones compile, and allocate
    with torch.profiler.profile() as prof:
        for _ in range(10): step()
        synchronize(machine.device)
    key = "self_cuda_time_total" if machine.device.type == "cuda" else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))
    Path(folder).mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(Path(folder) / "trace.json"))
    print(f"trace: {folder}/trace.json (open it at ui.perfetto.dev or chrome://tracing)")

def board(runs):
    """Finished runs by bits_per_byte; they compare where the text is the same."""
    lines = []
    for path in Path(runs).glob("*/result.json"):
        try:
            r = json.loads(path.read_text())
            lines.append((r["text"], r["bits_per_byte"], f"{path.parent.name:26s}" + (
                "{bits_per_byte:14.4f}{context:8d}{minutes:9.2f}{flops:10.2e}{parameters:12,d}  "
                "{dataset} {text:.8}, {hardware}").format(**r)))
        except (ValueError, KeyError, TypeError): print(f"{path}: damaged, left out")
    if not lines: raise UserError(f"board: got no run under {runs}/; wanted one: python train.py")
    print(f"{'run':26s} bits_per_byte context  minutes     FLOPs  parameters")
    for _, _, line in sorted(lines): print(line)

def plot(run):
    """Draws runs/NAME/loss.png from the log if matplotlib is installed."""
    try: from matplotlib.figure import Figure
    except ImportError: return print("no picture: matplotlib is not installed")
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    points = {"training": [(r["minutes"], r["loss"]) for r in rows if "loss" in r],
              "validation": [(r["minutes"], r["valid"]["loss"]) for r in rows if "valid" in r]}
    picture = Figure(figsize=(7, 4))
    axes = picture.subplots()
    for label, of in points.items(): axes.plot(*zip(*of), ".-", label=label)
    axes.set(xlabel="minutes", ylabel="loss (nats per token)")
    axes.legend()
    picture.savefig(Path(run) / "loss.png", dpi=120)
    print(f"picture: {run}/loss.png")

# -----------------------------------------------------------------------------
# The command line
# The settings of a run are a dict of three: `train` and `model`, fields of the two configurations,
# and `data`, hashes of the tokenizer and the texts. They are kept in its train.json.

FREE = ("device", "threads", "log_steps", "save_minutes", "data_dir", "mirror")  # may change later

def settle(given):
    """Flags over the preset's row over the recipe over the dataclasses' defaults -> settings."""
    cuda = pick_device(given.get("device", "auto")).type == "cuda"
    recipe = "cpu" if not cuda else "cuda owt" if given.get("dataset") == "owt" else "cuda"
    name = given.get("preset", TrainConfig.preset)
    if given.get("tokenizer", "bpe") != "bpe" and "vocab_size" in given:
        raise UserError(f"vocab_size: got {given['vocab_size']}, wanted none, as the tokenizer "
                        f"{given['tokenizer']} has its own; leave --vocab_size out")
    merged = {**RECIPES[recipe], **fields_of(name, given)}
    if given.get("steps") and "minutes" not in given: merged["minutes"] = None
    pick = lambda config: dataclasses.asdict(config(**{
        f.name: merged[f.name] for f in dataclasses.fields(config) if f.name in merged}))
    return {"train": pick(TrainConfig), "model": pick(ModelConfig), "data": None}

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

def free(path):
    """The first of path-1, path-2, ... that does not exist."""
    return next(p for p in (Path(f"{path}-{i}") for i in range(1, 10 ** 6)) if not p.exists())

def run_directory(args):
    """Where the run lives: --run, or a free name; with --resume the newest unless named."""
    runs, given = Path("runs"), vars(args)
    if args.run: path = Path(args.run) if os.sep in args.run else runs / args.run
    elif args.resume:
        found = sorted(runs.glob("*/train.json"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError("resume: got no run under runs/, wanted one; leave --resume out")
        path = found[-1].parent
    else:
        stem = "-".join([Path(given.get("dataset", TrainConfig.dataset)).stem,
                         given.get("preset", TrainConfig.preset)])
        path = free(runs / stem)
    if args.resume and not (path / "train.json").exists():
        raise UserError(f"resume: got {path}, wanted a run that train.py began; leave --resume out")
    if not args.resume and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"run: got {path}, which exists; wanted a new name; set --run, or go on "
                        f"with it: --resume --run {path}")
    return path

def get_corpus(run, cfg, settings, resume):
    """(Corpus, Loader). The settings of a run (None: of none) are written before the work, so that
    one that is killed meanwhile can be resumed, and taken back if they are wrong."""
    def write():
        if run:
            with atomic_write(run / "train.json", "w") as f: json.dump(settings, f, indent=1)
    if not resume: write()
    model = settings["model"]
    try:
        corpus = prepare(cfg.dataset, cfg.tokenizer, model["vocab_size"], cfg.data_dir, cfg.mirror)
        loader = Loader(open_tokens(corpus.train), model["seq_len"], cfg.batch_size, cfg.seed)
    except UserError:
        if run and not resume:
            (run / "train.json").unlink()
            run.rmdir()
        raise
    data = {"tokenizer": corpus.tokenizer.hash, **{k: v["text"] for k, v in corpus.info.items()}}
    if settings["data"] not in (None, data):
        raise UserError(f"data: got another text or tokenizer of {cfg.dataset} than {run} was "
                        "begun with, wanted the same; restore it, or begin a new run")
    settings["data"] = data
    write()
    return corpus, loader

def validation(corpus, limit):
    """(tokens, bytes of their text) to evaluate on."""
    tokens, tok = open_tokens(corpus.valid), corpus.tokenizer
    if limit is None or len(tokens) <= limit: return tokens, corpus.info["valid"]["bytes"]
    print(f"evaluations use the first {limit:,} of {len(tokens):,} validation tokens")
    special = set(tok.special_tokens.values())
    size = np.array([0 if i in special else len(tok.vocab[i]) for i in range(tok.vocab_size)])
    return tokens[:limit], int(size[tokens[1:limit]].sum())

def main(args):
    if args.board: return board("runs")
    if args.race: return race(args)
    look = args.walk or args.profile  # these leave no run
    run, given = run_directory(args), vars(args)
    settings = resumed(run, given) if args.resume else settle(given)
    cfg = TrainConfig(**settings["train"])
    print(f"{run}: {cfg}")
    if cfg.dataset == "owt" and pick_device(cfg.device).type != "cuda":
        print("no CUDA device: a small model trains on the same data for "
              + (f"{cfg.minutes} minutes" if cfg.minutes else f"{cfg.steps} steps"))
    corpus, loader = get_corpus(None if look else run, cfg, settings, args.resume)
    tok, valid = corpus.tokenizer, corpus.info["valid"]
    machine = set_up(cfg)  # after `prepare`: a process is forked more safely before threads start
    model_cfg = ModelConfig(**{**settings["model"], "vocab_size": tok.vocab_size})
    model, optimizer = build(model_cfg, cfg, machine)
    model.eos, n = tok.eot, model.n_params()
    valid_tokens, valid_bytes = validation(corpus, cfg.eval_tokens)
    print(f"{machine.line}\n{model_cfg}\n{sum(n.values()):,} parameters {n}, "
          f"{model.flops_per_token():.3g} FLOPs to train on a token; one epoch is "
          f"{len(loader.tokens):,} tokens")
    if look and args.resume: load_checkpoint(run, model, optimizer)
    if args.walk: return walk(model, optimizer, corpus, cfg, machine)
    if args.profile: return profile(model, optimizer, loader, cfg, machine, "runs")
    tok.save(run / "tokenizer.json")
    if not checkpoints(run):
        (run / "log.jsonl").unlink(missing_ok=True)
        ladder = shannon(loader.tokens, valid_tokens, tok.vocab_size, valid_bytes)
        note = ("the budget counts steps (batch, forward, backward, update); preparing data, "
                "compiling, checkpoints and evaluations are outside")
        Log(run, Progress()).write(
            "bits_per_byte of " + ", ".join(f"{k} {v:.3f}" for k, v in ladder.items()) + " models "
            f"of the same tokens, up to 20 M; sha256 of the validation text {valid['text'][:16]}\n"
            + note, step=0, ladder=ladder, text=valid["text"], note=note)
    check = lambda forward: evaluate(forward, in_order(
        valid_tokens, model_cfg.seq_len, cfg.micro_batch or cfg.batch_size), valid_bytes,
        machine.device)
    now, result = fit(model, optimizer, loader, cfg, machine, run, args.resume, check)
    if result: finish(run, model, tok, cfg, now, result, machine, valid["text"])

def finish(run, model, tok, cfg, now, result, machine, text):
    """What a finished run leaves: result.json for --board, a picture, a sample."""
    flops = now.seen * model.cfg.seq_len * model.flops_per_token()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
    if machine.device.type == "cuda": most = torch.cuda.max_memory_allocated(machine.device)
    row = {**result, "minutes": now.seconds / 60, "flops": flops, "dataset": cfg.dataset,
           "parameters": sum(model.n_params().values()), "hardware": device_name(machine.device),
           "text": text, "memory_bytes": most,
           "tokens_per_s": now.seen * model.cfg.seq_len / now.seconds}
    with atomic_write(run / "result.json", "w") as f: json.dump(row, f, indent=1)
    plot(run)
    print("sample:")
    stream = TextStream(tok, lambda text: print(text, end="", flush=True))
    how = Sampling(200, temperature=0.8, top_p=0.95, seed=cfg.seed, stop=tok.eot)
    generate(model, [[tok.eot]], how, on_token=lambda i, token: stream.put(token))
    stream.flush()
    print(f"\nmore: python sample.py --run {run} --prompt TEXT\nvalidation bits_per_byte "
          f"{result['bits_per_byte']:.4f}, loss {result['loss']:.4f} nats a token at context "
          f"{model.cfg.seq_len}, {now.seconds / 60:.2f} minutes, {now.step} steps")

FIELDS = {f.name: f for c in (TrainConfig, ModelConfig) for f in dataclasses.fields(c)}

def race(args):
    """A run for each value of a field and each seed, all on the same budget, and a table. Each is a
    process of its own: none inherits another's memory, or a processor that it has warmed up."""
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    name, _, values = args.race.partition("=")
    if name not in FIELDS or args.run or args.resume or args.seeds < 1:
        raise UserError(f"race: got {args.race!r} and {args.seeds} seeds, wanted FIELD=VALUE,VALUE "
                        "of a field in --help, a seed or more; leave --run and --resume out")
    for value in values.split(","):  # a mistake is found before anything is trained
        read = reader(FIELDS[name])
        try: settle({**given, name: read(value)})
        except ValueError: raise UserError(f"race: got {name}={value}, wanted {read.__name__}")
    print(f"{name:14s}  parameters  bits_per_byte     std  tokens/s  peak MB  runs")
    for value in values.split(","):
        rows, stem = [], f"race-{name}-{Path(value).name}"
        for seed in range(args.seeds):
            path = free(Path("runs") / stem)
            flags = {**given, "run": path, "seed": given.get("seed", 0) + seed, name: value}
            if subprocess.run([sys.executable, __file__, *(f"--{k}={v}" for k, v in flags.items())],
                              stdout=subprocess.DEVNULL).returncode:
                raise UserError(f"race: got no result from {path}, for what is said above")
            rows.append(json.loads((path / "result.json").read_text()))
        n, bits, rate, most = np.array([[r[key] for key in (
            "parameters", "bits_per_byte", "tokens_per_s", "memory_bytes")] for r in rows]).T
        std = f"{bits.std(ddof=1):8.4f}" if len(bits) > 1 else f"{'-':>8s}"
        print(f"{value:14s}{n.mean():12,.0f}{bits.mean():15.4f}{std}{rate.mean():10,.0f}"
              f"{most.mean() / 1e6:9,.0f}  {stem}", flush=True)

def build_parser():
    parser = argparse.ArgumentParser(description="Trains a language model for a budget of minutes.")
    add = parser.add_argument
    add("--run", help="directory, or name under runs/, to keep the run in (default: a free name)")
    add("--resume", action="store_true", help="go on with --run, or the newest run (default: off)")
    add("--walk", action="store_true", help="one batch, stage by stage, and stop (default: off)")
    add("--profile", action="store_true", help="profile ten steps and stop (default: off)")
    add("--board", action="store_true", help="rank the runs under runs/ and stop (default: off)")
    add("--race", help="FIELD=VALUE,VALUE: a run of each, and a table (default: none)")
    add("--seeds", type=int, default=1, help="runs of each value of --race (default: 1)")
    recipes = {name: {**row, **PRESETS[TrainConfig.preset]} for name, row in RECIPES.items()}
    add_fields(parser, TrainConfig, recipes)
    add_fields(parser, ModelConfig, recipes)
    return parser

if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted; go on with: python train.py --resume")
