"""data.py - from a raw crawl to the batches that a model trains on.

THE IDEA
    Most of the web is trash, and a model becomes what is kept. The funnel reads what servers sent,
    finds the text in the pages, and drops by rules, by classifiers and by likeness to what came
    before. Its text, or any other, becomes train.txt and valid.txt, documents separated by
    <|endoftext|> (EOT); a tokenizer learned from train.txt; and ids end to end, train-*.bin and
    valid-*.bin. A file gets its name when it is whole: what exists is complete, and a kill loses
    only what was being written. Notes (.json) say what a file was made from.
THE MATHS
    J = |A & B| / |A | B|. P(two sets have the same least hash) = J, and of b bands of r hashes that
    one is the same, 1 - (1 - J^r)^b.    P(label | text) = softmax(mean of W[hash(n-gram)])
    n ids hold n - 1 targets, cut into K = ceil((n - 1) / T) windows of T = seq_len:
    tokens = ids[kT .. kT + T - 1], targets = ids[kT + 1 .. kT + T]; padding is -1. Epoch e takes
    them in the order permutation(seed, e): (seed, windows read) is the whole state of a loader.
    bits_per_byte = (sum of -ln p of targets) / (ln 2 * bytes of text), whatever the tokenizer
THE COSTS
    time: extraction; memory: dedup's shingles and bands; disk: the text, twice 2 or 4 bytes an id
CONTENTS  Sources / downloads / crawl / HTML / rules / classifier / duplicates / funnel / text / ...
NOT HERE  JavaScript, PDF, repetition rules, decontamination, mixing, packing, fastText's own files
RUN       python data.py                    # last line: every target exactly once an epoch: True
          python data.py get tinystories    # 2.3 GB; stop it, repeat it, it goes on
          python data.py get commoncrawl --records 200   # FILE. Then `look FILE`, and
          python data.py funnel FILE --out clean --stages extract,lang=en,gopher,lines,dedup,mask
REFERENCES  Rae 2021, Raffel 2019, Penedo 2024: rules; Broder 1997: MinHash; Joulin 2016: fastText;
          nanoGPT: one file of ids; Eldan 2023: TinyStories; RFC 9110: byte ranges; Stanford CS336
EXERCISE  Empty Loader.__next__ and write it again until `pytest test_all.py -k loader` is green.
"""
import argparse, ast, codecs, gzip, hashlib, heapq, html, http.client, inspect, io, itertools, json
import math, os, re, shutil, sys, sysconfig, time, unicodedata, urllib.request, zipfile, zlib
from collections import Counter, namedtuple
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from tqdm import tqdm
import bpe
from bpe import EOT, UserError, atomic_write
BPE_BYTES, VALID_BYTES, MIN_BYTES = 10**9, 10**7, 40    # for BPE, for valid, of a text [our choice]
SIDES, WHOLE, PAGE_BYTES = ("train", "valid"), (0, sys.maxsize), 25_000     # of a page [guess]
TRIES, WAIT_S, TIMEOUT_S = 4, 0.5, 30       # connections in a row that bring nothing [our choice]
# --- Sources -----------------------------------------------------------------
# A path is one, too. files: train and valid, or one that we cut, in `folder` of the homepage.
HF, Source = "https://huggingface.co/datasets/", namedtuple(
    "Source", "homepage licence download text folder files", defaults=("", ()))
SOURCES = {     # stdlib: code and documentation of the Python that runs this
    "stdlib": Source("https://docs.python.org/3/license.html", "PSF-2.0", 0, 12_300_000),
    "shakespeare": Source("https://github.com/karpathy/char-rnn", "public domain",
        1_115_394, 1_115_394, "/raw/master/data/tinyshakespeare", ("input.txt",)),
    "tinystories": Source(HF + "roneneldan/TinyStories", "CDLA-Sharing-1.0", 2_250_000_000,
        2_250_000_000, "/resolve/main", tuple(f"TinyStoriesV2-GPT4-{x}.txt" for x in SIDES)),
    "owt": Source(HF + "stanford-cs336/owt-sample", "CC0, pages: their authors'", 4_700_000_000,
        12_200_000_000, "/resolve/main", tuple(f"owt_{x}.txt.gz" for x in SIDES)),
    "commoncrawl": Source("https://data.commoncrawl.org", "its terms; pages: their authors'",
        5_000_000, 0, "/crawl-data/CC-MAIN-2024-22/segments/1715971057216.39/warc",
        ("CC-MAIN-20240517233122-20240518023122-00000.warc.gz",))}
def require(fine, what, got, wanted: str) -> None:
    if not fine: raise UserError(f"{what}: got {got}; wanted {wanted}")
def digest(what) -> str: return hashlib.sha256(repr(what).encode()).hexdigest()
def size_of(path: Path) -> int: return path.stat().st_size if path.exists() else 0
def part_of(path: Path) -> Path: return path.with_name(path.name + ".part")
def read_note(path: Path) -> dict:      # NAME.json beside a file; damaged: the file counts as stale
    try: note = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError): return {}
    return note if isinstance(note, dict) else {}
def write_note(path: Path, note: dict) -> dict:
    with atomic_write(path.with_suffix(".json"), "w") as out: json.dump(note, out, indent=1)
    return note
def remove_leftovers(folder: Path) -> None:     # .NAME.PID.tmp of atomic_write, if PID was killed
    for temp in folder.rglob(".*.*.tmp"):
        try: os.kill(int(temp.suffixes[-2][1:]), 0)         # signal 0 asks whether it lives
        except ProcessLookupError: temp.unlink(missing_ok=True)
        except (PermissionError, ValueError): pass          # another user's; not of atomic_write
