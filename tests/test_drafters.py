"""Drafters from outside the package: the ones that docs/drafters.md shows, installed and used."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from cli_tools import environment, is_one_error, mlxspec, save_model
from conftest import draft_for, model, plain

from mlxspec import load
from mlxspec.decode.engine import Engine
from mlxspec.defaults import AUTO
from mlxspec.drafters import plugins
from mlxspec.drafters.history import History
from mlxspec.drafters.proposals import PLAIN, Choice, Proposal
from mlxspec.errors import LoadError, UnsupportedModel
from mlxspec.models.caches.positional import FullLayer, Places, written
from mlxspec.models.taps import Taps
from mlxspec.pairs.table import Pair
from mlxspec.params import SamplingParams

PAGE = Path(__file__).resolve().parent.parent / "docs" / "drafters.md"
PROMPT = [5, 9, 2, 7, 1] * 4
LENGTH = 60


def shown() -> dict[str, Any]:
    """What the page's Python comes to."""
    names: dict[str, Any] = {"Proposal": Proposal, "mx": mx}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


SHOWN = shown()


def echo(target: Any) -> Any:
    return SHOWN["Echo"](target, None)


class Recorder:
    """A head that proposes nothing useful and keeps all that it is given, by position."""

    taps = ("model.norm", "model.layers.1")
    most = 3
    width = 64  # of both features

    def begin(self, capacity: int) -> FullLayer:
        shape = (1, 1, capacity)
        return FullLayer(mx.zeros((*shape, 1), mx.int32), mx.zeros((*shape, self.width)))

    def propose(
        self, past: Any, last_two: Any, position: Any, picks: Any, count: int, length: int
    ) -> Any:
        picks.pick_all(mx.zeros((1, count, 64)) + mx.arange(64))
        return past

    def commit(self, past: Any, tokens: Any, features: Any, position: Any, kept: Any) -> Any:
        both = mx.concatenate([features[tap] for tap in self.taps], axis=-1)
        return FullLayer(
            written(past.keys, tokens[:, None, :, None], Places(position)),
            written(past.values, both[:, None], Places(position)),
        )


# --- heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("draft_tokens", [1, 3, AUTO])
def test_a_head_writes_the_plain_text(draft_tokens: Any, compiled: bool) -> None:
    target = model("llama")
    engine = Engine(target, heads={"echo": echo(target)}, compiled=compiled)
    result = engine.generate(PROMPT, max_tokens=LENGTH, draft_tokens=draft_tokens)
    assert result.tokens == plain(target, PROMPT, LENGTH)
    assert set(result.speculation.by_source) == {"echo"}


@pytest.mark.parametrize("rule", ["coupled", "block", "token"])
def test_a_head_that_is_sampled_from(rule: Any) -> None:
    target = model("llama")
    engine = Engine(target, heads={"echo": echo(target)}, compiled=False)
    params = SamplingParams(temperature=1.0, seed=5, verify=rule)
    texts = [
        engine.generate(PROMPT, max_tokens=LENGTH, draft_tokens=k, sampling=params).tokens
        for k in (0, 2, 4)
    ]
    assert (len({tuple(text) for text in texts}) == 1) == (rule == "coupled")


def test_a_head_is_given_the_features_of_every_token_whoever_proposed() -> None:
    target, head = model("llama"), Recorder()
    engine = Engine(
        target, draft_for(target, "half"), texts=(History,), heads={"head": head}, compiled=False
    )
    session = engine.session(PROMPT, max_tokens=300)
    begun = session.ahead(0)[0].capacity
    used = set()
    turns = ["head", "model", "history", ""]
    session.policy.wants = bool  # type: ignore[method-assign]

    def choose(_: int, offers: Any = ()) -> Choice:
        turn = turns[len(session.text) % 4]
        if turn == "history" and offers:
            return Choice("history", 1, offers[0].grade)
        return Choice(turn, 2) if turn in ("head", "model") else PLAIN

    session.policy.choose = choose  # type: ignore[method-assign]
    while stats := session.step().stats:
        used.add(stats.drafter)
    assert used == set(turns)
    past, read = session.ahead(0)[0].drafts["head"], len(session.text) - 1
    assert past.capacity > begun  # the text outgrew its room
    assert past.keys[0, 0, :read, 0].tolist() == session.text[:read]
    with Taps(target, head.taps).watching() as seen:
        target(mx.array([session.text[:read]]))
    expected = mx.concatenate([seen[tap] for tap in head.taps], axis=-1)[0]
    assert mx.max(mx.abs(past.values[0, 0, :read] - expected)).item() < 1e-4


