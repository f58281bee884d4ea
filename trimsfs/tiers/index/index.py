"""The SQLite index of the disk tier: which blobs exist, and which of their chunks are on the disk.

The index never runs ahead of the blobs: a chunk is recorded after its bytes are written, a row is deleted before its
blob. ``synced`` chunks have reached the disk. Others survive a killed server, in the page cache, but no reboot: the
index drops them when it is opened after one.

All methods block on the disk and run in worker threads; a lock admits one at a time.
"""

import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimsfs.eviction_policies import Evictable
from trimsfs.origins import Origins, located
from trimsfs.tiers.index import recovery
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob in the index: ``bytes`` are on disk; ``digest`` means the same as in `Residency`."""

    token: str
    generation: Generation
    pinned: bool = False
    uses: int = 0
    last_used: float = 0.0
    bytes: int = 0
    digest: str | None = None


Known = tuple[BlobRecord, list[ChunkRecord]]
"""The records of a blob and of its chunks."""
_AT_ONCE = 500
"""Most blobs per query."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BlobIndex:
    """The index of one cache directory. Raises CacheUnusableError when it can be neither opened nor rebuilt.

    *trusted*: skip the check, as an earlier server has made it. *strict*: drop records that a disk tier with chunks of
    *chunk_size* bytes cannot have made.
    """

    origins: Origins | None = None
    """Names the keys of records as the mount does; None: they are as the store has them."""

    def __init__(
        self,
        path: Path,
        *,
        chunk_size: int = CHUNK_SIZE,
        boot_id: str | None = None,
        trusted: bool = False,
        strict: bool = True,
    ) -> None:
        self._path = path
        self._chunk_size = chunk_size
        self._lock = threading.RLock()
        self._boot_id = boot_id or BOOT_ID.read_text().strip()
        try:
            self._connection, self.rebuilt = recovery.open_index(
                path, self._boot_id, chunk_size=chunk_size, checked=trusted, strict=strict
            )
            self._sequence = self._one("SELECT coalesce(max(sequence), 0) FROM blobs")
        except (sqlite3.Error, OSError) as error:
            raise recovery.index_unusable(path, error) from error

    def rebuild(self) -> None:
        """Check the index for the next server, and rebuild it if it is damaged. Raises sqlite3.Error and OSError.

        From then on the index cannot be used: the connection of one on a full disk lets no other in.
        """
        with self._lock:
            with suppress(sqlite3.Error):
                self._connection.close()
            connection, _ = recovery.open_index(
                self._path, self._boot_id, chunk_size=self._chunk_size, checked=False, strict=True
            )
            connection.close()

    def close(self) -> None:
        """Write everything into the database file and close it."""
        with self._lock:
            self._connection.close()

    def load(self, token: str) -> Known | None:
        """The records of a blob and of its chunks; None if the index lacks the blob."""
        return self._load("token = ?", (token,)).get(token)

    def load_all(self, tokens: Iterable[str]) -> dict[str, Known]:
        """The records of many blobs and of their chunks, by token, without unknown ones."""
        known: dict[str, Known] = {}
        rest = sorted(tokens)
        while rest:
            some, rest = rest[:_AT_ONCE], rest[_AT_ONCE:]
            known |= self._load(f"token IN ({', '.join('?' * len(some))})", some)
        return known

    def _load(self, which: str, parameters: Sequence[str]) -> dict[str, Known]:
        """The records of the blobs of *which* a condition holds, and of their chunks in order, by token."""
        chunks = f"SELECT token, chunk, bytes, crc FROM chunks WHERE {which} ORDER BY token, chunk"  # noqa: S608
        with self._lock:
            rows = self._connection.execute(f"{_SELECT} WHERE {which}", parameters).fetchall()
            known: dict[str, Known] = {row[0]: (self._record(row), []) for row in rows}
            for token, chunk, length, crc in self._connection.execute(chunks, parameters):
                if token in known:
                    known[token][1].append(ChunkRecord(chunk=chunk, length=length, crc=crc))
        return known

    def add(self, token: str, store: str | Origins, generation: Generation) -> None:
        """Record a blob before its file is made."""
        self.add_all(store, {token: generation})

    def add_all(self, store: str | Origins, generations: Mapping[str, Generation]) -> None:
        """Record blobs by token, before their files are made."""
        now = time.time()
        with self.transaction() as connection:
            numbered = list(enumerate(generations.items(), self._sequence + 1))
            connection.executemany(
                "INSERT OR IGNORE INTO blobs "
                "(token, store, key, etag, version_id, size, modified_ns, sequence, loaded, last_used) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(token, *map(os.fsencode, located(store, generation.file))),
                        *(generation.etag, generation.version_id, generation.size, generation.modified_ns),
                        *(number, number, now),
                    )
                    for number, (token, generation) in numbered
                ],
            )
            connection.executemany(
                "INSERT OR REPLACE INTO checks (token, digest, scrubbed) VALUES (?, NULL, ?)",
                [(token, now) for token in generations],
            )
            self._sequence += len(numbered)

    def add_chunks(self, chunks: Iterable[tuple[str, ChunkRecord]]) -> None:
        """Record chunks that are written, but not synced yet."""
        with self.transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO chunks (token, chunk, bytes, crc, synced) VALUES (?, ?, ?, ?, 0)",
                [(token, record.chunk, record.length, record.crc) for token, record in chunks],
            )

    def mark_synced(self, token: str, chunks: Iterable[int]) -> None:
        """Record that chunks have reached the disk."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE chunks SET synced = 1 WHERE token = ? AND chunk = ?",
                [(token, chunk) for chunk in chunks],
            )

    def remove_chunks(self, token: str, chunks: Iterable[int]) -> None:
        """Delete the records of wrong or lost chunks, and the digest of their blob."""
        with self.transaction() as connection:
            connection.executemany(
                "DELETE FROM chunks WHERE token = ? AND chunk = ?",
                [(token, chunk) for chunk in chunks],
            )
            connection.execute("UPDATE checks SET digest = NULL WHERE token = ?", (token,))

    def set_digests(self, digests: Mapping[str, str | None]) -> None:
        """Record the store's digests that blobs match, by token; None: compare the blob again."""
        with self.transaction() as connection:
            connection.executemany(
                _SET_DIGEST, [{"token": token, "digest": digest} for token, digest in digests.items()]
            )

    def scrubbed(self, token: str) -> None:
        """Record that all chunks of a blob on the disk passed their checksums now."""
        with self.transaction() as connection:
            connection.execute(_SCRUBBED, {"token": token, "now": time.time()})

    def to_scrub(self, store: str | Origins, before: float) -> BlobRecord | None:
        """The blob scrubbed longest ago, if that was *before* a time in seconds since the epoch; else None."""
        of, stores = _among(store)
        with self._lock:
            rows = self._connection.execute(_TO_SCRUB.format(of), (*stores, before)).fetchall()
        return self._record(rows[0]) if rows else None

    def used(self, tokens: Mapping[str, int]) -> None:
        """Record that blobs were used now: the number of uses by token, in order of use."""
        with self.transaction() as connection:
            for token, times in tokens.items():
                self._sequence += 1
                connection.execute(
                    "UPDATE blobs SET uses = uses + ?, sequence = ?, last_used = ? WHERE token = ?",
                    (times, self._sequence, time.time(), token),
                )

    def set_pinned(self, token: str, pinned: bool) -> None:
        """Pin or unpin a blob, durably even over a power loss."""
        with self._durably() as connection:
            connection.execute("UPDATE blobs SET pinned = ? WHERE token = ?", (pinned, token))

    def sync(self) -> None:
        """Wait until all records so far have reached the disk."""
        with self._durably() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('synced', ?)", (str(time.time_ns()),))

    def remove(self, token: str) -> dict[int, int]:
        """Delete a blob's records, before its file is removed; returns the bytes of its recorded chunks by number."""
        with self.transaction() as connection:
            freed = dict(connection.execute("DELETE FROM chunks WHERE token = ? RETURNING chunk, bytes", (token,)))
            connection.execute("DELETE FROM blobs WHERE token = ?", (token,))
            connection.execute("DELETE FROM compared WHERE token = ?", (token,))
            connection.execute("DELETE FROM checks WHERE token = ?", (token,))
        return freed

    def evictable(self, store: str | Origins) -> list[Evictable]:
        """All blobs with bytes on disk that are not pinned, least recently used first.

        Pins of another store do not count: no command of this server could undo them.
        """
        of, stores = _among(store)
        with self._lock:
            rows = self._connection.execute(_EVICTABLE.format(of), stores).fetchall()
        return [
            Evictable(name=token, size=n, last_used=sequence, loaded=loaded, uses=uses, key=self._name(origin, key))
            for token, n, sequence, loaded, uses, origin, key in rows
        ]

    def records(self, store: str | Origins) -> list[BlobRecord]:
        """All blobs of a mount's stores, by store and key."""
        of, stores = _among(store)
        with self._lock:
            rows = self._connection.execute(f"{_SELECT} WHERE {of} ORDER BY store, key", stores)
            return [self._record(row) for row in rows]

    def unsynced(self) -> dict[str, set[int]]:
        """The chunks that may not have reached the disk, by the tokens of their blobs."""
        chunks: dict[str, set[int]] = {}
        with self._lock:
            for token, chunk in self._connection.execute("SELECT token, chunk FROM chunks WHERE synced = 0"):
                chunks.setdefault(token, set()).add(chunk)
        return chunks

    def groups(self) -> list[str]:
        """The groups of the blobs: the first two digits of their tokens, which name their directories."""
        with self._lock:
            return [group for (group,) in self._connection.execute("SELECT DISTINCT substr(token, 1, 2) FROM blobs")]

    def group(self, group: str) -> dict[str, Known]:
        """The records of a group's blobs and of their chunks, by token."""
        return self._load("token >= ? AND token < ?", (group, f"{group}g"))  # "g" sorts after all hexadecimal digits

    def uncompared(self, least: int) -> list[str]:
        """The tokens of whole blobs of at least *least* bytes that deduplication has not compared yet."""
        with self._lock:
            return [token for (token,) in self._connection.execute(_UNCOMPARED, (least,))]

    def set_compared(self, token: str, relative: str | None) -> None:
        """Record that a blob was compared with the compared ones, and a *relative* among them, if any."""
        with self.transaction() as connection:
            connection.execute(_SET_COMPARED, {"token": token, "relative": relative})

    def family(self, token: str) -> list[str]:
        """The tokens of a blob's family: related blobs and itself, in a fixed order."""
        with self._lock:
            return [other for (other,) in self._connection.execute(_FAMILY, (token,))]

    def twins(self, token: str) -> list[tuple[int, tuple[str, int] | None]]:
        """The chunks of a blob, each with a compared blob's chunk of the same length and checksum, or None."""
        with self._lock:
            rows = self._connection.execute(_TWINS, (token,)).fetchall()
        return [(chunk, None if other is None else (other, number)) for chunk, other, number in rows]

    def of_same_size(self, token: str, most: int) -> list[str]:
        """At most *most* compared blobs of the same size as a blob."""
        with self._lock:
            return [other for (other,) in self._connection.execute(_OF_SAME_SIZE, (token, token, most))]

    def has(self, token: str) -> bool:
        """Whether a blob is recorded."""
        return bool(self._one("SELECT count(*) FROM blobs WHERE token = ?", token))

    def total_bytes(self) -> int:
        """Bytes of all chunks on disk."""
        return self._one("SELECT coalesce(sum(bytes), 0) FROM chunks")

    def bytes_by_key(self) -> dict[str, int]:
        """Bytes of all chunks on disk, by object key."""
        query = "SELECT store, key, sum(bytes) FROM chunks JOIN blobs USING (token) GROUP BY store, key"
        sizes = Counter[str]()
        with self._lock:
            for store, key, size in self._connection.execute(query):
                sizes[self._name(store, key)] += size
        return dict(sizes)

    def _name(self, store: bytes, key: bytes) -> str:
        """The mount's key of a record."""
        name = os.fsdecode(key)
        return name if self.origins is None else self.origins.name(os.fsdecode(store), name)

    def _record(self, row: Sequence[Any]) -> BlobRecord:
        token, store, key, etag, version_id, size, modified_ns, pinned, uses, last_used, present, digest = row
        return BlobRecord(
            token=token,
            generation=Generation(
                key=self._name(store, key), etag=etag, size=size, modified_ns=modified_ns, version_id=version_id
            ),
            pinned=bool(pinned),
            uses=uses,
            last_used=last_used,
            bytes=present,
            digest=digest,
        )

    def _one(self, query: str, *parameters: str) -> int:
        with self._lock:
            return int(self._connection.execute(query, parameters).fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction; nested blocks share the outermost one."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            with self._connection:
                self._connection.execute("BEGIN")
                yield self._connection

    @contextmanager
    def _durably(self) -> Iterator[sqlite3.Connection]:
        """Run the block in a transaction that reaches the disk at its end, with all earlier ones."""
        with self._lock:
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                with self._connection:
                    yield self._connection
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")


def _among(store: str | Origins) -> tuple[str, list[bytes]]:
    """The condition that a blob is of one of a mount's stores, and its parameters."""
    identities = [store] if isinstance(store, str) else store.identities
    return f"store IN ({', '.join('?' * len(identities))})", [*map(os.fsencode, identities)]


_SELECT = (
    "SELECT token, store, key, etag, version_id, size, modified_ns, pinned, uses, last_used, "
    "(SELECT coalesce(sum(bytes), 0) FROM chunks WHERE token = blobs.token) AS present, "
    "(SELECT digest FROM checks WHERE token = blobs.token) FROM blobs"
)

_EVICTABLE = (
    "SELECT token, (SELECT coalesce(sum(bytes), 0) FROM chunks WHERE token = blobs.token) AS n, sequence, loaded, "
    "uses, store, key FROM blobs WHERE (pinned = 0 OR NOT {}) AND n > 0 ORDER BY sequence"
)

_SET_DIGEST = (
    "INSERT INTO checks (token, digest, scrubbed) SELECT token, :digest, 0 FROM blobs WHERE token = :token "
    "ON CONFLICT (token) DO UPDATE SET digest = excluded.digest"
)
_SCRUBBED = (
    "INSERT INTO checks (token, scrubbed) SELECT token, :now FROM blobs WHERE token = :token "
    "ON CONFLICT (token) DO UPDATE SET scrubbed = excluded.scrubbed"
)
_TO_SCRUB = (
    f"{_SELECT} LEFT JOIN checks USING (token) WHERE {{}} AND present > 0 AND coalesce(scrubbed, 0) < ? "
    "ORDER BY coalesce(scrubbed, 0) LIMIT 1"
)

_UNCOMPARED = (
    "SELECT token FROM blobs WHERE size >= ? AND token NOT IN (SELECT token FROM compared) "
    "AND size = (SELECT sum(bytes) FROM chunks WHERE token = blobs.token) ORDER BY sequence"
)
_SET_COMPARED = (
    "INSERT OR REPLACE INTO compared SELECT token, "
    "coalesce((SELECT family FROM compared WHERE token = :relative), :relative, token) FROM blobs WHERE token = :token"
)
_FAMILY = "SELECT token FROM compared WHERE family = (SELECT family FROM compared WHERE token = ?) ORDER BY token"
_TWINS = (
    "SELECT mine.chunk, min(other.token), other.chunk FROM chunks AS mine LEFT JOIN chunks AS other "
    "ON other.crc = mine.crc AND other.bytes = mine.bytes AND other.token <> mine.token "
    "AND other.token IN (SELECT token FROM compared) WHERE mine.token = ? GROUP BY mine.chunk"
)
_OF_SAME_SIZE = (
    "SELECT token FROM blobs WHERE size = (SELECT size FROM blobs WHERE token = ?) AND token <> ? "
    "AND token IN (SELECT token FROM compared) LIMIT ?"
)
