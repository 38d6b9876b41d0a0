"""On a GPU: none of our own lines makes the host wait for the device, forward and backward, while the time is split.

What megatron-core, Transformer Engine and flash-linear-attention do is printed.
tests/runtime/test_collectives_and_syncs.py counts on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.qwen35_vl.configuration import VARIANTS
from tests.build_model import build_model
from tests.host_syncs import counted_on_gpu
from tests.models.test_hf_parity import make_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("single_rank"),
]

# Head sizes that the GPU kernels are made for.
_HEADS = {"kv_channels": 64, "mrope_section": (3, 3, 2), "linear_key_head_dim": 64, "linear_value_head_dim": 64}
GRIDS = ([], [[1, 6, 10]], [[1, 4, 4], [1, 8, 6], [1, 2, 10]])


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_moe"])
def test_the_host_waits_for_nothing(variant: str, impl: str, tmp_path: Path) -> None:
    from data.batch import collate, flatten, partition_batch, unflatten
    from forward_step import masked_loss, model_inputs
    from models.qwen35_vl.inputs import Qwen35VLInputs
    from runtime.time_split import TimeSplit

    architecture = VARIANTS[variant].replace(**_HEADS, vocab_size=1024)
    flags = ("--transformer-impl", impl, "--allow-slow-kernels", "--bf16")
    model = build_model(architecture, tmp_path, torch.bfloat16, *flags)
    model = model.cuda().to(torch.bfloat16)
    flat = flatten(
        collate(
            [[make_sample(architecture, grids, torch.bfloat16)] for grids in GRIDS],
            Qwen35VLInputs(architecture),
            alignment=1,
            packed=True,
            seq_len=512,
            dtype=torch.bfloat16,
            pad_token_id=0,
        )
    ).pin_memory()

    def step() -> torch.Tensor:
        batch = unflatten(replace(flat, buffer=flat.buffer.to("cuda", non_blocking=True)))
        batch = partition_batch(batch, model.pg_collection.cp)
        model.step.mean_trained_tokens = batch.stats.mean_trained_tokens
        losses = model(**model_inputs(batch))
        loss, _, _ = masked_loss(losses, loss_mask=batch.loss_mask, rates={"tokens/s": (1.0, 1.0)})
        loss.backward()
        return loss

    step()  # compiles and tunes kernels, which waits
    reported: list[tuple[int, dict[str, float]]] = []
    split = TimeSplit(lambda *what: reported.append(what))
    with counted_on_gpu() as counts, split.step(1, [model]):
        loss = step()
    torch.cuda.synchronize()
    split.report_finished()
    print(f"{variant} with {impl}: {reported}")
    assert min(reported[0][1][part] for part in ("ViT", "decoder", "loss")) > 0
    others = counts.pop("", 0)
    print(f"{variant} with {impl}: the host waits {others} times in others' code, in ours: {dict(counts)}")
    assert not counts, counts
    assert loss.isfinite()


def test_the_count_sees_what_waits() -> None:
    """A reading of the device that claims to be one of our files."""
    from tests.host_syncs import ROOT

    ours: dict[str, object] = {}
    exec(compile("def read(x):\n    return x.sum().item()", str(ROOT / "models/ours.py"), "exec"), ours)
    with counted_on_gpu() as counts:
        ours["read"](torch.ones(3, device="cuda"))
    assert counts == {"models/ours.py:2": 1}
