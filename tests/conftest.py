"""Tiny random models, drafts that agree with them more or less, and the oracles."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from architectures import VOCABULARY, Contrary, build
from hypothesis import settings
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec.cli.app import main
from mlxspec.control.controller import Controller
from mlxspec.control.policy import Permit
from mlxspec.decode.state import RoundState
from mlxspec.device import kernels
from mlxspec.drafters.graph import Past
from mlxspec.drafters.vocabulary import Shared
from mlxspec.models.caches.layers import stack
from mlxspec.pairs.servers import looked_at
from mlxspec.params import Penalties, SamplingParams
from mlxspec.sampling.sampler import Knobs, Processor

if TYPE_CHECKING:
    from servers import Served

# The same examples every time; MLXSPEC_EXPLORE=1 draws others, to find what nobody thought of.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("explore" if os.environ.get("MLXSPEC_EXPLORE") else "fixed")

MANY_KERNELS = 150  # the suite needs more


def pytest_configure(config: pytest.Config) -> None:
    """Where most kernels are still to be built, build all of them quickly: once for all workers."""
    if not hasattr(config, "workerinput") and kernels.count_built() < MANY_KERNELS:
        stack = ExitStack()
        stack.enter_context(kernels.quick_builds())
        config.add_cleanup(stack.close)


@pytest.fixture
def rooms() -> Iterator[None]:
    """Fails where a round would write beyond the room of its caches."""
    from rooms import watched

    with watched():
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """A server of the embedded pair, for all tests that leave its settings alone."""
    from servers import served

    with served() as one:
        yield one


@pytest.fixture(scope="session")
def chat() -> Iterator[Served]:
    """The same with a model that says what it is told to say; see `talkers`."""
    from servers import served
    from talkers import talks

    with served(talks) as one:
        yield one


MODELS = ("llama", "qwen2", "qwen3", "gemma2", "mixtral")
WINDOW = 16
# Layers that see a window beside layers that see all; gpt_oss with attention sinks.
SLIDING = ("gemma3_text", "cohere2", "gpt_oss", "olmo3", "exaone4", "ministral3")
KINDS = ("agrees", "half", "never")


@cache
def model(name: str) -> Any:
    return build(name)


def draft_for(target: Any, kind: str) -> Any:
    """A draft that agrees with a greedy target always, after two of three tokens, or never."""
    return {"agrees": target, "half": Contrary(target, 3), "never": Contrary(target, 1)}[kind]


def with_vocabulary(source: Any, vocabulary: int) -> Any:
    """The Llama `source` with fewer tokens, or with more of them."""
    resized = build("llama", vocabulary=vocabulary)
    weights = dict(tree_flatten(source.parameters()))
    name = "model.embed_tokens.weight"
    missing = max(vocabulary - weights[name].shape[0], 0)
    weights[name] = mx.pad(weights[name][:vocabulary], [(0, missing), (0, 0)])
    resized.update(tree_unflatten(list(weights.items())))
    return resized


def foreign(source: Any, missing: Collection[int] = ()) -> tuple[Any, Shared]:
    """The Llama `source` over other ids, and what they share with its own: all but `missing`."""
    size = source.args.vocab_size
    ids = np.random.default_rng(7).permutation(size)
    copy = build("llama", vocabulary=size)
    weights = dict(tree_flatten(source.parameters()))
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][mx.array(np.argsort(ids))]
    copy.update(tree_unflatten(list(weights.items())))
    partners = {token: int(ids[token]) for token in range(size) if token not in missing}
    return copy, Shared(partners, {}, placeholder=int(ids[0]), tokens=size)


def prompt_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, vocabulary, length).tolist()


def plain(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding by mlx-lm, the oracle."""
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


@cache
def plain_of(name: str, length: int, count: int) -> list[int]:
    return plain(model(name), prompt_of(length), count)


@cache
def plain_after(name: str, prompt: tuple[int, ...], count: int) -> list[int]:
    return plain(model(name), prompt, count)


