"""Pictures reach a reward model as its authors' own preprocessing would hand them over, to one level of
255 in every pixel.
"""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from comfy_g2rpo.rewards.models.clipscore import preprocessor
from comfy_g2rpo.rewards.models.preprocess import CLIP_MEAN, CLIP_STD, HALF, Pictures
from comfy_g2rpo.rewards.protocol import RewardError

SIZES = [
    (40, 40),
    (300, 200),
    (201, 300),
    (64, 509),
    (333, 64),
    (7, 5),
    (1, 1),
    (61, 224),
    (512, 512),
    (227, 229),
]
LEVEL = 1 / 255


def picture(height: int, width: int) -> Image.Image:
    """Draw noise, the hardest thing to resize alike."""
    return Image.fromarray(
        np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    )


def as_images(drawn: Image.Image) -> Tensor:
    """Hand a picture over as rewards get it: [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(drawn).astype(np.float32) / 255)[None]


def unit(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Undo the normalisation."""
    return pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)


def original(name: str, settings: dict[str, Any]) -> Any:
    """Make transformers' processor, the variant on PIL where there are two (the other one resizes by
    torchvision, and differently).
    """
    transformers = pytest.importorskip("transformers")
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("edge", [224, 28])
def test_crop_is_transformers_clip_processor(size: tuple[int, int], edge: int) -> None:
    processor = original(
        "CLIPImageProcessor", {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    )
    expected = torch.as_tensor(
        np.array(processor(np.asarray(picture(*size)), input_data_format="channels_last")["pixel_values"])
    )
    torch.testing.assert_close(Pictures(edge)(as_images(picture(*size))), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squash_is_transformers_siglip_processor(size: tuple[int, int]) -> None:
    processor = original("SiglipImageProcessor", {"size": {"height": 384, "width": 384}})
    expected = torch.as_tensor(
        np.array(processor(np.asarray(picture(*size)), input_data_format="channels_last")["pixel_values"])
    )
    torch.testing.assert_close(
        Pictures(384, "squash", HALF, HALF)(as_images(picture(*size))), expected.float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_that_rounds_is_openai_clips_own_transform(size: tuple[int, int]) -> None:
    """Resize(224, BICUBIC), CenterCrop(224), ToTensor and Normalize of torchvision, restated for a PIL
    picture.
    """
    drawn = picture(*size)
    short = min(drawn.size)
    wide, high = (224 if side == short else int(224 * side / short) for side in drawn.size)
    left, top = round((wide - 224) / 2.0), round((high - 224) / 2.0)
    cut = drawn.resize((wide, high), Image.BICUBIC).crop((left, top, left + 224, top + 224))
    expected = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(
        unit(Pictures(224, rounds=True)(as_images(drawn))), expected, atol=1e-5, rtol=0
    )


def cubic(source: int, target: int) -> np.ndarray:
    """Weigh source pixels for each target pixel [target, source]: Keys' kernel of a = −1/2, widened when
    it shrinks, edges renormalised.
    """
    scale = source / target
    width = max(scale, 1.0)
    place = (np.arange(target)[:, None] + 0.5) * scale - (np.arange(source)[None] + 0.5)
    x = np.abs(place) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 1], ids=str)
def test_pad_is_hps_own_transform_written_out(size: tuple[int, int]) -> None:
    """ToTensor, the long edge to 224 on numbers, black bars left and right or above and below, Normalize."""
    array = np.asarray(picture(*size)) / 255.0
    scale = 224 / max(size)
    high, wide = (round(side * scale) for side in size)
    rows = np.tensordot(cubic(size[0], high), array, axes=(1, 0))
    resized = np.tensordot(cubic(size[1], wide), rows, axes=(1, 1)).swapaxes(0, 1)
    expected = np.zeros((224, 224, 3))
    top, left = (224 - high) // 2, (224 - wide) // 2
    expected[top : top + high, left : left + wide] = resized
    found = unit(Pictures(224, "pad")(as_images(picture(*size)))[0]).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= LEVEL


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) != 224], ids=str)
def test_pad_is_hps_own_transform_by_torchvision(size: tuple[int, int]) -> None:
    """As in hpsv2/src/open_clip/transform.py.

    Where the long edge is 224 already, that one forgets the bars.
    """
    transforms = pytest.importorskip(
        "torchvision.transforms.functional", reason="torchvision is not installed"
    )
    tensor = transforms.to_tensor(picture(*size))
    scale = 224 / float(max(size))
    high, wide = (round(side * scale) for side in size)
    tensor = transforms.resize(tensor, [high, wide], transforms.InterpolationMode.BICUBIC, antialias=True)
    rows, columns = 224 - high, 224 - wide
    tensor = transforms.pad(
        tensor, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2], fill=0
    )
    expected = transforms.normalize(tensor, CLIP_MEAN, CLIP_STD)[None]
    torch.testing.assert_close(Pictures(224, "pad")(as_images(picture(*size))), expected, atol=1e-5, rtol=0)


def test_bars_are_black_before_normalisation() -> None:
    padded = unit(Pictures(8, "pad")(torch.ones(1, 4, 8, 3)))
    assert padded[0, :, :2].abs().max() < 1e-6 and (padded[0, :, 2:6] - 1).abs().max() < 1e-6


def test_a_picture_is_judged_in_8_bit_levels_as_a_saved_file_is() -> None:
    drawn = as_images(picture(50, 60))
    torch.testing.assert_close(Pictures(32)(drawn + 0.4 * LEVEL), Pictures(32)(drawn), atol=0, rtol=0)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_rows_never_see_each_other(fit: str) -> None:
    rows = torch.cat(
        [as_images(picture(60, 50)), as_images(picture(60, 50)) / 2, as_images(picture(60, 50)) / 3]
    )
    together = Pictures(32, fit)(rows)
    torch.testing.assert_close(
        together, torch.cat([Pictures(32, fit)(rows[i : i + 1]) for i in range(3)]), atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"size": 224, "crop_size": 224, "resample": 3}, Pictures(224)),
        ({"size": {"shortest_edge": 224}, "do_center_crop": True}, Pictures(224)),
        (
            {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": [0.5] * 3},
            Pictures(224, "squash", HALF, CLIP_STD, 2),
        ),
    ],
    ids=["OpenAI's old form", "short edge", "square"],
)
def test_a_clips_preprocessor_file_says_how(config: dict[str, Any], expected: Pictures) -> None:
    assert preprocessor(config, 224) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"size": 336},
        {"size": {"height": 224, "width": 448}},
        {"size": "224"},
        {"size": True},
        {"resample": 5},
        {"resample": [3]},
        {"image_std": [0, 1, 1]},
        {"image_mean": "half"},
    ],
    ids=str,
)
def test_a_preprocessor_file_that_does_not_fit_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"preprocessor_config\.json"):
        preprocessor(config, 224)
