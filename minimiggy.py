"""MiniMiggy: a GPT you can train, sample and read, in one file, on tinygrad.

    python minimiggy.py --train                  # learn to write verse, in about a minute on a laptop
    python minimiggy.py --sample "ROMEO:"        # let the newest checkpoint write

Read it from top to bottom, like a short book. No chapter uses an idea that an earlier one has not explained.

     0. Before tinygrad is imported   what the machine must offer, and how we arrange it
     1. The two configs               every knob, its unit, its default
     2. The text                      where it comes from, and which part is kept for the exam
     3. The tokenizer                 from text to numbers and back, with nothing out of vocabulary
     4. The model, the plain way      a GPT in ordinary tensor operations: the definition
     5. The same model, fast          the few kernels that make it quick, each equal to chapter 4
     6. Adam and the training step    how the numbers get better, and what one sees meanwhile
     7. Checkpoints                   one file that holds everything, written so that nothing is lost
     8. Sampling                      one token at a time, remembering what was computed
     9. At home elsewhere             from GPT-2's weights, and to the tools that others use
    10. Seeing it and proving it      curves, gradients checked by finite differences, speed against the machine
    11. The command line              flags made from chapter 1, and errors that help

Shapes stand in comments as (B, T, C): B sequences side by side in a batch, T tokens each, C channels a token
(n_embd). V is the vocabulary's size, H the number of attention heads, D = C / H a head's width.

MIT licence.
"""
from __future__ import annotations

import argparse
import codecs
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import heapq
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import timeit
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

# ====================================================================================================================
# Chapter 0. Before tinygrad is imported
#
# A tensor library such as tinygrad does not come with a thousand compiled operations. It *writes a small C program*
# for whatever we ask it to compute and hands that to a C compiler: on a CPU, clang. Few laptops have clang, but the
# Python package `ziglang` contains a whole one, so `pip install` is all that is needed. tinygrad reads the environment
# variables CC (which compiler?) and DEV (which device?) when it is imported, so we set first what the user has not.

class UserError(Exception):
    """A mistake that its reader can mend: the command line prints the text as one line and exits with code 2."""

@contextmanager
def whole(path: Path):
    """A binary file to write, which takes the place of `path` whole when the block ends well, or else not at all.
    A laptop's lid closes in the middle of a save. So everything that this program keeps is written under another name,
    flushed to the disk, and then renamed: a rename happens or does not, and nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally: unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name itself must reach the disk as well
    os.fsync(folder)
    os.close(folder)

VERSION = "1.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimiggy"
try:
    CACHE.mkdir(parents=True, exist_ok=True)
    if not os.access(CACHE, os.W_OK): raise PermissionError
except OSError:  # a home that cannot be written to: a temporary folder will do, also for tinygrad's own cache
    CACHE = Path(tempfile.mkdtemp(prefix="minimiggy-"))
    os.environ.setdefault("CACHEDB", str(CACHE / "cache.db"))

def find_compiler() -> str | None:
    """Make sure that tinygrad finds a clang; return None, or the line that tells the user what to install."""
    if "CC" in os.environ or shutil.which("clang"): return None
    try:
        import ziglang
    except ImportError: return "no C compiler: `pip install ziglang` brings one (or install clang, or set CC to one)"
    zig = Path(ziglang.__path__[0]) / "zig"
    # CC must name one program, but zig's clang is called as `zig clang ...`: a two-line launcher joins them. Its name
    # carries a hash of its text, so two virtual environments never overwrite each other's.
    script = f'#!/bin/sh\nexec {shlex.quote(str(zig))} clang "$@"\n'.encode()
    launcher = CACHE / f"clang-{hashlib.sha256(script).hexdigest()[:12]}"
    if not launcher.exists():
        with whole(launcher) as file:
            file.write(script)
            os.fchmod(file.fileno(), 0o755)
    os.environ["CC"] = str(launcher)
    return None

# Ask for the CPU with the vector units it has, unless the user names a device (DEV=CUDA, DEV=METAL, ...). By itself
# clang uses only half the width of AVX-512 registers: 107 instead of 166 GFLOP/s on a matrix product.
WIDE = Path("/proc/cpuinfo").exists() and "avx512f" in Path("/proc/cpuinfo").read_text()
os.environ.setdefault("DEV", "CPU:CLANG:x86_64,native,prefer-vector-width=512" if WIDE else "CPU")
os.environ.setdefault("BEAM_MAX_TASKS_PER_CHILD", "1000")  # else its compiling processes start anew every 16 kernels
MISSING_COMPILER = find_compiler() if os.environ["DEV"].startswith("CPU") else None

if __name__ == "__main__" and not importlib.util.find_spec("tinygrad"):
    print("minimiggy: tinygrad is not installed: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

import numpy as np
from tinygrad import Device, Tensor, TinyJit, UOp, codegen, dtypes
from tinygrad.codegen import to_program
from tinygrad.dtype import AddrSpace
from tinygrad.engine import realize, worker
from tinygrad.engine.realize import get_call_arg_uops, get_runtime
from tinygrad.helpers import diskcache_get, diskcache_put
from tinygrad.nn.state import get_state_dict
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import KernelInfo, Ops

# ====================================================================================================================
# Chapter 1. The two configs
#
# Everything that can be chosen stands here once, with its help text and the range of values that make sense. The
# command line of chapter 11 is made from these classes, so the flags, their help and the checks cannot drift apart.

def knob(default, low, high, help):
    """A config field: its default, its smallest and largest sensible value, and a help text that names the unit."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": help})

class Config:
    def __post_init__(self):
        """Raise UserError for the first field of another type or outside its range (as a NaN is)."""
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if type(value) not in (int, type(f.default)) or not low <= value <= high:
                raise UserError(f"--{f.name.replace('_', '-')} must be between {low} and {high}, not {value}")

@dataclass
class GPTConfig(Config):
    """What the model is. The defaults make a small GPT-2 of about 7 million parameters, most of them embeddings."""
    block_size: int = knob(64, 1, 65536, "tokens that the model sees at once, its context length T")
    vocab_size: int = knob(50257, 2, 400_000, "tokens in the vocabulary, V (how many to learn, for --tokenizer bpe)")
    n_layer: int = knob(4, 1, 1000, "transformer blocks, one after the other")
    n_head: int = knob(4, 1, 1000, "attention heads in a block; must divide --n-embd")
    n_embd: int = knob(128, 1, 65536, "channels a token is represented by, C")
    dropout: float = knob(0.0, 0.0, 0.99, "share of activations zeroed at random while training, against overfitting")

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd} into equal shares")

@dataclass
class TrainConfig(Config):
    """How the model learns. AdamW's betas and the weight decay are nanoGPT's for small models."""
    batch_size: int = knob(8, 1, 65536, "sequences in a batch, B")
    learning_rate: float = knob(1e-3, 0.0, 10.0, "largest step size of Adam, reached after the warm-up")
    warmup_steps: int = knob(100, 0, 10**9, "steps over which the learning rate rises from 0")
    max_iters: int = knob(1000, 1, 10**9, "training steps in all")
    eval_interval: int = knob(100, 1, 10**9, "steps between two evaluations")
    eval_iters: int = knob(20, 1, 10**6, "batches that an evaluation averages over")
    min_lr: float = knob(1e-4, 0.0, 10.0, "learning rate at the end of the cosine decay")
    weight_decay: float = knob(0.1, 0.0, 10.0, "share of lr by which each weight of a matrix shrinks at a step")
    beta1: float = knob(0.9, 0.0, 0.9999, "Adam's memory of the gradient")
    beta2: float = knob(0.99, 0.0, 0.9999, "Adam's memory of the squared gradient")
    grad_clip: float = knob(1.0, 1e-9, 1e9, "longest gradient (2-norm over all parameters); a longer one is shortened")
    grad_accum: int = knob(1, 1, 1000, "batches whose gradients are averaged into one step")
    seed: int = knob(1337, 0, 2**31 - 1, "seed of every random choice: weights, batches, dropout")
    save_every: int = knob(0, 0, 10**9, "steps between two checkpoints; 0: one at each evaluation")
    keep: int = knob(3, 0, 10**9, "newest checkpoints to keep, besides the one of the lowest validation loss; 0: none")

@dataclass
class SampleConfig(Config):
    """How text is written."""
    max_tokens: int = knob(300, 0, 10**9, "tokens to write")
    temperature: float = knob(0.8, 0.0, 100.0, "0: always the likeliest token; 1: as the model thinks; more: bolder")
    top_k: int = knob(0, 0, 1_000_000, "draw among the K likeliest tokens only; 0: among all")
    top_p: float = knob(1.0, 1e-9, 1.0, "draw among the fewest tokens that have this share of all probability")
    num_samples: int = knob(1, 1, 1_000_000, "texts to write, one after the other")

# ====================================================================================================================
# Chapter 2. The text
#
# A GPT learns from nothing but text. The default is "tiny Shakespeare", 1.1 MB of plays, fetched once. A download can
# go wrong in many ways (no network, a cut, a login page in place of the file), so it is checked against a known SHA-256
# before it gets its name. Without a network, a play written for this project stands in: the first run always works.
#
# The last tenth of the text is never trained on. The loss on that part, the *validation* loss, tells whether the model
# has learned the language or merely the lines. We cut by position and not at random: neighbouring passages resemble
# each other, and a random cut would let the model peek.

