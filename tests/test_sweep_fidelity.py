"""The reference arm of a sweep: which cell is whose reference, and what is told of the images against it."""

import csv
import json
import math

import pytest
import torch

from fewstep.eval import CallCounter, Fid, Results, Sweep, best, capture_latents, compare_sweeps, fidelity, report
from fewstep.eval.drawing.batch import draw
from fewstep.eval.sweeps.cell import Cell
from fewstep.eval.sweeps.reference_arm import make_arm
from fewstep.eval.sweeps.store import opened
from fewstep.eval.sweeps.transforms import Transform
from tests.eval_fixtures import PROMPTS, random_images, tiny_features, tiny_pipeline, tiny_sweep

DDIM = "diffusers:DDIMScheduler"
NAMES = ("latent_rmse", "psnr", "ssim")


def scaled(name, factor) -> Transform:
    """Multiplies what the network says."""

    def apply(pipe):
        pipe.scaled = pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * factor,))

    return Transform.pair(name, apply, lambda pipe: pipe.scaled.remove(), {"factor": factor})


SLIGHT, STRONG = scaled("slight", 0.95), scaled("strong", 0.5)


def request(**changes):
    asked = {"schedulers": (DDIM,), "steps": (2, 3), "samples": 4, "metrics": (), "caches": ("none", SLIGHT, STRONG)}
    return tiny_sweep(**asked | {"fidelity": "same"} | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("fidelity")
    return out, request().run(out, progress=False)


def by_name(results):
    return {(row.cache, row.steps): row for row in results.rows}


def test_every_image_is_held_against_its_own_reference(swept):
    """The values are those of ``fidelity`` on images and latents drawn by hand."""
    out, results = swept
    assert results.metrics == NAMES
    pipe = tiny_pipeline()

    def drawn():
        images, latents = [], []
        for seeds in ((0, 1), (2, 3)):
            pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            with capture_latents(pipe) as captured:
                prompts = [PROMPTS[seed] for seed in seeds]
                images.append(draw(pipe, prompts, seeds, steps=3, guidance=3.0))
            latents.append(captured.latents(2))
        return torch.cat(images), torch.cat(latents)

    plain = drawn()
    with STRONG.applied("cache", pipe):
        changed = drawn()
    expected = fidelity(changed[0], plain[0], latents=(changed[1], plain[1]))
    row = by_name(results)["strong", 3]
    records = opened(out / row.folder).samples(range(4))
    for name in NAMES:
        values = expected[name].values
        assert [record[name] for record in records] == values.tolist()
        assert row.value(name) == values.mean()
        worst = values.max() if name == "latent_rmse" else values.min()
        assert row.value(f"{name}_worst") == worst
        assert next(iter(row.worst(name))) == values.tolist().index(worst)
        assert row.metrics[name]["recipe"].endswith("N=4, ref=same]")


def test_a_reference_is_not_held_against_itself(swept):
    cells = by_name(swept[1])
    for steps in (2, 3):
        assert cells["none", steps].metrics == {}
        assert cells["strong", steps].value("latent_rmse") > cells["slight", steps].value("latent_rmse") > 0
        assert cells["strong", steps].value("psnr") < cells["slight", steps].value("psnr")


def test_tables_pages_and_choices_know_the_worst_image(swept):
    out, results = swept
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["psnr_worst"] for row in rows] == [
        "" if (value := row.value("psnr_worst")) is None else repr(value) for row in results.rows
    ]
    strong = by_name(results)["strong", 2]
    found = best(results, quality=[f"latent_rmse_worst<={strong.value('latent_rmse_worst')}"], budget=["steps<=2"])
    assert found.met == 2
    nearer = best(results, budget=["steps<=2"], metric="ssim_worst").row
    assert nearer.cache == "slight"
    assert f"worst {strong.value('psnr_worst'):.2f}, seed {next(iter(strong.worst('psnr')))}" in report(out).read_text()
    assert json.loads((out / "manifest.json").read_text())["sweep"]["fidelity"]["reference"] == "same"


def test_two_caches_are_compared_image_by_image(swept):
    out, results = swept
    cells = by_name(results)
    (pair,) = compare_sweeps(out / cells["slight", 2].folder, out / cells["strong", 2].folder)
    verdicts = {change.metric: change.comparison.verdict for change in pair.metrics if change.comparison}
    assert verdicts["latent_rmse"] == "worse"
    assert Results.load(out) == results


def test_a_finished_one_draws_and_measures_nothing_again_and_an_earlier_one_gets_its_latents(tmp_path):
    sweep = request(steps=(2,), caches=("none", SLIGHT), fidelity=None)
    plain = sweep.run(tmp_path, progress=False)
    images = {row.cache: opened(tmp_path / row.folder).peek(0, 1) for row in plain.rows}
    assert all(chunk.latents is None for chunk in images.values())
    with_reference = request(steps=(2,), caches=("none", SLIGHT), model=sweep.model)
    first = with_reference.run(tmp_path, progress=False)
    assert first.rows[1].value("latent_rmse") > 0
    for row in first.rows:
        chunk = opened(tmp_path / row.folder).peek(0, 1)
        assert torch.equal(chunk.images, images[row.cache].images)
        assert chunk.latents.shape == (2, 4, 8, 8)
    with CallCounter(sweep.model) as counter:
        assert with_reference.run(tmp_path, progress=False) == first
    assert counter.calls == 0


