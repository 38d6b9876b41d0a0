"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def kernel_choice_forgotten() -> Iterator[None]:
    """megatron-core writes its choice of attention kernels into the environment, where child processes would find it
    and refuse theirs."""
    yield
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def single_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron initialised in this process: one gloo rank, every parallel size 1, seeds set.

    Session-wide, because Megatron's process groups are globals. Imported lazily: tests that need no model
    shouldn't pay for megatron-core.
    """
    import torch

    from runtime import prepare

    prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
