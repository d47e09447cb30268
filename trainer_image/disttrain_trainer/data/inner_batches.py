"""The batches into which a worker with local steps cuts its part of a step. Pure."""

from dataclasses import replace

from disttrain_trainer.data.schedule import BatchPart


def inner_batches(part: BatchPart, steps: int, full: int) -> list[BatchPart]:
    """The part in near-equal consecutive batches, each with at least one sample: `steps`, or as many as there are samples.

    full: samples of a part of a full step. Where those give each batch two samples or more, so does a smaller part, and has fewer batches:
    BatchNorm cannot train on one sample.
    """
    each = 2 if full >= 2 * steps else 1
    count = max(1, min(steps, part.samples // each))
    cuts = [part.samples * number // count for number in range(count + 1)]
    return [
        replace(
            part,
            samples=cuts[batch + 1] - cuts[batch],
            indices=part.indices[cuts[batch] : cuts[batch + 1]],
            batch=batch,
        )
        for batch in range(count)
    ]
