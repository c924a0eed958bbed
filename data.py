"""data.py - from a source of text to the batches that a model trains on.

THE IDEA
    A model eats windows of token ids. Between a source and a window lie three stages, and each
    leaves files, so that nothing is done twice:
    1. text       train.txt and valid.txt, UTF-8, documents separated by <|endoftext|> (EOT)
    2. tokenizer  learned from train.txt
    3. tokens     train-*.bin and valid-*.bin, ids end to end
    A file gets its name when it is whole: what exists is complete, and a kill loses only the file
    being written. Notes (.json) say what it was made from; when that changes, it is made again.

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
    memory  a chunk of text in each process; two orders of windows, 8 bytes a window each
    time    encoding, on all cores; a row of a batch is one slice of a file on disk

CONTENTS  SOURCES / notes / downloads / 1 text / 2 tokenizer / 3 tokens / prepare / Loader /
          the lesson
NOT HERE  shards streamed from object storage, mixtures of sources, packing (which keeps parts of
          two documents out of one window; here the EOT between them tells the model)
RUN       python data.py                    # last line: every target exactly once an epoch: True
          python data.py get tinystories    # 2.3 GB; stop it, repeat it, it goes on
          python data.py get my_notes/ --tokenizer char
REFERENCES
    Karpathy 2022, nanoGPT: one flat file of ids; Eldan, Li 2023 (2305.07759): TinyStories;
    Gokaslan, Cohen 2019: OpenWebText; RFC 9110 sections 13 and 14: If-Range and byte ranges
EXERCISE  Empty Loader.__next__ and write it again until `pytest test_all.py -k loader` is green.
"""
import argparse, codecs, gzip, hashlib, http.client, json, mmap, os, re, shutil, sys, sysconfig
import time, urllib.request, zlib
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
# bytes/s, rough, for the announcement of large sources alone [our choice]; the last two a process
DOWNLOAD_RATE, TEXT_RATE, TRAIN_RATE, ENCODE_RATE = 20e6, 140e6, 3.5e6, 5.5e6

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
# Notes
# NAME.json beside a file says what it was made from. Without a note, or with a damaged one, the
# file counts as stale and is made again.

def digest(what) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()

def size_of(path: Path) -> int:
    """Bytes; 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0

def read_note(path: Path) -> dict:
    try:
        note = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}

def write_note(path: Path, note: dict) -> dict:
    with atomic_write(path.with_suffix(".json"), "w") as out:
        json.dump(note, out, indent=1)
    return note

def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of atomic_write, .NAME.PID.tmp, whose processes were killed."""
    for temp in folder.rglob(".*.*.tmp"):
        try:
            os.kill(int(temp.suffixes[-2][1:]), 0)          # signal 0 asks whether it lives
        except ProcessLookupError:
            temp.unlink(missing_ok=True)
        except (PermissionError, ValueError):               # another user's; not of atomic_write
            pass

# -----------------------------------------------------------------------------
# Downloads
# Gigabytes mean connections that drop. What has arrived stays in NAME.part, and the next
# connection, in this run or a later one, asks for the bytes after it. The note of a download holds
# its URL, size and version, so that the bytes of two files never end in one.

def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")

def receive(url: str, path: Path) -> None:
    """One connection: adds what it brings to the part."""
    have, note = size_of(part_of(path)), read_note(path)
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and note["version"]:        # if the file has changed since, all of the new one is sent
        headers["If-Range"] = note["version"]
    request = urllib.request.Request(url, headers=headers)
    with (urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply,
          open(part_of(path), "ab") as out):
        length, etag = reply.headers["Content-Length"], reply.headers["ETag"] or ""
        if reply.status != 206:         # the file from its start: it is new, or ranges unsupported
            out.truncate(0)
            have, note = 0, {"url": url, "size": None, "version":   # no weak ETag, W/"..."
                             etag if etag.startswith('"') else reply.headers["Last-Modified"]}
        note["size"] = note["size"] or (have + int(length) if length else None)
        write_note(path, note)
        with tqdm(desc=path.name, total=note["size"], initial=have, unit="B", unit_scale=True,
                  disable=None) as bar:
            while block := reply.read1(1 << 20):            # what is there, so a drop loses none
                bar.update(out.write(block))
        out.flush()
        os.fsync(out.fileno())

