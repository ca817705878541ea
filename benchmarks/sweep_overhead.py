"""What a sweep costs beside the networks it runs, and how fast a finished one is gone through again.

    python benchmarks/sweep_overhead.py [--model fashion-dit-small] [--steps 5,10] [--samples 1000] [--batch 50] [--out FOLDER]

A sweep with FID and accuracy is run with a clock around every network: denoiser, decoder, text encoder, feature net.
"Networks" are their forward passes. "Pipeline" is the rest of the pipeline's calls: scheduler steps, noise, the loop; also
of any script without a sweep. "Loading" reads the model, once. "Sweep" is what is left of the wall clock of ``Sweep.run``:
hashing, files, checks, statistics. Then the finished sweep is run again, in this process and as a command of its own, whose
imports are also timed alone.

A small model makes the shares large: a sweep's own seconds do not grow with the model, the networks' do.
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from record import RESULTS, machine, provenance, table, write
from torch import nn

from fewstep import pipelines
from fewstep.eval import Sweep, feature_net
from fewstep.eval.sweeps import painting
from fewstep.eval.sweeps.sources import Source


class Clock:
    """Seconds inside a few functions and modules, nested ones counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._begin = 0.0, 0, 0.0

    def __enter__(self) -> Clock:
        if not self._depth:
            self._begin = perf_counter()
        self._depth += 1
        return self

    def __exit__(self, *raised: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += perf_counter() - self._begin

    @contextmanager
    def around(self, owner: Any, name: str) -> Iterator[None]:
        """While open, the time in ``owner.name(...)`` counts."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self:
                return function(*arguments, **named)

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit-small", help="an embedded model (%(default)s)")
    parser.add_argument("--steps", default="5,10", help="a cell each (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="images a cell (%(default)s)")
    parser.add_argument("--batch", type=int, default=50, help="images drawn at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args()
    about = machine()
    steps = [int(count) for count in options.steps.split(",")]
    request: dict[str, Any] = {"samples": options.samples, "batch_size": options.batch, "metrics": ["fid", "accuracy"]}
    Sweep(
        options.model, ["diffusers:DDIMScheduler"], steps[:1], **{**request, "samples": 2}
    ).estimate()  # imports are not the sweep's
    feature_net("fashion")
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(options.model, ["diffusers:DDIMScheduler"], steps, device="cpu", **request)
        spent = measured(sweep, options.model, folder)
        again = min(timed(lambda: sweep.run(folder, progress=False)) for _ in range(3))
        file = Path(folder) / "sweep.toml"
        file.write_text(
            f'model = "{options.model}"\nschedulers = ["diffusers:DDIMScheduler"]\nsteps = {steps}\nsamples = {options.samples}\n'
            f'batch_size = {options.batch}\nmetrics = ["fid", "accuracy"]\ndevice = "cpu"\n'
        )
        command = processor_seconds(lambda: cli("sweep", str(file), "--out", folder))
        imports = processor_seconds(lambda: python("-c", IMPORTS))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    body = {
        "machine": about, "model": options.model, "steps": steps, "samples": options.samples, "batch": options.batch,
        **spent, "again": again, "command": command, "imports": imports, "bytes": size,
    }  # fmt: skip
    page = report(body) + "\n" + provenance(about)
    write(options.out, "sweep_overhead", body, page)
    print(page)


IMPORTS = "import fewstep.eval.sweeps.run; from diffusers import DiTPipeline, AutoencoderKL, DiTTransformer2DModel"


def measured(sweep: Sweep, model: str, folder: str) -> dict[str, float]:
    """Seconds of the whole run and of its parts."""
    drawing, inside, features, loading = Clock(), Clock(), Clock(), Clock()
    with ExitStack() as stack:
        for component in pipelines.load(model).components.values():
            if isinstance(component, nn.Module):
                stack.enter_context(
                    inside.around(type(component), "decode" if hasattr(component, "decode") else "forward")
                )
        stack.enter_context(features.around(type(feature_net("fashion").module), "forward"))
        stack.enter_context(drawing.around(painting, "draw"))
        stack.enter_context(loading.around(Source, "load"))
        wall = timed(lambda: sweep.run(folder, progress=False))
    return {
        "wall": wall,
        "networks": inside.seconds + features.seconds,
        "pipeline": drawing.seconds - inside.seconds,
        "loading": loading.seconds,
        "sweep": wall - drawing.seconds - features.seconds - loading.seconds,
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that ``action`` takes."""
    begin = perf_counter()
    action()
    return perf_counter() - begin


def processor_seconds(action: Callable[[], object]) -> float:
    """Processor time of the processes that ``action`` starts: a loaded machine makes them wait, and no longer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cli(*arguments: str) -> None:
    """The command line in a process of its own."""
    python("-m", "fewstep", *arguments)


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def report(body: dict[str, Any]) -> str:
    parts = ("networks", "pipeline", "loading", "sweep")
    rows = [[name, f"{body[name]:.2f}", f"{100 * body[name] / body['wall']:.1f} %"] for name in (*parts, "wall")]
    cells = len(body["steps"])
    return (
        "# What a sweep costs beside its networks\n\n"
        f"{body['model']}, diffusers' DDIM at {', '.join(map(str, body['steps']))} steps, {body['samples']} images a cell "
        f"in batches of {body['batch']}, FID and accuracy; {cells} cells, {body['bytes'] / 1e6:.1f} MB.\n\n"
        f"{table(['', 's', 'of the wall clock'], rows)}\n"
        f"The finished sweep again: {body['again']:.2f} s in the same process (best of 3); as `fewstep sweep` "
        f"{body['command']:.2f} s of processor time, of which {body['imports']:.2f} s are imports.\n"
    )


if __name__ == "__main__":
    main()
