"""What a processor's files say, without torch and transformers: the launcher's preflight reads them."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.json_files import read_object
from weights.check import DESCRIPTION, is_hub_name, is_text_only
from weights.folder import PROCESSOR_FILES, has_processor
from weights.schema import description_problems

# HF's config.json name of an id -> the token that must have it.
VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# What the image processor calls it -> vision_config's name.
_SIZES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}


@dataclass(frozen=True)
class ProcessorFacts:
    """What a processor and a model have to agree on.

    ids: token -> id, added tokens included.
    image_token: which of them stands for an image.
    sizes: the image processor's patch_size, merge_size and temporal_patch_size, as far as it says them.
    """

    ids: Mapping[str, int]
    image_token: str
    sizes: Mapping[str, int]

    def missing_token(self) -> str | None:
        """A token that training needs and the tokenizer lacks."""
        return next((token for token in (self.image_token, TURN_START, TURN_END) if token not in self.ids), None)

    def contradiction(self, config: Mapping[str, Any]) -> str | None:
        """How ids or patches differ from a model's `config.json`; None if they don't."""
        for name, token in VISION_TOKENS.items():
            token = self.image_token if name == "image_token_id" else token
            if name in config and self.ids.get(token) != config[name]:
                return f"{token} is id {self.ids.get(token)}, the model's {name} is {config[name]}"
        highest = max(self.ids.values())
        if highest >= vocab_size(config):
            return f"ids up to {highest} for a vocabulary of {vocab_size(config)} rows"
        if is_text_only(config):
            return None
        for theirs, ours in _SIZES.items():
            if theirs in self.sizes and self.sizes[theirs] != config["vision_config"][ours]:
                return f"its {theirs} is {self.sizes[theirs]}, the model's {ours} is {config['vision_config'][ours]}"
        return None


def vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the embedding that a `config.json` describes."""
    return (config if is_text_only(config) else config["text_config"])["vocab_size"]


def no_token(token: str) -> str:
    return f"its tokenizer has no {token} token; give a processor of the Qwen-VL family"


def contradicts(problem: str) -> str:
    """A contradiction with its fix."""
    return (
        f"{problem}; give the processor of the model that --model-variant or --hf-config names; "
        "--image-token-id overrides the model's id of the image token and must be the processor's"
    )


def processor_refusals(args: Namespace, config: Mapping[str, Any] | None) -> list[str]:
    """Refusals of `--hf-processor-path`, from the files that are on this machine.

    Args:
        config: the model's `config.json`; None: the data needs no processor, and the files aren't read.
    """
    path = args.hf_processor_path
    if path is None:
        if args.load_hf is None or config is None:
            return []
        return [
            f"--load-hf {args.load_hf}: it has no processor files, which --dataset-provider {args.dataset_provider} "
            "needs; name with --hf-processor-path the folder or hub name of the model that its weights come from"
        ]
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not is_hub_name(path):
            return [
                f"--hf-processor-path {path}: no such folder; without the flag the harness builds its own processor"
            ]
        cached = _cached_folder(path)
        if cached is None:
            if os.environ.get("HF_HUB_OFFLINE") == "1":
                return [f"--hf-processor-path {path}: not in the hub's cache, and HF_HUB_OFFLINE=1 forbids fetching it"]
            return []
        folder = cached
    if not has_processor(folder, text_only=args.language_model_only):
        names = " nor ".join(PROCESSOR_FILES)
        return [f"--hf-processor-path {path}: the folder has neither {names}; name a HF processor's folder"]
    # Those of `--load-hf` are said with its weights.
    problems = description_problems(folder)
    if not problems and config is not None:
        problems = _problems(folder, config)
    elif path == args.load_hf:
        problems = []
    return [f"--hf-processor-path {path}: {problem}" for problem in problems]


def _problems(folder: Path, config: Mapping[str, Any]) -> list[str]:
    facts = _facts(folder)
    if facts is None:
        return []
    if (token := facts.missing_token()) is not None:
        return [no_token(token)]
    if (problem := facts.contradiction(config)) is not None:
        return [contradicts(problem)]
    has_template = "chat_template" in _object(folder / "tokenizer_config.json")
    if not has_template and not any((folder / f"chat_template.{kind}").is_file() for kind in ("jinja", "json")):
        return ["it has no chat template (chat_template.jinja); give a processor of the Qwen-VL family"]
    return []


def _facts(folder: Path) -> ProcessorFacts | None:
    """None: the tokenizer isn't in tokenizer.json, so only transformers can read it.

    Args:
        folder: its files are as `description_problems` wants them.
    """
    content = _object(folder / "tokenizer.json")
    if not content:
        return None
    vocabulary = content["model"]["vocab"]
    # A unigram model lists its tokens, each with its score.
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {token[0]: i for i, token in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    tokenizer = _object(folder / "tokenizer_config.json")
    ids |= {token["content"]: int(number) for number, token in (tokenizer.get("added_tokens_decoder") or {}).items()}
    # transformers 5 puts the image processor inside of the second; the first comes from older ones.
    images = {
        **(_object(folder / PROCESSOR_FILES[1]).get("image_processor") or {}),
        **_object(folder / PROCESSOR_FILES[0]),
    }
    image_token = tokenizer.get("image_token") or VISION_TOKENS["image_token_id"]
    return ProcessorFacts(ids, image_token, {name: images[name] for name in _SIZES if name in images})


def _object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none."""
    return read_object(file) if file.is_file() else {}


def _cached_folder(name: str) -> Path | None:
    """A hub repository's snapshot on this machine, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(DESCRIPTION), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
