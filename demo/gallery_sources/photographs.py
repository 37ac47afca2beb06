"""Photographs from packages, each under CC0, CC-BY, CC-BY-SA or in the public domain.

`photographs.tsv` names package, file, licence, author and captions; the captions were written while looking at the
picture. An empty licence means that licence and author are read from the package: from the README beside the picture
(gcompris packs its resources as Qt .rcc files and puts an attribution file into each) or from Debian's copyright file.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from demo.gallery_sources.item import Item, Tally, on_white, save_webp
from demo.gallery_sources.packages import GCOMPRIS, PHOTOGRAPHS, Package

LIST = Path(__file__).with_name("photographs.tsv")
LONGEST_SIDE = 320
QUALITY = 78
REDISTRIBUTABLE = re.compile(r"CC0-1\.0|CC-BY(-SA)?-[1-4]\.[05]|public domain")
FOLDERS = {
    "lomiri-wallpapers-16.04": "usr/share/backgrounds",
    "lomiri-wallpapers-20.04": "usr/share/backgrounds",
    "scikit-image": "skimage/data",
    "python3-sklearn": "usr/lib/python3/dist-packages/sklearn/datasets/images",
}


def read_rcc(path: Path) -> dict[str, bytes]:
    """The files in a Qt binary resource: path -> content.

    Layout (big endian): "qres", version, offsets of tree, data and names. A tree node is (name offset u32, flags u16)
    and then (children u32, first child u32) for a folder or (locale u32, data offset u32) for a file; 14 bytes, and
    since version 2 the time of change in 8 more. Data are (length u32, bytes); flag 1 means zlib after a u32.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, data, names = struct.unpack(">4I", blob[4:20])
    node_size = 14 if version < 2 else 22
    files: dict[str, bytes] = {}

    def walk(node: int, folder: str) -> None:
        name_at, flags, first, second = struct.unpack_from(">IHII", blob, tree + node * node_size)
        name = ""
        if node:
            (length,) = struct.unpack_from(">H", blob, names + name_at)
            name = blob[names + name_at + 6 :][: 2 * length].decode("utf-16-be")
        if flags & 2:
            for child in range(second, second + first):
                walk(child, f"{folder}{name}/" if name else folder)
            return
        (size,) = struct.unpack_from(">I", blob, data + second)
        content = blob[data + second + 4 :][:size]
        files[folder + name] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return files


def _tidy_licence(text: str) -> str:
    text = text.strip().replace("CC-BY-SA ", "CC-BY-SA-").replace("CC-BY ", "CC-BY-")
    return "public domain" if text.lower().replace("-", " ") == "public domain" else text


def _attributions(readme: str) -> dict[str, tuple[str, str]]:
    """Picture -> (licence, author), from gcompris' README: stanzas of Copyright, Source, License and Files."""
    found = {}
    for stanza in re.split(r"\n\s*\n", readme):
        licence = re.search(r"^License:\s*(.+)", stanza, re.M)
        holder = re.search(r"^Copyright:(.*(?:\n[ \t].*)*)", stanza, re.M)
        if not licence:
            continue
        based_on = re.search(r"based on (?:a photo|an original image) by ([^,]+), license", stanza)
        author = " ".join(re.sub(r"Copyright|©|\b\d{4}\b,?", "", holder[1]).split()).lstrip(", ") if holder else ""
        if based_on:
            author += f", after a photograph by {based_on[1]}"
        for file in re.findall(r"(\S+\.webp)\s*$", stanza, re.M):
            found[file] = (_tidy_licence(licence[1]), author)
    return found


def _debian_copyright(package: Package, unpacked: Path) -> dict[str, tuple[str, str]]:
    """Picture's base name -> (licence, author), from the package's machine-readable copyright file."""
    text = (package.folder(unpacked) / "usr/share/doc" / package.name / "copyright").read_text("utf-8")
    stanzas = re.findall(r"^Files: (\S+)\nCopyright: (.+)\nLicense: (\S+)$", text, re.M)
    return {
        Path(file).name: (licence, re.sub(r",?\s*\b\d{4}\b[,.]?\s*", "", holder).replace('"', "").strip())
        for file, holder, licence in stanzas
    }


class _Pictures:
    """The packages' pictures and what the packages say about them."""

    def __init__(self, unpacked: Path) -> None:
        self._folders = {
            package.name: package.folder(unpacked) / FOLDERS[package.name]
            for package in PHOTOGRAPHS
            if package.name in FOLDERS
        }
        self._resources = GCOMPRIS.folder(unpacked) / "usr/share/gcompris-qt/rcc"
        self._activities: dict[str, dict[str, bytes]] = {}
        self._said = {
            package.name: _debian_copyright(package, unpacked)
            for package in PHOTOGRAPHS
            if package.name.startswith("lomiri")
        }

    def _activity(self, file: str) -> dict[str, bytes]:
        activity = file.split("/")[0]
        if activity not in self._activities:
            self._activities[activity] = {
                path.removeprefix("gcompris/src/activities/"): content
                for path, content in read_rcc(self._resources / f"{activity}.rcc").items()
            }
        return self._activities[activity]

    def open(self, package: str, file: str) -> Image.Image:
        if package != GCOMPRIS.name:
            return Image.open(self._folders[package] / file)
        return Image.open(BytesIO(self._activity(file)[file]))

    def attribution(self, package: str, file: str) -> tuple[str, str]:
        """(licence, author); KeyError when the package does not say."""
        if package != GCOMPRIS.name:
            return self._said[package][file]
        members = self._activity(file)
        folder = file
        while "/" in folder:
            folder = folder.rsplit("/", 1)[0]
            if f"{folder}/README" in members:
                return _attributions(members[f"{folder}/README"].decode("utf-8"))[file.removeprefix(folder + "/")]
        raise KeyError(file)


def items(unpacked: Path, left_out: Tally) -> Iterator[Item]:
    """The listed photographs, in the order of the list. ValueError for a licence that does not allow redistribution."""
    pictures = _Pictures(unpacked)
    versions = {package.name: package.label for package in PHOTOGRAPHS}
    for line in LIST.read_text("utf-8").splitlines():
        package, file, licence, author, *captions = line.split("\t")
        if not licence:
            licence, author = pictures.attribution(package, file)
        if not REDISTRIBUTABLE.fullmatch(licence):
            raise ValueError(f"{package}: {file} is under {licence}, which is not one of the gallery's licences")
        image = on_white(pictures.open(package, file))
        yield Item(
            source="photographs",
            title=captions[0],
            captions=tuple(captions),
            licence=licence,
            author=author,
            origin=f"{versions[package]}: {file}",
            # Without digits: windmill1 and windmill2 stay together, and so do two views of eiffelTower.
            group=re.sub(r"[^a-z]", "", Path(file).stem.lower()),
            suffix=".webp",
            write=lambda path, image=image: save_webp(image, path, LONGEST_SIDE, QUALITY),  # type: ignore[misc]
        )
