"""One job on every runner: the same output, the user's error in one line, and a run that can be killed anywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines import graph, launch, runners
from schemas.errors import FatalStepError, InputError, ModelError, OutputError, TamisError
from tests import helpers
from tests.conftest import ROOT
from transforms.shards.engine import build
from transforms.shards.steps import StepContext

STEPS = (helpers.Replace(), helpers.Drop())
THREADS = ("--direct_running_mode=multi_threading", "--direct_num_workers=2")
PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
LOCAL = {"in_memory": (), "multi_threading": THREADS, "multi_processing": PROCESSES}
MODES = [*LOCAL, "loopback", "external"]


# ----------------------------------------------------------------------------------------------- steps of these tests


@dataclass(frozen=True)
class Refuse:
    """Raises an error of the user's, in setup or at work."""

    when: str
    label: str = "Refuse"

    def setup(self, context: StepContext) -> None:
        if self.when == "setup":
            raise ModelError("the model 'm' is not here; `tamis models pull m` fetches it")

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        raise InputError("column 'text' [of 'x'] holds (only) numbers; pass --text-column")


@dataclass(frozen=True)
class Hang:
    """Says which process it is in, then never ends, unless the file `allowed` is there."""

    folder: str
    label: str = "Hang"

    def setup(self, context: StepContext) -> None: ...

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        if not (Path(self.folder) / "allowed").exists():
            (Path(self.folder) / f"pid-{os.getpid()}").touch()
            time.sleep(600)
        return batch


@dataclass(frozen=True)
class Nap:
    """Takes some seconds over its first batch."""

    seconds: float
    label: str = "Nap"

    def setup(self, context: StepContext) -> None:
        time.sleep(self.seconds)

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        return batch


# ------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.sample_corpus(tmp_path_factory.mktemp("corpus"), rows=30)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("reference") / "out"
    helpers.run(corpus, out, STEPS, unit_rows=10)
    return helpers.read_output(out)


@pytest.fixture(scope="module")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("job-server")
    port_file = folder / "port"
    command = [
        "apache_beam.runners.portability.local_job_service_main",
        "--port=0",
        f"--port_file={port_file}",
    ]
    with _service(command, folder / "log") as process:
        _wait(port_file.exists, process, folder / "log")
        yield f"localhost:{port_file.read_text()}"


@pytest.fixture(scope="module")
def worker_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("worker-pool")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"]
    with _service(command, folder / "log") as process:
        _wait(lambda: _answers(port), process, folder / "log")
        yield f"localhost:{port}"


