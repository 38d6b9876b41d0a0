"""One rank of one layout of `scripts/check_parallel.py`: a few steps of the real training loop, watched.

Weights, data and seeds depend on nothing but the job, so that every layout trains the same model on the same batch. The
first step's gradients and the parameters after the last step are compared, on the rank that holds them, with what one
rank wrote: each copy of a replicated parameter by itself, slices of a sharded one by their position in the whole.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import prepare

prepare()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.training import pretrain, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402

import arguments  # noqa: E402
from data.batch import BatchStats  # noqa: E402
from data.loader import dataset_provider  # noqa: E402
from forward_step import ForwardStep  # noqa: E402
from models import ModelConfig, ModelSpec  # noqa: E402
from models.adapters import adapters_of_args, trained_of_args  # noqa: E402
from models.base import MultimodalModel  # noqa: E402
from models.trained import frozen_names  # noqa: E402
from models.weight_map import Rank, TensorSlice, WeightMap, assemble, shares  # noqa: E402
from pretrain_multimodal import model_provider  # noqa: E402
from proofs.float64 import float64  # noqa: E402
from proofs.full_tensors import full_gradients, full_parameters  # noqa: E402
from proofs.layouts import ADAPTER, INITIAL, Job  # noqa: E402
from runtime.learning_rates import LearningRates  # noqa: E402
from runtime.model_builder import ProvidedModelConfig, unwrapped  # noqa: E402
from weights.adapter import write_adapter  # noqa: E402
from weights.adapter_job import load_adapter  # noqa: E402
from weights.job import load_hf, weights_table  # noqa: E402

# (HF tensor, region) -> squared norm of the difference there, elements.
type Differences = dict[tuple[str, str], tuple[float, int]]

START, PARAMETERS, GRADIENTS = "start.safetensors", "parameters.safetensors", "gradients.safetensors"
WEIGHTS = "model.safetensors"  # of the folder INITIAL


@dataclass
class Result:
    """What a layout did; written by rank 0.

    losses, grad_norms: of each step. A loss is the mean over the step's trained tokens.
    gradient_errors, update_errors: HF tensor -> norm of the difference over norm of the reference; the worst replica.
        Where the reference is zero everywhere: 0 if this is too, else infinite.
    zero_gradients: HF tensors whose gradient is zero everywhere in the reference.
    images: images of each micro-batch of the first step that data rank 0 saw.
    router_margin: smallest distance between the last expert that a token chose and the first that it didn't, in logits.
    step_seconds: each step's, the slowest rank's.
    tokens: of a step, padding not counted.
    peak_bytes: highest memory of any rank: the CUDA allocator's, without a GPU the process's.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradient_errors: dict[str, float] = field(default_factory=dict)
    update_errors: dict[str, float] = field(default_factory=dict)
    zero_gradients: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    router_margin: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0


def run(job: Job) -> None:
    """What the rank's process does; see `proofs.layouts.run_rank`."""
    # TP and CP order their communication by having one connection; FSDP refuses that.
    if "--use-megatron-fsdp" in job.flags:
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    else:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    with float64() if job.float64 else nullcontext():
        _train(job)


def _train(job: Job) -> None:
    command_line = arguments.preflight_or_exit(list(job.flags), with_weights=True)
    args = arguments.parse(command_line)
    spec, config = command_line.spec, command_line.config
    watch = Watch(job, args, spec, config)
    training.train_step = watch.steps(training.train_step)
    model = ProvidedModelConfig(
        provider=partial(model_provider, spec, config, args),
        post_wrap_hooks=[
            partial(load_hf, args, spec, config, command_line.hf_source),
            partial(load_adapter, args, spec, config),
            watch.initialise,
            LearningRates(args, spec, config).attach,
        ],
    )
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        dataset_provider(args, spec.model_inputs(config, trained_of_args(args, spec, config)), None),
        ModelType.encoder_or_decoder,
        watch.forward_step(),
    )
    watch.finish()
    torch.distributed.destroy_process_group()


