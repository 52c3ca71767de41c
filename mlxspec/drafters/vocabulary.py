"""Which of a draft's tokens mean the same as a target's. No MLX.

A token means the bytes that its tokenizer decodes it to behind another token, whatever it spells
them like: a space is `Ġ` in byte-level BPE and `▁` in SentencePiece, a line's end `Ċ`, `<0x0A>` or
itself.
A special token (a marker of a chat, the end of a text) means its name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxspec.spelling import bytes_of
from mlxspec.tokens import BYTE, Tokenizer

ENOUGH = 0.9  # of the target's tokens: with fewer, too much of a text cannot be proposed

Meaning = bytes | str  # bytes, or the name of an added token
Meanings = Mapping[Meaning, Sequence[int]]  # and the ids that have it


@dataclass(frozen=True)
class Shared:
    """The tokens that two vocabularies share, and what a draft is shown for the others.

    Args:
        partners: the target's ids to the draft's of the same meaning, one to one.
        stand_ins: the target's ids to the draft's that are shown in place of tokens it lacks.
        placeholder: the draft's id that is shown where there is no stand-in.
        tokens: the number of tokens in the target's vocabulary.
    """

    partners: Mapping[int, int]
    stand_ins: Mapping[int, int]
    placeholder: int
    tokens: int

    @property
    def overlap(self) -> float:
        """Shared tokens, as a fraction of the target's vocabulary."""
        return len(self.partners) / self.tokens

    @property
    def percent(self) -> int:
        """The overlap in percent, rounded down."""
        return 100 * len(self.partners) // self.tokens


def shared_tokens(target: Tokenizer, draft: Tokenizer) -> Shared | None:
    """The tokens that two tokenizers share; None where their ids mean the same."""
    mine = target.get_vocab()
    if _same_ids(mine, draft.get_vocab()):
        return None
    here, there = _meanings(target), _meanings(draft)
    partners = _partners(here, there)
    _add_named(partners, target, draft)
    # A text's end and its beginning mean the same under any name.
    for role in ("eos_token_id", "bos_token_id"):
        own, other = getattr(target, role), getattr(draft, role)
        free = own not in partners and other not in partners.values()
        if free and own is not None and other is not None:
            partners[own] = other
    return Shared(partners, _stand_ins(here, there, partners), _placeholder(draft), len(mine))


def _same_ids(mine: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Whether shared tokens have the same ids, and no id stands for two different tokens.

    Added and special tokens are included. A token that only one of the two has is no difference.
    """
    names = {index: token for token, index in theirs.items()}
    return all(
        theirs[token] == index if token in theirs else index not in names
        for token, index in mine.items()
    )


def _partners(here: Meanings, there: Meanings) -> dict[int, int]:
    return {
        own: other
        for meaning, ids in here.items()
        for own, other in zip(ids, there.get(meaning, ()), strict=False)
    }


def _add_named(partners: dict[int, int], target: Tokenizer, draft: Tokenizer) -> None:
    """Added tokens of one name, where one tokenizer takes for text what the other does not."""
    there, taken = draft.get_added_vocab(), set(partners.values())
    for name, own in target.get_added_vocab().items():
        other = there.get(name)
        if other is not None and own not in partners and other not in taken:
            partners[own] = other


def _stand_ins(here: Meanings, there: Meanings, partners: Mapping[int, int]) -> dict[int, int]:
    """The draft's ids for the longest ends of tokens without a partner.

    What follows a token depends most on its end.
    """
    ends = {
        own: _longest_end(meaning, there)
        for meaning, ids in here.items()
        for own in ids
        if own not in partners and isinstance(meaning, bytes)
    }
    return {own: end for own, end in ends.items() if end is not None}


def _longest_end(meaning: bytes, there: Meanings) -> int | None:
    ends = (there.get(meaning[start:]) for start in range(len(meaning)))
    return next((ids[0] for ids in ends if ids), None)


def _placeholder(draft: Tokenizer) -> int:
    # The tokens left mark borders in a text, as a chat's markers do. The end-of-text token is a
    # border that the model was trained on; padding or the unknown token often is not.
    return next((int(i) for i in (draft.eos_token_id, draft.unk_token_id) if i is not None), 0)


# --- what a token means -----------------------------------------------------------------


def _meanings(tokenizer: Tokenizer) -> Meanings:
    """The ids of every meaning, the one that is written first, then by number."""
    special = _special(tokenizer)
    names = tokenizer.get_vocab().items()
    ordered = sorted(names, key=lambda one: (bool(BYTE.fullmatch(one[0])), one[1]))
    texts = [one for one in ordered if one[0] not in special]
    spelled = dict(zip(texts, bytes_of(tokenizer, texts), strict=True))
    found: dict[Meaning, list[int]] = defaultdict(list)
    for name, index in ordered:
        found[spelled.get((name, index)) or name].append(index)
    return dict(found)


def _special(tokenizer: Tokenizer) -> set[str]:
    """Names that are no text; of all added tokens where a tokenizer does not say which."""
    added: Mapping[str, int] = tokenizer.get_added_vocab()
    known: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return {name for name, index in added.items() if getattr(known.get(index), "special", True)}
