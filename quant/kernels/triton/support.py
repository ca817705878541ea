"""Which kernel runs on which architecture, and by which instruction. Nothing here needs Triton or a device."""

from __future__ import annotations

from fewstep.errors import FewstepError, unknown

Capability = tuple[int, int]

OLDEST: Capability = (8, 0)
INTEGER = ("int8_linear", "w4a8_linear", "w4a4_linear", "w4ax_linear", "int8_conv2d")
BLOCK_SCALED = ("mxfp8_linear", "mxfp4_linear", "nvfp4_linear")
NAMES = ("quantize_rows", "quantize_mixed", *INTEGER, "fp8_linear", *BLOCK_SCALED, "int8_attention")


def supported(capability: Capability, name: str) -> tuple[bool, str]:
    """Whether the kernel ``name`` runs on a device of this compute capability, and how or why not.

    Args:
        capability: as ``torch.cuda.get_device_capability()`` gives it, such as (9, 0).
        name: one of :data:`NAMES`.

    Raises:
        FewstepError: for an unknown name.
    """
    if name not in NAMES:
        raise FewstepError(unknown("Triton kernel", name, NAMES))
    if capability < OLDEST:
        return False, f"{spelled(capability)}: Triton makes scalar code of integer products below sm_80"
    if name.startswith("quantize"):
        return True, "integer arithmetic, the same on every architecture"
    if name == "int8_attention":
        qk, pv = {9: ("wgmma s8", "wgmma f16"), 10: ("tcgen05 kind::i8", "tcgen05 kind::f16")}.get(
            capability[0] if capability != (10, 3) else 8, ("mma.m16n8k32 s8", "mma.m16n8k16 f16")
        )
        return True, f"{qk} for Q K, {pv} for P V"
    if name in INTEGER:
        how = {9: "wgmma s8", 10: "tcgen05 kind::i8"}.get(capability[0], "mma.m16n8k32 s8")
        if capability == (10, 3):
            how = "mma.m16n8k32 s8, since sm_103 has no tcgen05 kind::i8: prefer fp8 or nvfp4"
        return True, how if "4" not in name else f"4-bit codes are widened in registers to {how}"
    if native(capability, name):
        if name == "fp8_linear":
            return True, {9: "wgmma e4m3", 10: "tcgen05 kind::f8f6f4"}.get(capability[0], "mma.m16n8k32 e4m3")
        kind = {"mxfp8_linear": "mxf8f6f4", "mxfp4_linear": "mxf4", "nvfp4_linear": "mxf4nvf4"}[name]
        return True, f"{'tcgen05' if capability[0] == 10 else 'mma'} kind::{kind}, block_scale"
    wide = "float16" if name in ("fp8_linear", "nvfp4_linear") else "bfloat16"
    return True, f"emulated: codes become {wide} in registers, so it saves memory but is no faster than {wide}"


def native(capability: Capability, name: str) -> bool:
    """Whether tensor cores take the floating codes of ``name`` as they are."""
    return capability >= ((8, 9) if name == "fp8_linear" else (10, 0))


def spelled(capability: Capability) -> str:
    return f"sm_{capability[0]}{capability[1]}"
