"""Gives containers models: by shared directories, attachments, CDI devices and the OCI hook."""
