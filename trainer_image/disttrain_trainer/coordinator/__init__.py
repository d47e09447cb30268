"""The master's decisions about a job: rounds, assignments, progress, checkpoints, completion. It never trains.

collective, parameter_server, command   one coordinator for each kind of job
grouped, formations                     workers of parameter servers that are groups of ranks
rounds, workers, servers, work_queue    what a parameter-server coordinator decides with
checkpoints, completion                 when a checkpoint is made, when the job is done
checkpoint_folder                       the files of checkpoints, in a thread of their own
draining, missing_members               members that received SIGTERM, members that the job waits for
progress, rank_counts                  what is counted
history, history_file, master_history  the history of the job: its lines, their file, and the thread that writes it
main                                    the composition: the only file that knows sockets, threads and the clock
"""
