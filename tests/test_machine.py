"""What figures say of the machine that they come from."""

import mlx.core as mx

from mlxspec.device import machine


def test_what_a_figure_depends_on(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    about = machine.about()
    assert {"processor", "device", "mlx", "mlx-lm", "python"} < set(about)
    assert str(mx.default_device()) in machine.described(about)
    assert "preloaded" not in about


def test_a_library_that_was_loaded_first_is_named_without_its_folder(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/some/where/libopenblas.so.0")
    about = machine.about()
    assert about["preloaded"] == "libopenblas.so.0"
    assert machine.described(about).endswith(", libopenblas.so.0")
    assert "where" not in str(about)
