"""The torch backend: every layer from PyTorch and megatron-core alone, on any device and in any float dtype.

megatron-core's own local layers stop short: `WrappedTorchNorm` refuses sequence parallelism and zero-centred gamma,
`DotProductAttention` context parallelism and packed sequences. Norms compute in float32 at least, as HF's do.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.torch_norm import LayerNormBuilder
from torch import Tensor, nn

from models.backends.backend import Backend, plain_wide_norm
from models.backends.torch_attention import TorchAttention
from models.common.parallel_layers import ColumnParallelLinear, RowParallelLinear


def _mark(parameter: nn.Parameter, *, sequence_parallel: bool) -> None:
    """Megatron finds the parameters whose gradients it has to sum over TP by an attribute that torch lacks."""
    vars(parameter)["sequence_parallel"] = sequence_parallel


class _Norm(nn.Module):
    """What both norms share. A zero-centred weight w multiplies as 1 + w.

    Args:
        config: parameter dtype, sequence parallelism (the weight's gradient is then a share, which Megatron sums over
            TP), and whether gamma is zero-centred.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def reset_parameters(self) -> None:
        """Set the weight so that the norm starts as the identity on normalised input."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        _mark(self.weight, sequence_parallel=self.sequence_parallel)

    def gamma(self, dtype: torch.dtype) -> Tensor:
        """The multiplier, [hidden_size] in `dtype`."""
        weight = self.weight.to(dtype)
        return weight + 1.0 if self.zero_centered_gamma else weight


class TorchRMSNorm(_Norm):
    """x / rms(x) * gamma over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same, in the weight's dtype."""
        compute = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(compute), self.weight.shape, self.gamma(compute), self.eps)
        return normed.to(self.weight.dtype)


class TorchLayerNorm(_Norm):
    """(x - mean(x)) / std(x) * gamma + bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)
        _mark(self.bias, sequence_parallel=self.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same, in the weight's dtype."""
        compute = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(compute), self.weight.shape, self.gamma(compute), self.bias.to(compute), self.eps)
        return normed.to(self.weight.dtype)


class TorchNorm:
    """The norm that `config.normalization` names. A class, because megatron-core doesn't call functions it is given."""

    def __new__(  # type: ignore[misc]  # another class than its own on purpose: see above
        cls, config: TransformerConfig, hidden_size: int, eps: float
    ) -> TorchRMSNorm | TorchLayerNorm:
        if config.normalization == "RMSNorm":
            return TorchRMSNorm(config, hidden_size, eps)
        if config.normalization == "LayerNorm":
            return TorchLayerNorm(config, hidden_size, eps)
        raise ValueError(f"--normalization {config.normalization}: the torch backend has RMSNorm and LayerNorm")


class PlainRMSNorm(TorchRMSNorm):
    """`TorchRMSNorm` under `plain_wide_norm`'s configuration."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(plain_wide_norm(config), hidden_size, eps)


class TorchBackend(LocalSpecProvider, Backend):
    """megatron-core's parallel linears and sequential experts, with the norms and the attention above.

    Args:
        stack_experts: see `Backend`.
    """

    def __init__(self, *, stack_experts: bool = True) -> None:
        super().__init__()
        self.stack_experts = stack_experts

    def column_parallel_linear(self) -> type[ColumnParallelLinear]:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type[RowParallelLinear]:
        return RowParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        linears = MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=self.activation_func()
        )
        return partial(SequentialMLP, submodules=linears)

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> LayerNormBuilder:
        return TorchNorm

    def plain_rms_norm(self) -> LayerNormBuilder:
        return PlainRMSNorm

    def core_attention(self) -> type:
        return TorchAttention
