"""The Transformer Engine backend: megatron-core's own provider, with the norm that it can't express.

The only file that imports Transformer Engine's classes; GPU only when run, importable and buildable without one.
"""

from __future__ import annotations

import transformer_engine  # noqa: F401  megatron-core's provider imports without it and fails later, less clearly
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import LayerNormBuilder, LayerNormInterface

from models.backends.backend import Backend, plain_wide_norm


class TEPlainRMSNorm:
    """Transformer Engine's RMSNorm under `plain_wide_norm`. A class, because megatron-core asks for one."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> LayerNormInterface:
        return TENorm(config=plain_wide_norm(config), hidden_size=hidden_size, eps=eps)


class TEBackend(TESpecProvider, Backend):
    """Transformer Engine's layers; norms are fused into the linears behind them."""

    def plain_rms_norm(self) -> LayerNormBuilder:
        return TEPlainRMSNorm
