"""``python -m fewstep.pipelines.zoo.training``: trains and exports the embedded models."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
