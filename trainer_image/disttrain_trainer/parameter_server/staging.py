"""The memory that the network reads and writes: on the CPU the model's own, on a GPU copies in the host's memory."""

from disttrain_trainer.model.flat import FlatModel, Vectors


class Staging:
    """Parameters and gradients of one model for the connections to the servers. For one thread."""

    def __init__(self, model: FlatModel) -> None:
        self._device_parameters = model.parameters
        self._copies = model.parameters[0].device.type == "cuda"
        self.parameters: Vectors = _pinned(model.parameters) if self._copies else model.parameters
        """What is sent first, and what `pull` writes to."""
        self._gradients: Vectors = _pinned(model.parameters) if self._copies else ()

    def to_device(self) -> None:
        """The model takes over the parameters that came."""
        if self._copies:
            _copy(self.parameters, self._device_parameters)

    def to_host(self) -> None:
        """`parameters` are those of the model."""
        if self._copies:
            _copy(self._device_parameters, self.parameters)

    def gradients(self, gradients: Vectors) -> Vectors:
        """The gradients, in memory that can be sent."""
        if not self._copies:
            return gradients
        _copy(gradients, self._gradients)
        return self._gradients


def _pinned(vectors: Vectors) -> Vectors:
    return tuple(vector.to("cpu", copy=True).pin_memory() for vector in vectors)


def _copy(source: Vectors, target: Vectors) -> None:
    for values, place in zip(source, target, strict=True):
        place.copy_(values)
