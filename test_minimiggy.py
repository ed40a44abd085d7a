"""What MiniMiggy promises, held against something independent: numpy, finite differences, naive forms, the README."""
import ast
import dataclasses
import difflib
import doctest
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random as random_numbers
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tinygrad import Tensor
from tinygrad.nn.state import safe_load

import minimiggy
from minimiggy import (
    GPT,
    AdamW,
    BPETokenizer,
    Fast,
    GPTConfig,
    Plain,
    TrainConfig,
    UserError,
    Writer,
    main,
    train,
)

HERE = Path(minimiggy.__file__).parent
TINY = GPTConfig(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=16)
QUICK = TrainConfig(batch_size=4, max_iters=6, eval_interval=3, eval_iters=2, warmup_steps=2, learning_rate=1e-2)
TEXT = (HERE / "data" / "play.txt").read_text()


def same(a, b):
    """Do two models have the same parameters, to the last bit?"""
    pairs = zip(a.parameters().values(), b.parameters().values(), strict=True)
    return all((one.numpy() == other.numpy()).all() for one, other in pairs)


@pytest.fixture(scope="session")
def tokenizer():
    return BPETokenizer.train(TEXT[:50_000], 300)


@pytest.fixture(scope="session")
def ids(tokenizer):
    return tokenizer.encode_array(TEXT[:50_000].encode())


@pytest.fixture(scope="session")
def run(tokenizer, ids, tmp_path_factory):
    """A short finished run: the model, its optimizer and the folder with its checkpoints and log."""
    folder = tmp_path_factory.mktemp("run")
    model = GPT(TINY, tokenizer=tokenizer)
    return model, train(model, QUICK, ids, ids[:500], out_dir=folder), folder


# ---------------------------------------------------------------------------------------------------- the tokenizer

STRINGS = ["", "Hello, world", "ROMEO:\nBut soft!", " \n\t  x  \n", "naïve café", 
           "日本語テキスト", "שלום עולם", "👩‍👩‍👧 🏳️‍🌈", "\0\x7f\ufeff",
           "a" * 1000, "It's 3.14, isn't it?"]





def naive_merges(text, n):
    """Byte-pair encoding as it is defined: count all pairs, merge the most frequent, start over."""
    import regex
    words = [list(word.encode()) for word in regex.findall(minimiggy.SPLIT, text)]
    merges = []
    for new in range(256, 256 + n):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word in words:
            for j in range(len(word) - 1):
                if tuple(word[j:j + 2]) == best:
                    word[j:j + 2] = [new]
    return merges








def test_a_tokenizer_survives_json(tokenizer):
    again = minimiggy.tokenizer_from_json(minimiggy.tokenizer_to_json(tokenizer))
    assert again.encode(TEXT[:5000]) == tokenizer.encode(TEXT[:5000])


# -------------------------------------------------------------------------------------------------------- the model

