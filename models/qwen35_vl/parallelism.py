"""Which layouts Qwen3.5-VL can run in. Torch-free: the launcher's preflight reads it."""

from __future__ import annotations

from argparse import Namespace
from math import gcd

from models.qwen35_vl.configuration import Qwen35VLConfig


def check_layout(args: Namespace, config: Qwen35VLConfig) -> list[str]:
    """Refusals of what Megatron's own divisibility rules don't cover (those are in `runtime.preflight`).

    Args:
        args: the complete command line's flags, under Megatron's names.
        config: the model that they describe.

    Returns:
        One sentence per problem, naming the flag and the fix; empty when the layout can run.
    """
    return [
        *_check_decoder(args, config),
        *([] if config.language_model_only else _check_vision(args, config)),
    ]


def _check_decoder(args: Namespace, config: Qwen35VLConfig) -> list[str]:
    problems = []
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        problems.append(f"--linear-num-value-heads {values}: not a multiple of --linear-num-key-heads {keys}")
    for kind, heads in (("key", keys), ("value", values)):
        if heads % (tp * cp):
            problems.append(
                f"--tensor-model-parallel-size {tp} --context-parallel-size {cp}: the {heads} GatedDeltaNet {kind} "
                f"heads don't divide by TP * CP = {tp * cp}; {_largest_cp(tp, gcd(keys, values))}"
            )
    if tp > 1 and not args.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {tp} without --sequence-parallel: megatron-core 0.19.2 leaves the "
            "GatedDeltaNet output norm's gradient unreduced over TP; add --sequence-parallel"
        )
    rotary_pairs = int(config.kv_channels * config.rotary_percent) // 2
    if sum(config.mrope_section) != rotary_pairs:
        section = " ".join(map(str, config.mrope_section))
        problems.append(
            f"--mrope-section {section}: sums to {sum(config.mrope_section)}, but --kv-channels {config.kv_channels} "
            f"and --rotary-percent {config.rotary_percent} leave {rotary_pairs} frequencies"
        )
    return problems


def _largest_cp(tp: int, heads: int) -> str:
    if heads % tp:
        return f"--tensor-model-parallel-size has to divide {heads}"
    return f"--context-parallel-size {heads // tp} is the largest that works at this TP"


def _check_vision(args: Namespace, config: Qwen35VLConfig) -> list[str]:
    problems = []
    if not 0 <= config.token_ids.image < config.vocab_size:
        problems.append(
            f"--image-token-id {config.token_ids.image} isn't among the embedding's {config.vocab_size} rows"
        )
    tp, vision = args.tensor_model_parallel_size, config.vision
    for what, size in (("heads", vision.num_attention_heads), ("FFN channels", vision.ffn_hidden_size)):
        if size % tp:
            problems.append(
                f"--tensor-model-parallel-size {tp}: the ViT's {size} {what} don't divide by it; "
                f"use a TP that divides {size}"
            )
    if vision.num_layers < 1:
        problems.append(f"--vision-num-layers {vision.num_layers}: the ViT needs at least one layer")
    unit = vision.patch_size * vision.spatial_merge_size
    if args.dataset_provider == "mock" and args.image_size % unit:
        problems.append(
            f"--image-size {args.image_size}: mock images are whole merged patches; use a multiple of {unit}"
        )
    return problems
