"""test_all.py - what is true of this codebase, as sentences that run: pytest test_all.py -k WORDS

Every test is a property held against an oracle that does not share its code: integers worked by
hand, plain torch or numpy written in the test, autograd, float64, torch's own implementations, a
conservation law. References are held against oracles and fast versions against references.
Tests run in a temporary directory, without network and without a GPU, in minutes on two cores.
"""
import ast, contextlib, dataclasses, errno, gzip, hashlib, html, http.server, importlib, itertools
import json, math, os, random, re, shlex, shutil, signal, subprocess, sys, threading, time, types
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
import torch.nn.functional as F

import bpe, data, kernels, model, optim, sample, train
from bpe import EOT, UserError

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings

# -----------------------------------------------------------------------------
# The house: budgets, imports, configuration, README.md

IMPORTS = {"bpe": "", "kernels": "", "data": "bpe", "model": "bpe kernels", "optim": "bpe kernels",
           "sample": "model bpe kernels", "train": "model optim data bpe sample kernels",
           "align": "train model optim data sample bpe kernels"}   # script: whom it may import
IMPORTS |= dict.fromkeys(["parallel", "scaling"], "train model optim data bpe kernels")
PACKAGES = {"torch", "triton", "numpy", "regex", "tqdm", "pytest"}
OPTIONAL = {"matplotlib", "transformers"}  # used if installed, in the one function that wants them

README, ME = (HERE / "README.md").read_text(), Path(__file__).read_text()
SCRIPTS = {file.stem: file.read_text() for file in HERE.glob("*.py") if file.stem in IMPORTS}

def test_every_file_keeps_its_line_budget_and_the_readme_tells_its_length():
    lines = {name: text.count("\n") for name, text in (SCRIPTS | {"test_all": ME}).items()}
    stated = dict(re.findall(r"^\| (\w+)\.py \|.*\| (\d+) \|$", README, re.M))
    assert all(abs(int(stated[n]) - lines[n]) <= 0.05 * lines[n] for n in stated | lines), lines
    assert lines.pop("test_all") <= 1400 and README.count("\n") <= 250
    assert max(lines.values()) <= 700 and sum(lines.values()) <= 6400, lines
    assert all(len(line) <= 100 for text in (ME, *SCRIPTS.values()) for line in text.splitlines())

