"""bpe.py - text into integers and back: characters, bytes, words; then byte-pair encoding.

THE IDEA
    A language model sees integers. Which ones decides how long a text is, how large the embedding
    table is, and which texts it cannot read. Characters give a huge vocabulary of mostly rare
    symbols; bytes a tiny one and long sequences; words short sequences and a hole, the unknown
    word. Byte-pair encoding (BPE) begins with the 256 bytes, so that nothing is unknown, and gives
    the most frequent pair of neighbours an id of its own, again and again: a common word ends as
    one token, a rare one as several. Before that the text is cut into pre-tokens, roughly a word
    and the space before it; no pair reaches across their edges.
THE MATHS
    ratio       bytes of a text in UTF-8 / its tokens: 1 for bytes; the higher, the shorter
    train       repeat: a, b = argmax over pairs of neighbours of (count, (bytes of a, bytes of b));
                add the token ab. So of pairs of equal count, the greater bytes win
    encode      in each pre-token, merge the pair that was learned first, until none is left
    decode      join the bytes of the tokens, then read them as UTF-8. decode(encode(s)) == s
THE COSTS
    train       splitting is linear in the text and uses all cores; the merge loop works on distinct
                pre-tokens, of which an index of pairs says what a merge changes
    encode      a look-up per pre-token, since words repeat; n log n for a new one of n bytes
CONTENTS  tools for everyone / pre-tokens / training / Tokenizer / files / show, lesson, bench
NOT HERE  compiled loops (tiktoken, Hugging Face tokenizers); unigram models (SentencePiece); models
          of raw bytes (ByT5, MegaByte, BLT), though a Tokenizer without merges is what they need
RUN       python bpe.py    # the lesson; last line "... come back unchanged: True"
          python bpe.py show "Hello, world" --html page.html
REFERENCES
    Gage 1994, A New Algorithm for Data Compression; Sennrich et al. 2016 (1508.07909) for words;
    Radford et al. 2019, GPT-2: for bytes, with its pattern and map of bytes; Llama 3 (2407.21783),
    Qwen2 (2407.10671), tiktoken: the other patterns; Stanford CS336: how ties are broken
EXERCISE  Empty `learn_merges` and write it again:
          `pytest test_all.py -k equals_the_reference` says when it is right.
"""
import argparse, base64, codecs, errno, functools, hashlib, heapq, html, json, multiprocessing, os
import re, signal, sys, sysconfig, tempfile, threading, time, unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import contextmanager, suppress
from itertools import chain, cycle
from operator import add, itemgetter
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

EOT, UNK = "<|endoftext|>", "<|unk|>"   # between documents; for what a vocabulary lacks
BYTES = [bytes([i]) for i in range(256)]   # the first 256 tokens of everything we train
BLOCK = 1 << 19         # characters that are split and encoded at once [our choice]
CACHE_SIZE = 1 << 18    # pre-tokens whose ids are remembered [our choice]

# --- Tools for everyone ------------------------------------------------------
# Tools for everyone, since this file imports none of the others: to tell a user what is wrong, to
# write a file, to use all cores.
class UserError(SystemExit):
    """A user's mistake: UserError("what, got, wanted, do"). Prints that once; exit status 2."""
    code = 2   # were it the message, the interpreter would print that again and exit with 1
    def __init__(self, message: str):
        super().__init__(message)
        print(message, file=sys.stderr)
    def __reduce__(self):   # on its way from a worker, which printed it: no second __init__
        return UserError.__new__, (UserError, str(self))
DISK_ERRORS = {getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO "
               "ENOTDIR ENOENT EISDIR EEXIST ENAMETOOLONG".split()}
