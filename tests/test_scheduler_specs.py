"""Schedulers by name and options."""

import diffusers
import pytest

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers.specs import make_scheduler, parse_spec, scheduler_names
from tests.scheduler_fixtures import OURS, SD


def test_specs():
    spec = parse_spec("UniPC(solver_order=3, grid=karras, predict_x0=true)")
    assert dict(spec.options) == {"solver_order": 3, "grid": "karras", "predict_x0": True}
    assert parse_spec(str(spec)) == spec
    s = make_scheduler(spec, SD)
    assert type(s) is samplers.UniPCScheduler
    assert s.config.solver_order == 3
    peer = make_scheduler("diffusers:DPMSolverMultistepScheduler(solver_order=3)", SD)
    assert type(peer) is diffusers.DPMSolverMultistepScheduler
    assert peer.config.solver_order == 3
    assert set(OURS) <= set(scheduler_names())
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).config
    assert make_scheduler("diffusers:UniPCMultistepScheduler", flow).config.flow_shift == 2.5


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("UniPCC", "did you mean 'UniPC'"),
        ("UniPC(solver_ordr=3)", "did you mean 'solver_order'"),
        ("UniPC(order=3)", "did you mean 'solver_order'"),
        ("diffusers:unipc", "did you mean 'UniPCMultistepScheduler'"),
        ("UniPC(3)", "key=value"),
        ("UniPC(order=", "key=value"),
        ("", "key=value"),
        ("UniPC(solver_order=open('x'))", "values are numbers"),
        ("diffusers:Nope", "diffusers scheduler 'Nope'"),
        ("diffusers:DDIMScheduler(grid=karras)", "option of DDIMScheduler 'grid'"),
    ],
)
def test_bad_specs_are_named(text, match):
    with pytest.raises(FewstepError, match=match):
        parse_spec(text)
