"""Every field of transformers' configuration classes is read or decided about, and what isn't built is refused."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3_5 import configuration_qwen3_5
from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe

from models.qwen35_vl.config_keys import FIXED, UNREAD, unbuilt_keys
from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from tests.hf_generations import GENERATIONS, config_of

FAMILIES = {
    "tiny": (configuration_qwen3_5, "Qwen3_5"),
    "tiny_moe": (configuration_qwen3_5_moe, "Qwen3_5Moe"),
}
SECTIONS = {"": "Config", "text_config": "TextConfig", "vision_config": "VisionConfig"}
# Read by `from_hf` besides what `to_hf` writes.
ALSO_READ = {"text_config": {"full_attention_interval", "partial_rotary_factor", "rope_theta", "rope_scaling"}}


def decided(variant: str, section: str) -> set[str]:
    config = VARIANTS[variant].to_hf()
    written = config if section == "" else config[section]
    rope = {"rope_parameters"} if f"{section}.rope_parameters" in FIXED else set()
    own = ALSO_READ.get(section, set())
    return set(written) | set(FIXED.get(section, ())) | set(UNREAD[section]) | rope | own


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_field_of_transformers_is_decided(variant: str, section: str) -> None:
    module, prefix = FAMILIES[variant]
    config_class = getattr(module, f"{prefix}{SECTIONS[section]}")
    fields = {field.name for field in dataclasses.fields(config_class)} | set(config_class().to_dict())
    assert fields - decided(variant, section) == set()


@pytest.mark.parametrize("variant", FAMILIES)
def test_what_transformers_computes_with_is_decided(variant: str) -> None:
    """Attributes that the modeling file reads, and those of them that are left unread with a reason."""
    module, _ = FAMILIES[variant]
    assert module.__file__ is not None
    source = Path(module.__file__.replace("configuration_", "modeling_")).read_text()
    used = set(re.findall(r"\bconfig\.([a-z]\w*)", source))
    assert len(used) > 20
    assert used - set().union(*(decided(variant, section) for section in SECTIONS)) == set()
    unread = set().union(*(set(keys) for keys in UNREAD.values()))
    written = set(VARIANTS[variant].to_hf()["text_config"])
    assert used & unread - written <= {"pad_token_id", "output_router_logits", "router_aux_loss_coef", "return_dict"}


def put(config: dict[str, Any], path: str, key: str, value: object) -> None:
    for name in path.split("."):
        config = config.setdefault(name, {})
    config[key] = value


@pytest.mark.parametrize(("path", "key"), [(path, key) for path, keys in FIXED.items() for key in keys])
def test_another_value_is_refused_by_name(path: str, key: str) -> None:
    config = copy.deepcopy(config_of(VARIANTS["tiny"]))
    put(config, path, key, FIXED[path][key][0])
    Qwen35VLConfig.from_hf(config)
    put(config, path, key, "another")
    with pytest.raises(ValueError, match=re.escape(f"{path}.{key} is 'another', which isn't built here")):
        Qwen35VLConfig.from_hf(config)


def test_yarn_is_refused_in_both_spellings() -> None:
    """Trained without its scaling and exported as "default" it would be another model."""
    config = config_of(VARIANTS["tiny"])
    rope = {**config["text_config"].pop("rope_parameters"), "rope_type": "yarn", "factor": 4.0}
    for spelling in ("rope_parameters", "rope_scaling"):
        text = {**config["text_config"], spelling: rope}
        assert unbuilt_keys({**config, "text_config": text}) == [
            f"text_config.{spelling}.rope_type is 'yarn', which isn't built here; only 'default' is"
        ]


@pytest.mark.parametrize("name", GENERATIONS)
def test_released_keys_are_accepted(name: str) -> None:
    architecture = GENERATIONS[name].architecture
    config = config_of(architecture)
    assert unbuilt_keys({"text_config": config, "vision_config": {}, **config}) == []
    read = Qwen35VLConfig.from_hf(config)
    assert read.to_hf() == architecture.to_hf() and read.differences(architecture) == []


@pytest.mark.parametrize("variant", ["0.8b", "9b", "35b_a3b", "397b_a17b"])
@pytest.mark.parametrize("text_only", [False, True])
def test_a_run_from_scratch_writes_the_keys_of_releases(variant: str, text_only: bool) -> None:
    architecture = VARIANTS[variant].language_model() if text_only else VARIANTS[variant]
    config = architecture.to_hf()
    text = config if text_only else config["text_config"]
    released = {
        "eos_token_id": 248044,  # of a document; generation_config.json has a turn's too
        "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "mamba_ssm_dtype": "float32",
        "attn_output_gate": True,
        "full_attention_interval": 4,
    }
    assert {key: text[key] for key in released} == released
    if not text_only:
        assert config["vision_config"]["model_type"] == config["model_type"]
        assert config["vision_config"]["deepstack_visual_indexes"] == []


@pytest.mark.parametrize("value", [7, [7, 8], None])
def test_the_end_of_a_document_is_read(value: object) -> None:
    config = config_of(VARIANTS["tiny"])
    config["text_config"]["eos_token_id"] = value
    read = Qwen35VLConfig.from_hf(config)
    assert read.to_hf()["text_config"].get("eos_token_id") == value
    assert read.differences(VARIANTS["tiny"]) == []
    del config["text_config"]["eos_token_id"]
    assert "eos_token_id" not in Qwen35VLConfig.from_hf(config).to_hf()["text_config"]


@pytest.mark.parametrize("value", [-1, "7", True, [True]])
def test_another_end_of_a_document_is_refused(value: object) -> None:
    config = config_of(VARIANTS["tiny"])
    config["text_config"]["eos_token_id"] = value
    with pytest.raises(ValueError, match=r"text_config\.eos_token_id"):
        Qwen35VLConfig.from_hf(config)