def progress(**how): return tqdm(unit="B", unit_scale=True, disable=None, **how)
# --- Downloads ---------------------------------------------------------------
# What has come stays in NAME.part for the next connection; by its note no files mix.
def receive(url: str, path: Path, part: Path, most) -> None:     # one connection; it may drop
    path.parent.mkdir(parents=True, exist_ok=True)
    if (note := read_note(path)).get("url") != url: part.unlink(missing_ok=True)    # another's
    request, have = urllib.request.Request(url), size_of(part)
    if not have or have != note["size"]:
        if have or most: request.add_header("Range", f"bytes={have}-{most - 1 if most else ''}")
        if have and note["version"]: request.add_header("If-Range", note["version"])    # else all
        with urllib.request.urlopen(request, None, TIMEOUT_S) as reply, open(part, "ab", 0) as out:
            length, etag = reply.headers["Content-Length"], reply.headers["ETag"] or ""
            if most and reply.status != 206: raise OSError("the server sends no byte ranges")
            if not have or reply.status != 206:     # from the start: it is new, or has changed
                out.truncate(have := 0)
                note = {"url": url, "size": None, "version":    # no weak ETag, W/"..."
                        etag if etag.startswith('"') else reply.headers["Last-Modified"]}
            note["size"] = have + int(length) if length else note["size"]
            write_note(path, note)
            with progress(desc=path.name, total=note["size"], initial=have) as bar:
                while block := reply.read1(1 << 20): bar.update(out.write(block))
            os.fsync(out.fileno())
    if (size := size_of(part)) != note["size"] is not None:
        raise OSError(f"got {size:,} bytes, wanted {note['size']:,}")
def fetch(url: str, path: Path, most=None) -> None:     # whole, or its first bytes; or nothing
    part, failures = part_of(path), 0
    while failures < TRIES:
        time.sleep(WAIT_S * (2 ** failures - 1))
        have, error, status = size_of(part), None, 500
        try: receive(url, path, part, most)
        except (OSError, http.client.HTTPException) as e: error, status = e, getattr(e, "code", 500)
        if not error: return os.replace(part, path)
        if getattr(error, "errno", None) in bpe.DISK_ERRORS: raise UserError(
            f"cannot write {part}: {error.strerror}; wanted a place with room; give another folder")
        if status == 416: part.unlink()         # theirs is shorter: begin anew
        elif status < 500 and status != 429: failures = TRIES     # to ask again is no use
        failures = 0 if size_of(part) > have else failures + 1
    raise UserError(f"cannot download {url}: {error}; run the same command again to go on, name "
                    f"another server with --mirror, or put the file by hand at {path.resolve()}")
# --- The crawl ---------------------------------------------------------------
# WARC files hold what servers sent, WET files its text. What is broken is left out.
BLOCK, MAX_BODY, MAGIC, BOMS = 1 << 16, 10**7, b"\x1f\x8b\x08", (b"\xff\xfe", b"\xfe\xff")  # bytes
SIZE = re.compile(rb"\s*([0-9a-fA-F]{1,7})[^\r\n]{0,99}\r?\n")  # of a chunk
CHARSET = re.compile(r"charset\s*=[\s\"']*((utf|iso|win|cp|koi|gb|big5|euc|shift|us-)[\w-]+)", re.I)
ALIASES = {"iso-8859-1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030", "shift_jis": "cp932"}
class Unzip(gzip.GzipFile): readinto = gzip.GzipFile.readinto1      # gives what precedes an error
def unpacked(file):
    packed, _ = file.read(3) == MAGIC, file.seek(0)
    return io.BufferedReader(Unzip(fileobj=file), BLOCK) if packed else file
def fields_of(lines) -> dict:
    pairs = (line.decode("utf-8", "replace").partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}
def read_warc(file, counts: Counter):
    """Yields (header, body) of records. What is between them is skipped, too long ones, too."""
    next_line = partial((file := unpacked(file)).readline, BLOCK)
    for line in iter(next_line, b""):
        counts["lines between records"] += bool(line.strip()) and not line.startswith(b"WARC/")
        if not line.startswith(b"WARC/"): continue
        lines = itertools.islice(iter(next_line, b""), 200)
        fields = fields_of(itertools.takewhile(bytes.strip, lines))
        size = fields.get("content-length", "")
        fine = re.fullmatch("[0-9]{1,18}", size) and int(size) <= MAX_BODY
        if fine and len(body := file.read(int(size))) == int(size): yield fields, body
        else: counts["wrong lengths"] += 1
def decode(body: bytes, declared: str) -> str:  # what fits, or fits 99 %, or Windows-1252
    found = CHARSET.search(declared) or CHARSET.search(str(body[:2048], "latin-1"))
    names = ["utf-16"] if body[:2] in BOMS else [m[1].lower() for m in [found] if m]
    for errors, name in itertools.product(("strict", "replace"), [*names, "utf-8-sig"]):
        with suppress(LookupError, UnicodeError):
            text = body.decode(ALIASES.get(name, name), errors)
            if errors == "strict" or text.count("\ufffd") * 100 <= len(text): return text
    return body.decode("cp1252", "replace")
def page_of(fields: dict, body: bytes, counts: Counter):      # a record -> a document, or None
    kind, url, http = fields.get("warc-type"), fields.get("warc-target-uri", "").strip("<>"), {}
    if kind not in ("response", "resource", "conversion"): return None
    if kind == "response" and body.startswith(b"HTTP/"):
        head, _, body = body.partition(b"\n\r\n" if b"\n\r\n" in body[:BLOCK] else b"\n\n")
        if b" 200" not in head[:20]: return None
        http = fields_of(head.split(b"\n"))
    media = fields.get("warc-identified-payload-type") or (http or fields).get("content-type", "")
    if "chunked" in http.get("transfer-encoding", "").lower():
        parts, at = [], 0
        while (size := SIZE.match(body, at)) and int(size[1], 16):
            parts.append(body[size.end():(at := size.end() + int(size[1], 16))])
        body = b"".join(parts) + (b"" if size else body[at:])   # not in chunks, whatever it says
    if "content-encoding" in http:      # some crawlers unpack and leave the header as it was
        with suppress(zlib.error): body = zlib.decompressobj(47).decompress(body, MAX_BODY)
    if body.startswith(b"%PDF") or not re.search("html|text/plain|xml|^$", media.lower()):
        counts["not text (for PDF: pypdf)"] += 1
    else: return {"url": url, "text": decode(body, http.get("content-type", "")),
                  "html": kind != "conversion" and "plain" not in media.lower()}
# --- HTML to text ------------------------------------------------------------
# Paragraphs vote for the boxes around them, by commas and length, links against them (Readability).
RAW = set("script style noscript template svg iframe textarea math canvas object".split())
GONE = set("head button select nav footer aside dialog figure".split())     # never content
BLOCKS = set("p div ul ol dl table section article blockquote pre h1 h2 h3 h4 h5 h6 header main "
             "form address fieldset details li tr td th dt dd center".split())
