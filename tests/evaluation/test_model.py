"""Answers and losses through transformers: the same prompt as everyone's, whatever shares a batch; clear errors."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from data.conversation import Conversation
from data.sample import Sample, SampleOptions, build_sample
from evaluation.model import HfModel, weights_folder, without_gpu_kernels
from models.qwen35_vl.configuration import VARIANTS
from tests.trained_folder import write_trained_folder
from weights.checkpoint import import_folder

SMALL_VIT = replace(VARIANTS["tiny"].vision, num_layers=1, num_position_embeddings=64)
ARCHITECTURES = {
    name: VARIANTS[name].replace(
        vision=SMALL_VIT,
        mtp_num_layers=0,
        max_position_embeddings=1024,
        tie_word_embeddings=False,  # random tied weights answer with the last token again and again
    )
    for name in ("tiny", "tiny_moe")
}
SIZES = [(96, 64), (64, 128), (160, 96)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trained")
    return {name: write_trained_folder(root / name, architecture) for name, architecture in ARCHITECTURES.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, HfModel]:
    return {name: HfModel.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = []
    for number, (width, height) in enumerate(SIZES):
        values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        files.append(folder / f"{number}.png")
        Image.fromarray(values.byte().numpy()).save(files[-1])
    return files


def make_samples(model: HfModel, image_files: list[Path]) -> list[Sample]:
    """Of different lengths: no image, one, three over two turns."""
    images = [{"type": "image", "image": file} for file in image_files]
    first, both, last = images[:1], images[:2], images[2:]
    conversations = [
        ["Hi.", "Hello, what's the total?"],
        [[*first, {"type": "text", "text": "Read it."}], '{"shop":"Acorn"}'],
        [
            [*both, {"type": "text", "text": "And these?"}],
            "Tea and rice.",
            [*last, {"type": "text", "text": "This one?"}],
            "Soup.",
        ],
    ]
    made = []
    for turns in conversations:
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(turns)]
        made.append(build_sample(Conversation(messages, id="test"), model.processor, SampleOptions(512))[0])
    assert len({len(sample.input_ids) for sample in made}) == 3
    return made


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompt_is_what_the_processor_makes_without_thinking(
    models: dict[str, HfModel], image_files: list[Path], count: int
) -> None:
    model, files = models["tiny"], image_files[:count]
    ours = model.prompts([model.question("Read shop.", files, max_new_tokens=8)])
    content = [
        *({"type": "image", "image": Image.open(file)} for file in files),
        {"type": "text", "text": "Read shop."},
    ]
    theirs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert ours.keys() | {"mm_token_type_ids"} == theirs.keys() | {"mm_token_type_ids"}


def test_a_prompt_ends_where_the_last_answer_begins(models: dict[str, HfModel], image_files: list[Path]) -> None:
    model = models["tiny"]
    for sample, answer in zip(make_samples(model, image_files), ("Hello,", '{"shop"', "Soup."), strict=True):
        prompt = model.prompts([sample])["input_ids"][0]
        rest = model.processor.tokenizer.decode(sample.input_ids[len(prompt) :])
        assert torch.equal(prompt, sample.input_ids[: len(prompt)]) and rest.startswith(answer)


def test_special_tokens_in_a_question_stay_text(models: dict[str, HfModel]) -> None:
    model = models["tiny"]
    ids = model.question("What is <|image_pad|><|im_end|>?", [], max_new_tokens=8).input_ids
    assert model.processor.image_token_id not in ids
    assert (ids == model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 1  # of the question


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_loss_of_a_batch_is_transformers_own_of_each_sample(
    models: dict[str, HfModel], image_files: list[Path], name: str
) -> None:
    model = models[name]
    samples = make_samples(model, image_files)
    total, count = model.loss(samples)
    expected = 0.0
    for sample in samples:
        labels = torch.where(sample.trained, sample.input_ids, -100)[None]
        images = {
            "pixel_values": sample.pixel_values,
            "image_grid_thw": sample.grid_thw,
            "mm_token_type_ids": (sample.input_ids == model.processor.image_token_id).long()[None],
        }
        inputs = {"input_ids": sample.input_ids[None], **(images if len(sample.grid_thw) else {})}
        expected += model.model(**inputs, labels=labels).loss.item() * int(sample.trained[1:].sum())
    assert count == sum(int(sample.trained[1:].sum()) for sample in samples)
    assert total == pytest.approx(expected, rel=1e-6)  # measured: 4e-8


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_answers_do_not_depend_on_the_batch(models: dict[str, HfModel], image_files: list[Path], name: str) -> None:
    model = models[name]
    samples = make_samples(model, image_files)
    together = model.generate(model.prompts(samples), 6)
    assert together == [model.generate(model.prompts([sample]), 6)[0] for sample in samples]
    assert len({answer.text for answer in together}) > 1


def test_an_answer_stops_at_the_end_of_the_turn(
    models: dict[str, HfModel], image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["tiny"]
    samples = make_samples(model, image_files)[:2]
    tokenizer = model.processor.tokenizer
    ids = tokenizer('{"shop":"Grove"}').input_ids
    rows = torch.full((2, len(ids) + 3), tokenizer.pad_token_id)
    rows[:, : len(ids)] = torch.tensor(ids)
    rows[0, len(ids)] = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows[1, len(ids) :] = tokenizer.convert_tokens_to_ids("!")
    monkeypatch.setattr(model.model, "generate", lambda input_ids, **_: torch.cat([input_ids, rows], dim=1))
    ended, cut = model.generate(model.prompts(samples), len(ids) + 3)
    assert (ended.text, ended.finished) == ('{"shop":"Grove"}', True)
    assert (cut.text, cut.finished) == ('{"shop":"Grove"}!!!', False)


def test_a_model_says_what_its_data_has_to_be_like(models: dict[str, HfModel]) -> None:
    """Of the folder's config.json, for datasets that ask; see `scripts/evaluate.py`."""
    for name, model in models.items():
        vision, processor = ARCHITECTURES[name].vision, model.processor.image_processor
        assert model.inputs.image_token_id == ARCHITECTURES[name].token_ids.image
        assert (model.inputs.patch_size, model.inputs.merge_size) == (processor.patch_size, processor.merge_size)
        assert model.inputs.patch_dim == 3 * vision.temporal_patch_size * vision.patch_size**2


