"""Run by each of several processes: trains by a recipe into a folder, and collectives give up after as many
seconds as are named.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from g2rpo_trainer.config.reading import load
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

recipe, out, seconds = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=float(seconds)))
train(load(recipe, []), Path(out), progress=Silent())
dist.destroy_process_group()
