"""The page about the library is one program, and it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlxspec import Engine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "library.md"


def test_the_snippets_run_from_top_to_bottom(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "kernels_missing", lambda _: False)  # building them takes seconds
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(snippets) > 12
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert "identical" in capsys.readouterr().out
