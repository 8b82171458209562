"""Run this tree in virtual machines with other kernels: ``scripts/vm`` is the way to start this."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from scripts.vm_box import NAME, get_box
from scripts.vm_image import KERNELS, find_kernel, get_image
from scripts.vm_machine import TREE, Size, VmError, command_text, run, say
from scripts.vm_matrix import SCRIPT, TESTS, Outcome, outcomes_in, table

CACHE = Path("/var/cache/crtrace/vm")
HOST = "host"
KNOWN = [kernel.version for kernel in KERNELS]
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILED = 125
"""The exit code when there is none of the command, as podman and docker have it."""

WITH_REPORT = (
    'exec scripts/test -o junit_family=xunit1 --junitxml="$CRTRACE_RESULTS/junit.xml" "$@"'
)

EPILOG = f"""\
Kernels: {", ".join(f"{kernel.version} (Debian {kernel.suite})" for kernel in KERNELS)}.
An image of each is made when it is first needed, in some minutes, and again when its recipe
has changed. That needs root, 4 GB of disk and the network: Debian from the mirror that apt
uses here, and PyPI as pip is configured. CI and all CRTRACE_* of the environment are handed to
the guest. KVM is used where a guest comes up with it, otherwise QEMU emulates the processor,
which is much slower. The exit code is the command's, or {FAILED} when the machine
failed.
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    kernels: list[str]
    """Of the list, or the host."""
    size: Size
    cache: Path
    mirror: str | None
    results: Path
    words: list[str]
    """The command, or arguments of pytest."""


# --- Running ------------------------------------------------------------------------------------


def variables() -> dict[str, str]:
    """What of the environment goes into a guest."""
    return {name: value for name, value in os.environ.items()
            if name == "CI" or name.startswith("CRTRACE_")}  # fmt: skip


def in_guest(
    version: str, command: Sequence[str], options: Options, out: IO[bytes],
    results: Path | None = None,
) -> int:  # fmt: skip
    """Run a command on a kernel of the list; the exit code is the command's."""
    image = get_image(find_kernel(version), options.mirror, options.size, options.cache)
    text = command_text(command, variables())
    return run(image, options.size, text, options.cache,
               out=out, err=sys.stderr.buffer, results=results)  # fmt: skip


def results_of(where: str, options: Options) -> Path:
    """An empty directory for what comes out in one place."""
    results = options.results / where
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    return results


def run_matrix(where: str, options: Options) -> list[Outcome]:
    """Run the tests on a kernel of the list or on the host; the rows that come of it.

    All that pytest says goes to stderr. That a machine fails does not end the others.
    """
    results = results_of(where, options)
    command = ["bash", "-euc", SCRIPT, "matrix", *(options.words or TESTS)]
    place = "the host" if where == HOST else f"Debian {find_kernel(where).suite} in a VM"
    say(f"=== {where}")
    try:
        if where == HOST:
            environment = {**os.environ, "CRTRACE_RESULTS": str(results)}
            code = subprocess.run(
                command, cwd=TREE, env=environment, stdout=sys.stderr, check=False
            ).returncode
        else:
            code = in_guest(where, command, options, sys.stderr.buffer, results)
    except VmError as error:
        say(str(error))
        return [Outcome(place, failed=[f"the machine: {str(error).splitlines()[0]}"])]
    say(f"results are in {results}")
    return outcomes_in(results, place, code)


# --- Commands -----------------------------------------------------------------------------------


def command_run(options: Options) -> int:
    return in_guest(options.kernels[0], options.words, options, sys.stdout.buffer)


def command_test(options: Options) -> int:
    kernel = options.kernels[0]
    results = results_of(kernel, options)
    command = ["bash", "-euc", WITH_REPORT, "test", *options.words]
    code = in_guest(kernel, command, options, sys.stdout.buffer, results)
    say(f"results are in {results}")
    return code


