"""The test kit with orders of every family and with scenarios. The worker stores the outputs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import worker
from worker.sandbox.families import FAMILIES
from worker.testing import Kit, kit


@pytest.fixture
def testkit(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Kit]:
    with kit(tmp_path / "kit", tables=migrated_sqlite) as testkit:
        yield testkit


def test_jobs_of_many_families_are_stored_with_their_media_type(testkit: Kit) -> None:
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
    jobs = {path: worker.track(testkit.api.submit("a lake", family=path), endpoint=path) for path in types}

    ended = {job.id: job for job in testkit.worker.run_all()}

    assert {path: ended[job].outputs[0].media_type for path, job in jobs.items()} == types
    assert all(ended[job].status == "completed" for job in jobs.values())


def test_a_job_of_every_family_is_completed(testkit: Kit) -> None:
    orders = [order for family in FAMILIES for order in family.orders]
    paths = [order.replace("*", "make").replace("{name}", "shop") for order in orders]
    jobs: dict[int, str] = {}
    for path in paths:
        jobs[worker.track(testkit.api.submit("a lake", family=path), endpoint=path)] = path

    ended = {job.id: job.status for job in testkit.worker.run_all()}

    assert {jobs[job_id]: status for job_id, status in ended.items()} == dict.fromkeys(paths, "completed")


def test_a_made_up_id_belongs_to_the_family_that_it_is_tracked_with(testkit: Kit) -> None:
    job_id = worker.track(77, endpoint="v6/video/text2video")

    job = testkit.worker.run(job_id)

    assert (job.status, job.outputs[0].media_type) == ("completed", "video/mp4")


def test_a_training_ends_without_an_output(testkit: Kit) -> None:
    job = testkit.worker.run(worker.track(testkit.api.submit(family="v3/fine_tune")))

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
def test_a_scenario_applies_to_one_job(testkit: Kit, scenario: str, status: str, code: str | None) -> None:
    changed = worker.track(testkit.api.submit("a lake", scenario=scenario))  # type: ignore[arg-type]  # one of many names
    normal = worker.track(testkit.api.submit("a sea"))

    testkit.worker.run_all()

    job, normal_job = worker.get(changed), worker.get(normal)
    assert job is not None
    assert normal_job is not None
    assert (job.status, job.error_code) == (status, code)
    assert normal_job.status == "completed"


def test_a_scenario_applies_to_all_new_orders_until_it_is_switched_off(testkit: Kit) -> None:
    testkit.api.play("failed")
    first = worker.track(testkit.api.submit("a lake"))
    testkit.api.play()
    second = worker.track(testkit.api.submit("a lake"))

    testkit.worker.run_all()

    jobs = [worker.get(first), worker.get(second)]
    assert [job and job.status for job in jobs] == ["failed", "completed"]


def test_a_scenario_applies_to_a_made_up_id(testkit: Kit) -> None:
    testkit.api.play("failed", remote_id=77)

    assert testkit.worker.run(worker.track(77)).status == "failed"
    assert testkit.worker.run(worker.track(78)).status == "completed"


def test_unknown_names_are_refused_with_a_list_of_the_known_ones(testkit: Kit) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*v6/video/\*"):
        testkit.api.submit("a lake", family="v6/nothing")
    with pytest.raises(ValueError, match="must be one of failed, try-again"):
        testkit.api.play("nothing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of failed, try-again"):
        testkit.api.play("nothing", remote_id=5)  # type: ignore[arg-type]


def test_ids_of_two_tests_on_one_database_do_not_repeat(tmp_path: Path, migrated_sqlite: Path) -> None:
    """Rows of an earlier test are still there. They must not be confused with the new job."""
    ids = []
    for number in (1, 2):
        with kit(tmp_path / f"kit{number}", tables=migrated_sqlite) as testkit:
            ids.append(testkit.api.submit("a lake")["id"])

    assert ids[0] != ids[1]
