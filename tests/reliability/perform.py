"""Runs all cases of ``tests.reliability.calls`` in a small process, which forks quickly: ``python -m
tests.reliability.perform ROOT SCRATCH UID`` prints what they come to as JSON."""

import json
import os
import sys

from tests.reliability import calls_changing, calls_mapping, calls_reading
from tests.reliability.calls import Root, performed

MODULES = (calls_changing, calls_mapping, calls_reading)
"""Those that have cases."""

if __name__ == "__main__":
    path, scratch, user = sys.argv[1:]
    if int(user):
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    print(json.dumps(performed(Root(path, scratch))))
