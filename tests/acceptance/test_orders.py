"""Small versions of the acceptance programs with orders, each in a separate process."""

from pathlib import Path

import pytest

from tests.acceptance.test_acceptance import accept


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["orders", "--jobs", "20"], id="each order is charged once"),
        pytest.param(["orders-faults", "--jobs", "20", "--order-kills", "1"], id="kills, cuts and lost answers"),
    ],
)
def test_an_acceptance_program_with_orders_passes(arguments: list[str], tmp_path: Path) -> None:
    """The programs use only the environment, the Procfile, `worker.order`, the tables and the command."""
    accept(tmp_path, *arguments)
