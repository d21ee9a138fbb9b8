# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The pages of evidence and cost are what the results give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import charts  # noqa: E402
import report  # noqa: E402


SVG = "{http://www.w3.org/2000/svg}"


def write(
    folder: Path, method: str, seed: int, own: str, size: str = "full", task: str = "movie", **more: str
) -> None:
    prompts = {"own": own, **more}
    cell = {
        **{"task": task, "size": size, "method": method, "seed": seed, "score": "accuracy", "rate": 0.01},
        **{"steps": 5, "batch_size": 2, "trainable": 1234, "train_seconds": 2.0, "above_loaded_mb": 7.0},
        **{"tried": [{"rate": 0.01, "score": 1.0}, {"rate": 0.02, "score": 0.5}], "setup": {"model": "m"}},
        **({"spread": {"0": 0.005 + seed / 10, "1": 0.25 - seed / 10}} if more else {}),
        "test": {
            task: {
                name: {"accuracy": values, "loss": " ".join("0.5" for _ in values)} for name, values in prompts.items()
            }
        },
    }
    file = folder / "quality_encoder" / "m" / f"{task}-{size}" / f"{method}-seed{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(cell))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for seed in (0, 1):
        write(
            folder,
            "iapt",
            seed,
            "1" * 90 + "0" * 10,
            shuffled="1" * 50 + "0" * 50,
            mean="1" * 90 + "0" * 10,
            none="0" * 100,
        )
        write(folder, "iapt-constant", seed, "1" * 80 + "0" * 20)
        write(folder, "lora-r16", seed, "1" * (94 + 2 * seed) + "0" * (6 - 2 * seed))
    return folder


def test_tables(results: Path) -> None:
    made = report.blocks(results)
    assert made == report.blocks(results)  # always the same
    prefix = "quality_encoder.m.tasks-full"
    scores = made[f"{prefix}.scores-accuracy"].splitlines()
    assert "| lora-r16 | 95.0±1.4 | 95.0 | 1,234 | 2 | 7 |" in scores
    assert "| iapt | 90.0±0.0 | 90.0 | 1,234 | 2 | 7 |" in scores
    (row,) = [line for line in made[f"{prefix}.instance"].splitlines() if line.startswith("| iapt |")]
    control, shuffled, mean, none, spread = row.strip("|").split("|")[1:]
    assert control.strip().startswith("**+10.0 [") and shuffled.strip().startswith("**+40.0 [")  # bold: not by chance
    assert mean.strip() == "+0.0 [+0.0, +0.0]" and none.strip().startswith("**+90.0 [")
    assert spread.strip() == "0.5 to 25.0"
    (row,) = [line for line in made[f"{prefix}.lora"].splitlines() if line.startswith("| iapt |")]
    assert "-5.0 [" in row and "minus lora-r16" in made[f"{prefix}.lora"]
    write(results, "lora-r8-qv", 0, "1" * 88 + "0" * 12)
    assert "| minus lora-r8-qv |" in report.blocks(results)[f"{prefix}.lora"]
    assert "| iapt | 0.01 | 0.01, 0.02 |" in made["quality_encoder.m.rates"]


def test_overview(results: Path) -> None:
    write(results, "head", 0, "1" * 30 + "0" * 70, size="100")
    made = report.blocks(results)
    assert made["quality.scores"].splitlines() == [
        "| mean score | encoder, single tasks | encoder, single tasks, 100 examples |",
        "|---|---|---|",
        "| head | - | 30.0 |",
        "| lora-r16 | 95.0 (2 seeds) | - |",
        "| iapt | 90.0 (2 seeds) | - |",
        "| iapt-constant | 80.0 (2 seeds) | - |",
    ]
    (row,) = made["quality.constant"].splitlines()[2:]
    assert row.startswith("| iapt | **+10.0 [")
    head, *rows = made["quality.lora"].splitlines()
    assert head.startswith("| minus LoRA |") and rows[1].startswith("| iapt | **-5.0 [")
    assert [row.split("|")[1].strip() for row in rows[1:]] == ["iapt", "iapt-constant"]
    assert report.blocks(results / "nothing")["quality.scores"] == report.NOTHING
    (results / "quality_encoder" / "other").mkdir()
    assert made["quality.scores"].replace("encoder,", "m, encoder,") == report.blocks(results)["quality.scores"]
    (results / "quality_encoder" / "other").rmdir()
    write(results, "iapt-constant", 0, "1" * 70 + "0" * 30, task="tweet")
    write(results, "iapt", 0, "1" * 90 + "0" * 10, task="tweet")
    made = report.blocks(results)
    assert "lora-r16" not in made["quality.scores"]  # it lacks a task: no mean
    assert "| iapt | 90.0 | - |" in made["quality.scores"]
    assert made["quality.constant"].splitlines()[2].startswith("| iapt | **+15.0 [")
    write(results, "iapt-paper", 0, "1" * 95 + "0" * 5, task="tweet")
    other = report.blocks(results)["quality.default"].splitlines()[2]
    assert other.startswith("| iapt-paper | **+5.0 [") and "(1 of 2 tasks)" in other
    assert "| iapt | 0.500 | - |" in made["quality.scores-loss"]
    assert "| iapt | +0.000 [+0.000, +0.000] | - |" in made["quality.constant-loss"]
    assert "tasks)" not in made["quality.constant"] and "(1 of 2 tasks)" in made["quality.lora"]


