"""Inputs: from what the user typed to a list of shards.

A file, a folder, a glob, a `datasets` folder, an output of tamis, a hub id; local or any fsspec URL.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from models.lineage import brief, merged, outputs_above
from schemas.errors import InputError
from transforms.shards.files import Folder, modified
from transforms.shards.formats import format_of
from transforms.shards.steps import describe

_GLOB = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://")
# What `datasets` keeps beside its Arrow files; copied along so that the output loads the same way.
_COMPANIONS = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}
_EXAMPLES = 3  # names of ignored files that are shown


class ShardFile(NamedTuple):
    """One input file.

    Attributes:
        name: Path relative to the input root.
        format: `parquet`, `jsonl` or `arrow`.
        size: Bytes.
        stamp: Modification time as the filesystem tells it; with the size, a quick sign that nothing changed.
    """

    name: str
    format: str
    size: int
    stamp: str


@dataclass(frozen=True)
class InputListing:
    """All of an input.

    Attributes:
        root: The folder shard names are relative to.
        shards: Sorted by name.
        companions: Files copied unchanged (a `datasets` folder's own JSON).
        ignored: Number of files that are no shards.
        examples: Names of a few of these.
        lineage: run id and config hash of the tamis output this is, if it is one.
        walked: Whether all below the root was looked through, so that an output there would become input.
    """

    root: Folder
    shards: tuple[ShardFile, ...]
    companions: tuple[str, ...] = ()
    ignored: int = 0
    lineage: dict[str, Any] | None = None
    walked: bool = False
    examples: tuple[str, ...] = ()


def list_input(source: str, options: dict[str, Any] | None = None) -> InputListing:
    """Find the shards of an input.

    Args:
        source: What the user typed.
        options: fsspec options of its filesystem.

    Raises:
        InputError: There is nothing there, or nothing that is a shard; its name is empty, or no UTF-8.
    """
    options = options or {}
    if not source.strip():
        raise InputError("the input is empty; pass a file, folder, glob, URL or hub id")
    _check_name(source)
    try:
        return _find(source, options)
    except InputError:
        raise
    except Exception as error:
        # An unknown protocol, a filesystem that is not installed, a bucket or hub that cannot be reached.
        hint = " (no such folder here, so it was taken for a hub id)" if is_hub_id(source) else ""
        raise InputError(f"no such input: {source}{hint}: {describe(error)}") from error


def _check_name(name: str) -> None:
    """Refuse a name that neither the plan nor the manifest could hold, for both are JSON.

    Raises:
        InputError: It is one.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{_printable(name)}: its name is not UTF-8; rename it") from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def is_hub_id(source: str) -> bool:
    """Whether a source is taken for a dataset's id on a hub: shaped like one, and nothing here has that name."""
    return bool(_HUB_ID.match(source)) and not _URL.match(source) and not Path(source).exists()


def _find(source: str, options: dict[str, Any]) -> InputListing:
    hub = is_hub_id(source)
    if _GLOB.search(source) and not Path(source).exists():
        return _from_glob(source, options)
    folder = Folder(f"hf://datasets/{source}" if hub else source, **options)
    if not folder.exists():
        hint = " (neither a folder here nor a data set on the hub)" if hub else ""
        raise InputError(f"no such input: {source}{hint}")
    if folder.fs.isfile(folder.path()):
        parent, _, name = folder.url.rpartition("/")
        return _with_lineage(_listing(_root(parent, folder.url, options), [name], source), source)
    if folder.exists("_tamis/plan.json"):
        return _from_output(folder, source)
    listing = _with_lineage(_listing(folder, folder.find(closed=_is_passed_over), source), source)
    return replace(listing, walked=True)


def _root(parent: str, source: str, options: dict[str, Any]) -> Folder:
    """The folder something stands in, be it the working directory or the root of a filesystem."""
    if parent.endswith(":/"):  # memory://x
        parent += "/"
    return Folder(parent or ("/" if source.startswith("/") else "."), **options)


def _from_glob(source: str, options: dict[str, Any]) -> InputListing:
    fixed = source[: _GLOB.search(source).start()].rpartition("/")[0]  # type: ignore[union-attr]
    root = _root(fixed, source, options)
    pattern = source[len(fixed) :].lstrip("/") if fixed else source.lstrip("/")
    if root.is_local:
        _check_listable(root, pattern)
    matches = root.fs.glob(f"{root.root.rstrip('/')}/{pattern}")
    cut = len(root.root.rstrip("/")) + 1
    names = [m[cut:] for m in sorted(matches) if root.fs.isfile(m)]
    if not names:
        raise InputError(f"nothing matches {source}")
    return replace(_with_lineage(_listing(root, names, source), source), walked="**" in pattern)


def _check_listable(root: Folder, pattern: str) -> None:
    """Refuse a folder that cannot be listed and may hold what a pattern matches: fsspec's globs pass it over.

    Raises:
        InputError: There is one.
    """
    if not os.path.isdir(root.root):  # noqa: PTH112 - names that are not UTF-8 stay as they are
        return
    parts = pattern.split("/")

    def fits(name: str) -> bool:
        for i, part in enumerate(name.split("/")):
            if "**" in parts[i]:
                return not _is_passed_over(name)
            if i + 1 == len(parts) or not fnmatch.fnmatchcase(part, parts[i]):
                return False
        return not _is_passed_over(name)

    for folder, folders, _ in os.walk(root.root, onerror=lambda error: root.refuse(error)):
        above = folder.removeprefix(root.root.rstrip("/")).lstrip("/")
        folders[:] = [name for name in folders if fits(f"{above}/{name}".lstrip("/"))]


def _is_passed_over(name: str) -> bool:
    """Whether a path lies where no shards are looked for."""
    # Every ext4 disk has a lost+found that only root may list.
    return any(part.startswith((".", "_")) or part == "lost+found" for part in name.split("/"))


def _from_output(folder: Folder, source: str) -> InputListing:
    """An output of tamis: open what its manifest names, and nothing else."""
    if not (folder.exists("_SUCCESS") and folder.exists("manifest.json")):
        raise InputError(
            f"{source} is an unfinished tamis output (no _SUCCESS); run its job again to finish it"
        )
    manifest = json.loads(folder.read("manifest.json"))
    root = folder.child("data")
    names = [s["path"] for s in manifest["shards"] if not s.get("error")]
    names += list(manifest.get("companions", ()))
    return replace(_listing(root, names, source), lineage=_lineage(manifest))


def _lineage(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an input that is an output of tamis; its models, so that a judge is known from what ranked."""
    lineage = {key: manifest.get(key) for key in ("job", "run_id", "config_hash", "lineage")}
    models = brief(manifest)
    return lineage | ({"models": models} if models else {})


def _with_lineage(listing: InputListing, source: str) -> InputListing:
    """The same, knowing which outputs of tamis its shards belong to: a path or a pattern may lead into one's `data`.

    Raises:
        InputError: One of them was never finished.
    """
    root = listing.root
    above = outputs_above(root.fs, (root.path(shard.name) for shard in listing.shards))
    unfinished = next((found.root for found in above if found.manifest is None), None)
    if unfinished is not None:
        raise InputError(
            f"{source}: {unfinished} is an unfinished tamis output (no _SUCCESS); run its job again to finish it"
        )
    manifests = [found.manifest for found in above if found.manifest is not None]
    return replace(listing, lineage=_lineage(merged(manifests))) if manifests else listing


def _listing(root: Folder, names: list[str], source: str) -> InputListing:
    _check_name(root.url)
    shards: list[ShardFile] = []
    companions: list[str] = []
    ignored: list[str] = []
    saved = _saved_files(root, names)
    for name in names:
        parts = name.split("/")
        if name.endswith(".arrow") and name not in saved.get(name.rpartition("/")[0], {name}):
            continue
        if _is_passed_over(name):
            continue
        format_ = format_of(name)
        if format_ is not None:
            _check_name(name)
        if parts[-1] in _COMPANIONS:
            companions.append(name)
        elif format_ is None:
            ignored.append(name)
        else:
            info = root.fs.info(root.path(name))
            shards.append(ShardFile(name, format_, int(info.get("size") or 0), modified(info)))
    if not shards:
        seen = f" ({len(ignored)} other files there)" if ignored else ""
        raise InputError(f"no Parquet, JSONL or Arrow shards in {source}{seen}")
    examples = tuple(_printable(name) for name in sorted(ignored)[:_EXAMPLES])
    return InputListing(root, tuple(sorted(shards)), tuple(companions), len(ignored), examples=examples)


def _saved_files(root: Folder, names: list[str]) -> dict[str, set[str]]:
    """For each folder `datasets` saved, the files its `state.json` names: others are caches of its own `map`."""
    found: dict[str, set[str]] = {}
    for name in names:
        folder, _, base = name.rpartition("/")
        if base == "state.json":
            try:
                files = json.loads(root.read(name))["_data_files"]
                found[folder] = {f"{folder}/{f['filename']}".lstrip("/") for f in files}
            except (ValueError, KeyError, TypeError):
                continue  # some other tool's state.json
    return found
