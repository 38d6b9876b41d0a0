"""Training speed of this harness and of a plain transformers loop, on the same work in one run on the same machine.

    python scripts/benchmark_train.py --variant 2b --seq-length 8192 --image-size 1024 --json result.json
    python scripts/benchmark_train.py --variant tiny --seq-length 512 --image-size 64 --fp32     # on a CPU
    python scripts/benchmark_train.py ... --sides ours --profile -- --keep-logits               # flags of training
    python scripts/benchmark_train.py --variant 35b_a3b --num-layers 4 --sides ours ours_even   # both loads of experts

Every side is a process of its own, one after the other: random weights, random documents of `--seq-length` tokens with
one image in the middle of each, all text trained, `--micro-batches` documents a step, AdamW, gradients clipped. The
sides:

    ours                what pretrain_multimodal.py runs, through Megatron's own loop
    ours_even           the same, tokens spread evenly over the experts whatever the routers say
    transformers        bf16 weights and AdamW, sdpa, one document a forward pass, no recomputation
    transformers_wide   the same, two documents a forward pass
    transformers_liger  the first with liger-kernel's losses, norms and MLPs, if it is installed

TFLOP/s are the model's, without what is computed again, and with the output layer on trained tokens alone, so equal
work is equal FLOPs. A step's time is the median over `--steps` steps, each waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "ours_even", "transformers", "transformers_wide", "transformers_liger")
PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "flash-linear-attention", "triton")
WARM_UP = 4
LEARNING_RATE = 1e-5


@dataclass
class Measurement:
    """What one side did.

    seconds: of each measured step. losses: of every step, the first ones included.
    tokens, flops: of a step. peak_bytes: highest memory of the CUDA allocator; without a GPU the process's.
    first_step_seconds: from the start of the process to the end of the first step.
    profile: lines of the profiled step; busy_seconds, launches: of its kernels.
    error: the traceback's last line, if it failed.
    """

    side: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    flops: float = 0.0
    peak_bytes: int = 0
    first_step_seconds: float = 0.0
    busy_seconds: float | None = None
    launches: int | None = None
    profile: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """Times steps, profiles the last one, and keeps it all in a `Measurement`."""

    def __init__(self, options: Namespace, measurement: Measurement) -> None:
        self._options = options
        self._measurement = measurement
        self._done = 0
        self.host: Any = None

    @property
    def steps(self) -> int:
        """Steps to make in all."""
        return steps_of(self._options)

    def run(self, step: Callable[[], Any]) -> Any:
        """Make a step."""
        import torch

        from runtime.profile_summary import KernelSummary, host_lines, profiled

        cuda = torch.cuda.is_available()
        measurement = self._measurement
        if self._options.profile and self._done == self.steps - 1:
            if self.host:
                self.host.clear()
            summary = KernelSummary()
            with profiled(summary):
                outcome = step()
            measurement.busy_seconds, measurement.launches = summary.busy_seconds, summary.launches
            measurement.profile = summary.lines()
        else:
            start = time.perf_counter()
            outcome = step()
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if self._done == 0:
                measurement.first_step_seconds = time.time() - self._options.started
            if self._done >= WARM_UP:
                measurement.seconds.append(seconds)
            if self.host and self._done == WARM_UP + self._options.steps - 1:
                self._host_lines = host_lines(self.host.seconds)
            if self.host:
                self.host.clear()
            print(f"{measurement.side}: step {self._done} {seconds:.3f} s", file=sys.stderr, flush=True)
        self._done += 1
        if self._done == self.steps:
            measurement.peak_bytes = torch.cuda.max_memory_reserved() if cuda else _resident_bytes()
            if self.host:
                measurement.profile += ["forward of an unprofiled step:", *self._host_lines]
        return outcome


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def steps_of(options: Namespace) -> int:
    """Steps that each side makes in all."""
    return WARM_UP + options.steps + options.profile


def training_flags(options: Namespace) -> list[str]:
    """The command line of pretrain_multimodal.py for this work."""
    flags = [
        *("--model-variant", options.variant, "--dataset-provider", "mock", "--use-packed-sequence"),
        *("--seq-length", str(options.seq_length), "--micro-batch-size", "1"),
        *("--global-batch-size", str(options.micro_batches), "--train-iters", str(steps_of(options))),
        *("--lr", str(LEARNING_RATE), "--lr-decay-style", "constant", "--clip-grad", "1.0", "--weight-decay", "0.1"),
        *("--use-distributed-optimizer", "--eval-iters", "0", "--seed", str(options.seed), "--log-interval", "1"),
        *("--num-workers", "0" if options.fp32 else "2", "--logging-level", "30", "--manual-gc"),
        *(() if options.fp32 else ("--bf16",)),
        *(() if options.mtp else ("--mtp-num-layers", "0")),
        *(("--num-layers", str(options.num_layers)) if options.num_layers else ()),
        *(("--moe-router-force-load-balancing",) if options.side == "ours_even" else ()),
    ]
    if options.image_size:
        flags += ["--image-size", str(options.image_size), "--image-seq-length", str(options.seq_length)]
    else:
        flags += ["--image-seq-length", "0"]
    return [*flags, *options.rest]


def measure_ours(options: Namespace, measurement: Measurement) -> None:
    """Train with `megatron.training.pretrain`, each step on the clock."""
    import arguments
    from runtime import prepare

    command_line = arguments.preflight_or_exit(training_flags(options))
    prepare()
    args = arguments.parse(command_line)
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from data.loader import dataset_provider
    from forward_step import ForwardStep
    from models.adapters import trained_of_args
    from pretrain_multimodal import model_provider
    from runtime import time_split
    from runtime.model_builder import ProvidedModelConfig
    from runtime.profile_ranges import name_of_module
    from runtime.profile_summary import HostTimes
    from weights.adapter_job import load_adapter

    spec, config = command_line.spec, command_line.config
    time_split.install(args)
    clock = Clock(options, measurement)

    class CountingForwardStep(ForwardStep):
        def _rates(self, stats: Any, *, training: bool) -> dict[str, tuple[float, float]]:
            if clock._done == 0:
                measurement.tokens += stats.tokens
                measurement.flops += stats.flops
            return super()._rates(stats, training=training)

    train_step = training.train_step

    def timed(forward_step: Any, data: Any, model: list[Any], *rest: Any, **more: Any) -> Any:
        if options.profile and clock.host is None:
            clock.host = HostTimes(model[0], name_of_module)
        outcome = clock.run(lambda: train_step(forward_step, data, model, *rest, **more))
        measurement.losses.append(float(outcome[0]["lm loss"]))
        return outcome

    training.train_step = timed
    model = ProvidedModelConfig(
        provider=partial(model_provider, spec, config, args),
        post_wrap_hooks=[partial(load_adapter, args, spec, config)],
    )
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        dataset_provider(args, spec.model_inputs(config, trained_of_args(args, spec, config)), None),
        ModelType.encoder_or_decoder,
        CountingForwardStep(cuda_graphs=args.cuda_graphs),
        store=torch.distributed.HashStore(),
    )
    torch.distributed.destroy_process_group()


def measure_transformers(options: Namespace, measurement: Measurement) -> None:
    """A plain loop: forward, backward, clip, AdamW."""
    import torch

    batches, stats = _hf_batches(options, wide=measurement.side.endswith("_wide"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _hf_model(options, device)
    if measurement.side.endswith("_liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_5, apply_liger_kernel_to_qwen3_5_moe

        moe = "Moe" in type(model).__name__
        (apply_liger_kernel_to_qwen3_5_moe if moe else apply_liger_kernel_to_qwen3_5)(model=model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    clock = Clock(options, measurement)
    measurement.tokens, measurement.flops = stats
    if options.profile:
        from runtime.profile_summary import HostTimes

        clock.host = HostTimes(model, _hf_module)

    def step() -> Any:
        losses = []
        for batch in batches():
            on_device = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            loss = model(**on_device, use_cache=False).loss
            (loss * len(batch["input_ids"]) / options.micro_batches).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    for _ in range(clock.steps):
        measurement.losses.append(float(clock.run(step)))


def _hf_module(path: str, module: Any) -> str | None:
    last = path.split(".")[-1]
    if last == "visual":
        return "ViT"
    if "language_model" in path and last in ("linear_attn", "self_attn", "mlp"):
        return last
    return "the model" if path == "" else None


def _hf_model(options: Namespace, device: Any) -> Any:
    import torch
    import transformers

    from models.qwen35_vl.configuration import VARIANTS

    variant = VARIANTS[options.variant]
    if options.num_layers:
        variant = variant.replace(num_layers=options.num_layers)
    moe = variant.is_moe
    config_class = transformers.Qwen3_5MoeConfig if moe else transformers.Qwen3_5Config
    model_class = (
        transformers.Qwen3_5MoeForConditionalGeneration if moe else transformers.Qwen3_5ForConditionalGeneration
    )
    config = config_class(**variant.to_hf())
    config._attn_implementation = "sdpa"
    torch.manual_seed(options.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if options.fp32 else torch.bfloat16)
    try:
        with device:
            return model_class(config).train()
    finally:
        torch.set_default_dtype(before)


def _hf_batches(options: Namespace, *, wide: bool) -> tuple[Callable[[], Iterator[dict[str, Any]]], tuple[int, float]]:
    """The same documents as ours, and a step's tokens and FLOPs."""
    import torch

    from data.mock import MockDataset
    from models.qwen35_vl.configuration import VARIANTS
    from models.qwen35_vl.inputs import Qwen35VLInputs
    from models.spec import BatchShape

    variant = VARIANTS[options.variant].replace(mtp_num_layers=0)
    if options.num_layers:
        variant = variant.replace(num_layers=options.num_layers)
    inputs = Qwen35VLInputs(variant)
    dtype = torch.float32 if options.fp32 else torch.bfloat16
    dataset = MockDataset(
        "train", inputs, seed=options.seed, length=options.seq_length, image_size=options.image_size, dtype=dtype
    )
    together = 2 if wide else 1
    samples = [dataset[index] for index in range(options.micro_batches)]
    flops = sum(
        inputs.flops(BatchShape((len(sample.input_ids),), sample.grid_thw, (int(sample.trained[1:].sum()),)))
        for sample in samples
    )

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, options.micro_batches, together):
            some = samples[start : start + together]
            ids = torch.stack([sample.input_ids for sample in some])
            trained = torch.stack([sample.trained for sample in some])
            batch = {"input_ids": ids, "labels": torch.where(trained, ids, -100)}
            if options.image_size:
                batch["pixel_values"] = torch.cat([sample.pixel_values for sample in some])
                batch["image_grid_thw"] = torch.cat([sample.grid_thw for sample in some])
                batch["mm_token_type_ids"] = (ids == inputs.image_token_id).int()
            yield batch

    return batches, (options.micro_batches * options.seq_length, flops)


