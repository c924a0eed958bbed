"""model.py - a language model: from token ids to a probability for every next token.

THE IDEA
    A language model reads tokens t_1..t_T and says, at every place, how probable each possible next
    token is. All of today's keep a residual stream: one vector of d_model numbers per token, to
    which each layer adds twice. A *mixer* lets a token fetch from earlier tokens; an *FFN* works on
    each token alone. Positions tell the order; norms and initial scales keep numbers near one.
    Architectures differ in which mixer, which FFN, which norm and where, so a model here is two
    strings, repeated until every layer has its letter, mixers="WWWWWA" and ffns="s", and a few
    sizes. A new mechanism is a class with the same contract and one new row.

THE MATHS
    attention   y = softmax(Q K^T / sqrt(Dh) + M) V        M = 0 where a token may look, else -inf
    recurrence  S_t = a_t S_{t-1} + k_t w_t^T, y_t = S_t^T q_t    linear attention, SSM, delta rule
    RMSNorm     y = g x / sqrt(mean(x^2) + eps)            g a learned gain; LayerNorm: less mean
    SwiGLU      y = W_down (silu(W_gate x) * (W_up x))     experts: sum_e p_e FFN_e(x), K of E
    RoPE        (a, b) -> (a cos - b sin, b cos + a sin)   at angle pos theta^(-2i/Dh), i < Dh/2
    loss        -log softmax(z)[target] = logsumexp(z) - z[target], in nats

THE COSTS (a product of (m, k) and (k, n) takes 2mkn FLOPs; backward costs twice the forward)
    a token forward     2 per weight in a matrix that it meets, and 4 S H Dh to attend to S places
    a token in training three times that: 6 N for N weights, and 12 S H Dh a layer
    a cache             2 Hkv Dh numbers per token and layer; R + d_rope if latent; a recurrence
                        keeps H N Dv per layer, whatever the length
    Each mechanism counts its own (`flops`), and a test holds the sum against torch's counter.

SHAPES
    B batch, T new positions, S positions attended, D d_model, H n_heads, Hkv n_kv_heads, Dh d_head,
    R d_latent, N d_state, F d_ff, E n_experts, K n_active, V vocab_size, L n_layers. Heads stand
    before time: (B, H, T, Dh). Weights are (out, in). Masks are bool, True = may look.

CONTENTS  ModelConfig / files of tensors / Linear, norms / positions / Context, caches / MIXERS /
          FFNS / Block, LM / PRESETS / save_model, load_model / the lesson, bench
NOT HERE  the operations beneath (kernels.py), sharding (parallel.py), sampling (sample.py)
RUN       python model.py          # parameters and FLOPs; last line "... of the FLOPs at 175B"
          python model.py bench    # tokens/s of every mixer at three lengths, of experts
REFERENCES
    Vaswani et al. 2017 (1706.03762) attention, sinusoids; Xiong et al. 2020 (2002.04745) pre-norm;
    Zhang, Sennrich 2019 (1910.07467) RMSNorm; Su et al. 2021 (2104.09864) RoPE; Shazeer 2019, 2020
    (1911.02150, 2002.05202) MQA, GLU; Ainslie et al. 2023 (2305.13245) GQA; Beltagy et al. 2020
    (2004.05150) windows; Henry et al. 2020 (2010.04245) QK-norm (ours is an RMSNorm); So et al.
    2021 (2109.08668) ReLU^2; Gemma Team 2024, 2025 (2408.00118, 2503.19786) soft-cap, sandwich;
    Glorot, Bengio 2010 initial scale; Press, Wolf 2017 (1608.05859) tying; others at their class
EXERCISE  Empty `KVCache.update` and `MoE.forward`; fill them until
          `pytest test_all.py -k "cache or documents or experts"` is green again.
"""
import argparse, dataclasses, json, math, struct, zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bpe import UserError, atomic_write
from kernels import (CHUNK, attention, cross_entropy, keep_freed_memory, long_conv,
                     long_conv_reference, scan, seconds, short_conv, softmax, take, up)

# -----------------------------------------------------------------------------
# Configuration
# One frozen dataclass is the vocabulary of this file, and its only validator. train.py makes a flag
# of each field, so flag, attribute and README are spelled alike.

def flag(default, help, of=""):
    """A dataclass field that knows what --help says of it, and which letters read it (any: "")."""
    return field(default=default, metadata={"help": help, "of": of})

def need_field(config, ok, name, wanted):
    """The error message for a field that is not ok."""
    if not ok:
        got = getattr(config, name)
        raise UserError(f"{name}: got {got!r}, wanted {wanted}; set --{name}")

