"""What a plan leaves in floating point, on disk: exact, in 16 bits, or its large matrices in 8."""

import json

import pytest
import torch

from fewstep import quant
from fewstep.errors import ArtifactError, FewstepError
from fewstep.quant.rest import packed, restored


def dit(classes=100, blocks=1):
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=8, attention_head_dim=48, num_layers=blocks, sample_size=8, out_channels=8,
            num_embeds_ada_norm=classes,
        ).eval()  # fmt: skip


def call():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([300]),
        "class_labels": torch.tensor([7]),
    }


def output(model):
    with torch.no_grad():
        return model(**call()).sample


def reloaded(model, folder):
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    quant.load_(empty.eval(), folder)
    return empty


def test_a_matrix_is_within_half_a_step_of_its_rows_and_an_up_projection_of_its_directions():
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(96, 64, generator=generator) * torch.logspace(0, 4, 64)
    for name, rows in (("blocks.0.table.weight", 1), ("blocks.0.to_q.up", 0)):
        kept, how = packed(name, matrix, "int8")
        assert sum(value.nbytes for value in kept.values()) < 0.54 * 2 * matrix.numel()
        back = restored(kept, {name: how})[name]
        # half a step, and the scale rounded to float16: 127 steps of 2^-11 each
        step = matrix.abs().amax(rows, keepdim=True) / 127
        assert bool(((back - matrix).abs() <= step * (0.5 + 127 * 2.0**-11)).all())


@pytest.mark.parametrize("name", ["proj_out_2.weight", "conv_in.weight", "blocks.0.norm.bias"])
def test_first_and_last_layers_and_vectors_keep_16_bits(name):
    value = torch.randn(128, 64) if "weight" in name else torch.randn(5000)
    kept, how = packed(name, value, "int8")
    assert how is None
    assert torch.equal(kept[name], value.half())


def test_codes_buffers_and_what_overflows_are_exact():
    big = torch.full((128, 64), 1e6)
    scales = torch.rand(128, 64)
    for name, value, buffer in (("a.weight", big, False), ("a.scale", scales, False), ("frequencies", scales[0], True)):
        kept, how = packed(name, value, "int8", buffer=buffer)
        assert how is None
        assert torch.equal(kept[name].float(), value)


def test_embeddings_and_tables_of_classes_take_a_byte_a_number(tmp_path):
    sizes, embedding = {}, 0
    for rest in ("exact", "float16", "int8"):
        model = dit()
        large = [p.numel() for n, p in model.named_parameters() if (".emb." in n or "proj_out_1" in n) and p.ndim == 2]
        embedding = sum(large)
        # inputs in float: a 4-bit input falls to the other side of a step for the smallest change
        plan = quant.quantize_(model, quant.Int4(activation=None)).plan
        want = output(model)
        path = quant.save(model, tmp_path / rest, rest=rest)
        sizes[rest] = sum(file.stat().st_size for file in path.parent.glob("quantized*.safetensors"))
        got = output(reloaded(model, tmp_path / rest))
        # nothing; 2^-11 and 1/127 / sqrt(12) / (rms over largest, at least 1/4) for the numbers that are rounded
        assert float((got - want).norm() / want.norm()) <= {"exact": 0.0, "float16": 2e-3, "int8": 1e-2}[rest]
    assert sizes["float16"] - sizes["int8"] > 0.97 * embedding > 0.1 * sizes["float16"]
    assert sizes["float16"] < 1.02 * plan.nbytes < sizes["exact"]


def test_a_branch_in_eight_bits_is_half_a_branch(tmp_path):
    model = dit()
    floating = output(model)
    plan = quant.quantize_(model, quant.SVDQuant(rank=32, iterations=1)).plan
    branch = sum(2 * p.rank * sum(plan.matrix(name)) for name, p in plan.layers.items())
    size = {}
    for rest in ("float16", "int8"):
        path = quant.save(model, tmp_path / rest, rest=rest)
        size[rest] = sum(file.stat().st_size for file in path.parent.glob("quantized*.safetensors"))
    assert size["float16"] - size["int8"] > 0.4 * branch
    want, got = output(model), output(reloaded(model, tmp_path / "int8"))
    # 4-bit inputs that fall to the other side of a step make it another draw of the same error
    assert float((got - floating).norm()) < 1.5 * float((want - floating).norm())


def test_unknown_kinds_and_damaged_descriptions_are_refused(tmp_path):
    model = dit()
    quant.quantize_(model, quant.Int4())
    with pytest.raises(FewstepError, match="float16"):
        quant.save(model, tmp_path / "a", rest="float61")  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    path = quant.save(model, tmp_path / "b", rest="int8")
    body = json.loads(path.read_text())
    next(iter(body["eight"].values()))["shape"] = [3, 5]
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="8-bit matrices"):
        quant.load_(dit(), tmp_path / "b")
