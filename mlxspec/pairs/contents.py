"""The contents of a model folder, and the one line that says why it cannot be loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

from mlxspec.drafters.heads.recognition import kind_of, other_head
from mlxspec.errors import LoadError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTERS = "adapter_config.json", "adapters.safetensors"
PEFT_ADAPTERS = "adapter_model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.vocab",
)
# Names of weights that mlx-lm does not load, and whose they are.
_OTHERS = {
    "*.gguf": "GGUF",
    "*.npz": "MLX's old npz format",
    "pytorch_model*.bin": "PyTorch's format",
    "*.pth": "PyTorch's format",
    "*.pt": "PyTorch's format",
    "consolidated*.safetensors": "Mistral's own layout",
    PEFT_ADAPTERS: "an adapter of PEFT",
    "*.msgpack": "Flax's format",
    "*.h5": "TensorFlow's format",
    "*.onnx": "ONNX",
    "gptq_model*.safetensors": "GPTQ's own layout",
    "*/*.safetensors": "in folders of their own",
    "*.safetensors": "files that are not named model*.safetensors",
}
_CONVERT = "Take a repository of safetensors, or convert the original with `mlx_lm.convert`."


def require_complete(
    folder: Path, name: str | None = None, others: Callable[[], Collection[str]] = tuple
) -> None:
    """Raise LoadError unless a folder has a configuration, weights and a tokenizer.

    A trained head needs no tokenizer: it reads its target's tokens.

    Args:
        name: what the folder is called in an error; None is its path.
        others: called where the folder has no weights. It gives the files that were left where the
            folder comes from, by their paths there.
    """
    if name is None and not folder.is_dir():
        raise no_folder(folder)
    weights = weight_files(folder)
    if (folder / ADAPTER_CONFIG).exists() and not (weights and (folder / CONFIG).exists()):
        raise _adapter_alone(folder)
    if not weights:
        names = {path.name for path in folder.glob("*")} | set(others())
        _require_no_other_format(name or str(folder), names)
    if not folder.is_dir():  # the folder of a repository of which nothing was downloaded
        raise _no_model(name)
    config = read_json(folder / CONFIG)
    is_head = kind_of(config) is not None
    if not is_head and (other := other_head(config)):
        raise LoadError(
            f"{name or folder} is a head of {other}, which cannot be used here.",
            hint="Use a head of DFlash or DSpark for this target, or a draft model.",
        )
    found = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
    if not (is_head or any(path.exists() for path in found)):
        raise incomplete(min(found, default=folder / "tokenizer.json"))
    if not weights:
        gone = sorted(path for path in folder.glob("model*.safetensors"))
        raise incomplete(gone[0] if gone else folder / "model.safetensors")


def require_weights(name: str, files: Collection[str]) -> None:
    """Raise LoadError unless weights that mlx-lm loads are among a repository's files."""
    if not any(fnmatch(file, "model*.safetensors") for file in files):
        _require_no_other_format(name, set(files))
        raise _no_model(name)


def _no_model(name: str | None) -> LoadError:
    return LoadError(
        f"{name} has no file of a model.",
        hint="Give a repository with a config.json and model*.safetensors.",
    )


def require_adapter(
    folder: Path, name: str | None = None, others: Callable[[], Collection[str]] = tuple
) -> None:
    """Raise LoadError unless a folder has an adapter in mlx-lm's layout.

    Args:
        name, others: as for `require_complete`.
    """
    place = name or str(folder)
    here = folder / ADAPTERS
    if not here.exists() and ((folder / PEFT_ADAPTERS).exists() or PEFT_ADAPTERS in others()):
        raise LoadError(
            f"The adapter in {place} is one of PEFT, which mlx-lm does not apply.",
            hint="Merge it into its model with PEFT, or train it with mlx-lm.",
        )
    if not here.exists() or not (folder / ADAPTER_CONFIG).exists():
        raise LoadError(
            f"{place} has no adapter.",
            hint=f"Give a folder or a repository with {ADAPTER_CONFIG} and {ADAPTERS}.",
        )
    read_json(folder / ADAPTER_CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm takes weights from, by name, without links to nothing."""
    return sorted(path for path in folder.glob("model*.safetensors") if path.is_file())


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise incomplete(path) from error
    except OSError as error:
        raise LoadError(
            f"{path} cannot be read: {error.strerror}.", hint="It must be a file of your own."
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, ValueError("it is not an object"))
    return content


@contextmanager
def named_in_utf8(path: Path) -> Iterator[Path]:
    """`path`, or a link to it where its name is not UTF-8, which MLX and tokenizers ask for."""
    if not any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "link"
        link.symlink_to(path.resolve())
        yield link


def incomplete(path: Path) -> LoadError:
    if path.is_symlink():
        return LoadError(
            f"{path} is a link to a file that is gone.",
            hint="Download the model again; its cache may have been cleaned.",
        )
    return LoadError(
        f"The model folder {path.parent} has no {path.name}.",
        hint="Copy or download the model again; it may be half-written.",
    )


def damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path} is damaged: {in_one_line(error)}.", hint="Copy or download the model again."
    )


def in_one_line(error: Exception) -> str:
    text = str(error).encode("utf-8", "replace").decode()
    return shorten(text, 200, placeholder=" …").rstrip(".") or type(error).__name__


def no_folder(path: Path) -> LoadError:
    if _is_file(path):
        kind = "a GGUF file" if path.suffix == ".gguf" else "a file"
        hint = _CONVERT if path.suffix == ".gguf" else f"Give the folder: {path.parent}"
        return LoadError(f"{path} is {kind}; a model is a folder.", hint=hint)
    name = str(path)[:500]
    return LoadError(
        f"There is no model folder {name if name.isprintable() else repr(name)}.",
        hint="Give a folder with a config.json, or a repository such as org/name.",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _adapter_alone(folder: Path) -> LoadError:
    config = read_json(folder / ADAPTER_CONFIG)
    base = config.get("model") or config.get("base_model_name_or_path") or "its base model"
    return LoadError(
        f"{folder} holds an adapter, and no model.",
        hint=f"Load {shorten(str(base), 100)} as the target, and this folder as its adapter.",
    )


def _require_no_other_format(place: str, names: Collection[str]) -> None:
    """Raise LoadError where the files of a place are weights, but none that mlx-lm loads."""
    paths = [PurePosixPath(name) for name in sorted(names)]
    if any(path.match("model*.safetensors") and path.name == str(path) for path in paths):
        return  # links to nothing, or files that were not downloaded
    for pattern, kind in _OTHERS.items():
        for path in paths:
            if path.match(pattern):
                raise LoadError(
                    f"The weights in {place} are {kind} ({path}), which mlx-lm does not load.",
                    hint=_CONVERT,
                )
