"""Model files: their tensor tables, and what programs have derived from them."""
