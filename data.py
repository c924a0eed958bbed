"""data.py - from a source of text to the batches that a model trains on.

THE IDEA
    A model eats windows of token ids. Between a source and a window lie three stages, and each
    leaves files, so that nothing is done twice:
    1. text       train.txt and valid.txt, UTF-8, documents separated by <|endoftext|> (EOT)
    2. tokenizer  learned from train.txt
    3. tokens     train-*.bin and valid-*.bin, ids end to end, read through a memory map
    A file gets its name when it is whole: what exists is complete, and a kill costs the file in
    hand. Notes (.json) say what it was made from; when that changes, it is made again.

THE MATHS
    n ids hold n - 1 targets: all but the first, which only gives context. They are cut into
    K = ceil((n - 1) / T) windows of T = seq_len, and window k = 0 .. K-1 is
        tokens = ids[kT .. kT + T - 1]        targets = ids[kT + 1 .. kT + T]
    so every target is in exactly one window. What the last one lacks is padding, target -1.
    Epoch e takes the windows in the order permutation(seed, e); the s-th window ever read is
    number s mod K of epoch s div K. The pair (seed, s) is the whole state of the loader.
    bits_per_byte = (sum of -ln p over all targets) / (ln 2 * bytes of text): the bytes belong to
    the text, not to the tokenizer, so models with different tokenizers can be compared.

THE COSTS
    disk    the download, the text, 2 bytes an id (4 above 65,536 ids), twice while parts are joined
    memory  a chunk of text in each process, and 8 bytes a window for the order of an epoch
    time    encoding, on all cores; a row of a batch is one slice of the memory map

CONTENTS  SOURCES / downloads / 1 text / 2 tokenizer / 3 tokens / Loader / the lesson
NOT HERE  shards streamed from object storage, mixtures of sources, packing (which keeps parts of
          two documents out of one window; here the EOT between them tells the model)
RUN       python data.py                    # last line: every target exactly once an epoch: True
          python data.py get tinystories    # 2.3 GB; stop it, repeat it, it goes on
          python data.py get my_notes/ --tokenizer char
REFERENCES
    Karpathy 2022, nanoGPT: one flat file of ids; Eldan, Li 2023 (2305.07759): TinyStories;
    Gokaslan, Cohen 2019: OpenWebText; RFC 9110 section 14: byte ranges
EXERCISE  Empty Loader.__next__ and write it again until `pytest test_all.py -k loader` is green.
"""
import argparse, codecs, gzip, hashlib, http.client, json, os, re, shutil, sys, sysconfig, time
import urllib.request, zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bpe
from bpe import EOT, UserError, atomic_write

CHUNK = 1 << 21             # bytes of text that a process encodes at a time [our choice]
BPE_BYTES = 10**9           # BPE learns from this much of train.txt at most [our choice]
VALID_BYTES = 10**7         # a single file gives its last tenth, and this at most [our choice]
MIN_BYTES = 40              # a tenth of less might not hold one character [our choice]
TRIES, WAIT_S, TIMEOUT_S = 4, 0.5, 30       # connections in a row that bring nothing [our choice]
DOWNLOAD_RATE, TEXT_RATE = 20e6, 140e6      # bytes/s [our choice], [measured]
TRAIN_RATE, ENCODE_RATE = 3.5e6, 5.5e6      # bytes/s of text of each process [measured]

# -----------------------------------------------------------------------------
# Sources
# A row is all that tells one from another, and a path is a source too. Look at the licence before
# you publish a model.

@dataclass(frozen=True)
class Source:
    about: str
    homepage: str
    licence: str
    download: int           # bytes, about
    text: int               # bytes of train.txt and valid.txt together, about
    url: str = ""           # folder of the files on their server; none: the standard library
    files: tuple = ()       # (train, valid), or one that we cut

