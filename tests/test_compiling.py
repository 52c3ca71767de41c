"""Which kinds of rounds have kernels of their own, and when rounds are compiled."""

from __future__ import annotations

import pytest

from mlxspec.device import kernels
from mlxspec.device.compiling import Compiling, Kind
from mlxspec.params import SamplingParams

GREEDY = SamplingParams().with_seed().method(None)
PLAIN, TEXT = Kind(0, from_text=False), Kind(1, from_text=True)


def steps(count: int) -> Kind:
    return Kind(count, from_text=False)


def compiling(*, models: bool = False, texts: bool = False, asked: bool | None = None) -> Compiling:
    return Compiling("models", models_draft=models, text_drafts=texts, asked=asked)


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("auto", [True, False])
def test_plain_decoding_is_of_one_kind(texts: bool, auto: bool) -> None:
    assert compiling(models=True, texts=texts).kinds(0, auto=auto) == [PLAIN]


def test_from_a_second_draft_step_on_no_operation_is_new() -> None:
    models = compiling(models=True)
    assert models.kinds(5, auto=False) == [steps(5)]
    assert models.kinds(5, auto=True) == [PLAIN, steps(1), steps(2)]
    assert models.kinds(1, auto=True) == [PLAIN, steps(1)]


def test_what_the_text_proposes_comes_between_plain_rounds() -> None:
    assert compiling(texts=True).kinds(5, auto=False) == [PLAIN, TEXT]
    both = compiling(models=True, texts=True)
    assert both.kinds(5, auto=True) == [PLAIN, steps(1), steps(2), TEXT]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of kinds whose kernels there are."""
    names: set[str] = set()
    monkeypatch.setattr(kernels, "can_compile", lambda: True)
    monkeypatch.setattr(kernels, "are_built", names.__contains__)
    monkeypatch.setattr(kernels, "mark_built", names.add)
    return names


def test_rounds_are_compiled_once_all_their_kernels_are_there(built: set[str]) -> None:
    both = compiling(models=True, texts=True)
    for kind in both.kinds(5, auto=True):
        assert not both.holds(GREEDY, 5, auto=True)
        assert both.would_hold(GREEDY, 5, auto=True)
        both.built(GREEDY, kind)
    assert both.holds(GREEDY, 5, auto=True)
    assert not both.would_hold(GREEDY, 5, auto=True)
    assert both.holds(GREEDY, 7, auto=False)
    assert len(built) == 4


@pytest.mark.parametrize("asked", [True, False])
def test_what_a_caller_has_decided_holds(built: set[str], asked: bool) -> None:
    assert compiling(asked=asked).holds(GREEDY, 0, auto=False) == asked
    assert not compiling(asked=asked).would_hold(GREEDY, 0, auto=False)


def test_nothing_is_compiled_without_a_compiler(
    built: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "can_compile", lambda: False)
    assert not compiling().holds(GREEDY, 0, auto=False)
    assert not compiling().would_hold(GREEDY, 0, auto=False)
