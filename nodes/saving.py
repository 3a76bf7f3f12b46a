"""The block that saves scored images: PNG files with their scores, and a table of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy.cli_args import args
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..comfy_g2rpo.files.captions import CHUNK
from ..comfy_g2rpo.files.csv_table import csv_bytes
from ..comfy_g2rpo.files.safe import FileError, finite, write_bytes
from .host.comfyui import checked_name, contained
from .inputs.checks import check_inputs, check_number
from .inputs.finding import offered
from .inputs.judging import MAX_IMAGES, best_first, check_count, one, rounded, scored_images
from .inputs.widgets import int_input, linked_text, output, scores_input, show
from .types import SCORING, ScoresData, ScoresWire

MAX_PARTS = 4  # folders and name of a prefix
MAX_NUMBER = 10**7
COMPRESSION = 4  # as core saves its images
HEADER = ("rank", "file", "name", "prompt", "score")


class SaveScoredImages(io.ComfyNode):
    """Images and their scores in ComfyUI's output directory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SaveScoredImages",
            display_name="Save Scored Images",
            category=SCORING,
            description="Save images, best first, with their scores in the PNG files and in a CSV table "
            "beside them. Overwrites nothing.",
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The images that were scored, in a batch or in a list; sizes may differ.",
                ),
                scores_input("Score Images or any other block"),
                io.String.Input(
                    "prefix",
                    default="scored/image",
                    tooltip="Folders and name of the files in the output directory, such as cats/best. Each "
                    "part: letters, digits, dots, dashes and underscores.",
                ),
                int_input("most", 0, 0, MAX_IMAGES, "Save so many of the best; 0 saves all."),
                ScoresWire.Input(
                    "details",
                    optional=True,
                    tooltip="From Score Images: every reward's own score and the prompts are written, too.",
                ),
                linked_text("names", "One name per image for the table, such as Load Image Folder gives."),
            ],
            outputs=[
                output(io.String, "files", "The files under the output directory.", many=True),
                output(io.String, "table", "The CSV file under the output directory."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )
        return offered(schema, "rank, csv, best of n, export scores")

    @classmethod
    def execute(
        cls,
        images: list[Tensor],
        scores: list[float],
        prefix: list[str],
        most: list[int],
        details: list[ScoresData] | None = None,
        names: list[str] | None = None,
    ) -> io.NodeOutput:
        """Number the files from the best to the worst and write them."""
        check_inputs(cls, locals())
        pictures, values = scored_images(images, scores)
        check_count("names", names, len(pictures))
        about = None if details is None else checked_details(one("details", details), len(pictures))
        place = prefix_place(one("prefix", prefix))
        check_number("most", one("most", most), 0, MAX_IMAGES, whole=True)
        count = most[0] or len(pictures)
        order = best_first(values)[:count]
        core = {} if args.disable_metadata else core_notes(cls)
        files, rows, columns = [], [], () if about is None else about.names
        for rank, i in enumerate(order, 1):
            throw_exception_if_processing_interrupted()
            note = note_of(i, rank, len(pictures), values[i], about)
            chunks = {} if args.disable_metadata else {**core, CHUNK: json.dumps(finite(note))}
            file = write_new(place, png_bytes(pictures[i], i, chunks), "_.png")
            files.append(file)
            parts = [] if about is None else about.values[:, i].tolist()
            name = "" if names is None else names[i]
            rows.append((rank, file.name, name, note["prompt"], values[i], *parts))
        table = write_new(place, csv_bytes((*HEADER, *columns), rows), "_scores.csv")
        return io.NodeOutput(*named(files, table), ui=ui_of(cls, files, table))


def checked_details(details: ScoresData, count: int) -> ScoresData:
    """Return the details; raise ValueError unless they belong to as many images."""
    if details.values.ndim != 2 or details.values.shape != (len(details.names), count):
        found = details.values.shape[-1] if details.values.ndim else 0
        raise ValueError(
            f"details holds {found} images and images {count}; connect the details of the same Score Images"
        )
    return details


def prefix_place(prefix: str) -> Path:
    """Return the output directory's folder and the beginning of the files' names that a prefix gives."""
    parts = prefix.strip().split("/")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"prefix has {len(parts)} parts; at most {MAX_PARTS} are allowed, such as cats/best")
    checked = [checked_name(part, "prefix") for part in parts]
    return contained(Path(folder_paths.get_output_directory()), "/".join(checked), "prefix")


