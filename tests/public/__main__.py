"""Write the golden files anew: `python -m tests.public`. Do so only where the public face is meant to change."""

from tests.public.faces import FACES
from tests.public.test_public_face import golden

for name, face in FACES.items():
    golden(name).write_text(face())
