"""The predictor with ground-truth-like queries: its own heads give back the truth, IoU 1.

Nothing is trained. The features of the finest scale say for every cell which object it shows, every
query says which object it asks for and of which class that is, and weights written by hand let both
through: lateral and output convolutions and the mask projection of the pixel decoder, the layers of
the masked decoder as residual paths, its mask head, the score heads. A slip in any of those paths
(an index, a norm, a transposition, an upsampling by half a cell) moves a mask.
"""

# O objects (one query each), K classes, h w mask grid

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.data.scenes import clip
from focus.config import HierarchicalConfig, SegmentConfig
from focus.segment.infer import Thresholds, decode, panoptic, row_of, semantic
from focus.segment.loss import segmentation_losses
from focus.segment.predictor import Kind, Prediction, SegmentationPredictor

OBJECTS = 5
DIM = 64  # of the predictor, the finest scale and the states
SHARP = 8.0
CLASSES = DIM // 2  # first channel of a state that says a class
CONFIG = SegmentConfig(
    dim=DIM,
    num_queries=OBJECTS,
    num_heads=4,
    encoder_layers=1,
    encoder_ffn_dim=32,
    decoder_layers=2,
    decoder_ffn_dim=32,
)


def passing(conv: nn.Module) -> None:
    """Make a linear layer or a convolution hand its input on."""
    weight = conv.get_parameter("weight")
    weight.zero_()
    middle = (
        weight if weight.dim() == 2 else weight[..., weight.shape[-1] // 2, weight.shape[-1] // 2]
    )
    middle.fill_diagonal_(1.0)
    if getattr(conv, "bias", None) is not None:
        conv.get_parameter("bias").zero_()


def silent(module: nn.Module) -> None:
    """Make a layer on a residual path add nothing."""
    for parameter in module.parameters():
        parameter.zero_()


@torch.no_grad()
def written() -> SegmentationPredictor:
    """A predictor whose weights let what the features and queries say through."""
    torch.manual_seed(0)
    model = SegmentationPredictor(CONFIG, HierarchicalConfig(dims=(DIM, 8, 12, 16)), DIM).eval()
    pixels, decoder = model.pixel_decoder, model.decoder
    silent(pixels.encoder.layers[-1].final_layer_norm)  # coarse scales add nothing
    for conv in (pixels.adapter_1[0], pixels.layer_1[0], pixels.mask_projection):
        passing(conv)
    for layer in decoder.layers:
        for branch in (layer.self_attn.out_proj, layer.cross_attn.out_proj, layer.fc2):
            silent(branch)
    silent(model.query_position)
    linears = [model.query_content, *model.condition.values()]
    linears += [m for m in model.score.modules() if isinstance(m, nn.Linear)]
    mask_head = [m for m in decoder.mask_predictor.modules() if isinstance(m, nn.Linear)]
    linears += mask_head
    for linear in linears:
        passing(linear)
    # A query looks for the cells that its object's channel marks, against those it leaves out.
    last = mask_head[-1].weight
    last.zero_()
    for number in range(OBJECTS):
        last[2 * number, number], last[2 * number + 1, number] = SHARP, -SHARP
    model.background.zero_()
    return model


def features(truth: Tensor) -> list[Tensor]:
    """Maps [1, C, ...] whose finest tells in channels 2 o and 2 o + 1 where object o is and is not.

    truth: [O, h, w] bool. The coarser maps are noise.
    """
    height, width = truth.shape[-2:]
    finest = torch.zeros(1, DIM, height, width)
    finest[0, 0 : 2 * OBJECTS : 2] = truth.float() * 2 - 1
    finest[0, 1 : 2 * OBJECTS : 2] = 1 - truth.float() * 2
    noise = [torch.randn(1, c, height >> i, width >> i) for i, c in ((1, 8), (2, 12), (3, 16))]
    return [finest, *noise]


def asking(order: list[int], labels: list[int]) -> Tensor:
    """States [1, O, DIM] of queries that ask for objects `order`, of classes `labels[object]`."""
    states = torch.zeros(1, len(order), DIM)
    for query, number in enumerate(order):
        states[0, query, number] = 4.0
        states[0, query, CLASSES + labels[number]] = 4.0
    return states


def named(num: int) -> Tensor:
    """States [1, K, DIM] of the class names."""
    states = torch.zeros(1, num, DIM)
    states[0, :, CLASSES : CLASSES + num] = torch.eye(num) * 4
    return states


def scene_truth() -> tuple[Tensor, list[int]]:
    """The objects of a drawn scene on the mask grid [O, 32, 32], and a class of each."""
    for index in range(100):
        found = clip("val", 0, index, 1, (32, 32))
        if len(found.scenes[0].objects) == OBJECTS:
            masks = [torch.from_numpy(found.masks(i)[0]) for i in range(OBJECTS)]
            shapes = [item.shape for item in found.scenes[0].objects]
            kinds = sorted(set(shapes))
            if all(mask.sum() > 8 for mask in masks) and 1 < len(kinds) < OBJECTS:
                return torch.stack(masks), [kinds.index(shape) for shape in shapes]
    raise AssertionError("no such scene")


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@torch.no_grad()
def predict(truth: Tensor, order: list[int], labels: list[int], kind: Kind = "class") -> Prediction:
    names = named(max(labels) + 1)
    found: Prediction = written()(features(truth), asking(order, labels), names, kind)
    return found


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_truth_like_queries_give_the_true_masks_and_classes(order: list[int]) -> None:
    truth, labels = scene_truth()
    found = predict(truth, order, labels)
    asked = truth[order]
    sets = [*found.auxiliary, (found.masks, found.scores)]
    assert len(sets) == CONFIG.decoder_layers + 1
    for masks, scores in sets:  # every prediction set, the undecoded queries among them
        for query in range(OBJECTS):
            assert iou(masks[0, query] > 0, asked[query]) == 1.0
        assert scores[0].argmax(-1).tolist() == [labels[number] for number in order]
    wrong = [iou(found.masks[0, q] > 0, truth[o]) for q, o in enumerate(order[1:] + order[:1])]
    assert max(wrong) < 0.5  # the right answer is no accident


def test_decoding_rules_return_the_true_picture() -> None:
    truth, labels = scene_truth()
    found = predict(truth, [0, 1, 2, 3, 4], labels)
    row = row_of(found, 0, max(labels) + 1, "class")
    limits = Thresholds(object=0.5)
    whole = panoptic(row, thresholds=limits)
    assert sorted(whole.queries.tolist()) == list(range(OBJECTS))
    assert whole.labels.tolist() == [labels[query] for query in whole.queries.tolist()]
    for mask, query in zip(whole.masks, whole.queries.tolist(), strict=True):
        assert iou(mask[2::4, 2::4], truth[query]) == 1.0  # one pixel of each cell
    classes = semantic(row)[2::4, 2::4]
    for label in set(labels):
        same = torch.stack([t for t, own in zip(truth, labels, strict=True) if own == label])
        assert torch.equal(classes == label, same.any(0))


def test_bands_come_back_to_the_last_pixel() -> None:
    """Straight edges survive the fourfold enlargement: IoU 1 at the picture's own size."""
    truth = torch.zeros(OBJECTS, 32, 32, dtype=torch.bool)
    for number, (first, last) in enumerate(((0, 5), (5, 13), (13, 14), (14, 28), (28, 32))):
        truth[number, :, first:last] = True
    found = predict(truth, [0, 1, 2, 3, 4], [0, 1, 0, 1, 0])
    (whole,) = decode(found, "class", [2], thresholds=Thresholds(object=0.5))
    assert len(whole) == OBJECTS
    for mask, query in zip(whole.masks, whole.queries.tolist(), strict=True):
        assert iou(mask, truth[query].repeat_interleave(4, 0).repeat_interleave(4, 1)) == 1.0


def test_losses_of_the_truth_are_small_and_of_a_shifted_truth_are_not() -> None:
    truth, labels = scene_truth()
    found = predict(truth, [4, 2, 0, 1, 3], labels)
    targets = torch.tensor([labels]), torch.tensor([max(labels) + 1])
    torch.manual_seed(0)
    right = segmentation_losses(found, truth[None], *targets, "class", num_points=512)
    moved = truth.roll(4, dims=-1)[None]
    wrong = segmentation_losses(found, moved, *targets, "class", num_points=512)
    sets = CONFIG.decoder_layers + 1
    assert float(right["dice"]) < 0.2 * 5 * sets < float(wrong["dice"])
    assert float(right["bce"]) < 0.2 * float(wrong["bce"])


@pytest.mark.parametrize("kind", ["text", "region"])
def test_expressions_and_regions_pick_their_own_object(kind: Kind) -> None:
    truth, _ = scene_truth()
    labels = list(range(OBJECTS))  # every object is one candidate
    found = predict(truth, [2, 0, 1, 4, 3], labels, kind)
    for candidate in range(OBJECTS):
        query = int(found.scores[0, :, candidate].argmax())
        assert iou(found.masks[0, query] > 0, truth[candidate]) == 1.0
