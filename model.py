"""model.py - a language model: from token ids to a probability for every next token.

THE IDEA
    A language model reads tokens and says, at every place, how probable each next token is. It
    keeps a residual stream, a vector of d_model numbers per token, to which each layer adds twice:
    a *mixer* lets a token fetch from earlier ones, an *FFN* works on it alone. Models differ in
    these; so one is two strings, tiled over its layers, mixers="WWWWWA", ffns="s", and some sizes.

THE MATHS
    attention   y = softmax(Q K^T / sqrt(Dh) + M) V        M = 0 where it may look, else -inf
    recurrence  S_t = a_t S_{t-1} + k_t w_t^T, y_t = S_t^T q_t    w: what is written, v or like it
    RMSNorm     y = g x / sqrt(mean(x^2) + eps)            g a learned gain; LayerNorm: less mean
    SwiGLU      y = W_down (silu(W_gate x) * (W_up x))     experts: sum of p_e FFN_e(x), K of E
    RoPE        (a, b) -> (a cos - b sin, b cos + a sin)   at angle pos theta^(-2i/Dh), i < Dh/2

THE COSTS (a product of (m, k) and (k, n) takes 2mkn FLOPs; backward costs twice the forward)
    a token             2 per weight that it meets, and 4 S H Dh a layer to attend to S places
    a cache, per layer  2 Hkv Dh numbers a token (latent R + Dh/2, Hyena D); a recurrence H N Dv

SHAPES
    B batch, T new positions, S positions attended (of a recurrence the state, N rows, Dv columns),
    D d_model, H n_heads, Hkv n_kv_heads, Dh d_head, R d_latent, F d_ff, E n_experts, K n_active,
    V vocab_size, L n_layers. Order (B, H, T, Dh); weights (out, in); masks bool, True = may look.

CONTENTS  ModelConfig / MIXERS / FFNS / Block, LM / PRESETS / runs / the lesson
NOT HERE  operations and caches beneath (kernels.py), sharding over devices, sampling (sample.py)
RUN       python model.py          # parameters and FLOPs; last line "... of the FLOPs at 175B"
          python model.py bench    # time of each mixer at three lengths, and of experts
REFERENCES  at each class and preset; of ReLU^2 2109.08668, of the soft-cap 2408.00118
EXERCISE  Empty `MoE.forward`; fill it until `pytest test_all.py -k experts` is green again.
"""
import argparse, dataclasses, json, math, os, re, struct, zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bpe import UserError, atomic_write
from kernels import (CHUNK, NORMS, Context, Embedding, KVCache, Linear, RMSNorm, StateCache,
                     attention, blocks, build_parser, documents, flag, fresh, implicit_filter,
                     keep_freed_memory, linear_cross_entropy, logits_of, long_conv,
                     long_conv_reference, merge, norm_of, project, scan, short_conv, sinusoid,
                     softmax, split, table, up, weights, writer)

# --- Configuration -----------------------------------------------------------
# One frozen dataclass is the vocabulary of this file, and its only validator. train.py makes a flag
# of each field, named alike; letters behind a help text name the layers that read the field.

def need_field(c, ok, name, wanted):
    """The error message for a field of a configuration that is not ok."""
    if not ok: raise UserError(f"{name}: got {getattr(c, name)!r}, wanted {wanted}; set --{name}")

