"""test_all.py - what is true of this codebase, as sentences that run: pytest test_all.py -k WORDS

Every test is a property held against an oracle that does not share its code: integers worked by
hand, plain torch or numpy written in the test, autograd, float64, torch's own implementations, a
conservation law. References are held against oracles and fast versions against references.
Tests run in a temporary directory, without network and without a GPU, in minutes on two cores.
"""
import ast, contextlib, dataclasses, errno, gzip, hashlib, html, http.server, importlib, io
import itertools, json, math, os, random, re, shlex, shutil, signal, subprocess, sys, threading
import time, types
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import align, bpe, data, kernels, model, optim, parallel, sample, scaling, train
from bpe import EOT, UserError

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
HERE, cases = Path(__file__).parent, pytest.mark.parametrize
def call(script, *words):  # one text as one would type it, or its words
    words = shlex.split(words[0]) if len(words) == 1 else map(str, words)
    script.main(script.build_parser().parse_args(list(words)))
def said(*words):  # what a command prints
    with contextlib.redirect_stdout(io.StringIO()) as out: call(*words)
    return out.getvalue()

# -----------------------------------------------------------------------------
# The house: budgets, imports, configuration, README.md

IMPORTS = {"bpe": "", "kernels": "", "data": "bpe", "model": "bpe kernels", "optim": "bpe kernels",
           "sample": "model bpe kernels", "train": "model optim data bpe sample kernels",
           "align": "train model optim data sample bpe kernels"}   # script: whom it may import
IMPORTS |= dict.fromkeys(["parallel", "scaling"], "train model optim data bpe kernels")
PACKAGES = {"torch", "triton", "numpy", "regex", "tqdm", "pytest"} | set(sys.stdlib_module_names)
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
                else: assert top in PACKAGES, f"{name} imports {top}"

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

@cases("pattern, words", [   # a bar is where the text is cut
    ("gpt2", "it|'s| 42| dogs|  | a|\t|b|'|Se|\u0301|x|!?|\n "),
    ("llama3", "it|'S| |123|4|.\n\n|\ta|  | b|$c|\u0301e| ;\n|//|x| \n| "),
    ("qwen2", "a|1|2|3|\n\n| b| \n| "), ("cl100k", "a| \n| b|'LL| |123|4|$c| \n "),
    ("o200k", "camel|Case's| HTML|.Pine\u0301e'LL|'t| |123|4| ;\n//|x| \n| ")])
def test_a_text_is_cut_into_the_words_worked_by_hand(pattern, words):
    assert bpe.split_words(words.replace("|", ""), pattern) == words.split("|")

@cases("text, pattern, merges", [("the cat in the hat", None, "t-h th-e the- "), (
    "low\n" * 5 + "lower\n" * 2 + "widest\n" * 3 + "newest\n" * 6, "gpt2",   # Sennrich et al. 2016
     "s-t e-st o-w l-ow w-est n-e ne-west w-i wi-d wid-est low-e lowe-r"),
    # At last (" ", "d"), seen first and the greater if joined, and (" a", "nd") have 2: " a" > " "
    ("nd\nnd\nnd\nnd a a a a a d d and and", "gpt2", " -a n-d  a-nd")])
def test_training_learns_the_merges_worked_by_hand(text, pattern, merges):
    _, got = bpe.train_reference(text, 256 + merges.count("-"), [], pattern)   # train equals it
    assert " ".join(f"{a.decode()}-{b.decode()}" for a, b in got) == merges

def test_train_equals_the_reference_serial_and_parallel(tmp_path, trained, monkeypatch):
    for seed in range(60):
        rng, some = random.Random(seed), [[], [EOT], ["ab", "aba", "ab"], ["<a b>", EOT]][seed % 4]
        text = random_text(rng, rng.randrange(1, 300)) + "".join(rng.choices([*some, "a"], k=9))
        (tmp_path / "t").write_text(text, newline="")
        args = 256 + len(some) + rng.randrange(40), some
        assert bpe.train(tmp_path / "t", *args) == bpe.train_reference(text, *args)
    monkeypatch.setattr(bpe, "BLOCK", 10_000)   # makes a dozen jobs of the file
    for end, workers in ((None, 1), (None, 2), (20_000, 2)):   # the file is ASCII
        want = bpe.train_reference(trained[0].read_text()[:end], 280, [EOT])
        assert bpe.train(trained[0], 280, workers=workers, max_bytes=end) == want

@cases("pattern", bpe.SPLIT_PATTERNS)
def test_encode_replays_merges_and_no_cut_changes_an_id(tmp_path, monkeypatch, pattern):
    latin, path = [EOT, *"ab| x| y|'s|y\n|\u4f60 |\u00e9|!\n|1| |<b>|, ".split("|")], tmp_path / "t"
    monkeypatch.setattr(bpe, "CACHE_SIZE", 10)
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
        start = "".join(bpe.read_blocks(path, specials, 50 + seed))
        assert text.startswith(start) and 46 + seed < len(start.encode()) <= 50 + seed
    assert next(tok.encode_iter(iter(lambda: "a b", None))) == 97   # of a text that never ends
    assert max(map(len, bpe.blocks(["a, b c d "] * 9999, []))) <= 200   # memory is bounded
    path.write_bytes(b"a\xe4")   # ends within a character
    assert [*bpe.read_blocks(path, [])] == ["a\ufffd"]

def test_decode_undoes_encode_for_every_code_point_and_special_tokens_are_whole(trained, capfd):
    anything, plain = [*map(chr, range(0x110000))], trained[1]   # and lone halves of UTF-16 pairs
    for text in ("".join(anything), "".join(random.Random(0).choices(anything, k=1_000_000)), "",
            EOT[1:] + EOT[:-1] + f" {EOT} {EOT}{EOT}\n", "\ud83d\ude00", " " * 400_000):  # in 1 s
        assert plain.decode(plain.encode(text)) == text
    assert plain.decode([0xE3, 65]) == "\ufffdA" and plain.decode([195, 169]) == "\u00e9"
    tok = bpe.Tokenizer(plain.vocab, plain.merges, [EOT, "<|a|>", "<|a|><|b|>"])
    assert tok.eot == 699 and tok.encode(f"<|a|><|b|><|a|>{EOT}") == [701, 700, 699]
    assert tok.encode(EOT, "text") == replay(tok, EOT)
    assert bpe.CharTokenizer(["a"], ["bc"], "gpt2").encode("bc", "text") == [2]   # unknown
    with pytest.raises(UserError, match="no special token"): tok.encode("a" + EOT, "refuse")
    for word in "\u0120s", " self":   # " s" as GPT-2 spells it; a token already
        with pytest.raises(UserError): bpe.Tokenizer(tok.vocab, tok.merges, [word]).to_text()
    with pytest.raises(UserError): [*bpe.parallel_map(bpe.special_splitter, zip([[EOT], ["x"]]), 2)]
    assert capfd.readouterr().err.count("got 'x'") == 1   # a worker's mistake is not printed twice

SPELLED = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}   # by GPT-2
for b in range(256): SPELLED.setdefault(b, chr(256 + len(SPELLED) - 188))

@pytest.fixture
def formats(tmp_path, trained):   # {file in tmp_path: its content}, the tokenizer in every format
    tok, spell = trained[1], lambda token: "".join(SPELLED[b] for b in token)
    merges = "\n".join(["#version: 0.2", *(f"{spell(a)} {spell(b)}" for a, b in tok.merges)])
    files = {"vocab.json": json.dumps({spell(token): i for token, i in tok.ids.items()}),
             "merges.txt": merges, "t.json": tok.to_text(), "a.tiktoken": tok.to_text("a.tiktoken")}
    for name, content in files.items(): (tmp_path / name).write_text(content, encoding="utf-8")
    return files

def test_every_format_gives_the_same_ids_and_the_hash_is_the_files(tmp_path, trained, formats):
    text = random_text(random.Random(0), 500) + EOT + "def hello"
    char = bpe.CharTokenizer("hello \u00e9\n", [EOT, "\u00e9"])
    for tok, names in (char, []), (trained[1], formats):
        tok.save(tmp_path)
        assert tok.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        for name in "", *names:
            got = bpe.load_tokenizer(tmp_path / name, "gpt2", {EOT: 699})
            assert got.vocab == tok.vocab and got.special_tokens == tok.special_tokens
            assert got.encode(text) == tok.encode(text)
    with open(file := tmp_path / "a.tiktoken", "a") as f: f.write("Y2Fi 800")   # no merge makes cab
    assert bpe.load_tokenizer(file, "gpt2", {}).encode("cab cab") == [800, *tok.encode(" cab")]

@cases("kind, normalizer, merges, text, ids", [   # as their files spell them
    ("llama3", None, [["a", "b"], ["3", "4"]], "cab cab1234<s>34",   # "cab" is a token, " cab" not
     [258, 220, 66, 256, 16, 17, 18, 19, 999, 257]),                 # 123 and 4 are apart
    ("qwen2", {"type": "NFC"}, ["\u00c3 \u00a9", "1 2"], "e\u0301\u00e9<s>12",
     [256, 256, 999, 16, 17])])
def test_a_tokenizer_json_of_others_gives_ids_worked_by_hand(kind, normalizer, merges, text, ids):
    pattern, made = bpe.SPLIT_PATTERNS[kind], ["".join(pair).replace(" ", "") for pair in merges]
    vocab = dict(zip([*SPELLED.values(), *made, "cab"], range(259)))
    assert bpe.from_json({"normalizer": normalizer, "pre_tokenizer": {"pretokenizers": [
            dict(type="Split", behavior="Isolated", invert=False, pattern={"Regex": pattern}),
            dict(type="ByteLevel", add_prefix_space=False, use_regex=False)]},
        "added_tokens": [{"id": 999, "content": "<s>", "lstrip": False}],
        "post_processor": {"type": "TemplateProcessing"}, "model": dict(
            type="BPE", ignore_merges=kind == "llama3", merges=merges, vocab=vocab)},
        ).encode(text) == ids

@cases("name, old, new", [*(("t.json", *pair) for pair in [
    ('"BPE"', '"BPE", "dropout": 0.1'), ('lstrip": false', 'lstrip": true'), ("BPE", "WordPiece"),
    ('zer": null', 'zer": {"type": "Lowercase"}'), ("Split", "Digits"), ("Isolated", "Removed"),
    ('"version"', '"post_processor": {"type": "X"}, "version"'), ("N}+|", "N}|"), ('"s e', '"s 12'),
    ('"!": 33', '"!": 34')]), *(("a.tiktoken", "\nIQ== 33", new) for new in (
        "\nI== 33", "\n33", "", "\nIQ== 3", "\nIQ== 33\nIQ== 900")),   # at last a token twice
    ("merges.txt", "\ns e", "\ns 12"), ("merges.txt", "\ns e", "\nse")])
def test_a_file_that_is_damaged_or_asks_for_more_is_named(tmp_path, formats, name, old, new):
    assert old in formats[name]   # as it is, the test above loads it
    (tmp_path / name).write_text(formats[name].replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=name): bpe.load_tokenizer(tmp_path / name, "gpt2")

def test_the_page_of_show_tells_id_bytes_and_rank_and_needs_no_other_file(tmp_path, trained):
    (_, tok), file, text = trained, str(tmp_path / "t.json"), f"<b>self</b> &amp; \u4f60{EOT}"
    tok.save(file)
    call(bpe, "show", text, "--html", file + "l", "--token", file)
    shown = re.findall(r'<i [^<>]*"([^"]*)">([^<]*)</i>', page := Path(file + "l").read_text())
    ranks = ["not merged"] * 256 + [f"rank {i}" for i in range(443)] + ["special"]
    assert [about for about, _ in shown] == [
        f"id {i} | bytes {tok.vocab[i].hex(' ')} | {ranks[i]}" for i in tok.encode(text)]
    assert "".join(t for _, t in shown) == html.escape(text).replace("\u4f60", r"\xe4\xbd\xa0")
    assert not re.search("http|<script|<b>|<link|<img", page)

@cases("error, seen", [(SystemExit(), SystemExit), (OSError(errno.ENOSPC, "full"),
    UserError), (OSError(errno.EACCES, "no", "input"), OSError)])   # the last: of another file
def test_atomic_write_leaves_the_old_file_when_the_writer_raises(tmp_path, error, seen):
    (tmp_path / "f").write_text("old")
    with pytest.raises(seen), bpe.atomic_write(tmp_path / "f") as file:
        file.write(b"new")
        raise error
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "old"

