"""The forward of a Stable Diffusion 3 transformer in rollouts: what diffusers computes, without gradients,
nothing of it twice.

The adapter is added to copies of the weights; the model itself is not touched. q, k and v are one product.
What depends on a state's prompt and noise level alone (the modulation, and the text's q, k and v in the first
block) is computed once per pair and kept. What the last block would compute for the text and drop is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

EPS = 1e-6  # of every norm in this architecture
PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKED = 2**20  # numbers in the largest weight that is worth a second copy
# tokens from which oneDNN is faster than PyTorch's own choice; it keeps half a megabyte of code for every
# shape that it meets
ROWS = 512
KEPT = 256  # pairs of a prompt and a noise level


class TextFeatures(Protocol):
    """One prompt's text features."""

    tokens: Tensor  # [M, joint_attention_dim]
    pooled: Tensor  # [pooled_projection_dim]


class Affine:
    """Linear layers that read the same input as one, their adapters added where they have any."""

    def __init__(self, *layers: nn.Module) -> None:
        bases = [layer.get_base_layer() if hasattr(layer, "get_delta_weight") else layer for layer in layers]
        weights = [adapted(base, layer) for base, layer in zip(bases, layers, strict=True)]
        biases = [base.bias for base in bases]
        self.weight, self.bias = (
            values[0] if len(layers) == 1 else torch.cat(values) for values in (weights, biases)
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


def adapted(base: nn.Module, layer: nn.Module) -> Tensor:
    """Return a layer's weight with what its active adapters add to it."""
    names = (
        []
        if base is layer or layer.disable_adapters
        else [name for name in layer.active_adapters if name in layer.lora_A]
    )
    return sum((layer.get_delta_weight(name) for name in names), base.weight)


class Modulation:
    """The adaptive shifts, scales and gates of one stream of one block."""

    def __init__(self, layer: nn.Linear, scales: Sequence[int]) -> None:
        bias = layer.bias.clone().view(-1, layer.in_features)
        bias[list(scales)] += 1  # they multiply as 1 + scale
        self.weight, self.bias, self.parts = layer.weight, bias.flatten(), len(bias)

    def __call__(self, conditioning: Tensor) -> Tensor:
        """Compute the vectors [U, parts, 1, D] from conditioning [U, D]."""
        return F.linear(conditioning, self.weight, self.bias).view(len(conditioning), self.parts, 1, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the layer x [B, N, D], then scale and shift it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


class Heads:
    """One projection for q, k and v of a stream, or k and v alone, with the weights of the RMS norms."""

    def __init__(self, layers: Sequence[nn.Module], norms: Sequence[nn.Module | None], heads: int) -> None:
        self.project, self.parts, self.heads = Affine(*layers), len(layers), heads
        self.norms = None if norms[0] is None else [norm.weight for norm in norms]

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
    """The image's or the text's half of a block; `drops` is the last block's text, only k and v."""

    def __init__(
        self, norm: nn.Module, heads: Heads, out: nn.Module | None, feed_forward: nn.Module | None
    ) -> None:
        self.drops = feed_forward is None
        vectors = norm.linear.out_features // norm.linear.in_features
        self.modulation = Modulation(norm.linear, (0,) if self.drops else range(1, vectors, 3))
        self.heads = heads
        if not self.drops:
            self.out, self.wide, self.narrow = (
                Affine(out),
                Affine(feed_forward.net[0].proj),
                Affine(feed_forward.net[2]),
            )

    def feed(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward layer to x [B, N, D], in place."""
        return x.addcmul_(gate, self.narrow(self.wide(modulate(x, shift, scale), gelu=True)))


class Block:
    """A joint block: two streams attend to each other, and in some models the image to itself again."""

    def __init__(self, block: JointTransformerBlock) -> None:
        attn, more, heads = block.attn, block.attn2, block.attn.heads
        image = Heads((attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), heads)
        self.image = Stream(block.norm1, image, attn.to_out[0], block.ff)
        layers, norms = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k),
        )
        drops = int(block.context_pre_only)
        self.text = Stream(
            block.norm1_context,
            Heads(layers[drops:], norms[drops:], heads),
            attn.to_add_out,
            block.ff_context,
        )
        self.more = (
            None
            if more is None
            else Heads((more.to_q, more.to_k, more.to_v), (more.norm_q, more.norm_k), heads)
        )
        self.more_out = None if more is None else Affine(more.to_out[0])

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
        shift, scale = (vectors[1], vectors[0]) if self.text.drops else vectors[:2]
        return self.text.heads.project(modulate(text, shift, scale))

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


class Merged:
    """A transformer with its adapter merged; what it keeps is for prompts that it has seen."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self.transformer = transformer
        self.blocks = [Block(block) for block in transformer.transformer_blocks]
        self.last = Modulation(transformer.norm_out.linear, (0,))
        self.row: dict[tuple[int, float], int] = {}  # of a prompt, by its object's id, and a noise level
        self.prompts: list[TextFeatures] = []  # an id is an object's only while that lives
        self.known: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Sequence[TextFeatures]) -> Tensor:
        """Return v [B, C, H, W] of x [B, C, H, W], sigma [B] and B prompts."""
        model, (height, width), side = self.transformer, x.shape[-2:], self.transformer.config.patch_size
        row = self.look_up(sigma, cond)
        text, words, end, *vectors = self.known
        x, text, words = (
            model.pos_embed(x).contiguous(),
            text.index_select(0, row),
            words.index_select(0, row),
        )
        for block, image, own in zip(self.blocks, vectors[::2], vectors[1::2], strict=True):
            x, text = block(x, text, image.index_select(0, row), own.index_select(0, row), words)
            words = None
        scale, shift = end.index_select(0, row).unbind(1)
        out = model.proj_out(modulate(x, shift, scale))
        out = out.view(len(x), height // side, width // side, side, side, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    def look_up(self, sigma: Tensor, cond: Sequence[TextFeatures]) -> Tensor:
        """Return where in `known` each state's prompt and noise level are [B], new ones computed."""
        pairs = [(id(c), s) for c, s in zip(cond, sigma.tolist(), strict=True)]
        if len(self.row) > KEPT:
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
        model = self.transformer
        tokens, pooled = (
            torch.stack([getattr(c, name) for c in cond]).to(self.last.weight.dtype)
            for name in ("tokens", "pooled")
        )
        conditioning = F.silu(model.time_text_embed(sigma * 1000, pooled))
        text = model.context_embedder(tokens)
        vectors = [
            stream.modulation(conditioning) for block in self.blocks for stream in (block.image, block.text)
        ]
        return [text, self.blocks[0].words(text, vectors[1].unbind(1)), self.last(conditioning), *vectors]