def run_side(options: Namespace) -> None:
    """Measure one side in this process and write the `Measurement` to `--json`."""
    measurement = Measurement(options.side)
    try:
        (measure_ours if options.side.startswith("ours") else measure_transformers)(options, measurement)
    except Exception as error:  # the table shows it; other sides still run
        traceback.print_exc()
        measurement.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    Path(options.json).write_text(json.dumps(asdict(measurement)))


def environment(options: Namespace) -> dict[str, Any]:
    """What the figures belong to: hardware, versions, commit, seed."""
    import torch

    cuda = torch.cuda.is_available()

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit = os.environ.get("BENCHMARK_COMMIT")
    if commit is None:
        asked = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or "unknown"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit,
        "seed": options.seed,
        "versions": {package: found for package in PACKAGES if (found := version_of(package))},
    }


def table(results: list[Measurement], device: str) -> list[str]:
    """A markdown table; ratios are relative to the fastest kind of each side, "ours" over it."""
    from runtime.peak_flops import peak_tflops

    peak = peak_tflops(device)
    ours = next((m.step for m in results if m.side == "ours" and m.seconds), None)
    lines = [
        "| side | step s | min to max | tokens/s | TFLOP/s | MFU | peak GB | device busy | kernels | ours is |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in results:
        if m.error or not m.seconds:
            lines.append(f"| {m.side} | {m.error or 'no step'} | | | | | {m.peak_bytes / 1e9:.1f} | | | |")
            continue
        tflops = m.flops / m.step / 1e12
        cells = [
            m.side,
            f"{m.step:.3f}",
            f"{min(m.seconds):.3f} to {max(m.seconds):.3f}",
            f"{m.tokens / m.step:,.0f}",
            f"{tflops:.3g}",
            f"{tflops / peak:.1%}" if peak else "",
            f"{m.peak_bytes / 1e9:.1f}",
            f"{m.busy_seconds / m.step:.0%}" if m.busy_seconds and peak else "",
            f"{m.launches}" if m.launches else "",
            f"{m.step / ours:.2f}x as fast" if ours and not m.side.startswith("ours") else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = parse_options()
    if options.side:
        run_side(options)
        return
    results = []
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measurement.json"
            argv = sys.argv[1:]
            place = argv.index("--") if "--" in argv else len(argv)
            own = ["--side", side, "--json", str(file), "--started", str(time.time())]
            command = [sys.executable, __file__, *argv[:place], *own, *argv[place:]]
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            done = subprocess.run(command, env=environ, stdout=sys.stderr, check=False)
            if file.exists():
                results.append(Measurement(**json.loads(file.read_text())))
            else:
                results.append(Measurement(side, error=f"its process ended with {done.returncode}"))
    where = environment(options)
    print(json.dumps(where))
    print(json.dumps({name: value for name, value in vars(options).items() if name not in ("side", "started")}))
    for result in results:
        if result.profile:
            print(f"\n{result.side}:", *result.profile, sep="\n")
    print("", *table(results, where["device"]), sep="\n")
    for result in results:
        if result.seconds:
            first, last = result.losses[0], result.losses[-1]
            print(f"{result.side}: first step after {result.first_step_seconds:.0f} s, loss {first:.4f} to {last:.4f}")
    if options.json:
        Path(options.json).write_text(json.dumps({**where, "results": [asdict(result) for result in results]}))


def parse_options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="2b", help="a name of the variant table")
    parser.add_argument("--num-layers", type=int, default=None, help="decoder layers; default: the variant's")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens of a document")
    parser.add_argument("--image-size", type=int, default=1024, help="height and width in pixels; 0: no image")
    parser.add_argument("--micro-batches", type=int, default=4, help="documents of a step")
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--mtp", action="store_true", help="ours with its MTP layer; transformers has none")
    parser.add_argument("--fp32", action="store_true", help="float32 rather than bf16: for a CPU")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "transformers"], help="what to measure")
    parser.add_argument("--profile", action="store_true", help="one step more, profiled: kernels by class, host times")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", default=None, metavar="FILE", help="all figures")
    parser.add_argument("--side", choices=SIDES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=0.0, help=argparse.SUPPRESS)
    argv = sys.argv[1:]
    place = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:place])
    options.rest = argv[place + 1 :]
    return options


if __name__ == "__main__":
    main()