MARKS = {"li": ("\2\5", "\2"), "td": ("", " \4 "), "th": ("", " \4 ")}
BOXES = BLOCKS | GONE | {"a", "span", "body"}   # the text of other tags is that of the box around
TAG = re.compile(r"<!--.*?(?:-->|\Z)|<([/!?]?)([a-zA-Z][^\s/>]*)([^>]*)>", re.S)
NAMES = re.compile(r"""(?:class|id|role|itemprop)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""", re.I)
BAD = re.compile(r"menu|nav|\bads?\b|widget|byline|meta|tags|foot|header|popup|login|caption|share|"
    "author|tool|hidden|related|comment|sidebar|cookie|social|promo|credit|newsletter|print|teaser|"
    "recommend", re.I)  # names of boxes that hold no article
class Box:
    def __init__(self, tag, attributes="", up=None):
        self.tag, self.up, self.kids, self.score = tag, up, [], 0.0
        self.name = " ".join(NAMES.findall(attributes)) if len(attributes) > 4 else ""
        self.pre = tag == "pre" or up is not None and up.pre
        if up: up.kids.append(self)
    def around(self):                               # itself and the boxes around it
        while self: yield self; self = self.up
def parse(page: str) -> list:           # its boxes, each before those in it
    boxes, at, end = [box := Box("html")], 0, page.rfind(">") + 1   # behind the last, none closes
    while len(boxes) < 30_000 and (tag := TAG.search(page, at, end)):   # enough for an article
        text, at, name = page[at:tag.start()], tag.end(), (tag[2] or "").lower()
        if text: box.kids.append(text.replace("\n", "\2").replace(" ", "\3") if box.pre else text)
        if tag[1] == "/" and name in BOXES:         # ends the nearest of its name, not a far one
            near = itertools.islice(box.around(), 30)
            box = next((up.up for up in near if up.tag == name and up.up), box)
        elif name == "br": box.kids.append("\2")
        elif name in RAW and not tag[1]:
            close = re.compile(f"</{name}", re.I).search(page, at)
            at = close.start() if close else len(page)
        elif name in BOXES and not tag[1]:
            if box.tag == "p" and name in BLOCKS or box.tag == name in ("li", "td"): box = box.up
            boxes.append(box := Box(name, tag[3], box))
    box.kids.append(page[at:] if len(boxes) < 30_000 else "")
    return boxes
def vote(boxes: list) -> None:
    """Votes, and what is out: by tag; by name, which deceives where much text is; by links."""
    texts_of = lambda box: [kid for kid in box.kids if kid.__class__ is str]
    much = .4 * sum(len(text) for box in boxes if box.tag == "p" for text in texts_of(box))
    for box in reversed(boxes):
        inner = [kid for kid in box.kids if kid.__class__ is Box and not kid.out]
        own, tag, name = sum(len(text.strip()) for text in texts_of(box)), box.tag, box.name
        n = box.n = own + sum(kid.n for kid in inner)
        links = box.links = n if tag == "a" else sum(kid.links for kid in inner)
        box.out = (tag in GONE or n < max(250, much) and (tag == "form" or bool(BAD.search(name)))
                   or .6 * n < links and n < 3000 and tag not in ("a", "p", "span"))
        if not box.out and n >= 25 and (own >= 25 or tag in ("p", "pre", "td", "blockquote")):
            score = 1 + sum(text.count(",") for text in texts_of(box)) + min(n / 100, 3)
            for k, up in zip((1, 2, 3, 4), box.up.around() if box.up else ()):
                up.score += score * (1 - links / n) / k
def extract(page: str) -> str:
    """HTML -> the text of its article. \\2 is a line end, \\3 a space that is not squeezed."""
    vote(boxes := parse(page))
    best = max(boxes, key=lambda box: 0 if box.out else box.score * (1 - box.links / max(box.n, 1)))
    kin = [box for box in (best.up.kids if best.up else [best]) if box.__class__ is Box and (
        box is best or not box.out and box.score >= max(10, .2 * best.score))]
    out, stack = [], kin[::-1]
    while stack:
        if (box := stack.pop()).__class__ is str: out.append(box)
        elif not box.out:
            start, end = MARKS.get(box.tag, ("\2\2" * (box.tag in BLOCKS),) * 2)
            out.append(start)
            stack += [end, *reversed(box.kids)]
    text = re.sub(r"(?<![ \x04])[ \x04]*\x02[ \x02\x04]*", lambda edge: "\n" * min(
        2, edge[0].count("\2")), re.sub(r"\s+", " ", html.unescape("".join(out))))
    text = re.sub(r"\n+\x05\s*", "\n  \u2022 ", text)
    return text.replace("\3", " ").replace("\4", "|").replace("\5", "").strip("\n ")
# --- Rules -------------------------------------------------------------------
# What is measured, its value, the lowest and the highest that stay; and whose rule it is.
STOP_WORDS, DOTS = set("the be to of and that have with".split()), ("...", "\u2026")
ENDS, OCTET = (".", "?", "!", '"', "\u201d"), r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
C4_NOT = re.compile("javascript|terms of use|privacy policy|cookie policy|uses? (of )?cookie", re.I)
MASKS = {"EMAIL_ADDRESS": r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
         "PHONE_NUMBER": r"(?<![\w.])(?:\+?1[-. ]?)?\(?[2-9]\d\d\)?[-. ]{,2}\d{3}[-. ]?\d{4}(?!\w)",
         "IP_ADDRESS": rf"(?<![\w.])(?:{OCTET}\.){{3}}{OCTET}(?!\w|\.\w)"}
def share(test, of) -> float: return sum(map(test, of)) / max(1, len(of))
RULES = {
    "gopher": lambda text, words, lines: (      # Rae 2021 (2112.11446), A1.1
        ("words", len(words), 50, 100_000), ("characters a word", share(len, words), 3, 10),
        ("# a word", text.count("#") / len(words), 0, .1),
        ("... a word", sum(map(text.count, DOTS)) / len(words), 0, .1),
        ("lines with a bullet", share(lambda line: line[0] in "\u2022-*", lines), 0, .9),
        ("lines ending in ...", share(lambda line: line.endswith(DOTS), lines), 0, .3),
        ("words with a letter", share(lambda word: any(map(str.isalpha, word)), words), .8, 1),
        ("of 8 stop words", len(STOP_WORDS.intersection(text.lower().split())), 2, 8)),
    "c4": lambda text, words, lines: (          # Raffel 2019 (1910.10683), 2.2
        ("sentences", len(re.findall(r"[.?!](?:\s|$)", text)), 3, math.inf),
        ("lorem ipsum or {", text.count("{") + text.lower().count("lorem ipsum"), 0, 0)),
    "fineweb": lambda text, words, lines: (     # Penedo 2024 (2406.17557), 3.6
        ("lines ending a sentence", share(lambda line: line.endswith(ENDS), lines), .12, 1),
        ("characters in repeated lines", 1 - share(len, {*lines}) * len({*lines}) / max(
            1, sum(map(len, lines))), 0, .1),
        ("lines of 30 characters", share(lambda line: len(line) <= 30, lines), 0, .67),
        ("lines a word", text.count("\n") / len(words), 0, .3))}
