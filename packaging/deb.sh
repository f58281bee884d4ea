#!/usr/bin/env bash
# Builds the Debian package of the wheels in WHEELHOUSE: packaging/deb.sh DIST WHEELHOUSE VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
dist=$(realpath "$1") wheelhouse=$(realpath "$2") version=$3
tree=$PWD/build/deb/trimsfs-$version
rm -rf build/deb && mkdir -p "$tree"
cp -r packaging README.md CHANGELOG.md "$tree"
mv "$tree/packaging/debian" "$tree"
cp -r "$wheelhouse" "$tree/wheelhouse"
cat > "$tree/debian/changelog" <<END
trimsfs (${version/.dev/\~dev}) trixie; urgency=medium

  * See /usr/share/doc/trimsfs/changelog.gz.

 -- The trimsfs project <packages@trimsfs.dev>  $(git log -1 --format=%cD)
END
(cd "$tree" && dpkg-buildpackage --build=binary --no-sign)
mv build/deb/trimsfs_*.deb "$dist"
python packaging/sbom.py trimsfs "$version" application "$tree/debian/trimsfs" "$dist/trimsfs-$version-deb.cdx.json"
