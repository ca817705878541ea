"""What a scheduler's ``step`` costs: ours against diffusers', on a 2x4x64x64 float32 sample, in one run.

    python benchmarks/step_time.py [--rounds 200] [--threads 1 2] [--clock wall] [--out FOLDER]

One measurement is the mean over a whole 20-step run, first and last steps included. Arms take turns (A B C A B C ...), so
that whatever else the machine does meets all of them; after warm-up rounds, median and quartiles over the rounds are
given. ``set_timesteps`` is timed apart: on a fresh scheduler, and again with the same arguments, as a server calls it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from record import RESULTS, machine, provenance, table, write

from fewstep import samplers

STEPS = 20
SHAPE = (2, 4, 64, 64)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
"""Stable Diffusion's noise schedule."""

Times = list[float]
CLOCKS = {"wall": perf_counter, "processor": thread_time}
ARMS = {
    "DDIM": "DDIM",
    "DPMSolver 2": "DPMSolver(solver_order=2)",
    "DPMSolver 3": "DPMSolver(solver_order=3)",
    "DEIS 3": "DEIS(solver_order=3)",
    "UniPC 3": "UniPC(solver_order=3)",
    "IPNDM 4": "IPNDM",
    "LMS 4": "LMS",
    "GHVB 4": "GHVB",
    "HeavyBall": "HeavyBall",
    "DCSolver": f"DCSolver(dc_ratios={[1.0] * 3 + [1.01] * (STEPS - 3)})",
    "EMS 3": "EMS(solver_order=3)",
    "USF": "USF(decisions=[{'order': 3, 'corrector': True}])",
    "LML": "LML",
    "diffusers DDIM": "diffusers:DDIMScheduler(clip_sample=False)",
    "diffusers DPMSolverMultistep 2": "diffusers:DPMSolverMultistepScheduler(solver_order=2)",
    "diffusers DEISMultistep 3": "diffusers:DEISMultistepScheduler(solver_order=3)",
    "diffusers UniPCMultistep 3": "diffusers:UniPCMultistepScheduler(solver_order=3)",
    "diffusers PNDM": "diffusers:PNDMScheduler(skip_prk_steps=True)",
    "diffusers LMSDiscrete": "diffusers:LMSDiscreteScheduler()",
}
PEERS = [name for name in ARMS if name.startswith("diffusers ")]
OURS = [name for name in ARMS if name not in PEERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="whole runs of every arm (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=10, help="rounds before the clock starts (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads, one after the other")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="processor: the thread's own time, on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args()
    if options.rounds < 3 or options.warm_up < 0 or min(options.threads) < 1:
        parser.error("rounds must be at least 3, warm-up at least 0 and threads at least 1")

    clock = CLOCKS[options.clock]
    about = machine()  # before the work: the load that others make
    found = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found[threads] = {
            "step": summaries(step_times(options.rounds, options.warm_up, clock)),
            "set_timesteps": {
                which: summaries(times)
                for which, times in set_timesteps_times(max(3, options.rounds // 5), clock).items()
            },
        }
    page = report(found, options.rounds, options.clock) + "\n" + provenance(about)
    body = {
        "machine": about,
        "shape": SHAPE,
        "steps": STEPS,
        "rounds": options.rounds,
        "clock": options.clock,
        "microseconds": found,
    }
    write(options.out, "step_time", body, page)
    print(page)


def step_times(rounds: int, warm_up: int, clock: Callable[[], float]) -> dict[str, Times]:
    """Microseconds a step, the mean of each whole run, arm by arm."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)
    outputs = [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]
    schedulers = {name: samplers.make_scheduler(spec, CONFIG) for name, spec in ARMS.items()}
    times: dict[str, Times] = {name: [] for name in ARMS}
    for i in range(warm_up + rounds):
        for name in rotated(list(ARMS), i):
            scheduler = schedulers[name]
            scheduler.set_timesteps(STEPS)
            timesteps = list(scheduler.timesteps)
            sample = start.clone()
            begin = clock()
            for t, output in zip(timesteps, cycle(outputs), strict=False):  # PNDM has a step more
                sample = scheduler.step(output, t, sample, return_dict=False)[0]
            seconds = clock() - begin
            if i >= warm_up:
                times[name].append(seconds / len(timesteps) * 1e6)
    return times


def set_timesteps_times(rounds: int, clock: Callable[[], float]) -> dict[str, dict[str, Times]]:
    """Microseconds of ``set_timesteps``: the first call of a scheduler, and the next one with the same arguments."""
    times: dict[str, dict[str, Times]] = {which: {name: [] for name in ARMS} for which in ("first", "again")}
    for i in range(rounds):
        for name in rotated(list(ARMS), i):
            scheduler = samplers.make_scheduler(ARMS[name], CONFIG)
            for which in ("first", "again"):
                begin = clock()
                scheduler.set_timesteps(STEPS)
                times[which][name].append((clock() - begin) * 1e6)
    return times


def rotated(names: list[str], by: int) -> list[str]:
    """Every arm is once the first of a round: none always runs on the caches that the same other one left."""
    k = by % len(names)
    return names[k:] + names[:k]


def summaries(times: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Quartiles and minimum of every arm, in microseconds."""
    return {name: summary(values) for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "min": min(values)}


def report(found: dict[int, Any], rounds: int, clock: str) -> str:
    """The page: for every number of threads, times and how often ours fits into theirs."""
    parts = [
        "# Time of a scheduler's step\n\n"
        f"Microseconds a step on a {'x'.join(map(str, SHAPE))} float32 sample, median (quartiles) over {rounds} whole runs of "
        f"{STEPS} steps, {clock} time; arms interleaved. A ratio says how many of our steps fit into one of theirs.\n"
    ]
    for threads, times in found.items():
        step = times["step"]
        header = ["", "µs a step", *(f"{peer} takes" for peer in PEERS)]
        rows = [
            [name, spread(step[name]), *(f"{step[peer]['median'] / step[name]['median']:.1f}x" for peer in PEERS)]
            for name in OURS
        ]
        rows += [[peer, spread(step[peer]), *[""] * len(PEERS)] for peer in PEERS]
        parts.append(f"## torch threads: {threads}\n\n{table(header, rows)}")
        columns = [times["set_timesteps"][which] for which in ("first", "again")]
        set_rows = [
            [name, *(spread(c[name]) for c in columns)]
            + [f"{(c[name]['median'] + STEPS * step[name]['median']) / 1e3:.2f}" for c in columns]
            for name in ARMS
        ]
        header = [f"set_timesteps({STEPS}), µs", "first call", "same call again", "first run, ms", "next run, ms"]
        parts.append(table(header, set_rows))
    parts.append(f"A run is set_timesteps and {STEPS} steps, the sum of the medians; the network comes on top.\n")
    return "\n".join(parts)


def spread(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['low']:.1f} to {values['high']:.1f})"


if __name__ == "__main__":
    main()
