"""``fewstep quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fewstep.cli.options import DeviceOption, SeedOption

if TYPE_CHECKING:
    from fewstep.quant.rest import Rest


def quantize(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder for the quantised network; not needed with --plan.")
    ] = None,
    config: Annotated[
        str,
        typer.Option(
            "--config", "-c", help="A method, such as 'Int8' or 'SVDQuant(rank=16)', or the path of a saved plan."
        ),
    ] = "Int8",
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="An embedded model (`fewstep models`), or the folder of a saved pipeline."),
    ] = "fashion-sd",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt to calibrate with; repeat it for more.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the trajectory that calibration follows.")] = 20,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Images drawn for calibration; 0 for none.")] = 8,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Classifier-free guidance scale.")] = 4.0,
    seed: SeedOption = 0,
    rows: Annotated[int, typer.Option(help="Rows of each layer's inputs that calibration looks at.")] = 2048,
    resume: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps finished layers, so that the same command goes on from there."),
    ] = None,
    rest: Annotated[
        str, typer.Option(help="How the file stores what is not quantised: exact, float16, or int8.")
    ] = "exact",
    plan_only: Annotated[bool, typer.Option("--plan", help="Print the plan and write nothing.")] = False,
    device: DeviceOption = None,
) -> None:
    """Quantise a model's denoiser: calibrate on its own trajectory, save it, and say what it cost.

    Load the result with `fewstep.quant.load_(pipe.unet, FOLDER)`; the float weights are not needed for that.
    """
    from fewstep import quant
    from fewstep.errors import FewstepError
    from fewstep.eval.costs.calls import denoisers
    from fewstep.eval.sweeps.sources import make_sources
    from fewstep.quant.configs import make_config
    from fewstep.quant.rest import check

    check(rest)
    method = make_config(config)
    if out is None and not plan_only:
        raise FewstepError("give --out FOLDER for the quantised network, or --plan to print the plan only")
    if samples < 0 or steps < 1:
        raise FewstepError(f"samples is {samples} and steps {steps}; give at least 0 and 1")
    (source,) = make_sources(model)
    prompts: tuple[str, ...] = tuple(prompt or ())
    if not prompts and source.embedded:
        from fewstep.pipelines.zoo import prompts as known

        prompts = known(source.embedded)
    if not prompts and source.family != "unconditional" and samples:
        raise FewstepError(f"{model} draws what it is told; give --prompt, or --samples 0 where the method needs none")
    pipe = source.load(device)
    (network, *_) = denoisers(pipe)
    calls = None
    if samples:
        calls = quant.record(
            pipe,
            prompts or ("",),
            num_inference_steps=steps,
            samples=samples,
            guidance=guidance,
            seed=seed,
            keep=samples,
        )
    if plan_only or out is None:
        from fewstep.quant.state import evaluating

        with evaluating(network):
            print(method if isinstance(method, quant.QuantPlan) else method.plan(network, calls or ()))
        return
    report = quant.quantize_(network, method, calls, checkpoint=resume, rows=rows, progress=True, keep_originals=False)
    path = quant.save(network, out, rest=cast("Rest", rest))
    print(report)
    print(f"{path}: {sum(file.stat().st_size for file in path.parent.glob('quantized*')) / 1e6:.2f} MB")
