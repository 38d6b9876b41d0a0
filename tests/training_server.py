"""Trains through pretrain_multimodal.py in forked processes: megatron is imported once, which takes longer than a run.

    python tests/training_server.py     reads a job per line, answers with the ranks' exit codes: see `Job`

`TrainingServer` starts it and talks to it. Every rank records each step in full precision: see `Step`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]

# What a run imports in the course of it.
IMPORTS = (
    *("torch.utils.tensorboard", "transformers", "megatron.training.training"),
    *("pretrain_multimodal", "forward_step", "data.loader", "models.qwen35_vl.model", "runtime.outputs"),
)
# A tiny model that has everything: GatedDeltaNet, attention, MTP, ViT, images, packed documents.
FLAGS = (
    *("--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4"),
    *("--use-packed-sequence", "--seq-length", "128", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2"),
    *("--lr-decay-iters", "40", "--clip-grad", "1.0"),
    *("--use-distributed-optimizer", "--num-workers", "0", "--log-interval", "1"),
    *("--eval-interval", "1000", "--eval-iters", "0"),
    *("--distributed-timeout-minutes", "2", "--logging-level", "30"),
)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        out: folder for what the ranks print (`rank0.log`) and record (`rank0.jsonl`); both grow with every job there.
        flags: of pretrain_multimodal.py, besides FLAGS.
        ranks: processes.
        kill_after: SIGKILL all of them this many seconds after the first step has begun; None: never.
        terminate_after: SIGTERM to all of them and their children, as torchrun and Slurm send it, this many seconds
            after the first step has begun; None: never.
        kill_at: SIGKILL all of them just before rank 0 changes the file system under `--save` for the n-th time.
        file_bytes: no file may become longer (RLIMIT_FSIZE): writing fails there as on a full disk.
        timeout: seconds until all ranks are killed and the job counts as hanging.
    """

    out: str
    flags: tuple[str, ...]
    ranks: int = 1
    kill_after: float | None = None
    terminate_after: float | None = None
    kill_at: int | None = None
    file_bytes: int | None = None
    timeout: float = 240.0


@dataclass(frozen=True)
class Step:
    """What a rank did in one iteration; numbers as `float.hex`, the rest as digests.

    `state`: parameters, optimizer and random generator after the step.
    """

    iteration: int
    losses: dict[str, str]
    grad_norm: str
    samples: list[str]
    state: str


@dataclass
class Result:
    """How a job ended: exit codes by rank, None for a job that was killed as told."""

    job: Job
    codes: list[int | None] = field(default_factory=list)

    def log(self, rank: int = 0) -> str:
        return (Path(self.job.out) / f"rank{rank}.log").read_text(errors="replace")

    def steps(self, rank: int = 0) -> list[Step]:
        return read_steps(Path(self.job.out), rank)


def read_steps(out: Path, rank: int = 0) -> list[Step]:
    path = out / f"rank{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Step(**json.loads(line)) for line in lines]


class TrainingServer:
    """A process that has imported megatron and trains by forking."""

    def __init__(self) -> None:
        settings = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        server = cls()
        try:
            yield server
        finally:
            server._process.stdin.close()
            server._process.wait(timeout=60)

    def run(self, job: Job) -> Result:
        """Train to the end, however it comes."""
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server ended with code {self._process.wait()} while it ran {job}")
        return Result(job, json.loads(answer))

    def train(self, out: Path, *flags: str, ranks: int = 1) -> Result:
        """Train and succeed."""
        result = self.run(Job(str(out), flags, ranks))
        assert result.codes == [0] * ranks, result.log()[-6000:]
        return result


# --- The server ------------------------------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print isn't an answer
    from runtime import prepare

    prepare()
    for module in IMPORTS:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(_run(Job(**{**job, "flags": tuple(job["flags"])}))) + "\n")
        answers.flush()


