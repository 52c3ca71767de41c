"""What `mlxspec bench` measures: configurations by name, and groups in which they take turns.

No MLX.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from mlxspec.bench.cells import BASELINE, Conditions, Configuration, Question
from mlxspec.bench.prompt_sets import Prompt, Step, mixed, systems
from mlxspec.defaults import AUTO, MAX_DRAFT_TOKENS
from mlxspec.errors import UsageError, nearest
from mlxspec.metrics import counted
from mlxspec.params import Verify

CONFIGS = ("none", "3", "5", "7", "auto")
RULES: tuple[str, ...] = get_args(Verify)
PLAIN = Configuration(name=BASELINE, draft_tokens=0)
NO_TYPES = "none"  # the configurations are not compared on prompts of each type
VARIANTS = 6  # prompts of each length, which are made up
LEAST_TURNS = 4  # of a group, before its intervals are looked at
_FORM = "Give none, a K such as 5, auto, or either of these behind a drafter or a rule: history:5."
_NEEDS = {"cold": "auto, which is what learns: cold:auto.", "serial": "--rows, such as --rows 4."}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every choice of a run.

    Args:
        configs: names; plain decoding is always one of them. types: of prompts; NO_TYPES leaves
            the first two questions out.
        systems: names of system messages. temperatures: to sample at. The first of each holds for
            all questions but its own, which is asked where there are several.
        contexts: lengths of prompts in tokens. rows: texts side by side.
        max_tokens: of each text. precision: half of an interval over its median.
        minutes: that measuring may take. seed: of the random numbers of the first turn.
    """

    configs: tuple[str, ...] = CONFIGS
    types: tuple[str, ...] = ()
    systems: tuple[str, ...] = ("none",)
    temperatures: tuple[float, ...] = (0.0,)
    contexts: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    max_tokens: int = 128
    precision: float = 0.03
    minutes: float = 10.0
    seed: int = 0

    @property
    def compares_types(self) -> bool:
        return NO_TYPES not in self.types


@dataclass(frozen=True, kw_only=True)
class Group(Conditions):
    """Configurations that take turns on the same prompts, under the same conditions.

    Args:
        questions: that the group answers, alone or with others.
        arms: the baseline first.
    """

    questions: tuple[Question, ...]
    arms: tuple[Configuration, ...]

    def in_words(self) -> str:
        """What tells the group from the others of a run."""
        parts = [self.prompt_type]
        parts += [f"{self.context} tokens"] if self.context else []
        parts += [counted(self.rows, "row")] if "rows" in self.questions else []
        parts += [f"system {self.system}"] if "system" in self.questions else []
        parts += [f"temperature {self.temperature:g}"] if "sampling" in self.questions else []
        return ", ".join(filter(None, parts)) or "all prompts"


def configuration(name: str, drafters: Collection[str]) -> Configuration:
    """The configuration that a name spells.

    Args:
        drafters: that there are.

    Raises:
        UsageError: it spells none, or names a drafter or a rule that is not there.
    """
    *before, last = name.strip().split(":")
    if not before and last in (BASELINE, "0"):
        return PLAIN
    count = 0 if last == AUTO else _count(last, name)
    made = Configuration(name=name.strip(), draft_tokens=count, auto=last == AUTO)
    for word in before:
        if word in drafters and not made.drafter:
            made = replace(made, drafter=word)
        elif word in RULES and not made.rule:
            made = replace(made, rule=word)
        elif word == "cold" and made.auto:
            made = replace(made, cold=True)
        elif word == "serial":
            made = replace(made, serial=True)
        else:
            raise _unknown(word, name, drafters)
    return made


def _count(word: str, name: str) -> int:
    if not (word.isascii() and word.isdigit() and 0 < int(word) <= MAX_DRAFT_TOKENS):
        raise UsageError(
            f"{name!r} is no configuration: {word or 'nothing'!r} is no K.",
            hint=f"{_FORM} K is at most {MAX_DRAFT_TOKENS}.",
        )
    return int(word)


