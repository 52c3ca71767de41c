"""Kinds of text that decoding is measured on, and the engines that decode them."""

from __future__ import annotations

import colorsys
import inspect
import json
import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from mlxspec.bench.dictated import Dictated
from mlxspec.bench.rounds import COUNTS, PROMPTS
from mlxspec.decode.engine import Engine
from mlxspec.drafters.history import History
from mlxspec.models.caches.original import Model

COPY_COUNTS = (3,)  # a draft that cannot copy loses with any K
ROWS = 24  # of the list that is reformatted
PROSE = (
    "The harbour was quiet in the early morning, and the fishermen who had come back",
    "Dear Ms Halloran, thank you for your letter of the third of May. We are sorry to hear",
    "In the spring of that year the company moved its offices to a larger building near",
    "My grandmother used to say that a good soup begins with patience, and that",
    "The committee met on Tuesday to discuss the proposal for a new library, which",
    "It rained for the whole of the journey, so that by the time we arrived at",
    "Most people believe that the hardest part of learning a language is the grammar, but",
    "When the lights went out in the theatre, nobody in the audience moved, because",
)
REPEATED = (
    "x = 1\n",
    "print('hello')\n",
    "self.value = value\n",
    "    return None\n",
    "[0, 0, 0, 0],\n",
    "if name is None:\n    name = default\n",
    "assert a == b\n",
    "import os\n",
)


class Entrants(NamedTuple):
    """The same target with all drafters, and with one of them alone."""

    auto: Engine
    history: Engine
    model: Engine


class Kind(NamedTuple):
    """A kind of text: its engines, its prompts, the fixed values of K, and the length."""

    entrants: Entrants
    prompts: list[list[int]]
    counts: Sequence[int]
    max_tokens: int


def entrants_of(engine: Engine, target: Model) -> Entrants:
    make = partial(Engine, target, tokenizer=engine.tokenizer, compiled=True)
    return Entrants(
        make(draft=engine.draft, texts=(History,)), make(texts=(History,)), make(draft=engine.draft)
    )


def kinds_of(engine: Engine, count: int, max_tokens: int, copied: int) -> dict[str, Kind]:
    """`count` prompts of each kind of text, as token ids.

    Args:
        max_tokens: of each text. copied: the most tokens of each dictated text.
    """
    code = [entry["text"] for entry in json.loads(PROMPTS.read_text())]
    rng = random.Random(0)
    vocabulary = engine.models[0].vocabulary
    texts = {"code": code, "prose": list(PROSE), "repetitive": [line * 8 for line in REPEATED]}
    chosen = {kind: [engine.encode(t) for t in some[:count]] for kind, some in texts.items()}
    chosen["random tokens"] = [[rng.randrange(vocabulary) for _ in range(48)] for _ in range(count)]
    plain = entrants_of(engine, engine.target)
    kinds = {kind: Kind(plain, prompts, COUNTS, max_tokens) for kind, prompts in chosen.items()}
    tokenizer: Any = engine.tokenizer
    for kind, (given, wanted) in {
        "new": unlike(),
        "edit": edited(),
        "repeat": changed(),
        "JSON": reformatted(),
    }.items():
        prompt, text = (
            list(tokenizer.encode(one, add_special_tokens=False)) for one in (given, wanted)
        )
        entrants = entrants_of(engine, Dictated(engine.target, prompt + text))
        kinds[kind] = Kind(entrants, [prompt] * count, COPY_COUNTS, min(copied, len(text)))
    return kinds


def unlike() -> tuple[str, str]:
    """Sentences in which nothing repeats."""
    first, *others = PROSE
    return f"{first} ", ". ".join(others)


def edited() -> tuple[str, str]:
    """A file of Python of some 160 lines, and the same with names changed and a line gone."""
    source = inspect.getsource(colorsys)
    gone = "# Some floating point constants\n"
    return source + "\n\n", source.replace("yiq", "yuv").replace("YIQ", "YUV").replace(gone, "")


def rows() -> list[dict[str, Any]]:
    rng = random.Random(1)
    names = ["Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Frances", "Tony"]
    return [
        {"id": i, "name": rng.choice(names), "score": rng.randrange(1000), "active": i % 3 == 0}
        for i in range(ROWS)
    ]


def changed() -> tuple[str, str]:
    """A list of objects, one on each line, and the same with every fifth number changed."""
    new = [row | ({"score": 0} if i % 5 == 0 else {}) for i, row in enumerate(rows())]
    given, wanted = ("".join(f"{json.dumps(row)}\n" for row in some) for some in (rows(), new))
    return given + "\n", wanted


def reformatted() -> tuple[str, str]:
    """A list of objects as JSON in one line, and indented."""
    return json.dumps(rows()) + "\n\n", json.dumps(rows(), indent=2)