def core_notes(block: type[io.ComfyNode]) -> dict[str, str]:
    """Return what core writes into its PNG files: the prompt, and what the page sends along."""
    prompt, more = (getattr(block.hidden, name, None) for name in ("prompt", "extra_pnginfo"))
    notes = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return notes | {str(key): json.dumps(value) for key, value in (more or {}).items()}


def note_of(i: int, rank: int, of: int, score: float, about: ScoresData | None) -> dict[str, Any]:
    """Return what a file says about its scores."""
    note: dict[str, Any] = {"score": score, "rank": rank, "of": of, "prompt": ""}
    if about is not None:
        note["scores"] = dict(zip(about.names, about.values[:, i].tolist(), strict=True))
        note["prompt"] = about.prompts[i] if len(about.prompts) > i else about.prompt
        note |= {"weights": list(about.weights), "mix": about.mix} if len(about.names) > 1 else {}
    return note


def png_bytes(image: Tensor, number: int, chunks: dict[str, str]) -> bytes:
    """Encode an image [H, W, C] with text chunks; a broken one is saved black where it is broken."""
    pixels = rounded(image[None, ..., :3], number)[0].nan_to_num(0.0)
    info = PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    buffer = BytesIO()
    Image.fromarray((pixels.cpu().numpy() * 255).round().astype(np.uint8)).save(
        buffer, "PNG", pnginfo=info, compress_level=COMPRESSION
    )
    return buffer.getvalue()


def write_new(place: Path, content: bytes, ending: str) -> Path:
    """Write <place>_<number><ending> with a number above all that are there, and never replace a file."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for number in range(next_number(place), MAX_NUMBER):
            file = place.with_name(f"{place.name}_{number:05d}{ending}")
            try:
                # Taking the name first keeps everybody else off it; the content then comes as a whole.
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            try:
                write_bytes(file, content)
            except FileError:
                file.unlink(missing_ok=True)
                raise
            return file
    except OSError as error:
        raise FileError(
            f"prefix: cannot write {place.name}: {(error.strerror or str(error)).lower()}; choose "
            "another prefix"
        ) from error
    raise FileError(f"prefix: all numbers of {place.name} are taken; choose another prefix")


def next_number(place: Path) -> int:
    """Return one more than the highest number of the files that begin alike."""
    others = place.parent.glob(f"{place.name}_*")
    found = [re.match(r"\d{1,7}(?=_|\Z)", other.name[len(place.name) + 1 :], re.ASCII) for other in others]
    return 1 + max((int(match[0]) for match in found if match), default=0)


def named(files: Sequence[Path], table: Path) -> tuple[list[str], str]:
    """Return the names of files as the output directory lists them."""
    root = os.path.realpath(folder_paths.get_output_directory())
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file in (*files, table)]
    return names[:-1], names[-1]


def ui_of(block: type[io.ComfyNode], files: Sequence[Path], table: Path) -> dict[str, Any]:
    """Show the saved images in the block, as core's Save Image does."""
    root = os.path.realpath(folder_paths.get_output_directory())
    show(block, f"{len(files)} images saved, best first; their scores: {table.name}")
    folder = os.path.relpath(files[0].parent, root).replace(os.sep, "/").removeprefix(".")
    return {"images": [{"filename": file.name, "subfolder": folder, "type": "output"} for file in files]}


NODES: list[type[io.ComfyNode]] = [SaveScoredImages]
