"""`tamis score`: put a scorer's labels beside every row, and change nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models import registry
from pipelines.run import RunResult, RunSettings, run_job
from transforms.score import ScoreTexts
from transforms.shards.engine import Job


class ScoreConfig(BaseModel):
    """Settings of the score job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(description="File, folder, glob, URL, `datasets` folder or hub id.")
    output: str = Field(description="Folder to write to.")
    scorer: str = Field("lexicon", description="Scorer, by name.")
    attribute: str = Field("score", description="Name of the attribute the scores go to.")
    text_column: str = "text"
    id_column: str | None = None
    storage_options: dict[str, Any] = Field(default_factory=dict)


def build_job(config: ScoreConfig) -> Job:
    """The job of a configuration.

    Raises:
        ModelError: The scorer cannot be had.
    """
    info = registry.describe("scorer", config.scorer)
    return Job(
        name="score",
        input_url="",
        output_url=config.output,
        text_column=config.text_column,
        id_column=config.id_column,
        steps=(ScoreTexts(scorer=config.scorer, attribute=config.attribute),),
        config={"scorer": config.scorer, "attribute": config.attribute},
        models=(asdict(info),),
        on_finish="pipelines.report:write_report",
        input_options=config.storage_options,
        output_options=config.storage_options,
    )


def run(config: ScoreConfig, settings: RunSettings) -> RunResult:
    """Run it."""
    return run_job(build_job(config), config.input, settings)


def print_result(config: ScoreConfig, result: RunResult) -> None:
    """Say what came of it."""
    if result.detail:
        print(f"{result.state}: {result.detail}")
        return
    if result.manifest is None:
        print(
            f"{result.plan.rows} rows in {len(result.plan.shards)} shards, {result.done} units already done"
        )
        for note in result.notes:
            print(note)
        return
    totals = result.manifest["totals"]
    print(f"{result.state}: {totals['rows_kept']} rows scored, {totals['rows_dead']} dead")
    for note in result.notes:
        print(note)
    print(f"scores: {config.output}/attributes/{config.attribute}")
    print(f"report: {config.output}/report.html")
