"""Blocks that sample: one image with a single stochastic step, and the whole tree of a group."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..comfy_g2rpo.plan import Leaf, Plan, PlanBuilder, State, singular
from ..comfy_g2rpo.rollout import Rollout
from ..comfy_g2rpo.sampling.early_filter import squared_gap
from ..comfy_g2rpo.speed.fitting_rollout import roll_out
from .inputs.checks import blamed, check_inputs
from .inputs.finding import offered
from .inputs.widgets import Progress, announce, int_input, int_list, output, recipe_input, slots_input
from .model.comfy_policy import check_flow
from .model.conditioning import Conds, first_row, grouped, velocity
from .model.guidance_gap import Gauge, check_guided
from .types import SAMPLING, RolloutData, RolloutWire

MISFIT = (
    "guider: its model does not take this latent_image with this conditioning; choose another size, or the "
    "model's own text encoder"
)
MASKED = "latent_image: it has a noise mask, and a masked step has no exact probability; remove the mask"
MAX_STATES = 200_000
MAX_POSITIONS = 2**22  # of one latent
MAX_LEVELS = 1001
MAX_WORK = 2**28
"""Forwards × latent positions: 16 000 forwards at 1024 × 1024 pixels."""
DOWNSCALES = ("downscale_ratio_spacial", "downscale_ratio_temporal")


class Inside:
    """The policy of a running sampler: core has loaded the model and processed the conditioning already."""

    def __init__(
        self, guider: Any, extra_args: dict[str, Any], done: Callable[[Tensor, Tensor, Tensor], None]
    ) -> None:
        self.guider, self.done = guider, done
        self.options, self.seed = extra_args["model_options"], extra_args.get("seed")

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Do nothing: core has loaded the model."""
        yield

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Conds]) -> Tensor:
        """Return v [B, …]; cond: processed conditioning per row."""
        with blamed(MISFIT):
            made = velocity(self.guider, x, sigma, cond, self.options, self.seed)
        self.done(x, sigma, made)
        return made

    def velocity_and_gap(self, x: Tensor, sigma: Tensor, cond: Sequence[Conds]) -> tuple[Tensor, Tensor]:
        """Return v [B, …], and the mean square of v_c − v_∅ [B]."""
        check_guided(self.guider)
        gauge = Gauge(self.guider)
        options = gauge.attached(self.options)
        with blamed(MISFIT):
            made = velocity(self.guider, x, sigma, cond, options, self.seed)
        self.done(x, sigma, made)
        # Told group by group.
        rows = torch.tensor([row for group in grouped(cond, sigma, options) for row in group])
        gaps = torch.cat([squared_gap(gap, level) for gap, level in gauge.seen])
        return made, gaps[rows.argsort()]


def start_state(
    sampler: comfy.samplers.Sampler, guider: Any, sigmas: Tensor, noise: Tensor, latent_image: Tensor
) -> Tensor:
    """Mix noise and latent as core's samplers do at the first noise level."""
    sampling = guider.inner_model.model_sampling
    return sampling.noise_scaling(
        sigmas[0], noise.float(), latent_image.float(), sampler.max_denoise(guider, sigmas)
    )


