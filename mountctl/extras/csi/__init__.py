"""A CSI driver: gives Kubernetes pods models of this node's mounts as read-only volumes, inline or persistent.

A volume is a bind mount of a mount, or of a directory in it. The driver keeps no state: it reads published volumes from
the kernel's mount table. So it may restart at any time without effect on volumes.
"""

DRIVER_NAME = "models.trimsfs.dev"
