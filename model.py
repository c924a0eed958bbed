"""model.py - a language model: from token ids to a probability for every next token.

THE IDEA
    A language model reads tokens t_1..t_T and says, at every place, how probable each possible next
    token is. The transformer does it with a residual stream: one vector of d_model numbers per
    token, to which each layer adds twice. A *mixer* (attention) lets a token fetch from earlier
    tokens; an *FFN* works on each token alone. Positions tell the order; norms and initial scales
    keep numbers near one. Architectures differ in which mixer, which FFN, which norm and where, so
    a model here is two strings, repeated until every layer has its letter, mixers="WWWWWA" and
    ffns="s", and a few sizes. A new mechanism is a class with the same contract and one new row.

THE MATHS
    attention   y = softmax(Q K^T / sqrt(Dh) + M) V        M = 0 where a token may look, else -inf
    RMSNorm     y = g x / sqrt(mean(x^2) + eps)            g a learned gain; LayerNorm: less mean
    SwiGLU      y = W_down (silu(W_gate x) * (W_up x))
    RoPE        (a, b) -> (a cos - b sin, b cos + a sin)   at angle pos theta^(-2i/Dh), i < Dh/2
    loss        -log softmax(z)[target] = logsumexp(z) - z[target], in nats

THE COSTS (a product of (m, k) and (k, n) takes 2mkn FLOPs; backward costs twice the forward)
    a token forward     2 per weight in a matrix, and 4 S H Dh a layer to attend to S places
    a token in training three times that: 6 N for N weights, and 12 S H Dh a layer
    a cache             2 Hkv Dh numbers per token and layer
    Each mechanism counts its own (`flops`), and a test holds the sum against torch's counter.

SHAPES
    B batch, T new positions, S positions attended, D d_model, H n_heads, Hkv n_kv_heads,
    Dh d_head, F d_ff, V vocab_size, L n_layers. Heads stand before time: (B, H, T, Dh). Weights
    are (out, in). Masks are bool, True = may look.

CONTENTS  ModelConfig / files of tensors / linear, norms, loss / positions / Context, KVCache /
          MIXERS / FFNS / Block, LM / PRESETS / save_model, load_model / the lesson
NOT HERE  fused kernels (kernels.py), sharding (parallel.py), sampling (sample.py)
RUN       python model.py    # parameters and FLOPs by part; last line "... of the FLOPs at 175B"
REFERENCES
    Vaswani et al. 2017 (1706.03762) attention, sinusoids; Xiong et al. 2020 (2002.04745) pre-norm;
    Zhang, Sennrich 2019 (1910.07467) RMSNorm; Su et al. 2021 (2104.09864) RoPE; Shazeer 2019, 2020
    (1911.02150, 2002.05202) MQA, GLU; Ainslie et al. 2023 (2305.13245) GQA; Beltagy et al. 2020
    (2004.05150) windows; Henry et al. 2020 (2010.04245) QK-norm (ours is an RMSNorm); So et al.
    2021 (2109.08668) ReLU^2; Gemma Team 2024, 2025 (2408.00118, 2503.19786) soft-cap, sandwich;
    Glorot, Bengio 2010 initial scale; Press, Wolf 2017 (1608.05859) tying
EXERCISE  Empty `attention_reference` and `KVCache.update`; fill them until
          `pytest test_all.py -k "attention or decode or documents"` is green again.
"""
import argparse, dataclasses, json, math, struct, zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bpe import UserError, atomic_write

# -----------------------------------------------------------------------------
# Configuration
# One frozen dataclass is the vocabulary of this file, and its only validator. train.py makes a flag
# of each field, so flag, attribute and README are spelled alike.

