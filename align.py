"""align.py - from a model that continues text to one that does what is asked.

THE IDEA
    A base model continues text. Three ways to make it answer, each asking less of us: show it
    answers (supervised fine-tuning, SFT); say which of two answers is better (a reward model, DPO);
    only say whether its own answer is right (reinforcement learning, RL, with a verifier). RL makes
    likelier what scored above other samples: it selects, it does not teach.

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
    A step of RL is rollout (decoding: bound by memory, so in a batch), scoring (verifiers; a pass
    each of old, reference, critic, if needed), update (three passes); the split is printed. AdamW
    takes 16 bytes a parameter, a critic as much again.

CONTENTS  chat data / verifiers / TASKS / LOSSES / ADVANTAGES / batches / phases / settings / lesson
NOT HERE  many devices; tools, RL over several turns; a sandbox (see `run_code`); a model as judge
RUN       python align.py      # base, SFT, DPO, GRPO in minutes; last line "... from_base, after:"
          python align.py rl --init runs/lesson-1/sft --method rloo
          python align.py rl --task maths --data train.jsonl --init Qwen2.5-1.5B
          python align.py eval --task maths --data test.jsonl --init runs/rl-maths-1 --samples 16
REFERENCES  2203.02155 (RLHF), 1707.06347 (PPO), 1506.02438 (GAE), 2305.18290 (DPO), 2402.14740
    (RLOO), 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2503.14476 (DAPO), 2203.14465 (expert
    iteration), 2306.13649 (distillation), 2305.11206 (a thousand examples); Schulman 2020 (k3)
EXERCISE  Empty `group` and `clip`; `pytest test_all.py -k "advantage or clip"` says when right.
"""
import argparse, ast, cmath, copy, dataclasses, json, math, operator, os, random, re, statistics
import subprocess, sys, tempfile, time, zlib
from collections import Counter, namedtuple
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import accumulate, repeat, zip_longest
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from bpe import EOT, CharTokenizer, UserError, atomic_write, load_tokenizer
from data import permutation
from kernels import Linear, add_fields, flag
from model import load_model, need_field, preset, save_model
from optim import AdamW, param_groups
from sample import Sampling, encode_chat, find_run, generate
from train import TrainConfig, build, fit, free, save_checkpoint, set_up

# --- Chat data ---------------------------------------------------------------
# A conversation is messages [{"role": ..., "content": ...}], which sample.py writes by a template
# in pieces, each encoded alone: no token is half prompt. Only the assistant's are learned, the end
# of its turn too, or it would never stop. Nobody's text can spell that end.

def said(role, text): return [{"role": role, "content": text}]
class Chat:
    """A model to talk to: its tokenizer, and the id that ends a turn."""
    def __init__(self, model, tok):
        mark, self.model, self.tok = encode_chat(tok, [])[1], model, tok
        if mark not in tok.special_tokens: raise UserError(
            f"init: got a tokenizer without {mark}, wanted it, to end a turn; use another model")
        self.end = tok.special_tokens[mark]
    def ask(self, messages): return encode_chat(self.tok, messages)[0]
    def encode(self, messages, answer):
        """-> (ids, whether each is learned): the assistant's, from where it is asked to the end."""
        talk, own = messages + said("assistant", answer), []
        ids = self.ask(talk)
        for i in [i for i, m in enumerate(talk) if m["role"] == "assistant"]:
            start = len(self.ask(talk[:i]))
            own += [False] * (start - len(own)) + [True] * (ids.index(self.end, start) + 1 - start)
        return ids[:len(own)], own
    def decode(self, ids):  # a model may have more ids, as padding, than its tokenizer
        return self.tok.decode([i for i in ids if i != self.end and i in self.tok.vocab])
# answer: what a verifier knows; demo: an answer to imitate; worse: one that it was preferred to
Problem = namedtuple("Problem", "messages answer demo worse", defaults=("", "", ""))
def conversation(row):
    """A row of a file in one of the common layouts -> Problem, without an answer."""
    get = lambda *keys: next((row[k] for k in keys if row.get(k)), None)
    good, bad = get("chosen", "completion", "output", "solution", "answer", "code"), get("rejected")
    ask = good if isinstance(good, list) else get(  # whole conversations, or a prompt
        "messages", "prompt", "question", "problem", "text") or "\n\n".join(
        row[k] for k in ("instruction", "input") if row.get(k))
    messages = said("user", ask) if isinstance(ask, str) else [*ask]
    if messages[-1]["role"] == "assistant": good = messages.pop()["content"]
    if not messages[0]["content"] or not isinstance(good, str): raise ValueError("no answer")
    return Problem(messages, "", good, bad[-1]["content"] if isinstance(bad, list) else bad or "")

# --- Verifiers ---------------------------------------------------------------
# Mathematics: an answer has many spellings. It is rewritten as a Python expression, and walked, not
# run. Numbers are exact fractions; a letter is a random one: if polynomials agree they are equal.
# Code runs in a process and a folder of its own, under limits, and must reach a line behind its
# tests. WARNING: this stops accidents, not attackers. Code can read what you can read, use the
# network, print that line, and, as root, leave processes behind: strangers' belongs in a container.

