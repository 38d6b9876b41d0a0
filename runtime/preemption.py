"""SIGTERM: finish the step, save, end with exit code 0.

Slurm, Kubernetes and spot instances send it before they take the machine, to one rank, to those of one node or to all.
All ranks have to stop after the same step. Megatron's `--exit-signal-handler` gathers a number from every rank after
every step and waits for it on the device (training/dist_signal_handler.py, 0.19.2); here the ranks agree over gloo on
the host, one step behind, so that nobody waits.
"""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class ExitSignal:
    """What Megatron's training loop asks after every step; in the place of its `DistributedSignalHandler`.

    Args:
        numbers: signals that ask the run to end.
        timeout: how long a rank waits for the slowest one.

    Attributes:
        received: this rank was asked to end.
        agreed: the ranks have agreed to end: the training loop has saved, or is about to.
    """

    def __init__(self, numbers: set[signal.Signals], timeout: timedelta) -> None:
        self.received = False
        self.agreed = False
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[Any, torch.Tensor] | None = None  # the collective under way, and its result
        for number in numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            # Not print(), which the signal may have interrupted.
            name, rank = signal.Signals(number).name, os.environ.get("RANK", "0")
            os.write(2, f"rank {rank}: {name}: the run saves and ends after one of the next steps\n".encode())
        self.received = True

    def signals_received(self) -> list[bool]:
        """Whether to end after this step, the same on all ranks; collective, and called once a step by each.

        The answer is to the question of the step before. It is a host's number that gloo's own threads bring, so that
        neither the device nor, unless a rank is a whole step ahead, the host waits.
        """
        if dist.get_world_size() == 1:
            self.agreed = self.received
            return [self.agreed]
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        if self._asked is not None:
            work, answer = self._asked
            work.wait()
            self.agreed = bool(answer.item())  # on the host
        if not self.agreed:
            answer = torch.tensor([self.received], dtype=torch.int32)
            self._asked = dist.all_reduce(answer, dist.ReduceOp.MAX, self._group, async_op=True), answer
        return [self.agreed]


def install(args: Namespace) -> ExitSignal:
    """Make Megatron's training loop save and end on SIGTERM, and on `--exit-signal` if that is another.

    Args:
        args: Megatron's resolved arguments, global by now; `exit_signal_handler` becomes True.
    """
    from megatron.training import global_vars

    handler = ExitSignal({signal.SIGTERM, args.exit_signal}, timedelta(minutes=args.distributed_timeout_minutes))
    args.exit_signal_handler = True
    # Where `get_signal_handler()` finds it; the loop asks nothing of it but `signals_received()`.
    global_vars._GLOBAL_SIGNAL_HANDLER = handler
    return handler
