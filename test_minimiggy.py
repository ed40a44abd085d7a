"""What MiniMiggy promises, held against something independent: numpy, finite differences, naive forms, its
own prose, the README. Tests that compile much share their shapes: TINY for the default path (DEEP where it
matters that there is more than one layer), SMALLEST and GRADCHECK for the plain one."""
import ast
import copy
import dataclasses
import difflib
import doctest
import errno
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random as random_numbers
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import tracemalloc
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ["TRACEMETA"] = "0"             # tinygrad need not note which operation a tensor comes from, and
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads need not wait at the expense of other workers

import numpy as np
import pytest

if "EXERCISES" not in os.environ:
    os.environ["NOOPT"] = "1"  # tinygrad's programs need not be quick here, and so are compiled sooner ...
import minimiggy  # (before tinygrad, which it tells where to compute)
from minimiggy import (GPT, PLAIN, AdamW, BPETokenizer, Fast, GPTConfig, Plain, TrainConfig, UserError,
                       Writer, load_array, main, train, write)
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict, load_state_dict, safe_load

os.environ.pop("NOOPT", None)  # ... but in the processes that tests start, they are as users have them

FILE = Path(minimiggy.__file__)
HERE = FILE.parent
SOURCE = FILE.read_text()
PART_ONE = SOURCE[:re.search("^# Part II", SOURCE, re.MULTILINE).start()]
FAST = minimiggy.BACKENDS[-1]
TINY = GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=16)
DEEP = dataclasses.replace(TINY, n_layer=2)
QUICK = TrainConfig(batch_size=4, max_iters=6, eval_interval=3, eval_iters=2, warmup_steps=2,
                    learning_rate=1e-2)
SMALLEST = GPTConfig(block_size=4, vocab_size=260, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
SHORT = TrainConfig(batch_size=2, max_iters=30, eval_interval=15, eval_iters=1, warmup_steps=2,
                    learning_rate=1e-2)
TEXT = (HERE / "data" / "play.txt").read_text()

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

# tinygrad's syntax trees are millions of objects. To look through them for garbage less often saves a
# twentieth of the time.
gc.set_threshold(50_000, 20, 20)

@pytest.fixture(scope="session")
def loaded():
    """How many bytes of compiled programs this process has read."""
    yield {"size": 0}
    gc.freeze()  # (pytest looks for garbage five times when all is done)

@pytest.fixture(autouse=True)
def programs_of_all_workers(loaded):
    """Read what other workers have compiled and kept since: it need not be compiled again."""
    file = minimiggy.programs_file()
    size = file.stat().st_size if file.exists() else 0
    if size > loaded["size"] + 200_000:
        minimiggy.load_programs.cache_clear()
        minimiggy.load_programs()
        loaded["size"] = size

def weights(model):
    """A model's parameters as arrays, by name."""
    return {name: tensor.numpy() for name, tensor in model.parameters().items()}

def in_numpy(x):
    return x.numpy() if isinstance(x, Tensor) else x

def same(a, b):
    """Have two dicts of arrays or tensors the same names and numbers (or NaNs)?"""
    if a.keys() != b.keys():
        return False
    return all(np.array_equal(in_numpy(a[name]), in_numpy(b[name]), equal_nan=True) for name in a)

def shake(model, size=0.2, seed=5):
    """Move every parameter at random, so that nothing is zero or one by accident, where errors could hide."""
    rng = np.random.default_rng(seed)
    for tensor in model.parameters().values():
        load_array(tensor, tensor.numpy() + size * rng.standard_normal(tensor.shape, np.float32))
    return model

def gradients(model, x, y):
    """The loss and the gradients of all parameters, by name, on passages x, y (B, T)."""
    named = model.parameters()
    loss = model.loss(Tensor(x), Tensor(y))
    slopes = loss.gradient(*named.values())
    Tensor.realize(loss, *slopes)
    return loss.item(), {name: slope.numpy() for name, slope in zip(named, slopes, strict=True)}

def logits(model, ids):
    return model(Tensor(np.array(ids, np.int32))).numpy()

def throw(error, *args, **kwargs):
    raise error

def in_a_process(code, *arguments, **variables):
    """Run Python code in a process of its own, with other variables in its environment; None: without it."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=environment)

# ------------------------------------------------------------------------------- what the file says of itself

def test_every_example_in_the_comments_gives_what_it_says(monkeypatch):
    monkeypatch.chdir(HERE)
    prose = "\n".join(line[2:] if line.startswith("# ") else "" for line in SOURCE.splitlines())
    examples = doctest.DocTestParser().get_doctest(prose, vars(minimiggy).copy(), "minimiggy.py", None, 0)
    wrong = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(examples, out=wrong.write)
    assert result.failed == 0, wrong.getvalue()
    assert result.attempted >= 30

def shares(*scores):
    """Their softmax, in percent."""
    powers = np.exp(np.array(scores))
    return 100 * powers / powers.sum()

X = Tensor([1.0])
STEP_10 = (1 - 0.9**10, 1 - 0.99**10)
FIGURES = [
    ("-3 becomes {:.3f}, 0 stays {:.0f}, and 3 becomes {:.3f}", PLAIN.gelu(Tensor([-3.0, 0, 3])).tolist()),
    ("sqrt(32) = {:.1f} above or below 0, and exp(5.7) is {:.0f}", (32**0.5, round(math.exp(5.7), -1))),
    ("With V = 1024 and C = 128, it saves {:,} parameters", [math.prod(GPT(GPTConfig(
        8, 1024, 1, 1, 128)).wte.weight.shape)]),
    ("by {:.2f} if p = 1/2, by {:.1f} if p = 1/100", (-math.log(1 / 2), -math.log(1 / 100))),
    ("(a nat is 1 / ln 2 = {:.2f} bits)", [1 / math.log(2)]),
    ("3.6 * 1.44 / 2.3 = {:.2f}", [3.6 * 1.44 / 2.3]),
    ("2y = {:.0f}, and in x it is 6 * 3 = {:.0f}",
     [2 * 3 * X.item(), (3 * X).square().sum().gradient(X)[0].item()]),
    ("{:.1f} g / sqrt({:.2f} g^2) is {:.0f} at step 1", (0.1, 0.01, 0.1 / 0.01**0.5)),
    ("{:.2f} g / sqrt({:.3f} g^2) is {:.1f} at step 10", (*STEP_10, STEP_10[0] / STEP_10[1]**0.5)),
    ("softmax of [2, 1, 0] gives {:.0f} %, {:.0f} % and {:.0f} %; at temperature 0.5, ", shares(2, 1, 0)),
    ("at temperature 0.5, {:.0f} %, {:.0f} % and {:.0f} %", shares(4, 2, 0)),
    ("the sum of exponentials is e^-2 + e^0 = {:.3f}", [math.exp(-2) + 1]),
    ("1.135 * 0.135 + e^-3 + e^0 = {:.3f}", [1.135 * 0.135 + math.exp(-3) + 1])]

@pytest.mark.parametrize(("words", "values"), FIGURES)
def test_the_figures_in_the_prose_are_right(words, values):
    prose = " ".join(line[2:] for line in SOURCE.splitlines() if line.startswith("# "))
    assert words.format(*values) in re.sub(" +", " ", prose)

def test_a_dot_product_of_d_numbers_has_variance_d():
    q, k = np.random.default_rng(0).standard_normal((2, 100_000, 32))
    assert (q * k).sum(1).var() == pytest.approx(32, rel=0.02)

def lines_of_prose(text):
    """The numbers of the lines that are comments or docstrings, and of those that are code."""
    lines = text.split("\n")
    prose = set()
    for node in ast.walk(ast.parse(text)):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            prose |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            prose.add(token.start[0])
    code = {number for number, line in enumerate(lines, 1) if line.strip() and number not in prose}
    return prose, code

def test_part_one_is_short_and_half_of_it_is_prose():
    assert len(re.findall("^# Part II", SOURCE, re.MULTILINE)) == 2  # the lines by which one can cut
    prose, code = lines_of_prose(PART_ONE)
    assert len(PART_ONE.splitlines()) <= 800 and len(prose) >= 0.45 * (len(prose) + len(code))
    prose, code = lines_of_prose(SOURCE)
    assert len(prose) >= 0.33 * (len(prose) + len(code))  # of the whole file

def test_functions_lines_and_statements_are_of_a_readable_length():
    end_of_part_one = len(PART_ONE.splitlines())
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            most = 40 if node.lineno < end_of_part_one else 60
            assert node.end_lineno - node.lineno < most, node.name
    assert [line for line in SOURCE.splitlines() if len(line) > 110] == []
    begin = Counter(node.lineno for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.stmt))
    assert [number for number, times in begin.items() if times > 1] == []
    _, code = lines_of_prose(SOURCE)
    lengths = [len(line.strip()) for number, line in enumerate(SOURCE.splitlines(), 1) if number in code]
    assert sum(lengths) / len(lengths) <= 50

def imported(text, folder, name):
    """A module made of this text, in a file of its own."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # (dataclasses look there)
    spec.loader.exec_module(module)
    return module

def test_part_one_stands_alone_trains_and_writes(tmp_path):
    names = set()
    for node in ast.walk(ast.parse(PART_ONE)):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    elsewhere = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert elsewhere <= {"numpy", "tinygrad", "tinygrad.nn.state", "tiktoken", "regex", "ziglang", "requests"}
    one = imported(PART_ONE, tmp_path, "part_one")
    assert one.BACKENDS == [one.PLAIN]
    tokenizer = one.BPETokenizer.train(TEXT[:5000], 260)
    model = one.GPT(one.GPTConfig(**dataclasses.asdict(SMALLEST)), tokenizer=tokenizer)
    plan = one.TrainConfig(**dataclasses.asdict(SHORT))
    losses = [loss for _, loss, _ in one.training(model, plan, np.array(tokenizer.encode(TEXT[:5000])))]
    assert len(losses) == 30 and np.mean(losses[-5:]) < losses[0] - 0.3
    written = list(one.write(model, tokenizer.encode("ROMEO:"), 12))
    assert len(written) == 12 and tokenizer.decode(written)

# ---------------------------------------------------------------------------------------------- the tokenizer

STRINGS = ["", "Hello, world", "ROMEO:\nBut soft!", " \n\t  x  \n", "naïve café",
           "日本語テキスト", "שלום עולם", "👩‍👩‍👧 🏳️‍🌈", "\0\x7f\ufeff",
           "a" * 1000, "It's 3.14, isn't it?"]

def random_strings(n):
    """Texts of many scripts, white space, controls, emoji, contractions, digits, and pieces of the play."""
    rng = random_numbers.Random(1)
    ranges = [(0, 32), (32, 127), (127, 256), (0x370, 0x400), (0x590, 0x700), (0x900, 0xA00), (0xE00, 0xF00),
              (0x2000, 0x2070), (0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900),
              (0x10000, 0x10400), (0x1D400, 0x1D800), (0x1F300, 0x1F700), (0xE0000, 0x110000)]
    pieces = ["  ", "\t\t ", " \n\n", "\r\n", "\u00a0", "\u2003", "\x85", "it's", "WE'LL", "'re", " '", "0",
              " 7", "½", "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "aaaaaaa",
              "----", "abcd", " abcd", "<|endoftext|>", "\0", "\ufeff"]

    def piece():
        kind = rng.randrange(3)
        if kind == 0:
            return rng.choice(pieces)
        if kind == 1:
            at = rng.randrange(len(TEXT) - 30)
            return TEXT[at:at + rng.randrange(1, 30)]
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 6)))
    return ["".join(piece() for _ in range(rng.randrange(20))) for _ in range(n)]

@pytest.mark.parametrize("size", [256, 300])
def test_any_string_round_trips(size):
    tokenizer = BPETokenizer.train("to be or not to be, that is the question " * 20, size)
    for string in STRINGS + random_strings(50):
        assert tokenizer.decode(tokenizer.encode(string)) == string
    assert max(tokenizer.encode("any text")) < tokenizer.vocab_size <= size
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert tokenizer.decode_bytes(tokenizer.vocab_size) == b""

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

def test_learned_merges_are_those_of_the_naive_algorithm():
    assert BPETokenizer.train(TEXT[:20_000], 336).merges == naive_merges(TEXT[:20_000], 80)

@pytest.mark.parametrize("text", [TEXT, "漢字" * 40_000, "x" * 140_000, " " * 140_000, "\n\n" * 9000 + "it's",
                                  "a1-b2-" * 9000, "".join(random_strings(300))])
def test_encoding_in_pieces_equals_encoding_at_once(text, tokenizer):
    whole = tokenizer.encoding.encode_ordinary(text)
    for size in (1 << 17, 1000):
        assert tokenizer.encode_array(text.encode(), size).tolist() == whole

def test_a_tokenizer_survives_json(tokenizer):
    again = minimiggy.tokenizer_from_json(minimiggy.tokenizer_to_json(tokenizer))
    assert again.encode(TEXT[:5000]) == tokenizer.encode(TEXT[:5000])

def test_a_text_is_cut_between_characters():
    for n in range(8, 30):
        text = ("é漢👩" * n).encode()[:-1].decode("utf-8", "ignore").encode()
        learned, kept = minimiggy.split_text(text)
        assert bytes(learned) + bytes(kept) == text
        assert bytes(learned).decode() + bytes(kept).decode() == text.decode()

# -------------------------------------------------------------------------------------------------- the model

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

def in_float64(model):
    return {name: array.astype(np.float64) for name, array in weights(model).items()}

GRADCHECK = GPTConfig(block_size=5, vocab_size=7, n_layer=2, n_head=2, n_embd=4)  # of the size of --gradcheck
PASSAGE = np.random.default_rng(0).integers(0, 7, (2, 2, 5)).astype(np.int32)

@pytest.mark.parametrize(("ops", "n_layer"), [(PLAIN, 1), (FAST, 2)], ids=["plain", "fast"])
def test_loss_and_every_gradient_agree_with_numpy_and_finite_differences(ops, n_layer):
    config = dataclasses.replace(GRADCHECK, n_layer=n_layer)
    model = shake(GPT(config, ops))
    x, y = PASSAGE
    loss, slopes = gradients(model, x, y)
    p = in_float64(model)

    def reference():
        return numpy_loss(p, x, y, n_layer, config.n_head)

    assert loss == pytest.approx(reference(), rel=1e-5)
    for name, got in slopes.items():
        want = np.zeros_like(p[name])
        for place in np.ndindex(want.shape):
            keep = p[name][place]
            p[name][place] = keep + 1e-5
            above = reference()
            p[name][place] = keep - 1e-5
            want[place] = (above - reference()) / 2e-5
            p[name][place] = keep
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max(), name

def test_backward_and_the_gradient_of_one_parameter_give_the_same():
    model = shake(GPT(GRADCHECK))
    _, want = gradients(model, *PASSAGE)
    loss = model.loss(*map(Tensor, PASSAGE))
    assert np.abs(loss.gradient(model.wte.weight)[0].numpy() - want["wte.weight"]).max() < 1e-6
    model.loss(*map(Tensor, PASSAGE)).backward()
    for name, tensor in model.parameters().items():
        assert np.abs(tensor.grad.numpy() - want[name]).max() < 1e-6, name

def random(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)

def some_ids(n, *shape):
    return np.random.default_rng(n).integers(0, n, shape).astype(np.int32)

def both_ways(name, *inputs, fast=FAST):
    """An operation by PLAIN and by `fast`: for each, the result and the gradients of a weighted sum of it."""
    results = []
    for ops in (PLAIN, fast):
        tensors = [Tensor(array).realize() for array in inputs]
        out = getattr(ops, name)(*tensors)
        floats = [tensor for tensor in tensors if tensor.dtype == dtypes.float32]
        slopes = (out * Tensor(random(*out.shape))).sum().gradient(*floats)
        Tensor.realize(out, *slopes)
        results.append([out.numpy(), *(slope.numpy() for slope in slopes)])
    return zip(*results, strict=True)

def qkv_of(B, T, H, D):
    return random(B, T, 3, H, D), np.arange(T, dtype=np.int32)

@pytest.mark.parametrize(("name", "inputs"), [
    ("linear", (random(3, 37, 70), random(70, 131), random(131))),
    ("linear", (random(2, 5, 1100), random(1100, 65), random(65))),     # a panel in two pieces
    ("linear", (random(2, 192, 1030), random(1030, 320), random(320))),  # strips that are copied
    ("linear", (random(1, 1, 24), random(24, 7))),                      # one row, without a bias
    ("linear", (random(5, 1, 1), random(1, 3), random(3))),
    ("gelu", (3 * random(2, 5, 71),)),
    ("gelu", (random(1, 1, 1),)),
    ("layer_norm", (random(2, 5, 97), random(97), random(97))),
    ("layer_norm", (random(1, 1, 13), random(13))),
    ("layer_norm", (random(3, 1), random(1), random(1))),
    ("attention", qkv_of(2, 37, 3, 20)),
    ("attention", qkv_of(1, 130, 2, 13)),
    ("attention", qkv_of(1, 1, 2, 1)),
    ("attention", qkv_of(3, 1, 3, 5)),
    ("embed", (some_ids(5, 3, 7), random(5, 13))),
    ("embed", (some_ids(5, 1, 1), random(5, 1))),
    ("unembed", (random(3, 7, 13), random(5, 13))),
    ("unembed", (random(1, 1, 9), random(37, 9))),
    ("cross_entropy", (5 * random(2, 32, 131), some_ids(131, 2, 32))),
    ("cross_entropy", (random(1, 1, 2), some_ids(2, 1, 1)))])
def test_fast_operations_and_their_gradients_equal_the_plain_ones(name, inputs):
    for plain, fast in both_ways(name, *inputs):
        assert np.abs(plain - fast).max() <= 1e-5 * max(1, np.abs(plain).max())

@pytest.mark.parametrize(("M", "N", "K", "cores"), [
    (1029, 64, 1100, 2), (1029, 64, 1100, 1), (29, 64, 1100, 2), (101, 64, 1100, 2), (101, 33, 4200, 2)])
def test_rows_of_two_tiles_are_counted_once_however_deep_the_product_is(M, N, K, cores):
    x, dy = random(K, M), random(K, N)
    for kernel, a in ((minimiggy.weights_back, x), (minimiggy.matmul, np.ascontiguousarray(x.T))):
        got, = Fast(cores).run(kernel, [Tensor.empty(M, N)], [Tensor(a), Tensor(dy)])
        assert np.abs(got.numpy() - x.T @ dy).max() < 1e-3

@pytest.mark.parametrize("cores", [2, 3, 7])
def test_no_two_cores_add_to_the_same_row_of_a_deep_product(cores):
    for M in range(64, 3000, 7):
        rows, _, depth, tiles, _ = minimiggy.plan(M, 64, 1100, cores, a_transposed=True)
        height = min(tiles * rows, M)
        begins = [min(top, M - height) for top in range(0, M, height)]
        parts = np.array_split(begins, min(cores, len(begins)))
        apart = all(one[-1] + height <= other[0] for one, other in itertools.pairwise(parts))
        assert apart or depth == 1100, M

def test_a_deep_product_is_right_with_and_without_copied_strips(monkeypatch):
    monkeypatch.setattr(minimiggy, "COPIES", not minimiggy.COPIES)
    for plain, fast in both_ways("linear", random(2, 192, 1030), random(1030, 320), random(320)):
        assert np.abs(plain - fast).max() <= 1e-5 * max(1, np.abs(plain).max())

@pytest.mark.parametrize(("function", "shape", "cores", "shares"), [
    (lambda x: x.exp() + 1, (4, 64, 128), 2, 2),
    (lambda x: x.exp() + 1, (4, 64, 128), 1, 1),
    (lambda x: x.exp() + 1, (3, 101, 101), 2, 1),      # an odd number
    (lambda x: x.exp() + 1, (4, 8, 8), 2, 1),          # so few that waking a core would take longer
    (lambda x: x.transpose(0, 1) * 2, (128, 192), 2, 2),
    (lambda x: (x * 2).sum(0), (4, 64, 128), 2, 1)])  # sums keep their order
def test_ordinary_programs_are_divided_among_cores_if_it_pays(function, shape, cores, shares):
    if cores > minimiggy.CORES:
        pytest.skip("needs two cores")
    x = random(*shape)
    recording = minimiggy.Recording(lambda x: (function(x).contiguous().realize(),), (x,), cores)
    recording.arrays[0][...] = x + 1
    (_, _, found), = recording.calls()
    minimiggy.Crew(recording.calls(), cores, cores)()
    assert found == shares and np.allclose(recording.results[0], function(Tensor(x + 1)).numpy(), rtol=1e-6)

ELSEWHERE = minimiggy.Elsewhere()  # (the kernels for a GPU's threads; on a CPU they are loops)

@pytest.mark.parametrize("ops", [FAST, ELSEWHERE])
def test_attention_is_right_for_scores_far_too_large_to_exponentiate(ops):
    qkv, position = qkv_of(1, 37, 3, 20)
    for plain, fast in both_ways("attention", 30 * qkv, position, fast=ops):
        assert np.isfinite(fast).all() and np.abs(plain - fast).max() < 1e-4 * np.abs(plain).max()

@pytest.mark.parametrize("sizes", [(2, 37, 3, 20), (1, 1, 2, 1), (2, 3, 1, 1)])
def test_attention_by_threads_equals_the_plain_one(sizes):
    for plain, fast in both_ways("attention", *qkv_of(*sizes), fast=ELSEWHERE):
        assert np.abs(plain - fast).max() <= 1e-5

def numbers_in_attention(ops, T):
    """How many numbers of memory attention over T tokens and its way back write and read."""
    qkv, position = map(Tensor, qkv_of(1, T, 1, 4))
    qkv.realize(position)
    out = ops.attention(qkv, position)
    slope = out.square().sum().gradient(qkv)[0]
    calls = out.schedule_linear(slope).src
    return sum(buffer.numel() for call in calls for buffer in call.src[1:])

@pytest.mark.parametrize("ops", [FAST, ELSEWHERE])
def test_attentions_memory_grows_with_the_length_and_not_with_its_square(ops):
    assert numbers_in_attention(ops, 1024) < 4.1 * numbers_in_attention(ops, 256)
    assert numbers_in_attention(PLAIN, 1024) > 12 * numbers_in_attention(PLAIN, 256)

def test_a_long_vector_keeps_its_digits():
    gradients = {str(n): 1 + 1e-3 * random(n) for n in (1, 3, 4097, 10_007, 3_000_001)}
    want = math.sqrt(sum((array.astype(np.float64)**2).sum() for array in gradients.values()))
    got = FAST.norm({name: Tensor(array).realize() for name, array in gradients.items()}).item()
    assert got == pytest.approx(want, rel=2e-7)

@pytest.mark.parametrize(("name", "shapes"), [
    ("linear", [(2, 3, 5), (4, 5), (5,)]), ("linear", [(2, 3, 5), (5, 4), (5,)]),
    ("linear", [(2, 3, 4), (2, 4, 5)]), ("linear", [(4, 3, 4), (4, 4, 5)]), ("linear", [(2, 3, 4), (4,)]),
    ("linear", [(3, 4), (4, 5), (3, 5)]), ("linear", [(2, 0, 4), (4, 5)]), ("unembed", [(2, 3, 5), (7, 4)]),
    ("layer_norm", [(2, 3, 5), (4,), (5,)]), ("layer_norm", [(2, 3, 5), (5,), (1,)]),
    ("layer_norm", [(2, 3, 5), (3, 5), (3, 5)]), ("embed", [(1, 3), (1, 3, 5)]), ("embed", [(3, 3), (3,)])])
def test_shapes_that_kernels_do_not_know_are_computed_or_refused_as_in_part_one(name, shapes):
    arrays = [random(*shape) for shape in shapes]
    if name == "embed":
        arrays[0] = np.zeros(shapes[0], np.int32)
    found = []
    for ops in (PLAIN, FAST):
        try:
            found.append(getattr(ops, name)(*map(Tensor, arrays)).numpy())
        except Exception as error:
            found.append(str(error))
    plain, fast = found
    assert plain == fast if isinstance(plain, str) else np.allclose(plain, fast, 1e-4, 1e-5)
    assert np.shape(plain) == np.shape(fast)

@pytest.mark.parametrize("ops", [FAST, PLAIN])
def test_a_cache_for_other_heads_is_refused(ops):
    cache = minimiggy.Cache(8, 1, ops.place)
    cache.room(2, 4)
    with pytest.raises(Exception, match="shape"):
        ops.attention(Tensor(random(1, 1, 3, 4, 4)), Tensor([0], dtype="int32"), cache).numpy()

def test_an_optimizer_with_numbers_of_another_shape_is_refused(ids):
    optimizer = AdamW(GPT(TINY), QUICK)
    optimizer.v = {name: Tensor.zeros(1).contiguous().realize() for name in optimizer.v}
    with pytest.raises(Exception, match="shape"):
        optimizer(ids, 0)

