"""Repositories of the Hugging Face hub: their names, and downloading them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from mlxspec.errors import LoadError
from mlxspec.pairs.contents import in_one_line

MODEL_FILES = (*DEFAULT_ALLOW_PATTERNS, "*.model", "mtp*.safetensors")
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.*)|hf://(.*)")
_NAME = re.compile(r"([^/@]+/[^/@]+)(?:@(.+))?")
_PAGE = re.compile(r"([^/@]+/[^/@]+)(?:@(.+)|/(?:tree|blob|resolve)/([^/]+)(?:/.*)?)?")
_OTHER_KINDS = ("datasets/", "spaces/", "buckets/", "collections/")


@dataclass(frozen=True)
class Repository:
    """A model's name on the hub; `revision` is a branch, a tag or a commit."""

    name: str
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """The name without the organisation, with the revision: name@revision."""
        at = f"@{self.revision}" if self.revision is not None else ""
        return self.name.rpartition("/")[2] + at


def repository_of(location: str) -> Repository | None:
    """The repository that a location names, by name or by address; None for a folder.

    A name may end in a revision: org/name@revision.

    Raises:
        LoadError: it is an address, but not of a model on the hub.
    """
    address = _ADDRESS.fullmatch(location.strip())
    if address is None:
        if "://" in location:
            raise _no_model_at(location)
        name = location.strip().rstrip("/")
        found = None if name.startswith(("/", ".", "~", "package:")) else _NAME.fullmatch(name)
        return found and Repository(found[1], found[2])
    path = re.split(r"[?#]", address[1] or address[2] or "")[0].strip("/")
    page = _PAGE.fullmatch(path.removeprefix("models/") if path.count("/") > 1 else path)
    if page is None or path.startswith(_OTHER_KINDS):
        raise _no_model_at(location)
    return Repository(page[1], page[2] or (page[3] and unquote(page[3])))


def download(repository: Repository, pair_name: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a repository on this machine, once it is there.

    Raises:
        LoadError: the hub does not give it, or cannot be reached.
    """
    with hub_errors(repository, pair_name):
        return snapshot(repository, patterns)


def snapshot(
    repository: Repository, patterns: Sequence[str] = MODEL_FILES, *, here: bool = False
) -> Path:
    """The folder of a repository in the hub's cache, of which offline a part may be missing.

    Whether all that matters is there shows in loading.

    Args:
        here: whether it is only looked for on this machine.
    """
    try:
        return Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=list(patterns),
                local_files_only=here,
            )
        )
    except IncompleteSnapshotError as error:
        if not error.snapshot_path:
            raise
        return Path(error.snapshot_path)


def listing(repository: Repository) -> tuple[str, ...]:
    """The paths of a repository's files on the hub; none where the hub does not tell."""
    # It only makes an error clearer that is raised in any case.
    with suppress(Exception):
        files = HfApi().list_repo_files(repository.name, revision=repository.revision)
        return tuple(files)
    return ()


def _no_model_at(location: str) -> LoadError:
    return LoadError(
        f"{location} is not the address of a model on huggingface.co.",
        hint="Give a repository such as org/name, or a folder.",
    )


@contextmanager
def hub_errors(repository: Repository, pair_name: str) -> Iterator[None]:
    """Say in words what kept a repository from being downloaded."""
    name = repository.name
    what = f"{name} (of the pair {pair_name})"
    try:
        yield
    except GatedRepoError as error:
        raise LoadError(
            f"{what} asks for its licence to be accepted.",
            hint=f"Accept it at https://huggingface.co/{name}, then run `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LoadError(
            f"There is no model {what} on the hub, or it is private.",
            hint="Check the name; for a private one run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise LoadError(
            f"{what} has no revision {repository.revision}.",
            hint=f"Take a branch, a tag or a commit of https://huggingface.co/{name}/commits.",
        ) from error
    except OfflineModeIsEnabled as error:
        raise LoadError(
            f"{what} is not on this machine, and HF_HUB_OFFLINE keeps the hub from being asked.",
            hint=f"Unset HF_HUB_OFFLINE, and run `mlxspec pairs pull {pair_name}`.",
        ) from error
    except LocalEntryNotFoundError as error:
        at = f" --revision {repository.revision}" if repository.revision else ""
        raise LoadError(
            f"{what} is not on this machine, and the hub cannot be reached.",
            hint=f"Connect to the network once and run `hf download {name}{at}`.",
        ) from error
    except (LoadError, OSError) as error:
        # What the hub says comes as an OSError too; one with a number is of this machine's disk.
        if isinstance(error, LoadError) or (error.errno is not None and not _is_response(error)):
            raise
        raise _not_downloaded(what, error) from error
    except Exception as error:  # the HTTP client's own errors have no base in huggingface_hub
        raise _not_downloaded(what, error) from error


def _is_response(error: Exception) -> bool:
    return getattr(error, "response", None) is not None


def _not_downloaded(what: str, error: Exception) -> LoadError:
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if status == 401:
        return LoadError(
            f"{what} needs a login, and the hub refused this machine's.",
            hint="Run `hf auth login` with a token that may read it.",
        )
    if status == 403:
        return LoadError(
            f"This machine's login may not read {what}.",
            hint="Ask its owners for access, or run `hf auth login` with another token.",
        )
    if status == 429:
        return LoadError(
            f"The hub has had too many requests from here, and does not give {what} now.",
            hint="Wait some minutes; what was downloaded is kept. A login raises the limit.",
        )
    return LoadError(
        f"{what} could not be downloaded: {in_one_line(error)}",
        hint="Try again; what was downloaded is kept.",
    )
