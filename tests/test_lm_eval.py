"""lm-eval, unchanged, against the API: its three kinds of tasks give what transformers computes from the same weights.

It runs where lm-eval is installed: in this environment, or in one of its own that GPTQ_WEBUI_LM_EVAL names (the program's path).
`python -m pip install "lm-eval[api]" transformers torch` makes one. Its tasks here are tiny and need no network.
"""

import json
import os
import shutil
import subprocess
import threading

import pytest
import torch

from api_server import demo_server
from gptq_webui.core.chat import Message
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cpu import numba_compiler

PROGRAM = os.environ.get("GPTQ_WEBUI_LM_EVAL") or shutil.which("lm-eval")

pytestmark = [pytest.mark.demo, pytest.mark.skipif(not PROGRAM, reason="lm-eval is not installed (GPTQ_WEBUI_LM_EVAL)")]

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "London", "a banana"], "answer": 0},
    {"question": "Two plus two is", "choices": ["five", "four"], "answer": 1},
    {"question": "The sun rises in the", "choices": ["east", "west", "évening 日"], "answer": 0},
]
TEXTS = ["The old man walked along the river until it was dark. " * 3, "Café: 日本語, and then some. " * 60, "Hi"]
PROMPTS = [{"prompt": "One, two, three,", "target": " four"}, {"prompt": "A B C D", "target": " E"}]

_TASK = (
    "task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\noutput_type: {kind}\n"
)
TASKS = {
    "gw_choice": (
        "multiple_choice",
        QUESTIONS,
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n',
    ),
    "gw_rolling": (
        "loglikelihood_rolling",
        [{"text": each} for each in TEXTS],
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n',
    ),
    "gw_until": (
        "generate_until",
        PROMPTS,
        'doc_to_text: "{{prompt}}"\ndoc_to_target: "{{target}}"\ngeneration_kwargs:\n  until: ["\\n", "."]\n  max_gen_toks: 8\n'
        "  temperature: 0.0\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n",
    ),
}
MOST = 256  # tokens of a window of the rolling task


@pytest.fixture(scope="module")
def server(demo_root, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba_compiler, "available", lambda: False)  # PyTorch computes in fp32, as the reference does
        with demo_server(demo_root, tmp_path_factory.mktemp("settings")) as server:
            yield server


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, (kind, rows, rest) in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, kind=kind) + rest)
    return folder


def lm_eval(server, tasks, output, names, model="local-completions", path="v1/completions", batch_size=1, **settings):
    """The samples of each task, as lm-eval wrote them."""
    loaded = server.service.engine.loaded
    given = {
        "base_url": f"{server.url}/{path}", "model": loaded.model.name, "tokenizer": loaded.model.folder,
        "tokenizer_backend": "huggingface", "num_concurrent": 1, "max_retries": 1, "max_length": MOST, **settings,
    }  # fmt: skip
    command = [
        PROGRAM, "run", "--model", model, "--model_args", ",".join(f"{key}={value}" for key, value in given.items()),
        "--tasks", ",".join(names), "--include_path", str(tasks), "--output_path", str(output), "--log_samples",
        "--batch_size", str(batch_size), *(["--apply_chat_template"] if "chat" in model else []),
    ]  # fmt: skip
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **offline, "HF_HOME": str(output / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in names:
        (file,) = output.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = sorted(rows, key=lambda each: each["doc_id"])
    return found


@pytest.fixture(scope="module")
def samples(server, tasks, tmp_path_factory):
    """Prompt as ids, several in a request, or as text, one in each -> the samples of each task."""
    names = list(TASKS)
    as_ids = lm_eval(server, tasks, tmp_path_factory.mktemp("ids"), names, batch_size=3)
    as_text = lm_eval(server, tasks, tmp_path_factory.mktemp("text"), names, tokenized_requests=False)
    return {"ids": as_ids, "text": as_text}


def logprobs(server, ids):
    """Of each id after the first, as transformers' own forward gives them; and all of them."""
    with torch.inference_mode():
        found = server.service.engine.loaded.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(found[at, id]) for at, id in enumerate(ids[1:])], found


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_multiple_choice(server, samples, kind):
    encode = server.service.engine.loaded.encode
    for sample, row in zip(samples[kind]["gw_choice"], QUESTIONS, strict=True):
        for (said,), choice in zip(sample["resps"], row["choices"], strict=True):
            whole = encode(f"{row['question']} {choice}", bos=False)
            context = len(encode(row["question"], bos=False))
            own, every = logprobs(server, whole)
            assert float(said[0]) == pytest.approx(sum(own[context - 1 :]), abs=1e-3)
            greedy = all(int(every[at - 1].argmax()) == whole[at] for at in range(context, len(whole)))
            assert str(said[1]) == str(greedy)


def test_rolling_log_likelihood(server, samples):
    """Windows without overlap, each with what comes before it as its context, as lm-eval cuts them."""
    loaded = server.service.engine.loaded
    first = loaded.tokenizer.bos_token_id if loaded.tokenizer.bos_token_id is not None else loaded.codec.end_id
    for sample, text in zip(samples["ids"]["gw_rolling"], TEXTS, strict=True):
        ids, total, done = loaded.encode(text, bos=False), 0.0, 0
        room = MOST - 1  # lm-eval asks for one more token
        while done < len(ids):
            end = min(done + room, len(ids))
            before = [first] if done == 0 else ids[max(0, end - room - 1) : done]
            own, _ = logprobs(server, [*before, *ids[done:end]])
            total += sum(own[done - end :])
            done = end
        assert float(sample["resps"][0][0]) == pytest.approx(total, abs=1e-3), text[:20]


def answer_to(server, source):
    params = GenerationParams(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=8, stop=("\n", "."))
    engine = server.service.engine
    ask = engine.complete if isinstance(source, str) else engine.chat
    return ask(source, params, threading.Event()).text()[0].strip()


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_generate_until(server, samples, kind):
    for sample, row in zip(samples[kind]["gw_until"], PROMPTS, strict=True):
        assert sample["resps"][0][0].strip() == answer_to(server, row["prompt"])


def test_generate_until_over_chats(server, tasks, tmp_path):
    found = lm_eval(server, tasks, tmp_path, ["gw_until"], "local-chat-completions", "v1/chat/completions")["gw_until"]
    for sample, row in zip(found, PROMPTS, strict=True):
        assert sample["resps"][0][0].strip() == answer_to(server, [Message("user", row["prompt"])])
