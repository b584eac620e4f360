"""Kill a rewriting job with SIGKILL at random points, run it again, and compare with a run nobody disturbed.

    python benchmarks/resume.py --kills 20                # a model server on loopback that counts what it is asked
    python benchmarks/resume.py --kills 5 --embedded      # the embedded model, in process

Every trial is a job in a fresh folder: started, killed with all its workers after a random time, run again to the end.
Its data, edits, attributes, dropped and dead rows must equal the undisturbed run's. With the server, `paid_again` counts
answers given a second time to the same request: at most those in flight at the kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

RESULTS = Path(__file__).resolve().parent / "results"
CONCURRENCY = 8  # requests in flight, the server backend's default


def make_corpus(path: Path, copies: int) -> None:
    """The example corpus a few times over, each copy with words of its own so that no two requests are alike."""
    lines = (Path(__file__).resolve().parents[1] / "examples/corpus.jsonl").read_text().splitlines()
    with path.open("w") as out:
        for copy in range(copies):
            for line in lines:
                row = json.loads(line)
                row["text"] = row["text"].replace(". ", f" {copy}. ").replace("idiot", f"idiot number {copy}")
                row["id"] = f"{copy}-{row['id']}"
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def command(source: Path, output: Path, model: str, workers: int) -> list[str]:
    """`tamis detox` with few candidates."""
    return [
        sys.executable, "-m", "pipelines.detox", str(source), "--output", str(output), "--id-column", "id",
        "--model", model, "--temperatures", "0.6,1.0", "--per-temperature", "2", "--unit-rows", "8",
        "--workers", str(workers), "--progress", "quiet",
    ]  # fmt: skip


def contents(output: Path) -> dict[str, Any]:
    """All an output says, by value: data byte for byte, sidecars row by row."""
    found: dict[str, Any] = {}
    for folder in ("data", "edits", "attributes", "dropped", "dead"):
        for path in sorted((output / folder).rglob("*")):
            if path.is_file():
                name = str(path.relative_to(output))
                found[name] = path.read_bytes() if folder == "data" else pl.read_parquet(path).to_dicts()
    return found


def trial(source: Path, output: Path, model: str, workers: int, after: float) -> bool:
    """Start, kill after so many seconds, run to the end; whether it was killed before it was done."""
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(
        command(source, output, model, workers),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    time.sleep(after)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.3)
    subprocess.run(command(source, output, model, workers), check=True, capture_output=True)
    return killed


def main() -> None:
    """Run the trials and write `benchmarks/results/resume-*.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--port", type=int, default=18473)
    parser.add_argument("--work", type=Path, default=Path("runs/resume"))
    args = parser.parse_args()
    from models.lm.dummy_server import DummyOptions, DummyServer

    args.work.mkdir(parents=True, exist_ok=True)
    source = args.work / "corpus.jsonl"
    make_corpus(source, args.copies)
    options = DummyOptions(latency=0.15)
    model = "smollm2" if args.embedded else f"openai:http://127.0.0.1:{args.port}/v1#dummy"
    rng = random.Random(5)
    with DummyServer(options, port=args.port) as server:
        shutil.rmtree(args.work / "whole", ignore_errors=True)
        started = time.perf_counter()
        subprocess.run(command(source, args.work / "whole", model, args.workers), check=True)
        seconds = time.perf_counter() - started
        requests = server.stats.answered
    whole = contents(args.work / "whole")
    rows: list[dict[str, Any]] = []
    while sum(r["killed"] for r in rows) < args.kills:
        after = rng.uniform(0.05, 1.0) * seconds
        with DummyServer(options, port=args.port) as server:
            killed = trial(source, args.work / "cut", model, args.workers, after)
            stats = server.stats
        equal = contents(args.work / "cut") == whole
        rows.append(
            {
                "after": round(after, 2),
                "killed": killed,
                "equal": equal,
                "answered": stats.answered,
                "paid_again": stats.repeated,
            }
        )
        print(rows[-1], file=sys.stderr)
    killed = [r for r in rows if r["killed"]]
    summary = {
        "model": "embedded" if args.embedded else "server",
        "workers": args.workers,
        "kills": len(killed),
        "equal": sum(r["equal"] for r in killed),
        "requests_of_a_whole_run": requests,
        "paid_again_max": max(r["paid_again"] for r in killed),
        "paid_again_total": sum(r["paid_again"] for r in killed),
        "in_flight_at_most": CONCURRENCY * args.workers,
        "trials": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"resume-{summary['model']}.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({k: v for k, v in summary.items() if k != "trials"}, indent=2))


if __name__ == "__main__":
    main()
