"""What every diffusers scheduler of ours is: a config, a plan compiled from it, and one small run.

The plan is immutable and shared by the scheduler's copies. Everything a pipeline asks for is derived from it; nothing is
computed in :meth:`SolverScheduler.step` but the row's multiply-adds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.brownian import BrownianPath
from fewstep.samplers.config import PROCESS_OPTIONS, grid_name, is_flow, normalised, schedule_from_config
from fewstep.samplers.convert import DynamicThreshold, Hook
from fewstep.samplers.executor import Executor, Randomness, Run
from fewstep.samplers.grid import Grid
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import DiscreteVP, NoiseSchedule, f64
from fewstep.samplers.solver import Solver

MODEL_OPTIONS: dict[str, Any] = {
    **PROCESS_OPTIONS,
    # where the steps go: ``grid`` wins over diffusers' flags
    "grid": None, "timestep_spacing": "linspace", "steps_offset": 0, "lambda_min_clipped": -math.inf,
    "final_sigmas_type": "zero", "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "use_lu_lambdas": False, "sigma_schedule": None,
    # the noise of stochastic methods: a draw a step, or one Brownian path a sample that all step counts share
    "brownian": False,
    # pixel-space models
    "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
}  # fmt: skip
"""Config keys that every scheduler has, with diffusers' names and defaults."""

Numbers = tuple[float, ...]


