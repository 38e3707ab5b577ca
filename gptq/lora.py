"""LoRA adapters (folders of the library PEFT) over layers of any kind, packed ones too: y += scale · B(A x).

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, section 4.1). The adapter is
added beside a layer, never into its weights, so packed weights stay packed.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import BadCheckpoint, BadFile
from ..core.folder_files import printable, read_json, shown_name
from ..core.safetensors_header import read_header

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = re.compile(r"\^?((?:\w|\\?\.|-)+)\$?")  # a pattern that is a name, or the end of one
_QUICK = re.compile(r"(?:\.[*+]|\\[dw]\+|[^*+?{}()|])*")  # one without groups
_CONFIG_BYTES = 1_000_000
_MOST_PATTERNS = 100  # that are no plain names
_MOST_REPEATS, _LONGEST = 2, 200  # in a pattern; its characters
_PEFT_ALPHA = 8  # what PEFT takes where the settings leave it out
# PEFT's LoraConfig.init_lora_weights: these take from the base model's weights what they give to A and B
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_ALPHA = 1e6  # real ones are below 1,000


Part = tuple[nn.Module, Tensor, Tensor]  # a layer, A [rank, K], scale · B [N, rank]


def beside(folder: Path) -> dict[str, Path]:
    """Name -> folder of every adapter in the same folder as a model's `folder`, whether it fits or not."""
    try:
        found = [each for each in folder.parent.iterdir() if (each / "adapter_config.json").is_file()]
    except OSError:
        return {}
    return {each.name: each for each in sorted(found) if not (each / "config.json").exists()}


def attach(model: nn.Module, folder: Path) -> int:
    """Add the adapter in `folder` to a model; returns how many layers it changes. Nothing is changed if it raises.

    Raises BadCheckpoint as `read` does.
    """
    parts = read(model, folder)
    for module, inner, outer in parts.values():
        module.register_forward_hook(_adding(inner, outer))
    return len(parts)


def read(model: nn.Module, folder: Path) -> dict[str, Part]:
    """The adapter in `folder`, by the names of the model's layers that it changes.

    Raises BadCheckpoint if the folder is no PEFT adapter, is of a kind that is not supported (DoRA, trained biases or whole
    modules), or does not fit the model.
    """
    try:
        config = read_json(folder / "adapter_config.json", _CONFIG_BYTES)
    except BadFile as error:
        raise BadCheckpoint(str(error)) from None
    file = folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA" or not file.is_file():
        raise BadCheckpoint(
            f"{shown_name(folder)} is not a LoRA adapter: it needs an adapter_config.json that says LORA, and an "
            "adapter_model.safetensors."
        )
    if config.get("use_dora") or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise BadCheckpoint(
            f"The adapter {folder.name} changes more than LoRA does (DoRA, biases, whole modules). Choose another adapter."
        )
    _require_own_base(folder.name, config)
    pairs: dict[str, dict[str, str]] = {}
    header = read_header(file)
    for key in header:
        found = _KEY.fullmatch(key)
        if not found:
            raise BadCheckpoint(
                f"The adapter {folder.name} holds {printable(key)[:200]}, which is no part of LoRA on a linear layer. "
                "Choose another adapter."
            )
        pairs.setdefault(found[1], {})[found[2]] = key
    alpha = _Alpha(folder.name, config)
    modules = dict(model.named_modules())
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"} or not _fits(_sizes(modules.get(name)), *(header[pair[each]].shape for each in "AB")):
            raise BadCheckpoint(
                f"The adapter {folder.name} does not fit at {printable(name)[:200]}: it is for another base model. "
                "Load that model, or choose another adapter."
            )
    tensors = _numbers(folder.name, file)
    ready: dict[str, Part] = {}
    for name, pair in pairs.items():
        inner, outer = tensors[pair["A"]], tensors[pair["B"]]  # [rank, K], [N, rank]
        ready[name] = modules[name], inner, outer * alpha.scale(name, inner.shape[0])
    return ready


