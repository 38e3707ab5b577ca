"""A model on disk: its kind, from its file names, settings and tensor names.

Only this file decides the kind. AWQ uses GPTQ's tensor names with another layout, and a GPTQ
folder that is read as another kind gives random weights.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from .config_numbers import context_of
from .errors import BadCheckpoint, BadFile, BadQuantizeConfig, GptqWebuiError
from .folder_files import printable, read_json, unfit_file
from .foreign_errors import in_words
from .model_claims import problem_of, type_problem
from .neighbour_layouts import NEIGHBOURS, name_of, read_settings
from .old_names import in_todays_words
from .other_formats import name_of_dtype, name_of_gptq_p, name_of_method
from .quantize_config import QuantizeConfig, is_auto_round
from .safetensors_header import TensorInfo, read_header

Kind = Literal["gptq", "awq", "compressed-tensors", "exl2", "exl3", "gguf", "gptq_p", "plain", "lora", "incomplete", "remote"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MARKER = ".gptq-webui.json"  # written last by a download: its ref, commit and files
PARTIAL = ".partial"  # ending of a file that is still being downloaded

OPENED_BY: dict[Kind, str] = {  # AWQ, compressed-tensors and gptq_p only where `quantize` is None
    "awq": "AWQ weights of this layout are opened by vLLM or Transformers with autoawq; look for the model's -GPTQ sister.",
    "compressed-tensors": "These compressed-tensors weights are opened by vLLM; look for the model's -GPTQ sister.",
    "exl2": "EXL2 weights are opened by ExLlamaV2's own programs (tabbyAPI); look for the model's -GPTQ sister.",
    "exl3": "EXL3 weights are opened by ExLlamaV3 (tabbyAPI, text-generation-webui); look for the model's -GPTQ sister.",
    "gguf": "GGUF files are opened by llama.cpp, Ollama or LM Studio; look for the model's -GPTQ sister.",
    "gptq_p": "These GPTQ weights in the planar format gptq_p are opened by GPTQModel; choose a branch in the format gptq.",
    "lora": "This is a LoRA adapter, not a model; it changes a base model and cannot be opened alone.",
}

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.(?:safetensors|bin|pt))$")
_LONGEST_NAME, _MOST_MISSING = 80, 100_000  # of an architecture; shards: each of many files may claim to be one of 99,999


@dataclass(frozen=True)
class LocalModel:
    folder: Path
    kind: Kind
    quantize: QuantizeConfig | None  # where the packed weights can be read: kinds gptq, awq, compressed-tensors
    size_bytes: int  # of its weight files
    context_tokens: int | None  # it was trained for; None if the settings do not say
    architecture: str  # as in config.json, "MistralForCausalLM"; "" if unknown
    weights: tuple[Path, ...] = ()  # the files that hold the tensors, index aside
    problem: str = ""  # why it is incomplete, in a sentence
    served_by: str = ""  # addresses of the engines that compute it; only where kind is remote
    served_as: str = ""  # its name there, "owner/name"
    format: str = ""  # name of the weights' format where kind does not say it: "FP8", "bitsandbytes 4-bit", "32-bit"
    called: str = ""  # where the folder's own name says nothing: in the Hugging Face cache it is a commit

    @property
    def name(self) -> str:
        return self.called or self.folder.name

    @property
    def is_packed(self) -> bool:
        """Whether its weights are packed and can be read: GPTQ, or a neighbour that is repacked while it loads."""
        return self.kind == "gptq" or (self.kind in NEIGHBOURS and self.quantize is not None)

    @property
    def is_foreign(self) -> bool:
        """Whether it is of a format that no loader here reads; `OPENED_BY` says what does."""
        return self.kind in OPENED_BY and not self.is_packed

    @property
    def badge(self) -> str:
        """What a list shows beside the name: '4-bit, group 32, act-order' or 'AWQ'."""
        if self.quantize is not None and self.kind in NEIGHBOURS:
            return name_of(self.quantize)
        if self.quantize is not None:
            return f"GPTQ {self.quantize.summary}"
        if self.format:
            return self.format
        named = {"plain": "16-bit", "lora": "LoRA", "remote": "on another machine", "incomplete": "incomplete"}
        return named.get(self.kind, self.kind.upper())

    @classmethod
    def read(cls, folder: Path) -> "LocalModel":
        """Look at a folder. A damaged one is `incomplete` and its `problem` is a sentence; never raises for content."""
        try:
            return _read(folder)
        except GptqWebuiError as error:
            problem = str(error)
        except OSError as error:
            problem = f"The folder cannot be read ({in_words(error)}). Check its permissions, or download the model again."
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error, RecursionError):
            problem = "Its settings or weights are not what they should be. Download the model again."
        return cls(folder, "incomplete", None, 0, None, "", (), problem)


def remote_model(name: str, context_tokens: int | None = None, served_by: str = "") -> LocalModel:
    """A model that an engine on another machine serves under this name. It has no folder here."""
    folder = Path(name.replace("/", "_") or "remote")
    return LocalModel(folder, "remote", None, 0, context_tokens, "", served_by=served_by, served_as=name)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder looks like a model, complete or not."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        return False
    return bool(
        MARKER in names
        or "adapter_config.json" in names
        or any(name.endswith((".gguf", PARTIAL)) for name in names)
        or (
            ("config.json" in names or "quantize_config.json" in names)
            and any(name.endswith((".safetensors", ".bin", ".pt", ".json")) for name in names)
        )
    )


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(files, names of missing shards) of a folder, as `choose_weights` chooses them."""
    sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
    named = read_json(folder / "quantize_config.json").get("model_file_base_name")
    names, missing = choose_weights(sizes, named)
    return [folder / name for name in names], missing


