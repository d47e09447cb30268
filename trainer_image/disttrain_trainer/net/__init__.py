"""Every connection of a job and every message on it.

messages, incoming        the messages of the control connection, and their check where they come in
control_client            a process's end of it; members: the process's state, which its messages change
control_server            the master's end of it; peers: members, and the interface of a coordinator
frames                    binary frames between workers and parameter servers
transport, connection     how bytes travel: TCP, TLS (tls), or Unix sockets within a machine (local_sockets)
"""
