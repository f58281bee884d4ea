"""Addresses that the exporter listens at."""

from pathlib import Path

import pytest

from trimsfs.errors import ConfigurationError
from trimsfs.listen_address import ListenAddress, parse_address
from trimsfs.options import load_options


@pytest.mark.parametrize(
    ("text", "address", "local"),
    [
        ("127.0.0.1:9099", ListenAddress("127.0.0.1", 9099), True),
        ("localhost:0", ListenAddress("127.0.0.1", 0), True),
        ("[::1]:9099", ListenAddress("::1", 9099), True),
        ("0.0.0.0:9099", ListenAddress("0.0.0.0", 9099), False),
        ("[::]:80", ListenAddress("::", 80), False),
        ("10.1.2.3:9099", ListenAddress("10.1.2.3", 9099), False),
        ("unix:/run/trimsfs/metrics.sock", ListenAddress(path=Path("/run/trimsfs/metrics.sock")), True),
    ],
)
def test_addresses(text: str, address: ListenAddress, local: bool) -> None:
    assert parse_address(text) == address
    assert parse_address(text).local is local
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "9099", ":9099", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "::1:9099", "models:9099", "127.1:9099"),
        *("unix:", "unix:metrics.sock", f"unix:/{'x' * 107}"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"^is not an (address such as|absolute path)"):
        parse_address(text)


def test_a_mount_takes_only_addresses_of_this_host() -> None:
    assert load_options({"metrics_listen": "127.0.0.1:9099"}, environment={}).metrics_listen == "127.0.0.1:9099"
    with pytest.raises(ConfigurationError, match=r"option --metrics-listen 0.0.0.0:1: other hosts reach that: run"):
        load_options({"metrics_listen": "0.0.0.0:1"}, environment={})
    with pytest.raises(ConfigurationError, match="option --metrics-listen x: is not an address such as"):
        load_options({"metrics_listen": "x"}, environment={})
