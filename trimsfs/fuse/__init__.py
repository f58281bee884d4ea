"""The kernel interface: FUSE requests become calls, errors become errno values; the only home of pyfuse3."""

import os
import sys

# The extension replaces functions of libfuse: its symbols must be global before pyfuse3 is loaded.
assert "pyfuse3" not in sys.modules
# Both must call one libfuse, so a wheel brings a pyfuse3 that is linked with the extension's (packaging/wheels.sh).
_vendored = os.path.join(__path__[0], "_vendored")
if os.path.isdir(_vendored):
    sys.path.insert(0, _vendored)
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
try:
    from trimsfs.fuse import _libfuse  # noqa: F401
finally:
    sys.setdlopenflags(_flags)
