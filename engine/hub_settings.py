"""Which Hub is used, and with which access token, as set in the page.

No front end can read the token back. It is in a file of its own that only the user may read, together with the address
that it is for: no other address gets it.
"""

import json
import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from ..core.errors import BadParameter
from ..hub import hub_errors, hub_request
from ..hub.repository import Hub
from .settings import Settings, read_json

_ENDPOINT = "hub_endpoint"

log = logging.getLogger(__name__)


class HubSettings:
    """Applied to `hub` when made and on every change."""

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self._hub, self._settings = hub, settings
        self._apply()

    @property
    def endpoint(self) -> str:
        """The mirror that was set; "": the one of the environment, or the Hub itself."""
        address = self._settings.get(_ENDPOINT, "")
        try:
            return _checked(address)
        except BadParameter as error:
            log.warning("the saved address of the Hub is ignored: %s", error)
            return ""

    @property
    def has_token(self) -> bool:
        """Whether a token is saved for the address that is used now."""
        return bool(self._tokens().get(self._hub.endpoint))

    @property
    def text(self) -> str:
        """The address and the kind of login in a sentence, without a secret."""
        where = hub_errors.host_of(self._hub.endpoint)
        if offline := hub_request.offline_switch():
            return f"{offline} is set, so {where} is not used. Models on disk work. To download, unset it and start again."
        if self.has_token:
            return f"Uses {where} with the token that was saved here."
        login = " with the token of HF_TOKEN or `hf auth login`" if self._hub.token() else " without a token"
        return f"Uses {where}{login}."

    def set_endpoint(self, address: str) -> None:
        """Use a mirror; "": the Hub itself again. Raises BadParameter for what is no address."""
        self._settings.put(_ENDPOINT, _checked(address))
        self._apply()

    def set_token(self, token: str) -> None:
        """Save a token for the address that is used now; "" removes it. Raises BadParameter, which does not quote it."""
        token = token.strip()
        if any(not 33 <= ord(each) <= 126 for each in token):
            raise BadParameter(
                "That is not a token: it has spaces or letters that no token has. It was not saved. "
                "Copy it again from the Hub's settings."
            )
        tokens = self._tokens()
        tokens.pop(self._hub.endpoint, None)
        if token:
            tokens[self._hub.endpoint] = token
        self._write(tokens)
        self._apply()

    def _apply(self) -> None:
        self._hub.use(self.endpoint or None, None)
        self._hub.use(self.endpoint or None, self._tokens().get(self._hub.endpoint))

    @property
    def _path(self) -> Path:
        return self._settings.path.with_name("hub_tokens.json")

    def _tokens(self) -> dict[str, str]:
        try:
            values = read_json(self._path)
            return {address: token for address, token in values.items() if isinstance(token, str)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError):
            log.warning("the saved tokens could not be read; enter your token again")
            return {}

    def _write(self, tokens: dict[str, str]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not tokens:
                self._path.unlink(missing_ok=True)
                return
            draft = self._path.with_suffix(".draft")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                json.dump(tokens, file)
            os.replace(draft, self._path)
        except OSError as error:
            raise BadParameter(
                f"The token could not be saved ({error.strerror}). Free space on the disk, or make the folder writable."
            ) from None


def _checked(address: str) -> str:
    """A mirror's address without a slash at its end. Raises BadParameter."""
    address = address.strip().rstrip("/")
    shown = f"{address[:80]!r} is not the address of a mirror."
    wanted = f"{shown} Write one like https://hf-mirror.com, without anything after it."
    try:
        parts = urlsplit(address)
        _port = parts.port  # raises for what is no number
    except ValueError:
        raise BadParameter(wanted) from None
    if address and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
        raise BadParameter(wanted)
    if "@" in parts.netloc:
        raise BadParameter("Write the address without a name or password in it; a token belongs into its own box.")
    return address
