"""Several metrics in one pass: the same numbers as one by one, each net once a batch, recipes that refuse each other."""

import math

import pytest
import torch
from torch import nn

from fewstep import eval as evaluation
from fewstep.eval import (
    ClipScore,
    Cmmd,
    FeatureNet,
    FeatureSet,
    Fid,
    FidInfinity,
    InceptionScore,
    Kid,
    Moments,
    Prdc,
    Score,
    Sfid,
    SlicedWasserstein,
    clip_score,
    feature_net,
    measure_images,
)
from fewstep.eval.distribution.feature_cache import FeatureCache
from fewstep.eval.metrics import make_metrics, measure, metric_names
from tests.eval_fixtures import PROMPTS, random_images, tiny_clip

EPS = torch.finfo(torch.float64).eps
IMAGES, REFERENCE = random_images(60, seed=1), random_images(50, seed=2) // 2


class Pixels(nn.Module):
    """16 pixels of an image: exact, so that how images are batched cannot show. Counts its batches."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor(start))
        self.seen: list[int] = []
        self.map = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        maps = self.map(images[:, :, int(self.start) :: 8, ::8])
        return maps[:, 0].flatten(1)


def pixels(start: int = 0) -> FeatureNet:
    module = Pixels(start)
    return FeatureNet(f"pixels{start}", module, f"{start}" * 64, logits=lambda f: 9 * f, spatial=module.map)


def all_metrics(net: FeatureNet, suffix: str = "") -> list:
    """One of each; the Fréchet ones stream moments, the others keep features."""
    return [
        Fid(REFERENCE, net, name=f"fid{suffix}"),
        Sfid(REFERENCE, net, name=f"sfid{suffix}"),
        FidInfinity(REFERENCE, net, name=f"fid_inf{suffix}"),
        Kid(REFERENCE, net, subsets=5, name=f"kid{suffix}"),
        Kid(REFERENCE, net, subsets=None, name=f"kid_all{suffix}"),
        Cmmd(REFERENCE, net, name=f"cmmd{suffix}"),
        SlicedWasserstein(REFERENCE, net, projections=20, name=f"sliced_wasserstein{suffix}"),
        InceptionScore(net, splits=3, name=f"inception_score{suffix}"),
        *Prdc(REFERENCE, net, name=f"prdc{suffix}"),
    ]


def streamed(metrics, size: int) -> dict[str, Score]:
    return measure(metrics, ((batch, ()) for batch in IMAGES.split(size))).scores


def frechet_tolerance() -> float:
    """Moments of n samples in another order differ by about n eps; so do, relative to the traces, the distances of
    well-conditioned covariances, a few times over."""
    x, y = (pixels()(images) for images in (IMAGES, REFERENCE))
    return 10 * len(IMAGES) * EPS * float(torch.cov(x.T).trace() + torch.cov(y.T).trace())


def test_how_images_are_batched_does_not_show():
    """Bitwise where features are kept; within rounding where moments are streamed."""
    net = pixels()
    metrics = all_metrics(net)
    whole = streamed(metrics, 60)
    for size in (1, 7, 32):
        cut = streamed(metrics, size)
        for name, score in whole.items():
            if name in ("fid", "sfid"):
                assert cut[name].value == pytest.approx(score.value, abs=frechet_tolerance())
                assert cut[name].recipe == score.recipe
            else:
                assert cut[name] == score


def test_several_nets_in_one_pass_are_as_one_by_one():
    nets = pixels(0), pixels(3)
    together = streamed([m for net in nets for m in all_metrics(net, f":{net.name}")], 16)
    for net in nets:
        for metric in all_metrics(net, f":{net.name}"):
            alone = metric.start()
            for batch in IMAGES.split(16):
                alone.update(batch, ())
            assert together[metric.name] == alone.score()
    assert len(together) == 24


def test_a_net_runs_once_a_batch_however_many_metrics_use_it():
    net = pixels()
    metrics = all_metrics(net)
    net.module.seen.clear()
    streamed(metrics, 25)
    assert net.module.seen == [25, 25, 10]


def test_the_reference_is_read_once_for_all_metrics(monkeypatch):
    from fewstep.eval.distribution import nets

    net = pixels()
    monkeypatch.setitem(nets.NETS, "pixels", lambda where: net)
    names = ["fid:pixels", "sfid:pixels", "kid:pixels", "prdc:pixels", "inception_score:pixels"]
    images, reference = (iter(images.split(20)) for images in (IMAGES, REFERENCE))
    found = measure_images(images, names, reference, batch_size=20)
    assert net.module.seen == [20, 20, 10, 20, 20, 20]
    assert list(found.scores) == [
        *("fid:pixels", "sfid:pixels", "kid:pixels"),
        *("precision:pixels", "recall:pixels", "density:pixels", "coverage:pixels", "inception_score:pixels"),
    ]
    assert found.scores["kid:pixels"] == evaluation.kid(IMAGES, REFERENCE, net)
    assert found.scores["coverage:pixels"] == evaluation.prdc(IMAGES, REFERENCE, net)["coverage"]
    assert found.warnings == ()


def test_statistics_are_references_too(tmp_path):
    net = pixels()
    features = evaluation.image_features(REFERENCE, net)
    features.save(tmp_path / "reference")
    again = FeatureSet.load(tmp_path / "reference")
    assert torch.equal(again.values, features.values)
    assert again.recipe == features.recipe
    assert again.fingerprint == features.fingerprint
    assert evaluation.kid(IMAGES, again, net) == evaluation.kid(IMAGES, REFERENCE, net)
    whole = evaluation.fid(IMAGES, again, net).value
    assert whole == pytest.approx(evaluation.fid(IMAGES, REFERENCE, net, 10).value, abs=frechet_tolerance())
    with pytest.raises(ValueError, match=r"give images or a FeatureSet as reference, not Moments"):
        evaluation.kid(IMAGES, Moments.of(features.values), net)
    with pytest.raises(ValueError, match=r"the reference was made with pixels0 .* the images would be with pixels3"):
        evaluation.kid(IMAGES, again, pixels(3))
    with pytest.raises(ValueError, match="spatial"):
        evaluation.sfid(IMAGES, again, net)


def test_the_references_by_name_that_need_images_are_the_data_set():
    from fewstep.pipelines.zoo.training import data

    if not (data.folder() / "t10k-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not installed")
    net = pixels()
    images = data.load("test").images[:300]
    score = evaluation.kid(images, features=net, subsets=3, subset_size=100)
    assert sum(net.module.seen) == 10_000 + 300
    assert abs(score.value) < 5 * score.spread  # the same law, in fact some of the same images


class TestCache:
    def test_batches_seen_before_are_not_run_again(self, tmp_path):
        net = pixels()
        metrics = all_metrics(net)
        first = measure(metrics, ((b, ()) for b in IMAGES.split(25)), cache=tmp_path)
        net.module.seen.clear()
        again = measure(metrics, ((b, ()) for b in IMAGES.split(25)), cache=tmp_path)
        assert net.module.seen == []
        assert again == first
        assert first.scores == streamed(metrics, 25)

    def test_other_images_nets_or_outputs_are(self, tmp_path):
        net, cache = pixels(), FeatureCache(tmp_path)
        cache.outputs(net, IMAGES, ("features",))
        cache.outputs(net, IMAGES.flip(0), ("features",))
        other = pixels(3)
        assert torch.equal(cache.outputs(other, IMAGES, ("features",))["features"], other.outputs(IMAGES)["features"])
        assert len(net.module.seen) == 2
        cache.outputs(net, IMAGES, ("logits", "features"))
        assert len(net.module.seen) == 3
        cache.outputs(net, IMAGES, ("features",))
        cache.outputs(net, IMAGES, ("logits",))
        assert len(net.module.seen) == 3
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3

    def test_damaged_files_are_made_again(self, tmp_path):
        net, cache = pixels(), FeatureCache(tmp_path)
        expected = cache.outputs(net, IMAGES, ("features",))["features"]
        (path,) = tmp_path.rglob("*.safetensors")
        whole = path.read_bytes()
        for damaged in (b"", whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            assert torch.equal(cache.outputs(net, IMAGES, ("features",))["features"], expected)
            assert path.read_bytes() == whole
        assert len(net.module.seen) == 4


def test_recipes_refuse_each_other():
    net = pixels()
    first = evaluation.fid(IMAGES, REFERENCE, net)
    assert first.difference(evaluation.fid(IMAGES.flip(0), REFERENCE, net)) == pytest.approx(0, abs=frechet_tolerance())
    others = [
        evaluation.fid(IMAGES[:50], REFERENCE, net),
        evaluation.fid(IMAGES, REFERENCE[:40], net),
        evaluation.fid(IMAGES, REFERENCE, pixels(3)),
        evaluation.sfid(IMAGES, REFERENCE, net),
        evaluation.fid_infinity(IMAGES, REFERENCE, net),
        evaluation.kid(IMAGES, REFERENCE, net, subsets=2),
    ]
    assert len({score.recipe for score in others}) == len(others)
    for other in others:
        with pytest.raises(ValueError, match=r"fid\[pixels0, .*\] cannot be compared with "):
            first.difference(other)


def test_a_recipe_says_how_images_were_resized():
    net = pixels()
    resized = FeatureNet(net.name, net.module, net.sha256, "resize=bicubic-aa-224", spatial=net.spatial)
    score = evaluation.fid(IMAGES, REFERENCE, resized)
    assert score.recipe.startswith("fid[pixels0, resize=bicubic-aa-224, u8=round, N=60, ref=sha256:")
    with pytest.raises(ValueError, match="resize=bicubic-aa-224"):
        evaluation.fid(IMAGES, evaluation.image_moments(REFERENCE, net), resized)


def test_spread_is_shown():
    assert str(Score(1.234, "kid[x]", 5, spread=0.0567)) == "1.234 ± 0.057 kid[x]"
    assert str(Score(1.234, "fid[x]", 5)) == "1.234 fid[x]"


def test_metrics_by_name():
    metrics = make_metrics(["fid", "accuracy", "clip_score", "inception_score"])
    assert [metric.name for metric in metrics] == ["fid", "accuracy", "clip_score", "inception_score"]
    assert len({metric.identity for metric in metrics}) == 4
    assert set(metric_names()) > {"fid", "fid_inf", "sfid", "kid", "cmmd", "prdc", "sliced_wasserstein", "fd_dinov2"}
    both = make_metrics([Fid(REFERENCE, pixels()), Prdc(REFERENCE, pixels())])
    assert [metric.name for metric in both] == ["fid", "precision", "recall", "density", "coverage"]


def test_identities_tell_settings_apart():
    net = pixels()
    kinds = [
        *all_metrics(net),
        *all_metrics(pixels(3)),
        Kid(REFERENCE, net, subsets=6),
        Kid(REFERENCE, net, subsets=5, seed=1),
        Kid(REFERENCE[:40], net, subsets=5),
        Cmmd(REFERENCE, net, sigma=5),
        InceptionScore(net, splits=4),
        *Prdc(REFERENCE, net, k=2),
    ]
    assert len({kind.identity for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["fud"], "unknown metric 'fud'; did you mean 'fid'"),
        (["fid:nonet"], "unknown feature net 'nonet'"),
        (["accuracy:fashion"], "unknown metric 'accuracy:fashion'"),
        (["fid", "fid"], "metric 'fid' is given twice"),
    ],
)
def test_a_metric_that_cannot_be_is_one_clear_error(metrics, message):
    with pytest.raises(ValueError, match=message):
        make_metrics(metrics)


def test_metrics_that_need_prompts_share_the_pass():
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(12)]
    clip = evaluation.ClipScore(tiny_clip())
    found = measure_images(IMAGES[:12], [clip, Kid(REFERENCE, pixels())], prompts=prompts, batch_size=5)
    assert found.scores["clip_score"].value == pytest.approx(
        evaluation.clip_score(IMAGES[:12], prompts, tiny_clip()).value
    )
    assert math.isfinite(found.scores["kid"].value)
    with pytest.raises(ValueError, match="11 prompts for 12 images"):
        measure_images(IMAGES[:12], [Kid(REFERENCE, pixels())], prompts=prompts[:11])


def test_features_that_are_not_finite_are_refused():
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0, :4] / 0

    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluation.kid(IMAGES, REFERENCE, Broken())
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluation.fid(IMAGES, REFERENCE, Broken())


def test_accuracy_uses_the_logits_of_the_pass_that_other_metrics_need_too():
    """One run of the net a batch; the values are those of the stream that runs it alone."""
    metrics = make_metrics(["fid", "accuracy", InceptionScore(splits=2)])
    images, prompts = random_images(6), ["a dress", "a bag", "a shirt"] * 2
    net = feature_net("fashion")
    calls = []
    handle = net.module.register_forward_hook(lambda *_: calls.append(1))
    scores = measure(metrics, [(images[:4], prompts[:4]), (images[4:], prompts[4:])]).scores
    handle.remove()
    assert len(calls) == 2
    stream = metrics[1].start()
    stream.update(images, prompts)
    alone = stream.score()
    assert scores["accuracy"] == alone
    assert scores["accuracy"].per_sample.tolist() == alone.per_sample.tolist()
    with pytest.raises(ValueError, match="0 prompts for 6 images"):
        measure(metrics[1:2], [(images, [])])


def test_both_definitions_of_the_clip_score_in_one_pass():
    clip = tiny_clip()
    metrics = make_metrics([ClipScore(clip), ClipScore(clip, "hessel", name="clip_score:hessel")])
    images, prompts = random_images(3), ["a dress", "a bag", "a shirt"]
    scores = measure(metrics, [(images, prompts)]).scores
    assert [score.value for score in scores.values()] == [
        clip_score(images, prompts, clip, definition=name).value for name in ("torchmetrics", "hessel")
    ]
    assert metrics[0].identity != metrics[1].identity
    with pytest.raises(ValueError, match="unknown definition of the CLIP score 'x'"):
        ClipScore(clip, "x")
