"""`disttrain lint FILE…`: the checks of the API server, and what the operator would say of the job, with no cluster at hand."""

import sys

from disttrain.api.trainer import Loop
from disttrain.cli import files
from disttrain.cli.files import FoundJob, JobFile, Problem, WrongInput
from disttrain.local import code
from disttrain.local.documents import Documents
from disttrain.plan.validity import idle_workers


def lint(names: list[str]) -> int:
    """0 when every file can be used, else 2."""
    wrong = False
    for name in names:
        try:
            file = files.read(name)
        except WrongInput as error:
            wrong = True
            print(error, file=sys.stderr)
            continue
        problems = [*file.warnings, *(problem for found in file.jobs for problem in problems_of(found, file))]
        for problem in problems:
            print(problem, file=sys.stderr)
        wrong = wrong or any(not problem.warning for problem in problems)
        if all(problem.warning for problem in problems):
            print(f"{name}: {', '.join(found.job.metadata.name for found in file.jobs)}: ok")
    return 2 if wrong else 0


def problems_of(found: FoundJob, file: JobFile) -> list[Problem]:
    """What can be said without a cluster and is not in the schema."""
    spec = found.job.spec
    problems = [*found.not_yet_supported(), *found.factories_by_file(), *found.groups_by_no_pattern()]
    if spec.checkpoint is None and isinstance(spec.trainer.work, Loop):
        problems.append(
            found.problem(
                ("spec",),
                "set checkpoint.volume: without it a restart of the job begins at step 0, and on a cluster the trained model is lost",
                warning=True,
            )
        )
    if idle := idle_workers(spec):
        problems.append(found.problem(("spec", "worker", "replicas"), idle, warning=True))
    if spec.trainer.code is not None:
        content = Documents(file.beside(found)).config_map(spec.trainer.code.config_map or "")
        if content is not None:
            problems += [
                found.problem(path, text)
                for path, text in code.in_config_map(spec.trainer.code, spec.trainer.script, content)
            ]
    return problems
