"""The pool of buffers: nothing is lost or written twice, and any call may be cut short."""

from __future__ import annotations

import threading
from typing import Any, cast

import numpy as np
import pytest

from crtrace.capture.pipeline import Job, Pipeline
from crtrace.image.imagewriter import ImageWriter
from crtrace.units import PAGE_SIZE, U64, Bytes

BUFFERS = 4


class Recorder:
    """Takes pages where an image would, and can be made to wait or fail."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.failure: Exception | None = None
        self._lock = threading.Lock()

    def write_pages(self, space: int, pages: U64, data: Bytes, *, round: int) -> None:
        self.may_go.wait(10)
        if self.failure:
            raise self.failure
        with self._lock:
            self.seen.append((int(pages[0]), int(data[0, 0])))


@pytest.fixture
def pipeline() -> Any:
    """A small pool with two workers."""
    made = Pipeline(buffers=BUFFERS, workers=2)
    yield made
    made.close()


def fill(pipeline: Pipeline, number: int) -> None:
    """One page through the pipeline; its contents are its number."""
    buffer = pipeline.buffer()
    buffer[:PAGE_SIZE] = number
    pipeline.submit(Job(1, np.array([number], dtype=np.uint64), buffer, 0))


def image(recorder: Recorder) -> ImageWriter:
    return cast(ImageWriter, recorder)


def test_every_page_arrives_with_its_own_contents(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        for number in range(200):
            fill(pipeline, number)
        pipeline.wait_idle()
        assert sorted(recorder.seen) == [(n, n) for n in range(200)]


def test_held_jobs_wait_for_the_release(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        pipeline.hold()
        for number in range(BUFFERS):
            fill(pipeline, number)
        assert recorder.seen == []
        assert not pipeline.release()
        pipeline.wait_idle()
        assert len(recorder.seen) == BUFFERS


def test_workers_are_woken_when_held_buffers_run_out(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        pipeline.hold()
        for number in range(3 * BUFFERS):
            fill(pipeline, number)
        assert pipeline.release()
        pipeline.wait_idle()
        assert sorted(recorder.seen) == [(n, n) for n in range(3 * BUFFERS)]


def test_a_worker_s_failure_is_raised_where_the_reader_asks_next(pipeline: Pipeline) -> None:
    recorder = Recorder()
    recorder.failure = OSError(28, "made to fail")
    with pytest.raises(OSError, match="made to fail"), pipeline.writing(image(recorder)):
        for number in range(100):
            fill(pipeline, number)
        pipeline.wait_idle()
    after = Recorder()
    with pipeline.writing(image(after)):
        for number in range(20):
            fill(pipeline, number)
        pipeline.wait_idle()
    assert len(after.seen) == 20


def test_what_is_cut_short_leaves_the_pool_whole(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), pipeline.writing(image(recorder)):
        recorder.may_go.clear()
        for number in range(BUFFERS - 1):
            fill(pipeline, number)
        pipeline.buffer()  # in hand, and lost
        recorder.may_go.set()
        raise KeyboardInterrupt
    done = len(recorder.seen)
    after = Recorder()
    with pipeline.writing(image(after)):
        for number in range(3 * BUFFERS):
            fill(pipeline, number)
        pipeline.wait_idle()
    assert len(after.seen) == 3 * BUFFERS
    assert len(recorder.seen) == done, "nothing is written to an image that was left"
