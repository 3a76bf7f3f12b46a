"""The rows of a run's metrics as they are written, each with the number of its line."""

from __future__ import annotations

from pathlib import Path

from comfy_g2rpo.files.safe import open_file
from comfy_g2rpo.run.folder import file_state

BLOCK = 2**20
"""Bytes that are read at once; a longer line is no row."""


class MetricLines:
    """Reads a file of metrics from behind a line on, and from its start again where it was written anew.

    Line 1 names the schema and is no row.
    """

    def __init__(self, place: Path, after: int = 0) -> None:
        self.place, self.last = place, max(after, 1)
        self._file = self._line = self._offset = 0

    def read(self) -> list[tuple[int, str]]:
        """Return some of the whole lines that have come; nothing where there are no more for now."""
        found: list[tuple[int, str]] = []
        try:
            with open_file(self.place) as file:
                which, size, _ = file_state(file.fileno())
                if which != self._file or size < self._offset:
                    # A run that goes on has its rows behind its checkpoint removed, and writes them again.
                    self._file, self._line, self._offset = which, 0, 0
                file.seek(self._offset)
                while not found and (block := file.read(BLOCK)):
                    *whole, rest = block.split(b"\n")
                    found = [row for row in map(self._numbered, whole) if row]
                    self._offset += len(block) - len(rest)
                    if not whole:
                        break
                    file.seek(self._offset)
        except OSError:
            pass
        return found

    def _numbered(self, line: bytes) -> tuple[int, str] | None:
        """Count a line, and return it if it is new."""
        self._line += 1
        if self._line <= self.last:
            return None
        self.last = self._line
        return self._line, line.decode("utf-8", "replace")