@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = flag(4096, "number of different tokens")
    seq_len: int = flag(256, "context: tokens of a training sequence")
    n_layers: int = flag(4, "blocks")
    d_model: int = flag(256, "width of the residual stream")
    n_heads: int = flag(4, "query heads")
    n_kv_heads: int | None = flag(None, "key/value heads; fewer: GQA, 1: MQA; none: n_heads", "AWN")
    d_head: int | None = flag(None, "width of a head; none: d_model / n_heads", "AWNMLDS")
    d_ff: int | None = flag(None, "hidden width of an FFN; none: 4 d_model, or 8/3 if gated")
    mixers: str = flag("A", "letters tiled over the depth: A attention, W sliding window, N without"
                       " positions, M latent, L linear, D delta rule, S state space, H Hyena")
    ffns: str = flag("s", "tiled letters: r ReLU, u ReLU^2, e GELU, g GeGLU, s SwiGLU, x experts")
    window: int | None = flag(None, "keys that W sees, itself included; none: seq_len / 4", "W")
    d_latent: int | None = flag(None, "width R of M's latent; none: 4 d_head", "M")
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
    rope_factor: float | None = flag(None, "stretch of long wavelengths, as in Llama 3.1", "AWM")
    rope_context: int | None = flag(None, "context before that stretch", "AWM")
    qk_norm: bool = flag(False, "RMSNorm on each query and key, before RoPE", "AWN")
    softcap: float | None = flag(None, "logits become c tanh(logits / c); none: as they are")
    tie: bool = flag(False, "the output head is the embedding")
    bias: bool = flag(False, "biases in linear layers (but the head) and in LayerNorm")
    qkv_bias: bool = flag(False, "biases in the projections to q, k and v", "AWN")
    embed_scale: bool = flag(False, "multiply embeddings by sqrt(d_model)")
    zero_init: bool = flag(False, "what blocks add, and an untied head, start at zero")
    init_std: float | None = flag(None, "std of initial weights; none: sqrt(2/(in+out))")
    values: bool = flag(False, "a table of value vectors by token in each layer", "AWN")
    bigram: int | None = flag(None, "rows, 4 a token or more, of a hashed table of token pairs")
    dropout: float = flag(0.0, "probability, in embeddings, attention and what blocks add")
    def __post_init__(self):
        need, letters = partial(need_field, self), set(self.mixers + self.ffns)
        for f in dataclasses.fields(self):
            value, kind, of = getattr(self, f.name), str(f.type), OF[f.name]
            if value is None: need("None" in kind, f.name, "a value")
            elif "int" in kind: need(type(value) is int and value > 0, f.name, "a positive integer")
            elif "float" in kind: need(0 <= value < math.inf, f.name, "a finite number, 0 or more")
            # No silent knobs: a field of a mechanism that is absent must hold its default.
            need(not of or set(of) & letters or value == f.default, f.name,
                 f"its default, as no layer is {' or '.join(of)}")
        positions = ("rope", "learned", "sinusoidal", "none")
        for name, known in (("norm", NORMS), ("norm_place", PLACES), ("pos", positions)):
            need(getattr(self, name) in known, name, " or ".join(known))
        for name, known in (("mixers", MIXERS), ("ffns", FFNS)):
            own = getattr(self, name)
            need(own and set(own) <= set(known) and self.n_layers % len(own) == 0, name,
                 f"letters of {''.join(known)}, as many as divide {self.n_layers} layers")
        need(self.d_head or self.d_model % self.n_heads == 0, "n_heads", "a divisor of d_model")
        # Defaults that depend on other fields are resolved here, once, though the class is frozen:
        # so vary the arguments of `preset`, not a finished config by dataclasses.replace.
        Dh = self.d_head or self.d_model // self.n_heads
        for name, value in dict(n_kv_heads=self.n_heads, d_head=Dh, window=-(-self.seq_len // 4),
                                d_latent=4 * Dh).items():
            if set(OF[name]) & letters and not getattr(self, name):
                object.__setattr__(self, name, value)
        rope, even = self.pos == "rope", lambda n: (n or 0) % 2 == 0
        for name, ok, wanted in (
                ("n_kv_heads", self.n_heads % (self.n_kv_heads or 1) == 0, "a divisor of n_heads"),
                ("d_head", not rope or even(self.d_head), "an even number"),
                ("d_head", "M" not in letters or self.d_head % 4 == 0, "a multiple of 4"),
                ("d_model", self.pos != "sinusoidal" or even(self.d_model), "an even number"),
                ("rope_theta", rope or self.rope_theta == 1e4, "its default without rope"),
                ("rope_factor", rope or self.rope_factor is None, "none without rope"),
                ("rope_context", (self.rope_factor is None) == (self.rope_context is None),
                 "a number if rope_factor is one, else none"),
                ("n_active", self.n_active <= self.n_experts, "at most n_experts"),
                ("dropout", self.dropout < 1, "a probability below 1"),
                *((name, getattr(self, name) != 0, "a positive number")
                  for name in ("softcap", "init_std", "norm_eps", "rope_theta", "rope_factor"))):
            need(ok, name, wanted)

OF = {f.name: f.metadata["of"] for f in dataclasses.fields(ModelConfig)}

# --- Mixers: how a token reads from other tokens -----------------------------
# Contract: __init__(cfg), forward(x, ctx, cache=None) -> y, new_cache(batch, size, device, dtype),
# flops(T, S) -> {part: FLOPs}. A cache has n, update, next_pos and truncate.

class Mixer(nn.Module):
    """What mixers share: a KVCache (heads, widths of a key and a value), and FLOPs of all pairs of
    a query and a key, though a kernel may skip masked ones; like torch's counter, without FFTs."""
    window = None
    def new_cache(self, batch, size, device, dtype):
        return KVCache(batch, size, *self.kv, self.window, device, dtype)
    def pairs(self, T, S):
        if T < S and self.window: S = min(S, T + self.window + KVCache.SLACK)  # with a cache
        n = sum((b - a) * (b - c) for a, b, c in blocks(T, self.window)) if T == S else T * S
        return (2 * n * self.cfg.n_heads * d for d in self.score_widths)
    def flops(self, T, S):
        (scores, values), out = self.pairs(T, S), 2 * T * weights(self.o_proj)
        return dict(qkv=2 * T * weights(self) - out, scores=scores, values=values, out=out)
class Attention(Mixer):
    """MHA, MQA (1911.02150) or GQA (2305.13245) by n_kv_heads; over the whole past or, if local,
    the last cfg.window keys (2004.05150); not turned, it knows the order by its mask alone."""
    def __init__(self, cfg, local=False, turned=True):
        super().__init__()
        self.cfg, self.window, self.turned = cfg, cfg.window if local else None, turned
        self.kv, self.score_widths = (cfg.n_kv_heads, cfg.d_head, cfg.d_head), 2 * (cfg.d_head,)
        self.q_proj, self.k_proj, self.v_proj = (project(cfg, h * cfg.d_head, cfg.qkv_bias)
                                                 for h in (cfg.n_heads, *2 * (cfg.n_kv_heads,)))
        self.o_proj = writer(cfg, cfg.n_heads * cfg.d_head)
        norm = partial(RMSNorm, cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()  # gains bound the scores (2010.04245)
        if cfg.values: self.v_embed = Embedding(cfg.vocab_size, cfg.n_kv_heads * cfg.d_head, 0.0)
    def forward(self, x, ctx, cache=None):
        c, turn = self.cfg, ctx.turn if self.turned else lambda x: x
        q = turn(self.q_norm(split(self.q_proj(x), c.n_heads)))  # (B, H, T, Dh)
        k = turn(self.k_norm(split(self.k_proj(x), c.n_kv_heads)))
        v = self.v_proj(x) + (self.v_embed(ctx.tokens).to(x.dtype) if c.values else 0.0)
        v = split(v, c.n_kv_heads)  # with its token's own vector, which no layer has diluted
        y = (ctx.attend(q, k, v, self.window, c.dropout * self.training) if cache is None
             else attention(q, *cache.update(k, v, ctx.pos)))
        return self.o_proj(merge(y))
class LatentAttention(Mixer):
    """MLA, DeepSeek-V2 (2405.04434): keys and values of all heads are projections of one latent c
    of R numbers, k = U c and v = W c, and RoPE turns a key of r = Dh/2 numbers that heads share.
    The cache holds R + r numbers a token, not 2 H Dh, and need not expand them: q . (U c) =
    (U^T q) . c, so with U absorbed by the query all heads attend to c itself, as in MQA."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.sizes = cfg, (cfg.n_heads, cfg.d_head, cfg.d_latent, cfg.d_head // 2)
        H, Dh, R, r = self.sizes
        self.q_proj, self.kv_a_proj_with_mqa = project(cfg, H * (Dh + r)), project(cfg, R + r)
        self.kv_a_layernorm = RMSNorm(R, cfg.norm_eps)
        self.kv_b_proj = Linear(R, 2 * H * Dh, std=cfg.init_std)  # U and W, by head
        self.o_proj = writer(cfg, H * Dh)
        self.kv, self.score_widths = (1, R + r, 0), (Dh + r, Dh)
    def forward(self, x, ctx, cache=None):
        (H, Dh, R, r), drop = self.sizes, self.cfg.dropout if self.training else 0.0
        q, q_r = split(self.q_proj(x), H).split((Dh, r), -1)
        c, k_r = split(self.kv_a_proj_with_mqa(x), 1).split((R, r), -1)  # (B, 1, T, R)
        c, q_r, k_r = self.kv_a_layernorm(c), ctx.turn(q_r), ctx.turn(k_r)
        if cache is None:
            k, v = split(self.kv_b_proj(merge(c)), H).chunk(2, -1)  # (B, H, T, Dh)
            k = torch.cat((k, k_r.expand(-1, H, -1, -1)), -1)
            y = attention(torch.cat((q, q_r), -1), k, v, ctx.mask(), drop)
        else:
            U, W = self.kv_b_proj.weight.to(x.dtype).view(H, 2 * Dh, R).chunk(2, 1)
            c, _, mask = cache.update(torch.cat((c, k_r), -1), c[..., :0], ctx.pos)
            q = torch.cat((q @ U, q_r), -1)  # (B,H,T,Dh) @ (H,Dh,R) -> (B,H,T,R)
            q = q * math.sqrt((R + r) / (Dh + r))  # `attention` divides by the root of R + r
            y = attention(q, c, c[..., :R], mask, drop) @ W.mT  # @ (H,R,Dh) -> (B,H,T,Dh)
        return self.o_proj(merge(y))

class Recurrent(Mixer):
    """Attention whose past has a fixed size: a head keeps a matrix S (N, Dv) that decays and is
    written to, S_t = a_t S_{t-1} + k_t w_t^T, and read, y_t = S_t^T q_t (`scan`). Training is
    linear in length, decoding constant. Subclasses say what decays and what is written (`mix`).
    Unless `rates` is None, q, k and v first go through a short convolution; with one rate a head
    (of decay) or two (of writing), y goes through a norm and a gate, as in Gated DeltaNet."""
    TAPS = 4  # of the short convolution [2405.21060]
    rates, delta, extra = None, 0, 0  # delta: is there a delta rule, extra: columns beside v
    def __init__(self, cfg, heads=None, k_heads=None, d_k=None, d_v=None):
        super().__init__()
        self.cfg, self.heads, self.k_heads = cfg, heads or cfg.n_heads, k_heads or cfg.n_heads
        self.d_k, self.d_v = d_k or cfg.d_head, d_v or cfg.d_head
        self.widths = (self.k_heads * self.d_k,) * 2 + (self.heads * self.d_v,)
        self.q_proj, self.k_proj, self.v_proj = (project(cfg, d) for d in self.widths)
        self.o_proj = writer(cfg, self.widths[2])
        if self.rates is not None: self.conv = fresh(self.TAPS, sum(self.widths), std=0.5)
        if self.rates:
            self.z_proj = project(cfg, self.widths[2])
            self.rate_proj = project(cfg, self.heads * self.rates)
            # Steps dt from 1e-3 to 1e-1 and rates A from 1 to 16: memories of many lengths.
            self.o_norm, dt = RMSNorm(self.d_v, cfg.norm_eps), torch.logspace(-3, -1, self.heads)
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt
            self.A_log = nn.Parameter(torch.linspace(1, 16, self.heads).log())
    def forward(self, x, ctx, cache=None):
        x, pos = ctx.packed(x), ctx.packed(ctx.pos)
        tail, S = (cache or self.new_cache(len(x), 0, x.device, x.dtype)).slot
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)  # (B, T, widths)
        if self.rates is not None: qkv, tail = short_conv(qkv, self.conv, pos, tail)
        q, k, v = map(split, qkv.split(self.widths, -1), (self.k_heads, self.k_heads, self.heads))
        y, S = self.mix(x, q, k, v, pos, S, ctx.plain)
        if self.rates: y = self.o_norm(y) * F.silu(split(self.z_proj(x), self.heads))
        if cache is not None: cache.update(ctx.pos, tail, S)
        return ctx.packed(self.o_proj(merge(y)), back=True)
    def new_cache(self, batch, size, device, dtype):
        tail = torch.zeros(batch, self.TAPS - 1, sum(self.widths), device=device, dtype=dtype)
        shape = (batch, self.heads, self.d_k * (self.rates != 0), self.d_v + self.extra)
        return StateCache(tail, up(torch.zeros(shape, device=device, dtype=dtype)))
    def pairs(self, T, S):
        C, H, N = min(CHUNK, T), self.heads, self.d_k
        P = -(-T // C) * C  # whole chunks
        return (2 * P * C * N * self.k_heads * (1 + self.delta),
                2 * P * H * (C + N * (2 + self.delta)) * (self.d_v + self.extra))
class LinearAttention(Recurrent):
    """Katharopoulos et al. 2020 (2006.16236): exp(q . k) becomes f(q) . f(k), f = elu + 1 > 0; so
    sum_s f(q) . f(k_s) v_s = S^T f(q) with S the sum of f(k_s) v_s^T. A column of ones beside v
    adds up the weights, by which y is divided. Nothing decays."""
    extra = 1
    def mix(self, x, q, k, v, pos, S, plain):
        v, log_a = F.pad(v, (0, 1), value=1.0), x.new_zeros(len(x), 1, x.shape[1])
        y, S = scan(F.elu(up(q)) + 1, F.elu(up(k)) + 1, v, log_a, None, pos, S)  # bf16 has no 1 + e
        return y[..., :-1] / y[..., -1:].clamp(min=1e-9), S  # padding may have seen nothing
class StateSpace(Recurrent):
    """Mamba-2, Dao and Gu 2024 (2405.21060): the linear system S' = -A S + B x, seen at steps dt
    that a token chooses: a_t = exp(-dt A), written is dt x_t. Here x, B and C are v, k and q; heads
    share k and q, and are 2 Dh wide; D v_t is added. (Mamba-2 has its norm behind the gate.)"""
    rates = 1
    def __init__(self, cfg):
        super().__init__(cfg, k_heads=1, d_k=cfg.d_state, d_v=2 * cfg.d_head)
        self.D = nn.Parameter(torch.ones(cfg.n_heads))
    def mix(self, x, q, k, v, pos, S, plain):
        dt = F.softplus(up(self.rate_proj(x)).mT + self.dt_bias[:, None])  # (B, H, T)
        y, S = scan(q, k, v * dt[..., None], -self.A_log.exp()[:, None] * dt, None, pos, S)
        return (y + self.D[:, None, None] * v).to(x.dtype), S
class GatedDelta(Recurrent):
    """Gated DeltaNet, Yang et al. 2024 (2412.06464): decays as Mamba-2, but writes b_t (v_t - what
    the memory already answers to k_t), a step of gradient descent on |S^T k_t - v_t|^2 / 2: a new
    value for a key replaces the old one, and is not added to it."""
    rates, delta = 2, 1
    def mix(self, x, q, k, v, pos, S, plain):
        a, b = up(self.rate_proj(x)).mT.chunk(2, 1)  # (B, H, T) each
        log_a, b = -self.A_log.exp()[:, None] * F.softplus(a + self.dt_bias[:, None]), b.sigmoid()
        q, k = F.normalize(up(q), dim=-1) * self.d_k ** -0.5, F.normalize(up(k), dim=-1)
        y, S = scan(q, k, v * b[..., None], log_a, b, pos, S)
        return y.to(x.dtype), S
class Hyena(Recurrent):
    """Poli et al. 2023 (2302.10866), order 2: y = q * (h conv (k * v)), by FFT in T log T. The
    filter h is as long as the text but implicit, a function of the distance. Nothing sums up the
    past: the `state` of a cache is all k * v, and a token costs S D."""
    rates, extra = 0, 2
    def __init__(self, cfg):
        super().__init__(cfg, 1, 1, cfg.d_model, cfg.d_model)
        self.skip = nn.Parameter(torch.ones(cfg.d_model))
        widths = 17, 32, 32, cfg.d_model
        self.filter = nn.ModuleList(Linear(*pair, bias=True) for pair in zip(widths, widths[1:]))
    def mix(self, x, q, k, v, pos, S, plain):  # S (B, 1, n, D + 2): k * v, position, document
        pos, new, at = pos[:, None], up(k * v), torch.arange(pos.shape[1], device=x.device)
        doc = documents(pos) + (S[:, :, -1:, -1] if S.shape[2] else 0)
        S = torch.cat((S, torch.cat((new, torch.stack((pos, doc), -1).to(new.dtype)), -1)), 2)
        u, h = S[:, 0, :, :-2], implicit_filter(self.filter, S.shape[2], self.cfg.seq_len)
        # Rows of one document from its start are what an FFT convolves.
        if len(h) == len(at) and (plain or ((pos == at) | (pos < 0)).all()): y = long_conv(u, h)
        else: y = long_conv_reference(u, h, pos, doc, *S[..., -2:].long().unbind(-1))
        return q * (y[:, None] + self.skip * new).to(x.dtype), S
    def pairs(self, T, S):  # a batch shares the filter of S places; T of them are in qkv
        return 2 * (S - T) * weights(self.filter), 0
MIXERS = {"A": Attention, "W": partial(Attention, local=True),
          "N": partial(Attention, turned=False), "M": LatentAttention,
          "L": LinearAttention, "D": GatedDelta, "S": StateSpace, "H": Hyena}

# --- FFNs: what a token does alone -------------------------------------------
# Two matrices around a nonlinearity hold about two thirds of a layer's weights. The gated form
# multiplies two projections; why it helps is open: "divine benevolence" (2002.05202, sec. 4).
# Contract: forward(x) -> (y, aux), flops(T); aux may hold `loss`, to add, and `load` by expert.

class FFN(nn.Module):
    def __init__(self, cfg, act, gated=False, d_ff=None):
        super().__init__()
        D, self.act = cfg.d_model, act
        # Gated, 8/3 D, floored to a multiple of 64, has the weights of 4 D without a gate.
        self.d_ff = d_ff or cfg.d_ff or (max(64, 8 * D // 3 // 64 * 64) if gated else 4 * D)
        self.gate_proj = project(cfg, self.d_ff) if gated else None
        self.up_proj, self.down_proj = project(cfg, self.d_ff), writer(cfg, self.d_ff)
    def forward(self, x):  # (B, T, D) -> (B, T, F) -> (B, T, D)
        h = self.up_proj(x)
        h = self.act(self.gate_proj(x)) * h if self.gate_proj else self.act(h)
        return self.down_proj(h), {}
    def flops(self, T): return {"ffn": 2 * T * weights(self)}
class MoE(nn.Module):
    """A router sends each token to n_active of n_experts FFNs, whose outputs add up, weighted by
    the softmax of the chosen (Mixtral, 2401.04088); n_shared are always on. Left alone, it keeps to
    those it has trained; so a loss E sum_e f_e P_e (2101.03961: f the share sent to e, P its mean
    probability) evens the load, or a bias on the choice, moved against it (2408.15664). Dropless:
    tokens sorted by expert, a slice each, however long. Padding is routed, too."""
    def __init__(self, cfg, ffn):
        super().__init__()
        self.cfg, self.d_ff = cfg, cfg.d_expert or max(8, ffn(cfg).d_ff // cfg.n_active)
        self.gate = Linear(cfg.d_model, cfg.n_experts, std=cfg.init_std)
        self.experts = nn.ModuleList(ffn(cfg, d_ff=self.d_ff) for _ in range(cfg.n_experts))
        self.shared_experts = ffn(cfg, d_ff=self.d_ff * cfg.n_shared) if cfg.n_shared else None
        if cfg.balance_bias: self.register_buffer("bias", torch.zeros(cfg.n_experts))
    def forward(self, x):
        c, flat = self.cfg, x.flatten(0, 1)  # (B, T, D) -> (B T, D)
        z = up(self.gate(flat))
        p = softmax(z)  # (B T, E)
        chosen = (p + self.bias if c.balance_bias else p).topk(c.n_active).indices  # (B T, K)
        weight = softmax(z.gather(1, chosen)) if c.n_active > 1 else p.gather(1, chosen)
        weight = weight.to(x.dtype).flatten()  # the softmax of one would not train the router
        order, load = chosen.flatten().argsort(), chosen.flatten().bincount(minlength=c.n_experts)
        row = order // c.n_active  # rows of x, those of an expert side by side
        out = self.run(flat.index_select(0, row), load)
        out = out * weight.index_select(0, order)[:, None]
        y = torch.zeros_like(flat).index_add(0, row, out).view(x.shape)
        if self.shared_experts: y = y + self.shared_experts(x)[0]
        loss = c.balance * c.n_experts * (load / len(order) * p.mean(0)).sum()
        # Squared logsumexp keeps logits small (2202.08906).
        return y, {"loss": loss + c.router_z * z.logsumexp(1).square().mean(), "load": load}
    def run(self, rows, load):  # rows by expert, so many of each; parallel.py sends them elsewhere
        slices = rows.split(load.tolist())
        return torch.cat([expert(s)[0] for expert, s in zip(self.experts, slices)])
    def flops(self, T):
        return {"ffn": 2 * T * (weights(self) - weights(*self.experts[self.cfg.n_active:]))}
gelu = partial(F.gelu, approximate="tanh")  # the form that GPT-2 was trained with
FFNS = {"r": partial(FFN, act=F.relu), "u": partial(FFN, act=lambda x: F.relu(x).square()),
        "e": partial(FFN, act=gelu), "g": partial(FFN, act=gelu, gated=True),
        "s": partial(FFN, act=F.silu, gated=True)}
FFNS["x"] = partial(MoE, ffn=FFNS["s"])

# --- Block and LM ------------------------------------------------------------

ONE, TWO = "input_layernorm", "post_attention_layernorm"  # Llama's names; Gemma has two more
PLACES = {"pre": (ONE, None, None, TWO, None, None), "post": (None, None, ONE, None, None, TWO),
          "sandwich": (ONE, TWO, None, "pre_feedforward_layernorm", "post_feedforward_layernorm",
                       None)}  # the norms a, b, c of the mixer, then of the FFN
class Block(nn.Module):
    """One layer: twice x = c(x + b(f(a(x)))), with norms a (pre), a and b (sandwich) or c (post),
    which breaks the stream, so that its gradients need a warm-up (2002.04745)."""
    def __init__(self, cfg, mixer, ffn):
        super().__init__()
        self.norms = PLACES[cfg.norm_place]
        for name in filter(None, self.norms): self.add_module(name, norm_of(cfg))
        self.self_attn, self.mlp = MIXERS[mixer](cfg), FFNS[ffn](cfg)
        self.drop = nn.Dropout(cfg.dropout)
    def forward(self, x, ctx, cache=None):
        a, b, c, d, e, f = (getattr(self, n) if n else nn.Identity() for n in self.norms)
        x = c(x + self.drop(b(self.self_attn(a(x), ctx, cache))))
        y, aux = self.mlp(d(x))
        return f(x + self.drop(e(y))), aux

class LM(nn.Module):
    """The model. compute_dtype: of the stream (None: of the weights); eos: ids that end a text."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.compute_dtype, self.eos = cfg, None, None
        # A norm likes rows of std 1, but as a head they would give logits a std of sqrt(D).
        std = cfg.init_std or (cfg.d_model ** -0.5 if cfg.tie else 1.0)
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.d_model, std)
        rows = max(4 * cfg.vocab_size, cfg.bigram or 0)
        if cfg.bigram: self.embed_bigram = Embedding(rows, cfg.d_model, 0.0)
        if cfg.pos == "learned": self.embed_positions = Embedding(cfg.seq_len, cfg.d_model, std)
        mixers, ffns = (p * (cfg.n_layers // len(p)) for p in (cfg.mixers, cfg.ffns))
        self.layers = nn.ModuleList(Block(cfg, m, f) for m, f in zip(mixers, ffns))
        self.norm = nn.Identity() if cfg.norm_place == "post" else norm_of(cfg)
        head_std = 0.0 if cfg.zero_init else cfg.init_std
        self.lm_head = None if cfg.tie else Linear(cfg.d_model, cfg.vocab_size, std=head_std)
        self.drop = nn.Dropout(cfg.dropout)
    def forward(self, tokens, targets=None, pos=None, cache=None, last=0):
        """tokens (B, T) -> (logits (B, T, V) or of the `last` places, aux). With targets (B, T), -1
        of which do not count: (nats (B, T), aux), so that the caller averages. pos (B, T) counts
        from 0, or on from what the cache holds, unless given; padding, -1, is before or after."""
        seen = cache[0].n if cache and pos is None else 0
        assert self.cfg.pos != "learned" or seen + tokens.shape[1] <= self.cfg.seq_len, "too long"
        ctx = Context(self.cfg, tokens, pos, cache[0].next_pos() if cache else None)
        x, aux = self.embed(ctx, cache), {"loss": 0.0, "load": []}
        for i, layer in enumerate(self.layers):
            x, extra = layer(x, ctx, cache[i] if cache else None)
            aux["loss"] = aux["loss"] + extra.get("loss", 0.0)
            if "load" in extra: aux["load"].append(extra["load"])
        head = self.norm(x[:, -last:]), (self.lm_head or self.embed_tokens).weight  # (V, D)
        if targets is None: return logits_of(*head, self.cfg.softcap), aux
        return linear_cross_entropy(*head, targets, self.cfg.softcap), aux
    def embed(self, ctx, cache=None):  # the stream before the first layer, (B, T, D)
        x = self.embed_tokens(ctx.tokens)
        if self.cfg.bigram:  # hashed by two odd numbers, so that few pairs share a row
            pair = 36313 * ctx.before(cache and cache[-1]) + 27191 * ctx.tokens
            x = x + self.embed_bigram(pair % len(self.embed_bigram.weight))
        if self.cfg.embed_scale: x = x * math.sqrt(self.cfg.d_model)
        if self.cfg.pos == "learned": x = x + self.embed_positions(ctx.pos.clamp(min=0))
        if self.cfg.pos == "sinusoidal": x = x + sinusoid(ctx.pos, self.cfg.d_model).to(x.dtype)
        return self.drop(x).to(self.compute_dtype or x.dtype)
    def new_cache(self, batch, size):
        """Room for `size` positions in `batch` rows: a cache a layer, and one of last tokens."""
        device, dtype = self.embed_tokens.weight.device, self.embed_tokens.weight.dtype
        sizes = batch, size, device, self.compute_dtype or dtype
        last = StateCache(torch.zeros(batch, 1, dtype=torch.long, device=device))
        caches = [layer.self_attn.new_cache(*sizes) for layer in self.layers]
        return [*caches, last] if self.cfg.bigram else caches
    def flops(self, T, S=None):
        """{part: FLOPs} of T new tokens of one sequence over S places, or T (latents expanded)."""
        total = Counter(head=2 * T * self.cfg.d_model * self.cfg.vocab_size)
        for layer in self.layers:
            total.update(layer.self_attn.flops(T, S or T) | layer.mlp.flops(T))
        return dict(total)
    def flops_per_token(self):  # to train on it at the full context: backward is two forwards
        return 3 * sum(self.flops(self.cfg.seq_len).values()) / self.cfg.seq_len
    def n_params(self):  # {part: parameters}, of all layers together; a tied head costs nothing
        total, sizes = Counter(), ((n.split("."), p.numel()) for n, p in self.named_parameters())
        for words, n in sizes: total[words[2] if words[0] == "layers" else words[0]] += n
        return dict(total)
def meta_model(cfg):  # shapes without numbers: GPT-3 fits in a laptop
    with torch.device("meta"): return LM(cfg)

# --- Presets -----------------------------------------------------------------
# Presets: architectures of the field as rows, without their sizes (n_kv_heads stands for theirs)

PRESETS = {
    "vaswani": dict(ffns="r", norm="layer", norm_place="post", pos="sinusoidal", bias=True,
                    tie=True, embed_scale=True, dropout=0.1),  # 1706.03762: its decoder, alone
    "gpt2": dict(ffns="e", norm="layer", pos="learned", bias=True, tie=True, init_std=0.02),  # 2019
    "llama": dict(),  # 2302.13971; Qwen2: 2407.10671, Qwen3: 2505.09388, small sizes tied
    "mistral": dict(mixers="W", n_kv_heads=2),  # 2310.06825; there the window is 4096
    "mixtral": dict(ffns="x", rope_theta=1e6, n_kv_heads=2, balance=0.02, router_z=0),  # 2401.04088
    "qwen2": dict(qkv_bias=True, n_kv_heads=2, rope_theta=1e6, norm_eps=1e-6, tie=True),
    "qwen3": dict(qk_norm=True, n_kv_heads=2, rope_theta=1e6, norm_eps=1e-6, tie=True),
    # 2503.19786, Gemma 3: five local layers to a global one, which there has its own rope_theta
    "gemma": dict(mixers="WWWWWA", ffns="g", window=512, norm_place="sandwich", norm_eps=1e-6,
                  qk_norm=True, tie=True, embed_scale=True, n_layers=6, n_kv_heads=1),
    # 2405.04434 and, for the biases, 2412.19437: a dense layer first, then many small experts
    "deepseek": dict(mixers="M", ffns="sxxx", n_layers=4, n_experts=16, n_active=4, n_shared=1,
                     balance=1e-4, balance_bias=1e-3, router_z=0.0, norm_eps=1e-6),
    # 2403.19887: attention in one layer of eight, experts in every other; its Mamba is the first
    "jamba": dict(mixers="SSSSASSS", ffns="sx", n_layers=8, pos="none", n_kv_heads=2, n_experts=16),
    # Qwen3-Next (2025): three delta layers to one of attention; there all FFNs are experts
    "next": dict(mixers="DDDA", n_layers=4, qk_norm=True, n_kv_heads=2),
    "hyena": dict(mixers="H", ffns="e", norm="layer", pos="none", bias=True),  # 2302.10866
    # of modded-nanogpt's records: QK-norm, ReLU^2, zero init, tables of tokens and of their pairs
    "modern": dict(ffns="u", qk_norm=True, zero_init=True, values=True, bigram=8192)}
def fields_of(name, given):
    """{field: value}: what is given, over what some layer reads of a preset's row."""
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, wanted {' or '.join(PRESETS)}; set --preset")
    both = {"mixers": ModelConfig.mixers, "ffns": ModelConfig.ffns, **PRESETS[name], **given}
    letters = set(both["mixers"] + both["ffns"])
    return {k: v for k, v in both.items() if k in given or not OF[k] or set(OF[k]) & letters}
def preset(name, **sizes):  # sizes, and any other field, override its row
    return ModelConfig(**fields_of(name, sizes))

# --- Run directories, and other people's models ------------------------------
# A run directory is a Hugging Face directory: config.json and safetensors files. A model of a known
# family is written as that family, which transformers loads; one key more has the ModelConfig. The
# table has, for both directions, a family's names of our fields and, unlike Llama's, our tensors.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
def save_tensors(path, tensors, metadata={}):
    """Writes {name: tensor} and {str: str} as one file, whole or not at all: eight bytes with the
    length of a JSON header, the header (name -> dtype, shape, byte range), the raw numbers. Nothing
    in it can be executed, unlike in a pickle, so a stranger's file is safe to open. Ours carry a
    checksum: a damaged checkpoint is found before it is trained on."""
    names, header, blobs, start = {v: k for k, v in DTYPES.items()}, {}, [], 0
    for name, t in tensors.items():
        flat = t.detach().cpu().contiguous().reshape(-1)
        blobs.append(memoryview(flat.view(torch.uint8).numpy()))  # its bytes, whatever the dtype
        end = start + len(blobs[-1])
        header[name] = dict(dtype=names[t.dtype], shape=list(t.shape), data_offsets=[start, end])
        start = end
    crc = zlib.crc32(json.dumps([metadata, header]).encode())
    for blob in blobs: crc = zlib.crc32(blob, crc)
    text = json.dumps({"__metadata__": {**metadata, "crc32": str(crc)}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight bytes
    with atomic_write(path) as file:
        file.writelines([struct.pack("<Q", len(text)), text, *blobs])
def read_tensors(path):
    """Yields the (name, tensor)s of a file, the first its metadata. Each has its own memory, free
    when it is let go. Damage is an error that names the file."""
    try:
        with open(path, "rb") as file:
            size, end = os.fstat(file.fileno()).st_size, 8 + struct.unpack("<Q", file.read(8))[0]
            header, begin = dict(json.loads(file.read(min(end, size) - 8))), end
            metadata = dict(header.pop("__metadata__", {}))
            wanted = metadata.pop("crc32", None)  # only our own files have it
            crc = zlib.crc32(json.dumps([metadata, header]).encode())
            yield "__metadata__", metadata
            for name, h in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                a, b = (begin + i for i in h["data_offsets"])
                if not a == end <= b <= size: raise ValueError(f"{name} at {a:,} to {b:,}")
                raw, dtype, end = bytearray(b - a), DTYPES[h["dtype"]], b
                file.readinto(raw)
                if wanted: crc = zlib.crc32(raw, crc)
                t = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                yield name, t.reshape(h["shape"])
        if end != size: raise ValueError(f"{size:,} bytes, not {end:,}")
        if wanted and int(wanted) != crc: raise ValueError("its checksum does not match")
    except (OSError, struct.error, ValueError, LookupError, TypeError, RuntimeError) as e:
        raise UserError(f"{path}: got {type(e).__name__}: {e}; wanted a whole safetensors file of "
                        f"{', '.join(DTYPES)}; check the path, or restore the file from a copy")
def load_tensors(path):  # ({name: tensor}, metadata)
    tensors = dict(read_tensors(path))
    return tensors, tensors.pop("__metadata__")
LLAMA = dict(vocab_size="vocab_size", seq_len="max_position_embeddings", d_model="hidden_size",
             n_layers="num_hidden_layers", n_heads="num_attention_heads", tie="tie_word_embeddings",
             n_kv_heads="num_key_value_heads", d_head="head_dim", d_ff="intermediate_size",
             norm_eps="rms_norm_eps", rope_theta="rope_theta", rope_factor="factor",
             rope_context="original_max_position_embeddings")
MISTRAL = dict(LLAMA, window="sliding_window")
MIXTRAL = dict(MISTRAL, d_expert="intermediate_size", n_experts="num_local_experts",
               n_active="num_experts_per_tok")
GPT = dict(vocab_size="vocab_size", norm_eps="layer_norm_epsilon", d_model="n_embd", d_ff="n_inner",
           seq_len="n_positions", n_layers="n_layer", n_heads="n_head", tie="tie_word_embeddings")
WORDS = dict(embed_tokens="wte", embed_positions="wpe", layers="h", norm="ln_f", q_proj="c_attn",
             input_layernorm="ln_1", post_attention_layernorm="ln_2", self_attn="attn",
             k_proj="c_attn", v_proj="c_attn", o_proj="c_proj", up_proj="c_fc", down_proj="c_proj")
FAMILIES = {  # architecture: (preset and model_type, our field: its key, our word: its word)
    "GPT2LMHeadModel": ("gpt2", GPT, WORDS), "LlamaForCausalLM": ("llama", LLAMA, {}),
    "Qwen2ForCausalLM": ("qwen2", LLAMA, {}), "Qwen3ForCausalLM": ("qwen3", LLAMA, {}),
    "MistralForCausalLM": ("mistral", MISTRAL, {}), "MixtralForCausalLM": ("mixtral", MIXTRAL, dict(
        mlp="block_sparse_moe", gate_proj="w1", up_proj="w3", down_proj="w2"))}
ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)  # as in rope_tables
ONLY = dict(ROPE, type="llama3", hidden_act="silu", activation_function="gelu_new", mlp_bias=False,
             attention_bias=False, use_sliding_window=False, scale_attn_by_inverse_layer_idx=False,
             scale_attn_weights=True, quantization_config=None, partial_rotary_factor=1.0)
def family(c):
    """(architecture, preset, keys, words) of a ModelConfig; what only training sees may differ."""
    plain = {f.name: f.default for f in dataclasses.fields(c)}
    plain.update(n_kv_heads=c.n_heads, d_head=c.d_model // c.n_heads, mixers="AW"[bool(c.window)])
    for architecture, row in FAMILIES.items():
        unlike = {f for f, v in {**plain, **PRESETS[row[0]]}.items() if getattr(c, f) != v}
        if unlike <= {*row[1], "dropout", "init_std", "zero_init", "balance", "router_z"}:
            return architecture, *row
    return "LM", None, {}, {}
def views(model):
    """{published name: [views of parameters, side by side]}: to fill a view fills its parameter.
    GPT-2 keeps Q, K and V in one matrix, and matrices as (in, out)."""
    (_, name, _, words), out = family(model.cfg), {}
    for own, p in model.state_dict().items():
        theirs = ".".join(words.get(word, word) for word in own.split("."))
        if name != "gpt2" and not own.startswith("lm_head"): theirs = "model." + theirs
        turn = name == "gpt2" and p.ndim == 2 and own.startswith("layers")
        out.setdefault(theirs, []).append(p.T if turn else p)
    return out
def published(model):  # {published name: tensor}
    return {n: v[0] if len(v) == 1 else torch.cat(v, -1) for n, v in views(model).items()}
def save_model(model, directory):  # config.json and model.safetensors, whole or not at all
    (architecture, name, keys, _), own = family(model.cfg), dataclasses.asdict(model.cfg)
    values = {**own, **dict.fromkeys(("d_ff", "d_expert"), model.layers[0].mlp.d_ff)}
    config = {"architectures": [architecture], "model_type": name, "eos_token_id": model.eos,
              "bos_token_id": None, "tokenizer_class": "PreTrainedTokenizerFast",
              "model_config": own, **{k: values[f] for f, k in keys.items()}}
    scaling = {k: config.pop(k, None) for k in ("factor", "original_max_position_embeddings")}
    if scaling["factor"]: config["rope_scaling"] = {**ROPE, **scaling}
    with atomic_write(Path(directory) / "config.json", "w") as f: json.dump(config, f, indent=1)
    save_tensors(Path(directory) / "model.safetensors", published(model), {"format": "pt"})
def load_state(model, pairs, where):
    """Copies (published name, tensor)s into a model; names a missing, surplus or odd-shaped one."""
    left, odd = views(model), []
    shape = lambda parts: [*parts[0].shape[:-1], sum(p.shape[-1] for p in parts)]
    for name, t in pairs:
        parts = left.pop(name, ())
        wanted = shape(parts) if parts else "no such tensor"
        if list(t.shape) != wanted: odd.append(f"{name} {list(t.shape)} (wanted {wanted})")
        else:
            for p, x in zip(parts, t.split([p.shape[-1] for p in parts], -1)): p.copy_(x)
    odd += [f"{name} missing (wanted {shape(parts)})" for name, parts in left.items()]
    if odd: raise UserError(f"{where}: got {', '.join(odd[:4])}, {len(odd)} in all; wanted what "
                            "config.json describes; check that the two belong together")
def read_config(config):
    """The ModelConfig of a config.json. A key that asks for what we do not have is named."""
    if "model_config" in config: return ModelConfig(**config["model_config"])
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in FAMILIES:
        raise UserError(f"architecture: got {architecture}, wanted {' or '.join(FAMILIES)}")
    name, keys, _ = FAMILIES[architecture]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # new, old spelling
    c = {"tie_word_embeddings": name == "gpt2", "rms_norm_eps": 1e-6,  # transformers' defaults
         "sliding_window": 4096 if name == "mistral" else None, **config, **rope}
    for key, wanted in ONLY.items():  # to ignore what we do not have would give other logits
        if c.get(key, wanted) not in (wanted, "default"):  # the default rope_type has no stretch
            raise UserError(f"{key}: got {c[key]!r}, wanted {wanted!r}; use another model")
    must = {f.name for f in dataclasses.fields(ModelConfig) if f.type is int}
    fields = {f: c[k] if f in must else c.get(k, getattr(ModelConfig, f)) for f, k in keys.items()}
    if "window" in keys: fields["mixers"] = "W" if fields["window"] else "A"  # null: no window
    return preset(name, **fields)
def load_model(directory, device="cpu", dtype=torch.float32):
    """LM of a run directory or a published model, in eval mode; needs no second copy in memory."""
    read = lambda name: json.loads(p.read_text()) if (p := Path(directory, name)).is_file() else {}
    try:
        config, index = read("config.json"), read("model.safetensors.index.json")
        if not config: raise ValueError("nothing")
        one = not index or Path(directory, "model.safetensors").is_file()  # as transformers has it
        files = ["model.safetensors"] if one else sorted(set(index["weight_map"].values()))
        model = meta_model(read_config(config)).to(dtype)
        model.eos = {**config, **read("generation_config.json")}.get("eos_token_id")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{directory}: got {type(e).__name__} {e} in its json files, wanted what "
                        "save_model or Hugging Face write; check the path, or restore the files")
    # Metadata, the buffers of old files, and a tied table that is there twice.
    ignored = r"__metadata__|\.attn\.(masked_)?bias$|\.inv_freq$" + "|lm_head" * model.cfg.tie
    pairs = ((name.removeprefix("transformer."), t) for f in files
             for name, t in read_tensors(Path(directory, f)) if not re.search(ignored, name))
    load_state(model.to_empty(device=device), pairs, directory)  # no initial values are drawn
    return model.eval()

# --- The lesson and the bench: parameters, FLOPs, and what a token costs -----
# Layers and widths of GPT-2 (Radford et al. 2019, table 2), last of GPT-3 (2005.14165, table 2.1).
SIZES = (12, 768), (24, 1024), (36, 1280), (48, 1600), (96, 12288)
def lesson(T=2048):
    parts = ("qkv", "scores", "values", "out", "ffn", "head")
    print(f"forward, T = {T}{'parameters':>23s}{'FLOPs':>12s}", *(f"{p:>7s}" for p in parts))
    rows = {name: preset(name) for name in PRESETS} | {f"GPT of {n} x {d}": preset(
        "gpt2", vocab_size=50257, seq_len=T, n_layers=n, d_model=d) for n, d in SIZES}
    for name, cfg in rows.items():
        model = meta_model(cfg)
        flops, n = model.flops(T), sum(model.n_params().values())
        share = [100 * flops.get(p, 0) / sum(flops.values()) for p in parts]
        print(f"{name:18s}{n:20,d}{sum(flops.values()):12.4e}", *(f"{x:6.2f}%" for x in share))
    print("A layer's matrices grow with d_model^2, scores and values with d_model, so that their\n"
          f"share falls. Scores and values take {sum(share[1:3]):.1f} % of the FLOPs at 175B")
def layers(new, gpu):
    """Rows for kernels.table: forward and backward of a layer of d_model 256."""
    def row(letter, layer, T, *ctx):  # an FFN returns aux, too
        x, one = new(1, T, 256).requires_grad_(), layer.to(new(1))
        run = lambda: (one(x, *ctx) if ctx else one(x)[0]).sum().backward()
        flops = 3 * sum((layer.flops(T, T) if ctx else layer.flops(T)).values())
        return f"{letter}, {T:,} tokens", (), flops, 3 * weights(layer) + 4 * x.numel(), run
    keep_freed_memory()
    for letter, kind in MIXERS.items():
        cfg = ModelConfig(mixers=letter, seq_len=1024)  # W sees a quarter of it
        for T in (1024, 4096, 16384):
            yield row(letter, kind(cfg), T, Context(cfg, new(1, T)))
    for letter in "sx": yield row(letter, FFNS[letter](ModelConfig(ffns=letter)), 4096)
def main(args): table(args, layers) if args.what == "bench" else lesson()
if __name__ == "__main__":
    main(build_parser("parameters and FLOPs of presets, by part; bench: layers").parse_args())
