"""Models of a shape with random weights, what rounds of them cost, and when a K begins to pay."""

from __future__ import annotations

import gc
import json
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from clocks import Clock
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import mlxspec
from mlxspec.bench.results import read
from mlxspec.cli.app import main
from mlxspec.cli.costs import verdict
from mlxspec.decode.engine import Engine
from mlxspec.decode.session import Session
from mlxspec.errors import LoadError, MlxspecError, UsageError
from mlxspec.measure import break_even, costing
from mlxspec.measure.costing import SIZES, Costing, Depths
from mlxspec.measure.costs import Costs
from mlxspec.measure.passes import Passes
from mlxspec.measure.schedule import Schedule
from mlxspec.measure.timing import begun, in_turns
from mlxspec.models.footprint import footprint, outlined
from mlxspec.models.shapes import Shape, built_in, named
from mlxspec.pairs.loading import load
from mlxspec.pairs.shapes import pair_of, shape_of

DEMO = Path(mlxspec.__file__).parent / "demo"
# As their authors' safetensors count them; Gemma's larger ones have 64 rows of padding besides.
PARAMETERS = {
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_099_328 + 64 * 2560,
    "gemma-3-12b": 11_765_788_416 + 64 * 3840,
    "gemma-3-27b": 27_009_002_240 + 64 * 5376,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "phi-4": 14_659_507_200,
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
GEMMA = SMALL | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 44,
    "head_dim": 32,
    "sliding_window": 64,
    "sliding_window_pattern": 6,
}
MIXTURE = SMALL | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rope_theta": 1e4,
    "max_position_embeddings": 1024,
}


def bytes_of(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


# --- shapes -----------------------------------------------------------------------------


def test_built_in_shapes_are_those_of_their_names() -> None:
    assert set(PARAMETERS) == {name for name in built_in() if not name.startswith("small-")}
    for name, expected in PARAMETERS.items():
        shape = named(name, "")
        two, four = (shape.with_layers(count).parameters for count in (2, 4))
        assert two + (shape.layers - 2) * (four - two) // 2 == expected, name


@pytest.mark.parametrize("packing", ["4bit", "8bit", "mxfp4", "fp32", ""])
def test_a_size_is_known_before_a_model_is_made(packing: str) -> None:
    shape = Shape("small", MIXTURE, packing)
    held = mx.get_active_memory()
    size = shape.size
    assert mx.get_active_memory() - held < 4096  # a random key
    model = shape.made(1)
    assert bytes_of(model) == size
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.all(mx.isfinite(logits))
    assert mx.std(logits) > 0.01


def test_a_shape_that_cannot_run_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("[GatherMM::eval] Currently only supports float32.\nmore")

    monkeypatch.setattr("mlx_lm.models.llama.Model.__call__", broken)
    with pytest.raises(LoadError, match=r"cannot run here: \[GatherMM::eval\] .*float32\.$"):
        Shape("small", SMALL).made(1)


def test_weights_are_packed_as_mlx_lm_packs_them() -> None:
    ours = Shape("small", MIXTURE, "4bit").outline()
    theirs, _ = quantize_model(outlined(MIXTURE), {}, 64, 4)
    packed = {
        name: (type(one).__name__, getattr(one, "bits", 16)) for name, one in ours.named_modules()
    }
    assert packed == {
        name: (type(one).__name__, getattr(one, "bits", 16)) for name, one in theirs.named_modules()
    }
    assert {bits for _, bits in packed.values()} == {4, 8, 16}  # routers have 8


def test_a_configuration_says_how_its_weights_are_packed() -> None:
    own = {"bits": 8, "group_size": 32, "model.layers.0.mlp.down_proj": False}
    own["model.layers.1.mlp.down_proj"] = {"bits": 4, "group_size": 64}
    model = Shape("small", SMALL | {"quantization": own}).outline()
    first, second, third = (layer.mlp.down_proj for layer in model.layers[:3])
    assert isinstance(first, nn.Linear)
    assert (second.bits, third.bits, third.group_size) == (4, 8, 32)
    assert isinstance(
        Shape("small", SMALL | {"quantization": own}, "fp32").outline().layers[2].mlp.down_proj,
        nn.Linear,
    )


def test_arrays_of_one_shape_differ_and_share_no_memory() -> None:
    wide = SMALL | {"hidden_size": 256, "intermediate_size": 512}
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    model = Shape("small", wide).made(1)
    assert mx.get_active_memory() - held == pytest.approx(bytes_of(model), rel=0.02)
    ups = [layer.mlp.up_proj.weight for layer in model.layers]
    assert all(mx.any(one != other) for one, other in pairwise(ups))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL, (0, 1)),
        (GEMMA, (0, 6)),
        (MIXTURE, (0, 1)),
        (MIXTURE | {"mlp_only_layers": [0]}, (1, 1)),
    ],
)
def test_a_period_of_layers_is_found(config: dict[str, Any], expected: tuple[int, int]) -> None:
    assert Shape("small", config).period() == expected


