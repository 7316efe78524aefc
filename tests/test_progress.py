"""What is shown while a job runs, and the time left of all of it."""

import io
import re

import pytest
from rich.console import Console

from xattn_video.pipelines.expected_work import ExpectedWork
from xattn_video.pipelines.generation import StepRecord
from xattn_video.pipelines.model_shape import read_model_shape
from xattn_video.pipelines.request import DEMO_SETTINGS, GenerationRequest
from xattn_video.pipelines.source import DEMO, find_model
from xattn_video.policy.settings import SparseSettings
from xattn_video.reporting.progress import JobProgress, TimeLeft

VIDEO = {"text": 1, "dense": 1, "sparse": 2, "decoding": 1, "writing": 1}


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def left(clock):
    return TimeLeft(decoding_steps=3.0, clock=clock)


def job_of(left, runs):
    job = JobProgress(Console(file=io.StringIO()), left)
    job.expect(runs)
    return job


def generate_one(job, clock, dense=4.0, sparse=2.0, decoding=10.0, writing=5.0):
    """Two seconds of text, three steps, decoding and writing."""
    with job.run("a red circle", VIDEO) as on_step:
        clock.now += 2 + dense
        on_step(StepRecord(0, 3, dense, False, None))
        for index in (1, 2):
            clock.now += sparse
            on_step(StepRecord(index, 3, sparse, True, 0.4))
        clock.now += decoding
    clock.now += writing
    job._end_writing()


def test_nothing_is_promised_before_a_step_was_measured(left):
    assert job_of(left, [VIDEO]).describe() == ""


def test_the_first_video_counts_its_decoding_by_a_guess_and_says_that_writing_is_unknown(
    left, clock
):
    job = job_of(left, [VIDEO])
    with job.run("a red circle", VIDEO) as on_step:
        clock.now += 6
        on_step(StepRecord(0, 3, 4.0, False, None))
        # Two steps as long as the dense one, and three more for decoding.
        assert left.seconds() == pytest.approx(2 * 4 + 3 * 4)
        assert job.describe() == "over 0:00:20 left"


def test_after_one_video_the_rest_of_the_job_is_measured(left, clock):
    job = job_of(left, [VIDEO] * 3)
    generate_one(job, clock)
    assert left.seconds() == pytest.approx(2 * (2 + 4 + 2 * 2 + 10 + 5))
    assert job.describe() == "about 0:00:50 left"
    generate_one(job, clock)
    assert left.seconds() == pytest.approx(25)
    generate_one(job, clock)
    assert left.seconds() == 0


def test_the_time_left_falls_while_a_video_is_decoded_and_never_reaches_zero(left, clock):
    job = job_of(left, [VIDEO] * 2)
    generate_one(job, clock)
    with job.run("a red circle", VIDEO) as on_step:
        clock.now += 6
        on_step(StepRecord(0, 3, 4.0, False, None))
        for index in (1, 2):
            clock.now += 2
            on_step(StepRecord(index, 3, 2.0, True, 0.4))
        seen = []
        for _ in range(4):
            seen.append(left.seconds())
            clock.now += 5
    # Ten seconds of decoding and five of writing; ten more than expected leave a tenth of them.
    assert seen == pytest.approx([15, 10, 5 + 1, 5 + 1.5])


def test_a_run_that_fails_takes_its_work_along(left, clock):
    job = job_of(left, [VIDEO] * 2)

    def run_out_of_memory():
        with job.run("a red circle", VIDEO) as on_step:
            clock.now += 6
            on_step(StepRecord(0, 3, 4.0, False, None))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run_out_of_memory()
    # Of the second: text, three steps, decoding by the guess.
    assert left.seconds() == pytest.approx(2 + 3 * 4 + 3 * 4)


def test_videos_made_together_share_the_time_of_a_step(left, clock):
    batch = {kind: 4.0 * count for kind, count in VIDEO.items()}
    job = job_of(left, [batch, VIDEO])
    with job.run("four", batch, 4) as on_step:
        clock.now += 8
        on_step(StepRecord(0, 3, 8.0, False, None))
        # Eleven steps of two seconds each, and five videos to decode.
        assert left.seconds() == pytest.approx(11 * 2 + 5 * 3 * 2)


def test_steps_of_another_kind_than_expected_leave_nothing_behind(left, clock):
    job = job_of(left, [VIDEO])
    with job.run("a red circle", VIDEO) as on_step:
        for index in range(3):
            clock.now += 1
            on_step(StepRecord(index, 3, 1.0, False, None))
    clock.now += 1
    job._end_writing()
    assert left.seconds() == 0


def test_the_expected_steps_are_those_of_the_plan():
    work = ExpectedWork(read_model_shape(find_model(DEMO)), "cpu", {})
    sparse = SparseSettings(min_tokens=0, warmup_steps=5, refresh_every=4)
    units = work.of_run(GenerationRequest("x", video=DEMO_SETTINGS, sparse=sparse), videos=2)
    assert units == {"text": 2, "dense": 10, "refresh": 10, "sparse": 30, "decoding": 2}
    measuring = work.of_run(
        GenerationRequest("x", video=DEMO_SETTINGS, sparse=sparse), kept_mass=True
    )
    assert measuring["sparse, kept mass"] == 15
    dense = work.of_run(GenerationRequest("x", video=DEMO_SETTINGS, sparse=None))
    assert dense == {"text": 1, "dense": 25, "decoding": 1}


def test_decoding_is_guessed_from_arithmetic():
    source = find_model(DEMO)
    work = ExpectedWork(read_model_shape(source), "cpu", source.read_json("vae/config.json"))
    assert 1 < work.decoding_steps(DEMO_SETTINGS) < 50


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_step_phase_density_and_times(width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, no_color=True, width=width)
    steps = [StepRecord(0, 25, 1.5, False, None), StepRecord(1, 25, 1.0, True, 0.41)]
    title = "a red circle moving left to right over a blue b..."
    with JobProgress(console, TimeLeft(2.0)).running() as job:
        units = {"text": 1, "dense": 1, "sparse": 24, "decoding": 1}
        job.expect([units])
        with job.run(title, units) as progress:
            for step in steps:
                progress(step)
            job._progress.refresh()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    assert lines[0] == title
    # 23 steps of the one sparse second, and decoding for two dense steps of 1.5 seconds.
    bar = r" step 2/25 sparse, density 0\.41 0:00:00 about 0:00:26 left\s*$"
    assert any(re.search(bar, line) for line in lines), lines


def test_a_refresh_is_shown_as_one():
    screen = io.StringIO()
    job = JobProgress(Console(file=screen))
    units = {"text": 1, "refresh": 1, "sparse": 1}
    job.expect([units])
    with job.run("a red circle", units) as progress:
        progress(StepRecord(0, 2, 2.0, True, 0.41, refreshed=True))
        progress(StepRecord(1, 2, 1.0, True, 0.41))
    assert screen.getvalue().splitlines()[1:] == [
        "  step 1/2  refresh  2.00 s  about 0:00:02 left",
        "  step 2/2  sparse, density 0.41  1.00 s  about 0:00:00 left",
    ]
