"""The commands of a chat: each changes the talk, or tells something about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from mlxspec.chat import documents
from mlxspec.chat.conversation import Turn
from mlxspec.cli.arguments.options import draft_tokens_of
from mlxspec.cli.chat.clipboard import copy
from mlxspec.cli.chat.keyboard import FILES, Words
from mlxspec.cli.chat.talk import Talk
from mlxspec.cli.screen.display import table_of
from mlxspec.cli.screen.summary import summary
from mlxspec.cli.screen.terminal import ASIDE, visible
from mlxspec.defaults import AUTO, DraftTokens
from mlxspec.errors import UsageError, nearest
from mlxspec.files import expanded
from mlxspec.metrics import counted, speed
from mlxspec.pairs.table import load_pairs
from mlxspec.params import NAMES, WHOLE

OFF = "off"
_NAMED = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
_SHORT = {"temp": "temperature"}
_SETTINGS = ("temp", *NAMES, "seed", "verify", "max_tokens")


class Leave(Exception):
    """The person is done."""


@dataclass(frozen=True)
class Command:
    """A command of a chat.

    Args:
        argument: how it is written in the help; empty where it takes none.
        run: returns a text to offer for editing, if any.
        words: what may follow, for completion.
    """

    argument: str
    meaning: str
    run: Callable[[Talk, str], str | None]
    words: Words | str = ""


def command_in(text: str) -> tuple[str, str] | None:
    """The name and the argument of a command; None where a text is a question."""
    found = _NAMED.fullmatch(text.strip())
    return (found[1], (found[2] or "").strip()) if found else None


def question_in(text: str) -> str:
    """A question as it is meant: one that looks like a command is written with two slashes."""
    return text[1:] if text.startswith("//") else text


def run(talk: Talk, name: str, argument: str) -> str | None:
    """Run a command; return a text to offer for editing, if any.

    Raises:
        MlxspecError: there is no such command, or it fails. Leave: the chat is over.
    """
    command = COMMANDS.get(name)
    if command is None:
        near = nearest(name, COMMANDS)
        hint = f"Did you mean /{near}? " if near else ""
        raise UsageError(
            f"There is no command /{name}.",
            hint=f"{hint}/help shows them all; a question that begins with / is written //.",
        )
    if argument and not command.argument:
        raise UsageError(f"/{name} takes nothing behind it.", hint=f"Write /{name} alone.")
    return command.run(talk, argument)


# --- the conversation -----------------------------------------------------------------------


def _system(talk: Talk, text: str) -> None:
    if text:
        talk.conversation.system = None if text == OFF else text
    said = talk.conversation.system
    talk.out.aside("there is no system message" if said is None else f"system: {visible(said)}")


def _retry(talk: Talk, _: str) -> None:
    turn = _undone(talk, "answer again")
    if not talk.sampling.temperature:
        talk.out.aside("at temperature 0 the answer is the same; /set temp 0.7 varies it")
    if not talk.answer(turn.question):
        talk.conversation.add(turn)
        talk.out.aside("the answer before stays")


def _undo(talk: Talk, _: str) -> None:
    talk.out.aside(f"taken back: {_in_a_line(_undone(talk, 'take back').question)}")


def _edit(talk: Talk, _: str) -> str:
    return _undone(talk, "edit").question


def _undone(talk: Talk, what: str) -> Turn:
    """The last turn, which is taken back; raises UsageError where there is none to do that to."""
    turn = talk.conversation.undo()
    if turn is None:
        raise _nothing(what)
    return turn


def _save(talk: Talk, name: str) -> None:
    path = _path(name, "/save")
    if path.exists() and path != talk.file:
        raise UsageError(f"{path} exists already.", hint="Choose another name, or remove it.")
    if not talk.conversation.turns:
        raise _nothing("save")
    documents.save(talk.conversation, path)
    talk.file = path
    talk.out.aside(f"saved {counted(len(talk.conversation.turns), 'turn')} to {path}")


def _load(talk: Talk, name: str) -> str:
    return talk.load(_path(name, "/load"))


def _copy(talk: Talk, _: str) -> None:
    turn = talk.conversation.last
    if turn is None:
        raise _nothing("copy")
    who = copy(turn.answer, sys.stderr)
    talk.out.aside(f"{len(turn.answer):,} letters went to {who}")


def _thoughts(talk: Talk, _: str) -> None:
    turn = talk.conversation.last
    if turn is None or not turn.reasoning:
        raise UsageError("The last answer has no reasoning.", hint="Ask a model that reasons.")
    talk.out.show_people(Text(visible(turn.reasoning), ASIDE))


# --- the models -----------------------------------------------------------------------------


def _set(talk: Talk, text: str) -> None:
    if not text:
        words = talk.sampling.in_words()
        limit = talk.settings.max_tokens
        talk.out.aside(" · ".join([*words, f"max tokens {limit or 'up to the context'}"]))
        return
    name, _, value = text.replace("=", " ").partition(" ")
    name, value = _SHORT.get(name, name).replace("-", "_"), value.strip()
    if name not in _SETTINGS:
        near = nearest(name, _SETTINGS)
        hint = f"Did you mean {near}?" if near else f"Set one of {', '.join(_SETTINGS)}."
        raise UsageError(f"There is nothing named {name!r} to set.", hint=hint)
    if not value:
        raise UsageError(f"/set {name} has no value.", hint=f"Write /set {name} VALUE, or off.")
    if name == "max_tokens":
        talk.settings.max_tokens = None if value == OFF else _number(name, value, least=1)
    elif value == OFF:
        talk.settings.sampling.pop(name, None)
    else:
        given = {name: value if name == "verify" else _number(name, value)}
        talk.sampling_with(given)
        talk.settings.sampling |= given
    _set(talk, "")


def _number(name: str, text: str, *, least: int | None = None) -> Any:
    whole = name in (*WHOLE, "seed", "max_tokens")
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = None
    if number is None or (least is not None and number < least):
        what = "a whole number" if whole else "a number"
        more = f", {least} or more" if least is not None else ""
        raise UsageError(f"{name} is {text!r}.", hint=f"It must be {what}{more}; or off.")
    return number


def _draft(talk: Talk, text: str) -> None:
    if text:
        talk.settings.draft_tokens = _tokens(text)
    engine = talk.models.engine
    request = engine.request([0], draft_tokens=talk.settings.draft_tokens)
    if not request.draft_tokens:
        asked = talk.settings.draft_tokens
        talk.out.aside("draft off" if asked == 0 else "nothing drafts for this target")
        return
    drafters = ", ".join([*engine.drafts, *engine.heads, *(["history"] if engine.texts else [])])
    count = AUTO if request.auto else f"{request.draft_tokens} tokens a round"
    talk.out.aside(f"draft {count}, by {drafters}")


def _tokens(text: str) -> DraftTokens:
    try:
        return 0 if text == OFF else draft_tokens_of(text)
    except typer.BadParameter as error:
        raise UsageError(f"/draft {error.message}", hint="Write /draft 4, auto or off.") from error


def _pair(talk: Talk, name: str) -> None:
    if name:
        talk.change_pair(name)
    pair = talk.models.pair
    talk.out.aside(f"pair {pair.name}: {pair.target_name}, draft {pair.draft_name or 'none'}")


# --- what is known --------------------------------------------------------------------------


def _stats(talk: Talk, _: str) -> None:
    sums, engine = talk.totals, talk.models.engine
    if not sums.answers:
        raise _nothing("count")
    parts = [f"{sums.answers:,}", f"{sums.tokens:,} tokens"]
    parts += [f"{speed(sums.tokens / sums.decode_s)} tok/s"] if sums.decode_s else []
    rows = [("answers", parts)]
    if sums.drafted:
        share = f"{sums.accepted / sums.drafted:.0%} of {sums.drafted:,} proposals accepted"
        rows.append(("drafted", [share]))
    held = f"{sums.cached_prompt_tokens / sums.prompt_tokens:.0%} of them not read again"
    rows.append(("prompts", [f"{sums.prompt_tokens:,} tokens", held]))
    if engine.prefixes is not None:
        kept = engine.prefixes.stats
        size = f"{kept.nbytes / 1e6:,.1f} of {kept.max_bytes / 1e6:,.0f} MB"
        rows.append(("kept", [size, f"{kept.pasts:,} pasts"]))
    if (filled := talk.filled) is not None:
        of = f"{filled.tokens:,} of {filled.context:,} tokens"
        rows.append(("context", [of, f"{filled.share:.0%}"]))
    talk.out.show_people(table_of(rows))
    if talk.run is not None:
        talk.out.show_people(Text("\nthe last answer", ASIDE))
        talk.out.show_people(table_of(summary(talk.run.generation, None)))


def _audit(talk: Talk, _: str) -> None:
    from mlxspec.measure.audit import Auditing

    run, engine = talk.run, talk.models.engine
    if run is None:
        raise _nothing("audit")
    rule = run.request.sampling.rule
    if rule not in ("greedy", "coupled"):
        raise UsageError(
            f"Text of the {rule} rule cannot be audited token by token.",
            hint="Answer again by another rule: /set verify coupled, then /retry.",
        )
    auditing = Auditing(engine, run)
    with talk.out.display(text=False) as display:
        display.follow(auditing)
    tokenizer = engine.tokenizer
    talk.out.aside(
        auditing.report.described(lambda one: str(tokenizer and tokenizer.decode([one])))
    )


def _help(talk: Talk, _: str) -> None:
    rows = [(f"/{name} {one.argument}".rstrip(), [one.meaning]) for name, one in COMMANDS.items()]
    talk.out.show_people(table_of(rows))
    talk.out.aside("Enter sends, Alt-Enter begins a new line, Ctrl-C ends an answer and keeps it")


def _quit(talk: Talk, _: str) -> None:
    raise Leave


def _nothing(what: str) -> UsageError:
    return UsageError(f"There is nothing to {what} yet.", hint="Ask something first.")


def _path(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command} needs a file.", hint=f"Write {command} talk.md, or talk.json.")
    return expanded(Path(name))


def _in_a_line(text: str) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _pairs() -> Iterable[str]:
    return load_pairs()


COMMANDS = {
    "system": Command("[TEXT|off]", "show or set the system message", _system),
    "set": Command("[NAME VALUE]", "show or set sampling: temp 0.7", _set, lambda: _SETTINGS),
    "draft": Command("[N|auto|off]", "tokens to propose in a round", _draft, lambda: (AUTO, OFF)),
    "pair": Command("[NAME]", "go on with other models", _pair, _pairs),
    "retry": Command("", "answer the last question again", _retry),
    "edit": Command("", "take the last question back, to edit it", _edit),
    "undo": Command("", "take the last question and its answer back", _undo),
    "save": Command("FILE", "keep the chat: .json or .md", _save, FILES),
    "load": Command("FILE", "go on with a chat that was saved", _load, FILES),
    "stats": Command("", "speed, acceptance, and what was read", _stats),
    "audit": Command("", "prove the last answer by plain decoding", _audit),
    "copy": Command("", "copy the last answer", _copy),
    "thoughts": Command("", "show the reasoning of the last answer", _thoughts),
    "help": Command("", "show this", _help),
    "quit": Command("", "leave; Ctrl-D does it too", _quit),
}