def test_many_models_that_are_never_computed_leave_no_long_chain() -> None:
    """Their weights would hang on one another by the random state, until the stack runs out."""
    deep = SMALL | {"num_hidden_layers": 150, "hidden_size": 32, "intermediate_size": 32}
    for _ in range(16):
        outlined(deep)
    assert footprint(SMALL, 0).vocabulary == 128


# --- what people write ------------------------------------------------------------------


def test_a_pair_of_shapes_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    pair = pair_of(f"small-8+{tmp_path}:8bit")
    assert pair.name == f"small-8:4bit+{tmp_path}:8bit"
    assert pair.draft is not None
    assert (pair.target.layers, pair.draft.layers, pair.depths) == (4, 8, (4,))
    assert pair_of(str(tmp_path / "config.json")).target.packing == ""
    assert pair_of("small-8:bf16").target.size > 3 * pair.target.size
    told = pair.as_dict()
    assert told["target"]["bytes"] == pair.target.size
    assert told["measured_layers"] == [4]


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("llama-9b", "no shape named 'llama-9b'", "`llama-8b`"),
        ("llama-8b:5bits", "packed as '5bits'", "4bit"),
        ("small-8+small-1+small-1", "names 3 shapes", r"TARGET\+DRAFT"),
        ("small-8+", "name is empty", "folder"),
    ],
)
def test_what_is_no_shape(text: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        pair_of(text)
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "nobody"}, {"model_type": "llama"}, SMALL | {"head_dim": "wide"}]
)
def test_a_configuration_that_mlx_lm_cannot_build(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError) as caught:
        pair_of(str(tmp_path))
    assert "\n" not in caught.value.message


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no config\.json"):
        shape_of(str(tmp_path))


# --- memory -----------------------------------------------------------------------------


def test_a_shape_that_does_not_fit_is_refused_with_both_numbers() -> None:
    held = mx.get_active_memory()
    with pytest.raises(MlxspecError, match=r"needs 5\.\d GB .* this machine has 1\.0 GB") as caught:
        pair_of("llama-8b+llama-1b", within=10**9)
    assert "with a few of its layers" in caught.value.message
    assert mx.get_active_memory() - held < 4096


