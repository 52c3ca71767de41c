"""Texts written with one configuration or another, and what was measured of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlxspec.bench.cells import Configuration, Ended, Sample
from mlxspec.control.estimates import Learned
from mlxspec.decode.alone import alone, drafters_of
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import Request
from mlxspec.defaults import AUTO, DraftTokens
from mlxspec.measure.timing import measure_split
from mlxspec.metrics import FinishReason, Generation, SpeculationStats
from mlxspec.pairs.loading import bytes_of
from mlxspec.params import SamplingParams
from mlxspec.text import is_raw


class Place(NamedTuple):
    """Where a text stands in the run, as a `Sample` says it."""

    turn: int
    place: int
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every arm is asked in one turn.

    Args:
        prompt: its id. messages: of the conversation, for each of the texts side by side. The
            first may be a system message, and the last is a user's.
        max_tokens: of each text. temperature, seed: of sampling.
    """

    prompt: str
    messages: Sequence[Sequence[Mapping[str, str]]]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an arm wrote.

    Args:
        sample: its figures. texts: one for each prompt. tokens: of each text; empty where only its
            text is known.
        speculation: of each text. seconds: of decoding, for all its rounds.
        rule: that verified. exact: whether texts are distributed as the target's own under it.
    """

    sample: Sample
    texts: Sequence[str]
    tokens: Sequence[Sequence[int]] = ()
    speculation: Sequence[SpeculationStats] = ()
    seconds: float = 0.0
    rule: str = ""
    exact: bool = True


class Arm(Protocol):
    """Whatever takes a turn: a configuration of this engine, or a peer."""

    @property
    def name(self) -> str: ...

    def write(self, asked: Asked, place: Place) -> Written:
        """Write one text. An error of a peer is its own business: it may raise MlxspecError."""

    def write_beside(self, asked: Asked, place: Place) -> Written:
        """Write the texts side by side."""


@dataclass
class Clock:
    """The times at which the tokens of a text arrive."""

    started: float = field(default_factory=time.perf_counter)
    arrived: list[tuple[float, int]] = field(default_factory=list)

    def add(self, count: int) -> None:
        """So many tokens arrive now."""
        if count:
            self.arrived.append((time.perf_counter() - self.started, count))

    def speed(self) -> float | None:
        """Tokens per second from the first arrival to the last; None where there was one."""
        if len(self.arrived) < 2:
            return None
        (first_s, _), *later = self.arrived
        last_s = later[-1][0]
        return sum(count for _, count in later) / (last_s - first_s) if last_s > first_s else None

    def sample(self, place: Place, *, overall: bool = False, **others: Any) -> Sample:
        """The figures of the text that ends now.

        Args:
            overall: whether a speed is that of the whole time, from the request on.
            others: further fields of the sample.
        """
        total_s = time.perf_counter() - self.started
        tokens, gaps = sum(count for _, count in self.arrived), self._gaps()
        return Sample(
            **place._asdict(),
            tokens=tokens,
            tokens_per_second=tokens / total_s if overall else self.speed(),
            ttft_s=self.arrived[0][0] if self.arrived else None,
            total_s=total_s,
            gap_p50_s=float(np.percentile(gaps, 50)) if gaps else None,
            gap_p95_s=float(np.percentile(gaps, 95)) if gaps else None,
            **others,
        )

    def _gaps(self) -> list[float]:
        """Seconds before each token but the first: those of a round come together."""
        gaps: list[float] = []
        before = None
        for at, count in self.arrived:
            gaps += ([] if before is None else [at - before]) + [0.0] * (count - 1)
            before = at
        return gaps


class OwnArm:
    """A configuration of an engine.

    Args:
        engine: with the configuration's drafters alone.
        usual: options of `Engine.request` that hold for every text, such as `template_args`.
        spared_bytes: of drafters that are in memory for other arms.
    """

    def __init__(
        self,
        configuration: Configuration,
        engine: Engine,
        usual: Mapping[str, Any],
        spared_bytes: int,
    ) -> None:
        self.configuration = configuration
        self.engine = engine
        self._usual = dict(usual)
        self._spared = spared_bytes
        self._session: Any = None
        self._round_s = 0.0

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def draft_tokens(self) -> DraftTokens:
        return AUTO if self.configuration.auto else self.configuration.draft_tokens

    def sampling(self, asked: Asked) -> SamplingParams:
        """Plain decoding samples with the coupled rule, so that its text can be compared."""
        rule: Any = self.configuration.rule or None
        if self.configuration.is_baseline and asked.temperature > 0:
            rule = "coupled"
        if rule == "greedy" and asked.temperature > 0:
            rule = None
        return SamplingParams(temperature=asked.temperature, seed=asked.seed, verify=rule)

    def requests(self, asked: Asked) -> list[Request]:
        """A request for each text."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        options = dict(self._usual)
        options |= {
            "max_tokens": asked.max_tokens,
            "sampling": self.sampling(asked),
            "draft_tokens": self.draft_tokens,
        }
        if is_raw(tokenizer, bool(options.get("raw"))):
            options.pop("template_args", None)
            texts = ["\n\n".join(one["content"] for one in some) for some in asked.messages]
            return [self.engine.request(text, **options) for text in texts]
        return [self.engine.request(messages=list(some), **options) for some in asked.messages]

    def write(self, asked: Asked, place: Place) -> Written:
        """Write one text as a run."""
        (request, *_) = self.requests(asked)
        clock = Clock()
        with self._knowing(), closing(self.engine.run(request)) as run:
            for event in run:
                clock.add(len(event.tokens))
        written = [run.generation]
        sample = clock.sample(place, **self._about(asked, written), ended=_ended(written))
        speculation = run.generation.speculation
        self._session = run.session
        self._round_s = run.generation.timing.decode_s / max(speculation.rounds, 1)
        return _written(sample, written, run.generation.timing.decode_s, request.sampling)

    def write_beside(self, asked: Asked, place: Place) -> Written:
        """Write the texts as a batch, also where there is one."""
        requests = self.requests(asked)
        mx.reset_peak_memory()
        clock = Clock()
        batch = self.engine.batch(1 if self.configuration.serial else len(requests))
        with self._knowing(), closing(batch):
            rows = [batch.add(request) for request in requests]
            while not batch.done:
                for row, event in batch.step():
                    if row.error is not None:
                        raise row.error
                    clock.add(len(event.tokens))
        written = [row.generation for row in rows]
        sample = clock.sample(
            place, overall=True, **self._about(asked, written), ended=_ended(written)
        )
        return _written(sample, written, sample.total_s, requests[0].sampling)

    @contextmanager
    def _knowing(self) -> Iterator[None]:
        """A text begins with what earlier ones have shown, unless it is to begin cold."""
        known = self.engine.learned
        if self.configuration.cold:
            self.engine.learned = Learned()
        try:
            yield
        finally:
            if self.configuration.cold:
                self.engine.learned = known

    def split(self) -> tuple[float, float, float] | None:
        """Shares of drafting, verifying and the host in the rounds of the last text.

        None where no model drafted.
        """
        if self._session is None:
            return None
        found = measure_split(self._session, self._round_s)
        return None if found is None else (found.draft, found.verify, found.host)

    def let_go(self) -> None:
        """Let go of the last text, whose past takes memory."""
        self._session = None

    def _about(self, asked: Asked, written: Sequence[Generation]) -> dict[str, Any]:
        return {
            "prompt": asked.prompt,
            "prompt_tokens": sum(one.prompt_tokens for one in written),
            "peak_bytes": mx.get_peak_memory() - self._spared,
        }


