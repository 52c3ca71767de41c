"""The cost of taking proposals back, for each kind of cache, on random models of mlx-lm.

    python -m mlxspec.bench caches
    python -m mlxspec.bench caches --hidden-size 1024 --json FILE

A round verifies three fixed proposals from the same place again and again, compiled, in turn with
the other measurements of its model:

- *taking back* is the share of a round that is saved when states are neither recorded nor chosen;
- *room* is a round's time with room for 16,384 positions over that with room for 256;
- *rows* is the time of a pass of several rows over that of one row. In a model of many experts,
  more rows use more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.questions.common import JsonFile, write
from mlxspec.bench.statistics import interval_of_ratio
from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.device import machine
from mlxspec.measure.timing import in_turns, stepper
from mlxspec.models.cached_model import FusedModel
from mlxspec.models.caches.layers import Layers, each
from mlxspec.models.caches.original import Model
from mlxspec.models.caches.positional import Places
from mlxspec.params import KVQuantization, SamplingParams
from mlxspec.sampling.sampler import Sampler

PROPOSED = 3
PROMPT = 200
LENGTH = 256
ROOM = 16_384
ROWS = (2, 4, 8)
VOCABULARY = 4096


def shapes(hidden: int) -> dict[str, dict[str, Any]]:
    """A configuration for every kind of cache, with layers of about the same size."""
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128}
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "head_dim": 64,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        **heads,
    }
    experts, state_space, delta, window, convolution = _layers(hidden)
    kinds: dict[str, dict[str, Any]] = {
        "full": {"model_type": "llama"},
        "full, 8 bits": {"model_type": "llama"},
        "window": {"model_type": "gemma3_text", **window},
        "convolution": {"model_type": "lfm2", **convolution},
        "state space": {"model_type": "mamba2", **state_space},
        "gated delta": {"model_type": "qwen3_next", **experts, **delta},
        "full, experts": {"model_type": "qwen3_moe", **experts},
    }
    return {kind: {**shared, **own} for kind, own in kinds.items()}


def _layers(hidden: int) -> tuple[dict[str, Any], ...]:
    """The keys of experts, state spaces, gated deltas, windows and convolutions, in that order."""
    experts: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden // 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    state_space: dict[str, Any] = {
        "num_heads": hidden // 32,
        "head_dim": 64,
        "state_size": 64,
        "conv_kernel": 4,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
    }
    delta = {
        "linear_num_value_heads": hidden // 64,
        "linear_num_key_heads": hidden // 128,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": hidden // 2,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.5,
    }
    window = {"sliding_window": 128, "sliding_window_pattern": 4, "query_pre_attn_scalar": 64}
    convolution = {
        "norm_eps": 1e-5,
        "block_dim": hidden,
        "block_ff_dim": 3 * hidden,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "conv_bias": False,
        "conv_L_cache": 3,
        "full_attn_idxs": [3],
    }
    return experts, state_space, delta, window, convolution


def model_of(config: dict[str, Any]) -> Model:
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


class Careless(FusedModel):
    """A model that records no state and takes none back, otherwise like another one."""

    def __init__(self, other: FusedModel) -> None:
        vars(self).update(vars(other))

    def forward(
        self, tokens: mx.array, layers: Layers, offset: mx.array, length: int
    ) -> tuple[mx.array, Layers]:
        places = Places(offset)
        caches = each(lambda layer: layer.opened(places, length), layers)
        logits = self.model(tokens, cache=caches)
        return logits, each(lambda cache: cache.layer, caches)

    def commit(self, layers: Layers, kept: mx.array | None) -> Layers:
        return layers


def measure(config: dict[str, Any], kv: KVQuantization | None, repeats: int) -> dict[str, float]:
    """Milliseconds of a round, and the ratios that the module's docstring names."""
    model = model_of(config)
    engine = Engine(model, kv=kv)
    cached = engine.models[0]
    assert isinstance(cached, FusedModel), cached.obstacle
    sampler = Sampler(SamplingParams().method(), cached.vocabulary)
    exact = FusedRound(cached, {}, sampler, compiled=True)
    careless = FusedRound(Careless(cached), {}, sampler, compiled=True)
    prompt = [i % VOCABULARY for i in range(PROMPT)]

    def step(
        rounds: FusedRound, draft_tokens: int = PROPOSED, capacity: int = LENGTH
    ) -> Callable[[], float]:
        return stepper(rounds, engine.prefilled(prompt, capacity=capacity), draft_tokens, LENGTH)

    steps = {"round": step(exact), "careless": step(careless), "room": step(exact, capacity=ROOM)}
    steps |= {f"rows {rows}": step(exact, rows - 1) for rows in (1, *ROWS)}
    turns = in_turns(steps, repeats + 3, warm_up=False)
    times = {name: some[3:] for name, some in turns.items()}  # behind traces, kernels, buffers

    def ratio(name: str, other: str) -> float:
        return interval_of_ratio(times[name], times[other]).median

    return {
        "round_ms": median(times["round"]) * 1e3,
        "taking_back": 1 - ratio("careless", "round"),
        "room": ratio("room", "round"),
        **{f"rows_{rows}": ratio(f"rows {rows}", "rows 1") for rows in ROWS},
    }


def main(
    hidden_size: Annotated[int, typer.Option(help="Of the models, a multiple of 128.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each measurement.")] = 30,
    output: JsonFile = None,
) -> None:
    """Measure the cost of taking proposals back, for each kind of cache."""
    console = Console()
    kinds = shapes(hidden_size)
    results = {
        kind: measure(config, KVQuantization(8) if "8 bits" in kind else None, repeats)
        for kind, config in track(kinds.items(), "measuring", transient=True, console=console)
    }
    table = Table("cache", "model", "round", "taking back", "room", box=SIMPLE_HEAD)
    for rows in ROWS:
        table.add_column(f"{rows} rows", justify="right")
    for kind, found in results.items():
        table.add_row(
            kind,
            str(kinds[kind]["model_type"]),
            f"{found['round_ms']:.1f} ms",
            f"{found['taking_back']:+.1%}",
            f"{found['room']:.2f}",
            *(f"{found[f'rows_{rows}']:.2f}" for rows in ROWS),
        )
    about = machine.about()
    console.print(machine.described(about), table, sep="\n")
    write({"machine": about, "hidden_size": hidden_size, "kinds": results}, output)
