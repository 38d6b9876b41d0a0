"""Models without their vision encoder: `--language-model-only`, and folders of transformers' text classes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from models.qwen35_vl.hf_weights import GROUPS, weight_map
from models.trained import frozen_names, selected
from tests.command_lines import accepted, refused
from tests.hf_folders import assert_same, read_folder
from tests.hf_generations import GENERATIONS, config_of, small_files, write_generation
from tests.train_jobs import run
from weights.checkpoint import export_checkpoint, import_folder
from weights.folder import IMAGE_FILES

ONLY = "--language-model-only"
VISION, TEXT = "3.5-35B-A3B", "3.8-text"
ViT = "model.visual."


def text_class_s(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a vision-language folder as its text class names them."""
    return {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(ViT)
    }


def spoil_vision(folder: Path) -> None:
    """NaN in every tensor of the ViT: whoever reads one refuses it."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        spoiled = {n: torch.full_like(t, torch.nan) if n.startswith(ViT) else t for n, t in tensors.items()}
        save_file(spoiled, file, metadata={"format": "pt"})


def check_is_text_alone(folder: Path, source: Path) -> None:
    """Config and small files of a text-only export of a vision-language folder."""
    config, stored = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"] and config["model_type"] == "qwen3_5_moe_text"
    assert config["tie_word_embeddings"] == stored["tie_word_embeddings"]
    assert {name: config[name] for name in stored["text_config"]} == stored["text_config"]
    assert not config.keys() & {"text_config", "vision_config", "image_token_id"}
    kept = {name: content for name, content in small_files(source).items() if name not in (*IMAGE_FILES, "config.json")}
    found = small_files(folder)
    del found["config.json"]
    assert found == kept


@pytest.mark.heavy
def test_a_folder_with_a_vision_encoder_is_trained_without_reading_it(tmp_path: Path) -> None:
    source, saved, checkpoint, again = (tmp_path / name for name in ("source", "saved", "checkpoint", "again"))
    expected = text_class_s(write_generation(source, VISION))
    spoil_vision(source)
    start = ["--load-hf", str(source), ONLY, "--image-seq-length", "0", "--save-hf"]
    going_on = ["--load", str(checkpoint), "--no-load-optim", "--no-load-rng", "--train-iters", "2"]
    log = run(
        tmp_path,
        [
            [*start, str(saved), "--save", str(checkpoint), "--no-save-optim"],
            [*start, str(again), *going_on, "--override-opt_param-scheduler"],
        ],
    )
    vision = sum(name.startswith(ViT) for name in read_folder(source))
    assert f"{vision} tensors left out, {ViT}" in log and "built without the vision encoder" in log
    assert "iteration        2/       2" in log
    for folder in (saved, again, export_checkpoint(checkpoint, tmp_path / "exported", quiet=True)):
        assert_same(read_folder(folder), expected)
        check_is_text_alone(folder, source)


def test_import_leaves_the_vision_encoder_out(tmp_path: Path) -> None:
    expected = text_class_s(write_generation(tmp_path / "source", VISION))
    spoil_vision(tmp_path / "source")
    imported = import_folder(tmp_path / "source", tmp_path / "imported", language_model_only=True, quiet=True)
    exported = export_checkpoint(imported, tmp_path / "exported", quiet=True)
    assert_same(read_folder(exported), expected)
    check_is_text_alone(exported, tmp_path / "source")


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_config_json_of_the_text_class(name: str) -> None:
    """It is the text_config of the other class, with transformers' names at the top, and read as it is written."""
    architecture = VARIANTS[name].language_model()
    config = architecture.to_hf()
    family = "Qwen3_5Moe" if architecture.is_moe else "Qwen3_5"
    assert config == {"architectures": [f"{family}ForCausalLM"], **VARIANTS[name].to_hf()["text_config"]}
    read = Qwen35VLConfig.from_hf(config)
    assert read.language_model_only and read.to_hf() == config and read.differences(architecture) == []
    assert architecture.differences(VARIANTS[name]) == [
        "without a vision encoder by the flags, and with one by the folder's config.json"
    ]
    for key, value in {"head_dim": 64, "hidden_act": "gelu", "num_hidden_layers": "4"}.items():
        with pytest.raises(ValueError, match=rf"config\.json: (rope_parameters|{key})") as error:
            Qwen35VLConfig.from_hf({**config_of(architecture), key: value})
        assert "text_config" not in str(error.value)


