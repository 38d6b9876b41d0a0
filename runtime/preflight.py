"""Refusals before anything expensive starts: layouts and machines that can't run what the flags ask for.

Imports neither torch nor megatron, so that the launcher answers within a second. Each refusal names the flag
and the fix. What only one architecture knows is in its `ModelSpec.check_layout`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from difflib import get_close_matches
from math import lcm
from pathlib import Path

from models.expert_flags import counts_stay_on_the_device, misaligned, stacks_experts
from runtime import checkpoints, launch_environment, output_folder
from runtime.machine import Machine
from runtime.megatron_flags import dest_of

# Flags that no check could compute without, and those whose 0 says "none"; all numbers of layers, sizes and ranks that
# the checks read have to be at least 1.
_REQUIRED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--micro-batch-size")
_MAY_BE_ZERO = ("--num-experts", "--mtp-num-layers")
_SIZES = (
    *_REQUIRED,
    *_MAY_BE_ZERO,
    "--ffn-hidden-size",
    "--num-query-groups",
    "--kv-channels",
    "--max-position-embeddings",
    "--padded-vocab-size",
    "--linear-conv-kernel-dim",
    "--linear-key-head-dim",
    "--linear-value-head-dim",
    "--linear-num-key-heads",
    "--linear-num-value-heads",
    "--rotary-base",
    "--moe-router-topk",
    "--moe-ffn-hidden-size",
    "--moe-shared-expert-intermediate-size",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--global-batch-size",
    "--ckpt-step",
    "--save-retain-interval",
)


def unknown_flags(words: Iterable[str], known: Iterable[str]) -> list[str]:
    """Refusals of misspelt flags, which Megatron's own parser would find only after its import, on every rank."""
    known = set(known)
    given = dict.fromkeys(word.split("=", 1)[0] for word in words if word.startswith("--"))
    return [
        f"{flag}: no such flag{f'; did you mean {guesses[0]}?' if guesses else ''}"
        for flag in given
        if flag not in known
        for guesses in [get_close_matches(flag, known, n=1, cutoff=0.8)]
    ]


def unusable_sizes(args: Namespace) -> list[str]:
    """Refusals of numbers that no check could compute with: missing ones and those below 1."""
    problems = []
    for flag in _SIZES:
        value = vars(args)[dest_of(flag)]
        least = int(flag not in _MAY_BE_ZERO)
        if value is None and flag in _REQUIRED:
            problems.append(f"{flag} is missing")
        elif value is not None and value < least:
            problems.append(f"{flag} {value}: has to be at least {least}")
    return problems


def refusals(
    args: Namespace, given: Iterable[str], start: checkpoints.Start, machine: Machine, world_size: int
) -> list[str]:
    """Everything wrong with the flags by Megatron's rules and this machine's, each with its fix.

    Args:
        args: the effective flags as `arguments` reads them.
        given: destinations of the user's own flags.
        start: which checkpoint `--load` means.
        machine: what is installed.
        world_size: ranks of the whole job.
    """
    return [
        *_machine(args, machine),
        *_world(args, world_size),
        *_attention_heads(args),
        *_context_parallel(args),
        *_sequence(args),
        *_experts(args, world_size),
        *_pipeline(args),
        *_checkpoint(args, start),
        *_cuda_graphs(args, given, machine),
        *output_folder.problems(args),
        *launch_environment.problems(world_size),
    ]


