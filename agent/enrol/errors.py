"""What can stand between this host and its fleet, one class per cause."""

from __future__ import annotations


class EnrolError(Exception):
    """Base, never raised itself. The text is for the operator of this host."""


class ControlPlaneRefused(EnrolError):  # noqa: N818 - reads as what happened
    """The control plane answered, and the answer is no. `status` is the HTTP status, `code` its error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"the control plane refused: {message} ({code}, HTTP {status})")
        self.status = status
        self.code = code

    def is_about_credentials(self) -> bool:
        """Whether it was this host that was refused, not the form of the request."""
        return self.status in {401, 403, 404}


class ControlPlaneUnreachable(EnrolError):  # noqa: N818
    """No usable answer: network, time-out, 5xx, or something else that is no control plane. Not a refusal."""


class CredentialsInvalid(EnrolError):  # noqa: N818
    """The credentials file is there and cannot be used; the message says why and what to do."""
