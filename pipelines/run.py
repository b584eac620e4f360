"""Running a job: check everything first, plan, run on any Beam runner, and leave a folder that can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from pipelines import runners
from schemas.errors import InputError, OutputError, TamisError
from transforms.shards.cache import RequestCache
from transforms.shards.engine import CACHE, Job, build, list_receipts
from transforms.shards.events import EventLog
from transforms.shards.files import Folder
from transforms.shards.finish import MANIFEST, SUCCESS, is_finished
from transforms.shards.formats import UnitLimits, check_compression
from transforms.shards.inputs import InputListing, is_hub_id, list_input
from transforms.shards.plan import Plan, load_plan, make_plan, save_plan
from transforms.shards.receipts import RECEIPTS, SHARDS, Receipt, read_receipts, remove_receipts

JOB = "_tamis/job.json"


@dataclass(frozen=True)
class RunSettings:
    """How a job is run; none of it changes what comes out, and none of it is in any hash.

    Attributes:
        workers: Worker processes on this machine (1 = in this process).
        limits: Unit size; None leaves it to the job.
        overwrite: Replace what another configuration of the same job left in the output folder.
        dry_run: Check and plan, then stop.
        progress: `auto` (bars on a terminal, else lines), `plain`, `quiet`.
        beam_args: Passed to Beam as they are (`--runner=...`).
        replay: Do units with dead rows and shards that could not be read once more.
    """

    workers: int = 1
    limits: UnitLimits | None = None
    overwrite: bool = False
    dry_run: bool = False
    progress: str = "auto"
    beam_args: tuple[str, ...] = ()
    replay: bool = False


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        state: `finished`, `already finished`, `planned` (dry run), `checked` (Beam's own dry run: the graph was built
            and not run), or `submitted` (a service runs the job and this process does not wait).
        manifest: The manifest; None unless the job has finished.
        plan: The plan.
        done: Units that were committed before this run began.
        detail: More about the state, for the user.
        notes: What else the user should know, a line each.
    """

    state: str
    manifest: dict[str, Any] | None
    plan: Plan
    done: int
    detail: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A job that has been checked and planned; nothing is written yet.

    Attributes:
        job: The job, its places filled in.
        output: Its output folder.
        plan: What there is to do.
        beam_args: Beam's arguments, completed.
    """

    job: Job
    output: Folder
    plan: Plan
    beam_args: tuple[str, ...]


def prepare(job: Job, source: str, settings: RunSettings, *, models: bool = True) -> Prepared:
    """Check what can be checked before work starts, and plan.

    Args:
        job: The job; its `input_url` is set here from what `source` resolves to.
        source: What the user gave as input.
        settings: How to run it.
        models: See `check_owner`.

    Raises:
        TamisError: Anything the user can mend; nothing has been lost.
    """
    listing = list_input(source, dict(job.input_options))
    output = _open_output(job)
    job = replace(
        job,
        input_url=listing.root.url,
        output_url=output.url,
        lineage=listing.lineage,
        at_least_tasks=max(4, 4 * settings.workers),
    )
    _check_places(listing, output)
    check_compression(job.assemble.compression, (s.name for s in listing.shards))
    beam_args = runners.beam_arguments(settings.beam_args, settings.workers)
    runners.check_runner(beam_args, listing.root.url, output.url)
    check_owner(output, job, overwrite=settings.overwrite, models=models)
    plan = make_plan(
        listing,
        job.text_column,
        job.id_column,
        settings.limits or job.limits,
        _previous(output, job, replay=settings.replay),
        None if settings.limits else job.max_units,
        job.extra_columns,
    )
    _check_kept(output, source, plan, overwrite=settings.overwrite)
    return Prepared(job, output, plan, tuple(beam_args))


def run_job(job: Job, source: str, settings: RunSettings) -> RunResult:
    """Run a job from the beginning, or from where an earlier run of it stopped.

    Args:
        job: The job; its `input_url` is set here from what `source` resolves to.
        source: What the user gave as input.
        settings: How to run it.

    Raises:
        TamisError: Anything the user can mend; nothing has been lost.
    """
    ready = prepare(job, source, settings)
    job, output, plan = ready.job, ready.output, ready.plan
    notes = _left_out(plan)
    if settings.dry_run:
        done = read_receipts(output, plan, job.config_hash) if output.exists(RECEIPTS) else {}
        return RunResult("planned", None, plan, len(done), notes=notes)
    with locked(output):
        with writable(output):
            if settings.overwrite and _is_other(output, job):
                _forget(output)
            done = read_receipts(output, plan, job.config_hash)
            dead = [r for r in done.values() if r.dead] if settings.replay else []
            if dead:
                # What says that the output is whole goes first: killed after it, a run is one to be resumed.
                for name in (SUCCESS, MANIFEST):
                    output.remove(name)
                remove_receipts(output, dead)
                done = {key: receipt for key, receipt in done.items() if not receipt.dead}
            if len(done) == plan.units and is_finished(output, plan, job.config_hash, job.assemble):
                manifest = orjson.loads(output.read(MANIFEST))
                return RunResult("already finished", manifest, plan, len(done), notes=notes)
            for name in (SUCCESS, MANIFEST):
                output.remove(name)
            output.write(JOB, _describe(job, source))
            save_plan(plan, output)
        run_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
        EventLog(output).emit(
            "run", state="started", run_id=run_id, rows=plan.rows, units=plan.units, done=len(done)
        )
        with _progress(output, plan, done, settings), terminable():
            state, detail = run_graph(ready.beam_args, lambda pipeline: build(pipeline, job))
    if state != "finished":
        return RunResult(state, None, plan, len(done), detail, notes)
    manifest = orjson.loads(output.read(MANIFEST))
    return RunResult("finished", manifest, plan, len(done), notes=notes)


def run_graph(args: Sequence[str], build_graph: Callable[[Any], Any]) -> tuple[str, str]:
    """Build a graph and hand it to its runner.

    Args:
        args: Beam's arguments, completed.
        build_graph: Puts the transforms into a pipeline.

    Returns:
        The state this process leaves the job in (see `RunResult`), and what to say of it.

    Raises:
        TamisError: A worker stopped the run, or the runner ended without finishing.
    """
    with runners.calm():
        result: Any = None
        try:
            pipeline = runners.new_pipeline(args)
            build_graph(pipeline)
            result = pipeline.run()
            if runners.is_beam_dry_run(args):
                return "checked", runners.check_dry_run(result, args)
            if runners.leaves_at_once(args):
                return "submitted", "the runner goes on by itself; `tamis status` says how far it is"
            state = result.wait_until_finish()
        except KeyboardInterrupt:
            # A job that a service runs would go on without us, and into the way of the next run.
            if result is not None and runners.is_remote(args):
                with contextlib.suppress(Exception):
                    result.cancel()
            raise
        except Exception as error:
            cause = runners.explain(error)
            if cause is error:
                raise
            raise cause from error
    if str(state) not in ("DONE", "None"):
        raise TamisError(f"the runner ended in state {state}; run the same command again to go on")
    return "finished", ""


def _check_places(listing: InputListing, output: Folder) -> None:
    """Refuse an output that the next listing of the input would find, and an input the output would overwrite.

    Raises:
        OutputError: It is one of these.
    """
    source = listing.root
    if type(source.fs) is not type(output.fs):
        return
    names = [(source.root, output.root)]
    if source.is_local:
        names.append((os.path.realpath(source.root), os.path.realpath(output.root)))  # a link may lead inside
    for above, below in names:
        root, place = above.rstrip("/") + "/", below.rstrip("/") + "/"
        if listing.walked and place.startswith(root):
            raise OutputError(
                f"the output {output.url} lies inside the input {source.url}; choose another --output"
            )
        if any((root + shard.name).startswith(place) for shard in listing.shards):
            raise OutputError(
                f"the input {source.url} lies inside the output {output.url}; choose another --output"
            )


def _describe(job: Job, source: str = "") -> bytes:
    return orjson.dumps(
        {
            "name": job.name,
            "source": _absolute(source),
            "input": job.input_url,
            "text_column": job.text_column,
            "id_column": job.id_column,
            "seed": job.seed,
            "config": dict(job.config),
            "config_hash": job.config_hash,
            "models": [dict(m) for m in job.models],
            # In no hash, but a retry is to write as the run did.
            **asdict(job.assemble),
            "max_dead": job.max_dead,
        },
        option=orjson.OPT_INDENT_2,
    )


def check_owner(output: Folder, job: Job, *, overwrite: bool, models: bool = True) -> None:
    """Refuse a folder that holds something else, or (without `overwrite`) this job with other settings.

    Args:
        output: The folder.
        job: What wants to write there.
        overwrite: Other settings of the same job over the same input are no hindrance.
        models: Compare the models too; not where one of them is yet to be trained.

    Raises:
        OutputError: It does.
    """
    if not output.exists():
        return
    if not output.fs.isdir(output.path()):
        raise OutputError(f"the output {output.url} is a file; pass a folder")
    if not output.exists(JOB):
        # A run killed before it could say whose the folder is leaves its lock and its plan, and no more.
        if any(not path.startswith("_tamis/") for path in output.find()):
            raise OutputError(
                f"the output {output.url} holds files that are not tamis's; choose an empty folder"
            )
        return
    old = orjson.loads(output.read(JOB))
    if old["name"] != job.name:
        raise OutputError(f"{output.url} holds a {old['name']} job; choose another --output")
    if old["input"] != job.input_url:
        raise OutputError(f"{output.url} holds a job over {old['input']}; choose another --output")
    if overwrite or old["config_hash"] == job.config_hash:
        return
    new = orjson.loads(_describe(job))
    keys = [k for k in ("text_column", "id_column", "seed") if old.get(k) != new.get(k)]
    keys += [
        k for k in sorted({*old["config"], *new["config"]}) if old["config"].get(k) != new["config"].get(k)
    ]
    if models and old["models"] != new["models"]:
        keys.append("models")
    if keys or models:
        raise OutputError(
            f"{output.url} holds this job with other settings ({', '.join(keys)}); pass --overwrite to replace it "
            "(answers already paid for are reused), or choose another --output"
        )


def _check_kept(output: Folder, source: str, plan: Plan, *, overwrite: bool) -> None:
    """Refuse to lose what was made of another input under the same root, unless told to replace it.

    A shard that the same source no longer has was taken away on purpose, and a source that holds more shards than the
    last one loses nothing.

    Raises:
        OutputError: The folder holds shards of another source that this one has not.
    """
    if overwrite or not output.exists(JOB):
        return
    old, before = str(orjson.loads(output.read(JOB)).get("source") or ""), load_plan(output)
    local = "://" not in plan.input_url
    if not old or before is None or _one_name(old, local=local) == _one_name(source, local=local):
        return
    lost = sorted({s.name for s in before.shards} - {s.name for s in plan.shards})
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise OutputError(
            f"{output.url} holds a job over {old}, whose {lost[0]}{more} this input has not; "
            "choose another --output, or pass --overwrite to replace it"
        )


def _one_name(source: str, *, local: bool) -> str:
    """A source however it was typed, and from wherever; a glob too, for which there is no file."""
    return os.path.abspath(source.removeprefix("file://")) if local else source.rstrip("/")  # noqa: PTH100


def _is_other(output: Folder, job: Job) -> bool:
    return output.exists(JOB) and orjson.loads(output.read(JOB))["config_hash"] != job.config_hash


def _previous(output: Folder, job: Job, *, replay: bool = False) -> Plan | None:
    plan = load_plan(output) if output.exists() else None
    if plan is None or (plan.text_column, plan.id_column) != (job.text_column, job.id_column):
        return None
    if not replay:
        return plan
    # Without its stamp a shard is looked at again, and with an error it keeps nothing of the old survey.
    return replace(plan, shards=tuple(replace(s, stamp="") if s.error else s for s in plan.shards))


def _forget(output: Folder) -> None:
    for name in (
        SUCCESS,
        MANIFEST,
        RECEIPTS,
        SHARDS,
        "_tamis/units",
        "data",
        "edits",
        "attributes",
        "dropped",
        "dead",
        "index",
    ):
        output.remove(name)


def _absolute(source: str) -> str:
    """A local path or glob as it reads from anywhere; URLs and hub ids as they are."""
    if not source or "://" in source or is_hub_id(source):
        return source
    return str(Path(source).expanduser().absolute())


def _left_out(plan: Plan) -> tuple[str, ...]:
    """A line about the input's files of other kinds: someone may count on their being read."""
    if not plan.ignored:
        return ()
    names = ", ".join(plan.ignored_examples) + (", ..." if plan.ignored > len(plan.ignored_examples) else "")
    return (f"{plan.ignored} other file{'s' if plan.ignored > 1 else ''} ignored ({names})",)


