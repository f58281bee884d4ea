"""Tiers: where this host keeps bytes of models: on disk and in memory."""
