"""Servers of OpenAI's protocol that take turns with the configurations of `mlxspec bench`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from mlxspec.bench.arms import Asked, Clock, Place, Written
from mlxspec.bench.cells import BASELINE, Sample
from mlxspec.bench.clients import Answer, streamed
from mlxspec.bench.results import Peer
from mlxspec.bench.summing import Series, speed_of, speedup_of
from mlxspec.errors import MlxspecError
from mlxspec.pairs.servers import Server, is_here, key_of, known, looked_at, root_of
from mlxspec.text import is_raw
from mlxspec.tokens import Tokenizer

TIMEOUT = httpx.Timeout(120.0, connect=5.0)  # between two parts of an answer
LONGEST_S = 600.0  # of an answer
KNOWN_ONES = "known"
PATIENCE_S = 5.0  # for a list of models
GIVEN_UP = 3  # failures one after the other behind which a server is asked no more
CACHED = 0.5  # of the prompts, from which on a time to the first token is one of cached prompts


Messages = Sequence[Mapping[str, str]]  # of a conversation


class Lost(MlxspecError):
    """A peer gave no answer: one sample is lost, and not the run."""


class ServerArm:
    """A server that writes the same prompts as a stream.

    Args:
        server: as it was found. model: that is asked for. name: of the arm. tokenizer: of our own
            pair, which counts where the server does not. key: that it is asked with, from the
            variable `key_env`.
    """

    beside = True

    def __init__(
        self,
        server: Server,
        model: str,
        tokenizer: Tokenizer,
        *,
        name: str = "",
        key: str | None = None,
        key_env: str = "",
    ) -> None:
        self.server = server
        self.model = model
        self.name = name or server.name
        self._tokenizer = tokenizer
        self._key_env = key_env
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._failures = 0
        self._counted: set[str] = set()
        self._read = self._cached = 0

    def write(self, asked: Asked, place: Place) -> Written:
        """Ask for one text, and read it to its end.

        Raises:
            Lost: there is none, or it broke off.
        """
        return self._written(asked, asked.messages[:1], place)

    def write_beside(self, asked: Asked, place: Place) -> Written:
        """Ask for the texts at the same time; raises Lost where one is lost."""
        return self._written(asked, asked.messages, place)

    def _written(self, asked: Asked, messages: Sequence[Messages], place: Place) -> Written:
        if self.server.state != "running":
            raise Lost(f"{self.server.words}.", hint="Start it, or leave it out.")
        if self._failures >= GIVEN_UP:
            raise Lost(
                f"it is asked no more, after {GIVEN_UP} failures one after the other.",
                hint="See what it logs, and measure again.",
            )
        answers = asyncio.run(self._answers(asked, messages))
        try:
            for answer in answers:
                self._require_whole(answer)
        except Lost:
            self._failures += 1
            raise
        self._failures = 0
        sample = self._sample(answers, asked, messages, place)
        texts = [answer.text for answer in answers]
        return Written(sample=sample, texts=texts, seconds=sample.total_s)

    async def _answers(self, asked: Asked, some: Sequence[Messages]) -> list[Answer]:
        url = self.server.url
        async with httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT,
            headers=self._headers,
            trust_env=not is_here(url),
            verify=url.startswith("https"),  # certificates take a while to load
        ) as client:
            return await asyncio.gather(*(self._answer(client, asked, one) for one in some))

    async def _answer(self, client: httpx.AsyncClient, asked: Asked, messages: Messages) -> Answer:
        try:
            async with asyncio.timeout(LONGEST_S):
                return await streamed(client, self._body(asked, messages), path=self._path)
        except TimeoutError:  # it sends comments, which keep a connection, and no text
            return Answer(fault="did not answer in time")

    def result(
        self, series: Series, errors: Sequence[str], ours: Mapping[str, Sequence[Sample]]
    ) -> Peer:
        samples = series.samples
        counted = "tokenizer" if "tokenizer" in self._counted else "usage"
        found = peer_of(self.name, "", samples, errors, ours)
        if not samples and self.server.state != "running":
            return replace(found, status=self.server.state, url=self.server.url)
        said = [found.words] if found.words else []
        if samples and counted == "tokenizer":
            said.append("it sends no usage, and our tokenizer counts its tokens")
        if self._read and self._cached > CACHED * self._read:
            said.append(f"it had {self._cached / self._read:.0%} of the prompts in its cache")
        return replace(
            found,
            words="; ".join(said),
            url=self.server.url,
            model=self.model,
            counted_by=counted if samples else "",  # type: ignore[arg-type]
        )

    @property
    def _path(self) -> str:
        raw = is_raw(self._tokenizer, False)
        return "/v1/completions" if raw else "/v1/chat/completions"

    def _body(self, asked: Asked, messages: Messages) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": 1,
            "seed": asked.seed,
        }
        if is_raw(self._tokenizer, False):
            return {**body, "prompt": "\n\n".join(one["content"] for one in messages)}
        return {**body, "messages": [dict(one) for one in messages]}

    def _require_whole(self, answer: Answer) -> None:
        status, why, hint = answer.status, answer.fault, "See what it logs."
        if status in (401, 403):
            key = f"the key in {self._key_env}" if self._key_env else "a request without a key"
            why, hint = f"refuses {key} ({status})", "--server-key-env names the key's variable."
        elif status == 404:
            why = f"has nothing at {self._path}, or no model {self.model!r} (404)"
            hint = "--server-model names a model."
        elif status == 429:
            wait = f", and asks to wait {answer.retry_after} s" if answer.retry_after else ""
            why = f"takes no more requests now (429){wait}"
            hint = "Leave it to this measurement alone."
        elif status >= 500:
            why = f"failed ({status})"
        elif status >= 400:
            why = f"refuses the request ({status})"
        elif answer.whole and not answer.parts:
            why = "wrote nothing"
        if why:
            raise Lost(f"it {why}.", hint=hint)

    def _sample(
        self, answers: Sequence[Answer], asked: Asked, messages: Sequence[Messages], place: Place
    ) -> Sample:
        """Its figures: parts of a text are counted by our tokenizer, and the whole by its own."""
        arrived = [
            (at, max(self._count(part), 1)) for answer in answers for at, part in answer.parts
        ]
        clock = Clock(arrived=sorted(arrived))
        tokens = sum(self._tokens(answer) for answer in answers)
        total_s = max(answer.total_s for answer in answers)
        stopped = all(answer.finish_reason == "stop" for answer in answers)
        read = zip(answers, messages, strict=True)
        found = clock.sample(
            place,
            prompt=asked.prompt,
            prompt_tokens=sum(
                answer.prompt_tokens or sum(self._count(one["content"]) for one in given)
                for answer, given in read
            ),
            ended="stop" if stopped else "length",
        )
        (first_s, at_once), (last_s, _) = clock.arrived[0], clock.arrived[-1]
        if len(answers) == 1:
            behind, behind_s = tokens - at_once, last_s - first_s
        else:
            behind, behind_s = tokens, total_s
        speed = behind / behind_s if behind > 0 and behind_s > 0 else None
        return replace(found, tokens=tokens, total_s=total_s, tokens_per_second=speed)

    def _tokens(self, answer: Answer) -> int:
        self._counted.add("usage" if answer.tokens else "tokenizer")
        self._read += answer.prompt_tokens
        self._cached += answer.cached
        return answer.tokens or self._count(answer.text)

    def _count(self, text: str) -> int:
        tokenizer: Any = self._tokenizer
        return len(tokenizer.encode(text, add_special_tokens=False))


def peer_of(
    name: str,
    configuration: str,
    samples: Sequence[Sample],
    errors: Sequence[str],
    ours: Mapping[str, Sequence[Sample]],
) -> Peer:
    """What came of a peer, beside our own samples of the same turns.

    Args:
        configuration: of ours that is as fast as the peer is meant to be; "" is our fastest.
    """
    words = errors[0].rstrip(".") if errors else ""
    if errors and samples:
        words = f"{len(errors)} of {len(samples) + len(errors)} texts are lost: {words}"
    counterpart = configuration if configuration in ours else _fastest(ours)
    if not (samples or errors):
        words = "no turn was over"
    return Peer(
        name=name,
        status="measured" if samples else "failed" if errors else "running",
        words=words,
        configuration=configuration,
        samples=tuple(samples),
        over=speedup_of(samples, ours.get(BASELINE, ())),
        ours_over=speedup_of(ours.get(counterpart, ()), samples),
        ours={name: found for name, own in ours.items() if (found := speedup_of(own, samples))},
    )


def _fastest(ours: Mapping[str, Sequence[Sample]]) -> str:
    return max(ours, key=lambda name: speed_of(ours[name]) or 0.0, default=BASELINE)


def server_arms(
    urls: Sequence[str],
    tokenizer: Tokenizer,
    *,
    target: str,
    model: str | None = None,
    key_env: str | None = None,
) -> list[ServerArm]:
    """An arm for each server, whether it runs or not: one that does not says why.

    Args:
        urls: addresses; KNOWN_ONES stands for all that people run on this machine.
        target: the name of ours, which the model that is asked for may resemble.
        model: that is asked for; None takes one that the server names.
        key_env: the variable of the environment with a key for all of them.

    Raises:
        UsageError: an address is none, or there is no key.
    """
    key = key_of(key_env)
    found: dict[str, Server] = {}
    for url in urls:
        if url == KNOWN_ONES:
            found |= {one.url: one for one in known()}
        else:
            root = root_of(url)
            one = looked_at(root, key=key, patience_s=PATIENCE_S)
            # Who names a model need not be told of the others that it has.
            answers = model is not None and one.state == "failed"
            found[root] = replace(one, state="running") if answers else one
    names = [one.name for one in found.values()]
    return [
        ServerArm(
            one,
            model or model_of(one, target),
            tokenizer,
            name=one.name if names.count(one.name) == 1 else f"{one.name} at {one.url}",
            key=key,
            key_env=key_env or "",
        )
        for one in found.values()
    ]


def model_of(server: Server, target: str) -> str:
    """The model that a server is asked for: one that is named like our target, or its first."""
    short = target.rpartition("/")[2].lower()
    names = ((one, one.rpartition("/")[2].lower()) for one in server.models)
    alike = [one for one, name in names if short and (name in short or short in name)]
    return next(iter([*alike, *server.models]), "default")