def test_a_reference_outside_the_axes_is_a_cell_of_its_own(tmp_path):
    """Heun at 2 steps against DDIM at 4; FID is measured of the reference too. Blocks of seeds have one each."""
    sweep = tiny_sweep(
        schedulers=("diffusers:HeunDiscreteScheduler",),
        steps=(2,),
        samples=2,
        blocks=2,
        metrics=(Fid(random_images(20), tiny_features()),),
        fidelity=f"{DDIM}@4",
    )
    rows = sweep.run(tmp_path, progress=False).rows
    assert [(row.scheduler, row.steps, row.seed) for row in rows] == [
        (DDIM, 4, 0), ("diffusers:HeunDiscreteScheduler", 2, 0), (DDIM, 4, 2), ("diffusers:HeunDiscreteScheduler", 2, 2),
    ]  # fmt: skip
    assert [set(row.metrics) for row in rows] == [{"fid"}, {"fid", *NAMES}] * 2
    merged = best(Results(("fid", *NAMES), 4, rows), quality=["psnr>0"]).row
    assert merged.value("psnr") == pytest.approx((rows[1].value("psnr") + rows[3].value("psnr")) / 2, rel=1e-15)
    assert merged.value("psnr_worst") == min(rows[1].value("psnr_worst"), rows[3].value("psnr_worst"))


def test_where_the_reference_fails_the_rest_is_measured_and_says_so(tmp_path):
    """2000 steps of 1000: the reference cannot be drawn."""
    sweep = request(
        steps=(2,), caches=("none",), fidelity=f"{DDIM}@2000", metrics=(Fid(random_images(20), tiny_features()),)
    )
    bad, row = sweep.run(tmp_path, progress=False).rows
    assert bad.status == "failed"
    assert row.status == "ok"
    assert set(row.metrics) == {"fid"}
    assert f"not held against {DDIM}@2000: that cell has failed" in row.notes


def test_identical_images_have_an_infinite_psnr_that_no_plot_stumbles_over(tmp_path):
    sweep = request(
        steps=(2,), caches=("none", scaled("idle", 1.0)), fidelity={"reference": "same", "features": tiny()}
    )
    row = sweep.run(tmp_path, progress=False).rows[1]
    assert (row.value("latent_rmse"), row.value("psnr"), row.value("ssim"), row.value("feature_distance")) == (
        0, math.inf, pytest.approx(1, abs=1e-12), 0,
    )  # fmt: skip
    assert Results.load(tmp_path).rows[1].value("psnr_worst") == math.inf
    assert ">inf<" in report(tmp_path, plots=True).read_text()


def tiny():
    from fewstep.eval import FeatureDistance

    return FeatureDistance(tiny_features(), layers=("0",))


CELL = Cell("m", "DPMSolver", "karras", 5, 2.0, "X", "Y", 7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("same", Cell("m", "DPMSolver", "karras", 5, 2.0, "none", "none", 7)),
        ("same@50", Cell("m", "DPMSolver", "karras", 50, 2.0, "none", "none", 7)),
        ("DDIM", Cell("m", "DDIM", "default", 5, 2.0, "none", "none", 7)),
        ({"reference": " DDIMScheduler @ 100"}, Cell("m", "DDIM", "default", 100, 2.0, "none", "none", 7)),
    ],
)
def test_the_reference_of_a_cell(given, expected):
    arm = make_arm(given)
    assert arm.of(CELL) == expected
    assert arm.of(expected) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("DDIN@5", "did you mean 'DDIM'"),
        ("DDIM@", "behind the @ give a number of steps"),
        ("DDIM@0", "steps of the reference is 0"),
        ("DDIM@x", "behind the @ give a number of steps"),
        (3, "fidelity is 3"),
        ({"refrence": "same"}, "unknown key in fidelity 'refrence'; did you mean 'reference'"),
        ({"reference": 3}, "the reference of fidelity is 3"),
        ({"lpips": "alexa"}, "unknown LPIPS network 'alexa'"),
        ({"features": "fashon"}, "did you mean 'fashion'"),
    ],
    ids=str,
)
def test_a_reference_that_cannot_be_is_one_clear_error(tmp_path, given, said):
    with pytest.raises(ValueError, match=r".") as error:
        request(fidelity=given).run(tmp_path / "out", progress=False)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_it_stands_in_a_file(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('schedulers = ["DDIM"]\nsteps = [5]\n[fidelity]\nreference = "DDIM@50"\n')
    assert [(cell.scheduler, cell.steps) for cell in Sweep.from_file(path).cells] == [("DDIM", 50), ("DDIM", 5)]
    path.write_text('schedulers = ["DDIM"]\nsteps = [5]\nfidelity = 5\n')
    with pytest.raises(ValueError, match="fidelity is 5; give a text or a table"):
        Sweep.from_file(path)
