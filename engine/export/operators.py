"""Our operators in ONNX: one node each, with a body that any runtime can run.

A node `focus::focus_<op>` carries the attributes by which TensorRT finds a plugin
(`plugin_namespace`, `plugin_version`, `aot`), and the file carries a function of the same name,
written here in ONNX's text form. ONNX Runtime inlines the function; a TensorRT without the plugin
parses it too. Values of attributes are lists of length one, which is what plugins can read.
"""

# B batch, Q queries, L feature tokens, H heads, N query cells, K codes, D width, d head width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import FunctionProto, defs
from onnxscript import opset18 as op
from onnxscript.values import Opset

import kernels.codebook_lookup.api
import kernels.gated_cross_attention.api
import kernels.mask_attention.api  # noqa: F401  registers torch.ops.focus

DOMAIN = "focus"
PLUGIN: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
CANDIDATES = 8  # codes that fp32 distances nominate for an exact fp64 comparison

GATED = """
<domain: "focus", opset_import: ["": {opset}]>
focus_gated_cross_attention <num_heads>
  (residual, query, features, w_feature, b_feature, w_q, w_k, w_v, w_o, gate) => (out)
{{
  feature_t = Transpose <perm = [1, 0]> (w_feature)
  q_t = Transpose <perm = [1, 0]> (w_q)
  k_t = Transpose <perm = [1, 0]> (w_k)
  v_t = Transpose <perm = [1, 0]> (w_v)
  o_t = Transpose <perm = [1, 0]> (w_o)
  mapped = MatMul (features, feature_t)
  projected = Add (mapped, b_feature)
  q = MatMul (query, q_t)
  k = MatMul (projected, k_t)
  v = MatMul (projected, v_t)
  heads = Constant <value_ints: ints = @num_heads> ()
  same = Constant <value_ints = [0, 0]> ()
  rest = Constant <value_ints = [-1]> ()
  split = Concat <axis = 0> (same, heads, rest)
  q_BQHd = Reshape (q, split)
  k_BLHd = Reshape (k, split)
  v_BLHd = Reshape (v, split)
  q_BHQd = Transpose <perm = [0, 2, 1, 3]> (q_BQHd)
  k_BHdL = Transpose <perm = [0, 2, 3, 1]> (k_BLHd)
  v_BHLd = Transpose <perm = [0, 2, 1, 3]> (v_BLHd)
  width = Shape <start = 3> (q_BQHd)
  width_real = CastLike (width, query)
  root = Sqrt (width_real)
  products = MatMul (q_BHQd, k_BHdL)
  logits = Div (products, root)
  shares = Softmax <axis = -1> (logits)
  seen = MatMul (shares, v_BHLd)
  seen_BQHd = Transpose <perm = [0, 2, 1, 3]> (seen)
  joined = Concat <axis = 0> (same, rest)
  merged = Reshape (seen_BQHd, joined)
  update = MatMul (merged, o_t)
  update_real = Cast <to = 1> (update)
  gate_real = Cast <to = 1> (gate)
  opening = Tanh (gate_real)
  gated = Mul (opening, update_real)
  residual_real = Cast <to = 1> (residual)
  total = Add (residual_real, gated)
  out = CastLike (total, residual)
}}
"""

