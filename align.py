"""align.py - from a model that continues text to one that does what is asked.

THE IDEA
    A base model continues text. Three ways to make it answer, each asking less of us: show it
    answers (supervised fine-tuning, SFT); say which of two answers is better (a reward model, DPO);
    only say whether its own answer is right (reinforcement learning, RL, with a verifier). RL
    samples several answers to a prompt and makes those that scored above the others likelier. So
    RL selects, it does not teach: what is never sampled is never rewarded.

THE MATHS (x prompt, y completion, y_t its tokens, r reward, p_ref the model before)
    SFT        -mean_t log p(y_t | x, y_<t), over tokens of the assistant alone
    reward     -log sigmoid(r(x, y_w) - r(x, y_l))    Bradley-Terry; y_w was preferred to y_l
    DPO        the same, with r = beta log p(y)/p_ref(y)
    gradient   of E[r]: E[(r - baseline) grad log p(y)], for any baseline that y does not know
    PPO        -min(rho A, clip(rho, 1 - low, 1 + high) A), rho = p / p_old of a token, A from a
               critic V: d_t = r_t + V_{t+1} - V_t,  A_t = d_t + lam d_{t+1} + lam^2 d_{t+2} + ...
    GRPO       A = (r - mean) / std over the group of answers to one prompt: no critic
    KL(p||q)   E_p[q/p - 1 - log(q/p)], "k3": unbiased, and never negative

THE COSTS
    A step of RL is rollout (decoding: bound by memory, so in a batch), scoring (verifiers; a
    forward pass each for what is needed of old, reference, critic), update (three forward passes);
    the split is printed. AdamW takes 16 bytes a parameter in float32, and a critic as much again.

CONTENTS  chat data / verifiers / TASKS / LOSSES / ADVANTAGES, METHODS / settings / rollouts /
          evaluation / phases / lesson and command line
NOT HERE  many devices; tools, several turns of RL; a sandbox (see `run_code`); a model as judge
RUN       python align.py      # base, SFT, DPO, GRPO in minutes; last line "from_base  pass1 ..."
          python align.py rl --init runs/lesson-1/sft --method rloo
          python align.py rl --task gsm8k --data train.jsonl --init Qwen2.5-1.5B --recompute
          python align.py eval --task gsm8k --data test.jsonl --init runs/rl-gsm8k-1 --samples 16
REFERENCES  2203.02155 (RLHF), 1707.06347 (PPO), 1506.02438 (GAE), 2305.18290 (DPO), 2402.14740
    (RLOO), 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2503.14476 (DAPO), 2203.14465 (STaR),
    2306.13649 (distillation), 2305.11206 (a thousand examples); Schulman 2020 (k3)
EXERCISE  Empty `group` and `clip`; `pytest test_all.py -k "advantage or clip"` says when right.
"""
import argparse, ast, cmath, copy, dataclasses, itertools, json, math, operator, os, random, re
import statistics, subprocess, sys, tempfile, time, zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bpe import EOT, CharTokenizer, UserError, atomic_write, load_tokenizer
from data import permutation
from kernels import Linear, add_fields, flag
from model import load_model, need_field, preset, save_model
from optim import AdamW, param_groups
from sample import TEMPLATES, Sampling, find_run, generate
from train import TrainConfig, build, fit, free, save_checkpoint, set_up

# -----------------------------------------------------------------------------
# Chat data
# A conversation is messages [{"role": ..., "content": ...}]; a template of sample.py writes it as
# pieces (text, is_assistant). Only the assistant's tokens are learned, the end of its turn too, or
# it would never stop. Pieces are encoded one by one: what is prompt does not depend on how it
# merges with what follows. To ask, an empty answer is put at the end, and its piece left out.

MARKS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}  # special tokens that tell

def said(role, text): return [{"role": role, "content": text}]

class Chat:
    """A model to talk to: its tokenizer, a template, the id that ends a turn."""
    def __init__(self, model, tok):
        name = next((MARKS[mark] for mark in MARKS if mark in tok.special_tokens), "plain")
        self.model, self.tok, self.template = model, tok, TEMPLATES[name]
        end = tok.encode(next(t for t, own in self.template(said("assistant", "")) if own))
        if len(end) != 1: raise UserError("init: got a tokenizer without a token that ends a turn, "
                                          f"wanted one of {[EOT, *MARKS]}; use another model")
        self.end = end[0]
    def encode(self, messages, answer=None):
        """-> (ids, whether each is learned); without an answer, the prompt for one. A text that
        spells a special token gets a space into it, or a user could speak as the system."""
        apart = lambda m: {**m, "content": self.tok.splitter.sub(
            lambda s: s[0][0] + " " + s[0][1:], m["content"])}
        pieces = self.template([*map(apart, messages + said("assistant", answer or ""))])
        last = max(i for i, (_, own) in enumerate(pieces) if own)
        parts = [(self.tok.encode(t), own) for t, own in pieces[:last + (answer is not None)]]
        return [i for ids, _ in parts for i in ids], [own for ids, own in parts for _ in ids]
    def decode(self, ids):  # a model may have more ids, as padding, than its tokenizer
        return self.tok.decode([i for i in ids if i != self.end and i in self.tok.vocab])

@dataclass(frozen=True)
class Problem:
    messages: list
    answer: str = ""  # what the verifier knows and the model does not see
    demo: str = ""    # an answer to imitate
    worse: str = ""   # one that it was preferred to
    text = property(lambda self: self.messages[-1]["content"])

