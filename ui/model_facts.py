"""The panel of facts about a model: from its files, and from the load. In a user's words."""

from pathlib import Path

from ..core.errors import GptqWebuiError
from ..core.folder_files import read_json
from ..core.models import LocalModel
from ..core.units import format_bytes
from ..engine.engine import Engine
from ..engine.quantize_model_card import QUALITY
from ..loaders.contract.base import LoadedModel
from . import html_snippets


def panel(engine: Engine) -> str:
    """HTML about the loaded model, or a line that says what will be here. Shows no path."""
    loaded = engine.loaded
    if loaded is None:
        return html_snippets.quiet("Facts about the model appear here when one is loaded.")
    choice = engine.choice
    rows = [*of_files(loaded.model), *of_load(loaded)]
    if choice is not None:
        rows.append(("Loader", f"{choice.loader.name} ({choice.brief})"))
    if engine.slot.fit is not None:
        rows.append(("Memory", str(engine.slot.fit)))
    return html_snippets.facts(rows) + html_snippets.notes(loaded.notes)


def of_files(model: LocalModel) -> list[tuple[str, str]]:
    """(name, value) of facts from the folder; the value is empty if it is not known."""
    rows = [("Model", model.name), ("Kind", model.badge.split(",")[0] + (f" ({_family(model)})" if _family(model) else ""))]
    if (quantize := model.quantize) is not None:
        group = "one scale for a whole column" if quantize.group_size == -1 else f"{quantize.group_size} weights share a scale"
        rows += [
            ("Group size", group),
            ("Act-order", "yes" if quantize.desc_act else "no"),
            ("Symmetric", "yes" if quantize.sym else "no"),
            ("Damp %", "" if quantize.damp_percent is None else f"{quantize.damp_percent:g}"),
            ("Calibration data", _dataset(quantize.dataset)),
            ("Quantised by", quantize.quantizer or ""),
        ]
    rows.append(("Measured", measured_words(model)))
    rows.append(("Size", f"{format_bytes(model.size_bytes)} of weights" if model.kind != "remote" else "on the other server"))
    return rows


def of_load(loaded: LoadedModel) -> list[tuple[str, str]]:
    trained = loaded.model.context_tokens
    more = f"; trained for {trained}" if trained and trained != loaded.context_tokens else ""
    reason = f" ({loaded.context_reason}{more})" if loaded.context_reason or more else ""
    return [("Context", f"{loaded.context_tokens} tokens{reason}"), ("Device", _device(loaded.device))]


def measured_words(model: LocalModel) -> str:
    """The figures that were measured when the model was made here; empty if there are none."""
    try:
        found = read_json(model.folder / QUALITY) if (model.folder / QUALITY).is_file() else {}
        kl, same = found["difference"]["kl"], found["difference"]["same_top"]
        return (
            f"perplexity {found['perplexity']:.3f} (the original's: {found['against_perplexity']:.3f}), KL divergence {kl:.4f} "
            f"nats per token, the same likeliest token at {same:.1%}"
        )
    except (GptqWebuiError, KeyError, TypeError, ValueError):
        return ""


def _family(model: LocalModel) -> str:
    return model.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def _dataset(dataset: str | None) -> str:
    """Its name. A local path is not shown."""
    return dataset if dataset and not Path(dataset).is_absolute() else ""


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return f"GPU ({device})"
    return "CPU" if device == "cpu" else device
