"""The Transformer Engine backend: megatron-core's own provider, with the norm that it can't express.

The only file that imports Transformer Engine's classes; GPU only when run, importable and buildable without one.
"""

from __future__ import annotations

from functools import partial

import transformer_engine  # noqa: F401  megatron-core's provider imports without it and fails later, less clearly
from megatron.core.extensions import transformer_engine as te
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.torch_norm import LayerNormBuilder, LayerNormInterface

from models.backends.backend import Backend, plain_wide_norm
from models.common.lora import Adaptable


class TEPlainRMSNorm:
    """Transformer Engine's RMSNorm under `plain_wide_norm`. A class, because megatron-core asks for one."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> LayerNormInterface:
        return TENorm(config=plain_wide_norm(config), hidden_size=hidden_size, eps=eps)


class TEColumnParallelLinear(Adaptable, te.TEColumnParallelLinear):
    """Transformer Engine's, with room for an adapter; the parent's name tells Megatron-FSDP how TP slices it."""


class TERowParallelLinear(Adaptable, te.TERowParallelLinear):
    """Transformer Engine's, with room for an adapter; the parent's name tells Megatron-FSDP how TP slices it."""


class TEBackend(TESpecProvider, Backend):
    """Transformer Engine's layers; norms are fused into the linears behind them.

    Args:
        adapters: LoRA's stand beside linears, and read what these read: norms are layers of their own then.
        stack_experts: see `Backend`.
    """

    def __init__(self, *, adapters: bool = False, stack_experts: bool = True) -> None:
        super().__init__()
        self._adapters = adapters
        self.stack_experts = stack_experts

    def fuse_layernorm_and_linear(self) -> bool:
        return not self._adapters

    def column_parallel_linear(self) -> type:
        return TEColumnParallelLinear if self._adapters else super().column_parallel_linear()

    def row_parallel_linear(self) -> type:
        return TERowParallelLinear if self._adapters else super().row_parallel_linear()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        if not self._adapters or moe_use_grouped_gemm:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        linears = MLPSubmodules(
            linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear, activation_func=self.activation_func()
        )
        return partial(SequentialMLP, submodules=linears)

    def plain_rms_norm(self) -> LayerNormBuilder:
        return TEPlainRMSNorm
