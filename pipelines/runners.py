"""Beam runners as a job meets them: their arguments, what must hold before one starts, their noise, their errors."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import schemas.errors
from schemas.errors import FatalStepError, InputError, ModelError, OutputError, TamisError

GUIDE = "docs/runners.md"
LOCAL = "FnApiRunner"
_PORTABLE = {"PortableRunner", "FlinkRunner", "SparkRunner"}
# Portable job services apply this to the whole run, whatever its help text says; the default of 300 s ends longer
# runs with DEADLINE_EXCEEDED. A month is longer than any batch job, and still fits gRPC's clock.
_JOB_SECONDS = 30 * 24 * 3600
_PROBE_SECONDS = 5.0
_DEBUG = "TAMIS_DEBUG"

_CLASS = re.compile(r"schemas\.errors\.(\w+): (.*)")
_WHILE = re.compile(r"(?: \[while running '.*?'\])+$")
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def debugging() -> bool:
    """Whether the user asked for all that Beam has to say (`TAMIS_DEBUG=1`)."""
    return bool(os.environ.get(_DEBUG))


# ---------------------------------------------------------------------------------------------------- arguments


def beam_arguments(given: Sequence[str], workers: int) -> list[str]:
    """Complete the user's Beam arguments: the runner, and for local runs its mode and its workers.

    Args:
        given: What stood after `--` on the command line.
        workers: Worker processes on this machine.
    """
    args = list(given)
    name = runner_name(args)
    if name in ("DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner", LOCAL):
        # Named, because plain DirectRunner first tries to download another runner and changes error types.
        args = [*_without(args, "runner"), f"--runner={LOCAL}"]
        if workers > 1 and _value(args, "direct_running_mode") is None:
            args += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    elif name in _PORTABLE and _value(args, "job_server_timeout") is None:
        args.append(f"--job_server_timeout={_JOB_SECONDS}")
    return args


def runner_name(args: Sequence[str]) -> str:
    """The runner that arguments name, in Beam's spelling; `FnApiRunner` if they name none."""
    given = (_value(args, "runner") or LOCAL).rsplit(".", 1)[-1]
    known = [LOCAL, "DirectRunner", "DataflowRunner", "PrismRunner", "DaskRunner", *sorted(_PORTABLE)]
    return {k.lower(): k for k in known}.get(given.lower(), given)


def is_remote(args: Sequence[str]) -> bool:
    """Whether someone else than this process runs the job."""
    return runner_name(args) != LOCAL


def is_beam_dry_run(args: Sequence[str]) -> bool:
    """Whether the graph is to be built and checked, but not run (`--dry_run=true`, Dataflow only)."""
    given = _value(args, "dry_run")
    return given is not None and given.lower() not in ("false", "0", "no")


def leaves_at_once(args: Sequence[str]) -> bool:
    """Whether this process is to end before the job does: a template, or `--no_wait_until_finish`."""
    waits = _value(args, "no_wait_until_finish") is None
    return not waits or _value(args, "template_location") is not None


def check_runner(args: Sequence[str], source_url: str, output_url: str) -> None:
    """Refuse, before any work, what cannot run.

    Args:
        args: Beam's arguments, completed.
        source_url: Input root.
        output_url: Output folder.

    Raises:
        TamisError: One line that says what to pass instead.
    """
    name = runner_name(args)
    if name == "DaskRunner":
        raise TamisError(f"DaskRunner loses outputs of jobs like this one; choose another runner ({GUIDE})")
    if name in (LOCAL, "DataflowRunner"):  # job servers have options of their own, which Beam does not know
        _check_known(args)
    if name == "DataflowRunner":
        _check_dataflow(args, source_url, output_url)
    elif name in _PORTABLE:
        _check_portable(args)
    if is_beam_dry_run(args) and name != "DataflowRunner":
        raise TamisError(
            "only DataflowRunner knows --dry_run; tamis's own --dry-run plans and stops, for any runner"
        )


