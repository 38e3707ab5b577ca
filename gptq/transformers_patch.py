"""`gptq_webui.register()`: transformers opens GPTQ models through our layers, as their model cards write it.

transformers' own entry for GPTQ needs optimum and gptqmodel. It is replaced, and `unregister` puts it
back. Nothing else of transformers is touched, and this program itself never calls it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import auto

from ..core.errors import BadCheckpoint, BadQuantizeConfig
from ..core.folder_files import shown_name
from ..core.models import LocalModel, kind_of_tensors, tensors_of
from ..core.quantize_config import QuantizeConfig
from .completing import complete
from .module_names import module_names_of
from .packed_quantizer import PackedLayer, PackedQuantizer, PackedWeights, packed_layers
from .unpacked_parts import unpacked_layers

_ENTRY = "gptq"
_lock = threading.RLock()
_original: Any = None  # transformers' own quantizer, while ours replaces it


def register() -> None:
    """From now on AutoModelForCausalLM, pipeline and all else open GPTQ models with our layers. Safe to call twice."""
    global _original
    with _lock:
        if _original is None:
            _original = auto.AUTO_QUANTIZER_MAPPING[_ENTRY]
            auto.AUTO_QUANTIZER_MAPPING[_ENTRY] = RegisteredQuantizer


def unregister() -> None:
    """As it was before `register`. Models that are loaded stay as they are."""
    global _original
    with _lock:
        if _original is not None:
            auto.AUTO_QUANTIZER_MAPPING[_ENTRY] = _original
            _original = None


@contextmanager
def original() -> Iterator[None]:
    """Inside the block transformers has its own entry, registered or not (the kernel `optimum` wants it)."""
    with _lock:
        ours = _original is not None
        unregister()
        try:
            yield
        finally:
            if ours:
                register()


class RegisteredQuantizer(PackedQuantizer):
    """transformers hands it config.json's quantization_config; which layers are packed, it reads from the files."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: tuple[Path, ...] = ()
        self._layers: dict[str, PackedLayer] = {}
        if not self.pre_quantized:
            raise BadQuantizeConfig(
                "gptq_webui.register() opens models that are quantised already. To quantise one with transformers, "
                "call gptq_webui.unregister() first."
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._files = _weight_files(model, kwargs.get("checkpoint_files"))
        tensors = tensors_of(self._files)
        if kind_of_tensors(tensors) != "gptq":
            raise BadCheckpoint(
                f"config.json says GPTQ, but {self._files[0].name} holds no packed GPTQ weights. Download the model again."
            )
        self._layers = packed_layers(tensors, QuantizeConfig.read(self._files[0].parent, tensors))
        if any(name.endswith(("lm_head", "embed_out")) for name in self._layers):
            model.config.tie_word_embeddings = False
        given: Any = self.quantization_config
        self.quantization_config = PackedWeights(self._layers, unpacked_layers(tensors))
        try:
            super()._process_model_before_weight_loading(model, **kwargs)
        finally:
            self.quantization_config = given  # transformers writes this one into config.json

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        complete(model, self._files, self._layers, module_names_of(self._layers, model))
        return model


def _weight_files(model: PreTrainedModel, given: Any) -> tuple[Path, ...]:
    """The files transformers is about to read; 4.57 does not pass them on, so there they are looked for again."""
    files = tuple(Path(each) for each in given) if given else _found_again(model)
    wrong = next((each for each in files if each.suffix != ".safetensors"), None)
    if wrong is not None:
        raise BadCheckpoint(
            f"The weights are in {wrong.name}, a format that can run code when it is opened. "
            "Choose a branch with .safetensors files."
        )
    return files


def _found_again(model: PreTrainedModel) -> tuple[Path, ...]:
    from transformers.utils import cached_file

    name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    config = cached_file(name, "config.json", revision=commit or "main", local_files_only=True)
    if config is None:
        raise BadCheckpoint(f"The folder of {name} cannot be found again. Give from_pretrained the path of a folder.")
    found = LocalModel.read(Path(config).parent)
    if not found.weights:
        raise BadCheckpoint(found.problem or f"There are no weights in the folder {shown_name(found.folder)}.")
    return found.weights
