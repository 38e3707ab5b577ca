"""Programs of others, unchanged, each as a function: `python foreign_clients.py NAME ADDRESS`. They need the extra `clients`.

They disagree with each other and with this project about versions, so they have an environment of their own:
tests/test_api_foreign_clients.py starts its Python, GPTQ_WEBUI_CLIENTS_PYTHON.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ASK = "What is the weather in Paris?"
NAMES = ("instructor", "langchain", "llama_index", "llm", "outlines")


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"12 degrees in {city}"


def city():
    from pydantic import BaseModel, Field

    class City(BaseModel):
        name: str = Field(max_length=12)

    return City


def client(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def instructor(url):
    import instructor

    wanted = city()
    patched = instructor.from_openai(client(url))  # in its default mode, tools
    messages = [{"role": "user", "content": ASK}]
    found = patched.chat.completions.create(model="x", response_model=wanted, messages=messages, max_tokens=60, temperature=0)
    assert isinstance(found, wanted)


def langchain(url):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="x", temperature=0, max_tokens=60, max_retries=0)
    (call,) = model.bind_tools([get_weather], tool_choice="get_weather").invoke(ASK).tool_calls
    assert call["name"] == "get_weather" and set(call["args"]) == {"city"}
    wanted = city()
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(wanted, method=method).invoke(ASK), wanted)


def llama_index(url):
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    options = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 2048, "max_tokens": 60}
    model = OpenAILike(model="x", api_base=f"{url}/v1", api_key="none", temperature=0, max_retries=0, **options)
    answer = model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=ASK, tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather" and set(call.tool_kwargs) == {"city"}


def llm(url):
    with tempfile.TemporaryDirectory() as folder:
        entry = {"model_id": "here", "model_name": "x", "api_base": f"{url}/v1", "supports_tools": True, "supports_schema": True}
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

        def run(*arguments):
            command = [
                sys.executable,
                "-m",
                "llm",
                "-m",
                "here",
                "--no-stream",
                "-o",
                "max_tokens",
                "60",
                "-o",
                "temperature",
                "0",
            ]
            done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
            return done.stdout

        run("-T", "llm_version", "What is the capital of France?")
        assert set(json.loads(run("--schema", json.dumps(city().model_json_schema()), ASK))) == {"name"}


def outlines(url):
    import outlines

    found = outlines.from_openai(client(url), "x")(ASK, city(), max_tokens=60, temperature=0)
    assert set(json.loads(found)) == {"name"}


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print("done")
