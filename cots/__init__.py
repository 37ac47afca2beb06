"""COTS: find images and moments of video by meaning.

From Python:

    model = cots.load_model()                     # the embedded model; or a training output, or "open_clip:ARCH/TAG"
    gallery = cots.open_gallery("my-gallery")     # what `cots index build` wrote
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load_model", "open_gallery"]

if TYPE_CHECKING:
    from cots.model.pretrained import load_model
    from index.gallery import open_gallery

_LAZY = {"load_model": "cots.model.pretrained", "open_gallery": "index.gallery"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'cots' has no attribute {name!r}")
