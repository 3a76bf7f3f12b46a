"""What a picture was asked to show: graphs in which the text is certain, and the notes of web UIs."""

import json
from pathlib import Path
from typing import Any

import pytest
from drawn_pictures import colourful
from PIL import Image, PngImagePlugin

from comfy_g2rpo.files.captions import caption_of, of_graph

WANT = "a red kite over golden dunes at dawn"
COMMENT, MODEL, MAKE = 0x9286, 0x0110, 0x010F


def node(kind: str, **inputs: object) -> dict[str, Any]:
    """Write a node as the API form does."""
    return {"class_type": kind, "inputs": inputs}


def png(folder: Path, **chunks: str) -> Path:
    """Save a picture with text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    colourful(9).save(folder / "a.png", pnginfo=info)
    return folder / "a.png"


def encoded(text: object, **more: object) -> dict[str, Any]:
    """Write a sampler whose prompt is encoded from a text or a link."""
    return {
        "3": node("KSampler", model=["1", 0], positive=["6", 0], negative=["7", 0], seed=1),
        "6": node("CLIPTextEncode", clip=["1", 1], text=text),
        "7": node("CLIPTextEncode", clip=["1", 1], text="blurry"),
        **more,
    }


def behind(kind: str, **inputs: object) -> dict[str, Any]:
    """Write a graph whose encoder takes its text from a node."""
    return encoded(["20", 0], **{"20": node(kind, **inputs)})


UNCERTAIN = {
    "a language model": behind("OllamaGenerateAdvance", prompt="Describe it.", system="You are.", model="x"),
    "a captioner": behind("Florence2Run", image=["21", 0], text_input="", task="caption"),
    "a captioner behind a text view": encoded(
        ["19", 0],
        **{"19": node("ShowText|pysssss", text=["20", 0], text_0="old"), "20": node("LLM", prompt="Write.")},
    ),
    "a wildcard node": behind("DPRandomGenerator", text="a __colour__ kite", seed=1),
    "a template": behind("StringFormat", f_string="a photo of {a}", **{"values.a": "a kite"}),
    "a replacement": behind("StringReplace", string="a photo of X", find="X", replace="a kite"),
    "a file's line": behind("LoadTextFile", path="prompts.txt", value="3"),
    "choices in the text": encoded("a {red|blue} kite"),
    "a wildcard in the text": encoded("a __colours/warm__ kite"),
    "a concatenation with a language model": encoded(
        ["20", 0],
        **{
            "20": node("StringConcatenate", string_a="photo of ", string_b=["21", 0], delimiter=""),
            "21": node("LLM", prompt="Write."),
        },
    ),
    "a second sampler whose text is known": encoded(
        ["20", 0],
        **{
            "20": node("LLM", prompt="Write."),
            "30": node("FaceDetailer", model=["1", 0], positive=["31", 0]),
            "31": node("CLIPTextEncode", clip=["1", 1], text="a face"),
        },
    ),
    "two conditionings in one": {
        "3": node("KSampler", model=["1", 0], positive=["5", 0]),
        "5": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0]),
        "6": node("CLIPTextEncode", text="a kite"),
        "7": node("CLIPTextEncode", text="a dune"),
    },
    "a sentence that is not known beside tags": {
        "3": node("KSampler", model=["1", 0], positive=["6", 0]),
        "6": node("CLIPTextEncodeFlux", clip_l="kite", t5xxl=["9", 0]),
        "9": node("LLM", prompt="Write."),
    },
    "texts that double at every node": encoded(
        ["20", 0],
        **{
            str(i): node(
                "StringConcatenate", string_a=[str(i + 1), 0], string_b=[str(i + 1), 0], delimiter="x" * 500
            )
            for i in range(20, 60)
        },
        **{"60": node("PrimitiveString", value="a kite")},
    ),
    "types that are no text": encoded(["20", []], **{"20": {"class_type": ["x"], "inputs": {"value": WANT}}}),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_a_text_that_the_graph_does_not_hold_is_no_prompt(name: str) -> None:
    assert of_graph(UNCERTAIN[name]) == ""


def with_encoder(kind: str, **texts: str) -> dict[str, Any]:
    """Write a graph with an encoder of several texts."""
    return {"3": node("KSampler", model=["1", 0], positive=["6", 0]), "6": node(kind, clip=["1", 1], **texts)}


CERTAIN = {
    "a text": encoded(WANT),
    "a primitive": behind("PrimitiveStringMultiline", value=f" {WANT}\n"),
    "a text view": encoded(
        ["19", 0],
        **{"19": node("ShowText|pysssss", text=["20", 0]), "20": node("CR Prompt Text", prompt=WANT)},
    ),
    "a wildcard that was filled in": behind(
        "ImpactWildcardProcessor", wildcard_text="a __colour__ kite", populated_text=WANT
    ),
    "a concatenation": behind(
        "StringConcatenate", string_a="a red kite", string_b="over golden dunes at dawn", delimiter=" "
    ),
    "ControlNet before guidance": {
        "3": node("KSampler", model=["1", 0], positive=["4", 0], negative=["4", 1]),
        "4": node("ControlNetApplyAdvanced", positive=["5", 0], negative=["7", 0], strength=1.0),
        "5": node("FluxGuidance", conditioning=["6", 0], guidance=3.5),
        "6": node("CLIPTextEncode", text=WANT),
        "7": node("CLIPTextEncode", text="blurry"),
    },
    "HiDream": with_encoder("CLIPTextEncodeHiDream", clip_l="kite", clip_g="kite", t5xxl="kite", llama=WANT),
    "HunyuanDiT": with_encoder("CLIPTextEncodeHunyuanDiT", bert="kite", mt5xl=WANT),
    "SDXL": with_encoder("CLIPTextEncodeSDXL", text_g=WANT, text_l="photo"),
    "SD3 without T5": with_encoder("CLIPTextEncodeSD3", clip_l="kite", clip_g=WANT, t5xxl=""),
    "Lumina 2": with_encoder("CLIPTextEncodeLumina2", system_prompt="superior", user_prompt=WANT),
    "Qwen-Image-Edit": with_encoder("TextEncodeQwenImageEditPlus", prompt=WANT),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_a_text_that_the_graph_holds_is_the_prompt(name: str) -> None:
    assert of_graph(CERTAIN[name]) == WANT


def test_the_second_output_of_a_node_is_the_negative_one() -> None:
    graph = CERTAIN["ControlNet before guidance"]
    crossed = graph | {"3": node("KSampler", model=["1", 0], positive=["4", 1])}
    assert of_graph(crossed) == "blurry"


A1111 = f"{WANT}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5"
SWARM = json.dumps({"sui_image_params": {"prompt": WANT, "negativeprompt": "", "seed": 5}}, indent=1)
FOOOCUS = json.dumps({"prompt": WANT, "negative_prompt": "", "base_model": "x", "version": "Fooocus v2.5.0"})
NOVELAI = {"Software": "NovelAI", "Description": WANT}
CHARACTERS = {"v4_prompt": {"caption": {"base_caption": WANT, "char_captions": [{"char_caption": "a boy"}]}}}
CHUNKS = {
    "A1111": ({"parameters": A1111}, WANT, "parameters"),
    "A1111 of several lines": ({"parameters": f"a kite\n{A1111}"}, f"a kite\n{WANT}", "parameters"),
    "A1111 with braces": ({"parameters": "{{red}} kite\nSteps: 3"}, "{{red}} kite", "parameters"),
    "SwarmUI": ({"parameters": SWARM}, WANT, "parameters"),
    "SwarmUI, cut off": ({"parameters": SWARM[:60]}, "", ""),
    "SwarmUI without a prompt": ({"parameters": '{"sui_image_params": {"prompt": 3}}'}, "", ""),
    "Fooocus": ({"parameters": FOOOCUS, "fooocus_scheme": "fooocus"}, WANT, "parameters"),
    "other JSON": ({"parameters": '{"prompt": "Describe this image.", "model": "llava"}'}, "", ""),
    "a JSON list": ({"parameters": '[{"prompt": "x"}]'}, "", ""),
    "InvokeAI": ({"invokeai_metadata": json.dumps({"positive_prompt": WANT, "seed": 1})}, WANT, "invokeai"),
    "InvokeAI, damaged": ({"invokeai_metadata": '{"positive_prompt": ["x"]}'}, "", ""),
    "NovelAI": (NOVELAI | {"Comment": '{"uc": "blurry"}'}, WANT, "novelai"),
    "NovelAI with characters": (NOVELAI | {"Comment": json.dumps(CHARACTERS)}, "", ""),
    "another program's description": ({"Description": WANT}, "", ""),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_the_chunks_of_a_png_are_read_for_what_they_are(name: str, tmp_path: Path) -> None:
    chunks, prompt, source = CHUNKS[name]
    assert caption_of(png(tmp_path, **chunks)) == (prompt, source)


def exif(tag: int, value: object, folder: int | None = None) -> Image.Exif:
    """Write one EXIF tag, in a folder of tags if one is given."""
    made = Image.Exif()
    (made if folder is None else made.get_ifd(folder))[tag] = value
    return made


GRAPH = json.dumps(encoded(WANT))
UNICODE, SUB = b"UNICODE\0", 0x8769
EXIF = {
    "A1111": (exif(COMMENT, UNICODE + A1111.encode("utf-16-be"), SUB), "parameters"),
    "SwarmUI": (exif(COMMENT, UNICODE + SWARM.encode("utf-16-le"), SUB), "parameters"),
    "a comment in ASCII": (exif(COMMENT, b"ASCII\0\0\0" + A1111.encode(), SUB), "parameters"),
    "Fooocus": (exif(COMMENT, FOOOCUS), "parameters"),
    "a graph in the comment": (exif(COMMENT, json.dumps({"prompt": json.loads(GRAPH)})), "parameters"),
    "ComfyUI": (exif(MODEL, f"prompt:{GRAPH}"), "comfyui"),
    "another order of ComfyUI's tags": (exif(MAKE, f"Prompt:{GRAPH}"), "comfyui"),
}


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize("name", EXIF)
def test_exif_holds_prompts_too(name: str, ending: str, tmp_path: Path) -> None:
    made, source = EXIF[name]
    colourful(9).save(tmp_path / f"a.{ending}", exif=made.tobytes())
    assert caption_of(tmp_path / f"a.{ending}") == (WANT, source)


@pytest.mark.parametrize("comment", [b"", b"\xff\xfe\xfa", UNICODE + b"\0\xd8", b"JIS\0\0\0\0\0\x1b$B", 7])
def test_a_strange_comment_does_no_harm(comment: object, tmp_path: Path) -> None:
    colourful(9).save(tmp_path / "a.jpg", exif=exif(COMMENT, comment, SUB))
    assert isinstance(caption_of(tmp_path / "a.jpg")[0], str)


INDEX = [{"file": "a.png", "prompt": WANT, "seed": 5, "scores": {}}, {"file": "b.png", "prompt": "a cat"}]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (json.dumps(INDEX), (WANT, "run")),
        ("[", ("", "")),
        ('{"file": "a.png"}', ("", "")),
        (json.dumps([3, {"file": "a.png"}, {"file": "a.png", "prompt": 3}]), ("", "")),
    ],
)
def test_the_index_of_a_run_says_what_its_pictures_show(
    content: str, found: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text(content)
    assert caption_of(png(tmp_path)) == found
