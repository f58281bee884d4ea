"""The kernel interface: FUSE requests become calls, errors become errno values; the only home of pyfuse3."""

import os
import sys

# The extension stands in for some of libfuse's functions: it has to be loaded, and found by all, before pyfuse3 is.
assert "pyfuse3" not in sys.modules
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from trimsfs.fuse import _libfuse  # noqa: F401
finally:
    sys.setdlopenflags(_flags)
