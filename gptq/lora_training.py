"""Trains a LoRA adapter over a model whose weights stay packed, with the library PEFT.

The packed layers pass gradients on (gptq_linear.py) and have none of their own, so what is trained is A and B alone. A checkpoint
holds all that the next step depends on: a run that was killed goes on with the same numbers.

Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314): LoRA over a frozen quantised model, on every linear layer.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadParameter
from . import peft_patch
from .cpu import numba_compiler
from .experts import PackedExperts
from .gptq_linear import GPTQLinear
from .quantize import layers_to_pack
from .training_recipe import Example, Recipe, StepDone, steps_of

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"  # in the work folder
_IGNORED = -100  # of torch's cross entropy


def adaptable(model: nn.Module) -> list[str]:
    """Last names of the layers that can be adapted, sorted: packed ones, or a 16-bit model's linear layers; no experts."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedExperts))
    packed = {name for name, each in model.named_modules() if isinstance(each, GPTQLinear)}
    found = [name for name in packed or layers_to_pack(model) if not name.startswith(experts)]
    return sorted({name.rpartition(".")[2] for name in found if "lm_head" not in name})


def train(
    model: Any,  # a transformers causal LM of checkpoint.load
    examples: Sequence[Example],
    recipe: Recipe,
    base: str,  # the base model's name, for the adapter's settings
    work: Path,  # a folder that is there: checkpoints are kept in it
    save_every: int,  # steps
    report: Callable[[StepDone], None] = lambda done: None,  # what it raises ends the work, after a checkpoint
) -> Any:
    """The model with its trained adapter (a PeftModel, for `save`). Goes on with the checkpoint in `work` if there is one.

    `work` must belong to this model, these examples and this recipe. Raises BadParameter for layers that there are not, or a loss
    that is no number.
    """
    _compile(model)
    peft_patch.install()
    adapted = _adapted(model, recipe, base)
    if next(model.parameters()).device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    adapted.train()
    trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, weight_decay=0.0)
    count = steps_of(len(examples), recipe)
    losses = _resume(work / CHECKPOINT, trained, optimizer)
    if losses:
        report(StepDone(len(losses), count, losses, resumed=True))
    try:
        for step in range(len(losses), count):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _share(step, count, recipe.warmup)
            loss = _loss(adapted, _batch(examples, recipe, step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise BadParameter(f"The loss of step {step + 1} is {losses[-1]}. Choose a lower learning rate and train again.")
            if (step + 1) % save_every == 0 and step + 1 < count:
                _keep(work / CHECKPOINT, trained, optimizer, losses)
            report(StepDone(step + 1, count, losses))
    except BaseException as error:
        if losses and math.isfinite(losses[-1]) and not isinstance(error, torch.OutOfMemoryError):
            _keep(work / CHECKPOINT, trained, optimizer, losses)
        raise
    return adapted.eval()


def save(adapted: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does, into the folder."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def _adapted(model: Any, recipe: Recipe, base: str) -> Any:
    from peft import LoraConfig, get_peft_model

    there = adaptable(model)
    wanted = list(recipe.targets) or there
    if missing := [each for each in wanted if each not in there]:
        raise BadParameter(f"The model has no layers {', '.join(missing)} to adapt. Choose among: {', '.join(there)}.")
    torch.manual_seed(recipe.seed)
    model.name_or_path = base
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=wanted, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():  # PEFT says that it does not know the packed layers, which peft_patch.py gives to it
        warnings.simplefilter("ignore")
        return get_peft_model(model.requires_grad_(False), config)


def _compile(model: Any) -> None:
    """Let compiled kernels multiply with the packed layers, on a processor with numba: unpacking them in PyTorch takes longer."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not on_cpu or model.dtype != torch.float32 or not numba_compiler.available():
        return
    try:
        from .cpu.cpu_linear import replace_layers
        from .cpu.kernel_trial import compiles

        compiles()
    except Exception:
        log.exception("compiling for this processor failed")
        return
    replace_layers(model, torch.get_num_threads())


def _share(step: int, count: int, warmup: float) -> float:
    """Of the learning rate: rises over the warm-up, then falls as a cosine to nothing."""
    rising = max(1, round(count * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, count - rising)))


def _batch(examples: Sequence[Example], recipe: Recipe, step: int) -> list[Example]:
    """The texts of a step. Each epoch has an order of its own, which depends on the seed alone."""
    per_epoch = -(-len(examples) // recipe.batch)
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [examples[each] for each in order[at * recipe.batch : (at + 1) * recipe.batch]]


def _loss(adapted: Any, batch: Sequence[Example]) -> Tensor:
    """Mean over the learned tokens of -log p. Logits are computed where one of the texts has something to learn."""
    device = next(adapted.parameters()).device
    length = max(len(each.ids) for each in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    seen = torch.zeros(len(batch), length, dtype=torch.long)
    wanted = torch.full((len(batch), length), _IGNORED)
    for row, each in enumerate(batch):
        count = len(each.ids)
        ids[row, :count], seen[row, :count] = torch.tensor(each.ids), 1
        next_ids = torch.tensor([id if learned else _IGNORED for id, learned in zip(each.ids, each.learned, strict=True)])
        wanted[row, : count - 1] = next_ids[1:]
    kept = (wanted != _IGNORED).any(0).nonzero()[:, 0]
    output = adapted(input_ids=ids.to(device), attention_mask=seen.to(device), use_cache=False, logits_to_keep=kept.to(device))
    logits = output.logits
    if logits.shape[1] != len(kept):  # an architecture that computes all of them
        logits = logits[:, kept.to(device)]
    targets = wanted[:, kept].to(device)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


def _keep(path: Path, trained: dict[str, Tensor], optimizer: Any, losses: list[float]) -> None:
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    state = {"trained": {name: each.detach() for name, each in trained.items()}, "optimizer": optimizer.state_dict()}
    draft = path.with_suffix(".partial")
    torch.save(state | {"random": random, "losses": losses}, draft)
    os.replace(draft, path)


def _resume(path: Path, trained: dict[str, Tensor], optimizer: Any) -> list[float]:
    """Losses of the steps that an earlier run has made; empty if there is no checkpoint."""
    if not path.is_file():
        return []
    state = torch.load(path, weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, each in trained.items():
            each.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return list(state["losses"])
