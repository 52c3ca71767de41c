"""The benchmark of heads: its object is what it says, and its table shows all of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mlxspec.bench.__main__ import main
from mlxspec.bench.questions import heads
from mlxspec.bench.questions.heads import COUNTS, KINDS, measure, show
from mlxspec.errors import UsageError


def test_rounds_stand_beside_their_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "COUNTS", COUNTS[:1])
    monkeypatch.setattr(heads, "ROUNDS", 8)
    result = measure("tiny", "bf16", 1, ["qwen3"], compiled=False)
    (target,) = result["targets"]
    assert set(target["heads"]) == set(KINDS)
    for rows in target["heads"].values():
        for row in rows:
            bare = row["block_ms"] + row["target_ms"] + row["context_ms"]
            assert row["round_ms"] > 0
            assert 0.2 < row["round_over_bare"] * bare / row["round_ms"] < 5
    assert [row["draft_tokens"] for row in target["model"]] == [0, 1]
    shown = io.StringIO()
    show(result, Console(file=shown, width=120))
    assert all(word in shown.getvalue() for word in (*KINDS, "model", "qwen3", "/ bare"))


def test_what_does_not_exist_is_one_error() -> None:
    for arguments in (("huge", "bf16", 1), ("tiny", "bf16", 1, ["bert"]), ("tiny", "3bits", 1)):
        with pytest.raises(UsageError, match="There is no"):
            measure(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["heads", "--packing", "9bit"], "There is no packing '9bit'.", "Choose of 2bit, "),
        (["head"], "There is no measurement 'head'.", "Did you mean heads?"),
        (["xyz"], "There is no measurement 'xyz'.", "`python -m mlxspec.bench` lists "),
    ],
)
def test_a_wrong_value_is_one_line_and_a_hint(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    told, advice = capsys.readouterr().err.splitlines()
    assert told == f"error: {message}"
    assert advice.startswith(f"hint:  {hint}")
