"""Every error that this project raises on purpose. Each says what was found and what to do.

GptqWebuiError
├── BadModelName            the text is not owner/name[:branch]
├── HubError                anything between this program and the Hub
│   ├── NoSuchRepository
│   ├── NoSuchBranch        names the branches that exist
│   ├── AccessDenied        gated or private: where to accept, how to set the token
│   ├── HubUnreachable      no network, or HF_HUB_OFFLINE is set
│   ├── WrongRepository     GGUF, AWQ, EXL2, unquantised … recognised from the listing
│   ├── DiskFull            both figures
│   └── DownloadFailed      cut too often, or a file that is not what the Hub says it is
├── ModelError              a folder on disk
│   ├── BadFile             one small file of it: no regular file, no JSON, a Git LFS pointer …
│   ├── BadQuantizeConfig
│   ├── BadCheckpoint       the tensors do not fit the model, or a file is cut short
│   └── NoSuchModel
├── LoadRefused             no loader takes this model; carries the refusals
├── LoadFailed              a loader tried and could not
│   ├── NotEnoughMemory     it does not fit; smaller context, 8-bit cache or smaller branch
│   └── LoadCancelled       the user stopped it
├── NotLoaded               a chat without a model
├── AnswerFailed            the model broke in the middle of an answer
├── PromptTooLong           one message alone is longer than the context
├── BadParameter            a sampling parameter outside its limits
└── Busy                    the model is being loaded or unloaded
    └── QueueFull           too many requests wait already
"""

from pathlib import Path


class GptqWebuiError(Exception):
    """Its text is a sentence for the user, who sees nothing else of it."""


class BadModelName(GptqWebuiError):
    def __init__(self, text: str, why: str = "") -> None:
        shown = text if len(text) <= 120 else text[:117] + "…"
        super().__init__(
            f"{shown!r} is not a model name{': ' + why if why else ''}. Write owner/name or owner/name:branch, "
            "for example TheBloke/Mistral-7B-Instruct-v0.2-GPTQ:gptq-4bit-32g-actorder_True."
        )


class HubError(GptqWebuiError):
    pass


class NoSuchRepository(HubError):
    pass


class NoSuchBranch(HubError):
    pass


class AccessDenied(HubError):
    pass


class HubUnreachable(HubError):
    pass


class WrongRepository(HubError):
    """`candidates` are repositories that may hold the same model as GPTQ; `sister` is the one that exists, "owner/name"."""

    def __init__(self, found: str, candidates: tuple[str, ...] = (), sister: str = "") -> None:
        sentences = [found]
        if sister:
            sentences.append(f"The same model as GPTQ: {sister}.")
        elif candidates:
            sentences.append(f"It may exist as GPTQ: {' or '.join(candidates)}.")
        super().__init__(" ".join(sentences))
        self.found, self.candidates, self.sister = found, candidates, sister


class DiskFull(HubError):
    """The disk is too small: found before the first byte, or during the download (`begun`), which can continue later."""

    def __init__(self, text: str, missing_bytes: int = 0, folder: Path | None = None, begun: bool = False) -> None:
        super().__init__(text)
        self.missing_bytes = missing_bytes  # still to be written, including what other downloads have reserved
        self.folder, self.begun = folder, begun


class DownloadFailed(HubError):
    pass


class ModelError(GptqWebuiError):
    pass


class BadFile(ModelError):
    pass


class BadQuantizeConfig(ModelError):
    pass


class BadCheckpoint(ModelError):
    pass


class NoSuchModel(ModelError):
    pass


class LoadRefused(GptqWebuiError):
    pass


class LoadFailed(GptqWebuiError):
    pass


class NotEnoughMemory(LoadFailed):
    pass


class LoadCancelled(LoadFailed):
    pass


class NotLoaded(GptqWebuiError):
    def __init__(self) -> None:
        super().__init__("No model is loaded. Choose one in the Model tab.")


class AnswerFailed(GptqWebuiError):
    pass


class PromptTooLong(GptqWebuiError):
    pass


class BadParameter(GptqWebuiError):
    """`field` is the parameter at fault, None if it is not one of them."""

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class Busy(GptqWebuiError):
    pass


class QueueFull(Busy):
    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # when there is room again, as far as one knows
