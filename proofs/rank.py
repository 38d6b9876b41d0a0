"""Entry of a rank's process. A file of its own, so that the process that starts the ranks needs no torch."""

from __future__ import annotations

from proofs.layouts import Job


def run_rank(job: Job) -> None:
    """Run one rank of a layout: see `proofs.run.run`."""
    from proofs import run

    run.run(job)
