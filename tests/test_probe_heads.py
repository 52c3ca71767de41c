"""Probes of MTP layers, one alone and several beside each other, with a draft model too."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from clocks import Clock, Slowed, growing
from conftest import draft_for
from mtp_makers import head_for
from test_mtp_decoding import certain, cycle, knowing

from mlxspec.control.replay import Proposed
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MODEL
from mlxspec.drafters.heads.mtp import MOST, Mtp
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.measure.acceptance import of_head
from mlxspec.measure.probe import probe

COUNT = 40
pytestmark = pytest.mark.usefixtures("rooms")


def partly(every: int) -> Mtp:
    """A layer that knows the cycle, but for what follows one of so many tokens."""
    weights = knowing("embedding")
    unknown = cycle()[::every]
    weights["fc.weight"][:, unknown] = np.roll(weights["fc.weight"], 1, axis=0)[:, unknown]
    return head_for(certain(), weights)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_replayed_of_an_mtp_layer_is_what_rounds_keep(count: int) -> None:
    engine = Engine(certain(), heads={"mtp": partly(5)}, compiled=False)
    session = engine.session([3, 1, 4], max_tokens=COUNT, draft_tokens=count)
    session.step()  # proposes nothing
    came = []
    while stats := session.step().stats:
        came.append(Proposed(stats.drafted, stats.accepted))
    found = of_head(engine, [(session.text[:4], session.text[4:])], 8)
    assert list(found) == [1, 2, 3]
    replayed = found[count]
    assert len(replayed) > 5
    assert came[: len(replayed)] == replayed
    assert len({one.right for one in replayed}) > 1


def test_every_head_is_probed_beside_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    target: Any = Slowed(certain(), clock, growing(0.2, 0.01))
    layers = {"all": head_for(certain(), knowing("embedding")), "some": partly(3)}
    heads = {name: Mtp(one._layer, Trunk(target)) for name, one in layers.items()}
    engine = Engine(target, draft_for(certain(), "never"), heads=heads, compiled=False)
    told = probe(engine, [[1, 2, 3]], budget_s=120)
    assert told.forecast is not None
    found = told.forecast.drafters
    assert list(found) == [MODEL, "all", "some"]
    assert found["all"].acceptance(3) == (1.0,) * 3
    assert 0.4 < found["some"].acceptance(1)[0] < 0.9
    for name in heads:
        assert list(found[name].rounds) == list(range(1, MOST + 1))
        assert not found[name].at_once
    best = told.forecast.best()
    assert (best.drafter, best.draft_tokens) == ("all", MOST)
    assert any((one.drafter, one.draft_tokens) == ("all", MOST) for one in told.tried)
