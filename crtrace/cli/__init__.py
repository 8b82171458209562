"""The command line: one module a command. Only here is click, and only here is anything printed."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys

import click

from crtrace import __version__
from crtrace.cli import check, demo, diff, dump, export, listing, merge, prune, show, verify, watch
from crtrace.cli.output import Failure, explain


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="crtrace")
def cli() -> None:
    """Follow a live process and keep incremental, consistent images of its memory and state.

    A chain is a directory with one image for each epoch. `crtrace watch PID` writes one; list,
    show, diff, verify and export read it, on any machine and without privileges.
    """


for command in (
    check.check, watch.watch, dump.dump, listing.list_, show.show, diff.diff, verify.verify,
    export.export, merge.merge, prune.prune, demo.demo,
):  # fmt: skip
    cli.add_command(command)


def _log_to_stderr() -> None:
    """Our own log only: libraries have much to say."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(relativeCreated)6d ms  %(message)s"))
    logging.getLogger("crtrace").addHandler(handler)
    logging.getLogger("crtrace").setLevel(logging.DEBUG)


def _run() -> int:
    """Run a command; the exit code, as DESIGN.md's table says."""
    code = 0
    try:
        # Not cli.main(): it would take a closed pipe for a failure.
        with cli.make_context("crtrace", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE  # whoever read us has seen enough
    except Failure as failure:
        code = failure.code
    except Exception as error:
        code = explain(error)
    return code


def _close_stdout() -> None:
    """Python writes what is left in a buffer at its end, and would exit with a code of its own."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # said when it was written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run a command and exit."""
    if os.environ.get("CRTRACE_DEBUG"):
        _log_to_stderr()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    _close_stdout()
    sys.exit(code)
