"""The options that commands share: models, the text, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mlxspec.cli.screen.streams import as_text
from mlxspec.defaults import AUTO, DEFAULT_MAX_TOKENS, DEFAULT_PAIR, MAX_DRAFT_TOKENS, DraftTokens
from mlxspec.errors import UsageError
from mlxspec.files import expanded, require_no_folder
from mlxspec.pairs.table import Pair, default_pair, find_pair, load_pairs
from mlxspec.params import DEFAULT_GROUP_SIZE, KVQuantization

PromptArgument = Annotated[
    str | None,
    typer.Argument(
        help="The prompt. Piped text is added to it once the pipe ends; `-` takes stdin alone. "
        "Without either, the pair's own prompt, where it has one."
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
        help="Prompts of your own: a text or a JSON object on each line, or a JSON list.",
    ),
]
BudgetOption = Annotated[
    float,
    typer.Option(
        "--budget",
        metavar="SECONDS",
        min=1,
        help="Measure for about this long: less is measured where a pass is slow. Loading and "
        "building kernels come on top.",
    ),
]

_model = partial(typer.Option, rich_help_panel="Models")
_drafting = partial(typer.Option, rich_help_panel="Speculation")
_text = partial(typer.Option, rich_help_panel="Text")
_output = partial(typer.Option, rich_help_panel="Output")


def draft_tokens_of(text: str) -> DraftTokens:
    """K, or auto; raises typer.BadParameter for anything else."""
    if text == AUTO:
        return AUTO
    try:
        count = int(text)
    except ValueError:
        count = -1
    if not 0 <= count <= MAX_DRAFT_TOKENS:
        raise typer.BadParameter(f"{text!r} is neither auto nor in the range 0-{MAX_DRAFT_TOKENS}.")
    return count


def _texts(given: Iterable[str] | None, what: str) -> tuple[str, ...]:
    return tuple(as_text(one, what) for one in given or ())


def _stops(given: Iterable[str] | None) -> tuple[str, ...]:
    stops = _texts(given, "The stop string")
    if "" in stops:
        raise UsageError("A stop string is empty.", hint="--stop takes the text to end before.")
    return stops


def template_args(given: Iterable[str] | None) -> dict[str, Any]:
    """The arguments of the chat template by their names."""
    found: dict[str, Any] = {}
    for one in _texts(given, "--template-arg"):
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise UsageError(
                f"--template-arg {one!r} has no name or no value.",
                hint="Write NAME=VALUE, such as enable_thinking=false.",
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


TemplateArgOption = Annotated[
    list[str] | None,
    _text(
        metavar="NAME=VALUE",
        help="An argument of the chat template, such as enable_thinking=false or "
        "reasoning_effort=low. The value is JSON or a text; repeatable.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models that run, and how they draft."""

    pair: Annotated[
        str | None,
        _model(
            help=f"A pair of the table; by default the one that `pairs default` chose, or "
            f"{DEFAULT_PAIR}.",
            show_default=False,
        ),
    ] = None
    target: Annotated[
        str | None,
        _model(
            metavar="PATH_OR_REPO",
            help="A target in place of a pair's; --draft names a draft for it.",
        ),
    ] = None
    adapter: Annotated[
        str | None,
        _model(metavar="PATH_OR_REPO", help="LoRA weights in mlx-lm's format, for the target."),
    ] = None
    revision: Annotated[
        str | None,
        _model(metavar="NAME", help="The target's branch, tag or commit on the hub."),
    ] = None
    trust_remote_code: Annotated[
        bool,
        _model("--trust-remote-code", help="Run code that comes with a model or a tokenizer."),
    ] = False
    draft: Annotated[
        list[str] | None,
        _model(
            metavar="PATH_OR_REPO|mtp|history",
            help="A draft in place of the pair's; repeatable, the fastest is used. `mtp` is the "
            "layer that the target was trained with. `history` proposes what followed in the text "
            "so far and needs no model. Installed drafters go by name.",
        ),
    ] = None
    models: Annotated[
        Path | None,
        _model("--models", metavar="FILE", help="A table of pairs laid over the shipped one."),
    ] = None
    kv_bits: Annotated[
        int | None,
        _model(
            metavar="2|4|8",
            help="Keep keys and values in this many bits. The text may differ, with and without a "
            "draft alike.",
        ),
    ] = None
    kv_group_size: Annotated[
        int, _model(metavar="32|64|128", help="Keys or values that share one scale.")
    ] = DEFAULT_GROUP_SIZE
    wired: Annotated[
        bool,
        _model(
            "--wired",
            help="On a Mac, keep the models' memory from being paged out, as much as they need.",
        ),
    ] = False
    draft_tokens: Annotated[
        Any,
        _drafting(
            "--draft-tokens",
            "--max-draft-tokens",
            metavar=f"auto|0-{MAX_DRAFT_TOKENS}",
            parser=draft_tokens_of,
            help="Tokens proposed in a round. auto measures what pays, and proposes nothing where "
            "nothing does. The pair's own by default, which is auto for most.",
            show_default=False,
        ),
    ] = None
    draft_bits: Annotated[
        int | None, _drafting(metavar="4|8", help="Quantise trained heads while they are loaded.")
    ] = None
    no_speculation: Annotated[
        bool, _drafting("--no-speculation", help="Decode plainly: propose nothing.")
    ] = False
    no_fallback: Annotated[
        bool,
        _drafting(
            "--no-fallback",
            help="Fail where a pair's draft cannot be used, in place of decoding plainly.",
        ),
    ] = False
    compiled: Annotated[
        bool | None,
        _drafting(
            "--compile/--no-compile",
            help="Compile rounds: yes by default. On a CPU the first run builds kernels for it.",
            show_default=False,
        ),
    ] = None

    @property
    def speculates(self) -> bool:
        return not self.no_speculation and self.draft_tokens != 0

    def kv(self) -> KVQuantization | None:
        """The quantisation of keys and values, if there is any."""
        if self.kv_bits is None:
            if self.kv_group_size != DEFAULT_GROUP_SIZE:
                raise UsageError(
                    f"--kv-group-size {self.kv_group_size} says nothing without --kv-bits.",
                    hint="Add --kv-bits 8, or 4 or 2, which quantises keys and values.",
                )
            return None
        return KVQuantization(self.kv_bits, self.kv_group_size)

    @property
    def falls_back(self) -> bool:
        """Whether a draft that cannot be used is left out: never one that was asked for."""
        return not self.draft and not self.no_fallback

    def chosen(self) -> Pair:
        """The table's pair, or what the options make of it."""
        if self.draft_bits not in (None, 4, 8):
            raise UsageError(f"--draft-bits is {self.draft_bits}.", hint="It must be 4 or 8.")
        if self.no_speculation and self.draft_tokens not in (None, 0):
            asked = f"--draft-tokens {self.draft_tokens}"
            raise UsageError(f"--no-speculation leaves {asked} no place.", hint="Leave one out.")
        pair = self._named()
        return replace(
            pair,
            adapter=self.adapter or pair.adapter,
            revision=self.revision or pair.revision,
            draft_bits=self.draft_bits or pair.draft_bits,
        )

    def _named(self) -> Pair:
        drafts = tuple(dict.fromkeys(self.draft or ()))
        draft = drafts[0] if len(drafts) == 1 else drafts or None
        if self.target is not None:
            if self.pair is not None:
                raise UsageError(
                    f"--pair {self.pair} and --target {self.target} both name a target.",
                    hint="Leave one out; --draft names a draft for the target.",
                )
            if self.models is not None:
                load_pairs(self.models)  # nothing of it is used, but what is wrong with it is said
            return Pair(name=self.target, target=self.target, draft=draft)
        pair = find_pair(self.pair or default_pair(self.models), self.models)
        if draft is None:
            return pair
        return replace(pair, draft=draft, draft_tokens=AUTO, note="")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The prompt's surroundings, and the end of the text."""

    max_tokens: Annotated[int, _text(min=1, help="Tokens to write at most.")] = DEFAULT_MAX_TOKENS
    no_stdin: Annotated[
        bool, _text("--no-stdin", help="Take the argument alone, whatever is piped in.")
    ] = False
    system: Annotated[str | None, _text(help="A system message.")] = None
    stop: Annotated[
        list[str] | None, _text(metavar="TEXT", help="End before this text; repeatable.")
    ] = None
    raw: Annotated[bool, _text("--raw", help="Use no chat template.")] = False
    template_arg: TemplateArgOption = None
    eos: Annotated[
        list[str] | None,
        _text(
            metavar="TOKEN",
            help="The name of a token that ends the text too, such as '<|end|>'; repeatable.",
        ),
    ] = None
    prediction: Annotated[
        Path | None,
        _text(
            metavar="FILE",
            help="A text that the output is expected to resemble, such as the file that it edits. "
            "It is proposed wherever the output follows it.",
        ),
    ] = None
    cache: Annotated[
        Path | None,
        _text(
            metavar="FILE",
            help="Keep the prompt's past in this file: the next prompt that begins with the same "
            "tokens starts from there.",
        ),
    ] = None
    constraint: Annotated[
        str | None, typer.Option("--json-schema", "--grammar", "--response-format", hidden=True)
    ] = None

    def texts(self, pair: Pair) -> dict[str, Any]:
        """The texts by the names that `Engine.request` gives them, a pair's where none is given."""
        system, arguments = self.system, template_args(self.template_arg)
        if not self.raw:  # which has no place for either
            system = pair.system if system is None else system
            arguments = {**pair.template_args, **arguments}
        return {
            "system": None if system is None else as_text(system, "The system message"),
            "stop": _stops(self.stop),
            "eos": _texts(self.eos, "The token's name"),
            "template_args": arguments,
        }

    def cache_file(self) -> Path | None:
        """The file of the prompt cache; raises UsageError where it is a folder."""
        if self.cache is None:
            return None
        path = expanded(self.cache)
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
class OutputOptions:
    """The part of the result that is shown."""

    as_json: Annotated[bool, _output("--json", help="Print one JSON object on stdout.")] = False
    quiet: Annotated[bool, _output("--quiet", "-q", help="Nothing on stderr but errors.")] = False


@dataclass(frozen=True, kw_only=True)
class ReasoningOptions:
    """Whether the reasoning is shown beside the answer."""

    reasoning: Annotated[
        bool | None,
        _output(
            "--show-reasoning/--hide-reasoning",
            help="Whether stdout has a model's reasoning before its answer: on a terminal by "
            "default. --json has both in any case, apart.",
            show_default=False,
        ),
    ] = None
