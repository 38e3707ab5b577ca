"""A model divided among ranks, which are threads here: together they compute what the whole model does."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.folder_files import read_json
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq.parallel import model_share, rank_group
from gptq_webui.gptq.parallel.divided_layers import sum_outputs
from gptq_webui.gptq.parallel.dividing import fullest_share, why_not
from gptq_webui.gptq.parallel.rank_group import Parted, RankGroup
from gptq_webui.gptq.parallel.rank_stepper import RankStepper

CPU = torch.device("cpu")
WIDE = {**tiny._LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128, "intermediate_size": 256}
IDS = [5, 9, 200, 7, 3, 8, 4, 6, 31, 2]


def together(folder: Path, ranks: int, work, dtype=torch.float32):
    """What `work(stepper)` gives for each rank."""
    meeting = folder / f"meeting-{ranks}"
    meeting.mkdir()

    def rank(number: int):
        group = RankGroup(number, ranks)
        hf, _notes = model_share.load(LocalModel.read(folder / "model"), group, dtype=dtype, device=CPU)
        sum_outputs(hf, group)
        group.join(meeting, CPU)
        try:
            with torch.inference_mode():
                return work(RankStepper(hf))
        finally:
            group.close()

    with ThreadPoolExecutor(ranks) as pool:
        return [each.result(120) for each in [pool.submit(rank, number) for number in range(ranks)]]


def logits_of(stepper):
    """Of a prompt in two pieces and one more token, and of a fork."""
    memory = stepper.begin()
    stepper.prefill(memory, IDS[:4])
    first = stepper.all_logits(memory, IDS[4:])
    fork = memory.fork(5)
    assert fork is not None
    return torch.cat([first, stepper.step(memory, 11), stepper.prefill(fork, [12, 13])])


def expected(twin):
    with torch.inference_mode():
        first = twin(torch.tensor([[*IDS, 11]])).logits[0, 4:]
        return torch.cat([first, twin(torch.tensor([[*IDS[:5], 12, 13]])).logits[0, -1:]])


def require_same(found, twin):
    wanted = expected(twin)
    for each in found:
        assert each.shape == wanted.shape and (each - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "vocab_size": 290}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 2, "head_dim": 32}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("phi3", {"pad_token_id": 0}),
    ],
    ids=lambda each: each if isinstance(each, str) else "-".join(each) or "plain",
)
@pytest.mark.parametrize("act_order", (False, True), ids=("in order", "act-order"))
def test_the_ranks_together_compute_the_model(tmp_path, monkeypatch, kind, more, ranks, act_order):
    monkeypatch.setitem(tiny.ARCHITECTURES, kind, {**WIDE, **more})
    twin = tiny.write(tmp_path / "model", kind, act_order=act_order, sym=False)
    require_same(together(tmp_path, ranks, logits_of), twin)


@pytest.mark.parametrize("bits", (2, 3, 8))
def test_other_widths(tmp_path, monkeypatch, bits):
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", WIDE)
    twin = tiny.write(tmp_path / "model", bits=bits, form="gptq_v2", sym=False)
    require_same(together(tmp_path, 2, logits_of), twin)


def test_heads_and_groups_that_do_not_divide_evenly(tmp_path, monkeypatch):
    """3 key heads for 2 ranks, groups that reach over the border of the heads, a last group that is short."""
    odd = {
        **WIDE,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "hidden_size": 144,
        "intermediate_size": 232,
    }
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", odd)
    twin = tiny.write(tmp_path / "model", group_size=40, bits=8)
    require_same(together(tmp_path, 2, logits_of), twin)


def test_a_16_bit_model(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ARCHITECTURES, "qwen2", WIDE)
    twin = tiny.dense_model("qwen2")
    twin.half().save_pretrained(tmp_path / "model")
    require_same(together(tmp_path, 2, logits_of), twin.float())


def test_several_files(tmp_path):
    twin = tiny.write(tmp_path / "model", shards=3)
    require_same(together(tmp_path, 2, logits_of), twin)


def test_hidden_states_are_those_of_the_model(tmp_path):
    twin = tiny.write(tmp_path / "model")
    found = together(tmp_path, 2, lambda stepper: stepper.hidden(stepper.begin(), IDS))
    with torch.inference_mode():
        wanted = twin(torch.tensor([IDS]), output_hidden_states=True).hidden_states[-1][0]
    assert all((each - wanted).norm() / wanted.norm() < 1e-5 for each in found)


def test_a_tensor_without_a_place_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(path), "model.layers.0.mlp.extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"hold model\.layers\.0\.mlp\.extra\.weight, which has no place"):
        model_share.load(LocalModel.read(tmp_path / "model"), RankGroup(0, 2), dtype=torch.float32, device=CPU)


def test_a_place_without_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.write(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"lack model\.layers\.1\.input_layernorm\.weight"):
        model_share.load(LocalModel.read(tmp_path / "model"), RankGroup(0, 2), dtype=torch.float32, device=CPU)


def test_a_rank_that_does_not_come_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_group, "_WAIT_S", 1.0)
    with pytest.raises(Parted):
        RankGroup(0, 2).join(tmp_path, CPU)


def test_a_rank_that_leaves_ends_the_sum_of_the_others(tmp_path):
    there = threading.Barrier(2)

    def leave():
        group = RankGroup(1, 2)
        group.join(tmp_path, CPU)
        there.wait(60)
        group.close()

    other = threading.Thread(target=leave)
    other.start()
    group = RankGroup(0, 2)
    group.join(tmp_path, CPU)
    there.wait(60)
    other.join()
    with pytest.raises(Parted):
        group.sum(torch.ones(4))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "knows models of the kinds llama, mistral, .*, and this one is gpt2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rotary positions \(dynamic\) depend on the length"),
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            "cannot be divided among 4 GPUs. Set tensor_parallel to 2, 3 or 6",
        ),
        ({}, ""),
    ],
)
def test_what_cannot_be_divided_is_refused_in_words(tmp_path, config, words):
    import re

    tiny.write(tmp_path / "model")
    values = read_json(tmp_path / "model" / "config.json") | config
    why, _cure = why_not(LocalModel.read(tmp_path / "model"), values, 4)
    assert re.search(words, why) if words else why == ""


def test_the_fullest_share_is_counted(tmp_path, monkeypatch):
    odd = {**WIDE, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144}
    monkeypatch.setitem(tiny.ARCHITECTURES, "llama", odd)
    tiny.write(tmp_path / "model")
    weights, conversation = fullest_share(LocalModel.read(tmp_path / "model"), 2)
    assert weights == pytest.approx((1 + 6 / 9) / 3) and conversation == pytest.approx(2 / 3)
    assert fullest_share(LocalModel.read(tmp_path / "model"), 4) == (0.25, 0.25)  # cannot be divided


def test_a_rank_never_goes_on_without_the_others(tmp_path):
    alone = RankGroup(0, 2)
    for each in (lambda: alone.sum(torch.ones(4)), lambda: alone.gather(torch.ones(4))):
        with pytest.raises(Parted, match="together with the others"):
            each()
    one = torch.ones(4)
    RankGroup(0, 1).sum(one)
    assert torch.equal(one, torch.ones(4))
