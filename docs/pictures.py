"""Makes the pictures of the documentation, from what the tutorial leaves in the folder ``tutorial``.

    python docs/pictures.py

in the folder in which the tutorial was followed. The picture of the report needs Chromium.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"


def main(tutorial: Path = Path("tutorial")) -> None:
    """Write the pictures as small as they may be: each below 300 kB."""
    IMAGES.mkdir(exist_ok=True)
    _shrink(tutorial / "comparison.png", "demo.jpg", width=1600)
    _shrink(tutorial / "figure.png", "figure.jpg", width=1400)
    with tempfile.TemporaryDirectory() as folder:
        screen = Path(folder) / "report.png"
        page = (tutorial / "semantic" / "report.html").resolve().as_uri()
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--hide-scrollbars", "--window-size=1440,560", "--force-device-scale-factor=1.5",
             f"--screenshot={screen}", page],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        _shrink(screen, "report.jpg", width=1600)


def _shrink(source: Path, name: str, width: int) -> None:
    with Image.open(source) as picture:
        width = min(width, picture.width)
        size = width, round(picture.height * width / picture.width)
        small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.save(IMAGES / name, quality=88, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
