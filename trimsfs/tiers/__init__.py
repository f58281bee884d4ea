"""Tiers: where this host keeps bytes of models; disk, memory and GPUs."""
