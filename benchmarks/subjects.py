"""The models on which samplers are compared, as plain callables with one reference trajectory a seed.

A network is captured from one run of its pipeline, with its prompts encoded once; after that a scheduler runs it without
the pipeline. That gives what the pipeline gives, except where a pipeline leaves something out: DDPMPipeline never scales the
first noise or the network's input, so schedulers of the k-diffusion kind fail in it, and here they do not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep import eval as evaluation
from fewstep import pipelines
from fewstep.eval.drawing.scheduling import scheduler_for
from fewstep.pipelines import zoo
from fewstep.pipelines.zoo import folders
from fewstep.samplers import NoiseSchedule
from fewstep.samplers.testing import GaussianMixture

REFERENCE = 1000
"""Steps of the reference, diffusers' DPM-Solver++ 2M. Every spacing but trailing rounds 1,000 steps to 1,000 times of which
two are equal, which ends in an IndexError."""
AS_FLOW = "use_flow_sigmas=True, prediction_type='flow_prediction'"


class Network(Protocol):
    """``network(x, t, which)``: the guided output for the states x of the seeds numbered ``which``, all at the time t."""

    def __call__(self, x: Tensor, t: Any, which: Tensor) -> Tensor: ...


class Subject:
    """A model with its prompts and seeds, at one guidance."""

    def __init__(self, name: str, guidance: float, seeds: int, work: Path) -> None:
        self.name, self.seeds, self.work = name, range(seeds), work
        self.pipe = pipelines.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        self.flow = "FlowMatch" in type(self.pipe.scheduler).__name__
        self.prompts = zoo.prompts(name)
        self.guidance = guidance if any(self.prompts) else 1.0
        self.network, self.noise = self._captured()

    @torch.no_grad()
    def latents(self, spec: str, steps: int, which: Sequence[int] | None = None) -> Tensor:
        """What ``spec`` makes of these seeds (all of them if left out) in so many of its steps."""
        return run(self.network, self.noise, scheduler_for(spec, self.config), steps, which)

    def reference(self, steps: int = REFERENCE) -> Tensor:
        """Latents of many steps, kept for these weights."""
        key = folders.sha256(next(folders.weights(self.name).rglob("*model.safetensors")))[:12]
        path = self.work / f"{self.name}-{key}-g{self.guidance:g}-{steps}-{len(self.seeds)}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.latents(referee(self.flow), steps), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        latents: Tensor = torch.load(path, weights_only=True)
        return latents

    def _captured(self) -> tuple[Network, Tensor]:
        """The denoiser with the arguments of the pipeline's own first call of it, and the noise that it was given."""
        pipe, seen = self.pipe, list[dict[str, Any]]()
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        signature = inspect.signature(denoiser.forward)
        hook = denoiser.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(dict(signature.bind(*args, **kwargs).arguments)), with_kwargs=True
        )
        prompts = [self.prompts[seed % len(self.prompts)] for seed in self.seeds]
        with hook, torch.no_grad():  # the model's own scheduler neither scales the noise nor the network's input
            evaluation.draw(pipe, prompts, self.seeds, steps=1, guidance=self.guidance)
        given = seen[0]
        state = "sample" if "sample" in given else "hidden_states"
        n, scale = len(self.seeds), self.guidance
        conditional = 0 if type(pipe).__name__ == "DiTPipeline" else 1  # which half of a guided batch has the prompts

        def network(x: Tensor, t: Any, which: Tensor) -> Tensor:
            times = torch.as_tensor(t).expand(len(x))
            if scale == 1:
                return _first(denoiser(**_rows(given, which, n) | {state: x, "timestep": times}))
            both = _rows(given, torch.cat([which, which + n]), 2 * n)
            raw = _first(denoiser(**both | {state: torch.cat([x, x]), "timestep": torch.cat([times, times])})).chunk(2)
            return raw[1 - conditional] + scale * (raw[conditional] - raw[1 - conditional])

        return network, given[state][:n].clone()


class Mixture:
    """A Gaussian mixture of 64 dimensions with Stable Diffusion's noise schedule, guided towards one of its components.

    Guidance by 7.5 stretches the ODE far beyond what an unguided one asks of a solver, and float64 and the exact score leave
    nothing else that could go wrong.
    """

    def __init__(self, guidance: float, seeds: int, dim: int = 64, components: int = 8) -> None:
        self.name, self.guidance, self.seeds, self.flow = f"mixture-{dim}", guidance, range(seeds), False
        self.config: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        self._mixture = GaussianMixture.random(components, dim, seed=0)
        model = self._mixture.guided(NoiseSchedule.from_config(self.config), [0], guidance)
        self.network: Network = lambda x, t, which: model(x, float(t))
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.noise = torch.stack([torch.randn(dim, generator=g, dtype=torch.float64) for g in generators])

    def latents(self, spec: str, steps: int, which: Sequence[int] | None = None) -> Tensor:
        return run(self.network, self.noise, scheduler_for(spec, self.config), steps, which)

    def reference(self, steps: int = REFERENCE) -> Tensor:
        return self.latents(referee(False), steps)


def referee(flow: bool) -> str:
    options = AS_FLOW if flow else "timestep_spacing='trailing'"
    return f"diffusers:DPMSolverMultistepScheduler(solver_order=2, {options})"


def run(network: Network, noise: Tensor, scheduler: Any, steps: int, which: Sequence[int] | None = None) -> Tensor:
    """The last state of ``scheduler`` from the noise of the seeds numbered ``which``: ours or diffusers', the same loop."""
    rows = torch.arange(len(noise)) if which is None else torch.tensor(which)
    scheduler.set_timesteps(steps)
    x = noise[rows] * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t, rows), t, x, return_dict=False)[0]
    return x


def affordable(spec: str, config: Any, calls: int) -> int | None:
    """The most steps of ``spec`` within so many network calls; None where it cannot take so few."""
    for steps in range(calls, 0, -1):
        with contextlib.suppress(Exception):  # diffusers' schedulers fail in many ways on few steps
            scheduler = scheduler_for(spec, config)
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= calls:
                return steps
    return None


def quality(subject: Subject, spec: str, steps: int, images: int, folder: Path) -> Any:
    """The sweep's row for so many images of one scheduler: FID and what else the model is scored by. Kept in ``folder``."""
    sweep = evaluation.Sweep(subject.name, [spec], [steps], samples=images, guidance=subject.guidance, batch_size=100)
    return sweep.run(folder, progress=False).rows[0]


def _rows(given: dict[str, Any], which: Tensor, n: int) -> dict[str, Any]:
    """The captured arguments for these rows of the captured batch of ``n``."""
    return {key: v[which] if isinstance(v, Tensor) and v.ndim and len(v) == n else v for key, v in given.items()}


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found
