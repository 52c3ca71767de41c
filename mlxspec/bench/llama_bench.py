"""Results as llama.cpp's `llama-bench -o jsonl` writes its own: a line for each test. No MLX.

A line has the fields of llama-bench that have a meaning here, and `configuration`, `question` and
`row` beside them, which its readers pass over. Prompts differ in length, so `n_prompt`, `n_gen` and
`n_depth` are medians.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from statistics import fmean, median, stdev
from typing import Any

from mlxspec.bench.cells import Cell
from mlxspec.bench.results import Results


def jsonl(results: Results) -> str:
    """A line of JSON for each cell's generation, and one for its reading of the prompt."""
    lines = [
        json.dumps({**_about(results, cell), **test}, ensure_ascii=False, allow_nan=False) + "\n"
        for cell in results.cells
        for test in _tests(cell)
    ]
    return "".join(lines)


def _about(results: Results, cell: Cell) -> dict[str, Any]:
    machine, pair = results.machine, results.pair
    sizes = pair.get("bytes")
    return {
        "build_commit": str(machine.get("mlxspec", "")),
        "build_number": 0,
        "cpu_info": str(machine.get("processor", "")),
        "gpu_info": str(machine.get("device", "")),
        "backends": f"MLX {machine.get('mlx', '')}",
        "model_filename": str(pair.get("target", "")),
        "model_type": f"{pair.get('name', '')} {pair.get('quantisation', '')}".strip(),
        "model_size": sizes.get("target", 0) if isinstance(sizes, dict) else 0,
        "test_time": results.created,
        "configuration": cell.configuration.name,
        "question": cell.question,
        "row": cell.row,
    }


def _tests(cell: Cell) -> Iterator[dict[str, Any]]:
    """Generation (tg) and reading (pp) of a cell, as far as they were timed."""
    wrote = [(one, one.tokens_per_second) for one in cell.samples if one.tokens_per_second]
    if wrote:
        yield {
            "n_prompt": 0,
            "n_gen": _middle([one.tokens for one, _ in wrote]),
            "n_depth": _middle([one.prompt_tokens for one, _ in wrote]),
            **_times([one.tokens / speed for one, speed in wrote], [speed for _, speed in wrote]),
        }
    read = [(one, one.ttft_s) for one in cell.samples if one.ttft_s and one.prompt_tokens]
    if read and cell.rows == 1:
        yield {
            "n_prompt": _middle([one.prompt_tokens for one, _ in read]),
            "n_gen": 0,
            "n_depth": 0,
            **_times([s for _, s in read], [one.prompt_tokens / s for one, s in read]),
        }


def _times(seconds: Sequence[float], speeds: Sequence[float]) -> dict[str, Any]:
    nanoseconds = [round(1e9 * one) for one in seconds]
    return {
        "avg_ns": round(fmean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
        "avg_ts": fmean(speeds),
        "stddev_ts": _deviation(speeds),
        "samples_ns": nanoseconds,
        "samples_ts": list(speeds),
    }


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _middle(values: Sequence[int]) -> int:
    return round(median(values))
