"""Quantising layer by layer: against the whole model at once, and after kills."""

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from every_architecture import KINDS, tiny_model
from safetensors.torch import load_file

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.errors import BadParameter, LoadCancelled, LoadFailed
from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine import quantize_job
from gptq_webui.gptq import bit_packing, gptq_solver, layerwise_quantize
from gptq_webui.gptq.calibration_run import first_inputs
from gptq_webui.gptq.layerwise_quantize import LayerDone, layer_file, quantize_layers
from gptq_webui.gptq.quantize import decoder_layers, quantize_model
from gptq_webui.gptq.rounding_error import output_error
from gptq_webui.loaders.text.built_in_templates import CHATML

FOUR = QuantizeConfig(4, 32, desc_act=True, damp_percent=0.1)
EIGHT = QuantizeConfig(8, -1, damp_percent=0.1)
CPU = torch.device("cpu")


def texts(count: int = 70) -> list[list[int]]:
    """Two batches of two sizes: 2048 tokens, and the rest."""
    return torch.randint(0, 260, (count, 32), generator=torch.Generator().manual_seed(0)).tolist()


def layers(folder: Path, count: int = 2) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for index in range(count):
        found |= load_file(layer_file(folder, index))
    return found


def dense(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    return bit_packing.dequantize(*(tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")), bits)


@pytest.mark.parametrize("kind", [each for each in tiny.ARCHITECTURES if each != "mixtral"])
def test_the_same_as_the_whole_model_at_once(kind: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    quantize_model(tiny.dense_model(kind), None, texts(), {whole: FOUR})
    quantize_layers(tiny.dense_model(kind), texts(), {"four": FOUR}, tmp_path, CPU)
    at_once, by_layer = load_file(whole / "gptq_model-4bit-32g.safetensors"), layers(tmp_path / "four")
    packed = {name for name in at_once if name.endswith(".qweight")}
    assert packed == {name for name in by_layer if name.endswith(".qweight")}
    for name in packed:
        layer = name.removesuffix(".qweight")
        same = (dense(at_once, layer, 4) - dense(by_layer, layer, 4)).abs() < 1e-6
        assert same.float().mean() > 0.97, layer  # sums in another order: a rounding may tip over


def test_killed_at_any_layer_the_result_is_the_same(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        return tiny.AutoModelForCausalLM.from_config(
            tiny.dense_model("llama").config.__class__(**{**tiny.ARCHITECTURES["llama"], "num_hidden_layers": 8})
        ).eval()

    def seeded() -> torch.nn.Module:
        torch.manual_seed(5)
        return model()

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    branches = {"four": FOUR, "eight": EIGHT}
    undisturbed.mkdir()
    killed.mkdir()
    reports: list[LayerDone] = []
    quantize_layers(seeded(), texts(), branches, undisturbed, CPU, reports.append)
    assert [each.index for each in reports] == list(range(8)) and not any(each.resumed for each in reports)
    assert all(0 < each.errors["eight"] < each.errors["four"] < 0.05 for each in reports)

    for last in sorted(random.sample(range(8), 5)):
        before = len(list((killed / "eight").glob("layer-*")))

        def stop(done: LayerDone, last: int = last, before: int = before) -> None:
            assert done.resumed == (done.index < before)
            if done.index == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize_layers(seeded(), texts(), branches, killed, CPU, stop)
    (layer_file(killed / "eight", 2)).unlink(missing_ok=True)  # as if the kill came between two files of one layer
    again: list[LayerDone] = []
    quantize_layers(seeded(), texts(), branches, killed, CPU, again.append)
    assert not again[2].resumed and again[0].resumed
    assert [each.errors for each in again] == [each.errors for each in reports]
    for branch in branches:
        for index in range(8):
            assert layer_file(killed / branch, index).read_bytes() == layer_file(undisturbed / branch, index).read_bytes()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "gpt2"])
def test_the_output_layer_is_packed_from_what_the_model_sends_into_it(kind: str, tmp_path: Path) -> None:
    def made(work: Path) -> list[LayerDone]:
        work.mkdir(exist_ok=True)
        reports: list[LayerDone] = []
        quantize_layers(tiny.dense_model(kind), texts(), {"four": FOUR}, work, CPU, reports.append, {"four": head})
        return reports

    head = QuantizeConfig(8, 32, desc_act=True, damp_percent=0.1)
    reports = made(tmp_path / "one")
    assert [(each.index, each.count, bool(each.name)) for each in reports] == [(0, 3, False), (1, 3, False), (2, 3, True)]
    assert 0 < reports[2].errors["four"] < 1e-3 and all(each.resumed for each in made(tmp_path / "one"))

    model = tiny.dense_model(kind)
    received: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor(texts()))
    x = torch.cat([each.reshape(-1, each.shape[-1]) for each in received]).float()
    weight = model.get_output_embeddings().weight.detach().T
    own = gptq_solver.solve([weight], x.T @ x, [head])[0][0]
    tensors = load_file(layer_file(tmp_path / "one" / "four", 2))
    found = dense(tensors, reports[2].name, 8)
    wanted = bit_packing.dequantize(own.qweight, own.qzeros, own.scales, own.g_idx, 8)
    assert ((found - wanted).abs() < 1e-6).float().mean() > 0.97  # sums in another order: a rounding may tip over


def test_the_error_of_a_layer_is_that_of_its_outputs(tmp_path: Path) -> None:
    model = tiny.dense_model("llama")
    inputs: dict[str, list[torch.Tensor]] = {}
    down = "model.layers.1.mlp.down_proj"
    hook = model.get_submodule(down).register_forward_pre_hook(lambda module, args: inputs.setdefault(down, []).append(args[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor(texts()))
    hook.remove()
    x = torch.cat([each.reshape(-1, each.shape[-1]) for each in inputs[down]]).double()
    weight = model.get_submodule(down).weight.detach().T.contiguous()
    packed = gptq_solver.solve([weight], (x.T @ x).float(), [FOUR])[0][0]
    wrong = bit_packing.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx, 4).double() - weight.double()
    expected = float((x @ wrong).square().sum() / (x @ weight.double()).square().sum())
    assert output_error(weight, (x.T @ x).float(), packed, FOUR) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_where_the_group_size_does_not_divide_the_last_group_is_short(act_order: bool, tmp_path: Path) -> None:
    """As gptqmodel 7.6.0 writes it: 96 inputs in groups of 64 are one of 64 and one of 32."""
    quantize_layers(tiny.dense_model("llama"), texts(), {"g": QuantizeConfig(4, 64, act_order)}, tmp_path, CPU)
    found = layers(tmp_path / "g")
    groups = found["model.layers.0.mlp.down_proj.g_idx"]
    assert groups.bincount().tolist() == [64, 32] and bit_packing.g_idx_is_sorted(groups) != act_order
    assert found["model.layers.0.mlp.down_proj.scales"].shape[0] == found["model.layers.0.mlp.down_proj.qzeros"].shape[0] == 2


def test_texts_of_several_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="several lengths"):
        quantize_layers(tiny.dense_model("llama"), [[1, 2], [3]], {"four": FOUR}, tmp_path, CPU)


def runs_twice() -> Any:
    model = tiny.dense_model("llama")
    once = model.model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        return once(inputs_embeds=once(*args, **kwargs).last_hidden_state, use_cache=False)

    model.model.forward = twice
    return model


class Doubled(torch.nn.ModuleList):
    def __getitem__(self, at: Any) -> Any:
        return [each for each in self for _ in range(2)] if isinstance(at, slice) else super().__getitem__(at)


class Backwards(torch.nn.ModuleList):
    def __getitem__(self, at: Any) -> Any:
        return list(self)[::-1] if isinstance(at, slice) else super().__getitem__(at)


def runs_each_layer_twice() -> Any:
    model = tiny.dense_model("llama")
    model.model.layers.__class__ = Doubled  # the model runs a slice of them
    return model


def runs_backwards() -> Any:
    model = tiny.dense_model("llama")
    model.model.layers.__class__ = Backwards
    return model


@pytest.mark.parametrize("make", [runs_twice, runs_each_layer_twice, runs_backwards])
def test_a_model_whose_layers_run_in_another_order_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"one after the other; it cannot be quantised layer by layer\. Choose another"):
        quantize_layers(make(), texts(2), {"four": FOUR}, tmp_path, CPU)
    assert not list(tmp_path.rglob("layer-*"))


@pytest.mark.skipif("hrm_text" not in KINDS, reason="this transformers does not know HRM")
def test_hrm_whose_layers_run_in_cycles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="one after the other"):
        quantize_layers(tiny_model("hrm_text"), texts(2), {"four": FOUR}, tmp_path, CPU)
    assert not list(tmp_path.rglob("layer-*"))