def test_imports_follow_the_graph_and_the_six_packages():
    for name, text in SCRIPTS.items():
        for node in ast.walk(ast.parse(text)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in (m.split(".")[0] for m in modules):
                if top in IMPORTS: assert top in IMPORTS[name].split(), f"{name} imports {top}"
                elif top in OPTIONAL: assert node.col_offset > 0, f"{name} needs {top}"
                else: assert top in PACKAGES | set(sys.stdlib_module_names), f"{name} imports {top}"

def test_every_field_of_a_configuration_is_read_somewhere():
    holders = {"cfg", "c", "self", "how", "now", "progress"}  # what configurations are called
    read = {node.attr for text in SCRIPTS.values() for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and getattr(node.value, "id", getattr(node.value, "attr", "")) in holders}
    for config in (model.ModelConfig, train.TrainConfig, sample.Sampling, train.Progress):
        others = {"preset", *sample.SAMPLERS}  # read from the flags; by the name of their sampler
        assert {f.name for f in dataclasses.fields(config)} - read <= others

def test_every_command_of_readme_and_docstrings_parses_and_every_exercise_names_tests():
    docs = [ast.get_docstring(ast.parse(text)) for text in SCRIPTS.values()]
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    commands = re.findall(r"python (\w+)\.py([^\n#`]*)", "\n".join(blocks + docs))
    assert len(commands) > 20
    for name, flags in commands:
        flags = [w for w in shlex.split(flags) if w not in ("...", "&&")]
        importlib.import_module(name).build_parser().parse_args(flags)
    tests = re.findall(r"^def (test_\w+)", ME, re.M)
    for doc in docs:
        (words,) = re.findall(r'-k "?([\w ]+?)"?`', doc.split("EXERCISE")[1])
        for word in words.split(" or "): assert any(word in test for test in tests), word

# -----------------------------------------------------------------------------
# bpe.py

def random_text(rng, n):   # few letters, so that pairs repeat; much white space; any code points
    some = list("aaAb  \n\t1'.,\r\u00a0\u00e9e\u0301\u4f60\U0001F30D" * 6) + ["\ufdd0"]
    some += [chr(rng.choice([0, 0xE000]) + rng.randrange(0xD800)) for _ in range(9)]
    return "".join(rng.choices(some, k=n))

def replay(tok, text):   # encoding by definition: each merge in the order of learning, everywhere
    words = [[bytes([b]) for b in w.encode()] for w in bpe.split_words(text, tok.pattern)]
    for (left, right), word in itertools.product(tok.merges, words):
        for i in range(len(word) if left in word and right in word else 0):
            if word[i:i + 2] == [left, right]: word[i:i + 2] = [left + right]
    return [tok.ids[token] for word in words for token in word]

@pytest.fixture(scope="module")
def trained(tmp_path_factory):   # a file of 0.1 MB of Python, and the tokenizer that comes of it
    path = tmp_path_factory.mktemp("bpe") / "text.txt"
    path.write_text(EOT.join(Path(m.__file__).read_text() for m in (random, json, subprocess)))
    return path, bpe.Tokenizer(*bpe.train(path, 700), [EOT])

def test_the_obvious_tokenizers_have_the_ratios_of_the_lecture():
    text, long = "Hello, \U0001F30D! \u4f60\u597d!", "I'll say supercalifragilisticexpialidocious!"
    char, word = bpe.CharTokenizer(text), bpe.CharTokenizer(bpe.split_words(text), [EOT], "gpt2")
    for tok, n in (char, 13), (word, 5), (bpe.Tokenizer(dict(enumerate(bpe.BYTES)), []), 20):
        assert len(tok.encode(text)) == n and tok.decode(tok.encode(text)) == text
    assert bpe.ratio(word, long) == 8.8 and word.decode(word.encode("Hello, w")) == "Hello,<|unk|>"

@pytest.mark.parametrize("pattern, words", [   # a bar is where the text is cut
    ("gpt2", "it|'s| 42| dogs|  | a|\t|b|'|Se|\u0301|x|!?|\n "),
    ("llama3", "it|'S| |123|4|.\n\n|\ta|  | b|$c|\u0301e| ;\n|//|x| \n| "),
    ("qwen2", "a|1|2|3|\n\n| b| \n| "), ("cl100k", "a| \n| b|'LL| |123|4|$c| \n "),
    ("o200k", "camel|Case's| HTML|.Pine\u0301e'LL|'t| |123|4| ;\n//|x| \n| ")])
def test_a_text_is_cut_into_the_words_worked_by_hand(pattern, words):
    assert bpe.split_words(words.replace("|", ""), pattern) == words.split("|")

@pytest.mark.parametrize("text, pattern, merges", [("the cat in the hat", None, "t-h th-e the- "),
    ("low\n" * 5 + "lower\n" * 2 + "widest\n" * 3 + "newest\n" * 6, "gpt2",   # Sennrich et al. 2016
     "s-t e-st o-w l-ow w-est n-e ne-west w-i wi-d wid-est low-e lowe-r"),
    # At last (" ", "d"), seen first and the greater if joined, and (" a", "nd") have 2: " a" > " "
    ("nd\nnd\nnd\nnd a a a a a d d and and", "gpt2", " -a n-d  a-nd")])
def test_training_learns_the_merges_worked_by_hand(tmp_path, text, pattern, merges):
    (tmp_path / "t").write_text(text)
    args = 256 + merges.count("-"), [], pattern
    for _, got in bpe.train_reference(text, *args), bpe.train(tmp_path / "t", *args):
        assert " ".join(f"{a.decode()}-{b.decode()}" for a, b in got) == merges

def test_train_equals_the_reference_serial_and_parallel(tmp_path, trained, monkeypatch):
    for seed in range(60):
        rng, some = random.Random(seed), [[], [EOT], ["ab", "aba", "ab"], ["<a b>", EOT]][seed % 4]
        text = random_text(rng, rng.randrange(1, 300)) + "".join(rng.choices([*some, "a"], k=9))
        (tmp_path / "t").write_text(text, newline="")
        args = 256 + len(some) + rng.randrange(40), some
        assert bpe.train(tmp_path / "t", *args) == bpe.train_reference(text, *args)
    monkeypatch.setattr(bpe, "CHUNK", 10_000)   # makes a dozen jobs of the file
    for end, workers in ((None, 1), (None, 2), (20_000, 2)):   # the file is ASCII
        want = bpe.train_reference(trained[0].read_text()[:end], 280, [EOT])
        assert bpe.train(trained[0], 280, workers=workers, max_bytes=end) == want

@pytest.mark.parametrize("pattern", bpe.SPLIT_PATTERNS)
def test_encode_replays_merges_and_no_cut_changes_an_id(tmp_path, monkeypatch, pattern):
    for name, small in ("CHUNK", 20), ("CACHE_SIZE", 10): monkeypatch.setattr(bpe, name, small)
    latin, path = [EOT, *"ab| x| y|'s|y\n|\u4f60 |\u00e9|!\n|1| |<b>|, ".split("|")], tmp_path / "t"
    for seed, specials in enumerate([["<a>", "<a><b>", "x y, b", "yx"], [], [EOT], []] * 5):
        rng, last = random.Random(seed), {(1 << 16) - seed % 2: b"the last id"}
        some = [[*latin, random_text(rng, 9)], ["\u4f60\n", "\u3002\n", "\u0663  "]][seed % 4 // 3]
        path.write_text(text := "".join(rng.choices(specials + some, k=300)), newline="")
        vocab, merges = bpe.train_reference(text, 400, [], None)   # merges that would cross edges
        tok = bpe.Tokenizer(vocab | last, merges, specials, pattern)
        longest_first = "|".join(map(re.escape, sorted(specials)[::-1])) or "(?!)"
        want = [i for part in re.split(f"({longest_first})", text) for i in
                ([tok.special_tokens[part]] if part in specials else replay(tok, part))]
        monkeypatch.setattr(bpe, "BLOCK", 10 ** (1 + seed % 3))
        chunks = [text[i:i + 1 + seed] for i in range(0, len(text), 1 + seed)]   # cut anywhere
        assert [*tok.encode_iter(chunks)] == tok.encode(text) == want and len(tok.words) <= 10
        assert tok.encode_file(path, tmp_path / "ids", 1 + (seed > 18)) == len(want)
        assert np.fromfile(tmp_path / "ids", [np.uint32, np.uint16][seed % 2]).tolist() == want
        cuts, raw = data.cut_points(path, 20, specials), text.encode()
        parts = [tok.encode(raw[a:b].decode()) for a, b in zip(cuts, cuts[1:])]
        assert sum(parts, []) == want and cuts == sorted({*cuts}) and len(cuts) > 5
        start = "".join(block for block, in bpe.read_blocks(path, specials, 50 + seed))
        assert text.startswith(start) and 46 + seed < len(start.encode()) <= 50 + seed
    assert next(tok.encode_iter(iter(lambda: "a b", None))) == 97   # of a text that never ends
    assert max(map(len, bpe.blocks(["a, b c d "] * 9999, [], 100))) <= 200   # memory is bounded

def test_decode_undoes_encode_for_every_code_point_and_a_million_random_ones(trained):
    anything, tok = [*map(chr, range(0x110000))], trained[1]   # and lone halves of UTF-16 pairs
    for text in ("".join(anything), "".join(random.Random(0).choices(anything, k=1_000_000)), "",
            EOT[1:] + EOT[:-1] + f" {EOT} {EOT}{EOT}\n", "\ud83d\ude00", " " * 400_000):  # in 1 s
        assert tok.decode(tok.encode(text)) == text
    assert tok.decode([0xE3, 65]) == "\ufffdA" and tok.decode([195, 169]) == "\u00e9"

def test_special_tokens_are_whole_longest_first_and_unlike_others(tmp_path, trained, capfd):
    tok = bpe.Tokenizer(trained[1].vocab, trained[1].merges, [EOT, "<|a|>", "<|a|><|b|>"])
    assert tok.eot == 699 and tok.encode(f"<|a|><|b|><|a|>{EOT}") == [701, 700, 699]
    assert tok.encode(EOT, "text") == replay(tok, EOT)
    with pytest.raises(UserError, match="no special token"): tok.encode("a" + EOT, "refuse")
    for word in "\u0120s", " self":   # " s" as GPT-2 spells it; a token already
        with pytest.raises(UserError): bpe.Tokenizer(tok.vocab, tok.merges, [word]).save(tmp_path)
    with pytest.raises(UserError): [*bpe.parallel_map(bpe.special_splitter, zip([[EOT], ["x"]]), 2)]
    assert capfd.readouterr().err.count("got 'x'") == 1   # a worker's mistake is not printed twice

SPELLED = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}   # by GPT-2
for b in range(256): SPELLED.setdefault(b, chr(256 + len(SPELLED) - 188))

def files(tok):   # a tokenizer in every format: name, content
    spell = lambda token: "".join(SPELLED[b] for b in token)
    merges = "\n".join(["#version: 0.2", *(f"{spell(a)} {spell(b)}" for a, b in tok.merges)])
    return {"vocab.json": json.dumps({spell(token): i for i, token in tok.vocab.items()}),
            "merges.txt": merges, "t.json": tok.to_text(), "a.tiktoken": tok.to_text("a.tiktoken")}

def test_every_format_gives_the_same_ids_and_the_hash_is_that_of_the_file(tmp_path, trained):
    file, text = tmp_path / "tokenizer.json", random_text(random.Random(0), 500) + EOT + "def hello"
    for tok, names in (bpe.CharTokenizer("hello \u00e9\n", [EOT, "\u00e9"]), []), (bpe.Tokenizer(
            dict(enumerate(bpe.BYTES)), [], [EOT], "llama3"), []), (trained[1], files(trained[1])):
        tok.save(tmp_path)
        assert tok.hash == hashlib.sha256(file.read_bytes()).hexdigest()
        for name in names: (tmp_path / name).write_text(names[name], encoding="utf-8")
        for name in "", *names:
            got = bpe.load_tokenizer(tmp_path / name, "gpt2", {EOT: 699})
            assert got.vocab == tok.vocab and got.special_tokens == tok.special_tokens
            assert got.encode(text) == tok.encode(text)
    with open(file := tmp_path / "a.tiktoken", "a") as f: f.write("Y2Fi 800")   # no merge makes cab
    assert bpe.load_tokenizer(file, "gpt2", {}).encode("cab cab") == [800, *tok.encode(" cab")]

@pytest.mark.parametrize("kind, normalizer, merges, text, ids", [   # as their files spell them
    ("llama3", None, [["a", "b"], ["3", "4"]], "cab cab1234<s>34",   # "cab" is a token, " cab" not
     [258, 220, 66, 256, 16, 17, 18, 19, 999, 257]),                 # 123 and 4 are apart
    ("qwen2", {"type": "NFC"}, [["\u00c3", "\u00a9"], ["1", "2"]], "e\u0301\u00e9<s>12",
     [256, 256, 999, 16, 17])])
def test_a_tokenizer_json_of_others_gives_ids_worked_by_hand(kind, normalizer, merges, text, ids):
    rule = {"pattern": {"Regex": bpe.SPLIT_PATTERNS[kind]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    vocab = dict(zip([*SPELLED.values(), *map("".join, merges), "cab"], range(259)))
    assert bpe.from_spec({
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", **rule}, level]},
        "added_tokens": [{"id": 999, "content": "<s>", "lstrip": False}], "normalizer": normalizer,
        "post_processor": {"type": "TemplateProcessing", "single": []},
        "model": {"type": "BPE", "dropout": None, "ignore_merges": kind == "llama3",
                  "merges": merges, "vocab": vocab}}).encode(text) == ids

@pytest.mark.parametrize("name, old, new", [*(("t.json", *pair) for pair in [
    ('"BPE"', '"BPE", "dropout": 0.1'), ('lstrip": false', 'lstrip": true'), ("BPE", "WordPiece"),
    ('zer": null', 'zer": {"type": "Lowercase"}'), ("Split", "Digits"), ("Isolated", "Removed"),
    ('"version"', '"post_processor": {"type": "X"}, "version"'), ("N}+|", "N}|"), ('"s e', '"s 12'),
    ('"!": 33', '"!": 34')]), *(("a.tiktoken", "\nIQ== 33", new) for new in (
        "\nI== 33", "\n33", "", "\nIQ== 3", "\nIQ== 33\nIQ== 900")),   # at last a token twice
    ("merges.txt", "\ns e", "\ns 12"), ("merges.txt", "\ns e", "\nse")])
def test_a_file_that_is_damaged_or_asks_for_more_is_named(tmp_path, trained, name, old, new):
    for file, content in files(trained[1]).items():   # as they are, the test above loads them
        (tmp_path / file).write_text(content.replace(old, new) if file == name else content)
    assert old in files(trained[1])[name]
    with pytest.raises(UserError, match=name): bpe.load_tokenizer(tmp_path / name, "gpt2")

def test_the_page_of_show_tells_id_bytes_and_rank_and_needs_no_other_file(tmp_path, trained):
    (_, tok), file, text = trained, str(tmp_path / "t.json"), f"<b>self</b> &amp; \u4f60{EOT}"
    tok.save(file)
    bpe.main(bpe.build_parser().parse_args(["show", text, "--html", file + "l", "--token", file]))
    shown = re.findall(r'<i [^<>]*"([^"]*)">([^<]*)</i>', page := Path(file + "l").read_text())
    ranks = ["not merged"] * 256 + [f"rank {i}" for i in range(443)] + ["special"]
    assert [about for about, _ in shown] == [
        f"id {i} | bytes {tok.vocab[i].hex(' ')} | {ranks[i]}" for i in tok.encode(text)]
    assert "".join(t for _, t in shown) == html.escape(text).replace("\u4f60", r"\xe4\xbd\xa0")
    assert not re.search("http|<script|<b>|<link|<img", page)

def test_atomic_write_leaves_the_old_file_when_the_writer_raises(tmp_path):
    (tmp_path / "f").write_text("old")
    full, theirs = OSError(errno.ENOSPC, "full"), OSError(errno.EACCES, "no", "input")
    for error, seen in (SystemExit(), SystemExit), (full, UserError), (theirs, OSError):
        with pytest.raises(seen), bpe.atomic_write(tmp_path / "f") as file:
            file.write(b"new")
            raise error
        assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_ctrl_c_ends_training_quietly_and_no_worker_outlives_a_kill(tmp_path, number, status):
    (tmp_path / "big").write_text("".join(f"word{i} " for i in range(2_000_000)))
    command = [sys.executable, bpe.__file__, "train", "big", "--out", "t.json"]
    child = subprocess.Popen(command, stdout=-1, stderr=-1, cwd=tmp_path, start_new_session=True)
    child.stdout.readline()
    time.sleep(1)
    (os.killpg if status == 1 else os.kill)(child.pid, number)   # Ctrl-C goes to workers too
    error = child.communicate(timeout=30)[1]   # returns when no process holds the pipe any more
    assert b"Traceback" not in error and child.returncode == status
    assert status < 0 or os.listdir(tmp_path) == ["big"]

# -----------------------------------------------------------------------------
# data.py

data.WAIT_S = 0.001  # between two attempts to connect
BODY = np.random.default_rng(0).bytes(300_000)

@contextlib.contextmanager
def server(files, drop=0, ranges=True, claim=0):
    """Serves {name: bytes} on loopback -> (url, list of the Range of each GET). The first `drop`
    replies break off half-way; `claim` bytes more are promised than there are."""
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None
        def do_GET(self):
            body, wanted = files.get(self.path.rpartition("/")[2]), self.headers["Range"]
            asked.append(wanted)
            if body is None: return self.send_error(404)
            tag = f'"{sum(body)}"'
            part = wanted and ranges and self.headers["If-Range"] in (None, tag)
            body = body[int(wanted[6:-1]) if part else 0:]
            self.send_response((206 if body else 416) if part else 200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", len(body) and len(body) + claim)
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if len(asked) <= drop else body)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()

def read(corpus):
    return [corpus.tokenizer.decode(data.open_tokens(f)) for f in (corpus.train, corpus.valid)]

@pytest.mark.parametrize("there, same, how, asked_for", [   # bytes there; of this version, or none
    (0, None, dict(drop=2), [None, "bytes=150000-", "bytes=225000-"]),    # goes on, twice
    (0, None, dict(drop=1, ranges=False), [None, "bytes=150000-"]),       # 200: from the start
    (1000, True, {}, ["bytes=1000-"]), (300_000, True, {}, []),           # of an earlier run; whole
    (1000, False, {}, ["bytes=1000-"]), (1000, None, {}, [None])])        # it changed; unknown
def test_a_download_ends_whole_and_asks_for_what_it_lacks(tmp_path, there, same, how, asked_for):
    file, part = tmp_path / "f", tmp_path / "f.part"
    with server({"f": BODY}, **how) as (url, asked):
        note = dict(url=f"{url}/f", size=300_000, version=f'"{sum(BODY) if same else 0}"')
        if there: part.write_bytes((BODY if same else b"?" * 1000)[:there])
        if same is not None: data.write_note(file, note)
        data.fetch(f"{url}/f", file)
    assert file.read_bytes() == BODY and not part.exists() and asked == asked_for

@pytest.mark.parametrize("says, files, at, place", [
    ("416", {"f": BODY}, "", "d/f"), ("404", {}, "", "d/f"),    # 416: it is shorter than it says
    ("refused", {}, "http://127.0.0.1:1", "d/f"), ("cannot write", {"f": BODY}, "", "/dev/null/f")])
def test_a_failed_download_leaves_no_file_and_names_its_place(tmp_path, says, files, at, place):
    with server(files, claim=7) as (url, asked), pytest.raises(UserError, match=says) as error:
        data.fetch(url := f"{at or url}/f", tmp_path / place)
    assert str(tmp_path / place) in str(error.value) and not (tmp_path / place).exists()
    assert (url in str(error.value)) == (says != "cannot write") and len(asked) < 3

def test_a_packed_source_comes_from_a_mirror_and_its_text_is_enough_afterwards(tmp_path, capsys):
    prepare = partial(data.prepare, "owt", "byte", data_dir=tmp_path, workers=1)
    train = gzip.compress(b"One story.<|endoftext|>\nAnother one.<|endoftext|>" * 9)
    files = {"owt_train.txt.gz": train, "owt_valid.txt.gz": gzip.compress(b"Third. " * 9)}
    with server(files, drop=1) as (url, _): info = prepare(mirror=url + "/").info
    assert info["train"]["documents"] == 18 and info["train"]["bytes"] == 9 * 23
    (tmp_path / "owt" / "owt_train.txt.gz").unlink()
    assert prepare().info == info and f"came from {url}" in capsys.readouterr().out
    for name in files: (tmp_path / "owt" / name).write_bytes(train[:-9])    # by hand; cut short
    with pytest.raises(UserError, match="owt_train.txt.gz"): prepare()

def test_one_file_is_cut_as_nanogpt_cuts_it_again_after_an_edit_but_not_else(tmp_path, monkeypatch):
    (file := tmp_path / "shakespeare" / "input.txt").parent.mkdir()         # by hand: no network
    file.write_text(text := "".join(chr(32 + i * i % 90) for i in range(5003)))
    prepare = partial(data.prepare, "shakespeare", data_dir=tmp_path, workers=1)
    first = prepare("char")
    assert read(first) == [EOT + text[:4502] + EOT, EOT + text[4502:] + EOT]    # int(0.9 * 5003)
    assert first.tokenizer.vocab_size == len(set(text)) + 2                 # EOT and the unknown
    file.write_text("ä " * 95)                  # of 285 bytes nine tenths end within an ä
    assert read(prepare("char")) == [EOT + "ä " * 85 + "ä" + EOT, EOT + " " + "ä " * 9 + EOT]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    assert first.train.stat() == prepare("char").train.stat()               # it is not made again
    with pytest.raises(UserError, match="too little disk"): prepare("byte")     # 4 for each of 285

@pytest.mark.parametrize("tokenizer", data.TOKENIZERS)
def test_tokens_of_a_folder_give_its_texts_back_and_counts_are_exact(tmp_path, capsys, tokenizer):
    texts = ["Text: né 你好 \ufffd\r\n\n" * (i + 1) for i in range(9)]
    files = {f"{i}.md": text.encode() for i, text in enumerate(texts)} | {
        "bad": b"Text: \xff \xe4\xbd\n\xe4", "binary": b"MZ\0", "empty": b"", ".hidden": b"x"}
    for name, content in files.items(): (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")                # to open it would wait for ever
    for _ in range(2):                          # its own output, in the same folder, is no input
        corpus, found = data.prepare(tmp_path, tokenizer, 300, tmp_path, workers=1), []
        assert re.search("of 10 files, 3 empty.* 3 invalid UTF-8", capsys.readouterr().out)
        for text, note in zip(read(corpus), corpus.info.values()):
            start, *documents, end = text.split(EOT)
            assert start == end == "" and note["documents"] == len(documents) > 0
            assert note["tokens"] == len(corpus.tokenizer.encode(text))
            assert note["bytes"] == len("".join(documents).encode())
            found += documents
        assert sorted(found) == sorted([*texts, "Text: \ufffd \ufffd\n\ufffd"])
        os.utime(tmp_path / "bad")              # stale, so that the second round looks again

def test_a_killed_run_leaves_parts_and_the_next_run_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4000)
    text, read_chunk, chunks = tmp_path / "a.txt", data.read_chunk, []
    text.write_text("".join(f"word{i % 77} and {i}\n" for i in range(20000)))
    prepare = partial(data.prepare, text, "bpe", 300)
    whole = prepare(tmp_path / "whole", workers=2).train.read_bytes()
    def watched(*chunk):
        chunks.append(chunk)
        if len(chunks) == 3: raise KeyboardInterrupt        # before the third is encoded
        return read_chunk(*chunk)
    monkeypatch.setattr(data, "read_chunk", watched)
    with pytest.raises(KeyboardInterrupt): prepare(tmp_path / "killed", workers=1)
    (folder,) = tmp_path.glob("killed/*")
    assert not [*folder.glob("*.bin")]
    gone, alive = (folder / f".x.{pid}.tmp" for pid in (1 << 23, os.getpid()))  # no pid is so large
    gone.touch(), alive.touch()                 # what kill -9 leaves; and of another run
    assert prepare(tmp_path / "killed", workers=1).train.read_bytes() == whole
    assert len(chunks) == len({*chunks}) + 1 > 9            # only the third a second time
    assert alive.exists() and not gone.exists() and not [*folder.glob("*-parts-*")]

@pytest.mark.parametrize("command, says", [("bpe train NO", "No such file"),   # capitals: files
    ("bpe encode CUT hi", "no tok"), ("bpe train EMPTY", "empty"), ("data get TINY", "got 4 bytes"),
    ("bpe train T --out /dev/null", "cannot write"), ("bpe train T --vocab_size 256", "wanted 257"),
    ("bpe encode NO hi", "No such file"), ("bpe decode GOOD 256", "0 to 255"),
    ("data get T --workers 0", "workers: got 0"), ("data get T --data_dir T", "cannot write"),
    ("data get openwebtxt", "stdlib, shakespeare"), ("data get owt --vocab_size 9", "size: got 9"),
    ("data get owt --tokenizer bpee", "bpe, byte, char"), ("data get BINARY", "got 0 bytes"),
    ("data get owt --mirror a.b/owt", "http://a.b/owt"), ("data get owt", "too little disk")])
def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    texts = dict(T="text " * 99, EMPTY="", TINY="tiny", BINARY="\x7fELF\0" * 99, CUT='{"version": ',
                 GOOD=bpe.Tokenizer(dict(enumerate(bpe.BYTES))).to_text())
    for name, text in texts.items(): Path(name).write_text(text)
    script, *words = command.split()
    with pytest.raises(UserError) as error: call(importlib.import_module(script), *words)
    assert error.value.code == 2 and says in str(error.value)
    assert capsys.readouterr().err == f"{error.value}\n" and {*os.listdir()} == {*texts}

@pytest.mark.parametrize("n, T, B", [(103, 8, 4), (97, 8, 3), (33, 4, 8), (20, 7, 1)])
def test_the_loader_gives_each_target_exactly_once_an_epoch(n, T, B):
    ids = np.random.default_rng(1).permutation(n).astype(np.uint16)         # all different
    pairs = [*zip(ids[:-1].tolist(), ids[1:].tolist())]                     # (token, its target)
    loader, found = data.Loader(ids, T, B), []
    for tokens, targets in itertools.islice(loader, loader.n_windows):      # B epochs
        assert tokens.shape == targets.shape == (B, T) and tokens.dtype == torch.int64
        assert (tokens[targets < 0] == 0).all()
        found += zip(tokens[targets >= 0].tolist(), targets[targets >= 0].tolist())
    epochs = [found[i:i + n - 1] for i in range(0, len(found), n - 1)]
    assert len(epochs) == B and all(sorted(epoch) == sorted(pairs) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == B    # each in an order of its own

def test_the_loader_seeks_restores_splits_by_rank_and_refuses_less_than_a_batch():
    new = partial(data.Loader, np.arange(1000, dtype=np.uint16), 16)
    batches = [*itertools.islice(loader := new(12, seed=3), 20)]    # four epochs of 63 windows
    loader.seek(12 * 7)
    restored = new(12, **json.loads(json.dumps(loader.state())))
    for again in loader, restored: assert torch.equal(next(again)[0], batches[7][0])
    assert not torch.equal(next(new(12, seed=4))[0], batches[0][0])
    ranks = [new(12, seed=3, rank=r, world=3) for r in range(3)]
    for batch in batches:
        assert all(torch.equal(torch.cat(p), b) for *p, b in zip(*map(next, ranks), batch))
    with pytest.raises(UserError, match="63 windows"): new(64)

# -----------------------------------------------------------------------------
# kernels.py and model.py

def test_roofline_takes_the_longer_of_two_times():
    assert kernels.roofline_s(flops=100, n_bytes=10, peak=10, bandwidth=10) == (10, "arithmetic")
    assert kernels.roofline_s(flops=10, n_bytes=100, peak=10, bandwidth=10) == (10, "memory")

def test_device_row_prefers_the_longest_name_that_fits():
    row = kernels.device_row
    assert row("NVIDIA H100 PCIe")[0] == 756e12 and row("NVIDIA H100 80GB HBM3")[0] == 989e12
    assert row("NVIDIA A10")[0] == 125e12 and row("NVIDIA A1000") is None

def tiny(preset_name="llama", **more):
    sizes = dict(vocab_size=61, seq_len=24, n_layers=2, d_model=32, n_heads=4, dropout=0.0)
    if preset_name == "gemma": sizes.update(n_layers=6, window=5)
    sizes["n_layers"] = max(2, model.PRESETS[preset_name].get("n_layers", 0))
    if more.get("ffns", model.PRESETS[preset_name].get("ffns", ""))[-1:] == "x":
        sizes.update(n_experts=4)
    return model.preset(preset_name, **{**sizes, **more})

def make(cfg, dtype=torch.float64):
    """A model whose every parameter is random, so that none hides behind a zero."""
    torch.manual_seed(1)
    m = model.LM(cfg).to(dtype).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1))
    return m

def ids(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))

EVERY = [("llama", dict(mixers="A")), ("llama", dict(mixers="W", window=5)),
         ("llama", dict(n_kv_heads=2)), ("llama", dict(n_kv_heads=1, pos="none"))] + [
             ("llama", dict(mixers=m)) for m in model.MIXERS if m not in "AW"] + [
                 ("llama", dict(ffns=f)) for f in model.FFNS if f != "s"] + [
                     (name, {}) for name in model.PRESETS]

@pytest.fixture(params=EVERY, ids=lambda p: p[0] + "".join(f"-{k}={v}" for k, v in p[1].items()))
def cfg(request):
    return tiny(request.param[0], **request.param[1])

def test_no_token_sees_a_later_one(cfg):
    m, x = make(cfg), ids(2, 12)
    y = x.clone()
    y[:, 7:] = ids(2, 5, seed=9)
    a, b = m(x)[0], m(y)[0]
    # An FFT mixes the rounding of all places, and experts get slices of other lengths.
    assert torch.allclose(a[:, :7], b[:, :7], rtol=0, atol=1e-10)
    assert not torch.allclose(a[:, 7:], b[:, 7:])

@pytest.mark.parametrize("chunks", [[1] * 12, [5, 4, 3], [11, 1]])
def test_decode_with_cache_equals_full_forward(cfg, chunks):
    m, x = make(cfg), ids(3, 12)
    cache = m.new_cache(3, 12)
    parts = [m(part, cache=cache)[0] for part in x.split(chunks, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), m(x)[0], atol=1e-10)  # float64, sums reordered

def test_cache_forgets_what_is_truncated(cfg):
    m, x = make(cfg), ids(1, 12)
    cache = m.new_cache(1, 12)
    m(x[:, :6], cache=cache), m(ids(1, 4, seed=5), cache=cache)
    for c in cache: c.truncate(6)
    assert torch.allclose(m(x[:, 6:], cache=cache)[0], m(x)[0][:, 6:], atol=1e-10)

def test_flops_formula_equals_torchs_counter(cfg, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    for module in (kernels, model):
        monkeypatch.setattr(module, "attention", lambda q, k, v, mask=None, p=0.0:
                            kernels.attention_reference(q, k, v, mask))
    for T in (16, 256) if cfg.mixers == "W" and cfg.pos != "learned" else (16,):
        with FlopCounterMode(display=False) as counter: model.LM(cfg)(ids(1, T))
        assert counter.get_total_flops() == sum(model.LM(cfg).flops(T).values())

def test_every_parameter_gets_a_finite_gradient(cfg):
    m = make(cfg, torch.float32).train()
    losses, _ = m(ids(2, 12), ids(2, 12, seed=4))
    losses.mean().backward()
    for name, p in m.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name

@pytest.mark.parametrize("T", [12, 301])  # the second is cut into blocks
def test_window_sees_exactly_w_keys(T):
    m = make(tiny(mixers="W", window=5, n_layers=1))
    x = m.embed_tokens(ids(1, T)).detach().requires_grad_()
    m.embed_tokens.forward = lambda tokens: x
    m(ids(1, T))[0][0, 10].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [6, 7, 8, 9, 10]

def test_local_attention_in_blocks_equals_the_whole_mask():
    pos = torch.cat((torch.arange(7), torch.arange(250), -torch.ones(44, dtype=torch.long)))
    pos = torch.stack((pos, torch.arange(301)))
    ctx, q, k = kernels.Context(tiny(), pos, pos), *torch.randn(2, 2, 4, 301, 8).double()
    want = kernels.attention(q, k[:, :2], k[:, 2:], ctx.mask(5))
    got = ctx.attend(q, k[:, :2], k[:, 2:], 5)
    assert kernels.blocks(301, 5) == 61 and torch.isfinite(got).all()
    real = (pos >= 0)[:, None].expand(2, 4, -1)
    assert torch.allclose(got[real], want[real], atol=1e-12)

def test_window_cache_is_a_ring_that_stays_small_and_refuses_what_it_lost():
    m, x = make(tiny(mixers="W", window=5)), ids(1, 60)
    cache = m.new_cache(1, 60)
    parts = [m(part, cache=cache)[0] for part in x.split([7, 1, 1, 30, 2, 19], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), m(x)[0], atol=1e-10)
    assert cache[0].columns[0].shape[2] == 5 + kernels.KVCache.SLACK
    for c in cache: c.truncate(50)
    assert torch.allclose(m(x[:, 50:], cache=cache)[0], m(x)[0][:, 50:], atol=1e-10)
    for c in cache: c.truncate(44)
    with pytest.raises(AssertionError, match="cannot keep 42"): cache[0].truncate(42)

def test_padded_tokens_and_other_documents_in_a_row_change_nothing(cfg):
    m, texts, more = make(cfg), ids(3, 6), ids(2, 2, seed=5)
    two, one = [0, 1, -1, 2, -1, -1, -1, 3, 4, 5, 0, 1, 2, 3, 4, 5], [-1] * 10 + [*range(6)]
    pos = torch.tensor([two, one])
    tokens, cache = torch.zeros_like(pos), m.new_cache(2, 20)
    tokens[pos >= 0] = texts.flatten()
    parts = [m(tokens[:, a:b], pos=pos[:, a:b], cache=cache)[0]
             for a, b in ((0, 5), (5, 13), (13, 16))]
    alone = torch.cat([m(text[None])[0] for text in texts])
    for out in (m(tokens, pos=pos)[0], torch.cat(parts, 1)):
        assert torch.allclose(out[pos >= 0].view(3, 6, -1), alone, atol=1e-10)
    want = m(torch.cat((texts[1:], more), 1))[0][:, 6:]
    assert torch.allclose(m(more, cache=cache)[0], want, atol=1e-10)  # positions go on

@pytest.mark.parametrize("delta", [False, True])
def test_chunked_scan_equals_its_recurrence(delta):
    torch.manual_seed(0)
    uniform = partial(torch.rand, dtype=torch.float64)
    q, k, v, S = (torch.randn(2, *shape, dtype=torch.float64) for shape in (
        (1, 150, 6), (1, 150, 6), (3, 150, 5), (3, 6, 5)))
    pos = torch.stack((torch.arange(150), torch.arange(150) % 70 - 3))  # padding, three documents
    pos[1, 70:73] = pos[1, 140:143] = -1
    log_a = -uniform(2, 3, 150) * 40  # decays too long for exp of a sum
    log_a[:, :, ::2] *= 1e-3
    b, results = uniform(2, 3, 150) if delta else None, []
    x = [t.requires_grad_() for t in (q, k, v, S, log_a, b) if t is not None]
    for f in (kernels.scan, kernels.scan_reference):
        y, end = f(q, F.normalize(k, dim=-1), v, log_a, b, pos, S)
        y = y.masked_fill(pos[:, None, :, None] < 0, 0.0)
        results.append((y, end, *torch.autograd.grad(y.square().sum() + end.sum(), x)))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*results))

