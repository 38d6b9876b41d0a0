"""Command-line flags of the model."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup

DEFAULT_ARCH = "qwen35_vl"


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of the architecture, what it computes again, and its kernels."""
    _add_architecture_flags(parser.add_argument_group("model"))
    _add_execution_flags(parser.add_argument_group("how the model runs"))


def _add_architecture_flags(group: _ArgumentGroup) -> None:
    group.add_argument("--model-arch", default=DEFAULT_ARCH, help="Architecture: a name in models.MODEL_REGISTRY")
    group.add_argument(
        "--model-variant",
        default=None,
        help="Size: the variant's numbers become Megatron flags, which explicit flags override",
    )
    group.add_argument(
        "--hf-config",
        default=None,
        metavar="DIR",
        help="Take the numbers from DIR/config.json instead of a variant's",
    )
    group.add_argument(
        "--language-model-only",
        action="store_true",
        help="Build no vision encoder and train on text alone; --load-hf's stays unread, and exports are of "
        "HuggingFace's text class. Implied by a text-only folder",
    )
    group.add_argument("--vision-num-layers", type=int, default=None, help="Layers of the ViT; default: the variant's")
    group.add_argument(
        "--image-token-id",
        type=int,
        default=None,
        help="Override the architecture's id of the image placeholder; one that the processor contradicts is refused",
    )


def _add_execution_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--recompute-vision",
        action="store_true",
        help="Recompute every ViT layer in backward; the decoder has Megatron's --recompute-* flags",
    )
    group.add_argument(
        "--redundant-vision",
        action="store_true",
        help="Every context-parallel rank encodes all images; default: the ranks share them, each is encoded once",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="Run each training micro-batch as two CUDA graphs; packs are padded to --seq-length tokens and "
        "--max-patches-per-pack patches",
    )
    group.add_argument(
        "--fuse-weight-gradients",
        action="store_true",
        help="Transformer Engine's linears, grouped experts and the output layer add weight gradients to Megatron's "
        "float32 ones where they are made (Megatron's --gradient-accumulation-fusion, which needs Apex, is the other "
        "linears')",
    )
    group.add_argument(
        "--keep-logits",
        action="store_true",
        help="Keep the logits of trained tokens in the model's dtype for backward, rather than compute them again: a "
        "matrix product less, for 2 bytes x vocabulary / TP x trained tokens of a micro-batch (and as much per MTP "
        "depth) of memory",
    )
    group.add_argument(
        "--allow-slow-kernels",
        action="store_true",
        help="On a GPU, run plain torch kernels where flash-linear-attention or Transformer Engine is missing, and "
        "Transformer Engine's plain attention where it has no fused one",
    )
    group.add_argument(
        "--no-moe-grouped-gemm",
        action="store_true",
        help="Compute experts one by one: leave out --moe-grouped-gemm, which experts get by default in bf16",
    )
    group.add_argument(
        "--no-moe-fusion",
        action="store_true",
        help="Leave out --moe-permute-fusion and --moe-router-fusion, which Transformer Engine gets by default",
    )
