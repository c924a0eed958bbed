"""test_all.py - what is true of this codebase, as sentences that run: pytest test_all.py -k WORDS

A property is held against an oracle that does not share its code: integers worked by hand, plain
torch or numpy, autograd, torch's own, a conservation law; a fast version against its reference.
Tests run in a temporary directory, without network and without a GPU, in minutes on two cores.
"""
import ast, contextlib, dataclasses, errno, gzip, hashlib, http.server, importlib, io
import itertools, json, math, os, random, re, shlex, shutil, signal, subprocess, sys, threading
import time, types
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import distributed as dist, multiprocessing as mp

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

# --- The house: budgets, imports, configuration, README.md -------------------

IMPORTS = {"bpe": "", "kernels": "", "data": "bpe", "model": "bpe kernels", "optim": "bpe kernels",
           "sample": "model bpe kernels", "train": "model optim data bpe sample kernels",
           "align": "train model optim data sample bpe kernels"}   # script: whom it may import
IMPORTS |= dict.fromkeys(["parallel", "scaling"], "train model optim data bpe kernels")
PACKAGES = {"torch", "triton", "numpy", "regex", "tqdm", "pytest"} | set(sys.stdlib_module_names)
OPTIONAL = {"matplotlib", "transformers"}  # used if installed, in the one function that wants them
README, ME = (HERE / "README.md").read_text(), Path(__file__).read_text()
SCRIPTS = {file.stem: file.read_text() for file in HERE.glob("*.py") if file.stem in IMPORTS}
NODES = [(name, node) for name, text in SCRIPTS.items() for node in ast.walk(ast.parse(text))]
def test_every_file_keeps_its_line_budget_and_the_readme_tells_its_length():
    lines = {name: text.count("\n") for name, text in (SCRIPTS | {"test_all": ME}).items()}
    stated = dict(re.findall(r"^\| (\w+)\.py \|.*\| (\d+) \|$", README, re.M))
    assert all(abs(int(stated[n]) - lines[n]) <= 0.05 * lines[n] for n in stated | lines), lines
    assert lines.pop("test_all") <= 1400 and README.count("\n") <= 250
    assert max(lines.values()) <= 700 and sum(lines.values()) <= 6400, lines
    assert all(len(line) <= 100 for text in (ME, *SCRIPTS.values()) for line in text.splitlines())
def test_imports_follow_the_graph_and_the_six_packages():
    for name, node in NODES:
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        for top in (getattr(node, "module", a.name).split(".")[0] for a in node.names):
            if top in IMPORTS: assert top in IMPORTS[name].split(), f"{name} imports {top}"
            elif top in OPTIONAL: assert node.col_offset > 0, f"{name} needs {top}"
            else: assert top in PACKAGES, f"{name} imports {top}"
def test_every_field_of_a_configuration_is_read_somewhere():
    holders = {"cfg", "c", "self", "how", "now", "progress"}  # what configurations are called
    read = {x.attr for _, x in NODES if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load)
            and getattr(x.value, "id", getattr(x.value, "attr", "")) in holders}
    read |= {"preset", *sample.SAMPLERS}  # from the flags; by the name of their sampler
    for config in (model.ModelConfig, train.TrainConfig, sample.Sampling, train.Progress):
        assert {f.name for f in dataclasses.fields(config)} <= read
def test_every_command_of_readme_and_docstrings_parses_and_every_exercise_names_tests():
    docs = [ast.get_docstring(node) for _, node in NODES if isinstance(node, ast.Module)]
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    commands = re.findall(r"python (\w+)\.py([^\n#`]*)", "\n".join(blocks + docs))
    assert len(commands) > 20
    for name, flags in commands:
        flags = [w for w in shlex.split(flags) if w not in ("...", "&&")]
        importlib.import_module(name).build_parser().parse_args(flags)
    for doc in docs:
        (words,) = re.findall(r'-k "?([\w ]+?)"?`', doc.split("EXERCISE")[1])
        for word in words.split(" or "): assert re.search(rf"\ndef test_\w*{word}", ME), word

# --- bpe.py ------------------------------------------------------------------

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
    text, byte = "Hello, \U0001F30D! \u4f60\u597d!", bpe.Tokenizer(dict(enumerate(bpe.BYTES)))
    char, word = bpe.CharTokenizer(text), bpe.CharTokenizer(bpe.split_words(text), [EOT], "gpt2")
    for tok, n in (char, 13), (word, 5), (byte, 20):
        assert bpe.ratio(tok, text) == 20 / n and tok.decode(tok.encode(text)) == text
    assert word.decode(word.encode("Hello, w")) == "Hello,<|unk|>"
@cases("pattern, words", [   # a bar is where the text is cut
    ("gpt2", "it|'s| 42| dogs|  | a|\t|b|'|Se|\u0301|x|!?|\n "),
    ("llama3", "it|'S| |123|4|.\n\n|\ta|  | b|$c|\u0301e| ;\n|//|x| \n| "),
    ("qwen2", "a|1|2|3|\n\n| b| \n| "), ("cl100k", "a| \n| b|'LL| |123|4|$c| \n "),
    ("o200k", "camel|Case's| HTML|.Pine\u0301e'LL|'t| |123|4| ;\n//|x| \n| ")])
def test_a_text_is_cut_into_the_words_worked_by_hand(pattern, words):
    assert bpe.split_words(words.replace("|", ""), pattern) == words.split("|")
@cases("text, merges", [(   # the first of Sennrich et al. 2016
    "low\n" * 5 + "lower\n" * 2 + "widest\n" * 3 + "newest\n" * 6,
    "s-t e-st o-w l-ow w-est n-e ne-west w-i wi-d wid-est low-e lowe-r"),
    # At last (" ", "d"), seen first and the greater if joined, and (" a", "nd") have 2: " a" > " "
    ("nd\nnd\nnd\nnd a a a a a d d and and", " -a n-d  a-nd")])
def test_training_learns_the_merges_worked_by_hand(text, merges):
    _, got = bpe.train_reference(text, 256 + merges.count("-"), [])   # train equals it
    assert " ".join(f"{a.decode()}-{b.decode()}" for a, b in got) == merges
def test_train_equals_the_reference_serial_and_parallel(tmp_path, trained, monkeypatch):
    for seed in range(60):
        rng, some = random.Random(seed), [[], [EOT], ["ab", "aba", "ab"], ["<a b>", EOT]][seed % 4]
        text = random_text(rng, rng.randrange(1, 300)) + "".join(rng.choices([*some, "a"], k=9))
        (tmp_path / "t").write_text(text, newline="")
        args = 256 + len(some) + rng.randrange(40), some
        assert bpe.train(tmp_path / "t", *args) == bpe.train_reference(text, *args)
    monkeypatch.setattr(bpe, "BLOCK", 10_000)   # makes jobs of the file, which is ASCII
    want = bpe.train_reference(trained[0].read_text()[:50_000], 280, [EOT])
    for n in 1, 2: assert bpe.train(trained[0], 280, workers=n, max_bytes=50_000) == want

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

def test_decode_undoes_encode_for_every_code_point_and_special_tokens_are_whole(trained):
    anything, plain = [*map(chr, range(0x110000))], trained[1]   # and lone halves of UTF-16 pairs
    for text in "".join(anything), f"{EOT[1:]} {EOT}{EOT}\n", " " * 400_000:   # in 1 s
        assert plain.decode(plain.encode(text)) == text
    assert plain.decode([0xE3, 65]) == "\ufffdA" and plain.decode([195, 169]) == "\u00e9"
    tok = bpe.Tokenizer(plain.vocab, plain.merges, [EOT, "<|a|>", "<|a|><|b|>"])
    assert tok.eot == 699 and tok.encode(f"<|a|><|b|><|a|>{EOT}") == [701, 700, 699]
    assert tok.encode(EOT, "text") == replay(tok, EOT)
    with pytest.raises(UserError, match="no special token"): tok.encode("a" + EOT, "refuse")
@pytest.fixture
def formats(tmp_path, trained):   # {file in tmp_path: its content}, the tokenizer in every format
    tok, spell = trained[1], bpe.spell
    assert spell(bytes([33, 0, 10, 32, 127, 160, 173])) == "!\u0100\u010a\u0120\u0121\u0142\u0143"
    merges = "\n".join(["#version: 0.2", *(f"{spell(a)} {spell(b)}" for a, b in tok.merges)])
    files = {"vocab.json": json.dumps({spell(token): i for token, i in tok.ids.items()}),
             "merges.txt": merges, "t.json": tok.to_text(), "a.tiktoken": tok.to_text("a.tiktoken")}
    for name, content in files.items(): (tmp_path / name).write_text(content, encoding="utf-8")
    return files
def test_every_format_gives_the_same_ids_and_the_hash_is_the_files(tmp_path, trained, formats):
    char, text = bpe.CharTokenizer("hello \u00e9\n", [EOT, "\u00e9"]), f"\u00e9 \t{EOT}\u4f60 hello"
    for tok, names in (char, []), (trained[1], formats):
        tok.save(tmp_path)
        assert tok.hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        for name in "", *names:
            got = bpe.load_tokenizer(tmp_path / name, "gpt2", {EOT: 699})
            assert got.vocab == tok.vocab and got.encode(text) == tok.encode(text)
@cases("kind, normalizer, merges, text, ids", [   # " cab" is no token, 123 and 4 are apart
    ("llama3", None, [["a", "b"], ["3", "4"]], "cab cab1234", [258, 220, 66, 256, 16, 17, 18, 19]),
    ("qwen2", {"type": "NFC"}, ["\u00c3 \u00a9", "1 2"], "e\u0301<s>12", [256, 999, 16, 17])])
