"""The test kit orders of every family and plays scenarios by name; the worker stores what comes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import worker
from worker.testing import Kit, kit


@pytest.fixture
def made(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as made:
        yield made


def test_jobs_of_many_families_are_stored_as_what_they_are(made: Kit) -> None:
    types = {
        "v3/text2img": "image/png",
        "v4/dreambooth": "image/png",
        "v6/interior/make": "image/png",
        "v6/video/text2video": "video/mp4",
        "v6/voice/text_to_speech": "audio/wav",
        "v6/voice/speech_to_text": "text/plain",
        "v6/3d/text_to_3d": "model/gltf-binary",
        "v6/llm/chat": "application/json",
        "v7/images/text-to-image": "image/png",
        "v7/video-fusion/text-to-video": "video/mp4",
        "v1/enterprise/text2img": "image/png",
        "v1/enterprise/voice/sfx": "audio/wav",
        "v1/workflows/upscale/run": "image/png",
    }
    jobs = {path: worker.track(made.api.submit("a lake", family=path), endpoint=path) for path in types}

    ended = {job.id: job for job in made.worker.run_all()}

    assert {path: ended[job].outputs[0].media_type for path, job in jobs.items()} == types
    assert all(ended[job].status == "completed" for job in jobs.values())


def test_a_made_up_id_is_of_the_family_that_it_is_tracked_with(made: Kit) -> None:
    job_id = worker.track(77, endpoint="v6/video/text2video")

    job = made.worker.run(job_id)

    assert (job.status, job.outputs[0].media_type) == ("completed", "video/mp4")


def test_a_training_ends_without_an_output(made: Kit) -> None:
    job = made.worker.run(worker.track(made.api.submit(family="v3/fine_tune")))

    assert (job.status, job.kind, job.outputs) == ("completed", "training", ())


@pytest.mark.parametrize(
    ("scenario", "status", "code"),
    [
        ("failed", "failed", "api_failed"),
        ("try-again", "completed", None),
        ("empty", "completed", None),
        ("late-links", "completed", None),
        ("dead-links", "completed", None),
        ("nested-output", "completed", None),
        ("other-id", "completed", None),
        ("no-id", "completed", None),
        ("busy", "completed", None),
        ("rate-limit", "completed", None),
        ("error", "failed", "api_error"),
    ],
)
def test_a_scenario_is_played_for_one_job(made: Kit, scenario: str, status: str, code: str | None) -> None:
    spoilt = worker.track(made.api.submit("a lake", scenario=scenario))  # type: ignore[arg-type]  # one of many names
    other = worker.track(made.api.submit("a sea"))

    made.worker.run_all()

    job, usual = worker.get(spoilt), worker.get(other)
    assert job is not None
    assert usual is not None
    assert (job.status, job.error_code) == (status, code)
    assert usual.status == "completed"


def test_a_scenario_is_played_for_all_orders_from_then_on_and_ended(made: Kit) -> None:
    made.api.play("failed")
    first = worker.track(made.api.submit("a lake"))
    made.api.play()
    second = worker.track(made.api.submit("a lake"))

    made.worker.run_all()

    jobs = [worker.get(first), worker.get(second)]
    assert [job and job.status for job in jobs] == ["failed", "completed"]


def test_a_scenario_is_played_for_a_made_up_id(made: Kit) -> None:
    made.api.play("failed", remote_id=77)

    assert made.worker.run(worker.track(77)).status == "failed"
    assert made.worker.run(worker.track(78)).status == "completed"


def test_names_that_there_are_not_are_refused_with_those_that_there_are(made: Kit) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*v6/video/\*"):
        made.api.submit("a lake", family="v6/nothing")
    with pytest.raises(ValueError, match="must be one of failed, try-again"):
        made.api.play("nothing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of failed, try-again"):
        made.api.play("nothing", remote_id=5)  # type: ignore[arg-type]


def test_ids_of_two_tests_on_one_database_do_not_repeat(tmp_path: Path, migrated_sqlite: Path) -> None:
    """The rows of the test before are still there, and must not be taken for the new job's."""
    ids = []
    for number in (1, 2):
        with kit(tmp_path / f"kit{number}", tables=migrated_sqlite) as made:
            ids.append(made.api.submit("a lake")["id"])

    assert ids[0] != ids[1]
