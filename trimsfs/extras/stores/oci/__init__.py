"""The OCI store: the files of an artifact in a registry, as ModelPack, KitOps and oras push models."""
