"""The option that tells how likely tokens were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from mlxspec.defaults import MAX_LOGPROBS
from mlxspec.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LogprobsOptions:
    """How likely tokens were, beside the text."""

    logprobs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Output",
            min=0,
            max=MAX_LOGPROBS,
            help="Add to the JSON object the target's log-probability of each token, and those of "
            "this many of the likeliest ones in its place.",
        ),
    ] = None

    def require_place(self, *, in_json: bool) -> None:
        """Raise UsageError where there is no JSON object that they could be in."""
        if self.logprobs is not None and not in_json:
            raise UsageError(
                f"--logprobs {self.logprobs} says nothing without a JSON object.",
                hint="Add --json, or --batch FILE.",
            )