def _require_own_base(name: str, config: Mapping[str, Any]) -> None:
    """Raises BadCheckpoint for an adapter that is not for the base model as it is, or not for every token."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        raise BadCheckpoint(
            f"The adapter {name} was trained beside weights of its base model that PEFT had changed (init_lora_weights "
            f"{printable(start)[:40]}); beside the model's own it gives wrong answers. Save it as plain LoRA with PEFT, or "
            "choose another adapter."
        )
    if config.get("alora_invocation_tokens"):
        raise BadCheckpoint(
            f"The adapter {name} begins to work at certain tokens only (alora_invocation_tokens), which is not done here. "
            "Choose another adapter."
        )


def _fits(sizes: tuple[int, int] | None, inner: tuple[int, ...], outer: tuple[int, ...]) -> bool:
    """Whether A [rank, K] and B [N, rank] are of a layer. A rank above both K and N is no adapter's: it fills the memory."""
    if sizes is None or len(inner) != 2 or len(outer) != 2 or (inner[1], outer[0]) != sizes:
        return False
    return inner[0] == outer[1] and 0 < inner[0] <= max(sizes)


def _numbers(name: str, file: Path) -> dict[str, Tensor]:
    """The tensors of the file. Raises BadCheckpoint if one holds integers, or what is no number."""
    try:
        tensors = load_file(file)
    except Exception as error:  # of safetensors, which has one class for all
        raise BadCheckpoint(
            f"The weights of the adapter {name} cannot be read: {file.name} is damaged. Download the adapter again."
        ) from error
    for key, each in tensors.items():
        if each.is_floating_point() and each.element_size() == 1:  # PyTorch does not multiply these
            tensors[key] = each.float()
        if not each.is_floating_point() or not bool(each.float().isfinite().all()):
            raise BadCheckpoint(
                f"The adapter {name} holds values in {printable(key)[:200]} that are no numbers to multiply with. "
                "Download it again, or choose another adapter."
            )
    return tensors


def _sizes(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of transformers' Conv1D."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if hasattr(module, "nx") and hasattr(module, "nf") else None


class _Alpha:
    """lora_alpha of each layer. PEFT reads the names of alpha_pattern as regular expressions; a stranger's could hold a
    thread for ever, so only those are read that cannot."""

    def __init__(self, adapter: str, config: Mapping[str, Any]) -> None:
        """Raises BadCheckpoint."""
        self._adapter, self._stabilised = adapter, bool(config.get("use_rslora"))
        given = config.get("lora_alpha", _PEFT_ALPHA)
        self._default = None if given is None else self._number(given)
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._wrong("alpha_pattern is no object")
        self._plain: dict[str, float] = {}
        self._patterns: list[tuple[re.Pattern[str], float]] = []
        for pattern, value in patterns.items():
            number = self._number(value)
            if found := _PLAIN.fullmatch(pattern):
                self._plain.setdefault(found[1].replace("\\.", "."), number)
                continue
            repeats = sum(pattern.count(each) for each in "*+")
            is_quick = len(pattern) <= _LONGEST and repeats <= _MOST_REPEATS and _QUICK.fullmatch(pattern)
            if len(self._patterns) >= _MOST_PATTERNS or not is_quick:
                raise self._wrong(f"alpha_pattern has {printable(pattern)[:80]!r}, and names of layers are wanted there")
            try:
                self._patterns.append((re.compile(rf"(.*\.)?({pattern})"), number))
            except re.error:
                raise self._wrong(f"alpha_pattern has {printable(pattern)[:80]!r}, which is no pattern") from None

    def scale(self, name: str, rank: int) -> float:
        """What B A is multiplied with in the layer `name`."""
        alpha = self._of(name)
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self._stabilised else rank)

    def _of(self, name: str) -> float | None:
        parts = name.split(".")
        for at in range(len(parts)):  # "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj" …
            if (found := self._plain.get(".".join(parts[at:]))) is not None:
                return found
        return next((value for pattern, value in self._patterns if pattern.fullmatch(name)), self._default)

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MOST_ALPHA:
            raise self._wrong(f"lora_alpha is {printable(str(value))[:40]}, and a number was expected")
        return float(value)

    def _wrong(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"The adapter_config.json of {self._adapter} cannot be used: {what}. Correct it, or choose another adapter."
        )


def _adding(inner: Tensor, outer: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    held: dict[Any, tuple[Tensor, Tensor]] = {}  # on each device, in each number format, once

    def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = args[0]
        kind = x.device, x.dtype
        if kind not in held:
            held[kind] = inner.to(*kind), outer.to(*kind)
        a, b = held[kind]
        return y + ((x @ a.T) @ b.T).to(y.dtype)

    return add
