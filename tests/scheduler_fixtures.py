"""What tests of schedulers share: a pipeline's loop, and the distance of its result from another's."""

import torch

from fewstep import samplers
from tests.solver_fixtures import SD as SD

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
OURS = ("DDIM", "DPMSolver", "DEIS", "UniPC")


def scheduler(name, config=SD, **options):
    return getattr(samplers, f"{name}Scheduler").from_config(config, **options)


def run(s, net, x, *args, begin=None, generator=None, **kwargs):
    if args or kwargs:
        s.set_timesteps(*args, **kwargs)
    times = s.timesteps
    if begin is not None:
        s.set_begin_index(begin)
        times = times[begin:]
    draws = {} if generator is None else {"generator": generator}
    for t in times:
        scaled = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
        x = s.step(net(scaled, t), t, x, return_dict=False, **draws)[0]
    return x


def run_with_the_same_noise(ours, theirs, net, x, steps, **options):
    """The last samples of two schedulers that are given the same draws; ``options`` go to every step."""
    for s in (ours, theirs):
        s.set_timesteps(steps)
    a = b = x
    generator = torch.Generator().manual_seed(5)
    for t in ours.timesteps:
        z = torch.randn(x.shape, generator=generator)
        a = ours.step(net(a, t), t, a, variance_noise=z, **options).prev_sample
        b = theirs.step(net(b, t), t, b, variance_noise=z, **options).prev_sample
    return a, b


def smooth_network():
    """A smooth network on (n, 4, ...) images, in float32; it depends on the time, so that a wrong time is seen."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def network(x, t):
        with torch.no_grad():
            return torch.tanh(layer(x.float())) * torch.cos(torch.as_tensor(t).double() / 500).float()

    return network
