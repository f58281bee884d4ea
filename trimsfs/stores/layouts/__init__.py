"""Layouts: what a mount shows of a store when not its own names, as a Hugging Face cache or published versions."""
