"""How many proposals rounds would keep, counted along texts that plain decoding has written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import mlx.core as mx

from mlxspec.control import replay
from mlxspec.control.estimates import SIZES
from mlxspec.control.replay import Proposed
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.device import lengths
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.prefill import Reading, finished, prefill
from mlxspec.sampling.sampler import Sampler
from mlxspec.sampling.verify import Draft

Text = tuple[list[int], list[int]]  # a prompt, and what follows it


def written(engine: Engine, prompt: Sequence[int], tokens: int, text: list[int]) -> Iterator[int]:
    """Decode a prompt plainly and greedily, and add what follows to `text`, token by token.

    Yields:
        How many tokens are written.
    """
    session = engine.session(prompt, max_tokens=tokens, draft_tokens=0)
    while committed := session.step().tokens:
        text += committed
        yield len(text)


def agreement(cached: CachedModel, text: Text) -> list[bool]:
    """For every token after the prompt, whether a draft would propose it."""
    prompt, following = text
    caches, _ = finished(prefill(Reading(cached, prompt[:-1])))
    rows = mx.minimum(mx.array([[prompt[-1], *following[:-1]]]), cached.vocabulary - 1)
    best = mx.argmax(cached.model(rows, cache=caches)[0], axis=-1)
    return cast(list[bool], (best == mx.array(following)).tolist())


def of_model(cached: CachedModel, texts: Sequence[Text], most: int) -> dict[int, list[Proposed]]:
    """The rounds of a draft model along texts, for every K that they are long enough for.

    Args:
        most: the largest K.
    """
    along = [replay.along_model(agreement(cached, text), MAX_AUTO_TOKENS) for text in texts]
    return _replayed(along, {count: [count] for count in range(1, most + 1)})


def along_head(engine: Engine, text: Text, most: int) -> list[Proposed]:
    """The proposals of a head at each place of a text, by an engine that has it alone."""
    (name,) = engine.heads
    prompt, following = text
    rounds = engine.rounds.with_sampler(Sampler(GREEDY.method(), engine.models[0].vocabulary))
    length = lengths.attended(len(prompt) + len(following) + most + 1)
    state = engine.prefilled(prompt, capacity=length)
    propose, _ = rounds.halves(most, length, name)
    places, before = [], prompt[-1]
    for at, token in enumerate(following):
        draft = Draft(*propose(state)[0])
        proposed = cast(list[int], draft.tokens[0].tolist())
        if draft.limit is not None:
            proposed = proposed[: cast(int, draft.limit.item())]
        right = replay.agreeing(proposed, following[at : at + most])
        places.append(Proposed(len(proposed), right))
        state, _ = rounds(state, draft_tokens=0, length=length, drafter=name)
        state = state._replace(last_two=mx.array([[before, token]], mx.int32))
        mx.eval(state)
        before = token
    return places


def of_head(engine: Engine, texts: Sequence[Text], most: int) -> dict[int, list[Proposed]]:
    """The rounds of a head along texts, for every K that they are long enough for.

    Args:
        engine: has that head alone. most: the largest K.
    """
    (head,) = engine.heads.values()
    most = min(most, head.most)
    along = [along_head(engine, text, most) for text in texts]
    # It may propose fewer than it is asked for.
    sizes = {count: list(range(count + 1)) for count in range(1, most + 1)}
    return _replayed(along, sizes)


def of_text(
    make: Callable[[], TextDrafter], texts: Sequence[Text], most: int
) -> dict[int, list[Proposed]]:
    """The rounds of a text drafter along texts, for every largest K that they are long enough for.

    Args:
        most: the largest K.
    """
    along = [replay.along_text(make(), *text) for text in texts]
    sizes = [size for size in SIZES if size <= most]
    return _replayed(along, {size: [one for one in SIZES if one <= size] for size in sizes})


def _replayed(
    along: Sequence[Sequence[Proposed]], sizes: Mapping[int, Sequence[int]]
) -> dict[int, list[Proposed]]:
    """The rounds of every K along all texts; a K without a whole round is not there."""
    found = {
        count: [one for places in along for one in replay.rounds(places, of_round)]
        for count, of_round in sizes.items()
    }
    return {count: replayed for count, replayed in found.items() if replayed}
