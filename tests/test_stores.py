"""Places that are named by URLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckpt_tool import api
from ckpt_tool.cli import app
from ckpt_tool.errors import UsageError
from ckpt_tool.storage import LocalLocation
from ckpt_tool.stores.known import open_location
from tests.conftest import checkpoint_of, tree


def run(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=True)
    return found.exit_code, found.output + str(found.exception or "")


# ---- URLs


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    place = tmp_path / "a run"
    place.mkdir()
    spelled = place.as_uri()
    assert "%20" in spelled
    for url in (spelled, spelled.replace("file://", "file://localhost"), spelled.replace("file:", "FILE:")):
        assert open_location(url) == LocalLocation(place)
    assert str(open_location(spelled)) == str(place)


def test_the_command_line_takes_file_urls(tmp_path: Path) -> None:
    source = checkpoint_of("mixtral_w2e1")
    assert run("convert", source.as_uri(), (tmp_path / "url").as_uri(), "--to", "universal", "-q")[0] == 0
    assert run("convert", source, tmp_path / "path", "--to", "universal", "-q")[0] == 0
    assert tree(tmp_path / "url") == tree(tmp_path / "path")
    assert run("verify", (tmp_path / "url").as_uri(), source.as_uri())[0] == 0
    code, printed = run("inspect", (tmp_path / "url").as_uri())
    assert (code, str(tmp_path / "url") in printed) == (0, True)


@pytest.mark.parametrize("url", ["s4://bucket/run", "S4://bucket/run", "git+ssh://host/run"])
def test_an_unknown_scheme_is_told_with_those_that_are_known(url: str, tmp_path: Path) -> None:
    scheme = url.partition(":")[0].lower()
    for source, target in ((url, tmp_path / "out"), (checkpoint_of("mixtral_w2e1"), url)):
        with pytest.raises(UsageError, match=f"not known: {scheme.replace('+', '.')}. Known are .*file://"):
            api.convert(source, target, to="universal")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file://server/share/run", "file://"])
def test_a_file_url_of_another_machine_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="three slashes and an absolute path"):
        open_location(url)


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    for path in ("./s3://x", "c:/x", str(tmp_path / "a://b"), ""):
        assert open_location(path) == LocalLocation(Path(path))
