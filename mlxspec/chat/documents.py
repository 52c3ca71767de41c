"""Conversations as files: JSON, which has all of them, and Markdown, which people read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlxspec.chat.conversation import Conversation, conversation_of
from mlxspec.conversations import Message
from mlxspec.errors import MlxspecError, PromptError, UsageError
from mlxspec.files import write_whole

JSON, MARKDOWN = (".json",), (".md", ".markdown")
_HEADINGS = {"system": "System", "user": "User", "assistant": "Assistant"}
_ROLES = {heading: role for role, heading in _HEADINGS.items()}
_HEADING = re.compile(rf"\\*## ({'|'.join(_ROLES)})")


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation, whole or not at all.

    Raises:
        UsageError: the name ends in none of the known ways. MlxspecError: it cannot be written.
    """
    text = _markdown(conversation) if _is_markdown(path) else _json(conversation)
    try:
        write_whole(path, text)
    except OSError as error:
        raise _failed(path, "written", error) from error


def load(path: Path) -> tuple[Conversation, str]:
    """A conversation that was saved, and its last question if it has no answer.

    Raises:
        UsageError: the name ends in none of the known ways, or the file is no conversation.
        MlxspecError: it cannot be read.
    """
    markdown = _is_markdown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _failed(path, "read", error) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not valid UTF-8.", hint="Save it as UTF-8.") from error
    try:
        return conversation_of(_of_markdown(text) if markdown else _of_json(text))
    except PromptError as error:
        raise PromptError(f"{path} is no conversation. {error.message}", hint=error.hint) from error


def _is_markdown(path: Path) -> bool:
    if path.suffix.lower() in (*JSON, *MARKDOWN):
        return path.suffix.lower() in MARKDOWN
    raise UsageError(
        f"{path} is neither JSON nor Markdown by its name.", hint="Use a name such as talk.md."
    )


def _failed(path: Path, what: str, error: OSError) -> MlxspecError:
    return MlxspecError(
        f"{path} cannot be {what}: {error.strerror}.", hint="Check the path, or choose another one."
    )


def _json(conversation: Conversation) -> str:
    messages = conversation.messages(all_of_it=True)
    answers = [one for one in messages if one["role"] == "assistant"]
    for answer, turn in zip(answers, conversation.turns, strict=True):
        answer |= {"reasoning_content": turn.reasoning} if turn.reasoning else {}
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"


def _of_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"It is not valid JSON: {error}.", hint="Correct it, or save it anew."
        ) from error
    return value.get("messages") if isinstance(value, dict) else value


def _markdown(conversation: Conversation) -> str:
    """A heading for each message. A line of a text that looks like one begins with a backslash."""
    parts = []
    for message in conversation.messages(all_of_it=True):
        lines = message["content"].split("\n")
        text = "\n".join("\\" + line if _HEADING.fullmatch(line) else line for line in lines)
        parts.append(f"## {_HEADINGS[message['role']]}\n\n{text}\n")
    return "\n".join(parts)


def _of_markdown(text: str) -> list[Message]:
    messages: list[tuple[str, list[str]]] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if _HEADING.fullmatch(line) and not line.startswith("\\"):
            messages.append((_ROLES[line.removeprefix("## ")], []))
        elif messages:
            messages[-1][1].append(line[1:] if _HEADING.fullmatch(line) else line)
        elif line.strip():
            raise PromptError(
                "Its first line is none of its headings.", hint="Begin it with: ## User"
            )
    return [{"role": role, "content": "\n".join(lines).strip("\n")} for role, lines in messages]
