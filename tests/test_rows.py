"""Texts that join at any step and leave at any place: each is the one that it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
from conftest import KINDS as AGREEMENTS
from conftest import VOCABULARY, draft_for, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_every_cache import FUSED, kv_of, model_of

from mlxspec.decode.batch import Batch, Row
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import Request
from mlxspec.errors import BrokenOutput
from mlxspec.params import Penalties, SamplingParams

pytestmark = pytest.mark.usefixtures("rooms")

LENGTH = 9
COUNTS = (0, 1, 3, 8)
PROMPTS = [prompt_of(length, length) for length in (1, 2, 7, 20)]
NOTHING = dict.fromkeys(range(VOCABULARY), -float("inf"))

# Rows of each batch are sampled by unlike steps, and some of them not at all.
GREEDY = [SamplingParams(), SamplingParams(penalties=Penalties(repetition=1.5))]
WAYS = {
    "greedy": GREEDY,
    **{
        rule: [
            SamplingParams(temperature=0.9, seed=5, verify=rule),
            SamplingParams(temperature=1.2, seed=6, top_k=9, verify=rule),
            *GREEDY,
        ]
        for rule in ("coupled", "block")
    },
}


@cache
def engine_of(kind: str, agreement: str) -> Engine:
    target = model_of(kind)
    return Engine(target, draft_for(target, agreement), compiled=False, kv=kv_of(kind))


@dataclass(frozen=True)
class Setting:
    """What all rows of a batch have in common."""

    kind: str
    agreement: str
    rule: str
    count: int

    def request(self, prompt: int, way: int, limit: int = LENGTH) -> Request:
        ways = WAYS[self.rule]
        return engine_of(self.kind, self.agreement).request(
            PROMPTS[prompt],
            max_tokens=limit,
            draft_tokens=self.count,
            sampling=ways[way % len(ways)],
        )


def alone(setting: Setting, prompt: int, way: int) -> list[int]:
    """The text without others: of greedy and coupled rows the one without a draft."""
    if setting.request(prompt, way).sampling.rule != "block":
        setting = replace(setting, agreement="agrees", count=0)
    return text_of(setting, prompt, way)


@cache
def text_of(setting: Setting, prompt: int, way: int) -> list[int]:
    engine = engine_of(setting.kind, setting.agreement)
    return engine.generate(setting.request(prompt, way)).tokens


@dataclass(frozen=True)
class Text:
    """A text of a batch: it is added `after` so many steps, and ends somewhere, for some reason."""

    after: int
    prompt: int
    way: int
    end: str
    place: int


TEXTS = st.lists(
    st.builds(
        Text,
        after=st.integers(0, 6),
        prompt=st.integers(0, len(PROMPTS) - 1),
        way=st.integers(0, 3),
        end=st.sampled_from(["limit", "cancel", "stop", "bad"]),
        place=st.integers(1, LENGTH),
    ),
    min_size=3,
    max_size=4,
    unique=True,
)


def added(batch: Batch, setting: Setting, text: Text) -> Row:
    limit = text.place if text.end == "limit" else LENGTH
    request = setting.request(text.prompt, text.way, limit)
    if text.end == "stop":
        token = alone(setting, text.prompt, text.way)[text.place - 1]
        request = replace(request, ends=frozenset({token}))
    if text.end == "bad":
        request = replace(request, sampling=replace(request.sampling, logit_bias=NOTHING))
    return batch.add(request)


def written(setting: Setting, texts: Sequence[Text], max_rows: int) -> list[Row]:
    """The rows of texts, each of which was added and cancelled when it wants to be."""
    batch = engine_of(setting.kind, setting.agreement).batch(max_rows)
    rows: dict[Text, Row] = {}
    steps = 0
    while len(rows) < len(texts) or not batch.done:
        for text in texts:
            if text not in rows and text.after <= steps:
                rows[text] = added(batch, setting, text)
        batch.step()
        steps += 1
        for text, row in rows.items():
            if text.end == "cancel" and len(row.generation.tokens) >= text.place:
                row.cancel()
    return [rows[text] for text in texts]


def check(setting: Setting, text: Text, row: Row) -> None:
    expected, found = alone(setting, text.prompt, text.way), row.generation.tokens
    if text.end == "bad":
        assert isinstance(row.error, BrokenOutput)
        assert found == []
        return
    assert row.error is None
    if text.end == "limit":
        assert found == expected[: text.place]
    if text.end == "stop":
        assert found == expected[: expected.index(expected[text.place - 1])]
    if text.end == "cancel":
        assert len(found) >= min(text.place, LENGTH)
        assert found == expected[: len(found)]


@pytest.mark.parametrize("kind", FUSED)
@given(
    texts=TEXTS,
    max_rows=st.integers(2, 5),
    agreement=st.sampled_from(AGREEMENTS),
    rule=st.sampled_from(list(WAYS)),
    count=st.sampled_from(COUNTS),
)
@settings(max_examples=4)
def test_each_text_is_the_one_alone_whoever_joins_and_leaves(
    kind: str, texts: list[Text], max_rows: int, agreement: str, rule: str, count: int
) -> None:
    setting = Setting(kind, agreement, rule, count)
    for text, row in zip(texts, written(setting, texts, max_rows), strict=True):
        check(setting, text, row)
