"""The machine and the libraries of a run, for its manifest and for ``fewstep doctor``."""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from fewstep import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "torchmetrics", "safetensors")


def library_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, processor, threads and accelerator, as JSON."""
    return {
        "fewstep": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": devices(),
    }


def devices() -> list[str]:
    """What torch can compute on here, the CPU first."""
    found = ["cpu"]
    found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def dtype_support(device: str) -> dict[str, bool]:
    """Which dtypes can do a matrix product and a convolution on ``device``, found out by doing one."""
    return {str(dtype).removeprefix("torch."): _works(dtype, device) for dtype in _DTYPES}


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def _works(dtype: torch.dtype, device: str) -> bool:
    try:
        square = torch.ones(8, 8, device=device).to(dtype)
        image = torch.ones(1, 8, 8, 8, device=device).to(dtype)
        torch.nn.functional.conv2d(image, image[:, :, :3, :3].contiguous())
        return bool(torch.isfinite((square @ square).float()).all())
    except (RuntimeError, NotImplementedError, TypeError):
        return False


def extras() -> dict[str, str]:
    """Of every extra that fewstep declares (the developers' left out) whether it is usable, and if not, why."""
    wanted: dict[str, list[str]] = {}
    for requirement in requires("fewstep") or []:
        match = _EXTRA.match(requirement)
        if match and match["extra"] != "dev":
            wanted.setdefault(match["extra"], []).append(match["name"])
    return {extra: _extra_state(extra, names) for extra, names in wanted.items()}


_EXTRA = re.compile(r"""(?P<name>[A-Za-z0-9._-]+).*;.*\bextra\s*==\s*["'](?P<extra>[^"']+)""")


def _extra_state(extra: str, names: list[str]) -> str:
    missing = [name for name in names if library_version(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} missing; pip install 'fewstep[{extra}]'"
    broken = [f"{name}: {why}" for name in names if (why := _import_error(name))]
    if broken:
        return f"installed but not usable: {'; '.join(broken)}"
    return "usable: " + ", ".join(f"{name} {library_version(name)}" for name in names)


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # a package may fail its import with anything, and doctor is there to say so
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
