"""Perplexity of the loaded model, against what transformers' own forward gives over the same windows."""

import json
import math
import threading

import pytest
import torch

import tiny
from gptq_webui.app.cli import main
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.engine.engine import Engine
from gptq_webui.engine.measured_quality import figures
from gptq_webui.engine.perplexity import measure
from gptq_webui.engine.settings import Settings
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.text_windows import Window, windows_of
from gptq_webui.hub.library import Library
from gptq_webui.loaders.contract.fake_loader import FakeLoader

TEXT = "The harbour was quiet, and the old boats lay side by side. " * 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.write(root / "models" / "packed")
    tiny.write_tokenizer(root / "models" / "packed")
    (root / "a.txt").write_text(TEXT[:200])
    (root / "b.txt").write_text(TEXT[200:])
    return root / "models"


@pytest.fixture(scope="module")
def engine(models):
    engine = Engine(Library([models]), Settings(models.parent / "settings.json"))
    engine.load("packed", options={"dtype": "fp32"})
    yield engine
    engine.unload()


def run(capsys, command, models, *arguments):
    code = main([str(each) for each in (command, *arguments, "--models-dir", models)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def expected(folder, window, stride):
    """By the loop of Hugging Face's page "Perplexity of fixed-length models", written anew: (perplexity, tokens)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, bos = tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    window, stride = window - 1, min(stride, window - 1)  # the beginning-of-sequence token is in each
    model, _ = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        piece = torch.tensor([[bos, *ids[begin:end]]])
        labels = piece.clone()
        labels[:, : before - end] = -100  # what an earlier window has counted
        with torch.inference_mode():
            logits = model(input_ids=piece).logits
        total -= float(torch.nn.functional.cross_entropy(logits[0].double()[:-1], labels[0, 1:], reduction="sum"))
        count, before = count + int((labels[0, 1:] != -100).sum()), end
        if end == len(ids):
            break
    return math.exp(-total / count), count


@pytest.mark.parametrize(("window", "stride"), [(40, 20), (40, 40), (64, 7), (250, 125)])
def test_it_is_the_perplexity_of_strided_windows(models, engine, window, stride):
    found = measure(engine, TEXT, "a text", threading.Event(), window=window, stride=stride)
    kept = figures(LocalModel.read(models / "packed")).perplexity
    assert kept and (kept.value, kept.text, kept.digest) == (found.perplexity, "a text", found.digest)
    wanted, tokens = expected(models / "packed", window, stride)
    assert found.tokens == tokens and found.perplexity == pytest.approx(wanted, rel=1e-4)


def test_the_command_agrees_with_evaluate_where_nothing_overlaps(models, capsys):
    windows = ("--window", 50, "--tokens", 196, "--json")
    code, out, err = run(capsys, "perplexity", models, models / "packed", models.parent / "a.txt", "--stride", 50, *windows)
    assert code == 0, err
    code, other, _ = run(capsys, "evaluate", models, models / "packed", "--text", models.parent / "a.txt", *windows)
    assert code == 0 and json.loads(out)["text"] == "a.txt"
    assert json.loads(out)["perplexity"] == pytest.approx(json.loads(other)["perplexity"], rel=1e-3)
    assert json.loads(out)["tokens"] == json.loads(other)["tokens"] == 196


def test_without_a_file_it_is_pythons_manual(models, capsys):
    code, out, err = run(capsys, "perplexity", models, "packed", "--tokens", 60, "--window", 32)
    assert code == 0, err
    assert out.startswith("packed: perplexity ") and "over 60 tokens of Python's manual (windows of 32, stride 16" in out


def test_several_files_are_read_as_one(models, engine, capsys):
    code, out, err = run(capsys, "perplexity", models, "packed", models.parent / "a.txt", models.parent / "b.txt", "--window", 40)
    assert code == 0, err
    wanted = measure(engine, TEXT, "a text", threading.Event(), window=40)
    assert f"over {wanted.tokens} tokens of a.txt, b.txt" in out


def test_it_stops(engine):
    cancel = threading.Event()
    cancel.set()
    assert measure(engine, TEXT, "a text", cancel) is None


def test_windows_count_every_token_once():
    ids = list(range(100))
    for window in (2, 3, 10, 99, 100, 101, 500):
        for stride in {1, window // 2 or 1, window}:
            for begin in ((), (7,)):
                found = windows_of(ids, window, stride, begin)
                counted = [id for each in found for id in each.ids[-each.counted :]]
                if begin or stride < window:
                    assert counted == ids[0 if begin else 1 :], (window, stride, begin)
                assert all(len(each.ids) <= window and each.counted <= len(each.ids) - 1 for each in found)
                assert all(each.ids[: len(begin)] == begin for each in found)
    assert windows_of([], 10, 5) == windows_of([1], 10, 5) == []
    assert windows_of([1], 10, 5, [0]) == [Window((0, 1), 1)]


@pytest.mark.parametrize(
    ("text", "window", "stride", "words"),
    [
        (TEXT, 1, None, "A window must have 2 tokens or more"),
        (TEXT, 257, None, "fit into the context of 256"),
        (TEXT, 16, 17, "The stride must be 1 or more, and at most the window, which is 16"),
        (TEXT, 16, -1, "The stride must be 1 or more"),
        ("", 16, None, "The text has 0 tokens, too few"),
    ],
)
def test_what_cannot_be_is_said(engine, text, window, stride, words):
    with pytest.raises(BadParameter, match=words):
        measure(engine, text, "a text", threading.Event(), window=window, stride=stride)


def test_a_file_or_a_model_that_is_not_there_is_said(models, capsys):
    for arguments, expected, words in (
        (("packed", "nowhere.txt"), 2, "There is no file nowhere.txt for the text"),
        (("nothing",), 1, "no model 'nothing'"),
    ):
        code, out, err = run(capsys, "perplexity", models, *arguments)
        assert code == expected and words in err and not out


def test_a_loader_without_log_probabilities_is_named(tmp_path):
    from fake_library import MISTRAL, FakeLibrary

    engine = Engine(FakeLibrary(tmp_path), Settings(tmp_path / "settings.json"), [FakeLoader()])
    engine.load(MISTRAL)
    with pytest.raises(BadParameter, match="gives no log-probabilities"):
        measure(engine, TEXT, "a text", threading.Event())
    engine.unload()
