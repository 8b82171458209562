"""Python threads that a debugger can be asked about: known functions with known locals.

Commands: check.
"""

from __future__ import annotations

import os
import threading

from pytarget import serve

SECRETS = ("alpha", "beta")
started = threading.Barrier(len(SECRETS) + 1)
ends = os.pipe()


def descend(depth: int, secret: str) -> None:
    """Wait for ever below ``depth`` more frames of this."""
    if depth:
        descend(depth - 1, secret)
    else:
        started.wait()
        os.read(ends[0], 1)


class Worker:
    """What each thread runs."""

    def work(self, secret: str) -> None:
        """Wait with a secret."""
        descend(3, secret)


def main() -> None:
    """Start the threads and wait with them."""
    workers = [threading.Thread(target=Worker().work, args=(s,), daemon=True) for s in SECRETS]
    for worker in workers:
        worker.start()
    started.wait()
    tids = {s: worker.native_id for s, worker in zip(SECRETS, workers, strict=True)}
    serve({"tids": tids}, {}, lambda: all(worker.is_alive() for worker in workers))


if __name__ == "__main__":
    main()