class SingularSDE(comfy.samplers.Sampler):
    """Euler's steps, but for one stochastic one; row p of a batch draws its noise from seed + p."""

    def __init__(self, branch_step: int, branch: int, kernel: str, eta: float) -> None:
        self.branch_step, self.branch, self.kernel, self.eta = branch_step, branch, kernel, eta

    def plan(self, num_steps: int) -> Plan:
        """Plan the one branch, with the noise that it has in a rollout."""
        # There, draw 1 is the start and branches count on from 2.
        tree = PlanBuilder(num_steps)
        anchor = tree.follow(tree.root(), range(1, self.branch_step + 1))
        branch = tree.add(State(self.branch_step + 1, anchor, self.kernel, self.eta, self.branch + 2, 0, 0))
        tree.score(tree.follow(branch, range(self.branch_step + 2, num_steps + 1)))
        return tree.build()

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Sample as core's samplers do; called by the guider."""
        check_flow(model_wrap.model_patcher)
        check_sigmas(sigmas)
        if denoise_mask is not None:
            raise ValueError(MASKED)
        num_steps, images = len(sigmas) - 1, len(noise)
        check_fit(model_wrap.model_patcher, latent_image)
        if self.branch_step >= num_steps:
            raise ValueError(
                f"branch_step is {self.branch_step}; choose from 0 to {num_steps - 1} for {num_steps} steps"
            )
        count = iter(range(num_steps))

        def done(x: Tensor, sigma: Tensor, made: Tensor) -> None:
            if callback:
                callback(next(count), x - sigma.view(-1, *[1] * (x.ndim - 1)) * made, x, num_steps)

        start = start_state(self, model_wrap, sigmas, noise, latent_image)
        rollout = roll_out(
            Inside(model_wrap, extra_args, done),
            self.plan(num_steps),
            sigmas.cpu().float(),
            [model_wrap.conds] * images,
            [(extra_args.get("seed") or 0) + p for p in range(images)],
            start.shape[1:],
            slots=images,
            check=comfy.model_management.throw_exception_if_processing_interrupted,
            device=start.device,
            start=start,
        )
        return model_wrap.inner_model.model_sampling.inverse_noise_scaling(sigmas[-1], rollout.latents[:, 0])


class Tree(comfy.samplers.Sampler):
    """A rollout of one group as a sampler, inside all that core sets up around one; it keeps `rollout`."""

    def __init__(self, plan: Plan, slots: int, progress: Progress) -> None:
        self.tree, self.slots, self.progress = plan, slots, progress
        self.rollout: Rollout | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Return every image of the plan [images, …]."""
        # The guider got as many equal rows as there are slots, so that core makes room for them.
        start = start_state(self, model_wrap, sigmas, noise, latent_image)[:1]
        self.rollout = roll_out(
            Inside(model_wrap, extra_args, lambda x, *_: self.progress.done(len(x))),
            self.tree,
            sigmas.cpu().float(),
            [first_row(model_wrap.conds)],
            [extra_args.get("seed") or 0],
            start.shape[1:],
            slots=self.slots,
            check=self.progress.check,
            device=start.device,
            start=start,
        )
        return self.rollout.latents[0]


def check_sigmas(sigmas: Tensor) -> None:
    """Raise ValueError unless sigmas fall from at most 1 to at least 0."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas: it holds {sigmas.numel()} levels and a trajectory needs 2; connect a scheduler "
            "with 1 step or more"
        )
    if len(sigmas) > MAX_LEVELS:
        raise ValueError(
            f"sigmas: it holds {len(sigmas)} levels; at most {MAX_LEVELS} are allowed, connect a "
            "scheduler with fewer steps"
        )
    if not sigmas.isfinite().all() or not (sigmas.diff() < 0).all() or sigmas[0] > 1 + 1e-4 or sigmas[-1] < 0:
        raise ValueError(
            f"sigmas: they run from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}; they must fall "
            "from 1 or less to 0"
        )


def check_ends(sigmas: Tensor, who: str) -> None:
    """Raise ValueError unless sigmas are a whole trajectory's, down to 0."""
    check_sigmas(sigmas)
    if sigmas[-1] != 0:
        raise ValueError(
            f"sigmas: they end at {float(sigmas[-1]):.4g}; {who} completes its images: connect levels "
            "that end at 0"
        )


def one_latent(model: Any, latent: dict[str, Any]) -> Tensor:
    """Return a LATENT's one row [1, …] with the model's channels; raise ValueError where none is there."""
    samples = latent.get("samples")
    if not isinstance(samples, Tensor) or getattr(samples, "is_nested", False):
        raise ValueError(
            "latent_image: several streams in one latent (video with sound) are not supported; connect "
            "an image latent"
        )
    if latent.get("noise_mask") is not None:
        raise ValueError(MASKED)
    if (
        samples.ndim not in (4, 5)
        or samples.shape[0] != 1
        or not samples.numel()
        or math.prod(samples.shape[2:]) > MAX_POSITIONS
    ):
        raise ValueError(
            f"latent_image: it has the shape {list(samples.shape)}; connect a latent of one image "
            "(batch size 1)"
        )
    given = {key: latent[key] for key in DOWNSCALES if key in latent}
    samples = comfy.sample.fix_empty_latent_channels(model, samples, **given)
    check_fit(model, samples)
    return samples


