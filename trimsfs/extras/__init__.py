"""What plugs into the core for those who need it; a mount that asks for none of it never imports it."""

PLUGINS = {
    "commands/Mounts": {
        "fleet": "trimsfs.extras.fleet.fleet_command",
    },
    "commands/Versions": {
        "push": "trimsfs.extras.versions.commands.push",
        "import": "trimsfs.extras.versions.commands.push",
        "versions": "trimsfs.extras.versions.commands.versions",
        "alias": "trimsfs.extras.versions.commands.versions",
        "rollback": "trimsfs.extras.versions.commands.versions",
        "rm": "trimsfs.extras.versions.commands.versions",
        "diff": "trimsfs.extras.versions.commands.diff",
    },
    "commands/Models": {
        "image": "trimsfs.extras.images.image_command",
    },
    "commands/Watch": {
        "trace": "trimsfs.extras.tracing.trace",
        "exporter": "trimsfs.extras.exporter.exporter_command",
        "node-labels": "trimsfs.extras.kubernetes.node_labels",
    },
    "commands/Run": {
        "spawn": "trimsfs.extras.spawn.spawn_command",
    },
    "direct": {
        "spawn": "trimsfs.extras.spawn.direct:main",
    },
    "eviction": {},
    "stores": {
        "gs": "trimsfs.extras.stores.cloud.gcs:open_bucket",
        "gcs": "trimsfs.extras.stores.cloud.gcs:open_bucket",
        "az": "trimsfs.extras.stores.cloud.azure:open_container",
        "abfs": "trimsfs.extras.stores.cloud.azure:open_container",
        "abfss": "trimsfs.extras.stores.cloud.azure:open_container",
        "hf": "trimsfs.extras.stores.huggingface.hub_store:HubStore",
        "oci": "trimsfs.extras.stores.oci.oci_store:OciStore",
        "*": "trimsfs.extras.stores.fsspec:FsspecStore",
    },
    "server": {
        "gpu": "trimsfs.extras.gpu.gpu_plugin:GpuPlugin",
        "folding": "trimsfs.extras.folding.folding_plugin:FoldingPlugin",
        "fleet": "trimsfs.extras.fleet.fleet_plugin:FleetPlugin",
    },
    "adapters": {
        "mxnet": "trimsfs.extras.mxnet:install",
    },
    "client": {
        "DeviceModel": "trimsfs.extras.gpu.client:DeviceModel",
        "DeviceTensor": "trimsfs.extras.gpu.client:DeviceTensor",
        "Folded": "trimsfs.extras.folding.folding:Folded",
        "GpuError": "trimsfs.extras.gpu.client:GpuError",
        "GpuFullError": "trimsfs.extras.gpu.client:GpuFullError",
        "GpuLostError": "trimsfs.extras.gpu.client:GpuLostError",
        "fold": "trimsfs.extras.folding.folding:fold",
        "mxnet": "trimsfs.extras.mxnet.load:arrays",
        "to": "trimsfs.extras.gpu.client:load",
    },
    "signatures": {
        "openssf": "trimsfs.extras.signatures.signed_manifest:reader",
    },
    "doctor": {
        "gpu": "trimsfs.extras.gpu.gpu_checks:checks",
        "fleet": "trimsfs.extras.fleet.fleet_checks:checks",
    },
}
"""The places of all extras, by the point of the core at which they are plugged in; see `trimsfs.plugins`."""