@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = flag(4096, "number of different tokens")
    seq_len: int = flag(256, "context: tokens of a training sequence")
    n_layers: int = flag(4, "blocks")
    d_model: int = flag(256, "width of the residual stream")
    n_heads: int = flag(4, "query heads")
    n_kv_heads: int | None = flag(None, "key/value heads; none: n_heads (MHA), fewer: GQA, 1: MQA",
                                  "AWN")
    d_head: int | None = flag(None, "width of a head; none: d_model / n_heads", "AWNMLDS")
    d_ff: int | None = flag(None, "hidden width of an FFN; none: 4 d_model, or 8/3 if gated")
    mixers: str = flag("A", "letters tiled over the depth: A attention, W sliding window, N without "
                       "positions, M latent, L linear, D delta rule, S state space, H Hyena")
    ffns: str = flag("s", "tiled letters: r ReLU, u ReLU^2, e GELU, g GeGLU, s SwiGLU, x experts")
    window: int | None = flag(None, "keys that W sees, itself included; none: seq_len / 4", "W")
    d_latent: int | None = flag(None, "latent width of M; none: 4 d_head", "M")
    d_rope: int | None = flag(None, "width of M's rotary key; none: d_head / 2", "M")
    d_state: int = flag(128, "rows of S's state", "S")
    n_experts: int = flag(8, "experts to choose from", "x")
    n_active: int = flag(2, "experts chosen for a token", "x")
    n_shared: int | None = flag(None, "experts that every token goes through besides", "x")
    d_expert: int | None = flag(None, "hidden width of one; none: an FFN's / n_active", "x")
    balance: float = flag(0.01, "weight of the loss that balances experts' load", "x")
    balance_bias: float = flag(0.0, "step of biases that balance it without a loss", "x")
    router_z: float = flag(1e-3, "weight of the loss on large router logits", "x")
    norm: str = flag("rms", "rms or layer")
    norm_place: str = flag("pre", "pre, post, or sandwich (before and after)")
    norm_eps: float = flag(1e-5, "added to the mean square or variance")
    pos: str = flag("rope", "positions: rope, learned, sinusoidal or none")
    rope_theta: float = flag(1e4, "base of RoPE's wavelengths", "AWM")
    qk_norm: bool = flag(False, "RMSNorm on each query and key, before RoPE", "AWN")
    softcap: float | None = flag(None, "logits become c tanh(logits / c); none: as they are")
    tie: bool = flag(False, "the output head is the embedding")
    bias: bool = flag(False, "biases in linear layers (but the head) and in LayerNorm")
    qkv_bias: bool = flag(False, "biases in the projections to q, k and v", "AWN")
    embed_scale: bool = flag(False, "multiply embeddings by sqrt(d_model)")
    zero_init: bool = flag(False, "what blocks add, and an untied head, start at zero")
    init_std: float | None = flag(None, "std of initial weights; none: sqrt(2/(in+out))")
    dropout: float = flag(0.0, "probability, in embeddings, attention and what blocks add")

    def __post_init__(self):
        need, letters = partial(need_field, self), set(self.mixers + self.ffns)
        for f in dataclasses.fields(self):
            value, kind, of = getattr(self, f.name), str(f.type), f.metadata["of"]
            if value is None: need("None" in kind, f.name, "a value")
            elif "int" in kind: need(type(value) is int and value >= 1, f.name, "a positive integer")
            elif "float" in kind: need(0 <= value < math.inf, f.name, "a finite number, 0 or more")
            # No silent knobs: a field of a mechanism that is absent must hold its default.
            need(not of or set(of) & letters or value == f.default, f.name,
                 f"its default, as no layer is {' or '.join(of)}")
        for name, known in (("norm", NORMS), ("norm_place", PLACES), ("pos", POSITIONS)):
            need(getattr(self, name) in known, name, " or ".join(known))
        for name, known in (("mixers", MIXERS), ("ffns", FFNS)):
            own = getattr(self, name)
            need(own and set(own) <= set(known), name, f"letters of {''.join(known)}")
            need(self.n_layers % len(own) == 0, name,
                 f"as many letters as divide {self.n_layers} layers")
        for name in ("softcap", "init_std", "norm_eps", "rope_theta"):
            need(getattr(self, name) != 0, name, "a positive number")
        divides = self.d_head or self.d_model % self.n_heads == 0
        need(divides, "n_heads", f"a divisor of d_model {self.d_model}")
        # Defaults that depend on other fields are resolved here, once, though the class is frozen:
        # so vary the arguments of `preset`, not a finished config by dataclasses.replace.
        Dh = self.d_head or self.d_model // self.n_heads
        late = dict(n_kv_heads=self.n_heads, d_head=Dh, window=-(-self.seq_len // 4),
                    d_latent=4 * Dh, d_rope=max(2, Dh // 4 * 2))
        for f in dataclasses.fields(self):
            if f.name in late and getattr(self, f.name) is None and set(f.metadata["of"]) & letters:
                object.__setattr__(self, f.name, late[f.name])
        for name, ok, wanted in (
                ("n_kv_heads", self.n_heads % (self.n_kv_heads or 1) == 0, "a divisor of n_heads"),
                ("d_head", self.pos != "rope" or (self.d_head or 0) % 2 == 0, "an even number"),
                ("d_rope", self.pos != "rope" or (self.d_rope or 0) % 2 == 0, "an even number"),
                ("d_model", self.pos != "sinusoidal" or self.d_model % 2 == 0, "an even number"),
                ("rope_theta", self.pos == "rope" or self.rope_theta == 1e4, "its default"),
                ("dropout", self.dropout < 1, "a probability below 1"),
                ("n_active", self.n_active <= self.n_experts, "at most n_experts")):
            need(ok, name, wanted)

# -----------------------------------------------------------------------------
# Files of tensors: safetensors
# Eight bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), then
# the raw numbers. Nothing in it can be executed, unlike in a pickle, so a stranger's file is safe
# to open. Our files carry a checksum: a damaged checkpoint is found before it is trained on.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

def save_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} and {str: str} as one safetensors file, whole or not at all."""
    names, header, blobs, start = {v: k for k, v in DTYPES.items()}, {}, [], 0
    for name, t in tensors.items():
        flat = t.detach().cpu().contiguous().reshape(-1)
        blobs.append(memoryview(flat.view(torch.uint8).numpy()))  # its bytes, whatever the dtype
        end = start + len(blobs[-1])
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[start, end])
        start = end
    metadata = dict(metadata or {})
    metadata["crc32"] = str(checksum(metadata, header, blobs))
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight bytes
    with atomic_write(path) as f:
        for part in (struct.pack("<Q", len(text)), text, *blobs): f.write(part)

def checksum(metadata, header, blobs):
    crc = zlib.crc32(json.dumps([metadata, header]).encode())
    for blob in blobs: crc = zlib.crc32(blob, crc)
    return crc

def load_tensors(path):
    """Reads a safetensors file -> ({name: tensor}, metadata); UserError says what is wrong."""
    try:
        data, out, end = bytearray(Path(path).read_bytes()), {}, 0
        n = 8 + struct.unpack("<Q", data[:8])[0]
        header = dict(json.loads(data[8:n]))
        metadata = header.pop("__metadata__", {})
        for name, h in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (a, b), dtype = h["data_offsets"], DTYPES[h["dtype"]]
            if a != end: raise ValueError(f"{name} begins at {a}, not at {end}")
            raw = torch.frombuffer(data, dtype=torch.uint8)[n + a:n + b].clone()  # clone: aligned
            out[name], end = raw.view(dtype).reshape(h["shape"]), b
        if len(data) != n + end: raise ValueError(f"{len(data):,} bytes, not {n + end:,}")
        crc = metadata.pop("crc32", None)  # only our own files have it
        if crc and int(crc) != checksum(metadata, header, [memoryview(data)[n:]]):
            raise ValueError("its checksum does not match")
        return {name: out[name] for name in header}, metadata
    except (OSError, struct.error, ValueError, LookupError, TypeError, RuntimeError) as e:
        raise UserError(f"{path}: got {type(e).__name__}: {e}; wanted a whole safetensors file of "
                        f"{', '.join(DTYPES)}; check the path, or restore the file from a copy")

# -----------------------------------------------------------------------------
# Linear, Embedding, norms
# The weights that the optimizer moves are float32; the residual stream may be bfloat16. A Linear
# casts its weight to the dtype of what comes in, so mixed precision is one cast at the bottom of
# the model. What adds up many numbers (norms, softmax, loss) works in float32 at least: `up`.

def fresh(*shape, std):
    """A parameter drawn from a normal distribution cut at three standard deviations."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-3 * std, b=3 * std)
                        if std else torch.zeros(*shape))

class Linear(nn.Module):
    """y = x W^T + b. Glorot's std keeps the variance of x, and of gradients, near what it was."""
    def __init__(self, d_in, d_out, bias=False, std=None):
        super().__init__()
        self.weight = fresh(d_out, d_in, std=math.sqrt(2 / (d_in + d_out)) if std is None else std)
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x):  # (..., in) @ (in, out) -> (..., out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

class Embedding(nn.Module):
    """One row per token: a product with one-hot vectors, done by looking up."""
    def __init__(self, n, d, std):
        super().__init__()
        self.weight = fresh(n, d, std=std)

    def forward(self, ids):  # (B, T) -> (B, T, d)
        return F.embedding(ids, self.weight)

class RMSNorm(nn.Module):
    def __init__(self, d, eps, bias=False):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        y = up(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)  # eps inside the root
        return y.to(x.dtype) * self.weight.to(x.dtype)  # cast, then scale: as Llama does

