"""What the preflight refuses of HuggingFace weights and of checkpoints of another model. Torch-free."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from models import ModelConfig, ModelSpec
from models.spec import HfWeights
from runtime import checkpoints
from runtime.megatron_flags import dest_of
from weights.check import HfSource, check_folder, described
from weights.folder import FolderError, HfFolder, occupied, parse_size, read_config


def flag_refusals(args: Namespace, spec: ModelSpec[Any]) -> list[str]:
    """Refusals of flags of HuggingFace weights that can't work whatever the folder has."""
    if spec.hf_weights is None:
        given = [flag for flag, value in (("--load-hf", args.load_hf), ("--save-hf", args.save_hf)) if value]
        return [f"{flag}: {args.model_arch} has no table of HuggingFace weights" for flag in given]
    problems = []
    if args.save_hf_interval is not None and (args.save_hf is None or args.save_hf_interval < 1):
        problems.append(f"--save-hf-interval {args.save_hf_interval}: needs --save-hf DIR and at least 1")
    if args.save_hf is not None and (given := other_routers(args)):
        problems.append(f"--save-hf with {' '.join(given)}: transformers routes tokens otherwise; drop one")
    if args.save_hf is not None and args.save_hf_interval is None and (there := occupied(Path(args.save_hf))):
        problems.append(f"--save-hf {args.save_hf}: {there}; give a new folder")
    try:
        parse_size(args.max_shard_size)
    except ValueError as error:
        problems.append(f"--max-shard-size {error}")
    return problems


# Flags by which the router chooses and weighs experts otherwise than transformers does, and their usual values.
_ROUTERS = {
    "--moe-router-score-function": "softmax",
    "--moe-router-pre-softmax": False,
    "--moe-router-topk-scaling-factor": None,
    "--moe-router-num-groups": None,
    "--moe-router-group-topk": None,
    "--moe-router-enable-expert-bias": False,
}


def other_routers(args: Namespace) -> list[str]:
    """Given flags with which a model in HuggingFace's format would answer otherwise than the trained one."""
    values = vars(args)
    return [flag for flag, usual in _ROUTERS.items() if args.num_experts and values[dest_of(flag)] != usual]


def open_source(
    path: Path,
    spec: ModelSpec[Any],
    weights: HfWeights[Any],
    config: ModelConfig,
    *,
    language_model_only: bool,
    weights_are_here: bool,
) -> tuple[HfSource | None, list[str]]:
    """`--load-hf`'s folder with its headers, and refusals: another model, tensors that don't fit."""
    try:
        model = described(spec, read_config(path), path)
        # A folder's ViT may be left out.
        differences = weights.differences(config, weights.language_model(model) if language_model_only else model)
        if differences or not weights_are_here:
            return None, [f"--load-hf {path}: {difference}" for difference in differences]
        folder = HfFolder.open(path)
        if weights.as_stored(config, folder.shapes)[1]:
            return None, [f"--mtp-num-layers: {path} has no tensors of MTP; leave the flag out"]
        return check_folder(weights, config, folder), []
    except FolderError as error:
        return None, [f"--load-hf {error}"]


def checkpoint_refusals(
    args: Namespace, spec: ModelSpec[Any], config: ModelConfig, start: checkpoints.Start
) -> list[str]:
    """Refusals of a checkpoint whose `hf/config.json` describes another model than the flags, each with both values."""
    flag, folder = "--load", args.load
    if start.folder is None and args.pretrained_checkpoint is not None:
        flag, folder = "--pretrained-checkpoint", args.pretrained_checkpoint
        start = checkpoints.choose(Path(folder), args.ckpt_step, args.ckpt_format)
    if spec.hf_weights is None or start.folder is None:
        return []
    hf = Path(folder) / "hf"
    if not (hf / "config.json").exists():
        return []
    try:
        theirs = described(spec, read_config(hf), hf)
    except FolderError as error:
        return [f"{flag} {error}"]
    differing = spec.hf_weights.differences(config, theirs)
    if differing:
        return [f"{flag} {folder}: its checkpoints are of another model: {difference}" for difference in differing]
    return _mtp_refusals(args, f"{flag} {folder}", _mtp_layers(theirs))


def _mtp_refusals(args: Namespace, where: str, theirs: int) -> list[str]:
    """Refusals of a checkpoint with another depth of multi-token prediction, which starting anew may leave out."""
    ours = args.mtp_num_layers or 0
    starts_anew = args.finetune or args.load is None
    if ours == theirs or (ours < theirs and starts_anew):
        return []
    fix = f"give --mtp-num-layers {theirs}"
    if ours < theirs:
        fix += ", or --finetune to start from its other weights"
    return [f"--mtp-num-layers {ours}: {where} has checkpoints of a model with {theirs}; {fix}"]


def _mtp_layers(config: ModelConfig) -> int:
    words = config.to_flags()
    return int(words[words.index("--mtp-num-layers") + 1]) if "--mtp-num-layers" in words else 0
