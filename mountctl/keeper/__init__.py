"""The keeper: the process that holds a mount's descriptors, starts its servers and replaces them."""
