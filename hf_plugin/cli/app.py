"""The command `moebius`."""

from __future__ import annotations

import sys

import typer

from moebius import __version__
from moebius.hf_plugin.cli import bench, demo, doctor
from moebius.hf_plugin.cli.console import err

app = typer.Typer(
    help="Mixture-of-Experts models of transformers on CPU and GPU together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moebius {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Run the command line; what a user got wrong is said in one line on stderr, with exit status 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
