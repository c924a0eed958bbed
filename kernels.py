"""kernels.py - where the time goes: arithmetic, memory, and the table of what devices can do.

THE IDEA
    A processor is a factory, its memory a warehouse down the road. The factory multiplies far
    faster than the road brings numbers, so an operation takes the longer of two times: its
    arithmetic at the peak rate, or its bytes at the road's. Which one binds is told by the
    arithmetic intensity, FLOPs per byte moved. Large matrix products reuse each number often and
    are bound by arithmetic; all that is element by element is bound by memory, and gets faster
    only by moving less. The operations of a model stand here too, where it matters twice: as the
    definition says (`x_reference`), which moves much, and as what moves less.

THE MATHS
    time >= max(FLOPs / peak, bytes / bandwidth)                        the roofline
    intensity = FLOPs / bytes; arithmetic binds when it exceeds peak / bandwidth
    product of (n, n) and (n, n): 2n^3 FLOPs, 3n^2 numbers read or written: intensity n/3 in bf16
    x + y of n numbers: n FLOPs, 3n numbers: intensity 1/6 in bf16, whatever n is
    MFU = FLOPs that the model needs per second / peak                  (PaLM, 2204.02311, app. B)

THE COSTS
    On an H100 the ridge lies at 989e12 / 3.35e12 = 295 FLOPs per byte; DEVICES holds the numbers of
    the others. On a device that is not in the table the peak is measured with a large product.

CONTENTS  DEVICES / peak_flops_per_s / fastest_dtype, keep_freed_memory / files of tensors / loss,
          Linear, norms, attention / positions, masks, caches / scan / convolutions / the lesson
NOT HERE  fused kernels; what torch calls (cuBLAS, cuDNN, oneDNN) is measured, not rewritten
RUN       python kernels.py   # last line: "... bound by arithmetic from n = 886 on"
REFERENCES
    Williams et al. 2009 (the roofline model); NVIDIA's datasheets (V100, T4, A10, A100, L4, H100,
    H200, B200); Chowdhery et al. 2022 (2204.02311) for MFU; Su et al. 2021 (2104.09864) RoPE;
    Zhang, Sennrich 2019 (1910.07467) RMSNorm; Glorot, Bengio 2010 initial scale; Yang et al. 2024
    (2406.06484) the delta rule in chunks
EXERCISE  Empty `roofline_s` and fill it until `pytest test_all.py -k roofline` is green again.
"""
import argparse, ctypes, dataclasses, json, math, mmap, os, platform, struct, sys, time, zlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# DEVICES: the one table of peak rates and bandwidths
# Keyed by what torch.cuda.get_device_name says, or a part of it; of several that fit, the longest
# counts. Dense rates (datasheets also print twice that, "with sparsity"), accumulated in fp32.
# Bandwidths are those of the main memory.

DEVICES = {
    # name: (bf16 FLOP/s; fp16 on devices without bf16, fp32 FLOP/s without tensor cores, bytes/s)
    "V100": (125e12, 15.7e12, 0.9e12),
    "T4": (65e12, 8.1e12, 0.32e12),
    "A10": (125e12, 31.2e12, 0.6e12),
    "A100": (312e12, 19.5e12, 1.555e12),
    "A100-SXM4-80GB": (312e12, 19.5e12, 2.039e12),
    "L4": (121e12, 30.3e12, 0.3e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100 NVL": (835e12, 60e12, 3.9e12),
    "H200": (989e12, 67e12, 4.8e12),
    "B200": (2250e12, 75e12, 8.0e12),
}

def device_row(name):
    """(bf16 FLOP/s, fp32 FLOP/s, bytes/s) of a device by its reported name, or None."""
    if "MIG" in name: return None  # a part of a GPU
    words = set(name.replace("-", " ").split())
    fits = [key for key in DEVICES if key in name and key.replace("-", " ").split()[0] in words]
    return DEVICES[max(fits, key=len)] if fits else None

def device_name(device):
    """What to call a device in a log: the GPU's name, or the processor's."""
    if device.type == "cuda": return torch.cuda.get_device_name(device)
    if device.type == "mps": return "Apple GPU"
    try:
        with open("/proc/cpuinfo") as f:
            models = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        return f"{models[0]}, {len(models)} cores"
    except (OSError, IndexError):  # not Linux, or a processor without that line
        return platform.processor() or platform.machine()

def synchronize(device):
    """Waits for a device's queue: without it a timer sees only how fast work is handed over."""
    if device.type == "cuda": torch.cuda.synchronize(device)
    if device.type == "mps": torch.mps.synchronize()

def generator_of(model):
    """(type of the model's device, the module that gets and sets the random generator there)."""
    kind = next(model.parameters()).device.type
    return kind, {"cuda": torch.cuda, "mps": torch.mps, "cpu": torch}[kind]

def seconds(run, device, repeats=5):
    """Median time of run() in seconds, after one call to warm up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]

def product_rate(n, device, dtype):
    """Measured FLOP/s of an (n, n) product of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, device)