@cases("number, status", [(signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_ctrl_c_ends_training_quietly_and_no_worker_outlives_a_kill(tmp_path, number, status):
    (tmp_path / "big").write_text("".join(f"word{i} " for i in range(2_000_000)))
    child = subprocess.Popen([sys.executable, bpe.__file__, *"train big --out t.json".split()],
                             stdout=-1, stderr=-1, cwd=tmp_path, start_new_session=True)
    child.stdout.readline(), time.sleep(1)   # the workers are at it
    (os.killpg if status == 1 else os.kill)(child.pid, number)   # Ctrl-C goes to workers too
    error = child.communicate(timeout=30)[1]   # returns when no process holds the pipe any more
    assert b"Traceback" not in error and child.returncode == status
    assert status < 0 or os.listdir(tmp_path) == ["big"]

# -----------------------------------------------------------------------------
# data.py

data.WAIT_S, BODY = 0.001, np.random.default_rng(0).bytes(300_000)  # between two attempts
@contextlib.contextmanager
def server(files, drop=0, ranges=True, claim=0):
    asked = []      # the Range of each GET; the first `drop` replies break off, `claim` is untrue
    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None
        def do_GET(self):
            body, wanted = files.get(self.path.rpartition("/")[2]), self.headers["Range"]
            asked.append(wanted)
            if body is None: return self.send_error(404)
            tag = f'"{sum(body)}"'
            part = wanted and ranges and self.headers["If-Range"] in (None, tag)
            start, end = wanted[6:].split("-") if part else ("0", "")
            body = body[int(start):int(end or 1 << 40) + 1]
            self.send_response((206 if body else 416) if part else 200)
            self.send_header("ETag", tag)
            self.send_header("Content-Length", len(body) and len(body) + claim)
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if len(asked) <= drop else body)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()

@pytest.mark.parametrize("there, same, how, asked_for", [   # bytes there; of this version, or none
    (0, None, dict(drop=2), [None, "bytes=150000-", "bytes=225000-"]), (300_000, True, {}, []),
    (0, None, dict(drop=1, ranges=False), [None, "bytes=150000-"]), (1000, None, {}, [None]),
    (1000, True, {}, ["bytes=1000-"]), (1000, False, {}, ["bytes=1000-"])])
def test_a_download_ends_whole_and_asks_for_what_it_lacks(tmp_path, there, same, how, asked_for):
    file, part = tmp_path / "f", tmp_path / "f.part"
    with server({"f": BODY}, **how) as (url, asked):
        note = dict(url=f"{url}/f", size=300_000, version=f'"{sum(BODY) if same else 0}"')
        if there: part.write_bytes((BODY if same else b"?" * 1000)[:there])
        if same is not None: data.write_note(file, note)
        data.fetch(f"{url}/f", file)
        assert file.read_bytes() == BODY and not part.exists() and asked == asked_for
        if how.get("ranges", True): data.fetch(f"{url}/f", file.with_name("g"), 1000)
    assert asked == asked_for or asked.pop() == "bytes=0-999" and len(BODY) > 1000 == (
        file.with_name("g").stat().st_size)             # the first bytes alone

@pytest.mark.parametrize("says, name, place", [("416", "f", "f"), ("404", "g", "f"),
    ("cannot write", "f", "/dev/null/f")])              # 416: it is shorter than it claims
def test_a_failed_download_leaves_no_file_and_names_its_place(tmp_path, says, name, place):
    with server({"f": BODY}, claim=7) as (url, _), pytest.raises(UserError, match=says) as error:
        data.fetch(f"{url}/{name}", tmp_path / place)
    assert str(tmp_path / place) in str(error.value) and not (tmp_path / place).exists()

def read(corpus):
    return [corpus.tokenizer.decode(data.open_tokens(f)) for f in (corpus.train, corpus.valid)]

def test_a_packed_source_comes_from_a_mirror_and_its_text_is_enough_afterwards(tmp_path, capsys):
    prepare = partial(data.prepare, "owt", "byte", data_dir=tmp_path, workers=1)
    train = gzip.compress(b"One story.<|endoftext|>\nAnother one.<|endoftext|>" * 9)
    files = {"owt_train.txt.gz": train, "owt_valid.txt.gz": gzip.compress(b"Third. " * 9)}
    with server(files, drop=1) as (url, _): info = prepare(mirror=url + "/").info
    (tmp_path / "owt" / "owt_train.txt.gz").unlink()
    assert prepare().info == info and f"came from {url}" in capsys.readouterr().out
    assert info["train"]["documents"] == 18 and info["train"]["bytes"] == 9 * 23
    for name in files: (tmp_path / "owt" / name).write_bytes(train[:-9])    # by hand; cut short
    with pytest.raises(UserError, match="owt_train.txt.gz"): prepare()

def test_one_file_is_cut_as_nanogpt_cuts_it_and_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    for text, cut in ("".join(chr(32 + i * i % 90) for i in range(5003)), 4502), ("ä " * 95, 171):
        (tmp_path / "f").write_text(text)       # 0.9 * 5003; 0.9 * 285 bytes end within an ä
        prepare, free = partial(data.prepare, tmp_path / "f", data_dir=tmp_path, workers=1), 10**6
        assert read(made := prepare("char")) == [EOT + text[:cut] + EOT, EOT + text[cut:] + EOT]
        free = 100
        assert made.train.stat() == prepare("char").train.stat()        # it is not made again
        with pytest.raises(UserError, match="too little disk"): prepare("byte")

@pytest.mark.parametrize("tokenizer", data.TOKENIZERS)
def test_tokens_give_texts_back_and_a_kill_costs_a_block(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(bpe, "BLOCK", 40)
    texts = ["".join(f"Text {i} {j}: né 你 \ufffd\r\n\n" for j in range(i + 9)) for i in range(9)]
    for name, content in [("bad", b"Text: \xff \xe4\xbd\n\xe4"), ("no", b"MZ\0"), ("empty", b""),
                          (".x", b"x"), *((f"{i}", text.encode()) for i, text in enumerate(texts))]:
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")                # to open it would wait for ever
    prepare = partial(data.prepare, tmp_path, tokenizer, 300, tmp_path, workers=1)
    seen = []
    def killed(tok, text, encode=bpe.Tokenizer.encode):         # before the third is encoded
        if seen.append(text) or len(seen) == 3: raise KeyboardInterrupt
        return encode(tok, text)
    monkeypatch.setattr(bpe.Tokenizer, "encode", killed)
    with pytest.raises(KeyboardInterrupt): prepare()
    gone, alive = (next(tmp_path.glob("*/train.txt")).with_name(f".x.{pid}.tmp")
                   for pid in (1 << 23, os.getpid()))   # no pid is so large: what kill -9 leaves
    gone.touch(), alive.touch()
    corpus, found = prepare(), []
    assert re.search("of 10 files, 3 empty.* 3 invalid UTF-8", capsys.readouterr().out)
    assert len(seen) == len({*seen}) + 1 and not [*tmp_path.glob("*/*-parts-*")]
    assert alive.exists() and not gone.exists()
    for text, note in zip(read(corpus), corpus.info.values()):
        start, *documents, end = text.split(EOT)
        assert start == end == "" and note["documents"] == len(documents) > 0
        assert note["tokens"] == len(corpus.tokenizer.encode(text))
        assert note["bytes"] == len("".join(documents).encode())
        found += documents
    assert sorted(found) == sorted([*texts, "Text: \ufffd \ufffd\n\ufffd"])

@pytest.mark.parametrize("command, says", [("bpe train NO", "No such file"),   # capitals: files
    ("bpe encode CUT hi", "no tok"), ("bpe train EMPTY", "empty"), ("data get TINY", "got 4 bytes"),
    ("bpe train T --out /dev/null", "cannot write"), ("bpe train T --vocab_size 256", "wanted 257"),
    ("bpe encode NO hi", "No such file"), ("bpe decode GOOD 256", "0 to 255"),
    ("data get T --workers 0", "workers: got 0"), ("data get T --data_dir T", "cannot write"),
    ("data get openwebtxt", "stdlib, shakespeare"), ("data get owt --vocab_size 9", "size: got 9"),
    ("data get owt --tokenizer bpee", "bpe, byte, char"), ("data get BINARY", "got 0 bytes"),
    ("data get owt --mirror a.b/owt", "http://a.b/owt"), ("data get owt", "too little disk"),
    ("data funnel NO", "NO: got no file"), ("data funnel T --stages gophr", "got gophr"),
    ("data train-classifier T", "LABEL<tab>TEXT"), ("data look NO", "NO: got no file")])
def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    texts = dict(T="text " * 99, EMPTY="", TINY="tiny", BINARY="ELF\0" * 99, CUT='{"version": ',
                 GOOD=bpe.Tokenizer(dict(enumerate(bpe.BYTES))).to_text())
    for name, text in texts.items(): Path(name).write_text(text)
    (script, *words), there = command.split(), {*os.listdir()}
    with pytest.raises(UserError) as error: call(importlib.import_module(script), *words)
    assert error.value.code == 2 and says in str(error.value)
    assert capsys.readouterr().err == f"{error.value}\n" and {*os.listdir()} == there

@pytest.mark.parametrize("n, T, B", [(103, 8, 4), (97, 8, 3), (33, 4, 8), (20, 7, 1)])
def test_the_loader_gives_each_target_once_an_epoch_and_splits_by_rank(n, T, B):
    ids, found = np.random.default_rng(1).permutation(n).astype(np.uint16), []  # all different
    new = partial(data.Loader, ids, T, B, 3)
    batches = [*itertools.islice(loader := new(), loader.n_windows)]            # B epochs
    for tokens, targets in batches:
        assert tokens.shape == targets.shape == (B, T) and (tokens[targets < 0] == 0).all()
        found += zip(tokens[targets >= 0].tolist(), targets[targets >= 0].tolist())
    epochs = {tuple(found[i:i + n - 1]) for i in range(0, len(found), n - 1)}   # orders differ
    assert len(epochs) == B and {tuple(sorted(epoch)) for epoch in epochs} == {
        tuple(sorted(zip(ids[:-1].tolist(), ids[1:].tolist())))}
    loader.seek(B)
    for again in data.Loader(ids, T, B, **loader.state()), loader:
        assert torch.equal(next(again)[0], batches[1][0])
    for batch, *parts in zip(batches, *(new(rank=r, world=B) for r in range(B))):
        assert all(torch.equal(torch.cat(p), b) for b, *p in zip(batch, *parts))
    with pytest.raises(UserError, match="windows"): data.Loader(ids, T, 64)

PROSE = [f"The {a} that we saw with the {b} is as old as the {c}, and it was made of {d} and glass."
         for a, b, c, d in itertools.permutations("house river tower gate hill forest".split(), 4)]
def page(i, more=""):
    menu, text = "<li><a href=/>Home, again</a>" * 9, "<p>".join(PROSE[7 * i:7 * i + 7])
    return f"<title>T</title><ul>{menu}</ul><div><p>{text}{more}</div><script>x".encode()
def record(body, http="Content-Type: text/html\r\n", n=None):
    body = f"HTTP/1.1 200 OK\r\n{http}\r\n".encode() + body
    head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {n or len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"

def test_records_are_read_in_any_packing_and_charset_and_broken_ones_are_counted(tmp_path):
    text, kind = "Größe: naïve café ", "Content-Type: text/html; charset={}\r\n"
    raw = [record(text.encode()), record(text.encode("latin-1"), kind.format("iso-8859-1")),
           record(b"<meta charset=koi8-r>" + "Ж".encode("koi8-r")), record(text.encode("utf-16")),
           record(gzip.compress(text.encode()), "Content-Encoding: gzip\r\n"),
           record(b"2\r\nab\r\n3;x\r\ncde\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"),
           record(b"%PDF-1.4"), record(b"x").replace(b"200 OK", b"404 NO"), record(b"", n=10**12)]
    want, rng = [text, text, "<meta charset=koi8-r>Ж", text, text, "abcde"], random.Random(0)
    def read_docs(raw):
        counts, _ = data.Counter(), (tmp_path / "w").write_bytes(raw)
        return [doc["text"] for doc in data.read_docs(tmp_path / "w", counts)], counts
    for packed in b"".join(raw), gzip.compress(b"".join(raw)), b"".join(map(gzip.compress, raw)):
        found, counts = read_docs(packed)
        assert found == want and counts["not text (for PDF: pypdf)"] == counts["wrong lengths"] == 1
    assert read_docs(packed[:-9])[0] == want and read_docs(packed[:-9])[1]["broken gzip files"] == 1
    for mixed in map(bytearray, [packed, b"".join(raw), page(0)] * 13):     # no exception
        for _ in range(9): mixed[rng.randrange(len(mixed))] = rng.randrange(256)
        for text in *read_docs(mixed)[0], mixed.decode("latin-1"): data.extract(text)

def test_extraction_keeps_the_article_and_its_structure_and_drops_menus():
    more = "<ul><li>First<li>Second</ul><pre>def f():\n    pass</pre><h2>End</h2>"
    advert = "<div class=cookie-banner><p>Buy it, now, at our shop, it is cheap</p></div>"
    assert data.extract(page(0, more).decode() + advert) == "\n\n".join(PROSE[:7]) + (
        "\n  \u2022 First\n  \u2022 Second\n\ndef f():\n    pass\n\nEnd")
    assert data.extract("<div>" * 50_000) == data.extract("") == ""

def test_each_rule_keeps_prose_and_says_why_it_drops_what_was_spoilt():
    text = "\n\n".join(PROSE[:7])
    for rule, spoilt, says in [("gopher", text[:200], "words"), ("c4", text + "{", "{"),
            ("gopher", text + " 12" * 60, "letter"), ("fineweb", text + "\n" + text, "repeated")]:
        assert data.outside(rule, text) == "" and says in data.outside(rule, spoilt)
    for phone in "2831823829", "(283)-182-3829", "(283) 182 3829", "283-182-3829":
        assert data.mask(f"{phone}, a+b@c.co.uk, 192.0.2.1. 1.2.3.4.5", data.Counter()) == (
            "|||PHONE_NUMBER|||, |||EMAIL_ADDRESS|||, |||IP_ADDRESS|||. 1.2.3.4.5")

def test_a_text_is_dropped_if_it_is_like_one_that_was_kept_and_the_classifier_learns(tmp_path):
    rng, kept, state, file = random.Random(1), [], ([], {}), tmp_path / "t"
    docs = [[rng.choice("abcdefghij") * rng.randint(1, 9) for _ in range(60)] for _ in range(60)]
    for i in range(0, 60, 3): docs[i + 1] = [w if rng.random() > i / 600 else "x" for w in docs[i]]
    for doc in docs:
        grams = {tuple(doc[i:i + 5]) for i in range(56)}
        near = any(len(grams & other) / len(grams | other) >= .5 for other in kept)
        assert bool(data.like(" ".join(doc).upper() + "!", .5, *state)) == near
        kept += [grams] * (not near)
    assert 42 <= len(kept) < 57
    file.write_text("".join(f"{'xy'[i % 2]}\t{docs[i % 2 * 9][i % 50:]}\n" for i in range(90)))
    call(data, "train-classifier", file, "--out", f"{file}.npz")
    for label, doc in ("y", docs[9]), ("x", docs[0]):
        assert data.classify(str(doc)[3:200], f"{file}.npz")[label] > .7

def test_the_funnel_ends_in_the_same_bytes_after_a_kill_and_by_two_ranks(tmp_path, monkeypatch):
    for k in range(6): (tmp_path / f"{k}.warc.gz").write_bytes(b"".join(
        gzip.compress(record(page(i % 20))) for i in range(9 * k, 9 * k + 9)))
    flags = ["funnel", *map(str, sorted(tmp_path.glob("*.gz"))), "--stages=extract,dedup=.95,lines"]
    def run(out, workers=1):
        call(data, *flags, f"--workers={workers}", f"--out={tmp_path / out}")
        return (tmp_path / out / "text.txt").read_text()
    def done(out): return {f: f.stat().st_mtime_ns for f in (tmp_path / out).glob(".f*/*.jsonl")}
    whole = run("a")
    assert whole.split(EOT)[:-1] == ["\n\n".join(PROSE[7 * i:7 * i + 7]) for i in range(20)]
    slow = ("import data, sys, time; f = data.extract; data.extract = lambda p: time.sleep(.02) or "
            "f(p); data.main(data.build_parser().parse_args(sys.argv[1:]))")
    child = subprocess.Popen([sys.executable, "-c", slow, *flags, "--workers=1",
                              f"--out={tmp_path / 'b'}"], cwd=HERE, stdout=subprocess.DEVNULL)
    while not (times := done("b")): time.sleep(.01)
    child.kill(), child.wait()
    assert len(times) < 6 and not [*tmp_path.glob("b/*.txt")]
    assert run("b", 2) == whole and times.items() <= done("b").items()     # they are not made again
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError): run("c")     # the rest, and the text, is for rank 0
    monkeypatch.setenv("RANK", "0")
    assert len(done("c")) == 3 and run("c") == whole

# -----------------------------------------------------------------------------
# kernels.py and model.py

def test_roofline_takes_the_longer_of_two_times_and_a_device_the_longest_name_that_fits():
    roofline, row = partial(kernels.roofline_s, peak=10, bandwidth=10), kernels.device_row
    assert [roofline(100, 10), roofline(10, 100)] == [(10, "arithmetic"), (10, "memory")]
    assert row("NVIDIA H100 PCIe")[0] == 756e12 and row("NVIDIA H100 80GB HBM3")[0] == 989e12
    assert row("NVIDIA A10")[0] == 125e12 and row("NVIDIA A1000") is None

def tiny(name="llama", **more):
    row = {"n_layers": 2, "ffns": "s", **model.PRESETS[name], **more}
    sizes = dict(vocab_size=61, seq_len=24, n_layers=row["n_layers"], d_model=32, n_heads=4,
                 dropout=0.0, **{"n_experts": 4} if "x" in row["ffns"] else {})
    return model.preset(name, **{**sizes, **more})
def make(cfg, dtype=torch.float64):  # every parameter is random, so that none hides behind a zero
    torch.manual_seed(1)
    m = model.LM(cfg).to(dtype).eval()
    for p in m.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.5) + (p.ndim == 1)
    return m
def ids(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))
def numbers(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
close = partial(torch.allclose, atol=1e-10)  # float64, sums reordered
def agree(f, g, *x):  # in value and in gradient
    results = [(y, *torch.autograd.grad(y.square().sum(), x)) for y in (f(*x), g(*x))]
    assert all(torch.allclose(*pair, atol=1e-11) for pair in zip(*results))

EVERY = {name: dict(name=name) for name in model.PRESETS}  # and each letter that no preset has
for field, letters in dict(mixers=model.MIXERS, ffns=model.FFNS).items():
    used = "".join(getattr(tiny(name), field) for name in model.PRESETS)
    EVERY |= {letter: {field: letter} for letter in letters if letter not in used}
@pytest.fixture(params=EVERY)
def cfg(request): return tiny(**EVERY[request.param])

@cases("chunks", [[1] * 12, [5, 6, 1]])
def test_decode_with_cache_equals_full_forward_also_after_a_wrong_guess(cfg, chunks):
    m, x, parts = make(cfg), ids(3, 12), []
    cache = m.new_cache(3, 16)
    for part in x.split(chunks, dim=1):  # what is decoded sees no later token: nor does a forward
        n = cache[0].n
        m(ids(3, 4, seed=5), cache=cache)
        for c in cache: c.truncate(n)
        parts.append(m(part, cache=cache)[0])
    assert close(torch.cat(parts, 1), m(x)[0])

def test_padded_tokens_and_other_documents_in_a_row_change_nothing(cfg):
    m, texts, more = make(cfg), ids(3, 6), ids(2, 2, seed=5)
    pos = torch.tensor([[0, 1, -1, 2, -1, -1, -1, 3, 4, 5, *range(6)], [-1] * 10 + [*range(6)]])
    tokens, cache = torch.zeros_like(pos), m.new_cache(2, 20)
    tokens[pos >= 0] = texts.flatten()
    chunks = zip(*(x.split([5, 8, 3], 1) for x in (tokens, pos)))
    parts = [m(t, pos=p, cache=cache)[0] for t, p in chunks]
    for out in (m(tokens, pos=pos)[0], torch.cat(parts, 1)):
        assert close(out[pos >= 0].view(3, 6, -1), m(texts)[0])
    want = m(torch.cat((texts[1:], more), 1))[0][:, 6:]
    assert close(m(more, cache=cache)[0], want)  # positions go on

def test_window_cache_is_a_ring_that_stays_small_and_refuses_what_it_lost():
    m, x = make(tiny(mixers="W", window=5)), ids(1, 60)
    cache, want = m.new_cache(1, 60), m(x)[0]
    parts = [m(part, cache=cache)[0] for part in x.split([7, 1, 1, 30, 2, 19], dim=1)]
    assert close(torch.cat(parts, 1), want)
    assert cache[0].columns[0].shape[2] == 5 + kernels.KVCache.SLACK
    for c in cache: c.truncate(44)
    with pytest.raises(AssertionError, match="cannot keep 42"): cache[0].truncate(42)
    assert close(m(x[:, 44:], cache=cache)[0], want[:, 44:])

def test_every_parameter_gets_a_finite_gradient(cfg):
    m = make(cfg, torch.float32).train()
    m(ids(2, 12), ids(2, 12, seed=4))[0].mean().backward()
    for name, p in m.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name

def test_flops_formula_equals_torchs_counter(cfg, monkeypatch):
    plain = lambda q, k, v, mask=None, p=0.0: kernels.attention_reference(q, k, v, mask)
    for module in (kernels, model): monkeypatch.setattr(module, "attention", plain)
    for T in (16, 256) if cfg.mixers == "W" else (16,):
        with optim.FlopCounterMode(display=False) as counter: model.LM(cfg)(ids(1, T))
        assert counter.get_total_flops() == sum(model.LM(cfg).flops(T).values())

COURSE = {  # by parameters: FLOPs at T = 1024, and of them the head, in %
    190_460_160: (pytest.approx(3.4963e11, rel=1e-4), pytest.approx(22.61, abs=0.005)),
    2_127_057_600: (pytest.approx(4.5133e12, rel=1e-4), pytest.approx(3.65, abs=0.005))}

@cases("name, sizes, more, n", [
    # L, D, H, Hkv, Dh, F, V as their config.json says; parameters as their files hold
    ("gpt2", (12, 768, 12, 12, 64, 3072, 50257), {}, 124_439_808),
    ("gpt2", (96, 12288, 96, 96, 128, 49152, 50257), dict(seq_len=2048), 174_604_259_328),  # GPT-3
    ("llama", (12, 768, 4, 4, 192, 3072, 50257), {}, 190_460_160),  # the first of the course
    ("llama", (48, 1600, 4, 4, 400, 6400, 50257), {}, 2_127_057_600),
    ("llama", (32, 4096, 32, 32, 128, 11008, 32000), {}, 6_738_415_616),  # Llama 2 7B
    ("mistral", (32, 4096, 32, 8, 128, 14336, 32000), {}, 7_241_732_096),  # 7B v0.1
    ("llama", (16, 2048, 32, 8, 64, 8192, 128256), dict(tie=True), 1_235_814_400),  # Llama 3.2 1B
    ("mixtral", (32, 4096, 32, 8, 128, 14336, 32000), dict(d_expert=14336), 46_702_792_704),
    ("qwen2", (24, 896, 14, 2, 64, 4864, 151936), {}, 494_032_768),  # Qwen2.5 0.5B
    ("qwen3", (28, 1024, 16, 8, 128, 3072, 151936), {}, 596_049_920),  # 0.6B
    ("gemma", (26, 1152, 4, 1, 256, 6912, 262144), dict(mixers=("WWWWWA" * 5)[:26]), 999_885_952),
    ("deepseek", (27, 2048, 16, None, 128, 10944, 102400), dict(  # V2-Lite
        ffns="s" + 26 * "x", n_experts=64, n_active=6, n_shared=2, d_expert=1408), 15_706_484_224)])
def test_counts_equal_the_published_ones_and_those_of_the_course(name, sizes, more, n):
    keys = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
    m = model.meta_model(model.preset(name, **{"seq_len": 1024, **dict(zip(keys, sizes)), **more}))
    assert sum(m.n_params().values()) == n == sum(p.numel() for p in m.parameters())
    total = sum(m.flops(1024).values())
    if n in COURSE: assert (total, 100 * m.flops(1024)["head"] / total) == COURSE[n]

@cases("kv", [1, 2, 4])
def test_attention_equals_its_reference(kv):
    both = kernels.attention, kernels.attention_reference
    for mask in (None, (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)):
        agree(*(partial(f, mask=mask) for f in both), *numbers((2, 4, 9, 8), *2 * [(2, kv, 9, 8)]))

def test_local_attention_in_blocks_equals_the_whole_mask():
    pos = torch.cat((torch.arange(7), torch.arange(250), -torch.ones(44, dtype=torch.long)))
    pos = torch.stack((pos, torch.arange(301)))
    ctx, real = kernels.Context(tiny(), pos, pos), (pos >= 0)[:, None, :, None]
    assert len(kernels.blocks(301, 5)) == 61
    agree(lambda *qkv: ctx.attend(*qkv, 5) * real,
          lambda *qkv: kernels.attention(*qkv, ctx.mask(5)) * real,
          *numbers((2, 4, 301, 8), (2, 2, 301, 8), (2, 2, 301, 8)))

@cases("delta", [False, True])
def test_chunked_scan_equals_its_recurrence(delta):
    pos = torch.stack((torch.arange(150), torch.arange(150) % 70 - 3))  # padding, three documents
    pos[1, 70:73] = pos[1, 140:143] = -1
    def run(scan, q, k, v, S, a, *b):  # some decays are too long for the exp of a sum
        log_a = -40 * a.sigmoid() * 1e-3 ** (torch.arange(150) % 2)
        y, end = scan(q, F.normalize(k, dim=-1), v, log_a, b[0].sigmoid() if b else None, pos, S)
        return torch.cat(((y * (pos >= 0)[:, None, :, None]).flatten(), end.flatten()))
    agree(partial(run, kernels.scan), partial(run, kernels.scan_reference), *numbers(
        (2, 1, 150, 6), (2, 1, 150, 6), (2, 3, 150, 5), (2, 3, 6, 5), *[(2, 3, 150)] * (1 + delta)))

def test_linear_attention_is_attention_with_another_kernel():
    cfg, (x,) = tiny(mixers="L"), numbers((1, 70, 32))
    layer = make(cfg).layers[0].self_attn
    q, k, v = (kernels.split(getattr(layer, n + "_proj")(x), 4) for n in "qkv")
    share = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    want = layer.o_proj(kernels.merge(share / share.sum(-1, keepdim=True) @ v))
    assert close(layer(x, kernels.Context(cfg, torch.zeros(1, 70))), want)

def test_small_operations_are_their_formulas_and_survive_huge_logits():
    want = [f(3 / 10000 ** (2 * i / 6)) for f in (math.sin, math.cos) for i in range(3)]
    assert torch.allclose(kernels.sinusoid(torch.tensor([[3]]), 6), torch.tensor(want))
    agree(kernels.gelu_reference, partial(F.gelu, approximate="tanh"), *numbers((30, 16)))
    z, y = torch.randn(2, 5, 7) * 1000, torch.randint(0, 7, (2, 5))
    y[0, 0] = -1
    want = F.cross_entropy(z.mT, y, ignore_index=-1, reduction="none")
    whole = lambda z, y: kernels.linear_cross_entropy(z, torch.eye(7), y)
    for f in (whole, kernels.cross_entropy_reference):
        assert torch.allclose(f(z, y), want) and want[0, 0] == 0
    assert torch.allclose(kernels.softmax(z), z.softmax(-1))

@cases("cap", [None, 3.0])
def test_loss_in_parts_equals_the_loss_of_all_logits(monkeypatch, cap):
    targets, sizes, whole = torch.randint(-1, 13, (3, 11)), [], kernels.logits_of
    monkeypatch.setattr(kernels, "logits_of", lambda x, *rest:
                        sizes.append(x.shape[:-1].numel()) or whole(x, *rest))
    curbed = lambda z: z if cap is None else cap * torch.tanh(z / cap)
    for limit, most in (2 ** 27, 33), (13 * 5, 5):  # whole, and in parts of five tokens
        monkeypatch.setattr(kernels, "LOGITS", limit), sizes.clear()
        agree(lambda x, W: kernels.linear_cross_entropy(x, W, targets, cap),
              lambda x, W: kernels.cross_entropy_reference(curbed(x @ W.T), targets),
              *numbers((3, 11, 8), (13, 8)))
        assert max(sizes) == most

@cases("K", [1, 2])
def test_experts_add_up_as_their_definition_says(K):
    c = tiny(ffns="x", n_active=K, n_shared=1, balance=0.5, router_z=0.25)
    moe, (x,), load = make(c).layers[0].mlp, numbers((1, 20, 32)), torch.zeros(4).double()
    (y, aux), z = moe(x), moe.gate(x[0])
    p, want = z.softmax(-1), moe.shared_experts(x[0])[0].clone()
    for t in range(20):
        best = p[t].argsort(descending=True)[:K]
        total = p[t, best].sum() if K > 1 else 1  # else the loss would not train the router
        for e in best: want[t] += p[t, e] / total * moe.experts[e](x[0, t])[0]
        load[best] += 1
    loss = 0.5 * 4 * (load / load.sum() * p.mean(0)).sum() + 0.25 * z.logsumexp(1).square().mean()
    assert close(y[0], want) and close(aux["loss"], loss)
    assert aux["load"].tolist() == load.tolist()

def test_router_bias_evens_the_load_of_experts_without_a_loss():
    m = model.LM(tiny(ffns="x", balance_bias=0.01))
    spread = lambda: m(ids(8, 24))[1]["load"][0].float().std()
    first = spread()
    for _ in range(100): train.local_step(m, [(ids(8, 24), ids(8, 24))])
    assert spread() < 0.5 * first

def test_model_starts_near_a_uniform_guess():
    for name in model.PRESETS:  # logits of std 1, at most, cost half a nat
        torch.manual_seed(0)
        loss = model.LM(tiny(name, vocab_size=512))(ids(4, 20), ids(4, 20, seed=1))[0].mean().item()
        assert math.log(512) - 0.1 < loss < math.log(512) + 0.8, (name, loss)

def test_bfloat16_stream_keeps_float32_weights_and_loss():
    m, batch = make(tiny(), torch.float32), (ids(2, 9), ids(2, 9, seed=1))
    want, m.compute_dtype = m(*batch)[0], torch.bfloat16
    assert m(*batch)[0].dtype == torch.float32 and m(ids(2, 9))[0].dtype == torch.bfloat16
    assert 0 < (m(*batch)[0] - want).abs().max() < 0.3  # eight bits; logits here reach ten

def test_dropout_acts_in_training_only_and_softcap_bounds_logits():
    m = make(tiny(dropout=0.5, softcap=3.0))
    a, b, c = m(ids(2, 9))[0], m(ids(2, 9))[0], m.train()(ids(2, 9))[0]
    assert torch.equal(a, b) and not torch.equal(a, c) and 2 < a.abs().max() < 3

HARMS = [lambda d: d[:-3], lambda d: d[:5], lambda d: b"", lambda d: b"\xff" * 8 + d[8:],
         lambda d: d.replace(b"F32", b"I32"), lambda d: d.replace(b"[40]", b"[20]"),
         lambda d: d.replace(b'"me"', b'"us"'), lambda d: d[:-9] + b"x" + d[-8:],
         lambda d: d[:12] + b"\xff" + d[13:]]

def test_tensor_files_round_trip_are_safetensors_and_damage_is_named(tmp_path):
    tensors = {"b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(), "none": torch.zeros(0, 3),
               "flag": torch.tensor([True, False]), "one": torch.tensor(2.5).double(),
               "long": torch.randn(40)}
    model.save_tensors(path := tmp_path / "t.safetensors", tensors, {"who": "me"})
    out, metadata = model.load_tensors(path)
    assert metadata["who"] == "me" and out.keys() == tensors.keys()
    assert all(torch.equal(out[k], t) and out[k].dtype == t.dtype for k, t in tensors.items())
    n = int.from_bytes((raw := path.read_bytes())[:8], "little")
    a, b = json.loads(raw[8:8 + n])["b"]["data_offsets"]
    assert n % 8 == 0 and np.frombuffer(raw[8 + n:][a:b], np.int64).tolist() == [0, 1, 2, 3, 4]
    for harm in HARMS:
        path.write_bytes(harm(raw))
        with pytest.raises(UserError, match=str(path)): model.load_tensors(path)

@cases("name", EVERY)
def test_a_saved_model_comes_back_the_same_also_as_others_would_publish_it(tmp_path, name):
    m, a, b = make(tiny(**EVERY[name]), torch.float32), tmp_path / "a", tmp_path / "b"
    model.save_model(m, a)
    config = json.loads((a / "config.json").read_text())
    kind = {row[0]: kind for kind, row in model.FAMILIES.items()}.get(name, "LM")
    assert config["architectures"] == [kind] and config.pop("model_config")
    assert model.load_model(a).cfg == m.cfg
    if kind != "LM": (a / "config.json").write_text(json.dumps(config))
    loaded = model.load_model(a)
    model.save_model(loaded, b)
    assert torch.equal(loaded(ids(2, 20))[0], m(ids(2, 20))[0])
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()

def look(q, k, v, window=20):  # attention by definition: nothing later, `window` places in all
    unseen = torch.ones(20, 20).tril().triu(1 - window) == 0
    p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(unseen, -math.inf).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)

def gpt2_by_hand(w, c, tokens):  # w: tensors by their published names, c: config.json
    norm = lambda x, n: F.layer_norm(x, (32,), w[n + ".weight"], w[n + ".bias"])
    conv = lambda x, n: x @ w[n + ".weight"] + w[n + ".bias"]
    x = w["wte.weight"][tokens] + w["wpe.weight"][:20]
    for h in ("h.0.", "h.1."):
        qkv = conv(norm(x, h + "ln_1"), h + "attn.c_attn").split(32, -1)
        y = look(*(y.unflatten(-1, (4, 8)).transpose(1, 2) for y in qkv))
        x = x + conv(y, h + "attn.c_proj")
        y = F.gelu(conv(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh")
        x = x + conv(y, h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def llama_by_hand(w, c, tokens):  # and Mistral, Mixtral, Qwen2, Qwen3
    Dh, rope = c.get("head_dim", 8), c.get("rope_scaling") or c.get("rope_parameters") or {}
    rms = lambda x, n: F.rms_norm(x, x.shape[-1:], w[n + ".weight"], 1e-6)
    lin = lambda x, n: x @ w[n + ".weight"].T + w.get(n + ".bias", 0.0)
    freq = {**c, **rope}.get("rope_theta", 1e4) ** (-torch.arange(0, Dh, 2).double() / Dh)
    if rope:  # waves that turn less than 4 times in 16 places slow down, below 1 by a factor of 8
        stays = ((16 * freq / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
        freq = stays * freq + (1 - stays) * freq / 8
    turn = torch.exp(1j * torch.arange(20)[:, None] * freq)
    def heads(x, n):  # a pair of features is a complex number
        y = lin(x, n + "_proj").unflatten(-1, (-1, Dh))
        if n + "_norm.weight" in w: y = rms(y, n + "_norm")
        y = y.repeat_interleave(4 // y.shape[2], 2).transpose(1, 2)
        z = torch.complex(*y.chunk(2, -1)) * turn
        return y if n[-1] == "v" else torch.cat((z.real, z.imag), -1)
    x = w["model.embed_tokens.weight"][tokens]
    for m in ("model.layers.0.", "model.layers.1."):
        y, at, moe = rms(x, m + "input_layernorm"), m + "self_attn.", m + "block_sparse_moe."
        y = look(*(heads(y, at + n) for n in "qkv"), c.get("sliding_window", 20))
        x = x + lin(y, at + "o_proj")
        y = rms(x, m + "post_attention_layernorm")
        p, ffns = torch.ones(1), [[f"{m}mlp.{n}_proj" for n in ("gate", "up", "down")]]
        if "num_local_experts" in c:
            z = lin(y, moe + "gate")
            p = z.masked_fill(z < z.topk(2).values[..., 1:], -math.inf).softmax(-1)
            ffns = [[f"{moe}experts.{e}.w{i}" for i in (1, 3, 2)] for e in range(4)]
        for e, (gate, up, down) in enumerate(ffns):
            x = x + p[..., e, None] * lin(F.silu(lin(y, gate)) * lin(y, up), down)
    head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
    return lin(rms(x, "model.norm"), head)

def foreign(path, kind, more={}, dtype="F32", files=1, harm=None, prefix=""):
    """Writes a directory as others publish theirs -> the right logits of ids(2, 20)."""
    sizes, by_hand = (dict(n_positions=64, n_embd=32, n_layer=2, n_head=4), gpt2_by_hand) \
        if kind[:3] == "GPT" else (dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64), llama_by_hand)
    c = dict(sizes, vocab_size=61, architectures=[kind], model_type=kind[:-11].lower(), **more)
    w = model.published(make(model.read_config(c)).to(model.DTYPES[dtype]))
    logits, index = by_hand({n: t.double() for n, t in w.items()}, c, ids(2, 20)), {}
    if prefix: w["h.0.attn.bias"] = torch.ones(24, 24)  # old files have their masks
    if files == 4: w["lm_head.weight"] = w["model.embed_tokens.weight"]  # tied, yet there twice
    if harm: harm(c, w)
    for i in range(files):
        part, file = {prefix + n: w[n] for n in sorted(w)[i::files]}, f"model-{i}.safetensors"
        index |= dict.fromkeys(part, file)
        if files == 1: file = "model.safetensors"  # it counts, whatever an index says
        model.save_tensors(path / "part", part)
        raw = (path / "part").read_bytes()  # ours alone has a checksum, and is aligned
        end = 8 + int.from_bytes(raw[:8], "little")
        header = re.sub(rb'"__metadata__": {.*?}, | *$', b"", raw[8:end])
        (path / file).write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    for file, what in (("config.json", c), ("model.safetensors.index.json", {"weight_map": index}),
                       ("generation_config.json", {"eos_token_id": [3, 5]})):  # it has precedence
        (path / file).write_text(json.dumps(what))
    return logits

STRETCH = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
PUBLISHED = cases("kind, more, options", [
    ("GPT2LMHeadModel", {}, dict(dtype="F16", files=2, prefix="transformer.")),
    ("MistralForCausalLM", dict(sliding_window=5), {}),
    ("Qwen2ForCausalLM", {}, {}), ("Qwen3ForCausalLM", {}, {}),
    ("MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2), {}),
    ("LlamaForCausalLM", dict(rope_theta=100, head_dim=12, rope_scaling=STRETCH), dict(files=3)),
    ("LlamaForCausalLM", dict(rope_parameters=dict(STRETCH, rope_theta=100.0),
                              tie_word_embeddings=True), dict(dtype="BF16", files=4))])

@PUBLISHED
def test_published_models_give_the_logits_of_their_definition(tmp_path, kind, more, options):
    logits = foreign(tmp_path, kind, more, **options)
    m = model.load_model(tmp_path, dtype=torch.float64)
    # rope's tables are float32, so angles are right to 1e-6
    assert torch.allclose(m(ids(2, 20))[0], logits, atol=1e-5)
    model.save_model(m, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config.get("rope_scaling") == (STRETCH if "rope" in str(more) else None)
    assert config["eos_token_id"] == m.eos == [3, 5]
    if "files" in options:
        (tmp_path / "model-1.safetensors").unlink()
        with pytest.raises(UserError, match="model-1.safetensors"): model.load_model(tmp_path)

@PUBLISHED
def test_transformers_agrees_both_ways(tmp_path, trained, kind, more, options):
    tf, tokens = pytest.importorskip("transformers"), ids(2, 20)
    foreign(tmp_path, kind, more)
    torch.manual_seed(0)
    theirs = tf.AutoModelForCausalLM.from_config(
        tf.AutoConfig.from_pretrained(tmp_path, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = model.load_model(tmp_path / "theirs")
    model.save_model(ours, tmp_path / "ours")
    trained[1].save(tmp_path / "ours")
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    text = "def read(self):  # it's" + EOT + "na\u00efve\n\n"  # no digits: Qwen2 cuts them its way
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.encode(text) == trained[1].encode(text)
    with torch.no_grad():
        for got in ours(tokens)[0], back(tokens).logits:
            assert (got - theirs(tokens).logits).abs().max() <= 1e-5
    greedy = theirs.generate(tokens[:1, :10], max_new_tokens=50, do_sample=False, eos_token_id=None)
    how = sample.Sampling(50, temperature=0.0)
    assert sample.generate(ours, tokens[:1, :10].tolist(), how) == greedy[:, 10:].tolist()

@cases("harm, says", [
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

# Triton's kernels run in NumPy, by its interpreter, or are compiled for an H100: chosen when it is
# imported, so in processes apart. Rounding to 16 bits needs a GPU: that test is marked.

def child(code, interpret):
    pytest.importorskip("triton", reason="Triton is not installed")
    code = ("import itertools, json, re, subprocess, torch, triton, kernels as K\n"
            f"from functools import partial\n{code}")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True,
                          env={**os.environ, "TRITON_INTERPRET": str(int(interpret))})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

GPU = partial(pytest.param, "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                             reason="needs a GPU"))
@cases("device, dtype, most", [
    ("cpu", "float32", 1e-5), GPU("float32", 1e-4), GPU("float16", 4e-3), GPU("bfloat16", 2e-2)])
def test_attention_kernel_equals_float64_and_a_model_trains_through_it(device, dtype, most):
    found, said = child(f"new, kind = partial(torch.randn, device={device!r}), torch.{dtype}" + """
import model
if K.INTERPRET:  # Triton 3.6 with NumPy 2.4 cannot take a range of a tensor
    import triton.runtime.interpreter as I
    def patched(t, scope, patch=I._patch_lang_tensor):
        patch(t, scope)
        scope.set_attr(t, "__index__", lambda s: int(s.handle.data.reshape(-1)[0]))
    I._patch_lang_tensor = patched
torch.empty = lambda *a, f=torch.empty, **k: f(*a, **k).fill_(7)  # what is not written shows
found, k = [], 1 if K.INTERPRET else 29
for H, G, T, D, window in ((4, 2, 37, 24, None), (2, 2, 61, 16, 20), (1, 1, 18, 80, 2),
                           (2, 2, 3, 256, 8), (4, 2, 35, 16, 0)):  # window 0: not even causal
    pos, key, out = torch.arange(T * k)[:, None], torch.arange(T * k), []
    mask = (key <= pos) & (key > pos - (window or T * k)) | (window == 0)
    for f, *how in ((K.FlashAttention.apply, window != 0, window or None),
                    (K.attention_reference, mask.to(new(1).device))):
        if not out: x = [new(2, h, T * k, D).to(kind) for h in (H, G, G, H)]
        *qkv, g = [t.to(torch.float64 if out else kind).requires_grad_() for t in x]
        out.append(((y := f(*qkv, *how)), *torch.autograd.grad(y, qkv, g)))
    found += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*out)]
m = model.LM(model.preset("llama", vocab_size=30, mixers="WA", window=5, n_kv_heads=2)).to(new(1))
x, out = torch.randint(0, 30, (2, 20), device=new(1).device), []
for K.KERNELS["use"] in ("torch", "triton"):
    out.append(((y := m(x, x)[0].mean()[None]), *torch.autograd.grad(y, [*m.parameters()])))
print(json.dumps(found + [(a - b).abs().max().item() for a, b in zip(*out)]))""", device == "cpu")
    assert max(found) < most and "attention by torch" in said and "attention by triton" in said

def test_attention_kernel_compiles_for_an_h100_into_its_registers_and_tensor_cores():
    for name, D, shared, spills, products in child("""out = []
for D, name in itertools.product((64, 128, 256), ("attention", "dq", "dkv")):
    BM, BN, how = K.tile(name, torch.empty(1, D, dtype=torch.bfloat16))
    given = dict(LSE="*fp32", DELTA="*fp32", scale="fp32", H="i32", T="i32", BD=K.room(D), BM=BM,
                 GROUPS=2, CAUSAL=True, WINDOW=None, BN=BN, D=D, KEYS=name == "dkv",
                 FORWARD=name == "attention")
    given.update(dict.fromkeys(("sa", "sc", "sx", "sy", "sd"), 3 * ("i32",)))
    kinds, values, hints, by_16 = {}, {}, {}, [["tt.divisibility", 16]]
    for i, p in enumerate(K.attention_pass.params):
        kind = kinds[p.name] = given.get(p.name, "*bf16")
        if p.is_constexpr: kinds[p.name], values[i,] = "constexpr", kind
        elif kind[0] == "*": hints[i,] = by_16
        elif kind[0] == "i32": hints |= {(i, j): by_16 for j in range(3)}
    source = triton.compiler.ASTSource(K.attention_pass, kinds, values, hints)
    built = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32), how)
    ptxas = triton.__path__[0] + "/backends/nvidia/bin/ptxas"
    log = subprocess.run([ptxas, "-v", "-arch=sm_90a", "/dev/stdin", "-o", "/dev/null"], text=True,
                         input=built.asm["ptx"], capture_output=True)
    spills = [int(n) for n in re.findall("([0-9]+) bytes spill", log.stderr)]
    out.append((name, D, built.metadata.shared, spills, "wgmma" in built.asm["ptx"]))
print(json.dumps(out))""", False)[0]:
        assert shared <= 232_448 and spills == [0, 0], (name, D, shared, spills)
        assert products == ((name, D) != ("dkv", 256))  # there tiles have 32 rows, not 64

# -----------------------------------------------------------------------------
# optim.py

def soap_by_hand(w, gradients, every=10, lr=0.01):  # 2409.11321, algorithm 3
    m, v = 0 * w, 0 * w
    for t, g in enumerate(gradients, 1):
        l, r = g @ g.T, g.T @ g
        L, R = (0.95 * L + 0.05 * l, 0.95 * R + 0.05 * r) if t > 1 else (l, r)
        if t in (1, every): P, Q = (torch.linalg.eigh(x).eigenvectors.flip(1) for x in (L, R))
        elif t % every == 0: P, Q = (torch.linalg.qr(x).Q for x in (L @ P, R @ Q))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * (P.T @ g @ Q) ** 2
        step = (P.T @ m @ Q) / (1 - 0.9 ** t) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
        w = (1 - lr * 0.1) * w - lr * P @ step @ Q.T
    return w

def muon_by_hand(w, gradients, lr=0.01):  # Jordan et al. 2024, with Nesterov's momentum
    m = 0 * w
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        u = optim.orthogonalize(0.05 * g + 0.95 * m)
        w = (1 - lr * 0.1) * w - lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * u
    return w

BY_HAND, T = {"soap": soap_by_hand, "muon": muon_by_hand}, torch.optim
TORCHS = {"sgd": T.SGD, "momentum": partial(T.SGD, momentum=0.9), "adagrad": T.Adagrad,
          "rmsprop": T.RMSprop, "adam": partial(T.Adam, betas=(0.9, 0.95)),
          "adamw": partial(T.AdamW, betas=(0.9, 0.95), weight_decay=0.1)}

@cases("name", optim.OPTIMIZERS)
def test_optimizer_equals_its_definition_and_survives_saving_bit_for_bit(name, tmp_path):
    (a, b), (G, H) = (x.detach() for x in numbers((2, 5, 3), (2, 50, 5, 3)))
    starts, gradients = (a, b, a.T), (G, H, G.mT)  # two are tall and move together, one is wide
    new = partial(optim.OPTIMIZERS[name], lr=0.01)
    sets = [[torch.nn.Parameter(x.clone()) for x in (*starts, torch.ones(4))] for _ in range(3)]
    optimizers = [new(sets[0]), new(sets[1]), TORCHS.get(name, new)(sets[2], lr=0.01)]
    for step in range(50):
        if step == 17:  # between two turns of a basis
            model.save_tensors(tmp_path / "s", optimizers[1].state_tensors())
            optimizers[1] = new(sets[1])
            optimizers[1].load_state_tensors(model.load_tensors(tmp_path / "s")[0])
        for params, optimizer in zip(sets, optimizers):
            for p, g in zip(params, gradients): p.grad = g[step].clone()  # the last: frozen
            optimizer.step()
    if name in BY_HAND: sets[2] = [*map(BY_HAND[name], starts, gradients)]
    for whole, saved, theirs in zip(*sets):
        # SOAP's first basis is arbitrary where the first gradient is zero, but for rounding, eps.
        assert (whole - theirs).abs().max() < (1e-8 if name == "soap" else 1e-12)
        assert torch.equal(whole, saved)
    assert torch.equal(sets[0][3], torch.ones(4)) and not optimizers[0].state[0][3]

def test_soap_with_the_identity_for_a_basis_is_adam():
    start, gradients = (x.detach() for x in numbers((5, 5), (25, 5, 5)))
    p, q, one = *(torch.nn.Parameter(start.clone()) for _ in range(2)), torch.eye(5).double()
    soap, adam = optim.SOAP([p], every=10 ** 9), optim.AdamW([q], lr=optim.SOAP.defaults["lr"])
    soap.state[0][0].update(l=one.clone(), r=one.clone(), l_basis=one, r_basis=one)
    for p.grad, q.grad in zip(gradients, gradients.clone()): soap.step(), adam.step()
    assert torch.allclose(p, q, atol=1e-12)

def test_the_first_step_of_shampoo_sets_all_singular_values_alike():
    for shape in (6, 4), (4, 6):  # (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, made 1 an entry long
        p, G = torch.nn.Parameter(torch.zeros(shape).double()), numbers(shape)[0].detach()
        (U, _, V), p.grad = torch.linalg.svd(G, full_matrices=False), G
        optim.Shampoo([p], lr=1.0).step()
        assert torch.allclose(p, -U @ V * math.sqrt(24 / 4), atol=1e-6)

def test_a_turned_valley_stops_a_diagonal_preconditioner_and_no_other():
    needs = lambda make, turned: optim.steps_needed(make, *optim.valley(turned), limit=400)[0]
    assert needs(optim.AdaGrad, True) > 10 * needs(optim.AdaGrad, False)
    soap = partial(optim.SOAP, weight_decay=0.0)
    assert needs(soap, True) == needs(soap, False) <= 100

@cases("shape", [(40, 12), (12, 40), (24, 24)])
def test_orthogonalized_singular_values_lie_within_the_polynomials_band(shape):
    U, _, V = torch.linalg.svd(G := numbers(shape)[0], full_matrices=False)
    for some, low, high in ((optim.POLAR_EXPRESS, 0.85, 1.15), (optim.NEWTON_SCHULZ, 0.67, 1.22)):
        x = torch.logspace(-1.9, 0, 999).double() / 1.02  # the same polynomials, on numbers
        for a, b, c in some: x = a * x + b * x ** 3 + c * x ** 5
        S = (U.mT @ optim.orthogonalize(G, some) @ V.mT).diagonal()
        assert low < x.min() and x.max() < high and S.max() < high and S[:9].min() > low

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

def test_clipping_scales_to_the_global_norm_and_leaves_small_gradients():
    for size in (0.01, 100.0):
        params = numbers((12,), (5,), (2,))
        grads = [size * torch.randn(n).double() for n in (12, 5)]  # the third has none
        for p, g in zip(params, grads): p.grad = g.clone()
        norm = torch.cat(grads).norm()
        assert torch.allclose(optim.clip_grad_norm(params, 1.0), norm)
        assert all(torch.allclose(p.grad, g / max(norm, 1)) for p, g in zip(params, grads))

@cases("name, warmup, cooldown, final, values", [  # {fraction of the run: of the peak}
    ("cosine", 7 / 21, None, 0.1, {  # of the course
        0: 0, 7 / 21: 1, 8 / 21: 0.98871756, 14 / 21: 0.55, 1: 0.1, 1.5: 0.1}),
    ("wsd", 0.1, 0.4, 0.2, {0: 0, 0.05: 0.5, 0.1: 1, 0.35: 1, 0.6: 1, 0.8: 0.6, 1: 0.2, 1.5: 0.2})])
def test_schedule_has_the_values_worked_by_hand(name, warmup, cooldown, final, values):
    schedule = optim.SCHEDULES[name]
    assert {x: schedule(x, warmup, cooldown, final) for x in values} == pytest.approx(values)

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

def test_generate_is_the_same_with_and_without_cache_alone_and_in_a_batch(cfg):
    m, told = make(cfg), []  # float64; 40 tokens outgrow the context of 24 twice
    prompts, how = [[1, 2, 3, 4, 5, 6, 7], [8], list(range(20))], partial(sample.Sampling, 40)
    cached = sample.generate(m, prompts, how(), on_token=lambda *it: told.append(it))
    assert [len(text) for text in cached] == [40, 40, 40]
    assert cached == [[token for row, token in told if row == i] for i in range(3)]
    m.embed_tokens.register_forward_hook(lambda _, x, y: told.append((x[0] > 0).sum().item()))
    assert cached == sample.generate(m, prompts, how(), use_cache=False)
    assert sum(told[120:]) > 3 * 40 * 12 - 200   # all of a text for each token (0 is padding, too)
    assert sample.generate(m, prompts[1:2], how(seed=1)) == cached[1:2]

def test_text_stream_waits_for_whole_characters_and_for_what_may_be_a_stop():
    tokenizer, out = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT]), []
    stream = sample.TextStream(tokenizer, out.append, ["<end>", "\nQ:"])
    assert not any(map(stream.put, "né🌍<en".encode())) and out == ["n", "é", "🌍"]
    assert [stream.put(b) for b in b"<end>"] == 4 * [False] + [True] and out[3:] == ["<en"]
    for b in b"n\xe4": (stream := sample.TextStream(tokenizer, out.append)).put(b)
    assert stream.flush() is False and out[4:] == ["n", "\ufffd"]

# -----------------------------------------------------------------------------
# train.py

CPU = train.Machine(torch.device("cpu"), torch.float32, False, 1e12, "")
TEXT = "".join(f"{i} times {j} is {i * j}\n" for i in range(40) for j in range(40))
TINY = "--n_layers 1 --d_model 16 --n_heads 2 --seq_len 16 --batch_size 4 --log_steps 1 --threads 1"
ON_TEXT = "--device cpu --dataset . --tokenizer byte"
WHOLE = f"{ON_TEXT} {TINY} --dtype float32 --dropout 0.1 --steps 60 --evals 2 --save_minutes 0"

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text, and with a run that came to its end undisturbed."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(train, f"{WHOLE} --run one")
    return folder
@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
    """A copy of it, as the current directory."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "desk"))
    return tmp_path / "desk"

def losses_of(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[(r["step"], r[kind]) for r in rows if kind in r] for kind in ("loss", "valid")]
def assert_as_if_undisturbed(desk):
    one, cut = desk / "runs/one", desk / "runs/cut"
    assert losses_of(one) == losses_of(cut) and [*map(len, losses_of(one))] == [60, 2]
    a, b = (model.load_tensors(run / "model.safetensors")[0] for run in (one, cut))
    assert all(torch.equal(a[k], b[k]) for k in a) and (cut / "result.json").exists()

def test_accumulation_gives_the_gradients_of_the_whole_batch():
    m, x, y = make(tiny("modern")), ids(6, 10), ids(6, 10, seed=1)
    y[4:, 3:] = -1  # the last micro-batch counts fewer targets than the others
    loss, params = m(x, y)[0].sum() / (y >= 0).sum(), [*m.parameters()]
    want = [loss, *torch.autograd.grad(loss, params)]
    for micro in (6, 2, 1):
        m.zero_grad()
        loss = train.local_step(m, [*zip(x.split(micro), y.split(micro))])
        got = [loss, *(p.grad for p in params)]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want))

def test_evaluation_counts_every_token_once_whatever_the_batch():
    m, tokens = make(tiny(dropout=0.5)), np.random.default_rng(0).integers(0, 61, 333)
    pairs = zip(*(torch.tensor(x)[None].split(24, 1) for x in (tokens[:-1], tokens[1:])))
    nats = sum(m(*pair)[0].sum().item() for pair in pairs)
    for batch_size in (1, 5, 100):
        batches = data.in_order(tokens, 24, batch_size)
        out = sample.evaluate(m.train(), batches, 500, CPU.device)
        assert out["tokens"] == 332 and out["loss"] == pytest.approx(nats / 332)
        assert out["bits_per_byte"] == pytest.approx(nats / math.log(2) / 500)

def test_shannons_ladder_on_a_text_counted_by_hand():
    text = np.array([0, 1] * 50)
    out = sample.shannon(text, text, 4, n_bytes=100)
    assert out["uniform"] == pytest.approx(99 * 2 / 100)
    assert out["unigram"] == pytest.approx(99 * -math.log2(51 / 104) / 100)  # (50 + 1) / (100 + 4)
    p01, p10 = (50 + 51 / 104) / 51, (49 + 51 / 104) / 50  # one kind of follower each
    assert out["bigram"] == pytest.approx(-(50 * math.log2(p01) + 49 * math.log2(p10)) / 100)

@cases("row", train.RECIPES.values(), ids=train.RECIPES)
def test_a_recipe_scales_to_other_budgets_by_the_laws_that_it_names(row):
    assert train.recipe(row, row["minutes"])[0] == {"micro_batch": None, **row}
    for k in 2.0 ** -30, 1 / 9, 5, 64:
        new = train.recipe(row, k * row["minutes"])[0]
        batch = max(1, row["batch_size"] * k ** (0.383 / 2))  # tokens go with the root of minutes
        assert math.log2(new["batch_size"]) % 1 == 0 and 0.7 < new["batch_size"] / batch < 1.42
        assert new["batch_size"] % (new["micro_batch"] or 1) == 0
        assert new["d_model"] * row["n_heads"] == row["d_model"] * new["n_heads"]
    assert [new[f] / row[f] for f in ("n_layers", "d_model")] == [2, 2]  # 64: parameters times 8
    given = dict(device="cpu", preset="qwen3", n_heads=3, d_model=48)
    assert train.settle(given)["model"]["n_kv_heads"] == 1  # the preset's 2 do not divide 3 heads

@cases("where, n, error", [("prepare", 1, KeyboardInterrupt), ("take", 32, KeyboardInterrupt),
    ("take", 31, KeyboardInterrupt),  # after the evaluation of step 30, before a save
    ("save_tensors", 3, UserError)])  # as if the disk were full
def test_a_resumed_run_repeats_the_undisturbed_one(desk, monkeypatch, where, n, error):
    real, calls = getattr(train, where), itertools.count(1)
    def fails(*args):
        if next(calls) == n: raise error("No space left on device")
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(train, where, fails)
        call(train, f"{WHOLE} --run cut")
    call(train, "--resume")
    assert_as_if_undisturbed(desk)
    assert said(train, "--run one --compare cut").count("+0.0000") == 10  # at equal tokens, FLOPs

def test_killed_at_any_moment_a_run_goes_on_as_if_undisturbed(desk):
    for more, at, number, code in ("", 20, signal.SIGKILL, -9), ("--resume", 40, signal.SIGTERM, 0):
        flags = shlex.split(f"{WHOLE} --run cut {more}")
        child = subprocess.Popen([sys.executable, train.__file__, *flags], stdout=-1, text=True)
        next(line for line in child.stdout if line.startswith(f"step {at:6d}"))
        child.send_signal(number)
        out = child.communicate()[0]
        assert child.returncode == code
    assert "SIGTERM: stopped after step" in out and not (desk / "runs/cut/result.json").exists()
    call(train, "--resume")
    assert_as_if_undisturbed(desk)

def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(desk):
    (newest, older), before = train.checkpoints(desk / "runs/one"), losses_of(desk / "runs/one")
    newest.write_bytes(newest.read_bytes()[:-50])
    assert newest.name in said(train, "--resume") and older.stem.endswith("59")
    assert losses_of(desk / "runs/one") == before
    for path in train.checkpoints(desk / "runs/one"): path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint that is whole"): call(train, "--resume")
    (desk / "text.txt").write_text(TEXT[::-1])
    with pytest.raises(UserError, match="another text"): call(train, "--resume")

def test_a_step_without_a_finite_loss_is_skipped_and_three_end_the_run(desk, monkeypatch):
    calls, seen = itertools.count(1), []
    def step(m, batches):
        n, loss, seen[:] = next(calls), train.local_step(m, batches), [m]
        if n in (3, 4, 6, 7, 8): (loss if n == 3 else next(m.parameters()).grad).fill_(math.nan)
        return loss
    monkeypatch.setattr(train, "fit", partial(train.fit, step=step))
    with pytest.raises(SystemExit, match="checkpoint-00000006"):
        call(train, f"{WHOLE} --steps 12 --save_minutes 1 --run cut")
    assert all(torch.isfinite(p).all() for p in seen[0].parameters())
    assert all(math.isfinite(loss) for _, loss in losses_of(desk / "runs/cut")[0])

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_in_bfloat16_compiled_as_a_cpu_does_in_float32(desk):
    """The same weights and batches; bfloat16 keeps eight bits, so curves agree to two digits."""
    call(train, f"{WHOLE} --dropout 0 --run cpu")
    call(train, f"{WHOLE} --dropout 0 --run cuda --device cuda --dtype bfloat16")
    a, b = ([loss for _, loss in losses_of(desk / "runs" / name)[0]] for name in ("cpu", "cuda"))
    assert a == pytest.approx(b, rel=0.05) and b[-1] < b[0] - 0.5

def test_owt_from_a_mirror_goes_from_download_to_sample_and_board(desk):
    text, runs = (EOT + "\n").join(TEXT.splitlines()).encode(), desk / "runs"
    sizes = dict(train=0, valid=900)
    files = {f"owt_{part}.txt.gz": gzip.compress(text[-sizes[part]:]) for part in sizes}
    flags = f"{TINY} --dataset owt --steps 3 --vocab_size 300 --device cpu --run web"
    with server(files) as (url, _): out = said(train, f"{flags} --mirror {url}")
    assert "no CUDA device: a small model trains on the same data for 3 steps" in out
    assert "sample:" in out and "validation bits_per_byte" in out
    assert said(sample, "--run web --prompt '7 times' --max_tokens 5").startswith("7 times")
    row = json.loads((runs / "web/result.json").read_text())
    for name, score in (("two", 0.1), ("three", 99.0)):
        (runs / name).mkdir()
        (runs / name / "result.json").write_text(json.dumps(row | {"bits_per_byte": score}))
    ranks = [line.split()[0] for line in said(train, "--board").splitlines()[1:]]
    assert [name for name in ranks if name != "one"] == ["two", "web", "three"]

def test_a_race_trains_each_value_and_seed_and_prints_a_table(desk):
    table = said(train, f"{WHOLE} --steps 3 --race mixers=A,S --seeds 2")
    head, *table = [line.split() for line in table.splitlines()]
    assert head[0] == "mixers" and [row[0] for row in table] == ["A", "S"]
    for mixer, _, mean, std, *_ in table:
        runs = [desk / f"runs/race-mixers-{mixer}-{i}" for i in (1, 2)]
        results = [json.loads((run / "result.json").read_text()) for run in runs]
        a, b = (result["bits_per_byte"] for result in results)
        assert (mean, std) == (f"{(a + b) / 2:.4f}", f"{abs(a - b) / 2 ** 0.5:.4f}")
        assert all(r["tokens_per_s"] > 0 and r["memory_bytes"] > 1e8 for r in results)
        for seed, run in enumerate(runs):
            settings = train.resumed(run, {})
            assert (settings["model"]["mixers"], settings["train"]["seed"]) == (mixer, seed)

def test_walk_and_profile_leave_no_run(desk):
    out = said(train, f"{WHOLE} --walk")
    assert "9. the same batch again" in out and "layers.0.self_attn.q_proj" in out
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", out).groups())
    assert after <= before and "aten::" in said(train, f"{WHOLE} --profile")
    assert "gradient noise scale" in said(train, f"{WHOLE} --noise")
    assert (desk / "runs/trace.json").exists() and len([*desk.glob("runs/*/")]) == 1

def test_the_micro_batch_is_halved_until_it_fits_and_the_batch_stays():
    m, sizes, machine = model.LM(tiny()), [], dataclasses.replace(CPU, compile=True)
    loader = data.Loader(np.arange(600, dtype=np.uint16) % 61, 8, 4, 0)
    def step(forward, batches):
        sizes.append(len(batches[0][0]))
        if sizes[-1] > 1: raise torch.OutOfMemoryError
    of = m, optim.SGD(m.parameters()), loader, train.TrainConfig(batch_size=4), machine, step
    assert train.warm_up(*of)[1] == 1 and sizes == [4, 2, 1]
    assert loader.seen == 0 and sum(len(x) for x, _ in train.take(loader, 1, CPU.device)) == 4

def test_evaluation_on_a_part_counts_the_bytes_of_that_part(desk):
    corpus = data.prepare("text.txt", "byte")
    n = corpus.info["valid"]["tokens"]  # a byte a token, less two end-of-texts
    found = [train.validation(corpus, limit) for limit in (101, None)]
    assert [(len(tokens), n_bytes) for tokens, n_bytes in found] == [(101, 100), (n, n - 2)]

BEFORE = {train: ON_TEXT, sample: "--run one"}
LAST = {sample: "--temperature -1 | --top_p 0 | --max_tokens 0 | --top_k 0",
    train: """--preset gpt7 | --dataset nowhere | --minutes -1 | --batch_size 6 --micro_batch 4
    --optimizer adamm | --minutes 1 --steps 5 | --n_heads 7 | --device abacus | --run none --resume
    --mixers AX | --mixers AAW | --ffns '' | --n_kv_heads 3 | --mixers L --n_kv_heads 2
    --window 4 | --d_head 3 | --d_latent 8 | --n_layers 0 | --n_experts 4 | --ffns x --n_active 9
    --pos rop | --pos none --rope_theta 5 | --dropout 1 | --softcap -1 | --softcap inf
    --norm rmsnorm | --norm_place mid"""}  # the last flag of each is wrong
MISTAKES = [(script, flags, re.findall(r"--(\w+)", flags)[-1] + ": got")
            for script, rows in LAST.items() for flags in re.split(r" \| |\n +", rows)] + [
    (train, "--race mixers=A,Q", "mixers: got"), (train, "--race seed=1 --run x", "--run"),
    (train, "--race lr=1e-3,fast", "float"), (train, "--race width=3,4", "FIELD"),
    (train, "--run one", "exists"), (train, "--batch_size 100000", "a smaller --batch_size"),
    (train, "--run one --resume --lr 0.5", "lr: got 0.5, wanted None"),
    (train, "--run one --resume --softcap 3.0", "softcap: got 3.0, wanted None"),
    (sample, "--prompt \udce9", "not UTF-8"), (sample, "--prompt ''", "empty"),
    (sample, "--prompt " + "x" * 17, "at most the context, 16"),
    (sample, "--run two --prompt x", "known under runs/: one")]

@cases("script, flags, says", MISTAKES, ids=lambda x: ascii(x)[:60])
def test_a_mistake_of_the_user_gives_one_message_and_leaves_nothing(
        desk, capsys, script, flags, says):
    with pytest.raises(SystemExit) as e: call(script, f"{BEFORE[script]} {flags}")
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and says in err[-1] and (len(err) == 1 or says == "float")
    assert [path.name for path in desk.glob("runs/*")] == ["one"]

# -----------------------------------------------------------------------------
# parallel.py: one forked group of four ranks does the work; tests look at what it found

SMALL = dict(vocab_size=61, seq_len=16, n_layers=2, d_model=16, n_heads=4)  # 61: padded for tp
MODERN = dict(preset="modern", n_kv_heads=2, bigram=300)
MOE = dict(preset="mixtral", mixers="A", n_experts=4, n_kv_heads=4, balance_bias=1e-2)
PLANS = [  # plan, flags, optimizer, sequences at once, model
    ("dp=4", dict(shard="none"), "muon", 1, MODERN),
    ("dp=4", dict(shard="optimizer", ring=True), "shampoo", 2, dict(preset="gpt2")),
    ("dp=2,tp=2", dict(shard="full", sequence=True), "muon", 2, MODERN),
    ("dp=2,pp=2", dict(shard="full", recompute=True), "soap", 4, MODERN),
    ("pp=2,tp=2", dict(pipeline="gpipe", ring=True), "adamw", 4, dict(preset="gpt2", n_layers=4)),
    ("pp=4", dict(), "adamw", 2, dict(preset="qwen3", n_kv_heads=4, n_layers=4)),
    ("tp=4", dict(sequence=True), "adamw", 4, dict(preset="gpt2")),
    ("dp=2,cp=2", dict(shard="optimizer"), "muon", 2, MODERN),
    ("tp=2,cp=2", dict(sequence=True, ring=True), "adamw", 4, dict(MODERN, softcap=5.0)),
    ("cp=4", dict(recompute=True), "adamw", 8, dict(preset="llama", n_kv_heads=2)),
    ("dp=4,ep=2", dict(shard="full"), "adamw", 2, MOE),
    ("dp=2,tp=2,ep=2", dict(sequence=True), "muon", 2, MOE),
    ("dp=2,pp=2,ep=2", dict(shard="optimizer"), "adamw", 2, MOE)]

def jolted(optimizer, fields):   # a whole model, no weight zero or equal to another; float64
    fields, cfg = {**SMALL, **fields}, train.TrainConfig(optimizer=optimizer)
    m, opt = train.build(model.preset(fields.pop("preset"), **fields), cfg,
                         dataclasses.replace(CPU, dtype=torch.float64))
    for p in m.parameters(): p.data += 0.1 * torch.randn_like(p)
    return m, opt

def batch_of(step, micro, n=1, rank=0):
    x, y = (ids(8, 16, seed=seed) for seed in (step, 100 + step))
    y[5:, 3:] = -1  # micro-batches count unlike numbers of targets
    return list(zip(*(t.chunk(n)[rank].split(micro) for t in (x, y))))

def alone(optimizer, micro, fields):   # ten steps of one process: losses, norms, gradients, weights
    m, opt = jolted(optimizer, fields)
    losses, norms, named = [], [], dict(m.named_parameters())
    for step in range(10):
        opt.zero_grad()
        losses.append(train.local_step(m, batch_of(step, micro)))
        if not step: grads = {name: p.grad.clone() for name, p in named.items()}
        norms.append(optim.clip_grad_norm(named.values(), 0.5))
        opt.step(0.3)
    return losses, norms, grads, {name: p.detach() for name, p in named.items()}

def run_plan(text, flags, optimizer, micro, fields, steps=10, want=None):
    """-> engine, [largest difference from one process: of loss and gradients in the first step, of
    losses, norms and weights in all]."""
    how = parallel.ParallelConfig(plan=text, **flags)
    mesh = parallel.Mesh(parallel.read_plan(text, 4), how.ring)
    engine, losses, norms = parallel.Engine(*jolted(optimizer, fields), mesh, how), [], []
    moved = sum((g["params"] for g in engine.optimizer.groups), [])
    for step in range(steps):
        engine.optimizer.zero_grad()
        losses.append(engine.step(None, batch_of(step, micro, mesh.dp.n, mesh.dp.rank)))
        if want and not step: first = [losses[0] - want[0][0], *(
            p.grad - p.place.take(want[2][p.place.name]) for p in engine.pieces)]
        norms.append(optim.clip_grad_norm(moved, 0.5, engine.norms))
        engine.optimizer.step(0.3)
    if not want: return engine
    last = [p.detach() - p.place.take(want[3][p.place.name]) for p in moved]
    last += [a - b for got, one in zip((losses, norms), want) for a, b in zip(got, one)]
    return mesh.world.small(*(max(x.abs().max().item() for x in some) for some in (first, last)),
                            op=optim.MAX).tolist()

def kept(engine, folder, m=None, opt=None):   # saved, and loaded into a whole model
    if engine: parallel.save_shards(folder, engine, engine.optimizer, train.Progress())
    elif dist.get_rank() == 0: train.save_checkpoint(folder, m, opt, train.Progress())
    dist.barrier()
    return train.read_checkpoint(train.checkpoints(folder)[0])[0]

def reshard(folder):
    fields = dict(MODERN, n_kv_heads=4)
    of, seen = [run_plan(*PLANS[2][:4], fields, steps=2)], []
    for text in ("tp=4", "", "dp=4", None):
        seen.append(kept(of[0], folder / f"to {text}", *of[1:]))
        m, opt = jolted("muon", fields)
        train.load_checkpoint(folder / f"to {text}", m, opt)
        of = [None, m, opt] if not text else [parallel.Engine(m, opt, parallel.Mesh(
            parallel.read_plan(text, 4)), parallel.ParallelConfig(shard="full"))]
    return seen

def rank_of_four(rank, folder, wants):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    found = {str(i): run_plan(*row, want=want) for i, (row, want) in enumerate(zip(PLANS, wants))}
    (folder / "none/checkpoint-00000000.part").mkdir(parents=True, exist_ok=True)
    (folder / "none/checkpoint-00000000.part/00007.safetensors").touch()   # of a kill
    shards = [kept(run_plan("dp=4", {"shard": s}, "adamw", 2, MODERN, 3), folder / s)
              for s in parallel.SHARDS]
    for name, some in dict(shards=shards, reshard=reshard(folder)).items():
        found[name] = [len(some[0]) > 40 and all(torch.equal(a[k], some[0][k]) for k in some[0])
                       for a in some]
    for own in (False, True):
        mesh, x = parallel.Mesh(parallel.read_plan("dp=4", 4), own), torch.arange(4.0) + rank
        rows = [mesh.dp.reduce_scatter(x[:, None])().item(), *mesh.dp.all_reduce(x).tolist()]
        found[f"sums {own}"] = mesh.dp.all_gather(torch.tensor(rows))().flatten().tolist()
    log, reduce = [], parallel.Bucket.reduce
    parallel.Bucket.reduce = lambda b: (log.append(min(b.params)), reduce(b))
    for shard, micro in itertools.product(("full", "none"), (2, 1)):  # one micro-batch a rank, two
        engine = parallel.Engine(*jolted("adamw", dict(preset="llama", n_layers=4)), mesh,
                                 parallel.ParallelConfig(shard=shard))
        for name, p in engine.model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: log.append("grad of " + name))
        log.clear(), parallel.SENT.clear()
        engine.step(None, batch_of(0, micro, 4, rank))
        found[f"sent {shard} {micro}"], found["log"] = parallel.SENT["data"], [*log]
    if rank == 0: (folder / "found.json").write_text(json.dumps(found))

@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    wants = [alone(*row[2:]) for row in PLANS]
    mp.start_processes(rank_of_four, (folder, wants), nprocs=4, start_method="fork")
    return {**json.loads((folder / "found.json").read_text()), "folder": folder}

@pytest.mark.parametrize("i", range(len(PLANS)), ids=[" ".join([p[0], *p[1]]) for p in PLANS])
def test_a_plan_has_the_loss_gradients_and_ten_steps_of_one_process(four, i):
    assert four[str(i)][0] < 1e-12 and four[str(i)][1] < 1e-10

def test_shards_equal_plain_data_ranks_and_go_through_other_plans_bit_for_bit(four):
    assert four["shards"] == [True] * 3 and four["reshard"] == [True] * 4

def test_damaged_shards_are_named_and_the_checkpoint_before_them_used(four, capsys):
    run = four["folder"] / "none"
    stem = run / "checkpoint-00000000"
    some = [Path(shutil.copytree(stem, f"{stem}"[:-1] + i)) for i in "123"]
    for path, left in zip(some, (4, 3, 0)):
        for file in sorted(path.iterdir())[left:]: file.unlink()
    file = some[0] / "00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert train.load_checkpoint(run, *jolted("adamw", MODERN)).step == 0
    out = capsys.readouterr().out
    assert all(f"{path} is left out" in out for path in some)
    assert [path.name for path in train.checkpoints(run)] == ["checkpoint-00000000"]

def test_collectives_add_up_as_by_hand(four):
    for own in (True, False):
        assert four[f"sums {own}"] == [x for r in range(4) for x in (6 + 4 * r, 6, 10, 14, 18)]

def test_gradients_travel_once_a_step_and_while_backward_goes_on(four):
    assert four["sent none 1"] == four["sent none 2"] > 0  # not once a micro-batch
    assert four["sent full 1"] > 1.8 * four["sent full 2"]  # but where gradients are shards
    first = next(i for i, line in enumerate(four["log"]) if not line.startswith("grad"))
    assert ".3." in four["log"][first] and any("layers.1" in line for line in four["log"][first:])

@pytest.mark.parametrize("name,held", [("gpipe", lambda p, m, s: m),
                                       ("1f1b", lambda p, m, s: min(p - s, m))])
def test_a_schedule_idles_by_the_formula_and_holds_what_it_says(name, held):
    for p, m in itertools.product(range(1, 6), range(1, 9)):
        idle, most = parallel.simulate(parallel.SCHEDULES[name], p, m)
        assert idle == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert most == [held(p, m, s) for s in range(p)]

def test_the_lesson_sends_and_keeps_what_the_formulas_say(capfd):
    call(parallel)
    rows = [line.split() for line in capfd.readouterr().out.splitlines() if "p=2" in line]
    assert len(rows) == 8 and all(row[-3] in (row[-2], "-") for row in rows)
    assert all(float(row[-1]) < 1e-12 and float(row[-2]) > 0 for row in rows)
    for row, want in zip(rows, [[1, 1, 2], [1, 1, 1], [0.5, 0.5, 1], [1, 1, 2], [0.5, 0.5, 1]]):
        assert [float(x) for x in row[-7:-4]] == pytest.approx(want, rel=0.02)

@pytest.mark.parametrize("text,world,words", [
    ("dp=3", 4, "plan: got dp=3, a product of 3, wanted 4"), ("zz=2", 2, "plan: got zz=2"),
    ("dp=4,ep=3", 4, "an ep that divides"), ("tp=8", 8, "n_heads"), ("pp=3", 3, "n_layers"),
    ("cp=3", 3, "seq_len"), ("ep=2", 2, "ffns: got s, wanted x"), ("tp=4", 4, "d_ff: got .62")])
def test_what_a_plan_cannot_divide_is_refused_by_name(text, world, words):
    m = model.LM(model.preset("llama", **SMALL, d_ff=62))
    with pytest.raises(UserError, match=words):
        parallel.check(m, parallel.read_plan(text, world), parallel.ParallelConfig())

def test_a_refusal_writes_nothing_and_a_restart_goes_on_with_no_other_run(desk, monkeypatch):
    call(train, f"{WHOLE} --steps 3 --run other")
    for word in "RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=0".split() + [
            "TORCHELASTIC_RESTART_COUNT=1"]: monkeypatch.setenv(*word.split("="))
    before = sorted(desk.rglob("*"))
    for flags, words in (("--plan tp=3", "plan"), ("--batch_size 0", "batch_size")):
        with pytest.raises(UserError, match=words): call(parallel, f"{WHOLE} {flags}")
    assert sorted(desk.rglob("*")) == before
    call(parallel, f"{WHOLE} --steps 4 --into new")
    assert len(losses_of(desk / "runs/new")[0]) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="waited 1 s"): call(parallel, "--timeout 1")

def test_a_rank_that_is_killed_does_not_change_the_losses(desk):
    flags = shlex.split(f"{TINY} --steps 16 --dataset text.txt --tokenizer byte --device cpu "
                        "--save_minutes 0 --evals 1 --dtype float64")
    call(train, *flags, "--run", "alone")
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--max-restarts",
         "1", HERE / "parallel.py", *flags, "--into", "four", "--shard", "full"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = desk / "runs/four/log.jsonl"
    for _ in range(6000):
        if log.exists() and log.read_text().count("\n") > 5: break
        time.sleep(0.01)
    ranks = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, _ = torchrun.communicate(timeout=90)
    assert torchrun.returncode == 0 and "exitcode: -9" in out, out
    one, four = (losses_of(desk / "runs" / run) for run in ("alone", "four"))
    assert one[0] == [(step, pytest.approx(loss, rel=1e-9)) for step, loss in four[0]]
    assert one[1][0][1]["loss"] == pytest.approx(four[1][0][1]["loss"], rel=1e-9)
    call(train, "--resume --run four")  # of shards alone, and finished
    assert losses_of(desk / "runs/four") == four and train.checkpoints(log.parent)[1].is_dir()

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
    guess = rng.choice([None, sample.look_up, sample.draft_of(m)])
    engine = sample.Engine(m, rng.choice([None, 0, 60 // size]), size, rng.choice([1, 3, 7, 40]),
                           rng.choice([1, 2, 9]), guess, rng.choice([1, 3, 6]))
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

def test_eight_bits_are_rounded_by_half_a_step_and_any_mixer_hardly_changes():
    linear, x = kernels.Linear(7, 5, bias=True).double(), torch.randn(2, 3, 7).double()
    w = (q := sample.Int8(linear)).weight * q.scale[:, None]
    assert ((w - linear.weight).abs() <= 0.501 * q.scale[:, None]).all()
    assert torch.allclose(q(x), x @ w.mT + linear.bias)
    for mixers in "AMSDH":
        m, tokens = make(tiny(mixers=mixers)), torch.arange(20)[None]
        whole = m(tokens)[0]
        assert 0 < (sample.quantize(m)(tokens)[0] - whole).norm() < 0.1 * whole.norm()

def test_sliding_windows_count_each_token_once_behind_enough_others():
    batches = list(sample.sliding(np.arange(83), 24, 10))
    assert torch.cat([y[y >= 0] for _, y in batches]).tolist() == list(range(1, 83))
    for x, y in batches: assert x.shape[1] <= 24 and (x[0, 0] == 0 or (y[:, :14] < 0).all())
    assert all(((y < 0) | (y == x + 1)).all() for x, y in batches)

def test_multiple_choice_takes_what_the_model_finds_likeliest(tmp_path):
    tok, path = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT]), tmp_path / "q.jsonl"
    m = make(tiny(vocab_size=257, seq_len=99))   # but its loss is 1 nat for a b, else 2
    m.forward = lambda x, y: (torch.where(y == ord("b"), 1.0, 2.0) * (y >= 0), {})
    path.write_text('{"ctx": "1", "endings": ["bb", "aaa"], "label": "0"}\n'
                    '{"question": "2", "choices": ["bbbb", "a"], "answer": 0}\n')
    shares, errors = sample.multiple_choice(m, tok, sample.read_questions(path))
    assert shares.tolist() == [0.5, 1.0] and errors[0] == pytest.approx(0.5 / 2 ** 0.5)
    (path := tmp_path / "q.csv").write_text("one,bb,aaa,A\n\"two, three\",a,b,B\n")
    assert sample.read_questions(path) == [("one", ["bb", "aaa"], 0), ("two, three", ["a", "b"], 1)]

def test_a_chat_keeps_its_turns_and_no_user_can_speak_as_another(monkeypatch):
    tok = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT, "<|im_start|>", "<|im_end|>"])
    lines, asked = iter(["<|im_end|>", "you"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or exec("raise EOFError"))
    engine = sample.Engine(make(tiny(vocab_size=259, seq_len=128)))
    add, engine.add = engine.add, lambda *it: asked.append(it[0]) or add(*it)
    sample.chat(engine, tok, sample.Sampling(3, 0.0))
    assert asked[0].count(tok.special_tokens["<|im_end|>"]) == 1   # that of his turn
    assert asked[1][:len(asked[0])] == asked[0] and len(asked) == 2 and not sum(engine.ref)

# -----------------------------------------------------------------------------
# scaling.py

def test_published_runs_optima_and_speeds_come_out_and_an_optimum_is_the_best_of_a_grid():
    for N, D, flops in scaling.PUBLISHED.values(): assert abs(6 * N * D / flops - 1) < 0.03
    np.testing.assert_allclose(scaling.BEST.optimum(5.76e23), (7.23e10, 1.33e12), 0.01)  # published
    for law in map(scaling.hidden_law, map(np.random.default_rng, range(9))):
        (N, D), grid = law.optimum(1e21), np.geomspace(1e6, 1e12, 10**6)
        assert abs(grid[law.loss(grid, 1e21 / 6 / grid).argmin()] / N - 1) < 1e-3
        n, d = law.served(1e21, 2 * D)  # as good; N and D cost 1e21 + 4 N D = 1.667e21
        assert n * (6 * d + 4 * D) < 1.66e21 and np.isclose(law.loss(n, d), law.loss(N, D))
    for gpus, mfu in (8192, 0.43), (16384, 0.41):  # 2407.21783, table 4: tp 8, pp 16, dp the rest
        r = scaling.cluster_plan(126, 16384, 8192, 2048, gpus, "H100", 8, 16, 8, 1, 1, False)
        assert abs(r["mfu"] - mfu) < 0.005 and r["fits"] and r["bubble"] == 15 / (2**21 / gpus + 15)

def test_planted_laws_come_back_by_the_published_objective():
    law = scaling.hidden_law(rng := np.random.default_rng(0))
    runs, noisy = scaling.simulate(law, rng, 0), scaling.simulate(law, rng, 0.005)
    np.testing.assert_allclose(scaling.parametric(runs), law, rtol=1e-4)
    x = np.array([[np.log(law.A), law.alpha, np.log(law.B), law.beta, np.log(law.E)]])
    off = abs(np.log(law.loss(noisy.N, noisy.D) / noisy.loss))  # 2203.15556, eq. 3, delta 1e-3
    want = np.where(off < 1e-3, off ** 2 / 2, 1e-3 * (off - 5e-4)).sum()
    assert abs(scaling.objective(*map(torch.tensor, (x, *np.log(noisy))), 1) / want - 1) < 1e-6
    some, N = runs.some(np.arange(54) % 9 > 0), law.optimum(1e22)[0]  # not symmetric about the best
    for fit, within in zip(scaling.FITS.values(), (1e-6, 0.15, 1e-6)):  # no valley is a parabola
        assert abs(fit(some, np.ones((1, 48))).optimum(1e22)[0] / N - 1) < within

def test_nine_of_ten_intervals_at_100_times_the_budget_hold_a_planted_optimum(trials=6, count=40):
    inside, drawn = 0, scaling.resamples(54, count)  # README.md: 200 trials of 200, by a call
    for law, rng in ((scaling.hidden_law(r), r) for r in map(np.random.default_rng, range(trials))):
        N = scaling.parametric(scaling.simulate(law, rng), drawn).optimum(1e22)[0]
        inside += abs(np.mean(N[1:] < law.optimum(1e22)[0]) - 0.5) <= 0.45
    assert print(inside) or inside >= trials / 2  # of six, four or more miss 1 time in 800
@cases("text, says", (("N,C,loss;1,2,3", "got 1 runs"), ("n,l" + 4 * ";1,2", "add D or C"), (
    "N,C" + 4 * ";1,2", "add loss"), ("Model Size,D,loss" + 4 * ";1,2,3" + ";1,2,inf", "in run 5")))
def test_runs_are_refused_by_the_column_or_row(text, says, desk):
    Path("t.csv").write_text(text.replace(";", "\n"))
    with pytest.raises(UserError, match=says): call(scaling, "fit", "t.csv")
def test_a_game_charges_a_query_once_a_refused_one_never_and_is_won_by_the_careful():
    game, q = scaling.Game(3, 1e17), scaling.Query(256, 4, 4, 64, 1e-3, 4e16)
    assert game.query(q) == game.query(q) != game.query(q._replace(seed=1))
    for bad in dict(lr=1.0), dict(d_model=8), dict(n_heads=3), dict(n_layers=2.5), dict(seed=2):
        with pytest.raises(UserError, match="not charged"): game.query(q._replace(**bad))
    assert game.spent == 8e16 and game.truth(q._replace(lr=7 * game.lr(q))) == math.log(32000)
    near, far = ((g := scaling.Game(1)).submit(*play(g.query, 2e18, 1e19))
                 for play in scaling.PLAYERS.values())
    assert 0 <= near[0] < min(far[0], 0.004) and abs(near[1]) < 0.03

def test_a_study_is_accounted_before_it_starts_and_trains_nothing_twice(desk):
    study = " --dataset text.txt --seq_len 16 --budgets 1e8 2e8 --sizes 4 --ratio .75 --resamples 9"
    with pytest.raises(UserError, match="none of"): call(scaling, f"run {study} --flops 8e8")
    call(scaling, "run" + study + " --device cpu")
    *done, last = old = json.loads((path := next(Path("runs").rglob("runs.json"))).read_text())
    path.write_text(json.dumps([*done, {k: v for k, v in last.items() if k != "loss"}]))
    call(scaling, "verify" + study + " --device cpu")  # the killed one goes on from its checkpoint
    *again, best = json.loads(path.read_text())
    assert again == old and best["name"].startswith("8e+08")  # of equal seconds: none ran twice

# -----------------------------------------------------------------------------
# align.py

def aligned(command):  # a model in float64, settings, rows of six tokens, their batch
    torch.manual_seed(0)
    lm = model.LM(model.preset("llama", vocab_size=16, n_layers=2, d_model=16)).double()
    rows = [[(torch.randint(16, (6,)).tolist(), [t > i for t in range(6)])] for i in range(4)]
    o = types.SimpleNamespace(low=0.2, high=0.28, kl=0.3, command=command)
    return lm, o, rows, align.lay_out(rows)

def test_losses_and_gradients_equal_their_definitions_clipped_or_not():
    (lm, o, rows, batch), hidden = aligned("rl"), []
    lm.critic, mask = align.scalar(lm), torch.tensor([own[1:] + [False] for [(_, own)] in rows])
    lm.norm.register_forward_hook(lambda module, _, y: hidden.append(y))
    w, adv, noise, ref, V = torch.randn(5, 4, 6).double()
    w, z, at = w * mask, lm(batch["tokens"])[0], batch["targets"].clamp(min=0)[..., None]
    lp, edge = z.log_softmax(-1).gather(-1, at)[..., 0] * mask, (adv > 0).double() * 0.48 + 0.8
    old, r = (lp + noise).detach(), 0.3 * ((lp - ref) * mask).sum(1)
    held, near = ((lp - old).exp() - edge) * adv > 0, (0 * V).clamp(V - 0.2, V + 0.28)
    gain = adv * torch.where(held, edge, (lp - old).exp()) - 0.3 * ((ref - lp).exp() - 1 - ref + lp)
    gain = gain - torch.maximum(ref ** 2, (near - ref) ** 2) / 2  # a new critic says 0
    for more, want in (
            (dict(adv=adv, old=old, ref=ref, values=V, returns=ref), -w * gain),
            ({}, -w * lp), (dict(adv=adv), -w * adv * lp),
            (dict(adv=adv, old=lp.detach()), -w * adv * (lp - lp.detach()).exp()),  # at ratio 1
            (None, (1 + (r[1::2] - r[::2]).exp()).log() / 4)):  # of half a batch
        got = (align.policy(lm, o, **batch, w=w, **more) if more is not None else align.preferred(
            lm, o, **batch, w=torch.full((4,), 0.125), ref=ref * mask))[0]
        g = torch.autograd.grad(got, hidden[-1])[0]
        assert got.item() == pytest.approx(want.sum().item(), rel=1e-12)
        assert torch.allclose(g, torch.autograd.grad(want.sum(), hidden[0], retain_graph=True)[0])
        assert not g[~mask].any() and g[mask].any() and held[mask].any()  # zero in the prompt

def test_advantages_are_those_worked_by_hand():
    r, at = torch.tensor([[0.2, 0.5, 0.0, 0.4], [1, 0, 0, 0]]), {"mask": torch.ones(8, 1)}
    of = lambda name: align.ADVANTAGES[name][0](r, at).view(2, 4)
    assert torch.allclose(of("grpo")[0], torch.tensor([-.3382, 1.0147, -1.2402, .5637]), atol=1e-4)
    assert torch.allclose(of("rloo"), r - (r.sum(1, keepdim=True) - r) / 3)  # mean of the others
    assert of("dr_grpo")[1].tolist() == [0.75, -0.25, -0.25, -0.25] and of("expert").sum() == 1
    V, mask = torch.randn(1, 5).double(), torch.tensor([[0, 1, 1, 1, 0]]).bool()
    align.gae(torch.tensor([[2.0]]).double(), at := dict(mask=mask, values=V))
    a, b, c = V[0, 1:4].tolist()
    want = [b + 0.95 * (c - b) + 0.95 ** 2 * (2 - c), c + 0.95 * (2 - c), 2.0]
    assert at["returns"][0].tolist() == pytest.approx([0, *want, 0])

def test_packing_and_micro_batches_change_neither_loss_nor_gradient():
    o, rows = aligned("sft")[1:3]
    some, runs = sum(rows, []), []
    assert [*map(len, align.pack(some, 17))] == [2, 2] and sum(align.pack(some, 17), []) == some
    for rows, size in (align.pack(some, 18), 1), (rows, 3):
        batch, lm = align.lay_out(rows), aligned("sft")[0]
        batch["w"] = align.NORMS["token"]((batch["targets"] >= 0).double(), None)
        for x in zip(*(y.split(size) for y in batch.values())):
            align.policy(lm, o, *x)[0].backward()
        runs.append([p.grad for p in lm.parameters()])
    assert all(all(map(torch.allclose, run, runs[0])) for run in runs)

def test_only_the_assistant_is_learned_and_the_engine_scores_as_the_trainer_does():
    chat = align.Chat(aligned("rl")[0], bpe.CharTokenizer("abc"))
    talk = align.said("user", "b" + EOT) + align.said("assistant", "a") + align.said("user", "b")
    (ids, own), prompt = chat.encode(talk, "c" + EOT), chat.encode(talk)[0]
    assert ids[:len(prompt)] == prompt and ids.count(chat.end) == 3  # nobody can spell it
    assert [i for i, o in zip(ids, own) if o][:2] == [chat.tok.ids[b"a"], chat.end] and sum(own) > 4
    text = (engine := sample.Engine(chat.model)).add([1, 2, 3], sample.Sampling(9, seed=1))
    while engine.step(): pass
    batch = align.lay_out([[(text.tokens, [False] * 3 + [True] * 9)]])
    lp = align.logps(chat.model, **batch)[0, 2:-1].tolist()
    assert text.logps == pytest.approx(lp, abs=1e-12)

def test_answers_are_equal_if_they_mean_the_same_and_pass_at_k_is_counted():
    same = r"\frac12;0.5 1,000;1{,}000.0 50\%;1/2 $50%$;50 x=5;5 3\frac{1}{2};7/2 90^\circ;90 " \
        r"\sqrt{8};2\sqrt2 (x+1)^2;x^2+2x+1 5~\text{cm};5 -\frac13;-1/3"
    for pair in (same + r" 0.333;1/3 x;y (1,2);(2,1) 1.05;1.5 1/0;0 5x;5 2^{9^{99}};1").split():
        assert align.equal(*pair.replace("~", " ").split(";")) == (pair in same), pair
    assert align.final_answer(r"\boxed{1} or \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert [*map(align.final_answer, ("#### 18.", "72 clips", "no"))] == ["18", "72", None]
    assert not align.equal("(" * 499, "5") and not align.equal("9^" * 200 + "9", "5")
    draws = [any(i < 2 for i in some) for some in itertools.combinations(range(6), 3)]
    assert align.pass_at_k(6, 2, 3) == pytest.approx(np.mean(draws))

def test_code_counts_if_it_ends_its_tests_within_limits():
    assert align.run_code("def f(): return 1", "assert f() == 1", 1)
    for program in ("os._exit(0)", "while True: pass", "bytes(10 ** 9)", "os.killpg(0, 9)", "1 / 0",
                    "while True: os.write(1, b'x' * 10 ** 6)", "[os.fork() for _ in 'ab']; 1 / 0"):
        assert not align.run_code("import os\n" + program, seconds=1), program

def test_a_rollout_killed_goes_on_with_the_same_curve_and_a_bad_row_is_named(desk):
    flags = "--device cpu --threads 1 --dtype float32 --problems 3 --save_minutes 0".split()
    call(align, "sft", *flags, "--steps", 2, "--run", "base")
    flags += "rl --init base --uses 2 --steps 10 --batch_size 4 --group 2 --kl 0.1".split()
    call(align, *flags, "--run", "whole")
    child = subprocess.Popen([sys.executable, HERE / "align.py", *flags, "--run", "killed"])
    while not [*desk.glob("killed/checkpoint-0000000[3-8]*")]: assert child.poll() is None
    child.kill()
    assert child.wait() == -9
    call(align, "--resume", "--run", "killed")
    curve = lambda run: {row["step"]: (row["loss"], row["length"])
                         for row in sample.read_log(desk / run) if "update_s" in row}
    assert curve("killed") == curve("whole") and len({*curve("whole").values()}) > 5
    (desk / "rows").write_text('{"prompt": "a", "completion": "b"}\n{}')
    with pytest.raises(UserError, match="row 2"):
        call(align, "sft --task chat --data rows --init base --run odd")