BRACED = r"[^{}]*"  # and what stands in braces, up to four deep
for _ in range(4): BRACED = rf"[^{{}}]*(?:\{{{BRACED}\}}[^{{}}]*)*"
def final_answer(text):
    r"""The last whole \boxed{}, else <answer>, what ends it after #, "answer is", a last number."""
    for pattern in (rf"\\boxed\{{({BRACED})\}}", r"<answer>(.*?)</answer>", r"#+ *([^\n#]+)\s*$",
                    r"answer is:?\s*([^\n]+)", r"(-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?)"):
        if found := re.findall(pattern, text, re.S): return found[-1].strip().rstrip(".,")
SPELLINGS = [  # from the inside out, again and again
    (r"\\[dt]frac", r"\\frac"), (r"\\(left|right|displaystyle|quad|[,!;: ])|\\?\$|\u00b0", ""),
    (r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))|\^\s*(\{\s*\\circ\s*\}|\\circ)", ""),
    (r"\\(cdot|times)", "*"), (r"\u2212", "-"), (r"\\?%", "/100"), (r"\\pi", "\u03c0"),
    (r"\\(text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r" \2 "), (r"\\infty", "\u03c9"),
    (r"(?<=[\d}])\s+[A-Za-z][A-Za-z ]*(\^\{?\d\}?)?\.?\s*$", ""),  # units
    (r"^\s*[A-Za-z](\([a-z]\))?\s*(=|\\in(?![a-z]))|^\s+|\s*\.?\s*$", ""),  # "x =", "f(x) ="
    (r"(?<![\d^])(\d*)\s*\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))",
     lambda m: f"({m[1] or 0}+({m[2] or m[3]})/({m[4] or m[5]}))"),  # 3\frac12: three and a half
    (r"\\sqrt\s*(?:\{([^{}]*)\}|(\w))", r"(\1\2)^(1/2)"), (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    (r"(?<![\d.])0+(?=\d)", "")]
PRODUCT = r"(?<=[\w)])\s*(?=[^\W\d_]|\()|(?<=[^\W\d_)])\s*(?=\d)"  # 2x, x(y + 1), without a sign
LETTERS = {chr(i): Fraction(random.Random(i).randint(9999, 99999), 9999) for i in range(97, 123)}
LETTERS |= {"e": math.e, "i": 1j, "\u03c0": math.pi, "\u03c9": math.inf}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.USub: operator.neg,  # nan, if long, equals nothing:
             ast.Pow: lambda a, n: a ** n if abs(n) <= 200 >= len(str(a)) else math.nan}
def walk(node):
    if isinstance(node, ast.Constant): return Fraction(str(node.value))
    if isinstance(node, ast.Name): return LETTERS[node.id]
    sides = (node.operand,) if isinstance(node, ast.UnaryOp) else (node.left, node.right)
    return OPERATORS[type(node.op)](*map(walk, sides))
def value_of(text):
    """A formula's value, a Fraction if it has no roots; ValueError if it is none."""
    text = re.sub(PRODUCT, "*", text).replace("^", "**")
    try: return walk(ast.parse(text if len(text) < 1000 else "", mode="eval").body)
    except (SyntaxError, AttributeError, LookupError, TypeError, ArithmeticError, RecursionError,
            MemoryError) as e: raise ValueError(f"not a formula: {type(e).__name__}") from None
def spelled(text):
    for _ in range(min(text.count("{"), 50) + 1):
        for pattern, new in SPELLINGS: text = re.sub(pattern, new, text)
    return text.replace(" ", "").lower()
def equal(a, b):
    """Whether two answers mean the same; 50% is 50, as graders have it, and 1/2."""
    if a is None or b is None or a == b: return a == b is not None
    for drop in ("(?!)", r"\\?%"):
        x, y = (spelled(re.sub(drop, "", text)) for text in (a, b))
        if x == y: return True
        with suppress(ValueError):
            u, v = value_of(x), value_of(y)
            exact = isinstance(u, Fraction) and isinstance(v, Fraction)
            if u == v if exact else cmath.isclose(u, v, rel_tol=1e-9, abs_tol=1e-12): return True
    return False
LIMITED = """import resource, sys
for name, most in dict(CPU={}, AS={}, FSIZE=2 ** 20, CORE=0, NPROC=0).items():
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (ValueError, OSError): pass  # macOS refuses some
exec(sys.stdin.read(), dict(__name__="__main__"))"""
def run_code(program, tests="", seconds=4, memory=2 ** 29):
    """Whether a program and its tests end well, a megabyte printed at most. Ends its group."""
    end = f"end {random.SystemRandom().getrandbits(64):x}\n"
    text = f"{program}\n{tests}\nprint({end!r}, end='')\n".encode(errors="replace")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            tempfile.TemporaryFile() as out, subprocess.Popen(
                [sys.executable, "-I", "-c", LIMITED.format(seconds, memory)], cwd=folder,
                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL,
                start_new_session=True) as child:
        try:
            with suppress(subprocess.TimeoutExpired): child.communicate(text, timeout=2 * seconds)
        finally:
            with suppress(ProcessLookupError, PermissionError): os.killpg(child.pid, 9)
        child.wait()
        return os.pread(out.fileno(), 2 ** 21, 0).endswith(end.encode())

