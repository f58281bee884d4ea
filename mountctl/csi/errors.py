"""The errors of CSI calls: a gRPC status code, and one line with the subject, the cause and the remedy."""

import grpc

SHOWN_LENGTH = 120


class StatusError(Exception):
    """A call that fails with a gRPC status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> StatusError:
    """The request is wrong, whatever the state of the node."""
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)


def precondition(message: str) -> StatusError:
    """The driver cannot do what is asked, or the node is not in a state for it."""
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unavailable(message: str) -> StatusError:
    """The call may succeed when it is retried."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, message)


def shown(text: str) -> str:
    """Text of a request for a message: quoted, on one line, cut to SHOWN_LENGTH."""
    return repr(text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…")
