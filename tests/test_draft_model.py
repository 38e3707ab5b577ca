"""loaders/transformers/draft_model.py: a draft model by its folder, and what is said where it cannot be one."""

import json
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba")

import tiny
from gptq_webui.core.chat import Step
from gptq_webui.core.errors import BadParameter, NotEnoughMemory
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, stepper_choice
from gptq_webui.loaders.text.tokenizer import read_tokenizer
from gptq_webui.loaders.transformers import draft_model
from gptq_webui.loaders.transformers.draft_model import DraftModel
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions

GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=40)
PROMPT = [*range(10, 40)] * 3


def write(folder, kind="llama", **how):
    tiny.write(folder, kind, **how)
    tiny.write_tokenizer(folder)
    return LocalModel.read(folder)


def load(model, **options):
    return TransformersLoader().load(
        model, TransformersOptions(device="cpu", context_tokens=512, **options), lambda share, text: None
    )


def ids_of(model, params):
    model._end_ids, model.template = set(), replace(model.template, stop_ids=())
    return [each.id for each in model.generate(PROMPT, params, threading.Event()) if isinstance(each, Step)]


@pytest.fixture
def large(tmp_path):
    return write(tmp_path / "large")


def test_a_draft_model_beside_the_model_guesses_and_changes_nothing(large, tmp_path):
    write(tmp_path / "small", seed=3, bits=8)
    params = [GREEDY, replace(GREEDY, temperature=1.0, seed=4)]
    plain = load(large)
    wanted = [ids_of(plain, each) for each in params]
    plain.close()
    for named in ("small", str(tmp_path / "small")):
        model = load(large, draft_model=named)
        stepper = model._stepper
        assert any("small guesses next words" in note for note in model.notes)
        small = stepper._batch.draft
        assert [ids_of(model, each) for each in params] == wanted
        model.close()
        assert stepper._batch.draft is None and not small.stepper.team._go, "it is closed with the model"


def test_a_folder_that_is_not_there_is_named(large):
    with pytest.raises(BadParameter, match=r"no folder .*nowhere for the draft model"):
        load(large, draft_model="nowhere")
    with pytest.raises(BadParameter, match="draft_model must be the name of a folder"):
        TransformersOptions(draft_model=3)


def test_another_tokenizer_is_refused_and_the_token_named(large, tmp_path):
    write(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a":', '"aa":'), encoding="utf-8")
    with pytest.raises(
        BadParameter, match=r"other cannot be the draft model of large: .* Token 68 is 'aa' in the one and 'a' in the other"
    ):
        load(large, draft_model="other")


def test_what_cannot_be_opened_is_refused(large, tmp_path):
    small = write(tmp_path / "small")
    small.weights[0].unlink()
    with pytest.raises(BadParameter, match="small cannot be the draft model: "):
        load(large, draft_model="small")


def test_where_it_is_not_used_a_note_says_why(large, tmp_path, monkeypatch):
    write(tmp_path / "small")
    model = load(large, draft_model="small", guesses="off")
    assert any("guessing ahead is off" in note for note in model.notes) and model._stepper._batch.draft is None
    assert len(ids_of(model, GREEDY)) == 40
    model.close()
    with monkeypatch.context() as patch:
        patch.setattr(stepper_choice.numba_compiler, "available", lambda: False)
        model = load(large, draft_model="small")
    assert any("The draft model is not used: it is for models that our own step" in note for note in model.notes)
    model.close()
    with monkeypatch.context() as patch:
        patch.setattr(draft_model.memory_fit, "require_memory", full)
        model = load(large, draft_model="small")
    assert any("The draft model small is not used: 2 MB are free." in note for note in model.notes)
    model.close()
    write(tmp_path / "long", "gpt2")
    monkeypatch.setattr(draft_model, "_LEAST_TOKENS", 10_000)
    model = load(large, draft_model="long")
    assert any("The draft model long is not used: " in note for note in model.notes) and model._stepper._batch.draft is None
    model.close()


@pytest.mark.parametrize(("error", "said"), [
    (MemoryError(), "there is not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
    (KeyError("layers"), "'layers' is missing"),
])  # fmt: skip
def test_what_goes_wrong_with_a_draft_is_said_and_the_model_loads(large, tmp_path, monkeypatch, error, said):
    write(tmp_path / "small")
    read = checkpoint.load

    def breaks(model, **how):
        if model.name == "small":
            raise error
        return read(model, **how)

    monkeypatch.setattr(checkpoint, "load", breaks)
    model = load(large, draft_model="small")
    assert model.notes[-1] == f"The draft model small is not used: {said}."
    assert model._stepper._batch.draft is None
    model.close()


def test_a_draft_without_a_step_of_its_own_is_said_to_have_none(large, tmp_path, monkeypatch):
    write(tmp_path / "small")
    described, asked = stepper_choice.parts_of, []

    def only_the_first(hf):
        asked.append(hf)
        return described(hf) if len(asked) == 1 else None

    monkeypatch.setattr(stepper_choice, "parts_of", only_the_first)
    model = load(large, draft_model="small")
    assert model.notes[-1] == "The draft model small is not used: its architecture has no step of its own."
    model.close()


def test_a_model_whose_positions_depend_on_the_length_of_the_text_takes_no_draft(tmp_path):
    for name in ("large", "small"):
        write(tmp_path / name)
    path = tmp_path / "large" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    path.write_text(json.dumps(config), encoding="utf-8")
    large = LocalModel.read(tmp_path / "large")
    model = load(large, draft_model="small")
    assert model._stepper.kernel == "cpu" and not model._stepper.can_draft
    assert "do not depend on the length of the text" in model.notes[-1]
    model.close()


def test_memory_is_kept_for_a_draft_only_where_it_is_used(large, tmp_path, monkeypatch):
    small = write(tmp_path / "small")
    tokenizer = read_tokenizer(large)
    for guesses, device, size in [("auto", "cpu", small.size_bytes), ("off", "cpu", 0), ("auto", "cuda", 0)]:
        draft = DraftModel(large, TransformersOptions(draft_model="small", guesses=guesses), tokenizer)
        assert draft.bytes_on(torch.device(device)) == size
    monkeypatch.setattr(DraftModel, "bytes_on", lambda self, device: 10**15)
    with pytest.raises(NotEnoughMemory, match=r"no room for a conversation.* Or leave Draft model empty: small takes 1000"):
        TransformersLoader().load(large, TransformersOptions(device="cpu", draft_model="small"), lambda share, text: None)


def full(model, device, dtype):
    if model.name == "small":
        raise NotEnoughMemory("2 MB are free. Close other programs.")


@pytest.mark.parametrize(("guesses", "guessed"), [("auto", True), ("on", True), ("off", False)])
def test_guesses_can_be_switched_off(large, guesses, guessed):
    model = load(large, guesses=guesses)
    batch, most = model._stepper._batch, []
    compute = batch._compute
    batch._compute = lambda pieces: (most.append(sum(len(ids) for _memory, ids in pieces)), compute(pieces))[1]
    assert len(ids_of(model, replace(GREEDY, logit_bias=((9, 100.0),)))) == 40
    assert (max(most) > 1) == guessed
    model.close()
