"""Compiling the kernels when they are first asked for, with nvcc for a device and with the C++ compiler for the emulation."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from fewstep.artifact import write_bytes
from fewstep.errors import FewstepError, unknown

Capability = tuple[int, int]
HERE = Path(__file__).parent
SOURCES = ("w4a4", "bitserial")
NATIVE: dict[str, tuple[Capability, Capability]] = {"w4a4": ((8, 0), (8, 9)), "bitserial": ((8, 0), (9, 0))}
"""First and last architecture whose tensor cores have the instruction; later ones emulate it by 8-bit products."""


def supported(capability: Capability, name: str) -> tuple[bool, str]:
    """Whether the kernel ``name`` is worth running on a device of this compute capability, and why or why not.

    Raises:
        FewstepError: for an unknown name.
    """
    if name not in NATIVE:
        raise FewstepError(unknown("CUDA kernel", name, NATIVE))
    first, last = NATIVE[name]
    here = f"sm_{capability[0]}{capability[1]}"
    if capability < first:
        return False, f"{here} lacks the instruction; sm_80 is the first that has it"
    if capability > last:
        return False, f"{here} has the instruction only in emulation by 8-bit products: use the Triton kernels"
    if find_nvcc() is None:
        return False, "nvcc is not found: install the CUDA toolkit or set CUDA_HOME"
    return True, {"w4a4": "mma.m16n8k64 s4", "bitserial": "mma.m16n8k256 b1"}[name]


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME or CUDA_PATH, else that on PATH, else that of /usr/local/cuda; None without one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            return shutil.which("nvcc", path=f"{folder}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_command(name: str, capabilities: Sequence[Capability], output: Path, *kind: str) -> list[str]:
    """The command line that makes ``output`` for these architectures, a shared library or what ``kind`` says (``-fatbin``).

    PTX is made for the first of them only.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FewstepError(
            f"the CUDA kernel {name} is compiled by nvcc, which is not found: set CUDA_HOME to the toolkit"
        )
    virtual, *real = (f"{major}{minor}" for major, minor in (capabilities[0], *capabilities))
    target = f"-gencode=arch=compute_{virtual},code=[{','.join(f'sm_{one}' for one in real)}]"
    shared = ("-shared", "-Xcompiler", "-fPIC")
    return [nvcc, *(kind or shared), "-O3", "-std=c++17", target, str(HERE / f"{name}.cu"), "-o", str(output)]


def emulation_command(name: str, output: Path) -> list[str]:
    """The command line that compiles the kernel's source for the CPU."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise FewstepError(f"the emulation of {name} is compiled by g++ or clang++, and neither is found")
    flags = ["-O2", "-std=c++17", "-DFEWSTEP_EMULATE", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-x", "c++"]
    return [compiler, *flags, str(HERE / f"{name}.cu"), "-o", str(output)]


def build(name: str, capability: Capability | None, folder: str | Path | None = None) -> Path:
    """Compile a kernel, unless this source was compiled for this architecture by this compiler before.

    Args:
        name: one of :data:`SOURCES`.
        capability: of the device, such as (8, 6); None for the emulation on the CPU.
        folder: where the library is kept; by default ``fewstep/kernels`` in the user's cache.

    Returns:
        The path of a shared library with the C function ``fewstep_NAME``.

    Raises:
        FewstepError: for an unknown name, without a compiler, or with its message if it fails.
    """
    if name not in SOURCES:
        raise FewstepError(unknown("CUDA kernel", name, SOURCES))
    folder = Path(folder) if folder else _cache()
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "kernel.so"
        command = nvcc_command(name, [capability], output) if capability else emulation_command(name, output)
        target = folder / f"{name}-{_fingerprint(command)}.so"
        if target.exists():
            return target
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise FewstepError(f"{Path(command[0]).name} could not compile {name}.cu: {done.stderr.strip()[-1000:]}")
        write_bytes(target, output.read_bytes())
    return target


@cache
def function(name: str, capability: Capability | None) -> ctypes._NamedFuncPointer:
    """The launcher ``fewstep_NAME``, built if it has to be. Pointers and integers, then a stream; returns CUDA's error."""
    found = getattr(ctypes.CDLL(str(build(name, capability))), f"fewstep_{name}")
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


def _fingerprint(command: list[str]) -> str:
    """Of everything that the library is made of."""
    sources = [(HERE / file).read_bytes() for file in ("device.cuh", "emulation.h", *(f"{s}.cu" for s in SOURCES))]
    version = subprocess.run([command[0], "--version"], capture_output=True).stdout
    flags = "\0".join(command[1:-1]).encode()  # without the output
    return hashlib.sha256(b"\0".join([*sources, version, flags])).hexdigest()[:16]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "kernels"