def test_groups_find_the_text_class_s_tensors() -> None:
    whole, text = (weight_map(config) for config in (VARIANTS["tiny"], VARIANTS["tiny"].language_model()))
    for group in ("language", "embeddings"):
        assert selected(whole, GROUPS, group) == selected(text, GROUPS, group)
    with pytest.raises(ValueError, match=r"vision: matches no tensor of the model; .*groups language, embeddings$"):
        frozen_names(text, GROUPS, ["vision"])


# The preflight


def test_a_text_only_folder_implies_the_flag(tmp_path: Path) -> None:
    write_generation(tmp_path / "text", TEXT)
    line = accepted("--load-hf", tmp_path / "text", "--dataset-provider", "chat", "--dataset-path", tmp_path)
    assert line.args.language_model_only and line.words[-1] == ONLY
    assert line.args.hf_processor_path == str(tmp_path / "text")


def test_a_vision_folder_is_another_model_s_checkpoint(tmp_path: Path) -> None:
    """The ViT of `--load-hf` may stay behind, that of a checkpoint not, and none appears from nowhere."""
    write_generation(tmp_path / "vision", VISION)
    write_generation(tmp_path / "text", TEXT)
    assert accepted("--load-hf", tmp_path / "vision", ONLY).hf_source is not None
    imported = import_folder(tmp_path / "vision", tmp_path / "imported", quiet=True)
    load = ("--hf-config", tmp_path / "vision", "--load", imported, "--finetune")
    accepted(*load)
    assert any("without a vision encoder by the flags, and with one" in problem for problem in refused(*load, ONLY))
    moe = ("--model-variant", "tiny_moe", "--load-hf", tmp_path / "text")
    assert any("with a vision encoder by the flags, and without" in problem for problem in refused(*moe))
    accepted(*moe, ONLY)


@pytest.mark.parametrize(
    "flags",
    [
        ("--freeze", "vision"),
        ("--freeze", "projector"),
        ("--lr-mult", "vision=0.1"),
        ("--lora-vision", "--lora-rank", "4"),
        ("--recompute-vision",),
        ("--redundant-vision",),
        ("--vision-num-layers", "2"),
        ("--image-token-id", "1020"),
        ("--max-pixels", "100000"),
        ("--max-patches-per-pack", "256"),
        ("--image-seq-length", "4"),
        ("--dataset-provider", "receipts"),
        ("--dataset-provider", "cord_v2"),
    ],
    ids=" ".join,
)
def test_contradictions_are_refused(flags: tuple[str, ...]) -> None:
    accepted("--model-variant", "tiny", *(flags if flags[0] != "--dataset-provider" else ()))
    assert any(flags[0] in problem for problem in refused("--model-variant", "tiny", ONLY, *flags))


def test_lora_needs_a_base_with_its_names(tmp_path: Path) -> None:
    write_generation(tmp_path / "vision", VISION)
    write_generation(tmp_path / "text", TEXT)
    lora = ("--lora-rank", "4")
    accepted("--load-hf", tmp_path / "text", *lora)
    (problem,) = refused("--load-hf", tmp_path / "vision", ONLY, *lora)
    assert "scripts/import_hf.py --language-model-only" in problem


