"""The pool of buffers: nothing is lost or written twice, and any call may be cut short."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from crtrace.capture.pipeline import Fill, Job, Pipeline
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


def numbered(number: int, buffer: Bytes) -> Job:
    """One page; its contents are its number."""
    buffer[:PAGE_SIZE] = number
    return Job(1, np.array([[number, number + 1]], dtype=np.uint64), buffer, 0)


def copy(pipeline: Pipeline, count: int) -> None:
    """So many numbered pages through the pipeline."""
    pipeline.copy(partial(numbered, number) for number in range(count))


def image(recorder: Recorder) -> ImageWriter:
    return cast(ImageWriter, recorder)


def test_every_page_arrives_with_its_own_contents(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        copy(pipeline, 200)
        assert sorted(recorder.seen) == [(n, n) for n in range(200)]


def test_held_jobs_wait_for_the_release(pipeline: Pipeline) -> None:
    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        pipeline.hold()
        copy(pipeline, BUFFERS)
        assert recorder.seen == []
        assert not pipeline.release()
        pipeline.wait_idle()
        assert len(recorder.seen) == BUFFERS


def test_what_is_held_is_read_by_the_caller_even_after_the_buffers_ran_out(
    pipeline: Pipeline,
) -> None:
    """It may hold the target only as long as the call lasts."""
    recorder = Recorder()
    readers = []

    def read(number: int, buffer: Bytes) -> Job:
        readers.append(threading.current_thread())
        return numbered(number, buffer)

    with pipeline.writing(image(recorder)):
        pipeline.hold()
        pipeline.copy(partial(read, number) for number in range(3 * BUFFERS))
        assert readers == [threading.current_thread()] * 3 * BUFFERS
        assert pipeline.release()
        pipeline.wait_idle()
        assert sorted(recorder.seen) == [(n, n) for n in range(3 * BUFFERS)]
        assert not pipeline.release()


@pytest.mark.parametrize("held", [False, True])
def test_a_worker_s_failure_is_raised_by_who_waits(pipeline: Pipeline, held: bool) -> None:
    recorder = Recorder()
    recorder.failure = OSError(28, "made to fail")
    with pytest.raises(OSError, match="made to fail"), pipeline.writing(image(recorder)):
        if held:
            pipeline.hold()
        copy(pipeline, 100)
        pipeline.wait_idle()
    after = Recorder()
    with pipeline.writing(image(after)):
        copy(pipeline, 20)
    assert len(after.seen) == 20


@pytest.mark.parametrize("held", [False, True])
def test_a_reader_s_failure_costs_only_what_it_reads(pipeline: Pipeline, held: bool) -> None:
    """One process of a tree may end while the others are copied."""

    def fail(buffer: Bytes) -> Job:
        raise ProcessLookupError("made to fail")

    def fills() -> Iterator[Fill]:
        for number in range(BUFFERS // 2):
            yield partial(numbered, number)
        yield fail

    recorder = Recorder()
    with pipeline.writing(image(recorder)):
        if held:
            pipeline.hold()
        for _ in range(3):
            with pytest.raises(ProcessLookupError):
                pipeline.copy(fills())
        pipeline.release()
        copy(pipeline, 20)
        pipeline.wait_idle()
        assert len(recorder.seen) >= 20


def test_who_says_what_is_to_be_read_may_fail() -> None:
    """Of one worker: with more, what another has in hand may go with the failure."""

    def fills() -> Iterator[Fill]:
        yield partial(numbered, 1)
        raise BrokenPipeError("made to fail")

    recorder = Recorder()
    alone = Pipeline(buffers=BUFFERS, workers=1)
    with closing(alone), alone.writing(image(recorder)):
        with pytest.raises(BrokenPipeError):
            alone.copy(fills())
        copy(alone, 20)
    assert len(recorder.seen) == 21


@pytest.mark.parametrize("held", [False, True])
def test_what_is_cut_short_leaves_the_pool_whole(pipeline: Pipeline, held: bool) -> None:
    recorder = Recorder()

    def fills() -> Iterator[Fill]:
        for number in range(BUFFERS - 1):
            yield partial(numbered, number)
        raise KeyboardInterrupt  # with a buffer in hand

    with pytest.raises(KeyboardInterrupt), pipeline.writing(image(recorder)):
        if held:
            pipeline.hold()
        pipeline.copy(fills())
    done = len(recorder.seen)
    after = Recorder()
    with pipeline.writing(image(after)):
        copy(pipeline, 3 * BUFFERS)
    assert len(after.seen) == 3 * BUFFERS
    assert len(recorder.seen) == done, "nothing is written to an image that was left"


def test_more_workers_than_buffers_do_no_harm() -> None:
    crowd = Pipeline(buffers=2, workers=6)
    recorder = Recorder()
    with closing(crowd), crowd.writing(image(recorder)):
        copy(crowd, 200)
    assert sorted(recorder.seen) == [(n, n) for n in range(200)]
