"""Labels on a Kubernetes node that tell which models its mounts have cached."""
