"""Tiers: where this host keeps bytes of models; disk and memory."""