def side_by_side(states: list[RoundState]) -> RoundState:
    """Sequences of equal capacity as the rows of one state."""
    return RoundState(
        position=mx.concatenate([state.position for state in states]),
        last_two=mx.concatenate([state.last_two for state in states]),
        recent=mx.concatenate([state.recent for state in states]),
        keys=mx.concatenate([state.keys for state in states]),
        knobs=Knobs(*map(mx.concatenate, zip(*(state.knobs for state in states), strict=True))),
        target=stack([state.target for state in states]),
        drafts={
            name: Past(
                stack([state.drafts[name].layers for state in states]),
                mx.concatenate([state.drafts[name].start for state in states]),
            )
            for name in states[0].drafts
        },
    )


def processors_of_mlx_lm(
    penalties: Penalties, bias: Mapping[int, float] | None = None
) -> list[Processor]:
    """What mlx-lm does to logits for the same penalties and biases."""
    processors: list[Processor] = make_logits_processors(
        dict(bias or {}),
        penalties.repetition,
        penalties.repetition_context,
        penalties.presence,
        penalties.presence_context,
        penalties.frequency,
        penalties.frequency_context,
    )
    return processors


def reference_p(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What mlx-lm's sampler draws from, in float64, for logits [V] without ties."""
    p = _softmax(np.asarray(logits, np.float64))
    order = np.argsort(-p)
    kept = np.ones(len(p), bool)
    if 0 < params.top_p < 1:
        above = np.cumsum(p[order]) - p[order]
        kept[order[above >= params.top_p]] = False
    kept &= p >= p.max() * params.min_p
    if params.top_k:
        kept[order[params.top_k :]] = False
    return _softmax(np.where(kept, np.log(p), -np.inf) / params.temperature)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
MERGES = [("a", "b"), ("ab", "ab"), ("Ġ", "a"), ("b", "c"), ("Ã", "©"), ("Ġ", "Ġ")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def wrapped(
    template: str | None = None, detokenizer: Callable[..., Any] = BPEStreamingDetokenizer
) -> TokenizerWrapper:
    """Byte-level BPE: a token for each byte, <bos> and <eos>, and one for each merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<bos>", "<eos>", *(left + right for left, right in MERGES)]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = BYTE_LEVEL
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return TokenizerWrapper(fast, detokenizer)


TOKENIZER = wrapped()
CHAT_TOKENIZER = wrapped(TEMPLATE)


def tokens_of(text: str) -> list[int]:
    """A token for each byte, whatever merges there are."""
    names = [name for word, _ in BYTE_LEVEL.pre_tokenize_str(text) for name in word]
    return [TOKENIZER.convert_tokens_to_ids(name) for name in names]


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the stop string that is the first to be complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stop if one and text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text


# --- the command ----------------------------------------------------------------------------


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        result: dict[str, Any] = json.loads(self.out)
        return result


@pytest.fixture(autouse=True)
def drafts_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny draft is as slow as its target, which is a reason to do without it.

    What may be read is tried in test_reading.py, and depends on no clock elsewhere.
    """
    monkeypatch.setattr(Controller, "permit", lambda *_: Permit.PIECE)


@pytest.fixture(autouse=True)
def servers_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server in a thread of a busy machine may not answer in half a second."""
    assert looked_at.__kwdefaults__ is not None
    monkeypatch.setitem(looked_at.__kwdefaults__, "patience_s", 60.0)


@pytest.fixture
def invoke(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Ended]]:
    """Calls the command in this process; `stdin` comes through a pipe.

    Nothing that a person may have set up or learned is seen.
    """
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    opened: list[io.TextIOWrapper] = []

    def call(*arguments: str, stdin: bytes | None = None) -> Ended:
        if stdin is None:
            source = os.open(os.devnull, os.O_RDONLY)
        else:
            source, sink = os.pipe()
            assert os.write(sink, stdin) == len(stdin)
            os.close(sink)
        opened.append(os.fdopen(source))
        monkeypatch.setattr(sys, "stdin", opened[-1])
        monkeypatch.setattr(sys, "argv", ["mlxspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    yield call
    for stream in opened:
        stream.close()
