"""The default order as one table: kind of model x what is installed -> the loader that is chosen, and the reason that is told."""

from pathlib import Path

import pytest

from gptq_webui.core.errors import LoadRefused
from gptq_webui.core.models import LocalModel, remote_model
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.loaders.choose import all_loaders, choose, survey
from gptq_webui.loaders.machine.capabilities import Machine

_BASE = {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"}
_EXL = {"exllamav2": "0.3.2", "exllamav2_ext": "0.3.2"}
GPU = {"torch_for": "cuda 13.0", "gpu": True}

MACHINES = {
    "processor": Machine(_BASE, "cpu"),
    "processor, all installed": Machine(
        _BASE | _EXL | {"gptqmodel": "7.6.0", "optimum": "2.3.0", "auto_gptq": "0.7.1", "openai": "3.0"}, "cpu"
    ),
    "card": Machine(_BASE, **GPU),
    "card, torch for the processor": Machine(_BASE | _EXL, "cpu", gpu=True),
    "card, exllamav2": Machine(_BASE | _EXL | {"flash_attn": "2.8.0"}, **GPU),
    "card, exllamav2 to compile": Machine(_BASE | {"exllamav2": "0.3.2"}, **GPU, compilers=True),
    "card, exllamav2 compiled": Machine(
        _BASE | {"exllamav2": "0.3.2"}, **GPU, compilers=True, compiled=frozenset({"exllamav2_ext"})
    ),
    "card, exllamav2 without compiler": Machine(_BASE | {"exllamav2": "0.3.2"}, **GPU),
    "card, gptqmodel, no transformers": Machine({"torch": "2.13.0", "gptqmodel": "7.6.0"}, **GPU),
    "old transformers, auto-gptq": Machine(
        {"torch": "2.13.0", "transformers": "4.57.6", "accelerate": "1.1", "auto_gptq": "0.7.1"}, "cpu"
    ),
}

NATIVE = "reads every GPTQ layout and 16-bit models, with nothing to compile"


def model(bits=4, group=128, act=True, sym=True, form="gptq", architecture="LlamaForCausalLM"):
    quantize = QuantizeConfig(bits, group, act, sym, form)
    return LocalModel(Path("/m/name"), "gptq", quantize, 10**9, 4096, architecture, (Path("/m/name/model.safetensors"),))


PLAIN = LocalModel(Path("/m/name"), "plain", None, 10**9, 4096, "LlamaForCausalLM", (Path("/m/name/model.safetensors"),))

# (machine, model, loader, what the reason says)
TABLE = [
    ("processor", model(), "transformers", "exllamav2: it needs a GPU"),
    ("processor, all installed", model(), "transformers", "exllamav2: it needs a GPU"),
    ("card", model(), "transformers", "exllamav2: the package exllamav2 is not installed (pip install exllamav2)"),
    ("card, torch for the processor", model(), "transformers", "exllamav2: the installed torch uses the processor only"),
    ("card, exllamav2", model(), "exllamav2", "made for 4-bit GPTQ models on a GPU"),
    ("card, exllamav2 compiled", model(), "exllamav2", "made for 4-bit GPTQ models"),
    ("card, exllamav2 to compile", model(), "transformers", "exllamav2: would compile for about two minutes"),
    ("card, exllamav2 without compiler", model(), "transformers", "exllamav2: it would have to be compiled, which takes"),
    ("old transformers, auto-gptq", model(), "transformers", "exllamav2: it needs a GPU"),
    # everything the files may say, on a machine where ExLlamaV2 runs
    *(("card, exllamav2", model(bits=bits), "transformers", f"exllamav2: it reads 4-bit GPTQ only; this model has {bits} bits")
      for bits in (2, 3, 8)),
    *(("card, exllamav2", model(group=group), "exllamav2", "made for 4-bit") for group in (-1, 32, 64, 128, 256, 1024)),
    ("card, exllamav2", model(group=48), "transformers", "exllamav2: group_size 48 is not a power of two"),
    ("card, exllamav2", model(group=16), "transformers", "exllamav2: group_size 16 is not 32 or more"),
    *(("card, exllamav2", model(act=act, sym=sym, form=form), "exllamav2", "made for 4-bit")
      for act in (True, False) for sym in (True, False) for form in ("gptq", "gptq_v2")),
    *(("card, exllamav2", model(architecture=f"{name}ForCausalLM"), "exllamav2", "made for 4-bit")
      for name in ("Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma2")),
    *(("card, exllamav2", model(architecture=name), "transformers", f"cannot read packed weights of the architecture {name}")
      for name in ("Phi3ForCausalLM", "GPTNeoXForCausalLM", "FalconForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel")),
    ("card, exllamav2", PLAIN, "transformers", "exllamav2: it is used for 4-bit GPTQ models; this one is not quantised"),
    ("processor", PLAIN, "transformers", "exllamav2: it is used for 4-bit GPTQ models"),
    ("processor, all installed", remote_model("llama"), "remote", "computed on other machines"),
]  # fmt: skip


@pytest.mark.parametrize(("machine", "local", "loader", "says"), TABLE, ids=lambda value: str(value)[:40])
def test_the_table(machine, local, loader, says):
    options = {"base_url": "http://127.0.0.1:1/v1"} if local.kind == "remote" else {}
    choice = choose(local, all_loaders(lambda: MACHINES[machine]), options=options)
    assert choice.loader.name == loader and says in choice.reason


@pytest.mark.parametrize("machine", MACHINES)
def test_each_row_has_its_own_reason_or_none(machine):
    rows = survey(model(), all_loaders(lambda: MACHINES[machine]))
    reasons = {each.name: each.reason for each in all_loaders(lambda: MACHINES[machine])}
    assert [row.reason for row in rows] == [reasons[row.loader] if row.chosen else "" for row in rows]


# (machine, model, loader asked for, what it says)
REFUSED = [
    ("card", model(), "autogptq", "neither auto-gptq nor GPTQModel is installed"),
    ("processor, all installed", model(sym=False), "autogptq", "GPTQModel refuses asymmetric models in the format gptq"),
    ("old transformers, auto-gptq", model(form="gptq_v2"), "autogptq", "auto-gptq reads the format gptq only"),
    ("processor, all installed", model(form="marlin"), "autogptq", "marlin layout"),
    ("processor, all installed", model(), "exllamav2", "needs a GPU"),
    ("processor, all installed", model(), "remote", "no remote engine is named"),
    ("card", model(), "remote", "the package openai is not installed"),
    ("processor, all installed", PLAIN, "autogptq", "this one is not quantised"),
    ("card, gptqmodel, no transformers", model(), "transformers", "transformers is not installed"),
]


@pytest.mark.parametrize(("machine", "local", "loader", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_loader_that_is_asked_for_and_cannot_says_why(machine, local, loader, says):
    with pytest.raises(LoadRefused, match=says):
        choose(local, all_loaders(lambda: MACHINES[machine]), loader)


def test_the_kernel_optimum_says_what_it_needs():
    loaders = all_loaders(lambda: MACHINES["card"])
    with pytest.raises(LoadRefused, match="optimum"):
        choose(model(), loaders, "transformers", {"kernel": "optimum"})
    loaders = all_loaders(lambda: MACHINES["processor, all installed"])
    assert choose(model(), loaders, "transformers", {"kernel": "optimum"}).loader.name == "transformers"
    with pytest.raises(LoadRefused, match="asymmetric"):
        choose(model(sym=False), loaders, "transformers", {"kernel": "optimum"})


def test_auto_gptq_beside_transformers_5_gets_its_cure():
    machine = Machine(_BASE | {"auto_gptq": "0.7.1"}, "cpu")
    row = next(row for row in survey(model(), all_loaders(lambda: machine)) if row.loader == "autogptq")
    assert "cannot work with transformers 5.23.0" in row.refusal.reason and "gptq-webui[autogptq]" in row.refusal.cure


def test_what_would_compile_is_a_row_with_a_button_and_can_be_asked_for():
    rows = {row.loader: row for row in survey(model(), all_loaders(lambda: MACHINES["card, exllamav2 to compile"]))}
    assert rows["exllamav2"].refusal is None and rows["exllamav2"].wait_s > 60 and rows["transformers"].chosen
    loaders = all_loaders(lambda: MACHINES["card, exllamav2 to compile"])
    assert choose(model(), loaders, "exllamav2").reason == "your choice"


def test_flash_attn_decides_how_many_answers_at_once():
    note = {row.loader: row.note for row in survey(model(), all_loaders(lambda: MACHINES["card, exllamav2 compiled"]))}
    assert "one answer at a time" in note["exllamav2"]
    note = {row.loader: row.note for row in survey(model(), all_loaders(lambda: MACHINES["card, exllamav2"]))}
    assert note["exllamav2"] == ""
