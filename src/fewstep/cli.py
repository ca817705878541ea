"""The command line: ``fewstep models | doctor | generate | sweep | report``.

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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fewstep.eval.results import Results

app = typer.Typer(
    help="Makes diffusion sampling faster, and proves what it cost in quality.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
STOPPED = "stopped; a sweep goes on where it was with the same command"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}

ModelOption = Annotated[str, typer.Option("--model", "-m", help="An embedded model; `fewstep models` lists them.")]
GuidanceOption = Annotated[
    float, typer.Option("--guidance", "-g", help="Classifier-free guidance scale; at most 1 is without.")
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="The first seed; image i has seed SEED + i.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; the accelerator where there is one.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    _quiet_libraries()
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"]))


def run(arguments: list[str]) -> int:
    """Run one command and give its exit code; a user's mistake is one line, not a traceback."""
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


@app.command()
def models() -> None:
    """List the embedded models."""
    from fewstep import pipelines

    table = Table("model", "parameters", "size", "what it is", box=None, pad_edge=False)
    for name, model in pipelines.models().items():
        size = f"{model.bytes / 1e6:.1f} MB"
        table.add_row(name, f"{model.parameters / 1e6:.1f} M", size, model.description)
    Console().print(table)


@app.command()
def doctor() -> None:
    """Say what is installed, what it can compute on, and which extras are usable or why not."""
    from fewstep.eval.environment import dtype_support, environment, extras

    found = environment()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("fewstep", found["fewstep"])
    table.add_row("python", f"{found['python']} on {found['platform']}")
    for name, version in found["libraries"].items():
        table.add_row(name, version or "missing: pip install fewstep")
    table.add_row("threads", f"{found['threads']} of {found['cores']} cores")
    for device in found["devices"]:
        support = dtype_support(device.split()[0])
        works = ", ".join(name for name, good in support.items() if good)
        fails = ", ".join(name for name, good in support.items() if not good)
        table.add_row(f"device {device}", works + (f" (not {fails})" if fails else ""))
    for extra, state in extras().items():
        table.add_row(escape(f"extra [{extra}]"), escape(state))
    Console().print(table)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; repeat it to cycle.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    model: ModelOption = "fashion-sd",
    scheduler: Annotated[str, typer.Option(help="A scheduler, such as 'DPMSolver(solver_order=3)'.")] = "DPMSolver",
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 10,
    guidance: GuidanceOption = 4.0,
    seed: SeedOption = 0,
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Draw images and write them as one PNG grid."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"out is {str(out)!r}; give a file that ends in .png")
    if out.is_dir():
        raise ValueError(f"out is the folder {str(out)!r}; give a file in it")
    from fewstep.eval.generation import generate_grid

    made = generate_grid(
        out, model, prompt, scheduler=scheduler, steps=steps, guidance=guidance, seed=seed, count=n, device=device
    )
    print(f"{out}: {n} images, {made.nfe_per_image:g} NFE/image, {made.seconds / n:.3g} s/image")


@app.command()
def sweep(
    schedulers: Annotated[
        list[str],
        typer.Option(
            "--schedulers",
            "--scheduler",
            help="Comma-separated or repeated; 'diffusers:Name' is diffusers' own. Options go in parentheses.",
        ),
    ],
    steps: Annotated[str, typer.Option(help="Comma-separated, such as 5,8,10,20.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images and results; a run there goes on.")],
    model: ModelOption = "fashion-sd",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Images a cell.")] = 1000,
    guidance: GuidanceOption = 4.0,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.")] = 50,
    limit: Annotated[int | None, typer.Option(help="At most so many images a cell, to try it out.")] = None,
    device: DeviceOption = None,
) -> None:
    """Every scheduler at every number of steps: images, FID, CLIP score, NFE, seconds. Resumable."""
    from fewstep.eval.specs import split_top_level, whole_numbers

    specs = [spec for text in schedulers for spec in split_top_level(text)]
    counts = whole_numbers(steps, "steps")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is the file {str(out)!r}; give a folder")
    from fewstep.eval.sweep import Sweep

    request = Sweep(
        model,
        specs,
        counts,
        samples=samples,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        device=device,
    )
    results = request.run(out)
    _print_results(results)
    Console(soft_wrap=True).print(f"{out / 'results.csv'}; `fewstep report {out}` makes a page of it", highlight=False)
    if results.failed:
        raise typer.Exit(FAILED)


def _print_results(results: Results) -> None:
    from fewstep.eval.page_table import TITLES

    table = Table(box=None, pad_edge=False)
    table.add_column("scheduler", overflow="fold")
    for title in ("steps", "NFE/image", *(TITLES.get(name, name) for name in results.metrics), "s/image"):
        table.add_column(title, justify="right")
    for row in results.rows:
        if row.status != "ok":
            table.add_row(f"{row.scheduler} failed: {row.error}", str(row.steps), style="red")
            continue
        values = [row.nfe_per_image, *(row.value(name) for name in results.metrics), row.seconds_per_image]
        table.add_row(row.scheduler, str(row.steps), *("–" if v is None else f"{v:.4g}" for v in values))
    # A log has no width to keep to; rich would fold the names at 80 columns there.
    Console(width=None if sys.stdout.isatty() else 140).print(table, markup=False)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of a sweep.")]) -> None:
    """Write DIR/report.html: table, plots, the same seeds side by side; one self-contained file."""
    from fewstep.eval.page import report as write

    print(write(folder))
