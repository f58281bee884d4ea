"""Opens the index of a disk tier: creates it if there is none, checks it, and rebuilds it if it is damaged.

Wrong records are dropped: the server refetches chunks without a record. An unnoticed wrong record does no harm, as all
bytes must pass their checksums before their first use.
"""

import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from trimsfs.errors import CacheUnusableError
from trimsfs.types import Generation

log = logging.getLogger(__name__)

Row = tuple[Any, ...]

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blobs (
    token TEXT PRIMARY KEY,      -- the blob's file name
    store BLOB NOT NULL,
    key BLOB NOT NULL,
    etag TEXT NOT NULL,
    version_id TEXT,
    size INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    uses INTEGER NOT NULL DEFAULT 0,
    sequence INTEGER NOT NULL,   -- grows with every use: the order of eviction, independent of the clock
    loaded INTEGER NOT NULL,     -- grows with every new blob
    last_used REAL NOT NULL      -- for display
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blobs_by_sequence ON blobs (sequence);
CREATE TABLE IF NOT EXISTS chunks (
    token TEXT NOT NULL,
    chunk INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    crc INTEGER NOT NULL,        -- CRC32C
    synced INTEGER NOT NULL,
    PRIMARY KEY (token, chunk)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chunks_by_checksum ON chunks (crc, bytes);
CREATE TABLE IF NOT EXISTS compared (
    token TEXT PRIMARY KEY,      -- deduplication has compared it with earlier blobs
    family TEXT NOT NULL         -- the same for related blobs
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS compared_by_family ON compared (family);
CREATE TABLE IF NOT EXISTS checks (
    token TEXT PRIMARY KEY,
    digest TEXT,                 -- the store's digest, which all bytes match; empty: none to compare with
    scrubbed REAL NOT NULL       -- when all chunks on the disk last passed their checksums
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS checks_by_time ON checks (scrubbed);
CREATE INDEX IF NOT EXISTS checks_by_digest ON checks (digest);
CREATE TABLE IF NOT EXISTS loads (
    place TEXT PRIMARY KEY,      -- a directory of a store, hashed
    files TEXT NOT NULL,         -- what the last load read, as trimsfs/prefetch packs it; optional
    recorded REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS loads_by_time ON loads (recorded);
CREATE TABLE IF NOT EXISTS listings (
    place TEXT PRIMARY KEY,      -- a directory of a store, hashed
    names BLOB NOT NULL,         -- the last listing, as trimsfs/namespace packs it; optional
    listed REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS listings_by_time ON listings (listed);
"""
_FILES = ("", "-wal", "-shm")
_DAMAGED = "-damaged"
_TABLES = ("meta", "blobs", "chunks", "compared", "checks", "loads", "listings")
_COUNT_LIMIT = 1 << 53
_LITTLE_SPACE = 1 << 20
"""With fewer bytes free, SQLite may tell of any failure: it needs room for its log, and for what its users share."""
_KINDS = {"TEXT": bytes, "BLOB": bytes, "INTEGER": int, "REAL": float}
_DROP_CHUNKS = (
    "DELETE FROM chunks WHERE NOT coalesce((SELECT typeof(chunk) = 'integer' AND chunk >= 0 AND chunk * :chunk < size "
    "AND bytes = min(:chunk, size - chunk * :chunk) AND typeof(crc) = 'integer' AND crc BETWEEN 0 AND 4294967295 "
    "AND synced IN (0, 1) FROM blobs WHERE blobs.token = chunks.token), FALSE)"
)


def open_index(
    path: Path, boot_id: str, *, chunk_size: int, checked: bool, strict: bool
) -> tuple[sqlite3.Connection, bool]:
    """Open an index; returns its connection, and whether it was damaged and rebuilt. Raises sqlite3.Error and OSError.

    Unless *checked*, checks it first. With *strict*, drops records that a tier of this *chunk_size* cannot have made.
    """
    damaged = Path(f"{path}{_DAMAGED}")
    if damaged.exists():
        _remove(path)  # a rebuild was interrupted
    else:
        try:
            return _opened(path, boot_id, chunk_size if strict else None, checked=checked), False
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not _is_damage(error):
                raise
            log.warning("%s: %s: rebuilding it from its readable records", path, error)
        for end in reversed(_FILES):
            with suppress(FileNotFoundError):
                os.replace(f"{path}{end}", f"{damaged}{end}")
    with closing(_connected(path)) as connection:
        _save(damaged, connection)
    _remove(damaged)
    return _opened(path, boot_id, chunk_size if strict else None, checked=False), True


def index_unusable(path: Path, error: Exception) -> CacheUnusableError:
    """Why an index cannot be used, and what to do."""
    remedy = "set --cache-dir"
    with suppress(OSError):
        if shutil.disk_usage(path.parent).free < _LITTLE_SPACE:
            remedy = f"free some space, or {remedy}"
    return CacheUnusableError(f"cache index {path}: {error}: {remedy}")


def _remove(path: Path) -> None:
    for end in _FILES:
        Path(f"{path}{end}").unlink(missing_ok=True)


def _is_damage(error: Exception) -> bool:
    """Whether an error means a damaged index, not one that is locked, or whose disk is full or fails."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return not isinstance(error, sqlite3.OperationalError) or code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}


def _opened(path: Path, boot_id: str, chunk_size: int | None, *, checked: bool) -> sqlite3.Connection:
    """Open an index; after a reboot drop unsynced chunks, and with a *chunk_size* records that do not fit it."""
    connection = _connected(path)
    try:
        if not checked:
            _check(connection)
            if chunk_size is not None:
                _drop_wrong_records(connection, chunk_size)
        with _unless_full(), connection:
            if connection.execute("SELECT value FROM meta WHERE name = 'boot'").fetchone() != (boot_id,):
                connection.execute(
                    "UPDATE checks SET digest = NULL WHERE token IN (SELECT token FROM chunks WHERE synced = 0)"
                )
                connection.execute("DELETE FROM chunks WHERE synced = 0")
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('boot', ?)", (boot_id,))
            else:  # it must be possible
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('opened', ?)", (str(time.time_ns()),))
    except BaseException:
        connection.close()
        raise
    return connection


def _connected(path: Path) -> sqlite3.Connection:
    try:
        return _in_mode(path, "NORMAL")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_IOERR:
            raise
        # A full disk has no room for what connections share. Alone, a connection has that in memory.
        return _in_mode(path, "EXCLUSIVE")


def _in_mode(path: Path, locking: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA locking_mode = {locking}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA temp_store = MEMORY")  # a server may write no temporary files
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in {0, SCHEMA_VERSION}:
            raise sqlite3.DatabaseError(f"schema {version} is not {SCHEMA_VERSION}")
        connection.executescript(SCHEMA)
        if version != SCHEMA_VERSION:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _unless_full() -> Iterator[None]:
    """Write, unless the disk is full: unsynced chunks that a reboot should drop are then compared before their use."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise


# Checks


def _check(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError if SQLite finds an index damaged, or its tables differ from SCHEMA."""
    (problem,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)
    if any(_columns(connection, table) != wanted for table, wanted in _wanted_columns().items()):
        raise sqlite3.DatabaseError("its tables differ from the schema")


def _wanted_columns() -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return {table: _columns(connection, table) for table in _TABLES}


def _columns(connection: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    return connection.execute(f"PRAGMA table_info({table})").fetchall()


def _drop_wrong_records(connection: sqlite3.Connection, chunk_size: int) -> None:
    """Delete invalid records."""
    count = 0
    with connection:
        for table, columns in _wanted_columns().items():
            if table == "chunks":
                continue
            wrong = [
                (bytes(row[0]),)
                for row in _rows(connection, table)
                if not _is_right(row, columns) or (table == "blobs" and not _is_blob(row))
            ]
            name = columns[0][1]
            connection.executemany(f"DELETE FROM {table} WHERE CAST({name} AS BLOB) = ?", wrong)  # noqa: S608
            count += len(wrong)
        count += connection.execute(_DROP_CHUNKS, {"chunk": chunk_size}).rowcount
    if count:
        log.warning("cache index: %d records are damaged and were dropped: their chunks are refetched", count)


def _rows(connection: sqlite3.Connection, table: str) -> list[Row]:
    """The rows of a table, with texts as bytes, as they may be invalid UTF-8."""
    connection.text_factory = bytes
    try:
        return connection.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
    finally:
        connection.text_factory = str


def _is_right(row: Row, columns: list[tuple[Any, ...]]) -> bool:
    """Whether the values of a row are what its columns may have."""
    return all(
        not not_null if value is None else isinstance(value, _KINDS[kind]) and (kind != "TEXT" or _is_text(value))
        for value, (_, _, kind, not_null, *_) in zip(row, columns, strict=True)
    )


def _is_text(value: Any) -> bool:
    with suppress(UnicodeDecodeError):
        value.decode()
        return True
    return False


def _is_blob(row: Row) -> bool:
    """Whether the values of a blob's record can be, and its token is the hash of them."""
    token, store, key, etag, _, size, modified_ns, pinned, uses, sequence, loaded, _ = row
    if pinned not in {0, 1} or not all(0 <= count < _COUNT_LIMIT for count in (size, uses, sequence, loaded)):
        return False
    generation = Generation(key=os.fsdecode(key), etag=etag.decode(), size=size, modified_ns=modified_ns)
    return bool(token == generation.token(os.fsdecode(store)).encode())


# Rebuild


def _save(damaged: Path, connection: sqlite3.Connection) -> None:
    """Copy the readable rows of a damaged index."""
    for table, columns in _wanted_columns().items():
        values = ", ".join("?" * len(columns))
        texts = [number for number, column in enumerate(columns) if column[2] == "TEXT"]
        with connection:
            for order in ("ASC", "DESC"):  # from both ends, up to the damage
                connection.executemany(
                    f"INSERT OR IGNORE INTO {table} VALUES ({values})",  # noqa: S608
                    _readable(damaged, table, columns, texts, order),
                )


def _readable(
    damaged: Path, table: str, columns: list[tuple[Any, ...]], texts: list[int], order: str
) -> Iterator[list[Any]]:
    """The rows of a table, up to the first unreadable one."""
    query = f"SELECT * FROM {table} ORDER BY {columns[0][1]} {order}"  # noqa: S608
    with suppress(sqlite3.Error, UnicodeDecodeError), closing(sqlite3.connect(damaged)) as source:
        source.execute("PRAGMA locking_mode = EXCLUSIVE")  # alone, it needs no room
        source.text_factory = bytes
        if source.execute("PRAGMA user_version").fetchone() != (SCHEMA_VERSION,):
            return
        if source.execute(f"PRAGMA table_info({table})").fetchall() != [
            tuple(value.encode() if isinstance(value, str) else value for value in column) for column in columns
        ]:
            return
        for row in source.execute(query):
            values = list(row)
            with suppress(UnicodeDecodeError, AttributeError):
                for number in texts:
                    values[number] = None if values[number] is None else values[number].decode()
                yield values
