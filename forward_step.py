"""One micro-batch: get the batch, run the model, make the loss.

Shapes: B rows, S tokens (the CP rank's share), T packed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor, nn

from data.batch import Batch, BatchStats, partition_batch, tensors_of, with_tensors
from data.step_record import MicroBatch, StepRecord
from data.throughput import Throughput
from models.common.packed import PackedDocuments
from runtime import empty_steps, first_step
from runtime.cuda_graphs import GraphedFunction
from runtime.peak_flops import peak_tflops

_MEAN = "mean_trained_tokens"  # beside a batch's tensors, in what a graph reads
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class ForwardStep:
    """What Megatron's schedules call for every micro-batch; holds the run's throughput clock.

    Args:
        bad_batches: `--dump-bad-batch`: where the batch of a step that goes wrong is saved.
        cuda_graphs: run training micro-batches as CUDA graphs, one for each of their shapes.
    """

    def __init__(self, bad_batches: Path | None = None, *, cuda_graphs: bool = False) -> None:
        self._throughput: Throughput | None = None
        self._record = StepRecord(bad_batches)
        self._graphs = MicroBatchGraphs() if cuda_graphs else None

    def __call__(self, data_iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch on this stage.

        Args:
            data_iterator: yields this rank's batches; see `data.loader.BatchReader`.
            model: this stage, in Megatron's wrappers.

        Returns:
            The stage's output ([B, S] losses on the last one) and the function that makes the loss of it.
        """
        timers = get_timers()
        stage = get_attr_wrapped_model(model, "vision_model", return_model_obj=True)
        timers("batch-generator", log_level=2).start()
        batch = next(data_iterator)
        entry = None
        if model.training:
            first_step.announce()
            entry = self._record.add(get_args().curr_iteration + 1, batch)
            empty_steps.TOKENS.add(batch.stats.trained_tokens)
        batch = partition_batch(batch, mpu.get_context_parallel_group())
        timers("batch-generator").stop()
        # Read by the MoE routers, whose auxiliary losses then don't depend on the share of trained tokens.
        stage.step.mean_trained_tokens = batch.stats.mean_trained_tokens

        if self._graphs is not None and model.training:
            output = self._graphs.run(model, batch)
        else:
            output = model(**model_inputs(batch))
        report = self._rates(batch.stats, training=model.training) if stage.post_process else {}
        return output, partial(masked_loss, loss_mask=batch.loss_mask, rates=report, record=entry)

    @contextmanager
    def failure_explained(self) -> Iterator[None]:
        """Add to Megatron's error about NaN or infinity (`RerunStateMachine.validate_result`) which samples made it."""
        try:
            yield
        except RuntimeError as error:
            if "Unexpected result" in str(error):
                error.add_note(self._record.explain(torch.distributed.get_rank()))
            raise

    def _rates(self, stats: BatchStats, *, training: bool) -> dict[str, tuple[float, float]]:
        if self._throughput is None:
            context_ranks = mpu.get_context_parallel_world_size()
            args = get_args()
            # In float32 another peak would count.
            half = args.bf16 or args.fp16
            self._throughput = Throughput(
                model_ranks=context_ranks
                * mpu.get_tensor_model_parallel_world_size()
                * mpu.get_pipeline_model_parallel_world_size(),
                context_ranks=context_ranks,
                data_ranks=mpu.get_data_parallel_world_size(),
                peak_tflops=peak_tflops(torch.cuda.get_device_name()) if half else None,
            )
        if training:
            return self._throughput.lap(stats)
        self._throughput.pause()
        return {}


class MicroBatchGraphs:
    """Training micro-batches as CUDA graphs, whose first few of a shape run without.

    Only one micro-batch is between forward and backward at a time, since there is no pipeline, so all graphs share
    their memory.
    """

    # Kernels are compiled and tuned in the first, and memory is as it will be after the second.
    WARM_UP = 3
    MOST = 16  # graphs; batches of yet other shapes run without

    def __init__(self) -> None:
        self._graphs: dict[Hashable, GraphedFunction] = {}
        self._seen: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, S] losses, as `model(**model_inputs(batch))` returns them."""
        tensors = tensors_of(batch)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()), batch.max_seqlen
        step = get_attr_wrapped_model(model, "step")
        # A tensor, for the graph would keep a number: the routers read it (see `StepStatistics`).
        mean_trained_tokens = torch.full((), batch.stats.mean_trained_tokens, device=batch.input_ids.device)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= self.WARM_UP or len(self._graphs) == self.MOST:
                return model(**model_inputs(batch))
            self._pool = self._pool or torch.cuda.graph_pool_handle()

            def micro_batch(values: Mapping[str, Tensor]) -> Tensor:
                step.mean_trained_tokens = values[_MEAN]
                own = {name: values[name] for name in tensors}
                return model(**model_inputs(with_tensors(batch, own)))

            self._graphs[key] = GraphedFunction(
                micro_batch,
                {**tensors, _MEAN: mean_trained_tokens},
                (parameter for parameter in model.parameters() if parameter.requires_grad),
                self._pool,
            )
            print(f"> CUDA graphs of micro-batch shape {len(self._graphs)} captured", flush=True)
        get_attr_wrapped_model(model, "language_model").log_mtp_groups()
        return self._graphs[key]({**tensors, _MEAN: mean_trained_tokens})


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of `MultimodalModel.forward`."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "vision_index": batch.vision_index,
        "vision": batch.vision[0] if batch.vision else None,
        "feature_rows": batch.feature_rows,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "trained_rows": batch.trained_rows[0],
        "padding_mask": batch.padding_mask,
        "packed_seq_params": packed_seq_params(batch),
    }


def packed_seq_params(batch: Batch) -> PackedDocuments | None:
    """THD documents for attention and GatedDeltaNet; None in BSHD.

    Padding at a document's end counts as part of it: under causal masks it reaches no real token, and attention
    kernels for documents without gaps are faster.
    """
    if batch.cu_seqlens is None:
        return None
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=batch.cu_seqlens,
        cu_seqlens_kv_padded=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        chunk_indices=batch.chunk_indices,
    )


def masked_loss(
    losses: Tensor,
    *,
    loss_mask: Tensor,
    rates: dict[str, tuple[float, float]],
    record: MicroBatch | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the trained tokens' losses, their number, and what the log prints.

    Megatron divides the gradients by the number of trained tokens of the whole global batch
    (`--calculate-per-token-loss`), so the loss doesn't depend on the layout.

    Args:
        losses: [B, S] per token, this CP rank's.
        loss_mask: [B, S] float32.
        rates: (amount, divisor) pairs for the log.
        record: takes note of the loss.

    Returns:
        Sum (float32 scalar), count (int32 scalar), report of [sum, count] pairs.
    """
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    if record is not None:
        record.loss = total.detach()
    report = {"lm loss": torch.stack([total.detach(), count])}
    if rates:
        # One copy to the device for all figures; pinned, so that the host doesn't wait for it.
        figures = torch.tensor(list(rates.values()), dtype=torch.float32)
        if losses.is_cuda:
            figures = figures.pin_memory()
        report |= zip(rates, figures.to(losses.device, non_blocking=True), strict=True)
    return total, count.int(), report
