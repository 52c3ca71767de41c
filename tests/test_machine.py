"""What figures say of the machine that they come from."""

import mlx.core as mx
import pytest

from mlxspec.bench.environment import concerns
from mlxspec.device import machine, power


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


PMSET = """System-wide power settings:
Currently in use:
 standby              1
 powermode            {mode}
 sleep                1
"""


@pytest.mark.parametrize(("mode", "name"), [(0, "automatic"), (1, "low"), (2, "high"), (9, None)])
def test_the_power_mode_of_a_mac(monkeypatch, mode, name):
    monkeypatch.setattr(power, "on_mac", lambda: True)
    monkeypatch.setattr(power, "_output", lambda *command: PMSET.format(mode=mode))
    assert power.power_mode() == name
    assert power.low_power_mode() == (None if name is None else name == "low")


def test_heat_and_swap_of_a_mac(monkeypatch):
    said = {
        "osascript": "2\n",
        "sysctl": "total = 3072.00M  used = 1234.50M  free = 1837.50M  (encrypted)\n",
        "pmset": "Now drawing from 'Battery Power'\n -InternalBattery-0 80%; discharging\n",
    }
    monkeypatch.setattr(power, "on_mac", lambda: True)
    monkeypatch.setattr(power, "_output", lambda name, *rest: said[name])
    assert power.thermal_state() == "serious"
    assert power.swap_used() == round(1234.5 * 2**20)
    assert power.on_battery() is True
    said.update(osascript="4\n", sysctl="", pmset="")
    assert (power.thermal_state(), power.swap_used(), power.on_battery()) == (None, None, None)


def test_power_and_swap_of_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(power, "on_mac", lambda: False)
    (tmp_path / "AC" / "x").mkdir(parents=True)
    (tmp_path / "AC" / "online").write_text("0\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nSwapTotal:  2000 kB\nSwapFree:  500 kB\n")
    (tmp_path / "governor").write_text("powersave\n")
    monkeypatch.setattr(power, "_SUPPLIES", tmp_path)
    monkeypatch.setattr(power, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(power, "_GOVERNOR", tmp_path / "governor")
    assert power.on_battery() is True
    assert power.swap_used() == 1500 * 1024
    assert power.power_mode() == "powersave"
    assert power.thermal_state() is None
    (tmp_path / "AC" / "online").write_text("1\n")
    assert power.on_battery() is False


def test_what_would_spoil_a_figure_is_said_before_and_behind():
    calm = {"power_mode": "automatic", "on_battery": False, "load": 0.3, "processors": 8}
    calm |= {"thermal_state": "nominal", "swap_bytes": 0}
    assert concerns(calm) == concerns(calm, calm) == []
    for change, word in (
        ({"power_mode": "low"}, "saves power"),
        ({"on_battery": True}, "battery"),
        ({"thermal_state": "serious"}, "is hot (serious)"),
        ({"load": 7.0}, "7.0 of them"),
    ):
        (said,) = concerns(calm | change)
        assert word in said
    (hot,) = concerns(calm, calm | {"thermal_state": "critical", "load": 8.0})
    assert "hot behind the run (critical)" in hot
    (swapped,) = concerns(calm, calm | {"swap_bytes": 2 * 10**8})
    assert "swapped 200 MB" in swapped
    assert concerns({}, {}) == []
