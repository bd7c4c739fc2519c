"""grpc.health.v1 and reflection, the same for both services, answered by the asyncio thread."""

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from wire.errors import PreconditionError


class Health:
    """What health checks of one service hear, under its name and under ""."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._servicer = health.aio.HealthServicer()

    async def add(self, server: grpc.aio.Server) -> None:
        """From now on the server answers: NOT_SERVING, until `report` says otherwise."""
        await self.report(serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def report(self, serving: bool) -> None:
        """SERVING or NOT_SERVING."""
        states = health_pb2.HealthCheckResponse
        for name in ("", self._service):
            await self._servicer.set(name, states.SERVING if serving else states.NOT_SERVING)

    def reflect(self, server: grpc.aio.Server) -> None:
        """Answer gRPC reflection too. Raises PreconditionError where the package is missing."""
        try:
            from grpc_reflection.v1alpha import reflection
        except ImportError:
            raise PreconditionError("--reflection needs the package grpcio-reflection") from None
        reflection.enable_server_reflection((self._service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
