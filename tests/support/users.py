"""Somebody on the host who has no rights."""

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

STRANGER = 3003
SERVER_USER = 60874
"""Whom servers of root's mounts run as in tests."""


def as_user(uid: int, function: Callable[[], Any]) -> Any:
    """What a function gives in a process of a user who is in no group but one of the same number."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            try:
                answer = True, function()
            except BaseException:
                answer = False, traceback.format_exc()
            with os.fdopen(sender, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    assert content, f"the process has ended: {status}"
    good, answer = pickle.loads(content)
    assert good, answer
    return answer
