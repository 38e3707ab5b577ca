"""What no loader of local files opens: other formats, unfinished downloads, files that can run code."""

from ...core.models import OPENED_BY, LocalModel
from .base import Refusal


def unreadable(model: LocalModel) -> Refusal | None:
    """Why a folder cannot be opened by any loader of local files; None if it can."""
    if model.kind == "incomplete":
        return Refusal(model.problem)
    if model.kind == "remote":
        return Refusal("its weights are on another machine", "use the loader remote")
    if model.is_foreign:
        return Refusal(model.problem or OPENED_BY[model.kind])
    if any(path.suffix != ".safetensors" for path in model.weights):
        return Refusal(
            f"the weights are in {model.weights[0].name}, a format that can run code when it is opened",
            "choose a branch with .safetensors files",
        )
    return None


def not_in_gptq_layout(model: LocalModel) -> Refusal | None:
    """Why a layout such as Marlin's cannot be opened: only its own kernels read it."""
    if model.quantize is None or model.quantize.checkpoint_format in ("gptq", "gptq_v2"):
        return None
    if model.kind != "gptq":
        return Refusal(f"it reads GPTQ's own layout, and the weights are {model.badge}", "use the loader transformers")
    return Refusal(
        f"the weights are in the {model.quantize.checkpoint_format} layout, which only its own kernel reads",
        "choose a branch in GPTQ's own layout",
    )