def _check_known(args: Sequence[str]) -> None:
    """Beam drops what it does not know; a mistyped option would then cost a run."""
    from apache_beam.options.pipeline_options import PipelineOptions

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for options in _subclasses(PipelineOptions):
        if "_add_argparse_args" in vars(options):
            # Two classes of Beam may define one option, and it takes the first as well.
            with contextlib.suppress(argparse.ArgumentError):
                options._add_argparse_args(parser)
    try:
        _, unknown = parser.parse_known_args([a for a in args if a != "--"])
    except argparse.ArgumentError as error:
        raise TamisError(f"Beam's arguments: {error}") from error
    if unknown and not unknown[0].startswith("-"):
        raise TamisError(
            f"a job takes one input, and {unknown[0]} is one more; quote a glob ('*.jsonl'), or pass a folder"
        )
    if unknown:
        raise TamisError(f"Beam knows no option {unknown[0]}; tamis's own options stand before the `--`")


def _subclasses(cls: Any) -> list[Any]:
    found: list[Any] = []
    for sub in cls.__subclasses__():
        found += [sub, *_subclasses(sub)]
    return found


def _check_dataflow(args: Sequence[str], source_url: str, output_url: str) -> None:
    try:
        import apache_beam.runners.dataflow.internal.apiclient  # noqa: F401 - is it there?
    except ImportError as error:
        raise ModelError(f"DataflowRunner needs tamis[gcp]: pip install 'tamis[gcp]' ({error})") from error
    carried = (
        "sdk_container_image",
        "prebuild_sdk_container_engine",
        "extra_package",
        "requirements_file",
        "setup_file",
    )
    if not any(_value(args, c) for c in carried):
        raise TamisError(
            "Dataflow's own worker image holds no tamis; pass --sdk_container_image=REGISTRY/tamis:VERSION "
            f"(docker/README.md says how it is built, {GUIDE} how it is used)"
        )
    if is_beam_dry_run(args):
        return
    for what, url, kind in (("input", source_url, InputError), ("output", output_url, OutputError)):
        if "://" not in url or url.startswith(("file://", "memory://")):
            raise kind(f"Dataflow's workers cannot see the {what} {url}; pass a gs:// (or other shared) URL")


def _check_portable(args: Sequence[str]) -> None:
    endpoint = _value(args, "job_endpoint")
    if not endpoint and runner_name(args) == "PortableRunner":
        raise TamisError(f"PortableRunner needs --job_endpoint=HOST:PORT of a job server ({GUIDE})")
    if endpoint and endpoint != "embed":
        _probe(endpoint, "job server", "--job_endpoint")
    kind = (_value(args, "environment_type") or "DOCKER").upper()
    if kind == "DOCKER" and not (_value(args, "environment_config") or _value(args, "sdk_container_image")):
        raise TamisError(
            "Beam's own worker image holds no tamis; pass --environment_config=REGISTRY/tamis:VERSION, or "
            f"--environment_type=LOOPBACK or EXTERNAL ({GUIDE})"
        )


