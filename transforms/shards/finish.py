"""Finish: entries are counted against the plan, the report and the manifest are written, `_SUCCESS` comes last."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from transforms.shards.assemble import remove_stale
from transforms.shards.events import EventLog, read_events
from transforms.shards.files import Folder, copy_file
from transforms.shards.formats import AssembleOptions
from transforms.shards.plan import Plan
from transforms.shards.receipts import Receipt, total

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"
_PACKAGES = (
    "tamis", "apache-beam", "pyarrow", "polars", "torch", "transformers", "peft", "sentence-transformers", "faiss-cpu",
    "detoxify",
)  # fmt: skip


def finish_output(
    source: Folder,
    output: Folder,
    plan: Plan,
    entries: Sequence[Mapping[str, Any]],
    receipts: Sequence[Receipt],
    facts: Mapping[str, Any],
    hook: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Close an output folder.

    Args:
        source: Input root, for companions copied along.
        output: Output folder.
        plan: What was to be done.
        entries: One manifest entry per assembled shard.
        receipts: All receipts of the run.
        facts: Job, configuration, models, seed, lineage.
        hook: Writes the report and the card from the folder and its manifest; if it fails, the output is still
            whole, so the failure is recorded and shown but does not undo the run.

    Returns:
        The manifest.

    Raises:
        RuntimeError: Some shard of the plan has no entry.
    """
    by_name = {e["path"]: dict(e) for e in entries}
    missing = [s.name for s in plan.shards if s.name not in by_name]
    if missing:
        raise RuntimeError(
            f"{len(missing)} shards were not assembled, the first {missing[0]}; run the job again"
        )
    for name in plan.companions:
        copy_file(source, name, output, f"data/{name}")
    shards = [by_name[s.name] for s in plan.shards]
    remove_stale(output, shards, plan.companions)
    manifest = build_manifest(output, plan, shards, receipts, facts)
    output.write(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    events = EventLog(output)
    if hook is not None:
        try:
            hook(output.url)
        except Exception as error:
            manifest["report_error"] = f"{type(error).__name__}: {error}"
            output.write(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
            events.emit("log", message=f"the report could not be written: {manifest['report_error']}")
    output.write(SUCCESS, str(manifest["run_id"]).encode() + b"\n")
    events.emit("run", state="finished", **manifest["totals"])
    return manifest


def is_finished(output: Folder, plan: Plan, config_hash: str, options: AssembleOptions) -> bool:
    """Whether an output is already whole, and what a run of this plan and configuration would make."""
    if not (output.exists(SUCCESS) and output.exists(MANIFEST)):
        return False
    manifest = orjson.loads(output.read(MANIFEST))
    made = {s["path"]: s.get("source_fingerprint") for s in manifest["shards"]}
    named = {s["path"] for s in manifest["shards"] if not s.get("error")} | set(manifest["companions"])
    return (
        manifest["config_hash"] == config_hash
        and manifest.get("assemble") == asdict(options)
        and made == {s.name: s.fingerprint for s in plan.shards}
        and {f"data/{name}" for name in named} <= set(output.find("data"))
    )


def build_manifest(
    output: Folder,
    plan: Plan,
    shards: Sequence[Mapping[str, Any]],
    receipts: Sequence[Receipt],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest as a dictionary; see docs/output.md for its fields."""
    events = read_events(output)
    starts = [e["t"] for e in events if e.get("kind") == "run" and e.get("state") == "started"]
    names = ("rows_in", "rows_kept", "rows_dropped", "rows_dead", "rows_changed", "edits", "bytes")
    sums = total(receipts)
    now = time.time()
    started = starts[-1] if starts else now
    return {
        "tamis_version": _version("tamis"),
        "run_id": _last(events, "run_id"),
        "created": _iso(starts[0] if starts else now),
        "finished": _iso(now),
        "seconds": round(now - started, 3),
        **facts,
        "input": {
            "root": plan.input_url,
            "text_column": plan.text_column,
            "id_column": plan.id_column,
            "shards": len(plan.shards),
            "bytes": sum(s.size for s in plan.shards),
            "ignored": plan.ignored,
            "ignored_examples": list(plan.ignored_examples),
        },
        "totals": {name: sum(int(s.get(name) or 0) for s in shards) for name in names},
        "counters": sums["counters"],
        "outputs": {
            "data": "data",
            "edits": any(s.get("edits") for s in shards),
            "attributes": sorted({a for s in shards for a in s.get("attributes", ())}),
            "dropped": any(s.get("rows_dropped") for s in shards),
            "dead": any(s.get("rows_dead") for s in shards),
        },
        "companions": list(plan.companions),
        "shards": list(shards),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.system(),
            "packages": {p: v for p in _PACKAGES if (v := _version(p))},
        },
    }


def _last(events: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [str(e[name]) for e in events if name in e]
    return values[-1] if values else ""


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
