"""`mlxspec chat`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.options import (
    ModelOptions,
    OutputOptions,
    ReasoningOptions,
    TemplateArgOption,
    template_args,
)
from mlxspec.cli.arguments.sampling import SamplingOptions
from mlxspec.cli.interrupts import handed_to
from mlxspec.cli.screen import streams
from mlxspec.cli.screen.output import Output
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError
from mlxspec.files import expanded

if TYPE_CHECKING:
    from mlxspec.cli.chat.keyboard import Input
    from mlxspec.cli.chat.talk import Talk

_chat = partial(typer.Option, rich_help_panel="Chat")

EXAMPLES = """
Examples:
  mlxspec chat --pair qwen3-8b
  mlxspec chat --target ./model --draft history --system 'Answer briefly.'
  printf '%s\\n' 'What is 2+2?' 'And twice that?' | mlxspec chat --pair qwen3-8b
"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a chat begins, and how much of it is kept."""

    system: Annotated[str | None, _chat(help="A system message.")] = None
    load: Annotated[
        Path | None,
        _chat("--load", metavar="FILE", help="Go on with a chat that was saved: .json or .md."),
    ] = None
    max_tokens: Annotated[
        int | None,
        _chat(min=1, help="Tokens of an answer at most; by default the end of the context."),
    ] = None
    template_arg: TemplateArgOption = None
    cache_gb: Annotated[
        float,
        _chat(
            min=0,
            help="Memory for what was read of the conversation, in GB, so that a turn reads only "
            "what is new. 0 keeps nothing.",
        ),
    ] = 1.0


@grouped
def chat(
    *,
    models: ModelOptions,
    chat: ChatOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    shown: ReasoningOptions,
) -> None:
    """Talk with a pair. A pipe brings a question on each line."""
    from mlxspec.chat.conversation import Conversation
    from mlxspec.cli.chat.talk import Interrupts, Models, Settings, Talk

    out = Output(output.as_json, output.quiet, shown.reasoning)
    loaded = Models(models, out, int(chat.cache_gb * 1e9))
    system = None if chat.system is None else streams.as_text(chat.system, "The system message")
    interrupts = Interrupts()
    talk = Talk(
        loaded,
        Conversation(system),
        Settings(chat.max_tokens, models.draft_tokens),
        sampling,
        template_args(chat.template_arg),
        out,
        interrupts,
    )
    sampling.params(loaded.pair.sampling)  # what is wrong with them is said before the models load
    begun = "" if chat.load is None else talk.load(expanded(chat.load))
    if system is not None:
        talk.conversation.system = system
    streams.exactly()
    loaded.load()
    with handed_to(interrupts):
        try:
            code = _talk(talk, begun)
        finally:
            loaded.remember()
    if code:
        raise typer.Exit(code)


def _talk(talk: Talk, begun: str) -> int:
    """Answer until there is no more to answer; the exit code."""
    from mlxspec.cli.chat import commands as chat_commands

    is_person = sys.stdin.isatty()
    source = _input(talk)
    if is_person:
        _greet(talk)
    elif begun:  # a file ended with it, and nobody is there to edit it
        talk.answer(begun)
    while True:
        if is_person:
            talk.out.tell("")
        try:
            text = source.ask(begun)
            begun = ""
            if text is None:
                break
            command = chat_commands.command_in(text)
            if command is not None:
                begun = chat_commands.run(talk, *command) or ""
            elif not talk.answer(question := chat_commands.question_in(text)):
                begun = question
            if talk.interrupted and not is_person:
                return INTERRUPTED
        except chat_commands.Leave:
            break
        except MlxspecError as error:
            talk.complain(error)
        except KeyboardInterrupt:
            if not is_person:
                raise
            talk.out.aside("interrupted")
    return MlxspecError.exit_code if talk.failed and not is_person else 0


def _input(talk: Talk) -> Input:
    from mlxspec.cli.chat import commands as chat_commands
    from mlxspec.cli.chat.keyboard import Keyboard, Lines

    is_person = sys.stdin.isatty()
    if not (is_person and sys.stdout.isatty() and streams.is_capable()):
        return Lines(sys.stdin.buffer, prompts=is_person)
    commands = {name: (one.meaning, one.words) for name, one in chat_commands.COMMANDS.items()}
    return Keyboard(commands, talk.status, talk.out.aside)


def _greet(talk: Talk) -> None:
    talk.introduce()
    talk.out.aside(f"chat with {talk.models.name} · /help shows the commands · Ctrl-D leaves")