def fetch(url: str, path: Path) -> None:
    """Downloads url to path, whole or not at all. Connections that bring something may drop as
    often as they like; it gives up after TRIES connections in a row without a new byte."""
    part, failures = part_of(path), 0
    while failures < TRIES:
        time.sleep(WAIT_S * (2 ** failures - 1))
        have, error = size_of(part), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if read_note(path).get("url") != url:
                part.unlink(missing_ok=True)    # of another file, for all we know
            if not size_of(part) or have != read_note(path)["size"]:
                receive(url, path)
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in bpe.DISK_ERRORS:
                raise UserError(f"cannot write {part}: {e.strerror}; wanted a place with room in "
                                "it; give another folder or free some space") from e
            error, status = e, getattr(e, "code", 500)
            if status == 416:                   # its file is shorter than our part: begin anew
                part.unlink()
            if status < 500 and status != 429:
                failures = TRIES                # not there or not allowed: no use in asking again
        size, total = size_of(part), read_note(path).get("size")
        if not error and total in (size, None):
            return os.replace(part, path)
        if total and size > total:
            part.unlink()                       # it cannot become right: start afresh
        error = error or f"got {size:,} bytes, wanted {total:,}"
        failures = 0 if size > have else failures + 1
    raise UserError(f"cannot download {url}: {error}; run the same command again to go on, name "
                    f"another server with --mirror, or put the file by hand at {path.resolve()}")

def plan(dataset: str, folder: Path, files: list, note: dict, label: str, mirror, workers: int):
    """Says in one line what a large source still takes, and refuses what the disk cannot hold. What
    a mirror has is known only when it has come; until then nothing is refused."""
    source, known = SOURCES.get(dataset), all(file.exists() for file in files)
    have = sum(size_of(file) + size_of(part_of(file)) for file in files)
    download = text = 0
    if note:            # the text is there, and perhaps its tokens are
        encode = sum(size for side, size in zip(SIDES, note["bytes"])
                     if read_note(folder / f"{side}-{label}.bin").get("text") != note[side])
    elif known:         # a packed source grows by the ratio of its row
        text = encode = have * source.text // source.download if source and source.url else have
    else:
        download, text, encode = max(0, source.download - have), source.text, source.text
    tokens = encode * (4 if label in ("byte", "char") else 1)   # 2 bytes an id, twice; bpe: / 4
    tokens -= sum(map(size_of, folder.glob(f"*-{label}-parts-*/*")))    # from a run that was killed
    need, learn = download + text + max(0, tokens), encode if label.startswith("bpe") else 0
    free = shutil.disk_usage(next(p for p in folder.resolve().parents if p.exists())).free
    guess = " if the mirror has the original" if mirror and not known else ""
    line = (f"{dataset}: {download / 1e6:,.0f} MB to download, {need / 1e6:,.0f} MB of disk needed"
            f"{guess}, {free / 1e6:,.0f} MB free at {folder.resolve()}")
    if need > free and not guess:
        raise UserError(f"too little disk for {line}; free some or give another --data_dir")
    minutes = [seconds / 60 for seconds in (
        download / DOWNLOAD_RATE, text / TEXT_RATE, min(learn, BPE_BYTES) / TRAIN_RATE / workers,
        encode / ENCODE_RATE / workers)]
    if need > 1e8:
        print(line + "; minutes, about: download {:.0f}, text {:.0f}, tokenizer {:.0f}, tokens "
              "{:.0f}".format(*minutes))

# -----------------------------------------------------------------------------
# Stage 1, text
# Validation text must be new to the model, so files are never divided, unless there is only one.

SIDES = ("train", "valid")
WHOLE = (0, sys.maxsize)    # all bytes of a file
HIDDEN = r"\..*|__pycache__"
TESTS_AND_BUILD = r"tests?|idle_test|(site|dist)-packages|config-.*|_sysconfigdata.*"

def is_text(file: Path) -> bool:
    """A readable file (not a pipe, which would block), not empty, no NUL in its first 64 KiB."""
    if not file.is_file() or not os.access(file, os.R_OK):
        return False
    with open(file, "rb") as f:
        start = f.read(1 << 16)
    return bool(start) and b"\0" not in start

