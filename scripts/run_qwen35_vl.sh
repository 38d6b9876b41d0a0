#!/usr/bin/env bash
# Train Qwen3.5-VL:  [NAME=value ...] bash scripts/run_qwen35_vl.sh [flags of pretrain_multimodal.py, which win]
# Every NAME that it reads is in the table of docs/launcher.md; the architecture's numbers are in MODEL_VARIANT's Python table.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/env.sh"

note() { echo "run_qwen35_vl.sh: $*" >&2; }
die() { note "$@"; exit 2; }
counts() { for name; do [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || die "$name=${!name}: expected a number above 0"; done; }
indices() { for name; do [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$name=${!name}: expected a number"; done; }
switches() { for name; do [[ ${!name} =~ ^[01]$ ]] || die "$name=${!name}: expected 0 or 1"; done; }

# Where it runs
LAUNCHER=${LAUNCHER:-torchrun} DRY_RUN=${DRY_RUN:-0}
gpus=$(python "$root/runtime/machine.py")
GPUS_PER_NODE=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))} # ranks; without a GPU they share the cores
NNODES=${SLURM_JOB_NUM_NODES:-${NNODES:-1}} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
TP=${TP:-1} EP=${EP:-1} PP=${PP:-1} CP=${CP:-1}
counts GPUS_PER_NODE NNODES TP EP PP CP
indices NODE_RANK && switches DRY_RUN
((gpus == 0 || DRY_RUN || GPUS_PER_NODE <= gpus)) || die "GPUS_PER_NODE=$GPUS_PER_NODE: this machine shows $gpus (CUDA_VISIBLE_DEVICES)"
case $LAUNCHER in
    torchrun)
        world=$((GPUS_PER_NODE * NNODES))
        ((NODE_RANK < NNODES)) || die "NODE_RANK=$NODE_RANK: expected a number below NNODES=$NNODES"
        launch=(python "$root/scripts/agent.py" --nproc-per-node "$GPUS_PER_NODE") # torchrun, with time to save
        if ((NNODES > 1)); then
            launch+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-port "${MASTER_PORT:-6000}"
                --master-addr "${MASTER_ADDR:?has to name the first of the nodes}")
        elif [ -n "${MASTER_PORT:-}" ]; then
            launch+=(--master-port "$MASTER_PORT")
        else
            launch+=(--standalone) # any free port
        fi ;;
    python) # one process per rank, started by you or by srun
        RANK=${RANK:-${SLURM_PROCID:-0}} world=${WORLD_SIZE:-${SLURM_NTASKS:-1}}
        indices RANK && counts world
        launch=(python) # alone, it needs neither address nor port
        ((world == 1)) || launch=("RANK=$RANK" "WORLD_SIZE=$world" "LOCAL_RANK=${LOCAL_RANK:-${SLURM_LOCALID:-0}}"
            "MASTER_ADDR=${MASTER_ADDR:-localhost}" "MASTER_PORT=${MASTER_PORT:-6000}" python) ;;
    *) die "LAUNCHER=$LAUNCHER: expected torchrun or python" ;;
esac

# What it trains. Without a GPU: the small variant, minutes on a laptop.
DATASET_PROVIDER=${DATASET_PROVIDER:-receipts}
if ((gpus > 0)); then
    MODEL_VARIANT=${MODEL_VARIANT:-proxy} MBS=${MBS:-2} SEQ_LEN=${SEQ_LEN:-4096} TRAIN_ITERS=${TRAIN_ITERS:-500}
    least_gbs=16 eval_interval=500 eval_iters=10 precision=(--bf16)
else
    MODEL_VARIANT=${MODEL_VARIANT:-tiny} MBS=${MBS:-2} SEQ_LEN=${SEQ_LEN:-1024} TRAIN_ITERS=${TRAIN_ITERS:-200}
    least_gbs=2 eval_interval=10 eval_iters=4 precision=()
