"""Fingerprints: short, stable names for schemas, configurations and contents, and the seeds made from them.

Everything here is deterministic across processes, machines and Python hash seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

FINGERPRINT_BYTES = 16


def digest(*parts: bytes | str | int) -> bytes:
    """Hash parts so that no two different part lists share an input (each part is length-prefixed).

    Args:
        *parts: Bytes, strings (UTF-8) or integers (decimal).

    Returns:
        16 bytes (BLAKE2b).
    """
    state = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for part in parts:
        # surrogatepass: a lone surrogate from a JSON escape is data too, and must hash.
        raw = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return state.digest()


def fingerprint(*parts: bytes | str | int) -> str:
    """Like `digest`, as 32 hexadecimal characters."""
    return digest(*parts).hex()


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a configuration by its canonical JSON (sorted keys, no spaces).

    Args:
        config: JSON-serialisable mapping; the caller leaves cosmetic settings (workers, log level) out.

    Returns:
        32 hexadecimal characters.
    """
    return fingerprint(json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def schema_fingerprint(schema: pa.Schema) -> str:
    """Hash a schema: names, types, nullability and metadata, in column order."""
    return fingerprint(schema.serialize().to_pybytes())


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Derive a 63-bit seed from the run seed and what is being done (row id or content, step, index).

    Args:
        run_seed: The run's `--seed`.
        *parts: What tells this draw from every other one.

    Returns:
        An integer in [0, 2**63), fit for `torch.Generator.manual_seed` and `random.Random`.
    """
    return int.from_bytes(digest(run_seed, *parts)[:8], "little") >> 1
