"""Hundreds of bad inputs, drawn from a seed: each is refused in bounded time, naming the file and the key, and no code
of it runs. The totals by kind are printed (`pytest -s`)."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import data.bounded
from arguments import Refused
from tests.campaign import more_cases
from tests.campaign.cases import KINDS, Case, cases
from tests.campaign.doors import DOORS, linked, write_sound_adapter, write_sound_checkpoint, write_sound_folder

LONGEST = 30  # seconds for one case, on a busy machine; nearly all take milliseconds
CHECKPOINT_KINDS = ("pickle with code", "bytes of an index", "bit of a shard", "files of a checkpoint")
# Sound input for them is a whole model's checkpoint: tests/weights/test_hf_checkpoint.py.
TWINS = ("export", "--pretrained-checkpoint")
REFUSED, HARMLESS = "refused", "read unchanged"


class TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for one."""


@contextmanager
def bounded() -> Iterator[None]:
    def overrun(_: int, __: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, overrun)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
    faulthandler.dump_traceback_later(300, exit=True)  # a wait without end uses no processor time
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A HuggingFace folder, an adapter on it, and a folder of checkpoints, by name."""
    root = tmp_path_factory.mktemp("sound")
    write_sound_folder(root / "hf")
    write_sound_adapter(root / "adapter", root / "hf")
    (root / "checkpoints").mkdir()
    write_sound_checkpoint(root / "checkpoints")
    return {name: root / name for name in ("hf", "adapter", "checkpoints")}


def sound_input(kind: str) -> str:
    if kind in more_cases.ADAPTER_KINDS:
        return "adapter"
    return "checkpoints" if kind in CHECKPOINT_KINDS else "hf"


def outcome(case: Case, sound: Path, place: Path) -> str:
    """REFUSED or HARMLESS where all is right, else what went wrong."""
    mark = place / "code was run"
    folder = linked(sound, place / "input")
    case.spoil(folder, mark)
    try:
        with bounded():
            DOORS[case.door](folder)
        result = HARMLESS if case.harmless else "silently accepted"
    except (ValueError, Refused) as error:
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        lacking = [names for names in case.names if not any(name in said for name in names.split("|"))]
        result = f"not named: {lacking}: {said[:300]}" if lacking else REFUSED
    except TooSlow:
        result = "too slow"
    except AssertionError as error:
        result = f"silently accepted: {error}"
    except BaseException as error:  # whatever a bad input brings out
        result = f"raw {type(error).__name__}: {str(error)[:200]}"
    return "ran code" if mark.exists() else result


def run(count: int, seed: int, sound: dict[str, Path], root: Path) -> tuple[Counter, list[str]]:
    totals: Counter = Counter()
    wrong = []
    for number, case in enumerate(cases(seed, count, (*KINDS, *more_cases.KINDS))):
        place = root / str(number)
        place.mkdir()
        found = outcome(case, sound[sound_input(case.kind)], place)
        totals[case.kind, found if found in (REFUSED, HARMLESS) else found.split(":")[0]] += 1
        if found not in (REFUSED, HARMLESS):
            wrong.append(f"case {number}, {case}: {found}")
    return totals, wrong


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading standard input is an error, and a template has two seconds."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something asks on standard input"))
    monkeypatch.setattr(data.bounded, "_PROBE_SECONDS", 2)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115  closed with the process


@pytest.mark.parametrize(
    ("count", "seed"), [(338, 0), pytest.param(5000, 1, marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_no_bad_input_gets_through(count: int, seed: int, sound: dict[str, Path], tmp_path: Path) -> None:
    begin = time.monotonic()
    totals, wrong = run(count, seed, sound, tmp_path)
    for (kind, result), number in sorted(totals.items()):
        print(f"{kind:24} {result:20} {number:5}")
    print(f"{totals.total()} cases in {time.monotonic() - begin:.0f} s")
    assert not wrong, "\n".join(wrong[:40])


@pytest.mark.parametrize("door", [door for door in DOORS if door not in TWINS])
def test_what_is_sound_comes_through(door: str, sound: dict[str, Path], tmp_path: Path) -> None:
    """Else the campaign would prove nothing."""
    name = "adapter" if "adapter" in door else "checkpoints" if door in ("read", "--load") else "hf"
    DOORS[door](linked(sound[name], tmp_path / "input"))