def test_with_a_head_the_target_reads_the_prompt_whatever_a_file_has(tmp_path: Path) -> None:
    target = model("llama")
    for heads in ({}, {"echo": echo(target)}):
        engine = Engine(target, heads=heads, compiled=False)
        result = engine.generate(PROMPT, max_tokens=20, cache=tmp_path / "prompt.cache")
        assert result.tokens == plain(target, PROMPT, 20)
        assert result.cached_prompt_tokens == 0


def interrupted(taps: Taps, target: Any) -> None:
    norm = target.model.norm
    with taps.watching():
        assert target.model.norm is not norm
        raise KeyboardInterrupt


def test_taps_leave_a_model_as_it_was() -> None:
    target = model("llama")
    norm, layers = target.model.norm, list(target.model.layers)
    taps = Taps(target, ["model.norm", "model.layers.0"])
    with pytest.raises(KeyboardInterrupt):
        interrupted(taps, target)
    assert target.model.norm is norm
    assert all(one is other for one, other in zip(target.model.layers, layers, strict=True))


@pytest.mark.parametrize("name", ["model.nothing", "model.layers.99", "norm.weight.x"])
def test_a_target_without_such_a_module_is_refused(name: str) -> None:
    head = Recorder()
    head.taps = (name, "model.norm")
    with pytest.raises(UnsupportedModel, match="asks for"):
        Engine(model("llama"), heads={"head": head}, compiled=False).generate(PROMPT)


# --- installed --------------------------------------------------------------------------

MODULE = """
import mlx.core as mx
from mlxspec.drafters.proposals import Proposal

{shown}

def refuse(target, tokenizer):
    raise ValueError("not this target")
"""
ENTRIES = """
[mlxspec.drafters]
again = outside:make
echo = outside:Echo
refuses = outside:refuse
missing = outside:nothing
"""


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with an installed distribution that has drafters."""
    folder = tmp_path / "site"
    info = folder / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "outside.py").write_text(MODULE.format(shown="\n".join(blocks)))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("outside", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "letters"))


def test_what_is_installed_is_found(outside: Path, folder: str) -> None:
    assert {"again", "echo"} <= plugins.installed().keys()
    expected = load(Pair("x", folder), speculation=False).generate("abcabcabc", max_tokens=40)
    for name in ("again", "echo"):
        engine = load(Pair("x", folder, (name, "history")), compiled=False)
        result = engine.generate("abcabcabc", max_tokens=40, draft_tokens=3)
        assert result.tokens == expected.tokens
        assert set(result.speculation.by_source) == {name}


@pytest.mark.parametrize(("name", "why"), [("refuses", "not this target"), ("missing", "nothing")])
def test_what_cannot_be_used_is_one_error(outside: Path, folder: str, name: str, why: str) -> None:
    with pytest.raises(LoadError, match=f"The drafter {name} .* cannot be used: .*{why}"):
        load(Pair("x", folder, name), compiled=False)
    said: list[str] = []
    load(Pair("x", folder, name), compiled=False, tell=said.append)
    assert why in said[0]


def test_the_command_knows_them(outside: Path, folder: str) -> None:
    env = environment(PYTHONPATH=str(outside))
    options = ("--target", folder, "--no-compile", "--max-tokens", "30")
    run = mlxspec("generate", *options, "--draft", "again", "--json", "abcabc", env=env)
    assert run.returncode == 0, run.stderr
    run = mlxspec("generate", *options, "--draft", "refuses", "abcabc", env=env)
    assert is_one_error(run.stderr)
    assert b"not this target" in run.stderr
