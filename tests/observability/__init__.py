"""Rules and dashboard of packaging/observability."""
