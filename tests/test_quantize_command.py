"""`gptq-webui quantize` as a user types it, on tiny 16-bit models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.models import MARKER, LocalModel
from gptq_webui.engine import quantize_job
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.loaders.text import chat_template
from gptq_webui.loaders.text.built_in_templates import CHATML

FOUR, EIGHT = "gptq-4bit-32g-actorder_True", "gptq-8bit--1g-actorder_False"
SMALL = ("--seq-len", "16", "--samples", "20")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny-16"
    tiny.dense_model("llama").half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\nwidget: []\n---\n# Tiny\n")
    return folder


def run(capsys: Any, source: object, *arguments: object) -> tuple[int, str, str]:
    folder = str(Path(str(source)).parent if isinstance(source, Path) else source)
    code = main([str(each) for each in ("quantize", source, *SMALL, *arguments, "--models-dir", folder)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def logits(folder: Path) -> torch.Tensor:
    model, notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    assert not notes
    with torch.inference_mode():
        return model(input_ids=torch.arange(4, 40)[None]).logits


def test_two_branches_in_one_pass(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, source, "--branches", f"{FOUR},{EIGHT}")
    assert code == 0, err
    four, eight = (source.parent / f"tiny-16-GPTQ_{name}" for name in (FOUR, EIGHT))
    assert out.splitlines() == [str(four), str(eight)]
    assert f"Layer 1 of 2: error {FOUR} " in err and "20 of 20 samples of 16 tokens" in err and " left" in err
    assert not list(source.parent.glob(".gptq-webui-quantize-*"))

    expected = logits(source)
    assert (logits(eight) - expected).abs().max() < 0.05 * expected.abs().max()
    assert (logits(four) - expected).abs().mean() < 0.2 * expected.abs().mean()
    read = LocalModel.read(four)
    assert read.quantize is not None and read.quantize.summary == "4-bit, group 32, act-order" and not read.quantize.notes
    assert (four / MARKER).is_file() and (four / "tokenizer.json").is_file()

    config = json.loads((four / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq" and config["torch_dtype"] == "float16"
    assert "rope_theta" in json.dumps(config) and config["architectures"] == ["LlamaForCausalLM"]
    settings = json.loads((four / "quantize_config.json").read_text())
    assert settings["model_file_base_name"] == "model" and settings["damp_percent"] == 0.1
    for key in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
        assert settings[key] == config["quantization_config"][key]
    readme = (eight / "README.md").read_text()
    assert readme.startswith("---\nlicense: mit\nlanguage: en\nlibrary_name: transformers\n")
    assert f"| {FOUR} | 4 | 32 | Yes | 0.1 |" in readme and f"| {EIGHT} | 8 | None | No |" in readme and "widget" not in readme


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_layer_by_option(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models" / "head"
    model = tiny.dense_model("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    code, out, err = run(capsys, folder, "--branches", f"{FOUR},{EIGHT}", "--lm-head")
    assert code == 0, err
    four, eight = (Path(line) for line in out.splitlines())
    assert "Layer 3 of 3 (lm_head): error " in err and ("there a second time" in err) == tied
    assert "Stay in 16 bits" in err and "lm_head" not in err.partition("Stay in 16 bits")[2].splitlines()[0]
    settings = [json.loads((each / "config.json").read_text()) for each in (four, eight)]
    assert [each["quantization_config"]["lm_head"] for each in settings] == [True, True]
    assert [each["quantization_config"].get("dynamic") for each in settings] == [{"lm_head": {"bits": 8}}, None]
    assert not settings[0]["tie_word_embeddings"] and "lm_head" in (four / "README.md").read_text()

    read = LocalModel.read(four)
    assert read.quantize is not None and read.quantize.summary == "4- and 8-bit, group 32, act-order" and not read.quantize.notes
    head = checkpoint.load(read, dtype=torch.float32, device_map="cpu")[0].lm_head
    assert isinstance(head, GPTQLinear) and (head.bits, head.group_size) == (8, 32)
    assert (head.dequantize() - model.lm_head.weight.float()).abs().max() < 0.02 * model.lm_head.weight.abs().max()
    expected = logits(folder)
    assert (logits(eight) - expected).abs().max() < 0.05 * expected.abs().max()

    pytest.importorskip("numba")
    from gptq_webui.gptq.cpu.cpu_step import CpuStepper

    loaded, _notes = checkpoint.load(read, dtype=torch.float32, device_map="cpu")
    twin, _notes = checkpoint.load(read, dtype=torch.float32, device_map="cpu")
    stepper, note = stepper_for(loaded, 64)
    assert isinstance(stepper, CpuStepper) and not note
    memory = stepper.begin()
    with torch.inference_mode():
        step = stepper.prefill(memory, list(range(4, 40)))
        assert (step - twin(input_ids=torch.arange(4, 40)[None]).logits[0, -1]).abs().max() < 1e-3
    stepper.close()


def test_a_short_last_group_is_said_and_computed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, source, "--group-size", 64)
    assert code == 0, err
    words = "A group size of 64 does not divide the 96 inputs of model.layers.0.mlp.down_proj and 1 other layer: the last group"
    made = Path(out.strip())
    assert words in err and "vLLM does not (it opens one of group size 32)." in err and words in (made / "README.md").read_text()
    read = LocalModel.read(made)
    assert read.quantize is not None and read.quantize.summary == "4-bit, group 64, act-order" and not read.quantize.notes
    (twin, _), (loaded, _) = (checkpoint.load(read, dtype=torch.float32, device_map="cpu") for _ in range(2))
    assert (logits(made) - logits(source)).abs().mean() < 0.2 * logits(source).abs().mean()
    stepper, _note = stepper_for(loaded, 64)
    with torch.inference_mode():
        found = stepper.prefill(stepper.begin(), list(range(4, 40)))
        expected = twin(input_ids=torch.arange(4, 40)[None]).logits[0, -1]
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    stepper.close()


def test_layers_stay_in_16_bits_by_option(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, source, "--branches", FOUR, "--leave", "down_proj", "--leave", r"layers\.1\.self_attn")
    assert code == 0, err
    line = next(each for each in err.splitlines() if each.startswith("Stay in 16 bits"))
    assert "model.layers.mlp.down_proj" in line and "model.layers.self_attn.q_proj" in line
    made = Path(out.strip())
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    in_file = json.loads((made / "quantize_config.json").read_text())
    assert in_file == in_file | settings
    assert settings["dynamic"] == {"-:.*(?:down_proj)": {}, r"-:.*(?:layers\.1\.self_attn)": {}}
    packed = [f"model.layers.0.self_attn.{each}_proj" for each in "kqvo"]
    packed += [f"model.layers.{at}.mlp.{each}_proj" for at in (0, 1) for each in ("gate", "up")]
    assert sorted(each for (each,) in settings["modules_in_block_to_quantize"]) == sorted(packed), "whole names: they differ"
    assert "`down_proj`" in (made / "README.md").read_text()

    loaded, notes = checkpoint.load(LocalModel.read(made), dtype=torch.float32, device_map="cpu")
    original, _notes = checkpoint.load(LocalModel.read(source), dtype=torch.float32, device_map="cpu")
    assert not notes and sorted(name for name, each in loaded.named_modules() if isinstance(each, GPTQLinear)) == sorted(packed)
    left = "model.layers.1.self_attn.o_proj"
    assert torch.equal(loaded.get_submodule(left).weight, original.get_submodule(left).weight)
    code, again, err = run(capsys, source, "--branches", FOUR, "--leave", "down_proj", "--output", source.parent / "other")
    settings = json.loads((Path(again.strip()) / "quantize_config.json").read_text())
    names = [*(f"self_attn.{each}_proj" for each in "kqvo"), "mlp.gate_proj", "mlp.up_proj"]
    assert code == 0 and settings["modules_in_block_to_quantize"] == [[each] for each in sorted(names)], err
    assert LocalModel.read(Path(again.strip())).quantize == LocalModel.read(made).quantize


def test_an_output_layer_that_cannot_be_packed_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "odd"
    config = {**tiny.ARCHITECTURES["llama"], "vocab_size": 290}
    tiny.AutoModelForCausalLM.from_config(tiny.dense_model("llama").config.__class__(**config)).half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    code, _out, err = run(capsys, folder, "--group-size", 32, "--lm-head", 4)
    assert code == 2 and "The output layer is 64×290; only multiples of 32" in err and "Layer 1" not in err


def test_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models" / "mixed"
    tiny.dense_model("mixtral").half().save_pretrained(folder)
    tiny.write_tokenizer(folder, CHATML)
    code, out, err = run(capsys, folder, "--branches", f"{FOUR},{EIGHT}", "--samples", 2)
    assert code == 0, err
    four, eight = (Path(line) for line in out.splitlines())
    assert "Stay in 16 bits (" in err and "lm_head." in err
    assert "Layer 1: the router sends few tokens to " in err and ".experts." in err
    expected = logits(folder)
    assert (logits(eight) - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert (logits(four) - expected).abs().mean() < 0.2 * expected.abs().mean()
    settings = json.loads((four / "config.json").read_text())["quantization_config"]
    inside = settings["modules_in_block_to_quantize"]
    assert ["block_sparse_moe.experts.3.w2"] in inside and len(inside) == 4 + 4 * 3
    assert LocalModel.read(four).quantize is not None and not LocalModel.read(four).problem


def test_stopped_and_typed_again_it_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, source, "--group-size", 32, "--output", tmp_path / "undisturbed")
    real = quantize_job._publish

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_job, "_publish", stop)
    code, _, err = run(capsys, source, "--group-size", 32, "--output", tmp_path / "out")
    assert code == 130 and "the same command continues" in err
    monkeypatch.setattr(quantize_job, "_publish", real)
    code, _, err = run(capsys, source, "--group-size", 32, "--output", tmp_path / "out")
    assert code == 0 and err.count("made by an earlier run") == 2
    name = f"tiny-16-GPTQ_{FOUR}/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()

    code, _, err = run(capsys, source, "--group-size", 32, "--output", tmp_path / "out")
    assert code == 0 and "there already" in err
    code, _, err = run(capsys, source, "--group-size", 32, "--damp", 0.2, "--output", tmp_path / "out")
    assert code == 2 and "made from another model, text or settings" in err


def test_text_of_the_user(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = [{"text": "Rain falls on the old harbour."}, {"messages": [{"role": "user", "content": "What is rain?"}]}]
    chats.write_text("\n".join(json.dumps(each) for each in lines) + "\n")
    code, out, err = run(capsys, source, "--group-size", 32, "--dataset", chats)
    assert code == 0, err
    assert "Calibration: chats.jsonl, " in err
    assert "| chats.jsonl | 16 |" in (Path(out.strip()) / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--dataset", "nowhere.txt"), "There is no file nowhere.txt"),
        (("--group-size", "31"), "A group size of 31 is not possible"),
        (
            ("--leave", "exprts"),
            "No layer that is packed has 'exprts' in its name. Write a part of such names: model.layers.0.self_attn.q_proj,",
        ),
        (("--leave", "down_proj("), "'down_proj(' is no regular expression: "),
        (("--leave", "self_attn", "--leave", "mlp"), "Every layer would stay in 16 bits"),
        (("--branches", "main"), "'main' is not the name of a branch"),
        (("--seq-len", "300"), "longer than the 256 tokens"),
        (("--samples", "0"), "must be 1 or more"),
    ),
)
def test_what_cannot_be_is_said_before(
    arguments: tuple[str, ...], words: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, source, *arguments)
    assert code == 2 and words in err and not out
    assert not list(source.parent.glob("tiny-16-GPTQ*"))


def test_short_and_damaged_texts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    for line, words in (
        ('{"text": "short"}', "one sample needs 16"),
        ("{", "Line 1 of text.jsonl is not JSON"),
        ('{"prompt": "x"}', "neither text nor messages"),
    ):
        text.write_text(line)
        code, _, err = run(capsys, source, "--dataset", text)
        assert code == 2 and words in err


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_holds_up_no_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "chat_template.jinja").write_text("{% if messages[0].content | length > 30 %}" + LOOP + "{% endif %}" + CHATML)
    code, _out, err = run(capsys, source, "--group-size", 32)
    assert code == 0 and "Python's manual" in err, err
    (source / "chat_template.jinja").write_text("{% if 'boom' in messages[0].content %}" + LOOP + "{% endif %}" + CHATML)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "boom"}]}))
    code, _, err = run(capsys, source, "--dataset", text)
    assert code == 2 and "Line 1 of text.jsonl: the model's chat template cannot show these messages (it took too long)" in err


def test_messages_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny.write_tokenizer(tmp_path, CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = chat_template.find(tmp_path, tokenizer, "")
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}]
    try:
        assert template.whole(messages, tokenizer) == tokenizer.apply_chat_template(messages, tokenize=False)
    finally:
        template.close()


def test_a_gptq_model_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write(source.parent / "packed")
    code, _, err = run(capsys, source.parent / "packed")
    assert code == 1 and "packed is GPTQ 4-bit" in err and "not a 16-bit model" in err


def test_a_repository_is_downloaded(source: Path, tmp_path: Path, hub_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    hub_server.add("someone/tiny", files)
    (tmp_path / "models2").mkdir()
    code = main(["quantize", "someone/tiny", *SMALL, "--group-size", "32", "--models-dir", str(tmp_path / "models2")])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert Path(captured.out.strip()).name == f"someone_tiny-GPTQ_{FOUR}"
