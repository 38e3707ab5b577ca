"""What the two settings files say, merged and checked against tiny real tensors."""

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptq_webui.core.errors import BadCheckpoint, BadFile, BadQuantizeConfig
from gptq_webui.core.folder_files import read_json
from gptq_webui.core.models import tensors_of
from gptq_webui.core.quantize_config import QuantizeConfig

AUTOGPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": True, "sym": True, "true_sequential": True}
IN, OUT = 128, 64  # in- and out-features of the one layer


def pack_repeated(value: int, bits: int, count: int) -> np.ndarray:
    """`count` times the same value, packed low bits first into int32 words; written from the format."""
    stream = sum(value << (bits * at) for at in range(count))
    return np.array([(stream >> (32 * at)) & 0xFFFFFFFF for at in range(count * bits // 32)], np.uint32).view(np.int32)


def layer(
    bits: int, group_size: int, act_order: bool = False, zero: int | None = None, v2: bool = False
) -> dict[str, np.ndarray]:
    groups = 1 if group_size == -1 else IN // group_size
    stored = (1 << (bits - 1) if zero is None else zero) - (0 if v2 else 1)
    row = pack_repeated(stored, bits, OUT)
    size = IN if group_size == -1 else group_size
    order = np.random.default_rng(0).permutation(IN) if act_order else np.arange(IN)
    name = "model.layers.0.self_attn.q_proj"
    return {
        f"{name}.qweight": np.zeros((IN * bits // 32, OUT), np.int32),
        f"{name}.qzeros": np.tile(row, (groups, 1)),
        f"{name}.scales": np.ones((groups, OUT), np.float16),
        f"{name}.g_idx": (order // size).astype(np.int32),
    }


def read(folder: Path, tensors: Mapping[str, np.ndarray], own: Any = None, config: Any = None) -> QuantizeConfig:
    save_file(dict(tensors), folder / "model.safetensors")
    if own is not None:
        (folder / "quantize_config.json").write_text(json.dumps(own))
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return QuantizeConfig.read(folder, tensors_of([folder / "model.safetensors"]))


def test_autogptq_file() -> None:
    config = QuantizeConfig.from_json(AUTOGPTQ)
    assert (config.bits, config.group_size, config.desc_act, config.sym, config.damp_percent) == (4, 32, True, True, 0.1)
    assert config.summary == "4-bit, group 32, act-order"


def test_gptqmodel_file() -> None:
    config = QuantizeConfig.from_json(
        {"bits": 4, "group_size": 128, "desc_act": False, "sym": False, "quant_method": "gptq", "checkpoint_format": "gptq_v2",
         "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05}}
    )  # fmt: skip
    assert (config.checkpoint_format, config.quantizer, config.damp_percent) == ("gptq_v2", "gptqmodel:7.6.0", 0.05)
    assert config.summary == "4-bit, group 128, asymmetric"


def test_missing_group_size_means_what_its_writer_meant() -> None:
    assert QuantizeConfig.from_json({"bits": 4}).group_size == -1
    assert QuantizeConfig.from_json({"bits": 4, "quant_method": "gptq"}).group_size == 128


@pytest.mark.parametrize("bits", [None, 5, "4", 4.5, 0, [4]])
def test_bits_nobody_could_load_are_refused(bits: object) -> None:
    with pytest.raises(BadQuantizeConfig, match="bits is"):
        QuantizeConfig.from_json({"bits": bits})


@pytest.mark.parametrize("group_size", [0, -2, "128", 1.5, True, 1 << 31, 10**30])
def test_group_sizes_nobody_could_load_are_refused(group_size: object) -> None:
    with pytest.raises(BadQuantizeConfig, match="group_size is"):
        QuantizeConfig.from_json({"bits": 4, "group_size": group_size})


def test_what_is_written_is_read_as_the_same() -> None:
    config = QuantizeConfig(bits=3, group_size=64, desc_act=True, sym=False, checkpoint_format="gptq_v2", damp_percent=0.01)
    assert QuantizeConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_true_settings_are_confirmed_without_a_note(
    tmp_path: Path, bits: int, group_size: int, act_order: bool, v2: bool
) -> None:
    form = "gptq_v2" if v2 else "gptq"
    own = {**AUTOGPTQ, "bits": bits, "group_size": group_size, "desc_act": act_order, "checkpoint_format": form}
    config = read(tmp_path, layer(bits, group_size, act_order, v2=v2), own)
    assert (config.bits, config.group_size, config.desc_act, config.sym, config.checkpoint_format, config.notes) == (
        bits, group_size, act_order, True, form, (),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_without_settings_the_tensors_tell(tmp_path: Path, bits: int, group_size: int) -> None:
    config = read(tmp_path, layer(bits, group_size))
    assert (config.bits, config.group_size, config.sym) == (bits, group_size, True)
    assert config.notes and config.notes[0].startswith("read from the tensors")


@pytest.mark.parametrize(
    ("wrong", "tensors", "note"),
    [
        ({"bits": 8}, {"bits": 4, "group_size": 32}, "the settings say 8 bits, the tensors have 4"),
        ({"group_size": 128}, {"bits": 4, "group_size": 32}, "the settings say group_size 128, the tensors have 32"),
        ({"group_size": -1}, {"bits": 4, "group_size": 32}, "the settings say group_size -1, the tensors have 32"),
        ({"desc_act": False}, {"bits": 4, "group_size": 32, "act_order": True},
         "the settings say no act-order, the tensors have it"),
        ({"sym": True}, {"bits": 4, "group_size": 32, "zero": 5}, "the settings say symmetric, the tensors are not"),
        ({}, {"bits": 4, "group_size": 32, "v2": True}, "the settings say format gptq, the tensors are gptq_v2"),
    ],
)  # fmt: skip
def test_wrong_settings_are_amended_and_reported(tmp_path: Path, wrong: Any, tensors: Any, note: str) -> None:
    config = read(tmp_path, layer(**tensors), {**AUTOGPTQ, "desc_act": False, **wrong})
    assert note in config.notes
    truth = {"bits": config.bits, "group_size": config.group_size}
    assert truth == {key: tensors[key] for key in truth}


def test_settings_in_config_json_alone_are_enough(tmp_path: Path) -> None:
    config = read(tmp_path, layer(4, 32), config={**AUTOGPTQ, "quant_method": "gptq", "desc_act": False})
    assert config.summary == "4-bit, group 32" and config.notes == ()


def test_two_files_that_disagree_are_reported_and_the_tensors_decide(tmp_path: Path) -> None:
    config = read(tmp_path, layer(4, 32), {**AUTOGPTQ, "group_size": 128}, {**AUTOGPTQ, "group_size": 32})
    assert config.group_size == 32
    assert "group_size is 128 in quantize_config.json and 32 in config.json" in config.notes


def test_settings_of_another_shape_do_not_break_the_reader(tmp_path: Path) -> None:
    for config in ([], "gptq", 4, None):
        assert read(tmp_path, layer(4, 32), AUTOGPTQ, config).bits == 4


def test_neither_settings_nor_tensors_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadQuantizeConfig, match="bits is None"):
        QuantizeConfig.read(tmp_path)


def test_tensors_of_no_known_shape_are_refused(tmp_path: Path) -> None:
    tensors = layer(4, 32)
    tensors["model.layers.0.self_attn.q_proj.qzeros"] = np.zeros((4, 10), np.int32)
    with pytest.raises(BadCheckpoint, match="do not have the shapes"):
        read(tmp_path, tensors, AUTOGPTQ)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_settings_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "quantize_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadFile, match=r"quantize_config\.json"):
        read_json(tmp_path / "quantize_config.json")
    assert read_json(tmp_path / "missing.json") == {}


@pytest.mark.parametrize("name", ["checkpoint_format", "pack_dtype", "format"])
def test_names_of_strangers_are_printable_and_short(name):
    config = QuantizeConfig.from_json({"bits": 4, "group_size": 32, name: "\x1b[2J" + "x" * 5000})
    for found in (config.checkpoint_format, config.pack_dtype or "", config.summary):
        assert found.isprintable() and len(found) < 100


@pytest.mark.parametrize("text", ["false", "False", "no", "0", ""])
def test_a_switch_may_be_a_text(text: str) -> None:
    values = {"bits": 4, "group_size": 32, "desc_act": text, "sym": text, "is_marlin_format": text}
    found = QuantizeConfig.from_json(values)
    assert not found.desc_act and not found.sym and found.checkpoint_format == "gptq"
    assert QuantizeConfig.from_json({**values, "desc_act": "true", "sym": "yes"}).desc_act


def test_notes_show_values_of_strangers_short_and_printable(tmp_path: Path) -> None:
    tensors = layer(4, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({**AUTOGPTQ, "desc_act": "\x1b[2J\u202e" + "A" * 10_000}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {**AUTOGPTQ, "desc_act": False}}))
    notes = QuantizeConfig.read(tmp_path, tensors_of([tmp_path / "model.safetensors"])).notes
    assert notes and all(note.isprintable() and len(note) < 150 for note in notes)


def test_zeros_and_orders_of_any_size_are_not_held_in_memory(tmp_path: Path) -> None:
    """A file of strangers may have gigabytes of them: a gigabyte of g_idx took 10 GB while the folder was listed."""
    inputs, name = 1 << 22, "model.layers.0.self_attn.q_proj"
    order = np.zeros(inputs, np.int32)
    order[:] = np.arange(inputs) // 32
    tensors = {
        f"{name}.qweight": np.zeros((inputs // 8, 8), np.int32),
        f"{name}.qzeros": np.full((inputs // 32, 1), 0x77777777, np.int32),
        f"{name}.scales": np.ones((inputs // 32, 8), np.float16),
        f"{name}.g_idx": order,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    found = tensors_of([tmp_path / "model.safetensors"])
    tracemalloc.start()
    try:
        assert QuantizeConfig.read(tmp_path, found).group_size == 32
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
