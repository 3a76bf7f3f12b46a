"""The fields of a recipe: five axes, on which a method of the field is a line of data.

Kernel · which steps are stochastic · shape of the tree · advantage · objective. The command line's help, the
configuration's bounds and the graph blocks' tooltips are made from the fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..options import MIXES, option

KERNELS = ("flow_sde", "dance_sde", "cps", "ddim")


@dataclass(frozen=True)
class Recipe:
    """How one iteration explores, judges and updates."""

    num_steps: int = option(
        16, "Sampling steps of an image. More look finer and cost in proportion.", 1, 1000
    )
    shift: float = option(3.0, "Time shift: above 1, more steps go to high noise; 1 is linear.", 0.01, 100)
    kernel: str = option("flow_sde", "How noise is added when exploring. Keep flow_sde.", choices=KERNELS)
    eta: float = option(
        0.7,
        "How far branches stray. Too low: they look alike and teach little; too high: broken images.",
        0,
        10,
    )
    etas: tuple[float, ...] = option(
        (),
        "Exploration strength of every step, in place of eta; g2rpo calibrate finds some. Empty is eta.",
        0,
        10,
    )

    steps: str = option(
        "first_half",
        "Steps that may explore. Early steps decide what is in the image, late ones its texture. For nft and "
        "awm, the noise levels that they learn at.",
        choices=("first_half", "all", "all_but_last"),
    )
    pick: str = option(
        "every",
        "Which of them an iteration takes: every one, some next to each other, or single ones at random. "
        "Fewer are cheaper and noisier.",
        choices=("every", "random_window", "sliding_window", "random"),
    )
    pick_size: int = option(1, "How many steps a window or a random choice takes.", 1, 1000)
    step_share: tuple[float, ...] | None = option(
        None,
        "How often pick random takes each step that may explore, in proportion: one number per step, more "
        "for those that teach more; none draws all alike.",
        0,
        1e6,
    )
    slide_every: int = option(25, "Iterations until a sliding window moves on by one step.", 1, 100000)
    train_share: float = option(
        1.0,
        "Share of the exploring steps that is trained, for nft and awm of an image's noise levels; less is "
        "quicker and noisier.",
        0.01,
        1,
    )

    prompt_choice: str = option(
        "in_turn",
        "Which prompts a step takes: all in turn; half of them by how much their last scores differed "
        "(signal); or those that the model is neither good nor bad at (curriculum).",
        choices=("in_turn", "signal", "curriculum"),
    )
    candidates: int = option(
        10, "Prompts that a curriculum draws and scores one image of, for each one that it takes.", 2, 1024
    )

    tree: str = option(
        "singular",
        "Branches that leave one image at a single step, whole images of their own (the older methods), or "
        "branches that split again and again.",
        choices=("singular", "independent", "branching"),
    )
    branch_at: tuple[int, ...] | None = option(
        None,
        "Steps at which every branch splits, for tree branching; none: at every exploring step. Four splits "
        "in two make 16 images: that is its group_size.",
        0,
        999,
    )
    group_size: int = option(
        12, "Images that are compared with one another. Below 6 is noisy; more costs in proportion.", 2, 1024
    )
    expand: float = option(
        1.0,
        "Branches that begin for each one that is finished; above 1 they are judged on the way, and those go "
        "on that differ most. More variety for less than finishing all.",
        1,
        64,
    )
    prune_by: str = option(
        "prediction",
        "What a branch is judged by on its way: the image that one step predicts after prune_at of it, or "
        "the one finished at the largest of several granularities (coarsest); the others then teach.",
        choices=("prediction", "coarsest"),
    )
    prune_at: tuple[float, ...] = option(
        (0.5,),
        "Shares of a branch's way after which predictions are judged. Late ones see more and save less.",
        0,
        0.99,
    )
    starts: int = option(1, "Start noises per prompt. More see more variety and cost in proportion.", 1, 64)
    shared_start: bool = option(
        False, "Start a prompt's independent images from one noise, to compare alike."
    )
    granularities: tuple[int, ...] = option(
        (1, 2),
        "Strides at which a branch is finished: 1 takes every step, 2 every second. Each gives a score; more "
        "make scores surer and cost more.",
        1,
        1000,
    )
    terminal: str = option(
        "exact",
        "Where a stride misses the end: one short step more, or the jump of the published code.",
        choices=("exact", "published"),
    )
    antithetic: bool = option(False, "Draw the branches' noise in opposite pairs, which evens out chance.")
    credit: str = option(
        "final",
        "What a step is credited with: the finished image's reward, or by how much the step raised it "
        "(DenseGRPO). gain leaves out what other steps did, but finishes every state, at several times the "
        "cost.",
        choices=("final", "gain"),
    )
    anchor_image: bool = option(
        False,
        "Log what exploring costs in reward at every step (gap/…), by also finishing and scoring the images "
        "that branches leave.",
    )

    mix: str = option(
        "zscore",
        "How several rewards become one: z-scores added, raw scores added, the worst z-score, or ranks "
        "multiplied. zscore suits rewards of different scales.",
        choices=MIXES,
    )
    std: str = option(
        "group",
        "What scores are divided by: the spread of their own group, of all prompts, or of all images of the "
        "same prompt (tree).",
        choices=("group", "global", "tree"),
    )
    std_floor: float = option(
        1e-8,
        "Smallest spread of a group that teaches, in the reward's units. Raise it for noisy rewards.",
        0,
        1e6,
    )
    clamp: float = option(5.0, "Largest advantage of one image, so that no outlier rules a step.", 0.01, 1000)
    diversity_weight: float = option(
        0.0,
        "Reward for looking unlike the group, against collapse; 1 pulls like a reward, 0 is off.",
        0,
        1000,
    )
    diversity_by: str = option(
        "auto",
        "What likeness is measured by: pixels, a reward model's view (embed), or that where there is one.",
        choices=("auto", "pixels", "embed"),
    )
    global_advantage: float = option(
        0.0,
        "Weight of being above the run's moving average, beside being above the group's (AdaGRPO: 1).",
        0,
        1000,
    )
    baseline_decay: float = option(
        0.8, "How slowly that moving average follows: 0.8 looks back five steps.", 0, 0.99999
    )
    step_weight: str = option(
        "uniform",
        "How much each exploring step counts: alike, by its noise, so that all pull equally hard, or by its "
        "noise squared (Flow-CPS).",
        choices=("uniform", "std", "balanced", "variance"),
    )

    objective: str = option(
        "on_policy",
        "The exact gradient for one update per rollout; the clipped ratio, which allows several; pairs of "
        "kept votes (g2rpo pairs), which needs no rollouts; vargrad, a least-squares fit of the log-ratio to "
        "reward/τ; or nft and awm, which need no noisy step and learn from finished images alone, at more "
        "passes per update.",
        choices=("on_policy", "clip", "pairs", "nft", "awm", "vargrad"),
    )
    pair_loss: str = option(
        "ropo",
        "Loss of a pair: plain, tolerant of wrong votes, or with the rejected one's share scaled by the "
        "margin.",
        choices=("dpo", "ropo", "pg_dpo"),
    )
    pair_beta: float = option(1.0, "Sharpness β on the log-ratio of a whole latent.", 1e-6, 1e4)
    pair_alpha: float = option(14.0, "ROPO's α: more trusts large contradictions less.", 2.001, 1000)
    pair_scale: float = option(
        1.0, "PG-DPO's K: more counts the rejected one in full once scores differ.", 0, 100
    )
    pair_keep: float = option(
        1.0, "Share of a step's pairs, those with the least loss, that it learns from.", 0.05, 1
    )
    pair_anchor: float = option(0.0, "Weight of keeping the preferred picture as likely as before.", 0, 1000)
    clip: float = option(1e-4, "How far a clipped update may go. Small, for likelihoods are means.", 0, 1)
    ratio_norm: str = option(
        "none",
        "Balance the clip and the pull of all steps (guard, from GRPO-Guard). Needs objective clip, and a "
        "clip as small as 2e-6.",
        choices=("none", "guard"),
    )
    nft_beta: float = option(
        1.0,
        "How far apart nft takes its good and its bad model. Smaller lets an update go further.",
        0.001,
        100,
    )
    awm_weight: str = option(
        "ghuber",
        "What an error counts for awm: the same at every noise level, as much as its level, or that with "
        "large errors damped.",
        choices=("uniform", "sigma", "ghuber"),
    )
    old_decay: float = option(
        0.0,
        "For nft and awm: draw with a moving average of the LoRA that keeps this share per step, and learn "
        "against it. Calmer and slower; 0 draws with the LoRA itself.",
        0,
        0.99999,
    )
    old_ramp: float = option(
        0.001, "By how much that share grows per step until it is reached; 1 has it at once.", 1e-6, 1
    )
    vargrad_tau: float = option(
        0.1, "Temperature τ of vargrad, in units of the reward: smaller moves the model further.", 1e-6, 1e6
    )
    replay: int = option(
        0,
        "Old forks that every update learns from once more, per new fork. Each costs a forward and a "
        "backward, and no image. Needs objective clip or vargrad.",
        0,
        16,
    )
    replay_size: int = option(
        256, "Forks that are kept for that, in memory and in every checkpoint.", 1, 100000
    )
    replay_by: str = option(
        "uniform",
        "How they are chosen: evenly, by the rank of their best reward, or by a budgeted draw of large "
        "advantages.",
        choices=("uniform", "rank", "draw"),
    )
    replay_age: int = option(
        64, "Steps after which a fork is not used again: its images are of a model long gone.", 1, 1_000_000
    )
    epochs: int = option(
        1, "Updates from one rollout. Needs another objective than on_policy; more can overshoot.", 1, 100
    )
    update: str = option(
        "accumulate",
        "One optimizer step per rollout, or one per exploring step, as the published code does.",
        choices=("accumulate", "per_step"),
    )
    kl: float = option(
        0.0, "Pull back to the reference model, against drift and reward hacking. Costs a forward.", 0, 1000
    )
    kl_form: str = option(
        "velocity",
        "How that pull is measured: between velocities; against the noise of a step (step), about 10 times "
        "weaker; or as Flow-GRPO's code does (published), about 100 times weaker.",
        choices=("velocity", "step", "published"),
    )
    kl_reference: str = option(
        "base", "Pull back to the model without this LoRA, or to the run's start.", choices=("base", "start")
    )

    optimizer: str = option(
        "adamw",
        "adamw; adamw_8bit, which saves memory; or prodigy, which finds its own rate (set learning_rate: 1). "
        "The last two run headless only.",
        choices=("adamw", "adamw_8bit", "prodigy"),
    )
    learning_rate: float = option(
        1e-4, "How fast it learns. Too high collapses images within few steps; halve it then.", 0, 1
    )
    lr_schedule: str = option(
        "constant",
        "Whether the learning rate stays, or falls to nothing over the run's steps: linear or cosine. A fall "
        "calms the end of a run.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = option(
        0,
        "Steps over which the learning rate rises to its value; a guard against a rough start.",
        0,
        1_000_000,
    )
    weight_decay: float = option(1e-4, "Pull of the LoRA's weights towards zero.", 0, 1)
    max_grad_norm: float = option(
        1.0, "Longest gradient that an update follows; a guard against jumps.", 0, 1e9
    )
    ema: float = option(
        0.0,
        "Save a moving average of the LoRA, which is calmer; 0.9 looks back ten steps, 0 is off.",
        0,
        0.99999,
    )


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