@pytest.fixture
def beam_args(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Beam's arguments for the mode a test is parametrised with."""
    mode = request.param
    if mode in LOCAL:
        return LOCAL[mode]
    server = request.getfixturevalue("job_server")
    args = ("--runner=PortableRunner", f"--job_endpoint={server}")
    if mode == "loopback":
        return (*args, "--environment_type=LOOPBACK")
    pool = request.getfixturevalue("worker_pool")
    return (*args, "--environment_type=EXTERNAL", f"--environment_config={pool}")


class _service:
    """A Beam service in a process of its own, which ends with the block."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        # The worker pool starts its workers as `python`, and they import this module.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=file, stderr=file, env=env, cwd=ROOT
            )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)  # the worker pool ends its workers on a clean exit only
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _wait(ready: Any, process: subprocess.Popen[bytes], log: Path | None = None, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(
                f"the process did not get ready: {log.read_text()[-2000:] if log else process.poll()}"
            )
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- every runner


@pytest.mark.parametrize("beam_args", MODES, indirect=True)
def test_output_is_the_same_on_every_runner(
    beam_args: tuple[str, ...], corpus: Path, reference: dict[str, Any], tmp_path: Path, capfd: Any
) -> None:
    result = helpers.run(corpus, tmp_path / "out", STEPS, unit_rows=10, beam_args=beam_args)
    assert result.state == "finished"
    assert helpers.read_output(tmp_path / "out") == reference
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("beam_args", "when"),
    [*((mode, "call") for mode in MODES), ("in_memory", "setup"), ("loopback", "setup")],
    indirect=["beam_args"],
)
def test_a_users_error_is_one_line_on_every_runner(
    beam_args: tuple[str, ...], when: str, corpus: Path, tmp_path: Path, capfd: Any
) -> None:
    expected = {
        "setup": (ModelError, "the model 'm' is not here; `tamis models pull m` fetches it"),
        "call": (InputError, "column 'text' [of 'x'] holds (only) numbers; pass --text-column"),
    }[when]
    with pytest.raises(TamisError) as caught:
        helpers.run(corpus, tmp_path / "out", (*STEPS, Refuse(when)), beam_args=beam_args)
    assert (type(caught.value), str(caught.value)) == expected
    assert capfd.readouterr() == ("", "")


def test_debugging_shows_what_the_runner_says(
    corpus: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMIS_DEBUG", "1")
    with pytest.raises(InputError):
        helpers.run(corpus, tmp_path / "out", [Refuse("call")], beam_args=THREADS)
    assert "Traceback" in capfd.readouterr().err


def test_a_portable_job_may_take_longer_than_beams_default_allows(
    job_server: str, corpus: Path, tmp_path: Path
) -> None:
    args = ("--runner=PortableRunner", f"--job_endpoint={job_server}", "--environment_type=LOOPBACK")
    assert [a for a in runners.beam_arguments(args, 1) if a.startswith("--job_server_timeout=")]
    with pytest.raises(TamisError, match="--job_server_timeout"):
        helpers.run(corpus, tmp_path / "out", [Nap(6)], beam_args=(*args, "--job_server_timeout=2"))


def test_a_worker_pool_that_is_not_there_is_one_line(job_server: str, corpus: Path, tmp_path: Path) -> None:
    args = ("--runner=PortableRunner", f"--job_endpoint={job_server}", "--environment_type=EXTERNAL")
    with pytest.raises(TamisError, match=r"cannot be reached.*runners\.md"):
        helpers.run(corpus, tmp_path / "out", beam_args=(*args, "--environment_config=localhost:1"))


# ------------------------------------------------------------------------------------- killed workers, killed runs


def test_a_killed_worker_stops_the_run_and_the_next_run_goes_on(
    corpus: Path, reference: dict[str, Any], tmp_path: Path, capfd: Any
) -> None:
    allowed = tmp_path / "allowed"
    steps = (*STEPS, helpers.StopAt(str(allowed), "part-1.parquet", 2, "kill"))
    with pytest.raises(FatalStepError, match=r"killed by signal 9 .*run the same command again"):
        helpers.run(corpus, tmp_path / "out", steps, unit_rows=10, workers=2)
    assert capfd.readouterr() == ("", "")
    allowed.touch()
    result = helpers.run(corpus, tmp_path / "out", steps, unit_rows=10, workers=2)
    assert result.state == "finished"
    assert helpers.read_output(tmp_path / "out") == reference


def hang(corpus: str, folder: str, workers: str) -> None:
    """Run in a process of its own: a job that hangs, and what a user sees of a Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        helpers.run(corpus, f"{folder}/out", (*STEPS, Hang(folder)), unit_rows=10, workers=int(workers))
    except KeyboardInterrupt:
        print("interrupted")


@pytest.fixture
def hanging(corpus: Path, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(workers: int) -> tuple[subprocess.Popen[str], list[int]]:
        code = (
            f"from tests.jobs.test_runners import hang; hang({str(corpus)!r}, {str(tmp_path)!r}, '{workers}')"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        _wait(lambda: len(list(tmp_path.glob("pid-*"))) == workers, process)  # type: ignore[arg-type]
        return process, [int(p.name.split("-")[1]) for p in tmp_path.glob("pid-*")]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_workers_do_not_outlive_a_run_that_is_killed(hanging: Any) -> None:
    process, pids = hanging(2)
    assert process.pid not in pids
    assert all(map(_alive, pids))
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_alive, pids))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_ends_at_once_and_quietly_and_can_go_on(
    workers: int, hanging: Any, corpus: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    process, _ = hanging(workers)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    assert process.communicate(timeout=60) == ("interrupted\n", "")
    (tmp_path / "allowed").touch()
    helpers.run(corpus, tmp_path / "out", (*STEPS, Hang(str(tmp_path))), unit_rows=10)
    assert helpers.read_output(tmp_path / "out") == reference


# ------------------------------------------------------------------------------------------------------- arguments


def test_arguments_name_the_local_runner_and_its_workers() -> None:
    assert runners.beam_arguments([], 1) == ["--runner=FnApiRunner"]
    assert runners.beam_arguments([], 3) == ["--runner=FnApiRunner", *PROCESSES[:1], "--direct_num_workers=3"]
    assert runners.beam_arguments(["--runner", "DirectRunner"], 1) == ["--runner=FnApiRunner"]
    assert runners.beam_arguments(["--runner=directrunner", "--direct_running_mode=in_memory"], 4) == [
        "--direct_running_mode=in_memory",
        "--runner=FnApiRunner",
    ]
    given = ["--runner=DataflowRunner", "--project=p"]
    assert runners.beam_arguments(given, 4) == given


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--numworkers=4"], "no option --numworkers=4"),
        (["stray"], "a job takes one input, and stray is one more"),
        (["--direct_num_workers=many"], "invalid int value"),
        (["--runner=DaskRunner"], "another runner"),
        (["--runner=PortableRunner", "--environment_type=LOOPBACK"], "needs --job_endpoint"),
        (
            ["--runner=PortableRunner", "--job_endpoint=localhost:1", "--environment_type=LOOPBACK"],
            "no job server",
        ),
        (["--runner=FlinkRunner"], "worker image holds no tamis"),
        (["--dry_run=true"], "only DataflowRunner"),
    ],
)
def test_arguments_that_cannot_run_are_refused_before_any_work(
    args: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(TamisError, match=says) as caught:
        runners.check_runner(runners.beam_arguments(args, 1), "/in", "/out")
    assert "\n" not in str(caught.value)


def test_beam_refusing_its_arguments_is_one_line() -> None:
    with pytest.raises(TamisError, match="Unexpected pipeline runner: Nonsense") as caught:
        runners.new_pipeline(["--runner=Nonsense"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "...\nModuleNotFoundError: No module named 'transforms' [while running 'x']\n",
            "no module transforms",
        ),
        ('status = StatusCode.UNAVAILABLE\n details = "no route to host"', "no route to host"),
        (
            "a\nschemas.errors.InputError: first\nb\nschemas.errors.OutputError: last [while running 'a (b)']\n",
            "^last$",
        ),
    ],
)
def test_a_remote_workers_traceback_becomes_a_line(text: str, says: str) -> None:
    explained = runners.explain(RuntimeError(text))
    assert isinstance(explained, TamisError)
    with pytest.raises(TamisError, match=says):
        raise explained


