"""Which files are taken, and which repositories are named for what they are instead."""

from typing import Any

import pytest

from gptq_webui.core.errors import WrongRepository
from gptq_webui.core.model_ref import ModelRef
from gptq_webui.hub.file_selection import FileSelection, parse_settings, select_by_name, select_files, settings_needed
from gptq_webui.hub.repository import Listing, RemoteFile

GPTQ = {"bits": 4, "group_size": 32, "desc_act": True, "damp_percent": 0.1, "sym": True}
TOKENIZER = [
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "qwen.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
]  # fmt: skip
MODEL_CARD = ["README.md", "LICENSE.txt", "LICENSE", "Notice"]
SETTINGS = ["config.json", "generation_config.json", "quantize_config.json"]


def listing(*names: str, ref: str = "TheBloke/Model-7B-GPTQ", **sizes: int) -> Listing:
    files = tuple(RemoteFile(name, sizes.get(name.split(".")[0], 1000), None, "0" * 40) for name in names)
    return Listing(ModelRef.parse(ref), "c" * 40, files)


def chosen(found: Listing, settings: dict[str, Any] | None = None, **how: bool) -> FileSelection:
    return select_files(found, settings or {"quantize_config.json": GPTQ, "config.json": {}}, **how)


def names(selection: FileSelection) -> set[str]:
    return {file.path for file in selection.files}


def refused(found: Listing, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(WrongRepository) as caught:
        select_files(found, settings or {})
    return str(caught.value)


def test_every_tokenizer_template_and_settings_file_is_taken() -> None:
    every = ["gptq_model-4bit-32g.safetensors", *SETTINGS, *TOKENIZER, *MODEL_CARD]
    assert names(chosen(listing(*every))) == set(every)


def test_duplicates_in_other_formats_are_left() -> None:
    junk = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack",
        "original/consolidated.00.pth", "original/params.json", "rust_model.ot", ".gitattributes", ".gptq-webui.json",
        "training_args.bin", "trainer_state.json", "runs/log.txt", "image.png", "model.gguf", "modeling_x.py", "requirements.txt",
    ]  # fmt: skip
    assert names(chosen(listing("model.safetensors", *SETTINGS, *junk))) == {"model.safetensors", *SETTINGS}


def test_shards_come_with_their_index_and_nothing_of_the_bin_twin() -> None:
    shards = [f"model-0000{at}-of-00002.safetensors" for at in (1, 2)]
    twin = [f"pytorch_model-0000{at}-of-00002.bin" for at in (1, 2)]
    index = ["model.safetensors.index.json", "pytorch_model.bin.index.json"]
    assert names(chosen(listing(*shards, *twin, *index, *SETTINGS))) == {*shards, index[0], *SETTINGS}


def test_a_missing_shard_on_the_hub_is_said() -> None:
    found = listing("model-00001-of-00002.safetensors", *SETTINGS)
    assert "model-00002-of-00002.safetensors is not there" in refused(found, {"quantize_config.json": GPTQ})


def test_of_several_weight_files_the_named_one_is_taken() -> None:
    found = listing("a-128g.safetensors", "b-32g.safetensors", *SETTINGS, a=9000)
    settings = {"quantize_config.json": {**GPTQ, "model_file_base_name": "b-32g"}}
    assert names(select_files(found, settings)) == {"b-32g.safetensors", *SETTINGS}
    assert names(chosen(found)) == {"a-128g.safetensors", *SETTINGS}


def test_code_is_left_without_consent_and_the_user_is_warned() -> None:
    found = listing("model.safetensors", *SETTINGS, "modeling_x.py", "deep/er.py")
    settings = {"quantize_config.json": GPTQ, "config.json": {"auto_map": {"AutoModel": "modeling_x.X"}}}
    without = select_files(found, settings)
    assert not any(name.endswith(".py") for name in names(without)) and "modeling_x.py" in without.notes[0]
    consented = select_files(found, settings, allow_code=True)
    assert {"modeling_x.py", "deep/er.py"} <= names(consented) and not consented.notes


def test_summary_says_size_files_and_format() -> None:
    found = listing("model.safetensors", "config.json", "quantize_config.json", model=4_159_998_000)
    assert chosen(found).summary == "4.16 GB in 3 files, GPTQ 4-bit, group 32, act-order (safetensors)"


