"""What the tests of the command line share: small model folders, processes, a terminal, a hub."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import mlx.core as mx
import pytest
from conftest import build
from huggingface_hub import close_session, constants
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyzĠ"  # Ġ is a space
PATIENCE_S = 120
STATE = tempfile.TemporaryDirectory(prefix="mlxspec-state-")  # in place of a person's own


# --- model folders ----------------------------------------------------------------------


def letters_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """A token for each of `letters`, which name bytes: all its text is printable."""
    vocabulary = {letter: token for token, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_model(
    folder: Path,
    *,
    name: str = "llama",
    seed: int = 1,
    letters: str = LETTERS,
    template: str | None = None,
    **changes: Any,
) -> Path:
    """Write a tiny random model without an end of text as a complete folder."""
    tokenizer = letters_tokenizer(letters)
    tokenizer.chat_template = template
    values = {"vocabulary": len(tokenizer), "seed": seed, **changes}
    model = build(name, **values)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {key: value for key, value in asdict(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- processes --------------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    """The surroundings without what a person may have set up for themselves."""
    mine = ("HF_", "NO_COLOR", "FORCE_COLOR", "XDG_CONFIG_HOME", "COLUMNS", "LINES", "TTY_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": STATE.name}
    return {**kept, **own, "TERM": "xterm-256color", **changes}


def command(*arguments: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "mlxspec", *arguments]


def mlxspec(
    *arguments: str | bytes, stdin: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command with pipes; without `stdin` it gets /dev/null."""
    return subprocess.run(
        command(*arguments),
        env=env or environment(),
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
    )


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command with pipes for its output, ended with the block."""
    process = subprocess.Popen(
        command(*arguments),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def is_one_error(stderr: bytes | str) -> bool:
    """Whether it is one line of error, one of hint, and nothing else."""
    text = stderr.decode() if isinstance(stderr, bytes) else stderr
    lines = text.splitlines()
    return len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint:  ")


def assert_one_error(run: Any, code: int, *words: str) -> None:
    """A command wrote nothing but an error with these words and a hint, and ended with `code`.

    Args:
        run: an `Ended`, or a process that is over.
    """
    ended = (run.code, run.out, run.err) if hasattr(run, "code") else None
    found, out, err = ended or (run.returncode, run.stdout, run.stderr)
    said = err.decode() if isinstance(err, bytes) else err
    assert (found, out or "") == (code, ""), said
    assert is_one_error(said), said
    for word in words:
        assert word in said, said


class TerminalRun:
    """The command with its stdin, stdout and stderr on a pseudo-terminal.

    Args:
        stdout, stderr: files that take the terminal's place.
        call: in place of the command. columns, lines: the terminal's size.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        stdout: IO[bytes] | None = None,
        stderr: IO[bytes] | None = None,
        call: list[str] | None = None,
        columns: int = 80,
        lines: int = 24,
    ) -> None:
        self.output = b""
        self._master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            call or command(*arguments),
            env=env or environment(),
            stdin=terminal,
            stdout=stdout or terminal,
            stderr=stderr or terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def __enter__(self) -> TerminalRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def read_until(self, seen: Callable[[bytes], bool]) -> None:
        """Read until `seen` holds of the output, which is an error at its end."""
        while not seen(self.output):
            assert self._read(), f"ended before that: {self.output!r}"

    def write(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Read to the end and return the exit code."""
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    @property
    def text(self) -> str:
        return self.output.decode().replace("\r\n", "\n")

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], PATIENCE_S)
        assert ready, f"nothing more for {PATIENCE_S} s: {self.output!r}"
        chunk = b""
        with suppress(OSError):  # what Linux gives in place of an end of file
            chunk = os.read(self._master, 65536)
        self.output += chunk
        return bool(chunk)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# --- a hub ------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What huggingface-hub asks of a server, on loopback.

    `models` are folders by repository, or by repository@revision for all but the main branch;
    `refused` gives a status and an error code to a repository, or (0, "") to close its connections
    unanswered. `cuts` says after how many bytes of a body the connection is lost, one for each
    request of a file of weights, and `busy` how many of these are answered with 429 before. `lies`
    has other bytes for a file than its checksum says. `asked` are the ranges that were asked for.
    """

    models: dict[str, Path]
    refused: dict[str, tuple[int, str]]
    endpoint: str = ""
    cuts: list[int] = field(default_factory=list)
    busy: int = 0
    lies: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    slow_s: float = 0.0

    def at(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a branch or a commit; None where there is none."""
        for name, folder in self.models.items():
            known, _, branch = name.partition("@")
            commit = hashlib.sha1(branch.encode()).hexdigest() if branch else COMMIT
            if known == repository and revision in (branch or "main", commit):
                return commit, folder
        return None

    def error(self, repository: str, revision: str) -> tuple[int, str] | None:
        """The status and the code of a refusal, or None."""
        if repository in self.refused:
            return self.refused[repository]
        if all(name.partition("@")[0] != repository for name in self.models):
            return 404, "RepoNotFound"
        return None if self.at(repository, revision) else (404, "RevisionNotFound")


def large(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}


def listing(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            **({"lfs": large(path)} if path.suffix == ".safetensors" else {}),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            organisation, name, *rest = path.split("/")
            repository, revision = f"{organisation}/{name}", unquote(rest[1]) if rest else "main"
            if refusal := hub.error(repository, revision):
                status, code = refusal
                if not status:
                    self.close_connection = True
                    return
                self.answer(status, b"{}", {"X-Error-Code": code})
                return
            found = hub.at(repository, revision)
            assert found is not None
            commit, folder = found
            if not rest or rest[0] == "revision":
                about = {"id": repository, "sha": commit, "siblings": []}
                self.answer(200, json.dumps(about).encode())
            elif rest[0] == "tree":
                self.answer(200, json.dumps(listing(folder)).encode())
            else:  # resolve, commit, file
                path = Path(folder, *rest[2:])
                content = path.read_bytes()
                is_large = path.suffix == ".safetensors"
                etag = (hashlib.sha256 if is_large else hashlib.sha1)(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
                if is_large and self.command == "GET":
                    self.give(hub.lies.get(path.name, content), headers)
                else:
                    self.answer(200, content, headers)

        do_HEAD = do_GET

        def give(self, content: bytes, headers: dict[str, str]) -> None:
            """Weights: all of them or a range, perhaps not yet, and perhaps not to the end."""
            given = self.headers.get("Range", "")
            hub.asked.append(given)
            if hub.busy:
                hub.busy -= 1
                self.answer(429, b"", {"Retry-After": "0"})
                return
            start = int(given.removeprefix("bytes=").rstrip("-") or 0)
            rest = content[start:]
            status = 206 if given else 200
            ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self.send_response(status)
            for key, value in {**headers, **(ranged if given else {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            sent = rest[: hub.cuts.pop(0)] if hub.cuts else rest
            for at in range(0, len(sent), 65536):
                self.wfile.write(sent[at : at + 65536])
                self.wfile.flush()
                time.sleep(hub.slow_s)
            self.close_connection = len(sent) < len(rest)

        def answer(
            self, status: int, content: bytes, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def as_the_hub(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """While the block runs, this process asks `hub`, and keeps what it gets in `cache`."""
    with serving(hub):
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub
        close_session()
