"""Tasks, channels and limits that know nothing of files."""
