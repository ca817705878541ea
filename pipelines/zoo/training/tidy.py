"""Makes an exported folder fit to be shipped."""

from __future__ import annotations

import json
from pathlib import Path


def tidy(folder: Path) -> None:
    """Drops the paths of the training machine from the configurations, and lets everyone read the files."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
