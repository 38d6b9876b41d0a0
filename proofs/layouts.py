"""Parallel layouts by name: "tp2+sp+cp2", "pp2+vpp2+bshd", "fsdp2+meta". Torch-free.

A layout says how ranks share a model and a batch; it is what `scripts/check_parallel.py` compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import lcm

# The reference's weights, a HuggingFace folder in its own, and its LoRA adapter, if it has one.
INITIAL, ADAPTER = "initial-hf", "initial-adapter"

# What a word adds to the command line. A number stands behind the name: "tp2".
SIZES = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "first": "--decoder-first-pipeline-num-layers",
    "last": "--decoder-last-pipeline-num-layers",
}
SWITCHES: dict[str, tuple[str, ...]] = {
    "sp": ("--sequence-parallel",),
    "distopt": ("--use-distributed-optimizer",),
    "meta": ("--init-model-with-meta-device",),
    "a2a": ("--cp-comm-type", "a2a"),
    "p2p": ("--cp-comm-type", "p2p"),
    "allgather": ("--cp-comm-type", "all_gather"),
    "redundant": ("--redundant-vision",),
    "recompute": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    "selective": (
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "core_attn",
        "layernorm",
        "gdn_norm_out",
    ),
    "recompute_vision": ("--recompute-vision",),
    "no_mtp": ("--mtp-num-layers", "0"),
}
FSDP = (
    *("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--ckpt-format", "fsdp_dtensor", "--use-distributed-optimizer"),
)


@dataclass(frozen=True)
class Layout:
    """One way to share the work.

    name: as it was given.
    flags: its part of the command line.
    world_size: the fewest ranks that it needs; data-parallel where the sizes leave ranks over.
    packed: THD documents rather than padded rows.
    fsdp: Megatron-FSDP over the data ranks.
    """

    name: str
    flags: tuple[str, ...]
    world_size: int
    packed: bool
    fsdp: bool

    @property
    def reference(self) -> str:
        """The single rank that trains the same model on the same batch."""
        return "+".join(["one", "thd" if self.packed else "bshd", *(["no_mtp"] if "no_mtp" in self.name else [])])


def parse_layout(name: str) -> Layout:
    """A layout from its name: words joined by "+", in any order.

    Sizes: tp2, cp2, pp2, vpp2, ep2, etp2, dp2 and fsdp2 (data ranks), first1 and last1 (layers of that stage).
    Switches: the keys of `SWITCHES`, bshd and thd (the default), one (nothing: a single rank).

    Raises:
        ValueError: a word that isn't one of them.
    """
    reader = _Reader()
    for word in name.split("+"):
        reader.read(word)
    sizes = reader.sizes
    # Experts spread over TP, CP and data ranks together; Megatron cuts each into TP parts unless it is told otherwise.
    dense = sizes.get("tp", 1) * sizes.get("cp", 1)
    expert = sizes.get("ep", 1) * sizes.get("etp", sizes.get("tp", 1))
    stage = max(dense * reader.data_ranks, lcm(dense, expert))
    return Layout(
        name=name,
        flags=tuple(reader.flags),
        world_size=stage * sizes.get("pp", 1),
        packed=reader.packed,
        fsdp=reader.fsdp,
    )


@dataclass
class _Reader:
    flags: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    data_ranks: int = 1
    packed: bool = True
    fsdp: bool = False

    def read(self, word: str) -> None:
        sized = re.fullmatch(r"([a-z]+)([1-9]\d*)", word)
        if word in SWITCHES:
            self.flags += SWITCHES[word]
        elif word in ("thd", "bshd"):
            self.packed = word == "thd"
        elif sized and sized[1] in SIZES:
            self.sizes[sized[1]] = int(sized[2])
            self.flags += [SIZES[sized[1]], sized[2]]
        elif sized and sized[1] in ("dp", "fsdp"):
            self.data_ranks = int(sized[2])
            if sized[1] == "fsdp":
                self.fsdp = True
                self.flags += FSDP
        elif word != "one":
            sizes = ", ".join([*SIZES, "dp", "fsdp"])
            raise ValueError(
                f"layout word {word!r}: expected a size ({sizes} and a number) or one of thd, bshd, one, "
                f"{', '.join(SWITCHES)}"
            )


@dataclass(frozen=True)
class Job:
    """What a rank is to do.

    flags: the whole command line.
    float64: make float32 mean float64 everywhere.
    reference: folder that the reference run wrote and the others read.
    is_reference: this run is that one.
    result: where rank 0 writes the `Result`, as JSON.
    """

    flags: tuple[str, ...]
    float64: bool
    reference: str
    is_reference: bool
    result: str
