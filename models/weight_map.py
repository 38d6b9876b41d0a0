"""Placement of foreign weights in megatron-core parameters: what a mapping consists of and how it is carried out.

A `WeightMap` says for each parameter of the whole model of which slices of which foreign tensors it consists, and how
tensor parallelism cuts it. A rank's share follows from that: `fill` reads the slices that the rank owns, whichever
mixture of TP, PP and EP it is part of, and `shares` hands them out again for export. No arithmetic is involved, only
placement, so a round trip is exact to the bit. Knows no architecture: a model's table is in its `hf_weights.py`.

Torch-free to import: the launcher's preflight compares a folder with the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch import Tensor


class WeightMismatch(ValueError):
    """Weights that don't fit; the message lists every tensor at fault."""

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("weights don't fit:\n  " + "\n  ".join(problems))


class Sliceable(Protocol):
    """A tensor, or something that reads slices of one from a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice | int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class RowRange:
    """`count` consecutive rows (columns, where the parameter is cut by columns) of one foreign tensor."""

    name: str
    start: int
    count: int
    expert: int | None = None  # index into the leading dimension of a tensor that stacks experts


@dataclass(frozen=True)
class Source:
    """Of what a parameter consists.

    Its parts lie one after another along `dim`; each part is a sequence of runs. Tensor parallelism cuts each part by
    itself (a rank holds its share of the gate, then its share of the up projection), or leaves all on every rank.

    shape: the parameter's shape on a rank that holds everything.
    dim: along which dimension the parts lie and are cut.
    sharded: whether tensor parallelism cuts it.
    is_expert: cut by expert tensor parallelism instead.
    foreign_tail: the foreign tensor's dimensions behind the first, where they differ (a convolution kept as a matrix).
    expert: this expert's number and that of all, where a model may keep a rank's in one tensor, [experts, *shape].
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[RowRange, ...], ...]
    dim: int = 0
    sharded: bool = True
    is_expert: bool = False
    foreign_tail: tuple[int, ...] | None = None
    expert: tuple[int, int] | None = None

    @property
    def row_ranges(self) -> Iterator[RowRange]:
        return (run for part in self.parts for run in part)


