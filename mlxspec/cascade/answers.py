"""Local answers as rules see them, and the answers to a question that a file keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from mlxspec.cascade.client import Question, Reply
from mlxspec.cascade.rules import Draft, entropy
from mlxspec.decode.request import Request
from mlxspec.errors import UsageError
from mlxspec.metrics import Generation
from mlxspec.tokens import Tokenizer

_CUT = "\ufffd"  # what a tokenizer writes for a character whose last bytes are missing
_DIGITS = 6


def drafted(
    generation: Generation, tokenizer: Tokenizer, most: int, limit: int, *, ended: bool
) -> Draft:
    """The first `most` tokens of an answer: no more, because how many a round writes may vary.

    Args:
        limit: how many tokens the whole answer may have. ended: whether it is whole.
    """
    begin = generation.reasoning_tokens
    tokens, logprobs = generation.tokens[begin:], generation.logprobs[begin : begin + most]
    whole = ended and len(tokens) <= most
    return Draft(
        text=generation.text if whole else tokenizer.decode(tokens[:most]).rstrip(_CUT),
        tokens=min(len(tokens), most),
        limit=limit,
        ended=whole and generation.finish_reason == "stop",
        logprobs=[one.logprob for one in logprobs],
        entropies=[entropy(one) for one in logprobs if one.top],
    )


@dataclass(frozen=True, kw_only=True)
class Local:
    """A whole local answer, with all that drafts of any length need.

    Args:
        tokens: of the answer, without its reasoning. limit: how many it might have had.
        temperature, top_p: that it was drawn with.
        decoded: the tokens as text, of which `text` may have less, such as no stop string.
        ends: the characters of `decoded` up to and with each token.
        logprobs, entropies: of each token, and of the choice behind it in nats.
        first_s, whole_s: seconds to the first token and to the last.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    tokens: int
    limit: int
    temperature: float
    top_p: float
    decoded: str
    ends: Sequence[int]
    logprobs: Sequence[float]
    entropies: Sequence[float]
    first_s: float
    whole_s: float

    @classmethod
    def of(cls, generation: Generation, request: Request, tokenizer: Tokenizer) -> Self:
        """The answer to a request that was `judgeable`."""
        begin = generation.reasoning_tokens
        tokens, logprobs = generation.tokens[begin:], generation.logprobs[begin:]
        timing = generation.timing
        return cls(
            text=generation.text,
            finish_reason=generation.finish_reason,
            prompt_tokens=generation.prompt_tokens,
            tokens=len(tokens),
            limit=request.limit - len(request.tokens),
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            decoded=tokenizer.decode(tokens),
            ends=[
                len(tokenizer.decode(tokens[: count + 1]).rstrip(_CUT))
                for count in range(len(tokens))
            ],
            logprobs=[round(one.logprob, _DIGITS) for one in logprobs],
            entropies=[round(entropy(one), _DIGITS) for one in logprobs if one.top],
            first_s=round(timing.time_to_first_token_s, _DIGITS),
            whole_s=round(timing.prefill_s + timing.decode_s, _DIGITS),
        )

    def draft(self, most: int) -> Draft:
        """Its first `most` tokens, as they were judged while it was written."""
        whole = self.tokens <= most
        return Draft(
            text=self.text if whole else self.decoded[: self.ends[most - 1]],
            tokens=min(self.tokens, most),
            limit=self.limit,
            ended=whole and self.finish_reason == "stop",
            logprobs=self.logprobs[:most],
            entropies=self.entropies[:most],
        )

    def draft_s(self, most: int) -> float:
        """Seconds to its first `most` tokens, as if all of them took equally long."""
        share = min(most, self.tokens) / max(self.tokens, 1)
        return self.first_s + share * (self.whole_s - self.first_s)


class Kept:
    """Answers in a file, a line of JSON each, found by what was asked.

    A line that was cut short, as by a full disk, does not count and is taken off.

    Args:
        path: need not exist yet.

    Raises:
        UsageError: it cannot be read or written, or is no file of answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, dict[str, Any]] = {}
        try:
            with path.open("a+b") as file:  # what cannot be kept should not be asked for
                file.seek(0)
                content = file.read()
        except OSError as error:
            raise self._unusable(f"cannot be used: {error.strerror}") from error
        whole, end, cut = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if end else (), 1):
            self._take(line, number)
        if cut and (end or self._begins(cut)):
            os.truncate(path, len(content) - len(cut))
        elif cut:
            raise self._unusable("is no file of answers")

    def local(self, asked: Mapping[str, Any]) -> Local | None:
        """The local answer to a question, if there is one."""
        found = self._found.get(_key("local", asked), {})
        return Local(**found) if set(found) == {one.name for one in fields(Local)} else None

    def reply(self, asked: Mapping[str, Any]) -> Reply | None:
        """An upstream's answer, if there is one."""
        found = self._found.get(_key("upstream", asked), {})
        return Reply(**found) if set(found) == {one.name for one in fields(Reply)} else None

    def add(self, asked: Mapping[str, Any], answer: Local | Reply) -> None:
        """Keep an answer.

        Raises:
            UsageError: the file cannot be written.
        """
        whose = "local" if isinstance(answer, Local) else "upstream"
        line = {"from": whose, "asked": asked, "answer": asdict(answer)}
        try:
            with self.path.open("ab") as file:  # in one piece, so that two processes may write
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise self._unusable(f"cannot be written: {error.strerror}") from error
        self._found[_key(whose, asked)] = line["answer"]  # type: ignore[assignment]

    def _take(self, line: bytes, number: int) -> None:
        try:
            one = json.loads(line)
            self._found[_key(one["from"], one["asked"])] = dict(one["answer"])
        except (ValueError, TypeError, LookupError, RecursionError):
            raise self._unusable(f"is no file of answers: see line {number}") from None

    @staticmethod
    def _begins(line: bytes) -> bool:
        begin = b'{"from": "'
        return line.startswith(begin) or begin.startswith(line)

    def _unusable(self, why: str) -> UsageError:
        return UsageError(
            f"The file of answers {self.path} {why}.", hint="Name another one with --answers FILE."
        )


def asked_of(base_url: str, model: str, question: Question) -> dict[str, Any]:
    """What an upstream's answer depends on, as plain values."""
    asked = asdict(question) | {"messages": [dict(one) for one in question.messages]}
    del asked["draft"]
    return {"base_url": base_url, "model": model, **asked}


def _key(whose: str, asked: Mapping[str, Any]) -> str:
    return whose + json.dumps(asked, sort_keys=True)
