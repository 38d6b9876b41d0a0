"""Checkpoints are read as data: nothing that they name is run, whichever route leads to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from runtime import loading, prepare


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    prepare()


class Evil:
    """Makes a folder when it is unpickled."""

    folder: ClassVar[Path]

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


class TestCheckpointsReadAsData:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        import torch.distributed.checkpoint as dcp

        Evil.folder = tmp_path / "ran"
        folder = tmp_path / "checkpoint"
        dcp.save({"common_state/shard_0_1": [Evil()]}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        return folder

    def test_megatron_alone_runs_it(self, checkpoint: Path) -> None:
        from megatron.core.dist_checkpointing.serialization import load_common_state_dict

        load_common_state_dict(checkpoint)
        assert Evil.folder.is_dir()

    def test_nothing_is_run(self, checkpoint: Path) -> None:
        from megatron.core.dist_checkpointing.serialization import load_common_state_dict

        with loading.as_data(), pytest.raises(BaseException, match="Weights only load failed"):
            load_common_state_dict(checkpoint)
        assert not Evil.folder.exists()

    def test_an_index_that_names_code_is_refused(self, tmp_path: Path) -> None:
        import pickle

        from torch.distributed.checkpoint import FileSystemReader

        Evil.folder = tmp_path / "ran"
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
        with loading.as_data(), pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir, which no checkpoint does"):
            FileSystemReader(tmp_path).read_metadata()
        assert not Evil.folder.exists()

    def test_a_users_own_files_are_theirs(self, tmp_path: Path) -> None:
        """Outside the block, torch.load does what it is told: a dataset may keep its samples as it likes."""
        with loading.as_data():
            pass
        Evil.folder = tmp_path / "ran"
        torch.save([Evil()], tmp_path / "own.pt")
        torch.load(tmp_path / "own.pt", weights_only=False)
        assert Evil.folder.is_dir()
