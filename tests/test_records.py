"""What was learned is kept between runs, whatever becomes of the file."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from mlxspec.control import records
from mlxspec.control.estimates import Knowledge, Learned
from mlxspec.control.records import Recommendation, Record, Setting, load_all, recall, remember

SETTING = Setting(
    target="org/big",
    draft="org/small",
    quantisation="4 bits and 4 bits",
    chip="Apple M3 Max",
    backend="metal",
    mlx="0.32.4",
    mlx_lm="0.32.2",
)
LEARNED = Learned({0: {"model": Knowledge((1.0, 1.1, 1.2), (0.8, 0.7, 0.6))}})


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "tuning.json"
    monkeypatch.setattr(records, "file", lambda: path)
    return path


def silent(line: str) -> None:
    raise AssertionError(line)


def test_what_is_remembered_is_recalled() -> None:
    assert recall(SETTING, silent) == Record(SETTING)
    record = Record(SETTING, LEARNED, Recommendation(2, 1.9))
    remember(record, silent)
    assert recall(SETTING, silent) == record
    assert load_all(silent) == [record]


@pytest.mark.parametrize("part", list(vars(SETTING)))
def test_another_setting_knows_nothing(part: str) -> None:
    remember(Record(SETTING, LEARNED), silent)
    other = replace(SETTING, **{part: "another"})
    assert recall(other, silent) == Record(other)
    remember(Record(other), silent)
    assert recall(SETTING, silent).learned == LEARNED


def test_numbers_that_were_not_measured_are_kept_as_such() -> None:
    learned = Learned()
    learned.learn(9, {"model": Knowledge((1.0, None, 1.2), (0.9,))})
    remember(Record(SETTING, learned), silent)
    assert recall(SETTING, silent).learned == learned


def test_what_several_texts_have_shown_is_kept_by_their_number() -> None:
    learned = Learned()
    learned.learn(9, {"model": Knowledge((1.0, 1.1), (0.9,))})
    learned.learn(9, {"model": Knowledge((2.0, None, None, 4.5), (0.8,))}, rows=4)
    learned.learn(9_000, {"text": Knowledge((3.0, 3.5))}, rows=8)
    remember(Record(SETTING, learned), silent)
    assert recall(SETTING, silent).learned == learned
    assert recall(SETTING, silent).learned.at(9, 4)["model"].costs == (2.0, None, None, 4.5)


def test_records_from_before_texts_were_written_together_are_read(kept: Path) -> None:
    remember(Record(SETTING, LEARNED, Recommendation(2, 1.9)), silent)
    content = json.loads(kept.read_text())
    del content["records"][0]["beside"]
    kept.write_text(json.dumps(content | {"format": 1}))
    assert recall(SETTING, silent) == Record(SETTING, LEARNED, Recommendation(2, 1.9))
    remember(Record(SETTING, LEARNED), silent)
    assert json.loads(kept.read_text())["format"] == records.FORMAT


def test_a_verdict_stays_until_there_is_another() -> None:
    verdict = Recommendation(2, 1.9)
    remember(Record(SETTING, LEARNED, verdict), silent)
    remember(Record(SETTING, Learned()), silent)
    assert recall(SETTING, silent) == Record(SETTING, Learned(), verdict)
    remember(Record(SETTING, LEARNED, Recommendation(0, 1.0)), silent)
    assert recall(SETTING, silent).recommendation == Recommendation(0, 1.0)


DAMAGED = [
    "",
    "{",
    "[]",
    '{"format": 1}',
    '{"format": "1", "records": []}',
    '{"format": 1, "records": [{}]}',
    '{"format": 1, "records": [1]}',
    "\x00\x01",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_set_aside(kept: Path, content: str) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    said: list[str] = []
    assert recall(SETTING, said.append) == Record(SETTING)
    assert "damaged" in said[0]
    remember(Record(SETTING, LEARNED), said.append)
    assert recall(SETTING, silent).learned == LEARNED
    (aside,) = kept.parent.glob("*damaged*")
    assert aside.read_text() == content
    assert aside.name in said[1]


@pytest.mark.parametrize("value", ["nan", 0, -1, "x", [1]])
def test_numbers_that_cannot_be_are_damage(kept: Path, value: object) -> None:
    remember(Record(SETTING, LEARNED), silent)
    content = json.loads(kept.read_text())
    content["records"][0]["learned"]["0"]["model"]["costs"][1] = value
    kept.write_text(json.dumps(content))
    said: list[str] = []
    assert recall(SETTING, said.append) == Record(SETTING)
    assert said


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_what_could_not_be_read_again_is_not_kept(kept: Path, value: float) -> None:
    remember(Record(SETTING, LEARNED), silent)
    said: list[str] = []
    remember(Record(SETTING, Learned({0: {"model": Knowledge((1.0, value), ())}})), said.append)
    assert said == ["what was learned is not kept: costs and rates are numbers above 0"]
    assert recall(SETTING, silent).learned == LEARNED


def test_a_file_of_a_newer_version_is_left_alone(kept: Path) -> None:
    kept.parent.mkdir()
    content = json.dumps({"format": records.FORMAT + 1, "records": "other"})
    kept.write_text(content)
    said: list[str] = []
    remember(Record(SETTING, LEARNED), said.append)
    assert kept.read_text() == content
    assert "newer" in said[0]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(records, "file", lambda: tmp_path / "file" / "tuning.json")
    said: list[str] = []
    remember(Record(SETTING, LEARNED), said.append)
    assert "could not be kept" in said[0]


def test_a_write_that_fails_leaves_what_was_there(kept: Path, monkeypatch) -> None:
    remember(Record(SETTING, LEARNED), silent)
    before = kept.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlxspec.files.os.fsync", full)
    said: list[str] = []
    remember(Record(replace(SETTING, target="other"), LEARNED), said.append)
    assert "No space left" in said[0]
    assert kept.read_text() == before
    assert sorted(path.name for path in kept.parent.iterdir()) == ["tuning.json", "tuning.lock"]


def _remember_many(path: Path, worker: int) -> None:
    records.file = lambda: path  # type: ignore[assignment]
    for i in range(20):
        remember(Record(replace(SETTING, target=f"{worker} {i}"), LEARNED), silent)


def test_two_processes_lose_nothing_of_each_other(kept: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_remember_many, args=(kept, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(load_all(silent)) == 40
