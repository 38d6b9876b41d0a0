"""`--lora-rank` and its companions before anything heavy: what they imply, and refusals. Imports no torch."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import ModelConfig, ModelSpec
from models.adapters import AdapterMap, lora_of_args
from models.json_files import JsonError, read_object
from models.trained import frozen_names, rate_factors
from runtime import checkpoints
from weights.adapter import AdapterFolder
from weights.base import OWN_BASE, RECORD, BaseRecord
from weights.folder import FolderError, HfFolder, has_weights, occupied


def implied_by_adapter(given: Mapping[str, Any]) -> list[str]:
    """Flags to put before the user's: `--load-adapter`'s own options, and the base that `--load`'s checkpoint names.

    Args:
        given: the user's flags by destination.

    Raises:
        FolderError: no adapter, or a damaged one.
    """
    flags: list[str] = []
    if given.get("load_adapter") is not None:
        adapter = AdapterFolder.open(given["load_adapter"])
        options = adapter.options
        flags += ["--lora-rank", str(options.rank), "--lora-alpha", str(options.alpha)]
        flags += ["--lora-dropout", str(options.dropout), "--lora-targets", *adapter.modules]
        flags += ["--lora-rslora"] * options.rslora + ["--lora-experts"] * adapter.experts
    is_lora = bool(flags) or given.get("lora_rank") is not None
    if is_lora and given.get("load") is not None and given.get("load_hf") is None:
        record = BaseRecord.read(Path(given["load"]))
        if record is not None:
            flags += ["--load-hf", record.path]
    return flags


def tuning_refusals(
    args: Namespace, given: Mapping[str, Any], spec: ModelSpec[Any], config: ModelConfig, start: checkpoints.Start
) -> list[str]:
    """Why these flags of what is trained can't run as they are.

    Args:
        given: the user's flags by destination.
        config: the run's model.
        start: which checkpoint `--load` means.
    """
    return [
        *_freezing(args, spec, config),
        *_frozen_otherwise(args, spec, config, start),
        *_lora(args, given, spec, config, start),
    ]


def _freezing(args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> list[str]:
    """Refusals of `--freeze` and `--lr-mult`."""
    given = [flag for flag, value in (("--freeze", args.freeze), ("--lr-mult", args.lr_mult)) if value]
    if not given:
        return []
    if spec.hf_weights is None:
        return [f"{flag}: {args.model_arch} has no table of HuggingFace weights" for flag in given]
    if args.lora_rank is not None:
        return [f"{flag} with --lora-rank: LoRA trains its adapters alone; drop one" for flag in given]
    if args.lr_mult and args.decoupled_lr is not None:
        return ["--lr-mult with --decoupled-lr: both set rates; --lr-mult embeddings=FACTOR does the latter's job"]
    groups, flag = spec.hf_weights.groups, given[0]
    try:
        mapping = spec.hf_weights.mapping(config, ())
        flag = "--freeze"
        frozen = frozen_names(mapping, groups, args.freeze or ())
        flag = "--lr-mult"
        rate_factors(mapping, groups, args.lr_mult or (), frozen)
    except ValueError as error:
        return [f"{flag} {error}"]
    return []


def _frozen_otherwise(
    args: Namespace, spec: ModelSpec[Any], config: ModelConfig, start: checkpoints.Start
) -> list[str]:
    """Refusal of resuming with other frozen parts: the checkpoint's optimizer has states for what it trained."""
    if start.folder is None or args.finetune or args.no_load_optim or args.lora_rank is not None:
        return []
    record = Path(args.load) / "arguments.json"
    if spec.hf_weights is None or not record.is_file():
        return []
    groups = spec.hf_weights.groups
    try:
        mapping = spec.hf_weights.mapping(config, ())
        saved = read_object(record).get("arguments", {}).get("freeze") or []
        if frozen_names(mapping, groups, saved) == frozen_names(mapping, groups, args.freeze or ()):
            return []
    except (JsonError, ValueError):
        return []  # the flags' own refusal says it, or the record is another program's
    return [
        f"--load {args.load}: its run had {'--freeze ' + ' '.join(saved) if saved else 'no --freeze'}, and its "
        "optimizer has states for what that trained; give the same, or --finetune to start from its weights (CKPT_LOAD)"
    ]


