"""What `mlxspec serve` shows: a panel and a live line on a terminal, lines of JSON elsewhere."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlxspec.cli.screen.display import Display, open_display
from mlxspec.cli.screen.terminal import ASIDE, visible
from mlxspec.metrics import Tell, speed

if TYPE_CHECKING:
    from mlxspec.decode.engine import Engine
    from mlxspec.serve.core.call import Call
    from mlxspec.serve.core.service import Service
    from mlxspec.serve.core.settings import Settings
    from mlxspec.serve.core.worker import Worker

EVERY_S = 0.5


class Board:
    """Lines of JSON on stderr: that the server listens, and whatever it logs.

    Args:
        settings: of the server. url: its address. key: how a client names the key, or None.
    """

    def __init__(self, settings: Settings, url: str, key: str | None) -> None:
        self._settings = settings
        self._url = url
        self._key = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def loading(self) -> Display:
        """The display of what is done before the server is ready."""
        return _display(_Lines(self.log))

    def ready(self, worker: Worker) -> None:
        """The models are loaded."""
        self.write(event="ready", url=self._url, **self._settings.about)

    def called(self, call: Call) -> None:
        """A request is over."""
        self.write(event="request", **call.as_dict())

    def follow(self, service: Service) -> None:
        """Show what a service does from now on, where that is live."""

    def log(self, line: str) -> None:
        """A line of the log: any thread may write one."""
        self.write(event="log", message=line)

    def end(self) -> None:
        """Take away what is live."""

    def write(self, **values: Any) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        sys.stderr.write(json.dumps({"time": time, **values}) + "\n")
        sys.stderr.flush()


class _Lines(io.StringIO):
    """A stream of which each whole line is told."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)


class LiveBoard(Board):
    """A panel that says how to use the server, and a line that says what it does."""

    def __init__(self, settings: Settings, url: str, key: str | None, console: Console) -> None:
        super().__init__(settings, url, key)
        self._console = console
        self._service: Service | None = None
        self._live = Live(
            console=console, auto_refresh=False, transient=True, get_renderable=self._line
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def loading(self) -> Display:
        return _display(sys.stderr)

    def ready(self, worker: Worker) -> None:
        engine = worker.wait()
        self._console.print(self._panel(worker, engine))
        # Not in the panel, whose frame would come along when it is copied.
        self._console.print(Text(self._example(engine)), soft_wrap=True)
        self._live.start()
        self._thread.start()

    def called(self, call: Call) -> None:
        self._console.print(Text(visible(call.in_words()), ASIDE), soft_wrap=True)

    def follow(self, service: Service) -> None:
        self._service = service

    def log(self, line: str) -> None:
        self._console.print(Text(visible(line), ASIDE), soft_wrap=True)

    def end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._live.stop()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self._live.refresh()

    def _line(self) -> Text:
        if self._service is None:
            return Text()
        live = self._service.watch.live()
        parts = [f"{live.running} running", f"{live.waiting} waiting"]
        if live.tokens_per_second:
            parts.append(f"{speed(live.tokens_per_second)} tok/s")
        if live.acceptance_rate is not None:
            parts.append(f"acceptance {live.acceptance_rate:.0%}")
        if live.cache is not None and live.cache.nbytes:
            parts.append(f"cache {live.cache.nbytes / live.cache.max_bytes:.0%}")
        if self._service.draining:
            parts.insert(0, "ending once these are written; Ctrl-C again ends at once")
        return Text(" · ".join(parts), ASIDE, no_wrap=True, overflow="ellipsis")

    def _panel(self, worker: Worker, engine: Engine) -> Panel:
        settings, about = self._settings, self._settings.about
        drafts = about.get("draft") if engine.drafts or engine.heads else None
        rows = {
            "address": self._url,
            "model": about.get("target"),
            "draft": drafts or ("what the text repeats" if engine.texts else "none"),
            "rows": f"{settings.max_rows} at a time, {settings.max_queue} may wait",
            "key": self._key or "none",
        }
        if worker.measured is not None:
            rows["plain"] = (
                f"{speed(1 / worker.measured.plain_s)} tok/s without proposals, just timed"
            )
        grid = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            grid.add_row(Text(name, ASIDE), Text(visible(str(value)), overflow="fold"))
        return Panel(grid, title=f"mlxspec serves {settings.name}", title_align="left")

    def _example(self, engine: Engine) -> str:
        """A line for a shell that works as it stands."""
        chats = engine.tokenizer is not None and engine.tokenizer.has_chat_template
        path = "/v1/chat/completions" if chats else "/v1/completions"
        body: dict[str, Any] = {"prompt": "def fibonacci(n):", "max_tokens": 64}
        if chats:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
        key = f' -H "Authorization: Bearer {self._key}"' if self._key else ""
        return f"curl {self._url}{path}{key} --json '{json.dumps(body)}'"


def _display(stderr: TextIO) -> Display:
    return open_display(stdout=sys.stdout, stderr=stderr, quiet=False, json=True, measures=True)


def open_board(settings: Settings, listening: socket.socket, key_variable: str | None) -> Board:
    """The board for this process's stderr."""
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = f"${key_variable}" if key_variable else None
    if not sys.stderr.isatty():
        return Board(settings, url, key)
    return LiveBoard(settings, url, key, Console(stderr=True, highlight=False, markup=False))