@contextmanager
def atomic_write(path, mode: str = "wb"):
    """Yields a file that becomes `path` when the block ends well; else `path` stays as it was.
    Without fsync, a power cut could leave the new name on an empty file."""
    path = Path(path)
    temp = path.parent / f".{path.name}.{os.getpid()}.tmp"   # os.replace needs one file system
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():   # a folder, or a device such as /dev/null
            raise OSError(errno.EISDIR, "it is there and not a file")
        with open(temp, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        ours = error.filename is None or Path(str(error.filename)) in (path, temp, *path.parents)
        if error.errno not in DISK_ERRORS or not ours: raise   # of other files, or of a network
        raise UserError(f"cannot write {path}: {error.strerror}; wanted a writable place with room "
                        "in it; give another path or free some space") from error
    finally:   # after Ctrl-C too
        with suppress(OSError): temp.unlink()
def run_job(function, *job): return function(*run_job.shared, *job)
def start_worker(*shared):   # a worker whose parent was killed would wait for a job for ever
    run_job.shared = shared
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()
def parallel_map(function, jobs, workers=None, shared=()):
    """Yields function(*shared, *job) for each job, in order, from `workers` processes (default: one
    a core; one is this process), which get `shared` once. Takes jobs as it needs them."""
    workers = workers or os.cpu_count() or 1
    if workers < 2 or isinstance(jobs, list) and len(jobs) < 2:   # to start others takes longer
        yield from (function(*shared, *job) for job in jobs)
        return
    pool, waiting = ProcessPoolExecutor(workers, initializer=start_worker, initargs=shared), deque()
    try:
        for job in jobs:
            # A process that starts while Ctrl-C is blocked never sees it: the parent alone answers
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            waiting.append(pool.submit(run_job, function, *job))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            if len(waiting) > 2 * workers: yield waiting.popleft().result()
        while waiting: yield waiting.popleft().result()
    except process.BrokenProcessPool:   # when memory is out, the system ends a large process
        raise UserError(f"one of {workers} workers died, perhaps of memory; use fewer") from None
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        pool.shutdown(cancel_futures=True)

# --- Special tokens, pre-tokens ----------------------------------------------
# Special tokens are cut out of a text first, and the rest is cut into pre-tokens.
# Without pre-tokens "dog." "dog!" "dog?" would each become a token. The price: no token spans two
# words, and since a space belongs to the word after it, "hello" and " hello" differ.
CONTRACTION, UPPER, LOWER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{Lu}\p{Lt}", r"\p{Ll}"
LLAMA3 = CONTRACTION + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = r"[^\r\n\p{L}\p{N}]?[%s\p{Lm}\p{Lo}\p{M}]%s[%s\p{Lm}\p{Lo}\p{M}]%s" + CONTRACTION + "?|"
SPLIT_PATTERNS = {
    # contractions; letters; digits; the rest; white space, its last character left to the next word
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": LLAMA3,                       # up to three digits; line ends go with what is before
    "qwen2": LLAMA3.replace("{1,3}", ""),   # each digit alone; Qwen3 too
    # white space at the end of a text stays together: \s++ gives nothing back
    "cl100k": LLAMA3.replace(r"|\s*[\r\n]+", r"|\s++(?!\S)|\s*[\r\n]+"),
    # a capital after a small letter begins a word, and contractions stay with theirs
    "o200k": O200K % (UPPER, "*", LOWER, "+") + O200K % (UPPER, "+", LOWER, "*")
             + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "chars": r"[\s\S]",
}
def split_words(text: str, pattern="gpt2") -> list:
    """"it's 42 dogs" -> ["it", "'s", " 42", " dogs"]. pattern=None: all of it is one pre-token."""
    if pattern is None: return [text]
    if pattern not in SPLIT_PATTERNS:
        raise UserError(f"pattern: got {pattern!r}; wanted one of {', '.join(SPLIT_PATTERNS)}")
    return regex.findall(SPLIT_PATTERNS[pattern], text)
def special_splitter(special_tokens):
    """A pattern whose split() gives [text, special, text, ..., text]: the odd ones are special."""
    for special in special_tokens:
        if len(special.encode()) < 2:
            raise UserError(f"special tokens: got {special!r}; wanted two bytes; try '<|a|>'")
    longest_first = sorted(special_tokens, key=len, reverse=True)   # or "<a>" hides "<a><b>"
    return regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")

# --- Training, as one would say it -------------------------------------------
# Training as one would say it: count the pairs, merge the most frequent one, again. Bytes read as
# latin-1 are the ids before any merge, a pair is a str of two, and str.replace merges it.
def latin(word: str) -> str: return word.encode().decode("latin-1")
def neighbours(word: str): return map(add, word, word[1:])   # "abc" -> "ab", "bc"
def vocab_of(merges, special_tokens) -> dict:
    return dict(enumerate([*BYTES, *map(b"".join, merges), *map(str.encode, special_tokens)]))
def train_reference(text: str, vocab_size: int, special_tokens, pattern="gpt2"):
    """BPE in twenty lines. -> vocab {id: bytes}, merges [(bytes, bytes), ...], as from `train`."""
    tokens, merges, specials = list(BYTES), [], dict.fromkeys(special_tokens)
    words = [latin(word) for part in special_splitter(specials).split(text)[0::2]
             for word in split_words(part, pattern)]
    while len(tokens) < vocab_size - len(specials):
        counts = Counter(pair for word in words for pair in neighbours(word))
        if not counts: break
        # Of equals the greatest pair of byte strings. subtle: (b" a", b"nd") > (b" ", b"d"), which
        # is neither the order of the joined strings nor that of the ids, nor first come
        pair = max(counts, key=lambda pair: (counts[pair], [tokens[ord(char)] for char in pair]))
        words = [word.replace(pair, chr(len(tokens))) for word in words]
        merges.append(tuple(tokens[ord(char)] for char in pair))
        tokens.append(b"".join(merges[-1]))
    return vocab_of(merges, specials), merges

# --- Training, fast ----------------------------------------------------------
# Training, fast. In the order of what each idea saves: equal pre-tokens are counted once; an index
# says which words hold a pair, and only their counts change; the most frequent pair comes from a
# heap. What is left is the splitting, which all cores share: for that, a file is cut into blocks.
# Between a letter or digit and white space or one of these signs: no pattern's match holds both
CUT = r"(?<=[^\W_])(?=[\s,.;:!?\u3001\u3002\uff0c])"
def blocks(texts, special_tokens):
    """Joins texts and cuts them anew, about BLOCK characters each, where it changes no id: at a CUT
    that is not in what may become a special token (`heads` are the beginnings of these)."""
    heads = [s[:cut.start()] for s in special_tokens for cut in re.finditer(CUT, s)]
    next_cut = re.compile(CUT + "".join(f"(?<!{re.escape(head)})" for head in heads)).search
    held, length, wanted = [], 0, BLOCK   # a list: to add to a long text again and again copies it
    for text in texts:
        held.append(text)
        length += len(text)
        if length < wanted: continue
        text, start = "".join(held), 0
        while cut := next_cut(text, start + BLOCK):
            yield text[start:cut.start()]
            start = cut.start()
        held, length = [text[start:]], len(text) - start
        wanted = max(BLOCK, 2 * length)   # with nowhere to cut: look again at twice that
    yield "".join(held)
def read_blocks(path, special_tokens, end=None):
    """Yields the blocks of a file, or of its first `end` bytes; what is not UTF-8 reads U+FFFD."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    try:
        total = os.path.getsize(path)
        size = total if end is None else min(end, total)
        if size == 0: raise OSError(errno.EINVAL, "an empty file")
        with open(path, "rb") as raw, tqdm.wrapattr(
                raw, "read", size, desc="read", disable=None) as file:
            reads = iter(lambda: file.read(min(BLOCK, size - file.tell())), b"")
            texts = (decode(data, final=file.tell() == total) for data in reads)
            yield from blocks(texts, special_tokens)
    except OSError as error:
        raise UserError(f"cannot read {path}: got {error.strerror}; wanted a text file") from None

def learn_merges(word_counts: dict, n_merges: int) -> list:
    """{pre-token: how often} -> the merges, n_merges of them or fewer."""
    words, freqs = [*map(latin, word_counts)], [*word_counts.values()]
    counts, where = defaultdict(int), defaultdict(list)   # of pairs: how often; indices of words
    for i, word in enumerate(words):
        for pair in neighbours(word):
            counts[pair] += freqs[i]
            where[pair].append(i)
    # A heap gives its least entry first: keys are the least where the greatest bytes are. Of b"b",
    # b"ab", b"a" they are 157, END; 158, 157, END; 158, END: a token is before those it begins with
    tokens, keys, merges = list(BYTES), [chr(255 - i) + "\u0100" for i in range(256)], []
    heap, floor = [], max(counts.values(), default=0)
    def push(pairs):   # only what occurs `floor` times or more: most pairs never come that far
        for pair in pairs:
            if counts[pair] >= floor:
                left, right = map(ord, pair)
                heapq.heappush(heap, (-counts[pair], keys[left] + keys[right], pair))

    bar = tqdm(total=n_merges, desc="merges", unit="merge", disable=None)
    while len(merges) < n_merges and floor > 0:
        if not heap:
            floor //= 2
            push(counts if floor else ())
            continue
        count, _, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            # Other merges took some of its places since. No count but a new pair's ever grows, so
            # entries are upper bounds: with its true count this one comes up again in time
            push([pair])
            continue
        (left, right), new, fresh = pair, chr(len(tokens)), set()
        merges.append((tokens[ord(left)], tokens[ord(right)]))
        tokens.append(b"".join(merges[-1]))
        keys.append(keys[ord(left)][:-1] + keys[ord(right)])
        for i in where.pop(pair):
            parts = words[i].split(pair)
            words[i] = new.join(parts)
            for k in range(1, len(parts)):   # x left right y -> x new y: two pairs go, two come
                x, y = parts[k - 1][-1:], parts[k][:1]   # with nothing between two: right left
                changes = [((x or right) + left, (x or new) + new)] if x or k > 1 else []
                for old, now in changes + [(right + y, new + y)] * len(y):
                    counts[old] -= freqs[i]
                    counts[now] += freqs[i]
                    where[now].append(i)
                    fresh.add(now)
        del counts[pair]
        push(fresh)
        bar.update()
    bar.close()
    return merges

def count_words(special_tokens, pattern: str, text: str) -> Counter:
    parts = special_splitter(special_tokens).split(text)[0::2]
    return Counter(chain.from_iterable(split_words(part, pattern) for part in parts))
def train(path, vocab_size: int, special_tokens=(EOT,), pattern: str = "gpt2", workers=None,
          max_bytes=None):
    """Learns BPE from a text file, or from its first max_bytes -> vocab {id: bytes}: the 256 bytes,
    the merges in order, the special tokens; and the merges [(bytes, bytes), ...], which are fewer
    than vocab_size asks for when nothing is left. The number of `workers` changes no result."""
    specials, total = list(dict.fromkeys(special_tokens)), Counter()
    special_splitter(specials), split_words("", pattern)   # bad ones fail now, here
    n_merges = vocab_size - 256 - len(specials)
    if not 0 <= n_merges < sys.maxunicode - 256:
        raise UserError(f"vocab_size: got {vocab_size}; wanted {vocab_size - n_merges} or more")
    texts = zip(read_blocks(path, specials, max_bytes))
    for counts in parallel_map(count_words, texts, workers, (specials, pattern)):
        total.update(counts)
    merges = learn_merges(total, n_merges)
    if len(merges) < n_merges: print(f"{path} ran out of pairs after {len(merges)} merges")
    return vocab_of(merges, specials), merges

# --- What models use ---------------------------------------------------------
# What models use. Encoding replays the merges in the order of learning, which is neither the
# longest match nor one pass over the text: counts of the training text decide how a word is cut.
# A str is a sequence of code points (ord, chr: 1,114,112 are possible), a file one of bytes. UTF-8
# maps one to the other, 1 to 4 bytes a code point. One byte of several means nothing: join first.
class Memory(dict):   # the tokens of words, since words repeat; not of long ones, which hardly do
    def __missing__(self, word: str) -> str:
        tokens = self.encode_word(word)
        if len(self) >= CACHE_SIZE: self.clear()
        if len(word) < 100: self[word] = tokens
        return tokens

class Tokenizer:
    """vocab {id: bytes}; special_tokens {text: id}; eot, the id of EOT or None. A special token
    that vocab lacks gets the next free id. Without merges, a token is a byte.
    normalizer: "NFC", as Qwen has, or None. ignore_merges: a pre-token that is a token becomes it,
    whatever the merges say, as in Llama 3 and tiktoken. unk: a special token; then tokens are whole
    pre-tokens, characters or words, and it stands for all others, which decode cannot undo."""
    def __init__(self, vocab: dict, merges=(), special_tokens=(), pattern: str = "gpt2",
                 normalizer=None, ignore_merges: bool = False, unk=None):
        split_words("", pattern)   # an unknown one fails here, not when it is used
        self.pattern, self.normalizer = pattern, normalizer
        self.ignore_merges, self.unk = ignore_merges, unk
        self.splitter = special_splitter(special_tokens)
        self.ids = {token: i for i, token in sorted(vocab.items())}
        for special in special_tokens:
            self.ids.setdefault(special.encode(), max(self.ids.values(), default=-1) + 1)
        self.vocab = {i: token for token, i in self.ids.items()}
        self.vocab_size = max(self.vocab) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.special_tokens = {special: self.ids[special.encode()] for special in special_tokens}
        self.eot = self.special_tokens.get(EOT)
        self.byte_chars = [] if unk else [chr(self.ids[byte]) for byte in BYTES]
        self.merges = [(left, right) for left, right in merges]
        self.joined = [chr(self.ids[left + right]) for left, right in self.merges]   # by rank
        self.ranks = {}   # {pair: rank}
        for rank, (left, right) in enumerate(self.merges):
            self.ranks.setdefault(chr(self.ids[left]) + chr(self.ids[right]), rank)
        self.words = Memory()
        self.words.encode_word = self.encode_word
    # Below, tokens are a str with the character chr(i) for id i: so str and dict do the work, in C
    def merge_bytes(self, data: bytes) -> str:
        """Merges the pair that was learned first, the leftmost of equals, until none is left:
        [t, h, e] -> [th, -, e] -> [the, -, -], where `after` and `before` lead over the gaps. To
        search all of the word for each merge is shorter, but it may be a megabyte of one letter."""
        ranks, n, tokens = self.ranks, len(data), [self.byte_chars[byte] for byte in data]
        heap = [ranks[pair] * n + i for i, pair in enumerate(neighbours(tokens)) if pair in ranks]
        heapq.heapify(heap)
        after, before = [*range(1, n + 1)], [*range(-1, n)]
        while heap:
            rank, i = divmod(heapq.heappop(heap), n)
            j = after[i]
            if j == n or ranks.get(tokens[i] + tokens[j]) != rank:
                continue   # another merge took one half of this pair
            tokens[i], tokens[j] = self.joined[rank], ""
            h, k = before[i], after[j]   # the neighbours, if any: two new pairs
            after[i], before[k] = k, i
            if h >= 0 and (pair := tokens[h] + tokens[i]) in ranks:
                heapq.heappush(heap, ranks[pair] * n + h)
            if k < n and (pair := tokens[i] + tokens[k]) in ranks:
                heapq.heappush(heap, ranks[pair] * n + i)
        return "".join(tokens)
    def encode_word(self, word: str) -> str:
        # a str may hold half of a UTF-16 pair, as no file can: three bytes then, and no error
        data = word.encode("utf-8", "surrogatepass")
        whole = data in self.ids and word not in self.special_tokens
        if whole and (self.ignore_merges or self.unk): return chr(self.ids[data])
        return chr(self.special_tokens[self.unk]) if self.unk else self.merge_bytes(data)
    def encode_block(self, special: str, text: str):
        """-> an array of ids. All words between two special tokens are one look-up."""
        assert special in ("allow", "refuse", "text"), special
        parts = [text] if special == "text" else self.splitter.split(text)
        if special == "refuse" and len(parts) > 1:
            raise UserError(f"encode: got {parts[1]!r}; wanted no special token; cut it out")
        parts[1::2] = [chr(self.special_tokens[part]) for part in parts[1::2]]
        for k, part in enumerate(parts[0::2]):
            if self.normalizer: part = unicodedata.normalize(self.normalizer, part)
            words = split_words(part, self.pattern)
            parts[2 * k] = "".join(itemgetter(*words)(self.words)) if words else ""
        return np.frombuffer("".join(parts).encode("utf-32-le", "surrogatepass"), np.uint32)
    def encode_iter(self, texts, special: str = "allow"):
        """Yields the ids of all texts joined, such as the lines of a file, in constant memory.
        Special tokens become their id; an error with special "refuse", text with "text"."""
        return chain.from_iterable(self.encode_block(special, text).tolist()
                                   for text in blocks(texts, self.special_tokens))
    def encode(self, text: str, special: str = "allow") -> list:
        return list(self.encode_iter([text], special))
    def encode_file(self, path, out, workers=None, special: str = "allow") -> int:
        """A text file -> a file of ids of type `dtype`, in memory that does not grow. -> how many.
        `workers` processes (default: one a core): their number changes no id."""
        texts = zip(read_blocks(path, self.special_tokens))
        with atomic_write(out) as file:
            for ids in parallel_map(Tokenizer.encode_block, texts, workers, (self, special)):
                file.write(ids.astype(self.dtype))
            return file.tell() // self.dtype.itemsize
    def decode_bytes(self, ids) -> bytes:
        try: return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise UserError(f"decode: got id {error}; wanted 0 to {self.vocab_size - 1}") from None
    def decode(self, ids) -> str:
        """ids -> text. What a model samples need not be UTF-8: the unreadable shows as U+FFFD."""
        data = self.decode_bytes(ids)
        try: return data.decode("utf-8", "surrogatepass")   # as encode_word made it
        except UnicodeDecodeError: return data.decode(errors="replace")
    @functools.cached_property
    def hash(self) -> str:   # sha256 of tokenizer.json, which holds all that decides ids
        return hashlib.sha256(self.to_text().encode()).hexdigest()
    def save(self, path):
        with atomic_write(tokenizer_file(path), "w") as file: file.write(self.to_text(path))
    def to_text(self, path="tokenizer.json") -> str:   # what a file of that name would hold
        return to_ranks(self) if Path(path).suffix == ".tiktoken" else to_json(self)

class CharTokenizer(Tokenizer):
    """A token a character of those given (or a pre-token of `pattern`: say, a word)."""
    def __init__(self, chars, special_tokens=(EOT,), pattern: str = "chars"):
        specials = list(dict.fromkeys([*special_tokens, UNK]))
        vocab = dict(enumerate(char.encode() for char in sorted(set(chars) - set(specials))))
        super().__init__(vocab, (), specials, pattern, unk=UNK)
def ratio(tokenizer, text: str) -> float:   # bytes per token
    return len(text.encode("utf-8", "surrogatepass")) / max(1, len(tokenizer.encode(text)))

# --- Files, ours and others' -------------------------------------------------
# Files, ours and others'. JSON holds text, so tokens are spelled by GPT-2's map of bytes: the 188
# that print stand for themselves, the other 68 for the code points from 256 up, a space for U+0120.
BYTE_CHARS = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
for b in range(256): BYTE_CHARS.setdefault(b, chr(256 + len(BYTE_CHARS) - 188))
CHAR_BYTES = {char: b for b, char in BYTE_CHARS.items()}
def spell(token: bytes) -> str: return "".join(BYTE_CHARS[b] for b in token)
def unspell(text: str) -> bytes: return bytes(CHAR_BYTES[char] for char in text)
LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
RULES = {name: [dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False),
                LEVEL] for name, pattern in SPLIT_PATTERNS.items()}   # as tokenizer.json says it
def to_json(tokenizer) -> str:
    """Hugging Face's format, and its `tokenizers` gives the same ids, unless the tokens are
    words. It holds all that decides ids."""
    unk, specials, ids = tokenizer.unk, tokenizer.special_tokens, tokenizer.ids
    spelled = {token: token.decode() if unk else spell(token) for token in ids}
    spelled |= {special.encode(): special for special in specials}
    times, made = Counter(spelled.values()), {*map(b"".join, tokenizer.merges)}
    for special in specials:
        if times[special] > 1 or special.encode() in made:
            raise UserError(f"special tokens: got {special!r}, which tokenizer.json would mix "
                            'up with another token; wanted none like it; try "<|name|>"')
    added = [dict(id=i, content=special, single_word=False, lstrip=False, rstrip=False,
                  normalized=False, special=True)
             for special, i in sorted(specials.items(), key=itemgetter(1))]
    model = {"type": "BPE", "unk_token": unk, "ignore_merges": tokenizer.ignore_merges,
             "vocab": {spelled[token]: i for token, i in ids.items()},
             "merges": [f"{spelled[left]} {spelled[right]}" for left, right in tokenizer.merges]}
    pre = None if unk else {"type": "Sequence", "pretokenizers": RULES[tokenizer.pattern]}
    return json.dumps({
        "version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": pre,
        "normalizer": tokenizer.normalizer and {"type": tokenizer.normalizer},
        "decoder": {"type": "Fuse"} if unk else LEVEL}, ensure_ascii=False, indent=1) + "\n"
# With these a tokenizer.json asks for what we do not do: our ids would not be its own
REFUSED = """truncation padding dropout continuing_subword_prefix end_of_word_suffix byte_fallback
             lstrip rstrip single_word""".split()
def from_json(spec: dict):
    """Characters, as we write them, or byte-level BPE. A post_processor, which puts special tokens
    around a text, is left out."""
    model, added, pre = spec["model"], spec["added_tokens"], spec["pre_tokenizer"]
    *split, level = pre.get("pretokenizers", [pre]) if pre else [LEVEL]
    split.append({"use_regex": True, **level, "trim_offsets": True})
    pattern = "gpt2" if split == [LEVEL | {"use_regex": True}] else "chars" if not pre else next(
        (name for name in RULES if split == RULES[name]), None)   # the first: GPT-2's own file
    normalizer = spec.get("normalizer") or {"type": None}
    unknown = [key for part in (spec, model, *added) for key in REFUSED if part.get(key)]
    unknown += ["pre_tokenizer"] * (not pattern) + ["type"] * (model["type"] != "BPE")
    unknown += ["normalizer"] * (normalizer not in ({"type": None}, {"type": "NFC"}))
    after = spec.get("post_processor") or {"processors": []}
    unknown += ["post_processor" for part in after.get("processors", [after])
                if part["type"] not in ("ByteLevel", "TemplateProcessing")]
    if unknown: raise ValueError(f"unknown {', '.join(unknown)}")
    specials = {token["content"]: token["id"] for token in added}
    vocab = {i: unspell(text) if pre and text not in specials else text.encode()
             for text, i in (model["vocab"] | specials).items()}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return Tokenizer(vocab, [map(unspell, pair) for pair in merges], specials, pattern,
                     normalizer["type"], model.get("ignore_merges", False),
                     None if pre else model["unk_token"])
def from_gpt2(path):
    """GPT-2's merges.txt, and vocab.json beside it: tokens that no merge makes are special."""
    vocab = json.loads(path.with_name("vocab.json").read_bytes())
    lines = path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = {*CHAR_BYTES, *(line.replace(" ", "") for line in merges)}
    added = [{"content": text, "id": i} for text, i in vocab.items() if text not in made]
    return from_json({"model": {"type": "BPE", "vocab": vocab, "merges": merges},
                      "added_tokens": added, "pre_tokenizer": LEVEL | {"use_regex": True}})
# What tiktoken's files do not say: the pattern and the special tokens
RANK_FILES = {
    "gpt2": ("gpt2", {EOT: 50256}), "r50k_base": ("gpt2", {EOT: 50256}),
    "cl100k_base": ("cl100k", {EOT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                               "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k_base": ("o200k", {EOT: 199999, "<|endofprompt|>": 200018})}
def to_ranks(tokenizer) -> str:
    """tiktoken's file: a line for each token that is not special: base64, and its id, its rank."""
    vocab, specials = tokenizer.vocab, tokenizer.special_tokens.values()
    plain = {i: vocab[i] for i in sorted(vocab.keys() - specials)}
    if [token for token in plain.values() if len(token) > 1] != [*map(b"".join, tokenizer.merges)]:
        raise UserError("ranks: got ids in another order than merges; write a tokenizer.json")
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in plain.items())
def from_ranks(path, pattern, special_tokens):
    """A rank says which merge is first, but not of which two tokens: those that are left of a token
    when all merges before it are done."""
    lines = [line.split() for line in path.read_bytes().splitlines()]
    vocab = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    if not len(lines) == len(vocab) == len({*vocab.values()}): raise ValueError("a line twice")
    usual, specials = RANK_FILES.get(path.stem, (pattern, {EOT: max(vocab) + 1}))
    if not usual: raise ValueError(f"a name that is none of {[*RANK_FILES]}, and no pattern")
    specials = specials if special_tokens is None else special_tokens
    partial, merges = Tokenizer(vocab), []
    for i, token in sorted(vocab.items()):
        parts = partial.merge_bytes(token)
        if len(parts) == 2:   # else it is a byte, or found as a whole word (ignore_merges)
            partial.ranks[parts] = len(merges)
            partial.joined.append(chr(i))
            merges.append([vocab[ord(part)] for part in parts])
    vocab |= {i: text.encode() for text, i in specials.items()}
    return Tokenizer(vocab, merges, specials, pattern or usual, ignore_merges=True)
def tokenizer_file(path) -> Path:
    """`path`, or tokenizer.json in it if it is a folder (what has no suffix is one)."""
    path = Path(path)
    return path if path.is_file() or path.suffix and not path.is_dir() else path / "tokenizer.json"
def load_tokenizer(path, pattern=None, special_tokens=None):
    """A file, or a folder of it: tokenizer.json (ours or Hugging Face's), GPT-2's vocab.json and
    merges.txt, or tiktoken's ranks, which say neither `pattern`, a row of SPLIT_PATTERNS, nor
    special_tokens, {text: id}."""
    path = tokenizer_file(path)
    if path.name == "vocab.json" or not path.exists() and path.with_name("merges.txt").exists():
        path = path.with_name("merges.txt")
    try:
        if path.suffix == ".tiktoken": return from_ranks(path, pattern, special_tokens)
        if path.suffix == ".txt": return from_gpt2(path)
        return from_json(json.loads(path.read_bytes()))
    except (OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"no tokenizer in {path}: got {type(error).__name__}: {error}; wanted a "
                        "tokenizer.json of byte-level BPE, GPT-2's vocab.json and merges.txt, or a "
                        ".tiktoken file; make one: python bpe.py train FILE") from None

# --- A page to look at, the lesson, and a stopwatch --------------------------
COLOURS = "fbb4ae b3cde3 ccebc5 decbe4 fed9a6 ffffcc".split()   # Brewer's Pastel1
PAGE = """<!doctype html><meta charset="utf-8"><title>Tokens</title><style>
body { font: 16px/2 monospace; margin: 2em; white-space: pre-wrap } h2 { font-size: 1em; margin: 0 }
i { font-style: normal } i:hover { outline: 2px solid }</style>"""
def show(tokenizers: dict, text: str) -> str:
    """Prints a text in tokens with their ids, one tokenizer below the other. -> an HTML page of the
    same, where hovering a token tells its id, its bytes, and its rank, which merge it is."""
    page, colour = PAGE, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for name, tokenizer in tokenizers.items():
        ids, rows = tokenizer.encode(text), ([], [])
        title = f"{name}: {len(ids)} tokens, ratio {ratio(tokenizer, text):.3f}"
        page += f"\n<h2>{html.escape(title)}</h2>"
        ranks = {b"".join(pair): f"rank {n}" for n, pair in enumerate(tokenizer.merges)}
        ranks |= {special.encode(): "special" for special in tokenizer.special_tokens}
        for i, paint in zip(ids, cycle(COLOURS)):
            token = tokenizer.vocab[i]   # what does not print, or is not UTF-8: \n, \xf0
            word = "".join(char if char.isprintable() else ascii(char)[1:-1]
                           for char in token.decode(errors="backslashreplace"))
            about = f"id {i} | bytes {token.hex(' ')} | {ranks.get(token, 'not merged')}"
            page += (f'<i style="background: #{paint}" title="{about}">{html.escape(word)}</i>'
                     + "\n" * token.endswith(b"\n"))
            cell = "\x1b[30;48;2;%d;%d;%dm{}\x1b[0m" % (*bytes.fromhex(paint),) if colour else "{}"
            for row, what in zip(rows, (word, i)): row.append(cell.format(what))
        print(title, ("" if colour else "|").join(rows[0]), " ".join(rows[1]), sep="\n   ")
    return page
def library(folder) -> str:   # a text that every machine has: half of Python's library
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[1::2]
    Path(folder, "text.txt").write_bytes(EOT.encode().join(file.read_bytes() for file in files))
    return f"{folder}/text.txt"
def lesson(path):
    text, cat = "Hello, \U0001F30D! \u4f60\u597d!", "the cat in the hat"   # a globe, Chinese
    words = CharTokenizer(split_words(text), [], "gpt2")
    print("1. A text in characters, in words, and in bytes, of which a character has 1 to 4")
    show({"characters": CharTokenizer(text, []), "words": words,
          "bytes": Tokenizer(vocab_of([], []))}, text)
    print("   words, on another text:", words.decode(words.encode("Hello, world!")))
    print("\n2. BPE without pre-tokens, by hand:", cat)
    for n in range(4):
        vocab, merges = train_reference(cat, 256 + n, [], pattern=None)
        print("  ", *merges[-1:], *map(ord, Tokenizer(vocab, merges).merge_bytes(cat.encode())))
    print("\n3. BPE of Python's library: its first merges, and the ratio on another file")
    merges, text = train(path, 4096)[1], Path(argparse.__file__).read_text(encoding="utf-8")
    print("  ", *(repr(b"".join(pair))[1:] for pair in merges[:12]))
    for n in (0, 255, 767, 1791, 3839):   # a smaller vocabulary has the first of the merges
        tokenizer = Tokenizer(vocab_of(merges[:n], [EOT]), merges[:n], [EOT])
        print(f"   vocabulary {n + 257:4d}: ratio {ratio(tokenizer, text):.3f}")
    print("\n4. What do a space in front, the end numbers are cut from, another script change?")
    for some in "hello", " hello", "1234567890", "1234567", "\u4f60\u597d", f"the end{EOT}self":
        show({repr(some): tokenizer}, some)
    print(f"{len(text):,d} characters, encoded and decoded, come back unchanged:",
          tokenizer.decode(tokenizer.encode(text)) == text)
def bench(path, vocab_size: int, folder):   # cold: before the words of the text were met
    def timed(what, function, *args):
        start = time.perf_counter()
        result, seconds = function(*args), time.perf_counter() - start
        print(f"{what:25s}{seconds:8.2f} s{os.path.getsize(path) / 1e6 / seconds:8.2f} MB/s")
        return result
    learned = timed(f"train {vocab_size} tokens", train, path, vocab_size)
    timed("encode_file, all cores", Tokenizer(*learned).encode_file, path, f"{folder}/ids")
    tokenizer, text = Tokenizer(*learned), Path(path).read_text(encoding="utf-8", errors="replace")
    for what in "encode, cold", "encode, warm": timed(what, tokenizer.encode, text)
KINDS = "tokenizer.json, GPT-2's vocab.json, a .tiktoken file of a known name, or their folder"
OPTIONS = {
    "path": dict(nargs="?", help="text file in UTF-8, its documents separated by " + EOT
                 + " (default: some of Python's library)"),
    "tokenizer": dict(help=KINDS),
    "text": dict(help="a text; for `encode --out`, the path of a text file"),
    "ids": dict(type=int, nargs="*", help="ids, with spaces between them"),
    "--vocab_size": dict(type=int, default=4096, help="tokens to learn, with bytes (default 4096)"),
    "--pattern": dict(default="gpt2", choices=SPLIT_PATTERNS, help="(default gpt2)"),
    "--out": dict(help="file or folder for a tokenizer (default tokenizer.json; what ends in "
                  ".tiktoken has only ranks); file for ids, each of two bytes, or of four"),
    "--tokenizer": dict(nargs="+", default=[], help=f"one or more, each {KINDS} (default: bytes, "
                        "and BPE learned now from Python's library)"),
    "--html": dict(metavar="FILE", help="write a page that tells more of each token")}
COMMANDS = {"train": ("learn BPE from a text file", "path --vocab_size --pattern --out"),
            "encode": ("print the ids of a text, or write those of a file", "tokenizer text --out"),
            "decode": ("print the text of some ids", "tokenizer ids"),
            "show": ("print a text in coloured tokens, with their ids", "text --tokenizer --html"),
            "bench": ("time training and encoding", "path --vocab_size")}
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokenizers. Without a command: the lesson.")
    commands = parser.add_subparsers(dest="command")
    for name, (about, options) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        for option in options.split(): command.add_argument(option, **OPTIONS[option])
    return parser

def run(args, folder):
    if args.command == "train":
        print("bpe.py:", vars(args))
        out = tokenizer_file(args.out or "tokenizer.json")
        with atomic_write(out, "w") as file:   # if it can't be written, that is said now
            learned = train(args.path or library(folder), args.vocab_size, pattern=args.pattern)
            file.write(Tokenizer(*learned, [EOT], args.pattern).to_text(out))
        print(f"{len(learned[0])} tokens in {out}")
    elif args.command == "encode":
        tokenizer = load_tokenizer(args.tokenizer)
        if args.out:
            n = tokenizer.encode_file(args.text, args.out)
            return print(f"{n:,} ids of type {tokenizer.dtype} in {args.out}")
        ids = tokenizer.encode(args.text)
        print(*ids)
        print(*(repr(tokenizer.vocab[i])[1:] for i in ids))   # bytes as Python writes them
    elif args.command == "decode":
        print(load_tokenizer(args.tokenizer).decode_bytes(args.ids).decode(errors="replace"))
    elif args.command == "show":
        chosen = {name: load_tokenizer(name) for name in args.tokenizer} or {
            "bytes": Tokenizer(vocab_of([], [])),
            "BPE of Python's library": Tokenizer(*train(library(folder), 4096), [EOT])}
        page = show(chosen, args.text)
        if args.html:
            with atomic_write(args.html, "w") as file: file.write(page)
    elif args.command == "bench": bench(args.path or library(folder), args.vocab_size, folder)
    else: lesson(library(folder))

def main(args):
    try:
        with tempfile.TemporaryDirectory() as folder: run(args, folder)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; nothing was written") from None
if __name__ == "__main__": main(build_parser().parse_args())
