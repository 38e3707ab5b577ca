"""`gptq-webui evaluate`, against figures that numpy computes from the models' own logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.models import MARKER, LocalModel
from gptq_webui.engine.measured_quality import Figure, Figures, figures, remember
from gptq_webui.gptq import checkpoint

TEXT = "The harbour was quiet, and the old boats lay side by side. " * 6
WINDOW = 40


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """packed (4-bit), and other, a dense model with other weights."""
    tiny.write(tmp_path / "models" / "packed")
    tiny.write_tokenizer(tmp_path / "models" / "packed")
    tiny.dense_model("llama", seed=3).save_pretrained(tmp_path / "models" / "other")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "models"


def run(capsys: Any, models: Path, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in ("evaluate", *arguments, "--models-dir", models)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def log_probabilities(folder: Path, windows: list[list[int]]) -> np.ndarray:
    """fp64 [windows, tokens, vocabulary], by numpy's own arithmetic."""
    model, _ = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(windows)).logits.double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_agrees_with_an_independent_computation(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    arguments = ("packed", "--against", "other", "--text", models.parent / "text.txt", "--window", WINDOW, "--json")
    code, out, err = run(capsys, models, *arguments)
    assert code == 0, err
    found = json.loads(out)

    tokenizer = AutoTokenizer.from_pretrained(models / "packed")
    ids, room = tokenizer(TEXT, add_special_tokens=False)["input_ids"], WINDOW - 1
    windows = [[tokenizer.bos_token_id, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)]
    q, p = log_probabilities(models / "packed", windows), log_probabilities(models / "other", windows)
    assert found["tokens"] == len(windows) * (WINDOW - 1)

    def perplexity(of: np.ndarray) -> float:
        chosen = [of[w, t - 1, windows[w][t]] for w in range(len(windows)) for t in range(1, WINDOW)]
        return float(np.exp(-np.mean(chosen)))

    assert found["perplexity"] == pytest.approx(perplexity(q), rel=1e-5)
    assert found["against_perplexity"] == pytest.approx(perplexity(p), rel=1e-5)
    assert found["difference"]["kl"] == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["difference"]["same_top"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).mean()), abs=0.02)
    parts, step = found["difference"]["by_position"], WINDOW // 4
    assert [(each["first"], each["last"]) for each in parts] == [(at + 1, at + step) for at in range(0, WINDOW, step)]
    for at, each in enumerate(parts):
        here = slice(at * step, (at + 1) * step)
        kl = float((np.exp(p[:, here]) * (p[:, here] - q[:, here])).sum(-1).mean())
        assert each["kl"] == pytest.approx(kl, rel=1e-4)


def test_the_figures_are_kept_for_each_folder_and_listed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--text", models.parent / "text.txt", "--window", WINDOW)
    held = sorted(each.name for each in (models / "packed").iterdir())
    code, out, err = run(capsys, models, "packed", "--against", "other", *how, "--json")
    assert code == 0, err
    measured = json.loads(out)
    assert sorted(each.name for each in (models / "packed").iterdir()) == held  # nothing is written into the model

    main(["models", "--models-dir", str(models)])
    rows = {line.split("\t")[0]: line.split("\t")[6:] for line in capsys.readouterr().out.splitlines()}
    kl, same_top = measured["difference"]["kl"], measured["difference"]["same_top"]
    assert rows["packed"] == [f"{measured['perplexity']:.4f}", f"{kl:.6f}", f"{same_top:.2%}"]
    assert rows["other"] == ["-", "-", "-"]
    main(["models", "--models-dir", str(models), "--json"])
    (listed,) = (each["figures"] for each in json.loads(capsys.readouterr().out) if each["name"] == "packed")
    assert (listed["kl"]["text"], listed["kl"]["against"], listed["kl"]["tokens"]) == ("text.txt", "other", measured["tokens"])
    assert listed["perplexity"]["digest"] == measured["digest"]

    run(capsys, models, "packed", "--window", 32, "--tokens", 64)  # another text replaces the perplexity alone
    now = figures(LocalModel.read(models / "packed"))
    assert now.perplexity and now.perplexity.text == "Python's manual" and now.perplexity.digest != measured["digest"]
    assert now.kl and now.kl.value == pytest.approx(kl) and now.kl.text == "text.txt"


def test_figures_are_of_one_commit_and_a_damaged_file_costs_them_alone(models: Path, user_folder: Path) -> None:
    model = LocalModel.read(models / "packed")
    remember(model, perplexity=Figure(5.5, "a text", "0" * 12, 9))
    assert figures(model).texts == ("5.5000", "-", "-")
    (models / "packed" / MARKER).write_text(json.dumps({"commit": "another"}))
    assert figures(model) == Figures()
    (models / "packed" / MARKER).unlink()
    (file,) = (user_folder / ".local/share/gptq-webui/figures").iterdir()
    values = json.loads(file.read_text())
    for damaged in ("{", "[]", "[" * 100_000, json.dumps(values | {"perplexity": {"value": "x", "tokens": 1}})):
        file.write_text(damaged)
        assert figures(model) == Figures()


def test_from_kept_logits_the_figures_are_the_same(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ("--text", models.parent / "text.txt", "--window", WINDOW)
    _code, whole, _err = run(capsys, models, "packed", "--against", "other", *how, "--json")
    tiny.write_tokenizer(models / "other")
    kept = models.parent / "logits"
    code, alone, err = run(capsys, models, "other", *how, "--keep", kept, "--json")
    assert code == 0, err
    (models / "other").rename(models.parent / "gone")  # the original is not needed any more
    code, out, err = run(capsys, models, "packed", "--against", kept, "--json")
    assert code == 0 and json.loads(out) == json.loads(whole), err
    assert json.loads(alone)["perplexity"] == json.loads(whole)["against_perplexity"]
    code, _out, err = run(capsys, models, "packed", *how, "--keep", kept)
    assert code == 2 and "is there already" in err
    (kept / "00001.pt").unlink()
    code, _out, err = run(capsys, models, "packed", "--against", kept)
    assert code == 2 and "are not whole. Make them again" in err
    code, _out, err = run(capsys, models, "packed", "--against", kept, "--keep", models / "x")
    assert code == 2 and "leave out --against" in err


def test_a_model_is_no_distance_from_itself(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, models, "packed", "--against", models / "packed", "--window", 32, "--tokens", 64)
    assert code == 0, err
    assert "KL divergence to the other model: 0.000000" in out and "at 100.00% of the positions" in out
    assert "over 62 tokens" in out and "2 of 2 windows" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("packed", "--text", "nowhere.txt"), "There is no file nowhere.txt"),
        (("packed", "--window", "1"), "--window must be 2 tokens or more"),
        (("nothing",), "There is no model 'nothing'"),
    ),
)
def test_what_cannot_be_is_said(arguments: tuple[str, ...], words: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, models, *arguments)
    assert code == (1 if "no model" in words else 2) and words in err and not out


def test_a_short_text(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models.parent / "text.txt").write_text("short")
    code, _, err = run(capsys, models, "packed", "--text", models.parent / "text.txt")
    assert code == 2 and "The text has 5 tokens; one window needs 512" in err
