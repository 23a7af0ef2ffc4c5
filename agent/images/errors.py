"""What can go wrong with images: a leaf per cause, so that callers can tell "build it" from "rebuild it"."""

# ruff: noqa: N818 - the names say what happened; "Error" would only make them longer.

from __future__ import annotations


class ImagesError(Exception):
    """Base of this package's errors; never raised itself. The message says what to do."""


class ImageNotFound(ImagesError):
    """No image of that name was ever built in this store."""


class ImageBroken(ImagesError):
    """The image is there but incomplete: its manifest is cut or a file of it is missing or has another size."""


class BuildFailed(ImagesError):
    """A program that the build runs failed; the message carries the end of what it said."""


class KernelUnusable(ImagesError):
    """The kernel package holds no kernel that a microVM can boot."""


class InUseUnknown(ImagesError):
    """A sandbox or a snapshot does not tell which image it needs; the message names its file."""
