"""The manifests for Kubernetes: their schemas, their agreement with the code, and what each container needs."""
