"""What a backend offers to the files that assemble layers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Protocol

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import LayerNormBuilder


class Backend(BackendSpecProvider, Protocol):
    """megatron-core's provider, and the norms that its configuration can't express.

    stack_experts: whether `--moe-grouped-gemm` may mean experts as one tensor for each linear of a layer
        (`models.common.grouped_experts`) rather than what this backend itself has for it.
    """

    stack_experts: bool

    @abstractmethod
    def plain_rms_norm(self) -> LayerNormBuilder:
        """RMSNorm whose weight is float32 and multiplies as it is; see `plain_wide_norm`. Its output is float32 too."""
        ...


def plain_wide_norm(config: TransformerConfig) -> TransformerConfig:
    """The configuration of GatedDeltaNet's output norm: gamma not zero-centred, in float32 at least.

    Released folders store this norm in float32. Its weights are near 1, where bfloat16 resolves 4e-3.
    """
    plain = copy.copy(config)
    plain.layernorm_zero_centered_gamma = False
    plain.params_dtype = torch.promote_types(config.params_dtype, torch.float32)
    return plain
