"""What the measurements share: two options, and how their figures are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

PairOption = Annotated[str, typer.Option(help="A pair of the table.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]


def write(figures: Mapping[str, Any], file: Path | None) -> None:
    """Write figures as JSON where a file was named."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
