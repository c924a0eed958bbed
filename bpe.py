"""bpe.py: text into integers and back. Characters, bytes, words; then byte-pair encoding.

THE IDEA
A language model sees integers. Which ones decides how long a text is, how large the embedding
table is, and whether there are texts the model cannot read. Characters give a huge vocabulary of
mostly rare symbols; bytes a tiny one and long sequences; words short sequences and a hole, the
unknown word. Byte-pair encoding (BPE) begins with the 256 bytes, so that nothing is unknown, and
gives the most frequent pair of neighbours an id of its own, again and again: a common word ends
as one token, a rare one as several.

THE MATHS
  ratio(s)  bytes of s in UTF-8 / tokens of s: bytes score exactly 1, higher is shorter
  train     repeat: a, b = argmax over neighbours of (count, (bytes of a, bytes of b)); vocab += ab
  encode    in each pre-token, merge the pair whose merge was learned first, until none is left
  decode    join the bytes of all tokens, then read them as UTF-8; decode(encode(s)) == s
  A pre-token is a match of SPLIT_PATTERNS: roughly a word and the space before it. No merge
  crosses its edge.

THE COSTS
  train     splitting is linear in the text and runs on all cores; then only distinct pre-tokens
            count, and of those only the ones that a merge changes
  encode    a dictionary look-up a pre-token, since words repeat; n log n for a new one of n bytes
  memory    training holds the distinct pre-tokens and, in each worker, one chunk of the file

CONTENTS
  tools for everyone | characters, bytes, words | special tokens, pre-tokens, cut points |
  train_reference | train | Tokenizer, CharTokenizer | tokenizer.json | lesson and command line

NOT HERE
  Compiled loops (tiktoken, Hugging Face tokenizers); unigram models (SentencePiece);
  normalisation, which changes the text; models that read raw bytes (ByT5, MegaByte, BLT), though
  a Tokenizer without merges is what they need.

RUN
  python bpe.py                                  # the lesson; last line: "... back unchanged: True"
  python bpe.py train FILE --vocab_size 4096     # writes tokenizer.json
  python bpe.py encode tokenizer.json "Hello, world"
  python bpe.py decode tokenizer.json 72 105     # prints Hi

REFERENCES
  Gage 1994, A New Algorithm for Data Compression: the algorithm. Sennrich et al. 2016
  (1508.07909): for words. Radford et al. 2019, GPT-2: for bytes, the pattern and the byte map.
  Stanford CS336: the tie-break.

EXERCISE: empty `learn_merges` and write it again; `pytest test_all.py -k equals_the_reference`
says when it is right.
"""
import argparse, errno, hashlib, heapq, json, mmap, os, signal, sys, sysconfig, tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import regex
from tqdm import tqdm

EOT = "<|endoftext|>"   # stands between documents, in text files and in token files
UNK = "<|unk|>"         # what a tokenizer of characters says for one it has never seen
BYTES = [bytes([i]) for i in range(256)]   # the first 256 tokens of everything we train
CHUNK = 4 << 20         # bytes of text a worker holds at once [our choice]
NEAR = 1 << 16          # a special token within so many bytes is the preferred place to cut
CACHE_SIZE = 1 << 17    # pre-tokens whose ids a Tokenizer remembers; then it starts afresh

# -----------------------------------------------------------------------------
# Tools for everyone: one way to tell a user what is wrong, one way to write a file, one way to
# use all cores. They live here because this file imports none of the others.

class UserError(SystemExit):
    """A user's mistake: UserError("what, got, wanted, do"). Prints that once; exit status 2."""
    def __init__(self, message: str):
        super().__init__(message)
        self.code = 2   # an integer, or the interpreter would print the message again and exit 1
        print(message, file=sys.stderr)

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
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:   # a network's errors pass
            raise UserError(f"cannot write {path}: {error.strerror}; wanted a place to write to "
                            "with room in it; give another path or free some space") from error
        raise

