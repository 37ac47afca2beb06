"""Fetch the packages at their pinned versions with the ordinary clients, and unpack them."""

import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package at the version whose files were looked at, one by one."""

    client: str
    """apt, npm or pip"""
    name: str
    version: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    def folder(self, unpacked: Path) -> Path:
        return unpacked / self.name.replace("/", "-").lstrip("@")

    def archive(self, downloads: Path) -> Path | None:
        """The archive in `downloads` with exactly this name and version, or None when it is not there."""
        patterns = {
            "apt": f"{self.name}_{self.version.replace(':', '%3a')}_*.deb",
            "npm": f"{self.name.replace('/', '-').lstrip('@')}-{self.version}.tgz",
            "pip": f"{self.name.replace('-', '_')}-{self.version}-*.whl",
        }
        return next(iter(sorted(downloads.glob(patterns[self.client]))), None)


OPENCLIPART_PNG = Package("apt", "openclipart-png", "1:0.18+dfsg-19")
OPENCLIPART_SVG = Package("apt", "openclipart-svg", "1:0.18+dfsg-19")
STAMPS = Package("apt", "tuxpaint-stamps-default", "2022.06.04-1")
GCOMPRIS = Package("apt", "gcompris-qt-data", "3.1-2")
LOMIRI_16 = Package("apt", "lomiri-wallpapers-16.04", "20.04.0-2")
LOMIRI_20 = Package("apt", "lomiri-wallpapers-20.04", "20.04.0-2")
SCIKIT_IMAGE = Package("pip", "scikit-image", "0.26.0")
SCIKIT_LEARN = Package("apt", "python3-sklearn", "1.2.1+dfsg-1")
EMOJI_LABELS = Package("npm", "emojibase-data", "17.0.0")
EMOJI_STILLS = Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0")
EMOJI_CLIPS = tuple(Package("npm", f"@lobehub/fluent-emoji-anim-{part}", "1.0.0") for part in range(1, 5))

PHOTOGRAPHS = (GCOMPRIS, LOMIRI_16, LOMIRI_20, SCIKIT_IMAGE, SCIKIT_LEARN)
GALLERY = (OPENCLIPART_PNG, OPENCLIPART_SVG, *PHOTOGRAPHS, EMOJI_LABELS, EMOJI_STILLS, *EMOJI_CLIPS)


def fetch(package: Package, downloads: Path) -> Path:
    """The package's archive, downloaded unless it lies in `downloads` already.

    Raises CalledProcessError when the client has no such version, FileNotFoundError when it brought another one.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    if package.archive(downloads) is None:
        commands = {
            "apt": ["apt-get", "download", f"{package.name}={package.version}"],
            "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            "pip": ["pip", "download", "--quiet", "--no-deps", f"{package.name}=={package.version}"],
        }
        subprocess.run(commands[package.client], cwd=downloads, check=True)
    archive = package.archive(downloads)
    if archive is None:
        raise FileNotFoundError(f"{package.client} did not bring {package.label} to {downloads}")
    return archive


def unpack(package: Package, downloads: Path, unpacked: Path) -> None:
    """Unpack the archive into the package's folder; a folder that exists is taken as complete."""
    folder = package.folder(unpacked)
    if folder.exists():
        return
    archive = fetch(package, downloads)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if package.client == "apt":
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
    elif package.client == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    partial.rename(folder)
