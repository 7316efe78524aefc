"""Kept mass against plain loops, and the processor that measures it."""

from dataclasses import replace

import pytest
import torch

from xattn_video.measure.comparison import generate_for_kept_mass
from xattn_video.pipelines.generation import generate
from xattn_video.pipelines.loading import LoadOptions, load_pipeline
from xattn_video.pipelines.request import GenerationRequest, VideoSettings
from xattn_video.policy.settings import SparseSettings
from xattn_video.processors.observers import kept_mass

SMALL = VideoSettings(height=64, width=64, num_frames=9, num_inference_steps=3)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    pipe = load_pipeline(LoadOptions(str(tiny_pipeline), torch.float32, "cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(threshold: float, prompt: str = "a red circle") -> GenerationRequest:
    sparse = SparseSettings(threshold, block_size=16, warmup_steps=1, min_tokens=0)
    return GenerationRequest(prompt, video=SMALL, sparse=sparse)


def test_it_is_the_softmax_mass_of_the_kept_blocks():
    query, key = torch.randn(2, 2, 40, 3, 8)
    lengths, rows = torch.tensor([40, 37]), torch.tensor([0, 21, 39])
    block_mask = torch.rand(2, 3, 3, 3) < 0.5
    found = kept_mass(query, key, block_mask, lengths, rows, block_size=16)
    for item in range(2):
        for head in range(3):
            for number, row in enumerate(rows.tolist()):
                valid = int(lengths[item])
                logits = key[item, :valid, head].double() @ query[item, row, head].double()
                weights = (logits * 8**-0.5).softmax(dim=0)
                expected = sum(
                    float(weights[column])
                    for column in range(valid)
                    if block_mask[item, head, row // 16, column // 16]
                )
                assert float(found[item, head, number]) == pytest.approx(expected, abs=1e-5)


def test_it_grows_with_the_threshold(pipe):
    low, high = (generate_for_kept_mass(pipe, [request(tau)]) for tau in (0.3, 0.9))
    assert 0 < low[0] < high[0] < 1 + 1e-6


def test_every_video_of_a_batch_has_its_own(pipe):
    together = [request(0.5), request(0.5, "a green square and a white ring, moving left")]
    masses = generate_for_kept_mass(pipe, together)
    assert len(masses) == 2
    assert masses[0] != masses[1]
    # Rows are drawn at random, so they agree only nearly.
    assert masses[0] == pytest.approx(generate_for_kept_mass(pipe, together[:1])[0], abs=1e-3)


def test_nothing_sparse_has_none_and_the_pipeline_is_as_before(pipe):
    before = dict(pipe.transformer.attn_processors)
    assert generate_for_kept_mass(pipe, [request(1.0)]) is None
    assert dict(pipe.transformer.attn_processors) == before


def test_measuring_changes_no_video(pipe):
    shown = []
    plain = generate(pipe, request(0.5))
    generate_for_kept_mass(pipe, [request(0.5)], shown.append)
    assert [step.sparse for step in shown] == [step.sparse for step in plain.steps]


def test_it_asks_no_more_of_a_backend_than_the_generation_does(pipe, monkeypatch):
    from xattn_video.backends import torch_gather

    monkeypatch.setattr(
        torch_gather,
        "unsupported_reasons",
        lambda problem: ["one key length for all; use another."] if problem.ragged else [],
    )
    wanted = request(0.5)
    wanted = replace(wanted, sparse=replace(wanted.sparse, backend="torch_gather"))
    (mass,) = generate_for_kept_mass(pipe, [wanted])
    assert 0 < mass < 1
