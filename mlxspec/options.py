"""The options of the commands: one type each, shared by every command that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxspec.pairs import MAX_DRAFT_TOKENS

PromptArgument = Annotated[
    str | None,
    typer.Argument(help="The prompt; piped text is added to it. `-` takes stdin alone."),
]
PairOption = Annotated[str, typer.Option(help="A pair of the table.")]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_REPO",
        help="A target in place of a pair's; decodes plainly without --draft.",
    ),
]
DraftOption = Annotated[
    str | None, typer.Option(metavar="PATH_OR_REPO", help="A draft in place of the pair's.")
]
DraftTokensOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_DRAFT_TOKENS,
        help="Tokens proposed in every round; the pair's own if not given.",
    ),
]
NoSpeculationOption = Annotated[
    bool, typer.Option("--no-speculation", help="Decode plainly, without the draft.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
TemperatureOption = Annotated[
    float, typer.Option("--temp", min=0, help="Temperature; 0 is greedy.")
]
TopPOption = Annotated[
    float, typer.Option(min=0, max=1, help="Keep the most likely tokens up to this sum; 1 is off.")
]
TopKOption = Annotated[int, typer.Option(min=0, help="Keep so many tokens; 0 is off.")]
MinPOption = Annotated[
    float, typer.Option(min=0, max=1, help="Keep tokens so likely beside the likeliest; 0 is off.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, help="Of the random numbers; drawn if not given.")
]
SystemOption = Annotated[str | None, typer.Option(help="A system message.")]
StopOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Use no chat template.")]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile rounds: by default yes; on a CPU the first run builds kernels for it.",
        show_default=False,
    ),
]
ModelsOption = Annotated[
    Path | None,
    typer.Option("--models", metavar="FILE", help="A table of pairs laid over the shipped one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
