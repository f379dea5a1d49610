# SPDX-License-Identifier: Apache-2.0
"""What the exporter knows of one attention site: the words shared by match/, understand/, write/ and report/.

Names and meanings are those of csrc/include/fa/attention.h and docs/operator.md. Data only: no graph is changed here.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from faexport.sizes.dims import Dim

DOMAIN = "faexport"
OP_TYPE = "FlashAttention"
VERSION = 1
NUM_REQUIRED = 3  # inputs that are always there: query, key, value
ROW_BLOCK = 64
# Entries of a fused node's metadata, as JSON: AttentionSpec.left_out and .divisors, and the original's value in which
# rows that see no key give 0 where the node itself gives something else in them.
LEFT_OUT = "faexport.left_out"
DIVISORS = "faexport.divisors"
ZERO_ROWS = "faexport.zero_rows"
ALL_KEYS = "faexport.all_keys"  # Mask.all_keys


def listed(names: str | None) -> list[str]:
    """What optional_inputs or optional_outputs names. Spaces around a name don't count."""
    return [name.strip() for name in names.split(",")] if names else []


class Alignment(enum.StrEnum):
    """Where query row 0 stands among the keys (docs/operator.md, "Positions")."""

    ONNX = "onnx"
    TOP_LEFT = "top_left"
    BOTTOM_RIGHT = "bottom_right"


class EmptyRow(enum.StrEnum):
    """Output of a row that attends no key."""

    ZERO = "zero"
    MEAN = "mean"


class Layout(enum.StrEnum):
    """Axes of a query, key, value or output tensor: B batch, S rows, H heads, D head_dim. In BSH, which is 3-D, H is
    heads * head_dim."""

    BHSD = "BHSD"
    BSHD = "BSHD"
    BSH = "BSH"


