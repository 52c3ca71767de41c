"""The audit: what it calls identical, a rounding tie and a defect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import build, draft_for, foreign, model, prompt_of
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxspec.decode.engine import Engine
from mlxspec.errors import UsageError
from mlxspec.measure.audit import COMPARING, READING, Audit, Auditing, audit
from mlxspec.metrics import Progress
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
    assert (report.outcome, report.tokens, report.of) == ("identical", 50, 50)
    assert report.rows == (4, 16)
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
    assert (report.outcome, report.rows) == ("identical", (2, 16))
    assert report.noise < 1e-4


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


class Shaped(nn.Module):
    """A target with twins, whose scores differ by less than its rounding.

    Scores of the odd ids are a little lower than those of the even ones before them: too little to
    tell where a pass rounds otherwise, which depends on what it computes with. One row on the
    caches of a round, with room for more, has another shape than one row on mlx-lm's.

    Args:
        error: of every shape but one row on mlx-lm's caches. defect: of a round alone.
    """

    GAP = 3e-6

    def __init__(self, inner: Any, *, error: float = 0.0, defect: float = 0.0) -> None:
        super().__init__()
        self.inner = inner
        self.error = error
        self.defect = defect

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        twins = mx.repeat(logits[..., ::2], 2, axis=-1)
        odd = mx.arange(logits.shape[-1]) % 2
        in_round = not isinstance(cache[0], KVCache)
        off = self.error * (in_round or tokens.shape[1] > 1) + self.defect * in_round
        return twins + odd * (off - self.GAP)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


@pytest.mark.parametrize("count", [0, 3])
def test_twins_that_another_shape_swaps_are_a_tie_with_and_without_speculation(count: int) -> None:
    target = Shaped(build("llama"), error=4e-6)
    draft = draft_for(target.inner, "half") if count else None
    report = audited(Engine(target, draft, compiled=False), SamplingParams(), count=count)
    assert report.outcome == "rounding tie"
    assert 2e-6 < report.noise < 1e-5  # scores of about 10 are a few of these steps apart
    first = report.decisive
    assert first is not None
    assert 1e-6 < first.gap < 1e-5
    rows = "2 and 16" if count == 0 else "4 and 16"
    described = report.described(str)
    assert f"nats, and passes of 1, {rows} rows differ by up to" in described


@pytest.mark.parametrize("count", [0, 3])
def test_what_a_round_alone_gets_wrong_is_no_rounding(count: int) -> None:
    target = Shaped(build("llama"), defect=4e-5)
    draft = draft_for(target.inner, "half") if count else None
    report = audited(Engine(target, draft, compiled=False), SamplingParams(), count=count)
    assert report.outcome == "defect"
    assert report.noise < 1e-6


def test_a_model_that_is_wrong_for_several_rows_has_no_rounding_to_hide_behind() -> None:
    target = build("llama")
    engine = Engine(Wide(target, 10.0), compiled=False)
    run = engine.run(prompt_of(9), max_tokens=30)
    for _ in run:
        pass
    same = audit(engine, run)
    assert (same.outcome, same.rows, same.noise) == ("identical", (), 0.0)
    assert "(of rounding nothing is known: the model" in same.described(str)
    assert run.session is not None
    run.session.text[20] = (run.session.text[20] + 1) % 64
    assert audit(engine, run).outcome == "defect"


def test_a_model_that_is_wrong_behind_its_window_has_none_either() -> None:
    # mlx-lm's passes of several rows see too much there.
    engine = Engine(build("plamo3"), compiled=False)
    run = engine.run(prompt_of(9), max_tokens=30)
    for _ in run:
        pass
    report = audit(engine, run)
    assert (report.outcome, report.noise) == ("identical", 0.0)
    assert report.rows == ()


def test_an_audit_that_is_ended_reports_what_it_compared() -> None:
    engine = Engine(model("llama"), compiled=False)
    run = engine.run(prompt_of(9), max_tokens=50)
    for _ in run:
        pass
    auditing = Auditing(engine, run)
    told = []
    for progress in auditing:
        told.append(progress)
        if (progress.what, progress.done) == (COMPARING, 20):
            break
    report = auditing.report
    assert (report.outcome, report.tokens, report.of) == ("identical", 16, 50)
    assert report.described(str).startswith("audit: identical, ended after 16 of 50 tokens: plain")
    rest = list(auditing)
    assert auditing.report.tokens == 50
    done = [one.done for one in told + rest if one.what == COMPARING]
    assert done == sorted(done)
    assert done[-1] == 50
    assert told[0] == Progress(READING, 0, 9)


@pytest.mark.parametrize("rule", ["token", "block", "relaxed"])
def test_rules_whose_text_depends_on_the_draft_are_refused(rule: Verify) -> None:
    with pytest.raises(UsageError, match=rule):
        SamplingParams(temperature=1.0, verify=rule).auditable()


def test_sampling_is_audited_with_the_coupled_rule() -> None:
    assert SamplingParams(temperature=1.0).auditable().rule == "coupled"
    assert SamplingParams().auditable().rule == "greedy"
