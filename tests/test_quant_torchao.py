"""torchao: as a backend, equal to the reference on the same codes; and plans as its configs by name, taken by its quantize_."""

import builtins
import sys

import pytest
import torch
from torch import nn

from fewstep import quant
from fewstep.errors import FewstepError, PlanError
from fewstep.quant import backends
from fewstep.quant.backends.torchao import TorchAO, _import_problem
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import build
from tests.tensor_fixtures import relative

torchao = pytest.importorskip("torchao", reason="torchao is not installed")


def linear(n=48, k=128):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(k, n).requires_grad_(False)


@pytest.mark.parametrize(
    "formats",
    [("int8:row", "int8:row"), ("int7:row", "int8:row"), ("int8:row", None), ("int4:g64", None), ("int3:row", None),
     ("int2:g32", None), ("fp8", None)],
)  # fmt: skip
def test_its_products_are_the_references_on_the_same_codes(formats):
    x = torch.randn(3, 20, 128, generator=torch.Generator().manual_seed(0))
    made = build(linear(), LayerPlan(*formats))
    made.backend = "reference"
    want = made(x)
    made.backend = "torchao"
    assert relative(made(x), want) < 128 * 2.0**-24  # float32 sums of 128 products
    assert made(x.half()).dtype == torch.float16


def test_it_is_used_by_name_only_and_says_what_it_does_not_have():
    made = build(linear(), LayerPlan("int4:g64"))
    assert backends.choose(made, torch.randn(2, 128)).name == "reference"
    for formats in (("zint8:row", None), ("e2m1:row", None), ("int4:g64", "int8:row"), ("fp8", "fp8")):
        layer = build(linear(), LayerPlan(*formats))
        layer.backend = "torchao"
        with pytest.raises(FewstepError, match="torchao cannot compute"):
            layer(torch.randn(2, 128))
    rows = [row for row in quant.kernels.backends() if row.backend == "torchao"]
    assert {(row.activation, row.weight) for row in rows if row.usable} >= {
        ("int8:row", "int8:row"),
        ("float", "int4:g64"),
    }


def test_without_torchao_the_table_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)  # how import finds a module that must not be there
    monkeypatch.setattr(builtins, "__import__", without)
    _import_problem.cache_clear()
    try:
        assert "not installed" in TorchAO().missing(torch.device("cpu"))
    finally:
        _import_problem.cache_clear()


def dit():
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=32, num_layers=1, sample_size=8, out_channels=8,
            num_embeds_ada_norm=10,
        ).eval()  # fmt: skip


CALL = {
    "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([300]),
    "class_labels": torch.tensor([7]),
}


def output(model):
    with torch.no_grad():
        return model(**CALL).sample


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (quant.Int8("int8:row"), {"Int8Tensor"}),
        (quant.Int8("int4:g32", None), {"IntxUnpackedToInt8Tensor"}),
        (quant.W4A8("int4:g32"), {"IntxUnpackedToInt8Tensor"}),
        (quant.FP8(activation=None), {"Float8Tensor"}),
    ],
)
def test_a_plan_is_taken_by_torchaos_quantize_and_does_what_ours_does(config, kinds):
    from torchao.quantization import quantize_

    model, ours = dit(), dit()
    before = output(model)
    plan = quant.quantize_(ours, config).plan
    quantize_(model, quant.to_torchao(plan), filter_fn=None)
    changed = {
        name for name, module in model.named_modules() if type(getattr(module, "weight", None)).__name__ in kinds
    }
    assert changed == set(plan.layers)
    # the same formats, scales of a rule slightly other: errors of the same size
    assert relative(output(model), before) < 2 * relative(output(ours), before)


def test_diffusers_loads_a_network_with_it(tmp_path):
    from diffusers import TorchAoConfig
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = dit()
    model.save_pretrained(tmp_path)
    plan = quant.Int8("int8:row").plan(model)
    loaded = DiTTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quant.to_torchao(plan)), torch_dtype=torch.float32
    )
    changed = {
        name
        for name, module in loaded.named_modules()
        if type(getattr(module, "weight", None)).__name__ == "Int8Tensor"
    }
    assert changed == set(plan.layers)
    assert relative(output(loaded), output(model)) < 0.03  # 8 bits on both sides, a handful of layers


def test_block_formats_become_the_configs_of_their_names():
    model = dit()
    for name, expected in (("nvfp4", "NVFP4Dyn"), ("mxfp8", "MXDyn"), ("mxfp4", "MXDyn"), ("fp8", "Float8Dyn")):
        plan = quant.Int4(name, name).plan(model).layers
        layer = next(n for n, p in plan.items() if p.activation is not None)
        config = quant.to_torchao(quant.Int4(name, name).plan(model), strict=False).fqn_to_config[layer]
        assert type(config).__name__.startswith(expected)


def test_what_torchao_has_not_is_refused_by_name_or_left_out():
    model = dit()
    plan = quant.Int8("int8:row").plan(model)
    name = next(iter(plan.layers))
    for layer in (
        LayerPlan("int4:g32", "int4:g32"), LayerPlan("int8:row", rank=4), LayerPlan("bin1:row"), LayerPlan("int8:tensor"),
        LayerPlan("e4m3:row", "int8:row"), LayerPlan("int8:row", "int8:tensor", static=True),
    ):  # fmt: skip
        changed = plan.with_layers({name: layer})
        with pytest.raises(PlanError, match=name):
            quant.to_torchao(changed)
        assert set(quant.to_torchao(changed, strict=False).fqn_to_config) == set(plan.layers) - {name}
    with pytest.raises(PlanError, match="no layer"):
        quant.to_torchao(quant.Int4(keep=("edge", "embedding", "modulation")).plan(model), strict=False)
