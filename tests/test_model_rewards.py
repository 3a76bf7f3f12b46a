"""Each model-backed reward gives what the published formula gives on the same weights, in whatever batch."""

from pathlib import Path

import pytest
import torch
from published_layouts import imagereward, open_clip_image, open_clip_text
from reward_folders import (
    EMBED,
    HEAD,
    HEADS,
    IMAGE,
    PROMPTS,
    VISION,
    VOCABULARY,
    WIDTH,
    aesthetic_folder,
    aesthetic_v25_folder,
    clip_folder,
    clip_model,
    head_weights,
    hps_folder,
    imagereward_folder,
    imagereward_weights,
    open_clip_weights,
    owlv2_folder,
    owlv2_model,
    pictures,
    siglip_vision,
)
from torch import Tensor, nn

from comfy_g2rpo.rewards.models.catalogue import KNOWN
from comfy_g2rpo.rewards.models.clip import ModelReward
from comfy_g2rpo.rewards.models.installed import installed, load_installed, loaders
from comfy_g2rpo.rewards.protocol import checked

pytestmark = pytest.mark.xdist_group("model_rewards")  # one process makes what they share

pytest.importorskip("transformers", reason="model-backed rewards need transformers: pip install '.[rewards]'")

NAMES = [
    "pickscore",
    "hpsv2.1",
    "clipscore",
    "imagereward",
    "aesthetic",
    "aesthetic_linear",
    "aesthetic_v2.5",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install every known reward with random weights."""
    root = tmp_path_factory.mktemp("rewards")
    clip_folder(root, "pickscore", "pickscore", clip_model(seed=1))
    hps_folder(root, "hpsv2.1", open_clip_weights())
    clip_folder(root, "clipscore", "clipscore", clip_model("quick_gelu", seed=2))
    imagereward_folder(root, "imagereward", imagereward_weights())
    aesthetic_folder(root, "aesthetic", clip_model("quick_gelu"), head_weights(EMBED, "layers.{}"), HEAD)
    aesthetic_folder(root, "aesthetic_linear", clip_model("quick_gelu"), head_weights(EMBED, "", (1,)), (1,))
    aesthetic_v25_folder(
        root, "aesthetic_v2.5", siglip_vision(), head_weights(WIDTH, "scoring_head.{}"), HEAD
    )
    owlv2_folder(root, "detection", owlv2_model())  # test_detection.py
    return root


@pytest.fixture(params=NAMES)
def reward(request: pytest.FixtureRequest, root: Path) -> ModelReward:
    """Load one of them."""
    return load_installed(root, request.param, batch=3)


def prepared(reward: ModelReward, images: Tensor) -> Tensor:
    """Prepare pictures as the reward does.

    Test_model_rewards_pictures.py compares that with the originals.
    """
    return reward.pictures(images)


def test_every_known_reward_is_tested_here(root: Path) -> None:
    assert {*NAMES, "detection"} == set(KNOWN) == set(installed(root))
    assert {known.kind for known in KNOWN.values()} == set(loaders())


@torch.no_grad()
def test_pickscore_is_transformers_own_temperature_times_cosine(root: Path) -> None:
    reward, model = load_installed(root, "pickscore"), clip_model(seed=1)
    tokens = reward.module.tokenizer(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    published = model(pixel_values=prepared(reward, pictures()), **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), published, atol=1e-5, rtol=1e-5)
    assert published.std() > 0.01


@torch.no_grad()
def test_clipscore_is_a_hundred_times_the_cosine(root: Path) -> None:
    reward, model = load_installed(root, "clipscore"), clip_model("quick_gelu", seed=2)
    tokens = reward.module.tokenizer(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    output = model(pixel_values=prepared(reward, pictures()), **tokens)
    published = 100 * (output.image_embeds * output.text_embeds).sum(-1)
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), published, atol=1e-5, rtol=1e-5)
    assert published.std() > 0.1


def open_clip_tokens(reward: ModelReward, prompts: list[str]) -> Tensor:
    """Number prompts as open_clip does: zeros, not marks, after the end of the text."""
    words = [reward.module.tokenizer(prompt, truncation=True, max_length=77).input_ids for prompt in prompts]
    return torch.tensor([row + [0] * (77 - len(row)) for row in words])


@torch.no_grad()
def test_hps_is_open_clips_cosine_on_the_weights_as_published(root: Path) -> None:
    reward, weights = load_installed(root, "hpsv2.1"), open_clip_weights()
    seen = open_clip_image(weights, prepared(reward, pictures()), HEADS)
    read = open_clip_text(weights, open_clip_tokens(reward, PROMPTS), 2)
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), (seen * read).sum(-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hps_is_what_open_clip_itself_gives(root: Path) -> None:
    open_clip = pytest.importorskip(
        "open_clip", reason="open_clip is not installed: pip install --no-deps open_clip_torch ftfy"
    )
    sides = {
        "image_size": IMAGE,
        "layers": 2,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": VISION["patch_size"],
    }
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    model = open_clip.CLIP(EMBED, sides, text).eval()
    assert not model.load_state_dict(open_clip_weights(), strict=False).unexpected_keys
    reward = load_installed(root, "hpsv2.1")
    seen = model.encode_image(prepared(reward, pictures()), normalize=True)
    read = model.encode_text(open_clip_tokens(reward, PROMPTS), normalize=True)
    torch.testing.assert_close(
        reward.score(pictures(), PROMPTS), (seen @ read.T).diagonal(), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_imagereward_is_its_own_architecture_on_the_weights_as_published(root: Path) -> None:
    reward = load_installed(root, "imagereward")
    text = reward.module.tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert text.input_ids.shape == (5, 35) and text.attention_mask.sum(1).max() == 35
    published = imagereward(
        imagereward_weights(), prepared(reward, pictures()), text.input_ids, text.attention_mask, HEADS, 2
    )
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), published, atol=1e-5, rtol=1e-5)
    assert published.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layout", "widths"), [("aesthetic", "layers.{}", HEAD), ("aesthetic_linear", "", (1,))]
)
def test_laion_aesthetic_is_its_head_on_the_unit_norm_embedding(
    root: Path, name: str, layout: str, widths: tuple[int, ...]
) -> None:
    reward, model = load_installed(root, name), clip_model("quick_gelu")
    x = model.visual_projection(model.vision_model(prepared(reward, pictures())).pooler_output)
    published = through_head(x / x.norm(dim=-1, keepdim=True), head_weights(EMBED, layout, widths), layout)
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), published, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_aesthetic_v25_is_its_head_on_siglips_unit_norm_pooled_state(root: Path) -> None:
    reward, layout = load_installed(root, "aesthetic_v2.5"), "scoring_head.{}"
    x = siglip_vision()(prepared(reward, pictures())).pooler_output
    published = through_head(x / x.norm(dim=-1, keepdim=True), head_weights(WIDTH, layout), layout)
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), published, atol=1e-5, rtol=1e-5)


def through_head(x: Tensor, weights: dict[str, Tensor], layout: str) -> Tensor:
    """Apply a published head's layers in order."""
    for place in range(len(weights) // 2):
        prefix = f"{layout.format(2 * place)}." if layout else ""
        x = nn.functional.linear(x, weights[f"{prefix}weight"], weights[f"{prefix}bias"])
    return x[:, 0]


def test_a_score_does_not_depend_on_its_batch(reward: ModelReward) -> None:
    together = reward.score(pictures(), PROMPTS)
    alone = torch.cat([reward.score(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.dtype == torch.float32 and together.shape == (5,)


def test_scores_follow_the_pictures(reward: ModelReward) -> None:
    scores = reward.score(pictures(), ["a red cube"] * 5)
    assert len(set(scores.tolist())) == 5


def test_only_rewards_that_read_the_prompt_follow_it(reward: ModelReward) -> None:
    scores = reward.score(pictures(1).expand(2, -1, -1, -1), ["a red cube", "blue"])
    assert (scores[0] == scores[1]).item() == reward.name.startswith("aesthetic")
    assert reward.reads_prompt != reward.name.startswith("aesthetic")


def test_a_picture_with_nan_cannot_be_judged_and_spoils_no_other(reward: ModelReward) -> None:
    images = pictures()
    images[1, 3, 3, 0] = torch.nan
    scores = checked(reward, images, PROMPTS)
    assert scores.isnan().tolist() == [False, True, False, False, False]
    torch.testing.assert_close(
        scores[[0, 2, 3, 4]], reward.score(pictures(), PROMPTS)[[0, 2, 3, 4]], atol=1e-5, rtol=0
    )
    assert reward.score(images, PROMPTS).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (2000, 1500)], ids=["one pixel", "a line", "huge"])
def test_pictures_of_odd_sizes_are_judged(reward: ModelReward, shape: tuple[int, int]) -> None:
    scores = checked(reward, torch.stack([torch.zeros(*shape, 3), torch.ones(*shape, 3)]), ["a red cube"] * 2)
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 8, 8, 4), r"give .*\[B, H, W, 3\]"),
        ((2, 8, 8, 1), r"give .*\[B, H, W, 3\]"),
        ((2, 8, 264, 3), "no side may be over 32"),
    ],
    ids=["RGBA", "greyscale", "a ribbon"],
)
def test_other_pictures_are_refused_by_name(reward: ModelReward, shape: tuple[int, ...], said: str) -> None:
    for call in (
        lambda images: checked(reward, images, ["a"] * 2),
        lambda images: reward.score(images, ["a"] * 2),
    ):
        with pytest.raises(ValueError, match=said):
            call(torch.zeros(shape))