def outside(name: str, text: str) -> str:       # all thresholds that are passed, in words
    lines = list(filter(None, map(str.strip, text.split("\n"))))
    return "; ".join(f"{what} {value:.3g}, wanted {low:g} to {high:g}" for what, value, low, high in
                     RULES[name](text, text.split() or [""], lines) if not low <= value <= high)
def c4_lines(text: str) -> str:                 # those that end a sentence, and not about cookies
    return "\n".join(line for line in text.split("\n") if line.rstrip().endswith(ENDS) and not
                     C4_NOT.search(line) and not line.endswith("...") and len(line.split()) > 4)
def mask(text: str, counts: Counter) -> str:    # CS336: personal data becomes |||KIND|||
    for kind, pattern in MASKS.items():
        text, n = re.subn(pattern, f"|||{kind}|||", text)
        counts[f"masked {kind}"] += n
    return text
# --- The classifier ----------------------------------------------------------
# A hashed n-gram has a weight for each label, a text their mean (fastText, but for a hidden layer).
BUCKETS, START = 1 << 18, 2000  # n-grams share buckets; characters that are looked at [our choice]
def grams(text: str):               # 1 to 4 characters, 1 or 2 words
    text, words = f" {text[:START].casefold()} ", text[:START].casefold().split()
    found = [text[i:i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)]
    found += [f"{a}  {b}" for a, b in zip(["", *words], words)] + words
    return torch.tensor([zlib.crc32(gram.encode(errors="replace")) % BUCKETS for gram in found])
def logits(weights, ids: list):     # n texts' n-grams -> (n, labels), the means of their weights
    starts = torch.tensor([0, *map(len, ids[:-1])]).cumsum(0)
    return F.embedding_bag(torch.cat(ids), weights, starts, mode="mean", sparse=True)
@lru_cache(maxsize=8)
def load_classifier(path: str) -> tuple:
    require(zipfile.is_zipfile(path), path, "no model", "what train-classifier makes")
    with np.load(path) as a: return a["labels"].tolist(), torch.tensor(a["weights"])
