"""Runs all cases of ``tests.reliability.calls`` in a small process: each case forks, and the process of the tests takes
a tenth of a second for that. ``python -m tests.reliability.perform ROOT SCRATCH UID`` prints their outcomes as JSON."""

import json
import sys
from functools import partial

from tests.reliability import calls_changing, calls_mapping, calls_reading
from tests.reliability.calls import Root, outcomes_of_all
from tests.support.users import as_user

MODULES = (calls_changing, calls_mapping, calls_reading)
"""Those that have cases."""

if __name__ == "__main__":
    path, scratch, user = sys.argv[1:]
    print(json.dumps(as_user(int(user), partial(outcomes_of_all, Root(path, scratch)))))
