"""What an engine makes for one text: its tokens' way through rounds, a policy, a writer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from mlxspec.control.estimates import Learned, length_class
from mlxspec.control.policies import Controllers
from mlxspec.control.policy import FixedPolicy, Policy
from mlxspec.decode.prefixes import Keeper, PrefixCache, identity_of_owner
from mlxspec.decode.prompt_cache import PromptCache
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import Request
from mlxspec.decode.round import FusedRound
from mlxspec.decode.rounds import Rounds
from mlxspec.decode.session import Session
from mlxspec.decode.track import Track
from mlxspec.decode.writer import Writer
from mlxspec.defaults import MODEL
from mlxspec.drafters.heads.head import Head
from mlxspec.drafters.history import Prediction
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.drafters.vocabulary import Shared
from mlxspec.models.cached_model import CachedModel, why_it_waits
from mlxspec.models.caches.original import Model
from mlxspec.models.identity import Identity
from mlxspec.params import Method
from mlxspec.tokens import Tokenizer


class Parts(Protocol):
    """The engine's models and drafters, and what it has learned; see `Engine`."""

    rounds: Rounds
    learned: Learned
    notes: tuple[str, ...]
    tokenizer: Tokenizer | None
    models: list[CachedModel]
    drafts: dict[str, Model]
    heads: dict[str, Head]
    shared: dict[str, Shared]
    texts: tuple[Callable[[], TextDrafter], ...]
    prefixes: PrefixCache | None


class Maker:
    """Makes what the texts of one engine need."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._controllers: dict[Any, Controllers] = {}

    def session(self, request: Request) -> Session:
        rounds = self._parts.rounds.of(request)
        track = self.track(request, rounds, self.policy(request, rounds))
        return Session(rounds, track)

    def track(
        self,
        request: Request,
        rounds: FusedRound,
        policy: Policy | None = None,
        prefixes: PrefixCache | None = None,
    ) -> Track:
        """A text that those rounds are to write, which has not been read yet.

        Args:
            prefixes: what it begins from; None takes the engine's, if it has one.
        """
        notes = self._notes(request)
        keeper = self._keeper(request, prefixes or self._parts.prefixes)
        reader = Reader(rounds, request, tell=notes.append, keeper=keeper)
        texts = self._proposing(request) if request.draft_tokens else []
        return Track(rounds, reader, request, policy, texts=texts, notes=notes)

    def policy(self, request: Request, rounds: FusedRound) -> Policy:
        """Chooses the drafter and K of every round of one text."""
        return self.policies(request, rounds)(1)

    def policies(self, request: Request, rounds: FusedRound) -> Callable[[int], Policy]:
        """The same for texts that share rounds, by the number of rows."""
        most = {name: one.most for name, one in rounds.drafters.items()}
        if request.auto:
            at_once = {name for name, one in rounds.drafters.items() if one.at_once}
            return Controllers(most, self._parts.learned, len(request.tokens), at_once)
        fixed = FixedPolicy(most, request.draft_tokens)
        return lambda rows: fixed

    def policies_beside(self, request: Request, rounds: FusedRound) -> Callable[[int], Policy]:
        """The same for the texts of a batch: what one batch found out, the next one begins with."""
        if not request.auto:
            return self.policies(request, rounds)
        # A batch belongs to one thread, and so do those that share its policies.
        names = frozenset(rounds.drafters)
        key = (threading.get_ident(), names, length_class(len(request.tokens)))
        if key not in self._controllers:
            made = self.policies(request, rounds)
            assert isinstance(made, Controllers)
            self._controllers[key] = made
        return self._controllers[key]

    def learn(self, length: int, policy: Policy, rows: int = 1) -> None:
        """Let later texts begin with what the rounds of one of `length` tokens have shown."""
        self._parts.learned.learn(length, policy.knowledge(), rows)

    def prefixes(self) -> PrefixCache:
        """What the texts of a batch begin from: the engine's, or else one of its own."""
        return self._parts.prefixes or PrefixCache()

    def writer(self, request: Request) -> Writer:
        return Writer(request, self._parts.tokenizer)

    def rounds_beside(self, request: Request) -> FusedRound:
        """The rounds of a text beside others."""
        return self._parts.rounds.of(request, beside=True)

    def rounds_for(self, method: Method, request: Request) -> FusedRound:
        """The rounds of texts like that beside others, of which some need some of these steps."""
        return self._parts.rounds.beside(method, request)

    def _notes(self, request: Request) -> list[str]:
        """Notes for the user before the first round."""
        notes = [*self._parts.notes, *request.notes]
        notes += [why_it_waits(cached) for cached in self._parts.models if not cached.fused]
        if request.draft_tokens:
            notes += [
                f"the draft{'' if name == MODEL else f' {name}'} speaks another tokenizer: "
                f"{shared.percent}% of the target's tokens are shared"
                for name, shared in self._parts.shared.items()
            ]
        if request.processors:
            notes.append("logits processors of your own: rounds are not compiled")
        return notes

    def _proposing(self, request: Request) -> list[TextDrafter]:
        """The drafters that propose from the text of one request."""
        predicting: list[TextDrafter] = []
        if request.prediction:
            predicting.append(Prediction(request.prediction))
        # With a fixed K a model drafts where nothing is predicted; without one, text drafters do.
        asked = (
            self._parts.texts
            if request.auto or not (self._parts.drafts or self._parts.heads)
            else ()
        )
        return predicting + [make() for make in asked]

    def _keeper(self, request: Request, prefixes: PrefixCache | None) -> Keeper | None:
        """What a text begins from: its own file, or else a prefix cache."""
        if request.cache is not None:
            count = len(request.tokens)
            return PromptCache(
                request.cache, self._identity, prompt_tokens=count, ends=request.ends
            )
        if prefixes is None or not prefixes.stats.max_bytes:
            return None
        return prefixes.for_text(self._parts.models, request.ends)

    @cached_property
    def _identity(self) -> Identity:
        return identity_of_owner(self._parts)