def test_linear_attention_is_attention_with_another_kernel():
    cfg, x = tiny(mixers="L"), torch.randn(1, 70, 32).double()
    layer = make(cfg).layers[0].self_attn
    q, k, v = (p(x).view(1, 70, 4, 8).transpose(1, 2) for p in
               (layer.q_proj, layer.k_proj, layer.v_proj))
    share = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    want = share / share.sum(-1, keepdim=True) @ v
    got = layer(x, kernels.Context(cfg, torch.zeros(1, 70)))
    assert torch.allclose(got, layer.o_proj(want.transpose(1, 2).flatten(2)), atol=1e-10)

def test_delta_rule_replaces_the_value_of_a_key():
    keys, values = torch.eye(4)[[0, 1, 0, 2]][None, None], torch.randn(1, 1, 4, 3)
    one, pos = torch.ones(1, 1, 4), torch.arange(4)[None]
    for f in (kernels.scan, kernels.scan_reference):
        S = f(keys, keys, values, 0 * one, one, pos, torch.zeros(1, 1, 4, 3))[1][0, 0]
        assert torch.allclose(S[:3], values[0, 0, [2, 1, 3]], atol=1e-6)  # the last written

def test_long_convolution_equals_its_definition():
    u, h, pos = torch.randn(2, 9, 3).double(), torch.randn(9, 3).double(), torch.arange(9)
    want = sum(F.pad(u[:, :9 - g] * h[g], (0, 0, g, 0)) for g in range(9))
    row, doc = pos.expand(2, 1, 9), torch.zeros(2, 1, 9)
    for y in (kernels.long_conv(u, h), kernels.long_conv_reference(u, h, row, doc, row, doc)):
        assert torch.allclose(y, want, atol=1e-12)