def find_files(dataset: str, folder: Path) -> tuple:
    """-> (root, files, how many others are no text). The files of a download may not exist yet. Of
    a folder all count but hidden ones and our own, of the standard library its texts."""
    source, root, left_out = SOURCES.get(dataset), Path(dataset), HIDDEN
    if source and source.url:
        return folder, [folder / name for name in source.files], 0
    if source:
        root, left_out = Path(sysconfig.get_path("stdlib")), f"{HIDDEN}|{TESTS_AND_BUILD}"
    found, ours = [] if root.is_dir() else [root], {folder.resolve(), folder.parent.resolve()}
    for here, folders, names in os.walk(root):
        names = [] if "train.json" in names else names      # a run of ours
        folders[:] = [name for name in folders if not re.fullmatch(left_out, name)
                      and Path(here, name).resolve() not in ours]
        found += [Path(here, name) for name in names if not re.fullmatch(left_out, name)
                  and (not source or name.endswith((".py", ".rst", ".txt")))]
    files = [file for file in found if is_text(file)]
    return root, files, len(found) - len(files)

def fingerprint(files: list, root: Path) -> str:
    """Changes when a file or the list of files does; independent of the folder's location."""
    return digest([(os.path.relpath(file, root), file.stat().st_size, file.stat().st_mtime_ns)
                   for file in sorted(files)])

def divide(files: list, root: Path) -> list:
    """-> for train and for valid, a list of (file, from byte, to byte). Many files go by a hash of
    their names, the same on every machine, about one in 20 to valid. One file is cut where nanoGPT
    cuts it, text[:int(0.9 * n)], but n counts bytes, valid has a limit, and no character is cut."""
    if len(files) == 1:
        size = size_of(files[0])
        cut = max(int(0.9 * size), size - VALID_BYTES)
        near = next(read_blocks(files[0], cut, cut + 4))
        cut += len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))   # UTF-8 continuation bytes
        return [[(files[0], 0, cut)], [(files[0], cut, size)]]
    number = {file: int(digest(file.relative_to(root).as_posix()), 16) for file in files}
    files = sorted(files, key=number.get)
    valid = {file for file in files if number[file] % 20 == 0}
    if len(valid) in (0, len(files)):
        valid = {files[0]}
    sides = [file for file in files if file not in valid], [file for file in files if file in valid]
    return [[(file, *WHOLE) for file in side] for side in sides]

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

def write_text(target: Path, ranges: list) -> tuple:
    """Joins ranges as UTF-8, each ended by EOT. -> (sha256 of the text, how many invalid sequences
    became a U+FFFD: the difference in length between replacing and ignoring them)."""
    sha, invalid = hashlib.sha256(), 0
    with atomic_write(target) as out, tqdm(desc=target.name, unit="B", unit_scale=True,
                                           disable=None, delay=1) as bar:
        for file, start, end in ranges:
            keep, drop = (codecs.getincrementaldecoder("utf-8")(e) for e in ("replace", "ignore"))
            tail = ""
            for block in read_blocks(file, start, end):
                text = keep.decode(block, final=not block)
                invalid += len(text) - len(drop.decode(block, final=not block))
                tail = (tail + text)[-64:]
                if not block and not tail.rstrip().endswith(EOT):       # the last block is empty
                    text += EOT
                sha.update(text.encode())
                bar.update(out.write(text.encode()))
    return sha.hexdigest(), invalid

