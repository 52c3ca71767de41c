"""A prompt cache on disk: the same text, less to read, and no file is believed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TOKENIZER, build, draft_for, model, plain, prompt_of, wrapped
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlxspec.decode import lane, prefixes, prompt_cache, prompt_file
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.errors import UsageError
from mlxspec.measure.audit import audit
from mlxspec.metrics import Generation
from mlxspec.models import identity, kept, prefill
from mlxspec.models.identity import digest_of
from mlxspec.models.prefill import finished
from mlxspec.params import KVQuantization

PROMPT = prompt_of(40)
CHUNK = 16
COUNT = 12
# How far back a cache can go: anywhere, or nowhere once its window is full, or nowhere at all.
KINDS = {"llama": True, "gemma3_text": False, "qwen3_next": False, "lfm2": False, "llama4": False}


class Counted(nn.Module):
    """A model that counts the rows it is fed, and has memory for so many at once."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._fed = 0  # no setting: it does not change who this is
        self._rows = 10**6

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[1] > self._rows:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        self._fed += tokens.shape[1]
        return self.inner(tokens, cache=cache)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, kept, prefixes, prompt_cache):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.cache"


@cache
def engine_of(name: str = "llama", kind: str = "half", **options: Any) -> Engine:
    target = model(name)
    return Engine(target, draft_for(target, kind), draft_tokens=3, compiled=False, **options)


@cache
def expected(name: str, prompt: tuple[int, ...]) -> list[int]:
    return plain(model(name), prompt, COUNT)


def counted(name: str, kind: str = "half") -> Engine:
    target = Counted(model(name))
    draft = Counted(draft_for(model(name), kind))
    return Engine(target, draft, draft_tokens=3, compiled=False)


def fed(engine: Engine, prompt: Sequence[int], path: Path) -> list[int]:
    """How many tokens target and draft read of a prompt."""
    for cached in engine.models:
        cached.model._fed = 0
    request = engine.request(prompt, cache=path)
    reader = Reader(engine.rounds.of(request), request, keeper=engine._maker._keeper(request, None))
    finished(reader.state(prompt))
    for name in engine.drafts:
        finished(reader.draft(name, prompt[:-1], 0))  # once the first token is there
    reader.keep()
    return [cached.model._fed for cached in engine.models]


def written(engine: Engine, prompt: Sequence[int], path: Path | None) -> Generation:
    return engine.generate(prompt, max_tokens=COUNT, cache=path)


def held(path: Path) -> list[int]:
    contents = prompt_file.read(path)
    assert contents is not None
    return contents["tokens"].tolist()


# --- what is read, and what is written --------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_only_what_is_new_is_read(name: str, path: Path) -> None:
    engine = counted(name)
    assert fed(engine, PROMPT, path) == [39, 39]
    assert fed(engine, PROMPT, path) == [0, 0]
    assert fed(engine, PROMPT + [1, 2, 3], path) == [3, 3]
    assert held(path) == PROMPT[:-1]
    assert fed(engine, PROMPT + [1] * CHUNK, path)[0] == CHUNK
    assert held(path) == PROMPT + [1] * (CHUNK - 1)
    other = PROMPT[:30] + [5, 6]
    assert fed(engine, other, path)[0] == (1 if KINDS[name] else 15)


@pytest.mark.parametrize("name", KINDS)
def test_text_is_what_it_is_without(name: str, path: Path) -> None:
    engine = engine_of(name)
    prompts = [
        PROMPT,
        PROMPT,
        PROMPT + prompt_of(20, 1),
        PROMPT[:33] + prompt_of(9, 2),
        PROMPT[:10],
        prompt_of(25, 3),
    ]
    for prompt in prompts:
        result = written(engine, prompt, path)
        assert result.tokens == expected(name, tuple(prompt))


