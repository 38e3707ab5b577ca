"""Files of gptqmodel 7.6 and auto-round 0.16 for every architecture of the fast steps: logits equal those of the writer's reload.

It runs where these programs are: GPTQ_WEBUI_WRITERS_PYTHON names a Python that has them, with the same transformers
(CONTRIBUTING.md says how). GPTQ_WEBUI_WRITTEN names a folder that keeps what they wrote for the next run, GPTQ_WEBUI_WRITERS_JOBS
is a pattern of the names of those that are done.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from family_variants import VARIANTS
from packaging import version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from writer_programs import IDS

from gptq_webui.core.errors import BadCheckpoint, GptqWebuiError
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.stepper_choice import stepper_for

PYTHON = os.environ.get("GPTQ_WEBUI_WRITERS_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON or version.parse(transformers.__version__).major < 5, reason="gptqmodel and auto-round are not there"
)

KINDS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "falcon", "gpt_neox", "gptj", "gpt2",
    "opt", "bloom", "mpt", "gpt_bigcode", "starcoder2", "stablelm", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "granite",
    "glm", "glm4", "nemotron", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v2",
    "deepseek_v3", "llama4_text", "seed_oss", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense", "hunyuan_v1_moe", "exaone4",
    "glm4_moe", "qwen3_next", "lfm2", "qwen3_5_text", "minimax_m2", "dots1",
)  # fmt: skip
# Those whose modules differ most: fused, transposed, with biases, experts.
VARIED = ("qwen3_moe", "gpt_oss", "phi3", "glm4", "deepseek_v3", "gemma2", "gpt2", "falcon", "bloom", "mixtral", "llama4_text")
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
# Scores of attention that are not divided make a random model react to the last bits of its products.
CHANGES = {"granite": {"attention_multiplier": 0.25}}
MIXED = {r"+:.*\.(down_proj|w2|o_proj|dense_4h_to_h|c_proj|dense).*": {"bits": 8, "group_size": 32},
         r"-:.*(k_proj|w3|up_proj).*": {}}  # fmt: skip


def gptqmodel(name, kind, dtype="float16", changes=None, **settings):
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, **settings}
    if settings["group_size"] == -1 and not settings["desc_act"]:
        settings["act_group_aware"] = False  # its default needs groups
    return {"name": f"gptqmodel-{kind}{name and '-'}{name}", "program": "gptqmodel", "kind": kind, "dtype": dtype,
            "changes": changes or CHANGES.get(kind, {}), "settings": settings}  # fmt: skip


def auto_round(name, kind, dtype="float16", changes=None, **settings):
    settings = {"bits": 4, "group_size": 32, "sym": True, "format": "auto_round", **settings}
    return {"name": f"auto_round-{kind}{name and '-'}{name}", "program": "auto_round", "kind": kind, "dtype": dtype,
            "changes": changes or CHANGES.get(kind, {}), "settings": settings}  # fmt: skip


def _jobs():
    untied = {"tie_word_embeddings": False}
    for kind in KINDS:
        yield gptqmodel("", kind, desc_act=True)
        yield auto_round("", kind)
    for bits in range(2, 9):
        for sym in (True, False):
            for form in ("gptq", "gptq_v2", "gptq_p"):
                act_order = bits % 2 == 0
                yield gptqmodel(
                    f"{bits}-{'sym' if sym else 'asym'}-{form}", "llama", bits=bits, sym=sym, format=form, desc_act=act_order
                )
    for group, changes in ((-1, None), (16, None), (64, WIDE), (128, WIDE)):
        for act_order in (True, False):
            yield gptqmodel(f"g{group}{'-order' * act_order}", "llama", changes=changes, group_size=group, desc_act=act_order)
    for kind in VARIED:
        yield gptqmodel("channel", kind, "bfloat16", group_size=-1, desc_act=True)
        yield gptqmodel("3-asym", kind, bits=3, sym=False, format="gptq_v2")
        yield gptqmodel("8", kind, bits=8, group_size=32)
        yield gptqmodel("mixed", kind, dynamic=MIXED)
        yield gptqmodel("head", kind, changes=untied, lm_head=True)
    for words in ("int8", "int16"):
        yield gptqmodel(words, "llama", pack_dtype=words)
    yield gptqmodel("first-dense", "llama", dynamic={r"-:model\.layers\.0\..*": {}})
    yield gptqmodel("first-dense", "phi3", dynamic={r"-:model\.layers\.0\..*": {}})
    yield gptqmodel("first-dense", "qwen3_moe", dynamic={r"-:model\.layers\.0\..*": {}})
    yield gptqmodel("odd", "llama", changes={"intermediate_size": 92, "head_dim": 20}, group_size=-1)
    yield gptqmodel("bias", "llama", changes={"attention_bias": True, "mlp_bias": True}, desc_act=True)
    yield gptqmodel("tied", "qwen3", changes={"tie_word_embeddings": True})

    for form in ("auto_gptq", "auto_awq", "auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round:gptqmodel",
                 "llm_compressor"):  # fmt: skip
        for bits in (4,) if "awq" in form else (2, 3, 4, 8):
            for sym in (True, False):
                name = f"{form.replace(':', '-')}-{bits}-{'sym' if sym else 'asym'}"
                yield auto_round(name, "llama", bits=bits, sym=sym, format=form)
    for kind in VARIED:
        for form in ("auto_gptq", "auto_awq", "auto_round:auto_gptq", "auto_round:auto_awq", "llm_compressor"):
            yield auto_round(form.replace(":", "-"), kind, "bfloat16", format=form, sym=form != "auto_round:auto_awq")
        more = {"down_proj": {"bits": 8}, "k_proj": {"bits": 16}, "w2": {"bits": 8}, "dense": {"bits": 8}}
        yield auto_round("mixed", kind, layer_config=more)
        yield auto_round("2-asym", kind, bits=2, sym=False)
        yield auto_round("head", kind, changes=untied, quant_lm_head=True)
    for group, changes in ((-1, None), (64, WIDE), (128, WIDE)):
        yield auto_round(f"g{group}", "llama", changes=changes, group_size=group)
    yield auto_round("iterations", "llama", iters=4)
    yield auto_round("tied", "qwen3", changes={"tie_word_embeddings": True})
    yield auto_round("tied-head", "qwen3", changes={"tie_word_embeddings": True}, quant_lm_head=True)

    # what the families differ in beside their names: parallel blocks, ALiBi, norms, heads, choices of experts
    more = {**VARIANTS, "phi3 Phi-4-mini": ("phi3", {"partial_rotary_factor": 0.75})}
    for variant, (kind, changes) in more.items():
        if changes or kind not in KINDS:
            name = variant.removeprefix(kind).strip().replace(" ", "-") or ("own" if kind in KINDS else "")
            changes, group = {**CHANGES.get(kind, {}), **changes}, -1 if "seven" in variant else 32
            yield gptqmodel(name, kind, changes=changes, group_size=group, desc_act=True)
            yield auto_round(name, kind, changes=changes, group_size=group)


JOBS = {job["name"]: job for job in _jobs() if re.search(os.environ.get("GPTQ_WEBUI_WRITERS_JOBS", ""), job["name"])}
REFUSED = {
    # auto-round does not know Falcon's class of linear layers, and packs none
    **{
        f"auto_round-falcon{each}": "no packed GPTQ weights"
        for each in (
            "",
            "-7B-of-seven-heads",
            "-40B",
            "-11B",
            "-RW",
            "-auto_round-auto_gptq",
            "-mixed",
            "-2-asym",
        )
    },
    **{f"auto_round-falcon{each}": "hold no such weights" for each in ("-auto_awq", "-auto_round-auto_awq")},
    "auto_round-gpt2-llm_compressor": "the format dense",  # nor GPT-2's
    "auto_round-sarvam_moe": "query_key_value is 64×32",  # it writes query, key and value under one name; the last one is left
    "auto_round-llama-llm_compressor-2-sym": "2 bits",
    "auto_round-llama-llm_compressor-3-sym": "3 bits",
}
NOT_READ_AGAIN = {  # the reload has other weights than the file
    "auto_round-gpt_oss-llm_compressor": "transformers has no place for the experts and leaves random ones",
}
BY_HAND = {  # compared with the file's own numbers
    "auto_round-mixtral-auto_awq": "gptqmodel looks for w1, w2 and w3, the file has gate_proj, down_proj and up_proj",
    "auto_round-mixtral-llm_compressor": "transformers looks for w1, w2 and w3, too, and leaves random experts",
    "auto_round-llama4_text-auto_awq": "gptqmodel has no place for the experts and leaves random ones",
    "auto_round-phi3-auto_awq": "gptqmodel looks for gate_proj and up_proj, the file has gate_up_proj",
    "auto_round-glm4-auto_awq": "gptqmodel looks for gate_proj and up_proj, the file has gate_up_proj",
}
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of AWQ's words: where the eight outputs of a word lie


def off(found, wanted):
    """The largest distance of a row, relative to its length."""
    found, wanted = found.double(), wanted.double()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def multiplied_out(folder, target):
    """Logits of a folder of AWQ or compressed-tensors: transformers' own, of weights that are multiplied out here, scale *
    (integer - zero)."""
    state = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    shifts = torch.tensor([4 * each for each in _NIBBLES])
    for name in [each.removesuffix(".qweight") for each in state if each.endswith(".qweight")]:
        q, zeros = ((state.pop(f"{name}.{part}")[..., None] >> shifts & 15).flatten(1) for part in ("qweight", "qzeros"))
        scales = state.pop(f"{name}.scales").float()
        rows = q.shape[0] // scales.shape[0]
        weight = (q - zeros.repeat_interleave(rows, 0)) * scales.repeat_interleave(rows, 0)
        state[f"{name}.weight"] = weight.T.contiguous()
    for name in [each.removesuffix(".weight_packed") for each in state if each.endswith(".weight_packed")]:
        q = (state.pop(f"{name}.weight_packed")[..., None] >> torch.arange(0, 32, 4) & 15).flatten(1) - 8
        scales = state.pop(f"{name}.weight_scale").float()
        state[f"{name}.weight"] = q * scales.repeat_interleave(q.shape[1] // scales.shape[1], 1)
        del state[f"{name}.weight_shape"]
    for name in [each for each in state if ".block_sparse_moe.experts." in each]:  # transformers knows Mixtral's experts by these
        role = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[name.split(".")[-2]]
        state[name.replace(name.split(".")[-2], role)] = state.pop(name)
    target.mkdir()
    save_file({name: each.float() for name, each in state.items()}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    model, found = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = Path(os.environ.get("GPTQ_WEBUI_WRITTEN") or tmp_path_factory.mktemp("written")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(list(JOBS.values())))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    for step in ("write", "reload", "reload_compressed"):
        for _attempt in range(5):  # a program may end at a job; it is not begun again
            command = [PYTHON, str(Path(__file__).with_name("writer_programs.py")), step, str(folder)]
            if not subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=3600).returncode:
                break
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_a_file_of_another_program_computes_what_the_program_reads_from_it(name, written, tmp_path):
    if (error := written / f"{name}.error.txt").exists():
        pytest.skip(f"the program fails: {error.read_text().strip().splitlines()[-1][:150]}")
    if name in REFUSED:
        with pytest.raises(GptqWebuiError, match=REFUSED[name]):
            checkpoint.load(LocalModel.read(written / name), dtype=torch.float32, device_map="cpu")
        return
    if name in NOT_READ_AGAIN:
        pytest.skip(NOT_READ_AGAIN[name])
    if name in BY_HAND:
        wanted = multiplied_out(written / name, tmp_path / "dense")
    else:
        wanted = load_file(written / f"{name}.logits.safetensors")["logits"]
    try:
        hf, _notes = checkpoint.load(LocalModel.read(written / name), dtype=torch.float32, device_map="cpu")
    except BadCheckpoint as refused:
        if lost := _lost(written / name):
            pytest.skip(f"the program has left out {lost}; refused: {refused}")
        raise
    with torch.inference_mode():
        assert off(hf(input_ids=torch.tensor([IDS]), use_cache=False).logits[0], wanted) < 1e-3
        stepper, _note = stepper_for(hf, 64)
        memory = stepper.begin()
        assert off(stepper.prefill(memory, IDS[:16]), wanted[15:16]) < 3e-3
        for at in range(16, len(IDS)):
            assert off(stepper.step(memory, IDS[at]), wanted[at : at + 1]) < 3e-3, f"token {at}"
        stepper.close()


def _lost(folder):
    """The first tensor that an expert has and another lacks: gptqmodel takes 16-bit experts, which share memory, for one."""
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    first = [each for each in names if re.search(r"\.experts\.0\..*\.weight$", each)]
    return next((other for each in sorted(first) if (other := each.replace(".experts.0.", ".experts.1.")) not in names), "")
