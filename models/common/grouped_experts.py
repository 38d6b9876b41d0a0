"""A layer's experts as one tensor for each of their two linears: one product instead of one for each expert.

`torch.nn.functional.grouped_mm` takes where each expert's tokens end from the device, so the host needs no counts and
launches as many kernels as for one expert. Weights start as megatron-core's `SequentialMLP` draws them, and checkpoints
have its names, so either loads the other's.

T rows (tokens times the experts that each visits, sorted by expert), E experts of this rank, H hidden, I' = I / ETP.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from models.common.kernel_check import relative_errors, what_is_wrong
from models.common.main_grad import main_grad_of, stand_in
from models.expert_flags import ALIGNMENT, stacks_experts


def takes(config: TransformerConfig) -> bool:
    """Whether `--moe-grouped-gemm` means these experts, rather than megatron-core's; see `stacks_experts`."""
    swiglu = config.gated_linear_unit and config.activation_func is F.silu
    return config.moe_grouped_gemm and swiglu and stacks_experts(config)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, *, accumulate_main_grad: bool = False) -> Tensor:
    """Each expert's rows times its own weight.

    In bfloat16 one grouped product; in other dtypes, which that lacks, a loop, for which the host waits for `ends`.

    Args:
        x: [T, in], sorted by expert; T may be 0.
        weight: [E, out, in], contiguous; in and out are multiples of `ALIGNMENT` in bfloat16.
        ends: [E] int32 on the device: the row behind each expert's last. The last one is T.
        accumulate_main_grad: add the weight's gradient to `weight.main_grad` where it is made; see
            `linear_cross_entropy`. Has no effect on the loop.

    Returns:
        [T, out].

    Raises:
        ValueError: sizes that the grouped product can't take.
    """
    if x.dtype != torch.bfloat16:
        parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([F.linear(rows, own) for rows, own in zip(parts, weight.unbind(), strict=True)])
    if weight.size(1) % ALIGNMENT or weight.size(2) % ALIGNMENT:
        raise ValueError(
            f"weights [{weight.size(1)}, {weight.size(2)}]: a grouped product takes multiples of {ALIGNMENT}"
        )
    return _GroupedLinear.apply(x, weight, ends, accumulate_main_grad)


class _GroupedLinear(torch.autograd.Function):
    """torch's own backward of the product refuses expanded gradients, and lays the weight's out transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, accumulate_main_grad: bool) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.accumulate_main_grad = accumulate_main_grad
        if not len(x):  # a grouped product of nothing at all isn't everywhere defined
            return x.new_zeros(0, weight.size(1))
        return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = F.grouped_mm(grad, weight, offs=ends) if len(x) else torch.zeros_like(x)
        if ctx.needs_input_grad[1]:
            weight_grad = F.grouped_mm(grad.mT, x.contiguous(), offs=ends) if len(x) else torch.zeros_like(weight)
            if ctx.accumulate_main_grad and (main_grad := main_grad_of(weight)) is not None:
                main_grad.add_(weight_grad)
                weight_grad = stand_in(weight)
        return x_grad, weight_grad, None, None


class StackedLinear(nn.Module):
    """The weights of one linear of all experts, and which expert and which part of it they are.

    weight: [E, out, in] of this rank.

    Args:
        out_size, in_size: of one expert, on one rank.
        tp_dim: dimension of the stacked weight that expert tensor parallelism cuts.
        parts: number of tensors that lie one below the other along `tp_dim` and are cut by themselves.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        experts: int,
        out_size: int,
        in_size: int,
        *,
        tp_dim: int,
        parts: int,
    ) -> None:
        super().__init__()
        self.groups, self.tp_dim, self.parts = groups, tp_dim, parts
        self.gradient_accumulation_fusion = False  # see `fuse_weight_gradients`
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(experts, out_size, in_size, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=tp_dim, stride=1)
        # Whether Megatron sums the gradient over the dense layers' data-parallel ranks, or over the experts' own.
        as_dense = groups.ep.size() == 1 and groups.expt_tp.size() == groups.tp.size()
        vars(self.weight)["allreduce"] = as_dense

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """See `grouped_linear`."""
        return grouped_linear(x, self.weight, ends, accumulate_main_grad=self.gradient_accumulation_fusion)

    def get_extra_state(self) -> None:
        """Nothing: checkpoints of megatron-core's linears have an entry for it."""

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""

    def sharded_extra_state(self, key: str, offsets: tuple[tuple[int, int, int], ...]) -> list[ShardedObject]:
        """An empty entry of each expert, without which megatron-core's own layers don't load."""
        count, groups = len(self.weight), self.groups
        places, sizes = [place for _, place, _ in offsets], [size for _, _, size in offsets]
        return [
            ShardedObject(
                key,
                None,
                (*sizes, count * groups.ep.size()),
                (*places, groups.ep.rank() * count + expert),
                (0, groups.expt_tp.rank(), groups.expt_dp.rank()),
            )
            for expert in range(count)
        ]

    def sharded_weight(
        self, key: str, offsets: tuple[tuple[int, int, int], ...]
    ) -> ShardedTensor | ShardedTensorFactory:
        """The weight for `torch_dist`, as a region of what `SequentialMLP` has: [all experts, out, in] of all ranks."""
        before = len(offsets)
        groups, tp = self.groups, self.groups.expt_tp
        own = (*offsets, (before, groups.ep.rank(), groups.ep.size()))
        axis, pieces = before + self.tp_dim, tp.size() * self.parts

        def build(key: str, weight: Tensor, replica: Any, _: slice | None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *own,
                    (axis, tp.rank() + number * tp.size(), pieces),
                    replica_id=replica,
                    prepend_axis_num=before,
                )
                # The parameter itself where it is whole: optimizers find it by that.
                for number, part in enumerate(weight.chunk(self.parts, self.tp_dim) if self.parts > 1 else [weight])
            ]

        replica = (0, 0, groups.expt_dp.rank())
        if self.parts == 1:
            (whole,) = build(key, self.weight, replica, None)
            return whole
        return ShardedTensorFactory(key, self.weight, build, functools.partial(torch.cat, dim=self.tp_dim), replica)


