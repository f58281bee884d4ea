"""Names on a Hugging Face hub: what a URL names, and the repository and path that a key names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote

from trimsfs.errors import ConfigurationError

MAIN = "main"
"""The default branch of every repository."""
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_KIND = r"(?:(?P<kind>dataset|space)s/)?"
_REVISION = r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
_ITEM = re.compile(rf"{_KIND}(?P<owner>{_NAME})(?:/(?P<name>{_NAME}){_REVISION}(?:/(?P<path>.+))?)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository: ``name`` is ORG/NAME."""

    kind: Literal["model", "dataset", "space"]
    name: str

    @property
    def path(self) -> str:
        """Its path on the hub, and in keys: ORG/NAME of a model, datasets/ORG/NAME of a dataset."""
        return self.name if self.kind == "model" else f"{self.kind}s/{self.name}"

    @property
    def api(self) -> str:
        """Its path below ``/api/``."""
        return f"{self.kind}s/{self.name}"

    def __str__(self) -> str:
        return f"hf://{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A path in a repository at a revision; None means the one that the store names."""

    repository: Repository
    revision: str | None
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a URL names: repositories with their revisions, and owners of which all repositories are meant.

    ``base`` is the path of a key's beginning: all but empty if the keys are those of one repository or one owner.
    """

    revisions: Mapping[str, str]
    owners: tuple[str, ...]
    base: str

    @property
    def one_repository(self) -> bool:
        """Whether the keys are paths in one repository."""
        return bool(self.base) and not self.owners

    def has(self, repository: Repository) -> bool:
        """Whether a repository is named, by itself or by its owner."""
        return repository.path in self.revisions or repository.path.rpartition("/")[0] in self.owners

    def children(self, prefix: str) -> list[str]:
        """The names one level below a *prefix* of the paths of what is named, sorted."""
        paths = (*self.revisions, *self.owners)
        return sorted({path[len(prefix) :].partition("/")[0] for path in paths if path.startswith(prefix)})


def parse(url: str, *, whole: bool = False) -> Source:
    """What ``hf://ORG/NAME[@REVISION][/PATH]``, ``hf://ORG`` or several of them with commas between name.

    Datasets are ``hf://datasets/ORG/NAME``. With *whole*, keys always begin with ORG/NAME. Raises ConfigurationError.
    """
    revisions, owners, bases = dict[str, str](), list[str](), list[str]()
    for item in url.removeprefix("hf://").rstrip("/").split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ConfigurationError(f"store {url}: {item!r} names no repository: write hf://ORG/NAME[@REVISION]")
        prefix = f"{match['kind']}s/" if match["kind"] else ""
        if match["name"] is None:
            owners.append(f"{prefix}{match['owner']}")
            bases.append(f"{prefix}{match['owner']}/")
        else:
            path = f"{prefix}{match['owner']}/{match['name']}"
            if path in revisions:
                raise ConfigurationError(f"store {url}: names {path} twice: name one revision of each repository")
            revisions[path] = unquote(match["revision"] or MAIN)
            below = f"{match['path'].strip('/')}/" if match["path"] else ""
            bases.append(f"{at(path, revisions[path])}/{below}")
            if below and (whole or "," in url):
                raise ConfigurationError(f"store {url}: {item!r}: name whole repositories here, without /{below}")
    base = bases[0] if len(bases) == 1 and not whole else ""
    return Source(revisions=revisions, owners=tuple(owners), base=base)


def at(path: str, revision: str) -> str:
    """The path of a repository at a revision, as keys have it."""
    return f"{path}@{quote(revision, safe='')}"


def place(path: str) -> Place | None:
    """The repository and the path in it that a *path* of a key names; None if it names none."""
    kind, _, rest = path.partition("/")
    typed: dict[str, Literal["dataset", "space"]] = {"datasets": "dataset", "spaces": "space"}
    owner, slash, rest = (rest if kind in typed else path).partition("/")
    name, _, below = rest.partition("/")
    name, _, revision = name.partition("@")
    if not slash or not re.fullmatch(_NAME, owner) or not re.fullmatch(_NAME, name):
        return None
    repository = Repository(kind=typed.get(kind, "model"), name=f"{owner}/{name}")
    return Place(repository=repository, revision=unquote(revision) or None, path=below)


def is_commit(revision: str) -> bool:
    """Whether a revision names one commit for ever, not a branch or a tag."""
    return _COMMIT.fullmatch(revision) is not None
