"""The decoder of a tiny autoencoder (TAESD) on a CPU: the linear maps of diffusers' and ComfyUI's, none of
them computed on a finer grid than it needs.

A nearest-neighbour upsampling and the 3×3 convolution after it are one transposed convolution with 4×4
numbers: 4 products per output in place of 9. Where the last stage has no blocks, as in the bundled model,
both of its convolutions are one on the coarse grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
SIDES = (0, -1)


def foldable(layers: Sequence[nn.Module], block: type[nn.Module]) -> bool:
    """Return whether a decoder's layers after its clamp are all known here; `block` is their residual one."""
    known = nn.Conv2d | nn.ReLU | nn.Upsample | block
    upsampled = [after for before, after in pairwise(layers) if isinstance(before, nn.Upsample)]
    weights = [weight for layer in layers for weight in layer.parameters()]
    return (
        all(isinstance(layer, known) for layer in layers)
        and all(isinstance(layer, nn.Conv2d) for layer in upsampled)
        and all(layer.mode == "nearest" for layer in layers if isinstance(layer, nn.Upsample))
        and all(layer.scale_factor == 2 for layer in layers if isinstance(layer, nn.Upsample))
        and all(weight.device.type == "cpu" for weight in weights)
        and all(weight.dtype in (torch.float32, torch.float64) for weight in weights)  # they are summed
    )


class FoldedDecoder:
    """A folded copy of a tiny autoencoder's decoder, of its layers after the clamp."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        layers = list(layers)
        self.dtype = next(weight.dtype for layer in layers for weight in layer.parameters())
        self.layers: list[Layer] = []
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Upsample):
                layer = Upscale(layers.pop(0))
                if layers and isinstance(layers[0], nn.Conv2d):
                    layer = LastStage(layer, layers.pop(0))
            elif isinstance(layer, nn.Conv2d):
                layer = convolution(layer)
            elif isinstance(layer, nn.ReLU):
                layer = torch.relu_
            else:
                layer = Residual(layer)
            self.layers.append(layer)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to [B, 3, H, W] in [−1, 1], in the decoder's precision."""
        x = (latents.to(self.dtype) / 3).tanh_().mul_(3).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = layer(x)
        return x.mul_(2).sub_(1)


def convolution(layer: nn.Conv2d) -> Layer:
    """Return a 3×3 convolution on numbers laid out channels last."""
    weight, bias = layer.weight.detach().contiguous(memory_format=torch.channels_last), layer.bias
    return lambda x: F.conv2d(x, weight, bias, padding=1)


class Residual:
    """Three convolutions around which the input is carried."""

    def __init__(self, block: nn.Module) -> None:
        self.layers = [convolution(layer) for layer in block.conv if isinstance(layer, nn.Conv2d)]
        self.skip = block.skip

    def __call__(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.layers[:-1]:
            out = layer(out).relu_()
        return self.layers[-1](out).add_(self.skip(x)).relu_()


class Upscale:
    """Nearest-neighbour upsampling by 2 and a 3×3 convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        weight = layer.weight.detach()
        folded = sum(F.pad(weight, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1))
        self.weight, self.bias = folded.flip(2, 3).transpose(0, 1).contiguous(), layer.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


class LastStage:
    """An upscaling and a 3×3 convolution as one convolution that yields every cell's 2×2 pixels."""

    def __init__(self, first: Upscale, second: nn.Conv2d) -> None:
        near, far = first.weight, second.weight.detach()
        whole = F.conv2d(near, far, padding=2)  # [in, out, 6, 6]: what one cell adds to the pixels around it
        self.weight = (
            whole.unflatten(3, (3, 2)).unflatten(2, (3, 2)).flip(2, 4).permute(1, 3, 5, 0, 2, 4).flatten(3, 4)
        )
        self.weight = self.weight.reshape(-1, len(near), 3, 3).contiguous(memory_format=torch.channels_last)
        self.bias = second.bias.detach().repeat_interleave(4)
        # The second convolution sees zeros around the first one's result; what the first one would have there
        # is taken off again.
        self.rows = {side: F.conv1d(near[:, :, side], far[:, :, side], padding=2) for side in SIDES}
        self.columns = {side: F.conv1d(near[..., side], far[..., side], padding=2) for side in SIDES}
        self.corners = {(y, x): near[:, :, y, x] @ far[:, :, y, x].T for y in SIDES for x in SIDES}

    def __call__(self, x: Tensor) -> Tensor:
        out = F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)
        for side in SIDES:
            out[:, :, side] -= F.conv_transpose1d(x[:, :, side], self.rows[side], stride=2, padding=2)
            out[..., side] -= F.conv_transpose1d(x[..., side], self.columns[side], stride=2, padding=2)
        for (row, column), weight in self.corners.items():  # taken off twice
            out[:, :, row, column] += x[:, :, row, column] @ weight
        return out