class GroupedExperts(MegatronModule):
    """The routed experts of a layer: SwiGLU(x W1) times the token's weight, W2.

    Args:
        num_local_experts: E.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.moe_ffn_hidden_size is not None
        ffn, hidden = config.moe_ffn_hidden_size // pg_collection.expt_tp.size(), config.hidden_size
        shared = (config, pg_collection, num_local_experts)
        self.linear_fc1 = StackedLinear(*shared, 2 * ffn, hidden, tp_dim=1, parts=2)
        self.linear_fc2 = StackedLinear(*shared, hidden, ffn, tp_dim=2, parts=1)
        self._recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's two weights in turn, in the stream of this EP and expert TP rank."""
        if not self.config.perform_initialization:
            return
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()), torch.no_grad():
            for first, second in zip(self.linear_fc1.weight, self.linear_fc2.weight, strict=True):
                self.config.init_method(first)
                self.config.output_layer_init_method(second)

    def forward(self, x: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Rows through their experts.

        Rows behind the last that `tokens_per_expert` counts go through the last expert, so that nothing is left
        uninitialised: the grouped product writes no row that no expert has.

        Args:
            x: [T, H], sorted by expert.
            tokens_per_expert: [E] int64, on the device for the host not to wait; from the host it is copied.
            weights: [T] float, each row's weight in its token's sum.

        Returns:
            [T, H], and no bias.
        """
        counts = tokens_per_expert.to(x.device, non_blocking=True)
        ends = counts.cumsum(0, dtype=torch.int32)
        ends[-1:].fill_(len(x))
        inner = self.linear_fc1(x, ends)
        weights = weights.unsqueeze(-1)
        if not self._recompute:
            return self.linear_fc2(self._activate(inner, weights), ends), None
        recomputed = CheckpointWithoutOutput()
        output = self.linear_fc2(recomputed.checkpoint(self._activate, inner, weights), ends)
        recomputed.discard_output_and_register_recompute(output)
        return output, None

    def _activate(self, x: Tensor, weights: Tensor) -> Tensor:
        """[T, 2 I'], gate and up projection, and [T, 1] -> [T, I']."""
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(x, None, weights, self.config.activation_func_fp8_input_store)
        gate, up = x.chunk(2, dim=-1)
        if (limit := self.config.activation_func_clamp_value) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (F.silu(gate) * (up + self.config.glu_linear_offset) * weights).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """For `torch_dist`, under `SequentialMLP`'s names."""
        if (metadata or {}).get("singleton_local_shards"):
            raise ValueError("experts under keys of their own (singleton_local_shards): not with --moe-grouped-gemm")
        state: ShardedStateDict = {}
        for name, layer in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            own, key = f"{prefix}{name}.", f"{prefix}experts.{name}."
            state[f"{own}weight"] = layer.sharded_weight(f"{key}weight", sharded_offsets)
            state[f"{own}_extra_state"] = layer.sharded_extra_state(f"{key}_extra_state", sharded_offsets)
        return state

    def backward_dw(self) -> None:
        """Weight gradients aren't put off."""


# Several times what one rounding to bfloat16 costs.
CHECK_TOLERANCE = 0.02


@functools.cache
def check_kernels() -> None:
    """Compare a grouped product and its gradients on this GPU, in bfloat16, with torch's in float64.

    Raises:
        RuntimeError: a tensor differs by more than bfloat16's rounding explains; the message names it.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    errors = kernel_errors(device)
    if wrong := what_is_wrong(errors, CHECK_TOLERANCE):
        raise RuntimeError(
            f"grouped products are computed wrongly on this {torch.cuda.get_device_name(device)} with torch "
            f"{torch.__version__}: relative to torch in float64 (bfloat16 explains {CHECK_TOLERANCE}) "
            f"{wrong}; give --no-moe-grouped-gemm"
        )


def kernel_errors(device: torch.device) -> dict[str, float]:
    """Relative errors of bfloat16 products and gradients against float64's, by name; NaN where they are NaN.

    Experts without tokens, first, last and between, are among them.
    """
    generator = torch.Generator(device).manual_seed(0)
    counts = (0, 37, 0, 200, 1, 0)
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x, weight, grad = normal(sum(counts), 128), normal(len(counts), 64, 128), normal(sum(counts), 64)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in (x, weight)]
        output = grouped_linear(leaves[0], leaves[1], ends)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))])
    names = ("product", "gradient of rows", "gradient of weights")
    exact, actual = (dict(zip(names, tensors, strict=True)) for tensors in results)
    return relative_errors(actual, exact)
