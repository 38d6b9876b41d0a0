"""Bad inputs through whole programs: an exit code, one plain sentence, no traceback, nothing asked, nothing run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaign.cases import replace
from tests.campaign.doors import linked, write_sound_folder

ROOT = Path(__file__).parents[2]
BASE = ("--micro-batch-size", "1", "--seq-length", "64")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "hf"
    write_sound_folder(folder)
    return folder


def pipe(folder: Path, _: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def huge(folder: Path, _: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["depth"] = 10**8
    replace(folder / "config.json", json.dumps(config))


def nested(folder: Path, _: Path) -> None:
    replace(folder / "tokenizer.json", "[" * 100_000 + "]" * 100_000)


def remote_code(folder: Path, mark: Path) -> None:
    """A processor of the folder's own, which transformers would ask about on standard input."""
    replace(folder / "own.py", f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    content = {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}
    replace(folder / "processor_config.json", json.dumps(content))


def cut(folder: Path, _: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    replace(path, path.read_bytes()[:-1])


# The program, what is spoilt, what it has to say.
CASES: list[tuple[tuple[str, ...], Callable[[Path, Path], None], str]] = [
    (("arguments.py", *BASE, "--load-hf", "DIR"), pipe, "config.json: is a pipe"),
    (("arguments.py", *BASE, "--hf-config", "DIR"), huge, "vision_config.depth is 100000000"),
    (("arguments.py", *BASE, "--load-hf", "DIR"), nested, "tokenizer.json: nested deeper"),
    (("arguments.py", *BASE, "--load-hf", "DIR"), cut, "model-00002-of-00002.safetensors is cut short"),
    (("scripts/import_hf.py", "--hf", "DIR", "--output", "OUT"), huge, "vision_config.depth is 100000000"),
    (("scripts/import_hf.py", "--hf", "DIR", "--output", "OUT"), pipe, "config.json: is a pipe"),
    (("scripts/verify_checkpoint.py", "DIR"), cut, "model-00002-of-00002.safetensors is cut short"),
    (("scripts/generate.py", "--load", "DIR", "--prompt", "x"), remote_code, "trust_remote_code"),
    (("scripts/generate.py", "--load", "DIR", "--prompt", "x"), nested, "tokenizer.json: nested deeper"),
]


@pytest.mark.parametrize(("words", "spoil", "said"), CASES, ids=[f"{w[0]}-{s.__name__}" for w, s, _ in CASES])
def test_refused_plainly(
    sound: Path, tmp_path: Path, words: tuple[str, ...], spoil: Callable[[Path, Path], None], said: str
) -> None:
    folder, mark = linked(sound, tmp_path / "input"), tmp_path / "code was run"
    spoil(folder, mark)
    places = {"DIR": str(folder), "OUT": str(tmp_path / "out")}
    command = [sys.executable, *(places.get(word, word) for word in words)]
    # Whoever asks gets a yes.
    run = subprocess.run(command, cwd=ROOT, input="y\n" * 10, capture_output=True, text=True, timeout=600)
    assert run.returncode not in (0, -9), run.stdout + run.stderr
    assert said in run.stderr and "Traceback" not in run.stderr, run.stderr[-3000:]
    assert not mark.exists() and not (tmp_path / "out").exists()
