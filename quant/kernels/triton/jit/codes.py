"""Numbers to codes and back inside a kernel, by integer arithmetic alone.

Hardware conversions differ between architectures (none for E4M3 below sm_89, E2M1 from sm_100 on only); these are one
path for all of them, bit-exact, and quantisation is bound by memory anyway.
"""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def rint(x):
    """The nearest integer of float32 ``x``, |x| <= 2^22, ties to even: 1.5 * 2^23 leaves no bit for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def finite_or_inf(x):
    """``x`` with NaN as inf: a maximum would skip NaN, while an infinite scale makes the whole row NaN, to be seen."""
    return tl.where(x == x, x, float("inf"))


@triton.jit
def scale_of(absmax, LARGEST: tl.constexpr, HALF: tl.constexpr):
    """The scale that sends ``absmax`` to the largest code, divided as PyTorch divides; the least there is for zeros.

    float32, rounded to float16 if ``HALF``; infinite if ``absmax`` is.
    """
    scale = tl.div_rn(absmax, LARGEST + tl.zeros_like(absmax))
    if HALF:
        rounded = tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32)
        scale = tl.where(scale == float("inf"), scale, tl.maximum(rounded, 5.9604644775390625e-08))  # 2^-24
    return tl.maximum(scale, 1.1754943508222875e-38)  # 2^-126


@triton.jit
def pack_nibbles(codes):
    """[R, K] integers -> [R, K / 2] bytes; the even k lies in the low nibble."""
    even, odd = tl.split(tl.reshape(codes.to(tl.int32), (codes.shape[0], codes.shape[1] // 2, 2)))
    return ((even & 15) | ((odd & 15) << 4)).to(tl.uint8)


@triton.jit
def unpack_nibbles(packed, SIGNED: tl.constexpr):
    """[R, K / 2] bytes -> [R, K] int8, two's complement if ``SIGNED``, else 0 to 15."""
    if SIGNED:
        packed = packed.to(tl.int8, bitcast=True)
        even = (packed << 4).to(tl.int8) >> 4
        odd = packed >> 4
    else:
        even = (packed & 15).to(tl.int8)
        odd = (packed >> 4).to(tl.int8)
    return tl.reshape(tl.join(even, odd), (packed.shape[0], packed.shape[1] * 2))


@triton.jit
def e4m3_encode(x):
    """float32, |x| <= 448 -> E4M3 byte, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = rint(tl.abs(x) * 512.0).to(tl.int32)  # 8, the first normal code, is reached by rounding up
    code = tl.where(size < 0x3C800000, subnormal, normal)  # 2^-6, the smallest normal value
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_decode(byte):
    """E4M3 byte, NaN excepted -> float16, exact: moved into float16's fields it is 2^-8 of its value, subnormals too."""
    wide = byte.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def e2m1_encode(x):
    """float32 -> E2M1 code 0 to 15 as int32, ties to even, saturating at 6: counts the midpoints that ``x`` has passed."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_decode(code):
    """E2M1 code 0 to 15 -> float16, exact: in float16's fields it is 2^-14 of its value."""
    wide = code.to(tl.int16)
    return (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def e8m0_ceil(x):
    """float32 >= 0 -> the E8M0 byte of the least power of two that is >= x, as int32; 255, NaN, of infinity."""
    bits = x.to(tl.int32, bitcast=True)
    up = (bits & 0x7FFFFF) > tl.where(bits < 0x800000, 0x400000, 0)  # 2^-127, byte 0, is a subnormal float32
    return (bits >> 23) + up.to(tl.int32)


@triton.jit
def e8m0_decode(byte):
    """E8M0 byte -> float32; 0 is 2^-127, a subnormal float32."""
    wide = byte.to(tl.int32)
    return tl.where(wide == 0, 0x400000, wide << 23).to(tl.float32, bitcast=True)
