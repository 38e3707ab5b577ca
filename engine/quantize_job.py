"""From a 16-bit folder to GPTQ folders, one for each branch, named as TheBloke named branches.

Everything of an unfinished run is in one hidden work folder beside the results. Its name is a digest of the model, the text and
the settings: the same command finds it again and goes on, another command never touches it.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import BadParameter, LoadRefused
from ..core.folder_files import read_json, shown_name
from ..core.models import MARKER, LocalModel
from ..core.old_names import for_new_files, why_not_written
from ..core.quantize_config import BITS, QuantizeConfig
from ..core.units import format_bytes
from ..hub.model_folder import FileRecord, FolderRecord, disk_full, locked
from .calibration_text import BUILT_IN, samples_of
from .evaluation import evaluate_made
from .quantize_model_card import QUALITY, Branch, Making, short_groups, write_model_card

USUAL_BRANCHES = (
    "gptq-4bit-128g-actorder_True",
    "gptq-4bit-32g-actorder_True",
    "gptq-8bit-128g-actorder_True",
    "gptq-8bit--1g-actorder_True",
)
_BRANCH = re.compile(r"gptq-(\d)bit-(-1|\d+)g-actorder_(True|False)")
_SAMPLE_TOKENS = 4096
_LARGE_BYTES = 4 << 30
_NOT_COPIED = ("config.json", "quantize_config.json", "README.md", "quality.json", "adapter_config.json")
_COPIED = re.compile(r"(.*\.(json|jinja|model|txt|tiktoken)|LICENSE.*|NOTICE.*|USE_POLICY.*)", re.IGNORECASE)


@dataclass(frozen=True)
class QuantizeJob:
    source: LocalModel  # of kind plain
    output: Path  # the folders of the branches are made in it
    branches: Sequence[QuantizeConfig]
    dataset: str = BUILT_IN
    sample_tokens: int = 4096
    samples: int = 128
    measured_tokens: int = 0  # of text, on which each branch is compared with the original afterwards; 0: not measured
    head_bits: int = 0  # of the output layer (lm_head), packed with the branch's groups and order; 0: it stays in 16 bits
    leave: Sequence[str] = ()  # regular expressions: layers whose names have one of them stay in 16 bits
    left: Sequence[str] = ()  # names in the files of layers that stay in 16 bits, too

    def folder(self, config: QuantizeConfig) -> Path:
        """Where a branch is when it is finished."""
        return self.output / f"{self.source.name}-GPTQ_{branch_name(config)}"


def branch_name(config: QuantizeConfig) -> str:
    """'gptq-4bit-128g-actorder_True'."""
    return f"gptq-{config.bits}bit-{config.group_size}g-actorder_{config.desc_act}"


def parse_branch(name: str, base: QuantizeConfig) -> QuantizeConfig:
    """A branch's name as a configuration; the rest is taken from `base`. Raises BadParameter."""
    found = _BRANCH.fullmatch(name.strip())
    if not found or int(found[1]) not in BITS or found[2] == "0":
        raise BadParameter(f"{name!r} is not the name of a branch. Write it as {USUAL_BRANCHES[0]}, with 2, 3, 4 or 8 bits.")
    return dataclasses.replace(base, bits=int(found[1]), group_size=int(found[2]), desc_act=found[3] == "True")


def usual_sample_tokens(source: LocalModel) -> int:
    """Tokens of a calibration sample where nobody says how many."""
    return min(_SAMPLE_TOKENS, source.context_tokens or _SAMPLE_TOKENS)


