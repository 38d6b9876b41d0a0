"""scripts/run_qwen35_vl.sh as users run it, with DRY_RUN=1: its command lines parse, its refusals are clear."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import arguments
from models.qwen35_vl.configuration import VARIANTS
from runtime.checkpoints import TRACKER
from tests.small_checkpoint import write

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/run_qwen35_vl.sh"
AGENT = str(ROOT / "scripts/agent.py")
FAKE_DRIVER = "int cuInit(unsigned f) { return 0; } int cuDeviceGetCount(int *n) { *n = 2; return 0; }"

SLOW_TO_BUILD = ("35b_a3b", "122b_a10b", "397b_a17b")  # 10,000 experts and more, each a module


def launch(
    *flags: str, library_path: Path | None = None, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the launcher dry in a clean environment."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/"),
        "SKIP_ENV": "1",
        "DRY_RUN": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    if library_path is not None:
        del environment["CUDA_VISIBLE_DEVICES"]
        environment["LD_LIBRARY_PATH"] = str(library_path)
    command = ["bash", str(SCRIPT), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def command_of(run: subprocess.CompletedProcess[str]) -> tuple[list[str], list[str]]:
    """(what starts the ranks, the flags of pretrain_multimodal.py) of a dry run."""
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1
    words = shlex.split(run.stdout)
    entry = words.index(str(ROOT / "pretrain_multimodal.py"))
    return words[:entry], words[entry + 1 :]


def value(flags: list[str], flag: str) -> str:
    """The last value of a flag, the one that counts."""
    return flags[len(flags) - flags[::-1].index(flag)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_parses(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    _, flags = command_of(launch(MODEL_VARIANT=variant))
    args = arguments.resolve(arguments.preflight_or_exit(flags))
    assert VARIANTS[variant].with_flags(args) == VARIANTS[variant]
    architecture = {word for word in VARIANTS[variant].to_flags() if word.startswith("--")}
    assert not set(flags) & architecture  # no number of it in the script


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_BUILD else name for name in VARIANTS]
)
def test_every_variant_builds(variant: str, single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the launcher's command line, on the meta device."""
    from pretrain_multimodal import model_provider

    monkeypatch.setenv("WORLD_SIZE", "1")
    _, flags = command_of(launch("--init-model-with-meta-device", MODEL_VARIANT=variant, USE_FSDP="1"))
    command_line = arguments.preflight_or_exit(flags)
    model = model_provider(command_line.spec, command_line.config, arguments.resolve(command_line))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.language_model.decoder.layers) == VARIANTS[variant].num_layers


def test_defaults_without_a_gpu() -> None:
    start, flags = command_of(launch())
    assert start[start.index("python") :] == ["python", AGENT, "--nproc-per-node", "1", "--standalone"]
    assert f"OMP_NUM_THREADS={os.cpu_count()}" in start and "CUDA_DEVICE_MAX_CONNECTIONS=1" in start
    assert value(flags, "--model-variant") == "tiny" and value(flags, "--dataset-provider") == "receipts"
    assert value(flags, "--train-iters") == "200" and value(flags, "--save").startswith("./outputs/")
    assert "--use-packed-sequence" in flags and "--use-distributed-optimizer" in flags
    assert not {"--bf16", "--use-megatron-fsdp", "--load", "--wandb-project", "--sequence-parallel"} & set(flags)


def test_defaults_with_gpus(tmp_path: Path) -> None:
    """A driver that claims two GPUs."""
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    library = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"]
    subprocess.run(library, check=True)
    start, flags = command_of(launch("--allow-slow-kernels", library_path=tmp_path))
    assert start[start.index(AGENT) + 1 : start.index(AGENT) + 3] == ["--nproc-per-node", "2"]
    assert value(flags, "--model-variant") == "proxy" and "--bf16" in flags
    assert value(flags, "--ckpt-format") == "fsdp_dtensor" and "--use-megatron-fsdp" in flags
    assert value(flags, "--data-parallel-sharding-strategy") == "optim_grads_params"
    assert start[1:3] == ["-u", "CUDA_DEVICE_MAX_CONNECTIONS"]  # FSDP refuses 1
    refused = launch(library_path=tmp_path, GPUS_PER_NODE="3", DRY_RUN="0")
    assert refused.returncode == 2 and "GPUS_PER_NODE=3: this machine shows 2" in refused.stderr
    for variables in ({"USE_FSDP": "0"}, {"GPUS_PER_NODE": "1"}, {"PP": "2"}):
        start, flags = command_of(launch("--allow-slow-kernels", library_path=tmp_path, **variables))
        assert "--use-megatron-fsdp" not in flags and "CUDA_DEVICE_MAX_CONNECTIONS=1" in start


