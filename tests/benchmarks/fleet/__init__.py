"""The fleet beside the store alone: hosts in network namespaces, with links that are limited."""
