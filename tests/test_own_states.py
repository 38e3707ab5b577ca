"""gptq/own_states.py: states of a conversation outside of the layers of transformers' usual cache."""

from types import SimpleNamespace

import emulated_gpu
import hub_folder
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW
from test_graph_answers import CONTEXT, PROMPTS, alone, answer
from test_sampling_extras import Words
from test_transformers_stepper import IDS, Replay, error, graph, plain, whole

from gptq_webui.core.chat import Step
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint, stepper_choice
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.own_states import FixedStates, ModuleStates, copy_of, spots_in
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.static_cache import FIRST_CAPACITY, StaticRoom
from gptq_webui.gptq.static_rows import RowRoom
from gptq_webui.gptq.token_rules import TokenRules
from gptq_webui.gptq.transformers_memory import kept_by_tokens, states_of
from gptq_webui.gptq.transformers_stepper import TransformersStepper


def cache(value=1.0, **more):
    """One state in a list, a pair in a tuple, and layers that are none of them."""
    one = [[], torch.full((2, 3), value)]
    pair = {0: (torch.full((4,), value), torch.full((5,), value))}
    return SimpleNamespace(linear=one, recurrent=pair, layers=[torch.zeros(1)], name="a", **more)


def numbers(of):
    return [float(each.mean()) for place in spots_in(of) for each in place.tensors]


def test_states_are_found_in_lists_dicts_and_tuples():
    found = cache()
    assert [each.name for each in spots_in(found)] == [("linear", 1), ("recurrent", 0)]
    assert [len(each.tensors) for each in spots_in(found)] == [1, 2]
    assert spots_in(None) == spots_in([]) == spots_in(SimpleNamespace(name="a")) == []
    other = copy_of(found)
    found.linear[1].fill_(9)
    assert numbers(other) == [1, 1, 1] and other.layers is found.layers and other.linear[0] == []


def test_states_that_a_forward_replaces_stay_at_their_addresses():
    room = copy_of(cache(1.0))
    fixed = FixedStates(room)
    addresses = [each.data_ptr() for each in fixed.tensors]
    first, second = cache(2.0), cache(3.0)
    fixed.enter([first])
    room.linear[1] = room.linear[1] + 10  # in its place
    room.recurrent[0] = room.recurrent[0][0] + 10, room.recurrent[0][1]
    room.recurrent[0][1].add_(1)
    fixed.settle()
    assert [each.data_ptr() for place in spots_in(room) for each in place.tensors] == addresses
    assert numbers(room) == [12, 12, 3]
    fixed.leave([first])
    fixed.enter([second])
    assert numbers(first) == [12, 12, 3] and numbers(room) == numbers(second) == [3, 3, 3]
    room.linear[1] = torch.full((7,), 5.0)
    fixed.put_back()  # whatever a forward that failed has left there
    assert numbers(room) == [3, 3, 3]


@pytest.mark.parametrize("change", [
    lambda room: room.linear.__setitem__(1, torch.zeros(3, 3)), lambda room: room.linear.__setitem__(1, torch.zeros(2, 3).half()),
    lambda room: room.linear.append(torch.zeros(1)), lambda room: vars(room).update(more=torch.zeros(1)),
    lambda room: vars(room).update(count=4), lambda room: room.recurrent.__setitem__(0, torch.zeros(4)),
])  # fmt: skip
def test_what_grows_or_counts_on_the_host_is_refused(change):
    room = copy_of(cache(count=3))
    fixed = FixedStates(room)
    fixed.settle()
    change(room)
    with pytest.raises(ValueError, match=r"of a class of its own|argument"):
        fixed.settle()


def test_a_conversation_of_another_form_is_refused():
    fixed = FixedStates(copy_of(cache(count=3)))
    for other in (cache(count=4), cache(), cache(count=3, more=torch.zeros(1))):
        with pytest.raises(ValueError, match="of a class of its own"):
            fixed.enter([other])


class Sums(torch.nn.Module):
    """Adds up what it has seen, as its own."""

    def __init__(self, in_place=False, counts=False):
        super().__init__()
        self.weight, self.register = torch.nn.Parameter(torch.ones(1)), None
        self.constant, self.seen, self.calls = torch.ones(2), None, 0
        self.in_place, self.counts = in_place, counts

    def forward(self, x):
        self.calls += self.counts
        if self.seen is None:
            self.seen = torch.zeros(1)
        if self.in_place:
            self.seen.add_(x)
        else:
            self.seen = self.seen + x
        return self.seen.clone()


