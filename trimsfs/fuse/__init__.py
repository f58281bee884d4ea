"""The kernel interface: FUSE requests become calls, errors become errno values; the only home of pyfuse3."""

import os
import sys

# The extension replaces functions of libfuse: its symbols must be global before pyfuse3 is loaded.
assert "pyfuse3" not in sys.modules
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from trimsfs.fuse import _libfuse  # noqa: F401
finally:
    sys.setdlopenflags(_flags)