def train_classifier(file: Path, out: Path = Path("model.npz"), epochs: int = 6) -> None:
    """Learns labels from lines LABEL<tab>TEXT, for lang=LABEL:MODEL and quality=MODEL."""
    require(file.is_file(), file, "no file", "lines LABEL<tab>TEXT")
    pairs = [r.partition("\t")[::2] for r in file.read_text("utf-8", "replace").strip().split("\n")]
    require(pairs and all(map(all, pairs)), file, "others", "lines LABEL<tab>TEXT")
    labels, rng, test = [*dict(pairs)], np.random.default_rng(0), len(pairs) // 10
    rng.shuffle(pairs)
    ids, y = [grams(text) for _, text in pairs], torch.tensor([labels.index(a) for a, _ in pairs])
    weights = torch.zeros(BUCKETS, len(labels), requires_grad=True)
    optimizer, n = torch.optim.Adagrad([weights], 0.5), len(pairs) - test
    torch.sparse.check_sparse_tensor_invariants.disable()   # as it is; said, torch does not warn
    for batch in (batch for _ in range(epochs) for batch in np.array_split(
            test + rng.permutation(n), -(-n // 64))):
        F.cross_entropy(logits(weights, [ids[i] for i in batch]), y[batch]).backward()
        optimizer.step(), optimizer.zero_grad()
    with atomic_write(out) as a: np.savez_compressed(a, labels=labels, weights=weights.detach())
    right = sum(int(logits(weights, ids[i:i + 1]).argmax()) == y[i] for i in range(test))
    print(f"{out}: {right} of {test} right that it was not trained on")
# --- Duplicates --------------------------------------------------------------
# Two texts are as alike as their sets of 5-word shingles, J. Each of 128 least hashes is the same
# with probability J; what shares one of b bands of r of them is compared exactly.
N_HASHES, SHINGLE = 128, 5
ODD, SHIFT = np.random.default_rng(7).integers(0, 1 << 63, (2, N_HASHES), np.uint64) * np.uint64(2)
ODD, GOLDEN = ODD + np.uint64(1), np.uint64(0x9E3779B97F4A7C15)     # multiply-shift hashing
def mixed(columns, key):                    # one hash of several; exact or not, it is compared next
    for column in columns: key = (key ^ column) * GOLDEN
    return key
def shingles(text: str):                    # without case, accents, punctuation -> sorted uint32
    text = re.sub("[\u0300-\u036f\u2010-\u203f]", "", unicodedata.normalize("NFD", text.lower()))
    found = re.findall(rb"[\w\x80-\xff]+", text.encode(errors="replace"))
    x, n = np.fromiter(map(zlib.crc32, found), np.uint64), max(1, len(found) - SHINGLE + 1)
    key = mixed((x[i:i + n] for i in range(min(SHINGLE, len(x)))), np.zeros(n, np.uint64))
    return np.unique((key >> np.uint64(32)).astype(np.uint32))
def signature(found):                       # (n,) -> (128,), uint32
    least = [(found[i:i + 2048, None] * ODD + SHIFT).min(0) for i in range(0, len(found), 2048)]
    return (np.min(least, 0) >> np.uint64(32)).astype(np.uint32)
@lru_cache
def bands_for(jaccard: float) -> tuple:     # (b, r): the longest bands that find 99 % at this J
    r = max(r for r in range(1, 33) if r == 1 or 1 - (1 - jaccard**r) ** (N_HASHES // r) >= .99)
    return N_HASHES // r, r
def like(text: str, jaccard: float, sets: list, heads: dict) -> str:
    """Whether a text is like one that was kept. heads: hash of a band -> the first that had it."""
    x, (b, r) = shingles(text), bands_for(jaccard)
    keys = mixed(signature(x)[:b * r].reshape(b, r).T, np.arange(b, dtype=np.uint64)).tolist()
    for i in sorted({heads[key] for key in keys if key in heads}):
        both = len(np.intersect1d(sets[i], x, assume_unique=True))
        J = both / (len(sets[i]) + len(x) - both)
        if J >= jaccard: return f"a copy, J {J:.2f}"
    for key in keys: heads.setdefault(key, len(sets))
    sets.append(x)
    return ""
# --- The funnel --------------------------------------------------------------
# A document passes one stage after the other. Up to the first that remembers others, processes of
# many machines make a part of each input, and a part that exists is done, after any kill.
COMMON = {"en": "the of and to in is that", "de": "der die und das ist", "fr": "le la les et des"}
def labelled(doc: dict, arg: str, note: dict) -> str:
    """lang=LABEL:MODEL, or by function words, a heuristic; quality=MODEL, its first label; @P."""
    (arg, _, least), words = arg.partition("@"), doc["text"].lower().split()
    label, _, path = arg.rpartition(":") if arg.endswith(".npz") else (arg, "", "")
    shares = {lang: sum(map(words.count, own.split())) for lang, own in COMMON.items()}
    if path:
        labels, weights = load_classifier(path)
        shares = dict(zip(labels, logits(weights, [grams(doc["text"])])[0].softmax(0).tolist()))
    label = label or next(iter(shares))
    require(label in shares, "label", label, f"one of {', '.join(shares)}, or LABEL:MODEL.npz")
    p = shares[label] / max(1e-9, sum(shares.values()))
    return "" if p >= float(least or .5) else f"{label} {p:.2f}" + " by function words" * (not path)
def change(doc: dict, text: str) -> str:
    doc["text"] = text
    return "" if text.strip() else "nothing left"
def once(text: str, seen: set) -> str:      # the lines that are new; by hash, all in one process
    new = lambda line: not line or hash(line) not in seen and not seen.add(hash(line))
    return "\n".join(filter(new, text.split("\n")))
FILTERS = {     # a document, what follows "=", the note -> why it is dropped, or ""
    "extract": lambda doc, *_: change(doc, extract(doc["text"]) if doc["html"] else doc["text"]),
    "lang": labelled, "quality": labelled,
    **{name: lambda doc, *_, name=name: outside(name, doc["text"]) for name in RULES},
    "c4": lambda doc, *_: change(doc, c4_lines(doc["text"])) or outside("c4", doc["text"]),
    "mask": lambda doc, _, note: change(doc, mask(doc["text"], note["counts"])),
    "lines": lambda doc, _, note: change(doc, once(doc["text"], note["lines"])),
    "dedup": lambda doc, arg, note: like(doc["text"], float(arg or .8), *note["dedup"])}
def row_of(line: bytes, counts: Counter):       # of JSON -> a document
    try: return {"text": (r := json.loads(line)).get("html"), **r, "html": bool(r.get("html"))}
    except (ValueError, TypeError, AttributeError): counts["no JSON"] += 1
def read_docs(path: Path, counts: Counter):     # of a WARC or WET file, or of JSON lines
    with open(path, "rb") as file:
        docs = (page_of(*record, counts) for record in read_warc(file, counts))
        if ".jsonl" in path.name: docs = (row_of(line, counts) for line in unpacked(file))
        try:
            for doc in filter(None, docs):      # EOT and NUL mean something to us
                text = str(doc["text"] or "").replace(EOT, " ").replace("\0", " ")
                yield {**doc, "text": text.encode(errors="replace").decode()}
        except (OSError, EOFError, zlib.error): counts["broken gzip files"] += 1
def through(docs, stages: list, note: dict):
    """Yields the documents that pass all stages, and writes down what happens."""
    clock, note["table"] = time.perf_counter(), {}
    for doc in docs:
        for stage in stages:
            (name, _, arg), size, before = stage.partition("="), len(doc["text"].encode()), clock
            why = FILTERS[name](doc, arg, note) if name in FILTERS else ""      # not read, write
            row, clock = note["table"].setdefault(stage, [[0] * 4, [], []]), time.perf_counter()
            row[0] = [a + b for a, b in zip(row[0], (1, not why, size / 1e6, clock - before))]
            if len(some := row[1 + bool(why)]) < 9: some.append((why, doc["text"][:200]))
            if why: break
        else: yield doc
def run_part(stages: list, source: Path, part: Path) -> None:
    if part.exists(): return
    note = {"counts": Counter()}
    with atomic_write(part, "w") as file:
        docs = through(read_docs(source, note["counts"]), stages, note)
        file.writelines(json.dumps(doc) + "\n" for doc in docs)
        write_note(part, note)
def files_of(places: list) -> list:
    found = [file for place in map(Path, places) for file in (
        sorted(filter(Path.is_file, place.rglob("[!.]*"))) if place.is_dir() else [place])]
    for file in found: require(file.is_file(), file, "no file", "WARC, WET or .jsonl files")
    return found
def funnel(inputs: Path, out: Path = Path("clean"), stages: str = "extract,gopher,dedup,mask",
           workers: int = None, show: int = 0) -> None:
    """Inputs to out/text.txt, a dataset. Ranks of torchrun share the work."""
    sources, names = files_of(inputs), stages.split(",")
    kinds = [stage.partition("=")[0] for stage in names]
    for kind in kinds: require(kind in FILTERS, "stages", kind, f"some of {', '.join(FILTERS)}")
    first = min([i for i, kind in enumerate(kinds) if kind in ("lines", "dedup")] or [len(names)])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    made_from = [*sources, *filter(Path.is_file, map(Path, re.findall(r"[^=:,@]+\.npz", stages)))]
    folder = out / f".funnel-{digest((fingerprint(made_from, out), names[:first]))[:8]}"
    parts = [folder / f"{i:05}.jsonl" for i in range(len(sources))]
    remove_leftovers(out)
    work = bpe.parallel_map(run_part, list(zip(sources, parts))[rank::world], workers,
                            (["read", *names[:first]],))
    for _ in tqdm(work, "parts", len(parts[rank::world]), disable=None): pass
    if rank: return
    while not all(part.exists() for part in parts): time.sleep(.1)      # those of other ranks
    note = {"counts": Counter(), "lines": set(), "dedup": ([], {})}
    docs = tqdm((doc for part in parts for doc in read_docs(part, Counter())), "join", disable=None)
    with atomic_write(out / "text.txt", "w") as file: file.writelines(
        doc["text"] + EOT for doc in through(docs, ["join", *names[first:], "write"], note))
    notes = [*map(read_note, parts), note]
    print(f"{'stage':20s}{'documents':>10s}{'kept':>10s}{'MB':>9s}{'s':>8s}{'MB/s':>8s}")
    for stage in ["read", *names[:first], "join", *names[first:], "write"]:
        rows = [note["table"][stage] for note in notes if stage in note["table"]]
        n, kept, mb, s = np.sum([row[0] for row in rows] or [[0] * 4], 0)
        print(f"{stage:20s}{n:10,.0f}{kept:10,.0f}{mb:9,.2f}{s:8.2f}{mb / max(s, 1e-9):8.2f}")
        for k, does in (1, "keeps"), (2, "drops"):
            for why, text in sum((row[k] for row in rows), [])[:show]:
                print(f"    {does} {why}: {text!r}")
    print("counted:", dict(sum((Counter(note["counts"]) for note in notes), Counter())))
def look(inputs: Path, n: int = 10) -> None:
    """Shows n documents at random: raw, extracted, and what each rule says."""
    docs = (doc for file in files_of(inputs) for doc in read_docs(file, Counter()))
    for doc in heapq.nlargest(n, docs, lambda _, rng=np.random.default_rng(): rng.random()):
        text = extract(doc["text"]) if doc["html"] else doc["text"]
        print(f"{doc.get('url', '')}\nraw: {doc['text'][:700]!r}\nextracted: {text[:700]}")
        for rule in RULES: print(f"    {rule}: {outside(rule, text) or 'keeps it'}")
# --- Text --------------------------------------------------------------------
# For valid to be new to the model, files stay whole, but for one alone; names may divide them.
HIDDEN, TESTS = r"\..*|__pycache__", r"tests?|idle_test|(site|dist)-packages|config-.*|_sysconfig.*"
def is_text(file: Path) -> bool:    # readable, no pipe (which would block), not empty, without NUL
    if not (file.is_file() and os.access(file, os.R_OK)): return False
    with open(file, "rb") as f: return bool(start := f.read(1 << 16)) and b"\0" not in start
def find_files(dataset: str, folder: Path) -> tuple:    # (root, files, how many others are no text)
    source, root, left_out = SOURCES.get(dataset), Path(dataset), HIDDEN
    if source and source.files: return folder, [folder / name for name in source.files], 0
    if source: root, left_out = Path(sysconfig.get_path("stdlib")), f"{HIDDEN}|{TESTS}"
    found, ours = [] if root.is_dir() else [root], {folder.resolve(), folder.parent.resolve()}
    for here, folders, names in os.walk(root):
        names = [] if "train.json" in names else names      # a run of ours
        folders[:] = [name for name in folders if not re.fullmatch(left_out, name)
                      and Path(here, name).resolve() not in ours]
        found += [Path(here, name) for name in names if not re.fullmatch(left_out, name) and (
            not source or name.endswith((".py", ".rst", ".txt")))]
    files = list(filter(is_text, found))
    return root, files, len(found) - len(files)
def fingerprint(files: list, root: Path) -> str:    # independent of the folder's location
    return digest([(os.path.relpath(file, root), file.stat().st_size, file.stat().st_mtime_ns)
                   for file in sorted(files)])
def divide(files: list, root: Path) -> list:
    """-> train's and valid's [(file, from byte, to byte)]: one in 20 by name; one is cut at 0.9."""
    if len(files) == 1:
        cut = max(int(0.9 * (size := size_of(files[0]))), size - VALID_BYTES)
        with open(files[0], "rb") as file: near = os.pread(file.fileno(), 4, cut)
        cut += len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))   # UTF-8 continuation bytes
        return [[(files[0], 0, cut)], [(files[0], cut, size)]]
    number = {file: int(digest(file.relative_to(root).as_posix()), 16) for file in files}
    valid = {file for file in files if number[file] % 20 == 0}
    if len(valid) in (0, len(files)): valid = {min(files, key=number.get)}
    if [*map(Path.name.fget, sorted(files))] == ["train.txt", "valid.txt"]: valid = {max(files)}
    return [[(file, *WHOLE) for file in sorted(files, key=number.get) if (file in valid) == new]
            for new in (False, True)]
def write_text(target: Path, ranges: list) -> tuple:
    """Joins ranges, each ended by EOT -> (sha256, how many invalid sequences became U+FFFD)."""
    sha, invalid = hashlib.sha256(), 0
    with atomic_write(target) as out, progress(desc=target.name, delay=1) as bar:
        for path, start, end in ranges:
            keep, drop = (codecs.getincrementaldecoder("utf-8")(e) for e in ("replace", "ignore"))
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                block, tail, _ = b"-", "", file.seek(start)
                while block:
                    try: block = file.read(min(1 << 20, end - file.tell()))
                    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                        require(False, path, error, "a whole gzip file; delete it and try again")
                    text = keep.decode(block, final=not block)
                    invalid += len(text) - len(drop.decode(block, final=not block))
                    tail = (tail + text)[-64:]
                    if not block and not tail.rstrip().endswith(EOT): text += EOT   # at its end
                    sha.update(raw := text.encode())
                    bar.update(out.write(raw))
    return sha.hexdigest(), invalid
def plan(dataset: str, files: list, bins: list, mirror) -> None:
    """Says what a large source still takes, and refuses what the disk cannot hold."""
    source, at = SOURCES[dataset], bins[0].resolve()
    download = max(0, source.download - sum(size_of(f) + size_of(part_of(f)) for f in files))
    need = download + source.text * (2 if "-bpe" in at.stem else 5)     # the text, then its ids
    free = shutil.disk_usage(next(p for p in at.parents if p.exists())).free
    if need > 1e8: print(f"{dataset}: {download / 1e6:,.0f} MB to download, {need / 1e6:,.0f} MB of"
                         " disk" + ", if the mirror has the original" * bool(mirror))
    require(need <= free or mirror, f"too little disk for {dataset}", f"{free / 1e6:,.0f} MB at "
            f"{at.parent}", f"{need / 1e6:,.0f} MB; free some or give another --data_dir")
def make_text(dataset: str, folder: Path, bins: list, mirror, records: int) -> dict:    # their note
    source, texts = SOURCES.get(dataset), [folder / f"{side}.txt" for side in SIDES]
    root, files, n_others = find_files(dataset, folder)
    if dataset == "commoncrawl": files = [f.with_name(f"{records}-{f.name}") for f in files]
    note, known = read_note(folder / "text"), all(map(Path.exists, files))
    if note.get("bytes") != list(map(size_of, texts)) or (
            known and note.get("files") != fingerprint(files, root)):
        note = {}               # a download that was deleted after it became text is not missed
    if not known and not note: plan(dataset, files, bins, mirror)
    for file, theirs in zip(files, () if known or note else source.files):
        url = f"{(mirror or source.homepage + source.folder).rstrip('/')}/{theirs}"
        most = records * PAGE_BYTES if dataset == "commoncrawl" else None
        if not file.exists(): fetch(url, file, most)
    if dataset == "commoncrawl": raise SystemExit(print(f"next: python data.py look {files[0]}"))
    if note: return note
    require((size := sum(map(size_of, files))) >= MIN_BYTES, dataset, f"{size} bytes of text, and "
            f"{n_others} files that are empty, binary or unreadable", f"{MIN_BYTES} bytes of UTF-8")
    write_note(folder / "text", {})         # a kill from here on leaves texts that count as stale
    shas, invalid = zip(*map(write_text, texts, [[(file, *WHOLE)] for file in files] if source and
                             len(source.files) == 2 else divide(files, root)))
    print(f"{folder}: text of {len(files)} files, {n_others} empty or binary ones left out, "
          f"{sum(invalid)} invalid UTF-8 sequences replaced; sha256 of train.txt {shas[0][:16]}")
    return write_note(folder / "text", {"files": fingerprint(files, root), **dict(zip(SIDES, shas)),
                                        "bytes": list(map(size_of, texts))})
# --- Tokens ------------------------------------------------------------------
# Blocks of the text, cut where no id changes, become files, and these are joined.
def learn_bpe(path: Path, vocab_size: int, workers):
    print(f"BPE learns from {min(size_of(path), BPE_BYTES):,} of {size_of(path):,} bytes of {path}")
    return bpe.Tokenizer(*bpe.train(path, vocab_size, (EOT,), "gpt2", workers, BPE_BYTES), (EOT,))
def learn_chars(path: Path, *_):
    chars = set().union(*(text.replace(EOT, "") for text in bpe.read_blocks(path, (EOT,))))
    return bpe.CharTokenizer(sorted(chars), (EOT,))
TOKENIZERS = {"bpe": learn_bpe, "byte": lambda *_: bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], (
    EOT,)), "char": learn_chars}
def label_of(tokenizer: str, vocab_size: int) -> str:   # its part of a token file's name
    require(tokenizer != "bpe" or 257 <= vocab_size <= sys.maxunicode, "vocab_size", vocab_size,
            f"257 to {sys.maxunicode}; try 4096")
    if tokenizer in TOKENIZERS: return f"bpe-{vocab_size}" if tokenizer == "bpe" else tokenizer
    require(Path(tokenizer).exists(), "tokenizer", tokenizer, f"{', '.join(TOKENIZERS)} or a file")
    require((tok := bpe.load_tokenizer(tokenizer)).eot is not None, tokenizer, f"no {EOT}", "one")
    return f"own-{tok.hash[:8]}"
def encode_part(tok, dtype, part: Path, text: str) -> None:
    if not part.exists():       # from a run that was killed
        with atomic_write(part) as out: out.write(np.array(tok.encode(text), dtype).tobytes())
def make_tokens(text_path: Path, sha: str, out: Path, tok, workers: int) -> dict:
    """[EOT doc EOT ... doc EOT]: the first EOT gives the first token a context. -> its note."""
    dtype = np.dtype(np.uint16 if tok.vocab_size <= 1 << 16 else np.uint32)
    note, old = {"tokenizer": tok.hash, "text": sha, "dtype": dtype.name}, read_note(out)
    if note.items() <= old.items() and size_of(out) == old["tokens"] * dtype.itemsize: note = old
    else:
        folder = out.with_name(f"{out.stem}-parts-{digest((note, bpe.BLOCK))[:8]}")
        blocks = bpe.read_blocks(text_path, tuple(tok.special_tokens))
        jobs = ((folder / f"{i:06}", text) for i, text in enumerate(blocks))
        n = sum(1 for _ in bpe.parallel_map(encode_part, jobs, workers, (tok, dtype)))
        unk, counts = tok.special_tokens.get(bpe.UNK, -1), np.zeros(3, int)
        with atomic_write(out) as file:
            file.write(np.array([tok.eot], dtype).tobytes())
            for ids in (np.fromfile(folder / f"{i:06}", dtype) for i in range(n)):
                file.write(ids.tobytes())
                counts += len(ids), (ids == tok.eot).sum(), (ids == unk).sum()
        tokens, documents, unknown = counts.tolist()
        note = write_note(out, {**note, "tokens": tokens + 1, "documents": documents,
            "bytes": size_of(text_path) - documents * len(EOT), "unknown": unknown})
        print(f"{out}: {tokens + 1:,} tokens from {note['bytes']:,} bytes of text in "
              f"{documents:,} documents, {unknown:,} unknown characters")
    for folder in out.parent.glob(f"{out.stem}-parts-*"): shutil.rmtree(folder)     # old ones, too
    return note
Corpus = namedtuple("Corpus", "name tokenizer train valid info")    # info: train's, valid's note
def prepare(dataset: str, tokenizer: str = "bpe", vocab_size: int = 4096, data_dir: str = "data",
            mirror: str = None, workers: int = None, records: int = 200) -> Corpus:
    """Prepares a source or path: runs what is missing or stale of the three stages."""
    name, place, tokenizer = str(dataset), Path(dataset).resolve(), str(tokenizer)
    require(workers is None or workers > 0, "workers", workers, "1 or more; None: one a core")
    require(not mirror or mirror.startswith(("http://", "https://")), "mirror", mirror,
            f"a URL; try http://{mirror}")
    if name not in SOURCES:
        require(place.exists(), "dataset", name, f"{', '.join(SOURCES)} or a file or folder")
        name = f"{place.stem}-{digest(str(place))[:6]}"     # two folders called text: two names
    folder, label = Path(data_dir) / name, label_of(tokenizer, vocab_size)
    bins, path = [folder / f"{side}-{label}.bin" for side in SIDES], Path(tokenizer)
    remove_leftovers(folder)
    shas = make_text(str(dataset), folder, bins, mirror, records)
    if tokenizer in TOKENIZERS:     # named by kind, size and text: of the right name, never stale
        path = folder / f"tokenizer-{label}-{shas['train'][:8]}.json"
        if not path.exists():
            TOKENIZERS[tokenizer](folder / "train.txt", vocab_size, workers).save(path)
    tok = bpe.load_tokenizer(path)
    return Corpus(name, tok, *bins, {
        side: make_tokens(folder / f"{side}.txt", shas[side], out, tok, workers)
        for side, out in zip(SIDES, bins)})
# --- The loader --------------------------------------------------------------
# Windows drawn at random would miss 1/e of a corpus in as many draws; a permutation misses none.
def open_tokens(path): return np.memmap(path, dtype=read_note(Path(path))["dtype"], mode="r")
def windows(tokens, seq_len: int, which):   # (tokens, targets), int64; past the end 0 and -1
    at = np.add.outer(np.array(which) * seq_len, np.arange(seq_len + 1))            # (B, T + 1)
    found = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int64)
    return tuple(torch.from_numpy(np.where((at < len(tokens))[:, 1:], x, pad)) for x, pad in (
        (found[:, :-1], 0), (found[:, 1:], -1)))                # (B, T + 1) -> (B, T), (B, T)
