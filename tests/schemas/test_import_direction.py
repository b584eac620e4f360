"""Imports run one way, and the light ones stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("schemas", "models", "transforms", "pipelines")


def imported(path):
    """(line, dotted name) of everything a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"tests", "benchmarks"}
    modules = sorted((ROOT / room).rglob("*.py"))
    assert modules
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules
        for line, name in imported(path)
        if name.partition(".")[0] in above
    ]
    assert not wrong


def test_schemas_imports_pyarrow_numpy_and_the_standard_library_only():
    allowed = set(sys.stdlib_module_names) | {"pyarrow", "numpy", "schemas"}
    names = {
        name.partition(".")[0] for path in (ROOT / "schemas").rglob("*.py") for _, name in imported(path)
    }
    assert names <= allowed


def test_models_know_nothing_of_beam():
    wrong = [
        p for p in (ROOT / "models").rglob("*.py") for _, n in imported(p) if n.startswith("apache_beam")
    ]
    assert not wrong


def test_no_module_is_two_ideas():
    long = {
        p.relative_to(ROOT): n
        for r in ROOMS
        for p in (ROOT / r).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "schemas, schemas.columns, schemas.flight, schemas.edits, schemas.fingerprint, schemas.errors",
            ("apache_beam", "torch", "fsspec", "polars"),
        ),
        ("transforms.shards.steps, transforms.shards.keys", ("apache_beam", "torch")),
        (
            "transforms.shards.files, transforms.shards.plan, transforms.shards.inputs, transforms.shards.finish",
            ("apache_beam", "torch"),
        ),
        ("pipelines.run", ("torch", "transformers")),
        (
            "schemas.judgments, schemas.pools, schemas.groups, models.training.groups",
            ("apache_beam", "torch", "fsspec", "polars"),
        ),
        (
            "pipelines.groups, pipelines.judgments_import, pipelines.judgments_export, pipelines.judgments_agree",
            ("apache_beam", "torch", "transformers"),
        ),
    ],
)
def test_importing_loads_nothing_heavy(modules, heavy):
    code = f"import {modules}, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
