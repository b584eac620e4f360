"""The report of a job: one offline HTML page, and a data card for whoever opens the folder next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.card import render_card
from pipelines.report.findings import Findings
from pipelines.report.output import Output
from pipelines.report.page import JudgeScores, render_report
from schemas.errors import OutputError


def build_report(
    out: str, *, judge_scores: JudgeScores | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """The report of a finished output, as HTML that needs nothing but itself.

    Args:
        out: Output folder of a job, local or any fsspec URL.
        judge_scores: What an independent scorer says of the same texts before and after.
        options: fsspec options of the folder's filesystem.

    Returns:
        One HTML document.

    Raises:
        OutputError: There is no such folder, or it has no manifest.
    """
    return render_report(Findings.of(Output(out, options)), judge_scores)


def build_card(out: str, *, options: Mapping[str, Any] | None = None) -> str:
    """The data card of a finished output: YAML front matter for the Hugging Face hub, and Markdown.

    Raises:
        OutputError: There is no such folder, or it has no manifest.
    """
    return render_card(Findings.of(Output(out, options)))


def write_report(
    out: str, *, judge_scores: JudgeScores | None = None, options: Mapping[str, Any] | None = None
) -> str:
    """Write `report.html` and the data card `README.md` into an output; returns where the report lies.

    This is what the engine calls when a job finishes (`Job.on_finish="pipelines.report:write_report"`).

    Raises:
        OutputError: There is no such folder, or it has no manifest.
    """
    output = Output(out, options)
    if output.manifest and "input" not in output.manifest:
        job = output.manifest.get("job")
        raise OutputError(
            f"{out}: `tamis {job}` writes its page itself, while it runs; run it again for another"
        )
    found = Findings.of(output)
    # A lone surrogate in a text has no UTF-8; the page shows a question mark for it.
    output.folder.write("report.html", render_report(found, judge_scores).encode("utf-8", "replace"))
    output.folder.write("README.md", render_card(found).encode("utf-8", "replace"))
    return f"{output.folder.url}/report.html"


__all__ = ["JudgeScores", "build_card", "build_report", "write_report"]
