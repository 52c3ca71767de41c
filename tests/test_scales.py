"""The line about quantised weights that MLX multiplies slowly on a Linux CPU."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from cli_tools import save_model
from conftest import build
from mlx.utils import tree_flatten

from mlxspec.bench.questions.scales import measure
from mlxspec.cli.app import main
from mlxspec.models import scales
from mlxspec.models.scales import why_slow

WIDE = {"hidden_size": 64, "intermediate_size": 64}


def quantised(dtype: mx.Dtype, bits: int = 4, **changes: Any) -> Any:
    model = build("llama", **WIDE, **changes)
    model.set_dtype(dtype)
    nn.quantize(model, group_size=32, bits=bits)
    return model


@pytest.fixture
def linux_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(scales, "on_cpu", lambda: True)


def test_it_names_the_bits_the_type_and_what_helps(linux_cpu: None) -> None:
    assert why_slow([quantised(mx.bfloat16)]) == (
        "a token takes this CPU 5 to 10 times as long with 4-bit weights whose scales are bfloat16 "
        "as with float32 scales: convert the original with mlx_lm.convert --quantize --dtype "
        "float32"
    )
    half = why_slow([quantised(mx.float16, bits=8)])
    assert half is not None
    assert "20 to 60 times as long with 8-bit weights whose scales are float16" in half


def test_one_line_is_about_the_slowest_model(linux_cpu: None) -> None:
    one = why_slow([build("llama"), quantised(mx.bfloat16), quantised(mx.float16)])
    assert one is not None
    assert "float16" in one
    assert "bfloat16" not in one


def test_it_is_silent_where_nothing_is_slow(
    linux_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build("llama")
    plain.set_dtype(mx.bfloat16)
    assert why_slow([plain, quantised(mx.float32)]) is None
    slow = quantised(mx.bfloat16)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert why_slow([slow]) is None
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(scales, "on_cpu", lambda: False)
    assert why_slow([slow]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_model(tmp_path_factory.mktemp("models") / "letters", **WIDE)
    config = json.loads((folder / "config.json").read_text())
    model = quantised(mx.bfloat16, vocabulary=config["vocab_size"])
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "abc", "--max-tokens", "4"),
        ("audit", "abc", "--max-tokens", "4"),
        ("probe", "--budget", "1"),
        ("tune", "--budget", "1"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_it_once(
    command: tuple[str, ...],
    folder: str,
    linux_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def run(*options: str) -> tuple[str, str]:
        options = ("--target", folder, "--draft", folder, "--no-compile", *options)
        monkeypatch.setattr(sys, "argv", ["mlxspec", *command, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capfd.readouterr()

    out, err = run("--json")
    line = next(line for line in err.splitlines() if "5 to 10 times as long" in line)
    assert err.count(line) == 1
    assert json.loads(out)["notes"].count(line) == 1


def test_it_is_true() -> None:
    if platform.system() != "Linux" or not scales.on_cpu():
        pytest.skip("the line is about Linux CPUs")
    times = measure("small-8", repeats=1)["4"]
    assert times["bfloat16"] > 2 * times["float32"]
    assert times["float16"] > times["bfloat16"]
