"""How much fits into memory at once, halved where it runs out; results do not depend on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..speed.fitting_batch import Limit
from .pace import Pace


@dataclass
class Limits:
    """How many rows a rollout's forward, a decoding and an update's pass take at once."""

    slots: Limit
    decode_batch: Limit
    micro_batch: Limit
    said: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pace: Pace) -> Limits:
        """Begin with what is asked for."""
        return cls(Limit(pace.slots), Limit(pace.decode_batch), Limit(pace.micro_batch))

    def within(self, pace: Pace) -> Pace:
        """Return a pace that asks for no more than fits."""
        return dataclasses.replace(pace, **self.lowered())

    def lowered(self) -> dict[str, int]:
        """Return what memory has brought down, by name, and how much fits now."""
        limits = {"slots": self.slots, "decode_batch": self.decode_batch, "micro_batch": self.micro_batch}
        return {name: limit.rows for name, limit in limits.items() if limit.halvings}

    def news(self) -> str:
        """Say once what has come down; nothing where nothing has since the last time."""
        now = self.lowered()
        fresh = [f"{name} is {rows} from now on" for name, rows in now.items() if self.said.get(name) != rows]
        self.said = now
        return f"memory ran out: {', '.join(fresh)}; results stay the same" if fresh else ""
