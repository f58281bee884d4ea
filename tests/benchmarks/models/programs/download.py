"""Download all objects with a prefix by boto3's own transfer manager: ``download BUCKET DIRECTORY``."""

import argparse
import json
import sys
import time
from pathlib import Path

import boto3


def main() -> None:
    """Wait for the target, list, download each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bucket")
    parser.add_argument("directory")
    options = parser.parse_args()
    client = boto3.client("s3")
    print("ready", flush=True)
    target = Path(sys.stdin.readline().rstrip("\n"))
    begun = time.perf_counter()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=options.bucket, Prefix=f"{options.directory}/")
    for page in pages:
        for listed in page["Contents"]:
            client.download_file(options.bucket, listed["Key"], str(target / Path(listed["Key"]).name))
    print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
