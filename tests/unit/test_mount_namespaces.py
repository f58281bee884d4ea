"""What an unmount leaves of a file system, as the kernel's rules of propagation have it."""

from pathlib import Path

import pytest

from trimsfs.mount_namespaces import outliving
from trimsfs.mountinfo import Mount

HERE, THERE, FARTHER = 1, 2, 3
"""Processes of three namespaces."""


def mount(
    number: int, parent: int, mountpoint: str, device: str = "0:9", root: str = "/", *, shared: int = 0, master: int = 0
) -> Mount:
    place = Path(mountpoint)
    return Mount(
        number=number,
        parent=parent,
        mountpoint=place,
        device=device,
        kind="x",
        source="s",
        root=root,
        shared=shared,
        master=master,
    )


def root(number: int, *, shared: int = 0, master: int = 0) -> Mount:
    return mount(number, 0, "/", "8:1", shared=shared, master=master)


MODELS = mount(11, 10, "/models", shared=5)


@pytest.mark.parametrize(
    ("shared", "there", "farther", "left"),
    [
        (0, root(20), root(30), {21, 31}),
        (7, root(20), root(30), {21, 31}),
        (7, root(20, shared=7), root(30, master=7), set()),
        (7, root(20, master=7, shared=8), root(30, master=8), set()),
        (7, root(20, master=8), root(30, shared=6), {21, 31}),
    ],
    ids=["private", "made private", "peer and slave", "slave of a slave", "of other groups"],
)
def test_what_does_not_propagate_is_left(shared: int, there: Mount, farther: Mount, left: set[int]) -> None:
    places = {
        HERE: [root(10, shared=shared), MODELS],
        THERE: [there, mount(21, 20, "/models", shared=5)],
        FARTHER: [farther, mount(31, 30, "/models", master=5)],
    }
    assert {each.number for _, each in outliving(MODELS, places)} == left


def test_a_bind_is_left_wherever_it_is() -> None:
    bind, deeper = mount(12, 10, "/srv/llama", shared=5), mount(21, 20, "/host/models")
    places = {
        HERE: [root(10, shared=7), MODELS, bind, mount(13, 10, "/other", "0:8")],
        THERE: [mount(20, 0, "/", "8:1", master=7), deeper],
    }
    assert outliving(MODELS, places) == [(HERE, bind), (THERE, deeper)]


def test_what_lies_at_the_same_place_of_a_bound_parent_goes_as_well() -> None:
    bound = mount(20, 19, "/host", "8:1", "/srv", master=7)
    models = mount(11, 10, "/srv/models")
    places = {HERE: [root(10, shared=7), models], THERE: [bound, mount(21, 20, "/host/models")]}
    assert outliving(models, places) == []
