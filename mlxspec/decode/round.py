"""The fused round: propose, verify, commit, as one lazily built graph.

    state ── draft ──▶ K tokens, q ──┐
      │                              ▼
      └──── target over [last, d1 … dK] ──▶ p ──▶ verdict ──▶ state after, result

The host never decides anything in here. It dispatches a round from the arrays of the one before
and reads `result`, one small array, a round late.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx

from mlxspec.decode.state import NOTHING, Given, RoundState, Shape
from mlxspec.defaults import MODEL
from mlxspec.drafters.graph import GraphDrafter, ModelDrafter
from mlxspec.drafters.heads.head import HeadDrafter
from mlxspec.drafters.picks import Picks
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.layers import grow
from mlxspec.models.taps import Taps
from mlxspec.sampling import noise, verify
from mlxspec.sampling.logprobs import with_logprobs
from mlxspec.sampling.sampler import Sampler, uniform_if_broken
from mlxspec.sampling.verify import Draft, Rule, Verdict

BROKEN = -1  # in place of the number of accepted tokens: the target's scores are no distribution


Propose = Callable[[RoundState], tuple[Draft, RoundState]]
Commit = Callable[[RoundState, Draft], tuple[RoundState, mx.array]]


class _Graphs(threading.local):
    """The rounds that a thread has built, by shape.

    A compiled one must never run on another thread: MLX keeps what it traced for each thread by
    the address of the function, and forgets it on the thread alone that compiled the function. A
    later function at that address would find it, and run the wrong graph.
    """

    def __init__(self) -> None:
        self.of_shape: dict[Shape, Callable[..., Any]] = {}


class FusedRound:
    """Rounds of one target, its drafters and one way of sampling.

    Args:
        target: the model.
        drafters: draft models and heads, by name.
        sampler: how the target's tokens are picked, and a drafter's too.
        compiled: whether rounds are compiled. Compiling traces each shape once; eager rounds
            build their graph anew every time.

    `waits` says whether building a round computes it, so that none can be dispatched ahead.
    """

    def __init__(
        self,
        target: CachedModel,
        drafters: Mapping[str, GraphDrafter],
        sampler: Sampler,
        *,
        compiled: bool,
    ) -> None:
        self.target = target
        self.sampler = sampler
        self.drafters = dict(drafters)
        self.taps = Taps(target.model, [tap for one in drafters.values() for tap in one.taps])
        # A caller's processors may look at values, which a trace does not have.
        fused = target.fused and all(one.fused for one in drafters.values())
        self.waits = sampler.sees_whole_text or not fused
        self._compiled = compiled and not self.waits
        self._graphs = _Graphs()

    @property
    def takes_one(self) -> bool:
        """Whether the rounds are of one row alone: no text stands beside another."""
        drafters = self.drafters.values()
        return self.waits or not (self.target.beside and all(one.beside for one in drafters))

    def __call__(
        self,
        state: RoundState,
        *,
        draft_tokens: int,
        length: int,
        drafter: str = MODEL,
        draft_length: int | None = None,
        given: mx.array | None = None,
        limit: mx.array | None = None,
        is_given: mx.array | None = None,
    ) -> tuple[RoundState, mx.array]:
        """Build one round; nothing is computed until its arrays are evaluated.

        Drop every reference to the old state before that, or its caches are copied.

        Args:
            draft_tokens: K; 0 decodes plainly.
            length: entries to attend over in the target's caches, at least position + K + 1 of
                every row. draft_length: the same of the drafter's caches, less its start; None
                takes `length`.
            drafter: the model that proposes.
            given, limit, is_given: see `Given`. Without `is_given` no model proposes.

        Returns:
            The state after the round, and `result`, int32 [B, K + 2]: the committed tokens, of
            which the first accepted + 1 count, and last the number of accepted ones, or BROKEN.
        """
        hosts = Given(given, limit, is_given)
        rows = state.position.shape[0]
        shape = self.shape(draft_tokens, length, drafter, draft_length, hosts, rows=rows)
        return self.run(state, shape, hosts)

    def run(
        self, state: RoundState, shape: Shape, given: Given = NOTHING, *, top: int = 0
    ) -> tuple[RoundState, mx.array]:
        """Build one round of a known shape; see `__call__`.

        Args:
            top: the alternatives to each token, where the shape asks for log-probabilities. They
                stand behind the rest of the result; see `with_logprobs`.
        """
        # A graph is given only what it uses, so that another draft's past does not shape it.
        used = {
            name: past
            for name, past in state.drafts.items()
            if name == shape.drafter or self.drafters[name].follows
        }
        graph = self._graphs.of_shape.get(shape) or self._build(shape)
        after, result, *logits = graph(state._replace(drafts=used), given)
        self._graphs.of_shape[shape] = graph
        if logits:
            result = with_logprobs(result, logits[0], top)
        after = self._typed(after)
        return after._replace(drafts=state.drafts | after.drafts), result

    @property
    def heads(self) -> dict[str, HeadDrafter]:
        """The heads by name, which read the text along with the target."""
        both = self.drafters.items()
        return {name: one for name, one in both if isinstance(one, HeadDrafter)}

    def model(self, name: str) -> ModelDrafter:
        """The draft model of that name, which reads the text for itself."""
        drafter = self.drafters[name]
        assert isinstance(drafter, ModelDrafter)
        return drafter

    def room(self, state: RoundState) -> int:
        """The number of positions that the target has room for, and the heads with it."""
        heads = self.heads
        rooms = (heads[name].room(past) for name, past in state.drafts.items() if name in heads)
        return min((state.capacity, *rooms))

    def grown(self, state: RoundState, capacity: int) -> RoundState:
        """`state` with room for `capacity` tokens with the target, and the drafters that follow."""
        drafts = {
            name: self.drafters[name].grown(past, capacity)
            for name, past in state.drafts.items()
            if self.drafters[name].follows
        }
        return state._replace(target=grow(state.target, capacity), drafts=state.drafts | drafts)

    def fitted(self, state: RoundState) -> RoundState:
        """`state` from other rounds of the same models, with what these look at and no more."""
        return state._replace(
            recent=self.sampler.recent_of(state.recent), knobs=self.sampler.knobs_for(state.knobs)
        )

    def shape(
        self,
        draft_tokens: int,
        length: int,
        drafter: str = MODEL,
        draft_length: int | None = None,
        given: Given = NOTHING,
        *,
        rows: int = 1,
    ) -> Shape:
        """The shape of such a round; see `__call__`."""
        is_given, is_ragged = given.tokens is not None, given.limit is not None
        if draft_tokens == 0 or (is_given and given.is_given is None):
            return Shape("", draft_tokens, length, 0, is_given, is_ragged, rows)
        length_of_draft = draft_length or length
        return Shape(drafter, draft_tokens, length, length_of_draft, is_given, is_ragged, rows)

    def is_new(self, shape: Shape) -> bool:
        """Whether this thread has yet to build such a round: it takes longer than others."""
        return shape not in self._graphs.of_shape

    def halves(
        self, draft_tokens: int, length: int, drafter: str = MODEL
    ) -> tuple[Propose, Commit]:
        """The same round as two graphs, so that each can be waited for and timed."""
        shape = self.shape(draft_tokens, length, drafter)

        def propose(state: RoundState) -> tuple[Draft, RoundState]:
            return self._propose(self._typed(state), shape)

        def commit(state: RoundState, draft: Draft) -> tuple[RoundState, mx.array]:
            return self._commit(self._typed(state), Draft(*draft), shape.length)[:2]

        return (mx.compile(propose), mx.compile(commit)) if self._compiled else (propose, commit)

    def _build(self, shape: Shape) -> Callable[..., Any]:
        def body(state: RoundState, given: Given) -> tuple[Any, ...]:
            state = self._typed(state)
            draft, state = self._propose(state, shape, Given(*given))
            after, result, logits = self._commit(state, draft, shape.length)
            return (after, result, logits) if shape.logprobs else (after, result)

        return mx.compile(body) if self._compiled else body

    def _typed(self, state: Any) -> RoundState:
        """The state with its types, because a compiled function takes and returns plain tuples."""
        typed = RoundState(*state)
        drafts = {name: self.drafters[name].typed(past) for name, past in typed.drafts.items()}
        return typed._replace(drafts=drafts)

    def _propose(
        self, state: RoundState, shape: Shape, given: Given = NOTHING
    ) -> tuple[Draft, RoundState]:
        name, count = shape.drafter, shape.draft_tokens
        if not name:
            tokens = state.last_two[:, :0] if given.tokens is None else given.tokens
            return Draft(tokens, None, given.limit), state
        noises = self._draft_noise(state, count)
        picks = Picks(self.sampler, state.recent, state.knobs, noises, given.tokens, given.is_given)
        past = self.drafters[name].propose(
            state.drafts[name], state.last_two, state.position, picks, count, shape.draft_length
        )
        return picks.draft_within(given.limit), state.with_draft(name, past)

    def _draft_noise(self, state: RoundState, count: int) -> mx.array | None:
        method = self.sampler.method
        if method.greedy:
            return None
        if method.rule == "coupled":
            return self._target_noise(state, mx.arange(count))
        streams = noise.DRAFT_NOISE + mx.arange(count)
        keys = noise.keys_of(state.keys, streams, state.position[:, None])
        return noise.gumbel(keys, self.sampler.vocabulary)

    def _target_noise(self, state: RoundState, after: mx.array) -> mx.array:
        """Noise [B, N, V] of the tokens that follow `after` proposed ones, int32 [N] or [B, N]."""
        keys = noise.keys_of(state.keys, noise.TARGET_NOISE, state.position[:, None] + 1 + after)
        return noise.gumbel(keys, self.sampler.vocabulary)

    def _commit(
        self, state: RoundState, draft: Draft, length: int
    ) -> tuple[RoundState, mx.array, mx.array]:
        """The state after the round, its result, and the target's logits, [B, K + 1, V]."""
        rows = mx.concatenate([state.last_two[:, 1:], draft.tokens], axis=1)
        with self.taps.watching() as features:
            logits, layers = self.target.forward(rows, state.target, state.position, length)
        recent = mx.concatenate([state.recent, draft.tokens], axis=1)
        scores = self.sampler.scores(logits, recent, state.knobs)
        verdict = self._judge(scores, draft, state)
        result = _result(draft.tokens, verdict, scores)
        last = mx.take_along_axis(rows, verdict.accepted[:, None], axis=1)
        last_two = mx.concatenate([last, verdict.next_token[:, None]], axis=1)
        kept = verdict.accepted + 1
        position = state.position + kept
        if draft.limit is not None:
            # A row without a text must not move: its position would leave the room that it has.
            moves = draft.limit >= 0
            position = mx.where(moves, position, state.position)
            last_two = mx.where(moves[:, None], last_two, state.last_two)
        after = state._replace(
            position=position,
            last_two=last_two,
            recent=self._recent(state.recent, result[:, :-1], verdict.accepted),
            target=self.target.commit(layers, kept),
            drafts={
                name: self.drafters[name].commit(past, rows, features, state.position, kept)
                for name, past in state.drafts.items()
            },
        )
        return after, result, logits

    def _judge(self, scores: mx.array, draft: Draft, state: RoundState) -> Verdict:
        method = self.sampler.method
        if method.rule == "greedy":
            return verify.greedy(scores, draft)
        log_p = uniform_if_broken(scores)  # `_result` reports it where it matters
        if not method.greedy:
            log_p = self.sampler.log_probs(log_p, state.knobs)
        if method.rule == "coupled":
            following = mx.arange(draft.tokens.shape[1] + 1)
            drawn = log_p + self._target_noise(state, following)
            return verify.greedy(self.sampler.unless_greedy(drawn, scores, state.knobs), draft)
        rule = _RULES.get(method.rule) or verify.relaxed(state.knobs.threshold)
        tested = self._tested(rule, log_p, draft, state)
        if not method.by_row or method.rule == "relaxed":
            return tested
        both = zip(tested, verify.greedy(scores, draft), strict=True)
        return Verdict(*(self.sampler.unless_greedy(*one, state.knobs) for one in both))

    def _tested(self, rule: Rule, log_p: mx.array, draft: Draft, state: RoundState) -> Verdict:
        """The verdict of a rule that tests proposals and then chooses what follows."""
        batch, count = draft.tokens.shape
        if count == 0:
            accepted, log_weights = mx.zeros((batch,), mx.int32), log_p[:, 0]
        else:
            keys = noise.keys_of(state.keys, noise.ACCEPT_NOISE, state.position[:, None])
            acceptance = rule.accept(log_p, draft)
            passed = mx.log(noise.uniform(keys, count)[:, 0]) < acceptance.log_h
            accepted = rule.kept(draft.within(passed))
            log_weights = rule.follow(log_p, draft, acceptance, accepted)
        if not self.sampler.method.greedy:
            log_weights = log_weights + self._target_noise(state, accepted[:, None])[:, 0]
        return Verdict(accepted, mx.argmax(log_weights, axis=-1).astype(mx.int32))

    def _recent(self, recent: mx.array, committed: mx.array, accepted: mx.array) -> mx.array:
        if self.sampler.sees_whole_text:
            # This waits for the round, because its outcome shapes the next one.
            kept = cast(int, accepted.item()) + 1
            return mx.concatenate([recent, committed[:, :kept]], axis=1)
        if recent.shape[1] == 0:
            return recent
        places = accepted[:, None] + 1 + mx.arange(recent.shape[1])
        return mx.take_along_axis(mx.concatenate([recent, committed], axis=1), places, axis=1)


_RULES = {"token": verify.TOKEN, "block": verify.BLOCK}


def _result(tokens: mx.array, verdict: Verdict, scores: mx.array) -> mx.array:
    batch, count = tokens.shape
    accepted = verdict.accepted[:, None]
    committed = mx.concatenate([tokens, mx.zeros((batch, 1), mx.int32)], axis=1)
    committed = mx.where(mx.arange(count + 1) == accepted, verdict.next_token[:, None], committed)
    sound = mx.isfinite(mx.max(scores, axis=-1)) | (mx.arange(count + 1) > accepted)
    accepted = mx.where(mx.all(sound, axis=-1, keepdims=True), accepted, BROKEN)
    return mx.concatenate([committed, accepted], axis=1)
