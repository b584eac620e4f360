"""Files through fsspec: one place that knows how to write so that no reader ever sees half a file."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import InputError, TamisError

TEMPORARY = "_tamis/tmp"  # what is being written; a killed run leaves its parts there
_BLOCK = 8 << 20
_TIMES = ("mtime", "LastModified", "updated", "created")
_REQUESTS = 32  # at once, where a store removes files one by one: a request is nearly all waiting


class Folder:
    """A folder on any filesystem fsspec knows, addressed by paths relative to it.

    Args:
        url: `out`, `/data/out`, `s3://bucket/out`, `memory://out` ...
        options: Passed to the filesystem (`endpoint_url`, credentials).

    Raises:
        TamisError: The name is empty: most likely a variable that is not set, and surely not the root of the disk.
    """

    def __init__(self, url: str | os.PathLike[str], **options: Any) -> None:
        typed = str(url)
        if not typed.strip():
            raise TamisError("an empty name is no folder; pass its path (`.` is the working directory)")
        self.url = typed if typed.endswith("://") else typed.rstrip("/") or "/"
        self.options = options
        self.fs, root = fsspec.core.url_to_fs(self.url, **options)
        self.root = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local:
            # One name, and absolute: a worker may have another working directory.
            self.url = self.root = os.path.abspath(self.root)  # noqa: PTH100 - resolve() would follow links

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __reduce__(self) -> Any:
        return (_folder, (self.url, self.options))

    def path(self, name: str = "") -> str:
        """Path of `name` as the filesystem wants it."""
        return f"{self.root.rstrip('/')}/{name}".rstrip("/") if name else self.root

    def local(self, name: str = "") -> Path:
        """`pathlib.Path` of `name`; only where `is_local`."""
        return Path(self.path(name))

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        self._forget_listings()
        return bool(self.fs.exists(self.path(name)))

    def find(self, name: str = "", *, closed: Callable[[str], bool] | None = None) -> list[str]:
        """All files below `name`, relative to this folder, sorted; empty if there is no such folder.

        Args:
            name: Where to look.
            closed: Asked about each local folder that cannot be listed, by its path relative to this one: whether
                it may be passed over.

        Raises:
            InputError: A local folder cannot be listed, and may not be passed over.
        """
        base = self.path(name)
        self._forget_listings()
        if not self.fs.exists(base):
            return []
        above = self.root.rstrip("/") + "/"
        paths = self._walk(base, closed) if self.is_local else self.fs.find(base)
        return sorted(p.removeprefix(above) for p in paths)  # archives name no root

    def _walk(self, base: str, closed: Callable[[str], bool] | None) -> Iterator[str]:
        # Not by fsspec's `find`, which leaves out the folders it cannot list, and says nothing.
        if not os.path.isdir(base):  # noqa: PTH112 - names that are not UTF-8 stay as they are
            yield base
        for folder, folders, files in os.walk(base, onerror=lambda error: self.refuse(error, closed)):
            links = [name for name in folders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114
            for name in (*links, *files):  # links to folders are not followed: they may lead in a circle
                yield f"{folder.rstrip('/')}/{name}"

    def refuse(self, error: OSError, closed: Callable[[str], bool] | None = None) -> None:
        """Take the error of a listing: what vanished meanwhile, and what may be passed over, is none.

        Raises:
            InputError: It is one.
        """
        path = os.fspath(error.filename or self.root)
        name = path.removeprefix(self.root.rstrip("/") + "/")
        if not isinstance(error, FileNotFoundError) and not (closed is not None and closed(name)):
            raise InputError(
                f"cannot list {path}: {error.strerror or error}; make it readable, or move it elsewhere"
            ) from error

    def info(self, name: str) -> dict[str, Any]:
        """What the filesystem says of a file now.

        Raises:
            FileNotFoundError: It is not there.
        """
        self._forget_listings()
        return dict(self.fs.info(self.path(name)))

    def _forget_listings(self) -> None:
        # Object stores' clients answer from listings they saw before other workers wrote.
        if not self.is_local:
            self.fs.invalidate_cache()

    def read(self, name: str) -> bytes:
        """The whole content of a file."""
        return bytes(self.fs.cat_file(self.path(name)))

    def read_many(self, names: list[str]) -> dict[str, bytes]:
        """Contents of many small files at once (concurrent on object stores); missing ones are left out."""
        if self.is_local:
            return {n: self.local(n).read_bytes() for n in names if self.local(n).exists()}
        found = read_objects(self.fs, [self.path(n) for n in names])
        return {n: content for n, content in zip(names, found, strict=True) if content is not None}

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return self.fs.open(self.path(name), "rb")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file in one piece: readers see the old content or the new, never a part."""
        if not self.is_local:
            self.fs.pipe_file(self.path(name), content)
            return
        with self.publish(name) as temporary:
            temporary.write_bytes(content)

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Give a local path to write to; on a clean exit the file appears under `name` at once.

        On an error nothing appears, and what was written is removed.
        """
        if self.is_local:
            # On the same disk, for the rename, but not beside the target: readers list those folders.
            self.local(name).parent.mkdir(parents=True, exist_ok=True)
            self.local(TEMPORARY).mkdir(parents=True, exist_ok=True)
            temporary = self.local(TEMPORARY) / f"{uuid.uuid4().hex}-{Path(name).name}"[:200]
        else:
            import tempfile

            temporary = Path(tempfile.mkdtemp(prefix="tamis-")) / Path(name).name
        try:
            yield temporary
            if self.is_local:
                temporary.replace(self.local(name))
            else:
                self.fs.put_file(str(temporary), self.path(name))
        finally:
            temporary.unlink(missing_ok=True)
            if not self.is_local:
                shutil.rmtree(temporary.parent, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""
        path = self.path(name)
        if not self.fs.exists(path):
            return
        if self.is_local:
            self.fs.rm(path, recursive=True)
        elif self.fs.isfile(path):
            self.fs.rm_file(path)
        else:
            self._remove_objects(path, itself=bool(name))

    def _remove_objects(self, path: str, *, itself: bool) -> None:
        # Not by `rm`, which takes the name for a pattern and would remove what else it matches.
        self._forget_listings()
        below = self.fs.find(path, withdirs=True, detail=True)
        folders = {p for p, info in below.items() if info.get("type") == "directory" and p != path}
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(self._remove_object, [p for p in below if p not in folders and p != path]))
        self._forget_listings()
        if self.fs.isdir(path):  # a filesystem with folders of their own, which an empty one survives
            for folder in [*sorted(folders, reverse=True), *([path] if itself else [])]:
                with suppress(OSError, NotImplementedError):
                    self.fs.rmdir(folder)

    def _remove_object(self, path: str) -> None:
        with suppress(FileNotFoundError):  # another worker was faster
            self.fs.rm_file(path)

    def child(self, name: str) -> Folder:
        """The folder `name` inside this one."""
        return Folder(f"{self.url}/{name}", **self.options)


def _folder(url: str, options: dict[str, Any]) -> Folder:
    return Folder(url, **options)


def read_objects(fs: Any, paths: list[str]) -> list[bytes | None]:
    """Contents of many small objects, concurrently where the client can; None for one that is not there.

    Not by `cat`, which takes a name for a pattern: asked for `a[1]` it answers with the content of `a1`.

    Raises:
        OSError: The store cannot be read.
    """
    found = fs.cat_ranges(paths, None, None, on_error="return") if paths else []
    for content in found:
        if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
            raise content
    return [None if isinstance(content, BaseException) else bytes(content) for content in found]


def copy_file(source: Folder, name: str, target: Folder, target_name: str) -> None:
    """Copy a file as it stands, on the server's side where both lie on one object store."""
    if source.is_local and target.is_local:
        with target.publish(target_name) as temporary:
            shutil.copyfile(source.local(name), temporary)
    elif type(source.fs) is type(target.fs) and source.options == target.options:
        target.fs.cp_file(source.path(name), target.path(target_name))
    else:
        with target.publish(target_name) as temporary:
            source.fs.get_file(source.path(name), str(temporary))