@given(data=st.data())
@settings(max_examples=8)
def test_any_row_of_prompts(data: st.DataObject) -> None:
    engine = engine_of("llama", "agrees")
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=3 * CHUNK)
    inside: list[int] = []
    with TemporaryDirectory() as folder:
        for prompt in data.draw(st.lists(tokens, min_size=2, max_size=4)):
            result = written(engine, prompt, Path(folder, "cache"))
            assert result.tokens == expected("llama", tuple(prompt))
            read = prompt[:-1]
            pairs = zip(read, inside, strict=False)
            common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            assert result.cached_prompt_tokens == common
            if len(read) - common >= max(1, min(CHUNK, common)):
                inside = read
            elif not read:
                continue
            assert held(Path(folder, "cache"))[: len(inside)] == inside


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("length", [10, CHUNK + 9])
def test_quantised_keys_and_values(bits: int, length: int, path: Path) -> None:
    target = build("llama", hidden_size=128, num_attention_heads=4, head_dim=32)
    engine = Engine(target, draft_for(target, "half"), compiled=False, kv=KVQuantization(bits, 32))
    first = prompt_of(length)
    for prompt in (first, first, first + prompt_of(14, 1), first[:-3] + prompt_of(22, 2)):
        without = written(engine, prompt, None)
        result = written(engine, prompt, path)
        assert result.tokens == without.tokens
        assert state_of(engine, prompt, path) == state_of(engine, prompt, None)
    # Before the end of the first chunk there is no going on: it saw what was not quantised.
    assert result.cached_prompt_tokens == (length - 3 if length > CHUNK else 0)


def state_of(engine: Engine, prompt: Sequence[int], path: Path | None) -> list[Any]:
    """The quantised numbers that a target's first layer keeps of a prompt."""
    state, _ = engine.session(prompt, cache=path).ahead(1)
    packed = state.target[-1].keys[0][:, :, : len(prompt) - 1]
    return packed.tolist()


def test_target_and_draft_are_judged_each_for_itself(path: Path) -> None:
    first, other = engine_of(kind="half"), engine_of(kind="never")
    alone = Engine(model("llama"), compiled=False)
    text = expected("llama", tuple(PROMPT))
    written(first, PROMPT, path)
    result = written(other, PROMPT, path)
    assert result.tokens == text
    assert result.cached_prompt_tokens == 39
    assert result.notes == [
        f"read 39 of 40 tokens of the prompt from {path}",
        f"{path} is of another draft: this one reads the prompt afresh",
    ]
    assert written(other, PROMPT, path).notes == result.notes[:1]
    before = path.read_bytes()
    assert written(alone, PROMPT, path).tokens == text
    assert path.read_bytes() == before  # which the draft has a use for
    path.unlink()
    written(alone, PROMPT, path)
    assert fed(counted("llama"), PROMPT, path) == [39, 39]  # another model, by its class
    assert fed(counted("llama", "never"), PROMPT, path) == [0, 39]
    assert fed(counted("llama", "never"), PROMPT, path) == [0, 0]


def test_a_text_that_is_read_again_is_not_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def evaluate(*arrays: Any) -> None:
        if next(calls) == 2 * CHUNK:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        mx.eval(*arrays)

    engine = engine_of(kind="never")
    monkeypatch.setattr(lane.mx, "async_eval", evaluate)
    result = engine.generate(PROMPT, max_tokens=4 * CHUNK, cache=path)
    assert result.tokens == plain(model("llama"), PROMPT, 4 * CHUNK)
    assert len([note for note in result.notes if "going on with" in note]) == 1
    assert result.cached_prompt_tokens == 0
    assert held(path) == PROMPT[:-1]
    assert any(note.startswith("read 39 of ") for note in result.notes)


def test_reading_begins_again_from_the_file_where_memory_ran_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "SMALLEST_CHUNK", 1)
    engine = counted("llama")
    written(engine, PROMPT, path)
    longer = PROMPT + prompt_of(40, 1)
    for cached in engine.models:
        cached.model._rows = CHUNK // 2
    result = written(engine, longer, path)
    assert result.tokens == expected("llama", tuple(longer))
    assert result.cached_prompt_tokens == 39
    assert [note.startswith("read 39 of 80 tokens") for note in result.notes].count(True) == 1
    assert held(path) == longer[:-1]


