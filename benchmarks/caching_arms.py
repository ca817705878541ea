"""The arms of the comparison: every method of the room at some settings, every plan file, and the peers' caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import wraps
from typing import Any

import caching_peers as peers
import torch
from caching_peers import Peer
from record import RESULTS

from fewstep import caching

OUT = RESULTS / "caching"
PLANS = OUT / "plans"
UNUSED = 100
"""Prompts before this one are for calibration."""
OTHERS = ("DeepCache 0.1.1", "diffusers", "cache-dit")


@contextmanager
def full(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
    """Everything is computed."""
    yield lambda: None


def ours(*methods: Any) -> Peer:
    """Methods and plans of :mod:`fewstep.caching`; a function of pipeline, prompts and steps is called for a fitted one."""

    @contextmanager
    def arm(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        made: list[Any] = [m(pipe, steps) if callable(m) else m for m in methods]
        with caching.applied(pipe, made) as controller:
            yield controller.reset

    return arm


@contextmanager
def timed(pipe: Any, *args: Any, **options: Any) -> Iterator[None]:
    """The pipeline's scheduler takes these for its steps, whatever the pipeline asks for."""
    scheduler, original = pipe.scheduler, pipe.scheduler.set_timesteps

    @wraps(original)  # pipelines read its signature
    def set_timesteps(num_inference_steps: int | None = None, device: Any = None, **asked: Any) -> None:
        original(*args, device=device, **(asked | options))

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def fewer(count: int) -> Peer:
    """No cache, but so many steps: what a cache has to beat."""

    @contextmanager
    def arm(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        with timed(pipe, count):
            yield lambda: None

    return arm


def planned(plan: caching.CachePlan) -> Peer:
    """A plan file, on the grid that belongs to it where it has one."""

    @contextmanager
    def arm(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        grid = plan.provenance.get("sigmas")
        with timed(pipe, sigmas=grid) if grid else nullcontext(), ours(plan)(pipe, steps) as reset:
            yield reset

    return arm


def label(method: Any) -> str:
    """A method as it would be written, its main option always, the others where they are not the default."""
    positional = [f.name for f in fields(method) if not f.kw_only]
    first = next((name for name in positional if name in ("interval", "threshold")), positional[0])
    told = [
        f"{f.name}={_short(getattr(method, f.name))}"
        for f in fields(method)
        if f.name != "timesteps" and (f.name == first or getattr(method, f.name) != f.default)
    ]
    return f"{type(method).__name__}({', '.join(told)})"


def _short(value: Any) -> str:
    if hasattr(type(value), "kind"):  # a predictor
        return label(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(str, value))})" if len(value) < 4 else f"({len(value)} values)"
    return f"{value}"


def methods(unet: bool) -> list[Any]:
    """What there is in the room that needs no data, on UNets or on transformers."""
    c = caching
    both = [
        *(c.FORA(n) for n in (2, 3)),
        *(c.TaylorSeer(n, first_enhance=2, lite=lite) for n in (2, 3, 4) for lite in (False, True)),
        *(c.HiCache(n, first_enhance=3, lite=True) for n in (2, 3)),
        *(c.EasyCache(t, warmup=3) for t in (0.05, 0.1, 0.2)),
        c.PyramidBroadcast(),
        c.PyramidBroadcast(spatial=3, window=(0, 1000)),
        *(() if unet else (c.PyramidBroadcast.published("latte"),)),
        c.FasterCache(),
        *(c.UncondReuse(interval=n) for n in (2, 3, 5)),
        *(c.GuidanceWindow(a, b) for a, b in ((0.0, 0.8), (0.2, 0.8), (0.2, 1.0))),
        c.CFGCache(interval=2),
        c.TokenMerging(0.5),
        *(c.Interval(n, predict=p) for n in (2, 3) for p in (c.Hold(), c.Extrapolate(1))),
    ]
    if unet:
        return [
            *(c.DeepCache(n, b) for b in (0, 1) for n in (2, 3, 4)),
            c.DeepCache(3, center=5.0),
            *(c.EncoderPropagation(k) for k in (2, 3, "50ls")),
            *both,
        ]
    return [
        *(
            c.Interval(n, ("blocks",), predict=p)
            for n in (2, 3)
            for p in (c.Hold(), c.Extrapolate(1), c.Extrapolate(2))
        ),
        *(c.FirstBlockCache(t) for t in (0.1, 0.2, 0.3)),
        *(c.FirstBlockCache(t, predict=c.Extrapolate(1)) for t in (0.1, 0.2, 0.3)),
        c.DeltaDiT(2),
        c.EarlyExit(),
        c.EarlyExit(refresh=3),
        *both,
    ]