def numpy_logits(p, idx, n_layer, n_head):
    """GPT-2 in float64 numpy: parameters by Hugging Face's names, ids (B, T) -> logits (B, T, V)."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[name + ".weight"] + p[name + ".bias"]

    def linear(x, name):
        return x @ p[name + ".weight"] + p[name + ".bias"]

    B, T = idx.shape
    x = p["wte.weight"][idx] + p["wpe.weight"][:T]
    for i in range(n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").reshape(B, T, 3, n_head, -1)
        y = np.zeros_like(qkv[:, :, 0])
        for t in range(T):
            score = np.einsum("bhd,bshd->bhs", qkv[:, t, 0], qkv[:, :t + 1, 1]) / math.sqrt(qkv.shape[-1])
            weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
            y[:, t] = np.einsum("bhs,bshd->bhd", weight, qkv[:, :t + 1, 2])
        x = x + linear(y.reshape(B, T, -1), f"h.{i}.attn.c_proj")
        m = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        m = 0.5 * m * (1 + np.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3)))
        x = x + linear(m, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ p["wte.weight"].T


def numpy_loss(p, idx, targets, n_layer, n_head):
    """The mean cross-entropy of targets (B, T)."""
    logits = numpy_logits(p, idx, n_layer, n_head)
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - chosen).mean()





def both_ways(name, *inputs, **options):
    """An operation by Plain and by Fast: for each, the result and the gradients of a weighted sum of it."""
    weights, results = None, []
    for ops in (Plain, Fast):
        args = [Tensor(array).realize() for array in inputs]
        out = call(getattr(ops, name), *args, **options)
        weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
        floats = [arg for arg, array in zip(args, inputs, strict=True) if array.dtype == np.float32]
        gradients = (out * Tensor(weights)).sum().gradient(*floats)
        Tensor.realize(out, *gradients)
        results.append([out.numpy(), *(g.numpy() for g in gradients)])
    return zip(*results, strict=True)


def call(operation, x, *args, **options):
    """An operation that takes layers, on their tensors."""
    if operation.__name__ in ("linear", "layer_norm"):
        return operation(x, SimpleNamespace(weight=args[0], bias=args[1]), *args[2:])
    return operation(x, *args, **options)


def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def some_ids(n, *shape):
    return np.random.default_rng(n).integers(0, n, shape).astype(np.int32)

















def changes_nothing(optimizer, ids):
    """Does a step with a gradient that is not finite leave everything as it is?"""
    model = optimizer.model
    before = [tensor.numpy() for tensor in (optimizer.m, optimizer.v, model.flat)]
    weights = model.flat.numpy()
    weights[0] = math.inf
    minimiggy.put(model.flat, weights)
    assert not math.isfinite(optimizer(ids, 1)[1])
    after = [tensor.numpy() for tensor in (optimizer.m, optimizer.v, model.flat)]
    after[2][0] = before[2][0]
    return all((a == b).all() for a, b in zip(before, after, strict=True))





def test_names_and_shapes_are_hugging_face_gpt2s():
    shapes = {name: tensor.shape for name, tensor in GPT(TINY).parameters().items()}
    C = TINY.n_embd
    want = {"wte.weight": (300, C), "wpe.weight": (8, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, 4 * C),
                                  ("mlp.c_proj", 4 * C, C)):
            want |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        want |= {f"h.{i}.{name}.{kind}": (C,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    assert shapes == want


def test_initial_weights_are_gpt2s():
    arrays = dict(GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=64)).parameters())
    assert arrays["wte.weight"].numpy().std() == pytest.approx(0.02, rel=0.03)
    assert arrays["h.1.mlp.c_proj.weight"].numpy().std() == pytest.approx(0.02 / 2, rel=0.03)
    assert not arrays["h.0.attn.c_attn.bias"].numpy().any() and (arrays["ln_f.weight"].numpy() == 1).all()





# ------------------------------------------------------------------------------------------------------ the training













def test_a_resumed_run_ends_where_an_unbroken_one_does(run, tokenizer, ids, tmp_path):
    model, optimizer, folder = run
    again = GPT(TINY, tokenizer=tokenizer, seed=99)
    fresh = AdamW(again, QUICK)
    assert again.load_checkpoint(folder / "ckpt_3.safetensors", fresh) == 3
    train(again, QUICK, ids, ids[:500], optimizer=fresh, start=3, out_dir=tmp_path)
    assert same(again, model)
    assert all((fresh.m[n].numpy() == optimizer.m[n].numpy()).all() and (fresh.v[n].numpy() == optimizer.v[n].numpy()).all() for n in fresh.m)


def test_log_has_a_row_a_report(run):
    lines = (run[2] / "log.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,val_loss,val_bpb,lr,grad_norm,tokens_per_s,train_bpb"
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6"] and all(len(line.split(",")) == 8 for line in lines)


# ------------------------------------------------------------------------------------- checkpoints and sampling

def test_a_checkpoint_is_self_contained(run):
    model, _, folder = run
    again, config, step = minimiggy.open_checkpoint(folder / "ckpt_6.safetensors")
    assert step == 6 and config == QUICK and again.config == TINY
    assert same(again, model) and again.tokenizer.merges == model.tokenizer.merges
    assert not list(folder.glob("*.tmp"))


def test_tinygrad_reads_a_checkpoint(run):
    arrays = safe_load(run[2] / "ckpt_6.safetensors")
    assert (arrays["h.1.attn.c_attn.weight"].numpy() == run[0].h[1].attn.c_attn.weight.numpy()).all()
    assert "optimizer.m.wte.weight" in arrays and "optimizer.v.ln_f.bias" in arrays


def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(run, tmp_path):
    whole = (run[2] / "ckpt_6.safetensors").read_bytes()
    for i, broken in enumerate([b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], b"PK" + whole]):
        path = tmp_path / f"ckpt_{i}.safetensors"
        path.write_bytes(broken)
        with pytest.raises(UserError, match=path.name):
            minimiggy.open_checkpoint(path)
    with pytest.raises(UserError, match="does not fit"):
        GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=32)).load_checkpoint(
            run[2] / "ckpt_6.safetensors", None)


def test_greedy_sampling_with_the_cache_equals_the_whole_model(run):
    model, text = run[0], [[1, 2, 3], [50, 51, 52]]
    got = model.generate(Tensor(text, dtype="int32"), max_tokens=3, temperature=0)
    assert got.shape == (len(text), 6) and got.dtype.name == "int"
    for _ in range(3):
        logits = model(Tensor(text, dtype="int32")).numpy()[:, -1]
        text = [[*row, int(best)] for row, best in zip(text, logits.argmax(-1), strict=True)]
    assert got.tolist() == text








def test_sampling_goes_on_past_block_size_and_follows_the_seed(run):
    model, _, _ = run
    first, second, other = (model.generate(Tensor([[5] * 11], dtype="int32"), max_tokens=30, seed=seed).tolist()
                            for seed in (1, 1, 2))
    assert len(first[0]) == 41 and first == second != other





# ----------------------------------------------------------------------------------------- the text and its download

class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"<html>log in</html>" if self.path == "/login" else b"to be or not to be\n" * 1000
        if self.path == "/slow":
            time.sleep(1)
        self.send_response({"/gone": 404, "/to-login": 302}.get(self.path, 200))
        self.send_header("Location", "/login")
        self.send_header("Content-Length", str(len(body) * (2 if self.path == "/cut" else 1)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def server():
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SHA = hashlib.sha256(b"to be or not to be\n" * 1000).hexdigest()


def test_a_download_arrives_whole_or_not_at_all(server, tmp_path, monkeypatch):
    minimiggy.download(server + "/text", tmp_path / "good.txt", SHA)
    assert (tmp_path / "good.txt").stat().st_size == 19_000
    monkeypatch.setattr(minimiggy, "TIMEOUT", (1, 0.2))
    for bad in ("/login", "/to-login", "/gone", "/cut", "/slow"):
        with pytest.raises(OSError):
            minimiggy.download(server + bad, tmp_path / "bad.txt", SHA)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        minimiggy.download(server + "/text", tmp_path / "file" / "text.txt", SHA)  # nothing can be written there
    (tmp_path / "file").unlink()
    with pytest.raises(OSError):
        minimiggy.download("http://127.0.0.1:1/", tmp_path / "bad.txt", SHA)
    assert {p.name for p in tmp_path.iterdir()} <= {"good.txt", "bad.txt.part"}  # what came before a cut is kept


def test_without_a_network_the_play_stands_in_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "play.txt").write_text(TEXT)
    monkeypatch.setattr(minimiggy, "DATA", tmp_path)
    monkeypatch.setitem(minimiggy.SHAKESPEARE, "url", "http://127.0.0.1:1/")
    assert minimiggy.load_text(None) == (TEXT.encode(), "play")
    assert "could not download" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data play"):
        minimiggy.load_text("shakespeare")


def test_the_play_is_long_and_in_its_format():
    assert len(TEXT) >= 100_000 and TEXT.isascii() and "ROMEO:\n" in TEXT and "JULIET:\n" in TEXT
    for speech in TEXT.strip().split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Za-z ]*:(\n[^\n]+)+", speech), speech


# ------------------------------------------------------------------------------------------------ the command line

SMALL = ["--n-layer", "1", "--n_embd", "16", "--n-head", "2", "--block-size", "8", "--batch-size", "4", "--vocab-size",
         "300", "--max-iters", "4", "--eval-interval", "2", "--eval-iters", "1"]


def test_train_sample_and_resume_from_the_command_line(tmp_path, capsys):
    text, out = tmp_path / "my.txt", str(tmp_path / "out")
    text.write_text(TEXT[:5000])
    assert main(["--train", "--data", str(text), "--out-dir", out, *SMALL]) == 0
    output = capsys.readouterr().out
    assert "bits/byte" in output and "\r" not in output and "\x1b" not in output
    assert main(["--sample", "ROMEO: ü", "--out-dir", out, "--max-tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("ROMEO: ü")
    assert main(["--resume", "--max-iters", "6", "--out-dir", out]) == 0  # it remembers its text
    output = capsys.readouterr().out
    assert str(text) in output and "has changed" not in output
    assert (tmp_path / "out" / "ckpt_6.safetensors").exists()
    text.write_text(TEXT[:5001])
    assert main(["--resume", "--max-iters", "7", "--out-dir", out]) == 0 and "has changed" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- nothing is ever lost

def kill_and_resume(kills, folder):
    """Kill short runs at random moments, every second time inside a save, and resume them, up to five times each. Do
    all end with the checkpoint and log of the run that was never stopped, to the last bit? Also a command (README)."""
    rng, folder, fsync = random_numbers.Random(str(folder)), Path(folder), os.fsync
    BPETokenizer.train("", 256)  # what is imported now, no child need import
    (folder / "my.txt").write_text(TEXT[:20_000])
    start = ["--train", "--data", str(folder / "my.txt"), *SMALL, "--max-iters", "30", "--eval-interval", "15",
             "--save-every", "2", "--dropout", "0.1"]

    def child(flags, out, die_at=0):
        """Run the command line in a process of its own, which dies at its `die_at`-th flush to the disk."""
        if (pid := os.fork()) == 0:
            flushes = itertools.count(1)

            def flush(fd):
                if next(flushes) == die_at:
                    if os.path.isfile(f"/proc/self/fd/{fd}"):  # not all had been written yet
                        os.ftruncate(fd, rng.randrange(os.fstat(fd).st_size))
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(fd)
            os.fsync, sys.stdout = flush, open(os.devnull, "w")  # noqa: SIM115
            code = 99  # (of an exception)
            try:
                code = main([*flags, "--out-dir", str(out)])
            finally:
                os._exit(code)
        return pid

    def what_is_left(out):
        rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
        log = [row[:6] + row[7:] for row in rows]  # all but tokens_per_s, which a clock measures
        return log, (out / "ckpt_30.safetensors").read_bytes(), sorted(p.name for p in out.iterdir())

    began = time.perf_counter()
    assert os.waitpid(child(start, folder / "whole"), 0)[1] == 0
    began = time.perf_counter()  # (the first one also compiled)
    assert os.waitpid(child(start, folder / "again"), 0)[1] == 0
    took, want, killed, runs, same = time.perf_counter() - began, what_is_left(folder / "whole"), 0, 0, 0
    while killed < kills:
        runs, times, flags = runs + 1, 0, start
        out = folder / str(runs)
        while times < 5 and killed < kills and not (out / "ckpt_30.safetensors").exists():
            inside_a_save = killed % 2
            pid = child(flags, out, die_at=rng.randint(1, 20) if inside_a_save else 0)
            if not inside_a_save:
                time.sleep(rng.uniform(0, took))
                os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == signal.SIGKILL:
                times, killed = times + 1, killed + 1
            flags = ["--resume"] if list(out.glob("ckpt_*.safetensors")) else start
        os.waitpid(child(flags, out), 0)
        log, checkpoint, files = what_is_left(out)
        same += (log, checkpoint) == want[:2] and not [name for name in files if name.endswith(".tmp")]
        shutil.rmtree(out)
    print(f"{same} of {runs} runs, killed {killed} times in all, {killed // 2} inside a save, ended with the same bits")
    return same == runs


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path):
    processes = []
    for name in "ab":  # two at a time, ten kills each
        (tmp_path / name).mkdir()
        command = [sys.executable, str(HERE / "test_minimiggy.py"), "10", str(tmp_path / name)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        said = process.communicate()[0]
        assert process.returncode == 0 and "killed 10 times in all, 5 inside a save" in said, said


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    kind = lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(kind(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, path: events.append("name") or replace(self, path))
    with minimiggy.whole(tmp_path / "new") as file:
        file.write(b"text")
        assert not (tmp_path / "new").exists()
    assert events == ["file", "name", "folder"] and (tmp_path / "new").read_bytes() == b"text"


def test_two_signals(tmp_path):
    command = [sys.executable, str(HERE / "minimiggy.py"), "--train", "--data", "play", "--out-dir", str(tmp_path),
               *SMALL, "--max-iters", "1000000", "--eval-interval", "500000", "--save-every", "100"]
    for number, times, code in ((signal.SIGTERM, 1, 143), (signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE)
        while not list(tmp_path.glob("ckpt_*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.001)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in err
        newest = list(minimiggy.checkpoints(tmp_path).values())[-1]
        assert minimiggy.open_checkpoint(newest)[2] > 0
        if times == 1:
            assert "--resume --out-dir" in out and "stopping" in err
        for path in tmp_path.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)


def mutated(whole, rng):
    """A checkpoint with something wrong: a flipped bit, a cut, or a header edited by someone who can sign it anew."""
    kind, data = rng.randrange(4), bytearray(whole)
    if kind == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 1:
        return bytes(data[:rng.randrange(len(data))] + bytes(rng.choice([0, 0, 100])))
    if kind == 2:
        return rng.choice([0, 7, len(data), 2**31, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    metadata, name = header.pop("__metadata__"), rng.choice(list(header))
    odd = [-1, 0, 3, math.inf, "9" * 5000, 2**31, 2**64, 10**4000, None, "x", 1.5, [], {}, [[]], "-1", True, [2**40],
           [0, 2**40], [-8, 8]]
    if rng.random() < 0.5:
        entry = header[name]
        key = rng.choice([*entry, "shape", "data_offsets"])
        if isinstance(entry[key], list) and rng.random() < 0.7:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(odd)
        else:
            entry[key] = rng.choice([*odd, "F64", "BF16"])
    else:
        key = rng.choice([*metadata, "gpt_config", "tokenizer"])
        if key in ("gpt_config", "tokenizer", "train_config"):
            values = json.loads(metadata[key])
            values[rng.choice([*values, "surprise"])] = rng.choice([*odd, [[0, 0]] * 200, [[-1, 5]], [[256, 256]]])
            metadata[key] = json.dumps(values)
        else:
            metadata[key] = rng.choice(odd)
    if rng.random() < 0.8 and all(type(value) is str for value in metadata.values()):
        metadata["sha256"] = minimiggy.sha256_of(header, metadata, [body])
    text = json.dumps({"__metadata__": metadata} | header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_500_mutated_checkpoints_load_exactly_or_are_refused_in_one_line(tokenizer, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=2, n_head=2, n_embd=96), tokenizer=tokenizer)
    whole = model.save_checkpoint(1, AdamW(model, QUICK), tmp_path).read_bytes()  # 3 MB
    rng, path, loaded = random_numbers.Random(0), tmp_path / "bad", 0
    for i in range(500):
        path.write_bytes(mutated(whole, rng))
        tracemalloc.start()
        try:
            again = minimiggy.open_checkpoint(path)[0]
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e), i
        else:
            assert same(again, model), i
            loaded += 1
        assert tracemalloc.get_traced_memory()[1] < 2 * len(whole), i
        tracemalloc.stop()
    assert loaded < 100  # (what is left of those that only change, say, a learning rate, and are signed anew)
    assert main(["--sample", "x", "--checkpoint", str(path)]) == 2


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = GPT(TINY)
    minimiggy.load_array(model.ln_f.bias, np.full(16, np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        GPT(TINY).load_checkpoint(model.save_checkpoint(1, None, tmp_path))


def test_resume_skips_a_damaged_newest_checkpoint_and_says_so(run, tmp_path, capsys):
    shutil.copytree(run[2], tmp_path / "run")
    (tmp_path / "run" / "ckpt_9.safetensors").write_bytes(b"half of a fi")
    path, *_, step = minimiggy.newest(tmp_path / "run")
    assert step == 6 and path.name == "ckpt_6.safetensors" and "ckpt_9" in capsys.readouterr().out


def test_going_back_moves_the_abandoned_future_aside(tokenizer, ids, tmp_path, capsys):
    flags = ["--train", "--data", "play", "--out-dir", str(tmp_path), *SMALL, "--max-iters", "8", "--keep", "9"]
    assert main(flags) == 0
    back = ["--resume", "--checkpoint", str(tmp_path / "ckpt_4.safetensors"), "--out-dir", str(tmp_path), "--keep", "1"]
    assert main([*back, "--max-iters", "5", "--learning-rate", "1e-3"]) == 0
    assert set(minimiggy.checkpoints(tmp_path)) >= {5} and max(minimiggy.checkpoints(tmp_path)) == 5
    assert {path.name for path in (tmp_path / "run-1").iterdir()} == {"ckpt_6.safetensors", "ckpt_8.safetensors"}


def test_a_mistake_moves_nothing_and_strangers_files_stay(tmp_path, capsys):
    flags = ["--train", "--data", "play", "--out-dir", str(tmp_path), *SMALL]
    (tmp_path / "notes.tmp").touch()
    assert main(flags) == 0
    before = sorted(tmp_path.iterdir())
    (short := tmp_path.parent / "short.txt").write_text("To be")
    assert main([*flags, "--data", str(short)]) == 2 and sorted(tmp_path.iterdir()) == before
    capsys.readouterr()
    for mistake in (["--export", ""], ["--sample", "x", "--out-dir", ""], ["--train", "--checkpoint", "x"],
                    ["--resume", "--init-from", "x"],
                    ["--eval-only", "--out-dir", str(tmp_path), "--data", str(short)]):
        assert main(mistake) == 2 and capsys.readouterr().err.count("\n") == 1, mistake


@pytest.mark.parametrize("damage", ["10,1", "²,1", "x", "10,a,b,c,d,e,f,g", "1,,,,,,,,,,"])
def test_a_damaged_log_does_not_stop_a_run(damage, tokenizer, ids, tmp_path):
    model = GPT(TINY, tokenizer=tokenizer)
    optimizer = train(model, QUICK, ids, ids[:500], out_dir=tmp_path)
    good = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(good + damage)
    longer = dataclasses.replace(QUICK, max_iters=9)
    train(model, longer, ids, ids[:500], optimizer=optimizer, start=6, out_dir=tmp_path)
    text = (tmp_path / "log.csv").read_text()
    assert text.startswith(good) and damage not in text.splitlines() and len(text.splitlines()) == 4


def test_a_signal_during_an_evaluation_still_saves(tokenizer, ids, tmp_path, monkeypatch):
    stop, real = [], minimiggy.Evaluator.mean
    monkeypatch.setattr(minimiggy.Evaluator, "mean", lambda *args: stop.append(1) or real(*args))
    config = TrainConfig(batch_size=4, max_iters=100, eval_interval=3, eval_iters=1, save_every=50)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path, stop=stop)
    assert list(minimiggy.checkpoints(tmp_path)) == [3]


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        (tmp_path / f"ckpt_{step}.safetensors").touch()
    minimiggy.prune(tmp_path, 2, ["1,4.0,4.1,,,,,", "2,3.0,3.1,,,,,", "3,2.0,,,,,,", "4,2.0,3.5,,,,,",
                                  "9,1.0,1.0,,,,,"])
    assert list(minimiggy.checkpoints(tmp_path)) == [2, 6, 7]


def test_a_full_disk_stops_nothing_and_loses_nothing(tokenizer, ids, tmp_path, monkeypatch, capsys):
    real, full_at, limit = minimiggy.save_run, {4}, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_run(model, optimizer, step, *rest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step in full_at else limit[0], limit[1]))
        try:
            real(model, optimizer, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(minimiggy, "save_run", save_run)
    config = TrainConfig(batch_size=4, max_iters=6, eval_interval=2, eval_iters=1)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path / "a")
    assert list(minimiggy.checkpoints(tmp_path / "a")) == [2, 6]
    assert "step 4 could not be saved" in capsys.readouterr().out
    full_at |= {6}
    with pytest.raises(minimiggy.TrainingFailed, match="step 6 could not be saved"):
        train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path / "b")
    assert minimiggy.open_checkpoint(tmp_path / "b" / "ckpt_2.safetensors")[2] == 2
    assert not list(tmp_path.glob("*/*.tmp")) and len((tmp_path / "b" / "log.csv").read_text().splitlines()) == 4
    monkeypatch.setattr(minimiggy, "train", functools.partial(throw, minimiggy.TrainingFailed("no room")))
    assert main(["--train", "--data", "play", "--out-dir", str(tmp_path / "c"), *SMALL]) == 1


def throw(error, *args, **kwargs):
    raise error


def test_numbers_that_go_wrong_stop_the_run_before_they_are_saved(tokenizer, ids, tmp_path):
    model = GPT(TINY, tokenizer=tokenizer)
    optimizer = train(model, QUICK, ids, out_dir=tmp_path)
    weights = model.ln_f.bias.numpy().copy()
    weights[5] = math.inf
    minimiggy.load_array(model.ln_f.bias, weights)
    longer = TrainConfig(batch_size=4, max_iters=9, eval_interval=1, eval_iters=1)
    with pytest.raises(minimiggy.TrainingFailed, match="step 7 went wrong: with seed 1337 and learning rate 7.00e-05"):
        train(model, longer, ids, optimizer=optimizer, start=6, out_dir=tmp_path)
    assert list(minimiggy.checkpoints(tmp_path)) == [3, 6]


def test_only_one_run_at_a_time_and_none_is_overwritten(tmp_path, capsys):
    flags = ["--train", "--data", "play", "--out-dir", str(tmp_path), *SMALL]
    with minimiggy.alone(tmp_path):
        assert main(flags) == 2 and "another run is at work" in capsys.readouterr().err
    assert main([*flags, "--seed", "1"]) == 0 and main([*flags, "--no-checkpoint"]) == 0
    assert minimiggy.open_checkpoint(tmp_path / "run-1" / "ckpt_4.safetensors")[1].seed == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["log.csv", "samples.txt"]


@pytest.mark.parametrize(("raw", "text"), [
    (b"\xef\xbb\xbfto be\r\nor not", "to be\nor not"), (b"\0" * 300_000, "\0" * 300_000),
    (b" " * 300_000, " " * 300_000), ("שלום עולם 👩‍👩‍👧 ".encode() * 9000, "שלום עולם 👩‍👩‍👧 " * 9000),
    (b"one line " * 20_000, "one line " * 20_000), ("漢字".encode() * 40_000, "漢字" * 40_000)])
def test_any_text_is_read_learned_and_encoded_without_loss(raw, text, tmp_path):
    (tmp_path / "my.txt").write_bytes(raw)
    read = minimiggy.read_text(tmp_path / "my.txt")
    assert read == text.encode() and b"".join(minimiggy.split_text(read)) == read
    tokenizer = BPETokenizer.train(text, 300)
    assert tokenizer.decode(tokenizer.encode_array(read).tolist()) == text


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"x" * 3_000_000 + b"caf\xe9 and more")
    with pytest.raises(UserError, match="byte 0xe9 at offset 3000003"):
        minimiggy.read_text(tmp_path / "my.txt")
    assert minimiggy.read_text(tmp_path / "my.txt", replace=True).endswith("caf\ufffd and more".encode())


@pytest.mark.parametrize("prompt", ["", "x" * 500, "שלום 👩‍👩‍👧 \0", "\udce9 from a shell"])
def test_any_prompt_is_written_on_from(run, prompt, capsys):
    assert main(["--sample", prompt, "--out-dir", str(run[2]), "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith(minimiggy.printable(prompt))


# A knob's values just outside its range, and what is no number; `--sample` flags need no checkpoint to be refused.
BAD = [(flags, f"--{f.name.replace('_', '-')}", value)
       for flags, config in (("--train", GPTConfig), ("--train", TrainConfig), ("--sample=x", minimiggy.SampleConfig))
       for f in dataclasses.fields(config) for value in ("nan", "many", "", "-1", "1e99", "9" * 30)]


def test_every_flag_refuses_bad_values_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mode, flag, value in [*BAD, *(("--train", "--devices", v) for v in ("0", "-1", "many", "9" * 30))]:
        assert main([mode, f"{flag}={value}"]) == 2, (flag, value)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and flag in error, (flag, value, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--n-layer", "3"], ["--n_embd", "32"], ["--vocab-size", "999"],
                                   ["--tokenizer", "gpt2"]])
def test_model_flags_that_contradict_the_checkpoint_are_named(run, flags, capsys):
    for mode in (["--resume"], ["--sample", "x"], ["--eval-only"]):
        assert main([*mode, "--out-dir", str(run[2]), *flags]) == 2
        assert flags[0].replace("_", "-") in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "names"), [
    (["--train", "--init-from", "nowhere"], "nowhere"),
    (["--export", "x", "--checkpoint", "nowhere"], "nowhere"),
    (["--train", "--data", "no/such/file.txt"], "no/such/file.txt"),
    (["--train", "--data", "EMPTY"], "empty"),
    (["--train", "--data", "SHORT"], "--block-size"),
    (["--train", "--data", "LATIN1"], "offset 3"),
    (["--train", "--data", "."], "no such file"),
    (["--train", "--n-head", "3"], "--n-head 3"),
    (["--train", "--n-layer", "0"], "--n-layer"),
    (["--train", "--n_embd", "-4"], "--n-embd"),
    (["--train", "--batch-size", "many"], "batch"),
    (["--train", "--learning-rate", "nan"], "--learning-rate"),
    (["--train", "--dropout", "1.5"], "--dropout"),
    (["--train", "--vocab-size", "100"], "256"),
    (["--train", "--tokenizer", "words"], "words"),
    (["--train", "--sample", "x"], "not allowed"),
    (["--frobnicate"], "--help"),
    (["--sample", "x", "--out-dir", "nowhere"], "--train"),
    (["--sample", "x", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--sample", "x", "--temperature", "-1"], "--temperature"),
    (["--resume", "--out-dir", "nowhere"], "--train"),
    ([], "--help")])
def test_a_mistake_gets_one_line_and_exit_code_2(flags, names, tmp_path, monkeypatch, capsys):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("To be")
    (tmp_path / "LATIN1").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("minimiggy: ") and error.count("\n") == 1 and names in error
    assert not (tmp_path / "checkpoints").exists()


SHAKEN = {"block_size": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}


@pytest.fixture(scope="session")
def learned():
    return BPETokenizer.train(TEXT[:100_000], 700)


def shaken(tokenizer, vocab_size=None, **sizes):
    """A model whose every number is random, biases and norms too."""
    model = GPT(GPTConfig(**SHAKEN | sizes, vocab_size=vocab_size or tokenizer.vocab_size), tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    arrays = {name: 0.3 * rng.standard_normal(shape) + name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
              for name, shape in ((n, t.shape) for n, t in model.parameters().items())}
    for name, array in arrays.items():
        minimiggy.load_array(model.parameters()[name], array.astype(np.float32))
    return model


@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("export"), shaken(learned)
    minimiggy.export(model, folder)
    return model, folder


def random_strings(n):
    """Texts of many scripts, white space, controls, emoji, contractions, lone digits, and pieces of the play."""
    rng = random_numbers.Random(1)
    ranges = [(0, 32), (32, 127), (127, 256), (0x370, 0x400), (0x590, 0x700), (0x900, 0xA00), (0xE00, 0xF00),
              (0x2000, 0x2070), (0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900),
              (0x10000, 0x10400), (0x1D400, 0x1D800), (0x1F300, 0x1F700), (0xE0000, 0x110000)]
    pieces = ["  ", "\t\t ", " \n\n", "\r\n", "\u00a0", "\u2003", "\x85", "it's", "WE'LL", "'re", " '", "0", " 7", "½",
              "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "aaaaaaa", "----", "abcd", " abcd", "<|endoftext|>", "\0", "\ufeff"]

    def piece():
        kind, at = rng.randrange(3), rng.randrange(len(TEXT) - 30)
        low, high = rng.choice(ranges)
        return (rng.choice(pieces) if kind == 0 else TEXT[at:at + rng.randrange(1, 30)] if kind == 1 else
                "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 6))))
    return ["".join(piece() for _ in range(rng.randrange(20))) for _ in range(n)]


def logits(model, ids):
    return model(Tensor(np.array(ids, np.int32))).numpy()


# ------------------------------------------------------------------------------- at home elsewhere: with transformers

def test_transformers_computes_the_same_logits_from_an_export(exported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, folder = exported
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("To be, or not to be", return_tensors="pt")
    with torch.no_grad():
        want = theirs.eval()(**tokens).logits.numpy()
    assert np.abs(logits(model, tokens["input_ids"].tolist()) - want).max() < 1e-4


@pytest.mark.parametrize("kind", ["learned", "bytes", "a token that no merge reaches"])
def test_transformers_cuts_any_text_into_the_same_tokens(kind, learned, exported, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = learned, exported[1]
    if kind != "learned":  # bc comes first, so abcd is a token, but xabcd is x|a|bc|d
        a, b, c, d = b"abcd"
        merges = [] if kind == "bytes" else [(b, c), (a, b), (c, d), (257, 258)]
        tokenizer, folder = BPETokenizer("bpe", merges), tmp_path
        assert kind == "bytes" or tokenizer.encode("abcd") == [259]
        minimiggy.export(shaken(tokenizer), folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*random_strings(1000), TEXT[:200_000]]:
        ids = theirs.encode(text)
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_one_merge_a_token_is_enough(letters):
    """Few letters make tokens that overlap with themselves in every way."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    rng = random_numbers.Random(2)
    for _ in range(10):
        word = lambda n: "".join(rng.choices(letters, k=rng.randrange(1, n)))
        tokenizer = BPETokenizer.train(" ".join(word(40) for _ in range(300)), 400)
        ids = minimiggy.vocabulary(tokenizer)
        merges = [tuple(parts) for token in ids if len(parts := minimiggy.last_parts(token, ids)) == 2]
        theirs = Tokenizer(models.BPE(ids, merges))
        for text in [word(200) for _ in range(100)]:
            assert theirs.encode(text).ids == tokenizer.encode(text)