def test_a_draft_that_memory_does_not_hold_is_read_next_time(path: Path) -> None:
    engine = counted("llama")
    engine.models[1].model._rows = 2
    result = written(engine, PROMPT, path)
    assert "going on without the draft" in result.notes[-1]
    assert fed(counted("llama"), PROMPT, path) == [0, 39]


# --- files that are not to be believed --------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "cache"
    written(engine_of(), PROMPT, path)
    return path.read_bytes()


def comes_to_nothing(path: Path, why: str, *, replaced: bool) -> None:
    """A run tells of the file in a line, writes what it would without, and replaces it or not."""
    before = path.read_bytes()
    result = written(engine_of(), PROMPT, path)
    assert result.tokens == expected("llama", tuple(PROMPT))
    assert result.cached_prompt_tokens == 0
    (note,) = result.notes
    assert note.startswith(f"{path} {why}")
    assert "\n" not in note
    assert note.endswith("it is replaced" if replaced else "it is left as it is")
    if replaced:
        assert written(engine_of(), PROMPT, path).cached_prompt_tokens == 39
    else:
        assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:200], "is damaged: it ends early"),
        (lambda content: content[:-1], "is damaged: its header makes no sense"),
        (lambda content: content[:-9] + b"123456789", "is damaged: its checksum is another"),
        (lambda content: (2**63).to_bytes(8, "little") + content[8:], "is damaged: it ends early"),
        (lambda content: bytes(8) + content[8:], "is damaged: its header makes no sense"),
        (lambda content: content.replace(b"[1,", b"[2,"), "is damaged: its header makes no sense"),
        (lambda content: content.replace(b"F32", b"X32"), "is damaged: its header makes no sense"),
        (lambda content: content.replace(b"F32", b"I32"), "is damaged: its checksum is another"),
        (lambda content: content.replace(b"cache 4", b"cache 9"), "is of another version"),
    ],
)
def test_a_damaged_file_is_told_and_replaced(
    damage: Any, why: str, sound: bytes, path: Path
) -> None:
    path.write_bytes(damage(sound))
    comes_to_nothing(path, why, replaced=True)


