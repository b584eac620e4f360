"""A base model and a toxic model that share a tokenizer: two adapters on one base, or two models side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from models.decoding.decoders import PairedCausalDecoder, PairedPrefixDecoder
from models.decoding.fork import ForkedCausalDecoder, ForkedPrefixDecoder, share_layers
from models.decoding.low_rank import (
    FEW_ROWS,
    Switch,
    add_sides,
    sides_are_independent,
)
from models.lm.decoder import CausalDecoder, Decoder, Lockstep, SharedPrefixDecoder, accepts_logits_to_keep
from models.lm.factors import difference, read_factors
from models.lm.loading import load_tokenizer
from models.lm.local import LocalLanguageModel
from schemas.errors import ModelError

TOKENIZER_FILE = "tokenizer.json"


class Pair(Protocol):
    """Two models fed the same tokens.

    Attributes:
        base: The base side by itself.
    """

    base: LocalLanguageModel

    def decoder(self) -> Decoder:
        """A new decoder of two sides: the base's logits, then the toxic's."""
        ...

    def logits(self, ids: Sequence[int], last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' logits at the end of a text (no other thread may run the models meanwhile).

        Args:
            ids: Token ids.
            last: At how many of the last positions, at least 1.

        Returns:
            Base and toxic logits, each (last, vocabulary), in the models' dtype.
        """
        ...


