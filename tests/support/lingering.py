"""A server that does not end by itself, for tests: in an order's ``server``, in place of ``trimsfs.daemon``.

A thread of it is in a call that never returns, as one that waits for a GPU may be.
"""

import threading

from trimsfs.server import startup

if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait).start()
    startup.main()
