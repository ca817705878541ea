"""What caches gain in time: real network sizes with random weights on the CPU, every third call in full.

    python benchmarks/caching_speed.py [--model sd15 dit-xl pixart] [--rounds 3] [--batch 2] [--size 64]

A schedule is three calls of the network at three times: one in full, two reused. Arms take turns, round by round, each in
another place; a round also times the network without any cache. The speed-up is three plain calls over the schedule's, medians
over the rounds, in wall clock and in CPU time, which others on the machine disturb less. The bound is what the MACs allow,
counted on shapes. Peers run the same schedule: where theirs is a threshold, it is one that reuses as soon as it may.

The overhead of a cache that computes everything is too small to be seen in calls of seconds. It is measured where little is
computed: on a network of as many modules that is narrow and sees a small input, with and without hooks, many calls in turns; the
difference is held against a plain call of the real one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import caching_peers as peers
import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from record import RESULTS, machine, provenance, table, write
from torch import Tensor, nn

from fewstep import caching

TIMES = torch.tensor([801, 501, 201])
OUT = RESULTS / "caching"
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
    "sample_size": 64,
}  # fmt: skip
DIT_XL = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "sample_size": 32,
    "patch_size": 2, "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
}  # fmt: skip
PIXART = {"sample_size": 64, "num_layers": 28, "caption_channels": 4096}
"""PixArt-Sigma at 512 x 512."""
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd15": (UNet2DConditionModel, SD15),
    "dit-xl": (DiTTransformer2DModel, DIT_XL),
    "pixart": (PixArtTransformer2DModel, PIXART),
}
NARROW: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 2, "sample_size": 16},
    "dit-xl": {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4},
    "pixart": {
        "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4, "cross_attention_dim": 16, "caption_channels": 16,
    },
}  # fmt: skip
"""What makes a network of as many modules do little."""
Arm = Callable[[Any], AbstractContextManager[Any]]
"""``arm(pipe)``, open while a schedule runs."""


@dataclass(frozen=True)
class Timing:
    """Of an arm: medians over rounds, seconds; the calls one by one."""

    arm: str
    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    speedup: float
    cpu_speedup: float
    bound: float


class Subject:
    """A network with random weights and inputs of its usual size."""

    def __init__(self, name: str, batch: int, narrow: bool = False, size: int | None = None) -> None:
        kind, config = NETWORKS[name]
        config = config | ({"sample_size": size} if size else {})
        torch.manual_seed(0)
        self.name, self.batch = name, batch
        self.model: Any = kind(**config | (NARROW[name] if narrow else {})).eval().requires_grad_(False)
        self.family = caching.family_of(self.model)
        given = self.family.example(batch)
        self.inputs = {
            k: torch.randn(v.shape) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()
        }
        # what the peers' helpers want to see of a pipeline
        self.pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=TIMES), unet=self.model, transformer=self.model)

    def call(self, model: Any, step: int) -> None:
        """One call; the time is an element of the list of times, as pipelines give it."""
        rest = {k: v for k, v in self.inputs.items() if k not in ("sample", "timestep")}
        if self.name == "sd15":
            model(self.inputs["sample"], TIMES[step], **rest)  # DeepCache's helper reads the second argument
        else:
            model(timestep=TIMES[step].expand(self.batch), **rest)


def ours(method: Any) -> Arm:
    return lambda pipe: caching.applied(pipe.transformer, method, num_inference_steps=len(TIMES))


def theirs(peer: peers.Peer) -> Arm:
    @contextmanager
    def arm(pipe: Any) -> Iterator[None]:
        with peer(pipe, len(TIMES)) as reset:
            reset()
            yield

    return arm


def arms(subject: Subject) -> tuple[dict[str, Any], dict[str, Arm]]:
    """Our methods, and all arms: these and the peers on the same schedule."""
    c, family = caching, subject.family
    if subject.name == "sd15":
        mine = {
            "DeepCache, branch 0": c.DeepCache(3),
            "encoder propagation": c.EncoderPropagation(3),
            "self-attention only": c.Interval(3, tuple(family.branches("attention"))),
        }
        return mine, {**{k: ours(m) for k, m in mine.items()}, "DeepCache 0.1.1, branch 0": theirs(peers.deep_cache(3))}
    count = len(family.paths)  # type: ignore[attr-defined]
    mine = {
        "all blocks": c.Interval(3, ("blocks",)),
        "all but the first block": c.Interval(3, (f"blocks[1:{count}]",)),
        "self-attention only": c.Interval(3, tuple(family.branches("attention"))),
    }
    other = {
        "diffusers FirstBlockCache": peers.diffusers("apply_first_block_cache", "FirstBlockCacheConfig", threshold=1e9),
        "cache-dit DBCache, first block": peers.cache_dit(1e9),
        "diffusers PAB, self-attention": peers.diffusers(
            "apply_pyramid_attention_broadcast", "PyramidAttentionBroadcastConfig", spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=True,
        ),
    }  # fmt: skip
    return mine, {k: ours(m) for k, m in mine.items()} | {k: theirs(p) for k, p in other.items()}


SAME = {
    "DeepCache 0.1.1, branch 0": "DeepCache, branch 0",
    "diffusers FirstBlockCache": "all but the first block",
    "cache-dit DBCache, first block": "all but the first block",
    "diffusers PAB, self-attention": "self-attention only",
}
"""Of a peer's arm ours with the same schedule."""


