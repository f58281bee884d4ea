"""What somebody does on purpose: hostile names, stores, requests and users, and a server that has been taken over.

docs/security.md tells what each of these may reach; docs/traceability.md tells which tests prove it.
"""
