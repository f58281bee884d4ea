"""Signed models, in the format of OpenSSF Model Signing; the only home of the cryptography package."""
