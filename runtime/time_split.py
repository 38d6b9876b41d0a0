"""Where a step's time goes, every `--log-time-split` iterations, in a line of the log and in TensorBoard.

A mark says which part of the step begins; a part lasts until the next mark, so the parts add up to the step. Marks come
from Megatron's own timers, which enclose everything that its schedule and optimizer do, and from hooks on the vision
encoder, the embedding and the output layer, in backward from hooks on their outputs. On a GPU a mark is an event in
the stream, so that a part's time is the device's, its pauses included: where the device waits for the host, it does so
in the part whose kernels come late. Nothing waits: events are read once they are done, after Megatron's log line has
waited for the device or an iteration later. Steps between measured ones have no hooks and no events.

Collectives inside layers (tensor, context and expert parallelism, Megatron-FSDP's) count with their layers.
"""

from __future__ import annotations

import functools
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.base import MultimodalModel
from runtime.model_builder import unwrapped

DATA, VISION, DECODER, LOSS = "data wait", "ViT", "decoder", "loss"
# Forward and backward as CUDA graphs, in which nothing can be told apart.
MODEL = "model"
OPTIMIZER, COMMUNICATION, OTHER = "optimizer", "communication", "other"
PARTS = (DATA, VISION, DECODER, LOSS, MODEL, OPTIMIZER, COMMUNICATION, OTHER)
HOST_WAITING = "host waiting"

# Megatron's timers of what moves between ranks, by their names (core/pipeline_parallel/schedules.py and
# p2p_communication.py, core/distributed/finalize_model_grads.py, core/optimizer).
_COMMUNICATION = re.compile(r"recv|send|all-reduce|all-gather|grads-sync")


def part_of_timer(name: str, model_part: str) -> str | None:
    """Which part begins when one of Megatron's timers is started; None: it encloses several.

    Args:
        model_part: what forward and backward begin with.
    """
    if name == "batch-generator":
        return DATA
    if name in ("forward-compute", "backward-compute"):
        return model_part
    if name == "optimizer":
        return OPTIMIZER
    return COMMUNICATION if _COMMUNICATION.search(name) else None


@dataclass(frozen=True)
class Mark:
    """From here on the time belongs to a part.

    event: when the device gets here. host: when the host did, in seconds of `time.perf_counter`.
    """

    part: str
    event: torch.cuda.Event
    host: float


def summed_up(marks: list[Mark]) -> dict[str, float]:
    """Milliseconds of each part that occurred, in the order of `PARTS`, and `HOST_WAITING`.

    The last is by how much the host was ahead of the device when it came to the optimizer, where it waits for the norm
    of the gradients. The device is never ahead of the host, which tells how their clocks compare.

    Args:
        marks: of one step, the last of which ends it; all reached by the device.
    """
    device = [marks[0].event.elapsed_time(mark.event) for mark in marks]
    behind = [reached - 1e3 * mark.host for reached, mark in zip(device, marks, strict=True)]
    spent = dict.fromkeys(PARTS, 0.0)
    for mark, start, end in zip(marks, device, device[1:], strict=False):
        spent[mark.part] += end - start
    found = {part: spent[part] for part in PARTS if any(mark.part == part for mark in marks[:-1])}
    ahead = [lag - min(behind) for lag, mark in zip(behind, marks, strict=True) if mark.part == OPTIMIZER]
    return {**found, HOST_WAITING: ahead[0] if ahead else 0.0}


def line(iteration: int, milliseconds: dict[str, float], stage: str = "") -> str:
    """What the log says of a step."""
    parts = {part: spent for part, spent in milliseconds.items() if part != HOST_WAITING}
    listed = ", ".join(f"{part} {spent:.1f}" for part, spent in parts.items())
    return (
        f"> iteration {iteration}{stage}: the step's {sum(parts.values()):.1f} ms: {listed}; "
        f"{HOST_WAITING} {milliseconds[HOST_WAITING]:.1f}"
    )


