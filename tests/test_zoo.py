"""The embedded models load offline, do what their cards say, and refuse damage; their training loop resumes exactly."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fewstep import pipelines
from fewstep.errors import ArtifactError, FewstepError
from fewstep.pipelines import zoo
from fewstep.pipelines.zoo import folders, integrity
from fewstep.pipelines.zoo.training import (
    captions,
    classifier,
    cli,
    fashion_sd,
    loop,
    objectives,
    state,
    task,
    tokenizer,
)


@pytest.fixture(scope="module")
def pipe():
    pipe = pipelines.load("fashion-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps, guidance=4.0):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
    ).images


# --- what loads ---------------------------------------------------------------------------------------------------


def test_load_gives_a_diffusers_pipeline_in_float32_without_a_network(pipe, monkeypatch):
    assert type(pipe) is StableDiffusionPipeline
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}

    def no_network(*_):
        raise AssertionError("loading an embedded model opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_network)
    pipelines.load("fashion-sd")


def test_load_takes_a_dtype():
    pipe = pipelines.load("fashion-sd", torch_dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_importing_and_listing_cost_no_torch():
    code = "import sys; from fewstep import pipelines; pipelines.models(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_saved_copy_draws_the_same_image(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    copy = StableDiffusionPipeline.from_pretrained(tmp_path)
    copy.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(copy, ["a bag"], 2), draw(pipe, ["a bag"], 2), rtol=0, atol=0)


def test_models_describe_what_lies_there():
    assert set(pipelines.models()) == {"fashion-sd"}
    assert set(zoo.instruments()) == {"fashion-features", "fashion-clip"}
    for name, model in {**pipelines.models(), **zoo.instruments()}.items():
        stored = sum(path.stat().st_size for path in folders.weights(name).rglob("*model.safetensors"))
        assert model.name == name
        # float16: two bytes a parameter, and headers; the feature net's statistics count as parameters
        assert 2 * model.parameters <= stored <= 2 * model.parameters + 100_000
        assert model.bytes < 20e6
        assert model.measured
        assert zoo.card(name).startswith(f"# {name}")


def test_every_released_file_is_hashed_and_listed():
    hashed = set(integrity.read())
    there = {path.relative_to(folders.WEIGHTS).as_posix() for path in folders.WEIGHTS.rglob("*") if path.is_file()}
    assert there - hashed == {"hashes.json"} | {name for name in there if name.endswith("README.md")}
    assert hashed <= there


# --- what it draws ------------------------------------------------------------------------------------------------


def least_expected(successes_rate, count, sigmas=4.0):
    """The least number of successes in ``count`` draws that a rate leaves plausible, at ``sigmas`` deviations."""
    return math.floor(count * successes_rate - sigmas * math.sqrt(count * successes_rate * (1 - successes_rate)))


def test_it_draws_the_prompted_class(pipe):
    prompts = [prompt for prompt in zoo.PLAIN_PROMPTS for _ in range(4)]
    wanted = torch.arange(10).repeat_interleave(4)
    with torch.no_grad():
        named = zoo.features().logits(draw(pipe, prompts, steps=15)).argmax(1)
    rate = pipelines.models()["fashion-sd"].measured["class_accuracy_guidance_4"]
    assert int((named == wanted).sum()) >= least_expected(rate, len(wanted))


def test_the_attributes_of_a_prompt_are_drawn(pipe):
    """Dark coats are darker than bright ones, and narrow dresses narrower than wide ones."""
    dark, bright = (draw(pipe, [f"a {word} coat"] * 4, steps=10).mean() for word in ("dark", "bright"))
    assert dark < bright
    narrow, wide = (draw(pipe, [f"a {word} dress"] * 4, steps=10) > 1 / 8 for word in ("narrow", "wide"))
    assert narrow.sum() < wide.sum()


def test_features_tell_the_classes_of_test_images_apart():
    from fewstep.pipelines.zoo.training import data

    if not data.folder().exists():
        pytest.skip("Fashion-MNIST is not installed")
    test = data.load("test")
    with torch.no_grad():
        named = zoo.features().logits(test.images[:1000, None]).argmax(1)
    rate = zoo.instruments()["fashion-features"].measured["test_accuracy"]
    assert int((named == test.labels[:1000]).sum()) >= least_expected(rate, 1000)


def test_features_refuse_another_size():
    with pytest.raises(FewstepError, match=r"\(2, 1, 28, 28\).*\(N, 1, 32, 32\)"):
        zoo.features()(torch.zeros(2, 1, 28, 28))


def test_reference_moments_belong_to_the_network():
    moments = zoo.reference_moments()
    assert moments.count == 10_000
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    assert moments.mean.shape == zoo.features()(torch.zeros(1, 1, 32, 32)).shape[1:]


def test_clip_prefers_the_right_prompt(pipe):
    model, processor = zoo.clip()
    images = pipe.numpy_to_pil(draw(pipe, list(zoo.PLAIN_PROMPTS), steps=15).permute(0, 2, 3, 1).numpy())
    inputs = processor(text=list(zoo.PLAIN_PROMPTS), images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        right = model(**inputs).logits_per_image.argmax(1) == torch.arange(10)
    # It knows 87 of 100 real garments, drawn ones rather better: six right of ten would be far out of line.
    assert int(right.sum()) >= 7


# --- prompts and the tokenizer --------------------------------------------------------------------------------------


def test_prompts_are_captions_half_of_them_plain():
    prompts = zoo.prompts("fashion-sd")
    assert len(prompts) == 10_000
    assert set(prompts) <= set(captions.CAPTIONS[1:])
    assert 0.4 < sum(prompt in zoo.PLAIN_PROMPTS for prompt in prompts) / len(prompts) < 0.7


def test_every_word_of_a_caption_is_one_token(pipe):
    known = {f"{word}</w>" for word in tokenizer.words(captions.CAPTIONS)}
    for caption in captions.CAPTIONS[1:]:
        assert set(pipe.tokenizer.tokenize(caption)) <= known


def test_any_other_prompt_is_spelled_out(pipe):
    tokens = pipe.tokenizer.tokenize("Größe 42, naïve ☂")
    assert tokens
    assert pipe.tokenizer.unk_token not in tokens


def test_special_tokens_agree_with_the_text_tower(pipe):
    ids = pipe.tokenizer("an ankle boot", padding="max_length").input_ids
    config = pipe.text_encoder.config
    assert len(ids) == pipe.tokenizer.model_max_length == config.max_position_embeddings
    assert ids[0] == pipe.tokenizer.bos_token_id == config.bos_token_id
    assert set(ids[4:]) == {pipe.tokenizer.eos_token_id} == {config.eos_token_id} == {config.pad_token_id}


def test_articles_fit():
    assert zoo.PLAIN_PROMPTS[-1] == "an ankle boot"
    assert "a dark ankle boot" in captions.CAPTIONS
    assert not any(caption.startswith(("a a", "an d", "an b", "an n", "an w")) for caption in captions.CAPTIONS)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied_weights(tmp_path, monkeypatch):
    shutil.copytree(folders.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(folders, "WEIGHTS", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_damaged_file_is_named(copied_weights):
    path = copied_weights / "fashion-sd" / "unet" / folders.DIFFUSERS_WEIGHTS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"unet/diffusion_pytorch_model\.safetensors is damaged.*reinstall"):
        pipelines.load("fashion-sd")


def test_a_missing_file_is_named(copied_weights):
    (copied_weights / "fashion-clip" / "vocab.json").unlink()
    with pytest.raises(ArtifactError, match=r"fashion-clip/vocab\.json is missing.*reinstall"):
        zoo.clip()


def test_a_missing_folder_is_named(copied_weights):
    shutil.rmtree(copied_weights)
    with pytest.raises(ArtifactError, match=r"hashes\.json is missing.*reinstall"):
        pipelines.load("fashion-sd")


@pytest.mark.parametrize("name", ["fashion-xl", "fashion-clip", ""])
def test_an_unknown_pipeline_is_refused_with_the_known_ones(name):
    with pytest.raises(FewstepError, match=f"'{name}'.*fashion-sd"):
        pipelines.load(name)


def test_an_unknown_card_is_refused():
    with pytest.raises(FewstepError, match=r"'nope'.*fashion-clip, fashion-features, fashion-sd"):
        zoo.card("nope")


def test_a_missing_data_set_names_the_package(tmp_path, monkeypatch):
    from fewstep.pipelines.zoo.training import data

    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    data.load.cache_clear()
    try:
        with pytest.raises(ArtifactError, match=r"dataset-fashion-mnist.*FEWSTEP_FASHION_MNIST"):
            data.load("train")
    finally:
        data.load.cache_clear()


# --- the training runs -----------------------------------------------------------------------------------------------


def test_epsilon_noises_as_the_scheduler_does():
    objective = objectives.Epsilon({**fashion_sd.SCHEDULER, "_class_name": "DDPMScheduler"}, gamma=5.0)
    clean = torch.randn(64, 4, 8, 8)
    noised = objective(clean, torch.Generator().manual_seed(0))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[noised.timestep].view(-1, 1, 1, 1)
    expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * noised.target
    torch.testing.assert_close(noised.sample.double(), expected, rtol=0, atol=1e-5)
    snr = (alpha / (1 - alpha)).flatten()
    torch.testing.assert_close(noised.weight.double(), snr.clamp(max=5) / snr, rtol=1e-4, atol=0)


def test_flow_goes_straight_from_data_to_noise():
    clean = torch.randn(64, 1, 32, 32)
    noised = objectives.Flow(shift=3.0)(clean, torch.Generator().manual_seed(0))
    time = noised.timestep.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noised.sample - time * noised.target, clean, rtol=0, atol=1e-5)
    assert 0 < noised.timestep.min() < noised.timestep.max() < 1000
    # A shift of s moves the median time from 1/2 to s / (1 + s).
    assert noised.timestep.median() > 600


def test_augmentation_keeps_every_lit_pixel_within_reach():
    images = torch.zeros(50, 1, 32, 32)
    images[:, 0, 10, 7] = 1
    moved = classifier.augment(images, torch.Generator().manual_seed(0), shift=2)
    assert moved.sum(dim=(1, 2, 3)).eq(1).all()
    rows, columns = moved[:, 0].nonzero()[:, 1], moved[:, 0].nonzero()[:, 2]
    assert set(rows.tolist()) == set(range(8, 13))
    assert set(columns.tolist()) == {*range(5, 10), *range(22, 27)}  # 31 - 7 = 24 where it was flipped


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fashion-xl", "--steps", "1"], "fashion-xl"),
        (["fashion-features"], "steps=None and minutes=None"),
        (["export", "fashion-features", "--cache", "nowhere"], "train fashion-features first"),
        (["measure", "fashion-xl"], "fashion-xl"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, said, capsys):
    threads = torch.get_num_threads()
    assert cli.main([*arguments, "--threads", str(threads)]) == 2
    assert said in capsys.readouterr().err


# --- the training loop ----------------------------------------------------------------------------------------------


class TinyTask:
    """Fits noise with a channels-last convolution and a batch norm: buffers and strides must survive as well."""

    name = "tiny"
    settings = task.Settings(batch_size=4, warmup_steps=3, learning_rate=1e-2)

    def build(self):
        layers = torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 1)
        return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def loss(self, module, step, generator):
        return module(torch.randn(4, 2, 6, 6, generator=generator)).square().mean() + 0.01 * (step % 3)

    def evaluate(self, module):
        return {}

    def export(self, module, folder):
        raise NotImplementedError


def everything(run):
    tensors = {**run.module.state_dict(), **{f"average.{k}": v for k, v in run.average.state_dict().items()}}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{slot}": value for slot, value in slots.items()}
    return tensors


def assert_identical(resumed, straight):
    assert resumed.step == straight.step
    found, expected = everything(resumed), everything(straight)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def without_clock(path):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    budget = loop.Budget(steps=30)
    straight = loop.train(TinyTask(), tmp_path / "straight", budget, log_every=4)

    class Killed(Exception):
        pass

    def die(run, loss):
        if run.step in {7, 18} - set(deaths):
            deaths.append(run.step)
            raise Killed

    deaths = []
    for _ in range(2):
        with pytest.raises(Killed):
            loop.train(TinyTask(), tmp_path / "cut", budget, log_every=4, checkpoint_seconds=0, on_step=die)
    with (tmp_path / "cut" / loop.LOG).open("a") as log:
        log.write('{"step": 2')
    resumed = loop.train(TinyTask(), tmp_path / "cut", budget, log_every=4)
    assert deaths == [7, 18]
    assert_identical(resumed, straight)
    assert without_clock(tmp_path / "cut" / loop.LOG) == without_clock(tmp_path / "straight" / loop.LOG)


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)  # as in this process: sums are compared to the bit\n"
        "from pathlib import Path\nfrom test_zoo import TinyTask\nfrom fewstep.pipelines.zoo.training import loop\n"
        f"loop.train(TinyTask(), Path({str(tmp_path)!r}), loop.Budget(steps=10**9), checkpoint_seconds=0)\n"
    )
    process = subprocess.Popen([sys.executable, script])
    deadline = time.monotonic() + 50
    while not (tmp_path / loop.CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = state.initial_state(TinyTask())
    saved.restore(tmp_path / loop.CHECKPOINT, TinyTask.settings)
    target = loop.Budget(steps=10**9)
    straight = state.initial_state(TinyTask())
    for step in range(saved.step):
        generator = torch.Generator().manual_seed(step)
        loop._update(TinyTask(), straight, TinyTask.settings, target.progress(step, 0), generator)
        straight.step += 1
    assert saved.step > 0
    assert_identical(saved, straight)


def test_other_settings_do_not_continue_a_run(tmp_path):
    loop.train(TinyTask(), tmp_path, loop.Budget(steps=1))
    changed = TinyTask()
    changed.settings = task.Settings(batch_size=8)
    with pytest.raises(ArtifactError, match=r"batch_size: 4 -> 8.*--restart"):
        loop.train(changed, tmp_path, loop.Budget(steps=2))


def test_a_budget_needs_a_limit():
    with pytest.raises(FewstepError, match="steps=None and minutes=None"):
        loop.Budget()


def test_the_learning_rate_ends_at_zero_whatever_the_clock():
    settings = task.Settings(warmup_steps=10)
    assert loop._schedule(settings, 0, 0.0) == pytest.approx(0.1)
    assert loop._schedule(settings, 500, 0.5) == pytest.approx(0.5)
    assert loop._schedule(settings, 1000, 1.0) == pytest.approx(0.0)
    assert loop.Budget(steps=100, minutes=1).progress(20, 30.0) == pytest.approx(0.5)


def test_an_epoch_sees_every_image_once():
    seen = torch.cat([loop.batch_indices(103, 10, step, seed=0) for step in range(10)])
    assert len(seen.unique()) == 100
    assert not torch.equal(seen[:10], loop.batch_indices(103, 10, 10, seed=0))
