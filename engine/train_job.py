"""Training a LoRA adapter on a model of the library: from a file of conversations to a PEFT folder beside the models.

Checkpoints of an unfinished run are in one hidden work folder beside the result. Its name is a digest of the model, the texts and
the recipe: the same command finds it again and goes on, another one never touches it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__
from ..core.errors import BadParameter, LoadRefused
from ..core.folder_files import read_text
from ..core.models import LocalModel
from ..core.units import format_bytes
from ..gptq.training_recipe import Example, Recipe, StepDone, require_peft
from ..hub.model_folder import locked
from .quantize_job import write_json
from .training_data import read_examples

LOG = "training.json"  # in the adapter's folder: how it was trained, and the loss of every step
_NAME = re.compile(r"[\w][\w.+-]{0,95}")
_BASE = re.compile(r"^base_model:[ \t]*(?:\n\s*-[ \t]*)?['\"]?(\w[\w./-]*)", re.MULTILINE)
_MOST_RANK = 1024
_README_BYTES = 1_000_000


@dataclass(frozen=True)
class TrainJob:
    model: LocalModel  # packed, or of 16 bits
    data: Path
    output: Path  # the new folder; beside the model, so that answers can name it
    recipe: Recipe = field(default_factory=Recipe)
    length: int = 1024  # tokens of a text, at most
    save_every: int = 50  # steps between two checkpoints


def folder_for(model: LocalModel, name: str, data: Path) -> Path:
    """Where an adapter of that name goes: beside the model, never elsewhere. Raises BadParameter for what is no plain name."""
    found = name.strip() or f"{model.name}-{data.stem}"
    if not _NAME.fullmatch(found):
        raise BadParameter(f"{found[:100]!r} cannot be an adapter's name. Write letters, digits, dots, + and hyphens.")
    return model.folder.absolute().parent / found


def check(job: TrainJob) -> None:
    """Raises BadParameter, LoadRefused or LoadFailed before anything heavy is imported."""
    require_peft()
    recipe = job.recipe
    if job.output.exists():
        raise BadParameter(f"{job.output} is there already. Choose another name, or remove it.")
    if not _NAME.fullmatch(job.output.name):
        raise BadParameter(f"{job.output.name!r} cannot be an adapter's name. Write letters, digits, dots, + and hyphens.")
    whole = {
        "rank": recipe.rank,
        "number of epochs": recipe.epochs,
        "batch size": recipe.batch,
        "cutoff length": job.length,
        "number of steps between checkpoints": job.save_every,
    }
    for name, value in whole.items():
        if value < 1:
            raise BadParameter(f"The {name} is {value}. Write 1 or more.")
    if recipe.rank > _MOST_RANK:
        raise BadParameter(f"The rank is {recipe.rank:,}, which would fill the memory. Write at most {_MOST_RANK:,}.")
    if not 0 < recipe.learning_rate <= 1 or recipe.alpha <= 0 or not 0 <= recipe.dropout < 1:
        raise BadParameter("The learning rate must be above 0 and at most 1, alpha above 0, the dropout from 0 to below 1.")
    if not (job.model.is_packed or job.model.kind == "plain"):
        raise LoadRefused(
            f"{job.model.name} is {job.model.badge}: {job.model.problem or 'it cannot be opened'}. Choose another model."
        )


def run(job: TrainJob, report: Callable[[StepDone], None], say: Callable[[str], None]) -> Path:
    """Train, and return the adapter's folder. `report` hears every step, `say` a sentence for every other.

    What `report` raises ends the run after a checkpoint; the same job goes on there. Raises what `check` and `read_examples` do,
    BadCheckpoint, or DownloadFailed (another process trains the same).
    """
    check(job)
    import torch

    from ..gptq import checkpoint, lora_training
    from ..loaders.text.tokenizer import read_tokenizer

    examples = read_examples(job.data, job.model, read_tokenizer(job.model), job.length, say)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    work = job.output.parent / f".gptq-webui-train-{_digest(job, examples, on_gpu)}"
    work.mkdir(exist_ok=True)
    with locked(work):
        say(f"Reading {job.model.name} ({format_bytes(job.model.size_bytes)}).")
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model, _notes = checkpoint.load(job.model, dtype=dtype, device_map="cuda" if on_gpu else "cpu")
        base = base_of(job.model)
        losses: list[float] = []

        def heard(done: StepDone) -> None:
            losses[:] = done.losses
            report(done)

        adapted = lora_training.train(model, examples, job.recipe, base, work, job.save_every, heard)
        draft = work / "finished"
        shutil.rmtree(draft, ignore_errors=True)
        lora_training.save(adapted, draft)
        facts = {"model": job.model.name, "data": job.data.name, "texts": len(examples), "length": job.length}
        log = {"made_by": f"gptq-webui {__version__}", **facts, "recipe": dataclasses.asdict(job.recipe), "losses": losses}
        write_json(draft / LOG, log)
        (draft / "README.md").write_text(_readme(job, base, len(examples), losses), encoding="utf-8")
        os.replace(draft, job.output)
    shutil.rmtree(work, ignore_errors=True)
    return job.output


def base_of(model: LocalModel) -> str:
    """The name of the 16-bit model that a folder was made of, as its model card says; else the folder's own."""
    readme = model.folder / "README.md"
    if readme.is_file() and (found := _BASE.search(read_text(readme, _README_BYTES).partition("\n---")[0])):
        return found[1]
    return model.name


def curve(losses: Sequence[float], points: int) -> list[float]:
    """The losses as at most that many means of neighbouring steps, for a picture or a line of text."""
    step = max(1, -(-len(losses) // points))
    return [sum(part) / len(part) for at in range(0, len(losses), step) if (part := losses[at : at + step])]


def _digest(job: TrainJob, examples: Sequence[Example], on_gpu: bool) -> str:
    import torch

    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in job.model.weights]
    texts = [(list(each.ids), [int(learned) for learned in each.learned]) for each in examples]
    facts = [str(job.model.folder.resolve()), weights, texts, dataclasses.asdict(job.recipe), job.output.name, on_gpu]
    return hashlib.sha256(json.dumps([*facts, torch.__version__]).encode()).hexdigest()[:12]


def _readme(job: TrainJob, base: str, texts: int, losses: Sequence[float]) -> str:
    recipe = job.recipe
    front = f"base_model: {base}\n" if "/" in base else ""
    return f"""---
{front}library_name: peft
---
# {job.output.name}

A LoRA adapter for {base}, trained by gptq-webui {__version__} over {job.model.name}.
{texts} texts of {job.data.name}, {recipe.epochs} epochs, rank {recipe.rank}, alpha {recipe.alpha}, learning rate
{recipe.learning_rate:g}. Loss of the last step: {losses[-1]:.3f}.
"""
