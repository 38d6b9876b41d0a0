"""The folder that a run saves into: older checkpoints, a second run, and what can't be written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime import output_folder
from runtime.output_folder import FolderInUse

ROOT = Path(__file__).parents[2]


def options(save: Path, **others: object) -> Namespace:
    defaults = {"load": None, "finetune": False, "overwrite_checkpoints": False, "tensorboard_dir": None}
    return Namespace(
        **{**defaults, "save_hf": None, "save_adapter": None, "dump_bad_batch": None, "save": str(save), **others}
    )


def checkpoint(save: Path, iteration: int) -> Path:
    folder = save / f"iter_{iteration:07d}"
    (save / "data" / folder.name).mkdir(parents=True)
    folder.mkdir()
    (folder / "metadata.json").touch()
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def test_a_new_folder_is_free(tmp_path: Path) -> None:
    assert output_folder.problems(options(tmp_path / "new/checkpoints")) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "arguments.json").touch()  # what a run leaves besides
    assert output_folder.problems(options(tmp_path)) == []


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    """An empty file can still be made on one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        (problem,) = output_folder.problems(options(tmp_path / "checkpoints"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert problem.startswith(f"--save {tmp_path}/checkpoints: {tmp_path} can't be written (File too large)")


def test_older_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4)
    (problem,) = output_folder.problems(options(tmp_path))
    for fragment in ("iter_0000004 is the last of 2", "CKPT_RESUME=1", "OUTPUT_DIR", "--overwrite-checkpoints"):
        assert fragment in problem
    assert output_folder.problems(options(tmp_path, load=str(tmp_path / "elsewhere"))) == [problem]
    assert output_folder.problems(options(tmp_path, load=str(tmp_path), finetune=True)) == [problem]
    assert output_folder.problems(options(tmp_path, load=f"{tmp_path}/../{tmp_path.name}/")) == []
    assert output_folder.problems(options(tmp_path, overwrite_checkpoints=True)) == []


def test_an_imported_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    assert "release is the last of 1" in output_folder.problems(options(tmp_path))[0]


def test_overwriting_deletes_the_older_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    output_folder.begin(options(tmp_path, load=str(tmp_path), overwrite_checkpoints=True))
    assert (tmp_path / "iter_0000002").is_dir()  # it goes on from them
    output_folder.begin(options(tmp_path, overwrite_checkpoints=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "data"]
    assert list((tmp_path / "data").iterdir()) == []


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder, and a child that outlives it with the file still open."""
    program = (
        "import sys, os, time; from pathlib import Path; from runtime import output_folder\n"
        "held = output_folder.lock(Path(sys.argv[1]))\n"
        "if os.fork() == 0: time.sleep(20)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert run.stdout.readline() == "held\n"
        yield run
    finally:
        run.kill()
        run.wait()


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with another_run(tmp_path) as run:
        (problem,) = output_folder.problems(options(tmp_path, overwrite_checkpoints=True))
        assert f"(process {run.pid}, since 20" in problem and "is saving into it" in problem
        with pytest.raises(FolderInUse, match=f"process {run.pid}"):
            output_folder.begin(options(tmp_path))
    # Killed, it has let go, whatever its child still has open.
    assert output_folder.problems(options(tmp_path)) == []
    held = output_folder.lock(tmp_path)
    assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()
    held.close()


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (problem,) = output_folder.problems(options(tmp_path / "file/run"))
    assert problem.startswith(f"--save {tmp_path}/file/run: {tmp_path}/file is a file")
    assert "link to nowhere" in output_folder.problems(options(tmp_path / "link/run"))[0]
    (problem,) = output_folder.problems(options(tmp_path, save_hf=str(tmp_path / "file")))
    assert problem.startswith(f"--save-hf {tmp_path}/file")
    (problem,) = output_folder.problems(options(Path("/proc/run")))  # for root too
    assert problem.startswith("--save /proc/run: /proc can't be written")
    monkeypatch.setenv("RANK", "1")
    assert output_folder.problems(options(tmp_path / "file/run")) == []
