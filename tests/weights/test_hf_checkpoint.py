"""HuggingFace weights through training, bit for bit: --load-hf, --save-hf, import, checkpoints of ranks, export."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS
from models.qwen35_vl.hf_weights import ExpertStorage
from models.weight_map import WeightMismatch
from tests.hf_folders import assert_same, random_tensors, read_folder, write_folder
from tests.train_jobs import ROOT, run
from weights.checkpoint import CheckpointError, export_checkpoint, find_checkpoint, import_folder
from weights.folder import RECORD, FolderError, HfFolder

pytestmark = pytest.mark.heavy

SMALL_VIT = replace(VARIANTS["tiny"].vision, num_layers=1, num_position_embeddings=64)
DENSE = VARIANTS["tiny"].replace(vision=SMALL_VIT)
MOE = VARIANTS["tiny_moe"].replace(vision=SMALL_VIT)
# name -> architecture, how its folder stores experts, shards
FOLDERS = {
    "dense_tied": (DENSE, ExpertStorage(), 1),
    "moe_single_experts": (MOE, ExpertStorage(False, True), 3),
}
MORE_FOLDERS = {
    "dense_untied": (DENSE.replace(tie_word_embeddings=False), ExpertStorage(), 5),
    "odd_layers": (DENSE.replace(num_layers=7), ExpertStorage(), 2),
    "no_mtp": (MOE.replace(mtp_num_layers=0), ExpertStorage(), 1),
    "moe_tied": (MOE.replace(tie_word_embeddings=True), ExpertStorage(True, False), 2),
    "moe_stacked": (MOE.replace(num_layers=5), ExpertStorage(), 4),
    "moe_all_single": (MOE, ExpertStorage(False, False), 1),
}
ONE: tuple[str, ...] = ()
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")
EP2 = ("--expert-model-parallel-size", "2")
DP2 = ONE
FSDP = (
    "--use-megatron-fsdp",
    "--data-parallel-sharding-strategy",
    "optim_grads_params",
    "--ckpt-format",
    "fsdp_dtensor",
)
META = "--init-model-with-meta-device"


class Job:
    """Command lines of one job, and the folders that have to hold the same tensors afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, dict[str, Tensor]] = {}
        self.row_ranges: list[list[str]] = []
        self.checks: list[tuple[Path, str]] = []

    def add_source(self, name: str) -> None:
        architecture, layout, shards = (FOLDERS | MORE_FOLDERS)[name]
        tensors = random_tensors(architecture, layout)
        self.sources[name] = write_folder(self.folder / name, architecture, tensors, shards)
        import_folder(self.folder / name, self.folder / f"{name}-imported", quiet=True)
        fsdp = self.folder / f"{name}-fsdp-imported"
        import_folder(self.folder / name, fsdp, ckpt_format="fsdp_dtensor", quiet=True)

    def through_ranks(self, source: str, layout: str, *flags: str, save: bool = False) -> None:
        """--load-hf, a step, --save-hf; `save` a checkpoint too, whose places then have to be the exporter's."""
        target = self.folder / f"{source}-{layout}-hf"
        if save:
            checkpoint = self.folder / f"{source}-{layout}-saved"
            flags = (*flags, "--save", str(checkpoint), "--no-save-optim")
            self.checks.append((checkpoint, source))
        self.row_ranges.append(["--load-hf", str(self.folder / source), "--save-hf", str(target), *flags])
        self.checks.append((target, source))

    def through_checkpoint(self, source: str, start: str, layout: str, *flags: str, export: bool = False) -> None:
        """--load the checkpoint of `start`, a step, --save; `export` too with --save-hf."""
        target = self.folder / f"{source}-{layout}"
        if export:
            folder = self.folder / f"{source}-{layout}-hf"
            flags = (*flags, "--save-hf", str(folder))
            self.checks.append((folder, source))
        load = [
            "--hf-config",
            str(self.folder / source),
            "--load",
            str(self.folder / f"{source}-{start}"),
            "--finetune",
        ]
        self.row_ranges.append([*load, "--save", str(target), "--no-save-optim", *flags])
        self.checks.append((target, source))

    def run(self, ranks: int, *, fsdp: bool = False) -> str:
        return run(self.folder, self.row_ranges, ranks, fsdp=fsdp)

    def check(self) -> None:
        for target, source in self.checks:
            if not target.name.endswith("-hf"):
                target = export_checkpoint(target, Path(f"{target}-exported"), max_shard_size=2 * 10**6, quiet=True)
            assert_same(read_folder(target), self.sources[source])


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, str]:
    job = Job(tmp_path_factory.mktemp("one"))
    for source in FOLDERS:
        job.add_source(source)
        job.through_ranks(source, "one", "--max-shard-size", "1MB", save=True)
    job.through_checkpoint("moe_single_experts", "imported", "one")
    # The checkpoint of the line before goes on, and the folder isn't read.
    saved = str(job.folder / "moe_single_experts-one")
    again = ["--load-hf", str(job.folder / "moe_single_experts"), "--load", saved, "--no-load-optim", "--no-load-rng"]
    exported = [*("--save-hf", str(job.folder / "steps"), "--save-hf-interval", "2"), "--train-iters", "4"]
    job.row_ranges.append([*again, *exported, "--override-opt_param-scheduler", "--lr", "1e-3"])
    return job, job.run(1)