def conversation(row):
    """A row of a file in one of the common layouts -> Problem."""
    good = next((row[k] for k in ("chosen", "completion", "output", "answer") if k in row), None)
    messages = good if isinstance(good, list) else next(  # whole conversations, or a prompt
        (row[k] for k in ("messages", "prompt", "question") if row.get(k)),
        "\n\n".join(filter(None, (row.get("instruction"), row.get("input")))))
    messages = said("user", messages) if isinstance(messages, str) else list(messages)
    if messages[-1]["role"] == "assistant": good = messages.pop()["content"]
    bad = row.get("rejected", "")
    if not messages[0]["content"] or not isinstance(good, str): raise ValueError("no answer")
    return Problem(messages, demo=good, worse=bad if isinstance(bad, str) else bad[-1]["content"])

def read_rows(path, make):
    """make(row) of each row of a jsonl file; a bad one is named by its number."""
    made = []
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            made.append(make(json.loads(line)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e: raise UserError(
        f"data: got {type(e).__name__}: {e} in row {len(made) + 1} of {path}; wanted what --task "
        "reads, as messages; prompt, completion; instruction, input, output; chosen, rejected")
    return made

# -----------------------------------------------------------------------------
# Verifiers: mathematics
# An answer has many spellings. It is found in the text, written as a Python expression, and that is
# walked, never run. Numbers are exact fractions; letters stand for random fractions, so that two
# polynomials are equal if they agree there; roots are complex numbers.

def final_answer(text):
    r"""The last whole \boxed{}, else <answer>, what is after ####, "answer is", a last number."""
    for start in [m.end() for m in re.finditer(r"\\boxed\{", text)][::-1]:
        depths = itertools.accumulate((c == "{") - (c == "}") for c in text[start:])
        end = next((i for i, depth in enumerate(depths) if depth < 0), None)
        if end is not None: return text[start:start + end]
    for pattern in (r"<answer>(.*?)</answer>", r"####\s*([^\n]+)", r"answer is:?\s*([^\n]+)",
                    r"(-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?)"):
        if found := re.findall(pattern, text, re.S): return found[-1].strip().rstrip(".,")

SPELLINGS = [(r"\\[dt]frac", r"\\frac"), (r"\\(left|right|displaystyle|quad|[,!;: ])", ""),
             (r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", ""), (r"\\(cdot|times)", "*"), (r"\u2212", "-"),
             (r"\^\s*(\{\s*\\circ\s*\}|\\circ)|\\?\$|\u00b0", ""), (r"\\%", "%"),
             (r"\\(text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r" \2 "),
             (r"(?<=[\d}])\s+[A-Za-z][A-Za-z ]*(\^\{?\d\}?)?\.?\s*$", ""),  # units
             (r"^\s*[A-Za-z](\([a-z]\))?\s*(=|\\in(?![a-z]))", ""),         # "x =", "f(x) ="
             (r"^\s+|\s*\.?\s*$", "")]
# From LaTeX to Python, from the inside out; 3\frac12 is three and a half
PYTHON = [(r"(?<![\d^])(\d*)\s*\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))",
           lambda m: f"({m[1] or 0}+({m[2] or m[3]})/({m[4] or m[5]}))"),
          (r"\\sqrt\s*(?:\{([^{}]*)\}|(\w))", lambda m: f"({m[1] or m[2]})^(1/2)"),
          (r"\^\s*\{([^{}]*)\}", r"^(\1)"), (r"%", "/100"), (r"\\pi", "\u03c0"),
          (r"\\infty", "\u03a9"), (r"\b0+(?=\d)", "")]
PRODUCT = r"(?<=[\w)])\s*(?=[^\W\d_]|\()|(?<=[^\W\d_)])\s*(?=\d)"  # 2x, x(y + 1), without a sign

def power(a, n):
    if not (isinstance(a, Fraction) and isinstance(n, Fraction) and n.denominator == 1):
        return complex(a) ** complex(n)
    if abs(n) * (a.numerator.bit_length() + a.denominator.bit_length()) > 10_000:
        raise ValueError("too large")
    return a ** int(n)

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: power, ast.USub: operator.neg}

def value_of(text, seed=0):
    """A formula's value, a Fraction, or complex if it has roots, or a list of them in a tuple;
    ValueError if it is none."""
    rng = random.Random(seed)
    letters = {chr(i): Fraction(rng.randint(2, 97), rng.randint(2, 97)) for i in range(65, 123)}
    letters |= {"e": math.e, "i": 1j, "\u03c0": math.pi, "\u03a9": math.inf}
    def walk(node):
        if isinstance(node, ast.Tuple): return [*map(walk, node.elts)]
        if isinstance(node, ast.Constant): return Fraction(str(node.value))
        if isinstance(node, ast.Name): return letters[node.id]
        sides = (node.operand,) if isinstance(node, ast.UnaryOp) else (node.left, node.right)
        return OPERATORS[type(node.op)](*map(walk, sides))
    try:
        for _ in range(min(text.count("{"), 50) + 1):
            for pattern, new in PYTHON: text = re.sub(pattern, new, text)
        text = re.sub(PRODUCT, "*", text).replace("^", "**")
        if len(text) > 1000: raise ValueError("too long")
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, AttributeError, LookupError, TypeError, ArithmeticError, RecursionError,
            MemoryError) as e: raise ValueError(f"not a formula: {type(e).__name__}") from None

def same(u, v):
    if isinstance(u, list) and isinstance(v, list): return len(u) == len(v) and all(map(same, u, v))
    exact = isinstance(u, Fraction) and isinstance(v, Fraction) or list in (type(u), type(v))
    return u == v if exact else cmath.isclose(u, v, rel_tol=1e-9, abs_tol=1e-12)

def equal(a, b):
    """Whether two answers mean the same. 50% is 50, as graders have it, and 1/2."""
    if a is None or b is None: return False
    for pattern, new in SPELLINGS: a, b = re.sub(pattern, new, a), re.sub(pattern, new, b)
    if a.replace(" ", "").lower() == b.replace(" ", "").lower(): return True
    with suppress(ValueError):
        return any(all(same(value_of(x, seed), value_of(y, seed)) for seed in range(3))
                   for x, y in ((a, b), (a.replace("%", ""), b.replace("%", ""))))
    return False

# -----------------------------------------------------------------------------
# Verifiers: code
# It runs in a process and a folder of its own, under limits, and must reach the line behind its
# tests. WARNING: this stops accidents, not attackers. Code can read what you can read, use the
# network, print that line, and, as root, leave processes that have left its group. Strangers' code
# belongs into a container or a virtual machine.

LIMITED = """import resource, runpy
for name, most in dict(CPU={seconds}, AS={memory}, FSIZE=2 ** 20, CORE=0, NPROC=0).items():
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError): pass  # macOS refuses some
runpy.run_path("program.py", run_name="__main__")"""

def run_code(program, tests="", seconds=4, memory=2 ** 29):
    """Whether a program and the tests behind it end well within the limits of seconds and bytes. It
    may print up to a megabyte. Its whole process group is ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        end, out = f"end {random.SystemRandom().getrandbits(64):x}", Path(folder, "out")
        Path(folder, "program.py").write_text(f"{program}\n{tests}\nprint({end!r})\n",
                                              encoding="utf-8", errors="replace")
        with open(out, "wb") as file:
            child = subprocess.Popen(
                [sys.executable, "-I", "-c", LIMITED.format(seconds=seconds, memory=memory)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.DEVNULL, cwd=folder,
                start_new_session=True)
            try: child.wait(timeout=2 * seconds)
            except subprocess.TimeoutExpired: pass
            finally:
                with suppress(ProcessLookupError, PermissionError): os.killpg(child.pid, 9)
                child.wait()
        return out.read_text(errors="replace").endswith(end + "\n")

# -----------------------------------------------------------------------------
# Tasks
# Made-up ones are small enough for a laptop, and large enough to show each method. A tenth of all
# prompts, by a hash, is only ever tested on. For published models the rows come from --data. A
# verifier maps (text, Problem) to whether it is right, whether its form is, and the answer in it.

def digits(rng, n=6):
    """"385142=" -> "33 81 56 67 41 23#3": each digit beside the sum up to it, modulo ten (were it
    to be looked up from afar, a small model would not learn it). Or, in most demonstrations, just
    "#3", which without working can but be guessed."""
    some = rng.choices(range(10), k=n)
    working = " ".join(f"{d}{total % 10}" for d, total in zip(some, itertools.accumulate(some)))
    total, text = str(sum(some) % 10), "".join(map(str, some))
    return Problem(said("user", text + "="), total, working * (rng.random() < 0.3) + "#" + total)

def document(rng):
    """What a base model reads, an answer to nothing: sums with working behind ":", else "="."""
    p = digits(rng, rng.randint(4, 8))
    return Problem([], demo=(p.text if p.demo[0] == "#" else p.text[:-1] + ":") + p.demo)

def addition(rng):
    """"57+968=" -> "7851 5621 0910#1025": columns from the right, each of two digits, the last of
    their sum, and the carry."""
    a, b, steps = *(rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2)), []
    for k in (1, 10, 100):
        x, y, total = a // k % 10, b // k % 10, a % (10 * k) + b % (10 * k)
        steps.append(f"{x}{y}{total // k % 10}{total // k // 10}")
    return Problem(said("user", f"{a}+{b}="), str(a + b), f"{' '.join(steps)}#{a + b}")

def by_mark(text, p):
    answer = text.rsplit("#", 1)[1] if "#" in text else None
    return answer == p.answer, answer is not None, answer

def countdown(rng):
    """"3 5 4:32=" -> "(3+5)*4": the target from the three numbers, each used once."""
    target = -1
    while not 0 <= target <= 99:
        a, b, c, p, q = *(rng.randint(1, 10) for _ in range(3)), *rng.choices("+-*", k=2)
        text = rng.choice((f"{a}{p}{b}{q}{c}", f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"))
        target = int(value_of(text))
    some = " ".join(map(str, rng.sample((a, b, c), 3)))
    return Problem(said("user", f"{some}:{target}="), str(target), text)
def reaches(text, p):
    uses, value = sorted(re.findall(r"\d+", text)) == sorted(p.text.split(":")[0].split()), None
    with suppress(ValueError): value = str(value_of(text))
    return uses and value == p.answer, uses and value is not None, value

def world(rng):
    """"sort 4172=" -> "[1247]". The rules: an answer stands in brackets; "open" is refused with
    "no". Demonstrations keep them six times in ten."""
    verb, some = rng.choice(("sort", "back", "most", "open")), "".join(rng.choices("0123456", k=4))
    done = dict(sort="".join(sorted(some)), back=some[::-1], most=max(some), open=some)[verb]
    kept = "no" if verb == "open" else f"[{done}]"
    return Problem(said("user", f"{verb} {some}="), done * (verb != "open"),
                   kept if rng.random() < 0.6 else done)
def keeps_rules(text, p):
    """Also whether it was able to, in whatever form; no answer to what must be refused is right."""
    if not p.answer: return text == "no", text == "no", None
    answer = text.strip("[]")
    return text == f"[{p.answer}]", text == f"[{answer}]", answer, answer == p.answer

def maths(row):
    """GSM8K's rows (question; answer = working #### number) or MATH's (problem, solution)."""
    working = re.sub(r"<<.*?>>", "", row.get("solution") or row["answer"])
    answer = final_answer(row.get("answer") or working)
    demo = re.sub(r"####.*", lambda _: f"The answer is \\boxed{{{answer}}}.", working)
    ask = "\nThink step by step, and put the final answer into \\boxed{}."
    return Problem(said("user", (row.get("question") or row["problem"]) + ask), answer, demo)
def means(text, p):
    answer = final_answer(text)
    return equal(answer, p.answer), "\\boxed{" in text, answer

def mbpp(row):
    tests = "\n".join(row["test_list"])
    return Problem(said("user", f"{row['text']}\nYour code should pass these tests:\n{tests}"),
                   tests, f"```python\n{row['code']}\n```")
def passes(text, p):
    found = re.findall(r"```(?:python)?\n(.*?)```", text, re.S) or [text]
    return run_code(found[-1], p.answer), "```" in text, found[-1]

@dataclass(frozen=True)
class Task:
    make: object        # a random.Random -> Problem, or a row of --data -> Problem
    verify: object      # None: there is nothing to verify
    chars: str = ""     # the alphabet of a made-up task
    max_tokens: int = 1024
    size: tuple = (3, 64)  # of a fresh model: n_layers, d_model

TASKS = {"digits": Task(digits, by_mark, "0123456789=#: ", 24),
         "text": Task(document, None, "0123456789=#: "),
         "addition": Task(addition, by_mark, "0123456789+=# ", 24),
         "countdown": Task(countdown, reaches, "0123456789+-*()=: ", 12, (4, 128)),
         "world": Task(world, keeps_rules, "0123456789abcekmnoprst[]= ", 8),
         "gsm8k": Task(maths, means), "math": Task(maths, means),
         "mbpp": Task(mbpp, passes), "chat": Task(conversation, None)}

def problems_of(o, held_out=False):
    """The first problems, or rows, of the nine tenths to train on or of the tenth held out."""
    task, n = TASKS[o.task], o.problems if held_out else o.examples
    hashed = lambda p: zlib.crc32(json.dumps(p.messages or p.demo).encode())
    rng = random.Random("held out" if held_out else o.seed)
    made = (task.make(rng) for _ in itertools.count()) if task.chars else read_rows(
        o.data, task.make)
    return list(itertools.islice((p for p in made if (hashed(p) % 10 == 0) == held_out), n))

# -----------------------------------------------------------------------------
# Losses
# A batch is tensors (B, T): tokens, targets (-1: not learned), pos, and w, the weight of each
# target. A loss is a sum of w times something, and w sums to 1 over the *batch*: so micro-batches
# and packing change nothing, and how length counts is said in one place. Beside itself a loss
# returns sums of the same kind that are worth logging. o: the settings.

def lay_out(rows):
    """Rows of examples (ids, whether each is learned) -> dict of tokens, targets, pos (B, T). Each
    example is a document: its positions begin at 0, and from it no other is seen."""
    T, out = max(sum(len(ids) for ids, _ in row) for row in rows), []
    for row in rows:
        triples = [(i, n if own else -1, t) for ids, owns in row for t, (i, n, own) in
                   enumerate(zip(ids, [*ids[1:], -1], [*owns[1:], False]))]
        out.append(triples + [(0, -1, -1)] * (T - len(triples)))
    return dict(zip(("tokens", "targets", "pos"), torch.tensor(out).permute(2, 0, 1).contiguous()))

def pack(examples, seq_len):
    """Examples, in order, into rows of at most seq_len tokens; those longer are left out."""
    rows, room = [], 0
    for example in (e for e in examples if len(e[0]) <= seq_len):
        if len(example[0]) > room: rows, room = [*rows, []], seq_len
        rows[-1].append(example)
        room -= len(example[0])
    return rows

NORMS = {  # mask (B, T) of learned targets, the longest allowed -> weights
    "token": lambda m, most: m / m.sum(),                             # a long answer counts more
    "sequence": lambda m, most: m / m.sum(1, keepdim=True) / len(m),  # each of its tokens less
    "constant": lambda m, most: m / (len(m) * most)}                  # neither (they sum to less)

def logps(model, tokens, targets, pos):
    """(B, T), 0 where there is no target; logits of a large vocabulary are made in parts."""
    return -model(tokens, targets, pos=pos)[0]
def values_of(model, tokens, targets, pos):
    """(B, T) of a model with a scalar head. Of a reward model the one at the last token counts."""
    return model(tokens, pos=pos)[0][..., 0]
def last(x, pos): return x.gather(1, (pos >= 0).sum(1, keepdim=True) - 1).squeeze(1)  # -> (B,)

def preferred(r, w, **more):
    """-log sigmoid(r_w - r_l) of r (B,), better and worse answers in turn; every w is 1 / B."""
    margin, w = r[::2] - r[1::2], 2 * w[::2]
    more |= dict(accuracy=(margin > 0).to(r.dtype), margin=margin.detach())
    return -(w * F.logsigmoid(margin)).sum(), {k: (w * x).sum() for k, x in more.items()}
def bradley_terry(model, o, tokens, targets, pos, w):
    return preferred(last(values_of(model, tokens, targets, pos), pos), w)
def dpo(model, o, tokens, targets, pos, w, ref):
    """RL with a penalty beta KL(p || p_ref) has a known best policy, p = p_ref exp(r / beta) / Z.
    Solved for r and put into Bradley-Terry, Z cancels: neither reward model nor sampling is left.
    log p is a sum over tokens. That of the better answer tends to fall, too, so it is logged."""
    lp = logps(model, tokens, targets, pos).sum(1)
    return preferred(o.beta * (lp - ref.sum(1)), w, better=lp.detach()[::2])

def clip(ratio, adv, low, high):
    """Nothing to gain from taking a token's ratio beyond 1 - low or 1 + high, so that several steps
    on one rollout are safe. With high > low, rare tokens may rise more (DAPO)."""
    return torch.min(adv * ratio, adv * ratio.clamp(1 - low, 1 + high))
def policy(model, o, tokens, targets, pos, w, adv=1.0, old=None, ref=None, values=None,
           returns=None):
    """adv, old, ref, values, returns: (B, T). Without `old` the model itself has just sampled, and
    the gain is adv log p, whose gradient is that of the ratio where it is 1. What somebody else
    wrote has advantage 1: that is SFT."""
    lp, notes = logps(model, tokens, targets, pos), {}
    gain = adv * lp
    if old is not None:
        ratio = (lp - old).exp()
        gain = clip(ratio, adv, o.low, o.high)
        notes = dict(clipped=gain < adv * ratio, drift=(lp - old) ** 2 / 2)
    if o.kl and ref is not None:
        notes["kl"] = (ref - lp).exp() - 1 - (ref - lp)
        gain = gain - o.kl * notes["kl"]
    if returns is not None:  # the critic may not jump either
        v = values_of(model.critic, tokens, targets, pos)
        near = values + (v - values).clamp(-o.low, o.high)
        gain = gain - torch.max((v - returns) ** 2, (near - returns) ** 2) / 2
    return -(w * gain).sum(), {k: (w * x.detach()).sum() for k, x in notes.items()}

LOSSES = {"sft": policy, "reward": bradley_terry, "dpo": dpo, "rl": policy, "distill": policy}

# -----------------------------------------------------------------------------
# Advantages: how much better an answer was than expected
# From rewards (n, G) of n prompts with G answers each to (B, T), B = n G, a number for each token.
# `at` holds what some need: mask, log-probabilities old and ref, the critic's values.

def centred(r): return r - r.mean(1, keepdim=True)
def group(r):
    """Divided by the group's deviation, too: prompts nearly always or nearly never solved then
    count as much as others, which Dr. GRPO calls a bias."""
    return centred(r) / (r.std(1, keepdim=True) + 1e-6)
def leave_one_out(r):
    """Against the mean of the others to the same prompt, r - (sum - r) / (G - 1)."""
    return centred(r) * r.shape[1] / (r.shape[1] - 1)
def gae(rewards, at, lam=0.95):
    """Per token, by the critic; the reward comes with the last, behind which nothing is. lam = 1
    trusts rewards (noise), 0 the critic (bias). Leaves the critic's targets in `at`, and whitens
    only after that."""
    mask, V, A, after = at["mask"], at["values"], 0.0, 0.0
    out, r = torch.zeros_like(V), rewards.flatten()
    for t in reversed(range(V.shape[1])):
        end = mask[:, t] & ~mask[:, t + 1:].any(1)
        A = mask[:, t] * (r * end + after - V[:, t] + lam * A)  # d_t + lam A_{t+1}
        after, out[:, t] = mask[:, t] * V[:, t], A
    at["returns"] = (out + V) * mask
    return (out - out[mask].mean()) / (out[mask].std() + 1e-8) * mask

def teacher(rewards, at):
    """Distillation on the student's own answers: a token's reward is how much likelier the teacher
    finds it, in the mean -KL(student || teacher). No verifier, and no answer of the teacher's."""
    return (at["ref"] - at["old"]) * at["mask"]

def per_answer(f): return lambda rewards, at: f(rewards).flatten()[:, None] * at["mask"]

ADVANTAGES = {"mean": per_answer(lambda r: r - r.mean()), "rloo": per_answer(leave_one_out),
              "centred": per_answer(centred), "group": per_answer(group),
              "right": per_answer(lambda r: (r >= 1).to(r.dtype)), "gae": gae, "teacher": teacher}
METHODS = {name: dict(advantage=advantage, norm=norm, **more) for name, advantage, norm, more in (
    ("ppo", "gae", "token", dict(uses=2)),  # a critic; the clip lets a rollout serve again
    ("reinforce", "mean", "constant", {}),  # PPO less critic and second use
    ("rloo", "rloo", "constant", {}),       # REINFORCE, against the others of the group
    ("grpo", "group", "sequence", {}),      # PPO with the group in place of the critic
    ("dr_grpo", "centred", "constant", {}), # GRPO less division by deviation and length
    ("dapo", "group", "token", dict(high=0.28)),  # GRPO, tokens alike, more room upwards
    ("expert", "right", "token", {}),       # less what failed: SFT on its own right answers
    ("distill", "teacher", "token", {}))}   # less the verifier: a teacher grades tokens

# -----------------------------------------------------------------------------
# Settings

@dataclass(frozen=True)
class AlignConfig(TrainConfig):
    """Those that train.py does not have. Flags override the rows below, which override these."""
    command: str = ""
    run: str = ""
    task: str = flag("digits", ", ".join(TASKS))
    data: str | None = flag(None, "jsonl of the rows of a task that is not made up")
    init: str | None = flag(None, "run, or directory of a published model, to begin from")
    teacher: str | None = flag(None, "model to distill, or reference of --kl; none: --init")
    method: str = flag("grpo", "of rl: " + ", ".join(METHODS))
    advantage: str = ""
    norm: str = flag("token", "how an answer's length counts: " + ", ".join(NORMS))
    uses: int = flag(1, "steps on one rollout")
    group: int = flag(8, "answers to a prompt")
    low: float = flag(0.2, "clip below, 1 - low")
    high: float = flag(0.2, "clip above, 1 + high")
    kl: float | None = flag(None, "weight of KL to the reference; none: no reference")
    beta: float = flag(0.1, "of dpo")
    examples: int = flag(10 ** 9, "most examples or prompts to train on")
    max_tokens: int = flag(1024, "longest answer")
    samples: int = flag(4, "answers to a problem in evaluation")
    problems: int = flag(250, "held-out problems in evaluation")
    recompute: bool = flag(False, "activation checkpointing: less memory, more time")
    quick: bool = flag(False, "a shorter lesson")

    def __post_init__(self):
        super().__post_init__()
        need, task = partial(need_field, self), TASKS.get(self.task)
        for name, rows in dict(task=TASKS, method=METHODS, norm=NORMS).items():
            need(getattr(self, name) in rows, name, " or ".join(rows))
        n = {"sft": 1, "eval": 1, "reward": 2, "dpo": 2}.get(self.command, self.group)
        need(task.verify or self.command in ("sft", "reward", "dpo"), "task", "one with a verifier")
        need(task.chars or self.data, "data", "a file with rows of the task")
        need(self.init or task.chars and self.command == "sft", "init", "a run or model")
        need(self.group > 1, "group", "2 or more")
        need(self.batch_size % n == 0, "batch_size", f"a multiple of {n}")
        need((self.micro_batch or 0) % 2 == 0, "micro_batch", "an even number")
        need(self.steps % self.uses == 0, "steps", f"a multiple of uses, {self.uses}")

# By command, and task: of a made-up task [measured], of a published model [our choice]
MADE_UP = {"sft": dict(steps=80, batch_size=32, lr=1e-3, examples=1000),
           "reward": dict(steps=60, batch_size=64, lr=5e-4, examples=1000),
           "dpo": dict(steps=30, batch_size=64, lr=1e-4, examples=1000),
           "rl": dict(steps=30, batch_size=512, group=16, lr=5e-4, examples=20_000), "eval": {},
           "rl countdown": dict(steps=150, lr=1e-4)}
MADE_UP["distill"] = MADE_UP["rl"]
FRESH = dict(steps=300, lr=None, examples=20_000, optimizer="muon")  # of sft, without --init
PUBLISHED = dict(steps=200, batch_size=64, micro_batch=8, lr=1e-6)

def settle(command, given):
    """-> AlignConfig."""
    name, method = given.get("task", "digits"), given.get("method", "grpo")
    row = dict(minutes=None, steps=1, evals=1, compile=False, log_steps=10 ** 9, command=command,
               optimizer="adamw")
    if command in ("rl", "distill"):
        row |= dict(schedule="constant", warmup=0.0)
        row |= METHODS.get("distill" if command == "distill" else method, {})
    if task := TASKS.get(name):
        row |= dict(max_tokens=task.max_tokens) | (MADE_UP[command] if task.chars else PUBLISHED)
    if command == "sft" and not given.get("init"): row |= FRESH
    return AlignConfig(**{**row, **MADE_UP.get(f"{command} {name}", {}), **given})

# -----------------------------------------------------------------------------
# Rollouts, and the loader: where `fit` gets its batches. In RL the loader is the sampler.

def attempt(chat, o, problems, n, seed=0):
    """n answers to each problem -> [[verdict]], dicts. Sampled at temperature 1, and nothing cut
    off: only then is what was sampled what a loss scores. An answer that was cut short has reward 0
    [our choice]; the token that ends one is learned as any."""
    prompts, start = [chat.encode(p.messages)[0] for p in problems], time.perf_counter()
    room = chat.model.cfg.seq_len - max(map(len, prompts))
    if room < 1: raise UserError(f"prompt: got one of {chat.model.cfg.seq_len - room} tokens, "
                                 "wanted less than the model's context; take it out of --data")
    made = iter(generate(chat.model, prompts, Sampling(min(room, o.max_tokens), seed=seed), n=n,
                         on_token=lambda i, token: token == chat.end))
    chat.took, groups = time.perf_counter() - start, []
    for p, prompt in zip(problems, prompts):
        groups.append([])
        for ids in itertools.islice(made, n):
            text, own = chat.decode(ids), [False] * len(prompt) + [True] * len(ids)
            v = dict(zip(("reward", "format", "answer", "able"), TASKS[o.task].verify(text, p)))
            groups[-1].append(v | dict(
                reward=float(v["reward"] and ids[-1] == chat.end), prompt=p.text, text=text,
                wanted=p.answer, length=len(ids), example=(prompt + ids, own)))
    return groups

def in_parts(f, model, batch, size):
    """f(model, tokens, targets, pos) of a batch, `size` rows at a time, without gradients."""
    parts = zip(*(batch[k].split(size) for k in ("tokens", "targets", "pos")))
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([f(model, *(x.to(device) for x in p)).float().cpu() for p in parts])

def entropy(model, tokens, targets, pos):
    """(B, T) nats of the next token's distribution, lse - sum p z. At 0 nothing new is tried."""
    z = model(tokens, pos=pos)[0].float()
    return z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)

def written(chat, ref, loader, items):
    """A batch of rows that somebody wrote: of SFT, or in pairs."""
    batch = lay_out([row for rows in items for row in rows])
    mask = (batch["targets"] >= 0).float()
    if loader.o.command == "sft": return {**batch, "w": NORMS["token"](mask, None)}
    if ref is not None: batch["ref"] = in_parts(logps, ref, batch, loader.size)
    return {**batch, "w": torch.full((len(mask),), 1 / len(mask))}

def roll(chat, ref, loader, problems):
    """A rollout: `group` answers to each problem, scored -> batch. Seeds follow from its number, so
    that a run that goes on samples what it would have."""
    o, start, score = loader.o, time.perf_counter(), partial(in_parts, size=loader.size)
    seed = (o.seed * 1_000_003 + loader.step()) * 2 ** 20 % 2 ** 62
    groups = attempt(chat, o, problems, o.group, seed)
    batch = lay_out([[v["example"]] for group in groups for v in group])
    mask, few = batch["targets"] >= 0, {k: x[:4] for k, x in batch.items()}
    at, rewards = {"mask": mask}, torch.tensor([[v["reward"] for v in g] for g in groups])
    if o.uses > 1 or o.advantage == "teacher": at["old"] = score(logps, chat.model, batch)
    if ref is not None: at["ref"] = score(logps, ref, batch)
    if o.advantage == "gae": at["values"] = score(values_of, chat.model.critic, batch)
    at["adv"] = ADVANTAGES[o.advantage](rewards, at)
    at["w"], tokens = NORMS[o.norm](at.pop("mask"), o.max_tokens), mask.sum().item()
    loader.notes = dict(
        reward=rewards.mean().item(), informative=(rewards.std(1) > 0).float().mean().item(),
        entropy=in_parts(entropy, chat.model, few, 1)[mask[:4]].mean().item(), tokens=tokens,
        length=tokens / len(mask), rollout_s=chat.took,
        scoring_s=time.perf_counter() - start - chat.took)
    return batch | at

class Batches:
    """Again and again through items, in an order that follows from (seed, epoch); `make` turns n of
    them into a dict of tensors of batch_size rows, which serves for o.uses steps."""
    def __init__(self, items, n, o, seq_len, make):
        if len(items) < n: raise UserError(f"examples: got {len(items)}, wanted {n} for a step; "
                                           "set --examples, --batch_size or --data")
        self.items, self.n, self.o, self.seq_len, self.make = items, n, o, seq_len, make
        self.seen, self.batch, self.notes, self.size = 0, None, {}, o.micro_batch or o.batch_size
    def seek(self, seen): self.seen, self.batch = seen, None
    def step(self): return self.seen // self.o.batch_size
    def __next__(self):
        (k, again), n = divmod(self.step(), self.o.uses), len(self.items)
        if not again or self.batch is None:
            places = (divmod(i, n) for i in range(k * self.n, (k + 1) * self.n))
            self.batch = self.make(self, [self.items[permutation(n, self.o.seed, epoch)[i]]
                                          for epoch, i in places])
        self.seen += self.o.batch_size
        return tuple(self.batch.values())

def take_step(loader, model, batches):
    """The `step` of `fit`: gradients of a loss over micro-batches, and a row for the log."""
    start, total, notes, o = time.perf_counter(), 0.0, Counter(), loader.o
    for batch in batches:
        named = dict(zip(loader.batch, batch))
        part, more = LOSSES[o.command](model, o, **named)
        part.backward()
        total = total + part.detach()
        for name, x in {**more, "w": named["w"].sum()}.items(): notes[name] += float(x)
    w, end = notes.pop("w"), time.perf_counter()
    row = dict(step=loader.step(), loss=float(total), **loader.notes,
               **{name: x / w for name, x in notes.items()}, update_s=end - start)
    for name in ("rollout", "scoring", "update") if "tokens" in row else ():
        row[f"{name}, tokens/s"] = row["tokens"] / row[f"{name}_s"]
    with open(Path(o.run) / "log.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    if row["step"] % max(1, o.steps // 10) == 0 or row["step"] == 1:
        print("  ".join(f"{name} {x:.4g}" for name, x in row.items()), flush=True)
    return total

# -----------------------------------------------------------------------------
# Evaluation: several answers to each held-out problem

def pass_at_k(n, c, k):
    """The chance that of k answers, drawn from n with c right, one is right (2107.03374)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(verdicts):
    """One of those on the answer given most often, the first of equals."""
    votes = Counter(v["answer"] for v in verdicts if v["answer"] is not None)
    return max(verdicts, key=lambda v: votes[v["answer"]])

def evaluate(chat, o, scorer=None):
    """-> dict of rates and mean length (error: of pass1, over problems), and the verdicts. scorer:
    a reward model, whose choice among the answers is counted as best."""
    n, problems, mean = o.samples, problems_of(o, held_out=True), statistics.fmean
    groups = attempt(chat, o, problems, n, 2 ** 61)
    solved, verdicts = [int(sum(v["reward"] for v in g)) for g in groups], sum(groups, [])
    row = {f"pass{k}": mean(pass_at_k(n, c, k) for c in solved)
           for k in sorted({1, 4, 16, n}) if k <= n}
    row |= dict(error=torch.tensor(solved).float().std().item() / n / len(groups) ** 0.5,
                majority=mean(majority(g)["reward"] for g in groups))
    for name in ("length", "format", "able"):
        if some := [v[name] for v in verdicts if name in v]: row[name] = mean(some)
    if scorer:
        batch = lay_out([[v["example"]] for v in verdicts])
        best = last(in_parts(values_of, scorer, batch, 64), batch["pos"]).view(-1, n).argmax(1)
        row["best"] = mean(g[i]["reward"] for g, i in zip(groups, best.tolist()))
    for v in verdicts: del v["example"]
    return row, verdicts

# -----------------------------------------------------------------------------
# Phases: each a run directory, begun from another one or from a published model

def scalar(model):
    """Gives a model a head of one row: its logits (B, T, 1) are a number for each token."""
    model.lm_head = Linear(model.cfg.d_model, 1, std=0.0).to(model.embed_tokens.weight)
    return model

def pairs_of(o, chat, problems):
    """Rows of reward and dpo: better and worse, from --data, or of a group of answers the best and
    the worst by the verifier."""
    pairs = [[chat.encode(p.messages, text) for text in (p.demo, p.worse)]
             for p in problems if p.worse]
    if not pairs and TASKS[o.task].verify:
        for group in attempt(chat, o, problems, o.group, o.seed):
            worst, *_, best = sorted(group, key=lambda v: v["reward"])
            if worst["reward"] < best["reward"]: pairs.append([best["example"], worst["example"]])
    print(f"{len(pairs)} pairs", flush=True)
    return [[[example] for example in pair] for pair in pairs]
def prepare(o, chat, problems):
    """-> the loader of a phase."""
    model, n, items, make, ref = chat.model, o.group, problems, roll, None
    if o.kl or o.command in ("dpo", "distill"):
        ref = load_model(find_run(o.teacher or o.init), next(model.parameters()).device)
        ref.compute_dtype = model.compute_dtype
    if o.command == "sft":
        examples = [chat.encode(p.messages, p.demo) for p in problems]
        n, items, make = 1, [[row] for row in pack(examples, model.cfg.seq_len)], written
    if o.command in ("reward", "dpo"): n, items, make = 2, pairs_of(o, chat, problems), written
    if o.command == "reward": scalar(model)
    if o.advantage == "gae": model.critic = scalar(copy.deepcopy(model))
    return Batches(items, o.batch_size // n, o, model.cfg.seq_len, partial(make, chat, ref))

def keep(uses, run, model, optimizer, now):
    """Saves after a rollout's last use; the weights again, as a model without its critic."""
    if now.step % uses: return
    save_checkpoint(run, model, optimizer, now)
    critic = model._modules.pop("critic", None)
    save_model(model, run)
    if critic is not None: model.critic = critic

def begin(o, machine):
    """(Chat, an optimizer or None) of --init, or of a fresh model of the task's size. To recompute
    is to keep a layer's input alone, and to make the rest again when gradients need it."""
    if o.init:
        model, tok = load_model(find_run(o.init), machine.device), load_tokenizer(find_run(o.init))
        model.compute_dtype = machine.dtype
        for layer in model.layers if o.recompute else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return Chat(model, tok), None
    tok, (n_layers, d_model) = CharTokenizer(TASKS[o.task].chars), TASKS[o.task].size
    model, optimizer = build(preset("llama", vocab_size=tok.vocab_size, n_layers=n_layers,
                                    d_model=d_model, seq_len=64), o, machine)
    model.eos = tok.eot
    return Chat(model, tok), optimizer

def measured(o, chat, name, scorer=None):
    """Evaluates once, and keeps it in the run: a run that goes on reads it. Prints it."""
    path, row = Path(o.run) / f"{name}.json", {}
    if path.exists(): row = json.loads(path.read_text())
    elif TASKS[o.task].verify:
        row, verdicts = evaluate(chat, o, scorer)
        for file, rows in ((path.with_suffix(".jsonl"), verdicts), (path, [row])):
            with atomic_write(file, "w") as f: f.writelines(json.dumps(r) + "\n" for r in rows)
    print(f"{o.run}, {name}: ", "  ".join(f"{k} {x:.3f}" for k, x in row.items()), flush=True)

def phase(o):
    """Runs a phase, or goes on with it."""
    machine, run, problems = set_up(o), Path(o.run), problems_of(o)
    print(f"{o}\n{machine.line}", flush=True)
    chat, optimizer = begin(o, machine)
    with atomic_write(run / "align.json", "w") as f: json.dump(vars(o), f, indent=1)
    if o.init: measured(o, chat, "before")
    if o.command == "eval": return
    model, loader = chat.model, prepare(o, chat, problems)
    optimizer = optimizer or AdamW(param_groups(model, 0.0, matrix=o.lr))
    chat.tok.save(run / "tokenizer.json")
    now, _ = fit(model, optimizer, loader, o, machine, run, True, save=partial(keep, o.uses),
                 step=partial(take_step, loader))
    if now.step < o.steps: raise SystemExit(130)  # `fit` has said how to go on
    if o.command == "reward": chat, _ = begin(o, machine)  # whose answers the model is to rank
    measured(o, chat, "after", model if o.command == "reward" else None)

# -----------------------------------------------------------------------------
# The lesson, and the command line

LESSON = dict(  # run: its command, what it begins from, its settings if not the usual
    base=("sft", None, dict(task="text", steps=250)), sft=("sft", "base", {}),
    dpo=("dpo", "sft", {}), grpo=("rl", "sft", dict(steps=20)),
    from_base=("rl", "base", dict(steps=10)))

def lesson(root, given):
    """Phases on one task, each a run under root; a table of them at the end."""
    if {"task", "init", "data"} & {*given}:
        raise UserError("lesson: got another task or model, wanted none; name a command, as sft")
    runs = [*LESSON][:-1] if given.pop("quick", False) else [*LESSON]
    for name in runs:
        command, init, more = LESSON[name]
        if init: more = {**more, "init": f"{root}/{init}"}
        phase(settle(command, {**given, **more, "run": f"{root}/{name}"}))
    shown = [("base", "sft", "before")] + [(name, name, "after") for name in runs[1:]]
    for name, run, when in shown:
        path = Path(root, run, f"{when}.jsonl")
        some = [json.loads(row) for row in path.read_text().splitlines()[:3]]
        row = json.loads(path.with_suffix(".json").read_text())
        print(f"{name:10s}", "  ".join(f"{k} {x:.3f}" for k, x in row.items()), " e.g.",
              "  ".join(v["prompt"] + v["text"] for v in some))

def main(args):
    given = vars(args)
    command, resume, run = (given.pop(k, None) for k in ("command", "resume", "run"))
    if resume:
        try: given = {**json.loads((Path(run or "") / "align.json").read_text()), **given}
        except (OSError, ValueError):
            raise UserError(f"resume: got {run}, wanted a run that align.py began; set --run")
        command = given.pop("command")
    elif run and Path(run).exists():
        raise UserError(f"run: got {run}, which exists; wanted a new name; or add --resume")
    run = run or str(free("-".join(filter(None, (command or "lesson", given.get("task"))))))
    if command: return phase(settle(command, {**given, "run": run}))
    with atomic_write(f"{run}/align.json", "w") as f: json.dump({**given, "command": None}, f)
    lesson(run, given)

def build_parser():
    parser = argparse.ArgumentParser(description="Without a command: the lesson.",
                                     argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    shared = "steps batch_size micro_batch lr clip device dtype threads seed save_minutes".split()
    add("command", nargs="?", choices=[*LOSSES, "eval"], default=None,
        help="a phase, or eval of --init (default: the lesson)")
    add("--run", help="where to keep the run (default: a free name in runs/)")
    add("--resume", action="store_true", help="go on with --run (default: off)")
    fields = [(f.name, f.type, f) for f in dataclasses.fields(AlignConfig) if f.metadata and (
        f.name in shared or f.name not in TrainConfig.__annotations__)]
    add_fields(parser, dataclasses.make_dataclass("Settings", fields), {
        command: MADE_UP[command] for command in ("sft", "dpo", "rl")})
    return parser

if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted; go on with --resume --run RUN")