def parallel_map(function, jobs: list, workers=None):
    """Yields function(*job) for each job, in order, from `workers` processes (default: one a core).

    With one job or one worker it runs in this process: to start others takes longer."""
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2:
        yield from (function(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        # A process that starts while Ctrl-C is blocked never sees it: the parent alone answers
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            results = pool.map(function, *zip(*jobs))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            yield from results
        except BrokenProcessPool:   # when memory is out, the system ends a large process
            raise UserError(f"one of {workers} worker processes died, perhaps for lack of memory; "
                            "wanted all to finish; use fewer workers") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            pool.shutdown(wait=False, cancel_futures=True)

# -----------------------------------------------------------------------------
# Characters, bytes, words: the obvious tokenizers, and what is wrong with each.
# A str is a sequence of Unicode code points (ord, chr), a file a sequence of bytes. UTF-8 maps one
# to the other, 1 to 4 bytes a code point, ASCII unchanged. Not every sequence of bytes is UTF-8,
# and one byte of a longer character means nothing alone: join bytes first, decode once.

class CodePoints:
    """ord and chr: 1,114,112 possible ids, and most texts use a few hundred of them."""
    vocab_size = sys.maxunicode + 1

    def encode(self, text: str) -> list:
        return [ord(char) for char in text]

    def decode(self, ids) -> str:
        return "".join(chr(i) for i in ids)

class Utf8:
    """256 ids and nothing unknown, but a token a byte: the longest sequences of all."""
    vocab_size = 256

    def encode(self, text: str) -> list:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")

class Words:
    """A token a word of the text it was made from. New texts bring new words without end; all
    become UNK, which decode cannot undo and which makes perplexities look better than they are."""
    def __init__(self, text: str):
        self.words = [UNK] + sorted(set(split_words(text)))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text: str) -> list:
        return [self.ids.get(word, 0) for word in split_words(text)]

    def decode(self, ids) -> str:
        return "".join(self.words[i] for i in ids)

def ratio(tokenizer, text: str) -> float:
    """Bytes per token: how many times shorter than the bytes."""
    return len(text.encode()) / len(tokenizer.encode(text))

# -----------------------------------------------------------------------------
# Before any merge, special tokens are cut out and the rest is cut into pre-tokens.
# Without pre-tokens "dog." "dog!" "dog?" would each become a token. The price: no token spans two
# words, and since a space belongs to the word after it, "hello" and " hello" differ.

SPLIT_PATTERNS = {
    # contractions; letters; digits; the rest; white space, its last character left to the next word
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # contractions in any case; digits at most by three; line ends stay with what is before them
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

def split_words(text: str, pattern="gpt2") -> list:
    """"it's 42 dogs" -> ["it", "'s", " 42", " dogs"]. pattern=None: all of it is one pre-token."""
    return [text] if pattern is None else regex.findall(SPLIT_PATTERNS[pattern], text)

def special_splitter(special_tokens):
    """A pattern whose split() gives [text, special, text, ..., text]: the odd ones are special.

    Longest first: an alternation takes the first that fits, so that "<a>" before "<a><b>" would
    hide the longer one."""
    for special in special_tokens:
        if len(special.encode()) < 2:
            raise UserError(f"special tokens: got {special!r}; wanted two bytes or more, as single "
                            'bytes are tokens already; use something like "<|name|>"')
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + ("|".join(map(regex.escape, longest_first)) or "(?!)") + ")")

def cut_points(path, size: int, special_tokens=(EOT,), end=None) -> list:
    """Byte offsets [0, ..., end], at least `size` apart, where cutting a file changes no id.

    In front of a special token; or, where none is near, between an ASCII letter or digit and a
    space or line end: no pattern above reaches across that. Both are ends of characters in UTF-8.
    Never where a special token lies across. Where nothing fits, the chunk grows."""
    end = min(os.path.getsize(path), sys.maxsize if end is None else end)
    specials = [special.encode() for special in special_tokens]
    special = b"|".join(map(regex.escape, specials)) or b"(?!)"
    either = special + rb"|(?<=[A-Za-z0-9])[ \n]"
    cuts = [0]
    if end <= size:
        return [0, end]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        def fits(i):   # in this slice a special token can only begin before i and end after it
            return not any(s in data[max(0, i - len(s) + 1):i + len(s) - 1] for s in specials)

        def first(pattern, start, stop):
            matches = regex.finditer(pattern, data, pos=start, endpos=stop)
            return next((match.start() for match in matches if fits(match.start())), None)

        while (start := cuts[-1] + size) < end:
            cut = first(special, start, min(start + NEAR, end)) or first(either, start, end)
            if cut is None:
                break
            cuts.append(cut)
    return cuts + [end]

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
# heap. What is left is the splitting, which all cores share.

COMPLEMENT = bytes(255 - byte for byte in range(256))

def descending(token: bytes) -> str:
    """A key that sorts the greatest bytes first, for a heap gives its smallest entry first. Since a
    string sorts before its extensions, and must come after them here, a mark above all ends it."""
    return token.translate(COMPLEMENT).decode("latin-1") + "\u0100"

def merge_word(words, i: int, freq: int, pair: str, new: str, counts, where) -> set:
    """Merges a pair in words[i]. Only pairs with its neighbours change count. -> the new pairs."""
    a, b = pair
    parts = words[i].split(pair)   # "xabyab" -> "x", "y", "": the pair is wherever two parts meet
    words[i] = new.join(parts)
    changes = []
    for k, (left, right) in enumerate(zip(parts, parts[1:])):
        if left:
            changes.append((left[-1] + a, left[-1] + new))
        elif k > 0:                # nothing between two of them: abab -> new new
            changes.append((b + a, new + new))
        if right:
            changes.append((b + right[0], new + right[0]))
    for before, after in changes:
        counts[before] -= freq
        counts[after] += freq
        where[after].append(i)
    return {after for _, after in changes}

def learn_merges(word_counts: dict, n_merges: int) -> list:
    """{pre-token bytes: how often} -> the merges, n_merges of them or fewer.

    A word is a str whose characters are ids, chr(i) for id i: bytes read as latin-1 are the word
    before any merge, a pair is a str of two, and split and join merge it in C, left to right."""
    words, freqs = [word.decode("latin-1") for word in word_counts], list(word_counts.values())
    counts, where = Counter(), defaultdict(list)   # of pairs: how often; indices of words
    for i, word in enumerate(words):
        for a, b in zip(word, word[1:]):
            counts[a + b] += freqs[i]
            where[a + b].append(i)
    tokens, keys, merges = list(BYTES), [descending(token) for token in BYTES], []

    def entry(pair):
        return -counts[pair], keys[ord(pair[0])], keys[ord(pair[1])], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    with tqdm(total=n_merges, desc="merges", unit="merge", disable=None) as bar:
        while heap and len(merges) < n_merges:
            count, *_, pair = heapq.heappop(heap)
            if -count != counts[pair]:
                # Other merges took some of its places since. No count but a new pair's ever grows,
                # so entries are upper bounds: with its true count this one comes up again in time
                if counts[pair]:
                    heapq.heappush(heap, entry(pair))
                continue
            left, right, new = tokens[ord(pair[0])], tokens[ord(pair[1])], chr(len(tokens))
            merges.append((left, right))
            tokens.append(left + right)
            keys.append(descending(left + right))
            fresh = set()
            for i in set(where.pop(pair)):
                fresh |= merge_word(words, i, freqs[i], pair, new, counts, where)
            del counts[pair]
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
    [(bytes, bytes), ...], vocab_size - 256 - len(special_tokens) of them, or fewer when nothing is
    left to merge. `workers` processes (default: one a core) split the text; any number of them
    gives the same result."""
    special_tokens = list(dict.fromkeys(special_tokens))
    n_merges = vocab_size - 256 - len(special_tokens)
    if not 0 <= n_merges < sys.maxunicode - 256:
        raise UserError(f"vocab_size: got {vocab_size}; wanted {vocab_size - n_merges} (bytes and "
                        f"special tokens) to {sys.maxunicode}; try 4096")
    if pattern not in SPLIT_PATTERNS:
        raise UserError(f"pattern: got {pattern!r}; wanted one of {', '.join(SPLIT_PATTERNS)}")
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        got = "an empty file" if os.path.isfile(path) else "no file"
        raise UserError(f"cannot train on {path}: got {got}; wanted a text file; check the path")
    cuts = cut_points(path, CHUNK, special_tokens, max_bytes)
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

class BaseTokenizer:
    """What both kinds share. vocab {id: bytes}; special_tokens {text: id}; eot, the id of EOT or
    None. A special token that vocab lacks gets the next free id."""
    def __init__(self, vocab: dict, special_tokens=()):
        self.splitter = special_splitter(special_tokens)
        self.ids = {token: i for i, token in vocab.items()}
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

    @property
    def hash(self) -> str:
        """sha256 of the file that `save` writes, which holds all that decides ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path):
        with atomic_write(tokenizer_file(path), "w") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path):
        return load_tokenizer(path)

