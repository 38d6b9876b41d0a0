"""The real model in every parallel layout against one rank, by scripts/check_parallel.py: losses, gradients, updates.

GatedDeltaNet, gated attention, dense or MoE, ViT with images, MTP; ragged packed documents, among the micro-batches one
without an image; two steps of the training loop's own optimizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proofs.layouts import parse_layout

pytestmark = pytest.mark.heavy

SCRIPT = Path(__file__).parents[2] / "scripts/check_parallel.py"


@dataclass(frozen=True)
class Group:
    """Layouts that one call of the script compares: its arguments besides the layouts, and how far they may be off.

    Float64 is measured at 4e-16 for a loss, 1.2e-14 for any tensor's gradient and 2e-13 for its update.
    """

    name: str
    arguments: tuple[str, ...]
    loss: float
    gradient: float
    update: float
    flags: tuple[str, ...] = ()  # of the training

    def __str__(self) -> str:
        return self.name


MOE = Group("moe", ("--variant", "tiny_moe"), loss=1e-14, gradient=2e-13, update=4e-12)
DENSE = Group("dense", ("--variant", "tiny"), loss=1e-14, gradient=2e-13, update=4e-12)
# Every other document turns out broken on the stage that reads pixels.
BROKEN_FLAGS = ("--dataset-provider", "broken_documents:build", "--max-bad-fraction", "1")
BROKEN = Group("broken", ("--variant", "tiny_moe"), loss=1e-14, gradient=2e-13, update=4e-12, flags=BROKEN_FLAGS)
# The reference too: tests/models/test_grouped_experts.py compares with single experts.
GROUPED = Group("grouped", MOE.arguments, loss=1e-14, gradient=2e-13, update=4e-12, flags=("--moe-grouped-gemm",))
TEXT = Group(
    "text", ("--variant", "tiny_moe"), loss=1e-14, gradient=2e-13, update=4e-12, flags=("--language-model-only",)
)
# Frozen layers in front: with four stages, two train nothing and the third's input needs no gradient.
FROZEN_FLAGS = ("--freeze", "vision", "projector", "embeddings", r"language_model\.layers\.[01]\.")
FROZEN = Group("frozen", DENSE.arguments, loss=1e-14, gradient=2e-13, update=4e-12, flags=FROZEN_FLAGS)
LORA_FLAGS = ("--lora-rank", "3", "--lora-vision")
LORA = Group("lora", MOE.arguments, loss=1e-14, gradient=2e-13, update=4e-12, flags=(*LORA_FLAGS, "--lora-experts"))
LORA_GROUPED = Group(
    "lora_grouped", MOE.arguments, loss=1e-14, gradient=2e-13, update=4e-12, flags=(*LORA_FLAGS, "--moe-grouped-gemm")
)
SGD = Group("sgd", ("--variant", "tiny_moe", "--optimizer", "sgd"), loss=1e-14, gradient=2e-13, update=4e-12)
FLOAT32_MOE = Group("moe32", ("--variant", "tiny_moe", "--dtype", "float32"), loss=1e-6, gradient=2e-4, update=2e-4)
FLOAT32_DENSE = Group("dense32", ("--variant", "tiny", "--dtype", "float32"), loss=1e-6, gradient=2e-4, update=2e-4)

QUICK: dict[Group, str] = {
    MOE: "tp2+sp+cp2 pp2+vpp2 ep2",
    BROKEN: "pp2+vpp2 ep2",
    DENSE: "cp2 no_mtp+pp2 bshd+cp2",  # with MTP megatron-core synchronises the embedding in any case
    FLOAT32_MOE: "cp2+ep2 fsdp2+ep2",
}
SLOW: dict[Group, str] = {
    MOE: """
        ep2+etp2 tp2+sp cp2 cp4 pp2 pp4 tp4+sp ep2+distopt ep2+cp2 ep2+pp2 ep2+etp2 tp2+sp+ep2+etp1 tp2+sp+pp2 cp2+pp2
        bshd+cp2 bshd+cp4 bshd+tp2+sp bshd+pp2 bshd+ep2 dp2+distopt recompute selective recompute_vision
        cp2+recompute+recompute_vision cp2+allgather pp2+first1+last3 no_mtp+cp2 no_mtp+pp2
    """,
    DENSE: """
        tp2+sp cp4 pp2 pp4 pp2+vpp2 tp4+sp dp2+distopt tp2+sp+cp2 tp2+sp+pp2 cp2+pp2 bshd+cp4 bshd+tp2+sp+pp2
        recompute selective recompute_vision cp2+allgather pp2+first1+last3 no_mtp+tp2+sp
    """,
    BROKEN: "pp2 tp2+sp+cp2 tp2+sp+pp2",
    SGD: "tp2+sp cp2 pp2 ep2",
    GROUPED: "ep2 tp2+sp+etp1 tp2+sp+ep2 ep2+etp2 pp2 dp2+distopt",
    TEXT: "tp2+sp+cp2 pp2 ep2",
    FROZEN: "recompute selective pp2 pp4 pp2+recompute pp2+vpp2",
    LORA: "tp2+sp+ep2+etp1 cp2 pp2 ep2 dp2+distopt recompute",
    LORA_GROUPED: "ep2 pp2",
    # Megatron-FSDP has no float64: param_and_grad_buffer.py:2582 knows the sizes of 16 and 32 bits alone.
    FLOAT32_MOE: "tp2+sp cp2 pp2 ep2 tp2+sp+cp2 fsdp2 fsdp2+cp2 fsdp2+tp2+sp",
    FLOAT32_DENSE: "tp2+sp cp2 pp2 dp2+distopt tp2+sp+cp2 fsdp2",
}
CASES = [
    pytest.param(group, name, id=f"{group.name}-{name}", marks=marks)
    for layouts, marks in ((QUICK, ()), (SLOW, (pytest.mark.slow,)))
    for group, names in layouts.items()
    for name in names.split()
]

# One whose documents have a micro-batch without an image, and whose routers have no near ties.
SEED = ("--", "--seed", "5")

type Results = dict[str, dict[str, Any]]


def compare(folder: Path, arguments: tuple[str, ...], layouts: list[str], flags: tuple[str, ...] = ()) -> Results:
    """Run the script; every layout's figures, the references' among them."""
    file = folder / "results.json"
    # The tests judge for themselves.
    command = [sys.executable, str(SCRIPT), *arguments, "--tolerance", "inf", "--json", str(file)]
    run = subprocess.run(
        [*command, "--output", str(folder), "--layouts", *layouts, *SEED, *flags],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Group], Results]:
    """Each group's figures, of the layouts that this run of pytest selected, by one call of the script."""
    selected: dict[Group, list[str]] = defaultdict(list)
    for item in request.session.items:
        if item.path == request.path and "group" in item.callspec.params:
            selected[item.callspec.params["group"]].append(item.callspec.params.get("layout", "one"))
    known: dict[Group, Results] = {}

    def of(group: Group) -> Results:
        if group not in known:
            known[group] = compare(tmp_path_factory.mktemp(group.name), group.arguments, selected[group], group.flags)
        return known[group]

    return of


