"""The SQLite index of the disk tier: which blobs exist, and which of their chunks are on the disk.

The index is always at or behind the blobs: a chunk is recorded after its bytes are written, a row is deleted
before its blob is. ``synced`` says that the bytes had reached the disk. A chunk that is not synced survives a
killed server (the page cache has it) but not a boot, so opening the index after a boot forgets those.

All methods block on the disk and are called from worker threads, one at a time.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimsfs.errors import CacheUnusableError
from trimsfs.tiers.eviction_policies import Evictable
from trimsfs.tiers.index import recovery
from trimsfs.tiers.index.blob_record import BlobRecord
from trimsfs.types import CHUNK_SIZE, ChunkRecord, Generation

_AT_ONCE = 500
"""Blobs that one query is about."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class BlobIndex:
    """The index of one cache directory. Raises CacheUnusableError when it can be neither opened nor rebuilt.

    *trusted* says that an earlier process has checked it since the host was started, *strict* that records are dropped
    that no disk tier with chunks of *chunk_size* bytes makes.
    """

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
            raise CacheUnusableError(f"cache index {path}: {error}") from error

    def rebuild(self) -> None:
        """Rebuild the index for the next server, if it is damaged. Raises sqlite3.Error and OSError."""
        recovery.open_index(self._path, self._boot_id, chunk_size=self._chunk_size, checked=False, strict=True)[
            0
        ].close()

    def close(self) -> None:
        """Write everything into the database file and close it."""
        with self._lock:
            self._connection.close()

    def load(self, token: str) -> tuple[BlobRecord, list[ChunkRecord]] | None:
        """A blob and the chunks it has, or None."""
        with self._lock:
            rows = self._connection.execute(f"{_SELECT} WHERE token = ?", (token,)).fetchall()
            if not rows:
                return None
            chunks = self._connection.execute(
                "SELECT chunk, bytes, crc FROM chunks WHERE token = ? ORDER BY chunk", (token,)
            ).fetchall()
        return _record(rows[0]), [ChunkRecord(chunk=c, length=n, crc=crc) for c, n, crc in chunks]

    def load_all(self, tokens: Iterable[str]) -> dict[str, tuple[BlobRecord, list[ChunkRecord]]]:
        """The blobs of these tokens that there are, and the chunks they have."""
        found: dict[str, tuple[BlobRecord, list[ChunkRecord]]] = {}
        rest = sorted(tokens)
        while rest:
            some, rest = rest[:_AT_ONCE], rest[_AT_ONCE:]
            which = f"WHERE token IN ({', '.join('?' * len(some))})"
            with self._lock:
                rows = self._connection.execute(f"{_SELECT} {which}", some).fetchall()
                chunks = self._connection.execute(
                    f"SELECT token, chunk, bytes, crc FROM chunks {which} ORDER BY token, chunk",  # noqa: S608
                    some,
                ).fetchall()
            _gather(found, rows, chunks)
        return found

    def add(self, token: str, store: str, generation: Generation) -> None:
        """Record a blob before its file is made."""
        self.add_all(store, {token: generation})

    def add_all(self, store: str, generations: Mapping[str, Generation]) -> None:
        """Record blobs by their tokens, before their files are made."""
        now = time.time()
        with self.transaction() as connection:
            numbered = list(enumerate(generations.items(), self._sequence + 1))
            connection.executemany(
                "INSERT OR IGNORE INTO blobs "
                "(token, store, key, etag, version_id, size, modified_ns, sequence, loaded, last_used) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        token,
                        os.fsencode(store),
                        os.fsencode(generation.file),
                        generation.etag,
                        generation.version_id,
                        generation.size,
                        generation.modified_ns,
                        number,
                        number,
                        now,
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
        """Record chunks whose bytes are written, not yet synced."""
        with self.transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO chunks (token, chunk, bytes, crc, synced) VALUES (?, ?, ?, ?, 0)",
                [(token, record.chunk, record.length, record.crc) for token, record in chunks],
            )

    def mark_synced(self, token: str, chunks: Iterable[int]) -> None:
        """The bytes of these chunks have reached the disk."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE chunks SET synced = 1 WHERE token = ? AND chunk = ?",
                [(token, chunk) for chunk in chunks],
            )

    def remove_chunks(self, token: str, chunks: Iterable[int]) -> None:
        """Forget chunks, because their bytes turned out to be wrong."""
        with self.transaction() as connection:
            connection.executemany(
                "DELETE FROM chunks WHERE token = ? AND chunk = ?",
                [(token, chunk) for chunk in chunks],
            )
            connection.execute("UPDATE checks SET digest = NULL WHERE token = ?", (token,))

    def set_digests(self, digests: Mapping[str, str | None]) -> None:
        """What all bytes of blobs have, as the store says; None when they are to be compared with it again."""
        with self.transaction() as connection:
            connection.executemany(
                _SET_DIGEST, [{"token": token, "digest": digest} for token, digest in digests.items()]
            )

    def scrubbed(self, token: str) -> None:
        """What is on the disk of a blob is right."""
        with self.transaction() as connection:
            connection.execute(_SCRUBBED, {"token": token, "now": time.time()})

    def to_scrub(self, store: str, before: float) -> BlobRecord | None:
        """The blob that was scrubbed longest ago, if that was before a time, in seconds since the epoch."""
        with self._lock:
            rows = self._connection.execute(_TO_SCRUB, (os.fsencode(store), before)).fetchall()
        return _record(rows[0]) if rows else None

    def used(self, tokens: Mapping[str, int]) -> None:
        """The blobs were used now, so many times each, in this order."""
        with self.transaction() as connection:
            for token, times in tokens.items():
                self._sequence += 1
                connection.execute(
                    "UPDATE blobs SET uses = uses + ?, sequence = ?, last_used = ? WHERE token = ?",
                    (times, self._sequence, time.time(), token),
                )

    def set_pinned(self, token: str, pinned: bool) -> None:
        """Pin a blob, or no longer; a loss of power does not undo it."""
        with self._durably() as connection:
            connection.execute("UPDATE blobs SET pinned = ? WHERE token = ?", (pinned, token))

    def sync(self) -> None:
        """Wait until what is recorded so far has reached the disk."""
        with self._durably() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('synced', ?)", (str(time.time_ns()),))

    def remove(self, token: str) -> dict[int, int]:
        """Forget a blob, before its file is removed; the bytes of its chunks that were recorded, by their numbers."""
        with self.transaction() as connection:
            freed = dict(connection.execute("DELETE FROM chunks WHERE token = ? RETURNING chunk, bytes", (token,)))
            connection.execute("DELETE FROM blobs WHERE token = ?", (token,))
            connection.execute("DELETE FROM compared WHERE token = ?", (token,))
            connection.execute("DELETE FROM checks WHERE token = ?", (token,))
        return freed

    def evictable(self, store: str) -> list[Evictable]:
        """All blobs that hold bytes and are not pinned, least recently used first.

        A pin counts only while the directory serves the store that it is for: nobody can take back another's.
        """
        with self._lock:
            rows = self._connection.execute(
                "SELECT token, (SELECT coalesce(sum(bytes), 0) FROM chunks WHERE token = blobs.token) AS n, "
                "sequence, loaded, uses, key FROM blobs WHERE (pinned = 0 OR store <> ?) AND n > 0 ORDER BY sequence",
                (os.fsencode(store),),
            ).fetchall()
        return [
            Evictable(name=token, size=n, last_used=sequence, loaded=loaded, uses=uses, key=os.fsdecode(key))
            for token, n, sequence, loaded, uses, key in rows
        ]

    def records(self, store: str) -> list[BlobRecord]:
        """All blobs of a store, by key."""
        query = f"{_SELECT} WHERE store = ? ORDER BY key"
        with self._lock:
            return [_record(row) for row in self._connection.execute(query, (os.fsencode(store),))]

    def unsynced(self) -> list[str]:
        """The blobs with chunks that are not known to have reached the disk."""
        query = "SELECT DISTINCT token FROM chunks WHERE synced = 0"
        with self._lock:
            return [token for (token,) in self._connection.execute(query)]

    def unsynced_chunks(self, token: str) -> list[int]:
        """The chunks of a blob that are not known to have reached the disk."""
        with self._lock:
            rows = self._connection.execute("SELECT chunk FROM chunks WHERE token = ? AND synced = 0", (token,))
            return [chunk for (chunk,) in rows]

    def groups(self) -> list[str]:
        """What the names of blobs begin with: their directories."""
        with self._lock:
            return [group for (group,) in self._connection.execute("SELECT DISTINCT substr(token, 1, 2) FROM blobs")]

    def group(self, group: str) -> dict[str, tuple[BlobRecord, list[ChunkRecord]]]:
        """The blobs of a directory, and the chunks they have, by token."""
        part = (group, f"{group}g")  # what follows is hexadecimal
        with self._lock:
            rows = self._connection.execute(f"{_SELECT} WHERE token >= ? AND token < ?", part).fetchall()
            chunks = self._connection.execute(
                "SELECT token, chunk, bytes, crc FROM chunks WHERE token >= ? AND token < ? ORDER BY chunk", part
            ).fetchall()
        found: dict[str, tuple[BlobRecord, list[ChunkRecord]]] = {}
        _gather(found, rows, chunks)
        return found

    def uncompared(self, least: int) -> list[str]:
        """The whole blobs of at least so many bytes that have not been compared with others."""
        with self._lock:
            return [token for (token,) in self._connection.execute(_UNCOMPARED, (least,))]

    def set_compared(self, token: str, relative: str | None) -> None:
        """A blob has been compared with those that are here, and one of them found to be related."""
        with self.transaction() as connection:
            connection.execute(_SET_COMPARED, {"token": token, "relative": relative})

    def family(self, token: str) -> list[str]:
        """The blobs that are related to one, and itself."""
        with self._lock:
            return [other for (other,) in self._connection.execute(_FAMILY, (token,))]

    def twins(self, token: str) -> list[tuple[int, tuple[str, int] | None]]:
        """The chunks of a blob, each with one of a compared blob that has its length and checksum, if there is one."""
        with self._lock:
            rows = self._connection.execute(_TWINS, (token,)).fetchall()
        return [(chunk, None if other is None else (other, number)) for chunk, other, number in rows]

    def of_same_size(self, token: str, most: int) -> list[str]:
        """Some blobs of the same size as another that have been compared."""
        with self._lock:
            return [other for (other,) in self._connection.execute(_OF_SAME_SIZE, (token, token, most))]

    def has(self, token: str) -> bool:
        """Whether a blob is recorded."""
        return bool(self._one("SELECT count(*) FROM blobs WHERE token = ?", token))

    def total_bytes(self) -> int:
        """Bytes of all chunks on disk."""
        return self._one("SELECT coalesce(sum(bytes), 0) FROM chunks")

    def bytes_by_key(self) -> dict[str, int]:
        """Bytes of all chunks on disk, by the keys of their objects."""
        query = "SELECT key, sum(bytes) FROM chunks JOIN blobs USING (token) GROUP BY key"
        with self._lock:
            return {os.fsdecode(key): size for key, size in self._connection.execute(query)}

    def _one(self, query: str, *parameters: str) -> int:
        with self._lock:
            return int(self._connection.execute(query, parameters).fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction on the index, which ends with the block, or with the outermost one of several."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            with self._connection:
                self._connection.execute("BEGIN")
                yield self._connection

    @contextmanager
    def _durably(self) -> Iterator[sqlite3.Connection]:
        """A transaction that reaches the disk at its end, with all before it."""
        with self._lock:
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                with self._connection:
                    yield self._connection
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")


_SELECT = (
    "SELECT token, key, etag, version_id, size, modified_ns, pinned, uses, last_used, "
    "(SELECT coalesce(sum(bytes), 0) FROM chunks WHERE token = blobs.token) AS present, "
    "(SELECT digest FROM checks WHERE token = blobs.token) FROM blobs"
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
    f"{_SELECT} LEFT JOIN checks USING (token) WHERE store = ? AND present > 0 AND coalesce(scrubbed, 0) < ? "
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


def _gather(
    found: dict[str, tuple[BlobRecord, list[ChunkRecord]]],
    blobs: Iterable[Sequence[Any]],
    chunks: Iterable[Sequence[Any]],
) -> None:
    """Add rows of blobs and chunks by token; chunks of other blobs are left out."""
    found.update((row[0], (_record(row), [])) for row in blobs)
    for token, chunk, length, crc in chunks:
        if token in found:
            found[token][1].append(ChunkRecord(chunk=chunk, length=length, crc=crc))


def _record(row: Sequence[Any]) -> BlobRecord:
    token, key, etag, version_id, size, modified_ns, pinned, uses, last_used, present, digest = row
    return BlobRecord(
        token=token,
        generation=Generation(
            key=os.fsdecode(key),
            etag=etag,
            size=size,
            modified_ns=modified_ns,
            version_id=version_id,
        ),
        pinned=bool(pinned),
        uses=uses,
        last_used=last_used,
        bytes=present,
        digest=digest,
    )
