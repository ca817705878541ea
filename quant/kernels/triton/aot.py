"""Proof without a device: every kernel compiled ahead of time, and what its machine code says about itself.

>>> compile_for(variant("w4a4"), 90)
Compiled(registers=..., stack=0, shared=..., opcodes=('HGMMA.64', 'IGMMA.64'))

Numbers are the interpreter's business. What only the compiler can tell is whether tensor cores are used, and by which
instruction (Triton falls back to float16 without a word), and whether the tile fits in registers.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.quant.kernels.triton.launch import DEFAULTS, Config

ARCHITECTURES = (80, 89, 90, 100, 120)
MAX_REGISTERS = 255

_IMMA = "IMMA.16832.S8.S8.SAT"
_INT8 = {80: _IMMA, 89: _IMMA, 90: "IGMMA.64", 100: "UTCIMMA", 120: _IMMA}
_FP8 = {89: "QMMA.16832.F32.E4M3.E4M3", 90: "QGMMA.64", 100: "UTCQMMA", 120: "QMMA.16832.F32.E4M3.E4M3"}
_MXFP8 = {100: "UTCQMMA", 120: "QMMA.SF.16832.F32.E4M3.E4M3.E8"}
_MXFP4 = {100: "UTCOMMA", 120: "OMMA.SF.16864.F32.E2M1.E2M1.E8"}
_NVFP4 = {100: "UTCOMMA.4X", 120: "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"}
_FLOAT16 = {80: "HMMA.16816.F32", 89: "HMMA.16816.F32", 90: "HGMMA.64"}
_BFLOAT16 = {80: "HMMA.16816.F32.BF16", 89: "HMMA.16816.F32.BF16", 90: "HGMMA.64"}
_PROJECTION: dict[int, str] = dict.fromkeys(ARCHITECTURES, "HMMA.16816.F32.BF16")


@dataclass(frozen=True)
class Variant:
    """A kernel with its types and constants fixed, as a launcher would fix them for bfloat16 activations.

    Attributes:
        name: what it does.
        module, function: where it is, under ``jit``.
        types: Triton's types of the pointers; every other argument is an int32.
        constants: the ``tl.constexpr`` arguments.
        tile: warps and stages, and the blocks that went into ``constants``.
        opcodes: the tensor-core instruction that must be there, by architecture (80 for sm_80).
    """

    name: str
    module: str
    function: str
    types: dict[str, str]
    constants: dict[str, Any]
    tile: Config
    opcodes: dict[int, str]


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel takes and uses.

    Attributes:
        registers: of a thread. ``stack``: bytes of memory a thread needs because registers did not suffice.
        shared: bytes of shared memory a program needs.
        opcodes: the matrix instructions in the SASS, sorted.
        ptx: the PTX text.
    """

    registers: int
    stack: int
    shared: int
    opcodes: tuple[str, ...]
    ptx: str

    def problem(self, opcode: str) -> str:
        """What is wrong with it, empty if nothing is: the instruction is missing, or it spills."""
        if opcode not in self.opcodes:
            return f"no {opcode} among {', '.join(self.opcodes) or 'no matrix instructions'}"
        if self.stack or self.registers > MAX_REGISTERS:
            return f"{self.registers} registers and {self.stack} bytes of stack"
        return ""


