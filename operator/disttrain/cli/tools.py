"""The verbs around a job, their arguments and what does each: report, init, doctor, completion, convert, debug.

Each module is imported when its verb is called. Not here: what a verb does.
"""

import argparse
from typing import Final, TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

VERBS: Final = ("report", "init", "doctor", "completion", "convert", "debug")


def call(options: argparse.Namespace) -> int:
    """Does what such a verb says; the exit code."""
    match options.verb:
        case "report":
            from disttrain.cli.report import report

            runs = [run for run in (options.run, options.second) if run is not None]
            return report(runs, options.output, (options.namespace, options.context))
        case "doctor":
            from disttrain.cli.doctor import doctor

            return doctor(options.namespace, options.context, options.output)
        case "completion":
            from disttrain.cli.completion import completion
            from disttrain.cli.main import make_parser

            return completion(options.shell, make_parser())
        case "convert":
            from disttrain.cli.convert import convert

            return convert(options.file, options.output)
        case "debug":
            from disttrain.cli.debug import debug

            return debug(options.run, options.output)
        case _:
            from disttrain.cli.init import init

            return init(options.name, options.strategy, options.workers, options.folder, force=options.force)


def add(verbs: Verbs, on_cluster: argparse.ArgumentParser) -> None:
    """Their arguments. on_cluster: those of every verb of a cluster."""
    report = verbs.add_parser(
        "report",
        help="write a page about a run or job, or about two",
        description="Writes one file of HTML about a local run, or about two beside one another: curves, restarts on a time line, where "
        "the time went, ranks, configuration without its secrets. It needs no network and no script. With -n or --context of jobs of "
        "the cluster, from their masters while they run.",
        epilog="exit codes: 0 done, 1 the file cannot be written, 2 no such run, or it has no history; of a cluster as `disttrain ls`",
        parents=[on_cluster],
    )
    report.add_argument("run", metavar="RUN", help="as of history")
    report.add_argument("second", metavar="RUN2", nargs="?", help="another one, beside the first")
    report.add_argument("-o", "--output", metavar="FILE", help="default: report-RUN.html; - is standard output")

    init = verbs.add_parser(
        "init",
        help="write the files of a new job",
        description="Writes a commented job and a Python file that run as they are, to be changed into your own. On a terminal it asks for "
        "what no option says.",
        epilog="exit codes: 0 done, 1 a file cannot be written, 2 wrong input, or a file is there already, 130 interrupted",
    )
    init.add_argument("name", metavar="NAME", nargs="?", help="of the job; default: that of the folder")
    init.add_argument(
        "--strategy",
        metavar="STRATEGY",
        help="DataParallel (default), ParameterServer, or script: a torchrun script of your own",
    )
    init.add_argument("--workers", metavar="N", help="default: 2")
    init.add_argument("--folder", metavar="DIR", default=".", help="where the files are written; default: here")
    init.add_argument("--force", action="store_true", help="write over files that are there")

    doctor = verbs.add_parser(
        "doctor",
        help="say what this machine and the cluster lack, and what mends it",
        description="Looks at what a local run needs (Python, packages, memory, /dev/shm, disk), and where there is a kubeconfig at the "
        "cluster: its version, CRD, operator, your rights in the namespace, nodes, storage, schedulers. It changes nothing.",
        epilog="exit codes: 0 nothing is missing (warnings are printed), 1 something is, 2 wrong input, 3 no cluster",
        parents=[on_cluster],
    )
    doctor.add_argument("-o", "--output", choices=["table", "json", "yaml"], default="table")

    completion = verbs.add_parser(
        "completion",
        help="print a script by which a shell completes this command",
        description="Prints the script for a shell: `source <(disttrain completion bash)`, the same with zsh, `disttrain completion fish | "
        "source`; put the line into the shell's start file.",
        epilog="exit codes: 0 done, 2 wrong input",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell")

    convert = verbs.add_parser(
        "convert",
        help="make a DistTrainJob of a job of Kubeflow or KubeRay",
        description="Prints a PyTorchJob, TFJob, TrainJob or RayJob as a DistTrainJob, with the other objects of the file. What has no "
        "counterpart, or changes, is said line by line on standard error, and the result is checked as by `disttrain lint`.",
        epilog="exit codes: 0 done, 1 the file cannot be written, 2 wrong input, or the result has a fault that it names",
    )
    convert.add_argument("file", metavar="FILE", help="YAML or JSON file, folder or URL; - reads standard input")
    convert.add_argument("-o", "--output", metavar="FILE", help="default: standard output")

    debug = verbs.add_parser(
        "debug",
        help="show where each process of a local run is, or write an archive for others",
        description="Prints the stacks of every process of a run of this folder that goes on; they also go to its logs. With -o it writes "
        "an archive with the stacks, the job, history, logs and versions, without their secrets; also of a run that is over.",
        epilog="exit codes: 0 done, 1 the archive cannot be written, 2 no such run, or it is over and -o is not given",
    )
    debug.add_argument(
        "run", metavar="RUN", help="a run's folder or its name, or a job, which stands for its newest run"
    )
    debug.add_argument("-o", "--output", metavar="FILE", help="an archive that ends with .tar.gz")