HF = "https://huggingface.co/datasets/"
GITHUB = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
SOURCES = {
    "stdlib": Source("code and documentation of the Python that runs this",
                     "https://docs.python.org/3/license.html", "PSF-2.0", 0, 12_300_000),
    "shakespeare": Source("plays; the classic of character models",
                          "https://github.com/karpathy/char-rnn", "public domain",
                          1_115_394, 1_115_394, GITHUB, ("input.txt",)),
    "tinystories": Source("stories in the words of a small child, by GPT-4",
                          HF + "roneneldan/TinyStories", "CDLA-Sharing-1.0",
                          2_250_000_000, 2_250_000_000, HF + "roneneldan/TinyStories/resolve/main",
                          ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")),
    "owt": Source("OpenWebText: pages that Reddit linked to (CS336's sample)",
                  HF + "stanford-cs336/owt-sample", "CC0, pages: their authors'",
                  4_700_000_000, 12_200_000_000, HF + "stanford-cs336/owt-sample/resolve/main",
                  ("owt_train.txt.gz", "owt_valid.txt.gz")),
}

# -----------------------------------------------------------------------------
# Downloads
# Gigabytes mean connections that drop. What has arrived stays in NAME.part, and the next
# connection, in this run or a later one, asks for the bytes after it.

def stated_size(headers):
    """Bytes of the whole file by "Content-Range: bytes 5-9/10" or "Content-Length: 10", or None."""
    size = (headers["Content-Range"] or headers["Content-Length"] or "").rpartition("/")[2]
    return int(size) if size.isdigit() else None

def fetch(url: str, path: Path) -> None:
    """Downloads url to path, whole or not at all. Connections that bring something may drop as
    often as they like; TRIES in a row that bring nothing end it with what a person can do."""
    part, failures = path.with_name(path.name + ".part"), 0
    while failures < TRIES:
        time.sleep(WAIT_S * (2 ** failures - 1))
        have, total, error = part.stat().st_size if part.exists() else 0, None, None
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply,
                  open(part, "ab") as out):
                total = stated_size(reply.headers)
                if reply.status != 206:         # no ranges here: it sends the file from its start
                    out.seek(0)
                    out.truncate()
                with tqdm(desc=path.name, total=total, initial=out.tell(), unit="B",
                          unit_scale=True, disable=None) as bar:
                    while block := reply.read1(1 << 20):    # what is there, so a drop loses none
                        bar.update(out.write(block))
                out.flush()
                os.fsync(out.fileno())
        except (OSError, http.client.HTTPException) as e:   # the network's errors and the disk's
            error, status = e, getattr(e, "code", 500)
            if status == 416:                   # nothing after what we have: whole, or too long
                total = stated_size(e.headers) or 0
            elif status < 500 and status != 429:
                failures = TRIES                # not there or not allowed: no use in asking again
        size = part.stat().st_size if part.exists() else 0
        if size == total or (total is None and error is None):
            return os.replace(part, path)
        if total is not None and size > total:
            part.unlink()                       # it cannot become right: start afresh
        error = error or f"got {size:,} bytes, wanted {total:,}"
        failures = 0 if size > have else failures + 1
    raise UserError(f"cannot download {url}: {error}; run the same command again to go on, name "
                    f"another server with --mirror, or put the file by hand at {path.resolve()}")

def plan(name: str, text: int, folder: Path, mirror, tokenizer: str, workers: int) -> None:
    """Says in one line what a large source takes, and refuses one that the disk cannot hold."""
    download = SOURCES[name].download if name in SOURCES else 0
    ids = text / (1 if tokenizer in ("byte", "char") else 4)    # about 4 bytes of text a token
    have = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    need = max(0, download + text + 2 * 2 * ids - have)         # 2 bytes an id, in parts and joined
    free = shutil.disk_usage(next(p for p in folder.resolve().parents if p.exists())).free
    line = (f"{name}: {download / 1e6:,.0f} MB to download; {need / 1e6:,.0f} MB of disk needed, "
            f"{free / 1e6:,.0f} MB free at {folder.resolve()}")
    if need > free and not mirror:                              # which may hold a smaller copy
        raise UserError(f"too little disk for {line}; free some or give another --data_dir")
    seconds = {"download": download / DOWNLOAD_RATE, "text": text / TEXT_RATE,
               "tokenizer": min(text, BPE_BYTES) / TRAIN_RATE / workers * (tokenizer == "bpe"),
               "tokens": text / ENCODE_RATE / workers}
    if need > 1e8:
        print(line + "".join(f"; {stage} about {s / 60:.0f} min" for stage, s in seconds.items()))

