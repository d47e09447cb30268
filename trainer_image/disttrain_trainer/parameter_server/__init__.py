"""The parameter server: sharded parameters on servers, gradients from workers; synchronous, asynchronous, or with bounded staleness.

role           a parameter server as a process of the job: it carries out the master's orders
server         holds shards, accepts and introduces workers; requests: answers those of one connection
shard_host     a shard, its consistency policy and its workers under one lock
consistency    when a worker may start, and which gradients become an update; pure
shard          the parameters of one shard, updated block by block; shard_file: on disk, written by saving; shard_state: in words
replicated_host  a shard with a copy, or a copy; update_log, copy_sender, copy_receiver, following: how the copy follows
held_shards    the shards of one server; host_factory makes them
shares         what a rank of a group has of the vectors; assembly: parts that a group's ranks bring in shares
optimizer      SGD, Adam, AdamW on the parts of a shard; participation: which elements took part
client         the worker's side; connection: to one server; identity: the body of HELLO
replica        the worker's copy of the model; staging: the memory that the network reads; assignments: what the master lets it compute
"""

from disttrain_trainer.model.flat import FlatModel, Layout
from disttrain_trainer.parameter_server.client import ShardedClient
from disttrain_trainer.parameter_server.saving import SavedShard
from disttrain_trainer.parameter_server.server import ShardServer
from disttrain_trainer.parameter_server.shard_state import ShardState

__all__ = ["FlatModel", "Layout", "SavedShard", "ShardServer", "ShardState", "ShardedClient"]
