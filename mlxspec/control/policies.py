"""The controllers of one lane's texts, by the number of rows; each knows what the others learn."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mlxspec.control.batching import BatchController
from mlxspec.control.common import Common
from mlxspec.control.controller import Controller
from mlxspec.control.estimates import AcceptanceEstimate, Knowledge, Learned


class Controllers:
    """The controllers of texts that share rounds, one for each number of rows.

    Args:
        most: the models that draft, each with its largest K.
        learned: what earlier rounds have shown. length: of the texts.
        at_once: those of the models of which one pass drafts all tokens, whatever K is.
    """

    def __init__(
        self,
        most: Mapping[str, int],
        learned: Learned,
        length: int,
        at_once: Collection[str] = (),
    ) -> None:
        self._most, self._at_once = dict(most), at_once
        self._learned, self._length = learned, length
        self._made: dict[int, Controller] = {}
        self._common: Common | None = None

    def __call__(self, rows: int) -> Controller:
        """The controller for so many rows, which knows what the others have learned by now."""
        known = self._learned.by_rows(self._length)
        for other, one in self._made.items():
            known[other] = known.get(other, {}) | one.knowledge()
        made = self._made.get(rows)
        if isinstance(made, BatchController):
            made.reckon_with(known)
        elif made is None:
            made = self._made[rows] = self._new(rows, known)
        return made

    def _new(self, rows: int, known: Mapping[int, Mapping[str, Knowledge]]) -> Controller:
        if rows == 1:
            return Controller(self._most, known[1], self._at_once)
        if self._common is None:
            about = self._learned.at(self._length, rows)
            self._common = Common(
                {
                    name: AcceptanceEstimate(count, about[name].acceptance if name in about else ())
                    for name, count in self._most.items()
                }
            )
        return BatchController(rows, self._most, known, self._common, self._at_once)
