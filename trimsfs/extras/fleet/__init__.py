"""A fleet: the hosts of one mount fetch from each other first, so that the store serves each chunk about once."""
