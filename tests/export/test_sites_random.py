# SPDX-License-Identifier: Apache-2.0
"""Random spellings of attention, flawed ones among them: whatever is fused gives what the original gives."""

from __future__ import annotations

import os

import hypothesis
from hypothesis import strategies as st

from tests.export.site_graphs import FLAWS, Form
from tests.export.test_sites import fuse_and_compare

EXAMPLES = int(os.environ.get("FAEXPORT_RANDOM_GRAPHS", "150"))


@st.composite
def forms(draw: st.DrawFn) -> Form:
    rank = draw(st.sampled_from(["4d", "4d", "4d", "3d", "einsum", "single", "5d"]))
    heads = draw(st.sampled_from([1, 2, 4, 6])) if rank != "single" else 1
    groups = [n for n in (1, 2, 3) if heads % n == 0] if rank in ("4d", "5d", "einsum") else [1]
    kv_heads = heads // draw(st.sampled_from(groups))
    plain = rank == "4d"
    softmax = ["node", "positive_axis", "handwritten", "log", "minus_max", "cast", "guard"] + ["transposed"] * (
        plain and kv_heads == heads
    )
    packed = ["none", "split", "slice"] + ["gather"] * (plain and kv_heads == heads)
    chosen = draw(st.sampled_from(softmax))
    masks = ["none", "add", "sub", "zero", "clamp"] + (
        ["where", "causal"] if chosen != "transposed" and (plain or (rank == "einsum" and kv_heads == heads)) else []
    )
    sinks = plain and chosen == "node" and draw(st.booleans())
    flaw = (
        draw(st.sampled_from(["none"] * 6 + sorted(set(FLAWS) - {"constant_values"})))
        if plain and chosen == "node" and not sinks
        else "none"
    )
    return Form(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 4, 5, 8])),
        rank=rank,
        packed=draw(st.sampled_from(packed)),
        scale=draw(st.sampled_from(["scores", "query", "key", "both", "div", "runtime", "none"])),
        softmax=chosen,
        repeat=draw(st.sampled_from(["expand", "gather", "tile", "concat"])),
        mask=draw(st.sampled_from(masks)),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        sinks=sinks,
        output=draw(st.sampled_from(["merge", "heads", "flat"])),
        dynamic=draw(st.booleans()),
        flaw=flaw,
    )


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 150)
@hypothesis.given(form=forms())
def test_what_is_fused_is_right(form: Form, library: str) -> None:
    _, report = fuse_and_compare(form, library, tolerance=1e-4)
    assert report.num_fused <= 1
    if form.flaw == "none":
        assert report.num_fused == 1, [str(site.refusal) for site in report.sites]
