"""Fidelity image by image: formulas by hand, torchmetrics where it agrees and where it does not, worst cases by seed."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fewstep.eval import FeatureDistance, Lpips, Samples, Score, check_reference, fidelity
from fewstep.eval.pairs.perceptual import layer_distance
from fewstep.eval.pairs.pixels import psnr, ssim
from tests.eval_fixtures import random_images, tiny_features

EPS = torch.finfo(torch.float64).eps


def noisy(images: torch.Tensor, amplitudes, seed: int = 1) -> torch.Tensor:
    """Each image with uniform integer noise of up to its amplitude, clipped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(images.shape, generator=generator) * 2 - 1
    scaled = (noise * torch.tensor(amplitudes, dtype=torch.float32).reshape(-1, 1, 1, 1)).round()
    return (images.float() + scaled).clamp(0, 255).to(torch.uint8)


# --- PSNR ---------------------------------------------------------------------------------------------------------------
# torchmetrics holds the data range and the base in float32: 10 (2 ln 255 + ...) / ln 10 is off by a few float32 roundings.
PSNR_TOLERANCE = 8 * torch.finfo(torch.float32).eps * 60


def test_psnr_of_an_image_is_that_of_its_own_error():
    reference = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    images = reference.clone()
    images[0] += 255
    images[1] += 51  # a fifth of the range: 20 log10(5) dB
    values = psnr(images, reference)
    assert values[:2] == pytest.approx([0, 20 * math.log10(5)], abs=PSNR_TOLERANCE)
    assert values[2] == math.inf


def test_pooled_psnr_is_below_the_mean_of_psnr():
    """Why the errors of a batch are not pooled: one bad image hides the good ones (Jensen: -log is convex)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    reference = random_images(6)
    images = noisy(reference, [1, 1, 2, 2, 4, 100])
    values = psnr(images, reference)
    pooled = float(peak_signal_noise_ratio(images.float(), reference.float(), data_range=255.0))
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3)).numpy()
    assert values == pytest.approx(10 * np.log10(255**2 / mse), abs=PSNR_TOLERANCE)
    assert pooled == pytest.approx(10 * math.log10(255**2 / mse.mean()), abs=PSNR_TOLERANCE)
    assert pooled < values.mean() - 5


# A variance is E x^2 - (E x)^2 over 121 products: off by 121 eps 255^2 at most, beside c2, SSIM's least denominator.
SSIM_TOLERANCE = 121 * EPS * 255**2 / (0.03 * 255) ** 2


# --- SSIM ---------------------------------------------------------------------------------------------------------------
def ssim_by_hand(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Wang et al.: every 11 x 11 window inside the image, moments by weighted sums around the window's own mean."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = (line[:, None] * line / (line[:, None] * line).sum()).flatten()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for x, y in zip(a.double(), b.double(), strict=True):
        maps = []
        for channel in range(x.shape[0]):
            u, v = (z[channel].unfold(0, 11, 1).unfold(1, 11, 1).reshape(-1, 121) for z in (x, y))
            mu, mv = u @ weights, v @ weights
            du, dv = u - mu[:, None], v - mv[:, None]
            suu, svv, suv = (du * du) @ weights, (dv * dv) @ weights, (du * dv) @ weights
            maps.append((2 * mu * mv + c1) * (2 * suv + c2) / ((mu**2 + mv**2 + c1) * (suu + svv + c2)))
        values.append(float(torch.stack(maps).mean()))
    return values


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_the_paper(channels):
    reference = random_images(4, channels=channels)
    images = noisy(reference, [5, 20, 60, 200])
    assert ssim(images, reference) == pytest.approx(ssim_by_hand(images, reference), abs=SSIM_TOLERANCE)


def test_torchmetrics_own_mean_counts_mirrored_borders():
    """An error that only windows on the border see: over half of a 32 x 32 image in torchmetrics' mean."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    reference = random_images(1)
    images = reference.clone()
    images[:, :, 0] = 255 - images[:, :, 0]
    theirs = structural_similarity_index_measure(images.double(), reference.double(), data_range=255.0)
    assert ssim(images, reference)[0] > float(theirs) + 0.01
    inside = (32 - 10) ** 2 / 32**2
    assert inside < 0.5


