"""Loading what is to be trained: a name to a folder, a folder to a tokenizer and a model, LoRA around it.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from models import store
from models.folders import resolve
from schemas.errors import ModelError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SHA_UP_TO = (
    4 << 30
)  # bytes of weights; more are hashed as shards are, by xxh3, for sha256 would take minutes
_BLOCK = 8 << 20


@dataclass(frozen=True)
class BaseModel:
    """A model to start from.

    Attributes:
        name: As the user wrote it.
        source: The folder it lies in.
        revision: 16 hexadecimal digits that change with its weights and configuration; of a hub id the hub's commit.
        licence: SPDX id where known.
        hub: The hub id it was fetched by; empty for a folder.
    """

    name: str
    source: str
    revision: str
    licence: str = ""
    hub: str = ""

    @property
    def place(self) -> dict[str, str]:
        """What a record adds to the name of a folder: where it lies, from wherever the record is read."""
        typed = self.name.removeprefix("hf:")
        return {"source": self.source} if typed != self.source and Path(typed).is_dir() else {}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), or DoRA (Liu et al. 2024, arXiv 2402.09353).

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: On the adapter's input.
        targets: `all-linear`, or names of modules.
        dora: Learn magnitude and direction apart.
        layers: Only in the last so many of the model's layers; 0 is all.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    layers: int = 0


def resolve_model(name: str) -> BaseModel:
    """Find a base model: an embedded one (`smollm2`), a folder, or `hf:ID` (also `hf:ID@REVISION`).

    Raises:
        ModelError: It is not there, has no configuration, or has no weights.
    """
    folder = Path(name)
    if name.startswith("hf:"):
        # An id says nothing of what lies behind it: what is trained is one commit, loaded from where that lies.
        folder, commit = resolve(name[3:])
        if commit:
            return BaseModel(name, str(folder), commit, hub=name[3:].partition("@")[0])
    elif not folder.is_dir():
        if store.canonical(name) not in store.EMBEDDED:
            raise ModelError(f"no model '{name}': pass a folder, hf:ID, or an embedded model (smollm2)")
        package = store.package(name)
        if package.kind != "lm":
            raise ModelError(f"'{name}' is a {package.kind}, not a language model")
        return BaseModel(package.name, str(store.path(name)), package.revision, package.licence)
    if not (folder / "config.json").is_file():
        hint = (
            "it holds an adapter; pass its base model"
            if (folder / "adapter_config.json").is_file()
            else "no config.json"
        )
        raise ModelError(f"{folder} is not a model folder ({hint})")
    weights = sorted(p for pattern in _WEIGHTS for p in folder.glob(pattern))
    if not weights:
        raise ModelError(
            f"{folder} has no weights (model.safetensors); a configuration alone cannot be trained"
        )
    return BaseModel(name, str(folder.resolve()), _revision(folder, weights))


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.source)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {base.name} cannot be loaded ({_line(error)})") from error


def load_model(base: BaseModel, *, dtype: str = "float32", attention: str = "sdpa", adapter: str = "") -> Any:
    """The base model, in training precision.

    Args:
        base: What to load.
        adapter: A LoRA adapter, by name or folder, merged into it.
        dtype: `float32` (also under mixed precision: optimisers need the small steps), or `bfloat16`.
        attention: `sdpa` or `eager`.

    Raises:
        ModelError: It cannot be loaded, or weights of it are missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        with store.quiet_transformers():
            model, loading = auto.from_pretrained(
                base.source,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base.name} cannot be loaded ({_line(error)})") from error
    refuse_missing(loading, base)
    call_by_hub_id(model, base)
    return merge_adapter(model, adapter, base.name) if adapter else model


def refuse_missing(
    loading: Mapping[str, Any], base: BaseModel, *, may_be_new: Callable[[str], bool] = lambda key: False
) -> None:
    """Refuse a model some of whose weights were not in its folder: transformers drew them at random, and only warns.

    Args:
        loading: What `from_pretrained` tells with `output_loading_info`.
        base: What was loaded.
        may_be_new: Says of a tensor's name whether it is meant to be drawn (that of a new head).

    Raises:
        ModelError: A tensor is missing, or has another shape than the configuration says.
    """
    other = {str(key) for key, *_ in loading["mismatched_keys"]}
    drawn = sorted(key for key in {*loading["missing_keys"], *other} if not may_be_new(key))
    if drawn:
        raise ModelError(
            f"the weights of {base.name} lack {len(drawn)} tensors of the model that its config.json describes, "
            f"{drawn[0]} among them; copy or save the model again"
        )


