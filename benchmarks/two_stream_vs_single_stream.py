"""The time to rank captions x images: two streams that meet in a product, or every pair through one transformer.

    python benchmarks/two_stream_vs_single_stream.py                                  # 5,000 captions x 1,000 images
    python benchmarks/two_stream_vs_single_stream.py --device cpu --batch 8 --sample 32 --pairs 64 --pair-batch 8

Dual encoder: ViT-B/16 at 224 px and BERT-base (the paper's size, random weights: time does not depend on them) encode
each image and each caption once; ranking is one matrix product and the ten best of each row.

Single stream, for every pair: by default the same towers, whose tokens go together through a joint transformer of six
layers (as ALBEF's; Li et al. 2021). The towers' tokens are computed once and kept, which favours the single stream.
With `--joint-layers 12 --embed-pairs` it is one transformer from patches and words on (as UNITER and ViLT), as deep and
wide as a tower. Its time is measured on a sample of pairs and extrapolated, linear in the number of pairs; the time of
half the sample is printed beside it as a check.

The COTS paper (Lu et al., CVPR 2022) reports a single-stream model to be 10,800 times slower. A query over N items is
timed on vectors drawn at random; its single-stream time is N pairs, extrapolated.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from run_facts import run_facts
from torch import Tensor, nn

from cots.config import ModelConfig
from cots.model.dual_encoder import DualEncoder

CAPTION_TOKENS = 32
IMAGE = 224
WIDTH = 768
PAPER = 10_800


class JointTransformer(nn.Module):
    """Patches (B, 197, 768) and words (B, L, 768) in one sequence -> (B,) scores."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.start = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, patches: Tensor, words: Tensor) -> Tensor:
        joined = torch.cat([self.start.expand(len(patches), -1, -1), patches, words], dim=1)
        return self.score(self.encoder(joined)[:, 0]).squeeze(1)


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats` runs after a first one."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures, in seconds unless named otherwise."""
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = ModelConfig.model_validate({"image_tower": {"name": "vit_base_patch16_224"}, "text_tower": {}})
    encoder = DualEncoder(config).eval().to(device)
    joint = JointTransformer(given.joint_layers).eval().to(device, dtype)
    images = torch.randint(0, 256, (given.batch, 3, IMAGE, IMAGE), dtype=torch.uint8, device=device)
    captions = torch.randint(5, 30_000, (given.batch, CAPTION_TOKENS), device=device)
    autocast = torch.autocast(device.type, dtype, enabled=device.type == "cuda")

    def many(work: Callable[[], Any], batches: int) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(batches):
                work()

        return repeat

    batches = given.sample // given.batch
    encoded = batches * given.batch
    results: dict[str, Any] = {}
    with torch.inference_mode(), autocast:
        image_seconds = seconds(many(lambda: encoder.encode_image(images), batches), device, given.repeats) / encoded
        text_seconds = seconds(many(lambda: encoder.encode_text(captions), batches), device, given.repeats) / encoded
        one = captions[:1]
        query_encode = seconds(lambda: encoder.encode_text(one), device, max(5, given.repeats))
        pair_batches = given.pairs // given.pair_batch
        half_batches = pair_batches // 2
        patches = torch.randn(given.pair_batch, 196, WIDTH, device=device, dtype=dtype)
        words = torch.randn(given.pair_batch, CAPTION_TOKENS, WIDTH, device=device, dtype=dtype)
        whole = seconds(many(lambda: joint(patches, words), pair_batches), device, given.repeats)
        half = seconds(many(lambda: joint(patches, words), half_batches), device, given.repeats)
    pair_seconds = whole / (pair_batches * given.pair_batch)
    vectors = torch.nn.functional.normalize(torch.randn(given.captions, 256, device=device), dim=1).to(dtype)
    gallery = torch.nn.functional.normalize(torch.randn(given.images, 256, device=device), dim=1).to(dtype)
    product = seconds(lambda: (vectors @ gallery.T).topk(10, dim=1), device, max(5, given.repeats))
    encoding = given.images * image_seconds + given.captions * text_seconds
    dual, pairs = encoding + product, given.captions * given.images
    towers = 0.0 if given.embed_pairs else encoding
    single = towers + pairs * pair_seconds
    results["ranking"] = {
        "captions": given.captions,
        "images": given.images,
        "dual_encode": encoding,
        "dual_product": product,
        "dual": dual,
        "pair_ms": 1000 * pair_seconds,
        "pairs_measured": pair_batches * given.pair_batch,
        "half_sample_pair_ms": 1000 * half / (half_batches * given.pair_batch),
        "single_extrapolated": single,
        "ratio_extrapolated": single / dual,
        "ratio_scoring_extrapolated": pairs * pair_seconds / product,
    }
    results["queries"] = [
        _query(size, query_encode, pair_seconds, device, dtype, given.repeats) for size in given.items
    ]
    return results


def _query(
    size: int, encode: float, pair_seconds: float, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """One sentence over `size` items whose vectors are there; an exact search by plain PyTorch."""
    gallery = torch.empty(size, 256, device=device, dtype=dtype)
    for part in gallery.split(1 << 20):  # without a copy of all in float32
        part.copy_(torch.nn.functional.normalize(torch.randn(len(part), 256, device=device), dim=1))
    query = torch.nn.functional.normalize(torch.randn(256, device=device), dim=0).to(dtype)
    search = seconds(lambda: (gallery @ query).topk(10), device, max(5, repeats))
    single = size * pair_seconds
    return {
        "items": size,
        "encode_ms": 1000 * encode,
        "search_ms": 1000 * search,
        "dual_ms": 1000 * (encode + search),
        "single_extrapolated": single,
        "ratio_extrapolated": single / (encode + search),
    }


def report(results: dict[str, Any], given: argparse.Namespace) -> str:
    """Markdown."""
    ranking = results["ranking"]
    kind = (
        "one transformer from patches and words" if given.embed_pairs else "a joint transformer on the towers' tokens"
    )
    lines = [
        f"{results['device']}, torch {torch.__version__}, {results['dtype']}, {results['date']}",
        f"single stream: {kind}, {given.joint_layers} layers; extrapolated (*) from {ranking['pairs_measured']} pairs "
        f"at {ranking['pair_ms']:.3f} ms (half of them: {ranking['half_sample_pair_ms']:.3f} ms)",
        "",
        f"| {ranking['captions']:,} captions x {ranking['images']:,} images | seconds |",
        "|---|---|",
        f"| dual encoder: encode all once | {ranking['dual_encode']:.3f} |",
        f"| dual encoder: product and ten best | {ranking['dual_product']:.5f} |",
        f"| dual encoder, all | {ranking['dual']:.3f} |",
        f"| single stream, all pairs* | {ranking['single_extrapolated']:,.0f} |",
        f"| ratio* (the paper's: {PAPER:,}) | {ranking['ratio_extrapolated']:,.0f} |",
        f"| ratio* once all is encoded | {ranking['ratio_scoring_extrapolated']:,.0f} |",
        "",
        "| one query over | encode ms | search ms | dual encoder ms | single stream s* | ratio* |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["queries"]:
        lines.append(
            f"| {row['items']:,} | {row['encode_ms']:.2f} | {row['search_ms']:.3f} | {row['dual_ms']:.2f} | "
            f"{row['single_extrapolated']:,.1f} | {row['ratio_extrapolated']:,.0f} |"
        )
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=int, default=5000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128, help="images or captions encoded at once")
    parser.add_argument("--sample", type=int, default=1024, help="images and captions encoded to time the towers")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs scored to time the single stream")
    parser.add_argument("--pair-batch", type=int, default=256)
    parser.add_argument("--joint-layers", type=int, default=6)
    parser.add_argument("--embed-pairs", action="store_true", help="the single stream has no towers whose work is kept")
    parser.add_argument("--items", nargs="*", type=int, default=[1000, 100_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    given = parser.parse_args()
    if min(given.batch, given.sample, given.pair_batch) < 1 or given.pairs < 2:
        parser.error("--batch, --sample and --pair-batch must be at least 1, and --pairs at least 2")
    given.batch = min(given.batch, given.sample)
    given.pair_batch = min(given.pair_batch, given.pairs // 2)
    facts = run_facts()
    results = measure(given)
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    results |= {
        "device": f"{name} ({platform.machine()})",
        "dtype": "bf16" if device.type == "cuda" else "fp32",
        "joint_layers": given.joint_layers,
        "embed_pairs": given.embed_pairs,
        **facts,
    }
    print(report(results, given))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
