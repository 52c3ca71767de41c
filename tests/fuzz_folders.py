"""Model folders that went wrong at random: one clear error each, or the text of the whole folder.

    python tests/fuzz_folders.py --count 1000 [--seed SEED]
    python tests/fuzz_folders.py --seconds 60

Each mutation leaves the meaning as it was, or breaks it. So a folder that loads after one that
leaves the meaning has to write the same text; after the others whatever is raised must be one of
mlxspec's errors, in one line. The suite runs it for a few seconds (test_fuzz_folders.py).
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from cli_tools import save_model

from mlxspec.errors import MlxspecError
from mlxspec.pairs.check import Finding, check
from mlxspec.pairs.loading import load
from mlxspec.pairs.overview import overview
from mlxspec.pairs.table import Pair

PATIENCE_S = 60
VALUES = [None, 0, -1, 3, 10**30, 0.5, "", "many", [], [1], {}, {"factor": 2}, True, float("nan")]
KEYS = ["rope_scaling", "quantization", "quantization_config", "model_file", "auto_map"]
KEYS += ["eos_token_id", "text_config", "layer_types", "head_dim", "architectures"]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Mutation:
    """A change of a folder. keeps: whether the folder means what it did."""

    change: Callable[[Path, random.Random], None]
    keeps: bool = False


def edited(name: str) -> Callable[[Path, random.Random], None]:
    """Change a key of a JSON file, at any depth, to anything, or leave it out."""

    def change(folder: Path, rng: random.Random) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        place = content
        while (inner := [one for one in place.values() if isinstance(one, dict)]) and (
            rng.random() < 0.5
        ):
            place = rng.choice(inner)
        key = rng.choice(sorted(place) + KEYS)
        place[key] = rng.choice(VALUES)
        if rng.random() < 0.3:
            del place[key]
        path.write_text(json.dumps(content))

    return change


def cut(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flipped(folder: Path, rng: random.Random) -> None:
    """Change a byte of a file that is not the weights' numbers."""
    path = rng.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    if content:
        end = min(len(content), 3000) if path.suffix == ".safetensors" else len(content)
        content[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(content)


def removed(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def templated(folder: Path, rng: random.Random) -> None:
    texts = ["{{", "{% raise %}", "{{ messages[9].content }}", "\0", "{% for m in messages %}"]
    (folder / "chat_template.jinja").write_text(rng.choice(texts))


def tensors(folder: Path, rng: random.Random) -> None:
    """Leave a tensor out, rename it, or give it another shape or type."""
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    name = rng.choice(sorted(arrays))
    array = arrays.pop(name)
    others = [array[:-1], array[None], array.astype(mx.uint8), array.astype(mx.uint32)]
    if rng.random() < 0.6:
        arrays[rng.choice([name, name + "x"])] = rng.choice(others)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def indexed(folder: Path, rng: random.Random) -> None:
    """An index of files that are not there, or of nothing."""
    if (folder / INDEX).exists():  # it decides between sets of weights, and must stay
        return
    names = list(mx.load(str(folder / "model.safetensors")))
    texts: list[Any] = ["{", {}, {"weight_map": {}}, {"weight_map": [1]}]
    texts += [{"weight_map": {name: f"model-{rng.randrange(9)}.safetensors" for name in names}}]
    text = rng.choice(texts)
    (folder / INDEX).write_text(text if isinstance(text, str) else json.dumps(text))


def sharded(folder: Path, rng: random.Random) -> None:
    """Shards with an index, beside wrong weights that it does not name."""
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    count = rng.randrange(1, 4)
    files = {
        name: f"model-{1 + rng.randrange(count):05}-of-{count:05}.safetensors" for name in arrays
    }
    for file in set(files.values()):
        part = {name: x if files[name] == file else x + 1 for name, x in arrays.items()}
        mx.save_safetensors(str(folder / file), part)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    wrong = {name: array + 1 for name, array in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), wrong)


def beside(folder: Path, rng: random.Random) -> None:
    """Files that are none of the model's."""
    name = rng.choice(["m.gguf", "x.npz", "tekken.json", "adapters.safetensors", "a.bin", "[1]"])
    (folder / name).write_bytes(rng.randbytes(20))


def swollen(folder: Path, rng: random.Random) -> None:
    """A header that promises more than the file has, or than any machine has."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        size = rng.choice([2**63 - 1, 2**40, length + 10**6, 0, 1])
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        return
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    entry["shape"] = rng.choice([[2**40, 2**40], [-1, 4], [2**62], [], ["a"], None])
    if rng.random() < 0.5:
        entry["data_offsets"] = rng.choice([[0, 2**62], [10, 5], [-8, 0], [0], "x", None])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def nested(folder: Path, rng: random.Random) -> None:
    """A JSON file whose brackets no reader's stack has room for."""
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    (folder / rng.choice(files)).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled(folder: Path, rng: random.Random) -> None:
    """A pickle under a name that some library loads, which must stay closed."""
    names = ["pytorch_model.bin", "model.pkl", "tokenizer.pkl", "training_args.bin", "vocab.pkl"]
    (folder / rng.choice(names)).write_bytes(pickle.dumps(Trap(folder.parent / "sprung")))


MUTATIONS = [
    *(Mutation(edited(name)) for name in ("config.json", "tokenizer_config.json")),
    *(Mutation(edited(name)) for name in ("tokenizer.json", "generation_config.json")),
    *(Mutation(change) for change in (cut, flipped, removed, templated, tensors)),
    *(Mutation(change) for change in (swollen, nested)),
    *(Mutation(change, keeps=True) for change in (indexed, sharded, beside, pickled)),
]


@contextmanager
def no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"a folder took more than {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def text_of(folder: Path) -> str:
    with no_hang():
        engine = load(Pair("fuzzed", str(folder)), speculation=False)
        return engine.generate([1, 2, 3], max_tokens=4).text


def looked_at(whole: Path, folder: Path) -> None:
    """What commands look at before they load: each ends, and says all of it in lines."""
    with no_hang():
        overview(Pair("fuzzed", str(folder), str(whole)), ())
        for pair in (Pair("a", str(whole), str(folder)), Pair("b", str(folder), str(whole))):
            try:
                found = check(pair).findings
            except MlxspecError as error:
                found = (Finding("✗", "target", f"{error.message} {error.hint}"),)
            assert all("\n" not in one.words for one in found), found


def tried(whole: Path, expected: str, seed: int) -> bool:
    """Whether a folder with one or two mutations loads; asserts that it is right, or one error."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="mlxspec-fuzz-") as place:
        folder = Path(shutil.copytree(whole, Path(place) / rng.choice(["model", "m[1]", "m *"])))
        keeps = True
        for mutation in rng.sample(MUTATIONS, 1 if rng.random() < 0.7 else 2):
            # A second mutation may find a folder that it cannot read any more.
            with nullcontext() if keeps else suppress(Exception):
                mutation.change(folder, rng)
            keeps = keeps and mutation.keeps
        refusal = None
        try:
            if rng.random() < 0.3:
                looked_at(whole, folder)
            text = text_of(folder)
        except MlxspecError as error:
            refusal = f"{error.message} {error.hint}"
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        assert not (folder.parent / "sprung").exists(), f"seed {seed}: a pickle was loaded"
        if refusal is not None:
            assert "\n" not in refusal, f"seed {seed}: {refusal}"
            assert not keeps, f"seed {seed}: a whole folder does not load: {refusal}"
            return False
        assert not keeps or text == expected, f"seed {seed}: {text!r}, and not {expected!r}"
        return True


def fuzz(
    seconds: float, first: int = 0, count: int | None = None, tell: Callable[[str], object] = len
) -> tuple[int, int]:
    """How many folders were tried, and how many of them loaded.

    Args:
        first: the seed of the first. count: of folders, in place of the time.
        tell: called with a line after each hundred.
    """
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="mlxspec-fuzz-") as place:
        whole = save_model(Path(place) / "whole")
        expected = text_of(whole)
        done = loaded = 0
        while done < count if count is not None else time.monotonic() < until or not done:
            loaded += tried(whole, expected, first + done)
            done += 1
            if done % 100 == 0:
                tell(f"{done} folders, of which {loaded} loaded")
    return done, loaded


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--count", type=int)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    tried_folders, loaded_folders = fuzz(
        chosen.seconds, chosen.seed, chosen.count, partial(print, flush=True)
    )
    print(f"{tried_folders} folders, of which {loaded_folders} loaded")
