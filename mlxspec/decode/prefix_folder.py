"""The pasts of a prefix cache on disk: a file for each node of the tree, written whole or not.

A folder has a folder for each setting, that is for each combination of models, tokenizer and
versions. A save removes what is gone and writes what is new, so whatever a process that was killed
leaves is sound: what lacks its file, or a file of a node above it, is read again from the prompt.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec.decode import prompt_file
from mlxspec.decode.prefix_tree import Node, PrefixTree
from mlxspec.decode.prompt_file import Damaged, Unusable
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Tell
from mlxspec.models.identity import Identity
from mlxspec.models.kept import Entries, Rest

ENDING = ".past"


def save(tree: PrefixTree, folder: Path, identity: Identity) -> None:
    """Make the folder's part for this setting what the tree is.

    Raises:
        MlxspecError: it cannot be written. What was written before that is sound.
    """
    home = folder / _digest(repr(identity))
    nodes = {_file_name(name, node): (name, node) for name, node in tree.nodes()}
    try:
        home.mkdir(parents=True, exist_ok=True)
        for path in home.iterdir():  # first, so that no more is there than the tree may have
            if path.name not in nodes:
                path.unlink()
        for file, (name, node) in nodes.items():
            if not (home / file).exists():
                prompt_file.write(home / file, _values(name, node))
        now_ns = time.time_ns()
        for rank, file in enumerate(sorted(nodes, key=lambda one: nodes[one][1].last_used)):
            os.utime(home / file, ns=(now_ns + rank, now_ns + rank))
    except OSError as error:
        raise MlxspecError(
            f"The prefix cache cannot be kept in {folder}: {error.strerror}.",
            hint="Make room there, or name another folder.",
        ) from error


def load(tree: PrefixTree, folder: Path, identity: Identity, tell: Tell) -> None:
    """Add what the folder has for this setting, the latest used first where not all of it fits.

    Args:
        tell: gets a line for each file that cannot be used; one of ours is removed.
    """
    home = folder / _digest(repr(identity))
    try:
        files = [path for path in home.iterdir() if path.suffix == ENDING] if home.exists() else []
        files.sort(key=lambda path: path.stat().st_mtime_ns)
    except OSError as error:
        tell(f"the prefix cache in {folder} cannot be read ({error.strerror})")
        return
    ranks = {path: rank - len(files) for rank, path in enumerate(files)}  # older than all others
    for path in sorted(files):  # a node comes after those above it
        try:
            name, tokens, entries, rest = _read(path)
        except Unusable as error:
            tell(f"{path} {error}: the prompt is read afresh")
            if error.ours:
                with suppress(OSError):
                    path.unlink()
            continue
        tree.restore(name, tokens, entries, rest, used=ranks[path])
    tree.prune()


def _file_name(name: str, node: Node) -> str:
    """A name by what the node has. Those above it come first in order."""
    tokens = [token for one in node.path() for token in one.tokens]
    ends = "end" if node.rest is not None else "way"
    start = len(tokens) - len(node.tokens)
    return f"{start:08}-{len(tokens):08}-{ends}-{_digest(f'{name} {tokens}')}{ENDING}"


def _values(name: str, node: Node) -> dict[str, Any]:
    tokens = [token for one in node.path() for token in one.tokens]
    return {
        "name": name,
        "tokens": mx.array(tokens, mx.int32),
        "arrays": node.entries.arrays,
        "length": node.entries.length,
        "rest": node.rest,
    }


def _read(path: Path) -> tuple[str, list[int], Entries, Rest | None]:
    """The name of a model, the tokens up to the end of a node, and what the node has.

    Raises:
        Unusable: see `prompt_file.read`.
    """
    values = prompt_file.read(path)
    try:
        if values is None:
            raise Unusable("is gone")
        rest = None if values["rest"] is None else Rest(*values["rest"])
        entries = Entries(values["arrays"], values["length"])
        tokens = values["tokens"].tolist()
        if not 0 < entries.length <= len(tokens):
            raise Damaged("is no part of a prefix cache")
        return values["name"], tokens, entries, rest
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged("is no part of a prefix cache") from error


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()
