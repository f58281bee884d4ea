"""Credentials for a registry, as ``docker login`` keeps them: in Docker's configuration file or by its helpers."""

import base64
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimsfs.errors import ConfigurationError, StoreAccessError

HELPER_TIMEOUT_S = 10.0
_IDENTITY_TOKEN_USER = "<token>"  # noqa: S105 - no password
"""The user that helpers name when the secret is an identity token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A user's name and password, or an identity token, which a token service takes instead."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The Authorization header of the name and password."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class DockerConfig:
    """Docker's configuration file, ``$DOCKER_CONFIG/config.json`` or ``~/.docker/config.json``, about one registry.

    It is read once: a server that has given up root may not be able to later. Raises ConfigurationError for a file that
    cannot be read.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        directory = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
        file = Path(directory, "config.json")
        try:
            config = json.loads(file.read_bytes())
            entries = {server: config.get("auths", {}).get(server) or {} for server in servers}
            helpers = [config.get("credHelpers", {}).get(server) for server in servers]
            helper = next(filter(None, helpers), None) or config.get("credsStore")
            stored = [_parsed(entry) for entry in entries.values() if entry.keys() & {"auth", "identitytoken"}]
        except FileNotFoundError:
            entries, helper, stored = {}, None, []
        except OSError as error:
            raise ConfigurationError(f"{file}: {error.strerror}: registry credentials cannot be read") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"{file}: is not a configuration of Docker: {error}") from error
        self._stored = stored[0] if stored else None
        self._helper = helper if isinstance(helper, str) else None
        self._servers = servers

    def credentials(self) -> Credentials | None:
        """The credentials, anew from a helper if one is configured; None if there are none.

        Raises StoreAccessError if the helper fails.
        """
        if self._helper is None:
            return self._stored
        for server in self._servers:
            answer = _ask_helper(self._helper, server)
            if answer is not None:
                return answer
        return self._stored


def _parsed(entry: dict[str, Any]) -> Credentials:
    user, _, password = base64.b64decode(entry.get("auth") or "", validate=True).decode().rstrip("\0").partition(":")
    return Credentials(user=user, password=password, identity_token=entry.get("identitytoken") or "")


def _ask_helper(helper: str, server: str) -> Credentials | None:
    """A helper's credentials for a server; None if it has none."""
    program = f"docker-credential-{helper}"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise StoreAccessError(f"registry credentials: {program!r} is not a helper: mend Docker's config.json")
    try:
        done = subprocess.run(
            [program, "get"], input=server, capture_output=True, text=True, timeout=HELPER_TIMEOUT_S, check=False
        )
        if done.returncode:
            if "not found" in done.stdout:  # the words of Docker's own helpers
                return None
            raise StoreAccessError(f"registry credentials: {program}: {_first_line(done.stdout or done.stderr)}")
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except OSError as error:
        raise StoreAccessError(f"registry credentials: {program}: {error.strerror}: install it") from error
    except subprocess.TimeoutExpired:
        raise StoreAccessError(f"registry credentials: {program}: no answer in {HELPER_TIMEOUT_S:g} s") from None
    except (ValueError, KeyError, TypeError):
        raise StoreAccessError(f"registry credentials: {program}: its answer is not a helper's") from None
    if user == _IDENTITY_TOKEN_USER:
        return Credentials(identity_token=secret)
    return Credentials(user=user, password=secret)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "it failed")[:200]
