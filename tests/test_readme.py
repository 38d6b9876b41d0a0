"""The documentation against the repository: tree, commands, flags, variables, paths, links.

Pages are README.md, CONTRIBUTING.md and docs/. Dated files in docs/benchmarks are history, whose commands may be
outdated; only their links are checked, as are CHANGELOG.md's. What a page has to look like for this to read it:

- the tree is the ```text block whose first line begins with `pretrain_multimodal.py`: one path per line, children two
  spaces deeper, folders end with "/", whatever follows two spaces is the description. A folder whose children are
  listed lists all of them.
- commands stand in ```bash blocks: comments, blank lines, `NAME=value` prefixes and backslash continuations allowed.
  CAPITAL words and words with "$", "*" or "..." stand for something of the reader's.
- variables stand in the tables whose header's first cell is "Variable", in backticks.
- flags, variables with a value and paths in running text stand in backticks.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README_LINES = 130
LAUNCHERS = ("scripts/run_qwen35_vl.sh", "scripts/slurm.sh", "pretrain_multimodal.py", "arguments.py")
# Programs whose flags the running text may name, besides the launchers.
PROGRAMS = ("scripts/*.py", "scripts/*.sh", "tests/golden_losses.py")
ROOMS = "data|docs|evaluation|models|proofs|runtime|scripts|tests|weights"
PLACEHOLDER = re.compile(r"^[A-Z_]+$|[$*|]|\.\.\.")
ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=")
REPOSITORY_PATH = re.compile(rf"^(\./)?(({ROOMS})/\S+|[\w./-]+\.(py|sh|lock|toml|md))$")
# Programs that hand what follows "--" to the training.
PASS_ON = ("scripts/check_parallel.py", "scripts/benchmark_train.py")
# Of programs that aren't ours.
FOREIGN_VARIABLES = {"CUDA_VISIBLE_DEVICES"}


def pages() -> dict[str, str]:
    """Path -> text of every page whose statements are checked."""
    dated = re.compile(r"docs/benchmarks/\d")
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    return {name: text for name, text in texts.items() if not dated.match(name)}


def linked_pages() -> dict[str, str]:
    """Those, and the pages whose links alone are checked."""
    history = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return pages() | {str(file.relative_to(ROOT)): file.read_text() for file in history}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def running_text(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_words(text: str) -> list[str]:
    """Words in backticks of a page's running text."""
    return [word for code in re.findall(r"`([^`\n]+)`", running_text(text)) for word in code.split()]


