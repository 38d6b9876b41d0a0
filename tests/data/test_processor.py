"""The built processor, and what a loaded one is refused for."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor

from data.processor import check_processor, load_processor, read_processor
from data.processor_files import VISION_TOKENS
from data.receipts.processor import build_processor
from models.qwen35_vl.configuration import VARIANTS

# Qwen3.5's tokenizer has these ids.
QWEN35_IDS = {
    "<|endoftext|>": 248044,
    "<|im_start|>": 248045,
    "<|im_end|>": 248046,
    "<|vision_start|>": 248053,
    "<|vision_end|>": 248054,
    "<|vision_pad|>": 248055,
    "<|image_pad|>": 248056,
    "<|video_pad|>": 248057,
    "<think>": 248068,
    "</think>": 248069,
}


def vision_ids(variant: str) -> dict[str, int]:
    return {f"{name}_token_id": token_id for name, token_id in asdict(VARIANTS[variant].token_ids).items()}


def config(variant: str = "tiny") -> dict[str, Any]:
    return VARIANTS[variant].to_hf()


@pytest.fixture(scope="module")
def tiny() -> Qwen3VLProcessor:
    return build_processor("tiny", vision_ids("tiny"))


@pytest.fixture(scope="module")
def full() -> Qwen3VLProcessor:
    return build_processor("full", vision_ids("397b_a17b"))


def test_full_layout_has_qwens_ids_and_nothing_between(full: Qwen3VLProcessor) -> None:
    vocabulary = full.tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in QWEN35_IDS} == QWEN35_IDS
    text_ids = sorted(token_id for token, token_id in vocabulary.items() if token not in QWEN35_IDS)
    assert text_ids == list(range(len(text_ids))) and len(text_ids) < 1024
    assert (full.image_token_id, full.video_token_id) == (248056, 248057)
    assert (full.tokenizer.eos_token, full.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_tiny_layout_fits_1024_rows_and_the_models_ids(tiny: Qwen3VLProcessor) -> None:
    vocabulary = tiny.tokenizer.get_vocab()
    assert max(vocabulary.values()) < 1024 == VARIANTS["tiny"].vocab_size
    assert len(set(vocabulary.values())) == len(vocabulary)
    ids = VARIANTS["tiny"].token_ids
    found = [tiny.tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS.values()]
    assert found == [ids.vision_start, ids.vision_end, ids.image, ids.video]


@pytest.mark.parametrize("text", ["{'total': 17}", "naïve — 漢字 🙂\n\n\ttab", "<think>no</think>"])
def test_any_text_survives_and_layouts_agree(tiny: Qwen3VLProcessor, full: Qwen3VLProcessor, text: str) -> None:
    ids = tiny.tokenizer(text)["input_ids"]
    assert tiny.tokenizer.decode(ids) == text
    if "<" not in text:
        assert full.tokenizer(text)["input_ids"] == ids


def test_building_is_deterministic(tiny: Qwen3VLProcessor) -> None:
    again = build_processor("tiny", vision_ids("tiny"))
    assert again.tokenizer._tokenizer.to_str() == tiny.tokenizer._tokenizer.to_str()


def test_image_processor_is_qwen35s(full: Qwen3VLProcessor, tiny: Qwen3VLProcessor) -> None:
    processor = full.image_processor
    assert isinstance(processor, Qwen2VLImageProcessor)
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (16, 2, 2)
    assert [*processor.image_mean, *processor.image_std] == [0.5] * 6
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (65536, 16777216)
    assert tiny.image_processor.size["shortest_edge"] == 4096


@pytest.mark.parametrize("layout", ["tiny", "full"])
def test_saved_and_loaded_through_auto_processor(
    layout: str, tiny: Qwen3VLProcessor, full: Qwen3VLProcessor, tmp_path: Path
) -> None:
    built = {"tiny": tiny, "full": full}[layout]
    built.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen3VLProcessor)
    assert loaded.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert loaded.chat_template == built.chat_template
    assert loaded.image_processor.to_dict() == built.image_processor.to_dict()
    assert loaded.image_token_id == built.image_token_id
    text = "<|im_start|>user\n<think>Read 17 shops<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    assert loaded.tokenizer(text)["input_ids"] == built.tokenizer(text)["input_ids"]
    assert (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id) == (
        built.tokenizer.pad_token_id,
        built.tokenizer.eos_token_id,
    )


def test_chat_template_by_hand(tiny: Qwen3VLProcessor) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? "}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA cat."},
        {"role": "user", "content": [{"type": "text", "text": " And "}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two dogs."}]},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tiny.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{image}What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"  # reasoning before the last question is forgotten
        f"<|im_start|>user\nAnd {image}{image}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nTwo dogs.<|im_end|>\n"
    )


def test_reasoning_and_generation_prompts_by_hand(tiny: Qwen3VLProcessor) -> None:
    question = [{"role": "user", "content": "Why?"}]
    start = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    answer = [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."}]

    def rendered(messages: list[dict[str, Any]], **options: Any) -> str:
        return tiny.apply_chat_template(messages, tokenize=False, **options)

    assert rendered(question + answer) == start + "hm\n</think>\n\nSo.<|im_end|>\n"
    assert rendered(question, add_generation_prompt=True) == start
    assert rendered(question, add_generation_prompt=True, enable_thinking=False) == start + "\n</think>\n\n"


@pytest.mark.parametrize(("name", "token_id"), [("image_token_id", 1021), ("image_token_id", 2000)])
def test_colliding_or_outlying_ids_are_refused(name: str, token_id: int) -> None:
    with pytest.raises(ValueError, match="must differ and lie below 1024"):
        build_processor("tiny", {**vision_ids("tiny"), name: token_id})


# Loading


def saved(processor: Qwen3VLProcessor, folder: Path, **tokenizer_config: Any) -> str:
    """The processor in a folder, keys of its tokenizer_config.json set, or removed where None."""
    processor.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), **tokenizer_config}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(folder)


def test_missing_pad_token_becomes_eos(tiny: Qwen3VLProcessor, tmp_path: Path) -> None:
    path = saved(tiny, tmp_path, tokenizer_class="PreTrainedTokenizerFast", pad_token=None)
    assert AutoProcessor.from_pretrained(path).tokenizer.pad_token is None
    assert read_processor(path).tokenizer.pad_token == "<|im_end|>"


def test_neither_pad_nor_eos_is_refused(tiny: Qwen3VLProcessor, tmp_path: Path) -> None:
    path = saved(tiny, tmp_path, tokenizer_class="PreTrainedTokenizerFast", pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"--hf-processor-path .* neither a pad nor an EOS token"):
        read_processor(path)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_start|>"])
def test_a_tokenizer_without_the_tokens_we_rely_on_is_refused(
    token: str, tiny: Qwen3VLProcessor, tmp_path: Path
) -> None:
    path = saved(tiny, tmp_path)
    for file in tmp_path.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace(token, "<|other|>"))
    with pytest.raises(ValueError, match="--hf-processor-path .* has no " + token.replace("|", r"\|")):
        read_processor(path)


def test_a_folder_without_image_processor_is_refused(tiny: Qwen3VLProcessor, tmp_path: Path) -> None:
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--hf-processor-path"):
        read_processor(str(tmp_path))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--hf-processor-path .*nowhere"):
        read_processor(str(tmp_path / "nowhere"))


def test_processor_and_model_must_agree(tiny: Qwen3VLProcessor, full: Qwen3VLProcessor) -> None:
    check_processor(tiny, config("tiny"), None)
    check_processor(full, config("proxy"), None)
    with pytest.raises(ValueError, match=r"image_pad\|> is id 1020, the model's image_token_id is 7.*--image-token-id"):
        check_processor(tiny, {**config("tiny"), "image_token_id": 7}, "some/model")
    with pytest.raises(ValueError, match=r"--hf-processor-path some/model: .*vision_start"):
        check_processor(full, config("tiny"), "some/model")
    with pytest.raises(ValueError, match="ids up to 1021 for a vocabulary of 1000 rows"):
        check_processor(tiny, {**config("tiny"), "text_config": {"vocab_size": 1000}}, None)
    vision = {**config("tiny")["vision_config"], "patch_size": 14}
    with pytest.raises(ValueError, match=r"patch_size is 16, the model's patch_size is 14"):
        check_processor(tiny, {**config("tiny"), "vision_config": vision}, None)


def test_load_processor_builds_for_the_models_vocabulary(full: Qwen3VLProcessor, tmp_path: Path) -> None:
    def load(variant: str, path: str | None) -> Qwen3VLProcessor:
        return load_processor(Namespace(hf_processor_path=path), config(variant))

    assert load("tiny", None).image_token_id == 1020
    assert load("9b", None).image_token_id == 248056
    path = saved(full, tmp_path)
    assert load("9b", path).image_token_id == 248056
    with pytest.raises(ValueError, match="--image-token-id"):
        load("tiny", path)
