"""`mlxspec cascade eval`: what rules and thresholds would have done with prompts of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments import options
from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.help import Command, Group
from mlxspec.cli.arguments.options import ModelOptions, OutputOptions, TextOptions
from mlxspec.cli.arguments.sampling import SamplingOptions
from mlxspec.cli.cascade import UpstreamOptions
from mlxspec.cli.interrupts import leaving
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import DEFAULT_MAX_TOKENS, INTERRUPTED
from mlxspec.errors import UsageError
from mlxspec.files import expanded
from mlxspec.pairs.table import Pair

if TYPE_CHECKING:
    from mlxspec.cascade.answers import Local
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine

EXAMPLES = """
Examples:
  mlxspec cascade eval --prompts mine.txt --pair qwen3-8b
  mlxspec cascade eval --prompts mine.txt --pair qwen3-8b --upstream cerebras
"""
_text = partial(typer.Option, rich_help_panel="Text")

cascade_app = typer.Typer(
    cls=Group, help="Local answers first, another host's when needed.", no_args_is_help=True
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The prompts, their surroundings, and where their answers are kept."""

    prompts: Annotated[
        Path | None,
        _text(
            metavar="FILE",
            help="Prompts of your own: a text or a JSON object on each line, or a JSON list.",
        ),
    ] = None
    answers: Annotated[
        Path | None,
        _text(
            metavar="FILE",
            help="Where answers are kept and found again; by default beside the prompts, with "
            ".answers.jsonl at the end of its name.",
        ),
    ] = None
    max_tokens: Annotated[int, _text(min=1, help="Tokens to write at most.")] = DEFAULT_MAX_TOKENS
    system: Annotated[str | None, _text(help="A system message.")] = None
    template_arg: options.TemplateArgOption = None

    @property
    def given(self) -> Path:
        """The file of prompts; raises UsageError where none is named."""
        if self.prompts is None:
            raise UsageError("There are no prompts.", hint="Name a file of them: --prompts FILE.")
        return self.prompts

    @property
    def file(self) -> Path:
        """Of the answers."""
        if self.answers is not None:
            return expanded(self.answers)
        prompts = expanded(self.given)
        return prompts.with_name(f"{prompts.stem}.answers.jsonl")

    def texts(self, pair: Pair) -> dict[str, Any]:
        """The texts by the names that `Engine.request` gives them."""
        return TextOptions(system=self.system, template_arg=self.template_arg).texts(pair)


@grouped
def evaluate(
    *,
    chosen: EvaluationOptions,
    models: ModelOptions,
    sampling: SamplingOptions,
    upstream: UpstreamOptions,
    output: OutputOptions,
) -> None:
    """Show what each rule and threshold would have done with prompts of your own.

    Each prompt is answered here and, with --upstream, there, once: answers are kept, and another
    evaluation of the same prompts sends nothing.
    """
    from mlxspec.cascade.answers import Kept
    from mlxspec.cascade.gathering import Gathering
    from mlxspec.cli.arguments.prompts import read_prompts
    from mlxspec.cli.outcomes import Shown

    out = Output(output.as_json, output.quiet)
    pair, policy = models.chosen(), upstream.policy()
    thresholds, off = upstream.rules()
    prompts, texts = read_prompts(chosen.given), chosen.texts(pair)
    with out.display(text=False) as display:
        writing = Writing(pair, models, sampling, display, texts, chosen.max_tokens, out.quiet)
        gathering = Gathering(
            prompts,
            Kept(chosen.file),
            writing.about,
            texts["system"],
            writing.write,
            None if policy is None else policy.client,
        )
        upstream_used = None if policy is None else policy.client.upstream
        shown = Shown(gathering, thresholds, off, upstream_used, chosen.file)
        if gathering.lacks_local:
            writing.load()  # what it says comes before the progress
        with leaving(lambda: shown.on(out)):
            interrupted = display.follow(gathering)
        display.close()
        shown.on(out)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


cascade_app.command("eval", cls=Command, epilog=EXAMPLES)(evaluate)


@cascade_app.callback()
def group() -> None:
    """A group of one command is a group all the same."""


@dataclass
class Writing:
    """Writes local answers with models that are loaded once they are needed."""

    pair: Pair
    models: ModelOptions
    sampling: SamplingOptions
    display: Display
    texts: dict[str, Any]
    max_tokens: int
    quiet: bool

    @property
    def about(self) -> dict[str, Any]:
        """What answers depend on, beside the prompt."""
        pair, params = self.pair, self.sampling.params(self.pair.sampling)
        return {
            "target": pair.target,
            "adapter": pair.adapter,
            "revision": pair.revision,
            "kv_bits": self.models.kv_bits,
            "max_tokens": self.max_tokens,
            "sampling": params.as_dict() | {"seed": params.seed},
            **{name: value for name, value in self.texts.items() if value},
        }

    def load(self) -> None:
        """Load the models now."""
        assert self.engine is not None

    @cached_property
    def engine(self) -> Engine:
        models, display = self.models, self.display
        engine = engines.load_engine(self.pair, models, display, [], quiet=self.quiet)
        self.params = self.sampling.recommended(engine, self.pair, display.note)
        request = engine.request([0], sampling=self.params, draft_tokens=models.draft_tokens)
        if request.auto:
            engines.recall(self.pair, engine, display)
        engines.build_kernels(engine, request, display)
        return engine

    def write(self, prompt: str) -> Local:
        from mlxspec.cascade.answers import Local
        from mlxspec.cascade.cascade import judgeable

        engine = self.engine
        assert engine.tokenizer is not None, "a folder has a tokenizer"
        request = engine.request(
            prompt,
            max_tokens=self.max_tokens,
            draft_tokens=self.models.draft_tokens,
            sampling=self.params,
            **self.texts,
        )
        return Local.of(engine.generate(judgeable(request)), request, engine.tokenizer)