@pytest.mark.parametrize("K", [1, 2])
def test_experts_add_up_as_their_definition_says(K):
    c = tiny(ffns="x", n_experts=4, n_active=K, n_shared=1, balance=0.5, router_z=0.25)
    moe, x = make(c).layers[0].mlp, torch.randn(1, 20, 32).double()
    y, aux = moe(x)
    z = moe.gate(x[0])
    p, want, load = z.softmax(-1), moe.shared_experts(x[0])[0].clone(), torch.zeros(4).double()
    for t in range(20):
        best = p[t].argsort(descending=True)[:K]
        total = p[t, best].sum() if K > 1 else 1  # else the loss would not train the router
        for e in best: want[t] += p[t, e] / total * moe.experts[e](x[0, t])[0]
        load[best] += 1
    loss = 0.5 * 4 * (load / load.sum() * p.mean(0)).sum()
    loss = loss + 0.25 * z.exp().sum(1).log().square().mean()
    assert torch.allclose(y[0], want, atol=1e-10) and aux["load"].tolist() == load.tolist()
    assert torch.allclose(aux["loss"], loss, atol=1e-10)

def test_router_bias_evens_the_load_without_a_loss():
    m = model.LM(tiny(ffns="x", n_experts=4, balance_bias=0.01))
    loads = []
    for _ in range(100):
        loads.append(m(ids(8, 24))[1]["load"][0].float())
        train.local_step(m, [(ids(8, 24), ids(8, 24))])
    assert loads[-1].std() < 0.5 * loads[0].std() and loads[-1].sum() == 8 * 24 * 2

@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_equals_its_reference_and_gqa_is_mha_with_repeated_heads(kv):
    x = [torch.randn(2, h, 9, 8, dtype=torch.float64, requires_grad=True) for h in (4, kv, kv)]
    mask = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    mha = [t.repeat_interleave(4 // t.shape[1], 1) for t in x]
    for m in (None, mask):
        fast, slow = (f(*x, m) for f in (kernels.attention, kernels.attention_reference))
        pairs = zip(*(torch.autograd.grad(y.square().sum(), x) for y in (fast, slow)))
        assert torch.allclose(fast, slow, atol=1e-12)
        assert torch.allclose(fast, kernels.attention(*mha, m), atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)

def test_attention_reference_equals_a_loop_over_definitions():
    q, k, v = (torch.randn(1, h, 5, 4, dtype=torch.float64) for h in (4, 2, 2))
    out = kernels.attention_reference(q, k, v)
    for h in range(4):
        for t in range(5):
            scores = [(q[0, h, t] @ k[0, h // 2, s]).item() / 2 for s in range(t + 1)]  # sqrt(4)
            weights = [math.exp(s) for s in scores]
            want = sum(w * v[0, h // 2, s] for s, w in enumerate(weights)) / sum(weights)
            assert torch.allclose(out[0, h, t], want, atol=1e-12)

def test_rope_pairs_first_half_with_second():
    cos, sin = kernels.rope_tables(torch.tensor([[3]]), 4, 100.0)  # angles of 3 and 3 / 10
    out = kernels.rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), cos, sin).flatten()
    c, s, c2, s2 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    want = [c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2]
    assert torch.allclose(out, torch.tensor(want))

def test_sinusoid_is_the_formula_of_the_paper():
    out = kernels.sinusoid(torch.tensor([[3]]), 6)[0, 0]
    want = [f(3 / 10000 ** (2 * i / 6)) for f in (math.sin, math.cos) for i in range(3)]
    assert torch.allclose(out, torch.tensor(want))

def test_norms_and_gelu_equal_torchs():
    x = torch.randn(30, 16) * 5
    rms, layer = kernels.RMSNorm(16, 1e-5), kernels.LayerNorm(16, 1e-5)
    assert torch.allclose(rms(x), F.rms_norm(x, (16,), eps=1e-5), atol=1e-6)
    assert torch.allclose(layer(x), F.layer_norm(x, (16,), eps=1e-5), atol=1e-6)
    assert torch.allclose(kernels.gelu_reference(x), F.gelu(x, approximate="tanh"), atol=1e-6)

def test_softmax_and_cross_entropy_survive_huge_logits():
    z, y = torch.randn(10, 7) * 1000, torch.randint(0, 7, (10,))
    y[0] = -1
    want = F.cross_entropy(z, y, ignore_index=-1, reduction="none")
    for f in (kernels.cross_entropy, kernels.cross_entropy_reference):
        assert torch.allclose(f(z.view(2, 5, 7), y.view(2, 5)).flatten(), want) and want[0] == 0
    assert torch.allclose(kernels.softmax(z), z.softmax(-1)) and z.softmax(-1).isfinite().all()

PUBLISHED = [  # L, D, H, Hkv, Dh, F, V as their config.json says; parameters as their files hold
    ("gpt2", (12, 768, 12, 12, 64, 3072, 50257), {}, 124_439_808),
    ("gpt2", (96, 12288, 96, 96, 128, 49152, 50257), dict(seq_len=2048), 174_604_259_328),  # GPT-3
    ("llama", (32, 4096, 32, 32, 128, 11008, 32000), {}, 6_738_415_616),  # Llama 2 7B
    ("llama", (16, 2048, 32, 8, 64, 8192, 128256), dict(tie=True), 1_235_814_400),  # Llama 3.2 1B
    ("mistral", (32, 4096, 32, 8, 128, 14336, 32000), {}, 7_241_732_096),  # 7B v0.1
    ("mixtral", (32, 4096, 32, 8, 128, 14336, 32000), dict(d_expert=14336), 46_702_792_704),
    ("qwen2", (24, 896, 14, 2, 64, 4864, 151936), {}, 494_032_768),  # Qwen2.5 0.5B
    ("qwen3", (28, 1024, 16, 8, 128, 3072, 151936), {}, 596_049_920),  # 0.6B
    ("gemma", (26, 1152, 4, 1, 256, 6912, 262144), dict(mixers=("WWWWWA" * 5)[:26]), 999_885_952),
    ("deepseek", (27, 2048, 16, None, 128, 10944, 102400), dict(  # V2-Lite
        ffns="s" + 26 * "x", n_experts=64, n_active=6, n_shared=2, d_expert=1408), 15_706_484_224)]

@pytest.mark.parametrize("name, sizes, more, n", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name, sizes, more, n):
    keys = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
    cfg = model.preset(name, **{"seq_len": 1024, **dict(zip(keys, sizes)), **more})
    assert sum(model.meta_model(cfg).n_params().values()) == n

@pytest.mark.parametrize("layers, d, n, flops, head", [(12, 768, 190_460_160, 3.4963e11, 22.61),
                                                       (48, 1600, 2_127_057_600, 4.5133e12, 3.65)])
def test_accounting_gives_the_numbers_of_the_course(layers, d, n, flops, head):
    m = model.meta_model(model.preset("llama", n_layers=layers, d_model=d, d_ff=4 * d,
                                      vocab_size=50257, seq_len=1024))
    parts = m.flops(1024)
    assert sum(m.n_params().values()) == n == sum(p.numel() for p in m.parameters())
    assert sum(parts.values()) == pytest.approx(flops, rel=1e-4)
    assert 100 * parts["head"] / sum(parts.values()) == pytest.approx(head, abs=0.005)

def test_softcap_bounds_logits():
    assert 2 < make(tiny(softcap=3.0))(ids(2, 9))[0].abs().max() < 3

def test_model_starts_near_a_uniform_guess():
    for name in model.PRESETS:  # logits of std 1, at most, cost half a nat
        torch.manual_seed(0)
        loss = model.LM(tiny(name, vocab_size=512))(ids(4, 20), ids(4, 20, seed=1))[0].mean().item()
        assert math.log(512) - 0.1 < loss < math.log(512) + 0.8, (name, loss)

@pytest.mark.parametrize("cap", [None, 3.0])
def test_loss_in_parts_equals_the_loss_of_all_logits(monkeypatch, cap):
    x, W = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 11, 8), (13, 8)))
    targets = torch.randint(-1, 13, (3, 11))
    z = x @ W.T if cap is None else cap * torch.tanh(x @ W.T / cap)
    want = -z.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    largest, whole = [], kernels.logits_of
    def counting(x, *rest):
        largest.append(x.shape[:-1].numel())
        return whole(x, *rest)
    for limit in (2 ** 27, 13 * 5):  # whole, and in parts of five tokens
        monkeypatch.setattr(kernels, "LOGITS", limit)
        monkeypatch.setattr(kernels, "logits_of", counting)
        got = kernels.linear_cross_entropy(x, W, targets, cap)
        g = torch.randn_like(got)
        a, b = (torch.autograd.grad(y, (x, W), g, retain_graph=True) for y in (got, want))
        assert all(torch.allclose(*p, atol=1e-12) for p in ((got, want), *zip(a, b)))
    assert largest[0] == 33 and max(largest[1:]) == 5

def test_bfloat16_stream_keeps_float32_weights_and_loss():
    m = make(tiny(), torch.float32)
    want = m(ids(2, 9), ids(2, 9, seed=1))[0]
    m.compute_dtype = torch.bfloat16
    losses, _ = m(ids(2, 9), ids(2, 9, seed=1))
    assert losses.dtype == torch.float32 and m(ids(2, 9))[0].dtype == torch.bfloat16
    assert 0 < (losses - want).abs().max() < 0.3  # bf16 has eight bits; logits here reach ten

def test_dropout_acts_in_training_only():
    m = make(tiny(dropout=0.5))
    assert torch.equal(m(ids(1, 9))[0], m(ids(1, 9))[0])
    m.train()
    assert not torch.equal(m(ids(1, 9))[0], m(ids(1, 9))[0])

def test_tensor_files_round_trip_and_are_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(),
               "none": torch.zeros(0, 3), "flag": torch.tensor([True, False]),
               "one": torch.tensor(2.5).double()}
    model.save_tensors(tmp_path / "t.safetensors", tensors, {"who": "me"})
    out, metadata = model.load_tensors(tmp_path / "t.safetensors")
    assert metadata["who"] == "me" and out.keys() == tensors.keys()
    assert all(torch.equal(out[k], t) and out[k].dtype == t.dtype for k, t in tensors.items())
    raw = (tmp_path / "t.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    a, b = json.loads(raw[8:8 + n])["b"]["data_offsets"]
    assert n % 8 == 0 and np.frombuffer(raw[8 + n:][a:b], np.int64).tolist() == [0, 1, 2, 3, 4]

@pytest.mark.parametrize("harm", [
    lambda d: d.replace(b"F32", b"I32"), lambda d: d.replace(b"[40]", b"[20]"),
    lambda d: d.replace(b'"me"', b'"us"'), lambda d: d[:-3], lambda d: d[:5], lambda d: b"",
    lambda d: d[:-9] + b"x" + d[-8:], lambda d: d[:12] + b"\xff" + d[13:],
    lambda d: b"\xff" * 8 + d[8:]])
def test_damaged_tensor_file_is_named(tmp_path, harm, capsys):
    path = tmp_path / "t.safetensors"
    model.save_tensors(path, {"a": torch.randn(40)}, {"who": "me"})
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError) as e: model.load_tensors(path)
    assert e.value.code == 2 and str(path) in capsys.readouterr().err

def test_saved_model_loads_with_the_same_logits(cfg, tmp_path):
    m = make(cfg, torch.float32)
    model.save_model(m, tmp_path)
    loaded = model.load_model(tmp_path)
    assert loaded.cfg == cfg and torch.equal(loaded(ids(1, 9))[0], m(ids(1, 9))[0])

class Weights(dict):
    """Random tensors under published names, made when a forward written by hand asks for them."""
    def __call__(self, name, *shape):
        fresh = torch.randn(shape, generator=torch.Generator().manual_seed(len(self))) * 0.3
        return self.setdefault(name, fresh + (len(shape) == 1)).double()

def gpt2_by_hand(w, c, tokens):
    norm = lambda x, n: F.layer_norm(x, (32,), w(n + ".weight", 32), w(n + ".bias", 32))
    conv = lambda x, n, d: x @ w(n + ".weight", x.shape[-1], d) + w(n + ".bias", d)
    x = w("wte.weight", 61, 32)[tokens] + w("wpe.weight", 64, 32)[:20]
    for h in ("h.0.", "h.1."):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2)
                   for y in conv(norm(x, h + "ln_1"), h + "attn.c_attn", 96).split(32, -1))
        p = (q @ k.mT / 8 ** 0.5 + torch.full((20, 20), -math.inf).triu(1)).softmax(-1)
        x = x + conv((p @ v).transpose(1, 2).flatten(2), h + "attn.c_proj", 32)
        y = F.gelu(conv(norm(x, h + "ln_2"), h + "mlp.c_fc", 128), approximate="tanh")
        x = x + conv(y, h + "mlp.c_proj", 32)
    return norm(x, "ln_f") @ w("wte.weight", 61, 32).T

