"""The commands that watch mounts: their status, their models and jobs, now or live."""
