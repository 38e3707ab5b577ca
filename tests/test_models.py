"""What kind a folder is, from names, settings and tensors; every damage is a sentence, none an exception."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import MARKER, PARTIAL, LocalModel, choose_weights, is_model_folder, require_safetensors

Q = "model.layers.0.self_attn.q_proj"
SETTINGS = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
CONFIG = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}
GPTQ = {
    f"{Q}.qweight": np.zeros((64 * 4 // 32, 32), np.int32),
    f"{Q}.qzeros": np.full((2, 32 * 4 // 32), 0x77777777, np.int32),
    f"{Q}.scales": np.ones((2, 32), np.float16),
    f"{Q}.g_idx": (np.arange(64) // 32).astype(np.int32),
}
AWQ = {
    f"{Q}.qweight": np.zeros((64, 32 * 4 // 32), np.int32),
    f"{Q}.qzeros": np.zeros((2, 32 * 4 // 32), np.int32),
    f"{Q}.scales": np.ones((2, 32), np.float16),
}
PLANAR = {  # 5 bits, gptq_p
    **GPTQ,
    f"{Q}.qweight": np.zeros((64 * 5 // 32, 32), np.int32),
    f"{Q}.qzeros": np.zeros((2, 32 * 5 // 32), np.int32),
}
PLAIN = {f"{Q}.weight": np.zeros((32, 64), np.float16)}
EXL2 = {f"{Q}.q_weight": np.zeros((8, 32), np.int32), f"{Q}.q_invperm": np.zeros(64, np.int32)}
EXL3 = {f"{Q}.trellis": np.zeros((4, 2, 64), np.int16), f"{Q}.svh": np.zeros(32, np.float16)}


def make(folder: Path, tensors: dict[str, np.ndarray] | None = None, weights: str = "model.safetensors", **files: Any) -> Path:
    """Settings are given as keyword arguments: config={...} makes config.json."""
    folder.mkdir(exist_ok=True)
    if tensors is not None:
        save_file(tensors, folder / weights)
    for name, values in {"config": CONFIG, **files}.items():
        if values is not None:
            (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def read(folder: Path) -> LocalModel:
    assert is_model_folder(folder)
    return LocalModel.read(folder)


def quantised(values: dict[str, Any]) -> dict[str, Any]:
    return {**CONFIG, "quantization_config": values}


@pytest.mark.parametrize(
    ("tensors", "files", "kind", "badge"),
    [
        (GPTQ, {"quantize_config": SETTINGS}, "gptq", "GPTQ 4-bit, group 32"),
        (GPTQ, {"config": quantised(SETTINGS)}, "gptq", "GPTQ 4-bit, group 32"),
        (GPTQ, {"config": quantised({"bits": 4, "group_size": 32})}, "gptq", "GPTQ 4-bit, group 32"),
        (GPTQ, {}, "gptq", "GPTQ 4-bit, group 32"),
        (AWQ, {"config": quantised({"quant_method": "awq", "bits": 4})}, "awq", "AWQ 4-bit g32"),
        (AWQ, {"quant_config": {"w_bit": 4, "q_group_size": 32}}, "awq", "AWQ 4-bit g32"),
        (AWQ, {"quantize_config": {"bits": 4, "group_size": 32}}, "awq", "AWQ 4-bit g32"),
        (AWQ, {"config": quantised({"quant_method": "gptq", "bits": 4})}, "awq", "AWQ 4-bit g32"),
        (AWQ, {}, "awq", "AWQ 4-bit g32"),
        (EXL2, {"config": quantised({"quant_method": "exl2", "bits": 4.0})}, "exl2", "EXL2"),
        (EXL2, {}, "exl2", "EXL2"),
        (EXL3, {}, "exl3", "EXL3"),
        (PLAIN, {}, "plain", "16-bit"),
        ({f"{Q}.weight": np.zeros((32, 64), np.float32)}, {}, "plain", "32-bit"),
        *((PLAIN, {"config": quantised(values)}, "plain", badge) for values, badge in (
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
            ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
            ({"quant_method": "fbgemm_fp8"}, "FP8"),
            ({"quant_method": "hqq", "quant_config": {}}, "HQQ"),
            ({"quant_method": "mxfp4"}, "MXFP4"),
            ({"quant_method": "aqlm", "in_group_size": 8}, "AQLM"),
            ({"quant_method": "novel\x1b[2J", "bits": 3}, "novel\\x1b[2J 3-bit"),
            ({"something": 1}, "quantised by an unknown method"),
        )),
        (PLAIN, {"config": {**CONFIG, "quantization": {"group_size": 64, "bits": 4}}}, "plain", "MLX 4-bit"),
        (PLANAR, {"config": quantised({**SETTINGS, "bits": 5})}, "gptq_p", "GPTQ 5-bit, group 32 (gptq_p)"),
        (PLANAR, {"quantize_config": {**SETTINGS, "bits": 5}}, "gptq_p", "GPTQ 5-bit, group 32 (gptq_p)"),
        (GPTQ, {"config": quantised({**SETTINGS, "format": "gptq_p"})}, "gptq", "GPTQ 4-bit, group 32"),
        (PLAIN, {"config": None, "adapter_config": {"r": 8}}, "lora", "LoRA"),
    ],
)  # fmt: skip
def test_kind_and_badge(tmp_path: Path, tensors: dict[str, np.ndarray], files: dict[str, Any], kind: str, badge: str) -> None:
    model = read(make(tmp_path / "m", tensors, **files))
    assert (model.kind, model.badge, model.problem) == (kind, badge, "")
    assert (model.quantize is not None) == model.is_packed


def test_marlin_files_are_gptq_of_another_layout(tmp_path: Path) -> None:
    tensors = {f"{Q}.B": np.zeros((4, 64), np.int32), f"{Q}.s": np.ones((2, 32), np.float16)}
    model = read(make(tmp_path, tensors, config=CONFIG, quantize_config={**SETTINGS, "is_marlin_format": True}))
    assert model.kind == "gptq" and model.quantize is not None and model.quantize.checkpoint_format == "marlin"


def test_gguf_folder(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(96))
    model = read(tmp_path)
    assert (model.kind, model.badge, model.size_bytes) == ("gguf", "GGUF", 100)


def test_2023_layout_is_read(tmp_path: Path) -> None:
    model = read(make(tmp_path / "m", GPTQ, "gptq_model-4bit-32g.safetensors", quantize_config={"bits": 4, "group_size": 32}))
    assert model.kind == "gptq" and [path.name for path in model.weights] == ["gptq_model-4bit-32g.safetensors"]


def test_facts_of_the_panel(tmp_path: Path) -> None:
    model = read(make(tmp_path / "me_model", GPTQ, quantize_config=SETTINGS))
    assert (model.name, model.context_tokens, model.architecture) == ("me_model", 4096, "LlamaForCausalLM")
    assert model.size_bytes == (tmp_path / "me_model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": None}, None),
        ({"model_type": "mpt", "max_position_embeddings": 4096, "max_seq_len": 2048}, 2048),
        ({"model_type": "gptj", "max_position_embeddings": 1024, "n_positions": 4096}, 1024),
        ({"model_type": "mpt", "max_position_embeddings": 4096}, 4096),
        ({"model_type": ["mpt"], "n_positions": 1024}, 1024),
    ],
)
def test_context_is_found_under_its_several_names(tmp_path: Path, config: dict[str, Any], tokens: int | None) -> None:
    assert read(make(tmp_path / "m", PLAIN, config={"model_type": "x", **config})).context_tokens == tokens


def test_notes_tell_of_settings_that_disagree(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", GPTQ, quantize_config={**SETTINGS, "group_size": 128}, config=quantised(SETTINGS))
    quantize = read(folder).quantize
    assert quantize is not None and quantize.group_size == 32
    assert "group_size is 128 in quantize_config.json and 32 in config.json" in quantize.notes


# incomplete and damaged


def incomplete(folder: Path) -> str:
    model = read(folder)
    assert model.kind == "incomplete" and model.badge == "incomplete" and "\n" not in model.problem
    return model.problem


def test_a_truncated_file_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", GPTQ, quantize_config=SETTINGS)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors was cut short" in incomplete(folder)


def test_a_truncated_shard_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", GPTQ, "model-00001-of-00002.safetensors", quantize_config=SETTINGS)
    make(folder, PLAIN, "model-00002-of-00002.safetensors")
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert "model-00002-of-00002.safetensors" in incomplete(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", GPTQ, "model-00001-of-00006.safetensors", quantize_config=SETTINGS)
    text = incomplete(folder)
    assert "model-00002-of-00006.safetensors" in text and "and 2 more" in text and "00001" not in text


def test_an_unfinished_download_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", GPTQ, quantize_config=SETTINGS)
    (folder / f"model-2.safetensors{PARTIAL}").write_bytes(b"")
    assert "continues where it stopped" in incomplete(folder)


@pytest.mark.parametrize(
    ("tensors", "files", "says"),
    [
        (None, {}, "no weights"),
        (GPTQ, {"config": None, "quantize_config": SETTINGS}, "config.json is missing"),
        (PLAIN, {"quantize_config": SETTINGS}, "hold no packed GPTQ weights"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, tensors: Any, files: dict[str, Any], says: str) -> None:
    assert says in incomplete(make(tmp_path / "m", tensors, **files))


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff[", "\x00"])
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "quant_config.json"])
def test_damaged_settings_are_named(tmp_path: Path, name: str, text: str) -> None:
    folder = make(tmp_path / "m", PLAIN)
    (folder / name).write_text(text, encoding="utf-8")
    assert name in incomplete(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": [1]},
        {"quantization_config": "gptq"},
        {"quantization_config": {"quant_method": ["gptq"], "bits": {}}},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [None]},
        {"architectures": {}},
        {"text_config": 3},
        {"max_position_embeddings": "many"},
    ],
)
@pytest.mark.parametrize("tensors", [GPTQ, PLAIN])
def test_strange_settings_never_raise(tmp_path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    LocalModel.read(make(tmp_path / "m", tensors, config={**CONFIG, **config}))


@pytest.mark.parametrize("shape", [(), (4,), (0, 0)])
def test_strange_tensors_never_raise(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {f"{Q}.{name}": np.zeros(shape, np.int32) for name in ("qweight", "qzeros", "scales", "g_idx")}
    LocalModel.read(make(tmp_path / "m", tensors, quantize_config=SETTINGS))


def test_what_is_a_model_folder(tmp_path: Path) -> None:
    assert not is_model_folder(tmp_path) and not is_model_folder(tmp_path / "missing")
    (tmp_path / "picture.png").write_bytes(b"")
    assert not is_model_folder(tmp_path)
    (tmp_path / MARKER).write_text("{}")
    assert is_model_folder(tmp_path)


# which of several files


@pytest.mark.parametrize(
    ("names", "named", "chosen", "missing"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"], []),
        (["pytorch_model.bin", "model.pt"], None, ["pytorch_model.bin"], []),
        (["b.safetensors", "model.safetensors"], None, ["model.safetensors"], []),
        (["b.safetensors", "model.safetensors"], "b", ["b.safetensors"], []),
        (["a.safetensors", "large.safetensors"], None, ["large.safetensors"], []),
        (["training_args.bin", "optimizer.pt"], None, [], []),
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "consolidated.safetensors"], None,
         ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], []),
        (["m-00001-of-00002.safetensors", "model.safetensors"], None, ["model.safetensors"], []),
        (["m-00002-of-00002.safetensors"], None, ["m-00002-of-00002.safetensors"], ["m-00001-of-00002.safetensors"]),
        ([], None, [], []),
    ],
)  # fmt: skip
def test_choice_of_weights(names: list[str], named: str | None, chosen: list[str], missing: list[str]) -> None:
    assert choose_weights({name: len(name) for name in names}, named) == (chosen, missing)


def test_gptq_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", None, quantize_config=SETTINGS)
    (folder / "gptq_model-4bit.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadCheckpoint, match="can run code"):
        require_safetensors(read(folder))


def test_shards_of_a_thousand_sets_cost_no_memory(tmp_path: Path) -> None:
    """Each file may claim to be one of 99,999."""
    folder = make(tmp_path / "model", GPTQ, quantize_config=SETTINGS)
    (folder / "model.safetensors").unlink()
    sizes = {f"s{at}-00001-of-{99_999 - at:05}.safetensors": 1 for at in range(1000)}
    for name in list(sizes)[:3]:
        (folder / name).touch()
    _files, missing = choose_weights(sizes)
    assert len(missing) == 100_000
    assert "missing. Download the model again" in read(folder).problem


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config": {**CONFIG, "rope_theta": 10**400}}, "says rope_theta 10000"),
        ({"config": {**CONFIG, "rms_norm_eps": 10**400}}, "says rms_norm_eps 10000"),
        ({"config": quantised({"quant_method": "gptq", "bits": [5], "format": "gptq_p"})}, "gptq_p with [5] bits"),
    ],
)  # fmt: skip
def test_a_number_of_any_size_or_type_is_named(tmp_path: Path, files: dict[str, Any], says: str) -> None:
    assert says in read(make(tmp_path / "model", GPTQ, **files)).problem


@pytest.mark.parametrize("values", [{"damp_percent": 10**400}, {"damp_percent": True}, {"meta": {"quantizer": {"a": 1}}}])
def test_what_nothing_is_computed_from_costs_nothing(tmp_path: Path, values: dict[str, Any]) -> None:
    found = read(make(tmp_path / "model", GPTQ, quantize_config={**SETTINGS, **values}, config={**CONFIG, "architectures": {}}))
    assert found.kind == "gptq" and found.quantize is not None
    assert found.quantize.damp_percent is None and found.quantize.quantizer is None


def test_what_a_layer_says_of_bits_may_be_anything(tmp_path: Path) -> None:
    weights = {"num_bits": [4], "strategy": {}, "type": "int"}
    group = {"format": "pack-quantized", "weights": weights}
    found = read(make(tmp_path / "model", PLAIN, config=quantised(
        {"quant_method": "compressed-tensors", "config_groups": {"a": group}})))  # fmt: skip
    assert found.kind == "compressed-tensors" and "compressed-tensors with [4] bits" in found.problem
