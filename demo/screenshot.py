"""Take the picture of the search page that the README shows.

    python demo/screenshot.py --query "castle by the water" --out docs/page.webp

Needs Chromium, its driver (Debian: chromium chromium-driver) and `pip install selenium`.
"""

import argparse
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb")
WAITED = 120.0
SETTLED = 3.0  # seconds after the last card: thumbnails fade in


def take(address: str, query: str, size: tuple[int, int]) -> Image.Image:
    """The page after a search."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        driver.get(address)
        field = WebDriverWait(driver, WAITED).until(lambda page: page.find_element(By.NAME, "text"))
        field.send_keys(query + Keys.ENTER)
        WebDriverWait(driver, WAITED).until(lambda page: page.find_elements(By.CSS_SELECTOR, ".card"))
        time.sleep(SETTLED)
        return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", default="castle by the water")
    parser.add_argument("--out", type=Path, default=Path("docs/page.webp"))
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 860), metavar=("WIDTH", "HEIGHT"))
    given = parser.parse_args()
    command = [sys.executable, "-u", "-m", "cots.cli", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        assert page.stdout is not None
        address = next(line for line in page.stdout if line.startswith("COTS is at ")).split()[3]
        try:
            take(address, given.query, tuple(given.size)).save(given.out, quality=80, method=6)
        finally:
            page.terminate()


if __name__ == "__main__":
    main()
