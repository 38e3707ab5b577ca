"""gptq/direct_weights.py: packed layers take their tensors from the files themselves, and transformers does not see those."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import modeling_utils

import tiny
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.core.safetensors_header import headers_kept, read_header
from gptq_webui.gptq import checkpoint, direct_weights, packed_quantizer
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.module_names import module_names_of

FIVE = pytest.mark.skipif(not hasattr(modeling_utils, direct_weights._LOADS), reason="transformers 4 loads in another manner")


def load(folder, device_map="cpu"):
    return checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map=device_map)


@pytest.fixture
def seen(monkeypatch):
    """The names that transformers is given."""
    names, before = [], getattr(modeling_utils, direct_weights._LOADS)

    def load(model, state_dict, load_config, *args, **named):
        names.extend(state_dict)
        return before(model, state_dict, load_config, *args, **named)

    monkeypatch.setattr(modeling_utils, direct_weights._LOADS, load)
    return names


@FIVE
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_transformers_sees_no_packed_tensor_and_every_layer_has_its_own(kind, device_map, seen, tmp_path):
    tiny.write(tmp_path, kind)
    hf, _notes = load(tmp_path, device_map)
    assert seen and not [each for each in seen if each.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))]
    stored = load_file(tmp_path / "model.safetensors")
    names = module_names_of([name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")], hf)
    assert len(names) == sum(isinstance(each, GPTQLinear) for each in hf.modules()) > 3
    for name, place in names.items():
        layer = hf.get_submodule(place)
        assert all(
            torch.equal(getattr(layer, part), stored[f"{name}.{part}"]) for part in ("qweight", "qzeros", "scales", "g_idx")
        )
    assert not [name for name, each in hf.named_parameters() if each.is_meta]
    assert hasattr(modeling_utils, direct_weights._LOADS) and getattr(modeling_utils, direct_weights._LOADS).__name__ == "load"


@FIVE
def test_logits_are_the_same_where_transformers_fills_the_layers(tmp_path, monkeypatch):
    tiny.write(tmp_path, "mixtral", shards=2)
    ids = torch.randint(3, 60, (1, 9))
    with torch.inference_mode():
        found = load(tmp_path)[0](ids).logits
        monkeypatch.setattr(direct_weights, "_TAKES", ["another", "manner"])
        assert torch.equal(load(tmp_path)[0](ids).logits, found)


@FIVE
def test_what_belongs_to_the_disk_or_has_another_shape_is_left(tmp_path):
    layer = GPTQLinear(64, 32, 4, 32, bias=True, device="meta")
    tensors, _dense = tiny.random_layer(64, 32, 4, 32)
    held = {f"a.b.{part}": each for part, each in tensors.items()} | {"a.b.bias": torch.zeros(5), "c": torch.zeros(1)}
    assert direct_weights.fill([("a.b", "m.a.b", layer)], dict(held), {"": "cpu", "m.a": "disk"}) == set()
    assert direct_weights.fill([("a.b", "m.a.b", layer)], dict(held), {"other": "cpu"}) == set()
    assert layer.qweight.is_meta
    left = dict(held)
    filled = direct_weights.fill([("a.b", "m.a.b", layer)], left, {"": "disk", "m.a": "cpu"})
    assert filled == {f"m.a.b.{part}" for part in tensors} and set(left) == {"a.b.bias", "c"}
    assert layer.bias.is_meta and not any(each.requires_grad for each in layer.parameters())


@FIVE
def test_a_load_that_began_first_and_ends_first_leaves_nothing_behind_and_the_other_goes_on():
    before = getattr(modeling_utils, direct_weights._LOADS)
    first, second = direct_weights.filled_directly(), direct_weights.filled_directly()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert getattr(modeling_utils, direct_weights._LOADS) is not before
    second.__exit__(None, None, None)
    assert getattr(modeling_utils, direct_weights._LOADS) is before


@pytest.mark.parametrize("form", [set, lambda keys: SimpleNamespace(missing_keys=set(keys))], ids=["5.0", "later"])
def test_what_is_filled_is_not_missing_in_either_form_of_the_report(form):
    layer = GPTQLinear(64, 32, 4, 32, bias=False, device="meta")
    tensors, _dense = tiny.random_layer(64, 32, 4, 32)
    held = {f"a.{part}": each for part, each in tensors.items()} | {"c": torch.zeros(1)}
    load_config = SimpleNamespace(hf_quantizer=SimpleNamespace(direct=[("a", "a", layer)]), device_map=None)
    loads = direct_weights._filling(lambda model, left, _config, **_named: (form({"d", *held} - set(left)), None))
    found = loads(model=None, state_dict=held, load_config=load_config)[0]
    assert getattr(found, "missing_keys", found) == {"d"}


def test_packed_layers_that_are_made_dense_are_freed(tmp_path, monkeypatch):
    packed, complete = [], checkpoint.complete

    def watched(loaded, *others):
        packed.extend(weakref.ref(each) for each in loaded.modules() if isinstance(each, GPTQLinear))
        return complete(loaded, *others)

    monkeypatch.setattr(checkpoint, "complete", watched)
    monkeypatch.setattr(packed_quantizer, "stays_dense", lambda _module, _model, place: place.endswith("down_proj"))
    tiny.write(tmp_path, "llama")
    hf, _notes = load(tmp_path)
    gc.collect()
    assert type(hf.model.layers[0].mlp.down_proj) is nn.Linear
    assert sum(each() is None for each in packed) == len(hf.model.layers)


def test_a_tensor_that_is_missing_is_still_missed(tmp_path):
    tiny.write(tmp_path, "llama")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"lack 1 tensor that its config\.json asks for, model\.norm\.weight"):
        load(tmp_path)


def test_a_layer_without_order_or_bias_is_completed(tmp_path):
    tiny.write(tmp_path, "gpt2", g_idx=False, act_order=False)
    hf, _notes = load(tmp_path)
    layer = hf.transformer.h[0].mlp.c_fc
    assert layer.g_idx.tolist() == [at // 32 for at in range(layer.in_features)]


def test_a_header_is_read_once_while_it_is_kept_and_again_when_the_file_changes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    assert read_header(path) is not read_header(path)
    with headers_kept():
        first = read_header(path)
        with headers_kept():
            assert read_header(path) is first
        assert read_header(path) is first
        save_file({"a": torch.zeros(3), "b": torch.zeros(400)}, path)
        assert set(read_header(path)) == {"a", "b"}
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(BadCheckpoint, match="cut short"):
            read_header(path)
    path.write_bytes(json.dumps({}).encode())
    with pytest.raises(BadCheckpoint):
        read_header(path)
