"""What `xattn-video prefill` says where nothing ran sparse, memory is short or a file is wrong."""

import json
import sys

import pytest
import torch
from command_line import run_cli
from language_models import tiny_model

from xattn_video.errors import FileNotWrittenError
from xattn_video.language.kv_memory import describe_prefill_shortage, plan_prefill
from xattn_video.language.long_prompt import PrefillRun
from xattn_video.language.model_sources import find_language_model
from xattn_video.pipelines.memory import Room

RANDOM = ["--model=random:tiny", "--device=cpu"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tokens=300"], "(too few tokens, decode); use a longer prompt, or --min-tokens 0 to"),
        (
            ["--tokens=300", "--min-tokens=0", "--chunk-size=100"],
            "(short chunk, decode); use chunks of at least a block, 128 tokens.",
        ),
        (
            ["--tokens=100", "--min-tokens=0"],
            "(short chunk, decode); use a prompt of at least a block, 128 tokens.",
        ),
        # The second chunk has 44 tokens, and longer chunks would not help.
        (
            ["--tokens=300", "--min-tokens=280", "--chunk-size=256"],
            "(too few tokens, short chunk, decode); use a longer prompt, or --min-tokens 0 to",
        ),
        (
            ["--tokens=300", "--min-tokens=0", "--threshold=1"],
            "(threshold 1, decode); use a threshold below 1.",
        ),
        (
            ["--tokens=300", "--min-tokens=0", "--density=1"],
            "(density 1, decode); use a density below 1.",
        ),
    ],
)
def test_the_remedy_fits_the_reason(options, text):
    code, _, err = run_cli("prefill", *RANDOM, *options, "-q")
    assert code == 0, err
    assert f"warning: Nothing ran sparse {text}" in err


@pytest.mark.parametrize(
    ("kinds", "options", "text"),
    [
        (["sliding_attention"] * 2, [], "every layer of this model sees a limited number of"),
        (["sliding_attention", "full_attention"], [], "use a longer prompt, or --min-tokens 0"),
        (
            ["full_attention", "sliding_attention"],
            ["--min-tokens=0", "--dense-layers=1"],
            "use fewer --dense-layers: the other layers cannot run sparse.",
        ),
    ],
)
def test_the_remedy_is_for_layers_that_can_run_sparse(kinds, options, text, tmp_path, monkeypatch):
    config = tiny_model("gemma3").config
    config.layer_types = kinds
    config.save_pretrained(tmp_path)
    source = find_language_model(str(tmp_path), 0)
    # Its weights do not matter.
    named = find_language_model("random:tiny", 400)
    object.__setattr__(named, "config", source.config)
    monkeypatch.setattr(
        "xattn_video.cli.prefill_job.find_language_model", lambda name, tokens: named
    )
    code, _, err = run_cli("prefill", *RANDOM, "--tokens=300", "-q", *options)
    assert code == 0, err
    assert text in err


@pytest.mark.parametrize(("words", "times"), [(["--plan"], 1), (["--force"], 1), ([], 1)])
def test_a_shortage_is_told_once(words, times, monkeypatch):
    monkeypatch.setattr("xattn_video.cli.prefill_job.find_room", lambda load: Room(None, 0.001))
    code, out, err = run_cli("prefill", *RANDOM, "--tokens=640", *words)
    assert code == (0 if words else 2), err
    assert (out + err).count("tokens need about") == times


def test_a_smaller_dtype_is_advised_where_it_fits():
    source = find_language_model("random:smollm2-135m", 2**13)
    plan = plan_prefill(source, 2**13, 8, 1024, torch.float32, 128)
    assert "or --dtype bfloat16," in describe_prefill_shortage(plan, plan.peak / 2)
    assert "bfloat16" not in describe_prefill_shortage(plan, plan.weights / 4)


def test_a_smaller_chunk_is_advised_where_the_prompt_is_longer():
    """With 4,096 tokens, chunks of 16,384 need what chunks of 32,768 need."""
    source = find_language_model("random:smollm2-135m", 2**13)
    plan = plan_prefill(source, 2**12, 8, 32768, torch.float32, 128)
    half = plan.weights + plan.kv_cache + plan.work / 2
    assert describe_prefill_shortage(plan, half).endswith("; --chunk-size 2048 would fit.")


def test_the_divergence_of_equal_distributions_is_not_negative():
    ours, theirs = (
        PrefillRun((1.0,), 0.0, None, (0,), torch.tensor(values), None)
        for values in ([0.0, 0.1, 0.2], [0.0, 0.1, 0.2000001])
    )
    found = [ours.divergence_from(theirs), theirs.divergence_from(ours)]
    torch.manual_seed(0)
    for _ in range(50):
        logits = torch.randn(1000)
        near = logits + 1e-7 * torch.randn(1000)
        first, second = (
            PrefillRun((1.0,), 0.0, None, (0,), values, None) for values in (logits, near)
        )
        found.append(first.divergence_from(second))
    assert min(found) == 0
    assert max(found) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (
            {"points": [[0, 0.9], [5, 0.8]]},
            "points must be one point at step 0, since a language model has no denoising steps, "
            "got [[0, 0.9], [5, 0.8]]; write [[0, 0.9]].",
        ),
        ({"points": [[3, 0.9]]}, "points must be one point at step 0, since"),
        (
            {"points": [[0, 0.9]], "layers": {"1": [[2, 0.7]]}},
            "layers.1 must be one point at step 0, since a language model has no denoising steps, "
            "got [[2, 0.7]]; write [[0, 0.7]].",
        ),
        (
            {"points": [[0, 0.9]], "heads": {"1": {"3": [[0, 0.7], [1, 0.8]]}}},
            "heads.1.3 must be one point at step 0",
        ),
    ],
)
def test_a_schedule_has_one_point_at_step_0(schedule, text, tmp_path):
    file = tmp_path / "taus.json"
    file.write_text(json.dumps(schedule))
    code, _, err = run_cli("prefill", *RANDOM, "--tokens=300", f"--schedule={file}")
    assert code == 2
    assert err.startswith(f"error: {file}: {text}")
    assert err.count("\n") == 1


def test_json_is_printed_where_the_report_cannot_be_written(monkeypatch, tmp_path):
    def fail(path, content):
        raise FileNotWrittenError(path, "File too large")

    # Its module: the name in xattn_video.cli is the function.
    monkeypatch.setattr(sys.modules["xattn_video.cli.prefill"], "write_json", fail)
    words = [*RANDOM, "--tokens=300", "--json", f"--report={tmp_path / 'run.json'}"]
    code, out, err = run_cli("prefill", *words)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: cannot write ")
    assert "report" not in json.loads(out)
