"""Cloud stores: a bucket of Google Cloud Storage or a container of Azure Blob Storage; the only home of their SDKs."""