def make_text(dataset: str, folder: Path, label: str, mirror, workers: int) -> dict:
    """Makes train.txt and valid.txt if they are missing or stale -> their note."""
    source, texts = SOURCES.get(dataset), [folder / f"{side}.txt" for side in SIDES]
    root, files, n_others = find_files(dataset, folder)
    note, to_come = read_note(folder / "text"), [file for file in files if not file.exists()]
    if (note.get("bytes") != [size_of(text) for text in texts]
            or (not to_come and note.get("files") != fingerprint(files, root))):
        note = {}               # a download that was deleted after it became text is not missed
    plan(dataset, folder, files, note, label, mirror, workers)
    for file in files if source and source.url else ():
        url = f"{(mirror or source.url).rstrip('/')}/{file.name}"
        if file in to_come and not note:
            fetch(url, file)
        if (origin := read_note(file).get("url", url)) != url:
            print(f"{file} came from {origin}; for that of {url} delete {folder}")
    if note:
        return note
    if (size := sum(map(size_of, files))) < MIN_BYTES:
        raise UserError(f"{dataset}: got {size} bytes of text; {n_others} files are empty, binary "
                        f"(they hold NUL bytes) or unreadable; wanted UTF-8, {MIN_BYTES} bytes or "
                        "more; give another file or folder")
    pair = source and len(source.files) == 2
    ranges = [[(file, *WHOLE)] for file in files] if pair else divide(files, root)
    write_note(folder / "text", {})         # a kill from here on leaves texts that count as stale
    shas, invalid = zip(*map(write_text, texts, ranges))
    print(f"{folder}: text of {len(files)} files, {n_others} empty or binary ones left out, "
          f"{sum(invalid)} invalid UTF-8 sequences replaced; sha256 of train.txt {shas[0][:16]}")
    return write_note(folder / "text", {"files": fingerprint(files, root), **dict(zip(SIDES, shas)),
                                        "bytes": [size_of(text) for text in texts]})

# -----------------------------------------------------------------------------
# Stage 2, tokenizer
# A row of TOKENIZERS makes one from train.txt. A file brings its own.

def cut_points(path, size: int, special_tokens=(EOT,)) -> list:
    """Byte offsets [0, ..., length], about `size` apart, where a cut changes no id: between a
    letter or digit and a space or line end, which no pre-token holds both, and in no special
    token. Where no place fits, the chunk grows."""
    specials, cuts = [special.encode() for special in special_tokens], [0]
    if os.path.getsize(path) == 0:   # which mmap refuses
        return [0, 0]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        def fits(i):
            before = data[max(0, i - 4):i].decode(errors="replace")[-1:]   # one character
            return before.isalnum() and not any(   # in this slice, a special token holds i inside
                special in data[max(0, i - len(special) + 1):i + len(special) - 1]
                for special in specials)

        def next_cut(start):
            while (place := re.compile(b"[ \n]").search(data, start)) and not fits(place.start()):
                start = place.end()
            return place and place.start()   # no match may outlive the map

        while cuts[-1] + size < len(data) and (cut := next_cut(cuts[-1] + size)):
            cuts.append(cut)
        return [*cuts, len(data)]

def read_chunk(text_path: Path, start: int, end: int) -> str:
    return b"".join(read_blocks(text_path, start, end)).decode(errors="replace")

def learn_bpe(text_path: Path, vocab_size: int, workers: int):
    size = size_of(text_path)
    print(f"BPE learns from {min(size, BPE_BYTES):,} of {size:,} bytes of {text_path}")
    learned = bpe.train(text_path, vocab_size, (EOT,), workers=workers, max_bytes=BPE_BYTES)
    return bpe.Tokenizer(*learned, (EOT,))

def learn_chars(text_path: Path, *_):
    cuts, chars = cut_points(text_path, CHUNK), set()
    for start, end in zip(cuts, cuts[1:]):
        chars.update(read_chunk(text_path, start, end).replace(EOT, ""))
    return bpe.CharTokenizer(sorted(chars), (EOT,))

TOKENIZERS = {
    "bpe": learn_bpe,
    "byte": lambda *_: bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], (EOT,)),
    "char": learn_chars,
}

def label_of(tokenizer: str, vocab_size: int) -> str:
    """The part of a token file's name that tells tokenizers apart. A mistake shows here, early."""
    lowest = len(bpe.BYTES) + 1
    if tokenizer == "bpe" and not lowest <= vocab_size <= sys.maxunicode:
        raise UserError(f"vocab_size: got {vocab_size}; wanted {lowest} (bytes and {EOT}) to "
                        f"{sys.maxunicode}; try 4096")
    if tokenizer in TOKENIZERS:
        return f"bpe-{vocab_size}" if tokenizer == "bpe" else tokenizer
    if not Path(tokenizer).exists():
        raise UserError(f"tokenizer: got {tokenizer!r}; wanted {', '.join(TOKENIZERS)} or the path "
                        "of a tokenizer.json or of its folder; nothing is at that path")
    tok = bpe.load_tokenizer(tokenizer)
    if tok.eot is None:
        raise UserError(f"{tokenizer}: it has no {EOT}, which separates documents; use another")
    return f"own-{tok.hash[:8]}"