@dataclass(frozen=True)
class Rank:
    """A rank's position in the groups that cut weights; the default holds everything."""

    tp: int = 0
    tp_size: int = 1
    expert_tp: int = 0
    expert_tp_size: int = 1
    ep: int = 0
    ep_size: int = 1

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> Rank:
        return cls(
            groups.tp.rank(),
            groups.tp.size(),
            groups.expt_tp.rank(),
            groups.expt_tp.size(),
            groups.ep.rank(),
            groups.ep.size(),
        )

    def cut(self, source: Source) -> tuple[int, int]:
        """(rank, size) of the group that cuts this parameter."""
        if not source.sharded:
            return 0, 1
        return (self.expert_tp, self.expert_tp_size) if source.is_expert else (self.tp, self.tp_size)

    def of_source(self, source: Source, shard: LocalShard) -> LocalShard:
        """What a rank holds of one source, given what it holds of the parameter: all of it, or one of the experts."""
        if source.expert is None or len(shard.shape) == len(source.shape):
            return shard
        number, count = source.expert
        return LocalShard(shard.shape[1:], shard.tensor[number - self.ep * count // self.ep_size])


@dataclass(frozen=True)
class TensorSlice:
    """A region that a foreign tensor and a rank's share of a parameter have in common."""

    name: str
    foreign_index: tuple[slice | int, ...]
    index: tuple[slice, ...]

    def within(self, dim: int, low: int, high: int) -> TensorSlice | None:
        """The part of it that lies in `low:high` of the shard's dimension `dim`, counted from `low`; None if none does.

        low:high = 3:8 of a slice that puts rows 10:16 of a foreign tensor into rows 2:8 of the shard:

            shard rows      2   3   4   5   6   7      3:8 are wanted
            foreign rows   10  11  12  13  14  15      so 11:16 go to 0:5
        """
        stacked = len(self.foreign_index) - len(self.index)
        padding = (slice(None),) * (dim + 1 - len(self.index))
        index, foreign = [*self.index, *padding], [*self.foreign_index, *padding]
        if index[dim] == slice(None):
            first, last, start = low, high, low
        else:
            foreign_rows = foreign[dim + stacked]
            assert isinstance(foreign_rows, slice)  # integers stand before the first `stacked` dimensions alone
            first, last = max(low, index[dim].start), min(high, index[dim].stop)
            start = foreign_rows.start + first - index[dim].start
        if first >= last:
            return None
        index[dim] = slice(first - low, last - low)
        foreign[dim + stacked] = slice(start, start + last - first)
        return TensorSlice(self.name, tuple(foreign), tuple(index))


@dataclass(frozen=True)
class CheckpointSlice:
    """Where a checkpoint keeps rows (columns, by the source's `dim`) `start:start + count` of a parameter.

    key: the checkpoint's tensor, which is the whole model's.
    layer: index into a leading dimension of `layers`, where layers or experts share one tensor; None elsewhere.
    offset: the row (column) of the checkpoint's tensor where they begin.
    """

    key: str
    start: int
    count: int
    layer: int | None = None
    layers: int = 0
    offset: int = 0


def tensor_slices(source: Source, rank: int, size: int) -> Iterator[TensorSlice]:
    """The regions of which one rank's shard consists, in the shard's own order.

    A gated MLP's `linear_fc1` with 4 gate and 4 up rows, for rank 1 of 2 (each part is cut by itself):

        parts       gate: g0 g1 g2 g3       up: u0 u1 u2 u3
        rank 1                  g2 g3               u2 u3
        its shard   g2 g3 u2 u3
        yields      gate[2:4] -> shard[0:2],  up[2:4] -> shard[2:4]
    """
    before = (slice(None),) * source.dim
    filled = 0
    for part in source.parts:
        share = sum(run.count for run in part) // size
        low, high = rank * share, (rank + 1) * share
        position = 0
        for run in part:
            first, last = max(low, position), min(high, position + run.count)
            if first < last:
                start = run.start + first - position
                expert = () if run.expert is None else (run.expert,)
                yield TensorSlice(
                    run.name,
                    (*expert, *before, slice(start, start + last - first)),
                    (*before, slice(filled, filled + last - first)),
                )
                filled += last - first
            position += run.count


class WeightMap:
    """One model's mapping.

    sources: canonical parameter name -> Source, for the whole model.
    tensors: foreign name -> shape, for the whole model.
    ignored: (pattern of foreign names, reason) of what is left out.
    copies: foreign name -> another foreign tensor that holds the same, if the folder has it at all.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        ignored: Iterable[tuple[str, str]] = (),
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = sources
        self.tensors = _foreign_shapes(sources)
        self.ignored = tuple(ignored)
        self.copies = dict(copies or {})

    def part(self, prefix: str) -> WeightMap:
        """The mapping of a part of the model: of the parameters whose canonical name begins with `prefix`."""
        part = {name: source for name, source in self.sources.items() if name.startswith(prefix)}
        return WeightMap(part, self.ignored, self.copies)

    def without(self, names: Set[str]) -> WeightMap:
        """The mapping of the other parameters."""
        rest = {name: source for name, source in self.sources.items() if name not in names}
        return WeightMap(rest, self.ignored, self.copies)

    def reason_to_ignore(self, name: str) -> str | None:
        """Why this foreign tensor is left out, or None if it isn't."""
        return next((reason for pattern, reason in self.ignored if re.fullmatch(pattern, name)), None)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What is wrong with a set of foreign tensors as a whole, whichever rank asks."""
        problems = [f"{name}: missing" for name in self.tensors if name not in shapes]
        for name, shape in shapes.items():
            if name in self.tensors:
                if tuple(shape) != self.tensors[name]:
                    problems.append(f"{name}: has shape {tuple(shape)}, expected {self.tensors[name]}")
            elif self.reason_to_ignore(name) is None:
                problems.append(f"{name}: maps to no parameter")
        for name, copy in self.copies.items():
            if copy in shapes and name in self.tensors and tuple(shapes[copy]) != self.tensors[name]:
                problems.append(f"{copy}: has shape {tuple(shapes[copy])}, expected {self.tensors[name]}, as {name}")
        return problems


def _foreign_shapes(sources: Mapping[str, Source]) -> dict[str, tuple[int, ...]]:
    """Shapes of the foreign tensors: as far as the runs reach."""
    reach: dict[str, tuple[int, int]] = {}  # extent along the cut dimension, stacked experts
    users: dict[str, Source] = {}
    for source in sources.values():
        for run in source.row_ranges:
            extent, experts = reach.get(run.name, (0, 0))
            stacked = 0 if run.expert is None else run.expert + 1
            reach[run.name] = max(extent, run.start + run.count), max(experts, stacked)
            users[run.name] = source
    shapes = {}
    for name, source in users.items():
        extent, experts = reach[name]
        shape = (*source.shape[: source.dim], extent, *source.shape[source.dim + 1 :])
        if source.foreign_tail is not None:
            shape = (shape[0], *source.foreign_tail)
        shapes[name] = (experts, *shape) if experts else shape
    return shapes


@dataclass(frozen=True)
class LocalShard:
    """What a rank has of a parameter: all that tensor parallelism gives it, or some rows of that (FSDP).

    shape: the whole share's.
    tensor: the rows from `first_row` on.
    """

    shape: tuple[int, ...]
    tensor: Tensor
    first_row: int = 0

    def tensor_slices(self, of_shard: Iterable[TensorSlice]) -> list[TensorSlice]:
        """Slices of the whole shard -> of the rows that are here."""
        rows = self.tensor.shape[0]
        if rows == self.shape[0]:
            return list(of_shard)
        kept = (tensor_slice.within(0, self.first_row, self.first_row + rows) for tensor_slice in of_shard)
        return [tensor_slice for tensor_slice in kept if tensor_slice is not None]


def whole(parameter: Tensor) -> LocalShard:
    """A parameter that isn't sharded over data-parallel ranks."""
    return LocalShard(tuple(parameter.shape), parameter.detach())


def plan(
    mapping: WeightMap,
    parameters: Iterable[tuple[str, Tensor]],
    rank: Rank,
    problems: list[str],
    local_shard: Callable[[Tensor], LocalShard] = whole,
) -> list[tuple[str, Tensor, Tensor, list[TensorSlice]]]:
    """A rank's parameters by canonical name, each with the rows that are here and where they come from.

    A parameter that stacks experts comes once under each one's name, and that one's rows with it.

    What doesn't fit is added to `problems`.
    """
    planned = []
    for name, parameter in parameters:
        source = mapping.sources.get(name)
        if source is None:
            problems.append(f"{name}: the model's parameter has no source")
            continue
        group_rank, group_size = rank.cut(source)
        shape = list(source.shape)
        shape[source.dim] //= group_size
        own = rank.of_source(source, local_shard(parameter))
        if own.shape != tuple(shape):
            problems.append(f"{name}: the model has shape {own.shape}, expected {tuple(shape)}")
            continue
        planned.append((name, parameter, own.tensor, own.tensor_slices(tensor_slices(source, group_rank, group_size))))
    return planned


def fill(
    mapping: WeightMap,
    parameters: Iterable[tuple[str, Tensor]],
    rank: Rank,
    state: Mapping[str, Sliceable],
    local_shard: Callable[[Tensor], LocalShard] = whole,
) -> None:
    """Copy into a rank's parameters the slices that it owns, cast to each parameter's dtype.

    Args:
        state: foreign name -> tensor or lazy slice, all of the mapping's, also on a rank that needs a few.

    Raises:
        WeightMismatch: before anything is written: tensors missing, unknown or misshapen, parameters without source.
    """
    problems = mapping.check({name: tuple(tensor.shape) for name, tensor in state.items()})
    planned = plan(mapping, parameters, rank, problems, local_shard)
    if problems:
        raise WeightMismatch(problems)
    for _, _, tensor, cut in planned:
        for tensor_slice in cut:
            target = tensor[tensor_slice.index]
            target.copy_(state[tensor_slice.name][tensor_slice.foreign_index].reshape(target.shape))


def shares(
    mapping: WeightMap,
    parameters: Iterable[tuple[str, Tensor]],
    rank: Rank,
    value: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[TensorSlice, Tensor]]:
    """A rank's share of the foreign tensors, parameter by parameter; `value` says what of a parameter is meant, if not
    the parameter itself.

    Raises:
        WeightMismatch: parameters without source.
    """
    problems: list[str] = []
    planned = plan(mapping, parameters, rank, problems, whole if value is None else lambda own: whole(value(own)))
    if problems:
        raise WeightMismatch(problems)
    for _, _, tensor, cut in planned:
        for tensor_slice in cut:
            yield tensor_slice, tensor[tensor_slice.index]


def assemble(mapping: WeightMap, slices_of_ranks: Iterable[tuple[TensorSlice, Tensor]]) -> dict[str, Tensor]:
    """All foreign tensors of a mapping, from the shares of one rank or of several together.

    Args:
        slices_of_ranks: see `shares`; replicas may repeat a slice.

    Raises:
        WeightMismatch: tensors that the slices don't cover.
    """
    import torch

    state: dict[str, Tensor] = {}
    seen: set[tuple[str, str]] = set()
    covered = dict.fromkeys(mapping.tensors, 0)
    for tensor_slice, values in slices_of_ranks:
        name, region = tensor_slice.name, str(tensor_slice.foreign_index)
        if name not in state:
            state[name] = torch.empty(mapping.tensors[name], dtype=values.dtype, device=values.device)
        target = state[name][tensor_slice.foreign_index]
        target.copy_(values.reshape(target.shape))
        if (name, region) not in seen:
            seen.add((name, region))
            covered[name] += target.numel()
    problems = [
        f"{name}: {count} of {prod(mapping.tensors[name])} elements"
        for name, count in covered.items()
        if count != prod(mapping.tensors[name])
    ]
    if problems:
        raise WeightMismatch(problems)
    return state