def check_fit(model: Any, latents: Tensor) -> None:
    """Raise ValueError unless latents [B, …] have the model's channels and dimensions."""
    form, name = model.get_model_object("latent_format"), type(model.model).__name__
    if latents.ndim != 2 + form.latent_dimensions or latents.shape[1] != form.latent_channels:
        wanted = f"{form.latent_channels} channels and {form.latent_dimensions} dimensions"
        raise ValueError(
            f"latent_image: it has the shape {list(latents.shape)}, and {name} takes {wanted}; connect "
            "a latent of its own kind"
        )
    if not latents.isfinite().all():
        raise ValueError("latent_image: it holds NaN or infinite values; make the latent again")


def start_noise(noise: Any, latent: dict[str, Any]) -> Tensor:
    """Draw a NOISE for a LATENT; raise ValueError where it is not one for it."""
    made, shape = noise.generate_noise(latent), latent["samples"].shape
    if (
        not isinstance(made, Tensor)
        or made.shape != shape
        or not made.is_floating_point()
        or not made.isfinite().all()
    ):
        raise ValueError(
            f"noise: it made no noise of the shape {list(shape)}, or no finite one; connect RandomNoise"
        )
    return made


def group_plan(
    num_steps: int,
    branch_steps: tuple[int, ...],
    group_size: int,
    granularities: tuple[int, ...],
    kernel: str,
    eta: float,
    terminal: str,
    antithetic: bool,
    positions: int,
) -> Plan:
    """Plan a group's tree, its anchor as the first image; raise ValueError where it is too much work."""
    most = len(branch_steps) * group_size * len(granularities) * num_steps
    if most > MAX_STATES:
        raise ValueError(
            f"group_size: a tree of up to {most} states is above the limit of {MAX_STATES}; lower it "
            "or name fewer branch_steps"
        )
    style = {"kernel": kernel, "eta": eta, "terminal": terminal, "antithetic": antithetic}
    plan = singular(num_steps, branch_steps, group_size, granularities, **style, anchor_image=True)
    if plan.forwards * positions > MAX_WORK:
        raise ValueError(
            f"group_size: {plan.forwards} forwards × {positions} latent positions are above the limit of "
            f"{MAX_WORK}; lower it, name fewer branch_steps, or use a smaller latent"
        )
    # The anchor is the tree's first states.
    return dataclasses.replace(plan, leaves=(Leaf(num_steps), *plan.leaves))


