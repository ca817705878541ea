"""Every scheduler inside the real diffusers pipelines, tiny and random: their calls, callbacks, outputs, and parity with
diffusers' own schedulers where there is one of the same method."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.samplers.capabilities import CAPABILITIES
from fewstep.samplers.specs import make_scheduler, scheduler_names
from tests.eval_fixtures import quiet, tiny_pipeline
from tests.parity_fixtures import (
    tiny_controlnet_pipeline,
    tiny_flux_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
    tiny_wan_pipeline,
)
from tests.pipeline_fixtures import sd3_prompts, seeded, tiny_dit_pipeline, tiny_sd3_pipeline
from tests.tensor_fixtures import noise, relative

IMAGE = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(4))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 16:] = 1
STEPS = 4


def from_stable_diffusion(name: str) -> Any:
    parts = {k: v for k, v in tiny_pipeline().components.items() if k != "image_encoder"}
    return quiet(getattr(diffusers, name)(**parts, requires_safety_checker=False))


@dataclass(frozen=True)
class Case:
    """A pipeline, how it is called for two images, and what comes out."""

    make: Callable[[], Any]
    call: dict[str, Any]
    shape: tuple[int, ...]
    family: str = "vp"
    steps: int = STEPS
    """How many of the STEPS are taken: fewer from an image that is there already."""
    callback: bool = True
    output_type: str = "pt"
    """The kind that the shape is of."""
    twins: tuple[str, ...] = field(default=("DDIM", "DPMSolver", "DEIS", "UniPC"))

    def run(self, pipe: Any, **more: Any) -> Any:
        call = {
            "num_inference_steps": STEPS,
            "output_type": self.output_type,
            "generator": seeded(2),
            **self.call,
            **more,
        }
        return torch.as_tensor(pipe(**call)[0])


WORDS = {"prompt": "a dress", "num_images_per_prompt": 2}
BY_EMBEDDING = {"height": 16, "width": 16, "num_images_per_prompt": 2}
CASES = {
    "text to image": Case(tiny_pipeline, WORDS, (2, 1, 32, 32)),
    "image to image": Case(
        lambda: from_stable_diffusion("StableDiffusionImg2ImgPipeline"),
        {**WORDS, "image": IMAGE, "strength": 0.5}, (2, 1, 32, 32), steps=2,
    ),
    "inpainting": Case(
        lambda: from_stable_diffusion("StableDiffusionInpaintPipeline"),
        {**WORDS, "image": IMAGE, "mask_image": MASK, "height": 32, "width": 32, "strength": 0.75}, (2, 1, 32, 32), steps=3,
    ),
    "ControlNet": Case(tiny_controlnet_pipeline, {**WORDS, "image": IMAGE}, (2, 1, 32, 32)),
    "SDXL": Case(
        tiny_sdxl_pipeline,
        {
            "prompt_embeds": noise(1, 3, 16), "pooled_prompt_embeds": noise(1, 8),
            "negative_prompt_embeds": noise(1, 3, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 8, seed=2),
            **BY_EMBEDDING,
        },
        (2, 3, 16, 16),
    ),
    "DiT": Case(tiny_dit_pipeline, {"class_labels": [1, 2]}, (2, 16, 16, 3), callback=False, output_type="np"),
    "PixArt": Case(
        tiny_pixart_pipeline,
        {
            "prompt_embeds": noise(1, 3, 12), "prompt_attention_mask": torch.ones(1, 3), "negative_prompt": None,
            "negative_prompt_embeds": noise(1, 3, 12, seed=2), "negative_prompt_attention_mask": torch.ones(1, 3),
            "use_resolution_binning": False, **BY_EMBEDDING,
        },
        (2, 3, 16, 16), callback=False,
    ),
    "SD3": Case(
        tiny_sd3_pipeline, {**sd3_prompts(2), "height": 16, "width": 16}, (2, 3, 16, 16), family="flow", twins=("DDIM",)
    ),
    "Flux": Case(
        tiny_flux_pipeline, {"prompt_embeds": noise(1, 3, 16), "pooled_prompt_embeds": noise(1, 8), **BY_EMBEDDING},
        (2, 3, 16, 16), family="flow", twins=("DDIM",),
    ),
    "Wan": Case(
        tiny_wan_pipeline,
        {
            "prompt_embeds": noise(1, 3, 16), "negative_prompt_embeds": noise(1, 3, 16, seed=2), "height": 16, "width": 16,
            "num_frames": 5, "num_videos_per_prompt": 2,
        },
        (2, 5, 3, 16, 16), family="flow", twins=("DDIM",),
    ),
}  # fmt: skip
TWINS = {
    "DDIM": "DDIMScheduler(clip_sample=False)",
    "DPMSolver": "DPMSolverMultistepScheduler(algorithm_type='dpmsolver++', solver_type='midpoint')",
    "DEIS": "DEISMultistepScheduler(solver_type='logrho')",
    "UniPC": "UniPCMultistepScheduler(solver_type='bh2', disable_corrector=[0, 1])",  # ours on short grids
}


@cache
def built(case: str) -> tuple[Any, Any]:
    """The pipeline and the scheduler config that it came with."""
    pipe = CASES[case].make()
    return pipe, pipe.scheduler.config


def runs(name: str, family: str) -> bool:
    """Whether the methods of this scheduler run on the family; one that is no builder of its own runs on all."""
    builders = [c for c in CAPABILITIES if c.scheduler == f"{name}Scheduler"]
    return all(family in c.families for c in builders)


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case, given in CASES.items() for name in scheduler_names() if runs(name, given.family)],
)
def test_every_scheduler_in_every_pipeline(case, name):
    given, (pipe, config) = CASES[case], built(case)
    pipe.scheduler = make_scheduler(name, config)
    seen = []

    def callback(pipeline, i, t, tensors):
        seen.append(float(t))
        assert tensors["latents"].isfinite().all()
        return tensors

    images = given.run(pipe, **({"callback_on_step_end": callback} if given.callback else {}))
    assert images.shape == given.shape
    assert images.isfinite().all()
    assert (images[0] - images[1]).abs().max() > 1e-4  # a generator an image
    assert pipe.scheduler.num_inference_steps == len(pipe.scheduler.timesteps)
    if given.callback:
        assert seen == pipe.scheduler.timesteps[-len(seen) :].tolist()
    assert pipe.scheduler.step_index == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, given in CASES.items() for name in given.twins])
def test_the_pictures_of_diffusers_own_scheduler(case, name):
    """Their float32 coefficients against our float64 ones, through a network of random weights: 1e-3 of the latents' norm
    (test_scheduler_parity holds the step itself to 1e-4)."""
    given, (pipe, config) = CASES[case], built(case)
    latents = {"output_type": "latent"} if case != "DiT" else {}
    if (
        given.family == "flow"
    ):  # Euler's method is DDIM; Flux brings the grid itself, elsewhere it is their scheduler's own
        pipe.scheduler, ours = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config), config
        grid = {} if case == "Flux" else {"grid": "linspace"}
    else:
        ours, grid = {**config, "timestep_spacing": "trailing"}, {}
        pipe.scheduler = make_scheduler(f"diffusers:{TWINS[name]}", ours)
    theirs, times = given.run(pipe, **latents), pipe.scheduler.timesteps
    pipe.scheduler = make_scheduler(name, {**ours, **grid})
    ours = given.run(pipe, **latents)
    assert torch.allclose(pipe.scheduler.timesteps.double(), times.double(), rtol=1e-6)
    assert relative(ours, theirs) < 1e-3


@pytest.mark.parametrize("case", [case for case, given in CASES.items() if given.callback])
def test_a_callback_may_change_the_latents(case):
    """UniPC holds the past; a change of the latents has to reach the result all the same."""
    given, (pipe, config) = CASES[case], built(case)
    pipe.scheduler = make_scheduler("UniPC", config)
    plain = given.run(pipe)
    changed = given.run(
        pipe, callback_on_step_end=lambda pipeline, i, t, tensors: {"latents": 0.5 * tensors["latents"]}
    )
    assert relative(changed, plain) > 1e-2
    same = given.run(pipe, callback_on_step_end=lambda pipeline, i, t, tensors: tensors)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_output(case):
    given, (pipe, config) = CASES[case], built(case)
    pipe.scheduler = make_scheduler("DPMSolver", config)
    array = given.run(pipe, output_type="np")
    pictures = pipe(**{
        "num_inference_steps": STEPS, "generator": seeded(2), **given.call, "output_type": "pil", "return_dict": False,
    })[0]  # fmt: skip
    assert len(pictures) == 2
    frames = pictures[0] if case == "Wan" else [pictures[0]]
    flat = array[0] if case == "Wan" else array[:1]
    for frame, values in zip(frames, flat, strict=True):
        assert frame.size == (given.shape[-1], given.shape[-1]) if case != "DiT" else (16, 16)
        seen = torch.tensor(list(frame.convert("RGB").tobytes())).reshape(*frame.size, 3) / 255
        assert (seen - values.expand_as(seen)).abs().max() < 0.51 / 255 + 1e-6  # rounded to eight bits


@pytest.mark.parametrize("case", ["text to image", "SD3"])
def test_what_a_family_has_not_is_refused_with_the_reason(case):
    pipe, config = built(case)
    pipe.scheduler = make_scheduler("DPMSolver", config)
    with pytest.raises(FewstepError, match="index 1"):
        CASES[case].run(
            pipe, num_inference_steps=None, **({"timesteps": [9, 9]} if case != "SD3" else {"sigmas": [0.5, 0.5]})
        )
