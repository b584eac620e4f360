"""What is evaluated: a language model by name, folder, or base and adapter, with a label for the page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import ModelError

# What results call the other models of an evaluation.
RESERVED = ("judge", "reference")
_LABEL = re.compile(r"^([\w.-][\w .-]*)=(.+)$")
_NOT_A_NAME = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Subject:
    """A language model to evaluate.

    Attributes:
        label: What the page calls it.
        model: As `models.registry` finds it.
        adapter: LoRA adapter, by name or folder.
        folders: Local folders it consists of, whose records tell what it was trained on.
    """

    label: str
    model: str
    adapter: str | None = None
    folders: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return _NOT_A_NAME.sub("-", self.label).strip(".-") or "model"

    def options(self, running: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
        """Options for the registry, as sorted pairs."""
        chosen = {k: v for k, v in running.items() if v is not None}
        return tuple(sorted((chosen | ({"adapter": self.adapter} if self.adapter else {})).items()))


def parse_subject(text: str, adapter: str | None = None) -> Subject:
    """Read `[LABEL=]MODEL[+ADAPTER]`.

    Args:
        text: MODEL is a registry name (`smollm2`, `hf:ID`), a model folder, or the folder of an adapter that says
            what its base is (as `tamis train lm --lora` writes it). What follows the last `+` is an adapter, by name
            or folder, unless the whole is a folder itself.
        adapter: An adapter given apart.

    Raises:
        ModelError: An adapter folder that does not say its base; two adapters.
    """
    named = _LABEL.match(text)
    label, spec = (named[1], named[2]) if named and not Path(text).exists() else ("", text)
    model, own = spec, None
    base, plus, behind = spec.rpartition("+")
    if plus and base and behind and not Path(spec.removeprefix("hf:")).is_dir():
        model, own = base, behind
    elif _is_adapter(Path(spec)):
        model, own = _base_of(Path(spec)), spec
    if own and adapter:
        raise ModelError(f"'{text}' has an adapter already; pass no --adapter beside it")
    own = own or adapter
    if not label:
        label = "+".join(_short(part) for part in (model, own) if part) if own != spec else _short(spec)
    places = (_adapter_folder(own) if own else None, Path(model.removeprefix("hf:")))
    return Subject(label, model, own, tuple(str(p) for p in places if p and p.is_dir()))


def distinct_labels(subjects: list[Subject]) -> list[Subject]:
    """The same subjects with labels (and file names) that differ: a number is put behind one seen before."""
    out: list[Subject] = []
    taken = set(RESERVED)
    for subject in subjects:
        label, number = subject.label, 2
        while Subject(label, "").slug.lower() in taken:
            label, number = f"{subject.label} {number}", number + 1
        taken.add(Subject(label, "").slug.lower())
        out.append(Subject(label, subject.model, subject.adapter, subject.folders))
    return out


def _adapter_folder(adapter: str) -> Path:
    """Where an adapter lies: one shipped with tamis, or a folder."""
    from models.lm.folder import ADAPTERS

    shipped = ADAPTERS / adapter
    return shipped if "/" not in adapter and shipped.is_dir() else Path(adapter)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _base_of(folder: Path) -> str:
    for name, keys in (
        ("train.json", ("model", "name")),
        ("adapter_config.json", ("base_model_name_or_path",)),
    ):
        try:
            value: Any = json.loads((folder / name).read_text("utf-8"))
            for key in keys:
                value = value[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if value:
            return str(value) if _known(str(value)) else f"hf:{value}"
    raise ModelError(f"{folder} is an adapter that does not say what its base is; pass BASE+{folder}")


def _known(name: str) -> bool:
    from models import store

    return name.startswith("hf:") or Path(name).is_dir() or store.canonical(name) in store.EMBEDDED


def _short(name: str) -> str:
    return Path(name.removeprefix("hf:")).name or name
