"""loaders/choose.py: the first loader that takes the model, and every refusal a sentence."""

from pathlib import Path

import pytest

from gptq_webui.core.errors import BadParameter, LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.loaders.choose import all_loaders, choose, make_options, survey
from gptq_webui.loaders.contract.base import Refusal, Remark
from gptq_webui.loaders.contract.fake_loader import FakeLoader
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader


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
def test_what_cannot_be_opened_gets_a_reason(local, says):
    with pytest.raises(LoadRefused, match=says):
        choose(local, all_loaders())


class Picky(FakeLoader):
    name = "picky"

    def refusal(self, model, options):
        return Refusal("needs an NVIDIA card", "pip install a-card")


def test_the_reason_names_those_that_refused_before():
    choice = choose(model(), [Picky(), TransformersLoader()])
    assert choice.loader.name == "transformers" and choice.reason == "picky: needs an NVIDIA card (pip install a-card)"


def test_a_wanted_loader_is_obeyed_and_never_replaced():
    with pytest.raises(LoadRefused, match="NVIDIA"):
        choose(model(), [Picky(), TransformersLoader()], "picky")


def test_a_loader_that_does_not_exist_is_a_sentence():
    with pytest.raises(LoadRefused, match="There are: exllamav2, transformers, autogptq, remote"):
        choose(model(), all_loaders(), "exllama9")


def test_options_of_other_loaders_are_passed_over_and_bad_ones_reported():
    assert make_options(TransformersLoader(), {"dtype": "fp32", "gpu_split": "1,2"}).dtype == "fp32"
    with pytest.raises(BadParameter, match="fp16"):
        make_options(TransformersLoader(), {"dtype": "int3"})


class Slow(FakeLoader):
    name = "slow"

    def remark(self, model, options):
        return Remark("would compile for about two minutes first", 120)


class Other(FakeLoader):
    name = "other"


def test_the_survey_says_of_every_loader_what_it_says_to_the_model():
    picky, slow, fake = survey(model(), [Picky(), Slow(), FakeLoader()])
    assert picky.refusal == Refusal("needs an NVIDIA card", "pip install a-card") and not picky.chosen
    assert (slow.refusal, slow.wait_s, slow.chosen) == (None, 120, False) and "two minutes" in slow.note
    assert fake.chosen and fake.reason == FakeLoader.reason  # what the others lack is in their rows


def test_a_loader_that_must_wait_is_taken_only_if_nothing_else_can_or_the_user_says_so():
    assert choose(model(), [Slow(), FakeLoader()]).loader.name == "fake"
    assert choose(model(), [Slow(), FakeLoader()], "slow").reason == "your choice"
    assert choose(model(), [Slow(), Picky()]).loader.name == "slow"


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [({}, "fake"), ({"other": 50}, "fake"), ({"fake": 30, "other": 50}, "other"), ({"fake": 48, "other": 50}, "fake")],
)
def test_a_speed_measured_on_this_machine_beats_the_order_if_both_were_measured(speeds, chosen):
    choice = choose(model(), [FakeLoader(), Other()], speeds=speeds)
    assert choice.loader.name == chosen
    assert (choice.reason == "50 tokens/s on this machine, 30 with fake") == (chosen == "other")


def test_a_bad_option_is_a_refusal_in_the_survey():
    (row,) = survey(model(), [TransformersLoader()], {"dtype": "int3"})
    assert "fp16" in row.refusal.reason and not row.chosen