# -----------------------------------------------------------------------------
# Stage 1, text
# Validation text must be new to the model, so whole files or documents go to one side.

WHOLE = (0, sys.maxsize)    # all bytes of a file
HIDDEN = r"\..*|__pycache__"
TESTS_AND_BUILD = r"|tests?|idle_test|(site|dist)-packages|config-.*|_sysconfigdata.*"

def digest(what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()

def read_note(path: Path) -> dict:
    """A note that is missing or damaged says nothing, so that its subject is made again."""
    try:
        return json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}

def write_note(path: Path, note: dict) -> dict:
    with atomic_write(path.with_suffix(".json"), "w") as out:
        json.dump(note, out, indent=1)
    return note

def is_text(file: Path) -> bool:
    """Readable, not empty, no NUL in its first 64 KiB."""
    try:
        with open(file, "rb") as f:
            start = f.read(1 << 16)
        return bool(start) and b"\0" not in start
    except OSError:
        return False

def walk(root: Path, data_dir: Path, stdlib: bool) -> list:
    """All files below a folder but hidden ones and our own; of the standard library, its texts."""
    files, left_out = [], re.compile(HIDDEN + TESTS_AND_BUILD * stdlib)
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not left_out.fullmatch(name)
                      and Path(here, name).resolve() != data_dir.resolve()]
        files += [Path(here, name) for name in names if not left_out.fullmatch(name)
                  and (not stdlib or name.endswith((".py", ".rst", ".txt")))]
    return files

def split(files: list, root: Path) -> list:
    """-> for train and for valid, a list of (file, from byte, to byte). Many files go by a hash of
    their names, the same on every machine, about one in 20 to valid. One file is cut where nanoGPT
    cuts it, text[:int(0.9 * n)], or soon after: where a document or else a character ends."""
    if len(files) > 1:
        number = {file: int(digest(file.relative_to(root).as_posix()), 16) for file in files}
        files = sorted(files, key=number.get)
        valid = {file for file in files if number[file] % 20 == 0}
        if len(valid) in (0, len(files)):
            valid = {files[0]}
        return [[(f, *WHOLE) for f in files if (f in valid) == side] for side in (False, True)]
    size = files[0].stat().st_size
    cut = max(int(0.9 * size), size - VALID_BYTES)
    with open(files[0], "rb") as f:
        f.seek(cut - len(EOT) + 1)              # the cut may lie inside a separator
        near = f.read(min(1 << 20, (size - cut) // 2 + len(EOT)))
    found, after = near.find(EOT.encode()), near[len(EOT) - 1:]
    more = len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))     # not a character's first
    cut += found + 1 if found >= 0 else more
    return [[(files[0], 0, cut)], [(files[0], cut, size)]]

