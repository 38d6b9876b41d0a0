"""What a CUDA graph of a micro-batch would freeze, were it a number of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from tests.models.test_hf_parity import make_sample

MEANS = (7.0, 7.0, 7.0, 7.0, 11.5)  # of the micro-batches' steps; the fourth is captured


class Recorder(nn.Module):
    """A model that notes what its routers would read."""

    def __init__(self) -> None:
        from models.common.moe import StepStatistics

        super().__init__()
        self.step = StepStatistics()
        self.language_model = nn.Module()
        self.language_model.log_mtp_groups = lambda: None
        self.seen: list[Any] = []

    def forward(self, **inputs: Any) -> Tensor:
        self.seen.append(self.step.mean_trained_tokens)
        return inputs["labels"].float()


class FakeGraph:
    """Runs the function once, as a capture does, and then only fills the buffers that it read."""

    def __init__(self, function: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], *_: Any):
        self.buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        self.output = function(self.buffers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in inputs.items():
            self.buffers[name].copy_(tensor)
        return self.output


def test_routers_in_a_graph_read_each_step_s_mean_of_trained_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import forward_step
    from data.batch import collate
    from models.qwen35_vl.inputs import Qwen35VLInputs

    architecture = VARIANTS["tiny"]
    batch = collate(
        [[make_sample(architecture, [], torch.float32)]],
        Qwen35VLInputs(architecture),
        alignment=1,
        packed=True,
        seq_len=512,
        dtype=torch.float32,
        pad_token_id=0,
    )
    batch = replace(batch, trained_rows=batch.trained_rows[0])
    monkeypatch.setattr(forward_step, "GraphedFunction", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(forward_step, "model_inputs", lambda batch: {"labels": batch.labels})
    model, graphs = Recorder(), forward_step.MicroBatchGraphs()
    for mean in MEANS:
        model.step.mean_trained_tokens = mean
        graphs.run(model, replace(batch, stats=replace(batch.stats, mean_trained_tokens=mean)))
    *numbers, captured = model.seen
    assert numbers == list(MEANS[: graphs.WARM_UP])
    assert isinstance(captured, Tensor) and captured.item() == MEANS[-1]
