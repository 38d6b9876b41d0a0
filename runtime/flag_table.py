"""What every Megatron flag does here: the one table, from which the preflight refuses and docs/flags.md is written.

A flag that isn't named below is untested: it reaches Megatron as it is, and a notice says so. "No effect" means that no
code that this program reaches reads the value; a value that is only copied into a configuration has none.
`tests/test_flag_table.py` compares names with Megatron's parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from runtime.megatron_flags import megatron_flags

DOCUMENT = Path(__file__).parents[1] / "docs/flags.md"


class Effect(Enum):
    WORKS = "works"
    REFUSED = "refused"
    NONE = "no effect"
    UNTESTED = "untested"


@dataclass(frozen=True)
class Entry:
    """effect, and for flags that are refused or have none, why and what to do instead."""

    effect: Effect
    reason: str = ""


# Flags that a training of a test, a proof, a benchmark or the launcher runs with, or every run of an architecture:
# `tests/test_flag_table.py` looks for each of them there.
_WORKS = """
--tensor-model-parallel-size --pipeline-model-parallel-size --sequence-parallel --context-parallel-size
--expert-model-parallel-size --expert-tensor-parallel-size --decoder-first-pipeline-num-layers
--decoder-last-pipeline-num-layers --num-virtual-stages-per-pipeline-rank --cp-comm-type
--use-distributed-optimizer --use-megatron-fsdp --data-parallel-sharding-strategy
--megatron-fsdp-main-grads-dtype --init-model-with-meta-device --distributed-timeout-minutes
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups --kv-channels
--group-query-attention --max-position-embeddings --position-embedding-type --rotary-base --rotary-percent
--mrope-section --normalization --norm-epsilon --apply-layernorm-1p --qk-layernorm --attention-output-gate --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout --hidden-dropout --init-method-std
--experimental-attention-variant --linear-attention-freq --linear-conv-kernel-dim --linear-key-head-dim
--linear-value-head-dim --linear-num-key-heads --linear-num-value-heads --mtp-num-layers --mtp-loss-scaling-factor
--vocab-size --padded-vocab-size --num-experts --moe-router-topk --moe-ffn-hidden-size
--moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-router-load-balancing-type
--moe-aux-loss-coeff --moe-router-score-function --moe-router-enable-expert-bias
--moe-router-dtype --moe-router-force-load-balancing --moe-token-dispatcher-type
--moe-grouped-gemm --moe-permute-fusion --moe-router-fusion
--transformer-impl --attention-backend --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-rope-fusion --no-initialization --bf16
--recompute-granularity --recompute-method --recompute-num-layers --recompute-modules
--micro-batch-size --global-batch-size --seq-length --train-iters --seed --num-workers --dataloader-type
--tokenizer-type --split --data-cache-path --calculate-per-token-loss --rerun-mode --manual-gc --manual-gc-interval
--no-check-for-nan-in-loss-and-grad
--exit-interval
--optimizer --lr --min-lr --lr-decay-style --lr-decay-iters --lr-warmup-iters --weight-decay --clip-grad
--adam-beta1 --adam-beta2 --adam-eps --sgd-momentum
--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler
--eval-iters --eval-interval
--save --save-interval --load --finetune --ckpt-step --ckpt-format --exit-on-missing-checkpoint
--pretrained-checkpoint --async-save --async-strategy --use-persistent-ckpt-worker
--dist-ckpt-optim-fully-reshardable --no-save-optim --no-load-optim --no-load-rng
--log-interval --log-params-norm --log-timers-to-tensorboard --log-memory-to-tensorboard --tensorboard-dir
--logging-level --wandb-project --wandb-exp-name --wandb-save-dir --no-one-logger
--profile --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler
"""

# Reason -> flags. What they ask for isn't built, comes out wrong, or ends in an error of Megatron's.
_REFUSED = {
    "flags come from the command line; --model-variant or --hf-config gives the architecture": "--yaml-cfg",
    "the architecture comes from --model-variant, --hf-config or --load-hf": (
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args --spec"
    ),
    "layers are placed by --linear-attention-freq": (
        "--hybrid-layer-pattern --hybrid-override-pattern --is-hybrid-model --mtp-hybrid-override-pattern "
        "--moe-layer-freq"
    ),
    "all layers have one shape": ("--heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json"),
    "attention is grouped-query": (
        "--multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
        "--cache-mla-latents --mla-down-proj-fusion --qk-clip --qk-clip-alpha --qk-clip-threshold"
    ),
    "use --context-parallel-size": "--hybrid-context-parallel --max-seqlen-per-dp-cp-rank",
    "use --use-megatron-fsdp": "--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward",
    "a step's packs are planned at one --global-batch-size; give that": (
        "--rampup-batch-size --step-batch-size-schedule --decrease-batch-size-if-needed"
    ),
    "the schedule is counted in iterations; use --train-iters": "--train-samples",
    "the schedule is counted in iterations; use --lr-warmup-iters": "--lr-warmup-samples --lr-warmup-fraction",
    "the schedule is counted in iterations; use --lr-decay-iters": "--lr-decay-samples --lr-wsd-decay-samples",
    "the output layer and its loss are one operation, in float32": (
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl --fp16-lm-cross-entropy "
        "--defer-embedding-wgrad-compute --wgrad-deferral-limit"
    ),
    "--freeze names what isn't trained": "--freeze-all-layers",
    "the output layer's logits aren't scaled": (
        "--use-mup --mup-width-mult --mup-embedding-mult --mup-output-mult --mup-base-hidden-size "
        "--mup-base-head-dim --mup-attn-scale-power"
    ),
    "the optimizer would keep A_log, which is float32, out of the copies on the host": (
        "--optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload "
        "--overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params"
    ),
    "evaluation takes --eval-iters batches of each split": ("--multiple-validation-sets --validation-set-names"),
    "the loader's order is planned, so a step can't be left out; remove the samples from the data": (
        "--iterations-to-skip"
    ),
    "the decoder's rotary embedding is the architecture's; give --rotary-base or --rotary-percent": (
        "--use-rope-scaling --rope-scaling-factor --rotary-seq-len-interpolation-factor --rotary-interleaved "
        "--rope-type --no-rope-freq --use-rotary-position-embeddings --no-position-embedding "
        "--rotary-scaling-factor --mscale --mscale-all-dim --yarn-original-max-position-embeddings "
        "--yarn-beta-fast --yarn-beta-slow --yarn-correction-range-round-to-int "
        "--no-yarn-correction-range-round-to-int --relative-attention-num-buckets --relative-attention-max-distance"
    ),
    "the activation is the architecture's SwiGLU": (
        "--squared-relu --quick-geglu --openai-gelu --glu-linear-offset --activation-func-clamp-value "
        "--use-te-activation-func --use-fused-weighted-squared-relu"
    ),
    "attention's norms, biases and softmax are the architecture's": (
        "--qk-l2-norm --add-qkv-bias --softmax-type --apply-query-key-layer-scaling"
    ),
    "experts see the whole hidden state": "--moe-latent-size",
    "weights are cut by --tensor-model-parallel-size": (
        "--tensor-parallel-num-weight-shards --expert-tensor-parallel-num-weight-shards"
    ),
    "the pinned Megatron passes it on to a configuration that doesn't know it; use --init-method-std": (
        "--init-method-xavier-uniform"
    ),
    "a checkpoint is read as it was written; weights of another model come by --load-hf": (
        "--moe-use-upcycling --moe-upcycling-granularity --ckpt-convert-format --ckpt-convert-save "
        "--ckpt-convert-update-legacy-dist-opt-format"
    ),
    "checkpoints go to --save alone": (
        "--non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir "
        "--non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication --replication-jump "
        "--replication-factor --enable-msc"
    ),
    "gradients are added up in float32 in any case": "--ddp-param-name-patterns-for-fp32-local-accumulation",
    "there is no distillation here": (
        "--logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir --logits-save-dtype "
        "--logits-load-dir"
    ),
    "of an older Megatron; use --cuda-graph-impl and --cuda-graph-modules": (
        "--cuda-graph-scope --enable-cuda-graph --external-cuda-graph"
    ),
    "ranks would exchange nothing, so that every figure would be wrong": "--fake-process-group",
    "the process groups would never be made": "--lazy-mpu-init",
    "SIGTERM saves and ends a run without it, and CKPT_RESUME=1 goes on": (
        "--adlr-autoresume --adlr-autoresume-interval --exit-signal-handler-for-training"
    ),
    "only a program that wraps pretrain() is restarted in its process; torchrun's --max-restarts restarts ranks": (
        "--inprocess-restart"
    ),
    "there is no reinforcement learning here": "--perform-rl-step --refit-method",
    "of Megatron-LM's inference; scripts/generate.py answers": "--inference-rng-tracker",
    "attention sees the whole document": "--window-size --window-attn-skip-freq",
    "the pinned parser has it for old command lines alone and refuses it; use --micro-batch-size": "--batch-size",
    "the pinned parser has it for old command lines alone and refuses it; use --lr-warmup-iters": "--warmup",
    "the pinned parser has it for old command lines alone and refuses it; use --tensor-model-parallel-size": (
        "--model-parallel-size"
    ),
    "the pinned parser has it for old command lines alone and refuses it; use --recompute-granularity": (
        "--checkpoint-activations"
    ),
}

# Reason -> flags that no code reads which this program reaches.
_NO_EFFECT = {
    "data comes from --dataset-provider": (
        "--mock-data --data-path --train-data-path --valid-data-path --test-data-path --data-args-path "
        "--per-split-data-args-path --per-dataset-sequences-path --no-mmap-bin-files "
        "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --dataloader-inter-document-masking "
        "--no-create-attention-mask-in-dataloader --num-dataset-builder-threads --object-storage-cache-path "
        "--mid-level-dataset-surplus --allow-ambiguous-pad-tokens --reset-position-ids --reset-attention-mask "
        "--eod-mask-loss --mask-prob --short-seq-prob --sample-rate --phase-transition-iterations --sft "
        "--sft-tokenizer-prompt-format --fim-data --fim-rate --fim-spm-rate --fim-split-sample --fim-fragment-rate "
        "--fim-no-prefix --fim-prefix-token --fim-middle-token --fim-suffix-token --fim-pad-token --fim-eod-token"
    ),
    "ids come from --hf-processor-path": (
        "--vocab-file --merge-file --vocab-extra-ids --tokenizer-model --tokenizer-metadata "
        "--tokenizer-special-tokens --tiktoken-pattern --tiktoken-num-special-tokens --chat-template "
        "--tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces "
        "--tokenizer-hf-no-use-fast --tokenizer-hf-no-include-special-tokens --trust-remote-code "
        "--null-tokenizer-eod-id --null-tokenizer-pad-id --no-use-tokenizer-model-from-checkpoint-args"
    ),
    "the embedding has the architecture's rows (--padded-vocab-size)": (
        "--no-pad-vocab-size --make-vocab-size-divisible-by"
    ),
    "of an encoder-decoder, BERT, retrieval or vision program of Megatron-LM": (
        "--encoder-num-layers --decoder-num-layers --encoder-seq-length --decoder-seq-length "
        "--bert-no-binary-head --ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model "
        "--ict-load --bert-load --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path "
        "--retriever-report-topk-accuracies --retriever-score-scaling --block-data-path --embedding-path "
        "--indexer-batch-size --indexer-log-interval --num-classes --img-h --img-w --num-channels --patch-dim "
        "--classes-fraction --data-per-class-fraction --no-data-sharding --head-lr-mult --vision-pretraining "
        "--vision-pretraining-type --vision-backbone-type --swin-backbone-type --mask-type --mask-factor "
        "--iter-per-epoch --dino-local-img-size --dino-local-crops-number --dino-head-hidden-size "
        "--dino-bottleneck-size --dino-freeze-last-layer --dino-norm-last-layer --dino-warmup-teacher-temp "
        "--dino-teacher-temp --dino-warmup-teacher-temp-epochs --output-bert-embeddings --bert-embedder-type"
    ),
    "of sparse attention (DSA), which Qwen3.5-VL hasn't": (
        "--dsa-indexer-n-heads --dsa-indexer-head-dim --dsa-indexer-topk --dsa-indexer-use-sparse-loss "
        "--dsa-kernel-backend --dsa-indexer-rope-interleaved --no-dsa-indexer-rotate-activation "
        "--no-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32 "
        "--dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset --dsa-indexer-loss-coeff"
    ),
    "of Mamba layers, which Qwen3.5-VL hasn't": (
        "--mamba-state-dim --mamba-head-dim --mamba-num-groups --mamba-num-heads --disable-mamba-mem-eff-path "
        "--mamba-training-ssm-states-dtype --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype"
    ),
    "of Megatron-LM's inference; scripts/generate.py answers": (
        "--max-tokens-to-oom --flash-decode --use-legacy-static-engine --decode-only-cuda-graphs "
        "--enable-chunked-prefill --use-same-sampling-seed-across-dp-ranks --nccl-all-reduce-for-prefill "
        "--mlp-chunks-for-prefill --moe-pad-experts-for-cuda-graph-inference --num-speculative-tokens"
    ),
    "only a handler of the whole process exists": "--exit-signal-handler-for-dataloader",
    "NVIDIA's one-logger is off": (
        "--one-logger-project --one-logger-run-name --one-logger-async --app-tag-run-name --app-tag-run-version"
    ),
    "of layers that only Megatron-LM's own --spec builds": (
        "--use-grouped-gemm-for-dense-mlp --use-kitchen-attention --kitchen-attention-backend"
    ),
    "no reached code reads it": (
        "--onnx-safe --check-for-spiky-loss --apply-residual-connection-post-layernorm "
        "--dist-ckpt-save-pre-mcore-014 --enable-full-sharding-in-hsdp --logits-load-decode-threads "
        "--logits-load-prefetch-factor --logits-load-msc-prefetch-depth "
        "--logits-load-kd-loss-alpha --logits-load-ignore-errors --te-precision-config-file"
    ),
}
_NO_EFFECT_BY_PREFIX = {
    "--rl-": "of Megatron-LM's reinforcement learning",
    "--grpo-": "of Megatron-LM's reinforcement learning",
    "--langrl-": "of Megatron-LM's reinforcement learning",
    "--inference-": "of Megatron-LM's inference; scripts/generate.py answers",
    "--inprocess-": "of restarts in the process, which this program hasn't",
    "--muon-": "--optimizer is adam or sgd",
    "--lion-": "--optimizer is adam or sgd",
}
# What they ask for is so already, or is nothing: accepted without a word.
_HARMLESS = """
--use-mcore-models --use-flash-attn --use-dist-ckpt --dist-ckpt-format --ckpt-fully-parallel-save --disable-msc
--exit-signal-handler --attention-softmax-in-fp32
"""


def _by_flag(groups: Mapping[str, str], effect: Effect) -> dict[str, Entry]:
    return {flag: Entry(effect, reason) for reason, flags in groups.items() for flag in flags.split()}


@cache
def flag_table() -> Mapping[str, Entry]:
    """Every flag of Megatron's by its usual spelling."""
    named = {
        **{flag: Entry(Effect.WORKS) for flag in _WORKS.split()},
        **{flag: Entry(Effect.NONE) for flag in _HARMLESS.split()},
        **_by_flag(_REFUSED, Effect.REFUSED),
        **_by_flag(_NO_EFFECT, Effect.NONE),
    }
    table = {}
    for flag in (flag.names[0] for flag in megatron_flags()):
        prefixed = (reason for prefix, reason in _NO_EFFECT_BY_PREFIX.items() if flag.startswith(prefix))
        reason = next(prefixed, None)
        table[flag] = named.get(flag) or (Entry(Effect.UNTESTED) if reason is None else Entry(Effect.NONE, reason))
    return table


