"""A folder's tokenizer as its authors mean it: with a decoder that fits, and with its template."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Any

# The private ones alone know which parser of tool calls fits a template, and what a model's module
# says of its tokenizer.
from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser
from mlx_lm.utils import _tokenizer_defaults
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer

from mlxspec.errors import LoadError
from mlxspec.pairs.contents import (
    CONFIG,
    TOKENIZER_FILES,
    damaged,
    in_one_line,
    named_in_utf8,
    read_json,
)
from mlxspec.templates import source_of
from mlxspec.tokens import Tokenizer

# Where a template is kept that transformers does not read with the tokenizer: a processor's files.
_TEMPLATE_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json")

_MOST = 0.9  # of the byte alphabet's letters: a vocabulary may leave out bytes that no text has

# Tokenizers that need a package beside those of mlx-lm.
_PACKAGES = {
    "tekken.json": "mistral-common",
    "*.tiktoken": "tiktoken",
    "tiktoken.model": "tiktoken",
}


def load_folder_tokenizer(
    folder: Path, ends: Any = None, *, trust_remote_code: bool = False
) -> Tokenizer:
    """The tokenizer of a folder, without asking whether its code may run.

    Args:
        ends: what the configuration gives as `eos_token_id`.

    Raises:
        LoadError: it cannot be loaded, or has no tokens; or `ends` are no ids.
    """
    ids = _ids(ends, folder)
    try:
        with named_in_utf8(folder) as there:
            tokenizer = load_tokenizer(
                there, {"trust_remote_code": trust_remote_code}, eos_token_ids=ids
            )
    except LoadError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise _cannot_load(folder, in_one_line(error)) from error
    # Without files that it knows transformers makes a tokenizer of special tokens alone.
    if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < 2:
        raise _cannot_load(folder, "it has no tokens")
    return tokenizer


def _ids(ends: Any, folder: Path) -> list[int] | None:
    """The ids that a configuration gives: one, a list of them, or none."""
    if ends is None:
        return None
    ids = []
    for one in ends if isinstance(ends, list) else [ends]:
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not is_number or one != one // 1:
            raise LoadError(
                f"{_file_of_ends(folder)} gives {shorten(repr(ends), 80)} as eos_token_id.",
                hint="It must be the id of a token, or a list of ids: correct it there.",
            )
        ids.append(int(one))
    return ids


def _file_of_ends(folder: Path) -> Path:
    """The file whose `eos_token_id` counts, as mlx-lm reads them."""
    path = folder / "generation_config.json"
    with suppress(LoadError):
        if read_json(path).get("eos_token_id"):
            return path
    return folder / CONFIG


def load_tokenizer(
    folder: Path,
    options: dict[str, Any] | None = None,
    *,
    eos_token_ids: list[int] | int | None = None,
) -> Tokenizer:
    """mlx-lm's wrapper around the tokenizer of a folder, with the plainest of its detokenizers.

    The others need a token for every id below the largest, and `mlxspec.tokens` uses none of them.

    Args:
        options: for transformers.

    Raises:
        LoadError: no text can come of its tokens. And whatever transformers raises.
    """
    defaults = _tokenizer_defaults(folder) or {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **(options or {}))
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_beside(folder)
    require_decoder(tokenizer, folder)
    ends = defaults.get("eos_token_ids") if eos_token_ids is None else eos_token_ids
    return TokenizerWrapper(
        tokenizer,
        eos_token_ids=[ends] if isinstance(ends, int) else ends,
        **_rendering(tokenizer, defaults),
        **_calling(tokenizer, defaults),
    )


def _rendering(tokenizer: Tokenizer, defaults: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm knows of a template and of answers, where the folder or its model asks for it.

    A template of the folder's own takes the place of its model's default.
    """
    asked = tokenizer.init_kwargs.get("chat_template_type")
    name = asked or defaults.get("chat_template_type")
    if not name:
        return {}
    module = import_module(f"mlx_lm.chat_templates.{name}")
    renders = asked or not tokenizer.chat_template
    return {
        "chat_template": module.apply_chat_template if renders else None,
        "response_format": getattr(module, "RESPONSE_FORMAT", None),
    }


