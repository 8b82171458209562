"""``crtrace check``."""

from __future__ import annotations

import click

from crtrace.cli.output import Failure, emit, json_option, paint
from crtrace.errors import FeatureMissing


@click.command()
@json_option
def check(as_json: bool) -> None:
    """Try everything that watching needs, and say what is missing, what follows and what helps."""
    from crtrace.track.probes import run_probes

    probes = run_probes()
    works = all(probe.ok for probe in probes if probe.required)
    if as_json:
        emit({"works": works, "probes": [probe.to_json() for probe in probes]})
    else:
        for probe in probes:
            colour = "green" if probe.ok else "red" if probe.required else "yellow"
            mark = "ok" if probe.ok else "no"
            click.echo(f"{paint(f'{mark:>3}', fg=colour)}  {probe.name}: {probe.found}")
            if not probe.ok:
                click.echo(f"     {probe.consequence}; {probe.remedy}")
        click.echo("watch works here" if works else paint("watch cannot work here", fg="red"))
    if not works:
        raise Failure(FeatureMissing.exit_code)
