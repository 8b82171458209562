"""Measure the ways of arming beside each other: pause, wall time and what the target pays.

Of a target of 256 MiB, 1 % and 50 % of the pages are written before each epoch, at random. All
runs interleaved in one run, and CRIU's pre-dump beside it, where memory can be tracked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

from crtrace.errors import CrtraceError
from crtrace.track import softdirty, userfaultfd, windows
from crtrace.track.choose import VARIABLE
from scripts.bench import criu_times
from scripts.bench_pause import Samples, add, report, watched
from tests.live.harness import Target

SHARES = (1, 50)
"""Percent of the pages."""
NEVER = 1 << 62
ALONE = "alone"
Epochs = Callable[[Target, Path, Samples], None]


def dirty(target: Target, samples: Samples, name: str, percent: int) -> None:
    """Have so many pages written; what that takes the target."""
    pages = target.info["pages"] * percent // 100
    took = int(target.obey(f"random {pages}"))
    add(samples, f"{name}, {percent} %: write, ns a page", took / pages)


def alone(target: Target, folder: Path, samples: Samples) -> None:
    """Nobody watches: what writing takes."""
    for percent in SHARES:
        dirty(target, samples, ALONE, percent)


def armed(name: str, bounded: bool, target: Target, folder: Path, samples: Samples) -> None:
    """Epochs of crtrace with one armer, whose scans are bounded or not."""
    with (
        mock.patch.dict(os.environ, {VARIABLE: name}),
        mock.patch.object(windows, "LARGE", windows.LARGE if bounded else NEVER),
        watched(target, folder) as session,
    ):
        title = name if bounded else f"{name}, exhaustive"
        for percent in SHARES:
            dirty(target, samples, title, percent)
            _, stats = session.checkpoint("bench")
            prefix = f"{title}, {percent} %"
            add(samples, f"{prefix}: pause, ms", stats["frozen_time"] / 1000)
            stopped = stats["precopy_stopped_time"] / 1000
            add(samples, f"{prefix}: stopped before, ms", stopped)
            add(samples, f"{prefix}: wall, ms", stats["total_time"] / 1000)
            add(samples, f"{prefix}: scans bounded", stats["scans_bounded"])


def criu(program: str, target: Target, folder: Path, samples: Samples) -> None:
    """CRIU's pre-dumps, each on top of the one before."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for number, percent in enumerate((0, *SHARES)):
            if percent:
                dirty(target, samples, "criu pre-dump", percent)
            images = Path(place) / str(number)
            images.mkdir()
            command = [program, "pre-dump", "-t", str(target.pid), "-D", str(images),
                       "--display-stats", "--shell-job", "--track-mem"]  # fmt: skip
            if number:
                command += ["--prev-images-dir", f"../{number - 1}"]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wall = (time.perf_counter() - began) * 1000
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
            if percent:
                times = criu_times(done.stdout + done.stderr)
                if "frozen" not in times:
                    raise RuntimeError(f"criu tells no times: {done.stdout[-500:]}")
                add(samples, f"criu pre-dump, {percent} %: pause, ms", times["frozen"])
                add(samples, f"criu pre-dump, {percent} %: wall, ms", wall)


def phases(absent: dict[str, str], given: str | None) -> Iterator[Epochs]:
    """What is measured in each run, as far as it is there; the rest goes into ``absent``."""
    yield alone
    trials = {"userfaultfd": userfaultfd.try_on_ourselves, "soft-dirty": softdirty.try_on_ourselves}
    for name, works in trials.items():
        try:
            works()
        except (OSError, CrtraceError) as error:
            absent[name] = str(error)
            continue
        yield partial(armed, name, True)
    if "userfaultfd" not in absent:  # the only one whose scans can be bounded
        yield partial(armed, "userfaultfd", False)
    yield partial(armed, "compare", True)
    program = shutil.which(given or "criu", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program:
        absent["criu"] = "no such program; --criu names one"
    elif "soft-dirty" in absent:
        absent["criu"] = "no pre-dumps without soft-dirty bits"
    else:
        yield partial(criu, program)


def measure(options: argparse.Namespace, folder: Path) -> tuple[Samples, dict[str, str]]:
    """Every sample, by name, and what is absent and why."""
    samples: Samples = {}
    absent: dict[str, str] = {}
    present = list(phases(absent, options.criu))
    for number in range(options.runs):
        print(f"run {number + 1} of {options.runs}", file=sys.stderr)
        turn = number % len(present)
        for phase in present[turn:] + present[:turn]:
            with Target("bench", "--mib", options.size) as target:
                phase(target, folder, samples)
    return samples, absent


def ratios(samples: Samples) -> Samples:
    """Each way's times by those of the best, and what a write takes by what it takes alone."""
    middle = {name: statistics.median(values) for name, values in samples.items()}
    best = "userfaultfd" if any(name.startswith("userfaultfd") for name in middle) else "soft-dirty"
    found = {}
    for name, value in middle.items():
        title, _, what = name.rpartition(": ")
        percent = title.rpartition(", ")[2]
        base = f"{ALONE if 'write' in what else best}, {percent}: {what}"
        if ", ms" in what or "write" in what:
            whole = value + middle.get(f"{title}: stopped before, ms", 0) * (what == "pause, ms")
            if middle.get(base) and name != base and "before" not in what:
                found[f"{name} / {base}"] = [whole / middle[base]]
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench-armers", description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--size", type=int, default=256, metavar="MIB")
    parser.add_argument("--criu", metavar="PATH", help="the criu to compare with")
    parser.add_argument("--dir", type=Path, help="where the chains go")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="crtrace-bench-", dir=options.dir) as folder:
        samples, absent = measure(options, Path(folder))
    report(samples | ratios(samples), absent, options)


if __name__ == "__main__":
    main()
