"""Tests of the proxy: each fault is one that a client can tell, and nothing happens unasked."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from .ceph import Ceph
from .faults import FAULTS
from .faulty import FaultyS3, Plan, faulty

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONTENT = random.Random(1).randbytes(100_000)
PATIENCE_S, HASTE_S = 20, 2
"""How long clients wait for bytes: one that is to be answered, and one that is to find out that nothing comes."""


@pytest.fixture(scope="module", name="right")
def _right(client: S3Client) -> list[object]:
    return seen(client)


@pytest.fixture(scope="module", name="through")
def _through(ceph: Ceph) -> Iterator[FaultyS3]:
    with contextlib.closing(ceph.client()) as client:
        client.create_bucket(Bucket="faulty")
        for key in ("a", "b", "c"):
            client.put_object(Bucket="faulty", Key=key, Body=CONTENT)
    with faulty(ceph) as server:
        yield server


@pytest.fixture(scope="module", name="client")
def _client(through: FaultyS3) -> Iterator[S3Client]:
    with asking(through, PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module", name="hasty")
def _hasty(through: FaultyS3) -> Iterator[S3Client]:
    with asking(through, HASTE_S) as client:
        yield client


def asking(through: FaultyS3, timeout_s: float) -> contextlib.closing[S3Client]:
    """A client that makes each request once."""
    return contextlib.closing(through.client(retries={"total_max_attempts": 1}, read_timeout=timeout_s))


def seen(client: S3Client) -> list[object]:
    """What a client is told by one request of each kind; errors by their kind."""
    found: list[object] = []
    for ask in (_got, _head, _listed):
        try:
            found.append(ask(client))
        except (BotoCoreError, ClientError, OSError) as error:
            found.append(type(error))
    return found


def _got(client: S3Client) -> object:
    answer = client.get_object(Bucket="faulty", Key="a", Range="bytes=10-59999")
    told = (answer["ResponseMetadata"]["HTTPStatusCode"], answer.get("ETag"), answer.get("ContentRange"))
    return told, answer["Body"].read()


def _head(client: S3Client) -> object:
    return client.head_object(Bucket="faulty", Key="a")["ETag"]


def _listed(client: S3Client) -> object:
    answer = client.list_objects_v2(Bucket="faulty")
    return answer["IsTruncated"], [item["Key"] for item in answer["Contents"]]


FOLLOWED = {"slow body", "slow head", "request timeout", "temporary redirect", "permanent redirect", "expired token"}
"""What takes a client time or more requests, and may go well in the end."""
HANGING = {"stall", "stall in the body", "slow body"}
"""What keeps a client waiting."""


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"slow head"}))
def test_each_fault_can_be_told_and_only_while_it_is_asked_for(
    fault: str, through: FaultyS3, client: S3Client, hasty: S3Client, right: list[object]
) -> None:
    before = through.injected()[fault]
    through.inject(Plan(faults=[fault], first=1))
    wrong = seen(hasty if fault in HANGING else client)
    counted = through.injected()[fault] - before
    again = seen(client)
    through.heal()

    assert counted == len(FAULTS[fault].kinds) or fault in FOLLOWED
    assert sum(one != other for one, other in zip(wrong, right, strict=True)) == counted or fault in FOLLOWED
    assert again == right


def test_what_is_drawn_depends_on_the_seed_alone(through: FaultyS3, client: S3Client) -> None:
    def drawn(seed: int) -> list[bool]:
        through.inject(Plan(faults=["slow down"], share=0.5, seed=seed))
        found = [seen(client)[1] is ClientError for _ in range(20)]
        through.heal()
        return found

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert 0 < sum(first) < 20
