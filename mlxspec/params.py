"""How the next token is chosen: what a caller asks for. Needs no MLX."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from mlxspec.errors import UsageError

Verify = Literal["greedy", "token", "block", "coupled", "relaxed"]
VERIFY: tuple[Verify, ...] = get_args(Verify)

DEFAULT_CONTEXT = 20  # tokens that a penalty looks back on, as in mlx-lm
DEFAULT_GROUP_SIZE = 64  # of quantised keys and values
DEFAULT_THRESHOLD = 0.3  # of the relaxed rule


def _require(name: str, value: float | None, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}.", hint=f"It must be {expected}.")


def _require_finite(name: str, value: float) -> None:
    _require(name, value, abs(value) < float("inf"), "a finite number")


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """What is done to logits because of the tokens before them, the prompt's included.

    The meaning is that of mlx-lm's `make_logits_processors`. Each looks back on so many tokens;
    0 is the whole text.

    Args:
        repetition: logits of seen tokens are divided by it when positive, multiplied when
            negative (Keskar et al., arXiv 1909.05858); 0 or 1 is off.
        presence: taken from the logit of a token that was seen; 0 is off.
        frequency: taken from it for every time it was seen; 0 is off.
    """

    repetition: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition_context: int = DEFAULT_CONTEXT
    presence_context: int = DEFAULT_CONTEXT
    frequency_context: int = DEFAULT_CONTEXT

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_context") or name == "repetition":
                _require(
                    f"{name}{'_penalty' * (name == 'repetition')}", value, value >= 0, "0 or more"
                )
            _require_finite(name, value)

    def windows(self, whole: int | None) -> Windows:
        """How many tokens each looks back on, 0 where it is off.

        Args:
            whole: the length of the longest text there can be, if that is known.

        Raises:
            UsageError: the whole text is asked for and has no known end.
        """
        return Windows(
            *(
                self._window(name, value, whole)
                for name, value in (
                    ("repetition", self.repetition if self.repetition != 1 else 0),
                    ("presence", self.presence),
                    ("frequency", self.frequency),
                )
            )
        )

    def _window(self, name: str, value: float, whole: int | None) -> int:
        if value == 0:
            return 0
        window = int(getattr(self, f"{name}_context")) or whole
        if window is None:
            raise UsageError(
                f"{name}_context is 0, the whole text, which has no known end.",
                hint="Give a number of tokens, or max_tokens.",
            )
        return window if whole is None else min(window, whole)


@dataclass(frozen=True)
class KVQuantization:
    """Keys and values kept in fewer bits, as mlx-lm's `kv_bits` does from the first token on.

    Args:
        bits: 2, 4 or 8 for a number.
        group_size: 32, 64 or 128 numbers share a scale; it divides the heads' dimension.
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        _require("kv_bits", self.bits, self.bits in (2, 4, 8), "2, 4 or 8")
        sizes = (32, 64, 128)
        _require("kv_group_size", self.group_size, self.group_size in sizes, "32, 64 or 128")


