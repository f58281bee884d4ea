"""Which files a load reads next, by their names."""

import pytest

from trimsfs.prefetch.related_files import MOST_FILES, numbered


@pytest.mark.parametrize("count", [3, MOST_FILES, MOST_FILES + 2, 3 * MOST_FILES])
@pytest.mark.parametrize("place", [0, -1])
def test_a_directory_may_have_any_number_of_parts(count: int, place: int) -> None:
    names = [b"train-%05d-of-%05d.parquet" % (number, count) for number in range(count)]
    found = numbered(names[place], names)
    assert names[place] not in found
    assert len(found) <= MOST_FILES
    if count <= MOST_FILES:
        assert set(found) == set(names) - {names[place]}
