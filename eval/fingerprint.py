"""Content hashes: of JSON values, of tensors, of modules, of source files. All are sha256, in hex."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SHORT = 12  # hex digits in folder names; 48 bits make a clash among a sweep's cells impossible in practice


def canonical_json(value: Any) -> str:
    """``value`` as JSON with sorted keys and no spaces, so that equal values give equal text.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot say.
        TypeError: for a value that JSON has no form for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def of_json(value: Any) -> str:
    """Hash of a JSON value; the order of dictionary keys does not matter."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, whatever its device and dtype (NumPy has no bfloat16, bytes have)."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def of_module(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers. The code of its ``forward`` is not in it."""
    return of_tensors(module.state_dict().items())


def of_sources(folder: Path) -> str:
    """Hash of every ``.py`` file below ``folder``: changed code must not be taken for the code that made a result."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}|".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
