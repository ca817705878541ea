"""The CUDA kernels: their own source run on the CPU against integers, and what nvcc makes of it.

The emulation compiles the .cu files with the host's compiler. Matrix instructions are replaced by the tables of the PTX ISA,
and copies to shared memory arrive as late as the source allows; everything else is the code that a device runs.
"""

import os
import re
import shutil
import subprocess

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.quant import backends
from fewstep.quant.backends.extension import Extension
from fewstep.quant.formats import Format, unpack
from fewstep.quant.kernels import cuda
from fewstep.quant.kernels.cuda import compiler
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays, quant_layer
from tests.memory_fixtures import guard_what_is_allocated, guarded
from tests.quant_fixtures import refused
from tests.tensor_fixtures import noise

U = 2.0**-24
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Libraries are built into a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def words(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@needs_compiler
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "signed"),
    [(1, 1, 64, 64, True), (130, 70, 128, 64, True), (37, 131, 384, 128, False), (129, 9, 320, 320, True)],
)
def test_w4a4_products_on_ragged_shapes(m, n, k, group, signed):
    """Integer sums are exact (15 * 8 * 320 < 2^24); a group costs one rounded product and one rounded sum, 3 u in all."""
    a, w = words(m, k // 2), words(n, k // 2, seed=1)
    sa, sw = noise(m, k // group).abs(), noise(n, k // group, seed=2).abs()
    bias = noise(n, seed=3)
    y = cuda.w4a4_product(a, sa, w, sw, bias, signed=signed, emulate=True)
    codes = [unpack(t, 4, k, signed=s).double() for t, s in ((a, signed), (w, True))]
    x, v = (c * s.double().repeat_interleave(group, 1) for c, s in zip(codes, (sa, sw), strict=True))
    wanted = x @ v.T + bias.double()
    blocks = [c.unflatten(1, (-1, group)) for c in codes]
    size = (torch.einsum("mgk,ngk->mng", *blocks).abs() * sa[:, None].double() * sw[None].double()).sum(-1) + bias.abs()
    assert ((y.double() - wanted).abs() <= (k // group + 3) * U * size).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_w4a4_rounds_its_result_to_the_dtype_asked_for(dtype):
    arguments = words(20, 64), noise(20, 1).abs(), words(12, 64, seed=1), noise(12, 1).abs()
    wide = cuda.w4a4_product(*arguments, emulate=True)
    torch.testing.assert_close(
        cuda.w4a4_product(*arguments, out_dtype=dtype, emulate=True), wide.to(dtype), rtol=0, atol=0
    )


@needs_compiler
def test_w4a4_takes_what_the_format_packs():
    x, w = Format.parse("int4:g64").encode(noise(33, 192)), Format.parse("int4:row").encode(noise(40, 192, seed=1))
    a, b = x.packed(), w.packed()
    y = cuda.w4a4_product(a["codes"], a["scale"], b["codes"], b["scale"], emulate=True)
    size = x.decode().double().abs() @ w.decode().double().abs().T
    assert ((y.double() - x.decode().double() @ w.decode().double().T).abs() <= 6 * U * size).all()


@needs_compiler
@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 3), (8, 8), (4, 2)])
@pytest.mark.parametrize("bipolar", [False, True])
def test_plane_products_are_exact(p, q, bipolar):
    m, n, k = 70, 66, 300
    a, w = words(m, k) >> (8 - p), words(n, k, seed=1) >> (8 - q)
    y = cuda.plane_products(cuda.bit_planes(a, p), cuda.bit_planes(w, q), bipolar=bipolar, emulate=True)
    a, w = a.long(), w.long()
    if bipolar:
        a, w = 2 * a - (2**p - 1), 2 * w - (2**q - 1)
    assert torch.equal(y.long(), a @ w.T)


@needs_compiler
@pytest.mark.parametrize(
    ("activation", "weight"), [("int8:row", "int2:row"), ("zint5:row", "int3:row"), ("uint4:tensor", "zint8:row")]
)
def test_bitserial_products_of_any_integer_format(activation, weight):
    """What is left are three roundings: the exact sum to float32 and two scales."""
    a, w = (
        Format.parse(activation).encode(noise(40, 200).abs() - 0.3),
        Format.parse(weight).encode(noise(30, 200, seed=1)),
    )
    y = cuda.bitserial_product(a, w, emulate=True)
    values = [
        (side.codes.double() - (0 if side.zero is None else side.zero.double())) * side.scale.double()
        for side in (a, w)
    ]
    wanted = values[0] @ values[1].T
    size = values[0].abs() @ values[1].abs().T
    assert ((y.double() - wanted).abs() <= 3 * U * wanted.abs() + 1e-13 * size).all()


@needs_compiler
def test_no_kernel_leaves_its_tensors(monkeypatch):
    """The process would die. Every element of the result is written, too: what is not stays NaN, or -1."""
    arguments = words(70, 64), noise(70, 2), words(66, 64, seed=1), noise(66, 2), noise(66)
    planes = [cuda.bit_planes(words(rows, 300) >> 6, 2) for rows in (70, 66)]
    free, exact = cuda.w4a4_product(*arguments, emulate=True), cuda.plane_products(*planes, emulate=True)
    guard_what_is_allocated(monkeypatch)
    torch.testing.assert_close(cuda.w4a4_product(*map(guarded, arguments), emulate=True), free, rtol=0, atol=0)
    planes = [cuda.BitPlanes(guarded(side.planes), side.columns) for side in planes]
    assert torch.equal(cuda.plane_products(*planes, emulate=True), exact)


def test_planes_hold_each_bit_in_its_place():
    codes = words(3, 11) >> 3
    planes = cuda.bit_planes(codes, 5)
    assert planes.planes.shape == (5, 3, 32)
    for row in range(3):
        for column in range(11):
            bits = [int(planes.planes[i, row, column // 8]) >> column % 8 & 1 for i in range(5)]
            assert sum(bit << i for i, bit in enumerate(bits)) == codes[row, column]
    assert int(planes.planes[:, :, 2:].max()) == 0
    assert int((planes.planes[:, :, 1] >> 3).max()) == 0


OPCODES = {
    "w4a4": ("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", "mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32"),
    "bitserial": (
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc",
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc",
    ),
}


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("name", "capabilities"), [("w4a4", [(8, 0), (8, 6), (8, 9)]), ("bitserial", [(8, 0), (8, 9), (9, 0)])]
)
def test_nvcc_makes_the_instructions_without_spilling(name, capabilities, tmp_path):
    assert all(cuda.supported(capability, name)[0] for capability in capabilities)
    command = compiler.nvcc_command(name, capabilities, tmp_path / "kernel.fatbin", "-fatbin")
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(tmp_path)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (ptx,) = tmp_path.glob("*.ptx")
    assert all(opcode in ptx.read_text() for opcode in (*OPCODES[name], "cp.async.cg.shared.global"))
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    kernels = 6 if name == "w4a4" else 2  # by sign and type of the result; by AND and XOR
    assert len(stacks) == kernels * len(capabilities), report
    assert all(int(stack) == int(spill) == 0 for stack, spill in stacks), report
    assert all(int(registers) <= 255 for registers in re.findall(r"Used (\d+) registers", report))


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
def test_the_library_that_nvcc_builds_is_kept_and_has_its_function(tmp_path):
    library = cuda.build("bitserial", (8, 0), tmp_path)
    made = library.stat().st_mtime_ns
    assert b"fewstep_bitserial" in library.read_bytes()
    assert cuda.build("bitserial", (8, 0), tmp_path) == library
    assert library.stat().st_mtime_ns == made
    assert [f.name for f in tmp_path.iterdir()] == [library.name]


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no room on device' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(FewstepError, match=r"could not compile w4a4\.cu: no room on device"):
        cuda.build("w4a4", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_runs_where(monkeypatch):
    monkeypatch.setattr(compiler, "find_nvcc", lambda: "/usr/bin/nvcc")
    for capability, w4a4, bitserial in [
        ((7, 5), False, False),
        ((8, 0), True, True),
        ((8, 9), True, True),
        ((9, 0), False, True),
        ((12, 0), False, False),
    ]:
        assert cuda.supported(capability, "w4a4")[0] is w4a4
        assert cuda.supported(capability, "bitserial")[0] is bitserial
    assert "Triton" in cuda.supported((9, 0), "w4a4")[1]
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    assert cuda.supported((8, 0), "w4a4") == (False, "nvcc is not found: install the CUDA toolkit or set CUDA_HOME")
    with pytest.raises(FewstepError, match="CUDA_HOME"):
        cuda.build("w4a4", (8, 0))


def test_refusals_name_what_is_wrong():
    codes, scale = words(4, 64), torch.ones(4, 2)
    refused(lambda: cuda.w4a4_product(codes, scale, codes, scale), "cpu", "emulate=True")
    refused(lambda: cuda.w4a4_product(codes, scale, words(4, 32), scale, emulate=True), "(4, 64)", "(4, 32)")
    refused(lambda: cuda.w4a4_product(codes, torch.ones(4, 4), codes, scale, emulate=True), "4 groups of 128", "64")
    refused(lambda: cuda.w4a4_product(codes, torch.ones(3, 2), codes, scale, emulate=True), "(3, 2)", "(4, 1)")
    refused(lambda: cuda.w4a4_product(codes, scale, codes, scale, torch.ones(3), emulate=True), "bias", "(4,)")
    refused(lambda: cuda.w4a4_product(codes, scale, codes, scale, out_dtype=torch.int8, emulate=True), "torch.int8")
    refused(lambda: cuda.bit_planes(codes, 9), "9 bits")
    refused(lambda: cuda.bit_planes(codes, 3), "does not fit in 3 bits")
    refused(
        lambda: cuda.plane_products(cuda.bit_planes(codes, 8), cuda.bit_planes(words(4, 63), 8), emulate=True),
        "64",
        "63",
    )
    wide = cuda.bit_planes(words(1, 17000), 8)
    refused(lambda: cuda.plane_products(wide, wide, emulate=True), "17000 products", "split K")
    grouped = Format.parse("int4:g64").encode(noise(4, 128))
    refused(lambda: cuda.bitserial_product(grouped, grouped, emulate=True), "int4:g64")
    refused(lambda: cuda.build("w5a5", (8, 0)), "unknown CUDA kernel 'w5a5'")
    refused(lambda: cuda.supported((8, 0), "w5a5"), "unknown CUDA kernel 'w5a5'")


@needs_compiler
@pytest.mark.parametrize(
    "formats",
    [("int4:g64", "int4:g64"), ("uint4:g64", "int4:g64"), ("int4:row", "int4:g128"), ("int4:row", "int4:row")],
)
def test_the_backend_is_the_reference_on_the_same_codes(formats):
    activation, weight = (Format.parse(name) for name in formats)
    backend = Extension(emulate=True)
    assert backend.refuses(activation, weight) is None
    a, w = activation.encode(noise(70, 256).abs()), weight.encode(noise(50, 256, seed=1))
    want = a.decode().double() @ w.decode().double().T
    bound = 4 * 2.0**-24 * (a.decode().abs().double() @ w.decode().abs().double().T)  # as many groups are added up
    assert bool(((backend.product(a, backend.pack(w)).double() - want).abs() <= bound).all())


@needs_compiler
def test_a_layer_with_branch_and_shift_runs_on_the_emulated_backend(monkeypatch):
    layer = torch.nn.Linear(128, 40).requires_grad_(False)
    plan = LayerPlan("int4:g64", "uint4:g64", rank=4, smooth=True, shift=0.2)
    arrays = layer_arrays(layer, plan, smooth=noise(128).abs() + 0.5, branch=(noise(4, 128) / 11, noise(40, 4)))
    made = quant_layer(layer, plan, arrays)
    x = noise(9, 128, seed=4).abs()
    made.backend = "reference"
    want = made(x)
    monkeypatch.setitem(backends.BY_NAME, "cuda", Extension(emulate=True))
    backends._probed.cache_clear()
    made.backend = "cuda"
    torch.testing.assert_close(made(x), want, rtol=1e-5, atol=1e-5)
    backends._probed.cache_clear()


def test_the_backend_says_what_it_does_not_take():
    backend = Extension()
    for activation, weight, says in (
        (None, "int4:g64", "codes by codes"), ("int8:row", "int4:g64", "4 bits"), ("int4:g32", "int4:g32", "multiple of 64"),
        ("int4:tensor", "int4:row", "a scale a row"), ("zint4:row", "int4:row", "zero points"), ("nvfp4", "nvfp4", "4 bits"),
    ):  # fmt: skip
        reason = backend.refuses(None if activation is None else Format.parse(activation), Format.parse(weight))
        assert says in reason
    assert "K=96" in backend.refuses_shape(64, 96)
    assert "sm_80 to sm_89" in backend.missing(torch.device("cpu"))
