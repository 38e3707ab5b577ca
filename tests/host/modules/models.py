"""Loading and unloading: the loaders are looked up in this module's globals at every call."""

import gc
import sys

import modules.shared as shared
from modules.logging_colors import logger
from modules.models_settings import get_model_metadata
from modules.utils import resolve_model_path


def load_model(model_name, loader=None):
    shared.model_name = model_name
    table = {"Transformers": transformers_loader, "ExLlamav3": ExLlamav3_loader, "llama.cpp": llama_cpp_server_loader}
    metadata = get_model_metadata(model_name)
    output = table[loader or metadata["loader"]](model_name)
    model, tokenizer = output if isinstance(output, tuple) else (output, load_tokenizer(model_name))
    if model is None:
        return None, None
    shared.settings.update({key: value for key, value in metadata.items() if key in shared.settings})
    logger.info("CONTEXT LENGTH: %s", shared.settings["truncation_length"])
    return model, tokenizer


def transformers_loader(model_name):
    """The host's own: what it does with a GPTQ folder is the reason for our extension."""
    from transformers import AutoModelForCausalLM

    print("HOST LOADER", model_name, file=sys.stderr)
    return AutoModelForCausalLM.from_pretrained(resolve_model_path(model_name))


def ExLlamav3_loader(model_name):
    raise ImportError("exllamav3 is not installed")


def llama_cpp_server_loader(model_name):
    return None, None  # there is no .gguf in a GPTQ folder


def load_tokenizer(model_name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model_path(model_name))


def unload_model(keep_model_name=False):
    """Calls `unload()` for its own classes only; every other model is just dropped."""
    if shared.model is None:
        return
    if type(shared.model).__name__ in ("Exllamav3Model", "Exllamav3HF", "TensorRTLLMModel"):
        shared.model.unload()
    shared.model = shared.tokenizer = None
    gc.collect()
    if not keep_model_name:
        shared.model_name = "None"


def load_model_if_idle_unloaded():
    if shared.args.idle_timeout and shared.model is None and shared.model_name != "None":
        shared.model, shared.tokenizer = load_model(shared.model_name)