def peak_flops_per_s(device, dtype, n=None):
    """(FLOP/s, where it is from): the datasheet's dense peak for 16-bit numbers, or else what an
    (n, n) product reaches now (float32 on a GPU may or may not use its tensor cores)."""
    row = device_row(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if row and dtype in (torch.bfloat16, torch.float16): return row[0], "datasheet"
    n = n or (1024 if device.type == "cpu" else 4096)
    return product_rate(n, device, dtype), f"measured: {n} x {n} product"

def roofline_s(flops, n_bytes, peak, bandwidth):
    """(seconds at least, "arithmetic" or "memory", whichever binds)."""
    arithmetic, memory = flops / peak, n_bytes / bandwidth
    return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"

# -----------------------------------------------------------------------------
# Two choices that decide more than any kernel: a number format that the device has units for, and
# memory that is used again

def fastest_dtype(device):
    """bfloat16 where there are units for it, else float32. On a CPU without them a bfloat16 product
    is emulated, a hundred times slower [measured]."""
    if device.type == "cuda": fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = any(getattr(torch.cpu, name, lambda: False)()
                   for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    else: fast = False
    return torch.bfloat16 if fast else torch.float32

def keep_freed_memory():
    """Asks malloc (glibc's) not to return freed memory to the system. Else each large tensor is new
    memory, zeroed page by page: a loss over (4096, 2048) logits took 48 ms, now 16 [measured]."""
    if not sys.platform.startswith("linux"): return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"): return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))

# -----------------------------------------------------------------------------
# Settings, and files of tensors: safetensors
# Eight bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), then
# the raw numbers. Nothing in it can be executed, unlike in a pickle, so a stranger's file is safe
# to open. Our files carry a checksum: a damaged checkpoint is found before it is trained on.

def flag(default, help, of=""):
    """A dataclass field that knows what --help says of it, and which letters read it (any: "")."""
    return dataclasses.field(default=default, metadata={"help": help, "of": of})

def add_fields(parser, config_class, recipes):
    """One flag per field of a dataclass; `none` spells None. What is not given stays out of the
    namespace, so that it can be told from a default. The help shows the default of each recipe."""
    def read(f, kind, text):
        if "None" in str(f.type) and text.lower() == "none": return None
        if kind is bool and text.lower() not in ("true", "false"): raise ValueError(text)
        return text.lower() == "true" if kind is bool else kind(text)

    group = parser.add_argument_group(config_class.__name__)
    for f in dataclasses.fields(config_class):
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        parse = partial(read, f, kind)
        parse.__name__ = kind.__name__  # what argparse calls it in an error
        bare = dict(nargs="?", const=True) if kind is bool else {}  # --tie: --tie true
        values = {name: row.get(f.name, f.default) for name, row in recipes.items()}
        default = ", ".join(f"{value} on {name}" for name, value in values.items())
        if len(set(values.values())) == 1: default = [*values.values()][0]
        group.add_argument(f"--{f.name}", type=parse, default=argparse.SUPPRESS, **bare,
                           metavar=kind.__name__, help=f"{f.metadata['help']} (default: {default})")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

def pack(tensors, metadata):
    """{name: tensor}, {str: str} -> the parts of a file, one behind the other."""
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
    return [struct.pack("<Q", len(text)), text, *blobs]

def unpack(file):
    """Yields the (name, tensor)s of an open file, the first its metadata. Each is a map of its own,
    so that its memory is free when it is let go. ValueError and others if the file is damaged."""
    size = os.fstat(file.fileno()).st_size
    end = begin = 8 + struct.unpack("<Q", file.read(8))[0]
    header = dict(json.loads(file.read(min(begin, size) - 8)))
    metadata = dict(header.pop("__metadata__", {}))
    wanted, crc = metadata.pop("crc32", None), zlib.crc32(json.dumps([metadata, header]).encode())
    yield "__metadata__", metadata
    for name, h in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        a, b = (begin + i for i in h["data_offsets"])
        if not a == end <= b <= size: raise ValueError(f"{name} at {a:,} to {b:,}, not {end:,} on")
        skip, dtype, end = a % mmap.ALLOCATIONGRANULARITY, DTYPES[h["dtype"]], b
        raw = torch.empty(0, dtype=torch.uint8) if a == b else torch.frombuffer(mmap.mmap(
            file.fileno(), skip + b - a, access=mmap.ACCESS_COPY, offset=a - skip),
            dtype=torch.uint8)[skip:]
        if wanted: crc = zlib.crc32(raw.numpy(), crc)  # only our own files have it
        if skip % dtype.itemsize: raw = raw.clone()  # numbers must be aligned to their size
        yield name, raw.view(dtype).reshape(h["shape"])
    if end != size: raise ValueError(f"{size:,} bytes, not {end:,}")
    if wanted and int(wanted) != crc: raise ValueError("its checksum does not match")

# -----------------------------------------------------------------------------
# Operations of a model: each as its definition says (`x_reference`), then as it is fast

def up(x): return x.to(torch.promote_types(x.dtype, torch.float32))  # at least float32

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

def logits_of(x, weight, cap=None):
    """(..., D) @ (D, V) -> (..., V), soft-capped to (-cap, cap) if a cap is given."""
    z = F.linear(x, weight.to(x.dtype))
    return z if cap is None else cap * torch.tanh(z / cap)

LOGITS = 2 ** 27  # numbers: half a gigabyte in float32 [our choice]

def linear_cross_entropy(x, weight, targets, cap=None):
    """The loss from the stream (B, T, D) and the head (V, D). Of logits beyond LOGITS only a part
    is ever there: backward makes each part again, for 2 V D FLOPs a token (a checkpoint)."""
    nats = lambda x, targets: cross_entropy(logits_of(x, weight, cap), targets)
    rows, flat = max(1, LOGITS // len(weight)), x.flatten(0, 1)
    if len(flat) <= rows: return nats(x, targets)
    parts = zip(flat.split(rows), targets.flatten().split(rows))
    return torch.cat([checkpoint(nats, *p, use_reentrant=False) for p in parts]).view_as(targets)

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

def project(cfg, d, bias=False): return Linear(cfg.d_model, d, cfg.bias or bias, cfg.init_std)

def writer(cfg, d_in):
    """The matrix that adds to the stream. It starts at zero; or with GPT-2's std, smaller by
    sqrt(2L), so that 2L additions together are as large as one would be; or with Linear's own."""
    std = cfg.init_std and cfg.init_std / math.sqrt(2 * cfg.n_layers)
    return Linear(d_in, cfg.d_model, cfg.bias, 0.0 if cfg.zero_init else std)

class Embedding(nn.Module):
    """One row per token: a product with one-hot vectors, done by looking up."""
    def __init__(self, n, d, std):
        super().__init__()
        self.weight = fresh(n, d, std=std)

    def forward(self, ids):  # (B, T) -> (B, T, d)
        return F.embedding(ids, self.weight)

def weights(*modules):
    """How many numbers the matrices of some modules hold: each costs 2 FLOPs a token."""
    return sum(m.weight.numel() for top in modules for m in top.modules() if isinstance(m, Linear))

def split(x, heads):  # (B, T, H Dh) -> (B, H, T, Dh), and back
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

def merge(x): return x.transpose(1, 2).flatten(2)

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

def norm_of(cfg): return NORMS[cfg.norm](cfg.d_model, cfg.norm_eps, cfg.bias)

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
    gqa, d_v = q.shape[1] != k.shape[1], v.shape[-1]
    if gqa and q.shape[2] == 1 and q.dtype.itemsize < 4 and mask is not None:  # 5 times faster
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # heads that share keys are queries of one
        return attention(q, k, v, mask, dropout).flatten(1, 2)[:, :, None]
    if d_v < q.shape[-1]: v = F.pad(v, (0, q.shape[-1] - d_v))  # unequal, it writes that matrix
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=mask is None, enable_gqa=gqa)[..., :d_v]

# -----------------------------------------------------------------------------
# Positions, masks, context and caches
# Attention sees a set: only the causal mask tells order. Else a token's place is added to its
# vector, or RoPE turns pairs of features of queries and keys by it: the product of two turned
# vectors depends on the difference of their angles, the distance, alone. pos (B, T) counts in a
# document: 0 begins one, past which nobody looks back; -1 is padding. A cache keeps keys and
# values: decoding a token costs a row of the attention matrix, a text O(T^2) instead of O(T^3).

def sinusoid(pos, d):
    """(B, T) -> (B, T, d): sines of falling frequency, then the cosines, which the paper puts
    between them (1706.03762, 3.5)."""
    angle = pos[..., None] * 1e4 ** (-torch.arange(0, d, 2, device=pos.device) / d)  # (B, T, d/2)
    return torch.cat((angle.sin(), angle.cos()), -1)

def rope_tables(pos, d_head, theta, factor=None, context=None):
    """(B, T) -> cos, sin (B, 1, T, Dh/2) in float32: bf16 cannot tell position 256 from 257."""
    freq = 1 / theta ** (torch.arange(0, d_head, 2, device=pos.device) / d_head)
    if factor:  # Llama 3.1: pairs that turn 4 times in the context stay, those that turn once slow
        keep = ((context / (2 * math.pi / freq) - 1) / (4 - 1)).clamp(0, 1)
        freq = (1 - keep) * freq / factor + keep * freq
    angle = pos[:, None, :, None] * freq
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """RoPE on (B, H, T, Dh). Feature i of the first half pairs with feature i of the second, as in
    Llama's and Qwen's checkpoints; the paper pairs neighbours, a permutation of W_q and W_k."""
    a, b = up(x).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

def documents(pos):
    """Numbers the documents of each row, (B, T) -> (B, T): [0 1 2 0 1] -> [1 1 1 2 2]."""
    return (pos == 0).cumsum(-1)

def visible(q_pos, q_doc, k_pos, k_doc, window=None):
    """Which keys a query may see, (B, 1, T) and (B, 1, S) -> (B, 1, T, S) bool: those of its
    document, not later, fewer than `window` steps back (so `window` keys, itself included). Padding
    sees padding, so that no row is empty: softmax over nothing is NaN, and NaN times 0 is NaN."""
    gap = q_pos[..., None] - k_pos[..., None, :]
    ok = (gap >= 0) & (q_doc[..., None] == k_doc[..., None, :])
    ok &= (q_pos < 0)[..., None] == (k_pos < 0)[..., None, :]
    return ok if window is None else ok & (gap < window)

def blocks(T, window):
    """Into how many blocks of `window` queries local attention to T keys is cut; one if T is too
    short for that to pay [measured on a CPU]."""
    return 1 if window is None or T < max(4 * window, 256) else -(-T // window)

def take(x, index):
    """x[b, index[b, t]]: (B, S, ...) and (B, T) -> (B, T, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]

class Context:
    """What a mixer must know besides x, made once per forward: tokens and pos (B, T), RoPE's
    tables, masks by window. If every row counts from 0 (`plain`), one row's serve all."""
    def __init__(self, cfg, tokens, pos=None, start=None):
        self.tokens, self.masks, self.tables = tokens, {}, {}
        self.rope = cfg.pos == "rope" and (cfg.rope_theta, cfg.rope_factor, cfg.rope_context)
        self.plain = pos is None and start is None
        if pos is None:
            pos = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            if start is not None: pos = pos + start  # (B, T) + (B, 1)
        self.pos, self.rows = pos, pos[:1] if self.plain else pos
        self.order = None if self.plain else (pos < 0).sort(dim=1, stable=True).indices

    def turn(self, x):
        """RoPE on (B, H, T, Dh), if the model has it."""
        if not self.rope: return x
        d = x.shape[-1]
        if d not in self.tables: self.tables[d] = rope_tables(self.rows, d, *self.rope)
        return rotate(x, *self.tables[d])

    def mask(self, window=None):
        """(B or 1, 1, T, T), or None for plain causal attention: fused kernels need none for it."""
        if self.plain and (window is None or window >= self.tokens.shape[1]): return None
        if window not in self.masks:
            pos, doc = self.rows[:, None], documents(self.rows[:, None])
            self.masks[window] = visible(pos, doc, pos, doc, window)
        return self.masks[window]

    def attend(self, q, k, v, window=None, dropout=0.0):
        """`attention` to keys of this forward. A long text is cut into blocks of `window` queries,
        which see their own block and the one before: 2 w T pairs, not T^2."""
        T, w, n = q.shape[2], window, blocks(q.shape[2], window)
        if n == 1: return attention(q, k, v, self.mask(w), dropout)
        def cut(x, fill=0.0):  # (B, H, T, d) -> (B, n, H, w, d)
            x = F.pad(x, (0, 0, 0, n * w - T), value=fill)
            return x.unflatten(2, (n, w)).transpose(1, 2)
        def two(x, fill=0.0):  # (B, n, H, w, d) -> (B, n, H, 2w, d): the block before stands first
            return torch.cat((F.pad(x, (0, 0) * 3 + (1, 0), value=fill)[:, :-1], x), 3)
        if (w, n) not in self.masks:
            rows = self.rows[:, None, :, None]  # (B or 1, 1, T, 1)
            pos, doc = cut(rows, -1), cut(documents(rows.squeeze(-1))[..., None], -1)
            at = (x.squeeze(-1) for x in (pos, doc, two(pos, -2), two(doc, -2)))
            self.masks[w, n] = visible(*at, w).expand(len(q), *(-1,) * 4).flatten(0, 1)
        q, k, v = (x.flatten(0, 1) for x in (cut(q), two(cut(k)), two(cut(v))))
        y = attention(q, k, v, self.masks[w, n], dropout).unflatten(0, (-1, n))
        return y.transpose(1, 2).flatten(2, 3)[:, :, :T]

    def packed(self, x, back=False):
        """(B, T, ...) with each row's padding moved behind its tokens, or back: what convolves or
        carries a state finds the token before next to it."""
        if self.order is None: return x
        return take(x, self.order.argsort(1) if back else self.order)

    def before(self, cache=None):
        """(B, T): the token before each, -1 where a document starts. cache: of each row's last."""
        tokens, pos = self.packed(self.tokens), self.packed(self.pos)
        past = torch.cat((cache.slot[0] if cache else tokens[:, :1], tokens), 1)
        if cache: cache.update(self.pos, take(past, (pos >= 0).sum(1, keepdim=True)))
        return self.packed(past[:, :-1].masked_fill(pos == 0, -1), back=True)

class KVCache:
    """Keys and values of a layer, token i in column i; with a window in column i modulo `size`, a
    ring: memory is constant, and the last SLACK tokens can be taken back. Padding takes columns."""
    SLACK = 16  # [our choice]

    def __init__(self, batch, size, heads, d_k, d_v, window, device, dtype):
        size = size if window is None else min(size, window + self.SLACK)
        new = lambda kind, *shape: torch.zeros(batch, *shape, device=device, dtype=kind)
        self.columns = [new(dtype, heads, size, d_k), new(dtype, heads, size, d_v),
                        new(torch.long, 1, size), new(torch.long, 1, size)]  # k, v, pos, document
        self.n, self.lost, self.size, self.window = 0, 0, size, window  # tokens seen, overwritten

    def update(self, k, v, pos):
        """Appends k, v (B, Hkv, T, Dh) at positions pos (B, T) -> keys and values (B, Hkv, S, Dh)
        and the mask (B, 1, T, S) of the new queries."""
        a, b, pos = self.n, self.n + pos.shape[1], pos[:, None]
        assert self.window or b <= self.size, f"the cache holds {self.size} positions, not {b}"
        new = (k, v, pos, documents(pos) + (self.last(3) if a else 0))
        # A ring is read before it is written: what ends a long prefill overwrites its beginning.
        if self.window: seen = [torch.cat((c[:, :, :a], x), 2) for c, x in zip(self.columns, new)]
        at = torch.arange(a, b, device=pos.device)[-self.size:] % self.size
        for column, x in zip(self.columns, new): column[:, :, at] = x[:, :, -self.size:]
        if not self.window: seen = [c[:, :, :b] for c in self.columns]
        self.n, self.lost = b, max(self.lost, b - self.size)
        return seen[0], seen[1], visible(*new[2:], *seen[2:], self.window)

    def last(self, i):
        return self.columns[i][:, :, (self.n - 1) % self.size, None]

    def next_pos(self):
        """(B, 1): the position after the last one of each row; None if the cache is empty."""
        return self.last(2)[:, 0] + 1 if self.n else None

    def truncate(self, n):
        """Forgets all but the first n tokens (what followed was a wrong guess)."""
        assert 0 <= n <= self.n and (self.lost == 0 or n >= self.lost + max(1, self.window - 1)), \
            f"cannot keep {n} of {self.n} tokens: the first {self.lost} are overwritten"
        self.columns[3][:, :, torch.arange(n, self.n) % self.size] = -1  # in no document: unseen
        self.n = n

class StateCache:
    """What a recurrence keeps of the past: a slot of tensors that do not grow. It cannot be run
    backwards, so the slots after the last few updates are kept as snapshots to return to."""
    SNAPSHOTS = 4  # [our choice]

    def __init__(self, *slot): self.saved = [(0, None, slot)]

    n = property(lambda self: self.saved[-1][0])
    slot = property(lambda self: self.saved[-1][2])

    def update(self, pos, *slot):
        self.saved = [*self.saved, (self.n + pos.shape[1], pos[:, -1:] + 1, slot)][-self.SNAPSHOTS:]

    def next_pos(self): return self.saved[-1][1]

    def truncate(self, n):
        kept = [s for s in self.saved if s[0] <= n]
        assert kept and kept[-1][0] == n, f"no snapshot at {n}, only {[s[0] for s in self.saved]}"
        self.saved = kept

# -----------------------------------------------------------------------------
# Memories of a fixed size: one recurrence, in chunks
# Linear attention, state space models and the delta rule are a matrix that decays and is written
# to, one key and value after the other. Token by token that is T small steps, bound by memory. In
# chunks of C tokens it is products of matrices: C^2 within a chunk, one step from chunk to chunk.

CHUNK = 64  # of 32, 64, 128 the fastest at widths of 64 and 128 [measured on a CPU]

def scan_reference(q, k, v, log_a, b, pos, S):
    """The recurrence, token by token, per head with state S (B, H, N, Dv):
        w_t = v_t - b_t a_t S_{t-1}^T k_t    S_t = a_t S_{t-1} + k_t w_t^T    y_t = S_t^T q_t
    q, k (B, H or 1, T, N), v (B, H, T, Dv), log_a (B, H or 1, T) <= 0, b (B, H, T) or None for 0,
    pos (B, T) -> y (B, H, T, Dv), S. Position 0 forgets S first; padding, -1, leaves it alone."""
    out, b = [], torch.zeros_like(log_a) if b is None else b
    each = (x.unbind(2) for x in (q, k, v, log_a, b))
    for q, k, v, log_a, b, p in zip(*each, pos[:, None].unbind(2)):
        p, old = p[..., None, None], log_a.exp()[..., None, None] * S
        old = old.masked_fill(p == 0, 0.0)
        w = v[..., None, :] - b[..., None, None] * (k[..., None, :] @ old)
        S = torch.where(p < 0, S, old + k[..., None] * w)
        out.append((q[..., None, :] @ S).squeeze(-2))
    return torch.stack(out, 2), S

def scan(q, k, v, log_a, b, pos, S):
    """The same in chunks. Unrolled from the chunk's first state S_0, with g_ti = a_{i+1} ... a_t,
        S_t = g_t0 S_0 + sum_{i <= t} g_ti k_i w_i^T
    so y is a masked attention within the chunk plus a reading of S_0. Put into w_t, the sum gives
    equations (I + A) W = V - b g_0 K S_0, A_ti = b_t g_ti k_t . k_i for i < t: a triangular system,
    solved for both right sides before S_0 is known (the WY form of 2406.06484). With b = 0, W = V.
    g is the exp of a difference of sums of logs, never positive: nothing overflows. A document's
    start within i+1..t makes g 0."""
    dtype, T = v.dtype, pos.shape[1]
    C = min(CHUNK, T)
    n = -(-T // C)
    def cut(x, fill=0.0):  # (B, H, T, ...) -> (B, H, n, C, ...)
        return F.pad(up(x), (0, 0) * (x.ndim - 3) + (0, n * C - T), value=fill).unflatten(2, (n, C))
    q, k, v, log_a, pos = cut(q), cut(k), cut(v), cut(log_a), cut(pos[:, None], -1)
    k, log_a = k.masked_fill(pos[..., None] < 0, 0.0), log_a.masked_fill(pos < 0, 0.0)
    total, doc = F.pad(log_a.cumsum(-1), (1, 0)), F.pad((pos == 0).cumsum(-1), (1, 0))
    seen = (doc[..., None] == doc[..., None, :]).tril()
    g = (total[..., None] - total[..., None, :]).masked_fill(~seen, -math.inf).exp()
    within, enter, leave = g[..., 1:, 1:], g[..., 1:, :1], g[..., -1:, 1:].mT
    parts = [q * enter, within * (q @ k.mT), (k * leave).mT, g[..., -1:, :1], v]
    if b is not None:
        b = cut(b)[..., None]
        A, right = (b * within * (k @ k.mT)).tril(-1), torch.cat((v, b * enter * k), -1)
        parts[4:] = torch.linalg.solve_triangular(
            A, right, upper=False, unitriangular=True).split((v.shape[-1], k.shape[-1]), -1)
    out = []
    for q, qk, k_T, a, w, *from_state in zip(*(x.unbind(2) for x in parts)):
        for m in from_state: w = w - m @ S
        out.append(q @ S + qk @ w)  # (B,H,C,N) @ (B,H,N,Dv) + (B,H,C,C) @ (B,H,C,Dv)
        S = a * S + k_T @ w  # (B,H,N,C) @ (B,H,C,Dv) -> (B,H,N,Dv)
    return torch.cat(out, 2)[:, :, :T].to(dtype), S

# -----------------------------------------------------------------------------
# Convolutions along time

def short_conv(x, weight, pos, tail):
    """silu(sum_i weight_i x_{t-i}) for each channel, x (B, T, C), weight (W, C), tail (B, W-1, C)
    what came before -> the same shape, and the next tail. Padding stands last in x (packed)."""
    W, T = len(weight), x.shape[1]
    past, weight = torch.cat((tail.to(x.dtype), x), 1), weight.to(x.dtype)
    y = sum(weight[i] * past[:, W - 1 - i:][:, :T].masked_fill(pos[..., None] < i, 0.0)
            for i in range(W))
    last = (pos >= 0).sum(1, keepdim=True) + torch.arange(W - 1, device=x.device)
    return F.silu(y), take(past, last)

class ImplicitFilter(nn.Module):
    """Hyena's h (S, D), what a token adds to those 0..S-1 places later: a small network of eight
    waves that tell the distance, under a window that decays. The slowest window falls to 1 % at
    seq_len, the fastest at a tenth of it [our choice]."""
    def __init__(self, d, seq_len):
        super().__init__()
        widths, self.seq_len = (17, 32, 32, d), seq_len
        self.layers = nn.ModuleList(Linear(*pair, bias=True) for pair in zip(widths, widths[1:]))

    def forward(self, S):
        w = self.layers[0].weight
        t = torch.arange(S, device=w.device)[:, None] / self.seq_len
        angle = 2 * math.pi * t * torch.arange(1, 9, device=w.device)
        h = self.layers[0](torch.cat((t, angle.cos(), angle.sin()), -1).to(w.dtype))
        for layer in self.layers[1:]: h = layer(h.sin())
        return h * torch.exp(-4.6 * t * torch.linspace(1, 10, h.shape[1], device=w.device))

def long_conv_reference(u, h, pos, doc, u_pos, u_doc):
    """y_t = sum_s h[t - s] u_s over the places s that t may see (as for `visible`): u (B, S, D),
    h (S, D) -> (B, T, D), by T S D multiplications."""
    mask, gap = visible(pos, doc, u_pos, u_doc)[:, 0], pos[:, 0, :, None] - u_pos
    return torch.stack([torch.where(m[..., None], h[g.clamp(0, len(h) - 1)] * u, 0.0).sum(1)
                        for m, g in zip(mask.unbind(1), gap.unbind(1))], 1)

def long_conv(u, h):
    """The same for one document: a convolution is a product of spectra, at T log T. Zeros up to 2T
    keep the end of the circle from reaching its beginning."""
    n = 2 * u.shape[1]
    return torch.fft.irfft(torch.fft.rfft(u, n, 1) * torch.fft.rfft(h, n, 0), n, 1)[:, :n // 2]

# -----------------------------------------------------------------------------
# The lesson: what an operation needs, and what it takes

def operations(n, size):
    """(name, FLOPs, bytes, function of (a, b)) for (n, n) inputs of `size` bytes a number."""
    return [("a @ b", 2 * n ** 3, 3 * size * n ** 2, lambda a, b: a @ b),
            ("a + b", n ** 2, 3 * size * n ** 2, lambda a, b: a + b),
            ("gelu in 9 passes", 9 * n ** 2, 22 * size * n ** 2, gelu_reference),
            ("gelu fused", 9 * n ** 2, 2 * size * n ** 2,
             lambda a, b: torch.nn.functional.gelu(a, approximate="tanh")),
            ("softmax of rows", 5 * n ** 2, 2 * size * n ** 2, lambda a, b: a.softmax(-1))]

def gelu_reference(x, _=None):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Written out, each of its nine operations
    reads one or two inputs from memory and writes its result there: 22 numbers per element."""
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x * x * x)))

def main(args):
    device, args.n = torch.device(args.device), args.n or (4096 if args.device == "cpu" else 16384)
    print(args)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(args.n, args.n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    peak, source = peak_flops_per_s(device, dtype, args.n)
    bandwidth = 2 * a.numel() * a.element_size() / seconds(lambda: out.copy_(a), device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {dtype}: peak {peak:.3g} "
          f"FLOP/s ({source}),\ncopying {bandwidth:.3g} bytes/s; the ridge lies at "
          f"{peak / bandwidth:.1f} FLOPs per byte")
    print(f"{'operation':18s}{'FLOPs':>10s}{'bytes':>10s}{'intensity':>11s}{'at least':>11s}"
          f"{'takes':>11s}  bound by")
    for name, flops, n_bytes, run in operations(args.n, a.element_size()):
        least, side = roofline_s(flops, n_bytes, peak, bandwidth)
        takes = seconds(lambda: run(a, b), device)
        print(f"{name:18s}{flops:10.2e}{n_bytes:10.2e}{flops / n_bytes:11.2f}{1e3 * least:8.2f} ms"
              f"{1e3 * takes:8.2f} ms  {side}")
    h100 = DEVICES["H100"]
    print(f"on an H100 a product of bf16 matrices is bound by arithmetic from n = "
          f"{3 * h100[0] / h100[2]:.0f} on")

def build_parser():
    parser = argparse.ArgumentParser(
        description="Measures what operations take on a device, beside what the roofline allows.")
    parser.add_argument("--n", type=int, choices=[2 ** i for i in range(6, 16)], metavar="N",
                        help="rows and columns, a power of two from 64 to 32768, more than caches "
                        "hold (default: 4096, on a GPU 16384)")
    found = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    there = [name for name, is_there in found if is_there] + ["cpu"]
    parser.add_argument("--device", default=there[0], choices=there,
                        help="one of those that are here (default: %(default)s)")
    return parser

if __name__ == "__main__":
    main(build_parser().parse_args())