def choose_weights(sizes: Mapping[str, int], named: str | None = None) -> tuple[list[str], list[str]]:
    """(weight files, names of missing shards) out of file names and their sizes in bytes.

    safetensors are preferred over .bin and .pt. `named` is quantize_config.json's
    model_file_base_name. One rule for a folder on disk and for a listing on the Hub.
    """
    for ending in (".safetensors", ".bin", ".pt"):
        files = sorted(name for name in sizes if name.endswith(ending) and name not in _NOT_WEIGHTS)
        if not files:
            continue
        whole = [name for name in files if not _SHARD.match(name)]
        if whole and (len(files) == len(whole) == 1 or not _shards_missing(files)):
            # a single file beside a complete set of shards: the set wins, it has an index
            shards = [name for name in files if name not in whole]
            return (shards or _one_of(whole, sizes, named)), []
        missing = _shards_missing(files)
        return (_one_of(whole, sizes, named) if whole else files), ([] if whole else missing)
    return [], []


_NOT_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.bin"}


def _one_of(files: list[str], sizes: Mapping[str, int], named: str | None) -> list[str]:
    """Of several whole files: the one the settings name, then model.safetensors, then the largest."""
    for wanted in (f"{named}.safetensors", "model.safetensors"):
        if wanted in files:
            return [wanted]
    return [max(files, key=lambda name: sizes[name])]


def _shards_missing(files: Iterable[str]) -> list[str]:
    have = set(files)
    sets = {(found[1], found[3], found[4]) for name in have if (found := _SHARD.match(name))}
    wanted = (f"{stem}-{at:05}-of-{count}{ending}" for stem, count, ending in sorted(sets) for at in range(1, int(count) + 1))
    return list(islice((each for each in wanted if each not in have), _MOST_MISSING))


def tensors_of(files: Iterable[Path]) -> dict[str, tuple[Path, TensorInfo]]:
    """Name -> (file, header entry), over every safetensors file. Raises BadCheckpoint for a damaged one."""
    return {name: (path, info) for path in files if path.suffix == ".safetensors" for name, info in read_header(path).items()}


def kind_of_tensors(tensors: dict[str, tuple[Path, TensorInfo]]) -> Kind:
    """From names and shapes alone: `qweight` of GPTQ is packed along its rows, AWQ's along its columns."""
    for name in tensors:
        if name.endswith((".q_perm", ".q_invperm")):
            return "exl2"
        if name.endswith(".trellis"):
            return "exl3"
        if name.endswith(".qweight"):
            base = name[: -len(".qweight")]
            scales, zeros = tensors.get(f"{base}.scales"), tensors.get(f"{base}.qzeros")
            if scales is None or zeros is None:
                continue
            if any(len(each[1].shape) != 2 for each in (tensors[name], scales, zeros)):
                return "gptq"  # no format has such; layout_of says what is wrong
            columns = tensors[name][1].shape[1]
            if columns == scales[1].shape[1]:
                return "gptq"
            if columns == zeros[1].shape[1]:
                return "awq"
    return "plain"