STRETCH = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)

def llama_by_hand(w, c, tokens):
    Dh, rope, freqs = c.get("head_dim", 8), c.get("rope_scaling") or c.get("rope_parameters"), []
    rms = lambda x, n: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w(n, x.shape[-1])
    lin = lambda x, n, d: x @ w(n + "_proj.weight", d, x.shape[-1]).T
    for i in range(Dh // 2):
        f = {**c, **(rope or {})}.get("rope_theta", 1e4) ** (-2 * i / Dh)
        s = (16 * f / (2 * math.pi) - 1) / (4 - 1) if rope else 1
        freqs.append(f if s >= 1 else f / 8 if s <= 0 else (1 - s) * f / 8 + s * f)
    angle = torch.arange(20)[:, None] * torch.tensor(freqs, dtype=torch.float64)
    def turned(y):  # a pair of features is a complex number
        z = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), -1)
    x = w("model.embed_tokens.weight", 61, 32)[tokens]
    for m in ("model.layers.0.", "model.layers.1."):
        y = rms(x, m + "input_layernorm.weight")
        q, k, v = (lin(y, m + f"self_attn.{n}", h * Dh).unflatten(-1, (h, Dh)).transpose(1, 2)
                   .repeat_interleave(4 // h, 1) for n, h in (("q", 4), ("k", 2), ("v", 2)))
        p = turned(q) @ turned(k).mT / Dh ** 0.5 + torch.full((20, 20), -math.inf).triu(1)
        y = (p.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + lin(y, m + "self_attn.o", 32)
        y = rms(x, m + "post_attention_layernorm.weight")
        y = F.silu(lin(y, m + "mlp.gate", 40)) * lin(y, m + "mlp.up", 40)
        x = x + lin(y, m + "mlp.down", 32)
    head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
    return rms(x, "model.norm.weight") @ w(head + ".weight", 61, 32).T

def sizes_of(gpt2):
    return dict(n_positions=64, n_embd=32, n_layer=2, n_head=4) if gpt2 else dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=64)

def foreign(path, kind, more={}, dtype="F32", files=1, harm=None, prefix=""):
    """Writes a directory as others publish theirs -> the right logits of ids(2, 20)."""
    gpt2, to = "GPT2" in kind, model.DTYPES[dtype]
    c, w = dict(sizes_of(gpt2), vocab_size=61, architectures=[kind], **more), Weights()
    by_hand = gpt2_by_hand if gpt2 else llama_by_hand
    by_hand(w, c, ids(2, 20))  # makes the weights
    for n in w: w[n] = w[n].to(to)
    logits = by_hand(w, c, ids(2, 20))
    if gpt2: w["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()  # old files have their masks
    if files == 4: w["lm_head.weight"] = w["model.embed_tokens.weight"]  # tied, yet there twice
    if harm: harm(c, w)
    names, index = sorted(w), {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        header, blob = {}, b""
        for n in names[i::files]:
            raw, index[prefix + n] = w[n].to(to).view(torch.uint8).numpy().tobytes(), file
            where = [len(blob), len(blob) + len(raw)]
            header[prefix + n] = dict(dtype=dtype, shape=list(w[n].shape), data_offsets=where)
            blob += raw
        text = json.dumps(header).encode()  # not padded: numbers may begin anywhere
        (path / file).write_bytes(len(text).to_bytes(8, "little") + text + blob)
    if files > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(c))
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')  # it has precedence
    return logits

@pytest.mark.parametrize("kind, more, options", [
    ("GPT2LMHeadModel", {}, {}),
    ("GPT2LMHeadModel", {}, dict(dtype="F16", files=2, prefix="transformer.")),
    ("LlamaForCausalLM", {}, dict(dtype="BF16")),
    ("LlamaForCausalLM", dict(rope_theta=100, head_dim=12, rope_scaling=STRETCH), dict(files=3)),
    ("LlamaForCausalLM", dict(rope_parameters=dict(STRETCH, rope_theta=100.0),
                              tie_word_embeddings=True), dict(files=4))])
def test_published_models_give_the_logits_of_their_definition(tmp_path, kind, more, options):
    logits = foreign(tmp_path, kind, more, **options)
    m = model.load_model(tmp_path, dtype=torch.float64)
    # rope's tables are float32, so angles are right to 1e-6
    assert torch.allclose(m(ids(2, 20))[0], logits, atol=1e-5) and m.eos == [3, 5]
    model.save_model(m, tmp_path / "ours")
    theirs = {n for f in tmp_path.glob("*.safetensors") for n in model.load_tensors(f)[0]}
    for name in model.load_tensors(tmp_path / "ours/model.safetensors")[0]:
        assert {name, f"transformer.{name}"} & theirs  # under the names of their definition
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["eos_token_id"] == [3, 5] and config.get("rope_scaling") in (None, STRETCH)
    assert config.get("n_inner", 128) == 128 and config.get("intermediate_size", 40) == 40

@pytest.mark.parametrize("kind, row", model.FAMILIES.items())
def test_presets_of_published_families_go_out_as_theirs_and_come_back(tmp_path, kind, row):
    more = dict(mixers="W", window=6) if row[0] == "mixtral" else {}
    m = make(tiny(row[0], **more), torch.float32)
    model.save_model(m, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config.pop("model_config") and config["architectures"] == [kind]
    (tmp_path / "a/config.json").write_text(json.dumps(config))  # as if another had published it
    loaded = model.load_model(tmp_path / "a")
    model.save_model(loaded, tmp_path / "b")
    same = [(tmp_path / d / "model.safetensors").read_bytes() for d in "ab"]
    assert torch.equal(loaded(ids(2, 20))[0], m(ids(2, 20))[0]) and same[0] == same[1]

@pytest.mark.parametrize("harm, says", [
    (lambda c, w: c.update(architectures=["Bert"]), "Bert.*GPT2LMHeadModel.*LlamaForCausalLM"),
    (lambda c, w: c.update(rope_scaling=dict(type="yarn", factor=4.0)), "type.*yarn"),
    (lambda c, w: c.update(attention_bias=True), "attention_bias.*True"),
    (lambda c, w: c.pop("num_attention_heads"), "num_attention_heads"),
    (lambda c, w: c.update(hidden_size="wide"), "d_model.*wide"),
    (lambda c, w: w.pop("model.norm.weight"), r"model.norm.weight missing .*\[32\]"),
    (lambda c, w: w.update({"model.odd": torch.ones(3)}), r"model.odd \[3\]"),
    (lambda c, w: w.update({"lm_head.weight": torch.ones(61, 8)}), r"lm_head.*61, 8.*61, 32")])
def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path, harm, says):
    foreign(tmp_path, "LlamaForCausalLM", harm=harm)
    with pytest.raises(UserError, match=says): model.load_model(tmp_path)

def test_a_shard_that_is_absent_is_named(tmp_path):
    foreign(tmp_path, "LlamaForCausalLM", files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"): model.load_model(tmp_path)
    logits = foreign(tmp_path, "LlamaForCausalLM")  # one file, which counts if both are there
    assert torch.allclose(model.load_model(tmp_path)(ids(2, 20))[0].double(), logits, atol=1e-4)

@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_transformers_agrees_both_ways(tmp_path, trained, family):
    tf = pytest.importorskip("transformers")
    sizes = sizes_of(family == "gpt2") | {
        "llama": dict(rope_parameters=dict(STRETCH, rope_theta=1e4)),
        "mistral": dict(sliding_window=5),
        "mixtral": dict(num_local_experts=4, num_experts_per_tok=2)}.get(family, {})
    torch.manual_seed(0)
    theirs = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(
        family, vocab_size=61, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **sizes))
    theirs.eval().save_pretrained(tmp_path, max_shard_size="20KB")
    ours = model.load_model(tmp_path)
    model.save_model(ours, tmp_path / "ours")
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    trained[1].save(tmp_path / "ours")
    text = "def read(self):  # it's" + EOT + "na\u00efve\n\n"  # no digits: Qwen2 cuts them its way
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.encode(text) == trained[1].encode(text)
    with torch.no_grad():
        want = theirs(ids(2, 20)).logits
        assert (ours(ids(2, 20))[0] - want).abs().max() <= 1e-5
        assert (back(ids(2, 20)).logits - want).abs().max() <= 1e-5
    prompt, how = ids(1, 10), sample.Sampling(50, temperature=0.0)
    greedy = theirs.generate(prompt, max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert sample.generate(ours, prompt.tolist(), how) == greedy[:, 10:].tolist()

@pytest.mark.parametrize("kind, bad", [*((model.ModelConfig, bad) for bad in (
    dict(mixers="AX"), dict(mixers="AAW"), dict(ffns=""), dict(n_heads=5), dict(n_kv_heads=3),
    dict(mixers="L", n_kv_heads=2), dict(window=4), dict(d_model=2.5), dict(d_head=3),
    dict(d_latent=8), dict(n_layers=0), dict(n_experts=4), dict(ffns="x", n_active=9),
    dict(pos="rop"), dict(pos="none", rope_theta=5.0), dict(dropout=1.0), dict(softcap=-1.0),
    dict(softcap=math.inf), dict(norm="rmsnorm"), dict(norm_place="mid"))),
    *((sample.Sampling, bad) for bad in (
        dict(temperature=-1.0), dict(top_p=0.0), dict(max_tokens=0), dict(top_k=0)))])
def test_the_bad_field_of_a_configuration_is_named(kind, bad, capsys):  # the last of each dict
    with pytest.raises(UserError, match=f"--{[*bad][-1]}") as e: kind(**bad)
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1

# -----------------------------------------------------------------------------
# optim.py

TORCHS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-10),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.95), eps=1e-8),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)}

