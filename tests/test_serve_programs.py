"""What programs send to servers of models, replayed: Open WebUI, Continue, docs/serving.md.

Those of Claude Code and Codex are in test_serve_messages and test_serve_responses.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import WAIT_S, Served, served
from talkers import CALL, NAMES, WEATHER, Talker, talker, talking_tokenizer

from mlxspec.decode.engine import Engine
from mlxspec.serve.core.refusal import Refusal
from mlxspec.serve.core.settings import Settings
from mlxspec.serve.core.worker import IDLE_S
from mlxspec.serve.openai.infill import infill_of

TITLE = '{ "title": "🌧 Rain in Köln" }'
KEY = "s3cret"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"


@pytest.fixture(scope="module")
def chat() -> Iterator[Served]:
    def talks() -> Engine:
        return talker("<think>hm</think>so it is", TITLE, f"Let me look.\n{CALL}")

    with served(talks, key=KEY) as one:
        yield one


def chunks_of(lines: str) -> list[Any]:
    """The objects of a stream that ends well."""
    data = [line.removeprefix("data: ") for line in lines.splitlines() if line.startswith("data:")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


# --- Open WebUI -----------------------------------------------------------------------------


def task(digit: str, **others: Any) -> dict[str, Any]:
    """One of the requests that follow an answer, for a title, tags or questions of the chat."""
    history = "<chat_history>\nUSER: will it rain?\nASSISTANT: so it is\n</chat_history>"
    content = f"### Task:\nGenerate a title.\n### Output:\nJSON format\n{history}\n{digit}"
    messages = [{"role": "user", "content": content}]
    return {"model": "demo", "messages": messages, "stream": False} | others


def test_what_open_webui_sends_is_answered(chat: Served) -> None:
    headers = {"Content-Type": "application/json", "X-OpenWebUI-User-Id": "0"}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "will it rain? 0"}]},
    ]
    body = {"model": "demo", "messages": turns, "stream": True, "temperature": 0, "seed": 1}
    body |= {"stream_options": {"include_usage": True}, "user": {"name": "me", "id": "0"}}
    with chat.client(KEY) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]

        def post(body: dict[str, Any]) -> Any:
            return client.post("/v1/chat/completions", json=body, headers=headers)

        chunks = chunks_of(post(body).text)
        tasks = [task("1", max_completion_tokens=1000), task("1"), task("0", max_tokens=50)]
        with ThreadPoolExecutor() as pool:  # they are sent at once
            title, tags, emoji = [one.json() for one in pool.map(post, tasks)]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "so it is"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    for answer, text in ((title, TITLE), (tags, TITLE), (emoji, "so it is")):
        assert answer["choices"][0]["message"]["content"] == text


# --- Continue -------------------------------------------------------------------------------

FORM = "<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>"
MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>")
BEFORE, BEHIND = "def double(n):\n    return ", "\n\nprint(double(n))\n"


def test_what_continue_sends_in_a_chat_is_answered(chat: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": "2"}],
        "model": "qwen2.5-coder",
        "max_tokens": 2048,
        "temperature": 0.5,
        "stream": True,
        "tools": [WEATHER],
        "top_k": 1,
    }
    with chat.client(KEY) as client:
        headers = {"api-key": KEY}
        chunks = chunks_of(client.post("/v1/chat/completions", json=body, headers=headers).text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me look."
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln 🌧"}


@pytest.fixture(scope="module")
def coder() -> Iterator[Served]:
    """A model that fills in, and goes on behind the end of what it has filled in."""

    def fills_in() -> Engine:
        tokenizer = talking_tokenizer((*NAMES, *MARKS))
        reply = tokenizer.encode("2 * n<|endoftext|>and more", add_special_tokens=False)
        model = Talker(tokenizer, [reply])
        model.begin, model.header = tokenizer.convert_tokens_to_ids("<|fim_middle|>"), 0
        return Engine(model, draft=model, compiled=False, tokenizer=tokenizer)

    with served(fills_in) as one:
        yield one


def test_what_continue_sends_to_complete_is_answered(coder: Served) -> None:
    body = {
        "model": "qwen2.5-coder",
        "prompt": FORM.format(BEFORE, BEHIND),
        "max_tokens": 256,
        "temperature": 0.01,
        "top_k": 1,
        "stream": True,
        "stop": [
            *MARKS,
            "<|repo_name|>",
            "<|file_sep|>",
            "\n\n",
            "/src/",
            "#- coding: utf-8",
            "```",
        ],
    }
    with coder.client() as client:
        chunks = chunks_of(client.post("/v1/completions", json=body).text)
    assert "".join(choice["text"] for one in chunks for choice in one["choices"]) == "2 * n"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_suffix_is_put_behind_the_prompt_in_the_models_own_way(coder: Served) -> None:
    client = openai.OpenAI(base_url=f"{coder.url}/v1", api_key="any", timeout=WAIT_S)
    asked: dict[str, Any] = {"model": "any", "max_tokens": 40, "temperature": 0}
    with client:
        filled = client.completions.create(**asked, prompt=BEFORE, suffix=BEHIND)
        same = client.completions.create(**asked, prompt=FORM.format(BEFORE, BEHIND))
        empty = client.completions.create(**asked, prompt=BEFORE, suffix="")
        with pytest.raises(openai.BadRequestError, match="ids"):
            client.completions.create(**asked, prompt=[1, 2], suffix=BEHIND)
    assert (filled.choices[0].text, filled.choices[0].finish_reason) == ("2 * n", "stop")
    assert same.choices[0].text == "2 * n<|endoftext|>and more"
    assert filled.usage is not None
    assert same.usage is not None
    assert empty.usage is not None
    assert filled.usage.prompt_tokens == same.usage.prompt_tokens
    assert empty.usage.prompt_tokens == len(BEFORE)


def test_a_model_that_does_not_fill_in_says_so(chat: Served) -> None:
    with chat.client(KEY) as client:
        refused = client.post("/v1/completions", json={"prompt": BEFORE, "suffix": BEHIND})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "suffix"
    assert "Qwen2.5-Coder" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("names", "prompt"),
    [
        (MARKS, "<|fim_prefix|>{a}<|fim_suffix|>b<|fim_middle|>"),
        (
            ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
            "<fim_prefix>{a}<fim_suffix>b<fim_middle>",
        ),
        (
            ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
            "<｜fim▁begin｜>{a}<｜fim▁hole｜>b<｜fim▁end｜>",
        ),
        (("[PREFIX]", "[SUFFIX]"), "[SUFFIX]b[PREFIX]{a}"),
    ],
)
def test_the_way_is_known_by_the_tokens_of_a_model(names: tuple[str, ...], prompt: str) -> None:
    infill = infill_of(talking_tokenizer((*NAMES, *names)))
    assert infill.prompt("{a}", "b") == prompt
    assert set(infill.ends) == set(names)
    with pytest.raises(Refusal):
        infill_of(talking_tokenizer((*NAMES, *names[1:])))
    with pytest.raises(Refusal):
        infill_of(None)


# --- docs/serving.md ------------------------------------------------------------------------


def shown(language: str, with_: str) -> list[str]:
    """The blocks of the page in a language that have a text in them."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for block in blocks if with_ in block]


def test_the_clients_of_the_page_work(chat: Served, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = shown("python", "import")
    assert len(blocks) == 2
    for block in blocks:
        block = block.replace("http://127.0.0.1:8000", chat.url).replace('"any"', f'"{KEY}"')
        exec(block, {})
        assert "so it is" in capsys.readouterr().out


def test_the_command_of_the_page_works(coder: Served) -> None:
    (block,) = shown("bash", "curl")
    call = shlex.split(block.replace("http://127.0.0.1:8000", coder.url))
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_what_the_page_says_of_limits_is_so() -> None:
    page, settings = PAGE.read_text(), Settings(name="any")
    for limit in (
        f"{settings.max_rows} texts at a time",
        f"{settings.max_queue} texts wait",
        f"{settings.max_choices} texts of one request",
        f"{settings.max_body_bytes // 2**20} MiB",
        f"more than {settings.stuck_s:.0f} s",
        f"asked for during {IDLE_S:.0f} seconds",
    ):
        assert limit in page
