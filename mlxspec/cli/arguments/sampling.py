"""The options of sampling and of penalties."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxspec.errors import UsageError
from mlxspec.metrics import Tell
from mlxspec.pairs.table import Pair
from mlxspec.params import (
    DEFAULT_CONTEXT,
    DEFAULT_THRESHOLD,
    FILTERS,
    NAMES,
    VERIFY,
    SamplingParams,
    sampling_params,
)

if TYPE_CHECKING:
    from mlxspec.decode.engine import Engine

# What a pair's table says holds where an option is not given, so none has a default of its own.
_sampling = partial(typer.Option, rich_help_panel="Sampling", show_default=False)
_penalty = partial(typer.Option, rich_help_panel="Penalties", show_default=False)

TEMPERATURE = (
    "Temperature; 0 is greedy. What no option sets is as the pair says, or else as the model's "
    "generation_config.json says, or else greedy without filters."
)

# What says nothing without another: a filter where the likeliest token is taken, and so on.
_NEEDS = {
    **dict.fromkeys(FILTERS, "temperature"),
    "xtc_threshold": "xtc_probability",
    **{f"{one}_context_size": f"{one}_penalty" for one in ("repetition", "presence", "frequency")},
}

_Context = Annotated[
    int | None,
    _penalty(min=0, help=f"Tokens that it looks back on; {DEFAULT_CONTEXT} by default, 0 is all."),
]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, and how proposals are verified."""

    temperature: Annotated[
        float | None,
        _sampling("--temp", "--temperature", min=0, help=TEMPERATURE),
    ] = None
    top_p: Annotated[
        float | None,
        _sampling(min=0, max=1, help="Keep the likeliest tokens up to this sum; 1 is off."),
    ] = None
    top_k: Annotated[
        int | None, _sampling(min=0, help="Keep this many of the likeliest tokens; 0 is off.")
    ] = None
    min_p: Annotated[
        float | None,
        _sampling(
            min=0,
            max=1,
            help="Keep tokens at least this fraction as likely as the likeliest; 0 is off.",
        ),
    ] = None
    xtc_probability: Annotated[
        float | None,
        _sampling(
            min=0,
            max=1,
            help="Probability of leaving out all likely tokens but the least likely of them.",
        ),
    ] = None
    xtc_threshold: Annotated[
        float | None,
        _sampling(
            min=0,
            max=0.5,
            help="Probability above which XTC calls a token likely; "
            f"{SamplingParams.xtc_threshold} by default.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        _sampling(min=0, help="Seed of the random numbers; a run without one draws and names it."),
    ] = None
    verify: Annotated[
        str | None,
        _sampling(
            metavar="|".join(VERIFY),
            help="Rule that verifies proposals. When sampling: coupled with --draft-tokens auto, "
            "so that the seed alone decides the text, and block with a fixed number. relaxed is "
            "not exact.",
        ),
    ] = None
    acceptance_threshold: Annotated[
        float | None,
        _sampling(
            min=0,
            max=1,
            help="With --verify relaxed: keep tokens at least this fraction as likely as the "
            f"likeliest; {DEFAULT_THRESHOLD} by default.",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None, _penalty(min=0, help="Divides the logits of seen tokens; 1 is off.")
    ] = None
    repetition_context_size: _Context = None
    presence_penalty: Annotated[
        float | None, _penalty(help="Subtracted from the logits of seen tokens; 0 is off.")
    ] = None
    presence_context_size: _Context = None
    frequency_penalty: Annotated[
        float | None,
        _penalty(help="Subtracted from a token's logit each time it was seen; 0 is off."),
    ] = None
    frequency_context_size: _Context = None
    logit_bias: Annotated[
        str | None,
        _penalty(metavar="JSON", help='Added to logits by token id, such as {"42": -5}.'),
    ] = None

    def params(self, pair: Mapping[str, float]) -> SamplingParams:
        """The parameters, with a pair's where an option is not given.

        Raises:
            UsageError: values do not go together.
        """
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        verify: Any = self.verify  # SamplingParams says what it may be
        return sampling_params(
            {**pair, **given},
            seed=self.seed,
            logit_bias=_biases(self.logit_bias),
            verify=verify,
            acceptance_threshold=self.acceptance_threshold,
        )

    def recommended(self, engine: Engine, pair: Pair, tell: Tell) -> SamplingParams:
        """The parameters; where none is given, the pair's, and else what its authors recommend.

        Args:
            tell: called with what comes from the authors' generation_config.json, and with the
                options that change nothing.
        """
        params = self.params(engine.recommended)
        used = params.as_dict()
        for line in self._idle(used):
            tell(line)
        theirs = [
            f"{name.replace('_', ' ')} {value:g}"
            for name, value in used.items()
            if params.temperature
            and name in engine.recommended
            and name not in pair.sampling
            and getattr(self, name) is None
        ]
        if theirs:
            tell(f"sampling by the model's generation_config.json: {', '.join(theirs)}")
        return params

    def _idle(self, used: Mapping[str, float]) -> Iterator[str]:
        """The options that were given and change nothing.

        Args:
            used: the values that are not the defaults.
        """
        for name, needed in _NEEDS.items():
            if getattr(self, name) is not None and name in used and needed not in used:
                yield f"{_option(name)} changes nothing without {_option(needed)}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _biases(text: str | None) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--logit-bias is {text!r}.", hint='Give token ids and numbers: {"42": -5, "7": 2}.'
        ) from error
