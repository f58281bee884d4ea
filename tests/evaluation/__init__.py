"""The TrIMS paper's evaluation, for trimsfs."""
