"""Worker processes of FnApiRunner that a run can rely on.

Beam's own `multi_processing` mode starts its workers through a shell and then forgets them: one that is killed (out
of memory, say) leaves the run waiting for ever, one at work when the run is interrupted is waited for, and all of
them log to the user's terminal. This module gives FnApiRunner an environment of ours instead. It builds on Beam's
`fn_api_runner.worker_handlers`, which is not a public interface: tests/jobs/test_runners.py is what notices a change.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import IO, Any, ClassVar

from apache_beam.portability.api import beam_fn_api_pb2, endpoints_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner, worker_handlers
from apache_beam.transforms import environments
from google.protobuf import text_format

_URN = "tamis:env:worker_process:v1"
_GRACE_SECONDS = 5.0
_ABORT_SECONDS = 0.2
_DYING_SECONDS = 0.5
_TAIL_BYTES = 4096
_WORKERS: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


def process_runner() -> FnApiRunner:
    """FnApiRunner whose workers are processes of ours; `--direct_num_workers` says how many."""
    WorkerProcess.loss = None
    return FnApiRunner(default_environment=WorkerProcessEnvironment.default())


@environments.Environment.register_urn(_URN, bytes)
class WorkerProcessEnvironment(environments.Environment):
    """Says that user code runs in `python -m pipelines.worker` processes on this machine."""

    def to_runner_api_parameter(self, context: Any) -> tuple[str, bytes]:
        """URN and (empty) payload."""
        return _URN, b""

    @staticmethod
    def from_runner_api_parameter(
        payload: bytes,
        capabilities: Iterable[str],
        artifacts: Iterable[Any],
        resource_hints: Mapping[str, bytes],
        context: Any,
    ) -> WorkerProcessEnvironment:
        """The environment a proto describes."""
        return WorkerProcessEnvironment(capabilities, artifacts, resource_hints)

    @classmethod
    def default(cls) -> WorkerProcessEnvironment:
        """The environment, with the capabilities of this SDK."""
        return cls(capabilities=environments.python_sdk_capabilities(), artifacts=())


@worker_handlers.WorkerHandler.register_environment(_URN, bytes)
class WorkerProcess(worker_handlers.GrpcWorkerHandler):
    """One worker process: started, watched, ended.

    Attributes:
        loss: What became of a worker of the latest run that ended before its time; None if none did.
    """

    loss: ClassVar[str | None] = None

    def __init__(self, payload: bytes, state: Any, provision_info: Any, grpc_server: Any) -> None:
        super().__init__(state, provision_info, grpc_server)
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._failed = False
        self._said = ""
        _WORKERS.add(self)

    def start_worker(self) -> None:
        """Start the process and watch it."""
        control = text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=self.control_address))
        env = {
            # One thread a process: two worker processes with a thread pool each slow one another down.
            "OMP_NUM_THREADS": "1",
            **os.environ,
            # Steps of a caller's own are found by the workers as they were found here.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CONTROL_API_SERVICE_DESCRIPTOR": control,
            "PIPELINE_OPTIONS": "{}",
            "WORKER_ID": self.worker_id,
        }
        # Beam prints a failing bundle's traceback, and libraries their progress: neither belongs on the terminal.
        quiet = not os.environ.get("TAMIS_DEBUG")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.worker"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
        )
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def close(self) -> None:
        """End the connection and the process; at once if it is still at work, for then the run was stopped."""
        _WORKERS.discard(self)
        if self._process is not None and (self._failed or self.control_conn._futures_by_id):
            # A worker that is just dying: its connections close before its exit can be seen.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._note_loss(self._process.wait(_DYING_SECONDS))
            self._end()
        self._ending.set()
        super().close()

    def stop_worker(self) -> None:
        """Let the idle process leave; end it if it does not."""
        process = self._process
        if process is None:
            return
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._end()

    def _end(self) -> None:
        self._ending.set()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        self._said = _last_line(process.stdout) if process.stdout else ""
        self._note_loss(process.wait())
        # Beam waits for ever for the answers of a worker that is gone, those it has yet to ask for included; and it
        # takes answers in order, so the other workers' must not keep it.
        while not self._ending.wait(_ABORT_SECONDS):
            for worker in [w for w in list(_WORKERS) if w._grpc_server is self._grpc_server]:
                worker._fail(f"schemas.errors.FatalStepError: {WorkerProcess.loss}")

    def _note_loss(self, code: int) -> None:
        if self._ending.is_set():
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = "most likely memory ran out, and fewer --workers need less" if code == -9 else self._said
        WorkerProcess.loss = (
            f"a worker process {how}{f' ({hint})' if hint else ''}; "
            "what is committed stays: run the same command again to go on"
        )

    def _fail(self, error: str) -> None:
        waiting = self.control_conn._futures_by_id
        for name in list(waiting):
            if future := waiting.pop(name, None):
                # Not `abort`: whoever waits for a bundle's data looks for an answer only.
                future.set(beam_fn_api_pb2.InstructionResponse(instruction_id=name, error=error))
                self._failed = True


def _last_line(stream: IO[bytes]) -> str:
    """Read a stream to its end, keep its last line."""
    tail = b""
    while block := stream.read1(_TAIL_BYTES):  # type: ignore[attr-defined]
        tail = (tail + block)[-_TAIL_BYTES:]
    lines = tail.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
