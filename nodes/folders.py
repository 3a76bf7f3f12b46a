"""The block that loads images from a folder of ComfyUI's input directory, with their names and prompts."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import io
from torch import Tensor
from torch.nn.functional import interpolate

from ..comfy_g2rpo.files.captions import caption_of
from ..comfy_g2rpo.files.picture_files import PictureError, listed, read, size_of
from ..comfy_g2rpo.files.safe import stamps
from .host.comfyui import contained
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.judging import MAX_IMAGES, harmless
from .inputs.widgets import int_input, node_id, output, show
from .types import SCORING

HERE = "(input)"
MAX_FOLDERS = 1000
MAX_PIXELS = 2**28  # of what one run loads: 3 GB
MAX_NAMED = 20  # files in a report


def choices() -> list[str]:
    """List the folders in the input directory, and the directory itself."""
    return [HERE, *folder_paths.get_input_subfolders()[:MAX_FOLDERS]]


def place_of(folder: str) -> Path:
    """Return a listed folder; refuse a link out of the input directory."""
    base = Path(folder_paths.get_input_directory())
    return base if folder == HERE else contained(base, folder, "folder")


def pictures_of(folder: str, deep: bool) -> list[Path]:
    """List a folder's pictures by name."""
    return listed(place_of(folder), deep)


class LoadImageFolder(io.ComfyNode):
    """The images of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_LoadImageFolder",
            display_name="Load Image Folder",
            category=SCORING,
            description="Load the images of a folder in ComfyUI's input directory, one by one: sizes may "
            "differ. Finds their prompts, too.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=choices(),
                    tooltip="A folder in the input directory; (input) is that directory itself.",
                ),
                io.Boolean.Input("deep", default=False, tooltip="Also take the folders in that folder."),
                int_input("skip", 0, 0, 1_000_000, "Leave out so many images at the beginning, by name."),
                int_input("most", 64, 1, MAX_IMAGES, "Load at most so many images."),
                int_input(
                    "max_side",
                    2048,
                    64,
                    16384,
                    "Larger images are made smaller until their longer side is this, in pixels; that "
                    "changes what rules measure.",
                ),
            ],
            outputs=[
                output(io.Image, "images", "The images, by name; alpha is left out.", many=True),
                output(io.String, "names", "Their file names.", many=True),
                output(
                    io.String,
                    "prompts",
                    "Their prompts: from Save Scored Images, a .txt beside the file, or the PNG's own "
                    "graph; blank if unknown.",
                    many=True,
                ),
                output(io.String, "report", "How many were loaded, and which could not be read."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema, "batch load images, directory, dataset, load images", rare="deep, skip, max_side"
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: str, deep: bool = False, skip: int = 0, most: int = 64, max_side: int = 2048
    ) -> str:
        """Return what changes where a file has come, gone or changed."""
        try:
            seen = stamps(pictures_of(str(folder), bool(deep)))
        except (ValueError, OSError) as error:
            seen = str(error)
        return hashlib.sha256(seen.encode(errors="replace")).hexdigest()

    @classmethod
    def execute(cls, folder: str, deep: bool, skip: int, most: int, max_side: int) -> io.NodeOutput:
        """Read the images; name and leave out what cannot be read."""
        check_inputs(cls, locals())
        every = pictures_of(folder, deep)
        chosen = every[skip : skip + most]
        if not chosen:
            raise ValueError(
                f"folder {harmless(folder)!a} holds {len(every)} images, and skip leaves none; put "
                "images there or lower skip"
            )
        images, names, prompts, broken = [], [], [], []
        pixels = 0
        bar = comfy.utils.ProgressBar(len(chosen), node_id=node_id(cls))
        for path in chosen:
            throw_exception_if_processing_interrupted()
            name = os.path.relpath(path, place_of(folder)).replace(os.sep, "/")
            try:
                width, height = size_of(path)
                shrink = min(1.0, max_side / max(width, height))
                pixels += round(width * shrink) * round(height * shrink)
                if pixels > MAX_PIXELS:
                    limit = f"{MAX_PIXELS // 10**6} megapixels"
                    raise ValueError(
                        f"most is {most}, but {len(images) + 1} images are already above {limit}; "
                        "lower most or max_side"
                    )
                images.append(smaller(read(path), max_side)[None])
            except PictureError:
                broken.append(name)
                continue
            finally:
                bar.update(1)
            names.append(name)
            prompts.append(caption_of(path)[0])
        text = report(len(every), len(images), broken)
        if not images:
            raise ValueError(f"folder holds no image that can be read: {text}; put PNG or JPEG files there")
        if broken:
            logging.warning(
                "Load Image Folder: %d files cannot be read: %s",
                len(broken),
                [name[:200] for name in broken[:MAX_NAMED]],
            )
        return io.NodeOutput(images, names, prompts, text, ui=show(cls, text))


def smaller(image: Tensor, side: int) -> Tensor:
    """Shrink an image [H, W, 3] until its longer side is at most `side`."""
    height, width = image.shape[:2]
    if max(height, width) <= side:
        return image
    size = [max(round(length * side / max(height, width)), 1) for length in (height, width)]
    shrunk = interpolate(image.movedim(-1, 0)[None], size, mode="bicubic", antialias=True)[0].movedim(0, -1)
    return torch.clamp(shrunk, 0, 1)


def report(all_of_them: int, loaded: int, broken: list[str]) -> str:
    """Describe what was loaded and what was not; no page can take the names for markup."""
    lines = [f"{loaded} of {all_of_them} images loaded"]
    if broken:
        more = f" and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        lines.append(f"cannot be read: {', '.join(harmless(name) for name in broken[:MAX_NAMED])}{more}")
    return "; ".join(lines)


NODES: list[type[io.ComfyNode]] = [LoadImageFolder]
