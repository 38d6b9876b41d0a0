"""Where a step's time goes: which part a moment is counted to. tests/runtime/test_collectives_and_syncs.py has the real
model under Megatron's schedule, tests/test_train.py what a run prints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime import time_split
from runtime.time_split import (
    COMMUNICATION,
    DATA,
    DECODER,
    HOST_WAITING,
    LOSS,
    MODEL,
    OPTIMIZER,
    OTHER,
    VISION,
    Mark,
    MarkedTimers,
    TimeSplit,
    part_of_timer,
    summed_up,
)


class Event:
    """The device's clock in milliseconds, as tests set it."""

    now = 0.0
    done = True

    def __init__(self, enable_timing: bool = False) -> None:
        self.at: float | None = None

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at

    def query(self) -> bool:
        return Event.done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(time_split, "unwrapped", lambda chunk: chunk)
    Event.now, Event.done = 0.0, True
    return Event


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("batch-generator", DATA),
        ("forward-compute", MODEL),
        ("backward-compute", MODEL),
        ("forward-backward", None),
        ("forward-backward-send-forward-backward-recv", COMMUNICATION),
        ("all-grads-sync", COMMUNICATION),
        ("params-all-gather", COMMUNICATION),
        ("embedding-grads-all-reduce", COMMUNICATION),
        ("optimizer", OPTIMIZER),
        ("optimizer-inner-step", None),
        ("interval-time", None),
    ],
)
def test_what_megatrons_timers_enclose(name: str, part: str | None) -> None:
    assert part_of_timer(name, MODEL) == part


def mark(part: str, device: float, host: float) -> Mark:
    event = Event()
    event.at = device
    return Mark(part, event, host * 1e-3)


def test_parts_add_up_and_the_host_waits_by_how_much_it_is_ahead() -> None:
    """The device comes to the optimizer 30 ms after the host, and has caught up when the step begins."""
    marks = [
        mark(OTHER, 100, 500),
        mark(DECODER, 101, 501),
        mark(OPTIMIZER, 141, 511),
        mark(COMMUNICATION, 150, 550),
        mark(OPTIMIZER, 155, 551),
        mark(OTHER, 160, 560),
        mark(OTHER, 161, 561),
    ]
    spent = summed_up(marks)
    assert spent == pytest.approx({DECODER: 40, OPTIMIZER: 14, COMMUNICATION: 5, OTHER: 2, HOST_WAITING: 30})
    assert sum(spent.values()) - spent[HOST_WAITING] == pytest.approx(61)
    assert list(spent) == [DECODER, OPTIMIZER, COMMUNICATION, OTHER, HOST_WAITING]
    assert time_split.line(7, spent) == (
        "> iteration 7: the step's 61.0 ms: decoder 40.0, optimizer 14.0, communication 5.0, other 2.0; "
        "host waiting 30.0"
    )


class Timers:
    """Megatron's, which note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        timer = nn.Module()
        timer.start = lambda barrier=False: self.calls.append(f"start {name}")
        timer.stop = lambda: self.calls.append(f"stop {name}")
        return timer

    def log(self, names: list[str]) -> list[str]:
        return names


def test_timers_mark_parts_in_measured_steps_alone(clock: type[Event]) -> None:
    reported: list[Any] = []
    split = TimeSplit(lambda *what: reported.append(what), graphed=True)
    timers = MarkedTimers(inner := Timers(), split)

    def step() -> None:
        clock.now += 1
        timers("forward-backward", log_level=1).start(barrier=False)
        timers("forward-compute", log_level=2).start()
        timers("batch-generator", log_level=2).start()
        clock.now += 2
        timers("batch-generator").stop()
        clock.now += 30
        timers("forward-compute").stop()
        timers("all-grads-sync", log_level=1).start()
        clock.now += 4
        timers("all-grads-sync").stop()
        timers("forward-backward").stop()

    step()
    split.report_finished()
    assert not split.measuring and not reported
    with split.step(5, []):
        step()
    clock.done = False
    split.report_finished()
    assert not reported  # nothing waits for the device
    clock.done = True
    split.report_finished()
    split.report_finished()
    assert reported == [(5, {DATA: 2, MODEL: 30, COMMUNICATION: 4, OTHER: 1, HOST_WAITING: 0})]
    assert inner.calls[:8] == inner.calls[8:] and len(inner.calls) == 16
    assert timers.log(["optimizer"]) == ["optimizer"]


def test_a_step_that_fails_is_not_reported(clock: type[Event]) -> None:
    reported: list[Any] = []
    split = TimeSplit(lambda *what: reported.append(what), graphed=True)
    with pytest.raises(RuntimeError, match="lost"), split.step(5, []):
        split.begin(COMMUNICATION)
        raise RuntimeError("lost")
    split.report_finished()
    assert not split.measuring and not reported


class Works(torch.autograd.Function):
    """x times a weight, which takes the device a while in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backward_time = backward
        Event.now += forward
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        Event.now += ctx.backward_time
        return grad * weight, (grad * x).sum(), None, None


class Layer(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.times = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return Works.apply(x, self.weight, *self.times)


class Stage(nn.Module):
    """What a `MultimodalModel` is to the split: a vision encoder and an embedding, layers, an output layer."""

    post_process = True

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Layer(1, 10)
        self.language_model = nn.ModuleDict(
            {"embedding": Layer(100, 1_000), "layers": Layer(10_000, 100_000), "output_layer": Layer(1e6, 1e7)}
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.language_model
        text = parts["embedding"](x)
        return parts["output_layer"](parts["layers"](text + self.vision_model(x)))


@pytest.mark.parametrize("frozen", [False, True])
def test_backward_is_told_apart_too(clock: type[Event], frozen: bool) -> None:
    """Even where the vision encoder isn't trained; afterwards the modules have no hooks."""
    reported: list[Any] = []
    split = TimeSplit(lambda *what: reported.append(what))
    stage = Stage()
    stage.vision_model.requires_grad_(not frozen)
    with split.step(1, [stage]):
        split.begin(DECODER)
        losses = stage(torch.ones(3))
        split.end()
        split.begin(DECODER)
        losses.sum().backward()
        split.end()
    split.report_finished()
    expected = {VISION: 1 if frozen else 11, DECODER: 111_100, LOSS: 11e6, OTHER: 0, HOST_WAITING: 0}
    assert reported == [(1, expected)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stage.modules())