def _written(
    sample: Sample, written: Sequence[Generation], seconds: float, sampling: SamplingParams
) -> Written:
    return Written(
        sample=sample,
        texts=[one.text for one in written],
        tokens=[one.tokens for one in written],
        speculation=[one.speculation for one in written],
        seconds=seconds,
        rule=sampling.rule,
        exact=sampling.is_exact,
    )


def _ended(written: Sequence[Generation]) -> Ended:
    reasons: set[FinishReason] = {one.finish_reason for one in written}
    return "length" if "length" in reasons else next(iter(reasons))


def own_arms(
    engine: Engine,
    configurations: Sequence[Configuration],
    usual: Mapping[str, Any],
    *,
    compiled: bool | None = None,
) -> dict[str, OwnArm]:
    """An arm for each configuration, by name; those with the same drafters share an engine.

    Args:
        compiled: see `Engine`.
    """
    drafters = drafters_of(engine)
    sizes = {name: bytes_of(model) for name, model in engine.drafts.items()}
    engines = {"": engine}
    arms = {}
    for one in configurations:
        if one.drafter not in engines:
            engines[one.drafter] = (
                engine if len(drafters) == 1 else alone(engine, one.drafter, compiled=compiled)
            )
        used = {one.drafter} if one.drafter else set(sizes)
        used = set() if one.is_baseline else used
        spared = sum(size for name, size in sizes.items() if name not in used)
        arms[one.name] = OwnArm(one, engines[one.drafter], usual, spared)
    return arms
