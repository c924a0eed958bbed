"""bpe.py - text into integers and back: characters, bytes, words; then byte-pair encoding.

THE IDEA
    A language model sees integers. Which ones decides how long a text is, how large the embedding
    table is, and whether there are texts the model cannot read. Characters give a huge vocabulary
    of mostly rare symbols; bytes a tiny one and long sequences; words short sequences and a hole,
    the unknown word. Byte-pair encoding (BPE) begins with the 256 bytes, so that nothing is
    unknown, and gives the most frequent pair of neighbours an id of its own, again and again: a
    common word ends as one token, a rare one as several. Before that the text is cut into
    pre-tokens, roughly a word and the space before it; no pair reaches across their edges.

THE MATHS
    ratio       bytes of a text in UTF-8 / its tokens: 1 for bytes; the higher, the shorter
    train       repeat: a, b = argmax over pairs of neighbours of (count, (bytes of a, bytes of b));
                add the token ab. So of pairs of equal count, the greater bytes win
    encode      in each pre-token, merge the pair that was learned first, until none is left
    decode      join the bytes of the tokens, then read them as UTF-8. decode(encode(s)) == s for
                every s that UTF-8 can hold

THE COSTS
    train       splitting is linear in the text and uses all cores; the merge loop works on distinct
                pre-tokens and revisits only those that a merge changes
    encode      a look-up in a dictionary per pre-token, since words repeat; n log n for a new one
                of n bytes
    memory      training holds the distinct pre-tokens, for each pair an index of those it is in,
                and, in each worker, one chunk of the file

CONTENTS  tools for everyone / pre-tokens and special tokens / characters and words /
          train_reference / cut_points, train / Tokenizer / load_tokenizer / the lesson
NOT HERE  compiled loops (tiktoken, Hugging Face tokenizers); unigram models (SentencePiece);
          normalisation, which changes the text; models of raw bytes (ByT5, MegaByte, BLT), though
          a Tokenizer without merges is what they need
RUN       python bpe.py    # the lesson; last line "... come back unchanged: True"
          python bpe.py train FILE --vocab_size 4096    # writes tokenizer.json
          python bpe.py encode tokenizer.json "Hello, world"
          python bpe.py decode tokenizer.json 72 105    # prints Hi
REFERENCES
    Gage 1994, A New Algorithm for Data Compression: the algorithm; Sennrich et al. 2016
    (1508.07909) for words; Radford et al. 2019, GPT-2: for bytes, with the pattern and the map of
    bytes; Llama Team 2024 (2407.21783): the other pattern; Stanford CS336: how ties are broken
EXERCISE  Empty `learn_merges` and write it again:
          `pytest test_all.py -k equals_the_reference` says when it is right.
"""
import argparse, errno, hashlib, heapq, json, mmap, multiprocessing, os, signal, sys, sysconfig
import tempfile, threading
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from operator import add
from pathlib import Path

import regex
from tqdm import tqdm

EOT = "<|endoftext|>"     # stands between documents, in text files and in token files
UNK = "<|unk|>"           # stands for a character or word that is not in the vocabulary
BYTES = [bytes([i]) for i in range(256)]   # the first 256 tokens of everything we train
TRAIN_CHUNK = 4 << 20     # bytes of text that a worker holds at once [our choice]
NEAR = 1 << 16            # bytes in which a special token is looked for to cut at [our choice]
CACHE_SIZE = 1 << 17      # pre-tokens whose ids are remembered; then it starts afresh [our choice]

# -----------------------------------------------------------------------------
# Tools for everyone: one way to tell a user what is wrong, one way to write a file, one way to
# use all cores. They live here because this file imports none of the others.

class UserError(SystemExit):
    """A user's mistake: UserError("what, got, wanted, do"). Prints that once; exit status 2."""
    def __init__(self, message: str, printed: bool = False):
        super().__init__(message)
        self.code = 2   # an integer, or the interpreter would print the message again and exit 1
        if not printed:
            print(message, file=sys.stderr)

    def __reduce__(self):   # how one that was raised, and printed, in a worker reaches its parent
        return UserError, (str(self), True)

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
               errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}