class LayerNorm(RMSNorm):
    def __init__(self, d, eps, bias=True):
        super().__init__(d, eps)
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, x):
        y = super().forward(up(x) - up(x).mean(-1, keepdim=True)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

NORMS = {"rms": RMSNorm, "layer": LayerNorm}

# -----------------------------------------------------------------------------
# Positions
# Attention sees a set: shuffle keys and values alike and nothing changes; only the causal mask
# tells order, and "none" relies on it. Else a token's place is added to its vector (learned,
# sinusoidal), or queries and keys are turned by it: RoPE rotates pairs of features, and the product
# of two turned vectors depends on the difference of their angles alone.

POSITIONS = ("rope", "learned", "sinusoidal", "none")

def sinusoid(pos, d):
    """(B, T) -> (B, T, d): sines of falling frequency, then the cosines, which the paper puts
    between them (1706.03762, 3.5)."""
    angle = pos[..., None] * 1e4 ** (-torch.arange(0, d, 2, device=pos.device) / d)  # (B, T, d/2)
    return torch.cat((angle.sin(), angle.cos()), -1)

def rope_tables(pos, d_head, theta):
    """(B, T) -> cos, sin (B, 1, T, Dh/2) in float32: bf16 cannot tell position 256 from 257."""
    freq = theta ** (-torch.arange(0, d_head, 2, device=pos.device) / d_head)
    angle = pos[:, None, :, None] * freq
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """RoPE on (B, H, T, Dh). Feature i of the first half pairs with feature i of the second, as in
    Llama's and Qwen's checkpoints; the paper pairs neighbours, a permutation of W_q and W_k."""
    a, b = up(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

# -----------------------------------------------------------------------------
# Context and caches
# What a mixer must know besides x is in one Context made per forward. pos (B, T) is a token's
# position in its document: a 0 begins a document, past which nobody looks back, and -1 is padding.
# Training, prefill and decoding are one path; they differ in whether a cache was passed.

def documents(pos):
    """Numbers the documents of each row, along the last axis: [0 1 2 0 1] -> [1 1 1 2 2]."""
    return (pos == 0).cumsum(-1)

def visible(q_pos, q_doc, k_pos, k_doc, window=None):
    """Which keys a query may see, (B, 1, T) and (B, 1, S) -> (B, 1, T, S) bool: those of its
    document, not later, fewer than `window` steps back (so `window` keys, itself included). Padding
    sees padding, so that no row is empty: softmax over nothing is NaN, and NaN times 0 is NaN."""
    gap = q_pos[..., None] - k_pos[..., None, :]
    ok = (gap >= 0) & (q_doc[..., None] == k_doc[..., None, :])
    ok &= (q_pos < 0)[..., None] == (k_pos < 0)[..., None, :]
    return ok if window is None else ok & (gap < window)

class Context:
    """tokens and pos (B, T), RoPE's tables, masks by window: made once, shared by all layers. If
    every row counts from 0 (`plain`), tables and masks are made for one row, and broadcast."""
    def __init__(self, cfg, tokens, pos=None, start=None):
        self.tokens, self.masks, self.tables = tokens, {}, {}
        self.theta = cfg.rope_theta if cfg.pos == "rope" else None
        self.plain = pos is None and start is None
        if pos is None:
            pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            if start is not None: pos = pos + start  # (B, T) + (B, 1)
        self.pos, self.rows = pos, pos[:1] if self.plain else pos
        self.order = None if self.plain else (pos < 0).sort(dim=1, stable=True).indices

    def turn(self, x):
        """RoPE on (B, H, T, Dh) at these positions, if the model has it."""
        if self.theta is None: return x
        d = x.shape[-1]
        if d not in self.tables: self.tables[d] = rope_tables(self.rows, d, self.theta)
        return rotate(x, *self.tables[d])

    def mask(self, window):
        """(B or 1, 1, T, T), or None for plain causal attention: fused kernels need none for it."""
        if self.plain and (window is None or window >= self.tokens.shape[1]): return None
        if window not in self.masks:
            pos = self.rows[:, None]
            self.masks[window] = visible(pos, documents(pos), pos, documents(pos), window)
        return self.masks[window]

    def packed(self, x):
        """(B, T, ...) with each row's padding moved behind its tokens; `unpacked` undoes it. What
        convolves or carries a state then finds a token's predecessor at its left."""
        return x if self.order is None else take(x, self.order)

    def unpacked(self, x):
        return x if self.order is None else take(x, self.order.argsort(1))

class KVCache:
    """Keys and values of one layer, so that decoding a token costs a row of the attention matrix,
    not all of it: O(T^2) for a text instead of O(T^3). Token i stands in column i; with a window in
    column i modulo `size`, a ring: memory stays constant, and SLACK tokens can be taken back."""
    SLACK = 16  # [our choice]

    def __init__(self, batch, size, heads, d_k, d_v, window, device, dtype):
        self.size = size if window is None else min(size, window + self.SLACK)
        whole = partial(torch.full, device=device)
        self.columns = [*(whole((batch, heads, self.size, d), 0.0, dtype=dtype) for d in (d_k, d_v)),
                        *(whole((batch, 1, self.size), -1) for _ in ("pos", "doc"))]
        self.n, self.lost, self.window = 0, 0, window  # tokens seen; of these no longer held

    def update(self, k, v, pos):
        """Appends k, v (B, Hkv, T, Dh) at positions pos (B, T) -> keys and values (B, Hkv, S, Dh)
        and the mask (B, 1, T, S) of the new queries."""
        held, end, pos = min(self.n, self.size), self.n + k.shape[2], pos[:, None]
        assert self.window or end <= self.size, \
            f"the cache holds {self.size} positions, {end} are needed"
        doc = documents(pos) + (self.last(3) if self.n else 0)
        new = (k, v, pos, doc)
        # A ring is read before it is written: a long prefill overwrites what its start still sees.
        if self.window: seen = [torch.cat((c[:, :, :held], x), 2) for c, x in zip(self.columns, new)]
        at = torch.arange(self.n, end, device=pos.device)[-self.size:] % self.size
        for column, x in zip(self.columns, new): column[:, :, at] = x[:, :, -self.size:]
        if not self.window: seen = [c[:, :, :end] for c in self.columns]
        self.n, self.lost = end, max(self.lost, end - self.size)
        return seen[0], seen[1], visible(pos, doc, seen[2], seen[3], self.window)

    def last(self, i):
        return self.columns[i][:, :, (self.n - 1) % self.size, None]

    def next_pos(self):
        """(B, 1): the position after the last one of each row; None if the cache is empty."""
        return self.last(2)[:, 0] + 1 if self.n else None

    def truncate(self, n):
        """Forgets all but the first n tokens (what followed was a wrong guess)."""
        assert 0 <= n <= self.n and max(0, n - (self.window or n) + 1) >= self.lost, \
            f"cannot keep {n} of {self.n} tokens: those before {self.lost} are overwritten"
        gone = torch.arange(max(n, self.n - self.size), self.n) % self.size
        self.columns[3][:, :, gone] = -1  # in no document: never seen again
        self.n = n

class StateCache:
    """What a recurrence keeps of the past: a few tensors, `slot`, whose size does not grow. They
    cannot be run backwards, so the slot after each of the last updates is kept as a snapshot."""
    SNAPSHOTS = 4  # [our choice]

    def __init__(self, *slot):
        self.saved = [(0, None, slot)]

    n, slot = (property(lambda self, i=i: self.saved[-1][i]) for i in (0, 2))

    def update(self, pos, slot):
        self.saved.append((self.n + pos.shape[1], pos[:, -1:] + 1, slot))
        del self.saved[:-self.SNAPSHOTS]

    def next_pos(self):
        return self.saved[-1][1]

    def truncate(self, n):
        kept = [s for s in self.saved if s[0] <= n]
        assert kept and kept[-1][0] == n, f"no snapshot at {n}, only at {[s[0] for s in self.saved]}"
        self.saved = kept

# -----------------------------------------------------------------------------
# Mixers: how a token reads from other tokens
# Contract: __init__(cfg), forward(x, ctx, cache=None) -> y, new_cache(batch, size, device, dtype),
# flops(T, S) -> {part: FLOPs}. A cache has n, update, next_pos and truncate.

def last_std(cfg):
    """Initial std of a matrix that writes to the stream: zero; or GPT-2's, smaller by sqrt(2L), so
    that 2L additions together are as large as one would be; or Linear's own (None)."""
    if cfg.zero_init: return 0.0
    return None if cfg.init_std is None else cfg.init_std / math.sqrt(2 * cfg.n_layers)

def split(x, heads):
    """(B, T, H Dh) -> (B, H, T, Dh)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

def merge(x):
    """(B, H, T, Dh) -> (B, T, H Dh)"""
    return x.transpose(1, 2).flatten(2)

class Attention(nn.Module):
    """MHA, GQA or MQA by n_kv_heads; over the whole past or, if local, the last cfg.window keys;
    with RoPE or, if not turned, told the order by its mask alone (2305.19466)."""
    def __init__(self, cfg, local=False, turned=True):
        super().__init__()
        self.cfg, self.window, self.turned = cfg, cfg.window if local else None, turned
        self.q_dim, self.kv_dim = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        into = partial(Linear, cfg.d_model, bias=cfg.bias or cfg.qkv_bias, std=cfg.init_std)
        self.q_proj, self.k_proj, self.v_proj = map(into, (self.q_dim, self.kv_dim, self.kv_dim))
        self.o_proj = Linear(self.q_dim, cfg.d_model, cfg.bias, last_std(cfg))
        norm = partial(RMSNorm, cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()  # scores are bounded by the gains

    def forward(self, x, ctx, cache=None):
        c, turn = self.cfg, ctx.turn if self.turned else nn.Identity()
        q = turn(self.q_norm(split(self.q_proj(x), c.n_heads)))
        k = turn(self.k_norm(split(self.k_proj(x), c.n_kv_heads)))
        v, mask = split(self.v_proj(x), c.n_kv_heads), None
        if cache is None: mask = ctx.mask(self.window)
        else: k, v, mask = cache.update(k, v, ctx.pos)
        y = attention(q, k, v, mask, c.dropout if self.training else 0.0)
        return self.o_proj(merge(y))

    def new_cache(self, batch, size, device, dtype):
        width = self.cfg.d_head
        return KVCache(batch, size, self.cfg.n_kv_heads, width, width, self.window, device, dtype)

    def flops(self, T, S):
        """T queries over S keys, all of them: a kernel may skip what causality or a window hide."""
        D, q, kv = self.cfg.d_model, self.q_dim, self.kv_dim
        return {"qkv": 2 * T * D * (q + 2 * kv), "scores": 2 * T * S * q, "values": 2 * T * S * q,
                "out": 2 * T * q * D}

class LatentAttention(nn.Module):
    """MLA, DeepSeek-V2 (2405.04434): keys and values of all heads are projections of one latent of
    R numbers, k = W_uk c and v = W_uv c, and RoPE turns a key that the heads share. The cache holds
    R + d_rope numbers a token, not 2 H Dh. It need not expand them: q . (W_uk c) = (W_uk^T q) . c,
    so with W_uk absorbed by the query, the heads all attend to c itself, as MQA of width R does."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, H, Dh, R = cfg, cfg.n_heads, cfg.d_head, cfg.d_latent
        make = partial(Linear, bias=cfg.bias, std=cfg.init_std)
        self.q_proj = make(cfg.d_model, H * (Dh + cfg.d_rope))
        self.kv_a_proj_with_mqa = make(cfg.d_model, R + cfg.d_rope)
        self.kv_a_layernorm = RMSNorm(R, cfg.norm_eps)
        self.kv_b_proj = Linear(R, 2 * H * Dh, std=cfg.init_std)  # the rows of W_uk, W_uv by head
        self.o_proj = Linear(H * Dh, cfg.d_model, cfg.bias, last_std(cfg))

    def forward(self, x, ctx, cache=None):
        cfg, H, Dh, R = self.cfg, self.cfg.n_heads, self.cfg.d_head, self.cfg.d_latent
        q, q_r = split(self.q_proj(x), H).split((Dh, cfg.d_rope), -1)
        c, k_r = self.kv_a_proj_with_mqa(x)[:, None].split((R, cfg.d_rope), -1)  # (B, 1, T, R)
        c, q_r, k_r = self.kv_a_layernorm(c), ctx.turn(q_r), ctx.turn(k_r)
        drop = cfg.dropout if self.training else 0.0
        if cache is None:
            k, v = split(self.kv_b_proj(c[:, 0]), H).chunk(2, -1)
            k = torch.cat((k, k_r.expand(-1, H, -1, -1)), -1)  # (B, H, T, Dh + d_rope)
            y = attention(torch.cat((q, q_r), -1), k, v, ctx.mask(None), drop)
        else:
            up_k, up_v = self.kv_b_proj.weight.to(x.dtype).view(H, 2 * Dh, R).chunk(2, 1)
            c, _, mask = cache.update(torch.cat((c, k_r), -1), c[..., :0], ctx.pos)
            q = torch.cat((q @ up_k, q_r), -1)  # (B,H,T,Dh) @ (H,Dh,R) -> (B,H,T,R)
            q = q * math.sqrt((R + cfg.d_rope) / (Dh + cfg.d_rope))  # attention divides by a root
            y = attention(q, c, c[..., :R], mask, drop) @ up_v.mT  # @ (H,R,Dh) -> (B,H,T,Dh)
        return self.o_proj(merge(y))

    def new_cache(self, batch, size, device, dtype):
        return KVCache(batch, size, 1, self.cfg.d_latent + self.cfg.d_rope, 0, None, device, dtype)

    def flops(self, T, S):
        """Of the expanded form: training's."""
        c, q = self.cfg, self.cfg.n_heads * self.cfg.d_head
        r = c.n_heads * c.d_rope
        down = c.d_model * (q + r + c.d_latent + c.d_rope)
        return {"qkv": 2 * T * (down + 2 * c.d_latent * q), "scores": 2 * T * S * (q + r),
                "values": 2 * T * S * q, "out": 2 * T * q * c.d_model}

class Recurrent(nn.Module):
    """Attention whose past has a fixed size: each head keeps a matrix S (N, Dv), its memory,
        S_t = a_t S_{t-1} + k_t w_t^T       y_t = S_t^T q_t       (see `scan`)
    so training is linear in length and decoding constant. Subclasses say what decays (a_t), what is
    written (w_t) and what q, k, v pass through. With gates, q, k, v first go through a short
    convolution, and y through a norm and a gate, as in Mamba-2 and Gated DeltaNet."""
    TAPS = 4   # of the short convolution [2405.21060]
    delta = extra = 0

    def __init__(self, cfg, d_k, d_v, heads, k_heads, gates):
        super().__init__()
        self.cfg, self.d_k, self.d_v, self.heads, self.k_heads = cfg, d_k, d_v, heads, k_heads
        self.sizes, self.gates = (k_heads * d_k, k_heads * d_k, heads * d_v), gates
        into = partial(Linear, cfg.d_model, bias=cfg.bias, std=cfg.init_std)
        self.q_proj, self.k_proj, self.v_proj = map(into, self.sizes)
        self.o_proj = Linear(self.sizes[2], cfg.d_model, cfg.bias, last_std(cfg))
        if gates is not None: self.conv = fresh(self.TAPS, sum(self.sizes), std=self.TAPS ** -0.5)
        if gates:
            self.gate_proj, self.a_proj = into(self.sizes[2]), into(gates * heads)
            self.o_norm = RMSNorm(d_v, cfg.norm_eps)
            # Steps dt from 1e-3 to 1e-1 and rates A from 1 to 16: memories of many lengths.
            dt = torch.logspace(-3, -1, heads)
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt
            self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())

    def forward(self, x, ctx, cache=None):
        x, pos = ctx.packed(x), ctx.packed(ctx.pos)
        tail, *state = (cache or self.new_cache(len(x), 0, x.device, x.dtype)).slot
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        if self.gates is not None: qkv, tail = short_conv(qkv, self.conv, pos, tail)
        q, k, v = qkv.split(self.sizes, -1)
        q, k, v = split(q, self.k_heads), split(k, self.k_heads), split(v, self.heads)
        y, *state = self.mix(x, q, k, v, pos, *state)
        if self.gates: y = self.o_norm(y) * F.silu(split(self.gate_proj(x), self.heads))
        if cache is not None: cache.update(ctx.pos, (tail, *state))
        return ctx.unpacked(self.o_proj(merge(y)))

    def new_cache(self, batch, size, device, dtype):
        tail = torch.zeros(batch, self.TAPS - 1, sum(self.sizes), device=device, dtype=dtype)
        shape = (batch, self.heads, self.d_k, self.d_v + self.extra)
        return StateCache(tail, up(torch.zeros(shape, device=device, dtype=dtype)))

    def flops(self, T, S):
        """Independent of S. torch's counter leaves out the delta rule's solve, as it does FFTs."""
        C = min(CHUNK, T)
        P, D, H, N, Dv = -(-T // C) * C, self.cfg.d_model, self.heads, self.d_k, self.d_v
        gate = (H * Dv + self.gates * H) if self.gates else 0
        return {"qkv": 2 * T * D * (sum(self.sizes) + gate),
                "scores": 2 * P * C * N * self.k_heads * (1 + self.delta),
                "values": 2 * P * H * (C + N * (2 + self.delta)) * (Dv + self.extra),
                "out": 2 * T * H * Dv * D}

class LinearAttention(Recurrent):
    """Katharopoulos et al. 2020 (2006.16236): exp(q . k) becomes f(q) . f(k) with f = elu + 1 > 0;
    then sum_s f(q) . f(k_s) v_s = f(q) S with S the sum of f(k_s) v_s^T. A column of ones beside v
    adds up the weights, by which y is divided. Nothing decays."""
    extra = 1

    def __init__(self, cfg):
        super().__init__(cfg, cfg.d_head, cfg.d_head, cfg.n_heads, cfg.n_heads, None)

    def mix(self, x, q, k, v, pos, S):
        v, log_a = F.pad(v, (0, 1), value=1.0), x.new_zeros(len(x), 1, x.shape[1])
        y, S = scan(F.elu(q) + 1, F.elu(k) + 1, v, log_a, None, pos, S)
        return y[..., :-1] / y[..., -1:].clamp(min=1e-9), S  # of padding at the start 0 / 0

class StateSpace(Recurrent):
    """Mamba-2, Dao and Gu 2024 (2405.21060): a linear system S' = -A S + B x in continuous time,
    seen at steps dt that each token chooses: a_t = exp(-dt A), written dt x_t. q and k, the paper's
    C and B, are shared by all heads; D x_t is added. (Mamba-2 has its norm behind the gate.)"""
    def __init__(self, cfg):
        super().__init__(cfg, cfg.d_state, 2 * cfg.d_head, cfg.n_heads, 1, 1)
        self.D = nn.Parameter(torch.ones(cfg.n_heads, 1, 1))

    def mix(self, x, q, k, v, pos, S):
        dt = F.softplus(up(self.a_proj(x)) + self.dt_bias).mT  # (B, H, T)
        y, S = scan(q, k, v * dt[..., None], -self.A_log.exp()[:, None] * dt, None, pos, S)
        return (y + self.D * v).to(x.dtype), S

class GatedDelta(Recurrent):
    """Gated DeltaNet, Yang et al. 2024 (2412.06464): the memory decays as in Mamba-2, and a token
    writes not v_t but b_t (v_t - what the memory already answers to k_t): one step of gradient
    descent, of size b_t, on |S^T k_t - v_t|^2. So a key's old value is replaced, not added to."""
    delta = 1

    def __init__(self, cfg):
        super().__init__(cfg, cfg.d_head, cfg.d_head, cfg.n_heads, cfg.n_heads, 2)

    def mix(self, x, q, k, v, pos, S):
        a, b = up(self.a_proj(x)).mT.chunk(2, 1)  # (B, H, T) each
        log_a = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None])
        q, k = F.normalize(up(q), dim=-1) * self.d_k ** -0.5, F.normalize(up(k), dim=-1)
        y, S = scan(q, k, v * b.sigmoid()[..., None], log_a, b.sigmoid(), pos, S)
        return y.to(x.dtype), S

