"""A room imports only from the rooms that it may use; what a bare command imports is counted."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlxspec

PACKAGE = Path(mlxspec.__file__).parent

# Which rooms each room may use, beside the modules of the root; docs/structure.md says it in words.
MODELS = {"device"}
DRAFTERS = MODELS | {"models", "sampling"}
CONTROL = {"drafters"}
DECODE = DRAFTERS | {"drafters", "control"}
PAIRS = DECODE | {"decode"}
MEASURE = PAIRS
BENCH = PAIRS | {"pairs", "measure"}
CASCADE = BENCH
SERVE = CASCADE | {"cascade"}
PROTOCOL = SERVE | {"serve.core", "serve.protocol"}
USES: dict[str, set[str]] = {
    "chat": set(),
    "device": set(),
    "sampling": set(),
    "models": MODELS,
    "drafters": DRAFTERS,
    "control": CONTROL,
    "decode": DECODE,
    "pairs": PAIRS,
    "measure": MEASURE,
    "bench": BENCH | {"chat"},
    "cascade": CASCADE,
    "serve.core": SERVE,
    "serve.protocol": SERVE | {"serve.core"},
    "serve.openai": PROTOCOL,
    "serve.anthropic": PROTOCOL,
    "serve.own": PROTOCOL,
    "serve": PROTOCOL | {"serve.openai", "serve.anthropic", "serve.own"},
    "cli": SERVE | {"serve", "serve.core", "chat", "bench"},
}
ROOT = {
    "_version",
    "calling",
    "chats",
    "controls",
    "conversations",
    "defaults",
    "errors",
    "files",
    "host",
    "markup",
    "metrics",
    "params",
    "parked",
    "pieces",
    "reasoning",
    "spelling",
    "templates",
    "text",
    "tokens",
}
FACADES = {"__init__", "__main__"}  # they name what is public, and the command


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that `path` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlxspec"):
            name = (node.module or "").removeprefix("mlxspec").lstrip(".")
            found |= {name} | {f"{name}.{alias.name}".strip(".") for alias in node.names}
    return found & MODULES.keys()


def room_of(name: str) -> str:
    """The package of a module, or the first part of it where packages inside have no rules."""
    package = name.rpartition(".")[0]
    return package if package in USES else package.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_room_uses_what_it_may(name):
    room = room_of(name)
    if name in FACADES:
        return
    assert room in USES if room else name in ROOT, f"give {name} a room"
    others = {room_of(other) for other in imports_of(MODULES[name])} - {"", room}
    assert others <= (USES[room] if room else set())
    if name.endswith("__init__"):
        assert not imports_of(MODULES[name]), "who imports a room need not wait for all of it"


def test_no_module_imports_itself_by_way_of_others():
    uses = {name: imports_of(path) for name, path in MODULES.items() if name not in FACADES}
    assert len(list(TopologicalSorter(uses).static_order())) == len(uses)


@pytest.mark.parametrize(
    "module",
    [
        "chat.sending",
        "cli.app",
        "cli.screen.display",
        "control.controller",
        "drafters.history",
        "drafters.text_drafters",
        "errors",
        "metrics",
        "pairs.table",
        "params",
    ],
)
def test_what_a_screen_needs_imports_no_mlx(module):
    code = f"import sys, mlxspec.{module}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_are_sorted_and_there():
    assert mlxspec.__all__ == sorted(mlxspec.__all__)
    page = (PACKAGE.parent / "docs" / "library.md").read_text()
    for name in mlxspec.__all__:
        assert getattr(mlxspec, name) is not None
        assert re.search(rf"\b{name}\b", page), f"docs/library.md does not show {name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlxspec.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_files_classes_and_functions_are_short(name):
    text = MODULES[name].read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            assert sum(not one.name.startswith("_") for one in methods) <= 15, node.name
        elif isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