@pytest.mark.parametrize(("group", "layout"), CASES)
def test_layout_trains_the_same_model(group: Group, layout: str, results: Callable[[Group], Results]) -> None:
    figures = results(group)
    result = figures[layout]
    assert result["loss_error"] < group.loss
    assert result["worst_gradient"][0] < group.gradient, result["worst_gradient"]
    assert result["worst_update"][0] < group.update, result["worst_update"]
    for name, values in result["logged"].items():
        one_rank = figures[parse_layout(layout).reference]["logged"][name]
        assert values == pytest.approx(one_rank, rel=1e-6)  # TensorBoard's float32


@pytest.mark.parametrize("group", [pytest.param(group, id=group.name) for group in QUICK if group is not BROKEN])
def test_the_reference_proves_something(group: Group, results: Callable[[Group], Results]) -> None:
    """Every tensor has a gradient, some micro-batch no image and some several; float32 routers have no near ties."""
    one_rank = results(group)["one+thd"]
    assert one_rank["zero_gradients"] == []
    assert min(one_rank["images"]) == 0 and max(one_rank["images"]) > 1
    if group is FLOAT32_MOE:
        assert one_rank["router_margin"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "tiny_moe"])
def test_rows_and_documents_of_equal_length_are_the_same(variant: str, tmp_path: Path) -> None:
    """Two rows of 64 tokens, padded (BSHD) or packed (THD), on one rank and over four: one loss to the last digit."""
    arguments = ("--variant", variant, "--documents", "full", "--micro-batch-size", "2", "--seq-length", "64")
    figures = compare(tmp_path, arguments, ["one+bshd", "one+thd", "bshd+cp4", "cp4"])
    rows, documents, *shared = (figures[name] for name in ("one+bshd", "one+thd", "bshd+cp4", "cp4"))
    assert f"{rows['losses'][0]:.10f} {rows['grad_norms'][0]:.8f}" == (
        f"{documents['losses'][0]:.10f} {documents['grad_norms'][0]:.8f}"
    )
    for result in shared:
        assert result["losses"] == pytest.approx(rows["losses"], rel=1e-14)
        assert result["grad_norms"] == pytest.approx(rows["grad_norms"], rel=1e-13)