@pytest.mark.parametrize("in_place", [False, True])
def test_every_conversation_has_its_own_of_what_a_module_keeps(in_place):
    model = torch.nn.Sequential(Sums(in_place))
    model(1.0)
    with torch.inference_mode():
        states = ModuleStates.changed_by(model, lambda: model(2.0))
        assert [name for _module, name in states._spots] == ["seen"]
        first, second = {}, {}
        for kept, x, wanted in ((first, 1.0, 1), (second, 5.0, 5), (first, 2.0, 3), (second, 1.0, 6)):
            with states.of(kept):
                assert model(x) == wanted
        assert model(1.0) == 4, "what others have left there stays"


def test_modules_that_count_on_the_host_or_keep_nothing_are_left_alone():
    for module in (Sums(counts=True), torch.nn.Linear(1, 1)):
        module(torch.ones(1))
        assert ModuleStates.changed_by(module, lambda: module(torch.ones(1))) is None  # noqa: B023


@NEW
@pytest.mark.parametrize("made", [plain, graph])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_that_is_kept_in_the_modules_is_of_one_conversation_only(dtype, made):
    model = tiny_model("recurrent_gemma", wide=True).to(dtype)
    wanted, stepper = whole(model, IDS), made(model)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:30])
        stepper.prefill(stepper.begin(), IDS[::-1])
        assert error(stepper.step(memory, IDS[30]), wanted[30]) < 3e-3
        assert not memory.ids, "no token is computed twice"
        short = stepper.begin()
        assert error(stepper.prefill(short, IDS[:1]), wanted[0]) < 3e-3, "a first token finds no state of others"
        for at in range(1, 4):
            assert error(stepper.step(short, IDS[at]), wanted[at]) < 3e-3
        assert error(stepper.step(memory, IDS[31]), wanted[31]) < 3e-3
        short.restart()
        assert error(stepper.prefill(short, IDS[:2]), wanted[1]) < 3e-3
    stepper.close()


@pytest.mark.skipif("minimax" not in KINDS, reason="this transformers has no such model")
@pytest.mark.parametrize("types", [("linear", "linear", "full"), ("full", "linear"), ("linear", "full", "linear")])
def test_a_cache_of_its_own_is_asked_in_whichever_order_its_layers_are(types):
    """MiniMax's first layer keeps no keys, but is asked how many tokens there are."""
    model = tiny_model("minimax", layer_types=[f"{each}_attention" for each in types], num_hidden_layers=len(types))
    wanted, stepper = whole(model, IDS), graph(model)
    assert not stepper.why
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:20])
        for at in range(20, 30):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4
        assert not memory.cut(25) and memory.fork(10) is None and not stepper.takes_tensors
    stepper.close()


@NEW
@pytest.mark.parametrize("kind", [each for each in ("minimax", "xlstm", "rwkv", "recurrent_gemma") if each in KINDS])
def test_states_follow_a_conversation_into_a_larger_room(kind):
    model, recorder = tiny_model(kind), Replay()
    stepper, ids = GraphStepper(model, 4096, recorder), (IDS * 30)[: FIRST_CAPACITY + 3]
    if "minimax" in kind or kind == "recurrent_gemma":
        model.config.max_position_embeddings = 4096
    wanted = whole(model, ids)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, ids[: FIRST_CAPACITY - 3])
        for at in range(FIRST_CAPACITY - 3, FIRST_CAPACITY + 3):
            assert error(stepper.step(memory, ids[at]), wanted[at]) < 1e-3
    assert recorder.recorded == 2 and not stepper.why


@pytest.mark.skipif("xlstm" not in KINDS, reason="this transformers has no such model")
def test_a_cache_that_counts_on_the_host_is_computed_without_a_graph():
    model = tiny_model("xlstm")
    before = model.backbone.forward

    def forward(*args, **given):
        output = before(*args, **given)
        held = next((found for name in ("cache", "cache_params") if (found := getattr(output, name, None)) is not None), None)
        if held is not None:
            held.tokens = getattr(held, "tokens", 0) + 1
        return output

    model.backbone.forward = forward
    stepper, wanted = graph(model), whole(tiny_model("xlstm"), IDS)
    assert "counts on the host" in stepper.why
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, IDS[:20])
        for at in range(20, 24):
            assert error(stepper.step(memory, IDS[at]), wanted[at]) < 1e-4