@dataclass(frozen=True)
class Windows:
    """Tokens that each penalty looks back on; 0 where it is off."""

    repetition: int = 0
    presence: int = 0
    frequency: int = 0

    @property
    def longest(self) -> int:
        return max(self.repetition, self.presence, self.frequency)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: keep the smallest set of tokens whose probability reaches this; 0 or 1 is off.
        top_k: keep this many of the most likely tokens; 0 is off.
        min_p: keep tokens at least this times as likely as the most likely one; 0 is off.
        seed: of the random numbers; None draws one.
        xtc_probability: of leaving out, at a token, all that reach `xtc_threshold` but the least
            likely of them; 0 is off.
        xtc_threshold: at most 0.5.
        xtc_special_tokens: ids that XTC never leaves out; None is the line end and the ends of
            the text, where there is a tokenizer.
        penalties: for tokens that were there before.
        logit_bias: added to the logits of these ids.
        verify: how proposals are verified; None is greedy at temperature 0, else block.
        acceptance_threshold: of the relaxed rule, 0 to 1; None is its default.

    Raises:
        UsageError: when a value is outside its range, or two do not go together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] | None = None
    penalties: Penalties = Penalties()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    verify: Verify | None = None
    acceptance_threshold: float | None = None

    def __post_init__(self) -> None:
        _require_finite("temperature", self.temperature)
        _require("temperature", self.temperature, self.temperature >= 0, "0 or more")
        for name in ("top_p", "min_p", "xtc_probability"):
            value = getattr(self, name)
            _require(name, value, 0 <= value <= 1, "between 0 and 1")
        threshold = self.xtc_threshold
        _require("xtc_threshold", threshold, 0 <= threshold <= 0.5, "between 0 and 0.5")
        _require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1")
        for token, bias in self.logit_bias.items():
            _require("logit_bias", token, token >= 0, "for ids of 0 or more")
            # -inf forbids a token, which is what a bias is often used for.
            _require("logit_bias", bias, bias < float("inf"), "a number, or -inf")
        self._check_verify()

    def _check_verify(self) -> None:
        if self.verify is not None and self.verify not in VERIFY:
            raise UsageError(
                f"There is no verification rule {self.verify!r}.",
                hint=f"Choose one of {', '.join(VERIFY)}.",
            )
        if self.verify == "greedy" and self.temperature > 0:
            raise UsageError(
                f"Greedy verification would bias sampling at temperature {self.temperature}.",
                hint="Choose temperature 0, or block, token or coupled verification.",
            )
        threshold = self.acceptance_threshold
        if threshold is None:
            return
        _require("acceptance_threshold", threshold, 0 <= threshold <= 1, "between 0 and 1")
        if self.verify != "relaxed":
            raise UsageError(
                "An acceptance threshold makes verification inexact.",
                hint="If that is wanted, ask for relaxed verification; exact rules have none.",
            )

    @property
    def rule(self) -> Verify:
        """The rule that proposals are verified with."""
        if self.verify == "relaxed":
            return "relaxed"
        if self.temperature == 0:
            return "greedy"  # what every exact rule comes to
        return self.verify or "block"

    @property
    def is_exact(self) -> bool:
        """Whether what is written is distributed as the target's own text."""
        return self.rule != "relaxed"

    def method(self, whole: int | None = None) -> Method:
        """What of these parameters shapes the graph.

        Args:
            whole: the length of the longest text there can be, if that is known.
        """
        steps = Method(
            rule=self.rule,
            greedy=self.temperature == 0,
            windows=self.penalties.windows(whole),
            bias=bool(self.logit_bias),
        )
        if steps.greedy:
            return steps
        xtc = self.xtc_probability > 0
        return replace(
            steps,
            top_p=0 < self.top_p < 1,
            min_p=self.min_p > 0,
            top_k=self.top_k,
            xtc=xtc,
            xtc_special_tokens=(self.xtc_special_tokens or ()) if xtc else (),
        )

    def auditable(self) -> SamplingParams:
        """These parameters with a rule whose text plain decoding can be held against.

        Raises:
            UsageError: another rule is asked for, whose text depends on the draft.
        """
        if self.rule in ("greedy", "coupled"):
            return self
        if self.verify is not None:
            raise UsageError(
                f"Text of the {self.verify} rule cannot be audited token by token.",
                hint="Choose coupled, which samples the same distribution, or temperature 0.",
            )
        return replace(self, verify="coupled")

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed, drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


@dataclass(frozen=True)
class Method:
    """Which steps a distribution goes through: what of the parameters shapes the graph."""

    rule: Verify = "greedy"
    greedy: bool = True
    windows: Windows = Windows()
    bias: bool = False
    top_p: bool = False
    min_p: bool = False
    top_k: int = 0
    xtc: bool = False
    xtc_special_tokens: tuple[int, ...] = ()