class Hyena(Recurrent):
    """Poli et al. 2023 (2302.10866), order 2: y = q * (h conv (k * v)), by FFT in T log T. The
    filter h is as long as the text, but implicit: a small network of the distance, under a window
    that decays. No state sums up the past: decoding keeps every k * v, D numbers a token (times the
    snapshots), and a token costs S D."""
    BANDS, WIDTH = 8, 32  # sines that tell the distance, width of the network [our choice]

    def __init__(self, cfg):
        super().__init__(cfg, cfg.d_model, cfg.d_model, 1, 1, 0)
        std, self.skip = cfg.init_std, nn.Parameter(torch.ones(cfg.d_model))
        widths = (2 * self.BANDS + 1, self.WIDTH, self.WIDTH, cfg.d_model)
        self.filter = nn.ModuleList(Linear(a, b, True, std) for a, b in zip(widths, widths[1:]))

    def impulse(self, S, device):
        """h (S, D): what a token adds to those 0..S-1 places later."""
        t = torch.arange(S, device=device)[:, None] / self.cfg.seq_len
        angle = 2 * math.pi * t * torch.arange(1, self.BANDS + 1, device=device)
        h = torch.cat((t, angle.cos(), angle.sin()), -1).to(self.skip.dtype)
        for i, layer in enumerate(self.filter): h = layer(h if i == 0 else torch.sin(h))
        # The slowest window falls to 1 % at seq_len, the fastest at a tenth of it [our choice].
        return h * torch.exp(-4.6 * t * torch.linspace(1, 10, h.shape[1], device=device))

    def new_cache(self, batch, size, device, dtype):
        pos = torch.zeros(batch, 0, device=device, dtype=torch.long)
        u = torch.zeros(batch, 0, self.d_v, device=device, dtype=dtype)
        return StateCache(super().new_cache(batch, size, device, dtype).slot[0], u, pos, pos)

    def flops(self, T, S):
        inside = 2 * S * sum(layer.weight.numel() for layer in self.filter)  # once for all rows
        D = self.cfg.d_model
        return {"qkv": 6 * T * D * D, "filter": inside, "out": 2 * T * D * D}

    def mix(self, x, q, k, v, pos, u, u_pos, u_doc):
        new, T = (k * v)[:, 0], pos.shape[1]
        doc = documents(pos) + (u_doc[:, -1:] if u.shape[1] else 0)
        u, u_pos, u_doc = (torch.cat(two, 1) for two in ((u, new), (u_pos, pos), (u_doc, doc)))
        h = self.impulse(u.shape[1], x.device)
        fresh_row = (pos == torch.arange(T, device=pos.device)) | (pos < 0)
        if u.shape[1] == T and bool(fresh_row.all()): y = long_conv(up(u), h)
        else:
            mask = visible(*(t[:, None] for t in (pos, doc, u_pos, u_doc)))
            y = long_conv_reference(up(u), h, pos[:, :, None] - u_pos[:, None], mask)
        return q * (y.to(x.dtype) + self.skip.to(x.dtype) * new)[:, None], u, u_pos, u_doc

