"""Programs as users write them: each builds a model with an engine, or loads one by its path."""
