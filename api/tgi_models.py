"""The requests and answers of text-generation-inference, with its field names."""

from typing import Any

from pydantic import BaseModel, Field

from .sampling_fields import Open, fields_of

_Sampling: Any = fields_of("tgi", checked=False)  # tgi_checks.py checks them


class Parameters(_Sampling):
    best_of: int | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: int | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: dict[str, Any] | None = None
    adapter_id: str | None = None


class GenerateRequest(Open):
    inputs: str
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    stream: bool | None = None


class Token(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null where the loaded model reports none, and for the end token")
    special: bool


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None = None
    prefill: list[dict[str, Any]] = []
    tokens: list[Token] = []


class Details(BaseModel):
    finish_reason: str = Field(description="length, eos_token or stop_sequence")
    generated_tokens: int
    seed: int | None = None
    prefill: list[dict[str, Any]] = []
    tokens: list[Token] = []
    best_of_sequences: list[BestOfSequence] | None = None
    top_tokens: list[list[Token]] | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class Info(BaseModel):
    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None = "text-generation"
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int = 1
    max_client_batch_size: int = 1
    router: str = "gptq-webui"
    version: str
    sha: str | None = None
    docker_label: str | None = None


class Error(BaseModel):
    error: str
    error_type: str
