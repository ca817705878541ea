"""What every benchmark writes beside its numbers, and how: the machine, the command, and files that are never half-written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fewstep.artifact import write_bytes
from fewstep.eval.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Versions, processor and the load of the machine now: a timing without its load average says little."""
    return {
        **environment(),
        "processor": processor(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def processor() -> str:
    """The processor's name; Linux keeps it from ``platform.processor``."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def provenance(about: Mapping[str, Any]) -> str:
    """One paragraph under a table: where its numbers come from."""
    libraries = ", ".join(f"{name} {about['libraries'][name]}" for name in ("torch", "diffusers", "numpy"))
    load = f", load average at the start {about['load_average']}" if about["load_average"] else ""
    return (
        f"{about['date']}, fewstep {about['fewstep']}, Python {about['python']}, {libraries}; "
        f"{about['processor']}, {about['cores']} cores{load}. `{about['command']}`\n"
    )


def write(folder: Path, name: str, body: Mapping[str, Any], page: str) -> None:
    """``name``.json for programs and ``name``.md for people, each atomically."""
    write_bytes(folder / f"{name}.json", (_json(body) + "\n").encode())
    write_bytes(folder / f"{name}.md", page.encode())


def _json(body: Mapping[str, Any]) -> str:
    """A line for every key, and for every entry of a list of records: numbers stay together, and a diff says something."""

    def value(v: Any) -> str:
        if isinstance(v, list) and v and isinstance(v[0], dict):
            return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in v) + "\n ]"
        return json.dumps(v)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {value(v)}" for key, v in body.items()) + "\n}"
