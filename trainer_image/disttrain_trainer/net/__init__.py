"""Every connection of a job and every message on it.

messages, incoming        what is said on the control connection, and its check at the door
control_client            a process's end of it; members: what the process knows from it
control_server            the master's end of it; peers: who is at the other end, and what a coordinator is
frames                    binary frames between workers and parameter servers
"""
