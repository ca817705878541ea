"""What every launcher shares: tile sizes by architecture, the checks that come first, and the launch itself."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.kernels.triton.support import Capability, supported

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 128


@dataclass(frozen=True)
class Config:
    """Sizes of a program's tile, its warps, and how many tiles are loaded ahead (``stages``)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        sizes = (self.block_m, self.block_n, self.block_k, self.warps)
        if any(size < 1 or size & (size - 1) for size in sizes) or self.stages < 1:
            raise FewstepError(f"{self}: blocks and warps are powers of two, and stages at least 1")


DEFAULTS = {
    "rows": Config(16, 1, 128, 4, 2),
    "int8": Config(128, 128, 128, 8, 3),
    "int4": Config(128, 128, 64, 8, 3),  # one scale a row, codes of 4 bits in W or in both
    "grouped": Config(64, 128, 64, 4, 3),  # block_k is the group
    "wide groups": Config(64, 128, 128, 8, 3),
    "fp8": Config(128, 128, 128, 8, 3),
    "block scaled": Config(128, 128, 128, 8, 2),  # with 64 rows sm_100 silently gets float16 instructions
    "emulated": Config(128, 64, 64, 8, 2),
    "conv": Config(128, 128, 64, 8, 3),
    "attention": Config(128, 64, 64, 8, 2),  # queries and keys of a tile; block_k is not used
}
"""By what was seen to compile without spilling on sm_80 to sm_120 (benchmarks/kernels_aot.py), not by time."""

chosen: dict[tuple[str, Capability | None], Config] = {}
"""What tuning found, by kernel and capability; see :mod:`.tuning`."""


def config(kernel: str, capability: Capability | None) -> Config:
    return chosen.get((kernel, capability), DEFAULTS[kernel])


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for the device: TRITON_INTERPRET=1 before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ready(name: str, x: Tensor) -> Capability | None:
    """The capability of the device of ``x``, None in the interpreter.

    Raises:
        FewstepError: without Triton, for a tensor that is not on a CUDA device, or a device that is too old.
    """
    if importlib.util.find_spec("triton") is None:
        raise FewstepError(f"{name} needs Triton, which is not installed: pip install 'fewstep[quant]'")
    if interpreting():
        return None
    if x.device.type != "cuda":
        raise FewstepError(f"{name} got a tensor on {x.device}; Triton's kernels need a CUDA device")
    capability = torch.cuda.get_device_capability(x.device)
    runs, reason = supported(capability, name)
    if not runs:
        raise FewstepError(f"{name} does not run on {reason}")
    return capability


def launch(kernel: Any, programs: int, device: torch.device, tile: Config, *args: Any, **constants: Any) -> None:
    """Run ``programs`` programs of a ``@triton.jit`` function on ``device``; an empty grid is no launch."""
    if not programs:
        return
    here: Callable[[], Any] = contextlib.nullcontext if device.type != "cuda" else lambda: torch.cuda.device(device)
    with here():
        kernel[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


def tiles(rows: int, columns: int, tile: Config) -> int:
    return -(-rows // tile.block_m) * -(-columns // tile.block_n)


def padded_rank(rank: int) -> int:
    """The power of two, at least 16, that tensor cores are given for a rank; 0 for 0.

    Raises:
        FewstepError: above :data:`MAX_RANK`, where the tile no longer fits in registers.
    """
    if rank > MAX_RANK:
        raise FewstepError(f"a low-rank branch of rank {rank}; the kernels take at most {MAX_RANK}")
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def need(tensor: Tensor, what: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> Tensor:
    """``tensor`` made contiguous, if it has this shape, one of these dtypes, and the device of ``like``.

    Raises:
        FewstepError: naming what differs.
    """
    if tuple(tensor.shape) != shape:
        raise FewstepError(f"{what} has shape {tuple(tensor.shape)}; {shape} is needed")
    if tensor.dtype not in dtypes:
        raise FewstepError(f"{what} has dtype {tensor.dtype}; {' or '.join(str(d) for d in dtypes)} is needed")
    if tensor.device != like.device:
        raise FewstepError(f"{what} is on {tensor.device}, the input on {like.device}")
    return tensor.contiguous()
