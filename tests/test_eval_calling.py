"""Pipelines of every family are asked rightly, and what cannot be asked is one clear error."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewstep.eval import CallCounter, draw
from fewstep.eval.drawing.batch import borrowed
from fewstep.eval.drawing.calling import ask, call_defaults, family, guided
from tests.eval_fixtures import PROMPTS, tiny_dit, tiny_pipeline, tiny_sd3, tiny_unconditional

FAMILIES = {
    "StableDiffusionPipeline": (tiny_pipeline, "text", True, list(PROMPTS[:3])),
    "StableDiffusion3Pipeline": (tiny_sd3, "text", True, list(PROMPTS[:3])),
    "DiTPipeline": (tiny_dit, "class", True, ["dress", "a dress", "bag"]),
    "DDPMPipeline": (tiny_unconditional, "unconditional", False, [""] * 3),
    "DDIMPipeline": (lambda: tiny_unconditional("DDIMPipeline"), "unconditional", False, [""] * 3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_image_i_depends_on_seed_i_alone_in_every_family(name):
    """Also with a stochastic scheduler where the pipeline hands it the generators: DDPM's own scheduler here."""
    make, kind, takes_guidance, prompts = FAMILIES[name]
    pipe = make()
    assert type(pipe).__name__ == name
    assert family(type(pipe)) == kind
    assert guided(type(pipe)) is takes_guidance
    together = draw(pipe, prompts, [3, 4, 5], steps=3, guidance=3.0)
    assert together.dtype == torch.uint8
    assert together.shape[:2] == (3, 1)
    assert torch.equal(together, draw(pipe, prompts, [3, 4, 5], steps=3, guidance=3.0))
    apart = draw(pipe, prompts[1:2], [4], steps=3, guidance=3.0)
    assert (apart[0].int() - together[1].int()).abs().max() <= 1  # another batch sums in another order
    assert (together[0].int() - together[1].int()).abs().max() > 5


@pytest.mark.parametrize(("name", "calls", "evaluations"), [("DiTPipeline", 3, 12), ("DDIMPipeline", 3, 6)])
def test_calls_are_counted_in_every_family(name, calls, evaluations):
    make, _, _, prompts = FAMILIES[name]
    pipe = make()
    with CallCounter(pipe) as counter:
        draw(pipe, prompts[:2], [0, 1], steps=3, guidance=3.0)
    assert (counter.calls, counter.samples) == (calls, evaluations)


def test_two_names_of_a_class_are_one_class_and_two_classes_differ():
    pipe = tiny_dit()
    dress, also, bag = (draw(pipe, [name], [0], steps=2, guidance=1.0) for name in ("dress", "a dress", "bag"))
    assert torch.equal(dress, also)
    assert not torch.equal(dress, bag)


def test_noise_that_a_pipeline_takes_from_the_global_generator_is_the_same_again():
    """DiTPipeline hands its scheduler no generators."""
    import diffusers

    pipe = tiny_dit()
    state = torch.random.get_rng_state()
    with borrowed(pipe):
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        first = draw(pipe, ["bag"] * 2, [0, 1], steps=3, guidance=1.0)
        torch.rand(7)
        assert torch.equal(first, draw(pipe, ["bag"] * 2, [0, 1], steps=3, guidance=1.0))
        other = draw(pipe, ["bag"] * 2, [2, 3], steps=3, guidance=1.0)
    assert not torch.equal(first, other)
    torch.random.set_rng_state(state)
    draw(pipe, ["bag"], [0], steps=1, guidance=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is where it was


def test_the_embedded_sd3_gets_one_token_of_zeros_and_others_what_they_take():
    from fewstep.pipelines.zoo import folders

    pipe = tiny_sd3()
    assert call_defaults(pipe) == {}
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    draw(pipe, PROMPTS[:1], [0], steps=1, guidance=1.0)
    pipe.register_to_config(_name_or_path=str(folders.weights("fashion-flow")))
    draw(pipe, PROMPTS[:1], [0], steps=1, guidance=1.0)
    draw(pipe, PROMPTS[:1], [0], steps=1, guidance=1.0, call={"max_sequence_length": 5})
    clip = seen[1] - 1  # the tokens of the CLIP encoders come first
    assert seen == [clip + 256, clip + 1, clip + 5]


def test_ddim_hands_its_eta_to_the_scheduler():
    pipe = tiny_unconditional("DDIMPipeline")
    plain = draw(pipe, [""], [0], steps=3, guidance=1.0)
    assert not torch.equal(plain, draw(pipe, [""], [0], steps=3, guidance=1.0, call={"eta": 1.0}))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd3])
