"""Options, and readers of repeated ones, that commands share. Imports typer only."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

Progress = Annotated[
    Literal["auto", "plain", "quiet"],
    typer.Option(help="auto: bars on a terminal, else lines.", rich_help_panel="Running"),
]

Storage = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        help="KEY=VALUE for the filesystem (endpoint_url=...); may be repeated.",
        rich_help_panel="Running",
    ),
]
Workers = Annotated[
    int, typer.Option(help="Worker processes on this machine.", min=1, rich_help_panel="Running")
]
AllowPoisoned = Annotated[
    bool, typer.Option("--allow-poisoned", help="Train on an output that was poisoned on purpose.")
]


def pairs(items: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a mapping; a value that reads as JSON is taken as such.

    Raises:
        typer.BadParameter: One is not KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for item in items or []:
        key, sign, value = item.partition("=")
        if not sign:
            raise typer.BadParameter(f"'{item}' is not KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def numbers(option: str, text: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        typer.BadParameter: One is none.
    """
    found: list[float] = []
    for item in text.split(","):
        try:
            found.append(float(item))
        except ValueError:
            raise typer.BadParameter(
                f"'{item.strip()}' is no number; write {option} 0.6,1.0", param_hint=option
            ) from None
    return found


def run_settings(
    workers: int, unit_rows: int | None, overwrite: bool, dry_run: bool, progress: str, beam_args: list[str]
) -> Any:
    """How a job is run (`pipelines.run.RunSettings`), of a command's options."""
    from pipelines.run import RunSettings
    from transforms.shards.formats import UnitLimits

    return RunSettings(
        workers=workers,
        limits=UnitLimits(rows=unit_rows) if unit_rows else None,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        beam_args=tuple(beam_args),
    )
