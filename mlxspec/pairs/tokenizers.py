"""Loading a folder's tokenizer, and what is not loaded without being told."""

from __future__ import annotations

from pathlib import Path

from mlxspec.errors import LoadError
from mlxspec.pairs.contents import TOKENIZER_FILES, in_one_line, named_in_utf8
from mlxspec.pairs.tokenizer_files import load_tokenizer
from mlxspec.tokens import Tokenizer

# Tokenizers that need a package beside those of mlx-lm.
_PACKAGES = {
    "tekken.json": "mistral-common",
    "*.tiktoken": "tiktoken",
    "tiktoken.model": "tiktoken",
}


def load_folder_tokenizer(
    folder: Path, ends: list[int] | int | None = None, *, trust_remote_code: bool = False
) -> Tokenizer:
    """The tokenizer of a folder, without asking whether its code may run.

    Raises:
        LoadError: it cannot be loaded, or has no tokens.
    """
    try:
        with named_in_utf8(folder) as there:
            tokenizer = load_tokenizer(
                there, {"trust_remote_code": trust_remote_code}, eos_token_ids=ends
            )
    except LoadError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise _cannot_load(folder, in_one_line(error)) from error
    # Without files that it knows transformers makes a tokenizer of special tokens alone.
    if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < 2:
        raise _cannot_load(folder, "it has no tokens")
    return tokenizer


def _cannot_load(folder: Path, why: str) -> LoadError:
    hint = "Copy or download the model again."
    if "custom code" in why or "trust_remote_code" in why:
        why = "it needs code of its own, which is not run"
        hint = "Read the code; trust_remote_code=True, or --trust-remote-code, runs it."
    elif not (folder / "tokenizer.json").exists():
        files = sorted(path.name for one in TOKENIZER_FILES for path in folder.glob(one))
        why = f"{', '.join(dict.fromkeys(files))}: {why}"
        packages = [name for one, name in _PACKAGES.items() if any(folder.glob(one))]
        hint = "Take a repository with a tokenizer.json" + (
            f", or install {packages[0]}." if packages else "."
        )
    return LoadError(f"The tokenizer in {folder} cannot be loaded: {why}.", hint=hint)