# variables, the flags that they become (in order)
SAVED = "A FOLDER OF CHECKPOINTS"  # the fixture's stands in its place
SETTINGS = {
    "layout": (
        {"GPUS_PER_NODE": "4", "TP": "2", "CP": "2"},
        "--tensor-model-parallel-size 2 --context-parallel-size 2 --sequence-parallel",
    ),
    "pipeline": ({"GPUS_PER_NODE": "2", "PP": "2"}, "--pipeline-model-parallel-size 2"),
    "experts": (
        {"MODEL_VARIANT": "tiny_moe", "EP": "2", "GPUS_PER_NODE": "2", "FORCE_LOAD_BALANCING": "1"},
        "--expert-model-parallel-size 2 --moe-router-force-load-balancing",
    ),
    "batch": (
        {"MBS": "3", "GBS": "9", "SEQ_LEN": "777", "TRAIN_ITERS": "40"},
        "--micro-batch-size 3 --global-batch-size 9 --seq-length 777 --train-iters 40 --lr-warmup-iters 2",
    ),
    "architecture": (
        {"NUM_LAYERS": "8", "NUM_EXPERTS": "0", "VISION_NUM_LAYERS": "1", "MODEL_VARIANT": "proxy"},
        "--model-variant proxy --num-layers 8 --num-experts 0 --vision-num-layers 1",
    ),
    "recompute": (
        {"RECOMPUTE": "1", "RECOMPUTE_VISION": "1"},
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --recompute-vision",
    ),
    "data": (
        {"DATASET_PROVIDER": "cord_v2", "HF_PROCESSOR_PATH": "Qwen/Qwen3.5-9B"},
        "--dataset-provider cord_v2 --hf-processor-path Qwen/Qwen3.5-9B",
    ),
    "tokenizer": ({"TOKENIZER_MODEL": "Qwen/Qwen3.5-9B"}, "--hf-processor-path Qwen/Qwen3.5-9B"),
    "fine-tuning": (
        {"CKPT_LOAD": SAVED, "CKPT_FORMAT": "torch_dist"},
        f"--lr 1e-5 --min-lr 1e-6 --ckpt-format torch_dist --exit-on-missing-checkpoint --load {SAVED} --finetune "
        "--no-load-optim --no-load-rng",
    ),
    "resuming": (
        {"CKPT_LOAD": SAVED, "CKPT_RESUME": "1", "CKPT_OVERRIDE_SCHEDULER": "1"},
        f"--lr 1e-3 --load {SAVED} --exit-on-missing-checkpoint --override-opt-param-scheduler",
    ),
    "resuming its own": ({"CKPT_RESUME": "1", "OUTPUT_DIR": "/tmp/run"}, "--load /tmp/run/checkpoints"),
    "profile": (
        {"PROFILE": "1", "PROFILE_STEP_START": "7", "PROFILE_STEP_END": "9", "PROFILE_RANKS": "0 2"},
        "--profile --profile-step-start 7 --profile-step-end 9 --profile-ranks 0 2 --use-pytorch-profiler",
    ),
    "output": (
        {"OUTPUT_DIR": "/tmp/a run", "SAVE_INTERVAL": "7"},
        "--save '/tmp/a run/checkpoints' --save-interval 7 --tensorboard-dir '/tmp/a run/tensorboard'",
    ),
    "names": (
        {"ROOT_DIR": "/tmp/runs/", "EXP_NAME": "first", "TENSORBOARD_LOGS_PATH": "/tmp/events"},
        "--save /tmp/runs/first/checkpoints --tensorboard-dir /tmp/events",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    write(folder, 2)
    (folder / TRACKER).write_text("2")
    return str(folder)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_become_flags(case: str, saved: str) -> None:
    variables, expected = SETTINGS[case]
    _, flags = command_of(launch(**{name: value.replace(SAVED, saved) for name, value in variables.items()}))
    rest = iter(flags)
    for word in shlex.split(expected.replace(SAVED, saved)):
        assert word in rest, f"{word} is missing, or not where it was expected"


def test_users_flags_come_last_and_keep_their_words() -> None:
    _, flags = command_of(launch("--lr", "3e-4", "--dataset-path", "a folder/with 'quotes'"))
    assert flags[-4:] == ["--lr", "3e-4", "--dataset-path", "a folder/with 'quotes'"]


def test_hf_config_replaces_the_variant(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["tiny"].to_hf()))
    for flags in (["--hf-config", str(tmp_path)], [f"--hf-config={tmp_path}"]):
        assert "--model-variant" not in command_of(launch(*flags))[1]


def test_global_batch_follows_the_ranks() -> None:
    _, flags = command_of(launch(GPUS_PER_NODE="3", MBS="2"))
    assert value(flags, "--global-batch-size") == "6"


def test_several_nodes() -> None:
    start, _ = command_of(launch(NNODES="2", NODE_RANK="1", MASTER_ADDR="first", GPUS_PER_NODE="4"))
    assert shlex.join(start).endswith(
        f"python {AGENT} --nproc-per-node 4 --nnodes 2 --node-rank 1 --master-port 6000 --master-addr first"
    )
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "MASTER_PORT": "7000", "MASTER_ADDR": "first"}
    start, _ = command_of(launch(**slurm))
    assert "--nnodes 2 --node-rank 1 --master-port 7000" in shlex.join(start)


