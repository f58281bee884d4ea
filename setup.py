"""Builds the C extensions; everything else is in pyproject.toml."""

import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup


def pkg_config(option: str) -> list[str]:
    """The options for libfuse from pkg-config. Ends the build with the remedy if libfuse is not installed."""
    try:
        done = subprocess.run(["pkg-config", option, "fuse3"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("libfuse 3 is not installed: apt-get install libfuse3-dev pkg-config") from None
    return shlex.split(done.stdout)


for before in Path(__file__).parent.glob("build/lib*"):  # or setuptools would install files that were moved or removed
    shutil.rmtree(before)

setup(
    ext_modules=[
        Extension(
            "trimsfs.fuse._libfuse",
            sources=["trimsfs/fuse/_libfuse.c"],
            depends=["trimsfs/fuse/trimsfs.h"],
            extra_compile_args=["-Wall", "-Wextra", *pkg_config("--cflags")],
            extra_link_args=pkg_config("--libs"),
        ),
        Extension(
            "trimsfs.stores._md5",
            sources=["trimsfs/stores/_md5.c"],
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
            ],  # no ABI matters: only inlined functions take vectors
            optional=True,  # without it, hashlib is used, at a sixth of the speed
        ),
        # A library for ctypes, not a module: other interpreters load it.
        Extension(
            "trimsfs.client._native",
            sources=["trimsfs/client/_dlpack.c", "trimsfs/client/_fold.c", "trimsfs/client/_params.c"],
            depends=["trimsfs/client/dlpack.h"],
            extra_compile_args=["-Wall", "-Wextra"],
        ),
    ]
)
