"""The options of the commands, in groups that commands share.

A command takes a group as one parameter; `grouped` makes every field of it an option.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from mlxspec.defaults import AUTO, DEFAULT_MAX_TOKENS, DEFAULT_PAIR, MAX_DRAFT_TOKENS, DraftTokens
from mlxspec.errors import UsageError
from mlxspec.files import require_no_folder
from mlxspec.pairs.table import Pair, find_pair
from mlxspec.params import (
    DEFAULT_CONTEXT,
    DEFAULT_GROUP_SIZE,
    VERIFY,
    KVQuantization,
    Penalties,
    SamplingParams,
)

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        help="The prompt; what is piped in is added to it, once the pipe ends. `-` takes stdin "
        "alone."
    ),
]
ModelsOption = Annotated[
    Path | None,
    typer.Option("--models", metavar="FILE", help="A table of pairs laid over the shipped one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Texts of your own: a JSON list of strings, or a text on each line.",
    ),
]
AuditOption = Annotated[
    bool, typer.Option("--audit", help="Hold the text against plain decoding afterwards.")
]

_model = partial(typer.Option, rich_help_panel="Models")
_sampling = partial(typer.Option, rich_help_panel="Sampling")
_penalty = partial(typer.Option, rich_help_panel="Penalties")

_Context = Annotated[int, _penalty(min=0, help="Tokens it looks back on; 0 is all.")]


def _draft_tokens(text: str) -> DraftTokens:
    if text == AUTO:
        return AUTO
    try:
        count = int(text)
    except ValueError:
        count = -1
    if not 0 <= count <= MAX_DRAFT_TOKENS:
        raise typer.BadParameter(f"{text!r} is neither auto nor in the range 0-{MAX_DRAFT_TOKENS}.")
    return count


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which models run, and how they draft."""

    pair: Annotated[str, _model(help="A pair of the table.")] = DEFAULT_PAIR
    target: Annotated[
        str | None,
        _model(
            metavar="PATH_OR_REPO",
            help="A target in place of a pair's; --draft names a draft for it.",
        ),
    ] = None
    adapter: Annotated[
        str | None,
        _model(metavar="PATH_OR_REPO", help="LoRA weights of mlx-lm for the target."),
    ] = None
    revision: Annotated[
        str | None,
        _model(metavar="NAME", help="The target's branch, tag or commit on the hub."),
    ] = None
    trust_remote_code: Annotated[
        bool,
        _model("--trust-remote-code", help="Run code that a model or a tokenizer brings."),
    ] = False
    draft: Annotated[
        list[str] | None,
        _model(
            metavar="PATH_OR_REPO|history",
            help="A draft in place of the pair's; repeatable, the best is used. `history` repeats "
            "what followed in the text so far, and needs no model; installed drafters go by name.",
        ),
    ] = None
    draft_tokens: Annotated[
        Any,
        _model(
            "--draft-tokens",
            "--max-draft-tokens",
            metavar=f"auto|0-{MAX_DRAFT_TOKENS}",
            parser=_draft_tokens,
            help="Tokens proposed in a round; auto measures what pays, and proposes none where "
            "none does. The pair's own if not given, which is auto for most.",
            show_default=False,
        ),
    ] = None
    no_speculation: Annotated[
        bool,
        _model(
            "--no-speculation",
            help="Decode plainly: propose nothing.",
        ),
    ] = False
    no_fallback: Annotated[
        bool,
        _model(
            "--no-fallback",
            help="Fail where a pair's draft cannot be used, in place of decoding plainly.",
        ),
    ] = False
    kv_bits: Annotated[
        int | None,
        _model(
            metavar="2|4|8",
            help="Keep keys and values in so many bits; the text may differ, for the target alone "
            "just as well.",
        ),
    ] = None
    kv_group_size: Annotated[
        int, _model(metavar="32|64|128", help="Of them that share a scale.")
    ] = DEFAULT_GROUP_SIZE
    compiled: Annotated[
        bool | None,
        _model(
            "--compile/--no-compile",
            help="Compile rounds: by default yes; on a CPU the first run builds kernels for it.",
            show_default=False,
        ),
    ] = None
    models: Annotated[
        Path | None,
        _model(
            "--models",
            metavar="FILE",
            help="A table of pairs laid over the shipped one.",
        ),
    ] = None

    @property
    def speculates(self) -> bool:
        return not self.no_speculation and self.draft_tokens != 0

    def kv(self) -> KVQuantization | None:
        """How keys and values are quantised, if they are."""
        if self.kv_bits is None:
            return None
        return KVQuantization(self.kv_bits, self.kv_group_size)

    @property
    def falls_back(self) -> bool:
        """Whether a draft that cannot be used is left out: never one that was asked for."""
        return not self.draft and not self.no_fallback

    def chosen(self) -> Pair:
        """The table's pair, or what the options make of it."""
        pair = self._named()
        return replace(
            pair,
            adapter=self.adapter or pair.adapter,
            revision=self.revision or pair.revision,
        )

    def _named(self) -> Pair:
        drafts = tuple(dict.fromkeys(self.draft or ()))
        draft = drafts[0] if len(drafts) == 1 else drafts or None
        if self.target is not None:
            if self.pair != DEFAULT_PAIR:
                raise UsageError(
                    f"--pair {self.pair} and --target {self.target} both name a target.",
                    hint="Leave one out; --draft names a draft for the target.",
                )
            return Pair(name=self.target, target=self.target, draft=draft)
        pair = find_pair(self.pair, self.models)
        if draft is None:
            return pair
        return Pair(name=self.pair, target=pair.target, draft=draft)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What is read, and where the text ends."""

    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = (
        DEFAULT_MAX_TOKENS
    )
    system: Annotated[str | None, typer.Option(help="A system message.")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; repeatable."),
    ] = None
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False
    prediction: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the text is expected to be like, such as the file that it edits: proposed "
            "wherever the text follows it.",
        ),
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what was read of the prompt in this file: the next prompt that begins with "
            "the same tokens starts from there.",
        ),
    ] = None
    constraint: Annotated[
        str | None, typer.Option("--json-schema", "--grammar", "--response-format", hidden=True)
    ] = None

    def cache_file(self) -> Path | None:
        """The file of the prompt cache; raises UsageError where it is a folder."""
        if self.cache is None:
            return None
        try:
            path = self.cache.expanduser()
        except RuntimeError:  # there is no home of that name, and so no such folder
            path = self.cache
        require_no_folder(path)
        return path

    def require_free(self) -> None:
        """Raise UsageError where output is to be constrained."""
        if self.constraint is not None:
            raise UsageError(
                "Output cannot be constrained to a grammar or a JSON schema.",
                hint="Ask for JSON in the prompt; from Python, Engine.run takes logits processors.",
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, and how proposals are verified."""

    temperature: Annotated[
        float,
        _sampling(
            "--temp",
            "--temperature",
            min=0,
            help="Temperature; 0 is greedy.",
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        _sampling(
            min=0,
            max=1,
            help="Keep the most likely tokens up to this sum; 1 is off.",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        _sampling(min=0, help="Keep so many tokens; 0 is off."),
    ] = 0
    min_p: Annotated[
        float,
        _sampling(
            min=0,
            max=1,
            help="Keep tokens so likely beside the likeliest; 0 is off.",
        ),
    ] = 0.0
    xtc_probability: Annotated[
        float,
        _sampling(
            min=0,
            max=1,
            help="How often to leave out all likely tokens but the least likely of them.",
        ),
    ] = 0.0
    xtc_threshold: Annotated[
        float,
        _sampling(min=0, max=0.5, help="From here on a token is likely."),
    ] = 0.1
    seed: Annotated[
        int | None,
        _sampling(
            min=0,
            help="Of the random numbers; drawn if not given. With --draft-tokens auto it verifies "
            "by the coupled rule, so that the text is the seed's alone.",
        ),
    ] = None
    verify: Annotated[
        str | None,
        _sampling(
            metavar="|".join(VERIFY),
            help="How proposals are verified; block when sampling. relaxed is not exact.",
        ),
    ] = None
    acceptance_threshold: Annotated[
        float | None,
        _sampling(
            min=0,
            max=1,
            help="With --verify relaxed: keep tokens so likely beside the likeliest.",
        ),
    ] = None
    repetition_penalty: Annotated[
        float,
        _penalty(min=0, help="Divides the logits of seen tokens; 1 is off."),
    ] = 1.0
    repetition_context_size: _Context = DEFAULT_CONTEXT
    presence_penalty: Annotated[
        float,
        _penalty(help="Taken from the logits of seen tokens."),
    ] = 0.0
    presence_context_size: _Context = DEFAULT_CONTEXT
    frequency_penalty: Annotated[
        float,
        _penalty(help="Taken from a logit for every time it was seen."),
    ] = 0.0
    frequency_context_size: _Context = DEFAULT_CONTEXT
    logit_bias: Annotated[
        str | None,
        _penalty(
            metavar="JSON",
            help='Added to logits by token id, such as {"42": -5}.',
        ),
    ] = None

    def params(self) -> SamplingParams:
        """Raises UsageError where values do not go together."""
        verify: Any = self.verify  # SamplingParams says what it may be
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            penalties=Penalties(
                repetition=self.repetition_penalty,
                presence=self.presence_penalty,
                frequency=self.frequency_penalty,
                repetition_context=self.repetition_context_size,
                presence_context=self.presence_context_size,
                frequency_context=self.frequency_context_size,
            ),
            logit_bias=_biases(self.logit_bias),
            verify=verify,
            acceptance_threshold=self.acceptance_threshold,
        )


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is shown of the result."""

    as_json: JsonOption = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = (
        False
    )


def _biases(text: str | None) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--logit-bias is {text!r}.", hint='Give token ids and numbers: {"42": -5, "7": 2}.'
        ) from error


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Make an option of every field of the command's parameters that are groups of options."""
    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters
    groups = {name: hints[name] for name in given if is_dataclass(hints[name])}
    parameters = [
        given[name].replace(annotation=hints[name]) for name in given if name not in groups
    ]
    for group in groups.values():
        types = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=types[field.name],
            )
            for field in fields(group)
        ]

    @wraps(command)
    def called(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    ordered = sorted(parameters, key=lambda one: one.kind)
    called.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in ordered} | {"return": None}
    return called
