"""Megatron flags that need another one: refused before Megatron is imported, which would end in a raw assertion.

What each needs is what `megatron.training.arguments.validate_args` and the configurations of the pinned megatron-core
assert. `tests/test_flag_table.py` gives every flag by itself, and pairs of them, to both.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.megatron_flags import flags_by_name


@dataclass(frozen=True)
class Need:
    """what: the flag or the state that is needed, for the message."""

    what: str
    is_met: Callable[[Namespace], bool]


def _flag(flag: str) -> Need:
    """Another flag, with whatever value isn't its default."""
    return Need(flag, lambda args: _is_given(args, flag))


_TE = Need("--transformer-impl transformer_engine", lambda args: args.transformer_impl == "transformer_engine")
_SHARDED_OPTIMIZER = Need(
    "--use-distributed-optimizer or --use-megatron-fsdp",
    lambda args: args.use_distributed_optimizer or args.use_megatron_fsdp,
)
_DISTRIBUTED_OPTIMIZER = _flag("--use-distributed-optimizer")
_FSDP = _flag("--use-megatron-fsdp")
_FP8 = _flag("--fp8-format")
_EP = Need("--expert-model-parallel-size above 1", lambda args: args.expert_model_parallel_size > 1)
_TP = Need("--tensor-model-parallel-size above 1", lambda args: args.tensor_model_parallel_size > 1)
_PP = Need("--pipeline-model-parallel-size above 1", lambda args: args.pipeline_model_parallel_size > 1)
_FLEX = Need("--moe-token-dispatcher-type flex", lambda args: args.moe_token_dispatcher_type == "flex")
_PRECISION_AWARE = _flag("--use-precision-aware-optimizer")
_SIXTEEN_BITS = Need("--bf16 or --fp16", lambda args: args.bf16 or args.fp16)

_NEEDS: Mapping[str, tuple[Need, ...]] = {
    "--hierarchical-context-parallel-sizes": (
        Need("--cp-comm-type a2a+p2p", lambda args: "a2a+p2p" in (args.cp_comm_type or ())),
    ),
    "--tp-comm-overlap": (_TE, _TP),
    "--overlap-moe-expert-parallel-comm": (_EP,),
    "--delay-wgrad-compute": (_TE, _flag("--overlap-moe-expert-parallel-comm")),
    "--overlap-dispatch-backward-with-experts-wgrad": (_TE, _EP),
    "--ep-overlap-early-attn-memory-release": (_flag("--overlap-moe-expert-parallel-comm"),),
    "--overlap-p2p-communication-warmup-flush": (_PP,),
    "--fp32-residual-connection": (_SIXTEEN_BITS,),
    "--distribute-saved-activations": (_TP, _flag("--recompute-granularity")),
    "--fp8-format": (_TE,),
    "--fp4-format": (_TE,),
    "--fp8-output-proj": (_FP8,),
    "--fp8-param-gather": (_FP8, _SHARDED_OPTIMIZER),
    "--fp4-param-gather": (_flag("--fp4-format"),),
    "--reuse-grad-buf-for-mxfp8-param-ag": (_FP8, _flag("--fp8-param-gather"), _flag("--overlap-param-gather")),
    "--moe-router-padding-for-quantization": (_FP8,),
    "--moe-router-padding-for-fp8": (_FP8,),
    "--moe-router-group-topk": (_flag("--moe-router-num-groups"),),
    "--moe-router-num-groups": (_flag("--moe-router-group-topk"),),
    "--moe-router-enable-expert-bias": (
        Need(
            "--moe-router-score-function sigmoid or sqrtsoftplus",
            lambda args: args.moe_router_score_function in ("sigmoid", "sqrtsoftplus"),
        ),
    ),
    "--moe-single-grouped-weight": (_flag("--moe-grouped-gemm"),),
    "--moe-single-grouped-bias": (_flag("--moe-grouped-gemm"),),
    "--moe-enable-deepep": (_FLEX,),
    "--moe-flex-dispatcher-backend": (_FLEX,),
    "--moe-permute-fusion": (_TE,),
    "--moe-router-fusion": (_TE,),
    "--moe-pad-expert-input-to-capacity": (_flag("--moe-expert-capacity-factor"),),
    "--moe-expert-rank-capacity-factor": (_FLEX,),
    "--moe-paged-stash": (_flag("--moe-expert-rank-capacity-factor"),),
    "--fine-grained-activation-offloading": (_TE,),
    "--symmetric-ar-type": (_TE,),
    "--log-max-attention-logit": (_TE,),
    "--batch-invariant-mode": (
        Need("--attention-backend flash", lambda args: str(args.attention_backend).endswith("flash")),
    ),
    "--load-main-params-from-ckpt": (_flag("--no-load-optim"),),
    "--overlap-param-gather": (_SHARDED_OPTIMIZER, _flag("--overlap-grad-reduce")),
    "--overlap-param-gather-with-optimizer-step": (_DISTRIBUTED_OPTIMIZER, _flag("--overlap-param-gather"), _PP),
    "--fsdp-manual-registration": (_FSDP, _flag("--use-nccl-ub")),
    "--use-precision-aware-optimizer": (_SHARDED_OPTIMIZER,),
    "--main-grads-dtype": (_PRECISION_AWARE,),
    "--main-params-dtype": (_PRECISION_AWARE,),
    "--exp-avg-dtype": (_PRECISION_AWARE,),
    "--exp-avg-sq-dtype": (_PRECISION_AWARE,),
    "--start-weight-decay": (_flag("--weight-decay-incr-style"),),
    "--end-weight-decay": (_flag("--weight-decay-incr-style"),),
    "--weight-decay-incr-style": (_flag("--start-weight-decay"), _flag("--end-weight-decay")),
    "--lr-wsd-decay-iters": (Need("--lr-decay-style WSD", lambda args: args.lr_decay_style == "WSD"),),
    "--cuda-graph-impl": (
        Need(
            "--no-check-for-nan-in-loss-and-grad with full_iteration",
            lambda args: args.cuda_graph_impl != "full_iteration" or not args.check_for_nan_in_loss_and_grad,
        ),
    ),
}


def unmet_needs(args: Namespace) -> list[str]:
    """Refusals of flags without what they need.

    Args:
        args: the complete command line's.
    """
    return [
        f"{flag}: needs {need.what}; give both or neither"
        for flag, needs in _NEEDS.items()
        if _is_given(args, flag)
        for need in needs
        if not need.is_met(args)
    ]


def _is_given(args: Namespace, flag: str) -> bool:
    listed = flags_by_name()[flag]
    value: Any = getattr(args, listed.dest)
    return value is not None and value != listed.default
