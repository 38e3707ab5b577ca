"""Which files of a repository a GPTQ model needs, and which repositories hold something else.

Without side effects: a listing and its settings files in, names and sizes out. The rules that
distinguish the kinds and choose among weight files are those of core/models.py.
"""

import difflib
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import BadQuantizeConfig, WrongRepository
from ..core.model_ref import ModelRef
from ..core.models import OPENED_BY, Kind, choose_weights, declared_kind
from ..core.neighbour_layouts import NEIGHBOURS, name_of, settings_of, why_unreadable
from ..core.old_names import successor_of, why_unlike
from ..core.other_formats import name_of_method
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_bytes, plural
from .repository import Listing, RemoteFile, is_safe_path

_OTHER = "Choose another repository."
MOST_FILES = 1000  # of one model; the largest ones have 200 shards
SETTINGS = ("config.json", "quant_config.json", "quantize_config.json")

_WEIGHTS = (".safetensors", ".bin", ".pt")
_TAKEN = re.compile(
    r".+\.(json|jinja|model|tiktoken)|(vocab|merges).*\.txt|(README|LICEN[SC]E|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_LEFT = re.compile(
    r"\..*|.*\.index\.json|trainer_state\.json|training_args\.json|all_results\.json|(train|eval)_results\.json"
    r"|measurement\.json|job_new\.json|cal_trace\.json"
)
_TEMPLATES = "additional_chat_templates/"
_SETTING_LIMIT_BYTES = 100_000_000  # the largest tokenizer.json known has 33 MB
_GGML = re.compile(r"\.(gguf|ggml)$|ggml.*\.bin$", re.IGNORECASE)
_DATA = re.compile(r"\.(parquet|arrow|csv|tsv|jsonl|jsonl\.gz|zst)$", re.IGNORECASE)
_GPTQ_NAME = re.compile(r"gptq|(^|[-_.])[2348]bit", re.IGNORECASE)
_ENDING = re.compile(
    r"[-_.](?:i1-)?(?:gguf|ggml|awq|exl[23]|[\d.]+bpw.*|fp16|bf16|hf)$", re.IGNORECASE
)  # endings that name a kind, at the end of a repository's name


@dataclass(frozen=True)
class FileSelection:
    files: tuple[RemoteFile, ...]
    kind: Kind
    format: str  # "GPTQ 4-bit, group 32, act-order (safetensors)"
    notes: tuple[str, ...] = ()  # for the user, in sentences
    weights: tuple[str, ...] = ()  # which of the files hold the tensors

    @property
    def weights_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files if file.path in self.weights)

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def summary(self) -> str:
        """'4.16 GB in 9 files, GPTQ 4-bit, group 32, act-order (safetensors)'."""
        return f"{format_bytes(self.total_bytes)} in {plural(len(self.files), 'file')}, {self.format}"


def settings_needed(listing: Listing) -> list[str]:
    """The settings files that must be read to find the kind; none if the file names show it."""
    if _kind_by_names(listing) is not None:
        return []
    return [file.path for file in listing.files if file.path in SETTINGS]