def test_torchmetrics_default_range_depends_on_the_batch():
    """The same pair beside a brighter one: its value moves there, ours does not."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def theirs(a, b):
        return structural_similarity_index_measure(a.double(), b.double(), reduction="none")[0]

    dark = random_images(1) // 8
    pair, beside = (noisy(dark, [4]), dark), (random_images(1, seed=5), random_images(1, seed=6))
    both = tuple(torch.cat(images) for images in zip(pair, beside, strict=True))
    assert abs(theirs(*pair) - theirs(*both)) > 1e-3
    # A convolution of another batch may sum in another order.
    assert ssim(*both)[0] == pytest.approx(ssim(*pair)[0], abs=SSIM_TOLERANCE)


def test_an_image_is_like_itself():
    flat = torch.full((1, 1, 16, 16), 3, dtype=torch.uint8)
    images = torch.cat([flat, random_images(2)[..., :16, :16], flat * 0])
    # Variances and covariances are the same sums, so both factors differ from 1 by rounding alone.
    assert ssim(images, images) == pytest.approx([1.0] * 4, abs=SSIM_TOLERANCE)
    assert psnr(images, images).tolist() == [math.inf] * 4


def test_float32_is_not_enough_for_ssim():
    """A flat image against itself: float32 rounds E x^2 - (E x)^2 by up to eps 255^2, 1e-4 of the least denominator."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    flat = torch.arange(200, 256, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    theirs = structural_similarity_index_measure(flat.float(), flat.float(), data_range=255.0, reduction="none")
    assert (theirs - 1).abs().max() > 1e-6
    assert np.abs(ssim(flat, flat) - 1).max() < SSIM_TOLERANCE


def test_small_images_have_no_window():
    with pytest.raises(ValueError, match="at least 11 x 11; got 8 x 8"):
        fidelity(random_images(1)[..., :8, :8], random_images(1)[..., :8, :8])


# --- LPIPS and its formula ----------------------------------------------------------------------------------------------
@pytest.fixture
def lpips_alex(monkeypatch):
    """torchmetrics' LPIPS with its own learned channel weights over an AlexNet of random ones."""
    from torch import nn
    from torchmetrics.functional.image import lpips

    def alexnet(net, pretrained):
        layers = [
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers)

    monkeypatch.setattr(lpips, "_get_tv_model_features", alexnet)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lpips._NoTrainLpips(net="alex")


def test_the_formula_is_that_of_lpips(lpips_alex):
    """With LPIPS' channel weights on LPIPS' layers it gives LPIPS."""
    a, b = (random_images(3, seed=seed, channels=3).float() / 127.5 - 1 for seed in (0, 1))
    with torch.no_grad():
        layers = [lpips_alex.net(lpips_alex.scaling_layer(x)) for x in (a, b)]
        weights = [lin.model[-1].weight.flatten() for lin in lpips_alex.lins]
        ours, theirs = layer_distance(*layers, weights), lpips_alex(a, b).flatten()
    # Sums of at most 384 float32 products, in another order.
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=384 * torch.finfo(torch.float32).eps)
    assert (ours > 0).all()


def test_unweighted_it_is_twice_one_minus_the_cosine():
    a, b = (torch.randn(4, 7, 5, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    expected = 2 * (1 - F.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))
    # The eps of 1e-8 under the root moves a unit vector of squared length >= 0.05 by at most 1e-7.
    assert layer_distance([a], [b]).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert layer_distance([a, a], [b, b]).tolist() == pytest.approx((2 * expected).tolist(), abs=2e-5)


def test_lpips_of_a_module(lpips_alex):
    """The caller's network, grey images on three channels, one value a pair also for a single pair, 0 for equal ones."""
    reference = random_images(3)
    images = noisy(reference, [0, 20, 120])
    result = fidelity(images, reference, lpips=lpips_alex)
    with torch.no_grad():
        a, b = (x.expand(-1, 3, -1, -1).float() / 255 for x in (images, reference))
        expected = lpips_alex(a, b, normalize=True).flatten().tolist()
    # 2 (x / 255) - 1 and x / 127.5 - 1 round differently; a network of 5 layers carries it on.
    assert result["lpips"].values == pytest.approx(expected, abs=1e-4 * max(expected))
    assert result["lpips"].values[0] == 0
    assert fidelity(images[1:2], reference[1:2], lpips=lpips_alex)["lpips"].values.shape == (1,)
    assert result["lpips"].recipe.startswith("lpips[_NoTrainLpips:")


def test_lpips_of_torchmetrics_metric_is_not_pooled(lpips_alex, monkeypatch):
    from torchmetrics.image import lpip

    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)  # its backbone is lpips_alex' stand-in
    metric = lpip.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    reference = random_images(2, channels=3)
    images = noisy(reference, [10, 100])
    values = Lpips(metric)(images, reference)
    assert values.shape == (2,)
    # The mean of float32 values of x / 255 instead of x / 127.5 - 1, see above.
    pooled = float(metric(images.float() / 255, reference.float() / 255))
    assert pooled == pytest.approx(float(values.mean()), rel=1e-4)


