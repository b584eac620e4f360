"""`detoxify:<variant>`: Unitary's Detoxify classifiers, from a local checkpoint or by their own download.

A Detoxify checkpoint is a pickle, and needs a configuration and tokenizer beside it that the library fetches
from a hub. Here a checkpoint is read once: its sha256 is checked first, then model and tokenizer are written
to the model cache as an ordinary transformers folder (safetensors and JSON), from which every worker loads
without pickle, network or the detoxify library.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from models.folders import read_config
from models.protocols import ModelInfo
from models.scorers.sequence import Head
from models.store import convert_once, home, quiet_transformers, read_manifest, sha256_of_files
from schemas.errors import ModelError

_RELEASES = "https://github.com/unitaryai/detoxify/releases/download/"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A released checkpoint: where it lies, and the hub model whose configuration and tokenizer it uses."""

    url: str
    base: str
    training_data: str


VARIANTS = {
    "original": Variant(
        _RELEASES + "v0.1-alpha/toxic_original-c1212f89.ckpt", "bert-base-uncased", "jigsaw-2018"
    ),
    "unbiased": Variant(_RELEASES + "v0.3-alpha/toxic_debiased-c7548aa0.ckpt", "roberta-base", "jigsaw-2019"),
    "multilingual": Variant(
        _RELEASES + "v0.4-alpha/multilingual_debiased-0b549669.ckpt", "xlm-roberta-base", "jigsaw-2020"
    ),
    "original-small": Variant(
        _RELEASES + "v0.1.2/original-albert-0e1d6498.ckpt", "albert-base-v2", "jigsaw-2018"
    ),
    "unbiased-small": Variant(
        _RELEASES + "v0.1.2/unbiased-albert-c8519128.ckpt", "albert-base-v2", "jigsaw-2019"
    ),
}

# The releases name the same Jigsaw labels differently.
_LABEL_NAMES = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")
_CONFIG_FILES = ("*.json", "*.txt", "*.model")
_FORMAT = 1


def prepare(
    variant: str,
    *,
    checkpoint: str | Path | None = None,
    config: str | Path | None = None,
    sha256: str | None = None,
) -> tuple[Path, ModelInfo]:
    """Have a variant as a transformers folder in the model cache; converts or fetches it if it is not there.

    Args:
        variant: `original`, `unbiased`, `multilingual`, `original-small` or `unbiased-small`.
        checkpoint: A local .ckpt file; without one, Detoxify's release is downloaded.
        config: Folder with its config.json and tokenizer files; without one, those of the variant's base
            model are taken from the hub.
        sha256: The checkpoint's sha256, or its first digits (8 or more). By default the digits in the file's
            name, which the releases carry (`toxic_original-c1212f89.ckpt`), or what `tamis train scorer` recorded in
            the train.json beside it.

    Returns:
        The folder and what manifests record of it.

    Raises:
        ModelError: Unknown variant; a file is missing, or is not what its hash says; no network.
    """
    if variant not in VARIANTS:
        raise ModelError(f"no detoxify variant '{variant}'; choose one of: {', '.join(VARIANTS)}")
    file = Path(checkpoint).expanduser() if checkpoint is not None else _release(variant)
    if not file.is_file():
        raise ModelError(f"there is no checkpoint {file}; pass checkpoint=FILE.ckpt of detoxify:{variant}")
    digest = sha256_of_files([file])
    trained = _training_beside(file)
    _check_hash(file, digest, sha256 or trained.get("sha256"))
    settings = Path(config).expanduser() if config is not None else _base_folder(variant)
    read_config(settings)
    details = [
        f for pattern in _CONFIG_FILES for f in sorted(settings.glob(pattern)) if f.name != "model.json"
    ]
    setup = sha256_of_files(details)[:8]  # the same checkpoint with another tokenizer is another model
    info = ModelInfo(
        name=f"detoxify:{variant}",
        kind="scorer",
        revision=digest[:16],
        source=str(checkpoint) if checkpoint is not None else VARIANTS[variant].url,
        licence="Apache-2.0",
        training_data=trained.get("training_data") or VARIANTS[variant].training_data,
    )
    key = f"detoxify-{variant}-{digest[:16]}-{setup}"
    folder = convert_once(key, info, lambda target: _convert(file, settings, target), format=_FORMAT)
    record = read_manifest(folder)
    return folder, dataclasses.replace(
        info, extra={"labels": list(read_labels(folder)), "format": record["format"]}
    )


def read_labels(folder: Path) -> tuple[str, ...]:
    """Labels of a converted folder, in the order of its logits."""
    id2label = read_config(folder)["id2label"]
    return tuple(id2label[key] for key in sorted(id2label, key=int))


