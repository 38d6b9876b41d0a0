"""Which checkpoint is taken, what damage is named, what is deleted: on checkpoints of three tensors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import pytest

from runtime import checkpoints
from runtime.checkpoints import Start, choose, damage, keep_last, make_room, problem, read_tracker, repair_tracker
from tests.small_checkpoint import write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Complete checkpoints of the iterations 2 and 4; the tracker names 4."""
    write(tmp_path, 2)
    write(tmp_path, 4)
    (tmp_path / checkpoints.TRACKER).write_text("4")
    return tmp_path


def pick(folder: Path, step: int | None = None) -> Start:
    return choose(folder, step, "torch_dist")


def refused(folder: Path, step: int | None = None) -> str | None:
    return problem(folder, pick(folder, step), "torch_dist")


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def test_the_tracker_s_is_taken_without_a_word(folder: Path) -> None:
    assert pick(folder) == Start(folder / "iter_0000004")
    assert refused(folder) is None


def test_one_that_was_being_saved_isn_t_taken(folder: Path) -> None:
    newer = write(folder, 6, last_file=False)
    start = pick(folder)
    assert (start.folder, start.step) == (folder / "iter_0000004", None)
    assert start.warnings == (
        f"starting from {folder / 'iter_0000004'}",
        f"{newer} isn't taken: it has no metadata.json: the run ended while saving it",
    )


def test_complete_but_not_named_yet(folder: Path) -> None:
    """Killed between the last file and the tracker; or somebody has set the tracker back."""
    newer = write(folder, 6)
    start = pick(folder)
    assert start.folder == folder / "iter_0000004"
    assert start.warnings[1].startswith(f"{newer} isn't taken") and "--ckpt-step 6 takes it" in start.warnings[1]
    assert pick(folder, 6) == Start(newer)


@pytest.mark.parametrize("text", ["", "\0\0\0", "four", "-1"])
def test_corrupt_tracker(folder: Path, text: str) -> None:
    (folder / checkpoints.TRACKER).write_text(text)
    start = pick(folder)
    assert (start.folder, start.step) == (folder / "iter_0000004", 4)
    assert "is empty or corrupt" in start.warnings[1]
    repair_tracker(folder, "torch_dist")
    assert read_tracker(folder) == 4


def test_missing_tracker(folder: Path) -> None:
    (folder / checkpoints.TRACKER).unlink()
    assert pick(folder).step == 4 and "is missing" in pick(folder).warnings[1]


def test_tracker_names_what_isn_t_there(folder: Path) -> None:
    (folder / checkpoints.TRACKER).write_text("8")
    start = pick(folder)
    assert start.step == 4 and f"names 8, but {folder / 'iter_0000008'} is missing" in start.warnings[1]


def test_killed_in_the_first_save(tmp_path: Path) -> None:
    write(tmp_path, 2, last_file=False)
    start = pick(tmp_path)
    assert start.folder is None and start.problem is None
    assert "isn't taken" in start.warnings[0] and "training starts anew" in start.warnings[1]


def test_nothing_to_start_from(tmp_path: Path) -> None:
    assert pick(tmp_path) == pick(tmp_path / "none") == Start()
    (tmp_path / checkpoints.TRACKER).write_text("4")
    assert "no checkpoint in it is complete" in pick(tmp_path).problem


def test_step_that_isn_t_there(folder: Path) -> None:
    write(folder, 6, last_file=False)
    assert "no iter_0000003 in it; complete are 2, 4" in refused(folder, 3)
    assert "it has no metadata.json" in refused(folder, 6)


def test_release(folder: Path) -> None:
    (folder / checkpoints.TRACKER).write_text("release\n")
    assert f"names release, but {folder / 'release'} is missing" in refused(folder)
    (folder / "iter_0000002").rename(folder / "release")
    assert pick(folder) == Start(folder / "release")
    assert refused(folder) is None
    os.truncate(shard(folder / "release"), 10)
    assert "bytes of" in refused(folder)


def test_truncated_shard(folder: Path) -> None:
    path = shard(folder / "iter_0000004")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert damage(path.parent, "torch_dist") == f"{path} has {size - 1} bytes of {size}"
    assert "--ckpt-step 2 takes the last" in refused(folder)
    assert refused(folder, 2) is None