def make_tokenizer(tokenizer: str, vocab_size: int, label: str, text_path: Path, sha: str,
                   workers: int) -> tuple:
    """-> (tokenizer, its file). One that we learn is named by kind, size and text (sha), so that a
    file of the right name is never stale."""
    path = text_path.with_name(f"tokenizer-{label}-{sha[:8]}.json")
    if tokenizer not in TOKENIZERS:
        path = Path(tokenizer)
    elif not path.exists():
        TOKENIZERS[tokenizer](text_path, vocab_size, workers).save(path)
    return bpe.load_tokenizer(path), str(path)

# -----------------------------------------------------------------------------
# Stage 3, tokens
# The slow stage. The text is cut where no id changes, each chunk becomes a file of its own in
# whichever process is free, and the files are joined in order.

@lru_cache(maxsize=1)
def load_once(path: str, tokenizer_hash: str):
    """A process's tokenizer; the hash is part of the key, so a rewritten file is loaded again."""
    return bpe.load_tokenizer(path)

def encode_part(text_path: Path, start: int, end: int, part: Path, dtype, *tokenizer) -> int:
    """Makes one part file, if it is not there from a run that was killed. -> bytes of text."""
    if not part.exists():
        ids = load_once(*tokenizer).encode(read_chunk(text_path, start, end))
        with atomic_write(part) as out:
            out.write(np.array(ids, dtype).tobytes())
    return end - start

