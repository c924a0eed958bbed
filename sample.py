"""sample.py - text from a model: one token at a time, each drawn from the distribution it predicts.

THE IDEA
    A language model gives the probability of every next token. To write, draw one, append it, and
    ask again. Two things make it practical. The *cache*: keys and values of earlier tokens do not
    change, so they are kept, and a new token costs one row of attention instead of a whole pass.
    The *sampler*: the model's long tail of unlikely tokens is wrong more often than it is
    surprising, so the tail is cut off (top_k, top_p, min_p) or pressed down (temperature).

THE MATHS (z logits, p = softmax(z))
    temperature t   softmax(z / t); t -> 0 is greedy, always the likeliest token
    top_k           keep the k likeliest
    top_p           keep the smallest set of likeliest tokens whose sum is at least p
    min_p           keep the tokens at least min_p times as likely as the likeliest
    what is kept is renormalised, which is what adding -inf to the other logits does

THE COSTS
    Prefill: the prompt's T tokens go through at once, 2 N T FLOPs on weights read once: bound by
    arithmetic. Decoding: each token reads all N weights for 2 N FLOPs: bound by memory, and a batch
    of prompts shares the reading. For a text of T tokens, without a cache O(T^2) tokens go through
    the model, and attention does O(T^3) work; with one O(T) and O(T^2).

CONTENTS  samplers / generate / streaming text / likelihood, Shannon's ladder / devices and runs /
          lesson and command line
NOT HERE  serving many users at once: paged caches, continuous batching, speculative decoding
RUN       python sample.py         # the lesson, offline; last line "... a batch shares the reading"
          python sample.py --run runs/NAME --prompt "def "    # streams text of that run
REFERENCES
    Fan et al. 2018 (1805.04833) top-k; Holtzman et al. 2020 (1904.09751) top-p; Nguyen et al. 2024
    (2407.01082) min-p; Pope et al. 2022 (2211.05102) costs of inference; Shannon 1948 (n-grams);
    Witten, Bell 1991 (smoothing)
EXERCISE  Empty `top_p` and `pad_left`; fill them until `pytest test_all.py -k "sampl or generate"`
          is green again.
"""
import argparse, codecs, json, math, sys, time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bpe import UserError, load_tokenizer
from kernels import device_name
from model import LM, ModelConfig, load_model, need_field

# -----------------------------------------------------------------------------
# Samplers
# Each maps logits (V,) to logits (V,) in which what must not be drawn is -inf. They compose in the
# order of the dict: what temperature does changes what top_p keeps.

def temperature(z, t):
    """Divides the gaps between log-probabilities by t: below 1 favours the likely, above 1 the
    unlikely."""
    return (z - z.max()) / t  # the shift changes no probability, and keeps a tiny t from overflow

def top_k(z, k):
    """Keeps the k likeliest; of equal ones the lower ids, so that exactly k stay."""
    keep = z.sort(descending=True, stable=True).indices[:k]
    return torch.full_like(z, float("-inf")).index_copy(0, keep, z[keep])

def top_p(z, p):
    """Keeps the smallest set of likeliest tokens whose probabilities sum to at least p: a token
    stays if those before it sum to less than p, so the one that crosses p is in."""
    order = z.sort(descending=True, stable=True).indices
    probs = z[order].softmax(-1)
    keep = order[probs.cumsum(-1) - probs < p]
    return torch.full_like(z, float("-inf")).index_copy(0, keep, z[keep])

def min_p(z, p):
    """Keeps tokens at least p times as likely as the likeliest: strict when the model is sure,
    permissive when it is not."""
    return z.masked_fill(z.softmax(-1) < p * z.softmax(-1).max(), float("-inf"))

SAMPLERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}

