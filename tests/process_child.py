"""Run by each of several processes: trains by a recipe into a folder, and collectives give up after as many
seconds as are named.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def main(recipe: str, out: str, seconds: str) -> None:
    """Meet before what takes long to import, for that wait is as short."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(seconds)))
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.reports.progress import Silent
    from g2rpo_trainer.run import train

    train(load(recipe, []), Path(out), progress=Silent())
    dist.destroy_process_group()


main(*sys.argv[1:])
