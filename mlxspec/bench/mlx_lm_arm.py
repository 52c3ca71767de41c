"""mlx-lm in the same process and on the same weights, plain, with a draft, and side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator, GenerationResponse
from mlx_lm.sample_utils import make_sampler

from mlxspec.bench.arms import Asked, Clock, OwnArm, Place, Written
from mlxspec.bench.cells import BASELINE, Ended, Sample
from mlxspec.bench.peers import peer_of
from mlxspec.bench.results import Peer
from mlxspec.bench.summing import Series, acceptance_of
from mlxspec.defaults import MODEL
from mlxspec.metrics import RoundStats, SpeculationStats
from mlxspec.models.layout import as_stored
from mlxspec.pairs.loading import bytes_of

NAME = "mlx-lm"
USUAL = 3  # --num-draft-tokens of mlx_lm.generate
READ_BESIDE = 8  # prompts that its batch generator reads side by side, as it does by itself


class MlxLmArm:
    """mlx-lm's `stream_generate` with the weights of an engine, or its `BatchGenerator`.

    The weights lie in memory as mlx-lm loads them.

    Args:
        own: plain decoding of ours: its requests have the prompt's tokens. draft_tokens: K, 0 for
            none. spared_bytes: of drafts that are in memory for other arms.
    """

    def __init__(self, own: OwnArm, draft_tokens: int = 0, spared_bytes: int = 0) -> None:
        self.draft_tokens = draft_tokens
        self.beside = not draft_tokens  # its batch generator has no draft
        self._own = own
        self._spared = spared_bytes
        self._copied = 0  # bytes of weights that lie as they are stored, beside those laid out

    @property
    def name(self) -> str:
        return f"{NAME} {self.draft_tokens}" if self.draft_tokens else NAME

    def write(self, asked: Asked, place: Place) -> Written:
        """Write one text, with the same sampling values; its random numbers are mlx-lm's own."""
        tokens = list(self._own.requests(asked)[0].tokens)
        text, drafted, ended = "", [], ""
        with self._begun(asked) as clock:
            for one in self._stream(tokens, asked):
                if one.finish_reason != "stop":  # which comes with the token that ends the text
                    clock.add(1)
                    drafted.append(one.from_draft)
                text += one.text
                ended = one.finish_reason or ended
        sample = self._sample(clock, place, asked, len(tokens), stopped=ended == "stop")
        counts = [rounds_of(drafted, self.draft_tokens)] if self.draft_tokens else []
        return Written(sample=sample, texts=[text], speculation=counts, seconds=sample.total_s)

    def write_beside(self, asked: Asked, place: Place) -> Written:
        """Write the texts side by side, all of them at a time."""
        prompts = [list(one.tokens) for one in self._own.requests(asked)]
        tokenizer: Any = self._own.engine.tokenizer
        stopped: list[bool] = []
        generator = BatchGenerator(
            self._own.engine.target,
            stop_tokens=[[token] for token in tokenizer.eos_token_ids],
            sampler=make_sampler(temp=asked.temperature),
            completion_batch_size=len(prompts),
            prefill_batch_size=min(len(prompts), READ_BESIDE),
        )
        with self._begun(asked) as clock, closing(generator):
            rows = generator.insert(prompts, [asked.max_tokens] * len(prompts))
            texts: dict[int, list[int]] = {row: [] for row in rows}
            while len(stopped) < len(rows):
                written = generator.next_generated()
                for one in written:
                    if one.finish_reason != "stop":
                        texts[one.uid].append(int(one.token))
                    if one.finish_reason:
                        stopped.append(one.finish_reason == "stop")
                clock.add(sum(one.finish_reason != "stop" for one in written))
        sample = self._sample(
            clock, place, asked, sum(map(len, prompts)), stopped=all(stopped), overall=True
        )
        tokens = list(texts.values())
        return Written(
            sample=sample, texts=[tokenizer.decode(one) for one in tokens], tokens=tokens
        )

    @contextmanager
    def _begun(self, asked: Asked) -> Iterator[Clock]:
        """While the block runs, the weights lie as mlx-lm loads them."""
        engine: Any = self._own.engine
        held = mx.get_active_memory()
        with as_stored(engine.target, *[engine.draft] * (self.draft_tokens > 0)):
            self._copied = mx.get_active_memory() - held
            mx.random.seed(asked.seed)
            mx.reset_peak_memory()
            yield Clock()

    def _sample(
        self,
        clock: Clock,
        place: Place,
        asked: Asked,
        prompt_tokens: int,
        *,
        stopped: bool,
        overall: bool = False,
    ) -> Sample:
        ended: Ended = "stop" if stopped else "length"
        return clock.sample(
            place,
            overall=overall,
            prompt=asked.prompt,
            prompt_tokens=prompt_tokens,
            peak_bytes=mx.get_peak_memory() - self._spared - self._copied,
            ended=ended,
        )

    def result(
        self, series: Series, errors: Sequence[str], ours: Mapping[str, Sequence[Sample]]
    ) -> Peer:
        configuration = str(self.draft_tokens) if self.draft_tokens else BASELINE
        found = peer_of(NAME, configuration, series.samples, errors, ours)
        if not series.samples:
            return found
        return replace(found, counted_by="tokens", acceptance=acceptance_of(series.speculation))

    def _stream(self, tokens: Sequence[int], asked: Asked) -> Iterator[GenerationResponse]:
        engine: Any = self._own.engine
        options: dict[str, Any] = {}
        if self.draft_tokens:
            options = {"draft_model": engine.draft, "num_draft_tokens": self.draft_tokens}
        return stream_generate(
            engine.target,
            engine.tokenizer,
            list(tokens),
            max_tokens=asked.max_tokens,
            sampler=make_sampler(temp=asked.temperature),
            **options,
        )


def rounds_of(drafted: Sequence[bool], draft_tokens: int) -> SpeculationStats:
    """The whole rounds of a text; each ends with a token of the target's own.

    Args:
        drafted: of each token, whether it was proposed.
    """
    counts, kept = SpeculationStats(draft_tokens), 0
    for one in drafted:
        kept += one
        if not one:
            counts.add(RoundStats(draft_tokens, kept, drafter=MODEL))
            kept = 0
    return counts


def mlx_lm_arms(arms: Mapping[str, OwnArm]) -> list[MlxLmArm]:
    """mlx-lm plain, and with the draft at every K that is measured of ours, or at its own usual K.

    A draft with other tokens than the target's is not one that mlx-lm can use.
    """
    own = arms[BASELINE]
    engine = own.engine
    found = [MlxLmArm(own, 0, sum(map(bytes_of, engine.drafts.values())))]
    if list(engine.drafts) == [MODEL] and MODEL not in engine.shared:
        drafting = (arm.configuration for arm in arms.values() if arm.configuration.draft_tokens)
        counts = sorted({one.draft_tokens for one in drafting if one.drafter in ("", MODEL)})
        found += [MlxLmArm(own, count) for count in counts or [USUAL]]
    return found