@torch.no_grad()
def timed(
    subject: Subject, rounds: int, only: Sequence[str]
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any], dict[str, str]]:
    """By arm (rounds, calls, 2) wall and CPU seconds; (rounds, 2) of a plain call; and what failed, with the reason."""
    found = {name: arm for name, arm in arms(subject)[1].items() if any(word in name for word in only)}
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in found}
    plain, failed = [], dict[str, str]()
    subject.call(subject.model, 0)  # allocates
    for i in range(rounds):
        for name in rotated([*found, ""], i):
            if not name:
                plain.append(clocked(lambda: subject.call(subject.model, 0)))
            elif name not in failed:
                try:
                    with found[name](subject.pipe):
                        model = subject.pipe.unet if subject.name == "sd15" else subject.pipe.transformer
                        taken[name].append([
                            clocked(lambda model=model, s=s: subject.call(model, s)) for s in range(len(TIMES))
                        ])  # fmt: skip
                except Exception as error:  # whatever a peer raises
                    failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return {k: np.array(v) for k, v in taken.items() if k not in failed}, np.array(plain), failed


def clocked(function: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def rotated(names: list[str], by: int) -> list[str]:
    return names[by % len(names) :] + names[: by % len(names)]


@torch.no_grad()
def overhead(name: str, rounds: int) -> dict[str, float]:
    """Seconds of CPU time that the hooks of a plan that computes everything add to a call, by method."""
    subject = Subject(name, 1, narrow=True)
    found = {}
    for method_name, method in arms(subject)[0].items():
        plan = method.compile(subject.family, len(TIMES))
        computing = caching.CachePlan(plan.sites, np.zeros_like(plan.actions), plan.predictor)
        times: dict[bool, list[float]] = {True: [], False: []}
        for i in range(rounds + 3):
            for cached in (True, False) if i % 2 else (False, True):
                with caching.applied(subject.model, computing) if cached else nullcontext():
                    taken = [clocked(lambda s=s: subject.call(subject.model, s))[1] for s in range(len(TIMES))]
                if i >= 3:
                    times[cached] += taken
        found[method_name] = float(np.median(times[True]) - np.median(times[False]))
    return found


def summary(subject: Subject, taken: Mapping[str, np.ndarray[Any, Any]], plain: np.ndarray[Any, Any]) -> list[Timing]:
    mine = arms(subject)[0]
    bounds = {
        k: m.compile(subject.family, len(TIMES)).cost(subject.model, subject.inputs).speedup for k, m in mine.items()
    }
    base, rows = np.median(plain, axis=0), []
    for name, times in taken.items():
        middle = np.median(times, axis=0)
        wall, cpu = len(TIMES) * base / middle.sum(0)
        bound = bounds[SAME.get(name, name)]
        rows.append(Timing(name, tuple(middle[:, 0]), tuple(middle[:, 1]), float(wall), float(cpu), bound))
    return rows


def page(bodies: list[dict[str, Any]], about: Mapping[str, Any]) -> str:
    text = "# Time of caches, real sizes\n\n"
    for body in bodies:
        rows = [
            [
                t["arm"],
                " / ".join(f"{s:.2f}" for s in t["cpu"]),
                f"{t['speedup']:.2f}x",
                f"{t['cpu_speedup']:.2f}x",
                f"{t['bound']:.2f}x",
                f"{t['cpu_speedup'] / t['bound']:.2f}",
            ]
            for t in body["timings"]
        ]
        header = ["arm", "CPU seconds of the calls", "wall clock", "CPU time", "bound", "of the bound"]
        size = body["latents"]
        text += f"## {body['model']}, latents {size}x{size}, batch {body['batch']}\n\n{table(header, rows)}\n"
        text += f"A plain call: {body['plain'][0]:.2f} s of wall clock, {body['plain'][1]:.2f} s of CPU time. "
        most = max(body["overhead"].items(), key=lambda item: item[1])
        text += (
            f"A plan that computes everything adds at most {1000 * most[1]:.2f} ms to a call ({most[0]}), "
            f"{most[1] / body['plain'][1]:.3%} of it.\n\n"
        )
        text += "".join(f"- {name} did not run: {why}\n" for name, why in body["failed"].items()) + "\n"
    text += (
        "Three calls, the first in full. Speed-ups are of the network alone, medians over the rounds; the bound is that of the "
        "MACs, and the last column is of CPU time.\n\n"
    )
    return text + provenance(about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="arms whose name has one of these")
    parser.add_argument("--size", type=int, help="side of the latents, where the usual one takes too long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hooks", type=int, default=40, help="rounds in which the hooks' own time is measured")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    about, bodies = machine(), list[dict[str, Any]]()
    for name in asked.model:
        hooks = overhead(name, asked.hooks)
        subject = Subject(name, asked.batch, size=asked.size)
        taken, plain, failed = timed(subject, asked.rounds, asked.only)
        bodies.append(
            {
                "model": name,
                "latents": subject.model.config.sample_size,
                "batch": asked.batch,
                "rounds": asked.rounds,
                "plain": np.median(plain, axis=0).tolist(),
                "timings": [asdict(t) for t in summary(subject, taken, plain)],
                "overhead": hooks,
                "failed": failed,
            }
        )
        print(page(bodies[-1:], about), flush=True)
    batched = "" if asked.batch == 1 else f"-batch{asked.batch}"
    write(OUT, "speed-" + "-".join(asked.model) + batched, {"models": bodies, "machine": about}, page(bodies, about))


if __name__ == "__main__":
    main()
