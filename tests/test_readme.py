"""README against the repository: its tree, its commands, its table of environment variables.

What the README has to look like for this to read it:
- the tree is the first ```text block with a line `pretrain_multimodal.py`: one path per line, children two spaces
  deeper, folders end with "/", whatever follows two spaces is the description. A folder whose children are listed
  lists all of them.
- commands stand in ```bash blocks: comments, blank lines, `NAME=value` prefixes and backslash continuations allowed.
  CAPITAL words and words with "$", "*" or "..." stand for something of the reader's.
- variables stand in the tables whose header's first cell is "Variable", in backticks.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LAUNCHERS = ("scripts/run_qwen35_vl.sh", "scripts/slurm.sh", "pretrain_multimodal.py", "arguments.py")
PLACEHOLDER = re.compile(r"^[A-Z_]+$|[$*]|\.\.\.")
ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=")
REPOSITORY_PATH = re.compile(r"^(\./)?((data|models|runtime|scripts|tests)/\S+|[\w./-]+\.(py|sh|lock|toml|md))$")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]


def tree() -> list[str]:
    """Paths of README's tree, folders with a trailing slash."""
    drawn = next((block for block in blocks("text") if "pretrain_multimodal.py" in block), None)
    assert drawn, "README has no ```text block with the tree"
    paths: list[str] = []
    parents: list[str] = []
    for line in filter(str.strip, drawn.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = re.split(r"\s{2,}", line.strip())[0]
        parents = [*parents[:depth], name]
        assert len(parents) == depth + 1 and " " not in name, f"README's tree: can't read {line!r}"
        paths.append("".join(parents))
    return paths


def commands() -> list[list[str]]:
    """Words of every command in README's bash blocks."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def words_after_assignments(words: list[str]) -> tuple[list[str], list[str]]:
    names = []
    while words and (match := ASSIGNMENT.match(words[0])):
        names.append(match[1])
        words = words[1:]
    return names, words


@cache
def launcher_flags() -> set[str]:
    """Ours and Megatron's."""
    from runtime import prepare

    prepare()
    from megatron.training.arguments import add_megatron_arguments

    from arguments import add_multimodal_args

    parser = add_multimodal_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    return set(parser._option_string_actions)


@cache
def flags_of(script: str) -> set[str]:
    """Of one of our scripts, as its --help tells them."""
    if script in LAUNCHERS:
        return launcher_flags()
    text = (ROOT / script).read_text()
    if script.endswith(".py"):
        shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        text = shown.stdout
    return set(re.findall(r"--[a-z][\w-]*", text))


def script_variables() -> set[str]:
    """What the launcher and env.sh read from the environment."""
    text = "".join((ROOT / script).read_text() for script in ("scripts/run_qwen35_vl.sh", "scripts/env.sh"))
    # A default (:-) or a demand (:?) marks what comes from outside; `for variable in ...` reads by name.
    names = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):[-?]", text))
    for loop in re.findall(r"for variable in ([A-Z0-9_ ]+);", text):
        names |= set(loop.split())
    return names - {"PYENV_ROOT"}


def documented_variables() -> set[str]:
    names: set[str] = set()
    for table in re.findall(r"^\| *Variable.*\n(?:\|.*\n?)+", README, flags=re.MULTILINE):
        for row in table.splitlines()[2:]:
            names |= set(re.findall(r"`([A-Z][A-Z0-9_]*)`", row.split("|")[1]))
    return names


def test_tree_matches_the_repository() -> None:
    listed = tree()
    files = tracked_files()
    there = {*files, *(f"{parent}/" for file in files for parent in map(str, Path(file).parents) if parent != ".")}
    assert [path for path in listed if path not in there] == [], "in README's tree, but not in the repository"
    opened = {str(Path(path).parent) for path in listed}  # folders whose children are listed; "." for the top
    expected = {path for path in there if str(Path(path).parent) in opened and not Path(path).name.startswith(".")}
    expected = {path for path in expected if Path(path).name != "__init__.py"}
    assert expected - set(listed) == set(), "in the repository, but not in README's tree"


def test_commands_name_existing_files_and_flags() -> None:
    assert commands(), "README has no ```bash block"
    for words in commands():
        _, words = words_after_assignments(words)
        script = None
        for word in words:
            if PLACEHOLDER.search(word):
                continue
            if REPOSITORY_PATH.match(word) and not word.startswith("-"):
                path = word.removeprefix("./").split("::")[0]
                assert (ROOT / path).exists(), f"README: {shlex.join(words)}: no {path}"
                if script is None and path.endswith((".py", ".sh")) and "pytest" not in words[:4]:
                    script = path
            elif script and word.startswith("--"):
                flag = word.split("=")[0]
                assert flag in flags_of(script), f"README: {shlex.join(words)}: {script} has no {flag}"


def test_commands_set_known_variables() -> None:
    known = script_variables()
    for words in commands():
        names, rest = words_after_assignments(words)
        if any(script in rest for script in LAUNCHERS[:2]):
            assert set(names) <= known | {"CUDA_VISIBLE_DEVICES"}, f"README: {shlex.join(words)}"


def test_table_of_variables_matches_the_launcher() -> None:
    slurm = {name for name in script_variables() if name.startswith("SLURM_")}
    assert documented_variables() - slurm == script_variables() - slurm


@pytest.mark.parametrize("name", ["TP", "NUM_LAYERS", "MASTER_ADDR", "CKPT_RESUME", "SKIP_ENV", "PROFILE_RANKS"])
def test_variables_are_found(name: str) -> None:
    """Guards the pattern that the table's test rests on."""
    assert name in script_variables()


def test_the_dataset_example_gives_samples() -> None:
    import torch
    from PIL import Image

    from data import DATASET_PROVIDERS
    from data.receipts.processor import build_processor
    from models.qwen35_vl.configuration import VARIANTS

    example = next(block for block in blocks("python") if "DATASET_PROVIDERS[" in block)
    exec(example, {"ROWS": [(Image.new("RGB", (96, 64), "white"), "A blank page.")]})
    provider = DATASET_PROVIDERS.pop("captions")
    limits = {"seq_length": 64, "min_pixels": None, "max_pixels": None}
    args = Namespace(**limits, params_dtype=torch.float32, strict_special_mask=False)
    config = VARIANTS["tiny"].to_hf()
    processor = build_processor("tiny", {name: id for name, id in config.items() if name.endswith("_token_id")})
    dataset = provider.build(args, "train", processor, None)
    sample = dataset[0]
    assert len(sample.input_ids) == dataset.size(0).tokens
    assert sample.trained.any() and sample.grid_thw.tolist() == [[1, 4, 6]]
