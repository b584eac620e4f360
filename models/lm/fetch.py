"""A model folder on an object store, copied to this machine once: what workers elsewhere need of a launcher's model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath

import fsspec

from models import store
from schemas.errors import ModelError
from schemas.fingerprint import fingerprint


def local_copy(folder: str | Path, **options: object) -> Path:
    """A model folder as a local path: itself, or for a URL its copy in tamis's cache.

    The copy is named by the URL and by the names, sizes and marks of its files, so a folder that was written anew is
    fetched anew, and it appears whole or not at all.

    Args:
        folder: A local path, a name (passed through), or any fsspec URL.
        **options: fsspec options of its filesystem.

    Raises:
        ModelError: There is no such folder, or it cannot be read.
    """
    url = str(folder)
    if "://" not in url:
        return Path(folder)
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
        found = fs.find(root, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot read the model folder {url}: {error}") from error
    root = root.rstrip("/")
    # What a training run keeps for itself is no part of the model.
    files = {name[len(root) + 1 :]: info for name, info in sorted(found.items())}
    files = {name: info for name, info in files.items() if not name.startswith("_tamis/")}
    if not files:
        raise ModelError(f"there is no model folder at {url}")
    marks = (f"{name}:{i.get('size')}:{_mark(i)}" for name, i in files.items())
    parent, last = PurePosixPath(root).parts[-2:]
    target = store.home() / "fetched" / fingerprint(url, *marks)[:32] / parent / last
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{name}", str(temporary / name))
        os.replace(temporary, target)  # noqa: PTH105 - fails where another process was first, as it should
    except OSError as error:
        if not target.is_dir():
            raise ModelError(f"cannot copy the model folder {url}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _mark(info: dict[str, object]) -> object:
    """Whatever the store has that tells one content of a file from another."""
    keys = ("ETag", "etag", "md5Hash", "crc32c", "checksum", "mtime", "LastModified", "created")
    return next((info[key] for key in keys if info.get(key)), "")
