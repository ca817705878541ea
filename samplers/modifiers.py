"""Changes of a finished plan or grid that go with any solver."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers.grid import Grid
from fewstep.samplers.plan import SolverPlan, widened
from fewstep.samplers.schedule import f64


def analytic_first_step(plan: SolverPlan, data_variance: float = 1.0) -> SolverPlan:
    """``plan`` without its first network call: that output is what data ~ N(0, ``data_variance``) would give.

        x0 = alpha v X / (alpha^2 v + sigma^2),    eps = sigma X / (alpha^2 v + sigma^2)

    At the first, almost pure noise that is nearly what the network says. X_1 is then a multiple of X_0, so the plan begins
    there with another initial scale, and rows that read the first output read X_1 in its place. ``data_variance = 0``
    assumes x0 = 0.

    The result has one row, one call and one time less. It is exact for that Gaussian only, so rows that read the assumed
    output no longer pass ``validate()``, only ``validate(strict=False)``.

    Sources: the option ``afs`` of AMED's code, 2312.00094: it takes eps = X / sqrt(1 + sigma^2) on an EDM model, which
    ``data_variance = 1`` is up to a relative 1 / (2 sigma^2). USF's ``zero_x0``, 2312.07243, is ``data_variance = 0``;
    :class:`~fewstep.samplers.USF` here takes 1.

    Raises:
        PlanError: a plan of one row, one with coefficients of every dimension's own, one whose first row draws noise or adds a
            constant, or whose second calls no network.
    """
    if data_variance < 0 or not math.isfinite(data_variance):
        raise FewstepError(f"data_variance is a variance, got {data_variance!r}")
    if plan.sample_shape:
        raise PlanError(
            f"plan {plan.method}: every dimension has coefficients of its own, so after the first step no one initial scale "
            "fits them all"
        )
    if plan.steps < 2 or bool(plan.noise[0] != 0) or bool((plan.constant[0] != 0).any()) or not bool(plan.evaluate[1]):
        raise PlanError(
            f"plan {plan.method}: only a deterministic first row that another calling row follows can do without its call"
        )
    alpha, sigma, v = plan.alpha[0], plan.sigma[0], data_variance
    given = {"data": alpha * v, "noise": sigma, "velocity": sigma - alpha * v}[plan.basis[0]] / (
        alpha**2 * v + sigma**2
    )
    c = plan.state[0, 0] + given * plan.output[0, 0]
    n = plan.steps - 1
    state, output = (widened(values[1:], n) for values in (plan.state, plan.output))
    old = [widened(values[1:], n + 1) for values in (plan.state, plan.output)]
    for i in range(n):
        # row i + 1 of the plan: what it makes of X_0 and m_0, column i + 1, is now a multiple of X_1, column i
        state[i, i] = state[i, i] + (old[0][i, i + 1] + given * old[1][i, i + 1]) / c
        state[i, i + 1 :] = 0
        output[i, i + 1 :] = 0
    return replace(
        plan,
        state=state,
        output=output,
        noise=plan.noise[1:],
        constant=plan.constant[1:],
        alpha=plan.alpha[1:],
        sigma=plan.sigma[1:],
        model_time=plan.model_time[1:],
        in_scale=plan.in_scale[1:],
        evaluate=plan.evaluate[1:],
        basis=plan.basis[1:],
        init_scale=plan.init_scale * float(c.detach()),
        method=f"{plan.method}, first step free",
    ).validate(strict=False)


def scaled_noise(plan: SolverPlan, factor: float) -> SolverPlan:
    """``plan`` with every predicted eps divided by ``factor``, x0 following from X = alpha x0 + sigma eps.

    Networks overestimate eps on states that are predictions themselves; a factor slightly above 1 corrects for that
    (epsilon scaling, 2308.15321, eq. 9; 1.0012 on CIFAR-10). Such rows do not pass ``validate()``, only
    ``validate(strict=False)``.

    Raises:
        FewstepError: a factor that is not positive.
    """
    if not 0 < factor < math.inf:
        raise FewstepError(f"the factor of eps must be positive, got {factor!r}")
    state, output = widened(plan.state, max(plan.state.shape[1], plan.output.shape[1])), plan.output.clone()
    for i in range(plan.steps):
        for k in range(min(plan.output.shape[1], i + 1)):
            j, w = i - k, plan.output[i, k]
            if not bool((w != 0).any()) or plan.alpha[j] == 0:
                continue  # at alpha = 0 the state is eps, whatever the network says
            sign = {"data": 1.0, "noise": 0.0, "velocity": -1.0}[plan.basis[j]]
            output[i, k] = w / factor
            state[i, k] = state[i, k] + sign * w * (1 - 1 / factor) / plan.alpha[j]
    scaled = replace(plan, state=state, output=output, method=f"{plan.method}, eps/{factor:g}")
    if plan.reverting:
        scaled = replace(scaled, constant=scaled.reverting_constant())
    return scaled.validate(strict=False)


def to_zero(grid: Grid) -> Grid:
    """``grid`` with a last step from where it ends to sigma = 0 (denoise to zero); itself if it ends there.

    That step costs one more call. It is x = x0, since steps to sigma = 0 are of first order.
    """
    if math.isinf(float(grid.lam[-1])):
        return grid
    whole = Grid.lambdas(grid.schedule, torch.cat([grid.lam, f64([math.inf])]), name=f"{grid.name}, to zero")
    told = torch.cat([grid.model_time, whole.model_time[-1:]])
    return replace(whole, model_time=told)
