"""Results of a benchmark that nobody ran: every question, with figures that are easy to check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mlxspec.bench.cells import Acceptance, Cell, Configuration, Round, Sample, Source
from mlxspec.bench.results import Cost, Drift, Peer, Recommendation, Remark, Results, Shape
from mlxspec.bench.statistics import Interval

TYPES = (
    "code",
    "technical explanation",
    "security question",
    "creative problem",
    "translation",
    "summary",
    "editing",
    "maths",
    "chat",
)
NONE = Configuration(name="none", draft_tokens=0)
ARMS = (
    NONE,
    *(Configuration(name=str(k), draft_tokens=k) for k in (3, 5, 7)),
    Configuration(name="auto", draft_tokens=16, auto=True),
)
GAINS = {"none": 1.0, "3": 1.74, "5": 1.93, "7": 1.71, "auto": 2.04}
PLAIN = 40.0  # tokens per second


def samples(gain=1.0, *, turns=9, noise=0.03, seed=0, prompts="mixed", identical=None, rows=1):
    rng = np.random.default_rng(seed)
    speeds = PLAIN * gain * np.exp(noise * rng.standard_normal(turns))
    return tuple(
        Sample(
            turn=turn,
            place=turn,
            at_s=3.0 * turn,
            prompt=f"{prompts}-{turn}",
            prompt_tokens=60,
            tokens=128 * rows,
            tokens_per_second=float(speed),
            ttft_s=0.08 + 0.004 * (gain > 1),
            total_s=128 / float(speed),
            gap_p50_s=0.02,
            gap_p95_s=0.05,
            peak_bytes=int(5e9 + 9e8 * (gain > 1)),
            identical=identical,
        )
        for turn, speed in enumerate(speeds)
    )


def acceptance(count, rate=0.82):
    drafted = tuple(400 for _ in range(count))
    accepted = tuple(round(400 * rate ** (place + 1)) for place in range(count))
    return Acceptance(
        rounds=400,
        drafted=sum(drafted),
        accepted=sum(accepted),
        rate=sum(accepted) / sum(drafted),
        tokens_per_round=1 + sum(accepted) / 400,
        drafted_by_position=drafted,
        accepted_by_position=accepted,
        by_source={"model": Source(rounds=400, drafted=sum(drafted), accepted=sum(accepted))},
    )


def cell(question, arm, gain=None, *, width=0.06, seed=0, **others):
    gain = GAINS[arm.name] if gain is None else gain
    made = Cell(
        question=question,
        configuration=arm,
        samples=samples(
            gain,
            seed=seed,
            identical=None if arm == NONE else True,
            prompts=others.get("prompt_type", "mixed"),
            rows=others.get("rows", 1),
        ),
        finished=True,
        memory_ratio=1.0,
        **others,
    )
    if arm == NONE:
        return made
    draft_s = 0.004 * min(arm.draft_tokens, 6)
    return replace(
        made,
        acceptance=acceptance(6, 0.87) if arm.auto else acceptance(arm.draft_tokens, 0.78),
        round=Round(round_s=draft_s + 0.033, draft_s=draft_s, verify_s=0.03, host_s=0.003),
        speedup=Interval(median=gain, low=gain * (1 - width), high=gain * (1 + width)),
        predicted=gain * 1.04,
        identical=1.0,
        memory_ratio=1.18,
    )


def cells():
    made = [cell("configs", arm, seed=place) for place, arm in enumerate(ARMS)]
    for place, kind in enumerate(TYPES):
        for arm in ARMS:
            gain = GAINS[arm.name] * (1.35 - 0.09 * place) if arm != NONE else 1.0
            made.append(cell("prompts", arm, gain, width=0.11, prompt_type=kind, seed=place))
    some = (ARMS[0], ARMS[-1])
    for place, system in enumerate(("none", "direct", "expert", "concise")):
        for arm in some:
            gain = 2.1 - 0.12 * place if arm != NONE else 1.0
            made.append(cell("system", arm, gain, system=system, seed=place))
    for place, temperature in enumerate((0.0, 0.7, 1.0)):
        for arm in some:
            gain = 2.1 - 0.35 * place if arm != NONE else 1.0
            made.append(cell("sampling", arm, gain, temperature=temperature, seed=place))
    for place, context in enumerate((256, 1024, 4096, 16384)):
        for arm in some:
            gain = (2.1 - 0.2 * place if arm != NONE else 1.0) * (1 - 0.12 * place)
            made.append(cell("context", arm, gain, context=context, seed=place))
    for place, rows in enumerate((1, 2, 4, 8, 16)):
        for arm in some:
            gain = (2.1 - 0.25 * place if arm != NONE else 1.0) * rows**0.7
            made.append(cell("rows", arm, gain, rows=rows, seed=place))
    return tuple(made)


def peers():
    return (
        Peer(
            name="mlx-lm",
            status="measured",
            configuration="3",
            samples=samples(1.4, seed=5),
            over=Interval(median=1.38, low=1.29, high=1.46),
            ours_over=Interval(median=1.47, low=1.4, high=1.55),
        ),
        Peer(
            name="LM Studio",
            status="failed",
            url="http://127.0.0.1:1234",
            words="The stream ended after 31 tokens of turn 2.",
        ),
        Peer(name="Ollama", status="absent", words="Nothing answers at port 11434."),
    )


def shape():
    costs = [
        Cost(
            draft_tokens=k,
            verify_s=0.02 * (1 + 0.04 * k),
            over_plain=1 + 0.04 * k,
            draft_s=0.0025 * k,
            host_s=0.0005,
            round_s=0.0205 * (1 + 0.16 * k),
            round_over_plain=1 + 0.16 * k,
            pays_above=0.16 + 0.02 * k if k else None,
        )
        for k in range(9)
    ]
    return Shape(target="llama-8b:4bit", draft="llama-1b:4bit", plain_s=0.0205, costs=tuple(costs))


def results(**others):
    """A run in which auto was twice as fast as plain decoding."""
    best = ARMS[-1]
    rng = np.random.default_rng(4)
    made = Results(
        created="2026-03-02T09:30:00+00:00",
        finished=True,
        seconds=541.0,
        machine={
            "system": "Darwin arm64",
            "processor": "Apple M3 Max",
            "device": "Device(gpu, 0)",
            "python": "3.12.4",
            "mlxspec": "0.9.0",
            "mlx": "0.32.2",
            "mlx-lm": "0.32.2",
            "power_mode": "automatic",
            "on_battery": False,
        },
        settings={"configs": ["none", "3", "5", "7", "auto"], "max_tokens": 128, "precision": 0.03},
        prompts_hash="9f" * 32,
        pair={"name": "demo", "target": "package:target", "drafts": ["package:draft"]},
        drift=Drift(
            at_s=tuple(30.0 * place for place in range(18)),
            tokens_per_second=tuple(
                float(v) for v in PLAIN * np.exp(0.02 * rng.standard_normal(18))
            ),
            spread=0.03,
            trend=1.0,
            words="The machine was steady: 2.1% noise, no trend.",
        ),
        cells=cells(),
        peers=peers(),
        shape=(shape(),),
        recommendation=Recommendation(
            configuration=best,
            speedup=Interval(median=2.04, low=1.92, high=2.16),
            words="Use auto: 2.04 x plain decoding (1.92–2.16), and no setting is better on any "
            "prompt type.",
            best="code",
            worst="chat",
        ),
        warnings=(
            Remark(
                kind="slower",
                words="chat with 7 is slower than plain decoding: 0.95 x (0.84–1.05).",
            ),
        ),
    )
    return replace(made, **others)
