"""Two LoRA adapters on one set of weights, in one forward pass.

The base side's adapter is merged into the weights W, as for decoding it alone. What the toxic side has in its place is
then a matrix of low rank too: W_toxic - W = s_t B_t A_t - s_b B_b A_b, and that is all that is kept of it. In a batch
whose second half is the toxic side, each linear layer multiplies both halves by W in one go, reading it once, and adds
the difference to the second half (as S-LoRA, Sheng et al. 2023, arXiv 2311.03285, serves adapters beside each other).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.lm.factors import Factors
from models.lm.packed import PackedLinear

# A few rows have matrix kernels of their own, which may sum in another order.
LEAST_ROWS = 4
# Up to here products are small (candidates of a few requests), above they are large (prompts).
FEW_ROWS = 64
# Input features are added in multiples of this, as the matrix kernels like them.
ALIGNMENT = 16


@dataclass
class Switch:
    """Which side the rows of a batch are.

    Attributes:
        rows: `base` (all), `toxic` (all), `both` (the second half is toxic), or `shared`: the rows are both sides', and
            are doubled where the sides part (`models.decoding.fork`), from where on the second half is toxic.
    """

    rows: str = "base"

    @contextlib.contextmanager
    def set(self, rows: str) -> Iterator[None]:
        """Within the context, rows are as said."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before