def unknown_name(flag: str, name: str, known: Iterable[str]) -> str:
    """A refusal that lists what there is, the closest first."""
    known = list(known)
    close = get_close_matches(name.lower(), known, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{flag} {name}: no such name; {guess}There is: {', '.join(known) or 'none'}"


def cp_comm_types(args: Namespace) -> list[str]:
    """The values of --cp-comm-type that these heads and this --transformer-impl can take, the best first."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    # Fewer KV heads than TP ranks are repeated: each rank has one.
    queries, keys = args.num_attention_heads // tp, max(_kv_heads(args) // tp, 1)
    a2a = [] if queries % cp or keys % cp else ["a2a"]
    return a2a + (["all_gather"] if args.transformer_impl == "local" else ["p2p", "all_gather"])


def _kv_heads(args: Namespace) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _machine(args: Namespace, machine: Machine) -> list[str]:
    problems = []
    if args.transformer_impl == "transformer_engine":
        if not machine.transformer_engine:
            problems.append(
                "--transformer-impl transformer_engine: Transformer Engine isn't installed; "
                "use --transformer-impl local, or install the extra: pip install '.[te]'"
            )
        if not machine.gpus:
            problems.append(
                "--transformer-impl transformer_engine: no CUDA device is visible (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); use --transformer-impl local"
            )
    elif args.transformer_impl != "local":
        problems.append(f"--transformer-impl {args.transformer_impl}: use local or transformer_engine")
    if machine.gpus and not args.allow_slow_kernels:
        missing = []
        if not machine.flash_linear_attention:
            missing.append("flash-linear-attention")
        if not machine.transformer_engine:
            missing.append("Transformer Engine")
        if missing:
            problems.append(
                f"{' and '.join(missing)} not installed: on a GPU, plain torch kernels are many times slower; "
                "pip install '.[te]', or accept them with --allow-slow-kernels"
            )
    # core/tensor_parallel/random.py builds an extension for these at the first backward.
    discarding = sorted({"layernorm", "moe_act", "gdn_norm_out"} & set(args.recompute_modules or ()))
    if discarding and not machine.compiler:
        problems.append(
            f"--recompute-modules {' '.join(discarding)}: megatron-core compiles C++ for it, and there is no "
            "compiler (c++ or CXX) or no ninja; install both, or leave it out (core_attn needs none)"
        )
    if args.use_precision_aware_optimizer and not machine.transformer_engine:
        problems.append("--use-precision-aware-optimizer: Transformer Engine, which has its FusedAdam, isn't installed")
    if args.wandb_project and not machine.wandb:
        problems.append(f"--wandb-project {args.wandb_project}: wandb isn't installed; pip install wandb")
    return problems


def _world(args: Namespace, world_size: int) -> list[str]:
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    if world_size % (tp * pp * cp):
        return [
            f"--tensor-model-parallel-size {tp} * --pipeline-model-parallel-size {pp} * --context-parallel-size {cp} "
            f"= {tp * pp * cp} doesn't divide the {world_size} ranks; "
            f"start a multiple of {tp * pp * cp} ranks or lower one of them"
        ]
    data_ranks = world_size // (tp * pp * cp)
    if args.global_batch_size is not None:
        step = args.micro_batch_size * data_ranks
        if args.global_batch_size % step:
            return [
                f"--global-batch-size {args.global_batch_size}: not a multiple of --micro-batch-size "
                f"{args.micro_batch_size} * {data_ranks} data-parallel ranks; {_nearest(args.global_batch_size, step)}"
            ]
    return []


# What a captured micro-batch can't do, by flag.
_NOT_IN_GRAPHS = {
    "--use-megatron-fsdp": "it moves weights and gradients about",
    "--overlap-grad-reduce": "gradients are added inside the graph, where no hook can start their reduction",
    "--overlap-param-gather": "its hooks run on the host",
    "--recompute-granularity": "recomputation restores random states, which can't be captured",
    "--recompute-vision": "recomputation restores random states, which can't be captured",
    "--fp16": "the loss scale would be fixed",
    "--cuda-graph-impl": "these are the harness's own graphs",
}


def _cuda_graphs(args: Namespace, given: Iterable[str], machine: Machine) -> list[str]:
    names = set(given)
    problems = []
    if args.fuse_weight_gradients and args.use_megatron_fsdp:
        problems.append("--fuse-weight-gradients: Megatron-FSDP's gradient buffers aren't added to; drop one")
    if not args.cuda_graphs:
        return problems
    if not machine.gpus or args.transformer_impl != "transformer_engine":
        problems.append("--cuda-graphs: needs a GPU and --transformer-impl transformer_engine")
    if not args.use_packed_sequence:
        problems.append("--cuda-graphs: rows are documents packed to one length; add --use-packed-sequence")
    if args.max_patches_per_pack is None and not args.language_model_only:
        problems.append("--cuda-graphs: images are padded to a number of patches; give it with --max-patches-per-pack")
    if args.num_experts and not counts_stay_on_the_device(args):
        problems.append(
            "--cuda-graphs: the host has to know how many tokens each expert gets; give --bf16, --moe-grouped-gemm and "
            "--moe-token-dispatcher-type alltoall without expert parallelism, or take a dense variant"
        )
    for flag, size in (
        ("--tensor-model-parallel-size", args.tensor_model_parallel_size),
        ("--pipeline-model-parallel-size", args.pipeline_model_parallel_size),
        ("--context-parallel-size", args.context_parallel_size),
    ):
        if size > 1:
            problems.append(f"--cuda-graphs with {flag} {size}: not built; drop one")
    return problems + [
        f"--cuda-graphs with {flag}: {why}; drop one" for flag, why in _NOT_IN_GRAPHS.items() if dest_of(flag) in names
    ]


def _attention_heads(args: Namespace) -> list[str]:
    problems = []
    tp, heads, kv = args.tensor_model_parallel_size, args.num_attention_heads, _kv_heads(args)
    if heads % kv:
        return [f"--num-attention-heads {heads}: not a multiple of --num-query-groups {kv}; change one of them"]
    if heads % tp:
        problems.append(
            f"--tensor-model-parallel-size {tp}: the {heads} query heads don't divide by it; "
            f"use one of {_divisors(heads)}"
        )
    if kv % tp and tp % kv:
        problems.append(
            f"--tensor-model-parallel-size {tp}: the {kv} KV heads are neither a multiple nor a divisor of it; "
            f"use one of {[n for n in _divisors(heads) if not (kv % n and n % kv)]}"
        )
    if args.padded_vocab_size is not None and args.padded_vocab_size % tp:
        problems.append(
            f"--tensor-model-parallel-size {tp}: the embedding's {args.padded_vocab_size} rows don't divide by it"
        )
    if not args.num_experts and args.ffn_hidden_size is not None and args.ffn_hidden_size % tp:
        problems.append(
            f"--tensor-model-parallel-size {tp}: --ffn-hidden-size {args.ffn_hidden_size} doesn't divide by it"
        )
    return problems


def _context_parallel(args: Namespace) -> list[str]:
    cp = args.context_parallel_size
    if cp == 1 or args.num_attention_heads % args.tensor_model_parallel_size:
        return []
    given = args.cp_comm_type
    working = cp_comm_types(args)
    if len(given) not in (1, args.num_layers):
        return [f"--cp-comm-type: {len(given)} values; give one, or one for each of the {args.num_layers} layers"]
    problems = []
    for kind in dict.fromkeys(given):
        if kind in working or (kind == "a2a+p2p" and args.transformer_impl == "transformer_engine"):
            continue
        if kind == "a2a":
            why = (
                f"{args.num_attention_heads} query and {_kv_heads(args)} KV heads at TP "
                f"{args.tensor_model_parallel_size} don't divide by --context-parallel-size {cp}"
            )
        else:
            why = f"--transformer-impl {args.transformer_impl} has no such exchange"
        problems.append(f"--cp-comm-type {kind}: {why}; use {' or '.join(working)}")
    return problems


def _sequence(args: Namespace) -> list[str]:
    problems = []
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    # CP's zigzag cuts a row into 2 * CP chunks, SP cuts each rank's share into TP.
    step = cp * lcm(2, tp if args.sequence_parallel else 1) if cp > 1 else (tp if args.sequence_parallel else 1)
    if args.use_packed_sequence:
        step = 2 * cp if cp > 1 else 1  # documents are padded by themselves; Megatron checks the budget
    if args.seq_length % step:
        problems.append(
            f"--seq-length {args.seq_length}: --context-parallel-size {cp} with --tensor-model-parallel-size {tp} "
            f"need a multiple of {step}; {_nearest(args.seq_length, step)}"
        )
    if args.max_position_embeddings is not None and args.seq_length > args.max_position_embeddings:
        problems.append(
            f"--seq-length {args.seq_length}: the model has positions up to {args.max_position_embeddings}; "
            "lower it, or raise --max-position-embeddings"
        )
    return problems


def _experts(args: Namespace, world_size: int) -> list[str]:
    ep, tp, pp = (
        args.expert_model_parallel_size,
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
    )
    etp = args.expert_tensor_parallel_size or tp
    if not args.num_experts:
        idle = {"--no-moe-grouped-gemm": args.no_moe_grouped_gemm, "--no-moe-fusion": args.no_moe_fusion}
        problems = [f"{flag}: the model is dense; leave it out" for flag, given in idle.items() if given]
        if ep == 1:
            return problems
        return [*problems, f"--expert-model-parallel-size {ep}: the model is dense; use 1, or a variant with experts"]
    problems = []
    if args.num_experts % ep:
        problems.append(
            f"--expert-model-parallel-size {ep}: the {args.num_experts} experts don't divide by it; "
            f"use one of {_divisors(args.num_experts)}"
        )
    if world_size % (ep * etp * pp):
        problems.append(
            f"--expert-model-parallel-size {ep} * --expert-tensor-parallel-size {etp} * "
            f"--pipeline-model-parallel-size {pp} = {ep * etp * pp} doesn't divide the {world_size} ranks; lower one"
            + ("" if args.expert_tensor_parallel_size else " (--expert-tensor-parallel-size is TP unless given)")
        )
    for flag, size, ranks in (
        ("--moe-ffn-hidden-size", args.moe_ffn_hidden_size, etp),
        ("--moe-shared-expert-intermediate-size", args.moe_shared_expert_intermediate_size, tp),
    ):
        if size is not None and size % ranks:
            problems.append(f"{flag} {size}: doesn't divide by the {ranks} tensor-parallel ranks that share it")
    if args.moe_grouped_gemm and args.no_moe_grouped_gemm:
        problems.append("--moe-grouped-gemm and --no-moe-grouped-gemm: give one")
    if args.moe_grouped_gemm and args.transformer_impl == "local" and args.use_megatron_fsdp:
        problems.append(
            "--moe-grouped-gemm with --use-megatron-fsdp: its checkpoints know experts one by one; leave one out"
        )
    if args.moe_grouped_gemm and args.bf16 and stacks_experts(args) and not args.use_megatron_fsdp:
        problems += [f"{problem}; change it, or leave out --moe-grouped-gemm" for problem in misaligned(args)]
    if args.moe_router_topk > args.num_experts:
        problems.append(f"--moe-router-topk {args.moe_router_topk}: there are only {args.num_experts} experts")
    return problems


def _pipeline(args: Namespace) -> list[str]:
    pp = args.pipeline_model_parallel_size
    virtual = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if pp == 1:
        return [
            f"{flag}: needs --pipeline-model-parallel-size above 1"
            for flag, value in (
                ("--num-virtual-stages-per-pipeline-rank", args.num_virtual_stages_per_pipeline_rank),
                ("--num-layers-per-virtual-pipeline-stage", args.num_layers_per_virtual_pipeline_stage),
                ("--decoder-first-pipeline-num-layers", first),
                ("--decoder-last-pipeline-num-layers", last),
            )
            if value is not None
        ]
    problems = []
    stages = {
        "--num-virtual-stages-per-pipeline-rank": args.num_virtual_stages_per_pipeline_rank,
        "--num-layers-per-virtual-pipeline-stage": args.num_layers_per_virtual_pipeline_stage,
        "--pipeline-model-parallel-layout": args.pipeline_model_parallel_layout,
    }
    if len(given := [flag for flag, value in stages.items() if value is not None]) > 1:
        problems.append(f"{' and '.join(given)}: each divides the layers among stages; give one")
    if args.use_megatron_fsdp:
        problems.append(
            f"--use-megatron-fsdp with --pipeline-model-parallel-size {pp}: megatron-core 0.19.2 doesn't check it and "
            "trains wrongly; drop one (USE_FSDP=0 or PP=1)"
        )
    if args.pipeline_model_parallel_layout is not None:
        return problems  # Megatron checks a written-out layout
    layers = args.num_layers - (first or 0) - (last or 0)
    layers += args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    stages = pp - (first is not None) - (last is not None)
    if (stages and (layers < stages or layers % stages)) or (not stages and layers):
        problems.append(
            f"--pipeline-model-parallel-size {pp}: {layers} layers don't divide among {stages} stages; "
            "change --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
        )
    elif virtual and stages:
        per_stage = layers // stages
        if per_stage % virtual:
            problems.append(
                f"virtual pipeline: {per_stage} layers per stage don't divide by {virtual} "
                "(--num-virtual-stages-per-pipeline-rank or --num-layers-per-virtual-pipeline-stage)"
            )
    return problems


def _checkpoint(args: Namespace, start: checkpoints.Start) -> list[str]:
    problems = []
    if args.ckpt_format == "torch_dcp":
        problems.append("--ckpt-format torch_dcp: of torch's FSDP, not built here; use torch_dist (CKPT_FORMAT)")
    if args.use_megatron_fsdp != (args.ckpt_format == "fsdp_dtensor"):
        wanted = "fsdp_dtensor" if args.use_megatron_fsdp else "torch_dist"
        problems.append(
            f"--ckpt-format {args.ckpt_format}: fsdp_dtensor and --use-megatron-fsdp need each other; "
            f"use --ckpt-format {wanted} (CKPT_FORMAT)"
        )
    if args.init_model_with_meta_device and not args.use_megatron_fsdp and not args.load:
        problems.append(
            "--init-model-with-meta-device: only --use-megatron-fsdp initialises what was built there; add it, or "
            "--load a checkpoint"
        )
    if args.use_megatron_fsdp and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        problems.append("--use-megatron-fsdp: unset the environment's CUDA_DEVICE_MAX_CONNECTIONS=1")
    # One rank's look into the files is enough: all of them stop with it.
    if os.environ.get("RANK", "0") == "0":
        problems += _start(args, start)
    if args.keep_last is not None and args.keep_last < 1:
        problems.append(f"--keep-last {args.keep_last}: has to be at least 1 (KEEP_LAST)")
    if args.keep_last is not None and args.save_retain_interval is not None:
        problems.append("--keep-last with --save-retain-interval: both delete checkpoints; give one")
    if args.log_time_split < 0:
        problems.append(f"--log-time-split {args.log_time_split}: give every how many iterations, or 0 for never")
    return problems


def _start(args: Namespace, start: checkpoints.Start) -> list[str]:
    """Refusals of the checkpoint that the run starts from: what isn't there, isn't whole or names code."""
    found = []
    load, pretrained = args.load, args.pretrained_checkpoint
    if load:
        required = args.exit_on_missing_checkpoint and not pretrained
        found.append(checkpoints.problem(Path(load), start, args.ckpt_format, "--load", required=required))
    # Megatron takes it where --load has no checkpoint.
    if pretrained and start.folder is None:
        first = checkpoints.choose(Path(pretrained), args.ckpt_step, args.ckpt_format)
        flag = "--pretrained-checkpoint"
        found.append(checkpoints.problem(Path(pretrained), first, args.ckpt_format, flag, required=True))
    return [problem for problem in found if problem is not None]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(number: int, step: int) -> str:
    below = number // step * step
    return f"use {below or step} or {below + step}" if below else f"use {step}"