def read_blocks(path: Path, start: int, end: int):
    """Yields the bytes of a range, unpacked if the name ends in .gz; last an empty block."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            f.seek(start)
            while block := f.read(min(1 << 20, end - start)):
                start += len(block)
                yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: got a broken gzip file ({error}), wanted a whole one; delete it "
                        "and run the same command again") from error
    yield b""

def write_text(target: Path, ranges: list) -> int:
    """Joins ranges as UTF-8, each ended by EOT. -> how many invalid sequences are now a U+FFFD:
    what a decoder that replaces them gives more than one that drops them."""
    invalid = 0
    with atomic_write(target) as out, tqdm(desc=target.name, unit="B", unit_scale=True,
                                           disable=None, delay=1) as bar:
        for file, start, end in ranges:
            keep, drop = (codecs.getincrementaldecoder("utf-8")(e) for e in ("replace", "ignore"))
            tail = ""
            for block in read_blocks(file, start, end):
                text = keep.decode(block, final=not block)
                invalid += len(text) - len(drop.decode(block, final=not block))
                tail = (tail + text)[-64:]
                bar.update(out.write(text.encode()))
            if not tail.rstrip().endswith(EOT):
                out.write(EOT.encode())
    return invalid

def state(files: list, root: Path) -> list:
    """What changes when a file does, and what its neighbours are, but not where the folder is."""
    return [[os.path.relpath(file, root), file.stat().st_size, file.stat().st_mtime_ns]
            for file in sorted(files)]

def write_text_note(folder: Path, files) -> dict:
    """Notes what the texts are (sha256), and what shows that they or their files have changed."""
    note = {"files": files, "texts": state([folder / "train.txt", folder / "valid.txt"], folder)}
    for side in ("train", "valid"):
        sha = hashlib.sha256()
        for block in read_blocks(folder / f"{side}.txt", *WHOLE):
            sha.update(block)
        note[side] = sha.hexdigest()
    return write_note(folder / "text", note)

def make_text(dataset: str, folder: Path, data_dir: Path, mirror, tokenizer: str, workers: int):
    """Makes train.txt and valid.txt where they are missing or stale -> a note with their sha256."""
    source, texts, missing = SOURCES.get(dataset), [folder / "train.txt", folder / "valid.txt"], []
    exist, note = all(text.exists() for text in texts), read_note(folder / "text")
    made = exist and note.get("texts") == state(texts, folder)
    if source and source.url:
        root, size = folder, source.text
        found = files = [folder / name for name in source.files]
        missing = [file for file in files if not file.exists()]
        if missing and exist:       # put there by hand, or what they were made from was deleted
            return note if made else write_text_note(folder, None)
    else:
        root = Path(sysconfig.get_path("stdlib") if source else dataset)
        found = walk(root, data_dir, bool(source)) if root.is_dir() else [root]
        files = [file for file in found if is_text(file)]
        size = sum(file.stat().st_size for file in files)
    if made and not missing and note["files"] == digest(state(files, root)):
        return note
    plan(dataset, size, folder, mirror, tokenizer, workers)
    for file in missing:
        fetch(f"{(mirror or source.url).rstrip('/')}/{file.name}", file)
    size, left_out = sum(file.stat().st_size for file in files), len(found) - len(files)
    if size < MIN_BYTES:
        raise UserError(f"{dataset}: got {size} bytes of text, as {left_out} of {len(found)} files "
                        "are empty, binary (they hold NUL bytes) or unreadable; wanted UTF-8, "
                        f"{MIN_BYTES} bytes or more; give another file or folder")
    pair = source and len(source.files) == 2
    sides = [[(file, *WHOLE)] for file in files] if pair else split(files, root)
    invalid = sum(write_text(text, side) for text, side in zip(texts, sides))
    note = write_text_note(folder, digest(state(files, root)))
    print(f"{folder}: text of {len(files)} files, {left_out} empty or binary ones left out, "
          f"{invalid} invalid UTF-8 sequences replaced; sha256 of train.txt {note['train'][:16]}")
    return note

# -----------------------------------------------------------------------------
# Stage 2, tokenizer
# Its file is named by all that it depends on, so one of the right name is never stale.

def read_chunk(text: Path, start: int, end: int) -> str:
    return b"".join(read_blocks(text, start, end)).decode(errors="replace")

def make_tokenizer(kind: str, vocab_size: int, text: Path, sha: str, workers: int) -> tuple:
    """-> (tokenizer, its file, name for its token files)."""
    if kind not in ("bpe", "byte", "char"):
        if not Path(kind).exists():
            raise UserError(f"tokenizer: got {kind!r}; wanted bpe, byte, char or the path of a "
                            "tokenizer.json or of its folder; nothing is at that path")
        tok = bpe.load_tokenizer(kind)
        if tok.eot is None:
            raise UserError(f"{kind}: it has no {EOT}, which separates documents; use another")
        return tok, kind, f"own-{tok.hash[:8]}"
    name = f"bpe-{vocab_size}" if kind == "bpe" else kind
    path = text.with_name(f"tokenizer-{name}-{sha[:8]}.json")
    if path.exists():
        return bpe.load_tokenizer(path), str(path), name
    if kind == "bpe":
        size = text.stat().st_size
        print(f"{path.name}: BPE learns from {min(size, BPE_BYTES):,} of {size:,} bytes of {text}")
        tok = bpe.Tokenizer(*bpe.train(text, vocab_size, (EOT,), workers=workers,
                                       max_bytes=BPE_BYTES), (EOT,))
    elif kind == "byte":
        tok = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], (EOT,))
    else:
        cuts, chars = bpe.cut_points(text, CHUNK), set()
        for start, end in zip(cuts, cuts[1:]):
            chars.update(read_chunk(text, start, end).replace(EOT, ""))
        tok = bpe.CharTokenizer(sorted(chars), (EOT,))
    tok.save(path)
    return tok, str(path), name

# -----------------------------------------------------------------------------
# Stage 3, tokens
# The slow stage. The text is cut where no id changes, each chunk becomes a file of its own in
# whichever process is free, and the files are joined in order.

@lru_cache(maxsize=1)
def load_once(path: str, tokenizer_hash: str):
    """The tokenizer for a process; the hash tells a file from its successor of the same name."""
    return bpe.load_tokenizer(path)

def encode_part(text: Path, start: int, end: int, part: Path, dtype, *tokenizer) -> int:
    """Makes one part file, if it is not there from a run that was killed. -> bytes of text."""
    if not part.exists():
        ids = load_once(*tokenizer).encode(read_chunk(text, start, end))
        with atomic_write(part) as out:
            out.write(np.array(ids, dtype).tobytes())
    return end - start

def make_tokens(text: Path, sha: str, name: str, path: str, tok, workers: int) -> tuple:
    """text -> (token file [EOT doc EOT doc ... EOT], its note). The EOT in front gives the first
    token of the text a context too."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
    made_from = {"tokenizer": tok.hash, "text": sha, "dtype": dtype.name}
    out = text.with_name(f"{text.stem}-{name}.bin")
    note = read_note(out)
    if (made_from.items() <= note.items() and out.exists()
            and out.stat().st_size == note["tokens"] * dtype.itemsize):
        return out, note
    cuts = bpe.cut_points(text, CHUNK, tuple(tok.special_tokens))
    folder = out.with_name(f"{out.stem}-parts-{digest((made_from, cuts))[:8]}")
    parts = [folder / f"{i:06}" for i in range(len(cuts) - 1)]
    jobs = [(text, *job, dtype, path, tok.hash) for job in zip(cuts, cuts[1:], parts)]
    with tqdm(desc=out.name, total=cuts[-1], unit="B", unit_scale=True, disable=None) as bar:
        for size in bpe.parallel_map(encode_part, jobs, workers):
            bar.update(size)
    documents, unknown, unk = 0, 0, tok.special_tokens.get(bpe.UNK, -1)
    with atomic_write(out) as file:
        file.write(np.array([tok.eot], dtype).tobytes())
        for part in parts:
            ids = np.fromfile(part, dtype)
            file.write(ids.tobytes())
            documents += int(np.count_nonzero(ids == tok.eot))
            unknown += int(np.count_nonzero(ids == unk))
        n_tokens = file.tell() // dtype.itemsize
    n_bytes = text.stat().st_size - documents * len(EOT)
    note = write_note(out, made_from | {"tokens": n_tokens, "bytes": n_bytes,
                                        "documents": documents, "unknown": unknown})
    for old in out.parent.glob(f"{out.stem}-parts-*"):      # of texts that have changed since, too
        shutil.rmtree(old)
    print(f"{out}: {n_tokens:,} tokens from {n_bytes:,} bytes of text in {documents:,} documents, "
          f"{unknown:,} unknown characters")
    return out, note