@pytest.mark.parametrize("bad", [7, -1, -100, 10**6, 2**31 - 1])
def test_ids_out_of_range_are_an_error_or_give_nan_where_they_are_not_known_yet(bad):
    model = GPT(GRADCHECK)
    right, spoiled = PASSAGE[0], PASSAGE[0].copy()
    spoiled[1, 2] = bad
    for x, y in ((spoiled, right), (right, spoiled)):
        with pytest.raises(ValueError, match=f"{bad}"):
            gradients(model, x, y)
        plain = GPT(GRADCHECK, PLAIN)
        assert math.isnan(plain.loss(Tensor(x), Tensor(y)).item())
        assert math.isnan(FAST.record(lambda x, y: (model.loss(x, y).realize(),))(x, y)[0])

@pytest.mark.parametrize("ops", [FAST, PLAIN], ids=["fast", "plain"])
def test_what_are_no_token_ids_is_refused_in_one_line(ops, ids):
    model = GPT(TINY, ops)
    good = Tensor(np.array([[1, 2, 3]], np.int32))
    for x in ([1, 2], [[1.0, 2.0]], [[[1]]], [list(range(9))], [[]]):
        with pytest.raises(ValueError, match="whole numbers"):
            model(Tensor(np.array(x)))
        with pytest.raises(ValueError):
            model.generate(Tensor(np.array(x)).cast("float32"), 1)
    for y in ([[1, 2]], [[1], [2]], [[1.0, 2.0, 3.0]]):
        with pytest.raises(ValueError, match="targets are whole numbers"):
            model.loss(good, Tensor(np.array(y)))
    for data in (ids.astype(np.float32), ids.astype(np.int64) - 300, ids.astype(np.int64) + 2**32):
        with pytest.raises(ValueError, match="whole numbers from 0 to 299"):
            next(minimiggy.training(model, QUICK, data))
        for train_data, val_data in ((data, None), (ids, data), (ids.reshape(2, -1)[:, :50], None)):
            with pytest.raises(UserError, match="text"):
                train(model, QUICK, train_data, val_data)
    with pytest.raises(UserError, match="too few"):
        minimiggy.Evaluator(model, 2).whole(ids[:5])
    for how in ({"temperature": -1.0}, {"top_p": math.nan}, {"top_k": -1}, {"max_tokens": -1},
                {"max_tokens": 10**10}):
        with pytest.raises(UserError, match="number between"):
            model.generate(good, **how)
    with pytest.raises(UserError, match="whole number between .* not 1.5"):
        model.generate(good, max_tokens=1.5)
    for plan in ({"beta2": 1.0}, {"grad_accum": 0}, {"eval_interval": 0}, {"learning_rate": -1.0}):
        with pytest.raises(UserError, match="number between"):
            train(model, dataclasses.replace(QUICK, **plan), ids)

