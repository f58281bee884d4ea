"""What a request without an answer is told as, by stores over HTTP."""

import ssl
from typing import NoReturn

import pytest
import urllib3

from trimsfs.errors import StoreNotTrustedError, TransientStoreError
from trimsfs.stores.http.failures import CLOCK_REMEDY, translated

AUTHORITIES = {"CERTIFICATE_VERIFY_FAILED": "set SSL_CERT_FILE"}
FAILED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"


def raised(reason: str) -> TransientStoreError:
    """The error for a certificate that OpenSSL refuses for a reason."""

    def ask() -> NoReturn:
        raise urllib3.exceptions.SSLError(ssl.SSLError(1, f"{FAILED}: {reason} (_ssl.c:1006)"))

    with pytest.raises(TransientStoreError) as caught:
        translated(ask, lambda error: TransientStoreError(str(error)), AUTHORITIES)
    return caught.value


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("certificate is not yet valid", CLOCK_REMEDY),
        ("certificate has expired", f"renew the certificate; if the clock is wrong, {CLOCK_REMEDY}"),
    ],
)
def test_a_certificate_of_another_time_is_told_by_the_clock(reason: str, remedy: str) -> None:
    error = raised(reason)
    assert isinstance(error, StoreNotTrustedError)
    assert f"{reason} (_ssl.c:1006)" in str(error)
    assert ": the clock of this host says " in str(error)
    assert str(error).endswith(f" UTC: {remedy}")
    assert AUTHORITIES["CERTIFICATE_VERIFY_FAILED"] not in str(error)


def test_a_certificate_of_an_unknown_authority_is_told_by_the_remedy_for_it() -> None:
    error = raised("unable to get local issuer certificate")
    assert not isinstance(error, StoreNotTrustedError)
    assert str(error).endswith(": set SSL_CERT_FILE")
