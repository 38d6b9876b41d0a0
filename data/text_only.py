"""Refusals of what `--language-model-only` contradicts. Torch-free, like all that the launcher's preflight reads."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from data import DATASET_PROVIDERS

# The user's own flags that speak of images or of the vision encoder.
_OF_IMAGES = (
    *("vision_num_layers", "image_token_id", "recompute_vision", "redundant_vision", "lora_vision"),
    *("max_patches_per_pack", "min_pixels", "max_pixels", "media_root"),
)


def refusals(args: Namespace, given: Mapping[str, Any]) -> list[str]:
    """Flags that need a vision encoder in a run without one, each with its fix.

    Args:
        args: the complete command line's; `language_model_only` may come from a text-only folder.
        given: the user's flags by destination.
    """
    if not args.language_model_only:
        return []
    why = "--language-model-only" if given.get("language_model_only") else "the folder's text-only model"
    problems = [
        f"--{dest.replace('_', '-')}: {why} has no vision encoder, and no images; leave it out"
        for dest in _OF_IMAGES
        if given.get(dest) not in (None, False)
    ]
    if given.get("image_seq_length"):
        problems.append(f"--image-seq-length {args.image_seq_length}: {why} has no images; leave it out")
    provider = DATASET_PROVIDERS.get(args.dataset_provider)
    if provider is not None and provider.always_images:
        others = ", ".join(name for name, other in DATASET_PROVIDERS.items() if not other.always_images)
        problems.append(
            f"--dataset-provider {provider.name}: all of its samples have images, which {why} can't see; give one of "
            f"{others}, or your own"
        )
    if args.lora_rank is not None and given.get("language_model_only") and args.load_hf is not None:
        problems.append(
            "--lora-rank with --language-model-only: an adapter's names have to be its base's; make a text-only folder "
            "with scripts/import_hf.py --language-model-only and scripts/export_hf.py, and give that to --load-hf"
        )
    return problems