def test_names_and_shapes_are_hugging_face_gpt2s():
    C = TINY.n_embd
    want = {"wte.weight": (300, C), "wpe.weight": (8, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C), ("mlp.c_fc", C, 4 * C),
                                  ("mlp.c_proj", 4 * C, C)):
            want |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        want |= {f"h.{i}.{name}.{kind}": (C,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    assert {name: tensor.shape for name, tensor in GPT(DEEP).parameters().items()} == want

def test_initial_weights_are_gpt2s():
    arrays = weights(GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=2, n_embd=64)))
    assert arrays["wte.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert arrays["h.1.mlp.c_proj.weight"].std() == pytest.approx(0.02 / 2, rel=0.03)
    assert not arrays["h.0.attn.c_attn.bias"].any() and (arrays["ln_f.weight"] == 1).all()

def test_dropout_zeroes_its_share_only_with_a_key_and_keeps_the_mean():
    x = Tensor.ones(200, 50)
    drop = minimiggy.Dropout(0.3, Tensor(np.array([7], np.uint32)))
    first = drop(x).numpy()
    second = drop(x).numpy()
    assert (first == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert first.mean() == pytest.approx(1, abs=0.03)
    assert (first == second).mean() < 0.7  # two places in the network drop different units
    assert (minimiggy.Dropout(0.3, None)(x).numpy() == 1).all()

# ----------------------------------------------------------------------------------------------- the training

def trained(config, plan, ids, ops=None, steps=4, recorded=True):
    """Losses, norms and weights after some steps."""
    optimizer = AdamW(GPT(config, ops), plan)
    if not recorded:
        step = optimizer.step
        optimizer.last_batch = lambda *arrays: [
            x.numpy() for x in step(*(Tensor(a).realize() for a in arrays))]
    found = [optimizer(ids, i) for i in range(steps)]
    return *np.array(found).T, weights(optimizer.model), optimizer

def test_numbers_that_a_processor_is_slow_with_become_zero():
    """Below 2^-126 an operation takes a hundred times as long."""
    theta, m, v, gradient, scale = (FAST.place(np.full(20, n, np.float32)) for n in (1, 1e-19, 1e-36, 0, 1))
    rates = FAST.place(np.array([0.1, 1, 1], np.float32))
    changed = FAST.run(minimiggy.adamw, [theta, m, v], [gradient, scale, rates], beta1=0.9, beta2=0.99,
                       decays=(0.0,))
    assert [result.tolist()[0] for result in changed] == [1.0, 0.0, 0.0]
    logits = Tensor([[0.0, -80.0, -90.0]]).realize()
    slopes = FAST.cross_entropy(logits, Tensor([0])).sum().gradient(logits)[0].numpy()
    assert (1e-20 < np.abs(slopes[0, 1:])).all() and np.abs(slopes).max() < 1e-17

def test_the_crew_replays_the_recording_to_the_last_bit(ids):
    losses, norms, numbers, _ = trained(DEEP, QUICK, ids)
    again, same_norms, same_numbers, _ = trained(DEEP, QUICK, ids, recorded=False)
    assert (losses == again).all() and (norms == same_norms).all() and same(numbers, same_numbers)

@pytest.mark.parametrize("ops", [FAST, PLAIN])
def test_a_result_that_is_a_mere_constant_is_recorded(ops):
    twice = ops.record(lambda x: ((2 * x).realize(), *(2 * x).sum().gradient(x)))
    for i in range(3):
        y, slope = twice(np.float32([i, 1]))
        assert y.tolist() == [2 * i, 2] and slope.tolist() == [2, 2]

def test_fewer_threads_than_shares_lose_nothing(ids, monkeypatch):
    config = dataclasses.replace(TINY, n_head=4, n_embd=48)
    crew = minimiggy.Crew
    used = []

    def crews(calls, _, cores):
        """Something that replays `calls` with another number of threads each time."""
        every = itertools.cycle((threads, crew(calls, threads, cores)) for threads in (1, 2, 3))

        def replay():
            threads, this = next(every)
            used.append(threads)
            this()
        return replay
    losses, norms, numbers, _ = trained(config, QUICK, ids, Fast(4), 6, recorded=False)
    monkeypatch.setattr(minimiggy, "Crew", crews)
    again, same_norms, same_numbers, _ = trained(config, QUICK, ids, Fast(4), 6)
    assert set(used) == {1, 2, 3}
    assert (losses == again).all() and (norms == same_norms).all() and same(numbers, same_numbers)

def test_ctrl_c_between_two_threads_waits_until_both_are_done(ids, monkeypatch):
    submit = ThreadPoolExecutor.submit

    def interrupted(*arguments):
        future = submit(*arguments)
        signal.raise_signal(signal.SIGINT)
        return future
    numbers = []
    for expected in (nullcontext(), pytest.raises(KeyboardInterrupt)):
        optimizer = AdamW(GPT(TINY, Fast(2)), QUICK)
        optimizer(ids, 0)
        if numbers:
            monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
        with expected:
            optimizer(ids, 1)
        numbers.append(optimizer.model.parameters())
    assert same(*numbers)

def changes_nothing(optimizer, ids, name="wte.weight", bad=math.inf):
    """Does a step with a gradient that is not finite leave everything as it is?"""
    spoiled = optimizer.model.parameters()[name]
    good = spoiled.numpy()
    array = good.copy()
    array.reshape(-1)[0] = bad
    load_array(spoiled, array)
    states = (optimizer.model.parameters(), optimizer.m, optimizer.v)
    before = [{key: tensor.numpy() for key, tensor in state.items()} for state in states]
    loss, norm = optimizer(ids, 1)
    kept = all(same(a, b) for a, b in zip(before, states, strict=True))
    load_array(spoiled, good)
    return kept and not math.isfinite(loss + norm)

def test_fast_and_plain_train_alike(tokenizer):
    ids = BPETokenizer.train(TEXT[:5000], 260).encode_array(TEXT[:5000].encode())
    losses, norms, numbers, _ = trained(SMALLEST, SHORT, ids, FAST, 6)
    others, other_norms, other_numbers, optimizer = trained(SMALLEST, SHORT, ids, PLAIN, 6)
    assert losses == pytest.approx(others, rel=1e-5)
    assert norms == pytest.approx(other_norms, rel=1e-4)
    for name, array in numbers.items():
        assert np.abs(array - other_numbers[name]).max() < 2e-4, name
    assert changes_nothing(optimizer, ids)

def test_a_gradient_that_is_not_finite_changes_nothing(ids):
    optimizer = AdamW(GPT(DEEP), QUICK)
    optimizer(ids, 0)
    for name in ("wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_fc.bias",
                 "h.1.mlp.c_proj.weight", "ln_f.bias"):
        for bad in (math.nan, math.inf, -math.inf):
            assert changes_nothing(optimizer, ids, name, bad), (name, bad)
    assert math.isfinite(sum(optimizer(ids, 1)))

def test_adamw_agrees_with_numpy(ids):
    config = TrainConfig(batch_size=4, warmup_steps=0, max_iters=10, grad_clip=0.5)
    model = GPT(TINY)
    optimizer = AdamW(model, config)
    theta = in_float64(model)
    m = {name: np.zeros_like(array) for name, array in theta.items()}
    v = {name: np.zeros_like(array) for name, array in theta.items()}
    for i in range(4):
        x, y = minimiggy.get_batch(ids, config, TINY.block_size, i)
        _, slopes = gradients(model, x[0], y[0])
        length = math.sqrt(sum((slope.astype(np.float64)**2).sum() for slope in slopes.values()))
        assert optimizer(ids, i)[1] == pytest.approx(length, rel=1e-4)
        for name, p in theta.items():
            slope = slopes[name] * min(1, 0.5 / length)
            m[name] = 0.9 * m[name] + 0.1 * slope
            v[name] = 0.99 * v[name] + 0.01 * slope**2
            step = m[name] / (1 - 0.9**(i + 1)) / (np.sqrt(v[name] / (1 - 0.99**(i + 1))) + 1e-8)
            p -= minimiggy.learning_rate(config, i) * (step + 0.1 * (p.ndim == 2) * p)
            assert np.abs(model.parameters()[name].numpy() - p).max() < 2e-5, name

@pytest.mark.parametrize("cores", [1, 2, 4, 50])
def test_parameters_of_one_number_beside_larger_ones_are_moved_once(cores):
    shapes = {"large": (5, 3), "one": (1,), "two": (2,)}
    moved = []
    for ops in (PLAIN, Fast(cores)):
        arrays = [{name: 1 + random(*shape)**2 for name, shape in shapes.items()} for _ in range(4)]
        kinds = [{name: ops.place(array).realize() for name, array in kind.items()} for kind in arrays]
        rates = Tensor(np.array([0.1, 0.2, 0.3], np.float32)).realize()
        Tensor.realize(*ops.adamw(*kinds, Tensor(0.5).clone().realize(), rates, QUICK))
        moved.append([tensor.numpy() for kind in kinds[:3] for tensor in kind.values()])
    for plain, fast in zip(*moved, strict=True):
        assert np.abs(plain - fast).max() < 1e-6

def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(1000)
    config = TrainConfig(batch_size=4, grad_accum=2)
    x, y = minimiggy.get_batch(data, config, 8, 5)
    assert x.shape == y.shape == (2, 4, 8) and (y == x + 1).all()
    assert (minimiggy.get_batch(data, config, 8, 5)[0] == x).all()
    assert (minimiggy.get_batch(data, config, 8, 6)[0] != x).any()

def test_gradient_accumulation_averages_its_batches(ids):
    config = dataclasses.replace(QUICK, grad_accum=2)
    model = GPT(TINY)
    batches = zip(*minimiggy.get_batch(ids, config, TINY.block_size, 0), strict=True)
    found = [gradients(model, x, y) for x, y in batches]
    mean = [np.mean([slopes[name] for _, slopes in found], axis=0) for name in model.parameters()]
    want = np.mean([loss for loss, _ in found]), math.sqrt(sum((slope**2).sum() for slope in mean))
    assert AdamW(model, config)(ids, 0) == pytest.approx(want, rel=1e-5)

def test_a_resumed_run_ends_where_an_unbroken_one_does(run, tokenizer, ids, tmp_path):
    model, optimizer, folder = run
    again = GPT(TINY, tokenizer=tokenizer, seed=99)
    fresh = AdamW(again, QUICK)
    assert again.load_checkpoint(folder / "ckpt_3.safetensors", fresh) == 3
    train(again, QUICK, ids, ids[:500], optimizer=fresh, start=3, out_dir=tmp_path)
    assert same(weights(again), weights(model)) and same(fresh.m, optimizer.m)
    assert same(fresh.v, optimizer.v)

def test_log_has_a_row_a_report(run):
    lines = (run[2] / "log.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,val_loss,val_bpb,lr,grad_norm,tokens_per_s,train_bpb"
    assert [line.split(",")[0] for line in lines[1:]] == ["3", "6"]
    assert all(len(line.split(",")) == 8 for line in lines)

def test_every_token_is_examined_once_whatever_the_batch_size(run, ids):
    model = run[0]
    p = in_float64(model)
    data = ids[:53]  # 52 predictions: six windows of 8, and 4
    total = 0.0
    for first in range(0, 52, 8):
        start = min(first, 44)
        x, y = data[start:start + 8], data[start + 1:start + 9]
        logits = numpy_logits(p, x[None], TINY.n_layer, TINY.n_head)[0]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), y]
        total += losses[first - start:].sum()
    for batch_size in (1, 4):
        assert minimiggy.Evaluator(model, batch_size).whole(data) == pytest.approx(total / 52, rel=1e-5)

# ------------------------------------------------------------------------- what a reader may change (issue 9)

RELU2 = [("        switch = 1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()\n", ""),
         ("return (0.5 * x * switch).contiguous()", "return x.relu().square()")]
RMSNORM = [("class LayerNorm:\n", '''class RMSNorm:
    def __init__(self, ops, C):
        self.weight = Tensor.ones(C)

    def __call__(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight

class LayerNorm:
'''), *((f"self.{name} = LayerNorm(", f"self.{name} = RMSNorm(") for name in ("ln_1", "ln_2", "ln_f"))]
NO_WPE = [("        self.wpe = Embedding(ops, rng, config.block_size, config.n_embd)\n", ""),
          ("drop(self.wte(idx) + self.wpe(position))", "drop(self.wte(idx))")]
ROTARY = [*NO_WPE, ("class Attention:\n", '''def rotate(x, position):
    half = x.shape[-1] // 2
    angle = position.reshape(-1, 1, 1) * 10000.0 ** (-Tensor.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return Tensor.cat(a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), dim=-1)

class Attention:
'''), ("        y = self.ops.attention(qkv,", '''        q, k, v = (qkv[:, :, i] for i in range(3))
        qkv = Tensor.stack(rotate(q, position), rotate(k, position), v, dim=2)
        y = self.ops.attention(qkv,''')]
SWIGLU = [("self.c_fc = Linear(ops, rng, C, 4 * C)", "self.c_fc = Linear(ops, rng, C, 8 * C)"),
          ("        return self.c_proj(self.ops.gelu(self.c_fc(x)))",
           "        gate, up = self.c_fc(x).chunk(2, dim=-1)\n        return self.c_proj(gate.silu() * up)")]
END_OF_GPT = "        self.ln_f = LayerNorm(ops, config.n_embd)\n"
LM_HEAD = "        self.lm_head = Embedding(ops, rng, config.vocab_size, config.n_embd)\n"
UNTIED = [(END_OF_GPT, END_OF_GPT + LM_HEAD),
          ("self.ops.unembed(x, self.wte.weight)", "self.ops.unembed(x, self.lm_head.weight)")]
END_OF_BLOCK = "        self.mlp = MLP(config, ops, rng)\n"
TWO_GATES = "        self.gate_1 = Tensor.ones(1)\n        self.gate_2 = Tensor.zeros(1)\n"
GATES = [(END_OF_BLOCK, END_OF_BLOCK + TWO_GATES),
         ("(x + drop(heard)", "(x + self.gate_1 * drop(heard)"),
         ("(x + drop(thought)", "(x + self.gate_2 * drop(thought)")]
NO_BIAS = [("        self.bias = ops.place(np.zeros(n_out, np.float32))\n", ""),
           ("        self.bias = ops.place(np.zeros(C, np.float32))\n", ""),
           ("linear(x, self.weight, self.bias)", "linear(x, self.weight)"),
           ("layer_norm(x, self.weight, self.bias)", "layer_norm(x, self.weight)")]
SGD = [("            new_v = config.beta2 * v[name] + (1 - config.beta2) * gradient.square()\n", ""),
       ("            v_hat = new_v / rates[2]\n", ""),
       ("rates[0] * (m_hat / (v_hat.sqrt() + 1e-8) + decay * theta)", "20 * rates[0] * m_hat"),
       ("(theta, new_theta), (m[name], new_m), (v[name], new_v)", "(theta, new_theta), (m[name], new_m)")]
EDITS = {"relu^2": RELU2, "rmsnorm": RMSNORM, "rotary": ROTARY, "swiglu": SWIGLU, "untied": UNTIED,
         "gates": GATES, "no biases": NO_BIAS, "sgd": SGD}

def edited(changes, folder, name="edited"):
    """The whole file as a module, with replacements in part I, and how many lines they change."""
    text = PART_ONE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    matcher = difflib.SequenceMatcher(None, PART_ONE.splitlines(), text.splitlines(), autojunk=False)
    blocks = [block for block in matcher.get_opcodes() if block[0] != "equal"]
    lines = sum(max(old_end - old, new_end - new) for _, old, old_end, new, new_end in blocks)
    return imported(text + SOURCE[len(PART_ONE):], folder, name), lines

def small(module, ops=None, n_layer=1):
    """A model of such a module, of the size of --gradcheck."""
    return module.GPT(module.GPTConfig(block_size=5, vocab_size=7, n_layer=n_layer, n_head=2, n_embd=4), ops)

CIRCLE = np.tile(np.arange(7), 30)  # a text that can be learned

def learns(module, model):
    """Do 20 steps lower the loss? Does every parameter move?"""
    before = weights(model)
    plan = module.TrainConfig(batch_size=2, max_iters=20, warmup_steps=2, learning_rate=5e-2)
    losses = [loss for _, loss, _ in module.training(model, plan, CIRCLE)]
    still = [name for name, array in weights(model).items() if (array == before[name]).all()]
    assert still == [] and np.mean(losses[-3:]) < losses[0] - 0.05
    return model

def writes_alike(module, model, prompt=(1, 2, 3), n=16, writer=None):
    """Does a Writer write, with its cache, what `write` does, which computes all of the text anew?"""
    written = list((writer or module.Writer(model)).stream(list(prompt), n, temperature=0))
    assert written == list(module.write(model, list(prompt), n, temperature=0))
    return written

def comes_back(module, model, folder):
    """Does a checkpoint give back all parameters, and the same logits?"""
    path = model.save_checkpoint(1, module.AdamW(model, module.TrainConfig()), folder)
    again = module.open_checkpoint(path)[0]
    assert same(weights(again), weights(model))
    assert (logits(again, PASSAGE[0]) == logits(model, PASSAGE[0])).all()

@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_part_one_is_followed_by_everything_else(name, tmp_path, capsys):
    module, lines = edited(EDITS[name], tmp_path)
    assert lines <= 15 and module.WHY_PLAIN is None
    loss, plain = gradients(shake(small(module, module.PLAIN)), *PASSAGE)
    fast_loss, fast = gradients(shake(small(module)), *PASSAGE)
    assert fast_loss == pytest.approx(loss, rel=1e-5) and fast.keys() == plain.keys()
    for parameter, want in plain.items():
        assert np.abs(want).max() > 0, parameter
        assert np.abs(fast[parameter] - want).max() <= 1e-4 * np.abs(want).max(), parameter
    model = learns(module, small(module))
    writes_alike(module, model)
    comes_back(module, model, tmp_path)
    assert module.main(["--gradcheck"]) == 0
    if name != "sgd":
        with pytest.raises(module.UserError, match="no GPT-2 any more"):
            module.export(model, tmp_path / "export")
        assert not (tmp_path / "export").exists()

# Many at once, and none of them on the list: norms of queries and keys with a learned scale, one key and one
# value for all heads, both sublayers side by side, a gate without dimensions, a parameter used three times,
# logits with a soft cap, shared layers, a table that is not learned.
MIXTURE = [
    ("        self.n_head = config.n_head\n",
     "        self.n_head = config.n_head\n        self.scale = Tensor.ones(C // config.n_head)\n"),
    ("self.c_attn = Linear(ops, rng, C, 3 * C)",
     "self.c_attn = Linear(ops, rng, C, C + 2 * C // config.n_head)"),
    ("        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)\n",
     """        qkv = self.c_attn(x)
        D = C // self.n_head
        H = self.n_head
        q, k, v = (part.reshape(B, T, -1, D).expand(B, T, H, D) for part in qkv.split([C, D, D], -1))
        q, k = (part * (part.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.scale for part in (q, k))
        qkv = Tensor.stack(q, k, v, dim=2)
"""),
    ("        x = (x + drop(heard)).contiguous()\n", ""),
    ("self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))"),
    ("        return (x + drop(thought)).contiguous()",
     "        return x + self.gate * drop(heard) + drop(thought)"),
    ("        self.ln_2 = LayerNorm(ops, config.n_embd)\n", "        self.gate = Tensor(1.0)\n"),
    ("return self.ops.unembed(x, self.wte.weight)",
     "return 3 * (self.ops.unembed(x * self.s, self.wte.weight) / 3 + 0.1 * self.s.mean()).tanh()"),
    ("self.h = [Block(config, ops, rng) for _ in range(config.n_layer)]",
     "self.h = [Block(config, ops, rng)] * config.n_layer"),
    (END_OF_GPT, END_OF_GPT + """        self.s = Tensor.ones(config.n_embd)
        self.table = first_weights(ops, rng, config.block_size, config.n_embd, std=0.1).is_param_(False)
"""),
    ("drop(self.wte(idx) + self.wpe(position))",
     "drop(self.wte(idx) * self.s + self.wpe(position)) + self.table[position]")]

def test_edits_that_nobody_foresaw_work_together(tmp_path, capsys):
    module, _ = edited(MIXTURE, tmp_path)
    model = learns(module, small(module, n_layer=2))
    assert "h.0.gate" in model.parameters()
    assert not any(name.startswith("h.1") or name == "table" for name in model.parameters())
    writes_alike(module, model)
    comes_back(module, model, tmp_path)
    assert module.main(["--gradcheck"]) == 0
    with pytest.raises(module.UserError, match="no GPT-2 any more"):
        module.export(model, tmp_path / "export")

def test_a_model_that_differs_from_gpt2_only_at_the_ends_of_lines_is_not_exported(tokenizer, tmp_path):
    module, _ = edited([("self.wpe(position))", "self.wpe(position) * (idx != 10).unsqueeze(-1))")], tmp_path)
    model = shake(module.GPT(module.GPTConfig(**dataclasses.asdict(TINY)), tokenizer=tokenizer))
    assert tokenizer.encode("\n") == [10]
    with pytest.raises(module.UserError, match="other logits"):
        module.export(model, tmp_path / "export")

MEAN = [("        self.batch = model.ops.record",
         "        self.mean = {name: Tensor.zeros(*p.shape)HOW for name, p in self.parameters.items()}\n"
         "        self.batch = model.ops.record"),
        ("        Tensor.realize(*changed)\n", """
        new = [mean.assign(0.5 * mean + 0.5 * self.parameters[name]) for name, mean in self.mean.items()]
        Tensor.realize(*changed)
        Tensor.realize(*new)
""")]

@pytest.mark.parametrize(("how", "changed"), [("", {}), (".contiguous()", {}), ("", {"min_lr": 1e-5})],
                         ids=["a constant", "lazy", "with another plan"])
def test_what_an_optimizer_of_ones_own_keeps_is_in_the_checkpoint(how, changed, tmp_path):
    module, _ = edited([(old, new.replace("HOW", how)) for old, new in MEAN], tmp_path)
    plan = module.TrainConfig(batch_size=2, max_iters=6, warmup_steps=2, save_every=1, keep=9)
    module.train(small(module), plan, CIRCLE, out_dir=tmp_path / "a")
    model = small(module)
    optimizer = module.AdamW(model, plan)
    start = model.load_checkpoint(tmp_path / "a" / "ckpt_4.safetensors", optimizer)
    plan = dataclasses.replace(plan, **changed)
    module.train(model, plan, CIRCLE, optimizer=optimizer, start=start, out_dir=tmp_path / "b")
    for folders, same_plan in (("aaaaaa", True), ("aaaabb", not changed)):
        saved = [minimiggy.read_safetensors(tmp_path / folder / f"ckpt_{step}.safetensors")[0]
                 for step, folder in enumerate(folders, 1)]
        mean = 0
        for arrays in saved:
            mean = 0.5 * mean + 0.5 * arrays["wte.weight"]
        assert saved[-1]["optimizer.mean.wte.weight"] == pytest.approx(mean, abs=1e-6)
        assert not same_plan or same(saved[-1], minimiggy.read_safetensors(
            tmp_path / "a" / "ckpt_6.safetensors")[0])
    model = small(module)  # and in part I's own loop
    optimizer = module.AdamW(model, plan)
    mean = 0
    for _ in module.training(model, plan, CIRCLE, optimizer):
        mean = 0.5 * mean + 0.5 * model.wte.weight.numpy()
    assert optimizer.mean["wte.weight"].numpy() == pytest.approx(mean, abs=1e-6)
    with pytest.raises(UserError, match="has no optimizer.mean"):
        other = GPT(GPTConfig(**vars(model.config)))
        other.load_checkpoint(tmp_path / "b" / "ckpt_6.safetensors", AdamW(other, plan))

SOFT_CAP = [("        scores = visible.where(",
             "        scores = 3 * (scores / 3).tanh()\n        scores = visible.where(")]
NO_SCALE = [(" / math.sqrt(D)               # (B, H, T, S)", "  # (B, H, T, S)")]

@pytest.mark.parametrize("edit", [SOFT_CAP, NO_SCALE], ids=["soft cap", "no sqrt(D)"])
def test_another_attention_is_written_with_from_a_cache_as_well(edit, tmp_path, capsys):
    module, _ = edited(edit, tmp_path)
    model = shake(small(module))
    writer = module.Writer(model)
    writes_alike(module, model, writer=writer)
    texts = [list(text) for text in module.Writer(model, 2).streams([[1, 2], [3]], 9, temperature=0)]
    assert texts == [list(module.write(model, ids, 9, temperature=0)) for ids in ([1, 2], [3])]
    assert writer.remembers and capsys.readouterr().err == ""

TOKEN_SHIFT = ("        heard = ", "        x = x + x.pad((None, (LAG, 0), None))[:, :-LAG]\n"
               "        heard = ")
END_OF_HIDDEN = "        return self.ln_f(x)\n"
NO_CACHE = [  # edits of which a cache of keys and values cannot know, or that know nothing of it
    [("            visible = Tensor.ones(T, T, dtype=dtypes.bool).tril()",
      "            visible = Tensor.ones(T, T, dtype=dtypes.bool).tril().triu(-1)")],
    [("        scores = visible.where(scores, -math.inf)",
      "        scores = scores + Tensor.arange(T).reshape(1, T) - Tensor.arange(T).reshape(T, 1)\n"
      "        scores = visible.where(scores, -math.inf)")],
    [("y = self.ops.attention(qkv, position, cache)", "y = self.ops.attention(qkv, position)"),
     ("rng, C, C, std=0.02 / math.sqrt(2 * config.n_layer))", "rng, C, C, std=0)")],  # (nothing, at first)
    [(TOKEN_SHIFT[0], TOKEN_SHIFT[1].replace("LAG", "4"))],
    [("        for i, block in enumerate(self.h):\n",
      "        x = self.wpe.weight[:2].expand(idx.shape[0], 2, x.shape[-1]).cat(x, dim=1)\n"
      "        for i, block in enumerate(self.h):\n"),
     (END_OF_HIDDEN, END_OF_HIDDEN.replace("x", "x[:, 2:]"))],
    [("self.ops.attention(qkv, position, cache)", "self.ops.attention(qkv, 10**6 * position, cache)")],
    [("y = self.ops.attention(qkv, position, cache)", "y = self.ops.attention(qkv, position, cache)\n        "
      "y = y + self.ops.attention(qkv.reshape(B, T, 3, 4, -1), position, cache).reshape(*y.shape)")]]

@pytest.mark.parametrize("changes", NO_CACHE, ids=[
    "window", "alibi", "attention of its own", "token shift", "registers", "places", "other heads as well"])
def test_where_a_cache_would_write_something_else_none_is_used_and_that_is_said(changes, tmp_path, capsys):
    module, _ = edited(changes, tmp_path)
    model = small(module)
    writer = module.Writer(model)  # before it has learned anything
    shake(model, 0.5)
    writes_alike(module, model, writer=writer)
    assert "more slowly" in capsys.readouterr().err

def test_a_changed_write_is_what_everything_writes_with(tmp_path, capsys):
    line = "        seen.append(draw(logits, rng, **how))\n"
    module, _ = edited([(line, "        logits[seen[-2:]] -= 9  # nothing twice\n" + line)], tmp_path)
    model = shake(small(module), 0.5)
    written = [1, 2, 3, *writes_alike(module, model, [1, 2, 3])]
    assert all(token not in written[max(0, i - 2):i] for i, token in enumerate(written))
    assert module.generate(model, Tensor([[1, 2, 3]], dtype="int32"), 16, temperature=0).tolist() == [written]
    assert "`write` has been changed" in capsys.readouterr().err

def test_a_look_back_over_more_than_64_tokens_is_noticed(tmp_path):
    module, _ = edited([(TOKEN_SHIFT[0], TOKEN_SHIFT[1].replace("LAG", "70"))], tmp_path)
    model = shake(module.GPT(module.GPTConfig(96, 7, n_layer=1, n_head=2, n_embd=4)), 0.5)
    prompt = some_ids(7, 60).tolist()
    assert list(module.Writer(model).stream(prompt, 36)) == list(module.write(model, prompt, 36))

@pytest.mark.parametrize(("line", "use"), [
    ("self.extra = first_weights(ops, rng, 3, config.n_embd).transpose(0, 1)", "self.extra.sum(1)"),
    ("self.extra = Tensor(np.ones(1, np.float32)).expand(config.n_embd)", "self.extra"),
    ("self.extra = 0.1 * Tensor.randn(config.n_embd)", "self.extra")],
    ids=["transposed", "expanded", "random"])
def test_a_parameter_may_be_made_in_any_way(line, use, tmp_path):
    module, _ = edited([(END_OF_GPT, f"{END_OF_GPT}        {line}\n"),
                        ("self.ops.unembed(x, self", f"self.ops.unembed(x + {use}, self")], tmp_path)
    comes_back(module, learns(module, small(module)), tmp_path)

def test_whole_numbers_in_a_model_are_saved_and_examined_with_it(tmp_path, capsys):
    order = "Tensor(np.random.permutation(config.block_size), dtype=dtypes.int32)"
    module, _ = edited([(END_OF_GPT, f"{END_OF_GPT}        self.order = {order}\n"),
                        ("+ self.wpe(position))", "+ self.wpe(self.order[position]))")], tmp_path)
    model = small(module)
    order = model.order.numpy()
    comes_back(module, shake(model, 0.3), tmp_path)
    list(module.training(model, module.TrainConfig(batch_size=2, max_iters=2), CIRCLE))
    assert (model.order.numpy() == order).all() and module.main(["--gradcheck"]) == 0
    arrays, metadata = module.read_safetensors(tmp_path / "ckpt_1.safetensors")
    arrays["order"] = arrays["order"].astype(np.float32)
    module.write_safetensors(tmp_path / "other.safetensors", arrays, metadata)
    with pytest.raises(module.UserError, match="order is float32"):
        module.open_checkpoint(tmp_path / "other.safetensors")

@pytest.mark.parametrize("table", ["first_weights(ops, rng, 5, config.n_embd)", "self.wpe.weight",
                                   "Tensor.randn(5, config.n_embd)"], ids=["noise", "frozen", "lazy"])
def test_numbers_that_are_not_learned_stay_and_are_saved(table, tmp_path):
    module, _ = edited([(END_OF_GPT, f"{END_OF_GPT}        self.table = {table}.is_param_(False)\n"),
                        ("+ self.wpe(position))", "+ self.wpe(position) + self.table[position])")], tmp_path)
    model = small(module)
    table = model.table.numpy()
    comes_back(module, model, tmp_path)
    list(module.training(model, module.TrainConfig(batch_size=2, max_iters=3), CIRCLE))
    assert (model.table.numpy() == table).all()
    assert (logits(model, PASSAGE[0]) == logits(model, PASSAGE[0])).all()

def test_a_gradient_that_has_to_be_zero_is_no_false_alarm(tmp_path, capsys):
    # (A mean over the batch takes away what all passages have in common, such as their positions' rows.)
    module, _ = edited([("centred = x - x.mean(-1, keepdim=True)",
                         "centred = x - x.mean(0, keepdim=True)")], tmp_path)
    assert module.main(["--gradcheck"]) == 0, capsys.readouterr().out

def test_a_patch_in_a_running_program_counts_as_well(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(minimiggy.Plain, "gelu", lambda self, x: x.relu())
        fast, plain = (logits(shake(small(minimiggy, ops)), PASSAGE[0]) for ops in (FAST, PLAIN))
        assert np.abs(fast - plain).max() < 1e-5
    block = minimiggy.Block.__call__
    monkeypatch.setattr(minimiggy.Block, "__call__", lambda self, x, *rest: block(
        self, x + x.pad((None, (1, 0), None))[:, :-1], *rest))
    writes_alike(minimiggy, shake(small(minimiggy)))
    assert "more slowly" in capsys.readouterr().err

def test_operations_take_arguments_by_name():
    x = Tensor.ones(1, 2, 3)
    both = [ops.linear(x=x, weight=Tensor.ones(3, 4), bias=None).numpy() for ops in (FAST, PLAIN)]
    assert (both[0] == both[1]).all()

@pytest.mark.parametrize("line", ["Plain.gelu = lambda self, x: x.relu()\n",
                                  'setattr(Plain, "gelu", lambda self, x: x.relu())\n'])
def test_an_operation_that_part_one_puts_into_its_class_counts_as_well(line, tmp_path):
    module, _ = edited([("PLAIN = Plain()\n", line + "PLAIN = Plain()\n")], tmp_path)
    fast, plain = (logits(shake(small(module, ops)), PASSAGE[0]) for ops in module.BACKENDS[::-1])
    assert np.abs(fast - plain).max() < 1e-5

def test_a_layer_put_in_from_outside_is_followed():
    class Twice(minimiggy.LayerNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)
    model = small(minimiggy)
    model.ln_f = Twice(model.ops, 4)
    model.head = lambda x: GPT.head(model, x).tanh()
    writes_alike(minimiggy, learns(minimiggy, model))

def test_an_assignment_that_waits_is_made_once():
    model = shake(small(minimiggy))
    optimizer = AdamW(model, TrainConfig(batch_size=2, learning_rate=0.0, min_lr=0.0))
    weight = model.h[0].mlp.c_fc.weight
    for use in (lambda i: optimizer(CIRCLE, i), lambda i: list(write(model, [1], 3))):
        half = weight.numpy() / 2
        weight.assign(weight / 2)
        for i in range(3):
            use(i)
        assert np.abs(weight.numpy() - half).max() < 1e-6

def test_an_optimizer_of_another_model_or_plan_is_refused_or_follows(ids):
    model = GPT(TINY)
    optimizer = AdamW(model, QUICK)
    with pytest.raises((ValueError, UserError)):
        list(minimiggy.training(GPT(TINY), QUICK, ids, optimizer))
    still = dataclasses.replace(QUICK, max_iters=2, learning_rate=0.0, min_lr=0.0)
    before = weights(model)
    try:
        list(minimiggy.training(model, still, ids, optimizer))
    except (ValueError, UserError):
        return
    assert same(weights(model), before)

EXERCISES = [
    [],  # without a change
    RELU2,
    [("drop(self.wte(idx) + self.wpe(position))", "drop(self.wte(idx))")],
    [("k.transpose(-2, -1) / math.sqrt(D)", "k.transpose(-2, -1)")],
    [("self.attn(self.ln_1(x), ", "self.attn(x, "), ("self.mlp(self.ln_2(x))", "self.mlp(x)")],
    UNTIED,
    [("m_hat / (v_hat.sqrt() + 1e-8)", "m_hat")]]

@pytest.mark.skipif("EXERCISES" not in os.environ, reason="takes minutes: EXERCISES=1 pytest -k exercise")
@pytest.mark.parametrize("number", range(len(EXERCISES)))
def test_an_exercise_ends_where_part_one_says(number, tmp_path, capsys):
    if not (HERE / "data" / "tinyshakespeare.txt").exists():
        pytest.skip("needs tiny Shakespeare, which --train fetches")
    prose = PART_ONE[PART_ONE.index("Chapter 11"):].replace("\n#", "")
    told = re.search(rf" {number}\. .*?\((\d\.\d\d)" if number else r"ends at (\d\.\d\d)", prose)[1]
    module, _ = edited(EXERCISES[number], tmp_path)
    command = ["--train", "--max-iters", "500", "--no-checkpoint", "--out-dir", str(tmp_path)]
    assert module.main([*command, "--data", str(HERE / "data" / "tinyshakespeare.txt")]) == 0
    ends = re.findall(r"= (\d\.\d+) bits/byte", capsys.readouterr().out)[-1]
    assert float(ends) == pytest.approx(float(told), abs=0.03)

def test_an_edit_of_the_call_alone_reaches_the_loss_and_the_writer(tmp_path, capsys):
    module, _ = edited([("return self.head(self.hidden(idx, key))",
                         "return 3.0 * (self.head(self.hidden(idx, key)) / 3.0).tanh()")], tmp_path)
    model = shake(small(module))
    assert np.abs(logits(model, PASSAGE[0])).max() < 3
    x, y = (Tensor(ids, dtype="int32") for ids in PASSAGE)
    want = PLAIN.cross_entropy(Tensor(logits(model, PASSAGE[0])), y).mean().item()
    assert model.loss(x, y).item() == pytest.approx(want, abs=1e-5)
    writes_alike(module, model)

def test_a_checkpoint_of_an_edited_part_one_says_so_where_it_is_opened(tmp_path, capsys):
    module, _ = edited(RELU2, tmp_path)
    small(module).save_checkpoint(1, None, tmp_path)
    module.open_checkpoint(tmp_path / "ckpt_1.safetensors")
    assert capsys.readouterr().err == ""
    minimiggy.open_checkpoint(tmp_path / "ckpt_1.safetensors")
    assert "other layers or operations" in capsys.readouterr().err

def test_a_parameter_outside_of_the_model_or_without_a_use_is_named(tmp_path, capsys):
    ones = "Tensor.ones(1)\n"
    module, _ = edited([("class Block:\n", f"EACH = {ones}class Block:\n    gate = {ones}"),
                        ("(x + drop(heard)", "(x.contiguous() + EACH * self.gate * drop(heard)"),
                        (END_OF_GPT, END_OF_GPT + "        self.forgotten = Tensor.ones(2)\n")], tmp_path)
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    files = ["--data", str(tmp_path / "my.txt"), "--out-dir", str(tmp_path)]
    assert module.main(["--train", *SMALL, *files]) == 0
    said = capsys.readouterr().out
    assert "neither trained nor saved: EACH, Block.gate;" in said
    assert "without a part in the loss, and so not trained: forgotten\n" in said
    assert "not the slopes of its loss" not in said and module.PEEKS not in said

LOST_MASK = ("visible = Tensor.ones(T, T, dtype=dtypes.bool).tril()",
             "visible = Tensor.ones(T, T, dtype=dtypes.bool)")

def test_a_gradient_that_is_cut_off_and_a_lost_mask_are_said_before_the_first_step(tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    train = ["--train", *SMALL, "--data", str(tmp_path / "my.txt"), "--no-checkpoint",
             "--out-dir", str(tmp_path / "out")]
    line = "        heard = self.attn(self.ln_1(x), position, cache)\n"
    module, _ = edited([(line, f"{line}        x = x - self.ln_2(x).detach()\n"), LOST_MASK], tmp_path)
    assert module.main(train) == 0
    said = capsys.readouterr().out
    assert "not the slopes of its loss" in said and module.PEEKS in said
    assert module.main(["--gradcheck"]) == 1 and module.PEEKS in capsys.readouterr().out
    module, _ = edited([(line, f"{line}        print(x.numpy())\n")], tmp_path)
    assert module.main(train) == 2
    assert "wants to see numbers" in capsys.readouterr().err

@pytest.mark.parametrize(("add", "sees"), [
    ("x.roll(-1, 1)", True), ("x.mean(1, keepdim=True)", True), ("x.std(0, keepdim=True)", True),
    ("x.pad((None, (1, 0), None))[:, :-1]", False), ("x.cumsum(1)", False), ("Tensor.rand(*x.shape)", False)],
    ids=["the next", "a mean", "all passages", "the one before", "a sum of those before", "noise"])
def test_a_token_that_sees_what_it_is_to_predict_is_noticed(add, sees, tmp_path):
    module, _ = edited([(END_OF_HIDDEN, END_OF_HIDDEN.replace("x", f"x + {add}"))], tmp_path)
    assert module.peeks(1) == sees
    if add in ("x.roll(-1, 1)", "Tensor.rand(*x.shape)"):
        assert module.peeks(2, module.PLAIN) == sees

def letters(kept):
    """An edit: tokens are characters, which the class is given, and which a line keeps in an attribute."""
    start = PART_ONE.index('    def __init__(self, name: str = "gpt2"')
    end = PART_ONE.index("    @classmethod\n    def train(cls, text: str")
    return [(PART_ONE[start:end], f"""    def __init__(self, letters):
        self.name = "letters"
        self.all = sorted(letters)
        {kept}
        self.vocab_size = len(letters)

"""), ('cls("bpe", learn_merges(Counter(regex.findall(SPLIT, text)), vocab_size))', "cls(set(text))"),
        ('self.encoding.encode_ordinary(text.encode("utf-8", "replace").decode())',
         "[self.all.index(letter) for letter in text]"),
        ('self.encoding.decode_single_token_bytes(token) if token < self.vocab_size else b""',
         "self.all[token].encode()")]

def test_a_tokenizer_of_ones_own_sees_the_whole_text(tokenizer, monkeypatch):
    encode = BPETokenizer.encode
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, text: [0, *encode(self, text)])
    monkeypatch.setattr(minimiggy, "TOKENIZER_IS_OURS", False)
    assert tokenizer.encode_array(TEXT[:9000].encode()).tolist() == tokenizer.encode(TEXT[:9000])

def test_a_tokenizer_of_ones_own_is_kept_or_refused_at_once(tmp_path, capsys):
    module, _ = edited(letters("self.letters = self.all"), tmp_path)
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    train = ["--train", *SMALL, "--data", str(tmp_path / "my.txt"), "--out-dir"]
    out = ["--out-dir", str(tmp_path / "out")]
    assert module.main([*train, out[1]]) == 0
    assert module.main(["--resume", *out, "--max-iters", "6"]) == 0
    capsys.readouterr()
    assert module.main(["--sample", "ROMEO:", *out, "--max-tokens", "9", "--temperature", "0"]) == 0
    assert re.fullmatch(r"ROMEO:.{9}\n", capsys.readouterr().out, re.DOTALL)
    assert module.main(["--export", str(tmp_path / "hub"), *out]) == 0
    assert "without its tokenizer" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors"}
    assert main(["--sample", "A", *out]) == 2  # part I as it is
    assert "tokenizer is not one of ours" in capsys.readouterr().err
    for kept, why in (("", "needs attributes of these names"), ("self.letters = 'ab'", "has other tokens")):
        module, _ = edited(letters(kept), tmp_path)
        assert module.main([*train, str(tmp_path / "refused")]) == 2
        assert not (tmp_path / "refused").exists() and why in capsys.readouterr().err

def test_a_text_that_is_cut_in_another_way_now_is_noticed(run, tmp_path, capsys):
    module, _ = edited([(r"| ?\p{N}+|", r"| ?\p{N}|")], tmp_path)
    model = module.open_checkpoint(run[2] / "ckpt_6.safetensors").model
    assert "other rules for tokens" in capsys.readouterr().err
    module.export(model, tmp_path / "hub")
    assert not (tmp_path / "hub" / "tokenizer.json").exists()

def test_more_texts_than_the_context_has_tokens_are_written_side_by_side():
    model = shake(GPT(SMALLEST), 0.5)
    prompts = [[i, 2 * i] for i in range(7)]
    written = model.generate(Tensor(prompts, dtype="int32"), 6, temperature=0).tolist()
    assert written == [ids + list(write(model, ids, 6, temperature=0)) for ids in prompts]

def test_an_operation_that_is_put_in_twice_counts_both_times(tmp_path):
    module, _ = edited(RELU2, tmp_path)
    model = small(module)
    for function in (lambda self, x: x.relu(), lambda self, x: x.sin()):
        module.Plain.gelu = function
        got, want = (logits(shake(small(module, ops)), PASSAGE[0]) for ops in (model.ops, module.PLAIN))
        assert np.abs(got - want).max() < 1e-5

def test_tensors_that_are_exchanged_are_noticed():
    model = small(minimiggy)
    optimizer = AdamW(model, TrainConfig(batch_size=2))
    optimizer(CIRCLE, 0)
    writer = Writer(model)
    writes_alike(minimiggy, model, writer=writer)
    model.wte.weight = Tensor(np.random.default_rng(3).standard_normal((7, 4), np.float32))
    with pytest.raises(ValueError, match="make a new AdamW"):
        optimizer(CIRCLE, 1)
    writes_alike(minimiggy, model, writer=writer)

@pytest.mark.parametrize("ops", [FAST, PLAIN], ids=["fast", "plain"])
def test_what_no_row_stands_for_is_no_number_and_is_not_written_from(ops):
    model = small(minimiggy, ops)
    for ids in ([0, 7], [-1, 0], [0, 1, 2, 3, 4, 5]):  # ids from 0 to 6, and five places
        with suppress(ValueError):
            assert np.isnan(logits(model, [ids])).any()
    for prompt in ([], [7], [-1]):
        with pytest.raises(ValueError):
            list(Writer(model).stream(prompt, 1))
    with pytest.raises(ValueError, match="not numbers"):
        list(write(model, [7], 1))

def test_tinygrads_own_noise_is_new_at_every_call_of_a_recording(monkeypatch):
    monkeypatch.setattr(Tensor, "_device_seeds", {})
    monkeypatch.setattr(Tensor, "_device_rng_counters", {})
    noise = FAST.record(lambda x: ((x + Tensor.rand(8)).realize(),))
    draws = [noise(np.zeros(8, np.float32))[0] for _ in range(4)]
    assert all(np.abs(draws[i] - draws[j]).max() > 0.01 for i in range(4) for j in range(i))

# ----------------------------------------------------------------------------------------------- as a library

def test_two_models_trained_and_sampled_in_turn_give_what_each_gives_alone(ids):
    losses, _, numbers, _ = trained(TINY, QUICK, ids)
    one = AdamW(GPT(TINY), QUICK)
    other = AdamW(GPT(TINY, seed=7), QUICK)
    writers = [Writer(one.model), Writer(other.model)]
    together = []
    for i in range(4):
        together.append(one(ids, i)[0])
        other(ids, i)
        for writer in writers:
            list(writer.stream([1, 2], 3))
    assert together == losses.tolist() and same(weights(one.model), numbers)
    assert list(writers[0].stream([1, 2], 20)) == list(write(one.model, [1, 2], 20))
    assert list(writers[1].stream([1, 2], 20)) == list(write(other.model, [1, 2], 20))

@pytest.mark.parametrize("ops", [FAST, ELSEWHERE], ids=["fast", "elsewhere"])
def test_a_method_is_recorded_anew_when_its_model_has_changed(ops, capsys):
    class Scaled:
        def __init__(self):
            self.model = SimpleNamespace(parts=[SimpleNamespace(factor=2.0)], turns=0)
            self.config = TrainConfig()
            self.turns = 0

        def answer(self, x):
            self.model.turns += 1  # (that it does this itself is no change)
            return ((x * self.model.parts[0].factor + self.config.beta1).realize(),)
    scaled = Scaled()
    recorded = ops.record(scaled.answer)

    def answer():
        scaled.turns += 1  # (nor is this)
        return recorded(np.ones(1, np.float32))[0].item(), capsys.readouterr().err.count("recorded anew")
    scaled.config.beta1 = 0.0
    assert [answer() for _ in range(4)] == [(2, 0)] * 4
    scaled.model.parts[0].factor = 3.0
    assert [answer() for _ in range(4)] == [(3, 1), (3, 0), (3, 0), (3, 0)]
    scaled.config.beta1 = 1.0
    scaled.config.learning_rate = 1.0
    assert [answer(), answer()] == [(4, 1), (4, 0)]
    scaled.config.learning_rate = 2.0  # (which is asked for at each step)
    scaled.model.parts[0] = SimpleNamespace(factor=3.0)
    assert [answer(), answer()] == [(4, 1), (4, 0)]
    scaled.model.parts = OrderedDict({0: scaled.model.parts[0]})
    assert [answer(), answer()] == [(4, 1), (4, 0)]
    scaled.config.learning_rate = 3.0
    Scaled.answer = lambda self, x: (x.realize(),)
    assert answer() == (1, 1)
    said = []
    for number in range(20):  # (all in all, ten times are said, and then no more)
        scaled.model.parts[0].factor = number
        said.append(answer()[1])
    assert said == [1] * 5 + [0] * 15

def test_what_is_changed_while_recordings_are_in_use_is_heard(ids, monkeypatch, capsys):
    model = shake(GPT(TINY))
    plan = dataclasses.replace(QUICK, warmup_steps=0)
    optimizer = AdamW(model, plan)
    exam = minimiggy.Evaluator(model, 2)
    writer = Writer(model)

    def all_hear(i, times):
        x, y = minimiggy.get_batch(ids, plan, TINY.block_size, i)
        loss = model.loss(Tensor(x[0]), Tensor(y[0])).item()
        assert optimizer(ids, i)[0] == pytest.approx(loss, rel=1e-5)
        assert exam.whole(ids[:60]) == minimiggy.Evaluator(model, 2).whole(ids[:60])
        assert list(writer.stream([1, 2], 12, temperature=2)) == list(write(model, [1, 2], 12, temperature=2))
        assert capsys.readouterr().err.count("recorded anew") == times
    all_hear(0, 0)
    monkeypatch.setattr(minimiggy.MLP, "__call__", lambda self, x: self.c_proj(self.c_fc(x).relu()))
    all_hear(1, 2)  # the step and the exam
    other = shake(GPT(model.config), seed=8)
    load_state_dict(model, get_state_dict(other), strict=False, verbose=False)  # gives tensors other memory
    all_hear(2, 2)
    best = copy.deepcopy(model)
    kept = weights(best)
    optimizer(ids, 3)
    assert same(weights(best), kept) and not same(weights(model), kept)
    assert best.ops is model.ops and best.loss(Tensor([[1, 2]]), Tensor([[2, 3]])).item() > 0
    plan.weight_decay = 10.0
    plan.learning_rate = 0.05
    before = weights(model)["h.0.mlp.c_fc.weight"]
    optimizer(ids, 0)
    after = weights(model)["h.0.mlp.c_fc.weight"]
    assert 0.4 < np.abs(after).mean() / np.abs(before).mean() < 0.7
    plan.grad_accum = 2
    with pytest.raises(ValueError, match="grad_accum has changed"):
        optimizer(ids, 1)

def test_what_is_replaced_within_part_one_has_been_changed(tmp_path):
    """As part I itself puts `loss` into GPT; the text of each layer and operation stays as it was."""
    line = "GPT.loss = loss"
    shifted = """
import functools
def blind(self, x, position, drop, cache=None):
    return x + self.mlp(self.ln_2(x.roll(1, 1)))
Block.__call__ = functools.wraps(Block.__call__)(blind)
"""
    module, _ = edited([(f"\n{line}", shifted + line)], tmp_path)
    model = shake(small(module))
    assert not module.is_as_in_part_one(model)
    with pytest.raises(module.UserError, match="no GPT-2"):
        module.export(model, tmp_path / "out")
    relu = "\nimport functools\nPlain.gelu = functools.wraps(Plain.gelu)(lambda self, x: x.relu())\n"
    module, _ = edited([(f"\n{line}", relu + line)], tmp_path)
    assert module.CHANGED == ["gelu"]
    assert module.BACKENDS[-1].gelu(Tensor([-1.0, 2.0])).tolist() == [0, 2]

def test_a_window_by_the_place_in_the_cache_is_noticed_with_texts_side_by_side(tmp_path, capsys):
    """Key number i is at place i of its text only in the first row of a cache."""
    module, _ = edited([
        ("            visible = Tensor.ones(T, T, dtype=dtypes.bool).tril()\n",
         "            visible = Tensor.ones(T, T, dtype=dtypes.bool).tril().triu(-1)\n"),
        ("position)              # now S",
         "position)\n            window = position.reshape(-1, 1) - Tensor.arange(k.shape[2]) < 2\n"
         "            visible = visible & window  # now S")],
        tmp_path)
    model = shake(small(module, n_layer=2))
    prompts = [[1, 2, 3], [4, 5, 6]]
    got = [list(text) for text in module.Writer(model, 2).streams(prompts, 2, temperature=0)]
    want = [list(module.write(model, prompt, 2, temperature=0)) for prompt in prompts]
    assert got == want and "without one" in capsys.readouterr().err

def test_a_view_or_bfloat16_can_be_the_result_of_a_recording_and_shapes_stay(ids):
    def views(x):
        return x[:, :2], (x * 2).cast(dtypes.bfloat16)
    record = FAST.record(views)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for i in range(3):
        first, second = record(x + i)
        assert same({"a": first, "b": second}, {"a": x[:, :2] + i, "b": 2 * (x + i)})
    with pytest.raises(ValueError, match="recorded for"):
        record(x[:1])

def test_weights_of_another_kind_are_refused_and_a_mistake_in_an_edit_is_the_readers(tmp_path, capsys):
    weight = "    return ops.place(np.float32(std) * rng.standard_normal(shape, np.float32))"
    module, _ = edited([(weight, f"{weight}.cast(dtypes.bfloat16)")], tmp_path)
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    files = ["--data", str(tmp_path / "my.txt"), "--out-dir", str(tmp_path / "run")]
    assert module.main(["--train", *SMALL, *files]) == 2
    assert "wte.weight is dtypes.bfloat16, but what is learned has to be float32" in capsys.readouterr().err
    module, _ = edited([(weight, f"{weight} + [][0]")], tmp_path)
    assert module.main(["--train", *SMALL, *files]) == 70
    assert "IndexError" in (said := capsys.readouterr().err) and "is it in what you have changed?" in said

def test_what_a_checkpoint_does_not_keep_of_a_model_is_said(tmp_path, capsys):
    model = GPT(DEEP)
    model.save_checkpoint(1, None, tmp_path)
    assert capsys.readouterr().err == ""
    model.h[1].attn.n_head = 1
    model.save_checkpoint(2, None, tmp_path)
    said = capsys.readouterr().err
    assert "not that h.1.attn.n_head is now 1 (at first 2)" in said and said.count("\n") == 1
    model.note, model.temperature = "mine", 0.5
    model.save_checkpoint(3, None, tmp_path)
    assert "temperature is now 0.5" in capsys.readouterr().err

    class Mine(GPT):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.sizes = [1]
    mine = Mine(TINY)
    mine.sizes.append(2)
    assert mine.save_checkpoint(4, None, tmp_path).exists()

def test_what_training_does_after_its_last_step_is_saved(tmp_path):
    line = "        yield i + 1, *optimizer(data, i)\n"
    at_the_end = "    model.wpe.weight.assign(model.wpe.weight * 0).realize()\n"
    module, _ = edited([(line, line + at_the_end)], tmp_path)
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    files = ["--data", str(tmp_path / "my.txt"), "--out-dir", str(tmp_path / "run")]
    assert module.main(["--train", *SMALL, *files]) == 0
    for step, is_zero in ((2, False), (4, True)):
        saved = module.open_checkpoint(tmp_path / "run" / f"ckpt_{step}.safetensors")[0]
        assert (not saved.wpe.weight.numpy().any()) == is_zero

def test_a_model_that_gives_more_than_logits_is_refused_before_the_first_step(tmp_path, capsys):
    module, _ = edited([("        return self.head(self.hidden(idx, key))\n",
                         "        x = self.hidden(idx, key)\n        return self.head(x), x\n"),
                        ("(model(idx, key), targets)", "(model(idx, key)[0], targets)")], tmp_path)
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    files = ["--data", str(tmp_path / "my.txt"), "--out-dir", str(tmp_path / "run")]
    assert module.main(["--train", *SMALL, *files]) == 2
    assert "has to give the logits and nothing else" in capsys.readouterr().err

@pytest.mark.parametrize("writers", [1, 2])
def test_two_streams_interleaved_give_what_each_gives_alone(writers):
    model = shake(GPT(TINY))
    made = [Writer(model) for _ in range(writers)]
    streams = [made[0].stream([1, 2, 3], 30, seed=1), made[-1].stream([4, 5], 30, seed=2)]
    first, second = zip(*zip(*streams, strict=True), strict=True)
    assert list(first) == list(write(model, [1, 2, 3], 30, seed=1))
    assert list(second) == list(write(model, [4, 5], 30, seed=2))

def test_a_writer_follows_its_model(ids):
    model = GPT(TINY)
    writer = Writer(model)
    list(writer.stream([1], 9))
    shake(model, 0.3)
    assert list(writer.stream([1], 20)) == list(write(model, [1], 20))
    assert list(writer.stream([3, 1], 20)) == list(write(model, [3, 1], 20))

def test_training_again_in_one_process_gives_the_same(run, ids):
    for _ in range(2):
        model = GPT(TINY)
        train(model, QUICK, ids)
        assert same(weights(model), weights(run[0]))

def test_without_a_word_from_the_system_the_compiler_knows_the_processor(monkeypatch):
    minimiggy.find_compiler()
    told = minimiggy.describe_processor()
    monkeypatch.setattr(Path, "read_text", lambda path: throw(OSError("no /proc")))
    asked = minimiggy.describe_processor.__wrapped__()
    assert "#define" in asked
    for feature in ("avx2", "avx512f"):
        assert (feature in asked) == (minimiggy.X86 and feature in told)

@pytest.mark.parametrize(("files", "cores"), [
    ({}, 8), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "250000 100000"}, 2),
    ({"cpu.max": "5000 100000"}, 1),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3)])