def command_matrix(options: Options) -> int:
    outcomes = [row for where in options.kernels for row in run_matrix(where, options)]
    print(table(outcomes), end="")
    return int(any(outcome.failed for outcome in outcomes))


def command_box(options: Options) -> int:
    catalogue = get_box(options.mirror, options.cache)
    print(f"vagrant box add {catalogue}\nCRTRACE_BOX={NAME} vagrant up --provider=libvirt")
    return 0


COMMANDS = {"run": command_run, "test": command_test, "matrix": command_matrix, "box": command_box}


def parser() -> argparse.ArgumentParser:
    """What stands before ``--`` on the command line."""
    whole = argparse.ArgumentParser(
        prog="scripts/vm", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run this tree in virtual machines with other kernels.",
    )  # fmt: skip
    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("--cache", type=Path, default=CACHE, metavar="DIR",
                        help=f"where images are kept, {CACHE} otherwise")  # fmt: skip
    making.add_argument("--mirror", metavar="URL", help="where Debian is, to make an image")
    making.set_defaults(cpus=min(os.cpu_count() or 1, 4), memory=4096, kernel=None, results=None)
    running = argparse.ArgumentParser(add_help=False, parents=[making])
    running.add_argument("--cpus", type=int, metavar="N")
    running.add_argument("--memory", type=int, metavar="MIB")
    running.add_argument("--kernel", choices=[*KNOWN, HOST], action="append",
                         help=f"{KNOWN[0]} otherwise; matrix: all, and {HOST}")  # fmt: skip
    testing = argparse.ArgumentParser(add_help=False, parents=[running])
    testing.add_argument("--results", type=Path, metavar="DIR",
                         help="where reports go, in the cache otherwise")  # fmt: skip

    commands = whole.add_subparsers(dest="command", required=True)
    for name, options, text, words in (
        ("run", running, "run a command in a copy of the tree", "-- COMMAND..."),
        ("test", testing, "run scripts/test there", "[-- PYTEST ARGUMENTS...]"),
        ("matrix", testing, "run the tests that depend on the kernel, or those named, on all"
         " kernels and on the host, with each armer that works there, and print a table",
         "[-- PYTEST ARGUMENTS...]"),
        ("box", making, "make a Vagrant box for the Vagrantfile, and say how to use it", ""),
    ):  # fmt: skip
        usage = f"scripts/vm {name} [options] {words}"
        commands.add_parser(name, help=text, description=text, usage=usage, parents=[options])
    return whole


def parse(arguments: Sequence[str]) -> tuple[str, Options]:
    """The command, and what it is to do."""
    dashes = arguments.index("--") if "--" in arguments else len(arguments)
    words = list(arguments[dashes + 1 :])
    found = parser().parse_args(arguments[:dashes])
    if found.command == "run" and not words:
        parser().error("what is to be run? scripts/vm run [options] -- COMMAND...")
    kernels = found.kernel or ([*KNOWN, HOST] if found.command == "matrix" else KNOWN[:1])
    if found.command != "matrix" and (len(kernels) > 1 or HOST in kernels):
        parser().error(f"only matrix takes more than one --kernel, or {HOST}")
    cache = found.cache.absolute()
    results = (found.results or cache / "results").absolute()
    size = Size(found.cpus, found.memory)
    return found.command, Options(kernels, size, cache, found.mirror, results, words)


def _end(number: int, _frame: object) -> NoReturn:
    """End by an exception, so that all that was started and made goes on the way out."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main() -> int:
    for number in ENDING:
        signal.signal(number, _end)
    command, options = parse(sys.argv[1:])
    if os.geteuid() != 0:
        say("root is needed to make images and to run the tests here, and there is no sudo")
        return 11
    try:
        return COMMANDS[command](options)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # whoever reads what the guest says has had enough
    except VmError as error:
        say(str(error))
        return FAILED


if __name__ == "__main__":
    raise SystemExit(main())
