"""What tests share: mounts, stores, servers without FUSE, readers, signed models."""