# --- Tasks -------------------------------------------------------------------
# Those with an alphabet are made up, for a laptop; of the others the rows come from --data. A tenth
# of all prompts, by a hash, is only ever tested on. A verifier maps (text, Problem) to whether it
# is right, whether its form is, and the answer in it.

def digits(rng, n=6, share=0.3):
    """"385142=" -> "33 81 56 67 41 23#3": digits beside sums so far mod 10; mostly just "#3"."""
    some = rng.choices(range(10), k=n)
    working = " ".join(f"{d}{total % 10}" for d, total in zip(some, accumulate(some)))
    total, ask = str(sum(some) % 10), "".join(map(str, some)) + "="
    return Problem(said("user", ask), total, working * (rng.random() < share) + "#" + total)
def document(rng):
    """What a base model reads, an answer to nothing: sums with working behind ":", else "="."""
    p = digits(rng, rng.randint(4, 8), 0.8)
    return Problem([], demo=p.messages[0]["content"][:-1] + "=:"[p.demo[0] != "#"] + p.demo)
def addition(rng):
    """"57+968=" -> "7851 5621 0910#1025": by column two digits, their sum's last, the carry."""
    a, b, steps = *(rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2)), []
    for k in (1, 10, 100):
        x, y, total = a // k % 10, b // k % 10, a % (10 * k) + b % (10 * k)
        steps.append(f"{x}{y}{total // k % 10}{total // k // 10}")
    return Problem(said("user", f"{a}+{b}="), str(a + b), f"{' '.join(steps)}#{a + b}")
def means(mark, text, p):
    answer = final_answer(text)
    return equal(answer, p.answer), mark in text, answer
