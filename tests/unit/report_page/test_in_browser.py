"""The page in a real browser, from disk and with no network: every panel is drawn, and no script fails."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.report_page.page import write_page
from megatron_prune.report_page.records import read_run
from megatron_prune.training.run_dir import locked

NAMES = ("chromium", "chromium-browser", "google-chrome")
SHAPE = ("shape-attention", "shape-ffn", "shape-stem", "parameters")
CURVES = (*SHAPE, "saliency", "loss", "throughput", "memory", "learning-rate", "gradient")
MAPS = {"map-heads": 12 * 12, "map-ffn": 12 * 64, "map-stem": 96}
SIZE = (1280, 3600)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"the page is tested in a browser, and none of {', '.join(NAMES)} is on PATH: run make browser")
    return found


def _open(browser: str, file: Path, *flags: str) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged."""
    # Root may not use the sandbox; a profile of its own keeps browsers that run at once apart.
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *flags)
    flags = (*flags, "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr")
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [browser, *flags, profile, "--virtual-time-budget=3000", file.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


def _sections(document: str) -> dict[str, str]:
    found = re.findall(r'<section class="panel[^"]*" id="([^"]+)">(.*?)</section>', document, flags=re.DOTALL)
    return dict(found)


def _check(document: str, log: str) -> None:
    assert "CONSOLE" not in log, log
    root = re.search("<html[^>]*>", document)
    assert root is not None
    assert f'data-drawn="{len(CURVES) + len(MAPS)}"' in root[0]
    assert "data-error" not in root[0]
    sections = _sections(document)
    for name in CURVES:
        path = re.search(r'<path d="(M[^"]+)" stroke="var\(--c\d\)"', sections[name].partition("<svg role")[2])
        assert path is not None, f"{name} has no curve"
        assert path[1].count("L") >= 5, f"{name}: {path[1]}"
        assert "NaN" not in sections[name]
        assert sections[name].count("<text") >= 5, f"{name} has no axes"
    for name, cells in MAPS.items():
        assert sections[name].count('class="cell"') == cells
        assert "NaN" not in sections[name]
    assert sections["exports"].count("<tr>") == 4


def test_a_finished_run(browser: str, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    file = tmp_path / "run.html"
    write_page(read_run(make_run(tmp_path / "finished")), file)
    document, log = _open(browser, file, "--dump-dom")
    _check(document, log)
    assert ">finished</span>" in document


def test_a_running_run_on_a_phone(browser: str, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run_dir, file = make_run(tmp_path / "running", upto=160), tmp_path / "run.html"
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 162, "tok')
    with locked(run_dir):
        write_page(read_run(run_dir), file)
    measure = "document.documentElement.dataset.widths = [innerWidth, document.documentElement.scrollWidth]"
    file.write_text(file.read_text().replace("</body>", f"<script>{measure}</script></body>"))
    document, log = _open(browser, file, "--dump-dom", "--window-size=390,844")
    _check(document, log)
    assert ">running</span>" in document
    assert " left" in document
    widths = re.search(r'data-widths="(\d+),(\d+)"', document)
    assert widths is not None
    assert int(widths[1]) <= 500, "a window as narrow as the browser makes one"
    assert int(widths[2]) <= int(widths[1]), "nothing to scroll sideways"


def test_the_dark_is_dark(browser: str, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    from matplotlib.image import imread

    file, brightness = tmp_path / "run.html", []
    write_page(read_run(make_run(tmp_path / "run")), file)
    for scheme in (0, 1):  # dark and light
        picture = tmp_path / f"{scheme}.png"
        _open(browser, file, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}")
        brightness.append(float(imread(picture)[..., :3].mean()))
    assert brightness[0] < 0.3
    assert brightness[1] > 0.7


def test_a_screenshot_is_not_blank(browser: str, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    from matplotlib.image import imread

    file, picture = tmp_path / "run.html", tmp_path / "run.png"
    write_page(read_run(make_run(tmp_path / "run")), file)
    _open(browser, file, f"--screenshot={picture}", f"--window-size={SIZE[0]},{SIZE[1]}")
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == SIZE
    pixels = imread(picture)[..., :3]
    blue = (abs(pixels - (0, 0x72 / 255, 0xB2 / 255)).max(axis=-1) < 0.02).sum()
    orange = (abs(pixels - (0xC2 / 255, 0x50 / 255, 0x0A / 255)).max(axis=-1) < 0.02).sum()
    assert blue > 2000  # the curves of heads and loss, two bars
    assert orange > 2000  # cells of maps, curves of channels