def flag(default, help):
    """A dataclass field that knows what --help says of it."""
    return field(default=default, metadata={"help": help})

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
    n_kv_heads: int | None = flag(None, "key/value heads; none: n_heads (MHA), fewer: GQA, 1: MQA")
    d_head: int | None = flag(None, "width of a head; none: d_model / n_heads")
    d_ff: int | None = flag(None, "hidden width of an FFN; none: 4 d_model, or 8/3 if gated")
    mixers: str = flag("A", "letters tiled over the depth: A attention, W sliding window")
    ffns: str = flag("s", "tiled letters: r ReLU, u ReLU^2, e GELU, g GeGLU, s SwiGLU")
    window: int | None = flag(None, "keys that a W layer sees, the token itself included")
    norm: str = flag("rms", "rms or layer")
    norm_place: str = flag("pre", "pre, post, or sandwich (before and after)")
    norm_eps: float = flag(1e-5, "added to the mean square or variance")
    pos: str = flag("rope", "positions: rope, learned, sinusoidal or none")
    rope_theta: float = flag(1e4, "base of RoPE's wavelengths")
    qk_norm: bool = flag(False, "RMSNorm on each query and key, before RoPE")
    softcap: float | None = flag(None, "logits become c tanh(logits / c); none: as they are")
    tie: bool = flag(False, "the output head is the embedding")
    bias: bool = flag(False, "biases in linear layers (but the head) and in LayerNorm")
    embed_scale: bool = flag(False, "multiply embeddings by sqrt(d_model)")
    zero_init: bool = flag(False, "what blocks add, and an untied head, start at zero")
    init_std: float | None = flag(None, "std of initial weights; none: sqrt(2/(in+out))")
    dropout: float = flag(0.0, "probability, in embeddings, attention and what blocks add")

    def __post_init__(self):
        need = partial(need_field, self)
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), str(f.type)  # such as "int | None"
            if value is None: need("None" in kind, f.name, "a value")
            elif "int" in kind:
                need(type(value) is int and value >= 1, f.name, "a positive integer")
            elif "float" in kind: need(0 <= value < math.inf, f.name, "a finite number, 0 or more")
        need(self.norm in NORMS, "norm", " or ".join(NORMS))
        need(self.norm_place in PLACES, "norm_place", " or ".join(PLACES))
        need(self.pos in POSITIONS, "pos", " or ".join(POSITIONS))
        for name, known in (("mixers", MIXERS), ("ffns", FFNS)):
            letters = getattr(self, name)
            need(letters and set(letters) <= set(known), name, f"letters of {''.join(known)}")
            need(self.n_layers % len(letters) == 0, name,
                 f"as many letters as divide {self.n_layers} layers")
        divides = self.d_head or self.d_model % self.n_heads == 0
        need(divides, "n_heads", f"a divisor of d_model {self.d_model}")
        # Defaults that depend on other fields are resolved here, once, though the class is frozen:
        # so vary the arguments of `preset`, not a finished config by dataclasses.replace.
        object.__setattr__(self, "n_kv_heads", self.n_kv_heads or self.n_heads)
        object.__setattr__(self, "d_head", self.d_head or self.d_model // self.n_heads)
        need(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"a divisor of {self.n_heads}")
        need(self.pos != "rope" or self.d_head % 2 == 0, "d_head", "an even number, for rope")
        need(self.pos != "sinusoidal" or self.d_model % 2 == 0, "d_model", "an even number")
        need(0 <= self.dropout < 1, "dropout", "a probability below 1")
        for name in ("softcap", "init_std", "norm_eps", "rope_theta"):
            need(getattr(self, name) != 0, name, "a positive number")
        # No silent knobs: a field of a mechanism that is absent must hold its default.
        need(self.pos == "rope" or self.rope_theta == 1e4, "rope_theta", "its default without rope")
        need(("W" in self.mixers) == (self.window is not None), "window",
             "a number of keys if mixers has a W, else none")

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
# Linear, Embedding, norms, softmax, loss
# The weights that the optimizer moves are float32; the residual stream may be bfloat16. A Linear
# casts its weight to the dtype of what comes in, so mixed precision is one cast at the bottom of
# the model. What adds up many numbers (norms, softmax, loss) works in float32 at least: `up`.

def up(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))

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

def softmax(x, dim=-1):
    """exp(x) / sum exp(x). Subtracting the maximum changes nothing but that exp cannot overflow."""
    e = torch.exp(up(x) - up(x).amax(dim, keepdim=True))
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)

