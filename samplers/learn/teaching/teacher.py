"""Teacher trajectories: what many steps make of a model's noise, kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.artifact import read_json, read_tensors, write_json, write_with_tensors
from fewstep.errors import ArtifactError, FewstepError
from fewstep.samplers.executor import Executor, Run
from fewstep.samplers.learn.fitting.runner import rms
from fewstep.samplers.learn.teaching.problem import Network, Problem, teacher_grid
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solvers.unipc import UniPC

CHUNK = 16
CHECKED = 8
"""Trajectories whose ends are compared with those of twice the steps."""
KIND = "TeacherTrajectories"
ADDED = ("schedule", "size", "call")
"""What files did not say at first; those that lack it are taken."""


def solve(
    network: Network,
    schedule: NoiseSchedule,
    noise: Tensor,
    *,
    steps: int = 64,
    which: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    checkpoint: bool = False,
) -> Problem:
    """Trajectories of ``noise`` under any model, by UniPC of order 3 in many steps.

    Args:
        network: ``network(x, t, which) -> raw``, see :data:`~fewstep.samplers.learn.teaching.problem.Network`.
        noise: (n, ...) standard normal.
        which: (n,) what the network is told about the samples; 0, 1, ... if left out.
    """
    plan = UniPC(order=3).compile(schedule, teacher_grid(schedule, steps))
    lam = torch.log(plan.alpha) - torch.log(plan.sigma)
    which = torch.arange(len(noise)) if which is None else which
    executor, state = Executor(plan), Run()
    states = [noise * plan.init_scale]
    with torch.no_grad():
        for i in executor.calls:
            raw = network(executor.model_input(state, states[-1]), float(plan.model_time[i]), which)
            states.append(executor.advance(state, raw, states[-1]))
    return Problem(network, schedule, noise, lam, torch.stack(states), which, checkpoint, about or {})


def drift(problem: Problem, steps: int, *, samples: int = CHECKED) -> float:
    """How far the ends of ``problem`` are from those of a teacher with ``steps`` steps: mean RMS over some samples."""
    some = problem.take(slice(0, samples))
    finer = solve(some.network, some.schedule, some.noise, steps=steps, which=some.which)
    return float(rms(finer.targets, some.targets).mean())


class Teacher:
    """The trajectories of a diffusers pipeline that its students learn from.

    Conditioning is captured once from the pipeline itself, so learning never encodes a prompt again, and every pipeline
    that calls its ``unet`` or ``transformer`` once a step will do.

    Args:
        pipe: the pipeline. Its weights are fingerprinted: what is learned is refused by other weights.
        prompts: as many as seeds, or more; names of classes where the pipeline draws classes, () where it draws neither.
        guidance: classifier-free guidance; several values are spread over the seeds, so that one plan serves them all.
        steps: of the teacher (UniPC of order 3). :meth:`problem` compares with twice as many.
        seeds: one trajectory each. At most 100 are enough for everything here.
        folder: where the trajectories are kept; a run that was interrupted goes on from what is there. None: in memory.
        tolerance: how far the ends may move from N to 2N steps, RMS relative to the RMS of the ends.
        call: further arguments of the pipeline.

    Raises:
        FewstepError: fewer prompts than seeds, no seeds or the same one twice, or guidance that is no number; from
            :meth:`problem`, a pipeline that cannot be captured.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str] | None,
        guidance: float | Sequence[float] = 7.5,
        steps: int = 64,
        seeds: Sequence[int] = range(64),
        *,
        folder: str | Path | None = None,
        tolerance: float = 0.01,
        call: dict[str, Any] | None = None,
    ) -> None:
        from fewstep.eval.drawing.calling import family

        self.seeds = list(seeds)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise FewstepError(
                f"a teacher needs seeds, each once; got {len(self.seeds)}, {len(set(self.seeds))} different"
            )
        if steps < 8:
            raise FewstepError(f"a teacher needs at least 8 steps, and rather 64, got {steps}")
        needed = len(self.seeds) if family(type(pipe)) != "unconditional" else 0
        given = [prompts] if isinstance(prompts, str) else list(prompts or ())
        if len(given) < needed:
            raise FewstepError(f"{len(given)} prompts were given for {needed} seeds; one a seed is needed")
        self.prompts = given[:needed] or [""] * len(self.seeds)
        scales = [float(guidance)] if isinstance(guidance, (int, float)) else [float(g) for g in guidance]
        if not scales or not all(map(math.isfinite, scales)):
            raise FewstepError(f"guidance is {guidance!r}; give a number, or some")
        self.guidance = [scales[i % len(scales)] for i in range(len(self.seeds))]
        self.pipe, self.steps, self.tolerance, self.call = pipe, steps, tolerance, call
        self.folder = None if folder is None else Path(folder)
        self.schedule = NoiseSchedule.from_config(pipe.scheduler.config)
        self._problem: Problem | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What a plan that is learned here was calibrated for, as JSON."""
        from fewstep.eval import fingerprint
        from fewstep.samplers.learn.teaching.capture import denoiser_of

        return {
            "pipeline": type(self.pipe).__name__,
            "model": fingerprint.of_module(denoiser_of(self.pipe)),
            "guidance": [min(self.guidance), max(self.guidance)],
            "prompts": len(set(self.prompts)),
            "prompts_sha256": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "seeds": len(self.seeds),
            "teacher": f"UniPC(order=3), {self.steps} steps",
        }

    def problem(self) -> Problem:
        """The trajectories: read from the folder where they are there, else made; and checked.

        Raises:
            FewstepError: NaN trajectories, or a teacher that has not converged; the message says what N and 2N differ by.
            ArtifactError: a folder that holds another teacher's trajectories, or damaged ones.
        """
        if self._problem is None:
            self._problem = self._make()
        return self._problem

    def _make(self) -> Problem:
        from fewstep.samplers.learn.teaching.capture import capture, denoiser_of

        about = self.about
        denoise = capture(self.pipe, self.prompts, self.seeds, self.guidance, self.call)
        hi = self.schedule.at(self.schedule.t_range[0])
        noise = denoise.initial / float(self.schedule.init_scale(hi.alpha, hi.sigma))
        big = sum(p.numel() for p in denoiser_of(self.pipe).parameters()) > 100e6
        parts = [
            self._chunk(denoise, noise, torch.arange(at, min(at + CHUNK, len(noise))), about, big)
            for at in range(0, len(noise), CHUNK)
        ]
        whole = replace(
            parts[0],
            noise=noise,
            states=torch.cat([p.states for p in parts], 1),
            which=torch.arange(len(noise)),
        )
        return replace(whole, about={**about, "teacher_drift": self._converged(whole)})

    def _chunk(self, network: Network, noise: Tensor, which: Tensor, about: dict[str, Any], big: bool) -> Problem:
        mine = {**about, "steps": self.steps, "seeds": [self.seeds[i] for i in which.tolist()]}
        mine["guidance"] = [self.guidance[i] for i in which.tolist()]
        mine["prompts_sha256"] = hashlib.sha256(
            json.dumps([self.prompts[i] for i in which.tolist()]).encode()
        ).hexdigest()
        mine |= {"schedule": self.schedule.fingerprint, "size": list(noise.shape[1:]), "call": self._call()}
        path = None if self.folder is None else self.folder / f"trajectories-{int(which[0]):05d}.json"
        if path is not None and path.exists():
            body = read_json(path, KIND, ("about", "arrays", "arrays_sha256"))
            kept_for = {**{key: mine[key] for key in ADDED}, **body["about"]}
            if kept_for != mine:
                differing = sorted(k for k in {*mine, *kept_for} if kept_for.get(k) != mine.get(k))
                raise ArtifactError(
                    f"{path} holds another teacher's trajectories (differing: {', '.join(differing)}); "
                    "give another folder, or remove this one"
                )
            kept = read_tensors(path.with_name(str(body["arrays"])), body["arrays_sha256"], ("lam", "states"))
            return Problem(network, self.schedule, noise[which], kept["lam"], kept["states"], which, big, about)
        made = solve(network, self.schedule, noise[which], steps=self.steps, which=which, about=about, checkpoint=big)
        if path is not None:
            write_with_tensors(path, KIND, {"about": mine}, {"lam": made.lam, "states": made.states})
        return made

    def _call(self) -> dict[str, str]:
        """What the pipeline is called with besides, as JSON; of objects that are no values only the type."""
        from fewstep.eval import fingerprint

        def said(value: Any) -> str:
            if isinstance(value, Tensor):
                return fingerprint.of_tensors([("", value)])
            plain = isinstance(value, str | int | float | bool | list | tuple | dict | type(None))
            return repr(value) if plain else type(value).__name__

        return {name: said(value) for name, value in sorted((self.call or {}).items())}

    def _converged(self, problem: Problem) -> float:
        path = None if self.folder is None else self.folder / "drift.json"
        said = {**problem.about, "steps": self.steps, "seeds": self.seeds[:CHECKED]}
        known = read_json(path, "TeacherDrift", ("about", "drift")) if path is not None and path.exists() else {}
        if known.get("about") == said:
            moved = float(known["drift"])
        else:
            moved = drift(problem, 2 * self.steps, samples=CHECKED)
            if path is not None and math.isfinite(moved):
                write_json(path, "TeacherDrift", {"about": said, "drift": moved})
        allowed = self.tolerance * float(problem.targets.square().mean().sqrt())
        if not moved <= allowed:
            raise FewstepError(
                f"the teacher has not converged: from {self.steps} to {2 * self.steps} steps its ends move by {moved:.3g}, "
                f"{allowed:.3g} is allowed; give it more steps"
            )
        return moved