fi
counts MBS SEQ_LEN TRAIN_ITERS
data_ranks=$((world / (TP * PP * CP)))
step=$((MBS * (data_ranks > 0 ? data_ranks : 1)))
GBS=${GBS:-$(((least_gbs + step - 1) / step * step))} # a whole number of micro-batches on every data rank
USE_PACKED_SEQUENCE=${USE_PACKED_SEQUENCE:-1}
USE_FSDP=${USE_FSDP:-$((gpus > 0 && world > 1 && PP == 1))}
LANGUAGE_MODEL_ONLY=${LANGUAGE_MODEL_ONLY:-0}
RECOMPUTE=${RECOMPUTE:-0} RECOMPUTE_VISION=${RECOMPUTE_VISION:-0} FORCE_LOAD_BALANCING=${FORCE_LOAD_BALANCING:-0}
CKPT_LOAD=${CKPT_LOAD:-} CKPT_FORMAT=${CKPT_FORMAT:-} CKPT_RESUME=${CKPT_RESUME:-0}
CKPT_OVERRIDE_SCHEDULER=${CKPT_OVERRIDE_SCHEDULER:-0} SAVE_INTERVAL=${SAVE_INTERVAL:-500} PROFILE=${PROFILE:-0}
PROFILE_STEP_START=${PROFILE_STEP_START:-4} PROFILE_STEP_END=${PROFILE_STEP_END:-5}
counts GBS SAVE_INTERVAL && indices PROFILE_STEP_START PROFILE_STEP_END
switches LANGUAGE_MODEL_ONLY USE_PACKED_SEQUENCE USE_FSDP RECOMPUTE RECOMPUTE_VISION FORCE_LOAD_BALANCING PROFILE
switches CKPT_RESUME CKPT_OVERRIDE_SCHEDULER
for variable in NUM_LAYERS NUM_EXPERTS VISION_NUM_LAYERS KEEP_LAST; do [ -z "${!variable:-}" ] || indices "$variable"; done

load_hf=$(printf '%s\n' "$@" | sed -n '/^--load-hf$/{n;p;};s/^--load-hf=//p' | tail -n 1)
case $MODEL_VARIANT in tiny*) lr=1e-3 min_lr=1e-4 ;; *) lr=1.2e-4 min_lr=1.2e-5 ;; esac
((CKPT_RESUME)) && start=$load_hf || start=${CKPT_LOAD:-$load_hf}
if [ -n "$start" ]; then
    lr=1e-5 min_lr=1e-6
    note "fine-tuning from $start: --lr $lr --min-lr $min_lr unless you give others"
fi

layout=tp${TP}_ep${EP}_pp${PP}_cp${CP}
((USE_PACKED_SEQUENCE)) && layout+=_thd
model=${load_hf:+$(basename "$load_hf")}
EXP_NAME=${EXP_NAME:-qwen35vl_${model:-$MODEL_VARIANT}_$layout}
ROOT_DIR=${ROOT_DIR:-./outputs} OUTPUT_DIR=${OUTPUT_DIR:-${ROOT_DIR%/}/$EXP_NAME}