@dataclass
class Corpus:
    name: str
    tokenizer: object
    train: Path             # token files
    valid: Path
    info: dict              # "train" and "valid" -> note: tokens, bytes, documents, dtype, ...

def prepare(dataset, tokenizer="bpe", vocab_size=4096, data_dir="data", mirror=None, workers=None):
    """Runs what is missing or stale of the three stages -> Corpus. dataset: a row of SOURCES or a
    path; tokenizer: bpe, byte, char or a path; workers: processes, None for one a core."""
    name, data_dir, path = str(dataset), Path(data_dir), Path(dataset).resolve()
    if name not in SOURCES:
        if not path.exists():
            raise UserError(f"dataset: got {name!r}; wanted one of {', '.join(SOURCES)}, or the "
                            "path of a text file or of a folder of them; nothing is at that path")
        name = f"{path.stem}-{digest(str(path))[:6]}"       # two folders called text: two names
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise UserError(f"workers: got {workers}; wanted 1 or more; leave it out for one a core")
    folder, files, notes = data_dir / name, {}, {}
    shas = make_text(str(dataset), folder, data_dir, mirror, str(tokenizer), workers)
    tok, path, label = make_tokenizer(str(tokenizer), vocab_size, folder / "train.txt",
                                      shas["train"], workers)
    for side in ("train", "valid"):
        files[side], notes[side] = make_tokens(folder / f"{side}.txt", shas[side], label, path, tok,
                                               workers)
    return Corpus(name, tok, files["train"], files["valid"], notes)

