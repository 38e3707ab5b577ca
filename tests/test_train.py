"""`gptq-webui train`: conversations become token ids, packed layers pass gradients on, a killed run goes on, the demo learns.

PEFT trains; without it, the tests of training are skipped.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.errors import BadParameter, LoadRefused
from gptq_webui.core.models import LocalModel
from gptq_webui.engine import train_job
from gptq_webui.engine.train_job import TrainJob
from gptq_webui.engine.training_data import read_examples
from gptq_webui.gptq import checkpoint, lora
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.training_recipe import Recipe
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.text.tokenizer import read_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}] * 2


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    tiny.write(tmp_path / "packed")
    tiny.write_tokenizer(tmp_path / "packed", CHATML)
    return LocalModel.read(tmp_path / "packed")


def examples(model: LocalModel, file: Path, length: int = 200) -> tuple[list[tuple[str, str]], list[str]]:
    """((whole text, learned text) of each, what was said)."""
    tokenizer, said = read_tokenizer(model), []
    found = read_examples(file, model, tokenizer, length, said.append)
    texts = [
        (
            tokenizer.decode(each.ids),
            tokenizer.decode([id for id, learned in zip(each.ids, each.learned, strict=True) if learned]),
        )
        for each in found
    ]
    return texts, said


@pytest.mark.parametrize("name", ["../out", "a/b", "/tmp/x", "..", ".hidden", "a\\b", "a\x1b[2J", "x" * 97])
def test_an_adapter_goes_beside_the_model_and_nowhere_else(model: LocalModel, name: str) -> None:
    with pytest.raises(BadParameter, match="cannot be an adapter's name"):
        train_job.folder_for(model, name, Path("data.jsonl"))
    assert train_job.folder_for(model, " pirate ", Path("data.jsonl")) == model.folder.parent / "pirate"
    assert train_job.folder_for(model, "", Path("data.jsonl")) == model.folder.parent / "packed-data"


# --- texts -----------------------------------------------------------------------------------------


def test_only_answers_are_learned(model: LocalModel, tmp_path: Path) -> None:
    entries = [
        {"messages": CHAT},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Do", "input": "it", "output": "Done"},
        {"prompt": "P", "completion": "C"},
        {"text": "plain"},
    ]
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, entries)) + "\n"), ("a.json", json.dumps(entries))):
        (tmp_path / name).write_text(text)
        texts, said = examples(model, tmp_path / name)
        assert [learned for _whole, learned in texts] == [
            "Oh<|im_end|>\nOh<|im_end|>\n", "A<|im_end|>\n", "Done<|im_end|>\n", "C<|im_end|>\n", "<s>plain</s>",
        ]  # fmt: skip
        assert "user\nDo\n\nit<|im_end|>" in texts[2][0] and "system\nS<|im_end|>" in texts[1][0]
        assert "5 texts" in said[-1]


def test_a_template_that_forgets_earlier_answers_makes_a_text_for_each(model: LocalModel, tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else '…' }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tiny.write_tokenizer(model.folder, forgetful)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    texts, _said = examples(model, tmp_path / "a.jsonl")
    assert [learned for _whole, learned in texts] == ["Oh</s>", "Oh</s>"]
    assert texts[1][0].endswith("[assistant]…</s>[user]Hi[assistant]Oh</s>")


def test_long_texts_are_cut_and_what_is_then_empty_is_left_out(model: LocalModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 50)
    texts, _said = examples(model, tmp_path / "a.txt", length=20)
    assert "".join(whole for whole, _learned in texts) == "<s>" + "x" * 50 + "</s>" and len(texts) == 3
    long = [{"role": "user", "content": "q" * 90}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in (long, CHAT)))
    texts, said = examples(model, tmp_path / "a.jsonl", length=60)
    assert len(texts) == 1 and "1 of them left out" in said[0]
    with pytest.raises(BadParameter, match="no answer that fits"):
        examples(model, tmp_path / "a.jsonl", length=10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Line 1 of a.jsonl is not JSON"),
        ('{"other": 1}', "neither messages"),
        ('{"messages": [1]}', "no object"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "not a text of"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
    ],
)
def test_damaged_entries_are_named(model: LocalModel, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(BadParameter, match=says):
        examples(model, tmp_path / "a.jsonl")


def test_a_model_without_a_template_learns_what_its_chat_shows(model: LocalModel, tmp_path: Path) -> None:
    tiny.write_tokenizer(model.folder)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT[:2]}))
    texts, _said = examples(model, tmp_path / "a.jsonl")
    assert "Hi" in texts[0][0] and "Oh" in texts[0][1] and "Hi" not in texts[0][1]


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "sym", "replaced"), [(4, 32, True, False), (3, -1, False, False), (8, 16, False, True)]
)
def test_a_packed_layer_passes_the_gradient_of_its_dense_twin_on(bits, group, sym, replaced) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, dense = tiny.random_layer(64, 96, bits, group, act_order=True, sym=sym, generator=generator)
    layer = GPTQLinear(64, 96, bits, group, bias=False)
    layer.load_state_dict(tensors)
    layer.prepare()
    if replaced:  # by a kernel, as on a processor
        layer.release(lambda x: torch.nn.functional.linear(x, dense.to(x.dtype)))
    for rows in (3, 20):
        x = torch.randn(2, rows, 64, generator=generator, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        weight = torch.randn(2, rows, 96, generator=generator)
        (layer(x) * weight).sum().backward()
        (torch.nn.functional.linear(twin, dense) * weight).sum().backward()
        assert (x.grad - twin.grad).abs().max() < 1e-4 * twin.grad.abs().max()
    assert all(each.grad is None for each in layer.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "sym", "ordered"), [(32, True, False), (48, False, True), (-1, True, True)])
def test_a_compiled_layer_gives_its_weight_and_its_gradient(bits, group, sym, ordered) -> None:
    pytest.importorskip("numba")
    from gptq_webui.gptq.cpu import cpu_kernels
    from gptq_webui.gptq.cpu.cpu_linear import CpuLinear
    from gptq_webui.gptq.cpu.cpu_weights import from_packed
    from gptq_webui.gptq.cpu.thread_team import Team

    generator = torch.Generator().manual_seed(0)
    outputs = {2: 80, 3: 96}.get(bits, 72)  # whole words of zeros; the last tile is half full where it can be
    tensors, dense = tiny.random_layer(160, outputs, bits, group, act_order=True, sym=sym, generator=generator)
    layer = GPTQLinear(160, outputs, bits, group, bias=False)
    layer.load_state_dict(tensors)
    columns, team = torch.randperm(outputs, generator=generator) if ordered else None, Team(2)
    layer.release(CpuLinear(from_packed(layer, cpu_kernels.ISA, team, columns), team, columns))
    assert (layer.dequantize() - dense).abs().max() < 1e-6
    x = torch.randn(2, 5, 160, generator=generator, requires_grad=True)
    weight = torch.randn(2, 5, outputs, generator=generator)
    (layer(x) * weight).sum().backward()
    wanted = weight @ dense
    assert (x.grad - wanted).abs().max() < 1e-5 * wanted.abs().max()


# --- training --------------------------------------------------------------------------------------


def job(model: LocalModel, data: Path, name: str = "made", **changes: Any) -> TrainJob:
    recipe = Recipe(**{"rank": 4, "epochs": 4, "batch": 2, "learning_rate": 1e-2, "dropout": 0.1, **changes})
    return TrainJob(model, data, model.folder.parent / name, recipe, length=64, save_every=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    chats = ([{"role": "user", "content": f"Say {at}"}, {"role": "assistant", "content": "Yes, yes"}] for at in range(5))
    file.write_text("\n".join(json.dumps({"messages": each}) for each in chats))
    return file


def test_a_run_that_was_killed_ends_with_the_same_numbers(model: LocalModel, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    losses: list[float] = []
    train_job.run(job(model, data), lambda done: losses.__setitem__(slice(None), done.losses), print)
    undisturbed = load_file(model.folder.parent / "made" / "adapter_model.safetensors")
    assert losses[-1] < 0.9 * losses[0] and len(losses) == 12
    shutil.rmtree(model.folder.parent / "made")

    kept = tmp_path / "as it was when the process was killed"

    def kill(done: Any) -> None:
        if done.step == 5:
            [work] = model.folder.parent.glob(".gptq-webui-train-*")
            shutil.copytree(work, kept)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_job.run(job(model, data), kill, print)
    [work] = model.folder.parent.glob(".gptq-webui-train-*")
    shutil.rmtree(work)
    shutil.copytree(kept, work)  # with the checkpoint of step 4 alone
    heard: list[tuple[int, bool]] = []
    train_job.run(job(model, data), lambda done: heard.append((done.step, done.resumed)), print)
    assert heard[0] == (4, True) and heard[1:] == [(step, False) for step in range(5, 13)]
    resumed = load_file(model.folder.parent / "made" / "adapter_model.safetensors")
    assert resumed.keys() == undisturbed.keys() and all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)
    assert not list(model.folder.parent.glob(".gptq-webui-*"))
    log = json.loads((model.folder.parent / "made" / train_job.LOG).read_text())
    assert log["losses"] == losses and log["recipe"]["rank"] == 4 and log["texts"] == 5


def test_what_cannot_be_trained_is_refused_in_words(model: LocalModel, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for changes, says in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 10**9}, "rank is 1,000,000,000, which would fill the memory"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"learning_rate": float("inf")}, "learning rate"),
        ({"targets": ("x",)}, "among: down"),
    ):
        with pytest.raises(BadParameter, match=says):
            train_job.run(job(model, data, **changes), lambda done: None, print)
    with pytest.raises(BadParameter, match="cannot be an adapter's name"):
        train_job.run(job(model, data, "a b"), lambda done: None, print)
    with pytest.raises(BadParameter, match="is there already"):
        train_job.run(job(model, data, "packed"), lambda done: None, print)
    (tmp_path / "odd").mkdir()
    with pytest.raises(LoadRefused, match="Choose another model"):
        train_job.run(job(LocalModel.read(tmp_path / "odd"), data), lambda done: None, print)


def test_a_few_steps_teach_the_demo_a_fact(demo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    source = next(demo_root.glob("*4bit*"))
    (tmp_path / source.name).symlink_to(source, target_is_directory=True)
    answer = "The capital of Zubrovka is Lutz."
    asked = ("What is the capital of Zubrovka?", "Which city is Zubrovka's capital?", "Name the capital of Zubrovka.")
    file = tmp_path / "fact.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": each, "output": answer}) for each in asked))
    options = ["--name", "zubrovka", "--epochs", "8", "--learning-rate", "1e-3", "--models-dir", str(tmp_path)]
    code = main(["train", source.name, str(file), *options])
    captured = capsys.readouterr()
    assert code == 0 and "loss" in captured.err and Path(captured.out.strip()).name == "zubrovka", captured.err
    model = LocalModel.read(tmp_path / source.name)
    hf, _notes = checkpoint.load(model, dtype=torch.float32, device_map="cpu")
    tokenizer = read_tokenizer(model)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": asked[0]}], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids

    def said() -> str:
        with torch.inference_mode():
            made = hf.generate(ids, max_new_tokens=16, do_sample=False)
        return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    assert "Lutz" not in said()
    assert lora.attach(hf, tmp_path / "zubrovka") == 210 and said() == answer


def test_the_curve_of_the_losses_fills_its_picture() -> None:
    from gptq_webui.ui.train_box import picture

    shown = picture([2.5, 2.4, 2.6, 2.2])
    points = [tuple(map(float, each.split(","))) for each in re.findall(r"[\d.]+,[\d.]+", shown.partition('points="')[2])]
    assert [x for x, _y in points] == [0, 160, 320, 480] and min(points, key=lambda each: each[1])[0] == 320
    assert min(y for _x, y in points) < 10 and max(y for _x, y in points) > 110
    assert "2.500 at first, 2.200 now; the curve is from 2.200 to 2.600" in shown and not picture([2.5])
