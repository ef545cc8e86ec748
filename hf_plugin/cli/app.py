"""The command `moebius`."""

from __future__ import annotations

import sys

import typer
from rich.text import Text

from moebius import __version__
from moebius.hf_plugin.cli import bench, convert, demo, doctor, replay, trace, warmup
from moebius.hf_plugin.cli.console import err

app = typer.Typer(
    help="Mixture-of-Experts models of transformers on CPU and GPU together.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(warmup.warmup)
app.command()(replay.replay)
app.command()(trace.trace)
app.command()(convert.convert)
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moebius {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it.")) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Run the command line; what a user can remedy is said in one line on stderr, with exit status 2."""
    try:
        app()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if not isinstance(error, OSError) and not _is_ours(error):
            raise
        err.print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(2)


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it: then the message says what to do, and a traceback would only bury it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__", "").startswith("moebius.")
