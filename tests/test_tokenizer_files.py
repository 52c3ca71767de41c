"""A folder's tokenizer gets the decoder of its vocabulary, and its template wherever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_tokens import DECODERS, tokenizer_of, told
from tokenizers import decoders

from mlxspec.errors import LoadError
from mlxspec.pairs.tokenizer_files import load_tokenizer, require_decoder

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def save(folder: Path, tokenizer: TokenizerWrapper, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write(folder / "tokenizer_config.json", values | settings)
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")


# --- decoders ---------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [*DECODERS, None])
@pytest.mark.parametrize("kind", ["byte level", "sentence piece"])
def test_text_is_that_of_the_vocabulary_under_any_decoder(
    kind: str, decoder: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind, gap=3)
    vocabulary = tokenizer.get_vocab()
    space, word = ("Ġ", "Ġworld") if kind == "byte level" else ("▁", "▁world")
    tokens = [vocabulary[name] for name in ("a", word, space, "b", "c")]
    if decoder is None:
        tokenizer.backend_tokenizer.decoder = None
    elif "word" not in decoder and "suffix" not in decoder:
        tokenizer.backend_tokenizer.decoder = DECODERS[decoder]
    loaded = load_tokenizer(save(tmp_path / "model", tokenizer))
    assert "".join(told(loaded, tokens)) == loaded.decode(tokens) == "a world bc"


def test_a_decoder_that_fits_is_left_alone() -> None:
    for kind in ("byte level", "byte level, fused", "sentence piece", "metaspace"):
        tokenizer = tokenizer_of(kind)
        before = tokenizer.backend_tokenizer.decoder.__getstate__()
        require_decoder(tokenizer, Path("model"))
        assert tokenizer.backend_tokenizer.decoder.__getstate__() == before


def test_the_space_before_every_text_is_no_part_of_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("sentence piece")
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    loaded = load_tokenizer(save(tmp_path / "model", tokenizer))
    assert loaded.decode(loaded.encode("a b", add_special_tokens=False)) == "a b"


class Spelling:
    """A tokenizer of somebody's own that tells the letters of its spelling."""

    def __init__(self) -> None:
        self._vocabulary = tokenizer_of("byte level").get_vocab()
        self._names = {token: name for name, token in self._vocabulary.items()}

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, tokens: list[int]) -> str:
        return "".join(self._names[token] for token in tokens)


def test_a_decoder_that_cannot_be_replaced_is_an_error() -> None:
    with pytest.raises(LoadError, match="'aĠa' where its tokens mean a space") as caught:
        require_decoder(Spelling(), Path("model"))
    assert "\n" not in caught.value.message + caught.value.hint


# --- templates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", {"chat_template": TEMPLATE}),
        ("processor_config.json", {"chat_template": TEMPLATE}),
        ("chat_template.json", {"chat_template": [{"name": "default", "template": TEMPLATE}]}),
        ("chat_template.jinja", TEMPLATE),
        ("additional_chat_templates/default.jinja", TEMPLATE),
    ],
)
def test_a_template_is_found_where_it_is_kept(file: str, content: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_of("byte level"))
    write(folder / file, content)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_chat_template
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "[user]hi[assistant]"


def test_the_tokenizers_own_template_comes_first(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_of("byte level"), chat_template=TEMPLATE)
    write(folder / "chat_template.json", {"chat_template": "another"})
    assert load_tokenizer(folder).chat_template == TEMPLATE


def test_without_a_template_there_is_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_of("byte level"))
    write(folder / "processor_config.json", {"image_size": 3})
    assert not load_tokenizer(folder).has_chat_template


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": [{"name": "x"}]}'])
def test_a_damaged_file_of_a_template_is_named(content: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_of("byte level"))
    write(folder / "chat_template.json", content)
    with pytest.raises(LoadError, match=r"chat_template\.json is damaged"):
        load_tokenizer(folder)


def test_ends_are_those_of_the_configuration(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_of("byte level"))
    assert load_tokenizer(folder, eos_token_ids=3).eos_token_ids == {3}
    assert load_tokenizer(folder, eos_token_ids=[3, 4]).eos_token_ids == {3, 4}
    assert load_tokenizer(folder).eos_token_ids == set()


# --- calls of tools ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "settings", "start"),
    [
        (TEMPLATE + "<tool_call>{{ tool_call.name }}", {}, "<tool_call>"),
        ({"default": TEMPLATE, "tool_use": TEMPLATE + "[TOOL_CALLS]"}, {}, "[TOOL_CALLS]"),
        (TEMPLATE, {"tool_parser_type": "gemma4"}, "<|tool_call>"),
        (TEMPLATE, {}, None),
        (TEMPLATE, {"tool_parser_type": "of_another_release"}, None),
        (None, {}, None),
    ],
)
def test_the_parser_of_calls_is_the_one_that_mlx_lm_takes(
    template: Any, settings: dict[str, Any], start: str | None, tmp_path: Path
) -> None:
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    chats = {} if template is None else {"chat_template": template}
    folder = save(tmp_path / "model", tokenizer_of("byte level"), **chats, **settings)
    loaded = load_tokenizer(folder)
    assert loaded.tool_call_start == start
    assert (loaded.tool_parser is None) == (start is None)