@dataclass(frozen=True)
class Sampling:
    """How to draw: None leaves a sampler out; temperature 0 is greedy."""
    max_tokens: int = 200          # tokens to draw at most
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0                  # of the first prompt; prompt i uses seed + i
    stop: int | list | None = None  # what ends the text (end-of-text), one or several; not returned

    def __post_init__(self):
        need = partial(need_field, self)
        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more")
        need(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a probability above 0")
        need(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "a probability")
        need(0 <= self.seed < 2 ** 62, "seed", "an integer from 0 to 2^62")

def draw(logits, how, generator):
    """logits (V,) -> token id."""
    z = logits.cpu().double()  # in this order: some devices have no float64
    if how.temperature == 0: return int(z.argmax())  # the first of equal ones
    for name, sampler in SAMPLERS.items():
        value = getattr(how, name)
        if value is not None: z = sampler(z, value)
    return int(torch.multinomial(z.softmax(-1), 1, generator=generator))

# -----------------------------------------------------------------------------
# Generation
# Prompts of different lengths form one batch when padded on the left: all end in the same column,
# where their next tokens are appended. Padding has position -1, which no token can see. Every row
# has its own generator, so a prompt gives the same text alone or among others (up to rounding: in
# another batch a float32 product may be summed in another order, and a near-tie fall differently).

def pad_left(rows):
    """Lists of ids -> tokens (B, T) and pos (B, T), -1 where padded."""
    T = max(map(len, rows))
    tokens = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    pos = torch.tensor([[-1] * (T - len(row)) + list(range(len(row))) for row in rows])
    return tokens, pos

@torch.no_grad()
def generate(model, prompts, how=Sampling(), use_cache=True, on_token=None):
    """Continues each prompt (a list of ids, at least one, at most seq_len) -> lists of new ids.

    on_token(i, id) is called as prompt i grows. A text that outgrows the context goes on from its
    last half, whose positions then count from 0; the rule looks at each row alone. With or without
    a cache the tokens are the same (up to near-ties): without one, every step is a prefill."""
    limit, device = model.cfg.seq_len, next(model.parameters()).device
    assert all(0 < len(p) <= limit for p in prompts), "prompts must hold 1 to seq_len tokens"
    rows, begin = [list(p) for p in prompts], [0] * len(prompts)
    generators = [torch.Generator().manual_seed(how.seed + i) for i in range(len(prompts))]
    live, cache, batch = list(range(len(prompts))), None, []
    stop = how.stop if isinstance(how.stop, list) else [how.stop]
    training = model.training
    model.eval()
    for _ in range(how.max_tokens):
        if cache is None or cache[0].n == limit:  # prefill: at first, and when the columns are full
            batch = list(live)  # rows that have ended leave here
            for r in batch:
                if len(rows[r]) - begin[r] > limit: begin[r] = len(rows[r]) - max(1, limit // 2)
            tokens, pos = pad_left([rows[r][begin[r]:] for r in batch])
            cache = model.new_cache(len(batch), limit) if use_cache else None
        else:  # decode: one column; a row that has ended gets padding
            tokens = torch.tensor([[rows[r][-1]] for r in batch])
            pos = torch.tensor([[len(rows[r]) - 1 - begin[r] if r in live else -1] for r in batch])
        logits, _ = model(tokens.to(device), pos=pos.to(device), cache=cache)
        for i, r in enumerate(batch):
            if r not in live: continue
            token = draw(logits[i, -1], how, generators[r])
            if token in stop:
                live.remove(r)
                continue
            rows[r].append(token)
            if on_token: on_token(r, token)
        if not live: break
    model.train(training)
    return [row[len(p):] for row, p in zip(rows, prompts)]

class TextStream:
    """Turns ids into text as they come, the same as `decode` of all of them: a character may be
    spread over several tokens, so bytes that are the beginning of one are held back."""
    def __init__(self, tokenizer, write):
        self.vocab, self.write = tokenizer.vocab, write
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token):
        self.write(self.decoder.decode(self.vocab[token]))

    def flush(self):
        self.write(self.decoder.decode(b"", final=True))

# -----------------------------------------------------------------------------
# Likelihood: how well a model predicts a text that it has not seen
# The text in windows that do not overlap, each token predicted once. Tokens at the start of a
# window see little context, so longer windows alone make the number better: their length stands
# beside it. Bytes are those of the text; tokens that mark its ends cost bits, not bytes.

@torch.no_grad()
def evaluate(model, batches, n_bytes, device):
    """-> dict of loss (nats per token), bits_per_byte, tokens, context, for batches of (tokens,
    targets (B, T), -1 = not counted) that together hold a text of n_bytes."""
    training, total, counted = model.training, 0.0, 0
    model.eval()
    for x, y in tqdm(batches, desc="evaluating", unit="batch", leave=False, delay=3, disable=None):
        losses, _ = model(x.to(device), y.to(device))
        total += losses.cpu().double().sum().item()
        counted += (y >= 0).sum().item()
    model.train(training)
    return {"loss": total / counted, "bits_per_byte": total / math.log(2) / n_bytes,
            "tokens": counted, "context": x.shape[1]}

def shannon(train, valid, vocab_size, n_bytes, limit=20_000_000):
    """bits_per_byte of models that know no tokens, single tokens, pairs of tokens: what a network
    must beat. Counted on at most `limit` tokens. A pair a, b that was seen c(ab) times after n(a)
    different followers of a has, by Witten and Bell (1991), the probability
    (c(ab) + n(a) p(b)) / (c(a) + n(a)): the more surprises followed a, the more p(b) counts."""
    train = np.asarray(train[:limit], np.int64)
    single = np.bincount(train, minlength=vocab_size) + 1.0
    single /= single.sum()
    pairs, count = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    seen = np.bincount(train[:-1], minlength=vocab_size)
    bits = {"uniform": (len(valid) - 1) * math.log2(vocab_size), "unigram": 0.0, "bigram": 0.0}
    for i in range(0, len(valid) - 1, 1 << 22):  # in pieces, for memory
        part = np.asarray(valid[i:i + (1 << 22) + 1], np.int64)
        a, b = part[:-1], part[1:]
        at = np.searchsorted(pairs, a * vocab_size + b).clip(max=len(pairs) - 1)
        together = np.where(pairs[at] == a * vocab_size + b, count[at], 0)
        mixed = (together + followers[a] * single[b]) / np.maximum(seen[a] + followers[a], 1)
        bits["unigram"] -= np.log2(single[b]).sum()
        bits["bigram"] -= np.log2(np.where(seen[a] > 0, mixed, single[b])).sum()
    return {name: float(n / n_bytes) for name, n in bits.items()}

# -----------------------------------------------------------------------------
# Devices and runs

def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu), or a named one that must be there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else
                            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # nothing can be read from "meta"
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: got {name}, wanted one that works here; set --device auto, cpu, "
                        f"cuda or mps ({str(e).splitlines()[0]})")
    return device