def test_an_architecture_that_is_never_without_its_vision_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import MODEL_REGISTRY

    class Seeing(Qwen35VLConfig):
        def with_flags(self, args: Namespace) -> Qwen35VLConfig:
            return replace(super().with_flags(args), language_model_only=False)

    spec = MODEL_REGISTRY["qwen35_vl"]
    tiny = {field: getattr(VARIANTS["tiny"], field) for field in Seeing.__dataclass_fields__}
    monkeypatch.setitem(MODEL_REGISTRY, "seeing", replace(spec, variants={"tiny": Seeing(**tiny)}))
    assert "seeing isn't built without its vision encoder" in refused("--model-arch", "seeing", ONLY)[0]


# Data


def rows(folder: Path, *messages: Any) -> Path:
    answer = {"role": "assistant", "content": "A."}
    lines = [json.dumps({"messages": [{"role": "user", "content": content}, answer]}) for content in messages]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def test_a_sample_with_an_image_is_a_broken_one(tmp_path: Path) -> None:
    from data import DATASET_PROVIDERS
    from data.bad_sample import BadSample, Reason
    from data.processor import load_processor
    from data.sizes import measure
    from models.qwen35_vl.inputs import Qwen35VLInputs

    write_generation(tmp_path / "text", TEXT)
    image = [{"type": "image", "image": "not-looked-for.png"}, {"type": "text", "text": "What is it?"}]
    path = rows(tmp_path, "Who are you?", image)
    line = accepted("--load-hf", tmp_path / "text", "--dataset-provider", "chat", "--dataset-path", path)
    args = Namespace(**{**vars(line.args), "params_dtype": torch.float32, "num_workers": 0})
    processor = load_processor(args, line.config.to_hf())
    inputs = Qwen35VLInputs(GENERATIONS[TEXT].architecture)
    dataset = DATASET_PROVIDERS["chat"].build(args, "train", processor, inputs)
    sample = dataset[0]
    assert len(sample.grid_thw) == 0 and len(sample.pixel_values) == 0
    with pytest.raises(BadSample, match=r"chats\.jsonl.*it has an image, which a model of text alone can't see") as bad:
        dataset.size(1)
    assert bad.value.reason is Reason.UNSEEN
    sizes = measure(dataset, workers=0)
    assert sum(sizes.tokens > 0) == 1
    seeing = DATASET_PROVIDERS["chat"].build(
        Namespace(**{**vars(args), "language_model_only": False}), "train", processor, inputs
    )
    assert seeing.fingerprint != dataset.fingerprint  # sizes that were measured for the other aren't taken


def test_a_batch_has_no_images(tmp_path: Path) -> None:
    """mock and ragged draw text alone, and no token stands for an image, whatever the vocabulary."""
    from data import DATASET_PROVIDERS
    from data.batch import collate
    from models.qwen35_vl.inputs import Qwen35VLInputs

    inputs = Qwen35VLInputs(Qwen35VLConfig.from_hf(config_of(GENERATIONS[TEXT].architecture)))
    line = accepted("--model-variant", "tiny", ONLY)
    args = Namespace(**{**vars(line.args), "params_dtype": torch.float32})
    for name in ("mock", "ragged"):
        samples = [DATASET_PROVIDERS[name].build(args, "train", None, inputs)[index] for index in range(8)]
        batch = collate(
            [samples], inputs, alignment=1, packed=True, seq_len=128, dtype=torch.float32, pad_token_id=0,
            with_vision=False,
        )  # fmt: skip
        assert batch.vision is None and (batch.vision_index == -1).all() and batch.stats.images == 0
        assert batch.input_ids.max() < 1024 and batch.stats.flops > 0


# Asking it


def test_a_text_only_folder_answers_and_sees_nothing(tmp_path: Path) -> None:
    from PIL import Image

    from evaluation.model import HfModel

    write_generation(tmp_path / "text", TEXT)
    model = HfModel.load(tmp_path / "text")
    assert type(model.model).__name__ == "Qwen3_5MoeForCausalLM"
    question = model.question("Who are you?", [], max_new_tokens=2)
    (answer,) = model.generate(model.prompts([question]), 2)
    assert isinstance(answer.text, str)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="a model of text alone can't see"):
        model.question("What is it?", [tmp_path / "image.png"], max_new_tokens=2)
