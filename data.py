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
    extraction takes most of the funnel's time, duplicates its memory, about 1.5 kB a document; a
    corpus takes its text and twice 2 or 4 bytes an id on disk
CONTENTS  SOURCES / downloads / crawl / HTML / rules / classifier / duplicates / funnel / mixing /
          text / tokens / Loader / the lesson
NOT HERE  JavaScript, PDF, blocklists of URLs, decontamination, fastText's own files, object storage
RUN       python data.py                    # last line: every target exactly once an epoch: True
          python data.py get tinystories    # 2.3 GB; stop it, repeat it, it goes on
          python data.py get commoncrawl --records 200     # then look FILE, and
          python data.py funnel FILE --out clean --stages extract,lang=en,gopher,lines,dedup,mask
REFERENCES
    Rae 2021, Raffel 2019, Penedo 2024: rules; Broder 1997: MinHash; Joulin 2016: fastText; nanoGPT:
    one file of ids; Eldan 2023 (2305.07759): TinyStories; RFC 9110: byte ranges; Stanford CS336
EXERCISE  Empty Loader.__next__ and write it again until `pytest test_all.py -k loader` is green.
"""
import argparse, ast, codecs, gzip, hashlib, heapq, html, http.client, io, itertools, json, math, os
import re, shutil, sys, sysconfig, time, unicodedata, urllib.request, zipfile, zlib
from collections import Counter, namedtuple
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch, torch.nn.functional as F
from tqdm import tqdm

import bpe
from bpe import EOT, UserError, atomic_write

BPE_BYTES, VALID_BYTES, MIN_BYTES = 10**9, 10**7, 40    # for BPE, for valid, of a text [our choice]
TRIES, WAIT_S, TIMEOUT_S = 4, 0.5, 30       # connections in a row that bring nothing [our choice]
STEP = 1 << 20                              # bytes of a crawl asked for at a time [our choice]
# bytes/s, rough, for the announcement of large sources alone [our choice]; the last two a process
DOWNLOAD_RATE, TEXT_RATE, TRAIN_RATE, ENCODE_RATE = 20e6, 140e6, 3.5e6, 5.5e6
# -----------------------------------------------------------------------------
# Sources, and a path is one too. Look at the licence before you publish a model. download, text:
# bytes, about; files: train and valid, or one that we cut, in the folder `url` of their server.
Source = namedtuple("Source", "about homepage licence download text url files", defaults=("", ()))
HF = "https://huggingface.co/datasets/"
SOURCES = {
    "stdlib": Source("code and documentation of the Python that runs this",
        "https://docs.python.org/3/license.html", "PSF-2.0", 0, 12_300_000),
    "shakespeare": Source("plays; the classic of character models",
        "https://github.com/karpathy/char-rnn", "public domain", 1_115_394, 1_115_394,
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
        ("input.txt",)),
    "tinystories": Source("stories in the words of a small child, by GPT-4",
        HF + "roneneldan/TinyStories", "CDLA-Sharing-1.0", 2_250_000_000, 2_250_000_000,
        HF + "roneneldan/TinyStories/resolve/main",
        ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")),
    "owt": Source("OpenWebText: pages that Reddit linked to (CS336's sample)",
        HF + "stanford-cs336/owt-sample", "CC0, pages: their authors'",
        4_700_000_000, 12_200_000_000, HF + "stanford-cs336/owt-sample/resolve/main",
        ("owt_train.txt.gz", "owt_valid.txt.gz")),
}
CRAWL = Source("one file of May 2024's crawl, raw", "https://commoncrawl.org/terms-of-use",
    "Common Crawl's terms; pages: their authors'", 10**9, 0, "https://data.commoncrawl.org/crawl-data"
    "/CC-MAIN-2024-22/segments/1715971057216.39/warc",
    ("CC-MAIN-20240517233122-20240518023122-00000.warc.gz",))

def digest(what) -> str: return hashlib.sha256(repr(what).encode()).hexdigest()
def size_of(path: Path) -> int: return path.stat().st_size if path.exists() else 0
def part_of(path: Path) -> Path: return path.with_name(path.name + ".part")
def read_note(path: Path) -> dict:
    """NAME.json beside a file says what it was made from; damaged or none: the file is stale."""
    try: note = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError): return {}
    return note if isinstance(note, dict) else {}
def write_note(path: Path, note: dict) -> dict:
    with atomic_write(path.with_suffix(".json"), "w") as out: json.dump(note, out, indent=1)
    return note
def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of atomic_write, .NAME.PID.tmp, whose processes were killed."""
    for temp in folder.rglob(".*.*.tmp"):
        try: os.kill(int(temp.suffixes[-2][1:]), 0)         # signal 0 asks whether it lives
        except ProcessLookupError: temp.unlink(missing_ok=True)
        except (PermissionError, ValueError): pass          # another user's; not of atomic_write
