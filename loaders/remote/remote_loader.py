"""Engines on other machines: vLLM, SGLang, TGI, text-generation-webui, or any that speaks OpenAI's protocol.

For users who need more than one machine. No weights are read here: the conversation is sent, the answer is streamed.
Used only if the user chooses it.
"""

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from urllib.parse import urlsplit

from ...core.errors import BadParameter, LoadFailed
from ...core.models import LocalModel, remote_model
from ..contract.base import Loader, LoadProgress, Refusal
from ..contract.options import option, require_choice, require_context
from .remote_model import RemoteModel
from .remote_pool import Endpoint, Pool
from .remote_thread import EventLoop

KEY_VARIABLE = "GPTQ_WEBUI_REMOTE_KEY"
_SEES = ("automatic", "yes", "no")
_DEFAULT_CONTEXT_TOKENS = 8192  # shown if the engine does not report one; the engine refuses a chat that is too long


@dataclass(frozen=True)
class RemoteOptions:
    base_url: str = option("", "Addresses", "For example http://192.168.1.5:8000/v1; several with commas share the work.")
    api_key: str = option("", "Key", f"The engine's API key; empty: the variable {KEY_VARIABLE}, or none.", secret=True)
    model: str = option("", "Model", "Its name there; empty: the one that is called as the folder, or the only one.")
    context_tokens: int = option(0)  # what is shown; 0: what the engine reports
    timeout_s: int = option(600, "Patience", "Seconds without a token until an engine counts as lost.")
    sees_pictures: str = option("automatic", "Sees pictures", "automatic: if the engine's list of models says so.", _SEES)

    def __post_init__(self) -> None:
        require_context("context_tokens", self.context_tokens)
        require_choice("sees_pictures", self.sees_pictures, _SEES)
        if not isinstance(self.timeout_s, (int, float)) or not 1 <= self.timeout_s <= 86400:
            raise BadParameter(f"timeout_s must be 1 to 86400 seconds; found {self.timeout_s!r}.")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise BadParameter(f"{url!r} is not the address of an engine. Write it like http://192.168.1.5:8000/v1.")

    @property
    def urls(self) -> list[str]:
        """Each address once, with the /v1 that most engines have and users forget."""
        found = [each.rstrip("/") for each in re.split(r"[,\s]+", self.base_url) if each]
        return list(dict.fromkeys(each if urlsplit(each).path else f"{each}/v1" for each in found))

    def serving(self, model: LocalModel) -> "RemoteOptions":
        """With the addresses that the model came from, unless others are given."""
        return self if self.base_url or not model.served_by else replace(self, base_url=model.served_by)


class RemoteLoader(Loader):
    name: ClassVar[str] = "remote"
    options: ClassVar[type] = RemoteOptions
    reason: ClassVar[str] = "computed on other machines"
    automatic: ClassVar[bool] = False

    def refusal(self, model: LocalModel, options: RemoteOptions) -> Refusal | None:
        if not self._machine().has("openai"):
            return Refusal("the package openai is not installed", 'pip install "gptq-webui[remote]"')
        if not options.serving(model).urls:
            return Refusal("no remote engine is named", "write its address into base_url")
        return None

    def needs_bytes(self, model: LocalModel, options: RemoteOptions) -> int:
        return 0

    def models(self, options: RemoteOptions) -> list[LocalModel]:
        """What the engines serve, by name. Raises LoadFailed if none answers."""

        async def ask() -> list[LocalModel]:
            async with _pool(options) as pool:
                await pool.check()
                if not any(each.well for each in pool.endpoints):
                    raise _nobody(pool)
                found = {each.id: each for endpoint in pool.endpoints for each in endpoint.models}
                return [remote_model(name, _context(found[name]), options.base_url) for name in sorted(found)]

        return asyncio.run(ask())

    def load(self, model: LocalModel, options: RemoteOptions, progress: LoadProgress) -> RemoteModel:
        refused = self.refusal(model, options)
        if refused is not None:
            raise LoadFailed(str(refused))
        options = options.serving(model)
        progress(0.2, "Asking " + ", ".join(options.urls))
        loop = EventLoop()
        try:
            pool = loop.run(_open(options))
            well = [each for each in pool.endpoints if each.well]
            if not well:
                raise _nobody(pool)
            name = _name(model, options, well)
            listed = [each for endpoint in well for each in endpoint.models if each.id == name]
            for endpoint in well:
                if endpoint.models and name not in [each.id for each in endpoint.models]:
                    endpoint.well, endpoint.wrong = False, f"it does not serve {name}"
                    pool.endpoints.remove(endpoint)
        except BaseException:
            loop.close()
            raise
        reported = next((context for each in listed if (context := _context(each))), None)
        context = options.context_tokens or reported or _DEFAULT_CONTEXT_TOKENS
        reason = (
            "as you set it" if options.context_tokens else "what the engine reports" if reported else "the engine reports none"
        )
        missing = [each for each in pool.endpoints if not each.well]
        notes = [f"{name}, computed by {', '.join(each.url for each in pool.endpoints if each.well)}."]
        notes += [f"The engine at {each.url} is left out until it answers ({each.wrong})." for each in missing]
        sees = options.sees_pictures == "yes" or (options.sees_pictures == "automatic" and any(map(_sees, listed)))
        if sees:
            notes.append("It sees pictures: attach them in the Chat tab.")
        progress(1.0, "Ready")
        return RemoteModel(model, name, pool, loop, context, reason, tuple(notes), sees)


