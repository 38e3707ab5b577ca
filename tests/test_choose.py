"""loaders/choose.py: the first loader that takes the model, and every refusal a sentence."""

from pathlib import Path

import pytest

from gptq_webui.core.errors import BadParameter, LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.loaders.choose import all_loaders, choose, make_options
from gptq_webui.loaders.fake import FakeLoader
from gptq_webui.loaders.transformers import TransformersLoader


def model(kind="gptq", form="gptq", weights="model.safetensors", problem=""):
    quantize = QuantizeConfig(4, 128, checkpoint_format=form) if kind == "gptq" else None
    return LocalModel(Path("/m/name"), kind, quantize, 10**9, 4096, "LlamaForCausalLM", (Path(f"/m/name/{weights}"),), problem)


def test_gptq_goes_to_transformers():
    choice = choose(model(), all_loaders())
    assert choice.loader.name == "transformers" and choice.reason


@pytest.mark.parametrize(
    ("local", "says"),
    [
        (model("awq"), "AWQ"),
        (model("exl2"), "EXL2"),
        (model("exl3"), "EXL3"),
        (model("gguf"), "llama.cpp"),
        (model("lora"), "adapter"),
        (model("incomplete", problem="model-2.safetensors missing."), "model-2.safetensors missing"),
        (model(form="marlin"), "marlin layout"),
        (model(weights="model.bin"), "can run code"),
    ],
)
def test_what_cannot_be_opened_is_told_why(local, says):
    with pytest.raises(LoadRefused, match=says):
        choose(local, all_loaders())


class Picky(FakeLoader):
    name = "picky"

    def refusal(self, model, options):
        from gptq_webui.loaders.base import Refusal

        return Refusal("needs an NVIDIA card", "pip install a-card")


def test_the_reason_names_those_that_refused_before():
    choice = choose(model(), [Picky(), TransformersLoader()])
    assert choice.loader.name == "transformers" and choice.reason == "picky: needs an NVIDIA card (pip install a-card)"


def test_a_wanted_loader_is_obeyed_and_never_replaced():
    with pytest.raises(LoadRefused, match="NVIDIA"):
        choose(model(), [Picky(), TransformersLoader()], "picky")


def test_a_loader_that_does_not_exist_is_a_sentence():
    with pytest.raises(LoadRefused, match="There are: transformers"):
        choose(model(), all_loaders(), "exllama9")


def test_options_of_other_loaders_are_passed_over_and_bad_ones_told():
    assert make_options(TransformersLoader(), {"dtype": "fp32", "gpu_split": "1,2"}).dtype == "fp32"
    with pytest.raises(BadParameter, match="fp16"):
        make_options(TransformersLoader(), {"dtype": "int3"})
