"""ONNX operators that TensorRT's parser documents, and the restrictions that concern us.

From the operator table of onnx-tensorrt (docs/operators.md, TensorRT 10.15 and later). An operator
that is not listed, and one used in a way that is documented as unsupported, makes export and
`focus verify` fail.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, helper

# fmt: off
SUPPORTED = frozenset((
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "Attention", "AveragePool", "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip",
    "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum",
    "DeformConv", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal",
    "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater",
    "GreaterOrEqual", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax",
    "Identity", "If", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop",
    "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization",
    "Min", "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "RNN", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence",
    "RoiAlign", "RotaryEmbedding", "Round", "STFT", "Scan", "ScatterElements", "ScatterND", "Selu",
    "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus",
    "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh",
    "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
    "Upsample", "Where", "Xor",
))
# fmt: on


def restrictions(model: ModelProto) -> list[str]:
    """Return what in a graph TensorRT documents as unsupported, once each."""
    bodies = (node for function in model.functions for node in function.node)
    return sorted({r for node in (*model.graph.node, *bodies) for r in _reasons(node)})


def _reasons(node: NodeProto) -> Iterator[str]:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    if node.op_type == "Resize":
        if values.get("mode") == b"cubic":
            yield "Resize with mode cubic"
        if values.get("antialias"):
            yield "Resize with antialiasing"
    elif node.op_type == "Attention":
        if any(node.input[4:]) or any(node.output[1:]):
            yield "Attention with past or present keys"
        if values.get("softcap"):
            yield "Attention with softcap"
    elif node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "LayerNormalization with several outputs"
    elif node.op_type == "ScatterND" and values.get("reduction", b"none") != b"none":
        yield "ScatterND with a reduction"
