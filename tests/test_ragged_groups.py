"""Groups of 128 over 192 and 320 inputs (the last is shorter), layers left in 16 bits and a packed output layer, together: made,
written anew, merged, measured and killed, as models without these are."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import TEXT, WINDOW, log_probabilities
from test_lora import write_adapter

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import bit_packing, checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.loaders.text.built_in_templates import CHATML

ROOT = Path(__file__).resolve().parents[1]
HOW = ("--group-size", "128", "--seq-len", "32", "--samples", "40")
MIXED = ("--leave", r"layers\.1\.self_attn", "--leave", "layers.0.mlp.down_proj", "--lm-head")
LEFT = {"model.layers.0.mlp.down_proj", *(f"model.layers.1.self_attn.{each}_proj" for each in "qkvo")}


def source_folder(folder: Path, layers: int = 2) -> Path:
    """A 16-bit Llama 192 wide, whose feed-forward layers are 320 wide."""
    changes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": layers}
    config = tiny.dense_model("llama").config.__class__(**{**tiny.ARCHITECTURES["llama"], **changes})
    torch.manual_seed(0)
    tiny.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    return folder


def run(capsys: Any, command: str, models: Path, *arguments: object) -> str:
    code = main([str(each) for each in (command, *arguments, "--models-dir", models)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return str(captured.out.strip())


@pytest.fixture
def models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """`source`, and `mixed` made of it."""
    source_folder(tmp_path / "models" / "source")
    made = run(capsys, "quantize", tmp_path / "models", tmp_path / "models" / "source", *HOW, *MIXED)
    Path(made).rename(tmp_path / "models" / "mixed")
    return tmp_path / "models"


def loaded(folder: Path) -> Any:
    model, notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    assert not notes
    return model


def of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(4, 40)[None]).logits


def logits(folder: Path) -> torch.Tensor:
    return of(loaded(folder))


def packed_bits(folder: Path) -> dict[str, int]:
    return {name: each.bits for name, each in loaded(folder).named_modules() if isinstance(each, GPTQLinear)}


def twin(models: Path) -> Any:
    """`source` with the numbers of `mixed` multiplied out from its file alone."""
    model, tensors = loaded(models / "source"), load_file(models / "mixed" / "model.safetensors")
    for name in {each.removesuffix(".qweight") for each in tensors if each.endswith(".qweight")}:
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        inputs, bits = len(parts[3]), 8 if name == "lm_head" else 4
        assert parts[3].bincount().tolist() == [128] * (inputs // 128) + [inputs % 128]
        model.get_submodule(name).weight.data = bit_packing.dequantize(*parts, bits).T.float().contiguous()
    return model


def expected_bits() -> dict[str, int]:
    names = {f"model.layers.{at}.self_attn.{each}_proj" for at in range(2) for each in "qkvo"}
    names |= {f"model.layers.{at}.mlp.{each}_proj" for at in range(2) for each in ("gate", "up", "down")}
    return dict.fromkeys(names - LEFT, 4) | {"lm_head": 8}


def test_made_and_read(models: Path) -> None:
    assert packed_bits(models / "mixed") == expected_bits()
    expected = of(twin(models))
    assert (logits(models / "mixed") - expected).abs().max() < 1e-4 * expected.abs().max()
    original = logits(models / "source")
    assert 0 < (expected - original).norm() < 0.2 * original.norm()


def test_export_in_16_bits(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = Path(run(capsys, "export", models, "mixed"))
    assert LocalModel.read(written).kind == "plain"
    expected = of(twin(models))
    assert (logits(written) - expected).abs().max() < 2e-3 * expected.abs().max()
    tensors, source = (load_file(folder / "model.safetensors") for folder in (written, models / "source"))
    assert all(torch.equal(tensors[f"{name}.weight"], source[f"{name}.weight"]) for name in LEFT)


def test_export_as_plain_gptq(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = Path(run(capsys, "export", models, "mixed", "--as", "gptq", "--format", "gptq_v2"))
    assert torch.equal(logits(written), logits(models / "mixed"))
    assert packed_bits(written) == expected_bits()
    settings = json.loads((written / "quantize_config.json").read_text())
    assert settings["checkpoint_format"] == "gptq_v2" and settings["group_size"] == 128 and settings["lm_head"] is True
    assert settings["dynamic"] == {f"-:{re.escape(name)}$": {} for name in LEFT} | {"lm_head": {"bits": 8}}


def test_an_adapter_is_merged_and_what_was_packed_is_packed_again(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = twin(models)
    for name, product in write_adapter(models / "pirate", merged, ("q_proj", "down_proj"), size=0.1).items():
        merged.get_submodule(name).weight.data += 2.0 * product
    text = models / "text.txt"
    text.write_text("".join(chr(33 + at * 7 % 90) for at in range(4000)))
    how = ("--adapter", models / "pirate", "--dataset", text, "--seq-len", 32, "--samples", 40)
    written = Path(run(capsys, "export", models, "mixed", "--as", "gptq", *how))
    assert packed_bits(written) == expected_bits()
    expected, plain = of(merged), logits(models / "mixed")
    error = (logits(written) - expected).norm() / expected.norm()
    assert error < 0.1 and (plain - expected).norm() / expected.norm() > 3 * error
    tensors = load_file(written / "model.safetensors")
    for name in LEFT:
        assert (tensors[f"{name}.weight"].float() - merged.get_submodule(name).weight).abs().max() < 1e-3


def test_evaluate_agrees_with_an_independent_computation(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    (models.parent / "text.txt").write_text(TEXT)
    how = ("--text", models.parent / "text.txt", "--window", WINDOW, "--json")
    found = json.loads(run(capsys, "evaluate", models, "mixed", "--against", "source", *how))
    tokenizer = AutoTokenizer.from_pretrained(models / "mixed")
    ids, room = tokenizer(TEXT, add_special_tokens=False)["input_ids"], WINDOW - 1
    windows = [[tokenizer.bos_token_id, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)]
    twin(models).save_pretrained(models / "twin")
    q, p = log_probabilities(models / "twin", windows), log_probabilities(models / "source", windows)
    chosen = [q[w, t - 1, windows[w][t]] for w in range(len(windows)) for t in range(1, WINDOW)]
    assert found["tokens"] == len(chosen)
    assert found["perplexity"] == pytest.approx(float(np.exp(-np.mean(chosen))), rel=1e-4)
    assert found["difference"]["kl"] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=2e-3)


_KILLED_AFTER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import script
script.register()
from gptq_webui.gptq import layerwise_quantize
real, left = layerwise_quantize._save, [{files}]
def save(*arguments, **named):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
layerwise_quantize._save = save
from gptq_webui.app.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_at_five_random_layers_the_result_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    source = source_folder(models / "source", layers=8)
    arguments = ["quantize", str(source), *HOW, *MIXED, "--models-dir", str(models)]
    undisturbed = Path(run(capsys, "quantize", models, source, *HOW, *MIXED, "--output", tmp_path / "undisturbed"))
    before = 0
    for last in sorted(random.sample(range(8), 5)):  # each process writes the layers up to this one, and dies in the next
        code = _KILLED_AFTER.format(root=str(ROOT), files=last - before)
        command = [sys.executable, "-c", code, *arguments, "--output", str(tmp_path / "killed")]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ), check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stdout.decode()[-2000:]
        before = last
    again = Path(run(capsys, "quantize", models, source, *HOW, *MIXED, "--output", tmp_path / "killed"))
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (again / name).read_bytes() == (undisturbed / name).read_bytes()
