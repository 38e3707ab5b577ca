"""One option of a loader: its default, and how the panel shows it. Options without a label are not shown."""

from dataclasses import field
from typing import Any

from ...core.errors import BadParameter


def option(
    default: Any,
    label: str = "",
    help: str = "",
    choices: tuple[str, ...] = (),
    *,
    secret: bool = False,
    several_gpus: bool = False,
) -> Any:
    """A dataclass field. `secret`: shown as dots, left out of reports. `several_gpus`: shown only where there are."""
    metadata: dict[str, Any] = {"secret": secret} if secret else {}
    metadata |= {"several_gpus": True} if several_gpus else {}
    if label:
        metadata |= {"label": label, "help": help, "choices": choices}
    return field(default=default, metadata=metadata)


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises BadParameter, which names the choices."""
    if value not in choices:
        raise BadParameter(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}; found {value!r}.")


def require_context(name: str, value: Any) -> None:
    """Raises BadParameter for a context length that nobody could load."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 20:
        raise BadParameter(f"{name} must be 0 (automatic) or up to {1 << 20}; found {value!r}.")


def gigabytes(name: str, text: str) -> list[float]:
    """'10,7.5' -> [10.0, 7.5], '' -> []. Raises BadParameter for anything but positive numbers with commas."""
    try:
        values = [float(each) for each in str(text).replace(";", ",").split(",") if each.strip()]
    except ValueError:
        values = [-1.0]
    if any(not 0 <= value < 1e6 for value in values):
        raise BadParameter(f"{name} must be gigabytes for each GPU, with commas, for example 20 or 16,20; found {text!r}.")
    return values
