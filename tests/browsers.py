"""A headless Chromium for tests, and what one asks of any page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving import eventually

SCREENSHOTS = Path(__file__).parents[1] / ".cache" / "screenshots"
"""Ignored by git; each run writes them anew."""
_NAMES = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips the tests where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here (Debian and Ubuntu: apt-get install chromium-headless-shell)")
    with sync_api.sync_playwright() as playwright:
        # The sandbox needs rights that a container's root may not have; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page: Any, expression: str, given: Any = None) -> None:
    """Waits until it is true there. Playwright's own way would need a page that may read programs."""
    assert eventually(lambda: bool(page.evaluate(expression, given)), 120), expression


def shoot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def nameless(page: Any) -> list[str]:
    """Controls that a screen reader could not name."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input, select, textarea, [role=img], canvas")]
          .filter((node) => node.checkVisibility())
          .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim()
            || node.labels?.length || node.title))
          .map((node) => node.outerHTML.slice(0, 120))"""
    )
    return found


def faint(page: Any) -> list[str]:
    """Texts whose contrast to what is behind them is below 4.5 (WCAG 2.2, 1.4.3), with their ratio."""
    found: list[str] = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const rgba = (color) => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
          };
          const over = ([r, g, b, a], back) => [r, g, b].map((c, i) => c * a + back[i] * (1 - a));
          const behind = (node) => {
            const layers = [];
            for (let at = node; at; at = at.parentElement) layers.unshift(rgba(getComputedStyle(at).backgroundColor));
            return layers.reduce((back, layer) => over(layer, back), [255, 255, 255]);
          };
          const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const shown = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
          return [...document.querySelectorAll("body *")].filter((node) => shown(node) && !node.closest(".hidden, :disabled, .waiting")
            && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).flatMap((node) => {
            const back = behind(node), front = over(rgba(getComputedStyle(node).color), back);
            const [a, b] = [light(front), light(back)], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            return ratio < 4.5 ? [`${ratio.toFixed(2)} ${node.outerHTML.slice(0, 120)}`] : [];
          });
        }"""
    )
    return found


def too_wide(page: Any) -> bool:
    """Whether a page has to be moved sideways to be read."""
    wide: bool = page.evaluate(
        """() => [document.documentElement, document.body, document.querySelector("main")]
          .some((node) => node.scrollWidth > node.clientWidth)"""
    )
    return wide
