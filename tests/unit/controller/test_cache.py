"""The cache: of three writers in no order, the newest version of an object wins."""

from __future__ import annotations

from disttrain.controller.cache import Cache, Key
from disttrain.plan.model import Phase
from unit.controller.bodies import pod

KEY = Key("default", "digits-worker-0")


def phase(cache: Cache) -> Phase | None:
    entry = cache.pods.get(KEY)
    return entry.value.view.phase if entry and entry.value.view else None


def test_older_version_that_comes_later_is_ignored() -> None:
    cache = Cache()
    assert cache.pods.put(pod(7, phase="Running"))
    assert cache.pods.put(pod(5, phase="Pending")) is None
    assert phase(cache) is Phase.RUNNING


def test_version_that_changes_nothing_we_keep_is_no_change() -> None:
    cache = Cache()
    assert cache.pods.put(pod(5))
    assert cache.pods.put(pod(6)) is None
    assert cache.pods.put(pod(7, phase="Running"))


def test_deleted_pod_does_not_come_back_with_a_late_event() -> None:
    cache = Cache()
    cache.pods.put(pod(5))
    assert cache.pods.drop(KEY, "u1")
    assert cache.pods.put(pod(6, phase="Running")) is None
    assert phase(cache) is None


def test_late_deletion_of_a_former_pod_leaves_its_successor() -> None:
    cache = Cache()
    cache.pods.put(pod(9, uid="u2"))
    assert cache.pods.drop(KEY, "u1") is None
    assert phase(cache) is Phase.PENDING


def test_list_finds_what_vanished_but_not_what_was_made_after_it() -> None:
    cache = Cache()
    cache.pods.put(pod(5, uid="old", name="digits-worker-0"))
    cache.pods.put(pod(20, uid="new", name="digits-worker-1"))
    assert [entry.uid for entry in cache.pods.vanished(set(), version=10)] == ["old"]


def test_pods_are_found_by_the_uid_of_their_job_and_not_by_its_name() -> None:
    cache = Cache()
    cache.pods.put(pod(5, owner="former"))
    assert list(cache.pods.owned_by("default", "job-uid")) == []
    assert [entry.uid for entry in cache.pods.owned_by("default", "former")] == ["u1"]
    cache.pods.drop(KEY, "u1")
    assert list(cache.pods.owned_by("default", "former")) == []


def test_pods_whose_owner_is_named_by_a_later_version_of_the_api_are_the_jobs_own() -> None:
    cache, body = Cache(), pod(5)
    (reference,) = body["metadata"]["ownerReferences"]
    reference["apiVersion"] = "disttrain.dev/v1"
    cache.pods.put(body)
    assert [entry.uid for entry in cache.pods.owned_by("default", "job-uid")] == ["u1"]
    stranger = pod(6, uid="u2", name="digits-worker-1")
    stranger["metadata"]["ownerReferences"][0]["apiVersion"] = "example.org/v1alpha1"
    cache.pods.put(stranger)
    assert [entry.uid for entry in cache.pods.owned_by("default", "job-uid")] == ["u1"]
