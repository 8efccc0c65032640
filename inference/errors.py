"""What can go wrong between a call and a model.

AppError
├── Invalid
│   ├── BodyInvalid           not JSON, or not an object of the expected shape
│   └── ParameterUnsupported  this model's provider has no such parameter: refused by name, never dropped
├── NotFound
│   └── ModelNotFound         absent, or not the caller's
├── UpstreamFailed
│   ├── UpstreamUnreachable   no usable answer: connection, protocol, 5xx, or the operator's credentials
│   └── UpstreamTimedOut      a deadline passed
└── Unavailable
    ├── NoDeploymentAvailable every deployment is being rested
    └── StreamInterrupted     the gateway stops, or the call ran out of time
"""

from __future__ import annotations

from core.errors import Invalid, NotFound, Unavailable, UpstreamFailed


class BodyInvalid(Invalid):
    """The body is not JSON, or not an object of the expected shape."""


class ParameterUnsupported(Invalid):
    """The provider behind this model has no such parameter."""

    code = "unsupported_parameter"

    def __init__(self, name: str, model: str) -> None:
        super().__init__(
            f"Unsupported parameter: '{name}' is not supported with the model `{model}`.",
            param=name,
        )


class ModelNotFound(NotFound):
    """No such model, or not the caller's: OpenAI's own words."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model[:200]}` does not exist or you do not have access to it.")


class UpstreamUnreachable(UpstreamFailed):
    """The provider gave no usable answer."""

    code = "upstream_unreachable"

    def __init__(self, message: str = "The model's provider could not be reached.") -> None:
        super().__init__(message, retry_after_seconds=1)


class UpstreamTimedOut(UpstreamFailed):
    """The provider did not answer within a deadline."""

    code = "upstream_timeout"

    def __init__(self, message: str = "The model's provider did not answer in time.") -> None:
        super().__init__(message, retry_after_seconds=1)


class NoDeploymentAvailable(Unavailable):
    """Every deployment of the model failed lately and is being rested."""

    code = "model_unavailable"

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__("This model is unavailable just now.", retry_after_seconds=retry_after_seconds)


class StreamInterrupted(Unavailable):
    """The stream ends before the model was done: the gateway stops, or the call ran out of time."""

    code = "stream_interrupted"
