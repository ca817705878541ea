"""Calling a compiled kernel with tensors: pointers, integers and the current stream."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.kernels.cuda.compiler import function, supported


def ready(name: str, like: Tensor, emulate: bool) -> tuple[int, int] | None:
    """The capability of the device of ``like``, None for the emulation.

    Raises:
        FewstepError: for a tensor that is not on a CUDA device (on the CPU, to emulate), or a device without the instruction.
    """
    wanted = "cpu" if emulate else "cuda"
    if like.device.type != wanted:
        how = "emulates CUDA on the CPU" if emulate else "is a CUDA kernel; emulate=True runs its source on the CPU"
        raise FewstepError(f"{name} got a tensor on {like.device} and {how}")
    if emulate:
        return None
    capability = torch.cuda.get_device_capability(like.device)
    runs, reason = supported(capability, name)
    if not runs:
        raise FewstepError(f"{name} cannot run: {reason}")
    return capability


def call(name: str, capability: tuple[int, int] | None, *arguments: Tensor | int | None) -> None:
    """Run ``fewstep_NAME``; a tensor is passed as its address, None as no address. All tensors share a device.

    Raises:
        FewstepError: with CUDA's error code if the launch fails.
    """
    passed: list[ctypes.c_int | ctypes.c_void_p] = [
        ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr())
        for a in arguments
    ]
    launch = function(name, capability)
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cpu":
        code = launch(*passed, ctypes.c_void_p(None))
    else:
        with torch.cuda.device(device):
            code = launch(*passed, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if code:
        raise FewstepError(f"the CUDA kernel {name} could not be launched: CUDA error {code}")
