"""How long is a round with a trained head, beside its bare forwards and beside a draft model's?

    python -m mlxspec.bench heads                        # targets of 1B to 2B in bfloat16
    python -m mlxspec.bench heads --size 8b --packing 4bit --json FILE

Heads and models have random weights of real shapes, so nothing is downloaded and nothing is
accepted: a round commits one token, and its time is what it costs whatever its proposals are worth.
The bare forwards are three passes, each waited for: the head's block, the target's K + 1 rows on
mlx-lm's own caches, and the rows of context that the head keeps of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlxspec.bench.questions.common import JsonFile, write
from mlxspec.decode.engine import Engine
from mlxspec.device import machine
from mlxspec.drafters.heads.block import BlockHead
from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.drafters.heads.block_layers import Backbone
from mlxspec.drafters.heads.trunk import Trunk
from mlxspec.drafters.picks import Picks
from mlxspec.errors import UsageError
from mlxspec.measure.timing import in_turns
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.shapes import PACKINGS, UNPACKED, Shape, built_in
from mlxspec.models.taps import Taps
from mlxspec.params import Method, SamplingParams
from mlxspec.sampling.sampler import Sampler, knobs_of

COUNTS = (1, 3, 7)
CONTEXT = 256  # tokens before a round
ROUNDS = 40  # of a text, each of which commits one token
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
)


class Pair(NamedTuple):
    """The configurations of a target and of a draft model, and the layers of a head."""

    target: Mapping[str, Any]
    draft: Mapping[str, Any]
    layers: int


KINDS = ("dflash", "dspark")


def pairs_of(size: str) -> dict[str, Pair]:
    """The pairs of a size by the family of their targets.

    Raises:
        UsageError: there is no such size.
    """
    table = built_in()
    tiny, one = table["small-8"], table["llama-1b"]
    sizes = {
        "tiny": {
            "llama": Pair(tiny, table["small-1"], 1),
            "qwen3": Pair({**tiny, "model_type": "qwen3", "rope_theta": 1e6}, table["small-1"], 1),
        },
        "1b": {
            "llama": Pair(one, {**one, "num_hidden_layers": 4}, 5),
            "qwen3": Pair(table["qwen3-1.7b"], table["qwen3-0.6b"], 5),
        },
        "8b": {
            "llama": Pair(table["llama-8b"], one, 5),
            "qwen3": Pair(table["qwen3-8b"], table["qwen3-0.6b"], 5),
        },
    }
    if size not in sizes:
        raise UsageError(f"There is no size {size!r}.", hint=f"Choose one of {', '.join(sizes)}.")
    return sizes[size]


def head_of(kind: str, target: Model, pair: Pair, packing: str) -> BlockHead:
    """A head of that kind with random weights: DSpark's has an output layer and a Markov head."""
    mx.random.seed(2)
    layers = pair.target["num_hidden_layers"]
    own = {"markov_rank": 256, "architectures": ["DSpark"]} if kind == "dspark" else {}
    sizes = {key: value for key, value in pair.target.items() if key in _SIZES}
    config = BlockConfig.read(
        {
            **sizes,
            "num_hidden_layers": pair.layers,
            "block_size": 16,
            "mask_token_id": 0,
            "target_layer_ids": sorted({layers * (2 * i + 1) // 10 for i in range(5)}),
            **own,
        },
        kind,
    )
    names = ("embed_tokens", "lm_head") if kind == "dspark" else ()
    backbone = Backbone(config, frozenset(names))
    backbone.set_dtype(UNPACKED.get(packing, mx.bfloat16))
    if told := PACKINGS.get(packing):
        nn.quantize(backbone, told["group_size"], told["bits"], mode=told.get("mode", "affine"))
    backbone.eval()
    mx.eval(backbone.parameters())  # type: ignore[no-untyped-call]
    return BlockHead(config, backbone, Trunk(target))


def fused(engine: Engine, count: int) -> float:
    """Seconds of a fused round, after the first three."""
    prompt = [(37 * i + 11) % 1000 for i in range(CONTEXT)]
    session = engine.session(prompt, max_tokens=ROUNDS, draft_tokens=count)
    for _ in range(3):
        session.step()
    started, rounds = time.perf_counter(), 0
    while session.step().tokens:
        rounds += 1
    return (time.perf_counter() - started) / rounds


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
    kind: str, target: Model, pair: Pair, packing: str, repeats: int, compiled: bool | None
) -> list[dict[str, Any]]:
    """Rounds of a head and its bare forwards for every K, in turns."""
    head = head_of(kind, target, pair, packing)
    engine = Engine(target, heads={kind: head}, compiled=compiled)
    bare, rows = Bare(target, head), []

    def both(count: int) -> tuple[float, tuple[float, ...]]:
        times = [bare.seconds(count) for _ in range(12)]
        return fused(engine, count), tuple(median(one) for one in zip(*times[2:], strict=True))

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
    timed = in_turns({k: partial(fused, engine, k) for k in (0, *COUNTS)}, repeats)
    return [
        {"draft_tokens": count, "round_ms": 1e3 * median(times)} for count, times in timed.items()
    ]


def measure(
    size: str,
    packing: str,
    repeats: int,
    families: Sequence[str] = (),
    compiled: bool | None = None,
) -> dict[str, Any]:
    """All figures as one object, as `--json` writes it.

    Args:
        families: of the targets; none is all.

    Raises:
        UsageError: there is no such size, family or packing.
    """
    pairs = pairs_of(size)
    for what, name, known in (
        *(("family", one, tuple(pairs)) for one in families),
        ("packing", packing, (*PACKINGS, *UNPACKED)),
    ):
        if name not in known:
            raise UsageError(f"There is no {what} {name!r}.", hint=f"Choose of {', '.join(known)}.")
    targets = []
    for family in families or pairs:
        pair = pairs[family]
        target = Shape(family, pair.target, packing).made(1)
        draft = Shape("draft", pair.draft, packing).made(3)
        heads = {kind: of_head(kind, target, pair, packing, repeats, compiled) for kind in KINDS}
        with_model = of_model(Engine(target, draft, compiled=compiled), repeats)
        targets.append({"family": family, "heads": heads, "model": with_model})
        del target, draft
        mx.clear_cache()
    return {"machine": machine.about(), "size": size, "packing": packing, "targets": targets}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the object that `--json` writes."""
    console.print(machine.described(result["machine"]))
    for target in result["targets"]:
        plain = target["model"][0]["round_ms"]
        title = f"{target['family']}, {result['size']} in {result['packing']}; ms"
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
    packing: Annotated[str, typer.Option(help="Of weights: bf16, 8bit, 4bit, …")] = "bf16",
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns.")] = 3,
    family: Annotated[list[str] | None, typer.Option(help="llama or qwen3; both.")] = None,
    output: JsonFile = None,
) -> None:
    """Measure rounds of random heads on Llama- and Qwen-shaped targets."""
    result = measure(size, packing, repeats, family or ())
    show(result, Console())
    write(result, output)
