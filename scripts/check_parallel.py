"""Prove that parallel layouts train the same model: each against one rank, on your own machines.

    python scripts/check_parallel.py --variant tiny_moe --layouts tp2+sp cp2 pp2+vpp2 ep2 fsdp2
    python scripts/check_parallel.py --variant 0.8b --dtype bf16 --layouts tp2+sp+cp2 -- --transformer-impl local
    python scripts/check_parallel.py ... --nnodes 2 --node-rank 0 --master-addr HOST --output SHARED    # on each node

Runs a few steps of the real training loop on one rank and in each layout, from the same weights and on the same
documents; torchrun's launcher starts the ranks. Prints losses, gradient norms, the worst error of any parameter's
gradient and of what the optimizer made of it, memory and speed. Exits with 1 when an error exceeds `--tolerance`. What
follows `--` goes to pretrain_multimodal.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import arguments
from proofs.layouts import ADAPTER, INITIAL, SWITCHES, Job, Layout, parse_layout
from proofs.rank import run_rank
from runtime.machine import count_gpus, detect

# Worst relative error of a gradient by precision: in float64 rounding alone, in the others what it grows to.
TOLERANCES = {"float64": 1e-8, "float32": 2e-4, "bf16": 5e-2}
# Distance of two experts' logits that rounding can bridge.
NEAR_TIES = {"float32": 1e-3, "bf16": 0.1}
LOGGED = ("mtp_1 loss", "load_balancing_loss")
COLUMNS = (
    *("layout", "ranks", "loss", "grad norm", "loss error", "gradient error"),
    *("update error", "peak GB", "tokens/s"),
)


@dataclass(frozen=True)
class Comparison:
    """What is the same for all layouts: the model, the batch, the precision, where files go."""

    args: Namespace
    folder: Path

    def command_line(self, layout: Layout, reference: Path | None = None) -> list[str]:
        """The flags of pretrain_multimodal.py; the user's come last, so they win.

        Args:
            reference: whose weights to start from, if it is another layout's folder.
        """
        args = self.args
        optimizers = {
            "sgd": ("--optimizer", "sgd", "--sgd-momentum", "0"),
            # A large epsilon: else Adam makes a full step of the rounding noise of a gradient that is zero.
            "adam": ("--optimizer", "adam", "--adam-eps", "1e-3"),
        }
        documents = {
            "ragged": ("--dataset-provider", "ragged"),
            "full": ("--dataset-provider", "mock", "--image-size", "64", "--image-seq-length", "4"),
        }
        flags = [
            *("--model-variant", args.variant, *documents[args.documents], "--num-workers", "0"),
            *("--seq-length", str(args.seq_length)),
            *("--micro-batch-size", str(args.micro_batch_size), "--global-batch-size", str(args.global_batch_size)),
            *("--train-iters", str(args.steps), "--lr", "1e-2", "--lr-decay-style", "constant"),
            *("--eval-iters", "0", "--eval-interval", "1000", "--log-interval", "1", "--logging-level", "30"),
            *("--tensorboard-dir", str(self.folder / layout.name / "tensorboard")),
            *optimizers[args.optimizer],
        ]
        # The router's float32 would go to Transformer Engine where it is installed, which has no float64.
        precision = {"bf16": ["--bf16"], "float32": [], "float64": ["--moe-router-dtype", "fp64"]}
        flags += precision[args.dtype] + ["--use-packed-sequence"] * layout.packed
        if reference not in (None, self.folder / layout.name):
            flags += ["--load-hf", str(reference / INITIAL)]
            if (reference / ADAPTER).is_dir():
                flags += ["--load-adapter", str(reference / ADAPTER)]
        return [*flags, *layout.flags, *args.flags]

    def refusals(self, layout: Layout) -> list[str]:
        """Why the layout can't run, before any rank starts."""
        machine = detect()
        try:
            arguments.preflight(self.command_line(layout), machine, layout.world_size)
        except arguments.Refused as refused:
            return refused.problems
        if self.args.dtype == "float64" and machine.gpus and machine.transformer_engine:
            # core/optimizer/clip_grads.py takes Transformer Engine's fused norm where it is installed.
            return [
                "Transformer Engine's gradient norm knows no float64; use --dtype float32, or CPU ranks: "
                "CUDA_VISIBLE_DEVICES= before the command"
            ]
        if layout.fsdp and self.args.dtype == "float64":
            # core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py:2728 raises KeyError for it.
            return ["megatron-core 0.19.2's Megatron-FSDP keeps no float64 gradients; use --dtype float32"]
        nodes, gpus = self.nodes(layout), machine.gpus
        if layout.world_size % nodes:
            return [f"its {layout.world_size} ranks don't spread evenly over --nnodes {nodes}; add data ranks (dp)"]
        if 0 < gpus < layout.world_size // nodes:
            return [f"needs {layout.world_size // nodes} ranks on a node, and this one has {gpus} GPUs"]
        return []

    def nodes(self, layout: Layout) -> int:
        """Machines that a layout runs on: a single rank on the first."""
        return 1 if layout.world_size == 1 else self.args.nnodes

    def run(self, layout: Layout, reference: Path) -> dict[str, Any]:
        """Run one layout; a `proofs.run.Result` as a dictionary, with what TensorBoard recorded.

        Raises:
            ChildFailedError: a rank failed; the message holds its traceback.
        """
        folder = self.folder / layout.name
        result = folder / "result.json"
        if self.nodes(layout) == 1 and self.args.node_rank:
            while not result.exists():  # the first node runs it; the shared folder shows when it is done
                time.sleep(1)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            job = Job(
                flags=tuple(self.command_line(layout, reference)),
                float64=self.args.dtype == "float64",
                reference=str(reference),
                is_reference=reference == folder,
                result=str(result),
            )
            elastic_launch(self.launch(layout, folder), run_rank)(job)
        return json.loads(result.read_text()) | {"logged": _logged(folder / "tensorboard")}

    def launch(self, layout: Layout, folder: Path) -> LaunchConfig:
        """torchrun's settings for this node's part of a layout's ranks."""
        nodes = self.nodes(layout)
        return LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=layout.world_size // nodes,
            run_id=layout.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if nodes == 1 else f"{self.args.master_addr}:{self.args.master_port}",
            max_restarts=0,
            # Ranks on CPU start as copies of a process that has imported everything; CUDA can't be copied.
            start_method="spawn" if count_gpus() else "forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / f"logs-{self.args.node_rank}"), redirects=Std.ALL),
        )