@pytest.mark.parametrize("form", ["as saved", "bare names and masks", "no config", "bfloat16", "float16"])
def test_a_model_of_transformers_computes_the_same_logits_here(form, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=199, n_positions=24, n_embd=128, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    file = tmp_path / "model.safetensors"
    if form in ("bfloat16", "float16"):
        theirs = theirs.to(getattr(torch, form))
    theirs.save_pretrained(tmp_path)
    theirs = theirs.float()
    if form == "bare names and masks":
        arrays = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        for i in range(2):
            arrays[f"h.{i}.attn.bias"] = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
            arrays[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(arrays | {"lm_head.weight": arrays["wte.weight"].clone()}, file)
    if form == "no config":
        (tmp_path / "config.json").unlink()
    model, ids = minimiggy.init_from(str(tmp_path)), torch.arange(48).reshape(2, 24) * 4
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
    assert np.abs(logits(model, ids.tolist()) - want).max() < 1e-4
    assert model.tokenizer is None


# --------------------------------------------------------------------------------------------- without transformers

def test_gpt2s_tokenizer_goes_out_and_comes_back(tmp_path, monkeypatch):
    """With a stand-in of its size, whose bytes are in another order than ours, as GPT-2's are."""
    import tiktoken
    pairs = map(bytes, itertools.product(range(256), repeat=2))
    tokens = [bytes([255 - b]) for b in range(256)] + list(pairs)
    encoding = tiktoken.Encoding("gpt2", pat_str=minimiggy.SPLIT, special_tokens={"<|endoftext|>": 50256},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens[:50256])})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    model = GPT(GPTConfig(block_size=4, vocab_size=50257, n_layer=1, n_head=1, n_embd=8), tokenizer=BPETokenizer("gpt2"))
    minimiggy.export(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 50256
    assert len((tmp_path / "merges.txt").read_text().splitlines()) == 50001
    assert minimiggy.init_from(str(tmp_path)).tokenizer.name == "gpt2"
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / name).unlink()
    assert minimiggy.init_from(str(tmp_path)).tokenizer.name == "gpt2"


