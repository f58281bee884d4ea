"""A fleet: several hosts, each in a network namespace, which fetch models of one store from each other."""
