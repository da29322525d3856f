"""Rewrite the golden files: `python -m tests.public`. Do this only for an intended change of the public interface."""

from tests.public.faces import FACES
from tests.public.test_public_face import golden

for name, face in FACES.items():
    golden(name).write_text(face())
