"""Measure what scripts/bench does not: trees of processes, shared memory, and each way of writing.

Everything runs interleaved in one run; medians, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from crtrace.capture.attach import attached
from crtrace.capture.session import Session
from crtrace.units import Pid
from tests.live.harness import Target

WITHOUT_PAUSE = "aio_direct_at_full_speed"
"""Of the ways, the one that goes on by itself."""
Samples = dict[str, list[float]]


@contextmanager
def watched(target: Target, tree: bool = False) -> Iterator[Session]:
    """A session on a target, into a chain that is removed in the end."""
    with (
        tempfile.TemporaryDirectory(prefix="crtrace-bench-") as folder,
        attached(Pid(target.pid), Path(folder) / "chain", tree=tree) as session,
    ):
        session.checkpoint("start")
        yield session


def take(session: Session, samples: Samples, name: str) -> dict[str, Any]:
    """One epoch; its times in ms."""
    _, stats = session.checkpoint("bench")
    samples.setdefault(f"{name}: pause", []).append(stats["frozen_time"] / 1000)
    samples.setdefault(f"{name}: until all are stopped", []).append(stats["freezing_time"] / 1000)
    samples.setdefault(f"{name}: wall", []).append(stats["total_time"] / 1000)
    return stats


def measure(options: argparse.Namespace) -> Samples:
    """Every sample, by name."""
    samples: Samples = {}
    with ExitStack() as stack:
        family = stack.enter_context(Target("spawner"))
        family.ask(f"threads {options.processes - 1} 64 {options.threads - 1}")
        alone = stack.enter_context(Target("spawner"))
        shared = stack.enter_context(Target("bench", "--mib", 64, "--shared-mib", options.shared))
        tree = stack.enter_context(watched(family, tree=True))
        one = stack.enter_context(watched(alone))
        objects = stack.enter_context(watched(shared))
        for number in range(options.runs):
            print(f"run {number + 1} of {options.runs}", file=sys.stderr)
            stats = take(tree, samples, "tree")
            samples.setdefault("tree: processes", []).append(stats["processes"])
            samples.setdefault("tree: threads", []).append(stats["threads"])
            take(one, samples, "one process")
            stats = take(objects, samples, "shared memory")
            gib = stats["pages_compared"] * 4096 / (1 << 30)
            per_gib = stats["compare_time"] / 1000 / gib
            samples.setdefault("shared memory: compared, ms per GiB", []).append(per_gib)
    return samples


def each_way(runs: int) -> Samples:
    """The pause after each way of changing memory that the target ``ways`` has."""
    samples: Samples = {}
    with Target("ways") as target, watched(target) as session:
        for _ in range(runs):
            take(session, samples, "nothing")
            for way in target.info["ways"]:
                if way != WITHOUT_PAUSE and target.command(way) == "ok":
                    take(session, samples, way)
    return {name: values for name, values in samples.items() if name.endswith("pause")}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-tree", description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--threads", type=int, default=20, help="of each process")
    parser.add_argument("--shared", type=int, default=256, help="MiB of shared memory")
    parser.add_argument("--ways", action="store_true", help="each way of changing memory instead")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse(sys.argv[1:])
    samples = each_way(options.runs) if options.ways else measure(options)
    if options.json:
        print(json.dumps({"schema_version": 1, "options": vars(options), "samples": samples}))
        return
    for name, values in samples.items():
        middle = statistics.median(values)
        print(f"{name:<40} {middle:10.2f}  ({min(values):.2f}–{max(values):.2f})")


if __name__ == "__main__":
    main()