@pytest.mark.parametrize("prompts", ["a red", ["a red cube"]], ids=["one string", "too few"])
def test_a_prompt_is_due_for_every_picture(reward: ModelReward, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="give a list with one prompt per image"):
        reward.score(pictures(), prompts)


def test_no_pictures_give_no_scores(reward: ModelReward) -> None:
    assert reward.score(torch.zeros(0, 8, 8, 3), []).shape == (0,)


def test_embeddings_have_unit_norm_and_tell_pictures_apart(reward: ModelReward) -> None:
    embedded = reward.embed(pictures())
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(5))
    assert (embedded[0] - embedded[1]).norm() > 1e-3


def test_a_reward_says_what_it_is(reward: ModelReward) -> None:
    known = KNOWN[reward.name]
    assert (reward.licence, reward.note) == (known.licence, known.note)
    assert reward.compares_across_prompts == (
        reward.name == "clipscore" or reward.name.startswith("aesthetic")
    )
    assert isinstance(reward.module, nn.Module) and not any(
        parameter.requires_grad for parameter in reward.module.parameters()
    )
    assert not reward.runs_elsewhere and reward.to("cpu") is reward


def test_the_trunk_runs_in_the_dtype_asked_for_and_the_head_in_float32(
    root: Path, reward: ModelReward
) -> None:
    half = load_installed(root, reward.name, dtype=torch.bfloat16)
    trunks = tuple(f"{name}." for name in half.module.trunks)
    assert {p.dtype for name, p in half.module.named_parameters() if name.startswith(trunks)} == {
        torch.bfloat16
    }
    assert {p.dtype for name, p in half.module.named_parameters() if not name.startswith(trunks)} == {
        torch.float32
    }
    exact, near = reward.score(pictures(), PROMPTS), half.score(pictures(), PROMPTS)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


@pytest.mark.gpu
def test_on_a_gpu_a_bf16_trunk_with_a_float32_head_keeps_the_scores(root: Path, reward: ModelReward) -> None:
    half = load_installed(root, reward.name, device="cuda", dtype=torch.bfloat16)
    exact, near = reward.score(pictures(), PROMPTS), half.score(pictures().cuda(), PROMPTS)
    assert half.runs_elsewhere and near.device.type == "cpu" and near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.05 * exact.abs().max() + 0.05


@pytest.mark.gpu
def test_on_a_gpu_float32_scores_are_the_cpus(root: Path, reward: ModelReward) -> None:
    there = load_installed(root, reward.name, device="cuda")
    torch.testing.assert_close(
        there.score(pictures().cuda(), PROMPTS), reward.score(pictures(), PROMPTS), atol=1e-3, rtol=1e-3
    )
