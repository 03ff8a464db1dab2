"""What the README shows is what happens."""

import re
from pathlib import Path

import pytest

from benchmarks.evidence import DOCUMENTS, written
from metactl.signals import INTERNAL, UNIVERSAL

ROOT = Path(__file__).resolve().parents[2]


def test_the_ten_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert re.fullmatch(r"probe loss \d\.\d{3} at dropout \d\.\d{2}\n", capsys.readouterr().out)


def test_every_file_of_the_tree_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    files = [
        path
        for package in ("models", "metactl", "envs")
        for path in (ROOT / package).glob("*.py")
        if not path.stem.startswith("__") and path.stem != "registration"
    ]
    assert len(files) > 20
    missing = [str(path.relative_to(ROOT)) for path in files if path.name not in readme]
    assert missing == []


def test_the_signals_are_explained_as_they_are_in_the_code() -> None:
    told = (ROOT / "docs" / "apply.md").read_text().replace("\\|", "|")
    for signal in (*UNIVERSAL, *INTERNAL):
        assert f"| `{signal.name}` | {(signal.function.__doc__ or '').rstrip('.')} |" in told


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_of_results_are_what_the_files_of_the_evaluations_say(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 1
    assert written(text) == text
    figure = re.search(r"<!-- [^>]* -->.*?(\d\.\d{3})", text, flags=re.DOTALL)
    assert figure is not None
    spoiled = text[: figure.start(1)] + "9.999" + text[figure.end(1) :]
    assert written(spoiled) == text