def _nobody(pool: Pool) -> LoadFailed:
    return LoadFailed(
        f"No engine answers: {pool.troubles()}. Is it running, and is the address right? Start it, or correct the address, "
        "then try again."
    )


class _pool:
    """The engines' clients, closed at the end of the block."""

    def __init__(self, options: RemoteOptions) -> None:
        self._options = options

    async def __aenter__(self) -> Pool:
        self._opened = Pool(_endpoints(self._options))
        return self._opened

    async def __aexit__(self, *_: object) -> None:
        await self._opened.close()


async def _open(options: RemoteOptions) -> Pool:
    pool = Pool(_endpoints(options))
    await pool.check()
    return pool


def _endpoints(options: RemoteOptions) -> list[Endpoint]:
    from openai import AsyncOpenAI, Timeout

    key = options.api_key or os.environ.get(KEY_VARIABLE) or "none"
    timeout = Timeout(float(options.timeout_s), connect=10.0)
    return [Endpoint(url, AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)) for url in options.urls]


def _name(model: LocalModel, options: RemoteOptions, well: Sequence[Endpoint]) -> str:
    """What the model is called there. Raises LoadFailed with the names there are."""
    names = list(dict.fromkeys(each.id for endpoint in well for each in endpoint.models))
    if options.model:
        if names and options.model not in names:
            raise LoadFailed(f"No engine serves {options.model!r}. They serve: {', '.join(names)}. Choose one of these.")
        return options.model
    same = [each for each in names if model.served_as == each or each.rpartition("/")[2] == model.name]
    if same or len(names) == 1:
        return (same or names)[0]
    if not names and model.served_as:
        return model.served_as
    if not names:
        raise LoadFailed("The engine does not say what it serves. Write the model's name there into the option model.")
    raise LoadFailed(f"The engines serve {', '.join(names)}. Write which of them you want into the option model.")


def _context(listed: Any) -> int | None:
    """The context length that vLLM, SGLang, llama.cpp and OpenRouter add to OpenAI's list of models."""
    extra = getattr(listed, "model_extra", None) or {}
    meta = extra.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    for found in (*(extra.get(key) for key in ("max_model_len", "context_length", "context_window")), meta.get("n_ctx")):
        if isinstance(found, int) and found > 0:
            return found
    return None


def _sees(listed: Any) -> bool:
    """Whether an engine's list says that a model sees pictures, in the words of OpenRouter, Mistral, LM Studio and llama.cpp."""
    extra = getattr(listed, "model_extra", None) or {}
    architecture, found = extra.get("architecture"), extra.get("capabilities")
    inputs = architecture.get("input_modalities") if isinstance(architecture, dict) else extra.get("input_modalities")
    if isinstance(found, dict):
        found = [name for name, has in found.items() if has is True]
    words = [each for names in (inputs, found) if isinstance(names, list) for each in names]
    return extra.get("type") == "vlm" or any(each in ("image", "vision", "multimodal") for each in words)
