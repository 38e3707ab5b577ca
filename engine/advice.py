"""Advice about this machine: whether its torch can use the GPU, and which branch of a model fits.

Joins what hub/ reads from a repository with what loaders/ would do with it. A loader judges a folder, so a branch that is
not downloaded yet becomes a temporary folder with its settings only.
"""

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import BadQuantizeConfig, LoadRefused
from ..core.models import Kind, LocalModel, architecture_and_context
from ..core.quantize_config import QuantizeConfig
from ..hub.branches import Branch, Branches
from ..hub.file_selection import quantize_of
from ..hub.library import Plan
from ..loaders.choose import choose
from ..loaders.contract.base import Loader
from ..loaders.machine.capabilities import has_nvidia_gpu
from ..loaders.machine.memory_fit import KEPT_FREE_BYTES, Memory

CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def torch_banner() -> str:
    """A warning with its cure if there is a GPU and the installed torch cannot use it, else "".

    Reads torch's version file, because importing torch takes seconds.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or not has_nvidia_gpu():
        return ""
    try:
        version = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    if re.search(r"^cuda\b.*=\s*['\"]", version, re.MULTILINE) or re.search(r"^hip\b.*=\s*['\"]", version, re.MULTILINE):
        return ""
    return (
        "This machine has an NVIDIA GPU, but the installed torch only uses the processor. "
        f'To use the GPU: "{sys.executable}" -m pip install --force-reinstall torch --index-url {CUDA_INDEX}'
    )


DEFAULT_CONTEXT_TOKENS = 4096  # the context that model cards of 2023 assume; every model has it
_COPY_BYTES_PER_S = 6e9  # main memory to GPU, pageable: every offloaded weight is copied for every token
_GPU_BYTES_PER_S = 200e9  # the memory of a modest GPU


State = Literal["fits", "partly", "tight", "not", "no loader"]


@dataclass(frozen=True)
class Fit:
    """Whether a model fits this machine at a context, and which loader opens it."""

    state: State
    text: str  # "Fits your 12 GB", before every download
    needs_bytes: int = 0
    loader: str = ""
    reason: str = ""  # why this loader
    tokens_per_s: float | None = None  # only if a part of the model is outside of the GPU


def fit(model: LocalModel, loaders: Sequence[Loader], context_tokens: int, memory: Memory) -> Fit:
    """The fit, counted as a load counts it (loaders/machine/memory_fit.py). No weights are read."""
    options = {"context_tokens": min(context_tokens, model.context_tokens or context_tokens)}
    try:
        choice = choose(model, loaders, None, options)
    except LoadRefused as error:
        return Fit("no loader", str(error))
    counted = choice.loader.fit(model, choice.options, memory)
    needed = counted.needs_bytes * counted.ranks  # counted is one of the GPUs
    found: dict[str, Any] = {"needs_bytes": needed, "loader": choice.loader.name, "reason": choice.brief}
    yours = _yours(memory) if counted.ranks == 1 else f"{counted.ranks} of your GPUs together"
    if counted.fits:
        return Fit("fits", f"Fits {yours}{', on the processor' if memory.gpu is None else ''}", **found)
    needs = f"needs {gigabytes(counted.needs_bytes + KEPT_FREE_BYTES)} of {yours}"
    if counted.state == "partly":
        inside = max(0, counted.free_bytes - KEPT_FREE_BYTES)
        outside = min(counted.needs_bytes - inside, counted.weights_bytes)
        rate = 1 / (outside / _COPY_BYTES_PER_S + (counted.weights_bytes - outside) / _GPU_BYTES_PER_S)
        shown = f"{rate:.0f}" if rate >= 2 else f"{rate:.1f}"
        return Fit("partly", f"Partly on the CPU, about {shown} tokens/s: {needs}", tokens_per_s=rate, **found)
    return Fit(counted.state, f"{'Tight' if counted.state == 'tight' else 'Does not fit'}: {needs}", **found)


def _yours(memory: Memory) -> str:
    return f"your {gigabytes(memory.ram)} of memory" if memory.gpu is None else f"your {gigabytes(memory.gpu)}"


@dataclass(frozen=True)
class Offer:
    branch: Branch
    fit: Fit


@dataclass(frozen=True)
class Advice:
    """The branches of a repository, and which one this machine should take."""

    found: Branches
    offers: tuple[Offer, ...]
    best: Offer | None  # None if nothing can be downloaded
    reason: str  # why this one, in a sentence
    memory: Memory
    context_tokens: int


def advise(found: Branches, loaders: Sequence[Loader], context_tokens: int, memory: Memory) -> Advice:
    """Choose a branch: of those that fit completely, the one closest to the unquantised model.

    More bits come first, then smaller groups, then act-order, then a smaller file, as model cards advise.
    """
    offers = []
    for branch in found.branches:
        if branch.selection is None:
            offers.append(Offer(branch, Fit("not", "Cannot be downloaded")))
            continue
        name, weights = branch.ref.folder_name, branch.selection.weights
        with as_temporary_folder(name, branch.settings, branch.size_bytes, branch.quantize, weights) as model:
            offers.append(Offer(branch, fit(model, loaders, context_tokens, memory)))
    best, reason = _best(offers, context_tokens, memory)
    return Advice(found, tuple(offers), best, reason, memory, context_tokens)


def fit_of_plan(plan: Plan, loaders: Sequence[Loader], memory: Memory, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> Fit:
    """The fit of one download before it begins."""
    try:
        quantize = quantize_of(plan.settings)
    except BadQuantizeConfig:
        quantize = None
    chosen = plan.selection
    with as_temporary_folder(
        plan.folder.name, plan.settings, chosen.weights_bytes, quantize, chosen.weights, chosen.kind
    ) as model:
        return fit(model, loaders, context_tokens, memory)


def _best(offers: Sequence[Offer], context_tokens: int, memory: Memory) -> tuple[Offer | None, str]:
    fitting = [each for each in offers if each.fit.state == "fits"]
    at = f"with {context_tokens} tokens of context"
    if fitting:
        best = max(fitting, key=_exactness)
        which = "the only branch that fits" if len(fitting) == 1 else f"the most exact of the {len(fitting)} that fit"
        return best, f"{best.branch.name} is {which} {_yours(memory)} {at}."
    usable = [each for each in offers if each.fit.state in ("partly", "tight")]
    why = "it is the smallest, so the least of it is read from main memory" if memory.gpu is not None else "it is the smallest"
    if not usable:
        usable, why = [each for each in offers if each.fit.state == "not" and each.branch.selection], "it is the smallest"
    if not usable:
        return None, "No loader on this machine opens any of them." if offers else ""
    best = min(usable, key=lambda each: (each.fit.needs_bytes, *(-value for value in _exactness(each))))
    return best, f"No branch fits {_yours(memory)} {at}. {best.branch.name} is offered because {why}."


def _exactness(offer: Offer) -> tuple[int, int, int, int]:
    quantize = offer.branch.quantize
    if quantize is None:
        return (0, 0, 0, 0)
    group = -(1 << 30) if quantize.group_size == -1 else -quantize.group_size
    return (quantize.bits, group, quantize.desc_act, -offer.branch.size_bytes)


@contextmanager
def as_temporary_folder(
    name: str,
    settings: Mapping[str, Mapping[str, Any]],
    size_bytes: int,
    quantize: QuantizeConfig | None,
    weights: Sequence[str],
    kind: Kind = "gptq",
) -> Iterator[LocalModel]:
    """A temporary folder from which a loader judges a model that is not downloaded: settings, and names of weights."""
    with tempfile.TemporaryDirectory(prefix="gptq-webui-") as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        for path, values in settings.items():
            (folder / path).write_text(json.dumps(values), encoding="utf-8")
        architecture, context = architecture_and_context(settings.get("config.json", {}))
        files = tuple(folder / each for each in weights)
        yield LocalModel(folder, kind, quantize, size_bytes, context, architecture, files)


def gigabytes(count: float) -> str:
    """12000000000 -> '12 GB', 6430000000 -> '6.4 GB'."""
    return f"{count / 1e9:.1f}".removesuffix(".0") + " GB"
