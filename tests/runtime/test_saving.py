"""Saving: nothing is written over another checkpoint, and a failure says which file and why."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from runtime import prepare
from tests.pristine import pristine


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    prepare()


class TestFailedWrites:
    NAME = "megatron.core.dist_checkpointing.strategies.filesystem_async"

    @staticmethod
    def write(module: ModuleType, folder: Path) -> None:
        bucket = (str(folder / "missing/shard"), "shard", ([], []))
        module.FileSystemWriterAsync.write_preloaded_data([], 0, bucket, None, None, True)

    def test_megatron_alone_names_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.write(pristine(self.NAME), tmp_path)
        assert capsys.readouterr().err == ""

    def test_the_file_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.write(importlib.import_module(self.NAME), tmp_path)
        assert f"{tmp_path}/missing/shard can't be written: [Errno 2] No such file" in capsys.readouterr().err


class TestSavingOver:
    """The function that the training loop calls; megatron's own, inside, gets no further than its first line."""

    @pytest.fixture
    def other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file of another run's checkpoint of the same iteration."""
        from megatron.training import checkpointing, global_vars

        def stop() -> None:
            raise LookupError("here megatron starts")

        args = SimpleNamespace(save=str(tmp_path), ckpt_format="torch_dist", keep_last=None, async_save=False)
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
        monkeypatch.setattr(checkpointing, "get_args", stop)
        path = tmp_path / "iter_0000004/.metadata"
        path.parent.mkdir()
        path.write_bytes(b"of another run")
        return path

    def test_megatron_alone_writes_over_it(self, other: Path) -> None:
        import inspect

        from megatron.training import training

        original = training.save_checkpoint.__self__._save
        with pytest.raises(LookupError):
            original(4, None, None, None, 0)
        assert other.exists() and "TODO Handle non-empty directories" in inspect.getsource(original)

    def test_the_other_one_goes_first(self, other: Path, single_rank: None) -> None:
        from megatron.training import training

        with pytest.raises(LookupError) as raised:
            training.save_checkpoint(4, None, None, None, 0)
        assert not other.exists()
        (note,) = raised.value.__notes__
        assert f"while saving {other.parent} " in note and "there is none before it" in note
