"""A call to paste for each protocol of the API. tests/test_api_calls.py runs each of them."""

import json
from typing import Any

QUESTION = "What is the capital of France?"
TEXT = "The capital of France is"


def calls(address: str, model: str, locked: bool) -> dict[str, tuple[str, str]]:
    """Program -> (language, example to copy), in the order of the page."""
    model = model or "the-loaded-model"
    key = "YOUR_KEY" if locked else "none"
    token = ', token="YOUR_KEY"' if locked else ""
    headers = ', headers={"Authorization": "Bearer YOUR_KEY"}' if locked else ""

    def curl(path: str, body: dict[str, Any]) -> tuple[str, str]:
        header = '  -H "Authorization: Bearer YOUR_KEY" \\\n' if locked else ""
        data = json.dumps(body)
        return "shell", f"curl {address}{path} \\\n  -H \"Content-Type: application/json\" \\\n{header}  -d '{data}'"

    hub = f"""from huggingface_hub import InferenceClient

client = InferenceClient("{address}"{token})
print(client.text_generation("{TEXT}", max_new_tokens=64,
                             do_sample=True, temperature=0.7, top_p=0.95, top_k=40, repetition_penalty=1.1))
"""
    openai = f"""from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key="{key}")
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "{QUESTION}"}}],
)
print(answer.choices[0].message.content)
"""
    responses = f"""from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key="{key}")
answer = client.responses.create(model="{model}", input="{QUESTION}")
print(answer.output_text)
"""
    anthropic = f"""from anthropic import Anthropic

client = Anthropic(base_url="{address}", api_key="{key}")
answer = client.messages.create(
    model="{model}",
    max_tokens=512,
    messages=[{{"role": "user", "content": "{QUESTION}"}}],
)
print(answer.content[0].text)
"""
    ollama = f"""from ollama import Client

client = Client("{address}"{headers})
answer = client.chat("{model}", messages=[{{"role": "user", "content": "{QUESTION}"}}])
print(answer.message.content)
"""
    tavern = f"""API Connections (the plug)
  API:       Text Completion
  API Type:  KoboldCpp
  API URL:   {address}
{"  API key:   YOUR_KEY" + chr(10) if locked else ""}Connect.

Or with the chat template of the model:
  API:                     Chat Completion
  Chat Completion Source:  Custom (OpenAI-compatible)
  Custom Endpoint:         {address}/v1
"""
    return {
        "curl": curl("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}),
        "Python: huggingface_hub": ("python", hub),
        "Python: openai": ("python", openai),
        "Python: openai, responses": ("python", responses),
        "Python: anthropic": ("python", anthropic),
        "Python: ollama": ("python", ollama),
        "SillyTavern": ("yaml", tavern),
        "TGI": curl("/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": 64}}),
        "KoboldCpp": curl("/api/v1/generate", {"prompt": TEXT, "max_length": 64}),
        "llama.cpp": curl("/completion", {"prompt": TEXT, "n_predict": 64}),
        "LoLLMS": curl("/lollms_generate", {"prompt": TEXT, "n_predict": 64}),
    }


PROGRAMS = tuple(calls("", "", False))
