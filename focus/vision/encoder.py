"""The two image encoders of paper 3.1."""

from focus.vision.hierarchical import HierarchicalEncoder
from focus.vision.vanilla import VanillaEncoder, from_qwen2_vl, qwen2_vl_names

__all__ = ["HierarchicalEncoder", "VanillaEncoder", "from_qwen2_vl", "qwen2_vl_names"]
