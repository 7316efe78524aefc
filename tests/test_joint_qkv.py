import pytest
import torch
from diffusers.models.normalization import RMSNorm
from hunyuan import (
    HEAD_DIM,
    HEADS,
    NUM_LAYERS,
    TEXT_TOKENS,
    VIDEO_TOKENS,
    forward_inputs,
    generate,
    run,
    states,
    tiny_pipeline,
    tiny_transformer,
    with_processor,
)
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

pytest.importorskip("triton")

from xattn_video.kernels import qk_norm_rope as kernel
from xattn_video.kernels import support
from xattn_video.processors import session
from xattn_video.processors.families.hunyuan_video_attention import (
    can_fuse,
    join,
    prepare_eagerly,
    prepare_fused,
)
from xattn_video.processors.layout import TokenLayout

DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"


@pytest.fixture
def launches(monkeypatch):
    """The kernel allowed on the CPU too; what it returned, a list for each launch."""
    found = []
    launch = kernel.qk_norm_rope

    def spy(*arguments):
        found.append(launch(*arguments))
        return found[-1]

    monkeypatch.setattr(kernel, "qk_norm_rope", spy)
    monkeypatch.setattr(session, "kernel_runs_on", lambda device: True)
    return found


def layer_inputs(name, dtype=torch.float32, B=2):
    """A layer and the arguments of what prepares its queries, keys and values."""
    attn = tiny_transformer().to(dtype).get_submodule(name)
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        if norm is not None:
            norm.weight.data.normal_()
    tokens = VIDEO_TOKENS + (TEXT_TOKENS if name == SINGLE else 0)
    video = tuple(torch.randn(B, tokens, HEADS, HEAD_DIM).to(dtype) for _ in range(3))
    text = torch.randn(B, TEXT_TOKENS, HEADS * HEAD_DIM).to(dtype)
    angles = torch.randn(VIDEO_TOKENS, HEAD_DIM // 2).repeat_interleave(2, dim=1)
    return attn, video, text, (angles.cos(), angles.sin())


# Video and text in one tensor


def test_slices_of_a_joint_tensor_are_joined_without_a_copy():
    joint = torch.randn(2, 7, 3)
    with torch.no_grad():
        joined = join(joint[:, :-2], joint[:, -2:])
    assert torch.equal(joined, joint)
    assert joined.stride() == joint.stride()
    assert joined.data_ptr() == joint.data_ptr()


@pytest.mark.parametrize(
    ("video", "text"),
    [
        pytest.param(slice(0, 4), slice(5, 7), id="apart"),
        pytest.param(slice(4, 7), slice(0, 4), id="the other way round"),
        pytest.param(slice(0, 4), slice(3, 7), id="overlapping"),
        pytest.param(slice(0, 4), slice(4, 7, 2), id="with gaps"),
    ],
)
def test_other_slices_are_joined_with_a_copy(video, text):
    joint = torch.randn(2, 7, 3)
    video, text = joint[:, video], joint[:, text]
    with torch.no_grad():
        assert torch.equal(join(video, text), torch.cat([video, text], dim=1))
        assert torch.equal(join(video, text + 1), torch.cat([video, text + 1], dim=1))


def test_slices_that_need_gradients_are_joined_with_a_copy():
    joint = torch.randn(2, 7, 3, requires_grad=True)
    join(joint[:, :-2], joint[:, -2:]).sum().backward()
    assert torch.equal(joint.grad, torch.ones(2, 7, 3))


def test_a_single_stream_layer_projects_what_its_block_normalised():
    normalised, projected = [], []
    transformer, _ = with_processor(1.0)
    attn = transformer.get_submodule(SINGLE)
    attn.to_q.register_forward_pre_hook(lambda _, args: projected.append(args[0].data_ptr()))
    block = transformer.get_submodule("single_transformer_blocks.0")
    block.norm.register_forward_hook(lambda *call: normalised.append(call[2][0].data_ptr()))
    run(transformer)
    assert projected == normalised


# What the kernel gives


@pytest.mark.parametrize("name", [DOUBLE, SINGLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_and_eager_agree(name, dtype):
    arguments = layer_inputs(name, dtype)
    assert can_fuse(*arguments)
    for fused, eager in zip(prepare_fused(*arguments), prepare_eagerly(*arguments), strict=True):
        torch.testing.assert_close(fused, eager)


def test_a_single_stream_layer_copies_no_values():
    arguments = layer_inputs(SINGLE)
    assert prepare_fused(*arguments)[2] is arguments[1][2]


@pytest.mark.parametrize("image_condition_type", [None, "token_replace", "latent_concat"])
@pytest.mark.parametrize("lengths", [(10,), (10, 3)])
def test_a_dense_step_gives_what_the_stock_processor_gives(
    image_condition_type, lengths, launches
):
    def model():
        return tiny_transformer(image_condition_type=image_condition_type)

    expected = run(model(), lengths=lengths)
    transformer, _ = with_processor(1.0, model())
    torch.testing.assert_close(run(transformer, lengths=lengths), expected, rtol=1e-5, atol=1e-5)
    # Both stacks have two layers; values are joined in the first alone.
    assert [len(tensors) for tensors in launches] == [3, 3, 2, 2]


def test_a_sparse_step_gives_what_it_gave_without_the_kernel(launches, monkeypatch):
    transformer, processor = with_processor(0.9)
    found = run(transformer, lengths=(10, 3))
    assert len(launches) == NUM_LAYERS
    assert states(processor.report()) == ["sparse"]
    monkeypatch.setattr(session, "kernel_runs_on", lambda device: False)
    torch.testing.assert_close(run(transformer, lengths=(10, 3)), found, rtol=1e-5, atol=1e-5)
    assert len(launches) == NUM_LAYERS


@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernel_brings_tokens_into_their_order(compiled, launches, monkeypatch):
    transformer, processor = with_processor(None, density=0.5, token_order="hilbert")
    if compiled:
        torch.compiler.reset()
        transformer.compile(backend="eager", fullgraph=True)
    else:
        monkeypatch.setattr(TokenLayout, "to_canonical", None)
    found = run(transformer, lengths=(10, 3))
    assert states(processor.report()) == ["sparse"]
    # Of an order, the graph of a compiled model knows nothing.
    assert [len(tensors) for tensors in launches] == ([3, 3, 2, 2] if compiled else [3] * 4)
    monkeypatch.undo()
    transformer, _ = with_processor(None, density=0.5, token_order="hilbert")
    torch.testing.assert_close(run(transformer, lengths=(10, 3)), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("compiled", "num_graphs"),
    # As many as without the kernel: test_processor_steps.py.
    [("transformer", 1), pytest.param("blocks", 5, marks=pytest.mark.slow)],
)
def test_a_compiled_transformer_has_no_graph_break(compiled, num_graphs, launches):
    torch.compiler.reset()
    counters.clear()
    pipe = tiny_pipeline()
    transformer, _ = with_processor([1.0, 0.9], pipe.transformer)
    expected = generate(pipe, 2)
    launches.clear()
    backend = CompileCounter()
    if compiled == "transformer":
        transformer.compile(backend=backend, fullgraph=True)
    else:
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    torch.testing.assert_close(generate(pipe, 2), expected)
    assert len(launches) == 2 * NUM_LAYERS
    assert backend.frame_count == num_graphs
    assert not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.slow
def test_inductor_runs_it(launches):
    torch.compiler.reset()
    pipe = tiny_pipeline()
    transformer, _ = with_processor([1.0, 0.9], pipe.transformer)
    expected = generate(pipe, 2)
    launches.clear()
    transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(generate(pipe, 2), expected, rtol=1e-4, atol=1e-4)
    assert len(launches) == 2 * NUM_LAYERS
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(10,), (10, 3)])
def test_a_step_on_the_gpu_is_no_further_from_float32_than_an_eager_one(lengths, monkeypatch):
    config = {"attention_head_dim": 64, "rope_axes_dim": (16, 24, 24)}
    arguments = forward_inputs(lengths=lengths, size=32, dtype=torch.bfloat16)
    arguments = {name: value.cuda() for name, value in arguments.items()}
    exact = tiny_transformer(**config).cuda().bfloat16().float()
    transformer, _ = with_processor(1.0, tiny_transformer(**config).to("cuda", torch.bfloat16))
    with torch.no_grad():
        fused = transformer(**arguments).sample
        monkeypatch.setattr(session, "kernel_runs_on", lambda device: False)
        eager = transformer(**arguments).sample
        single = {n: v.float() if v.is_floating_point() else v for n, v in arguments.items()}
        expected = exact(**single).sample
    assert (fused - expected).norm() <= 1.1 * (eager - expected).norm()


# Where it is not used


def test_the_cpu_and_a_gpu_that_is_not_there_run_eagerly(monkeypatch):
    assert not session.kernel_runs_on(torch.device("cpu"))
    monkeypatch.setattr(support, "INTERPRETING", False)
    assert session.kernel_runs_on(torch.device("cuda")) == torch.cuda.is_available()


def hook(attn):
    attn.norm_q.register_forward_hook(lambda *_: None)


def pre_hook(attn):
    attn.norm_added_k.register_forward_pre_hook(lambda *_: None)


def offloaded(attn):
    """As accelerate and Diffusers do it: another forward that moves the weight first."""
    attn.norm_k.forward = attn.norm_k.forward


def other_norm(attn):
    attn.norm_k = torch.nn.LayerNorm(HEAD_DIM)


def derived_norm(attn):
    attn.norm_k.__class__ = type("Scaled", (RMSNorm,), {})


def no_norm(attn):
    attn.norm_q = None


def no_weight(attn):
    attn.norm_added_q = RMSNorm(HEAD_DIM, 1e-6, elementwise_affine=False)


def bias(attn):
    attn.norm_added_q = RMSNorm(HEAD_DIM, 1e-6, bias=True)


def another_eps(attn):
    attn.norm_k.eps = 1e-5


def another_dtype(attn):
    attn.norm_q.half()


def another_device(attn):
    attn.norm_q.to("meta")


@pytest.mark.parametrize(
    "change",
    [
        hook,
        pre_hook,
        offloaded,
        other_norm,
        derived_norm,
        no_norm,
        no_weight,
        bias,
        another_eps,
        another_dtype,
        another_device,
    ],
)
def test_norms_that_are_more_than_their_weight_run_eagerly(change):
    arguments = layer_inputs(DOUBLE)
    assert can_fuse(*arguments)
    change(arguments[0])
    with torch.no_grad():
        assert not can_fuse(*arguments)


def test_inputs_that_the_kernel_does_not_know_run_eagerly():
    attn, video, text, rope = layer_inputs(SINGLE)
    assert can_fuse(attn, video, text, rope)
    double = tuple(tensor.double() for tensor in video)
    assert not can_fuse(attn, double, text, rope)
    assert not can_fuse(attn, (video[0].half(), *video[1:]), text, rope)
    assert not can_fuse(attn, (video[0], video[1][:, :, :1], video[2]), text, rope)
    assert not can_fuse(attn, video, text, (rope[0].half(), rope[1].half()))
    assert not can_fuse(attn, video, text, (rope[0][:, :8], rope[1][:, :8]))
    narrow = tuple(tensor[..., :8] for tensor in video)
    assert not can_fuse(attn, narrow, text, (rope[0][:, :8], rope[1][:, :8]))


@pytest.mark.parametrize("needing", ["weights", "video", "text"])
def test_gradients_run_eagerly(needing):
    attn, video, text, rope = layer_inputs(DOUBLE)
    if needing == "weights":
        attn.add_k_proj.requires_grad_(True)
    else:
        {"video": video[2], "text": text}[needing].requires_grad_(True)
    assert not can_fuse(attn, video, text, rope)
    with torch.no_grad():
        assert can_fuse(attn, video, text, rope)


def test_a_layer_without_rotary_embedding_runs_eagerly(launches):
    transformer, _ = with_processor(1.0)
    transformer.get_submodule(DOUBLE).register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"image_rotary_emb": None}), with_kwargs=True
    )
    run(transformer)
    assert len(launches) == NUM_LAYERS - 1


def test_autocast_runs_eagerly(launches):
    """The norms are float32 there and their inputs are not."""
    with torch.autocast("cpu", torch.bfloat16):
        transformer, _ = with_processor(1.0)
        run(transformer)
    assert not launches