def test_a_containers_quota_limits_the_cores(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert minimiggy.count_cores(tmp_path) == cores

@pytest.mark.parametrize(("answer", "cores"), [("echo 4", 4), ("exit 1", 8), ("rm $0", 8)])
def test_of_a_mac_only_the_fast_cores_count(answer, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(f'#!/bin/sh\n[ "$*" = "-n hw.perflevel0.physicalcpu" ] && {answer}\n')
    sysctl.chmod(0o755)
    assert minimiggy.count_cores(tmp_path) == cores

def test_an_exam_needs_less_memory_than_training_and_is_not_refused(monkeypatch):
    monkeypatch.setattr(minimiggy, "memory_available", lambda: 4e9)
    gpt2 = GPTConfig(1024, 50257, 12, 12, 768)
    minimiggy.check_memory(gpt2, TrainConfig(batch_size=12), FAST, learns=False)
    with pytest.raises(UserError, match=r"about 1\d\.\d GB .* smaller --batch-size than 12"):
        minimiggy.check_memory(gpt2, TrainConfig(batch_size=12), FAST)

@pytest.mark.parametrize("columns", [24, 48, 40, 65])
def test_the_tiles_for_avx2_multiply_as_numpy_does(columns, monkeypatch):
    monkeypatch.setattr(minimiggy, "TILES", [(4, 24), (3, 32)])
    monkeypatch.setattr(minimiggy, "TILE", (3, 32))
    a, b = (np.random.default_rng(columns).standard_normal(shape, np.float32)
            for shape in ((30, 19), (19, columns)))
    got = FAST.run(minimiggy.matmul, [Tensor.empty(30, columns)], [Tensor(a), Tensor(b)])[0].numpy()
    assert got == pytest.approx(a @ b, abs=1e-4)

def test_more_devices_than_cores_are_limited_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(minimiggy, "CORES", 2)
    backend = minimiggy.choose_backend(SimpleNamespace(plain=False, devices=64, weights="f32"))
    assert backend.cores == 2 and "--devices 64: there are 2 cores" in capsys.readouterr().err

def test_each_main_uses_the_cores_that_it_was_given(tmp_path, capsys):
    for name, n in (("a", "1"), ("b", "2"), ("c", "1")):
        flags = ["--train", "--data", "play", *SMALL, "--out-dir", str(tmp_path / name), "--devices", n]
        assert main(flags) == 0 and f"({n} cores)" in capsys.readouterr().out
    models = [weights(minimiggy.open_checkpoint(tmp_path / name / "ckpt_4.safetensors")[0]) for name in "abc"]
    assert same(models[0], models[2])
    for name, array in models[0].items():
        assert np.abs(array - models[1][name]).max() < 1e-4, name

# --------------------------------------------------------------------------------------- part II: the machine

def test_the_programs_are_those_of_the_operations_as_they_stand():
    assert minimiggy.WHY_PLAIN is None and minimiggy.CHANGED == []
    assert minimiggy.LAYERS_AS_WE_KNOW_THEM and type(FAST) is Fast

CLANG = shutil.which("clang")
NOTEBOOK = """import sys, tinygrad
try:
    exec(sys.argv[1])  # what a notebook's first cell may have done
except RuntimeError:   # (without clang, tinygrad finds nothing to compute on)
    pass
from minimiggy import *
model = GPT(GPTConfig(block_size=4, vocab_size=9, n_layer=1, n_head=1, n_embd=4))
print(type(model.ops).__name__, tinygrad.Device.DEFAULT, model(Tensor([[1, 2]])).shape)"""

@pytest.mark.parametrize("first_cell", ["", "tinygrad.Tensor([1.0]).tolist()"])
@pytest.mark.parametrize("path", [os.environ["PATH"], "/usr/bin:/bin"][:2 if CLANG else 1])
def test_it_does_not_matter_which_was_imported_first(first_cell, path):
    hidden = {"OCL_ICD_VENDORS": "/dev/null"}  # (OpenCL, where there is one)
    done = in_a_process(NOTEBOOK, first_cell, PATH=path, DEV=None, CC=None, **hidden)
    assert done.stdout == "Fast CPU (1, 2, 9)\n", done.stderr

def test_a_device_that_a_notebook_has_chosen_stays():
    code = "import os, tinygrad; os.environ['DEV'] = 'PYTHON'; import minimiggy; print(minimiggy.BACKENDS)"
    done = in_a_process(code, DEV=None)
    assert "Elsewhere" in done.stdout, done.stderr

@pytest.mark.parametrize(("system", "machine", "files", "device"), [
    ("linux", "x86_64", ["dev/nvidia0"], "CUDA"), ("linux", "x86_64", ["dev/kfd"], "AMD"),
    ("linux", "x86_64", ["usr/lib/wsl/lib/libcuda.so.1"], "CUDA"), ("linux", "aarch64", [], ""),
    ("linux", "x86_64", ["dev/dri/renderD128", "etc/OpenCL/vendors/intel.icd"], "CL"),
    ("linux", "x86_64", ["dev/dri/renderD128", "etc/OpenCL/vendors/pocl.icd"], ""),
    ("darwin", "arm64", [], "METAL"), ("darwin", "x86_64", [], "")])
def test_a_gpu_that_is_not_used_is_seen(system, machine, files, device, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(minimiggy.platform, "machine", lambda: machine)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert minimiggy.unused_gpu(tmp_path) == device

def test_with_another_tinygrad_part_one_runs_and_that_is_said(tmp_path, capsys):
    text = re.sub('(?m)^TINYGRAD = .*', 'TINYGRAD = "0.0.1"', SOURCE)
    module = imported(text, tmp_path, "elsewhere")
    assert module.WHY_PLAIN.count("\n") == 0 and "pip install tinygrad==0.0.1" in module.WHY_PLAIN
    assert module.BACKENDS == [module.PLAIN]
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    flags = [f"--{field.replace('_', '-')}={value}" for config in (SMALLEST, SHORT)
             for field, value in dataclasses.asdict(config).items() if field != "max_iters"]
    where = ["--data", str(tmp_path / "my.txt"), "--out-dir", str(tmp_path / "out")]
    assert module.main(["--train", *where, *flags, "--max-iters", "4"]) == 0
    assert module.WHY_PLAIN in capsys.readouterr().out
    assert module.main(["--train", *where, "--devices", "2"]) == 2

@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Where compiled programs are kept, and a function that makes of this process a new one."""
    cache = minimiggy.to_program_cache
    compiled = dict(cache)
    load = minimiggy.load_programs.__wrapped__
    monkeypatch.setattr(minimiggy, "programs_file", lambda: tmp_path / "programs")

    def begin_anew():
        cache.clear()
        monkeypatch.setattr(minimiggy, "load_programs", functools.cache(load))
    begin_anew()
    yield tmp_path / "programs", begin_anew
    cache.update(compiled)

def triple(n):
    """Record a small program for n numbers, and run it."""
    assert FAST.record(lambda x: ((3 * x).realize(),))(np.ones(n, np.float32))[0].tolist() == [3] * n

def test_compiled_programs_are_kept_for_the_next_process(programs):
    for n in (1001, 1002):
        triple(n)
    compiled = set(minimiggy.to_program_cache)
    assert len(compiled) >= 2
    programs[1]()
    assert minimiggy.load_programs() == compiled

def test_of_the_kept_programs_only_the_newest_are_loaded(programs, monkeypatch):
    triple(1011)
    old = set(minimiggy.to_program_cache)
    size = programs[0].stat().st_size
    triple(1012)
    both = set(minimiggy.to_program_cache)
    monkeypatch.setattr(minimiggy, "NEWEST", programs[0].stat().st_size - size)
    programs[1]()
    assert both - old <= minimiggy.load_programs() < both
    size = programs[0].stat().st_size
    triple(1011)  # is compiled and kept again
    assert programs[0].stat().st_size > size

@pytest.mark.skipif(not minimiggy.HELPERS, reason="one core compiles alone")
@pytest.mark.parametrize("fate", ["they live", "they are dead", "they cannot be started"])
def test_other_processes_help_to_compile_and_need_not(fate, programs, monkeypatch):
    start = minimiggy.helper.__wrapped__
    cannot = fate == "they cannot be started"
    helper = functools.cache(functools.partial(throw, OSError()) if cannot else start)
    monkeypatch.setattr(minimiggy, "helper", helper)
    minimiggy.forget_orders()
    if fate == "they are dead":
        helper("helper_0").kill()
    size = 4000 + len(fate)

    def some(x):
        return tuple((x[:size + i] * (i + 2)).realize() for i in range(6))
    results = FAST.record(some)(np.ones(size + 9, np.float32))
    assert [float(result[-1]) for result in results] == [2, 3, 4, 5, 6, 7]
    if fate == "they live":
        helper("helper_0").kill()

@pytest.mark.parametrize("damage", ["noise", "zeros", "cut", "a bit", "foreign", "a folder", "no space"])
def test_a_damaged_or_foreign_file_of_programs_is_done_without(damage, programs, monkeypatch):
    path, begin_anew = programs
    triple(2000 + len(damage))
    data = path.read_bytes()
    foreign = pickle.dumps([1, 2, 3])
    signed = hashlib.sha256(foreign).digest() + len(foreign).to_bytes(8, "little") + foreign
    spoiled = {"noise": os.urandom(5000), "zeros": bytes(5000), "cut": data[:len(data) // 2],
               "a bit": data[:50] + bytes([data[50] ^ 1]) + data[51:], "foreign": signed}
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "no space":
        monkeypatch.setattr("builtins.open", functools.partial(throw, OSError("no space left")))
    else:
        path.write_bytes(spoiled[damage])
    begin_anew()
    triple(3000 + len(damage))

def test_a_vocabulary_is_learned_once_from_a_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = TEXT[:3000]
    read = []
    from_json = minimiggy.tokenizer_from_json
    monkeypatch.setattr(minimiggy, "tokenizer_from_json", lambda text: read.append(text) or from_json(text))

    def learned(text, vocab_size):
        """The merges, which must be the right ones, and whether they were kept."""
        before = len(read)
        merges = minimiggy.learned_tokenizer(text, vocab_size).merges
        assert merges == BPETokenizer.train(text, vocab_size).merges
        return len(read) > before
    kept = [learned(text, 270), learned(text, 270), learned(text + "!", 270), learned(text, 271)]
    assert kept == [False, True, False, False]
    for file in (tmp_path / "minimiggy").iterdir():
        file.write_bytes(file.read_bytes().replace(b", ", b",1"))  # damaged
    assert [learned(text, 270), learned(text, 270)] == [False, True]
    monkeypatch.setattr(minimiggy, "learn_merges", lambda words, vocab_size: [(104, 101)])
    assert not learned(text, 270)  # somebody's own
    monkeypatch.setattr(minimiggy, "own_folders", lambda: iter(()))
    assert not learned(text, 280)  # nothing can be kept

@pytest.mark.parametrize("change", [("[:LONGEST]", "[:3]"), ("most < 2", "most < 3"),
                                    ("SPLIT = r", "SPLIT = r")])
def test_what_other_rules_have_learned_is_not_taken(change, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    minimiggy.learned_tokenizer(TEXT[:3000], 270)
    changed, _ = edited([change], tmp_path)
    read = []
    monkeypatch.setattr(changed, "tokenizer_from_json", lambda saved: read.append(saved))
    changed.learned_tokenizer(TEXT[:3000], 270)
    assert bool(read) == (change[0] == change[1])

def test_the_cache_is_in_a_folder_that_is_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert minimiggy.cache_folder() == tmp_path / "home" / "minimiggy"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = minimiggy.cache_folder()
    assert folder == tmp_path / f"minimiggy-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and minimiggy.cache_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / "minimiggy-12345").mkdir()  # it looks like ours, but somebody else has made it
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        minimiggy.cache_folder()

def test_the_launcher_of_ziglang_goes_where_programs_may_be_run(tmp_path, monkeypatch):
    pytest.importorskip("ziglang")
    complaint = minimiggy.complaint_of

    def of_a_strict_system(compiler):
        allowed = compiler.startswith(str(tmp_path / "temporary"))
        return complaint(compiler) if allowed else "Permission denied"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(minimiggy, "complaint_of", of_a_strict_system)
    minimiggy.find_compiler()
    assert complaint(os.environ["CC"]) == "" and "temporary" in os.environ["CC"]

def test_a_clang_that_is_only_a_stub_is_not_believed(tmp_path):
    pytest.importorskip("ziglang")
    (tmp_path / "clang").write_text("#!/bin/sh\necho xcode-select: note: no developer tools >&2; exit 1\n")
    (tmp_path / "clang").chmod(0o755)
    code = "import os, minimiggy; minimiggy.open_device(); print(os.environ['CC'])"
    done = in_a_process(code, PATH=f"{tmp_path}:/usr/bin:/bin", CC=None, DEV="CPU")
    assert done.stdout.endswith("minimiggy-clang\n"), done.stderr

def test_tinygrads_database_may_be_damaged_or_nowhere(tmp_path):
    (tmp_path / "damaged").write_text("no database")
    code = "import minimiggy; minimiggy.open_device(); print(minimiggy.Tensor([1.0, 2.0]).sum().item())"
    for place in (tmp_path / "new", tmp_path / "damaged", "/dev/null/none"):
        done = in_a_process(code, CACHEDB=str(place))
        assert (done.stdout, done.stderr) == ("3.0\n", "")
    with sqlite3.connect(tmp_path / "new") as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        kept = sum(len(database.execute(f"SELECT * FROM '{table}'").fetchall()) for table, in tables)
    assert kept == (4 if minimiggy.AVX2 else 0)

@pytest.mark.parametrize(("variables", "words"), [
    ({"CC": "false"}, "CC=false does not work"), ({"CC": "gcc"}, "CC=gcc does not work"),
    ({"CC": "no/such/clang"}, "No such file"), ({"CC": ""}, "no checkpoint"),
    ({"DEV": "FOO"}, "DEV=FOO"), ({"DEV": "CUDA"}, "DEV=CUDA"), ({"HOME": "/dev/null"}, "no checkpoint")])
def test_a_compiler_or_device_that_does_not_work_is_one_line(variables, words, tmp_path):
    command = [sys.executable, str(FILE), "--sample", "x", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=99)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert words in done.stderr and len(done.stderr) < 350

def test_a_compiler_that_is_killed_in_the_middle_is_one_line(tmp_path):
    compiler = tmp_path / "clang"
    count = f"echo >> {tmp_path}/count; [ $(wc -l < {tmp_path}/count) -gt 8 ] && kill -9 $$"
    compiler.write_text(f'#!/bin/sh\n{count}\nexec {os.environ.get("CC") or "clang"} "$@"\n')
    compiler.chmod(0o755)
    done = in_a_process("import sys; from minimiggy import main; sys.exit(main(sys.argv[1:]))", "--gradcheck",
                        CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"{compiler} failed" in done.stderr

EVERYTHING = """import os, sys; from minimiggy import main
flags = sys.argv[1:]
where = flags[:2]
assert main(["--train", *flags]) == 0 and main(["--resume", *where, "--max-iters", "6"]) == 0
if os.environ["DEV"] != "CPU":  # (where other tests do the same)
    assert main(["--sample", "A", "--max-tokens", "9", "--seed", "3", *where]) == 0
    assert main(["--gradcheck"]) == 0"""

@pytest.mark.parametrize("device", ["CL", "WEBGPU"])
def test_on_another_device_all_works_and_the_losses_are_the_cpus(device, tmp_path):
    if in_a_process("from tinygrad import Tensor; Tensor([1.0]).tolist()", DEV=device).returncode:
        pytest.skip(f"tinygrad finds no device {device}")
    (tmp_path / "my.txt").write_text(TEXT[:5000])
    logs = []
    for name in (device, "CPU"):
        flags = ["--out-dir", tmp_path / name, "--data", tmp_path / "my.txt", *SMALL, "--dropout", "0.1",
                 "--block-size", "4"]
        sooner_compiled = {"NOOPT": "1", "POCL_EXTRA_BUILD_FLAGS": "-cl-opt-disable"}
        done = in_a_process(EVERYTHING, *flags, DEV=name, **sooner_compiled)
        assert done.returncode == 0, done.stderr
        assert ("all gradients are right" in done.stdout) == (name == device)
        assert ("clang, not for" in done.stdout) == (name == device)
        rows = (tmp_path / name / "log.csv").read_text().splitlines()[1:]
        logs.append([row.split(",")[1:6] for row in rows])
    assert np.array(logs[0], float) == pytest.approx(np.array(logs[1], float), rel=1e-5)

# ----------------------------------------------------------------------------------- checkpoints and sampling

def test_a_checkpoint_is_self_contained(run):
    model, _, folder = run
    again, config, step, *_ = minimiggy.open_checkpoint(folder / "ckpt_6.safetensors")
    assert (step, config, again.config) == (6, QUICK, TINY) and same(weights(again), weights(model))
    assert again.tokenizer.merges == model.tokenizer.merges and not list(folder.glob("*.tmp"))

def test_tinygrad_reads_a_checkpoint(run):
    arrays = safe_load(run[2] / "ckpt_6.safetensors")
    assert (arrays["h.0.attn.c_attn.weight"].numpy() == run[0].h[0].attn.c_attn.weight.numpy()).all()
    assert "optimizer.m.wte.weight" in arrays and "optimizer.v.ln_f.bias" in arrays

def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line(run, tmp_path):
    whole = (run[2] / "ckpt_6.safetensors").read_bytes()
    for i, broken in enumerate([b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], b"PK" + whole]):
        path = tmp_path / f"ckpt_{i}.safetensors"
        path.write_bytes(broken)
        with pytest.raises(UserError, match=path.name):
            minimiggy.open_checkpoint(path)
    with pytest.raises(UserError, match="does not fit"):
        GPT(dataclasses.replace(TINY, n_embd=32)).load_checkpoint(run[2] / "ckpt_6.safetensors", None)

def test_past_block_size_the_newer_half_is_read_again():
    model = shake(GPT(DEEP), 0.3)
    p = in_float64(model)
    rng = np.random.default_rng((minimiggy.WRITING, 3, 0))
    window = [1, 2, 3]
    want = []
    for _ in range(20):
        if len(window) > TINY.block_size:
            window = window[-TINY.block_size // 2:]
        want.append(minimiggy.draw(numpy_logits(p, np.array([window]), 2, 2)[0, -1], rng, 1.0))
        window.append(want[-1])
    prompts = Tensor([[1, 2, 3], [4, 5, 6]], dtype="int32")
    got = model.generate(prompts, max_tokens=20, temperature=1.0, seed=3)
    assert got.shape == (2, 23) and got.dtype == dtypes.int32
    assert got.tolist()[0] == [1, 2, 3, *want] and len(set(want)) > 5

@pytest.mark.parametrize("sizes", [(11, 31, 2, 3, 21), (1, 7, 1, 1, 1), (8, 300, 2, 2, 16)])
def test_the_cache_gives_the_whole_models_logits(sizes):
    model = shake(GPT(GPTConfig(*sizes)))
    p = in_float64(model)
    T = model.config.block_size
    ids = some_ids(model.config.vocab_size, T).tolist()
    writer = Writer(model)
    want = logits(model, [ids])[0]
    got = np.array([writer.logits(ids[:i + 1], i) for i in range(T)])
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    half = max(1, T // 2)
    assert writer.remembers
    for prompt in (ids[:1], 3 * ids):
        seen = prompt[-T:]
        for token in writes_alike(minimiggy, model, prompt, 2 * T + 3):
            seen = seen if len(seen) <= T else seen[-half:]
            assert token == numpy_logits(p, np.array([seen]), *sizes[2:4])[0, -1].argmax()
            seen.append(token)

PROMPTS = [[5], [1, 2, 3], [7] * 7, list(range(9)), [4] * 40]

def test_texts_side_by_side_are_those_written_one_after_another():
    model = shake(GPT(dataclasses.replace(DEEP, block_size=19)), 0.3)
    together = list(minimiggy.write_all(Writer(model, 3), PROMPTS, 45, seed=2))
    alone = Writer(model)
    for number, (prompt, text) in enumerate(zip(PROMPTS, together, strict=True)):
        text = list(text)
        assert text == list(alone.stream(prompt, 45, seed=2, text=number))
        if number < 2:
            assert text == list(write(model, prompt, 45, 2, number))

def test_a_text_that_has_ended_costs_the_others_nothing():
    model = shake(GPT(TINY), 0.3)
    first, second, third = Writer(model, 3).streams(PROMPTS[:3], 30)
    assert [next(first), next(first)] == list(Writer(model).stream(PROMPTS[0], 2))
    first.close()
    second = list(second)
    assert second == list(Writer(model).stream(PROMPTS[1], 30, text=1))
    assert list(third) == list(Writer(model).stream(PROMPTS[2], 30, text=2))
    with pytest.raises(ValueError, match="room for 3 texts"):
        Writer(model, 3).streams(PROMPTS, 1)

@pytest.mark.parametrize("n", [1, 4, 31, 70, 100])
def test_a_prompt_is_read_in_few_pieces(n):
    model = shake(GPT(GPTConfig(100, 31, 1, 2, 8)))
    ids = some_ids(31, n).tolist()
    want = numpy_logits(in_float64(model), np.array([ids]), 1, 2)[0, -1]
    writer = Writer(model)
    kinds = []
    read = writer.read
    writer.read = lambda ids, *rest, **how: kinds.append(len(ids)) or read(ids, *rest, **how)
    assert np.abs(writer.logits(ids, 0) - want).max() < 1e-5
    assert sum(kinds) < n + 16 and len(kinds) <= 10
    assert read([1, 2], [0, 1], [0], head=False).shape == (2, 8)  # (the head is for what is drawn from only)

# What comes of weights in fewer bits, in numpy and with exact fractions of two.

def dequantised(array, kind):
    """A matrix as it is read back."""
    if kind == "bf16":
        step = 2.0 ** (np.floor(np.log2(np.abs(array) + 1e-30)) - 7)
        return np.rint(array / step) * step  # (numpy rounds a tie to the even one, too)
    step = np.abs(array).max(1, keepdims=True).astype(np.float32) / np.float32(127)
    return np.rint(array / np.where(step > 0, step, 1)) * step

@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_packed_weights_are_numbers_of_fewer_bits(kind, run):
    model = shake(GPT(DEEP), 0.2)
    load_array(model.wte.weight, np.where(np.arange(300)[:, None] == 7, 0, model.wte.weight.numpy()))
    p = in_float64(model)
    packed = {name: dequantised(array, kind) if array.ndim == 2 else array for name, array in p.items()}
    ops = minimiggy.Packed(2, kind)
    small_model = GPT(DEEP, ops)
    minimiggy.restore(small_model, weights(model), "noise")
    ids = some_ids(300, 4, 8)
    want = numpy_logits(packed, ids, 2, 2)
    error = np.abs(logits(small_model, ids) - want).max()
    assert error < 1e-5 * np.abs(want).max() < np.abs(numpy_logits(p, ids, 2, 2) - want).max()
    one_by_one = [Writer(small_model).logits(ids[0, :n + 1].tolist(), 0) for n in (0, 6)]
    assert np.abs(np.array(one_by_one) - want[0, [0, 6]]).max() < 1e-5 * np.abs(want).max()
    with pytest.raises(UserError, match="cannot learn"):
        AdamW(small_model, QUICK)(np.arange(300), 0)
    with pytest.raises(UserError, match="cannot be saved"):
        small_model.save_checkpoint(1, None, run[2] / "packed")

@pytest.mark.parametrize("ops", [PLAIN, ELSEWHERE])
def test_the_plain_path_has_a_cache_too(ops):
    model = shake(GPT(dataclasses.replace(SMALLEST, dropout=0.0), ops))
    writes_alike(minimiggy, model, [1, 2], 9)
    assert Writer(model).remembers

def test_sampling_follows_the_seed_and_the_number_of_the_text():
    model = shake(GPT(TINY))
    first, again, other = (list(Writer(model).stream([5] * 11, 30, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert list(Writer(model).stream([5] * 11, 30, seed=1, text=1)) != first

def test_top_k_top_p_and_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    rng = np.random.default_rng(0)
    draw = functools.partial(minimiggy.draw, logits, rng)
    draws = Counter(draw(1.0) for _ in range(4000))
    assert draws[0] / 4000 == pytest.approx(0.5, abs=0.03)
    assert draws[3] / 4000 == pytest.approx(0.05, abs=0.02)
    assert {draw(1.0, top_k=2) for _ in range(200)} == {0, 1} and {draw(0) for _ in range(9)} == {0}
    draws = Counter(draw(1.0, top_p=0.81) for _ in range(4000))
    assert set(draws) == {0, 1, 2} and draws[0] / 4000 == pytest.approx(0.5 / 0.95, abs=0.03)
    assert {draw(1.0, top_p=0.79) for _ in range(200)} == {0, 1}
    assert {draw(1.0, top_p=1e-9) for _ in range(9)} == {0}

# ---------------------------------------------------------------------------------- the text and its download

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
    server.handle_error = lambda *_: None  # (who has not waited for "/slow" is no error of a later test's)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()

SHA = hashlib.sha256(b"to be or not to be\n" * 1000).hexdigest()

def test_a_download_arrives_whole_or_not_at_all(server, tmp_path, monkeypatch):
    minimiggy.download(server + "/text", tmp_path / "good.txt", SHA)
    assert (tmp_path / "good.txt").stat().st_size == 19_000
    monkeypatch.setattr(minimiggy, "TIMEOUT", (1, 0.2))
    for bad in ("/login", "/to-login", "/gone", "/cut", "/slow"):
        with pytest.raises(UserError):
            minimiggy.download(server + bad, tmp_path / "bad.txt", SHA)
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        minimiggy.download(server + "/text", tmp_path / "file" / "x", SHA)  # nothing can be written there
    (tmp_path / "file").unlink()
    with pytest.raises(UserError):
        minimiggy.download("http://127.0.0.1:1/", tmp_path / "bad.txt", SHA)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept <= {"good.txt", "bad.txt.part"}  # (what came before a cut)

def test_without_a_network_the_play_stands_in_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "play.txt").write_text(TEXT)
    monkeypatch.setattr(minimiggy, "DATA", tmp_path)
    monkeypatch.setitem(minimiggy.SHAKESPEARE, "url", "http://127.0.0.1:1/")
    assert minimiggy.load_text(None) == (TEXT.encode(), "play")
    assert "could not download" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data play"):
        minimiggy.load_text("shakespeare")

@pytest.mark.parametrize("name", ["\0", "x" * 5000, "/dev/zero", "/", "no\nsuch", "\ud800", "~nobody"])
def test_a_name_that_no_text_can_have_is_one_line(name):
    with pytest.raises(UserError, match="no such file|cannot read") as error:
        minimiggy.load_text(name)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)

def test_the_play_is_long_and_in_its_format():
    assert len(TEXT) >= 100_000 and TEXT.isascii() and "ROMEO:\n" in TEXT and "JULIET:\n" in TEXT
    for speech in TEXT.strip().split("\n\n"):
        assert re.fullmatch(r"[A-Z][A-Za-z ]*:(\n[^\n]+)+", speech), speech

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

# ------------------------------------------------------------------------------------------- the command line

SMALL = ["--n-layer", "1", "--n_embd", "16", "--n-head", "2", "--block-size", "8", "--batch-size", "4",
         "--vocab-size", "300", "--max-iters", "4", "--eval-interval", "2", "--eval-iters", "1"]

def training_play(folder, *flags):
    return ["--train", "--data", "play", "--out-dir", str(folder), *SMALL, *flags]

def test_train_sample_and_resume_from_the_command_line(tmp_path, capsys):
    text = tmp_path / "my.txt"
    text.write_text(TEXT[:5000])
    out = ["--out-dir", str(tmp_path / "out")]
    assert main(["--train", "--data", str(text), *out, *SMALL]) == 0
    output = capsys.readouterr().out
    assert "bits/byte" in output and "\r" not in output and "\x1b" not in output
    assert main(["--sample", "ROMEO: ü", *out, "--max-tokens", "20", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("ROMEO: ü")
    assert main(["--resume", "--max-iters", "6", *out]) == 0  # it remembers its text
    output = capsys.readouterr().out
    assert str(text) in output and "has changed" not in output
    assert (tmp_path / "out" / "ckpt_6.safetensors").exists() and main(["--resume", *out]) == 0
    assert "--max-iters" in capsys.readouterr().out
    text.write_text(TEXT[:5001])
    assert main(["--resume", "--max-iters", "7", *out]) == 0
    assert "has changed" in capsys.readouterr().out

def test_an_effort_sets_what_no_flag_says_and_fits_the_text():
    def planned(n_tokens, *flags):
        args = minimiggy.make_parser().parse_args(["--train", *flags])
        gpt_config, config = minimiggy.chosen(args, GPTConfig), minimiggy.chosen(args, TrainConfig)
        minimiggy.fit_recipe(args, gpt_config, config, n_tokens)
        return gpt_config, config
    for effort, recipe in minimiggy.RECIPES.items():
        gpt_config, config = planned(10**9, "--effort", effort)
        assert recipe.items() <= (dataclasses.asdict(gpt_config) | dataclasses.asdict(config)).items()
        assert config.min_lr == gpt_config.dropout == 0  # (a text that is read once)
        short_gpt_config, short = planned(20_000, "--effort", effort)
        tokens = short.max_iters * short.batch_size * gpt_config.block_size
        assert tokens / 20_000 <= minimiggy.MOST_READINGS + 1 and short_gpt_config.dropout > 0.1
        assert short.eval_interval <= short.max_iters / 5
    given = ["--dropout", "0.5", "--max-iters", "9", "--n-embd", "12", "--min-lr", "1e-5"]
    gpt_config, config = planned(1000, "--effort", "lunch", *given)
    assert [gpt_config.dropout, config.max_iters, gpt_config.n_embd, config.min_lr] == [0.5, 9, 12, 1e-5]
    assert planned(10**9, "--effort", "lunch")[0].n_embd > planned(10**9, "--effort", "quick")[0].n_embd

def test_a_run_says_what_to_expect_and_resume_keeps_the_recipe(tmp_path, capsys):
    assert main(training_play(tmp_path, "--effort", "coffee", "--max-iters", "12")) == 0
    output = capsys.readouterr().out
    assert "quick, as always for a text as short as this: " in output  # (what a larger model knows by heart)
    assert "times through the text" in output and "ms a step" in output
    made = minimiggy.open_checkpoint(tmp_path / "ckpt_12.safetensors")[1]
    assert made.learning_rate == minimiggy.RECIPES["quick"]["learning_rate"]
    assert main(["--resume", "--out-dir", str(tmp_path), "--max-iters", "13"]) == 0
    again = minimiggy.open_checkpoint(tmp_path / "ckpt_13.safetensors")[1]
    assert made.min_lr == 0 and again == dataclasses.replace(made, max_iters=13)
    for flags in (["--resume"], ["--sample", "x"], ["--train", "--init-from", "x"]):
        assert main([*flags, "--effort", "quick", "--out-dir", str(tmp_path)]) == 2
        assert "--effort" in capsys.readouterr().err
    (tmp_path / "short.txt").write_text("x")
    assert main(["--train", "--effort", "quick", "--data", str(tmp_path / "short.txt")]) == 2
    assert "the training text has 0 tokens" in capsys.readouterr().err

# --------------------------------------------------------------------------------------- nothing is ever lost

def child(flags, out, rng, die_at=0):
    """Run the command line in a process of its own, which dies at its `die_at`-th flush to the disk."""
    pid = os.fork()
    if pid:
        return pid
    flushes = itertools.count(1)
    fsync = os.fsync

    def flush(fd):
        if next(flushes) == die_at:
            if os.path.isfile(f"/proc/self/fd/{fd}"):  # not all had been written yet
                os.ftruncate(fd, rng.randrange(os.fstat(fd).st_size))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)
    os.fsync = flush
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    code = 99  # (of an exception)
    try:
        code = main([*flags, "--out-dir", str(out)])
    finally:
        os._exit(code)

def what_is_left(out):
    """A run's log (but for tokens_per_s, which a clock measures), its last checkpoint, and its files."""
    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    log = [row[:6] + row[7:] for row in rows]
    return log, (out / "ckpt_30.safetensors").read_bytes(), sorted(path.name for path in out.iterdir())

def kill_and_resume(kills, folder):
    """Kill short runs at random moments, every second time inside a save, and resume them, up to five times
    each. Do all end with the checkpoint and log of a run that was never stopped, to the last bit?"""
    rng = random_numbers.Random(str(folder))
    folder = Path(folder)
    BPETokenizer.train("", 256)  # what is imported now, no child need import
    (folder / "my.txt").write_text(TEXT[:20_000])
    start = ["--train", "--data", str(folder / "my.txt"), *SMALL, "--max-iters", "30", "--eval-interval",
             "15", "--save-every", "2", "--dropout", "0.1"]
    for name in ("first", "whole"):  # (the first one also compiles)
        began = time.perf_counter()
        assert os.waitpid(child(start, folder / name, rng), 0)[1] == 0
    took = time.perf_counter() - began
    want = what_is_left(folder / "whole")
    killed = 0
    runs = 0
    same = 0
    while killed < kills:
        runs += 1
        times = 0
        flags = start
        out = folder / str(runs)
        while times < 5 and killed < kills and not (out / "ckpt_30.safetensors").exists():
            inside_a_save = killed % 2
            pid = child(flags, out, rng, die_at=rng.randint(1, 20) if inside_a_save else 0)
            if not inside_a_save:
                time.sleep(rng.uniform(0, took))
                os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == signal.SIGKILL:
                times += 1
                killed += 1
            flags = ["--resume"] if list(out.glob("ckpt_*.safetensors")) else start
        os.waitpid(child(flags, out, rng), 0)
        log, checkpoint, files = what_is_left(out)
        same += (log, checkpoint) == want[:2] and not [name for name in files if name.endswith(".tmp")]
        shutil.rmtree(out)
    print(f"{same} of {runs} runs, killed {killed} times in all, {killed // 2} inside a save, ended with the "
          "same bits")
    return same == runs

def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path):
    command = [sys.executable, str(HERE / "test_minimiggy.py"), "4", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "killed 4 times in all, 2 inside a save" in done.stdout

def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    events = []
    replace = Path.replace

    def kind(fd):
        return "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(kind(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, path: events.append("name") or replace(self, path))
    with minimiggy.whole(tmp_path / "new") as file:
        file.write(b"text")
        assert not (tmp_path / "new").exists()
    assert events == ["file", "name", "folder"] and (tmp_path / "new").read_bytes() == b"text"

@pytest.mark.parametrize(("number", "times", "whole_group", "code"), [
    (signal.SIGTERM, 1, False, 143), (signal.SIGHUP, 1, True, 129), (signal.SIGINT, 1, True, 130),
    (signal.SIGINT, 2, False, 130)])
def test_signals_finish_the_step_and_save_and_two_stop_at_once(number, times, whole_group, code, tmp_path):
    command = [sys.executable, str(FILE), *training_play(tmp_path, "--max-iters", "1000000"),
               "--eval-interval", "500000", "--save-every", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | {"NOOPT": "1"})
    while not list(tmp_path.glob("ckpt_*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    for _ in range(times):
        (os.killpg if whole_group else os.kill)(process.pid, number)
        time.sleep(0.001)
    out, err = process.communicate(timeout=30)
    on_its_way_out = times == 2 and process.returncode == -number  # (the second signal came very late)
    assert process.returncode == code or on_its_way_out
    assert "Traceback" not in err
    newest = list(minimiggy.checkpoints(tmp_path).values())[-1]
    assert minimiggy.open_checkpoint(newest)[2] > 0
    if times == 1:
        assert "--resume --out-dir" in out and "stopping" in err

ODD = [-1, 0, 3, math.inf, "9" * 5000, 2**31, 2**64, 10**4000, None, "x", 1.5, [], {}, [[]], "-1", True,
       [2**40], [0, 2**40], [-8, 8]]

def mutated(whole, rng):
    """A checkpoint with something wrong: a flipped bit, a cut, or a header, edited and signed anew."""
    kind = rng.randrange(4)
    data = bytearray(whole)
    if kind == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 1:
        return bytes(data[:rng.randrange(len(data))] + bytes(rng.choice([0, 0, 100])))
    if kind == 2:
        return rng.choice([0, 7, len(data), 2**31, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    body = data[8 + length:]
    metadata = header.pop("__metadata__")
    if rng.random() < 0.5:
        entry = header[rng.choice(list(header))]
        key = rng.choice([*entry, "shape", "data_offsets"])
        if isinstance(entry[key], list) and rng.random() < 0.7:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(ODD)
        else:
            entry[key] = rng.choice([*ODD, "F64", "BF16"])
    else:
        key = rng.choice([*metadata, "gpt_config", "tokenizer"])
        if key in ("gpt_config", "tokenizer", "train_config"):
            values = json.loads(metadata[key])
            odd = [*ODD, [[0, 0]] * 200, [[-1, 5]], [[256, 256]]]
            values[rng.choice([*values, "surprise"])] = rng.choice(odd)
            metadata[key] = json.dumps(values)
        else:
            metadata[key] = rng.choice(ODD)
    if rng.random() < 0.8 and all(type(value) is str for value in metadata.values()):
        metadata["sha256"] = minimiggy.sha256_of(header, metadata, [body])
    text = json.dumps({"__metadata__": metadata} | header).encode()
    return len(text).to_bytes(8, "little") + text + body

def peak_of_opening(path):
    """The model of a checkpoint, or why it is refused; and the most memory that this took, in bytes."""
    tracemalloc.start()
    try:
        opened = minimiggy.open_checkpoint(path)[0]
    except UserError as error:
        opened = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return opened, peak

def test_500_mutated_checkpoints_load_exactly_or_are_refused_in_one_line(tokenizer, tmp_path):
    model = GPT(dataclasses.replace(TINY, n_embd=128), tokenizer=tokenizer)
    model.source = {"data": "play", "data_sha256": "0" * 64, "run": "f" * 16}
    whole = model.save_checkpoint(1, AdamW(model, QUICK), tmp_path).read_bytes()  # 3 MB
    rng = random_numbers.Random(0)
    path = tmp_path / "bad"
    loaded = 0
    for i in range(500):
        path.write_bytes(mutated(whole, rng))
        opened, peak = peak_of_opening(path)
        if peak > 2 * len(whole):  # a table of tinygrad's has grown, by chance: that does not happen twice
            opened, peak = peak_of_opening(path)
        assert peak < 2 * len(whole), i
        if isinstance(opened, GPT):
            assert same(weights(opened), weights(model)), i
            loaded += 1
        else:
            assert str(path) in opened and "\n" not in opened and len(opened) < 400, i
    assert loaded < 100  # (what is left of those that only change, say, a learning rate, and are signed anew)
    path.write_bytes(whole[:-1])
    assert main(["--sample", "x", "--checkpoint", str(path)]) == 2

@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(number, tmp_path, monkeypatch):
    model = GPT(TINY)
    load_array(model.ln_f.bias, np.full(16, number, np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(np, "isfinite", np.ones_like)  # (we do not write such files)
        path = model.save_checkpoint(1, None, tmp_path)
    with pytest.raises(UserError, match="not finite"):
        GPT(TINY).load_checkpoint(path)

def test_resume_skips_a_damaged_newest_checkpoint_and_says_so(run, tmp_path, capsys):
    shutil.copytree(run[2], tmp_path / "run")
    (tmp_path / "run" / "ckpt_9.safetensors").write_bytes(b"half of a fi")
    _, _, step, path, _ = minimiggy.open_first(minimiggy.newest_first(tmp_path / "run"))
    assert step == 6 and path.name == "ckpt_6.safetensors" and "ckpt_9" in capsys.readouterr().err

def test_going_back_moves_the_abandoned_future_aside(tmp_path):
    assert main(training_play(tmp_path, "--max-iters", "8", "--keep", "9")) == 0
    back = ["--resume", "--checkpoint", str(tmp_path / "ckpt_4.safetensors"), "--out-dir", str(tmp_path)]
    assert main([*back, "--keep", "1", "--max-iters", "5", "--learning-rate", "1e-3"]) == 0
    assert max(minimiggy.checkpoints(tmp_path)) == 5
    aside = sorted(path.name for path in (tmp_path / "run-1").iterdir())
    assert aside == ["ckpt_6.safetensors", "ckpt_8.safetensors", "log.csv", "samples.txt"]

def test_a_mistake_moves_nothing_and_strangers_files_stay(tmp_path, capsys):
    (tmp_path / "notes.tmp").touch()
    assert main(training_play(tmp_path)) == 0
    before = sorted(tmp_path.iterdir())
    short = tmp_path.parent / "short.txt"
    short.write_text("To be")
    assert main([*training_play(tmp_path), "--data", str(short)]) == 2
    assert sorted(tmp_path.iterdir()) == before
    capsys.readouterr()
    for mistake in (["--export", ""], ["--sample", "x", "--out-dir", ""], ["--train", "--checkpoint", "x"],
                    ["--resume", "--init-from", "x"],
                    ["--eval-only", "--out-dir", str(tmp_path), "--data", str(short)]):
        assert main(mistake) == 2
        assert capsys.readouterr().err.count("\n") == 1, mistake

@pytest.mark.parametrize("damage", ["10,1", "²,1", "x", "10,a,b,c,d,e,f,g", "1,,,,,,,,,,"])
def test_a_damaged_log_does_not_stop_a_run(damage, run, ids, tmp_path):
    shutil.copytree(run[2], tmp_path, dirs_exist_ok=True)
    good = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(good + damage)
    model, config, step, *_ = minimiggy.open_checkpoint(tmp_path / "ckpt_6.safetensors")
    model.tokenizer = None  # (so nothing is written after the exam, which would take as long as the rest)
    train(model, dataclasses.replace(config, max_iters=7), ids, ids[:500], start=step, out_dir=tmp_path)
    text = (tmp_path / "log.csv").read_text()
    assert text.startswith(good) and damage not in text.splitlines() and len(text.splitlines()) == 4

def test_a_signal_during_an_evaluation_still_saves(tokenizer, ids, tmp_path, monkeypatch):
    stop = []
    mean = minimiggy.Evaluator.mean
    monkeypatch.setattr(minimiggy.Evaluator, "mean", lambda *args: stop.append(1) or mean(*args))
    config = dataclasses.replace(QUICK, max_iters=100, save_every=50)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path, stop=stop)
    assert list(minimiggy.checkpoints(tmp_path)) == [3]

def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        (tmp_path / f"ckpt_{step}.safetensors").touch()
    rows = ["1,4.0,4.1,,,,,", "2,3.0,3.1,,,,,", "3,2.0,,,,,,", "4,2.0,3.5,,,,,", "9,1.0,1.0,,,,,"]
    minimiggy.prune(minimiggy.checkpoints(tmp_path), 2, rows)
    assert list(minimiggy.checkpoints(tmp_path)) == [2, 6, 7]

def test_writing_takes_the_best_checkpoint_and_going_on_the_newest(run, tmp_path, capsys):
    shutil.copytree(run[2], tmp_path, dirs_exist_ok=True)
    found = list(minimiggy.checkpoints(tmp_path))
    rows = [f"{step},1.0,{loss},,,,," for step, loss in zip(found, (3.0, *[4.0] * len(found)), strict=False)]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    out = ["--out-dir", str(tmp_path)]
    assert main(["--sample", "x", "--max-tokens", "1", *out]) == 0
    said = capsys.readouterr().err
    assert f"ckpt_{found[0]}.safetensors, the best" in said and f"the newest is ckpt_{found[-1]}" in said
    assert main(["--eval-only", "--data", "play", *out]) == 0
    assert f"ckpt_{found[0]}.safetensors: " in capsys.readouterr().out
    assert main(["--resume", *out, "--max-iters", "1"]) == 0  # (so that a loop that tries again can end)
    assert f"ckpt_{found[-1]}.safetensors has all" in capsys.readouterr().out
    (tmp_path / f"ckpt_{found[0]}.safetensors").write_bytes(b"half of a fi")
    assert minimiggy.newest_first(tmp_path, best=True)[0].name == f"ckpt_{found[0]}.safetensors"
    assert main(["--sample", "x", "--max-tokens", "1", *out]) == 0 and "skipped" in capsys.readouterr().err
    (tmp_path / "log.csv").unlink()
    assert minimiggy.newest_first(tmp_path, best=True) == minimiggy.newest_first(tmp_path)

def test_exams_read_a_short_validation_text_whole_and_samples_of_a_long_one(tokenizer, ids, tmp_path):
    for n, whole in ((200, True), (3000, False)):
        model = GPT(TINY, tokenizer=tokenizer)
        config = dataclasses.replace(QUICK, keep=9)
        train(model, config, ids, ids[:n], out_dir=tmp_path / str(n))
        row = (tmp_path / str(n) / "log.csv").read_text().splitlines()[1].split(",")
        model.load_checkpoint(tmp_path / str(n) / "ckpt_3.safetensors")
        exact = minimiggy.Evaluator(model, 4).whole(ids[:n])
        assert row[0] == "3" and (abs(float(row[2]) - exact) < 1e-6) == whole

def test_a_full_disk_stops_nothing_and_loses_nothing(tokenizer, ids, tmp_path, monkeypatch, capsys):
    save = minimiggy.Run.save
    full_at = {4}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(run, step, checkpoint):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step in full_at else limit[0], limit[1]))
        try:
            save(run, step, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(minimiggy.Run, "save", save_on_a_small_disk)
    config = dataclasses.replace(QUICK, eval_interval=2)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path / "a")
    assert list(minimiggy.checkpoints(tmp_path / "a")) == [2, 6]
    assert "step 4 could not be saved" in capsys.readouterr().out
    full_at.add(6)
    with pytest.raises(minimiggy.TrainingFailed, match="step 6 could not be saved"):
        train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path / "b")
    assert minimiggy.open_checkpoint(tmp_path / "b" / "ckpt_2.safetensors")[2] == 2
    assert not list(tmp_path.glob("*/*.tmp"))
    assert len((tmp_path / "b" / "log.csv").read_text().splitlines()) == 4
    monkeypatch.setattr(minimiggy, "train", functools.partial(throw, minimiggy.TrainingFailed("no room")))
    assert main(training_play(tmp_path / "c")) == 1

def test_numbers_that_go_wrong_stop_the_run_before_they_are_saved(run, ids, tmp_path):
    shutil.copytree(run[2], tmp_path, dirs_exist_ok=True)
    model, config, step, *_ = minimiggy.open_checkpoint(tmp_path / "ckpt_6.safetensors")
    model.wte.weight.assign(model.wte.weight * math.inf).realize()
    longer = dataclasses.replace(config, max_iters=9, learning_rate=7e-5, min_lr=7e-5, eval_interval=1)
    words = "step 7 went wrong: with seed 1337 and learning rate 7.00e-05"
    with pytest.raises(minimiggy.TrainingFailed, match=words):
        train(model, longer, ids, start=step, out_dir=tmp_path)
    assert list(minimiggy.checkpoints(tmp_path)) == [3, 6]

def test_only_one_run_at_a_time_and_none_is_overwritten(tmp_path, capsys):
    with minimiggy.alone(tmp_path):
        assert main(training_play(tmp_path)) == 2
        assert "another run is at work" in capsys.readouterr().err
        with pytest.raises(UserError, match="another run is at work"):
            train(GPT(TINY), QUICK, np.zeros(99, int), out_dir=tmp_path)
    assert main(training_play(tmp_path, "--seed", "1")) == 0
    assert main(training_play(tmp_path, "--no-checkpoint")) == 0
    assert minimiggy.open_checkpoint(tmp_path / "run-1" / "ckpt_4.safetensors")[1].seed == 1
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} <= {".csv", ".txt"}

@pytest.mark.parametrize(("name", "number", "words"), [("optimizer.v.wte.weight", -1.0, "below zero"),
                                                       ("wte.weight", 3e38, "nonsense")])
def test_numbers_that_no_run_can_have_are_found_in_a_checkpoint(name, number, words, run, tmp_path, capsys):
    arrays, metadata = minimiggy.read_safetensors(run[2] / "ckpt_6.safetensors")
    spoiled = arrays | {name: np.full_like(arrays[name], number)}
    file = tmp_path / "bad.safetensors"
    minimiggy.write_safetensors(file, spoiled, {key: metadata[key] for key in metadata if key != "sha256"})
    mode = ["--sample", "x"]
    if name != "wte.weight":
        mode = ["--resume", "--max-iters", "9", "--data", "play", "--out-dir", str(tmp_path / "o")]
    assert main([*mode, "--checkpoint", str(file)]) == 2
    assert words in capsys.readouterr().err

def test_a_model_is_saved_and_filled_only_as_what_it_is(tmp_path):
    model = small(minimiggy)
    for step in (-1, 1.5, "../x", 10**9):
        with pytest.raises(ValueError, match="number of steps"):
            model.save_checkpoint(step, None, tmp_path)
    path = model.save_checkpoint(3, None, tmp_path)
    other = GPT(dataclasses.replace(model.config, n_head=1))
    with pytest.raises(UserError, match="its n_head is 2"):  # all shapes are the same
        other.load_checkpoint(path)
    model.wte.weight.assign(model.wte.weight * math.nan).realize()
    with pytest.raises(ValueError, match="not finite"):
        model.save_checkpoint(4, None, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt_3.safetensors"]

def test_a_file_that_is_cut_while_it_is_read_is_damaged_and_ends_nothing(tmp_path, monkeypatch):
    path = small(minimiggy).save_checkpoint(3, None, tmp_path)
    read_header = minimiggy.read_header

    def cut(file):
        found = read_header(file)
        os.truncate(path, path.stat().st_size - 100)
        return found
    monkeypatch.setattr(minimiggy, "read_header", cut)
    with pytest.raises(UserError, match="damaged"):
        minimiggy.read_safetensors(path)

# ------------------------------------------------------------------------ whose checkpoints, whose folder

def small_run(out_dir, ids, tokenizer, **plan):
    """A run of four steps with a checkpoint after each second; returns its config."""
    config = dataclasses.replace(QUICK, max_iters=4, eval_interval=2, keep=9, **plan)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=out_dir)
    return config

def go_on_in(out_dir, source, ids, config, **changed):
    """Go on from the checkpoint `source` in another folder, as --resume does."""
    opened = minimiggy.open_checkpoint(source)
    longer = dataclasses.replace(config, max_iters=8, **changed)
    optimizer = AdamW(opened.model, longer)
    opened.model.load_checkpoint(source, optimizer)
    train(opened.model, longer, ids, ids[:500], optimizer=optimizer, start=opened.step, out_dir=out_dir,
          source=source)

def test_a_run_that_goes_on_in_anothers_folder_touches_nothing_of_it(tokenizer, ids, tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    small_run(x, ids, tokenizer)
    config = small_run(y, ids, tokenizer, seed=7)
    before = {path.name: path.read_bytes() for path in x.iterdir()}
    go_on_in(x, y / "ckpt_2.safetensors", ids, config, keep=1)
    assert {path.name: path.read_bytes() for path in (x / "run-1").iterdir()} == before
    assert 8 in minimiggy.checkpoints(x) and not {2, 4} & set(minimiggy.checkpoints(x))
    ours = (x / "log.csv").read_text().splitlines()
    assert ours[1] == (y / "log.csv").read_text().splitlines()[1]  # the run takes its history along
    assert [row.split(",")[0] for row in ours[1:]] == ["2", "4", "6", "8"]

def test_a_checkpoint_that_somebody_copied_into_a_folder_is_not_pruned(tokenizer, ids, tmp_path):
    x, y = tmp_path / "x", tmp_path / "y"
    config = small_run(x, ids, tokenizer)
    small_run(y, ids, tokenizer, seed=7)
    shutil.copy(y / "ckpt_2.safetensors", x / "ckpt_3.safetensors")
    go_on_in(x, x / "ckpt_4.safetensors", ids, config, keep=1)
    assert (x / "run-1" / "ckpt_3.safetensors").read_bytes() == (y / "ckpt_2.safetensors").read_bytes()
    assert [row.split(",")[0] for row in (x / "log.csv").read_text().splitlines()[1:]] == ["2", "4", "6", "8"]

def test_a_run_from_python_moves_an_older_one_out_of_the_way(tokenizer, ids, tmp_path):
    config = small_run(tmp_path, ids, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    small_run(tmp_path, ids, tokenizer, seed=7)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run-1").iterdir()} == before
    # Going back to step 2, with one checkpoint to keep, it keeps the one that it has just written.
    model, _, step, *_ = minimiggy.open_checkpoint(tmp_path / "ckpt_2.safetensors")
    other = dataclasses.replace(config, max_iters=3, keep=1, seed=7)
    train(model, other, ids, start=step, out_dir=tmp_path)
    assert 3 in minimiggy.checkpoints(tmp_path)
    assert list(minimiggy.checkpoints(tmp_path / "run-2")) == [4]

def test_who_stops_at_once_has_touched_nothing(tokenizer, ids, tmp_path):
    small_run(tmp_path, ids, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train(GPT(TINY), QUICK, ids, out_dir=tmp_path, stop=[signal.SIGINT]) is None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

def test_another_text_makes_another_run_and_one_must_be_named(tokenizer, ids, tmp_path, capsys):
    out = tmp_path / "out"
    for name, text in (("one", TEXT[:3000]), ("two", TEXT[3000:6000])):
        (tmp_path / name).write_text(text)
    assert main(["--train", "--data", str(tmp_path / "one"), "--out-dir", str(out), *SMALL]) == 0
    more = ["--resume", "--out-dir", str(out), "--max-iters", "6"]
    assert main([*more, "--data", str(tmp_path / "two")]) == 0
    assert list(minimiggy.checkpoints(out)) == [5, 6]  # (5: from its first step on there is one)
    assert list(minimiggy.checkpoints(out / "run-1")) == [2, 4]
    small_run(tmp_path / "python", ids, tokenizer)
    capsys.readouterr()
    for what in (["--eval-only"], ["--resume", "--max-iters", "9"]):
        assert main([*what, "--out-dir", str(tmp_path / "python")]) == 2
        assert "give the text with --data" in capsys.readouterr().err

def test_what_is_trained_further_in_python_does_not_name_the_text_before(run, ids, tmp_path):
    model = GPT(TINY)
    model.load_checkpoint(run[2] / "ckpt_6.safetensors")
    model.source |= {"data": "play", "data_sha256": "0" * 64}
    before = model.source["run"]
    train(model, QUICK, ids[::-1], out_dir=tmp_path)
    assert list(model.source) == ["run"] and model.source["run"] != before

def test_a_second_derivative_is_right_in_the_plain_path_and_refused_in_the_fast_one():
    idx = Tensor([[0, 1, 2]])
    for ops in (PLAIN, FAST):
        model = GPT(GPTConfig(block_size=3, vocab_size=5, n_layer=1, n_head=1, n_embd=2), ops)
        bias = model.parameters()["ln_f.bias"]
        slope = model.loss(idx, idx).gradient(bias)[0].square().sum()
        with pytest.raises(UserError, match="only once") if ops is FAST else nullcontext():
            second = slope.gradient(bias)[0].numpy()
    start = bias.numpy()
    ends = []
    for step in (1e-2, -1e-2):
        model = GPT(model.config, PLAIN)
        bias = model.parameters()["ln_f.bias"]
        load_array(bias, start + np.float32([step, 0]))
        ends.append(model.loss(idx, idx).gradient(bias)[0].square().sum().item())
    assert second[0] == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)

def test_a_smaller_step_size_for_the_rest_has_a_smaller_end_too():
    args = minimiggy.make_parser().parse_args(["--resume", "--learning-rate", "1e-4"])
    saved = TrainConfig(learning_rate=4e-3, min_lr=4e-4)
    assert minimiggy.chosen(args, TrainConfig, saved).min_lr == pytest.approx(1e-5)
    args = minimiggy.make_parser().parse_args(["--resume"])
    assert minimiggy.chosen(args, TrainConfig, saved) == saved

def test_the_averages_of_another_models_optimizer_are_not_taken(ids):
    optimizer = AdamW(GPT(TINY), dataclasses.replace(QUICK, beta1=0.5))
    with pytest.raises(ValueError, match="another model"):
        train(GPT(TINY), QUICK, ids, optimizer=optimizer)

@pytest.mark.parametrize("broken", [{"\n": KeyError}, {"\n": []}])
def test_a_tokenizer_that_knows_no_end_of_line_can_write(broken, tokenizer, ids, tmp_path, monkeypatch):
    whole = BPETokenizer.encode

    def encode(self, text):
        if text == "\n" and broken["\n"] is KeyError:
            raise KeyError(text)
        return [] if text == "\n" else whole(self, text)
    monkeypatch.setattr(BPETokenizer, "encode", encode)
    train(GPT(TINY, tokenizer=tokenizer), QUICK, ids, ids[:500], out_dir=tmp_path)
    monkeypatch.setattr(minimiggy, "last_parts", lambda token, ids: ["nobody", "knows"])
    assert minimiggy.merges_of(tokenizer, [260], ["?"] * 300) == {}
    assert "step 6" in (tmp_path / "samples.txt").read_text()

def test_a_folder_that_cannot_be_looked_at_stops_no_run(tokenizer, ids, tmp_path, monkeypatch, capsys):
    is_dir = Path.is_dir
    saves = iter([OSError(errno.ESTALE, "Stale file handle")])

    def disturbed(path):
        if path == tmp_path and inspect.stack()[1].function == "save":
            for error in saves:
                raise error
        return is_dir(path)
    monkeypatch.setattr(Path, "is_dir", disturbed)
    small_run(tmp_path, ids, tokenizer)
    assert "Stale" in capsys.readouterr().out and list(minimiggy.checkpoints(tmp_path)) == [4]

def test_what_no_checkpoint_can_have_is_said_before_the_first_step(ids, tmp_path):
    for array, words in ((np.array([0, -math.inf], np.float32), "not finite"),
                         (np.array([2**31], np.uint32), "32 bits")):
        model = GPT(TINY)
        model.mask = Tensor(array).is_param_(False)
        with pytest.raises(UserError, match=f"mask could not be saved: .*{words}"):
            train(model, QUICK, ids, out_dir=tmp_path)
    model.mask = Tensor([-math.inf])
    with pytest.raises(UserError, match="mask could not be saved"):
        train(model, QUICK, ids)
    model.mask = Tensor([1.5, -2.0]).cast(dtypes.bfloat16).is_param_(False)
    path = model.save_checkpoint(1, None, tmp_path)
    model.mask.assign(model.mask * 0).realize()
    model.load_checkpoint(path)
    assert model.mask.float().tolist() == [1.5, -2.0]

def test_numbers_of_numpys_will_do_and_token_ids_in_any_layout(ids):
    config = dataclasses.replace(QUICK, learning_rate=np.logspace(-3, -2, 2)[1], max_iters=1)
    train(GPT(TINY), config, np.asarray(ids)[::2])

def test_with_fewer_bits_a_checkpoint_that_is_skipped_leaves_nothing(tokenizer, ids, tmp_path):
    small_run(tmp_path, ids, tokenizer)
    shutil.copy(tmp_path / "ckpt_4.safetensors", tmp_path / "ckpt_9.safetensors")
    backend = minimiggy.Packed(1, "int8")
    assert minimiggy.open_first(minimiggy.newest_first(tmp_path), backend).step == 4

def test_a_checkpoint_is_no_model_from_elsewhere(run):
    with pytest.raises(UserError, match="--checkpoint opens it"):
        minimiggy.init_from(str(run[2] / "ckpt_6.safetensors"))

def test_a_branch_of_a_run_keeps_its_own_log_and_samples(tokenizer, ids, tmp_path):
    """Back to step 2 and on to 8; and then from the abandoned step 4, which lies in run-1, on to 8."""
    config = small_run(tmp_path, ids, tokenizer)
    logs = [(tmp_path / "log.csv").read_text()]
    go_on_in(tmp_path, tmp_path / "ckpt_2.safetensors", ids, dataclasses.replace(config, learning_rate=0.02))
    assert (tmp_path / "run-1" / "log.csv").read_text() == logs[0]
    logs.append((tmp_path / "log.csv").read_text())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    go_on_in(tmp_path, tmp_path / "run-1" / "ckpt_4.safetensors", ids, config)
    moved = {path.name: path.read_bytes() for path in (tmp_path / "run-2").iterdir()}
    assert moved == before and logs[1] == moved["log.csv"].decode()
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[:3] == logs[0].splitlines()[:3] and rows[2] != logs[1].splitlines()[2]
    assert list(minimiggy.checkpoints(tmp_path)) == [6, 8]

def test_a_hostile_gpt2_that_is_mostly_names_is_refused(tmp_path):
    arrays = {name: np.zeros((2, 65536), np.float32) for name in ("wte.weight", "wpe.weight")}
    arrays |= {f"h.{i}.ln_1.weight": np.zeros(0, np.float32) for i in range(1000)}
    minimiggy.write_safetensors(tmp_path / "model.safetensors", arrays, {})
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 1}))
    with pytest.raises(UserError, match="far fewer numbers"):
        minimiggy.init_from(str(tmp_path))

def test_a_page_is_not_written_over_its_template(run, tmp_path, monkeypatch, capsys):
    shutil.copy(HERE / "data" / "look.html", tmp_path / "look.html")
    monkeypatch.setattr(minimiggy, "DATA", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--look", "x", "--out-dir", str(run[2])]) == 2
    assert (tmp_path / "look.html").read_bytes() == (HERE / "data" / "look.html").read_bytes()

def test_a_terminal_that_is_closed_may_say_so_twice():
    with minimiggy.finishing_the_step() as caught:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert caught == [signal.SIGHUP] * 2
    with ThreadPoolExecutor(1) as pool:  # in a thread there are no signals, and that is no error
        assert pool.submit(lambda: minimiggy.finishing_the_step().__enter__()).result() == []

def test_ctrl_c_while_a_file_is_written_waits_until_it_has_its_name(tmp_path):
    code = ("import minimiggy, signal; from pathlib import Path\n"
            "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
            "with minimiggy.whole(Path('file')) as file:\n"
            "    signal.raise_signal(signal.SIGINT); file.write(b'x')\nprint('too late')")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == -signal.SIGINT and done.stdout == b""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    fsync = os.fsync

    def no_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", no_folders)
    with minimiggy.whole(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"

def test_a_renamed_checkpoint_is_not_taken_for_another_step(tokenizer, ids, tmp_path, capsys):
    small_run(tmp_path, ids, tokenizer)
    shutil.copy(tmp_path / "ckpt_2.safetensors", tmp_path / "ckpt_9.safetensors")
    assert minimiggy.open_first(minimiggy.newest_first(tmp_path)).step == 4
    assert "ckpt_9.safetensors holds step 2" in capsys.readouterr().err

@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced", "a file"])
def test_a_run_whose_folder_is_gone_saves_beside_it_and_ends(fate, tokenizer, ids, tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    if fate == "replaced":
        small_run(other, ids, tokenizer, seed=7)
    before = {path.name: path.read_bytes() for path in other.glob("*")}
    save = minimiggy.Run.save

    def disturbed(run, step, checkpoint):
        save(run, step, checkpoint)
        if step == 2:
            home.rename(tmp_path / "elsewhere")
            if fate == "deleted":
                shutil.rmtree(tmp_path / "elsewhere")
            elif fate == "replaced":
                shutil.copytree(other, home)
            elif fate == "a file":
                home.write_text("mine")
    monkeypatch.setattr(minimiggy.Run, "save", disturbed)
    with pytest.raises(minimiggy.TrainingFailed, match="--resume --out-dir .*home-1$"):
        small_run(home, ids, tokenizer)
    assert list(minimiggy.checkpoints(tmp_path / "home-1")) == [4]
    if fate == "replaced":
        assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    elif fate == "a file":
        assert home.read_text() == "mine"

def test_a_run_without_checkpoints_whose_folder_is_gone_promises_none(ids, tmp_path):
    run = minimiggy.Run(GPT(TINY), dataclasses.replace(QUICK, keep=0), ids, None, None, 0, tmp_path / "home")
    run.move_in(0, None)
    (tmp_path / "home").rmdir()
    with pytest.raises(minimiggy.TrainingFailed, match=".*home-1 now$"):
        run.save(2, True)
    assert [path.name for path in (tmp_path / "home-1").iterdir()] == ["log.csv"]

@pytest.mark.parametrize("grad_accum", [1, 4])
def test_the_rest_of_a_run_takes_as_long_as_its_passages(grad_accum, ids, capsys):
    """A step goes forward and back, which costs three times as much as an exam's way forward."""
    config = TrainConfig(batch_size=4, max_iters=100, eval_interval=10, eval_iters=10, grad_accum=grad_accum)
    run = minimiggy.Run(GPT(TINY), config, ids, ids[:200], None, 0, None)
    run.times.append(1.0)
    run.say_how_long(10)
    windows = math.ceil(199 / 8)
    seconds = 90 + 9 * (10 + math.ceil(windows / 4)) / (3 * grad_accum)
    assert f"about {minimiggy.clock(seconds)} min" in capsys.readouterr().out

def test_old_checkpoints_make_room_on_a_full_disk_but_never_the_newest(tokenizer, ids, tmp_path, monkeypatch):
    whole, room = minimiggy.whole, 2

    def on_a_small_disk(path):
        found = set(tmp_path.glob("ckpt_*.safetensors"))
        if path.suffix == ".safetensors" and len(found - {path}) >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path)
    monkeypatch.setattr(minimiggy, "whole", on_a_small_disk)
    config = dataclasses.replace(QUICK, max_iters=5, eval_interval=1, keep=3)
    train(GPT(TINY, tokenizer=tokenizer), config, ids, ids[:500], out_dir=tmp_path)
    assert list(minimiggy.checkpoints(tmp_path)) == [4, 5]

def test_a_disk_without_room_for_a_checkpoint_is_found_at_the_start(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(training_play(tmp_path / "new")) == 2
    assert "choose another --out-dir" in capsys.readouterr().err and not (tmp_path / "new").exists()

@pytest.mark.parametrize(("out", "words"), [
    ("FILE", "not a folder"), ("LOOP", "not a folder"), ("NOWHERE", "not a folder"),
    ("LOCKED", "nothing can be written")])
def test_an_out_dir_that_is_none_is_found_at_the_start(out, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("LOOP").symlink_to("LOOP")
    Path("NOWHERE").symlink_to("gone")
    Path("LOCKED").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "LOCKED")
    assert main(training_play(Path(out))) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

def test_flags_that_an_action_does_not_look_at_are_refused(run, tmp_path, capsys):
    out = ["--out-dir", str(run[2])]
    for flags, name in [
            (["--sample", "x", "--learning-rate", "5", *out], "--learning-rate"),
            (["--sample", "x", "--data", "play", *out], "--data"),
            (["--sample", "x", "--keep", "1"], "--keep"),
            (["--eval-only", "--temperature", "0.1", *out], "--temperature"),
            (["--eval-only", "--seed", "5", *out], "--seed"), (["--train", "--top-k", "3"], "--top-k"),
            (["--train", "--stop", "x"], "--stop"), (["--gradcheck", "--n-layer", "3"], "--n-layer"),
            (["--export", str(tmp_path / "e"), "--batch-size", "4", *out], "--batch-size"),
            (["--bench", "step", "--data", "play"], "--data"),
            (["--bench", "step", "--tokenizer", "gpt2"], "--tokenizer"),
            (["--plot", "x", "--seed", "1"], "--seed"),
            (["--look", "x", "--max-tokens", "5", *out], "--max-tokens"),
            (["--train", "--tokenizer", "bytes", "--vocab-size", "300"], "--vocab-size"),
            (["--eval-only", "--checkpoint", "a", "--init-from", "b"], "--checkpoint")]:
        assert main(flags) == 2, flags
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, flags

@pytest.mark.parametrize("flags", [["--eval-only", "--data", "play"], ["--sample", "x"], ["--version"],
                                   ["--help"], ["--look", "x", "--out", "PAGE"]])
def test_what_cannot_be_printed_is_an_error(flags, run, tmp_path):
    flags = [str(tmp_path / "page.html") if flag == "PAGE" else flag for flag in flags]
    command = [sys.executable, FILE, *flags]
    if flags[0] not in ("--version", "--help"):
        command += ["--out-dir", str(run[2])]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"NOOPT": "1"})
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr

def test_what_others_have_made_is_not_written_over(run, tmp_path, capsys):
    out = ["--out-dir", str(run[2])]
    (tmp_path / "config.json").write_text("mine")
    assert main(["--export", str(tmp_path), *out]) == 2
    assert main(["--look", "x", "--out", str(tmp_path / "config.json"), *out]) == 2
    assert (tmp_path / "config.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    page = ["--look", "x", "--out", str(tmp_path / "page.html"), *out]
    assert main(page) == 0 and main(page) == 0

def test_a_prompt_ends(run, tmp_path, monkeypatch, capsys):
    out = ["--out-dir", str(run[2]), "--max-tokens", "1"]
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "long", "wb") as file:
        file.truncate(10**9)
    for prompt in ("pipe", "long", "", "nothing"):
        assert main(["--sample", f"FILE:{tmp_path / prompt}", *out]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", open("/dev/zero"))
    assert main(["--sample", "-", *out]) == 2 and "too long" in capsys.readouterr().err

@pytest.mark.parametrize("after", [0.05, 0.15, 0.25, 0.4])
def test_ctrl_c_in_the_first_second_is_no_traceback(after):
    process = subprocess.Popen([sys.executable, FILE, "--sample", "x"], stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    # (As long as our file has not come to this line, it is Python that answers.)
    guarded = SOURCE[:SOURCE.index("signal.signal(signal.SIGINT, ")].count("\n") + 1
    assert all(int(line) <= guarded for line in re.findall(r'minimiggy\.py", line (\d+)', error)), error

def test_a_variable_that_is_meant_for_another_program_is_not_tinygrads():
    others = {"DEBUG": "true", "PROFILE": "default", "JIT": "", "BEAM": "x"}
    done = subprocess.run([sys.executable, FILE, "--version"], env=os.environ | others)
    assert done.returncode == 0

@pytest.mark.parametrize("prompt", ["", "x" * 500, "שלום 👩‍👩‍👧 \0", "\udce9 from a shell"])
def test_any_prompt_is_written_on_from(run, prompt, capsys):
    assert main(["--sample", prompt, "--out-dir", str(run[2]), "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith(minimiggy.printable(prompt))

def test_every_flag_refuses_bad_values_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [(mode, minimiggy.flag_of(field.name)) for mode, config in (
        ("--train", GPTConfig), ("--train", TrainConfig), ("--sample=x", minimiggy.SampleConfig))
        for field in dataclasses.fields(config)]
    for mode, flag in [*flags, ("--train", "--devices")]:
        for value in ("nan", "many", "", "-1", "1e99", "9" * 30):  # just outside its range, or no number
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
    (["--plot", "x", "--seed", "0"], "--seed"), (["--export", "x", "--keep", "0"], "--keep"),
    (["--train", "--init-from", "nowhere"], "nowhere"), (["--train", "--data", "no/such"], "no/such"),
    (["--export", "x", "--checkpoint", "nowhere"], "nowhere"), (["--train", "--data", "EMPTY"], "empty"),
    (["--train", "--data", "SHORT"], "--block-size"), (["--train", "--data", "LATIN1"], "offset 3"),
    (["--train", "--data", "."], "it is a folder"), (["--train", "--n-head", "3"], "--n-head 3"),
    (["--train", "--n-layer", "0"], "--n-layer"), (["--train", "--n_embd", "-4"], "--n-embd"),
    (["--train", "--batch-size", "many"], "batch"), (["--train", "--learning-rate", "nan"], "--learning"),
    (["--train", "--dropout", "1.5"], "--dropout"), (["--train", "--vocab-size", "100"], "256"),
    (["--train", "--tokenizer", "words"], "words"), (["--train", "--sample", "x"], "not allowed"),
    (["--frobnicate"], "--help"), (["--sample", "x", "--out-dir", "nowhere"], "--train"),
    (["--sample", "x", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--sample", "x", "--temperature", "-1"], "--temp"), (["--resume", "--out-dir", "nowhere"], "--train"),
    (["--train", "--plain", "--devices", "2"], "--devices"), ([], "--help")])
def test_a_mistake_gets_one_line_and_exit_code_2(flags, names, tmp_path, monkeypatch, capsys):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "SHORT").write_text("To be")
    (tmp_path / "LATIN1").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("minimiggy: ") and error.count("\n") == 1 and names in error
    assert not (tmp_path / "checkpoints").exists()

def test_an_error_that_nobody_thought_of_is_one_line_with_exit_code_70(monkeypatch, capsys):
    monkeypatch.setattr(minimiggy, "check_flags", functools.partial(throw, ZeroDivisionError("x" * 900)))
    assert main(["--gradcheck"]) == 70
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ZeroDivisionError" in error and "--debug" in error
    assert len(error) < 350 and main(["--gradcheck", "--debug"]) == 70
    assert "Traceback" in capsys.readouterr().err

def test_an_error_of_tinygrads_on_another_device_is_not_called_ours(monkeypatch):
    with pytest.raises(ValueError) as caught:
        Tensor([1.0]).reshape(7)
    monkeypatch.setenv("DEV", "CPU:LLVM")
    monkeypatch.setattr(minimiggy, "BACKENDS", [PLAIN])
    code, line = minimiggy.explain(caught.value)
    assert code == 2 and "CPU:LLVM" in line and "unset DEV" in line

# ----------------------------------------------------------------------- at home elsewhere: with transformers

@pytest.fixture(scope="session")
def learned():
    return BPETokenizer.train(TEXT[:100_000], 700)

def shaken(tokenizer):
    """A model whose every number is random, biases and norms too."""
    return shake(GPT(GPTConfig(32, tokenizer.vocab_size, 2, 3, 48), tokenizer=tokenizer), 0.3)

@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = shaken(learned)
    minimiggy.export(model, folder)
    return model, folder

def test_transformers_computes_the_same_logits_from_an_export(exported):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
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
    tokenizer = learned
    folder = exported[1]
    if kind != "learned":  # bc comes first, so abcd is a token, but xabcd is x|a|bc|d
        a, b, c, d = b"abcd"
        tokenizer = BPETokenizer("bpe", [] if kind == "bytes" else [(b, c), (a, b), (c, d), (257, 258)])
        folder = tmp_path
        assert kind == "bytes" or tokenizer.encode("abcd") == [259]
        minimiggy.export(shaken(tokenizer), folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*random_strings(1000), TEXT[:200_000], "漢字" * 40_000]:
        ids = theirs.encode(text)
        assert ids == tokenizer.encode(text) == tokenizer.encode_array(text.encode()).tolist()
        assert theirs.decode(ids) == text

@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_one_merge_a_token_is_enough(letters):
    """Few letters make tokens that overlap with themselves in every way."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    rng = random_numbers.Random(2)

    def word(n):
        return "".join(rng.choices(letters, k=rng.randrange(1, n)))
    for _ in range(10):
        tokenizer = BPETokenizer.train(" ".join(word(40) for _ in range(300)), 400)
        ids = minimiggy.vocabulary(tokenizer)
        parts = [minimiggy.last_parts(token, ids) for token in ids]
        theirs = Tokenizer(models.BPE(ids, [tuple(pair) for pair in parts if len(pair) == 2]))
        for text in [word(200) for _ in range(100)]:
            assert theirs.encode(text).ids == tokenizer.encode(text)

def test_a_token_is_made_of_the_two_parts_that_its_merges_leave():
    tokenizer = BPETokenizer("bpe", [(97, 110), (98, 256), (256, 97), (257, 258)])  # chapter 3's banana
    ids = minimiggy.vocabulary(tokenizer)
    assert minimiggy.last_parts("ana", ids) == ["an", "a"]
    assert minimiggy.last_parts("banana", ids) == ["ban", "ana"]

@pytest.mark.parametrize("form", ["as saved", "bare names and masks", "no config", "bfloat16", "float16",
                                  "shards"])
def test_a_model_of_transformers_computes_the_same_logits_here(form, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=199, n_positions=24, n_embd=128, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    file = tmp_path / "model.safetensors"
    if form in ("bfloat16", "float16"):
        theirs = theirs.to(getattr(torch, form))
    theirs.save_pretrained(tmp_path, max_shard_size="500KB" if form == "shards" else "1GB")
    assert file.exists() == (form != "shards")
    theirs = theirs.float()
    if form == "bare names and masks":
        arrays = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        for i in range(2):
            arrays[f"h.{i}.attn.bias"] = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
            arrays[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(arrays | {"lm_head.weight": arrays["wte.weight"].clone()}, file)
    if form == "no config":
        (tmp_path / "config.json").unlink()
    model = minimiggy.init_from(str(tmp_path))
    ids = torch.arange(48).reshape(2, 24) * 4
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
    assert np.abs(logits(model, ids.tolist()) - want).max() < 1e-4 and model.tokenizer is None

# --------------------------------------------------------------------------------------- without transformers

def test_gpt2s_tokenizer_goes_out_and_comes_back(tmp_path, monkeypatch):
    """With a stand-in of its size, whose bytes are in another order than ours, as GPT-2's are."""
    import tiktoken
    tokens = [bytes([255 - b]) for b in range(256)]
    tokens += map(bytes, itertools.product(range(256), repeat=2))
    encoding = tiktoken.Encoding("gpt2", pat_str=minimiggy.SPLIT, special_tokens={"<|endoftext|>": 50256},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens[:50256])})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    model = GPT(GPTConfig(4, 50257, 1, 1, 8), tokenizer=BPETokenizer("gpt2"))
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
    assert back.config == model.config and same(weights(back), weights(model))
    for text in [*random_strings(1000), TEXT]:
        assert back.tokenizer.encode(text) == model.tokenizer.encode(text)

OTHER_TOKENIZERS = {
    "other words": lambda about: about["pre_tokenizer"].update(type="Whitespace"),
    "no pattern": lambda about: about["pre_tokenizer"].update(use_regex=False),
    "a space before": lambda about: about["pre_tokenizer"].update(add_prefix_space=True),
    "no capitals": lambda about: about.update(normalizer={"type": "Lowercase"}),
    "another order": lambda about: about["model"]["merges"].reverse(), "nothing": lambda about: None}

@pytest.mark.parametrize("change", OTHER_TOKENIZERS)
def test_a_tokenizer_that_would_give_other_tokens_is_not_taken(change, exported, tmp_path):
    shutil.copytree(exported[1], tmp_path, dirs_exist_ok=True)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    OTHER_TOKENIZERS[change](about)
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    assert (minimiggy.init_from(str(tmp_path)).tokenizer is None) == (change != "nothing")

def test_a_model_without_a_tokenizer_goes_out_and_comes_back(exported, tmp_path):
    minimiggy.export(GPT(exported[0].config), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert minimiggy.init_from(str(tmp_path)).tokenizer is None

@pytest.mark.parametrize("change", ["no tokenizer.json", "no vocab.json", "re-sorted"])
def test_a_tokenizer_comes_back_from_either_file(change, exported, tmp_path):
    model, folder = exported
    for name in ("config.json", "model.safetensors", "vocab.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if change == "re-sorted":
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved, sort_keys=True))
    else:
        (tmp_path / change[3:]).unlink()
    back = minimiggy.init_from(str(tmp_path)).tokenizer
    assert back.encode(TEXT[:9999]) == model.tokenizer.encode(TEXT[:9999])

FOREIGN = {"no vocabulary": "{}", "cut off": '{"model": {"vocab": {"a"',
           "a list": '{"model": {"vocab": [["a", -1.5]]}}',
           "two tokens": '{"model": {"vocab": {"a": 0, "b": 1}}}', "bytes in another order": None,
           "too few": None, "numbers below zero": None}

@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_tokenizer_is_left_out_and_that_is_said(kind, exported, tmp_path, capsys):
    minimiggy.export(GPT(exported[0].config), tmp_path)
    ids = json.loads((exported[1] / "vocab.json").read_text())
    if kind == "bytes in another order":
        ids |= {"a": ids["b"], "b": ids["a"]}
    ids = {token: i for token, i in ids.items() if i < 500 or kind != "too few"}
    if kind == "numbers below zero":  # the tokens are two letters long, but each would double another
        letters = list(ids)[:256]
        ids = {letter: -256 + i for i, letter in enumerate(letters)}
        ids |= {left + right: len(ids) + i for i, left in enumerate(letters[-64:]) for right in letters[-64:]}
    (tmp_path / "tokenizer.json").write_text(FOREIGN[kind] or json.dumps({"model": {"vocab": ids}}))
    assert minimiggy.init_from(str(tmp_path)).tokenizer is None
    assert "without one" in capsys.readouterr().out

def test_a_smaller_block_keeps_the_first_positions(exported):
    model, folder = exported
    short = minimiggy.init_from(str(folder / "model.safetensors"), block_size=5)
    assert short.config.block_size == 5
    assert np.abs(logits(short, [[1, 2, 3, 4, 5]]) - logits(model, [[1, 2, 3, 4, 5]])).max() < 1e-5

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
    "untied head": ({}, {"lm_head.weight": np.zeros((700, 48), "f4")}, "lm_head.weight"),
    "unknown": ({}, {"transformer.h.0.extra": np.zeros(3, "f4")}, "h.0.extra"),
    "missing": ({}, {"transformer.h.1.mlp.c_fc.bias": None}, "h.1.mlp.c_fc.bias is missing"),
    "no embedding": ({}, {"transformer.wte.weight": None}, "wte.weight"),
    "shape": ({}, {"transformer.ln_f.bias": np.zeros(47, "f4")}, "ln_f.bias is float32 (47,)")}

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
    assert names in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)

def test_a_larger_block_a_missing_file_and_a_pickle_are_refused(exported, tmp_path):
    with pytest.raises(UserError, match="only 32 positions"):
        minimiggy.init_from(str(exported[1]), block_size=33)
    with pytest.raises(UserError, match="nowhere"):
        minimiggy.init_from(str(tmp_path / "nowhere"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        minimiggy.init_from(str(tmp_path))

def test_gpt2s_weights_do_not_enter_a_model_with_another_formula(exported, tmp_path):
    module, _ = edited(RELU2, tmp_path)
    with pytest.raises(module.UserError, match="no GPT-2"):
        module.init_from(str(exported[1]))

# ---------------------------------------------------------------------------------------------------- the hub

class Hub(BaseHTTPRequestHandler):
    """Announces its file like huggingface.co, and redirects to a store, which knows Range; `cut`: a half."""
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        sha256 = hashlib.sha256(self.server.body).hexdigest()
        self.send_response(self.server.status)
        self.send_header("Location", "/store")
        self.send_header("X-Linked-Etag", f'"{self.server.lie or sha256}"')
        self.end_headers()

    def do_GET(self):
        if self.path != "/store":
            self.do_HEAD()
            return
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
    server.asked = []
    server.cut = False
    server.lie = None
    server.status = 302
    server.ranges = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(minimiggy, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(minimiggy, "cache_folder", lambda: tmp_path / "minimiggy")
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
        assert same(weights(minimiggy.init_from("gpt2")), weights(exported[0]))
    size = len(hub.body)
    assert files(hub) == {"model.safetensors": size} and hub.asked == [None]
    assert f"downloading model.safetensors: {size / 1e6:.1f} of {size / 1e6:.1f} MB" in lines

@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_stopped(hub, ranges):
    hub.cut = True
    hub.ranges = ranges
    with pytest.raises(UserError):
        minimiggy.init_from("gpt2")
    kept = files(hub)["model.safetensors.part"]
    assert len(files(hub)) == 1 and 1 << 17 <= kept <= len(hub.body) // 2
    hub.cut = False
    minimiggy.init_from("gpt2")
    assert files(hub) == {"model.safetensors": len(hub.body)}
    assert hub.asked == [None, f"bytes={kept}-"]

@pytest.mark.parametrize(("tail", "works"), [(b"", True), (b"more", False)])
def test_a_part_that_is_complete_is_checked_and_used(hub, tail, works):
    (hub.folder / "model.safetensors.part").write_bytes(hub.body + tail)
    if works:
        minimiggy.init_from("gpt2")
    else:
        with pytest.raises(UserError, match="SHA-256"):
            minimiggy.init_from("gpt2")
    assert files(hub) == ({"model.safetensors": len(hub.body)} if works else {})

@pytest.mark.parametrize(("announced", "asked"), [("0" * 64, [None]), ("6f1ed002", [])])
def test_a_wrong_checksum_or_none_leaves_nothing(announced, asked, hub):
    hub.lie = announced
    with pytest.raises(UserError, match="SHA-256"):
        minimiggy.init_from("gpt2")
    assert files(hub) == {} and hub.asked == asked

def test_a_server_that_refuses_is_named_by_its_answer(hub):
    hub.status = 403
    with pytest.raises(UserError, match="the server answers 403"):
        minimiggy.init_from("gpt2")
    assert files(hub) == {} and hub.asked == []

def test_without_a_network_the_line_says_what_to_bring_where(tmp_path, monkeypatch):
    monkeypatch.setattr(minimiggy, "HUB", "http://127.0.0.1:1")
    monkeypatch.setattr(minimiggy, "cache_folder", lambda: tmp_path / "minimiggy")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        minimiggy.init_from("gpt2-xl")
    url = "http://127.0.0.1:1/gpt2-xl/resolve/main/model.safetensors"
    assert f"save {url} as {tmp_path}/minimiggy/gpt2-xl/model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

# ----------------------------------------------------------------------------------------- what people expect

def test_prompts_from_a_file_and_from_standard_input_and_several_samples(run, tmp_path, monkeypatch, capsys):
    flags = ["--out-dir", str(run[2]), "--max-tokens", "9", "--seed", "5"]
    (tmp_path / "prompt.txt").write_text("ROMEO:\n")
    assert main(["--sample", "ROMEO:\n", *flags]) == 0
    want = capsys.readouterr().out
    assert main(["--sample", f"FILE:{tmp_path / 'prompt.txt'}", *flags]) == 0
    assert capsys.readouterr().out == want
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"ROMEO:\n")))
    assert main(["--sample", "-", "--num-samples", "3", *flags]) == 0
    samples = capsys.readouterr().out
    assert samples.startswith(want) and samples.count("ROMEO:\n") >= 3
    assert main(["--sample", "FILE:nowhere.txt", *flags]) == 2
    assert "nowhere.txt" in capsys.readouterr().err

@pytest.mark.parametrize("stop", ["", "é\n", "👩", "b", "no such text", "x" * 300])
def test_streaming_never_tears_a_character_and_ends_before_the_stop(run, stop, monkeypatch):
    text = "ab 👩‍👩‍👧 é\nnext b"
    prints = []
    monkeypatch.setattr("builtins.print", lambda *args, **how: prints.append(args[0]))
    minimiggy.sample(run[0].tokenizer, "", text.encode(), stop)  # (a token for each byte)
    assert "".join(prints) == (text.split(stop)[0] if stop else text)
    assert "\ufffd" not in "".join(prints)

@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_fewer_bits_from_the_command_line(kind, run, tmp_path, capsys):
    (tmp_path / "my.txt").write_text(TEXT[:9000])
    flags = ["--out-dir", str(run[2]), "--data", str(tmp_path / "my.txt")]
    bits = []
    for more in ([], ["--weights", kind]):
        assert main(["--eval-only", *flags, *more]) == 0
        bits.append(float(re.search(r"= ([0-9.]+) bits", capsys.readouterr().out)[1]))
    assert abs(bits[0] - bits[1]) < 0.01
    written = ["--sample", "ROMEO:", "--out-dir", str(run[2]), "--weights", kind, "--max-tokens", "9"]
    assert main([*written, "--num-samples", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("ROMEO:") >= 2
    assert main(["--train", "--weights", kind]) == 2
    assert "--weights" in capsys.readouterr().err
    assert main([*written, "--plain"]) == 2
    assert "part II" in capsys.readouterr().err

def test_eval_only_gives_the_loss_of_the_whole_validation_text(run, tmp_path, capsys):
    model, _, folder = run
    (tmp_path / "my.txt").write_text(TEXT[:9000])
    said = set()
    for size in ("4", "7"):
        flags = ["--out-dir", str(folder), "--data", str(tmp_path / "my.txt"), "--batch-size", size]
        assert main(["--eval-only", *flags]) == 0
        said.add(re.search(r": ([0-9.]+) nats", capsys.readouterr().out)[1])
    assert len(said) == 1
    ids = model.tokenizer.encode(TEXT[8100:9000])
    windows = np.array([ids[i:i + 9] for i in range(len(ids) - 8)])
    want = numpy_loss(in_float64(model), windows[:, :-1], windows[:, 1:], TINY.n_layer, TINY.n_head)
    assert float(said.pop()) == pytest.approx(want, abs=0.02)  # (this reads every place at every distance)

def write_run(folder, height):
    """A log of 400 steps whose loss falls from 9 nats, evaluated and kept at 200, evaluated at 400."""
    lines = [",".join(minimiggy.COLUMNS)]
    for step in range(10, 401, 10):
        train = height + 2 + 7 * 0.5 ** (step / 20 - 0.5)
        val = height + 2.5 - step / 1000
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
            assert list(map(tuple, line.get_xydata())) == minimiggy.column(rows, name)
            assert len(line.get_xydata()) == n
        kept = top.lines[3 * i + 2].get_xydata().tolist()
        assert kept == [[200, rows[19]["val_bpb"]]]  # there is a checkpoint
    low, high = top.get_ylim()
    assert low < 1.05 < high < top.lines[0].get_ydata()[0]  # the spike at the start does not squash the rest
    names = [text.get_text().split()[1] for text in top.get_legend().get_texts()]
    assert names == ["first", "second"]

@pytest.mark.parametrize("rows", ["10,2,,,1,,,\n20,nan,,,1,,,\n30,inf,,,1,,,", "0,2,,,0,,,",
                                  "10,1e308,,,1,,,\n20,-1e308,,,1,,,\n30,2,,,1,,,"])
def test_plot_passes_over_what_cannot_be_drawn(rows, tmp_path, capsys, recwarn):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text(f"{','.join(minimiggy.COLUMNS)}\n{rows}\n")
    assert main(["--plot", str(tmp_path)]) == 0 and capsys.readouterr().err == ""
    assert not recwarn.list

def test_plot_without_a_log_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    heading = ",".join(minimiggy.COLUMNS)
    for log in (None, "", heading, "step,loss\n10,1", f"{heading}\n10,x,,,,,,", f"{heading}\n,1,,,1,,,"):
        if log is not None:
            (tmp_path / "log.csv").write_text(log)
        assert main(["--plot", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path) in error and error.count("\n") == 1

def test_plot_without_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--plot", str(write_run(tmp_path / "run", 0))]) == 2
    assert capsys.readouterr().err == "minimiggy: --plot needs matplotlib: pip install matplotlib\n"

@pytest.mark.parametrize("rows", [[(100, 3.0), (200, 2.0), (1000, 1.5)], [(1, 2.0), (9, 2.0)]])
def test_the_chart_has_its_extremes_at_the_corners(rows):
    lines = minimiggy.chart(rows).splitlines()
    assert [len(line) for line in lines] == [64] * 10 and lines[0].split()[0] == f"{rows[0][1]:.3f}"
    assert lines[7].split()[0] == f"{rows[-1][1]:.3f}" and ord(lines[0][8]) & 9
    assert lines[9].split() == [str(rows[0][0]), "step", str(rows[-1][0])]
    assert all(any(ord(line[x]) > 0x2800 for line in lines[:8]) for x in range(8, 64))  # an unbroken curve
    assert minimiggy.chart(rows[:1]) == ""

def test_help_version_and_any_directory(tmp_path):
    def run(*flags):
        command = [sys.executable, str(FILE), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    help = run("--help")
    assert help.returncode == 0 and "examples:" in help.stdout
    said = " ".join(help.stdout.split())
    for flag, comment in (("--block_size N", "tokens that the model sees"), ("--top_p X", "draw among")):
        assert comment in said.split(flag)[1][:60]
    assert help.stdout.startswith("usage: python minimiggy.py WHAT")
    assert run("--version").stdout == f"minimiggy {minimiggy.VERSION}\n"
    wrong = run("--sample", "x")
    assert wrong.returncode == 2 and wrong.stdout == "" and "--train" in wrong.stderr
    assert not list(tmp_path.iterdir())

def test_bench_prints_json_last(capsys):
    for what, key in (("step", "ms_per_step"), ("sample", "tokens_per_s")):
        assert main(["--bench", what, *SMALL[:-6]]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert min(result[key], result["gflops"], result["blas_gflops"], result["peak_mb"]) > 0

def test_gradcheck_agrees_and_notices_a_wrong_gradient(monkeypatch, capsys):
    assert main(["--gradcheck"]) == 0 and "wpe.weight" in capsys.readouterr().out
    right = minimiggy.exact_slopes

    def others(*args):
        found = right(*args)
        return found | {"h.0.ln_1.bias": found["h.0.ln_1.bias"] * 1.001}
    monkeypatch.setattr(minimiggy, "exact_slopes", others)
    assert main(["--gradcheck"]) == 1

def test_gradcheck_does_not_call_wrong_what_the_model_itself_rounds(tmp_path, capsys):
    line = "self.ops.gelu(self.c_fc(x))"
    module, _ = edited([(line, f"{line}.half().float()")], tmp_path)
    assert module.main(["--gradcheck"]) == 1
    said = capsys.readouterr().out
    assert "does the model round" in said.lower() and "SOMETHING IS WRONG" not in said

def test_the_readmes_commands_for_those_who_know_nanogpt_run_small(run, tmp_path, monkeypatch, capsys):
    import tiktoken
    minimiggy.export(run[0], tmp_path / "export")  # in the place of GPT-2's weights
    table = (HERE / "README.md").read_text().split("Whoever comes from nanoGPT")[1].split("\n\n")[1]
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
        if flags[0] == "--bench":
            flags += SMALL[:-6]
        if flags[0] == "--train":
            its_own_size = [*SMALL[-6:], "--batch-size", "4"]
            flags += its_own_size if "--init-from" in flags else SMALL
            if "--tokenizer" in flags:  # (which has its own tokens)
                place = flags.index("--vocab-size")
                flags = flags[:place] + flags[place + 2:]
        if flags[0] == "--resume":
            flags += ["--max-iters", str(4 + i)]
        if flags[0] == "--sample":
            flags += ["--max-tokens", "9"]
        assert main(flags) == 0, command
        said = {"--train": "saved", "--resume": "saved", "--eval-only": "bits/byte", "--bench": "ms_per_step",
                "--sample": "JULIET:" if "FILE" in command else "".join(flags[1:2])}
        assert said[flags[0]] in capsys.readouterr().out, command

def test_fine_tuning_starts_where_the_models_own_evaluation_says_and_falls(run, tmp_path, capsys):
    text = tmp_path / "my.txt"
    text.write_text(TEXT[60_000:75_000])
    there = ["--init-from", str(tmp_path / "export"), "--data", str(text), "--batch-size", "4"]
    assert main(["--export", str(tmp_path / "export"), "--out-dir", str(run[2])]) == 0
    assert main(["--eval-only", *there]) == 0
    said = float(re.search(r": ([0-9.]+) nats", capsys.readouterr().out)[1])
    assert main(["--train", *there, "--max-iters", "20", "--learning-rate", "1e-2", "--warmup-steps", "0",
                 "--eval-interval", "20", "--out-dir", str(tmp_path / "tuned")]) == 0
    first = minimiggy.read_log(tmp_path / "tuned" / "log.csv")[0]
    assert first["step"] == 10 and first["train_loss"] == pytest.approx(said, rel=0.2)
    assert minimiggy.read_log(tmp_path / "tuned" / "log.csv")[-1]["val_loss"] < said - 0.3

def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    (tmp_path / "my.txt").write_text(TEXT[:20_000])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102

# ------------------------------------------------------------------------------------------------ --look

HOSTILE = "</script><script>alert(1)</script><!-- \"'`${x}& \u2028\u2029 \u202e \0 é👩‍👩‍👧"

def content_of(path):
    """What a page has been given to show."""
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', path.read_text(),
                                re.DOTALL)[1])

@pytest.fixture(scope="session")
def page(run, tmp_path_factory):
    """The page of the short run, for a prompt of five tokens or more that would be markup."""
    folder = tmp_path_factory.mktemp("look")
    (folder / "my.txt").write_text(TEXT[:30_000])
    flags = ["--out-dir", str(run[2]), "--data", str(folder / "my.txt"), "--out", str(folder / "page.html")]
    assert main(["--look", "<b>\n to be", *flags]) == 0
    return folder / "page.html"

def in_shares(logits):
    """Softmax, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

def named(tokenizer, tokens):
    return [minimiggy.in_letters(tokenizer, token) for token in tokens]

def test_every_probability_in_the_page_is_the_models(tokenizer, ids):
    model = shake(GPT(DEEP, tokenizer=tokenizer))
    prompt = ids[7:15].tolist()
    content = minimiggy.look(model, prompt, ids)
    sections = content["sections"]
    assert content["prompt"] == named(tokenizer, prompt)
    answer = logits(model, [prompt])[0]
    p = in_shares(answer)
    for row, height, place in zip(p, answer, sections["expects"]["places"], strict=True):
        groups = [(1, h) for _, h in place["likely"]] + place["tail"]
        for temperature in (0.5, 1, 2):
            total = np.exp((height - height.max()) / temperature).sum()
            got = sum(n * math.exp(h / temperature) for n, h in groups)
            assert got == pytest.approx(total, rel=1e-3 if temperature == 1 else 1e-2)
        order = np.argsort(-row, kind="stable")[:100]
        assert [token for token, _ in place["likely"]] == named(tokenizer, order)
        likely = [row.max() * math.exp(h) for _, h in place["likely"]]
        assert likely == pytest.approx(row[order], rel=2e-3)
        assert sum(n for n, _ in groups) == 300
    best = [[name, pytest.approx(row.max(), rel=6e-3)]
            for row, name in zip(p, named(tokenizer, p.argmax(-1)), strict=True)]
    reads, start, first, second, came = sections["grows"]["rows"]
    assert second == ["after block 2", best] and [*content["next"][0]] == best[-1]
    assert start[1] != first[1] != second[1]
    found = sections["surprises"]
    assert found["tokens"] == named(tokenizer, ids[1:289])
    for start in (0, 12, 16):  # where a window begins; but for the first, the second half counts
        p = in_shares(logits(model, [ids[start:start + 8].tolist()])[0])
        for t in range(4 if start else 0, 8):
            assert 2 ** -found["bits"][start + t] == pytest.approx(p[t, ids[start + t + 1]], rel=5e-3)
            assert [found["guesses"][start + t]] == named(tokenizer, [p[t].argmax()])

@pytest.mark.parametrize("T", [1, 2, 5, 8])
def test_each_token_of_a_passage_is_counted_once_and_in_its_place(T):
    text = np.arange(20)
    starts = minimiggy.passage_windows(text, T)
    answers = np.eye(20)[starts[:, None] + np.arange(T)]  # what is likeliest says where it was said
    found = minimiggy.surprises(text, answers, list(range(20)))
    n = len(found["guesses"])
    assert found["guesses"] == list(range(n)) and found["tokens"] == list(range(1, n + 1)) and n >= 16

def weights_in_numpy(model, prompt):
    """The weights (H, T, T) of the first layer's heads, by the formula of chapter 6."""
    p = in_float64(model)
    T = len(prompt)
    x = p["wte.weight"][prompt] + p["wpe.weight"][:T]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["h.0.ln_1.weight"] + p["h.0.ln_1.bias"]
    qkv = x @ p["h.0.attn.c_attn.weight"] + p["h.0.attn.c_attn.bias"]
    q, k, _ = qkv.reshape(T, 3, model.config.n_head, -1).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    return in_shares(np.where(np.tri(T), scores, -math.inf))

class Sharp(Plain):
    """An attention that a reader has changed."""
    def attention(self, qkv, position, cache=None):
        return super().attention(Tensor.cat(3 * qkv[:, :, :1], qkv[:, :, 1:], dim=2), position, cache)

class Mixed(Fast):
    """Part II's programs around an attention that a reader has changed."""
    attention = Plain.attention

class Odd(Plain):
    """An attention whose answer is no average."""
    def attention(self, qkv, position, cache=None):
        return super().attention(qkv, position, cache).exp()

def test_attention_in_the_page_is_the_weights_of_the_operation_that_runs(tokenizer):
    prompt = tokenizer.encode("to be, or not")[:8]
    model = shake(GPT(DEEP, tokenizer=tokenizer))
    looks = minimiggy.look(model, prompt)["sections"]["looks"]
    assert len(looks["heads"]) == 4 and looks["across"] == 2
    want = weights_in_numpy(model, prompt)
    for got, rows in zip(looks["heads"], want, strict=False):
        for t, row in enumerate(got["rows"]):
            whole = np.array(row + [0] * (len(prompt) - len(row))) / 1000
            assert np.abs(whole - rows[t]).max() <= 0.001 and len(row) <= t + 1
    second = looks["heads"][1]
    before = want[1].trace(-1) / len(prompt)
    assert second["name"] == "layer 1, head 2" and f"{before:.0%} on the one" in second["words"]

def test_a_changed_model_is_shown_as_it_is_or_what_cannot_be_is_said(tokenizer):
    small = BPETokenizer.train(TEXT[:5000], 260)
    prompt = small.encode("to b")
    models = [shake(GPT(SMALLEST, ops, tokenizer=small)) for ops in (Sharp(), Odd(), Mixed(2))]
    sharp, odd, mixed = [minimiggy.look(model, prompt)["sections"] for model in models]
    assert "heads" in mixed["looks"] and "rows" in mixed["grows"]
    for tensor in (models[0].h[0].attn.c_attn.weight, models[0].h[0].attn.c_attn.bias):
        load_array(tensor, tensor.numpy() * np.repeat(np.float32([3, 1]), [8, 16]))  # three times the query
    for head, rows in zip(sharp["looks"]["heads"], weights_in_numpy(models[0], prompt), strict=True):
        for t, row in enumerate(head["rows"]):
            assert np.abs(np.array(row) / 1000 - rows[t, :len(row)]).max() <= 0.001
    assert "no average" in odd["looks"]["missing"] and "rows" in odd["grows"]

    class Twice(GPT):
        def hidden(self, *arguments):
            return super().hidden(*arguments) * 2
    sections = minimiggy.look(shake(Twice(SMALLEST, PLAIN, tokenizer=small)), prompt)["sections"]
    assert "does not lead to" in sections["grows"]["missing"] and "heads" in sections["looks"]
    assert "not at hand" in sections["surprises"]["missing"] and "folder" in sections["learned"]["missing"]

def test_looking_changes_nothing_in_the_model(run, tokenizer):
    model = run[0]
    before = weights(model)
    minimiggy.look(model, tokenizer.encode("to be"))
    assert same(before, weights(model)) and type(model.ops) is Fast and model.h[0].attn.ops is model.ops

@pytest.mark.parametrize("prompt", [HOSTILE, "x" * 3000], ids=["hostile", "long"])
def test_no_prompt_becomes_markup(prompt, run, tmp_path, capsys):
    page = tmp_path / "look.html"
    assert main(["--look", prompt, "--out-dir", str(run[2]), "--out", str(page)]) == 0
    template = (HERE / "data" / "look.html").read_text()
    for sign in ("<", ">", "\u2028", "\u2029"):
        assert page.read_text().count(sign) == template.count(sign), sign
    content = content_of(page)
    tokens = run[0].tokenizer.encode(prompt)
    assert content["sections"]["tokens"]["ids"] == tokens[-8:]
    assert f"the last 8 of {len(tokens)} tokens" in content["about"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["wrote", "next", "to"] and page.as_uri() in lines[2]

def test_tokens_come_with_their_merges_and_those_that_are_no_text_with_their_bytes(tokenizer):
    model = GPT(TINY, tokenizer=tokenizer)
    content = minimiggy.look(model, tokenizer.encode("the é"))
    merges = content["sections"]["tokens"]["merges"]
    names = named(tokenizer, range(300))
    assert merges and all([names[part] for part in tokenizer.merges[number - 256]] == parts
                          for number, *parts in merges.values())
    assert "".join(content["prompt"]) == "the <c3><a9>" and content["prompt"][-2:] == ["<c3>", "<a9>"]

def test_neighbours_and_map_are_those_of_the_table(tokenizer):
    model = shake(GPT(TINY, tokenizer=tokenizer))
    text = tokenizer.encode_array(TEXT[:20_000].encode())
    knows = minimiggy.look(model, [1], text)["sections"]["knows"]
    table = model.wte.weight.numpy().astype(np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    names = named(tokenizer, range(300))
    common = [token for token, _ in Counter(text.tolist()).most_common(5)]
    places = [names.index(name) for name, _, _ in knows["atlas"]]
    assert places[:5] == common and len(places) == 100 and len(knows["near"]) == 300
    for token in common:
        cosines = np.delete(table @ table[token], token)
        got = [cosine for _, cosine in knows["near"][names[token]]]
        assert got == pytest.approx(sorted(cosines)[:-9:-1], abs=0.006)
    rows = table[places]
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    for i in (1, 2):
        shadow = [place[i] for place in knows["atlas"]]
        assert abs(np.corrcoef(shadow, rows @ vectors[:, -i])[0, 1]) > 0.999
        assert (min(shadow), max(shadow)) == (0, 100)

def test_a_page_of_gpt2s_depth_stays_below_a_megabyte(tokenizer, tmp_path):
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=12, n_head=12, n_embd=12)
    model = GPT(config, tokenizer=tokenizer)
    text = tokenizer.encode_array(TEXT[:9000].encode())
    content = minimiggy.look(model, text[:64].tolist(), text)
    assert len(content["prompt"]) == 45 and "heads" in content["sections"]["looks"]
    minimiggy.write_page(content | {"about": ""}, tmp_path / "look.html")
    assert (tmp_path / "look.html").stat().st_size < 700_000  # (with 50257 tokens their texts add 200 KB)

def test_without_a_text_a_log_or_a_prompt_it_says_what_is_missing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    minimiggy.export(run[0], Path("export"))
    assert main(["--look", "--init-from", "export"]) == 2 and "--data" in capsys.readouterr().err
    assert main(["--look", "to", "--init-from", "export"]) == 0
    sections = content_of(Path("look.html"))["sections"]
    assert "--data" in sections["surprises"]["missing"] and "folder" in sections["learned"]["missing"]
    Path("my.txt").write_text(TEXT[:5000])
    assert main(["--look", "--init-from", "export", "--data", "my.txt"]) == 0
    opening = run[0].tokenizer.encode(TEXT[4500:5000])[:40]
    sections = content_of(Path("look.html"))["sections"]
    assert sections["tokens"]["ids"] == opening[-8:] and "bits" in sections["surprises"]
    capsys.readouterr()
    for flags, words in ((["--eval-only", "--out", "x"], "--out-dir"), (["--look", "--out", "."], "folder")):
        assert main(flags) == 2
        assert words in capsys.readouterr().err

# In a browser: these tests speak with chromedriver as the W3C's WebDriver says, and are skipped without it.

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--window-size=1000,900"]

class Browser:
    """A session of chromedriver, at its address."""
    def __init__(self, address, folder):
        self.address = address
        options = {"args": [*CHROMIUM, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += "/session/" + session["sessionId"]

    def post(self, path, body):
        import requests
        answer = requests.post(self.address + path, json=body, timeout=60).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def script(self, code, *arguments):
        return self.post("/execute/sync", {"script": code, "args": arguments})

    def point_at(self, selector, number):
        element = self.script("const found = document.querySelectorAll(arguments[0])[arguments[1]];"
                              "found.scrollIntoView({block: 'center'}); return found", selector, number)
        move = {"type": "pointerMove", "duration": 0, "origin": element, "x": 0, "y": 0}
        self.post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def press(self, *keys):
        codes = {"Tab": "\ue004", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}
        actions = [{"type": kind, "value": codes[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def see(self, what, **parameters):
        self.post("/goog/cdp/execute", {"cmd": f"Emulation.{what}", "params": parameters})

@pytest.fixture(scope="session")
def browser(page, tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("there is no chromedriver (Debian: apt-get install chromium chromium-driver)")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        said = next(line for line in driver.stdout if "successfully on port" in line)
        port = re.search(r"port (\d+)", said)[1]
        found = Browser(f"http://localhost:{port}", tmp_path_factory.mktemp("profile"))
        found.post("/url", {"url": page.as_uri()})
        yield found
        import requests
        requests.delete(found.address, timeout=60)
    finally:
        driver.terminate()
        driver.wait()

def test_a_browser_draws_each_section_without_an_error(browser, page, run):
    content = content_of(page)
    samples = content["sections"]["learned"]["samples"]
    want = {"#bars .bar": 10, "#heads canvas": 4, "#layers tr": 5, "#surprises button": 288,
            "#atlas button": 100, "polyline": 2, "#learned pre": len(samples), ".missing": 0, "script": 2}
    for selector, number in want.items():
        assert browser.script("return document.querySelectorAll(arguments[0]).length", selector) == number
    assert len(samples) >= 1
    text = browser.script("return document.querySelector('#tokens .strip').textContent")
    assert text == "<b>↵␣to␣be" and browser.script("return document.querySelector('#tokens b')") is None
    for selector in ("#about", "#history", "#others", "#head", "#bits", "#alike"):
        assert browser.script("return document.querySelector(arguments[0]).textContent", selector), selector
    painted = "return document.querySelector('#map').getContext('2d').getImageData(0, 0, 1, 1).data[3]"
    assert browser.script(painted) == 255  # the first token can look at itself only
    assert browser.post("/se/log", {"type": "browser"}) == []

def test_the_sliders_give_the_probabilities_of_draw(browser, page):
    places = content_of(page)["sections"]["expects"]["places"]
    line = [height for _, height in places[0]["likely"]]
    for n, height in places[0]["tail"]:  # (the others have these heights, as far as the page knows)
        line += [height] * n
    line = np.array(line)
    for how in [(1, 0, 1), (0.5, 0, 1), (2, 7, 1), (1, 0, 0.3), (0.8, 50, 0.9), (1, 0, 0.98)]:
        got = browser.script("return chances(sections.expects.places[0], ...arguments)", *how)
        temperature, top_k, top_p = how
        p = np.exp(line / temperature)
        p[top_k or len(p):] = 0
        share = np.cumsum(p) / p.sum()
        p[1 + int((share < top_p).sum()):] = 0
        assert got == pytest.approx((p / p.sum())[:100].tolist(), rel=1e-9)
        drawn = {minimiggy.draw(line, np.random.default_rng(i), *how) for i in range(300)}
        assert all(token >= 100 or got[token] > 0 for token in drawn)
    assert browser.script("return chances(sections.expects.places[0], 0, 0, 1)") == [1] + [0] * 99
    widths = "return [...document.querySelectorAll('#bars .bar div')].map((bar) => bar.style.backgroundSize)"
    before = browser.script(widths)
    browser.script("document.querySelector('#temperature').focus()")
    browser.press("Left", "Left", "Left", "Left")
    assert browser.script("return document.querySelector('#temperature').value") == "0.8"
    assert browser.script(widths) != before
    browser.press("Right", "Right", "Right", "Right")
    assert browser.script(widths) == before

PLACE = """return [...document.querySelectorAll('section')].slice(0, 3).map((section) =>
    [...section.querySelectorAll('.strip button')].findIndex((button) => button.ariaPressed === 'true'))"""

def test_pointing_and_keys_choose_tokens_and_heads(browser):
    lines = "return [...document.querySelectorAll('#lines path')].map((line) => line.getAttribute('d'))"
    browser.point_at("#looks .strip button", 3)
    assert browser.script(PLACE) == [3, 3, 3] and len(browser.script(lines)) == 4
    browser.point_at("#looks .strip button", 1)
    assert browser.script(PLACE) == [1, 1, 1] and len(browser.script(lines)) == 2
    browser.script("document.querySelector('#looks .strip [aria-pressed=true]').focus()")
    browser.press("Right", "Right", "Left")
    assert browser.script(PLACE) == [2, 2, 2]
    browser.press("Tab")  # one step leads past all tokens, to the heads
    before = browser.script("return document.querySelector('#head').textContent")
    browser.press("Down" if before.startswith("layer 1") else "Up")
    after = browser.script("return document.querySelector('#head').textContent")
    assert before[5:7] != after[5:7] and before[8:16] == after[8:16]
    assert browser.script("return document.activeElement.getAttribute('aria-label')") in after
    here = "return [...document.querySelectorAll('#layers .here')].map((cell) => cell.cellIndex)"
    assert browser.script(here) == [3] * 5
    browser.point_at("#surprises button", 5)
    assert " bits" in browser.script("return document.querySelector('#bits').textContent")

def test_the_page_fits_a_phone_and_the_night(browser):
    colour = "return getComputedStyle(document.body).backgroundColor"
    day = browser.script(colour)
    browser.see("setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert browser.script("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    browser.see("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    night = browser.script(colour)
    assert sum(map(int, re.findall(r"\d+", day))) > 600 > 100 > sum(map(int, re.findall(r"\d+", night)))
    assert browser.post("/se/log", {"type": "browser"}) == []

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as room:
        all_the_same = kill_and_resume(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else room)
    sys.exit(not all_the_same)
