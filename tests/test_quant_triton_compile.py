"""The Triton kernels' machine code, compiled ahead of time: the tensor-core instruction is there and nothing spills.

One architecture a kernel, so that this stays quick; benchmarks/kernels_aot.py does them all.
"""

import pytest

pytest.importorskip("triton")

from fewstep.errors import FewstepError
from fewstep.quant.kernels.triton import aot

CASES = [
    ("quantise int8 rows", 80),
    ("quantise nvfp4", 120),
    ("quantise int8 and int4", 90),
    ("w8a8", 90),
    ("w4a8 g64", 89),
    ("w4a4 g64", 100),
    ("w4ax g128", 80),
    ("fp8", 89),
    ("fp8 accurate", 90),
    ("mxfp8", 100),
    ("nvfp4", 120),
    ("nvfp4 emulated", 80),
    ("int8 conv 3x3", 120),
    ("int8 attention", 89),
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_machine_code(name, architecture):
    variant = aot.variant(name)
    compiled = aot.compile_for(variant, architecture)
    assert compiled.problem(variant.opcodes[architecture]) == ""


def test_every_kernel_function_is_compiled_here():
    tested = {aot.variant(name).function for name, _ in CASES}
    assert tested == {variant.function for variant in aot.variants()}


def test_a_problem_is_named():
    good = aot.Compiled(128, 0, 0, ("IMMA.16832.S8.S8.SAT",), "")
    assert good.problem("IMMA.16832.S8.S8.SAT") == ""
    assert "no QGMMA.64 among IMMA" in good.problem("QGMMA.64")
    assert "16 bytes of stack" in aot.Compiled(255, 16, 0, ("UTCIMMA",), "").problem("UTCIMMA")
    with pytest.raises(FewstepError, match="unknown kernel variant 'w4a5'"):
        aot.variant("w4a5")
