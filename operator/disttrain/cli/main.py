"""`disttrain`, and under the name kubectl-disttrain `kubectl disttrain`: reads the arguments and hands over to one module a verb.

Everything else is imported when its verb is called, so that `--help` and completion are quick. Not here: what a verb does.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from disttrain import __version__
from disttrain.cli import tools


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    _mend_standard_streams()
    options = make_parser().parse_args(arguments)
    try:
        code = _call(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Mostly our output: its reader is gone, as with `| head`, or a disk is full.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                print(f"disttrain: {error.filename or 'cannot write'}: {error.strerror or error}", file=sys.stderr)
        # The interpreter would complain once more when it flushes.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _call(options: argparse.Namespace) -> int:
    match options.verb:
        case "run":
            from disttrain.cli.run import run

            return run(options.file, resume=options.resume, json_output=options.output == "json", quiet=options.quiet)
        case "lint":
            from disttrain.cli.lint import lint

            return lint(options.files)
        case "export":
            from disttrain.cli.export import export

            return export(options.source, options.output)
        case "history":
            from disttrain.cli.history import history

            return history(options.run, options.output, (options.namespace, options.context))
        case "plot":
            from disttrain.cli.plot import plot

            runs = [run for run in (options.run, options.second) if run is not None]
            return plot(runs, options.output, (options.namespace, options.context))
        case "scale":
            from disttrain.cli.scale import scale

            return scale(options.run, options.workers, namespace=options.namespace, context=options.context)
        case "submit":
            from disttrain.cli.submit import submit

            return submit(options)
        case "logs":
            from disttrain.cli.logs import logs

            return logs(options)
        case "ls" | "status" | "events" | "suspend" | "resume" | "cancel":
            return _on_cluster(options)
        case verb if verb in tools.VERBS:
            return tools.call(options)
        case "data":
            from disttrain.cli.data import pack

            named = ("partitions", "key", "config", "seed")
            given = [f"--{name}={value}" for name in named if (value := getattr(options, name)) is not None]
            given += [f"--split={split}" for split in options.split or ()]
            return pack([*given, "--", options.dataset, options.out])
        case _:
            print(f"disttrain {__version__}")
            return 0


def _on_cluster(options: argparse.Namespace) -> int:
    from disttrain.cli import cluster

    where = cluster.Where(options.namespace, options.context)
    match options.verb:
        case "ls":
            return cluster.list_jobs(where, everywhere=options.all_namespaces, output=options.output)
        case "status":
            return cluster.show(where, options.job, output=options.output)
        case "events":
            return cluster.events(where, options.job)
        case "cancel":
            return cluster.cancel(where, options.job)
        case verb:
            return cluster.suspend(where, options.job, suspended=verb == "suspend")


def _mend_standard_streams() -> None:
    """Descriptors 0 to 2 are open, whatever our caller closed: the next file would be given the number and be taken for one of them."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # is given the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for as long as we live
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without a character is no reason to fail


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="disttrain", description="Distributed training jobs.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    on_cluster = argparse.ArgumentParser(add_help=False)
    on_cluster.add_argument("-n", "--namespace", help="default: that of the context")
    on_cluster.add_argument("--context", help="of the kubeconfig; default: the current one")

    run = verbs.add_parser(
        "run",
        help="run a job on this machine, without a cluster",
        description="Runs the DistTrainJob of a file on this machine: its pods are processes, its volumes folders under .disttrain/. "
        "ConfigMaps and Secrets that it names are taken from the file; the data of a claim is expected in .disttrain/claims/CLAIM/. "
        "Every run is a job of its own and begins at step 0.",
        epilog="exit codes: 0 complete, 1 failed, 2 wrong input, 130 interrupted",
    )
    _add_job_file(run)
    run.add_argument(
        "--resume", action="store_true", help="go on with the newest run of this job, from its last checkpoint"
    )
    run.add_argument(
        "-o",
        "--output",
        choices=["text", "json"],
        default="text",
        help="json: the final DistTrainJob on standard output",
    )
    run.add_argument(
        "-q", "--quiet", action="store_true", help="leave out what the processes print; it is in their logs"
    )

    lint = verbs.add_parser(
        "lint",
        help="check files without a cluster",
        description="Checks DistTrainJob files as the API server would, and names each fault with its line.",
        epilog="exit codes: 0 every file can be used (warnings are printed), 2 wrong input",
    )
    lint.add_argument(
        "files", metavar="FILE", nargs="+", help="YAML or JSON file, folder or URL; - reads standard input"
    )

    export = verbs.add_parser(
        "export",
        help="write the model of a checkpoint into one file",
        description="Writes the model of a checkpoint as safetensors with the names of state_dict(), buffers and tied weights included: "
        "model.load_state_dict(safetensors.torch.load_file(FILE)) takes it. The model of a training that is done is there already: see "
        "status.training.model.",
        epilog="exit codes: 0 done, 1 the file cannot be written, 2 no checkpoint that can be used",
    )
    export.add_argument(
        "source",
        metavar="FOLDER|RUN",
        help="a checkpoint (step-…), a folder of checkpoints, a run in .disttrain/runs, or a job, which stands for its newest run",
    )
    export.add_argument(
        "-o", "--output", metavar="FILE", default="model.safetensors", help="default: model.safetensors"
    )

    history = verbs.add_parser(
        "history",
        help="print the curves and events of a run or job",
        description="Prints the points of the curves of a local run, and its events, from the history that it leaves; with -n or --context "
        "those of a job of the cluster, from its master while it runs.",
        epilog="exit codes: 0 done, 2 no such run, or none that has a history; of a cluster as `disttrain ls`",
        parents=[on_cluster],
    )
    history.add_argument(
        "run",
        metavar="RUN",
        help="a run's folder or its name, a job, which stands for its newest run, or a folder of checkpoints",
    )
    history.add_argument("-o", "--output", choices=["table", "json", "csv"], default="table")

    plot = verbs.add_parser(
        "plot",
        help="draw loss and throughput of a run or job, or of two",
        description="Draws loss and throughput of a local run over its steps, or of two over one another, from their histories; with -n or "
        "--context of jobs of the cluster, from their masters while they run.",
        epilog="exit codes: 0 done, 1 the file cannot be written, 2 no such run, or it has no history; of a cluster as `disttrain ls`",
        parents=[on_cluster],
    )
    plot.add_argument("run", metavar="RUN", help="as of history")
    plot.add_argument("second", metavar="RUN2", nargs="?", help="another one, over the first")
    plot.add_argument(
        "-o", "--output", metavar="FILE", help="write FILE.svg, FILE.html or FILE.png in place of the terminal"
    )

    scale = verbs.add_parser(
        "scale",
        help="change the number of workers of a run or job that goes on",
        description="Asks a run of this folder, or without one a job of the cluster, for another number of workers, within worker.elastic "
        "of its job. The training goes on with those that are there, and the others join or leave between two steps.",
        epilog="exit codes: 0 asked, 1 the run's folder cannot be written, 2 wrong input; of a cluster as `disttrain ls`",
        parents=[on_cluster],
    )
    scale.add_argument(
        "run",
        metavar="RUN|JOB",
        help="a run's folder or its name, or a job, which stands for its newest run; with -n or --context a job of the cluster",
    )
    scale.add_argument("workers", metavar="N", help="how many workers, from elastic.minReplicas to maxReplicas")

    tools.add(verbs, on_cluster)
    _add_submit(verbs, on_cluster)
    _add_verbs_of_a_cluster(verbs, on_cluster)
    _add_logs(verbs, on_cluster)

    data = verbs.add_parser("data", help="pack a data set for data.volume or data.url")
    pack = data.add_subparsers(dest="data_verb", required=True, metavar="VERB").add_parser(
        "pack",
        help="write a data set into partition files",
        description="Writes the samples of a map-style data set into partition files and an index, which trainer.dataset "
        "disttrain_trainer.data:packed reads: larger than memory, encrypted with --key, kept on the workers' disks with data.replication.",
        epilog="exit codes: 0 done, 1 the factory or the disk failed, 2 wrong input, 130 interrupted",
    )
    pack.add_argument(
        "dataset", metavar="package.module:dataset", help="the factory (config, split), as trainer.dataset"
    )
    pack.add_argument(
        "out",
        metavar="OUT",
        help="folder, which gets one of each split: the content of the claim of data.volume, or of data.url",
    )
    pack.add_argument(
        "--partitions", metavar="N", required=True, help="files of each split; a few for each worker, such as 64"
    )
    pack.add_argument(
        "--key", metavar="FILE", help="encrypt with AES-256-GCM: 32 bytes, also in hex (openssl rand -hex 32) or base64"
    )
    pack.add_argument("--config", metavar="JSON|FILE", help="the factory's config, as trainer.config; default: {}")
    pack.add_argument("--seed", metavar="N", help="as trainer.seed: what the factory draws at random; default: 0")
    pack.add_argument("--split", metavar="SPLIT", action="append", help="train or test; may be repeated; default: both")

    verbs.add_parser("version", help="print the version")
    return parser