@contextmanager
def atomic_write(path, mode: str = "wb"):
    """Yields a file that becomes `path` when the block ends well; else `path` stays as it was.

    os.replace is atomic within a file system, so the temporary file lies in the same folder;
    without fsync a power cut could leave the new name on an empty file."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():   # a folder, or a device such as /dev/null
            raise OSError(errno.EISDIR, "it is there and not a file")
        with open(temp, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException as error:   # Ctrl-C too
        with suppress(OSError):
            temp.unlink()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS and (
                error.filename is None or Path(str(error.filename)) in (path, temp, *path.parents)):
            raise UserError(f"cannot write {path}: {error.strerror}; wanted a place to write to "
                            "with room in it; give another path or free some space") from error
        raise   # what the block did to other files, or to a network, is not about this path

def end_with_parent():
    """A worker whose parent was killed would wait for its next job for ever: this ends it."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()

def parallel_map(function, jobs: list, workers=None):
    """Yields function(*job) for each job, in order, from `workers` processes (default: one a core).

    With one job or one worker it runs in this process: to start others takes longer."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2:
        yield from (function(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=end_with_parent)
    try:
        # A process that starts while Ctrl-C is blocked never sees it: the parent alone answers
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        results = pool.map(function, *zip(*jobs))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield from results
    except BrokenProcessPool:   # when memory is out, the system ends a large process
        raise UserError(f"one of {workers} worker processes died, perhaps for lack of memory; "
                        "wanted all to finish; use fewer workers") from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        pool.shutdown(cancel_futures=True)

# -----------------------------------------------------------------------------
# Special tokens are cut out of a text first, and the rest is cut into pre-tokens.
# Without pre-tokens "dog." "dog!" "dog?" would each become a token. The price: no token spans two
# words, and since a space belongs to the word after it, "hello" and " hello" differ.

SPLIT_PATTERNS = {
    # contractions; letters; digits; the rest; white space, its last character left to the next word
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # contractions in any case; digits in groups of up to three; line ends stay with what is before
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

def split_words(text: str, pattern="gpt2") -> list:
    """"it's 42 dogs" -> ["it", "'s", " 42", " dogs"]. pattern=None: all of it is one pre-token."""
    if pattern is None:
        return [text]
    if pattern not in SPLIT_PATTERNS:
        raise UserError(f"pattern: got {pattern!r}; wanted one of {', '.join(SPLIT_PATTERNS)}")
    return regex.findall(SPLIT_PATTERNS[pattern], text)

def special_splitter(special_tokens):
    """A pattern whose split() gives [text, special, text, ..., text]: the odd ones are special.

    Longest first, because "x|y" takes x where both fit: "<a>" before "<a><b>" would hide it."""
    for special in special_tokens:
        if len(special.encode()) < 2:
            raise UserError(f"special tokens: got {special!r}; wanted two bytes or more, as single "
                            'bytes are tokens already; use something like "<|name|>"')
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")

# -----------------------------------------------------------------------------
# Characters and words, the obvious tokenizers, and what all tokenizers share.
# A str is a sequence of Unicode code points (ord, chr: 1,114,112 are possible, and most texts use a
# few hundred), a file a sequence of bytes. UTF-8 maps one to the other, 1 to 4 bytes a code point,
# ASCII unchanged. Not every sequence of bytes is UTF-8, and one byte of a longer character means
# nothing alone: join bytes first, decode once.

def ratio(tokenizer, text: str) -> float:
    """Bytes per token: how many times shorter than the bytes."""
    return len(text.encode()) / len(tokenizer.encode(text))

def tokenizer_file(path) -> Path:
    """`path`, or tokenizer.json in it if it is a folder (what has no .json at its end is one)."""
    path = Path(path)
    return path if path.is_file() or path.suffix == ".json" else path / "tokenizer.json"

class BaseTokenizer:
    """What all kinds share. vocab {id: bytes}; special_tokens {text: id}; eot, the id of EOT or
    None. A special token that vocab lacks gets the next free id.

    Each kind has `encode_ordinary`, for a text without special tokens, `spell`, for a token as
    text, and parts of tokenizer.json, which are the attributes here and `decoder`."""
    merges, pre_tokenizer, unk_token = (), None, None

    def __init__(self, vocab: dict, special_tokens=()):
        self.splitter = special_splitter(special_tokens)
        self.ids = {token: i for i, token in sorted(vocab.items())}
        for special in special_tokens:
            self.ids.setdefault(special.encode(), max(self.ids.values(), default=-1) + 1)
        self.vocab = {i: token for token, i in self.ids.items()}
        self.vocab_size = max(self.vocab) + 1
        self.special_tokens = {special: self.ids[special.encode()] for special in special_tokens}
        self.eot = self.special_tokens.get(EOT)

    def encode(self, text: str) -> list:
        """Text -> ids. A special token in the text becomes its id and is never split."""
        ids = []
        for k, part in enumerate(self.splitter.split(text)):
            ids += [self.special_tokens[part]] if k % 2 else self.encode_ordinary(part)
        return ids

    def decode(self, ids) -> str:
        """ids -> text. What a model samples need not be UTF-8: the unreadable shows as U+FFFD."""
        try:
            return b"".join([self.vocab[i] for i in ids]).decode(errors="replace")
        except KeyError as error:
            raise UserError(f"cannot decode: got id {error.args[0]}; wanted ids from 0 to "
                            f"{self.vocab_size - 1}; take the tokenizer that made them") from None

    def spec(self) -> dict:
        """What tokenizer.json holds: all that decides ids. The format is that of Hugging Face's
        `tokenizers`, which reads ours and gives the same ids."""
        spelled = {token: self.spell(token) for token in self.ids}
        spelled |= {special.encode(): special for special in self.special_tokens}
        times, made = Counter(spelled.values()), {left + right for left, right in self.merges}
        for special in self.special_tokens:
            if times[special] > 1 or special.encode() in made:
                raise UserError(f"special tokens: got {special!r}, which tokenizer.json would mix "
                                'up with another token; wanted none like it; try "<|name|>"')
        added = [{"id": i, "content": special, "single_word": False, "lstrip": False,
                  "rstrip": False, "normalized": False, "special": True}
                 for i, special in sorted((i, s) for s, i in self.special_tokens.items())]
        model = {"type": "BPE", "unk_token": self.unk_token,
                 "vocab": {spelled[token]: i for token, i in self.ids.items()},
                 "merges": [f"{spelled[left]} {spelled[right]}" for left, right in self.merges]}
        return {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model,
                "pre_tokenizer": self.pre_tokenizer, "decoder": self.decoder}

    def to_json(self) -> str:
        return json.dumps(self.spec(), ensure_ascii=False, indent=1) + "\n"

    @cached_property
    def hash(self) -> str:
        """sha256 of the file that `save` writes, which holds all that decides ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path):
        with atomic_write(tokenizer_file(path), "w") as file:
            file.write(self.to_json())