def test_an_export_comes_back_bit_by_bit(exported):
    model, folder = exported
    back = minimiggy.init_from(str(folder))
    assert back.config == model.config
    assert same(back, model)
    for text in [*random_strings(1000), TEXT]:
        assert back.tokenizer.encode(text) == model.tokenizer.encode(text)


@pytest.mark.parametrize("change", ["vocab.json only", "tokenizer.json only", "re-sorted", "model without tokenizer"])
def test_a_tokenizer_comes_back_from_either_file(change, exported, tmp_path):
    model, folder = exported
    for name in ("config.json", "model.safetensors", "vocab.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if change == "model without tokenizer":
        model.tokenizer, kept = None, model.tokenizer
        minimiggy.export(model, tmp_path / "bare")
        model.tokenizer = kept
        assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}
        assert minimiggy.init_from(str(tmp_path / "bare")).tokenizer is None
        return
    if change == "re-sorted":
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved, sort_keys=True))
    else:
        (tmp_path / {"v": "tokenizer.json", "t": "vocab.json"}[change[0]]).unlink()
    assert minimiggy.init_from(str(tmp_path)).tokenizer.encode(TEXT[:9999]) == model.tokenizer.encode(TEXT[:9999])


FOREIGN = {"no vocabulary": "{}", "cut off": '{"model": {"vocab": {"a"',
           "a list": '{"model": {"vocab": [["a", -1.5]]}}',
           "two tokens": '{"model": {"vocab": {"a": 0, "b": 1}}}', "bytes in another order": None, "too few": None}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_tokenizer_is_left_out_and_that_is_said(kind, exported, tmp_path, capsys):
    minimiggy.export(GPT(exported[0].config), tmp_path)
    ids = json.loads((exported[1] / "vocab.json").read_text())
    if kind == "bytes in another order":
        ids |= {"a": ids["b"], "b": ids["a"]}
    ids = {token: i for token, i in ids.items() if i < 500 or kind != "too few"}
    (tmp_path / "tokenizer.json").write_text(FOREIGN[kind] or json.dumps({"model": {"vocab": ids}}))
    assert minimiggy.init_from(str(tmp_path)).tokenizer is None
    assert "without one" in capsys.readouterr().out


