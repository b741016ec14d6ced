"""Errors a user can act on: each message is one line that says what is wrong and what to do."""


class SfllavaError(Exception):
    """Base of every error this package raises on purpose."""

    def __str__(self) -> str:
        """One line, whatever is quoted in it."""
        return " ".join(map(str.strip, super().__str__().splitlines()))


class LayoutError(SfllavaError, ValueError):
    """A layout that cannot be parsed, or that does not fit the frames or the grid."""


class InputError(SfllavaError, ValueError):
    """A tensor, question or option of the wrong shape, dtype, device or range."""


class BackendError(SfllavaError, RuntimeError):
    """A backend, decoder or attention kernel that was asked for by name and cannot serve."""


class VideoError(SfllavaError, ValueError):
    """A video that is missing, empty, truncated, without pictures, or undecodable."""


class RenumberedError(VideoError):
    """Frames of a damaged video that turned out, while it was read, to have other numbers: read it again."""


class CheckpointError(SfllavaError, ValueError):
    """A checkpoint that is missing, incomplete, or of an architecture that is not LLaVA."""


class ContextError(SfllavaError, ValueError):
    """Prompt and video tokens that do not fit the language model's context."""


class PatchError(SfllavaError, TypeError):
    """A model, class or library that a drop-in does not know, or cannot undo; nothing of it was changed."""


class OutOfMemoryError(SfllavaError, RuntimeError):
    """A stage that needs more memory than there is; nothing that was there before is lost."""


class NumberError(SfllavaError, ArithmeticError):
    """A model that computed NaN: damaged weights, a damaged session, or 16 bits that overflow."""


class ServerError(SfllavaError, RuntimeError):
    """A server that failed on this request; another attempt may succeed."""


class SlowServerError(ServerError):
    """A server that gave no whole reply in time."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def dtype_name(dtype: object) -> str:
    """The name of a torch or NumPy dtype: "float32"."""
    return str(dtype).removeprefix("torch.")


def check_count(name: str, count: object) -> None:
    """InputError unless it is a whole number of at least 1, that counts something."""
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 1 << 31:
        raise InputError(f"{name} must be an integer of at least 1, not {count!r}")
