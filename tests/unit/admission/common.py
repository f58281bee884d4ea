"""What the tests of signed files have in common."""

from tests.signing import new_key

KEY = new_key()