def test_python_launcher_takes_ranks_from_slurm() -> None:
    start, _ = command_of(launch(LAUNCHER="python"))
    assert start[-1] == "python" and not any(word.startswith("MASTER_") for word in start)
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "first"}
    start, _ = command_of(launch(LAUNCHER="python", **slurm))
    assert {"RANK=3", "WORLD_SIZE=4", "LOCAL_RANK=1", "MASTER_ADDR=first"} <= set(start)


REFUSED = {
    "not a number": ({"TP": "abc"}, "TP=abc: expected a number above 0"),
    "zero": ({"GBS": "0"}, "GBS=0: expected a number above 0"),
    "arithmetic": ({"MBS": "a[$(exit)]"}, "MBS=a[$(exit)]: expected a number above 0"),
    "number beyond arithmetic": ({"TP": "18446744073709551617"}, "TP=18446744073709551617: expected a number above 0"),
    "experts": ({"NUM_EXPERTS": "-1"}, "NUM_EXPERTS=-1: expected a number"),
    "switch": ({"USE_FSDP": "yes"}, "USE_FSDP=yes: expected 0 or 1"),
    "launcher": ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: expected torchrun or python"),
    "nodes": ({"NNODES": "2"}, "MASTER_ADDR"),
    "layout": ({"TP": "2", "GPUS_PER_NODE": "3"}, "--tensor-model-parallel-size 2"),
    "variant": ({"MODEL_VARIANT": "tinny"}, "did you mean tiny?"),
    "checkpoint": ({"CKPT_LOAD": "/nowhere"}, "--load /nowhere"),
    "folder without a checkpoint": ({"CKPT_LOAD": str(ROOT)}, f"--load {ROOT}: no checkpoint in it (CKPT_LOAD)"),
    "port": ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: expected a number from 1 to 65535"),
    "port's range": ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected a number from 1 to 65535"),
    "node": (
        {"NODE_RANK": "5", "NNODES": "2", "MASTER_ADDR": "first"},
        "NODE_RANK=5: expected a number below NNODES=2",
    ),
    "node alone": ({"NODE_RANK": "1"}, "NODE_RANK=1: expected a number below NNODES=1"),
    "rank": ({"LAUNCHER": "python", "RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected a number from 0 to 1"),
    "local rank": ({"LAUNCHER": "python", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a number"),
    "threads": ({"OMP_NUM_THREADS": "abc"}, "OMP_NUM_THREADS=abc: expected a number from 1 on"),
    "no threads": ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS=0: expected a number from 1 on"),
    "format": ({"CKPT_FORMAT": "torch_dst"}, "argument --ckpt-format: invalid choice: 'torch_dst'"),
    "output": ({"OUTPUT_DIR": f"{SCRIPT}/run"}, f"--save {SCRIPT}/run/checkpoints: {SCRIPT} is a file"),
    "read-only output": ({"OUTPUT_DIR": "/proc/run"}, "--save /proc/run/checkpoints: /proc can't be written"),
    "events": ({"TENSORBOARD_LOGS_PATH": str(SCRIPT)}, f"--tensorboard-dir {SCRIPT}: {SCRIPT} is a file"),
    "time to save": ({"SAVE_SECONDS": "1e3"}, "SAVE_SECONDS=1e3: expected a number from 1 on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    variables, message = REFUSED[case]
    run = launch(**variables)
    assert run.returncode != 0 and run.stdout == ""
    assert message in run.stderr and "Traceback" not in run.stderr


def test_help_starts_nothing() -> None:
    run = launch("--help", DRY_RUN="0")
    assert run.returncode == 0 and "--dataset-provider" in run.stdout and "torchrun" not in run.stdout


def test_fine_tuning_says_its_learning_rate(saved: str) -> None:
    assert "--lr 1e-5" in launch(CKPT_LOAD=saved).stderr


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    assert launch(cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_script_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 150
