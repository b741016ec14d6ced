"""Errors that a user can fix. A message is one line: what is wrong, and what to do."""


class SfllavaError(Exception):
    """Base of all errors that this package raises."""

    def __str__(self) -> str:
        """The message in one line, also if a quoted text has several."""
        return " ".join(map(str.strip, super().__str__().splitlines()))


class LayoutError(SfllavaError, ValueError):
    """A layout that cannot be parsed, or that does not fit the frames or the grid."""


class InputError(SfllavaError, ValueError):
    """A tensor, question or option of the wrong shape, dtype, device or range."""


class BackendError(SfllavaError, RuntimeError):
    """A backend, decoder, device or attention that was requested by name and is not supported."""


class VideoError(SfllavaError, ValueError):
    """A video that is missing, empty, truncated, without pictures, or undecodable."""


class RenumberedError(VideoError):
    """Frames of a damaged video turned out to have other numbers while it was read: read it again."""


class CheckpointError(SfllavaError, ValueError):
    """A checkpoint that is missing, incomplete, or of an architecture that is not LLaVA."""


class ContextError(SfllavaError, ValueError):
    """Prompt and video tokens that do not fit the language model's context."""


class PatchError(SfllavaError, TypeError):
    """A model, class or library that a patch does not support, or a patch that cannot be undone. Nothing is changed."""


class OutOfMemoryError(SfllavaError, RuntimeError):
    """A stage that is out of memory. Previous state is unchanged."""


class NumberError(SfllavaError, ArithmeticError):
    """A model that computed NaN: its weights or the session are damaged, or 16-bit values overflow."""


class ServerError(SfllavaError, RuntimeError):
    """A server that failed on this request; another attempt may succeed."""


class SlowServerError(ServerError):
    """A server that did not reply in time."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dtype_name(dtype: object) -> str:
    """The name of a torch or NumPy dtype: "float32"."""
    return str(dtype).removeprefix("torch.")


def check_count(name: str, count: object) -> None:
    """Raise InputError unless `count` is an integer of at least 1 that fits in int32."""
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 1 << 31:
        raise InputError(f"{name} must be an integer of at least 1, not {count!r}")
