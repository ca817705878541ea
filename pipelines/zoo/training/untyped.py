"""diffusers as a value of type Any: its models are only half annotated, and half a type is worse than none."""

from __future__ import annotations

from typing import Any

import diffusers as _diffusers

diffusers: Any = _diffusers
