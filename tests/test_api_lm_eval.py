"""lm-eval's three kinds of questions over HTTP, against transformers' own forward of the same model in fp32."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from api_server import demo_server
from gptq_webui.gptq.cpu import numba_compiler

PYTHON = os.environ.get("GPTQ_WEBUI_CLIENTS_PYTHON", "")
pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not shutil.which(PYTHON), reason="GPTQ_WEBUI_CLIENTS_PYTHON names no Python with the extra `clients`"),
]
CHOICES = [["The capital of France is", each] for each in (" Paris", " Rome", " a cheese")]
TEXTS = ["The capital of France is Paris. " * 12, "Once upon a time, there was a dragon."]
PROMPTS = [
    ["One, two, three,", {"until": [" six"], "max_gen_toks": 12}],
    ["The capital of France is", {"until": ["\n"], "max_gen_toks": 5}],
]


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_compiler, "available", lambda: False)  # PyTorch computes in fp32, as the reference does
        with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
            yield server


def ask(server, folder=None, **more):
    """`folder`: of the tokenizer's files; None: the server is asked for tokens."""
    tokenizer = {"tokenizer": str(folder)} if folder else {"tokenizer_backend": "remote"}
    model = {"model": "x", "base_url": f"{server.url}/v1/completions", "max_length": 65, "max_retries": 1, **tokenizer, **more}
    job = {"model": model, "choices": CHOICES, "texts": TEXTS, "prompts": PROMPTS}
    script = Path(__file__).with_name("lm_eval_client.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([PYTHON, str(script), json.dumps(job)], capture_output=True, text=True, timeout=300, env=environment)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def log_likelihood(loaded, context, continuation):
    """(of the continuation after the context, whether it is what the model likes most)."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        logs = loaded.hf(ids[:, :-1]).logits[0].float().log_softmax(-1)[-len(continuation) :]
    wanted = torch.tensor(continuation)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())


def greedy(loaded, prompt, options):
    ids = torch.tensor([loaded.encode(prompt, bos=False)])
    with torch.inference_mode():
        found = loaded.hf.generate(ids, do_sample=False, max_new_tokens=options["max_gen_toks"], repetition_penalty=1.0)
    text = loaded.decode(found[0, ids.shape[1] :].tolist())
    return text.split(options["until"][0])[0]


@pytest.mark.parametrize("tokenizer", ["its files", "the server's"])
def test_lm_eval_finds_what_transformers_finds(server, tokenizer):
    loaded = server.service.engine.loaded
    found = ask(server, loaded.model.folder if tokenizer == "its files" else None, batch_size=2)
    for (context, continuation), (value, is_greedy) in zip(CHOICES, found["likelihoods"], strict=True):
        wanted = log_likelihood(loaded, loaded.encode(context, bos=False), loaded.encode(continuation, bos=False))
        assert value == pytest.approx(wanted[0], abs=1e-3) and is_greedy == wanted[1]
    for value, windows in zip(found["rolling"], found["windows"], strict=True):
        assert value == pytest.approx(sum(log_likelihood(loaded, *each)[0] for each in windows), abs=1e-3 * len(windows))
    assert len(found["windows"][0]) > 1, "the first text is longer than a window"
    assert found["answers"] == [greedy(loaded, *each) for each in PROMPTS]