def _unknown(word: str, name: str, drafters: Collection[str]) -> UsageError:
    if word in _NEEDS:
        return UsageError(f"{name!r}: {word} says nothing here.", hint=f"It needs {_NEEDS[word]}")
    near = nearest(word, [*drafters, *RULES])
    return UsageError(
        f"{name!r} is no configuration: there is no drafter and no rule {word!r} here.",
        hint=(f"Did you mean {near}? " if near else "")
        + f"The drafters are {', '.join(drafters) or 'none'}, the rules {', '.join(RULES)}.",
    )


def configurations(names: Sequence[str], drafters: Collection[str]) -> tuple[Configuration, ...]:
    """The configurations by name, each once, with plain decoding first."""
    made = [configuration(name, drafters) for name in names]
    return tuple(dict.fromkeys([PLAIN, *made]))


def planned(
    settings: Settings, arms: Sequence[Configuration], prompts: Sequence[Prompt]
) -> tuple[Group, ...]:
    """The groups of a run.

    All configurations take turns on prompts of each type, which says which of them is best, and for
    which type. The other questions compare plain decoding with one of them, `auto` or the last, or
    with all of them where these are the only questions. One that writes texts one after the other
    is compared where there are several.

    Raises:
        UsageError: there is such a one, and no question with several texts.
    """
    serial = [arm for arm in arms if arm.serial]
    if serial and not settings.rows:
        raise _unknown("serial", serial[0].name, ())
    single = tuple(arm for arm in arms if not arm.serial)
    first = Group(
        questions=("configs", "prompts"),
        arms=single,
        system=settings.systems[0],
        temperature=settings.temperatures[0],
    )
    groups = [
        replace(first, prompt_type=name) for name in dict.fromkeys(one.type for one in prompts)
    ]
    few = single
    if settings.compares_types:
        few = tuple(dict.fromkeys([single[0], main_of(single)]))
    asked: list[tuple[Question, str, Sequence[object]]] = [
        ("system", "system", settings.systems if len(settings.systems) > 1 else ()),
        (
            "sampling",
            "temperature",
            settings.temperatures if len(settings.temperatures) > 1 else (),
        ),
        ("context", "context", settings.contexts),
        ("rows", "rows", settings.rows),
    ]
    others = [
        replace(
            first,
            questions=(question,),
            arms=(*few, *serial) if question == "rows" else few,
            **{field: value},  # type: ignore[arg-type]
        )
        for question, field, values in asked
        for value in values
    ]
    return (*(groups if settings.compares_types else ()), *_merged(others))


def without_systems(groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups for a model that has no place for a system message."""
    plain = (one for one in groups if one.system == "none")
    others = (
        replace(one, questions=tuple(name for name in one.questions if name != "system"))
        for one in plain
    )
    return tuple(one for one in others if one.questions)


def main_of(arms: Sequence[Configuration]) -> Configuration:
    """The configuration that is compared with plain decoding under other conditions."""
    return next((arm for arm in arms if arm.name == AUTO), arms[-1])


def _merged(groups: Iterable[Group]) -> Iterator[Group]:
    """Groups of the same conditions as one; several rows are measured in another way than one."""
    found: dict[Group, tuple[Question, ...]] = {}
    for group in groups:
        key = replace(group, questions=("rows",) if "rows" in group.questions else ())
        found[key] = found.get(key, ()) + group.questions
    return (replace(key, questions=questions) for key, questions in found.items())


def steps_of(group: Group, prompts: Sequence[Prompt]) -> list[Step]:
    """The turns of prompts that a group takes, one after the other, again and again."""
    some = [one for one in prompts if group.prompt_type in ("", one.type)]
    if not {"rows", "context"}.isdisjoint(group.questions):
        some = [replace(one, turns=one.turns[:1]) for one in some]
    steps = mixed(some)
    return steps[:VARIANTS] if group.context else steps


def require_systems(names: Iterable[str]) -> None:
    """Raise UsageError where a name is not one of a system message."""
    for name in names:
        if name not in systems():
            raise UsageError(
                f"There is no system message {name!r}.",
                hint=f"The names are {', '.join(systems())}.",
            )
