"""What the environment says about a job's ranks, checked before torch dies of it.

torchrun, Slurm or the user sets these variables; each is checked where it is set. Imports neither torch nor megatron.
"""

from __future__ import annotations

import os
import re
import socket


def world_size() -> int:
    """Ranks of the whole job, from WORLD_SIZE; one without it.

    Raises:
        ValueError: it isn't a number of ranks.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if problem := _problem("WORLD_SIZE", text, 1, None):
        raise ValueError(problem)
    return int(text)


def problems(ranks: int) -> list[str]:
    """Refusals of variables that aren't numbers, or not of this job.

    Args:
        ranks: of the whole job.
    """
    bounds = (
        ("MASTER_PORT", 1, 65535),
        ("OMP_NUM_THREADS", 1, None),
        ("SAVE_SECONDS", 1, None),  # scripts/agent.py
        ("RANK", 0, ranks - 1),
        ("LOCAL_RANK", 0, ranks - 1),
    )
    found = (_problem(name, os.environ.get(name), least, most) for name, least, most in bounds)
    return [problem for problem in found if problem] or _port(ranks)


def _port(ranks: int) -> list[str]:
    """Refusal of a MASTER_PORT that the first rank of several couldn't listen at; torchrun's agent has done so."""
    port = os.environ.get("MASTER_PORT")
    if not port or ranks == 1 or os.environ.get("RANK", "0") != "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch: a port that is closing will do
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            return [f"MASTER_PORT={port}: {error.strerror}; give another, the same on every node"]
    return []


def _problem(name: str, text: str | None, least: int, most: int | None) -> str | None:
    if not text:  # not set
        return None
    if re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) <= (int(text) if most is None else most):
        return None
    return f"{name}={text}: expected a number from {least} {'on' if most is None else f'to {most}'}"