class SingularSDESampler(io.ComfyNode):
    """One stochastic step in an otherwise deterministic trajectory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SingularSDESampler",
            display_name="Singular SDE Sampler",
            category=SAMPLING,
            description="Samples with Euler's steps and exactly one stochastic step: one branch of what "
            "Rollout explores, in any graph.",
            inputs=[
                int_input("branch_step", 0, 0, 999, "The stochastic step; 0 is the first."),
                int_input(
                    "branch",
                    0,
                    0,
                    1_000_000,
                    "Which noise the step gets. With the same NOISE it is the branch of this number "
                    "in Rollout, counted from 0 through all its branch steps (group size 4 and steps 0-3: 5 "
                    "is the second branch of the second step).",
                ),
                recipe_input("kernel"),
                recipe_input("eta"),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="For SamplerCustomAdvanced and every other node that takes a SAMPLER."
                )
            ],
        )
        return offered(schema, "grpo, stochastic sampler, sde, ode", rare="kernel")

    @classmethod
    def execute(cls, branch_step: int, branch: int, kernel: str, eta: float) -> io.NodeOutput:
        """Make the sampler."""
        check_inputs(cls, locals())
        return io.NodeOutput(SingularSDE(branch_step, branch, kernel, eta))


class RolloutBlock(io.ComfyNode):
    """The tree of one group: a deterministic anchor and branches with one stochastic step each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_Rollout",
            display_name="Rollout",
            category=SAMPLING,
            description="Explores around one image: at every branch step a group of branches leaves the "
            "deterministic "
            "trajectory by a single stochastic step and is completed without noise, once per granularity.",
            inputs=[
                io.Guider.Input(
                    "guider",
                    tooltip="Model, conditioning and guidance; from any guider node, with a flow model.",
                ),
                io.Noise.Input(
                    "noise", tooltip="The start noise of the anchor; its seed also draws the branches' noise."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip=("The noise levels of the image, falling to 0: from any scheduler node."),
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of one image, or one to start from at a lower first noise "
                    "level.",
                ),
                io.String.Input(
                    "branch_steps",
                    default="0-3",
                    tooltip="Steps at which branches leave: numbers with commas, or a range such as 0-3.",
                ),
                recipe_input("group_size", default=4, high=256),
                recipe_input("granularities"),
                recipe_input("kernel"),
                recipe_input("eta"),
                recipe_input("terminal"),
                recipe_input("antithetic"),
                slots_input(
                    "Latents evaluated at a time: more are faster until memory is full. With 1 every "
                    "image equals that of "
                    "an ordinary sampler bit by bit; with more it differs by the rounding of batches.",
                    256,
                ),
            ],
            outputs=[
                output(RolloutWire, "rollout", "For Score Rollout, Advantages and Update LoRA."),
                output(io.Latent, "completions", "Every completed branch, in the rollout's order."),
                output(io.Latent, "anchor", "The deterministic image that the branches leave from."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "grpo, reinforcement learning, explore, branches, variations",
            rare="kernel, eta, terminal, antithetic, slots",
        )

    @classmethod
    def execute(
        cls,
        guider: Any,
        noise: Any,
        sigmas: Tensor,
        latent_image: dict[str, Any],
        branch_steps: str,
        group_size: int,
        granularities: str,
        kernel: str,
        eta: float,
        terminal: str,
        antithetic: bool,
        slots: int,
    ) -> io.NodeOutput:
        """Run the tree."""
        check_inputs(cls, locals())
        check_flow(guider.model_patcher)
        check_ends(sigmas, "a rollout")
        samples = one_latent(guider.model_patcher, latent_image)
        num_steps, positions = len(sigmas) - 1, math.prod(samples.shape[2:])
        steps = tuple(sorted(int_list(branch_steps, "branch_steps", 0, num_steps - 1)))
        strides = int_list(granularities, "granularities", 1, 1000)
        plan = group_plan(num_steps, steps, group_size, strides, kernel, eta, terminal, antithetic, positions)
        size = "×".join(map(str, reversed(samples.shape[2:])))
        count = len(plan.images) - 1
        said = f"{plan.forwards} forwards on {size} latents for {count} images and their anchor"
        announce(cls, said)
        tree = Tree(plan, slots, Progress(cls, plan.forwards))
        latent, rows = {**latent_image, "samples": samples}, min(slots, plan.forwards)
        images = _run(tree, guider, noise, sigmas, latent, rows)
        data = RolloutData(_without_anchor(tree.rollout), guider, sigmas.clone(), strides, steps)
        return io.NodeOutput(data, {"samples": images[1:]}, {"samples": images[:1]}, ui=ui.PreviewText(said))


def _run(tree: Tree, guider: Any, noise: Any, sigmas: Tensor, latent: dict[str, Any], rows: int) -> Tensor:
    """Sample the tree with a copy of the guider; return its images [1 + images, …] as LATENT."""
    samples = latent["samples"]
    more = (rows, *[1] * (samples.ndim - 1))
    with blamed(MISFIT):
        start, latents = start_noise(noise, latent).repeat(more), samples.repeat(more)
        images = copy.copy(guider).sample(start, latents, tree, sigmas, disable_pbar=True, seed=noise.seed)
    return images.to(comfy.model_management.intermediate_device())


def _without_anchor(rollout: Rollout) -> Rollout:
    """Return the rollout without its first image, the anchor's: only branches are compared."""
    device = comfy.model_management.intermediate_device()
    # Made outside the executor's inference mode, so that a learner can use them.
    with torch.inference_mode(False):
        kept = {name: getattr(rollout, name).to(device).clone() for name in ("x", "velocity")}
        latents = rollout.latents[:, 1:].to(device).clone()
    plan = dataclasses.replace(rollout.plan, leaves=rollout.plan.leaves[1:])
    return dataclasses.replace(rollout, plan=plan, latents=latents, **kept)


NODES = [SingularSDESampler, RolloutBlock]
