"""Whatever flag names a checkpoint, nothing in it is run, its bytes are compared, and no failure ends with code 0."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from runtime import checkpoints
from runtime.checksums import record_problem
from runtime.loading import CheckedReader, CheckpointNotLoaded, as_data
from tests.small_checkpoint import write


def problem_of(
    folder: Path, step: int | None = None, ckpt_format: str = "torch_dist", required: bool = False
) -> str | None:
    start = checkpoints.choose(folder, step, ckpt_format)
    return checkpoints.problem(folder, start, ckpt_format, required=required)


class Evil:
    """Leaves a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    load = tmp_path / "load"
    for iteration in (2, 4):
        write(load, iteration)
    (load / checkpoints.TRACKER).write_text("4")
    return load


def load(**flags: Any) -> None:
    """Megatron's `load_checkpoint` as training calls it, up to the first thing that it reads."""
    from megatron.training import global_vars, training

    from runtime import prepare

    prepare()
    args = Namespace(
        **{
            **dict.fromkeys(("load", "pretrained_checkpoint", "ckpt_step", "non_persistent_ckpt_type")),
            **dict.fromkeys(("non_persistent_global_ckpt_dir", "exit_on_missing_checkpoint")),
            **dict.fromkeys(("use_megatron_fsdp", "use_dist_ckpt", "auto_detect_ckpt_format"), False),
            "ckpt_format": "torch_dist",
            "finetune": False,
            **flags,
        }
    )
    before = global_vars._GLOBAL_ARGS
    global_vars._GLOBAL_ARGS = args
    try:
        training.load_checkpoint([torch.nn.Linear(1, 1)], None, None)
    finally:
        global_vars._GLOBAL_ARGS = before


def spoil_index(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(marker)))


def release(folder: Path, marker: Path) -> dict[str, Any]:
    (folder / "iter_0000002").rename(folder / "release")
    (folder / checkpoints.TRACKER).write_text("release")
    spoil_index(folder / "release", marker)
    return {"load": str(folder)}


def beside_an_old_format(folder: Path, marker: Path) -> dict[str, Any]:
    (folder / "iter_0000004/mp_rank_00").mkdir()
    spoil_index(folder / "iter_0000004", marker)
    return {"load": str(folder)}


def by_step(folder: Path, marker: Path) -> dict[str, Any]:
    spoil_index(folder / "iter_0000002", marker)
    return {"load": str(folder), "ckpt_step": 2}


def pretrained(folder: Path, marker: Path) -> dict[str, Any]:
    spoil_index(folder / "iter_0000004", marker)
    return {"load": str(folder / "none"), "pretrained_checkpoint": str(folder)}


def fsdp(folder: Path, marker: Path) -> dict[str, Any]:
    (folder / "iter_0000004/metadata.json").unlink()
    spoil_index(folder / "iter_0000004", marker)
    return {"load": str(folder), "ckpt_format": "fsdp_dtensor", "use_megatron_fsdp": True}


def torch_dcp(folder: Path, marker: Path) -> dict[str, Any]:
    (folder / "iter_0000004/metadata.json").unlink()
    spoil_index(folder / "iter_0000004", marker)
    return {"load": str(folder), "ckpt_format": "torch_dcp", "auto_detect_ckpt_format": True}


def non_persistent(folder: Path, marker: Path) -> dict[str, Any]:
    spoil_index(folder / "iter_0000004", marker)
    return {
        "load": str(folder / "none"),
        "non_persistent_ckpt_type": "global",
        "non_persistent_global_ckpt_dir": str(folder),
    }


def common_file(folder: Path, marker: Path) -> dict[str, Any]:
    """megatron-core's older place for arguments and counters."""
    torch.save({"args": Evil(marker)}, folder / "iter_0000004/common.pt")
    return {"load": str(folder)}


def common_record(folder: Path, marker: Path) -> dict[str, Any]:
    """An honest index, and the code in the record that arguments and counters come from."""
    path = folder / "iter_0000004"
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    encoded = io.BytesIO()
    torch.save([{"args": Evil(marker)}], encoded)
    (path / "evil.distcp").write_bytes(encoded.getvalue())
    info = next(iter(metadata.storage_data.values()))
    place = type(info)("evil.distcp", 0, len(encoded.getvalue()))
    index = MetadataIndex("common_state/shard_0_1")
    metadata.storage_data[index] = place
    metadata.state_dict_metadata[index.fqn] = metadata.state_dict_metadata["step"]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert problem_of(folder) is None
    return {"load": str(folder)}


def old_format(folder: Path, marker: Path) -> dict[str, Any]:
    """megatron prints what is wrong and leaves with code 0."""
    shutil.rmtree(folder / "iter_0000004")
    (folder / "iter_0000004/mp_rank_00").mkdir(parents=True)
    torch.save({"args": Evil(marker)}, folder / "iter_0000004/mp_rank_00/model_optim_rng.pt")
    return {"load": str(folder)}