@pytest.mark.parametrize(
    ("name", "ref", "files", "settings", "says", "sister"),
    [
        ("gguf", "TheBloke/Model-7B-GGUF", ["model.Q4_K_M.gguf", "config.json"], {}, "GGUF", "TheBloke/Model-7B-GPTQ"),
        ("ggml", "TheBloke/Model-7B-GGML", ["model.ggmlv3.q4_0.bin", "config.json"], {}, "GGUF", "TheBloke/Model-7B-GPTQ"),
        ("gguf in folders", "u/Model-i1-GGUF", ["Q4/model-00001-of-00002.gguf"], {}, "GGUF", "u/Model-GPTQ"),
        ("awq", "TheBloke/Model-7B-AWQ", ["model.safetensors", "config.json", "quant_config.json"],
         {"quant_config.json": {"w_bit": 4, "q_group_size": 128, "version": "GEMV"}}, "AWQ", "TheBloke/Model-7B-GPTQ"),
        ("awq by config", "u/Model-AWQ", ["model.safetensors", "config.json"],
         {"config.json": {"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 128}}}, "AWQ", "u/Model-GPTQ"),
        ("exl2", "u/Model-4.0bpw-h6-exl2", ["output.safetensors", "config.json"],
         {"config.json": {"quantization_config": {"quant_method": "exl2", "bits": 4.0}}}, "EXL2", "u/Model-GPTQ"),
        ("old exl2", "u/Model-exl2", ["output.safetensors", "config.json", "measurement.json"], {}, "EXL2", "Model-GPTQ"),
        ("exl2 main", "u/Model-exl2", ["README.md", "measurement.json"], {}, "EXL2", "Model-GPTQ"),
        ("exl3", "u/Model-exl3", ["model.safetensors", "config.json"],
         {"config.json": {"quantization_config": {"quant_method": "exl3"}}}, "EXL3", "u/Model-GPTQ"),
        ("plain", "mistralai/Model-7B", ["model.safetensors", "config.json"], {"config.json": {}},
         "is not quantised (16-bit", "mistralai/Model-7B-GPTQ or TheBloke/Model-7B-GPTQ"),
        ("other method", "unsloth/Model-bnb", ["model.safetensors", "config.json"],
         {"config.json": {"quantization_config": {"quant_method": "bitsandbytes"}}}, "another format (bitsandbytes)", "GPTQ"),
        ("lora", "u/adapter", ["adapter_config.json", "adapter_model.safetensors"], {}, "LoRA adapter", ""),
        ("data", "u/set", ["README.md", "data/train-0001.parquet"], {}, "holds data (train-0001", ""),
        ("pictures", "u/sdxl", ["model_index.json", "unet/model.safetensors"], {}, "pictures", ""),
        ("deeper", "u/several", ["config.json", "4bit/model.safetensors"], {}, "folders of their own (4bit/", ""),
        ("empty", "u/empty", ["README.md"], {}, "holds no weights", ""),
        ("pickled gptq", "u/Old-GPTQ", ["model-4bit.pt", "config.json"], {"quantize_config.json": GPTQ}, "can run code", ""),
    ],
)  # fmt: skip
def test_other_kinds_are_named_and_not_fetched(
    name: str, ref: str, files: list[str], settings: dict[str, Any], says: str, sister: str
) -> None:
    text = refused(listing(*files, ref=ref), settings)
    assert ref in text and says in text and sister in text


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        (["model.safetensors", "config.json"], {"config.json": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}),
        (["model.safetensors", "config.json"], {"config.json": {"quantization_config": {"bits": 4, "group_size": 128}}}),
        (["gptq_model-4bit-128g.safetensors", "config.json"], {"config.json": {}}),
        (["model.safetensors", "config.json"], {"config.json": {"quantization_config": {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128}}}),
        (["model.safetensors", "model.Q4_0.gguf", "quantize_config.json"], {"quantize_config.json": GPTQ}),
    ],
)  # fmt: skip
def test_gptq_is_recognised_wherever_it_is_written(files: list[str], settings: dict[str, Any]) -> None:
    assert select_files(listing(*files, ref="u/Model"), settings).kind == "gptq"


def test_a_plain_name_without_hints_is_not_taken_for_gptq() -> None:
    assert "is not quantised" in refused(listing("model.safetensors", "config.json", ref="u/Model-40bits"), {"config.json": {}})


def test_any_kind_takes_unquantised_weights() -> None:
    selection = select_files(listing("model.safetensors", "config.json", ref="u/Model"), {"config.json": {}}, any_kind=True)
    assert selection.kind == "plain" and selection.format == "16-bit (safetensors)"


def test_any_kind_does_not_take_what_holds_no_model() -> None:
    with pytest.raises(WrongRepository):
        select_files(listing("README.md", "data/x.parquet"), {}, any_kind=True)


def test_settings_are_asked_for_only_when_names_do_not_settle_it() -> None:
    assert settings_needed(listing("model.Q4_0.gguf", "config.json")) == []
    assert settings_needed(listing("model.safetensors", "config.json", "quantize_config.json")) == [
        "config.json",
        "quantize_config.json",
    ]


@pytest.mark.parametrize("name", ["a\\..\\evil.json", "C:evil.json", "nul.json", "x" * 300 + ".json"])
def test_names_that_would_leave_the_folder_stop_everything(name: str) -> None:
    found = listing("model.safetensors", "quantize_config.json", name)
    assert "Nothing was downloaded" in refused(found, {"quantize_config.json": GPTQ})


def test_names_that_climb_are_never_taken() -> None:
    found = listing("model.safetensors", "quantize_config.json", "../evil.json", "/etc/evil.json", "..\\evil.json", "a\nb.json")
    assert names(chosen(found)) == {"model.safetensors", "quantize_config.json"}
    with pytest.raises(WrongRepository):
        chosen(listing("model.safetensors", "quantize_config.json", "../../evil.py"), allow_code=True)


def test_settings_that_are_no_json_count_as_empty() -> None:
    assert parse_settings(b"\xff\xfe") == parse_settings(b"[1]") == parse_settings(None) == {}
    assert parse_settings(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_a_repository_of_thousands_of_small_files_is_refused_with_the_way_to_choose() -> None:
    found = listing("model.safetensors", "config.json", *(f"part-{at}.json" for at in range(30_000)), ref="Owner/M-GPTQ")
    text = refused(found)
    assert "30002 files" in text and "at most 1000" in text and "--include" in text and "Nothing was downloaded" in text
    assert len(select_by_name(found, (), ["part-1*.json"], (), None).files) > 1000, "whoever names them gets them"