def test_lpips_by_name_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"LPIPS \(vgg\) needs (torchvision|the weights)"):
        fidelity(random_images(1), random_images(1), lpips="vgg")
    with pytest.raises(ValueError, match="unknown LPIPS network 'alexnet'; did you mean 'alex'"):
        Lpips("alexnet")
    with pytest.raises(ValueError, match=r"gave .* for 2 pairs"):
        Lpips(Constant())(random_images(2), random_images(2))


class Constant(torch.nn.Module):
    def forward(self, a, b):
        return torch.zeros(())


def test_distance_in_the_layers_of_a_net():
    """By hand on a tiny net: the layers' outputs through its own submodules."""
    net = tiny_features()
    reference = random_images(3)
    images = noisy(reference, [0, 30, 200])
    distance = FeatureDistance(net, layers=("0", "1"))
    with torch.no_grad():
        a, b = ([net[0](x / 255), net[1](net[0](x / 255))] for x in (images.float(), reference.float()))
        expected = layer_distance(a, b)
    values = distance(images, reference)
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert values[0] == 0
    assert 0 < values[1] < values[2]
    result = fidelity(images, reference, features=distance)["feature_distance"]
    assert result.values.tolist() == values.tolist()
    assert result.recipe.startswith("feature_distance[Sequential:")
    assert ", 0+1, u8=round" in result.recipe
    assert not net[0]._forward_hooks


@pytest.mark.parametrize(
    ("layers", "message"), [((), "needs layers"), (("stem",), "unknown layer of Sequential"), (("3",), None)]
)
def test_layers_must_be_there(layers, message):
    if message is None:
        assert FeatureDistance(tiny_features(), layers)(random_images(2), random_images(2)).tolist() == [0, 0]
    else:
        with pytest.raises(ValueError, match=message):
            FeatureDistance(tiny_features(), layers)


def test_the_embedded_net_has_layers():
    reference = random_images(2)
    near, far = (fidelity(noisy(reference, [a, a]), reference, features="fashion") for a in (5, 100))
    assert (near["feature_distance"].values < far["feature_distance"].values).all()
    assert "fashion, stem+stages.0" in near["feature_distance"].recipe
    assert FeatureDistance(layers=("stages.0", "stages.3")).title == "fashion, stages.{0+3}"


# --- the result ---------------------------------------------------------------------------------------------------------
SEEDS = (11, 12, 13, 14, 15, 16)


@pytest.fixture(scope="module")
def result():
    reference = random_images(6)
    latents = torch.zeros(6, 4, 2, 2)
    moved = latents + torch.tensor([0.0, 0.5, 4.0, 1.0, 2.0, 8.0]).reshape(6, 1, 1, 1)
    return fidelity(noisy(reference, [0, 10, 80, 20, 40, 160]), reference, seeds=SEEDS, latents=(moved, latents))


def test_worst_cases_are_named_by_seed(result):
    assert list(result.worst("latent_rmse", 3).items()) == [(16, 8.0), (13, 4.0), (15, 2.0)]
    for metric in ("psnr", "ssim"):
        assert list(result.worst(metric)) == [16, 13, 15, 14, 12]


def test_summaries_hold_the_infinite_psnr_of_an_identical_image(result):
    values = result["psnr"]
    assert values.values[0] == values.mean == values.quantile(1.0) == math.inf
    assert values.quantile(0.0) == values.values[5]
    assert values.median == sorted(values.values)[2:4][0] / 2 + sorted(values.values)[3] / 2
    # At least half of six values are at most the third.
    assert values.quantile(0.5) == sorted(values.values)[2]


def test_as_records_and_as_json(result):
    table = result.table()
    assert [record["seed"] for record in table] == list(SEEDS)
    assert set(table[0]) == {"seed", "latent_rmse", "psnr", "ssim"}
    body = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert body["metrics"]["psnr"]["values"][0] == body["metrics"]["psnr"]["mean"] == "inf"
    assert body["metrics"]["latent_rmse"]["values"] == [0.0, 0.5, 4.0, 1.0, 2.0, 8.0]
    assert body["metrics"]["latent_rmse"]["worst"]["16"] == 8.0


def test_it_prints_a_table(result):
    text = str(result)
    assert text == repr(result)
    assert text.startswith("6 images against the same seeds' reference\nmetric")
    assert "16 (8), 13 (4), 15 (2)" in text
    assert len(text.splitlines()) == 5


