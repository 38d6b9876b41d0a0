"""What `--moe-grouped-gemm` means: by which flags experts are one tensor for each linear of a layer.

Asked of the command line and of megatron-core's configuration, which share these names. Torch-free, for the preflight.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

ALIGNMENT = 8  # values of a bfloat16 row that a grouped product takes at once: 16 bytes

# What `models.common.grouped_experts` lacks and megatron-core's own experts have.
_OF_MEGATRONS = (
    "fp8",
    "fp4",
    "add_bias_linear",
    "use_te_activation_func",
    "use_transformer_engine_op_fuser",
    "delay_wgrad_compute",
    "fine_grained_activation_offloading",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "moe_mlp_glu_interleave_size",
    "moe_single_grouped_weight",
)


def stacks_experts(settings: Any) -> bool:
    """Whether `--moe-grouped-gemm` makes a layer's experts one tensor for each linear.

    Transformer Engine's own grouped experts serve the 16-bit and 32-bit floats that torch's grouped product hasn't.

    Args:
        settings: complete arguments, or a TransformerConfig.
    """
    others = settings.transformer_impl == "transformer_engine" and not settings.bf16
    return not (others or any(getattr(settings, name) for name in _OF_MEGATRONS))


def misaligned(args: Namespace) -> list[str]:
    """Sizes that a grouped product can't take, as refusals without the fix."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return [
        f"{flag} {size}{f' over {ranks} expert tensor-parallel ranks' if ranks > 1 else ''}: a grouped product in bf16 "
        f"takes multiples of {ALIGNMENT}"
        for flag, size, ranks in (
            ("--hidden-size", args.hidden_size, 1),
            ("--moe-ffn-hidden-size", args.moe_ffn_hidden_size, etp),
        )
        if size is not None and (size // ranks) % ALIGNMENT
    ]


def takes_grouped_gemm(args: Namespace, *, on_gpu: bool) -> bool:
    """Whether `--moe-grouped-gemm` is the best for a run that doesn't say: in bf16, and on GPUs where it is theirs."""
    if args.lora_experts:  # adapters stand beside single experts
        return False
    if stacks_experts(args) and not args.use_megatron_fsdp:
        return bool(args.bf16) and not misaligned(args)
    return on_gpu and args.transformer_impl == "transformer_engine"


def counts_stay_on_the_device(args: Namespace) -> bool:
    """Whether the host never learns how many tokens an expert gets."""
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return bool(
        args.moe_grouped_gemm
        and args.bf16
        and stacks_experts(args)
        and args.moe_token_dispatcher_type == "alltoall"
        and args.expert_model_parallel_size * etp == 1
        and (args.moe_expert_capacity_factor is None or args.moe_pad_expert_input_to_capacity)
    )
