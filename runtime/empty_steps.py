"""A step without a trained token, all of whose samples turned out broken, changes no weight.

Its gradients are zero, but for the routers' auxiliary losses, and still momentum and weight decay would move weights.
Megatron adds up the trained tokens on the device (core/distributed/finalize_model_grads.py, 0.19.2), where the host
would have to wait for them. The batches' own counts are on the host: the ranks reduce these over gloo, and only a rank
that has trained nothing waits for the answer.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StepTokens:
    """Counts the trained tokens of the step under way.

    Attributes:
        skipped: the last step was one without.
    """

    def __init__(self) -> None:
        self.skipped = False
        self._counted: int | None = None  # of this rank's micro-batches; None: nobody counts
        self._group: dist.ProcessGroup | None = None
        self._under_way: tuple[Any, Tensor] | None = None  # the collective and its result

    def add(self, tokens: int) -> None:
        """Take note of a micro-batch, on every rank that works on it."""
        self._counted = (self._counted or 0) + tokens

    def end_step(self, timeout: timedelta) -> bool:
        """Whether the step can change weights, the same on all ranks; collective, and called once a step by each.

        It can as well where no micro-batch was counted: another training loop's.

        Args:
            timeout: how long a rank waits for the slowest one.
        """
        counted, self._counted = self._counted, None
        self.skipped = counted is not None and not self._any_rank(counted, timeout)
        return not self.skipped

    def _any_rank(self, counted: int, timeout: timedelta) -> bool:
        if dist.get_world_size() == 1:
            return counted > 0
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        if self._under_way is not None:
            self._under_way[0].wait()  # the last step's, long done
        most = torch.tensor([counted])
        self._under_way = dist.all_reduce(most, dist.ReduceOp.MAX, self._group, async_op=True), most
        if counted:
            return True
        self._under_way[0].wait()
        return bool(most.item())  # on the host


TOKENS = StepTokens()


@functools.cache
def install() -> None:
    """Skip the optimizer in such a step, as Megatron does after an overflow in fp16; again changes nothing.

    `pretrain()` makes the optimizer by a function that it calls by name, and takes no other.
    """
    from megatron.training import training
    from megatron.training.global_vars import get_args

    make, log = training.get_megatron_optimizer, training.training_log

    @functools.wraps(make)
    def make_skipping(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        step = optimizer.step

        @functools.wraps(step)
        def step_if_trained() -> tuple[bool, Any, Any]:
            options = get_args()
            if TOKENS.end_step(timedelta(minutes=options.distributed_timeout_minutes)):
                return step()
            if dist.get_rank() == 0:
                print(
                    f"> iteration {options.curr_iteration + 1}: skipped, no sample of it can be trained on; weights "
                    "and optimizer stay as they are",
                    flush=True,
                )
            return False, None, None

        optimizer.step = step_if_trained
        return optimizer

    @functools.wraps(log)
    def log_without_loss(losses: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        # The mean over no token is no NaN to count.
        return log({} if TOKENS.skipped else losses, *args, **kwargs)

    training.get_megatron_optimizer, training.training_log = make_skipping, log_without_loss
