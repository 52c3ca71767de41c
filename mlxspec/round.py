"""The fused round: propose, verify, commit, as one lazily built graph.

    state ── draft ──▶ K tokens, q ──┐
      │                              ▼
      └──── target over [last, d1 … dK] ──▶ p ──▶ verdict ──▶ state after, result

The host never decides anything in here. It dispatches a round from the arrays of the one before
and reads `result`, one small array, a round late.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec import verify
from mlxspec.cache import Layers, Model, capacity_of, forward, grow
from mlxspec.drafters import ModelDrafter
from mlxspec.params import Method
from mlxspec.sampling import Knobs, log_probs
from mlxspec.verify import Draft, Verdict


class RoundState(NamedTuple):
    """All that a round needs and changes, for B sequences side by side.

    position: int32 [B], of the last committed token, which is not in the target's cache yet.
    last_two: int32 [B, 2], the token before it, and it.
    key: the random key.
    knobs: the sampling parameters, float32 [B] each.
    target, draft: the caches' storage; `draft` is empty where nothing drafts.
    """

    position: mx.array
    last_two: mx.array
    key: mx.array
    knobs: Knobs
    target: Layers
    draft: Layers

    @property
    def capacity(self) -> int:
        return capacity_of(self.target)

    def grown(self, capacity: int) -> RoundState:
        return self._replace(target=grow(self.target, capacity), draft=grow(self.draft, capacity))


Propose = Callable[[RoundState], tuple[Draft, RoundState]]
Commit = Callable[[RoundState, Draft], tuple[RoundState, mx.array]]


class Round:
    """Rounds of one target, one drafter and one way of sampling.

    Args:
        target: an mlx-lm model.
        drafter: None decodes plainly: a round of no proposal and one token.
        method: greedy or sampling.
        compiled: whether rounds are compiled. Compiling traces each shape once; eager rounds
            build their graph anew every time.
    """

    def __init__(
        self, target: Model, drafter: ModelDrafter | None, method: Method, *, compiled: bool
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._method = method
        self._compiled = compiled
        self._of_shape = cache(self._build)

    def __call__(
        self, state: RoundState, *, draft_tokens: int, length: int
    ) -> tuple[RoundState, mx.array]:
        """Build one round; nothing is computed until its arrays are evaluated.

        Drop every reference to the old state before that, or its caches are copied.

        Args:
            draft_tokens: K, 0 without a drafter.
            length: how far the caches are attended, at least position + K + 1 of every row.

        Returns:
            The state after the round, and `result`, int32 [B, K + 2]: the committed tokens, of
            which the first accepted + 1 count, and last the number of accepted ones.
        """
        after, result = self._of_shape(draft_tokens, length)(state)
        return RoundState(*after), result

    def halves(self, draft_tokens: int, length: int) -> tuple[Propose, Commit]:
        """The same round as two graphs, so that each can be waited for and timed."""

        def propose(state: RoundState) -> tuple[Draft, RoundState]:
            return self._propose(RoundState(*state), draft_tokens, length)

        def commit(state: RoundState, draft: Draft) -> tuple[RoundState, mx.array]:
            return self._commit(RoundState(*state), Draft(*draft), length)

        return (mx.compile(propose), mx.compile(commit)) if self._compiled else (propose, commit)

    def _build(self, draft_tokens: int, length: int) -> Callable[[RoundState], Any]:
        def body(state: RoundState) -> tuple[RoundState, mx.array]:
            draft, state = self._propose(RoundState(*state), draft_tokens, length)
            return self._commit(state, draft, length)

        return mx.compile(body) if self._compiled else body

    def _propose(
        self, state: RoundState, draft_tokens: int, length: int
    ) -> tuple[Draft, RoundState]:
        if self._drafter is None or draft_tokens == 0:
            return Draft(mx.zeros((state.position.shape[0], 0), mx.int32), None), state
        draft_key, key = mx.random.split(state.key)
        draft, layers = self._drafter.propose(
            state.draft,
            state.last_two,
            state.position,
            count=draft_tokens,
            length=length,
            knobs=state.knobs,
            key=draft_key,
        )
        return draft, state._replace(key=key, draft=layers)

    def _commit(self, state: RoundState, draft: Draft, length: int) -> tuple[RoundState, mx.array]:
        verify_key, key = mx.random.split(state.key)
        rows = mx.concatenate([state.last_two[:, 1:], draft.tokens], axis=1)
        logits, layers = forward(self._target, rows, state.target, state.position, length)
        verdict = self._judge(logits, draft, state.knobs, verify_key)
        last = mx.take_along_axis(rows, verdict.accepted[:, None], axis=1)
        after = state._replace(
            position=state.position + verdict.accepted + 1,
            last_two=mx.concatenate([last, verdict.next_token[:, None]], axis=1),
            key=key,
            target=layers,
        )
        return after, _result(draft.tokens, verdict)

    def _judge(self, logits: mx.array, draft: Draft, knobs: Knobs, key: mx.array) -> Verdict:
        if self._method.greedy:
            return verify.greedy(logits, draft)
        return verify.token_rule(log_probs(logits, self._method, knobs), draft, key)


def _result(tokens: mx.array, verdict: Verdict) -> mx.array:
    batch, count = tokens.shape
    accepted = verdict.accepted[:, None]
    committed = mx.concatenate([tokens, mx.zeros((batch, 1), mx.int32)], axis=1)
    committed = mx.where(mx.arange(count + 1) == accepted, verdict.next_token[:, None], committed)
    return mx.concatenate([committed, accepted], axis=1)
