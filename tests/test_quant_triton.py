"""The Triton kernels from outside: what runs where, what is refused without a device, tuning; and their numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.quant.kernels import triton as kernels
from fewstep.quant.kernels.triton import launch, support, tuning

ROOT = Path(__file__).resolve().parents[1]


def test_numbers_in_the_interpreter():
    """Triton decides at its import whether it interprets, so this takes another process."""
    pytest.importorskip("triton")
    files = [f"tests/test_quant_triton_{name}.py" for name in ("rows", "products", "layers", "attention")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_importing_costs_no_triton():
    code = (
        "import sys; from fewstep.quant.kernels import triton; dir(triton); triton.supported((9, 0), 'int8_linear');"
        "assert 'triton' not in sys.modules and 'torch' not in sys.modules, 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_name_resolves_and_no_other():
    assert all(getattr(kernels, name) is not None for name in dir(kernels))
    with pytest.raises(AttributeError, match="int8_linear"):
        _ = kernels.int9_linear  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a CUDA device")
@pytest.mark.parametrize("missing", [True, False])
def test_without_triton_or_a_device_one_sentence_says_so(missing, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None if missing else object())
    x, order, scale = torch.randn(4, 64), torch.arange(64).int(), torch.ones(4, 1)
    calls = {
        "quantize_rows": lambda: kernels.quantize_rows(x),
        "quantize_mixed": lambda: kernels.quantize_mixed(x, order, 0, group=64),
        "int8_linear": lambda: kernels.int8_linear(x, x.to(torch.int8), scale),
        "w4a8_linear": lambda: kernels.w4a8_linear(x, x.to(torch.uint8), scale),
        "w4a4_linear": lambda: kernels.w4a4_linear(x, x.to(torch.uint8), scale),
        "w4ax_linear": lambda: kernels.w4ax_linear(x, x.to(torch.uint8), scale, order=order, wide=0, group=64),
        "fp8_linear": lambda: kernels.fp8_linear(x, x.to(torch.uint8), scale),
        "mxfp8_linear": lambda: kernels.mxfp8_linear(x, x.to(torch.uint8), scale),
        "mxfp4_linear": lambda: kernels.mxfp4_linear(x, x.to(torch.uint8), scale),
        "nvfp4_linear": lambda: kernels.nvfp4_linear(x, x.to(torch.uint8), scale, scale[0]),
        "int8_conv2d": lambda: kernels.int8_conv2d(
            x.reshape(1, 4, 8, 8), torch.ones(2, 1, 1, 4).to(torch.int8), scale[:2]
        ),
        "int8_attention": lambda: kernels.int8_attention(*[x.reshape(1, 1, 4, 64)] * 3),
    }
    assert set(calls) == set(support.NAMES)
    for name, call in calls.items():
        with pytest.raises(FewstepError, match=r"fewstep\[quant\]" if missing else "need a CUDA device") as error:
            call()
        assert str(error.value).startswith(name)


def test_what_runs_where():
    for name in support.NAMES:
        assert not kernels.supported((7, 5), name)[0]
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            assert kernels.supported(capability, name)[0]
    assert "wgmma s8" in kernels.supported((9, 0), "int8_linear")[1]
    assert "tcgen05 kind::i8" in kernels.supported((10, 0), "w4a4_linear")[1]
    assert "no tcgen05" in kernels.supported((10, 3), "int8_linear")[1]
    assert "emulated" in kernels.supported((8, 6), "fp8_linear")[1]
    assert "emulated" not in kernels.supported((8, 9), "fp8_linear")[1]
    assert "emulated" in kernels.supported((9, 0), "nvfp4_linear")[1]
    assert "mxf4nvf4" in kernels.supported((12, 0), "nvfp4_linear")[1]
    with pytest.raises(FewstepError, match="did you mean 'int8_linear'"):
        kernels.supported((9, 0), "int8_linea")


def test_tuning_keeps_the_fastest_and_only_for_this_kernel_and_architecture(monkeypatch):
    monkeypatch.setattr(launch, "chosen", {})
    monkeypatch.setattr(tuning, "chosen", launch.chosen)
    small, large = launch.Config(64, 64, 64, 4, 2), launch.Config(256, 128, 64, 8, 3)
    default = launch.config("int8", (9, 0))
    seconds = {default: 3.0, small: 1.0, large: 2.0}
    best = kernels.tune(
        "int8",
        lambda: None,
        [small, large],
        capability=(9, 0),
        clock=lambda call: seconds[launch.config("int8", (9, 0))],
    )
    assert best == small == launch.config("int8", (9, 0))
    assert launch.config("int8", (8, 0)) == default
    assert launch.config("fp8", (9, 0)) == launch.DEFAULTS["fp8"]


def test_an_error_while_tuning_leaves_the_choice_as_it_was(monkeypatch):
    monkeypatch.setattr(launch, "chosen", {})
    monkeypatch.setattr(tuning, "chosen", launch.chosen)

    def broken(call):
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        kernels.tune("int8", lambda: None, [launch.Config(64, 64, 64, 4, 2)], capability=(9, 0), clock=broken)
    assert launch.config("int8", (9, 0)) == launch.DEFAULTS["int8"]
    with pytest.raises(FewstepError, match="unknown kernel to tune 'int7'"):
        kernels.tune("int7", lambda: None, [], capability=(9, 0))


def test_a_tile_is_made_of_powers_of_two():
    with pytest.raises(FewstepError, match="powers of two"):
        launch.Config(96, 64, 64, 4, 2)
