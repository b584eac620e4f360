"""`tamis retry`: replay what died, with the settings of the run it died in; what lives is not touched."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import orjson

from pipelines.run import JOB, RunResult, RunSettings
from schemas.errors import OutputError
from transforms.shards.files import Folder
from transforms.shards.finish import MANIFEST, SUCCESS
from transforms.shards.plan import load_plan
from transforms.shards.receipts import read_receipts

# By job: its module, its configuration, and the names fields have there that its record calls otherwise.
_CONFIGS: dict[str, tuple[str, str, dict[str, str]]] = {
    "detox": ("pipelines.detox", "DetoxConfig", {}),
    "score": ("pipelines.score", "ScoreConfig", {}),
    "embed": ("pipelines.embed", "EmbedConfig", {"prompt": "prefix"}),
}

# Settings that stand beside the configuration; those of writing are not there in what older runs left.
_BESIDE = ("text_column", "id_column", "seed", "compression", "row_group_rows", "max_dead")


@dataclass(frozen=True)
class Replay:
    """What a retry is about to do.

    Attributes:
        rows: Dead rows to be tried again.
        units: Units they lie in.
        shards: Shards that could not be read.
        unfinished: Whether the output lacks its end mark, as where an earlier retry was killed.
    """

    rows: int
    units: int
    shards: int
    unfinished: bool = False

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.rows or self.units or self.shards or self.unfinished)


def find_dead(url: str, options: dict[str, Any] | None = None) -> Replay:
    """Count what a retry of this output would replay.

    Raises:
        OutputError: There is no job in the folder.
    """
    return _count_dead(url, options or {})


def retry_output(
    url: str, settings: RunSettings, options: dict[str, Any] | None = None
) -> tuple[Replay, RunResult | None]:
    """Run the job again over the units that hold dead rows and the shards that could not be read.

    The output stays as it is until the run has checked all it can and holds the folder's lock. Rows that lived in such a
    unit cost nothing but the reading: model answers come from the request cache. A run that was stopped, be it a retry
    that had already put the dead units back, goes on.

    Args:
        url: The output folder.
        settings: How to run.
        options: fsspec options of the output.

    Returns:
        What was replayed, and the result of the run (None when nothing is dead and nothing is left to do).

    Raises:
        OutputError: There is no job in the folder, or its kind cannot be retried.
    """
    folder = Folder(url, **(options or {}))
    stored = orjson.loads(folder.read(JOB)) if folder.exists() and folder.exists(JOB) else None
    if stored is not None and stored["name"] not in _CONFIGS:
        raise OutputError(f"{url} holds a {stored['name']} job; run its own command again instead")
    replay = _count_dead(url, options or {})
    if settings.dry_run or replay.nothing or stored is None:
        return replay, None
    module, kind, others = _CONFIGS[stored["name"]]
    job: Any = importlib.import_module(module)
    fields = getattr(job, kind).model_fields
    then = {others.get(k, k): v for k, v in stored["config"].items()}
    columns = {k: stored[k] for k in _BESIDE if k in stored}
    config = getattr(job, kind).model_validate(
        {
            **{k: v for k, v in {**then, **columns}.items() if k in fields},
            "input": stored["source"],
            "output": url,
            "storage_options": options or {},
        }
    )
    return replay, job.run(config, replace(settings, overwrite=False, replay=True))


def _count_dead(url: str, options: dict[str, Any]) -> Replay:
    output = Folder(url, **options)
    plan = load_plan(output) if output.exists() else None
    if plan is None or not output.exists(JOB):
        made = orjson.loads(output.read(MANIFEST)).get("job") if output.exists(MANIFEST) else None
        if made is not None:
            raise OutputError(f"{url} holds a {made} job; run its own command again instead")
        raise OutputError(f"{url} holds no job; pass the folder given as --output")
    stored = orjson.loads(output.read(JOB))
    receipts = read_receipts(output, plan, stored["config_hash"])
    dead = [r for r in receipts.values() if r.dead]
    unread = sum(bool(s.error) for s in plan.shards)
    return Replay(sum(r.dead for r in dead), len(dead), unread, not output.exists(SUCCESS))
