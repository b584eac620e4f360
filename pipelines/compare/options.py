"""From what was typed to a `CompareConfig`, and from a result to the lines that are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from models.metrics.bootstrap import ends
from pipelines.compare.config import CompareConfig
from pipelines.settings import validated
from schemas.errors import TamisError

if TYPE_CHECKING:
    from pipelines.compare.runner import CompareResult


def make_config(
    settings: Mapping[str, Any], file: Path | None = None, sets: Sequence[str] = ()
) -> CompareConfig:
    """Validate settings, and say in one line what is wrong with them.

    Args:
        settings: By name.
        file: Detox settings of all rewriting arms, TOML or JSON.
        sets: `path=value`, laid over them.

    Raises:
        TamisError: A setting is unknown or out of its range.
    """
    from pipelines.detox import load_settings

    detox = load_settings(file, {}, sets) if file is not None or sets else dict(settings.get("detox", {}))
    return validated(CompareConfig, {**settings, "detox": detox})


def names(text: str | None) -> list[str]:
    """Names separated by commas; `none` and nothing are none."""
    found = [part.strip() for part in (text or "").split(",")]
    return [part for part in found if part and part != "none"]


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas.

    Raises:
        TamisError: One of them is not.
    """
    try:
        return [int(part) for part in names(text)]
    except ValueError as error:
        raise TamisError(f"seeds are whole numbers separated by commas, not '{text}'") from error


def pairs(items: Sequence[str] | None, *, values: bool = True) -> dict[str, Any]:
    """`KEY=VALUE` items; with `values`, one that reads as JSON is taken as such.

    Raises:
        TamisError: An item is not a pair.
    """
    found: dict[str, Any] = {}
    for item in items or []:
        key, sign, value = item.partition("=")
        if not sign or not key or not value:
            raise TamisError(f"'{item}' is not NAME=VALUE")
        found[key] = _value(value) if values else value
    return found


def given_arms(folders: Sequence[str] | None, named: Sequence[str] | None) -> dict[str, str]:
    """Arms made before, by name: folders, which bear their own, and `NAME=FOLDER` items.

    Raises:
        TamisError: An item is not a pair, or two arms have one name.
    """
    listed = [(Path(f).name, f) for f in folders or []]
    listed += [pair for item in named or [] for pair in pairs([item], values=False).items()]
    found: dict[str, str] = {}
    for name, folder in listed:
        if name in found:
            raise TamisError(
                f"two arms are named '{name}' ({found[name]} and {folder}); name them with --arm NAME=FOLDER"
            )
        found[name] = folder
    return found


def recipes(items: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """`NAME:path=value` items as nested settings by name.

    Raises:
        TamisError: An item is not of that form.
    """
    from pipelines.detox import load_settings

    found: dict[str, list[str]] = {}
    for item in items or []:
        name, sign, setting = item.partition(":")
        if not sign or "=" not in setting or not name:
            raise TamisError(f"--recipe {item}: write it as NAME:path=value, such as mild:gate.tau=0.8")
        found.setdefault(name, []).append(setting)
    return {name: load_settings(None, {}, settings) for name, settings in found.items()}


def print_result(result: CompareResult) -> None:
    """Say in a few lines what came of it and where to look."""
    if result.results is None:
        return
    for arm in result.results["arms"]:
        kept = "" if arm["kept"] is None else f"{100 * arm['kept']:.0f} % of rows"
        emt, tp = arm["emt"], arm["tp"]
        print(f"{arm['name']:<26} EMT {emt['mean']:.3f} {ends(emt)}  TP {tp['mean']:.3f} {ends(tp)}  {kept}")
    if not result.complete:
        waiting = len(result.results["waiting"])
        print(f"{waiting} stages are not done, {len(result.failed)} failed; the same command goes on")
    print(f"report: {result.output}/report.html")


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
