"""Read-only data beside models: SQLite, DuckDB on its own files and on Parquet, and Arrow, mapped."""

import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.engines.programs.common import floats, main

ROWS = 2_000_000


def build(directory: Path, divide: int) -> None:
    """One table in each format."""
    rows = ROWS // divide
    random = np.random.default_rng(0)
    table = pa.table({"id": np.arange(rows), "weight": random.standard_normal(rows)})
    pq.write_table(table, directory / "table.parquet")
    with pa.OSFile(str(directory / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with closing(duckdb.connect(str(directory / "table.duckdb"))) as connection:
        connection.register("source", table)
        connection.execute("CREATE TABLE weights AS SELECT * FROM source")
    with closing(sqlite3.connect(directory / "table.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE weights (id INTEGER PRIMARY KEY, weight REAL)")
        connection.executemany(
            "INSERT INTO weights VALUES (?, ?)", zip(range(rows), table["weight"].to_pylist(), strict=True)
        )


def sqlite(directory: Path, parameters: str) -> tuple[object, bytes]:
    """SQLite, by a URI."""
    connection = sqlite3.connect(f"file:{directory}/table.sqlite?{parameters}", uri=True)
    found = connection.execute("SELECT sum(weight), count(*) FROM weights WHERE id % 7 = 0").fetchone()
    return connection, floats(found)


def duck(directory: Path, name: str) -> tuple[object, bytes]:
    """DuckDB."""
    if name.endswith(".parquet"):
        connection, source = duckdb.connect(), f"'{directory / name}'"
    else:
        connection, source = duckdb.connect(str(directory / name), read_only=True), "weights"
    found = connection.execute(f"SELECT sum(weight), count(*) FROM {source} WHERE id % 7 = 0").fetchone()
    assert found is not None
    return connection, floats(found)


def arrow(directory: Path) -> tuple[object, bytes]:
    """Arrow's own file format."""
    table = pa.ipc.open_file(pa.memory_map(str(directory / "table.arrow"))).read_all()
    return table, floats([float(np.asarray(table["weight"]).sum())])


if __name__ == "__main__":
    main(
        build,
        {
            "sqlite": ("*.sqlite", lambda directory: sqlite(directory, "mode=ro")),
            "sqlite-immutable": ("*.sqlite", lambda directory: sqlite(directory, "immutable=1")),
            "duckdb": ("*.duckdb", lambda directory: duck(directory, "table.duckdb")),
            "parquet": ("*.parquet", lambda directory: duck(directory, "table.parquet")),
            "arrow": ("*.arrow", arrow),
        },
    )