def _probe(endpoint: str, what: str, option: str) -> None:
    host, _, port = endpoint.removeprefix("http://").rpartition(":")
    try:
        with socket.create_connection((host or "localhost", int(port)), timeout=_PROBE_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise TamisError(
            f"no {what} answers at {option}={endpoint} ({error}); start it first: {GUIDE}"
        ) from error


def _value(args: Sequence[str], name: str) -> str | None:
    """Value of `--name=value`, `--name value` or a bare `--name` (then the empty string); the last one wins."""
    found: str | None = None
    for i, arg in enumerate(args):
        head, sign, value = arg.partition("=")
        if head.lstrip("-").replace("-", "_") != name or not head.startswith("--"):
            continue
        after = args[i + 1] if i + 1 < len(args) else "--"
        found = value if sign else "" if after.startswith("--") else after
    return found


def _without(args: Sequence[str], name: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for i, arg in enumerate(args):
        if skip:
            skip = False
        elif arg == f"--{name}":
            skip = i + 1 < len(args) and not args[i + 1].startswith("--")
        elif not arg.startswith(f"--{name}="):
            kept.append(arg)
    return kept


# ---------------------------------------------------------------------------------------------------- the pipeline


def new_pipeline(args: Sequence[str]) -> Any:
    """A `beam.Pipeline` for the arguments.

    Raises:
        TamisError: Beam refuses them.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

    try:
        # Not the main session: every function of a job is imported from tamis by the workers.
        options = PipelineOptions(list(args), save_main_session=False)
        direct = options.view_as(DirectOptions)
        if runner_name(args) == LOCAL and direct.direct_running_mode == "multi_processing":
            from pipelines.local_workers import process_runner

            # Else Beam puts its own worker processes in place of ours.
            direct.direct_running_mode = "in_memory"
            return beam.Pipeline(runner=process_runner(), options=options)
        return beam.Pipeline(options=options)
    except (ValueError, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        said = "; ".join(line for line in lines if line and not line.startswith("Pipeline has validation"))
        raise TamisError(f"Beam refuses its arguments: {said or 'see above'}") from error


def check_dry_run(result: Any, args: Sequence[str]) -> str:
    """Check the graph that `--dry_run=true` built, and write it to `--dataflow_job_file` if that is given.

    Returns:
        The graph, in a line.

    Raises:
        TamisError: No remote runner would take it.
    """
    from pipelines.graph import check_graph, describe_graph, write_graph

    proto = result.job.proto_pipeline
    graph = describe_graph(proto)
    check_graph(graph)
    path = _value(args, "dataflow_job_file")
    if path:
        write_graph(proto, path)
    return f"{graph}" + (f"; written to {path}" if path else "")


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Keep Beam's log, libraries' warnings and the ends of threads off the user's terminal; `TAMIS_DEBUG=1` shows all.

    Beam logs optional packages it lacks, every pickled lambda, and for a failed bundle the whole traceback several
    times over. What matters of it reaches the user as one line, through `explain`.
    """
    if debugging():
        yield
        return
    root, beam = logging.getLogger(), logging.getLogger("apache_beam")
    levels, hook = (root.level, beam.level), threading.excepthook

    def drop_grpc(args: threading.ExceptHookArgs) -> None:
        # Beam's reader threads end with an exception when a stopped worker hangs up.
        if args.exc_type.__module__.partition(".")[0] != "grpc":
            hook(args)

    root.setLevel(logging.CRITICAL)
    beam.setLevel(logging.CRITICAL + 1)
    threading.excepthook = drop_grpc
    import apache_beam.runners.worker.sdk_worker as harness

    # A worker in this process prints a failing bundle's traceback past all logging.
    printing = vars(harness).get("print", print)
    vars(harness)["print"] = lambda *_, **__: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the libraries are not the user's to mend
            yield
    finally:
        root.setLevel(levels[0])
        beam.setLevel(levels[1])
        threading.excepthook = hook
        vars(harness)["print"] = printing


def _import_beam() -> None:
    """Import Beam without what it logs meanwhile, and without the log handler that this leaves behind."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    with calm():
        import apache_beam  # noqa: F401
    if not debugging():
        root.handlers[:] = handlers


# ------------------------------------------------------------------------------------------------------------ errors


def explain(error: BaseException) -> BaseException:
    """The user's error inside whatever a runner wrapped it in; the error itself if there is none.

    A local runner raises a copy of the error with `[while running '...']` appended; a runner with workers of its own
    has nothing but the text of their traceback.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TamisError):
            clean = _WHILE.sub("", str(seen))
            return seen if clean == str(seen) else type(seen)(clean)
        if isinstance(seen, KeyboardInterrupt):
            return seen  # Beam wraps it as any other error of a step
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if matches := _CLASS.findall(text):
        name, message = matches[-1]
        kind = getattr(schemas.errors, name, TamisError)
        return kind(_WHILE.sub("", message))
    # Beam may see the broken connection of a lost worker before it hears what became of it.
    workers = sys.modules.get("pipelines.local_workers")
    if workers is not None and workers.WorkerProcess.loss:
        return FatalStepError(workers.WorkerProcess.loss)
    if missing := _NO_MODULE.search(text):
        return TamisError(
            f"a worker has no module {missing[1]}: its image or environment must hold the same tamis as here ({GUIDE})"
        )
    if "StatusCode.DEADLINE_EXCEEDED" in text:
        return TamisError("the job took longer than --job_server_timeout allows; leave that option out")
    if "StatusCode.UNAVAILABLE" in text:
        return TamisError(f"a service of the runner cannot be reached: {_grpc_details(text)} ({GUIDE})")
    return error


def _grpc_details(text: str) -> str:
    found = re.search(r'details = "(.*?)"', text)
    return found[1] if found else "connection refused"


_import_beam()
