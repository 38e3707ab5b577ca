"""Tiny random GPTQ folders that people choose in a page: one each of Gemma 3, Qwen3-MoE, a hybrid, and one that sees pictures."""

from pathlib import Path

import hub_folder
import seeing_models
from every_architecture import tiny_model
from test_image_text import complete

import tiny
from gptq_webui.loaders.text.built_in_templates import CHATML

TEXT = {"tiny-gemma3": "gemma3_text", "tiny-qwen3-moe": "qwen3_moe", "tiny-hybrid": "lfm2"}
SEES = "tiny-vl"
NAMES = (*TEXT, SEES)


def write(models: Path) -> None:
    """Each with a tokenizer and a chat template; `SEES` with the processor of its pictures."""
    for name, kind in TEXT.items():
        hub_folder.write(models.parent / f"{name}.made", tiny_model(kind))
        (models.parent / f"{name}.made" / "packed").rename(models / name)
        tiny.write_tokenizer(models / name, "{{ bos_token }}" + CHATML)
    seeing_models.write(models.parent / SEES, "qwen2_vl")  # and beside it what it was made of
    complete(models.parent / SEES, "qwen2_vl")
    (models.parent / SEES).rename(models / SEES)
