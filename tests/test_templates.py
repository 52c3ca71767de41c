"""Templates as models have them: what they drop, refuse, or want in parts, and what ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_tokens import tokenizer_of
from tokenizers import AddedToken

from mlxspec.cli.arguments.options import template_args
from mlxspec.errors import PromptError, UsageError
from mlxspec.text import encode_prompt, ends_of

STARTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML = STARTS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{% if c.type == 'text' %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
PARTS_OF_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}[S]{{ m['content'][0]['text'] }}"
    "{% else %}[U]{{ m.content + '' }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system\nhere.') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}[I]{{ m.content }}{% endfor %}"
CONTROL = ("<|im_start|>", "<|im_end|>", "<|eot|>")


def tokenizer_with(
    template: Any, kind: str = "byte level", special: Sequence[str] = CONTROL
) -> TokenizerWrapper:
    fast = tokenizer_of(kind)._tokenizer
    fast.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    fast.chat_template = template
    return TokenizerWrapper(fast)


def prompt_of(template: Any, text: str, **options: Any) -> str:
    tokenizer = tokenizer_with(template)
    return str(tokenizer.decode(encode_prompt(tokenizer, text, **options)))


def notes_of(tokenizer: TokenizerWrapper, text: str, **options: Any) -> list[str]:
    notes: list[str] = []
    encode_prompt(tokenizer, text, tell=notes.append, **options)
    return notes


def refused(template: Any, text: str = "why", **options: Any) -> PromptError:
    with pytest.raises(PromptError) as caught:
        prompt_of(template, text, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    assert "--raw" in caught.value.hint
    return caught.value


# --- what reaches the model -------------------------------------------------------------


def test_content_as_parts_reaches_templates_that_want_it() -> None:
    assert prompt_of(PARTS, "why", system="be brief") == "[system]be brief[user]why"
    assert prompt_of(PARTS, "why") == "[user]why"
    assert prompt_of(PARTS_OF_SYSTEM, "why", system="be brief") == "[S]be brief[U]why"


def test_a_text_that_is_left_out_is_an_error() -> None:
    said = refused("{% for m in messages %}[{{ m.role }}]{% endfor %}")
    assert said.message == "The chat template leaves out the prompt."
    assert refused("hello").message == "The chat template leaves out the prompt."
    said = refused(DROPS_SYSTEM, system="be brief")
    assert said.message == "The chat template leaves out the system message."


def test_a_system_message_is_not_found_in_the_prompt_or_the_template_by_chance() -> None:
    assert refused(DROPS_SYSTEM, "be brief, why", system="be brief")
    assert refused(DROPS_SYSTEM, "why", system="I")


def test_a_list_of_parts_is_never_printed() -> None:
    # Both texts are in what Python prints of them.
    assert refused("{{ messages[1:] if messages[0].content is string else messages }}", system="s")


def test_a_text_may_lose_blanks_or_be_a_string_of_json() -> None:
    trims = "{{ messages[0].content | trim | replace('\n', ' ') }}"
    assert prompt_of(trims, " why\nnot \n") == "why not"
    assert prompt_of("{{ messages[0].content | tojson }}", 'a "b"\n') == '"a \\"b\\"\\n"'


# --- refusals ---------------------------------------------------------------------------


def test_a_refusal_has_the_templates_own_words() -> None:
    said = refused(NO_SYSTEM, system="be brief")
    assert said.message == "The chat template refuses the system message: no system here."
    assert "in the prompt" in said.hint
    said = refused("{{ raise_exception('roles must alternate') }}", system="be brief")
    assert said.message == "The chat template refuses the prompt: roles must alternate."
    assert refused("{{ messages[0].content / 2 }}").message.startswith("The chat template refuses")


def test_an_error_in_the_syntax_is_told() -> None:
    said = refused("{% for m in messages %}{{ m.content }")
    assert said.message.startswith("The chat template has an error in its syntax: unexpected '}'")


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
@pytest.mark.parametrize("marker", ["<start_of_turn>", "[INST]"])
def test_a_system_message_begins_the_turn_where_authors_put_it_there(
    template: str, marker: str
) -> None:
    text = prompt_of(marker + template, "why", system="be brief")
    assert text.endswith("]be brief\n\nwhy")
    notes = notes_of(tokenizer_with(marker + template), "why", system="be brief")
    assert len(notes) == 1
    assert "system message" in notes[0]
    assert notes_of(tokenizer_with(marker + template), "why") == []


# --- names and arguments ----------------------------------------------------------------


def test_of_named_templates_the_default_is_taken_and_otherwise_one_is_named() -> None:
    names = {"tool_use": "[T]{{ messages[0].content }}", "chat": "[C]{{ messages[0].content }}"}
    assert prompt_of(names, "why") == "[C]why"
    assert "chat" in notes_of(tokenizer_with(names), "why")[0]
    assert prompt_of({"rag": names["tool_use"]}, "why") == "[T]why"
    named = names | {"default": "[D]{{ messages[0].content }}"}
    assert prompt_of(named, "why") == "[D]why"
    assert notes_of(tokenizer_with(named), "why") == []


def test_arguments_reach_the_template() -> None:
    template = "{{ messages[0].content }}{% if effort == 0 %}[no thinking]{% endif %}"
    assert prompt_of(template, "why") == "why"
    none = {"effort": 0}
    assert prompt_of(template, "why", template_args=none) == "why[no thinking]"
    tokenizer = tokenizer_with(template)
    assert notes_of(tokenizer, "why", template_args=none) == []
    assert "thinking_budget" in notes_of(tokenizer, "why", template_args={"thinking_budget": 1})[0]


def test_arguments_that_are_not_the_templates_are_refused() -> None:
    with pytest.raises(UsageError, match="takes no argument tokenize"):
        prompt_of(CHATML, "why", template_args={"tokenize": True})
    with pytest.raises(PromptError, match="no place for arguments"):
        prompt_of(CHATML, "why", raw=True, template_args={"enable_thinking": False})


def test_a_model_for_chats_without_a_template_is_noticed() -> None:
    for name, noticed in (
        ("/models/some-Instruct", True),
        ("gemma-3-1b-it", True),
        ("/hub/models--org--a-chat/snapshots/1", True),
        ("/instruct/base", False),
        ("", False),
    ):
        tokenizer = tokenizer_with(None)
        tokenizer._tokenizer.name_or_path = name
        assert bool(notes_of(tokenizer, "why")) is noticed, name
        assert notes_of(tokenizer, "why", raw=True) == []


@pytest.mark.parametrize("options", [{}, {"system": "caf\udce9"}, {"raw": True}])
def test_texts_that_are_no_unicode_are_one_error(options: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        prompt_of(CHATML, "hi" if "system" in options else "caf\udce9", **options)


# --- text that looks like control -------------------------------------------------------

CHATS = {kind: tokenizer_with(CHATML, kind) for kind in ("byte level", "sentence piece")}


def plainer(text: str) -> str:
    """The same without control tokens."""
    return text.replace("|", "!")


@example("sentence piece", "<|im_end|>", "<|eot|>\n<<|eot|>")
@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(CHATS)),
    text=st.lists(st.sampled_from([*CONTROL, "<|", "|>", "a", "b c", " ", "\n", "é"])).map("".join),
    system=st.lists(st.sampled_from([*CONTROL, "a", " "])).map("".join),
)
def test_control_tokens_in_texts_are_text(kind: str, text: str, system: str) -> None:
    tokenizer = CHATS[kind]
    ids = encode_prompt(tokenizer, f"x{text}x", system=system)
    plain = encode_prompt(tokenizer, plainer(f"x{text}x"), system=plainer(system))
    assert plainer(tokenizer.decode(ids)) == plainer(tokenizer.decode(plain))
    control = tokenizer.convert_tokens_to_ids(list(CONTROL))
    assert [ids.count(token) for token in control] == [3, 2, 0]


def test_an_added_token_that_no_template_uses_stays_one() -> None:
    # Runs of spaces are tokens of their own in some vocabularies, and no control.
    tokenizer = tokenizer_with(CHATML)
    ids = encode_prompt(tokenizer, "a   b")
    assert tokenizer.get_vocab()["   "] in ids


def test_control_tokens_in_a_raw_prompt_are_control() -> None:
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.get_vocab()["<|im_end|>"]
    assert encode_prompt(tokenizer, "a<|im_end|>", raw=True)[-1] == end


# --- ends of turns ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (PARTS + "<|eot|>", "<|eot|>"),
        ("{% for m in messages %}{{ m.content }}  \n<|eot|><|im_end|>{% endfor %}", "<|eot|>"),
        ("{% for m in messages %}<|im_start|>{{ m.content }}\n{% endfor %}", None),
        ("{{ messages[0].content }}<|im_end|>", None),
        ("{% if", None),
        (None, None),
    ],
)
def test_what_a_template_puts_behind_an_answer_ends_the_text(
    template: str | None, end: str | None
) -> None:
    tokenizer = tokenizer_with(template)
    named = set() if end is None else {tokenizer.get_vocab()[end]}
    assert ends_of(tokenizer) == tokenizer.eos_token_ids | named


def test_the_end_of_one_channel_is_no_end_of_a_text() -> None:
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    assert ends_of(tokenizer_with(template, special=["<|call|>"])) > {
        tokenizer_with(template).eos_token_id
    }
    channels = tokenizer_with(template, special=["<|channel|>"])
    assert ends_of(channels) == channels.eos_token_ids


# --- options ----------------------------------------------------------------------------


def test_arguments_on_the_command_line_are_json_or_text() -> None:
    given = ["enable_thinking=false", "effort=low", "budget=3", "date=a=b", "empty="]
    expected = {"enable_thinking": False, "effort": "low", "budget": 3, "date": "a=b", "empty": ""}
    assert template_args(given) == expected
    assert template_args(None) == {}


@pytest.mark.parametrize("given", ["enable_thinking", "=false", ""])
def test_an_argument_without_a_name_or_a_value_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="no name or no value"):
        template_args([given])
