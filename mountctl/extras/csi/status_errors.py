"""The errors of CSI calls: a gRPC status code, and one line with the subject, the cause and the remedy."""

import grpc

SHOWN_LENGTH = 120


class StatusError(Exception):
    """A call fails with a gRPC status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> StatusError:
    """INVALID_ARGUMENT: the request is wrong on any node."""
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)


def precondition(message: str) -> StatusError:
    """FAILED_PRECONDITION: the driver does not support the request, or the node is not ready for it."""
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unavailable(message: str) -> StatusError:
    """UNAVAILABLE: a retry may succeed."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, message)


def shown(text: str) -> str:
    """Quote text of a request for a message: on one line, cut to SHOWN_LENGTH characters."""
    return repr(text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…")
