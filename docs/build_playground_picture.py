"""The pictures of the playground in docs, on a desk and on a phone: a real server, real adapters, a real browser.

    peftune quickstart && python docs/build_playground_picture.py [quickstart/adapters]

Needs Chromium and playwright; Pillow comes with matplotlib.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).parent
CHOSEN = {"prompt": "The for statement is used to", "temperature": "0.7", "seed": "11", "max_tokens": "70"}


def main() -> None:
    """Serve, run, photograph: with the details of a token that the adapter raised."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart/adapters")
    adapters = sorted(path for path in folder.iterdir() if (path / "adapter_config.json").is_file())
    command = [sys.executable, "-m", "peftune", "serve", "--base", "builtin:small", "--port", "0"]
    command += [part for path in adapters for part in ("--adapter", f"{path.name}={path}")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            desk = browser.new_page(viewport={"width": 1440, "height": 860})
            write(desk, url)
            desk.hover(".column[data-model=docs] .token.up-4, .column[data-model=docs] .token.up-3")
            save(desk, "playground.png")
            phone = browser.new_page(viewport={"width": 360, "height": 740}, device_scale_factor=2, has_touch=True)
            write(phone, url)
            phone.tap(".column[data-model=docs] .token.up-4, .column[data-model=docs] .token.up-3")
            phone.locator(".column[data-model=docs]").evaluate("one => one.scrollIntoView({behavior: 'instant'})")
            save(phone, "playground-phone.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def write(page: Page, url: str) -> None:
    """Run and wait for the last colours."""
    models = [("model", name) for name in ("base", "docs", "auto")]
    page.goto(f"{url}/#{urlencode([*CHOSEN.items(), *models])}")
    page.wait_for_selector("input[value=docs]:checked")
    page.keyboard.press("Control+Enter")
    for _, name in models:
        page.wait_for_selector(f".column[data-model={name}][data-state=scored]")


def save(page: Page, name: str) -> None:
    """As small as a palette makes it; the page has few colours."""
    page.wait_for_timeout(500)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
