"""Refusals of recomputation flags that the pinned megatron-core would end over, or take without doing anything.

The rules are those of `megatron.core.transformer.TransformerConfig.__post_init__` and
`megatron.training.arguments.validate_args`.
"""

from __future__ import annotations

from argparse import Namespace

# Parts of a layer that `--recompute-modules` names, and what each needs besides.
MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts", "gdn_norm_out")


def recomputation_refusals(args: Namespace) -> list[str]:
    """Refusals of the `--recompute-*` flags, each with its fix.

    Args:
        args: the complete command line's.
    """
    if args.recompute_activations:
        args = Namespace(**{**vars(args), "recompute_granularity": "selective"})
    if args.recompute_granularity == "full":
        return _full(args)
    given = [
        f"--recompute-{name} {value}"
        for name, value in (("method", args.recompute_method), ("num-layers", args.recompute_num_layers))
        if value is not None
    ]
    problems = [f"{flag}: of --recompute-granularity full; give both or neither" for flag in given]
    return problems + (_selective(args) if args.recompute_granularity == "selective" else [])


def _full(args: Namespace) -> list[str]:
    problems = []
    if args.recompute_method is None:
        problems.append("--recompute-granularity full: needs --recompute-method uniform or block")
    if args.recompute_num_layers is None:
        problems.append("--recompute-granularity full: needs --recompute-num-layers, 1 for the least memory")
    if args.moe_layer_recompute:
        problems.append("--moe-layer-recompute: full recomputation has it already; leave it out")
    if args.recompute_modules is not None:
        problems.append("--recompute-modules: of --recompute-granularity selective; full recomputes whole layers")
    return problems


def _selective(args: Namespace) -> list[str]:
    modules = args.recompute_modules or ()
    problems = [
        f"--recompute-modules {name}: no such part of a layer here; there is {', '.join(MODULES)}"
        for name in modules
        if name not in MODULES
    ]
    if "moe_act" in modules and not args.moe_grouped_gemm:
        problems.append("--recompute-modules moe_act: needs --moe-grouped-gemm; use moe, or leave it out")
    if "shared_experts" in modules and args.moe_shared_expert_overlap:
        problems.append("--recompute-modules shared_experts with --moe-shared-expert-overlap: drop one")
    return problems
