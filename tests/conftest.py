"""Settings that every test shares: one thread per process, no network, reproducible hypothesis, gpu tests
where a GPU is, and curves drawn where they are looked at.
"""

import os
import tempfile
from collections.abc import Iterator

# Before the first import of torch; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "MKL_CBWR", "AUTO"
)  # MKL may else sum in another order where a weight lies at another address, on some processors
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("G2RPO_PLANS", tempfile.mkdtemp(prefix="g2rpo-plans-"))

import plain_curves
import pytest
import torch
from comfy_host import base, comfyui, served  # noqa: F401
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu tests by name where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device: run `pytest -m gpu` on a machine that has one")
            )


@pytest.fixture(scope="module", autouse=True)
def _plain_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw curves.png in the files whose tests look at it; elsewhere write a pixel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in plain_curves.DRAWN:
            plain_curves.leave_out(patch)
        yield