def test_a_tokenizer_json_of_others_gives_ids_worked_by_hand(kind, normalizer, merges, text, ids):
    made = ["".join(pair).replace(" ", "") for pair in merges]
    assert bpe.from_json({"normalizer": normalizer, "pre_tokenizer": {
        "pretokenizers": bpe.RULES[kind]}, "added_tokens": [{"id": 999, "content": "<s>"}],
        "post_processor": {"type": "TemplateProcessing"}, "model": dict(
            type="BPE", ignore_merges=kind == "llama3", merges=merges,
            vocab=dict(zip([*bpe.BYTE_CHARS.values(), *made, "cab"], range(259))))},
        ).encode(text) == ids
@cases("name, old, new", [*(("t.json", *pair) for pair in [
    ('"BPE"', '"BPE", "dropout": 0.1'), ('lstrip": false', 'lstrip": true'), ("N}+|", "N}|"),
    ('zer": null', 'zer": {"type": "X"}'), ('"s e', '"s 12')]), ("merges.txt", "\ns e", "\nse"),
    *(("a.tiktoken", "\nIQ== 33", new) for new in ("\nI== 33", "", "\nIQ== 33\nIQ== 900"))])
def test_a_file_that_is_damaged_or_asks_for_more_is_named(tmp_path, formats, name, old, new):
    (tmp_path / name).write_text(formats[name].replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=name): bpe.load_tokenizer(tmp_path / name, "gpt2")
@cases("error, seen", [(SystemExit(), SystemExit), (OSError(errno.ENOSPC, "full"), UserError)])
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

# --- data.py -----------------------------------------------------------------