LOOKUP = """
<domain: "focus", opset_import: ["": {opset}]>
focus_codebook_lookup (x, codes) => (distance, index)
{{
  x_real = Cast <to = 1> (x)
  codes_real = Cast <to = 1> (codes)
  codes_t = Transpose <perm = [1, 0]> (codes_real)
  dots = MatMul (x_real, codes_t)
  last = Constant <value_ints = [1]> ()
  squares = Mul (codes_real, codes_real)
  norms = ReduceSum <keepdims = 0> (squares, last)
  two = Constant <value_float = 2.0> ()
  twice = Mul (dots, two)
  rough = Sub (norms, twice)
  num_codes = Shape <end = 1> (codes)
  wanted = Constant <value_ints = [{candidates}]> ()
  count = Min (wanted, num_codes)
  nominated, numbers = TopK <axis = 1, largest = 0> (rough, count)
  x_exact = Cast <to = 11> (x)
  codes_exact = Cast <to = 11> (codes)
  rows = Gather <axis = 0> (codes_exact, numbers)
  x_wide = Unsqueeze (x_exact, last)
  apart = Sub (x_wide, rows)
  apart_squares = Mul (apart, apart)
  deepest = Constant <value_ints = [2]> ()
  exact = ReduceSum <keepdims = 0> (apart_squares, deepest)
  least = ReduceMin <keepdims = 1> (exact, last)
  ties = Equal (exact, least)
  chosen = Where (ties, numbers, num_codes)
  lowest = ReduceMin <keepdims = 0> (chosen, last)
  nearest = Squeeze (least, last)
  nothing = Sub (codes_exact, codes_exact)
  tainted = ReduceSum <keepdims = 0> (nothing)
  zero_or_nan = Sub (nearest, nearest)
  sound = Add (zero_or_nan, tainted)
  valid = Equal (sound, sound)
  none = Constant <value_ints = [-1]> ()
  index = Where (valid, lowest, none)
  marked = Add (nearest, sound)
  distance = Cast <to = 1> (marked)
}}
"""

# One axis pair of a grid [2] over an extent [2]: angles of every cell, row-major, [cells, D / 2].
ANGLES = """
  {p}_rows = Gather <axis = 0> ({grid}, zero)
  {p}_columns = Gather <axis = 0> ({grid}, one)
  {p}_grid = Cast <to = 11> ({grid})
  {p}_cell = Div (extent_exact, {p}_grid)
  {p}_cell_y = Gather <axis = 0> ({p}_cell, zero)
  {p}_cell_x = Gather <axis = 0> ({p}_cell, one)
  {p}_i = Range (zero, {p}_rows, one)
  {p}_j = Range (zero, {p}_columns, one)
  {p}_i_exact = Cast <to = 11> ({p}_i)
  {p}_j_exact = Cast <to = 11> ({p}_j)
  {p}_i_mid = Add ({p}_i_exact, half)
  {p}_j_mid = Add ({p}_j_exact, half)
  {p}_y = Mul ({p}_i_mid, {p}_cell_y)
  {p}_x = Mul ({p}_j_mid, {p}_cell_x)
  {p}_y_wide = Unsqueeze ({p}_y, last)
  {p}_x_wide = Unsqueeze ({p}_x, last)
  {p}_y_turn = Mul ({p}_y_wide, turns)
  {p}_x_turn = Mul ({p}_x_wide, turns)
  {p}_y_cells = Unsqueeze ({p}_y_turn, last)
  {p}_x_cells = Unsqueeze ({p}_x_turn, first)
  {p}_shape = Concat <axis = 0> ({grid}, num_turns)
  {p}_y_all = Expand ({p}_y_cells, {p}_shape)
  {p}_x_all = Expand ({p}_x_cells, {p}_shape)
  {p}_both = Concat <axis = -1> ({p}_x_all, {p}_y_all)
  {p}_flat_shape = Concat <axis = 0> (rest, num_pairs)
  {p}_flat = Reshape ({p}_both, {p}_flat_shape)
  {p}_on = Mul ({p}_flat, turning)
  {p}_angle = Cast <to = 1> ({p}_on)
  {p}_cos = Cos ({p}_angle)
  {p}_sin = Sin ({p}_angle)
  {p}_pairs = Reshape ({p}_vectors, as_pairs)
  {p}_even, {p}_odd = Split <axis = -1, num_outputs = 2> ({p}_pairs)
  {p}_a = Squeeze ({p}_even, end)
  {p}_b = Squeeze ({p}_odd, end)
  {p}_ac = Mul ({p}_a, {p}_cos)
  {p}_bs = Mul ({p}_b, {p}_sin)
  {p}_as = Mul ({p}_a, {p}_sin)
  {p}_bc = Mul ({p}_b, {p}_cos)
  {p}_real = Sub ({p}_ac, {p}_bs)
  {p}_imaginary = Add ({p}_as, {p}_bc)
  {p}_real_wide = Unsqueeze ({p}_real, end)
  {p}_imaginary_wide = Unsqueeze ({p}_imaginary, end)
  {p}_woven = Concat <axis = -1> ({p}_real_wide, {p}_imaginary_wide)
  {p}_turned = Reshape ({p}_woven, as_vectors)
"""

