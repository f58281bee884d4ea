"""Folding: processes that rewrite a model's weights in the same way share the rewritten bytes, too."""
