"""A CSI driver: gives Kubernetes pods models of this node's mounts as read-only inline volumes.

A volume is a bind of a mount, or of a directory in it. What is published is read from the kernel's table of mounts, so
the driver keeps no state: it may be restarted at any time, and volumes do not notice.
"""

DRIVER_NAME = "models.trimsfs.dev"
