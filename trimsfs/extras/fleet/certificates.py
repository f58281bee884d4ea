"""The certificates of a fleet's members: loaded, and checked as other members would."""

import ssl
import time
from pathlib import Path

from trimsfs.errors import ConfigurationError
from trimsfs.options import MountOptions

_REMEDIES = {
    9: "set this host's clock by NTP",
    10: "renew it, or the CA's, then `mountctl fleet apply` and `mountctl restart`",
    26: "issue one with extendedKeyUsage = serverAuth, clientAuth",
}
"""What to do, by the code of OpenSSL's error."""


def files_of(options: MountOptions) -> tuple[Path, Path, Path]:
    """The CA's certificate, this host's, and its key, of a mount of a fleet."""
    assert options.fleet_ca is not None
    assert options.fleet_cert is not None
    assert options.fleet_key is not None
    return options.fleet_ca, options.fleet_cert, options.fleet_key


def client_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """What a member connects with. Raises ConfigurationError, which names the file.

    The CA is the fleet's own, so that its signature tells a member; addresses need not be in the certificates.
    """
    context = _loaded(ssl.Purpose.SERVER_AUTH, ca, certificate, key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    return context


def check_certificate(ca: Path, certificate: Path, key: Path) -> float:
    """Have a certificate accepted as members would, a server's and a client's; for how many seconds it is valid.

    Raises ConfigurationError.
    """
    server = _loaded(ssl.Purpose.CLIENT_AUTH, ca, certificate, key)
    server.verify_mode = ssl.CERT_REQUIRED
    try:
        facts = _shake_hands(client_context(ca, certificate, key), server)
    except ssl.SSLCertVerificationError as error:
        remedy = _REMEDIES.get(error.verify_code, "issue one by the CA of fleet_ca")
        raise ConfigurationError(f"option fleet_cert {certificate}: {error.verify_message}: {remedy}") from None
    except ssl.SSLError as error:
        raise ConfigurationError(f"option fleet_cert {certificate}: {error.reason}: issue another") from None
    return ssl.cert_time_to_seconds(str(facts["notAfter"])) - time.time()


def _loaded(purpose: ssl.Purpose, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    for name, file in (("ca", ca), ("cert", certificate), ("key", key)):
        try:
            file.open("rb").close()  # errors of OpenSSL name no file
        except OSError as error:
            raise ConfigurationError(f"option fleet_{name} {file}: {error.strerror}") from None
    try:
        context = ssl.create_default_context(purpose, cafile=ca)
    except ssl.SSLError as error:
        raise ConfigurationError(f"option fleet_ca {ca}: {error.reason}: it must be a certificate in PEM") from None
    try:
        context.load_cert_chain(certificate, key, password="")  # instead of a question on the terminal
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"option fleet_cert {certificate}: {error.reason}: it must belong to {key}, both in PEM, "
            "the key without a passphrase"
        ) from None
    return context


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, object]:
    """A handshake without a network; what the server learns of the client's certificate. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(down, up, server_hostname="member")
    answering = server.wrap_bio(up, down, server_side=True)
    waits = True
    while waits:
        waits = False
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                waits = True
    facts = answering.getpeercert()
    assert facts is not None
    return dict(facts)
