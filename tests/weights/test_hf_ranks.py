"""Loading and exporting on several ranks: each takes and gives exactly the slices that it owns."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig

RANKS = 4
DENSE, MOE = VARIANTS["tiny"], VARIANTS["tiny_moe"]


@dataclass(frozen=True)
class Layout:
    """Sizes of megatron-core's groups, by the names of `initialize_model_parallel`."""

    architecture: Qwen35VLConfig
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def sizes(self) -> dict[str, int]:
        sizes = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
        }
        if self.architecture.is_moe:
            sizes |= {"expert_model_parallel_size": self.expert, "expert_tensor_parallel_size": self.expert_tensor}
        return sizes


LAYOUTS = (
    Layout(DENSE, tensor=2, pipeline=2),
    # More ranks than KV heads: megatron cuts the rows of linear_qkv in the middle of a group.
    Layout(DENSE.replace(tie_word_embeddings=False), tensor=4),
    Layout(MOE, tensor=2, expert=2, expert_tensor=2),
    Layout(MOE, expert=4),
    Layout(MOE.replace(tie_word_embeddings=True), pipeline=4),
    Layout(MOE, pipeline=2, expert=2),
)


@contextmanager
def process_groups(layout: Layout) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**layout.sizes())
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()


def build_stage(layout: Layout, folder: Path) -> nn.Module:
    from megatron.core import parallel_state

    from tests.build_model import build_model

    flags = [text for name, size in layout.sizes().items() for text in ("--" + name.replace("_", "-"), str(size))]
    if layout.tensor > 1:
        flags.append("--sequence-parallel")
    return build_model(
        layout.architecture,
        folder,
        torch.float32,
        *flags,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def check(layout: Layout, folder: Path) -> None:
    from models.qwen35_vl.hf_weights import weight_map
    from models.weight_map import assemble
    from tests.hf_states import hf_shares, load_hf_state

    mapping = weight_map(layout.architecture)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in mapping.tensors.items()}
    model = build_stage(layout, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_hf_state(model, state, layout.architecture)
    assert not any(parameter.isnan().any() for parameter in model.parameters())

    own = list(hf_shares(model, layout.architecture, mapping))
    of_all: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(of_all, own)
    together: dict[str, Tensor] = assemble(mapping, (share for shares in of_all for share in shares))
    assert together.keys() == state.keys()
    assert all(torch.equal(together[name], state[name]) for name in state)


def run_rank(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.set_num_threads(1)
    from runtime import prepare

    prepare()
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    own_folder = folder / str(rank)
    own_folder.mkdir()
    for layout in LAYOUTS:
        with process_groups(layout):
            check(layout, own_folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_together_hold_the_folder(tmp_path: Path):
    """TP, more TP than KV heads, PP with tied embeddings, EP, expert TP: HF -> ranks -> HF is exact."""
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=RANKS)