class RefusalKind(enum.StrEnum):
    """What a refusal is about: report/advice.py says what it means, and what to do."""

    SCORES_READ = "scores read"  # scores or weights are asked for
    QUANTIZED = "quantized"  # between the two products
    RANDOM = "random"
    RUNTIME_OPERATOR = "runtime operator"  # an optimizer wrote an operator that isn't read
    SOFTCAP = "softcap"
    FACTOR = "factor"  # of scores or weights
    TYPE = "type"
    UNKNOWN_SIZES = "unknown sizes"
    MIXED = "mixed"  # heads or batch entries are
    NO_ATTENTION = "no attention"  # the softmax is another one
    OTHER_NAMES = "other names"  # sizes of queries, keys and values have names of their own
    UNLIKE_SIZES = "unlike sizes"  # may not fit one another
    DEFECT = "defect"  # a failure of ours
    OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a site is left as it is. A sentence a user understands, and the node that it speaks of."""

    reason: str
    node: str
    kind: RefusalKind = RefusalKind.OTHER
    defect: bool = dataclasses.field(init=False)  # the reason is a failure of ours

    def __post_init__(self) -> None:
        object.__setattr__(self, "defect", self.kind is RefusalKind.DEFECT)

    def __str__(self) -> str:
        return f"{self.reason} ({self.node})" if self.node else self.reason


@dataclasses.dataclass(frozen=True)
class Fact:
    """One proven property, e.g. "causal" or "window 4096", and the names of the nodes that it was proven from."""

    text: str
    nodes: tuple[str, ...] = ()
    assumed: bool = False

    def __str__(self) -> str:
        return f"{self.text} (assumed)" if self.assumed else self.text


@dataclasses.dataclass(frozen=True)
class Assumption(Fact):
    """What is not proven, and taken to be so: the report lists it at the site."""

    assumed: bool = True


@dataclasses.dataclass
class Operand:
    """A tensor of the operator: which value of the graph, in which layout.

    `heads` is needed for BSH. With `column_start` and `column_stride` set (elements), head h occupies columns
    column_start + h * column_stride … of a 3-D tensor that several operands share (packed QKV).
    """

    value: ir.Value
    layout: Layout
    heads: int | None = None
    head_dim: int | None = None
    column_start: int | None = None
    column_stride: int | None = None


class TermKind(enum.StrEnum):
    """How a mask or bias met the scores."""

    ADD = "add"  # scores + factor * value
    WHERE = "where"  # where(value == keep_when, scores, factor * fill)
    BOOL = "bool"  # true = attend (the bool attn_mask of ONNX Attention)
    # scores * value, a weight: a mask if it holds only 0 and 1 (and an ADD of a huge negative number follows)
    GATE = "gate"
    CLAMP = "clamp"  # max(scores, factor * value), value a constant that is hugely negative: keeps -inf away
    # min(scores, factor * value): a mask if it holds only the largest number and hugely negative ones
    MIN = "min"
    HIDDEN = "hidden"  # after exp: where(value == keep_when, exponentials, 0)
    ZERO = "zero"  # after softmax: where(value == keep_when, probabilities, 0)
    EMPTY_ROW = "empty_row"  # after the product with the values: 0 in rows where no element of value (bool) is true

    @property
    def meets_scores(self) -> bool:
        """False for what meets exponentials, probabilities or the output."""
        return self not in (TermKind.HIDDEN, TermKind.ZERO, TermKind.EMPTY_ROW)


@dataclasses.dataclass(frozen=True)
class MaskTerm:
    """One operation between the score MatMul and the value MatMul that masks or biases, as it stands in the source
    graph.

    Terms come in the order in which the graph applies them; a later term also applies to the fill of an earlier one.
    `axes` names the axes of the score tensor which `value` is broadcast against (from the right, as ONNX does): B
    batch, H query heads, S query rows, T keys, N = B * H merged (batch outermost), K kv heads and G query heads per kv
    head (H = K * G), M * W = B (a batch made of M groups of W windows). Usual: "BHST"; also "NST", "BKGST", "MWHST",
    "BHTS", "BST". `dims` are the sizes of these axes.
    """

    kind: TermKind
    value: ir.Value
    node: ir.Node  # the Add, Where, Attention … that it came from
    axes: str = "BHST"
    dims: tuple[Dim, ...] = ()
    keep_when: bool = True  # WHERE, HIDDEN and ZERO only
    fill: ir.Value | None = None  # WHERE only: what replaces the scores; a constant or any value
    factor: float = 1.0  # what the term is multiplied by on its way to the softmax (scale applied after the addition)
    narrowed: ir.DataType | None = None  # the narrowest type that the scores have on that way, where it is known


@dataclasses.dataclass(frozen=True)
class ScoreShape:
    """What understand_mask may know of the scores [B, H, S, T] that its terms apply to."""

    query: Operand
    key: Operand
    anchor: ir.Node  # the Softmax or Attention node; new nodes are inserted before it
    graph: ir.Graph | ir.Function
    batch: Dim | None = None
    heads: Dim | None = None
    seqlen_q: Dim | None = None
    seqlen_kv: Dim | None = None
    dtype: ir.DataType = ir.DataType.FLOAT  # of the scores and of an attn_bias
    sinks: bool = False  # one more logit a row: what is the same for a whole row changes the softmax
    same_keys: bool = True  # are there as many values as keys, for sure?
    one_key_spreads: bool = False  # would a mask of more keys than one give that one's value more weights (Einsum)?
    nan_guard: bool = False  # NaN probabilities (a row of -inf only) are replaced by 0: EmptyRow.ZERO


@dataclasses.dataclass(frozen=True)
class EmptyRows:
    """What rows without a visible key give where neither 0 nor the mean of all values is right; written behind the
    operator (empty_rows.py).

    In `rows` the output becomes output_weight * output + value_weight * sums. The sums are those of the values at
    `keys` and, in row i, at the first i + 1 of row_keys where row_kept; a part that is None is 0. An axis below that
    doesn't matter has size 1. Rows are in blocks of ROW_BLOCK here, the last one filled up: running sums are taken in
    two steps, since runtimes take them one element after the other, or worse."""

    rows: ir.Value  # bool [B, 1, S_q, 1]
    output_weight: ir.Value  # float32 [B, 1, S_q, 1]
    value_weight: ir.Value  # float32 [B, 1, S_q, 1]
    keys: ir.Value | None = None  # float32 [B, 1, 1, S_kv]: 1 for a key that counts, else 0
    row_keys: ir.Value | None = None  # int64 [blocks, ROW_BLOCK]
    row_kept: ir.Value | None = None  # bool [B, 1, blocks, ROW_BLOCK, 1]
    num_rows: ir.Value | None = None  # int64 [1]: S_q, given with row_keys

    @property
    def values(self) -> list[ir.Value]:
        given = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [value for value in given if value is not None]


@dataclasses.dataclass
class Mask:
    """What is known of the mask or bias of a site; the default is "none at all".

    `attn_mask` (bool, true = attend) and `attn_bias` (float, added) are values broadcastable to [B, H, S_q, S_kv];
    they exist in the graph or were created by understand/ and are inserted by rewrite.
    """

    window_left: int = -1
    window_right: int = -1  # 0 = causal
    alignment: Alignment = Alignment.ONNX
    query_offset: ir.Value | None = None  # int64 [1] or [B]; overrides alignment
    attn_mask: ir.Value | None = None
    attn_bias: ir.Value | None = None
    kv_lengths: ir.Value | None = None  # int64 [B]
    alibi_slopes: ir.Value | None = None  # float32 [H] or [B, H]
    empty_row: EmptyRow = EmptyRow.ZERO
    empty_rows: EmptyRows | None = None  # where empty_row alone doesn't say it
    rows_see_a_key: bool = False  # proven of every row: then empty_row doesn't matter
    # Lengths of the original: where one is 0 it adds a number to all scores of a row, which only rounds them, and
    # kv_lengths has all keys.
    all_keys: ir.Value | None = None
    # Proven: attn_bias is so small that scores keep their last bits beside it, at least in rows that see no other key.
    bias_keeps_scores: bool = False
    new_nodes: Sequence[ir.Node] = ()  # nodes that compute the values above, in order; not yet in the graph
    facts: tuple[Fact, ...] = ()

    @property
    def is_causal(self) -> bool:
        return self.window_right == 0

    @property
    def values(self) -> list[ir.Value]:
        """The tensors that it speaks of."""
        own = [self.query_offset, self.attn_mask, self.attn_bias, self.kv_lengths, self.alibi_slopes]
        return [v for v in own if v is not None] + (self.empty_rows.values if self.empty_rows is not None else [])


@dataclasses.dataclass
class AttentionSpec:
    """Everything the fused node says: operands, scale, mask, and the value that it replaces."""

    query: Operand
    key: Operand
    value: Operand
    output: ir.Value  # replaced by the node's output, in output_layout
    output_layout: Layout
    softmax_scale: float
    replaces: ir.Node | None = None  # the last node of the core; the fused node is inserted in front of it
    head_dim: int | str | None = None
    head_dim_v: int | str | None = None
    new_nodes: Sequence[ir.Node] = ()  # compute operands from values of the graph; in front of the fused node
    output_nodes: Sequence[ir.Node] = ()  # from the fused output to `output`'s shape (output of the last node)
    output_entry: ir.Value | None = None  # stands for the fused output in output_nodes
    # pairs of a Shape node on the core and nodes that compute the same instead
    shape_uses: Sequence[tuple[ir.Node, Sequence[ir.Node]]] = ()
    mask: Mask = dataclasses.field(default_factory=Mask)
    softcap: float = 0.0
    sinks: ir.Value | None = None  # float32 [H]
    past_key: ir.Value | None = None
    past_value: ir.Value | None = None
    present_key: ir.Value | None = None
    present_value: ir.Value | None = None
    lse: ir.Value | None = None
    # of the operator's own names (inputs.def, attributes.def): what else a decoder has, as its cache and rotary tables
    further_inputs: Mapping[str, ir.Value] = dataclasses.field(default_factory=dict)
    further_attributes: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    # pairs of a value that goes away and one of the same shape, which Shape nodes read instead
    same_shapes: Sequence[tuple[ir.Value, ir.Value]] = ()
    # pairs of another output of the replaced node and a value that takes its place
    other_outputs: Sequence[tuple[ir.Value, ir.Value]] = ()
    # names of DequantizeLinear outputs of the original in whose place the operator has what was quantized
    left_out: tuple[str, ...] = ()
    # names of sums of exponentials in the original: where one overflows or is 0, that has NaN and the operator a number
    divisors: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


@dataclasses.dataclass
class Candidate:
    """A place in a graph where attention may be: its anchor node (Softmax, Attention, …) and what became of it."""

    anchor: ir.Node
    graph: ir.Graph | ir.Function
    source: str  # name of the matcher: softmax_core, onnx_attention, ort_contrib
    outcome: AttentionSpec | Refusal | None = None
    fused_node: ir.Node | None = None  # once it stands in the graph
    # batch_size, num_q_heads, … as far as known
    sizes: dict[str, int | str | None] = dataclasses.field(default_factory=dict)
    name: str = dataclasses.field(init=False)  # as the model has it: when a site is rewritten, old outputs are renamed

    def __post_init__(self) -> None:
        self.name = self.anchor.name or self.anchor.outputs[0].name or "?"
