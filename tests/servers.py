"""Servers on loopback for tests, each in a thread of the process, with an engine of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlxspec.decode.batch import Batch
from mlxspec.decode.engine import Engine
from mlxspec.pairs.loading import load
from mlxspec.serve.core.call import Call
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.settings import Settings
from mlxspec.serve.core.store import Store
from mlxspec.serve.core.worker import Worker
from mlxspec.serve.running import Server, listen

WAIT_S = 60.0  # for an answer; a test that waits longer has found something


@dataclass(frozen=True)
class Served:
    """A server that runs. `log` has its lines so far, and `calls` the requests that it logged."""

    url: str
    service: Service
    server: Server
    log: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_S)

    def is_idle(self) -> bool:
        """Whether no text is written and none waits."""
        return self.service.worker.load == (0, 0)


@contextmanager
def served(
    make: Callable[[], Engine] = load,
    *,
    wait: bool = True,
    measures: bool = False,
    folder: Path | None = None,
    drain_s: float = 1.0,
    **choices: object,
) -> Iterator[Served]:
    """A server with these settings, until the block ends.

    Args:
        make: makes its engine, on the worker's thread.
        wait: until it is loaded.
        measures: whether rounds are timed first.
        folder: in which the pasts of prompts outlast it.
    """
    settings = Settings(**{"name": "demo"} | choices)  # type: ignore[arg-type]
    log: list[str] = []
    calls: list[Call] = []
    store = None if folder is None else Store(folder, log.append)
    worker = Worker(make, settings.max_rows, log.append, measures=measures, store=store)
    service = Service(settings, worker, calls.append)
    listening = listen("127.0.0.1", 0)
    begun = threading.Event()
    server = Server(service, listening, drain_s, begun.set)
    thread = threading.Thread(target=server.serve_until_told)
    worker.start()
    thread.start()
    try:
        begun.wait()
        if wait:
            worker.wait()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Served(url, service, server, log, calls)
    finally:
        server.tell_to_end()
        thread.join()
        worker.stop()


def break_a_step(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let one step of a batch fail, after so many that do not."""
    step, steps = Batch.step, count()

    def failing(batch: Batch) -> Any:
        if next(steps) == after:
            raise RuntimeError("planted")
        return step(batch)

    monkeypatch.setattr(Batch, "step", failing)
