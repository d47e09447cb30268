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
        case "scale":
            from disttrain.cli.scale import scale

            return scale(options.run, options.workers)
        case "data":
            from disttrain.cli.data import pack

            named = ("partitions", "key", "config", "seed")
            given = [f"--{name}={value}" for name in named if (value := getattr(options, name)) is not None]
            given += [f"--split={split}" for split in options.split or ()]
            return pack([*given, "--", options.dataset, options.out])
        case _:
            print(f"disttrain {__version__}")
            return 0


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

    run = verbs.add_parser(
        "run",
        help="run a job on this machine, without a cluster",
        description="Runs the DistTrainJob of a file on this machine: its pods are processes, its volumes folders under .disttrain/. "
        "ConfigMaps and Secrets that it names are taken from the file; the data of a claim is expected in .disttrain/claims/CLAIM/. "
        "Every run is a job of its own and begins at step 0.",
        epilog="exit codes: 0 complete, 1 failed, 2 wrong input, 130 interrupted",
    )
    run.add_argument(
        "file", metavar="FILE", help="YAML or JSON file, folder or URL with one DistTrainJob; - reads standard input"
    )
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

    scale = verbs.add_parser(
        "scale",
        help="change the number of workers of a local run",
        description="Asks a run of this folder for another number of workers, within worker.elastic of its job. The run goes on with those "
        "that are there, and the others join or leave between two steps.",
        epilog="exit codes: 0 asked, 1 the run's folder cannot be written, 2 wrong input",
    )
    scale.add_argument(
        "run", metavar="RUN", help="a run's folder or its name, or a job, which stands for its newest run"
    )
    scale.add_argument("workers", metavar="N", help="how many workers, from elastic.minReplicas to maxReplicas")

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


if __name__ == "__main__":
    raise SystemExit(main())
