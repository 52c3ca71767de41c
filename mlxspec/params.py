"""The parameters of a generation: sampling, penalties, verification. Needs no MLX."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mlxspec.errors import UsageError

Verify = Literal["greedy", "token", "block", "coupled", "relaxed"]
VERIFY: tuple[Verify, ...] = get_args(Verify)

DEFAULT_CONTEXT = 20  # tokens that a penalty looks back on, as in mlx-lm
DEFAULT_GROUP_SIZE = 64  # values that share one scale in quantised keys and values
DEFAULT_THRESHOLD = 0.3  # of the relaxed rule
MOST = 1e30  # a logit that this is added to, or multiplied by, is still a float32


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}.", hint=f"It must be {expected}.")


def _require_finite(name: str, value: float) -> None:
    _require(name, value, abs(value) <= MOST, f"a finite number, {MOST:g} at most")


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Penalties on the logits of tokens that occurred before, in the prompt or the output.

    They mean what they mean in mlx-lm's `make_logits_processors`. Each looks back on the number
    of tokens that its `_context` gives; 0 is the whole text.

    Args:
        repetition: logits of seen tokens are divided by it when positive, multiplied when
            negative (Keskar et al., arXiv 1909.05858); 0 or 1 is off.
        presence: subtracted from the logit of a token that was seen; 0 is off.
        frequency: subtracted once for every time that the token was seen; 0 is off.
    """

    repetition: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition_context: int = DEFAULT_CONTEXT
    presence_context: int = DEFAULT_CONTEXT
    frequency_context: int = DEFAULT_CONTEXT

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            called = name if name.endswith("_context") else f"{name}_penalty"
            if called == name or name == "repetition":
                _require(called, value, value >= 0, "0 or more")
            _require_finite(called, value)
        divides = self.repetition == 0 or self.repetition >= 1 / MOST
        _require("repetition_penalty", self.repetition, divides, f"0, or {1 / MOST:g} or more")

    def windows(self, whole: int | None) -> Windows:
        """The number of tokens that each penalty looks back on, 0 where it is off.

        Args:
            whole: the greatest length that the text can reach, if known.

        Raises:
            UsageError: a penalty looks back on the whole text, and `whole` is not known.
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
    """Quantised keys and values, as with mlx-lm's `kv_bits` from the first token on.

    Args:
        bits: bits per value: 2, 4 or 8.
        group_size: values that share one scale: 32, 64 or 128, a divisor of the heads' dimension.

    Raises:
        UsageError: a value is none of these.
    """

    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        _require("kv_bits", self.bits, self.bits in (2, 4, 8), "2, 4 or 8")
        sizes = (32, 64, 128)
        _require("kv_group_size", self.group_size, self.group_size in sizes, "32, 64 or 128")


@dataclass(frozen=True)
class Windows:
    """The number of tokens that each penalty looks back on; 0 where it is off."""

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
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 is off.
        seed: of the random numbers; None draws one.
        xtc_probability: the chance, at each token, of dropping all tokens that reach
            `xtc_threshold` except the least likely of them; 0 is off.
        xtc_threshold: a probability, at most 0.5.
        xtc_special_tokens: ids that XTC never drops; None stands for the line end and the
            end-of-text tokens, where there is a tokenizer.
        penalties: for tokens that occurred before.
        logit_bias: added to the logits, by token id; -inf forbids a token.
        verify: the verification rule. None is greedy at temperature 0; else coupled with
            draft_tokens="auto", so that the seed alone decides the text, and block with a fixed K.
        acceptance_threshold: of the relaxed rule, 0 to 1; None is its default.

    Raises:
        UsageError: a value is outside its range, or two values contradict each other.
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
            is_id = isinstance(token, int) and token >= 0
            _require("logit_bias", token, is_id, "for ids, which are whole numbers from 0")
            # -inf forbids a token, which is what a bias is often used for.
            _require("logit_bias", bias, bias <= MOST, f"{MOST:g} at most, or -inf")
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
            return "greedy"  # every exact rule reduces to it
        return self.verify or "block"

    @property
    def is_exact(self) -> bool:
        """Whether the text is distributed as the target's own."""
        return self.rule != "relaxed"

    def method(self, whole: int | None = None) -> Method:
        """The steps of these parameters, which shape the graph.

        Args:
            whole: the greatest length that the text can reach, if known.

        Raises:
            UsageError: see `Penalties.windows`.
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
        """These parameters with a rule whose text can be compared with plain decoding.

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

    def in_words(self) -> list[str]:
        """The values that are not the defaults, one phrase each; the seed last, when sampling."""
        plain = SamplingParams()
        words = [] if self.temperature else ["greedy"]
        for name in NAMES:
            value = _named(self, name)
            looks_back = name.endswith("context_size")
            idle = looks_back or (name in FILTERS and not self.temperature)
            if value != _named(plain, name) and not idle:
                words.append(f"{name.replace('_', ' ')} {value:g}")
        if self.logit_bias:
            words.append(f"{len(self.logit_bias)} bias{'' if len(self.logit_bias) == 1 else 'es'}")
        if self.temperature and self.seed is not None:
            words.append(f"seed {self.seed}")
        return words

    def as_dict(self) -> dict[str, float]:
        """The values that are not the defaults, by the names that `sampling_params` takes."""
        plain = SamplingParams()
        values = {name: _named(self, name) for name in NAMES}
        return {name: value for name, value in values.items() if value != _named(plain, name)}


