"""The output layer and its cross-entropy as one operation, which never holds the logits of all tokens in float32.

The vocabulary is walked in chunks. A chunk's logits are one matrix product in the model's dtype; softmax statistics are
kept per row in float32 (float64 for float64). Chunks of the vocabulary rather than of the rows, because the weight is
the large operand: each row of its gradient is then one product over all tokens, written once, and only the small
gradient of the hidden states is added up over chunks, in float32.

In backward a chunk's logits are computed again (one more product than the minimum), or were kept in the model's dtype.

R rows (tokens whose loss is wanted), H hidden, V vocabulary, V' = V / TP of this tensor-parallel rank, C columns of a
chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from models.common.kernel_check import relative_errors, what_is_wrong
from models.common.main_grad import main_grad_of, stand_in

IGNORED = -1  # the label of a row that has none: its loss, its hit and its gradient are zero
# Logits of one chunk. On a GPU large enough for efficient matrix products and small beside the activations; on a CPU
# about what its caches hold.
CHUNK_BYTES = {"cuda": 256 * 2**20, "cpu": 2 * 2**20}
COLUMN_ALIGNMENT = 128  # columns of every chunk but the last: what matrix-product kernels tile by
SMALLEST_CHUNK = 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    keep_logits: bool = False,
    accumulate_main_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T) at the labels, in nats, without the logits of all rows.

    Gradients are exact: those of the plain product and cross-entropy but for rounding. The caller brings hidden states
    that are alike on all ranks of the group, and sums their gradients over it: each rank's is its vocabulary's share.

    Args:
        hidden: [R, H], float16, bfloat16, float32 or float64; R may be 0.
        weight: [V', H] in the same dtype, this rank's rows of the vocabulary, which are consecutive.
        labels: [R] int64 in the whole vocabulary; a negative one is ignored.
        tp_group: ranks that share the vocabulary; None for one.
        keep_logits: keep [R, V'] in hidden's dtype for backward rather than compute it again.
        accumulate_main_grad: add the weight's gradient to `weight.main_grad` (float32) where it is made, as Megatron's
            `--gradient-accumulation-fusion` does, and hand autograd what Megatron's hooks then ignore. Has no effect
            on a weight without `main_grad` and on Megatron-FSDP's, whose buffers aren't there for adding.

    Returns:
        Losses [R] in float32 (float64 for float64), and hits [R] bool: the label has the largest logit. Of equal
        logits the first counts.

    Raises:
        ValueError: shapes or dtypes that don't belong together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [R, H], weight [V, H] and labels [R] expected; got {tuple(hidden.shape)}, {tuple(weight.shape)} "
            f"and {tuple(labels.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: they have to be of one dtype")
    options = _Options(tp_group, keep_logits, accumulate_main_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, options)


@dataclass(frozen=True)
class _Options:
    tp_group: ProcessGroup | None
    keep_logits: bool
    accumulate_main_grad: bool


@dataclass
class _Statistics:
    """What is known of each row's softmax after some chunks; all [R].

    maximum: largest logit so far; total: sum of exp(logit - maximum); target: the label's logit, 0 where the label
    is elsewhere; best: column of the largest logit, the first of equals.
    """

    maximum: Tensor
    total: Tensor
    target: Tensor
    best: Tensor

    @classmethod
    def empty(cls, hidden: Tensor) -> _Statistics:
        zeros = hidden.new_zeros(hidden.size(0), dtype=torch.promote_types(hidden.dtype, torch.float32))
        return cls(zeros - torch.inf, zeros.clone(), zeros.clone(), zeros.long())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        tp_group = options.tp_group
        # Labels as columns of this rank's weight; another rank's, and ignored ones, are outside of it.
        columns = labels if tp_group is None else labels - tp_group.rank() * weight.size(0)
        statistics = _Statistics.empty(hidden)
        kept = []
        for start, stop in _chunks(hidden, weight.size(0)):
            logits = hidden @ weight[start:stop].mT
            _add_chunk(statistics, logits, columns, start)
            if options.keep_logits:
                kept.append(logits)
        hits = statistics.best == columns
        if tp_group is not None and tp_group.size() > 1:
            hits = _reduce(statistics, hits, tp_group)
        trained = labels >= 0
        losses = (statistics.total.log() + (statistics.maximum - statistics.target)).masked_fill(~trained, 0.0)
        hits &= trained
        ctx.save_for_backward(hidden, weight, columns, trained, statistics.maximum, statistics.total, *kept)
        ctx.options = options
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, columns, trained, maximum, total, *kept = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        scale = loss_grad.masked_fill(~trained, 0.0)
        hidden_grad = torch.zeros_like(hidden, dtype=maximum.dtype) if needs_hidden else None
        main_grad = main_grad_of(weight) if needs_weight and ctx.options.accumulate_main_grad else None
        weight_grad = torch.empty_like(weight) if needs_weight and main_grad is None else None
        for index, (start, stop) in enumerate(_chunks(hidden, weight.size(0))):
            rows = weight[start:stop]
            logits = kept[index] if kept else hidden @ rows.mT
            grads = _logits_to_grads(logits, columns, maximum, total, scale, start)  # [R, C] in hidden's dtype
            if hidden_grad is not None:
                _add_product(hidden_grad, grads, rows)
            if main_grad is not None:
                _add_product(main_grad[start:stop], grads.mT, hidden)
            elif weight_grad is not None:
                torch.mm(grads.mT, hidden, out=weight_grad[start:stop])
        if main_grad is not None:
            weight_grad = stand_in(weight)
        return None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, None, None


def _chunks(hidden: Tensor, columns: int) -> list[tuple[int, int]]:
    """First and last + 1 column of each chunk; a function of sizes, so that backward finds forward's."""
    widest = CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (hidden.itemsize * max(1, hidden.size(0)))
    count = -(-columns // max(widest, SMALLEST_CHUNK))
    width = -(-columns // (count * COLUMN_ALIGNMENT)) * COLUMN_ALIGNMENT
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def _add_chunk(statistics: _Statistics, logits: Tensor, columns: Tensor, start: int) -> None:
    """Take the columns from `start` on, logits [R, C], into the statistics; columns [R] are the labels'."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from models.common import cross_entropy_kernels

        cross_entropy_kernels.add_chunk(
            logits, columns, start, statistics.maximum, statistics.total, statistics.target, statistics.best
        )
        return
    largest, where = logits.max(dim=-1)
    largest = largest.to(statistics.maximum.dtype)
    maximum = torch.maximum(statistics.maximum, largest)
    shifted = (logits.to(maximum.dtype) - maximum.unsqueeze(-1)).exp_()
    statistics.total = statistics.total * (statistics.maximum - maximum).exp() + shifted.sum(dim=-1)
    statistics.best = torch.where(largest > statistics.maximum, start + where, statistics.best)
    statistics.maximum = maximum
    inside, place = _places(columns, start, logits.size(-1))
    target = logits.gather(-1, place).squeeze(-1).to(maximum.dtype)
    statistics.target = torch.where(inside, target, statistics.target)


def _reduce(statistics: _Statistics, hits: Tensor, group: ProcessGroup) -> Tensor:
    """Make each rank's statistics those of the whole vocabulary: two small collectives. Returns the whole's hits."""
    maximum = statistics.maximum.clone()
    torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=group)
    hits = hits & (statistics.maximum == maximum)
    total = statistics.total * (statistics.maximum - maximum).exp()
    sums = torch.stack([total, statistics.target, hits.to(total.dtype)])
    torch.distributed.all_reduce(sums, group=group)
    statistics.maximum = maximum
    statistics.total, statistics.target, hits = sums.unbind()
    return hits > 0


def _logits_to_grads(
    logits: Tensor, columns: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, start: int
) -> Tensor:
    """[R, C] logits -> scale * (softmax - one at the label), in their place, rounded to their dtype at the end."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from models.common import cross_entropy_kernels

        cross_entropy_kernels.logits_to_grads(logits, columns, start, maximum, total, scale)
        return logits
    # Divided by the sum rather than reduced by its logarithm, whose rounding would grow in the exponential.
    softmax = (logits.to(maximum.dtype) - maximum.unsqueeze(-1)).exp_() / total.unsqueeze(-1)
    inside, place = _places(columns, start, logits.size(-1))
    softmax.scatter_add_(-1, place, -inside.to(softmax.dtype).unsqueeze(-1))
    # A row without a label has a scale of zero, but may hold infinities.
    grads = (softmax * scale.unsqueeze(-1)).masked_fill_((scale == 0).unsqueeze(-1), 0.0)
    return logits.copy_(grads)


def _places(columns: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """[R] bool, whether the label is in the chunk, and [R, 1] where in it (some column of it otherwise)."""
    place = columns - start
    inside = (place >= 0) & (place < width)
    return inside, place.clamp(0, width - 1).unsqueeze(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # this torch has no such product on the CPU
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


# Several times what bfloat16 logits cost.
CHECK_TOLERANCE = 0.03


@functools.cache
def check_kernels() -> None:
    """Compare losses and gradients on this GPU, in bfloat16, with torch's own in float64: a second at most.

    Raises:
        RuntimeError: a tensor differs by more than bfloat16's rounding explains; the message names it.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    errors = kernel_errors(device)
    if wrong := what_is_wrong(errors, CHECK_TOLERANCE):
        import triton

        raise RuntimeError(
            f"the output layer's loss is computed wrongly on this {torch.cuda.get_device_name(device)} with Triton "
            f"{triton.__version__}: relative to torch in float64 (bfloat16 explains {CHECK_TOLERANCE}) "
            f"{wrong}. No flag replaces its kernels: install the Triton of requirements.lock"
        )


def kernel_errors(device: torch.device) -> dict[str, float]:
    """Relative errors of bfloat16 losses and gradients against torch's in float64, by name; NaN where they are NaN."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    rows, width, vocabulary = 96, 64, 3 * SMALLEST_CHUNK + 200
    hidden, weight = normal(rows, width), normal(vocabulary, width) / 4
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    labels[0] = IGNORED
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight)]
        if dtype == torch.float64:
            losses = F.cross_entropy(leaves[0] @ leaves[1].mT, labels, ignore_index=IGNORED, reduction="none")
        else:
            losses, _ = linear_cross_entropy(leaves[0], leaves[1], labels)
        results.append([losses.detach(), *torch.autograd.grad(losses.sum(), leaves)])
    names = ("loss", "gradient of hidden", "gradient of weight")
    exact, actual = (dict(zip(names, tensors, strict=True)) for tensors in results)
    return relative_errors(actual, exact)
