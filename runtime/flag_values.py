"""Values that can't be trained with: Megatron would end in a raw error, or train wrongly.

Sizes of the model and of the layout are in `runtime.preflight`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from runtime.flag_needs import unmet_needs
from runtime.megatron_flags import Flag, flags_by_name, megatron_flags
from runtime.recomputation import recomputation_refusals

# Flag -> the least that it can be; other numbers of the schedule and of the logs may be anything.
_LEAST: Mapping[str, float] = {
    "--train-iters": 1,
    "--eval-interval": 1,
    "--eval-iters": 0,
    "--save-interval": 1,
    "--log-interval": 1,
    "--tensorboard-log-interval": 1,
    "--exit-interval": 1,
    "--manual-gc-interval": 0,
    "--num-workers": 0,
    "--seed": 1,
    "--lr": 0,
    "--min-lr": 0,
    "--lr-warmup-iters": 0,
    "--lr-warmup-init": 0,
    "--lr-decay-iters": 1,
    "--weight-decay": 0,
    "--clip-grad": 0,
    "--adam-beta1": 0,
    "--adam-beta2": 0,
    "--adam-eps": 0,
    "--distributed-timeout-minutes": 1,
    "--moe-aux-loss-coeff": 0,
    "--mtp-loss-scaling-factor": 0,
    "--attention-dropout": 0,
    "--hidden-dropout": 0,
    "--recompute-num-layers": 1,
    "--eval-micro-batch-size": 1,
    "--save-params-interval": 1,
    "--save-activations-interval": 1,
    "--save-tokens-per-expert-interval": 1,
    "--save-wgrads-interval": 1,
    "--save-dgrads-interval": 1,
    "--check-weight-hash-across-dp-replicas-interval": 1,
    "--gpu-sniff-test-interval": 1,
    "--log-memory-interval": 1,
    "--train-sync-interval": 1,
    "--tensorboard-queue-size": 1,
    "--dist-ckpt-workers": 1,
    "--ddp-bucket-size": 1,
    "--ddp-num-buckets": 1,
    "--exit-duration-in-mins": 1,
    "--start-eval-at-iter": 0,
    "--lr-wsd-decay-iters": 1,
    "--microbatch-group-size-per-virtual-pipeline-stage": 1,
    "--distributed-timeout-seconds-after-init": 1,
    "--num-distributed-optimizer-instances": 1,
    "--profile-step-start": 0,
    "--profile-step-end": 1,
    "--profile-ranks": 0,
    "--loss-scale": 1,
    "--loss-scale-window": 1,
    "--hysteresis": 1,
    "--initial-loss-scale": 1,
    "--min-loss-scale": 0,
    "--moe-z-loss-coeff": 0,
    "--moe-expert-capacity-factor": 0,
    "--moe-input-jitter-eps": 0,
    "--override-ckpt-iteration": 0,
    "--decoupled-lr": 0,
    "--decoupled-min-lr": 0,
    "--start-weight-decay": 0,
    "--end-weight-decay": 0,
    "--sgd-momentum": 0,
    "--init-method-std": 0,
    "--norm-epsilon": 0,
    "--eval-global-batch-size": 1,
}
_BELOW_ONE = ("--adam-beta1", "--adam-beta2", "--attention-dropout", "--hidden-dropout")


def value_refusals(args: Namespace, given: Mapping[str, Any]) -> list[str]:
    """Refusals of values, each naming the flag and the fix.

    Args:
        args: the complete command line's.
        given: what the user's own flags say, by destination.
    """
    # The rest divides by these.
    if found := [*_not_finite(given), *_too_small(args)]:
        return found
    return [
        *_schedule(args),
        *_optimizer(args),
        *_router(args),
        *_precision(args),
        *_batches(args),
        *_structure(args, given),
        *recomputation_refusals(args),
        *unmet_needs(args),
    ]


def _not_finite(given: Mapping[str, Any]) -> list[str]:
    found = []
    for flag in _floats():
        values = given.get(flag.dest)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{flag.names[0]} {value}: give a finite number")
    return found


def _floats() -> list[Flag]:
    return [flag for flag in megatron_flags() if flag.type == "float"]


def _too_small(args: Namespace) -> list[str]:
    found = []
    for flag, least in _LEAST.items():
        value = getattr(args, flags_by_name()[flag].dest)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < least:
                found.append(f"{flag} {each}: has to be at least {least:g}")
    for flag in _BELOW_ONE:
        if (value := getattr(args, flags_by_name()[flag].dest)) >= 1:
            found.append(f"{flag} {value}: has to be below 1")
    return found


def _schedule(args: Namespace) -> list[str]:
    problems = []
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        problems.append(f"--min-lr {args.min_lr}: above --lr {args.lr}; give a --min-lr of at most that")
    if args.train_iters is None and not args.skip_train:
        problems.append("--train-iters is missing: how many steps to take")
    end, flag = args.lr_decay_iters, "--lr-decay-iters"
    if end is None:
        end, flag = args.train_iters, "--train-iters"
    if end is not None and args.lr_warmup_iters >= max(end, 1) and args.lr_warmup_iters > 0:
        problems.append(f"--lr-warmup-iters {args.lr_warmup_iters}: has to be below {flag} {end}; lower it")
    if args.lr is not None and args.lr_warmup_init > args.lr:
        problems.append(f"--lr-warmup-init {args.lr_warmup_init}: above --lr {args.lr}; the rate rises from it")
    first, last = args.start_weight_decay, args.end_weight_decay
    if first is not None and last is not None and last < first:
        problems.append(f"--end-weight-decay {last}: below --start-weight-decay {first}; it may only rise")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        problems.append("--lr-decay-style WSD: needs --lr-wsd-decay-iters")
    wsd = args.lr_wsd_decay_iters
    if wsd is not None and end is not None and wsd > end:
        problems.append(f"--lr-wsd-decay-iters {wsd}: above {flag} {end}; lower it")
    if args.save and args.save_retain_interval is not None and args.save_retain_interval % args.save_interval:
        problems.append(
            f"--save-retain-interval {args.save_retain_interval}: not a multiple of --save-interval "
            f"{args.save_interval}"
        )
    if args.profile and args.profile_step_end <= args.profile_step_start:
        problems.append(
            f"--profile-step-end {args.profile_step_end}: not above --profile-step-start {args.profile_step_start}"
        )
    if args.lr is None and not args.skip_train:
        problems.append("--lr is missing: the highest learning rate")
    return problems


def _optimizer(args: Namespace) -> list[str]:
    if args.optimizer == "adam":
        return []
    if args.optimizer != "sgd":
        return [f"--optimizer {args.optimizer}: not built here; use adam or sgd"]
    if args.use_distributed_optimizer or args.use_megatron_fsdp:
        return [
            "--optimizer sgd: --use-distributed-optimizer and --use-megatron-fsdp know Adam's state alone; use adam, "
            "or start pretrain_multimodal.py without them (the launcher gives the first)"
        ]
    return []


def _router(args: Namespace) -> list[str]:
    if not args.num_experts:
        return []
    problems = []
    ranks = args.tensor_model_parallel_size * args.expert_model_parallel_size
    if args.moe_token_dispatcher_type == "flex" and ranks == 1:
        problems.append("--moe-token-dispatcher-type flex: exchanges tokens of several ranks; use alltoall")
    kinds = args.moe_router_load_balancing_type
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if args.moe_router_topk == 1 and args.moe_router_score_function == "softmax" and not args.moe_router_pre_softmax:
        problems.append(
            "--moe-router-topk 1: the softmax over one chosen expert is constant, so the router would learn nothing; "
            "use at least 2, or add --moe-router-pre-softmax, which transformers hasn't"
        )
    if "global_aux_loss" in kinds:
        problems.append(
            "--moe-router-load-balancing-type global_aux_loss: megatron-core 0.19.2 counts tokens of uneven "
            "micro-batches wrongly (fractions don't sum to 1); use aux_loss"
        )
    if "seq_aux_loss" in kinds and args.use_packed_sequence:
        problems.append(
            "--moe-router-load-balancing-type seq_aux_loss: with --use-packed-sequence, a pack would count as one "
            "sequence; use aux_loss, or rows (USE_PACKED_SEQUENCE=0)"
        )
    return problems


def _precision(args: Namespace) -> list[str]:
    problems = []
    if args.bf16 and args.fp16:
        problems.append("--bf16 and --fp16: give one")
    names = ("attn", "mlp", "moe", "moe_router", "moe_preprocess", "mamba")
    unknown = [name for name in args.cuda_graph_modules or () if name not in names]
    problems += [
        f"--cuda-graph-modules {name}: no such part of a layer; there is {', '.join(names)}" for name in unknown
    ]
    return problems


def _batches(args: Namespace) -> list[str]:
    problems = []
    micro, batch = args.eval_micro_batch_size, args.eval_global_batch_size
    micro, batch = micro or args.micro_batch_size, batch or args.global_batch_size or args.micro_batch_size
    if (args.eval_micro_batch_size or args.eval_global_batch_size) and batch % micro:
        problems.append(f"--eval-global-batch-size {batch}: not a multiple of --eval-micro-batch-size {micro}")
    if args.log_memory_interval is not None and args.log_memory_interval % args.log_interval:
        problems.append(
            f"--log-memory-interval {args.log_memory_interval}: not a multiple of --log-interval {args.log_interval}"
        )
    return problems


def _structure(args: Namespace, given: Mapping[str, Any]) -> list[str]:
    problems = []
    if str(args.attention_backend).endswith("local"):
        problems.append("--attention-backend local: the pinned Megatron takes it with its own --spec alone; use auto")
    if given.get("experimental_attention_variant", "gated_delta_net") != "gated_delta_net":
        problems.append(
            f"--experimental-attention-variant {args.experimental_attention_variant}: gated_delta_net is built here"
        )
    if given.get("position_embedding_type", "rope") != "rope":
        problems.append(
            f"--position-embedding-type {args.position_embedding_type}: the architecture chooses the decoder's own; "
            "leave it out"
        )
    # E embedding, t layer, m MTP, L loss; stages are parted by "|", and "(t|)*3" repeats.
    strange = sorted(set(args.pipeline_model_parallel_layout or "") - set("EtmL|,*() 0123456789"))
    if strange:
        problems.append(
            f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout}: has {' '.join(strange)}; "
            "layers are E, t, m and L"
        )
    return problems
