"""The picture of the playground in docs: a real server, real adapters, a real browser.

    peftune quickstart && python docs/build_playground_picture.py [quickstart/adapters]

Needs Chromium and playwright.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

CHOSEN = {"prompt": "The for statement is used to", "temperature": "0.7", "seed": "11", "max_tokens": "70"}


def main() -> None:
    """Serve, run, photograph."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart/adapters")
    adapters = sorted(path for path in folder.iterdir() if (path / "adapter_config.json").is_file())
    command = [sys.executable, "-m", "peftune", "serve", "--base", "builtin:small", "--port", "0"]
    command += [part for path in adapters for part in ("--adapter", f"{path.name}={path}")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        models = [("model", name) for name in ("base", "docs", "auto")]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1360, "height": 900})
            page.goto(f"{url}/#{urlencode([*CHOSEN.items(), *models])}")
            page.wait_for_selector("input[value=docs]:checked")
            page.click("#run")
            for _, name in models:
                page.wait_for_selector(f".column[data-model={name}][data-state=scored]")
            page.hover(".column[data-model=docs] .token.up-3, .column[data-model=docs] .token.up-2")
            page.wait_for_timeout(500)
            page.screenshot(path=str(Path(__file__).with_name("playground.png")))
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
