"""A wrong call in words: one line that says what is wrong with it, and a hint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import typer

from mlxspec.errors import UsageError

# Whatever the parser of the command line raises about a call: it is typer's own in new versions,
# and click's in older ones.
CallError: type[Exception] = typer.BadParameter.__mro__[2]

# No option has blanks in it or begins with a digit: this is a prompt.
_PROMPT = re.compile(r"-.*\s|-+\d|---|-+$", re.DOTALL)
# What commands of other programs are called here.
_ELSEWHERE = {"run": "chat", "ps": "doctor"}


def shows_help(error: Exception) -> bool:
    """Whether it is no error: a group of commands was called alone, and its help is the message."""
    return type(error).__name__ == "NoArgsIsHelpError"


def in_words(error: Any, arguments: Sequence[str]) -> UsageError:
    """The parser's error as one of ours.

    Args:
        arguments: of the process.
    """
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else _path(arguments)
    message = " ".join(str(error.format_message()).split()).partition(", unable to")[0].rstrip(".")
    hint = f"`{path} --help` shows what it takes."
    if message.startswith("No such option"):
        return _unknown(error, path, arguments, prompted=_takes_prompt(context))
    if message.startswith("Got unexpected extra argument"):
        message = f"There is no place for another argument: {message.partition(' (')[2][:-1]}"
        if _takes_prompt(context):
            hint = f"Put a prompt of several words in quotes: {path} 'one two'."
        if "--" in arguments:
            hint = "Put options before --, and the prompt alone behind it."
    elif message.startswith("No such command"):
        message, _, near = message.partition(". Did you mean ")
        near = f"Did you mean {near.rstrip('?')}? " if near else ""
        wanted = next((one for one in arguments if one in message), "PROMPT")
        hint = f"{_below(context, path, wanted) or near}`{path} --help` lists them"
        if context is None or context.parent is None:
            wanted = shlex.quote(shorten(wanted, 40, placeholder=" ..."))
            hint += f"; {path} generate {wanted} writes a text"
        hint += "."
    return UsageError(f"{message}.", hint=hint)


def _takes_prompt(context: Any) -> bool:
    """Whether the command that was called takes a prompt."""
    return context is not None and any(one.name == "prompt" for one in context.command.params)


def _below(context: Any, path: str, wanted: str) -> str:
    """A question that names the command where a group has it, as other programs have no group."""
    if wanted in _ELSEWHERE:
        return f"Did you mean `{path} {_ELSEWHERE[wanted]}`? "
    groups = getattr(context.command, "commands", {}) if context is not None else {}
    for name, group in groups.items():
        if wanted in getattr(group, "commands", {}):
            return f"Did you mean `{path} {name} {wanted}`? "
    return ""


def _path(arguments: Sequence[str]) -> str:
    """The command that was called, where the error does not know it."""
    return " ".join(["mlxspec", *(one for one in arguments[:1] if not one.startswith("-"))])


def _unknown(error: Any, path: str, arguments: Sequence[str], *, prompted: bool) -> UsageError:
    """An option that there is not, or a prompt that was taken for one."""
    option = error.option_name
    given = next((one for one in arguments if _holds(one, option)), option)
    if prompted and _PROMPT.match(given):
        text = shorten(given, 40, placeholder=" ...")
        return UsageError(
            f"A text that begins with a dash is read as an option: {text!r}.",
            hint=f"Put -- before the prompt, behind all options: {path} -- {shlex.quote(text)}",
        )
    near = " or ".join(sorted(error.possibilities or ()))
    return UsageError(
        f"There is no option {option}.",
        hint=(f"Did you mean {near}? " if near else "")
        + f"`{path} --help` lists all"
        + ("; -- goes before a prompt that begins with a dash." if prompted else "."),
    )


def _holds(argument: str, option: str) -> bool:
    """Whether the parser takes an argument for this option, perhaps among others of one letter."""
    if argument.partition("=")[0] == option:
        return True
    return argument[:1] == "-" != argument[1:2] and option[1:] in argument[1:]
