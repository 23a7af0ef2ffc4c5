"""What can stand between this host and its fleet, one class per cause."""

from __future__ import annotations

NO_CODE = "unknown"
"""The code of an answer that has none, and so may be anybody's."""

ABOUT_CREDENTIALS = frozenset({"unauthorized", "forbidden", "not_found"})
"""The codes of a control plane for credentials that are no longer good, with HTTP status 401, 403 or 404."""


class EnrolError(Exception):
    """Base, never raised itself. The text is for the operator of this host."""


class ControlPlaneRefused(EnrolError):  # noqa: N818 - reads as what happened
    """The control plane answered, and the answer is no. `status` is the HTTP status, `code` its error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"the control plane refused: {message} ({code}, HTTP {status})")
        self.status = status
        self.code = code

    def is_about_credentials(self) -> bool:
        """Whether it was this host that was refused, not the form of the request.

        The status alone says nothing: proxies and firewalls in between have their own 401, 403 and 404.
        """
        return self.status in {401, 403, 404} and self.code in ABOUT_CREDENTIALS


class ControlPlaneUnreachable(EnrolError):  # noqa: N818
    """No usable answer: network, time-out, 5xx, or something else that is no control plane. Not a refusal."""


class CredentialsInvalid(EnrolError):  # noqa: N818
    """The credentials file is there and cannot be used; the message says why and what to do."""


class UrlInvalid(EnrolError):  # noqa: N818
    """What the operator gave as the control plane's URL cannot be one."""


class TokenInvalid(EnrolError):  # noqa: N818
    """What the operator gave as a registration token cannot be one."""


class AddressUnusable(EnrolError):  # noqa: N818
    """There is no address at which a control plane could dial this host, or it is not the one that was given."""


class AlreadyRegistered(EnrolError):  # noqa: N818
    """The machine has credentials, and nobody said that they may go."""


class AnotherHost(EnrolError):  # noqa: N818
    """The token is of one host, and what lives on this machine is another's: the fleet would end it as unknown."""


class HostForgotten(EnrolError):  # noqa: N818
    """Something lives on this machine, and nothing says which host it was."""


class RegistrationInDoubt(EnrolError):  # noqa: N818
    """No answer to a registration: the token may be spent, or not."""


class CredentialsNotStored(EnrolError):  # noqa: N818
    """The control plane has registered this host, and the disk did not take the credentials."""