def progress(**how): return tqdm(unit="B", unit_scale=True, disable=None, **how)
# -----------------------------------------------------------------------------
# Downloads. Gigabytes mean connections that drop. What has arrived stays in NAME.part, and the next
# connection asks for the bytes after it. The note of a download holds its URL, size and version, so
# that the bytes of two files never end in one.
def receive(url: str, path: Path, want=None) -> None:
    """One connection: adds what it brings to the part, to `want` bytes or to the file's end."""
    part, note = part_of(path), read_note(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if note.get("url") != url: part.unlink(missing_ok=True)     # of another file, for all we know
    if not (have := size_of(part)) or have != note["size"] or want:
        span = {"Range": f"bytes={have}-{want - 1 if want else ''}"} if have or want else {}
        request = urllib.request.Request(url, headers=span)
        if have and note["version"]: request.add_header("If-Range", note["version"])    # else all
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply, open(part, "ab") as out:
            length, etag = reply.headers["Content-Length"], reply.headers["ETag"] or ""
            if reply.status != 206 and want: raise OSError("the server sends no byte ranges")
            if reply.status != 206 or not have: # the file from its start: it is new, or has changed
                out.truncate(have := 0)
                note = {"url": url, "size": None, "version":    # no weak ETag, W/"..."
                        etag if etag.startswith('"') else reply.headers["Last-Modified"]}
            if length: note["size"] = have + int(length)
            write_note(path, note)
            with progress(desc=path.name, total=note["size"], initial=have) as bar:
                while block := reply.read1(1 << 20): bar.update(out.write(block))   # what is there
            out.flush()
            os.fsync(out.fileno())
    if (size := size_of(part)) != (total := note["size"]) is not None:
        if size > total: part.unlink()          # it cannot become right: start afresh
        raise OSError(f"got {size:,} bytes, wanted {total:,}")
def fetch(url: str, path: Path, want=None) -> None:
    """Downloads url to path, whole or not at all. Connections that bring something may drop as
    often as they like; it gives up after TRIES connections in a row without a new byte."""
    part, failures = part_of(path), 0
    while failures < TRIES:
        time.sleep(WAIT_S * (2 ** failures - 1))
        have = size_of(part)
        try:
            receive(url, path, want)
            return os.replace(part, path)
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in bpe.DISK_ERRORS:
                raise UserError(f"cannot write {part}: {e.strerror}; wanted a place with room in "
                                "it; give another folder or free some space") from e
            error, status = e, getattr(e, "code", 500)
            if status == 416 and not want: part.unlink(missing_ok=True) # theirs is shorter
            if status < 500 and status != 429: failures = TRIES     # to ask again is no use
        failures = 0 if size_of(part) > have else failures + 1
    raise UserError(f"cannot download {url}: {error}; run the same command again to go on, name "
                    f"another server with --mirror, or put the file by hand at {path.resolve()}")
def fetch_crawl(records: int, data_dir="data", mirror=None) -> Path:
    """The first `records` responses of CRAWL: ranges of STEP bytes until they are whole."""
    path = Path(data_dir, "commoncrawl", f"{records}-{CRAWL.files[0]}")
    def count():
        with open(path, "rb") as file:
            return sum(row.get("warc-type") == "response" for row, _ in read_warc(file, Counter()))
    while (size := size_of(path)) == 0 or count() < records:
        if size: os.replace(path, part_of(path))
        want = size_of(part_of(path)) + STEP
        fetch(f"{(mirror or CRAWL.url).rstrip('/')}/{CRAWL.files[0]}", path, want)
        if size_of(path) < want: break          # their file ends here
    print(f"{path}: {count():,} pages, {size_of(path):,} bytes; {CRAWL.licence}, {CRAWL.homepage}\n"
          f"next: python data.py look {path}; python data.py funnel {path}")
    return path
# -----------------------------------------------------------------------------
# The crawl: WARC files hold what servers sent, WET files its text. What is broken is left out.
BLOCK, MAX_BODY, MAGIC = 1 << 16, 10**7, b"\x1f\x8b\x08"        # bytes [our choice]; of gzip
SIZE = re.compile(rb"\s*([0-9a-fA-F]{1,7})[^\r\n]{0,99}\r?\n")  # of a chunk
CHARSET = re.compile(r"charset\s*=[\s\"']*((utf|iso|win|cp|koi|gb|big5|euc|shift|us-)[\w-]+)", re.I)
ALIASES = {"iso-8859-1": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030", "shift_jis": "cp932"}
class Inflate(io.RawIOBase):    # the bytes in gzip, one stream or many; a broken one is given up
    def __init__(self, file, broken: Counter):
        self.file, self.broken, self.raw, self.unzip = file, broken, b"", zlib.decompressobj(31)
    def readable(self): return True
    def readinto(self, room):
        block = b""
        while not block and (raw := self.raw or self.file.read(BLOCK)):
            try:
                block = self.unzip.decompress(raw, len(room))
                self.raw = self.unzip.unconsumed_tail or self.unzip.unused_data
                if self.unzip.eof: self.unzip = zlib.decompressobj(31)
            except zlib.error:      # on to where the next one may begin
                self.broken["gzip"] += 1
                while (at := raw.find(MAGIC, 1)) < 0 and (more := self.file.read(BLOCK)):
                    raw = raw[-3:] + more
                self.raw, self.unzip = raw[at:] if at > 0 else b"", zlib.decompressobj(31)
        room[:len(block)] = block
        return len(block)
def unpacked(file, broken: Counter):
    packed, _ = file.read(3) == MAGIC, file.seek(0)
    return io.BufferedReader(Inflate(file, broken), BLOCK) if packed else file
def fields_of(lines) -> dict:
    pairs = (line.decode("utf-8", "replace").partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, colon, value in pairs if colon}
def read_warc(file, broken: Counter):
    """Yields (header, body) of records. One that holds the next has a wrong length, and goes."""
    lost, streams = False, [unpacked(file, broken)]
    while streams:
        line, fields = (stream := streams[-1]).readline(BLOCK), None
        if not line: streams.pop()
        elif line.startswith(b"WARC/"):
            lines = itertools.islice(iter(lambda: stream.readline(BLOCK), b""), 200)
            fields = fields_of(itertools.takewhile(bytes.strip, lines))
        elif line.strip() and not lost: broken["header"], lost = broken["header"] + 1, True
        if fields is None: continue
        size = fields.get("content-length", "")
        lost = not re.fullmatch("[0-9]{1,18}", size) or int(size) > MAX_BODY
        body = b"" if lost else stream.read(int(size))
        end = body.find(b"WARC/1.") if b"\nWARC-Type:" in body else -1
        if lost or end >= 0 or len(body) < int(size): broken["length"] += 1
        else: yield fields, body
        if end >= 0 and len(streams) < 9: streams.append(io.BytesIO(body[end:]))
def decode(body: bytes, declared: str) -> str:  # what fits all bytes, or 99 %, or Windows-1252
    places = declared, body[:2048].decode("latin-1")
    names = [found[1].lower() for found in map(CHARSET.search, places) if found]
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)): names = ["utf-16"]
    for errors, name in itertools.product(("strict", "replace"), [*names, "utf-8-sig"]):
        try: text = body.decode(ALIASES.get(name, name), errors)
        except (LookupError, UnicodeError): continue
        if errors == "strict" or text.count("\ufffd") * 100 <= len(text): return text
    return body.decode("cp1252", "replace")
def page_of(fields: dict, body: bytes, broken: Counter):      # a record -> a document, or None
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
        broken["not text (for PDF: pypdf)"] += 1
    else: return {"url": url, "text": decode(body, http.get("content-type", "")),
                  "html": kind != "conversion" and "plain" not in media.lower()}
# -----------------------------------------------------------------------------
# HTML to text. A page is mostly menus. Paragraphs vote for the boxes around them, commas and length
# count for content, links against it (Readability, Arc90 2009; boilerpipe, Kohlschuetter 2010); the
# box with the most votes is the article. One pass makes the tree, one from its end sums it up.
RAW = set("script style noscript template svg iframe textarea math canvas object".split())
GONE = set("head button select nav footer aside dialog figure".split())     # never content
BLOCKS = set("p div ul ol dl table section article blockquote pre h1 h2 h3 h4 h5 h6 header main "
             "form address fieldset details li tr td th dt dd center".split())
BOXES = BLOCKS | GONE | {"a", "span", "body"}   # the text of other tags is that of the box around
TAG = re.compile(r"<!--.*?(?:-->|\Z)|<([/!?]?)([a-zA-Z][^\s/>]*)([^>]*)>", re.S)
NAMES = re.compile(r"""(?:class|id|role|itemprop)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""", re.I)
BAD = re.compile(r"menu|nav|rss|sponsor|\bad[s_-]|\bads?\b|widget|byline|meta|tags|banner|foot|"
    "header|popup|modal|subscribe|signup|login|caption|credit|author|pager|rating|tool|masthead|"
    "print|copyright|hidden|teaser|most-?read|trending|more-|advert|breadcrumb|recommend|outbrain|"
    "taboola|comment|disqus|sidebar|cookie|related|social|promo|newsletter|share", re.I)  # names
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
def article(boxes: list) -> list:       # the box with the most votes, and its kin
    best = max(boxes, key=lambda box: 0 if box.out else box.score * (1 - box.links / max(box.n, 1)))
    return [box for box in (best.up.kids if best.up else [best]) if box.__class__ is Box and (
        box is best or not box.out and box.score >= max(10, .2 * best.score))]
def extract(page: str) -> str:
    """HTML -> the text of its article. \\2 is a line end, \\3 a space that is not squeezed."""
    vote(boxes := parse(page))
    out, stack = [], article(boxes)[::-1]
    while stack:
        if (box := stack.pop()).__class__ is str: out.append(box)
        elif not box.out:
            start, end = ("", " \4 ") if box.tag in ("td", "th") and box.n < 200 else (
                "\2\5", "\2") if box.tag == "li" else ("\2\2" * (box.tag in BLOCKS),) * 2
            out.append(start)
            stack += [end, *reversed(box.kids)]
    text = re.sub(r"(?<![ \x04])[ \x04]*\x02[ \x02]*", lambda edge: "\n" * min(
        2, edge[0].count("\2")), re.sub(r"\s+", " ", html.unescape("".join(out))))
    text = re.sub(r"\n+\x05\s*", "\n  \u2022 ", text)
    return text.replace("\3", " ").replace("\4", "|").replace("\5", "").strip("\n ")