flags=(
    --dataset-provider "$DATASET_PROVIDER"
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP"
    --expert-model-parallel-size "$EP" --expert-tensor-parallel-size 1 --use-distributed-optimizer
    --micro-batch-size "$MBS" --global-batch-size "$GBS" --seq-length "$SEQ_LEN" --train-iters "$TRAIN_ITERS"
    --lr "$lr" --min-lr "$min_lr" --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS / 20))
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 "${precision[@]}"
    --manual-gc --manual-gc-interval 50
    --eval-interval "$eval_interval" --eval-iters "$eval_iters" --log-interval 1 --logging-level 30
    --save "$OUTPUT_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --tensorboard-dir "${TENSORBOARD_LOGS_PATH:-$OUTPUT_DIR/tensorboard}"
    --log-timers-to-tensorboard --log-params-norm
)
# A folder names the architecture instead of a variant.
[[ " $* " =~ " --"(hf-config|load-hf)[=\ ] ]] || flags+=(--model-variant "$MODEL_VARIANT")
((TP > 1)) && flags+=(--sequence-parallel)
((USE_PACKED_SEQUENCE)) && flags+=(--use-packed-sequence)
[ -z "${NUM_LAYERS:-}" ] || flags+=(--num-layers "$NUM_LAYERS")
[ -z "${NUM_EXPERTS:-}" ] || flags+=(--num-experts "$NUM_EXPERTS")
[ -z "${VISION_NUM_LAYERS:-}" ] || flags+=(--vision-num-layers "$VISION_NUM_LAYERS")
processor=${HF_PROCESSOR_PATH:-${TOKENIZER_MODEL:-}} # a processor's folder has its tokenizer
[ -z "$processor" ] || flags+=(--hf-processor-path "$processor")
((FORCE_LOAD_BALANCING)) && flags+=(--moe-router-force-load-balancing)
((RECOMPUTE)) && flags+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
((LANGUAGE_MODEL_ONLY)) && flags+=(--language-model-only)
((RECOMPUTE_VISION)) && flags+=(--recompute-vision)
((USE_FSDP)) && flags+=(--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params
    --ckpt-format fsdp_dtensor)
[ -z "$CKPT_FORMAT" ] || flags+=(--ckpt-format "$CKPT_FORMAT")
[ -z "${KEEP_LAST:-}" ] || flags+=(--keep-last "$KEEP_LAST")
((CKPT_RESUME)) && flags+=(--load "${CKPT_LOAD:-$OUTPUT_DIR/checkpoints}")
[ -z "$CKPT_LOAD" ] || flags+=(--exit-on-missing-checkpoint)
[ -z "$CKPT_LOAD" ] || ((CKPT_RESUME)) || flags+=(--load "$CKPT_LOAD" --finetune --no-load-optim --no-load-rng)
((CKPT_OVERRIDE_SCHEDULER)) && flags+=(--override-opt-param-scheduler)
[ -z "${WANDB_PROJECT:-}" ] || flags+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "$EXP_NAME"
    --wandb-save-dir "$OUTPUT_DIR")
profiler=()
if ((PROFILE)); then
    read -ra ranks <<<"${PROFILE_RANKS:-0}"
    flags+=(--profile --profile-step-start "$PROFILE_STEP_START" --profile-step-end "$PROFILE_STEP_END"
        --profile-ranks "${ranks[@]}")
    if ((gpus > 0)) && command -v nsys >/dev/null; then
        profiler=(nsys profile --trace=cuda,nvtx,cublas,cudnn --sample=none --capture-range=cudaProfilerApi
            --capture-range-end=stop --force-overwrite=true -o "$OUTPUT_DIR/nsys")
    else
        flags+=(--use-pytorch-profiler) # a trace beside the TensorBoard events
    fi
fi

# TP and CP order their communication by having one connection; FSDP refuses that.
environment=(env CUDA_DEVICE_MAX_CONNECTIONS=1)
((USE_FSDP)) && environment=(env -u CUDA_DEVICE_MAX_CONNECTIONS)
threads=$((gpus > 0 || $(nproc) < GPUS_PER_NODE ? 1 : $(nproc) / GPUS_PER_NODE))
environment+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}" TOKENIZERS_PARALLELISM=false
    "SAVE_SECONDS=${SAVE_SECONDS:-}" "PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}")

"${environment[@]}" WORLD_SIZE="$world" RANK="${RANK:-$NODE_RANK}" python "$root/arguments.py" "${flags[@]}" "$@"
[[ " $* " =~ " "(-h|--help)" " ]] && exit # it has been shown
command=("${profiler[@]}" "${environment[@]}" "${launch[@]}" "$root/pretrain_multimodal.py" "${flags[@]}" "$@")
if ((DRY_RUN)); then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$OUTPUT_DIR"
exec "${command[@]}" > >(trap '' TERM; exec tee -ia "$OUTPUT_DIR/log-$NODE_RANK.txt") 2>&1 # Slurm signals tee as well
