"""What a file has on the disk."""

from pathlib import Path

from trimsfs.tiers.extents import has_hole


def test_holes_are_found_also_behind_the_end_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 16))
    with path.open("r+b") as file:
        assert not has_hole(file.fileno(), 0, 1 << 16)
        assert has_hole(file.fileno(), 0, 1 << 17)
        assert has_hole(file.fileno(), 1 << 17, 1 << 18)
        file.truncate(100)
        assert has_hole(file.fileno(), 4096, 1 << 16)