def test_an_output_layer_inside_the_base_model_makes_no_logits() -> None:
    """Llama 4's base model is the whole model, and its output layer stays in 16 bits while the rest is run in fp32."""
    model = tiny_model("llama4_text").half()
    assert model.base_model is model
    with torch.inference_mode():
        hidden, calls = first_inputs(model, *decoder_layers(model), texts(2))
    assert [each.shape for each in hidden] == [(2, 32, 64)] and len(calls[2]) == 4
    assert "forward" not in vars(model.get_output_embeddings()) and "forward" not in vars(decoder_layers(model)[1][0])


@pytest.mark.parametrize("before", ["highest", "medium"])
@pytest.mark.parametrize("ended_by", [None, LoadFailed("x"), LoadCancelled("x"), KeyboardInterrupt()])
def test_tensor_cores_multiply_only_where_nothing_else_computes(before: str, ended_by: BaseException | None) -> None:
    usual = torch.get_float32_matmul_precision()
    gpu, heard = torch.device("cuda"), []
    try:
        torch.set_float32_matmul_precision(before)
        for device, alone in ((gpu, True), (gpu, False), (CPU, True)):
            ends = contextlib.suppress(LoadFailed, LoadCancelled, KeyboardInterrupt)
            with ends, layerwise_quantize._fast_products(device, alone):
                heard.append(torch.get_float32_matmul_precision())
                if ended_by is not None:
                    raise ended_by
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(usual)
    assert heard == ["high", before, before]


