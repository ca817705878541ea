"""Calibration: recorded calls, gathered inputs, and one that was stopped."""

import pytest
import torch

from fewstep import quant
from fewstep.errors import ArtifactError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.sites import sites
from tests.eval_fixtures import PROMPTS, tiny_pipeline
from tests.quant_fixtures import Failing, outputs, same, unet


def test_recorded_calls_are_those_that_the_pipeline_made():
    pipe = tiny_pipeline()
    calls = quant.record(pipe, PROMPTS, num_inference_steps=4, samples=3, guidance=3.0, keep=2)
    assert [call.batch for call in calls] == [2] * 4
    assert [call.timestep for call in calls] == sorted((call.timestep for call in calls), reverse=True)
    again = quant.record(pipe, PROMPTS, num_inference_steps=4, samples=3, guidance=3.0, keep=2)
    assert all(torch.equal(a.tensors()[0][1], b.tensors()[0][1]) for a, b in zip(calls, again, strict=True))
    assert not pipe.unet._forward_pre_hooks
    assert isinstance(calls[0], Call)


def test_gathered_inputs_are_the_layers_own_whatever_the_budget():
    from fewstep.quant.calibration.calls import as_calls
    from fewstep.quant.calibration.inputs import gather

    model, calls = unet()
    seen = {}
    site = next(s for s in sites(model) if s.name == "mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    handle = site.module.register_forward_pre_hook(
        lambda m, a: seen.setdefault("x", []).append(a[0].reshape(-1, a[0].shape[-1]))
    )
    outputs(model, calls)
    handle.remove()
    everything = torch.cat(seen["x"])
    found = {}
    for budget in (1, 2**30):
        for got_site, inputs in gather(model, sites(model), as_calls(calls), rows=10**6, budget=budget):
            found.setdefault(got_site.name, []).append(inputs)
    small, large = found[site.name]
    assert all(len(v) == 2 for v in found.values())
    assert torch.equal(small.sample.sort(0).values, everything.sort(0).values)
    assert torch.equal(small.channel_max, large.channel_max)
    assert torch.equal(small.channel_max, everything.abs().amax(0))
    assert float(small.high.max()) == pytest.approx(float(everything.max()))


def test_a_stopped_calibration_goes_on_and_a_folder_for_another_plan_is_refused(tmp_path):
    model, calls = unet()
    with pytest.raises(RuntimeError, match="out of memory"):
        quant.quantize_(model, Failing(), calls, checkpoint=tmp_path)
    held = len(list(tmp_path.glob("*.safetensors")))
    assert held > 3

    class Counting(Failing):
        asked = []  # noqa: RUF012

        def arrays(self, site, plan, inputs):
            self.asked.append(site.name)
            return quant.Int8.arrays(self, site, plan, inputs)

    Counting.__name__ = "Failing"  # the same method, repaired
    report = quant.quantize_(model, Counting(), calls, checkpoint=tmp_path)
    assert len(Counting.asked) == len(report.plan.layers) - held
    twin, _ = unet()
    quant.quantize_(twin, quant.Int8())
    assert same(outputs(model, calls), outputs(twin, calls))
    with pytest.raises(ArtifactError, match="another plan or other calls"):
        quant.quantize_(unet()[0], quant.Int4(), calls, checkpoint=tmp_path)
