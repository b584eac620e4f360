"""`tamis serve-dummy`: the dummy language-model server, to try a job out without a model or a cost."""

from __future__ import annotations

from collections.abc import Callable

from models.lm.dummy_server import DummyOptions, DummyServer


def _say(line: str) -> None:
    """At once, for whoever reads it through a pipe."""
    print(line, flush=True)


def run(
    host: str = "127.0.0.1",
    port: int = 8000,
    mode: str = "soften",
    fail_rate: float = 0.0,
    latency: float = 0.0,
    model: str = "dummy",
    seed: int = 0,
    notify: Callable[[str], None] = _say,
) -> None:
    """Serve until interrupted.

    Args:
        host: Address to listen on; only this machine by default, for it refuses nobody.
        port: 0 takes a free one.
        mode: `soften`, `echo`, `garbage` or `judge` (see `models.lm.dummy_server.DummyOptions`).
        fail_rate: Share of requests that fail, as real servers do.
        latency: Seconds each answer takes.
        model: The model's id.
        seed: Of the failures.
        notify: Called with each line for the user.

    Raises:
        ModelError: The port is taken, or an option means nothing.
    """
    options = DummyOptions(mode=mode, fail_rate=fail_rate, latency=latency, model=model, seed=seed)
    server = DummyServer(options, host, port)
    notify(f"serving model '{model}' at {server.url}; in a job: --model openai:{server.url}#{model}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        stats = server.stats
        failed = sum(stats.faults.values())
        notify(
            f"{stats.requests} requests: {stats.answered} answered ({stats.repeated} again), {failed} failed on purpose"
        )
