"""kernels.py - where the time goes: arithmetic, memory, and kernels that move less.

THE IDEA
    A processor is a factory, its memory a warehouse down the road. The factory multiplies far
    faster than the road brings numbers, so an operation takes the longer of two times: its
    arithmetic at the peak rate, or its bytes at the road's. Arithmetic intensity, FLOPs per byte
    moved, tells which. Large matrix products reuse each number often and are bound by arithmetic;
    what works element by element is bound by memory, and gets faster only by moving less: several
    steps in one pass, or tiles that stay on the chip until nothing is left to do with them. Here
    are the operations of a model as definitions (`x_reference`) and in torch, attention in Triton.

THE MATHS
    time >= max(FLOPs / peak, bytes / bandwidth)                        the roofline
    intensity = FLOPs / bytes; arithmetic binds when it exceeds peak / bandwidth
    product of (n, n) and (n, n): 2n^3 FLOPs, 3n^2 numbers read or written: intensity n/3 in bf16
    attention in tiles: m' = max(m, s), l' = l e^(m - m') + sum e^(s - m'), the same for y
    backward of y = softmax(s) v: ds = p (dp - sum(dp p)), dp = dy v^T, sum(dp p) = dy . y

THE COSTS
    On an H100 the ridge lies at 989e12 / 3.35e12 = 295 FLOPs per byte. Attention to T places takes
    4 T^2 Dh FLOPs a head, half of that if causal, and 10 T^2 Dh backward (2.5 times; 3.5 here, as p
    is made twice); in tiles it moves 4 T Dh numbers, written out 4 T^2 more.

CONTENTS  DEVICES / dtype, memory, choose / flags / loss, Linear, norms, attention / its kernel /
          positions, masks, caches / scan, convolutions / the lesson and the bench
NOT HERE  kernels of norms, loss and decoding: cuBLAS is called, torch.compile fuses; TMA, fp8
RUN       python kernels.py         # last line: "... bound by arithmetic from n = 886 on"
          python kernels.py bench   # on a GPU: each kernel's time beside torch's
REFERENCES
    Williams et al. 2009 (the roofline model); NVIDIA's datasheets; Dao 2023 (2307.08691) and Triton
    (Tillet et al. 2019) for tiles; Su et al. 2021 (2104.09864) RoPE; Zhang, Sennrich 2019
    (1910.07467) RMSNorm; Glorot, Bengio 2010 initial scale; Yang et al. 2024 (2406.06484) the scan
EXERCISE  Empty `roofline_s` and fill it until `pytest test_all.py -k roofline` is green again.
"""
import argparse, ctypes, dataclasses, itertools, math, os, platform, re, sys, time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    import triton, triton.language as tl
    jit, constexpr, INTERPRET = triton.jit, tl.constexpr, os.environ.get("TRITON_INTERPRET") == "1"
except ImportError:  # a Mac, Windows: every operation has its path in torch
    triton, jit, constexpr, INTERPRET = None, lambda function: function, None, False

# --- DEVICES: the one table of peak rates and bandwidths ---------------------
# Keyed by what torch.cuda.get_device_name says, or a part of it; of several that fit, the longest
# counts. Dense rates (datasheets also print twice that, "with sparsity"), accumulated in fp32.
# Bandwidths are those of the main memory.

DEVICES = {
    # name: (bf16 FLOP/s; fp16 on devices without bf16, fp32 FLOP/s without tensor cores, bytes/s)
    "V100": (125e12, 15.7e12, 0.9e12), "T4": (65e12, 8.1e12, 0.32e12),
    "A10": (125e12, 31.2e12, 0.6e12), "L4": (121e12, 30.3e12, 0.3e12),
    "A100": (312e12, 19.5e12, 1.555e12), "A100-SXM4-80GB": (312e12, 19.5e12, 2.039e12),
    "H100": (989e12, 67e12, 3.35e12), "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100 NVL": (835e12, 60e12, 3.9e12), "H200": (989e12, 67e12, 4.8e12),
    "B200": (2250e12, 75e12, 8.0e12)}
