"""Run a function on several gloo ranks, forked from one server that has imported megatron-core once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]


def run_on_ranks(function: Callable[..., None], ranks: int, folder: Path, *args: Any, **sizes: int) -> None:
    """Call `function(folder, *args)` on every rank and raise what any of them raises.

    Args:
        function: of a module's top level; finds torch.distributed and megatron-core's process groups set up.
        folder: empty; each rank gets a folder of its own in it.
        sizes: of the groups, by the names of `initialize_model_parallel`.
    """
    multiprocessing.set_forkserver_preload(["tests.ranks_imports"])  # heeded by the first start of the server
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        torch.multiprocessing.start_processes(
            _run_rank, (ranks, function, folder, args, sizes), nprocs=ranks, start_method="forkserver"
        )


def _run_rank(
    rank: int, ranks: int, function: Callable[..., None], folder: Path, args: tuple[Any, ...], sizes: dict[str, int]
) -> None:
    import tests.ranks_imports  # noqa: F401

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.set_num_threads(1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1234)
    own = folder / str(rank)
    own.mkdir()
    function(own, *args)
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
