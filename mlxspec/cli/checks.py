"""The options of the checks that follow a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from mlxspec.cli.arguments.options import ModelOptions, OutputOptions
from mlxspec.errors import UsageError

_output = partial(typer.Option, rich_help_panel="Output")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The checks that follow a text."""

    audit: Annotated[
        bool, _output("--audit", help="Compare the text with plain decoding afterwards.")
    ] = False
    compare: Annotated[
        bool,
        _output("--compare", help="Decode again, with and without speculation; show both speeds."),
    ] = False

    def require_use(self, models: ModelOptions, output: OutputOptions) -> None:
        """Raise UsageError where a comparison has nothing to compare, or nowhere to be shown."""
        if self.compare and not models.speculates:
            raise UsageError(
                "--compare has nothing to compare: this call decodes plainly.",
                hint="Leave out --no-speculation or --draft-tokens 0; both speeds are shown.",
            )
        if self.compare and output.quiet and not output.as_json:
            raise UsageError(
                "--compare shows nothing with --quiet.", hint="Leave one out, or add --json."
            )