def _add_verbs_of_a_cluster(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", on_cluster: argparse.ArgumentParser
) -> None:
    texts = {
        "ls": "list the jobs of a cluster",
        "status": "show a job of a cluster: why it waits, where it is, what it lost, its pods",
        "events": "show what happened to a job of a cluster and its pods",
        "suspend": "have a job take a checkpoint and free its pods",
        "resume": "have a suspended job go on where it was",
        "cancel": "delete a job and its pods; its checkpoints stay",
    }
    for verb, text in texts.items():
        parser = verbs.add_parser(
            verb,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="exit codes: 0 done, 2 wrong input, 3 no cluster, 4 not permitted, 5 DistTrain is not installed there",
            parents=[on_cluster],
        )
        if verb == "ls":
            parser.add_argument("-A", "--all-namespaces", action="store_true", help="those of all namespaces")
        else:
            parser.add_argument("job", metavar="JOB", help="its name")
        if verb in ("ls", "status"):
            parser.add_argument("-o", "--output", choices=["text", "json", "yaml"], default="text")


def _add_job_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="YAML or JSON file, folder or URL with one DistTrainJob; - reads standard input"
    )


def _add_submit(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", on_cluster: argparse.ArgumentParser
) -> None:
    submit = verbs.add_parser(
        "submit",
        help="create a job on a cluster, with its code; with --wait follow it to its end",
        description="Checks the DistTrainJob of a file as `disttrain lint` does, and creates it on a cluster, after the ConfigMaps, "
        "Secrets and PersistentVolumeClaims of the file that are not there yet. With --wait the job's states go to standard error and "
        "its log to standard output, to its end; Ctrl-C leaves the job running.",
        epilog="exit codes: 0 created, with --wait complete, 1 failed or deleted, 2 wrong input, or not at its end after --timeout, 3 no "
        "cluster, 4 not permitted, 5 DistTrain is not installed there, 6 its version or a policy refuses the job, 7 a job of this name is "
        "there, 130 interrupted",
        parents=[on_cluster],
    )
    _add_job_file(submit)
    submit.add_argument(
        "--code",
        metavar="DIR",
        help="the .py files and packages of this folder become the job's trainer.code, in an immutable ConfigMap that goes with the job",
    )
    submit.add_argument(
        "--wait", action="store_true", help="follow the job to its end, and say by the exit code how it ended"
    )
    submit.add_argument("--timeout", metavar="TIME", help="with --wait: how long, such as 30m or 8h; the job goes on")


