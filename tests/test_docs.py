"""The documentation is run: python blocks as they stand, tamis commands against the real command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VERBS = "detox|compare|score|embed|index|search|train lm|train ngram|train scorer|train spans|train retriever|eval|judgments|label|groups|pool|models|status|inspect|diff|report|verify|retry|serve-dummy"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.relative_to(ROOT)}:{i}", text)
        for page in PAGES
        for i, (kind, text) in enumerate(_BLOCK.findall(page.read_text()))
        if kind == language
    ]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
        lines = [line for line in lines if re.match(rf"tamis (?:{VERBS}) ", line)]
        found += [
            line
            for line in lines
            if line.startswith("tamis ") and not re.search(r"[A-Z]{3,}|\[|\.\.\.", line)
        ]
    return sorted(set(found))


@pytest.mark.parametrize(
    ("place", "code"), [b for b in blocks("python") if "OUT/" not in b[1]], ids=lambda v: v[:40]
)
def test_python_blocks_run(place: str, code: str) -> None:
    exec(compile(code, place, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    """Every option of a shown command exists: its verb is found and its words are taken."""
    from pipelines.cli import app

    words = shlex.split(re.sub(r"\s#.*", "", line))[1:]
    command = typer.main.get_command(app)
    context = typer.main.get_command(app).make_context("tamis", [], resilient_parsing=True)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("tamis", words, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_page_names_a_place_on_somebody_s_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(?:home|root|work)/", page.read_text()), page