def test_folders_cross_one_rank_unchanged(one_rank: tuple[Job, str]) -> None:
    one_rank[0].check()


def test_a_checkpoint_goes_on_instead_of_the_folder(one_rank: tuple[Job, str]) -> None:
    job, log = one_rank
    assert f"--load-hf {job.folder / 'moe_single_experts'}: not read, since --load" in log
    assert "iteration        2/       4" in log and "loading distributed checkpoint" in log


def test_folders_at_intervals_and_at_the_end(one_rank: tuple[Job, str]) -> None:
    job, _ = one_rank
    steps = job.folder / "steps"
    assert sorted(path.name for path in steps.iterdir()) == ["iter_0000002", "iter_0000004"]
    second, fourth = read_folder(steps / "iter_0000002"), read_folder(steps / "iter_0000004")
    source = job.sources["moe_single_experts"]
    assert {k: (v.dtype, v.shape) for k, v in fourth.items()} == {k: (v.dtype, v.shape) for k, v in source.items()}
    name = "model.language_model.embed_tokens.weight"
    assert not torch.equal(second[name], source[name]) and not torch.equal(second[name], fourth[name])


def test_a_checkpoint_remembers_its_folder(one_rank: tuple[Job, str]) -> None:
    """Dtypes and expert layout pass from an imported checkpoint to the one that training writes."""
    hf = one_rank[0].folder / "moe_single_experts-one" / "hf"
    assert json.loads((hf / RECORD).read_text()) == HfFolder.open(one_rank[0].folder / "moe_single_experts").dtypes
    assert not (one_rank[0].folder / "moe_single_experts-one-exported" / RECORD).exists()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("two"))
    dense, moe = FOLDERS
    job.add_source(dense)
    job.add_source(moe)
    job.through_ranks(dense, "tp2", *TP2, save=True)
    job.through_checkpoint(dense, "tp2-saved", "pp2", *PP2, export=True)
    job.through_ranks(moe, "ep2", *EP2, save=True)
    job.through_checkpoint(moe, "ep2-saved", "dp2")
    job.run(2)
    return job


def test_folders_cross_two_ranks_unchanged(two_ranks: Job) -> None:
    two_ranks.check()


