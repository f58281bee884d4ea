"""Models in containers: shared directories, running containers, CDI devices and the OCI hook."""
