"""Pictures in requests, as each protocol has them, for a model that sees: all become the URLs of Message.pictures."""

from dataclasses import replace
from typing import Any

from ..core.chat import Message
from ..core.picture import MOST_PICTURE_CHARACTERS, is_picture, picture_of
from ..loaders.contract.base import LoadedModel
from .problems import Problem

_KINDS = "PNG, JPEG, WebP or GIF"


def of_url(found: Any, field: str) -> str:
    """Of OpenAI's parts: a URL, or an object with one. Raises Problem."""
    url = found.get("url") if isinstance(found, dict) else found
    if not isinstance(url, str) or not (is_picture(url) or url.startswith(("http://", "https://"))):
        text = f"{field}: image_url needs the URL of a picture: https://…, or data:image/png;base64,… ({_KINDS})."
        raise Problem("invalid", text, field)
    return _short(url, field)


def of_source(source: dict[str, Any] | None, field: str) -> str:
    """Of Anthropic's blocks: base64 with its type, or a URL. Raises Problem."""
    given = source or {}
    url = given.get("url") if given.get("type") == "url" else f"data:{given.get('media_type')};base64,{given.get('data')}"
    if not isinstance(url, str) or not (is_picture(url) or url.startswith(("http://", "https://"))):
        text = f"{field}.source must be a picture in base64 with its media_type ({_KINDS}), or a URL: https://…"
        raise Problem("invalid", text, field)
    return _short(url, field)


def of_base64(data: Any, field: str) -> str:
    """Of Ollama's images: base64 without a type. Raises Problem."""
    url = picture_of(data) if isinstance(data, str) else None
    if url is None:
        raise Problem("invalid", f"{field} must be the base64 of a picture ({_KINDS}).", field)
    return _short(url, field)


def with_pictures(loaded: LoadedModel, source: Any, field: str) -> Any:
    """Messages whose pictures are Ollama's base64, with URLs instead; a text stays. Raises Problem, first for a model that
    reads text only."""
    if isinstance(source, str) or not any(isinstance(each, Message) and each.pictures for each in source):
        return source
    if not loaded.sees_pictures:
        raise Problem("unsupported", "This model reads text only; found images. Leave them out.", field)
    return [replace(each, pictures=tuple(of_base64(data, field) for data in each.pictures)) for each in source]


def _short(url: str, field: str) -> str:
    if len(url) > MOST_PICTURE_CHARACTERS:
        raise Problem("invalid", f"{field}: a picture may have 3 MB. Make it smaller, then send it again.", field)
    return url
