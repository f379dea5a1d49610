# SPDX-License-Identifier: Apache-2.0
"""The operator inside onnxruntime's CUDA provider: cases, an exported model, CUDA graphs, threads."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import onnxruntime as ort
import pytest

from tests import cases, tolerances
from tests.plugin import nodes
from tests.problems import Problem

torch = pytest.importorskip("torch")
CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime has no CUDA provider"),
]
HEADS, DIM, ROWS = 8, 64, 300


def session(model, **provider_options: str) -> ort.InferenceSession:
    made = nodes.session(model, [(CUDA, provider_options)])
    assert made.get_providers()[0] == CUDA, "the CUDA provider could not be loaded"
    return made


def attention_model():
    inputs = {name: np.zeros((2, ROWS, HEADS * DIM), np.float16) for name in ("query", "key", "value")}
    return nodes.make_model(inputs, {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": 1})


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (2, ROWS, HEADS * DIM)
    return {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name in ("query", "key", "value")}


def is_too_wide(case: cases.Case) -> bool:
    """Float32 heads above 256 columns: no CUDA kernel takes them."""
    return case.dtype == "float32" and max(case.head_dim, case.dim_v) > 256


def takes_float8(case: cases.Case) -> bool:
    return torch.cuda.get_device_capability() == (9, 0) and cases.fits_float8_kernel(case)


@pytest.mark.parametrize("case", cases.quick(), ids=str)
def test_case(case: cases.Case) -> None:
    problem = case.problem()
    if is_too_wide(case):
        with pytest.raises(Exception, match=r"head_dim \d+ is above 256"):
            nodes.run(problem, [(CUDA, {"use_tf32": "0"})])
        return
    if case.dtype == "float8" and not takes_float8(case):
        with pytest.raises(Exception, match="takes float8_e4m3fn only|must be multiples of 16|the tensors are float8"):
            nodes.run(problem, [(CUDA, {})])
        return
    expected = tolerances.expectation(problem, float8_weights=True)
    tolerances.check(nodes.run(problem, [(CUDA, {"use_tf32": "0"})]), expected)


@pytest.mark.parametrize("use_tf32", ("", "0", "1"))
@pytest.mark.parametrize("precision", ("", "tf32", "tf32x3"))
def test_float32_is_multiplied_as_the_node_says_or_else_the_session(precision: str, use_tf32: str) -> None:
    case = cases.Case("float32", 2, 4, 4, 300, 300, 64, float32_precision=precision)
    problem = case.problem()
    out = nodes.run(problem, [(CUDA, {"use_tf32": use_tf32} if use_tf32 else {})])
    expected = tolerances.expectation(problem).exact["output"]
    error = np.linalg.norm(out["output"] - expected) / np.linalg.norm(expected)
    is_tf32 = precision == "tf32" or (not precision and use_tf32 != "0")
    assert 1e-4 < error < 6e-4 if is_tf32 else error < 1e-6


def test_nodes_of_an_exported_model_run_on_the_gpu() -> None:
    """A PyTorch model, exported, fused, and run with the CPU provider forbidden: equal to the unfused one."""
    import io

    import faexport
    import onnx

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projections = torch.nn.ModuleList(torch.nn.Linear(128, 384) for _ in range(2))

        def forward(self, x, mask):
            for projection in self.projections:
                q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in projection(x).chunk(3, -1))
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
                x = x + y.transpose(1, 2).flatten(2)
            return x

    torch.manual_seed(0)
    x, mask = torch.randn(2, 50, 128), torch.arange(50)[None] < torch.tensor([[50], [31]])
    encoder, file = Encoder().eval(), io.BytesIO()
    torch.onnx.export(encoder, (x, mask), file, input_names=["x", "mask"], opset_version=17, dynamo=False)
    fused, report = faexport.fuse(onnx.load_from_string(file.getvalue()))
    assert [node.op_type for node in fused.graph.node].count("FlashAttention") == 2, report
    (output,) = session(fused, use_tf32="0").run(None, {"x": x.numpy(), "mask": mask.numpy()})
    expected = encoder(x, mask).detach().numpy()
    assert np.abs(output - expected).max() <= 1e-4


def test_cuda_graph_replays_with_new_inputs() -> None:
    plain, graph = session(attention_model()), session(attention_model(), enable_cuda_graph="1")
    values = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in draw(0).items()}
    output = ort.OrtValue.ortvalue_from_numpy(np.full((2, ROWS, HEADS * DIM), np.nan, np.float16), "cuda", 0)
    binding = graph.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("output", output)
    for seed in range(4):  # the first run captures
        feeds = draw(seed)
        for name, value in values.items():
            value.update_inplace(feeds[name])
        graph.run_with_iobinding(binding)
        assert np.array_equal(output.numpy(), plain.run(None, feeds)[0]), f"replay {seed}"


def test_four_threads_on_one_session() -> None:
    made = session(attention_model())
    feeds = [draw(seed) for seed in range(8)]
    expected = [made.run(None, feed)[0] for feed in feeds]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: made.run(None, feeds[i % 8])[0], range(200)))
    assert all(np.array_equal(result, expected[i % 8]) for i, result in enumerate(results))


def test_decoding_with_a_cache_uses_split_keys() -> None:
    """One query row against many keys needs a workspace from the session's arena, in a graph too."""
    inputs = {"query": (1, 8, 1, 64), "key": (1, 2, 4096, 64), "value": (1, 2, 4096, 64)}
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in inputs.items()}
    problem = Problem({}, feeds, ["output"])
    (output,) = session(nodes.make_model(feeds, {})).run(None, feeds)
    tolerances.check({"output": output}, problem)