def test_a_checkpoint_answers_as_the_folder_it_was_made_from(
    folders: dict[str, Path], models: dict[str, HfModel], image_files: list[Path], tmp_path: Path
) -> None:
    import_folder(folders["tiny"], tmp_path / "checkpoint", quiet=True)
    with weights_folder(tmp_path / "checkpoint") as exported:
        model = HfModel.load(exported)
    assert not exported.exists()
    answers = [
        each.generate(each.prompts([each.question("Read it.", image_files[:1], max_new_tokens=6)]), 6)
        for each in (model, models["tiny"])
    ]
    assert answers[0] == answers[1]


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folders["tiny"], tmp_path / "broken"))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"), weights_folder(tmp_path / "nowhere"):
        pass
    with pytest.raises(ValueError, match=r"neither a HuggingFace folder .* nor a checkpoint"), weights_folder(tmp_path):
        pass
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(ValueError, match=r"did you mean .*/checkpoints"), weights_folder(tmp_path):
        pass
    with (
        pytest.raises(ValueError, match="iter_0000005: no complete checkpoint"),
        weights_folder(tmp_path / "checkpoints"),
    ):
        pass


def test_no_processor(broken: Path) -> None:
    for file in ("preprocessor_config.json", "processor_config.json"):
        (broken / file).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"--load .*broken: .*processor"):
        HfModel.load(broken)


def test_another_models_processor(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    with pytest.raises(ValueError, match=r"--load .*: the processor isn't this model's: <\|image_pad\|> is id 1020"):
        HfModel.load(broken)


def test_another_architecture(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(ValueError, match=r"broken.*llava"):
        HfModel.load(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken: config.json"):
        HfModel.load(broken)


def test_weights_that_are_missing_or_damaged(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = broken / "model.safetensors"
    tensors = load_file(file)
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--load .*broken: {name}: missing"):
        HfModel.load(broken)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"--load .*broken: {name}: has shape"):
        HfModel.load(broken)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--load .*broken: model.safetensors is cut short or damaged"):
        HfModel.load(broken)
    file.unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"--load .*broken: pytorch_model.bin is a pickle"):
        HfModel.load(broken)


def test_images_that_cannot_be_asked_about(
    models: dict[str, HfModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["tiny"]
    text, cut, thin, large = (tmp_path / name for name in ("text.png", "cut.png", "thin.png", "large.png"))
    text.write_text("not an image")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-2000])
    Image.new("RGB", (900, 4)).save(thin)
    Image.new("RGB", (1024, 1024)).save(large)
    for file, reason in (
        (tmp_path / "none.png", "none.png: No such file"),
        (text, "text.png: not an image"),
        (cut, r"cut.png\): OSError: image file is truncated"),
        (thin, "900 x 4 pixels: .*aspect ratio"),
        (large, "more than the 1000 tokens that 1024 positions leave beside an answer of 24; --max-pixels"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.question("What is it?", [file], max_new_tokens=24)
    assert len(model.question("What is it?", [large], max_new_tokens=24, max_pixels=64 * 64).pixel_values) == 16
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.png: .*exceeds limit"):
        model.question("What is it?", [large], max_new_tokens=24)


def test_gpu_kernels_are_hidden_only_while_asked() -> None:
    kernels = ModuleType("fla")
    sys.modules["fla"] = kernels
    try:
        with without_gpu_kernels(), pytest.raises(ImportError):
            import fla  # noqa: F401
        assert sys.modules["fla"] is kernels
    finally:
        del sys.modules["fla"]
    with without_gpu_kernels():
        pass
    assert "fla" not in sys.modules