# -----------------------------------------------------------------------------
# Rules: what is measured, its value, the lowest and the highest that stay; and whose rule it is. They
# were chosen by looking at what they drop, and by training on the rest: so look, too (--show).
STOP_WORDS, DOTS = set("the be to of and that have with".split()), ("...", "\u2026")
ENDS, OCTET = (".", "?", "!", '"', "\u201d"), r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
C4_NOT = re.compile("javascript|terms of use|privacy policy|cookie policy|uses? (of )?cookie", re.I)
MASKS = {"EMAIL_ADDRESS": r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b",
         "PHONE_NUMBER": r"(?<![\w.])(?:\+?1[-. ]?)?\(?[2-9]\d\d\)?[-. ]{,2}\d{3}[-. ]?\d{4}(?!\w)",
         "IP_ADDRESS": rf"(?<![\w.])(?:{OCTET}\.){{3}}{OCTET}(?!\w|\.\w)"}
NGRAMS = {2: .2, 3: .18, 4: .16, 5: .15, 6: .14, 7: .13, 8: .12, 9: .11, 10: .1}    # of characters
def share(test, of) -> float: return sum(map(test, of)) / max(1, len(of))
def repeated(pieces: list, size=len) -> float:
    """The share of characters (size=len) or of pieces in pieces that came before."""
    return 1 - sum(map(size, {*pieces})) / max(1, sum(map(size, pieces)))
def repetition(text: str, words: list, lines: list):
    """Of n-grams, the characters of the commonest (n < 5) or of all that occur again, each once."""
    for what, some in ("lines", lines), ("paragraphs", re.split(r"\n{2,}", text.strip())):
        yield f"repeated {what}", repeated(some, lambda _: 1), 0, .3
        yield f"characters of repeated {what}", repeated(some), 0, .2
    number, sizes = {}, np.fromiter(map(len, words), int)
    key = ids = np.array([number.setdefault(word, len(number)) for word in words])
    for n, most in NGRAMS.items():
        if len(words) < n + 1: break
        key, counts = np.unique(key[:-1] * len(number) + ids[n - 1:], return_inverse=True,
                                return_counts=True)[1:]     # renumbered, so that none is too large
        again = (key == counts.argmax()) & (counts.max() > 1) if n < 5 else counts[key] > 1
        held = np.convolve(again, np.ones(n, int)) > 0      # the words in such an n-gram
        yield f"characters of repeated {n}-grams", sizes[held].sum() / sizes.sum(), 0, most
RULES = {
    "gopher": lambda text, words, lines: (      # Rae 2021 (2112.11446), A1.1
        ("words", len(words), 50, 100_000), ("characters a word", share(len, words), 3, 10),
        ("# a word", text.count("#") / len(words), 0, .1),
        ("... a word", sum(map(text.count, DOTS)) / len(words), 0, .1),
        ("lines with a bullet", share(lambda line: line[0] in "\u2022-*", lines), 0, .9),
        ("lines ending in ...", share(lambda line: line.endswith(DOTS), lines), 0, .3),
        ("words with a letter", share(lambda word: any(map(str.isalpha, word)), words), .8, 1),
        ("of 8 stop words", len(STOP_WORDS.intersection(text.lower().split())), 2, 8)),
    "repetition": repetition,                   # Rae 2021, table A1
    "c4": lambda text, words, lines: (          # Raffel 2019 (1910.10683), 2.2
        ("sentences", len(re.findall(r"[.?!](?:\s|$)", text)), 3, math.inf),
        ("lorem ipsum or {", text.count("{") + text.lower().count("lorem ipsum"), 0, 0)),
    "fineweb": lambda text, words, lines: (     # Penedo 2024 (2406.17557), 3.6
        ("lines ending a sentence", share(lambda line: line.endswith(ENDS), lines), .12, 1),
        ("characters of repeated lines", repeated(lines), 0, .1),
        ("lines of 30 characters", share(lambda line: len(line) <= 30, lines), 0, .67),
        ("lines a word", text.count("\n") / len(words), 0, .3))}
def outside(name: str, text: str) -> list:
    """What a rule has against a text: each measure that is outside its range, as words."""
    lines = list(filter(None, map(str.strip, text.split("\n"))))
    return [f"{what} {value:.3g}, wanted {low:g} to {high:g}" for what, value, low, high in
            RULES[name](text, text.split() or [""], lines) if not low <= value <= high]
def c4_lines(text: str) -> str:
    """The lines that end a sentence, are five words or more, and not about cookies."""
    return "\n".join(line for line in text.split("\n") if line.rstrip().endswith(ENDS) and not
                     C4_NOT.search(line) and not line.endswith("...") and len(line.split()) > 4)
def mask(text: str, counts: Counter) -> str:
    """Personal data becomes |||KIND|||, as in CS336."""
    for kind, pattern in MASKS.items():
        text, n = re.subn(pattern, f"|||{kind}|||", text)
        counts[f"masked {kind}"] += n
    return text
# -----------------------------------------------------------------------------
# One classifier for language, quality, toxicity: each hashed n-gram has a weight for each label, a
# text has their means (fastText without its hidden layer: Joulin 2016, 1607.01759).
BUCKETS, START = 1 << 18, 2000  # n-grams share buckets; characters that are looked at [our choice]
def grams(text: str) -> list:       # 1 to 4 characters, 1 or 2 words
    text, words = f" {text[:START].casefold()} ", text[:START].casefold().split()
    found = [text[i:i + n] for n in (1, 2, 3, 4) for i in range(len(text) - n + 1)]
    found += [f"{a}  {b}" for a, b in zip(["", *words], words)] + words
    return [zlib.crc32(gram.encode("utf-8", "replace")) % BUCKETS for gram in found]