def architecture_and_context(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """What config.json says: ("MistralForCausalLM" or "", tokens it was trained for or None)."""
    config = in_todays_words(config)
    named = config.get("architectures")
    return printable(str(named[0]))[:_LONGEST_NAME] if isinstance(named, list) and named else "", context_of(config)


def _read(folder: Path) -> LocalModel:
    if unfit := unfit_file(folder):
        raise BadFile(unfit)
    config = read_json(folder / "config.json")
    architecture, context = architecture_and_context(config)
    names = {entry.name for entry in folder.iterdir()}
    files, missing = weight_files(folder)
    size_bytes = sum(path.stat().st_size for path in files)

    def found(kind: Kind, quantize: QuantizeConfig | None = None, problem: str = "", form: str = "") -> LocalModel:
        return LocalModel(folder, kind, quantize, size_bytes, context, architecture, tuple(files), problem, format=form)

    if any(name.endswith(PARTIAL) for name in names):
        return found(
            "incomplete",
            problem="Its download is not finished. Enter its name again and press Download: it continues where it stopped.",
        )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return found("incomplete", problem=f"{shown} missing. Download the model again; what is complete is kept.")
    if not files:
        if gguf := [folder / name for name in names if name.endswith(".gguf")]:
            files, size_bytes = gguf, sum(path.stat().st_size for path in gguf)
            return found("gguf")
        return found("incomplete", problem="There are no weights in this folder. Download the model again.")
    if "adapter_config.json" in names and "config.json" not in names:
        return found("lora")
    if not config:
        return found("incomplete", problem="config.json is missing. Download the model again; what is complete is kept.")
    quantize_config, quant_config = read_json(folder / "quantize_config.json"), read_json(folder / "quant_config.json")
    kind = declared_kind(config, quant_config, quantize_config)
    tensors = tensors_of(files)
    by_tensors = kind_of_tensors(tensors) if tensors else None
    if kind == "gptq" and by_tensors == "plain":
        if (quantize := QuantizeConfig.read(folder)).checkpoint_format == "marlin":
            return found("gptq", quantize)  # another layout under other names; the loaders say what opens it
        return found(
            "incomplete", problem="Its settings say GPTQ, but the files hold no packed GPTQ weights. Download the model again."
        )
    if by_tensors not in (None, "plain") and kind in ("gptq", "awq", "plain"):
        kind = by_tensors  # the tensors are the truth
    if kind in ("gptq", "plain", *NEIGHBOURS) and (problem := problem_of(in_todays_words(config), tensors)):
        return found("incomplete", problem=problem)
    if kind == "gptq":
        quantize = QuantizeConfig.read(folder, tensors)
        if problem := type_problem(tensors):
            return found("incomplete", problem=problem)
        return found("gptq", quantize)
    if kind in NEIGHBOURS:
        try:
            return found(kind, read_settings(kind, config, {**quantize_config, **quant_config}, tensors))
        except BadQuantizeConfig as error:
            named = name_of_gptq_p(_gptq_settings(config, quantize_config)) if kind == "gptq_p" else name_of_method(config)
            return found(kind, problem=str(error), form=named)
    if kind == "plain":
        largest = max(tensors.values(), key=lambda each: each[1].size_bytes, default=None)
        return found(kind, form=name_of_method(config) or (name_of_dtype(largest[1].dtype) if largest else ""))
    return found(kind)


def _gptq_settings(config: Mapping[str, Any], quantize_config: Mapping[str, Any]) -> dict[str, Any]:
    in_config = config.get("quantization_config")
    return {**(in_config if isinstance(in_config, Mapping) else {}), **quantize_config}


def declared_kind(config: Mapping[str, Any], quant_config: Mapping[str, Any], quantize_config: Mapping[str, Any]) -> Kind:
    """The kind that config.json, quant_config.json (AWQ) and quantize_config.json (AutoGPTQ) name; plain if they name none."""
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    method = str(quantization.get("quant_method") or "").lower()
    if not method and quantization.get("bits") and "group_size" in quantization:
        method = "gptq"  # early AutoGPTQ wrote no method into config.json
    if (method == "gptq" or (quantize_config and not method)) and name_of_gptq_p(_gptq_settings(config, quantize_config)):
        return "gptq_p"
    if is_auto_round(quantization):
        packing = str(quantization.get("packing_format") or "").lower()
        return "awq" if "awq" in packing else "gptq" if packing in ("", "auto_round") or "gptq" in packing else "plain"
    if method in ("awq", "compressed-tensors", "exl2", "exl3", "gptq"):
        return method  # type: ignore[return-value]
    if quant_config.get("w_bit"):
        return "awq"
    if quantize_config:
        return "awq" if str(quantize_config.get("quant_method", "")).lower() == "awq" else "gptq"
    return "plain"


def require_safetensors(model: LocalModel) -> None:
    """Raises BadCheckpoint for weights in .bin or .pt, which can run code when they are opened."""
    if any(path.suffix != ".safetensors" for path in model.weights):
        raise BadCheckpoint(
            f"{model.name} has its weights in {model.weights[0].name}, a format that can run code when it is opened. "
            "Choose a branch with .safetensors files."
        )
