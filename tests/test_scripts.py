"""A clean copy of the checkout: its scripts, the wheel it builds, and MLX without a backend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from cli_tools import ROOT, assert_one_error, environment

from mlxspec.pairs.table import find_pair

BACKEND = "" if sys.platform == "darwin" else "cpu"
FAKE_UV = """#!/bin/sh
echo "$@" >>"$UV_LOG"
if [ "$1" = venv ]; then
    mkdir -p .venv/bin && ln -sf "$REAL_PYTHON" .venv/bin/python
else
    printf '#!/bin/sh\\necho "ran $*"\\n' >.venv/bin/mlxspec && chmod +x .venv/bin/mlxspec
fi
"""

# Asks every program that is named for help, in one process, and counts the prompts' characters.
PROGRAMS = """
import sys
from mlxspec.bench.__main__ import main
for program in sys.argv[1:]:
    try:
        main([program, "--help"])
    except SystemExit as ended:
        assert not ended.code
from mlxspec.bench.prompt_sets import beginnings
print(sum(map(len, beginnings("python"))))
"""


@pytest.fixture
def copy(tmp_path):
    """What a clone of this checkout would hold, with what is not committed yet."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def surroundings(**changes: str) -> dict[str, str]:
    return {**environment(), "PYTHONPATH": "", **changes}


