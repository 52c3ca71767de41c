"""The command line: its commands, and the words for what ends them early."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from mlxspec._version import __version__
from mlxspec.cli import checking, disk, editing
from mlxspec.cli.arguments.calls import CallError, in_words, shows_help
from mlxspec.cli.arguments.help import Command, Group
from mlxspec.cli.bench import compare as bench_compare
from mlxspec.cli.bench import results as bench_results
from mlxspec.cli.bench.command import bench_app
from mlxspec.cli.chat.command import EXAMPLES as TALKING
from mlxspec.cli.chat.command import chat
from mlxspec.cli.evaluating import cascade_app
from mlxspec.cli.generate import EXAMPLES, audit_text, generate
from mlxspec.cli.interrupts import answered, leaving
from mlxspec.cli.pairs import pairs_app
from mlxspec.cli.probe import probe_pair, tune_pair
from mlxspec.cli.screen import streams
from mlxspec.cli.screen.output import Output, explain
from mlxspec.cli.serve import EXAMPLES as SERVING
from mlxspec.cli.serve import serve
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError, UsageError
from mlxspec.host import allow_open_files

app = typer.Typer(
    name="mlxspec",
    cls=Group,
    help="Exact speculative decoding for MLX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, epilog=EXAMPLES)(generate)
app.command(cls=Command, epilog=TALKING)(chat)
app.command(cls=Command, epilog=SERVING)(serve)
app.command("audit", cls=Command)(audit_text)
app.command("probe", cls=Command)(probe_pair)
app.command("tune", cls=Command)(tune_pair)
app.command("doctor", cls=Command)(checking.diagnose)
pairs_app.command("check", cls=Command)(checking.check_pair)
pairs_app.command("suggest", cls=Command)(checking.suggest_drafts)
pairs_app.command("pull", cls=Command)(disk.pull_pair)
pairs_app.command("rm", cls=Command)(disk.remove_models)
pairs_app.command("add", cls=Command)(editing.add_pair)
pairs_app.command("remove", cls=Command)(editing.remove_pair)
pairs_app.command("default", cls=Command)(editing.choose_pair)
bench_app.command("report", cls=Command)(bench_results.write_report_of)
bench_app.command("compare", cls=Command)(bench_compare.compare_results)
bench_app.command("history", cls=Command)(bench_results.show_history)
bench_app.command("apply", cls=Command)(bench_results.apply_results)
app.add_typer(bench_app, name="bench")
app.add_typer(pairs_app, name="pairs")
app.add_typer(cascade_app, name="cascade")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if version:
        Output().line(f"mlxspec {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; every error of our own is one line, a hint, and an exit code."""
    streams.prepare()
    allow_open_files()
    try:
        with answered(), leaving(_show_cursor):
            sys.exit(app(standalone_mode=False))
    except CallError as error:
        if not shows_help(error):
            explain(in_words(error, sys.argv[1:]))
        elif str(error):
            Output().line(str(error))
        sys.exit(UsageError.exit_code)
    except MlxspecError as error:
        explain(error)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except OSError as error:  # typer itself sees to a pipe that nobody reads
        # Keep the interpreter from trying again, and complaining, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        explain(_of_system(error))
        sys.exit(MlxspecError.exit_code)


def _show_cursor() -> None:
    """Undo what a spinner does to a terminal, which is left at the start of a line."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[J\x1b[?25h")


_HINTS = {
    errno.ENOSPC: "Free space there, or choose another place.",
    errno.EDQUOT: "Free space there, or choose another place.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.ELOOP: "Check the link: it leads back to itself.",
    errno.EACCES: "Check who may read and write there.",
    errno.EPERM: "Check who may read and write there.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.EMFILE: "Close other files, or raise the limit: ulimit -n 4096.",
}
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG)


def _of_system(error: OSError) -> MlxspecError:
    """The system's own error as one of ours: the place, the reason, and what helps."""
    reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
    hint = _HINTS.get(error.errno or 0, "Run the command again; if it fails again, report it.")
    if error.filename is not None:
        return MlxspecError(f"{os.fsdecode(error.filename)}: {reason}.", hint=hint)
    place = "The output" if error.errno in _OF_OUTPUT else "The system"
    return MlxspecError(f"{place}: {reason}.", hint=hint)