def fitted(subject: Any) -> dict[str, Peer]:
    """Methods that measure the model first, on the prompts for calibration; thresholds from gentle to bold."""
    prompts, options = subject.prompts[:UNUSED], {"guidance_scale": subject.guidance}
    c = caching

    def teacache(threshold: float) -> Callable[[Any, int], Any]:
        def make(pipe: Any, steps: int) -> Any:
            fit = c.fit_polynomial(pipe, prompts, num_inference_steps=steps, samples=4, **options)
            return fit.method(threshold)

        return make

    def magcache(threshold: float, scale: bool) -> Callable[[Any, int], Any]:
        return lambda pipe, steps: c.MagCache.fit(
            pipe, prompts, num_inference_steps=steps, threshold=threshold, scale=scale, retention=0.1, **options
        )

    def rehash(threshold: float) -> Callable[[Any, int], Any]:
        return lambda pipe, steps: c.StepRehash.fit(
            pipe, prompts, num_inference_steps=steps, threshold=threshold, **options
        )

    return {
        **{f"TeaCache(threshold={t:g}), fitted": ours(teacache(t)) for t in (0.05, 0.1, 0.2)},
        **{
            f"MagCache(threshold={t:g}{', scale=True' if s else ''}), fitted": ours(magcache(t, s))
            for t, s in ((0.06, False), (0.12, False), (0.24, False), (0.12, True))
        },
        **{f"StepRehash(threshold={t:g}), fitted": ours(rehash(t)) for t in (0.95, 0.98)},
    }


def of_others(subject: Any) -> dict[str, Peer]:
    """The peers' caches that attach to a model of this kind, at several settings."""
    if subject.unet:
        return {f"DeepCache 0.1.1: interval {n}, branch {b}": peers.deep_cache(n, b) for b in (0, 1) for n in (2, 3, 4)}
    branches = [r"transformer_blocks\.\d+\.(attn1|attn|ff|ff_context)"]
    halves = ["hidden_states", "encoder_hidden_states", "timestep", "pooled_projections"]
    ratios = caching.MagCache.fit(
        subject.pipe, subject.prompts, num_inference_steps=subject.steps, guidance_scale=subject.guidance
    ).ratios
    d = peers.diffusers
    found = {
        **{
            f"diffusers FirstBlockCache: threshold {t:g}": d("apply_first_block_cache", "FirstBlockCacheConfig", threshold=t)
            for t in (0.1, 0.2, 0.3)
        },
        **{
            f"diffusers TaylorSeer: interval {n}, order {o}": d(
                "apply_taylorseer_cache", "TaylorSeerCacheConfig", cache_interval=n, max_order=o, disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32, cache_identifiers=branches,
            )
            for n in (2, 3, 4) for o in (1, 2)
        },
        **{
            f"diffusers PAB: range {n}, window {w}": d(
                "apply_pyramid_attention_broadcast", "PyramidAttentionBroadcastConfig", spatial_attention_block_skip_range=n,
                spatial_attention_timestep_skip_range=w, current_timestep_callback=True,
            )
            for n, w in ((2, (100, 800)), (2, (0, 1000)), (4, (0, 1000)))
        },
        **{
            f"diffusers MagCache: threshold {t:g}": d(
                "apply_mag_cache", "MagCacheConfig", threshold=t, mag_ratios=list(ratios or ()), retention_ratio=0.1
            )
            for t in (0.06, 0.12, 0.24)
        },
        **{
            f"cache-dit DBCache: threshold {t:g}{'' if o is None else f', TaylorSeer {o}'}": peers.cache_dit(t, taylor=o)
            for t in (0.1, 0.2, 0.3) for o in (None, 1)
        },
    }  # fmt: skip
    if type(subject.pipe).__name__ != "DiTPipeline":  # whose conditional half is first: the wrong one would be kept
        found["diffusers FasterCache"] = d(
            "apply_faster_cache", "FasterCacheConfig", tensor_format="BCHW", current_timestep_callback=True,
            attention_weight_callback=lambda _: 0.5, _unconditional_conditional_input_kwargs_identifiers=halves,
        )  # fmt: skip
    return found


def plans(subject: Any) -> dict[str, Any]:
    """The plan files for this model and number of steps."""
    found = sorted(PLANS.glob(f"{subject.name}-{subject.steps}-*.json"))
    return {f"plan {path.stem.rsplit('-', 1)[1]}": caching.CachePlan.load(path) for path in found}


def is_share(name: str) -> bool:
    """Whether an arm is a plan of the search: its word is but a share of the MACs."""
    return name.startswith("plan ") and name.removeprefix("plan ").isdigit()


def together(subject: Any) -> dict[str, Peer]:
    """Two at once: those with a plan whose computed steps fit each other, and the plan files with reuse of guidance."""
    c = caching
    if subject.guidance == 1:
        return {}
    deep = c.DeepCache(2) if subject.unet else c.Interval(2, ("blocks",), predict=c.Extrapolate(1))
    found = {f"{label(deep)} + UncondReuse(4)": ours(deep, c.UncondReuse(interval=4))}
    return found | {
        f"{k} + UncondReuse(2)": ours(p, c.UncondReuse(interval=2)) for k, p in plans(subject).items() if is_share(k)
    }


def arms(subject: Any) -> dict[str, Peer]:
    """All arms by what tables call them."""
    found = {name: planned(plan) for name, plan in plans(subject).items()} | together(subject)
    for share in (0.35, 0.5, 0.75):
        found[f"no cache, fewer steps ({round(share * subject.steps)})"] = fewer(round(share * subject.steps))
    for method in methods(subject.unet):
        if subject.guidance != 1 or not isinstance(method, caching.GuidanceWindow | caching.CFGCache):
            found[label(method)] = ours(method)
    return found | fitted(subject) | of_others(subject)


def kind(name: str) -> str:
    """Of which package an arm is, for tables and pictures."""
    return next((p for p in OTHERS if name.startswith(p)), "fewstep")


def curve(name: str) -> str:
    """The method without its setting: arms of one curve can be interpolated between."""
    return name.split(":")[0] if kind(name) != "fewstep" else name.split("(")[0].strip()
