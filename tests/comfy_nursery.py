"""Run by a ComfyUI's own Python: imports once what every start of ComfyUI imports first, then forks a child
for each job that it reads.

A job is a line of JSON: `command` (a script and its arguments), `folder` to start in, `log` for all that it
prints. The answers are two
lines: the child's process id, and its exit code when it has ended. Nothing of ComfyUI itself is imported
before the fork.
"""

import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from contextlib import suppress

LIBRARIES = (
    "torch torch._dynamo torchvision.transforms torchaudio torchsde transformers transformers.modeling_utils "
    "scipy.stats scipy.ndimage scipy.integrate scipy.optimize aiohttp.web alembic.config av comfy_kitchen "
    "einops kornia.color OpenGL.GL PIL.Image pydantic safetensors.torch spandrel sqlalchemy.orm yaml"
)


def run(command: list[str], folder: str, log: str) -> None:
    """Become the job: a Python that has just started the script."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    os.dup2(1, 2)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print is no answer
for library in LIBRARIES.split():
    with suppress(Exception):  # each ComfyUI brings others
        importlib.import_module(library)
gc.freeze()
while job := sys.stdin.readline():
    child = os.fork()
    if not child:
        try:
            run(**json.loads(job))
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # a script that is done has left by itself
    print(child, file=answers)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
