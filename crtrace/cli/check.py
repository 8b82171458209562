"""``crtrace check``."""

from __future__ import annotations

import click

from crtrace.cli.output import Failure, emit, json_option, paint, printable
from crtrace.errors import FeatureMissing

HEADINGS = {
    "required": ("Required", "red"),
    "better": ("Better to have", "yellow"),
    "nice": ("Nice to have", "cyan"),
}


@click.command()
@json_option
def check(as_json: bool) -> None:
    """Try everything that watching needs, and say what is missing, what follows and what helps."""
    from crtrace.track.choose import WAYS
    from crtrace.track.probes import run_probes

    findings = run_probes()
    missing, armer = findings.missing, findings.armer
    if as_json:
        probes = [probe.to_json() for probe in findings.probes]
        emit({"works": not missing, "armer": armer, "probes": probes})
    else:
        heading = ""
        for probe in findings.probes:
            title, colour = HEADINGS[probe.importance]
            if title != heading:
                click.echo(f"{title}:")
                heading = title
            mark = paint(" ok", fg="green") if probe.ok else paint(" no", fg=colour)
            click.echo(f"{mark}  {probe.name}: {printable(probe.found)}")
            click.echo(f"     {probe.consequence}")
            if probe.remedy:
                click.echo(f"     → {probe.remedy}")
        if armer:
            click.echo(paint(f"watch works here, with {armer}: {WAYS[armer].means}", fg="green"))
        else:
            click.echo(paint(f"watch cannot work here for want of: {', '.join(missing)}", fg="red"))
    if missing:
        raise Failure(FeatureMissing.exit_code)
