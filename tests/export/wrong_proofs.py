# SPDX-License-Identifier: Apache-2.0
"""Models with attention, each beside a rewriting that is wrong in one of the ways in which a proof can be: what
verification must catch by itself. Used by test_site_check.py."""

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser

HEADER = '<ir_version: 8, opset_import: ["": 17, "faexport": 1]>'
CACHE = "float[B,2,T,8] q, float[B,2,P,8] pk, float[B,2,P,8] pv, float[B,2,T,8] kn, float[B,2,T,8] vn"
PLAIN = "float[B,2,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v"
OUTPUT = "float[B,2,S,8] o"
SCORES = "kt = Transpose <perm = [0, 1, 3, 2]> (k)\n s = MatMul (q, kt)\n"
WEIGHTS = "p = Softmax <axis = -1> (s2)\n o = MatMul (p, v)\n"
FUSED = "faexport.FlashAttention <scale = 1.0"


def parsed(inputs: str, body: str, output: str = OUTPUT, weights: str = "") -> onnx.ModelProto:
    """A model in ONNX's text form. `weights`: initializers, e.g. "float one = {1.0}"."""
    listed = f"<{weights}>" if weights else ""
    return onnx.parser.parse_model(f"{HEADER} g ({inputs}) => ({output}) {listed} {{ {body} }}")


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A model, a rewriting of it, and words of the sentence that refuses the rewriting."""

    inputs: str
    original: str
    rewritten: str
    words: tuple[str, ...]
    output: str = OUTPUT
    weights: str = ""

    def models(self) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        return tuple(parsed(self.inputs, text, self.output, self.weights) for text in (self.original, self.rewritten))


WITH_CACHE = "k = Concat <axis = 2> (pk, kn)\n v = Concat <axis = 2> (pv, vn)\n"
INT = "int64[1] one = {1}, int64 zero = {0}, int64 step = {1}, int64[1] zeros = {0}"
TRIANGLE = (
    "sh = Shape <start = 2, end = 3> (q)\n n = Squeeze (sh, zeros)\n r = Range (zero, n, step)\n"
    "ri = Unsqueeze (r, one)\n rj = Unsqueeze (r, zeros)\n keep = LessOrEqual (rj, ri)\n"
)

CASES = {
    # The buffer [T, T] broadcasts at T = 1: every key is visible there, "causal" (top left) shows the first only.
    "a triangle over past and new keys": Wrong(
        CACHE,
        f"{WITH_CACHE} {SCORES} {TRIANGLE} s2 = Where (keep, s, low)\n {WEIGHTS}",
        f"{WITH_CACHE} o = {FUSED}, is_causal = 1, alignment = \"top_left\"> (q, k, v)",
        ("T=1", "differs"),
        "float[B,2,T,8] o",
        f"{INT}, float low = {{-inf}}",
    ),
    "a size that comes from another input": Wrong(
        f"{PLAIN}, int64[B,N] ids",
        f"{SCORES} sh = Shape <start = 1, end = 2> (ids)\n n = Squeeze (sh, zeros)\n r = Range (zero, n, step)\n"
        "ri = Unsqueeze (r, one)\n rj = Unsqueeze (r, zeros)\n keep = LessOrEqual (rj, ri)\n"
        f"s2 = Where (keep, s, low)\n {WEIGHTS}",
        f"o = {FUSED}, is_causal = 1> (q, k, v)",
        ("N=1", "differs"),
        weights=f"{INT}, float low = {{-1e30}}",
    ),
    "a mask that the caller may override": Wrong(
        "float[B,2,4,8] q, float[B,2,4,8] k, float[B,2,4,8] v, bool[1,1,1,4] keep",
        f"{SCORES} s2 = Where (keep, s, low)\n {WEIGHTS}",
        f"o = {FUSED}> (q, k, v)",
        ("overridden", "differs"),
        "float[B,2,4,8] o",
        "bool[1,1,1,4] keep = {1, 1, 1, 1}, float low = {-1e30}",
    ),
    "integers that wrap around": Wrong(
        f"{PLAIN}, int64[B,S] mask",
        f"{SCORES} narrow = Cast <to = 6> (mask)\n flags = Cast <to = 9> (narrow)\n keep = Unsqueeze (flags, axes)\n"
        f"s2 = Where (keep, s, low)\n {WEIGHTS}",
        "flags = Cast <to = 9> (mask)\n keep = Unsqueeze (flags, axes)\n"
        f"o = {FUSED}, optional_inputs = \"attn_mask\", empty_row = \"mean\"> (q, k, v, keep)",
        ("'mask' not only 0 and 1", "differs"),
        weights="int64[2] axes = {1, 2}, float low = {-1e30}",
    ),
    "one length for all": Wrong(
        f"{PLAIN}, int64[N] lengths",
        f"{SCORES} sh = Shape <start = 2, end = 3> (k)\n n = Squeeze (sh, zeros)\n r = Range (zero, n, step)\n"
        "l = Unsqueeze (lengths, axes)\n keep = Less (r, l)\n"
        f"s2 = Where (keep, s, low)\n {WEIGHTS}",
        f"o = {FUSED}, optional_inputs = \"nonpad_kv_seqlen\", alignment = \"top_left\", empty_row = \"mean\"> "
        "(q, k, v, lengths)",
        ("does not run on", "nonpad_kv_seqlen"),
        weights=f"{INT}, int64[3] axes = {{1, 2, 3}}, float low = {{-1e30}}",
    ),
    "keys for the whole batch": Wrong(
        "float[B,2,S,8] q, float[E,2,S,8] k, float[E,2,S,8] v",
        f"{SCORES} s2 = Identity (s)\n {WEIGHTS}",
        f"o = {FUSED}> (q, k, v)",
        ("does not run on", "key has shape"),
    ),
    # Scores of a few units are swallowed, those of inputs twelve times as large are not.
    "a fill that does not swallow large scores": Wrong(
        f"{PLAIN}, bool[B,1,S,S] mask",
        f"{SCORES} {TRIANGLE} own = Equal (rj, ri)\n seen = Or (mask, own)\n s2 = Where (seen, s, low)\n {WEIGHTS}",
        f"{TRIANGLE} own = Equal (rj, ri)\n seen = Or (mask, own)\n"
        f"o = {FUSED}, optional_inputs = \"attn_mask\"> (q, k, v, seen)",
        ("times 12", "differs"),
        weights=f"{INT}, float low = {{-60.0}}",
    ),
    "a scale that is a little off": Wrong(
        PLAIN,
        f"{SCORES} s2 = Mul (s, factor)\n {WEIGHTS}",
        "o = faexport.FlashAttention <scale = 0.353> (q, k, v)",
        ("site", "differs"),
        weights="float factor = {0.35355339}",
    ),
}  # fmt: skip
