"""Cloud stores: a bucket of Google Cloud Storage or a container of Azure Blob Storage; the only home of their SDKs."""

from trimsfs.extras.stores.cloud import azure, gcs
from trimsfs.extras.stores.cloud.store import CloudStore
from trimsfs.options import MountOptions

SCHEMES = {
    **dict.fromkeys(("gs", "gcs"), gcs.open_bucket),
    **dict.fromkeys(("az", "abfs", "abfss"), azure.open_container),
}
"""What opens a store, by the scheme of its URL."""


def open_cloud(url: str, options: MountOptions, *, max_requests: int) -> CloudStore:
    """The store of a URL with one of SCHEMES. Raises ConfigurationError."""
    return SCHEMES[url.partition("://")[0]](url, options, max_requests)
