"""The exception tree. Every error says what happened and what to do next.

MlxspecError
├── UsageError            the call or the command line is wrong (exit code 2)
│   ├── PromptError       no prompt, an empty one, not UTF-8, or longer than the context
│   ├── UnknownPair       no pair of that name in the table
│   └── NothingDrafts     a measurement of drafters without any
├── TableError            a models.toml that cannot be used: file, key, what was expected
├── BackendMissing        MLX is installed without a backend for this machine
├── LoadError             a model folder or repository that cannot be loaded
│   └── UnsupportedModel  the model loads, but a round cannot run on it exactly
├── VocabularyMismatch    the draft has too few of the target's tokens
├── OutOfMemory           not even the smallest step fits
└── BrokenOutput          a model's output is no distribution: not numbers, or nothing allowed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MlxspecError(Exception):
    """Base of every error that mlxspec raises on purpose.

    Args:
        message: one sentence: what happened, and where.
        hint: one sentence: what to do next, a command where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MlxspecError):
    exit_code = 2


class PromptError(UsageError):
    pass


class UnknownPair(UsageError):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        near = nearest(name, known)
        hint = f"Did you mean `{near}`? " if near else ""
        if "/" in name or name.startswith((".", "~")):
            hint = "`--target` takes a repository or a folder, and load(Pair(name, target=…)) too; "
        super().__init__(
            f"There is no pair named {name!r}.",
            hint=f"{hint}`mlxspec pairs list` shows every pair.",
        )


class NothingDrafts(UsageError):
    def __init__(self) -> None:
        super().__init__(
            "Nothing drafts here, so there is nothing to probe.",
            hint="Leave out --no-speculation, or name a draft with --draft.",
        )


class TableError(MlxspecError):
    exit_code = 2


class BackendMissing(MlxspecError, ImportError):
    def __init__(self) -> None:
        super().__init__(
            "MLX has no backend for this machine: pip install 'mlxspec[cpu]', or [cuda12] or "
            "[cuda13] with an NVIDIA GPU.",
            hint="A Mac with Apple silicon needs no extra; check that its Python is native arm64.",
        )


class LoadError(MlxspecError):
    pass


class UnsupportedModel(LoadError):
    pass


class VocabularyMismatch(MlxspecError):
    pass


class OutOfMemory(MlxspecError):
    def __init__(self, what: str) -> None:
        super().__init__(
            f"Memory ran out while {what}.",
            hint="Close other programs, shorten the prompt, or take a smaller model.",
        )


class BrokenOutput(MlxspecError):
    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"The target's output after {tokens:,} tokens is not a distribution: it is not a "
            "number, or nothing is left to choose from.",
            hint="Check the model's weights with --no-speculation; a bias or a logits processor "
            "must leave at least one token.",
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that is most like `name`, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None