def named_flags() -> list[str]:
    """Every name that the table's groups spell out, repeated where two groups have it: for the test."""
    groups = (_WORKS, _HARMLESS, *_REFUSED.values(), *_NO_EFFECT.values())
    return [flag for group in groups for flag in group.split()]


def given_flags(words: Iterable[str]) -> list[str]:
    """Megatron's flags among the words of a command line, by their usual spelling, each once."""
    usual = {name: flag.names[0] for flag in megatron_flags() for name in flag.names}
    found = (word.split("=", 1)[0] for word in words)
    return list(dict.fromkeys(usual[name] for name in found if name in usual))


def refused_flags(words: Iterable[str]) -> list[str]:
    """Refusals of flags that aren't built or do nothing, each with the reason."""
    table = flag_table()
    verbs = {Effect.REFUSED: "not supported", Effect.NONE: "has no effect here"}
    return [
        f"{flag}: {verbs[entry.effect]}; {entry.reason}"
        for flag in given_flags(words)
        for entry in [table[flag]]
        if entry.reason
    ]


def untested_flags(words: Iterable[str]) -> list[str]:
    """Flags that no test of this repository runs with."""
    table = flag_table()
    return [flag for flag in given_flags(words) if table[flag].effect is Effect.UNTESTED]


def markdown() -> str:
    """docs/flags.md."""
    table = flag_table()
    counts = {effect: sum(entry.effect is effect for entry in table.values()) for effect in Effect}
    lines = [
        "# Megatron's flags",
        "",
        "Written by `python scripts/list_flags.py --rewrite` from `runtime/flag_table.py` and the pinned Megatron.",
        "",
        "One that is refused or has no effect ends the preflight with the reason; one that has no effect and no reason "
        "is accepted. An untested one reaches Megatron as it is, with a notice.",
        "",
        "| effect | flags |",
        "| --- | --- |",
        *(f"| {effect.value} | {count} |" for effect, count in counts.items()),
        "",
        "| flag | effect | why |",
        "| --- | --- | --- |",
        *(f"| `{flag}` | {entry.effect.value} | {entry.reason} |" for flag, entry in table.items()),
    ]
    return "\n".join(lines) + "\n"
