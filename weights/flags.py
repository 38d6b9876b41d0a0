"""Command-line flags of HuggingFace weights, of what is trained, and of adapters."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of weights that come and go, of frozen parts and rates by part, and of LoRA."""
    _add_folder_flags(parser.add_argument_group("HuggingFace weights"))
    _add_tuning_flags(parser.add_argument_group("what is trained"))
    _add_lora_flags(parser.add_argument_group("LoRA"))


def _add_folder_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--load-hf",
        default=None,
        metavar="DIR",
        help="Start from this folder's (or hub name's) weights, config.json and processor; an existing checkpoint of "
        "--load goes on instead",
    )
    group.add_argument(
        "--save-hf",
        default=None,
        metavar="DIR",
        help="Write the trained model as a HuggingFace folder when training ends; DIR must not be there yet",
    )
    group.add_argument(
        "--save-hf-interval",
        type=int,
        default=None,
        metavar="N",
        help="Write DIR/iter_0000100 and so on instead: every N iterations, and at the end",
    )
    group.add_argument(
        "--max-shard-size", default="5GB", help="Size of a safetensors file of --save-hf at most, 5GB or 300MB"
    )
    group.add_argument(
        "--allow-nonfinite-weights", action="store_true", help="Accept NaN and infinity in --load-hf's weights"
    )


def _add_tuning_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--freeze",
        nargs="+",
        default=None,
        metavar="GROUP",
        help="Don't train these: vision, projector, language, embeddings, or a regular expression that is searched for "
        "in HuggingFace's tensor names",
    )
    group.add_argument(
        "--lr-mult",
        nargs="+",
        default=None,
        metavar="GROUP=FACTOR",
        help="Multiply --lr and --min-lr for these, named as for --freeze: vision=0.1",
    )


def _add_lora_flags(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--lora-rank", type=int, default=None, metavar="R", help="Train LoRA adapters of this rank alone"
    )
    group.add_argument("--lora-alpha", type=float, default=None, help="Scale is alpha / rank; default: the rank")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="Share of an adapter's input that is dropped")
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=["all-linear"],
        metavar="MODULE",
        help="HuggingFace's linear modules, by name or the end of one (q_proj), or mtp; default: all-linear, every "
        "linear module of the decoder but the output layer and MTP",
    )
    group.add_argument("--lora-vision", action="store_true", help="Adapt the ViT's and the merger's linears too")
    group.add_argument("--lora-rslora", action="store_true", help="Scale is alpha / sqrt(rank)")
    group.add_argument(
        "--lora-experts", action="store_true", help="Adapt the routed experts too, as peft's target_parameters"
    )
    group.add_argument(
        "--load-adapter", default=None, metavar="DIR", help="Start from this peft adapter, with its own options"
    )
    group.add_argument(
        "--save-adapter", default=None, metavar="DIR", help="Write the adapter in peft's format when training ends"
    )
