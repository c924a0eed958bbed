"""sample.py - text from a model: one token at a time, each drawn from the distribution it predicts.

THE IDEA
    A model gives the probability of every next token. To write, draw one, append it, ask again. The
    *sampler* cuts off or presses down the long tail of unlikely tokens, wrong more often than
    surprising. The *cache* keeps keys and values of earlier tokens, so that another costs a row of
    attention, not a whole pass. The *engine* writes many texts at once, as reading the weights
    costs the same for one. *Speculation* lets something cheap guess, and the model check.

THE MATHS (z logits, p = softmax(z), q of a guess)
    temperature t   softmax(z / t); t -> 0 is greedy, always the likeliest token
    top_k, min_p    keep the k likeliest; those at least min_p times as likely as the likeliest
    top_p           keep the smallest set of likeliest tokens whose sum is at least p
    what is kept is renormalised, which is what adding -inf to the other logits does
    speculation     keep a guess x with probability min(1, p(x)/q(x)), else draw from (p - q)+

THE COSTS (N weights, B texts, S tokens each in the cache)
    Prefill: T tokens at once, 2 N T FLOPs on weights read once: bound by arithmetic. Decoding: a
    token reads all N weights for 2 N FLOPs: bound by memory. A step takes (weights + B caches) /
    bandwidth; texts share the weights and nobody a cache. Without one, T tokens cost T^2 / 2.

CONTENTS  samplers / cache in blocks / engine / speculation / eight bits / likelihood / chat / runs
NOT HERE  attention that reads blocks in place (here they are gathered), CUDA graphs, a server
RUN       python sample.py         # the lesson, offline; last line "... a batch shares the reading"
          python sample.py --run runs/NAME --prompt "def "    # streams text of that run
          python sample.py --run runs/NAME --eval text.txt --int8    # or questions: jsonl, csv
          python sample.py chat --run runs/NAME
REFERENCES  at each section and function; of the costs Pope et al. 2022 (2211.05102)
EXERCISE  Empty `top_p`, `verify`; `pytest test_all.py -k "sampl or verified"` says they are right
"""
import argparse, codecs, csv, hashlib, itertools, json, math, re, signal, sys, time
from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bpe import EOT, UserError, load_tokenizer
from kernels import DEVICES, Linear, StateCache, add_fields, device_name, flag, up
from model import LM, ModelConfig, load_model, meta_model, need_field

# --- Samplers ----------------------------------------------------------------
# Each maps logits (..., V) to logits in which what must not be drawn is -inf. They compose in the
# order of the dict: what temperature does changes what top_p keeps.

def temperature(z, t):
    """Divides the gaps between log-probabilities by t: below 1 favours the likely."""
    return (z - z.amax(-1, keepdim=True)) / t  # the shift changes no probability, nor overflows
def top_k(z, k):
    """Keeps the k likeliest (1805.04833); of equal ones the lower ids, so that exactly k stay."""
    keep = z.sort(descending=True, stable=True).indices[..., :k]
    return torch.full_like(z, float("-inf")).scatter(-1, keep, z.gather(-1, keep))
def top_p(z, p):
    """Keeps the smallest set of likeliest tokens whose probabilities sum to at least p: a token
    stays if those before it sum to less than p, so the one that crosses p is in (1904.09751)."""
    order = z.sort(descending=True, stable=True).indices
    probs = z.gather(-1, order).softmax(-1)
    drop = probs.cumsum(-1) - probs >= p
    return z.masked_fill(torch.empty_like(drop).scatter(-1, order, drop), float("-inf"))
def min_p(z, p):
    """Keeps tokens at least p times as likely as the likeliest, few if it is sure (2407.01082)."""
    probs = z.softmax(-1)
    return z.masked_fill(probs < p * probs.amax(-1, keepdim=True), float("-inf"))
SAMPLERS = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
@dataclass(frozen=True)
class Sampling:
    """How to draw: None leaves a sampler out."""
    max_tokens: int = flag(200, "tokens to draw at most")
    temperature: float = flag(1.0, "divides logits; 0 is greedy")
    top_k: int | None = flag(None, "keep the k likeliest tokens")
    top_p: float | None = flag(None, "keep the likeliest tokens of this total probability")
    min_p: float | None = flag(None, "keep tokens at least this many times as likely as the top")
    seed: int = flag(0, "of the first text; text i draws with seed + i")
    stop: int | list | None = flag(None, "id, or list of ids, that ends a text and is left out")
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
        if getattr(how, name) is not None: z = sampler(z, getattr(how, name))
    return z.softmax(-1)
def choose(p, generator):
    """Draws from p (V,): the first token up to which the sum exceeds a uniform number."""
    total, u = p.cumsum(-1), torch.rand(1, dtype=p.dtype, generator=generator)
    return min(int(torch.searchsorted(total, u * total[-1], right=True)), len(p) - 1)
