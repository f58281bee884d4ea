"""The Linux interfaces that mounting needs: mount calls, bind mounts, sockets, systemd, log files."""
