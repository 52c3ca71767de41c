"""Which rounds of an engine are compiled, and the kernels that they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from mlxspec.device import kernels
from mlxspec.params import Method, Windows

MANY = 2  # draft steps: rounds with more use the same operations


class Kind(NamedTuple):
    """Rounds with the same operations: `draft_tokens` draft steps, or proposals from the text.

    beside: of several texts, each with a limit of its own. There, 2 draft steps and proposals from
        the text are rounds in which some rows take the one and some the other.
    """

    draft_tokens: int
    from_text: bool
    beside: bool = False


MIXED = Kind(MANY, True, beside=True)


class Compiling:
    """Decides for each way of sampling and drafting whether its rounds are compiled.

    Args:
        models: the properties of the models that determine a round's operations, compared by
            their `str`.
        models_draft, text_drafts: whether models draft, and whether text drafters do.
        asked: the caller's decision; None compiles where no kernel is missing.
    """

    def __init__(
        self, models: Any, *, models_draft: bool, text_drafts: bool, asked: bool | None
    ) -> None:
        self._models = models
        self._models_draft = models_draft
        self._text_drafts = text_drafts
        self._asked = asked

    def holds(self, method: Method, draft_tokens: int, *, auto: bool, beside: bool = False) -> bool:
        """Whether rounds of `draft_tokens` proposals are compiled.

        Args:
            auto: and of fewer too. beside: and those of several texts.
        """
        if self._asked is not None:
            return self._asked
        kinds = self.kinds(draft_tokens, auto=auto, beside=beside)
        return kernels.can_compile() and not self._unbuilt(method, kinds)

    def would_hold(
        self, method: Method, draft_tokens: int, *, auto: bool, beside: bool = False
    ) -> bool:
        """Whether such rounds are not compiled yet, but would be once their kernels are built."""
        may = self._asked is None and kernels.can_compile()
        return may and self._unbuilt(method, self.kinds(draft_tokens, auto=auto, beside=beside))

    def built(self, method: Method, kind: Kind) -> None:
        """Note that the kernels of this kind of round are built."""
        kernels.mark_built(self._name(method, kind))

    def kinds(self, draft_tokens: int, *, auto: bool, beside: bool = False) -> list[Kind]:
        """All kinds of rounds that may run."""
        counts = range(min(draft_tokens, MANY) + 1) if auto else [draft_tokens]
        kinds = [Kind(count, False) for count in counts if count == 0 or self._models_draft]
        if draft_tokens and self._text_drafts:
            kinds += [Kind(0, False), Kind(1, True)]
        if beside:
            # A text that has just joined proposes nothing, so others may be plain rounds too.
            kinds += [
                Kind(0, False),
                *(kind._replace(beside=True) for kind in (*kinds, Kind(0, False))),
            ]
            mixes = draft_tokens and self._text_drafts and self._models_draft
            kinds += [MIXED] if mixes else []
        return list(dict.fromkeys(kinds))

    def _unbuilt(self, method: Method, kinds: list[Kind]) -> bool:
        return not all(kernels.are_built(self._name(method, kind)) for kind in kinds)

    def _name(self, method: Method, kind: Kind) -> str:
        count = min(kind.draft_tokens, MANY)
        what = "mixed" if kind == MIXED else "text" if kind.from_text else count
        # A window's length shapes a round, but not the kernels that it needs.
        windows = Windows(*(min(length, 1) for length in vars(method.windows).values()))
        steps = replace(method, windows=windows)
        return f"{self._models} {steps} {what}{' beside' * kind.beside}"
