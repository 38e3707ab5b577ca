"""`gptq-webui export`: what is written computes what the original computed, and other programs can open it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lora import write_adapter
from test_neighbours import as_awq, as_compressed, awq, compressed, write_planar
from test_neighbours import write as write_neighbour

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint


def run(capsys: Any, models: Path, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in ("export", *arguments, "--models-dir", models)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out.strip(), captured.err


def logits(folder: Path) -> torch.Tensor:
    model, notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    assert all("token" in each for each in notes)  # tiny GPT-2's ids
    return of(model)


def of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40)[None]).logits


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_16_bits_are_the_packed_weights_multiplied_out(kind, tmp_path, capsys):
    tiny.write(tmp_path / "packed", kind)
    tiny.write_tokenizer(tmp_path / "packed")
    code, out, err = run(capsys, tmp_path, "packed")
    assert code == 0, err
    written = LocalModel.read(Path(out))
    assert written.kind == "plain" and Path(out).name == "packed-16bit" and (written.folder / "tokenizer.json").is_file()
    expected = logits(tmp_path / "packed")
    assert (logits(written.folder) - expected).abs().max() < 2e-3 * expected.abs().max()
    code, _out, err = run(capsys, tmp_path, "packed")
    assert code != 0 and "is there already" in err


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_is_written_as_files_name_its_experts(kind, tmp_path, capsys, monkeypatch):
    small = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "decoder_sparse_step": 1}
    monkeypatch.setitem(tiny.ARCHITECTURES, "qwen3_moe", {**tiny.ARCHITECTURES["llama"], **small})
    tiny.write(tmp_path / "packed", kind)
    tiny.write_tokenizer(tmp_path / "packed")
    expected = logits(tmp_path / "packed")
    expert = "block_sparse_moe.experts.3.w2" if kind == "mixtral" else "mlp.experts.3.down_proj"

    code, out, err = run(capsys, tmp_path, "packed")
    assert code == 0, err
    names = load_file(Path(out) / "model.safetensors")
    assert f"model.layers.1.{expert}.weight" in names
    assert f"model.layers.1.{expert.partition('.')[0]}.gate.weight" in names
    assert (logits(Path(out)) - expected).abs().max() < 2e-3 * expected.abs().max()

    code, out, err = run(capsys, tmp_path, "packed", "--as", "gptq", "--format", "gptq_v2")
    assert code == 0, err
    assert f"model.layers.1.{expert}.qweight" in load_file(Path(out) / "model.safetensors")
    assert torch.equal(logits(Path(out)), expected)
    settings = json.loads((Path(out) / "config.json").read_text())["quantization_config"]
    assert [expert] in settings["modules_in_block_to_quantize"] and settings["checkpoint_format"] == "gptq_v2"


def test_an_adapter_is_merged(tmp_path, capsys):
    twin = tiny.write(tmp_path / "packed")
    for name, product in write_adapter(tmp_path / "pirate", twin, ("q_proj", "down_proj")).items():
        twin.get_submodule(name).weight.data += 2.0 * product
    code, out, err = run(capsys, tmp_path, "packed", "--adapter", tmp_path / "pirate")
    assert code == 0 and Path(out).name == "packed-pirate-16bit", err
    expected = of(twin)
    assert (logits(Path(out)) - expected).abs().max() < 2e-3 * expected.abs().max()
    code, _out, err = run(capsys, tmp_path, "packed", "--adapter", tmp_path / "packed", "--output", tmp_path / "other")
    assert code != 0 and "is not a LoRA adapter" in err and not list(tmp_path.glob("*other*"))


@pytest.mark.parametrize(
    ("form", "settings", "options", "summary"),
    [
        (as_awq, awq(), {"sym": False}, "4-bit, group 16"),
        (as_compressed, compressed(4, 16, True, "group"), {"act_order": True}, "4-bit, group 16, act-order"),
        (as_compressed, compressed(8, -1), {"bits": 8, "group": -1}, "8-bit, no group"),
    ],
)
def test_neighbours_become_plain_gptq_without_a_changed_number(form, settings, options, summary, tmp_path, capsys):
    write_neighbour(tmp_path / "other", form, settings, **options)
    code, out, err = run(capsys, tmp_path, "other", "--as", "gptq")
    assert code == 0, err
    written = LocalModel.read(Path(out))
    assert written.kind == "gptq" and written.quantize is not None
    assert written.quantize.summary.startswith(summary) and not written.quantize.notes
    assert written.quantize.sym == options.get("sym", True)
    assert torch.equal(logits(written.folder), logits(tmp_path / "other"))
    config = json.loads((written.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("bits", "options", "summary"),
    [
        (3, {}, "3-bit, group 16"),
        (3, {"sym": False}, "3-bit, group 16, asymmetric"),
        (5, {"act_order": True}, "8-bit, group 16, act-order"),
        (7, {"sym": False}, "8-bit, group 16"),
        (4, {"other": 6}, "8-bit, group 16"),
    ],
)
def test_planar_weights_become_plain_gptq_without_a_changed_number(bits, options, summary, tmp_path, capsys):
    write_planar(tmp_path / "other", bits, **options)
    code, out, err = run(capsys, tmp_path, "other", "--as", "gptq")
    assert code == 0, err
    written = LocalModel.read(Path(out))
    assert written.kind == "gptq" and written.quantize is not None
    assert written.quantize.summary == summary and not written.quantize.notes
    assert torch.equal(logits(written.folder), logits(tmp_path / "other"))


def test_zeros_are_stored_as_most_programs_read_them_or_as_asked(tmp_path, capsys):
    write_planar(tmp_path / "even", 3)
    write_planar(tmp_path / "odd", 3, sym=False)  # a zero of 0 is among them
    for name, arguments, expected in (("even", [], "gptq"), ("odd", [], "gptq_v2"), ("even", ["--format", "gptq_v2"], "gptq_v2")):
        output = tmp_path / f"{name}-{expected}"
        code, out, err = run(capsys, tmp_path, name, "--as", "gptq", "--output", output, *arguments)
        assert code == 0, err
        written = LocalModel.read(Path(out))
        assert written.quantize is not None and written.quantize.checkpoint_format == expected and not written.quantize.notes
        assert torch.equal(logits(written.folder), logits(tmp_path / name))


def test_an_adapter_is_merged_and_quantised_again(tmp_path, capsys):
    twin = tiny.write(tmp_path / "packed", bits=8, group_size=32)
    tiny.write_tokenizer(tmp_path / "packed")
    for name, product in write_adapter(tmp_path / "pirate", twin, ("q_proj", "down_proj")).items():
        twin.get_submodule(name).weight.data += 2.0 * product
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + at * 7 % 90) for at in range(4000)))
    arguments = ["--as", "gptq", "--adapter", tmp_path / "pirate", "--dataset", text, "--seq-len", 64, "--samples", 16]
    code, out, err = run(capsys, tmp_path, "packed", *arguments)
    assert code == 0 and Path(out).name == "packed-pirate-GPTQ" and "Layer 2 of 2" in err, err
    written = LocalModel.read(Path(out))
    assert written.quantize is not None and written.quantize.summary == "8-bit, group 32, act-order"
    expected, plain = of(twin), logits(tmp_path / "packed")
    error = (logits(written.folder) - expected).norm() / expected.norm()
    assert error < 0.02 and (plain - expected).norm() / expected.norm() > 10 * error
    assert not list(tmp_path.glob(".gptq-webui-*"))  # what was only needed meanwhile


def test_what_cannot_be_written_is_refused_in_words(tmp_path, capsys):
    tiny.write(tmp_path / "experts", "mixtral")
    code, out, err = run(capsys, tmp_path, "experts")
    if code == 0:  # transformers 4 keeps experts as single layers
        expected = logits(tmp_path / "experts")
        assert (logits(Path(out)) - expected).abs().max() < 2e-3 * expected.abs().max()
    else:
        assert "experts" in err and not list(tmp_path.glob("*16bit*"))
    tiny.dense_model("llama").half().save_pretrained(tmp_path / "plain")
    for arguments in (["plain"], ["plain", "--as", "gptq"]):
        code, _out, err = run(capsys, tmp_path, *arguments)
        assert code != 0 and "gptq-webui quantize" in err
    code, _out, err = run(capsys, tmp_path, "none")
    assert code != 0 and "none" in err
