"""Runs the headless trainer for graph.py: a recipe's run, clocked.

python graph_headless.py ADDRESS FOLDER [--set …]
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from stopwatch import Stopwatch

from comfy_g2rpo.run import loop
from g2rpo_trainer import run
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.reports.progress import Silent

address, folder, *settings = sys.argv[1:]
clock = Stopwatch(address)
clock.watch(loop)
run.learn, run.finish = loop.learn, loop.finish
run.listening = lambda progress, *given: nullcontext(
    progress
)  # no curves.png: the graph's page draws its own
run.train(load("demo", settings), Path(folder), progress=Silent())
clock.close()
