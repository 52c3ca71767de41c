"""Chat templates: one user's turn as a model's authors write it, or an error that says why not.

A template is code of somebody else's. It may refuse, drop what it is given without a word, or want
it in another form. So what it renders is searched for the texts that went in, and a prompt that
lacks one is never sent. Control tokens that stand in those texts reach the model as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from textwrap import shorten
from typing import Any

from mlxspec.errors import PromptError, UsageError
from mlxspec.metrics import Tell
from mlxspec.tokens import Tokenizer

Arguments = Mapping[str, Any]

# What a template call takes beside a template's own arguments, and what decides here.
_RESERVED = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation"),
}
# For other uses than an answer, where a folder names its templates.
_SPECIAL_USES = ("tool_use", "rag")
# Gemma's and Mistral's turns: their authors put a system text at the start of the user's turn.
_FOLDING = ("<start_of_turn>", "[INST]")
_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
# Texts that no template has of its own, to see where it puts them.
_PROBES = ("mlxspec0system0probe", "mlxspec0user0probe")
# One of these letters, which Unicode keeps out of every text, stands where tokens may not join.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Before a text that continues another, for tokenizers that put a space before every text.
_BEFORE = ("\n", "a", "0", ".")

_RAW = "use no template: --raw, or raw=True."


@dataclass(frozen=True)
class _Turns:
    """A system's and a user's text, each as a string or as a list of one part."""

    system: str | None
    user: str
    system_parts: bool = False
    user_parts: bool = False

    def messages(self) -> list[dict[str, Any]]:
        turns = [("user", self.user, self.user_parts)]
        if self.system is not None:
            turns.insert(0, ("system", self.system, self.system_parts))
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text, parts in turns
        ]

    def forms(self) -> Iterator[_Turns]:
        """As strings, which most templates take, and then with lists of parts."""
        yield self
        yield replace(self, system_parts=True, user_parts=True)
        if self.system is not None:
            yield replace(self, system_parts=True)
            yield replace(self, user_parts=True)

    def folded(self) -> _Turns:
        """The system's text at the start of the user's."""
        return _Turns(None, f"{self.system}\n\n{self.user}")

    def missing_in(self, rendered: str) -> str:
        """Which of the texts is not in it; empty where both are."""
        if not _is_in(self.user, rendered):
            return "the prompt"
        return "" if _is_in(self.system or "", rendered) else "the system message"


def encode_chat(
    tokenizer: Tokenizer, text: str, system: str | None, arguments: Arguments, tell: Tell
) -> list[int]:
    """The token ids of one user's turn and of what begins an answer.

    Args:
        arguments: of the template. tell: called with what a person should know.

    Raises:
        PromptError: the template refuses, is broken, or leaves out a text.
        UsageError: an argument is not the template's to take.
    """
    template = _Template(tokenizer, arguments, tell)
    cut = next(one for one in _CUTS if one not in f"{text}{system}")
    controls = control_tokens(tokenizer, template.source)
    marked = [None if one is None else _with_cuts(one, controls, cut) for one in (system, text)]
    rendered = template.rendered(_Turns(marked[0], marked[1] or ""))
    return _encoded(tokenizer, rendered.split(cut))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that a template puts behind an answer, None where it puts none."""
    template = _Template(tokenizer, {}, lambda note: None)
    answer = "mlxspec0answer0probe"
    for parts in (False, True):
        turns = _Turns(None, _PROBES[1], user_parts=parts).messages()
        content = [{"type": "text", "text": answer}] if parts else answer
        try:
            rendered = template.apply([*turns, {"role": "assistant", "content": content}], False)
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


def control_tokens(tokenizer: Tokenizer, template: str) -> list[str]:
    """Names of added tokens that steer a model: special ones, a template's own, and markers."""
    special = {
        str(token)
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        if getattr(token, "special", True)
    }
    return [
        name
        for name in tokenizer.get_added_vocab()
        # What is one letter or blank is text in any template.
        if len(name) > 1
        and name.strip()
        and (name in special or name in template or _MARKER.fullmatch(name))
    ]


