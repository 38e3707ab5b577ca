"""Who may do what: owners may do everything, guests may chat.

A hidden tab is a courtesy, not a protection: a guest can call any handler over HTTP. So every handler
that touches models, downloads, folders or settings begins with `access.require_owner(request)`.
"""

from dataclasses import dataclass

import gradio as gr

from .gradio_compat import refusal


@dataclass(frozen=True)
class Access:
    owners: frozenset[str] | None = None  # names of owners who log in; None: there is no login, and every visitor is an owner

    def is_owner(self, request: gr.Request) -> bool:
        return self.owners is None or getattr(request, "username", None) in self.owners

    def require_owner(self, request: gr.Request) -> None:
        """Raises gr.Error with a sentence for the page and for clients."""
        if not self.is_owner(request):
            raise refusal("Only the owner of this page may do that. As a guest you can chat.")


@dataclass(frozen=True)
class ShareInfo:
    url: str  # the public link
    guest_name: str
    guest_password: str

    @property
    def invitation(self) -> str:
        """The lines to send to a guest."""
        return f"{self.url}\nName: {self.guest_name}\nPassword: {self.guest_password}"


@dataclass
class Share:
    """The public link. The server fills it in after the launch, when the link is known."""

    info: ShareInfo | None = None