@pytest.fixture(scope="module")
def two_fsdp_ranks(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(tmp_path_factory.mktemp("fsdp"))
    dense, moe = FOLDERS
    job.add_source(dense)
    job.add_source(moe)
    job.through_ranks(dense, "fsdp2", *FSDP, META)
    job.through_ranks(moe, "fsdp2-ep2", *FSDP, *EP2, save=True)
    job.through_checkpoint(moe, "fsdp-imported", "fsdp2", *FSDP)
    job.through_checkpoint(moe, "fsdp2", "fsdp2-ep2", *FSDP, *EP2)
    job.run(2, fsdp=True)
    return job


@pytest.mark.slow
def test_folders_cross_two_fsdp_ranks_unchanged(two_fsdp_ranks: Job) -> None:
    two_fsdp_ranks.check()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_kind_of_folder_crosses_fsdp(ranks: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    for source, (architecture, _, _) in (FOLDERS | MORE_FOLDERS).items():
        job.add_source(source)
        layouts = {f"fsdp{ranks}": FSDP, f"fsdp{ranks}-meta": (*FSDP, META)}
        if ranks == 2 and architecture.is_moe:
            layouts["fsdp2-ep2"] = (*FSDP, *EP2)
        start = "fsdp-imported"
        for layout, flags in layouts.items():
            job.through_ranks(source, layout, *flags)
            job.through_checkpoint(source, start, layout, *flags)
            start = layout
    job.run(ranks, fsdp=True)
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_kind_of_folder_crosses_every_layout(ranks: int, tmp_path: Path) -> None:
    job = Job(tmp_path)
    for source, (architecture, _, _) in (FOLDERS | MORE_FOLDERS).items():
        job.add_source(source)
        layouts = {"one": ONE} if ranks == 1 else {"tp2": TP2, "pp2": PP2, "dp2": DP2}
        if ranks == 2 and architecture.is_moe:
            layouts |= {"ep2": EP2}
        if architecture.num_layers % 4 == 0 and ranks == 2:
            job.through_ranks(source, "vpp2", *VPP2)
        if architecture.num_layers % 2 == 1 and ranks == 2:
            layouts["pp2"] = (*PP2, "--decoder-first-pipeline-num-layers", "3")
        start = "imported"
        for layout, flags in layouts.items():
            job.through_ranks(source, layout, *flags)
            job.through_checkpoint(source, start, layout, *flags)
            start = layout  # from each layout to the next
    job.run(ranks)
    job.check()


# What is refused


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    write_folder(folder / "hf", DENSE)
    return import_folder(folder / "hf", folder / "checkpoint", quiet=True)


def test_import_refuses_nan_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = random_tensors(DENSE)
    tensors["mtp.norm.weight"][3] = torch.inf
    write_folder(tmp_path / "hf", DENSE, tensors)
    with pytest.raises(WeightMismatch, match=r"mtp\.norm\.weight: has NaN or infinity"):
        import_folder(tmp_path / "hf", tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_folder(tmp_path / "hf", tmp_path / "out", allow_nonfinite=True, quiet=True)
    assert_same(read_folder(export_checkpoint(tmp_path / "out", tmp_path / "back", quiet=True)), tensors)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(DENSE)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"] + 1
    write_folder(tmp_path / "hf", DENSE, tensors)
    with pytest.raises(WeightMismatch, match=r"lm_head\.weight: differs from model\.language_model\.embed_tokens"):
        import_folder(tmp_path / "hf", tmp_path / "out", quiet=True)


def test_a_target_that_is_there_is_left_alone(imported: Path) -> None:
    before = sorted(path.name for path in imported.iterdir())
    with pytest.raises(FolderError, match="it is there already"):
        import_folder(imported.parent / "hf", imported, quiet=True)
    with pytest.raises(FolderError, match="it is there already"):
        export_checkpoint(imported, imported, quiet=True)
    assert sorted(path.name for path in imported.iterdir()) == before


def test_checkpoints_that_can_not_be_read(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    with pytest.raises(CheckpointError, match=r"iter_0000007: no complete checkpoint"):
        find_checkpoint(copy, 7)
    assert find_checkpoint(copy)[0] == find_checkpoint(copy / "release")[0] == copy / "release"
    data = max((copy / "release").glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=data.name):
        export_checkpoint(copy, tmp_path / "out", quiet=True)
    (copy / "release/.metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"release/\.metadata"):
        export_checkpoint(copy, tmp_path / "out", quiet=True)
    shutil.copytree(imported / "release", copy / "release", dirs_exist_ok=True)
    shutil.rmtree(copy / "hf")
    with pytest.raises(CheckpointError, match="has no hf/ folder"):
        export_checkpoint(copy, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("owned"),)


def test_a_checkpoint_s_index_runs_nothing(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    (copy / "release/.metadata").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r"\.metadata can't be read: .*which no checkpoint does"):
        export_checkpoint(copy, tmp_path / "out", quiet=True)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_model_is_listed(imported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(imported, tmp_path / "copy"))
    config = DENSE.replace(num_layers=3, ffn_hidden_size=128, tie_word_embeddings=False).to_hf()
    (copy / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(WeightMismatch) as mismatch:
        export_checkpoint(copy, tmp_path / "out", quiet=True)
    for part in (
        "language_model.output_layer.weight: not in the checkpoint",
        "language_model.decoder.layers.3.self_attention.q_layernorm.weight: in the checkpoint, and maps to no tensor",
        "layers.0.mlp.linear_fc1.weight: has shape (768, 128) in the checkpoint, expected (256, 128)",
    ):
        assert part in str(mismatch.value)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(imported: Path, tmp_path: Path, signal_number: int) -> None:
    """Stopped where it has begun to write: at the first tensor that it reads."""
    program = (
        "import os, sys\n"
        "from weights.folder import FolderTensors\n"
        "from scripts import import_hf\n"
        f"FolderTensors.read = lambda *_: os.kill(os.getpid(), {int(signal_number)})\n"
        "import_hf.main()\n"
    )
    command = [sys.executable, "-c", program, "--hf", str(imported.parent / "hf"), "--output", str(tmp_path / "out")]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode != 0 and "importing" in stopped.stderr
    assert list(tmp_path.iterdir()) == []
