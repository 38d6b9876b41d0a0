"""torchrun that gives its ranks time to save when the job is to end.

    python scripts/agent.py --standalone --nproc-per-node 8 pretrain_multimodal.py FLAGS     as torchrun

torchrun kills its ranks 30 seconds after a SIGTERM, which no large checkpoint is written in. Here SIGTERM is passed on
to the ranks alone, which save and end by themselves (runtime/preemption.py), and torchrun goes on watching them: exit
code 0 when all have ended so. After SAVE_SECONDS (default 1800) they are stopped as torchrun does. All else, Ctrl-C
among it, is torchrun's. Slurm's and Kubernetes' own time limits are theirs to set: scripts/slurm.sh.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import psutil

DEFAULT_SECONDS = 1800


def main() -> None:
    text = os.environ.get("SAVE_SECONDS") or str(DEFAULT_SECONDS)
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"SAVE_SECONDS={text}: expected a number above 0")

    def pass_on(number: int, frame: FrameType | None) -> None:
        """Once and again the same: Slurm may send it to this process and through srun too."""
        # torchrun starts each rank in a session of its own; the launcher's tee is a child of this process too.
        ranks = [child for child in psutil.Process().children() if os.getsid(child.pid) == child.pid]
        if not ranks:  # not started yet, or all ended
            raise SystemExit(128 + number)
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            os.write(2, f"agent: SIGTERM: {len(ranks)} ranks have {text} seconds to save and end\n".encode())
            signal.setitimer(signal.ITIMER_REAL, int(text))
        for rank in ranks:
            rank.send_signal(number)

    # First, since importing torch takes seconds.
    signal.signal(signal.SIGTERM, pass_on)
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as torchrun

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SignalException(f"the ranks haven't ended {text} seconds after SIGTERM", sigval=signal.SIGTERM)

    signal.signal(signal.SIGALRM, stop)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except DistNetworkError as error:
        raise SystemExit(f"Refused: the nodes can't meet (MASTER_ADDR, MASTER_PORT): {error}") from error


if __name__ == "__main__":
    main()
