"""Where the model and the gallery lie that come inside the package."""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"

EMBEDDED_MODEL = _ASSETS / "model"
EMBEDDED_GALLERY = _ASSETS / "gallery"
EMBEDDED_VISUAL_TOKENIZER = _ASSETS / "visual_tokenizer"
