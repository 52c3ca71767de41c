"""The files that `--report` and `--format` leave. No MLX."""

from __future__ import annotations

from pathlib import Path

from mlxspec.bench.report.markdown import markdown
from mlxspec.bench.report.page import html
from mlxspec.bench.results import Results
from mlxspec.files import write_whole


def write_report(results: Results, folder: Path) -> tuple[Path, ...]:
    """Write results.json, report.md and report.html into a folder; their paths.

    The folder is made where it is missing; files of an earlier report are replaced, whole.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "results.json": results.as_json(),
        "report.md": markdown(results),
        "report.html": html(results),
    }
    for name, text in made.items():
        write_whole(folder / name, text)
    return tuple(folder / name for name in made)
