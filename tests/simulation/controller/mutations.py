"""Bugs that are planted into a copy of the operator, one at a time, each with the seed of a life that finds it.

A simulation that does not find them proves nothing. `tools/mutate` plants them; `tools/mutate --find NAME` looks for a seed. The first
eight are those of a review, of which unit tests and the simulation of the plan together caught four.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """One bug."""

    name: str
    path: str
    """Below operator/disttrain."""
    before: str
    """A text that is there exactly once."""
    after: str
    seed: int


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "pods are created together with their PodGroup",
        "controller/apply.py",
        "isinstance(action, Create) and action.kind in POD_GROUPS",
        "False",
        3,
    ),
    Mutation(
        "an object of any owner counts as the job's when its name is taken",
        "controller/apply.py",
        "if not owned(found, job.metadata.uid):",
        'if not found["metadata"].get("ownerReferences"):',
        13,
    ),
    Mutation(
        "a failure is forgotten before its pod is gone",
        "plan/failures/account.py",
        "accounted = tuple(uid for uid in restarts.accounted if uid in uids)",
        "accounted = tuple(uid for uid in restarts.accounted if uid not in uids)",
        1,
    ),
    Mutation(
        "a status is written without a resource version, and the answer is not kept",
        "controller/status.py",
        'about = {"uid": job.uid, "resourceVersion": job.version}',
        'about = {"uid": job.uid}; self._cache.jobs.put = lambda body: None',
        0,
    ),
    Mutation(
        "an older version of an object replaces a newer one",
        "controller/cache.py",
        "(known and version <= known.version)",
        "(known and known.uid == uid and version == known.version)",
        5,
    ),
    Mutation(
        "deletions carry no uid",
        "controller/apply.py",
        "key.name, uid=uid, grace_seconds=grace)",
        'key.name, uid="", grace_seconds=grace)',
        1074,
    ),
    Mutation(
        "the pause after a refusal is ignored",
        "plan/children.py",
        "for refusal in view.refusals]\n    if view.snapshot.name_conflicts",
        "for refusal in ()]\n    if view.snapshot.name_conflicts",
        5,
    ),
    Mutation(
        "the answer to our own status is not kept",
        "controller/status.py",
        "        self._cache.jobs.put(answer)\n",
        "",
        0,
    ),
    Mutation(
        "a status that met a conflict is sent again with the newest version",
        "controller/status.py",
        "            self._cache.jobs.put(await self._api.get(JOBS, namespace, name))\n            raise\n",
        "            newest = self._cache.jobs.put(await self._api.get(JOBS, namespace, name))\n"
        "            if newest is None:\n                raise\n"
        "            answer = await self._send(newest, patch)\n",
        24,
    ),
    Mutation(
        "the answer to a creation is not kept",
        "controller/expectations.py",
        "        if self._cache.stores[resource].put(body) is None:\n            return  # the watch",
        "        if True:\n            return  # the watch",
        4,
    ),
    Mutation(
        "an object that is gone may come back",
        "controller/cache.py",
        "        self._gone.setdefault(uid, _Gone(number=self.known.deletions, version=known.version if known else 0))\n",
        "",
        38,
    ),
    Mutation(
        "a comparison does not find what has vanished",
        "controller/cache.py",
        "return [entry for entry in self if entry.uid not in uids and entry.version <= version]",
        "return []",
        1294,
    ),
    Mutation(
        "an irreversible step is taken on the cache alone",
        "controller/reconcile.py",
        "        if plan.irreversible:\n",
        "        if False:\n",
        132,
    ),
    Mutation(
        "a child is found by the uid of its owner, in any namespace",
        "controller/cache.py",
        "return self._by_owner.get((namespace, uid), {}).values()",
        "return [one for (_, owner), all_ in self._by_owner.items() if owner == uid for one in all_.values()]",
        6,
    ),
    Mutation(
        "a list that is older than the cache is believed",
        "controller/resync.py",
        "    if page.version < before.newest:\n",
        "    return\n    if page.version < before.newest:\n",
        38,
    ),
    Mutation(
        "a conflict at a deletion counts as the end of the object",
        "controller/apply.py",
        "if isinstance(error, Conflict) and await self._is_there(resource, key, uid):",
        "if False:",
        1172,
    ),
    Mutation(
        "a failure is counted on the cache alone",
        "plan/failures/steps.py",
        "final=view.restarts.total > 0",
        "final=False",
        1574,
    ),
    Mutation(
        "a name is free while its pod ends",
        "plan/view.py",
        "return frozenset(pod.name for pod in self.snapshot.pods)",
        "return frozenset(pod.name for pod in self.snapshot.pods if not pod.deleting)",
        19,
    ),
    Mutation(
        "a failed pod is deleted before its failure is written down",
        "plan/children.py",
        "if pod.uid in accounted and view.reached(account.release(view, pod)):",
        "if pod.uid not in accounted or view.reached(account.release(view, pod)):",
        0,
    ),
    Mutation(
        "a pod that ends is deleted by force on a node that reports",
        "plan/lost_nodes.py",
        "        if pod.deleting and moments and",
        "        if pod.deleting and not moments:\n            moments = [view.now]\n        if pod.deleting and moments and",
        19,
    ),
    Mutation(
        "the comparison lists every namespace",
        "controller/resync.py",
        "self._namespaces: Sequence[str | None] = namespaces or [None]",
        "self._namespaces: Sequence[str | None] = [None]",
        38,
    ),
    Mutation(
        "a finished job is treated like any other",
        "plan/decide.py",
        "    if view.finished:\n",
        "    if view.finished and view.spec.suspend:\n",
        0,
    ),
)
