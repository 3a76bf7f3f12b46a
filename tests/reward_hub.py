"""A server that stands in for the hub and for GitHub."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import torch
from reward_folders import (
    BERT_WORDS,
    EMBED,
    HEAD,
    IMAGE,
    VISION,
    WIDTH,
    clip_config,
    clip_model,
    clip_tokenizer,
    head_weights,
    imagereward_weights,
    named_vision,
    open_clip_weights,
    owlv2_model,
    siglip_vision,
)
from safetensors.torch import save

from comfy_g2rpo.rewards.models.catalogue import Published

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serve files as the hub and GitHub do; `spoil` changes what is sent of a path.

    `goes_on` is False for a server that knows no ranges; `asked` has paths and ranges.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.goes_on = True
        self.spoil: dict[str, Callable[[bytes], bytes]] = {}
        self.tokens: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, wanted = unquote(self.path), self.headers.get("Range") if hub.goes_on else None
                hub.asked.append((path, wanted))
                hub.tokens += [self.headers[name] for name in ("Authorization",) if name in self.headers]
                content = hub.files.get(path)
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
                if content is None or (wanted and start >= len(content)):
                    self.send_error(404 if content is None else 416)
                    return
                sent = hub.spoil.get(path, bytes)(content)
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                self.wfile.write(sent[start:])

            def log_message(self, form: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, repo: str, path: str, content: bytes, place: str = "hub") -> Published:
        """Serve a file; return its pin."""
        place_of = f"/{repo}/resolve/{REVISION}/{path}" if place == "hub" else f"/{repo}/{REVISION}/{path}"
        self.files[place_of] = content
        return Published(repo, REVISION, path, hashlib.sha256(content).hexdigest(), len(content), place)


def pickled(content: Any) -> bytes:
    """Save as the published `.pt` files are."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tokenizer_files(hub: Hub) -> list[Published]:
    """Publish CLIP's word list."""
    words, merges = clip_tokenizer()
    return [
        hub.publish("clip", "vocab.json", words.encode()),
        hub.publish("clip", "merges.txt", merges.encode()),
    ]


def clip_files(hub: Hub, model: torch.nn.Module, act: str = "gelu") -> list[Published]:
    """Publish a CLIP in transformers' layout."""
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    return [
        hub.publish("clip", "model.safetensors", save(weights, {"format": "pt"})),
        hub.publish("clip", "config.json", json.dumps(clip_config(act)).encode()),
    ]


def published(hub: Hub, name: str) -> list[Published]:
    """Publish a tiny model in the layout of a known reward."""
    if name == "pickscore":
        return [clip_files(hub, clip_model(seed=1))[0], *tokenizer_files(hub)]
    if name == "clipscore":
        form = json.dumps({"size": IMAGE, "crop_size": IMAGE}).encode()
        pictures = hub.publish("clip", "preprocessor_config.json", form)
        return [*clip_files(hub, clip_model()), pictures, *tokenizer_files(hub)]
    if name == "detection":
        weights = owlv2_model().state_dict() | {"box_bias": torch.zeros(4)}
        return [hub.publish("owlv2", "model.safetensors", save(weights)), *tokenizer_files(hub)]
    if name == "hpsv2.1":
        content = pickled({"epoch": 3, "state_dict": open_clip_weights()})
        return [hub.publish("hps", "HPS_v2.1_compressed.pt", content), *tokenizer_files(hub)]
    if name == "imagereward":
        words = hub.publish("bert", "vocab.txt", ("\n".join(BERT_WORDS) + "\n").encode())
        return [hub.publish("imagereward", "ImageReward.pt", pickled(imagereward_weights())), words]
    if name == "aesthetic_v2.5":
        weights = named_vision(siglip_vision())
        weights |= {"text_model.x": torch.zeros(2), "logit_bias": torch.zeros(1)}
        config = json.dumps({"vision_config": VISION, "text_config": {}}).encode()
        head = pickled(head_weights(WIDTH, "scoring_head.{}", HEAD))
        return [
            hub.publish("siglip", "model.safetensors", save(weights)),
            hub.publish("siglip", "config.json", config),
            hub.publish("head", "models/aesthetic_predictor_v2_5.pth", head, "github"),
        ]
    head = head_weights(EMBED, "layers.{}", HEAD) if name == "aesthetic" else head_weights(EMBED, "", (1,))
    clip = clip_files(hub, clip_model("quick_gelu"), "quick_gelu")
    return [*clip, hub.publish("head", "a+b.pth", pickled(head), "github")]
