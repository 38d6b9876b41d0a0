"""Memory of loading, exporting and importing: a 4 GB folder, four ranks. Slow, and needs 14 GB of disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.hf_weights import default_dtype, weight_map
from tests.hf_folders import write_folder
from weights.folder import HfFolder, TensorInfo, write_tensors

MB = 2**20
RANKS = 4
# 2.2 billion parameters; the embedding and its untied head are 0.27 GB each.
LARGE = VARIANTS["tiny"].replace(
    num_layers=24, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16, num_query_groups=4, kv_channels=128,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    mrope_section=(6, 5, 5), vocab_size=65536, tie_word_embeddings=False,
)  # fmt: skip


class Memory:
    """peak: how far this process' anonymous memory rose, in bytes."""

    peak = 0


@contextmanager
def measured() -> Iterator[Memory]:
    """Sample /proc/self/status, a hundred times a second; pages of mapped files aren't anonymous."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    memory, before, done = Memory(), anonymous(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            memory.peak = max(memory.peak, anonymous() - before)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        memory.peak = max(memory.peak, anonymous() - before)
        done.set()
        watcher.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written tensor by tensor, each a small pattern: nothing of this size fits beside the rest of a test run."""
    path = tmp_path_factory.mktemp("large") / "hf"
    write_folder(path, LARGE, {"a": torch.zeros(1)})
    (path / "model.safetensors").unlink()
    infos = {name: TensorInfo(shape, default_dtype(name)) for name, shape in weight_map(LARGE).tensors.items()}
    for number, (_, tensor) in enumerate(write_tensors(path, infos, 10**9, title="writes", quiet=True)):
        tensor.copy_((torch.arange(tensor.shape[-1]) % 97 + number).to(tensor.dtype).expand(tensor.shape))
    assert 3.9e9 < HfFolder.open(path).bytes < 5e9
    return path


def load(rank: int, folder: Path, results: Any) -> None:
    """TP2 x PP2: build the model, touch its memory, then load."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.set_num_threads(1)
    from runtime import prepare

    prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    import arguments
    from pretrain_multimodal import model_provider
    from weights.job import load_hf

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder.parent}/store", rank=rank, world_size=RANKS
    )
    parallel_state.initialize_model_parallel(2, 2)
    model_parallel_cuda_manual_seed(1)
    sizes = ["--micro-batch-size", "1", "--seq-length", "64", "--train-iters", "1", "--lr", "1e-4", "--bf16"]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]
    command_line = arguments.preflight_or_exit(["--load-hf", str(folder), *sizes, *layout, "--no-initialization"])
    args = arguments.resolve(command_line)
    spec, config = command_line.spec, command_line.config
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = model_provider(spec, config, args, first, last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with measured() as memory:
        load_hf(args, spec, config, command_line.hf_source, [model])
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    results[rank] = (memory.peak, sum(parameter.nbytes for parameter in model.parameters()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_loading_takes_a_part_of_the_rank_s_shard(folder: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(load, (folder, results), nprocs=RANKS)
        for rank in range(RANKS):
            peak, shard = results[rank]
            print(f"rank {rank}: {peak / MB:.0f} MB above a shard of {shard / MB:.0f} MB")
            assert peak <= 0.3 * shard + 200 * MB


@pytest.mark.slow
def test_import_and_export_stream(folder: Path, tmp_path: Path) -> None:
    from weights.checkpoint import export_checkpoint, import_folder

    size = 500 * 10**6
    with measured() as memory:
        import_folder(folder, tmp_path / "checkpoint", quiet=True)
    print(f"import: {memory.peak / MB:.0f} MB")
    assert memory.peak <= size + 200 * MB
    with measured() as memory:
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", max_shard_size=size, quiet=True)
    print(f"export: {memory.peak / MB:.0f} MB")
    assert memory.peak <= size + 200 * MB
    exported, original = HfFolder.open(tmp_path / "out"), HfFolder.open(folder)
    assert (exported.shapes, exported.dtypes) == (original.shapes, original.dtypes)
