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
import argparse, codecs, itertools, json, math, sys, time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bpe import UserError, load_tokenizer
from kernels import StateCache, device_name, up
from model import LM, ModelConfig, load_model, need_field

# -----------------------------------------------------------------------------
# Samplers
# Each maps logits (..., V) to logits in which what must not be drawn is -inf. They compose in the
# order of the dict: what temperature does changes what top_p keeps.

def temperature(z, t):
    """Divides the gaps between log-probabilities by t: below 1 favours the likely, above 1 the
    unlikely."""
    return (z - z.amax(-1, keepdim=True)) / t  # the shift changes no probability, nor overflows

def top_k(z, k):
    """Keeps the k likeliest; of equal ones the lower ids, so that exactly k stay."""
    keep = z.sort(descending=True, stable=True).indices[..., :k]
    return torch.full_like(z, float("-inf")).scatter(-1, keep, z.gather(-1, keep))

def top_p(z, p):
    """Keeps the smallest set of likeliest tokens whose probabilities sum to at least p: a token
    stays if those before it sum to less than p, so the one that crosses p is in."""
    order = z.sort(descending=True, stable=True).indices
    probs = z.gather(-1, order).softmax(-1)
    drop = probs.cumsum(-1) - probs >= p
    return z.masked_fill(torch.empty_like(drop).scatter(-1, order, drop), float("-inf"))

def min_p(z, p):
    """Keeps tokens at least p times as likely as the likeliest: strict when the model is sure,
    permissive when it is not."""
    probs = z.softmax(-1)
    return z.masked_fill(probs < p * probs.amax(-1, keepdim=True), float("-inf"))

SAMPLERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}