def run(job: QuantizeJob, report: Callable[[Any], None], say: Callable[[str], None], alone: bool = False) -> list[Path]:
    """Make the folders; `report` hears a LayerDone for every decoder layer, `say` a sentence for every other step. `alone`:
    nothing else computes in this process, so that settings of the whole process may be changed.

    What `report` raises ends the run; the same job goes on where it ended. Raises LoadRefused (the source is not a 16-bit
    model), BadParameter, LoadFailed, BadCheckpoint, DiskFull or DownloadFailed (another process makes the same).
    """
    _check(job)
    import torch

    from ..gptq import checkpoint, expert_hessians, layerwise_quantize, output_layer, wanted_layers
    from ..loaders.text.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(job.source)
    samples, text = samples_of(job.dataset, job.source, tokenizer, job.sample_tokens, job.samples, say)
    say(f"Calibration: {text}, {len(samples)} of {job.samples} samples of {job.sample_tokens} tokens.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and job.source.size_bytes > _LARGE_BYTES:
        say("There is no GPU: the processor computes every layer, which takes very long for a model of this size.")
    digest = _digest(job, samples, device.type)
    wanted = [each for each in job.branches if not _is_finished(job.folder(each), digest)]
    if not wanted:
        say("Everything is there already.")
        return _finish(job, text, len(samples), say)
    job.output.mkdir(parents=True, exist_ok=True)
    needs_bytes = sum(2 * job.source.size_bytes * each.bits // 16 for each in wanted) + job.source.size_bytes // 4
    if job.leave or job.left:
        needs_bytes += len(wanted) * job.source.size_bytes
    if (free := shutil.disk_usage(job.output).free) < needs_bytes:
        raise disk_full(needs_bytes, free, job.output)
    work = job.output / f".gptq-webui-quantize-{digest}"
    work.mkdir(exist_ok=True)
    with locked(work):
        say(f"Reading {job.source.name} ({format_bytes(job.source.size_bytes)}).")
        model, _notes = checkpoint.load(job.source, dtype=_dtype(job.source), device_map="cpu")
        named = {branch_name(each): each for each in wanted}

        def heard(done: layerwise_quantize.LayerDone) -> None:
            if done.scarce_experts:
                say(expert_hessians.scarce_text(done.index, done.scarce_experts))
            report(done)

        heads = {name: dataclasses.replace(each, bits=job.head_bits) for name, each in named.items() if job.head_bits}
        leave = wanted_layers.Leave(job.leave, frozenset(job.left))
        packed = wanted_layers.wanted_layers(model, leave) | dict([output_layer.output_layer(model)] if heads else [])
        say(wanted_layers.left_dense(model, packed, leave))
        inputs = wanted_layers.inputs_of(packed)
        for sentence in dict.fromkeys(filter(None, (short_groups(inputs, each) for each in wanted))):
            say(sentence)
        if heads and output_layer.is_tied(model):
            say("The output layer of this model is its embedding: packed, it is there a second time.")
        layerwise_quantize.quantize_layers(model, samples, named, work, device, heard, heads, leave, alone)
        for name, config in named.items():
            say(f"Writing {job.folder(config).name}")
            draft = work / f"{name}.finished"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            modules = layerwise_quantize.write_weights(model, work / name, draft / "model.safetensors")
            more = output_layer.head_settings(model, config, heads[name]) if heads else {}
            if rules := wanted_layers.left_rules(model, leave):
                more["dynamic"] = more.get("dynamic", {}) | rules
            _write_settings(job, config, text, draft, modules, more)
            _publish(job, config, digest, draft)
    shutil.rmtree(work, ignore_errors=True)
    return _finish(job, text, len(samples), say)


def _finish(job: QuantizeJob, text: str, samples: int, say: Callable[[str], None]) -> list[Path]:
    """Measure what was not measured yet, and write the model cards, which give the sizes and figures of all branches."""
    folders = [job.folder(each) for each in job.branches]
    missing = [each for each in folders if not (each / QUALITY).is_file()] if job.measured_tokens else []
    if missing:
        window = min(2048, job.sample_tokens, job.measured_tokens)  # the logits of one window are in memory
        found = evaluate_made([LocalModel.read(each) for each in missing], job.source, window, job.measured_tokens, say)
        for folder, each in zip(missing, found, strict=True):
            write_json(folder / QUALITY, dataclasses.asdict(each))
    branches = [Branch(branch_name(each), job.folder(each), each) for each in job.branches]
    for branch in branches:
        write_model_card(branch, branches, Making(job.source, text, samples, job.sample_tokens, job.head_bits, job.leave))
    return [job.folder(each) for each in job.branches]


def _check(job: QuantizeJob) -> None:
    if job.source.kind != "plain":
        problem = f" ({job.source.problem})" if job.source.problem else ""
        raise LoadRefused(
            f"{job.source.name} is {job.source.badge}, not a 16-bit model{problem}. "
            "Only weights of 16 or 32 bits can be quantised; download the model they were made from."
        )
    if why := why_not_written(read_json(job.source.folder / "config.json")):
        raise LoadRefused(f"{job.source.name} cannot be quantised. {why} Choose another model.")
    for config in job.branches:
        if config.group_size != -1 and (config.group_size <= 0 or config.group_size % 32):
            raise BadParameter(
                f"A group size of {config.group_size} is not possible; choose 32, 64, 128 or another multiple of 32, or -1."
            )
    if job.head_bits and job.head_bits not in BITS:
        raise BadParameter(f"The output layer cannot have {job.head_bits} bits; choose {', '.join(map(str, BITS))}.")
    if job.sample_tokens < 1 or job.samples < 1:
        raise BadParameter("--seq-len and --samples must be 1 or more.")
    if job.source.context_tokens and job.sample_tokens > job.source.context_tokens:
        raise BadParameter(
            f"--seq-len {job.sample_tokens} is longer than the {job.source.context_tokens} tokens that the model "
            "reads. Give a smaller one."
        )


def _digest(job: QuantizeJob, samples: Sequence[Sequence[int]], device: str) -> str:
    import torch

    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in job.source.weights]
    branches = [each.to_json() for each in job.branches]
    facts: list[Any] = [str(job.source.folder.resolve()), weights, branches, samples, device, torch.__version__]
    facts += [job.head_bits] if job.head_bits else []
    facts += [[*job.leave], sorted(job.left)] if job.leave or job.left else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _is_finished(folder: Path, digest: str) -> bool:
    """Raises BadParameter if another run, or a download, has made it."""
    if not folder.exists():
        return False
    record = FolderRecord.read(folder / MARKER)
    if record is not None and record.commit.endswith(digest):
        return True
    raise BadParameter(
        f"{shown_name(folder)} is there already, made from another model, text or settings. "
        f"Remove it (gptq-webui remove {folder.name}) or "
        "choose another folder with --output."
    )


def _dtype(source: LocalModel) -> Any:
    import torch

    config = read_json(source.folder / "config.json")
    names = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return names.get(str(config.get("torch_dtype", config.get("dtype"))), torch.float32)


# --- the files of a branch ---------------------------------------------------------------------------


def copy_settings(source: Path, folder: Path) -> None:
    """What a folder holds beside its weights and their settings: tokenizer, chat template, licence."""
    for path in sorted(source.iterdir()):
        copied = _COPIED.fullmatch(path.name) and path.name not in _NOT_COPIED and not path.name.endswith(".index.json")
        if copied and not path.name.startswith(".") and path.is_file():
            shutil.copyfile(path, folder / path.name)


def _write_settings(
    job: QuantizeJob, config: QuantizeConfig, text: str, folder: Path, modules: list[list[str]], more: Mapping[str, Any]
) -> None:
    copy_settings(job.source.folder, folder)
    settings = dataclasses.replace(config, weights_name="model").to_json()
    settings |= {"meta": {"quantizer": [f"gptq-webui:{__version__}"]}, **more}
    if modules:  # readers would else look for packed ones in every place
        settings["modules_in_block_to_quantize"] = modules
    write_json(folder / "quantize_config.json", settings | {"dataset": text})
    del settings["model_file_base_name"], settings["model_name_or_path"]
    values = for_new_files(read_json(job.source.folder / "config.json"))
    values.pop("dtype", None)
    if job.head_bits:
        values["tie_word_embeddings"] = False
    write_json(folder / "config.json", values | {"torch_dtype": "float16", "quantization_config": settings})


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _publish(job: QuantizeJob, config: QuantizeConfig, digest: str, draft: Path) -> None:
    folder = job.folder(config)
    files = {path.name: FileRecord(path.stat().st_size, "", path.stat().st_mtime_ns) for path in sorted(draft.iterdir())}
    ref = f"{job.source.name}-GPTQ:{branch_name(config)}"
    FolderRecord(ref, f"made on this machine {digest}", files).write(draft / MARKER)
    os.replace(draft, folder)
