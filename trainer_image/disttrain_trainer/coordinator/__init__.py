"""The master's decisions about a job: rounds, assignments, progress, checkpoints, completion. It never trains.

collective, parameter_server, command   one coordinator for each kind of job
rounds, workers, servers, work_queue    what a parameter-server coordinator decides with
checkpoints, completion                 when a checkpoint is made, when the job is done
checkpoint_folder                       the files of checkpoints, in a thread of their own
draining, missing_members               members that received SIGTERM, members that the job waits for
progress                               what is counted
main                                    the composition: the only file that knows sockets, threads and the clock
"""