def with_header(change: Any, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    described = json.dumps(header, separators=(",", ":")).encode()
    return len(described).to_bytes(8, "little") + described + content[8 + length :]


@pytest.mark.parametrize(
    ("key", "lie"),
    [
        ("data_offsets", [0, 10**15]),
        ("data_offsets", [-156, 0]),
        ("data_offsets", [8, 0]),
        ("data_offsets", [0, 4.0]),
        ("data_offsets", "12"),
        ("data_offsets", None),
        ("shape", [2**40, 2**40]),
        ("shape", [-1, -39]),
        ("shape", [39.0]),
        ("shape", [[39]]),
        ("shape", {}),
        ("dtype", 7),
        ("dtype", "F4"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_not_believed(key: str, lie: Any, sound: bytes, path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["array.0"][key] = lie

    path.write_bytes(with_header(change, sound))
    with pytest.raises(prompt_file.Damaged):
        prompt_file.read(path)


@pytest.mark.parametrize("change", ["pop", "number", "list", "no object", "deep"])
def test_metadata_that_are_none_are_damage(change: str, sound: bytes, path: Path) -> None:
    nested = b'{"mlxspec prompt cache":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    changed = {
        "pop": lambda: with_header(lambda header: header["__metadata__"].pop("checksum"), sound),
        "number": lambda: with_header(lambda h: h["__metadata__"].update(checksum=1), sound),
        "list": lambda: with_header(lambda h: h.update({"array.0": [1, 2]}), sound),
        "no object": lambda: (24).to_bytes(8, "little") + b'["mlxspec prompt cache"]',
        "deep": lambda: len(nested).to_bytes(8, "little") + nested,
    }
    path.write_bytes(changed[change]())
    with pytest.raises(prompt_file.Damaged):
        prompt_file.read(path)


@given(data=st.data())
@settings(max_examples=150)
def test_whatever_is_changed_is_noticed(sound: bytes, data: st.DataObject) -> None:
    length = 8 + int.from_bytes(sound[:8], "little")
    places = st.integers(0, length - 1) | st.integers(0, len(sound) - 1)
    changed = bytearray(sound)
    for place in data.draw(st.lists(places, min_size=1, max_size=3, unique=True)):
        changed[place] ^= data.draw(st.integers(1, 255))
    del changed[data.draw(st.none() | places) :]
    with TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        path.write_bytes(changed)
        with pytest.raises(prompt_file.Unusable):
            prompt_file.read(path)


def test_what_is_written_is_read(path: Path) -> None:
    values = {
        "a": [mx.arange(3), [None, 2, "x", True, 0.5]],
        "b": {"c": mx.zeros((2, 0, 3)), "d": mx.ones((4,), mx.bfloat16), "e": []},
    }
    prompt_file.write(path, values)
    found = prompt_file.read(path)
    assert found is not None
    assert str(found) == str(values)
    assert found["b"]["d"].dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"notes of my own", "is not a prompt cache of mlxspec"),
        (b"\0" * 9, "is not a prompt cache"),
    ],
)
def test_what_is_none_of_ours_is_left_alone(content: bytes, why: str, path: Path) -> None:
    path.write_bytes(content)
    comes_to_nothing(path, why, replaced=False)


def test_weights_are_left_alone(path: Path) -> None:
    weights = dict(tree_flatten(model("llama").parameters()))
    with path.open("wb") as file:
        mx.save_safetensors(file, weights, {"format": "mlx"})
    comes_to_nothing(path, "is not a prompt cache of mlxspec", replaced=False)


def test_what_is_no_file_is_left_alone(path: Path) -> None:
    os.mkfifo(path)
    (note,) = written(engine_of(), PROMPT, path).notes
    assert note.startswith(f"{path} is not a file")
    assert path.is_fifo()
    with pytest.raises(UsageError, match="is a folder"):
        engine_of().run(PROMPT, cache=path.parent)


def test_a_file_that_cannot_be_read_is_left_alone(path: Path, sound: bytes) -> None:
    path.write_bytes(sound)
    below = path / "cache"
    (note,) = written(engine_of(), PROMPT, below).notes
    assert note == f"the prompt could not be kept in {below}: Not a directory"


# --- writing ----------------------------------------------------------------------------


def test_no_folder_is_a_note(path: Path) -> None:
    missing = path / "no" / "cache"
    result = written(engine_of(), PROMPT, missing)
    assert result.tokens == expected("llama", tuple(PROMPT))
    assert result.notes == [f"the prompt could not be kept in {missing}: No such file or directory"]


@pytest.mark.parametrize("step", ["save_safetensors", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    step: str, path: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_bytes(sound)
    where = {"save_safetensors": prompt_file.mx, "fsync": prompt_file.os, "replace": Path}[step]
    longer = PROMPT + prompt_of(CHUNK, 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, step, full)
        result = written(engine_of(), longer, path)
    assert result.tokens == expected("llama", tuple(longer))
    assert result.notes[1:] == [f"the prompt could not be kept in {path}: No space left on device"]
    assert path.read_bytes() == sound
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    written(engine_of(), PROMPT, link)
    assert link.is_symlink()
    assert written(engine_of(), PROMPT, path).cached_prompt_tokens == 39


def test_a_cache_whose_state_mlx_lm_does_not_set(path: Path) -> None:
    engine = Engine(model("deepseek_v41"), compiled=False)
    for prompt, taken in ((PROMPT, 0), (PROMPT, 39), (PROMPT + [1, 2], 39)):
        result = written(engine, prompt, path)
        assert result.tokens == expected("deepseek_v41", tuple(prompt))
        assert result.cached_prompt_tokens == taken


@pytest.mark.parametrize("prompt", [[3], [3, 4], [3, 4, 5]], ids=len)
def test_the_shortest_prompts(prompt: list[int], path: Path) -> None:
    for _ in range(2):
        result = written(engine_of(), prompt, path)
        assert result.tokens == expected("llama", tuple(prompt))
    assert result.cached_prompt_tokens == len(prompt) - 1
    assert path.exists() == (len(prompt) > 1)
    written(engine_of(), PROMPT, path)
    assert len(written(engine_of(), prompt, path).notes) == (len(prompt) > 1)


# --- who it belongs to ------------------------------------------------------------------


def test_another_setting_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(engine_of(), PROMPT, path)
    result = written(engine_of(tokenizer=TOKENIZER), PROMPT, path)
    assert "was written with another tokenizer" in result.notes[0]
    monkeypatch.setattr(identity, "version", lambda _: "9.9")
    newer = Engine(model("llama"), tokenizer=TOKENIZER, compiled=False)
    result = written(newer, PROMPT, path)
    assert "was written with another version of MLX or mlx-lm" in result.notes[0]
    target = build("llama", hidden_size=128, num_attention_heads=4, head_dim=32)
    for kv in (None, KVQuantization(8, 32), KVQuantization(4, 32)):
        result = written(Engine(target, compiled=False, kv=kv), PROMPT, path)
        assert "was written with another" in result.notes[0]
        assert result.cached_prompt_tokens == 0


def test_another_target_is_told(path: Path) -> None:
    written(engine_of(), PROMPT, path)
    other = Engine(build("llama", seed=1), compiled=False)
    result = written(other, PROMPT, path)
    assert result.tokens == plain(other.target, PROMPT, COUNT)
    assert result.notes == [f"{path} is of another target: this one reads the prompt afresh"]
    assert written(other, PROMPT, path).cached_prompt_tokens == 39


def changed(name: str, change: Any) -> Any:
    one = build("llama")
    weights = dict(tree_flatten(one.parameters()))
    one.update(tree_unflatten([(name, change(weights[name]))]))
    return one


def test_a_model_is_known_again_and_no_other_is_taken_for_it() -> None:
    quantised = [build("llama", hidden_size=128, intermediate_size=128) for _ in range(3)]
    for one, bits in zip(quantised, (4, 8), strict=False):
        nn.quantize(one, group_size=32, bits=bits)
    scaled = build("llama")
    scaled.layers[0].self_attn.scale *= 2
    norm = "model.layers.1.input_layernorm.weight"
    embedding = "model.embed_tokens.weight"
    others = [
        build("llama", seed=1),
        build("llama", rope_theta=5000.0),
        build("qwen2"),
        scaled,
        changed(norm, lambda weight: weight * 1.01),
        changed(embedding, lambda weight: weight.astype(mx.bfloat16)),
        changed(embedding, lambda weight: weight[::-1]),
        changed(norm, lambda weight: weight.view(mx.int32)),
        build("llama", max_position_embeddings=77),
        *quantised,
    ]
    digests = [digest_of(build("llama")), *map(digest_of, others)]
    assert len(set(digests)) == len(digests)
    assert digest_of(build("llama")) == digests[0]


def test_a_tokenizer_is_its_vocabulary() -> None:
    cached_models = {"target": engine_of().models[0]}
    one, same = (identity.identity_of(cached_models, wrapped()) for _ in range(2))
    assert one == same
    other = wrapped()
    other._tokenizer.add_tokens(["another"])
    assert identity.identity_of(cached_models, other) != one


# --- audits -----------------------------------------------------------------------------


def test_an_audit_reads_for_itself(path: Path) -> None:
    engine = engine_of()
    written(engine, PROMPT, path)
    contents = prompt_file.read(path)
    assert contents is not None
    for past in contents["pasts"]:
        keys, *others = past["arrays"]["0"]
        past["arrays"]["0"] = [-keys, *others]  # a file that is sound, and says something else
    prompt_file.write(path, contents)
    run = engine.run(PROMPT, max_tokens=COUNT, cache=path)
    for _ in run:
        pass
    assert run.generation.cached_prompt_tokens == 39
    assert audit(engine, run).outcome == "defect"
