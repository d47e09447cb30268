"""The worker's side of each strategy: the role, which lives from round to round, and its exchange, which lives for one.

table               strategy -> worker's side
collective          DataParallel; all_reduce: its exchange; rank_checkpoints: what rank 0 saves
parameter_server    ParameterServer; push_pull: its exchange
group_rank          Hybrid with parameter servers; group_exchange: its exchange; group_orders, group_values, group_buffers
script              a user's script, which has a loop of its own; joining: whether its processes have met
"""
