"""Settings of outputs: where they are stored."""

from pathlib import Path

import pytest

from worker.settings import load


@pytest.mark.parametrize("url", ["file:/srv/out puts", "file:///srv/out puts"])
def test_both_spellings_of_a_file_url_are_accepted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have one slash or three."""
    monkeypatch.setenv("STORAGE_URL", url)
    assert load().storage_path == Path("/srv/out puts")


@pytest.mark.parametrize(
    ("url", "bucket"),
    [
        ("s3://pictures", ("pictures", "")),
        ("s3://pictures/", ("pictures", "")),
        ("s3://my.pictures-1/shop/to day/", ("my.pictures-1", "shop/to day")),
    ],
)
def test_a_bucket_may_have_a_prefix(url: str, bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial downloads for it are in the state directory."""
    monkeypatch.setenv("STORAGE_URL", url)
    settings = load()
    assert (settings.bucket, settings.storage_path) == (bucket, None)
    assert settings.partial_path == Path("var/partial").absolute()
