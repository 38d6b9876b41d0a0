"""Refusals of the data's flags before anything expensive starts. Imports neither torch nor numpy."""

from __future__ import annotations

import glob
import importlib.util
import json
import re
from argparse import Namespace
from pathlib import Path

_OWN_PROVIDER = re.compile(r"(?!__main__\b)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def refusals(args: Namespace) -> list[str]:
    """Everything wrong with the flags that say what is trained on, each with its fix."""
    problems = []
    name = args.dataset_provider
    if ":" in name and not _OWN_PROVIDER.fullmatch(name):
        problems.append(f"--dataset-provider {name}: expected package.module:function")
    elif ":" in name and importlib.util.find_spec(name.partition(":")[0].split(".")[0]) is None:
        problems.append(f"--dataset-provider {name}: no such module; put its folder on PYTHONPATH")
    if name == "chat":
        problems += _paths(args.dataset_path)
    elif args.dataset_path and len(args.dataset_path) > 1 and ":" not in name:
        problems.append(f"--dataset-path {' '.join(args.dataset_path)}: {name} reads one; give one")
    if args.media_root is not None and not Path(args.media_root).expanduser().is_dir():
        problems.append(f"--media-root {args.media_root}: no such folder")
    if not 0 <= args.max_bad_fraction <= 1:
        problems.append(f"--max-bad-fraction {args.max_bad_fraction:g}: a share from 0 to 1")
    if args.sample_timeout < 0:
        problems.append(f"--sample-timeout {args.sample_timeout:g}: has to be at least 0")
    try:
        is_object = isinstance(json.loads(args.chat_template_kwargs), dict)
    except ValueError:
        is_object = False
    if not is_object:
        problems.append(
            f"--chat-template-kwargs {args.chat_template_kwargs}: not a JSON object; "
            """write '{"enable_thinking": false}'"""
        )
    return problems


def _paths(paths: list[str] | None) -> list[str]:
    if not paths:
        return ["--dataset-provider chat: needs --dataset-path FILE, FOLDER, GLOB or HUB_NAME"]
    problems = []
    for path in paths:
        if Path(path).expanduser().exists() or _HUB_NAME.fullmatch(path):
            continue
        if "://" in path:
            problems.append(f"--dataset-path {path}: training reads no network; download it and give the file")
        elif not glob.has_magic(path):
            problems.append(f"--dataset-path {path}: no such file or folder")
        elif not glob.glob(str(Path(path).expanduser()), recursive=True):
            problems.append(f"--dataset-path {path}: no file has such a name")
    return problems