@dataclass(frozen=True)
class Method:
    """The steps from logits to a token: the part of the parameters that shapes the graph.

    by_row: whether rows differ in the steps that they need; see `sampling.union`.
    """

    rule: Verify = "greedy"
    greedy: bool = True
    windows: Windows = Windows()
    bias: bool = False
    top_p: bool = False
    min_p: bool = False
    top_k: int = 0
    xtc: bool = False
    xtc_special_tokens: tuple[int, ...] = ()
    by_row: bool = False


_PENALTY_NAMES = {
    f"{kind}_{mine}": f"{kind}{its}"
    for kind in ("repetition", "presence", "frequency")
    for mine, its in (("penalty", ""), ("context_size", "_context"))
}
FILTERS = ("top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold")
# The parameters that are numbers, by the names that the command line and the table give them.
NAMES = ("temperature", *FILTERS, *_PENALTY_NAMES)
WHOLE = ("top_k", *(name for name in NAMES if name.endswith("context_size")))  # integers


def sampling_params(values: Mapping[str, float], **others: Any) -> SamplingParams:
    """Sampling parameters from numbers by NAMES, with penalties among them.

    Args:
        others: further arguments of `SamplingParams`, such as `seed` and `verify`.

    Raises:
        UsageError: see `SamplingParams`.
    """
    penalties: dict[str, Any] = {
        its: values[name] for name, its in _PENALTY_NAMES.items() if name in values
    }
    direct: dict[str, Any] = {
        name: value for name, value in values.items() if name not in _PENALTY_NAMES
    }
    return SamplingParams(**direct, **others, penalties=Penalties(**penalties))


def changed(usual: SamplingParams, values: Mapping[str, float], **others: Any) -> SamplingParams:
    """`usual` with other values: numbers by NAMES, and `others` that are not None."""
    names = ("seed", "logit_bias", "verify", "acceptance_threshold")
    kept = {name: getattr(usual, name) for name in names}
    kept |= {name: value for name, value in others.items() if value is not None}
    return sampling_params(usual.as_dict() | dict(values), **kept)


def _named(params: SamplingParams, name: str) -> float:
    owner = params.penalties if name in _PENALTY_NAMES else params
    value: float = getattr(owner, _PENALTY_NAMES.get(name, name))
    return value
