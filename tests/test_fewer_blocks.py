"""A count on few blocks is that of all, whatever kinds there are. Real models: tests/test_plan_command.py."""

from __future__ import annotations

import pytest
from torch import nn

from g2rpo_trainer.cost import fewer_blocks
from g2rpo_trainer.cost.fewer_blocks import Run, extrapolated, runs


class Model(nn.Module):
    """Blocks of two widths in one list, of one in another, and what is no list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.ModuleList([nn.Linear(4, 4 if i < 7 else 6) for i in range(9)])
        self.single = nn.ModuleList([nn.Linear(8, 8) for _ in range(20)])
        self.out = nn.Linear(3, 3)
        self.counted, self.known = 0, False

    def passes(self) -> list[int]:
        """Count numbers and blocks; the first time a table comes on top."""
        blocks = [*self.joint, *self.single]
        self.counted += len(blocks)
        table, self.known = 0 if self.known else 1000, True
        return [sum(p.numel() for p in self.parameters()) + table, 5 * len(blocks) + 1]


def test_runs_are_equal_blocks_in_a_row() -> None:
    assert runs(Model()) == [Run("joint", 0, 7), Run("joint", 7, 2), Run("single", 0, 20)]


def test_what_few_take_tells_what_all_take() -> None:
    model = Model()
    lists = model.joint, model.single
    assert extrapolated(model, model.passes) == Model().passes()
    assert model.counted < 4 * 8, "and a fraction of the blocks is counted"
    assert (model.joint, model.single) == lists


def test_the_blocks_come_back_after_a_failure() -> None:
    model = Model()
    with pytest.raises(ZeroDivisionError):
        extrapolated(model, lambda: [1 // 0])
    assert [len(model.joint), len(model.single)] == [9, 20]


def test_a_model_of_few_blocks_is_counted_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer_blocks, "FEW", 20)
    model = Model()
    assert extrapolated(model, model.passes) == Model().passes()
