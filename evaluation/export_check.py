"""What a server would miss in an exported folder: its weights, config.json, small files, and an answer that ends.

Everything is compared with something that this harness doesn't own: transformers' class on the meta device for names
and shapes, transformers' readers for tokenizer, template and processor, its `generate` for the end of an answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.processor import facts_of, read_processor, stop_ids
from evaluation.model import HfModel, auto_class, without_gpu_kernels
from models.json_files import JsonError, read_object
from models.spec import HfWeights
from weights.check import check_folder, is_text_only, model_of
from weights.folder import FolderError, HfFolder

_STEPS = 3  # tokens of the answer that the check makes end


@dataclass(frozen=True)
class Findings:
    """problems: what a server, or a reader, trips over. notices: what is unusual, and works."""

    problems: list[str]
    notices: list[str]


def check_export(folder: Path, *, generate: bool = True) -> Findings:
    """Check a HuggingFace folder as a server would read it.

    Args:
        generate: also load the model, in float32 without a GPU, and let it answer.

    Raises:
        FolderError: it can't be opened at all.
    """
    opened = HfFolder.open(folder)
    _, weights, config = model_of(opened.config, folder)
    problems = list(opened.damage())
    try:
        check_folder(weights, config, opened)
    except FolderError as error:
        problems += error.problems
    problems += [*_against_transformers(opened), *_description(folder, opened.config)]
    if generate and not problems:
        problems += _ends_its_answer(folder)
    return Findings(problems, [*_dtypes(opened, weights)])


def report(folder: Path, *, generate: bool | None = None) -> bool:
    """Print what `check_export` finds; whether a server can use the folder.

    Args:
        generate: see `check_export`; None: if the model fits into the memory that is free.
    """
    if generate is None:
        generate = _fits(HfFolder.open(folder))
        if not generate:
            print("notice: the model doesn't fit into the free memory, so it isn't asked anything", file=sys.stderr)
    found = check_export(folder, generate=generate)
    for kind, lines in (("notice", found.notices), ("problem", found.problems)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    if not found.problems:
        print(f"{folder}: everything is there" + (", and an answer ends" if generate else ""))
    return not found.problems


def _fits(folder: HfFolder) -> bool:
    """In float32, as a CPU runs it, beside the mapped file."""
    elements = sum(prod(shape) for shape in folder.shapes.values())
    return 2 * 4 * elements < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _against_transformers(folder: HfFolder) -> Iterator[str]:
    """Names and shapes of the class that config.json names. It has no MTP, and a tied head only in name."""
    import transformers

    names = folder.config.get("architectures") or [None]
    try:
        with without_gpu_kernels(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False
            )
            model: Any = auto_class(folder.config).from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"config.json: transformers can't build its model: {error}"
        return
    if names[0] != type(model).__name__:
        yield f"config.json: architectures names {names[0]}; transformers' class is {type(model).__name__}"
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ours = {name: shape for name, shape in folder.shapes.items() if not name.startswith("mtp.")}
    if config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
        ours.pop("lm_head.weight", None)
    for name in sorted(theirs.keys() - ours.keys()):
        yield f"{name}: missing, and transformers' class has it"
    for name in sorted(ours.keys() - theirs.keys()):
        yield f"{name}: transformers' class has no such tensor"
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            yield f"{name}: has shape {ours[name]}, transformers' class {theirs[name]}"


def _description(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """config.json's dtype, the processor, the template, and where an answer ends."""
    sections = (config, config.get("text_config") or {})
    if not any(section.get(key) for section in sections for key in ("dtype", "torch_dtype")):
        yield "config.json: it has no dtype; servers guess the precision to run in"
    try:
        processor = read_processor(str(folder), "the folder", text_only=is_text_only(config))
    except (ValueError, OSError) as error:
        yield f"tokenizer and processor: {error}"
        return
    if problem := facts_of(processor).contradiction(config):
        yield f"tokenizer and processor: {problem}"
    try:
        generation = read_object(folder / "generation_config.json")
    except JsonError as error:
        yield f"generation_config.json: {error.reason}; answers would run on after the turn's end"
        return
    stops = generation.get("eos_token_id")
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    if (end := stop_ids(processor)[0]) not in stops:
        yield f"generation_config.json: eos_token_id {stops} lacks {end}, the end of a turn: answers would run on"
    if generation.get("pad_token_id") is None:
        yield "generation_config.json: it has no pad_token_id"


def _dtypes(folder: HfFolder, weights: HfWeights[Any]) -> Iterator[str]:
    """Tensors in other dtypes than the released folders'; 3.6 and 3.8 have BF16 where 3.5 has F32."""
    unusual: dict[str, list[str]] = {}
    for name, dtype in folder.dtypes.items():
        if dtype not in (weights.dtype(name), "BF16"):
            unusual.setdefault(dtype, []).append(name)
    for dtype, names in unusual.items():
        released = weights.dtype(names[0])
        yield f"{len(names)} tensors, {names[0]} the first, are {dtype}; released folders have {released}"


def _ends_its_answer(folder: Path) -> Iterator[str]:
    """Generate with the folder's own settings; a turn's end as the last of a few tokens has to end the answer."""
    from transformers import LogitsProcessorList

    try:
        loaded = HfModel.load(folder)
    except ValueError as error:
        yield str(error)
        return
    inputs = loaded.prompts([loaded.question("Hello", [], max_new_tokens=_STEPS + 1)])
    prompt = inputs["input_ids"].size(1)
    end = stop_ids(loaded.processor)[0]
    finite = True

    def steer(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Any other token first, then the end."""
        nonlocal finite
        finite = finite and bool(scores.isfinite().all())
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, end] = 0
        if input_ids.size(1) - prompt == _STEPS - 1:
            return only_end
        others = scores.clone()
        others[:, stop_ids(loaded.processor)] = -torch.inf
        return others

    with torch.inference_mode():
        generated = loaded.model.generate(  # type: ignore[operator]  # of GenerationMixin, which the hint doesn't name
            **inputs, max_new_tokens=_STEPS + 2, do_sample=False, logits_processor=LogitsProcessorList([steer])
        )
    length = generated.size(1) - prompt
    if not finite:
        yield "generate: logits with NaN or infinity"
    if length != _STEPS:
        yield f"generate: goes on after the turn's end ({length} tokens instead of {_STEPS})"