@NEW
@pytest.mark.parametrize("kind", ["minimax", "xlstm", "rwkv", "recurrent_gemma", "nemotron_h"])
def test_a_conversation_of_states_goes_on_after_others(kind, tmp_path, monkeypatch):
    """On a GPU that is emulated: the next turn reads what is new, and an answer that goes back in its text is right."""
    hub_folder.write(tmp_path, tiny_model(kind, wide=True), group_size=32, act_order=False)
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "packed"), dtype=torch.float16, device_map={"": "cpu"})
    emulated_gpu.emulate(monkeypatch)
    stepper, _note = stepper_choice.stepper_for(hf, CONTEXT, parallel=4)
    assert stepper.kernel == "graph" and stepper.parallel == 1 and not stepper.takes_tensors
    prefix, read, prefill = PrefixCache(), [], stepper.prefill
    wanted = [alone(stepper, ids) for ids in PROMPTS[:2]]
    assert [each.id for each in answer(stepper, PROMPTS[0], prefix=prefix) if isinstance(each, Step)] == wanted[0]
    assert alone(stepper, PROMPTS[1]) == wanted[1]
    more = [*PROMPTS[0], *wanted[0], 3, 5]
    monkeypatch.setattr(stepper, "prefill", lambda memory, ids: read.append(len(ids)) or prefill(memory, ids))
    found = [each.id for each in answer(stepper, more, prefix=prefix) if isinstance(each, Step)]
    assert read == [3], "the last token of the answer, and two more"
    assert found == alone(stepper, more)
    rules = TokenRules(texts=Words(tuple(wanted[0][3:5])))
    assert wanted[0] != alone(stepper, PROMPTS[0], rules=rules) == alone(stepper._prompts, PROMPTS[0], rules=rules)
    assert [alone(stepper, ids) for ids in PROMPTS[:2]] == wanted and not stepper.why
    stepper.close()


@NEW
@pytest.mark.parametrize("made", [plain, graph])
@pytest.mark.parametrize("kind", [each for each in ("minimax", "xlstm", "rwkv", "recurrent_gemma") if each in KINDS])
def test_a_text_is_scored_and_embedded_piece_by_piece(kind, made):
    model = tiny_model(kind, wide=True)
    wanted, stepper = whole(model, IDS), made(model)
    with torch.inference_mode():
        memory, other = stepper.begin(), stepper.begin()
        hidden = []
        for first, last in ((0, 10), (10, 15), (15, 16), (16, 30)):
            rows = stepper.all_logits(memory, IDS[first:last])
            assert max(error(row[None], right) for row, right in zip(rows, wanted[first:last], strict=True)) < 1e-3
            hidden.append(stepper.hidden(other, IDS[first:last]))
        assert torch.allclose(torch.cat(hidden), stepper.hidden(stepper.begin(), IDS[:30]), rtol=1e-2, atol=1e-3)
    stepper.close()


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(each, marks=NEW) for each in ("qwen3_next", "jamba"))])
def test_a_conversation_that_does_not_fit_stays_whole(kind):
    """Neither its keys nor its states are lost where the last of them is of another form."""
    model = tiny_model(kind)
    wanted, stepper = whole(model, IDS), plain(model)
    with torch.inference_mode():
        first, second = stepper.begin(), stepper.begin()
        stepper.prefill(first, IDS[:5])
        stepper.prefill(second, IDS[:12])
        rooms = [StaticRoom(first, 64).enter, *([RowRoom(first, 2, 64).rows[0].enter] if kind == "llama" else [])]
        held = [each for layer in second.layers for each in [*kept_by_tokens(layer).items(), *enumerate(states_of(layer))]]
        for enter in rooms:
            last = [layer for layer in second.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)][-1]
            values, last.values = last.values, last.values[..., :3]
            with pytest.raises(RuntimeError):
                enter(second)
            last.values = values
            again = [each for layer in second.layers for each in [*kept_by_tokens(layer).items(), *enumerate(states_of(layer))]]
            assert second.elsewhere is None and str(again) == str(held)
        for at in range(12, 16):
            assert error(stepper.step(second, IDS[at]), wanted[at]) < 1e-4


@NEW
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [0.02, 0.1])
def test_states_in_modules_are_found_where_another_conversation_changes_little(seed, width):
    torch.manual_seed(seed)
    model = tiny_model("recurrent_gemma", wide=True)
    for each in model.parameters():
        each.data.normal_(0, width)
    stepper = TransformersStepper(model.to(torch.bfloat16))
    assert stepper._module_states is not None and stepper._keeps_cache
    alone, other = stepper.begin(), stepper.begin()
    wanted = [stepper.prefill(alone, IDS[:8]), *(stepper.step(alone, id).clone() for id in IDS[8:12])]
    beside = stepper.begin()
    found = [stepper.prefill(beside, IDS[:8])]
    for id in IDS[8:12]:
        stepper.prefill(other, IDS[3:9])
        found.append(stepper.step(beside, id).clone())
    assert torch.equal(torch.cat(found), torch.cat(wanted))
