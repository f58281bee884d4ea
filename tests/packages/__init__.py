"""What ``make dist`` has built, each tried in a clean root."""
