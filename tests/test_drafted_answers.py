"""A draft model beside the step for processors: whatever it guesses, every answer stays what it is."""

import json
import random
import shutil
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba")

from safetensors.torch import load_file, save_file
from test_cpu import load
from test_cpu_batch import PARAMS, events_of, ids_of, in_turns, passes

from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, drafting
from gptq_webui.gptq.answer_batch import Batch
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.drafting import Draft, Drafter
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.loaders.text.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that makes a stepper of a random model by its seed."""
    folder, made = tmp_path_factory.mktemp("draft"), []

    def make(seed=0, draft=None, bits=4):
        name = folder / f"{seed}-{bits}"
        hf, _twin = load(name, "llama", seed=seed, bits=bits)
        made.append(CpuStepper(parts_of(hf), 600, 2, parallel=8))
        if draft is not None:
            made[-1].draft_with(draft, 600)
        return made[-1]

    yield make
    for each in made:
        each.close()


def always(monkeypatch, chance=None):
    """The draft model is asked whatever it takes and believed whatever it says, or by chance."""
    monkeypatch.setattr(Draft, "chance", lambda self, sure: 0.9)
    monkeypatch.setattr(Drafter, "worth", lambda self, costs, pass_s: 9.0 if chance is None or chance.random() < 0.7 else 1.0)
    monkeypatch.setattr(drafting, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(Batch, "_measured", lambda self, rows, took_s: setattr(self, "_one_s", 1.0))
    monkeypatch.setattr(Drafter, "paid", lambda self, more: None)


@pytest.mark.parametrize("params", PARAMS[:4])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_draft_model_changes_no_token(models, monkeypatch, params, seed):
    """Seed 0: the same model, which is right as long as the answer is the likeliest; 5: another one, which is hardly ever."""
    prompts = [
        torch.randint(5, 260, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 70, 300)
    ]
    alone = [ids_of(events_of(models(0), prompt, params)) for prompt in prompts]
    always(monkeypatch)
    stepper = models(0, models(seed))
    rows = passes(stepper, monkeypatch)
    assert [ids_of(events_of(stepper, prompt, params)) for prompt in prompts] == alone
    if seed == 0 and params.temperature == 0 and params.repetition_penalty == 1:
        assert len(rows) < sum(map(len, alone)) * 0.6
    assert max(rows) > 1, "something was guessed"


@pytest.mark.parametrize("seed", range(6))
def test_random_conversations_are_the_same_with_a_draft_model(models, monkeypatch, seed):
    """Some at a time, that one often runs alone; every kind of sampling, cancels, closed streams and later turns."""
    chance = random.Random(seed)
    plain, stepper = models(0), models(0, models((0, 0, 5)[seed % 3], bits=(4, 8, 4)[seed % 3]))
    known, asked = [chance.choices(range(5, 260), k=120)], {}
    for at in range(10):
        ids = (chance.choice([[], *known]) + chance.choices(range(5, 260), k=chance.randrange(1, 60)))[:400]
        params = replace(chance.choice(PARAMS), seed=at, max_new_tokens=chance.randrange(1, 60))
        alone = ids_of(events_of(plain, ids, params))
        known.append((ids + alone)[:250])
        ends = (chance.choice(alone),) if chance.random() < 0.3 else ()  # it may have been guessed
        alone = ids_of(generate(plain, ids, params, threading.Event(), prefix=PrefixCache(), end_ids=ends, context_tokens=600))
        asked[at] = ids, params, ends, alone
    always(monkeypatch, chance)
    prefix, running, found, cancels, stopped = PrefixCache(), {}, {at: [] for at in asked}, {}, set()
    waiting = list(asked)
    while waiting or running:
        if waiting and (not running or chance.random() < 0.05):
            at = waiting.pop(0)
            cancels[at] = threading.Event()
            ids, params, ends, _alone = asked[at]
            running[at] = generate(stepper, ids, params, cancels[at], prefix=prefix, end_ids=ends, context_tokens=600)
        for at in list(running):
            event = next(running[at], None)
            if event is None and running[at].gi_frame is None:
                del running[at]
            elif hasattr(event, "id"):
                found[at].append(event.id)
        if running and chance.random() < 0.01:
            stopped.add(at := chance.choice(list(running)))
            if chance.random() < 0.5:
                cancels[at].set()
            else:
                running.pop(at).close()
    for at, (_ids, _params, _ends, alone) in asked.items():
        assert found[at] == (alone[: len(found[at])] if at in stopped else alone), at
    assert not stepper._batch.busy


def test_beside_others_nobody_asks_the_draft_model(models, monkeypatch):
    small = models(5)
    stepper, asked = models(0, small), []
    always(monkeypatch)
    guess = Drafter.guess
    monkeypatch.setattr(Drafter, "guess", lambda self, *args: asked.append(len(stepper._batch._running)) or guess(self, *args))
    params = GenerationParams(temperature=0, max_new_tokens=30)
    in_turns([events_of(stepper, [7, 8, at], params) for at in range(3)])
    assert set(asked) <= {1}


def test_without_guesses_a_pass_computes_one_row(models, monkeypatch):
    hf_stepper = models(0)
    hf_stepper._batch.guesses = False
    rows = passes(hf_stepper, monkeypatch)
    assert len(ids_of(events_of(hf_stepper, [9] * 30, GenerationParams(temperature=0, max_new_tokens=50)))) == 50
    assert set(rows) == {1}


# -- with the demo model -----------------------------------------------------------------------------------------------


def with_first_layers(folder, layers, to):
    """The folder of a model that is another one's beginning."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"))
    state = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in state.items() if ".layers." not in name or int(name.split(".")[2]) < layers}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    config.pop("layer_types", None)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def test_the_demo_model_answers_the_same_with_its_other_width_or_its_first_layers_as_draft(demo_root, tmp_path, monkeypatch):
    four, eight = sorted(each for each in demo_root.iterdir() if each.name.endswith("actorder_True"))
    short = with_first_layers(four, 4, tmp_path / "short")

    def stepper_of(folder):
        hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map={"": "cpu"})
        return CpuStepper(parts_of(hf), 600, 2)

    prompt = list(read_tokenizer(LocalModel.read(four)).encode("Once upon a time a fox and a crow lived beside a river. They"))
    asked = [GenerationParams(temperature=0, max_new_tokens=24), GenerationParams(temperature=0.8, seed=3, max_new_tokens=24)]
    stepper = stepper_of(four)
    alone = [ids_of(events_of(stepper, prompt, params)) for params in asked]
    always(monkeypatch)
    rows = {}
    for folder in (eight, short):
        stepper.draft_with(stepper_of(folder), 600)
        with monkeypatch.context() as patch:
            rows[folder] = passes(stepper, patch)
            assert [ids_of(events_of(stepper, prompt, params)) for params in asked] == alone
        stepper._batch.draft.close()
    stepper._batch.draft = None
    stepper.close()
    assert len(rows[eight]) < 0.7 * 48 < len(rows[short]), "the other width says nearly the same, four layers know nothing"
