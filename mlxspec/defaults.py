"""Defaults of all that a pair or a call leaves open, and names that stand for choices."""

from __future__ import annotations

from typing import Literal

DraftTokens = int | Literal["auto"]  # "auto" chooses round by round

AUTO: Literal["auto"] = "auto"
DEFAULT_DRAFT_TOKENS: DraftTokens = AUTO
DEFAULT_MAX_TOKENS = 256
DEFAULT_PAIR = "demo"
MAX_DRAFT_TOKENS = 64
MAX_AUTO_TOKENS = 8  # more never paid where verification costs more the more rows it has
MAX_LOGPROBS = 20  # alternatives that are told with a token's log-probability
MODEL = "model"  # the name of the one draft model, among drafters
MTP = "mtp"  # in place of a draft model: the layer that the target was trained with
HISTORY = "history"  # in place of a draft model: what followed in the text so far is proposed
PREDICTION = "prediction"  # the drafter that proposes an expected output
BUDGET_S = 60.0  # seconds that measuring a pair may take

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT, as shells count