def test_the_result_is_frozen(result):
    with pytest.raises(ValueError, match="read-only"):
        result["psnr"].values[0] = 1
    with pytest.raises(ValueError, match="unknown metric of this fidelity 'pnsr'; did you mean 'psnr'"):
        result["pnsr"]


def test_batches_do_not_matter():
    """However either side comes, and in whatever passes."""
    reference = random_images(7)
    images = noisy(reference, range(7))
    whole = fidelity(images, reference)
    cut = fidelity(images.split(3), (batch.permute(0, 2, 3, 1).numpy() for batch in reference.split(2)), batch_size=4)
    assert whole["psnr"].values.tolist() == cut["psnr"].values.tolist()
    assert cut["ssim"].values == pytest.approx(whole["ssim"].values, abs=1e-9)
    assert whole["psnr"].recipe == cut["psnr"].recipe
    assert whole["psnr"].recipe != fidelity(images, random_images(7, seed=3))["psnr"].recipe


def test_large_images_come_in_small_batches(monkeypatch):
    from fewstep.eval.pairs import same_seed

    reference = random_images(5)
    whole = fidelity(noisy(reference, [9] * 5), reference)
    monkeypatch.setattr(same_seed, "PIXELS", 2 * 32 * 32)
    sizes = []
    monkeypatch.setattr(same_seed, "psnr", lambda a, b: sizes.append(len(a)) or psnr(a, b))
    assert fidelity(noisy(reference, [9] * 5), reference)["psnr"].values.tolist() == whole["psnr"].values.tolist()
    assert sizes == [2, 2, 1]


def test_activations_in_place_do_not_reach_what_was_kept():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1), Flat()
    )
    distance = FeatureDistance(net, layers=("0",))
    a, b = random_images(2), random_images(2, seed=1)
    with torch.no_grad():
        expected = layer_distance([net[0](a / 255)], [net[0](b / 255)])
    assert distance(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


class Flat(torch.nn.Flatten):
    """(n, c, 1, 1) to (n, c)."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": random_images(2)}, "fewer images than references"),
        ({"images": random_images(4)}, "more images than references"),
        ({"images": random_images(3, channels=3)}, r"\(3, 32, 32\), references \(1, 32, 32\)"),
        ({"images": [], "reference": []}, "no images"),
        ({"seeds": [1, 2]}, "2 seeds for 3 images"),
        ({"seeds": [1, 2, 2]}, "3 values for 2 ids"),
        ({"latents": (torch.zeros(2, 4), torch.zeros(2, 4))}, "2 latents for 3 images"),
        ({"lpips": 3}, "lpips is a int"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        fidelity(**({"images": random_images(3), "reference": random_images(3)} | arguments))


def test_single_values_of_a_score():
    samples = Samples.of(Score(2.0, "clip_score[a]", 3, np.array([1.0, 2.0, 3.0])), ids=(7, 8, 9))
    assert samples.worst(1) == {7: 1.0}
    with pytest.raises(ValueError, match="no values of single images"):
        Samples.of(Score(2.0, "fid[a]", 3))
    with pytest.raises(ValueError, match="NaN at sample 8"):
        Samples(np.array([1.0, math.nan]), (7, 8), "psnr[dB]")
    with pytest.raises(ValueError, match="not known whether"):
        Samples(np.array([1.0]), (7,), "loss[x]").worst()


# -- the reference -----------------------------------------------------------------------------------------------------


def distances(*values, metric="latent_rmse", ids=None):
    return Samples(np.array(values), tuple(ids or range(len(values))), f"{metric}[N={len(values)}]")


def test_a_reference_is_believed_where_the_effect_is_ten_times_its_error():
    assert check_reference(distances(0.25, 0.75), distances(8.0, 4.0)) == 12.0
    assert check_reference(distances(0.5, 0.5), distances(2.0, 2.0), enough=4) == 4.0
    assert check_reference(distances(0.0), distances(1.0)) == math.inf


@pytest.mark.parametrize(
    ("error", "effect", "said"),
    [
        (distances(0.5), distances(4.0), "4 is only 8 times the reference's own error of 0.5; it takes 10 times"),
        (distances(0.0), distances(0.0, ids=[1]), "other seeds"),
        (distances(1.0), distances(1.0, metric="lpips"), "latent_rmse and lpips are given"),
        (distances(1.0, metric="psnr"), distances(1.0, metric="psnr"), "give one distance"),
    ],
)
def test_a_reference_that_is_not_is_refused(error, effect, said):
    with pytest.raises(ValueError, match=said):
        check_reference(error, effect)