@cache
def tracked_files() -> frozenset[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(path for path in listed.stdout.splitlines() if (ROOT / path).exists())


def tree(text: str) -> list[str]:
    """Paths of a page's tree, folders with a trailing slash; nothing if the page has none."""
    drawn = next((block for block in blocks(text, "text") if block.startswith("pretrain_multimodal.py")), "")
    paths: list[str] = []
    parents: list[str] = []
    for line in filter(str.strip, drawn.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = re.split(r"\s{2,}", line.strip())[0]
        parents = [*parents[:depth], name]
        assert len(parents) == depth + 1 and " " not in name, f"the tree: can't read {line!r}"
        paths.append("".join(parents))
    return paths


def tree_problems(listed: list[str]) -> list[str]:
    """Where a drawn tree and the repository differ."""
    files = tracked_files()
    there = {*files, *(f"{parent}/" for file in files for parent in map(str, Path(file).parents) if parent != ".")}
    opened = {str(Path(path).parent) for path in listed}  # folders whose children are listed; "." for the top
    expected = {path for path in there if str(Path(path).parent) in opened and not Path(path).name.startswith(".")}
    expected = {path for path in expected if Path(path).name != "__init__.py"}
    return [
        *(f"{path} is in the tree, but not in the repository" for path in listed if path not in there),
        *(f"{path} is in the repository, but not in the tree" for path in sorted(expected - set(listed))),
    ]


def commands(text: str) -> list[list[str]]:
    """Words of every command in a page's bash blocks."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def documented_usage(script: Path) -> list[list[str]]:
    """Words of the commands in a script's docstring, which its --help prints."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    lines = [line.strip() for line in docstring.splitlines() if line.strip().startswith("python ")]
    return [shlex.split(re.sub(r"[][]", " ", line), comments=True) for line in lines]


def words_after_assignments(words: list[str]) -> tuple[list[str], list[str]]:
    names = []
    while words and (match := ASSIGNMENT.match(words[0])):
        names.append(match[1])
        words = words[1:]
    return names, words


@cache
def launcher_flags() -> frozenset[str]:
    """Ours and Megatron's."""
    from runtime import prepare

    prepare()
    from megatron.training.arguments import add_megatron_arguments

    from arguments import add_multimodal_args

    parser = add_multimodal_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    return frozenset(parser._option_string_actions)


@cache
def flags_of(script: str) -> frozenset[str]:
    """Of one of our programs, as its --help tells them."""
    if script in LAUNCHERS:
        return launcher_flags()
    text = (ROOT / script).read_text()
    if script.endswith(".py"):
        shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        text = shown.stdout
    return frozenset(re.findall(r"--[a-z][\w-]*", text))


@cache
def all_flags() -> frozenset[str]:
    """Of all programs; read from their sources, which is quicker than asking each for help."""
    sources = [file.read_text() for pattern in PROGRAMS for file in ROOT.glob(pattern)]
    return launcher_flags() | {flag for source in sources for flag in re.findall(r"--[a-z][\w-]*", source)}


@cache
def script_variables() -> frozenset[str]:
    """What the launcher and env.sh read from the environment."""
    text = "".join((ROOT / script).read_text() for script in ("scripts/run_qwen35_vl.sh", "scripts/env.sh"))
    # A default (:-) or a demand (:?) marks what comes from outside; `for variable in ...` reads by name.
    names = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):[-?]", text))
    for loop in re.findall(r"for variable in ([A-Z0-9_ ]+);", text):
        names |= set(loop.split())
    return frozenset(names - {"PYENV_ROOT"})


def command_problems(all_words: list[list[str]]) -> list[str]:
    """Files, flags and variables of commands that don't exist."""
    problems = []
    for words in all_words:
        shown = shlex.join(words)
        names, words = words_after_assignments(words)
        if any(launcher in words for launcher in LAUNCHERS[:2]):
            unknown = set(names) - script_variables() - FOREIGN_VARIABLES
            problems += [f"{shown}: the launcher reads no {name}" for name in sorted(unknown)]
        program = None
        for word in words:
            if word == "--" and program in PASS_ON:  # what follows goes to the training
                program = "pretrain_multimodal.py"
            elif PLACEHOLDER.search(word):
                continue
            elif REPOSITORY_PATH.match(word) and not word.startswith("-"):
                path = word.removeprefix("./").split("::")[0]
                if not (ROOT / path).exists():
                    problems.append(f"{shown}: no {path}")
                elif program is None and path.endswith((".py", ".sh")) and "pytest" not in words[:4]:
                    program = path
            elif program and word.startswith("--") and word.split("=")[0] not in flags_of(program):
                problems.append(f"{shown}: {program} has no {word.split('=')[0]}")
    return problems


def word_problems(words: list[str]) -> list[str]:
    """Flags, variables and paths of running text that don't exist."""
    names = {Path(file).name for file in tracked_files()}
    problems = []
    for word in words:
        if word.startswith("--"):
            flag = re.split(r"[=,.]", word)[0]
            if flag != "--" and flag not in all_flags():
                problems.append(f"no program has {flag}")
        elif match := re.match(r"^([A-Z][A-Z0-9_]*)=", word):
            if match[1] not in script_variables() | FOREIGN_VARIABLES:
                problems.append(f"no program reads {match[1]}")
        elif PLACEHOLDER.search(word):
            continue
        elif re.match(rf"^({ROOMS})/", word):
            if not (ROOT / word).exists():
                problems.append(f"no {word}")
        elif re.match(r"^[\w-]+\.(py|sh|lock|toml|md)$", word) and word not in names:
            problems.append(f"no file {word}")
    return problems


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", running_text(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", running_text(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def link_problems(page: str, text: str) -> list[str]:
    """Links of a page to files that aren't in the repository, and to headings that aren't in these files."""
    problems = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            problems.append(f"{page}: {target}: no such file")
        elif anchor and anchor not in anchors(text if not path else file.read_text()):
            problems.append(f"{page}: {target}: no such heading")
    return problems


def reachable_pages() -> set[str]:
    """Pages that a reader of README gets to by links."""
    texts = linked_pages()
    seen: set[str] = set()
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page not in texts:
            continue
        seen.add(page)
        for target in links(texts[page]):
            file = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            waiting.append(str(file.relative_to(ROOT.resolve())))
    return seen


def documented_variables(text: str) -> set[str]:
    names: set[str] = set()
    for table in re.findall(r"^\| *Variable.*\n(?:\|.*\n?)+", text, flags=re.MULTILINE):
        for row in table.splitlines()[2:]:
            names |= set(re.findall(r"`([A-Z][A-Z0-9_]*)`", row.split("|")[1]))
    return names


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_tree_matches_the_repository() -> None:
    trees = [listed for text in pages().values() if (listed := tree(text))]
    assert len(trees) == 1, "one page draws the tree"
    assert tree_problems(trees[0]) == []


@pytest.mark.parametrize("page", pages())
def test_commands_exist(page: str) -> None:
    assert command_problems(commands(pages()[page])) == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda script: script.name)
def test_usage_in_help_texts_exists(script: Path) -> None:
    usage = documented_usage(script)
    assert usage, f"{script.name}: its docstring shows no command"
    assert command_problems(usage) == []


@pytest.mark.parametrize("page", pages())
def test_flags_variables_and_paths_exist(page: str) -> None:
    assert word_problems(code_words(pages()[page])) == []


@pytest.mark.parametrize("page", linked_pages())
def test_links_resolve(page: str) -> None:
    assert link_problems(page, linked_pages()[page]) == []


def test_every_page_is_reachable() -> None:
    assert set(linked_pages()) - reachable_pages() == set()


def test_table_of_variables_matches_the_launcher() -> None:
    documented = {name for text in pages().values() for name in documented_variables(text)}
    slurm = {name for name in script_variables() if name.startswith("SLURM_")}
    assert documented - slurm == script_variables() - slurm


def test_variants_and_providers_are_documented() -> None:
    from data import DATASET_PROVIDERS
    from models import MODEL_REGISTRY

    named = {page: set(code_words(text)) for page, text in pages().items()}
    assert {name for spec in MODEL_REGISTRY.values() for name in spec.variants} - named["docs/launcher.md"] == set()
    assert set(DATASET_PROVIDERS) - named["docs/data.md"] == set()


@pytest.mark.parametrize("name", ["TP", "NUM_LAYERS", "MASTER_ADDR", "CKPT_RESUME", "SKIP_ENV", "PROFILE_RANKS"])
def test_variables_are_found(name: str) -> None:
    """Guards the pattern that the table's test rests on."""
    assert name in script_variables()


BROKEN_COMMANDS = {
    "flag": ("bash scripts/run_qwen35_vl.sh --lern-rate 1", "has no --lern-rate"),
    "flag of a script": ("python scripts/export_hf.py --lod DIR", "has no --lod"),
    "flag behind --": ("python scripts/check_parallel.py --steps 1 -- --lern-rate 1", "has no --lern-rate"),
    "file": ("python scripts/exprt_hf.py", "no scripts/exprt_hf.py"),
    "variable": ("TPP=2 bash scripts/run_qwen35_vl.sh", "reads no TPP"),
    "continued line": ("TP=2 \\\n    bash scripts/run_qwen35_vl.sh --lern-rate 1", "has no --lern-rate"),
}


@pytest.mark.parametrize("case", BROKEN_COMMANDS)
def test_a_broken_command_is_found(case: str) -> None:
    command, message = BROKEN_COMMANDS[case]
    (problem,) = command_problems(commands(f"```bash\n{command}\n```\n"))
    assert message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Give `--lern-rate 1`.", "no program has --lern-rate"),
        ("Set `TPP=2`.", "no program reads TPP"),
        ("See `data/pak.py`.", "no data/pak.py"),
        ("See `exprt_hf.py`.", "no file exprt_hf.py"),
    ],
)
def test_a_broken_word_is_found(text: str, message: str) -> None:
    assert word_problems(code_words(text)) == [message]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("docs/nowhere.md", "no such file"),
        ("docs/launcher.md#nowhere", "no such heading"),
        ("#nowhere", "no such heading"),
        ("docs/launcher.md#the-log-line", None),
        ("#here-its-a-heading", None),
        ("https://example.org/nowhere", None),
    ],
)
def test_a_broken_link_is_found(target: str, found: str | None) -> None:
    problems = link_problems("README.md", f"## Here: it's a heading\n\n[link]({target})\n")
    assert problems == ([] if found is None else [f"README.md: {target}: {found}"])


