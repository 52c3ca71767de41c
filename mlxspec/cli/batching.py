"""The options of many texts in one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mlxspec.errors import UsageError

DEFAULT_ROWS = 8

_batch = partial(typer.Option, rich_help_panel="Many texts")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Many texts in one run."""

    batch: Annotated[
        Path | None,
        _batch(
            metavar="FILE",
            help="Write a text for each line of a file, several at a time; - is stdin. A line is a "
            "JSON string, or an object with prompt or messages, and optionally tools, id, "
            "system, max_tokens, stop, seed, prediction, logprobs and the sampling options. stdout "
            "gets a JSON object for each text as soon as it is done.",
        ),
    ] = None
    max_rows: Annotated[
        int | None,
        _batch(
            min=1,
            max=32,
            help=f"The most texts that are written at a time; {DEFAULT_ROWS} by default.",
        ),
    ] = None
    cache_gb: Annotated[
        float | None,
        _batch(
            min=0,
            help="Memory for what was read of prompts, in GB: a prompt that begins like an earlier "
            "one is read from where they part. 1 by default; 0 keeps nothing.",
        ),
    ] = None
    ordered: Annotated[bool, _batch("--ordered", help="Keep the order of the lines.")] = False
    resume: Annotated[
        Path | None,
        _batch(
            metavar="FILE", help="Skip the texts that this file of earlier results already has."
        ),
    ] = None

    @property
    def rows(self) -> int:
        """The most texts that are written at a time."""
        return self.max_rows or DEFAULT_ROWS

    @property
    def file(self) -> Path:
        assert self.batch is not None
        return self.batch

    def require_alone(self, **others: object) -> None:
        """Raise UsageError where options do not go together.

        Args:
            others: what was given of the options that hold for one text, by name.
        """
        needs_batch: dict[str, object] = {
            "--max-rows": self.max_rows,
            "--cache-gb": self.cache_gb,
            "--ordered": self.ordered or None,
            "--resume": self.resume,
        }
        for name, given in needs_batch.items():
            if given is not None and self.batch is None:
                raise UsageError(f"{name} says nothing without --batch.", hint="Add --batch FILE.")
        for name, given in others.items():
            if given and self.batch is not None:
                raise UsageError(
                    f"{name} is for one text, and --batch writes many.", hint="Leave one out."
                )
