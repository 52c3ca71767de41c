"""How many texts of a pair loop, and how many of its functions parse, greedily and sampled.

    python -m mlxspec.bench loops                  # the embedded pair, 64 held-out prompts
    python -m mlxspec.bench loops --count 16 --json FILE

A text loops where a line, or a phrase of 5 tokens, stands more than 3 times in a row. A function
counts where the text writes its body to the end; sampling is with the pair's own values.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import track

from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.decode.engine import Engine
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import machine
from mlxspec.pairs.loading import load
from mlxspec.pairs.table import find_pair
from mlxspec.params import SamplingParams, sampling_params

PHRASE, OFTEN = 5, 4  # tokens, and times in a row, from which on a text loops
_START = re.compile(r"( *)(?:async )?def \w+\(")


def loops(tokens: Sequence[int], text: str) -> bool:
    """Whether a line or a phrase is repeated; blank lines do not count."""
    lines = (line.strip() for line in text.splitlines() if line.strip())
    if any(len(list(same)) >= OFTEN for _, same in groupby(lines)):
        return True
    equal = 0  # tokens that equal the one a phrase before, one after the other
    for before, token in zip(tokens, tokens[PHRASE:], strict=False):
        equal = equal + 1 if before == token else 0
        if equal >= PHRASE * (OFTEN - 1):
            return True
    return False


def whole_functions(text: str) -> Iterator[str]:
    """The functions whose bodies a text ends: a line follows that is indented no further.

    A function that is cut off at the text's end is none of them, nor is a line that closes a
    signature's bracket an end. Functions inside functions count too.
    """
    lines = text.splitlines()
    for first, line in enumerate(lines):
        start = _START.match(line)
        if start is None:
            continue
        for last in range(first + 1, len(lines)):
            words = lines[last].lstrip(" ")
            if words and words[0] not in ")]}" and len(lines[last]) - len(words) <= start.end(1):
                yield textwrap.dedent("\n".join(lines[first:last]))
                break


def parses(source: str) -> bool:
    """Whether Python reads a source."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            ast.parse(source)
        except (SyntaxError, ValueError):
            return False
    return True


class Sense(NamedTuple):
    """What was counted: the numbers of the prompts whose texts loop, and of functions."""

    looping: list[int]
    functions: int
    parsed: int


def sense(engine: Engine, prompts: Sequence[str], params: dict[str, float]) -> Sense:
    """Of texts of 120 tokens; each prompt is its own seed."""
    looping, functions = [], []
    for seed, prompt in enumerate(track(prompts, "decoding", transient=True)):
        sampling = sampling_params(params, seed=seed)
        result = engine.generate(prompt, max_tokens=120, sampling=sampling)
        if loops(result.tokens, result.text):
            looping.append(seed)
        functions += [parses(one) for one in whole_functions(result.text)]
    return Sense(looping, len(functions), sum(functions))


def main(
    pair: PairOption = DEFAULT_PAIR,
    count: Annotated[int, typer.Option(min=1, help="How many of the prompts.")] = 64,
    output: JsonFile = None,
) -> None:
    """Count loops and functions, greedily and with the pair's own sampling values."""
    console, engine = Console(), load(pair)
    prompts = beginnings("python")[:count]
    result: dict[str, Any] = {"machine": machine.about(), "pair": pair, "prompts": len(prompts)}
    for values in ({}, dict(find_pair(pair).sampling)):
        engine.build_kernels(SamplingParams() if not values else sampling_params(values))
        name = ", ".join(sampling_params(values).in_words())
        found = sense(engine, prompts, values)
        result[name] = found._asdict()
        console.print(
            f"{name}: {len(found.looping)} of {len(prompts)} texts loop, "
            f"{found.parsed} of {found.functions} functions parse"
        )
    write(result, output)
