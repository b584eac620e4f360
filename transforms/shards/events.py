"""Events: each worker appends what it did to a file of its own; whoever wants to know tails them.

Local runners show no live metrics, and a log is worth keeping anyway. On a local folder a worker appends lines; on
an object store, which cannot append, every flush is one small object.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from typing import Any

import orjson

from schemas.errors import FatalStepError
from transforms.shards.files import Folder

EVENTS = "_tamis/events"
_PULSE_SECONDS = 2.0


class EventLog:
    """Appends events to `OUT/_tamis/events`. Safe to share between threads; one file per process."""

    def __init__(self, output: Folder) -> None:
        self._output = output
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._count = 0
        self._last_pulse = 0.0

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event.

        Raises:
            FatalStepError: It cannot be written: the disk is full, or the store is gone. So will the units be.
        """
        event = {"t": round(time.time(), 6), "worker": self._name, "kind": kind, **fields}
        line = orjson.dumps(event) + b"\n"
        try:
            self._append(line)
        except OSError as error:
            raise FatalStepError(
                f"cannot write to {self._output.url}: {error}; make room and run the same command again: "
                "what is committed stays"
            ) from error

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._output.is_local:
                path = self._output.local(f"{EVENTS}/{self._name}.jsonl")
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(line)
            else:
                self._output.write(f"{EVENTS}/{self._name}-{self._count:06d}.jsonl", line)
                self._count += 1

    def pulse(self, **fields: Any) -> None:
        """A `progress` event, at most one every two seconds."""
        now = time.monotonic()
        if now - self._last_pulse >= _PULSE_SECONDS:
            self._last_pulse = now
            self.emit("progress", **fields)


def read_events(output: Folder) -> list[dict[str, Any]]:
    """All events so far, in time order; a line cut short by a kill is passed over."""
    events: list[dict[str, Any]] = []
    for content in output.read_many(output.find(EVENTS)).values():
        for line in content.splitlines():
            try:
                events.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue
    return sorted(events, key=lambda e: e.get("t", 0))