def draw(logits, how, generator): return choose(distribution(logits, how), generator)

# --- A cache in blocks, for many texts at once -------------------------------
# How long a text gets nobody knows beforehand, and to reserve the longest for each would waste most
# of the memory. So it is cut into blocks (2309.06180): a text takes another when its last is full,
# and texts that begin alike read the same ones. The model sees none of this: in a forward each
# layer has a cache with the contract of KVCache, which gathers the blocks of the texts at hand.

class LayerCache:
    """A layer's cache in a forward: blocks as a KVCache, or slots of StateCaches side by side."""
    next_pos = staticmethod(lambda: None)  # positions are given
    def __init__(self, batch, layer, slots):
        self.batch, self.layer = batch, layer
        self.slot = None if layer else [torch.cat(parts) for parts in zip(*slots)]
    def update(self, *new):
        if self.slot: return setattr(self, "slot", new[1:])
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
    def __init__(self, engine, rows):
        self.size, self.tensor = engine.size, partial(torch.tensor, device=engine.device)
        texts, new = [row[0] for row in rows], [row[1] + row[2] for row in rows]
        self.seen, self.done, T = {}, [text.done for text in texts], max(map(len, new))
        self.end = [text.done + len(tokens) for text, tokens in zip(texts, new)]
        self.tokens = self.tensor([[0] * (T - len(tokens)) + tokens for tokens in new])
        self.pos = self.tensor([[-1] * (T + a - b) + [*range(a, b)]
                                for a, b in zip(self.done, self.end)])
        n = -(-max(self.end) // self.size)
        self.blocks = [(text.blocks + [0] * n)[:n] for text in texts]
        states = zip(*(text.states or engine.fresh for text in texts))
        last = [[text.tokens[text.begin + text.done - 1]] for text in texts]  # for pairs of tokens
        self.caches = [LayerCache(self, *row) for row in zip(engine.layers, states)]
        self.caches.append(LayerCache(self, None, [[self.tensor(last)]]))
    def places(self, window):
        """(places to write (B T,), places to read (B S,), mask (B, 1, T, S)), made once for all
        layers of a window. One text in consecutive blocks is read as a slice, without a copy."""
        if window in self.seen: return self.seen[window]
        table, size, pos, row = self.tensor(self.blocks), self.size, self.pos, self.blocks[0]
        index = lambda at: (table.gather(1, at // size) * size + at % size).flatten()
        first = [max(0, d - window + 1) if window else 0 for d in self.done]
        S = max(e - f for e, f in zip(self.end, first))
        at = torch.arange(S, device=pos.device) + self.tensor(first)[:, None]  # (B, S)
        gap = pos[:, None, :, None] - at[:, None, None]  # (B, 1, T, S)
        mask = (gap >= 0) & (gap < (window or 2 ** 62)) | (pos < 0)[:, None, :, None]
        write, a = index(pos.clamp(min=0)) * (pos >= 0).flatten(), row[0] * size + first[0]
        alone = len(pos) == 1 and row == [*range(row[0], row[0] + len(row))]
        read = slice(a, a + S) if alone else index(at.clamp(max=len(row) * size - 1))
        return self.seen.setdefault(window, (write, read, mask))

# --- The engine: many texts, one forward -------------------------------------
# Decoding reads all weights for one token of each text, so texts are decoded together, and when one
# ends, the next takes its row at once (Orca, Yu et al. 2022). Prompts go through in chunks beside
# them, so that a long one keeps nobody waiting. When blocks run out, the youngest text gives its
# own away and computes them anew later. What a text says depends on none of this (drawn among
# guesses, its chances do not).

def key_of(before, tokens): return hashlib.blake2b(before + np.array(tokens).tobytes()).digest()
class Text:
    """One text in the making: its context is tokens[begin:], of which `done` are in the cache."""
    def __init__(self, prompt, how, on_token):
        self.tokens, self.n_prompt, self.how, self.on_token = [*prompt], len(prompt), how, on_token
        self.generator, self.begin = torch.Generator().manual_seed(how.seed), 0
        self.p = self.ended = None  # what it drew from, and why it ended: "stop", "length", "left"
        self.forget()
    def forget(self): self.done, self.blocks, self.keys, self.states = 0, [], [], None
    new = property(lambda self: self.tokens[self.n_prompt:])
    n_new = property(lambda self: len(self.tokens) - self.n_prompt)
    context = property(lambda self: self.tokens[self.begin:])
class Engine:
    """add() texts, then step() until it says False. At most n_blocks of `size` tokens, but enough
    for a context (None: as many as texts take); chunk: tokens of prompts in a step; guess: see
    Speculation; without use_cache each token takes all of a text through the model. ref: how many
    texts read a block. An idle one, which none reads, keeps what it holds until it is taken, the
    longest idle first. A full block is known by all tokens up to its end. A recurrence has a slot
    of states a text instead: its prompts are read whole."""
    def __init__(self, model, n_blocks=None, size=16, chunk=256, max_batch=256, guess=None, k=4,
                 use_cache=True):
        self.model, self.limit, self.size, self.chunk = model, model.cfg.seq_len, size, chunk
        self.guess, self.k, self.max_batch, self.use_cache = guess, k, max_batch, use_cache
        self.most = math.inf if n_blocks is None else max(n_blocks, 1 - -self.limit // size)
        caches = model.new_cache(1, 1)[:len(model.layers)]
        self.fresh = [c.slot if isinstance(c, StateCache) else None for c in caches]
        store = lambda x: x.new_zeros(size, x.shape[1] * x.shape[3])  # block 0, for padding
        self.layers = [None if slot else (*map(store, c.columns[:2]), c.window)
                       for c, slot in zip(caches, self.fresh)]
        self.recurrent, self.device = any(self.fresh), model.embed_tokens.weight.device
        self.grows = any(getattr(layer.self_attn, "rates", 1) == 0 for layer in model.layers)
        self.shares, self.ref, self.idle = use_cache and not self.recurrent, [0], OrderedDict()
        self.texts, self.known, self.key = [], {}, {}  # oldest first, {key: block}, {block: key}
        self.passes = self.guessed = self.accepted = 0
    def add(self, prompt, how=Sampling(), on_token=None):
        """-> the Text that goes on from a prompt (ids). on_token(id) hears what it says; if that
        returns True, it ends there. To give it up, set its `ended`. Safe from any thread."""
        assert 0 < len(prompt) <= self.limit, "prompts must hold 1 to seq_len tokens"
        self.texts.append(text := Text(prompt, how, on_token))
        return text
    def begin(self, text):
        """Lets a text read the known blocks of its beginning, at most all but the last token. False
        if another text is just making one more known: n samples of a prompt read it once."""
        context, keys, n = text.context, [b""], self.size
        for end in range(n, len(context) if self.shares else 0, n):
            keys.append(key_of(keys[-1], context[end - n:end]))
            if keys[-1] not in self.known:
                if any(t.blocks and not t.n_new and t.context[:end] == context[:end]
                       for t in self.texts): return False
                keys.pop()
                break
        text.keys = keys[1:]
        text.blocks, text.done = [self.known[key] for key in text.keys], n * len(text.keys)
        for block in text.blocks:
            self.ref[block] += 1
            self.idle.pop(block, None)
        return True
    def learn(self, text):
        """Makes the blocks that a text has filled known."""
        full = min(text.done, len(text.context)) // self.size  # it may end among good guesses
        for i in range(len(text.keys), full if self.shares else 0):
            tokens = text.context[i * self.size:(i + 1) * self.size]
            text.keys.append(key := key_of(text.keys[-1] if i else b"", tokens))
            if self.known.setdefault(key, text.blocks[i]) == text.blocks[i]:
                self.key[text.blocks[i]] = key
    def release(self, text):
        """Takes its blocks away. A beginning is of use without its end: the end is idle first."""
        self.learn(text)
        for block in reversed(text.blocks):
            self.ref[block] -= 1
            if self.ref[block] == 0:
                self.idle[block] = None
                if block not in self.key: self.idle.move_to_end(block, last=False)
        text.forget()
    def room(self, text, n):
        """Takes blocks for n more tokens. If too few are idle, there will be twice as many; and at
        the most, younger texts lose theirs and compute them anew. False if that is not enough."""
        need, have = -(-(text.done + n) // self.size) - len(text.blocks), len(self.ref)
        if need > len(self.idle) and (more := min(max(need, have), self.most - have)) > 0:
            larger = lambda x: torch.cat((x, x.new_zeros(more * self.size, x.shape[1])))
            self.layers = [layer and (*map(larger, layer[:2]), layer[2]) for layer in self.layers]
            self.ref += [0] * more
            self.idle.update(dict.fromkeys(range(have, have + more)))
        for other in reversed(self.texts):
            if need <= len(self.idle): break
            if other is text: return False
            self.release(other)
        for _ in range(need):
            text.blocks.append(block := self.idle.popitem(last=False)[0])
            self.known.pop(self.key.pop(block, None), None)
            self.ref[block] = 1
        return True
    def plan(self):
        """[[text, tokens to compute, guesses behind them, their distributions]] of this step."""
        rows, asks, budget = [], [], self.chunk
        for text in self.texts[:self.max_batch]:
            if text.ended or not text.blocks and not self.begin(text): continue
            self.learn(text)
            tokens, k = text.tokens[text.begin + text.done:], 0
            if len(tokens) == 1 and self.guess and text.n_new: k = min(
                self.k, self.limit - len(text.context), text.how.max_tokens - text.n_new - 1)
            if not self.room(text, len(tokens) + k): break
            if len(tokens) > 1:  # of a prompt, or a part
                tokens = tokens[:budget]
                budget -= len(tokens)
            if tokens: rows.append([text, tokens, [], None])
            if k: asks.append((rows[-1], k))
        guesses = self.guess([(row[0], k) for row, k in asks]) if asks else ()
        for (row, _), guess in zip(asks, guesses): row[2:] = guess
        return rows
    @torch.no_grad()
    def step(self):
        """A token for each text that has begun, `chunk` tokens of prompts -> is there more to do?
        Those that decode share a forward, and prompts of about the same length another."""
        alike = lambda row: len(row[1]) > 1 and len(row[1]).bit_length()  # less than half padding
        if self.grows: alike = lambda row: (row[0].done, len(row[1] + row[2]))  # as Hyena's states
        for _, rows in itertools.groupby(sorted(self.plan(), key=alike), alike):
            self.forward([*rows])
        for text in [text for text in self.texts if text.ended]:
            self.release(text)
            self.texts.remove(text)
        return bool(self.texts)
    def forward(self, rows):
        batch, hows = Batch(self, rows), [row[0].how for row in rows]
        z, _ = self.model(batch.tokens, pos=batch.pos, cache=batch.caches,
                          last=1 + max(len(row[2]) for row in rows))
        self.passes += 1
        alike = len({str([getattr(how, name) for name in SAMPLERS]) for how in hows}) == 1
        p = distribution(z, hows[0]) if alike else [*map(distribution, z, hows)]  # at once is fast
        for r, (text, tokens, guesses, q) in enumerate(rows):
            n, said = len(guesses), []
            if text.done + len(tokens) == len(text.context):  # it has been read to its end
                text.p = p[r][-n - 1:]
                if n and q is None: q = F.one_hot(torch.tensor(guesses), z.shape[-1]).double()
                said = verify(text.p, q, guesses, partial(choose, generator=text.generator))
            wrong = n and n + 1 - len(said)
            self.guessed, self.accepted = self.guessed + n, self.accepted + n - wrong
            if not (wrong and self.recurrent):  # which reads the right ones anew, without guesses
                text.done += len(tokens) + n - wrong
                text.states = [c.slot and [x[r:r + 1] for x in c.slot] for c in batch.caches[:-1]]
            for token in said: self.say(text, token)
    def say(self, text, token):
        if text.ended: return
        if token in text.how.stops(): text.ended = "stop"
        else:
            text.tokens.append(token)
            if text.on_token and text.on_token(token) is True: text.ended = "stop"
            elif text.n_new == text.how.max_tokens: text.ended = "length"
        full = len(text.context) > self.limit
        if full or not self.use_cache: self.release(text)
        if full: text.begin = len(text.tokens) - max(1, self.limit // 2)

def generate(model, prompts, how=Sampling(), use_cache=True, on_token=None, n=1, **options):
    """Continues each prompt (1 to seq_len ids) n times -> lists of new ids, those of a prompt side
    by side; list i draws with how.seed + i, and on_token(i, id) hears it. What outgrows the context
    goes on from its last half, at positions from 0. A list is the same alone, among others and
    without a cache, up to rounding: another batch may add in another order, and tip a near-tie."""
    each = [(prompt, replace(how, seed=how.seed + i), on_token and partial(on_token, i))
            for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n))]
    engine, training = Engine(model, use_cache=use_cache, **options), model.training
    texts = [[engine.add(*row) for row in each[i::n]] for i in range(n)]  # first all prompts
    model.eval()
    try:
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
    def flush(self): return self.ended or self.put(None, final=True)

# --- Speculation: several tokens a pass, from the same distribution ----------
# A pass over k + 1 tokens takes hardly longer than over one, as both read all weights. So something
# cheap guesses k tokens, and the model looks at all at once (2211.17192). A guess x, drawn from q,
# is kept with probability min(1, p(x) / q(x)); the first that is not is drawn anew from what p has
# more than q, (p - q)+. Then x comes with min(p, q) + (p - q)+ = p: what the guesses are changes
# the speed, and nothing else. At an acceptance rate a, a pass gives (1 - a^(k+1)) / (1 - a) tokens.
# A guesser maps [(text, k)] to [(at most k guesses, their q, or None if they are sure)].

def verify(p, q, guesses, choose):
    """p (k+1, V) of the model, q (k, V) that guesses were drawn from -> 1 to k + 1 tokens;
    choose(probabilities) draws an index."""
    for i, x in enumerate(guesses):
        keep = min(1.0, float(p[i, x] / q[i][x]))
        if choose(torch.tensor([1 - keep, keep], dtype=p.dtype)): continue
        rest = (p[i] - q[i]).clamp(min=0)
        return [*guesses[:i], choose(rest / rest.sum())]
    return [*guesses, choose(p[-1])]
def look_up(asks, n=2):
    """Guesses that a text goes on as where its last n tokens stood before: free, good for code."""
    def one(t, k):
        for i in range(len(t) - n - 1, -1, -1):
            if t[i] == t[-n] and t[i:i + n] == t[-n:]:
                return (t[i + n:i + n + k] * k)[:k]  # and if that was just now, so on
        return []
    return [(one(text.tokens, k), None) for text, k in asks]
def draft_of(model):
    """Guesses of a smaller model with the same tokens, drawn as the text's own settings say. It has
    an engine of its own, which knows what it has read of a text (but for recurrences)."""
    engine = Engine(model)
    def guess(asks):
        for text, k in asks:
            context, how = text.context[-max(1, engine.limit - k):], replace(text.how, max_tokens=k)
            draft = engine.add(context, replace(how, stop=None))
            draft.generator, draft.q = text.generator, []
            draft.on_token = lambda _, draft=draft: draft.q.append(draft.p)
        drafts = [*engine.texts]
        while engine.step(): pass
        return [(draft.new, torch.cat(draft.q)) for draft in drafts]
    return guess

# --- Cheaper weights: eight bits ---------------------------------------------
# Half of bf16's bytes are up to twice its tokens/s; --eval with and without --int8 tells the price.

class Int8(torch.nn.Module):
    """A Linear whose rows are integers times a scale: w = s q, |q| <= 127."""
    def __init__(self, linear):
        super().__init__()
        w, self.bias = up(linear.weight.detach()), linear.bias
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        self.register_buffer("weight", (w / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.flatten())
    def forward(self, x):  # torch has a kernel for a few rows in bf16; else weights are unpacked
        rows, scale = x.flatten(0, -2), self.scale.to(x.dtype)
        few = x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= 16
        y = (torch._weight_int8pack_mm(rows, self.weight, scale) if few else
             F.linear(rows, self.weight.to(x.dtype)) * scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(x.dtype)
def quantize(model):
    """Makes the projections of all layers Int8, but for one whose weights are read elsewhere."""
    for module in [*model.layers.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, Linear) and "_proj" in name and name != "kv_b_proj":
                setattr(module, name, Int8(child))
    return model

# --- Likelihood: how well a model predicts a text that it has not seen -------
# Each token is predicted once. Those at the start of a window see little, so longer windows alone
# make the number better: their length stands beside it. Tokens that mark ends cost bits, no bytes.

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
def sliding(ids, context, stride):
    """Batches for `evaluate` of windows that overlap: each of ids but the first counts once, behind
    at least context - stride others where so many are there."""
    ids, last = torch.as_tensor(np.asarray(ids, np.int64)), len(ids) - 1
    ends = [*range(min(context, last), last, stride), last]
    for before, end in zip([0, *ends], ends):
        x = ids[None, max(0, end - context):end + 1]
        yield x[:, :-1], x[:, 1:].index_fill(1, torch.arange(x.shape[1] - 1 - end + before), -1)
LETTERS = [*"ABCDEFGHIJ"]
def read_questions(path):
    """[(question, choices, which is right)] in the layout of HellaSwag (jsonl: ctx, endings, label)
    or MMLU (jsonl: question, choices, answer; csv: question, choices, letter)."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(q, c, a) for q, *c, a in csv.reader(file)] if str(path).endswith("csv") else [
                (r.get("ctx") or r["question"], r.get("endings") or r["choices"],
                 str(r.get("label", r.get("answer")))) for r in map(json.loads, file)]
        rows = [(q, c, int(a) if a.isdigit() else LETTERS.index(a)) for q, c, a in rows]
        return [(q, c, right) for q, c, right in rows if c[right]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"eval: got {type(e).__name__}: {e} in {path}, wanted the layout of MMLU "
                        "(csv or jsonl) or HellaSwag (jsonl); set --eval")
def multiple_choice(model, tokenizer, questions, shots=0, letter=False):
    """-> (shares, their standard errors) of questions whose right choice is the likeliest
    continuation, by its sum and by byte. letter: choices are listed, and a letter is the answer.
    The first `shots` questions stand before each, answered, and are not asked."""
    def ask(question, choices):
        if not letter: return question, [" " + choice for choice in choices]
        listed = "".join(f"\n{x}. {choice}" for x, choice in zip(LETTERS, choices))
        return question + listed + "\nAnswer:", [" " + x for x in LETTERS[:len(choices)]]
    asked = [(*ask(question, choices), right) for question, choices, right in questions]
    if not 0 <= shots < len(asked):
        raise UserError(f"shots: got {shots}, wanted fewer than {len(asked)}, all; set --shots")
    start = "".join(q + answers[right] + "\n\n" for q, answers, right in asked[:shots])
    device, context, good = model.embed_tokens.weight.device, model.cfg.seq_len, []
    for question, answers, right in asked[shots:]:
        before, bits = encode_prompt(tokenizer, start + question, math.inf), []
        for ids in map(tokenizer.encode, answers):
            row = torch.tensor([(before + ids)[-context - 1:]])
            y = row[:, 1:].index_fill(1, torch.arange(max(0, row.shape[1] - 1 - len(ids))), -1)
            bits.append(evaluate(model, [(row[:, :-1], y)], 1, device)["bits_per_byte"])
        by_byte = np.divide(bits, [len(answer.encode()) for answer in answers])
        good.append([np.argmin(x) == right for x in (bits, by_byte)])
    return np.mean(good, 0), np.std(good, 0) / math.sqrt(len(good))
def measure(model, tokenizer, path, shots, letter):
    """bits_per_byte of a text, or shares of questions that are right, as a dict."""
    if Path(path).suffix in (".jsonl", ".csv"):
        rights, errors = multiple_choice(model, tokenizer, read_questions(path), shots, letter)
        return {"right (by sum, by byte)": rights.tolist(), "standard errors": errors.tolist()}
    try: text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as e: raise UserError(f"eval: got {e}, wanted a text; set --eval")
    limit, device = model.cfg.seq_len, model.embed_tokens.weight.device
    batches = sliding(encode_prompt(tokenizer, text, math.inf), limit, -(-limit // 2))
    return evaluate(model, batches, len(text.encode()), device)
def shannon(train, valid, vocab_size, n_bytes, limit=20_000_000):
    """bits_per_byte of models that know no tokens, single tokens, pairs of tokens, counted on at
    most `limit` tokens. A pair a, b that was seen c(ab) times, with n(a) different followers of a,
    has by Witten and Bell (1991) the probability (c(ab) + n(a) p(b)) / (c(a) + n(a))."""
    train = np.asarray(train[:limit], np.int64)
    single = (np.bincount(train, minlength=vocab_size) + 1) / (len(train) + vocab_size)
    pairs, count = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followers, seen = (np.bincount(a, minlength=vocab_size)
                       for a in (pairs // vocab_size, train[:-1]))
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

# --- Chat: messages [{"role", "content"}] -> pieces [(text, is_assistant)] ---
# What the assistant says, and the mark that ends it, is what it is trained on, and what stops it.

def chatml(messages):  # Qwen's, which itself adds a system message if there is none
    return [piece for m in messages for piece in (
        (f"<|im_start|>{m['role']}\n", False),
        (m["content"] + "<|im_end|>", m["role"] == "assistant"), ("\n", False))]
def llama3(messages):
    return [("<|begin_of_text|>", False)] + [piece for m in messages for piece in (
        (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False),
        (m["content"] + "<|eot_id|>", m["role"] == "assistant"))]
def plain(messages):  # nothing but the texts, answers ended by end-of-text: for base models
    return [(EOT, False)] + [(m["content"] + EOT * own, own) for m in messages
                             for own in (m["role"] == "assistant",)]
TEMPLATES = {"chatml": chatml, "llama3": llama3, "plain": plain}
MARKS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}  # special tokens that tell
def encode_chat(tokenizer, messages):
    """Messages -> (ids up to the assistant's next turn, the text that ends it). A text that spells
    a special token gets a space into it, or a user could speak as the system."""
    name = next((name for mark, name in MARKS.items() if mark in tokenizer.special_tokens), "plain")
    apart = lambda text: tokenizer.splitter.sub(lambda s: s[0][0] + " " + s[0][1:], text)
    pieces = TEMPLATES[name]([*({**m, "content": apart(m["content"])} for m in messages),
                              {"role": "assistant", "content": ""}])
    last = max(i for i, (_, own) in enumerate(pieces) if own)
    return [i for text, _ in pieces[:last] for i in tokenizer.encode(text)], pieces[last][0]
def show(text): print(text, end="", flush=True)
def chat(engine, tokenizer, how):
    """Turns in the terminal. Ctrl-C ends a reply; where one is asked for, it ends the program."""
    messages = []
    while True:
        try: messages.append({"role": "user", "content": input("> ")})
        except EOFError: return print()
        while len((ask := encode_chat(tokenizer, messages))[0]) > engine.limit:
            if not messages[1:]: raise UserError("message: got more than the context; shorten it")
            del messages[:2]  # the oldest turn is forgotten
        said = []
        stream = TextStream(tokenizer, lambda piece: said.append(piece) or show(piece), ask[1:])
        text = engine.add(ask[0], how, stream.put)
        old = signal.signal(signal.SIGINT, lambda *_: setattr(text, "ended", "left"))
        while engine.step(): pass
        signal.signal(signal.SIGINT, old)
        stream.flush()
        print()
        messages.append({"role": "assistant", "content": "".join(said)})

# --- Devices and runs --------------------------------------------------------

def pick_device(name="auto"):
    """torch.device for "auto" (cuda, then mps, then cpu), or a named one that must be there."""
    if name == "auto": name = ("cuda" if torch.cuda.is_available() else
                               "mps" if torch.backends.mps.is_available() else "cpu")
    try: torch.zeros(1, device=name).item()  # nothing can be read from "meta"
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: got {name} ({str(e).splitlines()[0]}); wanted cpu, cuda or mps")
    return torch.device(name)
def find_run(name):
    """Directory of a run by its path, or by its name under runs/."""
    for path in (Path(name), RUNS / name):
        if (path / "config.json").is_file(): return path
    known = ", ".join(sorted(p.parent.name for p in RUNS.glob("*/config.json"))) or "none"
    raise UserError(f"run: got {name}, wanted a directory with a config.json, as under {RUNS}/: "
                    f"{known}; train one: python train.py")
RUNS = Path("runs")  # a run leaves log.jsonl, its lines, and result.json, if it came to its end
def read_log(run):
    """The rows of a run's log.jsonl, none if there is none, without a line cut short by a kill."""
    path = Path(run) / "log.jsonl"
    return [*map(json.loads, path.read_text().split("\n")[:-1])] if path.exists() else []
def compare(*runs):
    """Two runs' training losses (means since the line before) at equal time, tokens and FLOPs."""
    logs = [[row for row in read_log(run) if "flops" in row] for run in runs]
    if not all(logs): raise UserError(f"compare: got a run of {runs} without log.jsonl; set --run")
    for key in ("minutes", "tokens", "flops"):  # of one tokenizer: else a nat is another
        ends = [[row[key] for row in log] for log in logs]
        print("{:>12s}  loss of {}  of {}  difference".format(key, *runs))
        for x in np.linspace(max(e[0] for e in ends), min(e[-1] for e in ends), 6)[1:]:
            a, b = (np.interp(x, e, [row["loss"] for row in log]) for e, log in zip(ends, logs))
            print(f"{x:12.4g}  {a:8.4f}  {b:8.4f}  {a - b:+8.4f}")
def board():
    """Finished runs by bits_per_byte; they compare where the text is the same."""
    rows = [{"run": p.parent.name, **json.loads(p.read_text())} for p in RUNS.glob("*/result.json")]
    if not rows: raise UserError(f"board: got no run under {RUNS}/; wanted one: python train.py")
    print(f"{'run':26s} bits_per_byte context  minutes     FLOPs  parameters")
    for row in sorted(rows, key=lambda row: (row["text"], row["bits_per_byte"])):
        print("{run:26s}{bits_per_byte:14.4f}{context:8d}{minutes:9.2f}{flops:10.2e}"
              "{parameters:12,d}  {dataset} {text:.8}, {hardware}".format(**row))
def plot(run):
    """Draws runs/NAME/loss.png from the log if matplotlib is installed."""
    try: from matplotlib.figure import Figure
    except ImportError: return print("no picture: matplotlib is not installed")
    axes = (picture := Figure(figsize=(7, 4))).subplots()
    axes.plot(*zip(*[(r["minutes"], r["loss"]) for r in read_log(run) if "flops" in r]), ".-")
    axes.set(xlabel="minutes", ylabel="training loss (nats per token)")
    picture.savefig(Path(run) / "loss.png", dpi=120)
    print(f"picture: {run}/loss.png")
def encode_prompt(tokenizer, text, limit):
    """Ids of a prompt, begun by end-of-text as every training document is; None gives just that."""
    odd = text == "" or re.search("[\ud800-\udfff]", text or "")  # what is no text, or no UTF-8
    ids = [] if odd else tokenizer.encode(EOT * (tokenizer.eot is not None) + (text or ""))
    if 0 < len(ids) <= limit: return ids
    raise UserError(f"prompt: got {len(ids):,} tokens of {text!r:.40}, wanted a text in UTF-8 of 1 "
                    f"to {limit:,}, the context, or none for a new document; set --prompt")

# --- The lesson and the command line -----------------------------------------

def lesson():
    print(f"cpu ({device_name(torch.device('cpu'))}), {torch.get_num_threads()} threads, float32\n"
          "samplers, on tokens of probability 0.4, 0.25, 0.15, 0.1, 0.06 and 0.04:")
    z = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.06, 0.04]).log()
    for name, value in dict(temperature=0.5, top_k=3, top_p=0.7, min_p=0.25).items():
        print(f"  {name:11s} {value:4g} ", SAMPLERS[name](z, value).softmax(-1).numpy().round(3))
    print("\ndecoding with Llama 2's 13B weights in bf16, 1,024 tokens a text, on an H100 (80 GB):")
    for B, heads in ((1, 40), (64, 40), (256, 40), (64, 8), (256, 8)):
        model = meta_model(ModelConfig(vocab_size=32000, n_layers=40, d_model=5120, n_heads=40,
                                       n_kv_heads=heads, d_ff=13824))
        read = [x for cache in model.new_cache(B, 1024) for x in cache.columns[:2]]
        n = 2 * sum(x.numel() for x in [*model.parameters(), *read] if x.ndim > 1)  # bytes
        s = n / DEVICES["H100"][2]  # at least
        print(f"  {B:3d} texts, {heads:2d} kv_heads: {n / 1e9:6.2f} GB {1e3 * s:6.2f} ms a token, "
              f"{B / s:6.0f} tokens/s")
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=512, seq_len=512, n_layers=4, d_model=256)).eval()
    print("\na random model of 4 layers, d_model 256; 128 tokens drawn after a prompt of 64:")
    for B, use_cache in ((1, False), (1, True), (8, True), (32, True)):
        start = time.perf_counter()
        generate(model, torch.randint(0, 512, (B, 64)).tolist(), Sampling(128), use_cache)
        print(f"  batch {B:2d}: {128 * B / (time.perf_counter() - start):7.0f} tokens/s"
              + " without a cache" * (not use_cache))
    w = 4 * sum(p.numel() for p in model.parameters())
    many, one = (sum(model.flops(T, 64).values()) / w for T in (64, 1))
    print(f"FLOPs a byte: prefill {many:.1f}, decoding {one:.1f}: a batch shares the reading")
def main(args):
    if not (args.run or args.prompt or args.eval or args.what): return lesson()
    if not args.run: raise UserError("run: got none, wanted one to read; set --run NAME")
    given = {f.name: getattr(args, f.name) for f in fields(Sampling) if hasattr(args, f.name)}
    how = Sampling(**{"temperature": 0.8, **given})
    run, device = find_run(args.run), pick_device(args.device)
    model, tokenizer = load_model(run, device), load_tokenizer(run)
    if model.cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{run}: got a tokenizer of {tokenizer.vocab_size} ids and a model of "
                        f"{model.cfg.vocab_size}, wanted the same; use an unchanged run directory")
    if args.int8: quantize(model)
    if args.eval: return print(measure(model, tokenizer, args.eval, args.shots, args.letter))
    if how.stop is None: how = replace(how, stop=tokenizer.eot if model.eos is None else model.eos)
    guess = look_up if args.guess == "look_up" else None
    if args.guess and not guess:
        guess = draft_of(draft := load_model(find_run(args.guess), device))
        if draft.cfg.vocab_size != model.cfg.vocab_size: raise UserError(
            f"guess: got a model of {draft.cfg.vocab_size} tokens, wanted {model.cfg.vocab_size}")
    engine = Engine(model, guess=guess, use_cache=not args.no_cache)
    print(f"{run}: {model.cfg}\n{device} ({device_name(device)}), float32, "
          f"{torch.get_num_threads()} threads, {how}", file=sys.stderr)
    if args.what: return chat(engine, tokenizer, how)
    start, prompts = time.perf_counter(), args.prompt or [None]
    stream, many = TextStream(tokenizer, show), len(prompts) > 1
    texts = [engine.add(encode_prompt(tokenizer, a, engine.limit), replace(how, seed=how.seed + i),
                        None if many else stream.put) for i, a in enumerate(prompts)]
    show("" if many else prompts[0] or "")
    while engine.step(): pass
    stream.flush()
    whole = [(a or "") + tokenizer.decode(text.new) for a, text in zip(prompts, texts)]
    print(*whole * many, sep="\n---\n")
    made, took = sum(text.n_new for text in texts), time.perf_counter() - start
    print(f"{made} tokens, {made / took:.0f} tokens/s, {engine.passes} passes, of {engine.guessed} "
          f"guesses {engine.accepted} accepted", file=sys.stderr)
def build_parser():
    parser = argparse.ArgumentParser(description="A lesson on decoding; with --run text of a model")
    add = parser.add_argument
    add("what", nargs="?", choices=["chat"], help="talk with a run (default: it goes on alone)")
    add("--run", help="run directory, or its name under runs/ (default: none, the lesson)")
    add("--prompt", action="append", help="text to continue, or several (default: a new document)")
    add("--guess", help="look_up, or a run of the same tokenizer, guesses ahead (default: none)")
    add("--int8", action="store_true", help="eight bits: less memory, no more speed (default: off)")
    add("--eval", help="a text, or questions (jsonl, csv), to measure the run on (default: none)")
    add("--shots", type=int, default=0, help="questions that are answered before (default: 0)")
    add("--letter", action="store_true", help="choices by letter (default: by their texts)")
    add("--no_cache", action="store_true", help="recompute all for each token (default: off)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add_fields(parser, Sampling, {"sample.py": {"temperature": 0.8}})
    return parser
if __name__ == "__main__":
    try: main(build_parser().parse_args())
    except KeyboardInterrupt: print()