def test_a_few_layers_stand_for_the_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    shape = str(tmp_path)
    whole = pair_of(shape)
    assert whole.is_whole
    assert not whole.words
    few = pair_of(shape, within=whole.needed * 3 // 5)
    assert few.depths == (8, 14)  # whole periods lie between them, and behind them
    assert "8 and with 14 of its 44 layers" in few.words
    kinds = [type(cache).__name__ for cache in few.engines(compiled=False)[14].target.make_cache()]
    assert kinds == (["RotatingKVCache"] * 5 + ["KVCache"]) * 2 + ["RotatingKVCache"] * 2


def test_times_are_extended_along_a_line() -> None:
    depths = Depths((2, 8), 14)
    assert depths.extended({2: 3 + 2 * 0.5, 8: 3 + 8 * 0.5}) == pytest.approx(3 + 14 * 0.5)
    assert Depths((14,), 14).extended({14: 7.0}) == 7.0


# --- when it pays -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.77, 0.99])
def test_a_break_even_rate_is_the_one_that_earns_the_cost(count: int, rate: float) -> None:
    cost = break_even.tokens_per_round(rate, count)
    assert cost == pytest.approx((1 - rate ** (count + 1)) / (1 - rate))
    assert break_even.pays_above(cost, count) == pytest.approx(rate)


def test_the_ends_of_break_even_rates() -> None:
    assert break_even.pays_above(0.9, 3) == 0
    assert break_even.pays_above(4.0, 3) is None
    assert break_even.pays_above(1.25, 1) == pytest.approx(0.25)
    assert break_even.best({1: 1.2, 4: 1.6}, 0.1) == (0, 1.0)
    count, speed_up = break_even.best({1: 1.2, 4: 1.6}, 0.8)
    assert (count, speed_up) == (4, pytest.approx(3.3616 / 1.6))


def test_without_a_dearer_pass_some_draft_pays_where_its_rate_exceeds_its_cost() -> None:
    """Corollary 3.9 of the paper: with C(K)/C(0) = 1 + Kc some K pays just where α > c."""
    step = 0.2
    costs = {count: 1 + count * step for count in range(1, 9)}
    assert break_even.best(costs, step - 0.01) == (0, 1.0)
    count, speed_up = break_even.best(costs, step + 0.01)
    assert count == 1
    assert speed_up > 1
    assert break_even.best(costs, 0.5)[1] >= (1 + 0.5) / (1 + step)


# --- measuring --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    """The embedded pair, and one of its shape with random weights."""
    (shaped,) = pair_of(f"{DEMO / 'target'}+{DEMO / 'draft'}").engines(compiled=False).values()
    return load("demo", compiled=False), shaped


def test_a_shape_lies_in_memory_as_the_embedded_pair_does(engines: tuple[Engine, Engine]) -> None:
    for real, shaped in zip(*(engine.models for engine in engines), strict=True):
        both = [dict(tree_flatten(one.model.parameters())) for one in (real, shaped)]
        strides = [{name: memoryview(one).strides for name, one in each.items()} for each in both]
        assert strides[0] == strides[1]


def test_a_shape_costs_what_the_embedded_pair_costs(engines: tuple[Engine, Engine]) -> None:
    """T(1), T(9) and rounds, each beside the other's: the machine is not ours alone."""
    steps: dict[tuple[str, int, int], Any] = {}
    for at, engine in enumerate(engines):
        passes = Passes(engine, Schedule(1))
        for _ in passes.look():
            pass
        for rows, step in passes.steps((1, 9)).items():
            steps["pass", rows, at] = step
        for count in (0, 4):
            session = begun(engine, [1, 2, 3], draft_tokens=count)
            steps["round", count, at] = partial(timed, session)
    found = in_turns(dict(sorted(steps.items())), 9)

    def over(one: tuple[str, int, int], other: tuple[str, int, int]) -> float:
        return median(x / y for x, y in zip(found[one], found[other], strict=True))

    for part, number in (("pass", 1), ("pass", 9), ("round", 0), ("round", 4)):
        assert 0.6 < over((part, number, 1), (part, number, 0)) < 1.6, (part, number)
    real, shaped = (over(("pass", 9, at), ("pass", 1, at)) for at in (0, 1))
    assert 0.6 < shaped / real < 1.6


def timed(session: Session) -> float:
    started = time.perf_counter()
    session.step()
    return time.perf_counter() - started


def test_costs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", Clock())
    monkeypatch.setattr(costing, "SIZES", SIZES[-1:])
    monkeypatch.setattr(costing, "MOST_TURNS", 1)
    target, draft = Shape("large", SMALL), Shape("small", SMALL).with_layers(1)
    engine = Engine(target.made(1), draft.made(2), compiled=False)
    measuring = Costing({8: engine}, 8, budget_s=1)
    progress = list(measuring)
    assert progress[-1].done <= progress[-1].total
    found = measuring.costs
    assert found is not None
    assert found.peak_bytes > target.size + draft.size
    told = found.as_dict()
    assert told["pass_over_first"]["1"] == 1
    for one in told["rounds"]:
        assert one["round_s"] == pytest.approx(one["draft_s"] + one["verify_s"] + one["host_s"])
    assert [one["draft_tokens"] for one in told["rounds"]] == [1, 2, 4]
    assert [one["acceptance_rate"] for one in told["best"]] == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_a_benchmark_of_shapes_leaves_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costing, "SIZES", SIZES[-1:])
    monkeypatch.setattr(costing, "MOST_TURNS", 1)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 2}))
    file = tmp_path / "results.json"
    words = ["bench", "--shape", f"{tmp_path}+{tmp_path}:8bit", "--against", "mlx-lm"]
    words += ["--minutes", "0.05", "--no-compile", "--json", str(file), "--report", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["mlxspec", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert not ended.value.code, said.err
    results = read(file)
    assert results.finished
    (shape,) = results.shape
    assert (shape.target, shape.draft) == (str(tmp_path), f"{tmp_path}:8bit")
    assert (shape.layers, shape.measured_layers, shape.words) == (2, (2,), "")
    assert shape.target_bytes > shape.draft_bytes > 0
    assert [one.draft_tokens for one in shape.costs] == [0, 1, 2, 4]
    plain, *others = shape.costs
    assert (plain.round_over_plain, plain.over_plain, plain.pays_above) == (1, 1, None)
    for one in others:
        assert one.round_s is not None
        assert one.round_over_plain == pytest.approx(one.round_s / shape.plain_s)
        assert one.mlx_lm_s
    for words_of in ("what a round takes", "acceptance rate", "mlx-lm"):
        assert words_of in said.out
    assert "The shape" in (tmp_path / "report.md").read_text()
    assert "expected of a round" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--types", "code"], "--types has no place"),
        (["--full"], "--full has no place"),
        (["--targets"], "--targets has no place"),
        (["--pair", "demo"], "--pair names others"),
        (["--server", "localhost:1"], "A server cannot take part"),
    ],
)
def test_options_beside_a_shape(
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["mlxspec", "bench", "--shape", "small-8", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == UsageError.exit_code
    assert expected in capfd.readouterr().err.replace("\n", " ")


def test_verdicts() -> None:
    assert verdict(None).startswith("interrupted")
    passes = {1: 1.0, 2: 1.3, 5: 2.9}
    assert verdict(Costs(passes, 1.0, 0.5)).startswith("this machine is too busy")
    assert verdict(Costs(passes, 1.0, 0.01)) == (
        "K = 1 pays above an acceptance rate of 30%; at 70% K = 1 brings 1.31 x plain"
    )
    assert verdict(Costs({1: 1.0, 2: 2.5}, 1.0, 0.01)).startswith("no K pays here")
