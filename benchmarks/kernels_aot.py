"""What the compilers make of every kernel for every architecture: instruction, registers, stack, shared memory.

    python benchmarks/kernels_aot.py [--out FOLDER]

Needs Triton, and nvcc for the CUDA C++ kernels, but no GPU. Takes some minutes. Times are another matter: nothing is run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
from record import RESULTS, machine, provenance, table, write

from fewstep.quant.kernels.cuda import compiler
from fewstep.quant.kernels.triton import aot

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CUDA_INSTRUCTIONS = {"w4a4": "IMMA.16864.S4.S4", "bitserial": "BMMA.168256.AND.POPC"}
CUDA_CAPABILITIES = {"w4a4": [(8, 0), (8, 6), (8, 9)], "bitserial": [(8, 0), (8, 6), (8, 9), (9, 0)]}


@dataclass(frozen=True)
class Entry:
    """One kernel for one architecture; ``problem`` is empty if the instruction is there and nothing spills."""

    kernel: str
    architecture: str
    instruction: str
    registers: int
    stack: int
    shared: int
    problem: str

    def row(self) -> list[str]:
        numbers = (str(n) for n in (self.registers, self.stack, self.shared))
        return [self.kernel, self.architecture, f"`{self.instruction}`", *numbers, self.problem or "ok"]


def triton_entries() -> Iterator[Entry]:
    for variant in aot.variants():
        for architecture, opcode in sorted(variant.opcodes.items()):
            made = aot.compile_for(variant, architecture)
            numbers = made.registers, made.stack, made.shared
            yield Entry(variant.name, f"sm_{architecture}", opcode, *numbers, made.problem(opcode))


def cuda_entries() -> Iterator[Entry]:
    """The worst of each source's kernels, on the architectures whose tensor cores have its instruction."""
    for name, opcode in CUDA_INSTRUCTIONS.items():
        for capability in CUDA_CAPABILITIES[name]:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                subprocess.run(compiler.nvcc_command(name, [capability], cubin, "-cubin"), check=True)
                usage, code = (
                    subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout
                    for what in ("-res-usage", "-sass")
                )
            used = [map(int, numbers) for numbers in re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)]
            registers, stack, shared = (max(column) for column in zip(*used, strict=True))
            found = tuple(sorted(set(re.findall(r"\b[A-Z]*MMA(?:\.[A-Z0-9]+)*", code))))
            problem = aot.Compiled(registers, stack, shared, found, "").problem(opcode)
            architecture = f"sm_{capability[0]}{capability[1]}"
            yield Entry(f"CUDA C++ {name}", architecture, opcode, registers, stack, shared, problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    about = {**machine(), "triton": triton.__version__, "nvcc": _nvcc()}
    entries = [*triton_entries(), *(cuda_entries() if about["nvcc"] else ())]
    header = ["kernel", "for", "instruction", "registers", "stack", "shared", ""]
    page = (
        "# Machine code of the kernels\n\n"
        "Compiled ahead of time, with bfloat16 activations, a branch of rank 32 and a bias. The instruction is the one that "
        "has to be in the SASS. Registers are a thread's; stack and shared memory are bytes, and a stack of 0 means that "
        "nothing spills. Times are not measured: nothing here has run on a GPU.\n\n"
        f"{sum(not e.problem for e in entries)} of {len(entries)} have their instruction and do not spill.\n\n"
        f"{table(header, [e.row() for e in entries])}\n"
        f"Triton {about['triton']} with the assemblers that it brings; nvcc {about['nvcc'] or 'was not there'}. "
        f"{provenance(about)}"
    )
    write(options.out, "kernels_aot", {**about, "kernels": [asdict(e) for e in entries]}, page)


def _nvcc() -> str | None:
    if (nvcc := compiler.find_nvcc()) is None:
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    return found[1] if found else "of unknown version"


if __name__ == "__main__":
    main()