def test_one_negative_prompt_is_that_of_every_image(make):
    """Stable Diffusion's pipeline itself refuses a string beside a list of prompts."""
    pipe = make()
    plain, one, each = (
        draw(pipe, PROMPTS[:2], [0, 1], steps=2, guidance=3.0, call=call)
        for call in ({}, {"negative_prompt": "a wide bag"}, {"negative_prompt": ["a wide bag"] * 2})
    )
    assert torch.equal(one, each)
    assert not torch.equal(one, plain)


@pytest.mark.parametrize(
    ("make", "prompts", "call", "said"),
    [
        (tiny_dit, ["coat"], {}, "knows no class 'coat'; it knows 3, such as"),
        (tiny_dit, ["dres"], {}, "'dress'"),
        (tiny_dit, ["bag"], {"height": 8}, "DiTPipeline takes no height; it takes class_labels"),
        (tiny_unconditional, [""], {"eta": 1.0}, "DDPMPipeline takes no eta"),
    ],
)
def test_a_request_that_cannot_be_is_one_clear_error(make, prompts, call, said):
    with pytest.raises(ValueError, match=r".") as error:
        draw(make(), prompts, [0], steps=1, guidance=1.0, call=call)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


class NoSteps:
    def __call__(self, prompt, generator, output_type): ...


class NoSubject:
    def __call__(self, image, generator, num_inference_steps, output_type): ...


class AlsoImage:
    def __call__(self, image, prompt, generator, num_inference_steps, output_type): ...


class Anything:
    """Gives what it was told to; takes class numbers and any other word."""

    def __init__(self, images):
        self.images = images

    def __call__(self, class_labels, generator, num_inference_steps, output_type, **others):
        self.asked = {"class_labels": class_labels, **others}
        return SimpleNamespace(images=self.images)


def asked(pipe, prompts=("7",), **call):
    generators = [torch.Generator() for _ in prompts]
    return ask(pipe, list(prompts), generators, steps=1, guidance=1.0, call=call)


def test_a_class_of_pipelines_that_cannot_be_asked_says_why():
    with pytest.raises(ValueError, match="NoSteps cannot be asked for images: its call lacks num_inference_steps"):
        family(NoSteps)
    with pytest.raises(ValueError, match=r"NoSubject .* takes none of prompt, class_labels, batch_size"):
        family(NoSubject)
    with pytest.raises(ValueError, match="AlsoImage also needs image; give them in call"):
        asked(AlsoImage())


def test_a_pipeline_nobody_knows_is_asked_by_its_signature():
    pipe = Anything(np.zeros((1, 4, 6, 3), dtype=np.float32))
    assert asked(pipe, eta=0.5).shape == (1, 3, 4, 6)
    assert pipe.asked == {"class_labels": [7], "eta": 0.5}
    with pytest.raises(ValueError, match="Anything names no classes; give their numbers as prompts"):
        asked(pipe, ["a bag"])


@pytest.mark.parametrize("images", [["picture"], torch.zeros(1, 2, 3, 4, 5), np.zeros((4, 4))])
def test_what_is_no_batch_of_pictures_is_refused(images):
    with pytest.raises(ValueError, match=r"Anything made .* a batch of pictures"):
        asked(Anything(images))
