"""How long is a round with a trained head, beside its bare forwards and beside a draft model's?

    python -m mlxspec.bench.heads                        # a target of about 1B in bfloat16
    python -m mlxspec.bench.heads --size 8b --bits 4 --json FILE

Heads and models have random weights of real shapes, so nothing is downloaded and nothing is
accepted: a round commits one token, and its time is what it costs whatever its proposals are worth.
The bare forwards are three passes, each waited for: the head's block, the target's K + 1 rows on
mlx-lm's own caches, and the rows of context that the head keeps of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlxspec.decode.engine import Engine
from mlxspec.device import machine
from mlxspec.drafters.heads.block import BlockHead
from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.drafters.heads.block_layers import Backbone
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.picks import Picks
from mlxspec.errors import UsageError
from mlxspec.measure.timing import in_turns, round_seconds
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.shapes import Shape, named
from mlxspec.models.taps import Taps
from mlxspec.params import Method, SamplingParams
from mlxspec.sampling.sampler import Sampler, knobs_of

COUNTS = (1, 3, 5, 7)
CONTEXT = 256  # tokens before a round


class Size(NamedTuple):
    """The shapes of a target and of a draft model, and the layers of a head."""

    target: Shape
    draft: Shape
    layers: int


PROMPT = [(37 * i + 11) % 2000 for i in range(CONTEXT)]
SMALL = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048}
SMALL |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
LLAMA_1B = named("llama-1b", "")
SIZES: Mapping[str, Size] = {
    "tiny": Size(named("small-8", ""), named("small-1", ""), 1),
    "1b": Size(LLAMA_1B, replace(LLAMA_1B, config={**LLAMA_1B.config, **SMALL}), 5),
    "8b": Size(named("llama-8b", ""), LLAMA_1B, 5),
}
FAMILIES = ("llama", "qwen3")
KINDS = ("dflash", "dspark")
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def target_of(family: str, shape: Shape, bits: int) -> Model:
    """A target with random weights in bfloat16, quantised to `bits` unless that is 16."""
    own = {"model_type": family, "rope_theta": 1e6, "tie_word_embeddings": True}
    return _packed(replace(shape, config={**shape.config, **own}), bits).made(1)


def _packed(shape: Shape, bits: int) -> Shape:
    return replace(shape, packing="bf16" if bits == 16 else f"{bits}bit")


def head_of(kind: str, target: Model, shape: Shape, layers: int, bits: int) -> BlockHead:
    """A head of that kind with random weights: DSpark's has an output layer and a Markov head."""
    mx.random.seed(2)
    taps = [shape.layers * (2 * i + 1) // 10 for i in range(5)]
    own = {"markov_rank": 256, "architectures": ["DSpark"]} if kind == "dspark" else {}
    config = BlockConfig.read(
        {
            **{name: shape.config[name] for name in WIDTHS},
            "num_hidden_layers": layers,
            "block_size": 16,
            "mask_token_id": 0,
            "target_layer_ids": sorted(set(taps)),
            **own,
        },
        kind,
    )
    names = ("embed_tokens", "lm_head") if kind == "dspark" else ()
    return BlockHead(config, _ready(Backbone(config, frozenset(names)), bits), Trunk(target))


def _ready(module: Any, bits: int) -> Any:
    module.set_dtype(mx.bfloat16)
    if bits != 16:
        nn.quantize(module, group_size=64, bits=bits)
    module.eval()
    mx.eval(module.parameters())
    return module


class Bare:
    """A head's and a target's forwards, each waited for, after CONTEXT tokens."""

    def __init__(self, target: Model, head: BlockHead) -> None:
        self._target, self._head = target, head
        self._taps = Taps(target, head.taps)
        self._caches = fresh_cache(target, None)
        self._place = mx.array([CONTEXT], mx.int32)
        self._vocabulary = Trunk(target).vocabulary
        tokens = mx.array([[(7 * i + 3) % 1000 for i in range(CONTEXT)]], mx.int32)
        with self._taps.watching() as features:
            self._target(tokens, cache=self._caches)
        start = mx.array([0], mx.int32)
        self._past = head.commit(head.begin(2 * CONTEXT), tokens, features, start, None)
        mx.eval([cache.state for cache in self._caches], self._past)

    def seconds(self, count: int) -> tuple[float, float, float]:
        """Of the head's block, the target's rows and the head's rows of context."""
        started = time.perf_counter()
        knobs = knobs_of(SamplingParams(), 1, self._vocabulary)
        sampler = Sampler(Method(), self._vocabulary)
        picks = Picks(sampler, mx.zeros((1, 0), mx.int32), knobs, None)
        last_two = mx.array([[1, 2]], mx.int32)
        self._past = self._head.propose(
            self._past, last_two, self._place, picks, count, 2 * CONTEXT
        )
        rows = mx.concatenate([last_two[:, 1:], picks.draft_within(None).tokens], axis=1)
        mx.eval(rows, self._past)
        proposed = time.perf_counter()
        with self._taps.watching() as features:
            logits = self._target(rows, cache=self._caches)
        mx.eval(mx.argmax(logits, axis=-1), features, [one.state for one in self._caches])
        verified = time.perf_counter()
        self._past = self._head.commit(
            self._past, rows, features, self._place, mx.array([1], mx.int32)
        )
        mx.eval(self._past)
        ended = time.perf_counter()
        for cache in self._caches:
            cache.trim(count + 1)
        return proposed - started, verified - proposed, ended - verified


def of_head(
    kind: str, target: Model, size: Size, bits: int, repeats: int, compiled: bool | None
) -> list[dict[str, Any]]:
    """Rounds of a head and its bare forwards for every K, in turns."""
    head = head_of(kind, target, size.target, size.layers, bits)
    engine = Engine(target, heads={kind: head}, compiled=compiled)
    bare, rows = Bare(target, head), []

    def both(count: int) -> tuple[float, tuple[float, ...]]:
        times = [bare.seconds(count) for _ in range(12)]
        return round_seconds(engine, PROMPT, count), tuple(
            median(one) for one in zip(*times[2:], strict=True)
        )

    for count, turns in in_turns({k: partial(both, k) for k in COUNTS}, repeats).items():
        parts = zip(*(parts for _, parts in turns), strict=True)
        block, verified, context = (1e3 * median(one) for one in parts)
        rows.append(
            {
                "draft_tokens": count,
                "round_ms": 1e3 * median(one for one, _ in turns),
                "block_ms": block,
                "target_ms": verified,
                "context_ms": context,
                "round_over_bare": median(one / sum(parts) for one, parts in turns),
            }
        )
    return rows


def of_model(engine: Engine, repeats: int) -> list[dict[str, Any]]:
    """Rounds of a draft model for every K, and a plain round as K = 0."""
    timed = in_turns({k: partial(round_seconds, engine, PROMPT, k) for k in (0, *COUNTS)}, repeats)
    return [
        {"draft_tokens": count, "round_ms": 1e3 * median(times)} for count, times in timed.items()
    ]


def measure(name: str, bits: int, repeats: int, compiled: bool | None = None) -> dict[str, Any]:
    """All figures as one object, as `--json` writes it."""
    if name not in SIZES:
        raise UsageError(f"There is no size {name!r}.", hint=f"Choose one of {', '.join(SIZES)}.")
    size, targets = SIZES[name], []
    for family in FAMILIES:
        target = target_of(family, size.target, bits)
        draft = _packed(size.draft, bits).made(3)
        heads = {kind: of_head(kind, target, size, bits, repeats, compiled) for kind in KINDS}
        with_model = of_model(Engine(target, draft, compiled=compiled), repeats)
        targets.append({"family": family, "heads": heads, "model": with_model})
        del target, draft
        mx.clear_cache()
    return {"machine": machine.about(), "size": name, "bits": bits, "targets": targets}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the object that `--json` writes."""
    console.print(machine.described(result["machine"]))
    for target in result["targets"]:
        plain = target["model"][0]["round_ms"]
        title = f"{target['family']}, {result['size']} in {result['bits']} bits; ms"
        table = Table(
            *("drafter", "K", "round", "/ plain", "block", "target", "context", "/ bare"),
            box=SIMPLE_HEAD,
            title=title,
        )
        drafters = {**target["heads"], "model": target["model"]}
        for drafter, rows in drafters.items():
            for row in rows:
                parts = (row.get(key) for key in ("block_ms", "target_ms", "context_ms"))
                shown = [row["round_ms"], row["round_ms"] / plain, *parts]
                shown.append(row.get("round_over_bare"))
                cells = ("" if one is None else f"{one:.2f}" for one in shown)
                table.add_row(drafter, str(row["draft_tokens"]), *cells)
        console.print(table)


def main(
    size: Annotated[str, typer.Option(help="tiny, 1b or 8b: of the targets.")] = "1b",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4, 8 or 16.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns.")] = 3,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure rounds of random heads on Llama- and Qwen-shaped targets."""
    result = measure(size, bits, repeats)
    show(result, Console())
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