def device_row(name):
    """(bf16 FLOP/s, fp32 FLOP/s, bytes/s) of a device by its reported name, or None."""
    words = set(name.replace("-", " ").split())
    fits = [key for key in DEVICES if key in name and key.replace("-", " ").split()[0] in words]
    return DEVICES[max(fits, key=len)] if fits and "MIG" not in name else None  # a part of a GPU
def device_name(device):  # what to call a device in a log: the GPU's name, or the processor's
    if device.type == "cuda": return torch.cuda.get_device_name(device)
    if device.type == "mps": return "Apple GPU"
    info = Path("/proc/cpuinfo")  # on Linux
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.is_file() else "")
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"
def synchronize(device):  # waits for its queue: else a timer sees how fast work is handed over
    if device.type != "cpu": getattr(torch, device.type).synchronize()
def seconds(run, device, repeats=5):  # median time of run() in seconds, after one call to warm up
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]
def peak_flops_per_s(device, dtype):
    """(FLOP/s, where it is from): the datasheet's dense peak for 16-bit numbers, or else what an
    (n, n) product reaches now (float32 on a GPU may or may not use its tensor cores)."""
    row = device_row(device_name(device)) if device.type == "cuda" else None
    if row and dtype in (torch.bfloat16, torch.float16): return row[0], "datasheet"
    n = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, device), f"measured: {n} x {n} product"
def roofline_s(flops, n_bytes, peak, bandwidth):
    """(seconds at least, "arithmetic" or "memory", whichever binds)."""
    arithmetic, memory = flops / peak, n_bytes / bandwidth
    return max(arithmetic, memory), "arithmetic" if arithmetic >= memory else "memory"

# --- Choices that decide more than most kernels ------------------------------
# Choices that decide more than most kernels: a number format that the device has units for, memory
# that is used again. And which path: every operation here has a torch form, and some a kernel.

