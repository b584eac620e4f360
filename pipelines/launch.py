"""The entry of a Dataflow flex template: a job's options and Beam's, all in one `--name=value` list.

The template's launcher passes what the user gave it (`--input=... --text_column=...`) beside what it adds itself
(`--runner=DataflowRunner --template_location=...`). What the job's command knows becomes its option; the rest is
Beam's; the worker image is the one the launcher's image was built from. Planning happens here, in the launcher: it lists the input, and writes `_tamis/plan.json` to the output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from schemas.errors import TamisError

JOBS = ("detox", "score", "embed")
# Options that mean something else to Beam, or only make sense at a terminal.
_NOT_HERE = {"dry_run", "progress", "workers", "config"}


def command_line(argv: Sequence[str]) -> list[str]:
    """Turn a flat list of options into the arguments of `tamis`.

    Args:
        argv: `--name=value` items; `--job` names the job (`detox` if left out).

    Raises:
        TamisError: No such job, an option of another job, or an item that is not `--name=value`.
    """
    given = [_split(item) for item in argv]
    job = next((value for name, value in reversed(given) if name == "job"), "detox")
    if job not in JOBS:
        raise TamisError(f"no job {job!r}; the template runs {', '.join(JOBS)}")
    known = parameters(job)
    elsewhere: dict[str, set[str]] = {}
    for name, parameter in (item for other in JOBS for item in parameters(other).items()):
        if name not in known:
            elsewhere.setdefault(name, set()).add(str(parameter.default))
    arguments: list[str] = []
    options: list[str] = []
    beam: list[str] = []
    for item, (name, value) in zip(argv, given, strict=True):
        parameter = known.get(name)
        if name == "job":
            continue
        if name in elsewhere:  # one template serves all jobs, and the console sends the defaults of each
            if value and value not in elsewhere[name]:
                raise TamisError(f"{job} has no option {name}")
        elif parameter is None:
            beam.append(item)
        elif parameter.param_type_name == "argument":
            arguments.append(value)
        elif parameter.is_flag:
            yes = value.lower() in ("", "true", "1", "yes")
            off = parameter.secondary_opts[:1] if value and parameter.default is None else []
            options += parameter.opts[:1] if yes else off
        elif value != "":  # the console sends optional parameters that were left empty
            options += [parameter.opts[0], value]
    image = os.environ.get("TAMIS_WORKER_IMAGE")
    if image and not any(name == "sdk_container_image" and value for name, value in given):
        beam.append(f"--sdk_container_image={image}")
    return [job, *arguments, *options, "--progress", "plain", "--", *beam]


def parameters(job: str) -> dict[str, Any]:
    """Options of a job that the template takes, by the name they have there (`text_column`)."""
    import typer

    from pipelines.cli import app

    root: Any = typer.main.get_command(app)
    named = {_template_name(p): p for p in root.commands[job].params}
    return {name: p for name, p in named.items() if name not in _NOT_HERE}


def _template_name(parameter: Any) -> str:
    return str(parameter.opts[0]).lstrip("-").replace("-", "_")


def _split(item: str) -> tuple[str, str]:
    name, _, value = item.partition("=")
    if not name.startswith("--") or len(name) < 3:
        raise TamisError(f"'{item}' is not --name=value")
    return name[2:].replace("-", "_"), value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that the options describe."""
    from pipelines.cli import main as cli

    try:
        arguments = command_line(sys.argv[1:] if argv is None else argv)
    except TamisError as error:
        print(f"tamis: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    cli(arguments)


if __name__ == "__main__":
    main()
