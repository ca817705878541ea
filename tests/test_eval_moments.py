"""Streamed moments: any split and any order of merging is one pass, without cancellation; files that are refused."""

import json

import pytest
import torch

from fewstep.eval import Moments

EPS = torch.finfo(torch.float64).eps


def features(count: int = 200, dim: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + 3


def assert_same(a: Moments, b: Moments) -> None:
    # Sums of n terms in another order differ by at most about n eps of the sum of the terms' sizes.
    assert a.count == b.count
    tolerance = a.count * EPS
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance * float(b.mean.abs().max()))
    torch.testing.assert_close(a.m2, b.m2, rtol=tolerance, atol=tolerance * float(b.m2.abs().max()))


def test_covariance_is_that_of_torch():
    x = features()
    moments = Moments.of(x)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    assert torch.equal(moments.covariance, moments.covariance.T)


@pytest.mark.parametrize("sizes", [(1,) * 200, (1, 199), (64, 64, 64, 8), (200,)])
def test_any_split_is_one_pass(sizes: tuple[int, ...]):
    x = features()
    streamed = Moments(5)
    for part in torch.split(x, sizes):
        streamed.update(part)
    streamed.update(x[:0])
    assert_same(streamed, Moments.of(x))


def test_merging_in_any_order_is_one_pass():
    x = features()
    parts = [Moments.of(part) for part in torch.split(x, 37)]
    forward, backward = Moments(5), Moments(5)
    for part in parts:
        forward.merge(part)
    for part in reversed(parts):
        backward.merge(part)
    assert_same(forward, Moments.of(x))
    assert_same(backward, Moments.of(x))


def test_small_spread_on_a_large_mean_does_not_cancel():
    """Mean 5, deviation 0.02, float32: sums of squares in float32 lose the variance, these moments do not."""
    generator = torch.Generator().manual_seed(1)
    x = (5 + 0.02 * torch.randn(50_000, 8, generator=generator)).float()
    exact = torch.cov(x.double().T).trace()
    streamed = Moments(8)
    for part in x.split(500):
        streamed.update(part)
    assert abs(streamed.covariance.trace() / exact - 1) < 50_000 * EPS

    naive = (x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))).trace() / (len(x) - 1)
    assert abs(naive / exact - 1) > 1e-3  # the case is hard enough to tell the two apart


def test_saved_moments_come_back(tmp_path):
    moments = Moments.of(features(), {"net": "some", "images": 200})
    moments.save(tmp_path / "reference")
    again = Moments.load(tmp_path / "reference.safetensors")
    assert again.count == moments.count
    assert torch.equal(again.mean, moments.mean)
    assert torch.equal(again.m2, moments.m2)
    assert again.recipe == {"net": "some", "images": 200}
    assert again.fingerprint == moments.fingerprint


def test_fingerprint_is_of_the_contents():
    x = features()
    assert Moments.of(x).fingerprint == Moments.of(x.clone(), {"net": "any"}).fingerprint
    assert Moments.of(x).fingerprint != Moments.of(x[1:]).fingerprint


def damage_record(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"kind": "plan"}, "'plan'"),
        ({"extra": 1}, "unknown keys extra"),
        ({"sha256": "0" * 64}, "damaged or belongs to another file"),
    ],
)
def test_foreign_records_are_refused(tmp_path, changes, message):
    Moments.of(features()).save(tmp_path / "m")
    damage_record(tmp_path / "m.json", **changes)
    with pytest.raises(ValueError, match=message):
        Moments.load(tmp_path / "m")


def test_damaged_arrays_are_refused(tmp_path):
    Moments.of(features()).save(tmp_path / "m")
    path = tmp_path / "m.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            Moments.load(path)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        Moments.load(path)


def test_bad_features_are_refused():
    moments = Moments(5)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        moments.update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        moments.update(torch.full((2, 5), float("nan")))
    with pytest.raises(ValueError, match="dimension 4"):
        moments.merge(Moments(4))
    with pytest.raises(ValueError, match="made as"):
        moments.merge(Moments(5, {"net": "other"}))
    with pytest.raises(ValueError, match="at least 2 samples; there are 0"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="must be at least 1"):
        Moments(0)
