"""A prefix cache: the same texts with less to read, and never more bytes than it may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from conftest import build, draft_for, model, plain_after, prompt_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import Guess
from test_prompt_cache import Counted

from mlxspec import KVQuantization, MlxspecError, PrefixCache, UsageError
from mlxspec.decode import lane, prefixes, prompt_file, reader
from mlxspec.decode.batch import Batch
from mlxspec.decode.engine import Engine
from mlxspec.decode.prefix_tree import PrefixTree
from mlxspec.decode.reader import Reader
from mlxspec.metrics import Generation
from mlxspec.models import kept, prefill
from mlxspec.models.caches.positional import FullLayer, Places
from mlxspec.models.caches.positional import written as placed
from mlxspec.models.kept import Entries, Kept, Rest
from mlxspec.models.pace import Pace
from mlxspec.models.prefill import finished

PROMPT = prompt_of(40)
CHUNK = 16
COUNT = 12
# What mlx-lm keeps a past in, and whether it can go back to any place.
KINDS = {
    "llama": True,
    "deepseek_v3": True,
    "deepseek_v32": True,
    "gemma3n": False,
    "gemma3_text": False,
    "gpt_oss": False,
    "lfm2": False,
    "qwen3_next": False,
    "mamba2": False,
    "rwkv7": False,
    "jamba": False,
    "recurrent_gemma": False,
    "llama4": False,
    "deepseek_v41": False,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefill, kept, prefixes, reader):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


@cache
def made(name: str, kind: str | None) -> Engine:
    draft = None if kind is None else draft_for(model(name), kind)
    return Engine(model(name), draft, draft_tokens=3, compiled=False)


def engine_of(name: str = "llama", kind: str | None = "half", max_bytes: int = 1 << 30) -> Engine:
    """An engine with an empty prefix cache."""
    engine = made(name, None if name == "deepseek_v41" else kind)
    engine.prefixes = PrefixCache(max_bytes)
    return engine


def store_of(engine: Engine) -> PrefixCache:
    assert engine.prefixes is not None
    return engine.prefixes


def expected(name: str, prompt: Sequence[int], count: int = COUNT) -> list[int]:
    return plain_after(name, tuple(prompt), count)


def written(engine: Engine, prompt: Sequence[int], **options: Any) -> Generation:
    return engine.generate(prompt, **{"max_tokens": COUNT, **options})


# --- the text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_text_is_what_it_is_without(name: str) -> None:
    engine, longer = engine_of(name), PROMPT + prompt_of(20, 1)
    prompts = [PROMPT, PROMPT, longer, PROMPT[:33] + prompt_of(9, 2), PROMPT[:10], longer]
    taken = []
    for prompt in prompts:
        result = written(engine, prompt)
        assert result.tokens == expected(name, prompt)
        taken.append(result.cached_prompt_tokens)
    # Where a past can go back, its text is kept too, of which the first token is read with PROMPT.
    assert taken == ([0, 39, 40, 33, 9, 59] if KINDS[name] else [0, 39, 39, 32, 0, 59])


@pytest.mark.parametrize("draft_tokens", [0, 3, "auto"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "qwen3_next", "recurrent_gemma", "llama4"]
)
def test_texts_of_a_batch_begin_from_it(name: str, draft_tokens: Any) -> None:
    engine = made(name, "half")
    engine.prefixes = None
    prompts = [[*PROMPT[:34], *prompt_of(5, seed)] for seed in range(5)]
    prompts += [prompts[2], PROMPT[:1]]
    batch = engine.batch(max_rows=4)
    rows = [batch.add(one, max_tokens=COUNT, draft_tokens=draft_tokens) for one in prompts]
    while not batch.done:
        batch.step()
        assert batch.prefixes.stats.nbytes <= batch.prefixes.stats.max_bytes
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.generation.tokens == expected(name, prompt)
    # The second text shows where others part from it, and the past at that place is kept.
    second = 34 if KINDS[name] else 32
    taken = [row.generation.cached_prompt_tokens for row in rows]
    assert taken == [0, second, 34, 34, 34, len(prompts[2]) - 1, 0]
    stats = batch.prefixes.stats
    assert (stats.texts, stats.hits) == (7, 5)
    assert (stats.tokens, stats.hit_tokens) == (sum(map(len, prompts)), sum(taken))


@pytest.mark.parametrize("name", KINDS)
def test_a_past_is_the_same_to_the_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where pieces end decides how some models round, with and without a prefix cache.
    monkeypatch.setattr(Pace, "rows", lambda *_, **__: CHUNK)
    engine = engine_of(name, None)
    store = store_of(engine)
    for prompt in (PROMPT, PROMPT[: 2 * CHUNK] + prompt_of(30, 1)):
        written(engine, prompt)
        again = past_of(engine, prompt)
        engine.prefixes = None
        assert all(map(mx.array_equal, past_of(engine, prompt), again))
        engine.prefixes = store
    assert store.stats.hits == 3


@pytest.mark.parametrize("name", KINDS)
def test_a_past_goes_on_from_any_place(name: str) -> None:
    engine = engine_of(name, None)
    store, turn = store_of(engine), PROMPT + expected(name, PROMPT)
    for prompt in (PROMPT, PROMPT[:35] + [1, 2], turn[:-2] + [3] * 9, PROMPT + [4] * 20):
        written(engine, prompt)
        again = past_of(engine, prompt)
        engine.prefixes = None
        assert all(map(close, past_of(engine, prompt), again))
        engine.prefixes = store


def close(one: mx.array, other: mx.array) -> mx.array:
    return mx.allclose(one, other, rtol=1e-4, atol=1e-4)


def past_of(engine: Engine, prompt: Sequence[int]) -> list[mx.array]:
    """What a target has of a prompt, but for room that is never seen."""
    if not engine.models[0].fused:  # mlx-lm's caches may have their entries in another order
        session = engine.session(prompt, max_tokens=4)
        logits, _ = engine.models[0].forward(
            mx.array([prompt[-1:]]), session.ahead(0)[0].target, mx.array([len(prompt) - 1]), 64
        )
        return [logits]
    state = engine.session(prompt).ahead(0)[0]
    arrays = kept._arrays_in(state.target)
    return [one[:, :, : len(prompt) - 1] if one.ndim == 4 else one for one in arrays]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "lfm2", "qwen3_next"])
def test_the_draft_has_the_past_as_well(name: str) -> None:
    draft = Counted(model(name))  # which always agrees, as long as it has read all of the text
    engine = Engine(
        model(name), draft, draft_tokens=3, compiled=False, prefixes=PrefixCache(1 << 30)
    )
    fed, accepted = [], []
    for _ in range(2):
        draft._fed = 0
        result = written(engine, PROMPT)
        fed.append(draft._fed)
        accepted.append(result.speculation.accepted)
        assert result.tokens == expected(name, PROMPT)
    assert result.cached_prompt_tokens == 39
    assert fed[0] - fed[1] == 39
    assert accepted[0] == accepted[1] > 0


def test_a_draft_that_has_read_less_goes_on_from_there() -> None:
    engine = engine_of("llama", "agrees")
    written(engine, PROMPT[:20])
    written(engine, PROMPT, draft_tokens=0)  # the target alone
    request = engine.request(PROMPT)
    keeper = engine._maker._keeper(request, engine.prefixes)
    one = Reader(engine.rounds.of(request), request, keeper=keeper)
    finished(one.state(PROMPT))
    (name,) = engine.drafts
    assert one.held(name, PROMPT) == 20
    finished(one.draft(name, PROMPT[:-1], 0))
    assert keeper is not None
    assert keeper.taken == {"target": 39, name: 20}


@pytest.mark.parametrize("prompt", [[3], [3, 4], [3, 4, 5]], ids=len)
def test_the_shortest_prompts(prompt: list[int]) -> None:
    engine = engine_of()
    for _ in range(2):
        result = written(engine, prompt)
        assert result.tokens == expected("llama", prompt)
    assert result.cached_prompt_tokens == len(prompt) - 1


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("length", [10, CHUNK + 9])
def test_quantised_keys_and_values(bits: int, length: int) -> None:
    target = build("llama", hidden_size=128, num_attention_heads=4, head_dim=32)
    options: Any = {"compiled": False, "kv": KVQuantization(bits, 32)}
    alone = Engine(target, draft_for(target, "half"), **options)
    engine = Engine(target, draft_for(target, "half"), prefixes=PrefixCache(), **options)
    first, taken = prompt_of(length), []
    turn = first + written(alone, first).tokens
    for prompt in (first, first, first[:-3] + prompt_of(22, 2), turn + [1, 2, 3]):
        result = written(engine, prompt)
        assert result.tokens == written(alone, prompt).tokens
        assert all(map(mx.array_equal, past_of(engine, prompt), past_of(alone, prompt)))
        taken.append(result.cached_prompt_tokens)
    # Before the end of the first chunk there is no going on: it saw what was not quantised.
    assert taken[:3] == [0, length - 1, length - 3 if length > CHUNK else 0]
    assert taken[3] > length if length > CHUNK else taken[3] == 0


class Recall(Guess):
    """A `Guess` that keeps its features by position, so that it can go back to any."""

    def begin(self, capacity: int) -> Any:
        return FullLayer(*[mx.zeros((1, 1, capacity, 32))] * 2)

    def propose(self, past: Any, last: Any, position: Any, picks: Any, count: int, n: int) -> Any:
        at = (position - 1)[:, None, None, None]
        super().propose(mx.take_along_axis(past.keys, at, 2)[:, 0], last, at, picks, count, n)
        return past

    def commit(self, past: Any, tokens: Any, features: Any, position: Any, kept: Any) -> Any:
        rows = next(iter(features.values()))[:, None]
        return FullLayer(*(placed(array, rows, Places(position)) for array in past))


@pytest.mark.parametrize(("kind", "back"), [(Guess, CHUNK), (Recall, 30)])
def test_a_head_has_its_past(kind: type[Guess], back: int) -> None:
    target = model("llama")
    alone = Engine(target, heads={"head": kind(target)}, draft_tokens=3, compiled=False)
    engine = Engine(
        target,
        heads={"head": kind(target)},
        draft_tokens=3,
        compiled=False,
        prefixes=PrefixCache(),
    )
    other = PROMPT[:30] + [1, 2]
    results = [written(engine, one) for one in (PROMPT, PROMPT, other)]
    assert [one.cached_prompt_tokens for one in results] == [0, 39, back]
    for prompt, result in zip((PROMPT, PROMPT, other), results, strict=True):
        assert result.tokens == expected("llama", prompt)
        assert result.speculation.accepted == written(alone, prompt).speculation.accepted
    assert results[0].speculation.accepted > 0
    if kind is Recall:  # it has nothing but entries, so that an answer outlasts its text too
        turn = PROMPT + results[0].tokens + [1, 2]
        assert written(engine, turn).cached_prompt_tokens == len(turn) - 3


# --- a chat -------------------------------------------------------------------------------------

END, OPENING, THINKING = [5], [6, 7], [8, 9, 10]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "mamba2"])
def test_a_reasoning_that_is_not_sent_back_costs_a_turn_and_no_more(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(name)
    monkeypatch.setitem(vars(engine._requests), "_ends", frozenset(END))
    system = prompt_of(21, 1, 5) + END
    said, before = list(system), 0
    for turn in range(3):
        said += OPENING + prompt_of(9, turn, 5) + END
        result = written(engine, said + OPENING + THINKING)
        assert result.tokens == ended(expected(name, said + OPENING + THINKING))
        assert result.cached_prompt_tokens >= before
        before = len(said)
        said += OPENING + prompt_of(30, turn, 5) + END  # the answer, as a client sends it
    other = system + OPENING + prompt_of(9, 7, 5) + END + OPENING
    assert written(engine, other).cached_prompt_tokens >= len(system)


def ended(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(*END)] if END[0] in tokens else tokens


@pytest.mark.parametrize("in_batch", [False, True])
def test_an_answer_that_is_sent_back_is_not_read_again(in_batch: bool) -> None:
    engine = engine_of()
    said = list(PROMPT)
    for turn in range(3):
        if in_batch:
            beside = [said, prompt_of(7, turn)]
            result, _ = engine.generate_many(beside, max_rows=2, max_tokens=COUNT)
        else:
            result = written(engine, said)
        assert result.tokens == expected("llama", said)
        assert result.cached_prompt_tokens == (len(said) - 4 if turn else 0)
        said += result.tokens + prompt_of(3, turn)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [0, 20_000])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_cap_is_kept(name: str, max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watched(PrefixTree):
        nbytes = property(lambda tree: seen[-1], lambda tree, value: seen.append(value))

    monkeypatch.setattr(prefixes, "PrefixTree", Watched)
    engine = engine_of(name, max_bytes=max_bytes)
    for seed in range(4):
        for prompt in (prompt_of(30, seed), prompt_of(30, seed)[:20] + prompt_of(15, seed)):
            assert written(engine, prompt).tokens == expected(name, prompt)
    assert max(seen) <= max_bytes
    assert (store_of(engine).stats.pasts > 0) == (max_bytes >= 20_000)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "llama4"])
def test_its_arrays_take_what_it_says(name: str) -> None:
    limit = mx.set_cache_limit(0)  # a buffer that is used again may be larger than its array
    engine = engine_of(name)
    written(engine, PROMPT)  # what is made once
    store_of(engine).clear()
    before = held_bytes()
    for prompt in (PROMPT, PROMPT[:20] + prompt_of(30, 1), PROMPT[:35] + prompt_of(500, 2)):
        written(engine, prompt)
    stats = store_of(engine).stats
    assert stats.nbytes > 10_000
    assert stats.nbytes <= held_bytes() - before < 1.05 * stats.nbytes
    store_of(engine).clear()
    assert abs(held_bytes() - before) < 1000
    mx.set_cache_limit(limit)
    assert store_of(engine).stats.nbytes == store_of(engine).stats.pasts == 0


def held_bytes() -> int:
    mx.synchronize()
    return mx.get_active_memory()


def test_it_is_given_up_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = engine_of(kind="never"), iter(range(1000))

    def evaluate(*arrays: Any) -> None:
        if next(calls) == CHUNK:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        mx.eval(*arrays)

    written(engine, prompt_of(30, 1))
    monkeypatch.setattr(lane.mx, "async_eval", evaluate)
    result = engine.generate(PROMPT, max_tokens=2 * CHUNK)
    assert result.tokens == expected("llama", PROMPT, 2 * CHUNK)
    assert store_of(engine).stats.pasts == 0


# --- whose it is --------------------------------------------------------------------------------


def test_it_is_one_engines() -> None:
    engine = engine_of()
    written(engine, PROMPT)
    other = Engine(build("llama", seed=1), compiled=False, prefixes=engine.prefixes)
    with pytest.raises(UsageError, match="another engine"):
        other.generate(PROMPT, max_tokens=2)
    with pytest.raises(UsageError, match="max_bytes is -1"):
        PrefixCache(-1)


def test_runs_have_none_unless_it_is_given_and_batches_may_go_without() -> None:
    engine = made("llama", "half")
    engine.prefixes = None
    assert [written(engine, PROMPT).cached_prompt_tokens for _ in range(2)] == [0, 0]
    many = engine.generate_many([PROMPT, PROMPT], max_tokens=2)
    assert [one.cached_prompt_tokens for one in many] == [0, 39]
    assert engine.generate_many([PROMPT], max_tokens=2)[0].cached_prompt_tokens == 0
    engine.prefixes = PrefixCache(0)
    many = engine.generate_many([PROMPT, PROMPT], max_tokens=2)
    assert [one.cached_prompt_tokens for one in many] == [0, 0]


def test_a_row_that_is_cancelled_leaves_it_sound() -> None:
    engine = engine_of()
    batch: Batch = engine.batch(max_rows=2)
    rows = [batch.add(PROMPT, max_tokens=50), batch.add(prompt_of(30, 1), max_tokens=50)]
    for step in range(6):
        if step == 4:
            rows[0].cancel()
        batch.step()
    batch.close()
    for prompt in (PROMPT + rows[0].generation.tokens, prompt_of(30, 1)):
        result = written(engine, prompt)
        assert result.tokens == expected("llama", prompt)
        assert result.cached_prompt_tokens == len(prompt) - 1


# --- on disk ------------------------------------------------------------------------------------

PROMPTS = [PROMPT, PROMPT[:20] + prompt_of(15, 1), prompt_of(30, 2)]


def saved(name: str, folder: Path) -> Engine:
    engine = engine_of(name)
    for prompt in PROMPTS:
        written(engine, prompt)
    store_of(engine).save(folder, engine)
    return engine


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", KINDS)
def test_it_outlasts_a_process(name: str, tmp_path: Path) -> None:
    before = store_of(saved(name, tmp_path)).stats
    engine, notes = engine_of(name), list[str]()
    store_of(engine).load(tmp_path, engine, notes.append)
    assert notes == []
    assert store_of(engine).stats[:3] == before[:3]
    for prompt in PROMPTS:
        result = written(engine, prompt)
        assert result.tokens == expected(name, prompt)
        assert result.cached_prompt_tokens == len(prompt) - 1
    fresh = engine_of(name)
    store_of(fresh).load(tmp_path / "none", fresh, notes.append)
    assert store_of(fresh).stats.pasts == len(notes) == 0


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_process_that_is_killed_leaves_what_is_sound(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = saved(name, tmp_path)
    more = [PROMPT[:10] + prompt_of(20, 3), PROMPTS[2][:25] + prompt_of(20, 4)]  # which split nodes
    for prompt in more:
        written(engine, prompt)
    write, calls = prompt_file.write, iter(range(1000))

    def killed(path: Path, values: dict[str, Any]) -> None:
        if next(calls) == 2:
            (path.parent / "mlxspec-half").write_bytes(b"half a file")
            raise KeyboardInterrupt
        write(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(prompt_file, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            store_of(engine).save(tmp_path, engine)
    later, notes = engine_of(name), list[str]()
    store_of(later).load(tmp_path, later, notes.append)
    assert notes == []
    for prompt in PROMPTS + more:
        assert written(later, prompt).tokens == expected(name, prompt)
    store_of(later).save(tmp_path, later)
    assert not list(tmp_path.rglob("mlxspec-*"))


def test_a_damaged_file_is_told_and_dropped(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path = sorted(tmp_path.rglob("*.past"))[0]
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    engine, notes = engine_of(), list[str]()
    store_of(engine).load(tmp_path, engine, notes.append)
    assert notes == [f"{path} is damaged: its checksum is another: the prompt is read afresh"]
    assert not path.exists()
    for prompt in PROMPTS:
        assert written(engine, prompt).tokens == expected("llama", prompt)


def test_no_more_is_loaded_than_fits_and_the_latest_first(tmp_path: Path) -> None:
    engine = saved("llama", tmp_path)
    everything = store_of(engine).stats.nbytes
    engine.prefixes = PrefixCache(everything // 2)
    engine.prefixes.load(tmp_path, engine)
    assert 0 < engine.prefixes.stats.nbytes <= everything // 2
    taken = [written(engine, prompt).cached_prompt_tokens for prompt in (PROMPTS[2], PROMPTS[0])]
    assert taken == [29, 0]
    before = bytes_on_disk(tmp_path)
    engine.prefixes.save(tmp_path, engine)
    assert bytes_on_disk(tmp_path) < 0.8 * before


def test_other_models_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    other = engine_of("qwen3_next")
    store_of(other).load(tmp_path, other)
    assert store_of(other).stats.pasts == 0
    written(other, PROMPT)
    store_of(other).save(tmp_path, other)
    engine = engine_of("llama")
    store_of(engine).load(tmp_path, engine)
    assert written(engine, PROMPT).cached_prompt_tokens == 39
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MlxspecError, match="cannot be kept"):
        store_of(engine).save(tmp_path / "file", engine)


# --- the tree -----------------------------------------------------------------------------------


class Naive(NamedTuple):
    """A past of a tree without nodes: each has a copy of its own, and bytes are counted anew."""

    tokens: tuple[int, ...]
    rest: int
    cuts: bool


WIDTH = 12  # bytes of a token: two arrays, of one number and of two


def past_of_tokens(one: Naive) -> Kept:
    numbers = mx.array(one.tokens, mx.int32).reshape(1, 1, -1, 1)
    entries = Entries({"0": [numbers, mx.concatenate([-numbers] * 2, axis=3)]}, len(one.tokens))
    return Kept(len(one.tokens), entries, Rest([mx.zeros((one.rest,), mx.int8)], one.cuts))


def bytes_of(pasts: Sequence[Naive]) -> int:
    beginnings = {one.tokens[:end] for one in pasts for end in range(1, len(one.tokens) + 1)}
    return WIDTH * len(beginnings) + sum(one.rest for one in pasts)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def texts() -> Iterator[Any]:
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
    yield tokens
    yield st.builds(Naive, tokens, st.integers(1, 40), st.booleans())


@given(data=st.data(), cap=st.integers(0, 600))
@settings(max_examples=150)
def test_the_tree_does_what_a_list_does(data: st.DataObject, cap: int) -> None:
    tokens, pasts = texts()
    tree, held = PrefixTree(cap), list[Naive]()  # the least recently used one first
    for step in data.draw(st.lists(st.one_of(tokens, pasts), max_size=30)):
        if isinstance(step, Naive):
            added(tree, held, step, cap)
        else:
            found(tree, held, step)
        assert tree.nbytes == bytes_of(held) <= cap
        assert len(tree) == len(held)
        ends = sorted((end for _, end in tree.nodes() if end.rest), key=lambda end: end.used)
        assert [sum((one.tokens for one in end.path()), ()) for end in ends] == [
            one.tokens for one in held
        ]


def added(tree: PrefixTree, held: list[Naive], one: Naive, cap: int) -> None:
    fits = bytes_of([one]) <= cap
    assert tree.add("a", one.tokens, past_of_tokens(one)) == fits
    same = next((other for other in held if other.tokens == one.tokens), None)
    if not fits:
        return
    if same is not None:
        held.remove(same)
        held.append(same)
        return
    while bytes_of([*held, one]) > cap:
        held.pop(0)
    held.append(one)


def found(tree: PrefixTree, held: list[Naive], tokens: tuple[int, ...]) -> None:
    reach = [common(one.tokens, tokens) for one in held]
    usable = [
        (many, one)
        for many, one in zip(reach, held, strict=True)
        if many and (one.cuts or many == len(one.tokens))
    ]
    most = max((many for many, _ in usable), default=0)
    assert tree.covered("a", tokens) == most
    assert tree.common("a", tokens) == max(reach, default=0)
    past = tree.find("a", tokens)
    assert (past is None) == (most == 0)
    if past is None:
        return
    best = [one for many, one in usable if many == most]
    served = next((one for one in best if one.tokens == tokens[:most]), best[-1])
    held.remove(served)
    held.append(served)
    assert past.common == most
    assert past.kept.read == len(served.tokens)
    numbers, twice = past.kept.entries.arrays["0"]
    assert numbers.reshape(-1).tolist() == list(tokens[:most])
    assert twice[..., 1].reshape(-1).tolist() == [-token for token in tokens[:most]]


def test_models_have_trees_of_their_own() -> None:
    tree = PrefixTree(1000)
    tree.add("a", (1, 2), past_of_tokens(Naive((1, 2), 1, cuts=True)))
    assert tree.find("b", (1, 2)) is None
    assert tree.nbytes == 2 * WIDTH + 1
