#!/usr/bin/env bash
# Pushes the image of `make image`, and names it by its digest in the manifests: packaging/push.sh IMAGE VERSION
# IMAGE is where it goes, such as registry.example.com/trimsfs. PUSH_OPTIONS are options of `podman push`.
set -euo pipefail
cd "$(dirname "$0")/.."
image=$1 version=$2
digest=$(mktemp)
trap 'rm -f "$digest"' EXIT
# shellcheck disable=SC2086 # several options
podman push -q ${PUSH_OPTIONS:-} --digestfile "$digest" "trimsfs:$version" "docker://$image:$version"
sed -i -e "s|newName: .*|newName: $image|" -e "s|digest: .*|digest: $(cat "$digest")|" \
  packaging/kubernetes/image/kustomization.yaml
echo "$image:$version@$(cat "$digest")"
