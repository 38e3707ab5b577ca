"""Where a layer of the files belongs in the model, whatever transformers calls it today."""

import re
from collections.abc import Iterable
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
        modules_of[name] = next((each for each in candidates if each in modules or experts_of(each) in modules), now)
    return modules_of


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