class CharTokenizer(BaseTokenizer):
    """A token a character, of those given; all others become UNK, which decode cannot undo."""
    split, unk_token, decoder = list, UNK, {"type": "Fuse"}

    def __init__(self, chars, special_tokens=(EOT,)):
        specials = list(dict.fromkeys([*special_tokens, UNK]))
        chars = sorted(set(chars) - set(specials))
        super().__init__(dict(enumerate(char.encode() for char in chars)), specials)
        self.char_ids = {char: i for i, char in enumerate(chars)}

    def encode_ordinary(self, text: str) -> list:
        unknown = self.special_tokens[UNK]
        return [self.char_ids.get(char, unknown) for char in self.split(text)]

    def spell(self, token: bytes) -> str:
        return token.decode()

class WordTokenizer(CharTokenizer):
    """A token a word, of those given, for the lesson. New texts bring new words without end, and a
    model looks better than it is, since the UNK they become is easy to predict."""
    split = staticmethod(split_words)
    spec = None   # a tokenizer.json cannot say how these words are cut

# -----------------------------------------------------------------------------
# Training as one would say it: count the pairs, merge the most frequent one, again.

def merge(ids: list, pair: tuple, new: int) -> list:
    """Replaces a pair from left to right: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out

def train_reference(text: str, vocab_size: int, special_tokens, pattern="gpt2"):
    """BPE in twenty lines. -> vocab {id: bytes}, merges [(bytes, bytes), ...], as from `train`."""
    vocab, merges = dict(enumerate(BYTES)), []
    special_tokens = list(dict.fromkeys(special_tokens))
    parts = special_splitter(special_tokens).split(text)[0::2]
    words = [list(word.encode()) for part in parts for word in split_words(part, pattern)]
    while len(vocab) < vocab_size - len(special_tokens):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        # Of equals the greatest pair of byte strings. subtle: (b" a", b"nd") > (b" ", b"d"), which
        # is neither the order of the joined strings nor that of the ids, nor first come
        pair = max(counts, key=lambda pair: (counts[pair], (vocab[pair[0]], vocab[pair[1]])))
        left, right = vocab[pair[0]], vocab[pair[1]]
        words = [merge(word, pair, len(vocab)) for word in words]
        vocab[len(vocab)] = left + right
        merges.append((left, right))
    for special in special_tokens:
        vocab[len(vocab)] = special.encode()
    return vocab, merges

# -----------------------------------------------------------------------------
# Training, fast. In the order of what each idea saves: equal pre-tokens are counted once; an index
# says which words hold a pair, and only their counts change; the most frequent pair comes from a
# heap. What is left is the splitting, which all cores share: for that, a file is cut into chunks.

def cut_points(path, size: int, special_tokens=(EOT,), end=None) -> list:
    """Byte offsets [0, ..., end], about `size` apart, where cutting a file changes no id.

    In front of a special token; or, where none is near, between a letter or digit of any script
    and a space or line end: no match of the patterns above holds both. Never inside a special
    token. Where nothing fits, the chunk grows. An `end` inside a character moves to its start."""
    specials = [special.encode() for special in special_tokens]
    special = b"|".join(map(regex.escape, specials)) or b"(?!)"
    cuts = [0]
    if os.path.getsize(path) == 0:   # which mmap refuses
        return [0, 0]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data) if end is None else min(end, len(data))
        while 0 < end < len(data) and data[end] >> 6 == 0b10:   # not the first byte of a character
            end -= 1

        def first(pattern, start, stop):   # a place where the pattern matches and a cut may be
            for match in regex.finditer(pattern, data, pos=start, endpos=stop):
                i = match.start()
                before = data[max(0, i - 4):i].decode(errors="replace")[-1:]   # one character
                # in this slice a special token can only begin before i and end after it
                across = any(s in data[max(0, i - len(s) + 1):i + len(s) - 1] for s in specials)
                if not across and (len(match[0]) > 1 or regex.match(r"\p{L}|\p{N}", before)):
                    return i

        while (start := cuts[-1] + size) < end:
            cut = (first(special, start, min(start + NEAR, end))
                   or first(special + rb"|[ \n]", start, end))
            if cut is None:
                break
            cuts.append(cut)
    return cuts + [end]

def descending(token: bytes) -> tuple:
    """A key that sorts the greatest bytes first, for a heap gives its smallest entry first:
    b"b" (-98, 1), b"ab" (-97, -98, 1), b"a" (-97, 1). The 1, above all others, puts a token after
    those that it begins."""
    return *(-byte for byte in token), 1

def neighbours(word: str):
    """"abc" -> "ab", "bc"."""
    return map(add, word, word[1:])

def learn_merges(word_counts: dict, n_merges: int) -> list:
    """{pre-token bytes: how often} -> the merges, n_merges of them or fewer.

    A word is a str whose characters are ids, chr(i) for id i: bytes read as latin-1 are the word
    before any merge, a pair is a str of two, and str.replace merges it in C, left to right."""
    words, freqs = [word.decode("latin-1") for word in word_counts], list(word_counts.values())
    counts, where = Counter(), defaultdict(list)   # of pairs: how often; indices of words
    for i, word in enumerate(words):
        for pair in neighbours(word):
            counts[pair] += freqs[i]
            where[pair].append(i)
    tokens, keys, merges = list(BYTES), [descending(token) for token in BYTES], []

    def entry(pair):
        return -counts[pair], keys[ord(pair[0])], keys[ord(pair[1])], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    with tqdm(total=n_merges, desc="merges", unit="merge", disable=None) as bar:
        while len(merges) < n_merges and heap and heap[0][0] < 0:   # those of count 0 sink
            count, *_, pair = heapq.heappop(heap)
            if -count != counts[pair]:
                # Other merges took some of its places since. No count but a new pair's ever grows,
                # so entries are upper bounds: with its true count this one comes up again in time
                heapq.heappush(heap, entry(pair))
                continue
            left, right, new = tokens[ord(pair[0])], tokens[ord(pair[1])], chr(len(tokens))
            merges.append((left, right))
            tokens.append(left + right)
            keys.append(descending(left + right))
            fresh = set()
            for i in set(where.pop(pair)):
                for gone in neighbours(words[i]):
                    counts[gone] -= freqs[i]
                words[i] = words[i].replace(pair, new)
                for there in neighbours(words[i]):
                    counts[there] += freqs[i]
                    if new in there:
                        where[there].append(i)
                        fresh.add(there)
            for pair in fresh:
                heapq.heappush(heap, entry(pair))
            bar.update()
    return merges

def count_words(path, start: int, end: int, special_tokens, pattern: str) -> Counter:
    """Counts the pre-tokens of a part of a file, as bytes. What is not UTF-8 counts as U+FFFD."""
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(end - start).decode(errors="replace")
    counts = Counter()
    for part in special_splitter(special_tokens).split(text)[0::2]:
        counts.update(split_words(part, pattern))
    return Counter({word.encode(): n for word, n in counts.items()})

def train(path, vocab_size: int, special_tokens=(EOT,), pattern: str = "gpt2", workers=None,
          max_bytes=None):
    """Learns BPE from a text file, or from its first max_bytes.

    -> vocab {id: bytes}: the 256 bytes, the merges in order, the special tokens; and the merges
    [(bytes, bytes), ...], which are fewer than vocab_size asks for when nothing is left to merge.
    `workers` processes (default: one a core) split the text: their number changes no result."""
    special_tokens = list(dict.fromkeys(special_tokens))
    special_splitter(special_tokens), split_words("", pattern)   # bad ones fail now, here
    n_merges = vocab_size - 256 - len(special_tokens)
    if not 0 <= n_merges < sys.maxunicode - 256:
        raise UserError(f"vocab_size: got {vocab_size}; wanted {vocab_size - n_merges} (bytes and "
                        f"special tokens) to {sys.maxunicode}; try 4096")
    try:
        cuts = cut_points(path, TRAIN_CHUNK, special_tokens, max_bytes)
        if cuts[-1] == 0:
            raise OSError(errno.EINVAL, "an empty file")
    except OSError as error:
        raise UserError(f"cannot train on {path}: got {error.strerror}; wanted a text file; "
                        "check the path") from None
    jobs = [(path, a, b, special_tokens, pattern) for a, b in zip(cuts, cuts[1:])]
    total = Counter()
    with tqdm(total=cuts[-1], desc="pre-tokens", unit="B", unit_scale=True, disable=None) as bar, \
         closing(parallel_map(count_words, jobs, workers)) as results:
        for job, counts in zip(jobs, results):
            total.update(counts)
            bar.update(job[2] - job[1])
    merges = learn_merges(total, n_merges)
    if len(merges) < n_merges:
        print(f"{path} ran out of pairs: {len(merges)} merges instead of {n_merges}")
    tokens = BYTES + [left + right for left, right in merges]
    return dict(enumerate(tokens + [special.encode() for special in special_tokens])), merges

# -----------------------------------------------------------------------------
# What models use. Encoding replays the merges in the order of learning, which is neither the
# longest match nor one pass over the text: counts of the training text decide how a word is cut.
# Its file is JSON, which holds text, not bytes, so tokens are spelled by GPT-2's map: the 188 bytes
# that print stand for themselves, the other 68 for the code points from 256 up. A space is U+0120.

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_CHARS |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}

class Tokenizer(BaseTokenizer):
    """Byte-level BPE. Without merges, Tokenizer(dict(enumerate(BYTES)), []), a token is a byte."""
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}

    def __init__(self, vocab: dict, merges, special_tokens=(), pattern: str = "gpt2"):
        super().__init__(vocab, special_tokens)
        split_words("", pattern)   # an unknown one fails here, not when it is used
        self.merges, self.pattern, self.cache = list(merges), pattern, {}
        self.byte_ids = [self.ids[byte] for byte in BYTES]
        self.ranks = {(self.ids[a], self.ids[b]): rank for rank, (a, b) in enumerate(self.merges)}
        self.merged = [self.ids[a + b] for a, b in self.merges]   # rank -> id
        split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS[pattern]},
                 "behavior": "Isolated", "invert": False}
        self.pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, self.decoder]}

    def encode_ordinary(self, text: str) -> list:
        """The ids of a text without special tokens."""
        if not self.merges:
            return self.encode_bytes(text)
        ids, cache = [], self.cache
        for word in split_words(text, self.pattern):
            known = cache.get(word)
            if known is None:
                known = self.merge_word(self.encode_bytes(word))
                if len(cache) >= CACHE_SIZE:
                    cache.clear()
                if len(word) < 100:   # longer ones hardly come again, and are large [our choice]
                    cache[word] = known
            ids += known
        return ids

    def encode_bytes(self, text: str) -> list:
        # a str may hold half of a UTF-16 pair, as no file can: three bytes then, and no error
        return [self.byte_ids[byte] for byte in text.encode("utf-8", "surrogatepass")]

    def merge_word(self, ids: list) -> list:
        """Merges the pair that was learned first, the leftmost of equals, until none is left.

        With merges th and the: [t, h, e] -> [th, -, e] -> [the, -, -]. A token stays where its
        first byte was; `after` and `before` lead from one to the next. Looking through the whole
        word for each merge is shorter, but a pre-token may be a megabyte of one letter."""
        ranks, n = self.ranks, len(ids)
        heap = [(ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        heapq.heapify(heap)
        after, before = list(range(1, n + 1)), list(range(-1, n))
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if j == n or ranks.get((ids[i], ids[j])) != rank:
                continue   # another merge took one half of this pair
            ids[i], ids[j] = self.merged[rank], None
            h, k = before[i], after[j]   # the neighbours, if any: two new pairs
            after[i], before[k] = k, i
            if h >= 0 and (pair := (ids[h], ids[i])) in ranks:
                heapq.heappush(heap, (ranks[pair], h))
            if k < n and (pair := (ids[i], ids[k])) in ranks:
                heapq.heappush(heap, (ranks[pair], i))
        return [i for i in ids if i is not None]

    def spell(self, token: bytes) -> str:
        return "".join(BYTE_CHARS[byte] for byte in token)

def in_use(spec: dict) -> dict:
    """The parts of a tokenizer.json, those of its model too, that are not null, false or empty."""
    return {key: part for key, part in {**spec, **spec["model"]}.items() if part and key != "model"}

def load_tokenizer(path):
    """A tokenizer.json, or the one in a folder -> the Tokenizer or CharTokenizer that it holds."""
    def read(text):
        return text.encode() if text in specials else bytes(CHAR_BYTES[char] for char in text)
    path = tokenizer_file(path)
    try:
        spec = json.loads(path.read_bytes())
        model = spec["model"]
        specials = {added["content"]: added["id"] for added in spec["added_tokens"]}
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair)
                           for pair in model["merges"]]   # ["a", "b"] is in use as well
        if spec["pre_tokenizer"]:
            vocab = {i: read(text) for text, i in (model["vocab"] | specials).items()}
            names = {pattern: name for name, pattern in SPLIT_PATTERNS.items()}
            name = names[spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]]
            merges = [tuple(map(read, pair.split(" "))) for pair in model["merges"]]
            tokenizer = Tokenizer(vocab, merges, specials, name)
        else:
            tokenizer = CharTokenizer(model["vocab"], specials)
        ours, theirs = in_use(tokenizer.spec()), in_use(spec)
        strange = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if strange:   # the file asks for what we do not do, and our ids would not be its own
            raise ValueError(f"{', '.join(strange)} would be different if saved again")
        return tokenizer
    except (OSError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"no tokenizer in {path}: got {type(error).__name__}: {error}; wanted "
                        "what `save` writes; make one: python bpe.py train FILE") from None

BaseTokenizer.load = staticmethod(load_tokenizer)   # Tokenizer.load(path)

# -----------------------------------------------------------------------------
# The lesson: everything above, on real text, with numbers computed as you read.

def pieces(tokenizer, ids) -> str:
    return " ".join(repr(tokenizer.vocab[i])[1:] for i in ids)   # bytes as Python writes them

def show_simple():
    """The obvious tokenizers on one line of text, then BPE by hand."""
    text = "Hello, \U0001F30D! \u4f60\u597d!"   # a globe; "hello" in Chinese
    globe = text[7].encode()   # four bytes
    print(f"1. {text!r}: {len(text)} characters of 1 to 4 bytes, {len(text.encode())} bytes")
    print(f"   {text[7]} is {globe}; the first alone reads", globe[:1].decode(errors="replace"))
    words = WordTokenizer(split_words(text), [])
    for name, tokenizer in (("characters", CharTokenizer(text, [])), ("words", words),
                            ("bytes", Tokenizer(dict(enumerate(BYTES)), []))):
        ids = tokenizer.encode(text)
        print(f"   {name:10s} {len(ids):2d} tokens  ratio {ratio(tokenizer, text):.3f}  "
              f"of {tokenizer.vocab_size:3d} ids: {ids[:5]} ...")
    print(f"   words, on another text: {words.decode(words.encode('Hello, world!'))!r}")

    text = "the cat in the hat"
    ids = list(text.encode())
    print(f"\n2. BPE without pre-tokens, by hand. {text!r} is {len(ids)} ids:\n   {ids}")
    vocab, merges = train_reference(text, 256 + 3, [], pattern=None)
    names = {token: i for i, token in vocab.items()}
    for new, (left, right) in enumerate(merges, 256):
        pair = names[left], names[right]
        ids = merge(ids, pair, new)
        print(f"   {pair} -> {new}, {left + right}: {len(ids)} ids\n   {ids}")

def show_trained():
    """BPE trained on half of the top-level modules of Python's library, tried on other ones."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    valid = "".join(texts[::10])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(EOT.join(texts[1::2]), encoding="utf-8")
        vocab, merges = train(path, 4096)
        print(f"\n3. BPE of {path.stat().st_size / 1e6:.1f} MB of Python's library; first merges:")
    print("  ", *(repr((left + right).decode(errors="replace")) for left, right in merges[:12]))
    for size in (257, 512, 1024, 2048, 4096):   # a smaller vocabulary has the first of the merges
        some = merges[:size - 257]
        tokenizer = Tokenizer(dict(enumerate(BYTES + [a + b for a, b in some])), some, [EOT])
        print(f"   vocabulary {size:4d}: ratio {ratio(tokenizer, valid):.3f} on other files")
    print("\n4. What does a space in front change? From which end are numbers cut? What does\n"
          "   another script cost? What stays whole?")
    for text in ("hello", " hello", "1234567890", "1234567", "\u4f60\u597d", f"the end{EOT}self"):
        ids = tokenizer.encode(text)
        print(f"   {text!r}: {len(ids)} tokens, {pieces(tokenizer, ids)}")
    print(f"   {len(valid):,d} characters, encoded and decoded, come back unchanged:",
          tokenizer.decode(tokenizer.encode(valid)) == valid)

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenizers. Without a command: the lesson.")
    commands = parser.add_subparsers(dest="command")
    learn = commands.add_parser("train", help="learn BPE from a text file")
    learn.add_argument("path", help="text file in UTF-8, its documents separated by " + EOT)
    learn.add_argument("--vocab_size", type=int, default=4096,
                       help="tokens, bytes and special ones included (default %(default)s)")
    learn.add_argument("--out", default="tokenizer.json",
                       help="file or folder to write to (default %(default)s)")
    encode = commands.add_parser("encode", help="print the ids of a text, and its pieces")
    decode = commands.add_parser("decode", help="print the text of some ids")
    for sub in encode, decode:
        sub.add_argument("tokenizer", help="tokenizer.json, or a folder that holds one")
    encode.add_argument("text", help="what to encode; special tokens in it count as such")
    decode.add_argument("ids", type=int, nargs="*", help="ids, with spaces between them")
    return parser

def main(args):
    if args.command == "train":
        print(f"train: path={args.path} vocab_size={args.vocab_size} out={args.out}")
        try:   # the file is opened first: learn now, and not in an hour, if it cannot be written
            with atomic_write(tokenizer_file(args.out), "w") as file:
                vocab, merges = train(args.path, args.vocab_size)
                file.write(Tokenizer(vocab, merges, [EOT]).to_json())
        except KeyboardInterrupt:
            raise SystemExit("interrupted; nothing was written") from None
        print(f"{len(vocab)} tokens in {tokenizer_file(args.out)}")
    elif args.command == "encode":
        tokenizer = load_tokenizer(args.tokenizer)
        ids = tokenizer.encode(args.text)
        print(*ids)
        print(pieces(tokenizer, ids))
    elif args.command == "decode":
        print(load_tokenizer(args.tokenizer).decode(args.ids))
    else:
        show_simple()
        show_trained()

if __name__ == "__main__":
    main(build_parser().parse_args())
