"""loaders/pretrained/picture_reader.py: settings of processors, of strangers and of real models."""

import json

import pytest
import seeing_models
from test_image_text import PROCESSORS, complete
from transformers import AutoConfig

from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.pretrained import picture_reader
from gptq_webui.loaders.text import chat_template
from gptq_webui.loaders.text.token_codec import TokenCodec
from gptq_webui.loaders.text.tokenizer import read_tokenizer


@pytest.mark.parametrize("change", [
    {"min_pixels": 10**9}, {"merge_size": 4096}, {"temporal_patch_size": 1000}, {"patch_size": 4000}, {"min_pixels": -1e30},
], ids=str)  # fmt: skip
def test_numbers_that_make_a_picture_fill_the_memory_are_refused_before_one_is_read(tmp_path, change, monkeypatch):
    seeing_models.write(tmp_path / "m", "qwen2_vl")
    complete(tmp_path / "m", "qwen2_vl")
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**PROCESSORS["qwen2_vl"], **change}))
    monkeypatch.setattr(picture_reader, "_processor", lambda *_given: pytest.fail("it was made"))
    reader, note = found_in(tmp_path / "m")
    assert reader is None and "Correct preprocessor_config.json" in note


@pytest.mark.parametrize("settings", [
    {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
    {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.48, 0.46, 0.41], "rescale_factor": 1 / 255, "resample": 3},
    {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "image_seq_len": 64},
    {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], "num_additional_image_tokens": 1},
    {"sampling_rate": 16000, "max_frequency": 7600.0, "n_samples": 480000, "fft_length": 1024, "image_seq_length": 256},
], ids=["Qwen3-VL", "Qwen2-VL", "SmolVLM", "LLaVA-NeXT", "with sound"])  # fmt: skip
def test_numbers_of_real_processors_are_taken(settings):
    picture_reader._require_sizes({"preprocessor_config.json": settings, "processor_config.json": {"image_processor": settings}})


def test_a_folder_is_never_asked_to_run_its_own_code_for_pictures(tmp_path, monkeypatch):
    """transformers asks at the terminal where nobody has said whether the code of a folder may run."""
    seeing_models.write(tmp_path / "m", "llava")
    complete(tmp_path / "m", "llava")
    changed = {**PROCESSORS["llava"], "image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "m" / name).write_text(json.dumps(changed))
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_given: pytest.fail("it asked"))
    assert found_in(tmp_path / "m")[0] is None
    assert not (tmp_path / "ran").exists()


def found_in(folder):
    """What `picture_reader.find` gives for a folder."""
    tokenizer = read_tokenizer(LocalModel.read(folder))
    template = chat_template.find(folder, tokenizer, "")
    found = picture_reader.find(folder, AutoConfig.from_pretrained(folder), TokenCodec(tokenizer), template)
    template.close()
    return found
