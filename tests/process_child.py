"""Run by each of several processes: trains by the recipe and into the folder that are named, where collectives
give up after few seconds.
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
