"""Model files on the mount: their tensor tables, and the blobs that clients derive from them."""