def _run(job: Job) -> list[int | None]:
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    started = out / "started"
    started.unlink(missing_ok=True)
    port = _free_port()
    group = 0
    pids = []
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, group)
            _child(job, rank, port)
        group = group or pid
        os.setpgid(pid, group)  # here as well: whichever comes first
        pids.append(pid)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + job.timeout
    kill_time = terminate_time = None
    killed = False
    while len(codes) < len(pids):
        pid, status = os.waitpid(-group, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0 and len(codes) == 1:
                deadline = min(deadline, time.monotonic() + 30)  # as torchrun's agent does
            continue
        if job.kill_after is not None and kill_time is None and started.exists():
            kill_time = time.monotonic() + job.kill_after
        now = time.monotonic()
        if job.terminate_after is not None and terminate_time is None and started.exists():
            terminate_time = now + job.terminate_after
        if terminate_time is not None and now > terminate_time:
            os.killpg(group, signal.SIGTERM)
            terminate_time = float("inf")
        if now > deadline or (kill_time is not None and now > kill_time):
            killed = kill_time is not None and now > kill_time
            os.killpg(group, signal.SIGKILL)
            kill_time, deadline = None, now + 60
            job = Job(**{**asdict(job), "kill_after": None})
        time.sleep(0.005)
    _kill_group(group)  # what ranks that died have left, such as megatron's queue of write results
    return [None] * len(pids) if killed or job.kill_at is not None else [codes[pid] for pid in pids]


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _child(job: Job, rank: int, port: int) -> None:
    """Train as one rank; never returns."""
    log = os.open(Path(job.out) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(job.ranks), LOCAL_RANK=str(rank))
        if job.ranks > 1:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        import pretrain_multimodal

        flags = [*FLAGS, *job.flags]
        _record(Path(job.out), rank)
        if job.kill_at is not None and rank == 0:
            _kill_at(job.kill_at, flags[flags.index("--save") + 1])
        if job.file_bytes is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_bytes, job.file_bytes))
        pretrain_multimodal.main(flags)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1 if exit.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _record(out: Path, rank: int) -> None:
    """Append a `Step` after each training step."""
    from megatron.training import training

    from data.reader import BatchReader

    journal = os.open(out / f"rank{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original_step, original_next = training.train_step, BatchReader.__next__
    samples: list[str] = []

    def next_batch(self: BatchReader) -> Any:
        batch = original_next(self)
        vision = (value for of_rank in batch.vision or () for value in of_rank.values())
        samples.append(_digest([batch.input_ids, batch.labels, *vision]))
        return batch

    def train_step(*args: Any, **kwargs: Any) -> Any:
        (out / "started").touch()
        samples.clear()
        result = original_step(*args, **kwargs)
        losses, grad_norm = result[0], result[5]
        _, _, model, optimizer = args[:4]
        step = Step(
            iteration=training.get_args().curr_iteration + 1,
            losses={name: float(value).hex() for name, value in losses.items() if "/s" not in name},
            grad_norm=float(grad_norm).hex(),
            samples=list(samples),
            state=_digest(_state(model, optimizer)),
        )
        os.write(journal, (json.dumps(asdict(step)) + "\n").encode())
        return result

    training.train_step = train_step
    BatchReader.__next__ = next_batch


def _state(model: list[Any], optimizer: Any) -> Iterator[Any]:
    """This rank's parameters, optimizer state and random generator."""
    import torch

    for chunk in model:
        yield from chunk.state_dict().values()
    for inner in optimizer.chained_optimizers:
        state = inner.optimizer.state_dict()
        for index in sorted(state["state"]):
            yield from (state["state"][index][key] for key in sorted(state["state"][index]))
        yield from (torch.tensor([group["lr"], group["weight_decay"]]) for group in state["param_groups"])
    yield torch.get_rng_state()


def _digest(values: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().reshape(-1)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _kill_at(count: int, save: str) -> None:
    """SIGKILL this rank's process group at the `count`-th change under `save`."""
    seen = 0
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, _, mode = arguments
            writes = isinstance(mode, int) and mode & (os.O_WRONLY | os.O_RDWR)
        else:
            path, writes = arguments[0] if arguments else "", event in changes
        if writes and str(path).startswith(save):
            seen += 1
            os.write(2, f"change {seen}: {event} {path}\n".encode())
            if seen == count:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    serve()