class Tokenizer(BaseTokenizer):
    """Byte-level BPE. Without merges, Tokenizer(dict(enumerate(BYTES)), []), a token is a byte."""
    def __init__(self, vocab: dict, merges, special_tokens=(), pattern: str = "gpt2"):
        super().__init__(vocab, special_tokens)
        self.merges, self.pattern, self.cache = list(merges), pattern, {}
        missing = [byte for byte in BYTES if byte not in self.ids]
        if missing:
            raise ValueError(f"{len(missing)} bytes have no token, {missing[0]} first")
        self.byte_ids = [self.ids[byte] for byte in BYTES]
        self.ranks = {(self.ids[a], self.ids[b]): rank for rank, (a, b) in enumerate(self.merges)}
        self.merged = [self.ids[a + b] for a, b in self.merges]   # rank -> id

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
                if len(word) < 100:
                    cache[word] = known
            ids += known
        return ids

    def encode_bytes(self, text: str) -> list:
        # half a surrogate pair, which a str may hold but no file, is three bytes and not an error
        return [self.byte_ids[byte] for byte in text.encode("utf-8", "surrogatepass")]

    def merge_word(self, ids: list) -> list:
        """Merges the pair of lowest rank, the leftmost of equals, until none is left.

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

    def to_json(self) -> str:
        text = {token: "".join(BYTE_CHARS[byte] for byte in token) for token in self.ids}
        text |= {special.encode(): special for special in self.special_tokens}
        vocab = {text[token]: i for token, i in self.ids.items()}
        assert len(vocab) == len(self.ids), "a special token is spelled like another token"
        split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS[self.pattern]},
                 "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        return tokenizer_json(vocab, self.special_tokens, level, pre_tokenizer={
            "type": "Sequence", "pretokenizers": [split, level]}, merges=[
            f"{text[left]} {text[right]}" for left, right in self.merges])

    @classmethod
    def from_json(cls, spec: dict):
        vocab = {i: from_chars(text) for text, i in spec["model"]["vocab"].items()
                 if text not in spec["special_tokens"]}
        vocab |= {i: text.encode() for text, i in spec["special_tokens"].items()}
        pairs = [p.split(" ") if isinstance(p, str) else p for p in spec["model"]["merges"]]
        names = {pattern: name for name, pattern in SPLIT_PATTERNS.items()}
        name = names[spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]]
        merges = [(from_chars(left), from_chars(right)) for left, right in pairs]
        return cls(vocab, merges, list(spec["special_tokens"]), name)

class CharTokenizer(BaseTokenizer):
    """A token a character, of those given; all others become UNK. Small demonstrations use it."""
    def __init__(self, chars, special_tokens=(EOT,)):
        chars = [char.encode() for char in sorted(set(chars))]
        super().__init__(dict(enumerate(chars)), list(dict.fromkeys([*special_tokens, UNK])))
        self.char_ids = {token.decode(): i for token, i in self.ids.items()}

    def encode_ordinary(self, text: str) -> list:
        unknown = self.special_tokens[UNK]
        return [self.char_ids.get(char, unknown) for char in text]

    def to_json(self) -> str:
        return tokenizer_json(self.char_ids, self.special_tokens, unk=UNK, decoder={"type": "Fuse"})

    @classmethod
    def from_json(cls, spec: dict):
        chars = [char for char in spec["model"]["vocab"] if char not in spec["special_tokens"]]
        return cls(chars, list(spec["special_tokens"]))

# -----------------------------------------------------------------------------
# tokenizer.json, the format of Hugging Face's tokenizers, which reads ours and gives the same ids.
# JSON holds text, not bytes, so tokens are written by GPT-2's map: the 188 bytes that print stand
# for themselves, the other 68 for the code points from 256 up. A space becomes U+0120.

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_CHARS |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}

def from_chars(text: str) -> bytes:
    return bytes(CHAR_BYTES[char] for char in text)

def tokenizer_json(vocab, special_tokens, decoder, merges=(), pre_tokenizer=None, unk=None) -> str:
    """The text of a tokenizer.json: equal tokenizers give equal text."""
    added = [{"id": i, "content": special, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for special, i in special_tokens.items()]
    spec = {"version": "1.0", "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre_tokenizer, "decoder": decoder,
            "model": {"type": "BPE", "unk_token": unk, "vocab": vocab, "merges": merges}}
    return json.dumps(spec, ensure_ascii=False, indent=1) + "\n"

def tokenizer_file(path) -> Path:
    """`path`, or tokenizer.json in it if it is a folder (what has no .json at its end is one)."""
    path = Path(path)
    return path if path.is_file() or path.suffix == ".json" else path / "tokenizer.json"

def load_tokenizer(path):
    """A tokenizer.json, or the one in a folder -> the Tokenizer or CharTokenizer that it holds."""
    path = tokenizer_file(path)
    try:
        spec = json.loads(path.read_bytes())
        model = spec["model"]
        if model["type"] != "BPE" or spec["normalizer"] or model.get("ignore_merges"):
            raise ValueError("it is not BPE alone")
        spec["special_tokens"] = {added["content"]: added["id"] for added in spec["added_tokens"]}
        return (Tokenizer if spec["pre_tokenizer"] else CharTokenizer).from_json(spec)
    except OSError as error:
        raise UserError(f"no tokenizer at {path}: got {error.strerror}; wanted a tokenizer.json "
                        "or its folder; make one: python bpe.py train FILE") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"damaged or foreign {path}: got {type(error).__name__}: {error}; wanted a "
                        "file that `save` wrote; make one: python bpe.py train FILE") from None

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
    words = Words(text)
    for name, tokenizer in ("characters", CodePoints()), ("bytes", Utf8()), ("words", words):
        ids = tokenizer.encode(text)
        print(f"   {name:10s} {len(ids):2d} tokens  ratio {ratio(tokenizer, text):.3f}  "
              f"of {tokenizer.vocab_size:9,d} ids: {ids[:5]} ...")
    print(f"   words, on another text: {words.decode(words.encode('Hello, world!'))!r}")

    text = "the cat in the hat"
    ids, names = list(text.encode()), {token: i for i, token in enumerate(BYTES)}
    print(f"\n2. BPE without pre-tokens, by hand. {text!r} is {len(ids)} ids:\n   {ids}")
    _, merges = train_reference(text, 256 + 3, [], pattern=None)
    for new, (left, right) in enumerate(merges, 256):
        names[left + right] = new
        ids = merge(ids, (names[left], names[right]), new)
        print(f"   ({names[left]}, {names[right]}) -> {new}, {left + right}: {len(ids)} ids")
        print(f"   {ids}")

def show_trained():
    """BPE trained on half the standard library, tried on a fifth of the other half."""
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
    print("\n4. What that does: a space makes another word, numbers are cut from the left, rare\n"
          "   scripts cost most, a special token stays whole")
    for text in ("hello", " hello", "1234567890", "1234567", "\u4f60\u597d", f"the end{EOT}self"):
        ids = tokenizer.encode(text)
        print(f"   {text!r}: {len(ids)} tokens, {pieces(tokenizer, ids)}")
    print(f"   {len(valid):,d} characters encoded and decoded come back unchanged:",
          tokenizer.decode(tokenizer.encode(valid)) == valid)

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenizers. Without a command: the lesson.")
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("train", help="learn BPE from a text file")
    sub.add_argument("path", help="text file in UTF-8, its documents separated by " + EOT)
    sub.add_argument("--vocab_size", type=int, default=4096,
                     help="tokens, bytes and special ones included (default %(default)s)")
    sub.add_argument("--out", default="tokenizer.json",
                     help="file, or folder for it, to write (default %(default)s)")
    where = "tokenizer.json, or a folder that holds one"
    sub = commands.add_parser("encode", help="print the ids of a text, and its pieces")
    sub.add_argument("tokenizer", help=where)
    sub.add_argument("text", help="what to encode; special tokens in it count as such")
    sub = commands.add_parser("decode", help="print the text of some ids")
    sub.add_argument("tokenizer", help=where)
    sub.add_argument("ids", type=int, nargs="*", help="ids, with spaces between them")
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
