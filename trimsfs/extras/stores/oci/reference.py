"""References: which artifact of which registry an ``oci://`` URL names."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from trimsfs.errors import ConfigurationError

DEFAULT_TAG = "latest"
_HUB = {"docker.io", "index.docker.io", "registry-1.docker.io"}
"""Names of Docker Hub, whose API is at the last of them."""
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_URL = re.compile(
    rf"""oci://
    (?P<registry>(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?)/
    (?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)
    (?:
        /?
        |(?P<tag>:[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?P<digest>@sha256:[0-9a-f]{{64}})?(?:/(?P<prefix>.*))?
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A tag, or with ``pinned`` a digest, of a repository. ``prefix`` is empty or ends in ``/``."""

    registry: str
    repository: str
    reference: str
    pinned: bool
    prefix: str

    def __str__(self) -> str:
        artifact = f"oci://{self.registry}/{self.repository}{'@' if self.pinned else ':'}{self.reference}"
        return f"{artifact}/{self.prefix}".rstrip("/")

    @property
    def local(self) -> bool:
        """Whether the registry is on this host."""
        return is_local(urlsplit(f"//{self.registry}").hostname or "")

    @property
    def host(self) -> str:
        """Where the registry answers: a host, and a port if it is not the usual one."""
        return "registry-1.docker.io" if self.registry in _HUB else self.registry

    @property
    def path(self) -> str:
        """The repository's name in the registry's API."""
        official = self.registry in _HUB and "/" not in self.repository
        return f"library/{self.repository}" if official else self.repository

    @property
    def servers(self) -> tuple[str, ...]:
        """The names under which ``docker login`` keeps this registry's credentials."""
        if self.registry in _HUB:
            return ("https://index.docker.io/v1/", "docker.io", "registry-1.docker.io")
        return (self.registry, f"https://{self.registry}", f"https://{self.registry}/v1/")


def is_local(host: str) -> bool:
    """Whether a host is this one, by its name alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse(url: str) -> Reference:
    """The reference in a URL. Raises ConfigurationError."""
    match = _URL.fullmatch(url)
    groups = match.groupdict(default="") if match is not None else {}
    untagged = groups and not groups["tag"] + groups["digest"]
    if not groups or (untagged and re.search("[:@]", groups["prefix"])):  # of a repository or digest in another form
        form = "oci://REGISTRY/REPOSITORY[:TAG|@sha256:DIGEST][/DIRECTORY]"
        raise ConfigurationError(f"store {url!r}: write {form}, the repository in lower case, 64 digits of the digest")
    prefix = "/".join(part for part in groups["prefix"].split("/") if part)
    return Reference(
        registry=groups["registry"],
        repository=groups["repository"],
        reference=groups["digest"][1:] or groups["tag"][1:] or DEFAULT_TAG,
        pinned=bool(groups["digest"]),
        prefix=f"{prefix}/" if prefix else "",
    )
