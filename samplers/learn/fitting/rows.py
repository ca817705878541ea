"""Rows by least squares: every row's mixture is solved for in closed form, on the states that the student itself reaches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewstep.samplers.learn.fitting.runner import Trace, run
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan


def least_squares(plan: SolverPlan, problem: Problem, *, ridge: float = 1e-3, free: bool = False) -> SolverPlan:
    """``plan`` with the rows that lead closest to the teacher's states, fitted one after the other.

    In row i the student's states and outputs are what they are; among the mixtures of outputs that are exact when outputs
    do not change,

        X_{i+1} = a X_i + S m_i + sum_{k>0} w_k (m_{i-k} - m_i),      S the sum of the row's weights,

    the one nearest to the teacher's state at that time solves a linear least squares problem in w, shrunk towards the
    plan's own row by ``ridge`` (relative to the mean square of the regressors). It costs one run of the plan: no gradient,
    no other call of the network. With ``free`` the state's factor and the sum of the weights are fitted too.

    This is greedy: a row does not know what later rows could do with what it leaves. It subsumes the one number a step
    of DC-Solver (2409.03755) and RBF-Solver (2603.13330).
    """
    n = plan.steps
    output = torch.nn.functional.pad(plan.output, (0, n - plan.output.shape[1])).clone()
    state = plan.state.clone()
    lam = torch.log(plan.alpha) - torch.log(plan.sigma)
    trace = Trace((problem.start(plan),), ())
    with torch.no_grad():
        for i in range(n):
            now = replace(plan, state=state, output=output)
            trace = run(now, problem, begin=trace, rows=i + 1)
            goal = problem.state_at(float(lam[i + 1])) if i + 1 < n else problem.targets
            newest = trace.outputs[i]
            regressors = [trace.outputs[i - k] - newest for k in range(1, i + 1)]
            if free:
                regressors += [newest, trace.states[i]]
            if not regressors:
                continue
            w = _solved(regressors, goal - trace.end, ridge)
            output[i, 1 : i + 1] += w[:i]
            output[i, 0] -= w[:i].sum()
            if free:
                output[i, 0] += w[i]
                state[i, 0] += w[i + 1]
            trace = trace.until(i)
            seen = Trace(trace.states, (*trace.outputs, newest))
            trace = seen.summed(replace(plan, state=state, output=output))
    return replace(plan, state=state, output=output, method=f"least squares from {plan.method}").validate(strict=False)


def _solved(regressors: list[Tensor], right: Tensor, ridge: float) -> Tensor:
    a = torch.stack([r.double().reshape(-1) for r in regressors], 1)
    normal = a.T @ a
    solved: Tensor = torch.linalg.solve(
        normal + ridge * torch.diag(normal.diagonal().clamp(min=1e-30)), a.T @ right.double().reshape(-1)
    )
    return solved
