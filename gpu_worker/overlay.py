"""Parameters that a peer provisioned, by value and for its stream only, in front of those that were loaded."""

from gpu_worker.allowance import Allowance
from gpu_worker.decoder import Decoder
from gpu_worker.model import Model
from gpu_worker.weights import F32, ParameterSet
from wire.errors import PreconditionError
from wire.parameters import Parameter
from wire.v1 import gpu_worker_pb2 as pb


class Overlay:
    """What was provisioned over one model, and what that takes of the allowance which all streams share."""

    def __init__(self, model: Model, allowance: Allowance) -> None:
        """Raises PreconditionError for a model that takes no parameters."""
        if model.decoder is None or model.precision != pb.PRECISION_FLOAT32:
            raise PreconditionError("parameters are provisioned to a model that is loaded as float32")
        self.model = model
        self._parameters = ParameterSet(model.decoder.device, int8=False)
        self.decoder: Decoder = model.decoder.over(self._parameters)
        self._allowance = allowance
        self._size = 0

    def put(self, parameter: Parameter, first_row: int, rows: F32) -> None:
        """float32[rows, width] of a parameter, in order; 0 begins it anew.

        Raises ExhaustedError for one that the allowance does not hold, InvalidArgumentError for rows out of order.
        """
        if parameter.name not in self._parameters:
            size = 4 * parameter.rows * parameter.width
            self._allowance.take(size)
            self._size += size
        self._parameters.put(parameter, first_row, rows)

    def close(self) -> None:
        """Give back what was taken: the decoder is not used any more."""
        self._allowance.give(self._size)
        self._size = 0
