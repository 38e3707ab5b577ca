"""Models of 2023 whose context was stretched by Python code in their folder (SuperHOT), which is not run here.

The folder's modelling_llama.py divides every position by max_position_embeddings / 2048. Loaded without that code and
without the same division, such a model writes nonsense. config.json says nothing about it.
"""

import re

from ...core.models import LocalModel
from ...core.quantize_config import read_json

_CODE = ("modelling_llama.py", "llama_rope_scaled_monkey_patch.py")  # Kaiokendev's and TheBloke's files
TRAINED_TOKENS = 2048  # of Llama 1, which all of them were made from
_ARCHITECTURE = "LlamaForCausalLM"


def compression(model: LocalModel) -> float:
    """What positions must be divided by: 4 for a context of 8,192; 1 for a model that is not stretched by code."""
    named = re.search(r"superhot", model.name, re.IGNORECASE) is not None
    if model.architecture != _ARCHITECTURE or not (named or any((model.folder / each).is_file() for each in _CODE)):
        return 1.0
    config = read_json(model.folder / "config.json")
    if config.get("rope_scaling") or config.get("rope_parameters"):
        return 1.0  # config.json says it in the way of today
    tokens = model.context_tokens or 0
    if tokens <= TRAINED_TOKENS and (size := re.search(r"(\d+)k\b", model.name, re.IGNORECASE)):
        tokens = int(size[1]) * 1024  # "…-SuperHOT-8K-GPTQ"
    return min(64.0, max(1.0, tokens / TRAINED_TOKENS))


def note(factor: float) -> str:
    return (
        f"The context of this model is stretched by code in its folder (SuperHOT), which is not run. Positions are divided by "
        f"{factor:g} instead, as that code does; the option compress_pos_emb sets another figure."
    )