MIXERS = {"A": Attention, "W": partial(Attention, local=True), "N": partial(Attention, turned=False),
          "M": LatentAttention, "L": LinearAttention, "D": GatedDelta, "S": StateSpace, "H": Hyena}

# -----------------------------------------------------------------------------
# FFNs: what a token does alone
# Two matrices around a nonlinearity hold two thirds of a layer's weights. The gated form multiplies
# two projections; its author attributes its success to "divine benevolence" (2002.05202, sec. 4).
# Contract: forward(x) -> (y, aux), flops(T); aux may hold `loss`, to be added to the loss, and
# `load`, tokens per expert.

class FFN(nn.Module):
    def __init__(self, cfg, act, gated=False, d_ff=None):
        super().__init__()
        D = cfg.d_model  # gated: 8/3 D, floored to a multiple of 64, has the weights of 4 D ungated
        self.d_model, self.act = D, act
        self.d_ff = d_ff or cfg.d_ff or (max(64, 8 * D // 3 // 64 * 64) if gated else 4 * D)
        self.gate_proj = Linear(D, self.d_ff, cfg.bias, cfg.init_std) if gated else None
        self.up_proj = Linear(D, self.d_ff, cfg.bias, cfg.init_std)
        self.down_proj = Linear(self.d_ff, D, cfg.bias, last_std(cfg))

    def forward(self, x):
        h = self.up_proj(x)  # (B, T, D) -> (B, T, F)
        h = self.act(h) if self.gate_proj is None else self.act(self.gate_proj(x)) * h
        return self.down_proj(h), {}

    def flops(self, T):
        return {"ffn": 2 * T * self.d_model * self.d_ff * (2 if self.gate_proj is None else 3)}

class MoE(nn.Module):
    """Mixture of experts: a router chooses n_active of n_experts FFNs for each token, which add up
    weighted by the softmax of the chosen (as Mixtral, 2401.04088); n_shared are always on. Much
    memory, little arithmetic, if loads are even. A router left alone feeds the experts that it
    fed before, so either a loss E sum_e f_e P_e (2101.03961: f the share routed to e, P its mean
    probability) pulls them together, or a bias on the choice alone, moved against the load
    (2408.15664). Dropless: tokens are sorted by expert, each takes its slice, however long. The
    loss on logsumexp^2 (2202.08906) keeps logits small. Padding is routed, and counted, too."""
    def __init__(self, cfg, ffn):
        super().__init__()
        self.cfg, self.d_ff = cfg, cfg.d_expert or max(8, ffn(cfg).d_ff // cfg.n_active)
        self.gate = Linear(cfg.d_model, cfg.n_experts, std=cfg.init_std)
        self.experts = nn.ModuleList(ffn(cfg, d_ff=self.d_ff) for _ in range(cfg.n_experts))
        self.shared_experts = ffn(cfg, d_ff=self.d_ff * cfg.n_shared) if cfg.n_shared else None
        if cfg.balance_bias: self.register_buffer("bias", torch.zeros(cfg.n_experts))

    def forward(self, x):
        c, flat = self.cfg, x.flatten(0, 1)  # (N, D)
        z = up(self.gate(flat))
        p = softmax(z)  # (N, E)
        chosen = (p + self.bias if c.balance_bias else p).topk(c.n_active).indices
        weight = p.gather(1, chosen)
        weight = (weight / weight.sum(1, keepdim=True)).to(x.dtype)  # (N, K)
        order = chosen.flatten().argsort(stable=True)  # (N K): slots by expert
        load = chosen.flatten().bincount(minlength=c.n_experts)
        parts = flat[order // c.n_active].split(load.tolist())
        out = torch.cat([expert(part)[0] for expert, part in zip(self.experts, parts)])
        out = out[order.argsort()].view(len(flat), c.n_active, -1)  # back in the order of tokens
        y = (weight[:, None] @ out).view(x.shape)
        if self.shared_experts: y = y + self.shared_experts(x)[0]
        loss = c.balance * c.n_experts * (load / load.sum() * p.mean(0)).sum()
        return y, {"loss": loss + c.router_z * z.logsumexp(1).square().mean(), "load": load}

    def flops(self, T):
        c = self.cfg
        each = sum(self.experts[0].flops(T).values())
        shared = sum(self.shared_experts.flops(T).values()) if self.shared_experts else 0
        return {"ffn": 2 * T * c.d_model * (c.n_experts + c.n_active) + c.n_active * each + shared}

def relu2(x):
    return F.relu(x).square()

gelu = partial(F.gelu, approximate="tanh")  # the form that GPT-2 was trained with
FFNS = {"r": partial(FFN, act=F.relu), "u": partial(FFN, act=relu2), "e": partial(FFN, act=gelu),
        "g": partial(FFN, act=gelu, gated=True), "s": partial(FFN, act=F.silu, gated=True)}
FFNS["x"] = partial(MoE, ffn=FFNS["s"])

# -----------------------------------------------------------------------------
# Block and LM

PLACES = ("pre", "post", "sandwich")

class Block(nn.Module):
    """One layer: twice x = c(x + b(f(a(x)))), with norms a (pre), a and b (sandwich) or c (post).
    With pre-norm the stream itself is never touched, so gradients arrive whole; post-norm (2017)
    needs a warm-up. The norms have Llama's names, and Gemma's where there are four."""
    def __init__(self, cfg, mixer, ffn):
        super().__init__()
        self.place, self.drop = cfg.norm_place, nn.Dropout(cfg.dropout)
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.place == "sandwich":
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            self.add_module(name, NORMS[cfg.norm](cfg.d_model, cfg.norm_eps, cfg.bias))
        self.self_attn, self.mlp = MIXERS[mixer](cfg), FFNS[ffn](cfg)

    def forward(self, x, ctx, cache=None):
        first, second = self.input_layernorm, self.post_attention_layernorm
        if self.place == "pre":
            x = x + self.drop(self.self_attn(first(x), ctx, cache))
            y, aux = self.mlp(second(x))
            return x + self.drop(y), aux
        if self.place == "post":
            x = first(x + self.drop(self.self_attn(x, ctx, cache)))
            y, aux = self.mlp(x)
            return second(x + self.drop(y)), aux
        x = x + self.drop(second(self.self_attn(first(x), ctx, cache)))
        y, aux = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.drop(self.post_feedforward_layernorm(y)), aux

class LM(nn.Module):
    """The model. `compute_dtype` is the dtype of the stream; None means that of the weights."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, None
        # A norm likes rows of std 1, but as a head they would give logits a std of sqrt(D).
        std = cfg.init_std or (cfg.d_model ** -0.5 if cfg.tie else 1.0)
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.d_model, std)
        if cfg.pos == "learned": self.embed_positions = Embedding(cfg.seq_len, cfg.d_model, std)
        mixers, ffns = (p * (cfg.n_layers // len(p)) for p in (cfg.mixers, cfg.ffns))
        self.layers = nn.ModuleList(Block(cfg, m, f) for m, f in zip(mixers, ffns))
        self.norm = nn.Identity() if cfg.norm_place == "post" else \
            NORMS[cfg.norm](cfg.d_model, cfg.norm_eps, cfg.bias)
        head_std = 0.0 if cfg.zero_init else cfg.init_std
        self.lm_head = None if cfg.tie else Linear(cfg.d_model, cfg.vocab_size, std=head_std)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, tokens, targets=None, pos=None, cache=None):
        """tokens (B, T) -> (logits (B, T, V), aux). With targets (B, T), of which -1 does not
        count: (nats (B, T), aux), so that the caller decides how to average. pos (B, T) counts from
        0, or on from what the cache holds, unless given."""
        assert self.cfg.pos != "learned" or tokens.shape[1] <= self.cfg.seq_len, "no such position"
        ctx = Context(self.cfg, tokens, pos, cache[0].next_pos() if cache else None)
        x = self.embed_tokens(tokens)  # (B, T, D)
        if self.cfg.embed_scale: x = x * math.sqrt(self.cfg.d_model)
        if self.cfg.pos == "learned": x = x + self.embed_positions(ctx.pos.clamp(min=0))
        if self.cfg.pos == "sinusoidal": x = x + sinusoid(ctx.pos, self.cfg.d_model).to(x.dtype)
        x, aux = self.drop(x).to(self.compute_dtype or x.dtype), {"loss": 0.0, "load": []}
        for i, layer in enumerate(self.layers):
            x, extra = layer(x, ctx, cache[i] if cache else None)
            aux["loss"] = aux["loss"] + extra.get("loss", 0.0)
            if "load" in extra: aux["load"].append(extra["load"])
        logits = self.logits(self.norm(x))
        return (logits if targets is None else cross_entropy(logits, targets)), aux

    def logits(self, x):  # (B, T, D) @ (D, V) -> (B, T, V)
        z = self.lm_head(x) if self.lm_head else F.linear(x, self.embed_tokens.weight.to(x.dtype))
        cap = self.cfg.softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    @torch.no_grad()
    def rebalance(self, load):
        """Moves routers' biases by one step against the load [tokens per expert] of each layer with
        experts, summed over a batch: towards experts that got less than the mean (2408.15664)."""
        for layer, n in zip((x.mlp for x in self.layers if isinstance(x.mlp, MoE)), load):
            if self.cfg.balance_bias:
                layer.bias += self.cfg.balance_bias * torch.sign(n.sum() / len(n) - n)

    def new_cache(self, batch, size):
        """Room for `size` positions in each of `batch` rows: one cache a layer."""
        w = self.embed_tokens.weight
        return [layer.self_attn.new_cache(batch, size, w.device, self.compute_dtype or w.dtype)
                for layer in self.layers]

    def flops(self, T, S=None):
        """{part: FLOPs} of a forward pass of T new tokens of one sequence over S places (default
        T). Looking up an embedding is free."""
        total = {}
        for layer in self.layers:
            for flops in (layer.self_attn.flops(T, S or T), layer.mlp.flops(T)):
                for part, n in flops.items(): total[part] = total.get(part, 0) + n
        return {**total, "head": 2 * T * self.cfg.d_model * self.cfg.vocab_size}

    def flops_per_token(self):
        """FLOPs to train on a token at the full context: three forward passes (backward is two)."""
        return 3 * sum(self.flops(self.cfg.seq_len).values()) / self.cfg.seq_len

    def n_params(self):
        """{part: parameters}; a tied head costs nothing."""
        count = lambda *modules: sum(p.numel() for m in modules if m for p in m.parameters())
        parts = {"embed": count(self.embed_tokens, getattr(self, "embed_positions", None)),
                 "mixer": count(*(layer.self_attn for layer in self.layers)),
                 "ffn": count(*(layer.mlp for layer in self.layers)), "head": count(self.lm_head)}
        return {**parts, "norm": count(self) - sum(parts.values())}

def meta_model(cfg):
    """A model of shapes without numbers: GPT-3 fits in a laptop."""
    with torch.device("meta"): return LM(cfg)

# -----------------------------------------------------------------------------
# Presets: architectures of the field as rows; sizes are given beside them. n_kv_heads stands for
# their sharing of keys. A field that flags make meaningless (a window, when mixers is given without
# W) falls back to its default.

GQA = dict(n_kv_heads=2)
PRESETS = {
    # 1706.03762: its decoder, without the encoder
    "vaswani": dict(ffns="r", norm="layer", norm_place="post", pos="sinusoidal", bias=True,
                    tie=True, embed_scale=True, dropout=0.1),
    # Radford et al. 2019
    "gpt2": dict(ffns="e", norm="layer", pos="learned", bias=True, tie=True, init_std=0.02),
    "llama": dict(),  # 2302.13971
    "mistral": dict(mixers="W", **GQA),  # 2310.06825; there the window is 4096 of 8192
    "mixtral": dict(ffns="x", rope_theta=1e6, balance=0.02, router_z=0.0, **GQA),  # 2401.04088
    # 2407.10671 and 2505.09388: small ones are tied
    "qwen2": dict(qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, tie=True, **GQA),
    "qwen3": dict(qk_norm=True, rope_theta=1e6, norm_eps=1e-6, tie=True, **GQA),
    # 2503.19786, Gemma 3: five local layers to a global one. There global ones have a rope_theta of
    # their own; here all share one.
    "gemma": dict(mixers="WWWWWA", ffns="g", window=512, norm_place="sandwich", norm_eps=1e-6,
                  qk_norm=True, tie=True, embed_scale=True, n_layers=6, n_kv_heads=1),
    # 2405.04434, 2412.19437: a dense layer first, many small experts, balanced by biases
    "deepseek": dict(mixers="M", ffns="sxxx", n_layers=4, n_experts=16, n_active=4, n_shared=1,
                     balance=1e-4, balance_bias=1e-3, router_z=0.0, norm_eps=1e-6),
    # 2403.19887: one attention layer of eight, without positions, experts in every other layer; its
    # Mamba is the first
    "jamba": dict(mixers="SSSSASSS", ffns="sx", n_layers=8, pos="none", n_experts=16, **GQA),
    # Qwen3-Next (2025): three delta layers to one of attention; there all FFNs are experts
    "next": dict(mixers="DDDA", n_layers=4, qk_norm=True, **GQA),
    "hyena": dict(mixers="H", ffns="e", norm="layer", pos="none", bias=True),  # 2302.10866
    # what modded-nanogpt's records 5 to 8 share: QK-norm, ReLU^2, blocks that start as the identity
    "modern": dict(ffns="u", qk_norm=True, zero_init=True),
}

def fields_of(name, given):
    """A preset's row under the fields that are given, without what no layer then reads."""
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, wanted {' or '.join(PRESETS)}; set --preset")
    both = {**PRESETS[name], **given}
    letters = both.get("mixers", ModelConfig.mixers) + both.get("ffns", ModelConfig.ffns)
    of = {f.name: f.metadata["of"] for f in dataclasses.fields(ModelConfig)}
    return {k: v for k, v in both.items() if k in given or not of[k] or set(of[k]) & set(letters)}

def preset(name, **sizes):
    """ModelConfig of a named architecture; sizes, and any other field, override its row."""
    return ModelConfig(**fields_of(name, sizes))

# -----------------------------------------------------------------------------
# A run directory has the layout of a Hugging Face directory: config.json in the published spelling,
# tensors under the published names (model.layers.0.self_attn.q_proj.weight). One key more holds the
# ModelConfig.

def published(model):
    """{published name: parameter, or bias of a router}."""
    own = [*model.named_parameters(), *model.named_buffers()]
    return {n if n.startswith("lm_head") else "model." + n: p for n, p in own}

def save_model(model, directory):
    """Writes config.json and model.safetensors, each whole or not at all."""
    c = model.cfg
    config = {"architectures": ["LM"], "vocab_size": c.vocab_size, "hidden_size": c.d_model,
              "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
              "num_key_value_heads": c.n_kv_heads, "head_dim": c.d_head, "rope_theta": c.rope_theta,
              "intermediate_size": model.layers[0].mlp.d_ff, "max_position_embeddings": c.seq_len,
              "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie,
              "model_config": dataclasses.asdict(c)}
    with atomic_write(Path(directory) / "config.json", "w") as f: json.dump(config, f, indent=1)
    save_tensors(Path(directory) / "model.safetensors", published(model), {"format": "pt"})

def load_state(model, tensors, where):
    """Copies {published name: tensor} into a model; names a missing, surplus or mis-shaped one."""
    own = published(model)
    odd = sorted(own.keys() ^ tensors.keys()) + [n for n in own.keys() & tensors.keys()
                                                 if own[n].shape != tensors[n].shape]
    if odd: raise UserError(f"{where}: got {odd[:4]} missing, surplus or of another shape; wanted "
                            "what config.json describes; check that the two belong together")
    with torch.no_grad():
        for name, p in own.items(): p.copy_(tensors[name])

def load_model(directory, device="cpu", dtype=torch.float32):
    """LM of a run directory, in eval mode."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"run: got {directory}, wanted a directory with a config.json; "
                        "train one: python train.py")
    try: config = ModelConfig(**json.loads(path.read_text())["model_config"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: got {type(e).__name__} {e}, wanted the key model_config of "
                        "save_model; use a directory that train.py made")
    model = meta_model(config).to_empty(device=device).to(dtype)  # no time spent on initial values
    weights = Path(directory) / "model.safetensors"
    load_state(model, load_tensors(weights)[0], weights)
    return model.eval()

# -----------------------------------------------------------------------------
# The lesson: where parameters and FLOPs are; and a bench: what a token costs as texts get longer

# n_layers, d_model, n_heads of GPT-2 (Radford et al. 2019, table 2); d_ff is 4 d_model
SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20),
         "XL": (48, 1600, 25), "175B": (96, 12288, 96)}  # the last is GPT-3 (2005.14165, table 2.1)

def sized(name, size, **more):
    n_layers, d_model, n_heads = SIZES[size]
    return meta_model(preset(name, n_layers=n_layers, d_model=d_model, n_heads=n_heads,
                             d_ff=4 * d_model, **{"vocab_size": 50257, "seq_len": 1024, **more}))

def lesson():
    parts = ("qkv", "scores", "values", "out", "ffn", "head")
    print(f"{'a forward pass':20s}{'T':>6s}{'parameters':>16s}{'FLOPs':>12s}",
          *(f"{p:>7s}" for p in parts))
    rows = [(name, meta_model(preset(name)), 1024) for name in PRESETS]
    for name in ("llama", "gpt2"):
        rows += [(f"{name} {s}", sized(name, s, seq_len=2048), 2048) for s in SIZES]
    for name, model, T in rows:
        flops = model.flops(T)
        share = {p: 100 * flops.get(p, 0) / sum(flops.values()) for p in parts}
        print(f"{name:20s}{T:6d}{sum(model.n_params().values()):16,d}{sum(flops.values()):12.4e}",
              *(f"{share[p]:6.2f}%" for p in parts))
    print("\\nThe matrices of a layer grow with d_model^2, scores and values with d_model: at one "
          "context\\nlength attention's share falls with size, and the FFN's rises. At T = 2048 scores"
          f"\\nand values take {share['scores'] + share['values']:.1f} % of the FLOPs at 175B")

def bench():
    """Forward and backward of one layer in float32: microseconds a token, by length; experts."""
    def us(layer, width, *rest):
        x = torch.randn(1, width, 256, requires_grad=True)
        run = lambda: sum(y.sum() for y in layer(x, *rest)[:1]).backward()
        return 1e6 * seconds(run, x.device, 3) / width

    keep_freed_memory()
    lengths = (1024, 4096, 16384)
    print("one layer of d_model 256, forward and backward, tokens/s at T =", *lengths)
    for letter, kind in MIXERS.items():
        cfg = ModelConfig(mixers=letter, seq_len=lengths[-1])
        print(letter, *(f"{1e6 / us(kind(cfg), T, Context(cfg, torch.zeros(1, T))):12,.0f}"
                        for T in lengths))
    cfg = ModelConfig(ffns="x")
    dense, experts = (1e6 / us(FFNS[ffn](cfg), 4096) for ffn in "sx")
    print(f"experts, 2 of 8, as wide together as a dense FFN: {experts / dense:.2f} of its "
          f"{dense:,.0f} tokens/s at T = 4096")

def main(args):
    bench() if args.what == "bench" else lesson()

def build_parser():
    parser = argparse.ArgumentParser(description="Parameters and FLOPs of presets, by part.")
    parser.add_argument("what", nargs="?", choices=["lesson", "bench"], default="lesson",
                        help="bench: tokens/s of mixers and experts here (default: %(default)s)")
    return parser

if __name__ == "__main__":
    main(build_parser().parse_args())
