"""Packs of samples -> one micro-batch of tensors, in the loader's workers.

Shapes: B rows, S tokens of a row (THD: B=1, S=T packed tokens), L tokens of a document, P patches, D values of a
patch, I images, N documents. A document is a sample in its row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from data.pack import Lost, Pack
from data.sample import Sample
from models.backends.documents import chunk_indices
from models.common.gdn_kernels import FLA_CHUNK
from models.context_parallel import partition_index
from models.spec import BatchShape, ModelInputs

# Device memory is read in lines of this many bytes.
BUFFER_ALIGNMENT = 128
# Trained rows of a batch come in multiples of this.
ROW_ALIGNMENT = 64
# Tokens of the document that stands for a pack whose samples are all broken.
EMPTIED_LENGTH = 8


@dataclass(frozen=True)
class BatchStats:
    """What the log needs to know of a micro-batch: numbers of the host, over all ranks that share it.

    tokens and padding_tokens add up to the tokens that the model processes; flops are forward and backward of the
    tokens, without the padding.
    mean_trained_tokens is trained_tokens averaged over the step's micro-batches and data ranks: what the MoE routers'
    auxiliary losses weigh against. busiest_patches and mean_patches are of the patches that the vision encoder runs on
    in each context-parallel rank. samples are names, for messages.
    """

    documents: int
    tokens: int
    trained_tokens: int
    mean_trained_tokens: float
    padding_tokens: int
    images: int
    patches: int
    busiest_patches: int
    mean_patches: float
    flops: float
    samples: list[str]


@dataclass
class Batch:
    """One micro-batch.

    input_ids: [B, S] int64.
    labels: [B, S] int64, already shifted: labels[i] = input_ids[i + 1] inside a document.
    loss_mask: [B, S] float32, 1 where labels[i] is trained.
    trained_rows: [context-parallel ranks, 1 + K, R] int64 (`partition_batch` leaves this rank's), for the next token
        and each of the model's K further ones: places in a rank's flattened [B, S] whose label is trained, filled up
        with -1 to a length that the host knows, so that nothing waits for the device to count them.
    padding_mask: [B, S] bool, True on padding.
    position_ids: [3, B, S] int64.
    vision_index: [B, S] int64, row of the vision features that replaces this token's embedding; -1 for text. Shared
        features are the ranks' one after another, feature_rows each.
    cu_seqlens: [N + 1] int32 over padded documents, cu_seqlens[-1] == T; None in BSHD.
    chunk_indices: [G, 2] int32, the row's chunks of `FLA_CHUNK` tokens (`models.backends.documents.chunk_indices`), for
        kernels that would find them on the host; None in BSHD.
    max_seqlen: longest padded document (BSHD: S), or more.
    vision: the vision encoder's keyword arguments, pixel_values [P, D] among them, for each context-parallel rank
        when the ranks share the images (`partition_batch` leaves this rank's), else once; None on pipeline stages
        that don't run it.
    feature_rows: rows that each rank's features are padded to before they are gathered; None when every rank encodes
        all images.
    """

    input_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    trained_rows: Tensor
    padding_mask: Tensor
    position_ids: Tensor
    vision_index: Tensor
    cu_seqlens: Tensor | None
    chunk_indices: Tensor | None
    max_seqlen: int
    vision: tuple[dict[str, Tensor | int], ...] | None
    feature_rows: int | None
    stats: BatchStats

    def __copy__(self) -> Self:
        """Megatron keeps a copy of every micro-batch of a step; copying by `__reduce__` would copy the pixels."""
        return replace(self)

    def __reduce__(self) -> tuple[Callable[[FlatBatch], Batch], tuple[FlatBatch]]:
        """Pickled as one buffer: torch.save refuses tensors of several dtypes that share one, as views of it do.

        Megatron saves micro-batches when it suspects a faulty device and wants to run a step again on another.
        """
        return unflatten, (flatten(self),)


def collate(
    packs: Sequence[Pack],
    model_inputs: ModelInputs,
    *,
    alignment: int,
    packed: bool,
    seq_len: int,
    dtype: torch.dtype,
    pad_token_id: int,
    context_ranks: int = 1,
    vision_ranks: int = 1,
    with_vision: bool = True,
) -> Batch:
    """Make a micro-batch.

    Args:
        packs: of the micro-batch. In BSHD each is one sample. An empty one, whose samples are all broken, becomes one
            document of padding.
        model_inputs: what the model computes from ids and grids.
        alignment: each THD document is padded at its end to a multiple of it.
        packed: one THD row of all samples, as long as they are; or a BSHD row of seq_len tokens for each.
        seq_len: no sample is longer.
        dtype: of the pixels.
        pad_token_id: input id and label of padding.
        context_ranks: context-parallel ranks, which share the tokens.
        vision_ranks: context-parallel ranks that share the images; 1 when each encodes all of them.
        with_vision: this pipeline stage runs the vision encoder; elsewhere the samples' pixels aren't looked at.

    Raises:
        ValueError: a sample contradicts itself or is too long; the message names it.
    """
    emptied = (_emptied(model_inputs, pad_token_id, seq_len),)
    samples = [sample for pack in packs for sample in pack or emptied]
    for sample in samples:
        _check(sample, model_inputs, seq_len, with_vision=with_vision)
    lengths = [len(sample.input_ids) for sample in samples]
    if packed:
        padded = [-(-length // alignment) * alignment for length in lengths]
        cu_seqlens = torch.tensor([0, *padded]).cumsum(0).to(torch.int32)
    else:
        padded = [seq_len] * len(samples)
        cu_seqlens = None
    rows = 1 if packed else len(samples)

    def pad_and_concat(parts: list[Tensor], fill: int) -> Tensor:
        """[..., L] of each document -> [..., B, S], padded."""
        grown = [
            torch.nn.functional.pad(part, (0, length - part.size(-1)), value=fill)
            for part, length in zip(parts, padded, strict=True)
        ]
        return torch.cat(grown, dim=-1).unflatten(-1, (rows, -1))

    positions = [model_inputs.position_ids(sample.input_ids, sample.grid_thw) for sample in samples]
    real_tokens = [torch.ones(length, dtype=torch.bool) for length in lengths]
    input_ids = pad_and_concat([sample.input_ids for sample in samples], pad_token_id)
    loss_mask = pad_and_concat([sample.trained[1:] for sample in samples], False)
    grid_thw = torch.cat([sample.grid_thw for sample in samples])
    images = _Images.of(grid_thw, model_inputs, vision_ranks)
    trained_rows = _trained_rows(loss_mask, cu_seqlens, model_inputs.further_tokens, context_ranks)
    trained = tuple((trained_rows >= 0).sum((0, 2)).tolist())
    return Batch(
        input_ids=input_ids,
        labels=pad_and_concat([sample.input_ids[1:] for sample in samples], pad_token_id),
        loss_mask=loss_mask.float(),
        trained_rows=trained_rows,
        padding_mask=~pad_and_concat(real_tokens, False),
        position_ids=pad_and_concat(positions, 0),
        vision_index=_vision_index(pad_and_concat(_placeholders(samples, model_inputs), False), images.feature_index()),
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices(padded, FLA_CHUNK) if packed else None,
        max_seqlen=max(padded),
        vision=_vision(samples, images, model_inputs, dtype) if with_vision else None,
        feature_rows=images.feature_rows if vision_ranks > 1 else None,
        stats=BatchStats(
            documents=len(samples),
            tokens=sum(lengths),
            trained_tokens=int(loss_mask.sum()),
            mean_trained_tokens=float(loss_mask.sum()),  # of this one alone; the loader knows the step
            padding_tokens=sum(padded) - sum(lengths),
            images=len(grid_thw),
            patches=sum(images.patches),
            busiest_patches=max(images.encoded_patches),
            mean_patches=sum(images.encoded_patches) / vision_ranks,
            flops=model_inputs.flops(BatchShape(tuple(lengths), grid_thw, trained)),
            samples=[sample.id for sample in samples],
        ),
    )


def _check(sample: Sample, model_inputs: ModelInputs, seq_len: int, *, with_vision: bool) -> None:
    length = len(sample.input_ids)
    if not 0 < length <= seq_len:
        raise ValueError(f"{sample.id}: {length} tokens; a sample has at least 1 and at most --seq-length {seq_len}")
    if len(sample.trained) != length:
        raise ValueError(f"{sample.id}: {len(sample.trained)} marks of trained tokens for {length} tokens")
    patches = int(sample.grid_thw.prod(-1).sum())
    if with_vision and sample.pixel_values.shape != (patches, model_inputs.patch_dim):
        raise ValueError(
            f"{sample.id}: pixel_values are {tuple(sample.pixel_values.shape)}; its image grids "
            f"{sample.grid_thw.tolist()} and the model say {(patches, model_inputs.patch_dim)}"
        )
    placeholders = int((sample.input_ids == model_inputs.image_token_id).sum())
    features = patches // model_inputs.merge_size**2
    if placeholders != features:
        raise ValueError(
            f"{sample.id}: {placeholders} image tokens (id {model_inputs.image_token_id}) for {features} features "
            f"of its image grids {sample.grid_thw.tolist()}"
        )


def _trained_rows(loss_mask: Tensor, cu_seqlens: Tensor | None, further_tokens: int, ranks: int) -> Tensor:
    """See `Batch.trained_rows`.

    Args:
        loss_mask: [B, S] bool of all ranks.
        further_tokens: K. A token's (k + 1)-th next one is trained where the next one of the k-th next token is, in
            the same document: `models.common.mtp.shift_left` says the same on the device.
    """
    length = loss_mask.size(-1)
    is_last = torch.zeros(length, dtype=torch.bool)
    is_last[(cu_seqlens[1:] - 1).long() if cu_seqlens is not None else [length - 1]] = True
    masks = [loss_mask]
    for _ in range(further_tokens):
        masks.append(masks[-1].roll(-1, dims=-1) & ~is_last)
    of_ranks = []
    for rank in range(ranks):
        held = masks
        if ranks > 1:
            index = partition_index(rank, ranks, length=length, cu_seqlens=cu_seqlens, device=loss_mask.device)
            held = [mask.index_select(-1, index) for mask in masks]
        of_ranks.append([mask.flatten().nonzero().flatten() for mask in held])
    # Rounded up, so that few lengths occur: kernels are chosen and memory is reused by them. Never empty: a batch
    # without a trained token takes part in everything too.
    longest = max(len(rows) for of_rank in of_ranks for rows in of_rank)
    width = max(1, math.ceil(longest / ROW_ALIGNMENT)) * ROW_ALIGNMENT
    filled = [torch.nn.functional.pad(rows, (0, width - len(rows)), value=-1) for rank in of_ranks for rows in rank]
    return torch.stack(filled).view(ranks, 1 + further_tokens, width)


def _emptied(model_inputs: ModelInputs, pad_token_id: int, seq_len: int) -> Sample:
    """A document without anything to train: every rank still runs the step, or some hang.

    To MTP's routers a document is shorter by their depth; they mustn't be left without a token.
    """
    length = min(EMPTIED_LENGTH, seq_len)
    return Sample(
        input_ids=torch.full((length,), pad_token_id),
        trained=torch.zeros(length, dtype=torch.bool),
        pixel_values=torch.empty(0, model_inputs.patch_dim),
        grid_thw=torch.empty(0, 3, dtype=torch.int64),
        id="a pack whose samples are all broken",
    )


def _placeholders(samples: Sequence[Sample], model_inputs: ModelInputs) -> list[Tensor]:
    return [sample.input_ids == model_inputs.image_token_id for sample in samples]


def _vision_index(placeholders: Tensor, feature_index: Tensor) -> Tensor:
    """[B, S] bool and [V] int64 -> [B, S] int64: images come in the order of their placeholders, row after row."""
    index = torch.full(placeholders.shape, -1)
    index[placeholders] = feature_index
    return index


def partition_images(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Spread images over context-parallel ranks: the costliest first, each to the rank with the least so far.

    It doesn't matter who holds their tokens: each image is encoded once, and the ranks' features are gathered
    (`models.base.gather_features`).


    The costliest rank gets at most 4/3 - 1/(3 * ranks) of what the best spread gives it (Graham, "Bounds on
    multiprocessing timing anomalies", 1969). Computed alike everywhere, so that no rank has to be told.

    Args:
        costs: of each image, in any unit.

    Returns:
        The images of each rank, in ascending order; some may have none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for image in sorted(range(len(costs)), key=lambda image: -costs[image]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        loads[rank] += costs[image]
        shares[rank].append(image)
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class _Images:
    """A micro-batch's images, and which rank encodes which.

    grid_thw: [I, 3] int64.
    patches: of each image.
    merged: patches that become one feature.
    shares: the images of each rank, in ascending order.
    """

    grid_thw: Tensor
    patches: list[int]
    merged: int
    shares: list[list[int]]

    @classmethod
    def of(cls, grid_thw: Tensor, model_inputs: ModelInputs, ranks: int) -> Self:
        # FLOPs rather than patches: attention in a frame grows with the square of its patches.
        costs = [model_inputs.flops(BatchShape((), image)) for image in grid_thw.split(1)] if len(grid_thw) else []
        shares = partition_images(costs, ranks)
        return cls(grid_thw, grid_thw.prod(-1).tolist(), model_inputs.merge_size**2, shares)

    @property
    def encoded_patches(self) -> list[int]:
        """Patches that each rank's encoder runs on: one feature's without an image."""
        return [sum(self.patches[image] for image in share) or self.merged for share in self.shares]

    @property
    def feature_rows(self) -> int:
        """Features of the rank with the most."""
        return max(self.encoded_patches) // self.merged

    def feature_index(self) -> Tensor:
        """[V] int64: the row of each feature, image by image, in the ranks' padded features one after another."""
        rows: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(self.patches)
        for rank, share in enumerate(self.shares):
            row = rank * self.feature_rows
            for image in share:
                features = self.patches[image] // self.merged
                rows[image] = torch.arange(row, row + features)
                row += features
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows])


