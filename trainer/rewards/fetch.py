"""Get a reward model's weights: pinned files from where they were published, checked by their hashes,
converted once, installed whole.

The only place of this project that downloads anything, and only when it is told to. A mirror stands in for
the hub by $HF_ENDPOINT and for GitHub's raw files by $G2RPO_GITHUB. No account is used: every file here is
public.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import write_json
from comfy_g2rpo.rewards.models.catalogue import Known, Published
from comfy_g2rpo.rewards.models.installed import load_installed
from comfy_g2rpo.rewards.models.safe_folder import Folder

from .prepare import EXAMPLES, prepare

CHUNK = 2**20
SECONDS = 60
MANIFEST = "reward.json"


class FetchError(ValueError):
    """A reward that cannot be fetched, in one line that says what to do."""


@dataclass(frozen=True)
class Sources:
    """Where published files come from."""

    hub: str = "https://huggingface.co"
    github: str = "https://raw.githubusercontent.com"

    @classmethod
    def from_environment(cls) -> Sources:
        """Take mirrors from the environment."""
        return cls(os.environ.get("HF_ENDPOINT") or cls.hub, os.environ.get("G2RPO_GITHUB") or cls.github)


def fetch(
    known: Known,
    root: Path,
    sources: Sources,
    *,
    accept_unpinned: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Download, check, convert and install a reward; an interruption keeps what has come."""
    place = root / known.name
    if place.exists():
        raise FetchError(
            f"{place} exists already; use it, or remove that folder first to fetch the reward again"
        )
    _refuse_unpinned(known, accept_unpinned)
    parts = root / f".fetching-{known.name}"
    try:
        _check_space(root, known)
        parts.mkdir(parents=True, exist_ok=True)
        examples = EXAMPLES.get(known.name, ())
        published = [*known.files, *(example.picture for example in examples)]
        found = {file.path: _download(file, parts, sources, say) for file in published}
        with tempfile.TemporaryDirectory(dir=parts, prefix="ready-") as ready:
            folder = Path(ready) / known.name
            folder.mkdir()
            say("converting")
            prepare(known, found, folder)
            write_json(folder / MANIFEST, _manifest(known, folder, published))
            say("checking that it loads")
            load_installed(Path(ready), known.name)
            os.chmod(folder, 0o755)
            os.replace(folder, place)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise FetchError(
            f"cannot write to {root}: {reason}; make room or choose another folder (--to)"
        ) from error
    shutil.rmtree(parts, ignore_errors=True)
    return place


def changed(root: Path, name: str) -> list[str]:
    """Name the files of an installed reward that are no longer what was installed."""
    folder = Folder.of(root, name)
    files = folder.json(MANIFEST).get("files", {})
    names = [str(file) for file in files] if isinstance(files, dict) else []
    return [
        file
        for file in names
        if not (folder.path / file).is_file() or sha256(folder.path / file) != files[file]
    ]


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _refuse_unpinned(known: Known, accept: bool) -> None:
    """Stop before anything is downloaded whose content nobody vouches for, unless the user does."""
    unpinned = [file.path for file in known.files if file.sha256 is None]
    if unpinned and not accept:
        at = next(file for file in known.files if file.sha256 is None)
        raise FetchError(
            f"no hash is known for {', '.join(unpinned)} of {at.repo}@{at.revision[:12]}, so nobody here "
            "vouches for the content; to take it as that revision has it, give --accept-unpinned (its hash "
            "is then written down and shown)"
        )


def _check_space(root: Path, known: Known) -> None:
    """Refuse a disk that cannot hold the downloads and what is made of them."""
    root.mkdir(parents=True, exist_ok=True)
    needed = sum(file.size or 0 for file in known.files) + known.gigabytes * 1e9
    free = shutil.disk_usage(root).free
    if free < needed:
        raise FetchError(
            f"{known.name} needs {needed / 1e9:.1f} GB in {root}, and {free / 1e9:.1f} GB are free; "
            "make room or give --to"
        )


def _download(file: Published, parts: Path, sources: Sources, say: Callable[[str], None]) -> Path:
    """Bring one file into a folder of its repository and revision, and check it."""
    folder = parts / file.repo.replace("/", "--") / file.revision
    target = folder / file.path
    if not target.is_file():
        say(
            f"downloading {file.repo}/{file.path}"
            + (f" ({file.size / 1e6:.0f} MB)" if file.size and file.size > 1e6 else "")
        )
        folder.mkdir(parents=True, exist_ok=True)
        (_from_hub if file.place == "hub" else _from_github)(file, folder, sources)
    digest = sha256(target)
    if file.sha256 not in (None, digest):
        target.unlink()
        raise FetchError(
            f"{file.repo}/{file.path} is not the pinned file: its SHA-256 is {digest}, not {file.sha256}; "
            "it was removed, fetch again, and distrust the source if this stays"
        )
    if file.sha256 is None:
        say(f"not pinned: {file.repo}/{file.path} has SHA-256 {digest}")
    return target


def _from_hub(file: Published, folder: Path, sources: Sources) -> None:
    """Download a file of a Hugging Face repository; huggingface_hub goes on where it was interrupted."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise FetchError(
            "fetching needs huggingface_hub; install it with: pip install 'g2rpo[trainer]'"
        ) from error
    try:
        hf_hub_download(
            file.repo, file.path, revision=file.revision, local_dir=folder, endpoint=sources.hub, token=False
        )
    # huggingface_hub and the clients under it raise errors of many kinds for what a network can do.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise FetchError(
            f"cannot download {file.repo}/{file.path} from {sources.hub}: {reason}; try again, it goes on"
        ) from error


def _from_github(file: Published, folder: Path, sources: Sources) -> None:
    """Download a small file of a GitHub repository."""
    address = f"{sources.github}/{file.repo}/{file.revision}/{urllib.request.quote(file.path)}"
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as answer, open(part, "wb") as out:
            shutil.copyfileobj(answer, out, CHUNK)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise FetchError(
            f"cannot download {address}: {' '.join(str(error).split())[:300]}; try again"
        ) from error
    os.replace(part, target)


def _manifest(known: Known, folder: Path, published: Sequence[Published]) -> dict[str, Any]:
    """Return what was installed and where it came from."""
    first = known.files[0]
    installed = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "kind": known.kind,
        "source": first.repo,
        "revision": first.revision,
        "published": [f"{file.repo}@{file.revision}/{file.path}" for file in published],
        "unpinned": [file.path for file in published if file.sha256 is None],
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in installed},
    }
