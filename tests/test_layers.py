"""A module imports only from a lower layer; what a bare command imports is counted."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlxspec

PACKAGE = Path(mlxspec.__file__).parent

LAYERS = [
    [
        "errors",
        "metrics",
        "control.estimates",
        "drafters.proposals",
        "drafters.suffix",
        "drafters.following",
        "device.lengths",
        "_version",
    ],
    [
        "pairs.table",
        "params",
        "cli.prompts",
        "device.kernels",
        "device.memory",
        "sampling.noise",
        "control.controller",
    ],
    ["control.tuning", "device.compiling", "drafters.history", "drafters.chain", "control.replay"],
    ["measure.forecast"],
    ["control.stopwatch"],
    ["models.caches.original", "models.caches.positional", "device.machine"],
    ["models.caches.hosted", "models.caches.recurrent"],
    ["models.caches.layers", "models.caches.recurrences"],
    ["models.caches.peculiarities"],
    ["models.network", "models.taps"],
    ["cli.options", "sampling.sampler", "models.prefill", "text", "sampling.verify"],
    [
        "bench.dictated",
        "drafters.graph",
        "drafters.vocabulary",
        "models.identity",
        "decode.prompt_file",
    ],
    ["decode.round", "drafters.plugins", "drafters.translation", "decode.prompt_cache"],
    ["decode.pasts"],
    ["decode.session"],
    ["decode.run", "decode.opening"],
    ["decode.engine", "pairs.folders"],
    ["pairs.loading", "measure.timing", "cli.terminal", "measure.audit"],
    ["cli.display", "bench.rounds", "measure.probe"],
    ["bench.texts"],
    ["bench.sampling", "bench.caches", "bench.modes", "bench.long", "cli.report"],
    ["cli.pairs"],
    ["cli.app"],
    ["__main__"],
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that `path` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxspec"):
            name = (node.module or "").removeprefix("mlxspec").lstrip(".")
            found |= {name} | {f"{name}.{alias.name}".strip(".") for alias in node.names}
    return found & RANK.keys()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    if name == "__init__":
        return  # it names everything that is public, each on first use
    if path.stem == "__init__":
        assert not imports_of(path)
        return
    assert name in RANK, f"give {name} a layer"
    upward = {other for other in imports_of(path) if RANK[other] >= RANK[name]}
    assert not upward


@pytest.mark.parametrize(
    "module",
    [
        "metrics",
        "errors",
        "params",
        "pairs.table",
        "cli.display",
        "cli.app",
        "drafters.history",
        "drafters.chain",
    ],
)
def test_what_a_screen_needs_imports_no_mlx(module):
    code = f"import sys, mlxspec.{module}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_are_sorted_and_there():
    assert mlxspec.__all__ == sorted(mlxspec.__all__)
    for name in mlxspec.__all__:
        assert getattr(mlxspec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlxspec.nothing  # noqa: B018