class Watch:
    """Looks at a run from outside: gradients before the optimizer's first step, parameters after its last."""

    def __init__(self, job: Job, args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> None:
        self._job = job
        self._config = config
        self._weights = weights_table(spec)
        self._mapping = self._weights.mapping(self._config, ())
        frozen = frozen_names(self._mapping, self._weights.groups, args.freeze or ())
        self._adapters = adapters_of_args(args, spec, config)
        if self._adapters is None:
            self._everything, self._trained = self._mapping, self._mapping.without(frozen)
        else:
            self._trained = self._adapters.weights
            self._everything = WeightMap({**self._mapping.sources, **self._trained.sources})
        self._folder = Path(job.reference)
        self._result = Result()
        self._stats: list[BatchStats] = []
        self._margins: list[Tensor] = []
        self._model: list[nn.Module] = []
        self._gradient_differences: Differences = {}

    def initialise(self, chunks: list[nn.Module]) -> list[nn.Module]:
        """Make the reference's weights rough and leave them as a HuggingFace folder; a hook after wrapping.

        The others start from it by `--load-hf`, whatever they are wrapped in.
        """
        if self._job.is_reference:
            (model,) = map(unwrapped, chunks)
            perturb(model)
            folder = self._folder / INITIAL
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(self._config.to_hf()))
            # In the dtype that float64's mode leaves alone.
            start = assemble(self._everything, self._shares(self._everything, model))
            start = {name: tensor.double() for name, tensor in start.items()}
            save_file(start, self._folder / START)
            save_file({name: start[name] for name in self._mapping.tensors}, folder / WEIGHTS)
            if self._adapters is not None:
                adapter = {name: start[name] for name in self._trained.tensors}
                write_adapter(self._folder / ADAPTER, adapter, self._adapters, self._mapping.tensors, None)
        return chunks

    def forward_step(self) -> ForwardStep:
        """The training loop's own, which also keeps the statistics that it sees."""
        stats = self._stats

        class WatchedForwardStep(ForwardStep):
            def _rates(self, batch_stats: BatchStats, *, training: bool) -> dict[str, tuple[float, float]]:
                stats.append(batch_stats)
                return super()._rates(batch_stats, training=training)

        return WatchedForwardStep()

    def steps(self, train_step: Callable[..., tuple]) -> Callable[..., tuple]:
        """`megatron.training.training.train_step`, watched."""

        def watched(
            forward_step: Any, data: Any, model: list[nn.Module], optimizer: Any, *rest: Any, **more: Any
        ) -> tuple:
            if not self._model:
                self._model = model
                self._watch_routers()
                self._watch_gradients(optimizer)
            torch.cuda.synchronize()
            start = time.perf_counter()
            outcome = train_step(forward_step, data, model, optimizer, *rest, **more)
            torch.cuda.synchronize()
            self._result.step_seconds.append(time.perf_counter() - start)
            losses, grad_norm = outcome[0], outcome[5]
            if losses:
                self._result.losses.append(float(losses["lm loss"]))
            self._result.grad_norms.append(float(grad_norm))
            return outcome

        return watched

    def finish(self) -> None:
        """Compare the parameters; rank 0 puts all findings together and writes the result."""
        mine = self._result
        first_step = self._stats[: len(self._stats) // len(mine.grad_norms)]
        mine.tokens = sum(stats.tokens for stats in first_step)
        mine.images = [stats.images for stats in first_step]
        mine.router_margin = min((float(margin) for margin in self._margins), default=None)
        mine.peak_bytes = torch.cuda.max_memory_allocated()
        own_updates = self._compare(self._everything, full_parameters, PARAMETERS)
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, (mine, self._gradient_differences, own_updates))
        if torch.distributed.get_rank():
            return
        results, gradients, updates = zip(*of_ranks, strict=True)
        mine.losses = next(result.losses for result in results if result.losses)
        mine.images = next(result.images for result in results if result.images)
        mine.tokens = sum(result.tokens for result in results) // sum(bool(result.images) for result in results)
        mine.router_margin = min((r.router_margin for r in results if r.router_margin is not None), default=None)
        mine.step_seconds = [max(seconds) for seconds in zip(*(result.step_seconds for result in results), strict=True)]
        mine.peak_bytes = max(result.peak_bytes for result in results)
        mine.gradient_errors = self._errors(gradients, GRADIENTS)
        with safe_open(self._folder / GRADIENTS, "pt") as file:
            mine.zero_gradients = [name for name in file.keys() if not file.get_tensor(name).any()]  # noqa: SIM118
        mine.update_errors = self._errors(updates, PARAMETERS, minus=START)
        Path(self._job.result).write_text(json.dumps(asdict(mine)))

    def _watch_gradients(self, optimizer: Any) -> None:
        step = optimizer.step

        def compare_then_step() -> Any:
            optimizer.step = step  # the first one only
            self._gradient_differences = self._compare(self._trained, full_gradients, GRADIENTS)
            return step()

        optimizer.step = compare_then_step

    def _watch_routers(self) -> None:
        for router in (m for chunk in self._model for m in chunk.modules() if isinstance(m, TopKRouter)):
            gating = router.gating

            def watched(hidden: Tensor, gating: Callable = gating, router: TopKRouter = router) -> Tensor:
                logits = gating(hidden)
                best = logits.detach().topk(router.topk + 1).values
                self._margins.append((best[..., -2] - best[..., -1]).min())
                return logits

            router.gating = watched

    def _compare(
        self, mapping: WeightMap, full: Callable[[list[nn.Module]], Iterable[tuple[str, Tensor]]], file: str
    ) -> Differences:
        """This rank's regions of the HF tensors against the reference's, which the reference itself writes first."""
        held: list[tuple[TensorSlice, Tensor]] = []
        for chunk in self._model:
            model, values = unwrapped(chunk), dict(full([chunk]))
            of_parameter = {parameter: values[name] for name, parameter in model.named_parameters() if name in values}
            held += self._shares(mapping, model, of_parameter.__getitem__)
        if self._job.is_reference:
            save_file(assemble(mapping, held), self._folder / file)
        differences: Differences = {}
        with safe_open(self._folder / file, "pt") as reference:
            for tensor_slice, mine in held:
                expected = reference.get_slice(tensor_slice.name)[tensor_slice.foreign_index]
                square = (mine.cpu().double().reshape(expected.shape) - expected.double()).square().sum().item()
                if math.isnan(square):
                    square = math.inf  # which no maximum loses
                key = (tensor_slice.name, str(tensor_slice.foreign_index))
                known, _ = differences.get(key, (0.0, 0))
                differences[key] = (max(known, square), expected.numel())
        return differences

    def _shares(
        self, mapping: WeightMap, model: MultimodalModel, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
    ) -> Iterator[tuple[TensorSlice, Tensor]]:
        # Values in the place of the parameters: under FSDP these have the shape without tensor parallelism.
        values = (
            (name, value(parameter))
            for name, parameter in self._weights.parameters(self._config, model)
            if name in mapping.sources
        )
        return shares(mapping, values, Rank.of(model.pg_collection))

    def _errors(self, of_ranks: Iterable[Differences], file: str, minus: str | None = None) -> dict[str, float]:
        """Relative error of each HF tensor, the worst of its replicas'; infinite where a region is on no rank.

        Args:
            file: the reference.
            minus: relative to the norm of the reference less this file, so to what the optimizer changed, plus one
                rounding of the reference: in bf16 many a step is smaller than that.
        """
        worst: Differences = {}
        for differences in of_ranks:
            for key, (square, count) in differences.items():
                worst[key] = (max(square, worst.get(key, (0.0, 0))[0]), count)
        squares: dict[str, float] = defaultdict(float)
        covered: dict[str, int] = defaultdict(int)
        for (name, _), (square, count) in worst.items():
            squares[name] += square
            covered[name] += count
        errors = {}
        with (
            safe_open(self._folder / file, "pt") as reference,
            safe_open(self._folder / (minus or file), "pt") as start,
        ):
            for name in reference.keys():  # noqa: SIM118
                whole = reference.get_tensor(name)
                norm = whole.double().norm().item()
                if minus:
                    step = (whole.double() - start.get_tensor(name)).norm().item()
                    norm = step + torch.finfo(whole.dtype).eps * norm
                difference = squares[name] ** 0.5 if covered[name] == whole.numel() else float("inf")
                errors[name] = difference / norm if norm else (float("inf") if difference else 0.0)
        return errors


def perturb(model: nn.Module) -> None:
    """Add noise that depends on the parameter's name: fresh norms are all alike, and no layout could mix them up.

    The decay of a fresh GatedDeltaNet forgets within a few tokens; here it remembers dozens. Routers get clear
    preferences, since two layouts may break a tie differently.
    """
    for name, parameter in model.named_parameters():
        numbers = np.random.default_rng(zlib.crc32(name.encode()))
        noise = numbers.standard_normal(parameter.shape, dtype=np.float32)
        scale = np.float32(parameter.size(-1) ** -0.5)
        if name.endswith("A_log"):
            value = np.float32(0.3) * noise - np.float32(3)
        elif name.endswith("router.weight"):
            value = np.float32(4) * scale * noise
        elif parameter.dim() > 1:
            value = np.float32(0.5) * scale * noise
        else:
            value = parameter.detach().cpu().double().numpy().astype(np.float32) + np.float32(0.3) * noise
        parameter.data.copy_(torch.from_numpy(value))