def find_run(name, runs="runs"):
    """Directory of a run by its path, or by its name under runs/."""
    for path in (Path(name), Path(runs) / name):
        if (path / "config.json").is_file(): return path
    known = sorted(p.parent.name for p in Path(runs).glob("*/config.json"))
    raise UserError(f"run: got {name}, wanted a directory with a config.json; known under {runs}/: "
                    f"{', '.join(known) or 'none'}; train one: python train.py")

# What a run leaves: log.jsonl, its lines, and result.json, if it came to its end.

RUNS = Path("runs")

def read_log(run):
    """The rows of a run's log.jsonl, none if there is none, without a line cut short by a kill."""
    path, rows = Path(run) / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try: rows.append(json.loads(line))
        except ValueError: continue
    return rows

def compare(*runs):
    """Two runs' training losses (means since the line before) at equal time, tokens and FLOPs."""
    logs = [[row for row in read_log(run) if "flops" in row] for run in runs]
    if not all(logs):
        empty = next(run for run, log in zip(runs, logs) if not log)
        raise UserError(f"compare: got {empty}, wanted a run with a log.jsonl; set --run")
    for key in ("minutes", "tokens", "flops"):  # of one tokenizer: else a nat is another
        ends = [[row[key] for row in log] for log in logs]
        print("{:>12s}  loss of {}  of {}  difference".format(key, *runs))
        for x in np.linspace(max(e[0] for e in ends), min(e[-1] for e in ends), 6)[1:]:
            a, b = (np.interp(x, e, [row["loss"] for row in log]) for e, log in zip(ends, logs))
            print(f"{x:12.4g}  {a:8.4f}  {b:8.4f}  {a - b:+8.4f}")