@dataclass(frozen=True)
class Sampling:
    """How to draw: None leaves a sampler out; temperature 0 is greedy."""
    max_tokens: int = 200          # tokens to draw at most
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0                  # of the first text; text i uses seed + i
    stop: int | list | None = None  # what ends a text (end-of-text), one or several; not returned
    logps: bool = False            # keep the log-probability that the model gave each token

    def __post_init__(self):
        need = partial(need_field, self)
        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more")
        need(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a probability above 0")
        need(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "a probability")
        need(0 <= self.seed < 2 ** 62, "seed", "an integer from 0 to 2^62")

    def stops(self): return self.stop if isinstance(self.stop, list) else [self.stop]

def distribution(logits, how):
    """logits (..., V) -> probabilities (..., V) in float64, of which tokens are drawn."""
    z = logits.cpu().double()  # in this order: some devices have no float64
    if how.temperature == 0: return F.one_hot(z.argmax(-1), z.shape[-1]).double()  # first of equals
    for name, sampler in SAMPLERS.items():
        value = getattr(how, name)
        if value is not None: z = sampler(z, value)
    return z.softmax(-1)

def choose(p, generator):
    """Draws from p (V,): the first token up to which the sum exceeds a uniform number."""
    total = p.cumsum(-1)
    u = torch.rand(1, dtype=p.dtype, generator=generator) * total[-1]
    return min(int(torch.searchsorted(total, u, right=True)), len(p) - 1)

def draw(logits, how, generator):
    """logits (V,) -> token id."""
    return choose(distribution(logits, how), generator)

# -----------------------------------------------------------------------------
# A cache in blocks, for many texts at once
# How long a text gets nobody knows beforehand, and to reserve the longest for each would waste most
# of the memory. So it is cut into blocks (vLLM, 2309.06180): a text takes another when its last is
# full, and texts that begin alike read the same ones. The model sees none of this: in a forward
# each layer has a cache with KVCache's contract, which gathers the blocks of the texts at hand.

class LayerCache:
    """A layer's cache in a forward: a StateCache of slots side by side, or blocks as a KVCache."""
    n, next_pos = 0, lambda self: None  # positions are given

    def __init__(self, batch, layer, slots):
        self.batch, self.layer = batch, layer
        self.slot = slots[0] and [torch.cat(x) for x in zip(*slots)]

    def update(self, *new):
        if self.slot:
            self.slot = new[1:]
            return
        (*stores, window), out = self.layer, []
        write, read, mask = self.batch.places(window)
        for store, x in zip(stores, new):  # a row of a store is a token's (Hkv Dh)
            store.index_copy_(0, write, x.transpose(1, 2).flatten(0, 1).flatten(1))
            seen = store[read] if isinstance(read, slice) else store.index_select(0, read)
            seen = seen.view(len(x), mask.shape[-1], x.shape[1], x.shape[3])
            out.append(seen.transpose(1, 2))  # (B, Hkv, S, Dh)
        return *out, mask

class Batch:
    """One forward: of each text some tokens behind the `done` ones that its blocks hold. Texts are
    padded on the left, so that all end in the last column."""
    def __init__(self, engine, rows):  # [(text, tokens, ...)]
        self.done, T = [row[0].done for row in rows], max(len(row[1]) for row in rows)
        self.end, n = [row[0].done + len(row[1]) for row in rows], engine.size
        self.device, self.size, self.seen = engine.device, n, {}
        pad = lambda rows, fill: self.tensor([[fill] * (T - len(row)) + row for row in rows])
        self.tokens = pad([row[1] for row in rows], 0)
        self.pos = pad([[*range(*at)] for at in zip(self.done, self.end)], -1)
        n = -(-max(self.end) // n)
        self.blocks = [(row[0].blocks + [0] * n)[:n] for row in rows]
        self.caches = [LayerCache(self, layer, [row[0].states[i] for row in rows])
                       for i, layer in enumerate(engine.layers)]

    def tensor(self, x): return torch.tensor(x, device=self.device)

    def places(self, window):
        """(places to write (B T,), places to read (B S,), mask (B, 1, T, S)), made once for all
        layers of a window. One text in consecutive blocks is read as a slice, without a copy."""
        if window in self.seen: return self.seen[window]
        table, size, pos, row = self.tensor(self.blocks), self.size, self.pos, self.blocks[0]
        index = lambda at: (table.gather(1, at // size) * size + at % size).flatten()
        first = [max(0, d - window + 1) if window else 0 for d in self.done]
        S = max(e - f for e, f in zip(self.end, first))
        at = torch.arange(S, device=self.device) + self.tensor(first)[:, None]  # (B, S)
        gap = pos[:, None, :, None] - at[:, None, None]  # (B, 1, T, S)
        mask = (gap >= 0) & (gap < (window or 2 ** 62)) | (pos < 0)[:, None, :, None]
        write, read = index(pos.clamp(min=0)) * (pos >= 0).flatten(), row[0] * size + first[0]
        if len(self.blocks) == 1 and row == [*range(row[0], row[0] + len(row))]:
            read = slice(read, read + S)
        else: read = index(at.clamp(max=len(row) * size - 1))
        self.seen[window] = write, read, mask
        return self.seen[window]

# -----------------------------------------------------------------------------
# The engine: many texts, one forward
# Decoding reads all weights for one token of each text, so texts are decoded together, and when one
# ends, the next takes its row at once (Orca, OSDI 2022). Prompts go through in chunks beside them,
# so that a long one keeps nobody waiting. When blocks run out, the youngest text gives its own away
# and computes them anew later. What a text says depends on none of this.

class Text:
    """One text in the making. Its context is tokens[begin:], of which `done` are in the cache."""
    def __init__(self, prompt, how, on_token, on_end):
        self.tokens, self.n_prompt, self.how = [*prompt], len(prompt), how
        self.on_token, self.on_end, self.draft = on_token, on_end, None
        self.begin, self.done, self.blocks, self.numbers, self.states = 0, 0, [], [], None
        self.generator = torch.Generator().manual_seed(how.seed)
        self.logps, self.ended = [], None  # "stop", "length", or what whoever ends it says

    new = property(lambda self: self.tokens[self.n_prompt:])
    n_new = property(lambda self: len(self.tokens) - self.n_prompt)
    context = property(lambda self: self.tokens[self.begin:])

class Engine:
    """add() texts, then step() until it says False. n_blocks of memory hold `size` tokens each in
    every layer; chunk: tokens of prompts in a step; guess(text, k): see Speculation. ref: how many
    texts read a block. One that none reads is idle, but keeps what it holds until it is taken, the
    longest idle first. A full block is known by its tokens and the number of the block before it,
    so by all tokens up to there. A recurrence has, instead of places, states, a slot a text; they
    are kept where a prompt's last block is full, and only there can another text go on."""
    def __init__(self, model, n_blocks=0, size=16, chunk=256, max_batch=64, guess=None, k=4,
                 use_cache=True):
        self.model, self.limit, self.size = model, model.cfg.seq_len, size
        self.use_cache = use_cache  # False: all of a text goes through the model for each token
        self.chunk, self.max_batch, self.guess, self.k = chunk, max_batch, guess, k * bool(guess)
        n_blocks = max(n_blocks, 1 - -self.limit // size)  # one text must find room
        self.device = next(model.parameters()).device
        self.ref, self.idle = [0] * n_blocks, OrderedDict.fromkeys(range(1, n_blocks))  # 0: padding
        self.known, self.name, self.kept = {}, {}, {}  # key: block, block: (key, number), : states
        store = lambda x: x.new_zeros(n_blocks * size, x.shape[1] * x.shape[3])
        self.layers = [c.slot if isinstance(c, StateCache) else
                       (*map(store, c.columns[:2]), c.window) for c in model.new_cache(1, 1)]
        self.fresh = [c.slot if isinstance(c, StateCache) else None for c in model.new_cache(1, 1)]
        self.recurrent, self.numbers = any(self.fresh), itertools.count(1)
        self.alike = lambda row: max(len(row[1]), 1 + 2 * self.k).bit_length()  # share a forward
        if any(getattr(layer.self_attn, "rates", 1) == 0 for layer in model.layers):
            self.alike = lambda row: (row[0].done, len(row[1]))  # Hyena's states grow
        self.running, self.queue = [], deque()
        self.passes = self.guessed = self.accepted = 0

    def add(self, prompt, how=Sampling(), on_token=None, on_end=None):
        """-> the Text that goes on from a prompt (ids). on_token(id) hears what it says; if that
        returns True, it ends there. To give it up, set its `ended`. Safe from any thread."""
        assert 0 < len(prompt) <= self.limit, "prompts must hold 1 to seq_len tokens"
        text = Text(prompt, how, on_token, on_end)
        self.queue.append(text)
        return text

    def match(self, context):
        """Known blocks that hold its beginning, at most all but the last token."""
        blocks, number, n = [], 0, self.size
        for i in range(0, len(context) - n, n):
            block = self.known.get((number, tuple(context[i:i + n])))
            if block is None: break
            blocks, number = [*blocks, block], self.name[block][1]
        while self.recurrent and blocks and blocks[-1] not in self.kept: blocks.pop()
        return blocks

    def learn(self, text):
        """Makes the blocks that a text has filled known, and its states where a prompt ends."""
        n = self.size
        for i in range(len(text.numbers), text.done // n):
            key = (text.numbers or [0])[-1], tuple(text.context[i * n:(i + 1) * n])
            block = self.known.setdefault(key, text.blocks[i])
            if block not in self.name: self.name[block] = key, next(self.numbers)
            text.numbers.append(self.name[block][1])
            if self.recurrent and text.done == (i + 1) * n and text.n_new == 0:
                self.kept[block] = [slot and [x.clone() for x in slot] for slot in text.states]
                if len(self.kept) > 64: del self.kept[next(iter(self.kept))]  # they may be large

    def take(self):
        """An idle block, which is no longer known."""
        block, _ = self.idle.popitem(last=False)
        if block in self.name: del self.known[self.name.pop(block)[0]]
        self.kept.pop(block, None)
        self.ref[block] = 1
        return block

    def release(self, text):
        """Gives its blocks back. A beginning is of use without its end: the end is taken first."""
        text.done = min(text.done, len(text.context))  # it may end among good guesses
        self.learn(text)
        for block in reversed(text.blocks):
            self.ref[block] -= 1
            if self.ref[block] == 0:
                self.idle[block] = None
                if block not in self.name: self.idle.move_to_end(block, last=False)
        text.done, text.blocks, text.numbers, text.states = 0, [], [], self.fresh

    def leave(self, text):
        self.release(text)
        self.running.remove(text)
        if text.on_end: text.on_end()

    def room(self, text, n):
        """Blocks for n more tokens. If there are none, the youngest text gives its own away and
        waits; False if that was the text itself."""
        need = -(-(text.done + n) // self.size) - len(text.blocks)
        while need > len(self.idle):
            youngest = self.running.pop()
            self.release(youngest)
            self.queue.appendleft(youngest)
            if youngest is text: return False
        text.blocks += [self.take() for _ in range(need)]
        return True

    def admit(self, budget):
        """Lets the first text of the queue in, if there is room for all of it, and if no other is
        just reading what it begins with: n samples of a prompt read it once."""
        while self.queue and self.queue[0].ended: self.queue.popleft()
        if not self.queue or budget <= 0 or len(self.running) >= self.max_batch: return False
        text, n = self.queue[0], self.size
        context, known = text.context, self.match(text.context)
        most = (len(context) - 1) // n
        shared = context[:n * (most if self.recurrent else len(known) + 1)]
        need = -(-len(context) // n) - sum(self.ref[block] > 0 for block in known)
        if self.running and need > len(self.idle) or len(known) < most and any(
            t.n_new == 0 and t.context[:len(shared)] == shared for t in self.running): return False
        for block in known:
            self.ref[block] += 1
            self.idle.pop(block, None)
        text.blocks, text.done = known, n * len(known)
        text.numbers = [self.name[block][1] for block in known]
        text.states = self.kept[known[-1]] if known and self.recurrent else self.fresh
        self.running.append(self.queue.popleft())
        return True

    def plan(self):
        """[(text, tokens to compute, distributions of the guesses at their end)] of this step."""
        rows, budget, i = [], self.chunk, 0
        while i < len(self.running) or self.admit(budget):
            text, guesses, q = self.running[i], [], []
            self.learn(text)
            tokens = waiting = text.tokens[text.begin + text.done:]
            left = self.limit - text.done - len(waiting)
            if len(waiting) > 1:  # a prompt, or a part; with states it is cut where a block is full
                tokens = waiting[:budget]
                end = text.done + len(tokens)
                cut = (end - (tokens == waiting)) // self.size * self.size - text.done
                if self.recurrent and cut > 0: tokens = tokens[:cut]
                budget -= len(tokens)
            k = max(0, min(self.k, left, text.how.max_tokens - text.n_new - 1))
            if text.n_new == 0 or tokens != waiting: k = 0
            if tokens and not self.room(text, len(tokens) + k): break
            if k: guesses, q = self.guess(text, k)
            if tokens: rows.append((text, tokens + guesses, q))
            i += 1
        return rows

    @torch.no_grad()
    def step(self):
        """A token for each text that has begun, `chunk` tokens of prompts -> is there more to do?
        Texts of about the same length share a forward, so that less than half is padding."""
        for text in [text for text in self.running if text.ended]: self.leave(text)
        for _, rows in itertools.groupby(sorted(self.plan(), key=self.alike), self.alike):
            self.forward(list(rows))
        return bool(self.running or self.queue)

    def forward(self, rows):
        batch, speakers = Batch(self, rows), {}
        logits, _ = self.model(batch.tokens, pos=batch.pos, cache=batch.caches,
                               last=1 + max(len(q) for *_, q in rows))
        self.passes += 1
        for r, (text, tokens, q) in enumerate(rows):
            at_end = text.done + len(tokens) - len(q) == len(text.context)
            wrong, said = 0, None
            if len(q):
                said = verify(distribution(logits[r, -len(q) - 1:], text.how), q, tokens[-len(q):],
                              partial(choose, generator=text.generator))
                wrong = len(q) + 1 - len(said)
                self.guessed, self.accepted = self.guessed + len(q), self.accepted + len(said) - 1
            if not (wrong and self.recurrent):  # which cannot be taken back, and so begins anew
                text.done += len(tokens) - wrong
                text.states = [c.slot and [x[r:r + 1] for x in c.slot] for c in batch.caches]
            if said: self.say(text, said, logits[r, -len(q) - 1:])
            elif at_end:
                setting = [getattr(text.how, name) for name in SAMPLERS]
                speakers.setdefault(str(setting), []).append((text, logits[r, -1:]))
        for texts, z in (zip(*pairs) for pairs in speakers.values()):
            if texts[0].how.temperature == 0: drawn = torch.cat(z).argmax(-1).tolist()
            else: drawn = map(choose, distribution(torch.cat(z), texts[0].how),
                              [text.generator for text in texts])
            for text, token, row in zip(texts, drawn, z): self.say(text, [token], row)

    def say(self, text, tokens, logits):
        """Appends tokens that were drawn from logits (len(tokens), V), up to what ends the text."""
        for token, z in zip(tokens, logits):
            if token in text.how.stops(): text.ended = "stop"
            else:
                text.tokens.append(token)
                if text.how.logps: text.logps.append(up(z).log_softmax(-1)[token].item())
                if text.on_token and text.on_token(token) is True: text.ended = "stop"
                elif text.n_new == text.how.max_tokens: text.ended = "length"
            if text.ended: return self.leave(text)
        if len(text.context) > self.limit:  # it goes on from its last half
            self.release(text)
            text.begin, text.draft = len(text.tokens) - max(1, self.limit // 2), None
        if not self.use_cache: self.release(text)

@torch.no_grad()
def generate(model, prompts, how=Sampling(), use_cache=True, on_token=None, n=1, **options):
    """Continues each prompt (a list of ids, at least one, at most seq_len) n times -> lists of new
    ids, those of a prompt side by side; list i draws with how.seed + i, and on_token(i, id) is
    called as it grows. A text that outgrows the context goes on from its last half, whose positions
    then count from 0. A list is the same alone, among others or without a cache, up to rounding: in
    another batch a float32 product may be summed in another order, and a near-tie fall differently.
    options: of Engine."""
    each = [(prompt, replace(how, seed=how.seed + i), on_token and partial(on_token, i))
            for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n))]
    training = model.training
    model.eval()
    try:
        lengths = sorted(min(model.cfg.seq_len, len(p) + how.max_tokens) for p, *_ in each)
        n_blocks = 1 + sum(1 + x // options.get("size", 16) for x in lengths[-64:])
        engine = Engine(model, **{"n_blocks": n_blocks, "use_cache": use_cache, **options})
        texts = [[engine.add(*row) for row in each[j::n]] for j in range(n)]  # first all prompts
        while engine.step(): pass
    finally: model.train(training)
    return [text.new for of_prompt in zip(*texts) for text in of_prompt]

class TextStream:
    """Turns ids into text as they come, the same as `decode` of all of them: a character may be
    spread over several tokens, so bytes that are the beginning of one are held back; and so is what
    may be the beginning of a string that stops the text. put -> has it come to a stop?"""
    def __init__(self, tokenizer, write, stops=()):
        self.vocab, self.write, self.stops, self.held = tokenizer.vocab, write, stops, ""
        self.decoder, self.ended = codecs.getincrementaldecoder("utf-8")("replace"), False

    def put(self, token, final=False):
        self.held += self.decoder.decode(self.vocab.get(token, b""), final)
        ends = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        back = max((n for stop in self.stops for n in range(1, len(stop))
                    if self.held.endswith(stop[:n]) and not final), default=0)
        out, self.ended = self.held[:min([len(self.held) - back, *ends])], bool(ends)
        self.held = self.held[len(out):]
        if out: self.write(out)
        return self.ended

    def flush(self):
        if not self.ended: self.put(None, final=True)

# -----------------------------------------------------------------------------
# Speculation: several tokens a pass, from the same distribution
# A pass over k + 1 tokens takes hardly longer than over one, as both read all weights. So something
# cheap guesses k tokens, and the model looks at all at once (2211.17192). A guess x, drawn from q,
# is kept with probability min(1, p(x) / q(x)); the first that is not is drawn anew from what p has
# more than q, (p - q)+. Then x comes with min(p, q) + (p - q)+ = p: what the guesses are changes
# the speed, and nothing else. At an acceptance rate a, a pass gives (1 - a^(k+1)) / (1 - a) tokens.

def verify(p, q, guesses, choose):
    """p (k+1, V) of the model, q (k, V) that guesses were drawn from -> 1 to k + 1 tokens;
    choose(probabilities) draws an index."""
    for i, x in enumerate(guesses):
        keep = min(1.0, float(p[i, x] / q[i][x]))
        if choose(torch.tensor([1 - keep, keep], dtype=p.dtype)): continue
        rest = (p[i] - q[i]).clamp(min=0)
        return [*guesses[:i], choose(rest / rest.sum())]
    return [*guesses, choose(p[-1])]

def look_up(vocab_size, n=2):
    """Guesses that a text goes on as it did where its last n tokens stood before: free, and good
    for code, quotes and tables."""
    def guess(text, k):
        t = text.tokens
        for i in range(len(t) - n - 1, -1, -1):
            if t[i] == t[-n] and t[i:i + n] == t[-n:]:
                guesses = t[i + n:i + n + k]
                return guesses, F.one_hot(torch.tensor(guesses), vocab_size).double()
        return [], []
    return guess

def draft_of(model):
    """Guesses of a smaller model with the same tokens, drawn as the text's own settings say."""
    @torch.no_grad()
    def guess(text, k):
        context, guesses, q = text.context, [], []
        if len(context) + k > model.cfg.seq_len: return [], []
        cache = text.draft = text.draft or model.new_cache(1, model.cfg.seq_len)
        n = min(cache[0].n, len(context) - 1)  # beyond stand guesses that were wrong
        for c in cache: c.truncate(n)
        new = context[n:]
        for _ in range(k):
            z, _ = model(torch.tensor([new], device=model.embed_tokens.weight.device), cache=cache)
            q.append(distribution(z[0, -1], text.how))
            new = [choose(q[-1], text.generator)]
            guesses += new
        return guesses, torch.stack(q)
    return guess

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
