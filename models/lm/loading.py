"""Loading a causal model and its tokenizer from a folder; what can go wrong is said in one line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.lm.folder import find_adapter
from models.lm.packed import has_fast_bfloat16
from schemas.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """The device meant by a name; `auto` is the first CUDA device if there is one.

    Raises:
        ModelError: No such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"'{device}' is not a torch device; use auto, cpu, cuda or cuda:N") from error
    if on.type == "cuda" and (not torch.cuda.is_available() or (on.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"There is no device '{device}' here; use device=cpu")
    return on


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype meant by a name.

    `auto` is bfloat16 wherever the hardware multiplies it (measured on AVX-512 BF16: twice as fast as float32 at
    decoding, and half the memory), and float32 elsewhere, where it would be emulated.

    Raises:
        ModelError: Not a name of one.
    """
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_fast_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_tokenizer(folder: str | Path) -> Any:
    """Load a folder's tokenizer; nothing is looked for elsewhere.

    Raises:
        ModelError: It is not there or not readable.
    """
    from transformers import AutoTokenizer

    with _one_line(f"The tokenizer of {folder} cannot be loaded"):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def load_model(
    folder: str | Path, adapter: str | Path | None, dtype: torch.dtype, device: torch.device, merge: bool
) -> Any:
    """Load a folder's causal model, in evaluation mode, with an adapter on it.

    Args:
        folder: The base model's folder.
        adapter: Name or folder of a LoRA adapter.
        dtype: Of the weights.
        device: Where to put them.
        merge: Merge the adapter into the weights.

    Returns:
        A transformers model, or a PEFT model around it where the adapter is not merged.

    Raises:
        ModelError: Weights are missing or of other shapes; the adapter was made for another base.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with _one_line(f"The model in {folder} cannot be loaded"):
        model, loading = auto.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        # transformers would fill them with random numbers and warn.
        raise ModelError(
            f"The weights in {folder} lack {len(missing)} tensors of the model, {missing[0]} among them"
        )
    if adapter is not None:
        model = _with_adapter(model, folder, find_adapter(adapter), merge)
    return model.to(device).eval()


def _with_adapter(model: Any, folder: str | Path, path: Path, merge: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("adapters need 'peft'; run: pip install 'tamis[models]'") from error
    with _one_line(f"The adapter {path} does not fit the model in {folder}: it was made for another base"):
        adapted = PeftModel.from_pretrained(model, str(path), local_files_only=True)
    return adapted.merge_and_unload() if merge else adapted


@contextlib.contextmanager
def _one_line(message: str) -> Iterator[None]:
    """Turn what a loader raises into one line, and keep its progress bars off the terminal."""
    from safetensors import SafetensorError
    from transformers.utils import logging as library

    logging: Any = library
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library about another
            yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{message} ({first[:200]})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
