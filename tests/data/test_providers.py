"""The registry of datasets: names without torch, one line to add another."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

from data import DATASET_PROVIDERS


def test_names_are_listed_without_torch() -> None:
    """The launcher's preflight has three seconds."""
    code = "import sys, data; print(*data.DATASET_PROVIDERS, 'torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["mock", "ragged", "receipts", "cord_v2", "False", "False"]


def test_entries_are_under_their_names() -> None:
    assert {name: provider.name for name, provider in DATASET_PROVIDERS.items()} == {
        name: name for name in DATASET_PROVIDERS
    }


def test_mock_needs_no_processor() -> None:
    assert DATASET_PROVIDERS["mock"].processor(Namespace(), {}) is None
