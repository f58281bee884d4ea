"""How the driver refuses a request: a gRPC status code and one line that names the thing, the cause and the remedy."""

import grpc

SHOWN_LENGTH = 120


class RefusedError(Exception):
    """A request that is not carried out."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> RefusedError:
    """The request itself cannot be right."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)


def unmet(message: str) -> RefusedError:
    """The request asks for what the driver cannot do, or the node is not in a state for it."""
    return RefusedError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unavailable(message: str) -> RefusedError:
    """May succeed when it is tried again."""
    return RefusedError(grpc.StatusCode.UNAVAILABLE, message)


def shown(text: str) -> str:
    """Text of a request as a part of a message: quoted, on one line, not endless."""
    return repr(text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…")
