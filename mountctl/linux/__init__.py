"""The system's interfaces that mounting needs: mount calls, bind mounts, sockets, systemd, log files."""
