"""`python -m worker.sandbox`: run the stand-in of the hosted API as a separate program."""

import sys

from worker.sandbox.command import main

sys.exit(main())
