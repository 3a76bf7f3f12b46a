"""The forward of a Stable Diffusion 3 transformer in rollouts: what diffusers and ComfyUI compute, without
gradients, nothing of it twice.

The adapter is added to copies of the weights; the model itself is not touched. q, k and v are one product.
What depends on a state's prompt and noise level alone (the modulation, and the text's q, k and v in the first
block) is computed once per pair and kept. What the last block would compute for the text and drop is left
out. Whoever has a model takes it apart into `Stream`s, `Block`s and `Ends`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of every norm in this architecture
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKED = 2**20  # numbers in the largest weight that is worth a second copy
# tokens from which oneDNN is faster than PyTorch's own choice; it keeps half a megabyte of code for every
# shape that it meets
ROWS = 512
KEPT, ROOM = 256, 2**29  # pairs of a prompt and a noise level, and bytes from which on they are forgotten


class TextFeatures(Protocol):
    """One prompt's text features."""

    tokens: Tensor  # [M, joint_attention_dim]
    pooled: Tensor  # [pooled_projection_dim]


class Affine:
    """Linear layers (weight [out, in], bias [out]) that read the same input, as one."""

    def __init__(self, *layers: tuple[Tensor, Tensor | None]) -> None:
        self.weight, self.bias = (
            values[0] if len(layers) == 1 else torch.cat(values) for values in zip(*layers, strict=True)
        )
        self.packed = None
        if (
            PACKS
            and self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and self.weight.numel() <= PACKED
        ):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Apply the layer, and tanh-GELU where asked, to x [B, N, …]; what follows N is one vector."""
        x = x.flatten(2)
        if self.packed is not None and len(x) * x.shape[1] >= ROWS:
            name, kind = (
                ("gelu", "tanh") if gelu else ("none", "")
            )  # applied while the product is still in the cache
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], kind)
        out = F.linear(x, self.weight, self.bias)
        return F.gelu(out, approximate="tanh") if gelu else out


class Modulation:
    """The adaptive shifts, scales and gates of one stream of one block; `scales` tells which are scales."""

    def __init__(self, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> None:
        bias = bias.clone().view(-1, weight.shape[1])
        bias[list(scales)] += 1  # they multiply as 1 + scale
        self.weight, self.bias, self.parts, self.first = weight, bias.flatten(), len(bias), scales[0]

    def __call__(self, conditioning: Tensor) -> Tensor:
        """Compute the vectors [U, parts, 1, D] from conditioning [U, D]."""
        return F.linear(conditioning, self.weight, self.bias).view(len(conditioning), self.parts, 1, -1)

    def apply(self, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Normalise the layer x [B, N, D], then scale and shift it by the first two vectors."""
        return modulate(x, vectors[1 - self.first], vectors[self.first])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the layer x [B, N, D], then scale and shift it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


class Heads:
    """One projection for q, k and v of a stream, or k and v alone, with the weights of the RMS norms."""

    def __init__(self, project: Affine, parts: int, norms: Sequence[Tensor] | None, heads: int) -> None:
        self.project, self.parts, self.norms, self.heads = project, parts, norms, heads

    def __call__(self, x: Tensor) -> Tensor:
        """Project x [B, N, D] to [parts, B, heads, N, d]."""
        return self.split(self.project(x))

    def split(self, projected: Tensor) -> Tensor:
        """Cut [B, N, …] to [parts, B, heads, N, d]."""
        return projected.view(*projected.shape[:2], self.parts, self.heads, -1).permute(2, 0, 3, 1, 4)


