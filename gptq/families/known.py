"""The families that are described, by the model_type of config.json. What is not recognised with certainty is not described:
such a model takes the generic path through transformers, which is slower and as right.
"""

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import (
    alibi,
    cohere,
    deepseek,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_oss,
    gptj,
    granite,
    llama,
    llama4,
    mixtures,
    nemotron,
    neox,
    nope,
    olmo,
    opt,
    phi,
    stablelm,
    starcoder2,
)
from .image_text import language_model
from .parts import ModelParts
from .reading import NotDescribed

log = logging.getLogger(__name__)

_FILES: tuple[ModuleType, ...] = (
    alibi, cohere, deepseek, falcon, gemma, glm, gpt2, gpt_oss, gptj, granite, llama, llama4, mixtures, nemotron, neox, nope,
    olmo, opt, phi, stablelm, starcoder2,
)  # fmt: skip
KINDS = {kind: describe for file in _FILES for kind, describe in file.KINDS.items()}
_ON_GPU = {"llama", "mistral", "qwen2", "qwen3", "phi3"}
# Of Llama's forward, and so possible there; but nobody has run them in that step yet.
_NOT_TRIED_ON_GPU = {"cwm", "exaone", "hyperclovax", "internlm3", "iquestcoder", "llama_alibi", "ministral"}


def parts_of(hf: Any) -> ModelParts | None:
    """The parts of a transformers causal LM, None if none of the families describes it. suitability.py compares them."""
    hf = language_model(hf)
    describe = KINDS.get(hf.config.model_type)
    if describe is None:
        return None
    try:
        parts: ModelParts = describe(hf)
    except NotDescribed as error:
        log.info("%s is not described: %s", hf.config.model_type, error)
        return None
    except (AttributeError, TypeError, ValueError, ArithmeticError, LookupError, StopIteration) as error:
        log.info("%s has other parts than its family: %s", hf.config.model_type, error)  # modules or settings of a variant
        return None
    return parts


def parts_for_gpu(hf: Any) -> ModelParts | None:
    """As `parts_of`; None, too, for a family that the GPU's step has not been tried with."""
    return None if language_model(hf).config.model_type in _NOT_TRIED_ON_GPU else parts_of(hf)


def has_gpu_step(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json may have a step of its own on a GPU; what `parts_of` finds decides."""
    return config.get("model_type") in _ON_GPU and config.get("hidden_act", "silu") == "silu"