def main() -> None:
    args = _parse()
    comparison = Comparison(args, Path(args.output or tempfile.mkdtemp(prefix="check-parallel-")))
    if args.node_rank == 0 and comparison.folder.exists() and any(comparison.folder.iterdir()):
        _refuse([f"--output {comparison.folder}: not empty; name a new folder"])
    layouts = _with_references(args.layouts)
    problems = [f"{layout.name}: {problem}" for layout in layouts for problem in comparison.refusals(layout)]
    if problems:
        _refuse(problems)
    # Read when its first rank starts.
    multiprocessing.set_forkserver_preload(["proofs.run"])
    os.environ["OMP_NUM_THREADS"] = "1"  # while it starts; a rank takes its share of the cores
    if args.dtype == "float32":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine's router product would round to 10 bits
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # of what isn't installed; a rank's log has its own
    print(f"{args.variant}, {args.dtype}, {args.steps} steps of {args.optimizer}; logs in {comparison.folder}")
    print(_row(*COLUMNS))
    results: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        reference = comparison.folder / layout.reference
        try:
            result = comparison.run(layout, reference)
        except ChildFailedError as error:
            print(f"{layout.name}: failed\n{error}", file=sys.stderr)
            raise SystemExit(1) from None
        results[layout.name] = summary(result, results.get(layout.reference, result))
        print(_row(layout.name, layout.world_size, *_figures(results[layout.name])), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    tolerance = args.tolerance or TOLERANCES[args.dtype]
    if wrong := [name for name, result in results.items() if not result["worst_gradient"][0] <= tolerance]:
        for name in wrong:
            gap, tensor = results[name]["worst_gradient"]
            print(f"{name}: the gradient of {tensor} is off by {gap:.1e}, more than {tolerance:.0e}", file=sys.stderr)
            margin = results[name]["router_margin"]
            if margin is not None and margin < NEAR_TIES.get(args.dtype, 0):
                print(
                    f"  A router's closest choice was {margin:.1e} apart, which {args.dtype} may turn round: then a "
                    "token went to another expert. --dtype float32 or a dense --variant tells it from a fault.",
                    file=sys.stderr,
                )
        raise SystemExit(1)


def summary(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """A result with its worst errors: loss against the reference's, and (error, HF tensor) of gradient and update."""
    differences = [
        abs(mine - theirs) / abs(theirs) for mine, theirs in zip(result["losses"], reference["losses"], strict=True)
    ]
    worst_loss = max(math.inf if math.isnan(difference) else difference for difference in differences)
    worst = {
        f"worst_{what}": max(((error, name) for name, error in result[f"{what}_errors"].items()))
        for what in ("gradient", "update")
    }
    return {**result, "loss_error": worst_loss, **worst}


def _with_references(layouts: list[Layout]) -> list[Layout]:
    """Each layout once, behind the single rank that it is compared with."""
    ordered: dict[str, Layout] = {}
    for layout in layouts:
        ordered.setdefault(layout.reference, parse_layout(layout.reference))
        ordered.setdefault(layout.name, layout)
    return list(ordered.values())


def _logged(tensorboard: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    events = EventAccumulator(str(tensorboard), size_guidance={"scalars": 0}).Reload()
    recorded = set(events.Tags()["scalars"])
    return {tag: [event.value for event in events.Scalars(tag)] for tag in LOGGED if tag in recorded}


def _figures(result: dict[str, Any]) -> list[str]:
    seconds = min(result["step_seconds"])
    return [
        f"{result['losses'][0]:.10f}",
        f"{result['grad_norms'][0]:.8f}",
        f"{result['loss_error']:.1e}",
        f"{result['worst_gradient'][0]:.1e}",
        f"{result['worst_update'][0]:.1e}",
        f"{result['peak_bytes'] / 1e9:.2f}",
        f"{result['tokens'] / seconds:.0f}",
    ]


def _row(*cells: Any) -> str:
    name, *others = map(str, cells)
    return f"{name:<24}" + "".join(f"{cell:>16}" for cell in others)


def _refuse(problems: list[str]) -> NoReturn:
    print(arguments.Refused(problems), file=sys.stderr)
    raise SystemExit(2)


def _parse() -> Namespace:
    own, flags = _split_at("--", sys.argv[1:])
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny_moe", help="a --model-variant (default: %(default)s)")
    parser.add_argument(
        "--layouts",
        nargs="+",
        required=True,
        help='words joined by "+": sizes (tp, cp, pp, vpp, ep, etp, dp, fsdp, first, last, each with a number) and '
        f"{', '.join(SWITCHES)}, bshd, thd (the default)",
    )
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default=None, help="default: float64, on GPUs bf16")
    parser.add_argument(
        "--documents", choices=("ragged", "full"), default="ragged", help="full: every document fills --seq-length"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="adam", help="adam: with --adam-eps 1e-3")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=64, help="tokens of a pack (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="packs (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=4, help="packs of a step (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=None, help=f"of a gradient; default: {TOLERANCES}")
    parser.add_argument("--json", default=None, metavar="FILE", help="write every tensor's error to this file")
    parser.add_argument("--output", default=None, metavar="DIR", help="weights, gradients and logs; default: a new one")
    parser.add_argument("--nnodes", type=int, default=1, help="machines; start this on each, with the same --output")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is; the first runs single ranks")
    parser.add_argument("--master-addr", default=None, help="a name or address of the first node")
    parser.add_argument("--master-port", type=int, default=29500, help="a free port there (default: %(default)s)")
    args = parser.parse_args(own)
    args.flags = flags
    if args.nnodes > 1 and not (args.output and args.master_addr):
        _refuse(["--nnodes: needs --master-addr, and --output with a folder that all nodes share"])
    args.dtype = args.dtype or ("bf16" if count_gpus() else "float64")
    try:
        args.layouts = [parse_layout(name) for name in args.layouts]
    except ValueError as error:
        _refuse([f"--layouts: {error}"])
    return args


def _split_at(mark: str, words: list[str]) -> tuple[list[str], list[str]]:
    if mark not in words:
        return words, []
    place = words.index(mark)
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    main()