@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimizer_equals_torchs_and_survives_saving_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.float64)
    whole, saved, theirs = params = [start.clone().requires_grad_() for _ in range(3)]
    new = partial(optim.OPTIMIZERS[name], lr=0.01)
    optimizers = [new([whole]), new([saved]), TORCHS.get(name, new)([theirs])]
    for step in range(50):
        if step == 20:
            model.save_tensors(tmp_path / "s", optimizers[1].state_tensors())
            optimizers[1] = new([saved])
            optimizers[1].load_state_tensors(model.load_tensors(tmp_path / "s")[0])
        g = torch.randn_like(start)
        for p, optimizer in zip(params, optimizers):
            p.grad = g.clone()
            optimizer.step()
    assert (whole - theirs).abs().max() < 1e-12 and torch.equal(whole, saved)

def after(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach().clone()

def test_soap_is_adam_in_a_basis_that_turns_with_the_problem():
    torch.manual_seed(0)
    start, turn = torch.randn(5, 5).double(), torch.linalg.qr(torch.randn(5, 5).double()).Q
    gradients = torch.randn(25, 5, 5).double()
    new = lambda: torch.nn.Parameter(start.clone())
    p, q, one = new(), new(), torch.eye(5).double()
    soap, adam = optim.SOAP([p], every=10 ** 9), optim.AdamW([q], lr=optim.SOAP.defaults["lr"])
    soap.state[0][0].update(l=one.clone(), r=one.clone(), l_basis=one, r_basis=one)
    assert torch.allclose(after(soap, p, gradients), after(adam, q, gradients), atol=1e-12)
    p, q = new(), torch.nn.Parameter(turn @ start)
    turned = after(optim.SOAP([q]), q, turn @ gradients)
    assert torch.allclose(turn @ after(optim.SOAP([p]), p, gradients), turned, atol=1e-6)

def test_a_turned_valley_stops_a_diagonal_preconditioner_and_no_other():
    needs = lambda make, turned: optim.steps_needed(make, *optim.valley(turned), limit=400)[0]
    assert needs(optim.AdaGrad, True) > 10 * needs(optim.AdaGrad, False)
    soap = partial(optim.SOAP, weight_decay=0.0)
    assert needs(soap, True) == needs(soap, False) <= 100

@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24)])
def test_a_muon_update_is_orthogonal_within_the_polynomials_band(shape):
    p, G = torch.nn.Parameter(torch.zeros(shape).double()), torch.randn(1, *shape).double()
    after(optim.Muon([p], lr=1.0, weight_decay=0.0), p, G)
    size = max(1, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(p, -size * optim.orthogonalize(G[0]), atol=1e-4)  # eps beside the norm
    for name, low, high in (("POLAR_EXPRESS", 0.85, 1.15), ("NEWTON_SCHULZ", 0.67, 1.22)):
        x = torch.logspace(-1.9, 0, 999).double() / 1.02  # the same polynomials, on numbers
        for a, b, c in getattr(optim, name): x = a * x + b * x ** 3 + c * x ** 5
        S = torch.linalg.svdvals(optim.orthogonalize(G[0], getattr(optim, name)))
        assert low < x.min() and x.max() < high and S.max() < high and S[:9].min() > low

def test_muon_moves_many_matrices_as_it_moves_each():
    torch.manual_seed(0)
    starts, gradients = torch.randn(3, 6, 4).double(), torch.randn(5, 3, 6, 4).double()
    many = [torch.nn.Parameter(x.clone()) for x in starts] + [torch.nn.Parameter(torch.ones(4))]
    muon = optim.Muon(many)
    for g in gradients:
        for p, x in zip(many, [*g, torch.ones(4)]): p.grad = x.clone()
        muon.step()
    for i in range(3):
        p = torch.nn.Parameter(starts[i].clone())
        assert torch.allclose(many[i], after(optim.Muon([p]), p, gradients[:, i]), atol=1e-12)

def test_with_mup_the_best_learning_rate_stays_where_it_was_at_the_smallest_width():
    best = {mup: [lr for lr, _ in optim.transfer(mup, (32, 512)).values()] for mup in (0, 1)}
    assert best[0][0] / best[0][1] >= 4 and 0.5 <= best[1][0] / best[1][1] <= 2

def test_costs_of_products_are_the_formulas():
    m, n = 48, 32
    assert optim.costs(optim.Muon, m, n) == ((5 * (4 * n * n * m + 2 * n ** 3)) / (m * n), 4)
    products = 2 * m * n * (m + n)  # the two factors; three products with both bases
    assert optim.costs(optim.SOAP, m, n)[0] == pytest.approx(4 * products / (m * n), rel=0.1)

def test_noise_scale_solves_its_two_equations_and_level_tells_spikes():
    signal, noise = 3.0, 120.0  # |G|^2, tr(S)
    assert optim.noise_scale(signal + noise / 4, signal + noise / 64, 4, 64) == pytest.approx(40)
    assert optim.noise_scale(30.0, 30.0 / 16, 4, 64) == math.inf  # nothing but noise
    level, rng = optim.Level(), random.Random(0)
    usual = [level.spikes(4 - i / 1000 + rng.gauss(0, 0.1)) for i in range(1000)]
    assert not any(usual) and level.spikes(5.0) and not level.spikes(3.0)
    assert not [level.spikes(6.0) for _ in range(300)][-1]  # what lasts becomes the level

def test_frozen_parameters_stay_and_count_no_step():
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    adam = optim.AdamW([p, q], lr=0.1)
    p.grad = torch.ones(2)
    adam.step()
    assert torch.equal(q, torch.ones(2)) and not adam.state[0][1] and adam.state[0][0]["t"] == 1

def test_groups_partition_the_parameters_and_only_matrices_decay():
    for m in (model.LM(tiny(name)) for name in model.PRESETS):
        groups = optim.param_groups(m, weight_decay=0.1, embedding=0.5)
        grouped = [id(p) for g in groups for p in g["params"]]
        assert sorted(grouped) == sorted(map(id, m.parameters()))
        assert "head" in [g["role"] for g in groups]  # a tied table moves as the head that it is
        for g in groups:
            assert (g["weight_decay"] > 0) == (g["role"] == "matrix")
            assert ("lr" in g) == (g["role"] == "embedding")
            assert g["role"] == "vector" or all(p.ndim == 2 for p in g["params"])

def test_clipping_equals_torchs_and_leaves_small_gradients():
    for size in (0.01, 100.0):
        ours, theirs = ([torch.zeros(n, requires_grad=True) for n in (12, 5, 2)] for _ in range(2))
        for p, q in zip(ours[:2], theirs):  # the third has no gradient
            p.grad = torch.randn_like(p) * size
            q.grad = p.grad.clone()
        norms = optim.clip_grad_norm(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert torch.allclose(*norms) and (norms[0] > 1) == (size > 1)
        assert all(torch.allclose(p.grad, q.grad) for p, q in zip(ours[:2], theirs))

def test_cosine_schedule_has_the_values_of_the_course():
    # peak 1, floor .1, warm-up 7 of 21 steps
    lr = lambda it: optim.cosine(it / 21, warmup=7 / 21, cooldown=None, final=0.1)
    got = [lr(it) for it in (0, 7, 8, 14, 21, 30)]
    assert got == pytest.approx([0, 1, 0.98871756, 0.55, 0.1, 0.1])

def test_wsd_schedule_rises_stays_and_falls_on_straight_lines():
    f = lambda x: optim.wsd(x, warmup=0.1, cooldown=0.4, final=0.2)
    got = [f(x) for x in (0.0, 0.05, 0.1, 0.35, 0.6, 0.8, 1.0, 1.5)]
    assert got == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.2, 0.2])

def test_optimizers_refuse_what_they_do_not_know():
    m, adam = model.LM(tiny()), optim.Adam([torch.ones(3, requires_grad=True)])
    for bad in (lambda: optim.SGD(optim.param_groups(m, weight_decay=0.1)),
                lambda: optim.Adam(m.parameters(), bta=1), lambda: optim.param_groups(m, tail=0.1),
                lambda: adam.load_state_tensors({"0.0.m": torch.ones(4)})):
        with pytest.raises(AssertionError): bad()

# -----------------------------------------------------------------------------
# sample.py

def test_sampling_by_top_p_top_k_and_min_p_keeps_the_tokens_worked_by_hand():
    z = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    kept = lambda z: torch.isfinite(z).nonzero().flatten().tolist()
    crossing = [kept(sample.top_p(z, p)) for p in (0.4, 0.6, 0.8, 1.0)]  # what crosses p stays
    assert crossing == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert kept(sample.top_k(z, 2)) == kept(sample.min_p(z, 0.4)) == [1, 3]
    assert kept(sample.top_k(torch.zeros(5), 2)) == [0, 1]
    p = sample.temperature(z, 0.5).softmax(-1)  # p^2, normalised
    assert p[1].item() == pytest.approx(0.25 / 0.345)