def test_shard_of_another_run(folder: Path) -> None:
    """Longer than its .metadata says."""
    path = shard(folder / "iter_0000004")
    with open(path, "ab") as file:
        file.write(b"more")
    assert "bytes of" in damage(path.parent, "torch_dist")


def test_missing_and_unreadable_shards(folder: Path) -> None:
    path = shard(folder / "iter_0000004")
    path.unlink()
    assert damage(path.parent, "torch_dist") == f"{path}: No such file or directory"
    path.mkdir()  # nothing that can be read; root reads whatever its mode is
    assert damage(path.parent, "torch_dist") == f"{path}: is a folder, not a regular file"


def test_corrupt_metadata(folder: Path) -> None:
    path = folder / "iter_0000004/.metadata"
    whole = path.read_bytes()
    for content in (b"", b"not a pickle", whole[:-20], pickle.dumps({"storage_data": None})):
        path.write_bytes(content)
        assert damage(path.parent, "torch_dist").startswith(f"{path} can't be read: "), content


def test_metadata_may_hold_the_standard_library_s_containers(tmp_path: Path) -> None:
    place = OrderedDict(path=PurePosixPath("__0_0.distcp"))
    (tmp_path / "index").write_bytes(pickle.dumps(place))
    with open(tmp_path / "index", "rb") as file:
        assert checkpoints._IndexWithoutTorch(file).load() == place


def test_a_tensor_without_properties(folder: Path) -> None:
    """One flipped bit in the attribute's name makes it so."""
    path = folder / "iter_0000004/.metadata"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"properties", b"propertier"))
    assert whole != path.read_bytes()
    assert f"{path} can't be read: " in refused(folder)


def test_metadata_runs_no_code(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(folder / "evil"),)

    path = folder / "iter_0000004/.metadata"
    path.write_bytes(pickle.dumps(Evil()))
    assert "posix.mkdir, which no checkpoint does; load only your own" in damage(path.parent, "torch_dist")
    assert not (folder / "evil").exists()


def test_shards_stay_in_their_folder(folder: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    path = folder / "iter_0000004/.metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    info = metadata.storage_data[next(index for index in metadata.storage_data if isinstance(index, MetadataIndex))]
    info.relative_path = "../iter_0000002/" + info.relative_path
    path.write_bytes(pickle.dumps(metadata))
    assert "names a file outside the checkpoint: ../iter_0000002/" in damage(path.parent, "torch_dist")


def test_keeping_the_last(folder: Path) -> None:
    for iteration in (6, 8, 10):
        write(folder, iteration, last_file=iteration != 6)
    (folder / checkpoints.TRACKER).write_text("8")
    assert keep_last(folder, 2, "torch_dist") == [2, 6]  # 6 is half-written; 10 may be in the making
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000004", "iter_0000008", "iter_0000010"]
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["iter_0000004", "iter_0000008", "iter_0000010"]
    assert keep_last(folder, 1, "torch_dist") == [4]


def test_nothing_is_deleted_before_a_newer_one_is_whole(folder: Path) -> None:
    os.truncate(shard(folder / "iter_0000004"), 10)
    assert keep_last(folder, 1, "torch_dist") == []
    (folder / "iter_0000004/metadata.json").unlink()
    assert keep_last(folder, 1, "torch_dist") == []
    (folder / checkpoints.TRACKER).write_text("")
    assert keep_last(folder, 1, "torch_dist") == []


def test_room_is_made_before_a_checkpoint_is_written_over(folder: Path) -> None:
    make_room(folder, 6, "torch_dist")
    assert read_tracker(folder) == 4
    make_room(folder, 4, "torch_dist")
    assert not (folder / "iter_0000004").exists() and not (folder / "data/iter_0000004").exists()
    assert read_tracker(folder) == 2
    make_room(folder, 2, "torch_dist")
    assert not (folder / checkpoints.TRACKER).exists()


def test_another_schedule_says_what_to_do() -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = object.__new__(OptimizerParamScheduler)
    scheduler.override_opt_param_scheduler = scheduler.use_checkpoint_opt_param_scheduler = False
    with pytest.raises(AssertionError) as refused, checkpoints.schedule_explained():
        scheduler._check_and_set(20.0, 40.0, "total number of iterations")
    assert "CKPT_OVERRIDE_SCHEDULER=1" in refused.value.__notes__[0]


def test_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, runtime.checkpoints; print({'torch', 'megatron', 'numpy'} & set(sys.modules) or 'light')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "light"
