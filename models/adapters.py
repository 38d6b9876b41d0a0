"""LoRA's adapters as a table: which A and B stand beside which parameter, and where they lie in peft's tensors.

peft gives every HuggingFace module a pair of its own, `y += scale * B(A(x))`, while megatron-core fuses several modules
in one linear. Here each linear has one `lora_A` with the modules' matrices one below the other, and one `lora_B` whose
rows lie as the linear's own do. Where they come from, and how tensor parallelism cuts them, follows from the weight's
`Source`, so that loading, saving and export are `models.weight_map`'s. Torch-free, for the launcher's preflight.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt
from typing import Any

from models.spec import ModelConfig, ModelSpec
from models.trained import EVERYTHING, Trained, frozen_names
from models.weight_map import RowRange, Source, WeightMap, tensor_slices

ALL_LINEAR = "all-linear"
A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraOptions:
    """What peft's LoraConfig calls r, lora_alpha, lora_dropout and use_rslora."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """The pair beside one parameter.

    weight: the parameter's canonical name.
    source: the parameter's.
    modules: HuggingFace modules (stacked experts: the tensor) that are adapted, in the order of their first rows.
    rank: r.
    """

    weight: str
    source: Source
    modules: tuple[str, ...]
    rank: int

    @property
    def prefix(self) -> str:
        """Canonical name of the adapter, with the dot behind it."""
        return f"{self.weight.rpartition('.')[0]}.adapter."

    @property
    def by_rows(self) -> bool:
        """The weight is cut by rows, as a column-parallel linear's."""
        return self.source.sharded and self.source.dim == 0

    @property
    def by_columns(self) -> bool:
        """The weight is cut by columns, as a row-parallel linear's."""
        return self.source.sharded and self.source.dim == 1

    @cached_property
    def a(self) -> Source:
        """[modules * r, in], cut by columns where the weight is."""
        expert = next(self.source.row_ranges).expert
        if self.by_columns:
            run = RowRange(self.modules[0] + A, 0, self.source.shape[1], expert)
            return Source((self.rank, run.count), ((run,),), dim=1, is_expert=self.source.is_expert)
        runs = tuple((RowRange(module + A, 0, self.rank, expert),) for module in self.modules)
        shape = (len(runs) * self.rank, self.source.shape[1])
        return Source(shape, runs, sharded=False, is_expert=self.source.is_expert)

    @cached_property
    def b(self) -> Source:
        """[rows of the modules, r], in the order of the weight's rows and cut as they are."""
        if self.by_columns:
            (expert,) = {run.expert for run in self.source.row_ranges}
            run = RowRange(self.modules[0] + B, 0, self.source.shape[0], expert)
            parts: tuple[tuple[RowRange, ...], ...] = ((run,),)
        else:
            adapted = (
                tuple(replace(run, name=_module(run) + B) for run in part if _module(run) in self.modules)
                for part in self.source.parts
            )
            parts = tuple(part for part in adapted if part)
        rows = sum(run.count for part in parts for run in part)
        return Source((rows, self.rank), parts, sharded=self.by_rows, is_expert=self.source.is_expert)

    @property
    def b_parts(self) -> list[tuple[str, int]]:
        """Names and rows of B's parts that a checkpoint keeps by themselves, since TP cuts each by itself."""
        counts = [sum(run.count for run in part) for part in self.b.parts]
        if len(counts) == 1 or not self.by_rows or self.source.is_expert:
            return [("", sum(counts))]
        return [(f"part{number}", count) for number, count in enumerate(counts)]

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds of A and of B for one row of the input."""
        return prod(self.a.shape), prod(self.b.shape)

    def places(self, rank: int, size: int) -> list[tuple[int, int, int]]:
        """Where the rows of a tensor-parallel rank's B lie in its share of the weight.

        Returns:
            (first row, row behind the last, number of the module), in the order of B's rows.

        Raises:
            ValueError: the cut goes through the modules unevenly.
        """
        if not self.by_rows:
            return [(0, self.source.shape[0], 0)]
        found, own = [], []
        for cut in tensor_slices(self.source, rank, size):
            module, rows, foreign = cut.name.removesuffix(".weight"), cut.index[0], cut.foreign_index[-1]
            if module in self.modules:
                found.append((rows.start, rows.stop, self.modules.index(module)))
                own.append((module + B, foreign))
        if own != [(cut.name, cut.foreign_index[-1]) for cut in tensor_slices(self.b, rank, size)]:
            raise ValueError(
                f"{', '.join(self.modules)}: {size} tensor-parallel ranks cut through the linear that holds them with "
                "others; target all of these, or lower --tensor-model-parallel-size"
            )
        return found


@dataclass(frozen=True)
class AdapterMap:
    """All adapters of a model, by their weight's canonical name, and the table of their tensors in peft's names."""

    adapters: Mapping[str, Adapter]
    options: LoraOptions

    @cached_property
    def weights(self) -> WeightMap:
        """Canonical name of each lora_A and lora_B -> Source. Names are without peft's `base_model.model.`; pairs of
        stacked experts are [E, r, in] and [E, out, r] here."""
        sources: dict[str, Source] = {}
        for adapter in self.adapters.values():
            sources |= {f"{adapter.prefix}lora_A": adapter.a, f"{adapter.prefix}lora_B": adapter.b}
        return WeightMap(sources)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every adapted module, or tensor of stacked experts."""
        return tuple(dict.fromkeys(module for adapter in self.adapters.values() for module in adapter.modules))


