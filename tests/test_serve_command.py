"""`mlxspec serve` as a process: what it shows, whom it lets in, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx
import pytest
from cli_tools import TerminalRun, assert_one_error, command, environment, wait_for
from conftest import Ended

PROMPT = "def fibonacci(n):"
ENDLESS = {"prompt": PROMPT, "max_tokens": 900, "temperature": 1, "logit_bias": {"0": -100}}


class Process:
    """A server in a process of its own; `lines` are the objects on its stderr so far.

    `words` are the other lines there.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.words: list[str] = []
        self._ready = threading.Event()
        self._reading = threading.Thread(target=self._read, args=(process.stderr,))
        self._reading.start()

    def url(self) -> str:
        assert self._ready.wait(60)
        found: str = next(one["url"] for one in self.lines if one["event"] == "ready")
        return found

    def ended(self) -> int:
        code = self.process.wait(30)
        self._reading.join()
        return code

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == "ready":
                    self._ready.set()
            else:
                self.words.append(line.rstrip())
        self._ready.set()


@contextmanager
def serving(*options: str, **variables: str) -> Iterator[Process]:
    call = command("serve", "--port", "0", "--no-compile", "--no-speculation", *options)
    environ = environment(**variables)
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environ) as process:
        one = Process(process)
        try:
            yield one
        finally:
            process.kill()
            one.ended()


def test_a_server_tells_its_address_and_lets_texts_end_when_it_is_told_to() -> None:
    with serving("--api-key-env", "THE_KEY", THE_KEY="s3cret") as server:
        url, headers = server.url(), {"Authorization": "Bearer s3cret"}
        assert httpx.post(f"{url}/v1/completions", json=ENDLESS).status_code == 401
        body = ENDLESS | {"max_tokens": 80, "stream": True}
        post = httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        with post as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
            assert rest[-2] == "data: [DONE]"
        assert server.ended() == 0
    assert "s3cret" not in json.dumps(server.lines)


@pytest.mark.parametrize(("drain_s", "signals"), [("600", 2), ("1", 1)])
def test_a_second_signal_or_the_end_of_waiting_breaks_texts_off(drain_s: str, signals: int) -> None:
    with serving("--drain-s", drain_s) as server:
        url = server.url()
        body = ENDLESS | {"stream": True, "n": 8}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for _ in range(signals):
                server.process.send_signal(signal.SIGINT)
                wait_for(lambda: not listens(url))
            with pytest.raises(httpx.HTTPError):
                deque(lines, maxlen=0)
        assert server.ended() == 0
        assert server.lines[-1]["finish_reasons"] == ["interrupted"] * 8
        assert server.words == []  # no traceback


def test_a_second_signal_to_an_idle_server_ends_it_without_a_word() -> None:
    with serving() as server:
        server.url()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 0
        assert server.words == []
        assert server.lines[0]["event"] == "log"
        assert server.lines[0]["message"] == "loading demo"


def listens(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.ConnectError:
        return False
    return True


def test_a_server_shows_how_to_use_it_on_a_terminal() -> None:
    with TerminalRun("serve", "--port", "0", "--no-compile", "--no-speculation") as run:
        run.read_until(lambda seen: b"waiting" in seen)
        url = re.search(r"http://127\.0\.0\.1:\d+", run.text)
        assert url is not None
        assert httpx.get(f"{url.group()}/ready").json()["ready"]
        assert "serves demo" in run.text
        assert f"curl {url.group()}/v1/completions --json" in run.text
        run.interrupt()
        assert run.end() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--no-key"),
        (["--api-key-env", "NOT_THERE"], "NOT_THERE"),
        (["--host", "203.0.113.7", "--no-key"], "203.0.113.7"),
        (["--pair", "demoo"], "demo"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    invoke: Callable[..., Ended], options: list[str], words: str
) -> None:
    ended = invoke("serve", "--port", "0", *options)
    assert_one_error(ended, 2, words)


def test_a_model_that_cannot_be_loaded_ends_the_server(invoke: Callable[..., Ended]) -> None:
    ended = invoke("serve", "--port", "0", "--target", "/nowhere/at/all")
    assert_one_error(ended, 1)


def test_without_its_libraries_one_line_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['uvicorn'] = None; from mlxspec.__main__ import main; main()"
    call = [sys.executable, "-c", hidden, "serve"]
    ended = subprocess.run(call, capture_output=True, text=True, env=environment(), check=False)
    assert_one_error(ended, 1, "mlxspec[serve]")