def _add_logs(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", on_cluster: argparse.ArgumentParser
) -> None:
    logs = verbs.add_parser(
        "logs",
        help="show what the processes of a run or job print",
        description="Prints the lines of all processes of a run of this folder, or without one of a job of the cluster, in time order. "
        "With -f it goes on to the end of the job, and takes in what is restarted, replaced or late.",
        epilog="exit codes: 0 done, 2 wrong input, 130 interrupted; of a cluster as `disttrain ls`",
        parents=[on_cluster],
    )
    logs.add_argument(
        "job",
        metavar="RUN|JOB",
        help="a run's folder or its name, or a job, which stands for its newest run; with -n or --context a job of the cluster",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on to the end of the job")
    logs.add_argument(
        "--role", action="append", choices=["master", "ps", "worker"], help="only of this role; may be repeated"
    )
    logs.add_argument(
        "--rank",
        action="append",
        metavar="N",
        help="only these, such as 0,3 or 0-7: of workers, with --role ps of servers",
    )
    logs.add_argument("--tail", metavar="N", help="only the last lines of each process, before what -f brings")
    logs.add_argument("--since", metavar="TIME", help="only lines since then: 10m, 1h30m, or a time of RFC 3339")
    logs.add_argument(
        "--previous", action="store_true", help="of the container that ran before in the same pod, where there was one"
    )


if __name__ == "__main__":
    raise SystemExit(main())