data.WAIT_S, BODY = 0.001, np.random.default_rng(0).bytes(300_000)  # between two attempts
@contextlib.contextmanager
def server(files, drop=0):
    asked = []      # the Range of each GET; the first `drop` replies break off
    def reply(self):
        body, wanted = files.get(self.path.rpartition("/")[2], b""), self.headers["Range"]
        tag, _ = f'"{sum(body)}"', asked.append(wanted)
        part = wanted and self.headers["If-Range"] in (None, tag)
        start, end = wanted[6:].split("-") if part else ("0", "")
        found = body[int(start):int(end or 1 << 40) + 1]
        self.send_response(404 if not body else 200 if not part else 206 if found else 416)
        for header in ("ETag", tag), ("Content-Length", len(found)): self.send_header(*header)
        self.end_headers()
        self.wfile.write(found[:len(found) // 2] if len(asked) <= drop else found)
    handler = type("", (http.server.BaseHTTPRequestHandler,), dict(do_GET=reply, log_message=print))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
@cases("there, same, drop, asked_for", [    # bytes that are there; of this version, or none
    (0, None, 2, [None, "bytes=150000-", "bytes=225000-"]), (300_000, True, 0, []),
    (1000, None, 0, [None]), (1000, True, 0, ["bytes=1000-"]), (1000, False, 0, ["bytes=1000-"]),
    (400_000, True, 0, ["bytes=400000-", None])])
def test_a_download_ends_whole_and_asks_for_what_it_lacks(tmp_path, there, same, drop, asked_for):
    file, none = tmp_path / "f", tmp_path / "g"
    with server({"f": BODY}, drop) as (url, asked):
        if there: data.part_of(file).write_bytes((BODY * 2 if same else b"?" * 1000)[:there])
        if same is not None: data.write_note(file, dict(
            url=f"{url}/f", size=300_000, version=f'"{sum(BODY) if same else 0}"'))
        data.fetch(f"{url}/f", file)
        with pytest.raises(UserError, match=f"404(?s:.*){none}"): data.fetch(f"{url}/g", none)
    assert file.read_bytes() == BODY and {*os.listdir(tmp_path)} == {"f", "f.json"}
    assert asked == [*asked_for, None]
def test_a_packed_source_comes_from_a_mirror_and_its_text_is_enough_afterwards(tmp_path):
    prepare = partial(data.prepare, "owt", "byte", data_dir=tmp_path, workers=1)
    train = gzip.compress(b"One story.<|endoftext|>\nAnother one.<|endoftext|>" * 9)
    files = {"owt_train.txt.gz": train, "owt_valid.txt.gz": gzip.compress(b"Third. " * 9)}
    with server(files, drop=1) as (url, _): info = prepare(mirror=url + "/").info
    (tmp_path / "owt/owt_train.txt.gz").unlink()
    assert prepare().info == info and info["train"]["documents"] * 23 == 2 * info["train"]["bytes"]
def read(corpus): return [corpus.tokenizer.decode(data.open_tokens(f)) for f in corpus[2:4]]
@cases("text, cut", [("".join(chr(32 + i * i % 90) for i in range(5003)), 4502), ("ä " * 95, 171)])
def test_one_file_is_cut_as_nanogpt_cuts_it(tmp_path, text, cut):
    (tmp_path / "f").write_text(text)           # 0.9 * 5003; 0.9 * 285 bytes end within an ä
    corpus = data.prepare(tmp_path / "f", "char", data_dir=tmp_path, workers=1)
    assert read(corpus) == [EOT + text[:cut] + EOT, EOT + text[cut:] + EOT]
@cases("tokenizer", data.TOKENIZERS)
def test_tokens_give_texts_back_and_a_kill_costs_a_block(tmp_path, capsys, monkeypatch, tokenizer):
    texts = ["".join(f"Text {i} {j}: né 你 \ufffd\r\n\n" for j in range(i + 9)) for i in range(9)]
    for name, content in [("bad", b"Text: \xff \xe4\xbd\n\xe4"), ("no", b"MZ\0"), ("empty", b""),
                          (".x", b"x"), *((f"{i}", text.encode()) for i, text in enumerate(texts))]:
        (tmp_path / name).write_bytes(content)
    prepare, seen = partial(data.prepare, tmp_path, tokenizer, 300, tmp_path, workers=1), []
    def killed(tok, text, encode=bpe.Tokenizer.encode):         # before the third is encoded
        if seen.append(text) or len(seen) == 3: raise KeyboardInterrupt
        return encode(tok, text)
    monkeypatch.setattr(bpe, "BLOCK", 40), monkeypatch.setattr(bpe.Tokenizer, "encode", killed)
    with pytest.raises(KeyboardInterrupt): prepare()
    corpus, found = prepare(), []
    assert re.search("of 10 files, 2 empty.* 3 invalid UTF-8", capsys.readouterr().out)
    assert len(seen) == len({*seen}) + 1 and not [*tmp_path.glob("*/*-parts-*")]
    for text, note in zip(read(corpus), corpus.info.values()):
        found += (documents := text.split(EOT)[1:-1])
        assert text == EOT.join(["", *documents, ""]) and 0 < len(documents) == note["documents"]
        assert note["bytes"] == len("".join(documents).encode())
        assert note["tokens"] == len(corpus.tokenizer.encode(text))
    assert sorted(found) == sorted([*texts, "Text: \ufffd \ufffd\n\ufffd"])
@cases("command, says", [row.split(": ", 1) for row in re.split("; |\n", """bpe train EMPTY: empty
bpe encode CUT hi: no tok; bpe train T --out /dev/null: cannot write; bpe encode NO hi: No such file
bpe train T --vocab_size 256: wanted 257; data get TINY: got 4 bytes; data get owt: little disk
data get T --workers 0: got 0; data get T --data_dir T: cannot write; data look NO: no file
data get openwebtxt: stdlib; data get owt --vocab_size 9: size: got 9; data get BINARY: got 0 bytes
data get owt --tokenizer bpee: bpe, byte, char; data get owt --mirror a.b/owt: http://a.b/owt
data funnel T --stages gophr: got gophr; data train-classifier T: LABEL<tab>TEXT""")])
def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, command, says):
    monkeypatch.chdir(tmp_path)         # capitals: files that are there, but for NO
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    files = dict(T="text " * 99, EMPTY="", TINY="tiny", BINARY="\0" * 99, CUT='{"version": ')
    for name, text in files.items(): Path(name).write_text(text)
    (script, *words), there = command.split(), {*os.listdir()}
    with pytest.raises(UserError) as error: call(globals()[script], *words)
    assert says in str(error.value) and {*os.listdir()} == there and error.value.code == 2
    assert capsys.readouterr().err == f"{error.value}\n"
@cases("n, T, B", [(103, 8, 4), (33, 4, 8), (20, 7, 1)])
def test_the_loader_gives_each_target_once_an_epoch_and_splits_by_rank(n, T, B):
    ids = np.random.default_rng(1).permutation(n).astype(np.uint16)             # all different
    new, want = partial(data.Loader, ids, T, B, 3), sorted(zip(ids.tolist(), ids[1:].tolist()))
    batches = [*itertools.islice(loader := new(), loader.n_windows)]            # B epochs
    x, y = map(torch.cat, zip(*batches))                                        # (B n_windows, T)
    found = [*zip(x[y >= 0].tolist(), y[y >= 0].tolist())]
    epochs = {tuple(found[i:i + n - 1]) for i in range(0, len(found), n - 1)}   # orders differ
    assert len(epochs) == B and all(sorted(epoch) == want for epoch in epochs) and x.shape[1] == T
    loader.seek(B)
    for again in new(seen=B), loader: assert torch.equal(next(again)[0], batches[1][0])
    for batch, *parts in zip(batches, *(new(rank=r, world=B) for r in range(B))):
        assert all(torch.equal(torch.cat(p), b) for b, *p in zip(batch, *parts))
TEXTS = ["\n\n".join(f"The house that they saw with us in {i + j} was as old as the hill, and made "
                     "of it." for j in range(7)) for i in range(1000, 1140, 7)]
def page(text, more=""):
    text = f"<ul>{'<li><a href=/>Home</a>' * 20}</ul><div><p>{text}{more}</div><script>x"
    return text.replace("\n\nThe", "<p>The").encode()
def record(body, http="Content-Type: text/html\r\n", n=None):
    body = f"HTTP/1.1 200 OK\r\n{http}\r\n".encode() + body
    return b"WARC/1.0\nWARC-Type: response\nContent-Length: %d\n\n%b\n" % (n or len(body), body)
CRAWL = [gzip.compress(record(page(text))) for text in (TEXTS * 3)[:54]]
def test_records_are_read_in_any_packing_and_charset_and_broken_ones_are_counted(tmp_path):
    text, kind = "Größe: naïve ", "Content-Type: text/html; charset={}\r\n"
    raw = [record(text.encode()), record(text.encode("latin-1"), kind.format("iso-8859-1")),
           record(b"<meta charset=koi8-r>" + "Ж".encode("koi8-r")), record(text.encode("utf-16")),
           record(gzip.compress(text.encode()), "Content-Encoding: gzip\r\n"),
           record(b"2\r\nab\r\n3;x\r\ncde\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n"),
           record(b"%PDF-1.4"), record(b"x").replace(b"200 OK", b"404 NO"), record(b"", n=10**12)]
    def read_docs(raw):
        counts, _ = data.Counter(), (tmp_path / "w").write_bytes(raw)
        return [doc["text"] for doc in data.read_docs(tmp_path / "w", counts)], counts
    for packed in (whole := b"".join(raw)), gzip.compress(whole), b"".join(map(gzip.compress, raw)):
        found, counts = read_docs(packed)
        assert found == [text, text, "<meta charset=koi8-r>Ж", text, text, "abcde"]
        assert counts["not text (for PDF: pypdf)"] == counts["wrong lengths"] == 1
    assert read_docs(packed[:-9]) == (found, counts | {"broken gzip files": 1})
    for at in range(0, len(whole), len(whole) // 40): read_docs(packed[:at] + b"7<" + whole[at:])
def test_extraction_keeps_article_and_structure_rules_say_why_they_drop_and_masks_hide():
    text, more = TEXTS[0], "<ul><li>First<li>Second</ul><pre>a\n  b</pre><h2>End</h2>"
    advert = "<div class=cookie-banner><p>Buy it, now, at our shop, it is cheap</p></div>"
    assert data.extract(page(text, more).decode().replace("<script>", advert)) == (
        text + "\n  \u2022 First\n  \u2022 Second\n\na\n  b\n\nEnd")
    assert data.extract("<div>" * 50_000) == data.extract("") == ""
    for rule, spoilt in ("gopher", text[:200]), ("c4", text + "{"), ("fineweb", text + "\n" + text):
        assert data.outside(rule, text) == "" != data.outside(rule, spoilt)
    assert data.mask("(283)-182 3829, a+b@c.co.uk, 192.0.2.1. 1.2.3.4.5", data.Counter()) == (
        "|||PHONE_NUMBER|||, |||EMAIL_ADDRESS|||, |||IP_ADDRESS|||. 1.2.3.4.5")
def test_a_text_is_dropped_if_it_is_like_one_that_was_kept_and_the_classifier_learns(tmp_path):
    rng, kept, state, file = random.Random(1), [], ([], {}), tmp_path / "t"
    docs = [[rng.choice("abcdefghij") * rng.randint(1, 9) for _ in range(60)] for _ in range(60)]
    for i in range(0, 60, 3): docs[i + 1] = [w if rng.random() > i / 600 else "x" for w in docs[i]]
    for doc in docs:
        grams = {tuple(doc[i:i + 5]) for i in range(56)}
        like = data.like(" ".join(doc).upper() + "!", .5, *state)
        assert bool(like) == any(len(grams & old) / len(grams | old) >= .5 for old in kept)
        if not like: kept.append(grams)
    assert 42 <= len(kept) < 57
    file.write_text("".join(f"{'xy'[i % 2]}\t{docs[i % 2 * 9][i % 50:]}\n" for i in range(90)))
    assert "9 of 9 right" in said(data, "train-classifier", file, "--out", f"{file}.npz")
def test_a_crawl_comes_by_range_and_its_pages_are_looked_at(tmp_path):
    with server({data.SOURCES["commoncrawl"].files[0]: b"".join(CRAWL * 9)}) as (url, asked):
        for n in 1, 2, 2:                       # another number is another file
            with contextlib.suppress(SystemExit): said(data, f"--data_dir {tmp_path} get "
                                                       f"commoncrawl --records {n} --mirror {url}")
    shown = said(data, "look", "--n=1", *tmp_path.glob("*/*.gz"))
    assert any(f"extracted: {text}\n" in shown for text in TEXTS) and "c4: keeps" in shown
    assert asked == ["bytes=0-24999", "bytes=0-49999"]
def test_the_funnel_ends_in_the_same_bytes_after_a_kill(tmp_path):
    files = [tmp_path / f"{k}.warc.gz" for k in range(6)]
    for k, file in enumerate(files): file.write_bytes(b"".join(CRAWL[9 * k:9 * k + 9]))
    words = lambda out: ["funnel", *map(str, files), "--stages=extract,dedup=.95,lines",
                         "--workers=1", "--show=1", f"--out={tmp_path / out}"]
    assert f"drops a copy, J 1.00: {TEXTS[0][:200]!r}" in said(data, *words("a"))
    slow = ("import data, sys, time; f = data.extract; data.extract = lambda p: time.sleep(.02) or "
            "f(p); data.main(data.build_parser().parse_args(sys.argv[1:]))")
    child = subprocess.Popen([sys.executable, "-c", slow, *words("b")], cwd=HERE, stdout=-3)
    while not (parts := [*tmp_path.glob("b/.f*/*.jsonl")]): time.sleep(.01)
    child.kill(), child.wait()
    assert len(parts) < 6 and not [*tmp_path.glob("b/*.txt")]
    said(data, *words("b"), "--workers=2")
    for out in "ab": assert (tmp_path / out / "text.txt").read_text().split(EOT)[:-1] == TEXTS

# --- kernels.py and model.py -------------------------------------------------

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
@cases("chunks", [[1] * 14, [2, 11, 1]])
def test_decode_with_cache_equals_full_forward_also_after_a_wrong_guess(cfg, chunks, monkeypatch):
    monkeypatch.setattr(kernels.KVCache, "SLACK", 4)  # so that a window's ring goes round
    m, x, parts = make(cfg), ids(3, 14), []
    cache = m.new_cache(3, 18)
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
    assert close(m(more, cache=cache)[0], m(torch.cat((texts[1:], more), 1))[0][:, 6:])  # goes on
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

@cases("name, sizes, more, n", [  # L, D, H, Hkv, Dh, F, V as in config.json; parameters in all
    ("gpt2", (12, 768, 12, 12, 64, 3072, 50257), {}, 124_439_808),
    ("llama", (12, 768, 4, 4, 192, 3072, 50257), {}, 190_460_160),  # two of the course
    ("llama", (48, 1600, 4, 4, 400, 6400, 50257), {}, 2_127_057_600),
    ("mixtral", (32, 4096, 32, 8, 128, 14336, 32000), dict(d_expert=14336), 46_702_792_704),
    ("qwen3", (28, 1024, 16, 8, 128, 3072, 151936), {}, 596_049_920),  # 0.6B
    ("gemma", (26, 1152, 4, 1, 256, 6912, 262144), dict(mixers=("WWWWWA" * 5)[:26]), 999_885_952),
    ("deepseek", (27, 2048, 16, None, 128, 10944, 102400), dict(  # V2-Lite
        ffns="s" + 26 * "x", n_experts=64, n_active=6, n_shared=2, d_expert=1408), 15_706_484_224)])
def test_counts_equal_the_published_ones_and_those_of_the_course(name, sizes, more, n):
    keys = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size")
    m = model.meta_model(model.preset(name, **{"seq_len": 1024, **dict(zip(keys, sizes)), **more}))
    assert sum(m.n_params().values()) == n == sum(p.numel() for p in m.parameters())
    total, head = sum(m.flops(1024).values()), m.flops(1024)["head"]
    course = {190_460_160: "3.4963e+11, 22.61 %", 2_127_057_600: "4.5133e+12, 3.65 %"}
    if n in course: assert f"{total:.4e}, {100 * head / total:.2f} %" == course[n]
@cases("kv", [1, 2, 4])
def test_attention_and_local_attention_in_blocks_equal_the_reference(kv):
    pos = torch.cat((torch.arange(7), torch.arange(250), -torch.ones(44, dtype=torch.long)))
    pos = torch.stack((pos, torch.arange(301)))
    ctx, real = kernels.Context(tiny(), pos, pos), (pos >= 0)[:, None, :, None]
    qkv, whole = numbers((2, 4, 301, 8), *2 * [(2, kv, 301, 8)]), kernels.attention_reference
    for f, *mask in (kernels.attention,), (lambda *qkv: ctx.attend(*qkv, 5), ctx.mask(5)):
        agree(lambda *qkv: f(*qkv) * real, lambda *qkv: whole(*qkv, *mask) * real, *qkv)
    assert len(kernels.blocks(301, 5)) == 61
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
def test_losses_and_softmax_equal_torchs_in_parts_and_for_huge_logits(monkeypatch):
    (x, W), y = numbers((3, 11, 8), (13, 8)), torch.arange(33).view(3, 11) % 14 - 1
    sizes, whole, z = set(), kernels.logits_of, 1000 * x @ W.T
    monkeypatch.setattr(kernels, "LOGITS", 13 * 5)  # five tokens at a time
    monkeypatch.setattr(kernels, "logits_of", lambda x, *w: sizes.add(len(x)) or whole(x, *w))
    nats = partial(F.cross_entropy, target=y, ignore_index=-1, reduction="none")
    agree(lambda x, W: kernels.linear_cross_entropy(x, W, y, 3.0),
          lambda x, W: nats(3 * torch.tanh(x @ W.T / 3).mT), x, W)
    for loss in kernels.cross_entropy_reference(z, y), kernels.linear_cross_entropy(1000 * x, W, y):
        assert torch.allclose(loss, nats(z.mT))
    assert sizes == {5, 3} and torch.allclose(kernels.softmax(z), z.softmax(-1))

@cases("K", [1, 2])
def test_experts_add_up_as_their_definition_says(K):
    c = tiny(ffns="x", n_active=K, n_shared=1, balance=0.5, router_z=0.25)
    moe, (x,) = make(c).layers[0].mlp, numbers((1, 20, 32))
    (y, aux), z = moe(x), moe.gate(x[0])
    p, on = z.softmax(-1), F.one_hot(z.topk(K).indices, 4).sum(1)  # (20, 4)
    share = p * on / ((p * on).sum(1, keepdim=True) if K > 1 else 1)  # else it trains no router
    want = sum(share[:, e, None] * moe.experts[e](x[0])[0] for e in range(4))
    loss = 2 * (on.sum(0) / on.sum() * p.mean(0)).sum() + 0.25 * z.logsumexp(1).square().mean()
    assert close(y[0], want + moe.shared_experts(x[0])[0]) and close(aux["loss"], loss)
    assert aux["load"].tolist() == on.sum(0).tolist()
def test_router_bias_evens_the_load_of_experts_without_a_loss():
    torch.manual_seed(0)
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
def test_dropout_is_for_training_softcap_bounds_logits_and_a_bfloat16_stream_keeps_its_loss():
    m, x = make(tiny(dropout=0.5, softcap=3.0), torch.float32), ids(2, 9)
    a, b, c = m(x)[0], m(x)[0], m.train()(x)[0]
    assert torch.equal(a, b) and not torch.equal(a, c) and 2 < a.abs().max() < 3
    want, m.compute_dtype = m.eval()(x, x)[0], torch.bfloat16
    assert m(x)[0].dtype == torch.bfloat16 and m(x, x)[0].dtype == torch.float32
    assert 0 < (m(x, x)[0] - want).abs().max() < 0.3  # eight bits

def test_tensor_files_round_trip_are_safetensors_and_damage_is_named(tmp_path):
    tensors = dict(b=torch.arange(5), c=torch.randn(2, 2).bfloat16(), none=torch.zeros(0, 3))
    model.save_tensors(path := tmp_path / "t.safetensors", tensors, {"who": "me"})
    out, metadata = model.load_tensors(path)
    assert metadata["who"] == "me" and out.keys() == tensors.keys()
    assert all(torch.equal(out[k], t) and out[k].dtype == t.dtype for k, t in tensors.items())
    n = int.from_bytes((raw := path.read_bytes())[:8], "little")
    a, b = json.loads(raw[8:8 + n])["b"]["data_offsets"]
    assert n % 8 == 0 and np.frombuffer(raw[8 + n:][a:b], np.int64).tolist() == [0, 1, 2, 3, 4]
    swaps = (b"[5]", b"[4]"), (b'"me"', b'"us"'), (b"I64", b"F64"), (raw[:8], b"\xff" * 8)
    for harmed in (b"", raw[:5], raw[:-3], raw[:12] + b"\xff" + raw[13:], raw[:-4] + b"xxxx",
                   *(raw.replace(*pair) for pair in swaps)):
        path.write_bytes(harmed)
        with pytest.raises(UserError, match=str(path)): model.load_tensors(path)

@cases("name", EVERY)
def test_a_saved_model_comes_back_the_same_also_as_others_would_publish_it(tmp_path, name):
    m, file = make(tiny(**EVERY[name]), torch.float32), tmp_path / "config.json"
    model.save_model(m, tmp_path)
    assert model.load_model(tmp_path).cfg == m.cfg
    kind = {row[0]: kind for kind, row in model.FAMILIES.items()}.get(name, "LM")
    config = json.loads(file.read_text())
    assert config["architectures"] == [kind] and config.pop("model_config")
    if kind != "LM": file.write_text(json.dumps(config))
    assert torch.equal(model.load_model(tmp_path)(ids(2, 20))[0], m(ids(2, 20))[0])
def look(*qkv, window=20):  # of (B, T, H, Dh): nothing later, `window` places in all
    q, k, v, mask = *(x.transpose(1, 2) for x in qkv), torch.ones(20, 20).tril().triu(1 - window)
    y = F.scaled_dot_product_attention(q, k, v, mask.bool(), enable_gqa=True)
    return y.transpose(1, 2).flatten(2)
def gpt2_by_hand(w, c, tokens):  # w: tensors by their published names, c: config.json
    norm = lambda x, n: F.layer_norm(x, (32,), w[n + ".weight"], w[n + ".bias"])
    conv = lambda x, n: x @ w[n + ".weight"] + w[n + ".bias"]
    x = w["wte.weight"][tokens] + w["wpe.weight"][:20]
    for h in ("h.0.", "h.1."):
        qkv = conv(norm(x, h + "ln_1"), h + "attn.c_attn").unflatten(-1, (3, 4, 8))
        x = x + conv(look(*qkv.unbind(2)), h + "attn.c_proj")
        y = F.gelu(conv(norm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh")
        x = x + conv(y, h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T

def llama_by_hand(w, c, tokens):  # and Mistral, Mixtral, Qwen2, Qwen3
    Dh, rope = c.get("head_dim", 8), c.get("rope_scaling") or c.get("rope_parameters") or {}
    rms = lambda x, n: F.rms_norm(x, x.shape[-1:], w[n + ".weight"], 1e-6)
    lin = lambda x, n: x @ w[n + ".weight"].T + w.get(n + ".bias", 0.0)
    ffn = lambda x, gate, up, down: lin(F.silu(lin(x, gate)) * lin(x, up), down)
    freq = {**c, **rope}.get("rope_theta", 1e4) ** (-torch.arange(0, Dh, 2).double() / Dh)
    if rope:  # waves that turn less than 4 times in 16 places slow down, below 1 by a factor of 8
        stays = ((16 * freq / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)
        freq = stays * freq + (1 - stays) * freq / 8
    turn = torch.exp(1j * torch.arange(20)[:, None, None] * freq)
    def heads(x, n):  # a pair of features is a complex number
        y = lin(x, n + "_proj").unflatten(-1, (-1, Dh))
        if n + "_norm.weight" in w: y = rms(y, n + "_norm")
        z = torch.complex(*y.chunk(2, -1)) * turn
        return y if n[-1] == "v" else torch.cat((z.real, z.imag), -1)
    x = w["model.embed_tokens.weight"][tokens]
    for m in ("model.layers.0.", "model.layers.1."):
        y, at, moe = rms(x, m + "input_layernorm"), m + "self_attn.", m + "block_sparse_moe."
        y = look(*(heads(y, at + n) for n in "qkv"), window=c.get("sliding_window", 20))
        x = x + lin(y, at + "o_proj")
        y = rms(x, m + "post_attention_layernorm")
        if "num_local_experts" in c:
            z = lin(y, moe + "gate")
            p = z.masked_fill(z < z.topk(2).values[..., 1:], -math.inf).softmax(-1)
            for e in range(4):
                x = x + p[..., e, None] * ffn(y, *(f"{moe}experts.{e}.w{i}" for i in (1, 3, 2)))
        else: x = x + ffn(y, *(f"{m}mlp.{n}_proj" for n in ("gate", "up", "down")))
    head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
    return lin(rms(x, "model.norm"), head)

def foreign(path, kind, more={}, harm=lambda c, w: None):
    """Writes a directory as others publish theirs -> the right logits of ids(2, 20)."""
    c = dict(vocab_size=61, architectures=[kind], model_type=kind[:-11].lower(), n_positions=64,
             n_embd=32, n_layer=2, n_head=4, hidden_size=32, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
             max_position_embeddings=64, **more)
    w, gpt2, index = model.published(make(model.read_config(c)).bfloat16()), kind[0] == "G", {}
    right = (gpt2_by_hand if gpt2 else llama_by_hand)({n: w[n].double() for n in w}, c, ids(2, 20))
    if gpt2: w["h.0.attn.bias"] = torch.ones(24, 24)  # old files have their masks
    harm(c, w)
    for i, file in enumerate(path / f"{n}.safetensors" for n in "ab"):
        part = {"transformer." * gpt2 + n: w[n] for n in sorted(w)[i::2]}
        index |= dict.fromkeys(part, file.name)
        model.save_tensors(file, part)
        file.write_bytes(file.read_bytes().replace(b"crc32", b"other"))  # ours alone has this
    for file, what in (("config.json", c), ("model.safetensors.index.json", {"weight_map": index}),
                       ("generation_config.json", {"eos_token_id": [3, 5]})):  # it has precedence
        (path / file).write_text(json.dumps(what))
    return right

STRETCH = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
@cases("kind, more", [("GPT2LMHeadModel", {}), ("Qwen2ForCausalLM", {}), ("Qwen3ForCausalLM", {}),
    ("MistralForCausalLM", dict(sliding_window=5)),
    ("MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2)),
    ("LlamaForCausalLM", dict(rope_theta=100, head_dim=12, rope_scaling=STRETCH)),
    ("LlamaForCausalLM", dict(rope_parameters=dict(STRETCH, rope_theta=100.0),
                              tie_word_embeddings=True))])
def test_published_models_give_the_logits_of_their_definition(tmp_path, kind, more):
    logits = foreign(tmp_path, kind, more)
    m = model.load_model(tmp_path, dtype=torch.float64)
    assert torch.allclose(m(ids(2, 20))[0], logits, atol=1e-5)  # rope's tables are float32
    model.save_model(m, tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config.get("rope_scaling") == (STRETCH if "rope" in str(more) else None)
    assert config["eos_token_id"] == m.eos == [3, 5]
@cases("harm, says", [
    (lambda c, w: c.update(architectures=["Bert"]), "Bert.*GPT2LMHeadModel.*LlamaForCausalLM"),
    (lambda c, w: c.update(rope_scaling=dict(type="yarn", factor=4.0)), "type.*yarn"),
    (lambda c, w: c.update(attention_bias=True), "attention_bias.*True"),
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
    code = "import glob, itertools, json, re, subprocess, torch, triton, kernels as K\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True,
                          env={**os.environ, "TRITON_INTERPRET": str(int(interpret))})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
GPU = partial(pytest.param, "cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))
@cases("device, dtype, most", [
    ("cpu", "float32", 1e-5), GPU("float32", 1e-4), GPU("float16", 4e-3), GPU("bfloat16", 2e-2)])
def test_attention_kernel_equals_float64_and_a_model_trains_through_it(device, dtype, most):
    out, said = child(f"kind, new = torch.{dtype}, lambda *n: torch.randn(n).to({device!r})" + """
import model
if K.INTERPRET:  # Triton 3.6 with NumPy 2.4 cannot take a range of a tensor
    import triton.runtime.interpreter as I
    I._patch_lang_tensor = lambda t, scope, patch=I._patch_lang_tensor: (patch(t, scope),
        scope.set_attr(t, "__index__", lambda s: int(s.handle.data.reshape(-1)[0])))
torch.empty = lambda *a, f=torch.empty, **k: f(*a, **k).fill_(7)  # what is not written shows
found, k = [], 1 if K.INTERPRET else 29
for H, G, T, D, window in (4, 2, 37, 24, None), (2, 2, 61, 16, 20), (1, 1, 18, 256, 2):
    pos, out = torch.arange(T * k, device=new(1).device), []
    seen = (pos <= pos[:, None]) & (pos > pos[:, None] - (window or T * k))
    for f, *how in (K.FlashAttention.apply, True, window), (K.attention_reference, seen):
        if not out: x = [new(2, h, T * k, D).to(kind) for h in (H, G, G, H)]
        *qkv, g = [t.to(torch.float64 if out else kind).requires_grad_() for t in x]
        out.append(((y := f(*qkv, *how)), *torch.autograd.grad(y, qkv, g)))
    found += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*out)]
m = model.LM(model.preset("llama", vocab_size=30, mixers="WA", window=5, n_kv_heads=2)).to(new(1))
x, out = torch.randint(0, 30, (2, 20), device=new(1).device), []
for K.KERNELS["use"] in ("torch", "triton"):
    out.append(((y := m(x, x)[0].mean()[None]), *torch.autograd.grad(y, [*m.parameters()])))
print(json.dumps(found + [(a - b).abs().max().item() for a, b in zip(*out)]))""", device == "cpu")
    assert max(out) < most and "attention by torch" in said and "attention by triton" in said

def test_attention_kernel_compiles_for_an_h100_into_its_registers_and_tensor_cores():
    for name, D, shared, spills, products in child("""out = []
for D, name in itertools.product((64, 128, 256), ("attention", "dq", "dkv")):
    BM, BN, how = K.tile(name, torch.empty(1, D, dtype=torch.bfloat16))
    spec = dict(dict.fromkeys(("sa", "sc", "sx", "sy", "sd"), 3 * ("i32",)), H="i32", T="i32",
                LSE="*fp32", DELTA="*fp32", scale="fp32", BD=K.room(D), BM=BM, BN=BN, D=D,
                GROUPS=2, CAUSAL=True, WINDOW=None, KEYS=name == "dkv", FORWARD=name == "attention")
    kinds, values, hints, by_16 = {}, {}, {}, [["tt.divisibility", 16]]
    for i, p in enumerate(K.attention_pass.params):
        kind = kinds[p.name] = spec.get(p.name, "*bf16")
        if p.is_constexpr: kinds[p.name], values[i,] = "constexpr", kind
        elif kind[0] == "*": hints[i,] = by_16
        elif kind[0] == "i32": hints |= {(i, j): by_16 for j in range(3)}
    source = triton.compiler.ASTSource(K.attention_pass, kinds, values, hints)
    built = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", 90, 32), how)
    ptxas = max(glob.glob(triton.__path__[0] + "/backends/nvidia/bin/ptxas*"))  # the newer
    log = subprocess.run([ptxas, "-v", "-arch=sm_90a", "/dev/stdin", "-o", "/dev/null"], text=True,
                         input=built.asm["ptx"], capture_output=True)
    spills = [int(n) for n in re.findall("([0-9]+) bytes spill", log.stderr)]
    out.append((name, D, built.metadata.shared, spills, "wgmma" in built.asm["ptx"]))
print(json.dumps(out))""", False)[0]:
        assert shared <= 232_448 and spills == [0, 0], (name, D, shared, spills)
        assert products == ((name, D) != ("dkv", 256))  # there tiles have 32 rows, not 64

# --- optim.py ----------------------------------------------------------------

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

def test_the_first_step_of_shampoo_sets_all_singular_values_alike():
    for shape in (6, 4), (4, 6):  # (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T, made 1 an entry long
        p, G = torch.nn.Parameter(torch.zeros(shape).double()), numbers(shape)[0].detach()
        (U, _, V), p.grad = torch.linalg.svd(G, full_matrices=False), G
        optim.Shampoo([p], lr=1.0).step()
        assert torch.allclose(p, -U @ V * math.sqrt(24 / 4), atol=1e-6)
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
        params = numbers((12,), (5,), (2,))  # the third has no gradient
        for p in params[:2]: p.grad = size * torch.ones_like(p)
        assert optim.clip_grad_norm(params, 1.0) == pytest.approx(norm := size * 17 ** 0.5)
        assert all(torch.allclose(p.grad, p * 0 + size / max(norm, 1)) for p in params[:2])
@cases("name, warmup, cooldown, final, values", [  # {fraction of the run: of the peak}
    ("cosine", 1 / 3, None, 0.1, {0: 0, 1 / 3: 1, 8 / 21: 0.98871756, 2 / 3: 0.55, 1.5: 0.1}),
    ("wsd", 0.1, 0.4, 0.2, {0: 0, 0.05: 0.5, 0.1: 1, 0.35: 1, 0.6: 1, 0.8: 0.6, 1: 0.2, 1.5: 0.2})])
def test_schedule_has_the_values_worked_by_hand(name, warmup, cooldown, final, values):
    schedule = optim.SCHEDULES[name]
    assert {x: schedule(x, warmup, cooldown, final) for x in values} == pytest.approx(values)
def test_optimizers_refuse_what_they_do_not_know():
    m = model.LM(tiny())
    for bad in (lambda: optim.SGD(optim.param_groups(m, weight_decay=0.1)),
                lambda: optim.Adam(m.parameters(), bta=1), lambda: optim.param_groups(m, tail=0.1),
                lambda: optim.Adam(m.parameters()).load_state_tensors({"0.0.m": torch.ones(4)})):
        with pytest.raises(AssertionError): bad()

# --- sample.py ---------------------------------------------------------------

BYTES = bpe.Tokenizer(dict(enumerate(bpe.BYTES)), [], [EOT, "<|im_start|>", "<|im_end|>"])
def test_sampling_by_top_p_top_k_and_min_p_keeps_the_tokens_worked_by_hand():
    z = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    kept = lambda z: torch.isfinite(z).nonzero().flatten().tolist()
    crossing = [kept(sample.top_p(z, p)) for p in (0.4, 0.6, 0.8, 1.0)]  # what crosses p stays
    assert crossing == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert kept(sample.top_k(z, 2)) == kept(sample.min_p(z, 0.4)) == [1, 3]
    assert kept(sample.top_k(torch.zeros(5), 2)) == [0, 1]
@torch.no_grad()
def one_at_a_time(m, row, how):  # greedy, all of the text through the model for each token
    row, n, begin = list(row), len(row), 0
    while len(row) < n + how.max_tokens and row[n:][-1:] != [how.stop]:
        if len(row) - begin > m.cfg.seq_len: begin = len(row) - m.cfg.seq_len // 2
        row.append(int(m(torch.tensor([row[begin:]]))[0][0, -1].argmax()))
    return row[n:-1] if row[-1] == how.stop else row[n:]
SERVED = [dict(n_kv_heads=2), dict(mixers="WA", window=5), dict(ffns="x", bigram=300),
          *(dict(mixers=letters) for letters in ("MA", "DA", "SL", "H"))]
def schedule(seed):  # a random engine, and texts at random times, against one at a time
    rng = random.Random(seed)
    m, size = make(tiny(**SERVED[seed % len(SERVED)])), rng.choice([1, 2, 3, 8])
    guess = rng.choice([None, sample.look_up, sample.draft_of(m)])
    engine = sample.Engine(m, rng.choice([None, 0, 60 // size]), size, rng.choice([1, 3, 7, 40]),
                           rng.choice([1, 2, 9]), guess, rng.choice([1, 3, 6]))
    some, jobs, todo = partial(rng.choices, range(61)), {}, rng.randrange(1, 4)
    start, shared = some(k=12), 0
    while todo or engine.texts:
        if todo and rng.random() < 0.4:
            prompt = rng.choice([7, 8]), *start[:rng.randrange(13)], *some(k=rng.randrange(12))
            job, todo = (prompt, sample.Sampling(rng.choice([1, 5, 21]), 0.0, stop=5)), todo - 1
            jobs[job] = [engine.add(*job) for _ in range(rng.choice([1, 3]))]
        if jobs and rng.random() < 0.03: jobs[job][-1].ended = "left"
        engine.step()
        shared = max([shared, *engine.ref[1:]])
        assert sum(engine.ref) == sum(len(text.blocks) for text in engine.texts)
        assert all((n == 0) == (b in engine.idle) for b, n in enumerate(engine.ref) if b)
    for job, texts in jobs.items():
        want = one_at_a_time(m, *job)
        for text in texts: assert text.new == want[:text.n_new if text.ended == "left" else None]
    return engine, shared

def test_generate_says_with_and_without_cache_what_decoding_one_at_a_time_says(cfg):
    m, told, how = make(cfg), [], sample.Sampling(40, 0.0)  # 40 outgrow the context of 24 twice
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], list(range(20))]
    want = [one_at_a_time(m, prompt, how) for prompt in prompts]
    assert sample.generate(m, prompts, how, on_token=lambda *it: told.append(it)) == want
    assert want == [[token for row, token in told if row == i] for i in range(3)]
    assert want == sample.generate(m, prompts, how, use_cache=False)
def test_random_schedules_say_what_decoding_one_at_a_time_says_and_lose_no_block():
    engines, shared = zip(*map(schedule, range(40)))
    accepted, guessed = (sum(getattr(e, n) for e in engines) for n in ("accepted", "guessed"))
    assert max(shared) > 1 and 9 < accepted < guessed - 9

def test_verified_guesses_have_exactly_the_models_distribution():
    rng, V = np.random.default_rng(0), 4
    draw = lambda *shape: torch.tensor(rng.dirichlet(np.full(V, 0.5), shape))
    p1, p2, p3, q1, q2 = draw(), draw(V), draw(V, V), draw(), draw(V)  # by the tokens before
    total = torch.zeros(V, V, V).double()
    for a, b in itertools.product(range(V), repeat=2):
        stack = [((), q1[a] * q2[a, b])]
        while stack:  # all that verify may do after guesses a, b
            path, chance = stack.pop()
            def choose(p, left=iter(path)):
                for choice in left: return choice
                stack.extend(((*path, i), chance * x) for i, x in enumerate(p) if x)
                raise StopIteration
            p, q = torch.stack([p1, p2[a], p3[a, b]]), torch.stack([q1, q2[a]])
            try: x, *more = sample.verify(p, q, [a, b], choose)
            except StopIteration: continue
            later = [p2[x][:, None] * p3[x], p3[x, more[:1]], 1.0][len(more)]  # the model goes on
            total[(x, *more)] += chance * (later[0] if len(more) == 1 else later)
    assert (total - p1[:, None, None] * p2[:, :, None] * p3).abs().max() < 1e-12

def test_sampled_frequencies_follow_the_model_with_and_without_a_draft():
    target, small = (make(tiny(vocab_size=3, d_model=d)) for d in (16, 8))
    p = target(torch.tensor([[0, a] for a in range(3)]))[0].div(1.5).softmax(-1)
    want = 900 * (p[0, 0, :, None] * p[:, 1]).flatten()  # of the first two tokens
    how = partial(sample.Sampling, 3, temperature=1.5)
    for guess in None, sample.draft_of(small):
        texts = sample.generate(target, [[0]], how(), n=900, guess=guess, k=2)
        got = torch.tensor([3 * a + b for a, b, _ in texts]).bincount(minlength=9)
        assert ((got - want) ** 2 / want).sum() < 26.1  # of 8 degrees: once in a thousand
        assert texts[7:8] == sample.generate(target, [[0]], how(seed=7), guess=guess, k=2)
def test_sliding_windows_count_each_token_once_behind_enough_others():
    batches = list(sample.sliding(np.arange(83), 24, 10))
    assert torch.cat([y[y >= 0] for _, y in batches]).tolist() == list(range(1, 83))
    for x, y in batches: assert x.shape[1] <= 24 and (x[0, 0] == 0 or (y[:, :14] < 0).all())
def test_multiple_choice_takes_what_the_model_finds_likeliest(tmp_path):
    path, m = tmp_path / "q.jsonl", make(tiny(vocab_size=259, seq_len=99))
    m.forward = lambda x, y: ((1.0 + (y != ord("b"))) * (y >= 0), {})  # a b costs 1 nat, else 2
    path.write_text('{"ctx": "1", "endings": ["bb", "aaa"], "label": "0"}\n'
                    '{"question": "2", "choices": ["bbbb", "a"], "answer": 0}\n')
    shares, errors = sample.multiple_choice(m, BYTES, sample.read_questions(path))
    assert shares.tolist() == [0.5, 1.0] and errors[0] == pytest.approx(0.5 / 2 ** 0.5)
def test_text_stream_waits_for_whole_characters_and_for_what_may_be_a_stop():
    stream = sample.TextStream(BYTES, (out := []).append, ["<end>", "\nQ:"])
    assert not any(map(stream.put, "né🌍<en".encode())) and out == ["n", "é", "🌍"]
    assert [stream.put(b) for b in b"<end>"] == 4 * [False] + [True] and out[3:] == ["<en"]
def test_a_chat_keeps_its_turns_and_no_user_can_speak_as_another(monkeypatch):
    lines, asked = iter(["<|im_end|>", "you"]), []
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or exec("raise EOFError"))
    engine = sample.Engine(make(tiny(vocab_size=259, seq_len=128)))
    add, engine.add = engine.add, lambda *it: asked.append(it[0]) or add(*it)
    sample.chat(engine, BYTES, sample.Sampling(3, 0.0))
    assert asked[0].count(BYTES.special_tokens["<|im_end|>"]) == 1  # that of his turn
    assert asked[1][:len(asked[0])] == asked[0] and len(asked) == 2 and not sum(engine.ref)
def test_eight_bits_are_rounded_by_half_a_step_and_multiply_as_what_they_stand_for():
    linear, x = kernels.Linear(7, 5, bias=True).double(), torch.randn(2, 3, 7).double()
    w = (q := sample.Int8(linear)).weight * q.scale[:, None]
    assert ((w - linear.weight).abs() <= linear.weight.abs().amax(1, keepdim=True) / 253).all()
    assert torch.allclose(q(x), x @ w.mT + linear.bias)

# --- train.py ----------------------------------------------------------------

CPU = train.Machine(torch.device("cpu"), torch.float32, False, 1e12, "")
TEXT = "".join(f"{i} times {j} is {i * j}\n" for i in range(40) for j in range(40))
TINY = "--n_layers 1 --d_model 16 --n_heads 2 --seq_len 16 --batch_size 4 --log_steps 1 --threads 1"
ON_TEXT = "--device cpu --dataset . --tokenizer byte"
WHOLE = f"{ON_TEXT} {TINY} --dtype float32 --dropout 0.1 --steps 60 --evals 2 --save_minutes 0"
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a text, and a run that came to its end undisturbed; `desk` is a copy of it."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(train, f"{WHOLE} --run one")
    return folder
@pytest.fixture
def desk(tmp_path, monkeypatch, finished):
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
        batches = [*zip(x.split(micro), y.split(micro))]
        got = [train.local_step(m, batches), *(p.grad for p in params)]
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want))

def test_evaluation_counts_every_token_and_byte_once_whatever_the_batch(desk):
    m, tokens = make(tiny(dropout=0.5)), np.random.default_rng(0).integers(0, 61, 333)
    pairs = zip(*(torch.tensor(x)[None].split(24, 1) for x in (tokens[:-1], tokens[1:])))
    nats = sum(m(*pair)[0].sum().item() for pair in pairs)
    for batch_size in (1, 5, 100):
        batches = data.in_order(tokens, 24, batch_size)
        out = sample.evaluate(m.train(), batches, 500, CPU.device)
        assert out["tokens"] == 332 and out["loss"] == pytest.approx(nats / 332)
        assert out["bits_per_byte"] == pytest.approx(nats / math.log(2) / 500)
    found = [train.validation(data.prepare("text.txt", "byte"), limit) for limit in (101, None)]
    n = len(found[1][0])  # a byte a token, less two end-of-texts; of a part, its own bytes
    assert [(len(some), n_bytes) for some, n_bytes in found] == [(101, 100), (n, n - 2)]
def test_a_recipe_scales_to_other_budgets_by_the_laws_that_it_names():
    for row, k in itertools.product(train.RECIPES.values(), (2.0 ** -30, 1 / 9, 1, 64)):
        new = train.recipe(row, k * row["minutes"])[0]
        batch = max(1, row["batch_size"] * k ** (0.383 / 2))  # tokens go with the root of minutes
        assert math.log2(new["batch_size"]) % 1 == 0 and 0.7 < new["batch_size"] / batch < 1.42
        assert new["batch_size"] % (new["micro_batch"] or 1) == 0
        if k > 1: assert [new[f] / row[f] for f in ("n_layers", "d_model", "n_heads")] == [2, 2, 2]
        if k == 1: assert new == {"micro_batch": None, **row}

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
    (newest, older), before = train.checkpoints(one := desk / "runs/one"), losses_of(one)
    newest.write_bytes(newest.read_bytes()[:-50])
    assert newest.name in said(train, "--resume") and older.stem.endswith("59")
    assert losses_of(one) == before
    for path in train.checkpoints(one): path.write_bytes(b"")
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
    for how in "cpu --dtype float32", "cuda --dtype bfloat16":
        call(train, f"{WHOLE} --dropout 0 --run {how[:3]} --device {how}")
    a, b = ([loss for _, loss in losses_of(desk / "runs" / name)[0]] for name in ("cpu", "cud"))
    assert a == pytest.approx(b, rel=0.05) and b[-1] < b[0] - 0.5  # bfloat16 keeps eight bits
def test_owt_from_a_mirror_goes_from_download_to_sample_and_board(desk):
    text, runs = (EOT + "\n").join(TEXT.splitlines()).encode(), desk / "runs"
    files = {f"owt_{n}.txt.gz": gzip.compress(text[-9000:]) for n in ("train", "valid")}
    flags = f"{TINY} --dataset owt --steps 3 --vocab_size 300 --device cpu --run web"
    with server(files) as (url, _): out = said(train, f"{flags} --mirror {url}")
    assert "no CUDA device" in out and "sample:" in out and "validation bits_per_byte" in out
    assert said(sample, "--run web --prompt '7 times' --max_tokens 5").startswith("7 times")
    row = json.loads((runs / "web/result.json").read_text())
    (runs / "one/result.json").write_text(json.dumps(row | {"bits_per_byte": 0.1}))
    assert re.findall(r"^(one|web)\b", said(train, "--board"), re.M) == ["one", "web"]
def test_a_race_trains_each_value_and_seed_and_prints_a_table(desk):
    table = said(train, f"{WHOLE} --steps 3 --race mixers=A,S --seeds 2")
    head, *table = map(str.split, table.splitlines())
    assert [row[0] for row in (head, *table)] == ["mixers", "A", "S"] and table[0][2] != table[1][2]
    for mixer, _, mean, std, *_ in table:
        runs = [desk / f"runs/race-mixers-{mixer}-{i}" for i in (1, 2)]
        a, b = (json.loads((run / "result.json").read_text())["bits_per_byte"] for run in runs)
        assert a != b and (mean, std) == (f"{(a + b) / 2:.4f}", f"{abs(a - b) / 2 ** 0.5:.4f}")
def test_walk_and_profile_leave_no_run(desk):
    out, profile, noise = (said(train, f"{WHOLE} --{look}") for look in train.LOOKS)
    before, after = map(float, re.search(r"9. .*\n +loss (\S+) -> (\S+)", out).groups())
    assert after <= before and "layers.0.self_attn.q_proj" in out and "aten::" in profile
    assert "gradient noise scale" in noise and (desk / "runs/trace.json").exists()
    assert len([*desk.glob("runs/*/")]) == 1
def test_the_micro_batch_is_halved_until_it_fits_and_the_batch_stays():
    m, sizes = model.LM(tiny()), []
    loader = data.Loader(np.arange(600, dtype=np.uint16) % 61, 8, 4, 0)
    def step(forward, batches):
        sizes.append(len(batches[0][0]))
        if sizes[-1] > 1: raise torch.OutOfMemoryError
    machine, cfg = dataclasses.replace(CPU, compile=True), train.TrainConfig(batch_size=4)
    of = m, optim.SGD(m.parameters()), loader, cfg, machine, step
    assert train.warm_up(*of)[1] == 1 and sizes == [4, 2, 1]
    assert loader.seen == 0 and sum(len(x) for x, _ in train.take(loader, 1, CPU.device)) == 4
BEFORE = {train: ON_TEXT, sample: "--run one"}  # and then flags, of which the last is wrong
LAST = {sample: "--temperature -1 | --top_p 0 | --max_tokens 0 | --top_k 0 | --prompt ''",
    train: """--preset gpt7 | --dataset nowhere | --minutes -1 | --batch_size 6 --micro_batch 4
    --optimizer adamm | --minutes 1 --steps 5 | --n_heads 7 | --device abacus | --run none --resume
    --mixers AX | --mixers AAW | --ffns '' | --n_kv_heads 3 | --mixers L --n_kv_heads 2
    --window 4 | --d_head 3 | --d_latent 8 | --n_layers 0 | --n_experts 4 | --ffns x --n_active 9
    --pos rop | --pos none --rope_theta 5 | --dropout 1 | --softcap -1 | --softcap inf"""}
MISTAKES = [(script, flags, re.findall(r"--(\w+)", flags)[-1] + ": got")
            for script, rows in LAST.items() for flags in re.split(r" \| |\n +", rows)] + [
    (train, "--race mixers=A,Q", "mixers: got"), (train, "--race seed=1 --run x", "--run"),
    (train, "--race width=3,4", "FIELD"), (train, "--run one", "exists"),
    (train, "--batch_size 100000", "a smaller --"), (sample, "--run two", "as under runs/: one"),
    (train, "--run one --resume --softcap 3.0", "softcap: got 3.0, wanted None"),
    (sample, "--prompt \udce9", "a text in UTF-8"), (sample, "--prompt " + "x" * 17, "to 16, the")]
@cases("script, flags, says", MISTAKES, ids=lambda x: ascii(x)[:60])
def test_a_users_mistake_gives_one_message_and_leaves_nothing(desk, capsys, script, flags, says):
    with pytest.raises(SystemExit) as e: call(script, f"{BEFORE[script]} {flags}")
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and says in err[-1] and len(err) == 1 + 2 * ("--prompt" in flags)
    assert [path.name for path in desk.glob("runs/*")] == ["one"]

# --- parallel.py: one forked group of four ranks, tests of what it found -----

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
def ten_steps(m, opt, micro, step, params, norms=optim.norms, n=1, rank=0, steps=10):
    """-> losses and norms; gradients of `params` in the first step; weights: [(place, tensor)]."""
    told, moved = [], sum((g["params"] for g in opt.groups), [])
    for i in range(steps):
        x, y = (ids(8, 16, seed=seed) for seed in (i, 100 + i))
        y[5:, 3:] = -1  # micro-batches count unlike numbers of targets
        opt.zero_grad()
        told.append(step(m, [*zip(*(t.chunk(n)[rank].split(micro) for t in (x, y)))]))
        if i == 0: first = [(p.place, p.grad.clone()) for p in params]
        told.append(optim.clip_grad_norm(moved, 0.5, norms))
        opt.step(0.3)
    return told, first, [(p.place, p.detach()) for p in moved]
def alone(optimizer, micro, fields):
    m, opt = jolted(optimizer, fields)
    for name, p in m.named_parameters(): p.place = optim.Place(name)
    return ten_steps(m, opt, micro, train.local_step, [*m.parameters()])
def divided(m, opt, text, **flags):
    how = parallel.ParallelConfig(plan=text, **flags)
    return parallel.Engine(m, opt, parallel.Mesh(parallel.read_plan(text, 4), how.ring), how)
def run_plan(text, flags, optimizer, micro, fields, steps=10, want=None):
    """-> engine, largest difference from one process: (in the first step, in all)."""
    engine = divided(*jolted(optimizer, fields), text, **flags)
    told, *got = ten_steps(None, engine.optimizer, micro, engine.step, engine.pieces, engine.norms,
                           engine.mesh.dp.n, engine.mesh.dp.rank, steps)
    gaps = [abs(a - b).item() for a, b in zip(told, want[0])] if want else []
    for some, whole in zip(got, want[1:] if want else ()):
        whole = {place.name: x for place, x in whole}
        gaps += [max((x - at.take(whole[at.name])).abs().max().item() for at, x in some)]
    world = engine.mesh.world
    return engine, want and world.small(max(gaps[0], gaps[-2]), max(gaps), op=optim.MAX).tolist()
def saved(folder, m, opt):   # and read: all tensors of weights and optimizer
    divided = isinstance(m, parallel.Engine)
    save = parallel.save_shards if divided else train.save_checkpoint
    if divided or dist.get_rank() == 0: save(folder, m, opt or m.optimizer, train.Progress())
    dist.barrier()
    return train.read_checkpoint(train.checkpoints(folder)[0])[0]

def rank_of_four(rank, folder, wants):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    gaps, true = [run_plan(*row, want=want)[1] for row, want in zip(PLANS, wants)], {}
    equal = lambda some: len(some[0]) > 40 and all(
        torch.equal(a[k], some[0][k]) for k in some[0] for a in some)
    (folder / "none/checkpoint-00000000.part").mkdir(parents=True, exist_ok=True)
    (folder / "none/checkpoint-00000000.part/00007.safetensors").touch()   # of a kill
    true["sharded ranks equal plain ones bit for bit"] = equal([saved(folder / s, run_plan(
        "dp=4", {"shard": s}, "adamw", 2, MODERN, 3)[0], None) for s in parallel.SHARDS])
    fields, seen = dict(MODERN, n_kv_heads=4), []   # 4 heads, as many ranks
    of = run_plan(*PLANS[2][:4], fields, steps=2)[0], None
    for text in ("tp=4", "", "dp=4", None):
        seen.append(saved(folder / f"to {text}", *of))
        of = jolted("muon", fields)
        train.load_checkpoint(folder / f"to {text}", *of)
        if text: of = divided(*of, text, shard="full"), None
    true["a checkpoint goes through other plans bit for bit"] = equal(seen)
    sent, x, messages = {}, torch.arange(4.0) + rank, []
    for ring, shard, micro in itertools.product((False, True), ("full", "none"), (1, 2)):
        engine = divided(*jolted("adamw", dict(preset="llama", n_layers=4)), "", ring=ring,
                         shard=shard)
        g, messages[:] = engine.mesh.dp, ()
        got = [g.reduce_scatter(x[:, None])().item(), *g.all_reduce(x), *g.all_gather(x)()[:, 0]]
        true[f"collectives add up, {ring}"] = got == [6 + 4 * rank, 6, 10, 14, 18, 0, 1, 2, 3]
        for b in sum(engine.units, []):  # when one is sent, has the lowest layer a gradient?
            b.reduce = lambda b=b, reduce=b.reduce: (messages.append(
                [min(b.params), engine.units[0][0].sum.any().item()]), reduce())
        parallel.SENT.clear()
        ten_steps(None, engine.optimizer, micro, engine.step, (), engine.norms, 4, rank, 1)
        sent[shard, micro] = parallel.SENT["data"]
    true["gradients travel once a step"] = sent["none", 1] == sent["none", 2] > 0
    true["and once a micro-batch, if shards"] = sent["full", 1] > 1.8 * sent["full", 2]
    true["while backward goes on"] = ".3." in messages[0][0] and not messages[0][1]
    if rank == 0: (folder / "found.json").write_text(json.dumps([gaps, true]))

@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    wants = [alone(*row[2:]) for row in PLANS]
    mp.start_processes(rank_of_four, (folder, wants), nprocs=4, start_method="fork")
    return *json.loads((folder / "found.json").read_text()), folder
@cases("i", range(len(PLANS)), ids=[" ".join([p[0], *p[1]]) for p in PLANS])
def test_a_plan_has_the_loss_gradients_and_ten_steps_of_one_process(four, i):
    assert four[0][i][0] < 1e-12 and four[0][i][1] < 1e-10
def test_shards_checkpoints_and_messages_of_four_ranks_are_as_their_sentences_say(four):
    assert all(four[1].values()), four[1]
def test_damaged_shards_are_named_and_the_checkpoint_before_them_used(four, capsys):
    stem = four[2] / "none/checkpoint-00000000"
    some = [Path(shutil.copytree(stem, f"{stem}"[:-1] + i)) for i in "123"]
    os.truncate(some[0] / "00002.safetensors", 9999)
    for file in (some[1] / "00003.safetensors", *some[2].iterdir()): file.unlink()
    assert train.load_checkpoint(stem.parent, *jolted("adamw", MODERN)).step == 0
    out = capsys.readouterr().out
    assert all(f"{path} is left out" in out for path in some)
    assert train.checkpoints(stem.parent) == [stem]
@cases("name,held", [("gpipe", lambda p, m, s: m), ("1f1b", lambda p, m, s: min(p - s, m))])
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
@cases("text,world,words", [
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

# --- scaling.py --------------------------------------------------------------

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
    inside, drawn = 0, scaling.resamples(54, count)  # README.md: 200 trials of 100, by a call
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

# --- align.py ----------------------------------------------------------------

def test_losses_and_gradients_equal_their_definitions_clipped_packed_or_not():
    lm, hidden = model.LM(model.preset("llama", vocab_size=16, d_model=16)).double(), []
    rows = [[(torch.randint(16, (6,)).tolist(), [t > i for t in range(6)])] for i in range(4)]
    o, batch = types.SimpleNamespace(low=0.2, high=0.28, kl=0.3, command="rl"), align.lay_out(rows)
    lm.critic, mask = align.scalar(lm), torch.tensor([own[1:] + [False] for [(_, own)] in rows])
    lm.norm.register_forward_hook(lambda module, _, y: hidden.append(y))
    w, adv, noise, ref, V = torch.randn(5, 4, 6).double() * mask
    z, at = lm(batch["tokens"])[0].log_softmax(-1), batch["targets"].clamp(min=0)[..., None]
    lp, edge = z.gather(-1, at)[..., 0] * mask, (adv > 0).double() * 0.48 + 0.8
    old, now, r = (lp + noise).detach(), lp.detach(), 0.3 * (lp - ref).sum(1)
    held, near = ((lp - old).exp() - edge) * adv > 0, (0 * V).clamp(V - 0.2, V + 0.28)
    gain = adv * torch.where(held, edge, (lp - old).exp()) - 0.3 * ((ref - lp).exp() - 1 - ref + lp)
    gain = gain - torch.maximum(ref ** 2, (near - ref) ** 2) / 2  # a new critic says 0
    f, dpo = partial(align.policy, w=w), partial(align.preferred, w=torch.full((4,), 1 / 4))
    for loss, want in (
            (partial(f, adv=adv, old=old, ref=ref, values=V, returns=ref), -w * gain),
            (f, -w * lp), (partial(f, adv=adv, old=now), -w * adv * (1 + lp - now)),  # ratio 1
            (partial(dpo, ref=ref), (1 + (r[1::2] - r[::2]).exp()).log() / 2)):
        got, want = loss(lm, o, **batch)[0], want.sum()
        g, e = (torch.autograd.grad(x, y, retain_graph=True)[0]
                for x, y in ((got, hidden[-1]), (want, hidden[0])))
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12) and torch.allclose(g, e)
        assert not g[~mask].any() and g[mask].any() and held[mask].any()  # zero in the prompt
    packed = align.lay_out(align.pack(sum(rows, []), 18))  # three and one, here micro-batches
    packed["w"] = align.NORMS["token"]((packed["targets"] >= 0).double(), None)
    loss = sum(align.policy(lm, o, *x)[0] for x in zip(*(y.split(1) for y in packed.values())))
    assert torch.allclose(loss, -lp[mask].mean(), rtol=1e-12, atol=1e-12) and len(packed["w"]) == 2
    grads = (torch.autograd.grad(x, [*lm.layers.parameters()]) for x in (loss, -lp[mask].mean()))
    assert all(map(torch.allclose, *grads))

def test_advantages_and_pass_at_k_are_those_worked_by_hand():
    r, at = torch.tensor([[0.2, 0.5, 0.0, 0.4], [1, 0, 0, 0]]), {"mask": torch.ones(8, 1)}
    of = lambda name: align.ADVANTAGES[name][0](r, at).view(2, 4)
    assert torch.allclose(of("grpo")[0], torch.tensor([-.3382, 1.0147, -1.2402, .5637]), atol=1e-4)
    assert torch.allclose(of("rloo"), r - (r.sum(1, keepdim=True) - r) / 3)  # mean of the others
    assert of("dr_grpo")[1].tolist() == [0.75, -0.25, -0.25, -0.25] and of("expert").sum() == 1
    at = dict(mask=torch.tensor([[0, 1, 1, 0]]).bool(), values=torch.tensor([[7.0, 1, 3, 5]]))
    align.gae(torch.tensor([[2.0]]), at)  # its second value is 3, its reward 2
    assert at["returns"][0].tolist() == pytest.approx([0, 3 + 0.95 * (2 - 3), 2, 0])
    draws = [min(some) < 2 for some in itertools.combinations(range(6), 3)]  # two of six are right
    assert align.pass_at_k(6, 2, 3) == pytest.approx(np.mean(draws))

def test_only_the_assistant_is_learned_and_the_engine_scores_as_the_trainer_does():
    lm, p = model.LM(model.preset("llama", vocab_size=16, d_model=16)).double(), []
    chat, says = align.Chat(lm, bpe.CharTokenizer("abc")), align.said
    talk = says("user", "b" + EOT) + says("assistant", "a") + says("user", "b")
    a, c, end = chat.tok.encode("ac" + EOT)  # the template is plain: a text and an end of it
    assert [i for i, own in zip(*chat.encode(talk, "c")) if own] == [a, end, c, end]
    text = (engine := sample.Engine(lm)).add(chat.ask(talk), sample.Sampling(9))
    text.on_token = lambda i: p.append(text.p[-1, i].log().item())  # of what it was drawn from
    while engine.step(): pass
    batch = align.lay_out([[(text.tokens, [True] * len(text.tokens))]])
    assert p == pytest.approx(align.logps(lm, **batch)[0, -10:-1].tolist(), abs=1e-12)

def test_answers_count_if_they_mean_the_same_and_code_if_it_ends_within_limits():
    same = r"\frac12;0.5 1,000;1{,}000.0 50\%;1/2 $50%$;50 x=5;5 3\frac{1}{2};7/2 90^\circ;90 " \
        r"\sqrt{8};2\sqrt2 (x+1)^2;x^2+2x+1 5~\text{cm};5 -\frac13;-1/3"
    for pair in (same + r" 0.333;1/3 x;y (1,2);(2,1) 1.05;1.5 1/0;0 5x;5 2^{9^{99}};1").split():
        assert align.equal(*pair.replace("~", " ").split(";")) == (pair in same), pair
    assert not align.equal("(" * 499, "5") and not align.equal("9^" * 200 + "9", "5")
    assert align.final_answer(r"\boxed{1} or \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    for program in ("os._exit(0)", "while True: pass", "bytes(10 ** 9)", "os.killpg(0, 9)", "1 / 0",
                    "while True: os.write(1, b'x' * 10 ** 6)", "[os.fork() for _ in 'ab']; 1 / 0"):
        assert not align.run_code("import os\n" + program, seconds=1), program
    assert align.run_code("def f(): return 1", "assert f() == 1", 1)

def test_a_rollout_killed_goes_on_with_the_same_curve_and_a_bad_row_is_named(desk):
    flags = "--device cpu --threads 1 --dtype float32 --problems 3 --save_minutes 0".split()
    call(align, "sft", *flags, "--steps", 2, "--run", "base")
    flags += "rl --init base --uses 2 --steps 10 --batch_size 4 --group 2 --kl 0.1 --run".split()
    call(align, *flags, "whole")
    child = subprocess.Popen([sys.executable, HERE / "align.py", *flags, "killed"])
    while not [*desk.glob("killed/checkpoint-0000000[3-8]*")]: assert child.poll() is None
    child.kill()
    assert child.wait() == -9
    call(align, "--resume", "--run", "killed")
    killed, whole = ({row["step"]: (row["loss"], row["length"]) for row in sample.read_log(
        desk / run) if "update_s" in row} for run in ("killed", "whole"))
    assert killed == whole and len({*whole.values()}) > 5
    (desk / "rows").write_text('{"prompt": "a", "completion": "b"}\n{}')
    with pytest.raises(UserError, match="row 2"): call(
        align, "sft --task chat --data rows --init base --run odd")
