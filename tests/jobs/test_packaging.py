"""Packaging, the container files and the set-up commands agree with one another; no container engine is needed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines import launch
from tests.conftest import ROOT

ROOMS = ("schemas", "models", "transforms", "pipelines")
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.launcher")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirement(text: str) -> tuple[str, set[str]]:
    found = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", text)
    assert found
    return _normal(found[1]), set((found[2] or "").split(",")) - {""}


# ------------------------------------------------------------------------------------------------------- packaging


def test_constraints_pin_every_dependency_exactly(project: dict[str, Any], pins: dict[str, str]) -> None:
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(r for e in ("models", "local", "retrieval", "eval", "s3", "dev") for r in extras[e]),
    ]
    missing = {name for name, _ in map(_requirement, wanted)} - set(pins)
    assert not missing
    # A local version (+cpu) would tie the set to one index, an editable path to one machine.
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())


def test_the_environment_is_the_tested_set(pins: dict[str, str]) -> None:
    installed = {_normal(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions()}
    different = {n: (v, installed[n]) for n, v in pins.items() if n in installed and installed[n] != v}
    assert not different


def test_every_import_is_of_a_declared_dependency(project: dict[str, Any]) -> None:
    """A fresh machine installs what pyproject.toml names, and only that."""
    extras = project["optional-dependencies"]
    declared = {_requirement(r)[0] for r in project["dependencies"]}
    declared |= {
        _requirement(r)[0] for e in ("models", "local", "retrieval", "eval", "s3", "gcp") for r in extras[e]
    }
    # Beam's own hard dependencies, of which its API is made; torch's array package.
    declared |= {"protobuf", "grpcio", "numpy", "packaging"}
    provides = importlib.metadata.packages_distributions()
    strays: dict[str, list[str]] = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for name in _imports(path):
                if name in sys.stdlib_module_names or name in ROOMS:
                    continue
                if not {_normal(d) for d in provides.get(name, [])} & declared:
                    strays.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not strays


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_every_file_of_a_package_that_is_not_code_is_package_data() -> None:
    """What is read beside the code must be in the wheel."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = [p for room in ("*", *ROOMS) for p in config.get(room, [])]
    tracked = subprocess.run(
        ["git", "ls-files", "--", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    left_out = [f for f in tracked if not f.endswith(".py") and not any(Path(f).match(p) for p in patterns)]
    assert not left_out


def test_licence_is_the_whole_apache_2(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_gcp_pins_add_to_the_tested_set_and_change_nothing_of_it(pins: dict[str, str]) -> None:
    lines = (ROOT / "docker/constraints-gcp.txt").read_text().splitlines()
    added = {_normal(line.partition("==")[0]) for line in lines if line and not line.startswith("#")}
    assert {"google-cloud-storage", "gcsfs", "google-cloud-dataflow-client"} <= added
    assert not added & set(pins)


# ------------------------------------------------------------------------------------------------------ containers


def _instructions(name: str) -> list[tuple[str, list[str]]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [
        (head.upper(), shlex.split(rest))
        for head, _, rest in (line.strip().partition(" ") for line in whole.splitlines() if line.strip())
    ]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_copied_file_exists_and_is_in_the_build_context(name: str) -> None:
    ignore = (ROOT / f"{name}.dockerignore").read_text().split()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[0] == "*"
    copied = 0
    for instruction, arguments in _instructions(name):
        if instruction in ("COPY", "ADD") and not arguments[0].startswith("--from="):
            for source in arguments[:-1]:
                copied += 1
                assert source in kept, f"{source} is not in the build context"
                assert (ROOT / source).exists()
    assert copied


def test_base_image_is_of_the_tested_beam_and_python(project: dict[str, Any], pins: dict[str, str]) -> None:
    base = next(arguments[0] for name, arguments in _instructions("docker/Dockerfile") if name == "FROM")
    image, _, tag = base.partition(":")
    assert image == "apache/beam_python3.11_sdk"
    assert tag == pins["apache-beam"]
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]


def test_worker_image_installs_extras_that_exist_at_the_tested_versions(project: dict[str, Any]) -> None:
    commands = [" ".join(a) for name, a in _instructions("docker/Dockerfile") if name == "RUN"]
    install = next(c for c in commands if "pip install" in c)
    assert "--constraint constraints.txt" in install
    extras = re.search(r"\.\[([\w,]+)\]", install)
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert any("tamis models pull" in c for c in commands)


def test_worker_image_starts_beams_harness_with_one_thread_and_its_own_models() -> None:
    steps = _instructions("docker/Dockerfile")
    settings = dict(pair.split("=", 1) for name, arguments in steps if name == "ENV" for pair in arguments)
    assert settings["OMP_NUM_THREADS"] == "1"
    assert settings["TAMIS_HOME"].startswith("/opt/")
    entry = [arguments for name, arguments in steps if name == "ENTRYPOINT"]
    assert entry == [["[/opt/apache/beam/boot]"]]


def test_launcher_image_runs_the_script_it_copies() -> None:
    steps = _instructions("docker/Dockerfile.launcher")
    settings = dict(pair.split("=", 1) for name, arguments in steps if name == "ENV" for pair in arguments)
    targets = [arguments[-1] for name, arguments in steps if name == "COPY"]
    assert settings["FLEX_TEMPLATE_PYTHON_PY_FILE"] in targets
    assert "ENTRYPOINT" not in {name for name, _ in steps}  # the worker's: one image serves as both
    done = subprocess.run(
        [sys.executable, ROOT / "docker/flex_template.py", "--job=nonsense"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 2
    assert "the template runs detox, score, embed" in done.stderr


def test_template_metadata_agrees_with_the_command_line() -> None:
    metadata = json.loads((ROOT / "docker/flex-template-metadata.json").read_text())
    described = {p["name"]: p for p in metadata["parameters"]}
    known = {k: p for job in reversed(launch.JOBS) for k, p in launch.parameters(job).items()}
    assert set(described) - {"job", "sdk_container_image"} <= set(known)
    required = {name for name, p in described.items() if not p.get("isOptional")}
    for job in launch.JOBS:
        assert required == {name for name, p in launch.parameters(job).items() if p.required}
    assert all(re.search(described["job"]["regexes"][0], job) for job in launch.JOBS)
    for name, parameter in described.items():
        assert {"label", "helpText"} <= set(parameter)
        patterns = parameter.get("regexes", [])
        if name in known and not known[name].required:
            default = known[name].default
            assert parameter.get("defaultValue", str(default)) == str(default)
            sample = "" if default is None else str(default).lower()
            assert not sample or all(re.search(p, sample) for p in patterns)
    for pattern in described["input"]["regexes"]:
        assert re.search(pattern, "gs://bucket/corpus/*.jsonl")
        assert not re.search(pattern, "corpus.jsonl")


# -------------------------------------------------------------------------------------------------------- commands


def _make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_says_what_there_is_to_make() -> None:
    said = _make("help")
    for target in ("demo", "test", "check", "slow", "bench", "clean"):
        assert re.search(rf"^{target} ", said, re.MULTILINE), target


def test_make_test_checks_and_tests_and_ci_calls_it() -> None:
    commands = _make("--dry-run", "--assume-old=.venv/.installed", "test")
    for command in ("ruff check .", "ruff format --check .", "mypy", "tamis models pull", "pytest -n 2"):
        assert command in commands
    assert "HF_HUB_OFFLINE=1" in commands
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_make_demo_runs_the_job_on_the_example_and_says_where_the_report_is() -> None:
    commands = _make("--dry-run", "--assume-old=.venv/.installed", "demo")
    assert "tamis detox examples/corpus.jsonl --output demo-out" in commands
    assert f"{ROOT}/demo-out/report.html" in commands
    assert (ROOT / "examples/corpus.jsonl").exists()
