"""The command line: ``fewstep models | doctor | generate | sweep | status | report | compare | best | tune | quantize``,
one file each.

Nothing heavy is imported before a command needs it: ``fewstep --help`` loads neither torch nor diffusers.

Exit codes: 0 for success; 1 where cells of a sweep failed or the disk did; 2 for bad input, with one line on standard
error that names the value and says what would be right; 130 when interrupted.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fewstep._version import __version__
from fewstep.cli.best import best
from fewstep.cli.compare import compare
from fewstep.cli.doctor import doctor
from fewstep.cli.generate import generate
from fewstep.cli.models import models
from fewstep.cli.options import FAILED
from fewstep.cli.quantize import quantize
from fewstep.cli.report import report
from fewstep.cli.status import status
from fewstep.cli.sweep import sweep
from fewstep.cli.tune import tune

app = typer.Typer(
    help="Makes diffusion sampling faster, and proves what it cost in quality.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one.")
    ] = False,
) -> None: ...


for command in (models, doctor, generate, sweep, status, report, compare, best, tune, quantize):
    app.command()(command)

BAD_INPUT, INTERRUPTED = 2, 130
STOPPED = "stopped; a sweep goes on where it was with the same command"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"]))


def run(arguments: list[str]) -> int:
    """Run one command and give its exit code; a user's mistake is one line, not a traceback."""
    _quiet_libraries()
    try:
        code = int(app(args=arguments, prog_name="fewstep", standalone_mode=False) or 0)
        # Some versions of typer turn an interrupt into its exit code, others let it through or raise Abort.
        return _complain(STOPPED, code) if code == INTERRUPTED else code
    except ValueError as error:
        return _complain(str(error), BAD_INPUT)
    except OSError as error:
        if error.errno in _DISK:
            return _complain(f"{error}; what is finished is kept, and the same command goes on with the rest", FAILED)
        return _complain(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(STOPPED, INTERRUPTED)
    except Exception as error:
        # What typer says about options it cannot read. Its classes moved between versions, their interface did not.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _complain(message() + _given(message(), arguments), BAD_INPUT)


def _quiet_libraries() -> None:
    """Keep the libraries' advice and loading bars off standard error, which is for progress and mistakes here.

    Environment variables because they must be there before the libraries are imported; the user's own settings win.
    """
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)


def _given(message: str, arguments: list[str]) -> str:
    """``; got 'many'`` for typer's message about an option whose value it did not repeat."""
    for option in re.findall(r"'(--?[\w-]+)'", message):
        values = [given.partition("=")[2] for given in arguments if given.startswith(f"{option}=")]
        values += [given for name, given in itertools.pairwise(arguments) if name == option]
        if values and repr(values[-1]) not in message:
            return f"; got {values[-1]!r}"
    return ""


def _complain(message: str, code: int) -> int:
    print(f"fewstep: {' '.join(message.split())}", file=sys.stderr)
    return code
