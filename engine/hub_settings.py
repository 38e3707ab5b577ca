"""Which Hub, and as whom: a mirror's address and an access token, as set in the page.

The token is written and never read back by any face. It lies in a file of its own that only the user may read,
together with the place it is for: another place never gets it.
"""

import json
import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from ..core.errors import BadParameter
from ..hub import hub_request
from ..hub.repository import Hub
from .settings import Settings

_ENDPOINT = "hub_endpoint"

log = logging.getLogger(__name__)


class HubSettings:
    """Applied to `hub` when made and on every change."""

    def __init__(self, hub: Hub, settings: Settings) -> None:
        self._hub, self._settings = hub, settings
        self._apply()

    @property
    def endpoint(self) -> str:
        """The mirror that was set; "" for the environment's, or the Hub itself."""
        return str(self._settings.get(_ENDPOINT, "") or "")

    @property
    def has_token(self) -> bool:
        """Whether one was saved here for the place that is asked now."""
        return bool(self._tokens().get(self._hub.endpoint))

    @property
    def text(self) -> str:
        """Where is asked and how, in a sentence, with no secret in it."""
        where = hub_request.host_of(self._hub.endpoint)
        if offline := hub_request.offline_switch():
            return f"{offline} is set: nothing is asked of {where}. Models on disk work; unset it and start again to download."
        if self.has_token:
            return f"Asks {where} with the token that was saved here."
        login = " with the token of HF_TOKEN or `hf auth login`" if self._hub.token() else " without a token"
        return f"Asks {where}{login}."

    def set_endpoint(self, address: str) -> None:
        """Use a mirror; "" goes back. Raises BadParameter for what is no address."""
        address = address.strip().rstrip("/")
        parts = urlsplit(address)
        if address and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise BadParameter("A mirror is an address like https://hf-mirror.com, without anything after it.")
        if "@" in parts.netloc:
            raise BadParameter("Write the address without a name or password in it; a token belongs into its own box.")
        self._settings.put(_ENDPOINT, address)
        self._apply()

    def set_token(self, token: str) -> None:
        """Save a token for the place that is asked now; "" forgets it. Raises BadParameter, which does not repeat it."""
        token = token.strip()
        if any(not 33 <= ord(each) <= 126 for each in token):
            raise BadParameter("That is not a token: it holds spaces or letters that no token has. It was not saved.")
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
            values = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(place): str(token) for place, token in values.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError):
            log.warning("the saved tokens could not be read; enter yours again")
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
            raise BadParameter(f"The token could not be saved ({error.strerror}).") from None