def source_of(tokenizer: Tokenizer) -> str:
    """A tokenizer's template as it is written; empty where code renders, or where there is none."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict) and found:
        found = found[_name_of(found)]
    return found if isinstance(found, str) else ""


def less_reasoning(template: str) -> str:
    """How to ask a template for less reasoning, as the end of a sentence; empty where none can."""
    for argument in ("enable_thinking=false", "thinking=false", "reasoning_effort=low"):
        if re.search(rf"\b{argument.partition('=')[0]}\b", template):
            return f"; --template-arg {argument} asks for less reasoning"
    return ""


class _Template:
    """A tokenizer's template with its arguments."""

    def __init__(self, tokenizer: Tokenizer, arguments: Arguments, tell: Tell) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments)
        self._tell = tell
        self.source = source_of(tokenizer)
        found = getattr(tokenizer, "chat_template", None)
        if isinstance(found, dict) and found:
            name = _name_of(found)
            self._arguments["chat_template"] = self.source
            if name != "default":
                tell(f"the model names no default among its chat templates: {name} is used")
        _require_free(arguments)
        for name in arguments:
            if self.source and name not in self.source:
                tell(f"the chat template does not read the argument {name}")

    def apply(self, messages: list[dict[str, Any]], begins: bool) -> str:
        """Render messages; `begins` opens an answer behind them."""
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begins, **self._arguments
            )
        )

    def rendered(self, turns: _Turns) -> str:
        """The prompt with all texts in it."""
        rendered, problem = self._tried(turns)
        if problem is None:
            return rendered
        folds = turns.system is not None and any(name in self.source for name in _FOLDING)
        if folds:
            rendered, still = self._tried(turns.folded())
            if still is None:
                self._tell(
                    "the chat template takes no system message: it begins the user's turn, as the "
                    "model's authors do it"
                )
                return rendered
        if turns.system is not None and self._tried(replace(turns, system=None))[1] is None:
            raise _refused(
                problem, "the system message", "Write the system message in the prompt, or "
            )
        raise _refused(problem, "the prompt", "Correct the model's chat template, or ")

    def _tried(self, turns: _Turns) -> tuple[str, Exception | str | None]:
        """The rendered text, and the first form's problem where no form has every text."""
        problems: list[Exception | str] = []
        for form in turns.forms():
            try:
                rendered = self.apply(form.messages(), True)
            except Exception as error:  # a template's own code, which raises what it likes
                problems.append(error)
                continue
            missing = form.missing_in(rendered) or self._missing_in_probe(form)
            if not missing:
                return rendered, None
            problems.append(missing)
        return "", problems[0]

    def _missing_in_probe(self, form: _Turns) -> str:
        """The same of texts that nothing else contains.

        A short system message may stand in the prompt by chance.
        """
        system = None if form.system is None else _PROBES[0]
        probe = replace(form, system=system, user=_PROBES[1])
        try:
            rendered = self.apply(probe.messages(), True)
        except Exception:  # it looks at the texts themselves; theirs it took
            return ""
        # A template of strings prints a list of parts as Python would.
        printed = (form.system_parts or form.user_parts) and "'type': 'text'" in rendered
        return "the prompt" if printed else probe.missing_in(rendered)


def _name_of(templates: Mapping[str, str]) -> str:
    usual = [name for name in templates if name not in _SPECIAL_USES]
    return "default" if "default" in templates else next(iter([*usual, *templates]))


def _require_free(arguments: Arguments) -> None:
    for name in arguments:
        if name in _RESERVED:
            raise UsageError(
                f"A chat template takes no argument {name}: it is set here.",
                hint="Give those that the model's template reads, such as enable_thinking=false.",
            )


def _refused(problem: Exception | str, what: str, advice: str) -> PromptError:
    hint = advice + _RAW
    if isinstance(problem, str):
        return PromptError(f"The chat template leaves out {problem}.", hint=hint)
    words = shorten(" ".join(str(problem).split()), 200, placeholder=" …").rstrip(".")
    said = words or type(problem).__name__
    if type(problem).__name__ == "TemplateSyntaxError":
        return PromptError(f"The chat template has an error in its syntax: {said}.", hint=hint)
    return PromptError(f"The chat template refuses {what}: {said}.", hint=hint)


def _is_in(text: str, rendered: str) -> bool:
    """Whether a template has kept a text: but for blanks, or as a string of JSON."""
    if text in rendered:
        return True
    whole = " ".join(rendered.split())
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1])
    return any(" ".join(form.split()) in whole for form in forms)


# --- text that looks like control --------------------------------------------------------


def _with_cuts(text: str, names: Iterable[str], cut: str) -> str:
    """A cut behind the first letter of every control token's name in the text."""
    places = {start + 1 for name in names for start in _places(name, text)}
    return _cut_at(text, places, cut)


def _cut_at(text: str, places: Collection[int], cut: str) -> str:
    edges = [0, *sorted(places), len(text)]
    return cut.join(text[start:end] for start, end in pairwise(edges))


def _places(name: str, text: str) -> Iterator[int]:
    """Where it begins, overlapping ones too."""
    start = text.find(name)
    while start >= 0:
        yield start
        start = text.find(name, start + 1)


def _encoded(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    tokens = list(tokenizer.encode(pieces[0], add_special_tokens=False))
    for piece in pieces[1:]:
        tokens += _continuing(tokenizer, piece)
    return tokens


def _continuing(tokenizer: Tokenizer, piece: str) -> list[int]:
    """Tokens of a text behind another one, without the space that some put before every text."""
    for text in _BEFORE:
        before = list(tokenizer.encode(text, add_special_tokens=False))
        tokens = list(tokenizer.encode(text + piece, add_special_tokens=False))
        if tokens[: len(before)] == before:
            return tokens[len(before) :]
    return list(tokenizer.encode(piece, add_special_tokens=False))