def test_a_mixture_is_compared_part_by_part(tmp_path: Path) -> None:
    for method, right in (("iapt", (70, 40)), ("iapt-constant", (50, 60)), ("lora-r16", (70, 80))):
        write(tmp_path, method, 0, "0")
        file = tmp_path / "quality_encoder" / "m" / "movie-full" / f"{method}-seed0.json"
        cell = json.loads(file.read_text())
        ones = {part: "1" * n + "0" * (100 - n) for part, n in zip(("movie", "tweet"), right)}
        cell.update(task="movie+tweet", test={part: {"own": {"accuracy": values}} for part, values in ones.items()})
        file.write_text(json.dumps(cell))
    made = report.blocks(tmp_path)
    rows = made["quality_encoder.m.mixture-full.instance-by-task"].splitlines()
    assert rows[0] == "| own - constant | movie | tweet |"
    assert [cell.strip(" *").split()[0] for cell in rows[2].strip("|").split("|")] == ["iapt", "+20.0", "-20.0"]
    rows = made["quality_encoder.m.mixture-full.lora"].splitlines()
    assert rows[0] == "| minus lora-r16 | all tasks | movie | tweet |"
    assert [cell.strip(" *").split()[0] for cell in rows[2].strip("|").split("|")] == [
        "iapt",
        "-20.0",
        "+0.0",
        "-40.0",
    ]


def test_summary_has_a_row_for_each_method_of_a_mixture(tmp_path: Path) -> None:
    for method, right in (("iapt", 70), ("iapt-constant", 50), ("iapt-paper", 90), ("lora-r16", 80)):
        write(tmp_path, method, 0, "1" * right + "0" * (100 - right), task="movie+tweet")
        write(tmp_path, method, 0, "1" * 100)
    head, _, *rows = report.blocks(tmp_path)["quality.summary"].splitlines()
    assert head == "| setting | method | mean score | minus LoRA | minus its control |"
    cells = [[cell.strip(" *").split(" ")[0] for cell in row.strip("|").split(" | ")] for row in rows]
    assert cells == [["encoder", "lora-r16", "80.0", "-", "-"], ["encoder", "iapt", "70.0", "-10.0", "+20.0"]]


def test_page_keeps_what_is_written_by_hand(results: Path) -> None:
    text = "By hand.\n<!-- generated: quality_encoder.m.rates -->\nold\n<!-- end -->\nMore.\n<!-- generated: other -->\n<!-- end -->\n"
    page = report.fill(text, report.blocks(results))
    assert page.startswith("By hand.\n") and "More.\n" in page and "old" not in page
    assert "| iapt | 0.01 |" in page and report.NOTHING in page
    assert report.fill(page, report.blocks(results)) == page


def test_check(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- generated: quality_encoder.m.rates -->\n<!-- end -->\n")
    arguments = ["report.py", "--results", str(results), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    with pytest.raises(SystemExit, match="not what the results give"):
        report.main()
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    picture = page.parent / "images" / "quality_encoder-m-full.svg"
    before = picture.read_bytes()
    report.main()
    assert picture.read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    with pytest.raises(SystemExit) as done:
        report.main()
    assert done.value.code == 0


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.stem)
def test_page_in_the_repository_is_up_to_date(page: Path, made: dict[str, str]) -> None:
    text = page.read_text()
    assert report.BLOCK.search(text) and report.fill(text, made) == text


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return report.blocks(report.RESULTS)


def test_bars_are_as_long_as_their_ratios() -> None:
    picture = ElementTree.fromstring(charts.bars({"bare": 1.0, "x < 8": 2.5}, {"x < 8"}, "on a CPU"))
    widths = [float(bar.get("width")) for bar in picture.iter(SVG + "rect")]
    assert widths[1] / widths[0] == pytest.approx(2.5, rel=0.01)
    assert {text.text for text in picture.iter(SVG + "text")} >= {"bare", "x < 8", "2.50 x", "on a CPU"}


def test_dots_lie_in_their_intervals_and_beside_zero() -> None:
    found = {"full": (2.0, 1.0, 4.0), "prompt": (-8.0, -9.0, -7.0)}
    picture = ElementTree.fromstring(charts.intervals(found, {"prompt"}, "points"))
    zero, *whiskers = ([float(line.get(end)) for end in ("x1", "x2")] for line in picture.iter(SVG + "line"))
    dots = [float(dot.get("cx")) for dot in picture.iter(SVG + "circle")]
    for dot, (low, high), (mean, least, most) in zip(dots, whiskers, found.values(), strict=True):
        assert low < dot < high and (dot > zero[0]) == (mean > 0)
        assert (dot - low) / (high - low) == pytest.approx((mean - least) / (most - least), abs=0.02)


def test_charts_in_the_repository_are_of_the_committed_runs() -> None:
    charts_now = report.charts(ROOT / "benchmarks" / "results")
    for name, drawn in charts_now.items():
        assert (ROOT / "docs" / "images" / name).read_text() == drawn, f"{name}: run python benchmarks/report.py"
    drawn = charts_now["decoding.svg"]
    run = json.loads((ROOT / "benchmarks" / "results" / report.SERVED / "serving-8-32.json").read_text())
    for name in ("iapt", "preft", "lora-r16"):
        assert f"{run['methods'][name]['per_token']['ratio']:.2f} x" in drawn
