"""results.json: what is written is what is read, and anything else is one clear error."""

import json

import pytest

from mlxspec.bench import results
from mlxspec.bench.cells import Acceptance, Cell, Configuration, Sample, Source
from mlxspec.bench.results import Drift, Recommendation, Remark, Results, Shape
from mlxspec.bench.statistics import Interval
from mlxspec.errors import UsageError

THREE = Configuration(name="3", draft_tokens=3)


def made(**others):
    sample = Sample(
        turn=0,
        place=1,
        at_s=0.5,
        prompt="code-1",
        prompt_tokens=7,
        tokens=1,
        tokens_per_second=None,
        ttft_s=0.1,
        total_s=0.2,
    )
    acceptance = Acceptance(
        rounds=4,
        drafted=12,
        accepted=9,
        rate=0.75,
        tokens_per_round=3.25,
        drafted_by_position=(4, 4, 4),
        accepted_by_position=(4, 3, 2),
        by_source={"model": Source(rounds=4, drafted=12, accepted=9)},
    )
    cell = Cell(
        question="prompts",
        configuration=THREE,
        prompt_type="code",
        samples=(sample,),
        acceptance=acceptance,
        speedup=Interval(median=2.0, low=1.9, high=2.1),
    )
    return Results(
        created="2026-01-01T00:00:00+00:00",
        finished=True,
        seconds=1.5,
        machine={"system": "Linux"},
        settings={"configs": ["none", "3"]},
        prompts_hash="0" * 64,
        pair={"name": "demo"},
        drift=Drift(at_s=(0.0,), tokens_per_second=(50.0,)),
        cells=(cell,),
        shape=(Shape(target="llama-8b:4bit", plain_s=0.1),),
        recommendation=Recommendation(configuration=THREE, speedup=cell.speedup, words="Use 3."),
        warnings=(Remark(kind="slow", words="Slow."),),
        **others,
    )


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(made().as_json(), encoding="utf-8")
    assert results.read(path) == made()


def changed(place, value):
    whole = json.loads(made().as_json())
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(whole)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["schema"], 2, "has schema 2; this version reads schema 1"),
        (["schema"], True, "schema must be a whole number, and is True"),
        (["finished"], 1, "finished must be true or false, and is 1"),
        (["seconds"], "long", "seconds must be a number, and is 'long'"),
        (["seconds"], float("nan"), "seconds must be a number, and is nan"),
        (["cells"], {}, "cells must be a list"),
        (["cells", 0], [], "cells[0] must be an object"),
        (["cells", 0, "question"], "why", "cells[0].question must be one of configs, prompts"),
        (["cells", 0, "samples", 0, "turn"], None, "cells[0].samples[0].turn must be a whole"),
        (["cells", 0, "acceptance", "by_source", "model"], 3, "by_source.model must be an object"),
        (["cells", 0, "new"], 3, "cells[0].new is not known"),
        (["recommendation", "words"], 3, "recommendation.words must be a text, and is 3"),
    ],
)
def test_anything_else_is_one_clear_error(place, value, words):
    with pytest.raises(UsageError) as caught:
        results.of_json(changed(place, value), "old.json")
    assert caught.value.message.startswith("old.json")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "names no schema"),
        ("[" * 100_000, "not JSON"),
        ('{"schema": 1}', "created is missing"),
    ],
)
def test_a_file_of_another_kind_is_one_clear_error(text, words):
    with pytest.raises(UsageError, match=words):
        results.of_json(text)
