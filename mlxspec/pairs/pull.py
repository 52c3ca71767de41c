"""Downloading repositories: what is missing, whether it fits on the disk, and going on after a cut.

huggingface_hub begins a file anew where a download was ended. Weights are gigabytes, so they are
downloaded here: into a file of the hub's cache that is named as unfinished, until all of its bytes
are there and have the right checksum. Everything else is left to `snapshot_download`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    filter_repo_objects,
    get_session,
    hf_raise_for_status,
)

from mlxspec.errors import LoadError
from mlxspec.pairs.contents import require_weights
from mlxspec.pairs.hub import MODEL_FILES, Repository, download, hub_errors

TRIES = 5  # of a file, each from where the last one ended
WAIT_S = 1.0  # before the next of them
LONGEST_WAIT_S = 60.0  # that a hub may ask for
SPARE = 256 * 2**20  # bytes that a disk keeps free
_BUSY = (408, 429, 500, 502, 503, 504)


class File(NamedTuple):
    """A file of a repository. blob: where the hub's cache keeps its bytes. sha256: of weights."""

    path: str
    size: int
    blob: Path
    sha256: str | None

    @property
    def part(self) -> Path:
        """Where its bytes are until all of them are there."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def done(self) -> int:
        """Bytes that are on this machine."""
        if self.blob.exists():
            return self.size
        return min(self.part.stat().st_size, self.size) if self.part.exists() else 0


Tell = Callable[[File, int], None]  # the bytes of a file that are there


@dataclass(frozen=True)
class Plan:
    """A repository at a commit, and its files that a model needs."""

    repository: Repository
    pair: str
    commit: str
    files: tuple[File, ...]
    patterns: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are still to be downloaded."""
        return sum(file.size - file.done for file in self.files)


def plan(repository: Repository, pair: str, patterns: Sequence[str] = MODEL_FILES) -> Plan:
    """Ask the hub for the files of a repository.

    Raises:
        LoadError: the hub does not give it, or cannot be reached; or it has no weights.
    """
    with hub_errors(repository, pair):
        api = HfApi()
        commit = str(api.model_info(repository.name, revision=repository.revision).sha)
        entries = {
            one.path: one
            for one in api.list_repo_tree(repository.name, recursive=True, revision=commit)
            if isinstance(one, RepoFile)
        }
    if patterns == MODEL_FILES:
        require_weights(repository.name, entries)
    blobs = cache_folder(repository) / "blobs"
    wanted = filter_repo_objects(entries, allow_patterns=list(patterns))
    return Plan(
        repository,
        pair,
        commit,
        tuple(_file(entries[path], blobs) for path in wanted),
        (*patterns,),
    )


def _file(entry: RepoFile, blobs: Path) -> File:
    sha256 = entry.lfs.sha256 if entry.lfs is not None else None
    size = entry.lfs.size if entry.lfs is not None else entry.size
    return File(entry.path, size, blobs / (sha256 or entry.blob_id), sha256)


def cache_folder(repository: Repository) -> Path:
    """The folder of a repository in the hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}"


def require_space(plans: Sequence[Plan]) -> tuple[int, int]:
    """The bytes that plans still need, and those that are free where they go.

    Raises:
        LoadError: they do not fit.
    """
    needed, free = sum(one.missing for one in plans), free_space()
    if needed and needed + SPARE > free:
        raise LoadError(
            f"{gigabytes(needed)} are to be downloaded, and {gigabytes(free)} are free in "
            f"{constants.HF_HUB_CACHE}.",
            hint="Free space there (`mlxspec pairs rm NAME`), or set HF_HOME to another disk.",
        )
    return needed, free


def free_space() -> int:
    """Bytes that are free where the hub's cache is, or will be."""
    place = Path(constants.HF_HUB_CACHE).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def gigabytes(size: float) -> str:
    """Bytes in words, in the unit that downloads are counted in."""
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def pull(todo: Plan, tell: Tell = lambda file, done: None) -> Path:
    """Download what is missing of a repository; the folder of its snapshot.

    Whenever it ends early, all that was downloaded is kept, and nothing half-written is taken for
    whole.

    Args:
        tell: called with a file and the bytes of it that are there, as they come.

    Raises:
        LoadError: the hub does not give it, or the connection was lost again and again.
        OSError: the disk is full, or cannot be written to.
    """
    with hub_errors(todo.repository, todo.pair):
        for file in todo.files:
            if file.sha256 is not None and not file.blob.exists():
                _pull_file(file, todo, tell)
    folder = download(todo.repository, todo.pair, todo.patterns)
    for file in todo.files:
        tell(file, file.size)
    return folder


