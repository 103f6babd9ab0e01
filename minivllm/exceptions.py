"""Every error minivllm raises on purpose, and whose fault it is.

    MinivllmError
    ├── ConfigError            start-up: an argument, the port, the machine          exit code 2
    │   └── ModelFilesError    start-up: config.json, shards, tensors                exit code 3
    ├── RequestError           the client's request; other requests go on            HTTP 400
    │   ├── UnsupportedError   an option that exists elsewhere but not here (yet)    HTTP 400
    │   ├── NotFoundError      the request names something that is not here          HTTP 404
    │   │   └── ModelNotFoundError … a model that is not served
    │   ├── ConflictError      what is asked for goes against what is underway       HTTP 409
    │   └── QueueFullError     as many wait as may; the request can be sent again    HTTP 503
    └── EngineError            the engine failed, not the client                     HTTP 500
        ├── EngineGenerateError one request failed inside the engine                 HTTP 500
        ├── EngineStartError   the core did not come up; carries its exit code
        └── EngineDeadError    the core is gone; nothing more will be answered       HTTP 503 on /health

An error names the value that was wrong and says what to do about it.
"""

from __future__ import annotations


class MinivllmError(Exception):
    """The root of the tree."""


class ConfigError(MinivllmError):
    """The server cannot start as asked. The message is the last line the user sees."""

    exit_code = 2


class ModelFilesError(ConfigError):
    """A file, tensor or shape of the checkpoint is wrong; the message names it."""

    exit_code = 3


class RequestError(MinivllmError):
    """The request is at fault (4xx). `param` names the field."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class UnsupportedError(RequestError):
    """The field is known and would change the answer, but this version does not implement it."""


class NotFoundError(RequestError):
    """The request names something that is not here."""

    status = 404


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served here."""


class ConflictError(RequestError):
    """The engine is in no state for this now."""

    status = 409


class QueueFullError(RequestError):
    """A limit on what waits is reached; nothing is wrong with the request. `reason` names the limit."""

    status = 503

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(MinivllmError):
    """The engine is at fault (5xx)."""

    status = 500


class EngineGenerateError(EngineError):
    """One request failed inside the engine; the others go on."""


class EngineStartError(EngineError):
    """The engine core did not come up. `exit_code` is what this process should exit with."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineDeadError(EngineError):
    """The engine core is gone."""

    def __init__(self, message: str = "the engine core died; the server is shutting down") -> None:
        super().__init__(message)
