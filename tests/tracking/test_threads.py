from __future__ import annotations

import threading
from typing import Any

import pytest

from ssam_scale.tracking.threads import MetricWriter


def test_sends_everything_in_order_in_batches_that_the_store_takes() -> None:
    batches: list[list[Any]] = []
    writer = MetricWriter(batches.append, lambda error: False)
    for start in range(0, 2500, 500):
        writer.put(list(range(start, start + 500)))
    assert writer.close(30) == 0
    assert [value for batch in batches for value in batch] == list(range(2500))
    assert max(map(len, batches)) <= 1000


def test_put_does_not_wait_for_the_store() -> None:
    release = threading.Event()

    def send(batch: list[int]) -> None:
        release.wait(60)

    writer = MetricWriter(send, lambda error: False)
    writer.put([1])
    writer.put([2])  # would never return if it waited: nobody has released the store
    assert writer.close(0.05) > 0
    release.set()


def test_an_outage_loses_nothing_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[int] = []
    failures = iter([True, True])

    def send(batch: list[int]) -> None:
        if next(failures, False):
            raise ConnectionError("refused\nand a long story")
        sent.extend(batch)

    writer = MetricWriter(send, lambda error: False)
    writer.put([1, 2, 3])
    assert writer.close(30) == 0
    assert sent == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "tracking store does not answer, metrics wait: refused"
    ]


def test_what_the_store_refuses_for_good_is_dropped_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[str] = []

    first = threading.Event()

    def send(batch: list[str]) -> None:
        if "bad" in batch:
            raise ValueError("no such run")
        sent.extend(batch)
        first.set()

    writer = MetricWriter(send, lambda error: isinstance(error, ValueError))
    writer.put(["good"])
    assert first.wait(30)
    writer.put(["bad"])
    assert writer.close(30) == 0
    assert sent == ["good"]
    assert "refuses 1 metrics: no such run" in caplog.text


def test_closing_over_a_dead_store_gives_up_and_counts() -> None:
    def send(batch: list[int]) -> None:
        raise ConnectionError("gone")

    writer = MetricWriter(send, lambda error: False)
    writer.put([1, 2, 3])
    assert writer.close(0.3) == 3
