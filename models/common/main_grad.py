"""Weight gradients that are added to Megatron's `main_grad` where they are made, rather than by its hooks later."""

from __future__ import annotations

import torch
from torch import Tensor


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Where Megatron's DDP adds up the weight's gradient; None where there is no such buffer."""
    # Megatron-FSDP hands a buffer out that a gradient is to be written to, not added: a tied weight has several.
    return None if hasattr(weight, "__fsdp_param__") else getattr(weight, "main_grad", None)


def stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets for a gradient that is in `main_grad` already.

    Not None where Megatron's hooks wait for a gradient: autograd would run them in another thread, where a collective
    may hang. Of a weight with other uses (a tied one), Megatron adds the sum of what autograd got: zeros.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