def _pull_file(file: File, todo: Plan, tell: Tell) -> None:
    """Download one file behind a lock, so that a second process waits for the first."""
    file.part.parent.mkdir(parents=True, exist_ok=True)
    with file.part.open("ab+") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        if file.blob.exists():  # another process was quicker
            file.part.unlink(missing_ok=True)
            return
        if part.seek(0, 2) > file.size:
            part.truncate(0)
        for left in reversed(range(TRIES)):
            try:
                _stream(file, todo, part, tell)
                break
            except Exception as error:  # the HTTP client's own have no base in huggingface_hub
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise _disk_is_full(file) from error
                if not left or not (wait_s := _wait_s(error)):
                    raise
                time.sleep(wait_s)
        _verify(file, part)
        file.part.replace(file.blob)


def _disk_is_full(file: File) -> LoadError:
    return LoadError(
        f"The disk with {constants.HF_HUB_CACHE} is full: {gigabytes(file.done)} of {file.path}, "
        f"{gigabytes(file.size)}, are there, and are kept.",
        hint="Free space there (`mlxspec pairs rm NAME`), and run the command again.",
    )


def _wait_s(error: Exception) -> float:
    """Seconds until another try may succeed; 0 where none will."""
    if isinstance(error, OSError) and error.errno is not None:  # of the disk
        return 0.0
    response = getattr(error, "response", None)
    if response is None:
        return WAIT_S  # the connection was cut
    if response.status_code not in _BUSY:
        return 0.0
    asked = str(response.headers.get("Retry-After", ""))
    return min(max(float(asked), WAIT_S), LONGEST_WAIT_S) if asked.isdecimal() else WAIT_S


def _stream(file: File, todo: Plan, part: IO[bytes], tell: Tell) -> None:
    """Append the bytes that are missing; raises where the connection ends before they are there."""
    done = part.seek(0, 2)
    if done == file.size:
        return
    url = hf_hub_url(todo.repository.name, file.path, revision=todo.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # all of it comes again
            part.truncate(0)
            done = 0
        for piece in response.iter_raw():
            part.write(piece)
            done += len(piece)
            tell(file, done)
    part.flush()
    if done < file.size:
        raise ConnectionResetError(f"{file.path} ended after {done} of {file.size} bytes")


def _verify(file: File, part: IO[bytes]) -> None:
    part.flush()
    part.seek(0)
    found = hashlib.file_digest(part, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != file.sha256:
        part.truncate(0)
        raise LoadError(
            f"{file.path} was downloaded, but its checksum is wrong.",
            hint="Run the command again: that file is downloaded anew.",
        )


# --- taking away ------------------------------------------------------------------------


def cached_size(repository: Repository) -> int:
    """Bytes that a repository takes in the hub's cache, at all revisions."""
    blobs = cache_folder(repository) / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*") if path.is_file())


def remove(repository: Repository) -> int:
    """Take a repository out of the hub's cache; the bytes that were freed."""
    freed = cached_size(repository)
    shutil.rmtree(cache_folder(repository), ignore_errors=True)
    locks = Path(constants.HF_HUB_CACHE) / ".locks" / cache_folder(repository).name
    shutil.rmtree(locks, ignore_errors=True)
    return freed