def _calling(tokenizer: Tokenizer, defaults: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's parser of tool calls that the folder or its model asks for, or that fits."""
    asked = tokenizer.init_kwargs.get("tool_parser_type") or defaults.get("tool_parser_type")
    rendered = SimpleNamespace(
        chat_template=source_of(tokenizer, with_tools=True), get_vocab=tokenizer.get_vocab
    )
    name = asked or _infer_tool_parser(rendered)
    if not name:
        return {}
    try:
        module = import_module(f"mlx_lm.tool_parsers.{name}")
    except ModuleNotFoundError:  # a parser of another release, which only a text with tools misses
        return {}
    return {
        "tool_parser": module.parse_tool_call,
        "tool_call_start": module.tool_call_start,
        "tool_call_end": module.tool_call_end,
    }


# --- templates --------------------------------------------------------------------------


def _template_beside(folder: Path) -> Any:
    for path in (folder / name for name in _TEMPLATE_FILES):
        if path.exists():
            template = _template_in(path)
            if template:
                return template
    return None


def _template_in(path: Path) -> str | dict[str, str] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        template = content.get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    return template if isinstance(template, str | dict) else None


# --- decoders ---------------------------------------------------------------------------


def require_decoder(tokenizer: Tokenizer, folder: Path) -> None:
    """Give a tokenizer the decoder of its vocabulary where its own shows letters of the spelling.

    Raises:
        LoadError: there is no such decoder.
    """
    fitting = _fitting(tokenizer)
    if fitting is None or not _shows(tokenizer, fitting[0]):
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.decoder = fitting[1]
    if backend is None or _shows(tokenizer, fitting[0]):
        raise LoadError(
            f"The tokenizer in {folder} decodes to {_shows(tokenizer, fitting[0])!r} where its "
            "tokens mean a space.",
            hint="Its decoder is not that of its vocabulary: take tokenizer.json from the "
            "original model.",
        )


def _fitting(tokenizer: Tokenizer) -> tuple[str, Any] | None:
    """The token of a space in this vocabulary, and the decoder that knows it; None if neither."""
    names = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if "<0x0A>" not in names:
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        if "Ġ" in names and len(alphabet & names) >= _MOST * len(alphabet):
            return "Ġ", decoders.ByteLevel()
    if "▁" not in names:
        return None
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
    if first and str(first[0]).startswith("▁"):
        steps.append(decoders.Strip(" ", 1, 0))  # of the space that it puts before every text
    return "▁", decoders.Sequence(steps)


def _shows(tokenizer: Tokenizer, space: str) -> str:
    """The decoded space between two letters, where it still has the token's own letter."""
    vocabulary = tokenizer.get_vocab()
    letter = vocabulary.get("a", vocabulary[space])
    text = str(tokenizer.decode([letter, vocabulary[space], letter]))
    return text if space in text else ""


def _cannot_load(folder: Path, why: str) -> LoadError:
    hint = "Copy or download the model again."
    if "custom code" in why or "trust_remote_code" in why:
        why = "it needs code of its own, which is not run"
        hint = "Read the code; trust_remote_code=True, or --trust-remote-code, runs it."
    elif not (folder / "tokenizer.json").exists():
        files = sorted(path.name for one in TOKENIZER_FILES for path in folder.glob(one))
        why = f"{', '.join(dict.fromkeys(files))}: {why}"
        packages = [name for one, name in _PACKAGES.items() if any(folder.glob(one))]
        hint = "Take a repository with a tokenizer.json" + (
            f", or install {packages[0]}." if packages else "."
        )
    return LoadError(f"The tokenizer in {folder} cannot be loaded: {why}.", hint=hint)
