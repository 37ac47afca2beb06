"""What each rule of the noise filter leaves out, of captions that are right and of ones that are not.

    python benchmarks/noise_filter.py --shards 'train-*.tar' --shards 'val-*.tar' --shards gallery.tar [--json OUT]

A model's similarities of pictures with their own captions, of which a share gives way to similarities with captions
of other pictures, fill the filter's queue. Of pairs that the model was trained on it is sure, as momentum towers are
near the end of a training; of others it is as they are in the midst of one. At last all shards are taken together, as a
training on several sources has them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from run_facts import run_facts, shortened
from torch import Tensor

from cots.config import NoiseFilterConfig, SourceConfig
from cots.model.pretrained import load_model
from cots.model.retrieval_model import RetrievalModel
from cots.objectives.noise_filter import NoiseFilter
from pretrain.pair_sources import open_source

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
RULES: dict[str, dict[str, Any]] = {
    "half a deviation": {"deviations": 0.5},
    "one deviation": {"deviations": 1.0},
    "mixture": {"rule": "mixture"},
}
BATCH = 64


def similarities(model: RetrievalModel, shards: str, pictures: int, captions: int) -> tuple[Tensor, Tensor]:
    """(pictures * captions,) each: of captions with their own pictures, and with the next one's. Pictures that have
    fewer captions are left out."""
    source = open_source(SourceConfig(path=shards))
    images: list[Tensor] = []
    texts: list[str] = []
    pixels: list[Tensor] = []
    for index in range(min(pictures, len(source))):
        pair = source.read(index)
        if len(pair.captions) < captions or pair.is_clip:
            continue
        pixels.append(model.transform(pair.frames(1)[0]))
        texts += pair.captions[:captions]
        if len(pixels) == BATCH:
            images.append(model.encode_images(torch.stack(pixels)))
            pixels.clear()
    if pixels:
        images.append(model.encode_images(torch.stack(pixels)))
    image = torch.cat(images).repeat_interleave(captions, dim=0)
    text = torch.cat([model.encode_texts(texts[at : at + BATCH]) for at in range(0, len(texts), BATCH)])
    return (image * text).sum(dim=1), (image * text.roll(captions, dims=0)).sum(dim=1)


def judged(right: Tensor, wrong: Tensor, share: float, rule: dict[str, Any]) -> dict[str, float]:
    """The threshold, -1 if there is none, and the shares that it leaves out, where `share` of the pairs are wrong."""
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    count = round(share * len(right))
    strangers = wrong[order[:BATCH]]
    right, wrong = right[order[count:]], wrong[order[:count]]
    noise_filter = NoiseFilter(NoiseFilterConfig(queue_size=len(order), **rule))
    noise_filter.similarities.copy_(torch.cat([right, wrong]))
    noise_filter.fill.fill_(len(order))
    threshold = noise_filter.threshold().item()
    if "rule" in rule:
        found, end = noise_filter.lower_hill(strangers)
        threshold = end.item() if found else -1.0
    left_out = {"right": (right < threshold).float().mean().item()}
    if count:
        left_out["wrong"] = (wrong < threshold).float().mean().item()
    return {"threshold": threshold, **left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", action="append", required=True, help="webdataset shards; may be given again")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--pictures", type=int, default=3000, help="of each")
    parser.add_argument("--captions", type=int, default=2, help="of each picture")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    document: dict[str, Any] = run_facts() | {"model": arguments.model, "rows": []}
    found = {each: similarities(model, each, arguments.pictures, arguments.captions) for each in arguments.shards}
    if len(found) > 1:
        right, wrong = (torch.cat(parts) for parts in zip(*found.values()))
        found["all together"] = right, wrong
    for shards, (right, wrong) in found.items():
        print(f"{shards}: {len(right)} captions {right.mean():.2f} ± {right.std():.2f}, others' {wrong.mean():.2f}")
        for share in SHARES:
            line = f"  {share:4.0%} wrong"
            for name, rule in RULES.items():
                row = judged(right, wrong, share, rule)
                told = {"shards": shortened(shards, Path.cwd()), "captions": len(right), "share": share, "rule": name}
                document["rows"].append({**told, **row})
                caught = f" and {row['wrong']:.0%} of the wrong" if "wrong" in row else ""
                line += f"   {name}: {row['right']:.1%} of the right{caught}"
            print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
