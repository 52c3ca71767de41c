"""Asks an upstream, and makes of everything that can go wrong one `Fault`.

Nothing that an upstream says in an error is shown: some of them repeat the key.
"""

from __future__ import annotations

import asyncio
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Any

from mlxspec.cascade.breaker import Breaker
from mlxspec.cascade.upstreams import Upstream
from mlxspec.conversations import Message
from mlxspec.decode.request import Request
from mlxspec.errors import MlxspecError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TRIES = 3
_FIRST_WAIT_S = 0.5  # doubled with every try, less up to a half at random
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
        max_tokens: the most tokens of the answer; None leaves that to the upstream.
        stop: the answer ends before the first of these strings.
        draft: the beginning of the local answer, for an upstream that takes a prediction.
    """

    messages: Sequence[Message]
    max_tokens: int | None
    temperature: float = 0.0
    top_p: float = 0.0
    stop: Sequence[str] = ()
    draft: str = ""

    @classmethod
    def of(cls, messages: Sequence[Message], max_tokens: int | None, request: Request) -> Question:
        """The question that a request asks the local model, as far as an upstream knows it."""
        sampling = request.sampling
        return cls(
            messages=messages,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=request.stop,
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An upstream's answer, the tokens that it counted, None where it does not tell, and the
    seconds that it took."""

    text: str
    finish_reason: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float = 0.0

    @property
    def tokens(self) -> int | None:
        """That it read and wrote."""
        if self.tokens_in is None or self.tokens_out is None:
            return None
        return self.tokens_in + self.tokens_out


class Client:
    """Asks one upstream; for any thread. All clients ask on one thread of their own.

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
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        require_libraries()
        from openai import AsyncOpenAI

        self.upstream = upstream
        self.breaker = breaker or Breaker()
        self._sleep = sleep
        key = upstream.key() or _NO_KEY
        self._openai = AsyncOpenAI(api_key=key, base_url=upstream.base_url, max_retries=0)
        # Those of the environment are for OpenAI, and not for any other host.
        self._openai.organization = self._openai.project = None
        weakref.finalize(self, _close, self._openai).atexit = False

    def begin(self, question: Question) -> Future[Reply]:
        """Ask, again where that may help, and within the upstream's `timeout_s`.

        The future's error is a `Fault` where there is no answer. Cancelling it closes the
        connection.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(question), _loop())

    async def _ask(self, question: Question) -> Reply:
        if rest_s := self.breaker.enter():
            raise Fault(f"failed before and is asked again in {rest_s:.0f} s")
        try:
            async with asyncio.timeout(self.upstream.timeout_s) as limit:
                reply = await self._tried(question, limit.when() or 0.0)
        except TimeoutError:
            self.breaker.failed()
            raise self._late() from None
        except Fault as fault:
            self.breaker.failed(fault.retry_after_s)
            raise
        self.breaker.succeeded()
        return reply

    async def _tried(self, question: Question, end_s: float) -> Reply:
        """An answer after as many tries as it takes, none of which begins after `end_s`."""
        for tries in range(1, TRIES):
            try:
                return await self._once(question)
            except Fault as fault:
                wait_s = max(_wait_s(tries), fault.retry_after_s)
                if not fault.passes or asyncio.get_running_loop().time() + wait_s >= end_s:
                    raise
                await self._sleep(wait_s)
        return await self._once(question)

    async def _once(self, question: Question) -> Reply:
        import openai

        try:
            return await self._read(question)
        except openai.APITimeoutError:
            raise self._late() from None
        except openai.APIConnectionError:
            raise Fault("cannot be reached, or broke off its answer", passes=True) from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIError:
            raise Fault("told an error in the middle of its answer", passes=True) from None
        except (ValueError, TypeError, LookupError, AttributeError):
            raise Fault("sent something that is no answer", passes=True) from None
        except (Fault, asyncio.CancelledError):
            raise
        except Exception as error:  # whatever a library raises must not take the local answer
            raise Fault(f"could not be asked ({type(error).__name__})") from None

    async def _read(self, question: Question) -> Reply:
        """One answer, read as a stream, so that one that breaks off can be told from a whole."""
        text = finish = ""
        read: int | None = None
        written: int | None = None
        begun_s = time.perf_counter()
        stream = await self._openai.chat.completions.create(
            **self._body(question), timeout=self.upstream.timeout_s, stream=True
        )
        async with stream:
            async for chunk in stream:
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
        seconds = round(time.perf_counter() - begun_s, 6)
        return Reply(
            text=text, finish_reason=finish, tokens_in=read, tokens_out=written, seconds=seconds
        )

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.upstream.model,
            "messages": list(question.messages),
            "temperature": question.temperature,
            "stream_options": {"include_usage": True},
        }
        if question.max_tokens is not None:
            body["max_tokens"] = question.max_tokens
        if 0 < question.top_p < 1:
            body["top_p"] = question.top_p
        if question.stop:
            body["stop"] = list(question.stop)
        if self.upstream.prediction and question.draft:
            body["prediction"] = {"type": "content", "content": question.draft}
        return body

    def _late(self) -> Fault:
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


def _close(api: AsyncOpenAI) -> None:
    """Close the connections of a client that is gone."""
    asyncio.run_coroutine_threadsafe(api.close(), _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop in which upstreams are asked, on a thread that keeps no process from ending."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="upstreams", daemon=True).start()
    return loop


def turns_of(system: str | None, prompt: str) -> list[Message]:
    """A prompt as turns, behind a system message if there is one."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]


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