class Classifier:
    def __init__(self, labels: list, weights=None):
        self.labels, self.weights = labels, weights
        if weights is None: self.weights = torch.zeros(BUCKETS, len(labels))
    def predict(self, text: str) -> dict:       # {label: probability}
        return dict(zip(self.labels, self.weights[grams(text)].mean(0).softmax(0).tolist()))
    def train(self, pairs: list, epochs: int = 6, lr: float = 0.5, seed: int = 0):  # by Adagrad
        rng, squares = np.random.default_rng(seed), torch.full_like(self.weights, 1e-10)
        ids = [torch.tensor(grams(text)) for _, text in pairs]
        for batch in (batch for _ in range(epochs) for batch in np.array_split(
                rng.permutation(len(pairs)), -(-len(pairs) // 64))):
            used, places = torch.cat(some := [ids[i] for i in batch]).unique(return_inverse=True)
            rows = self.weights[used].requires_grad_()          # only these have a gradient
            means = [rows[part].mean(0) for part in places.split(list(map(len, some)))]
            loss = F.cross_entropy(torch.stack(means), torch.tensor(
                [self.labels.index(pairs[i][0]) for i in batch]))
            squares[used] += (grad := torch.autograd.grad(loss, rows)[0])**2
            self.weights[used] -= lr * grad / squares[used].sqrt()
        return self
@lru_cache(maxsize=8)
def load_classifier(path: str) -> Classifier:
    try:
        with np.load(path) as a: return Classifier(a["labels"].tolist(), torch.tensor(a["weights"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error: raise UserError(
        f"{path}: got {error}; wanted the --out of python data.py train-classifier") from None
# -----------------------------------------------------------------------------
# Duplicates. Two texts are as alike as their sets of 5-word shingles, J. Each of 128 least hashes
# is the same with probability J; what shares one of b bands of r of them is compared exactly.
N_HASHES, SHINGLE, NEIGHBOURS = 128, 5, 32  # in a bucket, one is compared with 32 [our choice]
ODD, SHIFT = np.random.default_rng(7).integers(0, 1 << 63, (2, N_HASHES), np.uint64) * np.uint64(2)
ODD, GOLDEN = ODD + np.uint64(1), np.uint64(0x9E3779B97F4A7C15)     # multiply-shift hashing
def shingles(text: str):                    # without case, accents, punctuation -> sorted uint32
    text = re.sub("[\u0300-\u036f\u2010-\u203f]", "", unicodedata.normalize("NFD", text.lower()))
    found = re.findall(rb"[\w\x80-\xff]+", text.encode(errors="replace"))
    x = np.fromiter(map(zlib.crc32, found), np.uint64)
    key = np.zeros(max(1, len(x) - SHINGLE + 1), np.uint64)
    for i in range(min(SHINGLE, len(x))): key = (key ^ x[i:i + len(key)]) * GOLDEN
    return np.unique((key >> np.uint64(32)).astype(np.uint32))
def signature(found):                       # (n,) -> (128,), uint32
    least = [(found[i:i + 2048, None] * ODD + SHIFT).min(0) for i in range(0, len(found), 2048)]
    return (np.min(least, 0) >> np.uint64(32)).astype(np.uint32)
def bands_for(jaccard: float) -> tuple:     # (b, r): the longest bands that find 99 % at this J
    r = max(r for r in range(1, 33) if r == 1 or 1 - (1 - jaccard**r) ** (N_HASHES // r) >= .99)
    return N_HASHES // r, r
def near_pairs(signatures, sets: list, jaccard: float):     # -> (pairs, 2), the earlier first
    (b, r), n, codes = bands_for(jaccard), len(signatures), [np.zeros(0, int)]
    for band in range(b):
        key = np.zeros(n, np.uint64)
        for column in signatures[:, band * r:(band + 1) * r].T: key = (key ^ column) * GOLDEN
        order = key.argsort(kind="stable")
        for k in range(1, NEIGHBOURS + 1):
            if not len(same := np.flatnonzero(key[order[k:]] == key[order[:-k]])): break
            codes.append(order[same] * n + order[same + k])
    pairs = np.stack(np.divmod(np.unique(np.concatenate(codes)), max(n, 1)), 1)
    def alike(i, j):                        # exactly
        both = len(np.intersect1d(sets[i], sets[j], assume_unique=True))
        return both >= jaccard * (len(sets[i]) + len(sets[j]) - both)
    return pairs[np.array([alike(*pair) for pair in pairs], bool)]
# -----------------------------------------------------------------------------
# The funnel. A FILTER sees one document; a GLOBAL stage all of them, so that there the work has to
# pause: `gather` takes numbers from each, `decide` says which numbers are out, `apply` drops what
# they name. So the stages are cut into legs, and a leg makes one part of each input, document by
# document, in any process of any machine. A part that is there is done: a kill loses those begun.
COMMON = {"en": "the of and to in is that it for", "de": "der die und das ist nicht ein zu mit",
          "fr": "le la les et des est une dans", "es": "el los las y que una por con"}
def labelled(doc: dict, arg: str, counts: Counter) -> str:
    """lang=LABEL:MODEL, or by function words, a heuristic; quality=MODEL, its first label. @P is
    the least probability; @pareto keeps by chance, the likelier the better (GPT-3, 2005.14165)."""
    (arg, _, least), words = arg.partition("@"), doc["text"].lower().split()
    label, _, path = arg.rpartition(":") if arg.endswith(".npz") else (arg, "", "")
    shares = {lang: sum(map(words.count, own.split())) for lang, own in COMMON.items()}
    if path: shares = load_classifier(path).predict(doc["text"])
    if (label := label or next(iter(shares))) not in shares: raise UserError(
        f"label: got {label!r}; wanted one of {', '.join(shares)}, or LABEL:MODEL.npz")
    p = shares[label] / max(1e-9, sum(shares.values()))
    if least == "pareto": least = 1 - np.random.default_rng(doc["at"]).pareto(9)
    return "" if p >= float(least or .5) else f"{label} {p:.2f}" + " by function words" * (not path)
def change(doc: dict, text: str) -> str:
    doc["text"] = text
    return "" if text.strip() else "nothing left"
def by_rule(name: str):
    return lambda doc, *_: "; ".join(outside(name, doc["text"]))
FILTERS = {     # (document, what follows "=", counts) -> why it is dropped, or ""
    "extract": lambda doc, *_: change(doc, extract(doc["text"]) if doc["html"] else doc["text"]),
    "lang": labelled, "quality": labelled, **{name: by_rule(name) for name in RULES},
    "c4": lambda doc, *_: change(doc, c4_lines(doc["text"])) or by_rule("c4")(doc),
    "mask": lambda doc, _, counts: change(doc, mask(doc["text"], counts))}
def number_of(text: str) -> int:                # a hash of 63 bits, the same on every machine
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
def numbers_of(pieces): return np.fromiter(map(number_of, pieces), np.int64)
def not_first(at, rows, _) -> np.ndarray:       # exact documents: one number of each
    first = np.unique(np.concatenate(rows), return_index=True)[1]
    return np.delete(at, first)
def twice(at, rows, _) -> np.ndarray:           # the hashes of lines: CS336 drops all copies
    hashes, counts = np.unique(np.concatenate(rows), return_counts=True)
    return hashes[counts > 1]
def copies(at, rows, arg: str) -> np.ndarray:
    """All of a cluster of near-duplicates but the first. Clusters: the least index spreads."""
    marks = np.array([row[:N_HASHES] for row in rows], np.uint32).reshape(-1, N_HASHES)
    pairs = near_pairs(marks, [row[N_HASHES:] for row in rows], float(arg or .8))
    least, before = np.arange(len(rows)), None
    while not np.array_equal(least, before):
        before = least.copy()
        for a, b in (0, 1), (1, 0): np.minimum.at(least, pairs[:, a], least[pairs[:, b]])
    return at[least < np.arange(len(rows))]
def is_out(doc: dict, out: set) -> str: return "a copy" if doc["at"] in out else ""
def drop_lines(doc: dict, out: set) -> str:
    return change(doc, "\n".join(line for line in doc["text"].split("\n")
                                 if not line or number_of(line) not in out))
GLOBAL = {      # gather: document -> numbers; decide: those that are out; apply: as a filter
    "exact": (lambda doc: numbers_of([doc["text"]]), not_first, is_out),
    "lines": (lambda doc: numbers_of(doc["text"].split("\n")), twice, drop_lines),
    "dedup": (lambda doc: np.r_[signature(x := shingles(doc["text"])), x], copies, is_out)}
def documents(path: Path):
    """Yields the documents of a text, which end in EOT."""
    held = ""
    for text in bpe.read_blocks(path, (EOT,)):
        *whole, held = (held + text).split(EOT)
        yield from whole
    if held.strip(): yield held
def read_docs(path: Path, counts: Counter):
    """Documents of a .txt, of JSON lines with "html" or "text", or of a WARC or WET file."""
    def json_lines(file):
        for line in unpacked(file, counts):
            row = {}
            with suppress(ValueError): row = json.loads(line)
            row = row if isinstance(row, dict) else {}
            text = row["html"] if isinstance(row.get("html"), str) else row.get("text")
            if isinstance(text, str): yield {**row, "text": text, "html": bool(row.get("html"))}
            else: counts["no JSON with text"] += 1
    with open(path, "rb") as file:
        for doc in (({"text": text, "html": False} for text in documents(path))
                    if path.suffix == ".txt" else json_lines(file) if ".jsonl" in path.name else
                    filter(None, (page_of(*row, counts) for row in read_warc(file, counts)))):
            text = doc["text"].replace(EOT, " ").replace("\0", " ")     # these mean something here
            yield {**doc, "text": text.encode("utf-8", "replace").decode()}
@lru_cache(maxsize=1)
def load_out(path: Path) -> set: return set(np.load(path).tolist())
def name_of(stage: str) -> tuple:
    return stage.split(" ", 1)[1].partition("=")[::2]           # "3 lang=en" -> "lang", "en"
def run_part(leg: list, after: str, out: Path, number: int, source: Path, part: Path) -> None:
    """One leg of one input; `out` is what its first stage leaves out, `after` what follows it."""
    if part.exists(): return
    table, shown, counts, rows, at = {}, {}, Counter(), [], []
    def add(stage, *more): table[stage] = [a + b for a, b in zip(table.get(stage, [0] * 4), more)]
    with atomic_write(part, "w") as file:
        clock = time.perf_counter()
        for i, doc in enumerate(read_docs(source, counts)):
            doc["at"] = number << 32 | i if leg[0] == READ else doc["at"]
            for stage in leg:
                (name, arg), size, why = name_of(stage), len(doc["text"].encode()), ""
                if name in GLOBAL: why = GLOBAL[name][2](doc, load_out(out))
                elif stage != READ: why = FILTERS[name](doc, arg, counts)
                s, clock = time.perf_counter() - clock, time.perf_counter()
                add(stage, 1, not why, size / 1e6, s)
                some = shown.setdefault(stage, {"kept": [], "dropped": []})[
                    "dropped" if why else "kept"]
                if len(some) < 9: some.append((why, doc["text"][:200]))
                if why: break
            else:
                file.write(json.dumps(doc) + "\n")
                if after:
                    rows.append(GLOBAL[name_of(after)[0]][0](doc))
                    at.append(doc["at"])
                    s, clock = time.perf_counter() - clock, time.perf_counter()
                    add(after, 0, 0, 0, s)
        if after:
            with atomic_write(part.with_suffix(".npz")) as array: np.savez(
                array, flat=np.concatenate(rows or [[]]), sizes=list(map(len, rows)), at=at)
        write_note(part, {"counts": counts, "table": table, "shown": shown})
def decide(stage: str, parts: list, out: Path) -> None:
    """What a global stage leaves out, from the numbers of all parts."""
    clock, (name, arg) = time.perf_counter(), name_of(stage)
    arrays = [np.load(part.with_suffix(".npz")) for part in parts]
    rows = [row for a in arrays for row in np.split(a["flat"], a["sizes"].cumsum(dtype=int))[:-1]]
    at = np.concatenate([a["at"] for a in arrays]).astype(int)
    numbers = GLOBAL[name][1](at, rows, arg) if rows else at
    write_note(out, {"table": {stage: (0, 0, 0, time.perf_counter() - clock)}})
    with atomic_write(out) as file: np.save(file, numbers)
def wait_for(paths: list) -> None:              # which other ranks make
    while not all(path.exists() for path in paths): time.sleep(.1)
def funnel(inputs: list, out: Path, stages: str, workers=None, show: int = 0) -> None:
    """Inputs to out/00000.txt ..., a dataset. Ranks of torchrun or Slurm share the parts."""
    legs = [[READ]]
    for i, stage in enumerate(stages.split(","), 1):
        if stage.partition("=")[0] not in {**FILTERS, **GLOBAL}: raise UserError(
            f"stages: got {stage}; wanted some of {', '.join([*FILTERS, *GLOBAL])}; try {STAGES}")
        legs += [[]] * (stage.partition("=")[0] in GLOBAL)
        legs[-1] = [*legs[-1], f"{i} {stage}"]
    sources = inputs_of(inputs)
    rank, world = (int(os.environ.get(a, os.environ.get(b, c))) for a, b, c in (
        ("RANK", "SLURM_PROCID", 0), ("WORLD_SIZE", "SLURM_NTASKS", 1)))
    models = list(map(Path, re.findall(r"[^=:,@]+\.npz", stages)))
    made_from = [fingerprint([f for f in some if f.exists()], out) for some in (sources, models)]
    folder, made = out / f".funnel-{digest((made_from, stages))[:8]}", []
    for old in set(out.glob(".funnel-*")) - {folder} if not rank else (): shutil.rmtree(old)
    remove_leftovers(out)
    for k, leg in enumerate(legs):      # the parts of all legs stay: a text each, until out is gone
        verdict, after = folder / f"{k}.npy", (legs[k + 1:] or [[""]])[0][0]
        if k and not rank and not verdict.exists(): decide(leg[0], sources, verdict)
        wait_for([verdict] * bool(k))
        parts = [folder / f"{k}-{i:05}.jsonl" for i in range(len(sources))]
        jobs = list(zip(itertools.count(), sources, parts))[rank::world]
        work = bpe.parallel_map(run_part, jobs, workers, (leg, after, verdict))
        for _ in tqdm(work, f"leg {k + 1} of {len(legs)}", len(jobs), disable=None): pass
        if not rank: wait_for(parts)
        sources, made = parts, [*made, verdict, *parts]
    if rank: return
    for old in {*out.glob("0????.txt")} - {out / f"{i:05}.txt" for i in range(len(parts))}:
        old.unlink()
    for i, part in enumerate(parts):
        with atomic_write(out / f"{i:05}.txt", "w") as file, open(part) as docs:
            file.writelines(json.loads(doc)["text"] + EOT for doc in docs)
    report(sum(legs, []), list(map(read_note, made)), show)
def report(stages: list, notes: list, show: int) -> None:
    print(f"{'stage':20s}{'documents':>10s}{'kept':>10s}{'MB':>9s}{'s':>8s}{'MB/s':>8s}")
    for stage in stages:
        docs, kept, mb, s = np.sum([note.get("table", {}).get(stage, [0] * 4) for note in notes], 0)
        print(f"{stage:20s}{docs:10,.0f}{kept:10,.0f}{mb:9,.2f}{s:8.2f}{mb / max(s, 1e-9):8.2f}")
        for which in ("kept", "dropped") if show else ():
            some = [row for note in notes for row in note.get("shown", {}).get(stage, {which: []})[which]]
            for why, text in some[:show]: print(f"    {which} {why}: {text!r}")
    print("counted:", dict(sum((Counter(note.get("counts", {})) for note in notes), Counter())))
def inputs_of(places: list) -> list:
    files = [file for place in map(Path, places) for file in (
        sorted(filter(Path.is_file, place.rglob("[!.]*"))) if place.is_dir() else [place])]
    if missing := [file for file in files if not file.is_file()] or not files and places:
        raise UserError(f"inputs: got {missing[0]}, which is no file; wanted WARC, WET, .jsonl or "
                        ".txt files, or folders of them")
    return files
def look(files: list, n: int = 10) -> None:
    """n documents at random: raw, extracted, and what each rule says."""
    rng, counts = np.random.default_rng(), Counter()
    docs = (doc for file in inputs_of(files) for doc in read_docs(file, counts))
    for doc in heapq.nlargest(n, docs, lambda _: rng.random()):
        text = extract(doc["text"]) if doc["html"] else doc["text"]
        for what, some in ("raw", doc["text"]), ("extracted", text):
            print(f"{what:10s}| {doc.get('url', '')}, {len(some):,} characters")
            for line in list(filter(str.strip, some[:2000].split("\n")))[:12]: print(f"    {line[:90]}")
        for rule in RULES: print(f"{rule:10s}| {'; '.join(outside(rule, text)) or 'keeps it'}")
        print("-" * 79)
    print("counted:", dict(counts))
# -----------------------------------------------------------------------------
# Mixing. Weights say how much of each source is read, not how much there is; but a small source
# that is read often is learned by heart (four times costs little: Muennighoff 2023, 2305.16264).
def budgets(sizes, weights, total: float, epochs: float) -> np.ndarray:
    """Bytes to take of each source: as the weights say, of each at most so many epochs; what one
    lacks, the others share (UniMax, 2304.09151)."""
    caps, takes, free = epochs * np.array(sizes, float), np.zeros(len(sizes)), np.array(weights) > 0
    while free.any():
        each = (total - takes.sum()) * weights * free / np.sum(weights * free)
        over = free & (each >= caps)
        takes, free = takes + np.where(over if over.any() else free, np.minimum(each, caps), 0), (
            free & ~over if over.any() else free & False)
    return takes
def mix(inputs: list, out: Path, valid: Path, mb: float, epochs: float) -> None:
    """PLACE=WEIGHT ... -> out/train.txt, out/valid.txt. Whose share lags most comes next."""
    places, weights = zip(*(place.rpartition("=")[::2] for place in inputs))
    try: weights = np.array(weights, float)
    except ValueError: raise UserError(f"mix: got {inputs}; wanted PLACE=WEIGHT ...") from None
    files = [inputs_of([place]) for place in places]
    sizes = [sum(map(size_of, some)) for some in files]
    takes, written = budgets(sizes, weights, mb * 1e6, epochs), np.zeros(len(places))
    texts = [(text for _ in itertools.count() for file in some for text in documents(file))
             for some in files]
    inputs_of([valid])
    with atomic_write(out / "train.txt") as file:
        while (lag := np.divide(written, takes, where=takes > 0, out=np.ones(len(takes)))).min() < 1:
            text = (next(texts[lag.argmin()]) + EOT).encode()
            written[lag.argmin()] += file.write(text)
    with atomic_write(out / "valid.txt") as file, open(valid, "rb") as text:
        shutil.copyfileobj(text, file)
    for place, size, n in zip(places, sizes, written):
        print(f"{place}: {n / 1e6:,.2f} MB of {written.sum() / 1e6:,.2f}, {n / size:.2f} epochs")
# -----------------------------------------------------------------------------
# Stage 1, text. Validation text must be new to the model, so files are never divided, unless there
# is only one; a folder of train.txt and valid.txt is divided already.
SIDES, WHOLE = ("train", "valid"), (0, sys.maxsize)
HIDDEN, TESTS = r"\..*|__pycache__", r"tests?|idle_test|(site|dist)-packages|config-.*|_sysconfig.*"
def is_text(file: Path) -> bool:
    """A readable file (not a pipe, which would block), not empty, no NUL in its first 64 KiB."""
    if not (file.is_file() and os.access(file, os.R_OK)): return False
    with open(file, "rb") as f: return bool(start := f.read(1 << 16)) and b"\0" not in start
def find_files(dataset: str, folder: Path) -> tuple:
    """-> (root, files, how many others are no text). The files of a download may not exist yet. Of
    a folder all count but hidden ones and our own, of the standard library its texts."""
    source, root, left_out = SOURCES.get(dataset), Path(dataset), HIDDEN
    if source and source.files: return folder, [folder / name for name in source.files], 0
    if source: root, left_out = Path(sysconfig.get_path("stdlib")), f"{HIDDEN}|{TESTS}"
    found, ours = [] if root.is_dir() else [root], {folder.resolve(), folder.parent.resolve()}
    for here, folders, names in os.walk(root):
        names = [] if "train.json" in names else names      # a run of ours
        folders[:] = [name for name in folders if not re.fullmatch(left_out, name)
                      and Path(here, name).resolve() not in ours]
        found += [Path(here, name) for name in names if not re.fullmatch(left_out, name)
                  and (not source or name.endswith((".py", ".rst", ".txt")))]
    files = list(filter(is_text, found))
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
        cut = max(int(0.9 * (size := size_of(files[0]))), size - VALID_BYTES)
        near = next(read_blocks(files[0], cut, cut + 4))
        cut += len(near) - len(near.lstrip(bytes(range(0x80, 0xC0))))   # UTF-8 continuation bytes
        return [[(files[0], 0, cut)], [(files[0], cut, size)]]
    number = {file: int(digest(file.relative_to(root).as_posix()), 16) for file in files}
    valid = {file for file in files if number[file] % 20 == 0}
    if len(valid) in (0, len(files)): valid = {min(files, key=number.get)}
    if {file.name for file in files} == {"train.txt", "valid.txt"}:
        valid = {file for file in files if file.name == "valid.txt"}
    return [[(file, *WHOLE) for file in sorted(files, key=number.get) if (file in valid) == new]
            for new in (False, True)]
def read_blocks(path: Path, start: int, end: int):
    """Yields the bytes of a range, unpacked if the name ends in .gz; last an empty block."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            f.seek(start)
            while block := f.read(min(1 << 20, end - f.tell())): yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: got a broken gzip file ({error}), wanted a whole one; delete it "
                        "and run the same command again") from error
    yield b""
def write_text(target: Path, ranges: list) -> tuple:
    """Joins ranges as UTF-8, each ended by EOT. -> (sha256 of the text, how many invalid sequences
    became a U+FFFD: the difference in length between replacing and ignoring them)."""
    sha, invalid = hashlib.sha256(), 0
    with atomic_write(target) as out, progress(desc=target.name, delay=1) as bar:
        for piece in ranges:
            keep, drop = (codecs.getincrementaldecoder("utf-8")(e) for e in ("replace", "ignore"))
            tail = ""
            for block in read_blocks(*piece):
                text = keep.decode(block, final=not block)
                invalid += len(text) - len(drop.decode(block, final=not block))
                tail = (tail + text)[-64:]
                if not block and not tail.rstrip().endswith(EOT): text += EOT   # the last block
                sha.update(raw := text.encode())
                bar.update(out.write(raw))
    return sha.hexdigest(), invalid
def plan(dataset: str, folder: Path, files: list, note: dict, label: str, mirror, workers: int):
    """Says what a large source still takes, and refuses what the disk cannot hold. What a mirror
    has is known only when it has come; until then nothing is refused."""
    source, known = SOURCES.get(dataset), all(file.exists() for file in files)
    have = sum(size_of(file) + size_of(part_of(file)) for file in files)
    download, text = (0, 0) if note or known else (max(0, source.download - have), source.text)
    if known and not note:      # a packed source grows by the ratio of its row
        text = have * source.text // source.download if source and source.files else have
    encode = text if not note else sum(size for side, size in zip(SIDES, note["bytes"])
        if read_note(folder / f"{side}-{label}.bin").get("text") != note[side])
    tokens = encode * (4 if label in ("byte", "char") else 1)   # 2 bytes an id, twice; bpe: / 4
    tokens -= sum(map(size_of, folder.glob(f"*-{label}-parts-*/*")))    # from a run that was killed
    need, learn = download + text + max(0, tokens), encode if label.startswith("bpe") else 0
    free = shutil.disk_usage(next(p for p in folder.resolve().parents if p.exists())).free
    guess = " if the mirror has the original" if mirror and not known else ""
    line = (f"{dataset}: {download / 1e6:,.0f} MB to download, {need / 1e6:,.0f} MB of disk needed"
            f"{guess}, {free / 1e6:,.0f} MB free at {folder.resolve()}")
    if need > free and not guess:
        raise UserError(f"too little disk for {line}; free some or give another --data_dir")
    seconds = download / DOWNLOAD_RATE + text / TEXT_RATE + (
        min(learn, BPE_BYTES) / TRAIN_RATE + encode / ENCODE_RATE) / workers
    if need > 1e8: print(f"{line}; about {seconds / 60:.0f} minutes")
def make_text(dataset: str, folder: Path, label: str, mirror, workers: int) -> dict:
    """Makes train.txt and valid.txt if they are missing or stale -> their note."""
    source, texts = SOURCES.get(dataset), [folder / f"{side}.txt" for side in SIDES]
    root, files, n_others = find_files(dataset, folder)
    note, to_come = read_note(folder / "text"), [file for file in files if not file.exists()]
    if note.get("bytes") != list(map(size_of, texts)) or (
            not to_come and note.get("files") != fingerprint(files, root)):
        note = {}               # a download that was deleted after it became text is not missed
    plan(dataset, folder, files, note, label, mirror, workers)
    for file in files if source and source.files else ():
        url = f"{(mirror or source.url).rstrip('/')}/{file.name}"
        if file in to_come and not note: fetch(url, file)
        if (origin := read_note(file).get("url", url)) != url:
            print(f"{file} came from {origin}; for that of {url} delete {folder}")
    if note: return note
    if (size := sum(map(size_of, files))) < MIN_BYTES: raise UserError(
        f"{dataset}: got {size} bytes of text; {n_others} files are empty, binary or unreadable; "
        f"wanted {MIN_BYTES} bytes of UTF-8; give another file or folder")
    pair = source and len(source.files) == 2
    ranges = [[(file, *WHOLE)] for file in files] if pair else divide(files, root)
    write_note(folder / "text", {})         # a kill from here on leaves texts that count as stale
    shas, invalid = zip(*map(write_text, texts, ranges))
    print(f"{folder}: text of {len(files)} files, {n_others} empty or binary ones left out, "
          f"{sum(invalid)} invalid UTF-8 sequences replaced; sha256 of train.txt {shas[0][:16]}")
    return write_note(folder / "text", {"files": fingerprint(files, root), **dict(zip(SIDES, shas)),
                                        "bytes": list(map(size_of, texts))})
# -----------------------------------------------------------------------------
# Stages 2 and 3: a tokenizer, learned from train.txt or brought; then blocks of the text, cut where
# no id changes, become files of tokens in whichever process is free, and these are joined.
def learn_bpe(path: Path, vocab_size: int, workers: int):
    print(f"BPE learns from {min(size_of(path), BPE_BYTES):,} of {size_of(path):,} bytes of {path}")
    return bpe.Tokenizer(*bpe.train(path, vocab_size, (EOT,), workers=workers, max_bytes=BPE_BYTES),
                         (EOT,))
def learn_chars(path: Path, *_):
    chars = set().union(*(text.replace(EOT, "") for text in bpe.read_blocks(path, (EOT,))))
    return bpe.CharTokenizer(sorted(chars), (EOT,))
def use_bytes(*_): return bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], (EOT,))
TOKENIZERS = {"bpe": learn_bpe, "byte": use_bytes, "char": learn_chars}
def label_of(tokenizer: str, vocab_size: int) -> str:
    """The part of a token file's name that tells tokenizers apart. A mistake shows here, early."""
    lowest = len(bpe.BYTES) + 1
    if tokenizer == "bpe" and not lowest <= vocab_size <= sys.maxunicode: raise UserError(
        f"vocab_size: got {vocab_size}; wanted {lowest} (bytes and {EOT}) to {sys.maxunicode}; try "
        "4096")
    if tokenizer in TOKENIZERS: return f"bpe-{vocab_size}" if tokenizer == "bpe" else tokenizer
    if not Path(tokenizer).exists(): raise UserError(
        f"tokenizer: got {tokenizer!r}; wanted {', '.join(TOKENIZERS)} or the path of a "
        "tokenizer.json or of its folder; nothing is at that path")
    if (tok := bpe.load_tokenizer(tokenizer)).eot is None:
        raise UserError(f"{tokenizer}: it has no {EOT}, which separates documents; use another")
    return f"own-{tok.hash[:8]}"
def encode_part(tok, dtype, part: Path, text: str) -> None:
    if not part.exists():       # from a run that was killed
        with atomic_write(part) as out: out.write(np.array(tok.encode(text), dtype).tobytes())
def make_tokens(text_path: Path, sha: str, out: Path, tok, workers: int) -> dict:
    """Makes a token file, unless it is there and fresh: [EOT doc EOT doc ... EOT], whose first EOT
    gives the first token of the text a context too. -> its note."""
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
def prepare(dataset, tokenizer="bpe", vocab_size=4096, data_dir="data", mirror=None, workers=None):
    """Runs what is missing or stale of the three stages -> Corpus. dataset: a row of SOURCES or a
    path; tokenizer: bpe, byte, char or a path; workers: processes, None for one a core."""
    name, place, tokenizer = str(dataset), Path(dataset).resolve(), str(tokenizer)
    if name not in SOURCES:
        if not place.exists(): raise UserError(
            f"dataset: got {name!r}; wanted one of {', '.join(SOURCES)}, or the path of a text "
            "file or of a folder of them; nothing is at that path")
        name = f"{place.stem}-{digest(str(place))[:6]}"     # two folders called text: two names
    workers = checked(workers, mirror)
    folder, label = Path(data_dir) / name, label_of(tokenizer, vocab_size)
    remove_leftovers(folder)
    shas, path = make_text(str(dataset), folder, label, mirror, workers), Path(tokenizer)
    if tokenizer in TOKENIZERS:     # named by kind, size and text: of the right name, never stale
        path = folder / f"tokenizer-{label}-{shas['train'][:8]}.json"
        if not path.exists():
            TOKENIZERS[tokenizer](folder / "train.txt", vocab_size, workers).save(path)
    tok, bins = bpe.load_tokenizer(path), [folder / f"{side}-{label}.bin" for side in SIDES]
    return Corpus(name, tok, *bins, {
        side: make_tokens(folder / f"{side}.txt", shas[side], out, tok, workers)
        for side, out in zip(SIDES, bins)})
def checked(workers, mirror=None) -> int:
    if workers is not None and workers < 1: raise UserError(
        f"workers: got {workers}; wanted 1 or more; leave it out for one a core")
    if mirror and not mirror.startswith(("http://", "https://")):
        raise UserError(f"mirror: got {mirror!r}; wanted a URL; try http://{mirror}")
    return workers or os.cpu_count() or 1
# -----------------------------------------------------------------------------
# The loader. Windows drawn at random miss 1/e of a corpus in as many draws as it has windows; a
# permutation misses none, and as it follows from (seed, epoch), a resumed run goes on exactly.
def open_tokens(path): return np.memmap(path, dtype=read_note(Path(path))["dtype"], mode="r")
def windows(tokens, seq_len: int, which):   # (tokens, targets), int64; past the end 0 and -1
    ids = torch.full((len(which), seq_len + 1), -1)                     # (B, T + 1), -1: padding
    for row, k in zip(ids.numpy(), which):
        window = tokens[k * seq_len:(k + 1) * seq_len + 1]
        row[:len(window)] = window
    targets = ids[:, 1:].contiguous()                                   # (B, T + 1) -> (B, T)
    return ids[:, :-1].masked_fill(targets < 0, 0), targets
def in_order(tokens, seq_len: int, batch_size: int):    # all windows once; the last batch is padded
    for first in range(0, -(-(len(tokens) - 1) // seq_len), batch_size):
        yield windows(tokens, seq_len, range(first, first + batch_size))
def validation(corpus, limit):      # -> (tokens, bytes of their text) to evaluate on
    tokens, tok = open_tokens(corpus.valid), corpus.tokenizer
    if limit is None or len(tokens) <= limit: return tokens, corpus.info["valid"]["bytes"]
    print(f"evaluations use the first {limit:,} of {len(tokens):,} validation tokens")
    special = set(tok.special_tokens.values())
    size = np.array([len(tok.vocab[i]) * (i not in special) for i in range(tok.vocab_size)])
    return tokens[:limit], int(size[tokens[1:limit]].sum())
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
        if self.n_windows < batch_size: raise UserError(
            f"too little text: got {self.n_windows} windows of seq_len {seq_len}; wanted a batch, "
            f"{batch_size}; use more text, or a smaller --batch_size or --seq_len")
    def __iter__(self): return self
    def __next__(self):
        first = self.seen + self.rank * self.rows
        self.seen += self.batch_size
        places = (divmod(s, self.n_windows) for s in range(first, first + self.rows))
        return windows(self.tokens, self.seq_len, [
            int(permutation(self.n_windows, self.seed, epoch)[i]) for epoch, i in places])
    def state(self) -> dict: return {"seed": self.seed, "seen": self.seen}
    def seek(self, seen: int) -> None: self.seen = seen
# -----------------------------------------------------------------------------
# The lesson, and the command line
READ, STAGES = "0 read", "extract,lang=en,gopher,repetition,c4,fineweb,lines,dedup,mask"
def lesson(data_dir: str) -> None:
    for name, row in SOURCES.items(): print(f"{name:12s}{row.download / 1e6:8,.0f} MB to download,"
        f"{row.text / 1e6:7,.0f} MB of text: {row.about} | {row.licence} | {row.homepage}")
    print("\nTHE FUNNEL, on a made-up crawl: what the library says of itself, copies, German, spam")
    folder, files = Path(data_dir) / "lesson", Path(sysconfig.get_path("stdlib")).glob("*.py")
    about = [ast.get_docstring(ast.parse(file.read_bytes())) or "" for file in sorted(files)]
    with atomic_write(folder / "crawl.jsonl", "w") as file:
        for i, text in enumerate(about):
            text = [text, about[i - 1], "Das ist der Hund und das. " * 9, "Buy $$$ 12 " * 40][i % 4]
            page = "<li><a href=/>Home</a>" * 20 + "</ul><p>" + text.replace("\n\n", "<p>")
            file.write(json.dumps({"html": f"<ul>{page}<p>Mail me@x.org."}) + "\n")
    funnel([folder / "crawl.jsonl"], folder / "clean", "extract,lang=en,gopher,dedup,mask", 1, 1)
    (b, r), shares = bands_for(.8), [.5, .6, .7, .8, .9]
    print(f"dedup compares two texts if one of {b} bands of {r} hashes is the same: "
          + ", ".join(f"J = {J}: {1 - (1 - J**r) ** b:.2f}" for J in shares))
    prepare(folder / "clean", "bpe", 512, data_dir, workers=1)
    print("\nTHE LOADER: tokens -> targets, for the ids 0 .. 10, seq_len 4, padding left out")
    loader, met = Loader(np.arange(11), 4, 1, seed=2), [[], []]
    for s, (tokens, targets) in enumerate(itertools.islice(loader, 2 * loader.n_windows)):
        met[s // loader.n_windows] += (targets := targets[targets >= 0].tolist())
        print(f"    {tokens[0, :len(targets)].tolist()}  ->  {targets}")
    print("every target exactly once an epoch:", all(sorted(x) == [*range(1, 11)] for x in met))
def train_classifier(file: Path, out: Path) -> None:
    try: pairs = [line.partition("\t")[::2] for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error: raise UserError(f"{file}: got {error}") from None
    if not all(map(all, pairs or [""])): raise UserError(f"{file}: wanted lines LABEL<tab>TEXT")
    np.random.default_rng(0).shuffle(pairs)
    model = Classifier(list(dict(pairs))).train(pairs[(n := len(pairs) // 10):])
    with atomic_write(out) as a: np.savez_compressed(a, labels=model.labels, weights=model.weights)
    right = sum(max(p := model.predict(text), key=p.get) == label for label, text in pairs[:n])
    print(f"{out}: {right} of {n} right that it was not trained on")
def get(dataset: str, records: int, data_dir: str, mirror, workers, **options) -> None:
    if dataset == "commoncrawl" and checked(workers, mirror): fetch_crawl(records, data_dir, mirror)
    else: prepare(dataset, data_dir=data_dir, mirror=mirror, workers=workers, **options)
COMMANDS = {    # command -> function, and its flags: kind, default, help
    "get": (get, {
        "dataset": (str, None, f"{', '.join(SOURCES)}, commoncrawl, or a text file or a folder"),
        "--tokenizer": (str, "bpe", "bpe, byte, char, or the path of a tokenizer.json"),
        "--vocab_size": (int, 4096, "ids of a bpe"), "--records": (int, 200, "of commoncrawl"),
        "--mirror": (str, None, "URL of another folder with the files"),
        "--workers": (int, None, "processes, without it one a core")}),
    "look": (look, {"files": (Path, None, "WARC, WET, .jsonl or .txt files, or folders"),
                    "--n": (int, 10, "documents")}),
    "funnel": (funnel, {
        "inputs": (Path, None, "WARC, WET, .jsonl or .txt files, or folders"),
        "--out": (Path, Path("clean"), "folder of the text, a dataset"),
        "--stages": (str, STAGES, f"in order, of {', '.join([*FILTERS, *GLOBAL])}"),
        "--workers": (int, None, "processes, without it one a core"),
        "--show": (int, 0, "examples that each stage kept and dropped, 9 of a file at most")}),
    "mix": (mix, {
        "inputs": (str, None, "PLACE=WEIGHT, texts (.txt) or folders of them"),
        "--valid": (Path, Path("valid.txt"), "text to evaluate on, none of the above"),
        "--out": (Path, Path("mixed"), "folder of train.txt and valid.txt, a dataset"),
        "--mb": (float, 100., "MB of text"), "--epochs": (float, 4., "of a source, at most")}),
    "train-classifier": (train_classifier, {
        "file": (Path, None, "lines LABEL<tab>TEXT, for lang= and quality="),
        "--out": (Path, Path("model.npz"), "of the model")})}
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Without a command: the lesson.")
    commands = parser.add_subparsers(dest="command")
    for p, default in [(parser, "data"), (commands.add_parser("get"), argparse.SUPPRESS)]:
        p.add_argument("--data_dir", default=default, help="folder for all files (default: data)")
    for command, (_, flags) in COMMANDS.items():
        p = commands.choices.get(command) or commands.add_parser(command)
        for flag, (kind, default, about) in flags.items():
            how = {"nargs": "+"} if flag in ("inputs", "files") else {}
            if flag[0] == "-": how, about = {"default": default}, about + f" (default: {default})"
            p.add_argument(flag, type=kind, help=about, **how)
    return parser
def main(args) -> None:
    options = dict(vars(args))
    print("data.py:", options)
    command = options.pop("command")
    run = COMMANDS[command][0] if command else lesson
    if run not in (lesson, get): del options["data_dir"]
    try: run(**options)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None

if __name__ == "__main__":
    main(build_parser().parse_args())
