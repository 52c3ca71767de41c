"""The configuration of a block-diffusion head, from each of the formats in which heads are public.

z-lab's DFlash and DeepSpec's DSpark have the layers' sizes at the top, and their own keys there or
in `dflash_config`. speculators' have the sizes in `transformer_layer_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from mlxspec.errors import LoadError

_TYPES = ("full_attention", "sliding_attention")
_MARKOV = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class BlockConfig:
    """All that decides what a head computes.

    taps: the target's layers whose outputs it reads, from 0; -1 is the embedding. mask: the token
        in place of those to be proposed. block_size: rows of a block.
    first: the row of a block that proposes the first token, 0 or 1.
    windows: of each layer, None where it sees all. causal: of each layer, whether a row of the
        block sees no later row.
    vocabulary: of the target. proposes: how many of its tokens the head's own output layer has.
    multiplier, softcap: of its logits. scale: of its embeddings.
    rank, markov: of the Markov head; 0 is none. confidence: whether there is a confidence head, and
        `confidence_reads` whether that reads the Markov head's embedding too.
    threshold: the least confidence at which a token is proposed; 0 proposes all.
    selects, codes: how many candidates of a row DFlash2 chooses among, and the width of its codes;
        0 is DFlash. kernel, group: rows of its convolutions, and channels that share a weight.
    target_layers, target_hidden_size: of the target, where it is told.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    bias: bool
    rope: Mapping[str, Any]
    positions: int | None
    taps: tuple[int, ...]
    mask: int
    block_size: int
    first: int
    windows: tuple[int | None, ...]
    causal: tuple[bool, ...]
    vocabulary: int
    proposes: int
    multiplier: float
    softcap: float | None
    scale: float
    rank: int
    markov: str
    confidence: bool
    confidence_reads: bool
    threshold: float
    selects: int
    codes: int
    kernel: int
    group: int
    target_layers: int | None
    target_hidden_size: int

    @property
    def most(self) -> int:
        """The largest K."""
        return self.block_size - self.first

    @classmethod
    def read(cls, config: Mapping[str, Any], place: str) -> BlockConfig:
        """The configuration of a head.

        Args:
            place: where it is from, for errors.

        Raises:
            LoadError: it lacks something, or asks for what is not known here.
        """
        try:
            return _read(_Keys(config))
        except (KeyError, TypeError, ValueError) as error:
            lacks = isinstance(error, KeyError)
            raise LoadError(
                f"{place} {f'has no {error}' if lacks else f'makes no sense: {error}'}.",
                hint="Use a head in the format of DFlash, DSpark or speculators.",
            ) from error


class _Keys:
    """A head's keys, wherever a format has them: its own first, then the layers'."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        layers = config.get("transformer_layer_config")
        self.is_speculators = isinstance(layers, Mapping)
        own = config.get("dflash_config")
        places = [own if isinstance(own, Mapping) else {}, config]
        self._places = [*places, cast(Mapping[str, Any], layers)] if layers else places

    def __call__(self, key: str, default: Any = None) -> Any:
        """The first value that is there and not null."""
        for place in self._places:
            if place.get(key) is not None:
                return place[key]
        return default

    def needed(self, key: str) -> Any:
        value = self(key)
        if value is None:
            raise KeyError(key)
        return value


def _read(keys: _Keys) -> BlockConfig:
    heads, hidden = int(keys.needed("num_attention_heads")), int(keys.needed("hidden_size"))
    layers, block = int(keys.needed("num_hidden_layers")), int(keys("block_size", 16))
    vocabulary = int(keys.needed("vocab_size"))
    windows = _windows(keys, layers)
    if keys("hidden_act", "silu") != "silu":
        raise ValueError(f"its activation is {keys('hidden_act')}, and not silu")
    if (markov := str(keys("markov_head_type", "vanilla"))) not in _MARKOV:
        raise ValueError(f"its Markov head is {markov}, and not one of {', '.join(_MARKOV)}")
    theta = keys("rope_theta", 10000.0)
    rope = dict(keys("rope_parameters") or keys("rope_scaling") or {})
    return BlockConfig(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(keys("num_key_value_heads", heads)),
        head_dim=int(keys("head_dim", hidden // heads)),
        intermediate_size=int(keys.needed("intermediate_size")),
        eps=float(keys("rms_norm_eps", 1e-6)),
        bias=bool(keys("attention_bias", False)),
        rope={"rope_theta": theta, **rope},
        positions=keys("max_position_embeddings"),
        taps=_taps(keys),
        mask=int(keys.needed("mask_token_id")),
        block_size=block,
        first=_first(keys, block),
        windows=windows,
        causal=tuple(_is_causal(keys, window is not None) for window in windows),
        vocabulary=vocabulary,
        proposes=int(keys("draft_vocab_size", vocabulary)),
        multiplier=float(keys("output_multiplier", 1.0)),
        softcap=float(keys("final_logit_softcapping", 0)) or None,
        scale=float(keys("input_embedding_scale", 1.0)),
        rank=int(keys("markov_rank", 0)),
        markov=markov,
        confidence=bool(keys("enable_confidence_head", keys("use_confidence_head", False))),
        confidence_reads=bool(keys("confidence_head_with_markov", False)),
        threshold=float(keys("confidence_threshold", 0.0)),
        selects=int(keys("selector_top_k", 0)),
        codes=int(keys("selector_rank", 0)),
        kernel=int(keys("conv_kernel_size", 0)),
        group=int(keys("conv_group_size", 1)),
        target_layers=keys("num_target_layers"),
        target_hidden_size=int(keys("target_hidden_size", hidden)),
    )


def _taps(keys: _Keys) -> tuple[int, ...]:
    # speculators counts the states before and after layers: state i + 1 is what layer i returns.
    if keys.is_speculators and keys("aux_hidden_state_layer_ids"):
        return tuple(int(one) - 1 for one in keys("aux_hidden_state_layer_ids"))
    return tuple(int(one) for one in keys.needed("target_layer_ids"))


def _windows(keys: _Keys, layers: int) -> tuple[int | None, ...]:
    types = keys("layer_types") or ["full_attention"] * layers
    if len(types) != layers or set(types) - set(_TYPES):
        raise ValueError(f"its {layers} layers have the types {types}")
    if "sliding_attention" in types and keys("sliding_window") is None:
        raise KeyError("sliding_window")
    return tuple(
        int(keys("sliding_window")) if one == "sliding_attention" else None for one in types
    )


def _is_causal(keys: _Keys, slides: bool) -> bool:
    if keys.is_speculators:
        return slides and not keys("sliding_window_non_causal", False)
    told = keys("is_causal", keys("causal"))
    return slides if told is None else bool(told)


def _first(keys: _Keys, block: int) -> int:
    """The row that proposes the first token.

    In DFlash the row of the last token proposes nothing; in DSpark it proposes what follows it. A
    head of speculators says how many tokens it proposes.
    """
    methods = (keys("speculators_config") or {}).get("proposal_methods") or [{}]
    told = methods[0].get("speculative_tokens")
    if told in (block, block - 1):
        return block - int(told)
    for key in ("sample_from_anchor", "shift_label"):
        if keys(key) is not None:
            return 0 if keys(key) else 1
    if keys.is_speculators:
        return 1
    names = " ".join(map(str, keys("architectures") or ()))
    return 0 if "DSpark" in names else 1
