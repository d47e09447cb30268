"""The parameter server: sharded parameters on servers, gradients from workers, in step, asynchronous, or with bounded staleness.

layout        a model as flat vectors, and which server owns which part; memory: where they lie
consistency   who may start when, and what becomes an update; pure
optimizer     SGD, Adam, AdamW on the parts of a shard
shard         one server's parameters, updated block by block; shard_file: on disk
generation    a shard, its policy and its workers under one lock
wire          the binary protocol; identity: who a worker says it is
server        accepts and introduces workers; requests: answers one connection's
client        the worker's side; connection: to one server; first: a new model's parameters once more
"""

from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.generation import ShardState
from disttrain_trainer.parameter_server.layout import FlatModel, Layout
from disttrain_trainer.parameter_server.server import SavedShard, ShardServer

__all__ = ["FlatModel", "Layout", "SavedShard", "ShardServer", "ShardState", "ShardedClient"]