def _module(run: RowRange) -> str:
    return run.name.removesuffix(".weight")


def linear_modules(mapping: WeightMap, linears: Iterable[str]) -> dict[str, list[str]]:
    """HuggingFace's linear modules by the canonical name of the parameter that holds them."""
    return {name: list(dict.fromkeys(_module(run) for run in mapping.sources[name].row_ranges)) for name in linears}


def adapter_map(
    mapping: WeightMap,
    linears: Iterable[str],
    default: Iterable[str],
    words: Iterable[str],
    options: LoraOptions,
    *,
    experts: bool = False,
) -> AdapterMap:
    """Choose what is adapted.

    Args:
        linears: canonical names of the weights that HuggingFace has as linear modules.
        default: those of them that `all-linear` means.
        words: `all-linear`, a module's name or the end of one (`q_proj`), `mtp`; MTP's modules are found by that word
            or by names that begin with it.
        experts: adapt the routed experts' stacked tensors too.

    Raises:
        ValueError: a word that names no linear module.
    """
    modules = linear_modules(mapping, linears)
    known = dict.fromkeys(module for of_weight in modules.values() for module in of_weight)
    chosen: set[str] = set()
    for word in words:
        if word == ALL_LINEAR:
            found = {module for name in default for module in modules[name]}
        else:
            found = {module for module in known if _names(word, module)}
        if not found:
            ends = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in known))
            raise ValueError(f"{word}: names no linear module; there are {ends}, and {ALL_LINEAR}")
        chosen |= found
    adapters = {}
    for name, of_weight in modules.items():
        adapted = tuple(module for module in of_weight if module in chosen)
        if adapted:
            adapters[name] = Adapter(name, mapping.sources[name], adapted, options.rank)
    if experts:
        for name, source in mapping.sources.items():
            tensors = tuple(dict.fromkeys(run.name for run in source.row_ranges))
            if source.is_expert and not tensors[0].startswith("mtp."):
                adapters[name] = Adapter(name, source, tensors, options.rank)
    return AdapterMap(adapters, options)


def recorded_map(
    mapping: WeightMap, linears: Iterable[str], modules: Iterable[str], options: LoraOptions
) -> AdapterMap:
    """The table of exactly these modules and tensors of stacked experts.

    Raises:
        ValueError: one that the model hasn't.
    """
    modules = list(modules)
    words = [module for module in modules if module not in mapping.tensors]
    return adapter_map(mapping, linears, (), words, options, experts=len(words) < len(modules))


def adapters_of_args(args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> AdapterMap | None:
    """What `--lora-rank` and its companions ask for; None without them.

    Raises:
        ValueError: see `adapter_map`.
    """
    return None if args.lora_rank is None else lora_of_args(args, spec, config)


def lora_of_args(args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> AdapterMap:
    """The same of arguments with `--lora-rank`."""
    weights = spec.table
    mapping = weights.mapping(config, ())
    linears = weights.linears(mapping)
    modules = linear_modules(mapping, linears)
    vision = [name for name in linears if _is_vision(modules[name][0], weights.groups)]
    language = [name for name in linears if name not in vision and not modules[name][0].startswith("mtp.")]
    words = list(args.lora_targets)
    if args.lora_vision:
        words += [module for name in vision for module in modules[name]]
    alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    options = LoraOptions(args.lora_rank, alpha, args.lora_dropout, args.lora_rslora)
    return adapter_map(mapping, linears, language, words, options, experts=args.lora_experts)


def trained_of_args(args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> Trained:
    """What the flags leave to train."""
    if adapters := adapters_of_args(args, spec, config):
        return Trained(adapters={name: adapter.macs for name, adapter in adapters.adapters.items()})
    if not args.freeze:
        return EVERYTHING
    return Trained(frozen_names(spec.table.mapping(config, ()), spec.table.groups, args.freeze))


def _is_vision(module: str, groups: Mapping[str, str]) -> bool:
    return any(re.search(groups[group], f"{module}.weight") for group in ("vision", "projector"))


def _names(word: str, module: str) -> bool:
    if module.startswith("mtp."):
        return module == word or (word.startswith("mtp") and module.startswith(f"{word}."))
    return module == word or module.endswith(f".{word}")


def peft_targets(mapping: AdapterMap, tensors: Iterable[str]) -> list[str]:
    """peft's `target_modules` for the adapted linear modules: the shortest ends of their names that mean no others.

    Args:
        tensors: all of the model's, by their HuggingFace names.
    """
    stacked = {module for module, _ in stacked_tensors(mapping)}
    kept = {module for module in mapping.modules if module not in stacked and not module.startswith("mtp.")}
    others = [name.removesuffix(".weight") for name in tensors if not name.startswith("mtp.")]
    others = [name for name in others if name not in kept]
    targets = set()
    for module in kept:
        words = module.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        targets.add(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(targets)


def stacked_tensors(mapping: AdapterMap) -> Iterator[tuple[str, int]]:
    """Tensors of stacked experts that are adapted, each with its number of experts."""
    for module in mapping.modules:
        shape = mapping.weights.tensors[module + A]
        if len(shape) == 3:
            yield module, shape[0]
