"""The embedded pair's trained head: what it keeps shows that nothing in it is off by one."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import mlxspec
from mlxspec import load
from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.following import share
from mlxspec.drafters.heads import block_config
from mlxspec.drafters.heads.block_layers import Attention
from mlxspec.drafters.proposals import PLAIN, Choice
from mlxspec.models.caches.positional import Places
from mlxspec.pairs.table import Pair

DEMO = Path(mlxspec.__file__).parent / "demo"
OWN = json.loads((DEMO / "head" / "config.json").read_text())["dflash_config"]
PROMPTS = beginnings("python")[:4]


def kept(head: Path, count: int = 3) -> float:
    """The acceptance rate of greedy rounds after held-out prompts."""
    # What builds a round's kernels takes longer than so few rounds.
    engine = load(Pair("demo-head", str(DEMO / "target"), (str(head),)), compiled=False)
    runs = [
        engine.generate(one, draft_tokens=count, max_tokens=48, ignore_eos=True) for one in PROMPTS
    ]
    (name,) = engine.heads
    assert all(set(run.speculation.by_source) == {name} for run in runs)
    drafted = sum(run.speculation.drafted for run in runs)
    return sum(run.speculation.accepted for run in runs) / drafted


def changed(folder: Path, **config: object) -> Path:
    """A copy of the head with another configuration."""
    shutil.copytree(DEMO / "head", folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def right() -> float:
    return kept(DEMO / "head")


def test_three_tokens_are_kept_as_training_promised(right):
    assert right >= 0.57


def test_one_token_is_kept_most_often():
    assert kept(DEMO / "head", 1) >= 0.8


def test_the_controller_knows_that_one_pass_drafts_all():
    engine = load(Pair("demo-head", str(DEMO / "target"), (str(DEMO / "head"),)), compiled=False)
    (name,) = engine.heads
    policy = engine.session([1, 2, 3], draft_tokens="auto").policy
    for choice, seconds in ((PLAIN, 1.0), (Choice(name, 1), 1.8)):
        policy.took(choice, seconds)
    assert policy.seconds(Choice(name, 2)) < 2.4


@pytest.mark.parametrize(
    "change",
    [
        {"target_layer_ids": [one - 1 for one in OWN["target_layer_ids"]]},
        {"mask_token_id": 300},
    ],
    ids=["taps", "mask"],
)
def test_another_tap_or_mask_is_seen(right, change, tmp_path):
    assert kept(changed(tmp_path / "head", dflash_config=OWN | change)) < right - 0.05


def test_another_first_row_is_seen(right, monkeypatch):
    monkeypatch.setattr(block_config, "_first", lambda keys, block: 0)
    assert kept(DEMO / "head") < right - 0.05


def test_a_shifted_position_is_seen(right, monkeypatch):
    taught = Attention.taught
    monkeypatch.setattr(
        Attention,
        "taught",
        lambda self, layer, rows, places: taught(self, layer, rows, Places(places.offset + 1)),
    )
    assert kept(DEMO / "head") < right - 0.05


def test_norms_shifted_twice_are_seen(right, tmp_path):
    folder = changed(tmp_path / "head")
    weights = mx.load(str(folder / "model.safetensors"))
    shifted = {name: one + 1 if "norm" in name else one for name, one in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), shifted)
    assert kept(folder) < right - 0.05


def test_what_a_parked_head_costs_is_measured():
    engine = load(Pair("demo-head", str(DEMO / "target"), (str(DEMO / "head"),)), compiled=False)
    (name,) = engine.heads
    (found,) = share(engine, name, texts=1, rounds=4)
    assert -0.9 < found < 2
