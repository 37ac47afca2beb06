"""What others reported on the protocols, each with its conditions and its source.

A row is `checked` if its figures were compared with the source named, and otherwise recalled: right as far as known,
and not to be quoted from here. A figure is comparable only with one of the same setting.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Setting = Literal["zero-shot", "zero-shot, re-ranked", "fine-tuned", "fine-tuned, re-ranked"]
TrainingList = Literal["", "7k", "9k"]

RECALLED = "recalled, not re-checked"
SETTINGS = (
    "Compare within a setting: re-ranked means with dual softmax, or a cross-encoder over the first candidates; on 7k "
    "or 9k: trained on that list of MSR-VTT, where it is known."
)


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
    training_list: of MSR-VTT's, what a model fine-tuned for 1k-A was trained on; empty where that is not known.
    """

    protocol: str
    model: str
    setting: Setting
    text_to_item: tuple[float | None, float | None, float | None]
    source: str
    item_to_text: tuple[float | None, float | None, float | None] = (None, None, None)
    checked: bool = False
    training_list: TrainingList = ""

    @property
    def conditions(self) -> str:
        """The setting, and the list where it is known: "fine-tuned on 9k"."""
        trained = f"fine-tuned on {self.training_list}" if self.training_list else "fine-tuned"
        return self.setting.replace("fine-tuned", trained)


_COTS = "Lu et al., COTS, CVPR 2022 (arXiv:2204.07441)"
_CLIP4CLIP = "Luo et al., CLIP4Clip, 2021 (arXiv:2104.08860)"
_XCLIP = "Ma et al., X-CLIP, ACM MM 2022 (arXiv:2207.07285), abstract"
_VIP = "Xue et al., CLIP-ViP, ICLR 2023 (arXiv:2209.06430)"
_SIGLIP2 = "Tschannen et al., SigLIP 2, 2025 (arXiv:2502.14786), checkpoint table of its release"
_SIGLIP2_PAPER = "Tschannen et al., SigLIP 2, 2025 (arXiv:2502.14786), table 1"
_PE = "Bolya et al., Perception Encoder, 2025 (arXiv:2504.13181), tables 5 and 6"
_CLIP = "Radford et al., CLIP, ICML 2021 (arXiv:2103.00020), table 13"
_ALIGN = "Jia et al., ALIGN, ICML 2021 (arXiv:2102.05918), table 1"
_FILIP = "Yao et al., FILIP, ICLR 2022 (arXiv:2111.07783), as in table 5 of BLIP-2 (arXiv:2301.12597)"
_VSE = "Chen et al., VSE infinity, CVPR 2021 (arXiv:2011.04305), results of its release"
_CE = "Liu et al., Collaborative Experts, BMVC 2019 (arXiv:1907.13487), results of its release"
_CLIP2VIDEO = "Fang et al., CLIP2Video, 2021 (arXiv:2106.11097)"
_INTERNVIDEO2 = "Wang et al., InternVideo2, ECCV 2024 (arXiv:2403.15377)"
_ZOO = f"{_INTERNVIDEO2}, model zoo of its release"
_IV2: Setting = "zero-shot, re-ranked"  # its second stage rescores the first candidates with a cross-encoder
_LEADERBOARD = "as on Papers with Code"

