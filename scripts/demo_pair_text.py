"""The text of the embedded pair: the Python standard library's source, as tokens and as prompts."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SEED = 20
CONTEXT = 1024
HELD_OUT_PERCENT = 4
# Tables of data rather than code: nothing in them can be learned.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "bad_coding"}
# Words with one leading character, short digit runs, punctuation runs, line ends, indentation.
# A line end is never part of the token before it: a prompt may well end just there.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Corpus:
    train: list[Path]
    held_out: list[Path]
    root: Path

    @classmethod
    def of_standard_library(cls) -> Corpus:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.parts))
        files = [p for p in files if _readable(p)]
        return cls(
            [p for p in files if not _is_held_out(p.relative_to(root))],
            [p for p in files if _is_held_out(p.relative_to(root))],
            root,
        )


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        return False


def _is_held_out(relative: Path) -> bool:
    digest = hashlib.sha256(relative.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


# --- tokenizer and token streams ------------------------------------------------------------


def train_tokenizer(corpus: Corpus, vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p.read_text(encoding="utf-8") for p in corpus.train), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def token_stream(
    tokenizer: PreTrainedTokenizerFast, files: list[Path], cache: Path
) -> torch.Tensor:
    """All files' tokens in one int64 vector, each file closed by the end-of-text token.

    The library's own tests are half of its text; everything else counts twice.
    """
    if cache.exists():
        return torch.from_numpy(np.load(cache).astype(np.int64))
    order = [p for p in files for _ in range(1 if "test" in p.parts else 2)]
    random.Random(SEED).shuffle(order)
    ids: list[int] = []
    for path in order:
        ids += tokenizer.encode(path.read_text(encoding="utf-8")) + [tokenizer.eos_token_id]
    stream = np.array(ids, dtype=np.uint16)
    np.save(cache, stream)
    return torch.from_numpy(stream.astype(np.int64))


def windows(stream: torch.Tensor, step: int, batch: int, length: int) -> torch.Tensor:
    """`batch` random windows of `length + 1` tokens, a function of the seed and `step` alone."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
    return torch.stack([stream[s : s + length + 1] for s in starts.tolist()])


# --- prompts for measurements ---------------------------------------------------------------


def held_out_prompts(corpus: Corpus, count: int) -> list[dict[str, str]]:
    """`count` beginnings of 8–24 lines from held-out files, each from a place of its own."""
    rng = random.Random(SEED)
    prompts = []
    while len(prompts) < count:
        path = rng.choice(corpus.held_out)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        start, size = rng.randrange(len(lines)), rng.randint(8, 24)
        text = "".join(lines[start : start + size]).rstrip()
        if 200 <= len(text) <= 1200:
            prompts.append({"file": path.relative_to(corpus.root).as_posix(), "text": text})
    return prompts
