"""Every released generation, in small, through every path: tensors, dtypes and small files come back bit for bit.

docs/weights.md has the table of generations and paths that `test_the_table_in_the_documentation` makes; the slow tests
here take most of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from tests.hf_folders import assert_same, read_folder
from tests.hf_generations import GENERATIONS, small_files, write_generation, write_small_files
from tests.train_jobs import FP32, ROOT, run
from weights.checkpoint import export_checkpoint, import_folder
from weights.folder import TEXT_AND_IMAGE_FILES

DENSE = tuple(name for name, generation in GENERATIONS.items() if not generation.architecture.is_moe)
MOE = tuple(name for name, generation in GENERATIONS.items() if generation.architecture.is_moe)
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2")
FSDP = (
    *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--ckpt-format", "fsdp_dtensor"),
)
# Column of the table -> the generations that a test of this file takes through it.
PATHS: Mapping[str, tuple[str, ...]] = {
    "`--load-hf`, `--save-hf`, bf16": tuple(GENERATIONS),
    "the same, fp32": tuple(GENERATIONS),
    "import, export": tuple(GENERATIONS),
    "import, `--load`, `--save`, export": tuple(GENERATIONS),
    "both with TP2, then PP2 (MoE: EP2, then DP2)": tuple(GENERATIONS),
    "both with FSDP on 2 ranks": tuple(GENERATIONS),
}
# The jobs' mock data has images.
TEXT_ALONE = ("--image-seq-length", "0")


class Trips:
    """Generations in a folder, command lines that take them somewhere, and what has to be there afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, dict[str, Tensor]] = {
            name: write_generation(folder / name, name) for name in GENERATIONS
        }
        self.lines: list[list[str]] = []
        self.targets: list[tuple[str, Path]] = []

    def through_a_run(self, name: str, label: str, *flags: str, precision: str = "") -> None:
        """--load-hf, a step, --save-hf."""
        target = self.folder / f"{name}-{label}"
        words = [precision] if precision else []
        paths = ["--load-hf", str(self.folder / name), "--save-hf", str(target)]
        self.lines.append([*words, *paths, *_data(name), *flags])
        self.targets.append((name, target))

    def through_a_checkpoint(self, name: str, start: Path, label: str, *flags: str) -> Path:
        saved = self.folder / f"{name}-{label}"
        load = ["--hf-config", str(self.folder / name), "--load", str(start), "--finetune"]
        self.lines.append([*load, "--save", str(saved), "--no-save-optim", *_data(name), *flags])
        self.targets.append((name, saved))
        return saved

    def imported(self, name: str, ckpt_format: str = "torch_dist") -> Path:
        target = self.folder / f"{name}-{ckpt_format}-imported"
        return import_folder(self.folder / name, target, ckpt_format=ckpt_format, quiet=True)

    def check(self) -> None:
        for name, target in self.targets:
            if (target / "hf").is_dir():
                target = export_checkpoint(target, Path(f"{target}-exported"), quiet=True)
            assert_same(read_folder(target), self.tensors[name])
            assert small_files(target) == small_files(self.folder / name), target


def _data(name: str) -> tuple[str, ...]:
    return TEXT_ALONE if GENERATIONS[name].architecture.language_model_only else ()


@pytest.mark.heavy
def test_generations_cross_one_rank_unchanged(tmp_path: Path) -> None:
    trips = Trips(tmp_path)
    for name in GENERATIONS:
        trips.through_a_run(name, "bf16")
    run(trips.folder, trips.lines)
    trips.check()


def test_generations_cross_checkpoints_unchanged(tmp_path: Path) -> None:
    trips = Trips(tmp_path)
    trips.targets += [(name, trips.imported(name)) for name in GENERATIONS]
    trips.check()


@pytest.mark.slow
def test_generations_cross_one_rank_in_other_ways_unchanged(tmp_path: Path) -> None:
    trips = Trips(tmp_path)
    for name in GENERATIONS:
        trips.through_a_run(name, "fp32", precision=FP32)
        trips.through_a_checkpoint(name, trips.imported(name), "saved")
    run(trips.folder, trips.lines)
    trips.check()


@pytest.mark.slow
def test_generations_cross_two_ranks_unchanged(tmp_path: Path) -> None:
    trips = Trips(tmp_path)
    for name in GENERATIONS:
        first, second = (EP2, ()) if name in MOE else (TP2, PP2)
        trips.through_a_run(name, "first", *first)
        trips.through_a_run(name, "second", *second)
        saved = trips.through_a_checkpoint(name, trips.imported(name), "first-saved", *first)
        trips.through_a_checkpoint(name, saved, "second-saved", *second)
    run(tmp_path, trips.lines, 2)
    trips.check()


@pytest.mark.slow
def test_generations_cross_two_fsdp_ranks_unchanged(tmp_path: Path) -> None:
    trips = Trips(tmp_path)
    for name in GENERATIONS:
        trips.through_a_run(name, "fsdp", *FSDP)
        trips.through_a_checkpoint(name, trips.imported(name, "fsdp_dtensor"), "fsdp-saved", *FSDP)
    run(tmp_path, trips.lines, 2, fsdp=True)
    trips.check()


def table() -> str:
    rows = [f"| {name} | " + " | ".join("equal" for names in PATHS.values() if name in names) for name in GENERATIONS]
    head = "| In small, like | " + " | ".join(PATHS) + " |"
    return "\n".join([head, "| --- |" + " --- |" * len(PATHS), *(f"{row} |" for row in rows)])


def test_the_table_in_the_documentation() -> None:
    assert table() in (ROOT / "docs/weights.md").read_text(), table()


def test_files_of_a_processor_are_known(tmp_path: Path) -> None:
    """A new kind of file would be copied beside another processor's."""
    settings = {"README.md", "config.json", "generation_config.json"}
    for name, generation in GENERATIONS.items():
        (tmp_path / name).mkdir()
        write_small_files(tmp_path / name, generation)
        assert small_files(tmp_path / name).keys() - settings <= set(TEXT_AND_IMAGE_FILES)
