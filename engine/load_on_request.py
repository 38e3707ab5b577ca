"""Whether every program that may use the API may name the local model to load: a switch of the page, kept in the settings."""

from .settings import Settings

_KEY = "load_on_request"


def allowed(settings: Settings) -> bool:
    return settings.get(_KEY, False)


def allow(settings: Settings, on: bool) -> None:
    """Remembered."""
    settings.put(_KEY, on)