def cross_entropy_reference(logits, targets):
    """(..., V), (...) -> (...) nats per target, 0 where the target is -1. Never log(softmax(z)): a
    probability that underflows to zero would make the loss infinite."""
    z = up(logits)
    top = z.amax(-1, keepdim=True)
    lse = (top + (z - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    picked = z.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(targets >= 0, lse - picked, torch.zeros_like(lse))

def cross_entropy(logits, targets):
    """The same from torch's fused call, which passes over the (..., V) logits less often."""
    z = up(logits).flatten(0, -2)
    return F.cross_entropy(z, targets.flatten(), ignore_index=-1, reduction="none").view_as(targets)

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
# Context and cache
# What a mixer must know besides x is in one Context made per forward. pos (B, T) is a token's
# position in its document: a 0 begins a document, past which nobody looks back, and -1 is padding.
# Training, prefill and decoding are one path; they differ in whether a cache was passed.

def documents(pos):
    """Numbers the documents of each row, (B, T) -> (B, T): [0 1 2 0 1] -> [1 1 1 2 2]."""
    return (pos == 0).cumsum(1)

def visible(q_pos, q_doc, k_pos, k_doc, window=None):
    """Which keys a query may see, (B, T) and (B, S) -> (B, 1, T, S) bool: those of its document,
    not later, fewer than `window` steps back (so `window` keys, itself included). Padding sees
    padding, so that no row is empty: softmax over nothing is NaN, and NaN times zero is NaN."""
    gap = q_pos[:, :, None] - k_pos[:, None, :]
    ok = (gap >= 0) & (q_doc[:, :, None] == k_doc[:, None, :])
    ok &= (q_pos < 0)[:, :, None] == (k_pos < 0)[:, None, :]
    return (ok if window is None else ok & (gap < window))[:, None]

class Context:
    """tokens and pos (B, T), RoPE's tables, masks by window: made once, shared by all layers. If
    every row counts from 0 (`plain`), tables and masks are made for one row, and broadcast."""
    def __init__(self, cfg, tokens, pos=None, start=None):
        self.tokens, self.masks = tokens, {}
        self.plain = pos is None and start is None
        if pos is None:
            pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            if start is not None: pos = pos + start  # (B, T) + (B, 1)
        self.pos = pos
        self.rows = pos[:1] if self.plain else pos
        self.rope = None
        if cfg.pos == "rope": self.rope = rope_tables(self.rows, cfg.d_head, cfg.rope_theta)

    def mask(self, window):
        """(B or 1, 1, T, T), or None for plain causal attention: fused kernels need none for it."""
        if self.plain and (window is None or window >= self.tokens.shape[1]): return None
        if window not in self.masks:
            doc = documents(self.rows)
            self.masks[window] = visible(self.rows, doc, self.rows, doc, window)
        return self.masks[window]

class KVCache:
    """Keys and values of one layer, `size` places a row, filled left to right. To decode a token
    then costs a row of the attention matrix, not all of it: O(T^2) for a text instead of O(T^3)."""
    def __init__(self, batch, size, n_kv_heads, d_head, window, device, dtype):
        self.k = torch.zeros(batch, n_kv_heads, size, d_head, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.pos = torch.full((batch, size), -1, device=device)
        self.doc = torch.zeros_like(self.pos)
        self.n, self.window = 0, window

    def update(self, k, v, pos):
        """Appends k, v (B, Hkv, T, Dh) at positions pos (B, T) -> all keys and values
        (B, Hkv, S, Dh), S = n + T, and the mask (B, 1, T, S) of the new queries."""
        a, b = self.n, self.n + k.shape[2]
        assert b <= self.k.shape[2], f"the cache holds {self.k.shape[2]} positions, {b} are needed"
        self.k[:, :, a:b], self.v[:, :, a:b], self.pos[:, a:b], self.n = k, v, pos, b
        self.doc[:, a:b] = documents(pos) + (self.doc[:, a - 1:a] if a else 0)
        mask = visible(pos, self.doc[:, a:b], self.pos[:, :b], self.doc[:, :b], self.window)
        return self.k[:, :, :b], self.v[:, :, :b], mask

    def next_pos(self):
        """(B, 1): the position after the last one of each row; None if the cache is empty."""
        return self.pos[:, self.n - 1:self.n] + 1 if self.n else None

    def truncate(self, n):
        """Forgets all but the first n places (what followed was a wrong guess)."""
        assert 0 <= n <= self.n, f"cannot keep {n} of {self.n} places"
        self.n = n

# -----------------------------------------------------------------------------
# Mixers: how a token reads from other tokens
# Contract: __init__(cfg), forward(x, ctx, cache=None) -> y, new_cache(batch, size, device, dtype),
# flops(T, S) -> {part: FLOPs}. A cache has n, update, next_pos and truncate.

def attention_reference(q, k, v, mask=None):
    """softmax(Q K^T / sqrt(Dh)) V, eq. 1 of 1706.03762, of q (B, H, T, Dh) and k, v (B, Hkv, S,
    Dh); query head j reads key/value head j Hkv // H. No mask means causal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (B, H, S, Dh)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # ... @ (B,H,Dh,S) -> (B,H,T,S)
    scores = scores.masked_fill(~mask, float("-inf"))  # before the softmax, which then renormalises
    return softmax(scores) @ v  # (B,H,T,S) @ (B,H,S,Dh) -> (B,H,T,Dh)

def attention(q, k, v, mask=None, dropout=0.0):
    """The same from torch's fused call, which need not write the (T, S) matrix to memory."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=mask is None, enable_gqa=gqa)

def last_std(cfg):
    """Initial std of a matrix that writes to the stream: zero; or GPT-2's, smaller by sqrt(2L), so
    that 2L additions together are as large as one would be; or Linear's own (None)."""
    if cfg.zero_init: return 0.0
    return None if cfg.init_std is None else cfg.init_std / math.sqrt(2 * cfg.n_layers)

class Attention(nn.Module):
    """MHA, GQA or MQA by n_kv_heads; over the whole past or, if local, the last cfg.window keys."""
    def __init__(self, cfg, local=False):
        super().__init__()
        self.cfg, self.window = cfg, cfg.window if local else None
        self.q_dim, self.kv_dim = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q_proj = Linear(cfg.d_model, self.q_dim, cfg.bias, cfg.init_std)
        self.k_proj = Linear(cfg.d_model, self.kv_dim, cfg.bias, cfg.init_std)
        self.v_proj = Linear(cfg.d_model, self.kv_dim, cfg.bias, cfg.init_std)
        self.o_proj = Linear(self.q_dim, cfg.d_model, cfg.bias, last_std(cfg))
        self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, ctx, cache=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.cfg.d_head).transpose(1, 2)  # -> (B, H, T, Dh)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)  # scores are bounded by the gains
        if ctx.rope: q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
        if cache is None: mask = ctx.mask(self.window)
        else: k, v, mask = cache.update(k, v, ctx.pos)
        y = attention(q, k, v, mask, self.cfg.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.q_dim))  # (B,H,T,Dh) -> (B,T,D)

    def new_cache(self, batch, size, device, dtype):
        heads, width = self.cfg.n_kv_heads, self.cfg.d_head
        return KVCache(batch, size, heads, width, self.window, device, dtype)

    def flops(self, T, S):
        """T queries over S keys, all of them: a kernel may skip what causality or a window hide."""
        D, q, kv = self.cfg.d_model, self.q_dim, self.kv_dim
        return {"qkv": 2 * T * D * (q + 2 * kv), "scores": 2 * T * S * q, "values": 2 * T * S * q,
                "out": 2 * T * q * D}

MIXERS = {"A": Attention, "W": partial(Attention, local=True)}

# -----------------------------------------------------------------------------
# FFNs: what a token does alone
# Two matrices around a nonlinearity hold two thirds of a layer's weights. The gated form multiplies
# two projections; its author attributes its success to "divine benevolence" (2002.05202, sec. 4).
# Contract: forward(x) -> (y, aux), flops(T); aux may hold `loss`, to be added to the loss, and
# `load`, tokens per expert.

class FFN(nn.Module):
    def __init__(self, cfg, act, gated=False):
        super().__init__()
        D = cfg.d_model  # gated: 8/3 D, floored to a multiple of 64, has the weights of 4 D ungated
        self.d_model, self.act = D, act
        self.d_ff = cfg.d_ff or (max(64, 8 * D // 3 // 64 * 64) if gated else 4 * D)
        self.gate_proj = Linear(D, self.d_ff, cfg.bias, cfg.init_std) if gated else None
        self.up_proj = Linear(D, self.d_ff, cfg.bias, cfg.init_std)
        self.down_proj = Linear(self.d_ff, D, cfg.bias, last_std(cfg))

    def forward(self, x):
        h = self.up_proj(x)  # (B, T, D) -> (B, T, F)
        h = self.act(h) if self.gate_proj is None else self.act(self.gate_proj(x)) * h
        return self.down_proj(h), {}

    def flops(self, T):
        return {"ffn": 2 * T * self.d_model * self.d_ff * (2 if self.gate_proj is None else 3)}

def relu2(x):
    return F.relu(x).square()

gelu = partial(F.gelu, approximate="tanh")  # the form that GPT-2 was trained with
FFNS = {"r": partial(FFN, act=F.relu), "u": partial(FFN, act=relu2), "e": partial(FFN, act=gelu),
        "g": partial(FFN, act=gelu, gated=True), "s": partial(FFN, act=F.silu, gated=True)}

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
# Presets: architectures of the field as rows; sizes are given beside them

PRESETS = {
    # 1706.03762: its decoder, without the encoder
    "vaswani": dict(ffns="r", norm="layer", norm_place="post", pos="sinusoidal", bias=True,
                    tie=True, embed_scale=True, dropout=0.1),
    # Radford et al. 2019
    "gpt2": dict(ffns="e", norm="layer", pos="learned", bias=True, tie=True, init_std=0.02),
    # 2302.13971
    "llama": dict(ffns="s"),
    # 2503.19786, Gemma 3: five local layers to a global one. There global ones have a rope_theta of
    # their own; here all share one.
    "gemma": dict(mixers="WWWWWA", ffns="g", window=512, norm_place="sandwich", norm_eps=1e-6,
                  qk_norm=True, tie=True, embed_scale=True, n_layers=6, n_kv_heads=1),
    # what modded-nanogpt's records 5 to 8 share: QK-norm, ReLU^2, blocks that start as the identity
    "modern": dict(ffns="u", qk_norm=True, zero_init=True),
}

def preset(name, **sizes):
    """ModelConfig of a named architecture; sizes, and any other field, override its row."""
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, wanted {' or '.join(PRESETS)}; set --preset")
    return ModelConfig(**{**PRESETS[name], **sizes})

# -----------------------------------------------------------------------------
# A run directory has the layout of a Hugging Face directory: config.json in the published spelling,
# tensors under the published names (model.layers.0.self_attn.q_proj.weight). One key more holds the
# ModelConfig.

def published(model):
    """{published name: parameter}."""
    return {n if n.startswith("lm_head") else "model." + n: p for n, p in model.named_parameters()}

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
# The lesson: where parameters and FLOPs are

# n_layers, d_model, n_heads of GPT-2 (Radford et al. 2019, table 2); d_ff is 4 d_model
SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20),
         "XL": (48, 1600, 25), "175B": (96, 12288, 96)}  # the last is GPT-3 (2005.14165, table 2.1)
PARTS = ("qkv", "scores", "values", "out", "ffn", "head")

def sized(name, size, **more):
    n_layers, d_model, n_heads = SIZES[size]
    return meta_model(preset(name, n_layers=n_layers, d_model=d_model, n_heads=n_heads,
                             d_ff=4 * d_model, **{"vocab_size": 50257, "seq_len": 1024, **more}))

def table(title, rows):
    print(f"\n{title:26s}{'parameters':>16s}{'FLOPs':>12s}" + "".join(f"{p:>8s}" for p in PARTS))
    for name, model, T in rows:
        flops = model.flops(T)
        share = {p: 100 * flops.get(p, 0) / sum(flops.values()) for p in PARTS}
        print(f"{name:18s}T={T:<6d}{sum(model.n_params().values()):16,d}"
              f"{sum(flops.values()):12.4e}" + "".join(f"{share[p]:7.2f}%" for p in PARTS))

def main(args):
    table("presets, d_model 256", ((n, meta_model(preset(n)), 1024) for n in PRESETS))
    course = [(n, sized("llama", n)) for n in ("small", "medium", "large", "XL")]
    table("CS336: SwiGLU, untied", [(n, m, 1024) for n, m in course] + [(*course[-1], 16384)])
    real = {n: sized("gpt2", n, seq_len=2048 if n == "175B" else 1024) for n in SIZES}
    table("GPT-2, GPT-3, dense", [(n, m, m.cfg.seq_len) for n, m in real.items()])
    print("\nThe matrices of a layer grow with d_model^2, scores and values with d_model; so at one"
          "\ncontext length attention's share falls with size, and the FFN's rises:")
    for name in ("small", "XL", "175B"):
        flops = real[name].flops(2048)
        percent = 100 * (flops["scores"] + flops["values"]) / sum(flops.values())
        print(f"at T = 2048 scores and values take {percent:4.1f} % of the FLOPs at {name}")

def build_parser():
    return argparse.ArgumentParser(
        description="Prints parameters and FLOPs of presets and published models, by part.")

if __name__ == "__main__":
    main(build_parser().parse_args())