ROUTES = [
    release, beside_an_old_format, by_step, pretrained, fsdp, torch_dcp, non_persistent, common_file, common_record,
    old_format,
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_no_route_runs_what_a_checkpoint_names(
    folder: Path, marker: Path, route: Callable[[Path, Path], dict[str, Any]]
) -> None:
    flags = route(folder, marker)
    # torch's CheckpointException is a BaseException; SystemExit is what must not come.
    with pytest.raises(BaseException) as refused:
        load(**flags)
    assert not isinstance(refused.value, SystemExit)
    said = "".join(traceback.format_exception(refused.value))
    assert "mkdir" in said or isinstance(refused.value, CheckpointNotLoaded), said


@pytest.mark.parametrize("route", [release, beside_an_old_format, by_step, pretrained, fsdp], ids=lambda r: r.__name__)
def test_the_preflight_refuses_it_first(
    folder: Path, marker: Path, route: Callable[[Path, Path], dict[str, Any]]
) -> None:
    flags = route(folder, marker)
    named = Path(flags.get("pretrained_checkpoint") or flags["load"])
    problem = problem_of(named, flags.get("ckpt_step"), flags.get("ckpt_format", "torch_dist"))
    assert "posix.mkdir, which no checkpoint does" in problem


def test_an_honest_checkpoint_is_read(folder: Path) -> None:
    from megatron.core import dist_checkpointing  # noqa: F401  registers its classes as safe

    with as_data():
        metadata = FileSystemReader(folder / "iter_0000004").read_metadata()
    assert metadata.state_dict_metadata["weight"].size == torch.Size([8, 4])


def test_a_missing_checkpoint_is_an_error_and_no_exit(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints" / checkpoints.TRACKER).write_text("4")
    with pytest.raises(CheckpointNotLoaded, match=r"did you mean .*run/checkpoints\?"):
        load(load=str(tmp_path / "run"), exit_on_missing_checkpoint=True)


# Checksums


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    state = {"weight": torch.zeros(8, 4), "bias": torch.zeros(3, dtype=torch.bfloat16), "step": 0}
    dcp.load(state, storage_reader=CheckedReader(folder), no_dist=True)
    return state


def test_every_flipped_bit_of_a_tensor_is_found(folder: Path) -> None:
    """In the bytes of values: torch alone loads all of them without a word."""
    checkpoint = folder / "iter_0000004"
    assert read_all(checkpoint)["step"] == 4
    path = next(checkpoint.glob("*.distcp"))
    whole = path.read_bytes()
    start = whole.index(torch.zeros(8, 4).numpy().tobytes())
    for place in (start, start + 40, start + 127):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert problem_of(folder) is None  # which reads no shard
        with pytest.raises(BaseException, match=r"__0_0\.distcp: the record at byte .* is damaged: Bad CRC-32"):
            read_all(checkpoint)
        with pytest.raises(BaseException, match="Bad CRC-32"), as_data():
            import torch.distributed.checkpoint as dcp

            dcp.load({"weight": torch.zeros(8, 4)}, storage_reader=FileSystemReader(checkpoint), no_dist=True)


def test_flipped_bits_anywhere_are_found_or_change_nothing(folder: Path) -> None:
    """The rest of a record is names, dates and padding."""
    checkpoint = folder / "iter_0000004"
    path = next(checkpoint.glob("*.distcp"))
    whole = path.read_bytes()
    expected = read_all(checkpoint)
    found = 0
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            state = read_all(checkpoint)
        except BaseException as error:  # torch's own is no Exception
            # The second: a flag of the zip directory that only torch's reader minds.
            assert re.search(r"the record at byte .* is damaged|failed reading zip archive", str(error))
            found += 1
        else:
            assert torch.equal(state["weight"], expected["weight"]) and state["step"] == expected["step"]
    assert found > 10


def test_a_record_is_compared_where_it_lies(folder: Path) -> None:
    metadata: Metadata = pickle.loads((folder / "iter_0000004/.metadata").read_bytes())
    info = next(iter(metadata.storage_data.values()))
    with open(folder / "iter_0000004" / info.relative_path, "rb") as file:
        file.seek(3)
        assert record_problem(file, info.offset, info.length) is None
        assert record_problem(file, info.offset, info.length - 30) is not None
        assert file.tell() == 3


def test_an_index_without_a_tensor_s_place_is_named(folder: Path) -> None:
    path = folder / "iter_0000004/.metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "weight")
    del metadata.storage_data[index]
    path.write_bytes(pickle.dumps(metadata))
    problem = problem_of(folder)
    assert f"{path} doesn't say where weight is (1 such)" in problem and "--ckpt-step 2 takes the last" in problem


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    path = folder / "iter_0000004" / name
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe, not a regular file" in checkpoints.damage(path.parent, "torch_dist")


def test_where_the_checkpoints_are(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    assert problem_of(run) is None
    assert f"--load {run}: no checkpoint in it" in problem_of(run, required=True)
    folder.rename(run / "checkpoints")
    assert f"did you mean {run / 'checkpoints'}?" in problem_of(run)
    inner = run / "checkpoints/iter_0000002"
    assert f"give {inner.parent} and --ckpt-step 2" in problem_of(inner)
