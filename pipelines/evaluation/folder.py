"""The folder an evaluation writes: `results.json`, one Parquet file an item kind, `report.html`, `_SUCCESS` last."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import OutputError
from transforms.shards.cache import RequestCache
from transforms.shards.files import Folder

RESULTS, SUCCESS, REPORT = "results.json", "_SUCCESS", "report.html"


class EvalFolder:
    """A result folder. What was asked of models is kept in it, so running again costs what is new.

    A finished evaluation stays whole until another one has something to write: what is refused before leaves it as it is.

    Args:
        url: Where to write.
        kind: `rewrites`, `spans`, `utility`, ...: another kind's folder is refused.
        cache: Where answers of models are kept; by default inside the folder.
        options: fsspec options of the filesystem.

    Raises:
        OutputError: The folder holds something else.
    """

    def __init__(
        self, url: str, kind: str, *, cache: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Folder(url, **(options or {}))
        self.kind = kind
        self._begun = False
        self._check()
        where = f"{self.folder.url.rstrip('/')}/_tamis/cache"
        self.cache = RequestCache(cache) if cache else RequestCache(where, **self.folder.options)

    def begin(self) -> None:
        """Take the end mark away: from here on the folder is not what it was. The first write does it, if nobody has."""
        if not self._begun:
            self.folder.remove(SUCCESS)
            self._begun = True

    def write_table(self, name: str, columns: Mapping[str, Sequence[Any] | pa.Array]) -> None:
        """Write one Parquet file of items."""
        self.begin()
        table = pa.table({k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()})
        with self.folder.publish(name) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def write_text(self, name: str, text: str) -> None:
        """Write a page."""
        self.begin()
        self.folder.write(name, text.encode("utf-8"))

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write `results.json` and, last, `_SUCCESS`.

        Returns:
            What was written: the results, with kind, version and time.
        """
        self.begin()
        record = {
            "kind": self.kind,
            "tamis_version": importlib.metadata.version("tamis"),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **results,
        }
        content = orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY)
        self.folder.write(RESULTS, content + b"\n")
        self.folder.write(SUCCESS, b"")
        return record

    def _check(self) -> None:
        if self.folder.exists(RESULTS):
            try:
                held = orjson.loads(self.folder.read(RESULTS)).get("kind")
            except (orjson.JSONDecodeError, AttributeError):
                held = None
            if held != self.kind:
                what = f"the results of `tamis eval {held}`" if held else f"another {RESULTS}"
                raise OutputError(f"{self.folder.url} holds {what}; pass another -o")
            return
        # A run that was killed left its cache, and perhaps some of its tables, but no results yet.
        strange = [n for n in self.folder.find() if not n.startswith("_tamis/cache/")]
        if strange and not self.folder.exists("_tamis/cache"):
            raise OutputError(f"{self.folder.url} is not empty ({strange[0]}); pass another -o")


def device_in_words(device: str = "auto") -> str:
    """What the models ran on, in general terms."""
    import platform

    import torch

    wanted = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return f"CPU ({platform.machine()})"
