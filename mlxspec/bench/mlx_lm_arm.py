"""mlx-lm in the same process and on the same weights, plain and with a draft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler

from mlxspec.bench.arms import Asked, Clock, OwnArm, Place, Written
from mlxspec.bench.cells import BASELINE, Acceptance, Sample
from mlxspec.bench.peers import peer_of
from mlxspec.bench.results import Peer
from mlxspec.defaults import MODEL
from mlxspec.pairs.loading import bytes_of

NAME = "mlx-lm"
USUAL = 3  # --num-draft-tokens of mlx_lm.generate


class MlxLmArm:
    """mlx-lm's `stream_generate` with the weights of an engine.

    Args:
        own: plain decoding of ours: its requests have the prompt's tokens. draft_tokens: K, 0 for
            none. spared_bytes: of drafts that are in memory for other arms.
    """

    def __init__(self, own: OwnArm, draft_tokens: int = 0, spared_bytes: int = 0) -> None:
        self.draft_tokens = draft_tokens
        self._own = own
        self._spared = spared_bytes
        self._rounds = self._accepted = 0

    @property
    def name(self) -> str:
        return f"{NAME} {self.draft_tokens}" if self.draft_tokens else NAME

    def write(self, asked: Asked, place: Place) -> Written:
        """Write one text, with the same sampling values; its random numbers are mlx-lm's own."""
        tokens = list(self._own.requests(asked)[0].tokens)
        mx.random.seed(asked.seed)
        mx.reset_peak_memory()
        clock, ended, text, drafted = Clock(), "length", "", []
        for one in self._stream(tokens, asked):
            if one.finish_reason != "stop":  # which comes with the token that ends the text
                clock.add(1)
                drafted.append(one.from_draft)
            text += one.text
            ended = one.finish_reason or ended
        self._count(drafted)
        sample = clock.sample(
            place,
            prompt=asked.prompt,
            prompt_tokens=len(tokens),
            peak_bytes=mx.get_peak_memory() - self._spared,
            ended="stop" if ended == "stop" else "length",
        )
        return Written(sample=sample, texts=[text], seconds=sample.total_s)

    def result(
        self, samples: Sequence[Sample], errors: Sequence[str], ours: Mapping[str, Sequence[Sample]]
    ) -> Peer:
        configuration = str(self.draft_tokens) if self.draft_tokens else BASELINE
        found = peer_of(NAME, configuration, samples, errors, ours)
        if not samples:
            return found
        return replace(found, counted_by="tokens", acceptance=self._acceptance())

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

    def _count(self, drafted: Sequence[bool]) -> None:
        """Count whole rounds: each ends with a token of the target's own."""
        whole = max((at + 1 for at, one in enumerate(drafted) if not one), default=0)
        self._rounds += sum(not one for one in drafted[:whole])
        self._accepted += sum(drafted[:whole])

    def _acceptance(self) -> Acceptance | None:
        if not self.draft_tokens or not self._rounds:
            return None
        proposed = self._rounds * self.draft_tokens
        return Acceptance(
            rounds=self._rounds,
            drafted=proposed,
            accepted=self._accepted,
            rate=self._accepted / proposed,
            tokens_per_round=1 + self._accepted / self._rounds,
        )


def mlx_lm_arms(arms: Mapping[str, OwnArm]) -> list[MlxLmArm]:
    """mlx-lm plain, and with the draft at every K that is measured of ours, or at its own usual K.

    A draft with other tokens than the target's is not one that mlx-lm can use.
    """
    own = arms[BASELINE]
    engine = own.engine
    found = [MlxLmArm(own, 0, sum(map(bytes_of, engine.drafts.values())))]
    if list(engine.drafts) == [MODEL] and MODEL not in engine.shared:
        counts = sorted(int(name) for name in arms if name.isdecimal() and name != "0")
        found += [MlxLmArm(own, count) for count in counts or [USUAL]]
    return found