def test_sampling_draws_with_the_models_frequencies():
    p, n, g = torch.tensor([0.5, 0.3, 0.2]), 4000, torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample.draw(p.log(), sample.Sampling(), g) for _ in range(n)])
    chi2 = ((drawn.bincount(minlength=3) - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 13.8  # two degrees of freedom: exceeded by chance once in a thousand

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_is_the_same_with_and_without_cache_alone_and_in_a_batch(cfg, temperature):
    m = make(cfg)  # float64; 40 tokens outgrow the context of 24 twice
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], list(range(20))]
    how = partial(sample.Sampling, 40, temperature=temperature, top_k=30)
    cached = sample.generate(m, prompts, how())
    assert cached == sample.generate(m, prompts, how(), use_cache=False)
    assert [len(text) for text in cached] == [40, 40, 40]
    for i, prompt in enumerate(prompts):
        assert sample.generate(m, [prompt], how(seed=i)) == [cached[i]]

def test_generate_stops_at_the_stop_token_and_streams_what_it_returns():
    generate, told = partial(sample.generate, make(tiny()), [[1], [2]]), []
    full = generate(sample.Sampling(30))
    stops = full[0][1], full[0][3]
    several = generate(sample.Sampling(30, stop=list(stops)))
    assert several[0] == full[0][:min(map(full[0].index, stops))]
    cut = generate(sample.Sampling(30, stop=stops[1]), on_token=lambda *it: told.append(it))
    assert cut == [t[:t.index(stops[1])] if stops[1] in t else t for t in full]
    assert [[t for i, t in told if i == row] for row in (0, 1)] == cut

def test_greedy_generation_takes_the_argmax_of_a_full_forward():
    m, row = make(tiny()), [5, 6]
    text = sample.generate(m, [row], sample.Sampling(10, temperature=0.0))[0]
    for _ in range(10): row.append(int(m(torch.tensor([row]))[0][0, -1].argmax()))
    assert row[2:] == text

def test_text_stream_waits_for_whole_characters():
    tokenizer, out = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT]), []
    stream = sample.TextStream(tokenizer, out.append)
    for b in "né🌍".encode() + b"\xe4": stream.put(b)
    stream.flush()
    assert [text for text in out if text] == ["n", "é", "🌍", "\ufffd"]

# -----------------------------------------------------------------------------
# train.py

CPU = train.Machine(torch.device("cpu"), torch.float32, False, 1e12, "")

def small_run(steps=12, **more):
    """(model, optimizer, loader, cfg, evaluation) on a text of random tokens with structure."""
    cfg = train.TrainConfig(minutes=None, steps=steps,
                            **{**dict(batch_size=4, evals=2, log_steps=4, lr=1e-2), **more})
    torch.manual_seed(cfg.seed)
    m, opt = train.build(tiny("modern", seq_len=8, dropout=0.1), cfg, CPU)
    tokens = (np.arange(600) ** 2 % 61).astype(np.uint16)
    loader = data.Loader(tokens, 8, cfg.batch_size, cfg.seed)
    return m, opt, loader, cfg, lambda model: sample.evaluate(
        model, data.in_order(tokens[:101], 8, 4), 250, CPU.device)

def small_fit(run, resume=False, step=train.local_step, **more):
    m, opt, loader, cfg, check = small_run(**more)
    train.fit(m, opt, loader, cfg, CPU, run, resume=resume, evaluation=check, step=step)

def losses_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[(r["step"], r[kind]) for r in rows if kind in r] for kind in ("loss", "valid")]

def test_accumulation_gives_the_gradients_of_the_whole_batch():
    m, x, y = make(tiny("modern")), ids(6, 10), ids(6, 10, seed=1)
    y[4:, 3:] = -1  # the last micro-batch counts fewer targets than the others
    loss = m(x, y)[0].sum() / (y >= 0).sum()
    want = [loss, *torch.autograd.grad(loss, list(m.parameters()))]
    for micro in (6, 2, 1):
        m.zero_grad()
        got = train.local_step(m, list(zip(x.split(micro), y.split(micro))))
        got = [got, *(p.grad for p in m.parameters())]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want))

def test_evaluation_counts_every_token_once_whatever_the_batch():
    m, tokens = make(tiny()), np.random.default_rng(0).integers(0, 61, 333)
    x, nats = torch.tensor(tokens), 0
    for i in range(0, 332, 24):
        targets = x[None, i + 1:i + 25]
        nats += m(x[None, i:i + 24][:, :targets.shape[1]], targets)[0].sum().item()
    for batch_size in (1, 5, 100):
        out = sample.evaluate(m, data.in_order(tokens, 24, batch_size), 500, CPU.device)
        assert out["tokens"] == 332 and out["loss"] == pytest.approx(nats / 332)
        assert out["bits_per_byte"] == pytest.approx(nats / math.log(2) / 500)

def test_shannons_ladder_on_a_text_counted_by_hand():
    text = np.array([0, 1] * 50)
    out = sample.shannon(text, text, 4, n_bytes=100)
    assert out["uniform"] == pytest.approx(99 * 2 / 100)
    assert out["unigram"] == pytest.approx(99 * -math.log2(51 / 104) / 100)  # (50 + 1) / (100 + 4)
    p01, p10 = (50 + 51 / 104) / 51, (49 + 51 / 104) / 50  # one kind of follower each
    assert out["bigram"] == pytest.approx(-(50 * math.log2(p01) + 49 * math.log2(p10)) / 100)

@pytest.mark.parametrize("dies_at", [7, 8])  # 7: after the evaluation of step 6, before a save
def test_a_run_that_is_resumed_repeats_the_undisturbed_one_bit_for_bit(tmp_path, dies_at, capsys):
    whole, cut, calls = tmp_path / "whole", tmp_path / "cut", itertools.count(1)
    class Dead(Exception): pass
    def step(*args):
        if next(calls) == dies_at: raise Dead
        return train.local_step(*args)
    small_fit(whole)
    with pytest.raises(Dead): small_fit(cut, step=step, save_minutes=0.0)
    small_fit(cut, resume=True, save_minutes=0.0)  # its dropout goes on from the checkpoint
    sample.compare(whole, cut)
    assert capsys.readouterr().out.count("+0.0000") == 10  # at equal tokens, and at equal FLOPs
    assert losses_of(whole) == losses_of(cut) and len(losses_of(whole)[0]) == 5
    a, b = (model.load_tensors(run / "model.safetensors")[0] for run in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys):
    small_fit(tmp_path, save_minutes=0.0)
    newest, older = train.checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-50])
    load = partial(train.load_checkpoint, tmp_path, *small_run()[:2])
    assert load().step == int(older.stem.split("-")[1]) == 11
    assert str(newest) in capsys.readouterr().out
    older.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint that is whole"): load()

def test_a_step_without_a_finite_loss_is_skipped_and_three_end_the_run(tmp_path):
    calls, seen = itertools.count(1), []
    def step(m, batches):
        n, loss = next(calls), train.local_step(m, batches)
        seen.append(m)
        if n in (3, 4, 6, 7, 8): (loss if n == 3 else next(m.parameters()).grad).fill_(math.nan)
        return loss
    with pytest.raises(SystemExit, match="checkpoint-00000006"): small_fit(tmp_path, step=step)
    assert all(torch.isfinite(p).all() for p in seen[0].parameters())
    assert all(math.isfinite(loss) for _, loss in losses_of(tmp_path)[0])

TEXT = "".join(f"{i} times {j} is {i * j}\n" for i in range(40) for j in range(40))

def call(script, *flags):
    return script.main(script.build_parser().parse_args([*map(str, flags)]))

train_main = partial(call, train, "--device", "cpu", "--dataset", "text.txt", "--tokenizer", "byte")

TINY = ("--n_layers", 1, "--d_model", 16, "--n_heads", 2, "--seq_len", 16, "--batch_size", 4,
        "--log_steps", 1)

@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty folder with a text file, as the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_in_bfloat16_compiled_as_a_cpu_does_in_float32():
    """The same weights and batches; bfloat16 keeps eight bits, so curves agree to two digits."""
    curves = []
    for device, dtype, compiled in (("cpu", torch.float32, False), ("cuda", torch.bfloat16, True)):
        machine = train.Machine(torch.device(device), dtype, compiled, 1e12, "")
        _, _, loader, cfg, _ = small_run(steps=30, log_steps=1)
        m, opt = train.build(tiny("modern", seq_len=8), cfg, machine)
        losses = []
        def step(model, batches):
            losses.append(train.local_step(model, batches))
            return losses[-1]
        train.fit(m, opt, loader, cfg, machine, step=step)
        curves.append([loss.item() for loss in losses[-30:]])  # compiling takes a step of its own
    assert curves[0] == pytest.approx(curves[1], rel=0.05) and curves[1][-1] < curves[1][0] - 0.5

def test_owt_from_a_mirror_goes_from_download_to_sample_and_board(desk, capsys):
    text = (EOT + "\n").join(TEXT.splitlines()).encode()
    files = {f"owt_{part}.txt.gz": gzip.compress(text[-n:])
             for part, n in (("train", 0), ("valid", 900))}
    with server(files) as (url, _):
        call(train, *TINY, "--dataset", "owt", "--mirror", url, "--steps", 3, "--vocab_size", 300,
             "--device", "cpu", "--run", "one")
    out = capsys.readouterr().out
    assert "no CUDA device: a small model trains on the same data for 3 steps" in out
    assert "sample:" in out and "validation bits_per_byte" in out
    call(sample, "--run", "one", "--prompt", "7 times", "--max_tokens", 5)
    assert capsys.readouterr().out.startswith("7 times")
    row = json.loads((desk / "runs/one/result.json").read_text())
    for name, score in (("two", 0.1), ("three", 99.0)):
        (desk / "runs" / name).mkdir()
        result = json.dumps(row | {"bits_per_byte": score})
        (desk / "runs" / name / "result.json").write_text(result)
    call(train, "--board")
    ranks = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert ranks == ["two", "one", "three"]
    assert json.loads((desk / "runs/one/config.json").read_text())["model_config"]["d_model"] == 16

def test_a_race_trains_each_value_and_seed_and_prints_a_table(desk, capsys):
    train_main(*TINY, "--steps", 3, "--race", "mixers=A,S", "--seeds", 2, "--threads", 1)
    head, *table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[0] == "mixers" and [row[0] for row in table] == ["A", "S"]
    for mixer, _, mean, std, *_ in table:
        runs = [desk / f"runs/race-mixers-{mixer}-{i}" for i in (1, 2)]
        results = [json.loads((run / "result.json").read_text()) for run in runs]
        a, b = (result["bits_per_byte"] for result in results)
        assert (mean, std) == (f"{(a + b) / 2:.4f}", f"{abs(a - b) / 2 ** 0.5:.4f}")
        assert all(r["tokens_per_s"] > 0 and r["memory_bytes"] > 1e8 for r in results)
        configs = [train.resumed(run, {}) for run in runs]
        assert [c["model"]["mixers"] for c in configs] == [mixer, mixer]
        assert [c["train"]["seed"] for c in configs] == [0, 1]

def test_walk_and_profile_leave_no_run(desk, capsys):
    train_main(*TINY, "--walk")
    out = capsys.readouterr().out
    assert "9. the same batch again" in out and "layers.0.self_attn.q_proj" in out
    before, after = re.search(r"loss (\S+) -> (\S+)", out).groups()
    assert float(after) <= float(before)
    train_main(*TINY, "--profile")
    assert "aten::mm" in capsys.readouterr().out and (desk / "runs/trace.json").exists()
    train_main(*TINY, "--noise")
    assert "gradient noise scale" in capsys.readouterr().out
    assert not list(desk.glob("runs/*/train.json"))

def test_the_micro_batch_is_halved_until_it_fits_and_the_batch_stays():
    (m, opt, loader, cfg, _), sizes = small_run(), []
    def step(forward, batches):
        sizes.append(len(batches[0][0]))
        if sizes[-1] > 1: raise torch.OutOfMemoryError
    machine = dataclasses.replace(CPU, compile=True)
    assert train.warm_up(m, opt, loader, cfg, machine, step)[1] == 1 and sizes == [4, 2, 1]
    assert loader.seen == 0 and sum(len(x) for x, _ in train.take(loader, 1, CPU.device)) == 4

