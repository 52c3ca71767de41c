"""Somebody else's process stays as it was, whatever mlx-lm does when it is imported."""

import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cli_tools import environment

from mlxspec import host

# With a hard limit below what mlx-lm asks for, and in a process that wants its own limit.
PROGRAM = """
import importlib.util, os, resource, signal, sys

def kept():
    limits = {name: resource.getrlimit(getattr(resource, name))
              for name in dir(resource) if name.startswith("RLIMIT")}
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    return limits, dict(os.environ), handlers, resource.setrlimit

resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
before = kept()
import mlxspec
assert importlib.util.find_spec("mlx_lm")  # who only looks changes nothing
assert "mlx_lm" not in sys.modules
assert mlxspec.Engine and mlxspec.load
assert "mlx_lm" in sys.modules
assert kept() == before
assert not any(type(one).__module__.startswith("mlxspec") for one in sys.meta_path)
"""


def test_limits_and_surroundings_are_those_of_the_host() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.fixture
def few_files() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_command_raises_its_own_limit_and_lowers_none(few_files: int) -> None:
    host.allow_open_files(300)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, few_files)
    host.allow_open_files(250)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, few_files)
    if few_files != resource.RLIM_INFINITY:
        host.allow_open_files(few_files + 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (few_files, few_files)