class TwoModels:
    """Two models, each with its own weights, run in lockstep.

    Args:
        base: The base model; its batch and context shrink to what both can do.
        toxic: The toxic model.

    Raises:
        ModelError: Their tokenizers differ.
    """

    def __init__(self, base: LocalLanguageModel, toxic: LocalLanguageModel) -> None:
        check_one_vocabulary(base.tokenizer, toxic.tokenizer, base.info.name, toxic.info.name)
        self.base, self.toxic = base, toxic
        # Requests may be decoded side by side only where that changes no bit of either model's logits.
        base.limit_rows(toxic.most_rows)
        base.context_limit = min(base.context_limit, toxic.context_limit)

    def decoder(self) -> Decoder:
        """See `Pair.decoder`."""
        return Lockstep([self.base.decoder(), self.toxic.decoder()])

    def logits(self, ids: Sequence[int], last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Pair.logits`."""
        base, toxic = (_last_logits(model, [ids], last)[0] for model in (self.base, self.toxic))
        return base, toxic


class TwoAdapters:
    """Two LoRA adapters on one base model, both in one forward pass (`models.decoding.low_rank`).

    The toxic side costs the memory of its adapter, and no time in the layers where it is as the base side
    (`models.decoding.fork`).

    Args:
        base: The base side, its adapter merged.
        switch: What `models.decoding.low_rank.add_sides` made of it.

    Attributes:
        shared: Layers, from the first on, that both sides have in common and that are computed once.
    """

    def __init__(self, base: LocalLanguageModel, switch: Switch) -> None:
        self.base, self.switch = base, switch
        self.shared = share_layers(base.model, switch)

    def decoder(self) -> Decoder:
        """See `Pair.decoder`."""
        alone = self.base.decoder()
        if self.shared and isinstance(alone, SharedPrefixDecoder):
            return ForkedPrefixDecoder(self.base.model, self.base.vocabulary, self.switch, self.shared)
        if self.shared and isinstance(alone, CausalDecoder):
            return ForkedCausalDecoder(alone, self.switch, self.shared)
        if isinstance(alone, SharedPrefixDecoder):
            other = self.base.decoder()
            assert isinstance(other, SharedPrefixDecoder)
            return PairedPrefixDecoder(alone, other, self.switch)
        assert isinstance(alone, CausalDecoder)
        return PairedCausalDecoder(alone, self.switch)

    def logits(self, ids: Sequence[int], last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Pair.logits`."""
        with self.switch.set("shared" if self.shared else "both"):
            base, toxic = _last_logits(self.base, [ids] if self.shared else [ids, ids], last)
        return base, toxic


def load_pair(
    folder: str | Path,
    *,
    toxic: str | Path | None = None,
    toxic_adapter: str | Path | None = None,
    **options: Any,
) -> Pair:
    """Load both sides.

    Args:
        folder: The base model's folder.
        toxic: The toxic model's folder; None is the base model's.
        toxic_adapter: A LoRA adapter on it, by name or folder.
        **options: As `LocalLanguageModel`'s; `name` and `adapter` are the base side's, the others hold for both.

    Returns:
        `TwoAdapters` where both sides are one base with plain LoRA adapters, else `TwoModels`.

    Raises:
        ModelError: A folder or an adapter cannot be used; both sides are the same; their tokenizers differ.
    """
    check_sides(folder, toxic=toxic, toxic_adapter=toxic_adapter, adapter=options.get("adapter"))
    base = LocalLanguageModel(folder, **{**options, "merge_adapter": True})
    if _same_folder(folder, toxic):
        switch = _second_side(base, options.get("adapter"), toxic_adapter)
        if switch is not None:
            if not sides_are_independent(base.model):
                base.limit_rows(options.get("batch_rows") or 1)
            elif base.model.device.type == "cpu":
                base.limit_rows(FEW_ROWS)  # past it, another kernel
            return TwoAdapters(base, switch)
    theirs = {name: value for name, value in options.items() if name != "name"}
    other = LocalLanguageModel(
        toxic if toxic is not None else folder, **{**theirs, "adapter": toxic_adapter, "merge_adapter": True}
    )
    return TwoModels(base, other)


def check_sides(
    folder: str | Path,
    *,
    toxic: str | Path | None,
    toxic_adapter: str | Path | None,
    adapter: str | Path | None,
) -> None:
    """Refuse two sides that cannot be contrasted, before any weights are loaded.

    Raises:
        ModelError: Both sides are the same model, or their tokenizers differ.
    """
    if not _same_folder(folder, toxic):
        assert toxic is not None
        files = [Path(side) / TOKENIZER_FILE for side in (folder, toxic)]
        if not all(file.is_file() for file in files) or files[0].read_bytes() != files[1].read_bytes():
            check_one_vocabulary(load_tokenizer(folder), load_tokenizer(toxic), str(folder), str(toxic))
    elif str(toxic_adapter) == str(adapter):
        raise ModelError(
            "the toxic side is the base side: pass toxic= (a model) or toxic_adapter= (a LoRA adapter)"
        )


def check_one_vocabulary(base: Any, toxic: Any, base_name: str, toxic_name: str) -> None:
    """Refuse two tokenizers that do not write the same tokens with the same ids.

    Raises:
        ModelError: They do not; says at which token.
    """
    left, right = base.get_vocab(), toxic.get_vocab()
    if left == right:
        return
    differing = sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token))
    raise ModelError(
        f"{toxic_name} has another tokenizer than {base_name} ({len(differing)} tokens differ, "
        f"{differing[0]!r} among them): contrastive decoding needs one vocabulary"
    )


def _second_side(
    base: LocalLanguageModel, adapter: str | Path | None, toxic_adapter: str | Path | None
) -> Switch | None:
    """Give the base model its toxic side; None where an adapter is not merely of low rank."""
    toxic = read_factors(toxic_adapter) if toxic_adapter is not None else {}
    merged = read_factors(adapter) if adapter is not None else {}
    if toxic is None or merged is None:
        return None
    return add_sides(base.model, difference(toxic, merged))


def _same_folder(folder: str | Path, toxic: str | Path | None) -> bool:
    return toxic is None or os.path.realpath(folder) == os.path.realpath(toxic)


def _last_logits(model: LocalLanguageModel, rows: Sequence[Sequence[int]], last: int) -> torch.Tensor:
    """(rows, last, vocabulary) logits of texts of one length."""
    ids = torch.tensor([list(row) for row in rows], device=model.model.device)
    extra = {"logits_to_keep": last} if accepts_logits_to_keep(model.model) else {}
    logits: torch.Tensor = model.model(input_ids=ids, use_cache=False, **extra).logits
    return logits[:, -last:, : model.vocabulary]
