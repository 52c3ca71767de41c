"""What a person types: with a line editor on a terminal, line by line elsewhere."""

from __future__ import annotations

import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from mlxspec.cli.screen.streams import not_utf8
from mlxspec.metrics import Tell

PROMPT = "> "
FILES = "FILE"  # in place of words that complete a command: names of files do
_BELOW = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})

Words = Callable[[], Iterable[str]]


class Input(Protocol):
    """Where questions and commands come from."""

    def ask(self, begun: str = "") -> str | None:
        """What is entered next, which is not blank; None where there is no more.

        Args:
            begun: a text that is offered for editing, where that is possible.
        """


class Lines:
    """A question or a command on each line of a stream.

    Args:
        prompts: whether a person types them.
    """

    def __init__(self, stream: BinaryIO, *, prompts: bool) -> None:
        self._stream = stream
        self._prompts = prompts

    def ask(self, begun: str = "") -> str | None:
        if begun and self._prompts:
            sys.stderr.write(f"to be typed again: {begun}\n")
        while True:
            if self._prompts:
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            line = self._stream.readline()
            if not line:
                return None
            try:
                text = line.decode("utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise not_utf8("A line of stdin") from error
            if text.strip():
                return text


class Keyboard:
    """A terminal: history over runs, several lines with Alt-Enter, completion of commands.

    Args:
        commands: each with what it does, and the words that may follow it.
        status: the parts of the line below, the most important one first.
        tell: called with what a person should know.
    """

    def __init__(
        self,
        commands: Mapping[str, tuple[str, Words | str]],
        status: Callable[[], str],
        tell: Tell,
    ) -> None:
        self._tell = tell
        self._leaving = False
        session: PromptSession[str] = PromptSession(
            history=_History(_history_file()),
            multiline=True,
            completer=_Commands(commands),
            complete_while_typing=Condition(lambda: session.default_buffer.text[:1] == "/"),
            key_bindings=self._keys(),
            prompt_continuation=" " * len(PROMPT),
            bottom_toolbar=status,
            style=_BELOW,
            enable_suspend=True,
            reserve_space_for_menu=6,
        )
        self._session = session

    def ask(self, begun: str = "") -> str | None:
        while True:
            try:
                text = self._session.prompt(
                    [("class:prompt", PROMPT)], default=begun, handle_sigint=False
                )
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._leaving:
                    return None
                self._leaving, begun = True, ""
                self._tell("Ctrl-C once more leaves")
                continue
            self._leaving = False
            if text.strip():
                return text

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state is not None and buffer.complete_state.current_completion:
                buffer.complete_state = None  # it is typed by now
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def next_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def interrupt(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                self._leaving = False
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys


@contextmanager
def unechoed() -> Iterator[None]:
    """While the block runs, what is typed does not show; it is there for the next question."""
    try:
        file = sys.stdin.fileno()
        before = termios.tcgetattr(file)
    except (OSError, ValueError, termios.error):
        yield
        return
    silent: list[Any] = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(file, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(file, termios.TCSADRAIN, before)


class _Commands(Completer):
    """Completes the names of commands, and what may follow them."""

    def __init__(self, commands: Mapping[str, tuple[str, Words | str]]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            for known, (meaning, _) in self._commands.items():
                if known.startswith(name):
                    yield Completion(f"/{known}", -len(text), display_meta=meaning)
            return
        follows = self._commands.get(name, ("", ""))[1]
        if follows == FILES:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif callable(follows) and " " not in rest:
            yield from _completions(follows(), rest)


def _completions(words: Iterable[str], begun: str) -> Sequence[Completion]:
    return [Completion(word, -len(begun)) for word in words if word.startswith(begun)]


class _History(FileHistory):
    """What was entered, kept for the next run as far as that is possible."""

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):
            file = Path(str(self.filename))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # nobody else's business
            super().store_string(string)


def _history_file() -> Path:
    return user_state_path("mlxspec") / "chat_history"