def test_an_error_of_ours_keeps_its_own_traceback() -> None:
    bug = RuntimeError("IndexError: list index out of range")
    assert runners.explain(bug) is bug


# ------------------------------------------------------------------------------------------------------- the graph

IMAGE = "registry.example/tamis:0.1.0"
DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=some-project",
    "--region=europe-west1",
    "--temp_location=gs://bucket/temp",
    f"--sdk_container_image={IMAGE}",
)


@pytest.fixture(scope="module")
def proto() -> Any:
    """The graph of a job, with the worker image named."""
    from apache_beam.transforms.environments import DockerEnvironment

    pipeline = runners.new_pipeline(["--runner=FnApiRunner"])
    build(pipeline, helpers.job("gs://bucket/out", STEPS, config={"words": ["idiot"] * 100}))
    return pipeline.to_runner_api(default_environment=DockerEnvironment.from_container_image(IMAGE))


def test_graph_has_the_stages_of_a_job_and_names_the_image(proto: Any) -> None:
    described = graph.describe_graph(proto)
    assert described.stages == (
        "PlanTasks",
        "ReadUnits",
        "ReplaceWord",
        "DropRows",
        "CommitUnits",
        "KnownReceipts",
        "AllReceipts",
        "AssembleShards",
        "FinishOutput",
    )
    assert described.images == (IMAGE,)
    graph.check_graph(described)


def test_no_text_is_shuffled_and_batches_travel_as_ipc(proto: Any) -> None:
    described = graph.describe_graph(proto)
    assert {s.split("/")[0] for s in described.shuffles} == {"PlanTasks", "AssembleShards", "FinishOutput"}
    assert {"transforms.shards.coders.ShardKeyCoder", "transforms.shards.coders.RecordBatchCoder"} <= set(
        described.coders
    )


def test_graph_is_small(proto: Any) -> None:
    described = graph.describe_graph(proto)
    assert described.bytes < 200_000
    assert described.pickled < 10_000


def test_graph_is_refused_when_no_runner_would_take_it(proto: Any) -> None:
    described = graph.describe_graph(proto)
    with pytest.raises(TamisError, match="10000001 bytes"):
        graph.check_graph(graph.Graph(**{**vars(described), "bytes": 10_000_001}))
    with pytest.raises(TamisError, match="names no worker image"):
        graph.check_graph(graph.Graph(**{**vars(described), "images": ()}))


