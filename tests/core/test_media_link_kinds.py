"""Whether a fresh link can belong to the same output as the old link."""

import pytest

from worker.core.media.link_kinds import may_replace


@pytest.mark.parametrize(
    ("link", "fresh", "allowed"),
    [
        ("a.wav", "b.wav", True),
        ("a.wav", "b.mp3", True),
        ("a.WAV?sig=1", "b.flac#x", True),
        ("a.wav", "b.png", False),
        ("a.wav", "b.mp4", False),
        ("a.mp4", "b.wav", False),
        ("a.mp4", "b.webp", False),
        ("a.mp3", "b.jpg?name=b.mp3", False),
        ("a.png", "b.webp", True),
        ("a.png", "b.jpeg", True),
        ("a.png", "b.wav", False),
        ("a.png", "b.mp4", False),
        ("a.png", "b.glb", False),
        ("a.png", "b.txt", False),
        ("a.gif", "b.mp4", True),
        ("a.gif", "b.png", True),
        ("a.mp4", "b.png", False),
        ("a.mp4", "b.webm", True),
        ("a.glb", "b.obj", True),
        ("a.glb", "b.png", False),
        ("a.txt", "b.json", True),
        ("a.srt", "b.vtt", True),
        ("a.srt", "b.txt", True),
        ("a.txt", "b.png", False),
        ("a.txt", "b.wav", False),
        ("a.safetensors", "b.png", False),
        ("a.wav", "b", True),
        ("a", "b.png", True),
        ("a.wav", "b.php?file=c.png", True),
        ("a.v2", "b.png", True),
        ("a.wav", "b.zip", True),
    ],
)
def test_only_a_fresh_link_of_the_same_kind_may_replace_a_link(link: str, fresh: str, allowed: bool) -> None:
    assert may_replace(f"https://cdn2/x.d/{fresh}", f"https://h/y.z/{link}") == allowed