def in_order(tokens, seq_len: int, batch_size: int):    # all windows once; the last batch is padded
    for first in range(0, -(-(len(tokens) - 1) // seq_len), batch_size):
        yield windows(tokens, seq_len, range(first, first + batch_size))
def validation(corpus, limit):      # -> (tokens, bytes of their text) to evaluate on
    tokens, tok = open_tokens(corpus.valid), corpus.tokenizer
    if limit is None or len(tokens) <= limit: return tokens, corpus.info["valid"]["bytes"]
    print(f"evaluations use the first {limit:,} of {len(tokens):,} validation tokens")
    own = {*tok.special_tokens.values()}
    return tokens[:limit], sum(len(tok.vocab[i]) for i in tokens[1:limit].tolist() if i not in own)
@lru_cache(maxsize=2)       # a batch may lie across two epochs
def permutation(n, seed, epoch): return np.random.default_rng((seed, epoch)).permutation(n)
class Loader:
    """Iterates over (tokens, targets), int64, (batch_size / world, seq_len): a rank's own rows.
    ids 0..10, seq_len 4: windows 0 1 2 3 -> 1 2 3 4,  4 5 6 7 -> 5 6 7 8,  8 9 - - -> 9 10 - -"""
    def __init__(self, tokens, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0,
                 world: int = 1, seen: int = 0):
        assert batch_size % world == 0, f"world {world} must divide batch_size {batch_size}"
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.rank, self.rows, self.seen = rank, batch_size // world, seen
        self.n_windows = -(-(len(tokens) - 1) // seq_len)       # rounded up
        require(self.n_windows >= batch_size, "too little text", f"{self.n_windows} windows of "
                f"seq_len {seq_len}", f"a batch, {batch_size}; use a smaller --batch_size")
    def __iter__(self): return self
    def __next__(self):
        first = self.seen + self.rank * self.rows
        self.seen += self.batch_size
        places = (divmod(s, self.n_windows) for s in range(first, first + self.rows))
        return windows(self.tokens, self.seq_len, [
            int(permutation(self.n_windows, self.seed, epoch)[i]) for epoch, i in places])
    def seek(self, seen: int) -> None: self.seen = seen
# --- The lesson, and the command line ----------------------------------------
def lesson(data_dir: str) -> None:
    print("THE FUNNEL, on a made-up crawl: what the library says of itself, copies, German, spam")
    folder, met, lib = Path(data_dir, "lesson"), [], Path(sysconfig.get_path("stdlib"))
    about = [ast.get_docstring(ast.parse(f.read_bytes())) or "" for f in sorted(lib.glob("*.py"))]
    with atomic_write(folder / "crawl.jsonl", "w") as file:
        for i, text in enumerate(about):
            text = [text, about[i - 1], "Das ist der Hund und das. " * 9, "Buy $$$ 12 " * 40][i % 4]
            page = "<li><a href=/>Home</a>" * 20 + "</ul><p>" + text.replace("\n\n", "<p>")
            file.write(json.dumps({"html": f"<ul>{page}<p>Mail me@x.org."}) + "\n")
    funnel([folder / "crawl.jsonl"], folder / "clean", "extract,lang=en,gopher,dedup,mask", show=1)
    print("dedup=.8 compares at J", {J: f"{1 - (1 - J**6) ** 21:.0%}" for J in (.5, .6, .7, .8)})
    prepare(folder / "clean", "bpe", 512, folder, workers=1)
    print("\nTHE LOADER: tokens -> targets, for the ids 0 .. 10, seq_len 4, padding left out")
    for tokens, targets in itertools.islice(Loader(np.arange(11), 4, 1, seed=2), 3):
        met += (targets := targets[targets >= 0].tolist())
        print(f"    {tokens[0, :len(targets)].tolist()}  ->  {targets}")
    print("every target exactly once an epoch:", sorted(met) == [*range(1, 11)])
COMMANDS = {"get": prepare, "look": look, "funnel": funnel, "train-classifier": train_classifier}
HELP = {"dataset": f"{', '.join(SOURCES)}, or a text file or a folder of them", "n": "documents",
        "tokenizer": "bpe, byte, char, or a tokenizer.json", "vocab_size": "ids of a bpe",
        "records": "pages of commoncrawl, about", "mirror": "URL of another folder with the files",
        "workers": "processes; None: one a core", "data_dir": "folder for all files",
        "inputs": "WARC, WET or .jsonl files, or folders of them", "out": "what is made",
        "stages": f"in order, of {', '.join(FILTERS)}", "file": "lines LABEL<tab>TEXT",
        "show": "examples that each stage kept and dropped", "epochs": "passes over the file"}
def build_parser() -> argparse.ArgumentParser:      # a command is a function with its parameters
    parser = argparse.ArgumentParser(description="Without a command: the lesson.")
    parser.add_argument("--data_dir", default="data", help="folder for all files (default: data)")
    commands = parser.add_subparsers(dest="command")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        for key, p in inspect.signature(function).parameters.items():
            flag, default = p.default is not p.empty, p.default
            command.add_argument("--" * flag + key, type=p.annotation, help=HELP[key] + (
                f" (default: {default})" * flag), nargs="+" if key == "inputs" else None,
                default=argparse.SUPPRESS if key == "data_dir" else default if flag else None)
    return parser
def main(args) -> None:
    print("data.py:", options := dict(vars(args)))
    run = COMMANDS.get(options.pop("command"), lesson)
    if run not in (lesson, prepare): del options["data_dir"]
    try: run(**options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None
if __name__ == "__main__": main(build_parser().parse_args())
