"""``fewstep quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fewstep.cli import options

if TYPE_CHECKING:
    from fewstep.quant.rest import Rest


def quantize(
    out: options.QuantFolder = None,
    config: options.Method = "Int8",
    model: options.Model = "fashion-sd",
    prompt: options.CalibrationPrompt = None,
    steps: options.CalibrationSteps = 20,
    samples: options.CalibrationSamples = 8,
    guidance: options.CalibrationGuidance = 4.0,
    seed: options.Seed = 0,
    rows: options.Rows = 2048,
    resume: options.Resume = None,
    rest: options.Rest = "exact",
    plan_only: options.PlanOnly = False,
    device: options.Device = None,
) -> None:
    """Quantise a model's denoiser: calibrate on its own trajectory, save it, and say what it cost.

    Load the result with `fewstep.quant.load_(pipe.unet, FOLDER)`; the float weights are not needed for that.
    """
    from fewstep import quant
    from fewstep.errors import FewstepError
    from fewstep.eval.costs.calls import denoisers
    from fewstep.quant.configs import make_config
    from fewstep.quant.rest import check

    check(rest)
    method = make_config(config)
    if out is None and not plan_only:
        raise FewstepError("give --out FOLDER for the quantised network, or --plan to print the plan only")
    if samples < 0 or steps < 1:
        raise FewstepError(f"samples is {samples} and steps {steps}; give at least 0 and 1")
    pipe, prompts = _asked(model, prompt, device, needed=samples > 0)
    (network, *_) = denoisers(pipe)
    calls = None
    if samples:
        calls = quant.record(
            pipe, prompts, num_inference_steps=steps, samples=samples, guidance=guidance, seed=seed, keep=samples
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


def _asked(model: str, prompt: list[str] | None, device: str | None, needed: bool) -> tuple[Any, tuple[str, ...]]:
    """The pipeline, and what it is asked to draw where nothing was said."""
    from fewstep.errors import FewstepError
    from fewstep.eval.sweeps.sources import make_sources

    (source,) = make_sources(model)
    prompts = tuple(prompt or ())
    if not prompts and source.embedded:
        from fewstep.pipelines.zoo import prompts as known

        prompts = known(source.embedded)
    if not prompts and source.family != "unconditional" and needed:
        raise FewstepError(f"{model} draws what it is told; give --prompt, or --samples 0 where the method needs none")
    return source.load(device), prompts or ("",)