def _open_output(job: Job) -> Folder:
    if not job.output_url.strip():
        raise OutputError("the output is empty; pass a folder with --output")
    try:
        return job.output()
    except (ValueError, ImportError) as error:  # an unknown protocol, a filesystem that is not installed
        raise OutputError(f"cannot use the output {job.output_url}: {error}") from error


@contextlib.contextmanager
def writable(output: Folder) -> Iterator[None]:
    """A full or read-only disk, or a bucket that is not there, shows before work starts."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to the output {output.url}: {error}; mend this and run the same command again"
        ) from error


@contextlib.contextmanager
def locked(output: Folder) -> Iterator[None]:
    """One run at a time in a local folder; the kernel frees the lock of a killed run."""
    if not output.is_local:
        yield
        return
    import fcntl

    path = output.local("_tamis/lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise OutputError(f"cannot write to the output {output.url}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is at work in {output.url}") from None
        yield


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make a polite kill end like Ctrl-C: committed units stay, nothing is half written."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _progress(
    output: Folder, plan: Plan, done: dict[tuple[str, int], Receipt], settings: RunSettings
) -> Iterator[None]:
    if settings.progress == "quiet":
        yield
        return
    from pipelines.progress import ProgressReporter

    with ProgressReporter(output.url, mode=settings.progress, options=output.options):
        yield


def cached_answers(job: Job) -> int:
    """Number of model answers in a job's request cache."""
    return len(RequestCache(job.cache_url or f"{job.output_url.rstrip('/')}/{CACHE}", **job.output_options))


def known_receipts(job: Job) -> Sequence[Receipt]:
    """Receipts of a job's output folder."""
    return [Receipt.loads(content) for _, content in list_receipts(job) if content]


__all__ = ["InputError", "RunResult", "RunSettings", "cached_answers", "run_job"]