DATA = Path(__file__).resolve().parent / "data"
SHAKESPEARE = {"url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
TIMEOUT = (5, 30)  # seconds until a server must have answered, and between two pieces of its file

def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch `url` into `path` if nothing is there; else raise OSError and leave nothing under that name. What has come
    until then stays beside it in a .part file, and the next attempt goes on from there. Without a `sha256`, what came
    must have the one that the server announces, as Hugging Face's hub does."""
    if path.exists(): return
    import requests  # here and not above: most runs need no network, and the import costs 0.2 s
    unfinished = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        got = unfinished.stat().st_size if unfinished.exists() else 0
        if sha256 is None:  # the hub's answer points to a store, and tells in quotes what lies there
            told = requests.head(url, allow_redirects=False, timeout=TIMEOUT).headers
            sha256 = told.get("x-linked-etag", told.get("etag", "")).strip('"')
            if len(sha256) != 64: raise OSError("the server announces no SHA-256")
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={got}-" if got else None}  # (None is not sent)
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != 416:  # which says that there is no more: all of it came last time
                response.raise_for_status()
                with open(unfinished, "ab" if response.status_code == 206 else "wb", buffering=0) as file:
                    left = response.headers.get("content-length")
                    of = f" of {(file.tell() + int(left)) / 1e6:.1f}" if left else ""
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        show(f"downloading {path.name}: {file.tell() / 1e6:.1f}{of} MB")
                    os.fsync(file.fileno())
        with open(unfinished, "rb") as file: came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != sha256:
            unfinished.unlink()
            raise OSError("what came is not the file we expect (wrong SHA-256)")
        unfinished.replace(path)
    except OSError as e:  # (requests' errors are OSErrors, too)
        reason = e if type(e) is OSError else type(e).__name__
        raise OSError(f"could not download {path.name} ({reason}): try again, or bring {url} to {path}") from e
    finally: show("")

def read_text(path: Path, replace: bool = False) -> bytearray:
    """A text file as UTF-8, without a byte-order mark and with "\\n" at the ends of lines, a megabyte at a time: a text
    of 200 MB takes that much memory and no more. Bytes that are not UTF-8 are a UserError, or become U+FFFD."""
    text = bytearray()
    try:
        with open(path, encoding="utf-8-sig", errors="replace" if replace else "strict") as file:
            try:
                while piece := file.read(1 << 20):
                    text += piece.encode()
                    show(f"reading {path.name}: {len(text) / 1e6:.0f} MB")
            except UnicodeDecodeError as e:  # e.start counts within the piece that is being decoded
                offset = file.buffer.tell() - len(e.object) + e.start
                raise UserError(f"{path} is not UTF-8 text: byte {e.object[e.start]:#04x} at offset {offset} "
                                "(--replace-bad-bytes reads on, with U+FFFD in such places)") from e
    except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    return text

def load_text(data: str | None, replace: bool = False) -> tuple[bytearray, str]:
    """The text that `--data` asks for, and what to ask for to get it again; None asks for the default."""
    ours, name = {"shakespeare": DATA / "tinyshakespeare.txt", "play": DATA / "play.txt"}, data or "shakespeare"
    if name == "shakespeare":
        try: download(path=ours[name], **SHAKESPEARE)
        except OSError as e:
            if data: raise UserError(f"{e}, or use --data play") from e
            say(f"{e}\ntraining on data/play.txt, a play that came with this file, instead")
            name = "play"
    path = ours.get(name) or Path(name.replace("\0", "\ufffd")).resolve()
    if not path.is_file():
        raise UserError(f"no such file: {name} (--data takes a text file, or one of: shakespeare, play)")
    return read_text(path, replace), name if name in ours else str(path)

def border(text: bytes, i: int) -> int:
    """The first place from `i` on that does not lie within a character: bytes 10xxxxxx of UTF-8 continue one."""
    while i < len(text) and text[i] & 0xC0 == 0x80: i += 1
    return i

def split_text(text: bytes) -> tuple[memoryview, memoryview]:
    """The first 90 % to train on, the last 10 % to validate on."""
    cut = border(text, len(text) * 9 // 10)
    return memoryview(text)[:cut], memoryview(text)[cut:]

def say(line: str = "", end: str = "\n") -> None:
    """Print a line that stays. A terminal that is gone, or a full disk behind it, must not end a training run."""
    with suppress(OSError):
        print(("\r\033[K" if sys.stdout.isatty() else "") + line, end=end, flush=True)

def show(line: str) -> None:
    """Show a line that the next one overwrites; where nobody watches (a file, a pipe) such lines are not written."""
    if sys.stdout.isatty():
        say(line[:shutil.get_terminal_size().columns - 1], end="")

def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor or recolour a terminal; they become U+FFFD."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)

# ====================================================================================================================
# Chapter 3. The tokenizer
#
# A network computes with numbers, so text is cut into *tokens* and each gets a number. Letters as tokens make long
# sequences; words as tokens meet words that they have never seen. Byte-pair encoding (Sennrich et al. 2016,
# arXiv:1508.07909; on bytes: GPT-2, Radford et al. 2019) lies between. It starts from the 256 possible bytes, so that
# any text in any script can be written down, and then again and again makes the most frequent pair of neighbouring
# tokens into a new token. " the" soon is one token, a rare name is several, an emoji is the four bytes that it is.
# Nothing can be out of vocabulary.
#
# We learn the merges ourselves, in half a second. Applying them is a solved problem: tiktoken does it, in Rust.
#
# Merges never cross the borders that this pattern (GPT-2's) draws: it cuts before a space, and keeps letters, digits
# and punctuation apart, so that "dog", "dog." and "dog!" share a token instead of each learning its own.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class BPETokenizer:
    """Text to token ids and back: `BPETokenizer("gpt2")` is GPT-2's vocabulary, `BPETokenizer.train` learns one.
    Attributes: `vocab_size`; `merges`, a list of pairs of ids: token 256 + i is made of the two tokens `merges[i]`
    (None for GPT-2's). ValueError if merges are not like that."""
    LONGEST = 256  # bytes in a token: a text of a million zeros has one "word", which could double for ever

    def __init__(self, name: str = "gpt2", merges: list[tuple[int, int]] | None = None):
        import tiktoken  # here and not above: 0.2 s that `--help` need not wait for
        self.name, self.merges = name, merges
        if name == "gpt2":
            try: self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as e:  # tiktoken downloads the vocabulary once; requests, sockets, files can all fail
                raise UserError("GPT-2's vocabulary could not be downloaded (no network?): use --tokenizer bpe or "
                                "bytes, or set TIKTOKEN_CACHE_DIR to a folder that has it") from e
        else:
            tokens = [bytes([b]) for b in range(256)]
            ranks = {token: i for i, token in enumerate(tokens)}
            for left, right in merges:
                tokens.append(tokens[left] + tokens[right])
                if min(left, right) < 0 or len(tokens[-1]) > self.LONGEST or tokens[-1] in ranks:
                    raise ValueError(f"the tokenizer has an impossible merge, {(left, right)}")
                ranks[tokens[-1]] = len(ranks)
            self.encoding = tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = self.encoding.n_vocab

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learn a vocabulary of `vocab_size` tokens (256: plain bytes) from `text`; fewer if nothing repeats."""
        import regex  # comes with tiktoken; Python's own `re` does not know \p{L}, "any letter of any script"
        if vocab_size < 256:
            raise UserError(f"--vocab-size must be at least 256, one token for each byte, not {vocab_size}")
        # Count each distinct word once: a megabyte of text has only some 15,000 of them.
        word_counts = Counter(match.group() for match in regex.finditer(SPLIT, text))
        words = [list(word.encode("utf-8", "replace")[:cls.LONGEST]) for word in word_counts]
        freqs, counts, places = list(word_counts.values()), Counter(), defaultdict(set)
        for i, word in enumerate(words):  # of each pair: how often it stands, and in which words
            for pair in itertools.pairwise(word):
                counts[pair] += freqs[i]
                places[pair].add(i)
        # A heap (sorted, to begin with) yields the most frequent pair; among equals the one with the smallest ids, so
        # that nothing depends on chance. Its entries go stale as counts change: such a one is recognised and dropped.
        heap = sorted((-count, pair) for pair, count in counts.items())
        tokens, merges = [bytes([b]) for b in range(256)], []
        known = set(tokens)
        while heap and len(tokens) < vocab_size:
            count, (a, b) = heapq.heappop(heap)
            # (the same bytes may be reached by two roads, as in a|bc and ab|c: one token is enough)
            if -count != counts[a, b] or count > -2 or tokens[a] + tokens[b] in known: continue
            new, touched = len(tokens), set()
            tokens.append(tokens[a] + tokens[b])
            known.add(tokens[new])
            merges.append((a, b))
            for i in places.pop((a, b)):
                word, words[i] = words[i], []
                for token in word:
                    if token == b and words[i][-1:] == [a]: words[i][-1] = new
                    else: words[i].append(token)
                for form, sign in ((word, -1), (words[i], 1)):
                    for pair in itertools.pairwise(form):
                        counts[pair] += sign * freqs[i]
                        places[pair].add(i)
                        touched.add(pair)
            for pair in touched:
                if counts[pair] > 0: heapq.heappush(heap, (-counts[pair], pair))
        return cls("bpe", merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of any text."""
        return self.encode_array(text.encode("utf-8", "replace")).tolist()

    def encode_array(self, text: bytes) -> np.ndarray:
        """Token ids (N,), uint16 if they fit, of UTF-8 bytes. Encoding by pieces keeps Python's lists short, and
        tiktoken whole: its regular expressions overflow the stack on a million spaces."""
        ids, n, start = np.empty(len(text), np.uint16 if self.vocab_size <= 1 << 16 else np.int32), 0, 0
        while start < len(text):
            end = border(text, start + (1 << 16))  # or better a little later, before a space: no token goes across
            if space := re.search(rb"[!-~][ \n]", text[end:end + 1000]): end += space.start() + 1
            piece = self.encoding.encode_ordinary(str(text[start:end], "utf-8"))
            ids[n:n + len(piece)], n, start = piece, n + len(piece), end
            if n > 1 << 20: show(f"tokenizing: {start / 1e6:.0f} of {len(text) / 1e6:.0f} MB")
        return ids[:n]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 (a model may write such) become U+FFFD."""
        return b"".join(map(self.decode_bytes, ids)).decode("utf-8", "replace")

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        return self.encoding.decode_single_token_bytes(token) if token < self.vocab_size else b""

    def to_json(self) -> str:
        """All that is needed to build the tokenizer again; goes into a checkpoint."""
        return json.dumps({"name": self.name, "merges": self.merges})

    @classmethod
    def from_json(cls, text: str) -> BPETokenizer:
        """The opposite; ValueError or the like if the text is not of that kind."""
        saved = json.loads(text)
        return cls(saved["name"], saved["merges"] and [(int(a), int(b)) for a, b in saved["merges"]])

# ====================================================================================================================
# Chapter 4. The model, the plain way
#
# A GPT reads T tokens and says, at each place, how likely every token of the vocabulary is to come next. Inside, each
# token is a vector of C numbers, and these T vectors run through the whole network as a "residual stream". A *block*
# reads the stream twice and adds what it found: *attention* lets each token gather information from the tokens before
# it, and an *MLP* works on each token by itself. After n_layer blocks, the vector at a place is compared with every
# token's embedding: the better the match, the likelier that token.
#
# This is GPT-2 exactly (Radford et al. 2019; the transformer is Vaswani et al. 2017, arXiv:1706.03762): normalisation
# before each sublayer, biases, learned positions, the tanh form of GELU, and an output head that is the embedding
# table itself. The names are those of Hugging Face's GPT-2, so a checkpoint is at home there.
#
# `Plain` has the operations that a GPT consists of, each in a few lines of ordinary tensor algebra: they are the
# definition. `GPT` puts them together. Chapter 5 replaces operations, never the GPT.

class Plain:
    """The operations of a GPT in ordinary tensor algebra, differentiated by tinygrad itself. All float32. The class is
    a mere drawer for functions (no `self`), so that another such drawer can take its place."""
    def embed(idx: Tensor, wte: Tensor, wpe: Tensor, start: Tensor | None = None) -> Tensor:
        """Ids (B, T) int32, tables (V, C) and (block_size, C) -> (B, T, C): what the token is, plus where it stands.
        `start`, (1,), is the position of a single token that continues a text; else the first is at 0."""
        return wte[idx] + (wpe[:idx.shape[1]] if start is None else wpe[start])

    def layer_norm(x: Tensor, ln: Layer) -> Tensor:
        """(..., C) -> (..., C): mean 0 and variance 1 along C, then a learned scale and shift (arXiv:1607.06450)."""
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * ln.weight + ln.bias

    def linear(x: Tensor, layer: Layer, residual: Tensor | None = None) -> Tensor:
        """(..., I) @ (I, O) + (O,) -> (..., O), plus a `residual` of that shape. GPT-2 stores weights as (in, out)."""
        return x @ layer.weight + layer.bias + (0 if residual is None else residual)

    def gelu(x: Tensor) -> Tensor:
        """What makes the MLP more than one linear map: nearly 0 below zero, nearly x above, smooth in the middle
        (arXiv:1606.08415, in GPT-2's tanh form)."""
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())

    def attention(qkv: Tensor, n_head: int) -> Tensor:
        """Causal self-attention of H heads, (B, T, 3C) -> (B, T, C). Each token asks a question (query), offers a label
        (key) and a content (value). It takes a weighted average of the values of itself and of the tokens before it;
        the better key and query match, the larger the weight."""
        B, T, C3 = qkv.shape
        q, k, v = qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                         # (B, H, T, T)
        past = Tensor.ones(T, T, dtype=dtypes.bool).tril().to(qkv.device)                 # True: not in the future
        return (past.where(scores, -math.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, T, C3 // 3)

    def cached_attention(qkv: Tensor, n_head: int, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """The same for a single new token, qkv (1, 1, 3C), at position (1,): sampling (chapter 8) computes no token
        twice. Those before it have left their keys and values, (H, P, D) each; its own are added."""
        (H, P, D), places = keys.shape, Tensor.arange(keys.shape[1])
        q, k, v = qkv.reshape(3, H, 1, D)
        here = (places == position).reshape(P, 1)
        keys.assign(here.where(k, keys)).realize(values.assign(here.where(v, values)))
        scores = (places <= position).where(q @ keys.transpose(1, 2) / math.sqrt(D), -math.inf)  # (H, 1, P)
        return (scores.softmax(-1) @ values).reshape(1, 1, H * D)

    def logits(x: Tensor, wte: Tensor) -> Tensor:
        """A single token (1, 1, C) and the table (V, C) -> (V,)."""
        return (x @ wte.transpose(0, 1)).flatten()

    def loss(x: Tensor, wte: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the next tokens: (B, T, C), (V, C), targets (B, T) int32 -> scalar."""
        logits = x @ wte.transpose(0, 1)                                                  # (B, T, V)
        return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()

class Dropout:
    """Zeroes a share `rate` of its input and scales the rest up, so that no unit can rely on a single other one.
    Which elements, is a hash of their position and of `key`, one uint32 that is new at each step: there is no random
    state to keep, so a resumed run draws what the interrupted one would have drawn. Without a key it does nothing:
    evaluation and sampling have none and cannot forget to switch it off."""
    def __init__(self, rate: float, key: Tensor | None):
        self.rate, self.key, self.places = 0.0 if key is None else rate, key, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.rate == 0: return x
        self.places += 1  # each place in the network gets numbers of its own
        h = Tensor.arange(x.numel(), dtype=dtypes.uint32).reshape(x.shape).shard_like(x)
        h = (h + self.key + self.places * 0x9E3779B9 % 2**32) * 0x85EBCA6B
        h = (h ^ (h >> 15)) * 0xC2B2AE35  # multiply, fold, multiply: the finish of MurmurHash3
        return ((h ^ (h >> 13)) >= int(self.rate * 2**32)).where(x / (1 - self.rate), 0)

class Layer:
    """A weight and a bias, without numbers as yet; Plain and Fast say what is done with them."""
    def __init__(self, *shape: int):
        self.weight, self.bias = Tensor.empty(*shape), Tensor.empty(shape[-1])

class Block:
    """Two sublayers, each with a normalisation before it."""
    def __init__(self, C: int):
        self.ln_1, self.ln_2 = Layer(C), Layer(C)
        self.attn = SimpleNamespace(c_attn=Layer(C, 3 * C), c_proj=Layer(C, C))  # c_attn: all queries, keys and values
        self.mlp = SimpleNamespace(c_fc=Layer(C, 4 * C), c_proj=Layer(4 * C, C))

    def __call__(self, x: Tensor, ops, drop: Dropout, attention) -> Tensor:
        """(B, T, C) -> (B, T, C). Only `attention` looks at other tokens; all else works on each by itself."""
        def add(x: Tensor, y: Tensor, layer: Layer) -> Tensor:
            return x + drop(ops.linear(y, layer)) if drop.rate else ops.linear(y, layer, residual=x)
        qkv = ops.linear(ops.layer_norm(x, self.ln_1), self.attn.c_attn)                   # (B, T, 3C)
        x = add(x, attention(qkv), self.attn.c_proj)
        u = ops.gelu(ops.linear(ops.layer_norm(x, self.ln_2), self.mlp.c_fc))              # (B, T, 4C)
        return add(x, u, self.mlp.c_proj)

class GPT:
    """A GPT-2 of any size: `model(idx)` gives logits, `model.loss(idx, targets)` what training lowers.
    (`save_checkpoint`, `load_checkpoint` and `generate` stand where they are explained, in chapters 7 and 8.)
    Attributes: `config`; `tokenizer` and `data`, its text's name and SHA-256 (saved with it; may be None); `ops`, the
    operations in use (`Plain` or `Fast`); the parameters under Hugging Face's names, `wte`, `wpe`, `h[i].ln_1`,
    `h[i].attn.c_attn`, `h[i].attn.c_proj`, `h[i].ln_2`, `h[i].mlp.c_fc`, `h[i].mlp.c_proj`, `ln_f`; `shapes`, theirs by
    name; and `flat`, one float32 vector of all of them. Without a `seed` they wait for `set`."""
    __slots__ = ("__dict__", "flat", "grad", "tokenizer")  # these stand apart: get_state_dict takes all of __dict__

    def __init__(self, config: GPTConfig, tokenizer: BPETokenizer | None = None, seed: int | None = 1337):
        if MISSING_COMPILER: raise UserError(MISSING_COMPILER)
        self.config, self.tokenizer, self.ops, self.data, C = config, tokenizer, default_ops(), None, config.n_embd
        self.wte = SimpleNamespace(weight=Tensor.empty(config.vocab_size, C))
        self.wpe = SimpleNamespace(weight=Tensor.empty(config.block_size, C))
        self.h, self.ln_f = [Block(C) for _ in range(config.n_layer)], Layer(C)
        # All parameters live in one vector, so that Adam, clipping and saving each handle one thing and not fifty.
        # Matrices come first: weight decay is for them alone. Each begins at a multiple of 16 numbers, a cache line.
        # (Its length, a multiple of BLOCK * CORES, lets all cores share it equally: chapter 5. `put`: chapter 6.)
        named = sorted(get_state_dict(self).items(), key=lambda item: item[1].ndim == 1)
        self.shapes, self.places, end = {name: tensor.shape for name, tensor in named}, {}, 0
        for name, shape in self.shapes.items():
            self.places[name], end = slice(end, end + math.prod(shape)), end + -(-math.prod(shape) // 16) * 16
            if len(shape) == 2: self.n_decay = end
        self.flat, self.grad, self.size = None, None, -(-end // (BLOCK * CORES)) * BLOCK * CORES
        if seed is not None: self.set(self.first_weights(np.random.default_rng(seed)))

    def first_weights(self, rng: np.random.Generator):
        """GPT-2's start, as pairs of name and array."""
        for name, shape in self.shapes.items():
            # What 2 n_layer sublayers add to the stream would grow with depth; a smaller start keeps it level.
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 0.02
            yield name, (np.float32(std) * rng.standard_normal(shape, np.float32) if len(shape) == 2 else
                         np.full(shape, name.endswith("weight"), np.float32))  # the scales of norms are 1, biases 0

    def set(self, arrays, dtype=np.float32) -> None:
        """Give the parameters their numbers: pairs of name and array."""
        if self.flat is None:
            self.flat = Tensor(np.zeros(self.size, dtype)).realize()
            for name, parameter in get_state_dict(self).items(): parameter.replace(self.window(self.flat, name))
        for name, array in arrays: put(self.window(self.flat, name), array)

    def window(self, vector: Tensor, name: str) -> Tensor:
        """A tensor that shares its memory with a parameter's stretch of a vector like `flat`. (A slice would do for
        reading, but tinygrad copies slices before it hands them to a kernel.)"""
        start, shape = self.places[name].start * vector.dtype.itemsize, self.shapes[name]
        return Tensor(UOp.from_buffer(vector.uop.buffer.view(math.prod(shape), vector.dtype, start))).reshape(shape)

    def make_room_for_gradients(self) -> None:
        """Give each parameter's .grad a window on the vector `grad` (a model that is only sampled needs none)."""
        if self.grad is not None: return
        self.grad = Tensor(np.zeros(self.size, np.float32)).realize()
        for name, parameter in get_state_dict(self).items(): parameter.grad = self.window(self.grad, name)

    def unpack(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The opposite: cut such a vector (of parameters, of gradients, of Adam's averages) into arrays by name."""
        return {name: flat[self.places[name]].reshape(shape) for name, shape in self.shapes.items()}

    def hidden(self, idx: Tensor, key: Tensor | None = None, start: Tensor | None = None, attention=None) -> Tensor:
        """Ids (B, T) int32 -> the residual stream after the last block, normalised, (B, T, C). Sampling says where the
        ids `start`, and brings an `attention` of its own, a function of a block's number and its qkv."""
        attention = attention or (lambda i, qkv: self.ops.attention(qkv, self.config.n_head))
        drop = Dropout(self.config.dropout, key)
        x = drop(self.ops.embed(idx, self.wte.weight, self.wpe.weight, start))
        for i, block in enumerate(self.h): x = block(x, self.ops, drop, functools.partial(attention, i))
        return self.ops.layer_norm(x, self.ln_f)

    def __call__(self, idx: Tensor) -> Tensor:
        """Ids (B, T) int32, T <= block_size -> logits (B, T, V) float32 of the token that comes next at each place."""
        return self.hidden(idx) @ self.wte.weight.transpose(0, 1)

    def loss(self, idx: Tensor, targets: Tensor, key: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, a scalar; `targets` (B, T) is `idx` one place on. `key` switches dropout on."""
        return self.ops.loss(self.hidden(idx, key), self.wte.weight, targets)

# ====================================================================================================================
# Chapter 5. The same model, fast
#
# Chapter 4 run as it stands trains 25 times slower than PyTorch on the same two cores (1136 ms a step instead of 47; at
# the end of this chapter it is 30). A core can do some 100 billion additions and multiplications a second, but only
# with numbers that are in its *registers*; fetching one from the cache takes several times as long as using it, and
# from memory a hundred times. Three things go wrong in the plain form:
#
# - Products. In a product of N x N matrices each number is used N times. tinygrad's own C loops fetch it nearly every
#   time: 15 billion operations a second. Ours keep a tile of the result in registers and a panel of one matrix in the
#   cache: 80 to 110 billion, on each core.
# - Fusion. tinygrad merges operations into one loop to save trips to memory, and so computes a GELU anew for every
#   *column* of the product that follows it. Our kernels begin and end where they should.
# - Cores. tinygrad 0.14 uses one. Our kernels share a loop among all.
#
# The kernels are written in UOps, the language that tinygrad itself compiles to C. Each has its way back (the gradient)
# beside it, and the tests hold both against chapter 4's.

# 5.1 A kernel, statement by statement
# ruff: noqa: B023  (a lambda that reads a loop's variable is called in the same turn of the loop)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROWS, COLS, DEPTH = 4, 64 if WIDE else 16, 1024  # a product's tile, half of a core's vector registers; a panel's height
LANES = 32 if WIDE else 16  # queries in a block of attention

class Array:
    """An argument of a kernel or a local array: a[i, j] reads and a[i, j] = x writes an element, in the order of the
    program text. (What is read goes into the very next write: later, it might be read again.) The first index counts
    through all leading dimensions, so a[i, c] is in row i of an array (B, T, C) seen as (B * T, C)."""

    def __init__(self, kernel: Kernel, memory: UOp):
        self.kernel, self.shape, self.rows = kernel, memory.shape, math.prod(memory.shape[:-1])
        self.flat = memory.src[0] if memory.op is Ops.RESHAPE else memory

    def at(self, place, *index) -> UOp:
        for i, n in zip(index, self.shape[len(self.shape) - len(index):], strict=True): place = place * n + i
        return self.flat.after(*self.kernel.last)[place]

    def __getitem__(self, index) -> UOp:
        return self.at(*index) if isinstance(index, tuple) else self.at(index)

    def __setitem__(self, index, value) -> None:
        self.kernel.last = (self[index].store(value),)

class Kernel:
    """Writes a kernel down like a C function: every statement comes after the `last` one, inside the loops `open`."""

    def __init__(self):
        self.ids, self.last, self.open = itertools.count(1000), (), ()

    def array(self, *shape: int, dtype=dtypes.float) -> Array:
        """A local array: in registers if it is small, else on the stack."""
        return Array(self, UOp.placeholder(shape, dtype, next(self.ids), addrspace=AddrSpace.REG))

    def loop(self, end, *more):
        """`for i, j in k.loop(m, n): ...` is a C loop over i < m around one over j < n: Python goes through the body
        once, to write it down. An end that only the running kernel knows must be at least 1."""
        if more:
            for i in self.loop(end):
                for j in self.loop(*more): yield (i, *j) if len(more) > 1 else (i, j)
            return
        if self.last and self.last[0].op is Ops.STORE:  # a loop of one turn keeps it from slipping into the next loop
            self.last = (self.last[0].end(UOp.range(1, next(self.ids))), *self.open)
        loop, again, outer = UOp.range(end, next(self.ids)), (), self.open
        if own_counter := not isinstance(end, int) and end.ranges:
            # The end depends on an outer loop, which tinygrad's ranges cannot: do { ... } while (++counter < end).
            counter, loop = self.array(1, dtype=dtypes.int), UOp.loop(next(self.ids))
            counter[0] = 0
            loop = loop.replace(src=loop.src + self.last)
        self.open, self.last = (*outer, loop), (*self.last, loop)
        yield counter[0].load() if own_counter else loop
        if own_counter:
            counter[0] += 1
            again = (counter[0] < end,)
        self.open, self.last = outer, (self.last[0].end(loop, *again), *outer)

    def share(self, n: int):
        """A loop over this core's equal share of 0 to n; as many cores take part as n can be divided by. (A kernel that
        asks for its core_id is called once for each core.)"""
        cores = divisor(n, CORES)
        core = UOp.variable("core_id", 0, cores - 1, dtypes.int, param=True)
        for i in self.loop(n // cores): yield core * (n // cores) + i

    def product(self, M: int, N: int, K: int, a, b, rows: int = 0, share: bool = False):
        """For i < M and j < N: i, j and the sum over k < K of a(i, k) * b(k, j); the one place in this file where
        matrices are multiplied. A tile of `rows` x N sums is in registers; for each k, a vector of b is fetched once
        for all its rows, and a number of a once for all columns. Rows are unrolled here; columns are left to clang,
        which makes vectors of them. With `share`, each core takes some tiles."""
        rows = rows or divisor(M, 8)
        sums = self.array(rows, N)
        for tile in (self.share if share else self.loop)(-(-M // rows)):
            numbered = [(r, step_back(tile, rows, M) + r) for r in range(rows)]
            for j in self.loop(N):
                for r, _ in numbered: sums[r, j] = 0.0
            for k, j in self.loop(K, N):
                b_kj = b(k, j)
                for r, i in numbered: sums[r, j] += a(i, k) * b_kj
            for j in self.loop(N):
                for r, i in numbered: yield i, j, sums[r, j]

    def sum(self, n: int, term) -> UOp:
        """The sum of term(i) over i < n, in up to 16 lanes (a compiler may not reorder a sum)."""
        lanes = divisor(n, 16)
        sums = self.array(lanes)
        for lane in self.loop(lanes): sums[lane] = 0.0
        for i, lane in self.loop(n // lanes, lanes): sums[lane] += term(i * lanes + lane)
        return sum(sums[lane] for lane in range(lanes))

def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, most + 1) if n % d == 0)

def step_back(tile, size: int, n: int):
    """Where a tile begins: the last one steps back to end at n, and computes some results a second time."""
    return tile * size if n % size == 0 else (tile * size).minimum(n - size)

def exp(x: UOp) -> UOp:
    """e^x for x <= 0 as 2^n * 2^f, f between -1/2 and 1/2: unlike a call of expf, this becomes vector instructions."""
    t = (x * (1 / math.log(2))).maximum(-126.0)
    n = (t - 0.5).cast(dtypes.int)
    f, power = t - n.cast(dtypes.float), t.const_like(math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):  # the Taylor series of 2^f
        power = power * f + math.log(2) ** k / math.factorial(k)
    return power * ((n + 127) * (1 << 23)).bitcast(dtypes.float)  # 2^n: n goes into the bits of the exponent

@functools.cache
def written_down(kernel, *arguments: UOp, **options) -> UOp:
    k = Kernel()
    kernel(k, *(Array(k, memory) for memory in arguments), **options)
    name = "_".join(map(str, (kernel.__name__, *arguments[0].shape)))
    return k.last[0].sink(arg=KernelInfo(name=name, opts_to_apply=(), estimates=Estimates()), tag=1)  # (tag: as it is)

def run(kernel, *arguments: Tensor, back=None, **options) -> list[Tensor]:
    """Run a kernel on tensors, outputs first; `back` is its gradient."""
    fxn = functools.partial(written_down, kernel, **options)
    return arguments[0].custom_kernel(*arguments[1:], fxn=fxn, grad_fxn=back)

# 5.2 Matrix products

def matmul(k, C, A, B, *more, a_transposed=False, b_transposed=False, column_sums=None):
    """C = A @ B, (M, N) = (M, K) @ (K, N), either one transposed in memory if so said, plus what is in `more`: a vector
    for every row, or a matrix. `column_sums` is where the sums of B's columns go, if they are wanted.

    A panel of B, DEPTH x COLS, is packed into a copy without gaps, which stays in the cache while A streams past;
    without it, rows that lie 4 KB apart compete for the same places in the cache, at half the speed."""
    M, N, K = C.rows, C.shape[-1], A.rows if a_transposed else A.shape[-1]
    rows, cols, blocks = min(ROWS, M), min(COLS, N), -(-K // DEPTH)
    if blocks > 1: rows, cols = divisor(M, rows), divisor(N, cols)  # sums go on in C: no two tiles may overlap
    depth, panels = -(-K // blocks), -(-N // cols)
    by_panels = divisor(panels, CORES) >= divisor(-(-M // rows), CORES)  # else the cores share the tiles
    panel, sums = k.array(depth, cols), k.array(cols)
    for number in (k.share if by_panels else k.loop)(panels):
        j0 = step_back(number, cols, N)
        for j in k.loop(cols): sums[j] = 0.0
        for block in k.loop(blocks):
            k0 = step_back(block, depth, K)
            for outer, inner in k.loop(*((cols, depth) if b_transposed else (depth, cols))):  # the order of memory
                kk, j = (inner, outer) if b_transposed else (outer, inner)
                value = B[j0 + j, k0 + kk] if b_transposed else B[k0 + kk, j0 + j]
                panel[kk, j] = value if K % depth == 0 else (k0 + kk < block * depth).where(0.0, value)  # none twice
                if column_sums: sums[j] += panel[kk, j]
            a = lambda i, kk: A[k0 + kk, i] if a_transposed else A[i, k0 + kk]
            for i, j, value in k.product(M, cols, depth, a, panel.at, rows, share=not by_panels):
                start = sum((e[j0 + j] if len(e.shape) == 1 else e[i, j0 + j] for e in more), 0.0)
                C[i, j0 + j] = value + (start if blocks == 1 else (block > 0).where(C[i, j0 + j], start))
        if column_sums:
            for j in k.loop(cols): column_sums[j0 + j] = sums[j]

def weights_back(k, dw, db, x, dy):
    """The gradients of a product's weight, x^T @ dy, and of its bias."""
    matmul(k, dw, x, dy, a_transposed=True, column_sums=db)

def matvec(k, y, x, w, *more):
    """The same for a single row, y (N), as sampling needs it. Here every weight is used once, and all depends on how
    quickly they come from memory: eight rows far apart are read side by side (26 GB/s on one core; one by one, 17)."""
    (K, N), streams = w.shape, divisor(w.shape[0], 8)
    for j in k.share(N): y[j] = sum(e[j] for e in more)
    for i in k.loop(K // streams):
        rows = [i + s * (K // streams) for s in range(streams)]
        for j in k.share(N): y[j] = sum((x[r] * w[r, j] for r in rows), y[j])

# 5.3 Flash attention (Dao et al. 2022, arXiv:2205.14135)
#
# The plain form writes a T x T matrix of scores, reads it for the softmax, writes that and reads it again. Here a block
# of queries meets one block of keys after the other and keeps three things: the largest score so far, the sum of
# exponentials relative to it, and the sum of values weighted by them. When a larger score turns up, both sums fade by
# the factor that they were too large. Memory grows with T, not with its square. On the way back the scores are computed
# again from the saved logarithm of each sum: quicker than reading them. All is transposed, so that the Q queries of a
# block lie across the lanes of the vector registers: no softmax needs a sum across lanes, and keys and values are used
# as they lie in memory, one number at a time for all queries.

def flash(k, y, lse, qkv):
    """qkv (B, T, 3, H, D) -> y (B, T, H, D), and lse (B, H, T), the logarithm of each query's sum of exponentials."""
    (B, T, _, H, D), Q = qkv.shape, divisor(qkv.shape[1], LANES)
    query, score, out = k.array(D, Q), k.array(Q, Q), k.array(D, Q)
    top, old_top, total, fade = (k.array(Q) for _ in range(4))
    for bh in k.share(B * H):
        for block in k.loop(T // Q):
            b, h, i0 = bh // H, bh % H, block * Q
            for i in k.loop(Q): top[i], total[i] = -1e30, 0.0
            for d, i in k.loop(D, Q): query[d, i], out[d, i] = qkv[b, i0 + i, 0, h, d] * D**-0.5, 0.0
            for key_block in k.loop(block + 1):  # of those that some query here may see
                j0 = key_block * Q
                for i in k.loop(Q): old_top[i] = top[i]
                for j, i, s in k.product(Q, Q, D, lambda j, d: qkv[b, j0 + j, 1, h, d], query.at):
                    score[j, i] = (j0 + j <= i0 + i).where(s, -1e30)
                    top[i] = top[i].maximum(score[j, i])
                for i in k.loop(Q):
                    fade[i] = exp(old_top[i] - top[i])
                    total[i] *= fade[i]
                for j, i in k.loop(Q, Q):
                    score[j, i] = exp(score[j, i] - top[i])
                    total[i] += score[j, i]
                for d, i, s in k.product(D, Q, Q, lambda d, j: qkv[b, j0 + j, 2, h, d], score.at):
                    out[d, i] = out[d, i] * fade[i] + s
            for i, d in k.loop(Q, D): y[b, i0 + i, h, d] = out[d, i] / total[i]
            for i in k.loop(Q): lse[b, h, i0 + i] = top[i] + total[i].log()

def flash_back(k, dqkv, dy, y, lse, qkv):
    """With p the softmax and s the scores: dv = p^T dy, ds = p * (dy v^T - dy . y), dq = ds k, dk = ds^T q."""
    (B, T, _, H, D), Q = qkv.shape, divisor(qkv.shape[1], LANES)
    query, grad, dquery = (k.array(D, Q) for _ in range(3))
    prob, dscore, dot = k.array(Q, Q), k.array(Q, Q), k.array(Q)
    for bh in k.share(B * H):
        b, h = bh // H, bh % H
        for t, part, d in k.loop(T, 3, D): dqkv[b, t, part, h, d] = 0.0
        for block in k.loop(T // Q):
            i0 = block * Q
            for i in k.loop(Q): dot[i] = 0.0
            for d, i in k.loop(D, Q):
                query[d, i], dquery[d, i] = qkv[b, i0 + i, 0, h, d] * D**-0.5, 0.0
                grad[d, i] = dy[b, i0 + i, h, d]
                dot[i] += grad[d, i] * y[b, i0 + i, h, d]
            for key_block in k.loop(block + 1):
                j0 = key_block * Q
                for j, i, s in k.product(Q, Q, D, lambda j, d: qkv[b, j0 + j, 1, h, d], query.at):
                    prob[j, i] = (j0 + j <= i0 + i).where(exp(s - lse[b, h, i0 + i]), 0.0)
                for j, i, s in k.product(Q, Q, D, lambda j, d: qkv[b, j0 + j, 2, h, d], grad.at):
                    dscore[j, i] = prob[j, i] * (s - dot[i])
                for d, i, s in k.product(D, Q, Q, lambda d, j: qkv[b, j0 + j, 1, h, d], dscore.at):
                    dquery[d, i] += s
                for j, d, s in k.product(Q, D, Q, dscore.at, lambda i, d: qkv[b, i0 + i, 0, h, d]):
                    dqkv[b, j0 + j, 1, h, d] += s * D**-0.5
                for j, d, s in k.product(Q, D, Q, prob.at, lambda i, d: dy[b, i0 + i, h, d]):
                    dqkv[b, j0 + j, 2, h, d] += s
            for i, d in k.loop(Q, D): dqkv[b, i0 + i, 0, h, d] = dquery[d, i] * D**-0.5

# 5.4 GELU, layer norm, embeddings, cross-entropy

def gelu(k, out, u, *dg):
    """u * s with s = sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)), the tanh form rewritten; or, given dg, dg * slope."""
    c = 2 * math.sqrt(2 / math.pi)
    for i in k.share(u.rows * u.shape[-1]):
        z = u[i] * (u[i] * u[i] * 0.044715 + 1.0) * c
        e = exp(-(z < 0).where(-z, z))
        s = (z < 0).where(e, 1.0) / (e + 1.0)
        slope = s + u[i] * s * (1.0 - s) * (u[i] * u[i] * (3 * 0.044715) + 1.0) * c
        out[i] = dg[0][i] * slope if dg else u[i] * s

def norm(k, y, stats, x, w, b):
    """y (M, C), and stats (M, 2): the mean of each row of x (M, C), and one over its standard deviation."""
    M, C = x.rows, x.shape[-1]
    for i in k.share(M):
        mean = k.sum(C, lambda c: x[i, c]) * (1 / C)
        scale = (k.sum(C, lambda c: (x[i, c] - mean).square()) * (1 / C) + 1e-5).rsqrt()
        for c in k.loop(C): y[i, c] = (x[i, c] - mean) * scale * w[c] + b[c]
        stats[i, 0], stats[i, 1] = mean, scale

def norm_back(k, dx, dy, x, w, stats):
    M, C = x.rows, x.shape[-1]
    for i in k.share(M):
        mean, scale = stats[i, 0], stats[i, 1]
        hat = lambda c: (x[i, c] - mean) * scale
        g = lambda c: dy[i, c] * w[c]
        along, across = (k.sum(C, term) * (1 / C) for term in (g, lambda c: g(c) * hat(c)))
        for c in k.loop(C): dx[i, c] = (g(c) - along - hat(c) * across) * scale

def norm_weights_back(k, dw, db, dy, x, stats):
    """Sums over rows. Each core takes columns of its own, so no two meet in a sum."""
    M, C = x.rows, x.shape[-1]
    for c in k.share(C): dw[c], db[c] = 0.0, 0.0
    for i in k.loop(M):
        mean, scale = stats[i, 0], stats[i, 1]
        for c in k.share(C):
            dw[c] += dy[i, c] * (x[i, c] - mean) * scale
            db[c] += dy[i, c]

def embed(k, x, wte, wpe, idx, *start):
    B, T, C = x.shape
    for b in k.share(B):
        for t, c in k.loop(T, C): x[b, t, c] = wte[idx[b * T + t], c] + wpe[start[0][0] if start else t, c]

def embed_back(k, dwte, dwpe, dx, idx):
    """Adds to dwte, which the head has written before (their table is one), and writes dwpe. Tokens repeat, so here,
    too, each core takes columns of its own."""
    B, T, C = dx.shape
    for t in k.loop(dwpe.shape[0]):
        for c in k.share(C): dwpe[t, c] = 0.0
    for b, t in k.loop(B, T):
        for c in k.share(C):
            dwte[idx[b * T + t], c] += dx[b, t, c]
            dwpe[t, c] += dx[b, t, c]

def cross_entropy(k, logits, loss, targets, *_):
    """Logits as columns, (V, M), and targets (M,) -> the loss of each token (M,). The logits are overwritten with the
    gradient of that loss, softmax - 1 at the target: they are the largest array there is, so there is only one."""
    (V, M), Q = logits.shape, divisor(logits.shape[1], COLS)
    top, total = k.array(Q), k.array(Q)
    for strip in k.share(M // Q):
        j0 = strip * Q
        for j in k.loop(Q): top[j], total[j] = -1e30, 0.0
        for v, j in k.loop(V, Q): top[j] = top[j].maximum(logits[v, j0 + j])
        for v, j in k.loop(V, Q): total[j] += exp(logits[v, j0 + j] - top[j])
        for j in k.loop(Q): loss[j0 + j] = top[j] + total[j].log() - logits[targets[j0 + j], j0 + j]
        for v, j in k.loop(V, Q):
            logits[v, j0 + j] = exp(logits[v, j0 + j] - top[j]) / total[j] - targets[j0 + j].eq(v).where(1.0, 0.0)

def cached_attention(k, y, keys, values, qkv, position):
    """Attention of one new token, qkv (3, H, D) -> y (H, D), which first takes its place in the caches (H, P, D)."""
    H, P, D = keys.shape
    score, top, total, last = k.array(P), k.array(1), k.array(1), position[0]
    for h in k.share(H):
        for d in k.loop(D): keys[h, last, d], values[h, last, d], y[h, d] = qkv[H + h, d], qkv[2 * H + h, d], 0.0
        top[0], total[0] = -1e30, 0.0
        for j in k.loop(last + 1): score[j] = k.sum(D, lambda d: qkv[h, d] * keys[h, j, d]) * D**-0.5
        for j in k.loop(last + 1): top[0] = top[0].maximum(score[j])
        for j in k.loop(last + 1): score[j] = exp(score[j] - top[0])
        for j in k.loop(last + 1): total[0] += score[j]
        for j, d in k.loop(last + 1, D): y[h, d] += score[j] / total[0] * values[h, j, d]

def dot_rows(k, logits, x, wte):
    """logits (V,), of one token x (C,): each row of the table (V, C) times x."""
    (V, C), part = wte.shape, -(-wte.shape[0] // CORES)
    for core in k.share(CORES):  # V may be odd
        first = step_back(core, part, V)
        for i in k.loop(part): logits[first + i] = k.sum(C, lambda c: wte[first + i, c] * x[c])

# 5.5 Adam in one pass over memory (left to itself, tinygrad makes three, one for each vector that it writes)

BLOCK = 1024  # numbers; the flat vectors have a multiple of CORES such blocks, so that all cores get equal shares

def square_sums(k, parts, grad):
    """parts (cores,): each core's share of the gradient's squared length."""
    n = grad.shape[0] // parts.shape[0]
    for core in k.share(parts.shape[0]): parts[core] = k.sum(n, lambda i: grad[core * n + i].square())

def adamw(k, theta, m, v, grad, parts, rates, n_decay: int, beta1: float, beta2: float, grad_clip: float, decay: float):
    """One step of AdamW in place (AdamW.step has the formulas). A gradient that is not finite changes nothing."""
    norm = sum(parts[core] for core in range(parts.shape[0])).sqrt()
    fine, scale = norm < math.inf, (norm < grad_clip).where(1.0, grad_clip / norm)
    rate, unbias_m, unbias_v = rates[0], rates[1], rates[2]
    for i in k.share(theta.shape[0]):
        g = grad[i] * scale
        m[i] = fine.where(m[i] * beta1 + g * (1 - beta1), m[i])
        v[i] = fine.where(v[i] * beta2 + g * g * (1 - beta2), v[i])
        change = m[i] * unbias_m / ((v[i] * unbias_v).sqrt() + 1e-8) + (i < n_decay).where(decay, 0.0) * theta[i]
        theta[i] = fine.where(theta[i] - rate * change, theta[i])

# 5.6 The operations of chapter 4, made of these kernels

class Fast:
    """Plain's operations by the kernels of this chapter: the same arguments and results, to float32's rounding."""
    written: list[UOp] = []  # noqa: RUF012  the parameters' gradients in the making, for flat_gradient to collect

    def give(kernel, parameters, *arguments: Tensor, **options) -> list[UOp]:
        """Run a kernel that writes gradients of parameters: into their windows on the model's vector of gradients, if
        there is one."""
        outs = [Tensor.zeros(*w.shape).contiguous() if w.grad is None else w.grad for w in parameters]
        given = [g.uop for g in run(kernel, *outs, *arguments, **options)[:len(outs)]]
        Fast.written += given
        return given

    def embed(idx, wte, wpe, start=None):
        def back(dx, _):
            return None, *Fast.give(embed_back, (wte, wpe), Tensor(dx), idx), None
        more = () if start is None else (start,)
        return run(embed, Tensor.empty(*idx.shape, wte.shape[1]), wte, wpe, idx, *more, back=back)[0]

    def layer_norm(x, ln):
        def back(dy, call):
            dy, stats = Tensor(dy), Tensor(call.src[2].after(call))
            dx = run(norm_back, Tensor.empty(*x.shape), dy, x, ln.weight, stats)[0]
            return None, None, dx.uop, *Fast.give(norm_weights_back, (ln.weight, ln.bias), dy, x, stats)
        return run(norm, Tensor.empty(*x.shape), Tensor.empty(*x.shape[:-1], 2), x, ln.weight, ln.bias, back=back)[0]

    def linear(x, layer, residual=None):
        def back(dy, _):
            dx = run(matmul, Tensor.empty(*x.shape), Tensor(dy), w, b_transposed=True)[0].uop
            return None, dx, *Fast.give(weights_back, (w, layer.bias), x, Tensor(dy)), *(dy for _ in more)
        w, more = layer.weight, () if residual is None else (residual,)
        y, kernel = Tensor.empty(*x.shape[:-1], w.shape[1]), matvec if x.numel() == w.shape[0] else matmul
        return run(kernel, y, x, w, layer.bias, *more, back=back)[0]

    def gelu(u):
        back = lambda dg, _: (None, run(gelu, Tensor.empty(*u.shape), u, Tensor(dg))[0].uop)
        return run(gelu, Tensor.empty(*u.shape), u, back=back)[0]

    def attention(qkv, n_head):
        def back(dy, call):
            y, lse = (Tensor(out.after(call)) for out in call.src[1:3])
            return None, None, run(flash_back, Tensor.empty(*x.shape), Tensor(dy), y, lse, x)[0].uop
        (B, T, C3), H = qkv.shape, n_head
        x = qkv.reshape(B, T, 3, H, C3 // 3 // H)
        return run(flash, Tensor.empty(B, T, H, x.shape[-1]), Tensor.empty(B, H, T), x, back=back)[0].reshape(B, T, -1)

    def cached_attention(qkv, n_head, keys, values, position):
        y, x = Tensor.empty(n_head, keys.shape[2]), qkv.reshape(3 * n_head, -1)
        return run(cached_attention, y, keys, values, x, position)[0].reshape(1, 1, -1)

    def logits(x, wte):
        return run(dot_rows, Tensor.empty(wte.shape[0]), x, wte)[0]

    def loss(x, wte, targets):
        def back(dloss, call):
            # The kernel has left the gradient of each token's loss in the logits; `dloss` (B * T,) scales it.
            scale, dlogits = Tensor(dloss).reshape(*targets.shape, 1), Tensor(call.src[1].after(call))
            dwte, = Fast.give(matmul, (wte,), dlogits, (x * scale).contiguous())
            dlogits = Tensor(dlogits.uop.after(dwte))  # so dwte is written before embed_back, far below, adds to it
            dx = run(matmul, Tensor.empty(*x.shape), dlogits, wte, a_transposed=True)[0]
            return None, None, None, (dx * scale).uop, dwte
        logits = Tensor.empty(wte.shape[0], targets.numel())
        logits = run(matmul, logits, wte.detach(), x.detach(), b_transposed=True)[0]
        return run(cross_entropy, logits, Tensor.empty(targets.numel()), targets, x, wte, back=back)[1].mean()

PLAIN = False  # --plain sets it

def default_ops():
    """Fast where its kernels were tried: on tinygrad's CPU device with clang. Elsewhere, and for --plain, Plain."""
    tried = Device.DEFAULT == "CPU" and type(Device["CPU"].renderer).__name__ == "ClangRenderer"
    return Fast if tried and not PLAIN else Plain

# 5.7 Compiled once

class Programs(dict):
    """tinygrad's table of compiled kernels, with a copy in tinygrad's cache on disk. By itself it keeps there only
    what clang made, not what its own Python did, a tenth of a second a kernel: with both, a second run starts in two
    seconds instead of five."""

    def on_disk(self, key: tuple) -> tuple[str, str]:
        return "minimiggy", hashlib.sha256(repr((key[0], str(key[2]), key[3:])).encode()).hexdigest()

    def get(self, key):
        if not super().__contains__(key): super().__setitem__(key, diskcache_get(*self.on_disk(key)))
        return self[key]

    def __contains__(self, key) -> bool:
        return self.get(key) is not None

    def __setitem__(self, key, program) -> None:
        super().__setitem__(key, program)
        sink, linear, *code = program.src  # what running does not need is left out: it would take long to read
        arguments = linear.replace(src=tuple(u for u in linear.src if u.op is Ops.PARAM))
        diskcache_put(*self.on_disk(key), program.replace(src=(UOp.sink(arg=sink.arg), arguments, *code)))

codegen.to_program_cache = realize.to_program_cache = Programs(codegen.to_program_cache)

def start_deaf(process, start=worker._WorkerProcess._Popen):
    """Start one of tinygrad's compiling processes. A terminal sends Ctrl-C to all of a program's processes; these do
    not hear what is held back while they start, and so do not die of it with a traceback each."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try: return start(process)
    finally: signal.pthread_sigmask(signal.SIG_SETMASK, held)

worker._WorkerProcess._Popen = staticmethod(start_deaf)

# 5.8 All cores at once

class Crew:
    """Replays what a TinyJit has recorded, a list of kernels and of the memory that each works on, on `threads` cores.
    tinygrad goes down that list in Python, 40 microseconds a kernel, and calls a shared kernel for one core after the
    other. Here each core gets a thread that goes down a list of its own in compiled code, and after each kernel waits
    until the other cores have come as far: 1.4 microseconds a kernel."""

    def __init__(self, jit: TinyJit, threads: int):
        self.jit, self.done, lists = jit, np.zeros((threads, 8), np.uint64), [[] for _ in range(threads)]
        rest = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value  # the C library's "let others run"
        for call in jit.captured.linear.src:
            program, info, args = get_runtime("CPU", call.src[0]), call.src[0].arg, get_call_arg_uops(call)
            words = [args[i].buffer.ensure_allocated().get_buf("CPU").va_addr for i in info.globals]
            lines = [[program.addr, *words, core] for core in range(info.global_size[0])]  # core_id comes last
            lines += [[rest]] * (-len(lines) % threads)  # a thread without a share rests
            for i, line in enumerate(lines): lists[i % threads].append(line)
        width = max(map(len, itertools.chain(*lists)))
        self.lists = np.array([[x + [0] * (width - len(x)) + [rest] for x in lines] for lines in lists], np.uint64)
        self.program = Device["CPU"].runtime(to_program(self.replay(), Device["CPU"].renderer).to_elf())
        self.arguments = [[ctypes.c_uint64(array.ctypes.data) for array in (lines, mine, self.done)]
                          for lines, mine in zip(self.lists, self.done, strict=True)]
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def replay(self) -> UOp:
        """The loop that each thread runs: call a kernel, tell that it is done, wait for the others."""
        (threads, length, width), n = self.lists.shape, UOp.range(self.lists.shape[1], 0)
        lines, mine, done = (UOp.param(slot, dtypes.uint64, (size,), volatile=True) for slot, size in
                             enumerate((length * width, 1, 8 * threads)))  # 8: a cache line for each thread
        count, line = n.cast(dtypes.uint64) + 1, [lines.after(n)[n * width + word].load() for word in range(width - 1)]
        last = mine.after(UOp(Ops.BARRIER, src=(line[0].call(*line[1:], ret_dtype=dtypes.void),)))[0].store(count)
        for thread in range(threads):
            loop = UOp.loop(1 + thread)
            nap = lines.after(last, loop)[n * width + width - 1].load().call(ret_dtype=dtypes.void)
            seen = done.after(last, nap)[thread * 8].load()
            last = seen.end(loop, seen < count)
        return UOp(Ops.BARRIER, src=(last,)).end(n).sink(arg=KernelInfo("replay", opts_to_apply=()), tag=1)

    def __call__(self):
        self.done[:] = 0
        others = [self.pool.submit(self.program.fxn, *arguments) for arguments in self.arguments[1:]]
        self.program.fxn(*self.arguments[0])
        for other in others: other.result()
        return self.jit.captured.ret

# ====================================================================================================================
# Chapter 6. Adam and the training step
#
# Training is one step over and over. Take a batch of random passages; predict every next token in them; measure the
# loss; compute its gradient, the direction in which each parameter would raise it; go a little the other way. How far,
# is Adam's business (Kingma & Ba 2015, arXiv:1412.6980): it keeps two running averages for each parameter, of the
# gradient (m, so that noise cancels) and of its square (v, so that each parameter gets a step suited to its own
# scale). AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) also shrinks every matrix weight a little at each step.
#
# TinyJit records the kernels that the step runs and from then on replays the recording: Python's own time, tens of
# milliseconds of building and scheduling the graph, is paid once.

def get_batch(data: np.ndarray, config: TrainConfig, block_size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step, (grad_accum, B, T) int32 twice, the second one place on: a function of seed and step."""
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(0, len(data) - block_size, (config.grad_accum, config.batch_size, 1))
    windows = data[starts + np.arange(block_size + 1)]                        # (grad_accum, B, T + 1)
    return windows[..., :-1].astype(np.int32), windows[..., 1:].astype(np.int32)

def learning_rate(config: TrainConfig, step: int) -> float:
    """Rise over the warm-up (Adam's averages are poor at first), then fall along half a cosine to min_lr."""
    if step < config.warmup_steps: return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_iters - config.warmup_steps)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

def put(tensor: Tensor, array: np.ndarray) -> None:
    """Copy an array of the tensor's dtype into its own memory, where recorded kernels will look for it."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    buffer.allocator._copyin(buffer._buf, memoryview(np.ascontiguousarray(array)).cast("B"))

def fetch(tensor: Tensor) -> np.ndarray:
    """A copy of a computed float32 tensor; quicker than tensor.numpy(), which first looks for work to do."""
    array, buffer = np.empty(tensor.shape, np.float32), tensor.uop.base.buffer
    buffer.allocator._copyout(memoryview(array.reshape(-1)).cast("B"), buffer._buf)
    return array

def recorded(ops, function, threads: int | None = None):
    """`function`, which takes nothing, with its kernels recorded at the first call and replayed from then on."""
    replay = jit = TinyJit(function)
    jit.cnt = 1  # TinyJit counts its calls and runs the first one unrecorded; we need no trial run
    def call():
        nonlocal replay
        result = replay()
        if ops is Fast and replay is jit and jit.captured is not None: replay = Crew(jit, threads or CORES)
        return result
    return call

def flat_gradient(model: GPT, loss: Tensor) -> Tensor:
    """Compute `loss` and its gradient for all parameters; return the latter, model.grad in the layout of model.flat."""
    model.make_room_for_gradients()
    if model.ops is Fast:
        # The kernels write into model.grad themselves, and Fast.written lists what they wrote. Asking for one gradient
        # at the bottom of the model builds the whole way back.
        Fast.written.clear()
        loss.gradient(model.wpe.weight)
        written = [Tensor(gradient) for gradient in Fast.written]
    else:
        parameters = get_state_dict(model).values()
        written = [p.grad.assign(g) for p, g in zip(parameters, loss.gradient(*parameters), strict=True)]
    Tensor.realize(loss, *written)
    return model.grad

DEVICES = 1  # --devices sets it, where Plain runs

def spread_loss(model: GPT, x: Tensor, y: Tensor, key: Tensor) -> Tensor:
    """The loss of a batch (B, T), computed on DEVICES devices. Each gets a share of the sequences and a copy of all
    parameters; tinygrad sums their gradients on the first. (Fast's kernels share their loops among cores instead.)"""
    if DEVICES == 1 or model.ops is Fast: return model.loss(x, y, key)
    devices, parameters = tuple(f"{Device.DEFAULT}:{n}" for n in range(DEVICES)), get_state_dict(model).values()
    before = [Tensor(parameter.uop) for parameter in parameters]
    for parameter in parameters: parameter.replace(parameter.shard(devices))
    loss = model.loss(x.shard(devices, axis=0), y.shard(devices, axis=0), key.shard(devices)).to(Device.DEFAULT)
    for parameter, single in zip(parameters, before, strict=True): parameter.replace(single)
    return loss

class AdamW:
    """Adam with decoupled weight decay over the model's one vector of parameters; `m` and `v` have its shape."""
    def __init__(self, model: GPT, config: TrainConfig):
        model.make_room_for_gradients()
        self.model, self.config = model, config
        self.m, self.v = (Tensor(np.zeros(model.flat.shape, np.float32)).realize() for _ in range(2))
        shape = (config.grad_accum, config.batch_size, model.config.block_size)
        self.x, self.y = (Tensor(np.zeros(shape, np.int32)).realize() for _ in range(2))
        self.rates, self.key = Tensor(np.zeros(3, np.float32)).realize(), Tensor(np.zeros(1, np.uint32)).realize()
        self.run = recorded(model.ops, self.step)

    def step(self) -> tuple[Tensor, Tensor]:
        """One training step with the batch in `x` and `y`, ids (grad_accum, B, T); returns the loss (nats) and the
        gradient's norm before clipping, both scalars. `rates` (3,) holds the learning rate and the two bias corrections
        1 / (1 - beta ** t), which make up for the averages having started at zero."""
        c, model, losses, grad = self.config, self.model, [], None
        for i in range(c.grad_accum):
            losses.append(spread_loss(model, self.x[i], self.y[i], self.key + i))
            part = flat_gradient(model, losses[-1])
            grad = part if c.grad_accum == 1 else (part / c.grad_accum + (0 if grad is None else grad)).contiguous()
            grad.realize()
        loss = sum(losses) / c.grad_accum
        if model.ops is Fast:
            parts = run(square_sums, Tensor.empty(divisor(grad.shape[0] // BLOCK, CORES)), grad)[0]
            done = run(adamw, model.flat, self.m, self.v, grad, parts, self.rates, n_decay=model.n_decay, beta1=c.beta1,
                       beta2=c.beta2, grad_clip=c.grad_clip, decay=c.weight_decay)[:3]
            norm = parts.sum().sqrt()
        else:
            norm = grad.square().sum().sqrt().contiguous()
            fine, grad = norm < math.inf, grad * (c.grad_clip / norm).minimum(1)
            m, v = c.beta1 * self.m + (1 - c.beta1) * grad, c.beta2 * self.v + (1 - c.beta2) * grad.square()
            decay = (Tensor.arange(grad.shape[0]) < model.n_decay).where(c.weight_decay, 0.0)
            change = self.rates[0] * (m * self.rates[1] / ((v * self.rates[2]).sqrt() + 1e-8) + decay * model.flat)
            pairs = (self.m, m), (self.v, v), (model.flat, model.flat - change)
            done = [old.assign(fine.where(new, old)) for old, new in pairs]
        return loss.realize(norm, *done), norm

    def __call__(self, data: np.ndarray, i: int) -> tuple[float, float]:
        """Take step number `i`; return its loss and gradient norm as numbers."""
        c = self.config
        x, y = get_batch(data, c, self.model.config.block_size, i)
        rates = learning_rate(c, i), 1 / (1 - c.beta1 ** (i + 1)), 1 / (1 - c.beta2 ** (i + 1))
        key = np.random.default_rng((c.seed, i, 1)).integers(2**32, size=1).astype(np.uint32)
        inputs = (self.x, x), (self.y, y), (self.rates, np.array(rates, np.float32)), (self.key, key)
        for tensor, array in inputs: put(tensor, array)
        loss, norm = self.run()
        return float(fetch(loss)), float(fetch(norm))

def evaluate(model: GPT, data: np.ndarray, batch_size: int, batches: int | None = None) -> float:
    """Mean loss in nats a token over `batches` batches spread evenly over `data`; None: enough to cover all of it. The
    windows are the same each time and no random number is drawn, so evaluating never changes a training run."""
    T = model.config.block_size
    batches = batches or math.ceil(len(data) / (batch_size * T))
    starts = np.linspace(0, len(data) - T - 1, batches * batch_size, dtype=np.int64).reshape(batches, batch_size, 1)
    (x, y, loss), total = eval_loss(model, batch_size), 0.0
    for start in starts:
        windows = data[start + np.arange(T + 1)].astype(np.int32)                          # (B, T + 1)
        put(x, windows[:, :-1])
        put(y, windows[:, 1:])
        total += float(fetch(loss()))
    return total / batches

@functools.lru_cache(maxsize=1)
def eval_loss(model: GPT, batch_size: int):
    """Two tensors for a batch, and the model's loss on them as a recorded function, kept for the next evaluation."""
    x, y = (Tensor(np.zeros((batch_size, model.config.block_size), np.int32)).realize() for _ in range(2))
    return x, y, recorded(model.ops, lambda: model.loss(x, y).realize())

def bits_per_byte(tokenizer: BPETokenizer, data: np.ndarray) -> float:
    """The factor from nats a token to bits a byte of text, in which tokenizers can be compared."""
    lengths = np.array([len(tokenizer.decode_bytes(i)) for i in range(tokenizer.vocab_size)])
    n_bytes = sum(int(lengths[data[i:i + (1 << 20)]].sum()) for i in range(0, len(data), 1 << 20))
    return len(data) / math.log(2) / n_bytes

COLUMNS = ["step", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_s", "train_bpb"]

def log_rows(log: Path, start: int) -> list[str]:
    """The rows of log.csv up to step `start`: a run that goes on from there writes what comes after it again."""
    lines = log.read_text(errors="replace").splitlines()[1:] if start and log.exists() else []
    row = re.compile(r"\d{1,9}" + r"(,(-?\d+(\.\d+)?(e[-+]?\d+)?|inf|nan)?)" * (len(COLUMNS) - 1))
    return [line for line in lines if row.fullmatch(line) and int(line.split(",")[0]) <= start]

def clock(seconds: float) -> str:
    """75.3 -> "1:15"."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"

class TrainingFailed(Exception):
    """A run that could not go on, or whose last checkpoint could not be written: exit code 1."""

def save_run(model: GPT, optimizer: AdamW, step: int, out_dir: Path, rows: list[str], checkpoint: bool) -> None:
    """The log first: whoever goes on from a checkpoint finds all rows up to it."""
    with whole(out_dir / "log.csv") as file: file.write("\n".join([",".join(COLUMNS), *rows, ""]).encode())
    if checkpoint and optimizer.config.keep:
        model.save_checkpoint(step, optimizer, out_dir)
        prune(out_dir, optimizer.config.keep, rows)

def checked(name: str, ids, config: GPTConfig) -> np.ndarray | None:
    """Token ids as an array; UserError if they do not suit the model."""
    if ids is None: return None
    ids, T = np.asarray(ids), config.block_size
    if len(ids) <= T:
        raise UserError(f"the {name} text has {len(ids)} tokens, but a block of --block-size {T} needs {T + 1}: bring "
                        "more text or choose a smaller block")
    if ids.max() >= config.vocab_size:
        raise UserError(f"the {name} text has token {ids.max()}, but the vocabulary ends at {config.vocab_size - 1}")
    return ids

def train(model: GPT, config: TrainConfig, train_data, val_data=None, *, optimizer: AdamW | None = None, start: int = 0,
          out_dir: str | Path | None = None, stop=()) -> AdamW:
    """Train `model` from step `start` to config.max_iters, or until something is in `stop`; return the optimizer.
    The data are token ids in a row (list or integer array). With an `out_dir`, log.csv and checkpoints are written
    there. UserError if a text is too short; TrainingFailed if numbers go wrong, or at last a save."""
    T, tokenizer = model.config.block_size, model.tokenizer
    data, val = checked("training", train_data, model.config), checked("validation", val_data, model.config)
    optimizer, out_dir = optimizer or AdamW(model, config), None if out_dir is None else Path(out_dir)
    if out_dir: out_dir.mkdir(parents=True, exist_ok=True)
    rows, unsaved = log_rows(out_dir / "log.csv", start) if out_dir else [], None
    bpb, val_bpb = (bits_per_byte(tokenizer, ids) if tokenizer and ids is not None else None for ids in (data, val))
    tokens_a_step, began = config.grad_accum * config.batch_size * T, time.perf_counter()
    last_time, last_step, last_shown, rate = began, start, 0.0, 0.0
    show("compiling (the first run on a machine takes some seconds longer) ...")
    for i in range(start, config.max_iters):
        loss, norm = optimizer(data, i)
        step, now = i + 1, time.perf_counter()
        row = {"step": step, "train_loss": loss, "lr": learning_rate(config, i), "grad_norm": norm}
        if not math.isfinite(loss + norm):  # the optimizer has not taken such a step
            raise TrainingFailed(f"step {step} went wrong: with seed {config.seed} and learning rate {row['lr']:.2e} "
                f"its batch has a loss of {loss} and a gradient of length {norm}. The step was not taken and the last "
                "checkpoint is intact; to go on from it more carefully: --resume --learning-rate "
                f"{config.learning_rate / 4:.1e}")
        last = step == config.max_iters
        evaluating = last or step % config.eval_interval == 0
        logging = evaluating or step % 10 == 0
        if logging or step == start + 1: rate = (step - last_step) * tokens_a_step / (now - last_time)
        if now - last_shown > 0.1:
            last_shown = now
            show(f"step {step}/{config.max_iters}  loss {loss:.3f}" + (f" = {loss * bpb:.2f} bits/byte" if bpb else "")
                 + f"  lr {row['lr']:.1e}  grad {norm:.2f}  {rate:,.0f} tokens/s"
                 + f"  {clock((config.max_iters - step) * tokens_a_step / max(rate, 1))} to go")
        if evaluating:
            row["train_loss"] = evaluate(model, data, config.batch_size, config.eval_iters)
            if val is not None:  # in the end all of it is read (of 20 MB, a part); on the way less
                most = min(math.ceil(len(val) / (config.batch_size * T)), 50 * config.eval_iters)
                row["val_loss"] = evaluate(model, val, config.batch_size, most if last else config.eval_iters)
            if val_bpb: row["val_bpb"] = row["val_loss"] * val_bpb
            say(f"step {step:5}  train {row['train_loss']:.3f}"
                + ("" if val is None else f"  val {row['val_loss']:.3f}")
                + (f" = {row['val_bpb']:.3f} bits/byte" if val_bpb else "")
                + f"  {rate:,.0f} tokens/s  {clock(time.perf_counter() - began)}")
            if tokenizer and step * 4 // config.max_iters > (step - config.eval_interval) * 4 // config.max_iters:
                ids = list(stream(model, tokenizer.encode("\n"), 50, seed=step))
                say("    | " + printable(tokenizer.decode(ids)).strip().replace("\n", "\n    | "))
        if logging:
            row |= {"tokens_per_s": round(rate)} | ({"train_bpb": row["train_loss"] * bpb} if bpb else {})
            rows.append(",".join(str(row.get(name, "")) for name in COLUMNS))
        saving = last or bool(stop) or step % (config.save_every or config.eval_interval) == 0
        if out_dir and (evaluating or saving):
            try:
                save_run(model, optimizer, step, out_dir, rows, saving)
                unsaved = None
            except OSError as e:
                unsaved = f"step {step} could not be saved in {out_dir} ({e.strerror or e})"
                say(f"{unsaved}; training goes on, what was saved before is intact, and the next save is tried")
        if stop and saving: break  # (after a signal that comes too late for this save, one more step is taken)
        if logging or saving or step == start + 1: last_time, last_step = time.perf_counter(), step
    show("")
    if unsaved: raise TrainingFailed(f"{unsaved}; what was saved before is intact")
    return optimizer

# ====================================================================================================================
# Chapter 7. Checkpoints
#
# A checkpoint is everything that a run is: the weights, Adam's two averages, the step, and as text the configs and
# the tokenizer. One file, so that copying it somewhere is enough to sample there or to go on training. The format is
# safetensors (8 bytes: the header's length; a JSON header: name -> dtype, shape, place; then the raw numbers), which
# every other tool reads and which, unlike Python's pickle, cannot contain code.
#
# Batches, dropout and evaluation depend on seed and step alone. So a run that was killed at any moment and goes on from
# its last checkpoint ends with the same bits as one that never stopped: nothing of a run is outside that file. A file
# that comes back may have been cut, mixed up or made by an enemy: all of it is checked before one number is used.

def sha256_of(header: dict, metadata: dict[str, str], numbers) -> str:
    """Of all that a file says, except for this line itself: one flipped bit anywhere is noticed."""
    kept = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([header, kept], sort_keys=True).encode())
    for part in numbers: digest.update(part)
    return digest.hexdigest()

def write_safetensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write float32 arrays and string metadata; OSError if that fails, with whatever `path` was before intact."""
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    numbers = [np.ascontiguousarray(array, np.float32).reshape(-1).data for array in arrays.values()]
    metadata = metadata | {"sha256": sha256_of(header, metadata, numbers)}
    text = json.dumps({"__metadata__": metadata} | header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in numbers: file.write(part)

DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
          "U8": "u1", "BOOL": "?"}

def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, as windows on it that are read when they are used, and its metadata. (bfloat16 comes as
    uint16.) UserError unless the header describes the file to the last byte, and the file is what its writer wrote."""
    try:
        if not path.is_file(): raise FileNotFoundError(0, "there is no such file")
        data = np.memmap(path, np.uint8, "c")  # ("copy on write": tinygrad copies only from writable memory)
        length = int.from_bytes(data[:8].tobytes(), "little")
        if length > min(len(data) - 8, 8 << 20):  # (GPT-2's largest has a header of 0.1 MB)
            raise ValueError("it is cut off, or not a safetensors file")
        header, body, place, arrays = json.loads(data[8:8 + length].tobytes()), data[8 + length:], 0, {}
        metadata = header.pop("__metadata__", {})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (start, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
            if len(shape) > 8 or not all(type(n) is int and 0 <= n <= len(body) for n in shape):
                raise ValueError(f"{name} has an impossible shape")
            if start != place or end > len(body) or end - start != kind.itemsize * math.prod(shape):
                raise ValueError(f"{name} is not where its neighbours leave room for it, or the file is cut off")
            arrays[name], place = body[start:end].view(kind).reshape(shape), end
        if place != len(body) or not all(type(value) is str for value in metadata.values()):
            raise ValueError("it has bytes that no header speaks of, or metadata that is not text")
        if "sha256" in metadata and metadata["sha256"] != sha256_of(header, metadata, [body]):
            raise ValueError("its bytes are not those that were written (wrong SHA-256)")
        return arrays, metadata
    except OSError as e: raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged: {e}") from e

FORMAT = "minimiggy 2"
PARTS = "", "optimizer.m.", "optimizer.v."  # before the names of the weights and of Adam's averages

def save_checkpoint(model: GPT, iter_num: int, optimizer: AdamW | None, out_dir: str | Path) -> Path:
    """Write out_dir/ckpt_<iter_num>.safetensors, whole or not at all, and return its path."""
    path = Path(out_dir) / f"ckpt_{iter_num}.safetensors"
    metadata = {"format": FORMAT, "iter_num": str(iter_num), "gpt_config": json.dumps(dataclasses.asdict(model.config))}
    if model.tokenizer: metadata["tokenizer"] = model.tokenizer.to_json()
    if model.data: metadata["data"] = json.dumps(model.data)
    if optimizer: metadata["train_config"] = json.dumps(dataclasses.asdict(optimizer.config))
    vectors = zip(PARTS, [model.flat, optimizer.m, optimizer.v] if optimizer else [model.flat])
    arrays = {part + name: array for part, vector in vectors for name, array in model.unpack(fetch(vector)).items()}
    write_safetensors(path, arrays, metadata)
    return path

def gather(model: GPT, arrays: dict[str, np.ndarray], prefix: str, path: Path) -> list[tuple[str, np.ndarray]]:
    """The arrays of a file whose names begin with `prefix`, by the model's names; UserError if one does not fit."""
    for name, shape in model.shapes.items():
        array = arrays.get(prefix + name)
        if array is None or array.shape != shape or array.dtype.kind != "f":
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise UserError(f"{path} does not fit this model: {prefix + name} is {found}, not float {shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{path} is damaged: {prefix + name} has numbers that are not finite")
    return [(name, arrays[prefix + name].astype(np.float32, copy=False)) for name in model.shapes]

def load_checkpoint(model: GPT, path: str | Path, optimizer: AdamW | None = None) -> int:
    """Restore the weights, and the optimizer's state if one is given; return the iteration. UserError, and nothing has
    changed, unless everything fits."""
    arrays, metadata = read_safetensors(Path(path))
    if metadata.get("format") != FORMAT or "sha256" not in metadata or not re.fullmatch("[0-9]{1,9}", metadata.get(
            "iter_num", "")):
        raise UserError(f"{path} is not a checkpoint of this version of MiniMiggy")
    for name in arrays.keys() - {part + name for part in PARTS for name in model.shapes}:
        raise UserError(f"{path} does not fit this model, which has no {name}")
    found = [gather(model, arrays, part, path) for part in (PARTS if optimizer else PARTS[:1])]
    model.set(found[0])
    for average, named in zip((optimizer.m, optimizer.v) if optimizer else (), found[1:], strict=True):
        for name, array in named: put(model.window(average, name), array)
    return int(metadata["iter_num"])

GPT.save_checkpoint, GPT.load_checkpoint = save_checkpoint, load_checkpoint

def open_checkpoint(path: Path) -> tuple[GPT, TrainConfig, int]:
    """The model of a checkpoint with its tokenizer, the config that it was trained with, and the iteration."""
    _, metadata = read_safetensors(path)
    try:
        config = GPTConfig(**json.loads(metadata["gpt_config"]))
        tokenizer = BPETokenizer.from_json(metadata["tokenizer"]) if "tokenizer" in metadata else None
        train_config = TrainConfig(**json.loads(metadata.get("train_config", "{}")))
        name, digest = json.loads(metadata.get("data", '["", ""]'))
        if tokenizer and tokenizer.vocab_size > config.vocab_size: raise ValueError("its tokenizer has too many tokens")
    except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
        raise UserError(f"{path} cannot be opened: {e if isinstance(e, UserError) else repr(e)}") from e
    model = GPT(config, tokenizer, seed=None)  # (takes no memory before every shape has been compared)
    model.data = str(name), str(digest)
    return model, train_config, model.load_checkpoint(path)

def checkpoints(out_dir: Path) -> dict[int, Path]:
    """The checkpoints of a folder by iteration, the newest last; UserError, with what to type, if there is none."""
    found = {int(p.stem[5:]): p for p in out_dir.glob("ckpt_*.safetensors") if p.stem[5:].isdecimal() and p.is_file()}
    if not found: raise UserError(f"no checkpoint in {out_dir}: train one first, with `python minimiggy.py --train`")
    return dict(sorted(found.items()))

def newest(out_dir: Path) -> tuple[Path, GPT, TrainConfig, int]:
    """The newest checkpoint that is whole, opened; what is skipped is named."""
    for path in reversed(checkpoints(out_dir).values()):
        try: return path, *open_checkpoint(path)
        except UserError as e:
            error = e
            say(printable(f"skipped: {error}"))
    raise error

def prune(out_dir: Path, keep: int, rows: list[str]) -> None:
    """Delete all checkpoints but the newest `keep` and the one with the lowest validation loss in the log's `rows`."""
    found, columns = checkpoints(out_dir), (row.split(",") for row in rows)
    losses = {int(step): float(val_loss) for step, _, val_loss, *_ in columns if val_loss and int(step) in found}
    best = sorted(losses, key=losses.get)[:1]
    for step in found.keys() - {*list(found)[-keep:], *best}:
        with suppress(OSError): found[step].unlink()  # one too many is no harm

@contextmanager
def alone(out_dir: Path):
    """Let only one run at a time write into a folder. The lock is on the open folder, so it goes when the process does,
    however that ends; and what a killed one left half written goes now."""
    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(out_dir, os.O_RDONLY)
    try: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {out_dir}: wait for it, or choose another --out-dir") from None
    try:
        for kind in ("ckpt_*.safetensors.*.tmp", "log.csv.*.tmp"):
            for unfinished in out_dir.glob(kind): unfinished.unlink()
        yield
    finally:
        os.close(handle)
        if is_new and not any(out_dir.iterdir()): out_dir.rmdir()

def set_aside(out_dir: Path, start: int) -> None:
    """Move the checkpoints after step `start` to a folder of their own: of an earlier run (and its log) when a new one
    starts at 0, or of a future that a run which went back will write anew. Nothing is written over."""
    old = [path for path in out_dir.glob("ckpt_*.safetensors") if int(re.sub(r"\D", "", path.stem) or 0) > start]
    if start == 0: old += out_dir.glob("log.csv")
    if not old: return
    folder = next(f for n in itertools.count(1) if not (f := out_dir / f"run-{n}").exists())
    folder.mkdir()
    for path in old: path.rename(folder / path.name)
    say(f"what was in {out_dir} {f'after step {start}' if start else 'before'} is now in {folder}")

# ====================================================================================================================
# Chapter 8. Sampling
#
# To write, the model is asked for the next token, one token is drawn from its answer and appended, and so on. Done
# naively, each new token costs a pass over all T tokens before it. But causal attention means that the past never
# changes: the keys and values of the tokens so far can be kept (the "KV cache"), and only the new token is computed.
#
# The model knows only block_size positions. When they are used up, we drop the older half of the text, compute the
# newer half again at the front, and go on: half a context is remembered at the worst, and the extra work stays small.

@functools.lru_cache(maxsize=1)
def decoder(model: GPT):
    """A function (ids, position) -> logits (V,) of the next token, with its own KV cache. `ids` is one token, which
    stands at `position`, or the first block_size / 2 tokens of a text."""
    c, ops, H, half = model.config, model.ops, model.config.n_head, max(1, model.config.block_size // 2)
    one, many, position = (Tensor(np.zeros(shape, np.int32)).realize() for shape in ((1, 1), (1, half), 1))
    caches = [[Tensor(np.zeros((H, c.block_size, c.n_embd // H), np.float32)).realize() for _ in "kv"] for _ in model.h]
    def step() -> Tensor:
        x = model.hidden(one, None, position, lambda i, qkv: ops.cached_attention(qkv, H, *caches[i], position))
        return ops.logits(x, model.wte.weight).contiguous().realize()
    def start() -> Tensor:
        def attention(i: int, qkv: Tensor) -> Tensor:
            _, k, v = qkv.reshape(half, 3, H, -1).permute(1, 2, 0, 3)                      # three of (H, T / 2, D)
            kept.extend(cache[:, :half].assign(new) for cache, new in zip(caches[i], (k, v), strict=True))
            return ops.attention(qkv, H)
        kept = []
        x = model.hidden(many, attention=attention)[:, -1:].contiguous()                   # (1, 1, C)
        return ops.logits(x, model.wte.weight).contiguous().realize(*kept)
    # To wake a second core takes 50 microseconds: a small model has written its token by then.
    replay_step, replay_start = recorded(ops, step, None if model.flat.shape[0] > 4e6 else 1), recorded(ops, start)
    def call(ids: list[int], place: int) -> np.ndarray:
        tokens, replay = (one, replay_step) if len(ids) == 1 else (many, replay_start)
        put(tokens, np.array(ids, np.int32))
        put(position, np.array([place], np.int32))
        return fetch(replay())
    return call

def draw(logits: np.ndarray, rng: np.random.Generator, temperature=0.8, top_k=0, top_p=1.0) -> int:
    """Logits (V,) -> a token. Temperature 0 takes the likeliest, 1 is the model's own opinion, above that it grows
    bolder; top_k leaves only the k likeliest to choose from, top_p the fewest that have this share of all probability
    ("nucleus sampling", arXiv:1904.09751)."""
    if temperature == 0: return int(logits.argmax())
    logits = (logits.astype(np.float64) - logits.max()) / temperature
    if top_k or top_p < 1:
        likeliest = np.argsort(-logits)[:top_k or None]
        p = np.exp(logits[likeliest])
        n = 1 + (np.cumsum(p)[:-1] < top_p * p.sum()).sum()
        return int(rng.choice(likeliest[:n], p=p[:n] / p[:n].sum()))
    # The Gumbel trick: the largest of log-probabilities plus Gumbel noise is a draw from the distribution.
    return int((logits + rng.gumbel(size=len(logits))).argmax())

def stream(model: GPT, ids: list[int], max_tokens: int, seed, **how):
    """Yield the next `max_tokens` tokens after the prompt `ids`, which has at least one; `how` is for `draw`."""
    step, T, rng = decoder(model), model.config.block_size, np.random.default_rng(seed)
    half = max(1, T // 2)
    text, done = ids[-T:], 0                         # what the model is to see, and how much of it is in the cache
    for _ in range(max_tokens):
        if len(text) > T: text, done = text[-half:], 0
        while done < len(text):
            n = half if done == 0 and len(text) >= half else 1
            logits, done = step(text[done:done + n], done), done + n
        text.append(draw(logits, rng, **how))
        yield text[-1]

def generate(model: GPT, x: Tensor, max_tokens: int = 100, seed: int = 0, **how) -> Tensor:
    """Ids (B, T) int32 -> (B, T + max_tokens) int32: the prompt, and what the model writes after it."""
    rows = [row + list(stream(model, row, max_tokens, (seed, i), **how)) for i, row in enumerate(x.tolist())]
    return Tensor(np.array(rows, np.int32))

GPT.generate = generate

def sample(model: GPT, prompt: str, max_tokens: int, seed, stop: str = "", **how) -> None:
    """Print the prompt and, as it comes, what the model writes after it, as far as the text `stop`."""
    ids = model.tokenizer.encode(prompt) or model.tokenizer.encode("\n")
    # A character may be spread over several tokens: it is printed when its last byte has come. And the beginning of
    # what may become `stop` waits until that is decided.
    decoder, waiting = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    print(printable(prompt), end="", flush=True)
    for token in stream(model, ids, max_tokens, seed, **how):
        waiting += decoder.decode(model.tokenizer.decode_bytes(token))
        if stop and stop in waiting:
            waiting = waiting[:waiting.index(stop)]
            break
        ready = max(0, len(waiting) + 1 - len(stop))
        print(printable(waiting[:ready]), end="", flush=True)
        waiting = waiting[ready:]
    else: waiting += decoder.decode(b"", final=True)  # the bytes of a character that was not finished
    print(printable(waiting))

# ====================================================================================================================
# Chapter 9. At home elsewhere
#
# Chapter 4 kept GPT-2's arithmetic and Hugging Face's names so that weights can travel: GPT-2 as OpenAI trained it is
# trained on here, and a model of ours runs wherever a GPT-2 does. The numbers go over unchanged; two things need care.
# What weights do not say: a GPT-2 with another activation, or other heads, has the same names and shapes. It would
# load, and babble. So what its config.json says is held against what chapter 4 is.
#
# And what tokens are made of. tiktoken joins any two neighbours that together are a token, the lowest id first; Hugging
# Face has a list of pairs and joins only these, in its order. One pair a token makes them agree on every text: the last
# two parts when the token's own bytes are merged. For as long as nothing has joined bytes inside a stretch of text with
# bytes outside, the stretch merges as if it stood alone; so wherever a token arises, it is from the same two parts.

HUB, HUB_MODELS = "https://huggingface.co/openai-community", ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2 = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False]}
# The files write bytes as letters: printable ones as in Latin-1, the others as those from 256 on (a space is "Ġ").
LETTERS = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b == 32 or not chr(b).isprintable())}

def vocabulary(tokenizer: BPETokenizer) -> dict[str, int]:
    """All tokens, in these letters, and their ids."""
    return {tokenizer.decode_bytes(i).decode("latin-1").translate(LETTERS): i for i in range(tokenizer.vocab_size)}

def last_parts(token: str, ids: dict[str, int]) -> list[str]:
    """A token's letters, merged until two parts are left, or as far as that goes."""
    parts = list(token)
    while len(parts) > 2:
        best, i = min((ids.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if best == math.inf: break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts

def export(model: GPT, folder: Path) -> None:
    """Write a folder that Hugging Face's transformers load: the model, and its tokenizer if it has one."""
    c, tokenizer = model.config, model.tokenizer
    end = 50256 if tokenizer and tokenizer.name == "gpt2" else None  # GPT-2's <|endoftext|>; we learn no such token
    config = {key: values[0] for key, values in GPT2.items()} | {"architectures": ["GPT2LMHeadModel"], "n_inner": None,
        "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd,
        "n_layer": c.n_layer, "n_head": c.n_head, "attn_pdrop": 0.0, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end}
    files = {"config.json": json.dumps(config, indent=2)}
    if tokenizer:
        ids = vocabulary(tokenizer)
        merges = [" ".join(parts) for token in ids if len(parts := last_parts(token, ids)) == 2]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}  # SPLIT's
        bpe = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": True}  # for a word that is a token
        fast = {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": bpe}
        # (left to itself, this class sends token_type_ids along, and a GPT-2 would add their embeddings)
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
                 "model_max_length": c.block_size, "clean_up_tokenization_spaces": False, "add_prefix_space": False}
        files |= {"vocab.json": json.dumps(ids), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
                  "tokenizer.json": json.dumps(fast), "tokenizer_config.json": json.dumps(about, indent=2)}
    for name, text in files.items():
        with whole(folder / name) as file: file.write(text.encode())
    arrays = {f"transformer.{name}": array for name, array in model.unpack(fetch(model.flat)).items()}
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})  # last: where it is, all is

def read_tokenizer(folder: Path, vocab_size: int) -> BPETokenizer | None:
    """The tokenizer in a folder if it is one of ours or GPT-2's; where there is none, GPT-2's for its 50257 tokens."""
    fast, table, merges = folder / "tokenizer.json", folder / "vocab.json", []
    if not fast.exists() and not table.exists(): return BPETokenizer("gpt2") if vocab_size == 50257 else None
    with suppress(ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):  # of another kind
        ids = json.loads(read_text(fast))["model"]["vocab"] if fast.exists() else json.loads(read_text(table))
        gpt2 = ids.get("<|endoftext|>") == 50256
        for i, token in enumerate(() if gpt2 else sorted(ids, key=ids.get)[256:], 256):  # any two earlier ones will do
            cuts = ((ids.get(token[:n], i), ids.get(token[n:], i)) for n in range(1, len(token)))
            merges.append(next(cut for cut in cuts if max(cut) < i))
        tokenizer = BPETokenizer("gpt2") if gpt2 else BPETokenizer("bpe", merges)
        if vocabulary(tokenizer) == ids and len(ids) == vocab_size: return tokenizer
    say(f"the tokenizer in {folder} is neither one of MiniMiggy's nor GPT-2's: the model comes without one")

def init_from(source: str, block_size: int | None = None) -> GPT:
    """A GPT with the weights of a FILE.safetensors, of the model.safetensors in a folder, or of one of HUB_MODELS (kept
    in the cache); cut to the first `block_size` positions, without dropout. UserError if the file is no such model."""
    path = Path(source)
    if source in HUB_MODELS and not path.exists():
        path = CACHE / source / "model.safetensors"
        try: download(f"{HUB}/{source}/resolve/main/model.safetensors", path)
        except OSError as e: raise UserError(str(e)) from e
    if path.is_dir(): path /= "model.safetensors"
    arrays, about = read_safetensors(path)[0], path.with_name("config.json")
    prefix = "transformer." if any(name.startswith("transformer.") for name in arrays) else ""
    wte, wpe = (arrays.get(f"{prefix}{kind}.weight", np.zeros(0)) for kind in ("wte", "wpe"))
    if wte.ndim != 2 or wpe.ndim != 2: raise UserError(f"{path} has no matrices {prefix}wte.weight, {prefix}wpe.weight")
    (V, C), T = wte.shape, len(wpe)
    L = sum(name.endswith(".ln_1.weight") for name in arrays) or 1
    try: told = {"n_head": 12} | json.loads(read_text(about)) if about.exists() else {"n_head": C / 64}  # as OpenAI's
    except (ValueError, TypeError, RecursionError) as e: raise UserError(f"{about} is damaged: {e}") from e
    fits = GPT2 | {"vocab_size": [V], "n_positions": [T], "n_ctx": [T], "n_embd": [C], "n_layer": [L],
                   "n_inner": [None, 4 * C], "n_head": [n for n in range(1, C + 1) if C % n == 0]}
    for key, values in fits.items():
        if key in told and told[key] not in values:
            where = about if about.exists() else f"{path}, without a config.json beside it"
            needed = " or ".join(map(json.dumps, values))
            raise UserError(f"{where}: {key} is {json.dumps(told[key])}; these weights and chapter 4 need {needed}")
    if not np.array_equal(arrays.pop("lm_head.weight", wte), wte): raise UserError(f"{path}: lm_head.weight is untied")
    if block_size and block_size > T: raise UserError(f"--block-size {block_size}, but {path} has only {T} positions")
    config = GPTConfig(T if block_size is None else block_size, V, L, int(told["n_head"]), C)
    model, arrays[f"{prefix}wpe.weight"] = GPT(config, read_tokenizer(path.parent, V), seed=None), wpe[:block_size]
    for name, array in arrays.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")): continue  # old files hold the causal mask, too
        if name.removeprefix(prefix) not in model.shapes: raise UserError(f"{path} has {name}, which no GPT-2 has")
        if array.dtype == np.uint16: arrays[name] = (array.astype(np.uint32) << 16).view(np.float32)  # from bfloat16
    model.set(gather(model, arrays, prefix, path))
    return model

# ====================================================================================================================
# Chapter 10. Seeing it and proving it
#
# What a run has learned is drawn from its log: a curve in the terminal, and with matplotlib a picture of several runs.
#
# Two questions that a reader may ask of any such file. Are the gradients right? The derivative's definition answers:
# nudge one parameter up and down and see how the loss moves. And is it fast? Milliseconds alone do not tell; the rate
# of the machine's own matrix product (numpy's BLAS, tuned by experts for years) is the limit to compare with.

def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, numbers by column, empty cells left out; UserError if it is not the log of a run."""
    line, *lines = read_text(path).decode().splitlines() or [""]
    names, rows = line.split(","), []
    try:
        if not {"step", "train_loss", "lr"} <= set(names): raise ValueError("another heading")
        for line in lines:
            rows.append({n: float(cell) for n, cell in zip(names, line.split(","), strict=True) if cell or n == "step"})
        return rows
    except ValueError as e: raise UserError(f"{path} is no log of a training run, or damaged, in {line[:40]!r}") from e

def column(rows: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite value in this column (a run that blows up leaves others)."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]

def chart(rows: list[tuple[float, float]]) -> str:
    """(step, value) pairs as a curve for the terminal, 10 lines by 64 columns; "" for fewer than two, or a NaN."""
    if len(rows) < 2 or not np.isfinite(rows).all(): return ""
    (steps, values), grid = np.array(rows).T, np.full((8, 56), 0x2800)  # braille: a character is 4 rows of 2 dots
    low, high = values.min(), values.max()
    depths = np.interp(np.linspace(steps[0], steps[-1], 112), steps, (high - values) / (high - low or 1) * 31)
    for x, ends in enumerate(itertools.pairwise(np.rint([depths[0], *depths]).astype(int))):
        for y in range(min(ends), max(ends) + 1):  # where the curve is steep, a column of dots joins its ends
            grid[y // 4, x // 2] |= ((1, 8), (2, 16), (4, 32), (64, 128))[y % 4][x % 2]  # each dot is a bit
    labels = [f"{high:6.3f} ┤", *["       │"] * 6, f"{low:6.3f} ┤"]
    lines = (label + "".join(map(chr, codes)) for label, codes in zip(labels, grid, strict=True))
    return "\n".join([*lines, "       └" + "─" * 56, f"{steps[0]:<20.0f}{'step':^16}{steps[-1]:>20.0f}".rjust(64)])

def plot(folders: list[str | Path], path: Path):
    """Draw the logs of these runs into one PNG; return the Figure. UserError without matplotlib or for a bad log."""
    try:
        from matplotlib import figure, rc_context
    except ImportError as e: raise UserError("--plot needs matplotlib: pip install matplotlib") from e
    logs, late, ends = {folder: read_log(folder / "log.csv") for folder in map(Path, folders)}, [], []
    unit = "bpb" if all(column(rows, "val_bpb") for rows in logs.values()) else "loss"
    last, peak = (max((y for rows in logs.values() for _, y in column(rows, x)), default=0) for x in ("step", "lr"))
    with rc_context({"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
                     "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.92"}):
        picture = figure.Figure(figsize=(8, 5.2), dpi=160)
        top, bottom = picture.subplots(2, sharex=True, gridspec_kw={"height_ratios": [5, 1], "hspace": 0.25})
        for i, (folder, rows) in enumerate(logs.items()):
            train, val, color = column(rows, f"train_{unit}"), column(rows, f"val_{unit}"), f"C{i}"
            if not train + val: raise UserError(f"{folder / 'log.csv'} has nothing to draw yet")
            end, value = (val or train)[-1]
            kept = [point for point in val or train if (folder / f"ckpt_{point[0]:.0f}.safetensors").exists()]
            top.plot(*zip(*train), color=color, linewidth=0.8, alpha=0.45, zorder=1.9)
            top.plot(*zip(*val), color=color, linewidth=2, marker="o", markersize=5, markerfacecolor="white")
            top.plot(*zip(*kept), color=color, linewidth=0, marker="o", markersize=5)
            bottom.plot(*zip(*column(rows, "lr")), color=color)
            late += [y for step, y in train + val if step >= min(last / 10, end)]  # the first tenth may stick out
            ends.append((value, color, folder.resolve().name))
        gap, place = (max(late) - min(late)) / 17 or 0.1, -math.inf
        for value, color, name in sorted(ends):  # each name at the end of its curve, or above the name that is there
            place = max(value, place + gap)
            top.text(last * 1.03, place, f"{name}  {value:.3f}", color=color, va="center", parse_math=False)
        measure = "bits per byte" if unit == "bpb" else "nats per token"
        top.set(xlim=(0, last * 1.02), ylim=(min(late) - gap, max(late) + gap),
                title=f"{measure}   (bold: validation, thin: training, ● checkpoint)")
        bottom.set(title="learning rate", xlabel="step", ylim=0, yticks=[0, peak], yticklabels=["0", f"{peak:g}"])
        picture.savefig(path, format="png", bbox_inches="tight")
    return picture

def gradcheck(seed: int) -> bool:
    """Print, for every parameter of a tiny model, how far the gradient that training uses is from central finite
    differences of the plain loss in float64, where (loss(p + h) - loss(p - h)) / 2h is good to some nine digits.
    Returns whether all agree to 1e-4, relative to the parameter's largest gradient."""
    model = GPT(GPTConfig(block_size=5, vocab_size=11, n_layer=1, n_head=2, n_embd=6), seed=seed)
    rng, h, worst = np.random.default_rng(seed), 1e-5, 0.0
    x, y = (Tensor(rng.integers(0, 11, (2, 5)).astype(np.int32)).realize() for _ in range(2))
    theta = model.flat.numpy() + 0.1 * rng.standard_normal(model.flat.shape, np.float32)  # no bias is zero by accident
    put(model.flat, theta)
    gradient = flat_gradient(model, model.loss(x, y)).numpy()
    model.ops, model.flat, theta = Plain, None, theta.astype(np.float64)
    model.set(model.unpack(theta).items(), np.float64)
    loss, every = recorded(Plain, lambda: model.loss(x, y).realize()), np.arange(len(theta))

    def loss_with(i: int, nudge: float) -> float:
        put(model.flat, theta + nudge * (every == i))
        return loss().item()

    say(f"{'parameter':<24}{'shape':>10}{'largest gradient':>18}{'largest error':>16}")
    for name, places in model.unpack(every).items():  # where in the vector this parameter's numbers are
        differences = np.array([loss_with(i, h) - loss_with(i, -h) for i in places.flat]) / (2 * h)
        size, error = np.abs(differences).max(), np.abs(gradient[places.flat] - differences).max()
        worst = max(worst, error / size)
        say(f"{name:<24}{str(places.shape).replace(' ', ''):>10}{size:>18.6f}{error:>16.1e}")
    say(f"largest relative error {worst:.1e}: {'all gradients are right' if worst < 1e-4 else 'SOMETHING IS WRONG'}")
    return worst < 1e-4

def step_flops(config: GPTConfig, train_config: TrainConfig) -> float:
    """Floating-point operations of a training step: 2 for each weight and token forward, and 4 backward; attention's
    two products of (T, T) are counted half, as causality leaves half of them out."""
    c, tokens = config, train_config.grad_accum * train_config.batch_size * config.block_size
    return 6 * tokens * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd + c.n_layer * c.block_size * c.n_embd)

def blas_gflops() -> float:
    """This machine's float32 matrix product rate in GFLOP/s: the best of five 1024-cubed products in numpy."""
    a = np.ones((1024, 1024), np.float32)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5)) / 1e9

def bench(what: str, config: GPTConfig, train_config: TrainConfig) -> None:
    """Time training steps, or sampling, on random data; the last line printed is JSON."""
    model = GPT(config)
    if what == "step":
        data, optimizer = np.random.default_rng(0).integers(0, config.vocab_size, 200_000), AdamW(model, train_config)
        work, warm_up, flops = (optimizer(data, i) for i in range(60)), 4, step_flops(config, train_config)
    else:  # the warm-up ends when the window has moved once, and everything is compiled
        work, warm_up = stream(model, [0], config.block_size + 401, seed=0), config.block_size + 1
        flops = 2 * (12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd)
    seconds = np.diff([time.perf_counter() for _ in work])[warm_up:]
    # A median passes over what else the machine did; but that the window moves now and then belongs to sampling.
    second = float(np.median(seconds) if what == "step" else seconds.mean())
    speed = {"ms_per_step": 1e3 * second} if what == "step" else {"tokens_per_s": 1 / second}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"bench": what, "parameters": sum(map(math.prod, model.shapes.values())), **speed,
                      "gflops": flops / second / 1e9, "peak_mb": peak, "blas_gflops": blas_gflops()}))

# ====================================================================================================================
# Chapter 11. The command line
#
# Every field of the configs is a flag. Where a flag is not given, the command line has defaults of its own: they make a
# first run of about a minute that ends with verse, while the dataclasses' defaults are for use as a library.

DEFAULTS = {"vocab_size": 1024, "batch_size": 12, "max_iters": 2000, "eval_interval": 200, "learning_rate": 4e-3}

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, and exit code 2: what argparse does, less its page of usage."""
        raise UserError(f"{message} (python minimiggy.py --help lists the flags)")

def make_parser() -> Parser:
    parser = Parser(usage="python minimiggy.py WHAT [flags]", description="Train, sample and read a GPT in one file.",
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""examples:
  python minimiggy.py --train                             learn from tiny Shakespeare
  python minimiggy.py --train --data my.txt               learn from your own text
  python minimiggy.py --resume --max-iters 4000           go on where the newest checkpoint left off
  python minimiggy.py --sample "ROMEO:" --top-k 40        let the newest checkpoint write
  python minimiggy.py --train --init-from gpt2 --data my.txt --learning-rate 3e-5 --max-iters 50""")
    def flag(name: str, help: str, **options):
        group.add_argument(name, help=help, **options or {"action": "store_true"})
    group = parser.add_argument_group("what to do (one of these)").add_mutually_exclusive_group(required=True)
    flag("--train", "train a model from the start")
    flag("--resume", "go on training from the newest checkpoint in --out-dir")
    flag("--sample", "write on after PROMPT, with the newest checkpoint (FILE:name takes the prompt from a file, - "
         "from standard input)", metavar="PROMPT")
    flag("--eval-only", "the loss on the whole validation text")
    flag("--export", "write the newest checkpoint for Hugging Face's transformers", metavar="DIR")
    flag("--plot", "draw the logs of runs into the first one's plot.png", metavar="DIR", nargs="+")
    flag("--gradcheck", "compare all gradients with finite differences")
    flag("--bench", "time training steps or sampling, on random data", choices=["step", "sample"])
    parser.add_argument("--version", action="version", version=f"minimiggy {VERSION}")
    group = parser.add_argument_group("text and files")
    flag("--data", "the text to learn from: shakespeare (the default), play, or a UTF-8 text file", metavar="NAME|FILE")
    flag("--replace-bad-bytes", "read bytes that are not UTF-8 as U+FFFD")
    flag("--tokenizer", "learn a vocabulary from the text (the default), use plain bytes, or GPT-2's 50257 tokens",
         choices=["bpe", "bytes", "gpt2"])
    flag("--out-dir", "where checkpoints and log.csv are (default: %(default)s)", metavar="DIR", default="checkpoints")
    flag("--checkpoint", "use this checkpoint instead of the newest in --out-dir", metavar="FILE")
    flag("--init-from", "begin with, or use, these weights: a .safetensors file of a GPT-2, a folder that has one, or "
         f"one of {', '.join(HUB_MODELS)}, which are downloaded", metavar="GPT2")
    flag("--no-checkpoint", "the same as --keep 0", action="store_const", const=0, dest="keep")
    group = parser.add_argument_group("the machine")
    flag("--devices", f"CPU cores to use (default: all, {CORES} here); on other devices, and with --plain, how many of "
         "them share a batch (default: 1)", type=int, metavar="N")
    flag("--plain", "chapter 4's operations, without chapter 5's kernels")
    for title, config in (("the model", GPTConfig), ("training", TrainConfig), ("sampling", SampleConfig)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(config):
            names, kind = dict.fromkeys([f"--{f.name.replace('_', '-')}", f"--{f.name}"]), type(f.default)
            group.add_argument(*names, dest=f.name, type=kind, metavar="N" if kind is int else "X",
                               help=f"{f.metadata['help']} (default: {DEFAULTS.get(f.name, f.default)})")
    flag("--stop", "end a text before TEXT", metavar="TEXT", default="")
    return parser

def chosen(args: argparse.Namespace, config: type, saved=None):
    """A config from the user's flags, else a `saved` one, else the command line's defaults, else the class's own."""
    fields = dataclasses.fields(config)
    values = {f.name: getattr(saved, f.name) if saved else DEFAULTS.get(f.name, f.default) for f in fields}
    values |= {f.name: value for f in fields if (value := getattr(args, f.name)) is not None}
    if config is TrainConfig and not saved and args.min_lr is None: values["min_lr"] = values["learning_rate"] / 10
    return config(**values)

@contextmanager
def finishing_the_step():
    """Yields a list, into which Ctrl-C, `kill` and a closed terminal put their signal instead of ending the program: so
    a training step can be finished and saved. A second signal ends it at once; the last checkpoint is whole."""
    caught, wanted = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def catch(number, frame):
        if caught: os._exit(128 + number)
        caught.append(number)
        with suppress(OSError): os.write(2, b"\nstopping after this step (the same again stops at once)\n")
    before = {n: signal.signal(n, catch) for n in wanted if signal.getsignal(n) != signal.SIG_IGN}  # nohup ignores one
    try: yield caught
    finally:
        for n, handler in before.items(): signal.signal(n, handler)

def open_model(args: argparse.Namespace) -> tuple[str | Path, GPT, TrainConfig, int]:
    """The model that the flags ask for, and where it came from; UserError if flags speak of another one."""
    if args.init_from:  # here, block_size and dropout may be chosen anew
        source, opened = args.init_from, (init_from(args.init_from, args.block_size), chosen(args, TrainConfig), 0)
        opened[0].config.dropout = args.dropout or 0.0
    elif args.checkpoint: source, opened = args.checkpoint, open_checkpoint(Path(args.checkpoint))
    else: source, *opened = newest(Path(args.out_dir))
    tokenizer, has = opened[0].tokenizer, dataclasses.asdict(opened[0].config)
    has["tokenizer"] = "bytes" if tokenizer and tokenizer.vocab_size == 256 else tokenizer and tokenizer.name
    for name, value in has.items():
        if (wanted := getattr(args, name)) not in (None, value):
            raise UserError(f"--{name.replace('_', '-')} {wanted} contradicts {source}, whose model has {value}: "
                            "leave the flag away, or --train a new model")
    if tokenizer is None and not args.export:
        raise UserError(f"{source} has no tokenizer that we know, so its model cannot be talked to")
    return source, *opened

def run_train(args: argparse.Namespace, stop: list) -> int:
    """--train and --resume; returns the exit code."""
    out_dir, start, optimizer = Path(args.out_dir), 0, None
    if args.resume:
        path, model, saved, start = open_model(args)
        config = chosen(args, TrainConfig, saved)
        if start >= config.max_iters:
            raise UserError(f"{path} has all its {config.max_iters} steps: give a higher --max-iters to go on")
        optimizer = AdamW(model, config)
        model.load_checkpoint(path, optimizer)
    else:
        gpt_config, config = chosen(args, GPTConfig), chosen(args, TrainConfig)
        if args.init_from: model = open_model(args)[1]
    known, known_sha256 = model.data if args.resume else ("", "")
    text, name = load_text(args.data or known, args.replace_bad_bytes)
    if not text: raise UserError(f"{name} is empty: there is nothing to learn from")
    sha256 = hashlib.sha256(text).hexdigest()
    if name == known and sha256 != known_sha256: say(f"{name} has changed since {path} was saved")
    parts, n_bytes = split_text(text), len(text)
    if not args.resume and not args.init_from:
        # Ten pieces of a megabyte, or all of a smaller text, are enough to learn a vocabulary from.
        places = range(0, len(parts[0]), max(1 << 20, len(parts[0]) // 10))
        pieces = (str(parts[0][i:i + (1 << 20)], "utf-8", "ignore") for i in places)
        tokenizer = BPETokenizer("gpt2") if args.tokenizer == "gpt2" else BPETokenizer.train(
            "".join(pieces), 256 if args.tokenizer == "bytes" else gpt_config.vocab_size)
        model = GPT(dataclasses.replace(gpt_config, vocab_size=tokenizer.vocab_size), tokenizer, config.seed)
    train_data, val_data = (checked(part_name, model.tokenizer.encode_array(part), model.config)
                            for part_name, part in zip(("training", "validation"), parts, strict=True))
    set_aside(out_dir, start)
    c, tokenizer, model.data, B = model.config, model.tokenizer, (name, sha256), config.grad_accum * config.batch_size
    del text, parts  # 200 MB of text need not stay
    flops, limit = step_flops(c, config), 1e9 * blas_gflops()
    say(f"text       {name}: {n_bytes:,} bytes, 90 % to learn from, 10 % to be examined on")
    say(f"tokenizer  {tokenizer.name}: {tokenizer.vocab_size:,} tokens, "
        f"{n_bytes / (len(train_data) + len(val_data)):.2f} bytes each on average")
    say(f"model      {sum(map(math.prod, model.shapes.values())) / 1e6:.2f} million parameters: {c.n_layer} layers, "
        f"{c.n_head} heads, {c.n_embd} channels, {c.block_size} tokens of context")
    say(f"training   steps {start + 1} to {config.max_iters}, {B} x {c.block_size} tokens each, on {Device.DEFAULT}"
        f"{f' ({CORES} cores)' if model.ops is Fast else ''}; "
        f"about {clock((config.max_iters - start) * flops / limit / 0.5)} min if nothing else runs\n")
    train(model, config, train_data, val_data, optimizer=optimizer, start=start, out_dir=out_dir, stop=stop)
    folder = "" if args.out_dir == "checkpoints" else f" --out-dir {shlex.quote(args.out_dir)}"
    path, log = out_dir / f"ckpt_{config.max_iters}.safetensors", read_log(out_dir / "log.csv")
    if stop and not path.exists():
        say(f"stopped; to go on: python minimiggy.py --resume{folder}" if config.keep else "stopped; nothing was saved")
        return 128 + stop[0]
    if curve := chart(column(log, "val_bpb")): say(f"\nbits per byte on the validation text\n{curve}")
    speed = flops * np.median([row["tokens_per_s"] for row in log] or [0]) / (B * c.block_size)
    say(f"\n{flops / 1e9:.1f} GFLOP a step, {speed / 1e9:.0f} GFLOP a second: {speed / limit:.0%} of this machine's "
        "rate for a matrix product in numpy")
    if config.keep: say(f'\nsaved {path}; now try: python minimiggy.py --sample "ROMEO:"{folder}')
    return 0

def run_eval(args: argparse.Namespace) -> None:
    """--eval-only."""
    path, model, config, _ = open_model(args)
    text, name = load_text(args.data or (model.data or [""])[0], args.replace_bad_bytes)
    val_data = checked("validation", model.tokenizer.encode_array(split_text(text)[1]), model.config)
    loss = evaluate(model, val_data, config.batch_size)
    say(f"{path}: {loss:.4f} nats a token = {loss * bits_per_byte(model.tokenizer, val_data):.4f} bits/byte on the "
        f"last tenth of {name}, {len(val_data):,} tokens")

def run_sample(args: argparse.Namespace) -> None:
    """--sample."""
    how, prompt, model = dataclasses.asdict(chosen(args, SampleConfig)), args.sample, open_model(args)[1]
    if prompt.startswith("FILE:"): prompt = read_text(Path(prompt[5:]), args.replace_bad_bytes).decode()
    elif prompt == "-": prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    seed = time.time_ns() if args.seed is None else args.seed
    for n in range(how.pop("num_samples")): sample(model, prompt, seed=(seed, n), stop=args.stop, **how)

def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 after a user's mistake, which gets one line on stderr."""
    global CORES, DEVICES, PLAIN
    try:
        args = make_parser().parse_args(argv)
        if MISSING_COMPILER: raise UserError(MISSING_COMPILER)
        for name, value in vars(args).items():
            if value == "" and name not in ("sample", "stop"): raise UserError(f"--{name.replace('_', '-')} is empty")
        if args.train and args.checkpoint or args.resume and args.init_from:
            raise UserError("--train begins anew or from --init-from, --resume goes on from the newest --checkpoint")
        if args.devices is not None and not 1 <= args.devices <= 1024:
            raise UserError(f"--devices must be between 1 and 1024, not {args.devices}")
        PLAIN = args.plain
        if default_ops() is Fast: CORES = args.devices or CORES
        else:
            DEVICES = args.devices or 1
            if (args.batch_size or DEFAULTS["batch_size"]) % DEVICES:
                raise UserError(f"--devices {DEVICES} must divide the batch: choose a --batch-size that it divides")
        if args.train or args.resume:
            with alone(Path(args.out_dir)), finishing_the_step() as stop: return run_train(args, stop)
        if args.sample is not None: run_sample(args)
        elif args.eval_only: run_eval(args)
        elif args.export:
            source, model, *_ = open_model(args)
            export(model, Path(args.export))
            say(f"wrote {source} to {args.export}, as a GPT-2 that transformers load")
        elif args.plot:
            plot(args.plot, Path(args.plot[0]) / "plot.png")
            say(f"drew {Path(args.plot[0]) / 'plot.png'}")
        elif args.gradcheck: return 0 if gradcheck(chosen(args, TrainConfig).seed) else 1
        else: bench(args.bench, chosen(args, GPTConfig), chosen(args, TrainConfig))
        return 0
    except BrokenPipeError:  # as in `... | head`: who listened has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt: code, e = 130, "stopped"
    except TrainingFailed as failure: code, e = 1, failure
    except (UserError, OSError, MemoryError) as mistake: code, e = 2, mistake
    show("")
    print("minimiggy:", printable(str(e)).replace("\n", " "), file=sys.stderr)
    return code

if __name__ == "__main__":
    for stream_name in ("stdin", "stdout", "stderr"):  # a shell may have closed them: `>&-`
        if getattr(sys, stream_name) is None: setattr(sys, stream_name, open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
