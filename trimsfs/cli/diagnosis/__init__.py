"""`trimsfs doctor`: what a mount with these options would meet on this host and at its store."""