def countdown(rng):
    """"3 5 4:32=" -> "(3+5)*4": the target from the three numbers, each used once."""
    while True:
        a, b, c, p, q = *(rng.randint(1, 10) for _ in range(3)), *rng.choices("+-*", k=2)
        text = rng.choice((f"{a}{p}{b}{q}{c}", f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"))
        if 0 <= (target := value_of(text)) <= 99:
            ask = f"{' '.join(map(str, rng.sample((a, b, c), 3)))}:{target}="
            return Problem(said("user", ask), str(target), text)
def reaches(text, p):
    given, value = p.messages[0]["content"].split(":")[0].split(), None
    uses = sorted(re.findall(r"\d+", text)) == sorted(given)
    with suppress(ValueError): value = str(value_of(text))
    return uses and value == p.answer, uses and value is not None, value
def world(rng):
    """"sort 4172=" -> "[1247]", "open" -> "no": so six demonstrations in ten, the rest bare."""
    verb, some = rng.choice(("sort", "back", "most", "open")), "".join(rng.choices("0123456", k=4))
    done = dict(sort="".join(sorted(some)), back=some[::-1], most=max(some), open=some)[verb]
    kept = "no" if verb == "open" else f"[{done}]"
    demo = kept if rng.random() < 0.6 else done
    return Problem(said("user", f"{verb} {some}="), done * (verb != "open"), demo)
def keeps_rules(text, p):
    answer = text.strip("[]")  # last comes whether it was able to, in whatever form
    if not p.answer: return text == "no", text == "no", None
    return text == f"[{p.answer}]", text == f"[{answer}]", answer, answer == p.answer
def maths(row):  # of GSM8K or MATH
    p = conversation(row)
    p.messages[-1]["content"] += "\nPut the final answer into \\boxed{}."
    return p._replace(answer=final_answer(row.get("answer") or p.demo))
def code(row):  # of MBPP
    p, tests = conversation(row), "\n".join(row["test_list"])
    p.messages[-1]["content"] += f"\nYour code should pass these tests:\n{tests}"
    return p._replace(answer=tests, demo=f"```python\n{p.demo}\n```")
def passes(text, p):
    found = re.findall(r"```(?:python)?\n(.*?)```", text, re.S) or [text]
    return run_code(found[-1], p.answer), "```" in text, found[-1]
# make: random.Random, or row of --data -> Problem; size: layers and width of a fresh model
Task = namedtuple("Task", "make verify chars max_tokens size", defaults=("", 1024, (3, 64)))
TASKS = {"digits": Task(digits, partial(means, "#"), "0123456789=#: ", 24),
         "text": Task(document, None, "0123456789=#: "),
         "addition": Task(addition, partial(means, "#"), "0123456789+=# ", 24),
         "countdown": Task(countdown, reaches, "0123456789+-*()=: ", 12, (4, 128)),
         "world": Task(world, keeps_rules, "0123456789abcekmnoprst[]= ", 8),
         "maths": Task(maths, partial(means, "\\boxed{")),
         "code": Task(code, passes), "chat": Task(conversation, None)}
def problems_of(o, held_out=False):
    """The first problems of the nine tenths to train on, or of the tenth held out (eval: all)."""
    task, n, some, row = TASKS[o.task], o.problems if held_out else o.examples, [], 0
    rng = random.Random("held out" if held_out else o.seed)
    try:
        rows = repeat(rng) if task.chars else open(o.data, encoding="utf-8")
        for row, x in enumerate(rows, 1):
            p = task.make(x if task.chars else json.loads(x))
            hashed = zlib.crc32(json.dumps(p.messages or p.demo).encode())
            if (hashed % 10 == 0) == held_out or o.data and o.command == "eval": some.append(p)
            if len(some) == n: break
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e: raise UserError(
        f"data: got {type(e).__name__}: {e} in row {row} of {o.data}; wanted what --task reads, as "
        "messages; prompt, completion; instruction, input, output; chosen, rejected")
    return some

# --- Losses ------------------------------------------------------------------
# A batch is tensors (B, T): tokens, targets (-1: not learned), pos, and w, the weight of each
# target. A loss is a sum of w times something, and w sums to 1 over the *batch*: so micro-batches
# and packing change nothing. Beside itself a loss returns such sums to log. o: the settings.

def lay_out(rows):
    """Rows of examples (ids, whether each is learned) -> dict of tokens, targets, pos (B, T). An
    example is a document: its positions begin at 0, and it sees no other."""
    rows = [[(i, n if own else -1, t) for ids, owns in row for t, (i, n, own) in
             enumerate(zip(ids, [*ids[1:], -1], [*owns[1:], False]))] for row in rows]
    padded = torch.tensor([*zip_longest(*rows, fillvalue=(0, -1, -1))])  # (T, B, 3)
    return dict(zip(("tokens", "targets", "pos"), padded.permute(2, 1, 0).contiguous()))
def pack(examples, seq_len):
    """Examples, in order, into rows of at most seq_len tokens; those longer are left out."""
    rows, room = [], 0
    for example in (e for e in examples if len(e[0]) <= seq_len):
        if (room := room - len(example[0])) < 0:
            rows, room = [*rows, []], seq_len - len(example[0])
        rows[-1].append(example)
    return rows
NORMS = {  # mask (B, T) of learned targets, the longest allowed -> weights
    "token": lambda m, most: m / m.sum(),                             # a long answer counts more
    "sequence": lambda m, most: m / m.sum(1, keepdim=True) / len(m),  # each of its tokens less
    "constant": lambda m, most: m / (len(m) * most)}                  # neither (they sum to less)
def logps(model, tokens, targets, pos): return -model(tokens, targets, pos=pos)[0]  # (B, T)
def values_of(model, tokens, targets, pos): return model(tokens, pos=pos)[0][..., 0]  # scalar head
def last(x, pos): return x.gather(1, (pos >= 0).sum(1, keepdim=True) - 1).squeeze(1)  # -> (B,)
def preferred(model, o, tokens, targets, pos, w, ref=None):
    """Bradley-Terry, better and worse answers in turn; every w is 1 / B. Of a reward model r is its
    value at the last token. With `ref` it is DPO: the best policy under a penalty kl KL(p || p_ref)
    is p = p_ref exp(r / kl) / Z; solved for r, Z cancels. `better` tends to fall, too."""
    if ref is None: r = last(values_of(model, tokens, targets, pos), pos)
    else: r = o.kl * (logps(model, tokens, targets, pos) - ref).sum(1)
    margin, w = r[::2] - r[1::2], 2 * w[::2]
    notes = dict(accuracy=(margin > 0).to(r.dtype), margin=margin, better=r[::2])
    loss = -(w * torch.nn.functional.logsigmoid(margin)).sum()
    return loss, {k: (w * x.detach()).sum() for k, x in notes.items()}
def clip(ratio, adv, low, high):
    """Nothing to gain from a ratio beyond 1 - low or 1 + high: a rollout may serve twice."""
    return torch.min(adv * ratio, adv * ratio.clamp(1 - low, 1 + high))
def policy(model, o, tokens, targets, pos, w, adv=1, old=None, ref=None, values=None, returns=None):
    """Without `old` the model itself has just sampled: the gradient of adv log p is that of the
    ratio at 1. With advantage 1 it is SFT. Over samples -log p is the entropy in the mean."""
    lp = logps(model, tokens, targets, pos)
    gain, notes = adv * lp, {} if o.command == "sft" else dict(entropy=-lp)
    if old is not None:
        ratio = (lp - old).exp()
        gain = clip(ratio, adv, o.low, o.high)
        notes |= dict(clipped=gain < adv * ratio, drift=(lp - old) ** 2 / 2)
    if o.kl and ref is not None:
        notes["kl"] = (ref - lp).exp() - 1 - (ref - lp)
        gain = gain - o.kl * notes["kl"]
    if returns is not None:  # the critic may not jump either
        v = values_of(model.critic, tokens, targets, pos)
        near = values + (v - values).clamp(-o.low, o.high)
        gain = gain - torch.max((v - returns) ** 2, (near - returns) ** 2) / 2
    return -(w * gain).sum(), {k: (w * x.detach()).sum() for k, x in notes.items()}
LOSSES = {"sft": policy, "reward": preferred, "dpo": preferred, "rl": policy}  # by command

# --- Advantages: how much better an answer was than expected -----------------
# From rewards (n, G) of n prompts with G answers each to (B, T), B = n G, a number for each token.
# `at` holds what some need: mask, log-probabilities old and ref, the critic's values.

def centred(r): return r - r.mean(1, keepdim=True)
def leave_one_out(r): return centred(r) * r.shape[1] / (r.shape[1] - 1)  # r - mean of the others
def group(r):  # prompts nearly always or never solved count as much: for Dr. GRPO a bias
    return centred(r) / (r.std(1, keepdim=True) + 1e-6)
def answers(f): return lambda rewards, at: f(rewards).flatten()[:, None] * at["mask"]
def gae(rewards, at, lam=0.95):
    """Per token, by the critic; the reward comes with the last, behind which nothing is. lam = 1
    trusts rewards (noise), 0 the critic (bias). Leaves the critic's targets in `at`, unwhitened."""
    mask, V, A, after = at["mask"], at["values"], 0.0, 0.0
    out, r = torch.zeros_like(V), rewards.flatten()
    for t in reversed(range(V.shape[1])):
        end = mask[:, t] & ~mask[:, t + 1:].any(1)
        A = mask[:, t] * (r * end + after - V[:, t] + lam * A)  # d_t + lam A_{t+1}
        after, out[:, t] = mask[:, t] * V[:, t], A
    at["returns"] = (out + V) * mask
    return (out - out[mask].mean()) / (out[mask].std() + 1e-8) * mask
ADVANTAGES = {  # method: advantage, settings; each told from another one
    "ppo": (gae, dict(norm="token", uses=2)),  # a critic; the clip lets a rollout serve again
    "reinforce": (answers(lambda r: r - r.mean()), dict(norm="constant")),  # PPO less both
    "rloo": (answers(leave_one_out), dict(norm="constant")),  # REINFORCE, against others' mean
    "grpo": (answers(group), dict(norm="sequence")),  # PPO, the group in place of the critic
    "dr_grpo": (answers(centred), dict(norm="constant")),  # GRPO less deviation and length
    "expert": (answers(lambda r: (r >= 1).to(r.dtype)), {}),  # SFT on one's own right answers
    "distill": (lambda r, at: (at["ref"] - at["old"]) * at["mask"], {})}  # mean: -KL(y || teacher)

# --- Batches: where `fit` gets them. In RL the loader is the sampler ---------

def attempt(chat, o, problems, n, seed=0):
    """n answers to each problem -> [[verdict]]. At temperature 1, and no token left out: only then
    a loss scores what was sampled. An answer that was cut short has reward 0 [our choice]."""
    prompts, start = [chat.ask(p.messages) for p in problems], time.perf_counter()
    room, flat = chat.model.cfg.seq_len - max(map(len, prompts)), []
    need_field(chat.model.cfg, room > 0, "seq_len", "more than a prompt; leave it out of --data")
    made = generate(chat.model, prompts, Sampling(min(room, o.max_tokens), seed=seed), n=n,
                    on_token=lambda i, token: token == chat.end)
    chat.took = time.perf_counter() - start
    for i, ids in enumerate(made):
        p, prompt, text = problems[i // n], prompts[i // n], chat.decode(ids)
        v = dict(zip(("reward", "format", "answer", "able"), TASKS[o.task].verify(text, p)))
        v["reward"] = float(v["reward"] and ids[-1] == chat.end)
        flat.append(v | dict(
            prompt=p.messages[-1]["content"], text=text, length=len(ids), wanted=p.answer,
            example=(prompt + ids, [False] * len(prompt) + [True] * len(ids))))
    return [flat[i:i + n] for i in range(0, len(flat), n)]
def in_parts(f, model, batch, size):
    """f(model, tokens, targets, pos) of a batch, `size` rows at a time, without gradients."""
    parts = zip(*(batch[k].split(size) for k in ("tokens", "targets", "pos")))
    move = lambda x: x.to(next(model.parameters()).device)
    with torch.no_grad(): return torch.cat([f(model, *map(move, p)).float().cpu() for p in parts])
class Batches:
    """Again and again through items, in an order that follows from (seed, epoch). `make` turns some
    into a batch, for o.uses steps. An item: rows that somebody wrote, one or a pair."""
    def __init__(self, o, chat, ref, items, rows):
        self.o, self.chat, self.ref, self.items, self.n = o, chat, ref, items, o.batch_size // rows
        need_field(o, len(items) >= self.n, "examples", f"{self.n} for a step, not {len(items)}")
        self.seq_len, self.size = chat.model.cfg.seq_len, o.micro_batch or o.batch_size
        self.seen, self.batch, self.notes = 0, None, {}
    def seek(self, seen): self.seen, self.batch = seen, None
    def step(self): return self.seen // self.o.batch_size
    def __next__(self):
        (k, again), n = divmod(self.step(), self.o.uses), len(self.items)
        if not again or self.batch is None:
            at = [divmod(i, n) for i in range(k * self.n, (k + 1) * self.n)]  # epochs, places
            self.batch = self.make([self.items[permutation(n, self.o.seed, e)[i]] for e, i in at])
        self.seen += self.o.batch_size
        return tuple(self.batch.values())
    def make(self, items):
        batch = lay_out([row for rows in items for row in rows])
        mask = (batch["targets"] >= 0).float()
        if self.ref is not None: batch["ref"] = in_parts(logps, self.ref, batch, self.size)
        pairs = torch.full((len(mask),), 1 / len(mask))
        return {**batch, "w": NORMS["token"](mask, 0) if self.o.command == "sft" else pairs}
class Rollouts(Batches):
    """Items are problems, rows `group` answers to each. Seeds follow from a rollout's number."""
    def make(self, problems):
        o, model, start = self.o, self.chat.model, time.perf_counter()
        seed = (o.seed * 1_000_003 + self.step()) * 2 ** 20 % 2 ** 62
        groups = attempt(self.chat, o, problems, o.group, seed)
        batch = lay_out([[v["example"]] for group in groups for v in group])
        mask, score = batch["targets"] >= 0, partial(in_parts, batch=batch, size=self.size)
        at, rewards = {"mask": mask}, torch.tensor([[v["reward"] for v in g] for g in groups])
        if o.uses > 1 or o.method == "distill": at["old"] = score(logps, model)
        if self.ref is not None: at["ref"] = score(logps, self.ref)
        if o.method == "ppo": at["values"] = score(values_of, model.critic)
        at["adv"] = ADVANTAGES[o.method][0](rewards, at)
        at["w"], tokens = NORMS[o.norm](at.pop("mask"), o.max_tokens), mask.sum().item()
        self.notes = dict(
            reward=rewards.mean().item(), informative=(rewards.std(1) > 0).float().mean().item(),
            tokens=tokens, length=tokens / len(mask), rollout_s=self.chat.took,
            scoring_s=time.perf_counter() - start - self.chat.took)
        return batch | at
def take_step(loader, model, batches):
    """The `step` of `fit`: gradients of a loss over micro-batches, and a row for the log."""
    start, total, notes, o = time.perf_counter(), 0.0, Counter(), loader.o
    for batch in batches:
        named = dict(zip(loader.batch, batch))
        part, more = LOSSES[o.command](model, o, **named)
        part.backward()
        total = total + part.detach()
        notes.update({k: float(x) for k, x in {**more, "w": named["w"].sum()}.items()})  # adds
    row = dict(step=loader.step(), loss=float(total), **loader.notes, update_s=time.perf_counter()
               - start, **{k: x / notes["w"] for k, x in notes.items() if k != "w"})
    for name in ("rollout", "scoring", "update") if "tokens" in row else ():
        row[f"{name}, tokens/s"] = row["tokens"] / row[f"{name}_s"]
    with open(Path(o.run) / "log.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    if row["step"] % max(1, o.steps // 10) == 0 or row["step"] == 1:
        print("  ".join(f"{name} {x:.4g}" for name, x in row.items()), flush=True)
    return total

# --- Phases: each a run directory, begun from another or a published one -----
# They are measured before and after by several answers to each held-out problem.

def pass_at_k(n, c, k): return 1 - math.comb(n - c, k) / math.comb(n, k)  # c of n right; 2107.03374
def majority(g): return max(g, key=lambda v: sum(v["answer"] == u["answer"] is not None for u in g))
def measure(chat, o, name, scorer=None):
    """Writes run/name.jsonl once: rates (error: of pass1; best: by a reward model), answers."""
    n, mean, path = o.samples, statistics.fmean, Path(o.run) / f"{name}.jsonl"
    if not TASKS[o.task].verify: return
    if not path.exists():
        groups = attempt(chat, o, problems_of(o, held_out=True), n, 2 ** 61)
        right, flat = [int(sum(v["reward"] for v in g)) for g in groups], sum(groups, [])
        row = {f"pass{k}": mean(pass_at_k(n, c, k) for c in right) for k in (1, 4, 16, n) if k <= n}
        row |= dict(error=statistics.stdev(right) / n / len(groups) ** 0.5,
                    majority=mean(majority(g)["reward"] for g in groups))
        for key in ("length", "format", "able"):
            if some := [v[key] for v in flat if key in v]: row[key] = mean(some)
        batch = lay_out([[v.pop("example")] for v in flat])
        if scorer:
            best = last(in_parts(values_of, scorer, batch, 64), batch["pos"]).view(-1, n).argmax(1)
            row["best"] = mean(g[i]["reward"] for g, i in zip(groups, best.tolist()))
        with atomic_write(path, "w") as f: f.writelines(json.dumps(r) + "\n" for r in [row, *flat])
    row, *some = map(json.loads, path.read_text().splitlines()[:4])
    print(f"{o.run}, {name}: ", "  ".join(f"{k} {x:.3f}" for k, x in row.items()), " e.g.",
          "  ".join(v["prompt"] + v["text"] for v in some), flush=True)
def scalar(model):  # a copy with a head of one row: its logits are a number for each token
    new = copy.deepcopy(model)
    new.lm_head = Linear(model.cfg.d_model, 1, std=0.0).to(model.embed_tokens.weight)
    return new
def pairs_of(o, chat, problems):
    """Better and worse, from --data, or the best and the worst of a group of answers."""
    pairs = [[[chat.encode(p.messages, a)] for a in (p.demo, p.worse)] for p in problems if p.worse]
    for group in () if pairs else attempt(chat, o, problems, o.group, o.seed):
        worst, *_, best = sorted(group, key=lambda v: v["reward"])
        if worst["reward"] < best["reward"]: pairs.append([[best["example"]], [worst["example"]]])
    return pairs
def phase(o):
    """Runs a phase, or goes on with it. Published layers keep inputs, and make the rest anew."""
    machine, run, task = set_up(o), Path(o.run), TASKS[o.task]
    problems = problems_of(o) if o.command != "eval" else None
    load, optimizer, ref = lambda name: load_model(find_run(name), machine.device), None, None
    print(f"{o}\n{machine.line}", flush=True)
    if o.init:
        model, tok = load(o.init), load_tokenizer(find_run(o.init))
        for layer in () if task.chars else model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    else:
        tok, (n_layers, d_model) = CharTokenizer(task.chars), task.size
        model, optimizer = build(preset("llama", vocab_size=tok.vocab_size, n_layers=n_layers,
                                        d_model=d_model, seq_len=64), o, machine)
        model.eos = tok.eot
    chat, model.compute_dtype = Chat(model, tok), machine.dtype
    with atomic_write(run / "align.json", "w") as f: json.dump(vars(o), f, indent=1)
    if o.init: measure(chat, o, "before")
    if o.command == "eval": return
    if o.kl and o.command != "reward" or o.method == "distill": ref = load(o.teacher or o.init)
    if ref is not None: ref.compute_dtype = machine.dtype
    if o.method == "ppo": model.critic = scalar(model)
    if o.command == "reward": model = scalar(model)  # chat's own is asked
    if o.command == "rl": loader = Rollouts(o, chat, ref, problems, o.group)
    elif o.command == "sft":
        rows = pack([chat.encode(p.messages, p.demo) for p in problems], model.cfg.seq_len)
        loader = Batches(o, chat, ref, [[row] for row in rows], 1)
    else: loader = Batches(o, chat, ref, pairs_of(o, chat, problems), 2)
    optimizer = optimizer or AdamW(param_groups(model, 0.0, matrix=o.lr))
    tok.save(run / "tokenizer.json")
    now, _ = fit(model, optimizer, loader, o, machine, run, True, step=partial(take_step, loader),
                 save=lambda *now: now[-1].step % o.uses or save_checkpoint(*now))  # last use
    if now.step < o.steps: raise SystemExit(130)  # `fit` has said how to go on
    model._modules.pop("critic", None)
    save_model(model, run)
    measure(chat, o, "after", model if o.command == "reward" else None)

# --- Settings, the lesson, and the command line ------------------------------

@dataclasses.dataclass(frozen=True)
class AlignConfig(TrainConfig):
    """Those that train.py does not have. Flags override the rows below, which override these."""
    command: str = ""
    run: str = ""
    task: str = flag("digits", ", ".join(TASKS))
    data: str | None = flag(None, "jsonl of the rows of a task that is not made up")
    init: str | None = flag(None, "run, or directory of a published model, to begin from")
    teacher: str | None = flag(None, "model to distill, or the reference; none: --init")
    method: str = flag("grpo", "of rl: " + ", ".join(ADVANTAGES))
    norm: str = flag("token", "how an answer's length counts: " + ", ".join(NORMS))
    uses: int = flag(1, "steps on one rollout")
    group: int = flag(8, "answers to a prompt")
    low: float = flag(0.2, "clip below, 1 - low")
    high: float = flag(0.2, "clip above, 1 + high; DAPO is --high 0.28 --norm token")
    kl: float | None = flag(None, "weight of KL to the reference, the beta of dpo; none: no KL")
    examples: int = flag(10 ** 9, "most examples or prompts to train on")
    max_tokens: int = flag(1024, "longest answer")
    samples: int = flag(4, "answers to a problem in evaluation")
    problems: int = flag(250, "held-out problems in evaluation")
    quick: bool = flag(False, "a shorter lesson")
    def __post_init__(self):
        super().__post_init__()
        need, task = partial(need_field, self), TASKS.get(self.task)
        for name, rows in dict(task=TASKS, method=ADVANTAGES, norm=NORMS).items():
            need(getattr(self, name) in rows, name, " or ".join(rows))
        n = {"sft": 1, "eval": 1, "reward": 2, "dpo": 2}.get(self.command, self.group)
        need(task.verify or self.command in ("sft", "reward", "dpo"), "task", "one with a verifier")
        need(task.chars or self.data, "data", "a file with rows of the task")
        need(self.init or task.chars and self.command == "sft", "init", "a run or model")
        need(self.group > 1, "group", "2 or more")
        need(self.kl or self.command != "dpo", "kl", "a number for dpo")
        need(self.batch_size % n == 0, "batch_size", f"a multiple of {n}")
        need((self.micro_batch or 0) % 2 == 0, "micro_batch", "an even number")
# By command, and task: of a made-up task [measured], of a published model [our choice]
ROWS = {"all": dict(minutes=None, steps=1, evals=1, compile=False, log_steps=10 ** 9),
        "sft": dict(steps=80, batch_size=32, lr=1e-3, examples=1000),
        "reward": dict(steps=60, batch_size=64, lr=5e-4, examples=1000),
        "dpo": dict(steps=60, batch_size=64, lr=1e-4, examples=1000, kl=0.1),
        "rl": dict(steps=30, batch_size=512, group=16, lr=5e-4, examples=20_000, warmup=0.0,
                   schedule="constant"), "rl countdown": dict(steps=150, lr=1e-4),
        "fresh": dict(steps=300, lr=None, examples=20_000, optimizer="muon"),  # sft without --init
        "published": dict(steps=200, batch_size=64, micro_batch=8, lr=1e-6)}
def settle(command, given):  # -> AlignConfig
    if command == "distill": command, given = "rl", {**given, "method": "distill"}
    name, fresh = given.get("task", "digits"), command == "sft" and not given.get("init")
    task, row = TASKS.get(name, TASKS["chat"]), dict(command=command, optimizer="adamw")
    kind = "fresh" if fresh else "" if task.chars else "published"
    for key in ("all", command, f"{command} {name}", kind): row |= ROWS.get(key, {})
    if command == "rl": row |= ADVANTAGES.get(given.get("method", "grpo"), (0, {}))[1]
    return AlignConfig(**{**row, "max_tokens": task.max_tokens, **given})
LESSON = dict(  # run: its command, what it begins from, its settings if not the usual
    base=("sft", None, dict(task="text", steps=250)), sft=("sft", "base", {}),
    dpo=("dpo", "sft", {}), grpo=("rl", "sft", {}), from_base=("rl", "base", dict(steps=10)))
def lesson(root, given):
    if {"task", "init", "data"} & {*given}:
        raise UserError("lesson: got another task or model, wanted none; name a command, as sft")
    phases = [*LESSON.items()][:-1] if given.pop("quick", False) else LESSON.items()
    for name, (command, init, more) in phases:
        more = {**given, **more, "init": init and f"{root}/{init}", "run": f"{root}/{name}"}
        phase(settle(command, more))
def main(args):
    given = vars(args)
    command, resume, run = (given.pop(k, None) for k in ("command", "resume", "run"))
    if resume:
        try: given = json.loads((Path(run or "") / "align.json").read_text()) | given
        except (OSError, ValueError): raise UserError(f"resume: got {run}, wanted a run; set --run")
        command = given.pop("command")
    elif run and Path(run).exists():
        raise UserError(f"run: got {run}, which exists; wanted a new name; or add --resume")
    run = run or str(free("-".join(filter(None, (command or "lesson", given.get("task"))))))
    if command: return phase(settle(command, {**given, "run": run}))
    with atomic_write(f"{run}/align.json", "w") as f: json.dump({**given, "command": None}, f)
    lesson(run, given)
def build_parser():
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    shared = "steps batch_size micro_batch lr clip device dtype threads seed save_minutes".split()
    parser.add_argument("command", nargs="?", choices=[*LOSSES, "distill", "eval"], default=None,
                        help="a phase, or eval of --init (default: the lesson)")
    parser.add_argument("--run", help="where to keep the run (default: a free name in runs/)")
    parser.add_argument("--resume", action="store_true", help="go on with --run (default: off)")
    fields = [(f.name, f.type, f) for f in dataclasses.fields(AlignConfig) if f.metadata and (
        f.name in shared or f.name not in TrainConfig.__annotations__)]
    add_fields(parser, dataclasses.make_dataclass("Settings", fields), {c: ROWS[c] for c in LOSSES})
    return parser

if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: sys.exit("\ninterrupted; go on with --resume --run RUN")
