"""The block that asks people: it shows a rollout's pictures, and nothing below it runs before a vote."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..comfy_g2rpo.files.safe import spelt_out
from ..comfy_g2rpo.run.folder import RunFolder
from ..comfy_g2rpo.votes.ballots import append, matching, read, votes_file, write_ballot
from ..comfy_g2rpo.votes.forks import keep_forks
from ..comfy_g2rpo.votes.strengths import MAX_PICTURES, Votes, parse, picture_key, scores
from .host.comfyui import known_run, run_place
from .host.open_run import plain_errors
from .inputs.checks import check_inputs
from .inputs.finding import offered
from .inputs.judging import checked_images, checked_prompt, rounded
from .inputs.widgets import name_input, output, rollout_prompt_input
from .types import SCORING, RolloutData, RolloutWire, ScoresData, ScoresWire

SHOWN_PROMPT = 500  # characters


class VoteRollout(io.ComfyNode):
    """People's judgement of a rollout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_VoteRollout",
            display_name="Vote (Human Preference)",
            category=SCORING,
            description="Let people judge a rollout: click the best picture first, then run again. Without "
            "votes nothing below runs.",
            inputs=[
                RolloutWire.Input("rollout", tooltip="The rollout that is judged."),
                io.Image.Input(
                    "pictures",
                    tooltip=f"Its decoded completions, {MAX_PICTURES} at most: from VAE Decode, or the "
                    "pictures of Score Rollout.",
                ),
                rollout_prompt_input("votes are kept with it"),
                io.String.Input(
                    "votes",
                    default="",
                    tooltip="Votes on the pictures that are shown, as the page writes them (JSON); those on "
                    "other pictures do not count.",
                ),
                name_input("run", "Run that keeps the votes: the same as in LoRA Policy. Blank keeps none."),
            ],
            outputs=[
                output(
                    ScoresWire,
                    "scores",
                    "Bradley–Terry strengths, for Advantages; nan for a picture that nobody compared.",
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )
        return offered(schema, "human feedback, rlhf, preference, rank, pick the best, rate")

    @classmethod
    def fingerprint_inputs(
        cls, rollout: Any = None, pictures: Any = None, prompt: str = "", votes: str = "", run: str = ""
    ) -> str:
        """Return what changes when the run has other votes, which may come from elsewhere."""
        return votes_stamp(run)

    @classmethod
    def execute(
        cls, rollout: RolloutData, pictures: Tensor, prompt: str, votes: str, run: str
    ) -> io.NodeOutput:
        """Show the pictures; return their scores, or block what comes after."""
        check_inputs(cls, locals())
        text, place = checked_prompt(prompt), run_of(run)
        images = group_of(rollout, pictures)
        keys = [picture_key(image) for image in images]
        shown = {key: image for key, image in zip(keys, images, strict=True) if key}
        if len(shown) < 2:
            raise ValueError(
                "pictures are all the same, or broken, so there is nothing to compare; look at the "
                "model and at group_size"
            )
        mine = dataclasses.replace(parse(votes), prompt=text) if votes.strip() else None
        # Votes on another group are of no use here, and do no harm.
        mine = mine if mine and set(mine.pictures) == set(shown) and mine.outcomes() else None
        found = [mine] if mine else []
        if place is not None:
            with plain_errors(place.name):
                found = kept(place, mine, shown, text, rollout, keys)
        page = {"g2rpo_ballot": [ballot(shown, text, found)]}
        if not found:
            logging.info("Vote: %d pictures wait for votes; nothing below runs until then", len(shown))
            return io.NodeOutput(ExecutionBlocker(None), ui=page)
        values = scores(keys, found)
        return io.NodeOutput(
            ScoresData(("votes",), (1.0,), values[None], text, images.nan_to_num(0.0)), ui=page
        )


def votes_stamp(run: Any) -> str:
    """Return what changes when a run has other votes; blank where it is none."""
    if not isinstance(run, str) or not run.strip():
        return ""
    kept = votes_file(run_place(run))
    return f"{kept.stat().st_mtime_ns} {kept.stat().st_size}" if kept.is_file() else ""


def run_of(run: str) -> Path | None:
    """Return the folder of the run that keeps the votes; None where there is none."""
    if not run.strip():
        return None
    return known_run(run, "write the one of LoRA Policy, or leave it blank").path


def group_of(rollout: RolloutData, pictures: Tensor) -> Tensor:
    """Return a rollout's pictures [images, H, W, 3] as their saved files would be."""
    images, count = checked_images([pictures], "pictures"), len(rollout.rollout.plan.images)
    if len(images) != count:
        raise ValueError(
            f"pictures holds {len(images)} images, the rollout {count} completions; connect its "
            "decoded completions"
        )
    if count > MAX_PICTURES:
        raise ValueError(
            f"pictures holds {count} images; people vote on at most {MAX_PICTURES}, lower group_size "
            "or branch_steps"
        )
    return rounded(torch.stack(images), 0).cpu()


def kept(
    place: Path,
    mine: Votes | None,
    shown: dict[str, Tensor],
    prompt: str,
    rollout: RolloutData,
    keys: Sequence[str],
) -> list[Votes]:
    """Keep new votes in the run, with their pictures and forks; return all that it has on this group."""
    if mine and mine not in read(place):
        run = RunFolder(place)
        newest = run.latest()
        step = int(newest.name) + 1 if newest else 1
        written = write_ballot(place, torch.stack(list(shown.values())), prompt, step)
        base = base_of(run.config().get("config"))
        keep_forks(written, keys, rollout.rollout, 0, range(len(keys)), base)
        append(place, mine)
    return matching(read(place), list(shown), prompt)


def base_of(config: Any) -> str:
    """Return what tells the model of a run from others, by its configuration."""
    model = spelt_out(spelt_out(config).get("model"))
    return ", ".join(str(model.get(name, "")) for name in ("fingerprint", "patches"))


def ballot(shown: dict[str, Tensor], prompt: str, found: list[Votes]) -> dict[str, Any]:
    """Save the pictures where the page finds them; return them with the votes that count."""
    images = list(shown.values())
    files = ui.ImageSaveHelper.save_images(
        images, f"g2rpo_vote_{next(iter(shown))}", io.FolderType.temp, None, 1
    )
    pictures = [{"key": key, **file} for key, file in zip(shown, files, strict=True)]
    own = next((votes.table() for votes in found if set(votes.pictures) == set(shown)), None)
    return {"prompt": prompt[:SHOWN_PROMPT], "pictures": pictures, "votes": own}


NODES: list[type[io.ComfyNode]] = [VoteRollout]