def board():
    """Finished runs by bits_per_byte; they compare where the text is the same."""
    row = ("{run:26s}{bits_per_byte:14.4f}{context:8d}{minutes:9.2f}{flops:10.2e}"
           "{parameters:12,d}  {dataset} {text:.8}, {hardware}")
    lines = []
    for path in RUNS.glob("*/result.json"):
        try:
            r = json.loads(path.read_text())
            lines.append((r["text"], r["bits_per_byte"], row.format(run=path.parent.name, **r)))
        except (ValueError, KeyError, TypeError): print(f"{path}: damaged, left out")
    if not lines: raise UserError(f"board: got no run under {RUNS}/; wanted one: python train.py")
    print(f"{'run':26s} bits_per_byte context  minutes     FLOPs  parameters")
    for *_, line in sorted(lines): print(line)

def plot(run):
    """Draws runs/NAME/loss.png from the log if matplotlib is installed."""
    try: from matplotlib.figure import Figure
    except ImportError: return print("no picture: matplotlib is not installed")
    picture = Figure(figsize=(7, 4))
    axes, rows = picture.subplots(), read_log(run)
    for label, key in (("training", "flops"), ("validation", "valid")):
        points = [(r["minutes"], r.get("valid", r)["loss"]) for r in rows if key in r]
        axes.plot(*zip(*points), ".-", label=label)
    axes.set(xlabel="minutes", ylabel="loss (nats per token)")
    axes.legend()
    picture.savefig(Path(run) / "loss.png", dpi=120)
    print(f"picture: {run}/loss.png")

def encode_prompt(tokenizer, text, limit):
    """Ids of a prompt, begun by end-of-text as every training document is; None gives just that."""
    if text is not None and not text:
        raise UserError("prompt: got an empty text, wanted a character or more; leave --prompt out "
                        "to start a new document")
    if any("\ud800" <= char <= "\udfff" for char in text or ""):  # how Python keeps a stray byte
        raise UserError("prompt: got bytes that are not UTF-8, wanted UTF-8; check the terminal's "
                        "encoding")
    ids = [tokenizer.eot] * (tokenizer.eot is not None) + (tokenizer.encode(text) if text else [])
    if not ids:
        raise UserError("prompt: got none, wanted a text, as this tokenizer lacks end-of-text; set "
                        "--prompt")
    if len(ids) > limit:
        raise UserError(f"prompt: got {len(ids):,} tokens with end-of-text, wanted at most the "
                        f"context, {limit:,}; shorten it")
    return ids

# -----------------------------------------------------------------------------
# The lesson and the command line

