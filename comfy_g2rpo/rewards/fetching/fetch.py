"""Get reward models: pinned files from where they were published, checked by their hashes, converted once,
installed whole.

For whoever runs a command: `g2rpo rewards fetch`, or the pack's own fetch_rewards.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...files.one_writer import one_writer
from ...files.safe import RunError, digest_of, folder_on_disk, write_json
from ...options import nearest
from ..models.catalogue import KNOWN, Known, Published
from ..models.installed import load_installed
from ..models.safe_folder import Folder
from .download import FetchError, Sources, download, on_terminal
from .prepare import EXAMPLES, prepare

MANIFEST = "reward.json"
PARTS = ".fetching"
READY = "ready-"


def fetch(
    names: Sequence[str],
    root: Path,
    sources: Sources,
    *,
    accept_unpinned: bool = False,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Download, check, convert and install reward models; an interruption keeps what has come.

    Raise FetchError, before anything is downloaded, for a name that is unknown or installed, a file that is
    not pinned, or a disk without room.
    """
    wanted = [_known(name) for name in dict.fromkeys(names)]
    for known in wanted:
        if (root / known.name).exists():
            raise FetchError(
                f"{root / known.name} exists already; use it, or remove that folder first to fetch the "
                "reward again"
            )
        _refuse_unpinned(known, accept_unpinned)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with one_writer(root / PARTS):
            _install_all(wanted, root, sources, say)
    except (OSError, SafetensorError, RunError) as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        if cause is None:
            raise
        reason = (getattr(cause, "strerror", None) or str(cause)).lower()
        raise FetchError(
            f"cannot write to {root}: {reason}; make room or choose another folder (--to)"
        ) from error
    return [root / known.name for known in wanted]


def changed(root: Path, name: str) -> list[str]:
    """Name the files of an installed reward that are no longer what was installed."""
    folder = Folder.of(root, name)
    files = folder.json(MANIFEST).get("files", {})
    names = [str(file) for file in files] if isinstance(files, dict) else []
    return [
        file
        for file in names
        if not (folder.path / file).is_file() or digest_of(folder.path / file) != files[file]
    ]


def begun(root: Path, known: Known) -> int:
    """Return how many bytes of a reward have come by a download that was interrupted."""
    return sum(_come(_target(root / PARTS, file)) for file in known.files)


def _known(name: str) -> Known:
    """Find a reward model by its name."""
    if name not in KNOWN:
        guess = nearest(name[:80].lower(), KNOWN)
        raise FetchError(f"reward model {name[:80]!a} is unknown{guess}; known: {', '.join(KNOWN)}")
    return KNOWN[name]


def _published(known: Known) -> list[Published]:
    """List the files that a reward is made of, examples included."""
    return [*known.files, *(example.picture for example in EXAMPLES.get(known.name, ()))]


def _install_all(wanted: Sequence[Known], root: Path, sources: Sources, say: Callable[[str], None]) -> None:
    """Install rewards one after another; a file that several are made of comes once."""
    parts = root / PARTS
    try:
        for leftover in parts.glob(f"{READY}*"):
            shutil.rmtree(leftover)
        for place, known in enumerate(wanted):
            _check_space(known, root, parts)
            say(f"{known.title}: {known.licence}")
            _install(known, root, sources, say)
            further = [file for each in wanted[place + 1 :] for file in _published(each)]
            for file in set(_published(known)) - set(further):
                _target(parts, file).unlink(missing_ok=True)
            say(f"installed in {root / known.name}")
    finally:
        for folder in sorted((path for path in parts.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()  # only where it is empty


def _install(known: Known, root: Path, sources: Sources, say: Callable[[str], None]) -> None:
    """Bring one reward's files, convert them, see that it loads, and move it into its place."""
    parts, published = root / PARTS, _published(known)
    found = {file.path: _download(file, parts, sources, say) for file in published}
    with tempfile.TemporaryDirectory(dir=parts, prefix=READY) as ready:
        folder = Path(ready) / known.name
        folder.mkdir()
        say("converting")
        prepare(known, found, folder)
        write_json(folder / MANIFEST, _manifest(known, folder, published))
        say("checking that it loads")
        load_installed(Path(ready), known.name)
        for path in folder.rglob("*"):
            _on_disk(path)
        os.chmod(folder, 0o755)
        folder_on_disk(folder)
        os.replace(folder, root / known.name)
        folder_on_disk(root)


def _on_disk(path: Path) -> None:
    """Have a written file or folder on the disk before it gets its name."""
    if path.is_dir():
        folder_on_disk(path)
    else:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


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


def _check_space(known: Known, root: Path, parts: Path) -> None:
    """Refuse a disk that cannot hold what is still to come and what is made of it."""
    needed = sum(max(0, (file.size or 0) - _come(_target(parts, file))) for file in known.files)
    needed += known.gigabytes * 1e9
    free = shutil.disk_usage(root).free
    if free < needed:
        raise FetchError(
            f"{known.name} needs {needed / 1e9:.1f} GB in {root}, and {free / 1e9:.1f} GB are free; "
            "make room or give --to"
        )


def _target(parts: Path, file: Published) -> Path:
    """Return where a download goes, by repository and revision."""
    return parts / file.repo.replace("/", "--") / file.revision / file.path


def _come(target: Path) -> int:
    """Return how many bytes of a download are there."""
    with suppress(OSError):
        return target.stat().st_size
    with suppress(OSError):
        return target.with_name(f"{target.name}.part").stat().st_size
    return 0


def _download(file: Published, parts: Path, sources: Sources, say: Callable[[str], None]) -> Path:
    """Bring one file, and check it."""
    target = _target(parts, file)
    if not target.is_file():
        size = f" ({file.size / 1e6:.0f} MB)" if file.size and file.size > 1e6 else ""
        say(f"{'going on with' if _come(target) else 'downloading'} {file.repo}/{file.path}{size}")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(sources.address(file), target, on_terminal)
    digest = digest_of(target)
    if file.sha256 not in (None, digest):
        target.unlink()
        raise FetchError(
            f"{file.repo}/{file.path} is not the pinned file: its SHA-256 is {digest}, not {file.sha256}; "
            "it was removed, fetch again, and distrust the source if this stays"
        )
    if file.sha256 is None:
        say(f"not pinned: {file.repo}/{file.path} has SHA-256 {digest}")
    return target


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
        "files": {path.relative_to(folder).as_posix(): digest_of(path) for path in installed},
    }
