"""A worker process of a local run: Beam's SDK harness, quiet on the terminal, and never outliving its run.

Started by `pipelines.local_workers`, one for each of `--workers`. Its standard input is a pipe whose other end the
run holds: when the run ends, however it ends (kill -9 included), the pipe closes and the worker goes with it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings


def main() -> None:
    """Serve bundles until the run is over."""
    # Ctrl-C reaches the whole process group; the run takes it and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not os.environ.get("TAMIS_DEBUG"):
        # The harness logs its own life at level INFO, and a failing bundle with a page of traceback that the run
        # gets anyway and turns into one line.
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    threading.Thread(target=_die_with_run, name="tamis-lifeline", daemon=True).start()

    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main([])


def _die_with_run() -> None:
    lifeline = sys.stdin.fileno()
    while os.read(lifeline, 1):
        pass
    # No clean-up on purpose: what is committed is whole, and a model call may still be hours from its end.
    os._exit(0)


if __name__ == "__main__":
    main()