def test_graph_loads_in_a_fresh_interpreter(proto: Any, tmp_path: Path) -> None:
    path = tmp_path / "graph.bin"
    path.write_bytes(proto.SerializeToString())
    code = """
import sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2 as api
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

proto = api.Pipeline.FromString(open(sys.argv[1], "rb").read())
pipeline = beam.Pipeline.from_runner_api(proto, FnApiRunner(), PipelineOptions())
fns = []

class Visitor(beam.pipeline.PipelineVisitor):
    def visit_transform(self, node):
        fns.append(type(getattr(node.transform, "fn", None)))

pipeline.visit(Visitor())
print(sorted(f.__name__ for f in fns if f.__module__.startswith("transforms.")))
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names, torch = done.stdout.splitlines()
    assert names == "['_AssembleDoFn', '_CommitDoFn', '_ReadDoFn', '_StepDoFn', '_StepDoFn']"
    assert torch == "False"


def test_dataflow_builds_and_checks_the_graph_offline(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "apache_beam.runners.dataflow.internal.apiclient", reason="tamis[gcp] is not installed"
    )
    path = tmp_path / "graph.json"
    args = (*DATAFLOW, "--dry_run=true", f"--dataflow_job_file={path}")
    result = helpers.run(corpus, tmp_path / "out", STEPS, beam_args=args)
    assert result.state == "checked"
    assert result.manifest is None
    assert "ReplaceWord > DropRows > CommitUnits" in result.detail
    assert IMAGE in result.detail
    environments = json.loads(path.read_text())["components"]["environments"].values()
    assert {e["urn"] for e in environments} == {"beam:env:docker:v1"}
    assert (tmp_path / "out/_tamis/plan.json").exists() or list((tmp_path / "out/_tamis").glob("plan*"))


@pytest.mark.parametrize(
    ("args", "source", "output", "kind", "says"),
    [
        (DATAFLOW, "/data/in", "gs://b/out", InputError, "cannot see the input"),
        (DATAFLOW, "gs://b/in", "out", OutputError, "cannot see the output"),
        (DATAFLOW[:-1], "gs://b/in", "gs://b/out", TamisError, "--sdk_container_image"),
    ],
)
def test_dataflow_is_refused_what_its_workers_cannot_see(
    args: tuple[str, ...],
    source: str,
    output: str,
    kind: type[TamisError],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam.runners.dataflow.internal.apiclient", sys)
    with pytest.raises(kind, match=says):
        runners.check_runner(args, source, output)
    runners.check_runner(DATAFLOW, "gs://b/in", "gs://b/out")


def test_dataflow_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam.runners.dataflow.internal.apiclient", None)
    with pytest.raises(ModelError, match=r"pip install 'tamis\[gcp\]'"):
        runners.check_runner(DATAFLOW, "gs://b/in", "gs://b/out")


# ---------------------------------------------------------------------------------------------- the flex template


def test_launcher_splits_a_flat_list_into_the_jobs_options_and_beams() -> None:
    flat = ["--input=gs://b/in", "--output=gs://b/out", "--text_column=body", "--lambda=0.3", "--overwrite=true",
            "--id_column=", "--runner=DataflowRunner", "--project=p", "--template_location=gs://b/t"]  # fmt: skip
    assert launch.command_line(flat) == [
        "detox", "gs://b/in", "--output", "gs://b/out", "--text-column", "body", "--lambda", "0.3", "--overwrite",
        "--progress", "plain", "--", "--runner=DataflowRunner", "--project=p", "--template_location=gs://b/t",
    ]  # fmt: skip


def test_launcher_names_the_image_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIS_WORKER_IMAGE", IMAGE)
    flat = ["--input=in", "--output=out", "--runner=DataflowRunner"]
    assert launch.command_line(flat)[-1] == f"--sdk_container_image={IMAGE}"
    given = launch.command_line([*flat, "--sdk_container_image=mine"])
    assert [a for a in given if "sdk_container_image" in a] == ["--sdk_container_image=mine"]


def test_launcher_passes_over_defaults_of_another_job_but_not_settings(tmp_path: Path) -> None:
    flat = ["--job=score", "--input=in", "--output=out", "--model=smollm2", "--adapter="]
    assert "smollm2" not in launch.command_line(flat)
    with pytest.raises(TamisError, match="score has no option tau"):
        launch.command_line([*flat, "--tau=0.4"])


def test_launcher_gives_embed_its_options_and_passes_over_the_others_defaults() -> None:
    flat = ["--job=embed", "--input=in", "--output=out", "--text={title} {text}", "--as=query", "--normalize=false",
            "--model=smollm2", "--scorer=jigsaw-bilstm", "--encoder=hf:org/name", "--runner=DataflowRunner"]  # fmt: skip
    assert launch.command_line(flat) == [
        "embed", "in", "--output", "out", "--text", "{title} {text}", "--as", "query", "--no-normalize", "--encoder",
        "hf:org/name", "--progress", "plain", "--", "--runner=DataflowRunner",
    ]  # fmt: skip
    with pytest.raises(TamisError, match="detox has no option store"):
        launch.command_line(["--input=in", "--output=out", "--store=int8"])


def test_launcher_runs_a_job(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flat = ["--job=score", f"--input={ROOT}/examples/corpus.jsonl", f"--output={out}", "--scorer=lexicon"]
    with pytest.raises(SystemExit) as ended:
        launch.main(flat)
    assert ended.value.code == 0
    assert (out / "_SUCCESS").exists()


def test_launcher_refuses_what_it_does_not_know(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main(["--job=nonsense"])
    assert ended.value.code == TamisError.exit_code
    assert capsys.readouterr().err == "tamis: no job 'nonsense'; the template runs detox, score, embed\n"
    with pytest.raises(TamisError, match="not --name=value"):
        launch.command_line(["input"])
