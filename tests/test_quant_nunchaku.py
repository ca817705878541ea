"""Nunchaku Lite's folder: its layouts against the PTX ISA's fragments, its numbers against the layers they came from."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.quant.exporters.fragments import low_rank, micro_scale_rows, scale_rows, weight_words
from fewstep.quant.exporters.nunchaku import target_state
from fewstep.quant.formats import E4M3, unpack
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays, quant_layer
from fewstep.quant.sites import quantized_layers
from tests.tensor_fixtures import noise


def test_words_of_a_weight_are_the_fragments_of_mma_m16n8k64():
    n, k = 256, 128
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    words = unpack(weight_words(codes).view(torch.uint8).reshape(-1, 4), 4, 8, signed=True)  # 8 codes a word
    place = 0
    for tile in range(n // 128):
        for step in range(k // 64):
            for pair in range(8):
                for lane in range(32):
                    for half in range(2):
                        # PTX ISA, fragment B of m16n8k64: register r of a lane has column lane / 4 and the eight rows
                        # 8 (lane % 4) + 32 r on; B is W transposed.
                        row = tile * 128 + pair * 16 + half * 8 + lane // 4
                        for register in range(2):
                            first = step * 64 + register * 32 + lane % 4 * 8
                            assert torch.equal(words[place], codes[row, first : first + 8])
                            place += 1
    assert place == len(words)


def test_scales_lie_with_the_lanes_that_hold_their_results():
    n, groups = 256, 3
    scale = noise(n, groups)
    got = scale_rows(scale).reshape(-1)
    place = 0
    for tile in range(n // 128):
        for group in range(groups):
            for pair in range(8):
                for lane in range(4):
                    for half in range(2):
                        # fragment C: columns 2 (lane % 4) and the next of each 8
                        row = tile * 128 + pair * 16 + half * 8 + 2 * lane
                        assert got[place] == scale[row, group]
                        assert got[place + 1] == scale[row + 1, group]
                        place += 2
    assert scale_rows(scale).shape == (groups, n)


def test_branches_are_fragments_of_16_by_16_and_micro_scales_come_in_fours():
    up = noise(32, 48)
    flat = low_rank(up, down=False).reshape(-1, 256)
    down = low_rank(up, down=True)
    assert down.shape == (48, 32)
    turned = down.reshape(-1, 256)
    for a in range(2):
        for b in range(3):
            for lane in range(32):
                for i, j, c in ((i, j, c) for i in range(2) for j in range(2) for c in range(2)):
                    want = up[a * 16 + i * 8 + lane // 4, b * 16 + j * 8 + 2 * (lane % 4) + c]
                    place = lane * 8 + i * 4 + j * 2 + c
                    assert flat[a * 3 + b, place] == want == turned[b * 2 + a, place]
    scale = torch.arange(128 * 8).reshape(128, 8) % 251
    got = micro_scale_rows(scale.to(torch.uint8)).reshape(-1)
    for step, group, eight, part, one in ((0, 0, 0, 0, 0), (1, 3, 2, 1, 2), (0, 7, 3, 3, 3)):
        place = (((step * 8 + group) * 4 + eight) * 4 + part) * 4 + one
        assert got[place] == scale[part * 32 + eight * 8 + group, step * 4 + one]


@pytest.mark.parametrize("format", ["int4:g64", "nvfp4"])
def test_a_target_stands_for_its_layers_weight(format):
    layer = torch.nn.Linear(128, 256).requires_grad_(False)
    plan = LayerPlan(format, format, rank=20, smooth=True)
    arrays = layer_arrays(layer, plan, smooth=noise(128).abs() + 0.5, branch=(noise(20, 128) / 9, noise(256, 20) / 9))
    made = quant_layer(layer, plan, arrays)
    state = target_state(made, 32, torch.float16)
    assert {k: tuple(v.shape) for k, v in state.items() if k[0] != "w"} == {
        "qweight": (256, 64), "smooth_factor": (128,), "proj_down": (128, 32), "proj_up": (256, 32), "bias": (256,)
    }  # fmt: skip
    if format == "nvfp4":
        assert state["wscales"].shape == (8, 256)
        scale = float(state["wtscale"]) * state["wcscales"].float()
        assert torch.allclose(scale, made.tensor_scale.expand(256), rtol=2.0**-11, atol=0)
        order = torch.argsort(micro_scale_rows(torch.arange(256 * 8).reshape(256, 8)).reshape(-1))
        back = E4M3.decode(state["wscales"].view(torch.uint8)).reshape(-1)[order].reshape(256, 8)
        assert torch.equal(back, made.quantized_weight().scale)
    else:
        order = torch.argsort(scale_rows(torch.arange(256 * 2).reshape(256, 2)).reshape(-1))
        assert torch.equal(state["wscales"].reshape(-1)[order].reshape(256, 2).float(), made.quantized_weight().scale)
    order = torch.argsort(low_rank(torch.arange(32 * 128).reshape(32, 128), down=True).reshape(-1))
    down = state["proj_down"].reshape(-1)[order].reshape(32, 128)
    assert torch.equal(down[:20], made.down.half())
    assert not down[20:].any()


def dit(width=128):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=width // 2, num_layers=1, sample_size=8, out_channels=8,
            num_embeds_ada_norm=10,
        ).eval()  # fmt: skip


def test_a_folder_holds_every_parameter_that_the_loader_asks_for(tmp_path):
    from diffusers import NunchakuLiteQuantizationConfig

    model = dit()
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    plan = quant.quantize_(model, quant.SVDQuant(rank=16, shift=False, iterations=1)).plan
    left = quant.save_nunchaku_lite(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    section = config["quantization_config"]
    assert config["_class_name"] == "DiTTransformer2DModel"
    read = NunchakuLiteQuantizationConfig(**{k: v for k, v in section.items() if k != "quant_method"})
    assert read.svdq_w4a4["rank"] == 16
    targets = set(read.svdq_w4a4["targets"])
    assert targets == {n for n, p in plan.layers.items() if p.activation is not None}
    assert set(left) == set(plan.layers) - targets  # modulation: its inputs stay floats
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    expected = {n for n in names if n.rpartition(".")[0] not in targets}
    parts = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias")
    assert set(tensors) == expected | {f"{t}.{part}" for t in targets for part in parts}
    kept = next(iter(left))
    assert torch.equal(tensors[f"{kept}.weight"], quantized_layers(model)[kept].weight.half())


def test_what_does_not_fit_is_said(tmp_path):
    model = dit()
    with pytest.raises(FewstepError, match="quantize_ it first"):
        quant.save_nunchaku_lite(model, tmp_path)
    quant.quantize_(model, quant.Int8())
    with pytest.raises(FewstepError, match="int4:g64 or nvfp4"):
        quant.save_nunchaku_lite(model, tmp_path)
    narrow = dit(64)
    quant.quantize_(narrow, quant.Int4(keep=("edge", "embedding", "modulation")))
    with pytest.raises(FewstepError, match="multiples of 128"):
        quant.save_nunchaku_lite(narrow, tmp_path)
    with pytest.raises(FewstepError, match="float64"):
        quant.save_nunchaku_lite(narrow, tmp_path, dtype=torch.float64)
    assert not list(tmp_path.iterdir())