def lesson():
    print(f"cpu ({device_name(torch.device('cpu'))}), {torch.get_num_threads()} threads, float32")
    z = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]).log()
    print("samplers, on six tokens:")
    for label, out in (("p", z), ("temperature 0.5", temperature(z, 0.5)), ("top_k 3", top_k(z, 3)),
                       ("temperature 2", temperature(z, 2.0)), ("top_p 0.7", top_p(z, 0.7)),
                       ("min_p 0.25", min_p(z, 0.25))):
        print(f"  {label:16s}" + "".join(f"{p:7.3f}" for p in out.softmax(-1).tolist()))
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=512, seq_len=512, n_layers=4, d_model=256)).eval()
    how = Sampling(max_tokens=128)
    print("\na random model of 4 layers, d_model 256; 128 tokens drawn after a prompt of 64:")
    for B in (1, 8):
        prompts = torch.randint(0, 512, (B, 64)).tolist()
        texts, rates = [], []
        for use_cache in (False, True):
            start = time.perf_counter()
            texts.append(generate(model, prompts, how, use_cache))
            rates.append(128 * B / (time.perf_counter() - start))
        print(f"  batch {B}: {rates[0]:7.0f} tokens/s without cache, {rates[1]:7.0f} with it; "
              f"the same tokens: {texts[0] == texts[1]}")
    w = sum(p.numel() for p in model.parameters())
    flops = [sum(model.flops(T, 64).values()) for T in (64, 1)]
    print(f"prefill does {flops[0] / w / 4:.1f} FLOPs per byte of weights read, decoding "
          f"{flops[1] / w / 4:.1f}: a batch shares the reading")

def main(args):
    if args.run is None:
        if args.prompt is not None:
            raise UserError("run: got none, wanted a run to prompt; set --run runs/NAME")
        return lesson()
    how = Sampling(max_tokens=args.max_tokens, temperature=0.0 if args.greedy else args.temperature,
                   top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, seed=args.seed)
    run, device = find_run(args.run), pick_device(args.device)
    model, tokenizer = load_model(run, device), load_tokenizer(run)
    if model.cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{run}: got a tokenizer of {tokenizer.vocab_size} ids and a model of "
                        f"{model.cfg.vocab_size}, wanted the same; use an unchanged run directory")
    how = replace(how, stop=tokenizer.eot if model.eos is None else model.eos)
    prompts = [encode_prompt(tokenizer, text, model.cfg.seq_len) for text in args.prompt or [None]]
    print(f"{run}: {model.cfg}\n{device} ({device_name(device)}), float32, "
          f"{torch.get_num_threads()} threads, {how}", file=sys.stderr)
    out = lambda text: print(text, end="", flush=True)
    start = time.perf_counter()
    if len(prompts) == 1:  # stream it
        stream = TextStream(tokenizer, out)
        out(args.prompt[0] if args.prompt else "")
        texts = generate(model, prompts, how, not args.no_cache, lambda i, token: stream.put(token))
        stream.flush()
        print()
    else:
        texts = generate(model, prompts, how, not args.no_cache)
        for text, ids in zip(args.prompt, texts):   # what is sampled need not be UTF-8
            print(f"---\n{text}{tokenizer.decode_bytes(ids).decode(errors='replace')}")
    made, took = sum(map(len, texts)), time.perf_counter() - start
    print(f"{made} tokens, {made / took:.0f} tokens/s", file=sys.stderr)

def build_parser():
    parser = argparse.ArgumentParser(
        description="Without arguments a lesson on decoding; with --run text from a trained model.")
    add = parser.add_argument
    add("--run", help="run directory, or its name under runs/ (default: none, the lesson)")
    add("--prompt", action="append", help="text to continue; may be given several times "
        "(default: none, a new document)")
    add("--max_tokens", type=int, default=200, help="tokens to draw at most (default: 200)")
    add("--temperature", type=float, default=0.8, help="divides logits; 0 is greedy (default: 0.8)")
    add("--top_k", type=int, help="keep the k likeliest tokens (default: all)")
    add("--top_p", type=float, help="keep the likeliest tokens of this total probability "
        "(default: all)")
    add("--min_p", type=float, help="keep tokens at least this many times as likely as the "
        "likeliest (default: all)")
    add("--greedy", action="store_true", help="always the likeliest token (default: off)")
    add("--seed", type=int, default=0, help="prompt i draws with seed + i (default: 0)")
    add("--no_cache", action="store_true", help="recompute all for each token (default: off)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    return parser

if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: print()
