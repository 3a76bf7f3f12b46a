"""Model families: one module each, that loads a model as a policy with its text encoding and its decoder."""

from __future__ import annotations

FAMILIES = ("sd3",)