def test_a_wrong_tree_is_found() -> None:
    listed = tree((ROOT / "docs/architecture.md").read_text())
    assert tree_problems([*listed, "data/pak.py"]) == ["data/pak.py is in the tree, but not in the repository"]
    listed.remove("data/pack.py")
    assert tree_problems(listed) == ["data/pack.py is in the repository, but not in the tree"]


def test_the_dataset_example_gives_samples() -> None:
    import torch
    from PIL import Image

    from data.receipts.processor import build_processor
    from models.qwen35_vl.configuration import VARIANTS

    example = next(block for block in blocks(pages()["docs/data.md"], "python") if "class Captions" in block)
    module: dict[str, Any] = {"ROWS": [(Image.new("RGB", (96, 64), "white"), "A blank page.")]}
    exec(example, module)
    limits = {"seq_length": 64, "min_pixels": None, "max_pixels": None}
    args = Namespace(
        **limits,
        params_dtype=torch.float32,
        strict_special_mask=False,
        train_on="all",
        chat_template_kwargs="{}",
        language_model_only=False,
    )
    config = VARIANTS["tiny"].to_hf()
    processor = build_processor("tiny", {name: id for name, id in config.items() if name.endswith("_token_id")})
    dataset = module["build"](args, "train", processor, None)
    sample = dataset[0]
    assert len(sample.input_ids) == dataset.size(0).tokens
    assert sample.trained.any() and sample.grid_thw.tolist() == [[1, 4, 6]]
