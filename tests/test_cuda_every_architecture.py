"""Every causal architecture of transformers on a GPU, through what the product does there.

A tiny packed model of each is computed by its whole step, by transformers' forward recorded as a graph with our kernels in it,
or by that forward as it is. A prompt of 24 tokens and 16 single ones give the logits of the dequantised twin in 32 bits; the
same twin in 16 bits, by plain transformers on the GPU, tells what rounding makes. Sixteen greedy tokens are the twin's.
The sizes are such that our kernels run. Of odd ones, which some of them leave alone, of other orders of weights and of bfloat16
a sample runs; GPTQ_WEBUI_EVERY_ARCHITECTURE=1 runs all. test_emulated_gpu.py has the same without a GPU.
"""

import logging
import os
import threading
from dataclasses import replace

import emulated_gpu
import hub_folder
import pytest
import torch
import transformers
from every_architecture import KINDS, tiny_model
from packaging import version
from test_every_architecture import IDS, PROMPT, REFUSED, SAMPLE
from transformers import AutoModelForCausalLM

from gptq_webui.core.chat import Finish, Step
from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, generation, stepper_choice
from gptq_webui.gptq.prefix_cache import PrefixCache

ALL = os.environ.get("GPTQ_WEBUI_EVERY_ARCHITECTURE")
NEW = pytest.mark.skipif(version.parse(transformers.__version__).major < 5, reason="the table is of transformers 5")
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"), NEW]
CONTEXT = 256
GREEDY = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=len(IDS) - PROMPT)
# How far off a row may be, relative to its length.
LIMIT = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
EMULATED_LIMIT = {torch.float16: 4e-3, torch.bfloat16: 6e-2}  # nothing but the numbers' own rounding
# Rows that may be further off (normed heads make much of little), and where rounding can choose another expert. An error shows
# in most of the 17.
SOME = {torch.float32: (0, 4), torch.float16: (1, 4), torch.bfloat16: (3, 7)}
CHOOSING = ("experts", "top_k", "num_experts_per_tok", "topk", "moe", "indexer")  # in the names of a config's settings
WHOLE = ("llama", "mistral", "qwen2", "qwen3", "phi3")  # have a step of their own
SOME_KINDS = tuple(dict.fromkeys((
    *SAMPLE, *WHOLE, "gpt2", "opt", "gemma2", "gemma4_text", "glm4", "cohere", "granite", "qwen3_moe", "deepseek_v2", "lfm2",
    "bloom", "gptj", "mpt", "diffllama", "zamba2", "mamba2", "falcon_h1", "jetmoe",
)))  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Many workers share a machine, and the twins are small."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(found, wanted):
    """The distance of each row, relative to its length; infinite where a number is none."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return torch.nan_to_num((found - wanted).norm(dim=-1) / wanted.norm(dim=-1), nan=torch.inf)


def choosing(config):
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return any(part in name for name, value in text.to_dict().items() if value for part in CHOOSING)


def logits_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().cpu()


def plain_rows(folder, dtype, device):
    """Logits of the twin in these numbers on the device, by transformers alone; None and why if it cannot be computed there."""
    try:
        return logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device), IDS), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:200]


@torch.inference_mode()
def ours(stepper):
    """(logits after the prompt and after each single token, greedy tokens)."""
    memory = stepper.begin()
    rows = [stepper.prefill(memory, IDS[:PROMPT])[0].float().cpu().clone()]  # the next step may write over it
    rows += [stepper.step(memory, id)[0].float().cpu().clone() for id in IDS[PROMPT:]]
    memory = None  # its pages are free again
    events = generation.generate(
        stepper, IDS[:PROMPT], GREEDY, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=CONTEXT
    )  # fmt: skip
    return torch.stack(rows), [each.id for each in events if isinstance(each, Step)]


PROMPTS = (IDS[:PROMPT], IDS[5:PROMPT], IDS[2:9])  # of answers that run at the same time


def in_turns(answers, joins=None):
    """The tokens of each; `joins`: in which round an answer begins."""
    found, left, turn = [[] for _ in answers], list(range(len(answers))), 0
    while left:
        turn += 1
        for at in tuple(left):
            if joins is not None and turn < joins[at]:
                continue
            event = next(answers[at], None)
            if isinstance(event, Step):
                found[at].append(event.id)
            elif isinstance(event, Finish):
                left.remove(at)
    return found


def together(stepper):
    """Greedy tokens of several answers at the same time, the last of which joins later; none where the stepper computes one."""
    if stepper.parallel == 1:
        return []
    params = replace(GREEDY, max_new_tokens=8)
    prefix = PrefixCache()
    running = [
        generation.generate(stepper, ids, params, threading.Event(), prefix=prefix, end_ids=(), context_tokens=CONTEXT)
        for ids in PROMPTS
    ]
    return in_turns(running, joins=(1, 1, 4))


def made(kind, wide):
    if kind in REFUSED:
        pytest.skip("it is refused")
    try:
        model = tiny_model(kind, wide=wide)
        logits_of(model, IDS)
        return model
    except Exception as reason:
        assert kind not in SOME_KINDS
        pytest.skip(f"no tiny model could be made: {type(reason).__name__}: {str(reason)[:100]}")


def computed(folder, dtype, device, said):
    """(model, kernel, logits, greedy tokens, those of `together`) of the packed folder; `said` hears which way it is computed."""
    on = "cpu" if device == "emulated" else device
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=dtype, device_map={"": on})
    with pytest.MonkeyPatch.context() as patch:
        if device == "emulated":
            emulated_gpu.emulate(patch)
            patch.setattr(stepper_choice, "_free_bytes", lambda device: 1 << 32)
        stepper, note = stepper_choice.stepper_for(hf, CONTEXT, parallel=4)
        said += [f"kernel {stepper.kernel}", note or "no note"]
        rows, greedy = ours(stepper)
        several = together(stepper)
        said.append(f"why: {getattr(stepper, 'why', '') or '-'}; {stepper.parallel} answers at once")
        kernel = stepper.kernel
        stepper.close()
    return hf, kernel, rows, greedy, several


def check(kind, folder, caplog, dtype, device="cuda", wide=True, **how):
    """(model, kernel). `device`: "cuda", "cpu", or "emulated" for a GPU that is none."""
    model = made(kind, wide)
    hub_folder.write(folder, model, group_size=32 if wide else 16, **how)
    some = SOME[dtype][choosing(model.config)]
    twin = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    wanted = logits_of(twin, IDS)[PROMPT - 1 :]
    if float(apart(logits_of(twin, IDS[:PROMPT])[-1:], wanted[:1])) > 1e-2:  # Doge before 5.24
        pytest.skip("in this version of transformers its forward does not look back only")
    plain, broken = plain_rows(folder / "dense", dtype, "cpu" if device == "emulated" else device)
    rounding = apart(plain[PROMPT - 1 :], wanted) if plain is not None else torch.zeros(1)
    limit = (EMULATED_LIMIT if device == "emulated" else LIMIT)[dtype]
    limit = max(limit, 4 * float(rounding.median()))
    said = [kind, f"plain transformers {broken or f'is off by {rounding.median():.4f}, at most {rounding.max():.4f}'}"]
    with caplog.at_level(logging.INFO, logger="gptq_webui.gptq"):
        try:
            hf, kernel, rows, greedy, several = computed(folder / "packed", dtype, device, said)
        except Exception as error:
            if broken and isinstance(error, BadCheckpoint):
                pytest.skip(f"transformers does not compute it in {dtype}: {broken}")
            raise AssertionError("; ".join([*said, *_logged(caplog), f"{type(error).__name__}: {error}"])) from error
    said += _logged(caplog)
    off = apart(rows, wanted)
    over = int((off > limit).sum())
    said.append(f"rows are off by {float(off.median()):.4f}, at most {float(off.max()):.4f}; {over} over {limit:.3f}")
    print("; ".join(said))
    assert limit < 0.5, "; ".join([*said, f"{dtype} does not hold such numbers"])
    assert over <= some, "; ".join([*said, f"rows: {[round(each, 4) for each in off.tolist()]}"])
    for prompt, tokens in ((IDS[:PROMPT], greedy), *zip(PROMPTS, several, strict=bool(several))):
        logits = logits_of(twin, prompt + tokens)[len(prompt) - 1 : -1]
        below = [float((row.max() - row[id]) / row.std()) for row, id in zip(logits, tokens, strict=True)]
        below += [float("inf")] * ((GREEDY.max_new_tokens if tokens is greedy else 8) - len(tokens))
        wrong = sum(each > 6 * limit for each in below)
        assert wrong <= some, "; ".join([*said, f"greedy tokens are below the best by {[round(each, 3) for each in below]}"])
    return hf, kernel


def _logged(caplog):
    """Why a faster way was not taken."""
    found = [each.getMessage() for each in caplog.records if each.name.startswith("gptq_webui.gptq")]
    return [each for each in found if any(word in each for word in ("graph", "not used", "known kind", "at once"))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_computed_on_a_gpu(kind, tmp_path, caplog):
    hf, kernel = check(kind, tmp_path, caplog, torch.float16, act_order=False)
    assert kernel == "cuda" or any(".gptq.cuda." in type(each).__module__ for each in hf.modules()), "no kernel of ours runs"
    assert kernel == "cuda" or kind not in WHOLE


@pytest.mark.parametrize("kind", KINDS if ALL else SOME_KINDS)
def test_odd_sizes_and_orders_are_computed_on_a_gpu(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.float16, wide=False)


@pytest.mark.parametrize("kind", KINDS if ALL else SOME_KINDS)
def test_bfloat16_is_computed_on_a_gpu(kind, tmp_path, caplog):
    check(kind, tmp_path, caplog, torch.bfloat16)