def _vision(
    samples: Sequence[Sample], images: _Images, model_inputs: ModelInputs, dtype: torch.dtype
) -> tuple[dict[str, Tensor | int], ...]:
    """The encoder's inputs of each rank. Without an image, one merged patch of zeros: every rank runs the encoder, or
    some hang."""
    pixels = [image for sample in samples for image in sample.pixel_values.split(sample.grid_thw.prod(-1).tolist())]
    merge = model_inputs.merge_size
    of_ranks = []
    for share in images.shares:
        if share:
            grid_thw = images.grid_thw[share]
            pixel_values = torch.cat([pixels[image] for image in share]).to(dtype)
        else:
            grid_thw = torch.tensor([[1, merge, merge]])
            pixel_values = torch.zeros(merge * merge, model_inputs.patch_dim, dtype=dtype)
        of_ranks.append({"pixel_values": pixel_values, **model_inputs.vision_inputs(grid_thw)})
    return tuple(of_ranks)


def partition_batch(batch: Batch, cp_group: ProcessGroup) -> Batch:
    """This rank's tokens of a batch, and its images where they are shared.

    cu_seqlens and the statistics stay the whole batch's.

    Raises:
        ValueError: the images are shared by another number of ranks, or the tokens can't be cut.
    """
    vision = batch.vision
    if vision is not None and batch.feature_rows is not None:
        if len(vision) != cp_group.size():
            raise ValueError(f"images shared by {len(vision)} ranks in a context-parallel group of {cp_group.size()}")
        vision = (vision[cp_group.rank()],)
    if cp_group.size() == 1:
        return batch
    index = partition_index(
        cp_group.rank(),
        cp_group.size(),
        length=batch.input_ids.size(-1),
        cu_seqlens=batch.cu_seqlens,
        device=batch.input_ids.device,
    )
    if batch.trained_rows.size(0) != cp_group.size():
        raise ValueError(
            f"a batch for {batch.trained_rows.size(0)} context-parallel ranks in a group of {cp_group.size()}"
        )
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(-1, index),
        labels=batch.labels.index_select(-1, index),
        loss_mask=batch.loss_mask.index_select(-1, index),
        trained_rows=batch.trained_rows[cp_group.rank()].unsqueeze(0),
        padding_mask=batch.padding_mask.index_select(-1, index),
        position_ids=batch.position_ids.index_select(-1, index),
        vision_index=batch.vision_index.index_select(-1, index),
        vision=vision,
    )