MASK = (
    """
<domain: "focus", opset_import: ["": {opset}]>
focus_mask_attention <rope, theta>
  (query, mask, key_vectors, value_vectors, query_grid, extent) => (out)
{{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  first = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [1]> ()
  rest = Constant <value_ints = [-1]> ()
  end = Constant <value_ints = [-1]> ()
  two = Constant <value_ints = [2]> ()
  four = Constant <value_ints = [4]> ()
  same = Constant <value_ints = [0, 0, 0]> ()
  half_real = Constant <value_float = 0.5> ()
  half = Cast <to = 11> (half_real)
  dim = Shape <start = 3> (query)
  num_turns = Div (dim, four)
  num_pairs = Div (dim, two)
  as_pairs = Concat <axis = 0> (same, num_pairs, two)
  as_vectors = Concat <axis = 0> (same, dim)
  flag = Constant <value_ints: ints = @rope> ()
  turning = Cast <to = 11> (flag)
  base_real = Constant <value_floats: floats = @theta> ()
  base = Cast <to = 11> (base_real)
  steps_end = Squeeze (num_turns)
  steps = Range (zero, steps_end, one)
  steps_exact = Cast <to = 11> (steps)
  turns_exact = Cast <to = 11> (num_turns)
  powers = Div (steps_exact, turns_exact)
  falling = Neg (powers)
  turns = Pow (base, falling)
  extent_exact = Cast <to = 11> (extent)
  key_grid = Shape <start = 2> (mask)
  mask_wide = Unsqueeze (mask, last)
  cells_shape = Concat <axis = 0> (same, rest)
  cells = Reshape (mask_wide, cells_shape)
  cells_t = Transpose <perm = [0, 1, 3, 2]> (cells)
  k_vectors = MatMul (cells_t, key_vectors)
  values = MatMul (cells_t, value_vectors)
  q_vectors = Cast <to = 1> (query)
"""
    + ANGLES.replace("{p}", "q").replace("{grid}", "query_grid")
    + ANGLES.replace("{p}", "k").replace("{grid}", "key_grid")
    + """
  keys_t = Transpose <perm = [0, 1, 3, 2]> (k_turned)
  dim_real = Cast <to = 1> (dim)
  root = Sqrt (dim_real)
  products = MatMul (q_turned, keys_t)
  logits = Div (products, root)
  shares = Softmax <axis = -1> (logits)
  seen = MatMul (shares, values)
  out = CastLike (seen, query)
}}
"""
)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator: its torch op, its node and its body."""

    name: str
    torch_op: Any
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]  # name, type ("T" is that of the first input)
    attributes: tuple[tuple[str, str], ...]  # name, "ints" or "floats"
    body: str
    translate: Callable[..., Any]

    def function(self, opset: int) -> FunctionProto:
        """Return the model-local function for an opset."""
        text = self.body.format(opset=opset, candidates=CANDIDATES)
        return onnx.parser.parse_function(text)


def _node(name: str, *inputs: Any, aot: bool = True, **attributes: Any) -> Any:
    """Emit a node; `aot`: its plugin may be the one compiled ahead of time (`plugins.py`)."""
    node = getattr(Opset(DOMAIN, 1), name)
    return node(*inputs, **attributes, **{**PLUGIN, "aot": int(aot)})


def _pair(values: Sequence[Any]) -> Any:
    """Turn two sizes, known or not, into an int64 tensor [2]."""
    if all(isinstance(value, int) for value in values):
        return op.Constant(value_ints=list(values))
    shape: Any = op.Constant(value_ints=[1])
    parts: list[Any] = [
        op.Constant(value_ints=[value]) if isinstance(value, int) else op.Reshape(value, shape)
        for value in values
    ]
    return op.Concat(*parts, axis=0)


def _mask_attention(
    query: Any,
    mask: Any,
    key_vectors: Any,
    value_vectors: Any,
    query_grid: Sequence[Any],
    extent: Sequence[Any],
    rope: bool,
    theta: float,
) -> Any:
    return _node(
        "focus_mask_attention",
        query,
        mask,
        key_vectors,
        value_vectors,
        _pair(query_grid),
        _pair(extent),
        aot=mask.shape is None or mask.shape[1] == 1,  # its kernel is for one channel
        rope=[int(rope)],
        theta=[float(theta)],
    )


def _gated_cross_attention(*arguments: Any) -> Any:
    *tensors, num_heads, padding_mask = arguments
    if padding_mask is not None:
        raise ValueError("a call without padding_mask expected: the exported operator has none")
    return _node("focus_gated_cross_attention", *tensors, aot=False, num_heads=[int(num_heads)])


def _codebook_lookup(x: Any, codes: Any) -> Any:
    return _node("focus_codebook_lookup", x, codes, _outputs=2)


OPERATORS = (
    Operator(
        name="focus_gated_cross_attention",
        torch_op=torch.ops.focus.gated_cross_attention.default,
        inputs=(
            "residual",
            "query",
            "features",
            "w_feature",
            "b_feature",
            "w_q",
            "w_k",
            "w_v",
            "w_o",
            "gate",
        ),
        outputs=(("out", "T"),),
        attributes=(("num_heads", "ints"),),
        body=GATED,
        translate=_gated_cross_attention,
    ),
    Operator(
        name="focus_codebook_lookup",
        torch_op=torch.ops.focus.codebook_lookup.default,
        inputs=("x", "codes"),
        outputs=(("distance", "tensor(float)"), ("index", "tensor(int64)")),
        attributes=(),
        body=LOOKUP,
        translate=_codebook_lookup,
    ),
    Operator(
        name="focus_mask_attention",
        torch_op=torch.ops.focus.mask_attention.default,
        inputs=("query", "mask", "key_vectors", "value_vectors", "query_grid", "extent"),
        outputs=(("out", "T"),),
        attributes=(("rope", "ints"), ("theta", "floats")),
        body=MASK,
        translate=_mask_attention,
    ),
)


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return what torch.onnx.export maps our torch ops to; declares their schemas first."""
    for operator in OPERATORS:
        _declare(operator)
    return {operator.torch_op: operator.translate for operator in OPERATORS}


def _declare(operator: Operator) -> None:
    if defs.has(operator.name, DOMAIN):
        return
    kinds = {"ints": defs.OpSchema.AttrType.INTS, "floats": defs.OpSchema.AttrType.FLOATS}
    attributes = [
        defs.OpSchema.Attribute(name, kinds[kind], required=True)
        for name, kind in operator.attributes
    ]
    attributes += [
        defs.OpSchema.Attribute(name, onnx.helper.make_attribute(name, value))
        for name, value in PLUGIN.items()
    ]
    grids = {"query_grid", "extent"}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    kinds_of = {name: "tensor(int64)" if name in grids else "" for name in operator.inputs}
    names = [name for name, kind in kinds_of.items() if not kind]
    typed = {name: f"T{number}" if number else "T" for number, name in enumerate(names)}
    defs.register_schema(
        defs.OpSchema(
            operator.name,
            DOMAIN,
            1,
            inputs=[
                defs.OpSchema.FormalParameter(name, kinds_of[name] or typed[name])
                for name in operator.inputs
            ],
            outputs=[defs.OpSchema.FormalParameter(name, kind) for name, kind in operator.outputs],
            type_constraints=[(kind, floats, "") for kind in typed.values()],
            attributes=attributes,
        )
    )
