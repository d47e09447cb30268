"""What follows from a failed pod: the operator replaces it, restarts the job, or fails it; each failure is counted exactly once.

`policy` decides, by the `cause` of the failures and by what the `account` allows; `silence` finds a master that hangs; `steps` writes
the answer down. A failure is written down before anything is done about it: the pod is replaced one pass later, when its uid is in
`restarts.accounted`. A restart of the job is written down as the next attempt; the pods of older attempts are never counted.
"""