def fastest_dtype(device):
    """bfloat16 where there are units for it, else float32. On a CPU without them a bfloat16 product
    is emulated, a hundred times slower [measured]."""
    if device.type == "cuda": fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else: fast = device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in (
        "_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if fast else torch.float32
def keep_freed_memory():
    """Asks malloc (glibc's) not to return freed memory to the system. Else each large tensor is new
    memory, zeroed page by page: a loss over (4096, 2048) logits took 48 ms, now 16 [measured]."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(libc, "gnu_get_libc_version"): return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1))
USES, KERNELS, SAID = ("auto", "torch", "triton"), {"use": "auto"}, set()
def usable(): return triton and (INTERPRET or torch.cuda.is_available())
def choose(name, x, ok=True):
    """Is `name` done by a Triton kernel, if it can (ok)? Said once. `use`: torch, triton, or auto,
    which is triton for 16 bits on a Hopper GPU. TRITON_INTERPRET=1 runs it on a CPU, slowly."""
    if not (x.is_cuda or INTERPRET): return False
    ok, forced = ok and triton and KERNELS["use"] != "torch", KERNELS["use"] == "triton"
    ok = ok and (forced or x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9)
    ok = ok and x.dtype in (torch.float16, INTERPRET or torch.bfloat16, forced and torch.float32)
    if not torch.compiler.is_compiling() and (name, bool(ok)) not in SAID:
        print(f"kernels: {name} by {'triton' if ok else 'torch'}", file=sys.stderr)
        SAID.add((name, bool(ok)))
    return ok
# rows and columns of tiles, warps, stages [our choice, not yet measured: `bench --tune` measures].
# None spills registers on sm_90 [compiled, Triton 3.6]. "wide": of rows of more than 128 numbers.
CONFIGS = {"attention": (128, 64, 8, 3), "attention wide": (128, 32, 8, 2), "dq": (128, 64, 8, 2),
           "dq wide": (64, 32, 8, 2), "dkv": (64, 64, 8, 2), "dkv wide": (32, 64, 8, 2)}
def tile(name, x):
    """Rows, columns and other options of a kernel's tiles for x; 16 by 16 in the interpreter."""
    rows, columns, warps, stages = CONFIGS[name + " wide" * (x.shape[-1] > 128)]
    if x.dtype == torch.float32: rows, columns = max(16, rows // 2), columns // 2
    if INTERPRET: rows = columns = 16
    return rows, columns, dict(num_warps=warps, num_stages=stages)
def room(D): return max(16, 1 << (D - 1).bit_length())  # a power of two that tl.dot takes
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

# --- Operations of a model: as defined (`x_reference`), then as it is fast ---

def up(x): return x.to(torch.promote_types(x.dtype, torch.float32))  # at least float32
def softmax(x, dim=-1):
    """exp(x) / sum exp(x). Subtracting the maximum changes nothing but that exp cannot overflow."""
    e = torch.exp(up(x) - up(x).amax(dim, keepdim=True))
    return (e / e.sum(dim, keepdim=True)).to(x.dtype)
def cross_entropy_reference(logits, targets):
    """(..., V), (...) -> (...) nats per target, 0 where the target is -1. Never log(softmax(z)): a
    probability that underflows to zero would make the loss infinite."""
    z = up(logits)
    nats = z.logsumexp(-1) - z.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(targets >= 0, nats, 0.0)
def logits_of(x, weight, cap=None):
    """(..., D) @ (D, V) -> (..., V), soft-capped to (-cap, cap) if a cap is given."""
    z = F.linear(x, weight.to(x.dtype))
    return z if cap is None else cap * torch.tanh(z / cap)
LOGITS = 2 ** 27  # numbers: half a gigabyte in float32 [our choice]
def linear_cross_entropy(x, weight, targets, cap=None):
    """The loss from the stream (B, T, D) and the head (V, D). Of logits beyond LOGITS only a part
    is ever there: backward makes each part again, for 2 V D FLOPs a token (a checkpoint)."""
    def nats(x, targets):  # torch's fused call passes over the logits less often
        z = up(logits_of(x, weight, cap))
        return F.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    rows, flat = max(1, LOGITS // len(weight)), x.flatten(0, 1)
    if len(flat) <= rows: return nats(flat, targets.flatten()).view_as(targets)
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
def Embedding(n, d, std):  # a row per token: a product with one-hot vectors, done by looking up
    return nn.Embedding.from_pretrained(fresh(n, d, std=std), freeze=False)
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
def fused(q, v, p): return choose("attention", q, not p and q.shape[-1] == v.shape[-1] <= 256)
def attention(q, k, v, mask=None, dropout=0.0):
    """The same from a kernel or torch's fused call, which need not write the (T, S) matrix."""
    gqa, d_v = q.shape[1] != k.shape[1], v.shape[-1]
    if mask is None and fused(q, v, dropout): return FlashAttention.apply(q, k, v, True, None)
    if gqa and q.shape[2] == 1 and q.dtype.itemsize < 4 and mask is not None:  # 5 times faster
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # heads that share keys are queries of one
        return attention(q, k, v, mask, dropout).flatten(1, 2)[:, :, None]
    if d_v < q.shape[-1]: v = F.pad(v, (0, q.shape[-1] - d_v))  # unequal, it writes that matrix
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None,
                                          enable_gqa=gqa)[..., :d_v]

# --- FlashAttention-2 (2307.08691) -------------------------------------------
# The (T, S) scores of attention are 2 T S numbers to write and to read, and nobody wants them. So a
# program holds a tile of queries on the chip and passes over keys and values in tiles, with a
# running maximum m and sum l per row: when m rises, what was summed before shrinks by exp(m - m').
# Backward makes each tile of p again from the logsumexp alone. Its programs hold keys and values
# and pass over queries (dK, dV), then hold queries and dO and pass over keys (dQ). All three are
# one kernel: sums of weights times X or Y, whatever is held. Each number is written by one program,
# so results repeat exactly.

@jit
def load(at, rows, ok, D: constexpr, BD: constexpr):
    """Rows of D numbers at their offsets, in BD columns; zeros beyond D, and where not ok."""
    d = tl.arange(0, BD)
    return tl.load(at + (rows[:, None] + d[None, :]), ok[:, None] & (d[None, :] < D), 0.0)
@jit
def spans(first, last, T, KEYS: constexpr, CAUSAL: constexpr, WINDOW: constexpr, B: constexpr):
    """What is seen from queries at first..last, or who sees the KEYS there, of 0..T-1 in blocks of
    B: from lo to hi, from full to past without a mask."""
    lo, full, past, hi = first * 0, first * 0, T, T
    if CAUSAL and KEYS: lo, full = first, last
    elif CAUSAL: past, hi = first + 1, last + 1
    if WINDOW and KEYS: past, hi = first + WINDOW, last + WINDOW
    elif WINDOW: lo, full = first - WINDOW + 1, last - WINDOW + 1
    lo, hi = tl.maximum(lo, 0) // B * B, tl.minimum(hi, T)
    full = tl.minimum(tl.cdiv(tl.maximum(full, lo), B) * B, hi)
    return lo, full, tl.maximum(tl.minimum(past, T) // B * B, full), hi

@jit
def attention_pass(A, C, X, Y, DA, DC, LSE, DELTA, sa, sc, sx, sy, sd, H, T, scale,
                   FORWARD: constexpr, KEYS: constexpr, GROUPS: constexpr, D: constexpr,
                   BD: constexpr, CAUSAL: constexpr, WINDOW: constexpr, BM: constexpr,
                   BN: constexpr):
    """BM of the T rows of a head are held, of A (backward of C, too); X and Y pass by in BNs."""
    i0 = (tl.program_id(0) if KEYS else tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H  # long tiles go first
    i, last = i0 + tl.arange(0, BM), tl.minimum(i0 + BM, T) - 1
    lo, full, past, hi = spans(i0, last, T, KEYS, CAUSAL, WINDOW, BN)
    a = load(A + b * sa[0] + h * sa[1], i * sa[2], i < T, D, BD)
    m, l = tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32)
    da, dc = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32)
    if not FORWARD: c = load(C + b * sc[0] + h * sc[1], i * sc[2], i < T, D, BD)
    for EDGES in tl.static_range(2):  # the blocks in the middle, then both ends with masks
        start, end = (lo, full + hi - past) if EDGES else (full, past)
        n = tl.cdiv(end - start, BN)  # blocks of a head; heads that share keys follow in one loop
        for step in range(n * GROUPS if KEYS else n):
            j, other = start + step % n * BN, h * GROUPS + step // n if KEYS else h // GROUPS
            j = (tl.where(j < full, j, j + past - full) if EDGES else j) + tl.arange(0, BN)
            x = load(X + b * sx[0] + other * sx[1], j * sx[2], j < T, D, BD)
            y = load(Y + b * sy[0] + other * sy[1], j * sy[2], j < T, D, BD)
            query, key = (j[None, :], i[:, None]) if KEYS else (i[:, None], j[None, :])
            s = tl.dot(a, tl.trans(x), input_precision="ieee") * (scale * 1.4426950408889634)
            if EDGES:
                seen = key < T
                if CAUSAL: seen = seen & (key <= query)
                if WINDOW: seen = seen & (key > query - WINDOW)
                s = tl.where(seen, s, -float("inf"))
            if FORWARD:
                new = tl.maximum(m, tl.max(s, 1))
                p, shrink = tl.exp2(s - new[:, None]), tl.exp2(m - new)
                m, l, da = new, l * shrink + tl.sum(p, 1), da * shrink[:, None]
                da = tl.dot(p.to(y.dtype), y, da, input_precision="ieee")
            else:
                row = ((b * H * GROUPS + other) * T + j) if KEYS else (b * H + h) * T + i
                ok = j < T if KEYS else i < T
                lse, delta = tl.load(LSE + row, ok, 0.0), tl.load(DELTA + row, ok, 0.0)
                if KEYS: lse, delta = lse[None, :], delta[None, :]
                else: lse, delta = lse[:, None], delta[:, None]
                p = tl.exp2(s - lse * 1.4426950408889634)
                ds = p * (tl.dot(c, tl.trans(y), input_precision="ieee") - delta)
                da = tl.dot(ds.to(x.dtype), x, da, input_precision="ieee")
                if KEYS: dc = tl.dot(p.to(y.dtype), y, dc, input_precision="ieee")
    if FORWARD:  # nowhere is l 0: every row sees itself
        da /= l[:, None]
        tl.store(LSE + (b * H + h) * T + i, (m + tl.log2(l)) * 0.6931471805599453, i < T)
    else: da *= scale
    d = tl.arange(0, BD)
    at = b * sd[0] + h * sd[1] + i[:, None] * sd[2] + d[None, :]
    ok = (i[:, None] < T) & (d[None, :] < D)
    tl.store(DA + at, da.to(DA.dtype.element_ty), ok)
    if KEYS: tl.store(DC + at, dc.to(DC.dtype.element_ty), ok)

def launch(name, held, lse, delta, out, *how):
    (B, h, T, D), (BM, BN, options) = held[0].shape, tile(name, held[0])
    groups = max(h, held[2].shape[1]) // min(h, held[2].shape[1])
    strides = [x.stride()[:3] if x is not None else (0, 0, 0) for x in (*held, out[0])]
    attention_pass[(triton.cdiv(T, BM), B * h)](
        *held, *out, lse, delta, *strides, h, T, D ** -0.5, name == "attention", name == "dkv",
        groups, D, room(D), *how, BM, BN, **options)
class FlashAttention(torch.autograd.Function):
    """q (B, H, T, D), k, v (B, Hkv, T, D), causal, window -> (B, H, T, D)."""
    @staticmethod
    def forward(ctx, q, k, v, *how):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.how, (B, H, T, D), new = how, q.shape, partial(torch.empty, device=q.device)
        lse, out = new(B, H, T), new(B, T, H, D, dtype=q.dtype).transpose(1, 2)  # `merge` is free
        launch("attention", (q, None, k, v), lse, None, (out, None), *how)
        ctx.save_for_backward(q, k, v, out, lse)
        return out
    @staticmethod
    def backward(ctx, dout):
        (q, k, v, out, lse), dout = ctx.saved_tensors, dout.contiguous()
        delta = (up(dout) * up(out)).sum(-1)  # the gradient's share by the softmax
        dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
        launch("dkv", (k, v, q, dout), lse, delta, (dk, dv), *ctx.how)
        launch("dq", (q, dout, k, v), lse, delta, (dq, None), *ctx.how)
        return dq, dk, dv, None, None

# --- Positions, masks, context and caches ------------------------------------
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
    """Local attention in blocks of `window` queries a..b, which see keys c..b, their own block and
    the one before: 2 w T pairs, not T^2. One if T is too short to gain [measured on a CPU]."""
    if window is None or T < max(4 * window, 256): return [(0, T, 0)]
    return [(a, min(T, a + window), max(0, a - window)) for a in range(0, T, window)]
def take(x, index):  # (B, S, ...), (B, T) -> (B, T, ...)
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
        """RoPE on (B, H, T, Dh), if the model has it. Feature i of the first half pairs with i of
        the second, as in Llama's and Qwen's checkpoints; the paper pairs neighbours."""
        if not self.rope: return x
        d, (a, b) = x.shape[-1], up(x).chunk(2, -1)
        if d not in self.tables: self.tables[d] = rope_tables(self.rows, d, *self.rope)
        cos, sin = self.tables[d]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    def mask(self, window=None, a=0, b=None, c=0):
        """(B or 1, 1, T, S): of queries a..b, keys c..b. None if plainly causal: kernels know."""
        if self.plain and (window is None or window >= self.tokens.shape[1]): return None
        if (window, a, b) not in self.masks:
            rows = self.rows[:, None], documents(self.rows[:, None])  # (B or 1, 1, T)
            at = (x[..., i:b] for i in (a, c) for x in rows)
            self.masks[window, a, b] = visible(*at, window)
        return self.masks[window, a, b]
    def attend(self, q, k, v, window=None, p=0.0):  # to keys of this forward
        if self.plain and fused(q, v, p): return FlashAttention.apply(q, k, v, True, window)
        y = [attention(q[:, :, a:b], k[:, :, c:b], v[:, :, c:b], self.mask(window, a, b, c), p)
             for a, b, c in blocks(q.shape[2], window)]
        return y[0] if len(y) == 1 else torch.cat(y, 2)
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
    def last(self, i): return self.columns[i][:, :, (self.n - 1) % self.size, None]
    def next_pos(self):  # (B, 1): the position after each row's last; None if the cache is empty
        return self.last(2)[:, 0] + 1 if self.n else None
    def truncate(self, n):  # forgets all but the first n tokens (what followed was a wrong guess)
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

# --- Memories of a fixed size: one recurrence, in chunks ---------------------
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
    dtype, T, C, out = v.dtype, pos.shape[1], min(CHUNK, pos.shape[1]), []
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
    for q, qk, k_T, a, w, *from_state in zip(*(x.unbind(2) for x in parts)):
        for m in from_state: w = w - m @ S
        out.append(q @ S + qk @ w)  # (B,H,C,N) @ (B,H,N,Dv) + (B,H,C,C) @ (B,H,C,Dv)
        S = a * S + k_T @ w  # (B,H,N,C) @ (B,H,C,Dv) -> (B,H,N,Dv)
    return torch.cat(out, 2)[:, :, :T].to(dtype), S
def short_conv(x, weight, pos, tail):
    """silu(sum_i weight_i x_{t-i}) for each channel, x (B, T, C), weight (W, C), tail (B, W-1, C)
    what came before -> the same shape, and the next tail. Padding stands last in x (packed)."""
    W, T = len(weight), x.shape[1]
    past, weight = torch.cat((tail.to(x.dtype), x), 1), weight.to(x.dtype)
    y = sum(weight[i] * past[:, W - 1 - i:][:, :T].masked_fill(pos[..., None] < i, 0.0)
            for i in range(W))
    last = (pos >= 0).sum(1, keepdim=True) + torch.arange(W - 1, device=x.device)
    return F.silu(y), take(past, last)
def implicit_filter(layers, S, seq_len):
    """Hyena's h (S, D), what a token adds to those 0..S-1 places later: a small network of eight
    waves that tell the distance, under a window that decays. The slowest window falls to 1 % at
    seq_len, the fastest at a tenth of it [our choice]."""
    t = torch.arange(S, device=layers[0].weight.device)[:, None] / seq_len
    angle = 2 * math.pi * t * torch.arange(1, 9, device=t.device)
    h = layers[0](torch.cat((t, angle.cos(), angle.sin()), -1).to(layers[0].weight.dtype))
    for layer in layers[1:]: h = layer(h.sin())
    return h * torch.exp(-4.6 * t * torch.linspace(1, 10, h.shape[1], device=t.device))
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

# --- The lesson and the bench: what an operation needs, and what it takes ----

def gelu_reference(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). Written out, each of its nine operations
    reads one or two inputs from memory and writes its result there: 22 numbers per element."""
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x * x * x)))
def work(new, gpu):
    """(name, its rows of CONFIGS, FLOPs, numbers that it must read or write, the operation): on
    (n, n) matrices, and as in a model with 16 heads of 128, 4 of keys, on T tokens."""
    n, T = (4096, 16384) if gpu else (2048, 1024)
    a, b, s, heads, pairs = new(n, n), new(n, n), n * n, 40 * 128 * T, 16 * 128 * T * T / 2
    yield "a @ b", (), 2 * n ** 3, 3 * s, lambda: a @ b
    yield "a + b", (), s, 3 * s, lambda: a + b
    yield "gelu in 9 passes", (), 9 * s, 22 * s, lambda: gelu_reference(a)
    yield "gelu fused", (), 9 * s, 2 * s, lambda: F.gelu(a, approximate="tanh")
    yield "softmax of rows", (), 5 * s, 2 * s, lambda: a.softmax(-1)
    def back(f, *x):
        x = [t.detach().requires_grad_() for t in x]
        torch.autograd.grad(f(*x).sum(), x)
    loss = lambda x, W: linear_cross_entropy(x[None], W, torch.arange(n, device=x.device)[None])
    yield "loss, and back", (), 6 * n ** 3, 7 * s, lambda: back(loss, a, b)
    q, k, v = new(1, 16, T, 128), new(1, 4, T, 128), new(1, 4, T, 128)
    yield "attention", ("attention",), 4 * pairs, heads, lambda: attention(q, k, v)
    yield "and back", ("dkv", "dq"), 14 * pairs, 3 * heads, lambda: back(attention, q, k, v)

def table(args, rows):
    """Times rows(new, gpu), such as `work`: what an operation needs at least, and takes."""
    device, gpu = torch.device(args.device), args.device == "cuda"
    dtype, bench = fastest_dtype(device), args.what == "bench" and gpu and triton
    new = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    timer = partial(seconds, device=device)
    if bench: timer = lambda run: triton.testing.do_bench(run, return_mode="median") / 1e3
    elif args.what == "bench": print("no GPU with Triton here: torch's paths alone")
    (peak, source), x, out = peak_flops_per_s(device, dtype), new(4096, 4096), new(4096, 4096)
    bandwidth = 2 * x.nbytes / seconds(lambda: out.copy_(x), device)
    print(f"{args}\n{device_name(device)}, {torch.get_num_threads()} threads, {dtype}: peak "
          f"{peak:.3g} FLOP/s ({source}),\ncopying {bandwidth:.3g} bytes/s; the ridge lies at "
          f"{peak / bandwidth:.1f} FLOPs per byte. Last: in bf16 on an H100, an H200")
    form = ",".join(11 * ["{}"]) if args.csv else "{:17}{:9}" + 9 * "{:>11}"
    print(form.format("operation", "path", "FLOPs", "bytes", "intensity", "least ms", "takes ms",
                      "percent", "bound by", "H100 ms", "H200 ms"))
    def row(path, use, name, flops, numbers, run):
        KERNELS["use"], n_bytes, takes = use, numbers * x.itemsize, timer(run)
        least, side = roofline_s(flops, n_bytes, peak, bandwidth)
        gpus = (roofline_s(flops, 2 * numbers, *DEVICES[d][::2]) for d in ("H100", "H200"))
        print(form.format(name, path, f"{flops:.2e}", f"{n_bytes:.2e}", f"{flops / n_bytes:.1f}",
                          f"{1e3 * least:.3f}", f"{1e3 * takes:.3f}", f"{100 * least / takes:.0f}",
                          side, *(f"{1e3 * s:.4f} {by[:3]}" for s, by in gpus)))
        return takes
    rows = [row for row in rows(new, gpu) if args.profile in (None, row[0])]
    if not rows: raise SystemExit(f"profile: got {args.profile!r}, wanted a name in column one")
    for name, configs, *counts, run in rows:
        row("torch", "torch", name, *counts, run)
        if bench: row("compiled", "torch", name, *counts, torch.compile(run))
        if bench and configs: row("triton", "triton", name, *counts, run)
        for key in configs if bench and args.tune else ():
            found = {}
            for c in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                CONFIGS[key] = c
                try: found[row("triton", "triton", f"{key} {c}", *counts, run)] = c
                except (triton.TritonError, RuntimeError) as e: print(key, c, type(e).__name__)
            CONFIGS[key] = found[min(found)]
            print(f'"{key}": {CONFIGS[key]},')
        if args.profile:
            with torch.profiler.profile() as profile: run()
            print(profile.key_averages().table(f"self_{args.device}_time_total", row_limit=9))
def main(args):
    table(args, work)
    print(f"on an H100 a product of bf16 matrices is bound by arithmetic from n = "
          f"{3 * DEVICES['H100'][0] / DEVICES['H100'][2]:.0f} on")
def build_parser(what="what operations take on a device, beside what the roofline allows"):
    parser = argparse.ArgumentParser(description=f"Shows {what}.")
    parser.add_argument("what", nargs="?", choices=["lesson", "bench"], default="lesson",
                        help="bench: on a GPU, beside torch.compile and kernels (default: lesson)")
    parser.add_argument("--csv", action="store_true", help="commas between columns")
    parser.add_argument("--tune", action="store_true", help="bench: try other tiles for CONFIGS")
    parser.add_argument("--profile", metavar="NAME", help="of one operation, under torch.profiler")
    there = [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]
    parser.add_argument("--device", default=there[0], choices=there,
                        help="one of those that are here (default: %(default)s)")
    return parser
if __name__ == "__main__":
    main(build_parser().parse_args())
