"""Chat templates: a conversation as a model's authors write it, or an error that says why not.

A template is code of somebody else's. It may refuse, drop what it is given without a word, or want
it in another form. So what it renders is searched for the texts that went in, and a prompt that
lacks one is never sent. Control tokens that stand in those texts reach the model as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any, NamedTuple

from mlxspec.chats import THE_TOOLS, Chat, Form
from mlxspec.controls import control_tokens, encoded, with_cuts
from mlxspec.conversations import Message, Tool, every_text, mapped, texts_in
from mlxspec.errors import PromptError, UsageError
from mlxspec.metrics import Tell
from mlxspec.tokens import Tokenizer

Arguments = Mapping[str, Any]

# What a template call takes beside a template's own arguments, and what decides here.
_RESERVED = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools"),
    "truncation",
}
# For other uses than an answer, where a folder names its templates.
_TOOL_USE = "tool_use"
_SPECIAL_USES = (_TOOL_USE, "rag")
# Gemma's and Mistral's turns: their authors put a system text at the start of the user's turn.
_FOLDING = ("<start_of_turn>", "[INST]")
# One of these letters, which Unicode keeps out of every text, stands where tokens may not join,
# and another behind a text that is gone on with.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

_RAW = "use no template: --raw, or raw=True."


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    arguments: Arguments,
    tell: Tell,
) -> list[int]:
    """The token ids of a conversation and of what begins an answer.

    A last turn of the assistant is gone on with: the prompt ends with its text, or with its
    reasoning where it has no text.

    Args:
        messages, tools: as `conversations` gives them. arguments: of the template.
        tell: called with what a person should know.

    Raises:
        PromptError: the template refuses, is broken, takes no tools, or leaves out a text.
        UsageError: an argument is not the template's to take.
    """
    template = _Template(tokenizer, arguments, tell, with_tools=bool(tools))
    whole = "\0".join(texts_in([*messages, *tools]))
    cut, end = [one for one in _CUTS if one not in whole][:2]
    names = [name for name in control_tokens(tokenizer, template.source) if name in whole]

    def safe(text: str) -> str:
        return with_cuts(text, names, cut)

    chat = Chat([mapped(message, safe) for message in messages], every_text(list(tools), safe))
    if chat.goes_on:
        chat = replace(chat, messages=[*chat.messages[:-1], _ending(chat.messages[-1], end)])
    rendered = template.rendered(chat)
    if chat.goes_on:
        rendered = _up_to(end, rendered)
    return encoded(tokenizer, rendered.split(cut))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that a template puts behind an answer, None where it puts none."""
    template = _Template(tokenizer, {}, lambda note: None)
    answer = "mlxspec0answer0probe"
    for parts in (False, True):
        turns = [{"role": "user", "content": "mlxspec0"}, {"role": "assistant", "content": answer}]
        form = Form(frozenset({"user", "assistant"} if parts else ()))
        try:
            rendered = template.apply(Chat(turns), form)
        except Exception:  # a template's own code: whether it takes a prompt shows with the prompt
            continue
        _, found, rest = rendered.rpartition(answer)
        added: Mapping[str, int] = tokenizer.get_added_vocab()
        names = [name for name in added if name.strip() and rest.lstrip().startswith(name)]
        if found and names:
            name = max(names, key=len)
            # With channels an answer has several messages, and this ends each of them.
            return None if name == "<|end|>" and "<|channel|>" in added else added[name]
    return None


