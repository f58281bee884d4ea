#!/usr/bin/env bash
# Builds a wheel for each interpreter: packaging/wheels.sh DIST VERSION PYTHON...
# PyPI has no wheel of pyfuse3, and pyfuse3 and the extension must call one libfuse. So these are in the wheel, below
# trimsfs/fuse/_vendored and trimsfs.libs. zig compiles for the glibc of manylinux_2_28, whatever this host has.
# LIBFUSE_SOURCE names a directory with the sources of libfuse; else Debian's are fetched with apt-get.
set -euo pipefail
cd "$(dirname "$0")/.."
dist=$(realpath -m "$1") version=$2
shift 2
build=$PWD/build/wheels
mkdir -p "$build" "$dist"

# It sees no headers and libraries of this host: only zig's own, libfuse's and Python's.
cat > "$build/cc" <<END
#!/bin/sh
exec $(command -v python) -m ziglang cc -target $(uname -m)-linux-gnu.2.28 "\$@"
END
chmod +x "$build/cc"
export CC=$build/cc LDSHARED="$build/cc -shared" LDFLAGS="-s -L$build/libfuse/lib" PKG_CONFIG_LIBDIR=$build/libfuse/lib/pkgconfig

if [ ! -e "$build/libfuse/lib/libfuse3.so" ]; then
  source=${LIBFUSE_SOURCE:-}
  if [ -z "$source" ]; then
    rm -rf "$build/debian" && mkdir -p "$build/debian/lists/partial"
    echo 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.pgp] http://deb.debian.org/debian trixie main' \
      > "$build/debian/sources.list"
    apt=(apt-get -q -o APT::Sandbox::User=root -o Dir::Etc::SourceList="$build/debian/sources.list"
      -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$build/debian/lists" -o Dir::Cache="$build/debian")
    "${apt[@]}" update
    (cd "$build/debian" && "${apt[@]}" source fuse3)
    source=$(echo "$build"/debian/fuse3-*/)
  fi
  rm -rf "$build/meson"
  meson setup "$build/meson" "$source" --prefix "$build/libfuse" --libdir lib --bindir /usr/bin --buildtype release \
    --strip -D utils=false -D examples=false -D tests=false
  ninja -C "$build/meson" install
  mkdir -p "$build/licences" && cp "$source/LICENSE" "$source/LGPL2.txt" "$build/licences"
fi

tags=
for python; do
  read -r tag include < <("$python" -c 'import sys, sysconfig
print("cp%d%d" % sys.version_info[:2], sysconfig.get_path("include"))' 2>/dev/null) || continue
  if [[ $tag != cp31[1-9] || " $tags " = *" $tag "* || ! -e $include/Python.h ]]; then
    continue # too old, a second one of its version, or without headers
  fi
  tags+=" $tag"
  work=$build/$tag
  rm -rf "$work" && mkdir -p "$work/packed" "$work/include"
  # Debian has a part of Python's headers in a directory that also has those of its glibc.
  ln -s "$(dirname "$include")/$(uname -m)-linux-gnu" "$work/include/"
  export CFLAGS="-O2 -fwrapv -DNDEBUG -I$build/libfuse/include -I$work/include"
  pip -q --python "$python" wheel --no-deps --wheel-dir "$work" .
  pip -q --python "$python" wheel --no-deps --no-cache-dir --wheel-dir "$work" --no-binary pyfuse3 \
    "$(python -c 'import tomllib
needed = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print(next(each for each in needed if each.startswith("pyfuse3")))')"

  wheel unpack -d "$work" "$work"/trimsfs-*.whl
  tree=$(echo "$work"/trimsfs-*/)
  python -m zipfile -e "$work"/pyfuse3-*.whl "$tree/trimsfs/fuse/_vendored"
  rm "$tree"/trimsfs/fuse/_vendored/pyfuse3/*.{c,h,pxd,pxi,pyx}
  licences=$(echo "$tree"trimsfs-*.dist-info)/licenses
  cp -r "$build/licences" "$licences/libfuse"
  cp "$tree"/trimsfs/fuse/_vendored/pyfuse3-*.dist-info/licenses/LICENSE "$licences/pyfuse3"
  sed -i -e '/^Requires-Dist: pyfuse3/d' \
    -e 's/^License-Expression: .*/& AND LGPL-2.1-only AND LGPL-2.1-or-later/' \
    -e 's/^License-File: LICENSE$/&\nLicense-File: libfuse\/LICENSE\nLicense-File: libfuse\/LGPL2.txt\nLicense-File: pyfuse3/' \
    "${licences%/licenses}/METADATA"
  wheel pack -d "$work/packed" "$tree"
  LD_LIBRARY_PATH=$build/libfuse/lib auditwheel repair --plat "manylinux_2_28_$(uname -m)" -w "$work/repaired" "$work"/packed/*.whl
  wheel=$(echo "$work"/repaired/*.whl)
  python -m zipfile -e "$wheel" "$work/tree"
  python packaging/sbom.py trimsfs "$version" library "$work/tree" "$dist/$(basename "$wheel" .whl).cdx.json"
  mv "$wheel" "$dist"
done
[ -n "$tags" ] || { echo 'no Python from 3.11 with its headers: name some with PYTHONS=' >&2; exit 1; }
echo "wheels for$tags are in $dist"
