"""Who may do what: owners everything, guests chat and nothing else.

Hiding a tab is courtesy, not protection: a guest can call any handler over HTTP. So every handler
that touches models, downloads, folders or settings begins with `access.require_owner(request)`.
"""

from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class Access:
    owners: frozenset[str] | None = None  # names that log in as owners; None: nobody logs in, everybody is one

    def is_owner(self, request: gr.Request) -> bool:
        return self.owners is None or getattr(request, "username", None) in self.owners

    def require_owner(self, request: gr.Request) -> None:
        """Raises gr.Error, which the page and the API client both get as a sentence."""
        if not self.is_owner(request):
            raise gr.Error("Only the owner of this page may do that. As a guest you can chat.")


@dataclass(frozen=True)
class ShareInfo:
    url: str  # the public link
    guest_name: str
    guest_password: str

    @property
    def invitation(self) -> str:
        """What is sent to a guest."""
        return f"{self.url}\nName: {self.guest_name}\nPassword: {self.guest_password}"


@dataclass
class Share:
    """Where the door puts the link: it is known only after the page was launched."""

    info: ShareInfo | None = None
