"""Asks an upstream, and makes of everything that can go wrong one `Fault`.

Nothing that an upstream says in an error is shown: some of them repeat the key.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Thread
from typing import Any

from mlxspec.cascade.breaker import Breaker
from mlxspec.cascade.upstreams import Upstream
from mlxspec.conversations import Message
from mlxspec.errors import MlxspecError

TRIES = 3
_FIRST_WAIT_S = 0.5  # doubled with every try, less up to a half at random
_GRACE_S = 0.2  # in which the thread itself says why
_NO_KEY = "none"  # the library insists on one


class Fault(Exception):
    """Why an upstream gave no answer, in words that go on after its name.

    Args:
        passes: whether another try may succeed.
        retry_after_s: how long the upstream asks to be left alone.
    """

    def __init__(self, why: str, *, passes: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.why = why
        self.passes = passes
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an upstream is asked.

    Args:
        max_tokens: the most tokens of the answer.
        draft: the beginning of the local answer, for an upstream that takes a prediction.
    """

    messages: Sequence[Message]
    max_tokens: int
    temperature: float = 0.0
    draft: str = ""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An upstream's answer, and the tokens that it counted; None where it does not tell."""

    text: str
    finish_reason: str
    tokens_in: int | None = None
    tokens_out: int | None = None


class Client:
    """Asks one upstream; for any thread.

    Args:
        sleep: waits so many seconds between tries.

    Raises:
        UsageError: the environment has no key for it.
        MlxspecError: the libraries are not installed.
    """

    def __init__(
        self,
        upstream: Upstream,
        breaker: Breaker | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        require_libraries()
        from openai import OpenAI

        self.upstream = upstream
        self.breaker = breaker or Breaker()
        self._sleep = sleep
        key = upstream.key() or _NO_KEY
        self._openai = OpenAI(api_key=key, base_url=upstream.base_url, max_retries=0)
        # Those of the environment are for OpenAI, and not for any other host.
        self._openai.organization = self._openai.project = None

    def begin(self, question: Question) -> Asked:
        """Ask on a thread of its own, beside which the local answer is written."""
        return Asked(self, question)

    def ask(self, question: Question) -> Reply:
        """Ask, again where that may help, and within the upstream's `timeout_s`.

        Raises:
            Fault: there is no answer.
        """
        if rest_s := self.breaker.enter():
            raise Fault(f"failed before and is asked again in {rest_s:.0f} s")
        deadline = time.monotonic() + self.upstream.timeout_s
        for tries in range(1, TRIES + 1):
            try:
                reply = self._once(question, deadline)
            except Fault as fault:
                wait_s = max(_wait_s(tries), fault.retry_after_s)
                in_time = time.monotonic() + wait_s < deadline
                if not (fault.passes and tries < TRIES and in_time):
                    self.breaker.failed(fault.retry_after_s)
                    raise
                self._sleep(wait_s)
            else:
                self.breaker.succeeded()
                return reply
        raise AssertionError("the last try returns or raises")

    def _once(self, question: Question, deadline: float) -> Reply:
        import openai

        try:
            return self._read(question, deadline)
        except openai.APITimeoutError:
            raise self.late() from None
        except openai.APIConnectionError:
            raise Fault("cannot be reached, or broke off its answer", passes=True) from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIError:
            raise Fault("told an error in the middle of its answer", passes=True) from None
        except (ValueError, TypeError, LookupError, AttributeError):
            raise Fault("sent something that is no answer", passes=True) from None

    def _read(self, question: Question, deadline: float) -> Reply:
        """One answer, chunk by chunk, so that one that stops is noticed."""
        text = finish = ""
        read: int | None = None
        written: int | None = None
        left_s = max(deadline - time.monotonic(), 0.001)
        stream = self._openai.chat.completions.create(
            **self._body(question), timeout=left_s, stream=True
        )
        with stream:
            for chunk in stream:
                if time.monotonic() > deadline:
                    raise self.late()
                if chunk.usage is not None:
                    read = _count(chunk.usage.prompt_tokens)
                    written = _count(chunk.usage.completion_tokens)
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
        if not finish:
            raise Fault(
                "broke off its answer" if text else "sent something that is no answer", passes=True
            )
        if finish not in ("stop", "length") or not text.strip():
            raise Fault("gave no text as its answer")
        return Reply(text=text, finish_reason=finish, tokens_in=read, tokens_out=written)

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.upstream.model,
            "messages": list(question.messages),
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "stream_options": {"include_usage": True},
        }
        if self.upstream.prediction and question.draft:
            body["prediction"] = {"type": "content", "content": question.draft}
        return body

    def late(self) -> Fault:
        """The fault of an upstream that takes too long."""
        return Fault(f"did not answer within {self.upstream.timeout_s:g} s")

    def _refused(self, error: Any) -> Fault:
        status = int(error.status_code)
        after_s = _seconds(error.response.headers.get("retry-after"))
        if status in (401, 403):
            key = self.upstream.api_key_env
            what = f"the key in {key}" if key else "a request without a key"
            return Fault(f"refuses {what} ({status})")
        if status == 404:
            return Fault("has nothing at its base_url, or no such model (404)")
        if status == 429:
            asks = f", and asks to wait {after_s:.0f} s" if after_s else ""
            return Fault(
                f"takes no more requests now (429){asks}", passes=True, retry_after_s=after_s
            )
        if status >= 500 or status == 408:
            return Fault(f"failed ({status})", passes=True, retry_after_s=after_s)
        return Fault(f"refuses the request ({status})")


class Asked:
    """A question on its way to an upstream. Its thread keeps no process from ending."""

    def __init__(self, client: Client, question: Question) -> None:
        self._client = client
        self._end_s = time.monotonic() + client.upstream.timeout_s
        self._reply: Reply | None = None
        self._fault: Fault | None = None
        self._thread = Thread(target=self._ask, args=(question,), daemon=True)
        self._thread.start()

    def wait(self) -> Reply:
        """Wait for the answer, also where the upstream keeps the connection alive and says nothing.

        Raises:
            Fault: there is none.
        """
        self._thread.join(max(0.0, self._end_s - time.monotonic()) + _GRACE_S)
        if self._fault is not None:
            raise self._fault
        if self._reply is None:
            self._client.breaker.failed()
            raise self._client.late()
        return self._reply

    def _ask(self, question: Question) -> None:
        try:
            self._reply = self._client.ask(question)
        except Fault as fault:
            self._fault = fault
        except Exception as error:  # a thread has nobody to tell
            self._fault = Fault(f"could not be asked ({type(error).__name__})")


def require_libraries() -> None:
    """Raise MlxspecError where the libraries of the cascade are not installed."""
    try:
        import openai
        import rapidfuzz

        del openai, rapidfuzz
    except ImportError as error:
        raise MlxspecError(
            f"An upstream needs the package {error.name}, which is not installed.",
            hint="Install what it needs: pip install 'mlxspec[cascade]'",
        ) from error


def _wait_s(tries: int) -> float:
    """Seconds before the next try, at random so that many clients do not come back at once."""
    return _FIRST_WAIT_S * 2.0 ** (tries - 1) * random.uniform(0.5, 1)


def _seconds(retry_after: str | None) -> float:
    """A header `Retry-After`, which is a number of seconds or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    with suppress(ValueError):
        return min(float(max(int(retry_after), 0)), 86400.0)
    with suppress(ValueError, TypeError):
        return min(max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0), 86400.0)
    return 0.0


def _count(given: Any) -> int | None:
    return given if type(given) is int and given >= 0 else None
