from __future__ import annotations

from pathlib import Path

import pytest

from tensorguard.errors import ConfigurationError
from tensorguard.evidence.measurement import code_measurement, measure_packages


def make(root: Path) -> dict[str, Path]:
    for name, content in (("a/x.py", "1"), ("a/sub/y.py", "2"), ("b/z.py", "3")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"a": root / "a", "b": root / "b"}


def test_place_time_caches_and_order_do_not_matter(tmp_path: Path) -> None:
    first, second = make(tmp_path / "one"), make(tmp_path / "two")
    expected = measure_packages(first)
    (tmp_path / "two/a/__pycache__").mkdir()
    (tmp_path / "two/a/__pycache__/x.py").write_text("cached")
    (tmp_path / "two/a/notes.txt").write_text("no code")
    assert measure_packages(dict(reversed(second.items()))) == expected
    assert len(expected) == 96


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename", "swap"])
def test_any_change_of_code_matters(tmp_path: Path, change: str) -> None:
    packages = make(tmp_path)
    before = measure_packages(packages)
    x, y = tmp_path / "a/x.py", tmp_path / "a/sub/y.py"
    if change == "edit":
        x.write_text("1 ")
    elif change == "add":
        (tmp_path / "b/new.py").write_text("")
    elif change == "remove":
        y.unlink()
    elif change == "rename":
        x.rename(tmp_path / "a/w.py")
    else:
        x.write_text("2")
        y.write_text("1")
    assert measure_packages(packages) != before


def test_this_installation_has_a_measurement() -> None:
    assert code_measurement() == code_measurement()
    assert len(code_measurement()) == 96


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        measure_packages({"empty": tmp_path})
