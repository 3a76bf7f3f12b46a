"""`g2rpo vote`: a page on which people vote, their votes back into the run, and out of it as pairs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import answer
from .arguments import CommandError

if TYPE_CHECKING:
    from comfy_g2rpo.votes.ballots import Ballot
    from comfy_g2rpo.votes.strengths import Votes

MODULES = ("dom.mjs", "ballot.mjs", "vote_page.mjs")
MAX_FILE = 2**26  # bytes of a file of votes
MAX_PNG = 200_000  # bytes; a larger picture is shown as JPEG
JPEG_QUALITY = 92
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --fg-color: #222; --comfy-input-bg: #ddd; --comfy-menu-bg: #f5f5f5; }
@media (prefers-color-scheme: dark) { :root { --fg-color: #ddd; --comfy-input-bg: #222;
  --comfy-menu-bg: #2b2b2b; } }
body { max-width: 1200px; margin: 0 auto; padding: 16px; background: Canvas; color: CanvasText;
  font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 20px; } h2 { margin: 24px 0 6px; font-size: 16px; }
html { scrollbar-gutter: stable; }
.g2rpo-ballot { height: auto; min-height: 0; } .g2rpo-ballot .g2rpo-run { display: none; }
.g2rpo-choices { flex: none; grid-template-columns: repeat(auto-fill, minmax(min(160px, 45%), 1fr));
  min-height: 0; overflow: visible; }
footer { position: sticky; bottom: 0; display: flex; flex-wrap: wrap; gap: 10px; align-items: center;
  padding: 10px 0; background: Canvas; }
#state { margin-right: auto; } #voter { width: 190px; } #save { padding: 6px 14px; font: inherit; }
"""


def vote(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    take: Annotated[
        Path | None,
        typer.Option(metavar="VOTES.JSON", help="Add the votes that the page has saved to the run."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="PAIRS.JSONL", help="Write all votes of the run as pairs of pictures."),
    ] = None,
) -> None:
    """Write RUN/vote.html, on which people vote on the groups that the run waits for."""
    if take and export:
        raise CommandError("--take and --export exclude each other; give one after the other")
    from comfy_g2rpo.files.safe import write_bytes
    from comfy_g2rpo.run.folder import RunFolder
    from comfy_g2rpo.votes import ballots

    RunFolder.open(run)
    if export:
        typer.echo(f"{(count := ballots.export(run, export))} pairs: {export}")
        answer({"pairs": count, "file": export})
        return
    taken = None
    if take:
        taken = accept(run, take)
        typer.echo(f"votes added to {ballots.votes_file(run)}: {taken}")
    waiting = ballots.open_ballots(run)
    place = Path(run) / "vote.html" if waiting and not take else None
    if not waiting:
        typer.echo(f"no group waits for votes; continue with: g2rpo resume {shlex.quote(str(run))}")
    elif take:
        typer.echo(f"groups that still wait for votes: {len(waiting)}")
    else:
        write_bytes(place, page(Path(run).resolve().name, waiting).encode())
        typer.echo(
            f"groups that wait for votes: {len(waiting)}; open {place}, save votes.json there, then: g2rpo "
            f"vote {run} --take votes.json"
        )
    answer({"waiting": len(waiting), "added": taken, "file": place})


def accept(run: Path, file: Path) -> int:
    """Add the votes of a file to a run, all or none of them; return how many are new."""
    from comfy_g2rpo.votes import ballots

    shown = {(frozenset(ballot.files), ballot.prompt) for ballot in ballots.read_ballots(run)}
    found = read_votes(file)
    for number, votes in enumerate(found, start=1):
        if (frozenset(votes.pictures), votes.prompt) not in shown:
            raise CommandError(
                f"{file}, vote {number} is on pictures that {run} has not shown; take it into the run "
                "whose page it is from"
            )
    known = ballots.read(run)
    new = [votes for votes in dict.fromkeys(found) if votes not in known]
    for votes in new:
        ballots.append(run, votes)
    return len(new)


def read_votes(file: Path) -> list[Votes]:
    """Read a file of votes and check every one."""
    from comfy_g2rpo.votes.ballots import SCHEMA
    from comfy_g2rpo.votes.strengths import from_table

    try:
        if file.stat().st_size > MAX_FILE:
            raise CommandError(
                f"{file} has more than {MAX_FILE // 2**20} MiB; give the file that the page has saved"
            )
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise CommandError(
            f"cannot read {file}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    except CommandError:
        raise
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{file} is not JSON; give the file that the page has saved") from error
    tables = content.get("votes") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(tables, list):
        raise CommandError(f"{file} is no file of votes ({SCHEMA}); give the file that the page has saved")
    return [from_table(table, f"{file}, vote {number}") for number, table in enumerate(tables, start=1)]


def page(run: str, waiting: list[Ballot]) -> str:
    """Return the page: one file with its pictures, which needs no server and loads nothing."""
    from comfy_g2rpo.votes.ballots import SCHEMA

    from ..config.bundled import bundled_folder

    web = bundled_folder("web")
    sources = [(web / name).read_text("utf-8") for name in MODULES]
    script = "\n".join(re.sub(r"^import .*\n|^export ", "", source, flags=re.MULTILINE) for source in sources)
    groups = []
    for each in waiting:
        pictures = [{"key": key, "src": picture(file)} for key, file in each.files.items()]
        groups.append({"prompt": each.prompt, "pictures": pictures})
    # Nothing that a prompt may hold ends the element.
    data = json.dumps({"schema": SCHEMA, "run": run, "groups": groups}).replace("<", "\\u003c")
    parts = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Votes</title>',
        '<meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<style>{(web / 'g2rpo.css').read_text('utf-8')}{STYLE}</style>\n<body>",
        f'<script type="application/json" id="groups">{data}</script>',
        f'<script type="module">\n{script}</script>\n</body>\n</html>\n',
    )
    return "\n".join(parts)


def picture(file: Path) -> str:
    """Return a picture as a data address."""
    import base64
    from io import BytesIO

    from PIL import Image

    kind, content = "png", file.read_bytes()
    if len(content) > MAX_PNG:
        buffer = BytesIO()
        with Image.open(file) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
        kind, content = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
