"""Linear layers for decoding on a CPU: weights laid out once for the matrix kernels instead of at every call.

Decoding multiplies a handful of rows by every weight of the model. `torch.nn.functional.linear` hands the weight to
oneDNN in its plain layout, and the kernel rearranges it on every call, which costs as much again as the product.
oneDNN can keep the rearranged weight; that is what the inductor compiler does when it freezes a model, and what is
done here without a compiler. Measured on one AVX-512 core, batch 10: half the time in bfloat16 and in float32.
"""

from __future__ import annotations

import platform

import torch
from torch import nn

# How many rows the layout is chosen for: a handful of candidates. Other sizes work too.
TYPICAL_ROWS = 10
# oneDNN compiles a kernel for every new number of rows (about a millisecond a layer shape). Long prompts are padded
# up to a multiple of this, so that a corpus of prompts needs a few dozen kernels and not hundreds.
ROW_MULTIPLE = 16
# A single row has a kernel of its own, which sums in another order. Two rows give each row what any number of rows
# gives it (`models.lm.prepare` checks that), so that a row's result does not depend on how many are beside it.
LEAST_ROWS = 2


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in oneDNN's own layout; inference on a CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        # Empty: says dtype and device, which adapter layers (PEFT) ask their factors for.
        self.weight = linear.weight.detach().new_empty(0)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply: (..., in_features) -> (..., out_features), same dtype."""
        flat = rows.reshape(-1, self.in_features)
        count = flat.shape[0]
        missing = -count % ROW_MULTIPLE if count > 2 * ROW_MULTIPLE else max(0, LEAST_ROWS - count)
        if missing:
            flat = nn.functional.pad(flat, (0, 0, 0, missing))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return out[:count].reshape(*rows.shape[:-1], self.out_features)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and this build of torch have the kernels."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and has_fast_bfloat16()))
    )


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); emulation is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def pack_linears(module: nn.Module) -> int:
    """Replace every `nn.Linear` under `module` by a `PackedLinear`, in place (small ones too: for the same bits).

    Exactly `nn.Linear` is replaced, never a subclass (a quantised or adapter layer knows better).

    Returns:
        How many layers were replaced.
    """
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
            count += 1
        else:
            count += pack_linears(child)
    return count
