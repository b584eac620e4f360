"""Settings every test runs under: no hub, one thread, quiet Beam; and where the development data lie, if they do."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

logging.getLogger().setLevel(logging.ERROR)
# A shared machine may stall for a second in the middle of an example: that is no failure.
settings.register_profile("tamis", deadline=None)
settings.load_profile("tamis")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The development data, which never enter the repository."""
    if not SHARED.exists():
        pytest.skip("the development data (../shared/data) are not here")
    return SHARED
