"""Programs of users: plain framework code that is given a path, in the environment of its framework.

Each imports what it needs, prints ``ready``, waits for a line with the path, and prints a line of JSON: ``load_s``,
``infer_s`` if it infers, and a ``digest`` of what came out, which does not depend on where the files were.
"""
