"""A trained model in transformers: the folder that `--load` means, its model and processor, answers, loss.

There is no second implementation: scripts/generate.py and scripts/evaluate.py run the exported weights, as anyone who
gets them will.

B rows, S tokens of the longest, P patches, I images.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.conversation import Conversation, Message
from data.processor import facts_of, read_processor, stop_ids
from data.sample import Sample, SampleOptions, build_prompt
from data.template import image_token
from models.adapters import recorded_map
from models.spec import HfWeights, ModelConfig
from runtime.checkpoints import TRACKER
from weights.adapter import AdapterFolder
from weights.adapter_export import export
from weights.base import BaseRecord
from weights.check import check_folder, is_text_only, model_of
from weights.folder import FolderError, HfFolder, read_config, read_template_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from models.spec import ModelInputs

_GPU_KERNELS = ("fla", "causal_conv1d")


@contextlib.contextmanager
def without_gpu_kernels() -> Iterator[None]:
    """Hide flash-linear-attention and causal-conv1d while transformers' modeling files are imported.

    The files bind whatever kernels they find, and these don't run on a CPU.
    """
    found = {name: sys.modules.get(name) for name in _GPU_KERNELS}
    for name in _GPU_KERNELS:
        sys.modules[name] = None  # type: ignore[assignment]  # importing a name that is None there fails
    try:
        yield
    finally:
        for name, module in found.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextlib.contextmanager
def weights_folder(load: Path) -> Iterator[Path]:
    """The HuggingFace folder that `--load` means: itself, or what a checkpoint is exported to for the while, merged.

    Raises:
        ValueError: neither a HuggingFace folder nor a checkpoint, or one that can't be exported.
    """
    load = load.expanduser()
    if not load.is_dir():
        raise ValueError(f"--load {load}: no such folder")
    if (load / "config.json").is_file():
        yield load
    elif (load / TRACKER).is_file() or (load / ".metadata").is_file():
        with tempfile.TemporaryDirectory(prefix="exported-") as folder:
            root = load.parent if (load / ".metadata").is_file() else load
            yield export(load, Path(folder) / "hf", merge=BaseRecord.read(root) is not None)
    else:
        inside = load / "checkpoints"
        hint = f"; did you mean {inside}?" if (inside / TRACKER).is_file() else ""
        raise ValueError(
            f"--load {load}: neither a HuggingFace folder (no config.json) nor a checkpoint (no {TRACKER}){hint}"
        )


@dataclass(frozen=True)
class Answer:
    """text: without the end of the turn. finished: the model ended it, before the limit."""

    text: str
    finished: bool


@dataclass(frozen=True)
class HfModel:
    """A model, its processor, and what it computes from token ids and grids.

    `model` is a ForConditionalGeneration, or for text alone a ForCausalLM, of the family that config.json names, in
    evaluation mode; `template_arguments` a JSON object, `--chat-template-kwargs` of the training.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    inputs: ModelInputs
    template_arguments: str = "{}"
    text_only: bool = False

    @classmethod
    def load(cls, folder: Path, adapter: Path | None = None) -> HfModel:
        """Read a HuggingFace folder: on the GPU in the dtype it is stored in, on a CPU in float32.

        Args:
            adapter: a LoRA adapter's folder, which peft puts on the model.

        Raises:
            ValueError: an architecture that isn't ours, no processor or one of another model, weights that are
                missing, misshapen or damaged; an adapter that doesn't fit, or needs peft where that is missing.
        """
        import transformers

        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            transformers.logging.set_verbosity_error()  # it would advise to install the GPU's kernels
        transformers.logging.disable_progress_bar()
        try:
            config = read_config(folder)
            spec, weights, architecture = model_of(config, folder)
            opened = HfFolder.open(folder)
            check_folder(weights, weights.as_stored(architecture, opened.shapes)[0], opened)
            if damage := list(opened.damage()):
                raise FolderError(folder, damage)
        except FolderError as error:
            raise ValueError(f"--load {error}") from error
        text_only = is_text_only(config)
        processor = read_processor(str(folder), "--load", text_only=text_only)
        if problem := facts_of(processor).contradiction(config):
            raise ValueError(f"--load {folder}: the processor isn't this model's: {problem}")
        try:
            with contextlib.nullcontext() if has_gpu else without_gpu_kernels():
                loaded: Any = auto_class(config).from_pretrained(
                    folder,
                    dtype="auto" if has_gpu else torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"--load {folder}: transformers can't load it: {error}") from error
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"--load {folder}: {len(missing)} weights are missing: {listed}")
        if adapter is not None:
            model = _with_adapter(model, adapter, spec.table, architecture)
        model = model.to("cuda" if has_gpu else "cpu").eval()
        return cls(model, processor, spec.model_inputs(architecture), read_template_arguments(folder), text_only)

    def question(
        self,
        text: str,
        images: Sequence[Path],
        *,
        max_new_tokens: int,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Sample:
        """A question with the images before its text, encoded as training would: `prompts` makes it a prompt.

        Args:
            max_new_tokens: room to be left for the answer.
            min_pixels, max_pixels: area that images are resized into; None is the processor's own limit.

        Raises:
            ValueError: an image that can't be read, is too long and thin, or takes more tokens than the model has
                positions; any image for a model of text alone.
        """
        content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in images]
        content.append({"type": "text", "text": text})
        turns: list[Message] = [{"role": "user", "content": content}]
        positions = self.model.config.get_text_config().max_position_embeddings
        # Answers without reasoning are trained after the prompt without thinking, so that one is the default.
        arguments = json.dumps({"enable_thinking": False} | json.loads(self.template_arguments))
        options = SampleOptions(
            positions - max_new_tokens,
            min_pixels,
            max_pixels,
            template_arguments=arguments,
            images=not self.text_only,
        )
        sample = build_prompt(Conversation(turns, id="question"), self.processor, options)
        if sample is None:
            raise ValueError(
                f"text and images take more than the {options.seq_len} tokens that {positions} positions "
                f"leave beside an answer of {max_new_tokens}; --max-pixels makes images smaller"
            )
        return sample

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Inputs of samples up to their last answers, token for token as training saw them."""
        return self._inputs(samples, [_answer_start(sample) for sample in samples])

    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int, temperature: float = 0.0) -> list[Answer]:
        """One answer for each row of what `prompts` gives.

        Args:
            temperature: 0 takes the likeliest token each time, else tokens are drawn.
        """
        tokenizer = self.processor.tokenizer
        stops = stop_ids(self.processor)
        with torch.inference_mode():
            # From GenerationMixin, which PreTrainedModel doesn't name as a base.
            generated = self.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_k=None,
                top_p=None,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = []
        for row in generated[:, inputs["input_ids"].size(1) :].tolist():
            length = next((place for place, token in enumerate(row) if token in stops), len(row))
            text = tokenizer.decode(row[:length], clean_up_tokenization_spaces=False)
            answers.append(Answer(text, finished=length < len(row)))
        return answers

    def normal_form(self, text: str) -> str:
        """The text as the tokenizer reads it (Qwen's: Unicode's NFC): what the model learns and writes."""
        normalizer = self.processor.tokenizer.backend_tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def loss(self, samples: Sequence[Sample]) -> tuple[float, int]:
        """Sum of the losses of the samples' trained tokens, in nats, and their number."""
        inputs = self._inputs(samples, [len(sample.input_ids) for sample in samples])
        trained = _pad([sample.trained for sample in samples], False).to(self.model.device)
        with torch.inference_mode():
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            # Logits of the trained tokens alone: all of a batch's over a real vocabulary would take gigabytes.
            logits = self.model.get_output_embeddings()(hidden[:, :-1][trained[:, 1:]])
            targets = inputs["input_ids"][:, 1:][trained[:, 1:]]
            total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total.item(), targets.numel()

    def _inputs(self, samples: Sequence[Sample], lengths: Sequence[int]) -> dict[str, Tensor]:
        """The first tokens of each sample as a batch, padded on the left so that all end together.

        input_ids, attention_mask, mm_token_type_ids: [B, S] int64; pixel_values [P, D], image_grid_thw [I, 3].
        """
        rows = [sample.input_ids[:length] for sample, length in zip(samples, lengths, strict=True)]
        input_ids = _pad(rows, self.processor.tokenizer.pad_token_id)
        inputs = {"input_ids": input_ids, "attention_mask": _pad([torch.ones_like(row) for row in rows], 0)}
        if any(len(sample.grid_thw) for sample in samples):
            inputs |= {
                "pixel_values": torch.cat([sample.pixel_values for sample in samples]),
                "image_grid_thw": torch.cat([sample.grid_thw for sample in samples]),
                "mm_token_type_ids": (input_ids == image_token(self.processor)[1]).long(),
            }
        dtype = self.model.dtype
        return {
            name: tensor.to(self.model.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }


def auto_class(config: Mapping[str, Any]) -> Any:
    """transformers' automatic class for a folder's `config.json`: of images and text, or of text alone."""
    import transformers

    return transformers.AutoModelForCausalLM if is_text_only(config) else transformers.AutoModelForImageTextToText


def _with_adapter(
    model: PreTrainedModel, folder: Path, weights: HfWeights[Any], config: ModelConfig
) -> PreTrainedModel:
    """The model with a LoRA adapter in its weights, which peft puts there.

    peft leaves out what it doesn't know without a word, so the adapter's tensors are compared with the model first.
    """
    adapter = AdapterFolder.open(folder)
    whole = weights.mapping(config, ())
    modules = [*adapter.modules, *adapter.stacked(whole.tensors)]
    adapter.check(recorded_map(whole, weights.linears(whole), modules, adapter.options))
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError("--adapter: peft isn't installed; pip install peft") from error
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


def _answer_start(sample: Sample) -> int:
    """Index of the last answer's first trained token: what stands before it is the prompt, or all without one."""
    if not sample.trained.any():
        return len(sample.trained)
    before = sample.trained.roll(1)
    before[0] = False
    return int((sample.trained & ~before).nonzero()[-1, 0])
