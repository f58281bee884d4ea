"""Where the bytes of models are kept on this host."""
