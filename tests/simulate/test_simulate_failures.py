"""The program behind docs/simulation.md: the page says what it prints, and the picture can be drawn."""

from __future__ import annotations

from pathlib import Path

from benchmarks.simulate_failures import SET_UPS, check_table, draw, llama_3_line, sizes_table

PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"


def test_the_page_is_up_to_date() -> None:
    """Else run the program again, and see whether what the page says is still so."""
    page = PAGE.read_text(encoding="utf-8")
    assert sizes_table(SET_UPS[1], 20) in page
    assert check_table(SET_UPS[1], 200) in page
    assert llama_3_line(20) in page


def test_what_fits_in_memory() -> None:
    """16 bytes a weight: 70.6B on 16 GPUs of 80 GB, but not on 8; a MoE of 64 experts on 1,024 GPUs."""
    small, large = SET_UPS
    assert large.fits(64, 1024)
    assert not large.fits(16, 128)
    assert not large.fits(256, 1024)
    assert not large.fits(0, 8)
    assert small.fits(4, 128)


def test_the_picture(tmp_path: Path) -> None:
    draw(SET_UPS[0], 1, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
