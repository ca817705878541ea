"""Gain and offset of the output by time step: exact where the error is nothing else, better on a real network, gone after."""

import pytest
import torch

from fewstep import quant
from fewstep.errors import ArtifactError, FewstepError
from fewstep.eval.sweeps.transforms import structure
from fewstep.quant.correction import Correction, _fit
from tests.eval_fixtures import tiny_dit


@pytest.fixture(scope="module")
def pipe():
    return tiny_dit()


@pytest.fixture(scope="module")
def calls(pipe):
    return quant.record(pipe, ("dress", "bag"), num_inference_steps=4, samples=4, guidance=3.0)


def error(pipe, calls, wanted):
    with torch.no_grad():
        got = [call.run(pipe.transformer) for call in calls]
    return sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))


def test_an_affine_error_is_found_exactly():
    want = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    gain, offset = torch.tensor([1.1, 0.9, 1.0, 1.3]).double(), torch.tensor([0.2, -0.1, 0.0, 0.5]).double()
    got = want * gain[:, None, None] + offset[:, None, None]
    found = _fit([(got[:1], want[:1]), (got[1:], want[1:])], by_channel=True)
    assert torch.allclose(found[0], gain)
    assert torch.allclose(found[1], offset)
    correction = Correction(torch.tensor([10.0]).double(), found[0][None], found[1][None], "")
    assert torch.allclose(correction.corrected(got, torch.tensor([10, 11, 12])), want)
    one = _fit([(want * 1.2, want)], by_channel=False)
    assert torch.allclose(one[0], torch.full((4,), 1.2).double())


def test_every_sample_takes_the_row_of_its_own_time():
    times = torch.tensor([0.0, 100.0, 900.0]).double()
    correction = Correction(times, torch.tensor([[1.0], [2.0], [4.0]]).double(), torch.zeros(3, 1).double(), "")
    out = correction.corrected(torch.ones(3, 1, 2, 2), torch.tensor([3, 880, 101]))
    assert out[:, 0, 0, 0].tolist() == [1.0, 0.25, 0.5]
    assert correction.corrected(torch.ones(2, 1, 2, 2), 120)[:, 0, 0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("by_channel", [True, False])
def test_the_output_is_nearer_and_everything_comes_off(by_channel, pipe, calls, tmp_path):
    before = structure(pipe)
    with torch.no_grad():
        wanted = [call.run(pipe.transformer) for call in calls]
    quant.quantize_(pipe.transformer, quant.Int4(weight="int3:g8", activation="int4:g8"))
    plain = error(pipe, calls, wanted)
    fitted = quant.fit_correction(pipe.transformer, calls, by_channel=by_channel)
    assert len(fitted.times) == 4
    fitted.save(tmp_path / "correction.json")
    quant.correct_(pipe.transformer, Correction.load(tmp_path / "correction.json"))
    corrected = error(pipe, calls, wanted)
    # Offsets take the mean off, which lowers the error for certain; gains are fitted the other way round, y_q on y.
    assert corrected < plain
    with pytest.raises(FewstepError, match="has a correction already"):
        quant.correct_(pipe.transformer, fitted)
    assert quant.remove_correction_(pipe.transformer)
    assert not quant.remove_correction_(pipe.transformer)
    assert error(pipe, calls, wanted) == plain
    quant.correct_(pipe.transformer, fitted)
    quant.dequantize_(pipe.transformer)
    assert structure(pipe) == before


def test_refusals(pipe, calls, tmp_path):
    with pytest.raises(FewstepError, match="quantise with keep_originals=True"):
        quant.fit_correction(pipe.transformer, calls)
    nothing = Correction(torch.zeros(1), torch.ones(1, 4), torch.zeros(1, 4), "abc")
    with pytest.raises(FewstepError, match="with fingerprint abc"):
        quant.correct_(pipe.transformer, nothing)
    with pytest.raises(ArtifactError, match=r"must end in \.json"):
        nothing.save(tmp_path / "table")
    quant.quantize_(pipe.transformer, quant.Int8())
    timeless = [{k: v for k, v in call.kwargs.items() if k != "timestep"} for call in calls]
    with pytest.raises(FewstepError, match="told their time"):
        quant.fit_correction(pipe.transformer, timeless)
    quant.dequantize_(pipe.transformer)
