#!/usr/bin/env bash
# Builds the container image: packaging/image.sh DIST VERSION
# Where no registry is reached, mmdebstrap makes the Debian that packaging/Dockerfile begins with, under the same name.
set -euo pipefail
cd "$(dirname "$0")/.."
dist=$(realpath "$1") version=$2
base=docker.io/library/debian:13-slim
if ! podman image exists "$base" && ! podman pull -q "$base" 2>/dev/null; then
  mmdebstrap --quiet --variant=apt --include=ca-certificates trixie - | podman import -q - "$base"
fi
limits=(--ulimit "nofile=$(ulimit -Sn):$(ulimit -Hn)" --ulimit "nproc=$(ulimit -Su):$(ulimit -Hu)") # podman's own may be above them
podman build "${limits[@]}" --pull=never --isolation chroot --network host -f packaging/Dockerfile -t "trimsfs:$version" .
rm -f "$dist/trimsfs-$version-image.tar"
podman save --format oci-archive -o "$dist/trimsfs-$version-image.tar" "localhost/trimsfs:$version"
tree=build/image
rm -rf $tree && mkdir -p $tree/var/lib/dpkg
container=$(podman create "trimsfs:$version")
podman cp "$container:/opt" $tree
podman cp "$container:/var/lib/dpkg/status" $tree/var/lib/dpkg
podman rm "$container"
python packaging/sbom.py trimsfs "$version" container $tree "$dist/trimsfs-$version-image.cdx.json"
