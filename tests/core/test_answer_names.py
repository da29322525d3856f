"""The names of the classes of answers: every class has one, and no two share a name."""

from typing import get_args

import pytest

from worker.core.answer_names import ANSWER_NAMES, AnswerName
from worker.core.reply import Reply


def test_every_class_of_answers_has_names() -> None:
    assert set(ANSWER_NAMES) == set(get_args(Reply))


@pytest.mark.parametrize("field", AnswerName._fields)
def test_no_two_classes_share_a_name(field: str) -> None:
    names = [getattr(name, field) for name in ANSWER_NAMES.values()]

    assert len(set(names)) == len(names)