def source_of(tokenizer: Tokenizer, *, with_tools: bool = False) -> str:
    """A tokenizer's template as it is written; empty where code renders, or where there is none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict) and found:
        found = found[_name_of(found, with_tools=with_tools)]
    return found if isinstance(found, str) else ""


def less_reasoning(template: str) -> str:
    """How to ask a template for less reasoning, as the end of a sentence; empty where none can."""
    for argument in ("enable_thinking=false", "thinking=false", "reasoning_effort=low"):
        if re.search(rf"\b{argument.partition('=')[0]}\b", template):
            return f"; --template-arg {argument} asks for less reasoning"
    return ""


class _Tried(NamedTuple):
    """What a template has rendered, and what it left out of turns that call tools; or why not."""

    text: str = ""
    lost: tuple[str, ...] = ()
    problem: Exception | str | None = None


class _Template:
    """A tokenizer's template with its arguments."""

    def __init__(
        self, tokenizer: Tokenizer, arguments: Arguments, tell: Tell, *, with_tools: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        self._tell = tell
        self.source = source_of(tokenizer, with_tools=with_tools)
        found = getattr(tokenizer, "chat_template", None)
        if isinstance(found, dict) and found:
            name = _name_of(found, with_tools=with_tools)
            self._arguments["chat_template"] = self.source
            if name not in ("default", _TOOL_USE if with_tools else ""):
                tell(f"the model names no default among its chat templates: {name} is used")
        _require_free(arguments)
        for name in arguments:
            if self.source and name not in self.source:
                tell(f"the chat template does not read the argument {name}")

    def apply(self, chat: Chat, form: Form) -> str:
        """Render a conversation, with what opens an answer behind a turn that is none."""
        tools = {"tools": list(chat.tools)} if chat.tools else {}
        return str(
            self._tokenizer.apply_chat_template(
                [form.shaped(message) for message in chat.messages],
                tokenize=False,
                add_generation_prompt=not chat.goes_on,
                **tools,
                **self._arguments,
            )
        )

    def rendered(self, chat: Chat) -> str:
        """The prompt with all texts in it."""
        tried = self._tried(chat)
        if tried.problem is not None:
            folded = self._folded(chat)
            if folded is None:
                raise self._refusal(chat, tried.problem)
            self._tell(
                "the chat template takes no system message: it begins the user's turn, as the "
                "model's authors do it"
            )
            tried = folded
        for lost in tried.lost:
            self._tell(f"the chat template leaves out {lost}")
        return tried.text

    def _folded(self, chat: Chat) -> _Tried | None:
        """The prompt with the system's text in the user's turn; None where nobody does that."""
        folded = chat.folded()
        if folded is None or not any(name in self.source for name in _FOLDING):
            return None
        tried = self._tried(folded)
        return tried if tried.problem is None else None

    def _takes(self, chat: Chat) -> bool:
        return self._tried(chat).problem is None or self._folded(chat) is not None

    def _refusal(self, chat: Chat, problem: Exception | str) -> PromptError:
        """Why nothing can be rendered, by what it takes to render the rest."""
        raw = f", or {_RAW}" if chat.is_single and not chat.tools else "."
        if chat.tools and self._takes(replace(chat, tools=())):
            hint = "Leave the tools out, or use a model whose template takes them."
            if problem == THE_TOOLS or "tools" not in self.source:
                return PromptError("The chat template takes no tools.", hint=hint)
            return _refused(problem, THE_TOOLS, hint)
        rest = chat.messages[1:]
        if chat.has_system and rest and self._takes(replace(chat, messages=rest)):
            hint = f"Write the system message in the prompt{raw}"
            return _refused(problem, "the system message", hint)
        what = "the model's chat template" if chat.is_single else "the messages or the template"
        return _refused(problem, chat.name, f"Correct {what}{raw}")

    def _tried(self, chat: Chat) -> _Tried:
        """The rendered text, or the first form's problem where no form has every text."""
        problems: list[Exception | str] = []
        for lenient in (False, True) if chat.have("tool_calls") else (False,):
            for form in chat.forms():
                try:
                    rendered = self.apply(chat, form)
                except Exception as error:  # a template's own code, which raises what it likes
                    problems.append(error)
                    continue
                probe, shown = self._probe(chat, form, rendered)
                missing = chat.missing_in(rendered, lenient=lenient)
                missing = missing or probe.missing_in(shown, lenient=lenient)
                if form.is_printed(shown):
                    missing = missing or chat.name
                if not missing:
                    return _Tried(rendered, tuple(probe.lost_in(shown)))
                problems.append(missing)
        return _Tried(problem=problems[0])

    def _probe(self, chat: Chat, form: Form, rendered: str) -> tuple[Chat, str]:
        """The same of texts that nothing else contains, and what becomes of it.

        A short system message may stand in the prompt by chance.
        """
        probe = chat.probed()
        try:
            return probe, self.apply(probe, form)
        except Exception:  # it looks at the texts themselves; theirs it took
            return chat, rendered


def _name_of(templates: Mapping[str, str], *, with_tools: bool) -> str:
    if with_tools and _TOOL_USE in templates:
        return _TOOL_USE
    usual = [name for name in templates if name not in _SPECIAL_USES]
    return "default" if "default" in templates else next(iter([*usual, *templates]))


def _require_free(arguments: Arguments) -> None:
    for name in arguments:
        if name in _RESERVED:
            raise UsageError(
                f"A chat template takes no argument {name}: it is set here.",
                hint="Give those that the model's template reads, such as enable_thinking=false.",
            )


def _refused(problem: Exception | str, what: str, hint: str) -> PromptError:
    if isinstance(problem, str):
        return PromptError(f"The chat template leaves out {problem}.", hint=hint)
    words = shorten(" ".join(str(problem).split()), 200, placeholder=" …").rstrip(".")
    said = words or type(problem).__name__
    if type(problem).__name__ == "TemplateSyntaxError":
        return PromptError(f"The chat template has an error in its syntax: {said}.", hint=hint)
    return PromptError(f"The chat template refuses {what}: {said}.", hint=hint)


def _ending(message: Message, end: str) -> Message:
    """An answer to be gone on with, marked where that is."""
    reasons = "reasoning_content" in message and not message["content"]
    name = "reasoning_content" if reasons else "content"
    return message | {name: message[name] + end}


def _up_to(end: str, rendered: str) -> str:
    """The prompt up to where its last turn is gone on with."""
    text, found, rest = rendered.partition(end)
    if found and end not in rest:
        return text
    raise PromptError(
        "The chat template cannot go on with the assistant's last turn.",
        hint="End the messages with a turn of the user, or of a tool.",
    )
