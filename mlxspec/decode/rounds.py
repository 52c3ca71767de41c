"""The rounds of one engine: built for each way of sampling, and compiled where that pays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from mlxspec.control.policy import FixedPolicy
from mlxspec.decode.lane import Lane
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.track import Track
from mlxspec.device import kernels
from mlxspec.device.compiling import MIXED, Compiling, Kind
from mlxspec.drafters.graph import GraphDrafter
from mlxspec.drafters.proposals import Proposal
from mlxspec.models.cached_model import CachedModel, kind_of
from mlxspec.models.prefill import finished
from mlxspec.params import Method
from mlxspec.sampling.sampler import Processor, Sampler


class Built(NamedTuple):
    """The number of kernels that were built, and the seconds that took, rounds included."""

    kernels: int
    seconds: float


class Rounds:
    """Makes rounds for requests.

    Args:
        models: the target, and the draft models behind it.
        drafters: draft models and heads, by name.
        from_text: whether anything drafts from the text.
        compiled: None compiles on a GPU always, and on a CPU once the kernels are built.
    """

    def __init__(
        self,
        models: Sequence[CachedModel],
        drafters: Mapping[str, GraphDrafter],
        *,
        from_text: bool,
        compiled: bool | None,
    ) -> None:
        self._target = models[0]
        self._drafters = dict(drafters)
        self._compiling = Compiling(
            [*(kind_of(cached.model) for cached in models), models[0].kv],
            models_draft=bool(drafters),
            text_drafts=from_text,
            asked=compiled,
        )
        self._built = lru_cache(maxsize=16)(self._build)

    def of(self, request: Request, *, beside: bool = False) -> FusedRound:
        """The rounds that a request runs.

        Args:
            beside: beside other texts.
        """
        if request.processors:
            return self._build(request.method, False, request.processors)
        return self._built(request.method, self.are_compiled(request, beside=beside))

    def beside(self, method: Method, request: Request) -> FusedRound:
        """The rounds of several texts, of which some need some of these steps.

        Args:
            request: one of them, which tells how many tokens are proposed.
        """
        count, auto = request.draft_tokens, request.auto
        compiled = self._compiling.holds(method, count, auto=auto, beside=True)
        return self._built(method, compiled)

    def with_sampler(self, sampler: Sampler, *, compiled: bool = False) -> FusedRound:
        """Rounds with a given sampler, for a program that drives rounds itself."""
        return FusedRound(self._target, self._drafters, sampler, compiled=compiled)

    def are_compiled(self, request: Request, *, beside: bool = False) -> bool:
        """Whether the rounds of a request are compiled."""
        return self._compiling.holds(
            request.method, request.draft_tokens, auto=request.auto, beside=beside
        )

    def kernels_missing(self, request: Request, *, beside: bool = False) -> bool:
        """Whether `build_kernels` would make the rounds of a request faster from now on."""
        return self._compiling.would_hold(
            request.method, request.draft_tokens, auto=request.auto, beside=beside
        )

    def build_kernels(self, request: Request, *, beside: bool = False) -> Built:
        """Run three compiled rounds of each kind, so that MLX builds every kernel they need."""
        started, before = time.perf_counter(), kernels.count_built()
        method = request.method
        rounds = self._built(method, True)
        kinds = self._compiling.kinds(request.draft_tokens, auto=request.auto, beside=beside)
        with kernels.quick_builds():
            for kind in kinds:
                self._run_three(rounds, request, kind)
                self._compiling.built(method, kind)
        return Built(kernels.count_built() - before, time.perf_counter() - started)

    @staticmethod
    def _run_three(rounds: FusedRound, request: Request, kind: Kind) -> None:
        some = replace(request, tokens=(0, 0), limit=64, draft_tokens=kind.draft_tokens, cache=None)
        drafts = kind == MIXED or not kind.from_text
        policy = FixedPolicy(rounds.drafters if drafts else (), kind.draft_tokens)
        lane = Lane(rounds, lambda _: policy)
        for row in range(1 + kind.beside):
            # Beside a text that follows what it wrote, a model drafts for another.
            texts = [_Zeros()] if kind.from_text and (row == 0 or not drafts) else []
            track = Track(rounds, Reader(rounds, some), some, policy, texts=texts)
            lane.join(track, finished(track.read()))
            lane.step()
        for _ in range(3):
            lane.step()

    def _build(
        self, method: Method, compiled: bool, processors: tuple[Processor, ...] = ()
    ) -> FusedRound:
        sampler = Sampler(method, self._target.vocabulary, processors)
        return self.with_sampler(sampler, compiled=compiled)


class _Zeros:
    """A text drafter that always proposes, whatever the text."""

    name, most = "zeros", 1

    def extend(self, tokens: Sequence[int]) -> None: ...

    def propose(self, limit: int) -> Proposal:
        return Proposal((0,) * limit, 1)
