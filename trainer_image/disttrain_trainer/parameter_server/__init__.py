"""The parameter server: sharded parameters on servers, gradients from workers, in step, asynchronous, or with bounded staleness.

layout        a model as flat vectors, and which server owns which part
consistency   who may start when, and what becomes an update; pure
optimizer     SGD, Adam, AdamW on flat parts
shard         one server's parameters, optimiser state and what was applied; saved and loaded
generation    a shard and its workers under one lock: what the connections of a world share
wire          the binary protocol
server        sockets and threads around a generation
client        the worker's side
"""

from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.layout import FlatModel, Layout
from disttrain_trainer.parameter_server.server import SavedShard, ShardServer, ShardState

__all__ = ["FlatModel", "Layout", "SavedShard", "ShardServer", "ShardState", "ShardedClient"]