def normalise(x: Tensor, weights: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Take the RMS norm of x [B, heads, N, d] in place; N is made of lengths with weights of their own."""
    if x.dtype == torch.float32:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    else:  # diffusers squares in float32 whatever comes in
        mean_square = x.float().square().mean(-1, keepdim=True)
    weight = torch.cat([w.expand(n, -1) for w, n in zip(weights, lengths, strict=True)])
    return x.mul_(mean_square.add_(EPS).rsqrt_()).mul_(weight)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from q [B, heads, n, d] to k, v [B, heads, N, d]; return [B, n, heads, d]."""
    if k.shape[2] <= k.shape[3] and k.device.type == "cpu":
        # With so few tokens the scores are smaller than q, and plain products beat the kernel that avoids
        # them.
        scores = torch.baddbmm(
            q.new_empty(()),
            q.flatten(0, 1),
            k.flatten(0, 1).transpose(1, 2),
            beta=0,
            alpha=q.shape[-1] ** -0.5,
        )
        out = torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(q.shape)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


class Stream:
    """The image's or the text's half of a block; the last block's text has k and v alone, and no layers."""

    def __init__(self, modulation: Modulation, heads: Heads, layers: Sequence[Affine] = ()) -> None:
        self.modulation, self.heads, self.drops = modulation, heads, not layers
        if layers:
            self.out, self.wide, self.narrow = layers

    def feed(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward layer to x [B, N, D], in place."""
        return x.addcmul_(gate, self.narrow(self.wide(modulate(x, shift, scale), gelu=True)))


class Block:
    """A joint block: two streams attend to each other, and in some models the image to itself again."""

    def __init__(
        self, image: Stream, text: Stream, more: Heads | None = None, more_out: Affine | None = None
    ) -> None:
        self.image, self.text, self.more, self.more_out = image, text, more, more_out

    def attend_jointly(self, image: Tensor, words: Tensor) -> Tensor:
        """Let both streams, [3, B, heads, N, d] and [3 or 2, B, heads, M, d], attend to each other: [B, N
        + M or N, heads, d].
        """
        (_, batch, heads, n, d), m = image.shape, words.shape[3]
        k, v = image.new_empty(2, batch, heads, n + m, d)
        q = image.new_empty(batch, heads, n if self.text.drops else n + m, d)
        for target, part in zip((q, k, v), image, strict=True):
            target[:, :, :n] = part
        for target, part in zip((k, v) if self.text.drops else (q, k, v), words, strict=True):
            target[:, :, n:] = part
        if self.image.heads.norms:
            (norm_q, norm_k), norms = self.image.heads.norms, self.text.heads.norms
            normalise(q, (norm_q, *norms[:-1]), (n, m)[: len(norms)])
            normalise(k, (norm_k, norms[-1]), (n, m))
        return attend(q, k, v)

    def words(self, text: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Modulate text tokens [B, M, D] and project them to q, k and v, or to k and v: [B, M, …]."""
        return self.text.heads.project(self.text.modulation.apply(text, vectors))

    def __call__(
        self, x: Tensor, text: Tensor, image: Tensor, own: Tensor, words: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run image tokens x [B, N, D] and text [B, M, D] in place, `words` where those are known."""
        n = x.shape[1]
        (shift, scale, gate, *rest), own = image.unbind(1), own.unbind(1)
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        words = self.words(text, own) if words is None else words
        seen = self.attend_jointly(
            self.image.heads(torch.addcmul(shift, normed, scale)), self.text.heads.split(words)
        )
        x.addcmul_(gate, self.image.out(seen[:, :n]))
        if self.more:
            q, k, v = self.more(torch.addcmul(rest[3], normed, rest[4])).contiguous()
            if self.more.norms:
                q, k = normalise(q, self.more.norms[:1], [n]), normalise(k, self.more.norms[1:], [n])
            x.addcmul_(rest[5], self.more_out(attend(q, k, v)))
        self.image.feed(x, *rest[:3])
        if self.text.drops:
            return x, None
        text.addcmul_(own[2], self.text.out(seen[:, n:]))
        return x, self.text.feed(text, *own[3:])


class Ends(NamedTuple):
    """What a transformer has around its blocks."""

    image: Callable[[Tensor], Tensor]  # latents [B, C, H, W] → tokens [B, N, D] with their positions
    level: Callable[[Tensor, Tensor], Tensor]  # σ [U] and pooled [U, P] → conditioning [U, D]
    text: Callable[[Tensor], Tensor]  # tokens [U, M, J] → [U, M, D]
    last: Modulation
    out: Callable[[Tensor], Tensor]  # [B, N, D] → [B, N, side · side · C]
    side: int  # of a patch


class JointForward:
    """A transformer with its adapter merged; what it keeps is for prompts that it has seen."""

    def __init__(self, blocks: Sequence[Block], ends: Ends) -> None:
        self.blocks, self.ends = blocks, ends
        self.row: dict[tuple[int, float], int] = {}  # of a prompt, by its object's id, and a noise level
        self.prompts: list[TextFeatures] = []  # an id is an object's only while that lives
        self.known: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Sequence[TextFeatures]) -> Tensor:
        """Return v [B, C, H, W] of x [B, C, H, W], sigma [B] and B prompts."""
        (height, width), side = x.shape[-2:], self.ends.side
        row = self.look_up(sigma, cond)
        text, words, end, *vectors = self.known
        x, text, words = (
            self.ends.image(x).contiguous(),
            text.index_select(0, row),
            words.index_select(0, row),
        )
        for block, image, own in zip(self.blocks, vectors[::2], vectors[1::2], strict=True):
            x, text = block(x, text, image.index_select(0, row), own.index_select(0, row), words)
            words = None
        out = self.ends.out(self.ends.last.apply(x, end.index_select(0, row).unbind(1)))
        out = out.view(len(x), height // side, width // side, side, side, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    def look_up(self, sigma: Tensor, cond: Sequence[TextFeatures]) -> Tensor:
        """Return where in `known` each state's prompt and noise level are [B], new ones computed."""
        pairs = [(id(c), s) for c, s in zip(cond, sigma.tolist(), strict=True)]
        if len(self.row) > KEPT or sum(table.nbytes for table in self.known) > ROOM:
            self.row, self.prompts, self.known = {}, [], []
        if picked := [*{pair: i for i, pair in enumerate(pairs) if pair not in self.row}.values()]:
            new = self.prepare(sigma[picked], [cond[i] for i in picked])
            self.known = [torch.cat(both) for both in zip(self.known, new, strict=True)] if self.row else new
            self.row |= {pairs[i]: len(self.row) + place for place, i in enumerate(picked)}
            self.prompts += [cond[i] for i in picked]
        return torch.tensor([self.row[pair] for pair in pairs], device=sigma.device)

    def prepare(self, sigma: Tensor, cond: Sequence[TextFeatures]) -> list[Tensor]:
        """Compute what U pairs determine alone: text [U, M, D], the first block's words [U, M, …],
        modulation [U, parts, 1, D].
        """
        tokens, pooled = (
            torch.stack([getattr(c, name) for c in cond]).to(self.ends.last.weight.dtype)
            for name in ("tokens", "pooled")
        )
        conditioning = F.silu(self.ends.level(sigma, pooled))
        text = self.ends.text(tokens)
        vectors = [
            stream.modulation(conditioning) for block in self.blocks for stream in (block.image, block.text)
        ]
        words = self.blocks[0].words(text, vectors[1].unbind(1))
        return [text, words, self.ends.last(conditioning), *vectors]