@dataclass
class SolverSchedulerOutput(BaseOutput):
    """Output of ``step``: the next sample and the clean one that the network had in mind."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """Base of the diffusers schedulers: a subclass sets :attr:`options` and :meth:`solver`.

    Made by ``from_config`` of any scheduler of diffusers' Karras family or of flow matching, and a drop-in for them:
    ``set_timesteps`` takes a number, ``timesteps=``, ``sigmas=`` or a :class:`Grid`; several images a prompt, lists of
    generators, image to image (``set_begin_index``), float16 to float64 samples.

    Timesteps are floats wherever the grid is not on integers: networks embed them continuously, and rounding them, as
    diffusers does for Karras sigmas, feeds the network a time that its noise level does not have.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ]
    order = 1
    options: ClassVar[dict[str, Any]] = {}
    """Config keys of this scheduler and their defaults; keys of :data:`MODEL_OPTIONS` may get other defaults."""
    convention: ClassVar[Literal["dpm", "ddim"]] = "dpm"

    schedule: NoiseSchedule
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None
    on_run: Callable[[], None] | None = None
    """Called whenever a run begins; who put the scheduler into a pipeline may look at that then."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("fewstep.samplers.schedulers."):
            # what a saved pipeline's model_index.json names: it loads wherever ``import fewstep`` has been said
            cls.__module__ = "fewstep"
        cls.__init__ = _init_with({**MODEL_OPTIONS, **cls.options})  # type: ignore[method-assign]

    def solver(self) -> Solver:
        """The method that this scheduler's config describes."""
        raise FewstepError(f"{type(self).__name__} has no solver; use one of its subclasses")

    # -- configuration ------------------------------------------------------------------------------------------------
    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that ``config`` (of any compatible scheduler) describes.

        Keyword arguments override the config; one that is no config key raises.
        """
        known = set(inspect.signature(cls.__init__).parameters)
        for key in kwargs:
            if key not in known and not key.startswith("_") and key != "dtype":
                raise FewstepError(unknown(f"config key of {cls.__name__}", key, known - {"self"}))
        if isinstance(config, Mapping):
            config = normalised(config)
            if "plan" not in known:  # a PlanScheduler's: arrays that tell nothing about the model
                config.pop("plan", None)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def _configure(self) -> None:
        """Check the config and show the full training grid, as diffusers' schedulers do before set_timesteps."""
        config = self.config
        if config.variance_type not in (
            None,
            "fixed_small",
            "fixed_large",
            "learned",
            "learned_range",
            "fixed_small_log",
        ):
            raise FewstepError(unknown("variance_type", config.variance_type, ("learned", "learned_range")))
        if config.final_sigmas_type not in ("zero", "sigma_min"):
            raise FewstepError(unknown("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min")))
        self._brownian = bool(self.config.brownian)
        self._hook: Hook | None = None
        if config.thresholding:
            self._hook = DynamicThreshold(config.dynamic_thresholding_ratio, config.sample_max_value)
        # dynamic shifting is known only with mu, and moves the grid alone
        self.schedule = schedule_from_config(config, mu=0.0)
        steps = int(config.num_train_timesteps)
        self.timesteps = torch.arange(steps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = torch.empty(0)
        self.num_inference_steps = None
        self._begin_index: int | None = None
        self._run: Run | None = None
        self._plan: SolverPlan | None = None
        self._grid: Grid | None = None
        self._request: tuple[Any, ...] | None = None
        self._executors: dict[int, Executor] = {}
        self._times: list[float] = []

    @property
    def config(self) -> Any:
        """The config as diffusers keeps it; attributes are the keys of this class's options."""
        return super().config

    # -- what a pipeline reads ----------------------------------------------------------------------------------------
    @property
    def init_noise_sigma(self) -> float:
        """Standard normal noise times this is the first sample."""
        if self._plan is not None:
            return self._plan.init_scale
        return self.schedule.sigma_range[0] if self.schedule.family == "ve" else 1.0

    @property
    def plan(self) -> SolverPlan:
        """The plan that runs, after ``set_timesteps``."""
        if self._plan is None:
            raise FewstepError("there is no plan yet: call set_timesteps(num_inference_steps) first")
        return self._plan

    @property
    def executor(self) -> Executor:
        """What runs the plan, with the config's hooks; for those who drive it themselves."""
        return self._executor(self.plan)

    @property
    def grid(self) -> Grid | None:
        """The grid that the plan was compiled on; None for a plan from a file."""
        return self._grid

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index into ``timesteps`` of the next step; None before the first."""
        if self._run is None:
            return None
        return self._run_begin + sum(1 for row in self._active.calls if row < self._run.i)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of the training timesteps, float32 (vp models; training scripts read it)."""
        if not isinstance(self.schedule, DiscreteVP):
            raise AttributeError("only models with training timesteps have alphas_cumprod")
        return self.schedule.alpha_sigma(-self.schedule.log_rho)[0].square().float()

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # -- before the loop ----------------------------------------------------------------------------------------------
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | Grid | None = None,
        mu: float | None = None,
    ) -> None:
        """Compile the plan for a run.

        Args:
            num_inference_steps: number of steps on the configured grid.
            device: where ``timesteps`` goes. The plan stays on the host.
            timesteps: the times to evaluate at, noisiest first, possibly fractional.
            sigmas: the noise levels to evaluate at, in diffusers' convention, with or without the final 0, or a
                :class:`Grid`. Taken literally, never shifted, with one exception: the list 1, 1 - 1/N, ..., 1/N that
                pipelines of flow models pass when their user gave none stands for the configured grid of N steps.
                Together with ``timesteps``, those are what the network is told.
            mu: resolution-dependent shift of flow models with ``use_dynamic_shifting``.

        Raises:
            GridError: a grid that does not decrease, has NaN, or no positive number of steps; the index is named.
        """
        if self.on_run is not None:
            self.on_run()
        if mu is not None and not is_flow(self.config):
            raise FewstepError("mu shifts the grid of flow models; this scheduler's model is none")
        levels = sigmas if isinstance(sigmas, Grid) else _numbers(sigmas)
        times = _numbers(timesteps)
        if num_inference_steps is None and times is None and levels is None:
            raise GridError("set_timesteps needs num_inference_steps, timesteps or sigmas")
        request = (num_inference_steps, times, levels, mu)
        if self._plan is None or request != self._request:  # a served pipeline asks for the same steps again and again
            needs_mu = self.config.use_dynamic_shifting and times is None and levels is None
            self.schedule = schedule_from_config(self.config, 0.0 if mu is None and not needs_mu else mu)
            grid, plan = self._compile(num_inference_steps, times, levels)
            if num_inference_steps not in (None, plan.nfe):
                raise GridError(
                    f"num_inference_steps={num_inference_steps} contradicts the {plan.nfe} times that were given"
                )
            self._grid, self._plan, self._executors, self._request = grid, plan, {}, request
        plan = self.plan
        self._run, self._begin_index = None, None
        tau = plan.model_time[plan.evaluate].detach()
        whole = bool((tau == tau.round()).all())
        host = tau.to(torch.int64) if whole and isinstance(self.schedule, DiscreteVP) else tau.float()
        self._times = [float(t) for t in host.tolist()]
        self.timesteps = host.to(device)
        ends = torch.cat([plan.evaluate, torch.ones(1, dtype=torch.bool)])
        ratio = plan.sigma / plan.alpha if self.schedule.family != "flow" else plan.sigma
        self.sigmas = ratio.detach()[ends].float()
        self.num_inference_steps = plan.nfe
        self._start(0)  # binds the plan now rather than in the first step
        self._run = None

    def _compile(
        self, n: int | None, timesteps: Numbers | None, sigmas: Numbers | Grid | None
    ) -> tuple[Grid | None, SolverPlan]:
        grid = self._make_grid(n, timesteps, sigmas)
        return grid, self.solver().compile(self.schedule, grid)

    def _terminal(self) -> Literal["zero", "sigma_min"]:
        return self.config.final_sigmas_type  # type: ignore[no-any-return]

    def _make_grid(self, n: int | None, timesteps: Numbers | None, sigmas: Numbers | Grid | None) -> Grid:
        terminal = self._terminal()
        if sigmas is None and timesteps is not None:
            return Grid.timesteps(self.schedule, timesteps, terminal=terminal)
        if isinstance(sigmas, Grid) or (
            sigmas is not None and not (timesteps is None and self._is_placeholder(sigmas))
        ):
            grid = sigmas if isinstance(sigmas, Grid) else Grid.sigmas(self.schedule, sigmas, terminal=terminal)
            return grid if timesteps is None else grid.with_model_time(timesteps)
        return Grid.named(
            grid_name(self.config), self.schedule, n if sigmas is None else len(sigmas),  # type: ignore[arg-type]
            convention=self.convention, offset=self.config.steps_offset, terminal=terminal,
            lambda_min_clipped=self.config.lambda_min_clipped,
        )  # fmt: skip

    def _is_placeholder(self, sigmas: Numbers) -> bool:
        """Whether ``sigmas`` is the list 1, 1 - 1/N, ..., 1/N by which pipelines of flow models say: as configured."""
        n = len(sigmas)
        return is_flow(self.config) and all(abs(v - (1 - i / n)) <= 1e-6 for i, v in enumerate(sigmas))

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at this index of ``timesteps`` (image to image); the solver's warm-up starts there too."""
        self._begin_index = int(begin_index)
        self._run = None

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of ``timestep`` in ``timesteps`` (one host read if it lives on a device)."""
        times = self._times if schedule_timesteps is None else [float(t) for t in schedule_timesteps.tolist()]
        value = _as_float(timestep)
        for i, t in enumerate(times):
            if _close(t, value):
                return i
        raise FewstepError(f"timestep {value:g} is none of this run's: {', '.join(f'{t:g}' for t in times)}")

    # -- the loop -----------------------------------------------------------------------------------------------------
    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """``sample`` as the network wants it: EDM's c_in times it, otherwise itself."""
        if not self.schedule.scales_input or self._plan is None:
            return sample
        run = self._run
        if run is None or run.i >= self._end:
            run = self._start(self._begin(timestep))
        return self._active.model_input(run, sample)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor]:
        """The next sample from the network's output.

        Args:
            model_output: what the network said at ``sample``; twice the channels where it also learned a variance.
            timestep: the entry of ``timesteps`` that this step is for. It finds the start of a run that was given no
                begin index, and is compared with the expected one where that costs no device synchronisation.
            sample: (batch, ...) current sample; the result has its dtype, the update runs in float32 or better.
            generator: for stochastic methods, one or one a sample. With ``brownian=True`` in the config it seeds the
                samples' :class:`~fewstep.samplers.BrownianPath` at a run's first step.
            variance_noise: standard normal noise to use instead.

        Raises:
            FewstepError: no plan, a run that is over, an unexpected timestep, or shapes and devices that differ.
        """
        run = self._run
        if run is None or run.i >= self._end or not _is(timestep, self._expected[run.i]):
            run = self._start_or_refuse(timestep)
        if model_output.shape != sample.shape or model_output.device != sample.device:
            model_output = self._checked(model_output, sample)
        executor = self._active
        randomness: Randomness = generator
        if self._brownian and executor.plan.has_noise:
            if run.path is None:
                run.path = BrownianPath.from_generators(generator, len(sample))
            randomness = run.path
        prev = executor.advance(run, model_output, sample, generator=randomness, noise=variance_noise)
        if not return_dict:
            return (prev,)
        return SolverSchedulerOutput(prev_sample=prev, pred_original_sample=executor.x0(run).to(sample.dtype))

    @property
    def pred_original_sample(self) -> Tensor:
        """The clean sample that the network had in mind at the last step (previews in callbacks)."""
        if self._run is None:
            raise FewstepError("no step has been taken yet, so there is no predicted x0")
        return self._active.x0(self._run)

    def _start(self, begin: int) -> Run:
        """Begin a run at index ``begin``: a plan of its own, since the solver's warm-up restarts there."""
        if begin not in self._executors:
            plan = self._plan_from(begin) if begin else self.plan
            self._executors[begin] = self._executor(plan)
        self._active = self._executors[begin]
        times = dict(zip(self._active.calls, self._times[begin:], strict=True))
        self._expected = [times.get(i, math.nan) for i in range(len(self._active.rows))]
        self._end, self._run_begin, self._run = len(self._expected), begin, Run()
        return self._run

    def _executor(self, plan: SolverPlan) -> Executor:
        return Executor(plan, self._hook)

    def _plan_from(self, begin: int) -> SolverPlan:
        plan = self.plan
        rows = plan.evaluate.nonzero()[:, 0]
        # a stage goes from an older state alone; methods that mix older states in begin anew like any other
        from_newest = (plan.state[:, 0] != 0).reshape(plan.steps, -1).any(1).tolist()
        staged = any(
            base < i and not newest for i, (base, newest) in enumerate(zip(plan.base, from_newest, strict=True))
        )
        if self._grid is not None and not staged:
            tail = self.solver().compile(self.schedule, self._grid.tail(begin))
            if torch.equal(tail.model_time[tail.evaluate], plan.model_time[rows[begin:]]):
                return tail
        # stages would be placed anew; what is left of the step that ``begin`` lies in is made at first order instead
        return plan.tail(int(rows[begin]))

    def _begin(self, timestep: float | Tensor | None) -> int:
        if self._begin_index is not None:
            if not 0 <= self._begin_index < len(self._times):
                raise FewstepError(f"begin index {self._begin_index} is outside a run of {len(self._times)} steps")
            return self._begin_index
        return 0 if timestep is None else self.index_for_timestep(timestep)

    def _start_or_refuse(self, timestep: float | Tensor) -> Run:
        """The run that an unexpected step belongs to: a new one at a begin, or the current one to rounding."""
        self.plan  # noqa: B018  - raises when set_timesteps was not called
        run = self._run
        if run is None:
            return self._start(self._begin(timestep))
        value, over = _as_float(timestep), run.i >= self._end
        if not over and _close(self._expected[run.i], value):
            return run
        if _close(self._expected[0], value):
            return self._start(self._run_begin)  # the loop was started anew without set_timesteps
        if over:
            raise FewstepError(
                f"stepped past the end: this run of {len(self._active.calls)} steps is over (timestep {value:g}); "
                "call set_timesteps before the next run"
            )
        raise FewstepError(f"this run expects timestep {self._expected[run.i]:g} next, got {value:g}")

    def _checked(self, model_output: Tensor, sample: Tensor) -> Tensor:
        if model_output.shape != sample.shape:
            learned = self.config.variance_type in ("learned", "learned_range")
            if not (learned and sample.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]):
                raise FewstepError(
                    f"model_output has shape {tuple(model_output.shape)}, sample has {tuple(sample.shape)}; they must agree"
                    + ("" if learned else " (a model that also learned a variance needs variance_type='learned_range')")
                )
            model_output = model_output[:, : sample.shape[1]]
        if model_output.device != sample.device:
            raise FewstepError(f"model_output is on {model_output.device}, sample on {sample.device}; move one of them")
        return model_output

    # -- noise --------------------------------------------------------------------------------------------------------
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x0 + sigma_t eps at ``timesteps`` (one a sample): the run's own levels for its timesteps, else the model's."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` under the name that pipelines of flow models use."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of v prediction, alpha eps - sigma x0."""
        if self.schedule.reverting:
            raise FewstepError("a mean-reverting model predicts epsilon or sample; v is defined for other processes")
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        tau = f64(timesteps).reshape(-1)
        at = self.schedule.at(self.schedule.t_from_model_time(tau))
        alpha, sigma = at.alpha.clone(), at.sigma.clone()
        if self._plan is not None:
            times = f64(self._times)
            known = (tau[:, None] - times).abs() <= 1e-6 * times.abs()
            rows = self._plan.evaluate.nonzero()[:, 0]
            for k, i in known.nonzero().tolist():
                alpha[k], sigma[k] = self._plan.alpha[rows[i]].detach(), self._plan.sigma[rows[i]].detach()
        shape = (-1, *[1] * (like.ndim - 1))
        return tuple(v.to(like.dtype).to(like.device).reshape(shape) for v in (alpha, sigma))  # type: ignore[return-value]


def _init_with(defaults: dict[str, Any]) -> Callable[..., None]:
    """An ``__init__`` whose signature lists ``defaults``: diffusers reads config keys off signatures."""
    self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keys = [inspect.Parameter(k, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=v) for k, v in defaults.items()]
    signature = inspect.Signature([self_, *keys])

    def __init__(self: SolverScheduler, *args: Any, **kwargs: Any) -> None:
        private = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith("_")}
        for key in kwargs:
            if key not in defaults:
                raise FewstepError(unknown(f"config key of {type(self).__name__}", key, defaults))
        given = signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        unused = [k for k in defaults if k not in given]
        self.register_to_config(**private, **{**defaults, **given}, _use_default_values=unused)
        self._configure()

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__


def _numbers(values: Sequence[float] | Tensor | None) -> Numbers | None:
    return None if values is None else tuple(np.asarray(values, dtype=np.float64).reshape(-1).tolist())


def _as_float(timestep: float | Tensor) -> float:
    """The number; of a timestep that was expanded to the batch, its first entry."""
    if isinstance(timestep, Tensor) and timestep.ndim:
        timestep = timestep.reshape(-1)[0]
    return float(timestep)


def _is(timestep: float | Tensor, expected: float) -> bool:
    """Whether ``timestep`` is ``expected``. One that lives on a device is trusted: reading it would wait for the device."""
    if isinstance(timestep, Tensor):
        return not timestep.is_cpu or (timestep.item() if timestep.ndim == 0 else _as_float(timestep)) == expected
    return timestep == expected


def _close(expected: float, value: float) -> bool:
    """Equal to float32 rounding, which is how timesteps are kept."""
    return abs(expected - value) <= 1e-6 * abs(expected)
