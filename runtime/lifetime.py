"""Processes that end with the one that started them, and that outlive a signal meant for it.

    torchrun's agent (scripts/agent.py)   killed: its ranks end themselves, `end_with_agent`
    rank                                  SIGTERM: it saves and ends, runtime/preemption.py
    rank's children                       SIGTERM from others: ignored, the rank still needs them, `end_with_parent`
      loader workers, pools, Megatron's   rank gone, however it ended: they end too
      queue and writer of checkpoints

A signal to a job reaches all of its processes where torchrun, Slurm or a terminal sends it to groups. The kernel's own
parent-death signal isn't used: it follows the thread that forked, and is lost in a program that gains privileges.
Imports neither torch nor megatron.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from typing import Any

# A process is gone at most this long after the one that started it.
SECONDS = 1.0
TERMINATED = 128 + signal.SIGTERM


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started inside the block are born with SIGTERM blocked, until `end_with_parent` sees to it.

    The signal itself waits for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, or asks it to with SIGTERM; ignore SIGTERM from anybody else.

    Call it in the main thread, before others are started: they inherit the blocked signal.

    Args:
        parent: process id of the parent, as the parent itself knows it: it may have ended by now.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            info = signal.sigtimedwait({signal.SIGTERM}, SECONDS)
            if info is not None and info.si_pid == parent:
                break
        os._exit(TERMINATED)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def end_with_agent() -> None:
    """Under torchrun, end this rank when its agent ends; without one, nothing: plain python outlives its shell."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(SECONDS)
        os.write(2, f"rank {os.environ.get('RANK')}: torchrun's agent has ended, so this rank ends too\n".encode())
        os._exit(1)

    threading.Thread(target=watch, name="end with agent", daemon=True).start()


def call_in_child(parent: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function` in a child process of `parent` that ends with it; watching starts at the first call there.

    Of a module's top level, so that a spawned process finds it.
    """
    if os.getpid() != parent:
        _watched(parent)
    return function(*args, **kwargs)


@functools.cache
def _watched(parent: int) -> None:
    end_with_parent(parent)


@functools.cache
def write_results_queue(mp_mode: str = "spawn") -> Any:
    """In the place of Megatron's function of that name: the queue of what a checkpoint's writers have written.

    Its process, which is a copy of python with torch in it, ends with this one.

    Args:
        mp_mode: how the process is started; the queue is one, whatever the first caller asked for.
    """
    manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
    with shielded():
        manager.start(end_with_parent, (os.getpid(),))
    return manager.Queue()
