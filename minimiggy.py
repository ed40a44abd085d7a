"""MiniMiggy: a GPT that you can train, sample, change and read, in one file, on tinygrad.

    python minimiggy.py --train                  # learn to write verse, in about a minute on a laptop
    python minimiggy.py --sample "ROMEO:"        # let the best checkpoint write

Part I. The GPT (for everyone; stop after it and you know how a GPT works)
     1. What a language model does     2. A text              3. Tokens: bytes and merges
     4. tinygrad in ten lines          5. Numbers to choose   6. The model
     7. The loss                       8. A training step     9. Training    10. Writing    11. Exercises
Part II. Fast (for whoever wonders where the time goes)
Part III. Dependable, and at home (for whoever trains overnight, on a text of their own)

Comments give shapes as (B, T, C): B sequences side by side, T tokens in each, C numbers ("channels") for each
token. V is the size of the vocabulary, H the number of attention heads, D = C / H the width of a head. What
follows >>> can be pasted into Python after `from minimiggy import *`; the tests run it all. MIT licence.
"""
# ruff: noqa: E402  (Each part has its own imports, so that part I can stand alone. Now skip to chapter 1.)
from __future__ import annotations

import math
import os
import shutil
import signal
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if os.name == "nt":
    raise SystemExit("minimiggy: on Windows, type `wsl --install` once, and start again inside WSL")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it on the spot (but not training: chapter 27)
for _name in ("DEBUG", "BEAM", "JIT", "NOOPT", "PROFILE", "VIZ", "SPEC", "TC", "LRU", "CCACHE", "TRACEMETA"):
    if not os.environ.get(_name, "0").isdigit():
        del os.environ[_name]  # DEBUG=true is meant for another program: tinygrad takes only numbers
os.environ["DEV"] = os.environ.get("DEV") or "CPU"  # where tinygrad computes: DEV=CUDA or METAL for a GPU
os.environ.setdefault("CACHELEVEL", "0")  # no database of compiled programs: part II keeps them
os.environ.setdefault("PARALLEL", "0")  # no helper processes of its own: part II has some that are simpler

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes
from tinygrad.nn.state import get_state_dict

# ============================================================================================================
# Part I. The GPT
class UserError(Exception):
    """A mistake that the user can fix: the command line prints its text as one line."""

# === Chapter 1. What a language model does
#
# A language model does one thing. It reads the beginning of a text and says, for everything that might come
# next, how likely that is. After "To be, or not to" it should say that " be" is very likely, that " sleep" is
# possible, and that "xq" is not. Anything that can do this can write: draw a candidate, append it, ask again.
#
# To predict well, one has to know a lot: how words are spelt, that verbs agree with their subjects, that a
# speech in a play begins with a name and a colon. Nobody tells the model any of this. It has about a million
# numbers inside, its *parameters*, mostly random at first. We show it passages of a text, measure how much
# each next piece surprised it, and change every parameter a little, so that the surprise would be smaller.
# *GPT*: generative pre-trained *transformer* (arXiv:1706.03762). Ours follows GPT-2 (Radford et al. 2019).

# === Chapter 2. A text
#
# The text that we learn from is cut in two. The first nine tenths are for learning; the last tenth is the
# exam. A model can come to know its text by heart, and then its surprise at that text says nothing any more
# about what it has understood. Only a text that it has never seen can show that.
def split_text(text: bytes) -> tuple[memoryview, memoryview]:
    """UTF-8 `text` in two: the first 90 % of its bytes to learn from, the last 10 % to be examined on."""
    cut = border(text, len(text) * 9 // 10)
    return memoryview(text)[:cut], memoryview(text)[cut:]

def border(text: bytes, place: int) -> int:
    """The first place, `place` or later, where a character begins. (Bytes that continue one are 10xxxxxx.)"""
    while place < len(text) and text[place] & 0b11000000 == 0b10000000:
        place += 1
    return place

# === Chapter 3. Tokens: bytes and merges
#
# A model computes with numbers, so the text must become a list of whole numbers first. The pieces that each
# get a number are called *tokens*. Single letters make long lists, in which a word is far away from the next
# one. Whole words make short lists, but a word that was not in the text has no number.
#
# *Byte-pair encoding* (Sennrich et al. 2016, arXiv:1508.07909) lies in between. A text in a computer is a
# list of bytes, numbers from 0 to 255. These are our first 256 tokens: with them, any text in any script can
# be written down. Then we look for the pair of neighbouring tokens that occurs most often, make it a new
# token, number 256, and put it wherever the pair stood; then the same for number 257, and so on. Frequent
# pieces such as " the" become tokens of their own; a word that was never seen is at worst written in bytes.
#
# By hand, for a text with "banana" twice (no pair spans two words). b, a and n are the bytes 98, 97, 110.
#
#     98 97 110 97 110 97     "an" (97, 110) and "na" (110, 97) occur four times, "ba" twice. Of two that are
#                             equally frequent, we take the one with the smaller numbers: "an" becomes 256.
#     98 256 256 97           Each of the three pairs occurs twice. "ban" (98, 256) becomes 257.
#     257 256 97              Two pairs, twice each. "ana" (256, 97) becomes 258.
#     257 258                 (257, 258) becomes 259, the whole word.
#
# `merge` is one such step, and `learn_merges` does it all. To encode a word that was never seen, "bandana",
# apply the same merges in the order in which they were learned. (Here, the fourth finds nothing.)
#
# >>> merges = learn_merges(Counter({"banana": 2}), 260)
# >>> merges
# [(97, 110), (98, 256), (256, 97), (257, 258)]
# >>> ids = list(b"bandana")
# >>> for number, pair in enumerate(merges[:3]):
# ...     ids = merge(ids, pair, 256 + number)
# ...     print(ids)
# [98, 256, 100, 256, 97]
# [257, 100, 256, 97]
# [257, 100, 258]
def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from left to right, replaced by the token `new`."""
    merged = []
    for token in ids:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged

# On a megabyte, counting all pairs anew for each merge would take minutes. But a word that occurs 5,000 times
# need be looked at only once; and a merge changes only words that contain the pair: we remember which.
LONGEST = 256  # of a word, we learn from so many bytes: a longer row of zeros would give 512 zeros, 1024, ...

def learn_merges(word_counts: Counter, vocab_size: int) -> list[tuple[int, int]]:
    """Learn merges from words and how often each occurs, until there are `vocab_size` tokens or no pair
    occurs twice. The token 256 + i is made of the two earlier tokens in the i-th pair of the result."""
    words = [list(word.encode("utf-8", "replace")[:LONGEST]) for word in word_counts]
    times = list(word_counts.values())
    counts = defaultdict(int)                      # pair -> how often it occurs
    places = defaultdict(set)                      # pair -> which words contain it, by place in `words`
    tokens = [bytes([byte]) for byte in range(256)]
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = []

    def count(i: int, sign: int) -> None:
        """Add the pairs of word i to the counts, or take them away. (`places` may list too many words.)"""
        for pair in zip(words[i], words[i][1:], strict=False):
            counts[pair] += sign * times[i]
            places[pair].add(i)

    for i in range(len(words)):
        count(i, +1)
    while len(tokens) < vocab_size and counts:
        most = max(counts.values())
        if most < 2:
            break
        pair = min(pair for pair, n in counts.items() if n == most)
        joined = tokens[pair[0]] + tokens[pair[1]]
        if joined not in numbers:                  # (after ab + c, a + bc would be the same token again)
            numbers[joined] = len(tokens)
            tokens.append(joined)
            merges.append(pair)
        for i in places.pop(pair):
            count(i, -1)
            words[i] = merge(words[i], pair, numbers[joined])
            count(i, +1)
        del counts[pair]
    return merges

# What is a "word"? Without borders, "dog.", "dog!" and "dog?" would become three tokens that have nothing to
# do with each other. So a pattern (GPT-2's) cuts the text first, and no merge crosses its cuts. It lists what
# a piece may be: 's, 't, 'll and so on; a run of letters (\p{L}: of any script), of digits (\p{N}) or of
# other signs, each with the space before it, if there is one; and what white space is then left over.
#
# >>> import regex  # it comes with tiktoken; Python's own `re` does not know \p{L}
# >>> regex.findall(SPLIT, "It's 3 dogs, isn't it?")
# ['It', "'s", ' 3', ' dogs', ',', ' isn', "'t", ' it', '?']
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

class BPETokenizer:
    """Text to token ids and back. `BPETokenizer.train` learns a vocabulary; `BPETokenizer()` is GPT-2's, of
    50257 tokens (`merges` is None). Applying merges is a solved problem: tiktoken does that, in Rust."""
    def __init__(self, name: str = "gpt2", merges: list[tuple[int, int]] | None = None):
        import tiktoken
        self.name = name
        self.merges = merges
        if name == "gpt2":
            self.encoding = tiktoken.get_encoding("gpt2")  # is downloaded once
        else:
            tokens = [bytes([byte]) for byte in range(256)]
            for left, right in merges:
                tokens.append(tokens[left] + tokens[right])
            ranks = {token: number for number, token in enumerate(tokens)}  # (the lowest is merged first)
            self.encoding = tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.vocab_size = self.encoding.n_vocab

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BPETokenizer:
        """Learn `vocab_size` tokens (256: plain bytes) from `text`; fewer if no pair repeats."""
        import regex
        if vocab_size < 256:
            raise UserError(f"--vocab-size must be at least 256, one token for each byte, not {vocab_size}")
        return cls("bpe", learn_merges(Counter(regex.findall(SPLIT, text)), vocab_size))

    def encode(self, text: str) -> list[int]:
        """The token ids of any text. (What UTF-8 cannot express becomes "?".)"""
        return self.encoding.encode_ordinary(text.encode("utf-8", "replace").decode())

    def decode(self, ids: list[int]) -> str:
        """The text of token ids. Bytes that are not UTF-8, which a model may write, become U+FFFD."""
        return b"".join(map(self.decode_bytes, ids)).decode("utf-8", "replace")

    def decode_bytes(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character; b"" for a number without a token."""
        return self.encoding.decode_single_token_bytes(token) if token < self.vocab_size else b""

# === Chapter 4. tinygrad in ten lines
#
# A *tensor* is an array of numbers, with any number of dimensions. As in numpy, `@` multiplies matrices (the
# last two), (T, C) + (C,) repeats the smaller, and -1 is the last dimension: `unsqueeze(-1)` makes (T, 1) of
# (T,). tinygrad is *lazy*: an operation only notes down what would have to be done. When somebody wants
# numbers, or calls `realize`, it writes a small program for all that, in C for a CPU, compiles and runs it.
#
# >>> a = Tensor([1.0, 2.0, 3.0])
# >>> b = (a * a).sum()                      # nothing has been computed: b is a recipe
# >>> b.item()                               # now it is computed
# 14.0
# >>> slope = b.gradient(a)[0]               # how b changes with a: 2a, a recipe again ([0]: it is a list)
# >>> slope.tolist()
# [2.0, 4.0, 6.0]
# >>> a = a.assign(a - 0.1 * slope).realize()      # write new numbers into a's memory: one step downhill
# >>> round((a * a).sum().item(), 2)
# 8.96
#
# All slopes of b are its *gradient*. Each operation knows its own: 3x has slope 3, y * y has 2y. tinygrad
# goes back from the result, one operation at a time, and multiplies. Let b = y * y and y = 3x, where x = 1:
# y is 3, b's slope in y is 2y = 6, and in x it is 6 * 3 = 18. What is used several times gets a slope from
# each use; these are added up. This is *backpropagation*: all slopes together cost about twice as much as b.
#
# Two more things matter for speed. tinygrad *fuses* operations into one loop where it can, and then computes
# a fused value again for each use: x.exp() @ w computes each exponential once for every column of w.
# `contiguous` says "compute this here, once, and keep it". And noting things down can take Python longer than
# computing, so TinyJit *records*, at the second call of a function, which programs it runs. From the third
# call on, only these are run, and nothing else of the function: no `print`, no `if`, and a Python number that
# it used stays what it was. What changes comes in as a realized tensor, or is written into one by `assign`.
#
# >>> scaled = TinyJit(lambda x: (factor * x).realize())
# >>> for factor in (2.0, 3.0, 4.0):         # runs; runs and is recorded; repeats that, with its 3.0
# ...     print(scaled(Tensor([1.0]).realize()).item())
# 2.0
# 3.0
# 3.0

# (Skip this at first.) tinygrad calls the C compiler that CC names, or else clang. Few laptops have that, but
# the Python package `ziglang` contains all of it: a script beside its `zig` runs it, unhurt by our Ctrl-C.
if not os.environ.get("CC") and not shutil.which("clang"):
    with suppress(ImportError, OSError):
        import ziglang
        launcher = Path(ziglang.__path__[0]) / "minimiggy-clang"
        if not os.access(launcher, os.X_OK):
            launcher.write_text('#!/bin/sh\ntrap "" INT HUP\nexec "$(dirname "$0")/zig" clang "$@"\n')
            launcher.chmod(0o755)
        os.environ["CC"] = str(launcher)

# === Chapter 5. Numbers to choose
#
# Training finds the parameters. How large the model is, and how it learns, you choose: see chapters 6 and 8.
@dataclass
class GPTConfig:
    """What the model is."""
    block_size: int = 64           # T: tokens that the model sees at once, its context
    vocab_size: int = 50257        # V: tokens in the vocabulary (GPT-2's; --train learns 1024)
    n_layer: int = 4               # the depth: blocks, one after the other
    n_head: int = 4                # H: attention heads in a block; it must divide n_embd
    n_embd: int = 128              # C: channels, the numbers that represent a token
    dropout: float = 0.0           # share of numbers set to zero at random while training

@dataclass
class TrainConfig:
    """How the model learns."""
    batch_size: int = 8            # B: passages in a batch
    learning_rate: float = 1e-3    # the largest step size, reached after the warm-up
    warmup_steps: int = 100        # steps over which the step size rises to that
    max_iters: int = 1000          # training steps in all
    eval_interval: int = 100       # steps between two exams
    eval_iters: int = 20           # batches in such an exam
    min_lr: float = 1e-4           # the step size at the end
    weight_decay: float = 0.1      # matrices shrink by this, times the step size, at each step
    beta1: float = 0.9             # Adam keeps this share of its average gradient at each step
    beta2: float = 0.99            # and this share of the average squared gradient
    grad_clip: float = 1.0         # all gradients, as one long vector, are shortened to this length at most
    grad_accum: int = 1            # batches averaged for a step, if memory holds no larger batch
    seed: int = 1337               # the start of all randomness: passages, dropout, --train's weights
    save_every: int = 0            # steps between two saves of all numbers; 0: one after each exam
    keep: int = 3                  # how many saved models (*checkpoints*) to keep

# Randomness must be repeatable, so that a run that was interrupted continues exactly as it would have. So
# each of four uses has an `rng` of its own, from its number below, the seed and, for two of them, the step.
WEIGHTS, PASSAGES, DROPOUT, WRITING = 1, 2, 3, 4

# === Chapter 6. The model
#
# For each token we take a row of numbers (6.1). In *block* after block, tokens hear those before them and
# think about it (6.2 to 6.4). Finally, each row is compared with all tokens that could follow (6.5).
#
# 6.1 A token is a row of numbers
# The number of a token means nothing: token 500 is not "more" than token 400. So each token gets C numbers of
# its own (a *vector*), a row in a table `wte` ("word token embedding") with V rows. The rows begin as noise
# and are parameters like all others, so training moves them: tokens that behave alike, such as king and
# queen, end up with similar rows. A column may come to mean "is a name"; nobody chooses that.
#
# Attention, below, averages over tokens, and an average hardly shows their order: did the dog bite the man,
# or the man the dog? So a second table, `wpe` ("word position embedding"), has a row for each of the T places
# in the context, and the model begins with the sum of both rows: what the token is, plus where it stands.
# (Adding is cheaper than putting them side by side, and C numbers have room for both. But see exercise 2.)
#
# 6.2 The operations: `linear`, `layer_norm`, `gelu`, `attention` (and some more, for 6.5, 7 and 8)
# `linear` is the workhorse: every output is a weighted sum of all inputs, plus a constant, and the weights
# are learned. One product of matrices does it for all tokens at once.
#
# `layer_norm` (Ba et al. 2016, arXiv:1607.06450) brings each token's C numbers to mean 0 and mean square
# (*variance*) 1; a learned scale and shift may undo as much of that as is useful. Without norms, numbers and
# gradients grow or shrink by a factor f at each operation: by f^10 after ten. (1e-5 prevents 0 / 0. Newer
# models use *RMSNorm*, which is simpler: in `layer_norm`, let `centred` be x, and do not add the bias.)
#
# `gelu` (Hendrycks & Gimpel 2016, arXiv:1606.08415) is the bend: `linear` after `linear` is again one
# `linear`, unless something that is not linear stands between them. It is nearly 0 for very negative
# numbers and nearly x for large ones: -3 becomes -0.004, 0 stays 0, and 3 becomes 2.996.
#
# `attention` is how tokens learn about each other. `linear` gives each token three vectors: a *query* (what
# am I looking for?), a *key* (what do I have to offer?), and a *value* (what I say to those who ask). The dot
# product of my query and your key is a score: how much do I want to hear you? *Softmax* turns scores into
# weights that are positive and add up to 1, exp(score) divided by the sum of all exp(score), and what I hear
# is the average of all values with these weights. A pronoun can look for its noun, a line for its rhyme.
#
# *Why divide by sqrt(D)?* A score is a sum of D products. If the numbers in q and k are independent, with
# mean 0 and variance 1, each product has variance 1 * 1, and variances add up: the score's is D. With D = 32,
# it is typically sqrt(32) = 5.7 above or below 0, and exp(5.7) is 300. Softmax would give nearly all weight
# to one token, and a small change of the scores would change little: slopes near 0, slow learning. Divided
# by sqrt(D), their variance is 1 again. *Why a mask?* A token is to predict the next, and must not see it. So
# later ones get the score minus infinity and the weight exp(-inf) = 0. For T = 4, row t is what t hears:
#
# >>> Tensor.ones(4, 4).tril().int().tolist()           # `tril` keeps the lower left triangle
# [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
#
# The mask is also why training is efficient. Token t's output depends on tokens 0 to t alone, so one pass
# over a passage gives T honest predictions at once: of token 1 from token 0, of token 2 from tokens 0 and 1,
# and so on. *Why several heads?* One softmax is one question, and its answer is an average. A token may need
# to know several things: who speaks, which verb came last, what rhymes. So query, key and value are split
# among H heads, D = C / H numbers each; each asks its own question, and the H answers are put side by side.
class Plain:
    """The operations of a GPT in ordinary tensor algebra, which tinygrad differentiates by itself. Such a set
    is a *backend*; part II has another, some fifteen times faster. Read up to `attention`, then 6.3."""
    def embed(self, idx: Tensor, table: Tensor) -> Tensor:
        """Look up rows: ids (...,) int32 and a table (N, C) -> (..., C); NaN for an id that has no row."""
        exists = (idx >= 0) & (idx < table.shape[0])
        return exists.unsqueeze(-1).where(table[idx], math.nan)       # c.where(a, b): a where c, else b

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., I) @ (I, O) -> (..., O), plus a bias (O,) if there is one."""
        y = x @ weight
        return y if bias is None else y + bias

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C): mean 0 and variance 1 along C, then a scale (C,) and perhaps a shift (C,)."""
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        y = centred / (variance + 1e-5).sqrt() * weight
        return (y if bias is None else y + bias).contiguous()

    def gelu(self, x: Tensor) -> Tensor:
        """(...) -> (...), in GPT-2's form, with tanh: half of x, times a switch that goes from 0 to 2."""
        switch = 1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()
        return (0.5 * x * switch).contiguous()

    def attention(self, qkv: Tensor, position: Tensor, cache=None) -> Tensor:
        """Causal self-attention: tokens of one text hear each other, and none that comes later. qkv
        (B, T, 3, H, D), a query, key and value for each token and head -> the answers (B, T, H, D). `cache`
        is for part II: it keeps earlier keys and values when writing; new tokens are at `position` (T,)."""
        B, T, _, H, D = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                          # three of (B, H, T, D)
        if cache is None:
            visible = Tensor.ones(T, T, dtype=dtypes.bool).tril()
        else:
            k, v, visible = cache.extend(k, v, position)              # now S keys and values: (B, H, S, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)               # (B, H, T, S); without a cache S = T
        scores = visible.where(scores, -math.inf)
        weights = scores.softmax(-1).contiguous()                     # each row adds up to 1
        return (weights @ v).transpose(1, 2)                          # (B, T, H, D)

    def unembed(self, x: Tensor, table: Tensor) -> Tensor:
        """Compare with every row: (..., C) and a table (V, C) -> (..., V), the dot product with each row."""
        return x @ table.transpose(0, 1)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Surprise in nats (chapter 7): logits (..., V), a score for each token, and the ids that came (...)
        -> one number at each place (...); NaN for an id without a token."""
        top = logits.max(-1, keepdim=True)               # (subtracted, or exp() could overflow; added below)
        log_sum = (logits - top).exp().sum(-1, keepdim=True).log()
        chosen = logits.gather(-1, targets.unsqueeze(-1))             # at each place, the target's logit
        exists = (targets >= 0) & (targets < logits.shape[-1])
        return exists.where((top + log_sum - chosen).squeeze(-1), math.nan)

    def norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The length (a scalar) of all gradients as one vector: the root of their summed squares."""
        return sum(gradient.square().sum() for gradient in gradients.values()).sqrt()

    def adamw(self, parameters: dict[str, Tensor], m: dict, v: dict, gradients: dict, scale: Tensor,
              rates: Tensor, config: TrainConfig) -> list[Tensor]:
        """A step of AdamW (chapter 8), in place. `scale` shortens all gradients (0: change nothing); `rates`
        (3,) are the step size, 1 - beta1^t and 1 - beta2^t, with t = 1 at first. Returns what to realize."""
        changed = []
        for name, theta in parameters.items():                        # (theta: a parameter)
            gradient = gradients[name] * scale
            new_m = config.beta1 * m[name] + (1 - config.beta1) * gradient
            new_v = config.beta2 * v[name] + (1 - config.beta2) * gradient.square()
            m_hat = new_m / rates[1]
            v_hat = new_v / rates[2]
            decay = config.weight_decay if theta.ndim == 2 else 0.0
            new_theta = theta - rates[0] * (m_hat / (v_hat.sqrt() + 1e-8) + decay * theta)
            for old, new in ((theta, new_theta), (m[name], new_m), (v[name], new_v)):
                changed.append(old.assign((scale > 0).where(new, old)))   # (scale 0 leaves the old)
        return changed

    def place(self, array: np.ndarray) -> Tensor:
        """A tensor with the numbers of an array."""
        return Tensor(array)

    def record(self, function):
        """Wrap `function` (tensors in, a tuple of tensors out), recorded by TinyJit: arrays in, a list of
        arrays out. The arrays must have the same shapes and types at every call."""
        jit = TinyJit(function)

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            tensors = [Tensor(array).realize() for array in arrays]
            return [result.numpy() for result in jit(*tensors)]
        return call

PLAIN = Plain()
BACKENDS = [PLAIN]  # the best one comes last; part II adds its own where it works

# 6.3 The layers
# A layer is its parameters, and an operation from `ops`, the backend. `Linear` begins with small random
# weights: were all equal, they would get equal gradients, and stay equal for ever. Every tensor in a model or
# its parts, yours too, is trained and saved. (Whole numbers, and t after t.is_param_(False), are only saved.)
def first_weights(ops: Plain, rng, *shape: int, std: float = 0.02) -> Tensor:
    """Random weights of standard deviation `std`; without an `rng`, memory that a checkpoint will fill."""
    if rng is None:
        return Tensor.empty(*shape)
    return ops.place(np.float32(std) * rng.standard_normal(shape, np.float32))

class Embedding:
    """A table with a learned row for each of `n` things: ids (...,) -> (..., C)."""
    def __init__(self, ops: Plain, rng, n: int, C: int):
        self.ops = ops
        self.weight = first_weights(ops, rng, n, C)

    def __call__(self, idx: Tensor) -> Tensor:
        return self.ops.embed(idx, self.weight)

class Linear:
    """(..., n_in) -> (..., n_out)."""
    def __init__(self, ops: Plain, rng, n_in: int, n_out: int, std: float = 0.02):
        self.ops = ops
        self.weight = first_weights(ops, rng, n_in, n_out, std=std)
        self.bias = ops.place(np.zeros(n_out, np.float32))

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)

class LayerNorm:
    """(..., C) -> (..., C)."""
    def __init__(self, ops: Plain, C: int):
        self.ops = ops
        self.weight = ops.place(np.ones(C, np.float32))
        self.bias = ops.place(np.zeros(C, np.float32))

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias)

# *Dropout* (Srivastava et al. 2014) sets a share of the numbers to zero while training, at random, lest one
# part of the model rely on another; the rest grows, to keep the mean. `stir` makes noise from each number's
# place and a `key` (not attention's), random and new for each batch. Without a key, as in exams, all stay.
class Dropout:
    """(...) -> (...), the same shape. Every call in a pass through the network draws differently."""
    def __init__(self, share: float, key: Tensor | None):
        self.share = 0.0 if key is None else share
        self.key = key                                                # (1,) uint32
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.share == 0:
            return x
        self.calls += 1
        key = stir(self.key + self.calls)
        places = Tensor.arange(x.numel(), dtype=dtypes.uint32).reshape(x.shape)
        noise = stir(stir(places) ^ key)                              # from 0 to 2^32 - 1
        return (noise >= int(self.share * 2**32)).where(x / (1 - self.share), 0)

def stir(h: Tensor) -> Tensor:
    """uint32 -> uint32. A known recipe (murmur3's): change one bit, and about half of all bits change."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)

# 6.4 Blocks
# The rows of a passage, (B, T, C), run through the whole network like a stream, and each part only *adds*
# something to it: x + f(x). That is why it can be trained although it is deep. The slope of x + f(x) is 1 +
# f'(x), and thanks to the 1, a gradient gets through on its way back even where f'(x) is nearly 0.
#
# A *block* adds twice. Attention gathers from other tokens; a small network of two layers (a *multilayer
# perceptron*), four times as wide inside, then thinks about what was gathered, for each token by itself. The
# norm stands *before* each of them: x + f(norm(x)). With norm(x + f(x)), that 1 would be multiplied by the
# slope of a norm at each layer, and such models are harder to train (Xiong et al. 2020, arXiv:2002.04745).
#
# Two `Linear`s in a block, both named `c_proj`, add to the stream: 2 n_layer times in all. If each addition
# has variance s^2, the sum has 2 n_layer s^2. So they begin with weights divided by the root of 2 n_layer.
class Attention:
    """(B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig, ops: Plain, rng):
        C = config.n_embd
        self.ops = ops
        self.n_head = config.n_head
        self.c_attn = Linear(ops, rng, C, 3 * C)                      # to query, key and value, for all heads
        self.c_proj = Linear(ops, rng, C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def __call__(self, x: Tensor, position: Tensor, cache=None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.n_head, C // self.n_head)
        y = self.ops.attention(qkv, position, cache)                  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))                        # the heads' answers, mixed

class MLP:
    """(..., C) -> (..., C)."""
    def __init__(self, config: GPTConfig, ops: Plain, rng):
        C = config.n_embd
        self.ops = ops
        self.c_fc = Linear(ops, rng, C, 4 * C)
        self.c_proj = Linear(ops, rng, 4 * C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def __call__(self, x: Tensor) -> Tensor:
        return self.c_proj(self.ops.gelu(self.c_fc(x)))

class Block:
    """(B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig, ops: Plain, rng):
        self.ln_1 = LayerNorm(ops, config.n_embd)
        self.attn = Attention(config, ops, rng)
        self.ln_2 = LayerNorm(ops, config.n_embd)
        self.mlp = MLP(config, ops, rng)

    def __call__(self, x: Tensor, position: Tensor, drop: Dropout, cache=None) -> Tensor:
        heard = self.attn(self.ln_1(x), position, cache)
        x = (x + drop(heard)).contiguous()
        thought = self.mlp(self.ln_2(x))
        return (x + drop(thought)).contiguous()

# 6.5 The GPT
# After the last block and one more norm, the row at place t should describe what comes at place t + 1. To
# turn it into a guess, compare it with the row of every token in `wte`: the dot product is large where the
# two point the same way. These V numbers are called *logits*; softmax makes probabilities of them. One table
# can serve for reading and for guessing: tokens that behave alike should get similar logits, too. With V =
# 1024 and C = 128, it saves 131,072 parameters (Press & Wolf 2017, arXiv:1608.05859); but see exercise 5.
class GPT:
    """A GPT-2 of any size: `model(idx)` gives logits, `model.loss(idx, targets)` is what training lowers.
    Its parameters are named as in Hugging Face's GPT-2 files; `seed=None` draws no random weights."""
    def __init__(self, config: GPTConfig, backend: Plain | None = None, *,
                 tokenizer: BPETokenizer | None = None, seed: int | None = 1337):
        if config.n_embd % config.n_head:
            raise UserError(f"--n-head {config.n_head} does not divide --n-embd {config.n_embd} equally")
        ops = backend or BACKENDS[-1]
        rng = None if seed is None else np.random.default_rng((WEIGHTS, seed))
        self.config = config
        self.ops = ops
        self.tokenizer = tokenizer
        self.source = None                                            # (where it comes from, for part III)
        self.wte = Embedding(ops, rng, config.vocab_size, config.n_embd)
        self.wpe = Embedding(ops, rng, config.block_size, config.n_embd)
        self.h = [Block(config, ops, rng) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(ops, config.n_embd)

    def parameters(self) -> dict[str, Tensor]:
        """What is learned, by name (h.0.attn.c_attn.weight ...), each once. Realizes all of the tensors."""
        found = {}                                                    # identity -> (name, tensor)
        everything = get_state_dict(self)                             # name -> tensor, of all parts
        for name, tensor in everything.items():
            # (Skip this: Tensor.ones(3) is only a note, w.T a view of w; each gets memory of its own.)
            tensor.replace(tensor.clone() if tensor.device is None else tensor.contiguous())
            if tensor.is_param and dtypes.is_float(tensor.dtype):
                found.setdefault(id(tensor), (name, tensor))
        Tensor.realize(*everything.values())
        return dict(found.values())

    def hidden(self, idx: Tensor, key: Tensor | None = None, position: Tensor | None = None,
               caches=None) -> Tensor:
        """Ids (B, T) int32 -> the stream after the last block, normalised, (B, T, C). The ids stand at
        `position` (T,), or else from 0 on. (`key` starts dropout, `caches` are part II's.)"""
        if not dtypes.is_int(idx.dtype) or idx.ndim != 2 or not 1 <= idx.shape[1] <= self.config.block_size:
            raise ValueError(f"ids are whole numbers (B, T), T up to block_size, not {idx.dtype} {idx.shape}")
        if position is None:
            position = Tensor.arange(idx.shape[1], dtype=dtypes.int32)
        drop = Dropout(self.config.dropout, key)
        x = drop(self.wte(idx) + self.wpe(position)).contiguous()     # what it is, plus where it stands
        for i, block in enumerate(self.h):
            x = block(x, position, drop, caches[i] if caches else None)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """The stream (..., C) -> logits (..., V)."""
        return self.ops.unembed(x, self.wte.weight)

    def __call__(self, idx: Tensor, key: Tensor | None = None) -> Tensor:
        """Ids (B, T) int32 with T <= block_size -> logits (B, T, V) of the next token, at each place."""
        return self.head(self.hidden(idx, key))

# === Chapter 7. The loss
#
# How wrong is a guess? If the model gave the token that really came the probability p, we say that it was
# surprised by -ln p *nats*: by nothing if p = 1, by 0.69 if p = 1/2, by 4.6 if p = 1/100. Why ln? A text's
# probability is the product of its tokens', and ln makes it a sum: surprises add up, and can be averaged.
# Their mean over all tokens is the *cross-entropy*, the loss that training lowers. With p from softmax, a
# surprise is ln(sum of exp(logits)) minus the logit of the token that came: `cross_entropy` (6.2).
#
# What should it be at the start? Small random weights make small logits, so each of V tokens gets about 1/V,
# and the loss is ln V; with 1024 tokens, 6.93. If a new model's loss is far from that, something is wrong.
#
# >>> new = GPT(GPTConfig(vocab_size=1024, block_size=16, n_layer=2, n_embd=32), PLAIN)
# >>> idx = Tensor([list(range(16))], dtype="int32")
# >>> abs(new.loss(idx, idx + 1).item() - 6.93) < 0.05
# True
#
# Nats per token cannot be compared between tokenizers: longer tokens mean fewer but harder guesses. So we
# also count the surprise in bits (a nat is 1 / ln 2 = 1.44 bits) for each *byte* of the text. A byte of which
# one knows nothing costs 8 bits (it is one of 2^8); 3.6 nats for 2.3 bytes, say, are 3.6 * 1.44 / 2.3 = 2.25.
def loss(model: GPT, idx: Tensor, targets: Tensor, key: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats (a scalar); `targets` (B, T) is `idx` (B, T), one token further on."""
    if targets.shape != idx.shape or not dtypes.is_int(targets.dtype):
        raise ValueError(f"targets are whole numbers {idx.shape}, not {targets.dtype} {targets.shape}")
    return model.ops.cross_entropy(model(idx, key), targets).mean()

GPT.loss = loss  # a method of GPT, kept back for this chapter

# === Chapter 8. A training step
#
# *A batch.* To compute the loss and its slopes on the whole text for each step would take too long. A handful
# of random passages give nearly the same, far sooner. Each has T + 1 tokens: T questions, and T answers.
def get_batch(data: np.ndarray, config: TrainConfig, T: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The passages of a step: what is read and what is to be predicted, each (grad_accum, B, T) int32."""
    rng = np.random.default_rng((PASSAGES, config.seed, step))
    starts = rng.integers(0, len(data) - T, (config.grad_accum, config.batch_size, 1))
    passages = data[starts + np.arange(T + 1)].astype(np.int32)       # (grad_accum, B, T + 1)
    return passages[..., :-1], passages[..., 1:]

# *The gradient* of the loss says, for each parameter, how the loss would rise with it. We go the other way.
# How far? *Adam* (Kingma & Ba 2015, arXiv:1412.6980) keeps two running averages for each parameter: at each
# step, m becomes 0.9 m + 0.1 times the gradient, and v becomes 0.99 v + 0.01 times its square (beta1 = 0.9,
# beta2 = 0.99). `m` is the average gradient: chance in the choice of passages cancels, the common direction
# remains. The root of `v` is the gradient's usual size. The step is proportional to m / sqrt(v): small
# gradients move a parameter as fast as large ones, but those that keep changing sign move it slowly.
#
# Both averages begin at zero and are too small at first, by the factors 1 - 0.9^t and 1 - 0.99^t at step t =
# 1, 2, ... So `adamw` (6.2) divides by these (*bias correction*). If the gradient is always g > 0, then m_hat
# = m / (1 - 0.9^t) = g, v_hat = g^2, and m_hat / sqrt(v_hat) is 1. Undivided, 0.1 g / sqrt(0.01 g^2) is 1 at
# step 1, too, but 0.65 g / sqrt(0.096 g^2) is 2.1 at step 10: a step twice as long, since v lags more.
#
# AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) also pulls matrices a little towards zero at each step:
# weights that no gradient renews fade. All gradients together, if longer than `grad_clip`, are shortened.
#
# *The step size.* Adam's first averages rest on few gradients, so steps begin small (*warm-up*). Towards the
# end we want to come to rest at a low point, not to jump across it, so steps shrink along half a cosine:
#
# >>> plan = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=100, max_iters=1100)
# >>> [round(learning_rate(plan, step), 2) for step in (0, 49, 99, 100, 350, 600, 850, 1100)]
# [0.01, 0.5, 1.0, 1.0, 0.87, 0.55, 0.23, 0.1]
def learning_rate(config: TrainConfig, step: int) -> float:
    """The step size at step 0, 1, 2, ..."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_iters - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * progress))                 # from 1 to 0
    return config.min_lr + (config.learning_rate - config.min_lr) * height

class AdamW:
    """A model's optimizer. `m` and `v` hold Adam's averages, by the parameters' names. `optimizer(data, i)`
    takes step i and returns its loss, and the gradient's length before clipping, as numbers."""
    def __init__(self, model: GPT, config: TrainConfig):
        self.model = model
        self.config = config
        self.parameters = model.parameters()
        self.tensors = list(get_state_dict(model).values())           # (the untrained ones, too)
        zeros = {name: np.zeros(p.shape, np.float32) for name, p in self.parameters.items()}
        self.m = {name: model.ops.place(array).realize() for name, array in zeros.items()}
        self.v = {name: model.ops.place(array).realize() for name, array in zeros.items()}
        sums = zeros if config.grad_accum > 1 else {}                 # a step's batches add to these
        self.sums = {name: model.ops.place(array).realize() for name, array in sums.items()}
        self.batch = model.ops.record(self.step)                      # only adds up gradients
        self.last_batch = model.ops.record(self.step)                 # and steps (the other side of its `if`)

    def step(self, x: Tensor, y: Tensor, key: Tensor, is_first: Tensor, rates: Tensor | None = None):
        """A batch x, y (B, T), a key (1,), and whether it `is_first` of its step (1,) -> its loss. With the
        last batch come the `rates` (3,): the step is taken, and the gradient's length returned as well."""
        loss = self.model.loss(x, y, key)                             # forward
        slopes = loss.gradient(*self.parameters.values())             # backward: chapter 4's backpropagation
        gradients = dict(zip(self.parameters, slopes, strict=True))
        for name, sums in self.sums.items():
            gradients[name] = sums.assign(is_first.where(0, sums) + gradients[name] / self.config.grad_accum)
        Tensor.realize(loss, *gradients.values())                     # (frees what the way back needed)
        if rates is None:
            return (loss,)
        length = self.model.ops.norm(gradients)
        scale = (self.config.grad_clip / length).minimum(1)           # clip
        scale = (length < math.inf).where(scale, 0).contiguous()      # if it is not finite, nothing changes
        changed = self.model.ops.adamw(self.parameters, self.m, self.v, gradients, scale, rates, self.config)
        Tensor.realize(*changed)
        return loss, length

    def __call__(self, data: np.ndarray, i: int) -> tuple[float, float]:
        c = self.config
        now = get_state_dict(vars(self.model) | {"tokenizer": None}).values()    # (it has no tensors)
        if [id(tensor) for tensor in now] != [id(tensor) for tensor in self.tensors]:
            raise ValueError("the model has other tensors than when its optimizer was made: make a new AdamW")
        Tensor.realize(*now)                                          # (in case any were assigned to)
        x, y = get_batch(data, c, self.model.config.block_size, i)
        if (len(x) > 1) != bool(self.sums):
            raise ValueError("grad_accum has changed since the optimizer was made: make a new AdamW")
        keys = np.random.default_rng((DROPOUT, c.seed, i)).integers(2**32, size=(len(x), 1), dtype=np.uint32)
        rates = [learning_rate(c, i), 1 - c.beta1 ** (i + 1), 1 - c.beta2 ** (i + 1)]
        first = np.arange(len(x))[:, None] == 0                       # (grad_accum, 1): the sums begin anew
        losses = [self.batch(*batch)[0] for batch in zip(x[:-1], y[:-1], keys[:-1], first[:-1], strict=True)]
        loss, length = self.last_batch(x[-1], y[-1], keys[-1], first[-1], np.array(rates, np.float32))
        return float(np.mean([*losses, loss])), float(length)

# === Chapter 9. Training
#
# Training is that step, over and over. This loop only reports each step; whoever runs it prints, examines and
# saves, as part III's `train` does, and can stop at any time. Try it:
#
# >>> text = (Path("data") / "play.txt").read_text()
# >>> tokenizer = BPETokenizer.train(text, 300)
# >>> tiny = GPT(GPTConfig(block_size=16, vocab_size=300, n_layer=1, n_embd=32), tokenizer=tokenizer)
# >>> plan = TrainConfig(max_iters=60, learning_rate=1e-2, warmup_steps=10)
# >>> losses = [loss for _, loss, _ in training(tiny, plan, np.array(tokenizer.encode(text)))]
# >>> losses[0] > 5.5, losses[-1] < 4.5
# (True, True)
def training(model: GPT, config: TrainConfig, data: np.ndarray, optimizer: AdamW | None = None, start=0):
    """Train `model` on `data`, token ids (N,), from step `start` to config.max_iters. After each step, yield
    how many have been taken, the loss, and the gradient's length."""
    optimizer = optimizer or AdamW(model, config)
    if optimizer.model is not model or optimizer.config != config:
        raise ValueError("this optimizer was made for another model, or with another TrainConfig")
    if data.dtype.kind not in "iu" or not 0 <= data.min() <= data.max() < model.config.vocab_size:
        raise ValueError(f"data are token ids (N,), whole numbers from 0 to {model.config.vocab_size - 1}")
    for i in range(start, config.max_iters):
        yield i + 1, *optimizer(data, i)

# === Chapter 10. Writing
#
# To write, ask for the probabilities of the next token and draw one; append it; ask again. Always taking the
# likeliest is dull and ends in loops; drawing from the probabilities picks, now and then, a nearly impossible
# one. A *temperature* divides the logits, a dial between these: softmax of [2, 1, 0] gives 67 %, 24 %
# and 9 %; at temperature 0.5, 87 %, 12 % and 2 %. Two more dials cut off the tail: `top_k` keeps the k
# likeliest, `top_p` the fewest that have the share p or more (Holtzman et al. 2020, arXiv:1904.09751).
def draw(logits: np.ndarray, rng: np.random.Generator, temperature=0.8, top_k=0, top_p=1.0) -> int:
    """Logits (V,) -> a token. Temperature 0 takes the likeliest."""
    if not np.isfinite(logits.max()):
        raise ValueError("the logits are not numbers: has training failed, or does an id belong to no token?")
    if temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)  # (softmax, not yet adding up to 1)
    if top_k or top_p < 1:
        order = np.argsort(-p, kind="stable")                         # the likeliest first
        share = np.cumsum(p[order[:top_k or None]])
        enough = 1 + int((share < top_p * share[-1]).sum())            # all below top_p, and one more
        p[order[enough:]] = 0
    # Lay the probabilities end to end, as lengths, and choose a random point: in which of them is it?
    ends = np.cumsum(p)
    return int(np.searchsorted(ends[:-1], rng.random() * ends[-1], side="right"))

# The model sees T tokens at most. Past that, only the newest T / 2 stay. (All places shift then, and part II
# computes them anew, so we do it seldom.) A recording has one shape: zeros fill `idx`; the mask hides them.
def write(model: GPT, ids: list[int], max_tokens: int, seed=0, text=0, **how):
    """Yield what follows `ids` (not empty). Two numbers, `seed` and `text`, fix chance; `how` is `draw`'s."""
    T = model.config.block_size
    rng = np.random.default_rng((WRITING, seed, text))
    model.parameters()                                                # (puts all numbers into memory)
    logits_of = model.ops.record(lambda idx: (model(idx).realize(),))
    seen = list(ids)[-T:]
    for _ in range(max_tokens):
        if len(seen) > T:
            seen = seen[-max(1, T // 2):]
        idx = np.zeros((1, T), np.int32)
        idx[0, :len(seen)] = seen
        logits = logits_of(idx)[0][0, len(seen) - 1]                  # (V,), at the last token of the text
        seen.append(draw(logits, rng, **how))
        yield seen[-1]

# === Chapter 11. Exercises
#
# To understand all this, change it. What you change runs as you wrote it, without part II's programs.
# `python minimiggy.py --gradcheck` tells whether all gradients are right. As it stands, `python minimiggy.py
# --train --max-iters 500` ends at 2.68 bits a byte, give or take 0.02; with a change, as it says behind it:
#
# 1. Another bend. Let `gelu` return x.relu().square(): 0 below 0, else x^2. (2.61: better, and simpler.)
# 2. No `self.wpe(position)` in `hidden`. (2.65, no worse: the mask tells the order, too: arXiv:2203.16634.)
# 3. No sqrt(D). Take it out of `attention`. (2.77.)
# 4. No norms in the blocks. Call self.attn(x, ...) and self.mlp(x). (2.83.)
# 5. Two tables. Make `self.lm_head` like `self.wte`; let `head` use its weight. (2.61; + 131,072 numbers.)
# 6. No v. Let `adamw` step along m_hat alone, without dividing. (3.96. Which learning rate would it need?)

# ============================================================================================================
# Part II. Fast
# ============================================================================================================
#
# Chapter 12. Where the time goes
#
# Part I as it stands takes about fifteen times as long for a training step as this part does, on the same
# machine, for the same numbers. That it computes some things more than once is the smaller reason. A core of
# a processor can do some 100 billion multiplications and additions a second, but only with numbers that are
# in its *registers*, which hold a few hundred. To fetch one from the cache takes several times as long as
# using it, and from memory a hundred times. So the question is less how many operations there are than how
# often each number is fetched.
#
# Three things go wrong when tinygrad compiles part I by its own rules. In a *product* of two N x N matrices
# each number is used N times, and its loops fetch it nearly every time. By *fusion*, operations that ought to
# run once are computed again inside other loops; `contiguous` in part I prevents the worst. And for most
# programs only one *core* works.
#
# With the programs of this part, a step of `--train` (12 passages of 64 tokens, 0.93 million parameters)
# takes 29 milliseconds on two cores of an AMD EPYC. Its programs share their time like this:
#
#     products of matrices                80 %     chapter 15
#     attention, forward and back         10 %     chapter 16
#     gelu, forward and back               3 %     chapter 17
#     layer norm, forward and back         2 %     chapter 17
#     embedding and cross-entropy          1 %     chapter 17
#     AdamW and the gradient's length      2 %     chapter 18
#     additions and sums                   2 %     part I's operations, as tinygrad compiles them
#
# In this part we write the loops ourselves, for the operations of part I and their gradients, in a language
# that tinygrad compiles. Nothing of part I changes. Whatever we have no program for goes the old way, and the
# two can be mixed freely.

import ast
import copy
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import pickle
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import FunctionType

from tinygrad import Context, Device

# === Chapter 13. What we borrow from tinygrad's inside
#
# Part I uses what tinygrad promises to its users. Here we go behind the counter: to its compiler, to the list
# of programs that TinyJit records, and to *UOps*, the nodes of its syntax trees (`op` says what a node does,
# `src` which nodes it needs, `arg` the rest). All such names are imported here, in one place. They may change
# with the next version, so we use them with the one that we know. With any other, part I's operations run as
# they are, slowly, and `WHY_PLAIN` says why in one line.

TINYGRAD = "0.14.0"

WHY_PLAIN = None
KNOWN = False
try:
    from tinygrad import UOp
    from tinygrad.codegen import to_program, to_program_cache, to_program_key
    from tinygrad.codegen.opt import Opt, OptOps
    from tinygrad.dtype import AddrSpace
    from tinygrad.engine.realize import capturing, get_call_arg_uops, get_runtime
    from tinygrad.helpers import DEBUG, DEV, JIT, getenv
    from tinygrad.renderer import Estimates
    from tinygrad.uop.ops import AxisType, KernelInfo, Ops
    if not Path(f"{sys.modules['tinygrad'].__path__[0]}-{TINYGRAD}.dist-info").exists():
        from importlib.metadata import version  # (this takes 20 ms, so we look for pip's folder first)
        if version("tinygrad") != TINYGRAD:     # (or none is installed, which is an ImportError, too)
            raise ImportError(f"tinygrad {version('tinygrad')} is not {TINYGRAD}")
    KNOWN = True
except ImportError as error:
    WHY_PLAIN = f"part II's programs are not used, since {error}: pip install tinygrad=={TINYGRAD}"

# 13.1 The machine
X86 = platform.machine().lower() in ("x86_64", "amd64")
QUOTAS = (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"])  # in newer and in older Linux

# A container can be given less time than its machine has. A file then says how much, in what time: "200000
# 100000" are 0.2 s in every 0.1 s, so two cores. More threads than that would not run side by side: each
# would wait for the others at every barrier of chapter 19 until its turn comes again.
def count_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The processor cores that this process may use: those it may run on, and no more than a container's
    quota, which stands in a file. Of a Mac's cores only the fast ones, which would wait for the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if sys.platform == "darwin":
        with suppress(OSError, ValueError, subprocess.SubprocessError):  # (an Intel Mac's are all alike)
            ask = ["sysctl", "-n", "hw.perflevel0.physicalcpu"]
            cores = int(subprocess.run(ask, capture_output=True, timeout=5).stdout)
    for names in QUOTAS:
        with suppress(OSError, ValueError):  # no such file, or "max": no quota
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if int(quota) > 0:  # (-1: none)
                cores = min(cores, max(1, int(quota) // int(period)))
    return cores

@functools.cache
def describe_processor() -> str:
    """What the processor can do: a program for one may be nonsense to another. Linux tells it in a file;
    elsewhere, and in a container without that file, the compiler knows."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        lines = re.findall(r"^(?:model name|flags|Features)\s*:.*$", text, re.MULTILINE)
        return "\n".join(sorted(set(lines)))
    native = "-march=native" if X86 else "-mcpu=native"
    ask = [os.environ.get("CC") or "clang", native, "-dM", "-E", "-x", "c", "/dev/null"]
    told = platform.processor()
    with suppress(OSError, subprocess.SubprocessError):
        told += subprocess.run(ask, capture_output=True, text=True, timeout=9).stdout.lower()
    return told  # (with a line such as #define __avx512f__ 1)

CORES = count_cores()
AVX2 = X86 and "avx2" in describe_processor()
AVX512 = X86 and "avx512f" in describe_processor()

# If tinygrad was imported first, as in notebooks, it read DEV and CC before we could set them. So we tell it
# again. (Not if it has computed already: then it has put the name of its device into DEV, and that stays.)
if KNOWN and not DEV.device:
    DEV.value = os.environ["DEV"] or "CPU"
    getenv.cache_clear()

# By itself, clang uses only half the width of AVX-512 registers: 107 instead of 166 billion operations a
# second.
if KNOWN and AVX512 and repr(DEV) == "CPU":
    DEV.value = "CPU:CLANG:x86_64,native,prefer-vector-width=512"
WIDE = KNOWN and AVX512 and "native" in repr(DEV)  # (DEV can also name another processor than this one)

# 13.2 A compiler that works, a device that is there
#
# A compiler that is found may not work: on a Mac, clang is a stub until Xcode's tools are installed; a disk
# can forbid that anything on it is run; a package can be half installed. So we believe it when it has
# compiled something.
#
# What can be made again at any time is kept in the home's cache, or among the temporary files. Everybody
# may write among the latter, and somebody could have put a folder there under our name, with programs in it
# for us to run; so a folder must be our own.
def own_folders():
    """Yield these folders, as far as there are any that can be written."""
    home_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid()
    for folder in (Path(home_cache) / "minimiggy", Path(tempfile.gettempdir()) / f"minimiggy-{user}"):
        with suppress(OSError):
            if folder.is_absolute():  # (without a home, "~" stays "~")
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder.stat().st_uid == user and os.access(folder, os.W_OK | os.X_OK):
                    yield folder

def cache_folder() -> Path:
    """The first of these folders; UserError if there is none."""
    for folder in own_folders():
        return folder
    raise UserError("neither the home nor the folder for temporary files can be written: set XDG_CACHE_HOME")

def complaint_of(compiler: str) -> str:
    """What is wrong with `compiler`; an empty text if it is a clang that works."""
    arch = "x86_64" if X86 else platform.machine()
    target = f"--target={arch}-none-unknown-elf"  # (as tinygrad asks for: a bare program, without a system)
    command = [compiler, "-c", "-x", "c", "-ffreestanding", target, "-", "-o", "-"]
    try:
        done = subprocess.run(command, input=b"int one(void) { return 1; }", capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return getattr(error, "strerror", None) or "it does not end"
    if done.returncode == 0 and done.stdout:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else f"it compiles nothing, and ends with exit code {done.returncode}"

def find_compiler() -> None:
    """Set CC to a clang that works: the user's, one that is installed, or ziglang's. UserError if none
    does."""
    chosen = os.environ.get("CC")
    wrong = complaint_of(chosen or "clang")
    if not wrong:
        return
    if chosen and not chosen.endswith("minimiggy-clang"):
        raise UserError(f"the compiler CC={chosen} does not work ({wrong}): unset CC, or set it to a clang")
    try:
        import ziglang
    except ImportError:
        raise UserError("there is no C compiler: pip install ziglang (or install clang)") from None
    zig = Path(ziglang.__path__[0]) / "zig"
    for folder in (zig.parent, *own_folders(), Path(sys.prefix)):  # (a home may forbid to run programs in it)
        launcher = folder / "minimiggy-clang"
        with suppress(OSError):
            unfinished = launcher.with_name(f"{launcher.name}.{os.getpid()}")
            unfinished.write_text(f'#!/bin/sh\ntrap "" INT HUP\nexec {shlex.quote(str(zig))} clang "$@"\n')
            unfinished.chmod(0o755)
            unfinished.replace(launcher)
            wrong = complaint_of(str(launcher))
            if not wrong:
                os.environ["CC"] = str(launcher)
                return
    raise UserError(f"ziglang's C compiler does not work ({wrong}): pip install --force-reinstall ziglang, "
                    "or set TMPDIR to a folder in which programs may be run")

# (Whoever uses this file as a library never calls `open_device`.)
if KNOWN and not os.environ.get("CC") and (sys.platform == "darwin" or not shutil.which("clang")):
    with suppress(UserError):
        find_compiler()

def open_device() -> None:
    """See that tinygrad can compute. UserError, with what to do, if it cannot."""
    named = os.environ.get("DEV", "")
    os.environ.setdefault("PATH", os.defpath)  # (cron and the like do without, but tinygrad does not)
    if named.upper().startswith("CPU"):
        find_compiler()
        if KNOWN and not load_programs():
            with suppress(OSError):
                for number in range(HELPERS):  # there will be work for them soon
                    helper(f"helper_{number}")
        # tinygrad begins with four programs of its own. It may keep these in its database, which saves a
        # tenth of a second at later starts. (With AVX2 only: several processors may share a home, and what
        # one with AVX2 has compiled an older one cannot run, but all with AVX2 can.)
        with suppress(Exception), Context(CACHELEVEL=int(AVX2)):
            Tensor([1.0]).realize()
    try:
        Tensor([1.0]).realize().tolist()
        if helper.cache_info().currsize and not DEBUG:  # (if helpers run, see 13.4)
            ordered(replay_program(CORES), Device["CPU"].renderer)  # (of chapter 19: all recordings need it)
    except subprocess.CalledProcessError:
        raise  # the compiler has failed: `explain` says so
    except ModuleNotFoundError:
        raise UserError(f"DEV={named}: no such device (CPU, CUDA, METAL, AMD, CL, ...)") from None
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        way_out = "is a variable of tinygrad's set, such as THREADS?" if named == "CPU" else "unset DEV"
        raise UserError(f"DEV={named} cannot be used here ({words[0][:150]}): {way_out}") from None

# 13.3 Programs that are kept
#
# To compile the programs of a training step takes some seconds. They are the same the next time, so we keep
# them in a file: whatever tinygrad has compiled in this process is added to it, and given back to tinygrad at
# the next start. The file's name says for which tinygrad, Python and processor it is. Each addition begins
# with its checksum, 32 bytes, and its length, 8 bytes; then comes a pickle. Where that is wrong, or the file
# cannot be read or written, we do without: a cache must never be the reason why something fails. It must not
# make it slow, either: only its newest megabytes are used, or whoever has tried many models would wait for
# all of theirs. (What was too old to be used is compiled again, and so is among the newest.)
NEWEST = 4 << 20  # bytes: some 700 programs, in a tenth of a second

def programs_file() -> Path:
    """Where the compiled programs for this machine are kept."""
    machine = [TINYGRAD, sys.version, describe_processor()]
    return cache_folder() / f"programs-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}"

@functools.cache
def load_programs() -> set:
    """Give tinygrad the programs that were kept, once; return their keys, which grow as more are kept."""
    loaded = {}
    with suppress(Exception):  # (what a damaged pickle may raise, nobody knows)
        data = programs_file().read_bytes() if KNOWN and DEBUG < 4 else b""  # (DEBUG=4 shows programs' C)
        place = 0
        while place < len(data):
            end = place + 40 + int.from_bytes(data[place + 32:place + 40], "little")
            if hashlib.sha256(data[place + 40:end]).digest() != data[place:place + 32] or end > 1 << 25:
                programs_file().unlink()  # damaged, or too large: begin anew
                return set()
            if len(data) - end < NEWEST:
                loaded |= pickle.loads(data[place + 40:end])
            place = end
        to_program_cache.update(loaded)
    return set(loaded)

def essence(program):
    """A compiled program without its syntax tree and instructions: to run it, the code and the arguments
    are enough."""
    # `program.src` is its tree, the list of its instructions, and then its C and its machine code.
    sink, instructions, *code = program.src
    arguments = instructions.replace(src=tuple(u for u in instructions.src if u.op is Ops.PARAM))
    return program.replace(src=(UOp.sink(arg=sink.arg), arguments, *code))

def keep_programs() -> None:
    """Keep what has been compiled since the last time."""
    kept = load_programs()
    if not KNOWN or DEBUG >= 4 or kept >= to_program_cache.keys():
        return
    programs = {key: essence(to_program_cache[key]) for key in to_program_cache.keys() - kept}
    with suppress(Exception), open(programs_file(), "ab") as file:
        data = pickle.dumps(programs)
        file.write(hashlib.sha256(data).digest() + len(data).to_bytes(8, "little") + data)
    to_program_cache.update(programs)
    kept.update(programs)

# 13.4 Compiling on all cores
#
# A training step has some forty different programs, and to compile one takes 0.03 to 0.5 s, much of it in
# Python, which uses a single core. So other processes help. Each gets one program at a time through a pipe
# and answers through another. It ends when we do, or a minute after its last order. Should it end before,
# because somebody has killed it, say, then what it has not done is done here. It has a session of its own, so
# that Ctrl-C or a closed terminal, which reach all processes of a session, do not end it in the middle.
HELPER_CODE = """
import pickle, signal, sys
from tinygrad.codegen import to_program
while True:
    signal.alarm(60)
    tree, renderer = pickle.loads(pickle.load(sys.stdin.buffer))
    pickle.dump(pickle.dumps(to_program(tree, renderer)), sys.stdout.buffer)
    sys.stdout.flush()
"""
HELPERS = min(CORES, 4) - 1

@functools.cache
def helper(name: str) -> subprocess.Popen:
    """The process of this name. It is started at the first call, and is ready half a second later. (How many
    have been started, `helper.cache_info().currsize` tells.)"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-P", "-c", HELPER_CODE], start_new_session=True, **pipes)

# For each process there is a thread here that hands it programs and waits for them. It moves bytes and knows
# nothing of what they mean: tinygrad's trees are made by one thread only. (That is why a program is pickled
# twice: the outer pickle only says where the bytes end.) The pool calls its threads helper_0, helper_1 and so
# on, and each has the process of its own name.
@functools.cache
def helpers() -> ThreadPoolExecutor:
    """These threads, one for each process."""
    return ThreadPoolExecutor(max(1, HELPERS), thread_name_prefix="helper")

def let_help(order: bytes) -> bytes:
    """Have a program compiled; this runs in one of the threads."""
    name = threading.current_thread().name
    if helper(name).poll() is not None:
        helper.cache_clear()  # it has ended: begin another
    process = helper(name)
    pickle.dump(order, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)

# A program is ordered as soon as its kernel is written down (chapter 14). So the helpers are at work while
# the step that it belongs to is still being put together here, which takes half a second.
@functools.cache
def ordered(tree, renderer) -> Future:
    """Order a program from the helpers, once, and return what will hold it."""
    return helpers().submit(let_help, pickle.dumps((tree, renderer)))

def compile_together(trees: list) -> None:
    """Compile these programs, given as tinygrad's syntax trees, if help is worth it; tinygrad compiles the
    others when they run. The helpers take what was ordered first; we take the largest that they have not yet
    begun: `cancel` says whether we may."""
    renderer = Device["CPU"].renderer
    todo = {tree: to_program_key(tree, renderer) for tree in trees}
    new = [tree for tree, key in todo.items() if key not in to_program_cache]
    # (For one to three programs, it is not worth starting the helpers: they are ready after half a second.)
    if not HELPERS or DEBUG or len(new) < 4 and not helper.cache_info().currsize:
        return
    orders = {tree: ordered(tree, renderer) for tree in new}
    for tree in sorted(new, key=lambda tree: len(tree.toposort()), reverse=True):
        if orders[tree].cancel():
            to_program(tree, renderer)
    for tree, order in orders.items():
        with suppress(Exception):  # (it is cancelled; or a helper has died: tinygrad will compile it)
            to_program_cache[todo[tree]] = pickle.loads(order.result())

def forget_orders() -> None:
    """Let the helpers finish what they are doing, and then end. (Who orders again gets new ones: the answers
    of these are for the threads that wait for them.)"""
    helpers().shutdown(wait=False, cancel_futures=True)
    for cache in (helpers, helper, ordered):
        cache.cache_clear()

# 13.5 A recording
def memory_of(tensor: Tensor) -> np.ndarray:
    """The memory of a computed or empty tensor on the CPU, as an array that shares it."""
    memory = tensor.uop.buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, np.dtype(tensor.dtype.fmt)).reshape(tensor.shape)

def array_of(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor: `numpy` copies them, which takes 0.3 ms, so they are read where they lie if
    they are known to lie there."""
    float32 = tensor.device == "CPU" and tensor.dtype == dtypes.float32 and 0 not in tensor.shape
    return memory_of(tensor) if KNOWN and float32 and tensor.uop.has_buffer_identity() else tensor.numpy()

def give_memory(things: dict) -> None:
    """Put all tensors in `things` into memory, also such as Tensor.zeros(3), which is only noted down."""
    for tensor in get_state_dict(things).values():
        tensor.replace(tensor.clone() if tensor.device is None else tensor.contiguous()).realize()

# Ordinary operations, such as the addition in x + f(x), become programs of tinygrad's own. tinygrad divides
# one among several cores if each gets 131,072 numbers or more, since to call it from Python takes long.
# Chapter 19 calls programs so fast that 16,384 in all are enough; and each core finds its part in its own
# cache if it has computed it in the program before. (A default training step takes 4 % less time.) What is
# divided is the outermost loop, in programs without a sum.
ENOUGH = 1 << 14  # numbers

def divided(call, cores: int):
    """A call of a recording; if its program is tinygrad's, and has no sum in it, divided among `cores`."""
    tree = call.src[0]
    if tree.op is not Ops.SINK or tree.arg.opts_to_apply is not None:  # (no program, or one of ours)
        return call
    loops = [node for node in tree.toposort() if node.op is Ops.RANGE]
    is_sum = any(loop.arg[-1] is not AxisType.WEAK for loop in loops)  # (WEAK loops go over the results)
    if is_sum or math.prod(loop.vmax + 1 for loop in loops) < ENOUGH:
        return call
    renderer = Device["CPU"].renderer
    outermost = min(loops, key=lambda loop: loop.arg[0])
    cores = divisor(outermost.vmax + 1, min(cores, renderer.global_max[0]))  # (tinygrad has a limit, too)
    if cores == 1 or not renderer.has_threads:
        return call
    plan = dataclasses.replace(tree.arg, opts_to_apply=(Opt(OptOps.THREAD, 0, cores),))
    return call.replace(src=(tree.replace(arg=plan), *call.src[1:]))

def with_program(call):
    """A call of a recording with its compiled program, if there is one, in place of the tree: otherwise
    tinygrad would look for programs in all trees, which takes a fifth of a second."""
    tree = call.src[0]
    if tree.op is not Ops.SINK:
        return call
    program = to_program_cache.get(to_program_key(tree, Device["CPU"].renderer), tree)
    return call.replace(src=(program, *call.src[1:]))

# What does a recording look like? That of a step of `--train` is some 140 calls, in this order. (In a name,
# the numbers are the shape of the first result. Those that begin with E or r are tinygrad's own, without a
# sum and with one, and there the numbers are their loops'.)
#
#     embed_12_64_128, embed_64_128, E_6_8192_2                     rows of tokens, of positions; their sum
#     layer_norm_12_64_128, matmul_12_64_384, flash_12_64_4_32,
#     matmul_12_64_128, E_49152_2,                                  a block: attention, added to the stream;
#     layer_norm_12_64_128, matmul_12_64_512, gelu_12_64_512,
#     matmul_12_64_128, E_49152_2,                                  and the MLP, added as well
#     ... three more blocks ...
#     layer_norm_12_64_128, matmul_12_64_1024, cross_entropy_12_64  the head and the loss
#     cross_entropy_back_12_64_1024, weights_back_1024_128, ...     and all the way back, some 70 calls
#     square_sums_2 (six times), r_2                                the gradient's length
#     adamw_1024_128, adamw_128 (five times)                        the step
#
# Chapter 19 runs the programs without Python, so it needs to know where they are in memory, and where their
# arguments are. When the function has realized its results, its programs are in TinyJit's list, but not yet
# compiled. That is the moment to divide them, and to have them compiled side by side.
#
# TinyJit runs a function once before it records, as a precaution; we record at the first call (`cnt` counts
# its calls). `inputs` are tensors over memory of numpy's: writing to that memory is all it takes to hand over
# new numbers.
class Recording:
    """A function from tensors to a tuple of tensors, as its programs: `calls` lists them. `arrays` are the
    memory of its inputs, `results` that of its results; `cores` share the work."""
    def __init__(self, function, arrays: tuple[np.ndarray, ...], cores: int):
        self.arrays = [np.array(array) for array in arrays]
        inputs = [Tensor.from_blob(array.ctypes.data, array.shape, dtype=getattr(dtypes, array.dtype.name))
                  for array in self.arrays]

        def traced():
            # (A view of other numbers gets memory of its own, and bfloat16, which numpy lacks, is float32.
            # The constant 2, the slope of 2x, is in no memory at all.)
            results = [x.clone() if x.device is None else x for x in function(*inputs)]
            results = [(x if x.dtype.fmt else x.float()).contiguous() for x in results]
            Tensor.realize(*results)  # (notes down the last programs)
            calls = [divided(call, cores) for part in self.jit._linears for call in part.src]
            compile_together([call.src[0] for call in calls if call.src[0].op is Ops.SINK])
            keep_programs()  # (which also lets go of the trees that they were made from)
            self.jit._linears = [UOp(Ops.LINEAR, src=tuple(map(with_program, calls)))]  # all in one list
            return results
        self.jit = TinyJit(traced)
        self.jit.cnt = 1
        load_programs()
        # The function may be an optimizer's step. If its m were a recipe still, such as Tensor.zeros(3),
        # carrying that out would be recorded as a part of the step, and m would be zero again at each turn.
        # So all that the optimizer has is computed first.
        if hasattr(function, "__func__"):  # (its step is a method)
            give_memory(vars(function.__self__) | {"model": None})
        # Should the function use tinygrad's own random numbers, their counter must exist, or it would begin
        # anew each time.
        if not Tensor._device_rng_counters:
            Tensor._next_counter("CPU", 0)
            Tensor.realize(*Tensor._device_seeds.values(), *Tensor._device_rng_counters.values())
        try:
            with Context(JIT=max(JIT.value, 1), CAPTURING=1):  # (tinygrad's variables can switch it off)
                results = self.jit()
        except BaseException:
            forget_orders()
            raise
        keep_programs()
        self.results = [memory_of(result) for result in results]

    def calls(self) -> list | None:
        """For each recorded call: the address of its program, those of its arguments, and among how many
        cores it is divided (chapter 14). None if something else than programs was recorded, such as copying
        an array of numpy's, or a program with very many arguments."""
        found = []
        for call in self.jit.captured.linear.src:
            program = call.src[0]
            info = program.arg
            if program.op is not Ops.PROGRAM or len(info.globals) > WIDTH - 4:  # (a line has no more room)
                return None
            arguments = get_call_arg_uops(call)
            buffers = [arguments[i].buffer.ensure_allocated() for i in info.globals]
            addresses = [buffer.get_buf("CPU").va_addr for buffer in buffers]
            found.append((get_runtime("CPU", program).addr, addresses, info.global_size[0]))
        return found

# === Chapter 14. A kernel, beside the C that it becomes
# ruff: noqa: B023  (a lambda that reads a loop's variable is called in the same turn of the loop)
#
# A *kernel* is a small program with loops over arrays. We write it as a Python function that is called once,
# to write the C down. This one doubles the rows of a table and adds a row of constants. Beside it stands what
# it becomes for a table of 2 x 2:
#
# >>> def example(k, y, x, b):                       # void example(float* y, float* x, float* b) {
# ...     for i in k.loop(x.rows):                   #   for (int i = 0; i < 2; i++) {
# ...         for c in k.loop(x.columns):            #     for (int c = 0; c < 2; c++) {
# ...             y[i, c] = x[i, c] * 2.0 + b[c]     #       y[i*2 + c] = x[i*2 + c] * 2.0f + b[c]; } } }
# >>> x = Tensor([[1.0, 2.0], [3.0, 4.0]])
# >>> Fast(cores=1).run(example, [Tensor.empty(2, 2)], [x, Tensor([10.0, 20.0])])[0].tolist()
# [[12.0, 24.0], [16.0, 28.0]]
#
# `k` is the Kernel that is being written, the others are its arguments, results first. The Python function
# runs once, and `k.loop(n)` turns once, too: it opens a C loop, hands out the counter as a symbol, and closes
# it. `x[i, c]` is a symbol as well, for a number that only the C will read. Only an assignment to `y[i, c]`
# makes a statement: `t = x[i, c] * 2.0` just names an expression. All this is kept as a tree, which has no
# order of its own. So a Kernel keeps its newest statement in `last`, and whatever is read or written next
# waits for that one. A loop that is closed is, with all that is in it, one statement.
#
# Two environment variables let you look behind the curtain, here and everywhere in tinygrad: with DEBUG=2 it
# prints each program that it runs, and how long that took; with DEBUG=4 also its C.
#
# Five of UOps' own words recur. `memory.index(i)` is a place in memory, `.load()` the number there,
# `.store(x)` a statement that writes it. `x.after(y)` is x, but not before y is done. `x.end(loop)` is the
# loop with x inside.
#
# `k.share(n)` is a loop whose turns are shared out among the cores. (It gives the C function one argument
# more, `core_id`; whoever runs the kernel calls it once for each core, with 0, 1, 2, ...) Kernels can be
# differentiated only if we say how; chapter 15.2 tells it.
class Array:
    """An argument of a kernel, or memory of its own. The first index counts through all leading dimensions:
    of an array (B, T, C), a[i, c] is in row i of all B * T rows, and a[i] is number i of all numbers."""
    def __init__(self, kernel: Kernel, memory, shape: tuple[int, ...], start=None):
        self.kernel = kernel
        self.shape = shape
        self.columns = shape[-1]
        self.rows = math.prod(shape[:-1])
        self.start = start                         # where in the memory its first number is, if not at 0
        self.scale = None                          # for each row: only packed matrices have that (chapter 22)
        self.flat = memory.src[0] if memory.op is Ops.RESHAPE else memory

    def at(self, first, *index):
        """The element at an index, as a symbol."""
        # In an array (2, 3, 4), a[i, 2, 1] is at place (i * 3 + 2) * 4 + 1, and a[i, 1], by the rule above,
        # at place i * 4 + 1.
        place = first
        sizes = self.shape[len(self.shape) - len(index):]
        for i, size in zip(index, sizes, strict=True):
            place = place * size + i
        if self.start is not None:
            place = self.start + place
        return self.flat.after(*self.kernel.last).index(place)

    def unscaled(self, index):
        """A number as it stands in memory; if it is packed, as float32, but without its row's scale."""
        number = self.at(*index) if isinstance(index, tuple) else self.at(index)
        if self.scale is None:
            return number
        if number.dtype == dtypes.uint16:
            number = (number.cast(dtypes.uint32) << 16).bitcast(dtypes.float)
        return number.cast(dtypes.float)

    def scale_of(self, row):
        """By what a row's `unscaled` numbers must be multiplied."""
        return 1.0 if self.scale is None else self.scale[row]

    def __getitem__(self, index):
        number = self.unscaled(index)
        return number if self.scale is None else number * self.scale_of(index[0])

    def __setitem__(self, index, value) -> None:
        self.kernel.last = (self[index].store(value),)

LINE = 16  # float32 numbers in a cache line, the unit in which memory is fetched

class Kernel:
    """A kernel that is being written: `last` is its last statement, `open` are the loops around it."""
    def __init__(self, cores: int):
        self.cores = cores
        self.ids = itertools.count(1000)
        self.last = ()
        self.open = ()

    def array(self, *shape: int, dtype=dtypes.float) -> Array:
        """Memory of the kernel's own: a local array in C, which clang keeps in registers if it is small."""
        memory = UOp.placeholder(shape, dtype, next(self.ids), addrspace=AddrSpace.REG)
        return Array(self, memory, shape)

    def aligned_array(self, *shape: int) -> Array:
        """Memory on the stack that begins with a cache line, as C's arrays need not; but a vector that lies
        across two lines is fetched twice, and a product runs at two thirds of its speed. We ask for one line
        more than needed, and start at the first address that 64 bytes divide."""
        size = math.prod(shape) + LINE
        memory = UOp.placeholder((size,), dtypes.float, next(self.ids), addrspace=AddrSpace.REG)
        to_the_next_line = f"(int)(-(__UINTPTR_TYPE__){{0}} / 4 % {LINE})"
        return Array(self, memory, shape, UOp(Ops.CUSTOM, dtypes.int, (memory[0],), to_the_next_line))

    def loop(self, end, *more):
        """`for i in k.loop(n)`, or `for i, j in k.loop(m, n)` for two loops, the second inside the first. An
        end that depends on an outer loop must be at least 1, as it is tested after each turn."""
        if more:
            for i in self.loop(end):
                for j in self.loop(*more):
                    yield (i, *j) if len(more) > 1 else (i, j)
            return
        if self.last and self.last[0].op is Ops.STORE:
            # tinygrad orders statements by their loops alone, so the last store could slip into the loop that
            # begins now. A loop of one turn around it keeps it out.
            self.last = (self.last[0].end(UOp.range(1, next(self.ids))), *self.open)
        # What stands before `yield` opens the loop, and what stands after it closes it: Python's `for` goes
        # on there when it asks for a second turn, which does not come.
        outer = self.open
        counter = None
        loop = UOp.range(end, next(self.ids))
        if not isinstance(end, int) and end.ranges:
            # A range's end cannot depend on an outer loop, so we write do { ... } while (++counter < end),
            # with the counter in memory. `replace` has the loop begin after its counter was set to 0.
            counter = self.array(1, dtype=dtypes.int)
            loop = UOp.loop(next(self.ids))
            counter[0] = 0
            loop = loop.replace(src=loop.src + self.last)
        self.open = (*outer, loop)
        self.last = (*self.last, loop)
        yield loop if counter is None else counter[0].load()
        again = ()
        if counter is not None:
            counter[0] += 1
            again = (counter[0] < end,)
        # A loop that has ended is a statement, in which nobody sees what was inside. So the loops that are
        # still open are named beside it; or the next statement could land outside of them.
        self.open = outer
        self.last = (self.last[0].end(loop, *again), *outer)

    def share(self, n: int):
        """A loop over this core's part of 0 to n - 1, in one piece; the parts' sizes differ by one at most.
        If n is smaller than the number of cores, only n cores run the kernel; one that shares twice must then
        do so with the same n."""
        # For n = 10 on three cores, parts begin at 0, 4 and 7, and have 4, 3 and 3 turns. (Not at core * n //
        # cores: with 72 cores and the 38 million numbers of GPT-2's table, that has more than 31 bits.)
        cores = min(n, self.cores)
        core = UOp.variable("core_id", 0, cores - 1, dtypes.int, param=True)
        size, more = divmod(n, cores)
        first = core * size + core.minimum(more)
        for i in self.loop((core < more).where(size + 1, size) if more else size):
            yield first + i

    def threads(self, n: int):
        """The outermost loop of a kernel for a GPU, which has each turn done by a thread of its own (chapter
        20). Where there are no such threads, it is an ordinary loop."""
        # A GPU runs threads in groups, here of up to 64, which do the same instruction at the same time.
        # Nothing comes before this loop, and nothing is open around it.
        if not Device[Device.DEFAULT].renderer.has_local:
            yield from self.loop(n)
            return
        size = divisor(n, 64)
        group = UOp.range(n // size, next(self.ids), AxisType.GLOBAL)
        thread = UOp.range(size, next(self.ids), AxisType.LOCAL)
        self.open = (group, thread)
        self.last = (group, thread)
        yield group * size + thread
        self.open = ()
        self.last = (self.last[0].end(thread, group),)

    def fold(self, n: int, first: float, *steps):
        """`total = first; for i < n: total = step(total, i)` for each function in `steps`, in 16 lanes side
        by side, which a vector register holds. (A compiler may not change the order of a sum by itself.)
        Returns the lanes' totals, a list for each step."""
        # For n = 35, two rounds of 16 come first; then lanes 0 to 2 have one turn more.
        width = min(n, 16)
        lanes = self.array(len(steps), width)
        for lane in self.loop(width):
            for number in range(len(steps)):
                lanes[number, lane] = first
        for i, lane in self.loop(n // width, width):
            for number, step in enumerate(steps):
                lanes[number, lane] = step(lanes[number, lane], i * width + lane)
        if n % width:
            for lane in self.loop(n % width):
                for number, step in enumerate(steps):
                    lanes[number, lane] = step(lanes[number, lane], n - n % width + lane)
        return [[lanes[number, lane] for lane in range(width)] for number in range(len(steps))]

    def sums(self, n: int, *terms):
        """For each of some functions `term`: the sum of term(i) over i < n."""
        steps = [lambda total, i, term=term: total + term(i) for term in terms]
        return [sum(lanes) for lanes in self.fold(n, 0.0, *steps)]

    def sum(self, n: int, term):
        """The sum of term(i) over i < n."""
        return self.sums(n, term)[0]

    def max(self, n: int, term):
        """The largest term(i) over i < n."""
        lanes = self.fold(n, -1e30, lambda top, i: top.maximum(term(i)))[0]
        return functools.reduce(UOp.maximum, lanes)

# Where nothing may be left over at the end of a loop, a step is the largest one that divides what there is.
def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, most + 1) if n % d == 0)

# A kernel is written down once for each set of shapes. In a step, the four blocks of a model then share one
# program for each of their operations.
@functools.cache
def written_down(kernel, cores: int, *arguments, **options):
    """A kernel's syntax tree for arguments of these shapes. (`opts_to_apply=()`, `tag`: tinygrad must not
    rearrange it.)"""
    k = Kernel(cores)
    kernel(k, *(Array(k, memory, memory.shape) for memory in arguments), **options)
    name = "_".join(map(str, (kernel.__name__, *arguments[0].shape)))
    return k.last[0].sink(arg=KernelInfo(name=name, opts_to_apply=(), estimates=Estimates()), tag=1)

def program_of(kernel, cores: int, *arguments, **options):
    """The same, compiled, if it has been compiled before: tinygrad then need not look through the tree. Else
    the tree itself, which for a recording is also ordered from the helpers, if there are any."""
    tree = written_down(kernel, cores, *arguments, **options)
    if Device.DEFAULT != "CPU":  # (there need not be a compiler for the CPU)
        return tree
    renderer = Device["CPU"].renderer
    program = to_program_cache.get(to_program_key(tree, renderer))
    if program is not None:
        return essence(program)
    if capturing and helper.cache_info().currsize and not DEBUG:
        ordered(tree, renderer)
    return tree

def exp(x):
    """e^x for x <= 0. It is 2^t with t = x / ln 2, and t = n + f with a whole n and f in -1/2 to 1/2: 2^f is
    a short sum (its Taylor series), and 2^n goes straight into the bits of the exponent. Unlike a call of the
    C library's expf, this becomes vector instructions. It is never less than 2^-60, which beside a 1
    makes no difference: products of smaller results could be below 2^-126, and with such numbers a processor
    takes a hundred times as long."""
    # For x = -1, t is -1.443, so n = -1 and f = -0.443. The sum gives 2^f = 0.736, and with 2^-1 that is
    # 0.368. (`cast` cuts off towards zero. The exponent stands 23 bits from the right, and 127 there means
    # 2^0.)
    t = (x * (1 / math.log(2))).maximum(-60.0)
    n = (t - 0.5).cast(dtypes.int)
    f = t - n.cast(dtypes.float)
    power = t.const_like(math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
        power = power * f + math.log(2) ** k / math.factorial(k)
    return power * ((n + 127) * (1 << 23)).bitcast(dtypes.float)

# === Chapter 15. Products, and the way back
#
# 15.1 Plain, tiled, packed
#
# Nearly all of a GPT's arithmetic is products of matrices, C = A @ B. Two lines would do:
#
#     for i, j in k.loop(M, N):
#         C[i, j] = k.sum(K, lambda kk: A[i, kk] * B[kk, j])
#
# Here every multiplication fetches two numbers, those of B far apart. *Tiled*: compute a tile of C at once,
# say 4 rows by 64 columns, with its 256 sums in registers. For each k, fetch 64 numbers of B and 4 of A, and
# use each of them 4 or 64 times: 68 fetches for 256 multiplications. This is `product`.
#
#                       B, rows k = 0, 1, 2, ...
#                       k  [  64 numbers of row k  ]         fetched once for each k, used 4 times
#
#     A   i     a(i, k)    [                       ]
#         i+1   a(i+1, k)  [  4 x 64 sums, which   ]         each a fetched once for each k,
#         i+2   a(i+2, k)  [  stay in registers    ]         used 64 times
#         i+3   a(i+3, k)  [                       ]
#
# *Packed*: memory has levels. On an Intel Xeon, 48 KB answer at once, 2 MB within 15 cycles, the rest is far.
# So that most numbers come from near, the product takes blocks of `depth` rows of B. Of such a block some
# *panels*, each as wide as a tile, are copied to where they lie without gaps; they stay in the second level.
# (A cache chooses a number's place by the last digits of its address, so rows that lie a power of two apart
# would compete for the same few places.) A streams past in strips. A few rows of a strip, in the first level,
# meet one panel after the other, while their tile of the result is in registers. If A's rows are long and
# meet many panels, to copy the strip as well saves 5 % of the time on an Intel Xeon; on an AMD EPYC it costs
# 3 %. (A row of the copy is a line longer than it need be, or rows would compete for the same places.)
#
#     for each group of panels of B:
#         for each block of `depth` rows of B:
#             pack the group's panels
#             for each strip of A's rows:
#                 for each tile of the strip, for each panel: multiply, and add to the result
#
# Which tile is best depends on the processor, so we measured. On an Intel Xeon with AVX-512 (32 registers of
# 16 numbers), 12 products of a training step ran at these multiples of the rate of numpy's library: 1.08 with
# 8 x 32, 1.04 with 4 x 64, 0.77 with 12 x 32; 6 x 64 was better for some and worse for others. With AVX2 (16
# registers of 8), nine on an AMD EPYC: 0.85 with 4 x 24, 0.80 with 3 x 32, 0.76 with 4 x 16, 0.45 with 6 x
# 16. The sums, the vectors of B and the numbers of A must all find a register: with one too many, clang goes
# to memory in the innermost loop. So it is the processor that decides, and few shapes serve all. (The picture
# has 4 x 64, which is easier to draw.)
TILES = [(8, 32)] if WIDE else [(4, 24), (3, 32)] if AVX2 else [(4, 16)]
TILE = TILES[-1]     # (an earlier one is taken where it divides the result's columns)
STRIP = 64           # rows of A that are worked on together
PACKED = 3 << 16 if WIDE else 1 << 17  # numbers of B that are packed at a time: 768 or 512 KB
COPIES = "Intel" in describe_processor()  # whether long strips of A are copied before they are used

def pieces(n: int, size: int) -> int:
    """How many pieces of `size` make up n, the last of which may be smaller."""
    return -(-n // size)

def step_back(number, size: int, n: int):
    """Where piece `number` begins: the last one steps back to end at n, and covers some places a second
    time. (Of two pieces of 64 that cover 100 places, the second begins at 36.)"""
    return number * size if n % size == 0 else (number * size).minimum(n - size)

def tile_of(k: Kernel, rows: int, columns: int, K: int, a, b):
    """For r < rows and j < columns: hand out r, j and the sum over kk < K of a(r, kk) * b(kk, j). What the
    caller does with them becomes the inside of the last loop. clang makes vectors of the columns. The rows
    are written out in the innermost loop; clang can do that, too, but its code is 3 % slower. The sums are
    handed out row by row: if several rows of C were written at a time, clang, which cannot know that they do
    not overlap, would compare all their addresses at each tile. That took up to a tenth of the time."""
    sums = k.array(rows, columns)
    for j, r in k.loop(columns, rows):
        sums[r, j] = 0.0
    # (Python's `range` writes a statement several times; `k.loop` makes a loop in C.) With AVX2's 16
    # registers, 4 x 24 are 12 vectors of sums, and with 3 of B one register is left, for a number of A: so
    # it goes row by row. Column by column, clang keeps four numbers of A at a time, for which there is no
    # room.
    if columns == 24:
        for kk in k.loop(K):
            for r in range(rows):
                for j in k.loop(columns):
                    sums[r, j] += a(r, kk) * b(kk, j)
    else:
        for kk, j in k.loop(K, columns):
            b_kj = b(kk, j)
            for r in range(rows):
                sums[r, j] += a(r, kk) * b_kj
    for r, j in k.loop(rows, columns):
        yield r, j, sums[r, j]

def product(k: Kernel, M: int, N: int, K: int, a, b):
    """For i < M and j < N: hand out i, j and the sum over kk < K of a(i, kk) * b(kk, j), tile by tile: for
    small matrices, which lie in the cache."""
    rows = divisor(M, TILE[0])
    columns = divisor(N, TILE[1])
    for down, across in k.loop(M // rows, N // columns):
        i0 = down * rows
        j0 = across * columns
        a_here = lambda r, kk: a(i0 + r, kk)
        b_here = lambda kk, j: b(kk, j0 + j)
        for r, j, value in tile_of(k, rows, columns, K, a_here, b_here):
            yield i0 + r, j0 + j, value

def in_a_part(n: int, size: int, parts: int, cores: int, exact: bool) -> int:
    """How many tiles of `size` there are in a part (a strip of rows, or a group of panels), if n is cut into
    about `parts` parts. With `exact`, parts do not overlap."""
    # Three parts on two cores would keep one of them waiting, so it is four. Of 200 rows, each then has 50,
    # which are 7 tiles of 8: parts begin at 0, 56, 112 and, stepping back, 144. If they must not overlap, it
    # is 5 tiles, as 5 divides the 25 that there are: five parts of 40.
    parts = pieces(parts, cores) * cores
    tiles = pieces(pieces(n, parts), size)
    return divisor(n // size, tiles) if exact else tiles

def plan(M: int, N: int, K: int, cores: int, a_transposed: bool) -> tuple[int, ...]:
    """For a product: a tile's rows and columns, its depth, and how many tiles there are in a strip, panels in
    a group. For M = 768, N = 384 and K = 128 on two cores with AVX-512: tiles of 8 x 32, 128 deep, 8 in a
    strip, and all 12 panels in one group. (The depth is at most 512, where 32 columns of B are 64 KB; 256 if
    A is transposed and tiles divide M; 4096 where K may not be cut.)"""
    # Nine rows are covered by two tiles of 5, not of 8: the second begins at row 4, not 5, so that both are
    # whole. One row is computed twice, with the same result.
    height, width = next((tile for tile in TILES if N % tile[1] == 0), TILE)
    rows = pieces(M, pieces(M, height))
    columns = min(width, N)
    deepest = 256 if a_transposed else 512
    # Tiles that overlap write the same result twice, which does no harm. But with several blocks, each of two
    # such tiles would add the second block's share to C, and it would be in there twice. So rows that the
    # tile before has seen are left alone. If that one may be another core's, as with few strips, or if it is
    # columns that overlap, all of K is one block; and where that would be too deep, tiles are taken that
    # divide M and N.
    by_rows = M >= N  # the cores share the longer side of the result
    few_strips = by_rows and M < 4 * STRIP * cores
    if N % columns or few_strips and M % rows:
        deepest = 4096
        if K > deepest:
            columns = divisor(N, columns)
            rows = divisor(M, rows) if few_strips else rows
    elif M % rows:
        deepest = 512  # (C may be GPT-2's table: to add to it once more costs up to 8 %)
    blocks = pieces(K, deepest)
    depth = pieces(K, blocks)
    exact = blocks > 1 and M % rows == 0
    tiles = in_a_part(M, rows, pieces(M, STRIP), cores if by_rows else 1, exact)
    panels = in_a_part(N, columns, pieces(N * depth, PACKED), 1 if by_rows else cores, exact=blocks > 1)
    return rows, columns, depth, tiles, panels

def put(C: Array, place, value, bias, later, again) -> None:
    """Put what one block of K gives for a place into C. The first block sets it, with the bias. A later one
    (`later`; None if there is but one) adds to it, unless (`again`; None if no tiles overlap) it has already
    done so."""
    total = value if bias is None else value + bias[place[1]]
    if later is not None:
        before = C[place]
        added = before + value if again is None else again.where(before, before + value)
        total = later.where(added, total)
    C[place] = total

# Every core goes through `matmul`, with panels of its own. If the result is tall, each packs all of B, and
# multiplies its own strips; if it is wide, each packs its own groups, and goes over all of A. So none waits
# for another.
def matmul(k, C, A, B, bias=None, *, a_transposed=False, b_transposed=False, column_sums=None):
    """C (M, N) = A @ B, where A is (M, K) and B is (K, N), or lies transposed in memory; plus a bias (N,).
    `column_sums` is where the sums of B's columns go, if they are wanted."""
    M, N = C.rows, C.columns
    K = A.rows if a_transposed else A.columns
    rows, columns, depth, tiles, panels = plan(M, N, K, k.cores, a_transposed)
    height = min(tiles * rows, M)
    width = min(panels * columns, N)
    packed = k.aligned_array(panels, depth, columns)
    copied = a_transposed or (COPIES and K > 2 * depth and panels > 8)
    strip = k.aligned_array(depth, height + LINE) if a_transposed else k.aligned_array(height, depth + LINE)
    sums = k.array(panels, columns)
    ragged = M % height or height % rows
    share_rows, share_columns = (k.share, k.loop) if M >= N else (k.loop, k.share)

    def pack(block, column):
        """Copy the panels of a group. (The last block steps back: rows that were seen before count as 0.)"""
        k0 = step_back(block, depth, K)
        some = divisor(depth, LINE)
        for panel in k.loop(panels):
            places = k.loop(depth, columns)
            if b_transposed:  # a cache line of each row at a time, so that it is fetched once
                places = ((turn * some + kk, j) for turn, j, kk in k.loop(depth // some, columns, some))
            for kk, j in places:
                value = B[column(panel) + j, k0 + kk] if b_transposed else B[k0 + kk, column(panel) + j]
                seen = k0 + kk < block * depth
                packed[panel, kk, j] = value if K % depth == 0 else seen.where(0.0, value)
                if column_sums:  # each number of B passes here once, so adding it up costs next to nothing
                    sums[panel, j] += packed[panel, kk, j]

    for group in share_columns(pieces(N, width)):
        column = lambda panel: step_back(group, width, N) + step_back(panel, columns, width)
        if column_sums:
            for panel, j in k.loop(panels, columns):
                sums[panel, j] = 0.0
        for block in k.loop(pieces(K, depth)):
            pack(block, column)
            k0 = step_back(block, depth, K)
            for number in share_rows(pieces(M, height)):
                top = step_back(number, height, M)
                if a_transposed:
                    for kk, i in k.loop(depth, height):
                        strip[kk, i] = A[k0 + kk, top + i]
                elif copied:
                    for i, kk in k.loop(height, depth):
                        strip[i, kk] = A[top + i, k0 + kk]
                for tile, panel in k.loop(tiles, panels):
                    down = step_back(tile, rows, height)
                    near = lambda r, kk: strip[kk, down + r] if a_transposed else strip[down + r, kk]
                    a = near if copied else lambda r, kk: A[top + down + r, k0 + kk]
                    b = lambda kk, j: packed[panel, kk, j]
                    for r, j, value in tile_of(k, rows, columns, depth, a, b):
                        place = top + down + r, column(panel) + j
                        later = block > 0 if K > depth else None
                        again = (top + down + r < number * height) | (down + r < tile * rows)
                        put(C, place, value, bias, later, again if ragged else None)
        if column_sums:
            for panel, j in k.loop(panels, columns):
                column_sums[column(panel) + j] = sums[panel, j]

# 15.2 The way back of a product
#
# In y = x @ w, y[i, j] is the sum of x[i, k] * w[k, j]. Let the loss rise by dy[i, j] for each unit of y[i,
# j]. A unit of x[i, k] adds w[k, j] to each y[i, j], so with it the loss rises by the sum of dy[i, j] *
# w[k, j] over j; and with a unit of w[k, j], by the sum of x[i, k] * dy[i, j] over i:
#
#     dx = dy @ w^T        dw = x^T @ dy        and for a bias, added to each row:  db = the column sums of dy
#
# Two more products, which is why a training step costs three times as much as a forward pass. With a kernel
# we hand over a function for this, `back` (to `Fast.run` of chapter 20). It receives the gradient of the
# kernel's first result, and the results as the kernel left them, and returns for each input a gradient, or
# None. For y = x @ weight + bias it is these lines (`like(x)` is empty memory of x's shape):
#
#     def back(dy, y):
#         dx = self.run(matmul, [like(x)], [dy, weight], b_transposed=True)
#         return *dx, *self.run(weights_back, [like(weight), like(bias)], [x, dy])
def weights_back(k, dw, *rest):
    """dw (I, O) = x^T @ dy, for x (..., I) and dy (..., O); and db (O,), if it is among the arguments: dw,
    (db,) x, dy."""
    *db, x, dy = rest
    matmul(k, dw, x, dy, a_transposed=True, column_sums=db[0] if db else None)

# 15.3 A few rows
#
# When writing, x has one row, or a few: a weight that was fetched is used once or a few times, so all depends
# on how fast weights come. A processor notices where we read straight on, in several places at a time, and
# fetches ahead. So each core reads rows of its own, which lie together, in eight places at a time. On
# two Intel cores, a w of 384 x 384, which stays in the second level, then comes at 110 GB a second, and one
# of 1536 x 384, which does not fit, at 54.
#
# The price is that each core has sums of its own rows only, which must then be added up. With w of 384 rows
# on two cores, `matvec` makes two parts. The first is over rows 0 to 191: in its turn i, it takes rows i,
# 24 + i, 48 + i, ... 168 + i, each times its number of x, and adds them to a row of sums.
FEW = 8  # rows of x for which this is the quicker way

def matvec(k, parts, x, w):
    """parts (P, R, N): x (R, K) @ w (K, N), where each part has seen a P-th of the rows of w."""
    K, N = w.shape
    P, R, _ = parts.shape
    streams = divisor(K // P, 8)  # rows that are read side by side
    width = divisor(N, 4096 // R)  # columns whose sums stay in the first level
    steps = K // streams // P
    for part in k.share(P):
        for block in k.loop(N // width):
            for r, j in k.loop(R, width):
                parts[part, r, block * width + j] = 0.0
            for i in k.loop(steps):
                rows = [(part * streams + stream) * steps + i for stream in range(streams)]
                factors = [[x[r, row] * w.scale_of(row) for row in rows] for r in range(R)]
                for j in k.loop(width):
                    column = block * width + j
                    weights = [w.unscaled((row, column)) for row in rows]
                    for r in range(R):
                        terms = (a * b for a, b in zip(factors[r], weights, strict=True))
                        parts[part, r, column] = sum(terms, parts[part, r, column])

def dot_rows(k, y, x, table):
    """y (R, V) = x (R, C) @ table^T, for a table (V, C): `unembed` of a few rows. In a sum, each addition (of
    16 lanes) has to wait for the one before, so about four sums are computed side by side."""
    V, C = table.shape
    R = x.rows
    at_once = min(V, max(1, 4 // R))
    for block in k.share(pieces(V, at_once)):
        first = step_back(block, at_once, V)
        places = [(r, first + extra) for r in range(R) for extra in range(at_once)]
        terms = [lambda c, r=r, v=v: x[r, c] * table.unscaled((v, c)) for r, v in places]
        for (r, v), total in zip(places, k.sums(C, *terms), strict=True):
            y[r, v] = total * table.scale_of(v)

# === Chapter 16. Flash attention
#
# The plain form writes T x T scores, reads them for the softmax, writes the weights and reads them again: for
# T = 4096 and 12 heads, 800 MB of each. *Flash attention* (Dao et al. 2022, arXiv:2205.14135) never has more
# than a block of them. Is that possible? A softmax needs the sum over all scores first.
#
# It is, because a sum can be corrected. Take the scores 1, 3 | 2, 5, two at a time, with values v1 to v4.
# After the first two, the largest is 3; relative to it, the sum of exponentials is e^-2 + e^0 = 1.135, and
# the sum of weighted values is e^-2 v1 + e^0 v2. Then 5 turns up. Everything so far is too large by the
# factor e^(5-3), so both sums *fade* by e^(3-5) = 0.135, and the new terms are added: 1.135 * 0.135 + e^-3 +
# e^0 = 1.203. At the end divide one by the other. That is the softmax over all four; and nothing was ever
# larger than e^0, so nothing overflows.
#
# >>> round(1.1353 * 0.1353 + math.exp(-3) + 1, 3) == round(sum(math.exp(s - 5) for s in (1, 3, 2, 5)), 3)
# True
#
# So memory grows with T and not with its square. And time is saved as well, since blocks above the diagonal,
# where a query would see only what comes after it, are never computed. With T = 256 and blocks of 64 these
# are six of 16:
#
#                     keys      0-63   64-127  128-191  192-255
#     queries   0-63             x
#              64-127            x       x
#             128-191            x       x        x
#             192-255            x       x        x        x
#
# All is transposed in here, `query` (D, Q) and `score` (keys, queries): the last index is always the query.
# So the queries of a block lie across the lanes of the vector registers, and no step of the softmax needs a
# sum across lanes.
LANES = TILE[1]  # queries in a block

def flash(k, y, lse, qkv, keys=None, values=None, position=None, start=None, *, most: int = 0):
    """qkv (B, T, 3, H, D) -> y (B, T, H, D), and lse (B, H, T), the logarithm of each query's sum of
    exponentials. With caches (1, H, S, D), and B = 1, these are new tokens of a text: position[0] others came
    before. The text has `most` places in them, from `start` (1,) on; first the new tokens are put there."""
    B, T, _, H, D = qkv.shape
    Q = divisor(T, LANES)
    query = k.aligned_array(D, Q)
    score = k.aligned_array(Q, Q)
    out = k.aligned_array(D, Q)
    top = k.array(Q)
    old_top = k.array(Q)
    total = k.array(Q)
    fade = k.array(Q)
    for bh in k.share(B * H):
        b = bh // H
        h = bh % H
        key = lambda j, d: qkv[b, j, 1, h, d]
        value = lambda j, d: qkv[b, j, 2, h, d]
        before = 0  # tokens that the text has before these
        if keys is not None:
            before = position[0].maximum(0).minimum(most - T)  # (a wrong one must not lead out of the caches)
            for t, d in k.loop(T, D):
                keys[0, h, start[0] + before + t, d] = key(t, d)
                values[0, h, start[0] + before + t, d] = value(t, d)
            key = lambda j, d: keys[0, h, start[0] + j, d]
            value = lambda j, d: values[0, h, start[0] + j, d]
        for block in k.loop(T // Q):
            i0 = block * Q
            for i in k.loop(Q):
                top[i] = -1e30
                total[i] = 0.0
            for d, i in k.loop(D, Q):
                query[d, i] = qkv[b, i0 + i, 0, h, d] * D**-0.5
                out[d, i] = 0.0
            for key_block in k.loop((before + i0 + Q - 1) // Q + 1):  # those that some query here may see
                j0 = key_block * Q
                # The scores of this block, and with them each query's largest score so far. One that a query
                # may not see becomes -1e30, whose exponential is next to nothing: minus infinity, less
                # itself, would be a NaN.
                for i in k.loop(Q):
                    old_top[i] = top[i]
                for j, i, s in product(k, Q, Q, D, lambda j, d: key(j0 + j, d), query.at):
                    score[j, i] = (j0 + j <= before + i0 + i).where(s, -1e30)
                    top[i] = top[i].maximum(score[j, i])
                # What was added up before fades, and the block's own terms come on top.
                for i in k.loop(Q):
                    fade[i] = exp(old_top[i] - top[i])
                    total[i] *= fade[i]
                for j, i in k.loop(Q, Q):
                    score[j, i] = exp(score[j, i] - top[i])
                    total[i] += score[j, i]
                for d, i, s in product(k, D, Q, Q, lambda d, j: value(j0 + j, d), score.at):
                    out[d, i] = out[d, i] * fade[i] + s
            for i in k.loop(Q):  # (before y: after it, if T is 1, tinygrad does not find the place in lse)
                lse[b, h, i0 + i] = top[i] + total[i].log()
            for i, d in k.loop(Q, D):
                y[b, i0 + i, h, d] = out[d, i] / total[i]

# The way back. For one query, y = sum of p_j v_j. So the loss rises with v_j by p_j dy, and with p_j by g_j =
# dy . v_j. And p = softmax(s): if s_i rises by a small e, weight i gains p_i e; and then every weight, i too,
# gives up the share p_i e of itself, so that all still add up to 1. (With p = 0.5, 0.3, 0.2, let s_1 rise by
# 0.01: weight 1 gains 0.005, and then all give up half a percent, 0.0025, 0.0015 and 0.001.) So the loss
# rises with s_i by
#
#     ds_i = p_i g_i - p_i * (sum over j of p_j g_j) = p_i * (g_i - dy . y)
#
# as the sum of p_j (dy . v_j) is dy . y: one number for each query replaces a sum over all keys. With s = q .
# k / sqrt(D), dq and dk follow as for any product. The weights are computed again from the saved lse, p =
# exp(s - lse): quicker than reading them from memory.
def flash_back(k, dqkv, dy, y, lse, qkv):
    """The gradient of qkv from that of y (both shaped as in `flash`)."""
    B, T, _, H, D = qkv.shape
    Q = divisor(T, LANES)
    query = k.aligned_array(D, Q)
    grad = k.aligned_array(D, Q)
    dquery = k.aligned_array(D, Q)
    prob = k.aligned_array(Q, Q)
    dscore = k.aligned_array(Q, Q)
    dot = k.array(Q)
    for bh in k.share(B * H):
        b = bh // H
        h = bh % H
        for t, part, d in k.loop(T, 2, D):  # those of keys and values, to which every block adds
            dqkv[b, t, part + 1, h, d] = 0.0
        for block in k.loop(T // Q):
            i0 = block * Q
            for i in k.loop(Q):
                dot[i] = 0.0
            for d, i in k.loop(D, Q):
                query[d, i] = qkv[b, i0 + i, 0, h, d] * D**-0.5
                dquery[d, i] = 0.0
                grad[d, i] = dy[b, i0 + i, h, d]
                dot[i] += grad[d, i] * y[b, i0 + i, h, d]
            for key_block in k.loop(block + 1):
                j0 = key_block * Q
                key = lambda j, d: qkv[b, j0 + j, 1, h, d]
                value = lambda j, d: qkv[b, j0 + j, 2, h, d]
                # p and ds, as derived above ...
                for j, i, s in product(k, Q, Q, D, key, query.at):
                    prob[j, i] = (j0 + j <= i0 + i).where(exp(s - lse[b, h, i0 + i]), 0.0)
                for j, i, s in product(k, Q, Q, D, value, grad.at):
                    dscore[j, i] = prob[j, i] * (s - dot[i])
                # ... and what they mean for the queries, the keys and the values.
                for d, i, s in product(k, D, Q, Q, lambda d, j: key(j, d), dscore.at):
                    dquery[d, i] += s
                for j, d, s in product(k, Q, D, Q, dscore.at, lambda i, d: qkv[b, i0 + i, 0, h, d]):
                    dqkv[b, j0 + j, 1, h, d] += s * D**-0.5
                for j, d, s in product(k, Q, D, Q, prob.at, lambda i, d: dy[b, i0 + i, h, d]):
                    dqkv[b, j0 + j, 2, h, d] += s
            for i, d in k.loop(Q, D):
                dqkv[b, i0 + i, 0, h, d] = dquery[d, i] * D**-0.5

# === Chapter 17. The other operations
#
# These do little with each number, so what counts is that each comes from memory once (a row that was just
# read is still in the cache), and that the inner loop becomes vector instructions.
#
# `gelu` is computed as u * s with s = sigmoid(z), z = 2 sqrt(2/pi) (u + 0.044715 u^3), which is part I's
# formula with tanh written as a sigmoid. As s' = s (1 - s) z', the slope of u * s is s + u s (1 - s) z'.
def gelu(k, out, u, dout=None):
    """u (...) -> out (...); or, given the gradient of gelu(u), that of u."""
    c = 2 * math.sqrt(2 / math.pi)
    for i in k.share(u.rows * u.columns):
        z = u[i] * (u[i] * u[i] * 0.044715 + 1.0) * c
        # With e = exp(-|z|), at most 1, the sigmoid is 1 / (1 + e) if z >= 0, else e / (1 + e).
        e = exp((z < 0).where(z, -z))
        s = (z < 0).where(e, 1.0) / (e + 1.0)
        slope = s + u[i] * s * (1.0 - s) * (u[i] * u[i] * (3 * 0.044715) + 1.0) * c
        out[i] = u[i] * s if dout is None else dout[i] * slope

# The way back of `layer_norm`. y = hat * w + b, and hat = (x - mean) * scale has mean 0 and mean square 1.
# Let g = dy * w, what arrives at hat. If all of x is shifted, or stretched about its mean, hat stays as it
# is; so the parts of g along these two directions must not reach x. Along the shift that is mean(g), and
# along the stretch hat * mean(g * hat):
#
#     dx = (g - mean(g) - hat * mean(g * hat)) * scale,    dw = sum over rows of dy * hat,    db = sum of dy
def layer_norm(k, y, stats, x, w, b=None):
    """y (M, C); stats (M, 2) keeps the mean of each row of x (M, C), and one over its standard deviation."""
    C = x.columns
    for i in k.share(x.rows):
        mean = k.sum(C, lambda c: x[i, c]) * (1 / C)
        # (The mean of the squares, less the square of the mean, could be had together with the mean. But
        # where a row lies far from 0, it is the small difference of two large numbers, and float32 has but
        # seven digits.)
        variance = k.sum(C, lambda c: (x[i, c] - mean).square()) * (1 / C)
        scale = (variance + 1e-5).rsqrt()
        for c in k.loop(C):
            hat = (x[i, c] - mean) * scale
            y[i, c] = hat * w[c] if b is None else hat * w[c] + b[c]
        stats[i, 0] = mean
        stats[i, 1] = scale

def layer_norm_back(k, dx, dy, x, w, stats):
    """The gradient of x (M, C)."""
    C = x.columns
    for i in k.share(x.rows):
        mean = stats[i, 0]
        scale = stats[i, 1]
        hat = lambda c: (x[i, c] - mean) * scale
        g = lambda c: dy[i, c] * w[c]
        shift = k.sum(C, g) * (1 / C)
        stretch = k.sum(C, lambda c: g(c) * hat(c)) * (1 / C)
        for c in k.loop(C):
            dx[i, c] = (g(c) - shift - hat(c) * stretch) * scale

def layer_norm_weights_back(k, dw, *rest):
    """The gradients of w (C,) and, if it is there, b (C,). Each core sums columns of its own, so no two
    meet."""
    *db, dy, x, stats = rest
    C = x.columns
    for c in k.share(C):
        for d in (dw, *db):
            d[c] = 0.0
    for i in k.loop(x.rows):
        mean = stats[i, 0]
        scale = stats[i, 1]
        for c in k.share(C):
            dw[c] += dy[i, c] * (x[i, c] - mean) * scale
            for d in db:
                d[c] += dy[i, c]

# Looking up a row is copying it; the way back adds each row's gradient to its row in the table. A number that
# is no row's becomes NaN, as in part I: nobody can overlook that.
def embed(k, x, table, idx):
    """x (..., C): for each of idx (...) its row of the table (N, C)."""
    N, C = table.shape
    for i in k.share(x.rows):
        row = idx[i]
        inside = (row >= 0) & (row < N)
        safe = inside.where(row, 0)
        for c in k.loop(C):
            x[i, c] = inside.where(table[safe, c], math.nan)

def embed_back(k, dtable, dx, idx):
    """The gradient of the table. Tokens repeat, so here, too, each core takes columns of its own."""
    N, C = dtable.shape
    for row in k.loop(N):
        for c in k.share(C):
            dtable[row, c] = 0.0
    for i in k.loop(dx.rows):
        row = idx[i].maximum(0).minimum(N - 1)
        for c in k.share(C):
            dtable[row, c] += dx[i, c]

# Cross-entropy is lse - logit of the target, where lse = ln(sum of exp(logits)). lse rises with a logit by
# exp(logit) / sum, which is its softmax: so the gradient is the probabilities, minus 1 at the target. It
# says: less of everything, in proportion to how much you believed in it, and more of what came.
def cross_entropy(k, loss, lse, logits, targets):
    """loss (M,) and lse (M,) of logits (M, V) and targets (M,)."""
    V = logits.columns
    for i in k.share(logits.rows):
        top = k.max(V, lambda v: logits[i, v])
        total = k.sum(V, lambda v: exp(logits[i, v] - top))
        lse[i] = top + total.log()
        target = targets[i]
        inside = (target >= 0) & (target < V)
        loss[i] = inside.where(lse[i] - logits[i, inside.where(target, 0)], math.nan)

def cross_entropy_back(k, dlogits, dloss, logits, lse, targets):
    """The gradient of the logits (M, V) from that of each token's loss (M,)."""
    V = logits.columns
    for i in k.share(logits.rows):
        weight = dloss[i]
        log_total = lse[i]
        for v in k.loop(V):
            dlogits[i, v] = exp(logits[i, v] - log_total) * weight
        dlogits[i, targets[i].maximum(0).minimum(V - 1)] -= weight

# === Chapter 18. Adam in one pass over memory
#
# Left to itself, tinygrad goes through memory three times, for theta, m and v, and on one core; `adamw`
# goes once. Before it comes the gradient's length. To add up the 100 million squares of GPT-2 one by one in
# float32 loses digits, as each is tiny next to the sum; so it is done in float64. Every core has a sum of
# its own. A kernel takes the gradients of one transformer block, and hands its sums to the next kernel as
# `before`. (All blocks have the same shapes, so they share one program. A single kernel for all gradients
# would be the longer to compile, the deeper the model is.)
#
# Of a gradient of 100 numbers on two cores, core 0 takes numbers 0 to 63 in four steps of 16, and core 1
# those from 64 on; its last 28 places count as 0. They are 16 lanes because one sum would have to wait for
# each addition before the next can begin.
def square_sums(k, after, before, *gradients):
    """after (cores,) float64 = before + each core's part of the sum of squares of some gradients."""
    lanes = k.array(16, dtype=dtypes.double)
    for core in k.share(k.cores):
        for lane in k.loop(16):
            lanes[lane] = 0.0
        for gradient in gradients:
            n = gradient.rows * gradient.columns
            steps = pieces(n, 16 * k.cores)
            for step, lane in k.loop(steps, 16):
                place = (core * steps + step) * 16 + lane
                inside = place < n  # (the last core may have less to do)
                value = gradient[inside.where(place, 0)]
                lanes[lane] += inside.where(value * value, 0.0).cast(dtypes.double)
        after[core] = sum((lanes[lane] for lane in range(16)), before[core])

def unless_tiny(x, least: float):
    """x, or 0 between -least and least."""
    return ((x < least) & (x > -least)).where(0.0, x)

def adamw(k, *arrays, beta1: float, beta2: float, decays: tuple[float, ...]):
    """A step of AdamW in place, as `Plain.adamw` has it, for some parameters: first all theta, then all m,
    all v and all gradients, and at last scale and rates. With a scale of 0 nothing changes."""
    # If a token does not come again, the averages m and v of its row in the table get smaller at each step,
    # and a processor is slow with numbers below 2^-126 (as `exp` says). So tiny ones become 0 at once. No
    # weight would notice: an m of 1e-18, divided by at least 1e-8, times a step size of 1e-3, moves it by
    # 1e-13. (And 1e-34 is what a gradient of 1e-16 adds to v.)
    *arrays, scale, rates = arrays
    factor = scale[0]
    taken = factor > 0.0
    rate = rates[0]
    # Where no step is taken, the same numbers are stored again. (Not to store them would be simpler, but a
    # store that depends on something takes AMD's processors with AVX2 three times as long. And the gradient
    # is not multiplied by 0 then, but replaced by it: 0 times a NaN is a NaN.)
    keep_1 = taken.where(factor.const_like(beta1), 1.0)
    keep_2 = taken.where(factor.const_like(beta2), 1.0)
    correction_1 = rates[1]
    correction_2 = rates[2]
    for number, decay in enumerate(decays):
        theta, m, v, gradient = arrays[number::len(decays)]
        for i in k.share(theta.rows * theta.columns):
            g = taken.where(unless_tiny(gradient[i] * factor, 1e-16), 0.0)
            m[i] = unless_tiny(m[i] * keep_1 + g * (1 - beta1), 1e-18)
            v[i] = unless_tiny(v[i] * keep_2 + g * g * (1 - beta2), 1e-34)
            change = (m[i] / correction_1) / ((v[i] / correction_2).sqrt() + 1e-8) + theta[i] * decay
            theta[i] -= taken.where(change * rate, 0.0)

# === Chapter 19. All cores at once
#
# A recording is a list of kernels with the memory that each works on. tinygrad goes down that list in Python,
# 40 microseconds a kernel, and calls a kernel that is shared among cores for one core after the other. We let
# every core have a thread that goes down a list of its own, in compiled code:
#
#     for (n = 0; n < length; n++) {
#         lines[n].program(lines[n].arguments ..., my core's number);
#         done[my number] = n + 1;                       // tell the others that I am done with n + 1 kernels,
#         for (t = 0; t < threads; t++) {                // and wait until they are, too: the next kernel
#             turn = 0;                                  // may need what they have computed
#             do (turn++ < 4000 ? go_on : rest)(); while (done[t] < n + 1);
#         }
#     }
#
# `go_on` is C's abs, which does nothing here, and `rest` is sched_yield, which lets other programs run. To
# call that takes longer than most waits, so we do so only when a wait is long, as when another thread has
# lost its core. All this takes 0.6 microseconds a kernel. It is written in tinygrad's UOps, as all programs
# here are. UOps cannot skip a call; so where there is nothing to do, `go_on` is called. And they know only
# one kind of call, so every program is handed 61 words: its arguments, its core's number, and then zeros. A
# C function does not look at what it has not asked for.
#
# And there are two *fences*, which neither the compiler nor the processor moves anything across. One stands
# between a kernel and its count: whoever sees the count sees the results, too. The other stands between the
# last count that was seen and the next kernel, which must not begin to read before.
WIDTH = 64  # words in a line: a program, at most 60 arguments, the core, the addresses of `go_on` and `rest`
PATIENCE = 4000

@functools.cache
def replay_program(threads: int):
    """The loop above. Its own arguments are the list, its length, the place of `mine`, and all of `done`.
    (`x.end(loop, c)` is x and then `while (c)`.)"""
    # (`volatile` memory is fetched anew each time, since another thread may have changed it.)
    lines = UOp.param(0, dtypes.uint64, (1 << 20,), volatile=True)
    length = UOp.param(1, dtypes.int, (1,))
    mine = UOp.param(2, dtypes.uint64, (1,), volatile=True)
    done = UOp.param(3, dtypes.uint64, (8 * threads,), volatile=True)  # 8: each thread has a cache line
    turns = UOp.placeholder((1,), dtypes.int, 1000, addrspace=AddrSpace.REG)
    n = UOp.range(length[0].load(), 0)
    count = n.cast(dtypes.uint64) + 1
    *line, go_on, rest = [lines.after(n)[n * WIDTH + word].load() for word in range(WIDTH)]
    call = line[0].call(*line[1:], ret_dtype=dtypes.void)
    last = mine.after(UOp(Ops.BARRIER, src=(call,)))[0].store(count)
    for thread in range(threads):
        last = turns.after(last)[0].store(0)
        loop = UOp.loop(1 + thread)
        turn = turns.after(last, loop)[0].load()
        nap = (turn < PATIENCE).where(go_on, rest).call(ret_dtype=dtypes.void)
        last = turns.after(nap)[0].store(turn + 1)
        seen = done.after(last)[thread * 8].load()
        last = seen.end(loop, seen < count)
    end = UOp(Ops.BARRIER, src=(last,)).end(n)
    return end.sink(arg=KernelInfo(f"replay_{threads}", opts_to_apply=()), tag=1)

# A kernel's own memory lies on the stack of its thread, up to 3 MB in a long product. Some systems give a
# thread only two.
threading.stack_size(16 << 20)

# In a notebook, Ctrl-C raises KeyboardInterrupt between any two lines of Python. If one thread has begun then
# and another has not, the first would wait for ever. So Ctrl-C has to wait until all are done.
@contextmanager
def undisturbed():
    """In the `with` block, Ctrl-C does nothing yet; what it does is done at the end of it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler in (None, signal.SIG_IGN):
        yield  # (nothing can happen here)
        return
    came = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for _ in came:
            signal.raise_signal(signal.SIGINT)

class Crew:
    """Calls all kernels of a recording, on `threads` of the `cores` threads that there could be. The results
    do not depend on how many."""
    def __init__(self, calls: list, threads: int, cores: int):
        library = ctypes.CDLL(None)
        go_on, rest = (ctypes.cast(f, ctypes.c_void_p).value for f in (library.abs, library.sched_yield))
        # A kernel that is shared among more cores than there are threads takes several lines of a list; and
        # all lists must be equally long, since threads wait for each other after every line. With 4 shares
        # on 3 threads, thread 0 has shares 0 and 3; threads 1 and 2 have one each, and then a line in which
        # they only wait.
        lines = []
        for address, arguments, shares in calls:
            lines += [[address, *arguments, core] for core in range(shares)]  # core_id comes last
            lines += [[go_on]] * (-shares % threads)                          # who has no share waits
        lines = [line + [0] * (WIDTH - 2 - len(line)) + [go_on, rest] for line in lines]
        lists = [lines[i::threads] for i in range(threads)]
        self.lists = np.array(lists, np.uint64)                               # (threads, length, WIDTH)
        self.length = np.array([self.lists.shape[1]], np.int32)
        # The program waits for the counts of all `cores` threads. One that is not there has the largest count
        # from the start.
        self.done = np.full((cores, 8), 2**64 - 1, np.uint64)
        tree = replay_program(cores)
        compile_together([tree])
        self.program = Device["CPU"].runtime(to_program(tree, Device["CPU"].renderer).to_elf())
        self.arguments = []
        for lines, mine in zip(self.lists, self.done, strict=False):
            memory = (lines, self.length, mine, self.done)
            self.arguments.append([ctypes.c_uint64(array.ctypes.data) for array in memory])
        self.pool = ThreadPoolExecutor(max(1, threads - 1))

    def __call__(self) -> None:
        self.done[:len(self.lists)] = 0
        first, *more = self.arguments
        with undisturbed() if more else nullcontext():
            others = [self.pool.submit(self.program.fxn, *arguments) for arguments in more]
            self.program.fxn(*first)
            for other in others:
                other.result()

# To wake a second thread takes 50 microseconds, in which a small model has written its token. So for a short
# recording we try both ways in turn, and after some calls stay with the one that was faster.
TRIALS = 8

class Replay:
    """Calls a recording again and again, in the quickest way."""
    def __init__(self, recording: Recording, cores: int):
        self.recording = recording
        self.ways = [recording.jit]  # tinygrad's own way, which knows what to do with copies, too
        calls = recording.calls()
        if calls is not None:
            self.ways = [Crew(calls, threads, cores) for threads in sorted({cores, 1}, reverse=True)]
        self.best = [math.inf] * len(self.ways)  # seconds
        self.turns = 0

    def __call__(self) -> None:
        number = self.turns % len(self.ways)
        began = time.perf_counter()
        self.ways[number]()
        self.best[number] = min(self.best[number], time.perf_counter() - began)
        self.turns += 1
        if self.best[0] > 0.05:  # a long one needs all cores, and to try a single one would take long
            self.ways = self.ways[:1]
        elif self.turns == TRIALS:
            self.ways = [self.ways[np.argmin(self.best)]]

# === Chapter 20. The fast backend
#
# `Fast` has the methods of `Plain`, and each of them calls kernels. Results begin as `Tensor.empty`, memory
# without numbers, which the kernel fills; `back` says what to do on the way back. Everything stays lazy:
# tinygrad sees a graph in which some nodes are our programs, schedules it, and differentiates it like any
# other. So a layer of your own, written in ordinary operations, may stand between two of ours, and its
# gradient comes out right without another word.
#
# These are the kernels that stand for part I's operations ("few" means at most 8 rows, as when writing):
#
#     embed            embed                                      back: embed_back
#     linear           matmul; for few rows matvec                back: matmul, weights_back
#     layer_norm       layer_norm                                 back: layer_norm_back, ..._weights_back
#     gelu             gelu                                       back: gelu, with dout
#     attention        flash; for one token of each text attend   back: flash_back
#     unembed          matmul; for few rows dot_rows              back: matmul, weights_back
#     cross_entropy    cross_entropy                              back: cross_entropy_back
#     norm             square_sums, a block's gradients at a time
#     adamw            adamw, a block's parameters at a time
#
# Here kernels take the place of part I's operations. Whoever changes an operation in part I must not get the
# kernel of the old one. So each stands in for exactly one text: `is_known` compares a checksum of what the
# operation does, its source without comments. If that has changed, the kernel steps back, and what you wrote
# is computed. It also steps back if somebody puts another function into Plain while the program runs.
def sources() -> dict:
    """What part I defines, by name ("GPT", "Plain.gelu", "SPLIT"): its source without comments and
    docstrings."""
    found = {}
    with suppress(OSError, NameError, SyntaxError, ValueError):  # there need not be a file, or such a line
        text = Path(__file__).read_text(encoding="utf-8")
        tree = ast.parse(text[:text.index("\n# Part II.")])
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        for thing in tree.body:
            if isinstance(thing, ast.FunctionDef | ast.ClassDef):
                found[thing.name] = ast.unparse(thing)
                inner = thing.body if thing.name == "Plain" else []
                found |= {f"Plain.{node.name}": ast.unparse(node) for node in inner if hasattr(node, "name")}
            elif isinstance(thing, ast.Assign):
                found[ast.unparse(thing.targets[0])] = ast.unparse(thing.value)
    return found

SOURCES = sources()

def digest(*names: str) -> str:
    """A checksum of what these do; one that is unknown counts as an empty text."""
    text = "\n".join(SOURCES.get(name, "") for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

def known_to_kernels(arguments, device: str) -> bool:
    """True if every tensor of floats in these arguments is float32, in the memory of `device`, and not empty.
    (Ids need not be: `in_memory` makes them so. And the weights of chapter 22 are whole numbers.)"""
    floats = [x for x in get_state_dict(arguments).values() if dtypes.is_float(x.dtype)]
    return all(x.dtype == dtypes.float32 and x.device == device and 0 not in x.shape for x in floats)

class Unfit(Exception):
    """Arguments of shapes that a kernel does not know."""

def check(fits: bool) -> None:
    """Unfit, unless a kernel's arguments fit: it would read past the end of what does not."""
    if not fits:
        raise Unfit

# There are three ways to change an operation, and each needs a test of its own. If its source in this file is
# edited, the checksum is another. If a line such as setattr(Plain, "gelu", f) has run before this chapter,
# the source is as it was, but the function has another name. And if such a line runs later, `Plain` has
# another function than it had here (`now is plain`).
OPERATIONS = {"embed": "4ce31ccacb8f", "linear": "c86bd6f2d0ae", "layer_norm": "4107472af387",
              "gelu": "cb21fcecc912", "attention": "f9faae301230", "unembed": "9de2977d1982",
              "cross_entropy": "f57abc3edf8c", "norm": "4ef1be523e83", "adamw": "e475df0de9ec"}

def is_known(name: str) -> bool:
    """Is this operation of part I the one that our kernels stand in for?"""
    return digest(written_as(getattr(Plain, name, None))) == OPERATIONS[name]

def written_as(function) -> str:
    """Where in this file a function was written, such as "Plain.gelu". (Its `__qualname__` can be copied.)"""
    return getattr(getattr(function, "__code__", None), "co_qualname", "")

CHANGED = [name for name in OPERATIONS if hasattr(Plain, name) and not is_known(name)]

def instead_of_plain(fast):
    """A decorator: the function below is used while part I's operation of the same name is the known one, for
    arguments that kernels know; or else the operation itself."""
    name = fast.__name__
    plain = getattr(Plain, name, None) if name not in CHANGED else None

    def call(self, *arguments, **named):
        now = getattr(Plain, name)
        if now is plain and known_to_kernels([*arguments, *named.values()], self.device):
            with suppress(Unfit):
                return fast(self, *arguments, **named)
        return now(self, *arguments, **named)
    return call

def like(tensor: Tensor | None) -> Tensor | None:
    """Memory for a result of this shape."""
    return None if tensor is None else Tensor.empty(*tensor.shape)

# A recording repeats what it has seen (chapter 4): a dropout that has been set to another number since, a
# layer that has been replaced. So before an optimizer's step is repeated, or an exam, we look whether the
# model is still made of the same things. That takes 100 microseconds. Writing a token does not take much
# longer, so there we look when a text begins.
ASKED_AGAIN = ("learning_rate", "min_lr", "warmup_steps", "max_iters")  # part I reads these at each step
NUMBERS = {int, float, bool, str}
SIMPLE = {*NUMBERS, Tensor, FunctionType}  # without parts that could change

def made_of(owner) -> list:
    """What decides what an owner's `model` and `config` do: the attributes of all their parts, and what these
    parts' classes define. Each is kept together with its `id`, which no other thing has as long as it is."""
    model = owner if isinstance(owner, GPT) else getattr(owner, "model", None)
    config = getattr(owner, "config", None)
    numbers = vars(config).items() if config else ()
    found = [type(owner), model, *(value for name, value in numbers if name not in ASKED_AGAIN)]
    seen = {id(getattr(model, "tokenizer", None))}
    for thing in found:  # (which grows meanwhile)
        kind = type(thing)
        if kind in SIMPLE or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (list, tuple)):
            found += thing
        elif isinstance(thing, dict):
            found += thing.values()
        elif kind is type:  # (`copy` puts that name into classes)
            found += [part for name, part in vars(thing).items() if name != "__slotnames__"]
        elif kind.__module__ != "builtins":
            found += kind.__mro__[:-1]
            found += getattr(thing, "__dict__", {}).values()
    # A tensor can also have got other memory, as from tinygrad's `load_state_dict`.
    found += [thing.uop for thing in found if type(thing) is Tensor]
    return [thing if type(thing) in NUMBERS else (id(thing), thing) for thing in found]

def anew(record):
    """A decorator for a backend's `record`: a method of something with a model is recorded anew if the model
    has changed, which is said, up to ten times."""
    def record_anew(self, function):
        owner = getattr(function, "__self__", None)
        recorded = None
        before = None
        calls = 0
        times = 0

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            nonlocal recorded, before, calls, times
            if recorded is None or made_of(owner) != before:
                if 1 <= times <= 10:
                    advice = ", and again (what changes often had better be a Tensor)" if times == 10 else ""
                    warn(f"the model has changed, and is recorded anew{advice}")
                recorded = record(self, getattr(owner, function.__name__))
                calls = 0
                times += 1
            results = recorded(*arrays)
            if calls < 2:  # (TinyJit runs a function twice, and that may change something, too)
                before = made_of(owner)
                calls += 1
            return results
        return call if owner else record(self, function)
    return record_anew

def no_way_back(*_):
    """What tinygrad asks for the gradient of a kernel that has none, such as those of a way back."""
    raise UserError("part II's programs can be differentiated only once: use part I's, by --plain or by "
                    "GPT(config, PLAIN)")

# One method looks like the next: it checks that shapes are what the kernel expects, or else part I's
# operation is computed; it says how the gradient is found; and it runs the kernel. Ids have no gradient, so
# theirs is None.
class Fast(Plain):
    """Part I's operations by the kernels of part II, on `cores` cores: the same arguments, and the same
    results up to float32's rounding."""
    def __init__(self, cores: int):
        self.cores = cores
        self.device = "CPU"

    def run(self, kernel, results: list[Tensor], inputs: list[Tensor], back=None, **options) -> list[Tensor]:
        """Run a kernel; return the results. `back` is its way back: given the gradient of the first result,
        and the results, it returns a gradient for each input, or None where none is needed. A bias that is
        None is left out everywhere."""
        results = [tensor for tensor in results if tensor is not None]
        inputs = [tensor for tensor in inputs if tensor is not None]
        n = len(results)

        # `call` is the kernel's node in tinygrad's graph, whose sources are the kernel and its arguments:
        # first results, then inputs. The results have no numbers until it has run, so we ask for them `after`
        # the call. tinygrad wants a gradient for each argument; results are only written, and have none.
        def gradient(dy, call):
            computed = [Tensor(result.after(call)) for result in call.src[1:n + 1]]
            slopes = back(Tensor(dy), *computed)
            return *[None] * n, *(slope if slope is None else slope.uop for slope in slopes)
        # (A slope that comes back through another result would be taken for the first one's.)
        tensors = [*results, *inputs]
        program = functools.partial(program_of, kernel, self.cores, **options)
        way_back = gradient if back else no_way_back
        first, *others = tensors[0].custom_kernel(*tensors[1:], fxn=program, grad_fxn=way_back)[:n]
        return [first, *(tensor.detach() if back else tensor for tensor in others)]

    @instead_of_plain
    def embed(self, idx, table):
        check(table.ndim == 2)
        idx = in_memory(idx, table.shape[0])

        def back(dx, x):
            return *self.run(embed_back, [like(table)], [dx, idx]), None
        x = Tensor.empty(*idx.shape, table.shape[1])
        return self.run(embed, [x], [table, idx], back)[0]

    @instead_of_plain
    def linear(self, x, weight, bias=None):
        check(weight.ndim == 2 and x.shape[-1:] == weight.shape[:1])
        check(bias is None or bias.shape == weight.shape[1:])

        def back(dy, *_):
            dx = self.run(matmul, [like(x)], [dy, weight], b_transposed=True)
            return *dx, *self.run(weights_back, [like(weight), like(bias)], [x, dy])
        # Many rows are for the tiled product. A few are for `matvec`, whose parts are added up by ordinary
        # operations: so each part has the gradient of y.
        shape = *x.shape[:-1], weight.shape[1]
        rows = x.numel() // weight.shape[0]
        if rows > FEW:
            return self.run(matmul, [Tensor.empty(*shape)], [x, weight, bias], back)[0]

        def back_from_parts(dparts, _):
            return back(dparts[0].reshape(shape).contiguous())[:2]
        n = divisor(weight.shape[0], self.cores)
        parts = self.run(matvec, [Tensor.empty(n, rows, shape[-1])], [x, weight], back_from_parts)[0]
        y = parts.sum(0).reshape(shape)
        return y if bias is None else y + bias

    @instead_of_plain
    def layer_norm(self, x, weight, bias=None):
        check(x.shape[-1:] == weight.shape)
        check(bias is None or bias.shape == weight.shape)

        def back(dy, _, stats):
            dx = self.run(layer_norm_back, [like(x)], [dy, x, weight, stats])
            return *dx, *self.run(layer_norm_weights_back, [like(weight), like(bias)], [dy, x, stats])
        stats = Tensor.empty(*x.shape[:-1], 2)
        return self.run(layer_norm, [like(x), stats], [x, weight, bias], back)[0]

    @instead_of_plain
    def gelu(self, x):
        def back(dy, _):
            return self.run(gelu, [like(x)], [x, dy])
        return self.run(gelu, [like(x)], [x], back)[0]

    @instead_of_plain
    def attention(self, qkv, position, cache=None):
        check(qkv.ndim == 5 and qkv.shape[2] == 3)
        B, T, _, H, D = qkv.shape
        y = Tensor.empty(B, T, H, D)
        lse = Tensor.empty(B, H, T)
        # To write (chapter 21), there is a cache of keys and values. If each token says where its own text
        # begins, they are of different texts; or else they are a piece of one, and go through `flash` in
        # blocks.
        if cache is not None:
            memory = cache.room(H, D)
            check(B == 1 and position.shape == (T,) and T <= cache.S)
            check(all(tensor.shape == (1, H, cache.texts * cache.S, D) for tensor in memory))
            where = in_memory(position), in_memory(cache.start)
            if cache.start.shape == position.shape:
                return self.run(attend, [y, *memory], [qkv, *where], most=cache.S)[0]
            return self.run(flash, [y, lse], [qkv, *memory, *where], most=cache.S)[0]

        def back(dy, y, lse):
            return self.run(flash_back, [like(qkv)], [dy, y, lse, qkv])
        return self.run(flash, [y, lse], [qkv], back)[0]

    @instead_of_plain
    def unembed(self, x, table):
        check(table.ndim == 2 and x.shape[-1:] == table.shape[1:])

        def back(dy, _):
            dx = self.run(matmul, [like(x)], [dy, table])
            return *dx, *self.run(weights_back, [like(table)], [dy, x])
        y = Tensor.empty(*x.shape[:-1], table.shape[0])
        # (A table's rows are used as they lie, so each core has its own, and no parts have to be added up.)
        if x.numel() <= FEW * table.shape[1]:
            return self.run(dot_rows, [y], [x, table], back)[0]
        return self.run(matmul, [y], [x, table], back, b_transposed=True)[0]

    @instead_of_plain
    def cross_entropy(self, logits, targets):
        check(logits.shape[:-1] == targets.shape)
        targets = in_memory(targets, logits.shape[-1])

        def back(dloss, _, lse):
            return *self.run(cross_entropy_back, [like(logits)], [dloss, logits, lse, targets]), None
        results = [like(targets), like(targets)]
        return self.run(cross_entropy, results, [logits, targets], back)[0]

    @instead_of_plain
    def norm(self, gradients):
        total = Tensor.zeros(self.cores, dtype=dtypes.double).contiguous()
        for names in groups(gradients, self.cores):
            after = Tensor.empty(self.cores, dtype=dtypes.double)
            total = self.run(square_sums, [after], [total, *(gradients[name] for name in names)])[0]
        return total.sum().sqrt().cast(dtypes.float32)

    @instead_of_plain
    def adamw(self, parameters, m, v, gradients, scale, rates, config):
        check_config(config)  # (of part III; with a beta of 1, the kernel would have nothing to store)
        check(all(tensors[name].shape == theta.shape for tensors in (m, v, gradients)
                  for name, theta in parameters.items()))
        # The kernel's results are no new memory, but theta, m and v themselves, which it changes in place.
        changed = []
        for names in groups(parameters, self.cores):
            results = [tensors[name] for tensors in (parameters, m, v) for name in names]
            inputs = [*(gradients[name] for name in names), scale.reshape(1), rates]
            decays = tuple(config.weight_decay if parameters[name].ndim == 2 else 0.0 for name in names)
            options = {"beta1": config.beta1, "beta2": config.beta2, "decays": decays}
            first, *_ = self.run(adamw, results, inputs, **options)
            changed.append(first)  # (asking for one of its results makes the kernel run)
        return changed

    def place(self, array):
        tensor = Tensor.empty(*array.shape, dtype=getattr(dtypes, array.dtype.name))
        memory_of(tensor)[...] = array  # (part I's way would take 2 ms for each)
        return tensor

    @anew
    def record(self, function):
        """As `Plain.record`, on all cores."""
        replay = None

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            nonlocal replay
            if replay is None:
                replay = Replay(Recording(function, arrays, self.cores), self.cores)  # (which runs it once)
            else:
                for memory, array in zip(replay.recording.arrays, arrays, strict=True):
                    if array.shape != memory.shape:
                        raise ValueError(f"this was recorded for {memory.shape}, not for {array.shape}")
                    memory[...] = array
                replay()
            return [result.copy() for result in replay.recording.results]
        return call

# AdamW's kernel takes some parameters at a time. Those of a transformer block go together, 12 in a GPT-2, so
# that one program serves for every block. Much more would not fit: four arrays for each, with scale and
# rates, are 50 arguments, and a line of chapter 19 has room for 60.
def groups(parameters: dict[str, Tensor], cores: int) -> list[list[str]]:
    """The names of parameters in groups, each of one block or of what is in no block. One with fewer numbers
    than there are cores is alone (`share` says why)."""
    # Neighbours of which `block` says the same are a group: ["h", "3"] for all of block 3.
    def block(name: str) -> list[str]:
        if parameters[name].numel() < cores:
            return [name]
        return name.split(".")[:2] if name.startswith("h.") else []
    blocks = [list(names) for _, names in itertools.groupby(parameters, block)]
    return [names[i:i + 12] for names in blocks for i in range(0, len(names), 12)]

def in_memory(ids: Tensor, n: int | None = None) -> Tensor:
    """Whole numbers as a kernel can read them: int32, and in memory, which a mere constant is not. ValueError
    if one is not from 0 to n - 1. (A recording gets to see its numbers only when it is repeated; there the
    kernels give NaN.)"""
    if n is not None and not capturing and 0 not in ids.shape:
        numbers = ids.numpy()
        if not 0 <= numbers.min() <= numbers.max() < n:
            raise ValueError(f"ids are from {numbers.min()} to {numbers.max()}, but only 0 to {n - 1} exist")
    ids = ids.cast(dtypes.int32)
    return ids.clone() if ids.device is None else ids.contiguous()

# *On another device*, a GPU say, part I's operations run as they are, but for attention: its T x T matrix
# would fill any memory. A GPU has thousands of threads where a CPU has a few cores, so every query gets a
# thread of its own, which takes one key after the other, with the fading sums of chapter 16. Nothing has to
# be added up between threads. (Ordinary operations on some keys at a time would not do: tinygrad keeps what
# all of them compute until the end, and then it is T x T again.)
def attend_by_threads(k, y, lse, qkv):
    """What `flash` computes: qkv (B, T, 3, H, D) -> y (B, T, H, D) and lse (B, H, T)."""
    B, T, _, H, D = qkv.shape
    # (A Python name only stands for an expression, which would be computed where it is used, when `top` is
    # another already. What is to keep a value is an array, if only of length 1.)
    query = k.array(D)
    out = k.array(D)
    top = k.array(1)
    old_top = k.array(1)
    score = k.array(1)
    weight = k.array(1)
    fade = k.array(1)
    total = k.array(1)
    for n in k.threads(B * H * T):
        b = n // (H * T)
        h = n // T % H
        i = n % T
        top[0] = -1e30
        total[0] = 0.0
        for d in k.loop(D):
            query[d] = qkv[b, i, 0, h, d] * D**-0.5
            out[d] = 0.0
        for j in k.loop(i + 1):
            score[0] = k.sum(D, lambda d: query[d] * qkv[b, j, 1, h, d])
            old_top[0] = top[0]
            top[0] = top[0].maximum(score[0])
            fade[0] = exp(old_top[0] - top[0])
            weight[0] = exp(score[0] - top[0])
            total[0] = total[0] * fade[0] + weight[0]
            for d in k.loop(D):
                out[d] = out[d] * fade[0] + weight[0] * qkv[b, j, 2, h, d]
        for d in k.loop(D):
            y[b, i, h, d] = out[d] / total[0]
        lse[b, h, i] = top[0] + total[0].log()

# On the way back thread i takes query i first, with the i + 1 keys that it sees, and then key i, with the
# T - i queries that see it. So all threads have equally much to do, and none writes where another does.
def attend_by_threads_back(k, dqkv, dy, dot, lse, qkv):
    """The gradient of qkv, from that of y, from dy . y (B, T, H) and from lse."""
    B, T, _, H, D = qkv.shape
    mine = k.array(3, D)       # q, k and v of token i
    slope = k.array(3, D)      # and their gradients
    grad = k.array(D)
    weight = k.array(1)
    dscore = k.array(1)
    for n in k.threads(B * H * T):
        b = n // (H * T)
        h = n // T % H
        i = n % T
        for part, d in k.loop(3, D):
            mine[part, d] = qkv[b, i, part, h, d]
            slope[part, d] = 0.0
        for d in k.loop(D):
            grad[d] = dy[b, i, h, d]
        for j in k.loop(i + 1):
            score = k.sum(D, lambda d: mine[0, d] * qkv[b, j, 1, h, d]) * D**-0.5
            weight[0] = exp(score - lse[b, h, i])
            dweight = k.sum(D, lambda d: grad[d] * qkv[b, j, 2, h, d])
            dscore[0] = weight[0] * (dweight - dot[b, i, h]) * D**-0.5
            for d in k.loop(D):
                slope[0, d] += dscore[0] * qkv[b, j, 1, h, d]
        for later in k.loop(T - i):
            j = i + later
            score = k.sum(D, lambda d: mine[1, d] * qkv[b, j, 0, h, d]) * D**-0.5
            weight[0] = exp(score - lse[b, h, j])
            dweight = k.sum(D, lambda d: mine[2, d] * dy[b, j, h, d])
            dscore[0] = weight[0] * (dweight - dot[b, j, h]) * D**-0.5
            for d in k.loop(D):
                slope[1, d] += dscore[0] * qkv[b, j, 0, h, d]
                slope[2, d] += weight[0] * dy[b, j, h, d]
        for part, d in k.loop(3, D):
            dqkv[b, i, part, h, d] = slope[part, d]

class Elsewhere(Plain):
    """Part I's operations for any device of tinygrad's, with attention that keeps no T x T matrix."""
    def __init__(self):
        self.cores = 1
        self.device = Device.DEFAULT

    run = Fast.run
    record = anew(Plain.record)

    @instead_of_plain
    def attention(self, qkv, position, cache=None):
        check(qkv.ndim == 5 and qkv.shape[2] == 3 and cache is None)  # (writing, T is small)
        B, T, _, H, D = qkv.shape

        def back(dy, y, lse):
            dot = (dy * y).sum(-1).contiguous()
            return self.run(attend_by_threads_back, [like(qkv)], [dy, dot, lse, qkv])
        results = [Tensor.empty(B, T, H, D), Tensor.empty(B, H, T)]
        return self.run(attend_by_threads, results, [qkv], back)[0]

if KNOWN:
    if DEV.device == "CPU" and DEV.renderer in ("", "CLANG"):
        BACKENDS.append(Fast(CORES))
    else:
        BACKENDS.append(Elsewhere())
        WHY_PLAIN = f"all of part II's programs but attention's are for the CPU and clang, not for {DEV}"

# === Chapter 21. Writing text without computing anything twice
#
# To write a token, part I's `write` passes all T tokens through the model. But because of the mask, what the
# earlier tokens compute does not depend on the later ones: their keys and values are what they were. So we
# keep these (the *KV cache*) and compute the new token alone: one query against the keys of all before it.
#
# When there are more than block_size tokens, the older half is let go and the newer half read again, from 0
# on. So at least half a context is always remembered, and the extra work stays small. What comes out must be
# what `write` writes; the tests compare.
#
# Several texts can be written side by side: then a weight that has come from memory serves all of them. They
# have different lengths, and soon one of them begins anew while the others go on, so they are no batch (B,
# T). But for all layers except attention a token is a token. So we hand over one row (1, T) of T tokens, each
# at a place of its own, and only the cache knows which text each belongs to. It is one long memory, with a
# stretch of S places for each text; where the stretch of a token's text begins is its `start`.
#
# A prompt, too, is a row of tokens: all of one text, one after the other. Here we have the products of
# chapter 15 at their best, some hundred tokens at a time. Each length needs programs of its own, so prompts
# are read in pieces of three lengths at most, say of 256, 64 and 16 tokens. The last piece steps back, to end
# where the prompt does; what it reads twice is the same the second time.
def attend(k, y, keys, values, qkv, position, start, *, most: int):
    """Attention of new tokens, qkv (1, T, 3, H, D), each in another text -> y (1, T, H, D). Token t is at
    place position[t] < most of a text that begins at start[t] in the caches (1, H, S, D), where its key and
    value first take their place."""
    _, T, _, H, D = qkv.shape
    score = k.array(most)
    top = k.array(1)
    total = k.array(1)
    for th in k.share(T * H):
        t = th // H
        h = th % H
        last = position[t].maximum(0).minimum(most - 1)  # (a wrong one must not lead out of the caches)
        first = start[t]
        for d in k.loop(D):
            keys[0, h, first + last, d] = qkv[0, t, 1, h, d]
            values[0, h, first + last, d] = qkv[0, t, 2, h, d]
            y[0, t, h, d] = 0.0
        top[0] = -1e30
        total[0] = 0.0
        for j in k.loop(last + 1):
            score[j] = k.sum(D, lambda d: qkv[0, t, 0, h, d] * keys[0, h, first + j, d]) * D**-0.5
            top[0] = top[0].maximum(score[j])
        for j in k.loop(last + 1):  # (a loop of its own, which becomes vector instructions; a sum does not)
            score[j] = exp(score[j] - top[0])
        for j in k.loop(last + 1):
            total[0] += score[j]
        for j, d in k.loop(last + 1, D):
            y[0, t, h, d] += score[j] / total[0] * values[0, h, first + j, d]

# Let S be 64, and let there be three texts: the third has places 128 to 191, and its token 5 stands at 133.
# The memory begins with zeros, since `flash` reads whole blocks, places that nobody has written to yet among
# them. Their weight is tiny but not 0 (`exp` ends at 2^-60), and a tiny part of a NaN is a NaN.
class Cache:
    """The keys and values of one block, (1, H, texts * S, D) each: S places for each of some texts. `start`
    says where the text of each new token begins, (T,), or that of all of them, (1,)."""
    def __init__(self, S: int, texts: int, place):
        self.S = S
        self.texts = texts
        self.place = place                         # the backend's: it makes memory even during a recording
        self.memory = None
        self.start = Tensor.zeros(1, dtype=dtypes.int32)

    def room(self, H: int, D: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The memory, made at the first call. (Values may have another `width` than keys.)"""
        if self.memory is None:
            shapes = [(1, H, self.texts * self.S, n) for n in (D, width or D)]
            self.memory = [self.place(np.zeros(shape, np.float32)).realize() for shape in shapes]
        return self.memory

    def extend(self, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store keys and values (1, H, T, D) at their `position` (T,). Returns all keys and values, (1, H,
        texts * S, D), and which of them each new token may see, (T, texts * S)."""
        _, H, T, D = k.shape
        memory = self.room(H, D, v.shape[-1])
        places = Tensor.arange(self.texts * self.S).reshape(1, -1)
        start = self.start.reshape(-1, 1)
        last = start + position.reshape(T, 1)
        # Kernels write where they like; ordinary operations can't. So each place asks which new token is its
        # own, and a product with these zeros and ones takes it there. For one new token at place 2 of 4,
        # `here` is the column 0, 0, 1, 0: times the new key (1, D), it has that key in row 2 and zeros in the
        # others, where the old keys are kept.
        here = (last == places).transpose(0, 1)                       # (texts * S, T): token t, place s
        is_new = here.max(1, keepdim=True)                            # (texts * S, 1)
        for old, new in zip(memory, (k, v), strict=True):
            moved = here.cast(new.dtype) @ new                        # (1, H, texts * S, D)
            old.assign(is_new.where(moved, old))
        return *memory, (start <= places) & (places <= last)

# What does that save? Without the cache, a token of a text of T costs as much as a pass over T tokens. With
# it, all products have a single row: for T = 64, a 64th of the arithmetic. Then memory decides how fast one
# writes, since every weight has to come to the processor once for each token, and is used once.
#
# This holds for part I's model. A reader's own may look at earlier tokens in another way, which no cache of
# keys and values knows of. So where part I's layers have been changed, a Writer compares: it reads some
# tokens one by one, and all at once without a cache. If the logits differ, it says so, and writes the simple
# way. It also does so if `write` itself has been changed.
LAYERS = (Embedding, Linear, LayerNorm, Dropout, Attention, MLP, Block, GPT)
METHODS = [(f"{kind.__name__}.{name}", written_as(method)) for kind in LAYERS
           for name, method in vars(kind).items() if isinstance(method, FunctionType)]
LAYERS_AS_WE_KNOW_THEM = (digest(*(layer.__name__ for layer in LAYERS)) == "5db155f0ccd9" and not CHANGED
                          and all(name == place or place == "loss" for name, place in METHODS))
WRITE_AS_WE_KNOW_IT = write if digest("write") == "59f0ba302c75" else None
THEIR_CONTENTS = {kind: dict(vars(kind)) for kind in (*LAYERS, Plain, Fast, Elsewhere)}

def is_as_in_part_one(thing) -> bool:
    """Is this a model (or part of one) that is made of part I's layers, unchanged, and of nothing else?"""
    kind = type(thing)
    if kind in (list, dict):  # (such as `source`, a dict of texts)
        return all(map(is_as_in_part_one, thing if kind is list else thing.values()))
    for name, content in THEIR_CONTENTS.get(kind, {}).items():
        if vars(kind).get(name) is not content:  # somebody has put something else there
            return False
    if kind in (Fast, Packed, Elsewhere) and not is_as_in_part_one(PLAIN):  # (Packed: chapter 22)
        return False
    if kind in LAYERS:
        parts = [part for name, part in vars(thing).items() if name != "tokenizer"]
        return LAYERS_AS_WE_KNOW_THEM and all(map(is_as_in_part_one, parts))
    return kind in (Plain, Fast, Packed, Elsewhere, Tensor, GPTConfig, BPETokenizer, str, int, type(None))

SIDE_BY_SIDE = FEW  # texts

# A *row* of a Writer is one text's place in the caches. `streams` (below) can begin texts while earlier ones
# are not finished, in the same rows 0, 1 and so on. So a Writer notes whose a row is (`owners`), and a text
# that finds another in its row is read into the caches anew: slower, but right.
@dataclass
class Text:
    """What a Writer knows of a text that it is at work on."""
    seen: list[int]                # its newest tokens, at most block_size
    rng: np.random.Generator
    left: int                      # tokens still to be written
    row: int                       # which stretch of the caches it has, as long as no other text takes it
    done: int = 0                  # so many of the tokens seen are in the caches
    fresh: deque = dataclasses.field(default_factory=deque)  # written, and not yet handed out

class Writer:
    """Writes with a model, up to `texts` texts side by side. Each Writer has caches of its own, so several
    can be at work at a time."""
    def __init__(self, model: GPT, texts: int = 1):
        T = model.config.block_size
        self.model = model
        self.texts = texts
        self.half = max(1, T // 2)
        self.S = pieces(T, LANES) * LANES  # (attention works on whole blocks)
        # Pieces of a prompt: the largest power of two, up to 256, that fits into half a context, a quarter of
        # it, and a sixteenth. (For T = 64 that is 32 and 8: a piece of 2 is not worth a program.)
        longest = 1 << min(8, self.half.bit_length() - 1)
        self.sizes = [n for n in (longest, longest // 4, longest // 16) if n > 3]
        self.caches = [Cache(self.S, texts, model.ops.place) for _ in model.h]
        self.programs = {}
        self.owners = {}  # which text is in the caches, by row
        self.is_known = is_as_in_part_one(model)
        self.remembers = True
        model.parameters()  # (puts all numbers into memory)
        self.made_of = made_of(self)
        if write is not WRITE_AS_WE_KNOW_IT:
            self.forget("`write` has been changed, and part II cannot do the same with a cache")

    def forget(self, why="with a cache of keys and values this model would write something else") -> None:
        """Do without the caches from now on."""
        self.remembers = False
        warn(f"{why}; it writes without one, more slowly")

    def agrees(self) -> bool:
        """Do the caches lead to the logits that the model gives without?"""
        self.owners = {}
        n = self.model.config.block_size
        ids = np.random.default_rng(0).integers(0, self.model.config.vocab_size, n).tolist()
        try:
            want = self.model(Tensor([ids], dtype=dtypes.int32)).numpy()[0]            # (n, V)
            row = self.texts - 1                                         # (the last, whose places are others)
            got = [self.logits(ids[:place + 1], place, row) for place in range(n)]
            got[-1] = self.logits(ids, 0, row)                           # (once more, in pieces)
        except Exception:  # (of any kind, from a layer that takes no cache, say, or no single token)
            return False
        return bool(np.abs(np.array(got) - want).max() <= 1e-3 * np.abs(want).max())

    def step(self, idx: Tensor, position: Tensor, start: Tensor, head: bool = True) -> tuple[Tensor]:
        """What `read` records: pass ids (1, T), which stand at `position` (T,), through the model, with
        caches in which their texts begin at `start`."""
        for cache in self.caches:
            cache.start = start
        x = self.model.hidden(idx, None, position, self.caches)
        return ((self.model.head(x) if head else x).realize(),)

    def read(self, ids: list[int], places: list[int], rows: list[int], head=True) -> np.ndarray:
        """Pass n tokens, which stand at `places`, through the model. `rows` has the row of each one's text,
        or a single row if all are of one text. Returns for each the logits, (n, V), or without the head the
        stream before it, (n, C)."""
        # Only what has one shape can be recorded, so each number of tokens has a recording of its own. Places
        # and rows come in as tensors: one recording serves all of them.
        kind = len(ids), len(rows), head
        if kind not in self.programs:
            self.programs[kind] = self.model.ops.record(lambda *inputs: self.step(*inputs, head=head))
        idx, position, row = (np.array(numbers, np.int32) for numbers in ([ids], places, rows))
        return self.programs[kind](idx, position, row * self.S)[0][0]

    def read_before_last(self, ids: list[int], done: int, row: int = 0) -> None:
        """Read what has not been read of `ids`, all after the first `done`, at least up to the last but one.
        (A token that goes alone passes the head, too: writing has that program anyway.)"""
        # Take the largest piece that fits what is left. If none does, the smallest steps back over tokens
        # that have been read; and if there are too few of those, one token goes alone. With pieces of 256, 64
        # and 16, for example, 100 tokens are read as 0 to 63, 64 to 79, 80 to 95 and, stepping back, 84 to
        # 99; and of 5 tokens each goes alone.
        while done < len(ids) - 1:
            left = [n for n in self.sizes if n <= len(ids) - done]
            smallest = [n for n in self.sizes[-1:] if n <= len(ids)]
            n = (left or smallest or [1])[0]
            done = min(done + n, len(ids))
            self.read(ids[done - n:done], list(range(done - n, done)), [row], head=n == 1)

    def logits(self, ids: list[int], done: int, row: int = 0) -> np.ndarray:
        """Read `ids` after the first `done`; return the logits (V,) of what comes next."""
        self.read_before_last(ids, done, row)
        return self.read(ids[-1:], [len(ids) - 1], [row])[0]

    def advance(self, texts: list[Text], **how) -> None:
        """Write a token for each of some texts."""
        # First all but their last tokens must be in the caches: of a prompt, or of the newer half when the
        # context is full.
        for text in texts:
            if self.owners.get(text.row) is not text:  # another text has used its stretch meanwhile
                self.owners[text.row] = text
                text.done = 0
            if len(text.seen) > self.model.config.block_size:
                text.seen = text.seen[-self.half:]
                text.done = 0
            self.read_before_last(text.seen, text.done, text.row)
        # Side by side, n texts are a row of n tokens, (1, n), and no row may be longer than block_size.
        too_many = self.texts > self.model.config.block_size
        if len(texts) == 1 or too_many or not self.is_known:  # (if not part I's, we take no chances)
            logits = [self.read(text.seen[-1:], [len(text.seen) - 1], [text.row])[0] for text in texts]
        else:
            tokens = [0] * self.texts  # (a row without a text gets a 0 at place 0: what it held is lost)
            places = [0] * self.texts
            for text in texts:
                tokens[text.row] = text.seen[-1]
                places[text.row] = len(text.seen) - 1
            self.owners = {text.row: text for text in texts}
            results = self.read(tokens, places, list(range(self.texts)))
            logits = [results[text.row] for text in texts]
        # Each text draws from its own generator, so it is the same whoever else is written beside it.
        for text, row in zip(texts, logits, strict=True):
            try:
                token = draw(row, text.rng, **how)
            except ValueError:
                self.made_of = None  # (there may be NaNs in the caches: the next text gets new ones)
                raise
            text.done = len(text.seen)
            text.left -= 1
            text.seen.append(token)
            text.fresh.append(token)

    def follow(self, text: Text, all_texts: list[Text], **how):
        """Yield the tokens of a text. When none is waiting, all texts that go on get one more."""
        try:
            while text.left > 0 or text.fresh:
                if not text.fresh:
                    self.advance([other for other in all_texts if other.left > 0], **how)
                yield text.fresh.popleft()
        finally:
            text.left = 0  # (nobody wants more of it)

    def streams(self, prompts: list[list[int]], max_tokens: int, seed: int = 0, first=0, **how) -> list:
        """Begin a text after each of at most `texts` prompts, numbered from `first` on. Returns an iterator
        for each, which yields what part I's `write` yields, sooner."""
        if len(prompts) > self.texts:
            raise ValueError(f"this Writer has room for {self.texts} texts, not for {len(prompts)}")
        check_config(SampleConfig(max_tokens=max_tokens, **how))
        vocab_size = self.model.config.vocab_size
        for ids in map(np.asarray, prompts):
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(f"a prompt is one or more token ids, whole numbers below {vocab_size}")
        self.model.parameters()  # (carries out assignments that wait)
        if made_of(self) != self.made_of:
            self.__init__(self.model, self.texts)  # the model has changed, so nothing is as it was
        if self.remembers and not self.is_known and not self.agrees():  # (asked each time: weights change)
            self.forget()
        if not self.remembers:
            return [write(self.model, ids, max_tokens, seed, first + row, **how)
                    for row, ids in enumerate(prompts)]
        texts = []
        for row, ids in enumerate(prompts):
            rng = np.random.default_rng((WRITING, seed, first + row))
            texts.append(Text(list(ids)[-self.model.config.block_size:], rng, max_tokens, row))
        return [self.follow(text, texts, **how) for text in texts]

    def stream(self, ids: list[int], max_tokens: int, seed: int = 0, text: int = 0, **how):
        """The same for a single text."""
        yield from self.streams([ids], max_tokens, seed, text, **how)[0]

def write_all(writer: Writer, prompts: list[list[int]], max_tokens: int, seed: int = 0, **how):
    """Yield an iterator over the tokens of each text, which are written in groups of as many as the writer
    has room for."""
    for first in range(0, len(prompts), writer.texts):
        yield from writer.streams(prompts[first:first + writer.texts], max_tokens, seed, first, **how)

def generate(model: GPT, x: Tensor, max_tokens: int = 100, seed: int = 0, **how) -> Tensor:
    """Ids (B, T) int32 -> (B, T + max_tokens) int32: the prompts, and what the model writes after each."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"prompts are ids (B, T), at least one of each, not {x.shape}")
    prompts = x.tolist()
    writer = Writer(model, min(len(prompts), SIDE_BY_SIDE))
    texts = write_all(writer, prompts, max_tokens, seed, **how)
    rows = [prompt + list(text) for prompt, text in zip(prompts, texts, strict=True)]
    return Tensor(np.array(rows, np.int32))

GPT.generate = generate

# tinygrad's own copy of a tensor has the same memory. Whoever keeps a copy of the best model would see it
# change with every step; so a model's copies get memory of their own.
def deep_copy(model: GPT, memo: dict) -> GPT:
    """What `copy.deepcopy` makes of a model; `memo` has, by their ids, things that are to be shared."""
    model.parameters()
    memo |= {id(thing): thing for thing in (model.ops, model.tokenizer)} | memo
    for tensor in get_state_dict(vars(model) | {"tokenizer": None}).values():
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.clone().is_param_(tensor.is_param).realize()
    twin = object.__new__(type(model))
    vars(twin).update(copy.deepcopy(vars(model), memo))
    return twin

GPT.__deepcopy__ = deep_copy

# === Chapter 22. Weights in fewer bits
#
# A token of GPT-2 takes 124 million multiplications, which two cores do in a millisecond; but half a gigabyte
# of weights has to come from memory, which takes fifteen. To write faster, let fewer bytes come.
#
# A float32 has a sign, 8 bits that say where its binary point is, and 23 bits of digits. *bfloat16* is its
# upper half: the same sign, the same 8 bits, and the first 7 binary digits. So every order of magnitude that
# a float32 can have is still there, but only two or three decimal digits are right. To read one, append 16
# zeros. To write one, add 0x7fff, just under half of the last digit that stays (and 1 more if that digit is a
# 1, so that a tie goes to the even one), and cut off 16 digits: the tie 0x40488000 becomes 0x4048, and the
# tie 0x40498000 becomes 0x404a.
#
# >>> pi = np.array([[3.14159265]], np.float32)
# >>> hex(pi.view(np.uint32)[0, 0]), hex(round_to_bfloat16(pi)[0, 0])
# ('0x40490fdb', '0x4049')
# >>> float(np.array([0x40490000], np.uint32).view(np.float32)[0])
# 3.140625
#
# *Eight bits* have room for 256 numbers. We take whole numbers from -127 to 127, and for each row of a matrix
# a *scale*, its largest size divided by 127. In the row below the scale is 0.254 / 127 = 0.002, so 0.1
# becomes 50, and -0.0311, which is 15.55 scales, becomes -16, read back as -0.032. No number is wrong by more
# than half a scale. One that is far larger than the others makes all that share its scale coarse: so there is
# a scale for each row, and not one for the matrix.
#
# >>> numbers, scale = in_eight_bits(np.array([[0.1, -0.0311, 0.254, 0.0]], np.float32))
# >>> numbers.tolist(), round(float(scale[0]), 6)
# ([[50, -16, 127, 0]], 0.002)
# >>> [round(float(number), 4) for number in numbers[0] * scale[0]]
# [0.1, -0.032, 0.254, 0.0]
#
# Only what comes from memory is small: in registers, numbers and sums are float32. To kernels, an `Array`
# with scales (chapter 14) looks like any other. But to multiply each number by its scale would cost `matvec`
# and `dot_rows` (15.3) a seventh of their speed. They multiply once a row instead: `matvec` scales x, as
# x @ (s w) = (x s) @ w, and `dot_rows` scales each finished sum. What is lost? `--eval-only --weights int8`
# tells: on a model trained here, less than 0.01 bits a byte.
def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 numbers as bfloat16: the upper 16 bits, uint16."""
    bits = array.view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)

def in_eight_bits(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (n, m) float32 -> int8 (n, m), and scales (n,) float32 by which its rows are to be
    multiplied."""
    scale = np.abs(array).max(1) / np.float32(127)
    divisors = np.where(scale > 0, scale, 1)
    return np.rint(array / divisors[:, None]).astype(np.int8), scale

def with_scales(k, *arrays, inner, place: int, **options):
    """The kernel `inner`, whose argument number `place` is a packed matrix; its scales come last."""
    *arrays, scale = arrays
    arrays[place].scale = scale
    inner(k, *arrays, **options)

# A backend for this is `Fast`, with a `run` that, where it meets a packed matrix, hands over its scales as
# well. A matrix is packed as it is loaded (`restore` in chapter 26 asks for it), so that it never stands in
# memory as float32. The layers are part I's, and the tensor that one of them calls its `weight` then has
# whole numbers, which mean something only together with the scales that the backend has for it. So this is
# for part I's layers as they are, to write and to examine; whoever wants more is refused.
class Packed(Fast):
    """`Fast` with matrices of fewer bits: `kind` is "bf16" or "int8"."""
    def __init__(self, cores: int, kind: str):
        super().__init__(cores)
        self.kind = kind
        self.scales = {}  # of each packed matrix, by the id of its tensor

    def load(self, tensor: Tensor, array: np.ndarray) -> None:
        """Let `tensor` be a matrix (n, m), float32, in fewer bits."""
        numbers = Tensor.empty(*array.shape, dtype=dtypes.int8 if self.kind == "int8" else dtypes.uint16)
        scale = Tensor.empty(len(array))
        some = max(1, (1 << 20) // array.shape[1])  # rows at a time: in float32 they need memory, too
        for i in range(0, len(array), some):
            rows = np.ascontiguousarray(array[i:i + some], np.float32)
            packed, scales = in_eight_bits(rows) if self.kind == "int8" else (round_to_bfloat16(rows), 1.0)
            memory_of(numbers)[i:i + some] = packed
            memory_of(scale)[i:i + some] = scales
        tensor.replace(numbers)
        self.scales[id(tensor)] = scale

    def run(self, kernel, results, inputs, back=None, **options):
        inputs = [tensor for tensor in inputs if tensor is not None]
        packed = [i for i, tensor in enumerate(inputs) if id(tensor) in self.scales]
        if not packed:
            return super().run(kernel, results, inputs, back, **options)
        [i] = packed
        inputs = [*inputs, self.scales[id(inputs[i])]]
        options |= {"inner": kernel, "place": len(results) + i}
        return super().run(with_scales, results, inputs, self.cannot_learn, **options)

    def cannot_learn(self, *_):
        """In place of the way back."""
        raise UserError(f"a model with weights in {self.kind} cannot learn: train it in float32")

# ============================================================================================================
# Part III. Dependable, and at home
# ============================================================================================================
#
# Parts I and II learn and write, as long as nothing happens. But something always does. A laptop's lid closes
# in the middle of a save, a disk is full, a download stops half-way, a terminal is closed, and somebody types
# `--n-layer 0`. This part is about all that: it keeps what was learned, says in one line what went wrong,
# speaks with other programs, and lets you check that what the first two parts claim is true. Its chapters can
# be read in any order (names that are neither here nor in part I, such as `Packed` and `digest`, are of II):
#
#     23  files that are whole, lines that are plain       28  models from Hugging Face, and to it
#     24  a text: downloads, any encoding, any length      29  curves, in the terminal and in a picture
#     25  which numbers make sense                         30  looking inside a model, in a browser
#     26  checkpoints                                      31  are the gradients right, and is it fast?
#     27  a run: exams, the log, stopping and going on     32  the command line

import argparse
import codecs
import errno
import fcntl
import gc
import inspect
import json
import resource
import timeit
import traceback
import warnings
from collections import namedtuple
from datetime import timedelta

VERSION = "2.0"

# === Chapter 23. Safe files, safe output
#
# When a program is killed while it writes a file, half of a file is left, under a name that promises all of
# it. So whatever we keep is written under another name, pushed out of the system's buffers onto the disk
# (`fsync`), and only then renamed. A rename happens or does not happen; there is no moment in between. And
# since the name is an entry in the folder, and a folder is a kind of file, the folder must reach the disk as
# well.
#
# `whole` is for a `with` block: `@contextmanager` runs it up to its `yield`, then the block, then the rest of
# it. If the block fails, its error is raised at the `yield`, so that only `except` and `finally` are done.
@contextmanager
def whole(path: Path):
    """A binary file to write to, in a `with` block. If the block ends well, the file takes the place of
    `path`; if not, everything is as before. OSError if the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with undisturbed():  # (a Ctrl-C on the way would leave `unfinished` behind)
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)  # after a rename, nothing has this name any more
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # (there are file systems that cannot do this with a folder)
            raise
    finally:
        os.close(folder)

# What we print is of two kinds: lines that stay, and lines that show progress and are overwritten by the next
# one. The latter make sense only where somebody watches, so a file or a pipe does not get them.
def tell(line: str = "", end: str = "\n") -> None:
    """Print a line that stays; OSError if that cannot be done."""
    clear = "\r\033[K" if sys.stdout.isatty() else ""  # wipe what `show` has left there
    print(clear + printable(line), end=end, flush=True)

def say(line: str = "", end: str = "\n") -> None:
    """The same where work goes on, though the terminal may be gone, or the disk behind it be full."""
    with suppress(OSError):
        tell(line, end)

def show(line: str) -> None:
    """Show a line that the next one overwrites, if there is a terminal; "" wipes the last one."""
    if sys.stdout.isatty():
        say(line[:shutil.get_terminal_size().columns - 1], end="")

def warn(line: str) -> None:
    """A line on stderr, about something that is not as it should be."""
    with suppress(OSError):
        print(f"minimiggy: {printable(line)}", file=sys.stderr)

# Much of what we print comes from elsewhere: a model can write any byte, and a file can have any name. But a
# terminal takes ESC (27) and what follows as an order: "ESC [ 2 J" empties the screen. In the pattern below,
# 0 to 8, 11 to 31 and 127 to 159 are all control characters but the tab (9) and the end of a line (10). The
# last range is no character at all: Python uses it for bytes in a file's name that it cannot decode, and then
# cannot print. U+FFFD is the sign for "not readable".
def printable(text: str) -> str:
    """`text` with U+FFFD in place of each control character, except for tabs and ends of lines."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)

# An error is told in one line, however long a name in it may be: a path has up to 4096 letters, and a tensor
# of a hostile file millions. The beginning and the end say most, so what goes is the middle.
def brief(text, most: int = 300) -> str:
    """`text` as one printable line of at most `most` characters; if it is longer, its middle is left out."""
    line = printable(str(text)).replace("\n", " ")
    if len(line) <= most:
        return line
    half = (most - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"

def in_words(error: Exception) -> str:
    """What an error says, without Python's way of writing it down."""
    if isinstance(error, OSError) and error.strerror:
        # (Python does not say which file could not be written, so `whole` adds its name.)
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

# === Chapter 24. A text from elsewhere
#
# The text to learn from is by default "tiny Shakespeare", 1.1 MB of plays, which are fetched once. Downloads
# go wrong in many ways: there is no network, the connection breaks, or a hotel's login page comes in place of
# the file. A SHA-256 shows the last two. It is a number of 256 bits that is computed from all bytes of a
# file; whoever changes one of them gets another number, and nobody knows how to make a second file with the
# same. So what came gets its name only if its number is the one that we expect. Where there is no network at
# all, a play that was written for this project stands in: the first run always works.
#
# A download that broke off can go on where it stopped, and for that HTTP has a header. With `Range:
# bytes=1000-` we ask for all but the first 1000 bytes. A server that understands answers 206 and sends them;
# one that does not answers 200 and sends everything; and 416 means that there are no more.
DATA = Path(__file__).resolve().parent / "data"
SHAKESPEARE = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}
TIMEOUT = (5, 30)  # seconds until a server must have answered, and between two pieces of its file

def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch `url` into `path`, unless there is a file of that name. Without a `sha256`, what comes must have
    the one that the server announces. UserError if that fails; what has come stays in a file `path`.part for
    the next try."""
    if path.exists():
        return
    import requests  # here and not above: most runs need no network, and the import takes 0.2 s
    unfinished = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is None:
            # A server such as Hugging Face's hub tells it, in quotes, in the header of its answer. (It does
            # so where it points to the place where the file is stored, so we do not follow it there.)
            answer = requests.head(url, allow_redirects=False, timeout=TIMEOUT)
            if not answer.ok:
                raise OSError(f"the server answers {answer.status_code}")
            sha256 = answer.headers.get("x-linked-etag", answer.headers.get("etag", "")).strip('"')
        if len(sha256) != 64:
            raise OSError("the server announces no SHA-256")
        fetch_rest(url, unfinished)
        with open(unfinished, "rb") as file:
            came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != sha256:
            unfinished.unlink()
            raise OSError("what came is another file: wrong SHA-256")
        unfinished.replace(path)
    except OSError as error:
        of_the_network = isinstance(error, requests.RequestException)  # (which is a kind of OSError)
        why = "the server cannot be reached, or has stopped" if of_the_network else in_words(error)
        line = f"could not download {path.name} ({why}): try again, or save {url} as {path}"
        raise UserError(line) from error
    finally:
        show("")

def fetch_rest(url: str, unfinished: Path) -> None:
    """Add to the file `unfinished` what it lacks of the file at `url`, and show how far it is."""
    import requests
    # "ab" begins at the end of what is there, so `tell` gives its size. If all is sent again, that is thrown
    # away.
    with open(unfinished, "ab", buffering=0) as file:
        headers = {"Accept-Encoding": "identity"}  # as it is, not compressed: we count its bytes
        if file.tell():
            headers["Range"] = f"bytes={file.tell()}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:
                return
            if not response.ok:
                raise OSError(f"the server answers {response.status_code}")
            if response.status_code != 206:
                file.seek(0)
                file.truncate()
            left = response.headers.get("content-length", "")
            total = f" of {(file.tell() + int(left)) / 1e6:.1f}" if left.isdecimal() else ""
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                show(f"downloading {unfinished.stem}: {file.tell() / 1e6:.1f}{total} MB")
            os.fsync(file.fileno())

# A text of your own may be anything: written on Windows (its lines end with "\r\n", and a "byte-order mark",
# three bytes that mean nothing, may stand in front), hundreds of megabytes long, or no text at all. It is
# read a megabyte at a time, so that a text of 200 MB takes 200 MB of memory and no more. Python decodes it on
# the way and tells us if a byte cannot be UTF-8, but counts from the beginning of the piece that it is
# decoding just then. The piece ends where Python has read to, so its beginning is that place less its length.
def check_file(path: str | Path) -> int:
    """The size of a file in bytes; UserError, which says what it is instead, if it is not an ordinary one: a
    pipe, say, may never end."""
    if not os.path.exists(path):  # (as is also said of a name that no file can have)
        raise UserError(f"no such file: {brief(path, 100)}")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no ordinary file"
        raise UserError(f"cannot read {brief(path, 100)}: it is {kind}")
    return os.path.getsize(path)

def read_text(path: Path, replace: bool | None = None) -> bytearray:
    """A text file as UTF-8, with "\\n" at the ends of lines and no byte-order mark. UserError if it has
    bytes that are not UTF-8 (it says where); with `replace`, which a flag of that name sets, these become
    U+FFFD."""
    text = bytearray()
    errors = "replace" if replace else "strict"
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        try:
            while piece := file.read(1 << 20):
                text += piece.encode()
                show(f"reading {path.name}: {len(text) / 1e6:.0f} MB")
        except UnicodeDecodeError as error:
            offset = file.buffer.tell() - len(error.object) + error.start
            where = f"byte {error.object[error.start]:#04x} at offset {offset}"
            way_out = "" if replace is None else " (--replace-bad-bytes reads on)"
            raise UserError(f"{path} is not UTF-8: {where}{way_out}") from error
    return text

# tiktoken is quick, but fails on a million blanks, and its lists take ten times an array's memory. So a long
# text is encoded in pieces. A piece may end only where the pattern of chapter 3 is sure to cut, whatever
# follows: after a word's last letter, or before white space. The rest waits for the next piece. Of "The dog
# bark", for example, "The dog" is encoded, and " bark" waits: it might go on with "ing". (A piece of
# nothing but white space is encoded as it is: there may be no other place for megabytes.)
SURE_CUT = r"(?<=\p{L})(?=\P{L})|(?<=\S)(?=\s)|(?<=\A\s+)\Z"

def encode_array(tokenizer: BPETokenizer, text: bytes, size: int = 1 << 17) -> np.ndarray:
    """The token ids (N,) of a long text, UTF-8 bytes, in pieces of about `size` bytes: uint8 or uint16 if
    they fit, else int32."""
    import regex
    largest = tokenizer.vocab_size - 1
    kind = next(kind for kind in (np.uint8, np.uint16, np.int32) if largest <= np.iinfo(kind).max)
    if not TOKENIZER_IS_OURS:  # (but yours, which may begin a text with a token of its own, say)
        return np.array(tokenizer.encode(str(text, "utf-8")), kind)
    arrays = []
    decoder = codecs.getincrementaldecoder("utf-8")()  # (keeps the bytes of a character that is cut in two)
    waiting = ""
    for place in range(0, len(text), size):
        seen = len(waiting)  # (there was no such place in it)
        waiting += decoder.decode(text[place:place + size])
        cut = regex.search(f"(?r){SURE_CUT}", waiting, pos=seen)  # (?r): from the right, so the last one
        if cut:
            arrays.append(np.array(tokenizer.encode(waiting[:cut.end()]), kind))
            waiting = waiting[cut.end():]
    arrays.append(np.array(tokenizer.encode(waiting), kind))
    return np.concatenate(arrays)

BPETokenizer.encode_array = encode_array

def tokens_of(tokenizer: BPETokenizer) -> list[bytes]:
    """The bytes of every token."""
    return [tokenizer.decode_bytes(token) for token in range(tokenizer.vocab_size)]

def line_end(tokenizer: BPETokenizer) -> list[int]:
    """What to begin a text with if there is no prompt: the end of a line; or token 0, if that is nothing that
    a tokenizer (yours) knows."""
    with suppress(Exception):
        return list(tokenizer.encode("\n")) or [0]
    return [0]

def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's tokenizer. tiktoken downloads its vocabulary once; UserError if it cannot be had."""
    try:
        return BPETokenizer("gpt2")
    except Exception as error:  # the network, the disk or the file itself: all can fail, in many ways
        remedy = "use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        raise UserError(f"GPT-2's vocabulary could not be downloaded (no network?): {remedy}") from error

# And which text? `--data` names one of ours, or a file. A checkpoint keeps the name, so that a resumed run
# finds its text; and since a checkpoint may come from anywhere, `check_file` looks at what that is.
def load_text(data: str | None, replace: bool = False) -> tuple[bytearray, str]:
    """The text that `--data` asks for, and what to ask for to get it again; None asks for the default.
    UserError if there is no such text."""
    ours = {"shakespeare": DATA / "tinyshakespeare.txt", "play": DATA / "play.txt"}
    name = data or "shakespeare"
    if name == "shakespeare":
        try:
            download(path=ours[name], **SHAKESPEARE)
        except UserError as error:
            if data or not ours["play"].is_file():
                raise UserError(f"{error}, or use --data {'play' if data else 'FILE'}") from error
            say(f"{error}\ntraining on data/play.txt, a play that came with this file, instead")
            name = "play"
    path = Path(ours.get(name, name))
    try:
        check_file(path)
    except UserError as error:
        raise UserError(f"{error} (--data takes a text file, shakespeare, or play)") from None
    return read_text(path, replace), name if name in ours else str(path.resolve())

# === Chapter 25. What a knob may be
#
# Part I says what each number of a config means, and believes whatever it is given. The numbers for writing
# have a config here, too.
@dataclasses.dataclass
class SampleConfig:
    """How text is written."""
    max_tokens: int = 300          # tokens to write
    temperature: float = 0.8       # 0: always the likeliest token; 1: as the model thinks; more: bolder
    top_k: int = 0                 # draw among the k likeliest tokens only; 0: among all
    top_p: float = 1.0             # draw among the fewest tokens that have this share of all probability
    num_samples: int = 1           # texts to write

# But numbers also come from a keyboard, or from a file that somebody sent. KNOBS has the smallest and the
# largest value of each, for flags and for a checkpoint's configs alike. The ends are generous: they are there
# to catch a slip of the finger and a hostile file, not to tell what is wise. (A field that you add to a
# config needs no entry. It becomes a flag that takes any value, and the comment behind it becomes the flag's
# line of help, as with those of chapter 5.)
KNOBS = {
    "block_size": (1, 65536), "vocab_size": (2, 400_000), "n_layer": (1, 1000), "n_head": (1, 1000),
    "n_embd": (1, 65536), "dropout": (0.0, 0.99),
    "batch_size": (1, 65536), "learning_rate": (0.0, 10.0), "warmup_steps": (0, 10**9),
    "max_iters": (1, 10**9), "eval_interval": (1, 10**9), "eval_iters": (1, 10**6), "min_lr": (0.0, 10.0),
    "weight_decay": (0.0, 10.0), "beta1": (0.0, 0.9999), "beta2": (0.0, 0.9999), "grad_clip": (1e-9, 1e9),
    "grad_accum": (1, 1000), "seed": (0, 2**31 - 1), "save_every": (0, 10**9), "keep": (0, 10**9),
    "max_tokens": (0, 10**9), "temperature": (0.0, 100.0), "top_k": (0, 10**6), "top_p": (1e-9, 1.0),
    "num_samples": (1, 10**6), "devices": (1, 1024)}

# A message about a value names its flag and not its field, since the flag is what most people have typed.
def flag_of(name: str) -> str:
    """n_layer -> --n-layer."""
    return "--" + name.replace("_", "-")

def check_value(name: str, value, kind: type) -> None:
    """UserError if the field `name`, whose values are of a `kind`, cannot be `value`. (A whole number will do
    for a fraction; True is no number, though Python takes it for a 1; a NaN is in no range.)"""
    if name not in KNOBS:
        return
    low, high = KNOBS[name]
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{flag_of(name)} must be {what} between {low} and {high}, not {brief(value, 50)}")

def check_config(config) -> None:
    """UserError for the first field of a config whose value it cannot have."""
    for field in dataclasses.fields(config):
        check_value(field.name, getattr(config, field.name), type(field.default))
    if isinstance(config, GPTConfig) and config.n_embd % config.n_head:
        raise UserError(f"--n-head {config.n_head} does not divide --n-embd {config.n_embd}")

# === Chapter 26. Checkpoints
#
# A checkpoint is one file with all that a run knows. Whoever has it can let the model write; whoever has the
# text, too, can go on training. Its format is safetensors, which other tools read as well:
#
#     8 bytes        how long the header is
#     the header     {"wte.weight": {"dtype": "F32", "shape": [1024, 128], "data_offsets": [0, 524288]}, ...}
#     the numbers    of one tensor after the other, as they stand in memory
#
# Tensors have the names of part I's attributes, such as h.0.ln_1.weight, and Adam's averages of them have
# "optimizer.m." and "optimizer.v." before these. Under the name "__metadata__", the header has texts: the
# step, the configs, the tokenizer, the name and SHA-256 of the text that was learned from (the text itself
# stays where it is), and a SHA-256 of everything else in the file. (It cannot cover itself, so it is computed
# without its own entry.) Unlike Python's own format, pickle, such a file cannot contain a program that runs
# when it is opened. For the model that `--train` makes, it has 11 MB.
def sha256_of(header: dict, metadata: dict[str, str], numbers) -> str:
    """The SHA-256 of a file's header, of its metadata other than "sha256", and of its `numbers`, pieces of
    bytes."""
    # (With sorted keys the text is the same, whatever the order in which a dict was filled.)
    kept = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([header, kept], sort_keys=True).encode())
    for piece in numbers:
        digest.update(piece)
    return digest.hexdigest()

def numbers_of(tensor) -> memoryview:
    """The numbers of a tensor or an array, float32 or int32, as bytes; ValueError if these cannot hold
    them."""
    array = array_of(tensor) if isinstance(tensor, Tensor) else tensor
    kind = np.float32 if array.dtype.kind == "f" else np.int32
    numbers = np.ascontiguousarray(array, kind).reshape(-1)
    if not np.isfinite(numbers).all():
        raise ValueError("there are numbers that are not finite")
    if kind == np.int32 and (numbers != array.reshape(-1)).any():
        raise ValueError("there are whole numbers of more than 32 bits")
    return numbers.data

def write_safetensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write tensors or arrays, by name, as float32 (whole numbers as int32), together with some texts.
    OSError if that fails, ValueError for numbers that no file may have; what `path` was before is then
    intact. However large they are together, they are copied one at a time."""
    # The header comes first and contains the SHA-256, so all numbers are fetched twice: once for the SHA-256,
    # once to be written.
    header = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + 4 * math.prod(tensor.shape)
        is_float = dtypes.is_float(tensor.dtype) if isinstance(tensor, Tensor) else tensor.dtype.kind == "f"
        kind = "F32" if is_float else "I32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    sha256 = sha256_of(header, metadata, map(numbers_of, tensors.values()))
    text = json.dumps({"__metadata__": metadata | {"sha256": sha256}} | header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8 bytes
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(numbers_of(tensor))

# Reading is where one has to be careful. The file may have been cut, mixed up on its way, or made by somebody
# who means harm and knows how to compute a SHA-256. So nothing in the header is believed before it is
# checked: every tensor must begin where the one before it ended, must be as long as its shape says, and the
# last one must end where the file does. Then no number can be read from a wrong place, and no memory is taken
# for what is not there.
#
# `np.memmap`, which makes an array of a file without reading it, would be quicker. But if somebody cuts the
# file meanwhile, the next look at it ends the program on the spot, without a word. So everything is read, one
# tensor after the other, and the numbers that are used are those that the SHA-256 was computed from.
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2",
          "I8": "i1", "U8": "u1", "BOOL": "?"}  # their names in a file, and numpy's
LONGEST_HEADER = 8 << 20  # bytes; the largest GPT-2's header has 0.1 MB

class Damaged(UserError):
    """What is wrong with a file that was not made as it should be."""

def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, by name, and its texts. (bfloat16, which numpy lacks, comes as uint16.) UserError
    unless the header describes the file to its last byte and the SHA-256, if it has one, is right."""
    try:
        check_file(path)
        with open(path, "rb") as file:
            header, metadata = read_header(file)
            arrays = read_arrays(file, header)
        numbers = (array.reshape(-1) for array in arrays.values())
        if "sha256" in metadata and metadata["sha256"] != sha256_of(header, metadata, numbers):
            raise Damaged("its bytes are not those that were written (wrong SHA-256)")
        return arrays, metadata
    # What follows is in turn: a file that cannot be read; one with something wrong that was looked for; and
    # all the errors that Python has when a text is no JSON, or when the JSON is not made as it should be.
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Damaged as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header is not one of a safetensors file") from error

def read_header(file) -> tuple[dict, dict[str, str]]:
    """The header of an open file, and its texts. Damaged, or json's errors, if it has none."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(os.fstat(file.fileno()).st_size - 8, LONGEST_HEADER):
        raise Damaged("it is cut off, or not a safetensors file")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not all(type(text) is str for text in metadata.values()):
        raise Damaged("it has metadata that is not text")
    return header, metadata

def read_arrays(file, header: dict) -> dict[str, np.ndarray]:
    """The arrays that a header describes, from the bytes that come after it."""
    size = os.fstat(file.fileno()).st_size - file.tell()
    arrays = {}
    place = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = entry["shape"]
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise Damaged(f"{brief(name, 60)} has numbers of a kind that is not read here")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= size for n in shape):
            raise Damaged(f"{brief(name, 60)} has an impossible shape")
        kind = np.dtype(DTYPES[entry["dtype"]])
        if start != place or end > size or end - start != kind.itemsize * math.prod(shape):
            raise Damaged(f"{brief(name, 60)} is not where it belongs, or the file is cut off")
        arrays[name] = np.fromfile(file, kind, math.prod(shape)).reshape(shape)
        place = end
    if place != size:
        raise Damaged("it has bytes that no header speaks of")
    return arrays

# The numbers then have to fit the model. All are looked at before the first one is used: a model that is half
# the old one and half the new one would be worse than either. A NaN would spread to every logit at the first
# step; and so would an average of squares that is below zero, since Adam takes its root.
def load_array(tensor: Tensor, array: np.ndarray) -> None:
    """Write the numbers of `array`, of the same shape, into the memory of `tensor`, where recordings look for
    them: straight into it if we know its address, or else by an assignment."""
    if KNOWN and tensor.device == "CPU" and tensor.dtype.fmt:  # (numpy has no bfloat16)
        memory_of(tensor)[...] = array
    else:
        tensor.assign(Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, device=tensor.device)).realize()

def as_float32(array: np.ndarray) -> np.ndarray:
    """Numbers of any precision as float32. Those of bfloat16 are the upper halves of a float32's 32 bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and `restore` looks for that
        return array.astype(np.float32, copy=False)

# What a model has is asked of the model, and what an optimizer has of the optimizer, so whatever tensors you
# add to either are saved as well.
FORMAT = "minimiggy 3"
Checkpoint = namedtuple("Checkpoint", "model config step path arrays")

# Not all that an optimizer has must be kept. The model and the config are saved by themselves. `sums` begin
# anew at each step, since a checkpoint is always made between two steps. The rest are other names for the
# model's parameters, and two recordings, which are made anew.
def lasting(optimizer: AdamW) -> dict:
    """What an optimizer keeps from one step to the next, by attribute: m, v, and what yours may have. All of
    it is in memory then."""
    others = ("model", "config", "parameters", "tensors", "sums", "batch", "last_batch")
    kept = {name: thing for name, thing in vars(optimizer).items() if name not in others}
    give_memory(kept)
    return kept

def state_of(model: GPT, optimizer: AdamW | None) -> dict[str, Tensor]:
    """All tensors of a model, and of its optimizer if there is one, under the names that a checkpoint gives
    them."""
    if isinstance(model.ops, Packed) and model.ops.scales:
        raise UserError(f"a model with weights in {model.ops.kind} cannot be saved, or filled again")
    model.parameters()  # which gives memory to those that have none
    # A tensor of two names, such as a table that two layers share, is saved once. And it need not be learned:
    # a table of random numbers has to come back as well.
    tensors = {}
    for name, tensor in get_state_dict(model).items():
        if all(tensor is not other for other in tensors.values()):
            tensors[name] = tensor
    if optimizer:
        tensors |= get_state_dict(lasting(optimizer), "optimizer.")
    return tensors

# Of a tokenizer, a checkpoint keeps what its class needs to make one: for part I's {"name": "bpe", "merges":
# [[97, 110], ...]}, for yours perhaps a list of characters. It is read from attributes of the same names. If
# your class takes `chars` and calls them `self.letters`, that fails; so one is made from what would be kept,
# and compared, before a run begins.
def tokenizer_to_json(tokenizer: BPETokenizer) -> str:
    """All that is needed to make the tokenizer again, as a text."""
    takes = inspect.signature(BPETokenizer).parameters
    return json.dumps({name: getattr(tokenizer, name) for name in takes})

def tokenizer_from_json(text: str) -> BPETokenizer:
    """The opposite; Damaged if the text is not of that kind, UserError if GPT-2's vocabulary is not there."""
    try:
        saved = json.loads(text)
        if saved.get("name") == "gpt2":
            return gpt2_tokenizer()
        if not TOKENIZER_IS_OURS:  # but yours: only your class knows what is right
            return BPETokenizer(**saved)
        return tokenizer_of([(int(left), int(right)) for left, right in saved["merges"]])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise Damaged("its tokenizer is not one of ours") from error

def check_comes_back(tokenizer: BPETokenizer) -> None:
    """UserError if a checkpoint would give back another tokenizer than this one, or none."""
    with suppress(Damaged, AttributeError, TypeError):
        text = tokenizer_to_json(tokenizer)
        if tokens_of(tokenizer_from_json(text)) == tokens_of(tokenizer):
            if len(json.dumps(text)) > LONGEST_HEADER // 2:
                raise UserError(f"the tokenizer's {len(text):,} letters are too many for a checkpoint")
            return
    takes = " and ".join(inspect.signature(BPETokenizer).parameters)
    raise UserError(f"a checkpoint could not bring the tokenizer back: its class takes {takes}. So it needs "
                    "attributes of these names, and what is made of them has other tokens, or can't be made")

# A list of merges can be a trap. Let each token be two of the one before it: forty of them, less than a line
# in a file, make a token of 10^12 bytes. Numbers below zero lead there as well, since Python counts them from
# the end of a list.
def tokenizer_of(merges: list[tuple[int, int]]) -> BPETokenizer:
    """The tokenizer of these merges, which come from elsewhere; ValueError or IndexError if they cannot
    be."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
        if min(left, right) < 0 or len(tokens[-1]) > LONGEST:
            raise ValueError("an impossible merge")
    if len(set(tokens)) < len(tokens):
        raise ValueError("two tokens are the same")
    return BPETokenizer("bpe", merges)

# The same numbers in another network are nonsense, and it need not show: with GELU instead of ReLU^2, say,
# all shapes are the same. So a file also has a checksum of part I's operations and layers.
PART_ONE = digest(*(f"Plain.{name}" for name in OPERATIONS), *(layer.__name__ for layer in LAYERS))
# (b4ad... is the checksum of part I's tokenizer as you got it: for another, checks that know how ours is made
# are left out.)
TOKENIZER = digest("BPETokenizer", "SPLIT")
TOKENIZER_IS_OURS = TOKENIZER == "b4ad19b64faa"
PART_ONE_IS_OURS = digest(*SOURCES) == "cb1cc0e4e266"  # all of it

def made_anew(model: GPT) -> GPT:
    """A model of the same config, without the numbers in its tensors."""
    return type(model)(model.config, model.ops, tokenizer=model.tokenizer, seed=None)

# Of a model, a checkpoint keeps the tensors and the config. If a number among its attributes has become
# another one since it was made, such as a temperature that falls as you train, then that is lost.
def numbers_in(model: GPT) -> dict[str, float]:
    """The numbers among the attributes of a model and of its parts, by name."""
    parts = vars(model) | {"tokenizer": None, "source": None}
    found = get_state_dict(parts, tensor_type=(int, float, Tensor))
    return {name: number for name, number in found.items() if not isinstance(number, Tensor)}

def say_what_is_lost(model: GPT) -> None:
    """Name such numbers on stderr."""
    with suppress(Exception):  # (whatever prevents this will be told when the checkpoint is opened)
        first = numbers_in(made_anew(model))
        lost = {name: now for name, now in numbers_in(model).items() if now != first.get(name)}
        for name, now in list(lost.items())[:3]:
            warn(f"a checkpoint keeps tensors and the config, but not that {name} is now {now} (at first "
                 f"{first.get(name)}): make it a Tensor, with .is_param_(False)")

def save_checkpoint(model: GPT, iter_num: int, optimizer: AdamW | None, out_dir: str | Path) -> Path:
    """Write out_dir/ckpt_<iter_num>.safetensors, whole or not at all, and return its path. OSError if the
    disk does not take it; ValueError for numbers that no checkpoint may have, such as NaN."""
    if type(iter_num) is not int or not 0 <= iter_num < 10**9:
        raise ValueError(f"iter_num is the number of steps, and not {iter_num!r}")
    path = Path(out_dir) / f"ckpt_{iter_num}.safetensors"
    # A model that was made in a program of one's own may have no tokenizer, and no text that it comes from.
    metadata = {"format": FORMAT, "iter_num": str(iter_num), "made_by": PART_ONE}
    metadata["gpt_config"] = json.dumps(dataclasses.asdict(model.config))
    if model.tokenizer:
        metadata["tokenizer"] = tokenizer_to_json(model.tokenizer)
        metadata["tokenizer_made_by"] = TOKENIZER
    metadata |= model.source or {}
    if optimizer:
        metadata["train_config"] = json.dumps(dataclasses.asdict(optimizer.config))
    write_safetensors(path, state_of(model, optimizer), metadata)
    say_what_is_lost(model)
    return path

def read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the texts of a checkpoint, whose every byte has been checked; UserError if it is
    none."""
    arrays, metadata = read_safetensors(path)
    number = re.fullmatch("[0-9]{1,9}", metadata.get("iter_num", ""))
    if metadata.get("format") != FORMAT or "sha256" not in metadata or not number:
        raise UserError(f"{path} is not a checkpoint of this version of MiniMiggy")
    for key, now, what in (("made_by", PART_ONE, "layers or operations"),
                           ("tokenizer_made_by", TOKENIZER, "rules for tokens")):
        if metadata.get(key, now) != now:
            warn(f"{path} was saved while part I had other {what}: its model may compute something else now")
    return arrays, metadata

def source_in(metadata: dict[str, str]) -> dict[str, str]:
    """Where a model comes from: its run, and the name and the SHA-256 of its text."""
    return {key: metadata[key] for key in ("data", "data_sha256", "run") if key in metadata}

def load_checkpoint(model: GPT, path: str | Path, optimizer: AdamW | None = None) -> int:
    """Give a model, and an optimizer if there is one, the numbers of a file; return the number of the step.
    UserError, and nothing has changed, if the file is damaged or does not fit."""
    arrays, metadata = read_checkpoint(Path(path))
    config = config_from(GPTConfig, metadata.get("gpt_config", ""), path)
    for name, saved in vars(config).items():
        # (Shapes do not show everything: four heads and eight have the same matrices, and compute different
        # things. But dropout is no part of what a model is.)
        if name != "dropout" and saved != getattr(model.config, name):
            raise UserError(f"{path} does not fit this model: its {name} is {saved}")
    restore(model, arrays, path, optimizer)
    model.source = source_in(metadata)
    return int(metadata["iter_num"])

def restore(model: GPT, arrays: dict[str, np.ndarray], path: str | Path, optimizer=None) -> None:
    """Give a model, and an optimizer if there is one, the numbers of the arrays of the same names. UserError,
    and nothing has changed, unless there is one for each tensor and no other, of its shape, and with finite
    numbers. `path` is where they come from, for that line."""
    # What the file has beyond the model is as wrong as what it lacks: it has more layers, say. (But whoever
    # only wants to let the model write need not have an optimizer for Adam's averages.)
    named = state_of(model, optimizer)
    for name in arrays:
        if name not in named and (optimizer or not name.startswith("optimizer.")):
            raise UserError(f"{path} does not fit this model, which has no {brief(name, 60)}")
    for name, tensor in named.items():
        array = arrays.get(name)
        unfit = f"{path} does not fit this model: {name} is"
        if array is None:
            raise UserError(f"{unfit} missing")
        is_float = array.dtype.kind == "f" or array.dtype == np.uint16
        if array.shape != tensor.shape or is_float != dtypes.is_float(tensor.dtype):
            raise UserError(f"{unfit} {array.dtype} {array.shape}, not {tensor.dtype.name} {tensor.shape}")
        numbers = as_float32(array)
        if not np.isfinite(numbers).all():
            raise UserError(f"{path} is damaged: {name} has numbers that are not finite")
        if name.startswith("optimizer.v.") and numbers.min(initial=0) < 0:
            raise UserError(f"{path} is damaged: {name} has averages of squares below zero")
    for name, tensor in named.items():
        load = model.ops.load if isinstance(model.ops, Packed) and tensor.ndim == 2 else load_array
        load(tensor, as_float32(arrays[name]) if dtypes.is_float(tensor.dtype) else arrays[name])

# Both are methods of a model, but part I, which has the class, knows nothing of files.
GPT.save_checkpoint = save_checkpoint
GPT.load_checkpoint = load_checkpoint

# A checkpoint also says which model to make, and a hostile file could ask for a thousand layers of 65536
# channels. So before one is made, we compare how many numbers it would take with how many there are. The
# comparison is a rough one, since your model may be another than GPT-2; what really fits, `restore` finds
# out.
def size_of(config: GPTConfig) -> int:
    """About how many parameters a GPT-2 of this size has: 12 C^2 in each block (chapter 31 counts them), and
    a row of C for each token and each position."""
    C = config.n_embd
    return config.n_layer * 12 * C**2 + (config.vocab_size + config.block_size) * C

def config_from(kind: type, text: str, path: str | Path):
    """A config from its JSON in the file `path`; UserError if a field is unknown or has a value that it
    cannot have."""
    try:
        config = kind(**json.loads(text))
        check_config(config)
        return config
    except (UserError, ValueError, TypeError, RecursionError) as error:
        words = f": {error}" if isinstance(error, UserError) else ""  # (others speak of Python)
        raise UserError(f"{path} cannot be opened: its {kind.__name__} is impossible{words}") from error

def open_checkpoint(path: str | Path, backend: Plain | None = None) -> Checkpoint:
    """The model of a checkpoint, with its tokenizer and its numbers; the config that it was trained with; its
    step; and where all this comes from. UserError if the file is damaged, or no such model can be made."""
    path = Path(path)
    arrays, metadata = read_checkpoint(path)
    if isinstance(backend, Packed):
        backend = Packed(backend.cores, backend.kind)  # (it has the scales of one model)
    # A hostile file can ask for much memory. So each thing is checked before the next, larger one is made:
    # the configs, then a model of at most a hundred times the file's numbers, then a tokenizer for so many
    # tokens. (A hundred times, since your layers may be far smaller than GPT-2's.)
    try:
        config = config_from(GPTConfig, metadata.get("gpt_config", ""), path)
        train_config = config_from(TrainConfig, metadata.get("train_config", "{}"), path)
        if size_of(config) > 100 * sum(array.size for array in arrays.values()):
            raise Damaged("it has far fewer numbers than the model that it speaks of")
        model = GPT(config, backend, seed=None)
        restore(model, arrays, path)
        if text := metadata.get("tokenizer"):
            most = 100 + 20 * config.vocab_size  # (18 for a merge such as "[399998, 399999], ")
            if len(text) > most and TOKENIZER_IS_OURS:
                raise Damaged("its tokenizer is too long for its vocabulary")
            model.tokenizer = tokenizer_from_json(text)
            if model.tokenizer.vocab_size > config.vocab_size:
                raise Damaged("its tokenizer has more tokens than its model")
    except (Damaged, ValueError) as error:
        raise UserError(brief(f"{path} cannot be opened: {error}")) from error
    model.source = source_in(metadata)
    return Checkpoint(model, train_config, int(metadata["iter_num"]), path, arrays)

# In a folder there are several checkpoints. Not all of them need be kept: the last few, for whoever has to go
# back a little, and the one whose exam went best. A run goes on from the newest. But to write, the best one
# is taken. On a short text they are two different ones: a model that has read the same 100 KB thirty times
# begins to know them by heart, and from then on each exam on unknown text goes worse than the one before.
# Which one was the best is not marked in the files; the log says it, and so nothing has to be kept in step.
def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint; None for any other file."""
    match = re.fullmatch("ckpt_([0-9]{1,9})", path.stem)
    return int(match[1]) if match and path.suffix == ".safetensors" else None

def checkpoints(out_dir: Path, run: str | None = None) -> dict[int, Path]:
    """The checkpoints of a folder, or those of one `run` in it, by their steps, the newest last."""
    found = {step_of(path): path for path in out_dir.glob("ckpt_*.safetensors")
             if path.is_file() and (run is None or run_of(path) == run)}
    found.pop(None, None)
    return dict(sorted(found.items()))

def best_step(rows: list[str], steps) -> int | None:
    """Which of these `steps` has the lowest validation loss, which stands in the third column of the log's
    `rows`; None if no exam was held at any of them."""
    losses = {}
    for row in rows:
        step, _, val_loss, *_ = row.split(",")
        if val_loss and int(step) in steps and math.isfinite(float(val_loss)):
            losses[int(step)] = float(val_loss)
    return min(losses, key=losses.get, default=None)

def newest_first(out_dir: Path, best: bool = False) -> list[Path]:
    """The checkpoints of a folder in the order in which `--resume` wants them. With `best`, the best one, if
    there was an exam, comes before all others: so for writing. UserError if there is none."""
    found = checkpoints(out_dir)
    if not found:
        raise UserError(f"no checkpoint in {out_dir}: train one first, with `python minimiggy.py --train`")
    first = best_step(log_rows(out_dir / "log.csv", max(found)), found) if best else None
    return [found[step] for step in sorted(found, key=lambda step: (step == first, step), reverse=True)]

# If the first is damaged, the next one will do. But whoever is not told would think that the disk is well,
# and wonder why the loss is that of 200 steps ago.
def open_first(paths: list[Path], backend: Plain | None = None) -> Checkpoint:
    """The first of these checkpoints that is whole. What is skipped is named; UserError if all are
    damaged."""
    for path in paths:
        try:
            checkpoint = open_checkpoint(path, backend)
            if checkpoint.step != step_of(path):
                raise UserError(f"{path} holds step {checkpoint.step}, so it has been renamed (--checkpoint "
                                f"{path} takes it all the same)")
            return checkpoint
        except UserError as error:
            last_error = error
            print(f"skipped: {printable(str(error))}", file=sys.stderr)
    raise last_error

# Checkpoints can be copied, and a run can go on in another folder. So that none deletes what is not its own,
# each run has a name, which all its checkpoints carry: a checksum of what it begins with. (The same numbers,
# the same plan and the same text give the same run, to the last bit.)
def name_of_run(model: GPT, config: TrainConfig, data: np.ndarray) -> str:
    """A name for the run that begins with this model, this plan and these token ids."""
    plan = [dataclasses.asdict(model.config), dataclasses.asdict(config), PART_ONE]
    return sha256_of(plan, {}, (data, *map(numbers_of, model.parameters().values())))[:16]

def run_of(path: Path) -> str | None:
    """The name of the run that a checkpoint comes from; None if it has none or cannot be read."""
    with suppress(OSError, UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        with open(path, "rb") as file:
            return read_header(file)[1].get("run")

# Old ones are deleted after the new one has been written, so there is always one that is whole.
def prune(own: dict[int, Path], keep: int, rows: list[str]) -> None:
    """Delete all of a run's own checkpoints but the newest `keep` and the best one, by the log's `rows`."""
    kept = {*list(own)[-keep:], best_step(rows, own)}
    for step, path in own.items():
        if step not in kept:
            with suppress(OSError):  # one too many does no harm
                path.unlink()

# === Chapter 27. A run that can be stopped
#
# Part I's loop says after each step how it went. `train` listens to it: every so often it holds an exam,
# writes a line, lets the model write a little, adds a row to the log, and saves. All of this only looks at
# the run and never changes it. Passages and dropout depend on nothing but the seed and the step; exams draw
# nothing at random; and a checkpoint has all the rest. So a run that was killed at any moment, and went on
# from its last checkpoint, ends with the same numbers, to the last bit, as one that was never stopped. (On
# the same machine, and with the same text. On another one sums may be added in another order, and then their
# last digits differ.)
#
# An exam measures the loss on text that was not learned from, cut into windows of T tokens. (The cuts matter:
# a window's first tokens are harder than its last ones, which have more before them.) Where there is time,
# windows lie side by side and each token is counted once, so the result depends on nothing but the model and
# the text. That is so if it takes no more than 80 batches: 110 KB, a tenth of tiny Shakespeare, take 61. Of a
# longer text 80 have to do, spread evenly and always the same ones, so that exams can be compared.
# (`--eval-only` reads all of it.)
class Evaluator:
    """Exams: the loss on token ids, in nats a token. Nothing is drawn at random."""
    def __init__(self, model: GPT, batch_size: int):
        self.model = model
        self.T = model.config.block_size
        self.batch_size = batch_size
        self.losses = model.ops.record(self.answer)

    def answer(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        """Windows x and what comes after each of their tokens, y, (B, T) each -> the loss of each (B, T)."""
        return (self.model.ops.cross_entropy(self.model(x), y).realize(),)

    def at(self, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The loss of every token in the windows of T tokens that begin at `starts` (n,) -> (n, T)."""
        # A recording is for batches of one size. So the last batch is filled up with windows that it has
        # already, and what comes of these is cut off.
        rows = []
        for i in range(0, len(starts), self.batch_size):
            batch = np.resize(starts[i:i + self.batch_size], self.batch_size)
            passages = data[batch[:, None] + np.arange(self.T + 1)].astype(np.int32)
            rows.append(self.losses(passages[:, :-1], passages[:, 1:])[0])
        return np.concatenate(rows)[:len(starts)]

    def mean(self, data: np.ndarray, batches: int) -> float:
        """A quick look: the mean over so many batches of windows, spread evenly over `data`; over all of it
        if it has no more than that."""
        if len(data) - 1 <= batches * self.batch_size * self.T:
            return self.whole(data)
        # Two batches of two windows of 8 in 1000 tokens begin at 0, 330, 660 and 991: the last one's last
        # prediction is token 999.
        starts = np.linspace(0, len(data) - self.T - 1, batches * self.batch_size).astype(np.int64)
        return float(self.at(data, starts).mean(dtype=np.float64))

    def whole(self, data: np.ndarray) -> float:
        """The mean over all tokens but the first, which nothing comes before; each is counted once."""
        data = checked("examined", data, self.model.config)
        # Of 53 tokens, 52 are predicted. With T = 8, windows begin at 0, 8, ... 40; the last one ends with
        # the text and so begins at 44, and its first 4 predictions have been counted by the one before it.
        starts = np.arange(0, len(data) - 1, self.T)
        starts[-1] = len(data) - 1 - self.T
        losses = self.at(data, starts)
        repeated = -(len(data) - 1) % self.T
        losses[-1, :repeated] = 0
        return float(losses.sum(dtype=np.float64) / (len(data) - 1))

# With tokens of 2.67 bytes on average, for example, the factor is 1 / (ln 2 * 2.67) = 0.54, and a loss of
# 6.92 nats a token is 3.74 bits a byte.
def bits_per_byte(tokenizer: BPETokenizer, data: np.ndarray) -> float:
    """The factor from nats a token to bits a byte, for the text of these token ids."""
    lengths = np.array([len(token) for token in tokens_of(tokenizer)])
    places = range(0, len(data), 1 << 20)  # (a million tokens at a time: a text can be long)
    n_bytes = sum(int(lengths[data[i:i + (1 << 20)]].sum()) for i in places)
    return len(data) / math.log(2) / n_bytes

# What has been measured is kept in a table, log.csv, and what the model has written in samples.txt, which
# looks as it did on the screen. Both are written anew, whole, at each save. A run that goes on from step 600
# reads them as far as that step and drops the rest, which it is going to do again.
#
# A log is a file like any other: an editor, a full disk or somebody's script may have been at it. So we say
# what a row looks like: the step, and then for each other column a number or nothing. (A NaN only means that
# the run blew up there.)
COLUMNS = ["step", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_s", "train_bpb"]
CELL = r",((-?\d+(\.\d+)?(e[-+]?\d+)?|inf|nan)?)"
ROW = re.compile(rf"\d{{1,9}}({CELL}){{{len(COLUMNS) - 1}}}", re.ASCII)

class TrainingFailed(Exception):
    """A run that could not go on, or whose last checkpoint could not be written: exit code 1."""

def log_rows(log: Path, start: int) -> list[str]:
    """The rows of log.csv up to step `start`: a run that goes on from there writes those after it again.
    Lines that are no rows are dropped."""
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    return [line for line in lines if ROW.fullmatch(line) and int(line.split(",")[0]) <= start]

def sample_blocks(file: Path, start: int) -> list[str]:
    """The texts in samples.txt that were written up to step `start`, each under a line that says at which
    step."""
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    blocks = re.finditer(r"step (\d{1,9})\n(    \|.*\n)+", text, re.ASCII)
    return [block.group() for block in blocks if int(block[1]) <= start]

# A text can be too short for a model that looks at T tokens at once, and token ids that somebody brings along
# can belong to another tokenizer. Both are noticed before the first step.
def checked(name: str, ids, config: GPTConfig) -> np.ndarray:
    """Token ids as an array; UserError if they are not a row of whole numbers, if there are too few for one
    block, or some that the model does not know."""
    ids = np.ascontiguousarray(ids.numpy() if isinstance(ids, Tensor) else ids)
    T = config.block_size
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"the {name} text must be token ids in a row, (N,), not {ids.dtype} {ids.shape}")
    if len(ids) <= T:
        raise UserError(f"the {name} text has {len(ids)} tokens, too few for --block-size {T} (and one more)")
    for strange in (ids.min(), ids.max()):
        if not 0 <= strange < config.vocab_size:
            raise UserError(f"the {name} text has token {strange}, but there are {config.vocab_size} tokens")
    return ids

def clock(seconds: float) -> str:
    """75.3 -> "1:15", 4000 -> "1:06:40"."""
    return str(timedelta(seconds=int(seconds))).removeprefix("0:").removeprefix("0")

def tokens_a_step(config: TrainConfig, T: int) -> int:
    """How many tokens a step learns from, in passages of T."""
    return config.grad_accum * config.batch_size * T

# This is what an exam looks like on the screen and, but for the number of digits, in the log:
#
#     step   200  train 4.621  val 4.571 = 2.922 bits/byte  32,701 tokens/s  0:06
#     200,4.6206,4.5715,2.9222,0.00398,0.908,32701,2.7303
#
# A token takes 4.621 nats in the text that was learned from, and only 4.571 in the other. Is that one easier?
# The bits a byte say no: 2.922 against 2.730, the last number. The vocabulary was learned from the first text
# and has longer tokens for it; there are fewer of them, and each has more to say.
#
# `Run` is what `train` keeps in mind between two steps, with one method for each of the things that it does.
# A step's time is that of the step alone, without exams and saves. Of the last six we take the median, so
# that a hiccup does not count. What can wait is made when it is first needed: a run that stops early never
# compiles an exam.
class Run:
    """What `train` knows about the run that it watches: its texts, the log's rows, how fast it is."""
    def __init__(self, model: GPT, config: TrainConfig, train_data, val_data, optimizer, start: int, out_dir):
        self.model = model
        self.config = config
        self.data = checked("training", train_data, model.config)
        self.val = None if val_data is None else checked("validation", val_data, model.config)
        for name, theta in model.parameters().items():
            if theta.dtype != dtypes.float32:
                raise UserError(f"{name} is {theta.dtype}, but what is learned has to be float32 (it can be "
                                "cast where it is used)")
        self.optimizer = optimizer or AdamW(model, config)
        # If the plan has changed, it takes a new AdamW, with the old one's averages: part I's recordings have
        # beta1, the weight decay and so on as constants in their programs, and `sums` go by the plan, too.
        if self.optimizer.config != config and self.optimizer.model is model:
            kept = lasting(self.optimizer)
            self.optimizer = type(self.optimizer)(model, config)
            vars(self.optimizer).update(kept)
        # If no checkpoint can have something, it is better to say so now.
        learned = model.parameters()
        for name, tensor in state_of(model, None).items():
            matters = start == 0 if name in learned else out_dir and config.keep
            try:
                numbers_of(tensor if matters else np.zeros(0))
            except ValueError as error:
                raise UserError(f"{name} could not be saved: {error}") from error
        self.evaluator = Evaluator(model, config.batch_size)
        self.writer = None
        # How many batches of validation text an exam on the way reads.
        windows = 0 if self.val is None else math.ceil((len(self.val) - 1) / model.config.block_size)
        self.exam_batches = min(math.ceil(windows / config.batch_size), 4 * config.eval_iters)
        source = model.source or {}
        if start == 0 and "run" in source:  # (the model of an earlier run, whose text may have been another)
            source = {}
        if "run" not in source:
            source = source | {"run": name_of_run(model, config, self.data)}
        model.source = source
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.rows = []
        self.samples = []
        # With a tokenizer, nats a token can be told as bits a byte, by a factor for each text.
        tokenizer = model.tokenizer
        self.bits = bits_per_byte(tokenizer, self.data) if tokenizer else None
        self.val_bits = bits_per_byte(tokenizer, self.val) if tokenizer and self.val is not None else None
        self.began = time.perf_counter()
        self.last_shown = 0.0
        self.times = deque(maxlen=6)  # how many seconds the last steps took
        self.unsaved = None  # what to say about a save that failed

    def checkpoints(self) -> dict[int, Path]:
        """What this run has saved, by steps."""
        return checkpoints(self.out_dir, self.model.source["run"]) if self.out_dir else {}

    def way_out(self, start: int) -> str:
        """What to do after a step that went wrong, in a run that began after step `start`."""
        slower = f"--learning-rate {self.config.learning_rate / 4:.1e}"
        if start == 0 and not self.checkpoints():
            return f"nothing of this run has been saved; to begin more carefully: {slower}"
        return f"the last checkpoint is intact; to go on more carefully: --resume {slower}"

    def move_in(self, start: int, source: Path | None) -> None:
        """Use the folder from now on: move an older run out of the way, or it would look like a part of this
        one; and read what the log and the samples have up to step `start`."""
        if not self.out_dir:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        set_aside(self.out_dir, start, self.model.source["run"], source)
        self.folder = self.out_dir.stat()  # by which one knows it again, if its name has changed
        self.rows = log_rows(self.out_dir / "log.csv", start)
        self.samples = sample_blocks(self.out_dir / "samples.txt", start)

    def speed(self) -> float:
        """Tokens a second."""
        return tokens_a_step(self.config, self.model.config.block_size) / float(np.median(self.times))

    def show_progress(self, step: int, loss: float, norm: float, rate: float) -> None:
        """The line that is overwritten, ten times a second at most."""
        now = time.perf_counter()
        if now - self.last_shown < 0.1:
            return
        self.last_shown = now
        left = (self.config.max_iters - step) * float(np.median(self.times))
        bits = f" = {loss * self.bits:.2f} bits/byte" if self.bits else ""
        show(f"step {step}/{self.config.max_iters}  loss {loss:.3f}{bits}  lr {rate:.1e}  grad {norm:.2f}  "
             f"{self.speed():,.0f} tokens/s  {clock(left)} to go")

    # With steps of 25 ms, 1990 of them left and ten exams of 81 batches each, that is 1990 + 10 * 81 / 3 =
    # 2260 steps, or 57 seconds.
    def say_how_long(self, step: int) -> None:
        """Say how long the rest is going to take. (Of the first steps, some compile, and some try one core:
        the shortest is like the rest.)"""
        # A batch of an exam takes a third of what learning from one takes, where the way back is twice as
        # much again; and a step learns from `grad_accum` batches.
        c = self.config
        exams = c.max_iters // c.eval_interval - step // c.eval_interval
        steps = c.max_iters - step + exams * (c.eval_iters + self.exam_batches) / (3 * c.grad_accum)
        rest = steps * min(self.times)
        unit = "h" if rest >= 3600 else "min"
        say(f"time       {1e3 * min(self.times):,.0f} ms a step; the rest takes about {clock(rest)} {unit} "
            "if nothing else runs\n")

    def examine(self, step: int) -> dict[str, float]:
        """The losses on both texts, by the log's columns, and a line about them. Of the training text some
        batches will do. The validation text is read whole if that takes no more than four times as many; of a
        longer one, so many have to do."""
        c = self.config
        found = {"train_loss": self.evaluator.mean(self.data, c.eval_iters)}
        line = f"step {step:5}  train {found['train_loss']:.3f}"
        if self.val is not None:
            found["val_loss"] = self.evaluator.mean(self.val, 4 * c.eval_iters)
            line += f"  val {found['val_loss']:.3f}"
        if self.val_bits:
            found["val_bpb"] = found["val_loss"] * self.val_bits
            line += f" = {found['val_bpb']:.3f} bits/byte"
        say(f"{line}  {self.speed():,.0f} tokens/s  {clock(time.perf_counter() - self.began)}")
        return found

    def write_sample(self, step: int) -> None:
        """Four times in a run at most, let the model write fifty tokens, to be seen and to be kept in
        samples.txt."""
        # It writes at the first exam after each quarter: of 2000 steps, with an exam every 200, after 600,
        # 1000, 1600 and 2000.
        c = self.config
        tokenizer = self.model.tokenizer
        quarter = step * 4 // c.max_iters
        if not tokenizer or quarter == max(0, step - c.eval_interval) * 4 // c.max_iters:
            return
        self.writer = self.writer or Writer(self.model)
        ids = list(self.writer.stream(line_end(tokenizer), 50, seed=step))
        text = re.sub("(?m)^", "    | ", printable(tokenizer.decode(ids)).strip())
        say(text)
        self.samples.append(f"step {step}\n{text}\n")

    def log(self, row: dict[str, float]) -> None:
        """Add a row to the log; it is written at the next save."""
        row["tokens_per_s"] = round(self.speed())
        if self.bits:
            row["train_bpb"] = row["train_loss"] * self.bits
        self.rows.append(",".join(str(row.get(name, "")) for name in COLUMNS))

    def save(self, step: int, checkpoint: bool) -> None:
        """Save, if that can be done. A full disk must not end a run that has taken hours: it is said, and the
        next save is tried. TrainingFailed, after saving elsewhere, if the folder is not there any more."""
        try:
            if not self.out_dir.is_dir() or not os.path.samestat(self.folder, self.out_dir.stat()):
                self.leave(step)
            try:
                self.write(step, checkpoint)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.make_room():
                    raise
                self.write(step, checkpoint)
            self.unsaved = None
        except OSError as error:
            self.unsaved = f"step {step} could not be saved in {self.out_dir} ({error.strerror or error})"
            say(f"{self.unsaved}; training goes on, and so does trying: what was saved before is intact")

    def write(self, step: int, checkpoint: bool) -> None:
        """Save the log and the samples, and then perhaps a checkpoint. The log goes first, so that whoever
        goes on from a checkpoint finds all rows up to it."""
        with whole(self.out_dir / "log.csv") as file:
            file.write("\n".join([",".join(COLUMNS), *self.rows, ""]).encode())
        if self.samples:
            with whole(self.out_dir / "samples.txt") as file:
                file.write("".join(self.samples).encode())
        if checkpoint and self.config.keep:
            self.model.save_checkpoint(step, self.optimizer, self.out_dir)
            prune(self.checkpoints(), self.config.keep, self.rows)

    def make_room(self) -> bool:
        """On a full disk, delete one of this run's checkpoints, never the newest, and the best only if there
        is no other. Was there one?"""
        own = self.checkpoints()
        if len(own) < 2:
            return False
        best = best_step(self.rows, own)
        step = min(list(own)[:-1], key=lambda step: step == best)  # the oldest that is not the best
        own[step].unlink()
        say(f"the disk is full: deleted {own[step]}, so that a newer one finds room")
        return True

    def leave(self, step: int) -> None:
        """Somebody has deleted or moved the folder, or put another in its place, in which another run may be
        at work: save in a new one beside it, and raise TrainingFailed."""
        names = (f"{self.out_dir}-{n}" for n in itertools.count(1))
        lost = self.out_dir
        self.out_dir = next(Path(name) for name in names if not Path(name).exists())
        happened = f"{lost} was deleted, moved or replaced while this run was at work in it"
        try:
            self.write(step, True)
        except OSError as error:
            where = f"{self.out_dir} ({error.strerror or error})"
            raise TrainingFailed(f"{happened}, and step {step} could not be saved in {where}") from error
        saved = f"step {step} is saved in {self.out_dir}; to go on: --resume --out-dir"
        saved += f" {shlex.quote(str(self.out_dir))}"
        if not self.config.keep:
            saved = f"its log is in {self.out_dir} now"
        raise TrainingFailed(f"{happened}: {saved}")

# With the command line's defaults (2000 steps, an exam every 200), this is what happens when:
#
#     step 1                      it went well: an older run is moved away, the folder is used from now on
#     every step                  the line of progress, ten times a second at most
#     step 10                     how long the rest is going to take
#     every 10th step             a row of the log
#     every 200th step            an exam, and then a checkpoint
#     600, 1000, 1600, 2000       fifty tokens of the model's own
#
# After a step, what is due is done in this order: the line that shows progress, an exam, a text, a row of the
# log, a save. The save comes last, since it keeps what all the others have made. If the program dies before
# it, that is lost, but the resumed run makes the same again.
def train(model: GPT, config: TrainConfig, train_data, val_data=None, *, optimizer: AdamW | None = None,
          start: int = 0, out_dir: str | Path | None = None, stop=(), source: str | Path | None = None,
          locked: bool = False) -> AdamW | None:
    """Train `model` from step `start` to config.max_iters, or until something is in `stop`; return the
    optimizer, or None if that was so before anything was touched. The data are token ids in a row, a list or
    an integer array (N,). With an `out_dir`, log.csv, samples.txt and checkpoints are written there, but
    nothing before the first step has gone well; then an older run is moved aside. A run that goes on comes
    from the checkpoint `source`. (`locked`: the caller has seen to it that nobody else trains there.)
    UserError if a text is too short, numbers could not be saved, or somebody else trains there;
    TrainingFailed if numbers go wrong, or if a save fails for good."""
    check_config(model.config)
    check_config(config)
    if model.tokenizer and out_dir and config.keep:
        check_comes_back(model.tokenizer)
    run = Run(model, config, train_data, val_data, optimizer, start, out_dir)
    with nullcontext() if locked or not out_dir else alone(Path(out_dir)):
        return take_steps(run, start, stop, source and Path(source))

def take_steps(run: Run, start: int, stop, source: Path | None) -> AdamW | None:
    """The steps of `train`, and what is due after each."""
    config = run.config
    show("compiling (the first run on a machine takes some seconds longer) ...")
    began = time.perf_counter()
    steps = training(run.model, config, run.data, run.optimizer, start)
    for step, loss, norm in steps:
        run.times.append(time.perf_counter() - began)
        rate = learning_rate(config, step - 1)
        if not math.isfinite(loss + norm):  # (the optimizer has not taken such a step)
            raise TrainingFailed(
                f"step {step} went wrong: with seed {config.seed} and learning rate {rate:.2e} its batch has "
                f"a loss of {loss} and a gradient of length {norm}. It was not taken; {run.way_out(start)}")
        if step == start + 1:
            if stop:  # (somebody has changed his mind at once, so nothing is touched)
                return None
            run.move_in(start, source)
        last = step == config.max_iters
        if last:
            next(steps, None)  # (yours may do something after its last step, which the save must see)
        examining = last or step % config.eval_interval == 0
        logging = examining or step % 10 == 0
        if step == start + 10 and not last:
            run.say_how_long(step)
        run.show_progress(step, loss, norm, rate)
        # In most rows, train_loss is that of the step's own passages, with dropout. In an exam's row, it is
        # the mean over `eval_iters` batches, without.
        row = {"step": step, "train_loss": loss, "lr": rate, "grad_norm": norm}
        try:
            if examining:
                row |= run.examine(step)
                run.write_sample(step)
        except subprocess.CalledProcessError:  # (Ctrl-C ends a compiler that is at work, too)
            if not stop:
                raise
        if logging:
            run.log(row)
        saving = last or bool(stop) or step % (config.save_every or config.eval_interval) == 0
        if step == start + 1 and source and not source.exists():
            saving = True  # (what it came from has been moved aside)
        if run.out_dir and (examining or saving):
            run.save(step, saving)
        if stop and saving:  # (if the signal came after that save had been decided, one more step is taken)
            break
        began = time.perf_counter()
    show("")
    if run.unsaved:
        raise TrainingFailed(f"{run.unsaved}; what was saved before is intact")
    return run.optimizer

# A parameter that the loss does not depend on keeps its first numbers for ever. In a model that was changed,
# that is easily forgotten, and nobody would notice: the loss falls all the same. So it is said.
def untrained(model: GPT) -> list[str]:
    """The names of a model's parameters that have no part in its loss."""
    named = model.parameters()
    idx = Tensor(np.zeros((1, model.config.block_size), np.int32)).realize()
    key = Tensor(np.zeros(1, np.uint32)).realize()
    gradients = model.loss(idx, idx, key).gradient(*named.values())
    # Where tinygrad finds no way from the loss to a parameter, the gradient is the constant 0, which is on no
    # device. A gradient that is computed, and happens to be 0 for this text, is another matter; and so is the
    # constant 1, as when a parameter's sum is added to the loss.
    constant = [(name, slope) for name, slope in zip(named, gradients, strict=True) if slope.device is None]
    return [name for name, slope in constant if not slope.numpy().any()]

# Who stops a run? Ctrl-C sends the program a signal, and so do `kill` and a terminal that is closed. By
# default a signal ends a program on the spot. Ours only notes that it came. The loop above then finishes its
# step, saves, and leaves. Whoever cannot wait sends a second one, which ends the program at once: the last
# checkpoint is whole.
@contextmanager
def finishing_the_step():
    """In the `with` block, signals are put into a list, which it yields, in place of ending the program."""
    caught = []

    def catch(number, frame):
        # (A shell says 128 plus the signal's number of a program that ended by one, so we do as well. Of a
        # terminal that is closed, its shell may tell us, and then the system once more.)
        if caught and number != signal.SIGHUP:
            os._exit(128 + number)
        caught.append(number)
        with suppress(OSError):  # (print might be in the middle of something; this cannot be)
            os.write(2, b"\nstopping after this step (the same again stops at once)\n")

    before = {}
    in_main = threading.current_thread() is threading.main_thread()  # (no other thread gets signals)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main else ():
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has one ignored, and that is to stay so
            before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# Two runs in one folder would delete each other's checkpoints, so the first one takes a lock, and the second
# one is told. The system locks open files, and a folder can be opened like one. It gives a lock back when the
# program that holds it ends, however it ends; a file named "lock" would still be there after a power cut.
@contextmanager
def alone(out_dir: Path):
    """In the `with` block, nobody else trains in this folder; UserError if somebody does. What a program that
    was killed has left half written is removed, and so is the folder if it was made for nothing."""
    is_new = not out_dir.exists()
    if not out_dir.is_dir() and (out_dir.exists() or out_dir.is_symlink()):
        raise UserError(f"{out_dir} is not a folder: choose another --out-dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise UserError(f"nothing can be written in {out_dir}: choose another --out-dir")
    folder = os.open(out_dir, os.O_RDONLY)
    try:
        # LOCK_EX: for nobody else; LOCK_NB: if somebody has it, do not wait but raise BlockingIOError.
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"another run is at work in {out_dir}: choose another --out-dir") from None
    try:
        # (Only our own names are looked for: other people's files are none of our business.)
        for kind in ("ckpt_*.safetensors.*.tmp", "log.csv.*.tmp", "samples.txt.*.tmp"):
            for unfinished in out_dir.glob(kind):
                unfinished.unlink()
        yield
    finally:
        os.close(folder)
        if is_new:
            with suppress(OSError):  # there is something in it
                out_dir.rmdir()

# What of an older run is in the folder? There are five cases:
#
#     --train                            all of it moves to run-1 (or run-2, ...): a new run begins
#     --resume                           nothing moves: the run goes on from its newest checkpoint
#     --resume --data OTHER.txt          all of it moves: with another text, it is another run
#     --resume --checkpoint ckpt_600     the run's own ckpt_800 moves, as it is going to be written anew
#     ... of a run in another folder     what other runs have here moves; that run's log comes along
def set_aside(out_dir: Path, start: int, run: str, source: Path | None) -> None:
    """Move what must not mix with this run into a new folder in `out_dir`: run-1, run-2, ... At step 0 that
    is everything. A run that goes on from the checkpoint `source` moves other runs' checkpoints, and its own
    after step `start`, which it is going to write anew; and log.csv and samples.txt unless they are its
    own."""
    # Whose log is it? It names no run, so we look at what is beside it. If the run has other checkpoints
    # here, the log is its own (`at_home`); also if no other run has any. Let run A's ckpt_600 be copied into
    # run B's folder: then B's checkpoints and log go to run-1, and A begins a log.
    found = [path for path in out_dir.glob("ckpt_*.safetensors") if step_of(path) is not None]
    found = [path for path in found if path.exists()]  # (a link may lead nowhere)
    logs = [path for path in (out_dir / "log.csv", out_dir / "samples.txt") if path.exists()]
    foreign = [path for path in found if run_of(path) not in (run, None)]
    own = [path for path in found if run_of(path) == run and not (source and path.samefile(source))]
    from_elsewhere = source and source.parent.resolve() != out_dir.resolve()
    history = [source.parent / path for path in ("log.csv", "samples.txt")] if from_elsewhere else []
    history = [path for path in history if path.is_file()]
    all_moves = start == 0 or bool(history)  # (it may be another branch of the same run)
    at_home = not all_moves and (bool(own) or not (foreign or from_elsewhere))
    old = [path for path in found if all_moves or path in foreign or step_of(path) > start]
    if not at_home:
        old += logs
    if old:
        names = (f"run-{n}" for n in itertools.count(1))
        folder = next(out_dir / name for name in names if not (out_dir / name).exists())
        folder.mkdir()
        for path in old:
            path.rename(folder / path.name)
        for path in logs if at_home else ():  # (they are going to be written anew from `start` on)
            shutil.copy(path, folder / path.name)
        what = f"what was in {out_dir} before" if all_moves else ", ".join(path.name for path in old)
        say(f"moved to {folder}: {what}")
    for path in history:
        shutil.copy(path, out_dir / path.name)

# === Chapter 28. GPT-2, in and out
#
# Part I has GPT-2's formula, and its parameters have the names that they have at Hugging Face, where most
# models of this kind are kept. So models can travel. GPT-2 as OpenAI trained it can be used here and trained
# further, and a model of ours runs in any program that knows GPT-2. The numbers go over as they are. Three
# things need care.
#
# *Is it a GPT-2?* Names and shapes do not say with which formula a model was trained. One with another
# activation would load, and babble. Coming in, a model has a config.json that tells, and we compare it with
# what part I is. Going out, our own model may be one that you have changed. So we compute GPT-2's formula
# once more, in plain numpy and from nothing but the parameters and their names. If the model gives other
# logits, it is no GPT-2 any more.

# The sizes of a config say which parameters a GPT-2 has, and of which shapes: per block two norms, and four
# linear layers with a weight and a bias each.
def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a GPT-2 of this size: their shapes by name."""
    C = config.n_embd
    layers = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C),
              "ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    named = {f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layers.items()}
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for name, shape in (named | {"ln_f": (C,)}).items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[-1:]
    return shapes

# And this is what it computes with them. Compare it with part I: it is the same, line by line, in another
# library and for a single passage. `p` holds the parameters by name.
def gpt2_logits(p: dict[str, np.ndarray], ids: np.ndarray, config: GPTConfig) -> np.ndarray:
    """GPT-2 in numpy: parameters by name and ids (T,) -> logits (T, V), float32."""
    T = len(ids)
    H = config.n_head
    future = np.triu(np.full((T, T), -np.inf, np.float32), 1)         # -inf above the diagonal, else 0

    def linear(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
        return centred / spread * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["wte.weight"][ids] + p["wpe.weight"][:T]                    # (T, C)
    for i in range(config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = qkv.reshape(T, 3, H, -1).transpose(1, 2, 0, 3)      # three of (H, T, D)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v).transpose(1, 0, 2).reshape(T, -1)           # (T, C)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + linear(u, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ p["wte.weight"].T

def check_is_gpt2(model: GPT) -> None:
    """UserError unless the model has a GPT-2's parameters and computes what a GPT-2 does."""
    arrays = {name: tensor.numpy() for name, tensor in model.parameters().items()}
    have = {(name, array.shape) for name, array in arrays.items()}
    for name, shape in sorted(have ^ set(gpt2_shapes(model.config).items())):
        verb = "has" if (name, shape) in have else "lacks"
        raise UserError(f"this model is no GPT-2 any more: it {verb} {name} of shape {shape}")
    # Another formula gives other logits, by far more than rounding does, which is some 1e-6 of the largest.
    # It may differ only for tokens that are far apart, so a whole context is compared, of tokens at random;
    # or only at the ends of lines, say, so one of a text is, too.
    T = model.config.block_size
    passages = [np.random.default_rng(0).integers(0, model.config.vocab_size, T)]
    with suppress(Exception):  # (there may be no tokenizer, or one that does not know all of this)
        ids = model.tokenizer.encode("\n\n ROMEO:\tO, 12 lines?\r\n")
        passages.append(np.resize(ids, T))                            # (repeated until there are T)
    for ids in passages:
        with np.errstate(all="ignore"):
            want = gpt2_logits(arrays, ids, model.config)
        got = model(Tensor(ids[None].astype(np.int32))).numpy()[0]
        if not np.abs(got - want).max() <= 1e-4 * np.abs(want).max():  # (a NaN is not, either)
            raise UserError("this model is no GPT-2 any more: with the same numbers, a GPT-2 gives other "
                            "logits")

# *What is a token made of?* Our tokenizer, which is tiktoken's, knows which bytes are a token and which
# number each has. It joins two neighbours whenever what they make together is a token, the smallest number
# first; which two they are does not matter. Hugging Face's has a list of pairs and joins only what stands
# there, in its order. So for each of our tokens we must name the one pair that it is made of in the end.
#
# Take "banana" from chapter 3: its tokens are an, ban, ana, banana, with the numbers 256 to 259. Let "ana" be
# merged by itself: a|n|a becomes an|a, and here two parts are left. So the pair of "ana" is (an, a), and
# never (a, na). That is all there is to `last_parts`. Why is one pair enough, wherever "ana" stands? Where
# its bytes end up as this token, none of them was joined with a byte outside before. So they were merged
# among themselves, in the same order as if they stood alone, and the last two parts are the same.
#
# Once in a while a token is never reached like this, because an earlier merge cuts across it. Let bc, ab, cd
# and abcd be tokens, in this order. Then a|b|c|d becomes a|bc|d, and neither abc nor bcd is a token: three
# parts are left. Such a token has no pair, and only a whole word can become it: those are looked up before
# anything is merged.

# In Hugging Face's files, tokens are JSON strings, which hold characters and not bytes. So every byte is
# written as a character that can be seen: as itself, if Latin-1 has a printable character of that number, or
# else as one from number 256 on, in order. A space becomes "Ġ", an end of line "Ċ", the token " the" "Ġthe".
AS_THEY_ARE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
OTHERS = [byte for byte in range(256) if byte not in AS_THEY_ARE]
LETTERS = {byte: chr(byte) for byte in AS_THEY_ARE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}

def vocabulary(tokenizer: BPETokenizer) -> dict[str, int]:
    """All tokens, written in these letters, and their numbers."""
    words = [token.decode("latin-1") for token in tokens_of(tokenizer)]
    return {word.translate(LETTERS): token for token, word in enumerate(words)}

def last_parts(token: str, ids: dict[str, int]) -> list[str]:
    """A token's letters, merged until two parts are left, or more if nothing can be merged any further."""
    parts = list(token)
    while len(parts) > 2:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        first = min(joined, key=lambda pair: ids.get(pair, math.inf))
        if first not in ids:
            break
        i = joined.index(first)
        parts[i:i + 2] = [first]
    return parts

def earlier_parts(token: str, ids: dict[str, int]) -> tuple[int, int]:
    """The numbers of two earlier tokens that together are this one; ValueError if there are none. In the
    other direction, from a file to tiktoken, any two will do: it only wants to know the token's bytes. (A
    hostile file may have a token of a million letters, and to try all its places would take for ever.)"""
    for n in range(1, min(len(token), LONGEST)):
        left = ids.get(token[:n], math.inf)
        right = ids.get(token[n:], math.inf)
        if max(left, right) < ids[token]:
            return left, right
    raise ValueError("a token is not made of earlier ones")

# *Which files?* A folder that `from_pretrained` of Hugging Face's transformers loads has
#
#     model.safetensors          the weights, under our names with "transformer." before them
#     config.json                the sizes, and which formula it is
#     vocab.json, merges.txt     the tokenizer in an older form: tokens with their numbers; pairs, in order
#     tokenizer.json             the same in a newer form, with the pattern that cuts texts
#     tokenizer_config.json      how transformers are to use it
GPT2 = {  # what a config.json may say that is true of part I; we write the first of each
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False]}

def tokenizer_files(tokenizer: BPETokenizer, block_size: int) -> dict[str, str]:
    """The files of a tokenizer for transformers: their texts by name."""
    ids = vocabulary(tokenizer)
    pairs = [last_parts(token, ids) for token in ids]
    merges = [" ".join(pair) for pair in pairs if len(pair) == 2]
    # Words are cut by GPT-2's pattern (`use_regex`), and one that is a token is taken as it is
    # (`ignore_merges`).
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": True}
    newer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}
    # Left to itself, transformers' class would also hand over token_type_ids, all 0. A GPT-2 there looks
    # these up in wte, and would add token 0's row everywhere. So we name what it is to hand over.
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
             "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
             "add_prefix_space": False}
    return {"vocab.json": json.dumps(ids), "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": json.dumps(newer), "tokenizer_config.json": json.dumps(about, indent=2)}

# In a config.json, `tie_word_embeddings` says that the head is wte, and an `n_inner` of null that an MLP has
# 4 C hidden numbers. GPT-2 knows three places for dropout; ours are the two that are not in the attention.
def export(model: GPT, folder: Path) -> None:
    """Write a folder that transformers load: the model, and its tokenizer if it has one. UserError if the
    model is not a GPT-2; OSError if the disk does not take it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"there is something in {folder} already: name a new folder")
    check_is_gpt2(model)
    c = model.config
    tokenizer = model.tokenizer
    is_gpt2s = getattr(tokenizer, "name", None) == "gpt2"
    end = 50256 if is_gpt2s else None  # <|endoftext|>; ours learn no such token
    config = {key: values[0] for key, values in GPT2.items()} | {
        "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True, "n_inner": None,
        "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_ctx": c.block_size,
        "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
        "attn_pdrop": 0.0, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "bos_token_id": end, "eos_token_id": end}
    files = {"config.json": json.dumps(config, indent=2)}
    if tokenizer and TOKENIZER_IS_OURS and type(tokenizer) is BPETokenizer:
        files |= tokenizer_files(tokenizer, c.block_size)
    elif tokenizer:
        say("without its tokenizer, which is not part I's: transformers would cut texts in another way")
    for name, text in files.items():
        with whole(folder / name) as file:
            file.write(text.encode())
    tensors = {f"transformer.{name}": tensor for name, tensor in model.parameters().items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})  # last: then all is there

# Coming in, a model is a file of weights with a config.json and perhaps a tokenizer beside it. Large models
# are cut into several files, and an index says which tensor is in which. Older ones are pickles, which can
# contain programs and are not opened here.
HUB = "https://huggingface.co/openai-community"
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
INDEX = "model.safetensors.index.json"

def read_json(path: Path) -> dict:
    """A JSON object from a file of at most 64 MB; Damaged if it is something else."""
    with suppress(UserError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= 64 << 20:
            values = json.loads(read_text(path))
            if isinstance(values, dict):
                return values
    raise Damaged(f"{path} is damaged: it is not a JSON object")

# A tokenizer in the folder can be used if ours would give the same numbers. So we make one from its list of
# tokens, and compare all that it knows with that list. If they differ, it is of another kind; the model can
# be used without. The newer form also says how texts are cut, and in which order pairs are merged; both must
# be as they are here.
def works_like_ours(newer: dict) -> bool:
    """True if the tokenizer of such a file leaves a text as it is, cuts it by GPT-2's pattern, and merges
    pairs in the order of their tokens' numbers. (Errors of all kinds if the file has not what it should.)"""
    level = newer["pre_tokenizer"]
    cuts = level["type"] == "ByteLevel" and level.get("use_regex", True) and not level.get("add_prefix_space")
    ids = newer["model"]["vocab"]
    # A pair stands there as "a b", or as ["a", "b"]. No token has a blank in it, which is written as a Ġ.
    made = [ids["".join(pair).replace(" ", "")] for pair in newer["model"]["merges"]]
    return cuts and newer.get("normalizer") is None and made == sorted(made)

def read_tokenizer(folder: Path, vocab_size: int) -> BPETokenizer | None:
    """The tokenizer in a folder if it is GPT-2's or of our kind, else None; where there is none, GPT-2's for
    a model with its 50257 tokens."""
    # Both kinds of file list all tokens with their numbers. In one of our kind the first 256 are the bytes,
    # and the others were learned.
    newer = folder / "tokenizer.json"
    older = folder / "vocab.json"
    if not newer.exists() and not older.exists():
        return gpt2_tokenizer() if vocab_size == 50257 else None
    with suppress(Damaged, ValueError, LookupError, TypeError, AttributeError):
        about = read_json(newer) if newer.exists() else None
        ids = about["model"]["vocab"] if about else read_json(older)
        if ids.get("<|endoftext|>") == 50256:
            tokenizer = gpt2_tokenizer()
        else:
            learned = sorted(ids, key=ids.get)[256:]
            tokenizer = tokenizer_of([earlier_parts(token, ids) for token in learned])
        is_ours = about is None or works_like_ours(about)
        if is_ours and vocabulary(tokenizer) == ids and len(ids) == vocab_size:
            return tokenizer
    say(f"the tokenizer in {folder} is neither one of MiniMiggy's nor GPT-2's: the model comes without one")
    return None

def weights_file(source: str) -> Path:
    """The file, or the index of several files, that `source` means: a file, a folder, or one of HUB_MODELS,
    which are downloaded once. UserError if it is a pickle or cannot be downloaded."""
    path = Path(source)
    if source in HUB_MODELS and not path.exists():
        path = cache_folder() / source / "model.safetensors"
        download(f"{HUB}/{source}/resolve/main/model.safetensors", path)
    # What is in a folder may be cut into several files, or be a pickle. If there is nothing, the error will
    # name the file that one would expect.
    if path.is_dir():
        candidates = [path / "model.safetensors", path / INDEX, *path.glob("pytorch_model*.bin")]
        path = next(filter(Path.exists, candidates), candidates[0])
    if path.suffix in (".bin", ".pt", ".pth") and path.exists():
        raise UserError(f"{path} is a pickle, which can hold programs: open it with transformers and save it")
    return path

def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, or of all files that an index names; UserError if one is damaged."""
    if not path.name.endswith(".json"):
        arrays, metadata = read_safetensors(path)
        if metadata.get("format") == FORMAT:
            raise UserError(f"{path} is a checkpoint of MiniMiggy's: --checkpoint opens it, and --resume "
                            "--checkpoint goes on with it")
        return arrays
    places = read_json(path).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else [None]
    if not all(type(name) is str and name and Path(name).name == name for name in names):
        raise UserError(f"{path} is damaged: it does not say which file beside it has which tensor")
    arrays = {}
    for name in sorted(set(names)):
        arrays |= read_safetensors(path.with_name(name))[0]
    return arrays

# The weights tell nearly everything: V, C and T are the shapes of two tables, and the layers can be counted.
# But the number of heads stands nowhere in them, and neither does the activation. That is what the
# config.json is for, and whatever it says must be true of part I. Where it is missing, we take 64 channels a
# head, as OpenAI's own models have; if the file is there and does not say, 12 heads, as transformers do.
def heads_of(path: Path, config: GPTConfig) -> int:
    """Hold what a config.json says against part I and the shapes of the weights beside it; return the number
    of heads, which no shape tells. UserError if it speaks of another model."""
    about = path.with_name("config.json")
    C = config.n_embd
    # (C / 64 is 12.0 for 768 channels, which equals 12; for 100 it is a fraction, which is not in the list.)
    told = {"n_head": 12} | read_json(about) if about.exists() else {"n_head": C / 64}
    fits = GPT2 | {"vocab_size": [config.vocab_size], "n_embd": [C], "n_layer": [config.n_layer],
                   "n_positions": [config.block_size], "n_ctx": [config.block_size], "n_inner": [None, 4 * C],
                   "n_head": [n for n in range(1, C + 1) if C % n == 0]}
    for key, values in fits.items():
        if key in told and told[key] not in values:
            where = about if about.exists() else f"{path}, without a config.json beside it"
            found = brief(json.dumps(told[key]), 50)
            needed = brief(" or ".join(map(json.dumps, values)), 80)
            raise UserError(f"{where}: {key} is {found}; these weights and part I need {needed}")
    return int(told["n_head"])

def init_from(source: str, block_size: int | None = None, backend: Plain | None = None) -> GPT:
    """A GPT with the weights of a .safetensors file, of a folder that has one or several, or of one of
    HUB_MODELS; cut to its first `block_size` positions, without dropout. UserError if that is no GPT-2."""
    path = weights_file(source)
    # Some files have a prefix before every name. Old ones hold the causal mask of each layer, too.
    named = {name.removeprefix("transformer."): array for name, array in read_weights(path).items()}
    arrays = {name: array for name, array in named.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    wte = arrays.get("wte.weight", np.zeros(0))
    wpe = arrays.get("wpe.weight", np.zeros(0))
    if wte.ndim != 2 or wpe.ndim != 2:
        raise UserError(f"{path} has no matrices wte.weight and wpe.weight")
    # The size is in the shapes, but for the heads; and then everything that is told has to agree with it.
    V, C = wte.shape
    T = len(wpe)
    layers = sum(name.endswith(".ln_1.weight") for name in arrays)
    config = GPTConfig(T, V, max(1, layers), 1, C)
    config.n_head = heads_of(path, config)
    check_config(config)
    if size_of(config) > 100 * sum(array.size for array in arrays.values()):
        raise UserError(f"{path} has far fewer numbers than a GPT-2 of this size")
    if not np.array_equal(arrays.pop("lm_head.weight", wte), wte):
        raise UserError(f"{path}: lm_head.weight is another matrix than wte.weight; in a GPT-2 they are one")
    if block_size and block_size > T:
        raise UserError(f"--block-size {block_size}, but {path} has only {T} positions")
    config.block_size = block_size or T
    arrays["wpe.weight"] = wpe[:config.block_size]
    model = GPT(config, backend, tokenizer=read_tokenizer(path.parent, V), seed=None)
    restore(model, arrays, path)
    # The config.json has answered for the file. But if you have changed part I, then your formula is another.
    if not is_as_in_part_one(model):
        check_is_gpt2(model)
    return model

# === Chapter 29. Seeing it
#
# The log of a run is a table, a row for every tenth step and for every exam. Two pictures are made of it: a
# curve in the terminal at the end of a run, and with matplotlib one that compares several runs.
#
# A run that goes on drops damaged lines from its log, rather than stop. But a picture without them would be
# wrong, so here they are an error.
def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv: numbers by column, without the empty cells. UserError, with the first line that
    is wrong, if it is not the log of a run."""
    check_file(path)
    heading, *lines = read_text(path).decode().splitlines() or [""]
    wrong = [line for line in lines if not ROW.fullmatch(line)]
    if heading != ",".join(COLUMNS):
        wrong = [heading]
    if wrong:
        raise UserError(f"{path} is no log of a run, or damaged, in the line: {brief(wrong[0], 40)}")
    rows = [zip(COLUMNS, line.split(","), strict=True) for line in lines]
    return [{name: float(cell) for name, cell in row if cell} for row in rows]

def column(rows: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) for the rows that have a value in this column which a picture can show. (When a run blows
    up, some are infinite, and a damaged log can have any; no float32 is above 1e38.)"""
    return [(row["step"], row[name]) for row in rows if abs(row.get(name, math.nan)) < 1e38]

# A terminal shows letters, but Unicode has letters that are drawings: a braille character is a grid of 4 rows
# of 2 dots, each of which may be raised or not. Its number is 0x2800 plus one bit for each dot, with the bits
# as in DOTS. So 56 x 8 characters are a screen of 112 x 32 dots. ("⢁", for example, with the first dot on the
# left and the last on the right, is 0x2800 + 1 + 128.)
DOTS = ((1, 8), (2, 16), (4, 32), (64, 128))  # for the rows from the top down: the left dot, the right dot

def chart(rows: list[tuple[float, float]]) -> str:
    """(step, value) pairs as a curve for the terminal, 10 lines of 64 characters; "" if there are fewer than
    two, or if one is not a number."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return ""
    steps, values = np.array(rows).T
    low = values.min()
    high = values.max()
    # The height of the curve at each of the 112 columns of dots, on straight lines between the points. A loss
    # that fell from 6.9 to 2.7, for example, and stands at 4.8 now, is half-way: at row 16 of 0 to 31,
    # counted from the top. A column has the dots from where the one before it ended to where it ends itself,
    # so that the curve is not broken where it is steep.
    places = np.linspace(steps[0], steps[-1], 112)
    depths = np.interp(places, steps, (high - values) / (high - low or 1) * 31)  # 0 is the top row of dots
    depths = np.rint([depths[0], *depths]).astype(int)
    grid = np.full((8, 56), 0x2800)
    for x, (before, here) in enumerate(itertools.pairwise(depths)):
        for y in range(min(before, here), max(before, here) + 1):
            grid[y // 4, x // 2] |= DOTS[y % 4][x % 2]
    labels = [f"{high:6.3f} ┤", *["       │"] * 6, f"{low:6.3f} ┤"]
    lines = [label + "".join(map(chr, codes)) for label, codes in zip(labels, grid, strict=True)]
    axis = "       └" + "─" * 56
    steps_line = f"{steps[0]:<20.0f}{'step':^16}{steps[-1]:>20.0f}".rjust(64)
    return "\n".join([*lines, axis, steps_line])

# In the picture, every run has one colour: a thin curve for the text that it learned from, a bold one for the
# exam, and a filled dot where a checkpoint is kept. One thing is easy to get wrong: the losses of the first
# steps are so high that they would press everything else together. So the first tenth of the run may leave
# the picture at the top. (Names of folders can be anything, but in matplotlib a "$" begins a formula, and a
# letter that the font does not have makes it print a warning.)
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.92"}

def plot(folders: list[str | Path], path: Path):
    """Draw the logs of these runs into one PNG; return matplotlib's Figure. UserError without matplotlib, or
    if a log is damaged or empty."""
    try:
        from matplotlib import figure, rc_context
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    logs = {Path(folder): read_log(Path(folder) / "log.csv") for folder in folders}
    in_bits = all(column(rows, "val_bpb") for rows in logs.values())
    unit = "bpb" if in_bits else "loss"
    last = max([step for rows in logs.values() for step, _ in column(rows, "step")], default=0)
    late = []
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = figure.Figure(figsize=(8, 5.2), dpi=160)
        top, bottom = picture.subplots(2, sharex=True, gridspec_kw={"height_ratios": [5, 1], "hspace": 0.25})
        for i, (folder, rows) in enumerate(logs.items()):
            learned = column(rows, f"train_{unit}")
            exams = column(rows, f"val_{unit}")
            if not learned:
                raise UserError(f"{folder / 'log.csv'} has nothing to draw yet")
            # The picture has room for all that comes after the first tenth of the longest run; of a run that
            # did not get so far, for its end.
            late += [value for step, value in learned + exams if step >= min(last / 10, learned[-1][0])]
            named = exams or learned
            name = printable(folder.resolve().name).replace("$", r"\$")
            thin = {"linewidth": 0.8, "alpha": 0.45, "zorder": 1.9, "label": f"{named[-1][1]:.3f}  {name}"}
            dots = {"color": f"C{i}", "marker": "o", "markersize": 5}
            kept = [point for point in named if (folder / f"ckpt_{point[0]:.0f}.safetensors").exists()]
            top.plot(*zip(*learned, strict=True), color=f"C{i}", **thin)
            top.plot(*zip(*exams, strict=True), linewidth=2, markerfacecolor="white", **dots)
            top.plot(*zip(*kept, strict=True), linewidth=0, **dots)
            bottom.plot(*zip(*column(rows, "lr"), strict=True), color=f"C{i}")
        margin = (max(late) - min(late)) / 17
        measure = "bits per byte" if in_bits else "nats per token"
        top.set(ylim=(min(late) - margin, max(late) + margin),
                title=f"{measure}   (bold: validation, thin: training, ● checkpoint)")
        top.legend(loc="upper right", labelcolor="linecolor", frameon=False)
        bottom.set(title="learning rate", xlabel="step", ylim=(0, None))
        with whole(path) as file:
            picture.savefig(file, format="png", bbox_inches="tight")
    return picture

# === Chapter 30. Looking inside
#
# A model is a million numbers, which nobody can read. But one can watch them at work. `--look` passes a
# prompt through the model and writes down what happens on the way: which tokens it reads, what it expects
# after each, whom each head looks at, how the guess grows from block to block. All of it goes into one page,
# look.html, which a browser draws without a server, a network or a library.
#
# *How does one watch a model without changing it?* Its layers call a backend, so a copy of it gets one that
# does the same and takes notes. And a model runs its blocks one after the other, so in the copy each block is
# put into a function that notes what comes out. The copy has the model's own tensors and computes with its
# own methods, whatever a reader has made of them; nothing here repeats how a GPT computes.
def noting(function, notes: list):
    """A function that does what `function` does, and adds to `notes` its first argument and its result."""
    def noted(*arguments, **named):
        result = function(*arguments, **named)
        notes.append(([*arguments, *named.values()][0], result))
        return result
    return noted

def watch(model: GPT, idx: np.ndarray) -> tuple[np.ndarray, list, list]:
    """Pass ids (B, T) int32 through a model. Returns float32 arrays: the logits (B, T, V); and of the first
    row the stream before, between and after the blocks, (T, C) each, and what each attention got and
    answered, (T, 3, H, D) and (T, H, D)."""
    asked = []
    passed = []
    ops = copy.copy(model.ops)
    ops.attention = noting(model.ops.attention, asked)
    # `deepcopy` looks for each object in its memo first, by its id, and if it is there, takes what stands
    # beside it. So the twin has layers of its own, but the model's tensors, and the backend that watches.
    memo = {id(tensor): tensor for tensor in get_state_dict(model).values()}
    twin = copy.deepcopy(model, memo | {id(model.ops): ops})
    twin.h = [noting(block, passed) for block in twin.h]

    def forward(idx: Tensor) -> tuple[Tensor, ...]:
        logits = twin(idx)
        # The first block's argument is what the model knows before any block has been asked.
        streams = [passed[0][0], *(stream for _, stream in passed)]
        # Some of what has been noted is a mere view, or would vanish in a fused program: it gets memory of
        # its own, all in one go, so that nothing is computed twice.
        results = [result.contiguous() for result in (logits, *streams, *itertools.chain(*asked))]
        Tensor.realize(*results)
        return tuple(results)
    logits, *rest = model.ops.record(forward)(idx)
    # Only the first row is a prompt that somebody asks about; of the others, the logits are enough.
    rest = [array[0] for array in rest]
    streams = rest[:len(passed) + 1]
    pairs = rest[len(passed) + 1:]
    return logits, streams, list(zip(pairs[::2], pairs[1::2], strict=True))

# *Whom does it look at?* Flash attention never has its weights in memory. But we can ask for them: an answer
# is the average of the values, with these weights. Let token 5's value be 1 in channel 5 and 0 elsewhere;
# then channel 5 of each answer is the weight of token 5. D channels tell of D tokens; for T = 64 and D = 32
# we ask twice, side by side in a batch. So the weights come out of the operation that runs, also a reader's
# own, and we check that with the true values they give the true answer.
def attention_weights(attention, qkv: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights (H, T, T) with which an attention averaged: row t has those of token t. `attention` is the
    operation as `record` makes it, for arrays; `qkv` (T, 3, H, D) is what it got, `y` (T, H, D) what it
    answered. ValueError if that is no average."""
    T, _, H, D = qkv.shape
    t = np.arange(T)
    asking = np.repeat(qkv[None], math.ceil(T / D), axis=0)           # (pieces, T, 3, H, D)
    asking[:, :, 2] = 0
    asking[t // D, t, 2, :, t % D] = 1
    answers = attention(asking, t.astype(np.int32))[0]                # (pieces, T, H, D)
    weights = answers.transpose(2, 1, 0, 3).reshape(H, T, -1)[:, :, :T]
    again = np.einsum("hts,shd->thd", weights, qkv[:, 2])
    if not np.allclose(again, y, rtol=1e-3, atol=1e-3 * np.abs(y).max()):
        raise ValueError("an answer is no average of the values")
    return weights

def attention_maps(ops: Plain, asked: list, n: int) -> dict:
    """For the page, the weights of each head on the first `n` tokens, in thousandths (a row ends with its
    last one that is not zero), a line about its habits, and which head to begin with: the one that is most
    sure whom, other than the token itself, it looks at."""
    attention = ops.record(lambda qkv, position: (ops.attention(qkv, position).contiguous().realize(),))
    # In a head's table of weights, row t is token t's. So its diagonal has what each token gives itself, the
    # diagonal below it what it gives the one before, and the first column what all give the first.
    heads = []
    sure = []
    for i, (qkv, y) in enumerate(asked, 1):
        for j, weights in enumerate(attention_weights(attention, qkv, y)[:, :n, :n], 1):
            words = (f"puts, on average, {weights.trace() / n:.0%} of its weight on the token itself, "
                     f"{weights.trace(-1) / n:.0%} on the one before it, and {weights[:, 0].mean():.0%} on "
                     "the first.")
            thousandths = np.rint(1000 * weights).astype(int).tolist()
            rows = [np.trim_zeros(row, "b") for row in thousandths]
            heads.append({"name": f"layer {i}, head {j}", "words": words, "rows": rows})
            sure.append(np.tril(weights, -1).max(-1).mean())
    if not heads:
        raise ValueError("its layers do not call the backend's attention")
    return {"heads": heads, "across": len(heads) // len(asked), "chosen": int(np.argmax(sure))}

# *What does it expect?* The page has the dials of chapter 10. They need the logits of all tokens, and 50,000
# at each place would be too many. So it gets the 100 likeliest, and of the others groups of nearly equal
# logits: how many they are, and one logit that stands for all. That is the log of the mean of their exp: two
# tokens with the logits 0 and 0.2 weigh as much as two with 0.105. So their probabilities add up exactly at
# temperature 1, and nearly at others.
def expectation(logits: np.ndarray, names: list[str]) -> dict:
    """Logits (V,) for the page, each less the largest one: `likely`, [token, height] from the top, and
    `tail`, [how many, height]."""
    order = np.argsort(-logits, kind="stable")
    heights = (logits[order] - logits.max()).astype(np.float64)
    likely = [[names[token], round(height, 3)] for token, height in zip(order[:100], heights, strict=False)]
    tail = []
    others = heights[100:]
    for group in np.split(others, np.flatnonzero(np.diff(np.floor(5 * others))) + 1):  # (0.2 nats each)
        if len(group):
            mean = group[0] + np.log(np.exp(group - group[0]).mean())
            tail.append([len(group), round(float(mean), 3)])
    return {"likely": likely, "tail": tail}

def as_shares(logits: np.ndarray) -> np.ndarray:
    """Softmax: logits (..., V) -> probabilities (..., V), in float64."""
    # The largest is taken off first, which changes no share, and no power can be too large.
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

# *How does a guess grow?* The final norm and the head are meant for the stream after the last block, but they
# can read it at any place: all blocks only add to it, so a direction means nearly the same everywhere. At the
# start, the stream is hardly more than the token's own row, and which row is most like it? Itself. So at
# first most tokens "expect" themselves, and the first block has to talk them out of it. ("The logit lens":
# nostalgebraist 2020.)
def guesses_on_the_way(model: GPT, streams: list, answer: np.ndarray, prompt: list[int], names: list) -> dict:
    """For the page, rows of [token, probability]: what is likeliest at each place of the prompt if the final
    norm and the head read the stream before the first block, and after each. ValueError if what they read at
    the end is not what the model says: `answer` (n, V), its logits."""
    read = model.ops.record(lambda x: (model.head(model.ln_f(x)).contiguous().realize(),))
    rows = [["it reads", [[names[token]] for token in prompt]]]
    for i, stream in enumerate(streams):
        logits = read(stream[None])[0][0, :len(prompt)]               # (n, V)
        guesses = [[names[p.argmax()], float(f"{p.max():.3g}")] for p in as_shares(logits)]
        rows.append([f"after block {i}" if i else "at the start", guesses])
    if not np.allclose(logits, answer, rtol=1e-3, atol=1e-3):
        raise ValueError("the stream after the last block does not lead to the model's logits")
    rows.append(["what came", [[names[token]] for token in prompt[1:]]])
    return {"rows": rows}

# *What surprises it?* A token at the beginning of a window has little before it and is hard for that reason
# alone. So the windows overlap by half, and of all but the first only the second half counts: each token is
# seen with at least half a window before it. With T = 64, eight windows at 0, 32, 64 and so on have 288
# tokens.
PASSAGE = 288  # tokens of the validation text that the page shows

def passage_windows(text: np.ndarray, T: int) -> np.ndarray:
    """Where the windows of T tokens begin, (n,), that cover the passage at the beginning of `text`, or what
    there is of it."""
    # With T = 64: at 0, 32, ... 224, whose last answer is token 288. (A window needs the token after it.)
    half = max(1, T // 2)
    return np.arange(0, min(len(text), PASSAGE + half) - T, half)

def surprises(text: np.ndarray, logits: np.ndarray, names: list[str]) -> dict:
    """A passage for the page, from the logits (n, T, V) of its windows: its `tokens` (but for the first,
    which nothing comes before), the `bits` that each took, and the `guesses`, what was likeliest."""
    if not len(logits):
        raise ValueError("the validation text is not at hand (--data FILE brings it), or is too short")
    # The first window counts whole, any other from its middle on: what comes before has been counted.
    T = logits.shape[1]
    rows = np.concatenate([logits[0], *logits[1:, T - max(1, T // 2):]])[:PASSAGE]     # (N, V)
    came = text[1:len(rows) + 1]
    p = as_shares(rows)
    bits = np.log2(1 / np.maximum(p[np.arange(len(rows)), came], 1e-300)).round(2)
    return {"tokens": [names[token] for token in came], "bits": bits.tolist(),
            "guesses": [names[token] for token in p.argmax(-1)]}

# *What does it know about tokens?* Those whose rows point the same way are alike to the model, so likeness is
# measured by the cosine of the angle between two rows. And the map is a shadow: of all directions in the
# space of C dimensions, it takes the two along which the commonest tokens are spread most. The singular value
# decomposition finds them. Two of 128 directions are a small part of what there is, so tokens can be close on
# the map and yet differ; but in ours, capitals, endings and whole words fall apart as clearly as continents.
def knowledge(model: GPT, commonest: list[int], names: list[str]) -> dict:
    """What the page says about a model's embedding table: `near`, for up to 1000 tokens the eight that are
    most alike, [token, cosine]; and a map, `atlas`, of up to 100, [token, x, y] in percent."""
    table = model.wte.weight.numpy()[commonest[:5000]]                # (n, C), the commonest first
    units = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    # All rows have length 1 now, so the product of two is the cosine of their angle.
    cosines = units[:1000] @ units.T                                  # (1000, n)
    np.fill_diagonal(cosines, -2)                                     # (itself comes last)
    best = np.argpartition(-cosines, range(8))[:, :8]
    near = {}
    for token, row, others in zip(commonest, cosines, best, strict=False):
        near[names[token]] = [[names[commonest[i]], round(float(row[i]), 2)] for i in others]
    # The map: seen from the middle of the commonest, the two directions in which they are spread most; and
    # the shadow that falls on these, stretched to a square of 100 by 100.
    rows = units[:100] - units[:100].mean(0)
    directions = np.linalg.svd(rows, full_matrices=False)[2][:2]      # (2, C)
    shadow = rows @ directions.T                                      # (100, 2)
    shadow = (shadow - shadow.min(0)) / np.maximum(np.ptp(shadow, axis=0), 1e-9) * 100
    places = shadow.round(1).tolist()
    atlas = [[names[token], *place] for token, place in zip(commonest, places, strict=False)]
    return {"near": near, "atlas": atlas}

# *How did it learn?* That stands in the run's folder. (As in chapter 29, the first tenth may leave the
# picture.)
def story(folder: Path | None) -> dict:
    """A run's curves, [step, loss], for both texts, and its samples; UserError if it has no log."""
    if folder is None:
        raise ValueError("this model did not come from a run's folder")
    rows = read_log(folder / "log.csv")
    in_bits = bool(column(rows, "val_bpb"))
    curves = []
    for name in ("train", "val"):
        points = column(rows, f"{name}_{'bpb' if in_bits else 'loss'}")
        # A long run has a hundred thousand rows, and a curve of more points than the screen has is no finer.
        points = points[::max(1, len(points) // 300)] + points[-1:]
        curves.append([[int(step), round(value, 3)] for step, value in points])
    last = max([step for step, _ in curves[0] + curves[1]], default=0)
    late = [value for step, value in curves[0] + curves[1] if step >= last / 10]
    if not last:
        raise ValueError("its log is empty")
    blocks = sample_blocks(folder / "samples.txt", 10**9)[-8:]
    samples = [re.sub(r"(?m)^    \| ", "", block)[:1000] for block in blocks]
    return {"curves": curves, "last": last, "low": min(late), "high": max(late),
            "unit": "bits a byte" if in_bits else "nats a token", "samples": samples}

# *How do we write a token?* As its text; one that is no text, such as half a character, by its bytes. How a
# token was merged is found out as it is for Hugging Face's files, in chapter 28.
def in_letters(tokenizer: BPETokenizer, token: int) -> str:
    """A token's text, or its bytes in the form <e2 80>; its number if it has neither."""
    raw = tokenizer.decode_bytes(token)
    with suppress(UnicodeDecodeError):
        text = raw.decode()
        if text and text == printable(text):
            return text
    return f"<{raw.hex(' ')}>" if raw else f"#{token}"

def merges_of(tokenizer: BPETokenizer, tokens: list[int], names: list[str]) -> dict[str, list]:
    """For these tokens, and their parts in turn: its number, and the two tokens that it was merged from."""
    # Each token asks for its parts, and so on down to single bytes: "banana" for "ban" and "ana", "ban" for
    # "b" and "an".
    ids = vocabulary(tokenizer)
    words = list(ids)
    merges = {}
    waiting = [token for token in tokens if token < len(words)]
    while waiting:
        token = waiting.pop()
        parts = [ids.get(part) for part in last_parts(words[token], ids)]
        if names[token] not in merges and len(parts) == 2 and None not in parts:
            merges[names[token]] = [token, names[parts[0]], names[parts[1]]]
            waiting += parts
    return merges

# The page has a section for each of these questions, and takes at most 64 tokens of a prompt, the last ones,
# and fewer if the model has many heads, since each head has a weight for each pair of tokens: 150,000 weights
# take half a megabyte. And a section may be impossible: a file is not there any more, or a reader's own model
# has nothing of the kind. Then the page says so in that place, and shows the others.
def or_else(what: str, make, *arguments) -> dict:
    """What `make` gives, a section for the page; if that fails, what to say in its place: that `what` is
    missing, and why."""
    try:
        return make(*arguments)
    except Exception as error:  # (what a changed model may raise, nobody knows)
        return {"missing": f"There is no {what} to be shown: {brief(in_words(error), 200)}."}

def look(model: GPT, prompt: list[int], text: np.ndarray | None = None, folder: Path | None = None) -> dict:
    """What the page says, for JSON, about a model with a tokenizer, and a prompt of one token or more.
    `text`, token ids (N,), begins as the validation text does; `folder` is that of the run. UserError if the
    logits are not finite."""
    c = model.config
    T = min(c.block_size, 256)
    shown = prompt[-max(1, min(T, 64, int(math.sqrt(2 * 150_000 / (c.n_layer * c.n_head))))):]
    n = len(shown)
    text = np.zeros(0, np.int32) if text is None else text
    starts = passage_windows(text, T)
    # One pass is enough for everything, and its programs are compiled once, for one shape: the first row is
    # the prompt, with zeros behind it, which it cannot see; the others are the windows of the passage.
    idx = np.zeros((1 + len(starts), T), np.int32)
    idx[0, :n] = shown
    idx[1:] = text[starts[:, None] + np.arange(T)]
    logits, streams, asked = watch(model, idx)
    if not np.isfinite(logits).all():
        raise UserError("this model's logits are not finite: there is nothing to look at")
    names = [in_letters(model.tokenizer, token) for token in range(c.vocab_size)]
    # Which tokens are common? A learned vocabulary, after the 256 bytes, has its commonest pieces first, and
    # that decides between those which the text has equally often, or not at all.
    counts = np.bincount(text, minlength=model.tokenizer.vocab_size)
    commonest = sorted(range(len(counts)), key=lambda token: (-counts[token], token < 256))
    sections = {
        "tokens": {"merges": merges_of(model.tokenizer, shown, names), "ids": shown},
        "expects": {"places": [expectation(row, names) for row in logits[0, :n]]},
        "looks": or_else("attention", attention_maps, model.ops, asked, n),
        "grows": or_else("guess on the way", guesses_on_the_way, model, streams, logits[0, :n], shown, names),
        "surprises": or_else("text", surprises, text, logits[1:], names),
        "knows": or_else("embedding table", knowledge, model, commonest, names),
        "learned": or_else("log", story, folder)}
    p = as_shares(logits[0, n - 1])
    likeliest = [[names[token], float(p[token])] for token in np.argsort(-p)[:5]]
    return {"prompt": [names[token] for token in shown], "next": likeliest, "sections": sections}

# --look replaces its own page of the last time, but no other file, whatever its name. All pages begin with
# the same 400 letters, those of the template in data/look.html, from which they are made.
def is_a_page(path: Path) -> bool:
    """Is this file one that `write_page` has written, and may write over? (The template is none.)"""
    template = DATA / "look.html"
    if not path.is_file() or path.samefile(template):
        return False
    with open(path, "rb") as file:
        return file.read(400) == read_text(template)[:400]

# The content goes into the page as JSON inside a script. A prompt may hold "</script>", and a model can write
# anything; so every sign that could end the script or begin a tag is written by its number, which JSON
# allows. (Two ends of lines of Unicode's are written so as well: some readers of JSON stumble over them.)
def write_page(content: dict, path: Path) -> None:
    """Write look.html, with this content, to `path`: whole or not at all. OSError if the disk does not take
    it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = read_text(DATA / "look.html").decode()
    with whole(path) as file:
        file.write(template.replace("DATA", text, 1).encode())

# === Chapter 31. Proving and measuring it
#
# Are the gradients right? A derivative is defined as what happens to the loss if one parameter is moved a
# little, so one can simply do that: move it up by h, move it down by h, and divide the difference of the two
# losses by 2h. In float64 and with h = 1e-5 that is good to nine digits or so. It takes two losses for every
# single number of the model and so would be no way to train; for a model of some hundred numbers it takes
# seconds. The losses are part I's, in plain operations; the gradients are those that training uses, from part
# II's programs where there are any. If you have changed the model, this is the check to run. It takes two
# batches: a gradient that is wrongly added to the one before looks right on the first.
#
# Why h = 1e-5? The formula takes a curve for a straight line, and its error grows like h^2: 1e-10 here. But
# float64 has 16 digits: a loss of 2 nats is off by some 2e-16, and so the slope by that over 2h, some 1e-11.
# A larger h makes the first error worse, a smaller h the second.
def exact_slopes(model: GPT, batches: np.ndarray, h: float = 1e-5) -> dict[str, np.ndarray]:
    """The slopes of the plain loss on each batch, by the parameters' names, from finite differences in
    float64: of shape (N, ...) for a parameter of shape (...). `batches` (N, 2, B, T) int32: what is read,
    what is predicted."""
    arrays = {name: tensor.numpy().astype(np.float64) for name, tensor in model.parameters().items()}
    slopes = {name: np.zeros((len(batches), *array.shape)) for name, array in arrays.items()}
    elsewhere = {} if Device.DEFAULT == "CPU" else {"DEV": "CPU"}  # not every other device has float64
    if elsewhere:
        find_compiler()
    with Context(**elsewhere):
        twin = GPT(model.config, PLAIN, seed=None)
        fixed = state_of(model, None)
        for name, tensor in state_of(twin, None).items():
            # The twin's tensors look into numpy's memory, and a recording reads it anew each time: so the
            # next loss is computed from what we write there. (Those that are not learned get the model's
            # numbers, too.)
            if not dtypes.is_float(tensor.dtype):
                load_array(tensor, fixed[name].numpy())
                continue
            array = arrays.setdefault(name, fixed[name].numpy().astype(np.float64))
            memory = Tensor.from_blob(array.ctypes.data, array.shape, dtype=dtypes.float64, device="CPU")
            tensor.replace(memory)
        # (Some thousand losses are to come, so they are recorded in the quickest way.)
        ops = Fast(1) if elsewhere and KNOWN else model.ops
        loss = ops.record(lambda x, y: (twin.loss(x, y).realize(),))
        # One number after the other is moved, with all others as they were. If the loss is 1.9460 with a
        # weight of 0.30001, and 1.9458 with 0.29999, its slope is 0.0002 / 0.00002 = 10.
        for name in slopes:
            array = arrays[name]
            for place in np.ndindex(array.shape):
                middle = array[place]
                array[place] = middle + h
                above = [loss(*batch)[0].item() for batch in batches]
                array[place] = middle - h
                below = [loss(*batch)[0].item() for batch in batches]
                array[place] = middle
                slopes[name][:, *place] = np.subtract(above, below) / (2 * h)
    return slopes

# The model is as small as it can be and still have all that can go wrong: two blocks, so that something is
# added up along the stream, and two heads of two channels. The gradients are computed in float32, whose seven
# digits become five or six in the sums, so the two may differ by 1e-4 of a parameter's largest gradient.
# Mistakes are far larger: a term that is forgotten is off by all of it.
RIGHT = "all gradients are right"
WRONG = "SOMETHING IS WRONG"

def tiny_model(seed: int, backend: Plain | None = None) -> tuple[GPT, np.ndarray]:
    """Such a model, and two batches for it, (2, 2, B, T) int32: what is read, and what is predicted."""
    config = GPTConfig(block_size=5, vocab_size=7, n_layer=2, n_head=2, n_embd=4)
    model = GPT(config, backend, seed=seed)
    rng = np.random.default_rng(seed)
    batches = rng.integers(0, config.vocab_size, (2, 2, 2, 5)).astype(np.int32)
    for tensor in model.parameters().values():  # so that nothing is zero by accident, and could hide errors
        load_array(tensor, tensor.numpy() + 0.1 * rng.standard_normal(tensor.shape, np.float32))
    return model, batches

def compare_gradients(seed: int, backend: Plain | None = None) -> tuple[list[tuple], float, str]:
    """Compare the gradients of a tiny model with finite differences: for each parameter its name, its shape,
    its largest gradient and the largest error; the largest error relative to a parameter's largest gradient;
    and a verdict, which is RIGHT if that is less than 1e-4."""
    model, batches = tiny_model(seed, backend)
    parameters = model.parameters()
    slopes = exact_slopes(model, batches)

    def backward(x, y):  # as training does: the loss, and its gradient for all parameters at once
        loss = model.loss(x, y)
        gradients = loss.gradient(*parameters.values())
        Tensor.realize(loss, *gradients)
        return gradients
    recorded = model.ops.record(backward)
    found = [recorded(*batch) for batch in batches]
    table = []
    worst = 0.0
    largest = max(np.abs(slope).max() for slope in slopes.values())
    for name, *got in zip(parameters, *found, strict=True):
        size = np.abs(slopes[name]).max()
        error = np.abs(got - slopes[name]).max()
        # Some gradients have to be zero, and then an error relative to them says nothing: a bias that is
        # added to all keys adds the same to all scores of a query, which softmax does not see.
        worst = np.maximum(worst, error / max(size, 1e-2 * largest))  # (which stays NaN, if it ever is)
        table.append((name, parameters[name].shape, size, error))
    if worst < 1e-4:  # (a NaN is not)
        return table, worst, RIGHT
    # Slopes in float64 hardly depend on h. But if a model rounds to float32, say by .float(), its losses have
    # steps of 1e-7; divided by 2h, that is 0.006 of noise, and with another h it is another noise. Then it is
    # not the gradients that are at fault, but what we measure them by.
    others = exact_slopes(model, batches, 3e-5)
    if max(np.abs(others[name] - slope).max() for name, slope in slopes.items()) > 1e-5 * largest:
        return table, worst, ("this says nothing, since the finite differences change with h. "
                              "Does the model round its numbers, as .float() does?")
    return table, worst, WRONG

# Right gradients do not make a right model. Whoever changes attention can lose the mask, or shift tokens the
# wrong way, and then a token sees what it is to predict. The loss falls all the same, even further, since to
# copy is easy; only what the model writes is nonsense. A norm over the batch is no better: when the model
# writes, there are no other passages. So we change the last token of a passage and all of the one beside it,
# and ask whether any other guess of the first changes. (Noise that a model draws changes them, too: hence
# the second look at the same passages.)
PEEKS = "a guess changes with tokens after it, or with other passages: its loss misleads. Is there a mask?"

def peeks(seed: int, backend: Plain | None = None) -> bool:
    """Does a tiny model see tokens that it must not see?"""
    model, batches = tiny_model(seed, backend)
    ids = batches[0, 0]                                               # (2, T): two passages
    others = (ids + 1) % model.config.vocab_size
    others[0, :-1] = ids[0, :-1]
    guesses = model.ops.record(lambda idx: (model(idx).realize(),))
    first, again, changed = (guesses(passages)[0][0, :-1] for passages in (ids, ids, others))
    by_itself = np.abs(again - first).max()
    return bool(np.abs(changed - first).max() > 1e-4 * np.abs(first).max() + 10 * by_itself)

def gradcheck(seed: int, backend: Plain | None = None) -> bool:
    """Print such a comparison, and return whether all gradients are right."""
    show("computing the loss with each parameter a little larger and a little smaller ...")
    table, worst, verdict = compare_gradients(seed, backend)
    tell(f"{'parameter':<24}{'shape':>10}{'largest gradient':>18}{'largest error':>16}")
    for name, shape, size, error in table:
        tell(f"{name:<24}{str(shape).replace(' ', ''):>10}{size:>18.6f}{error:>16.1e}")
    tell(f"largest relative error {worst:.1e}: {verdict}")
    if peeks(seed, backend):
        tell(f"but {PEEKS}")
    return verdict == RIGHT

# Is it fast? Milliseconds do not tell, since machines differ. So we count the operations that a step cannot
# do without, and compare what we reach with the rate of this machine's best-tuned program, numpy's product of
# matrices.
#
# How many are they? A product of (N, I) and (I, O) takes N * I * O multiplications and as many additions: two
# operations for each weight and token. A block has C x 3C weights for queries, keys and values, C x C for
# c_proj, and twice C x 4C in the MLP: 12 C^2 in all; the head has V C. On the way back, each product has two
# more of its size, one for the gradient of the weights and one for that of the input. So a weight costs 6 for
# each token. Attention compares each token with T / 2 others on average, with C multiplications for the
# scores and C for the values: it costs as much as T C more weights.
def step_flops(config: GPTConfig, train_config: TrainConfig) -> float:
    """The floating-point operations that a training step cannot do without."""
    C = config.n_embd
    weights = 12 * config.n_layer * C**2 + config.vocab_size * C
    attention = config.n_layer * config.block_size * C
    return 6 * tokens_a_step(train_config, config.block_size) * (weights + attention)

def blas_gflops() -> float:
    """The rate of numpy's float32 matrix product on this machine, in billions of operations a second: the
    best of five."""
    # The best one counts, since whatever else runs on the machine can only make a product slower.
    a = np.ones((1024, 1024), np.float32)
    with np.errstate(all="ignore"):  # (on ARM, numpy's library may warn of what has not happened)
        return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5)) / 1e9

# The first steps compile and record, so they are not counted. Writing is timed from where the context is
# full, since from there on it goes on like that for ever.
def bench(what: str, config: GPTConfig, train_config: TrainConfig, backend: Plain | None = None) -> None:
    """Time training steps ("step") or writing ("sample") on random data. The last line printed is JSON."""
    if what == "step":
        check_memory(config, train_config, backend)
    model = GPT(config, backend)
    parameters = model.parameters()
    if isinstance(backend, Packed):
        restore(model, {name: tensor.numpy() for name, tensor in parameters.items()}, "noise")
    if what == "step":
        data = np.random.default_rng(0).integers(0, config.vocab_size, 200_000)
        optimizer = AdamW(model, train_config)
        work = (optimizer(data, i) for i in range(60))
        warm_up = 4
        flops = step_flops(config, train_config)
    else:  # by then the context was full once, and everything that is needed has been compiled
        work = Writer(model).stream([0], config.block_size + 401, seed=0)
        warm_up = config.block_size + 1
        # A token costs a multiplication and an addition for each weight; nothing goes back.
        flops = 2 * (12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd)
    # Python asks for the time after each step or token: the differences are what they took.
    times = [time.perf_counter() for _ in work]
    seconds = np.diff(times)[warm_up:]
    # The median passes over what else the machine did. But that some tokens take longer, since half the
    # context is read again, belongs to writing.
    second = float(np.median(seconds) if what == "step" else seconds.mean())
    speed = {"ms_per_step": 1e3 * second} if what == "step" else {"tokens_per_s": 1 / second}
    result = {"bench": what, "parameters": sum(tensor.numel() for tensor in parameters.values())} | speed
    memory_unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / memory_unit
    result |= {"gflops": flops / second / 1e9, "peak_mb": peak, "blas_gflops": blas_gflops()}
    print(json.dumps(result), flush=True)  # (one line, and the last one, so that a script can read it)

# Before a run takes memory, it is worth asking whether there is enough: a system that has run out ends
# programs without a word. There are four numbers of 4 bytes for each parameter: itself, its gradient, Adam's
# two averages. For each token of a batch there are V logits with their gradients, and about 18 C numbers in
# each block that the way back needs; part I's operations take three times as much, and attention's weights
# besides. So the recipe "coffee" of chapter 32 takes 55 MB for its 3.45 million parameters, and 84 MB for a
# batch of 1024 tokens, 82 KB for each. An exam keeps only the logits, and what one block works on.
#
# How much there is, the system tells: on Linux in /proc/meminfo, which only looks like a file. A container
# may be allowed less. Where nobody tells, we hope for the best.
def memory_available() -> float:
    """How many bytes this process can still get, as far as the system tells."""
    # "Available" is more than "free": it counts what the system would give back if somebody needs it, such as
    # copies of files.
    limits = [math.inf]
    with suppress(OSError):
        told = Path("/proc/meminfo").read_text()
        limits += [1024 * int(kilobytes) for kilobytes in re.findall(r"MemAvailable: +(\d+) kB", told)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's, in newer and older Linux
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits)

def check_memory(config: GPTConfig, train_config: TrainConfig, backend: Plain, learns: bool = True) -> None:
    """UserError, with the flag to change, if a run on the CPU (or an exam, which does not learn) would take
    more memory than there is."""
    V = config.vocab_size
    C = config.n_embd
    a_token = 8 * V + 72 * config.n_layer * C if learns else 4 * V + 40 * C
    if not isinstance(backend, Fast):
        kept = config.n_layer if learns else 1
        a_token += kept * (168 * C + 24 * config.n_head * config.block_size)
    # (A token of a batch is a place in the text, 8 bytes, and an id, 4 bytes, in some copies of both.)
    passages = 32 * tokens_a_step(train_config, config.block_size)
    for_batches = a_token * train_config.batch_size * config.block_size + passages
    for_parameters = 4 * (4 if learns else 1) * size_of(config)
    needed = for_parameters + for_batches
    available = memory_available()
    if Device.DEFAULT == "CPU" and needed >= available:
        by_size = for_parameters > for_batches
        flag = f"--n-embd than {config.n_embd}" if by_size else f"--batch-size than {train_config.batch_size}"
        raise UserError(f"this would take about {needed / 1e9:,.1f} GB of memory, and "
                        f"{available / 1e9:,.1f} GB are free: choose a smaller {flag}")

# === Chapter 32. The command line
#
# Every field of the configs is a flag. Where a flag is not given, the command line has some defaults of its
# own, for a first run of about a minute that ends with verse; part I's are for whoever uses the file as a
# library.
#
# A newcomer's first meeting with a program is often a mistake, and what they see then decides whether they
# stay. So every mistake gets one line that names the flag or the file and says what to do. And none loses
# anything: what was there is touched only when the first step of a run has gone well.
DEFAULTS = {"vocab_size": 1024, "batch_size": 12, "max_iters": 2000, "eval_interval": 200,
            "learning_rate": 4e-3}

# Ten minutes deserve a larger model than one minute does. Which one, with which numbers? There are three
# recipes, found by experiment on two cores, for a text of about a megabyte. They replace defaults, and a flag
# that is given still counts more. All of them let the step size fall to zero.
#
# The longer a run, the more often it reads the same text, and the better it knows that by heart. *Dropout*
# (chapter 6) helps: the model never sees all of a line, and so cannot learn it as it stands. *Weight decay*
# (chapter 8) makes it forget what it does not meet again and again. Both slow learning down, so they follow
# from how often the text is read: the dropout is 1 % for each time after the seventh, 15 % at most, and the
# weight decay 1/60 for each time, 0.1 at least. On tiny Shakespeare, for example, "coffee" takes 7600 steps
# of 8 x 128 tokens. There are 411,000 to learn from, which are read 19 times, with a dropout of 0.12 and a
# weight decay of 0.32.
#
# A short text gets fewer steps, for after 26 readings it gets worse. And below half a megabyte every effort
# is "quick", whose small model learns less by heart: on our play of 138 KB, "coffee" ends at 2.03 bits a
# byte, "quick" at 1.99. More is not better for ever, either. A model of 11 million parameters (6 layers, 6
# heads, 384 channels) came to 2.198 on tiny Shakespeare after 36 minutes, and was at 2.234 after an hour. So
# "lunch" has a model of the size of "coffee", which looks further back. It has only 512 tokens, since of a
# thousand many come too seldom in a megabyte to be learned well.
RECIPES = {
    "quick": {"n_embd": 128, "block_size": 64, "batch_size": 12, "learning_rate": 4e-3, "max_iters": 3600},
    "coffee": {"n_embd": 256, "block_size": 128, "batch_size": 8, "learning_rate": 2e-3, "max_iters": 7600},
    "lunch": {"vocab_size": 512, "n_embd": 256, "block_size": 192, "batch_size": 6, "learning_rate": 2e-3,
              "max_iters": 11400}}
REACHES = {"quick": 2.20, "coffee": 2.10, "lunch": 2.07}  # bits a byte on tiny Shakespeare
MOST_READINGS = 26
SHORT_TEXT = 500_000  # bytes

EXAMPLES = """examples:
  python minimiggy.py --train                             learn from tiny Shakespeare
  python minimiggy.py --train --effort coffee             learn for about ten minutes, and better
  python minimiggy.py --train --data my.txt               learn from your own text
  python minimiggy.py --resume --max-iters 4000           go on where the newest checkpoint left off
  python minimiggy.py --sample "ROMEO:" --top-k 40        let the best checkpoint write
  python minimiggy.py --look "ROMEO: But soft"            see what goes on in it, in a browser
  python minimiggy.py --train --init-from gpt2 --data my.txt --learning-rate 3e-5 --max-iters 50"""

# argparse answers a mistake with a page of usage, and ends the program itself. We want one line, and an exit
# code that `main` returns.
class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line in place of argparse's page of usage."""
        raise UserError(f"{message} (python minimiggy.py --help lists the flags)")

    def print_help(self, file=None):
        """As argparse does it, but an error is not passed over."""
        tell(self.format_help(), end="")

# The flags come in groups, as `--help` lists them: what to do; files; the machine; and then the three
# configs, whose flags, help texts and defaults are read off the configs themselves. `argparse` does the rest.
# So `n_layer` becomes --n-layer, takes a whole number as its default is one, and is explained by the comment
# that stands behind it in chapter 5. A config's flag that nobody has given is None, so that we can tell it
# from one that was given its default's value: `--resume --batch-size 12` asks for 12 whatever the run had
# before.
def make_parser() -> Parser:
    """The flags: what to do, with which files, on which machine, and every knob."""
    parser = Parser(usage="python minimiggy.py WHAT [flags]", epilog=EXAMPLES, allow_abbrev=False,
                    description="Train, sample and read a GPT in one file.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_actions(parser)
    add_files(parser)
    group = parser.add_argument_group("the machine")
    group.add_argument("--devices", type=int, metavar="N", help=f"CPU cores to use (default: all, {CORES})")
    group.add_argument("--plain", action="store_true", help="part I's operations, without part II's programs")
    group.add_argument("--weights", choices=["f32", "bf16", "int8"], default="f32",
                       help="bits of a weight, to write or examine with: 32, 16 or 8 (default: %(default)s)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    comments = dict(re.findall("(?m)^    ([a-z0-9_]+): .*# (.*)", Path(__file__).read_text("utf-8")))
    for title, kind in (("the model", GPTConfig), ("training", TrainConfig), ("sampling", SampleConfig)):
        group = parser.add_argument_group(title)
        add_knobs(group, kind, comments)
    group.add_argument("--stop", metavar="TEXT", default="", help="end a text before TEXT")
    return parser

def add_actions(parser: Parser) -> None:
    """The flags that say what to do."""
    group = parser.add_argument_group("what to do (one of these)")
    flag = group.add_mutually_exclusive_group(required=True).add_argument
    flag("--train", action="store_true", help="train a model from the start")
    flag("--resume", action="store_true", help="go on training from the newest checkpoint in --out-dir")
    flag("--sample", metavar="PROMPT", help="write on after PROMPT (FILE:name: from a file, -: from stdin)")
    flag("--eval-only", action="store_true", help="the best checkpoint's loss on the whole validation text")
    flag("--export", metavar="DIR", help="write the best checkpoint for Hugging Face's transformers")
    flag("--look", metavar="PROMPT", nargs="?", const="", help="write a page that shows how the best "
         "checkpoint reads PROMPT, or the opening of the validation text")
    flag("--plot", metavar="DIR", nargs="+", help="draw the logs of runs into the first one's plot.png")
    flag("--gradcheck", action="store_true", help="compare all gradients with finite differences")
    flag("--bench", choices=["step", "sample"], help="time training steps or sampling, on random data")
    flag("--version", action="store_true", help="say which version this is")

def add_files(parser: Parser) -> None:
    """The flags that say which text, which weights, and where to keep what is made."""
    group = parser.add_argument_group("text and files")
    flag = group.add_argument
    one_of = group.add_mutually_exclusive_group().add_argument
    flag("--data", metavar="NAME|FILE", help="shakespeare (the default), play, or a UTF-8 text file")
    flag("--replace-bad-bytes", action="store_true", help="read bytes that are not UTF-8 as U+FFFD")
    flag("--tokenizer", choices=["bpe", "bytes", "gpt2"],
         help="learn a vocabulary from the text (the default), use plain bytes, or GPT-2's 50257 tokens")
    flag("--out-dir", metavar="DIR", default="checkpoints",
         help="where checkpoints, log.csv and samples.txt are (default: %(default)s)")
    one_of("--checkpoint", metavar="FILE", help="use this one, not the best (or newest) in --out-dir")
    one_of("--init-from", metavar="GPT2", help="begin with, or use, the weights of a GPT-2: a .safetensors "
           f"file, a folder that has one, or {', '.join(HUB_MODELS)}, which are downloaded")
    flag("--out", metavar="FILE", help="where --look writes its page (default: look.html)")
    one_of("--effort", choices=list(RECIPES), help="train for about 1.5, 10 or 19 minutes on two "
           "cores, with a model of the size that is best for that (other flags still count)")
    flag("--no-checkpoint", action="store_const", const=0, dest="keep", help="the same as --keep 0")

def add_knobs(group, kind: type, comments: dict[str, str]) -> None:
    """A flag for each field of a config, written with hyphens or, as in Python, with underscores."""
    for field in dataclasses.fields(kind):
        # Two names, or one where they are equal; `fromkeys` keeps the order, which a set would not.
        names = dict.fromkeys([flag_of(field.name), f"--{field.name}"])
        default = DEFAULTS.get(field.name, field.default)
        text = f"{comments.get(field.name, '').replace('%', '%%')} (default: {default})"
        of = type(field.default)
        if of is bool:
            group.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "N" if of is int else "X"
            group.add_argument(*names, dest=field.name, type=of, metavar=metavar, help=text)

# Ranges and contradictions are checked first: whoever has typed one wrong number need not wait for a
# download to hear of it. A flag that would have no effect, as in `--resume --effort coffee`, is refused as
# well: better now than noticed after an hour. To find that out, we list for each action which flags it looks
# at. So a new flag has to be put into one of the sets below.
OF_A_RUN = {"max_iters", "eval_interval", "eval_iters", "save_every", "keep"}

def flags_of_actions() -> dict[str, set[str]]:
    """For each action, the names of the flags that it looks at, besides those that all do."""
    model, plan, writing = ({field.name for field in dataclasses.fields(kind)}
                            for kind in (GPTConfig, TrainConfig, SampleConfig))
    model |= {"tokenizer", "out_dir"}
    text = {"data", "replace_bad_bytes"}
    one = {"checkpoint", "init_from"}
    return {
        "train": model | plan | text | {"init_from", "effort"},
        "resume": model | plan | text | {"checkpoint"},
        "sample": model | writing | one | {"replace_bad_bytes", "seed", "stop", "weights"},
        "eval_only": model | text | one | {"batch_size", "weights"}, "export": model | one,
        "look": model | text | one | {"out"},
        "bench": model - {"tokenizer", "out_dir"} | plan - OF_A_RUN | {"effort", "weights"},
        "gradcheck": {"seed"}, "plot": set(), "version": set()}

def check_flags(args: argparse.Namespace) -> None:
    """UserError if a flag's value is out of its range, or flags contradict each other."""
    if args.out and args.look is None:
        raise UserError("--out is where --look writes its page; the folder of a run is --out-dir")
    theirs = flags_of_actions()
    what = next(name for name in theirs if getattr(args, name) not in (None, False))
    looked_at = theirs[what] | {what, "plain", "devices", "debug"}
    for name, value in vars(args).items():
        if value == "" and name not in ("sample", "look", "stop"):
            raise UserError(f"{flag_of(name)} is empty")
        if value is not None:
            check_value(name, value, type(value))
        # (To Python, 0 == False, so `in (None, False)` would take --seed 0 for no flag. The last three are
        # what --stop, --weights and --out-dir have if nobody has given them.)
        is_given = value is not None and value is not False and value not in ("", "f32", "checkpoints")
        if is_given and name not in looked_at:
            raise UserError(f"{flag_of(name)} has no meaning for {flag_of(what)}: leave it out")
    page = Path(args.out or "look.html")
    if args.look is not None and page.exists() and not is_a_page(page):
        raise UserError(f"{page} is a folder, or another file than a page of --look's: give another --out")
    if args.weights != "f32" and args.bench == "step":
        raise UserError(f"--weights {args.weights} is for writing: --bench sample")
    if args.vocab_size and args.tokenizer in ("bytes", "gpt2"):
        raise UserError(f"--tokenizer {args.tokenizer} has its own tokens: leave --vocab-size out")

# *With which operations?* With part II's where they run, on all cores, unless the flags say otherwise. There
# is no switch somewhere in the program: the backend is an object, which is made here and handed on to the
# model.
def choose_backend(args: argparse.Namespace) -> Plain:
    """The operations that the flags ask for; UserError if --devices or --weights is given where it means
    nothing."""
    backend = PLAIN if args.plain else BACKENDS[-1]
    if args.devices is None and args.weights == "f32":
        return backend
    if not isinstance(backend, Fast):
        raise UserError("--devices and --weights are for part II's programs, but here part I's run")
    cores = min(CORES, args.devices or backend.cores)
    if args.devices and args.devices > CORES:
        print(f"--devices {args.devices}: there are {CORES} cores, so {CORES} are used", file=sys.stderr)
    return Fast(cores) if args.weights == "f32" else Packed(cores, args.weights)

# *With which numbers?* Five sources are asked in turn. What a user has typed counts most. A checkpoint comes
# next: a resumed run goes on as it began. Then come the recipe of an --effort, the defaults of this chapter,
# and last those of part I. The smallest learning rate, unless it is given, is a tenth of the largest, or with
# a recipe zero. With `--train --effort coffee --n-layer 5`, for example, the five layers are the user's, the
# 7600 steps the recipe's, the vocabulary of 1024 tokens is this chapter's choice, and beta1 is part I's.
def chosen(args: argparse.Namespace, kind: type, saved=None):
    """A config of a `kind`: each field from the user's flag, else from a `saved` config, else from the recipe
    of --effort, else the command line's default, else part I's. UserError if a value cannot be."""
    before = dataclasses.asdict(saved) if saved else DEFAULTS | RECIPES.get(args.effort, {})
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = [field.name for field in dataclasses.fields(kind)]
    config = kind(**{name: value for name, value in (before | given).items() if name in names})
    if kind is TrainConfig and args.min_lr is None:
        if not saved:
            config.min_lr = 0.0 if args.effort else config.learning_rate / 10
        elif saved.learning_rate not in (0, config.learning_rate):
            config.min_lr = saved.min_lr * config.learning_rate / saved.learning_rate
    check_config(config)
    return config

# *Which model?* Writing, examining and exporting all need one: the best checkpoint of a folder (or, to go on
# training, the newest), a certain one, or a GPT-2 from elsewhere. The model's size is then what it is. A flag
# that speaks of another size was meant for another model, and to ignore it would be worse than to refuse.
def open_model(args: argparse.Namespace, backend: Plain) -> Checkpoint:
    """The model that the flags ask for, as `open_checkpoint` returns it; one from elsewhere has no step and
    no arrays. UserError if other flags speak of another model."""
    if args.init_from:  # here, block_size and dropout may be chosen anew
        model = init_from(args.init_from, args.block_size, backend)
        model.config.dropout = args.dropout or 0.0
        opened = Checkpoint(model, chosen(args, TrainConfig), 0, Path(args.init_from), None)
    elif args.checkpoint:
        opened = open_checkpoint(args.checkpoint, backend)
    else:
        opened = open_first(newest_first(Path(args.out_dir), best=not args.resume), backend)
    # What the model is, by the names of the flags; whatever the user has said must be that, or nothing.
    tokenizer = opened.model.tokenizer
    has = dataclasses.asdict(opened.model.config) | {"tokenizer": getattr(tokenizer, "name", None)}
    if tokenizer and tokenizer.vocab_size == 256:
        has["tokenizer"] = "bytes"
    for name, value in has.items():
        wanted = getattr(args, name)
        if wanted not in (None, value):
            raise UserError(f"{flag_of(name)} {wanted} contradicts {opened.path}, whose model has {value}")
    if isinstance(backend, Packed) and not is_as_in_part_one(opened.model):
        raise UserError(f"--weights {args.weights} is for part I's model as it is: leave the flag out")
    if tokenizer is None and not args.export:
        raise UserError(f"{opened.path} has no tokenizer that we know, so its model cannot read text")
    return opened

# *Which text?* It is needed as token ids, together with a few facts about it: its name, so that a resumed run
# finds it again, and its SHA-256, so that it notices if the text has changed. The text itself is let go as
# soon as it has been encoded. Ten pieces of a megabyte, spread over it, are enough to learn a vocabulary.
Corpus = namedtuple("Corpus", "name sha256 n_bytes tokenizer train val")

def asked_or_learned(args: argparse.Namespace, opened: Checkpoint | None) -> tuple[bytearray, str]:
    """The text that --data asks for, or else the one that a model learned from, or else the default; and its
    name, as from `load_text`."""
    source = opened and opened.model.source or {}
    learned = source.get("data")
    if opened and opened.arrays and not (args.data or learned):
        raise UserError(f"{opened.path} does not say what it has learned from: give the text with --data")
    text, name = load_text(args.data or learned, args.replace_bad_bytes)
    if name == learned and hashlib.sha256(text).hexdigest() != source.get("data_sha256"):
        say(f"{name} has changed since {opened.path} was saved")
    return text, name

# To learn the vocabulary of a megabyte takes most of a second. The next run mostly wants the same, so it is
# kept beside the programs (13.3), under a name that says from which text, and by which rules, it was learned.
# This is for part I's tokenizer as it is: who has put other functions there, in the file or in a running
# program, wants to see what these do.
def rules_for_tokens() -> tuple:
    """All that decides which tokens are learned, as it stands now."""
    return learn_merges, merge, LONGEST, SPLIT, BPETokenizer, dict(vars(BPETokenizer))

RULES_FOR_TOKENS = rules_for_tokens()

def learned_tokenizer(text: str, vocab_size: int) -> BPETokenizer:
    """`BPETokenizer.train`, or what that gave for the same text the last time."""
    show(f"learning a vocabulary from {len(text) / 1e6:.1f} MB ...")
    if not TOKENIZER_IS_OURS or rules_for_tokens() != RULES_FOR_TOKENS:
        return BPETokenizer.train(text, vocab_size)
    wanted = f"{digest('learn_merges', 'merge', 'LONGEST')} {vocab_size} {text}".encode("utf-8", "replace")
    name = f"tokenizer-{hashlib.sha256(wanted).hexdigest()[:16]}"
    for folder in own_folders():
        with suppress(OSError, Damaged):
            checksum, _, saved = (folder / name).read_bytes().partition(b"\n")
            if hashlib.sha256(saved).hexdigest().encode() == checksum:
                return tokenizer_from_json(saved.decode())
    tokenizer = BPETokenizer.train(text, vocab_size)
    with suppress(OSError, UserError), whole(cache_folder() / name) as file:
        saved = tokenizer_to_json(tokenizer).encode()
        file.write(hashlib.sha256(saved).hexdigest().encode() + b"\n" + saved)
    return tokenizer

def read_corpus(args: argparse.Namespace, opened: Checkpoint | None) -> Corpus:
    """The text to train on, encoded: by the tokenizer of the model that is there, or by the one that
    --tokenizer asks for. A short text changes --effort."""
    text, name = asked_or_learned(args, opened)
    if not text:
        raise UserError(f"{name} is empty: there is nothing to learn from")
    if args.effort and len(text) < SHORT_TEXT:
        args.effort = "quick"
    train_text, val_text = split_text(text)
    if opened:
        tokenizer = opened.model.tokenizer
    elif args.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        # (A piece may begin or end in the middle of a character; "ignore" drops the bytes of such a half.)
        places = range(0, len(train_text), max(1 << 20, len(train_text) // 10))
        pieces = [str(train_text[place:place + (1 << 20)], "utf-8", "ignore") for place in places]
        vocab_size = 256 if args.tokenizer == "bytes" else chosen(args, GPTConfig).vocab_size
        tokenizer = learned_tokenizer("".join(pieces), vocab_size)
    show(f"encoding {len(text) / 1e6:.1f} MB ...")
    train_ids = tokenizer.encode_array(train_text)
    val_ids = tokenizer.encode_array(val_text)
    return Corpus(name, hashlib.sha256(text).hexdigest(), len(text), tokenizer, train_ids, val_ids)

# *Training* begins anew, or with a model from elsewhere, or goes on from a checkpoint. The three differ only
# in what is there already. What is going to happen is said first, in four lines: with a wrong text or the
# wrong size, one sees it before an hour has passed. How long it will take is said a moment later, when a few
# steps have been measured (chapter 27).
def readings(config: TrainConfig, T: int, n_tokens: int) -> float:
    """How often a run reads its text of so many tokens, in passages of T."""
    return config.max_iters * tokens_a_step(config, T) / n_tokens

# The play, for example, has 44,900 tokens to learn from. The 3600 steps of "quick" are 2.8 million tokens, or
# 62 readings. So it gets 1521 steps, which are 26, and with them a dropout of 0.15 and a weight decay of 26 /
# 60 = 0.43.
def fit_recipe(args: argparse.Namespace, gpt_config: GPTConfig, config: TrainConfig, n_tokens: int) -> None:
    """Give a recipe the steps, the dropout and the weight decay for a text of `n_tokens`, unless flags
    have."""
    times = readings(config, gpt_config.block_size, n_tokens)
    if times > MOST_READINGS and args.max_iters is None:
        config.max_iters = math.ceil(config.max_iters * MOST_READINGS / times)
    if args.eval_interval is None:
        config.eval_interval = math.ceil(config.max_iters / 10)
    # With fewer steps, the text is read less often: the remedies go by how often that really is.
    times = readings(config, gpt_config.block_size, n_tokens)
    if args.dropout is None:
        gpt_config.dropout = min(0.15, max(0.0, round((times - 7) / 100, 2)))
    if args.weight_decay is None:
        config.weight_decay = max(0.1, round(times / 60, 2))

# A checkpoint has everything but the text, a model from elsewhere no config for training, and a new model
# begins with the text, whose vocabulary decides how large its table has to be.
def prepare(args: argparse.Namespace, backend: Plain, opened: Checkpoint | None) -> tuple[AdamW, Corpus]:
    """For --train and --resume: an optimizer, with its model and its config, and the text. What flags say of
    training replaces what a checkpoint says."""
    corpus = read_corpus(args, opened)  # (this may change --effort, and so what is chosen)
    config = chosen(args, TrainConfig, opened.config if args.resume else None)
    gpt_config = opened.model.config if opened else chosen(args, GPTConfig)
    if not opened:
        gpt_config.vocab_size = corpus.tokenizer.vocab_size
    checked("training", corpus.train, gpt_config)
    checked("validation", corpus.val, gpt_config)
    if args.effort:
        fit_recipe(args, gpt_config, config, len(corpus.train))
    check_memory(gpt_config, config, backend)
    model = opened.model if opened else GPT(gpt_config, backend, seed=config.seed)
    model.tokenizer = corpus.tokenizer
    # With another text, exams are others, and none is better or worse than those before: it is another run.
    source = dict(model.source or {})
    if source.get("data_sha256", corpus.sha256) != corpus.sha256:
        source.pop("run", None)
    model.source = source | {"data": corpus.name, "data_sha256": corpus.sha256}
    optimizer = AdamW(model, config)
    if args.resume:
        restore(model, opened.arrays, opened.path, optimizer)
    return optimizer, corpus

def check_room(model: GPT, out_dir: Path) -> None:
    """UserError if the disk has no room for a checkpoint: better now than after the first hour."""
    size = 3 * sum(tensor.nbytes() for tensor in model.parameters().values())
    free = shutil.disk_usage(out_dir).free
    if free < size:
        raise UserError(f"a checkpoint takes {size / 1e6:,.1f} MB, and the disk of {out_dir} has "
                        f"{free / 1e6:,.1f} MB left: choose another --out-dir, or --keep 0")

# tinygrad computes where DEV says, and whoever has never heard of DEV will not miss the GPU that they have.
# So we look for one, and tell.
def unused_gpu(root: Path = Path("/")) -> str:
    """What to set DEV to for a GPU that this machine seems to have, or "". This looks for files, below
    `root`, since to ask a driver can take seconds."""
    if sys.platform == "darwin":
        return "METAL" if platform.machine() == "arm64" else ""
    drivers = {"dev/nvidia0": "CUDA", "usr/lib/wsl/lib/libcuda.so.1": "CUDA", "dev/kfd": "AMD"}
    for file, device in drivers.items():
        if (root / file).exists():
            return device
    vendors = [path.name for path in (root / "etc/OpenCL/vendors").glob("*.icd")]
    has_gpu = (root / "dev/dri/renderD128").exists() and any("pocl" not in name for name in vendors)
    return "CL" if has_gpu else ""  # (pocl is OpenCL on the CPU)

def size_in_words(model: GPT) -> str:
    """How large a model is."""
    n = sum(math.prod(tensor.shape) for tensor in model.parameters().values())
    c = model.config
    return (f"{n / 1e6:.2f} million parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
            f"{c.block_size} tokens of context")

def introduce(model: GPT, config: TrainConfig, start: int, corpus: Corpus, effort: str | None) -> None:
    """Say what is going to be trained, on what, and what to expect of it."""
    T = model.config.block_size
    tokenizer = corpus.tokenizer
    each = corpus.n_bytes / (len(corpus.train) + len(corpus.val))
    fast = isinstance(model.ops, Fast)
    where = f"{Device.DEFAULT} ({model.ops.cores} cores)" if fast else Device.DEFAULT
    batch = f"{config.grad_accum * config.batch_size} x {T} tokens each"
    say(f"text       {corpus.name}: {corpus.n_bytes:,} bytes, 90 % to learn from, 10 % to be examined on")
    kind = getattr(tokenizer, "name", "your own")
    say(f"tokenizer  {kind}: {tokenizer.vocab_size:,} tokens, {each:.2f} bytes each on average")
    say(f"model      {size_in_words(model)}")
    say(f"training   steps {start + 1} to {config.max_iters}, {batch}, on {where}")
    if effort:
        times = f"{readings(config, T, len(corpus.train)):.0f} times through the text"
        forgetting = f"dropout {model.config.dropout:g}, weight decay {config.weight_decay:g}"
        why = ", as always for a text as short as this" if corpus.n_bytes < SHORT_TEXT else ""
        say(f"effort     {effort}{why}: {times}, {forgetting}")
    # How far a recipe comes was measured with just its numbers, so we promise nothing if a flag or a short
    # text has changed one. (`<=` asks whether all of them are among those that hold now.)
    if effort and RECIPES[effort].items() <= (vars(model.config) | vars(config)).items():
        say(f"           on tiny Shakespeare, this comes to about {REACHES[effort]:.2f} bits/byte")
    if WHY_PLAIN:
        say(f"note       {WHY_PLAIN}")
    if os.environ["DEV"] == "CPU" and unused_gpu():
        say(f"note       there seems to be a GPU: DEV={unused_gpu()} python minimiggy.py --train uses it, "
            "but part II's programs are for the CPU only")
    if CHANGED and fast:
        say(f"note       changed in part I, and so computed the plain way: {', '.join(CHANGED)}")
    places = {"": globals()} | {f"{kind.__name__}.": vars(kind) for kind in LAYERS}
    lost = [place + name for place, things in places.items() for name, thing in things.items()
            if isinstance(thing, Tensor)]
    if lost:  # (`get_state_dict` sees only what the objects have)
        say(f"note       neither trained nor saved: {', '.join(lost)}; make it in an __init__, as self.NAME")
    # `.realize()` in the middle of a network makes numbers of what was a recipe, and no slope goes through a
    # number. The loss would fall all the same, only less. So a changed model is examined first.
    if not is_as_in_part_one(model):
        again = made_anew(model)  # (not to change what the model itself may count, or average)
        if not isinstance(again(Tensor.zeros(1, model.config.block_size, dtype=dtypes.int32)), Tensor):
            raise UserError("model(idx) has to give the logits and nothing else, for exams and for writing")
        if names := untrained(again):
            say(f"note       without a part in the loss, and so not trained: {', '.join(names)}")
        with suppress(Exception):  # (it may not be possible to make one that is so small)
            if peeks(config.seed, model.ops):
                say(f"note       {PEEKS}")
            if compare_gradients(config.seed, model.ops)[-1] == WRONG:
                say("note       the changed model's gradients are not the slopes of its loss, as --gradcheck "
                    "shows: is there a .detach() or .realize() in it?")

# At the end one sees what came of it, and how well the machine was used: a step's operations (chapter 31) and
# the median speed give operations a second, and numpy's product of matrices, which is timed now, says how
# many are possible.
def conclude(model: GPT, config: TrainConfig, out_dir: Path, flags: str) -> None:
    """Show the curve of a finished run, how fast it was, and what to type next."""
    log = read_log(out_dir / "log.csv")
    if curve := chart(column(log, "val_bpb")):
        say(f"\nbits per byte on the validation text\n{curve}")
    gflop = step_flops(model.config, config) / 1e9
    tokens_per_s = np.median([number for _, number in column(log, "tokens_per_s")])
    speed = gflop * tokens_per_s / tokens_a_step(config, model.config.block_size)
    say(f"\n{gflop:.1f} GFLOP a step, {speed:.0f} GFLOP a second: {speed / blas_gflops():.0%} of this "
        "machine's rate for a matrix product in numpy")
    if config.keep:
        path = out_dir / f"ckpt_{config.max_iters}.safetensors"
        best = newest_first(out_dir, best=True)[0]
        if best != path:
            say(f"\nthe best on the validation text was {best.name}: that is what --sample takes")
        say(f'\nsaved {path}; now try: python minimiggy.py --sample "ROMEO:"{flags}')

# First all that can be refused is refused: a checkpoint that does not open, a text that is too short, a disk
# without room. Then the four lines are printed. Then the first step is taken, which may fail as well, for
# want of memory, say.
def run_train(args: argparse.Namespace, backend: Plain) -> int:
    """--train and --resume; returns the exit code."""
    out_dir = Path(args.out_dir)
    opened = open_model(args, backend) if args.resume or args.init_from else None
    start = opened.step if args.resume else 0
    if args.resume and start >= chosen(args, TrainConfig, opened.config).max_iters:
        say(f"{opened.path} has all its {start} steps: to go on, give a higher --max-iters")
        return 0
    optimizer, corpus = prepare(args, backend, opened)
    model = optimizer.model
    config = optimizer.config
    own = checkpoints(out_dir, model.source.get("run")) if args.resume else {}
    if config.keep and len(own) < 2:  # (with more, a run that goes on can make room)
        check_room(model, out_dir)
    introduce(model, config, start, corpus, args.effort)
    source = opened.path if args.resume else None
    opened = None  # (so that its arrays are let go)
    with finishing_the_step() as stop:
        done = train(model, config, corpus.train, corpus.val, optimizer=optimizer, start=start,
                     out_dir=out_dir, stop=stop, source=source, locked=True)
    if done is None:
        say("stopped before the first step was over: nothing has been touched")
        return 128 + stop[0]
    flags = "" if args.out_dir == "checkpoints" else f" --out-dir {shlex.quote(args.out_dir)}"
    last_row = log_rows(out_dir / "log.csv", config.max_iters)[-1:]
    if not stop or last_row and last_row[0].startswith(f"{config.max_iters},"):
        conclude(model, config, out_dir, flags)
        return 0
    next_command = f"to go on: python minimiggy.py --resume{flags}"
    say(f"stopped; {next_command if config.keep else 'nothing was saved'}")
    return 128 + stop[0]

# *Examining and writing*, with a model that is there. What `--sample` prints is the text and nothing else, so
# that other programs can use it.
def run_eval(args: argparse.Namespace, opened: Checkpoint) -> None:
    """--eval-only: the loss on all of the validation text, each token counted once, whatever the batch
    size."""
    model = opened.model
    config = chosen(args, TrainConfig, opened.config)
    check_memory(model.config, config, model.ops, learns=False)
    text, name = asked_or_learned(args, opened)
    ids = checked("validation", model.tokenizer.encode_array(split_text(text)[1]), model.config)
    loss = Evaluator(model, config.batch_size).whole(ids)
    bits = loss * bits_per_byte(model.tokenizer, ids)
    tell(f"{opened.path}: {loss:.4f} nats a token = {bits:.4f} bits/byte on the last tenth of {name}, "
        f"{len(ids) - 1:,} tokens, each counted once")

def sample(tokenizer: BPETokenizer, prompt: str, tokens, stop: str = "") -> None:
    """Print the prompt and, as they come, the `tokens` that follow it, as far as the text `stop`."""
    # A character may be spread over several tokens: `iterdecode` keeps its bytes until the last one has come.
    # And what may become `stop` waits until that is decided: for "JULIET", as many characters as "JULIE" has.
    pieces = (tokenizer.decode_bytes(token) for token in tokens)
    waiting = ""
    print(printable(prompt), end="", flush=True)
    for text in codecs.iterdecode(pieces, "utf-8", errors="replace"):
        waiting += text
        if stop and stop in waiting:
            waiting = waiting[:waiting.index(stop)]
            break
        ready = max(0, len(waiting) + 1 - len(stop))
        print(printable(waiting[:ready]), end="", flush=True)
        waiting = waiting[ready:]
    print(printable(waiting), flush=True)

LONGEST_PROMPT = 4 << 20  # bytes

def prompt_of(asked: str, replace: bool) -> str:
    """The prompt that somebody asks for: FILE:name takes it from a file, - from standard input."""
    if asked.startswith("FILE:"):
        path = Path(asked[5:])
        if check_file(path) > LONGEST_PROMPT:
            raise UserError(f"{path} is too long for a prompt: at most {LONGEST_PROMPT >> 20} MB")
        return read_text(path, replace).decode()
    if asked == "-":
        text = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
        if len(text) > LONGEST_PROMPT:
            raise UserError(f"what comes in is too long for a prompt: at most {LONGEST_PROMPT >> 20} MB")
        return text.decode("utf-8", "replace")
    return asked

def run_sample(args: argparse.Namespace, opened: Checkpoint) -> None:
    """--sample. The first text is printed as it comes; those beside it wait until it is finished."""
    how = dataclasses.asdict(chosen(args, SampleConfig))
    n_samples = how.pop("num_samples")
    model = opened.model
    why = ""
    if not (args.init_from or args.checkpoint):
        newest = newest_first(Path(args.out_dir))[0]
        best = newest_first(Path(args.out_dir), best=True)[0]
        if newest != opened.path == best:
            why = f", the best on the validation text (the newest is {newest.name})"
    print(f"written by {printable(str(opened.path))}{why}", file=sys.stderr)
    prompt = prompt_of(args.sample, args.replace_bad_bytes)
    ids = model.tokenizer.encode(prompt) or line_end(model.tokenizer)
    # A seed of the user's gives the same text again; without one, the clock gives another each time.
    seed = time.time_ns() if args.seed is None else args.seed
    writer = Writer(model, min(n_samples, SIDE_BY_SIDE))
    try:
        for tokens in write_all(writer, [ids] * n_samples, seed=seed, **how):
            sample(model.tokenizer, prompt, tokens, args.stop)
            tokens.close()  # (if it has ended with `stop`, no more of it is written)
    except ValueError as error:  # `draw` has found logits that are no numbers
        raise UserError(f"the model of {opened.path} computes nonsense: {error}") from error

# *Looking inside* needs the opening of the validation text, if it can be had: for the surprises in it, to
# know which tokens are common, and as the prompt where none is given. Three lines say what has been written,
# what the model expects next, and how to see the rest.
def validation_opening(args: argparse.Namespace, opened: Checkpoint) -> np.ndarray | None:
    """The first token ids (N,) of the validation part of the text that --data names, or that the model
    learned from; None if neither is at hand."""
    if not (args.data or "data" in (opened.model.source or {})):
        return None
    try:
        validation = split_text(asked_or_learned(args, opened)[0])[1]
    except (UserError, OSError):
        if args.data:
            raise
        return None
    return opened.model.tokenizer.encode_array(validation[:border(validation, 100_000)])

def run_look(args: argparse.Namespace, opened: Checkpoint) -> None:
    """--look: read the prompt, or the opening of the validation text, write the page, and say so. UserError
    if there is neither."""
    path = Path(args.out or "look.html")
    tokenizer = opened.model.tokenizer
    text = validation_opening(args, opened)
    ids = tokenizer.encode(prompt_of(args.look, args.replace_bad_bytes))
    if not ids and text is None:
        raise UserError("what the model learned from is not at hand: give a prompt, or the text with --data")
    ids = ids or text[:40].tolist() or line_end(tokenizer)
    content = look(opened.model, ids, text, None if args.init_from else opened.path.parent)
    n = len(content["prompt"])
    shown = f"the last {n} of {len(ids)} tokens" if n < len(ids) else f"{n} tokens"
    content["about"] = f"{brief(opened.path)}, {size_in_words(opened.model)}. It reads {shown}."
    write_page(content, path)
    tell(f"wrote   {path} ({path.stat().st_size / 1000:.0f} KB): {opened.path} reads {shown}")
    tell("next    it expects " + ", ".join(f"{token!r} {p:.1%}" for token, p in content["next"]))
    tell(f"to see  open {path.resolve().as_uri()} in a browser")

# And so the program is this: look at the flags, see that there is a device, choose the operations, and do
# what was asked for. A plot needs no device, and works where there is none that can be used.
#
# To find your way through it, follow one command. `--train` locks the folder (`alone`), reads the text,
# learns a vocabulary and makes a model (`prepare`), says what comes (`introduce`), takes its steps (`train`,
# and in it part I's `training`), after the first of which an older run is moved out of the way (`set_aside`),
# with exams and saves between them (`Run`); then it says what came (`conclude`). `--sample` finds the best
# checkpoint (`open_first`), makes its model (`open_checkpoint`), starts a `Writer` of chapter 21, and prints
# what comes out (`sample`).
def run(args: argparse.Namespace) -> int:
    """Do what the flags say; return the exit code."""
    check_flags(args)
    if args.version:
        tell(f"minimiggy {VERSION}")
        return 0
    if args.plot:
        path = Path(args.plot[0]) / "plot.png"
        plot(args.plot, path)
        tell(f"drew {path}")
        return 0
    open_device()
    backend = choose_backend(args)
    if args.train or args.resume:
        with alone(Path(args.out_dir)):
            return run_train(args, backend)
    if args.gradcheck:
        return 0 if gradcheck(chosen(args, TrainConfig).seed, backend) else 1
    if args.bench:
        bench(args.bench, chosen(args, GPTConfig), chosen(args, TrainConfig), backend)
        return 0
    opened = open_model(args, backend)
    if args.sample is not None:
        run_sample(args, opened)
    elif args.look is not None:
        run_look(args, opened)
    elif args.eval_only:
        run_eval(args, opened)
    else:
        export(opened.model, Path(args.export))
        tell(f"wrote {opened.path} to {args.export}, as a GPT-2 that transformers load")
    return 0

# An error that we expected says what to do about it. One that nobody thought of is a mistake of this file:
# the line says what it was and where, so that whoever mends it has something to go by. Exit codes tell
# scripts the same: 2 for the user's mistakes, 1 for a run that failed, 70 for our mistakes, 128 and more for
# signals. On another device than the CPU, what tinygrad raises is not ours to mend: its programs for that
# device do not run here.
def explain(error: Exception | KeyboardInterrupt) -> tuple[int, str]:
    """The exit code and the line for an error."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if isinstance(error, TrainingFailed):
        return 1, str(error)
    if isinstance(error, (UserError, OSError)):
        return 2, in_words(error)
    if isinstance(error, MemoryError):
        return 2, "there is not enough memory: choose a smaller --batch-size, or a smaller model"
    if isinstance(error, subprocess.CalledProcessError):
        return 2, f"the C compiler {error.cmd[0]} failed (exit code {error.returncode}): start again"
    frames = traceback.extract_tb(error.__traceback__)
    device = os.environ["DEV"]
    in_tinygrad = frames[-1].filename.startswith(sys.modules["tinygrad"].__path__[0])
    if device != "CPU" and not isinstance(BACKENDS[-1], Fast) and in_tinygrad:
        return 2, f"tinygrad could not compute on {device} ({brief(error, 90)}): unset DEV"
    ours = [frame.lineno for frame in frames if frame.filename == main.__code__.co_filename]
    if type(error).__name__ == "JitError":
        return 2, (f"line {ours[-1]} wants to see numbers, but a step is only being recorded there: take "
                   ".numpy(), .item() and the like out of the network (model(idx).numpy() shows its results)")
    what = f"{type(error).__name__} in line {ours[-1]}: {brief(error, 100)}"
    remedy = "please report it" if PART_ONE_IS_OURS else "is it in what you have changed?"
    return 70, f"a mistake in this program ({what}): {remedy} (--debug shows the traceback)"

def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code. Whatever goes wrong gets one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = run(make_parser().parse_args(arguments))
        keep_programs()
        return code
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # as in `... | head`: who listened has heard enough
            return 141                          # (which is what a shell says of a program that ends so)
        show("")
        if "--debug" in arguments:
            traceback.print_exc()
        code, line = explain(error)
        warn(brief(line))
        return code

# A shell can close one of a program's three streams (`>&-`), and it is None then; it gets one that leads
# nowhere. And a terminal may not know all letters: it gets a "?" for those, which is better than an error. To
# write programs takes millions of small objects, hardly any of them garbage: looking for that less often
# makes the start 5 % quicker.
if __name__ == "__main__":
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")
    code = main()
    try:
        sys.stdout.flush()
    except OSError:
        # Nobody can read it, or the disk is full. Python would try once more, and complain: so what is still
        # to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