def file_fingerprint(folder: Folder, name: str, info: dict[str, Any] | None = None) -> str:
    """Name a file's content: xxh3-128 of its bytes, or the object store's own checksum where it has one."""
    info = info or folder.fs.info(folder.path(name))
    if checksum := _checksum(info):
        return checksum
    state = xxhash.xxh3_128()
    with folder.open(name) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return f"xxh3:{state.hexdigest()}"


def is_unchanged(folder: Folder, name: str, size: int, stamp: str, fingerprint: str) -> bool:
    """Whether a file still is what was noted of it; its content is read only where its time says it may not be.

    Args:
        folder: Where it lies.
        name: Its name.
        size: Its size then.
        stamp: `modified` then.
        fingerprint: `file_fingerprint` then.
    """
    try:
        info = folder.info(name)
        if int(info.get("size") or 0) != size:
            return False
        # Two answers of one store may give a time in seconds and in fractions; its checksum decides.
        if modified(info) == stamp and not _checksum(info):
            return True
        return file_fingerprint(folder, name, info) == fingerprint
    except FileNotFoundError:
        return False


def modified(info: dict[str, Any]) -> str:
    """When a file was last written, as its filesystem says it; empty where that says nothing."""
    return str(next((info[key] for key in _TIMES if info.get(key)), ""))


def _checksum(info: dict[str, Any]) -> str:
    """The store's own checksum; empty where it has none."""
    for key in ("ETag", "etag", "md5Hash", "crc32c", "checksum", "oid", "blob_id"):
        if info.get(key):
            return f"{key.lower()}:{str(info[key]).strip(chr(34))}:{info.get('size')}"
    return ""


def sidecar_name(shard: str) -> str:
    """Name of the Parquet file that stands beside a shard in edits/, attributes/, dropped/ and dead/."""
    return shard if shard.endswith(".parquet") else shard + ".parquet"