def parse_settings(data: bytes | None) -> dict[str, Any]:
    """A settings file as it came from the Hub; empty if it is no JSON object (LocalModel.read reports that)."""
    try:
        values = json.loads((data or b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def select_files(
    listing: Listing,
    settings: Mapping[str, Mapping[str, Any]],
    any_kind: bool = False,
    allow_code: bool = False,
    allow_pickle: bool = False,
) -> FileSelection:
    """The files to download. `settings` holds the files that `settings_needed` names.

    Raises WrongRepository for anything but GPTQ weights in safetensors (with `any_kind`: for
    GGUF and what holds no model), for unsafe file names, missing shards and more than MOST_FILES files.
    """
    ref, sizes = listing.ref, {file.path: file.size_bytes for file in listing.files if "/" not in file.path}
    named = settings.get("quantize_config.json", {}).get("model_file_base_name")
    kind = _kind_by_names(listing) or _kind_by_settings(listing, settings)
    if kind == "gguf" or (
        kind in OPENED_BY and not any_kind and not _is_packed(kind, settings)
    ):  # of many .gguf files the user wants one, and the name does not say which
        raise _wrong_kind(ref, kind, settings)
    weights, missing = choose_weights({name: size for name, size in sizes.items() if not _GGML.search(name)}, named)
    if not weights:
        raise WrongRepository(_no_weights(listing))
    if not any_kind and not _is_packed(kind, settings):
        raise _wrong_kind(ref, kind, settings)
    if missing:
        raise WrongRepository(
            f"{ref} is incomplete on the Hub: {', '.join(missing[:3])} is not there. {_other_branches(ref) or _OTHER}"
        )
    if _is_packed(kind, settings) and not weights[0].endswith(".safetensors") and not (any_kind or allow_pickle):
        raise WrongRepository(
            f"{ref} has its GPTQ weights only as {weights[0]}, a format that can run code when it is opened. "
            "Choose a branch or repository with .safetensors files, or ask for it (--allow-pickle, in the page "
            f"Also .bin and .pt weights) and convert it: that reads the tensors and runs nothing. {_other_branches(ref)}".rstrip()
        )
    files = _files(listing, set(weights), allow_code)
    if len(files) > MOST_FILES:
        raise WrongRepository(
            f"{ref} has {len(files)} files that could belong to a model; a model has a few dozen, at most {MOST_FILES}. "
            "Nothing was downloaded. Name the files that you need: gptq-webui download REF FILE …, or --include."
        )
    form = f"{_format(kind, settings)} ({weights[0].rpartition('.')[2]})"
    return FileSelection(files, kind, form, tuple(_notes(listing, settings, kind, weights, allow_code)), tuple(weights))


def select_by_name(
    listing: Listing, files: Sequence[str], include: Sequence[str], exclude: Sequence[str], among: FileSelection | None
) -> FileSelection:
    """Exactly the files of these names or patterns (as `hf download` reads them), whatever the kind.

    Without names and patterns to include, `exclude` removes files from `among`.
    Raises WrongRepository if nothing is left, a name is not there or would leave its folder.
    """
    known = {file.path: file for file in listing.files}
    if missing := [path for path in files if path not in known]:
        close = difflib.get_close_matches(missing[0], known, n=1)
        raise WrongRepository(
            f"{listing.ref} has no file {missing[0]!r}." + (f" Did you mean {close[0]!r}?" if close else " Check the name.")
        )
    if files or include:
        chosen = [known[path] for path in files] or [
            file for file in listing.files if any(fnmatch.fnmatch(file.path, _pattern(each)) for each in include)
        ]
    else:
        chosen = list(among.files if among else listing.files)
    chosen = [file for file in chosen if not any(fnmatch.fnmatch(file.path, _pattern(each)) for each in exclude)]
    if not chosen:
        raise WrongRepository(f"Nothing of {listing.ref} is left to download. Check --include and --exclude.")
    for file in chosen:
        _require_safe(listing, file)
    kept = tuple(file.path for file in chosen)
    weights = tuple(path for path in (among.weights if among else ()) if path in kept)
    form = among.format if among and weights == among.weights else "as you asked"
    return FileSelection(tuple(chosen), among.kind if among else "plain", form, among.notes if among else (), weights)


def _pattern(text: str) -> str:
    return text + "*" if text.endswith("/") else text


def _require_safe(listing: Listing, file: RemoteFile) -> None:
    if not is_safe_path(file.path):
        raise WrongRepository(
            f"{listing.ref} holds a file named {_short(file.path)!r}, which would not stay in its own folder or cannot exist on "
            "every system. Nothing was downloaded; choose another repository."
        )


def _short(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "…"


def _kind_by_names(listing: Listing) -> Kind | None:
    """The kind, if file names alone show it; None if settings must be read."""
    names = {file.path for file in listing.files if "/" not in file.path}
    weights = {name for name in names if name.endswith(_WEIGHTS) and not _GGML.search(name)}
    everywhere = {file.path for file in listing.files}
    if not weights and any(_GGML.search(name) for name in everywhere):
        return "gguf"
    if "adapter_config.json" in names and all(name.startswith(("adapter_", "training_")) for name in weights):
        return "lora"
    if "measurement.json" in names and "config.json" in names and any(name.startswith("output") for name in weights):
        return "exl2"  # older than its entry in config.json
    if not weights and "measurement.json" in names:
        return "exl2"  # main of a repository whose branches hold the weights
    return None


def _kind_by_settings(listing: Listing, settings: Mapping[str, Mapping[str, Any]]) -> Kind:
    config, quant_config, quantize_config = (settings.get(name, {}) for name in SETTINGS)
    kind = declared_kind(config, quant_config, quantize_config)
    if kind != "plain":
        return kind
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and "gptq" in str(quantization.get("packing_format", "")).lower():
        return "gptq"  # AutoRound, packed as GPTQ
    if not quantization:
        names = [file.path for file in listing.files if file.path.endswith(_WEIGHTS) and "/" not in file.path]
        if any(_GPTQ_NAME.search(name) for name in names) or (names and re.search(r"[-_]gptq", listing.ref.repo, re.IGNORECASE)):
            return "gptq"  # of early 2023, without any settings; the tensors will show it
    return "plain"


def _is_packed(kind: Kind, settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the native engine reads weights that these settings describe."""
    return kind == "gptq" or (kind in NEIGHBOURS and not why_unreadable(kind, *_both(settings)))


def _both(settings: Mapping[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """config.json, and the two files of settings as one."""
    config, quant_config, quantize_config = (settings.get(name, {}) for name in SETTINGS)
    return config, {**quantize_config, **quant_config}


def _wrong_kind(ref: ModelRef, kind: Kind, settings: Mapping[str, Mapping[str, Any]]) -> WrongRepository:
    """The refusal, which says what it is and where the same model may be as GPTQ."""
    owner, _, name = ref.repo.partition("/")
    config = settings.get("config.json", {})
    quantization = name_of_method(config)
    if kind in NEIGHBOURS:
        found = f"{ref} cannot be read. {why_unreadable(kind, *_both(settings))}"
    elif kind == "lora":
        found = f"{ref}: {OPENED_BY[kind]}"
    elif kind in OPENED_BY:
        found = f"{ref} holds {kind.upper()} weights, not GPTQ. {OPENED_BY[kind]}"
    elif quantization:
        found = f"{ref} holds weights of another format ({quantization}), not GPTQ."
    else:
        found = f"{ref} is not quantised (16-bit weights); this program is for GPTQ models."
    if "gptq" in name.lower():
        return WrongRepository(f"{found} Nothing was downloaded.")
    gptq_name = _ENDING.sub("", name) + "-GPTQ"
    candidates = tuple(dict.fromkeys(f"{each}/{gptq_name}" for each in (owner, "TheBloke")))
    return WrongRepository(f"{found} Nothing was downloaded.", candidates)


def _no_weights(listing: Listing) -> str:
    ref, paths = listing.ref, [file.path for file in listing.files]
    if "model_index.json" in paths:
        return f"{ref} holds a model for pictures (Diffusers), not for text. Nothing was downloaded. {_OTHER}"
    if deeper := [path for path in paths if path.endswith(_WEIGHTS)]:
        return (
            f"{ref} has its weights in folders of their own ({deeper[0]}), which no loader here reads. "
            f"Nothing was downloaded. {_OTHER}"
        )
    if data := [path for path in paths if _DATA.search(path)]:
        return f"{ref} holds data ({data[0].rpartition('/')[2]}), not a model. Nothing was downloaded. {_OTHER}"
    return f"{ref} holds no weights. {_other_branches(ref) or _OTHER}"


def _other_branches(ref: ModelRef) -> str:
    return "" if ref.branch == "main" else f"Try {ref.repo} without a branch."


def _files(listing: Listing, weights: set[str], allow_code: bool) -> tuple[RemoteFile, ...]:
    ending = ".bin.index.json" if any(name.endswith(".bin") for name in weights) else ".safetensors.index.json"
    sharded = any("-of-" in name for name in weights)
    chosen: dict[str, RemoteFile] = {}
    for file in listing.files:
        at_top = "/" not in file.path
        setting = _TAKEN.fullmatch(file.path) and not _LEFT.fullmatch(file.path) and file.size_bytes <= _SETTING_LIMIT_BYTES
        take = (
            file.path in weights
            or (sharded and at_top and file.path.endswith(ending))
            or (allow_code and file.path.endswith(".py"))
            or (setting and (at_top or file.path.startswith(_TEMPLATES)))
        )
        if not take:
            continue
        _require_safe(listing, file)
        chosen.setdefault(file.path.lower(), file)  # on Windows and macOS README.md and readme.md are one file
    return tuple(chosen.values())


def _format(kind: Kind, settings: Mapping[str, Mapping[str, Any]]) -> str:
    if kind in NEIGHBOURS and _is_packed(kind, settings):
        return name_of(quantize_of(settings))
    if kind != "gptq":
        plain = name_of_method(settings.get("config.json", {})) or "16-bit"
        return {"plain": plain, "lora": "LoRA"}.get(kind, kind.upper())
    try:
        return "GPTQ " + quantize_of(settings).summary
    except BadQuantizeConfig:
        return "GPTQ"


def quantize_of(settings: Mapping[str, Mapping[str, Any]]) -> QuantizeConfig:
    """The quantisation that the settings describe. Raises BadQuantizeConfig if they do not."""
    config, quant_config, quantize_config = (settings.get(name, {}) for name in SETTINGS)
    kind = declared_kind(config, quant_config, quantize_config)
    if kind in NEIGHBOURS:
        return settings_of(kind, *_both(settings))
    in_config = config.get("quantization_config")
    own = {key: value for key, value in quantize_config.items() if value is not None}
    return QuantizeConfig.from_json({**(in_config if isinstance(in_config, Mapping) else {}), **own})


def _notes(
    listing: Listing, settings: Mapping[str, Mapping[str, Any]], kind: Kind, weights: list[str], allow_code: bool
) -> list[str]:
    notes = []
    code = [file.path for file in listing.files if file.path.endswith(".py")]
    config = settings.get("config.json", {})
    if code and "auto_map" in config and not allow_code:
        successor = successor_of(config)
        why = "it is not needed" if successor and not why_unlike(config, successor) else "it would run with all your rights"
        notes.append(
            f"The model has program code of its own ({', '.join(code[:3])}{', …' if len(code) > 3 else ''}), which is not "
            f"downloaded: {why}."
        )
    spare = sum(file.size_bytes for file in listing.files if file.path not in weights and file.path.endswith(_WEIGHTS))
    if spare:
        notes.append(f"Other weights in the same branch, {format_bytes(spare)}, are left on the Hub.")
    if kind == "gptq" and not (
        settings.get("quantize_config.json") or settings.get("config.json", {}).get("quantization_config")
    ):
        notes.append("It has no quantisation settings; they are read from the tensors after the download.")
    return notes
