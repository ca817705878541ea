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


def table(times, gain=None, offset=None, rest=None, shared=None, fingerprint=""):
    times = torch.as_tensor(times).double()
    ones, zeros = torch.ones(len(times), 1).double(), torch.zeros(len(times), 1).double()
    return Correction(
        times, ones if gain is None else gain, zeros if offset is None else offset, fingerprint,
        torch.as_tensor(zeros[:, 0] if rest is None else rest).double(),
        torch.as_tensor(zeros[:, 0] if shared is None else shared).double(),
    )  # fmt: skip


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
    correction = table([10.0], found[0][None], found[1][None])
    assert torch.allclose(correction.corrected(got, torch.tensor([10, 11, 12])), want)
    one = _fit([(want * 1.2, want)], by_channel=False)
    assert torch.allclose(one[0], torch.full((4,), 1.2).double())


def test_every_sample_takes_the_row_of_its_own_time():
    times = torch.tensor([0.0, 100.0, 900.0]).double()
    correction = table(times, torch.tensor([[1.0], [2.0], [4.0]]).double(), torch.zeros(3, 1).double())
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


CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}


def stochastic(steps=50, eta=1.0):
    from fewstep.samplers import DDIM, Grid
    from fewstep.samplers.schedule import NoiseSchedule

    schedule = NoiseSchedule.from_config(CONFIG)
    return DDIM(eta=eta).compile(schedule, Grid.named("linspace", schedule, steps))


def test_the_noise_that_is_taken_off_is_that_of_the_paper():
    plan = stochastic(10)
    rest = torch.linspace(0.001, 0.05, 10)
    correction = table(plan.model_time.flip(0), rest=rest.flip(0))
    quiet = correction.absorbed(plan)
    for i in range(plan.steps):
        # eq. 17: sigma'^2 = sigma^2 - (sqrt(1 - a' - sigma^2) - sqrt(a' (1 - a) / a))^2 var, a and a' of eq. 2
        a, after, noise = float(plan.alpha[i]) ** 2, float(plan.alpha[i + 1]) ** 2, float(plan.noise[i])
        move = max(0.0, 1 - after - noise**2) ** 0.5 - (after * (1 - a) / a) ** 0.5
        expected = max(0.0, noise**2 - move**2 * float(rest[i])) ** 0.5
        assert float(quiet.noise[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(quiet.output, plan.output)
    assert bool((quiet.noise[:-1] < plan.noise[:-1]).all())
    guided = correction.left(float(plan.model_time[0]), guidance=3.0)
    assert guided == pytest.approx((9 + 4) * 0.001)
    halves = table([1.0], rest=[0.01], shared=[0.01])
    assert halves.left(1.0, guidance=3.0) == pytest.approx(0.01)  # equal errors of both halves pass through unchanged
    ode = stochastic(10, eta=0.0)
    assert correction.absorbed(ode) is ode


def test_noise_of_the_network_and_of_the_sampler_together_are_the_samplers_own():
    """x0 ~ N(0, 1) has eps(x) = sigma x, so that states stay Gaussian and their variance is a recursion without sampling.

    With white noise of variance v added to the network's output the samples have too much of it.
    """
    from fewstep.samplers.convert import conversion
    from fewstep.samplers.schedulers.plan import PlanScheduler

    plan, v = stochastic(50), 0.5

    def variance(used, error):
        total = 1.0
        for i in range(used.steps):
            p, q = conversion(used.prediction, used.basis[i], used.alpha[i], used.sigma[i])
            weight = used.output[i, 0] * q
            linear = used.state[i, 0] + used.output[i, 0] * p + weight * used.sigma[i]
            total = float(linear**2 * total + weight**2 * error + used.noise[i] ** 2)
        return total

    quiet = table(plan.model_time.flip(0), rest=[v] * plan.steps).absorbed(plan)
    assert (quiet.noise[:-1] > 0).all()  # nothing was cut off
    own, noisy, absorbed = variance(plan, 0.0), variance(plan, v), variance(quiet, v)
    _, q = conversion(plan.prediction, plan.basis[-1], plan.alpha[-2], plan.sigma[-2])
    last = float(plan.output[-1, 0] * q) ** 2 * v  # the last step adds no noise that could be less
    assert noisy > own + last + 0.02
    assert absorbed - last == pytest.approx(own, rel=1e-9)
    scheduler = PlanScheduler.from_plan(quiet, {**CONFIG, "_class_name": "DDIMScheduler"})
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.plan.noise, quiet.noise)


def test_what_is_left_is_measured(pipe, calls):
    quant.quantize_(pipe.transformer, quant.Int4(weight="int3:g8", activation="int4:g8"))
    fitted = quant.fit_correction(pipe.transformer, calls)
    with torch.no_grad():
        got = [call.run(pipe.transformer) for call in calls]
        quant.dequantize_(pipe.transformer)
        want = [call.run(pipe.transformer) for call in calls]
    for call, a, b in zip(calls, got, want, strict=True):
        error = fitted.corrected(a.double(), call.timestep) - b.double()
        row = int((fitted.times - call.timestep).abs().argmin())
        assert float(fitted.rest[row]) == pytest.approx(float(error.square().mean()), rel=1e-6)
        assert float(fitted.shared[row]) == pytest.approx(float((error[:4] * error[4:]).mean()), rel=1e-6, abs=1e-12)


def test_refusals(pipe, calls, tmp_path):
    with pytest.raises(FewstepError, match="quantise with keep_originals=True"):
        quant.fit_correction(pipe.transformer, calls)
    nothing = table([0.0], torch.ones(1, 4), torch.zeros(1, 4), fingerprint="abc")
    with pytest.raises(FewstepError, match="with fingerprint abc"):
        quant.correct_(pipe.transformer, nothing)
    with pytest.raises(ArtifactError, match=r"must end in \.json"):
        nothing.save(tmp_path / "table")
    quant.quantize_(pipe.transformer, quant.Int8())
    timeless = [{k: v for k, v in call.kwargs.items() if k != "timestep"} for call in calls]
    with pytest.raises(FewstepError, match="told their time"):
        quant.fit_correction(pipe.transformer, timeless)
    quant.dequantize_(pipe.transformer)
