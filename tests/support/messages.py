"""Messages to keepers: what joins a launcher, and strategies for what is nearly right."""

from hypothesis import strategies as st

from mountctl.keeper.launching.launcher_socket import PROTOCOL

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


TYPES = (
    *("standing-by", "mount", "backing-open", "backing-close", "hold", "let-go", "recall", "listen"),
    *("ready", "alive", "failed"),
)


near_misses = st.fixed_dictionaries(
    {"type": st.sampled_from(TYPES) | json_values},
    optional={
        "id": json_values,
        "number": json_values,
        "resends": json_values,
        "kind": json_values,
        "error": json_values,
        "more": json_values,
    },
)


JOIN = {
    "type": "join",
    "protocol": PROTOCOL,
    "version": "0.2.0",
    "mountpoint": "/models",
    "source": "s3://models",
    "allow_other": True,
    "cache_dir": "/cache",
    "log_file": "/log",
    "names": [],
}
