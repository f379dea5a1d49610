# SPDX-License-Identifier: Apache-2.0
"""Float8 operands on Hopper: what the cases of test_attention.py are too short for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import faplugin  # noqa: E402

from tests.gpu import arrays  # noqa: E402

pytestmark = pytest.mark.gpu
KERNEL = "prefill_sm90_f8"


@pytest.fixture(autouse=True)
def _is_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("float8 needs compute capability 9.0")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: object) -> torch.Tensor:
    """The output in float32 of tensors [B, H, S, D] that are rounded to float8 already."""
    shape = (*query.shape[:3], value.shape[3])
    out = arrays.poisoned(shape, torch.float32)
    tensors = {"query": query, "key": key, "value": value}
    readable = {name: arrays.exported(x) for name, x in tensors.items()}
    torch.cuda.synchronize()
    faplugin.attention(**readable, **arguments, kernel=KERNEL, out={"output": out}, output_dtype="float32")
    torch.cuda.synchronize()
    return out


def float8(*shape: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return (scale * torch.randn(shape, device="cuda") + offset).to(torch.float8_e4m3fn)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the output in float64."""
    scores = query[:, :, rows].double() @ key.double().transpose(-1, -2) * query.shape[3] ** -0.5
    return scores.softmax(-1) @ value.double()


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
@pytest.mark.parametrize("seqlen", (100, 700))
def test_many_launches_give_the_same_bits(head_dim: int, seqlen: int) -> None:
    """A buffer that is written too early is seen now and then only."""
    torch.manual_seed(head_dim)
    tensors = [float8(8, 33, seqlen, head_dim) for _ in range(3)]
    for attributes in ({}, {"is_causal": True, "left_window_size": 40}):
        first = attend(*tensors, **attributes)
        for _ in range(40):
            assert arrays.same_bits(attend(*tensors, **attributes), first)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_long_sums_of_one_sign_keep_their_digits(head_dim: int) -> None:
    """The tensor cores' own sums of float8 products would lose 2 % here: they are of one key tile at most."""
    torch.manual_seed(head_dim)
    query, key = (float8(1, 2, rows, head_dim, scale=0.3) for rows in (256, 32768))
    value = float8(1, 2, 32768, head_dim, scale=0.2, offset=1.0)
    rows = torch.arange(0, 256, 5, device="cuda")
    want = exact(query, key, value, rows)
    error = (attend(query, key, value)[:, :, rows] - want).norm() / want.norm()
    assert error <= 3e-3, float(error)


@pytest.mark.parametrize("spread", (0.02, 1.0, 4.0), ids=("flat", "usual", "peaked"))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_error_is_that_of_rounded_weights(head_dim: int, spread: float) -> None:
    """Half a unit of e4m3's last place is 1/16 of a weight, in the mean 2.6 %, and so is the error of their sum."""
    torch.manual_seed(head_dim)
    query, key, value = (
        float8(1, 2, 1000, head_dim, scale=spread),
        float8(1, 2, 3000, head_dim),
        float8(1, 2, 3000, head_dim),
    )
    rows = torch.arange(0, 1000, 9, device="cuda")
    want = exact(query, key, value, rows)
    error = (attend(query, key, value)[:, :, rows] - want).norm() / want.norm()
    assert error <= 0.03, float(error)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("is_causal", (False, True))
def test_values_of_hidden_keys_in_many_tiles(head_dim: int, is_causal: bool) -> None:
    """Every tile of every block has rows to be mended: they come out as if the values were 0, up to rounded weights."""
    torch.manual_seed(head_dim)
    query, key, value = (float8(12, 11, 400, head_dim) for _ in range(3))
    hidden = torch.zeros(400, device="cuda", dtype=torch.bool)
    attributes: dict = {"is_causal": is_causal}
    if is_causal:
        hidden[300:] = True
    else:
        hidden[5::97] = True
        attributes["attn_mask"] = (~hidden.expand(12, 1, 400, 400)).contiguous()
    clean, spoilt = value.clone(), value.clone()
    clean.view(torch.uint8)[:, :, hidden] = 0
    spoilt.view(torch.uint8)[:, :, hidden] = 0x7F
    seen = 300 if is_causal else 400
    expected, output = (attend(query, key, x, **attributes)[:, :, :seen] for x in (clean, spoilt))
    assert (output - expected).norm() <= 0.03 * expected.norm()
