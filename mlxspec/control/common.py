"""What the controllers of texts that share rounds have in common, whatever their number of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxspec.control.estimates import AcceptanceEstimate
from mlxspec.control.offers import Graded


@dataclass
class Common:
    """What the controllers of all numbers of rows share.

    acceptance: of each model. graded: of the texts' offers. building_s: the seconds that building a
    round took; 0 before any was built. spent, elapsed: on trials of rounds that were never run, and
    in all, in plain rounds.
    """

    acceptance: dict[str, AcceptanceEstimate]
    graded: Graded = field(default_factory=dict)
    building_s: float = 0.0
    spent: float = 0.0
    elapsed: float = 0.0
