"""`disttrain lint FILE…`: the checks of the API server, and what the operator would say of the job, with no cluster at hand."""

import sys

from disttrain.cli import files
from disttrain.cli.files import FoundJob, JobFile, Problem, WrongInput


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
        problems = [*file.warnings, *(problem for found in file.jobs for problem in _of_job(found, file))]
        for problem in problems:
            print(problem, file=sys.stderr)
        wrong = wrong or any(not problem.warning for problem in problems)
        if all(problem.warning for problem in problems):
            print(f"{name}: {', '.join(found.job.metadata.name for found in file.jobs)}: ok")
    return 2 if wrong else 0


def _of_job(found: FoundJob, file: JobFile) -> list[Problem]:
    """What can be said without a cluster and is not in the schema."""
    spec = found.job.spec
    problems = found.not_yet_supported()
    if spec.checkpoint is None and spec.trainer.model is not None:
        problems.append(
            found.problem(("spec",), "without checkpoint a restart of the job begins at step 0", warning=True)
        )
    script = spec.trainer.script
    if script is not None and script.config_map is not None:
        data = next(
            (
                {**(document.get("data") or {}), **(document.get("binaryData") or {})}
                for document in file.beside(found)
                if document["kind"] == "ConfigMap" and document["metadata"].get("name") == script.config_map
            ),
            None,
        )
        if data is not None and script.file not in data:
            problems.append(
                found.problem(
                    ("spec", "trainer", "script", "file"),
                    f'ConfigMap "{script.config_map}" has no key "{script.file}"; it has {", ".join(sorted(data)) or "none"}',
                )
            )
    return problems
