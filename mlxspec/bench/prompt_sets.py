"""The prompts of `mlxspec bench`: those that come with it, and files in the form of Spec-Bench.

`question.jsonl` of MT-bench and of Spec-Bench has an object on each line: `question_id`, `category`
and `turns`, the messages of a user, one after the other. No MLX.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mlxspec.errors import PromptError, nearest

_FOLDER = Path(__file__).resolve().parent / "prompts"
OWN = "own"  # the type of prompts that name none

_THINGS = ("hinges", "lamp shades", "oil cans", "roof tiles", "ropes", "saw blades", "seed bags")
_STATES = ("sound", "damp", "counted twice", "to be sold", "out on loan", "reserved", "without lid")


@dataclass(frozen=True)
class Prompt:
    """The turns of a user, at least one, with an id and a type."""

    id: str
    type: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One turn of a prompt; `before` are the steps that the conversation has behind it."""

    prompt: Prompt
    turn: int = 0

    @property
    def id(self) -> str:
        return self.prompt.id if self.turn == 0 else f"{self.prompt.id}.{self.turn + 1}"

    @property
    def before(self) -> Iterator[Step]:
        return (Step(self.prompt, turn) for turn in range(self.turn))

    @property
    def text(self) -> str:
        return self.prompt.turns[self.turn]


@cache
def shipped() -> tuple[Prompt, ...]:
    """Several prompts of each type, which were written for this; see prompts/README.md."""
    return _read("prompts.jsonl")


@cache
def beginnings(kind: str) -> tuple[str, ...]:
    """Beginnings of `python`, of files that the embedded pair never saw, `prose` or `repetitive`.

    A model that was never taught to answer continues them.
    """
    return tuple(one.turns[0] for one in of_types(_read("beginnings.jsonl"), [kind]))


def _read(name: str) -> tuple[Prompt, ...]:
    return spec_bench((_FOLDER / name).read_text(encoding="utf-8"), name)


@cache
def systems() -> dict[str, str | None]:
    """The system messages by name; `none` is none."""
    own: dict[str, str] = json.loads((_FOLDER / "systems.json").read_text(encoding="utf-8"))
    return {"none": None, **own}


def is_spec_bench(content: str) -> bool:
    """Whether a file has objects with `turns`, judging by its first line."""
    first = next((line for line in content.splitlines() if line.strip()), "")
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and "turns" in entry


def spec_bench(content: str, where: str) -> tuple[Prompt, ...]:
    """The prompts of a `question.jsonl`.

    Args:
        where: the file's name, for errors.

    Raises:
        PromptError: a line is no object with `turns`, or there is no line.
    """
    lines = enumerate(content.split("\n"), 1)
    found = tuple(_prompt_of(line, at, where) for at, line in lines if line.strip())
    if not found:
        raise PromptError(f"There are no prompts in {where}.", hint=_FORM)
    ids = [prompt.id for prompt in found]
    twice = next((one for one in ids if ids.count(one) > 1), None)
    if twice is not None:
        raise PromptError(f"{where} has two prompts with the id {twice}.", hint="Rename one.")
    return found


_FORM = 'Give an object on each line: {"question_id": 1, "category": "chat", "turns": ["Hello"]}.'


def _prompt_of(line: str, at: int, where: str) -> Prompt:
    entry: Any = None
    try:
        entry = json.loads(line)
        turns = [str(turn) for turn in entry["turns"] if isinstance(turn, str) and turn.strip()]
        if not turns or len(turns) < len(entry["turns"]) or isinstance(entry["turns"], str):
            raise TypeError
    except (ValueError, RecursionError, LookupError, TypeError):
        raise PromptError(f"Line {at} of {where} is no prompt with turns.", hint=_FORM) from None
    name = entry.get("question_id", at)
    return Prompt(str(name), str(entry.get("category") or OWN), tuple(turns))


def of_texts(texts: Iterable[str]) -> tuple[Prompt, ...]:
    """Prompts of one turn and no type."""
    return tuple(Prompt(f"{OWN}-{at}", OWN, (text,)) for at, text in enumerate(texts, 1))


def of_types(prompts: Sequence[Prompt], types: Sequence[str]) -> tuple[Prompt, ...]:
    """Those of some types, in the order of the types.

    Raises:
        PromptError: there are none of a type.
    """
    known = list(dict.fromkeys(prompt.type for prompt in prompts))
    for name in types:
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near}? " if near else ""
            raise PromptError(
                f"There are no prompts of the type {name!r}.",
                hint=f"{hint}The types are {', '.join(known)}.",
            )
    return tuple(prompt for name in types for prompt in prompts if prompt.type == name)


def mixed(prompts: Sequence[Prompt]) -> list[Step]:
    """Every turn of every prompt, the types by turns: the first of each, then the second of each.

    The turns of one prompt follow each other, because each needs the answer to the one before.
    """
    types = dict.fromkeys(prompt.type for prompt in prompts)
    columns = [[prompt for prompt in prompts if prompt.type == name] for name in types]
    ordered = [one for row in zip_longest(*columns) for one in row if one is not None]
    return [Step(prompt, turn) for prompt in ordered for turn in range(len(prompt.turns))]


def hash_of(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of ids, types and turns, in order."""
    lines = (json.dumps([one.id, one.type, one.turns], ensure_ascii=False) for one in prompts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def ledger(tokens: int, seed: int, count: Callable[[str], int]) -> str:
    """A prompt of about so many tokens: a list in which no line repeats, and a question.

    The question invites no copying of the list.

    Args:
        count: the tokens of a prompt.
    """
    ask = "\n\nIn your own words, how would you keep such a store in order? Do not repeat the list."
    lines: list[str] = []
    rng, size = random.Random(seed), 1
    per_line = max(1, count(_line(random.Random(seed), 0)))
    while size < tokens:
        missing = max(1, (tokens - size) // per_line)
        lines += [_line(rng, len(lines) + at) for at in range(missing)]
        size = count("\n".join(lines) + ask)
    while lines and size > tokens:
        extra = max(1, (size - tokens) // (2 * per_line))
        del lines[-extra:]
        size = count("\n".join(lines) + ask)
    return "\n".join(lines) + ask


def _line(rng: random.Random, number: int) -> str:
    return (
        f"{number + 1}. Shelf {rng.randrange(900)}, row {rng.randrange(40)}: {rng.randrange(2, 99)}"
        f" {rng.choice(_THINGS)}, {rng.choice(_STATES)} since {rng.randrange(1, 29)}."
        f"{rng.randrange(1, 13)}.{rng.randrange(1960, 2020)}"
    )
