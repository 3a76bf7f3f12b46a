"""`g2rpo export` and `g2rpo check-lora`: LoRA files into another form, and what would load of them."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..quiet import stay_offline
from .answers import answer
from .arguments import Best, CommandError, Family, lora_of

if TYPE_CHECKING:
    from comfy_g2rpo.lora.forms import Reading
    from comfy_g2rpo.lora.key_names import Family as FoundFamily

    from ..lora.ask_diffusers import Taken
    from ..lora.lora_files import Fit

FORMS = ("auto", "native", "diffusers")
PRECISIONS = ("keep", "fp32", "bf16", "fp16")
LOSSY = 0.5
"""Share of a change that may be lost in merging before it is worth a note."""


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|RUN", help="A LoRA file of any form, or a run; with --extract, a fine-tuned model."
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="SAFETENSORS", help="The file to write; an existing one is never overwritten.")
]
Form = Annotated[
    str,
    typer.Option(
        help="native (ComfyUI, every model), diffusers, or auto: the one that both read if there is one, "
        "else native."
    ),
]


def export(
    file: File,
    out: Out,
    form: Form = "auto",
    family: Family = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Cut every pair to this rank by SVD; with --extract: the rank."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the pairs: keep, fp32, bf16, fp16.")] = "keep",
    alpha: Annotated[
        bool,
        typer.Option(
            "--alpha/--no-alpha",
            help="Write .alpha beside each pair; only FLUX.1's load_lora_weights of diffusers takes it.",
        ),
    ] = True,
    merge: Annotated[
        Path | None, typer.Option(metavar="BASE", help="Add the LoRA to this model and write the model.")
    ] = None,
    strength: Annotated[float, typer.Option(min=-100, max=100, help="Of the LoRA in --merge.")] = 1.0,
    extract: Annotated[
        Path | None, typer.Option(metavar="BASE", help="Write the LoRA that leads from this model to FILE.")
    ] = None,
    best: Best = False,
) -> None:
    """Convert a LoRA file, cut its rank, merge it into a model, or extract it from a fine-tuned one.

    Errors are stated.
    """
    for name, value, choices in (("form", form, FORMS), ("precision", precision, PRECISIONS)):
        if value not in choices:
            raise CommandError(f"--{name} is {value!r}; choose one of: {', '.join(choices)}")
    if out.suffix != ".safetensors":
        raise CommandError(f"--out is {out}; its name must end in .safetensors")
    if merge and extract:
        raise CommandError("--merge and --extract exclude each other; give one of them")
    if merge and (form != "auto" or precision != "keep"):
        raise CommandError(
            "--form and --precision are for LoRA files; --merge keeps the names and types of the model"
        )
    from ..lora.weight_files import check_free

    check_free(out)
    file = lora_of(file, best)
    if extract:
        _extract(file, extract, out, form, family, rank or 16, precision, alpha)
    elif merge:
        _merge(file, merge, out, family, rank, strength)
    else:
        _convert(file, out, form, family, rank, precision, alpha)


def _convert(
    file: Path, out: Path, form: str, family: str | None, rank: int | None, precision: str, alpha: bool
) -> None:
    """Write a LoRA file in another form."""
    from comfy_g2rpo.lora.convert import renamed
    from comfy_g2rpo.lora.forms import check_sound
    from comfy_g2rpo.lora.modelspec import date_of
    from comfy_g2rpo.lora.preview import SUFFIX, run_of, save_preview

    from ..lora.lora_files import form_for, lora_file, read_any, which

    reading = read_any(file)
    check_sound(reading, file)
    found = which(reading, file, family)
    pairs = reading.scaled()
    style = form_for(found, pairs) if form == "auto" else form
    _notes(reading)
    metadata = {**date_of(lora_file(file).stat().st_mtime), **reading.metadata}
    _write(out, renamed(found, pairs, style), style, found, rank, precision, metadata, alpha)
    if run := run_of(file):
        remark = save_preview(out, *run)
        typer.echo(f"note: {remark}" if remark else f"its picture: {out.stem}{SUFFIX}", err=bool(remark))


def _write(
    out: Path,
    pairs: Mapping[str, Any],
    style: str,
    family: FoundFamily,
    rank: int | None,
    precision: str,
    metadata: dict,
    alpha: bool,
) -> None:
    """Cut pairs to a rank, set their precision, write them and say what was written."""
    import torch

    from comfy_g2rpo.lora.convert import resized, shapes
    from comfy_g2rpo.lora.modelspec import base_of_lora, named_base

    from ..lora.lora_files import FAMILY_KEY, write_new

    if rank is not None:
        pairs, error = resized(pairs, rank)
        typer.echo(f"cut to rank {rank}: relative error {error:.2e} of the change of weights")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype:
        pairs = {module: (down.to(dtype), up.to(dtype)) for module, (down, up) in pairs.items()}
    notes = {**named_base(base_of_lora(family, shapes(pairs))), **metadata, FAMILY_KEY: family.name}
    write_new(out, pairs, style, notes, alpha)
    ranks = sorted({len(down) for down, _ in pairs.values()})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    typer.echo(f"{len(pairs)} modules of {family.title}, {style} form, {spread}")
    if style == "diffusers" and alpha and not family.pipeline_takes_alpha:
        reader = "transformer.load_lora_adapter; for pipeline.load_lora_weights add --no-alpha"
        typer.echo(f"note: diffusers reads it by {reader}", err=True)
    typer.echo(out)
    answer({"file": out, "family": family.name, "form": style, "modules": len(pairs), "ranks": ranks})


def _merge(file: Path, base: Path, out: Path, family: str | None, rank: int | None, strength: float) -> None:
    """Write a model with a LoRA in its weights."""
    from comfy_g2rpo.lora.forms import check_sound

    from ..lora.lora_files import fit, read_any
    from ..lora.merge import merge
    from ..lora.weight_files import look_at

    if rank is not None:
        raise CommandError("--rank and --merge exclude each other; a model has room for the whole LoRA")
    reading = read_any(file)
    check_sound(reading, file)
    model = look_at(base)
    made = fit(reading, file, model, family)
    if bad := [*made.absent, *made.misshapen]:
        raise CommandError(
            f"{file} does not fit {base}: {len(bad)} of its modules, such as {bad[0]}, are absent or "
            "of another size there"
        )
    _notes(reading)
    lost = merge(made, model, out, strength, {"g2rpo.merged": file.name, "g2rpo.strength": f"{strength:g}"})
    typer.echo(
        f"{len(made.fitting)} of {len(model.tensors)} tensors changed; rounding to the model's type "
        f"lost {lost:.1e} of the change"
    )
    if lost > LOSSY:
        advice = "merge into a 16 bit model, or load the LoRA beside this one"
        typer.echo(f"note: this type is too coarse for the change; {advice}", err=True)
    typer.echo(out)
    answer({"file": out, "family": made.family.name, "changed": len(made.fitting), "lost": lost})


def _extract(
    tuned: Path, base: Path, out: Path, form: str, family: str | None, rank: int, precision: str, alpha: bool
) -> None:
    """Write the LoRA that leads from one model to another."""
    from comfy_g2rpo.lora.convert import renamed
    from comfy_g2rpo.lora.modelspec import date_of

    from ..lora.lora_files import extract, form_for
    from ..lora.weight_files import look_at

    if family is not None:
        raise CommandError("--family is for LoRA files; models show theirs by their names")
    made = extract(look_at(tuned), look_at(base), rank)
    typer.echo(f"rank {rank}: relative error {made.error:.2e} of the change of {len(made.pairs)} matrices")
    if made.left_out:
        typer.echo(
            f"left out: {len(made.left_out)} changed tensors that no LoRA holds (biases, norms …), "
            f"such as {made.left_out[0]!a}"
        )
    style = form_for(made.family, made.pairs) if form == "auto" else form
    metadata = {"g2rpo.extracted": tuned.name, "g2rpo.base_model": base.name, **date_of(time.time())}
    _write(out, renamed(made.family, made.pairs, style), style, made.family, None, precision, metadata, alpha)


def _notes(reading: Reading) -> None:
    """Print what a conversion took for granted or left out."""
    if count := len(reading.missing_alpha):
        how = f"taken from {reading.alpha_from}" if reading.alpha_from else "their rank is taken for it"
        typer.echo(f"note: {count} pairs have no alpha; {how}", err=True)
    if reading.embeddings:
        typer.echo(f"note: {len(reading.embeddings)} keys of embeddings are left out", err=True)
    if reading.text:
        typer.echo(f"note: {len(reading.text)} keys of text encoders are left out", err=True)


def check_lora(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA file.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="A safetensors file, or a folder; only its header is read."),
    ] = None,
    family: Family = None,
) -> None:
    """Say what of a LoRA file would load in ComfyUI and diffusers, what not, and what mends it.

    Exit code 1 if something would not.
    """
    from comfy_g2rpo.files.safe import read_tensors
    from comfy_g2rpo.lora import wide
    from comfy_g2rpo.lora.core_loader import applied, is_control
    from comfy_g2rpo.lora.forms import faults

    stay_offline()
    from ..lora.ask_diffusers import in_diffusers
    from ..lora.lora_files import fit, lora_file, read_any, which
    from ..lora.weight_files import look_at

    reading = read_any(file)
    tensors = wide(read_tensors(lora_file(file))[0])
    troubles: list[str] = []
    lines, mend = [_content(reading)], ""
    model = look_at(against) if against else None
    if reading.pairs or reading.other:
        found = which(reading, file, family, model)
        lines.append(f"family: {found.title} ({found.name})")
        if is_control(tensors):
            lines.append("a control LoRA of FLUX.1's makers, which ComfyUI renames as it loads")
        if not faults(reading):
            mend = f"g2rpo export {shlex.quote(str(file))} --family {found.name} --out NEW.safetensors"
        core = applied(tensors, found)
        for version, why in core.stops.items():
            troubles.append(f"ComfyUI {version} stops with an error at this file: {why}; save the file again")
        if reading.pairs:
            taken = in_diffusers(tensors, reading, found)
            lines += _loading(reading, found, core.keys, taken, troubles, mend)
        lines += _others(reading, core.keys, troubles)
        if model and reading.pairs:
            lines += _fitting(fit(reading, file, model, family), troubles)
        elif model:
            lines.append("model: not compared, because only pairs are")
    lines += _forms(reading, troubles, mend)
    for line in lines:
        typer.echo(line)
    for trouble in troubles:
        typer.echo(f"! {trouble}")
    nothing = not (reading.pairs or reading.other)
    answer({"file": file, "loads": not (troubles or nothing), "found": lines, "troubles": troubles})
    if troubles or nothing:
        raise typer.Exit(1)


def _content(reading: Reading) -> str:
    """Count what a file holds."""
    from comfy_g2rpo.lora.forms import by_kind

    counts = [f"{len(reading.pairs)} pairs"]
    counts += [f"{len(keys)} keys of {kind}" for kind, keys in by_kind(reading.other).items()]
    counts += [f"{len(reading.text)} keys of text encoders"] * bool(reading.text)
    counts += [f"{len(reading.embeddings)} keys of embeddings"] * bool(reading.embeddings)
    return ", ".join(counts)


def _loading(
    reading: Reading,
    family: FoundFamily,
    core: Mapping[str, str],
    diffusers: Taken,
    troubles: list[str],
    mend: str,
) -> list[str]:
    """Count by form what each program would load, and add what is lost to `troubles`."""
    from comfy_g2rpo.lora.forms import naming_in

    names = {module: naming_in(family, module) for module in reading.pairs}
    common = Counter(name for name in names.values() if name != "both").most_common(1)
    groups: dict[tuple[str, str], list[str]] = {}
    for module, name in names.items():
        kind = common[0][0] if name == "both" and common else name
        groups.setdefault((reading.forms[module].prefix, kind), []).append(module)
    lines = []
    for (prefix, name), modules in groups.items():
        taken = {module: core[reading.forms[module].up] for module in modules}
        kind = "names that are the same everywhere" if name == "both" else f"{name} names"
        by = f"ComfyUI: {_in_core(taken)}; diffusers: {_counted(modules, diffusers)}"
        lines.append(f"{len(modules)} × {prefix or 'no prefix'} + {kind}: {by}")
        troubles += _lost(taken, "modules", f"; mend: {mend} --form native" if mend else "")
    return lines


def _in_core(taken: Mapping[str, str]) -> str:
    """Count which ComfyUI takes what."""
    from comfy_g2rpo.lora.core_loader import OLD
    from comfy_g2rpo.lora.key_names import BOTH, NEW, NONE

    words = {
        BOTH: "load",
        NEW: "load from ComfyUI 0.33 on only",
        OLD: "load before ComfyUI 0.33 only",
        NONE: "are ignored",
    }
    counts = Counter(taken.values())
    return ", ".join(f"{counts[key]} {words[key]}" for key in words if counts[key])


def _lost(taken: Mapping[str, str], what: str, more: str) -> list[str]:
    """Say what some ComfyUI does not take."""
    from comfy_g2rpo.lora.core_loader import OLD
    from comfy_g2rpo.lora.key_names import BOTH, NEW

    lost = [name for name in taken if taken[name] != BOTH]
    if not lost:
        return []
    some = {taken[name] for name in lost}
    version = " before 0.33" if some == {NEW} else " from 0.33 on" if some == {OLD} else ""
    return [f"ComfyUI{version} ignores {len(lost)} {what}, such as {min(lost)}{more}"]


def _others(reading: Reading, core: Mapping[str, str], troubles: list[str]) -> list[str]:
    """Count what ComfyUI would load of adapters that are no pairs, and say that it alone does."""
    from comfy_g2rpo.lora.forms import by_kind
    from comfy_g2rpo.lora.kinds import DORA

    lines = []
    for kind, keys in by_kind(reading.other).items():
        taken = {key: core[key] for key in keys}
        lines.append(f"{len(keys)} × {kind}: ComfyUI: {_in_core(taken)}")
        plain = "; the pairs load without them, which is not what was trained"
        troubles += _lost(taken, f"keys of {kind}", plain if kind == DORA else "")
        if kind == DORA and any(taken.values()):
            lines.append("ComfyUI applies magnitudes in its own way: near what was trained, not the same")
    if lines:
        lines.append("no pair of matrices equals these: training, g2rpo export and --merge refuse the file")
    return lines


def _counted(modules: Collection[str], diffusers: Taken) -> str:
    """Count what diffusers loads."""
    by_pipeline, by_adapter = (len(each & set(modules)) for each in (diffusers.pipeline, diffusers.adapter))
    only = " (by load_lora_adapter; for load_lora_weights: export --form diffusers --no-alpha)"
    return f"{max(by_pipeline, by_adapter)} load as they are{only if by_adapter > by_pipeline else ''}"


def _forms(reading: Reading, troubles: list[str], mend: str) -> list[str]:
    """Describe what else could stop a loader, and add what is wrong to `troubles`."""
    from comfy_g2rpo.lora.forms import gaps

    lines = []
    scales = {module: reading.alphas[module] / len(down) for module, (down, _) in reading.pairs.items()}
    uneven = [module for module, scale in scales.items() if abs(scale - 1) > 1e-6]
    wrong = [module for module in reading.missing_alpha if module in uneven]
    if wrong:
        kind = " (rsLoRA)" if reading.rslora else ""
        troubles.append(
            f"{len(wrong)} pairs lack their alpha: ComfyUI takes 1 for their scale, {reading.alpha_from} "
            f"says {scales[wrong[0]]:g}{kind}{f'; mend: {mend}' if mend else ''}"
        )
    elif reading.missing_alpha:
        lines.append(
            f"{len(reading.missing_alpha)} pairs without alpha: every loader takes 1 as scale; right "
            "only if alpha was the rank"
        )
    if count := len(set(uneven) - set(wrong)):
        lines.append(
            f"{count} pairs have alpha ≠ rank: ComfyUI heeds it, some of diffusers' loaders do not"
            f"{f'; {mend} folds it' if mend else ''}"
        )
    troubles += gaps(reading)
    return lines


def _fitting(made: Fit, troubles: list[str]) -> list[str]:
    """Describe how a LoRA fits a model, and add what does not to `troubles`."""
    wrong = ((made.absent, "are not"), (made.misshapen, "have another size"))
    for names, what in wrong:
        if names:
            said = f"{len(names)} modules {what} in the model, such as {names[0]}"
            troubles.append(f"{said}; take a LoRA that was made for it")
    return [f"model: {made.family.title}, {made.naming} names: {len(made.fitting)} modules fit"]
