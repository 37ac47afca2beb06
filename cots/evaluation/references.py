"""What others reported on the protocols, each with its conditions and its source.

A row is `checked` if its figures were compared with the source named, and otherwise recalled: right as far as known,
and not to be quoted from here. A figure is comparable only with one of the same setting.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Setting = Literal["zero-shot", "zero-shot, re-ranked", "fine-tuned", "fine-tuned, re-ranked"]

RECALLED = "recalled, not re-checked"


@dataclass(frozen=True)
class Reference:
    """Attributes:
    protocol: its name.
    model: as its authors call it.
    setting: zero-shot, or fine-tuned on the dataset's training split; re-ranked: with dual softmax, or with a
        cross-encoder over the first candidates.
    text_to_item, item_to_text: R@1, R@5, R@10 in percent; None where not reported or not known.
    source: paper and table.
    checked: whether the figures were compared with a copy of the source.
    """

    protocol: str
    model: str
    setting: Setting
    text_to_item: tuple[float | None, float | None, float | None]
    source: str
    item_to_text: tuple[float | None, float | None, float | None] = (None, None, None)
    checked: bool = False


_COTS = "Lu et al., COTS, CVPR 2022 (arXiv:2204.07441)"
_CLIP4CLIP = "Luo et al., CLIP4Clip, 2021 (arXiv:2104.08860)"
_XCLIP = "Ma et al., X-CLIP, ACM MM 2022 (arXiv:2207.07285), abstract"
_VIP = "Xue et al., CLIP-ViP, ICLR 2023 (arXiv:2209.06430)"
_SIGLIP2 = "Tschannen et al., SigLIP 2, 2025 (arXiv:2502.14786), checkpoint table of its release"
_PE = "Bolya et al., Perception Encoder, 2025 (arXiv:2504.13181), PE core table of its release"
_INTERNVIDEO2 = "Wang et al., InternVideo2, ECCV 2024 (arXiv:2403.15377)"
_ZOO = f"{_INTERNVIDEO2}, model zoo of its release"
_IV2: Setting = "zero-shot, re-ranked"  # its second stage rescores the first candidates with a cross-encoder
_LEADERBOARD = "as on Papers with Code"

REFERENCES: tuple[Reference, ...] = (
    Reference(
        "flickr30k_1k", "COTS (15.3M pairs)", "fine-tuned", (76.5, 93.9, 96.6), f"{_COTS}, table 1", (90.6, 98.7, 99.7)
    ),
    Reference(
        "coco_5k", "COTS (15.3M pairs)", "fine-tuned", (52.4, 79.0, 86.9), f"{_COTS}, table 1", (69.0, 90.4, 94.9)
    ),
    Reference("coco_5k", "SigLIP 2 B/16 256", "zero-shot", (53.2, None, None), _SIGLIP2, (69.7, None, None), True),
    Reference("coco_5k", "SigLIP 2 L/16 384", "zero-shot", (55.3, None, None), _SIGLIP2, (71.4, None, None), True),
    Reference("coco_5k", "SigLIP 2 So400m/16 384", "zero-shot", (56.0, None, None), _SIGLIP2, (71.2, None, None), True),
    Reference("coco_5k", "SigLIP 2 g-opt/16 384", "zero-shot", (56.1, None, None), _SIGLIP2, (72.8, None, None), True),
    Reference("coco_5k", "PE core B/16 224", "zero-shot", (50.9, None, None), _PE, checked=True),
    Reference("coco_5k", "PE core L/14 336", "zero-shot", (57.1, None, None), _PE, checked=True),
    Reference("coco_5k", "PE core G/14 448", "zero-shot", (58.1, None, None), _PE, checked=True),
    Reference("msrvtt_1ka", "COTS (15.3M pairs)", "fine-tuned", (36.8, 63.8, 73.2), f"{_COTS}, MSR-VTT table"),
    Reference("msrvtt_1ka", "CLIP4Clip meanP ViT-B/32", "fine-tuned", (43.1, 70.4, 80.8), f"{_CLIP4CLIP}, table 1"),
    Reference(
        "msrvtt_1ka",
        "CLIP4Clip seqTransf ViT-B/32",
        "fine-tuned",
        (44.5, None, None),
        f"{_CLIP4CLIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference("msrvtt_1ka", "X-CLIP ViT-B/16", "fine-tuned", (49.3, None, None), _XCLIP, checked=True),
    Reference(
        "msrvtt_1ka", "CLIP-ViP ViT-B/16", "fine-tuned", (54.2, None, None), f"{_VIP}, {_LEADERBOARD}", checked=True
    ),
    Reference(
        "msrvtt_1ka",
        "CLIP-ViP ViT-B/16 + dual softmax",
        "fine-tuned, re-ranked",
        (57.7, None, None),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference("msrvtt_1ka", "PE core B/16 224", "zero-shot", (47.6, None, None), _PE, checked=True),
    Reference("msrvtt_1ka", "PE core L/14 336", "zero-shot", (50.3, None, None), _PE, checked=True),
    Reference("msrvtt_1ka", "PE core G/14 448", "zero-shot", (51.2, None, None), _PE, checked=True),
    Reference("msrvtt_1ka", "InternVideo2 s2 6B", _IV2, (55.9, None, None), _ZOO, (53.7, None, None), True),
    Reference("msvd", "InternVideo2 s2 6B", _IV2, (59.3, None, None), _ZOO, (83.1, None, None), True),
    Reference("didemo", "InternVideo2 s2 6B", _IV2, (57.9, None, None), _ZOO, (57.1, None, None), True),
    Reference("lsmdc", "InternVideo2 s2 6B", _IV2, (33.8, None, None), _ZOO, (30.1, None, None), True),
    Reference("msvd", "CLIP4Clip meanP ViT-B/32", "fine-tuned", (46.2, 76.1, 84.6), f"{_CLIP4CLIP}, table 2"),
    Reference("msvd", "X-CLIP ViT-B/16", "fine-tuned", (50.4, None, None), _XCLIP, checked=True),
    Reference(
        "didemo",
        "CLIP4Clip meanP ViT-B/32",
        "fine-tuned",
        (43.4, 70.2, 80.6),
        f"{_CLIP4CLIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference("didemo", "X-CLIP ViT-B/16", "fine-tuned", (47.8, None, None), _XCLIP, checked=True),
    Reference("didemo", "CLIP-ViP ViT-B/16", "fine-tuned", (50.5, 78.4, 87.1), f"{_VIP}, retrieval tables"),
    Reference(
        "didemo",
        "CLIP-ViP ViT-B/16 + dual softmax",
        "fine-tuned, re-ranked",
        (55.3, 82.0, 89.3),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference(
        "lsmdc",
        "CLIP4Clip meanP ViT-B/32",
        "fine-tuned",
        (20.7, 38.9, 47.2),
        f"{_CLIP4CLIP}, table 3",
    ),
    Reference("lsmdc", "X-CLIP ViT-B/16", "fine-tuned", (26.1, None, None), _XCLIP, checked=True),
    Reference("lsmdc", "CLIP-ViP ViT-B/16", "fine-tuned", (29.4, None, None), f"{_VIP}, {_LEADERBOARD}", checked=True),
    Reference(
        "lsmdc",
        "CLIP-ViP ViT-B/16 + dual softmax",
        "fine-tuned, re-ranked",
        (30.7, None, None),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference(
        "activitynet",
        "CLIP4Clip meanP ViT-B/32",
        "fine-tuned",
        (40.5, 73.4, None),
        f"{_CLIP4CLIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference("activitynet", "X-CLIP ViT-B/16", "fine-tuned", (46.2, None, None), _XCLIP, checked=True),
    Reference(
        "activitynet", "CLIP-ViP ViT-B/16", "fine-tuned", (53.4, None, None), f"{_VIP}, {_LEADERBOARD}", checked=True
    ),
    Reference(
        "activitynet",
        "CLIP-ViP ViT-B/16 + dual softmax",
        "fine-tuned, re-ranked",
        (61.4, 85.7, 92.6),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
    ),
    Reference(
        "activitynet",
        "InternVideo2 s2 6B",
        _IV2,
        (63.2, 85.6, 92.5),
        f"{_INTERNVIDEO2}, {_LEADERBOARD}",
        (56.5, 82.8, 90.3),
        True,
    ),
    Reference(
        "activitynet",
        "InternVideo2 s2 6B",
        "fine-tuned, re-ranked",
        (74.1, None, None),
        f"{_INTERNVIDEO2}, {_LEADERBOARD}",
        (69.7, None, None),
        True,
    ),
)


def references(protocol: str) -> list[Reference]:
    """The rows of a protocol, by their setting."""
    order = get_args(Setting)
    return sorted((row for row in REFERENCES if row.protocol == protocol), key=lambda row: order.index(row.setting))
