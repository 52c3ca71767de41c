"""The one place where a command writes: data to stdout, everything for people to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxspec.cli.screen import streams
from mlxspec.errors import MlxspecError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from mlxspec.cli.screen.display import Display


@dataclass(frozen=True)
class Output:
    """Writes the result of a command.

    Args:
        as_json: stdout gets one JSON object, and nothing else.
        quiet: stderr gets errors alone.
        reasoning: whether stdout shows it beside an answer; None where stdout is a terminal.
    """

    as_json: bool = False
    quiet: bool = False
    reasoning: bool | None = None

    def object(self, value: Mapping[str, Any] | list[Any]) -> None:
        """One JSON object, or list, on a line of stdout, in UTF-8."""
        streams.exactly()
        line = json.dumps(value, ensure_ascii=False)
        # A path may hold bytes that are no UTF-8: only escapes are JSON then.
        self.line(line if streams.is_unicode(line) else json.dumps(value))

    def line(self, text: str) -> None:
        """A line of data on stdout."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def show(self, *renderables: RenderableType, style: str | None = None) -> None:
        """Tables and lines for people who asked for them, on stdout."""
        console = self.console()
        for one in renderables:
            console.print(one, style=style)

    def aside(self, line: str) -> None:
        """A line for people beside a conversation: dim, and wrapped between words."""
        from rich.text import Text

        from mlxspec.cli.screen.terminal import ASIDE, visible

        if sys.stderr.isatty():
            self.show_people(Text(visible(line), ASIDE))
        else:
            self.tell(visible(line))

    def show_people(self, *renderables: RenderableType) -> None:
        """Tables and lines for people, on stderr."""
        from rich.console import Console

        if not self.quiet:
            console = Console(stderr=True, highlight=False, markup=False)
            for one in renderables:
                console.print(one)

    def console(self, *, least: int = 0) -> Console:
        """Rich's console on stdout. Brackets in strings are text.

        Args:
            least: columns that tables of figures need: a narrower terminal breaks their lines,
                because what is cut could not be read.
        """
        from rich.console import Console

        console = Console(highlight=False, markup=False)
        console.width = max(console.width, least)
        return console

    def tell(self, line: str) -> None:
        """A line for people on stderr."""
        if not self.quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def display(self, *, text: bool = True, folds: bool = False) -> Display:
        """The display of a generation, or of a wait.

        Args:
            text: whether the text is what a person waits for. stdout shows it then, but never
                beside a JSON object.
            folds: whether a terminal shows the text as Markdown once it is whole, and its reasoning
                as one line.
        """
        from mlxspec.cli.screen.display import open_display
        from mlxspec.cli.screen.folding import FoldingText
        from mlxspec.cli.screen.terminal import TerminalText

        return open_display(
            stdout=sys.stdout,
            stderr=sys.stderr,
            quiet=self.quiet,
            json=self.as_json or not text,
            measures=not text,
            reasoning=self.reasoning,
            writer=FoldingText if folds else TerminalText,
        )


def explain(error: MlxspecError) -> None:
    """An error and its hint, on stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))
    console.print(Text.assemble(("hint:  ", "dim"), error.hint))