def make_tokens(text_path: Path, sha: str, out: Path, tok, tok_path: str, workers: int) -> dict:
    """Makes a token file, unless it is there and fresh: [EOT doc EOT doc ... EOT], whose first EOT
    gives the first token of the text a context too. -> its note."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
    note = {"tokenizer": tok.hash, "text": sha, "dtype": dtype.name}
    old, unk = read_note(out), tok.special_tokens.get(bpe.UNK, -1)
    if note.items() <= old.items() and size_of(out) == old["tokens"] * dtype.itemsize:
        note = old
    else:
        cuts = cut_points(text_path, CHUNK, tuple(tok.special_tokens))
        folder = out.with_name(f"{out.stem}-parts-{digest((note, cuts))[:8]}")
        parts = [folder / f"{i:06}" for i in range(len(cuts) - 1)]
        jobs = [(text_path, *job, dtype, tok_path, note["tokenizer"])
                for job in zip(cuts, cuts[1:], parts)]
        with tqdm(desc=out.name, total=cuts[-1], unit="B", unit_scale=True, disable=None) as bar:
            for size in bpe.parallel_map(encode_part, jobs, workers):
                bar.update(size)
        documents = unknown = 0
        with atomic_write(out) as file:
            file.write(np.array([tok.eot], dtype).tobytes())
            for part in parts:
                ids = np.fromfile(part, dtype)
                file.write(ids.tobytes())
                documents += int(np.count_nonzero(ids == tok.eot))
                unknown += int(np.count_nonzero(ids == unk))
            note["tokens"] = file.tell() // dtype.itemsize
        n_bytes = size_of(text_path) - documents * len(EOT)
        write_note(out, note := note | {"bytes": n_bytes, "documents": documents,
                                        "unknown": unknown})
        print(f"{out}: {note['tokens']:,} tokens from {n_bytes:,} bytes of text in {documents:,} "
              f"documents, {unknown:,} unknown characters")
    for folder in out.parent.glob(f"{out.stem}-parts-*"):   # of texts that have changed since, too
        shutil.rmtree(folder)
    return note

# -----------------------------------------------------------------------------
# All three stages

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
    name, place, tokenizer = str(dataset), Path(dataset).resolve(), str(tokenizer)
    if name not in SOURCES:
        if not place.exists():
            raise UserError(f"dataset: got {name!r}; wanted one of {', '.join(SOURCES)}, or the "
                            "path of a text file or of a folder of them; nothing is at that path")
        name = f"{place.stem}-{digest(str(place))[:6]}"     # two folders called text: two names
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise UserError(f"workers: got {workers}; wanted 1 or more; leave it out for one a core")
    if mirror and not mirror.startswith(("http://", "https://")):
        raise UserError(f"mirror: got {mirror!r}; wanted a URL; try http://{mirror}")
    folder, label = Path(data_dir) / name, label_of(tokenizer, vocab_size)
    remove_leftovers(folder)
    shas = make_text(str(dataset), folder, label, mirror, workers)
    tok, tok_path = make_tokenizer(tokenizer, vocab_size, label, folder / "train.txt",
                                   shas["train"], workers)
    info = {side: make_tokens(folder / f"{side}.txt", shas[side], folder / f"{side}-{label}.bin",
                              tok, tok_path, workers) for side in SIDES}
    return Corpus(name, tok, folder / f"train-{label}.bin", folder / f"valid-{label}.bin", info)

# -----------------------------------------------------------------------------
# The loader
# Windows drawn at random, as many trainers do, miss 1/e of a corpus in as many draws as it has
# windows. A permutation misses nothing, and as it follows from (seed, epoch), a resumed run goes
# on with exactly the window that comes next.

def open_tokens(path) -> np.memmap:
    """A token file as an array. It is a memory map: the file stays on disk, and the system reads
    the pages that a slice touches, so that a corpus may be larger than memory."""
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

def in_order(tokens, seq_len: int, batch_size: int):
    """All windows, one after the other, in batches of one shape: the last one ends in padding."""
    for first in range(0, -(-(len(tokens) - 1) // seq_len), batch_size):
        yield windows(tokens, seq_len, range(first, first + batch_size))

def validation(corpus, limit):
    """(tokens, bytes of their text) to evaluate on."""
    tokens, tok = open_tokens(corpus.valid), corpus.tokenizer
    if limit is None or len(tokens) <= limit: return tokens, corpus.info["valid"]["bytes"]
    print(f"evaluations use the first {limit:,} of {len(tokens):,} validation tokens")
    special = set(tok.special_tokens.values())
    size = np.array([0 if i in special else len(tok.vocab[i]) for i in range(tok.vocab_size)])
    return tokens[:limit], int(size[tokens[1:limit]].sum())

@lru_cache(maxsize=2)       # a batch may lie across two epochs
def permutation(n: int, seed: int, epoch: int):
    return np.random.default_rng((seed, epoch)).permutation(n)

class Loader:
    """Iterates over (tokens, targets), int64, (batch_size / world, seq_len), across epochs.

    When `world` processes train together, each has a rank, 0 .. world - 1, and a loader that gives
    it its own rows of one shared batch: stacked by rank, they are what a single process would get.

    ids 0..10, seq_len 4: windows 0 1 2 3 -> 1 2 3 4,  4 5 6 7 -> 5 6 7 8,  8 9 - - -> 9 10 - -"""
    def __init__(self, tokens, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0,
                 world: int = 1, seen: int = 0):
        assert batch_size % world == 0, f"world {world} must divide batch_size {batch_size}"
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
    loader, met = Loader(np.arange(11), 4, 1, seed=2), [[], []]
    for s in range(2 * loader.n_windows):
        epoch, (tokens, targets) = s // loader.n_windows, (x[0].tolist() for x in next(loader))
        n = sum(target >= 0 for target in targets)
        met[epoch] += targets[:n]
        print(f"    epoch {epoch}   {tokens[:n]}  ->  {targets[:n]}")
    print("every target exactly once an epoch:",
          all(sorted(targets) == list(range(1, 11)) for targets in met))

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
    # a default of get's own would overwrite what stands before the command
    for p, default in ((parser, "data"), (get, argparse.SUPPRESS)):
        p.add_argument("--data_dir", default=default, help="folder for all files (default: data)")
    return parser

def main(args) -> None:
    options = dict(vars(args))
    print("data.py:", options)
    command = options.pop("command")
    try:
        if command == "get":
            prepare(**options)
        else:
            lesson(**options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None

if __name__ == "__main__":
    main(build_parser().parse_args())
