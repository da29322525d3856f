"""`python -m worker.sandbox`: the stand-in of the hosted API as a program of its own."""

import sys

from worker.sandbox.command import main

sys.exit(main())