def script(copy: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    name, *rest = arguments
    return subprocess.run(
        [copy / "scripts" / name, *rest],
        cwd=copy.parent,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# --- scripts/demo and scripts/install ---------------------------------------------------


def test_demo_from_a_clean_copy(copy):
    env = surroundings()
    first = script(copy, "demo", env=env)
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("Setting up .venv")
    # Whether kernels are there already depends on what ran on this machine before, and whether
    # the comparison is worth a line on how fast it is.
    passing = "CPU kernels", "decoding again"
    lines = [line for line in first.stderr.splitlines() if not any(one in line for one in passing)]
    (second,) = (at for at, line in enumerate(lines) if line.startswith("2 of 2: greedy text"))
    assert lines[1].startswith("1 of 2: sampled text")
    assert lines[second - 1] == ""
    for name, shown in (("demo", lines[2 : second - 1]), ("demo-head", lines[second + 1 :])):
        prompt = find_pair(name).prompt.splitlines()
        assert shown[:-1] == ["the pair's own prompt:", *prompt]
        for words in ("output: 160 tokens", "written: ", "compared: ", "the same text"):
            assert words in shown[-1]
    assert "seed 3" in lines[second - 2]
    assert "sampling: greedy" in lines[-1]
    assert first.stdout.strip()

    taken = []
    for _ in range(5):
        started = time.perf_counter()
        again = script(copy, "install", env=env)
        taken.append(time.perf_counter() - started)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert min(taken) < 1

    own = script(copy, "demo", "def f(x):", "--max-tokens", "3", "--no-compile", "--json", env=env)
    assert own.returncode == 0, own.stderr
    assert len(json.loads(own.stdout)["tokens"]) <= 3


@pytest.fixture
def uv(tmp_path):
    """A `uv` that writes down what it is asked for, first on PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(FAKE_UV)
    (tmp_path / "bin" / "uv").chmod(0o755)
    (tmp_path / "uv.log").touch()
    return surroundings(
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        UV_LOG=str(tmp_path / "uv.log"),
        REAL_PYTHON=sys.executable,
        MLXSPEC_BACKEND="",
    ) | ({"MLXSPEC_BACKEND": BACKEND} if BACKEND else {})


def asked_of(uv):
    log = Path(uv["UV_LOG"])
    lines = log.read_text().splitlines()
    log.write_text("")
    return lines


def test_install_uses_uv_where_it_is_and_only_when_needed(copy, uv):
    assert script(copy, "install", env=uv).returncode == 0
    made, installed = asked_of(uv)
    assert made.startswith("venv ")
    assert installed.startswith("pip install ")
    assert installed.endswith("--editable ." + (f"[{BACKEND}]" if BACKEND else ""))

    assert script(copy, "install", env=uv).returncode == 0
    assert asked_of(uv) == []

    assert script(copy, "install", "dev", env=uv).returncode == 0
    (more,) = asked_of(uv)  # into the same .venv
    assert more.endswith("[" + ",".join(filter(None, [BACKEND, "dev"])) + "]")
    for arguments in (["install"], ["install", "dev"]):
        assert script(copy, *arguments, env=uv).returncode == 0
    assert asked_of(uv) == []

    with (copy / "pyproject.toml").open("a") as file:
        file.write("\n# other dependencies\n")
    assert script(copy, "install", env=uv).returncode == 0
    assert len(asked_of(uv)) == 1


def test_install_starts_anew_in_a_folder_that_was_moved(copy, uv):
    assert script(copy, "install", env=uv).returncode == 0
    moved = copy.rename(copy.with_name("moved"))
    asked_of(uv)
    assert script(moved, "install", env=uv).returncode == 0
    assert len(asked_of(uv)) == 2


@pytest.mark.skipif(not BACKEND, reason="there is one backend on macOS")
def test_install_takes_another_backend_and_starts_anew_for_it(copy, uv):
    for backend in ("cpu", "cuda13"):
        assert script(copy, "install", env=uv | {"MLXSPEC_BACKEND": backend}).returncode == 0
        _, installed = asked_of(uv)
        assert installed.endswith(f".[{backend}]")
    refused = script(copy, "install", env=uv | {"MLXSPEC_BACKEND": "cuda11"})
    assert refused.returncode == 1
    assert "cuda11" in refused.stderr


def test_demo_passes_its_arguments_on(copy, uv):
    run = script(copy, "demo", "def f(x):", "--max-tokens", "3", env=uv)
    assert run.stdout == "ran generate def f(x): --max-tokens 3\n"
    sampled, greedy = script(copy, "demo", env=uv).stdout.splitlines()
    assert sampled.startswith("ran generate --temp 0.4 ")
    assert greedy.startswith("ran generate --pair demo-head --temp 0 ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["dev", "dev"], [""]])
def test_install_refuses_other_arguments(copy, uv, arguments):
    run = script(copy, "install", *arguments, env=uv)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("scripts/install: expected nothing or 'dev'")
    assert asked_of(uv) == []


def test_an_installation_that_fails_is_shown_and_tried_again(copy, uv, tmp_path):
    (tmp_path / "bin" / "uv").write_text("#!/bin/sh\necho no network\nexit 1\n")
    for _ in range(2):
        run = script(copy, "demo", env=uv)
        assert run.returncode == 1
        assert "no network" in run.stderr
        assert "the installation failed" in run.stderr
    (tmp_path / "bin" / "uv").write_text(FAKE_UV)
    assert script(copy, "demo", env=uv).returncode == 0


# --- the wheel --------------------------------------------------------------------------


def test_the_wheel_holds_the_table_and_the_demo_pair_and_runs(copy, tmp_path):
    out = str(tmp_path / "dist")
    build = (
        ["uv", "build", "--quiet", "--wheel", "--out-dir", out, str(copy)]
        if shutil.which("uv")
        else [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, str(copy)]
    )
    subprocess.run(build, env=surroundings(), capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"mlxspec/models.toml", "mlxspec/py.typed", "mlxspec/models/shapes.json"} <= names
    for model in ("target", "draft"):
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            assert f"mlxspec/demo/{model}/{file}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mlxspec"}
    (entries,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "mlxspec = mlxspec.__main__:main" in (tmp_path / "site" / entries).read_text()

    (tmp_path / "empty").mkdir()

    def started(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path / "empty",
            env=surroundings(PYTHONPATH=str(tmp_path / "site"), COLUMNS="80"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
        ).stdout

    assert json.loads(started("mlxspec", "pairs", "list", "--json"))[0]["name"] == "demo"
    few = ("--configs", "none", "--types", "code", "--max-tokens", "8", "--minutes", "0.01")
    measured = started("mlxspec", "bench", *few, "--no-compile", "--report", "out", "--json", "-")
    assert json.loads(measured)["pair"]["name"] == "demo"
    assert "<style>" in (tmp_path / "empty" / "out" / "report.html").read_text()
    named = started("mlxspec.bench")
    questions = (ROOT / "mlxspec" / "bench" / "questions").glob("[!_]*.py")
    programs = [path.stem for path in questions if "\ndef main(" in path.read_text()]
    assert all(f"python -m mlxspec.bench {program}\n" in named for program in programs)
    (tmp_path / "empty" / "programs.py").write_text(PROGRAMS)
    helped = started("programs", *programs)
    assert helped.count("Usage:") == len(programs) > 5
    assert int(helped.splitlines()[-1]) > 10_000


# --- MLX without a backend --------------------------------------------------------------


@pytest.fixture
def no_backend(tmp_path):
    """What `pip install mlx` leaves on Linux: a package without its core."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open')\n")
    return environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))


def run_python(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_without_a_backend_says_which_extra(no_backend):
    run = run_python("-m", "mlxspec", "generate", "x", env=no_backend)
    assert_one_error(run, 1)
    for extra in ("mlxspec[cpu]", "cuda12", "cuda13"):
        assert extra in run.stderr
    assert run_python("-m", "mlxspec", "pairs", "list", env=no_backend).returncode == 0


def test_the_library_without_a_backend_says_which_extra(no_backend):
    code = """
from mlxspec import BackendMissing
try:
    from mlxspec import load
except ImportError as error:
    assert type(error) is BackendMissing
    print(error.message, error.hint)
"""
    run = run_python("-c", code, env=no_backend)
    assert run.stderr == ""
    assert "mlxspec[cpu]" in run.stdout
    assert len(run.stdout.splitlines()) == 1