class TimeSplit:
    """Marks the parts of measured steps, and reports them.

    Args:
        graphed: forward and backward run as CUDA graphs: `MODEL` in one piece.
        report: called with an iteration and its milliseconds, see `summed_up`.
    """

    def __init__(self, report: Callable[[int, dict[str, float]], None], *, graphed: bool = False) -> None:
        self.model_part = MODEL if graphed else DECODER
        self._report = report
        self._stack: list[str] = []  # parts that are under way, the innermost last; empty between measured steps
        self._marks: list[Mark] = []
        self._finished: tuple[int, list[Mark]] | None = None  # a measured step that isn't reported yet

    @property
    def measuring(self) -> bool:
        return bool(self._stack)

    @contextmanager
    def step(self, iteration: int, chunks: list[nn.Module]) -> Iterator[None]:
        """Measure the step that is made inside.

        Args:
            chunks: this rank's wrapped stages.
        """
        handles = [] if self.model_part == MODEL else self._hooks([unwrapped(chunk) for chunk in chunks])
        self._marks = []
        self.begin(OTHER)
        try:
            yield
            self.end()
            self._finished = iteration, self._marks
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def begin(self, part: str) -> None:
        """A part begins inside the one that is under way."""
        self._stack.append(part)
        self._mark(part)

    def end(self) -> None:
        """The innermost part ends, and the one around it goes on."""
        ended = self._stack.pop()
        self._mark(self._stack[-1] if self._stack else ended)

    def switch(self, part: str) -> None:
        """The innermost part ends, and another one begins in its place; nothing outside of measured steps."""
        if self._stack:
            self._stack[-1] = part
            self._mark(part)

    def report_finished(self) -> None:
        """Report the last measured step, if the device is done with it."""
        if self._finished is not None:
            iteration, marks = self._finished
            if marks[-1].event.query():  # doesn't wait
                self._finished = None
                self._report(iteration, summed_up(marks))

    def _mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(Mark(part, event, time.perf_counter()))

    def _hooks(self, stages: list[MultimodalModel]) -> list[Any]:
        """Forward hooks on the modules where parts meet; each hands its tensors' hooks on to backward."""
        handles: list[Any] = []
        for stage in stages:
            language_model = stage.language_model
            if stage.vision_model is not None:
                handles += self._hook(stage.vision_model, VISION, then=DECODER)
            if hasattr(language_model, "embedding"):
                # Its gradient comes after the vision encoder's.
                handles += self._hook(language_model.embedding, DECODER, then=DECODER)
            if stage.post_process:
                handles += self._hook(language_model.output_layer, LOSS, then=LOSS)
        return handles

    def _hook(self, module: nn.Module, part: str, then: str) -> list[Any]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.switch(part)
            self._switch_in_backward(inputs[0] if inputs else None, DECODER)

        def after(_: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            self._switch_in_backward(outputs[0] if isinstance(outputs, tuple) else outputs, part)
            self.switch(then)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _switch_in_backward(self, tensor: Any, part: str) -> None:
        """The part begins as soon as backward has the tensor's whole gradient, before what made the tensor runs."""
        if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(lambda _: self.switch(part))


class MarkedTimers:
    """Megatron's timers, which in measured steps mark parts as well."""

    def __init__(self, timers: Any, split: TimeSplit) -> None:
        self._timers = timers
        self._split = split

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        timer = self._timers(name, log_level)
        part = part_of_timer(name, self._split.model_part) if self._split.measuring else None
        return timer if part is None else _MarkedTimer(timer, self._split, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timers, name)


class _MarkedTimer:
    def __init__(self, timer: Any, split: TimeSplit, part: str) -> None:
        self._timer = timer
        self._split = split
        self._part = part

    def start(self, *args: Any, **kwargs: Any) -> None:
        self._timer.start(*args, **kwargs)
        self._split.begin(self._part)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        self._split.end()
        self._timer.stop(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timer, name)


def install(args: Namespace) -> None:
    """Measure every `--log-time-split`-th step of Megatron's training loop, which calls its functions by name.

    Args:
        args: Megatron's resolved arguments, global by now.
    """
    if not args.log_time_split:
        return
    from megatron.training import global_vars, training

    split = TimeSplit(_report, graphed=args.cuda_graphs)
    global_vars._GLOBAL_TIMERS = MarkedTimers(global_vars.get_timers(), split)
    train_step, training_log = training.train_step, training.training_log

    @functools.wraps(train_step)
    def measured(forward_step: Any, data: Any, chunks: list[nn.Module], *rest: Any, **more: Any) -> Any:
        split.report_finished()
        iteration = args.curr_iteration + 1
        if iteration % args.log_time_split or not _reports():
            return train_step(forward_step, data, chunks, *rest, **more)
        with split.step(iteration, chunks):
            return train_step(forward_step, data, chunks, *rest, **more)

    @functools.wraps(training_log)
    def reported(*positional: Any, **named: Any) -> Any:
        outcome = training_log(*positional, **named)
        split.report_finished()  # Megatron's line, which is due at the latest now, has read the device
        return outcome

    training.train_step, training.training_log = measured, reported


def _reports() -> bool:
    """Whether this rank is the last of its pipeline stage; the last of all has Megatron's TensorBoard writer."""
    from megatron.core import mpu

    data_ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
    return (
        mpu.get_tensor_model_parallel_rank() == mpu.get_tensor_model_parallel_world_size() - 1
        and mpu.get_data_parallel_rank(with_context_parallel=True) == data_ranks - 1
    )


def _report(iteration: int, milliseconds: dict[str, float]) -> None:
    from megatron.core import mpu
    from megatron.training.global_vars import get_tensorboard_writer

    stages = mpu.get_pipeline_model_parallel_world_size()
    stage = f", stage {mpu.get_pipeline_model_parallel_rank()} of {stages}" if stages > 1 else ""
    print(line(iteration, milliseconds, stage), flush=True)
    if (writer := get_tensorboard_writer()) is not None:
        for part, spent in milliseconds.items():
            writer.add_scalar(f"time split/{part}", spent, iteration)
