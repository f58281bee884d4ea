"""Starts the fork server anew: with more to import, without what a fork must not have, or after a file has changed."""

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from trimsfs.extras.spawn.fork_server.log import log
from trimsfs.extras.spawn.fork_server.preloading import FAILED, IMPORTS, UnfitError, lies_in
from trimsfs.extras.spawn.messages import raised

MOST = 12
"""So often may a server be started anew before it learns nothing more."""
_LEFT_OUT = "TRIMSFS_SPAWN_LEFT_OUT"
"""The variable that tells what to leave out to a server that is started over, where no file can."""


class Successors:
    """What the servers of one socket know, in a file at *path*: what to import, and what not to, and why."""

    def __init__(self, settings: dict[str, Any], arguments: list[str], generation: int) -> None:
        self.settings = settings
        self._arguments = arguments
        left_out = json.loads(os.environ.pop(_LEFT_OUT, "{}"))
        self._environment = dict(os.environ)
        self._generation = generation
        self._path: str = settings["learned"]
        self._pid = 0
        self.ready = -1
        """A pipe that can be read once the successor serves, or has failed; -1 if there is none."""
        self.modules: list[str] = settings["preload"]
        self.left_out: dict[str, str] = {}
        try:
            with open(self._path) as file:
                known = json.load(file)
            self.left_out = {str(name): str(reason) for name, reason in known["left_out"].items()}
            if not generation:  # what was missing may be there now
                failed = {name for name, reason in self.left_out.items() if reason.startswith(FAILED)}
                again = failed | {
                    name for name, reason in self.left_out.items() if reason.removeprefix(IMPORTS) in failed
                }
                self.left_out = {name: reason for name, reason in self.left_out.items() if name not in again}
            if not self.modules:
                self.modules = [str(name) for name in known["modules"]]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            pass  # nothing is known yet, or a file was cut short: it is learned again
        self.left_out |= left_out

    @property
    def learns(self) -> bool:
        """Whether the programs tell what to import; else the command line did."""
        return not self.settings["preload"] and self._generation < MOST

    @property
    def doubts(self) -> bool:
        """Whether some module may have to be left out that is not known yet: one had to be before."""
        return self._generation > 0 and bool(self.left_out or self.settings["preload"])

    @property
    def told(self) -> list[str]:
        """What is left out, a line for each cause: modules that import another are told with that one."""
        importers: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            if reason.startswith(IMPORTS):
                importers.setdefault(reason.removeprefix(IMPORTS), []).append(name.partition(".")[0])
        lines = []
        for name, reason in self.left_out.items():
            packages = ", ".join(dict.fromkeys(importers.get(name, [])))
            if not reason.startswith(IMPORTS):
                lines.append(
                    f"{name} is left out: {reason}" + (packages and f"; with it modules of {packages}, which import it")
                )
        return lines

    @property
    def notes(self) -> list[str]:
        """For callers: what they named, and is not imported before they run."""
        named = self.settings["preload"]
        return [f"{name} is not preloaded: {reason}" for name, reason in self.left_out.items() if name in named]

    def learn(self, modules: list[str]) -> bool:
        """Note what a program has imported; whether a successor would import more than this server has."""
        new = [name for name in modules if not lies_in(name, self.left_out) and name not in self.modules]
        self.modules = [*self.modules, *new]
        return bool(new) and self._write()

    def leave_out(self, unfit: UnfitError) -> None:
        """Note a module that must not be imported before a fork."""
        log(f"{unfit}")
        self.left_out[unfit.name] = unfit.reason
        self.modules = [each for each in self.modules if not lies_in(each, [unfit.name])]
        if not self._write():
            self._environment[_LEFT_OUT] = json.dumps(self.left_out)

    def start_over(self, listener: int, ready: int) -> None:
        """Become a new server, which has imported nothing yet. Raises OSError."""
        for number in (listener, ready):
            if number >= 0:
                os.set_inheritable(number, True)
        os.execve(sys.executable, self._line(listener, ready), self._environment)

    def start(self, listener: socket.socket) -> bool:
        """Start a server that takes this one's place when it is ready; False if one starts already, or cannot."""
        if self.ready >= 0:
            return False
        try:
            ours, theirs = os.pipe()
            ours = raised(ours, listener.fileno())  # a caller's descriptor of its number must find that free
        except OSError as error:
            log(f"no successor: {error}")
            return False
        actions = [(os.POSIX_SPAWN_DUP2, number, number) for number in (listener.fileno(), theirs)]
        try:
            self._pid = os.posix_spawn(
                sys.executable,
                self._line(listener.fileno(), theirs),
                self._environment,
                file_actions=actions,
                setsid=True,
            )
        except OSError as error:
            os.close(ours)
            log(f"no successor: {error}")
            return False
        finally:
            os.close(theirs)
        self.ready = ours
        return True

    def took_over(self) -> bool:
        """Whether the successor serves now; False if it has failed."""
        serves = bool(os.read(self.ready, 1))
        self.close()
        return serves

    def cancel(self) -> None:
        """End a successor that does not serve yet."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)  # it has not been reaped: its pid is its own
        self.close()

    def forget(self, pid: int, status: int) -> None:
        """A process has ended, or not, as its wait status says; perhaps the successor."""
        if pid == self._pid and (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            self._pid = 0

    def close(self) -> None:
        """Wait for no successor any more."""
        if self.ready >= 0:
            os.close(self.ready)
        self.ready = -1

    def _line(self, listener: int, ready: int) -> list[str]:
        own = sys.orig_argv
        start = len(own) - len(self._arguments)
        return [
            sys.executable,
            *own[1:start],
            str(listener),
            str(ready),
            str(self._generation + 1),
            *self._arguments[3:],
        ]

    def _write(self) -> bool:
        """Write what is known, and tell whether that could be done. If not, the next server learns again."""
        temporary = f"{self._path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(temporary, "w") as file:
                json.dump({"modules": self.modules, "left_out": self.left_out}, file)
            os.replace(temporary, self._path)
            return True
        except OSError as error:
            log(f"{self._path}: {error.strerror}")
            with suppress(OSError):
                os.unlink(temporary)
            return False
