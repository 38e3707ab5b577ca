"""The requests and answers of OpenAI's API, with its field names. Requests may also have our own sampling fields."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from .sampling_fields import Open, Sampling

FINGERPRINT = f"gptq-webui-{__version__}"  # a text, as the text-generation package takes no null


class ContentPart(Open):
    type: str
    text: str | None = None
    image_url: Any = Field(None, description="a URL, or an object with one; for a model that sees pictures")


class ChatMessage(Open):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, description="of an assistant")
    tool_call_id: str | None = Field(None, description="of a tool's message: the call that it answers")
    function_call: dict[str, Any] | None = None


class Function(Open):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    arguments: dict[str, Any] | None = Field(None, description="the same, as TGI calls it")


class ToolField(Open):
    type: str = "function"
    function: Function | None = None


class StreamOptions(Open):
    include_usage: bool = False


class ResponseFormat(Open):
    type: str = Field(description="text, json_object, json_schema; as TGI also json and regex, with a value")
    json_schema: dict[str, Any] | None = None
    value: Any = None


class _AnswerRequest(Sampling):
    model: str | None = Field(
        None, description="The loaded model answers, whatever the name. A local model that is not loaded is refused."
    )
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    max_tokens: int | None = Field(None, ge=-1, description="-1: as many as fit into the context")
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = Field(None, description="The ids of the prompt and of the answer, as vLLM gives them")
    response_format: ResponseFormat | None = None
    json_schema: dict[str, Any] | str | None = Field(None, description="A JSON schema, as llama.cpp, SGLang and tabbyAPI take it")
    grammar: str | None = Field(None, description="llama.cpp's grammar (GBNF), as KoboldCpp's programs send it")
    grammar_string: str | None = Field(None, description="The same, as text-generation-webui's programs send it")
    ebnf: str | None = Field(None, description="The same, as SGLang's programs send it")
    regex: str | None = Field(None, description="A pattern that the answer matches, as SGLang's programs send it")
    guided_json: Any = Field(None, description="A JSON schema, as programs for vLLM send it")
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, description="The answer is one of these texts")
    guided_grammar: str | None = Field(None, description="llama.cpp's grammar, or Lark's")
    structured_outputs: dict[str, Any] | None = Field(None, description="json, json_object, regex, choice or grammar, as vLLM")


class ChatCompletionRequest(_AnswerRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[ToolField] | None = None
    tool_choice: str | dict[str, Any] | None = Field(None, description="auto, none, required, or the one function to call")
    parallel_tool_calls: bool | None = None
    reasoning_format: str | None = Field(None, description="llama.cpp's: none leaves thoughts in the text, with their marks")
    separate_reasoning: bool | None = Field(None, description="SGLang's: false is the same")
    include_reasoning: bool | None = Field(None, description="vLLM's: false leaves thoughts out")
    reasoning_effort: str | None = Field(None, description="none, minimal, low, medium, high or xhigh")
    enable_thinking: bool | None = Field(None, description="Whether the model thinks first, where its template has a switch")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Values for the model's chat template, as vLLM, SGLang and llama.cpp take them"
    )
    functions: list[Function] | None = Field(None, description="as tools, in OpenAI's older protocol")
    function_call: str | dict[str, Any] | None = None

    @property
    def thoughts_apart(self) -> bool:
        return self.separate_reasoning is not False and self.reasoning_format != "none"


class CompletionRequest(_AnswerRequest):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16)
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="vLLM's: of each token of the prompt")


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "gptq-webui"
    loaded: bool = False


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class ChatAnswer(BaseModel):
    role: str = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = Field(default=None, description="what a model thought before it answered")
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None


class ChatChoice(BaseModel):
    model_config = ConfigDict(extra="allow")  # token_ids, where they were asked for

    index: int
    message: ChatAnswer
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    model_config = ConfigDict(extra="allow")  # token_ids, prompt_token_ids and prompt_logprobs, where they were asked for

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class Completion(BaseModel):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[TextChoice]
    usage: Usage


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody
