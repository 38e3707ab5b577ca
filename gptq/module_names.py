"""Where a layer of the files belongs in the model, whatever transformers calls it today."""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..core.old_names import name_now
from .experts import experts_of

_RENAMES = "_get_key_renaming_mapping"  # of transformers 4: names of files -> names of the model


def module_names_of(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Where each layer of the files belongs in the model: a file may leave out the base model's prefix
    ("model.", "transformer."), have one too many, use a name that transformers 5 changed, or one of 2023."""
    modules = {name for name, _module in model.named_modules()}
    prefix = model.base_model_prefix
    old = getattr(getattr(model.config, "quantization_config", None), "old", None)
    of_2023 = old.tensors if old is not None else {}
    renamings = [each for each in conversions_of(model) if not hasattr(each, "operations")]
    splits = splits_of(model)
    modules_of = {}
    for name in names:
        now = name_now(name, of_2023)
        key = f"{now}.qweight"
        for renaming in renamings:
            key, _pattern = renaming.rename_source_key(key)
        candidates = [
            candidate
            for known in (now, key.removesuffix(".qweight"))
            for candidate in (known, f"{prefix}.{known}", known.removeprefix(f"{prefix}."))
        ]
        found = next((each for each in candidates if each in modules or experts_of(each) in modules), "")
        modules_of[name] = found or next(filter(None, (_whole(each, splits, modules) for each in candidates)), now)
    return modules_of


@dataclass(frozen=True)
class Split:
    """A layer that files hold as one and transformers cuts while it reads the files."""

    pattern: str  # of its name in the files
    parts: tuple[str, ...]  # what stands there in the names of the parts, in the order of their outputs

    @property
    def joined(self) -> tuple[str, tuple[str, ...]]:
        """The last names of the layer and of its parts."""
        whole = re.sub(r"\\(.)", r"\1", self.pattern)
        return whole.rpartition(".")[2], tuple(each.rpartition(".")[2] for each in self.parts)


def splits_of(model: PreTrainedModel) -> list[Split]:
    """What transformers' loader cuts by its outputs, one part after the other."""
    found = []
    for each in conversions_of(model):
        operations: Sequence[Any] = getattr(each, "operations", ())
        if [type(one).__name__ for one in operations] not in (["Chunk"], ["Split"]) or operations[0].dim != 0:
            continue
        sources, targets = list(each.source_patterns), list(each.target_patterns)
        if len(sources) == 1 and not any("\\1" in part for part in targets):
            pattern = re.sub(r"(\\?\.weight)?\$?$", "", sources[0])
            found.append(Split(pattern, tuple(part.removesuffix(".weight") for part in targets)))
    return found


def _whole(name: str, splits: Iterable[Split], modules: Container[str]) -> str:
    """Where a layer stands until it is cut: beside its parts, or in their place. "" if it has none in the model."""
    for split in splits:
        match = re.search(f"(?:{split.pattern})$", name)
        if match is not None:
            parts = [name[: match.start()] + each for each in split.parts]
            owner = parts[0].rpartition(".")[0]
            whole = f"{owner}.{name.rpartition('.')[2]}"
            if whole in modules or all(each in modules and each.rpartition(".")[0] == owner for each in parts):
                return whole
    return ""


@dataclass(frozen=True)
class _Renaming:
    """One of transformers 4, used as one of transformers 5."""

    pattern: str
    replacement: str

    def rename_source_key(self, key: str) -> tuple[str, str]:
        return re.sub(self.pattern, self.replacement, key), self.pattern


def keep_names_of_2023(model: PreTrainedModel) -> None:
    """transformers 4 looks at the names before they are renamed: without the model's prefix it takes them for a base model's."""
    rename: Any = getattr(model, _RENAMES, None)  # transformers 5 has none
    if rename is not None:
        vars(model)[_RENAMES] = lambda keys, mapping=None, *_whose: rename(keys, mapping)


def forget_names_of_2023(model: PreTrainedModel) -> None:
    vars(model).pop(_RENAMES, None)


def conversions_of(model: PreTrainedModel) -> list[Any]:
    """What transformers' loader does with keys: renamings, and those with `operations`, which join tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return [_Renaming(*each) for each in getattr(model, "_checkpoint_conversion_mapping", {}).items()]
    return list(get_model_conversion_mapping(model))
