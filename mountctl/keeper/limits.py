"""How long a keeper waits for its servers, in seconds."""

TICK_S = 1.0
"""How often the keeper checks its servers."""
DEATH_TICK_S = 0.002
"""How often it checks a server that it has killed: the next server waits for that end."""
STOP_TIMEOUT_S = 10.0
"""How long a server may take to record its state after the unmount: one of its threads may hang in a driver. `trimsfs
umount` waits twice as long."""
SILENCE_LIMIT_S = 30.0
"""The keeper kills a server that has sent nothing for so long, while the keeper itself ran."""
HURRY_AFTER_S = 15.0
"""How long a standby may load in idle time alone."""
START_TIMEOUT_S = 60.0
"""The keeper kills a standby that is not ready after so long."""
SHORTAGE_S = 60.0
"""For how long nobody serves before it counts as a crash that no server can be started: memory, or processes, run out
for a while."""
LISTEN_INTERVAL_S = 5.0
"""How often a keeper that cannot listen for operators tries again."""
LEAVE_TIMEOUT_S = 25.0
"""How long a keeper that is stopped waits for a launcher to keep the mount, before it unmounts."""
VACANCY_LIMIT_S = 600.0
"""Readers that have waited for a server for so long get an error: the longest pause of the kubelet between restarts is
half of it."""
