"""What a micro-batch lacks, from the pipeline stage that reads pixels to the stages that don't.

Every stage loads its own tokens, and later ones decode no image. So the first stage's loading rank says which of the
planned samples are lost, on the host, to the loading ranks of the others; within a stage the batch itself tells.
Sending doesn't wait for the receiver: stages reach a micro-batch at different times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor


class Verdicts:
    """Between the loading ranks of the stages of one pipeline.

    Args:
        group: these ranks on gloo, the first stage's first.
        tag: of the messages: one for each reader, since stages are not always at the same one.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int) -> None:
        self._group = group
        self._tag = tag
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def decides(self) -> bool:
        """This rank reads pixels."""
        return self._group.rank() == 0

    def send(self, lost: Collection[int]) -> None:
        """Tell the other stages the places that are lost."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        parts = [torch.tensor([len(lost)])] + ([torch.tensor(sorted(lost))] if lost else [])
        for rank in range(1, self._group.size()):
            for part in parts:
                work = dist.isend(part, group=self._group, group_dst=rank, tag=self._tag)
                assert work is not None  # this rank is one of the group
                self._sent.append((work, part))  # which has to live until it is sent

    def receive(self) -> list[int]:
        """The places that are lost of the next micro-batch; the first stage has read it already."""
        count = torch.zeros(1, dtype=torch.int64)
        dist.recv(count, group=self._group, group_src=0, tag=self._tag)
        places = torch.zeros(int(count), dtype=torch.int64)
        if len(places):
            dist.recv(places, group=self._group, group_src=0, tag=self._tag)
        return places.tolist()
