"""The reward models that this package knows: what they are, allow and miss, and where weights lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published file, pinned to a revision; `place` is "hub" (a Hugging Face repository) or "github".

    sha256 None: no public source for it was found, and fetching refuses the file unless it is told to accept
    it unpinned.
    """

    repo: str
    revision: str
    path: str
    sha256: str | None
    size: int | None = None
    place: str = "hub"


@dataclass(frozen=True)
class Known:
    """Describe a reward model: what a user reads before he fetches it, and what fetching needs."""

    name: str
    kind: str
    title: str
    licence: str
    compares_across_prompts: bool
    scale: str
    note: str
    gigabytes: float
    files: tuple[Published, ...]

    @property
    def how_to_get(self) -> str:
        """Return the command that installs it."""
        return f"g2rpo rewards fetch {self.name}"


# Hashes of the hub's files are its own records of these revisions; those of GitHub's were taken from the
# pinned commits.
_VIT_L = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
_SIGLIP = ("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3")
_VIT_L_WEIGHTS = Published(
    *_VIT_L,
    "model.safetensors",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    1710540580,
)
_VIT_L_CONFIG = Published(
    *_VIT_L, "config.json", "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a", 4519
)
# All of OpenAI's and LAION's CLIPs number words alike.
_CLIP_TOKENIZER = (
    Published(
        *_VIT_L, "vocab.json", "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69", 961143
    ),
    Published(
        *_VIT_L, "merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 524619
    ),
)

KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        Known(
            "pickscore",
            "pickscore",
            "PickScore v1",
            "MIT (code; the card of the weights names none)",
            False,
            "100 × cosine, about 18 to 24; flow_grpo divides it by 26",
            (
                "Keeps realism longest of the learned ones; pushed hard it ends in one glossy, "
                "over-detailed style."
            ),
            3.9,
            (
                Published(
                    "yuvalkirstain/PickScore_v1",
                    "a4e4367c6dfa7288a00c550414478f865b875800",
                    "model.safetensors",
                    "ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
                ),
                *_CLIP_TOKENIZER,
            ),
        ),
        Known(
            "hpsv2.1",
            "hpsv2",
            "HPS v2.1",
            "Apache-2.0",
            False,
            "cosine, about 0.2 to 0.35",
            "Over-saturates and over-contrasts: smooth, poster-like surfaces.",
            2.0,
            (
                Published(
                    "xswu/HPSv2",
                    "697403c78157020a1ae59d23f111aa58ced35b0a",
                    "HPS_v2.1_compressed.pt",
                    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
                    1972490005,
                ),
                *_CLIP_TOKENIZER,
            ),
        ),
        Known(
            "clipscore",
            "clipscore",
            "CLIPScore (OpenAI ViT-L/14)",
            "MIT",
            True,
            "100 × cosine, about 15 to 35",
            "Reads the prompt and not the quality: pictures blur, and the prompt appears as writing in them.",
            1.7,
            (
                _VIT_L_WEIGHTS,
                _VIT_L_CONFIG,
                Published(
                    *_VIT_L,
                    "preprocessor_config.json",
                    "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd",
                ),
                *_CLIP_TOKENIZER,
            ),
        ),
        Known(
            "imagereward",
            "imagereward",
            "ImageReward 1.0",
            "Apache-2.0",
            False,
            "standardised, about -2 to 2",
            "Compares pictures of one prompt only; as a single target it soon corrupts them.",
            1.8,
            (
                Published(
                    "zai-org/ImageReward",
                    "5736be03b2652728fb87788c9797b0570450ab72",
                    "ImageReward.pt",
                    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
                    1786880927,
                ),
                Published(
                    "google-bert/bert-base-uncased",
                    "86b5e0934494bd15c9632b12f734a8a67f723594",
                    "vocab.txt",
                    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                    231508,
                ),
            ),
        ),
        Known(
            "detection",
            "owlv2",
            "OWLv2 B/16: objects, counts, colours, places",
            "Apache-2.0",
            True,
            "share of what the prompt asks for that is found, 0 to 1",
            "Reads prompts in GenEval's form alone; sees no quality: cut-outs and copies will do.",
            0.7,
            (
                Published(
                    "google/owlv2-base-patch16-ensemble",
                    "cfd3195ba4ea9592eec887ded089f4c08eff231d",
                    "model.safetensors",
                    "e1e130b9e404cf91a75ad45644c1da9d7fa5284085eecc864266a6923efb99e7",
                    619918824,
                ),
                *_CLIP_TOKENIZER,
            ),
        ),
        Known(
            "aesthetic",
            "aesthetic",
            "LAION aesthetic, improved (MLP head)",
            "Apache-2.0 (head), MIT (CLIP)",
            True,
            "1 to 10, about 4 to 7",
            "Ignores the prompt: everything becomes the same moody picture.",
            1.2,
            (
                _VIT_L_WEIGHTS,
                _VIT_L_CONFIG,
                Published(
                    "christophschuhmann/improved-aesthetic-predictor",
                    "6934dd81792f086e613a121dbce43082cb8be85e",
                    "sac+logos+ava1-l14-linearMSE.pth",
                    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                    3714759,
                    "github",
                ),
            ),
        ),
        Known(
            "aesthetic_linear",
            "aesthetic",
            "LAION aesthetic, first (linear head)",
            "MIT",
            True,
            "1 to 10, about 4 to 7",
            "Ignores the prompt: paintings win over everything.",
            1.2,
            (
                _VIT_L_WEIGHTS,
                _VIT_L_CONFIG,
                Published(
                    "LAION-AI/aesthetic-predictor",
                    "6d122adad522ab246644d9dc1c6d7a3810ee255f",
                    "sa_0_4_vit_l_14_linear.pth",
                    "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
                    4071,
                    "github",
                ),
            ),
        ),
        Known(
            "aesthetic_v2.5",
            "aesthetic_v2.5",
            "Aesthetic Predictor v2.5 (SigLIP)",
            "AGPL-3.0 (head), Apache-2.0 (SigLIP)",
            True,
            "1 to 10, good from 5.5",
            "Ignores the prompt: likes illustrations and soft light.",
            1.7,
            (
                Published(
                    *_SIGLIP,
                    "model.safetensors",
                    "ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a",
                    3511950624,
                ),
                Published(
                    *_SIGLIP,
                    "config.json",
                    "adc04928d8fd19a61822584fe0cf2e813e5ebac17f3e49fb1ea096860ae6457b",
                    576,
                ),
                Published(
                    "discus0434/aesthetic-predictor-v2-5",
                    "c0e15567fa61252cbff43d70c49a8bd27202ca9a",
                    "models/aesthetic_predictor_v2_5.pth",
                    "a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220",
                    2644834,
                    "github",
                ),
            ),
        ),
    )
}
