"""The master's decisions about a job: rounds, assignments, progress, checkpoints, completion. It never trains.

collective, parameter_server, command   one coordinator for each kind of job
rounds, workers, servers, work_queue    what a parameter-server coordinator decides with
checkpoints, completion, attendance     when a checkpoint is made, when the job is done, who is missing or drains
progress, goodput                       what is counted
main                                    the composition: the only file that knows sockets, threads and the clock
"""