def variants() -> tuple[Variant, ...]:
    """Every kernel in the forms that the launchers use."""
    import triton.language as tl

    def rows(name: str, format: str, group: int, scale: str) -> Variant:
        types = {**_ROWS, "codes": "*i8" if format == "int8" else "*u8", "scales": scale}
        tile = DEFAULTS["rows"]
        constants = {"FORMAT": format, "GROUP": group, "SHIFT": 0.0, "STATIC": False, "HAS_SMOOTH": True, "RANK": 32}
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}
        return Variant(name, "rows", "quantize_rows", types, {**constants, **blocks}, tile, _PROJECTION)

    def integer(name: str, tile: Config, group: int, bits: int, has8: bool, has4: bool) -> Variant:
        constants = {"HAS8": has8, "HAS4": has4, "A_SIGNED": True, "W_BITS": bits, "GROUP": group}
        types = {**_INTEGER, "w": "*i8" if bits == 8 else "*u8"}
        return Variant(name, "integer", "int_gemm", types, {**constants, **_product(tile, group)}, tile, _INT8)

    def fp8(name: str, emulate: bool, accurate: bool, opcodes: dict[int, str]) -> Variant:
        tile = DEFAULTS["emulated" if emulate else "fp8"]
        types = {**_FLOATS, "a": "*u8" if emulate else "*fp8e4nv", "w": "*u8" if emulate else "*fp8e4nv"}
        constants = {"EMULATE": emulate, "ACCURATE": accurate, **_product(tile)}
        return Variant(name, "floating", "fp8_gemm", types, constants, tile, opcodes)

    def blocks(name: str, format: str, wide: Any, opcodes: dict[int, str]) -> Variant:
        tile = DEFAULTS["emulated" if wide else "block scaled"]
        code = "*fp8e4nv" if format == "mxfp8" and not wide else "*u8"
        scale = "*fp8e4nv" if format == "nvfp4" and not wide else "*u8"
        types = {**_FLOATS, "a": code, "w": code, "sa": scale, "sw": scale}
        constants = {"FORMAT": format, "WIDE": wide, **_product(tile)}
        return Variant(name, "floating", "block_scaled_gemm", types, constants, tile, opcodes)

    tile = DEFAULTS["rows"]
    mixed = {"GROUP": 128, "HAS_SMOOTH": True, "RANK": 32, "BLOCK_M": tile.block_m}
    conv = {"KERNEL_H": 3, "KERNEL_W": 3, "STRIDE_H": 1, "STRIDE_W": 1, "PAD_H": 1, "PAD_W": 1}
    conv |= {"DILATION_H": 1, "DILATION_W": 1}
    conv |= {name: value for name, value in _product(DEFAULTS["conv"]).items() if name != "RANK"}
    tile = DEFAULTS["attention"]
    heads = {"D": 128, "E": 128, "WIDE_D": 128, "WIDE_E": 128, "BLOCKS_Q": 128, "BLOCKS_K": 64}
    heads |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grouped, wide = DEFAULTS["grouped"], DEFAULTS["wide groups"]
    return (
        rows("quantise int8 rows", "int8", 0, "*fp32"),
        rows("quantise int4 groups", "int4", 64, "*fp16"),
        rows("quantise fp8 rows", "fp8", 0, "*fp32"),
        rows("quantise mxfp8", "mxfp8", 32, "*u8"),
        rows("quantise nvfp4", "nvfp4", 16, "*u8"),
        Variant("quantise int8 and int4", "rows", "quantize_mixed", _MIXED, mixed, tile, _PROJECTION),
        integer("w8a8", DEFAULTS["int8"], 0, 8, True, False),
        integer("w8a8 g128", wide, 128, 8, True, False),
        integer("w4a8 g64", grouped, 64, 4, True, False),
        integer("w4a8 g128", wide, 128, 4, True, False),
        integer("w4a4", DEFAULTS["int4"], 0, 4, False, True),
        integer("w4a4 g64", grouped, 64, 4, False, True),
        integer("w4a4 g128", wide, 128, 4, False, True),
        integer("w4ax g128", wide, 128, 4, True, True),
        fp8("fp8", False, False, _FP8),
        fp8("fp8 accurate", False, True, _FP8),
        fp8("fp8 emulated", True, False, {80: _FLOAT16[80]}),
        blocks("mxfp8", "mxfp8", None, _MXFP8),
        blocks("mxfp4", "mxfp4", None, _MXFP4),
        blocks("nvfp4", "nvfp4", None, _NVFP4),
        blocks("mxfp8 emulated", "mxfp8", tl.bfloat16, _BFLOAT16),
        blocks("mxfp4 emulated", "mxfp4", tl.bfloat16, _BFLOAT16),
        blocks("nvfp4 emulated", "nvfp4", tl.float16, _FLOAT16),
        Variant("int8 conv 3x3", "convolution", "int8_conv", _CONV, conv, DEFAULTS["conv"], _INT8),
        Variant("int8 attention", "attention", "int8_attention", _ATTENTION, heads, DEFAULTS["attention"], _INT8),
    )


def variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        FewstepError: if there is none.
    """
    known = {v.name: v for v in variants()}
    if name not in known:
        raise FewstepError(unknown("kernel variant", name, known))
    return known[name]


def compile_for(variant: Variant, architecture: int) -> Compiled:
    """Compile for ``architecture`` (90 for sm_90) with the assembler that Triton brings; no device is needed.

    Pointers, strides and channel counts are taken to be multiples of 16, as they are at a launch on usual shapes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"{__package__}.jit.{variant.module}"), variant.function)
    signature, even = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in variant.constants else variant.types.get(name, "i32")
        if signature[name].startswith("*") or name.startswith("stride_") or name in ("K", "K8", "K4", "C"):
            even[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": variant.tile.warps, "num_stages": variant.tile.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, variant.constants, even)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, code = _disassemble(made.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = sorted(set(re.findall(r"\b(?:UTC)?[A-Z]*MMA(?:\.[A-Z0-9]+)*", code)))
    return Compiled(int(found[1]), int(found[2]), made.metadata.shared, tuple(opcodes), made.asm["ptx"])


def _disassemble(cubin: bytes, cuobjdump: Path) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        wanted = ("-res-usage", "-sass")
        usage, code = (subprocess.run([cuobjdump, o, file], capture_output=True, text=True, check=True) for o in wanted)
    return usage.stdout, code.stdout


def _product(tile: Config, group: int = 0) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": group or tile.block_k, "BAND": 8}
    return {"EVEN": True, "HAS_BIAS": True, "RANK": 32, **blocks}


_BRANCH = {"projected": "*bf16", "up": "*bf16", "bias": "*bf16", "out": "*bf16"}
_INTEGER = {**_BRANCH, "a8": "*i8", "sa8": "*fp32", "a4": "*u8", "sa4": "*fp32", "sw": "*fp16"}
_FLOATS = {**_BRANCH, "sa": "*fp32", "sw": "*fp32", "alpha": "*fp32"}
_ROWS = {"x": "*bf16", "smooth": "*fp32", "down": "*bf16", "static": "*fp32", "projected": "*bf16"}
_MIXED = {k: v for k, v in _ROWS.items() if k != "static"}
_MIXED |= {"order": "*i32", "codes8": "*i8", "scales8": "*fp32", "codes4": "*u8", "scales4": "*fp32"}
_CONV = {"x": "*i8", "sx": "*fp32", "w": "*i8", "sw": "*fp32", "bias": "*bf16", "out": "*bf16"}
_ATTENTION = {"q": "*i8", "sq": "*fp32", "k": "*i8", "sk": "*fp32", "v": "*fp16", "sv": "*fp32", "out": "*bf16"}
