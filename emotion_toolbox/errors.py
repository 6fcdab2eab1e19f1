"""Errors for people: what is wrong, where, and what mends it, in a line or two."""


class ShownAsMessage:
    """An exception that Jupyter shows as its message alone; logs and debuggers see the chain."""

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {self}"]


class ConfigError(ShownAsMessage, ValueError):
    """A setting that does not exist or cannot work; the message lists what would."""


class DataError(ShownAsMessage, ValueError):
    """Data that must not be trained on; the message names the file, the row and the fix."""


class ImageError(ShownAsMessage, ValueError):
    """An image that cannot be used; the message is the reason."""


class WeightsError(ShownAsMessage, RuntimeError):
    """Pretrained weights that cannot be had or do not fit; the message holds the remedy."""


class WeightsUnavailable(WeightsError):
    """Weights that exist, but neither in the cache nor within reach of this machine."""


class CheckpointError(ShownAsMessage, RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file and the remedy."""


class ExportError(ShownAsMessage, RuntimeError):
    """An export that cannot be used; the message names the folder and what is wrong with it."""


class DivergedError(ShownAsMessage, FloatingPointError):
    """Training whose numbers are not finite any more."""


class DeviceMemoryError(ShownAsMessage, MemoryError):
    """A device whose memory does not suffice; the message names the settings to lower."""


class Stopped(ShownAsMessage, KeyboardInterrupt):
    """Training that was asked to stop; the message says whether it was saved, and how to go on."""


NAMED_ERRORS = (ConfigError, DataError, ImageError, WeightsError, CheckpointError, ExportError,
                DivergedError, DeviceMemoryError)  # fmt: skip