@dataclass(frozen=True)
class FlatBatch:
    """A batch as one buffer, so that a process, a device or a group of ranks gets it in one copy.

    header: JSON of what isn't in the buffer: each tensor's place, dtype and shape, and the host's numbers.
    buffer: [bytes] uint8.
    lost: planned samples that aren't in it; known to the rank that made it.
    """

    header: bytes
    buffer: Tensor
    lost: tuple[Lost, ...] = ()

    def pin_memory(self) -> FlatBatch:
        """Called by torch's DataLoader."""
        return replace(self, buffer=self.buffer.pin_memory())


def flatten(batch: Batch) -> FlatBatch:
    """Copy the batch's tensors into one buffer."""
    places: dict[str, Any] = {}
    tensors: list[Tensor] = []
    size = 0

    def place(name: str, value: Tensor | int | None) -> None:
        nonlocal size
        if not isinstance(value, Tensor):
            places[name] = value
            return
        start = math.ceil(size / BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        places[name] = [start, str(value.dtype).removeprefix("torch."), list(value.shape)]
        tensors.append(value)
        size = start + value.nbytes

    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name == "vision" and value is not None:
            for rank, of_rank in enumerate(value):
                for name, entry in of_rank.items():
                    place(f"vision.{rank}.{name}", entry)
        elif field.name != "stats":
            place(field.name, value)
    header = {"bytes": size, "places": places, "stats": asdict(batch.stats)}
    flat = FlatBatch(json.dumps(header).encode(), torch.zeros(size, dtype=torch.uint8))
    for name, tensor in zip((n for n, p in places.items() if isinstance(p, list)), tensors, strict=True):
        _view(flat.buffer, places[name]).copy_(tensor)
    return flat


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The batch's tensors by name: a field's, or "vision.RANK.ARGUMENT"."""
    tensors = {field.name: value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)}
    for rank, of_rank in enumerate(batch.vision or ()):
        tensors |= {f"vision.{rank}.{name}": value for name, value in of_rank.items() if isinstance(value, Tensor)}
    return tensors


def with_tensors(batch: Batch, tensors: dict[str, Tensor]) -> Batch:
    """The batch with other tensors in the place of its own, under the names of `tensors_of`."""
    vision = None
    if batch.vision is not None:
        vision = tuple(
            {name: tensors.get(f"vision.{rank}.{name}", value) for name, value in of_rank.items()}
            for rank, of_rank in enumerate(batch.vision)
        )
    own: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "." not in name}
    return replace(batch, vision=vision, **own)


def unflatten(flat: FlatBatch) -> Batch:
    """The batch, as views of the buffer, on its device."""
    header = json.loads(flat.header)
    values: dict[str, Any] = {
        name: _view(flat.buffer, place) if isinstance(place, list) else place
        for name, place in header["places"].items()
    }
    vision: dict[str, dict[str, Tensor | int]] = {}  # by rank
    for name in [name for name in values if name.startswith("vision.")]:
        _, rank, argument = name.split(".", 2)
        vision.setdefault(rank, {})[argument] = values.pop(name)
    values.setdefault("vision", tuple(vision.values()) or None)
    return Batch(**values, stats=BatchStats(**header["stats"]))


def _view(buffer: Tensor, place: list[Any]) -> Tensor:
    start, dtype_name, shape = place
    dtype = getattr(torch, dtype_name)
    return buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


type CollatePacks = Callable[[Sequence[Pack]], Batch]