REFERENCES: tuple[Reference, ...] = (
    Reference(
        "flickr30k_1k", "COTS (15.3M pairs)", "fine-tuned", (76.5, 93.9, 96.6), f"{_COTS}, table 1", (90.6, 98.7, 99.7)
    ),
    Reference("flickr30k_1k", "CLIP ViT-L/14 336", "zero-shot", (68.7, 90.6, 95.2), _CLIP, (88.0, 98.7, 99.4), True),
    Reference("flickr30k_1k", "ALIGN", "zero-shot", (75.7, 93.8, 96.8), _ALIGN, (88.6, 98.7, 99.7), True),
    Reference("flickr30k_1k", "FILIP ViT-L/14", "zero-shot", (75.0, 93.4, 96.3), _FILIP, (89.8, 99.2, 99.8), True),
    Reference(
        "flickr30k_1k", "SigLIP 2 B/16 256", "zero-shot", (81.7, None, None), _SIGLIP2_PAPER, (94.4, None, None), True
    ),
    Reference(
        "flickr30k_1k", "SigLIP 2 L/16 384", "zero-shot", (85.0, None, None), _SIGLIP2_PAPER, (95.2, None, None), True
    ),
    Reference(
        "flickr30k_1k",
        "SigLIP 2 So400m/14 384",
        "zero-shot",
        (85.7, None, None),
        _SIGLIP2_PAPER,
        (94.9, None, None),
        True,
    ),
    Reference(
        "flickr30k_1k",
        "SigLIP 2 g-opt/16 384",
        "zero-shot",
        (86.0, None, None),
        _SIGLIP2_PAPER,
        (95.4, None, None),
        True,
    ),
    Reference("flickr30k_1k", "PE core B/16 224", "zero-shot", (80.8, None, None), _PE, (94.4, None, None), True),
    Reference("flickr30k_1k", "PE core L/14 336", "zero-shot", (85.5, None, None), _PE, (96.6, None, None), True),
    Reference("flickr30k_1k", "PE core G/14 448", "zero-shot", (85.7, None, None), _PE, (96.2, None, None), True),
    Reference("flickr30k_1k", "VSE infinity WSL", "fine-tuned", (74.2, 93.7, None), _VSE, (88.4, 98.3, None), True),
    Reference("flickr30k_1k", "ALIGN", "fine-tuned", (84.9, 97.4, 98.6), _ALIGN, (95.3, 99.8, 100.0), True),
    Reference(
        "coco_5k", "COTS (15.3M pairs)", "fine-tuned", (52.4, 79.0, 86.9), f"{_COTS}, table 1", (69.0, 90.4, 94.9)
    ),
    Reference("coco_5k", "SigLIP 2 B/16 256", "zero-shot", (53.2, None, None), _SIGLIP2, (69.7, None, None), True),
    Reference("coco_5k", "SigLIP 2 L/16 384", "zero-shot", (55.3, None, None), _SIGLIP2, (71.4, None, None), True),
    Reference("coco_5k", "SigLIP 2 So400m/16 384", "zero-shot", (56.0, None, None), _SIGLIP2, (71.2, None, None), True),
    Reference("coco_5k", "SigLIP 2 g-opt/16 384", "zero-shot", (56.1, None, None), _SIGLIP2, (72.8, None, None), True),
    Reference("coco_5k", "PE core B/16 224", "zero-shot", (50.9, None, None), _PE, (71.0, None, None), True),
    Reference("coco_5k", "PE core L/14 336", "zero-shot", (57.1, None, None), _PE, (75.9, None, None), True),
    Reference("coco_5k", "PE core G/14 448", "zero-shot", (58.1, None, None), _PE, (75.4, None, None), True),
    Reference("coco_5k", "CLIP ViT-L/14 336", "zero-shot", (37.8, 62.4, 72.2), _CLIP, (58.4, 81.5, 88.1), True),
    Reference("coco_5k", "ALIGN", "zero-shot", (45.6, 69.8, 78.6), _ALIGN, (58.6, 83.0, 89.7), True),
    Reference("coco_5k", "ALIGN", "fine-tuned", (59.9, 83.3, 89.8), _ALIGN, (77.0, 93.5, 96.9), True),
    Reference("coco_5k", "FILIP ViT-L/14", "fine-tuned", (61.2, 84.3, 90.6), _FILIP, (78.9, 94.4, 97.4), True),
    Reference("coco_1k_5fold", "SCAN", "fine-tuned", (58.8, 88.4, None), _VSE, (72.7, 94.8, None), True),
    Reference("coco_1k_5fold", "VSRN (ensemble)", "fine-tuned", (62.8, 89.7, None), _VSE, (76.2, 94.8, None), True),
    Reference(
        "coco_1k_5fold", "VSE infinity BUTD region", "fine-tuned", (64.8, 91.4, None), _VSE, (79.7, 96.4, None), True
    ),
    Reference("coco_1k_5fold", "VSE infinity WSL", "fine-tuned", (72.0, 93.9, None), _VSE, (84.5, 98.1, None), True),
    Reference("msrvtt_full", "Collaborative Experts", "fine-tuned", (10.0, 29.0, 41.2), _CE, (15.6, 40.9, 55.2), True),
    Reference(
        "msrvtt_full", "CLIP2Video", "fine-tuned", (29.8, None, None), f"{_CLIP2VIDEO}, {_LEADERBOARD}", checked=True
    ),
    Reference(
        "msrvtt_1ka", "Collaborative Experts", "fine-tuned", (20.9, 48.8, 62.4), _CE, (20.6, 50.3, 64.0), True, "9k"
    ),
    Reference("msrvtt_1ka", "COTS (15.3M pairs)", "fine-tuned", (36.8, 63.8, 73.2), f"{_COTS}, MSR-VTT table"),
    Reference(
        "msrvtt_1ka",
        "CLIP4Clip meanP ViT-B/32",
        "fine-tuned",
        (43.1, 70.4, 80.8),
        f"{_CLIP4CLIP}, table 1",
        training_list="9k",
    ),
    Reference(
        "msrvtt_1ka",
        "CLIP4Clip seqTransf ViT-B/32",
        "fine-tuned",
        (44.5, None, None),
        f"{_CLIP4CLIP}, {_LEADERBOARD}",
        checked=True,
        training_list="9k",
    ),
    Reference(
        "msrvtt_1ka", "X-CLIP ViT-B/16", "fine-tuned", (49.3, None, None), _XCLIP, checked=True, training_list="9k"
    ),
    Reference(
        "msrvtt_1ka",
        "CLIP-ViP ViT-B/16",
        "fine-tuned",
        (54.2, None, None),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
        training_list="9k",
    ),
    Reference(
        "msrvtt_1ka",
        "CLIP-ViP ViT-B/16 + dual softmax",
        "fine-tuned, re-ranked",
        (57.7, None, None),
        f"{_VIP}, {_LEADERBOARD}",
        checked=True,
        training_list="9k",
    ),
    Reference("msrvtt_1ka", "PE core B/16 224", "zero-shot", (47.6, None, None), _PE, (47.3, None, None), True),
    Reference("msrvtt_1ka", "PE core L/14 336", "zero-shot", (50.3, None, None), _PE, (50.1, None, None), True),
    Reference("msrvtt_1ka", "PE core G/14 448", "zero-shot", (51.2, None, None), _PE, (49.9, None, None), True),
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