def _lora(
    args: Namespace, given: Mapping[str, Any], spec: ModelSpec[Any], config: ModelConfig, start: checkpoints.Start
) -> list[str]:
    if args.lora_rank is None:
        return _without_lora(args, given)
    if spec.hf_weights is None:
        return [f"--lora-rank: {args.model_arch} has no table of HuggingFace weights"]
    problems = []
    if args.lora_rank < 1:
        problems.append(f"--lora-rank {args.lora_rank}: has to be at least 1")
    if args.lora_alpha is not None and args.lora_alpha <= 0:
        problems.append(f"--lora-alpha {args.lora_alpha}: has to be above 0")
    if not 0 <= args.lora_dropout < 1:
        problems.append(f"--lora-dropout {args.lora_dropout}: has to be at least 0 and below 1")
    problems += _combinations(args)
    if problems:
        return problems
    try:
        mapping = lora_of_args(args, spec, config)
        for adapter in mapping.adapters.values():
            if adapter.by_rows and not adapter.source.is_expert:
                for rank in range(args.tensor_model_parallel_size):
                    adapter.places(rank, args.tensor_model_parallel_size)
    except ValueError as error:
        return [f"--lora-targets {error}"]
    return _files(args, mapping, start)


def _without_lora(args: Namespace, given: Mapping[str, Any]) -> list[str]:
    flags = sorted(dest for dest in given if dest.startswith("lora_") or dest == "save_adapter")
    problems = [f"--{dest.replace('_', '-')}: needs --lora-rank" for dest in flags]
    if args.load is not None and (Path(args.load) / RECORD).is_file():
        problems.append(
            f"--load {args.load}: its checkpoints hold a LoRA adapter; give the --lora-rank it was made with"
        )
    return problems


def _combinations(args: Namespace) -> list[str]:
    problems = []
    if args.lora_experts:
        if not args.num_experts:
            problems.append("--lora-experts: the model is dense")
        if args.lora_dropout:
            problems.append("--lora-experts with --lora-dropout: peft drops nothing there; use --lora-dropout 0")
        if (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) > 1:
            problems.append("--lora-experts: needs --expert-tensor-parallel-size 1")
        if args.moe_grouped_gemm:
            problems.append("--lora-experts: adapters stand beside single experts; leave out --moe-grouped-gemm")
    for flag in ("--moe-shared-expert-overlap", "--use-grouped-gemm-for-shared-expert", "--delay-wgrad-compute"):
        if vars(args).get(flag[2:].replace("-", "_")):
            problems.append(f"{flag}: isn't built for LoRA; leave it out")
    if args.use_megatron_fsdp and args.save_hf is not None:
        problems.append(
            "--save-hf with --use-megatron-fsdp and --lora-rank: shards of weights and adapters don't line up; use "
            "--save-adapter, and scripts/export_hf.py --adapter DIR --merge"
        )
    return problems


def _files(args: Namespace, mapping: AdapterMap, start: checkpoints.Start) -> list[str]:
    """Refusals of the folders that the flags name."""
    problems = []
    if args.save_adapter is not None and (there := occupied(Path(args.save_adapter))):
        problems.append(f"--save-adapter {args.save_adapter}: {there}; give a new folder")
    try:
        if args.load_adapter is not None:
            AdapterFolder.open(args.load_adapter).check(mapping)
        if start.folder is None:
            if args.save is not None and args.load_hf is None and has_weights(Path(args.save) / OWN_BASE):
                problems.append(
                    f"--save {args.save}: its {OWN_BASE} folder is another run's random base; resume that with --load, "
                    "or give --save a folder of its own"
                )
            return problems
        record = BaseRecord.read(Path(args.load))
        if record is None:
            problems.append(
                f"--load {args.load}: its checkpoints hold whole models; scripts/export_hf.py makes a folder of one "
                "for --load-hf, on which LoRA trains"
            )
        elif not Path(args.load_hf).is_dir():
            problems.append(f"--load {args.load}: its base {args.load_hf} is gone; name it with --load-hf")
        else:
            asked = BaseRecord.of(HfFolder.open(args.load_hf), mapping)
            problems += [f"--load {args.load}: {difference}" for difference in record.differences(asked)]
    except FolderError as error:
        problems.append(str(error))
    return problems
