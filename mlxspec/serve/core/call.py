"""One HTTP request, from its first byte to the last of its answer, and what is logged of it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request as Http
from starlette.types import Scope

from mlxspec.cascade.decision import Decision
from mlxspec.decode.batch import Row
from mlxspec.decode.request import Request

KEY = "mlxspec.call"  # of a scope
UNKNOWN = "unknown"  # no route
LONGEST_PATH = 200  # characters of a path that are kept: a client may send any


class Asked(Protocol):
    """A text that was asked for, and its row once it has one."""

    request: Request
    row: Row | None


@dataclass(eq=False)
class Call:
    """A request and its answer. No key is in what is told of it.

    name: tells it from others; the header `x-request-id` of its answer. path: without its query.
    route: the path that the application knows, once one was found.
    status: of the answer; 0 before that begins. texts: those that were asked for.
    decision: who answered, where an upstream might have.
    decode: makes text of token ids, where prompts and what was written are to be told too.
    """

    method: str = ""
    path: str = ""
    name: str = field(default_factory=lambda: f"req_{secrets.token_hex(8)}")
    route: str = UNKNOWN
    status: int = 0
    seconds: float = 0.0
    texts: list[Asked] = field(default_factory=list)
    decision: Decision | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    begun_s: float = field(default_factory=time.perf_counter)

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.begun_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a line of the log; those of texts only where texts were asked for."""
        values: dict[str, Any] = {
            "request": self.name,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.texts:
            drafted, accepted = self._speculated()
            values |= {
                "prompt_tokens": self.prompt_tokens,
                "written_tokens": self.written_tokens,
                "acceptance_rate": round(accepted / drafted, 4) if drafted else None,
                "finish_reasons": self._finish_reasons(),
            }
        if self.decision is not None:
            values["routing"] = self.decision.as_counted()
        if told := self._told():
            values |= {
                "prompts": [prompt for prompt, _ in told],
                "texts": [text for _, text in told],
            }
        return values

    def in_words(self) -> str:
        """A line for people."""
        parts = [f"{self.method} {self.path} {self.status}"]
        if self.texts:
            parts.append(f"{self.prompt_tokens:,} tokens read, {self.written_tokens:,} written")
        parts.append(f"{self.seconds:.2f} s")
        drafted, accepted = self._speculated()
        if drafted:
            parts.append(f"{accepted / drafted:.0%} accepted")
        parts += sorted({"client gone" for one in self._finish_reasons() if one == "interrupted"})
        if self.decision is not None:
            whose = "its answer" if self.decision.author == "upstream" else "the local answer"
            asked = "asked" if self.decision.spilled_over else "not asked"
            parts.append(f"{self.decision.upstream} {asked}, {whose}")
        for read, written in self._told():
            parts += [json.dumps(read, ensure_ascii=False), json.dumps(written, ensure_ascii=False)]
        return " · ".join(parts)

    @property
    def prompt_tokens(self) -> int:
        """Of all texts together; the choices of one prompt are read one by one."""
        return sum(len(one.request.tokens) for one in self.texts)

    @property
    def written_tokens(self) -> int:
        return sum(len(one.row.generation.tokens) for one in self.texts if one.row is not None)

    def _told(self) -> list[tuple[str, str]]:
        """The prompt of each text as the model read it, and what it wrote, marks and all."""
        if self.decode is None:
            return []
        rows = [(one.request.tokens, one.row) for one in self.texts]
        written = [(read, row.generation.tokens if row is not None else ()) for read, row in rows]
        return [(self.decode(read), self.decode(tokens)) for read, tokens in written]

    def _speculated(self) -> tuple[int, int]:
        """The tokens that were proposed, and those of them that were kept."""
        counts = [one.row.generation.speculation for one in self.texts if one.row is not None]
        return sum(one.drafted for one in counts), sum(one.accepted for one in counts)

    def _finish_reasons(self) -> list[str]:
        rows = [one.row for one in self.texts]
        return ["interrupted" if row is None else row.generation.finish_reason for row in rows]


def call_in(scope: Scope) -> Call:
    """The call of a scope; a new one where it has none yet."""
    call = scope.get(KEY)
    if not isinstance(call, Call):
        call = scope[KEY] = Call(scope["method"], scope["path"][:LONGEST_PATH])
    return call


def call_of(http: Http) -> Call:
    """The call that a request belongs to."""
    return call_in(http.scope)
