"""Commands answer in their own words: what libraries have to say at import stays out of it."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfy_g2rpo.files.save_pictures import save_png
from g2rpo_trainer.quiet import VERBOSITY, quieten_notices

TO_Q = "transformer_blocks.0.attn.to_q"
NAMES = {
    "diffusers": (f"transformer.{TO_Q}", "A", "B"),
    "native": ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "down", "up"),
    "kohya": (f"lora_unet_{TO_Q.replace('.', '_')}", "down", "up"),
    "peft": (f"base_model.model.{TO_Q}", "A", "B"),
}
# As `g2rpo` does, several times in one process.
PROGRAM = """
import sys
from g2rpo_trainer.cli import main
for words in sys.argv[1:]:
    try:
        main(words.split("|"))
    except SystemExit:
        print("\f")
"""


def said_by(*commands: str) -> tuple[str, str]:
    """Run commands in a process of their own; return what they print."""
    known = {name: value for name, value in os.environ.items() if name not in VERBOSITY}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *commands], capture_output=True, text=True, env=known, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.mark.long
def test_check_lora_answers_in_its_own_words_alone(tmp_path: Path) -> None:
    for form, (name, down, up) in NAMES.items():
        rows = 192 if form == "native" else 64
        pair = {
            f"{name}.lora_{down}.weight": torch.ones(4, 64),
            f"{name}.lora_{up}.weight": torch.ones(rows, 4),
        }
        save_file(pair, tmp_path / f"{form}.safetensors")
    said, errors = said_by(*(f"check-lora|{tmp_path / form}.safetensors|--family|sd3" for form in NAMES))
    assert errors == ""
    assert said.count("1 pairs\n") == len(NAMES)


@pytest.mark.long
def test_other_quick_commands_do_so_too(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", torch.zeros(8, 8, 3))
    picture = str(tmp_path / "a.png")
    quick = ["rewards|list", f"score|{picture}|--reward|jpeg", f"sample|--prompt|a|--out|{picture}.png"]
    said, errors = said_by(*quick)
    *each, rest = said.split("\f\n")
    assert len(each) == len(quick) and all(each) and (rest, errors) == ("", "")


def test_who_wants_to_hear_the_libraries_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VERBOSITY[0], "debug")
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quieten_notices()
        warnings.warn("soon", FutureWarning, stacklevel=1)
    assert os.environ[VERBOSITY[0]] == "debug" and len(heard) == 1


@pytest.mark.parametrize(
    "name", ["bitsandbytes.backends.cpu.ops", "matplotlib.font_manager", "huggingface_hub"]
)
def test_errors_and_what_users_can_act_upon_are_heard(name: str) -> None:
    quieten_notices()
    assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quieten_notices()
        warnings.warn("this card is too old for this PyTorch", UserWarning, stacklevel=1)
    assert len(heard) == 1