def call_by_hub_id(model: Any, base: BaseModel) -> None:
    """Have a model bear the hub id it was fetched by: an adapter names its base by it, and is loaded elsewhere too."""
    if base.hub:
        model.name_or_path = model.config.name_or_path = base.hub


def merge_adapter(model: Any, adapter: str, name: str) -> Any:
    """Add what a LoRA adapter adds to a model's weights, in place.

    Raises:
        ModelError: It is no plain LoRA adapter, or was made for another model.
    """
    from models.lm.factors import plain_factors

    modules = dict(model.named_modules())
    for place, (up, down) in plain_factors(adapter).items():
        weight = getattr(modules.get(place), "weight", None)
        if weight is None or tuple(weight.shape) != (up.shape[0], down.shape[1]):
            raise ModelError(f"the adapter {adapter} was made for another model than {name} ({place})")
        weight.data += (up @ down).to(weight.device, weight.dtype)
    return model


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that makes ids the model has no embedding for.

    Raises:
        ModelError: It does.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{name}: its tokenizer has {len(tokenizer):,} tokens, the model {rows:,}; they do not belong together"
        )


def add_lora(model: Any, settings: LoraSettings, *, task: str = "CAUSAL_LM") -> Any:
    """Freeze a model and put trainable low-rank adapters beside its linear layers (float32, B zero: no change yet).

    Raises:
        ModelError: No module of the names given, or peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("LoRA needs peft; run: pip install 'tamis[models]'") from error
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_in_last_layers(model, targets, settings.layers) if settings.layers else targets,
        use_dora=settings.dora,
        task_type=task,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be added ({_line(error)}); check --lora-targets") from error


def _in_last_layers(model: Any, targets: str | list[str], count: int) -> list[str]:
    """Full names of the linear layers meant, in the last `count` layers.

    Raises:
        ModelError: The model has not so many, or keeps them in another way than in one list.
    """
    from torch import nn

    from models.lm.factors import layer_list

    layers, depth = layer_list(model), model.config.get_text_config().num_hidden_layers
    if layers is None or count > depth:
        raise ModelError(f"--lora-layers {count}: the model has {depth} layers")
    chosen = tuple(f"{layers}.{number}." for number in range(depth - count, depth))
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith(chosen)
        and isinstance(module, nn.Linear)
        and (targets == "all-linear" or any(name == t or name.endswith(f".{t}") for t in targets))
    ]
    if not names:
        raise ModelError(f"--lora-layers {count}: no such module in them; check --lora-targets")
    return names


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def save_trained(model: Any, tokenizer: Any, folder: Path, *, dtype: str = "") -> None:
    """Save a model or an adapter so that `from_pretrained` loads it, with tokenizer and generation config.

    Args:
        model: A transformers model, or a PEFT model (its adapter alone is saved).
        tokenizer: Goes along.
        folder: Made if need be.
        dtype: `float32` or `bfloat16` (a full model is converted in place); empty keeps what the parameters have.
    """
    import torch

    adapter = hasattr(model, "get_base_model")
    base = model.get_base_model() if adapter else model
    kind = getattr(torch, dtype) if dtype else None
    with store.quiet_transformers():
        if adapter:
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(model)
            state = {k: v.detach().to("cpu", kind or v.dtype).contiguous() for k, v in state.items()}
            _save_adapter(model, state, folder)
        else:
            (model.to(kind) if kind else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if getattr(base, "generation_config", None) is not None:
            base.generation_config.save_pretrained(folder)


def _save_adapter(model: Any, state: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    trained, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = trained
    _sort_lists(folder / "adapter_config.json")


def _sort_lists(path: Path) -> None:
    """Peft keeps module names as sets: sort them, so that equal adapters are equal files."""
    record = json.loads(path.read_text("utf-8"))
    if isinstance(record.get("target_modules"), list):
        record["target_modules"] = sorted(record["target_modules"])
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def _revision(folder: Path, weights: list[Path]) -> str:
    state = hashlib.sha256((folder / "config.json").read_bytes())
    hashed = store.sha256_of if sum(p.stat().st_size for p in weights) <= _SHA_UP_TO else _xxh3_of
    for path in weights:
        state.update(f"{path.name}:{path.stat().st_size}".encode())
        state.update(hashed(path).encode())
    return state.hexdigest()[:16]


def _xxh3_of(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
