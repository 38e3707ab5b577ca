"""Files of every writer of GPTQ weights: zeros and words as each stores them, and orders that cannot be.

The zeros of GPTQModel follow its utils/model.py (convert_gptq_v2_to_v1_format_module), those of AutoRound its
inference/backend.py and export; the tests store them so and expect the dense twin.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel, declared_kind
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.gptq import bit_packing, checkpoint

BORROWED = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
WORDS = {"int8": (torch.int8, 1), "int16": (torch.int16, 2), "int64": (torch.int64, 8)}


def rewrite(folder, alter, own=None, config=None):
    """Change the tensors of a folder, its quantize_config.json and its config.json."""
    state = load_file(folder / "model.safetensors")
    for name in list(state):
        state[name] = alter(name, state[name])
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors", {"format": "pt"}
    )
    if own is not None:
        path = folder / "quantize_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    if config is not None:
        (folder / "quantize_config.json").unlink()
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


def load(folder):
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map="cpu")


def difference(folder, twin):
    packed, _notes = load(folder)
    ids = torch.randint(0, 288, (1, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = twin(ids).logits.double(), packed(ids).logits.double()
    return float((found - wanted).norm() / wanted.norm())


def borrowed(bits):
    return lambda name, tensor: tensor - BORROWED[bits] if name.endswith(".qzeros") else tensor


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_subtracts_from_whole_words(bits, tmp_path):
    twin = tiny.write(tmp_path / "model", bits=bits, group_size=16, form="gptq_v2", sym=False)
    stored = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.qzeros"]
    assert bool((bit_packing.unpack_columns(stored, bits, 96) == 0).any()) or bits == 8  # something is borrowed
    rewrite(
        tmp_path / "model",
        borrowed(bits),
        {"checkpoint_format": "gptq", "meta": {"quantizer": ["optimum:1.24", "gptqmodel:7.6.0"]}},
    )
    assert difference(tmp_path / "model", twin) < 1e-5
    _packed, notes = load(tmp_path / "model")
    assert not notes  # all ones at the end of a word are no damage here


@pytest.mark.parametrize(("quantizer", "form"), [
    ("gptqmodel:7.6.0", "gptq_words"), ("gptqmodel:0.9.3", "gptq_words"), ("gptqmodel:0.8.1", "gptq"),
    ("autogptq:0.8.0", "gptq"), (None, "gptq"),
])  # fmt: skip
def test_the_writer_decides_how_zeros_of_the_first_format_are_read(quantizer, form):
    assert QuantizeConfig(bits=4, sym=False, quantizer=quantizer).zeros_format == form
    assert QuantizeConfig(bits=4, sym=False, quantizer=quantizer, checkpoint_format="gptq_v2").zeros_format == "gptq_v2"


@pytest.mark.parametrize(("packing", "form"), [
    ("auto_round", "gptq_v2"), ("auto_round:gptqmodel", "gptq_v2"), ("auto_round:auto_gptq", "gptq"), (None, "gptq"),
])  # fmt: skip
@pytest.mark.parametrize("bits", [2, 4])
def test_zeros_of_autoround_follow_its_packing_format(packing, form, bits, tmp_path):
    twin = tiny.write(tmp_path / "model", bits=bits, group_size=16, form=form, sym=False, act_order=False)
    given = {"quant_method": "auto-round", "bits": bits, "group_size": 16, "sym": False, "autoround_version": "0.16.1"}
    rewrite(tmp_path / "model", lambda name, tensor: tensor, config=given | ({"packing_format": packing} if packing else {}))
    assert LocalModel.read(tmp_path / "model").quantize.checkpoint_format == form
    assert difference(tmp_path / "model", twin) < 1e-5


@pytest.mark.parametrize(("packing", "kind"), [
    ("auto_round", "gptq"), ("auto_round:auto_gptq", "gptq"), ("auto_round:auto_awq", "awq"),
    ("auto_round:llm_compressor", "plain"),
])  # fmt: skip
def test_a_listing_tells_the_kind_of_an_autoround_model(packing, kind):
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": packing}
    assert declared_kind({"quantization_config": settings}, {}, {}) == kind


def as_words(kind):
    """The same stream of bits in words of another type."""
    dtype, size = WORDS[kind]

    def alter(name, tensor):
        if not name.endswith((".qweight", ".qzeros")):
            return tensor
        lines = tensor.T if name.endswith(".qweight") else tensor
        lines = torch.nn.functional.pad(lines.contiguous().view(torch.uint8), (0, -4 * lines.shape[1] % size)).view(dtype)
        return (lines.T if name.endswith(".qweight") else lines).contiguous()

    return alter


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize(("bits", "sym"), [(2, False), (4, True), (8, False)])
def test_words_of_every_width_are_read(kind, bits, sym, tmp_path):
    twin = tiny.write(tmp_path / "model", bits=bits, sym=sym)
    rewrite(tmp_path / "model", as_words(kind), {"pack_dtype": kind})
    model = LocalModel.read(tmp_path / "model")
    assert (model.quantize.bits, model.quantize.pack_dtype, model.quantize.sym) == (bits, kind, sym)
    assert not model.quantize.notes
    assert difference(tmp_path / "model", twin) < 1e-5


def test_gptqmodel_subtracts_32_bits_from_words_of_64(tmp_path):
    twin = tiny.write(tmp_path / "model", form="gptq_v2", sym=False)
    rewrite(tmp_path / "model", as_words("int64"))
    own = {"checkpoint_format": "gptq", "pack_dtype": "int64", "meta": {"quantizer": "gptqmodel:7.6.0"}}
    rewrite(tmp_path / "model", borrowed(4), own)
    assert difference(tmp_path / "model", twin) < 1e-5


def cast(part, dtype):
    return lambda name, tensor: tensor.to(dtype) if name.endswith(f".{part}") else tensor


def cut_words(name, tensor):
    return tensor.to(torch.int16) if name.endswith((".qweight", ".qzeros")) else tensor


@pytest.mark.parametrize(("alter", "says"), [
    (cast("qweight", torch.float32), "qweight is stored as F32; it must be I32"),
    (cast("qweight", torch.int16), "qweight as I16 and its qzeros as I32"),
    (cut_words, "words of 16 bits, the settings say pack_dtype nothing and 4 bits"),
    (cast("qzeros", torch.float32), "qzeros is stored as F32; it must be I32"),
    (cast("scales", torch.int32), "scales is stored as I32; it must be F16, BF16 or F32"),
    (cast("g_idx", torch.float32), "g_idx is stored as F32; it must be I32"),
    (cast("input_layernorm.weight", torch.int32), "input_layernorm.weight is stored as I32"),
    (lambda name, tensor: tensor[0].contiguous() if name.endswith(".qzeros") else tensor, "has 1 dimensions"),
    (lambda name, tensor: tensor[:-9].contiguous() if name.endswith(".g_idx") else tensor, "do not fit each other"),
])  # fmt: skip
def test_numbers_of_another_type_or_shape_are_refused(alter, says, tmp_path):
    tiny.write(tmp_path / "model")
    rewrite(tmp_path / "model", alter)
    model = LocalModel.read(tmp_path / "model")
    assert model.kind == "incomplete" and says in model.problem and model.problem.endswith(".")
    with pytest.raises(BadCheckpoint, match=r"."):
        checkpoint.load(model, dtype=torch.float32, device_map="cpu")


def test_an_order_of_inputs_that_cannot_be_is_ignored_with_a_note(tmp_path):
    twin = tiny.write(tmp_path / "model", act_order=False)
    rewrite(tmp_path / "model", lambda name, tensor: torch.zeros_like(tensor) if name.endswith(".g_idx") else tensor)
    assert difference(tmp_path / "model", twin) < 1e-5
    _packed, notes = load(tmp_path / "model")
    assert any("g_idx" in note and "ignored" in note for note in notes)


def test_with_act_order_it_is_refused(tmp_path):
    tiny.write(tmp_path / "model", act_order=True)
    rewrite(tmp_path / "model", lambda name, tensor: torch.zeros_like(tensor) if name.endswith(".g_idx") else tensor)
    with pytest.raises(BadCheckpoint, match="right order cannot be told"):
        load(tmp_path / "model")


@pytest.mark.parametrize(("g_idx", "groups", "possible"), [
    ([0, 0, 1, 1, 2], 3, True), ([2, 1, 0, 1, 0], 3, True), ([0, 0, 0, 0], 2, False), ([0, 0, 1, 1, 1], 2, False),
    ([0, 0, 0, 0], 1, True), ([0, 1, 1, 0, 0, 2, 2, 2], 3, False),
])  # fmt: skip
def test_possible_orders(g_idx, groups, possible):
    assert bit_packing.g_idx_is_possible(torch.tensor(g_idx), groups) == possible


def test_layers_of_several_widths_are_each_judged_by_their_own(tmp_path):
    """q_proj has 8 bits, the rest 4: symmetric all of them, in the first format."""
    twin = tiny.write(tmp_path / "model", act_order=False)
    eight, dense = tiny.random_layer(64, 64, 8, 32)
    layer = "model.layers.0.self_attn.q_proj"
    state = load_file(tmp_path / "model" / "model.safetensors")
    state |= {f"{layer}.{part}": tensor for part, tensor in eight.items()}
    first = min(name for name in state if name.endswith(".qweight"))
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    twin.model.layers[0].self_attn.q_proj.weight.data = dense
    quantize = LocalModel.read(tmp_path / "model").quantize
    assert first.startswith("model.layers.0") and quantize.notes == () and quantize.sym
    assert quantize.summary == "4- and 8-bit, group 32" and quantize.checkpoint_format == "gptq"
    assert difference(tmp_path / "model", twin) < 1e-5


def test_outputs_that_fill_no_whole_word_are_read(tmp_path):
    """60 outputs of 4 bits: the last word of the zeros has room left."""
    generator = torch.Generator().manual_seed(1)
    layer = bit_packing.pack(torch.randint(0, 16, (64, 60), generator=generator), 4)
    zeros = bit_packing.pack_columns(torch.full((2, 60), 7), 4)
    tensors = {
        "a.qweight": layer,
        "a.qzeros": zeros,
        "a.scales": torch.ones(2, 60).half(),
        "a.g_idx": torch.arange(64).int() // 32,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    from gptq_webui.core.models import tensors_of
    from gptq_webui.core.packed_layout import layout_of

    found = tensors_of([tmp_path / "model.safetensors"])
    layout = layout_of("a", found, 4)
    assert (layout.bits, layout.in_features, layout.out_features, layout.groups) == (4, 64, 60, 2)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert QuantizeConfig.read(tmp_path, found).notes == ()