@pytest.mark.parametrize("alone", [None, True])
def test_a_run_says_of_every_layer_whether_it_is_alone(
    alone: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, heard = layerwise_quantize._fast_products, []

    def noted(device: torch.device, alone: bool) -> Any:
        heard.append(alone)
        return real(device, alone)

    monkeypatch.setattr(layerwise_quantize, "_fast_products", noted)
    more = {} if alone is None else {"alone": alone}
    quantize_layers(tiny.dense_model("llama"), texts(2), {"four": FOUR}, tmp_path, CPU, **more)
    assert heard == [bool(alone)] * 2


def test_a_command_has_the_process_to_itself_and_the_page_shares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, heard = layerwise_quantize.quantize_layers, []

    def noted(*given: Any) -> None:
        heard.append(given[-1])
        real(*given)

    monkeypatch.setattr(layerwise_quantize, "quantize_layers", noted)
    tiny.dense_model("llama").half().save_pretrained(tmp_path / "tiny-16")
    tiny.write_tokenizer(tmp_path / "tiny-16", CHATML)
    typed = ("quantize", tmp_path / "tiny-16", "--seq-len", 16, "--samples", 20, "--group-size", 32, "--models-dir", tmp_path)
    assert main([str(each) for each in typed]) == 0
    job = quantize_job.QuantizeJob(LocalModel.read(tmp_path / "tiny-16"), tmp_path / "page", [FOUR], sample_tokens=16, samples=20)
    quantize_job.run(job, lambda done: None, lambda text: None)  # as the page calls it
    assert heard == [True, False]
