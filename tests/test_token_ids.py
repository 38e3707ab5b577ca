"""Ids that the model has no embedding of: a sentence before anything is computed, and the next answer is right."""

import json
import shutil
import threading

import pytest
import torch

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions


@pytest.mark.parametrize(("claims", "what"), [
    ({"pad_token_id": 288}, "padding"), ({"bos_token_id": 4000}, "beginning"), ({"eos_token_id": [1, 99999]}, "end"),
])  # fmt: skip
def test_ids_of_config_json_past_the_vocabulary_are_ignored_with_a_note(claims, what, tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **claims}))
    packed, notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    assert any(what in note and "0 to 287" in note for note in notes)
    assert packed.config.eos_token_id in (1, 2, [1], None)


def test_a_prompt_with_such_a_token_is_refused_and_the_next_answer_is_right(tiny_gptq, tmp_path):
    shutil.copytree(tiny_gptq, tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(), lambda share, text: None)
    params = GenerationParams(temperature=0, max_new_tokens=4)

    def answer(ids):
        with loaded.generate(ids, params, threading.Event()) as steps:
            return [step.id for step in steps if hasattr(step, "id")]

    try:
        before = answer([5, 6, 7])
        for wrong in (288, -1, 10**9):
            with pytest.raises(BadParameter, match="0 to 287"):
                answer([5, wrong, 7])
        assert answer([5, 6, 7]) == before
    finally:
        loaded.close()


@pytest.mark.parametrize("kernel", ["step", "layers", "plain", "graph"])
@pytest.mark.parametrize("wrong", [288, -1, 10**9])
def test_every_stepper_refuses_such_a_token_before_it_computes(kernel, wrong, tiny_gptq):
    from gptq_webui.gptq.graph_stepper import GraphStepper
    from gptq_webui.gptq.prompt_scores import embed, score
    from gptq_webui.gptq.stepper_choice import stepper_for
    from gptq_webui.gptq.transformers_stepper import TransformersStepper

    hf, _notes = checkpoint.load(LocalModel.read(tiny_gptq), dtype=torch.float32, device_map="cpu")
    if kernel == "layers":
        pytest.importorskip("numba")
        from gptq_webui.gptq.cpu.cpu_linear import replace_layers

        replace_layers(hf, 1)
    make = {"step": lambda: stepper_for(hf, 64)[0], "graph": lambda: GraphStepper(hf, 64, recorder=None)}
    stepper = make.get(kernel, lambda: TransformersStepper(hf))()
    assert stepper.embedding_rows == 288
    memory = stepper.begin()
    with torch.inference_mode():
        before = stepper.prefill(memory, [5, 6, 7]).clone()
        for compute in (stepper.prefill, stepper.all_logits, stepper.hidden):
            with pytest.raises(BadParameter, match="0 to 287"):
                compute(memory, [5, wrong])
        with pytest.raises(BadParameter, match="0 to 287"):
            stepper.step(memory, wrong)
        assert memory.length == 3
        assert torch.equal(stepper.prefill(stepper.begin(), [5, 6, 7]), before)
    for compute in (lambda: list(score(stepper, [5, wrong], 1, threading.Event())),
                    lambda: list(embed(stepper, [5, wrong], "mean", threading.Event()))):  # fmt: skip
        with pytest.raises(BadParameter, match="0 to 287"):
            compute()
    if kernel == "step":
        stepper.close()


def test_what_a_request_names_is_refused_before_it_waits(tiny_gptq, tmp_path):
    """Biases, scored texts, embedded texts, and calls of other programs; a ban of such a token changes nothing."""
    shutil.copytree(tiny_gptq, tmp_path / "model")
    tiny.write_tokenizer(tmp_path / "model")
    loaded = TransformersLoader().load(LocalModel.read(tmp_path / "model"), TransformersOptions(), lambda share, text: None)
    greedy = GenerationParams(temperature=0, max_new_tokens=4)

    def answer(**more):
        with loaded.generate([5, 6, 7], GenerationParams(temperature=0, max_new_tokens=4, **more), threading.Event()) as steps:
            return [step.id for step in steps if hasattr(step, "id")]

    try:
        before = answer()
        with pytest.raises(BadParameter, match=r"logit_bias names token 288; the model's tokens are 0 to 287"):
            loaded.generate([5], GenerationParams(logit_bias=((4, 1.0), (288, 2.0))), threading.Event())
        with pytest.raises(BadParameter, match="0 to 287"):
            loaded.score([5, 288], 1, threading.Event())
        with pytest.raises(BadParameter, match="0 to 287"):
            loaded.embed([[5], [288]], "mean", threading.Event())
        for call in (loaded.hf.generate, loaded.hf):
            with pytest.raises(BadParameter, match="0 to 287"):
                call(input_ids=torch.tensor([[5, 288]]))
        assert answer(custom_token_bans=(288, 99999)) == answer() == before and greedy.temperature == 0
    finally:
        loaded.close()


def test_models_of_other_loaders_know_the_rows_from_the_files(tiny_gptq, tmp_path):
    from gptq_webui.core.models import remote_model
    from gptq_webui.loaders.contract.base import _embedding_rows

    assert _embedding_rows(LocalModel.read(tiny_gptq)) == 288
    assert _embedding_rows(remote_model("a/b")) is None
    assert _embedding_rows(LocalModel.read(tmp_path)) is None
