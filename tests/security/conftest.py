"""Lines of the table of what was survived, which `make reliability` prints."""

from tests.reliability.conftest import survived as survived  # noqa: PLC0414 - pytest finds it here
