"""The audit: what it calls identical, a rounding tie and a defect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import build, draft_for, foreign, model, prompt_of
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.measure.audit import Audit, audit
from mlxspec.params import Penalties, SamplingParams, Verify

WARM = SamplingParams(temperature=0.8, top_p=0.9, seed=4, verify="coupled")


def audited(
    engine: Engine, sampling: SamplingParams, *, prompt: int = 9, tokens: int = 50, count: int = 3
) -> Audit:
    run = engine.run(prompt_of(prompt), max_tokens=tokens, draft_tokens=count, sampling=sampling)
    for _ in run:
        pass
    return audit(engine, run)


SAMPLINGS = {
    "greedy": SamplingParams(),
    "penalised": SamplingParams(penalties=Penalties(repetition=1.3, presence=0.5)),
    "whole text": SamplingParams(penalties=Penalties(frequency=0.3, frequency_context=0)),
    "sampled": WARM,
    "everything": replace(
        WARM, min_p=0.01, xtc_probability=0.4, penalties=Penalties(repetition=1.2), top_k=30
    ),
}


@pytest.mark.parametrize("prompt", [1, 2, 9, 600])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_exact_text_is_identical(sampling: SamplingParams, prompt: int) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    report = audited(engine, sampling, prompt=prompt)
    assert (report.outcome, report.tokens, report.rows) == ("identical", 50, 4)
    assert report.decisive is None
    assert report.noise < 1e-4


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_draft_of_another_tokenizer(sampling: SamplingParams) -> None:
    target = model("llama")
    draft, shared = foreign(target, missing=range(5))
    report = audited(Engine(target, draft, shared=shared, compiled=False), sampling)
    assert (report.outcome, report.tokens) == ("identical", 50)


def test_without_a_draft() -> None:
    report = audited(Engine(model("qwen3"), compiled=False), SamplingParams())
    assert (report.outcome, report.rows, report.noise) == ("identical", 1, 0.0)


@pytest.mark.parametrize("sampling", [SamplingParams(), WARM], ids=["greedy", "sampled"])
def test_a_token_that_plain_decoding_would_not_write_is_a_defect(sampling: SamplingParams) -> None:
    engine = Engine(model("llama"), compiled=False)
    run = engine.run(prompt_of(9), max_tokens=30, sampling=sampling)
    for _ in run:
        pass
    assert run.session is not None
    text = run.session.text
    text[9 + 17] = (text[9 + 17] + 1) % 64
    report = audit(engine, run)
    first = report.decisive
    assert report.outcome == "defect"
    assert first is not None
    assert (first.index, first.written) == (17, text[9 + 17])
    assert first.gap > 100 * first.noise
    described = report.described(lambda token: f"<{token}>")
    assert described.startswith("audit: defect at token 17 of 30: plain decoding chooses '<")
    assert report.as_dict()["first"]["index"] == 17


def test_text_of_another_seed_is_a_defect() -> None:
    engine = Engine(model("llama"), compiled=False)
    run = engine.run(prompt_of(9), max_tokens=30, sampling=WARM)
    for _ in run:
        pass
    run.request = replace(run.request, sampling=replace(WARM, seed=run.generation.seed + 1))
    assert audit(engine, run).outcome == "defect"


class Wide(nn.Module):
    """A model that rounds otherwise when it is fed several rows, as other kernels do."""

    def __init__(self, inner: Any, error: float) -> None:
        super().__init__()
        self.inner = inner
        self.error = error

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        off = mx.where(mx.arange(logits.shape[-1]) % 2 == 0, self.error, -self.error)
        return logits + off * (tokens.shape[1] > 1)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


def test_a_difference_within_the_noise_of_the_machine_is_a_tie() -> None:
    # Nearly flat logits, so that an error of this size swaps the best two somewhere.
    target = build("llama")
    target.model.norm.weight = target.model.norm.weight * 0.05
    engine = Engine(Wide(target, 0.002), draft_for(target, "half"), compiled=False)
    report = audited(engine, SamplingParams(), tokens=400)
    first = report.decisive
    assert report.outcome == "rounding tie"
    assert first is not None
    assert 0 < first.gap <= 0.004
    assert report.noise == pytest.approx(0.002, abs=1e-4)
    assert "audit: rounding tie at token" in report.described(str)


@pytest.mark.parametrize("rule", ["token", "block", "relaxed"])
def test_rules_whose_text_depends_on_the_draft_are_refused(rule: Verify) -> None:
    with pytest.raises(UsageError, match=rule):
        SamplingParams(temperature=1.0, verify=rule).auditable()


def test_sampling_is_audited_with_the_coupled_rule() -> None:
    assert SamplingParams(temperature=1.0).auditable().rule == "coupled"
    assert SamplingParams().auditable().rule == "greedy"
