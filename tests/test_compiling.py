"""Which kinds of rounds have kernels of their own, and when rounds are compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxspec.device import kernels
from mlxspec.device.compiling import MIXED, Compiling, Kind
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
    alone = [PLAIN, steps(1), steps(2), TEXT]
    beside = [kind._replace(beside=True) for kind in alone]
    assert both.kinds(5, auto=True, beside=True) == [*alone, *beside, MIXED]


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


# --- kernels --------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (kernels.on_cpu() and kernels.can_compile() and sys.platform == "linux"),
    reason="kernels are built on a CPU alone, and headers precompiled on Linux alone",
)
BUILDS = """
import mlx.core as mx
from mlxspec.device import kernels
with kernels.quick_builds():
    mx.eval(mx.compile(lambda x: mx.sigmoid(x) * x)(mx.ones(4)))
assert kernels.count_built() == 1
"""


@needs_compiler
def test_mlx_builds_kernels_with_the_precompiled_header(tmp_path: Path) -> None:
    # In place of g++: the same, and it lists the headers that it reads.
    log, compiler = tmp_path / "log", tmp_path / "bin" / kernels.COMPILER
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -H "$@" 2>> {log}\n')
    compiler.chmod(0o755)
    paths = os.pathsep.join([str(compiler.parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": paths, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", BUILDS], env=env, check=True)
    # "!" stands before a precompiled header that is taken, "x" before one that is not.
    marks = {line[0] for line in log.read_text().splitlines() if line.endswith(".h.gch")}
    assert marks == {"!"}
    assert not list(tmp_path.rglob("*.gch"))


@needs_compiler
def test_a_header_that_cannot_be_precompiled_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COMPILER", "false")
    monkeypatch.setattr(kernels, "_folder", lambda: tmp_path)
    with kernels.quick_builds():
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
