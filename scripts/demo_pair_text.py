"""The text of the embedded pair: Python source, as tokens and as prompts.

It is the standard library, a part of which is held out, and the packages of
`demo_pair_packages.txt` without their tests.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
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
# Of packages: code of others that they carry along, and what says the same again and again.
SKIPPED_PARTS = {
    "tests",
    "test",
    "testing",
    "migrations",
    "locale",
    "vendored",
    "_vendor",
    "extern",
}
LONGEST_FILE = 200_000  # bytes; longer ones are tables
PACKAGES = Path(__file__).with_name("demo_pair_packages.txt")
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


def wheels(folder: Path) -> list[Path]:
    """The packages' wheels, downloaded unless `folder` has them."""
    if not (folder / "complete").exists():
        wanted = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "-r", str(PACKAGES)]
        systems = [
            f"--platform={s}" for s in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")
        ]
        pip = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder)]
        subprocess.run([*pip, *wanted, *systems], check=True)
        (folder / "complete").touch()
    return sorted(folder.glob("*.whl"))


def sources(wheel: Path) -> Iterator[str]:
    """The text of a package's modules, without tests and without tables."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in sorted(archive.infolist(), key=lambda e: e.filename):
            parts = entry.filename.split("/")
            skipped = SKIPPED_PARTS & set(parts) or any(p.startswith("test_") for p in parts)
            if entry.filename.endswith(".py") and entry.file_size < LONGEST_FILE and not skipped:
                text = archive.read(entry).decode("utf-8", errors="replace")
                if text.strip() and "\ufffd" not in text:
                    yield text


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


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], cache: Path) -> torch.Tensor:
    """All texts' tokens in one int32 vector, each text closed by the end-of-text token."""
    if cache.exists():
        return torch.from_numpy(np.load(cache).astype(np.int32))
    stream: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 256])
        stream += [np.array([*one.ids, tokenizer.eos_token_id], dtype=np.uint16) for one in batch]
    np.save(cache, np.concatenate(stream))
    return token_stream(tokenizer, [], cache)


def library_texts(files: list[Path], *, often: int) -> list[str]:
    """Files of the standard library: all but its own tests, half of it, count `often` times."""
    order = [p for p in files for _ in range(1 if "test" in p.parts else often)]
    random.Random(SEED).shuffle(order)
    return [path.read_text(encoding="utf-8") for path in order]


def train_texts(corpus: Corpus, folder: Path) -> list[str]:
    """What the pair is trained on, in random order, without copies of what is held out."""
    held_out = {line for path in corpus.held_out for line in _long_lines(path.read_text("utf-8"))}
    texts = library_texts(corpus.train, often=3)
    for wheel in wheels(folder):
        texts += [t for t in sources(wheel) if not _is_copy(_long_lines(t), held_out)]
    random.Random(SEED).shuffle(texts)
    return texts


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 40}


def _is_copy(lines: set[str], held_out: set[str]) -> bool:
    return len(lines & held_out) > 0.2 * len(lines)


def windows(stream: torch.Tensor, step: int, batch: int, length: int) -> torch.Tensor:
    """`batch` random windows of `length + 1` tokens, a function of the seed and `step` alone."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - length - 1, (batch,), generator=generator)
    places = starts.to(stream.device)[:, None] + torch.arange(length + 1, device=stream.device)
    return stream[places].long()


# --- prompts for measurements ---------------------------------------------------------------


def write_prompts(corpus: Corpus, path: Path) -> None:
    """Write the held-out beginnings among those that `mlxspec bench` has, and leave the others."""
    lines = [line for line in path.read_text("utf-8").splitlines() if '"file"' not in line]
    lines[:0] = map(json.dumps, held_out_prompts(corpus, 64))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def held_out_prompts(corpus: Corpus, count: int) -> list[dict[str, object]]:
    """`count` beginnings of 8–24 lines from held-out files, each from a place of its own."""
    rng = random.Random(SEED)
    prompts: list[dict[str, object]] = []
    while len(prompts) < count:
        path = rng.choice(corpus.held_out)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        start, size = rng.randrange(len(lines)), rng.randint(8, 24)
        text = "".join(lines[start : start + size]).rstrip()
        if 200 <= len(text) <= 1200:
            name = f"python-{len(prompts) + 1}"
            file = path.relative_to(corpus.root).as_posix()
            prompts.append(
                {"question_id": name, "category": "python", "turns": [text], "file": file}
            )
    return prompts
