"""Get reward models for this pack, by a command and never from a graph:

    python custom_nodes/<this pack>/fetch_rewards.py                        what there is
    python custom_nodes/<this pack>/fetch_rewards.py pickscore aesthetic    get two of them

It runs in ComfyUI's own Python and needs nothing that is not there. ComfyUI neither imports nor runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PACK = Path(os.path.abspath(__file__)).parent


def find_package() -> None:
    """Import `comfy_g2rpo` from this pack, whatever Python's path is.

    The path is left without this folder, as its `nodes` would stand before ComfyUI's module of that name.
    """
    elsewhere = [place for place in sys.path if os.path.realpath(place) != os.path.realpath(PACK)]
    sys.path[:] = [str(PACK), *elsewhere]
    import comfy_g2rpo  # noqa: F401

    sys.path[:] = elsewhere


def list_rewards(root: Path) -> None:
    """Print every reward model with its size, its licence, and whether it is installed."""
    from comfy_g2rpo.rewards.fetching.fetch import begun
    from comfy_g2rpo.rewards.models.installed import KNOWN, installed

    present = installed(root)
    print(f"reward models in {root}:")
    for known in KNOWN.values():
        state = "installed" if known.name in present else "begun" if begun(root, known) else "-"
        print(f"  {known.name:<17} {state:<10} {known.gigabytes:>4} GB  {known.title}: {known.licence}")
    for name in present:
        if name not in KNOWN:
            print(f"  {name:<17} installed  yours")
    print("get them by their names, one or more, after this command")


def main(words: Sequence[str] | None = None) -> int:
    """List reward models, or get those that are named; return the exit status."""
    parser = argparse.ArgumentParser(description="Get reward models for the G²RPO blocks of ComfyUI.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="reward models; without one, list them all")
    parser.add_argument("--to", type=Path, help="folder of reward models [default: models/g2rpo_rewards]")
    parser.add_argument(
        "--mirror",
        help="web address that stands in for the hub and for GitHub [default: $HF_ENDPOINT, $G2RPO_GITHUB]",
    )
    given = parser.parse_args(words)
    find_package()
    from comfy_g2rpo.rewards.fetching.download import FetchError, Sources
    from comfy_g2rpo.rewards.fetching.fetch import fetch
    from comfy_g2rpo.rewards.models.installed import beside

    try:
        root = given.to.expanduser().absolute() if given.to else beside(PACK)
        if root is None:
            raise FetchError(f"{PACK} does not lie in a ComfyUI's custom_nodes; say where to by --to FOLDER")
        if not given.names:
            list_rewards(root)
            return 0
        fetch(given.names, root, Sources.chosen(given.mirror))
        print("press R in ComfyUI's page, then choose it in Load Reward")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
