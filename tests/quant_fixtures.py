"""What tests of quantised networks share: tiny networks of the families with calls, and comparisons."""

import pytest
import torch

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import first_tensor
from tests.eval_fixtures import tiny_dit, tiny_pipeline, tiny_sd3, tiny_unconditional
from tests.tensor_fixtures import noise


def unet():
    return tiny_pipeline().unet, [
        {"sample": noise(2, 4, 8, 8, seed=i), "timestep": torch.tensor(100 * i + 1),
         "encoder_hidden_states": noise(2, 5, 32, seed=i)}
        for i in range(3)
    ]  # fmt: skip


def unconditional():
    return tiny_unconditional().unet, [(noise(2, 1, 16, 16, seed=i), torch.tensor(200 * i + 1)) for i in range(3)]


def dit():
    labels = torch.tensor([0, 1])
    return tiny_dit().transformer, [
        {"hidden_states": noise(2, 4, 4, 4, seed=i), "timestep": torch.tensor([7, 7]), "class_labels": labels}
        for i in range(3)
    ]


def sd3():
    return tiny_sd3().transformer, [
        {
            "hidden_states": noise(2, 4, 4, 4, seed=i), "encoder_hidden_states": noise(2, 6, 64, seed=i),
            "pooled_projections": noise(2, 32, seed=i), "timestep": torch.tensor([500.0, 500.0]),
        }
        for i in range(3)
    ]  # fmt: skip


def pixart():
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
            patch_size=2, cross_attention_dim=16, caption_channels=24, use_additional_conditions=False,
        )  # fmt: skip
    return model.eval(), [
        {
            "hidden_states": noise(2, 4, 4, 4, seed=i), "encoder_hidden_states": noise(2, 3, 24, seed=i),
            "timestep": torch.tensor([3, 3]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        for i in range(3)
    ]  # fmt: skip


def tiny_flux():
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip


def flux():
    return tiny_flux(), [
        {
            "hidden_states": noise(1, 16, 4, seed=i), "encoder_hidden_states": noise(1, 5, 32, seed=i),
            "pooled_projections": noise(1, 32, seed=i), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }
        for i in range(3)
    ]  # fmt: skip


FAMILIES = {"unet": unet, "unconditional": unconditional, "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def outputs(model, calls):
    """The first tensor that each call gives."""
    with torch.no_grad():
        return [first_tensor(model(**c) if isinstance(c, dict) else model(*c)) for c in calls]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(a, b):
    """Sum of norms of the differences over that of the norms of ``b``."""
    return sum(float((x - y).norm()) for x, y in zip(a, b, strict=True)) / sum(float(y.norm()) for y in b)


def refused(call, *words):
    """The call fails with one clear error that says all of the words."""
    with pytest.raises(FewstepError) as error:
        call()
    for word in words:
        assert word in str(error.value)


class Failing(quant.Int8):
    """Fails when it comes to the UNet's second half."""

    def arrays(self, site, plan, inputs):
        if site.name.startswith("up_blocks"):
            raise RuntimeError("out of memory")
        return super().arrays(site, plan, inputs)