def head(folder: Path) -> Head:
    """All labels, each by its own sigmoid; `toxicity` is the first in every variant."""
    labels = read_labels(folder)
    order = sorted(range(len(labels)), key=lambda i: labels[i] != "toxicity")
    return Head(tuple(labels[i] for i in order), tuple(order), "sigmoid")


def _training_beside(file: Path) -> dict[str, str]:
    """Hash and training data of a checkpoint that `tamis train scorer` wrote; empty of any other."""
    from models.folders import read_training

    record = read_training(file.parent)
    saved = (record.get("results") or {}).get("detoxify") or {}
    if saved.get("file") != file.name:
        return {}
    return {"sha256": str(saved["sha256"]), "training_data": str(record.get("training_data") or "")}


def _check_hash(file: Path, digest: str, expected: str | None) -> None:
    in_name = _HASH_IN_NAME.search(file.name)
    wanted = (expected or (in_name[1] if in_name else "")).lower()
    if len(wanted) < 8:
        raise ModelError(
            f"{file.name} is a pickle and its name carries no hash to check it by; pass sha256= (its first 8 "
            "digits or more), after making sure where it comes from"
        )
    if not digest.startswith(wanted):
        raise ModelError(
            f"{file} has sha256 {digest[:16]}..., not {wanted}...: a partial download? it is not opened"
        )


def _convert(file: Path, settings: Path, target: Path) -> None:
    """Write a checkpoint as a transformers folder."""
    import torch
    import transformers

    loaded = _open_checkpoint(file)
    try:
        arguments = loaded["config"]["arch"]["args"]
        classes = [_LABEL_NAMES.get(c, c) for c in loaded["config"]["dataset"]["args"]["classes"]]
        state: dict[str, torch.Tensor] = loaded["state_dict"]
        model_name, tokenizer_name = arguments["model_name"], arguments["tokenizer_name"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{file} is not a Detoxify checkpoint: it lacks {error}") from error
    model_class = getattr(transformers, model_name, None)
    tokenizer_class = getattr(transformers, tokenizer_name, None)
    if not model_name.endswith("ForSequenceClassification") or model_class is None or tokenizer_class is None:
        raise ModelError(
            f"{file} asks for {model_name} with {tokenizer_name}, which transformers does not offer"
        )
    with quiet_transformers():
        try:
            config = model_class.config_class.from_pretrained(str(settings), num_labels=len(classes))
            tokenizer = tokenizer_class.from_pretrained(str(settings), local_files_only=True)
            model = model_class(config)
            missing, unexpected = model.load_state_dict(state, strict=False)
        except (OSError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise ModelError(f"{file} does not fit the configuration in {settings}: {why}") from error
        # Older releases saved the position numbers, which are no weights.
        odd = [k for k in [*missing, *unexpected] if not k.endswith(("position_ids", "token_type_ids"))]
        if odd:
            raise ModelError(
                f"{file} does not fit the configuration in {settings}: {odd[0]} (of {len(odd)} weights)"
            )
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {label: i for i, label in enumerate(classes)}
        model.config.problem_type = "multi_label_classification"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _open_checkpoint(file: Path) -> dict[str, Any]:
    """Unpickle a checkpoint whose hash was checked: as plain data if it is that, else as Detoxify does."""
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            loaded = torch.load(file, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{file} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{file} is not a Detoxify checkpoint: it holds a {type(loaded).__name__}")
    return loaded


def _release(variant: str) -> Path:
    """Detoxify's released checkpoint, downloaded whole or not at all."""
    import torch

    url = VARIANTS[variant].url
    name = url.rsplit("/", 1)[1]
    for folder in (
        home() / "downloads",
        Path(torch.hub.get_dir()) / "checkpoints",
    ):  # the library's own cache
        if (folder / name).is_file():
            return folder / name
    target = home() / "downloads" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    found = _HASH_IN_NAME.search(name)
    try:
        torch.hub.download_url_to_file(
            url, str(partial), hash_prefix=found[1] if found else None, progress=False
        )
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise ModelError(
            f"detoxify:{variant} could not be downloaded ({type(error).__name__}); fetch {url} and the config "
            "and tokenizer of its base model elsewhere, and pass checkpoint=FILE and config=FOLDER"
        ) from error
    shutil.move(partial, target)
    return target


def _base_folder(variant: str) -> Path:
    from models.folders import resolve

    base = VARIANTS[variant].base
    try:
        return resolve(base, weights=False)[0]
    except ModelError as error:
        raise ModelError(
            f"detoxify:{variant} needs the config.json and tokenizer of {base}; pass config=FOLDER ({error})"
        ) from error
