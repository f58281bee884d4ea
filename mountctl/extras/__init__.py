"""What few hosts need of mountctl: the CSI driver for Kubernetes, and nginx for a fleet."""

PLUGINS = {
    "commands/Fleets": {
        "fleet": "mountctl.extras.fleet.nginx_command",
    },
    "commands/Containers and Kubernetes": {
        "csi": "mountctl.extras.csi.csi_command",
    },
}
"""The places of all extras, by the point of the core at which they are plugged in; see `trimsfs.plugins`."""
