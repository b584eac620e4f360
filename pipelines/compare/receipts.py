"""The settings of a comparison and the receipts of its stages: small files, written whole, that a kill leaves true."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import STAGES, Stage
from schemas.errors import OutputError

CONFIG = "compare.json"
SUCCESS = "_SUCCESS"
STARTED = "_tamis/started"
LOGS = "_tamis/logs"


@dataclass(frozen=True)
class Receipt:
    """What became of a stage.

    Attributes:
        name: The stage's.
        key: The stage's, when it ran.
        seconds: Of all attempts that got somewhere: a stage that was killed and went on counts both.
        tokens: Trained on, written or read.
        pace: What `tokens / seconds` is a rate of.
        facts: Figures of its result.
        removed: Its folder was removed when nothing needed it any more.
    """

    name: str
    key: str
    seconds: float
    tokens: int = 0
    pace: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    removed: bool = False


def read_receipts(output: Path) -> dict[str, Receipt]:
    """All receipts, by name of stage; a file that is not one is passed over."""
    found: dict[str, Receipt] = {}
    for path in sorted((output / STAGES).glob("*.json")):
        record = read_json(path)
        if record is not None and record.keys() >= {"name", "key", "seconds"}:
            found[record["name"]] = Receipt(
                **{k: v for k, v in record.items() if k in Receipt.__annotations__}
            )
    return found


def write_receipt(output: Path, receipt: Receipt) -> None:
    """Write a receipt: the last thing a stage does."""
    write_json(output / STAGES / f"{receipt.name}.json", asdict(receipt))


def done_stages(
    stages: Iterable[Stage], receipts: Mapping[str, Receipt], config: CompareConfig | None = None
) -> set[str]:
    """Stages whose receipt bears their key, and whose result is there or no longer needed.

    Args:
        stages: First things first.
        receipts: By name of stage.
        config: The settings, to look whether somebody took a result away; None believes the receipts.
    """
    listed = list(stages)
    done = {s.name for s in listed if s.name in receipts and s.bears(receipts[s.name].key)}
    for stage in reversed(listed):  # what needs a result is looked at before it
        gone = stage.name in done and (receipts[stage.name].removed or _is_gone(stage, config))
        users = [s.name for s in listed if stage.name in s.needs]
        if gone and not (users and all(u in done for u in users)):
            done.discard(stage.name)
    return done


def _is_gone(stage: Stage, config: CompareConfig | None) -> bool:
    """Whether a stage's folder is not there, though it had one."""
    if config is None or stage.kind == "facts":
        return False
    if stage.kind == "corpus" and (stage.arm == arms.RAW or stage.arm in config.given):
        return False
    return not (Path(config.output) / stage.folder).exists()


def changed_stages(output: Path, stages: Iterable[Stage], receipts: Mapping[str, Receipt]) -> list[Stage]:
    """Stages that were done, or begun, under another key: their settings or inputs have changed."""
    changed = []
    for stage in stages:
        begun = read_json(output / STARTED / f"{stage.name}.json") or {}
        keys = {begun.get("key"), receipts[stage.name].key if stage.name in receipts else None} - {None}
        if keys and not any(stage.bears(key) for key in keys):
            changed.append(stage)
    return changed


def renew_keys(output: Path, stages: Iterable[Stage], receipts: Mapping[str, Receipt]) -> None:
    """Give receipts that bear a stage's former key its present one: the former need not be found again another time."""
    for stage in stages:
        receipt = receipts.get(stage.name)
        if receipt is not None and receipt.key != stage.key and stage.bears(receipt.key):
            write_receipt(output, replace(receipt, key=stage.key))
        path = output / STARTED / f"{stage.name}.json"
        begun = read_json(path) or {}
        if begun.get("key") != stage.key and stage.bears(begun.get("key")):
            write_json(path, {**begun, "key": stage.key})


def begin_stage(output: Path, stage: Stage) -> None:
    """Note that a stage begins; what another key left in its folder goes.

    Answers of models that were paid for stay: a corpus is left to the detox job, which knows itself what of it holds, and
    of an evaluation the cache is kept.
    """
    path = output / STARTED / f"{stage.name}.json"
    begun = read_json(path) or {}
    if not stage.bears(begun.get("key")):
        (output / stage.receipt).unlink(missing_ok=True)
        if stage.kind in {"toxicity", "utility"}:
            _clear(output / stage.folder, "_tamis/cache")
        elif stage.kind not in {"corpus", "facts"}:
            shutil.rmtree(output / stage.folder, ignore_errors=True)
        begun = {"seconds": 0.0}
    write_json(path, {**begun, "key": stage.key})


def _clear(folder: Path, kept: str) -> None:
    """Remove what is in a folder, but for one folder in it."""
    first, _, rest = kept.partition("/")
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == first:
            if rest:
                _clear(path, rest)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def add_seconds(output: Path, stage: Stage, seconds: float) -> None:
    """Remember how long an attempt worked that has not finished its stage (yet)."""
    path = output / STARTED / f"{stage.name}.json"
    begun = read_json(path) or {"key": stage.key}
    write_json(path, {**begun, "seconds": round(seconds, 1)})


def seconds_before(output: Path, stage: Stage) -> float:
    """Seconds that earlier attempts worked on a stage."""
    begun = read_json(output / STARTED / f"{stage.name}.json") or {}
    return float(begun.get("seconds", 0.0)) if stage.bears(begun.get("key")) else 0.0


def save_plan(
    output: Path, config: CompareConfig, stages: Sequence[Stage], verdict: Mapping[str, Any]
) -> None:
    """Keep the settings and the stages, for the processes that do them and for whoever looks later."""
    record = {
        "config": config.model_dump(mode="json"),
        "stages": [asdict(s) for s in stages],
        "judge": dict(verdict),
    }
    write_json(output / CONFIG, record)


def load_plan(output: Path) -> tuple[CompareConfig, list[Stage]]:
    """What `save_plan` kept.

    Raises:
        OutputError: There is no comparison in the folder.
    """
    record = read_json(output / CONFIG)
    if record is None:
        raise OutputError(f"{output} holds no comparison")
    stages = [Stage(**{**s, "needs": tuple(s["needs"]), "rank": tuple(s["rank"])}) for s in record["stages"]]
    return CompareConfig.model_validate(record["config"]), stages


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, or half of one."""
    try:
        record = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return record if isinstance(record, dict) else None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
    temporary.replace(path)