def test_a_smaller_block_keeps_the_first_positions(exported):
    model, folder = exported
    short, ids = minimiggy.init_from(str(folder / "model.safetensors"), block_size=5), [[1, 2, 3, 4, 5]]
    assert short.config.block_size == 5
    assert np.abs(logits(short, ids) - logits(model, ids)).max() < 1e-5


WRONG = {  # changes to config.json, changes to the weights, and what the line says
    "activation": ({"activation_function": "gelu"}, {}, 'config.json: activation_function is "gelu"'),
    "epsilon": ({"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is 1e-06"),
    "inner": ({"n_inner": 100}, {}, "n_inner is 100"),
    "scaling": ({"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx is true"),
    "kind": ({"model_type": "llama"}, {}, 'model_type is "llama"'),
    "layers": ({"n_layer": 3}, {}, "n_layer is 3"),
    "heads": ({"n_head": 5}, {}, "n_head is 5"),
    "heads as text": ({"n_head": "3"}, {}, 'n_head is "3"'),
    "no object": (None, {}, "config.json is damaged"),
    "no config, no 64": ("absent", {}, "n_head is 0.75"),
    "untied head": ({"tie_word_embeddings": False}, {"lm_head.weight": np.zeros((700, 48), "f4")}, "lm_head.weight"),
    "unknown": ({}, {"transformer.h.0.extra": np.zeros(3, "f4")}, "transformer.h.0.extra"),
    "missing": ({}, {"transformer.h.1.mlp.c_fc.bias": None}, "transformer.h.1.mlp.c_fc.bias is missing"),
    "no embedding": ({}, {"transformer.wte.weight": None}, "transformer.wte.weight"),
    "shape": ({}, {"transformer.ln_f.bias": np.zeros(47, "f4")}, "transformer.ln_f.bias is float32 (47,)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(case, exported, tmp_path):
    change, weights, names = WRONG[case]
    arrays, metadata = minimiggy.read_safetensors(exported[1] / "model.safetensors")
    arrays = {name: array for name, array in (dict(arrays) | weights).items() if array is not None}
    minimiggy.write_safetensors(tmp_path / "model.safetensors", arrays, metadata)
    config = json.loads((exported[1] / "config.json").read_text())
    if change != "absent":
        (tmp_path / "config.json").write_text(json.dumps(None if change is None else config | change))
    with pytest.raises(UserError) as error:
        minimiggy.init_from(str(tmp_path))
    assert names in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_larger_block_and_a_missing_file_are_refused(exported, tmp_path):
    with pytest.raises(UserError, match="only 32 positions"):
        minimiggy.init_from(str(exported[1]), block_size=33)
    with pytest.raises(UserError, match="nowhere"):
        minimiggy.init_from(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------- the hub

class Hub(BaseHTTPRequestHandler):
    """Announces its file like huggingface.co, and redirects to a store, which knows Range; `cut` stops half-way."""
    def log_message(self, *args): pass

    def do_HEAD(self):
        sha256 = hashlib.sha256(self.server.body).hexdigest()
        self.send_response(302)
        self.send_header("Location", "/store")
        self.send_header("X-Linked-Etag", f'"{self.server.lie or sha256}"')
        self.end_headers()

    def do_GET(self):
        if self.path != "/store":
            return self.do_HEAD()
        self.server.asked.append(self.headers.get("Range"))
        body = self.server.body
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.server.ranges else 0
        self.send_response(416 if start >= len(body) else 206 if start else 200)
        self.send_header("Content-Length", str(max(0, len(body) - start)))
        self.end_headers()
        self.wfile.write(body[start:len(body) // 2] if self.server.cut else body[start:])


@pytest.fixture
def hub(exported, tmp_path, monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.body = (exported[1] / "model.safetensors").read_bytes()
    server.asked, server.cut, server.lie, server.ranges = [], False, None, True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(minimiggy, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    server.folder = tmp_path / "minimiggy" / "gpt2"
    server.folder.mkdir(parents=True)
    (server.folder / "config.json").write_text((exported[1] / "config.json").read_text())
    yield server
    server.shutdown()
    server.server_close()


def files(hub):
    return {path.name: path.stat().st_size for path in hub.folder.iterdir() if path.name != "config.json"}


def test_a_model_from_the_hub_is_fetched_once_with_progress(hub, exported, monkeypatch):
    lines = []
    monkeypatch.setattr(minimiggy, "show", lines.append)
    for _ in range(2):
        assert same(minimiggy.init_from("gpt2"), exported[0])
    size = len(hub.body)
    assert files(hub) == {"model.safetensors": size} and hub.asked == [None]
    assert f"downloading model.safetensors: {size / 1e6:.1f} of {size / 1e6:.1f} MB" in lines


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_stopped(hub, ranges):
    hub.cut, hub.ranges = True, ranges
    with pytest.raises(UserError):
        minimiggy.init_from("gpt2")
    kept = files(hub)["model.safetensors.part"]
    assert len(files(hub)) == 1 and 1 << 17 <= kept <= len(hub.body) // 2
    hub.cut = False
    minimiggy.init_from("gpt2")
    assert files(hub) == {"model.safetensors": len(hub.body)} and hub.asked == [None, f"bytes={kept}-"]


@pytest.mark.parametrize("tail, works", [(b"", True), (b"more", False)])
def test_a_part_that_is_complete_is_checked_and_used(hub, tail, works):
    (hub.folder / "model.safetensors.part").write_bytes(hub.body + tail)
    if works:
        minimiggy.init_from("gpt2")
    else:
        with pytest.raises(UserError, match="SHA-256"):
            minimiggy.init_from("gpt2")
    assert files(hub) == ({"model.safetensors": len(hub.body)} if works else {})


@pytest.mark.parametrize("announced, asked", [("0" * 64, [None]), ("6f1ed002", [])])
def test_a_wrong_checksum_or_none_leaves_nothing(announced, asked, hub):
    hub.lie = announced
    with pytest.raises(UserError, match="SHA-256"):
        minimiggy.init_from("gpt2")
    assert files(hub) == {} and hub.asked == asked


def test_without_a_network_the_line_says_what_to_bring_where(tmp_path, monkeypatch):
    monkeypatch.setattr(minimiggy, "HUB", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        minimiggy.init_from("gpt2-xl")
    url, path = "http://127.0.0.1:1/gpt2-xl/resolve/main/model.safetensors", tmp_path / "minimiggy/gpt2-xl"
    assert f"bring {url} to {path}/model.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------- what people expect

def test_prompts_from_a_file_and_from_standard_input_and_several_samples(run, tmp_path, monkeypatch, capsys):
    flags = ["--out-dir", str(run[2]), "--max-tokens", "9", "--seed", "5"]
    (tmp_path / "prompt.txt").write_text("ROMEO:\n")
    assert main(["--sample", "ROMEO:\n", *flags]) == 0
    want = capsys.readouterr().out
    assert main(["--sample", f"FILE:{tmp_path / 'prompt.txt'}", *flags]) == 0 and capsys.readouterr().out == want
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ROMEO:\n")))
    assert main(["--sample", "-", "--num-samples", "3", *flags]) == 0
    samples = capsys.readouterr().out
    assert samples.startswith(want) and samples.count("ROMEO:\n") >= 3
    assert main(["--sample", "FILE:nowhere.txt", *flags]) == 2 and "nowhere.txt" in capsys.readouterr().err


@pytest.mark.parametrize("stop", ["", "é\n", "👩", "b", "no such text", "x" * 300])
def test_streaming_never_tears_a_character_and_ends_before_the_stop(run, stop, monkeypatch, capsys):
    text = "ab 👩‍👩‍👧 é\nnext b"
    monkeypatch.setattr(minimiggy.Writer, "stream", lambda *args, **how: iter(text.encode()))  # a token for each byte
    prints = []
    monkeypatch.setattr("builtins.print", lambda *args, **how: prints.append(args[0]))
    minimiggy.sample(run[0], "", 99, 0, stop)
    assert "".join(prints) == (text.split(stop)[0] if stop else text) and "\ufffd" not in "".join(prints)


def test_eval_only_gives_the_loss_of_the_whole_validation_text(run, tmp_path, capsys):
    model, _, folder = run
    (tmp_path / "my.txt").write_text(TEXT[:9000])
    assert main(["--eval-only", "--out-dir", str(folder), "--data", str(tmp_path / "my.txt")]) == 0
    ids = model.tokenizer.encode(TEXT[8100:9000])
    p = {name: array.astype(np.float64) for name, array in ((n, t.numpy()) for n, t in model.parameters().items())}
    windows = np.array([ids[i:i + 9] for i in range(len(ids) - 8)])
    want = numpy_loss(p, windows[:, :-1], windows[:, 1:], TINY.n_layer, TINY.n_head)
    got = float(re.search(r": ([0-9.]+) nats", capsys.readouterr().out)[1])
    assert got == pytest.approx(want, abs=0.02)  # the reference reads every place at every distance


def write_run(folder, height):
    """A log of 400 steps whose loss falls from a spike of 9 nats, evaluated and kept at 200, evaluated at 400."""
    lines = [",".join(minimiggy.COLUMNS)]
    for step in range(10, 401, 10):
        train, val = height + 2 + 7 * 0.5 ** (step / 20 - 0.5), height + 2.5 - step / 1000
        both = [val, val / 2] if step % 200 == 0 else ["", ""]
        lines.append(",".join(map(str, [step, train, *both, 1e-3, 1, 9, train / 2])))
    folder.mkdir()
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "ckpt_200.safetensors").touch()
    return folder


def test_plot_draws_the_logs(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "first", 0), write_run(tmp_path / "second", 0.01)]
    top, bottom = minimiggy.plot(runs, tmp_path / "p.png").axes
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for i, folder in enumerate(runs):
        rows = minimiggy.read_log(folder / "log.csv")
        for line, name, n in ((top.lines[3 * i], "train_bpb", 40), (top.lines[3 * i + 1], "val_bpb", 2),
                              (bottom.lines[i], "lr", 40)):
            assert list(map(tuple, line.get_xydata())) == minimiggy.column(rows, name) and len(line.get_xydata()) == n
        assert top.lines[3 * i + 2].get_xydata().tolist() == [[200, rows[19]["val_bpb"]]]  # there is a checkpoint
    low, high = top.get_ylim()
    assert low < 1.05 < high < top.lines[0].get_ydata()[0]  # the spike at the start does not squash the rest
    (_, a), (_, b) = (text.get_position() for text in top.texts)
    assert b - a > (high - low) / 25  # runs that end alike: their names do not overlap


def test_plot_without_a_log_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text("step,train_loss,lr\n10,x,1\n")
    for folder in (tmp_path / "none", tmp_path):
        assert main(["--plot", str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error and error.count("\n") == 1


def test_plot_without_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--plot", str(write_run(tmp_path / "run", 0))]) == 2
    assert capsys.readouterr().err == "minimiggy: --plot needs matplotlib: pip install matplotlib\n"


@pytest.mark.parametrize("rows", [[(100, 3.0), (200, 2.0), (1000, 1.5)], [(1, 2.0), (9, 2.0)]])
def test_the_chart_has_its_extremes_at_the_corners(rows):
    lines = minimiggy.chart(rows).splitlines()
    assert len(lines) == 10 and all(len(line) == 64 for line in lines)
    assert lines[0].split()[0] == f"{rows[0][1]:.3f}" and lines[7].split()[0] == f"{rows[-1][1]:.3f}"
    assert ord(lines[0][8]) & 9 and lines[9].split() == [str(rows[0][0]), "step", str(rows[-1][0])]
    assert all(any(ord(line[x]) > 0x2800 for line in lines[:8]) for x in range(8, 64))  # an unbroken curve
    assert minimiggy.chart(rows[:1]) == ""


def test_help_version_and_any_directory(tmp_path):
    def run(*flags):
        return subprocess.run([sys.executable, str(HERE / "minimiggy.py"), *flags], capture_output=True, text=True,
                              cwd=tmp_path, check=False)

    help = run("--help")
    assert help.returncode == 0 and "examples:" in help.stdout
    assert help.stdout.startswith("usage: python minimiggy.py WHAT")
    assert run("--version").stdout == f"minimiggy {minimiggy.VERSION}\n"
    wrong = run("--sample", "x")
    assert wrong.returncode == 2 and wrong.stdout == "" and "--train" in wrong.stderr and not list(tmp_path.iterdir())


def test_bench_prints_json_last(capsys):
    for what, key in (("step", "ms_per_step"), ("sample", "tokens_per_s")):
        assert main(["--bench", what, *SMALL]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result[key] > 0 and result["gflops"] > 0 and result["blas_gflops"] > 0 and "peak_mb" in result


def test_gradcheck_agrees_and_notices_a_wrong_gradient(monkeypatch, capsys):
    assert main(["--gradcheck"]) == 0 and "wpe.weight" in capsys.readouterr().out
    right = minimiggy.gradients_of
    monkeypatch.setattr(minimiggy, "gradients_of", lambda model, batch: {n: 1.01 * g for n, g in right(model, batch).items()})
    assert main(["--gradcheck"]) == 1


def test_the_readmes_commands_for_those_who_know_nanogpt_run_small(run, tmp_path, monkeypatch, capsys):
    import tiktoken
    minimiggy.export(run[0], tmp_path / "export")  # in the place of GPT-2's weights
    table = (Path("/work/main") / "README.md").read_text().split("Whoever comes from nanoGPT")[1].split("\n\n")[1]
    commands = re.findall(r"`python minimiggy.py (.*?)`", table)
    assert len(commands) == 11
    gpt2 = tiktoken.Encoding("gpt2", pat_str=minimiggy.SPLIT, special_tokens={},
                             mergeable_ranks={bytes([b]): b for b in range(256)})  # no network: a stand-in
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)
    monkeypatch.setattr(minimiggy, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("my.txt", "tinyshakespeare.txt"):
        Path(name).write_text(TEXT[:9000])
    Path("prompt.txt").write_text("JULIET:\n")
    for i, command in enumerate(commands):
        flags = shlex.split(command.replace("--init-from gpt2", f"--init-from {tmp_path / 'export'}"))
        if flags[0] in ("--train", "--bench"):
            small = SMALL if "--init-from" not in flags else [*SMALL[-6:], "--batch-size", "4"]  # its own size
            flags += ["--max-tokens", "9", *small]
        assert main([*flags, "--max-iters", str(4 + i)] if flags[0] == "--resume" else flags) == 0, command
        said = {"--train": "saved", "--resume": "saved", "--eval-only": "bits/byte", "--bench": "ms_per_step",
                "--sample": "JULIET:" if "FILE" in command else "".join(flags[1:2])}
        assert said[flags[0]] in capsys.readouterr().out, command


def test_fine_tuning_starts_where_the_models_own_evaluation_says_and_falls(run, tmp_path, capsys):
    text, folder = tmp_path / "my.txt", tmp_path / "export"
    text.write_text(TEXT[60_000:75_000])
    assert main(["--export", str(folder), "--out-dir", str(run[2])]) == 0
    assert main(["--eval-only", "--init-from", str(folder), "--data", str(text)]) == 0
    said = float(re.search(r": ([0-9.]+) nats", capsys.readouterr().out)[1])
    assert main(["--train", "--init-from", str(folder), "--data", str(text), "--max-iters", "20", "--batch-size", "4",
                 "--learning-rate", "1e-2", "--warmup-steps", "0", "--eval-interval", "20",
                 "--out-dir", str(tmp_path / "tuned")]) == 0
    ids = run[0].tokenizer.encode_array(minimiggy.split_text(text.read_bytes())[0])
    x, y = minimiggy.get_batch(ids, TrainConfig(batch_size=64), TINY.block_size, 0)
    began = run[0].loss(Tensor(x[0]), Tensor(y[0])).item()  # some of its text, as the model that was exported sees it
    assert began == pytest.approx(said, rel=0.1)
    assert minimiggy.read_log(tmp_path / "tuned" / "log.csv")[-1]["val_loss"] < said - 0.3


def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (Path("/work/main") / "README.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "my.txt").write_text(TEXT[:20_000])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102


# ------------------------------------------------------------------------------------- part I: what it says, and alone

SOURCE = (HERE / "minimiggy.py").read_text()
PART_ONE = SOURCE[:SOURCE.index("\n# Part II. ") + 1]
GELU = lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # noqa: E731


def softmax(*logits):
    return [round(100 * math.exp(x) / sum(map(math.exp, logits))) for x in logits]


def without_correction(t, beta2):
    """Adam's m / sqrt(v) at step t, if every gradient was 1."""
    return round((1 - 0.9**t) / math.sqrt(1 - beta2**t), 1)


def test_every_example_in_the_comments_runs(monkeypatch):
    monkeypatch.chdir(HERE)
    lines = [line[2:] if line.startswith("# ") else "" for line in SOURCE.splitlines()]
    example = doctest.DocTestParser().get_doctest("\n".join(lines), dict(vars(minimiggy)), "minimiggy", None, 0)
    assert len(example.examples) > 25
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize(("words", "value", "figure"), [
    ("-3 becomes -0.004", round(GELU(-3), 3), -0.004), ("3 becomes 2.996", round(GELU(3), 3), 2.996),
    ("0.69 if p = 1/2", round(math.log(2), 2), 0.69), ("4.6 if p = 1/100", round(math.log(100), 1), 4.6),
    ("1 / ln 2 = 1.44", round(1 / math.log(2), 2), 1.44), ("2.25", round(3.6 * 1.44 / 2.3, 2), 2.25),
    ("m = 0.65 g", round(1 - 0.9**10, 2), 0.65), ("v = 0.096 g^2", round(1 - 0.99**10, 3), 0.096),
    ("give 2.1", without_correction(10, 0.99), 2.1), ("is 1, by luck", without_correction(1, 0.99), 1),
    ("3.2 at step 1", without_correction(1, 0.999), 3.2), ("it saves 131,072", 1024 * 128, 131072),
    ("67 %, 24 % and 9 %", softmax(2, 1, 0), [67, 24, 9]), ("87 %, 12 % and 2 %", softmax(4, 2, 0), [87, 12, 2])])
def test_the_figures_in_part_ones_prose_are_right(words, value, figure):
    assert value == figure and words in re.sub(r"\n *# ?", " ", PART_ONE)


def test_part_one_stands_alone_with_public_names_only(tmp_path):
    (tmp_path / "part_one.py").write_text(PART_ONE)
    imported = set(re.findall(r"^ *(?:from|import) (tinygrad\S*)", PART_ONE, re.MULTILINE))
    assert imported == {"tinygrad", "tinygrad.nn.state"} and not re.search(r"\buop\b|UOp", PART_ONE)
    code = f"""
from part_one import *
text = open({str(HERE / "data" / "play.txt")!r}).read()[:20_000]
tokenizer = BPETokenizer.train(text, 280)
model = GPT(GPTConfig(block_size=4, vocab_size=280, n_layer=1, n_head=2, n_embd=8), tokenizer=tokenizer)
plan = TrainConfig(batch_size=4, max_iters=30, warmup_steps=5, learning_rate=1e-2)
losses = [loss for _, loss, _ in training(model, plan, np.array(tokenizer.encode(text)))]
assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5]) - 1, losses
assert len(tokenizer.decode(list(write(model, [10], 8)))) > 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_budgets_hold():
    lines = SOURCE.splitlines()
    tree = ast.parse(SOURCE)
    comments = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline)
                if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")}
    docs = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    prose = comments | {n for node in docs for n in range(node.lineno, node.end_lineno + 1)}
    first = PART_ONE.count("\n")
    full = [n for n in range(1, first + 1) if lines[n - 1].strip()]
    assert first <= 800 and sum(n in prose for n in full) >= 0.45 * len(full)
    assert max(map(len, lines)) <= 110
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (40 if node.end_lineno <= first else 60), node.name
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef):
            assert node.body[0].lineno > node.lineno, f"line {node.lineno} has two statements"


# ----------------------------------------------------------------------------------------- what a reader may change

BLOCK = "        self.mlp = MLP(config, ops, rng)\n"
ADD = ("x + drop(self.attn(", "x + drop(self.mlp(")
WPE = ("        self.wpe = Embedding(ops, rng, config.block_size, config.n_embd)\n", "")
POSITIONS = ("drop(self.wte(idx) + self.wpe(position))", "drop(self.wte(idx))")
RMS = '''class RMSNorm:
    def __init__(self, ops, C):
        self.weight = ops.place(np.ones(C, np.float32))

    def __call__(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight

class Dropout:
'''
ROTATE = '''def rotate(x, position):
    half = x.shape[-1] // 2
    angle = position.reshape(-1, 1, 1, 1) * 100.0 ** (-Tensor.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return (a * angle.cos() - b * angle.sin()).cat(a * angle.sin() + b * angle.cos(), dim=-1)

class Attention:
'''
EDITS = {
    "ReLU squared": [("        return (0.5 * x * switch).contiguous()", "        return x.relu().square().contiguous()")],
    "RMSNorm": [("class Dropout:\n", RMS), ("self.ln_1 = LayerNorm", "self.ln_1 = RMSNorm"),
                ("self.ln_2 = LayerNorm", "self.ln_2 = RMSNorm"), ("self.ln_f = LayerNorm", "self.ln_f = RMSNorm")],
    "rotary": [WPE, POSITIONS, ("class Attention:\n", ROTATE),
               ("        y = self.ops.attention(qkv, ", "        qkv = rotate(qkv[:, :, :2], position).cat(qkv[:, :, 2:], "
                "dim=2)\n        y = self.ops.attention(qkv, ")],
    "SwiGLU": [("self.c_fc = Linear(ops, rng, C, 4 * C)", "self.c_fc = Linear(ops, rng, C, 8 * C)"),
               ("        return self.c_proj(self.ops.gelu(self.c_fc(x)))",
                "        gate, up = self.c_fc(x).chunk(2, dim=-1)\n        return self.c_proj(gate.silu() * up)")],
    "untied head": [(BLOCK, BLOCK), (WPE[0], WPE[0] + WPE[0].replace("wpe", "lm_head").replace("block", "vocab")),
                    ("self.ops.unembed(x, self.wte.weight)", "self.ops.unembed(x, self.lm_head.weight)")],
    "gates": [(BLOCK, BLOCK + "        self.gate = Tensor.ones(2)\n"), (ADD[0], "x + self.gate[0] * drop(self.attn("),
              (ADD[1], "x + self.gate[1] * drop(self.mlp(")],
    "no biases": [("        self.bias = ops.place(np.zeros(n_out, np.float32))\n", "        self.bias = None\n"),
                  ("        self.bias = ops.place(np.zeros(C, np.float32))\n", "        self.bias = None\n")],
    "SGD with momentum": [("rate * (m_hat / (v_hat.sqrt() + 1e-8) + decay * theta)", "30 * rate * new_m")],
    # And some that nobody announced.
    "shared layers": [("[Block(config, ops, rng) for _ in range(config.n_layer)]", "[Block(config, ops, rng)] * 2")],
    "ALiBi": [("        scores = visible.where", "        scores = scores + Tensor.arange(scores.shape[-1])\n"
               "        scores = visible.where")],
    "a window that no cache knows of": [("dtype=dtypes.bool).tril()", "dtype=dtypes.bool).tril().triu(-1)")],
    "token shift": [("        x = (x + drop(self.attn(", "        x = x + x.pad((None, (1, 0), None))[:, :-1]\n"
                     "        x = (x + drop(self.attn(")],
    "capped logits": [("return self.ops.unembed(x, self.wte.weight)",
                       "return 3 * (self.ops.unembed(x, self.wte.weight) / 3).tanh()")],
    "a table made anew": [WPE, (POSITIONS[0], "drop(self.wte(idx) + Tensor(np.eye(8, dtype=np.float32))[:, :8]"
                                "[position])")],
    "no gelu in Plain": [("    def gelu(self, x", "    def bend(self, x"), ("self.ops.gelu(", "self.ops.bend(")],
}
STILL_GPT2 = {"SGD with momentum", "no gelu in Plain"}


def edited(name, tmp_path):
    """The file with an edit of part I, as a module of its own."""
    text = SOURCE
    for old, new in EDITS[name]:
        assert old in PART_ONE, old
        text = text.replace(old, new, 1)
    changed = [line for line in difflib.ndiff(SOURCE.splitlines(), text.splitlines()) if line[:2] in ("+ ", "- ")]
    assert len(changed) <= 2 * 15
    path = tmp_path / f"edited_{re.sub('[^a-z]', '_', name.lower())}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shake(module, model):
    """Random numbers for all parameters, so that no zero hides an error."""
    rng = np.random.default_rng(3)
    for tensor in model.parameters().values():
        module.load_array(tensor, tensor.numpy() + 0.2 * rng.standard_normal(tensor.shape).astype(np.float32))
    return model


@pytest.mark.parametrize("name", EDITS)
def test_a_readers_edit_trains_writes_and_saves_or_is_refused(name, tmp_path, capsys, thorough=False):
    m = edited(name, tmp_path)
    config = m.GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    x, y = np.random.default_rng(0).integers(0, 11, (2, 2, 6)).astype(np.int32)
    found = []
    for backend in (m.PLAIN, m.BACKENDS[-1]):
        model = shake(m, m.GPT(config, backend))
        named = model.parameters()
        loss = model.loss(Tensor(x), Tensor(y))
        gradients = loss.gradient(*named.values())
        Tensor.realize(loss, *gradients)
        found.append({key: gradient.numpy() for key, gradient in zip(named, gradients, strict=True)})
    for key, plain in found[0].items():
        assert np.abs(plain - found[1][key]).max() <= 1e-4 * np.abs(plain).max() > 0, key
    plan = m.TrainConfig(batch_size=4, max_iters=20, warmup_steps=2, learning_rate=1e-2)
    losses = [loss for _, loss, _ in m.training(model, plan, np.arange(300) * 7 % 11)]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    kept = m.Writer(model)
    assert list(kept.stream([1, 2], 12, temperature=0)) == list(m.write(model, [1, 2], 12, temperature=0))
    assert kept.remembers == ("no cache" not in name and name != "token shift")
    path = model.save_checkpoint(20, None, tmp_path)
    again = m.GPT(config, seed=None)
    again.load_checkpoint(path)
    assert same(again, model)
    if name in STILL_GPT2:
        m.export(model, tmp_path / "export")
    else:
        with pytest.raises(m.UserError, match="no GPT-2"):
            m.export(model, tmp_path / "export")
    if thorough:
        assert m.gradcheck(1)


def test_a_parameter_that_is_not_in_the_loss_is_named(tmp_path):
    m = edited("ReLU squared", tmp_path)
    model = m.GPT(m.GPTConfig(block_size=6, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    assert m.untrained(model) == [] and m.CHANGED == ["gelu"]
    model.forgotten = Tensor.ones(3)
    assert m.untrained(model) == ["forgotten"]


# -------------------------------------------------------------------------------------------------------- as a library

def test_models_and_streams_in_turn_give_what_each_gives_alone(ids):
    config = dataclasses.replace(TINY, n_layer=1)
    alone = [[AdamW(GPT(config, seed=seed), QUICK)(ids, 0)] for seed in (1, 2)]
    models = [GPT(config, seed=seed) for seed in (1, 2)]
    optimizers = [AdamW(model, QUICK) for model in models]
    for i in range(3):
        losses = [optimizer(ids, i) for optimizer in optimizers]
        assert i > 0 or losses == [one for one, in alone]
    whole = [list(Writer(models[0]).stream([seed], 20, seed)) for seed in (1, 2)]
    streams = [Writer(models[0]).stream([seed], 20, seed) for seed in (1, 2)]
    assert [list(pair) for pair in zip(*zip(*streams, strict=True), strict=True)] == whole


def test_backward_and_single_gradients_work_as_in_any_tinygrad_program(ids):
    model = GPT(TINY)
    x, y = (Tensor(part[0]) for part in minimiggy.get_batch(ids, QUICK, 8, 0))
    table = model.wte.weight
    alone, = model.loss(x, y).gradient(table)
    for turn in (1, 2):  # .grad adds up from call to call, as it should
        model.loss(x, y).backward()
        assert np.abs(table.grad.numpy() - turn * alone.numpy()).max() < 1e-5


def test_another_tinygrad_runs_part_one_as_it_is_and_says_so():
    code = ("import importlib.metadata as m\nreal = m.version\nm.version = lambda p: '9.9' if p == 'tinygrad' else real(p)\n"
            "import minimiggy as mm\nprint(type(mm.BACKENDS[-1]).__name__, mm.WHY_PLAIN)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True).stdout
    assert out.startswith("Plain") and "9.9 is not 0.14.0" in out and "pip install" in out


def test_the_checksums_of_part_ones_operations_are_current():
    assert minimiggy.CHANGED == [] and minimiggy.LAYERS_AS_WE_KNOW_THEM


@pytest.mark.parametrize("damage", ["random", "zeros", "cut", "folder", "foreign"])
def test_a_damaged_or_unwritable_cache_is_done_without(damage, tmp_path):
    file = tmp_path / "minimiggy" / minimiggy.programs_file().name
    file.parent.mkdir(mode=0o700)
    good = minimiggy.programs_file().read_bytes()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes({"random": os.urandom(5000), "zeros": bytes(5000), "cut": good[:len(good) // 2],
                          "foreign": b"SQLite format 3\0" * 99}[damage])
    code = "from minimiggy import *; print(GPT(GPTConfig(4, 300, 1, 2, 16))(Tensor([[1, 2]])).numpy().shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=False,
                          env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout.strip() == "(1, 2, 300)" and done.stderr == ""


@pytest.mark.parametrize(("world", "words"), [
    ({"CC": "false"}, "CC=false"), ({"CC": "gcc-that-is-not-there"}, "unset CC"), ({"DEV": "FOO"}, "DEV=FOO"),
    ({"DEV": "CUDA"}, "unset DEV"), ({"CC": ""}, None), ({"DEV": "cpu"}, None),
    ({"HOME": "/nonexistent", "XDG_CACHE_HOME": "/dev/null"}, None)])
def test_a_broken_world_gets_one_line(world, words, tmp_path):
    flags = ["--train", "--data", "play", "--out-dir", str(tmp_path / "out"), *SMALL, "--max-iters", "1"]
    done = subprocess.run([sys.executable, str(HERE / "minimiggy.py"), *flags], capture_output=True, text=True,
                          cwd=tmp_path, check=False, env=os.environ | world)
    assert done.returncode == (2 if words else 0), done.stderr
    assert done.stderr.count("\n") == (1 if words else 0) and (words or "") in done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as room:
        all_the_same = kill_and_resume(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else room)
    sys.exit(not all_the_same)
