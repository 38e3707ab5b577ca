"""Where a layer of the files belongs in the model, whatever transformers calls it today."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .experts import experts_of


def module_names_of(names: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Where each layer of the files belongs in the model: a file may leave out the base model's prefix
    ("model.", "transformer."), have one too many, or use a name that transformers 5 changed."""
    modules = {name for name, _module in model.named_modules()}
    prefix = model.base_model_prefix
    renamings = [each for each in conversions_of(model) if not hasattr(each, "operations")]
    modules_of = {}
    for name in names:
        key = f"{name}.qweight"
        for renaming in renamings:
            key, _pattern = renaming.rename_source_key(key)
        candidates = [
            candidate
            for known in (name, key.removesuffix(".qweight"))
            for candidate in (known, f"{prefix}.{known}", known.removeprefix(f"{prefix}."))
        ]
        modules_of[name] = next((each for each in candidates if each in modules or experts_of(each) in modules), name)
    return modules_of


@dataclass(frozen=True)
class _Renaming:
    """One of transformers 4, used as one of transformers 5."""

    pattern: str
    replacement: str

    def rename_source_key(self, key: str) -> tuple[str, str]:
        return re.sub(self.pattern, self.replacement, key), self.pattern


def conversions_of(model: PreTrainedModel) -> list[Any]:
    """What transformers' loader does with keys: renamings, and those with `operations`, which join tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return [_Renaming(*each) for each in getattr(model, "_checkpoint_conversion_mapping", {}).items()]
    return list(get_model_conversion_mapping(model))
