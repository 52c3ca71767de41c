"""The options of `mlxspec bench`, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mlxspec.errors import UsageError

if TYPE_CHECKING:
    from mlxspec.bench.plan import Settings
    from mlxspec.bench.prompt_sets import Prompt
    from mlxspec.bench.results import Results

_what = partial(typer.Option, rich_help_panel="What is measured", show_default=False)
_how = partial(typer.Option, rich_help_panel="How", show_default=False)
_left = partial(typer.Option, rich_help_panel="Output")

Value = TypeVar("Value")

QUICK_CONFIGS, QUICK_TYPES = "none,3,auto", "code,chat,edit"
ALONE_CONFIGS = "none,auto"  # where --types none leaves out the comparison of all
QUICK_TOKENS, QUICK_MINUTES = 48, 0.5
FULL_SYSTEMS, FULL_TEMPS = "none,direct,expert,concise", "0,0.7,1"
FULL_CONTEXTS, FULL_ROWS = "256,1024,4096,16384", "1,2,4,8,16"


class Format(StrEnum):
    """The forms of the results in a file."""

    JSON = "json"
    LLAMA_BENCH = "llama-bench-jsonl"

    def text(self, results: Results) -> str:
        if self is Format.JSON:
            return results.as_json()
        from mlxspec.bench.llama_bench import jsonl

        return jsonl(results)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, how long, and where the results go."""

    configs: Annotated[
        str | None,
        _what(
            metavar="LIST",
            help="Ways to decode, such as none,3,5,7,auto (the default). A drafter or a rule goes "
            "before K: history:5, model:3, block:3. cold:auto has learned nothing from earlier "
            "texts, and serial:auto writes texts side by side one after the other. Plain decoding, "
            "none, is always one of them.",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        _what(
            metavar="FILE",
            help="Prompts of your own: Spec-Bench's or MT-bench's question.jsonl, or a text or a "
            "JSON object on each line.",
        ),
    ] = None
    types: Annotated[
        str | None,
        _what(
            metavar="LIST",
            help="Types of prompts: code, explanation, security, creative, translation, summary, "
            "edit, maths and chat, all by default. none, or none,code, compares under other "
            "conditions alone.",
        ),
    ] = None
    system: Annotated[
        str | None,
        _what(
            metavar="LIST",
            help="System prompts: none, direct, expert, concise. Several are compared; the first "
            "holds for everything else.",
        ),
    ] = None
    temps: Annotated[
        str | None,
        _what(
            metavar="LIST",
            help="Temperatures, such as 0,0.7,1. Several are compared; the first, 0 by default, "
            "holds for everything else.",
        ),
    ] = None
    contexts: Annotated[
        str | None, _what(metavar="LIST", help="Lengths of prompts, such as 256,1024,4096,16384.")
    ] = None
    rows: Annotated[
        str | None, _what(metavar="LIST", help="Texts side by side, such as 1,2,4,8,16.")
    ] = None
    shape: Annotated[
        list[str] | None,
        _what(
            metavar="TARGET[:BITS][+DRAFT[:BITS]]",
            help="In place of models, random weights of a shape, such as "
            "llama-8b:4bit+llama-1b:4bit: what rounds cost, and the acceptance from which each K "
            "pays. A folder or a repository with a config.json is a shape too; repeatable.",
        ),
    ] = None
    full: Annotated[
        bool,
        _what(
            "--full",
            help="Measure all of that: each system prompt, temperature, length, number of rows.",
        ),
    ] = False
    quick: Annotated[
        bool,
        _how("--quick", help="Measure less: for half a minute in all."),
    ] = False
    minutes: Annotated[
        float | None,
        _how(min=0.01, metavar="MINUTES", help="Measure for this long at most; 10 by default."),
    ] = None
    precision: Annotated[
        str,
        _how(
            metavar="PERCENT",
            help="Go on until half of each interval is below this part of its median, or until "
            "only other prompts could narrow it; 3% by default.",
        ),
    ] = "3%"
    max_tokens: Annotated[
        int | None, _how(min=8, help="Tokens of each text at most; 128 by default.")
    ] = None
    seed: Annotated[int, _how(min=0, help="Seed of the random numbers; 0 by default.")] = 0
    json_file: Annotated[
        Path | None,
        _left("--json", metavar="FILE", help="Write the results here; - is stdout."),
    ] = None
    format: Annotated[Format, _left(help="What --json writes.")] = Format.JSON
    report: Annotated[
        Path | None,
        _left(
            metavar="DIR", help="Write results.json, report.md and report.html into this folder."
        ),
    ] = None
    targets: Annotated[
        bool,
        _left(
            "--targets",
            help="Compare the result with the targets: acceptance, speed-up, time to the first "
            "token, memory. The exit code is 1 where one is missed.",
        ),
    ] = False
    quiet: Annotated[bool, _left("--quiet", "-q", help="Nothing on stderr but errors.")] = False

    def settings(self) -> Settings:
        """Every choice of the run.

        Raises:
            UsageError: a list or a number cannot be read.
        """
        from mlxspec.bench.plan import CONFIGS, NO_TYPES, Settings, require_systems

        def listed(given: str | None, quick: str, full: str, usual: str) -> str:
            if given is not None:
                return given
            return quick if self.quick else full if self.full else usual

        systems = _list("--system", listed(self.system, "none", FULL_SYSTEMS, "none"), str)
        require_systems(systems)
        quick_types = "" if self.prompts else QUICK_TYPES
        types = _list("--types", listed(self.types, quick_types, "", ""), str)
        contexts = listed(self.contexts, "", FULL_CONTEXTS, "")
        rows = listed(self.rows, "", FULL_ROWS, "")
        usual = ALONE_CONFIGS if NO_TYPES in types else ",".join(CONFIGS)
        configs = listed(self.configs, QUICK_CONFIGS, usual, usual)
        temps = listed(self.temps, "0", FULL_TEMPS, "0")
        return Settings(
            configs=_list("--configs", configs, str),
            types=types,
            systems=systems,
            temperatures=_list("--temps", temps, float),
            contexts=_list("--contexts", contexts, _positive),
            rows=_list("--rows", rows, _rows),
            max_tokens=self.max_tokens or (QUICK_TOKENS if self.quick else Settings.max_tokens),
            precision=share("--precision", self.precision),
            minutes=self.minutes or (QUICK_MINUTES if self.quick else Settings.minutes),
            seed=self.seed,
        )

    def of_texts(self) -> dict[str, object]:
        """The options that say something of texts, by name."""
        return {
            "--configs": self.configs,
            "--prompts": self.prompts,
            "--types": self.types,
            "--system": self.system,
            "--temps": self.temps,
            "--contexts": self.contexts,
            "--rows": self.rows,
            "--full": self.full or None,
            "--max-tokens": self.max_tokens,
            "--targets": self.targets or None,
        }

    def prompt_set(self, settings: Settings) -> tuple[Prompt, ...]:
        """The prompts of the run.

        Raises:
            PromptError: a file cannot be read, or there are none of a type.
        """
        from mlxspec.bench import prompt_sets
        from mlxspec.bench.plan import NO_TYPES
        from mlxspec.cli.arguments.prompts import read_prompts, read_text

        found = prompt_sets.shipped()
        if self.prompts is not None:
            content = read_text(self.prompts)
            found = (
                prompt_sets.spec_bench(content, str(self.prompts))
                if prompt_sets.is_spec_bench(content)
                else prompt_sets.of_texts(read_prompts(self.prompts))
            )
        types = [name for name in settings.types if name != NO_TYPES]
        return prompt_sets.of_types(found, types) if types else found


def _list(option: str, text: str, kind: Callable[[str], Value]) -> tuple[Value, ...]:
    """The values of a list, each once."""
    try:
        return tuple(dict.fromkeys(kind(one.strip()) for one in text.split(",") if one.strip()))
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is no list of that kind: {error}.",
            hint="Separate values by commas; `mlxspec bench --help` has an example of each.",
        ) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is less than 1")
    return value


def _rows(text: str) -> int:
    value = _positive(text)
    if value > 32:
        raise ValueError(f"{value} is more than the 32 texts that are written side by side")
    return value


def share(option: str, text: str) -> float:
    """A part of 1, from a percentage or a number below 1."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UsageError(
            f"{option} {text!r} is no part of a whole.", hint="Give a percentage, such as 3%."
        )
    return value
