"""Errors that reach a user. Each message is one sentence that names the thing and the remedy."""

MAX_MESSAGE = 4000


class ElinvarError(Exception):
    """Anything a user can cause; the CLI prints it and exits 1, the server answers 4xx or 5xx.

    A message stays one line of a bearable length whatever name from a file it quotes: control
    characters are escaped, and of what is very long the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ModelError(ElinvarError):
    """A model that cannot be found, read or run: bad file, unknown architecture, no tokenizer."""


class InputError(ElinvarError):
    """A bad request. `field` is the name the user wrote (for example `max_tokens`)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class EngineError(ElinvarError):
    """The engine failed in a step or is shut down: not the fault of the request. The cause, where
    there is one, is chained."""


class QueueFullError(ElinvarError):
    """More requests wait than their tenant may have waiting; nothing is wrong with this one."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """retry_after_s: seconds until the work that waits now should be done."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
