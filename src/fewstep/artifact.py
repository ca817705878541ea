"""Files that plans and grids are kept in: JSON that a person can read, beside safetensors for arrays; never pickle.

A file is written beside its name and then renamed, so a reader sees the old one or the whole new one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1


def write_bytes(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` by ``data`` atomically; a missing folder is made.

    Args:
        path: the file.
        data: all of it.
        durable: return only when it would survive a power cut. Without, the file may be gone or torn after one until
            :func:`sync` was called: for files with a checksum, of which there are many.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{uuid.uuid4().hex[:8]}"
    )  # open() keeps the user's umask, mkstemp does not
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable and os.name == "posix":  # the new name itself must survive a power cut
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Raise the OSError now that :func:`write_bytes` would raise after long work; the folder is made, the file is not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def sync(path: Path) -> None:
    """Wait until a file, or on POSIX the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, kind: str, body: Mapping[str, Any]) -> None:
    """Write ``body`` with its ``kind`` and the schema version."""
    write_bytes(path, _document(kind, body))


def _document(kind: str, body: Mapping[str, Any]) -> bytes:
    text = json.dumps({"kind": kind, "schema_version": SCHEMA_VERSION, **body}, indent=2, allow_nan=False)
    return text.encode() + b"\n"


def read_json(path: str | Path, kind: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Raises:
        ArtifactError: missing, not JSON, of another kind or version, or with missing or unknown keys.
    """
    try:
        data = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of too many digits
        raise ArtifactError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(f"{path} holds {found!r}, a {kind} is needed")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {data.get('schema_version')!r}; this fewstep reads version {SCHEMA_VERSION}"
        )
    body = {k: v for k, v in data.items() if k not in ("kind", "schema_version")}
    if missing := [k for k in required if k not in body]:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}")
    if extra := sorted(set(body) - {*required, *optional}):
        raise ArtifactError(f"{path} has unknown keys {', '.join(extra)}")
    return body


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    data: bytes = save({k: v.detach().contiguous() for k, v in tensors.items()})
    return data


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` as safetensors, atomically; returns the sha256 of the file."""
    data = _packed(tensors)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def write_with_tensors(path: str | Path, kind: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``body`` as JSON and ``tensors`` as safetensors beside it, as one artifact.

    The arrays' file is named after their hash and written first, the JSON that names it last: at any moment ``path`` is
    the whole old artifact or the whole new one. The old one's arrays are removed at the end.
    """
    path = Path(path)
    data = _packed(tensors)
    digest = hashlib.sha256(data).hexdigest()
    arrays = path.with_name(f"{path.stem}-{digest[:12]}.safetensors")
    document = _document(kind, {**body, "arrays": arrays.name, "arrays_sha256": digest})
    write_bytes(arrays, data)
    write_bytes(path, document)
    for old in path.parent.glob(f"{glob.escape(path.stem)}-{'[0-9a-f]' * 12}.safetensors"):
        if old != arrays:
            old.unlink(missing_ok=True)


def read_tensors(path: str | Path, sha256: str, required: Sequence[str]) -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        ArtifactError: missing, other bytes than were written, or an array missing or too many.
    """
    from safetensors.torch import load

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path} is damaged or belongs to another file: its sha256 is not the recorded one")
    tensors: dict[str, Tensor] = load(data)
    if missing := [k for k in required if k not in tensors]:
        raise ArtifactError(f"{path} lacks the arrays {', '.join(missing)}")
    if extra := sorted(set(tensors) - set(required)):
        raise ArtifactError(f"{path} has unknown arrays {', '.join(extra)}")
    return tensors
