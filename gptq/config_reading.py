"""config.json as transformers reads it, or why it does not, in words."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..core.config_numbers import shown
from ..core.errors import BadCheckpoint
from ..core.folder_files import read_json
from ..core.foreign_errors import in_words
from ..core.models import LocalModel
from ..core.old_names import renewed, successor_of, why_unlike
from ..core.readable_folder import readable, without_bom
from . import sloped_llama

# What no forward that goes on token by token gives right numbers for.
_NOT_CAUSAL = {"cpmant": "it reads its prompt in both directions"}


def read_config(model: LocalModel, trust_remote_code: bool = False) -> Any:
    """config.json as transformers reads it. Raises BadCheckpoint with a sentence."""
    values = read_json(model.folder / "config.json")
    successor = None if trust_remote_code else successor_of(values)
    if successor is not None and (why := why_unlike(values, successor)):
        raise BadCheckpoint(
            f"{model.name} is of the architecture {model.architecture or values.get('model_type')}, which came as program code. "
            f"Such code is not run; transformers has most of its parts, but {why}. Choose another model, or turn on "
            "trust_remote_code for this model, which runs that code."
        )
    try:
        if successor is not None:
            if not successor.architecture:
                sloped_llama.register()
            config = AutoConfig.for_model(successor.model_type, **renewed(values, successor))
        else:
            config = _config_of(model, trust_remote_code)
        config.name_or_path = str(model.folder)
    except Exception as error:  # transformers 5 checks the types of a config, with errors of no common class
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise BadCheckpoint(_own_code(model)) from None
        raise BadCheckpoint(_bad_config(model, error)) from None
    if why := _NOT_CAUSAL.get(str(getattr(config, "model_type", "")), ""):
        raise BadCheckpoint(
            f"{model.name} is of the architecture {model.architecture or config.model_type}, which cannot be computed token by "
            f"token: {why}. Choose another model."
        )
    if unknown := _unknown_rope(config):
        raise BadCheckpoint(
            f"config.json of {model.name} names the kind of rotary positions {unknown}, which the installed transformers does "
            "not know. Update transformers, or choose another model."
        )
    return config


def _config_of(model: LocalModel, trust_remote_code: bool) -> Any:
    values = read_json(model.folder / "config.json")
    scaling, kind = values.get("rope_scaling"), values.get("model_type")
    own_code = trust_remote_code and values.get("auto_map")
    if kind == "phi3" and isinstance(scaling, Mapping) and scaling.get("type") == "su" and not own_code:
        # its first name of longrope, which transformers 5 reads without the setting beside it
        return CONFIG_MAPPING[kind].from_dict({**values, "rope_scaling": {**scaling, "type": "longrope"}})
    with readable(model.folder, without_bom(model.folder)) as folder:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _own_code(model: LocalModel) -> str:
    return (
        f"{model.name} brings its own program code for its architecture ({model.architecture or 'unnamed'}), "
        "and the installed transformers does not know it. Code out of model folders is not run, unless you turn on "
        "trust_remote_code for this model."
    )


def _bad_config(model: LocalModel, error: BaseException) -> str:
    """Why transformers makes no config of config.json, as a sentence."""
    values = read_json(model.folder / "config.json")
    known = values.get("model_type")
    if (not isinstance(known, str) or known not in CONFIG_MAPPING) and values.get("auto_map"):
        return _own_code(model)
    if not isinstance(known, str) or known not in CONFIG_MAPPING:
        return (
            f"The installed transformers does not know the architecture of {model.name} "
            f"({model.architecture or 'not named in config.json'}): {in_words(error)}. "
            "Update transformers, or choose another model."
        )
    if field := re.search(r"field '(\w+)'", str(error)):
        said = f"says {field[1]} {shown(values.get(field[1]))}, which is of another type than transformers expects"
    else:
        said = f"describes no model that transformers can make: {in_words(error.__cause__ or error)}"
    return f"config.json of {model.name} {said}. Correct config.json, or download the model again."


def caps_scores(config: Any) -> bool:
    """Whether attention scores are kept within a soft cap (Gemma 2)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "attn_logit_softcapping", None) is not None


def _unknown_rope(config: Any) -> str:
    """The kind of rotary positions that transformers does not have; "" if it has it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(text, name, None)
        groups = [given, *given.values()] if isinstance(given, Mapping) else []
        for each in groups:
            kind = each.get("rope_type", each.get("type")) if isinstance(each, Mapping) else None
            if kind is not None and kind not in (*ROPE_INIT_FUNCTIONS, "default", "su", "mrope"):
                return shown(kind)
    return ""
