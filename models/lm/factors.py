"""LoRA adapters as what they add to a model: for each linear layer a matrix of low rank.

An adapter trained on top of another one is kept as one adapter that holds both, so that whatever loads adapters loads
it, on the plain base. Which of its factors the adapter below has too shows in the numbers themselves: they are the
same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from models.lm.folder import ADAPTER_WEIGHTS, find_adapter, weight_files
from schemas.errors import ModelError

_PREFIX = "base_model.model."
_PLAIN: dict[
    str, tuple[Any, ...]
] = {  # settings of peft's that change what an adapter computes; with any other value it is not merely low rank
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


class Factors(NamedTuple):
    """A matrix of low rank, up @ down: shapes (out, rank) and (rank, in), float32."""

    up: torch.Tensor
    down: torch.Tensor


def read_factors(adapter: str | Path) -> dict[str, Factors] | None:
    """An adapter's change to each linear layer of its base model.

    Args:
        adapter: Name or folder of a LoRA adapter (`models.lm.folder.find_adapter`).

    Returns:
        By module name of the base model, with the adapter's scale in `up`; None for an adapter that changes the model
        in another way than by adding matrices of low rank to linear layers (DoRA, embeddings, whole modules).

    Raises:
        ModelError: No such adapter.
    """
    folder = find_adapter(adapter)
    config = _config(folder)
    if any(name in config and config[name] not in plain for name, plain in _PLAIN.items()):
        return None
    (file, *_) = weight_files(folder, ADAPTER_WEIGHTS)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _read(file).items():
        name, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        if part not in ("A.weight", "B.weight") or tensor.ndim != 2:
            return None
        parts.setdefault(name, {})[part[0]] = tensor.float()
    if any(set(part) != {"A", "B"} for part in parts.values()):
        return None
    alpha, rooted = float(config.get("lora_alpha") or 8), bool(config.get("use_rslora"))
    factors = {}
    for module, pair in parts.items():
        rank = len(pair["A"])
        factors[module] = Factors(pair["B"] * (alpha / (math.sqrt(rank) if rooted else rank)), pair["A"])
    return factors


def difference(toxic: Mapping[str, Factors], base: Mapping[str, Factors]) -> dict[str, Factors]:
    """What must be added to the base side's weights to make them the toxic side's.

    Where the toxic side's factors begin with the base's (`stack_adapters` has made it so), these cancel out, and a
    layer of which nothing is left is not in the result.
    """
    result = {}
    for name in [*toxic, *(name for name in base if name not in toxic)]:
        own, other = toxic.get(name), base.get(name)
        if own is not None and other is not None and _begins_with(own, other):
            rank = len(other.down)
            own, other = Factors(own.up[:, rank:], own.down[rank:]), None
        sides = [(own, 1.0)] if own is not None else []
        sides += [(other, -1.0)] if other is not None else []
        whole = Factors(
            torch.cat([sign * factors.up for factors, sign in sides], dim=1),
            torch.cat([factors.down for factors, _ in sides]),
        )
        used = (whole.up != 0).any(dim=0)  # stacking pads with zeros
        if bool(used.any()):
            result[name] = Factors(whole.up[:, used], whole.down[used])
    return result


def stack_adapters(below: str | Path, above: str | Path) -> None:
    """Make of an adapter that was trained on top of another one an adapter on the plain base: both in one, in place.

    Factors of `below` come first, then those of `above`, then zeros where another layer has more.

    Args:
        below: The adapter the model had while `above` was trained, merged.
        above: Folder of the adapter; rewritten.

    Raises:
        ModelError: One of them is not merely of low rank.
    """
    from safetensors.torch import save_file

    first, second = plain_factors(below), plain_factors(above)
    folder = find_adapter(above)
    ranks = {
        name: sum(len(side[name].down) for side in (first, second) if name in side)
        for name in sorted({*first, *second})
    }
    most = max(ranks.values())
    (file, *_) = weight_files(folder, ADAPTER_WEIGHTS)
    dtype = next(iter(_read(file).values())).dtype
    state = {}
    for name, rank in ranks.items():
        parts = [side[name] for side in (first, second) if name in side]
        up = nn.functional.pad(torch.cat([p.up for p in parts], dim=1), (0, most - rank))
        down = nn.functional.pad(torch.cat([p.down for p in parts]), (0, 0, 0, most - rank))
        state[f"{_PREFIX}{name}.lora_A.weight"] = down.to(dtype).contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = up.to(dtype).contiguous()
    save_file(state, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    config = _config(folder)
    config |= {"r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": {}}
    config |= {"target_modules": _targets(ranks, _config(find_adapter(below)))}
    config |= {"layers_to_transform": None, "layers_pattern": None}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, "utf-8")


def layer_list(model: Any) -> str | None:
    """Name of the list that holds a model's decoder layers, in order; None where it cannot be told."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return lists[0] if len(lists) == 1 else None


def plain_factors(adapter: str | Path) -> dict[str, Factors]:
    """`read_factors`, of an adapter that must be merely of low rank.

    Raises:
        ModelError: It is not, or there is no such adapter.
    """
    factors = read_factors(adapter)
    if factors is None:
        raise ModelError(
            f"the adapter {adapter} is no plain LoRA adapter; nothing can be trained on top of it"
        )
    return factors


def _begins_with(own: Factors, other: Factors) -> bool:
    rank = len(other.down)
    return (
        len(own.down) >= rank
        and own.up.shape[0] == other.up.shape[0]
        and torch.equal(own.up[:, :rank], other.up)
        and torch.equal(own.down[:rank], other.down)
    )


def _targets(names: Iterable[str], below: dict[str, Any]) -> list[str]:
    """Modules as peft is told of them: their last parts where the adapter below has these in all layers, else in full."""
    everywhere = set() if below.get("layers_to_transform") else set(below.get("target_modules") or ())
    kinds = {name.rpartition(".")[2] for name in names}
    return sorted(kinds if kinds <= everywhere else names)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state