class Siblings:
    """Linear layers that read the same tensor (an attention's query, key and value), computed in one product.

    Their input is widened by what the toxic side's adapters make of it, A x for toxic rows and zeros for the base's;
    with the layers' weights W stacked, the whole is [W | B] [x; A x]. Two small products a layer would cost, at ten
    rows, as much as a third of the model; this way they cost a few percent.

    Args:
        layers: The layers, `nn.Linear` or packed, of one input size.
        factors: What the toxic side adds to each.
        switch: Says which rows are the toxic side's.
    """

    def __init__(self, layers: Sequence[Any], factors: Sequence[Factors], switch: Switch) -> None:
        self.switch = switch
        self.in_features = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        rank = sum(len(down) for _, down in factors)
        self.width = rank + -rank % ALIGNMENT
        down = nn.functional.pad(torch.cat([down for _, down in factors]), (0, 0, 0, self.width - rank))
        self.down = _linear(down, None, layers[0])
        weight = torch.cat([_weight(layer) for layer in layers])
        up = weight.new_zeros(len(weight), self.width)
        row = column = 0
        for part, _ in factors:
            up[row : row + part.shape[0], column : column + part.shape[1]] = part
            row, column = row + part.shape[0], column + part.shape[1]
        biases = None
        if any(layer.bias is not None for layer in layers):
            biases = torch.cat([_bias(layer) for layer in layers])
        self.wide = _linear(torch.cat([weight, up], dim=1), biases, layers[0])
        # Past the modules' own machinery, which costs as much as a small product.
        self._multiply = self.wide.forward
        # On a CPU a small product in bfloat16 takes twice the time of one in float32.
        small = _weight(self.down)
        self._down32 = small.float().T.contiguous() if small.device.type == "cpu" else None
        self._rows: torch.Tensor | None = None  # the last input, while some layer has not taken its output
        self._side = ""
        self._outputs: list[torch.Tensor | None] = []

    def compute(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """(batch, ..., in_features) -> (batch, ..., out_features) for each layer."""
        out = self._multiply(self._widen(rows.reshape(-1, self.in_features)))
        return list(torch.split_with_sizes(out.view(*rows.shape[:-1], out.shape[-1]), self.sizes, -1))

    def take(self, rows: torch.Tensor, number: int) -> torch.Tensor:
        """The output of layer `number`; the others' are kept until they are taken, or the input is another."""
        if self._rows is not rows or self._side != self.switch.rows or self._outputs[number] is None:
            self._rows, self._side, self._outputs = rows, self.switch.rows, [*self.compute(rows)]
        output = self._outputs[number]
        assert output is not None
        self._outputs[number] = None
        if self._outputs.count(None) == len(self._outputs):
            self._rows = None
        return output

    def _widen(self, flat: torch.Tensor) -> torch.Tensor:
        """[x; A x] of toxic rows, [x; 0] of the base's."""
        count = flat.shape[0]
        wide = nn.functional.pad(flat, (0, self.width))
        if self.switch.rows != "base":
            first = 0 if self.switch.rows == "toxic" else count // 2
            wide[first:, self.in_features :] = self._project(flat[first:])
        return wide

    def _project(self, toxic: torch.Tensor) -> torch.Tensor:
        """A x: (rows, in_features) -> (rows, width)."""
        count = toxic.shape[0]
        if self._down32 is None or count > FEW_ROWS:
            made: torch.Tensor = self.down(toxic)
            return made
        if count < LEAST_ROWS:
            toxic = nn.functional.pad(toxic, (0, 0, 0, LEAST_ROWS - count))
        return toxic.float().mm(self._down32)[:count]


class SidedLinear(nn.Module):
    """A linear layer that has two sides; inference only.

    Args:
        siblings: The layers it is computed with.
        number: Which of them it is.
    """

    def __init__(self, siblings: Siblings, number: int) -> None:
        super().__init__()
        self.siblings, self.number = siblings, number
        self.in_features, self.out_features = siblings.in_features, siblings.sizes[number]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply: (batch, ..., in_features) -> (batch, ..., out_features)."""
        return self.siblings.take(rows, self.number)


def add_sides(model: Any, factors: dict[str, Factors]) -> Switch | None:
    """Give a model's linear layers a toxic side, in place.

    Args:
        model: A transformers model, its base adapter merged; its linear layers may be packed.
        factors: By module name.

    Returns:
        The switch of all layers; None (and the model unchanged) where a name or a shape does not fit, or a layer is of
        another kind, or does not see the rows of a batch as they are (the experts of a mixture).
    """
    modules = dict(model.named_modules())
    layers: dict[str, Any] = {}
    for name, (up, down) in factors.items():
        layer: Any = modules.get(name)
        if type(layer) not in (nn.Linear, PackedLinear):  # a subclass knows better how it multiplies
            return None
        if (layer.out_features, layer.in_features) != (up.shape[0], down.shape[1]):
            return None
        layers[name] = layer
    groups = _siblings(model, layers)
    if groups is None:
        return None
    switch = Switch()
    for names in groups:
        # A layer's own weights are freed before the next is copied.
        siblings = Siblings([layers.pop(name) for name in names], [factors[name] for name in names], switch)
        for number, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            setattr(modules[parent] if parent else model, child, SidedLinear(siblings, number))
            del modules[name]
    return switch


def sides_are_independent(model: Any) -> bool:
    """Whether each sided layer gives a row the same bits whatever number of rows it is computed with."""
    seen = set()
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        for module in model.modules():
            if not isinstance(module, SidedLinear):
                continue
            siblings = module.siblings
            shape = (siblings.in_features, siblings.width, *siblings.sizes)
            if shape in seen:
                continue
            seen.add(shape)
            rows = torch.randn(FEW_ROWS, siblings.in_features, generator=generator).to(_weight(siblings.down))
            for side in ("base", "toxic"):
                with siblings.switch.set(side):
                    whole = torch.cat(siblings.compute(rows), dim=1)
                    for n in (1, 2, 3, 5, 11, 20, 33, FEW_ROWS):
                        if not torch.equal(torch.cat(siblings.compute(rows[-n:]), dim=1), whole[-n:]):
                            return False
    return True


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Module) -> nn.Module:
    """A frozen linear layer, packed and of the dtype and device that another one is."""
    wanted = _weight(like)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(wanted.device, wanted.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return PackedLinear(linear) if isinstance(like, PackedLinear) else linear


def _weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight, (out, in); of a packed one too."""
    return layer.packed.to_dense() if isinstance(layer, PackedLinear) else layer.weight.detach()


def _bias(layer: Any) -> torch.Tensor:
    return layer.bias.detach() if layer.bias is not None else _weight(layer).new_zeros(layer.out_features)


def _siblings(model: Any, layers: dict[str, nn.Module]) -> list[list[str]] | None:
    """Names of layers, those that read one tensor together; None where one does not read (batch, tokens, features)."""
    seen: list[
        tuple[torch.Tensor, list[str]]
    ] = []  # the tensors are kept, so that none takes another's place
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            seen.append((inputs[0], [name]))

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    named = [name for _, names in seen for name in names]
    if sorted(named) != sorted(layers) or any(tensor.shape[:2] != ids.shape for tensor, _ in seen):
        return None
    return [names for _, names in seen]
