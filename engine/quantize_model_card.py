"""The model card of folders that `quantize` made, and what it says of a folder that not every program opens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.folder_files import read_json
from ..core.models import LocalModel, tensors_of
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_bytes, plural
from .licence_and_template import front_matter, prompt_template

QUALITY = "quality.json"  # in a branch's folder: its Evaluation


@dataclass(frozen=True)
class Branch:
    """One folder of a run."""

    name: str
    folder: Path
    config: QuantizeConfig


@dataclass(frozen=True)
class Making:
    """What all folders of a run have in common."""

    source: LocalModel
    text: str  # the calibration's name
    samples: int
    sample_tokens: int
    head_bits: int = 0  # of a packed output layer
    leave: Sequence[str] = ()  # patterns of names of layers that stay in 16 bits


def write_model_card(branch: Branch, branches: Sequence[Branch], making: Making) -> None:
    """README.md of a branch: front matter, prompt template, and a table of all branches with their figures."""
    source, config = making.source, branch.config
    front, licence = front_matter(source.folder / "README.md")
    rows = "\n".join(_row(each, making) for each in branches)
    measured = [found for each in branches if (found := _quality(each.folder))]
    notes = "".join(f" {note}" for note in (_head(making), _left(making), short_groups(_inputs(branch), config)) if note)
    calibrated = f"Calibrated with {making.samples} samples of {making.sample_tokens} tokens."
    model_card = f"""---
{front}---
# {source.name}, GPTQ

GPTQ weights of {source.name}, made by gptq-webui {__version__}. This folder: {config.summary}.{notes}{licence}

{prompt_template(source)}## Provided files

| {" | ".join(_COLUMNS)} |
|{" --- |" * len(_COLUMNS)}
{rows}

{calibrated} Every layer was solved with the inputs of the unquantised model.
{_how_measured(measured)}"""
    (branch.folder / "README.md").write_text(model_card, encoding="utf-8")


def short_groups(inputs: Mapping[str, int], config: QuantizeConfig) -> str:
    """A sentence about layers (name -> inputs) whose last group is shorter than the others; empty if there are none."""
    size = config.group_size
    short = [name for name, count in inputs.items() if size > 0 and count % size]
    if not short:
        return ""
    fitting = [str(each) for each in (128, 64, 32) if each < size and all(count % each == 0 for count in inputs.values())]
    others = f" and {plural(len(short) - 1, 'other layer')}" if len(short) > 1 else ""
    # vLLM 0.22, auto-gptq 0.7.1 and gptqmodel 7.6.0 were looked at
    return (
        f"A group size of {size} does not divide the {inputs[short[0]]} inputs of {short[0]}{others}: the last group is "
        "shorter there. gptq-webui and GPTQModel's torch kernel open such a folder, and AutoGPTQ without ExLlama's kernels if it "
        f"has act-order; vLLM does not{f' (it opens one of group size {fitting[0]})' if fitting else ''}."
    )


_COLUMNS = (
    "Branch", "Bits", "GS", "Act Order", "Damp %", "GPTQ Dataset", "Seq Len", "Size", "Perplexity", "KL to the original", "Desc",
)  # fmt: skip


def _row(branch: Branch, making: Making) -> str:
    config = branch.config
    size = format_bytes((branch.folder / "model.safetensors").stat().st_size)
    group = "None" if config.group_size == -1 else str(config.group_size)
    order = "Yes" if config.desc_act else "No"
    found = _quality(branch.folder)
    figures = [f"{found['perplexity']:.3f}", f"{found['difference']['kl']:.4f}"] if found else ["not measured"] * 2
    of_text = [making.text, str(making.sample_tokens)]
    cells = [branch.name, str(config.bits), group, order, str(config.damp_percent), *of_text, size]
    return f"| {' | '.join([*cells, *figures])} | {config.summary} |"


def _quality(folder: Path) -> Any:
    """The Evaluation of a branch as a dictionary; empty if it was not measured."""
    return read_json(folder / QUALITY) if (folder / QUALITY).is_file() else {}


def _inputs(branch: Branch) -> dict[str, int]:
    tensors = tensors_of([branch.folder / "model.safetensors"])
    return {name.removesuffix(".g_idx"): info.shape[0] for name, (_path, info) in tensors.items() if name.endswith(".g_idx")}


def _head(making: Making) -> str:
    if not making.head_bits:
        return ""
    return (
        f"The output layer (lm_head) is packed too, in {making.head_bits} bits: GPTQModel and gptq-webui open the folder, "
        "programs that expect it in 16 bits do not."
    )


def _left(making: Making) -> str:
    if not making.leave:
        return ""
    named = ", ".join(f"`{each}`" for each in making.leave)
    return (
        f"Layers whose names have {named} in them are in 16 bits: GPTQModel, transformers and gptq-webui read that from the "
        "settings (vLLM, too, by its sources), AutoGPTQ does not."
    )


def _how_measured(measured: Sequence[Any]) -> str:
    if not measured:
        return ""
    first = measured[0]
    return (
        f"Measured on {first['tokens']} tokens of Python's manual, other pages than the calibration begins with: the original's "
        f"perplexity there is {first['against_perplexity']:.3f}. KL divergence in nats per token; 0 is the original.\n"
    )