@pytest.mark.parametrize("flags, word", [
    ("--preset gpt7", "gpt2"), ("--dataset nowhere", "stdlib"), ("--minutes -1", "minutes"),
    ("--batch_size 6 --micro_batch 4", "micro_batch"), ("--optimizer adamm", "adamw"),
    ("--minutes 1 --steps 5", "steps"), ("--batch_size 100000", "batch_size"),
    ("--resume --run none", "resume"), ("--n_heads 7", "n_heads"), ("--device abacus", "device"),
    ("--race mixers=A,Q", "mixers"), ("--race lr=1e-3,fast", "float"),
    ("--race width=3,4", "FIELD"), ("--race seed=1 --run x", "--run")])
def test_bad_flags_give_one_message_and_status_two(desk, flags, word, capsys):
    with pytest.raises(SystemExit) as e: train_main(*TINY, *flags.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and word in err and "Traceback" not in err
    assert not list(desk.glob("runs/*"))

def test_resuming_with_another_configuration_names_the_difference(desk, capsys):
    train_main(*TINY, "--steps", 3, "--run", "one")
    for flags, says in (("--resume --lr 0.5", "lr: got 0.5, wanted None"), ("", "exists"),
                        ("--resume --softcap 3.0", "softcap: got 3.0, wanted None")):
        with pytest.raises(UserError, match=says):
            train_main(*TINY, "--steps", 3, "--run", "one", *flags.split())
    (desk / "text.txt").write_text(TEXT[::-1])
    with pytest.raises(UserError, match="another text"):
        train_main(*TINY, "--run", "one", "--resume")

def test_a_run_killed_while_data_is_prepared_can_be_resumed(desk, monkeypatch):
    real, asked = train.prepare, []
    def prepare(*flags):
        asked.append(flags)
        if len(asked) == 1: raise KeyboardInterrupt
        return real(*flags)
    monkeypatch.setattr(train, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt): train_main(*TINY, "--steps", 2, "--run", "one")
    call(train, "--resume")
    assert asked[0] == asked[1] and (desk / "runs/one/result.json").exists()

def test_a_run_never_trains_on_its_own_files(desk, capsys):
    train_main(*TINY, "--dataset", ".", "--steps", 2, "--run", "one")  # runs/ lies in this folder
    train_main(*TINY, "--dataset", ".", "--steps", 2, "--run", "two")
    train_main("--dataset", ".", "--run", "one", "--resume")
    assert "text of 1 files" in capsys.readouterr().out

def test_a_full_disk_ends_training_with_a_message_and_loses_nothing(desk, monkeypatch, capsys):
    def full(path, *rest):
        if "00000002" in str(path): raise UserError(f"cannot write {path}: No space left on device")
        model.save_tensors(path, *rest)
    flags = (*TINY, "--steps", 3, "--run", "one", "--save_minutes", 0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(train, "save_tensors", full)
        train_main(*flags)
    assert e.value.code == 2 and "No space left" in capsys.readouterr().err
    train_main(*flags, "--resume")
    assert [step for step, _ in losses_of(desk / "runs/one")[0]] == [1, 2, 3]

def test_evaluation_on_a_part_counts_the_bytes_of_that_part(desk):
    corpus = data.prepare("text.txt", "byte")
    n = corpus.info["valid"]["tokens"]
    assert corpus.info["valid"]["bytes"] == n - 2  # a byte a token, less two end-of-texts
    for limit, wanted in ((101, (101, 100)), (None, (n, n - 2))):
        tokens, n_bytes = train.validation(corpus, limit)
        assert (len(tokens), n_bytes) == wanted

def test_prompts_that_are_empty_or_too_long_are_refused(desk):
    train_main(*TINY, "--steps", 1, "--run", "one")
    for run, prompt, says in (("one", "\udce9", "not UTF-8"), ("one", "", "empty"),
            ("one", "x" * 17, "at most the context, 16"), ("two", "x", "known under runs/: one")):
        with pytest.raises(UserError, match=says): call(sample, "--run", run, "--prompt", prompt)

def test_killed_at_any_moment_a_run_goes_on_as_if_undisturbed(desk):
    def run(name, *flags, at="never", send=0):
        command = [sys.executable, HERE / "train.py", "--device", "cpu", "--dataset", "text.txt",
                   "--tokenizer", "byte", *map(str, TINY), "--steps", "60", "--save_minutes", "0",
                   "--threads", "1", "--dtype", "float32", "--run", name, *flags]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if line.startswith(at):
                child.send_signal(send)
                break
        return child.stdout.read(), child.wait()
    assert run("whole")[1] == 0
    assert run("killed", at="step     20", send=signal.SIGKILL)[1] == -9  # it can tidy nothing up
    said, status = run("killed", "--resume", at="step     40", send=signal.SIGTERM)
    assert status == 0 and "SIGTERM: stopped after step" in said
    assert not list(desk.glob("runs/killed/result.json"))  # stopped is not finished
    assert run("killed", "--resume")[1] == 0
    assert losses_of(desk / "runs/killed") == losses_of(desk / "runs/whole")
    assert len(losses_of(desk / "runs/whole")[0]) == 60

# -----------------------------------------------------------------------------
# sample.py: the engine

def one_at_a_time(m, row, how):   # greedy, all of the text through the model for each token
    row, n, begin = list(row), len(row), 0
    while len(row) < n + how.max_tokens and row[n:][-1:] != [5]:
        if len(row) - begin > m.cfg.seq_len: begin = len(row) - m.cfg.seq_len // 2
        row.append(int(m(torch.tensor([row[begin:]]))[0][0, -1].argmax()))
    return row[n:-1] if row[-1] == how.stop else row[n:]

SERVED = [dict(n_kv_heads=2), dict(mixers="WA", window=5), dict(ffns="x", bigram=300),
          *(dict(mixers=letters) for letters in ("MA", "DA", "SL", "H"))]

def schedule(seed):   # a random engine, and texts at random times, against one at a time
    rng = random.Random(seed)
    m, size = make(tiny(**SERVED[seed % len(SERVED)])), rng.choice([1, 2, 3, 8])
    guess = rng.choice([None, sample.look_up(61), sample.draft_of(m)])
    engine = sample.Engine(m, rng.choice([0, 60, 200]) // size, size, rng.choice([1, 3, 7, 40]),
                           rng.choice([1, 2, 9]), guess, rng.choice([1, 3]))
    some, jobs, todo = partial(rng.choices, range(61)), {}, rng.randrange(1, 4)
    start = some(k=12)
    while todo or engine.texts:
        if todo and rng.random() < 0.4:
            prompt = rng.choice([7, 8]), *start[:rng.randrange(13)], *some(k=rng.randrange(12))
            job, todo = (prompt, sample.Sampling(rng.choice([1, 5, 21]), 0.0, stop=5)), todo - 1
            jobs[job] = [engine.add(*job) for _ in range(rng.choice([1, 3]))]
        if jobs and rng.random() < 0.03: jobs[job][-1].ended = "left"
        engine.step()
        assert sum(engine.ref) == sum(len(text.blocks) for text in engine.texts)
        assert all((n == 0) == (b in engine.idle) for b, n in enumerate(engine.ref) if b)
    for job, texts in jobs.items():
        want = one_at_a_time(m, *job)
        for text in texts: assert text.new == want[:text.n_new if text.ended == "left" else None]
    return engine

@torch.no_grad()
def test_random_schedules_say_what_decoding_one_at_a_time_says_and_lose_no_block():
    engines = [schedule(seed) for seed in range(40)]
    assert sum(e.accepted for e in engines) > 9 < sum(e.guessed - e.accepted for e in engines)

@pytest.mark.parametrize("mixers, computed", [("A", 17 + 4 * 1), ("D", 5 * 17)])
def test_samples_of_a_prompt_share_its_reading(mixers, computed):   # a state is not shared
    m, read, how = make(tiny(mixers=mixers)), [], partial(sample.Sampling, 3)
    m.embed_tokens.register_forward_hook(lambda _, x, y: read.append((x[0] > 0).sum().item()))
    out = sample.generate(m, [[1] * 17], how(), n=5, size=4)
    assert sum(read) == computed + 5 * 2 - sum(text[:2].count(0) for text in out)   # 0 is padding
    assert out == [sample.generate(m, [[1] * 17], how(seed=i))[0] for i in range(5)]

def test_verified_guesses_have_exactly_the_models_distribution():
    rng, V = np.random.default_rng(0), 4
    draw = lambda *shape: torch.tensor(rng.dirichlet(np.full(V, 0.5), shape))
    p1, p2, p3, q1, q2 = draw(), draw(V), draw(V, V), draw(), draw(V)   # by the tokens before
    total = torch.zeros(V, V, V).double()
    for a, b in itertools.product(range(V), repeat=2):
        stack = [((), q1[a] * q2[a, b])]
        while stack:   # all that verify may do after guesses a, b
            path, chance = stack.pop()
            def choose(p, left=iter(path)):
                for choice in left: return choice
                stack.extend(((*path, i), chance * x) for i, x in enumerate(p) if x)
                raise StopIteration
            p, q = torch.stack([p1, p2[a], p3[a, b]]), torch.stack([q1, q2[a]])
            try: x, *more = sample.verify(p, q, [a, b], choose)
            except StopIteration: continue
            later = [p2[x][:, None] * p3[x], p3[x, more[:1]], 1.0][len(more)]   # the model goes on
            total[(x, *more)] += chance * (later[0] if len(more) == 1 else later)
    assert (total - p1[:, None, None] * p2[:, :, None] * p3).abs().max() < 1e-12

def test_a_draft_model_changes_the_speed_and_not_the_frequencies():
    target, small = (make(tiny(vocab_size=3, d_model=d)) for d in (16, 8))
    texts = sample.generate(target, [[0]], sample.Sampling(3, temperature=1.5), n=900,
                            guess=sample.draft_of(small), k=2)
    p = target(torch.tensor([[0, a] for a in range(3)]))[0].div(1.5).softmax(-1)
    want = 900 * (p[0, 0, :, None] * p[:, 1]).flatten()   # of the first two tokens
    got = torch.tensor([3 * a + b for a, b, _ in texts]).bincount(minlength=9)
    assert ((got - want) ** 2 / want).sum() < 26.1   # of 8 degrees of freedom: once in a thousand

def test_eight_bits_are_rounded_by_half_a_step_at_most():
    linear, x = kernels.Linear(7, 5, bias=True).double(), torch.randn(2, 3, 7).double()
    w = (q := sample.Int8(linear)).weight * q.scale[:, None]
    assert ((w - linear.weight).abs() <= 0.501 * q.scale[:, None]).all()
    assert torch.allclose(q(x), x @ w.mT + linear.bias)

def test_sliding_windows_count_each_token_once_behind_enough_others():
    batches = list(sample.sliding(np.arange(83), 24, 10))
    assert torch.cat([y[y >= 0] for _, y in batches]).tolist() == list(range(1, 83))
    for x, y in batches: assert x.shape[1] <= 24 and (x[0, 0] == 0 or (y[:, :14] < 0).all())
    assert all(((y < 0) | (y == x + 1)).all() for x, y in batches)

def test_a_stop_string_ends_a_text_wherever_tokens_cut_it():
    tokenizer, out = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT]), []
    stream = sample.TextStream(tokenizer, out.append, ["<end>", "\nQ:"])
    assert [stream.put(b) for b in b"a<en<end>"] == 8 * [False] + [True]
    assert out[0] == "a" and "".join(out) == "a<en"

def test_the_lesson_computes_the_table_of_a_13b_model(monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", lambda *_: None)
    sample.lesson()
    rows = " ".join(re.findall(r"[.\d]+ GB +[.\d]+ ms", capsys.readouterr().out))
    assert rows == ("26.87 GB   8.02 ms 79.72 GB  23.80 ms 240.78 GB  71.87 ms 33.41 GB   9.97 ms "
                    "65.63 GB  19.59 ms")   # CS336, lecture 10