# -----------------------------------------------------------------------------
# The loader
# Windows drawn at random, as many trainers do, miss 1/e of a corpus in as many draws as it has
# windows. A permutation misses nothing, and as it follows from (seed, epoch), a resumed run goes
# on with exactly the window that comes next.

def open_tokens(path) -> np.memmap:
    """A token file as an array that stays on disk."""
    return np.memmap(path, dtype=read_note(Path(path))["dtype"], mode="r")

def windows(tokens, seq_len: int, which):
    """Windows of the given numbers -> (tokens, targets), int64, (B, seq_len). Past the end of the
    array tokens are 0 and targets -1."""
    ids = torch.full((len(which), seq_len + 1), -1)                     # (B, T + 1), -1: padding
    for row, k in zip(ids.numpy(), which):
        window = tokens[k * seq_len:(k + 1) * seq_len + 1]
        row[:len(window)] = window
    targets = ids[:, 1:].contiguous()                                   # (B, T + 1) -> (B, T)
    return ids[:, :-1].masked_fill(targets < 0, 0), targets

@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int):
    return np.random.default_rng((seed, epoch)).permutation(n)

class Loader:
    """Iterates over (tokens, targets), int64, (batch_size / world, seq_len), across epochs. The
    ranks' batches, one below the other, are the batch that a single process would get.

    ids 0..10, seq_len 4: windows 0 1 2 3 -> 1 2 3 4,  4 5 6 7 -> 5 6 7 8,  8 9 - - -> 9 10 - -"""
    def __init__(self, tokens, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0,
                 world: int = 1, seen: int = 0):
        assert batch_size % world == 0, f"batch_size {batch_size} must divide by world {world}"
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.rank, self.rows, self.seen = rank, batch_size // world, seen
        self.n_windows = -(-(len(tokens) - 1) // seq_len)       # rounded up
        if self.n_windows < batch_size:
            raise UserError(f"too little text: got {len(tokens):,} tokens, {self.n_windows} windows"
                            f" of seq_len {seq_len}; wanted one batch, {batch_size} windows; use "
                            "more text, or a smaller --batch_size or --seq_len")

    def __iter__(self):
        return self

    def __next__(self):
        first = self.seen + self.rank * self.rows
        self.seen += self.batch_size
        places = (divmod(s, self.n_windows) for s in range(first, first + self.rows))
        return windows(self.tokens, self.seq_len, [
            int(permutation(self.n_windows, self.seed, epoch)[i]) for epoch, i in places])

    def state(self) -> dict:
        return {"seed": self.seed, "seen": self.seen}

    def seek(self, seen: int) -> None:
        self.seen = seen

# -----------------------------------------------------------------------------
# The lesson, and the command line

def lesson(data_dir: str) -> None:
    print(f"\n{'SOURCES':12s}{'download MB':>12s}{'text MB':>9s}  what it is | licence | homepage")
    for name, row in SOURCES.items():
        print(f"{name:12s}{row.download / 1e6:12,.0f}{row.text / 1e6:9,.0f}  {row.about} | "
              f"{row.licence} | {row.homepage}")
    print("\nTHREE STAGES, for the default source; made once, a second run finds them")
    corpus = prepare("stdlib", data_dir=data_dir)
    for side, note in corpus.info.items():
        print(f"{side}: {note['documents']:,} documents, {note['bytes']:,} bytes, "
              f"{note['tokens']:,} tokens, {note['bytes'] / note['tokens']:.2f} bytes a token")
    ids, tok = open_tokens(corpus.valid), corpus.tokenizer
    ends = np.flatnonzero(ids == tok.eot)
    i = int(np.random.default_rng(0).integers(len(ends) - 1))
    text = tok.decode(ids[ends[i] + 1:ends[i + 1]].tolist())
    print(f"\nLOOK AT THE DATA: document {i} of valid, {len(text):,} characters")
    print("\n".join("    | " + line for line in text.splitlines()[:8]))
    print("\nTHE LOADER: tokens -> targets, for the ids 0 .. 10, seq_len 4, padding left out")
    loader, met = Loader(np.arange(11), 4, 1, seed=2), []
    for s in range(2 * loader.n_windows):
        tokens, targets = (x[0].tolist() for x in next(loader))
        n = sum(target >= 0 for target in targets)
        met += targets[:n]
        print(f"    epoch {s // loader.n_windows}   {tokens[:n]}  ->  {targets[:n]}")
    print("every target exactly once an epoch:", sorted(met) == sorted(2 * list(range(1, 11))))

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Without a command: the lesson.")
    get = parser.add_subparsers(dest="command").add_parser("get", help="prepare a source")
    get.add_argument("dataset", help=f"{', '.join(SOURCES)}, or a text file or a folder of them")
    get.add_argument("--tokenizer", default="bpe", help="bpe, byte, char, or the path of a "
                     "tokenizer.json or of its folder (default: bpe)")
    get.add_argument("--vocab_size", type=int, default=4096, help="ids of a bpe (default: 4096)")
    get.add_argument("--mirror", metavar="URL", help="another server: a file comes from URL/NAME, "
                     "NAME being its last component, as owt_train.txt.gz (default: the usual one)")
    get.add_argument("--workers", type=int, help="processes (default: one a core)")
    for p in (parser, get):
        p.add_argument("--data_dir", default="data", help="folder for all files (default: data)")
    return parser

def main(args) -> None:
    options = dict(vars(args))
    print("data.py:", options)
    try:
        prepare(**options) if options.pop("command") else lesson(args.data_dir)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None

if __name__ == "__main__":
    main(build_parser().parse_args())
